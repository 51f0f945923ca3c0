"""`attribution_map`: the attribution of each neuron to the answers, ranked within its layer, beside the sum over its layer.

Knows how attributions of very different size become comparable colours; attributes nothing itself.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.figures import theme
from lens_unlearn.figures.rank_axis import Ranks
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.maps import NeuronMap, neuron_name

__all__ = ["attribution_map"]

MAX_CELLS = 12_000
"""Every cell has a hover text of some 60 bytes, and a figure may have two megabytes."""
MAX_RATIOS = 40
"""Layers whose ratios can be written without touching each other."""
OBJECTIVES = {
    "prob": "the probability of the answers",
    "logprob": "the log-probability of the answers",
    "loss": "the loss of the answers",
}


def attribution_map(
    attribution: NeuronMap, selection: NeuronMap | None = None, *, title: str | None = None, subtitle: str = ""
) -> go.Figure:
    """Draw attributions as a heatmap of layers by neurons, and the sum over each layer's neurons.

    Layers differ in size by orders of magnitude, so the colour is an attribution as a share of its own layer's highest, which
    is also what `critical` compares; hover gives the attribution itself. Neurons are ranked within their layer, the highest at
    the left; cells at both ends are single neurons, and those towards the middle hold ever more, and show the mean.

    Right of it, the bars are the sums over a layer's neurons, and the diamonds what there was to attribute; the number is
    their ratio, 1 where the sum over the steps is exact.

    Args:
        attribution: What `attribute` returned, or any map of signed numbers, which has no sums to compare.
        selection: Neurons to mark, such as `critical(attribution)`.
        title: Instead of the default title.
        subtitle: A further line below the title.

    Raises:
        LensUnlearnError: If there is nothing to draw, or the selection has another shape.

    Examples:
        >>> import torch
        >>> values = {Site(layer, "mlp.post"): torch.linspace(-1, 2, 8) for layer in range(4)}
        >>> [trace.type for trace in attribution_map(NeuronMap(values), NeuronMap(values).top(0.1)).data]
        ['heatmap', 'scatter']
    """
    theme.require_neurons(attribution, "attribution_map")
    kinds = theme.kinds_of(attribution, None)
    layers = theme.layer_rows(attribution)
    values = {site: value for site, value in theme.values_of(attribution).items() if value.size}
    shapes = {site: attribution.shape_of(site) for site in attribution}
    chosen = {} if selection is None else _chosen(selection, shapes)
    complete: Mapping[Site, Any] = getattr(attribution, "completeness", None) or {}
    fig = make_subplots(
        len(kinds),
        2 if complete else 1,
        shared_yaxes=True,
        column_titles=["each neuron", "all neurons of a layer together"] if complete else None,
        row_titles=kinds if len(kinds) > 1 else None,
        column_widths=[0.66, 0.34] if complete else None,
        horizontal_spacing=0.03,
        vertical_spacing=0.2 / len(kinds),
    )
    joined = False
    for row, kind in enumerate(kinds, start=1):
        of_kind = {site: value for site, value in values.items() if site.kind == kind}
        ranks = Ranks.of(min(value.size for value in of_kind.values()), MAX_CELLS // (len(layers) * len(kinds)))
        places = _cells(fig, row, of_kind, ranks, shapes, layers)
        if selection is not None:
            _marks(fig, row, places, chosen, len(layers))
        if complete:
            _sums(fig, row, {site: complete[site] for site in of_kind if site in complete})
        joined = joined or ranks.joined or any(value.size > ranks.neurons for value in of_kind.values())
        at, text = ranks.ticks()
        fig.update_xaxes(tickvals=at, ticktext=text, tickangle=0, range=[-0.5, ranks.cells - 0.5], row=row, col=1)
    fig.update_xaxes(showgrid=False, zeroline=False, col=1)
    fig.update_xaxes(title_text="rank, from either end", row=len(kinds), col=1)
    fig.update_yaxes(**theme.layer_ticks(layers))
    fig.update_yaxes(showgrid=False, title_text="layer", col=1)
    bar = {"title": "share of<br>the layer's<br>highest", "thickness": 14, "tickformat": "~%"}
    # Beside eighty layers it would be a metre tall.
    bar |= {"lenmode": "pixels", "len": 220, "y": 1, "yanchor": "top"}
    fig.update_layout(coloraxis={"colorscale": theme.SIGNED, "cmin": -1, "cmax": 1, "colorbar": bar})
    fig.update_layout(showlegend=bool(complete) or selection is not None)
    provenance: dict[str, Any] = dict(getattr(attribution, "provenance", {}))
    objective = OBJECTIVES.get(provenance.get("objective", ""))
    if complete:
        fig.update_xaxes(title_text="summed attribution", row=len(kinds), col=2)
    notes = [subtitle, "highest at the left, lowest at the right", _beyond(values)]
    notes += ["cells of several neurons show their mean"] if joined else []
    notes.append(f"{selection.count():,} of {selection.numel():,} neurons selected" if selection is not None else "")
    return theme.finish(
        fig,
        title or f"Attribution of every neuron{f' to {objective}' if objective else ''}, by layer",
        " · ".join(note for note in notes if note),
        about=_about(provenance),
        height=(theme.layer_height(layers) + 60) * len(kinds) + 60,
        columns=2 if complete else 1,
        facets=bool(complete),
        provenance=provenance,
        name="attribution_map",
    )


def _highest(values: np.ndarray) -> float:
    """Return the unit of a layer's colours: its highest attribution, or where none is positive, the largest in size."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 1.0
    return float(finite.max()) if finite.max() > 0 else float(np.abs(finite).max()) or 1.0


