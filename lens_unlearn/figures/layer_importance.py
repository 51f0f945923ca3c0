"""`layer_importance`: in which layers the selected, or the highest-scored, neurons are.

Knows maps, layer by layer; knows nothing of the texts or the method that they came from.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.figures import theme
from lens_unlearn.figures.expert_grid import Panel, expert_grid
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.maps import NeuronMap

__all__ = ["layer_importance"]

MAX_SELECTIONS = 6


def layer_importance(
    score: NeuronMap | Mapping[str, NeuronMap],
    selection: NeuronMap | None = None,
    *,
    kind: str | None = None,
    by: Literal["layer", "expert"] = "layer",
    colours: Mapping[str, str] | None = None,
    title: str | None = None,
    subtitle: str = "",
) -> go.Figure:
    """Draw, per layer, the share of neurons that is selected and the mean score, MLP and attention side by side.

    Of a score with a selection, the mean is over the selected neurons: over all of a layer, most of which are of neither skill, it
    says nothing of them, and with a signed score it may be negative everywhere.

    With `by="expert"`, each routed expert of each layer is a cell of heat maps of them.

    Args:
        score: A score, a selection, or selections by name (such as a method's and its control's).
        selection: A selection to show above the score.
        kind: The one kind to draw; default: all.
        by: "layer", or "expert" for sites inside routed experts.
        colours: Of selections by name, so that a method has one colour in several figures; default: in order.
        title: Instead of the default title.
        subtitle: Such as model and corpora, which a map does not know.

    Raises:
        LensUnlearnError: If there is nothing to draw, or `selection` is not boolean.

    Examples:
        >>> import torch
        >>> from lens_unlearn.model.sites import Site
        >>> score = NeuronMap({Site(layer, "mlp.post"): torch.arange(8.0) * layer for layer in range(4)})
        >>> [trace.name for trace in layer_importance(score, score.top(0.25)).data]
        ['selected', 'mean score of the selected']
    """
    selections, scored = _parts(score, selection)
    if by not in ("layer", "expert"):
        raise LensUnlearnError(f"by={by!r} is not known: choose from layer, expert")
    if by == "expert":
        return _by_expert(selections, scored, kind, title, subtitle)
    maps = [*selections.values(), *([] if scored is None else [scored])]
    kinds = list(dict.fromkeys(name for part in maps for name in theme.kinds_of(part, kind)))
    layers = sorted({site.layer for part in maps for site in part})
    rows = bool(selections) + (scored is not None)
    mean = "mean score of the selected" if "selected" in selections else "mean score"
    fig = make_subplots(
        rows, len(kinds), shared_yaxes=True, column_titles=kinds, vertical_spacing=0.3 / rows, horizontal_spacing=0.04
    )
    for column, name in enumerate(kinds, start=1):
        for index, (label, part) in reversed(list(enumerate(selections.items()))):
            colour = (colours or {}).get(label) or _colour(label, index)
            _shares(fig, column, name, label, part, colour, len(layers), alone=len(selections) == 1)
        if scored is not None and name in scored.kinds:
            _means(fig, rows, column, name, scored, mean, selections.get("selected"))
        if selections:
            fig.update_xaxes(title_text="neurons selected", tickformat="~%", row=1, col=column, rangemode="tozero")
            fig.update_xaxes(matches="x", row=1, col=column)
        if scored is not None:
            fig.update_xaxes(title_text=mean, row=rows, col=column)
    fig.update_yaxes(matches="y", **theme.layer_ticks(layers))
    fig.update_yaxes(title_text="layer", col=1)
    fig.update_layout(barmode="group", bargap=0.25, showlegend=len(selections) > 1)
    # Bars of a group stack upwards: drawn in reverse, the first selection is the uppermost.
    fig.update_layout(legend_traceorder="reversed")
    quantity = "Share of neurons selected" if selections else "Mean score"
    quantity += f" and {mean}" if selections and scored is not None else ""
    height = rows * (theme.layer_height(layers) + 80)
    note = "dotted: the share over all layers" if len(selections) == 1 else ""
    notes = " · ".join(part for part in (subtitle, _extent(selections), note) if part)
    return theme.finish(fig, title or f"{quantity}, by layer", notes, height=height, columns=len(kinds), facets=True)


def _by_expert(
    selections: Mapping[str, NeuronMap], scored: NeuronMap | None, kind: str | None, title: str | None, subtitle: str
) -> go.Figure:
    """Draw a heat map of each selection, and one of the mean score, with a cell for each expert."""
    panels = [Panel(label, _expert_means(part, kind), "neurons selected", ".2~%") for label, part in selections.items()]
    if scored is not None:
        panels.append(Panel("mean score", _expert_means(scored, kind), "mean score", ".3g"))
    fig = expert_grid(panels)
    layers = theme.layer_rows(site for panel in panels for site in panel.values)
    quantity = "Share of neurons selected" if selections else "Mean score"
    quantity += " and mean score" if selections and scored is not None else ""
    height, notes = (
        theme.layer_height(layers) + 90,
        " · ".join(part for part in (subtitle, _extent(selections)) if part),
    )
    return theme.finish(fig, title or f"{quantity}, by expert", notes, height=height, columns=len(panels), facets=True)


def _expert_means(part: NeuronMap, kind: str | None) -> dict[Site, np.ndarray]:
    """Return the mean over each expert's neurons, at the sites of one kind inside experts."""
    known = {site: count for site, count in part.experts.items() if kind in (None, site.kind)}
    if not known:
        raise LensUnlearnError(
            "layer_importance by expert needs a map that knows its experts: one of moments collected at 'experts.post'"
        )
    first = kind or next(iter(known)).kind
    values = theme.values_of(part)
    means = {s: values[s].reshape(count, -1) for s, count in known.items() if s.kind == first}
    return {site: np.where(np.isfinite(v), v, np.nan).mean(1) for site, v in means.items()}


