"""`colored_tokens`: tokens coloured by values of a user's own, such as attributions or the output of a probe.

Knows only strings and numbers: nothing of models, tokenizers or what the values mean.
"""

from collections.abc import Iterable, Sequence

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.inspection.html import (
    Html,
    Scale,
    cut_note,
    drawing,
    scale_legend,
    token_card,
    token_limit,
    with_unit,
)

__all__ = ["colored_tokens"]


def colored_tokens(
    tokens: Sequence[str],
    values: Iterable[float],
    *,
    title: str = "",
    unit: str = "",
    signed: bool | None = None,
    limit: float | None = None,
    most: int | None = None,
) -> Html:
    """Draw tokens coloured by values of your own, such as attributions or the output of a probe.

    Args:
        tokens: Texts, such as ``model.to_str_tokens(text)`` returns. An empty one joins the next: the two share a character.
        values: One for each token; NaN for none.
        title: What the values are.
        unit: Their unit.
        signed: Whether to draw about zero; default: if any value is below zero.
        limit: Where the scale ends; default: at the largest value.
        most: Tokens to draw, 4,000 unless said; a note says what was left out.

    Raises:
        LensUnlearnError: If there are not as many values as tokens, or none.

    Examples:
        >>> drawn = colored_tokens(["a", " <b>"], [0.5, -1.0], unit="nats")
        >>> "&lt;b&gt;" in drawn
        True
    """
    column = [float(value) for value in values]
    if len(tokens) != len(column) or not column:
        raise LensUnlearnError(
            f"{len(tokens):,} tokens and {len(column):,} values: give as many of both, and at least one"
        )
    signed = any(value < 0 for value in column) if signed is None else signed
    scale = Scale.of(column, signed=signed, limit=limit)
    most = token_limit(most, 1)
    tooltips = [f"{t!r}\n{with_unit(value, unit, signed)}" for t, value in zip(tokens[:most], column, strict=False)]
    body = f"<div style='margin:.3em 0'>{scale_legend(scale, unit)}</div>"
    body += token_card(tokens[:most], column[:most], tooltips, scale)
    return drawing(title, "", body, [cut_note(most, len(column))] if len(column) > most else [])
