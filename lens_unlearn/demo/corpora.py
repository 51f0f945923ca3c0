"""The demo's corpora: texts for five skills, generated here or read from the Python installation.

``python`` and ``english`` are read at run time from the standard library of the running interpreter,
so their content differs a little between Python versions; which module belongs to which split does
not. Everything else is generated, and equal everywhere. See the README next to this file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial

from lens_unlearn.demo import _arithmetic, _english, _esperanto, _people, _python

NAMES = (
    "python",
    "english",
    "arithmetic",
    "esperanto",
    "facts",
    "facts_forget",
    "facts_retain",
    "facts_holdout",
)
"""The corpora that `corpus` knows."""

SPLITS = ("train", "dev", "test")
"""The splits of every corpus."""

_READERS: dict[str, Callable[[str], list[dict[str, object]]]] = {
    "python": _python.documents,
    "english": _english.documents,
    "arithmetic": _arithmetic.problems,
    "esperanto": _esperanto.documents,
    **{name: partial(_people.facts, name) for name in NAMES if name.startswith("facts")},
}


def corpus(name: str, split: str) -> list[dict[str, object]]:
    """Return the documents of one corpus.

    Args:
        name: One of `lens_unlearn.demo.NAMES`:

            - ``python``: library code without docstrings and comments; a module is in one split.
            - ``english``: documentation reduced to its sentences; a module or topic is in one split.
            - ``arithmetic``: one problem a record, ``37+48=85``; a pair of operands is in one split.
            - ``esperanto``: generated; a sentence is in one split.
            - ``facts``: five questions on each of 80 invented persons. ``facts_forget`` are 8 of
              them, ``facts_retain`` the other 72, ``facts_holdout`` 16 more that no model has seen.
        split: ``train``, ``dev`` (to fit and tune on) or ``test``. They are disjoint, but for the
            facts: a fact cannot be generalized to, it is memorized or it is not. There ``train`` is all
            of them, ``dev`` and ``test`` are two halves of every person's questions, and all are
            asked in the wording that was trained.

    Returns:
        Records with ``text`` and ``source``. Arithmetic and facts also have ``question`` and
        ``answer``; facts have ``person``, ``attribute``, ``value``, ``paraphrased_question``,
        ``paraphrased_answer``, and ``perturbed_answer``, a list of wrong answers of the same form.

    Raises:
        ValueError: If there is no such corpus or split.
    """
    if name not in _READERS:
        raise ValueError(f"There is no demo corpus {name!r}; choose one of {', '.join(NAMES)}.")
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    return copy.deepcopy(_written(name, split))


@cache  # made up anew, Esperanto alone takes a second
def _written(name: str, split: str) -> list[dict[str, object]]:
    return _READERS[name](split)
