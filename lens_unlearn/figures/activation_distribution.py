"""`activation_distribution`: how single neurons' activations are distributed in each corpus.

Knows how the bins of a `Histogram` become a density that can be seen; counts nothing itself.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.figures import theme
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.histogram import Histogram
from lens_unlearn.neurons.maps import neuron_name

__all__ = ["activation_distribution"]

MAX_NEURONS = 24
COLUMNS = 3
TAIL = 0.001
"""Share of the tokens that each panel leaves out at either end."""
PANEL = 210
"""Height of a panel in pixels."""
STEPS = 60
"""Steps of a curve in the range shown. The bins near zero are far finer, and would draw their counting noise."""
ZERO = 1e-12


def activation_distribution(
    histograms: Mapping[str, Histogram],
    neurons: Sequence[tuple[Site, int]],
    *,
    forget: str = "forget",
    retain: str = "retain",
    title: str | None = None,
) -> go.Figure:
    """Draw the distribution of chosen neurons' activations, one panel per neuron and one line per corpus.

    The density is counts / (tokens x width of the bin), since bins widen away from zero. Its axis is logarithmic: most
    activations are near zero, and the corpora differ in the tails. Each panel shows the range that holds
    all but the outermost 0.1 % of the tokens of every corpus.

    Args:
        histograms: What was collected with `Histogram`, by corpus.
        neurons: Sites with flat neuron indices, such as ``[(Site(3, "mlp.post"), 1742)]``; 24 at most.
        forget: The corpus drawn in the warm colour.
        retain: The corpus drawn in the cool colour.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If there is nothing to draw, or a neuron does not exist.
    """
    wanted = _wanted(histograms, neurons)
    shapes = {site: _shape(histograms, site, neuron) for site, neuron in wanted}
    names = [neuron_name(site, neuron, shapes[site]) for site, neuron in wanted]
    columns = min(COLUMNS, len(wanted))
    rows = -(-len(wanted) // columns)
    fig = make_subplots(
        rows,
        columns,
        subplot_titles=names,
        horizontal_spacing=0.24 / columns,
        vertical_spacing=min(0.34 / rows, 1 / rows - 0.01),
    )
    colours = theme.corpus_colours(list(histograms), forget, retain)
    for index, ((site, neuron), name) in enumerate(zip(wanted, names, strict=True)):
        row, column = index // columns + 1, index % columns + 1
        zoom = _zoom([(h.counts(site, neuron).numpy(), h.edges.numpy()) for h in histograms.values()])
        densities = [
            _line(fig, row, column, name, corpus, histogram, site, neuron, colours[corpus], zoom, index == 0)
            for corpus, histogram in histograms.items()
        ]
        ends = math.log10(min(map(min, densities))), math.log10(max(map(max, densities)))
        fig.update_xaxes(range=list(zoom), row=row, col=column)
        # Ticks of our own: plotly writes powers of ten larger than the numbers of the other axis.
        fig.update_yaxes(type="log", **theme.log_ticks(*ends), row=row, col=column)
    for column in range(columns):
        lowest = (len(wanted) - 1 - column) // columns + 1
        fig.update_xaxes(title_text="activation", row=lowest, col=column + 1)
    fig.update_yaxes(title_text="density", col=1)
    model = next((h.provenance["model"] for h in histograms.values() if h.provenance.get("model")), None)
    about = [f"model {model}" if model else ""]
    about += [theme.source({"tokens": h.n, **h.provenance}, name) for name, h in histograms.items()]
    return theme.finish(
        fig,
        title or "Distribution of activations, by neuron and corpus",
        " · ".join(part for part in (*about, "logarithmic density") if part),
        height=PANEL * rows + 90,
        columns=columns,
        facets=True,
        provenance={name: dict(h.provenance) for name, h in histograms.items()},
    )


def _wanted(histograms: Mapping[str, Histogram], neurons: Sequence[tuple[Site, int]]) -> list[tuple[Site, int]]:
    """Return the neurons, having checked that there is something to draw, and not too much."""
    wanted = [(Site(*site), int(neuron)) for site, neuron in neurons]
    if not histograms or not wanted:
        raise LensUnlearnError(
            "activation_distribution has nothing to draw: pass histograms by corpus, and neurons as (Site, index)"
        )
    if len(wanted) > MAX_NEURONS:
        raise LensUnlearnError(
            f"activation_distribution draws {MAX_NEURONS} neurons at most, not {len(wanted)}: choose some of them"
        )
    return wanted


def _shape(histograms: Mapping[str, Histogram], site: Site, neuron: int) -> tuple[int, ...]:
    """Return the shape of a site, having checked that every corpus has the neuron."""
    shape: tuple[int, ...] = ()
    for corpus, histogram in histograms.items():
        counts = histogram.state().get(f"{site}.histogram")
        if counts is None:
            raise LensUnlearnError(
                f"activation_distribution: the histogram of {corpus!r} has nothing of {site}: collect over it first"
            )
        shape = tuple(counts.shape[:-1])
        if not 0 <= neuron < int(np.prod(shape)):
            raise LensUnlearnError(
                f"activation_distribution: {site} has neurons 0 to {int(np.prod(shape)) - 1}, not {neuron}: "
                "give the flat index that to_frame shows"
            )
    return shape


def density(counts: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the density in every bin: it integrates to 1 whatever the widths; NaN where nothing was counted."""
    total = counts.sum()
    if total == 0:
        return np.full(len(counts), np.nan)
    values = counts / total / np.diff(edges)
    return np.where(counts > 0, values, np.nan)


