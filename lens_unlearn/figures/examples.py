"""Texts coloured by a value of each token, as HTML for notebooks, reports and documentation.

Everything is escaped; styles are inline; there is no script, and nothing is fetched. A text stands on a ground of the colour of
zero, and every token's ink contrasts with its own colour, so it reads the same in a light and in a dark notebook; all
that stands around it takes the notebook's own ink.
"""

import html

from lens_unlearn.inspection.html import (
    KEEP,
    LINE,
    MONO,
    PRINT,
    SOFT,
    Html,
    Scale,
    drawing,
    hex_colour,
    ink,
    number_text,
    scale_legend,
    token_cells,
)
from lens_unlearn.inspection.top_examples import Example, TopExamples

__all__ = ["examples"]

NEURONS = 12  # neurons whose examples are drawn


def examples(top: TopExamples, *, neurons: int = NEURONS) -> Html:
    """Draw the top examples of neurons: the activation, and the text around the token, which is framed.

    Every neuron has a scale of its own, which reaches to its strongest activation.

    Args:
        top: What `top_examples` returned.
        neurons: How many are drawn; a note says how many were left out.
    """
    sections = []
    for name, found in list(top.examples.items())[:neurons]:
        scale = Scale.of([value for one in found for value in one.values.tolist()], signed=True)
        rows = "".join(_example(one, scale) for one in found)
        rows = rows or f"<div style='{SOFT}'>There is no counted token in this corpus.</div>"
        heading = f"<b style='font-weight:600;margin-right:.9em'>{html.escape(name)}</b>{scale_legend(scale, '')}"
        sections.append(f"<div style='margin:.6em 0 1.1em'><div style='margin-bottom:.3em'>{heading}</div>{rows}</div>")
    which = {"max": "highest", "min": "lowest", "abs": "strongest"}[top.by]
    title = f"Where the activation is {which}" + (", one token per document" if top.per_document else "")
    left = len(top.examples) - neurons
    notes = [f"{neurons:,} of {len(top.examples):,} neurons are drawn: name one, as in top[name], for the others."]
    return drawing(title, top.about, "".join(sections), notes if left > 0 else [])


def _example(one: Example, scale: Scale) -> str:
    told = [
        f"{token!r}\n{number_text(float(value), signed=True)}"
        for token, value in zip(one.tokens, one.values, strict=True)
    ]
    zero = scale.colour(0.0)
    cells = "".join(token_cells(one.tokens, one.values.tolist(), told, scale, one.mark))
    dots = f"<span style='{SOFT}'>…</span>"
    line = f"{'' if one.begins else dots}{cells}{'' if one.ends else dots}"
    where = f"document {one.document}, position {one.position}"
    return (
        f"<div style='display:flex;flex-wrap:wrap;align-items:baseline;gap:0 .8em;margin:.25em 0;break-inside:avoid'>"
        f"<span title='{where}' style='flex:0 0 4.2em;text-align:right;font-variant-numeric:tabular-nums;font-size:.9em'>"
        f"{number_text(one.value, signed=True)}</span>"
        f'<span style="flex:1 1 18em;min-width:0;{MONO};font-size:.86em;line-height:1.7;{KEEP};background-color:{hex_colour(zero)};'
        f'color:{ink(zero)};padding:.2em .6em;border-radius:5px;border:{LINE};{PRINT}">{line}</span></div>'
    )
