"""`save_figure`: a figure as a file for a paper, at the width of a column, and the caption that says where it is from.

Knows what `theme.finish` notes in a figure, and how Chrome draws it (kaleido, an optional extra); knows no figure.
"""

import copy
import math
import os
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from lens_unlearn.core.artefacts import replace_file
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.figures.theme import BELOW, meta_of, traces

__all__ = ["caption", "save_figure"]

WIDTHS = {"column": 3.25, "page": 6.75}
"""Inches: a column of a paper in two of them, and both."""
DRAWN = ("svg", "pdf", "png")
"""Formats that a browser draws; HTML needs none."""
INCH, PRINTED = 96, 300
"""Pixels of an inch as browsers have it, and of a printed one, for PNG."""
FONT = 10.5
"""Pixels: 8 points, as captions have it."""
INK, LINES = "#222222", "#dddddd"


def save_figure(
    fig: go.Figure, path: str | os.PathLike[str], *, width: float | str = "column", height: float | None = None
) -> str:
    """Save a figure for a paper: at the width of a column, on white, in 8 points, without the title, which the caption says.

    Args:
        fig: Any figure, such as one of `lens_unlearn.plot`; it is not changed.
        path: A file that ends in .svg, .pdf or .png (300 dots per inch), which need the extra "export" and a Chrome, or in
            .html, which opens offline.
        width: "column" (3.25 inches), "page" (6.75), or inches.
        height: In inches; default: as it looks on a screen, by that width.

    Returns:
        The caption: what was measured, how to read it, model, texts with their tokens, and seeds, as far as the figure knows.

    Raises:
        LensUnlearnError: If the name ends in nothing that is known, a size is out of range, or nothing here can draw it.
        ArtefactError: If the file cannot be written.
    """
    target = Path(path)
    kind = target.suffix.lower().removeprefix(".")
    if not isinstance(fig, go.Figure):
        raise LensUnlearnError(
            f"save_figure takes a plotly figure, not a {type(fig).__name__}: of texts, save the HTML"
        )
    if kind not in (*DRAWN, "html"):
        raise LensUnlearnError(f"{target} ends in no format of a figure: choose from {', '.join(DRAWN)}, html")
    inches = WIDTHS.get(width) if isinstance(width, str) else width
    for name, value in {"width": inches, "height": height if height is not None else 1.0}.items():
        known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not (known and 0.5 <= value <= 40):
            given = width if name == "width" else height
            raise LensUnlearnError(
                f"{name}={given!r} is no size: give inches from 0.5 to 40, or for the width column or page"
            )
    assert inches is not None
    if kind == "html":
        replace_file(target, fig.to_html(include_plotlyjs=True).encode(errors="backslashreplace"))
    else:
        replace_file(target, _drawn(for_paper(fig, inches, height), target, kind))
    return caption(fig)


def for_paper(fig: go.Figure, width: float, height: float | None = None) -> go.Figure:
    """Return a copy of a figure as a paper shows it, with sizes in inches."""
    own, paper = meta_of(fig), go.Figure(copy.deepcopy(fig.to_dict()))
    layout: Any = fig.layout
    across = width * INCH
    shrunk = min(1.0, across / (PANEL * own.get("columns", 1)))
    paper.update_layout(
        title_text=None,
        font={"size": FONT, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        legend={"font_size": FONT - 1, "tracegroupgap": 0},
        modebar={"remove": ["all"]},
    )
    for update in (paper.update_xaxes, paper.update_yaxes):
        update(gridcolor=LINES, title_font_size=FONT, tickfont_size=FONT - 1, title_standoff=4)
    paper.update_annotations(font_size=FONT)
    for trace in traces(paper):
        _thinner(trace, max(shrunk, 0.55))
    shown = 0 if layout.showlegend is False else sum(trace.showlegend is not False for trace in traces(paper))
    legend = 16 * math.ceil(shown / max(1, int(across // 130))) if shown else 0
    top, below = (34 if own.get("headings") else 10), 38
    inner = (layout.height or 450) - (layout.margin.t or 80) - (layout.margin.b or BELOW)
    plot = max(90.0, inner * max(shrunk, 0.6)) if height is None else max(30.0, height * INCH - top - below - legend)
    paper.update_layout(
        width=round(across),
        height=round(plot + top + below + legend),
        margin={"t": top, "b": below + legend, "l": 8, "r": 8, "autoexpand": True},
        legend_y=-below / max(plot, 1),
    )
    return paper


PANEL = 520
"""Pixels of a panel at which marks have the size that they have on a screen."""


def _thinner(trace: Any, factor: float) -> None:
    """Draw marks and lines in the size of the paper."""
    for part, name in (("marker", "size"), ("line", "width")):
        if part not in trace or name not in getattr(trace, part):
            continue
        drawn: Any = getattr(trace, part)
        size = drawn[name]
        if isinstance(size, int | float):
            drawn[name] = size * factor
        elif isinstance(size, list | tuple):
            drawn[name] = [one * factor for one in size]


def _drawn(paper: go.Figure, target: Path, kind: str) -> bytes:
    try:
        return paper.to_image(format=kind, scale=PRINTED / INCH if kind == "png" else 1)
    except Exception as error:  # kaleido, plotly and Chrome each have their own
        words = str(error).strip().splitlines()
        raise LensUnlearnError(
            f"{target} cannot be drawn here ({words[0] if words else type(error).__name__}): pip install "
            f"'lens-unlearn[export]' and a Chrome or Chromium (BROWSER_PATH says where), or save {target.with_suffix('.html')}"
        ) from error


def caption(fig: go.Figure) -> str:
    """Return what stands below a figure in a paper: what it shows, how to read it, and model, texts and seeds as far as known."""
    own = meta_of(fig)
    title = own.get("title") or str(fig.layout.title.text or "").partition("<br>")[0]
    parts = [title, own.get("subtitle", ""), own.get("about", ""), _seeds(own.get("provenance") or {})]
    sentences = [part[:1].upper() + part[1:] for part in map(str, parts) if part]
    return " ".join(part if part.endswith((".", "?", "!")) else f"{part}." for part in sentences)


def _seeds(provenance: dict[str, Any]) -> str:
    seed, controls = provenance.get("seed"), provenance.get("controls")
    if not isinstance(seed, int):
        return ""
    several = (
        f", and seeds {seed} to {seed + controls - 1} of the random controls"
        if isinstance(controls, int) and controls > 1
        else ""
    )
    return f"seed {seed} of splits and bootstrap{several}"
