"""`figures_of`: the figures of a page that was written before, as plotly figures that know where they are from.

Knows how `templates/figure.html` writes a figure, and what `run.json` beside the page says of the run.
"""

import html
import json
import os
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from lens_unlearn.core.errors import ArtefactError, LensUnlearnError
from lens_unlearn.evaluation.report import Report
from lens_unlearn.figures import theme

__all__ = ["figure_of", "figures_of"]

PAGES = ("report.html", "compare.html", "audit.html", "benchmark.html")
"""What the page of a run is called, by what was run."""


class _Reader(HTMLParser):
    """Notes the heading, the subtitle and the JSON of every figure."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []
        self.place, self.words = "", {"heading": "", "subtitle": "", "figure": ""}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "figure":
            self.words = dict.fromkeys(self.words, "")
        inside = {"figcaption": "caption", "script": "figure" if dict(attrs).get("data-figure") else ""}
        self.place = inside.get(tag, self.place)
        if self.place in ("caption", "heading", "subtitle"):
            self.place = "heading" if re.fullmatch(r"h\d", tag) else "subtitle" if tag == "p" else self.place

    def handle_data(self, data: str) -> None:
        if self.place in self.words:
            self.words[self.place] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "script" and self.place == "figure":
            self.found.append((self.words["heading"].strip(), self.words["subtitle"].strip(), self.words["figure"]))
        if tag in ("script", "figcaption"):
            self.place = ""


def figures_of(run: str | os.PathLike[str]) -> list[go.Figure]:
    """Return the figures of a run, in the order of its page.

    Args:
        run: The folder of a run or a comparison, or a page.

    Raises:
        ArtefactError: If there is no page, or none that holds figures of ours.
    """
    page = _page(Path(run))
    reader = _Reader()
    reader.feed(page.read_text(encoding="utf-8", errors="replace"))
    said = _settings(page.with_name("run.json"))
    try:
        return [_figure(heading, subtitle, json.loads(written), said) for heading, subtitle, written in reader.found]
    except (ValueError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{page} holds a figure that cannot be read: {str(error).splitlines()[0]}") from error


def figure_of(run: str | os.PathLike[str], name: str) -> go.Figure:
    """Return one figure of a run: by its heading, the name of the function that drew it ("tradeoff"), or its number from 1 on.

    Raises:
        ArtefactError: As in `figures_of`.
        LensUnlearnError: If there is none of that name; the message lists those that there are.
    """
    figures = figures_of(run)
    for number, figure in enumerate(figures, start=1):
        own = theme.meta_of(figure)
        if _slug(name) in (_slug(own["title"]), _slug(own["name"]), str(number)):
            return figure
    known = "; ".join(f"{number} {theme.meta_of(figure)['title']}" for number, figure in enumerate(figures, start=1))
    raise LensUnlearnError(f"{run} has no figure {name!r}: choose from {known or 'none'}")


def _page(run: Path) -> Path:
    found = run if run.is_file() else next((run / name for name in PAGES if (run / name).is_file()), None)
    if found is None:
        raise ArtefactError(f"{run} holds no page of a run ({', '.join(PAGES)}): give the folder of one")
    return found


def _settings(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _figure(heading: str, subtitle: str, written: Any, said: Mapping[str, Any]) -> go.Figure:
    figure = go.Figure(written)
    report = Report({}, dict(said))
    noted = {
        key: html.unescape(value) if isinstance(value, str) else value for key, value in theme.meta_of(figure).items()
    }
    own = {"name": "", "subtitle": subtitle, "about": "", **noted, "title": heading}
    # What is of the whole run, the page says once, and not with each figure.
    own["about"] = own["about"] or theme.subtitle_of(report, ("forget", "retain"))
    own["provenance"] = theme.origin(report)
    figure.update_layout(meta={"lens_unlearn": own})
    return figure


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-_")
