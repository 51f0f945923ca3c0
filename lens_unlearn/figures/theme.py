"""What all figures share: colours by meaning, one template, titles with their subtitles and provenance, and axes of layers.

Knows what a figure says of the origin of a report or a map; knows no figure. Figures must be readable in a light and in a dark
notebook, without knowing which: backgrounds are transparent, and text and lines have a mid tone with a contrast above 4 on both.
"""

import html
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lens_unlearn.core.errors import LensUnlearnError, SelectionError
from lens_unlearn.evaluation.report import Report
from lens_unlearn.inspection.html import MAGNITUDE, SIGNED, short
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.maps import NeuronMap

__all__ = [
    "CONTROL",
    "FORGET",
    "MAGNITUDE",
    "RETAIN",
    "SIGNED",
    "corpus_colours",
    "finish",
    "origin",
    "plain",
    "short",
    "subtitle_of",
    "template",
    "with_alpha",
]

FORGET = "#E0641B"
RETAIN = "#2E86D1"
CONTROL = "#8C8C8C"
METHODS = ("#8F63D2", "#12A08A", "#C9559B", "#6C78DA", "#B5506A", "#3F9E63")
"""Methods and selections: purple, green and pink; none is the colour of a corpus, and markers differ in shape as well."""
OTHERS = ("#B08A00", "#A0614A", "#74891F", "#8C7A58", "#C99A2E", "#7F6B2A")
"""Corpora besides forget and retain: yellow, brown and olive; none is the colour of a method."""
MEASURES = ("#5B8E9C", "#A77F9B", "#8E9A5B", "#9C7B5B")
"""Scores and distances, which are neither of a method nor of a corpus."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "x")
TEXT = "#777777"
GRID = "rgba(128,128,128,0.25)"
MAX_MARKS = 2000
"""Marked neurons or points: with their hover texts, more of them would make a figure of megabytes."""
NAME_LENGTH = 48
"""Characters of a name from data, such as a condition's; longer ones would push the plot out of its frame."""
WRAP = 125
"""Characters of a subtitle's line: at 12 pixels they fill about 900 pixels, a notebook's cell. Plotly wraps nothing."""
LONGEST = 1000
"""Characters of what stands below a title."""
BELOW = 62
"""Pixels for the ticks and the title of the lowest x axis; the legend comes under them."""
KIND_ORDER = ("mlp", "shared", "experts", "sae", "attn", "resid")


@cache
def template() -> go.layout.Template:
    """Return the template of all figures; it is applied to each of them and never made the default."""
    axis = {
        "automargin": True,
        "gridcolor": GRID,
        "linecolor": GRID,
        "zerolinecolor": "rgba(128,128,128,0.5)",
        "title": {"standoff": 8},
    }
    return go.layout.Template(
        layout={
            "font": {"color": TEXT, "size": 13, "family": "system-ui, -apple-system, Segoe UI, sans-serif"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": list(METHODS),
            "title": {"x": 0, "xref": "container", "yref": "container", "y": 1, "yanchor": "top", "font": {"size": 17}}
            | {"pad": {"l": 12, "t": 20}},
            "xaxis": axis,
            "yaxis": axis | {"ticks": "outside", "ticklen": 4, "tickcolor": "rgba(0,0,0,0)"},
            "legend": {"orientation": "h", "x": 0, "xanchor": "left", "yanchor": "top"},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "rgba(128,128,128,0.6)", "activecolor": TEXT},
            "hoverlabel": {"align": "left", "namelength": -1},
            "margin": {"l": 60, "r": 20, "b": 60, "t": 80},
        }
    )


def method_colours(methods: Iterable[str]) -> dict[str, str]:
    """Give every method its colour, in order."""
    return {name: METHODS[index % len(METHODS)] for index, name in enumerate(methods)}


def log_ticks(low: float, high: float) -> dict[str, Any]:
    """Return the ticks of a logarithmic axis from 10^low to 10^high, each with its whole number: plotly writes 2 for 0.02."""
    decades = high - low
    step, digits = (2, (1,)) if decades > 3.5 else (1, (1,)) if decades > 2 else (1, (1, 2, 5))
    first = math.floor(low / step) * step
    ticks = [(digit, power) for power in range(first, math.ceil(high) + 1, step) for digit in digits]
    return {
        "tickvals": [digit * 10.0**power for digit, power in ticks],
        "ticktext": [_tick(digit, power) for digit, power in ticks],
    }


def _tick(digit: int, power: int) -> str:
    if -4 <= power <= 4:
        return f"{digit * 10.0**power:,.10g}"
    return f"{'' if digit == 1 else f'{digit}·'}10<sup>{str(power).replace('-', '−')}</sup>"


