"""`specialization_map`: how much each neuron matters to the forget corpus, against the retain corpus.

Knows which readings of `Moments` are importances; collects nothing.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_unlearn.core.errors import LensUnlearnError, SelectionError
from lens_unlearn.figures import theme
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.maps import NeuronMap, neuron_name
from lens_unlearn.neurons.moments import Moments

__all__ = ["specialization_map"]

IMPORTANCES: dict[str, tuple[str, Callable[[Moments], NeuronMap]]] = {
    "abs": ("mean |activation|", lambda moments: moments.mean_abs),
    "freq": ("share of tokens with activation > 0", lambda moments: moments.positive),
    "rms": ("root mean square of the activation", lambda moments: moments.rms),
    "std": ("standard deviation of the activation", lambda moments: moments.std),
    "sqrt": ("mean √|activation|", lambda moments: moments.mean_sqrt),
}
BINS = 72
DECADES = 5
"""Powers of ten that the axes show at most; dead neurons would take many more."""
MARKED = 200
FLOOR = 1e-3


def specialization_map(
    forget: Moments,
    retain: Moments,
    *,
    selection: NeuronMap | None = None,
    kind: str | None = None,
    importance: str = "abs",
    title: str | None = None,
) -> go.Figure:
    """Draw every neuron's importance to the forget corpus against that to the retain corpus, binned, on log axes.

    Neurons on the diagonal matter to both alike; those above it are specialized to the forget corpus.

    Args:
        forget: Moments over the forget corpus.
        retain: Moments over the retain corpus.
        selection: Neurons to mark; default: those with the highest forget / (retain + 0.001), 200 at most.
        kind: The one kind to draw; default: all that both have, side by side.
        importance: "abs", "freq", "rms", "std" or "sqrt".
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If the moments have no site in common, or the importance is unknown.
    """
    if importance not in IMPORTANCES:
        raise LensUnlearnError(f"importance={importance!r} is not known: choose from {', '.join(IMPORTANCES)}")
    words, measure = IMPORTANCES[importance]
    forget_importance, retain_importance = _common(measure(forget), measure(retain))
    kinds = theme.kinds_of(forget_importance, kind)
    marked, note = _marked(forget_importance, retain_importance, kinds, selection)
    fig = make_subplots(1, len(kinds), column_titles=kinds, horizontal_spacing=0.09)
    most, outside = 0.0, 0
    for column, name in enumerate(kinds, start=1):
        y, x = (
            np.concatenate(list(theme.values_of(part[name]).values()))
            for part in (forget_importance, retain_importance)
        )
        low, high = _range(x, y)
        most = max(most, _density(fig, column, x, y, low, high))
        outside += int(((x < 10**low) | (y < 10**low)).sum())
        _marks(
            fig,
            column,
            forget_importance,
            retain_importance,
            [(s, i) for s, i in marked if s.kind == name],
            10**low,
            selection is None,
        )
        _axes(fig, column, words, low, high)
    fig.update_layout(coloraxis=_colours(most))
    model = forget.provenance.get("model") or retain.provenance.get("model")
    notes = [
        f"model {model}" if model else "",
        *_sources(forget, retain),
        note,
        f"{outside:,} neurons below the axes are drawn at their edge" if outside else "",
    ]
    return theme.finish(
        fig,
        title or f"Importance to forget against retain: {words}, per neuron",
        " · ".join(part for part in notes if part),
        columns=len(kinds),
        facets=True,
        provenance={"forget": dict(forget.provenance), "retain": dict(retain.provenance)},
    )


def _axes(fig: go.Figure, column: int, words: str, low: float, high: float) -> None:
    """Give both axes of a panel the same range, and draw the diagonal."""
    ends = [10**low, 10**high]
    line = {"color": theme.TEXT, "dash": "dot", "width": 1.5}
    panel = {"showlegend": column == 1, "row": 1, "col": column}
    fig.add_scatter(x=ends, y=ends, mode="lines", line=line, name="equal for both", hoverinfo="skip", **panel)
    axis = {"type": "log", "range": [low, high], "tickangle": 0, **theme.log_ticks(low, high)}
    fig.update_xaxes(title_text=f"{words}, retain", **axis, row=1, col=column)
    fig.update_yaxes(title_text=f"{words}, forget" if column == 1 else "", **axis, row=1, col=column)


def _colours(most: float) -> dict[str, Any]:
    """Return the colour axis of log10 counts, labelled with the counts."""
    ticks = list(range(int(np.ceil(most)) + 1))
    bar = {"title": "neurons", "tickvals": ticks, "ticktext": [f"{10**t:,}" for t in ticks], "thickness": 14}
    return {"colorscale": theme.MAGNITUDE, "cmin": 0, "cmax": max(most, 1e-9), "colorbar": bar}


def _sources(forget: Moments, retain: Moments) -> list[str]:
    return [
        theme.source({"tokens": moments.n, **moments.provenance}, name)
        for name, moments in (("forget", forget), ("retain", retain))
    ]


def _common(forget_importance: NeuronMap, retain_importance: NeuronMap) -> tuple[NeuronMap, NeuronMap]:
    sites = [site for site in forget_importance if site in retain_importance]
    if not sites:
        raise SelectionError(
            "specialization_map: the two moments have no site in common: collect both over the same sites"
        )
    for site in sites:
        if forget_importance[site].shape != retain_importance[site].shape:
            raise SelectionError(
                f"specialization_map: {site} has another shape in each of the moments: are they of the same model?"
            )
    return forget_importance[sites], retain_importance[sites]


def _marked(
    forget_importance: NeuronMap, retain_importance: NeuronMap, kinds: list[str], selection: NeuronMap | None
) -> tuple[list[tuple[Site, int]], str]:
    """Return the neurons to mark, by flat index, and what the subtitle says of them."""
    if selection is None:
        chosen: list[tuple[Site, int]] = []
        for name in kinds:
            part = forget_importance[name] / (retain_importance[name] + FLOOR)
            top = part.top(min(1.0, MARKED / len(kinds) / part.numel(), max(0.02, 1 / part.numel())))
            chosen += [(site, int(i)) for site, value in top.items() for i in value.reshape(-1).nonzero()[:, 0]]
        return chosen, f"marked: the {len(chosen):,} highest forget / (retain + {FLOOR:g})"
    theme.require_selection(selection, "specialization_map")
    shown = [site for site in forget_importance if site.kind in kinds and site in selection]
    if not shown:
        raise SelectionError(
            "specialization_map: the selection has none of the sites drawn: select among their neurons"
        )
    for site in shown:
        if selection[site].shape != forget_importance[site].shape:
            raise SelectionError(f"specialization_map: {site} of the selection has another shape: is it of this model?")
    chosen = [(site, int(i)) for site in shown for i in selection[site].reshape(-1).nonzero()[:, 0]]
    total = len(chosen)
    if total > theme.MAX_MARKS:
        # Evenly over the order of sites and neurons: the same marks each time, and every layer keeps its share.
        chosen = [chosen[i] for i in np.linspace(0, total - 1, theme.MAX_MARKS).astype(int)]
        return chosen, f"marked: {len(chosen):,} of {total:,} selected neurons, evenly sampled"
    return chosen, f"marked: {total:,} selected neurons" if total else "the selection is empty"


def _range(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return the common range of both axes, in powers of ten; what lies below is drawn at its edge."""
    both = np.concatenate([x, y])
    both = both[np.isfinite(both) & (both > 0)]
    if not both.size:
        return -1.0, 1.0
    high = float(np.log10(both.max()))
    low = max(float(np.log10(np.quantile(both, 0.001))), high - DECADES)
    return min(low, high - 0.5) - 0.1, high + 0.1


