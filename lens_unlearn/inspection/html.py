"""The parts of which coloured texts are drawn: colour scales, token cells, legends, numbers, and escaping.

Knows how to write HTML that is safe in notebooks, reports and documentation: everything is escaped, styles are inline, there is no
script, and nothing is fetched. Knows nothing of models, or of what the values mean.

A text stands on a ground of the colour of zero, and every token's ink contrasts with its own colour, so it reads the same in a
light and in a dark notebook; all that stands around it takes the notebook's own ink.
"""

import html
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.core.text import code_point, is_hidden

__all__ = ["Html", "document"]

SIGNED, MAGNITUDE = "RdBu_r", "Viridis"
"""The colour scales of everything that is drawn: about zero, and from zero on."""
MAX_CELLS = 4000
"""Token cells in one drawing. Each has about 300 bytes of style and tooltip, and a notebook stores what it shows."""
STEPS = 100
"""Steps of a colour scale: finer ones cannot be seen, and colours and their ink are computed once each."""
MISSING = "no value"
_BREAKS = {"\n": ("↵", "&#10;"), "\t": ("→", "&#9;")}
"""What is written for the ends of lines and for tabs: a visible mark, and a character reference."""

# 'Segoe UI' is quoted with ', so a style with SANS has to stand in double quotes.
SANS = "font-family:system-ui,-apple-system,'Segoe UI',sans-serif"
MONO = "font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"
PRINT = "-webkit-print-color-adjust:exact;print-color-adjust:exact"
KEEP = "white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4"
SOFT = "opacity:.72"
FRAME = (
    "font-weight:700;position:relative;border-radius:2px;-webkit-box-decoration-break:clone;box-decoration-break:clone;"
    "box-shadow:0 0 0 1.5px #fff,0 0 0 3px #111;"
)
LINE = "1px solid rgba(128,128,128,.35)"


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
        """Reach to the largest finite value, or to the limit."""
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
        """Return the smallest and the largest value that have colours of their own."""
        return (-self.limit if self.signed else 0.0), self.limit


@cache
def _colours(name: str) -> tuple[tuple[int, int, int], ...]:
    from plotly.colors import sample_colorscale, unlabel_rgb

    sampled = sample_colorscale(name, [step / STEPS for step in range(STEPS + 1)])
    return tuple((round(r), round(g), round(b)) for r, g, b in map(unlabel_rgb, sampled))


