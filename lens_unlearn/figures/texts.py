"""Texts coloured by a value of each token, as HTML for notebooks, reports and documentation.

Everything is escaped; styles are inline; there is no script, and nothing is fetched. A text stands on a ground of the colour of
zero, and every token's ink contrasts with its own colour, so it reads the same in a light and in a dark notebook; all
that stands around it takes the notebook's own ink.
"""

import html
import math
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from lens_unlearn.errors import LensUnlearnError
from lens_unlearn.figures.theme import MAGNITUDE, SIGNED, short

if TYPE_CHECKING:
    from lens_unlearn.examples import Example, TopExamples
    from lens_unlearn.looking import Generations, Text, TokenValues

__all__ = ["Html", "colored_tokens", "document", "examples", "generations", "texts"]

MOST = 4000  # cells drawn in one figure: about 300 bytes each
COLUMNS = 8  # values drawn
NEURONS = 12  # neurons whose examples are drawn
STEPS = 100  # of a scale
MISSING = "no value"
_BREAKS = {"\n": ("↵", "&#10;"), "\t": ("→", "&#9;")}

_SANS = "font-family:system-ui,-apple-system,'Segoe UI',sans-serif"
_MONO = "font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"
_PRINT = "-webkit-print-color-adjust:exact;print-color-adjust:exact"
_KEEP = "white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4"
_SOFT = "opacity:.72"
_FRAME = (
    "font-weight:700;position:relative;border-radius:2px;-webkit-box-decoration-break:clone;box-decoration-break:clone;"
    "box-shadow:0 0 0 1.5px #fff,0 0 0 3px #111;"
)
_LINE = "1px solid rgba(128,128,128,.35)"


class Html(str):
    """HTML that shows itself as the last line of a cell."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Scale:
    """How values become colours: from 0, or symmetric about 0, up to a limit, beyond which all have the last colour."""

    limit: float
    signed: bool

    @classmethod
    def of(cls, values: Sequence[float], *, signed: bool, limit: float | None = None) -> "Scale":
        """Reach to the largest finite value."""
        finite = [abs(value) for value in values if math.isfinite(value)]
        if limit is not None and not (math.isfinite(limit) and limit > 0):
            raise LensUnlearnError(f"limit={limit!r} ends no scale: give a number above 0, in the unit of the values")
        return cls(limit or max(finite, default=0.0), signed)

    def colour(self, value: float) -> tuple[int, int, int]:
        """Return red, green and blue."""
        share = 0.0 if not self.limit else min(1.0, max(-1.0, value / self.limit))
        place = (share + 1) / 2 if self.signed else max(0.0, share)
        return _colours(SIGNED if self.signed else MAGNITUDE)[round(place * STEPS)]

    def ends(self) -> tuple[float, float]:
        """Return the smallest and the largest value that are told apart."""
        return (-self.limit if self.signed else 0.0), self.limit


@cache
def _colours(name: str) -> tuple[tuple[int, int, int], ...]:
    from plotly.colors import sample_colorscale, unlabel_rgb

    drawn = sample_colorscale(name, [step / STEPS for step in range(STEPS + 1)])
    return tuple((round(r), round(g), round(b)) for r, g, b in map(unlabel_rgb, drawn))


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


@cache
def ink(colour: tuple[int, int, int]) -> str:
    """Return black or white, whichever has the higher contrast on a colour: at least 4.5 (WCAG 2)."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#fff"


# --- what is drawn -----------------------------------------------------------------------------------------------------


