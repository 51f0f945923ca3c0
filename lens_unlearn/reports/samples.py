"""What a model writes before and after, side by side, and texts coloured token by token.

Knows where a condition's text leaves that of the unedited model; `templates/samples.html` knows how that is shown. Knows nothing
of who wrote the texts: all of them may be hostile.
"""

import os
from dataclasses import dataclass

from markupsafe import Markup

from lens_unlearn.evaluation.conditions import BASE
from lens_unlearn.evaluation.report import Report
from lens_unlearn.reports.templating import render

__all__ = ["cut", "written"]

TEXT_LIMIT = 4000
TRUE = ("true answer", "true text")
"""Entries of a sample that no condition wrote."""
NOTES = {"withheld": "abstained", "cut": "cut at the limit of tokens"}
"""What is said of the conditions in a list of a sample."""


@dataclass(frozen=True)
class Panel:
    """What one condition wrote: as far as the unedited model wrote the same, and from there on."""

    condition: str
    note: str
    same: str
    other: str = ""


def written(report: Report, drawn: list[tuple[str, Markup]], level: int) -> str:
    """Write texts before and after side by side, what differs from the unedited model marked; then coloured tokens."""
    samples, corpus = [], None
    for sample in report.samples:
        base = sample.get(BASE)
        notes = {name: note for key, note in NOTES.items() for name in sample.get(key, ())}
        panels = [
            _panel(condition, text, None if condition in (BASE, *TRUE) else base, notes.get(condition, ""))
            for condition, text in sample.items()
            if condition not in ("prompt", "corpus", *NOTES)
        ]
        begins = sample.get("corpus", corpus) != corpus
        corpus = sample.get("corpus", corpus)
        prompt = cut(sample["prompt"]) if "prompt" in sample else None
        samples.append({"corpus": corpus if begins else None, "prompt": prompt, "panels": panels})
    return render("samples.html", samples=samples, drawn=drawn, level=level)


def _panel(condition: str, text: object, base: object, note: str) -> Panel:
    who = "unedited model" if condition == BASE else condition
    if base is not None and text == base:
        return Panel(who, "as the unedited model", cut(text))
    answer = str(text)
    if base is None:
        return Panel(who, note, cut(answer))
    same = len(os.path.commonprefix([answer[:TEXT_LIMIT], str(base)[:TEXT_LIMIT]]))
    return Panel(who, note, answer[:same], cut(answer[same:])) if same < len(answer) else Panel(who, note, cut(answer))


def cut(text: object) -> str:
    """Cut a text where it would fill the page."""
    whole = str(text)
    more = f" … ({len(whole) - TEXT_LIMIT:,} more characters)" if len(whole) > TEXT_LIMIT else ""
    return whole[:TEXT_LIMIT] + more