def hex_colour(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


@cache
def ink(colour: tuple[int, int, int]) -> str:
    """Return black or white, whichever has the higher contrast on a colour: at least 4.5 (WCAG 2)."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#fff"


def token_limit(most: int | None, columns: int) -> int:
    if most is not None and most < 1:
        raise LensUnlearnError(f"most={most} leaves no token to draw: at least 1")
    return most or MAX_CELLS // columns


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


def drawing(title: str, about: str, body: str, notes: Sequence[str]) -> Html:
    heading = f"<div style='font-weight:600;font-size:1.08em'>{html.escape(title)}</div>" if title else ""
    soft = f"<div style='{SOFT};font-size:.88em'>{html.escape(short(about))}</div>" if about else ""
    below = "".join(f"<div style='{SOFT};font-size:.88em;margin-top:.3em'>{html.escape(note)}</div>" for note in notes)
    return Html(f'<div style="{SANS};line-height:1.45;max-width:70em;{PRINT}">{heading}{soft}{body}{below}</div>')


def cut_note(most: int, total: int) -> str:
    return f"The first {most:,} of {total:,} tokens are drawn."


def with_unit(value: float, unit: str, signed: bool) -> str:
    number = number_text(value, signed=signed)
    return number if number == MISSING else f"{number} {unit}".rstrip()


def token_card(tokens: Sequence[str], values: Sequence[float], tooltips: Sequence[str], scale: Scale) -> str:
    zero = scale.colour(0.0)
    cells = "".join(token_cells(tokens, values, tooltips, scale))
    return (
        f'<div style="{MONO};font-size:.88em;line-height:1.75;{KEEP};background-color:{hex_colour(zero)};color:{ink(zero)};'
        f'padding:.55em .8em;border-radius:6px;border:{LINE};{PRINT}">{cells}</div>'
    )


def token_cells(
    tokens: Sequence[str], values: Sequence[float], tooltips: Sequence[str], scale: Scale, mark: int | None = None
) -> Iterator[str]:
    """Write one cell per token, or per character where several tokens share one."""
    # A character may be several tokens, of which all but the last are empty texts: they join that one, with one tooltip line each.
    start = 0
    for end in range(1, len(tokens) + 1):
        if tokens[end - 1] or end == len(tokens):
            known = [value for value in values[start:end] if not math.isnan(value)]
            value = max(known, key=abs) if known else math.nan
            marked = mark is not None and start <= mark < end
            yield _cell("".join(tokens[start:end]), value, "\n".join(tooltips[start:end]), scale, marked=marked)
            start = end


def _cell(token: str, value: float, tooltip: str, scale: Scale, *, marked: bool) -> str:
    # Cells of the colour of zero leave it to the ground, which has that colour: that keeps drawings small.
    zero = scale.colour(0.0)
    style = f"border-right:1px solid {'rgba(0,0,0,.13)' if ink(zero) == '#000' else 'rgba(255,255,255,.17)'};"
    if math.isnan(value):
        style = "opacity:.55;"
    elif (colour := scale.colour(value)) != zero:
        style += f"background-color:{hex_colour(colour)};color:{ink(colour)};"
    if marked:
        style += FRAME
    return (
        f'<span title="{attribute_text(tooltip)}" style="padding:.14em 0;{style}">{safe_text(token, marks=True)}</span>'
    )


def scale_legend(scale: Scale, unit: str) -> str:
    """Draw a scale with numbers at its ends."""
    low, high = scale.ends()
    steps = [low + (high - low) * i / 24 for i in range(25)]
    swatches = "".join(
        f"<span style='display:inline-block;width:.3em;height:.75em;background-color:{hex_colour(scale.colour(s))}'></span>"
        for s in steps
    )
    left, right = number_text(low, signed=scale.signed), number_text(high, signed=scale.signed)
    if not scale.limit:
        left = right = "0"
    number = "<span style='font-variant-numeric:tabular-nums'>{}</span>"
    return (
        f"<span style='display:inline-block;white-space:nowrap;font-size:.85em;margin-right:1.1em'>{number.format(left)} "
        f"<span style='display:inline-block;border:{LINE};line-height:0;vertical-align:-.08em;{PRINT}'>{swatches}</span> "
        f"{number.format(right)} {html.escape(unit)}</span>"
    )


def number_text(value: float, *, signed: bool) -> str:
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == round(value) and not signed:  # a count
        return f"{value:,.0f}"
    # Three significant digits, whatever the unit.
    digits = max(0, min(6, 2 - math.floor(math.log10(abs(value))))) if abs(value) > 1e-9 else 0
    text = f"{value:+,.{digits}f}" if signed and value else f"{value:,.{digits}f}"
    return text.replace("-", "−")


# --- characters --------------------------------------------------------------------------------------------------------


def attribute_text(text: str) -> str:
    return html.escape(text).replace("\n", "&#10;")


def _faint(text: str) -> str:
    return f"<span style='opacity:.5;user-select:none'>{text}</span>"


def safe_text(text: str, *, marks: bool = False) -> str:
    """Escape a text for a place that keeps white space.

    With `marks`, ends of lines and tabs get a visible mark beside them. What would be invisible otherwise, or would reverse the
    text that follows, is shown by its code point.
    """
    # Line ends are written as references: documentation puts this into Markdown, where a blank line ends a block of HTML and what
    # follows would be read as Markdown. Code points are shown since corpora are not to be trusted: an override of the writing
    # direction makes code read differently from what the model saw.
    out = []
    for character in text:
        if character in _BREAKS:
            mark, reference = _BREAKS[character]
            out.append((_faint(mark) if marks else "") + reference)
        elif is_hidden(character):
            out.append(_faint(code_point(character)))
        else:
            out.append(html.escape(character))
    return "".join(out)


def short(text: object) -> str:
    """Leave the folders out of absolute paths: they say nothing to a reader, and too much to strangers."""
    return re.sub(r"(?<![\w:/.])(?:[A-Za-z]:)?[/\\](?:[^/\\\s()]+[/\\])+", "…/", str(text))
