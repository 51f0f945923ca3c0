"""What a model writes before and after, side by side, and texts coloured token by token.

Knows where a condition's text leaves that of the unedited model; `templates/samples.html` knows how that is shown. Knows nothing
of who wrote the texts: all of them may be hostile.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lens_unlearn.evaluation.conditions import BASE
from lens_unlearn.evaluation.report import Report
from lens_unlearn.reports.templating import render

__all__ = ["cut", "written"]

TEXT_LIMIT = 4000
PROMPT_LIMIT = 500
"""Characters of a prompt, of which the end is shown."""
SHOWN = 2
"""Samples that are not folded away, the first of each corpus first."""
TRUE = ("true answer", "reference", "true text")
"""Entries of a sample that no condition wrote; the last is what earlier runs call the second."""
BLANK_LINES = re.compile(r"\r?\n(?:[ \t]*\r?\n)+")
COLUMNS = 4
"""Panels side by side, at most."""
NOTES = {"withheld": "abstained", "cut": "cut at the limit of tokens"}
"""What is said of the conditions in a list of a sample."""


@dataclass(frozen=True)
class Panel:
    """What one condition wrote: as far as the unedited model wrote the same, and from there on."""

    condition: str
    note: str
    same: str
    other: str = ""


@dataclass(frozen=True)
class Sample:
    """What the page shows of one prompt."""

    corpus: object
    prompt: str | None
    panels: list[Panel]

    @property
    def columns(self) -> int:
        """Panels side by side, in rows of the same length as far as that can be."""
        count = len(self.panels)
        return count if count <= COLUMNS else math.ceil(count / math.ceil(count / COLUMNS))


def written(report: Report, drawn: list[tuple[str, Markup]], level: int) -> str:
    """Write texts before and after side by side, what differs from the unedited model marked; then coloured tokens."""
    samples = [_sample(sample) for sample in report.samples]
    first = {sample.corpus: number for number, sample in reversed([*enumerate(samples)])}
    shown = sorted(first.values())[:SHOWN] if len(samples) > SHOWN else range(len(samples))
    return render(
        "samples.html",
        shown=[samples[number] for number in shown],
        folded=[sample for number, sample in enumerate(samples) if number not in shown],
        drawn=drawn,
        level=level,
    )


def _sample(sample: Mapping[str, Any]) -> Sample:
    base = sample.get(BASE)
    notes = {name: note for key, note in NOTES.items() for name in sample.get(key, ())}
    panels = [
        _panel(condition, text, None if condition in (BASE, *TRUE) else base, notes.get(condition, ""))
        for condition, text in sample.items()
        if condition not in ("prompt", "corpus", *NOTES)
    ]
    return Sample(sample.get("corpus"), _end(sample["prompt"]) if "prompt" in sample else None, panels)


def tidy(text: object) -> str:
    """Leave out blank lines, and ends of lines before and behind a text."""
    return BLANK_LINES.sub("\n", str(text)).strip("\r\n")


def _end(prompt: object) -> str:
    """Cut a prompt to its end, from a line or at least a word on."""
    whole = tidy(prompt)
    if len(whole) <= PROMPT_LIMIT:
        return whole
    rest = whole[-PROMPT_LIMIT:]
    place = next((at for at in (rest.find("\n"), rest.find(" ")) if 0 <= at < PROMPT_LIMIT // 2), -1)
    return f"… ({len(whole) - PROMPT_LIMIT + place + 1:,} characters before)\n{rest[place + 1 :]}"


def _panel(condition: str, text: object, base: object, note: str) -> Panel:
    text, base = tidy(text), None if base is None else tidy(base)
    who = "unedited model" if condition == BASE else condition
    if base is not None and text == base:
        return Panel(who, "as the unedited model", cut(text))
    answer = text
    if base is None:
        return Panel(who, note, cut(answer))
    same = len(os.path.commonprefix([answer[:TEXT_LIMIT], base[:TEXT_LIMIT]]))
    return Panel(who, note, answer[:same], cut(answer[same:])) if same < len(answer) else Panel(who, note, cut(answer))


def cut(text: object) -> str:
    """Cut a text where it would fill the page."""
    whole = str(text)
    more = f" … ({len(whole) - TEXT_LIMIT:,} more characters)" if len(whole) > TEXT_LIMIT else ""
    return whole[:TEXT_LIMIT] + more
