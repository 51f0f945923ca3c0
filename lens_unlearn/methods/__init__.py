"""How a skill is found: one paper a file, each a function from texts to an intervention, and the table of them, `METHODS`.

Knows statistics, interventions and evaluation; knows nothing of folders, pages or the command line. Whoever needs a method by
its name, or what is known of a function, asks here: nothing else lists methods.
"""

from collections.abc import Callable

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.methods import (
    concept_erasure,
    direction_removal,
    gated_pruning,
    key_space_detection,
    lape,
    linear_probe,
    neuron_adjust,
    rmu,
    selective_pruning,
    simu,
    steering,
)
from lens_unlearn.methods.method import Method

__all__ = ["METHODS", "by_name", "names", "record_of"]

METHODS: tuple[Method, ...] = (
    selective_pruning.METHOD,
    selective_pruning.ATTENTION,
    neuron_adjust.METHOD,
    key_space_detection.METHOD,
    gated_pruning.METHOD,
    simu.METHOD,
    lape.METHOD,
    direction_removal.METHOD,
    concept_erasure.METHOD,
    steering.METHOD,
    linear_probe.METHOD,
    rmu.METHOD,
)
"""Every method, in the order of help texts and reports. A new one is a file of its own, and a line here."""


def names() -> tuple[str, ...]:
    """Return the names of all methods."""
    return tuple(method.name for method in METHODS)


def by_name(name: str) -> Method:
    """Return a method by its name.

    Raises:
        LensUnlearnError: If there is none of that name; the message lists all.
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise LensUnlearnError(f"there is no method {name!r}: choose from {', '.join(names())}")


def record_of(method: Method | str | Callable[..., Intervention]) -> Method:
    """Return what is known of a method that is given by its name, its function, or as a record.

    A function that is in no record is taken as one that is fitted to corpora, with an option `fraction`.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        return by_name(method)
    for known in METHODS:
        if known.function == method:
            return known
    return Method(name=getattr(method, "__name__", type(method).__name__).replace("_", "-"), function=method)
