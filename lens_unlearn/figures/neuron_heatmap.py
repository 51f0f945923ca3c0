"""`neuron_heatmap`: the values of all neurons, layer by layer, sorted within each layer.

Knows how a map's values become colours, and when a score is taken for a ratio; knows nothing of what it measures.
"""

import math
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.figures import theme
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.maps import NeuronMap, neuron_name

__all__ = ["neuron_heatmap"]

MAX_COLUMNS = 512
MAX_CELLS = 24_000
"""Every cell has a hover text of some 40 bytes, and a figure may have two megabytes."""
BOTH_SIDES = 0.05
"""Share of the neurons on either side of 1 from which on a score is taken for a ratio."""


def neuron_heatmap(
    score: NeuronMap,
    *,
    kind: str | None = None,
    selection: NeuronMap | None = None,
    signed: bool | None = None,
    title: str | None = None,
    subtitle: str = "",
) -> go.Figure:
    """Draw a score as a heatmap of layers by neurons, the highest value of each layer at the left.

    Wide layers are cut into bins of equally many neurons, and a bin shows its mean.

    Args:
        score: Any map of numbers.
        kind: The one kind to draw; default: all, side by side.
        selection: Neurons to mark.
        signed: True: a diverging scale about 0, and of a score without negative values, which is a ratio, log2 is
            shown; False: a scale from 0. Default: signed if there are negative values, or if the score looks like a
            ratio (at least 5 % of the neurons on either side of 1).
        title: Instead of the default title.
        subtitle: Such as model and corpora, which a map does not know.

    Raises:
        LensUnlearnError: If there is nothing to draw, or the selection has another shape.
    """
    theme.require_neurons(score, "neuron_heatmap")
    kinds = theme.kinds_of(score, kind)
    shown = {site: value for site, value in theme.values_of(score).items() if site.kind in kinds and value.size}
    shapes = {site: score.shape_of(site) for site in score}
    scale = _Scale.of(np.concatenate(list(shown.values())), signed)
    layers = theme.layer_rows(shown)
    width = max(1, min(MAX_COLUMNS, MAX_CELLS // max(1, len(layers) * len(kinds))))
    fig = make_subplots(1, len(kinds), shared_yaxes=True, column_titles=kinds, horizontal_spacing=0.03)
    widths = {name: min([width, *(v.size for s, v in shown.items() if s.kind == name)]) for name in kinds}
    binned = any(value.size > widths[site.kind] for site, value in shown.items())
    for column, name in enumerate(kinds, start=1):
        parts = {site: value for site, value in shown.items() if site.kind == name}
        rows = [_Row.of(site, scale(value), shapes[site], widths[name], binned) for site, value in parts.items()]
        _cells(fig, column, name, rows, layers, scale)
        if selection is not None:
            _marks(fig, column, rows, _selected(selection, shapes, name), len(layers))
        axis_title = "neurons of the layer by rank" + (" (%)" if binned else "")
        extent = [0, 100] if binned else [-0.5, widths[name] - 0.5]
        fig.update_xaxes(title_text=axis_title, range=extent, showgrid=False, zeroline=False, row=1, col=column)
    fig.update_yaxes(**theme.layer_ticks(layers), showgrid=False)
    fig.update_yaxes(title_text="layer", col=1)
    fig.update_layout(coloraxis=scale.axis(), showlegend=selection is not None)
    notes = [subtitle, "highest value of each layer at the left", "bins of neurons show their mean" if binned else ""]
    return theme.finish(
        fig,
        title or f"{scale.words.capitalize()} of every neuron, by layer",
        " · ".join(note for note in (*notes, scale.note) if note),
        height=theme.layer_height(layers) + 90,
        columns=len(kinds),
        facets=True,
    )


@dataclass(frozen=True)
class _Scale:
    """How values become colours."""

    log: bool
    low: float
    high: float
    note: str

    @classmethod
    def of(cls, values: np.ndarray, signed: bool | None) -> "_Scale":
        finite = values[np.isfinite(values)]
        negative = bool((finite < 0).any())
        if signed is None:
            sides = [float(np.mean(side)) for side in (finite > 1, finite < 1)] if finite.size else [0.0]
            signed = negative or min(sides) >= BOTH_SIDES
        log = signed and not negative
        with np.errstate(divide="ignore", invalid="ignore"):
            all_values = np.log2(values) if log else values
        finite = all_values[np.isfinite(all_values)]
        size = np.abs(finite) if signed else finite
        most = float(size.max()) if size.size else 1.0
        # One extreme neuron must not leave all others the same colour.
        limit = float(np.quantile(size, 0.98)) if size.size else 1.0
        limit = most if most <= 1.25 * limit or limit <= 0 else limit
        limit = limit if limit > 0 else 1.0
        low = -limit if signed else min(0.0, float(finite.min()) if finite.size else 0.0)
        beyond = int((np.abs(all_values) > limit).sum())
        unknown = int(np.isnan(all_values).sum())
        notes = ["+1 is twice, −1 half"] if log else []
        notes += [f"beyond ±{limit:.3g}, in the end colours: {beyond:,}" if signed and beyond else ""]
        notes += [f"above {limit:.3g}, in the end colour: {beyond:,}" if not signed and beyond else ""]
        notes += [f"left blank: {unknown:,} NaN" if unknown else ""]
        return cls(log, low, limit, " · ".join(note for note in notes if note))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Return what is drawn: within the range of the colours, so infinite values and zeros of a ratio show."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.clip(np.log2(values) if self.log else values, self.low, self.high)

    @property
    def words(self) -> str:
        return "log2 of the score" if self.log else "score"

    def axis(self) -> dict:
        return {
            "colorscale": theme.SIGNED if self.low < 0 else theme.MAGNITUDE,
            "cmin": self.low,
            "cmax": self.high,
            "colorbar": {"title": "log2<br>score" if self.log else "score", "thickness": 14},
        }


@dataclass(frozen=True)
class _Row:
    """One layer, sorted, as cells."""

    site: Site
    cells: np.ndarray
    x: np.ndarray
    place: np.ndarray
    """The x of every neuron, by flat index."""
    labels: list[str]
    """What hover puts between the brackets, or says of a bin."""

    @classmethod
    def of(cls, site: Site, values: np.ndarray, shape: tuple[int, ...], width: int, percent: bool) -> "_Row":
        # NaN sorts last: it has no rank.
        order = np.argsort(-values, kind="stable")
        parts = np.array_split(order, width)
        x = (np.arange(width) + 0.5) * 100 / width if percent else np.arange(width, dtype=float)
        place = np.empty(values.size)
        for at, part in zip(x, parts, strict=True):
            place[part] = at
        first = [neuron_name(site, part[0], shape) for part in parts]
        labels = [name if len(part) == 1 else f"{len(part)} neurons, first {name}" for name, part in zip(first, parts)]
        return cls(site, np.array([_mean(values[part]) for part in parts]), x, place, labels)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _cells(fig: go.Figure, column: int, kind: str, rows: list[_Row], layers: list[int], scale: _Scale) -> None:
    """Draw the rows of one kind; layers without it leave gaps."""
    width = rows[0].cells.size
    z = np.full((len(layers), width), np.nan, dtype=np.float32)
    labels = [[""] * width for _ in layers]
    for row in rows:
        at = layers.index(row.site.layer)
        z[at], labels[at] = row.cells, row.labels
    fig.add_heatmap(
        z=z,
        x=rows[0].x,
        y=layers,
        text=labels,
        coloraxis="coloraxis",
        name=kind,
        hovertemplate=f"<b>%{{text}}</b><br>{scale.words} %{{z:.4g}}<extra></extra>",
        hoverongaps=False,
        row=1,
        col=column,
    )


def _selected(selection: NeuronMap, shapes: dict[Site, tuple[int, ...]], kind: str) -> dict[Site, np.ndarray]:
    theme.require_selection(selection, "neuron_heatmap")
    chosen = {}
    for site, value in selection.items():
        if site.kind != kind or site not in shapes:
            continue
        if value.numel() != math.prod(shapes[site]):
            raise SelectionError(f"neuron_heatmap: {site} of the selection has another shape: is it of this model?")
        chosen[site] = value.reshape(-1).numpy().nonzero()[0]
    return chosen


def _marks(fig: go.Figure, column: int, rows: list[_Row], chosen: dict[Site, np.ndarray], layers: int) -> None:
    # A bin that holds several selected neurons is marked once.
    places = list(
        dict.fromkeys((float(row.place[i]), row.site.layer) for row in rows for i in chosen.get(row.site, ()))
    )
    if len(places) > theme.MAX_MARKS:
        places = [places[i] for i in np.linspace(0, len(places) - 1, theme.MAX_MARKS).astype(int)]
    fig.add_scatter(
        x=[x for x, _ in places],
        y=[layer for _, layer in places],
        mode="markers",
        # Black with a white rim is seen on every colour of both scales.
        marker={"size": 4 if layers > 16 else 5, "color": "black", "line": {"width": 1, "color": "white"}},
        name="selected",
        showlegend=column == 1,
        hoverinfo="skip",
        row=1,
        col=column,
    )
