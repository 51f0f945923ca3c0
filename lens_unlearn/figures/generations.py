"""Texts coloured by a value of each token, as HTML for notebooks, reports and documentation.

Everything is escaped; styles are inline; there is no script, and nothing is fetched. A text stands on a ground of the colour of
zero, and every token's ink contrasts with its own colour, so it reads the same in a light and in a dark notebook; all
that stands around it takes the notebook's own ink.
"""

import html
import os

from lens_unlearn.inspection.generations import Generations
from lens_unlearn.inspection.html import KEEP, LINE, MONO, SOFT, Html, drawing, safe_text

__all__ = ["generations"]


def generations(told: Generations) -> Html:
    """Draw what a model writes to each prompt, the conditions side by side; what differs from the first one is marked.

    Args:
        told: What `generations` returned.
    """
    sections = []
    for number, prompt in enumerate(told.prompts):
        written = {name: texts[number] for name, texts in told.written.items()}
        first = next(iter(written.values()))
        base = next(iter(written))
        panels = "".join(_panel(name, text, first, "" if name == base else base) for name, text in written.items())
        sections.append(
            f"<div style='margin:.6em 0 1.2em;break-inside:avoid'><div style='{MONO};font-size:.9em;{KEEP};border-left:3px "
            f"solid rgba(128,128,128,.55);padding:.1em .7em;margin-bottom:.45em'>{safe_text(prompt, marks=True)}</div>"
            f"<div style='display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,16em),1fr));gap:.5em'>"
            f"{panels}</div></div>"
        )
    marks = f"marked: what differs from {next(iter(told.written))}" if len(told.written) > 1 else ""
    about = " · ".join(part for part in (told.about, marks) if part)
    return drawing("What the model writes", about, "".join(sections), [])


def _panel(name: str, text: str, first: str, base: str) -> str:
    same = len(os.path.commonprefix([text, first]))
    rest = f"<span style='background-color:rgba(224,100,27,.22);border-radius:3px'>{safe_text(text[same:])}</span>"
    body = safe_text(text[:same]) + (rest if text[same:] else "")
    empty = f"<span style='{SOFT}'>(nothing)</span>"
    told = f"<span style='font-weight:400'> · as {html.escape(base)}</span>" if base and text == first else ""
    return (
        f"<div style='border:{LINE};border-radius:6px;padding:.4em .8em .55em;min-width:0'>"
        f"<div style='{SOFT};font-size:.85em;font-weight:600'>{html.escape(name)}{told}</div>"
        f'<div style="{MONO};font-size:.88em;line-height:1.5;{KEEP}">{body if text else empty}</div></div>'
    )