def texts(values: "TokenValues", *, limit: float | None = None, most: int | None = None) -> Html:
    """Draw texts coloured by the values of their tokens; the tooltip of a token says them as numbers.

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
    some, left_out = _first(values.texts, _most(most, len(names)))
    told = [_told(values, text, end) for text, end in some] if values.shared else []
    sections = []
    for name in names:
        index, scale = values.names.index(name), _scale(values, name, limit)
        parts = []
        for number, (text, end) in enumerate(some):
            words = told[number] if told else _told(values, text, end, name)
            heading = f"<div style='{_SOFT};font-size:.85em;margin:.5em 0 .15em'>{html.escape(text.name)}</div>"
            card = _card(text.tokens[:end], text.values[index].tolist()[:end], words, scale)
            parts.append((heading if text.name else "") + card)
        alone = len(names) == 1 and (name in values.title or len(values.names) == 1)
        heading = "" if alone else f"<b style='font-weight:600;margin-right:.9em'>{html.escape(name)}</b>"
        sections.append(
            f"<div style='margin:.5em 0 .9em'><div style='margin-bottom:.3em'>{heading}{_legend(scale, values.unit)}"
            f"<span style='{_SOFT};font-size:.85em;display:inline-block'>{_mean(values, index)}</span></div>{''.join(parts)}</div>"
        )
    notes = [f"{len(values.shown) - COLUMNS:,} more values are not drawn."] if len(values.shown) > COLUMNS else []
    return _whole(values.title, values.about, "".join(sections), notes + left_out)


def _most(most: int | None, columns: int) -> int:
    if most is not None and most < 1:
        raise LensUnlearnError(f"most={most} leaves no token to draw: at least 1")
    return most or MOST // columns


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
    most = _most(most, 1)
    told = [f"{t!r}\n{_with_unit(value, unit, signed)}" for t, value in zip(tokens[:most], column, strict=False)]
    body = f"<div style='margin:.3em 0'>{_legend(scale, unit)}</div>"
    body += _card(tokens[:most], column[:most], told, scale)
    return _whole(title, "", body, [_cut(most, len(column))] if len(column) > most else [])


def examples(top: "TopExamples", *, neurons: int = NEURONS) -> Html:
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
        rows = rows or f"<div style='{_SOFT}'>There is no counted token in this corpus.</div>"
        heading = f"<b style='font-weight:600;margin-right:.9em'>{html.escape(name)}</b>{_legend(scale, '')}"
        sections.append(f"<div style='margin:.6em 0 1.1em'><div style='margin-bottom:.3em'>{heading}</div>{rows}</div>")
    which = {"max": "highest", "min": "lowest", "abs": "strongest"}[top.by]
    title = f"Where the activation is {which}" + (", one token per document" if top.per_document else "")
    left = len(top.examples) - neurons
    notes = [f"{neurons:,} of {len(top.examples):,} neurons are drawn: name one, as in top[name], for the others."]
    return _whole(title, top.about, "".join(sections), notes if left > 0 else [])


def generations(told: "Generations") -> Html:
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
            f"<div style='margin:.6em 0 1.2em;break-inside:avoid'><div style='{_MONO};font-size:.9em;{_KEEP};border-left:3px "
            f"solid rgba(128,128,128,.55);padding:.1em .7em;margin-bottom:.45em'>{_safe(prompt, marks=True)}</div>"
            f"<div style='display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,16em),1fr));gap:.5em'>"
            f"{panels}</div></div>"
        )
    marks = f"marked: what differs from {next(iter(told.written))}" if len(told.written) > 1 else ""
    about = " · ".join(part for part in (told.about, marks) if part)
    return _whole("What the model writes", about, "".join(sections), [])


def document(body: str, title: str = "Texts") -> str:
    """Put what was drawn into a document of its own, which opens offline."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        "<style>:root{color-scheme:light dark}body{margin:0 auto;padding:1rem;max-width:70rem;font-size:16px}</style>"
        f"</head><body>{body}</body></html>"
    )


# --- parts -------------------------------------------------------------------------------------------------------------


def _whole(title: str, about: str, body: str, notes: Sequence[str]) -> Html:
    heading = f"<div style='font-weight:600;font-size:1.08em'>{html.escape(title)}</div>" if title else ""
    soft = f"<div style='{_SOFT};font-size:.88em'>{html.escape(short(about))}</div>" if about else ""
    below = "".join(f"<div style='{_SOFT};font-size:.88em;margin-top:.3em'>{html.escape(note)}</div>" for note in notes)
    return Html(f'<div style="{_SANS};line-height:1.45;max-width:70em;{_PRINT}">{heading}{soft}{body}{below}</div>')


def _scale(values: "TokenValues", name: str, limit: float | None) -> Scale:
    """Return the scale of one value, or of all drawn ones of its kind."""
    signed = values.signed[values.names.index(name)]
    together = [other for other in values.shown if values.signed[values.names.index(other)] == signed]
    rows = [values.names.index(other) for other in (together if values.shared else [name])]
    numbers = [value for text in values.texts for row in rows for value in text.values[row].tolist()]
    return Scale.of(numbers, signed=signed, limit=limit)


