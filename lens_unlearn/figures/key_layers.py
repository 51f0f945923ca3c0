"""Figures of a key space by layer: `key_space`, `key_clusters` and `key_volume`."""

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_unlearn.figures import spaces, theme
from lens_unlearn.sites import Site

if TYPE_CHECKING:
    from lens_unlearn.keyspace import KeySpace
    from lens_unlearn.separation import Value

__all__ = ["key_clusters", "key_space", "key_volume"]


def key_space(space: "KeySpace", *, title: str | None = None) -> go.Figure:
    """Draw how well each of four distances tells a skill's queries from all others, by layer, a panel per skill.

    Args:
        space: What `lu.key_space` returned.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If there is nothing to draw.
    """
    spaces.require(space, "key_space")
    kinds = _kinds(space)
    fig = _panels(space, [theme.plain(skill, 24) for skill in space.skills], 0.03)
    low = 0.5
    for row, kind in enumerate(kinds, start=1):
        for column, skill in enumerate(space.skills, start=1):
            for index, (distance, name) in enumerate(spaces.DISTANCES.items()):
                values = _values(space, kind, f"auc_{distance}", skill, space.others)
                low = min([low, *(v.low if np.isfinite(v.low) else v.value for v in values.values())])
                _line(fig, row, column, name, theme.METHODS[index], index, values, f"{theme.plain(skill)}: AUC")
            chance = {"dash": "dot", "width": 1, "color": theme.TEXT}
            fig.add_vline(x=0.5, line=chance, row=row, col=column)  # pyright: ignore[reportArgumentType]
    fig.update_xaxes(range=[low - 0.03, 1.02], nticks=6)
    fig.update_xaxes(title_text="AUC, held out", row=len(kinds))
    return _finish(
        fig,
        space,
        title or "How well distances in key space tell a skill from all others",
        "1: every query of the skill is nearer than every other; dotted: chance; bars: 95% intervals over documents",
        "key_space",
        len(space.skills),
    )


def key_clusters(space: "KeySpace", *, title: str | None = None) -> go.Figure:
    """Draw how far k-means clusters of the keys agree with the skills, and how compact both are, by layer.

    Args:
        space: What `lu.key_space` returned.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If there is nothing to draw.
    """
    spaces.require(space, "key_clusters")
    fig = _panels(space, ["agreement with the skills", "compactness"], 0.08)
    lines = [
        (1, "adjusted_rand", "adjusted Rand index of clusters and skills"),
        (2, "silhouette", "silhouette of the clusters"),
        (2, "silhouette_skills", "silhouette of the skills"),
    ]
    for row, kind in enumerate(_kinds(space), start=1):
        for index, (column, measure, name) in enumerate(lines):
            values = _values(space, kind, measure)
            _line(fig, row, column, name, theme.METHODS[index], index, values, name)
    rows = len(_kinds(space))
    for column, title_text, low, high in ((1, "adjusted Rand index", -0.05, 1.02), (2, "silhouette", -0.1, 0.5)):
        # The same range for every model: small differences must not look large.
        known = [x for c, measure, _ in lines if c == column for x in _known(space, measure)]
        fig.update_xaxes(range=[min([low, *known]) - 0.02, max([high, *known]) + 0.02], col=column)
        fig.update_xaxes(title_text=title_text, row=rows, col=column)
    return _finish(
        fig,
        space,
        title or f"Clusters of keys ({len(space.skills)} by k-means) against the skills",
        "adjusted Rand index 1: clusters are the skills, 0: no more than by chance; silhouette 1: compact and far apart, "
        "0: they touch",
        "key_clusters",
        2,
    )


