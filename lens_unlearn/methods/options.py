"""The options of a method as its function declares and documents them: name, type, default, meaning.

Knows signatures and docstrings; knows no method by name.
"""

import inspect
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple, get_args, get_origin

from docstring_parser import DocstringStyle, parse

from lens_unlearn.methods.method import Method

__all__ = ["DECIDED_BY_THE_RUN", "Option", "options_of"]

DECIDED_BY_THE_RUN = ("progress", "batch_size", "reference", "held_out", "unseen", "checkpoint")
"""Options of methods that a run decides itself, so that `--set` cannot give them."""


class Option(NamedTuple):
    """One option of a method."""

    name: str
    type: str
    default: Any
    meaning: str

    @property
    def shown(self) -> str:
        """The default as `--set` takes it; `null` for None, which leaves it to the method."""
        if isinstance(self.default, str):
            return self.default
        try:
            return json.dumps(self.default)
        except TypeError:
            return str(self.default)


def options_of(method: Method) -> list[Option]:
    """Return the options of a method that `--set` can give.

    Args:
        method: Its record, as in `lens_unlearn.methods.METHODS`.

    Returns:
        One `Option` each, in the order of the function; what the method's name fixes is its default.
    """
    meanings = _meanings(method.function)
    return [
        Option(
            name,
            _words(method.parameters[name].annotation),
            method.defaults().get(name),
            meanings.get(name, ""),
        )
        for name in method.options
        if name not in DECIDED_BY_THE_RUN
    ]


def _meanings(function: Callable[..., Any]) -> dict[str, str]:
    read = parse(inspect.getdoc(function) or "", DocstringStyle.GOOGLE)
    return {
        one.arg_name: re.sub(r"`+([^`]+)`+", r"\1", " ".join((one.description or "").split())) for one in read.params
    }


def _words(annotation: Any) -> str:
    """Write a type as a reader of the command line takes it: choices by name, no modules."""
    if annotation is inspect.Parameter.empty:
        return "any"
    if annotation is type(None):
        return "null"
    kind, parts = get_origin(annotation), get_args(annotation)
    if str(kind) == "typing.Literal":
        return " | ".join(map(str, parts))
    if kind is not None and parts and not isinstance(kind, type):
        return " | ".join(map(_words, parts))
    if str(kind) == "<class 'types.UnionType'>":
        return " | ".join(map(_words, parts))
    if kind is not None and parts:
        return f"{getattr(kind, '__name__', kind)} of {', '.join(_words(part) for part in parts if part is not ...)}"
    return getattr(annotation, "__name__", str(annotation))