def _beyond(values: Mapping[Site, np.ndarray]) -> str:
    count = sum(int((np.abs(value) > _highest(value)).sum()) for value in values.values())
    return f"beyond −100%, in the end colour: {count:,}" if count else ""


def _cells(
    fig: go.Figure,
    row: int,
    values: Mapping[Site, np.ndarray],
    ranks: Ranks,
    shapes: Mapping[Site, tuple[int, ...]],
    layers: list[int],
) -> dict[Site, np.ndarray]:
    """Draw the neurons of one kind, and return the cell of each of them."""
    z = np.full((len(layers), ranks.cells), np.nan, dtype=np.float32)
    means = z.copy()
    labels = [[""] * ranks.cells for _ in layers]
    places = {}
    for site, value in values.items():
        # NaN sorts last: it has no rank.
        parts = ranks.cut(np.argsort(-value, kind="stable"))
        at = layers.index(site.layer)
        places[site] = np.empty(value.size, dtype=int)
        begin = 1
        for cell, part in enumerate(parts):
            places[site][part] = cell
            known = value[part][~np.isnan(value[part])]
            means[at, cell] = known.mean() if known.size else np.nan
            name = neuron_name(site, part[0], shapes[site])
            several = f"{name} and {len(part) - 1:,} more, rank {begin:,}-{begin + len(part) - 1:,}"
            labels[at][cell] = f"{name}, rank {begin:,}" if len(part) == 1 else several
            begin += len(part)
        z[at] = np.clip(means[at] / _highest(value), -1, 1)
    fig.add_heatmap(
        z=z,
        x=list(range(ranks.cells)),
        y=layers,
        text=labels,
        customdata=means,
        coloraxis="coloraxis",
        name="attribution",
        hovertemplate="<b>%{text}</b><br>attribution %{customdata:.4g}<br>%{z:.1%} of the layer's highest<extra></extra>",
        hoverongaps=False,
        row=row,
        col=1,
    )
    return places


def _chosen(selection: NeuronMap, shapes: Mapping[Site, tuple[int, ...]]) -> dict[Site, np.ndarray]:
    theme.require_selection(selection, "attribution_map")
    chosen = {}
    for site, value in selection.items():
        if value.numel() != math.prod(shapes.get(site, value.shape)):
            raise SelectionError(f"attribution_map: {site} of the selection has another shape: is it of this model?")
        chosen[site] = value.reshape(-1).numpy().nonzero()[0]
    return chosen


def _marks(
    fig: go.Figure, row: int, places: Mapping[Site, np.ndarray], chosen: Mapping[Site, np.ndarray], layers: int
) -> None:
    # A cell that holds several selected neurons is marked once.
    marks = [(int(cell), site.layer) for site in places for cell in np.unique(places[site][chosen.get(site, [])])]
    if len(marks) > theme.MAX_MARKS:
        marks = [marks[i] for i in np.linspace(0, len(marks) - 1, theme.MAX_MARKS).astype(int)]
    fig.add_scatter(
        x=[cell for cell, _ in marks],
        y=[layer for _, layer in marks],
        mode="markers",
        # Black with a white rim is seen on every colour of the scale.
        marker={"size": 4 if layers > 16 else 5, "color": "black", "line": {"width": 1, "color": "white"}},
        name="selected",
        showlegend=row == 1,
        hoverinfo="skip",
        row=row,
        col=1,
    )


def _sums(fig: go.Figure, row: int, complete: Mapping[Site, Any]) -> None:
    """Draw the sum of the attributions of each layer, and the difference that there was to attribute."""
    layers = [site.layer for site in complete]
    pairs = [(float(layer.attributed), float(layer.difference)) for layer in complete.values()]
    ratios = [f"{layer.ratio:.2f}" if np.isfinite(layer.ratio) else "" for layer in complete.values()]
    hover = [
        f"<b>{site}</b><br>attributed {attributed:.4g} of {difference:.4g}<br>ratio {ratio or 'not defined'}"
        for site, (attributed, difference), ratio in zip(complete, pairs, ratios, strict=True)
    ]
    shared = {"hovertext": hover, "hovertemplate": "%{hovertext}<extra></extra>", "showlegend": row == 1}
    fig.add_bar(
        x=[attributed for attributed, _ in pairs],
        y=layers,
        orientation="h",
        marker_color=theme.MEASURES[0],
        name="attributed to its neurons",
        row=row,
        col=2,
        **shared,
    )
    fig.add_scatter(
        x=[difference for _, difference in pairs],
        y=layers,
        mode="markers+text" if len(layers) <= MAX_RATIOS else "markers",
        text=[f"  {ratio}  " for ratio in ratios],
        textposition=["middle left" if difference < 0 else "middle right" for _, difference in pairs],
        cliponaxis=False,
        marker={"symbol": "diamond-open", "size": 9, "color": theme.TEXT, "line": {"width": 2}},
        name="to be attributed (and the ratio)",
        row=row,
        col=2,
        **shared,
    )
    ends = [0.0, *(end for pair in pairs for end in pair if np.isfinite(end))]
    room = (max(ends) - min(ends)) or 1.0
    left = 0.22 if min(ends) < 0 else 0.02
    fig.update_xaxes(range=[min(ends) - left * room, max(ends) + 0.22 * room], row=row, col=2)


def _about(provenance: Mapping[str, Any]) -> str:
    parts = [f"model {provenance['model']}"] if provenance.get("model") else []
    parts.append(theme.source(dict(provenance)))
    if provenance.get("steps"):
        parts.append(f"{provenance['steps']} steps")
    return " · ".join(part for part in parts if part)
