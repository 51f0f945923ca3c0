"""What the figures of a key space by layer share: a grid of panels, a line of one measure over the layers, and their finish.

Knows layers, kinds of site and error bars; knows nothing of what a measure means.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_unlearn.figures import key_space_parts, theme
from lens_unlearn.keyspace.key_space import KeySpace
from lens_unlearn.keyspace.separation import Value
from lens_unlearn.model.sites import Site

__all__ = []


def site_kinds(space: KeySpace) -> list[str]:
    return list(dict.fromkeys(site.kind for site in space.sites))


def make_panels(space: KeySpace, columns: Sequence[str], spacing: float) -> go.Figure:
    """Return a grid of panels: a row per kind of site."""
    kinds = site_kinds(space)
    return make_subplots(
        len(kinds),
        len(columns),
        shared_yaxes=True,
        column_titles=list(columns),
        row_titles=kinds if len(kinds) > 1 else None,
        horizontal_spacing=spacing,
        vertical_spacing=0.24 / len(kinds),
    )


def values_at(space: KeySpace, kind: str, measure: str, skill: str = "", other: str = "") -> dict[Site, Value]:
    return {site: space.value(site, measure, skill, other) for site in space.sites if site.kind == kind}


def known_values(space: KeySpace, measure: str) -> list[float]:
    values = [space.value(site, measure).value for site in space.sites]
    return [value for value in values if np.isfinite(value)]


def add_line(
    fig: go.Figure,
    row: int,
    column: int,
    name: str,
    colour: str,
    index: int,
    values: dict[Site, Value],
    label: str,
    marks: str | None = None,
) -> None:
    """Draw a measure over the layers; the label precedes its value where one hovers."""
    up, down = (
        [end if np.isfinite(end) else 0.0 for end in ends] for ends in zip(*(error_arms(v) for v in values.values()))
    )
    fig.add_scatter(
        x=[v.value for v in values.values()],
        y=[site.layer for site in values],
        mode="lines+markers",
        line={"color": colour, "width": 2, "dash": key_space_parts.DASHES[index % len(key_space_parts.DASHES)]},
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
        hovertext=[f"<b>{site}</b><br>{label} {describe(v)}" for site, v in values.items()],
        hovertemplate="%{hovertext}<extra></extra>",
        row=row,
        col=column,
    )


def error_arms(value: Value) -> tuple[float, float]:
    return max(value.high - value.value, 0.0), max(value.value - value.low, 0.0)


def describe(value: Value) -> str:
    interval = f" [{value.low:.3f}, {value.high:.3f}]" if np.isfinite(value.low) else ""
    return f"{value.value:.4g}{interval}"


def finish_space(fig: go.Figure, space: KeySpace, title: str, note: str, name: str, columns: int) -> go.Figure:
    layers = sorted({site.layer for site in space.sites})
    fig.update_yaxes(**theme.layer_ticks(layers))
    fig.update_yaxes(title_text="layer", col=1)
    kinds = site_kinds(space)
    return theme.finish(
        fig,
        f"{title}: {kinds[0]}" if len(kinds) == 1 else title,
        note,
        about=key_space_parts.about(space),
        height=(theme.layer_height(layers) + 90) * len(kinds),
        columns=columns,
        facets=True,
        provenance=key_space_parts.origin(space),
        name=name,
    )
