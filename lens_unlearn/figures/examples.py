"""`examples`: the top activating examples of neurons, a line for each, the token itself framed.

Knows what stands beside an example (its activation, its document, where the text goes on); knows nothing of how they were found.
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

NEURONS = 12
"""Neurons whose examples are drawn."""


def examples(top: TopExamples, *, neurons: int = NEURONS) -> Html:
    """Draw the top examples of neurons: the activation, and the text around the token, which is framed.

    Every neuron has a scale of its own, which reaches to its strongest activation.

    Args:
        top: What `top_examples` returned.
        neurons: How many are drawn; a note says how many were left out.
    """
    sections = []
    for name, shown in list(top.examples.items())[:neurons]:
        scale = Scale.of([value for example in shown for value in example.values.tolist()], signed=True)
        rows = "".join(_example(example, scale) for example in shown)
        rows = rows or f"<div style='{SOFT}'>There is no counted token in this corpus.</div>"
        heading = f"<b style='font-weight:600;margin-right:.9em'>{html.escape(name)}</b>{scale_legend(scale, '')}"
        sections.append(f"<div style='margin:.6em 0 1.1em'><div style='margin-bottom:.3em'>{heading}</div>{rows}</div>")
    order = {"max": "highest", "min": "lowest", "abs": "strongest"}[top.by]
    title = f"Where the activation is {order}" + (", one token per document" if top.per_document else "")
    left = len(top.examples) - neurons
    notes = [f"{neurons:,} of {len(top.examples):,} neurons are drawn: name one, as in top[name], for the others."]
    return drawing(title, top.about, "".join(sections), notes if left > 0 else [])


def _example(example: Example, scale: Scale) -> str:
    tooltips = [
        f"{token!r}\n{number_text(float(value), signed=True)}"
        for token, value in zip(example.tokens, example.values, strict=True)
    ]
    zero = scale.colour(0.0)
    cells = "".join(token_cells(example.tokens, example.values.tolist(), tooltips, scale, example.mark))
    dots = f"<span style='{SOFT}'>…</span>"
    line = f"{'' if example.begins else dots}{cells}{'' if example.ends else dots}"
    where = f"document {example.document}, position {example.position}"
    return (
        f"<div style='display:flex;flex-wrap:wrap;align-items:baseline;gap:0 .8em;margin:.25em 0;break-inside:avoid'>"
        f"<span title='{where}' style='flex:0 0 4.2em;text-align:right;font-variant-numeric:tabular-nums;font-size:.9em'>"
        f"{number_text(example.value, signed=True)}</span>"
        f'<span style="flex:1 1 18em;min-width:0;{MONO};font-size:.86em;line-height:1.7;{KEEP};background-color:{hex_colour(zero)};'
        f'color:{ink(zero)};padding:.2em .6em;border-radius:5px;border:{LINE};{PRINT}">{line}</span></div>'
    )