def merged(counts: np.ndarray, edges: np.ndarray, zoom: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Join neighbouring bins until each is wide enough to be seen in the range shown; zero stays an edge."""
    width = (zoom[1] - zoom[0]) / STEPS
    chosen = [0]
    for index, edge in enumerate(edges[1:], start=1):
        if edge - edges[chosen[-1]] >= width or abs(edge) < ZERO or index == len(edges) - 1:
            chosen.append(index)
    return np.add.reduceat(counts, chosen[:-1]), edges[chosen]


def _line(
    fig: go.Figure,
    row: int,
    column: int,
    neuron: str,
    corpus: str,
    histogram: Histogram,
    site: Site,
    index: int,
    colour: str,
    zoom: tuple[float, float],
    first: bool,
) -> np.ndarray:
    """Draw a corpus' histogram of a neuron, and return the heights of its line."""
    counts, edges = merged(histogram.counts(site, index).numpy(), histogram.edges.numpy(), zoom)
    values = density(counts, edges)
    used = counts.nonzero()[0]
    part = slice(used[0], used[-1] + 1) if used.size else slice(0, 0)
    # Steps from edge to edge, and down to below the lowest step where nothing was counted or the counts end.
    floor = float(np.nanmin(values)) / 3 if used.size else 1.0
    x = np.repeat(edges[part.start : part.stop + 1], 2)
    y = np.concatenate([[floor], np.repeat(np.nan_to_num(values[part], nan=floor), 2), [floor]])
    tokens = np.concatenate([[0], np.repeat(counts[part], 2), [0]])
    fig.add_scatter(
        x=x,
        y=y,
        customdata=tokens,
        mode="lines",
        line={"color": colour, "width": 2},
        name=theme.plain(corpus),
        legendgroup=theme.plain(corpus),
        showlegend=first,
        hovertemplate=f"<b>{neuron}</b><br>{theme.plain(corpus)}: density %{{y:.3g}} at %{{x:.3g}}"
        "<br>%{customdata:,} tokens in this bin<extra></extra>",
        row=row,
        col=column,
    )
    return y


def _zoom(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Return the range of activations that holds all but the tails of every corpus."""
    lows, highs = [], []
    for counts, edges in parts:
        if not counts.sum():
            continue
        share = np.cumsum(counts) / counts.sum()
        lows.append(edges[int(np.searchsorted(share, TAIL, side="right"))])
        highs.append(edges[min(int(np.searchsorted(share, 1 - TAIL)) + 1, len(edges) - 1)])
    if not lows:
        return -1.0, 1.0
    low, high = float(min(lows)), float(max(highs))
    room = 0.04 * (high - low)
    return low - room, high + room
