"""The Jinja2 templates of this room, and the filters they use.

Knows how a value becomes HTML: everything a template is given is escaped, unless it is `Markup`, and what would be invisible in
it, or reverse what follows, is shown by its code point. Knows nothing of reports.
"""

import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from lens_unlearn.core.text import visible
from lens_unlearn.evaluation.metrics import words

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["macro", "name", "render"]


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined  # only a page needs it, so only a page waits for it

    made = Environment(
        loader=PackageLoader("lens_unlearn.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            visible(value) if type(value) is str else value
        ),  # before it is escaped; `Markup` is no `str`
    )
    made.policies["json.dumps_kwargs"] = {}  # Jinja2 would sort the keys of a figure
    made.filters |= {"line": _line, "name": name, "series": _series, "words": words}
    return made


def render(template: str, **values: Any) -> Markup:
    """Fill in a template of `templates/`; the result can stand in another one as it is."""
    return Markup(_environment().get_template(template).render(values).strip())


def macro(template: str, name: str, *values: Any) -> Markup:
    """Fill in one macro of a template."""
    return getattr(_environment().get_template(template).module, name)(*values)


def _line(written: str) -> Markup:
    """Put a sentence that a template breaks over several lines onto one; it is HTML by now, escaped where it has to be."""
    return Markup(re.sub(r"\s*\n\s*", " ", written.strip()))


def name(text: object, length: int = 80) -> str:
    """Cut a name from data where it would fill the page."""
    whole = str(text)
    return whole if len(whole) <= length else f"{whole[: length - 1]}…"


def _series(parts: Iterable[object], most: int | None = None) -> Markup:
    """List in a sentence, "a, b and c"; what is beyond `most` is counted."""
    listed = list(parts)
    shown = [escape(visible(str(part))) if not isinstance(part, Markup) else part for part in listed[:most]]
    if most is not None and len(listed) > most:
        shown.append(escape(f"{len(listed) - most} more"))
    if not shown:
        return Markup("nothing")
    return Markup("{} and {}").format(Markup(", ").join(shown[:-1]), shown[-1]) if shown[1:] else shown[0]
