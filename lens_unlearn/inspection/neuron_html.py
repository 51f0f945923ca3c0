"""How a neuron's page is drawn: a curve a corpus, chips of tokens, a table of what ablating it does, and coloured texts.

Knows how to draw without a script; knows nothing of how any of it was found.
"""

import html
import math
from collections.abc import Mapping, Sequence

import torch

from lens_unlearn.evaluation.report import BASE, Report
from lens_unlearn.inspection.html import LINE, MONO, SOFT, number_text, safe_text
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.histogram import Histogram

__all__ = ["chips", "curves", "effect_table", "section"]

COLOURS = {"forget": "#E0641B", "retain": "#2E86D1"}
OTHERS = ("#E0641B", "#2E86D1", "#B08A00", "#A0614A", "#74891F", "#8C7A58")
"""Of corpora, as in all figures: forget warm and retain cool; where none is called so, the first two."""
WIDTH, HEIGHT = 640, 190
METRICS = {"loss": "loss, nats per token", "top1": "next-token accuracy", "kl": "KL to the unedited model"}


def section(title: str, note: str, body: str) -> str:
    """Write a heading, how to read what is below it, and that."""
    soft = f"<span style='{SOFT};font-weight:400;font-size:.88em'> {html.escape(note)}</span>" if note else ""
    heading = f"<div style='font-weight:600;margin-bottom:.3em'>{html.escape(title)}{soft}</div>"
    return f"<div style='margin:1.1em 0'>{heading}{body}</div>"


def _colours(names: Sequence[str]) -> dict[str, str]:
    rest = [name for name in names if name not in COLOURS]
    left = [colour for colour in OTHERS if colour not in {COLOURS[name] for name in names if name in COLOURS}]
    return {name: COLOURS.get(name) or left[rest.index(name) % len(left)] for name in names}


def curves(neuron: str, site: Site, index: int, histograms: Mapping[str, Histogram]) -> str:
    """Draw the share of tokens in each bin, on the bins of the histogram: fine about zero, and coarse far from it."""
    shares = {name: _shares(one, site, index) for name, one in histograms.items()}
    used = torch.stack(list(shares.values())).sum(0).nonzero()[:, 0]
    if not len(used):
        return "Nothing was counted."
    low, high = int(used.min()), int(used.max()) + 1
    edges = next(iter(histograms.values())).edges.tolist()
    lowest = min(float(share[share > 0].min()) for share in shares.values() if bool((share > 0).any()))
    floor = math.floor(math.log10(lowest))

    def x(bin: float) -> float:
        return 8 + (WIDTH - 16) * (bin - low) / (high - low)

    def y(share: float) -> float:
        return 8 + (HEIGHT - 34) * (math.log10(share) / floor if share > 0 and floor else 0.0 if share > 0 else 1.0)

    drawn = []
    for name, colour in _colours(list(shares)).items():
        points = [(x(bin + side), y(float(shares[name][bin]))) for bin in range(low, high) for side in (0, 1)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        drawn.append(
            f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2' stroke-linejoin='round'/>"
        )
    half = len(edges) // 2
    if low <= half <= high:
        place = f"x1='{x(half):.1f}' x2='{x(half):.1f}' y1='4' y2='{HEIGHT - 24}'"
        drawn.append(f"<line {place} stroke='#777' stroke-dasharray='2 3'/>")
    ticks: list[int] = sorted({low, high, (low + high) // 2} | ({half} if low <= half <= high else set()))
    anchors = {ticks[0]: "start", ticks[-1]: "end"}
    for bin in ticks:
        place = f"x='{x(bin):.1f}' y='{HEIGHT - 6}' text-anchor='{anchors.get(bin, 'middle')}'"
        drawn.append(f"<text {place} fill='#777' font-size='12'>{edges[bin]:.2g}</text>")
    legend = "".join(
        f"<span style='margin-right:1.2em'><span style='display:inline-block;width:1.2em;border-top:3px solid {colour};"
        f"vertical-align:.25em'></span> {html.escape(name)}</span>"
        for name, colour in _colours(list(shares)).items()
    )
    label = html.escape(f"Activations of {neuron}, by corpus", quote=True)
    return (
        f"<div style='font-size:.9em'>{legend}</div><svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{label}' "
        f"style='display:block;width:100%;max-width:{WIDTH}px;height:auto'>{''.join(drawn)}</svg>"
    )


def _shares(histogram: Histogram, site: Site, index: int) -> torch.Tensor:
    counts = histogram.counts(site, index).double()
    return counts / counts.sum().clamp_min(1)


def chips(verb: str, entries: Sequence[tuple[str, float]]) -> str:
    """Write tokens, each with its number, behind what the neuron does to them."""
    look = f"display:inline-block;margin:.15em .4em .15em 0;padding:.05em .5em;border:{LINE};border-radius:5px;white-space:pre"
    tokens = "".join(
        f"<span style='{look}'>" + f'<span style="{MONO};font-size:.9em">{safe_text(token, marks=True)}</span> '
        f"<span style='{SOFT};font-size:.85em'>{number_text(value, signed=True)}</span></span>"
        for token, value in entries
    )
    return f"<div style='margin:.2em 0'><span style='display:inline-block;min-width:4em'>{verb}</span>{tokens}</div>"


def effect_table(effect: Report) -> str:
    """Write what the condition "ablated" does to every corpus: the unedited model, and the difference."""
    frame = effect.to_frame()
    rows = []
    for corpus in effect.corpora:
        cells = []
        for metric in METRICS:
            one = frame[(frame.corpus == corpus) & (frame.metric == metric)].set_index("condition")
            base = one.loc[BASE, "value"] if BASE in one.index else math.nan
            if metric == "kl":  # of which the unedited model has none
                value, low, high = (float(one.loc["ablated", name]) for name in ("value", "low", "high"))
            else:
                names = ("difference", "difference_low", "difference_high")
                value, low, high = (float(one.loc["ablated", name]) for name in names)
            before = f"{base:.3f} " if metric != "kl" else ""
            known = f" [{low:+.4f}, {high:+.4f}]" if math.isfinite(low) else " (too few documents for an interval)"
            cells.append(f"{before}{value:+.4f}{known}".replace("-", "−"))
        rows.append((corpus, *cells))
    head = "".join(f"<th style='{CELL};{SOFT}'>{html.escape(name)}</th>" for name in ("corpus", *METRICS.values()))
    written = ["".join(f"<td style='{CELL}'>{html.escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{row}</tr>" for row in written)
    look = "border-collapse:collapse;font-size:.9em;font-variant-numeric:tabular-nums"
    table = f"<table style='{look}'><tr>{head}</tr>{body}</table>"
    return f"<div style='overflow-x:auto'>{table}</div>"


CELL = f"padding:.2em 1em .2em 0;text-align:left;border-bottom:{LINE}"