def key_volume(space: "KeySpace", *, skill: str | None = None, title: str | None = None) -> go.Figure:
    """Draw the volume of each skill's box, and the distances between the boxes' centres, by layer.

    Args:
        space: What `lu.key_space` returned.
        skill: The one drawn in the warm colour; default: the first.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If there is nothing to draw.
    """
    spaces.require(space, "key_volume")
    colours = spaces.colours_of(space, spaces.skill_of(space, skill, "key_volume"))
    fig = _panels(space, ["volume of the box", "distance between centres"], 0.1)
    for row, kind in enumerate(_kinds(space), start=1):
        for index, name in enumerate(space.skills):
            values, told = _values(space, kind, "log_volume", name), theme.plain(name, 20)
            _line(fig, row, 1, told, colours[name], index, values, f"{told}: log volume")
        for index, (a, b) in enumerate(combinations(space.skills, 2)):
            values, told = (
                _values(space, kind, "centre_distance", a, b),
                f"{theme.plain(a, 20)} to {theme.plain(b, 20)}",
            )
            # A pair is seen by both colours: the line is of one skill, its marks are of the other.
            _line(fig, row, 2, told, colours[a], index, values, f"{told}: distance", marks=colours[b])
    fig.update_xaxes(title_text="log volume: sum of log σ", row=len(_kinds(space)), col=1)
    fig.update_xaxes(title_text="distance in σ, root mean square", row=len(_kinds(space)), col=2)
    fig.update_xaxes(rangemode="tozero", col=2)
    most = max((v.value for (_, _, _, measure), v in space.values.items() if measure == "floored"), default=0)
    note = f"up to {most:,.0f} coordinates of a box are nearly constant and stand at the floor of σ" if most > 0 else ""
    return _finish(fig, space, title or "Volume and centres of the skills' boxes", note, "key_volume", 2)


def _kinds(space: "KeySpace") -> list[str]:
    return list(dict.fromkeys(site.kind for site in space.sites))


def _panels(space: "KeySpace", columns: Sequence[str], spacing: float) -> go.Figure:
    """Return a grid of panels: a row per kind of site."""
    kinds = _kinds(space)
    return make_subplots(
        len(kinds),
        len(columns),
        shared_yaxes=True,
        column_titles=list(columns),
        row_titles=kinds if len(kinds) > 1 else None,
        horizontal_spacing=spacing,
        vertical_spacing=0.24 / len(kinds),
    )


def _values(space: "KeySpace", kind: str, measure: str, skill: str = "", other: str = "") -> "dict[Site, Value]":
    return {site: space.value(site, measure, skill, other) for site in space.sites if site.kind == kind}


def _known(space: "KeySpace", measure: str) -> list[float]:
    found = [space.value(site, measure).value for site in space.sites]
    return [value for value in found if np.isfinite(value)]


def _line(
    fig: go.Figure,
    row: int,
    column: int,
    name: str,
    colour: str,
    index: int,
    values: "dict[Site, Value]",
    what: str,
    marks: str | None = None,
) -> None:
    up, down = (
        [end if np.isfinite(end) else 0.0 for end in ends] for ends in zip(*(_arms(v) for v in values.values()))
    )
    fig.add_scatter(
        x=[v.value for v in values.values()],
        y=[site.layer for site in values],
        mode="lines+markers",
        line={"color": colour, "width": 2, "dash": spaces.DASHES[index % len(spaces.DASHES)]},
        marker={"symbol": theme.SYMBOLS[index % len(theme.SYMBOLS)], "size": 8, "color": marks or colour},
        name=name,
        legendgroup=name,
        showlegend=theme.is_first(fig, name),
        error_x={
            "type": "data",
            "array": up,
            "arrayminus": down,
            "color": theme.with_alpha(colour, 0.5),
            "thickness": 1.2,
            "width": 2,
        },
        hovertext=[f"<b>{site}</b><br>{what} {_told(v)}" for site, v in values.items()],
        hovertemplate="%{hovertext}<extra></extra>",
        row=row,
        col=column,
    )


def _arms(value: "Value") -> tuple[float, float]:
    return max(value.high - value.value, 0.0), max(value.value - value.low, 0.0)


def _told(value: "Value") -> str:
    interval = f" [{value.low:.3f}, {value.high:.3f}]" if np.isfinite(value.low) else ""
    return f"{value.value:.4g}{interval}"


def _finish(fig: go.Figure, space: "KeySpace", title: str, note: str, name: str, columns: int) -> go.Figure:
    layers = sorted({site.layer for site in space.sites})
    fig.update_yaxes(**theme.layer_ticks(layers))
    fig.update_yaxes(title_text="layer", col=1)
    kinds = _kinds(space)
    return theme.finish(
        fig,
        f"{title}: {kinds[0]}" if len(kinds) == 1 else title,
        note,
        about=spaces.about(space),
        height=(theme.layer_height(layers) + 90) * len(kinds),
        columns=columns,
        facets=True,
        provenance=spaces.origin(space),
        name=name,
    )
