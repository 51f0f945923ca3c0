"""Budgets that hold on fresh documents: a bound on what is lost there, and the strongest of a grid of strengths that keep to it.

Knows what was lost on tuning documents, with bootstrap draws; knows nothing of models, methods or texts.
"""

# Why a bound, and which: the drop on tuning documents is noisy, and a search for the strongest edit within the budget favours
# strengths whose noise is downward, so at the strength that was found, fresh documents lose more. They are noisy too: where the
# true drop is just within the budget, every second set of fresh documents breaks it. So the bound is one for fresh documents, as
# many as were tuned on: a draw of the true drop, plus a draw of their own noise.
#
# Why searching does not spoil it: strengths are tested in an order that was fixed before, from weak to strong, and the first that
# fails ends it (fixed-sequence testing; for the control of risks, "Learn then Test", Angelopoulos et al. 2021). Too strong an edit
# is chosen only if the first strength that breaks the budget passes its test, and this one test errs with probability
# 1 - confidence, however many precede or follow it.
# Where the bound rises with strength on the tuning documents, the first failure can be found by galloping and bisection, which
# come to the same strength with fewer evaluations; every strength that passes is then weaker than all that were seen to fail.
#
# Where it does not quite rise, benchmarks/budgets.py shows how often the budget is broken.
#
# Why several retain corpora need no correction: a strength passes if it passes on each. If it breaks the budget on one of them, it
# has to pass the test on that one by mistake (intersection-union test).

import math
from collections.abc import Callable, Sequence

import numpy as np

from lens_unlearn.core.intervals import upper
from lens_unlearn.core.numbers import NUMBERS
from lens_unlearn.evaluation.report import Measure

__all__ = ["CONFIDENCE", "check_confidence", "fewest_at_once", "strengths_from", "upper_bound", "within"]

CONFIDENCE = 0.9
_POINTS = 20
_FIRST = 4  # how many strengths further galloping goes at first


def check_confidence(confidence: float) -> float:
    """Return a confidence that a bound can have.

    Raises:
        LensUnlearnError: If it is none.
    """
    return NUMBERS["confidence"].check(confidence, "confidence")


def strengths_from(weakest: float) -> tuple[float, ...]:
    """Return the strengths that are tested, weak to strong: 20 from the weakest to 1, in equal ratios, to two digits."""
    return tuple(dict.fromkeys(float(f"{strength:.2g}") for strength in np.geomspace(weakest, 1, _POINTS)))


def upper_bound(drop: Measure, units: int, confidence: float = CONFIDENCE, *, at_once: bool = False) -> float:
    """Return what as many fresh documents lose at most, with a confidence.

    Args:
        drop: What was lost on tuning documents, paired with the unedited model, as `Report.drop` returns it.
        units: Number of units that were resampled.
        confidence: Of the bound.
        at_once: Whether a document can lose everything at once, as where a method abstains, so that a few documents that lose
            nothing say little of others. Then a further document that lost everything is resampled with them: for shares of all or
            nothing that is the exact bound of Clopper and Pearson, for losses between it is Gaffke's.
    """
    # A resample in which the unedited model gets nothing right says nothing, so nothing is credited: all is lost.
    draws = drop.draws if drop.seen is None else drop.seen
    draws = np.where(np.isfinite(draws), draws, 1.0)
    noise = draws - drop.value
    if at_once:
        # The weight of one exponential variable among n + 1, which is independent of those of the others to each other.
        further = np.random.default_rng(0).beta(1, units, size=draws.size)
        draws = draws + further * (1 - draws)
    return float(np.minimum(upper(draws + np.roll(noise, 1), confidence), 1))


def fewest_at_once(budget: float, confidence: float) -> float:
    """Return of how many units none may have lost anything, for the bound with `at_once` to be within a budget."""
    return math.inf if budget <= 0 else 1 if budget >= 1 else math.ceil(math.log(1 - confidence) / math.log(1 - budget))


def within(strengths: Sequence[float], bound: Callable[[float], float], budget: float, evaluations: int) -> list[float]:
    """Return the strengths that were found to keep within a budget, weak to strong; the strongest last.

    Gallops upward from the weak end, then bisects between the last strength that passed and the first that failed.

    Args:
        strengths: Weak to strong.
        bound: Of the loss at a strength; evaluated once for each strength that is tried.
        budget: What it may be at most.
        evaluations: How many strengths to try at most.
    """
    passed: list[float] = []
    low, high, step = -1, len(strengths), _FIRST
    for _ in range(evaluations):
        if high - low <= 1:
            break
        failed = high < len(strengths)
        middle = (low + high) // 2 if failed else min(low + step, len(strengths) - 1)
        if bound(strengths[middle]) <= budget:
            passed.append(strengths[middle])
            low, step = middle, 2 * step
        else:
            high = middle
    return passed
