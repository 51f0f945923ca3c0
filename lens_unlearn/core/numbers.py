"""Numbers that can be asked for: one table of ranges by name, so that a budget, a seed or a count is refused alike everywhere.

Knows what a number is called and how large it may be; knows nothing of what is done with it.
"""

import math
from dataclasses import dataclass
from typing import Any

from lens_unlearn.core.errors import LensUnlearnError

__all__ = [
    "COUNT",
    "NOT_NEGATIVE",
    "NUMBER",
    "NUMBERS",
    "POSITIVE",
    "SEED",
    "SHARE",
    "SINKS",
    "STEPS",
    "STRENGTH",
    "THRESHOLD",
    "Range",
    "check_numbers",
]


@dataclass(frozen=True)
class Range:
    """Which numbers can be asked for."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    above: bool = False
    """Whether `low` itself is too small."""
    below: bool = False
    """Whether `high` itself is too large."""
    what: str = "is no number that can be meant here"
    """What any other is or is not, for the message."""

    def check(self, value: Any, name: str, error: type[LensUnlearnError] = LensUnlearnError) -> float:
        """Return a number of this range, a whole one as an int.

        Raises:
            LensUnlearnError: If it is none; text, truth values, NaN and infinity are none. Or the `error` that is given.
        """
        if isinstance(value, str | bytes | bool) or str(getattr(value, "dtype", "")).endswith("bool"):
            number = math.nan  # float() would read a text, and take True for 1
        else:
            try:
                number = float(value)
            except (TypeError, ValueError, OverflowError, RuntimeError):
                number = math.nan
        inside = self.low < number if self.above else self.low <= number
        inside = inside and (number < self.high if self.below else number <= self.high)
        if not (inside and math.isfinite(number)) or (self.whole and number != round(number)):
            text = repr(value)
            raise error(f"{name}={text if len(text) <= 60 else text[:57] + '...'} {self.what}: give {self}")
        return int(value) if self.whole else number

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        low, high = (f"{end:g}" if end != 2**63 else "2^63" for end in (self.low, self.high))
        if math.isinf(self.low):
            return f"{kind} that is finite" if math.isinf(self.high) else f"{kind} up to {high}"
        if math.isinf(self.high):
            return f"{kind} above {low}" if self.above else f"{kind}, at least {low}"
        if self.above:
            return f"{kind} above {low} and {'below' if self.below else 'at most'} {high}"
        return f"{kind} from {low} to {'below ' if self.below else ''}{high}"


SHARE = Range(0, 1, what="is not a share")
COUNT = Range(1, whole=True, what="is no number of anything")
STRENGTH = Range(0, 1, above=True, what="is not a strength")
STEPS = Range(1, whole=True, what="is no number of steps")
THRESHOLD = Range(0, 1, above=True, below=True, what="is not a share of a layer's maximum")
NUMBER = Range()
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above=True)
SEED = Range(0, 2**63, whole=True, below=True, what="is no seed")
SINKS = Range(1, above=True, what="times the usual norm makes sinks of usual positions")
_CONTROLS = Range(1, whole=True, what="is no number of random controls, which take at least one seed")

NUMBERS = {
    "tokens": Range(2, whole=True, what="is no number of tokens"),
    "test_tokens": Range(2, whole=True, what="is no number of tokens"),
    "shuffle": Range(2, whole=True, what="is no number of documents to draw from"),
    "window": Range(2, whole=True, what="is no number of tokens"),
    "retain_drop": Range(0, 1, what="is not a share of the accuracy"),
    "confidence": Range(0.5, 1, below=True, what="is no confidence of a bound"),
    "seed": SEED,
    "seeds": _CONTROLS,
    "controls": _CONTROLS,
    "batch_size": Range(1, whole=True, what="is no number of rows"),
    "answers": Range(0, whole=True, what="is no number of questions"),
    "memorization": Range(0, whole=True, what="is no number of questions"),
    "task_limit": Range(1, whole=True, what="is no number of documents"),
    "max_new_tokens": Range(1, whole=True, what="is no number of tokens"),
    "temperature": Range(0, what="is no temperature"),
    "evaluations": COUNT,
    "skip_sinks": SINKS,
}
"""The numbers of plans and commands, by the name under which they are given."""


def check_numbers(**given: Any) -> None:
    """Refuse a number that cannot be meant; None stands for the default.

    Raises:
        LensUnlearnError: If one is no number, or out of its range; the message names what was given.
    """
    for name, value in given.items():
        if value is not None:
            NUMBERS[name].check(value, name)
