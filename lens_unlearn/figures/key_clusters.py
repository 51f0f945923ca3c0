"""`key_clusters`: how far k-means clusters of the keys agree with the skills, and how compact both are, by layer.

Knows which measures it draws; panels and lines are those of `key_space_layers`.
"""

import plotly.graph_objects as go

from lens_unlearn.figures import key_space_parts, theme
from lens_unlearn.figures.key_space_layers import (
    add_line,
    finish_space,
    known_values,
    make_panels,
    site_kinds,
    values_at,
)
from lens_unlearn.keyspace.key_space import KeySpace

__all__ = ["key_clusters"]


def key_clusters(space: KeySpace, *, title: str | None = None) -> go.Figure:
    """Draw how far k-means clusters of the keys agree with the skills, and how compact both are, by layer.

    Args:
        space: What `lu.key_space` returned.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If there is nothing to draw.
    """
    key_space_parts.require(space, "key_clusters")
    fig = make_panels(space, ["agreement with the skills", "compactness"], 0.08)
    lines = [
        (1, "adjusted_rand", "adjusted Rand index of clusters and skills"),
        (2, "silhouette", "silhouette of the clusters"),
        (2, "silhouette_skills", "silhouette of the skills"),
    ]
    for row, kind in enumerate(site_kinds(space), start=1):
        for index, (column, measure, name) in enumerate(lines):
            values = values_at(space, kind, measure)
            add_line(fig, row, column, name, theme.MEASURES[index], index, values, name)
    rows = len(site_kinds(space))
    for column, title_text, low, high in ((1, "adjusted Rand index", -0.05, 1.02), (2, "silhouette", -0.1, 0.5)):
        # The same range for every model: small differences must not look large.
        known = [x for c, measure, _ in lines if c == column for x in known_values(space, measure)]
        fig.update_xaxes(range=[min([low, *known]) - 0.02, max([high, *known]) + 0.02], col=column)
        fig.update_xaxes(title_text=title_text, row=rows, col=column)
    return finish_space(
        fig,
        space,
        title or f"Clusters of keys ({len(space.skills)} by k-means) against the skills",
        "adjusted Rand index 1: clusters are the skills, 0: no more than by chance; silhouette 1: compact and far apart, "
        "0: they touch",
        "key_clusters",
        2,
    )
