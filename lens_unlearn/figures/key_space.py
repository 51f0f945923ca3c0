"""`key_space`: in which layers a skill's queries are separable from all others, by the AUC of four distances.

Knows which measures it draws; panels and lines are those of `key_space_layers`.
"""

import numpy as np
import plotly.graph_objects as go

from lens_unlearn.figures import key_space_parts, theme
from lens_unlearn.figures.key_space_layers import add_line, finish_space, make_panels, site_kinds, values_at
from lens_unlearn.keyspace.key_space import KeySpace

__all__ = ["key_space"]


def key_space(space: KeySpace, *, title: str | None = None) -> go.Figure:
    """Draw the AUC of each of four distances, a skill's queries against all others, by layer, a panel per skill.

    Args:
        space: What `lu.key_space` returned.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If there is nothing to draw.
    """
    key_space_parts.require(space, "key_space")
    kinds = site_kinds(space)
    fig = make_panels(space, [theme.plain(skill, 24) for skill in space.skills], 0.03)
    low = 0.5
    for row, kind in enumerate(kinds, start=1):
        for column, skill in enumerate(space.skills, start=1):
            for index, (distance, name) in enumerate(key_space_parts.DISTANCES.items()):
                values = values_at(space, kind, f"auc_{distance}", skill, space.others)
                low = min([low, *(v.low if np.isfinite(v.low) else v.value for v in values.values())])
                add_line(fig, row, column, name, theme.MEASURES[index], index, values, f"{theme.plain(skill)}: AUC")
            chance = {"dash": "dot", "width": 1, "color": theme.TEXT}
            fig.add_vline(x=0.5, line=chance, row=row, col=column)  # pyright: ignore[reportArgumentType]
    fig.update_xaxes(range=[low - 0.03, 1.02], nticks=6)
    fig.update_xaxes(title_text="AUC, held out", row=len(kinds))
    return finish_space(
        fig,
        space,
        title or "Separability of each skill from all others in key space",
        "AUC 1: every query of the skill is nearer than every other; dotted: chance; bars: 95% intervals over documents",
        "key_space",
        len(space.skills),
    )
