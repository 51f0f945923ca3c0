"""Heat maps with a cell for each routed expert: layers upwards, experts to the right. A part of several figures, none itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_unlearn.figures import theme
from lens_unlearn.model.sites import Site

__all__ = ["Panel", "expert_grid"]


@dataclass(frozen=True)
class Panel:
    """One heat map: values by site and expert, and how they read."""

    heading: str
    values: Mapping[Site, np.ndarray]
    words: str
    """What a value is, in its hover text."""
    form: str = ".1%"
    """How it is written, as plotly does."""
    signed: bool = False
    details: Mapping[Site, Sequence[str]] | None = None
    """A further line for each expert."""


def expert_grid(panels: Sequence[Panel]) -> go.Figure:
    """Draw panels side by side; those of one kind of value share one scale."""
    layers = theme.layer_rows(site for panel in panels for site in panel.values)
    fig = make_subplots(
        1, len(panels), shared_yaxes=True, horizontal_spacing=0.04,
        column_titles=[theme.plain(panel.heading) for panel in panels],
    )  # fmt: skip
    axes: dict[tuple[str, bool], str] = {}
    for column, panel in enumerate(panels, start=1):
        axis = axes.setdefault((panel.words, panel.signed), f"coloraxis{len(axes) + 1 if axes else ''}")
        _heatmap(fig, column, panel, layers, axis)
    for index, ((words, signed), axis) in enumerate(axes.items()):
        alike = [panel for panel in panels if (panel.words, panel.signed) == (words, signed)]
        values = np.concatenate([value for panel in alike for value in panel.values.values()])
        finite = np.abs(values[np.isfinite(values)])
        most = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
        bar = {
            "title": words.replace(" ", "<br>"),
            "thickness": 14,
            "tickformat": alike[0].form,
            "x": 1.02 + 0.14 * index,
        }
        scale = theme.SIGNED if signed else theme.MAGNITUDE
        fig.update_layout(
            {axis: {"colorscale": scale, "cmin": -most if signed else 0.0, "cmax": most, "colorbar": bar}}
        )
    fig.update_xaxes(title_text="expert", showgrid=False, zeroline=False, tickformat="d")
    fig.update_yaxes(**theme.layer_ticks(layers), showgrid=False)
    fig.update_yaxes(title_text="layer", col=1)
    return fig


def _heatmap(fig: go.Figure, column: int, panel: Panel, layers: list[int], axis: str) -> None:
    width = max(len(value) for value in panel.values.values())
    z, text = np.full((len(layers), width), np.nan), [[""] * width for _ in layers]
    for site, value in panel.values.items():
        row = layers.index(site.layer)
        z[row, : len(value)] = value
        more = [""] * len(value) if panel.details is None else [f"<br>{one}" for one in panel.details[site]]
        for expert, detail in enumerate(more):
            text[row][expert] = f"<b>{Site(site.layer, site.kind)}[{expert}, :]</b>{detail}"
    place: Any = {"row": 1, "col": column}
    fig.add_heatmap(
        z=z,
        x=list(range(width)),
        y=layers,
        text=text,
        coloraxis=axis,
        name=theme.plain(panel.heading),
        hovertemplate=f"%{{text}}<br>{panel.words} %{{z:{panel.form}}}<extra>{theme.plain(panel.heading)}</extra>",
        hoverongaps=False,
        **place,
    )