def _first(given: "Sequence[Text]", most: int) -> "tuple[list[tuple[Text, int]], list[str]]":
    """Return the first texts, and where each ends, up to a number of tokens; and what to say of the others."""
    some, left = [], most
    for text in given:
        if left > 0:
            some.append((text, min(left, len(text.ids))))
            left -= len(text.ids)
    total = sum(len(text.ids) for text in given)
    return some, [_cut(most, total)] if total > most else []


def _cut(most: int, total: int) -> str:
    return f"The first {most:,} of {total:,} tokens are drawn."


def _mean(values: "TokenValues", index: int) -> str:
    """Say the mean over all tokens that count and have a value, drawn or not."""
    kept = [
        value
        for text in values.texts
        for value, counted in zip(text.values[index].tolist(), text.counted.tolist(), strict=True)
        if counted and math.isfinite(value)
    ]
    if not kept:
        return ""
    mean = _number(math.fsum(kept) / len(kept), signed=values.signed[index])
    return f"mean {mean} over {len(kept):,} tokens"


def _told(values: "TokenValues", text: "Text", end: int, name: str | None = None) -> list[str]:
    """Return the words of the tooltips: the token, where it is, and a value; or all values, those that are drawn first."""
    names = [name] if name is not None else sorted(values.names, key=lambda other: other not in values.shown)[:COLUMNS]
    rows = [(other, values.signed[i], text.values[i].tolist()) for other in names for i in [values.names.index(other)]]
    told = []
    for position, (token, number) in enumerate(zip(text.tokens[:end], text.ids[:end].tolist(), strict=True)):
        lines = [f"{token!r}  token {number}, position {position}"]
        lines += [f"{other}: {_with_unit(column[position], values.unit, signed)}" for other, signed, column in rows]
        told.append("\n".join(lines))
    return told


def _with_unit(value: float, unit: str, signed: bool) -> str:
    number = _number(value, signed=signed)
    return number if number == MISSING else f"{number} {unit}".rstrip()


def _card(tokens: Sequence[str], values: Sequence[float], told: Sequence[str], scale: Scale) -> str:
    zero = scale.colour(0.0)
    cells = "".join(_cells(tokens, values, told, scale))
    return (
        f'<div style="{_MONO};font-size:.88em;line-height:1.75;{_KEEP};background-color:{_hex(zero)};color:{ink(zero)};'
        f'padding:.55em .8em;border-radius:6px;border:{_LINE};{_PRINT}">{cells}</div>'
    )


def _cells(
    tokens: Sequence[str], values: Sequence[float], told: Sequence[str], scale: Scale, mark: int | None = None
) -> Iterator[str]:
    """Write one cell per token, or per character where several tokens share one."""
    start = 0
    for end in range(1, len(tokens) + 1):
        if tokens[end - 1] or end == len(tokens):
            own = [value for value in values[start:end] if not math.isnan(value)]
            value = max(own, key=abs) if own else math.nan
            marked = mark is not None and start <= mark < end
            yield _cell("".join(tokens[start:end]), value, "\n".join(told[start:end]), scale, marked=marked)
            start = end


def _cell(token: str, value: float, told: str, scale: Scale, *, marked: bool) -> str:
    zero = scale.colour(0.0)
    style = f"border-right:1px solid {'rgba(0,0,0,.13)' if ink(zero) == '#000' else 'rgba(255,255,255,.17)'};"
    if math.isnan(value):
        style = "opacity:.55;"
    elif (colour := scale.colour(value)) != zero:
        style += f"background-color:{_hex(colour)};color:{ink(colour)};"
    if marked:
        style += _FRAME
    return f'<span title="{_attribute(told)}" style="padding:.14em 0;{style}">{_safe(token, marks=True)}</span>'


