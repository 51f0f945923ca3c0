"""`texts`: texts coloured by the values of their tokens, a scale and a mean beside each value.

Knows which values share a scale, and what a tooltip says; how a cell is coloured and escaped, `inspection.html` knows.
"""

import html
import math
from collections.abc import Sequence

from lens_unlearn.inspection.html import (
    SOFT,
    Html,
    Scale,
    cut_note,
    drawing,
    number_text,
    scale_legend,
    token_card,
    token_limit,
    with_unit,
)
from lens_unlearn.inspection.token_values import Text, TokenValues

__all__ = ["texts"]

COLUMNS = 8
"""Values drawn: each of them repeats the texts."""


def texts(values: TokenValues, *, limit: float | None = None, most: int | None = None) -> Html:
    """Draw texts coloured by the values of their tokens; a token's tooltip gives them as numbers.

    Signed values (activations, changes) are red above zero and blue below, magnitudes (losses, counts) run from dark to
    yellow; white, or dark, is zero. Tokens that share a character share its colour: that of the one furthest from zero.

    Args:
        values: What `token_activations`, `token_firing` or `token_losses` returned.
        limit: Where the scale ends, in the unit of the values; default: at the largest one.
        most: Tokens drawn of each value; a note says what was left out. Default: 4,000 shared out among the values.

    Raises:
        LensUnlearnError: If the limit is not above 0, or no token is to be drawn.
    """
    names = values.shown[:COLUMNS]
    drawn, left_out = _first(values.texts, token_limit(most, len(names)))
    # Values on one scale are compared with each other, so each tooltip has all of them, and is written once.
    shared = [_tooltips(values, text, end) for text, end in drawn] if values.shared else []
    sections = []
    for name in names:
        index, scale = values.names.index(name), _scale(values, name, limit)
        parts = []
        for number, (text, end) in enumerate(drawn):
            tooltips = shared[number] if shared else _tooltips(values, text, end, name)
            heading = f"<div style='{SOFT};font-size:.85em;margin:.5em 0 .15em'>{html.escape(text.name)}</div>"
            card = token_card(text.tokens[:end], text.values[index].tolist()[:end], tooltips, scale)
            parts.append((heading if text.name else "") + card)
        alone = len(names) == 1 and (name in values.title or len(values.names) == 1)
        heading = "" if alone else f"<b style='font-weight:600;margin-right:.9em'>{html.escape(name)}</b>"
        sections.append(
            f"<div style='margin:.5em 0 .9em'><div style='margin-bottom:.3em'>{heading}{scale_legend(scale, values.unit)}"
            f"<span style='{SOFT};font-size:.85em;display:inline-block'>{_mean(values, index)}</span></div>{''.join(parts)}</div>"
        )
    notes = [f"{len(values.shown) - COLUMNS:,} more values are not drawn."] if len(values.shown) > COLUMNS else []
    return drawing(values.title, values.about, "".join(sections), notes + left_out)


def _scale(values: TokenValues, name: str, limit: float | None) -> Scale:
    """Return the scale of a value: its own, or that of all drawn ones of its kind."""
    signed = values.signed[values.names.index(name)]
    together = [other for other in values.shown if values.signed[values.names.index(other)] == signed]
    rows = [values.names.index(other) for other in (together if values.shared else [name])]
    numbers = [value for text in values.texts for row in rows for value in text.values[row].tolist()]
    return Scale.of(numbers, signed=signed, limit=limit)


def _first(given: Sequence[Text], most: int) -> tuple[list[tuple[Text, int]], list[str]]:
    """Return the first texts, and where each ends, up to a number of tokens; and a note on the others."""
    drawn, left = [], most
    for text in given:
        if left > 0:
            drawn.append((text, min(left, len(text.ids))))
            left -= len(text.ids)
    total = sum(len(text.ids) for text in given)
    return drawn, [cut_note(most, total)] if total > most else []


def _mean(values: TokenValues, index: int) -> str:
    """Write the mean over all tokens that count and have a value, drawn or not."""
    counted_values = [
        value
        for text in values.texts
        for value, counted in zip(text.values[index].tolist(), text.counted.tolist(), strict=True)
        if counted and math.isfinite(value)
    ]
    if not counted_values:
        return ""
    mean = number_text(math.fsum(counted_values) / len(counted_values), signed=values.signed[index])
    return f"mean {mean} over {len(counted_values):,} tokens"


def _tooltips(values: TokenValues, text: Text, end: int, name: str | None = None) -> list[str]:
    """Return the tooltip of each token: the token, where it is, and a value; or all values, those that are drawn first."""
    names = [name] if name is not None else sorted(values.names, key=lambda other: other not in values.shown)[:COLUMNS]
    rows = [(other, values.signed[i], text.values[i].tolist()) for other in names for i in [values.names.index(other)]]
    tooltips = []
    for position, (token, number) in enumerate(zip(text.tokens[:end], text.ids[:end].tolist(), strict=True)):
        lines = [f"{token!r}  token {number}, position {position}"]
        lines += [f"{other}: {with_unit(column[position], values.unit, signed)}" for other, signed, column in rows]
        tooltips.append("\n".join(lines))
    return tooltips
