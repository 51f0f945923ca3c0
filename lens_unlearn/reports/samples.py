"""`written`: what a model writes before and after, side by side, and coloured tokens, for the report page."""

import os
from html import escape
from typing import Any

from lens_unlearn.evaluation.conditions import BASE
from lens_unlearn.evaluation.report import Report
from lens_unlearn.reports.findings import name

__all__ = ["cut", "written"]

TEXT_LIMIT = 4000
TRUE = ("true answer", "true text")
"""Entries of a sample that no condition wrote."""


def written(report: Report, drawn: list[tuple[str, Any]], level: int) -> str:
    """Write texts before and after side by side, what differs from the unedited model marked; then coloured tokens."""
    parts, corpus = [], None
    for sample in report.samples:
        if sample.get("corpus", corpus) != corpus:
            corpus = sample["corpus"]
            parts.append(f"<h{level}>On <i>{name(corpus)}</i></h{level}>")
        base = sample.get(BASE)
        withheld = sample.get("withheld", ())
        texts = "".join(
            _panel(condition, text, None if condition in (BASE, *TRUE) else base, condition in withheld)
            for condition, text in sample.items()
            if condition not in ("prompt", "corpus", "withheld")
        )
        prompt = f"<p class='note'>Prompt</p><pre class='prompt'>{cut(sample.get('prompt'))}</pre>"
        parts.append(f"<article>{prompt if 'prompt' in sample else ''}<div class='samples'>{texts}</div></article>")
    if parts:
        told = "Greedy continuations of test texts; <mark>what differs</mark> from the unedited model."
        parts.insert(0, f"<p class='note'>{told}</p>")
    parts += [f"<details><summary>{name(title, 200)}</summary>{text}</details>" for title, text in drawn]
    return "".join(parts)


def _panel(condition: str, text: object, base: object, withheld: bool) -> str:
    """Write what one condition wrote, marked from where it leaves the base's text."""
    told = cut(text)
    said = " · answer withheld" if withheld else ""
    if base is not None and text == base:
        said = " · as the unedited model"
    elif base is not None:
        same = len(os.path.commonprefix([str(text)[:TEXT_LIMIT], str(base)[:TEXT_LIMIT]]))
        told = f"{escape(str(text)[:same])}<mark>{cut(str(text)[same:])}</mark>" if same < len(str(text)) else told
    told = told if str(text) else "<span class='note'>(nothing)</span>"
    who = "unedited model" if condition == BASE else name(condition)
    return f"<div><p class='who'>{who}{said}</p><pre>{told}</pre></div>"


def cut(text: object) -> str:
    """Escape a text, and cut it where it would fill the page."""
    told = str(text)
    more = f" … ({len(told) - TEXT_LIMIT:,} more characters)" if len(told) > TEXT_LIMIT else ""
    return escape(told[:TEXT_LIMIT] + more)