def _parts(
    score: NeuronMap | Mapping[str, NeuronMap], selection: NeuronMap | None
) -> tuple[dict[str, NeuronMap], NeuronMap | None]:
    """Split what was passed into selections, by name, and a score."""
    if isinstance(score, NeuronMap):
        theme.require_neurons(score, "layer_importance")
        selections = {"selected": score} if score.is_selection else {}
        scored = None if score.is_selection else score
    elif isinstance(score, Mapping) and score:
        selections, scored = dict(score), None
    else:
        raise LensUnlearnError("layer_importance has nothing to draw: pass a score, a selection, or selections by name")
    if selection is not None:
        selections["selected"] = selection
    for part in selections.values():
        theme.require_selection(part, "layer_importance")
    if len(selections) > MAX_SELECTIONS:
        raise LensUnlearnError(
            f"layer_importance draws {MAX_SELECTIONS} selections at most, not {len(selections)}: draw fewer at a time"
        )
    return selections, scored


def _colour(label: str, index: int) -> str:
    return theme.CONTROL if "control" in label.lower() else theme.METHODS[index % len(theme.METHODS)]


def _shares(
    fig: go.Figure, column: int, kind: str, label: str, part: NeuronMap, colour: str, layers: int, *, alone: bool
) -> None:
    if kind not in part.kinds:
        return
    of_kind = part[kind]
    shares = of_kind.per_layer()
    counts = [f"{int(value.sum()):,} of {value.numel():,}" for _, value in of_kind.items()]
    fig.add_bar(
        x=list(shares.values()),
        y=[site.layer for site in shares],
        orientation="h",
        name=theme.plain(label),
        legendgroup=theme.plain(label),
        showlegend=theme.is_first(fig, theme.plain(label)),
        marker_color=colour,
        customdata=list(zip(map(str, shares), counts, strict=True)),
        hovertemplate=f"<b>%{{customdata[0]}}</b><br>{theme.plain(label)}: %{{customdata[1]}} neurons (%{{x:.2%}})"
        "<extra></extra>",
        row=1,
        col=column,
    )
    if alone and layers > 1:
        panel: Any = {"row": 1, "col": column}
        line = {"dash": "dot", "width": 1, "color": theme.TEXT}
        fig.add_vline(x=of_kind.count() / of_kind.numel(), line=line, **panel)


def _means(
    fig: go.Figure, row: int, column: int, kind: str, score: NeuronMap, name: str, selection: NeuronMap | None
) -> None:
    layers, means, details = [], [], []
    chosen = {} if selection is None else theme.values_of(selection)
    for site, value in theme.values_of(score[kind]).items():
        if selection is not None:
            value = value[chosen[site] > 0] if site in chosen else value[:0]
        finite = value[np.isfinite(value)]
        layers.append(site.layer)
        means.append(float(finite.mean()) if finite.size else None)
        left_out = f", {value.size - finite.size:,} not finite left out" if finite.size < value.size else ""
        median = f"{np.median(finite):.4g}" if finite.size else "none"
        details.append((str(site), f"{value.size:,} neurons{left_out}", median))
    fig.add_bar(
        x=means,
        y=layers,
        orientation="h",
        name=name,
        showlegend=False,
        marker_color=theme.MEASURES[0],
        customdata=details,
        hovertemplate="<b>%{customdata[0]}</b><br>mean %{x:.4g}, median %{customdata[2]}<br>%{customdata[1]}"
        "<extra></extra>",
        row=row,
        col=column,
    )


def _extent(selections: Mapping[str, NeuronMap]) -> str:
    if len(selections) != 1:
        return ""
    (part,) = selections.values()
    return f"{part.count():,} of {part.numel():,} neurons selected" + (
        "" if part.count() else ": the selection is empty"
    )