def _density(fig: go.Figure, column: int, x: np.ndarray, y: np.ndarray, low: float, high: float) -> float:
    """Draw the neurons of one kind, binned; return the largest log10 of a count."""
    edges = np.logspace(low, high, BINS + 1)
    keep = np.isfinite(x) & np.isfinite(y)
    # The outermost bins end a hair inside the range, so that what is clipped to the edge is still counted.
    clipped = [np.clip(values[keep], edges[0], edges[-1] * (1 - 1e-12)) for values in (y, x)]
    counts, _, _ = np.histogram2d(*clipped, bins=(edges, edges))
    fig.add_heatmap(
        x=edges,
        y=edges,
        z=np.log10(np.where(counts > 0, counts, np.nan)).astype(np.float32),
        customdata=counts.astype(np.int32),
        coloraxis="coloraxis",
        name="neurons",
        hovertemplate="%{customdata:,} neurons<br>forget about %{y:.3g}, retain about %{x:.3g}<extra></extra>",
        row=1,
        col=column,
    )
    inside = counts[1:, 1:].max() or counts.max()  # dead neurons pile up at the edge, and would take all the colours
    return float(np.log10(inside)) if inside > 0 else 0.0


def _marks(
    fig: go.Figure,
    column: int,
    forget_importance: NeuronMap,
    retain_importance: NeuronMap,
    marked: list[tuple[Site, int]],
    floor: float,
    top: bool,
) -> None:
    tops, bottoms = theme.values_of(forget_importance), theme.values_of(retain_importance)
    shapes = {site: forget_importance.shape_of(site) for site in forget_importance}
    y = np.array([tops[site][i] for site, i in marked])
    x = np.array([bottoms[site][i] for site, i in marked])
    ratios = y / np.maximum(x, np.finfo(float).tiny) if len(marked) else y
    names = [
        f"<b>{neuron_name(site, i, shapes[site])}</b><br>forget {f:.4g}, retain {r:.4g}, ratio {ratio:.4g}"
        for (site, i), f, r, ratio in zip(marked, y, x, ratios, strict=True)
    ]
    fig.add_scatter(
        x=np.maximum(x, floor),
        y=np.maximum(y, floor),
        mode="markers",
        marker={
            "color": theme.FORGET,
            "size": 6 if len(marked) <= 300 else 4,
            "line": {"color": "white", "width": 0.6 if len(marked) <= 300 else 0.3},
        },
        name="highest ratios" if top else "selected",
        showlegend=column == 1,
        legendgroup="marked",
        hovertext=names,
        hovertemplate="%{hovertext}<extra></extra>",
        row=1,
        col=column,
    )
