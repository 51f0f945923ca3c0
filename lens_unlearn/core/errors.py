"""The errors that users can meet; every message says in one sentence what is wrong, where, and what to do.

Knows no other module of the package.
"""

__all__ = [
    "ActivationError",
    "ArtefactError",
    "BudgetError",
    "CorpusError",
    "EmptyStatisticError",
    "LensUnlearnError",
    "ModelError",
    "ProcessError",
    "SelectionError",
    "SiteError",
]


class LensUnlearnError(ValueError):
    """Base of every error that `lens_unlearn` raises about what it was given."""

    kept: str | None = None
    """Of a run: the folder that holds what was finished before; the same command with --resume goes on from there."""


class SiteError(LensUnlearnError):
    """A hook point does not exist, never fires, or has no neuron axis."""


class ModelError(LensUnlearnError):
    """A model cannot be loaded, or is in a state in which its numbers would be wrong."""


class CorpusError(LensUnlearnError):
    """A text source is missing, empty, malformed, or belongs to another tokenizer."""


class EmptyStatisticError(LensUnlearnError):
    """A statistic was read before it saw any counted token."""


class ActivationError(LensUnlearnError):
    """An activation is NaN or infinite; the message names the neuron."""


class SelectionError(LensUnlearnError):
    """A fraction, map or selection that cannot stand for a set of neurons."""


class ArtefactError(LensUnlearnError):
    """A file is truncated, altered, of another kind, or made with another model."""


class BudgetError(LensUnlearnError):
    """No strength of a method stays within the budget it was to be tuned to."""


class ProcessError(LensUnlearnError):
    """Of several processes on one job, another one has ended, or could not be reached."""
