"""`generations`: what a model writes to each prompt, the conditions side by side, with what differs marked.

Knows how continuations are laid out and compared; knows nothing of the model that wrote them.
"""

import html
import os

from lens_unlearn.inspection.generations import Generations
from lens_unlearn.inspection.html import KEEP, LINE, MONO, SOFT, Html, drawing, safe_text

__all__ = ["generations"]


def generations(written: Generations) -> Html:
    """Draw what a model writes to each prompt, the conditions side by side; what differs from the first one is marked.

    Args:
        written: What `lu.generations` returned.
    """
    sections = []
    for number, prompt in enumerate(written.prompts):
        texts = {name: of_condition[number] for name, of_condition in written.written.items()}
        base, first = next(iter(texts.items()))
        panels = "".join(_panel(name, text, first, "" if name == base else base) for name, text in texts.items())
        sections.append(
            f"<div style='margin:.6em 0 1.2em;break-inside:avoid'><div style='{MONO};font-size:.9em;{KEEP};border-left:3px "
            f"solid rgba(128,128,128,.55);padding:.1em .7em;margin-bottom:.45em'>{safe_text(prompt, marks=True)}</div>"
            f"<div style='display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,16em),1fr));gap:.5em'>"
            f"{panels}</div></div>"
        )
    marks = f"marked: what differs from {next(iter(written.written))}" if len(written.written) > 1 else ""
    about = " · ".join(part for part in (written.about, marks) if part)
    return drawing("What the model writes", about, "".join(sections), [])


def _panel(name: str, text: str, first: str, base: str) -> str:
    # Greedy texts are alike up to the first token that an intervention changes; behind it all is new.
    same = len(os.path.commonprefix([text, first]))
    rest = f"<span style='background-color:rgba(224,100,27,.22);border-radius:3px'>{safe_text(text[same:])}</span>"
    body = safe_text(text[:same]) + (rest if text[same:] else "")
    empty = f"<span style='{SOFT}'>(nothing)</span>"
    same_as = f"<span style='font-weight:400'> · as {html.escape(base)}</span>" if base and text == first else ""
    return (
        f"<div style='border:{LINE};border-radius:6px;padding:.4em .8em .55em;min-width:0'>"
        f"<div style='{SOFT};font-size:.85em;font-weight:600'>{html.escape(name)}{same_as}</div>"
        f'<div style="{MONO};font-size:.88em;line-height:1.5;{KEEP}">{body if text else empty}</div></div>'
    )