def _example(one: "Example", scale: Scale) -> str:
    told = [
        f"{token!r}\n{_number(float(value), signed=True)}" for token, value in zip(one.tokens, one.values, strict=True)
    ]
    zero = scale.colour(0.0)
    cells = "".join(_cells(one.tokens, one.values.tolist(), told, scale, one.mark))
    dots = f"<span style='{_SOFT}'>…</span>"
    line = f"{'' if one.begins else dots}{cells}{'' if one.ends else dots}"
    where = f"document {one.document}, position {one.position}"
    return (
        f"<div style='display:flex;flex-wrap:wrap;align-items:baseline;gap:0 .8em;margin:.25em 0;break-inside:avoid'>"
        f"<span title='{where}' style='flex:0 0 4.2em;text-align:right;font-variant-numeric:tabular-nums;font-size:.9em'>"
        f"{_number(one.value, signed=True)}</span>"
        f'<span style="flex:1 1 18em;min-width:0;{_MONO};font-size:.86em;line-height:1.7;{_KEEP};background-color:{_hex(zero)};'
        f'color:{ink(zero)};padding:.2em .6em;border-radius:5px;border:{_LINE};{_PRINT}">{line}</span></div>'
    )


def _panel(name: str, text: str, first: str, base: str) -> str:
    same = len(os.path.commonprefix([text, first]))
    rest = f"<span style='background-color:rgba(224,100,27,.22);border-radius:3px'>{_safe(text[same:])}</span>"
    body = _safe(text[:same]) + (rest if text[same:] else "")
    empty = f"<span style='{_SOFT}'>(nothing)</span>"
    told = f"<span style='font-weight:400'> · as {html.escape(base)}</span>" if base and text == first else ""
    return (
        f"<div style='border:{_LINE};border-radius:6px;padding:.4em .8em .55em;min-width:0'>"
        f"<div style='{_SOFT};font-size:.85em;font-weight:600'>{html.escape(name)}{told}</div>"
        f'<div style="{_MONO};font-size:.88em;line-height:1.5;{_KEEP}">{body if text else empty}</div></div>'
    )


def _legend(scale: Scale, unit: str) -> str:
    """Draw a scale with numbers at its ends."""
    low, high = scale.ends()
    steps = [low + (high - low) * i / 24 for i in range(25)]
    swatches = "".join(
        f"<span style='display:inline-block;width:.3em;height:.75em;background-color:{_hex(scale.colour(s))}'></span>"
        for s in steps
    )
    left, right = _number(low, signed=scale.signed), _number(high, signed=scale.signed)
    if not scale.limit:
        left = right = "0"
    number = "<span style='font-variant-numeric:tabular-nums'>{}</span>"
    return (
        f"<span style='display:inline-block;white-space:nowrap;font-size:.85em;margin-right:1.1em'>{number.format(left)} "
        f"<span style='display:inline-block;border:{_LINE};line-height:0;vertical-align:-.08em;{_PRINT}'>{swatches}</span> "
        f"{number.format(right)} {html.escape(unit)}</span>"
    )


def _number(value: float, *, signed: bool) -> str:
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == round(value) and not signed:
        return f"{value:,.0f}"
    digits = max(0, min(6, 2 - math.floor(math.log10(abs(value))))) if abs(value) > 1e-9 else 0
    text = f"{value:+,.{digits}f}" if signed and value else f"{value:,.{digits}f}"
    return text.replace("-", "−")


# --- characters --------------------------------------------------------------------------------------------------------


def _attribute(text: str) -> str:
    return html.escape(text).replace("\n", "&#10;")


def _faint(text: str) -> str:
    return f"<span style='opacity:.5;user-select:none'>{text}</span>"


def _safe(text: str, *, marks: bool = False) -> str:
    """Escape a text for a place that keeps white space.

    With `marks`, ends of lines and tabs become visible beside themselves. What would be invisible otherwise, or would turn what
    follows around, is shown by its number. Line ends are written as references: a blank line would end HTML inside Markdown.
    """
    out = []
    for character in text:
        if character in _BREAKS:
            sign, kept = _BREAKS[character]
            out.append((_faint(sign) if marks else "") + kept)
        elif _is_hidden(character):
            out.append(_faint(f"[U+{ord(character):04X}]"))
        else:
            out.append(html.escape(character))
    return "".join(out)


def _is_hidden(character: str) -> bool:
    """Say whether a character controls, turns text around, or is no character; joiners, which emoji need, are none of it."""
    kind = unicodedata.category(character)
    turns = kind == "Cf" and unicodedata.bidirectional(character) not in ("BN", "ON")
    return turns or kind in ("Cc", "Cs", "Zl", "Zp") or character in "\u200b\ufeff"