def finish(
    fig: go.Figure,
    title: str,
    subtitle: str = "",
    *,
    about: str = "",
    height: int = 420,
    columns: int = 1,
    width: int = 0,
    facets: bool = False,
    provenance: dict[str, Any] | None = None,
    name: str = "",
) -> go.Figure:
    """Apply the template, the title with its subtitle, and the provenance (kept in ``fig.layout.meta``).

    Args:
        fig: Is changed.
        title: Says what was measured.
        subtitle: How to read it, and what was left out; wrapped.
        about: Model, corpora and tokens; a report page, which gives them once for all figures, leaves it out.
        height: In pixels, of the plot with its axes, without title and legend.
        columns: Panels side by side; a report page gives each of them a readable width.
        width: In pixels, at least, on a page: of what cannot be read narrower, such as a heat map with many columns.
        facets: Whether panels have headings, which need room above them.
        provenance: What is known of the origin of the numbers.
        name: Of the function that drew it, where a report page asks for it.
    """
    about, subtitle = (part if len(part) <= LONGEST else f"{part[: LONGEST - 1]}…" for part in (about, subtitle))
    lines = textwrap.wrap(" · ".join(part for part in (about, subtitle) if part), WRAP)
    text = plain(title, length=200) + "".join(f"<br><span style='font-size:12px'>{plain(s, 400)}</span>" for s in lines)
    layout: Any = fig.layout
    entries = 0 if layout.showlegend is False else sum(trace.showlegend is not False for trace in traces(fig))
    # Plotly gives neither title nor legend room of its own: it is reckoned here, and added to the height, so that the plot itself
    # is as high as was asked for. About four entries of a legend fit a row of 22 pixels; a line at 12 pixels takes 17.
    legend = 30 + 22 * (entries // 4) if entries else 0
    top = 50 + 17 * len(lines) + (26 if facets else 0)
    fig.update_layout(
        template=template(),
        title_text=text,
        height=height + top + legend,
        margin={"t": top, "b": BELOW + legend},
        legend_y=-BELOW / max(height - BELOW, 1),
        meta={
            "lens_unlearn": {
                "name": name,
                "title": title,
                "about": about,
                "subtitle": subtitle,
                "columns": columns,
                "width": width,
                "headings": facets,
                "provenance": provenance or {},
            }
        },
    )
    for axis, name_of_axis in ((layout.xaxis, "x"), (layout.yaxis, "y")):
        # Where all axes match the first, so does the first itself, and the browser's console would warn of that.
        if axis.matches == name_of_axis:
            axis.matches = None
    # Headings of panels are annotations of make_subplots, which centres them in a size of its own.
    fig.update_annotations(font_size=13)
    return fig


def two_lines(name: str, length: int = NAME_LENGTH) -> str:
    """Write the name of a control on two lines, which leaves a figure more room on a phone."""
    return plain(name, length).replace(":control", "<br>control")


def traces(fig: go.Figure) -> list[Any]:
    """Return the traces; plotly types them as strings."""
    return list(fig.data)


def is_first(fig: go.Figure, name: str) -> bool:
    """Say whether no trace of this name is in the legend yet: panels share one legend."""
    return not any(trace.name == name and trace.showlegend is not False for trace in traces(fig))


def plain(text: object, length: int = NAME_LENGTH) -> str:
    """Make a text from data safe to show: plotly reads tags in names, and hover templates read ``%{``."""
    words = str(text)
    words = words if len(words) <= length else f"{words[: length - 1]}…"
    return html.escape(words, quote=False).replace("%{", "%&#123;")


def with_alpha(colour: str, alpha: float) -> str:
    """Give a ``#rrggbb`` colour an opacity."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


def corpus_colours(corpora: Sequence[str], forget: str = "forget", retain: str = "retain") -> dict[str, str]:
    """Give every corpus its colour: forget warm, retain cool, the others neither."""
    rest = [name for name in corpora if name not in (forget, retain)]
    colours = {name: OTHERS[index % len(OTHERS)] for index, name in enumerate(rest)}
    return {forget: FORGET, retain: RETAIN, **colours}


def kinds_of(score: NeuronMap, kind: str | None) -> list[str]:
    """Return the kinds to draw: the one asked for, or all, MLP before attention.

    Raises:
        SelectionError: If the map has nothing of the kind asked for.
    """
    if kind is not None:
        return score[kind].kinds
    return sorted(score.kinds, key=lambda name: (KIND_ORDER.index(name.partition(".")[0]), name))


def values_of(score: NeuronMap) -> dict[Site, np.ndarray]:
    """Return copies of a map's values as flat float64 arrays."""
    return {site: value.double().reshape(-1).numpy() for site, value in score.items()}


def require_neurons(score: NeuronMap, figure: str) -> None:
    """Refuse a map without neurons.

    Raises:
        SelectionError: Naming the figure.
    """
    if not isinstance(score, NeuronMap):
        raise LensUnlearnError(f"{figure} draws a NeuronMap, not a {type(score).__name__}: pass a score or a selection")
    if score.numel() == 0:
        raise SelectionError(
            f"{figure} has nothing to draw: the map has no neurons, so collect over a site that has some"
        )


def require_selection(selection: NeuronMap, figure: str) -> None:
    """Refuse what is not a boolean map.

    Raises:
        SelectionError: Naming the figure.
    """
    require_neurons(selection, figure)
    if not selection.is_selection:
        raise SelectionError(
            f"{figure} needs a boolean map as its selection: compare the score, or use score.top(0.02)"
        )


def layer_rows(sites: Iterable[Site]) -> list[int]:
    """Return the rows of a heat map of layers: also those between that lack the site, or their neighbours would be drawn wider."""
    layers = {site.layer for site in sites}
    return list(range(min(layers), max(layers) + 1))


def layer_ticks(layers: Sequence[int]) -> dict[str, Any]:
    """Return settings of a layer axis: layer 0 at the bottom, whole numbers, half a layer of room."""
    low, high = min(layers), max(layers)
    step = max(1, round((high - low + 1) / 16))
    return {"range": [low - 0.5, high + 0.5], "tick0": 0, "dtick": step, "tickformat": "d", "zeroline": False}


def layer_height(layers: Sequence[int]) -> int:
    """Return a height in pixels at which every layer can be seen: 22 of each, between what a heading and a screen allow."""
    return int(np.clip(22 * (max(layers) - min(layers) + 1), 150, 620))


def source(provenance: dict[str, Any], name: str = "") -> str:
    """Say in one phrase where statistics come from: corpus and tokens."""
    corpus, tokens = provenance.get("corpus"), provenance.get("tokens")
    parts = [short(corpus) if corpus else "", f"{tokens:,} tokens" if isinstance(tokens, int) else ""]
    phrase = ", ".join(part for part in parts if part)
    return f"{name}: {phrase}" if name and phrase and not phrase.startswith(name) else phrase


def origin(report: Report) -> dict[str, Any]:
    """Return what a figure keeps of a report's provenance."""
    kept = {key: report.provenance[key] for key in ("model", "corpora") if key in report.provenance}
    plan, bootstrap = (report.provenance.get(key) for key in ("plan", "bootstrap"))
    seeds = {key: plan[key] for key in ("seed", "controls") if key in plan} if isinstance(plan, Mapping) else {}
    if not seeds and isinstance(bootstrap, Mapping) and "seed" in bootstrap:
        seeds = {"seed": bootstrap["seed"]}
    return kept | seeds


def meta_of(fig: go.Figure) -> dict[str, Any]:
    """Return what `finish` noted in a figure; nothing in figures from elsewhere."""
    meta: Any = fig.to_plotly_json().get("layout", {}).get("meta")
    return meta.get("lens_unlearn", {}) if isinstance(meta, dict) else {}


def subtitle_of(report: Report, corpora: tuple[str, ...]) -> str:
    """Say of which model and texts a report is."""
    parts = [f"model {report.provenance['model']}"] if report.provenance.get("model") else []
    known = report.provenance.get("corpora") or {}
    for name in corpora:
        entry = known.get(name) if isinstance(known, dict) else None
        if isinstance(entry, dict):
            parts.append(source({"corpus": entry.get("source", name), "tokens": entry.get("tokens")}, name))
    return " · ".join(parts)


def about_audit(provenance: Mapping[str, Any]) -> str:
    """Say of which model and facts an audit is."""
    facts = provenance.get("facts") or {}
    parts = [f"model {short(provenance['model'])}"] if provenance.get("model") else []
    if isinstance(facts, Mapping) and facts.get("source"):
        parts.append(f"{short(facts['source'])}, {facts.get('documents', 0):,} facts")
    return " · ".join(parts)


def number(measure: Any, share: bool) -> str:
    """Write a measure into a cell: a share in percent, anything else with two digits; "" for none."""
    if measure is None or not np.isfinite(measure.value):
        return ""
    return f"{measure.value:.0%}" if share else f"{measure.value:.2f}"
