"""Confidence intervals and their ingredients: weights of units, Student's widening, the area under a ROC curve, Wilson's interval.

Knows numbers and keys of units; knows nothing of what was measured. Everything here that is random is a function of a seed.
"""

# Why the weights are exponential, and drawn from a unit's key:
#
# - One document may stand in several corpora, runs and conditions (the test texts of one skill are among the retain texts of the
#   others). A weight that depends on (seed, key, draw) alone is the same wherever the document stands, so differences, means over
#   runs and sums over corpora are resampled jointly, while documents of different corpora are drawn independently.
# - Weights of an exponential distribution are the Bayesian bootstrap (Rubin, "The Bayesian bootstrap", 1981). Unlike counts, they
#   are never all 0, so the ratio of two weighted sums is defined in every draw, also for few units.
#
# Percentiles of a bootstrap of few units are too narrow, by about the ratio of a normal to a Student quantile and by
# sqrt((n - 1) / n) (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section 4.3). Units weigh as many tokens as
# they have, so n is Kish's effective number, (sum m)^2 / sum m^2. The degrees of freedom are Satterthwaite's, (sum v)^2 / sum v^2,
# where the variance v of a unit's sum is between m (tokens that have nothing in common) and m^2 (tokens all alike): m^1.5 here.

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_unlearn.core.counter_rng import key_of, mix, uniform

__all__ = [
    "FEWEST",
    "LEVEL",
    "after_choice",
    "auc",
    "below",
    "effective",
    "interval",
    "pair_sums",
    "simultaneous",
    "upper",
    "weights_of",
    "widening",
    "wilson",
    "wilson_of_units",
]

LEVEL = 0.95
FEWEST = 10
"""The fewest units of which an interval is given: of fewer, no method keeps its word."""
_BEYOND = 0.005  # the share of the error rate that the simultaneous interval of `after_choice` takes
_WITHIN = 0.8  # the share of its draws by which `simultaneous` scales each value
_BLOCK = 1024  # rows of a table of pairs that are held at a time


def interval(draws: np.ndarray) -> tuple[float, float]:
    """Return the central 95 % of bootstrap draws; NaN where there are none, as from a single document."""
    if draws.size == 0 or np.isnan(draws).any():
        return float("nan"), float("nan")
    return _quantile(draws, (1 - LEVEL) / 2, "lower"), _quantile(draws, (1 + LEVEL) / 2, "higher")


def _quantile(draws: np.ndarray, share: float, outwards: Literal["lower", "higher"]) -> float:
    """Return a quantile of draws, of which some may be infinite, as where a share of nothing is lost."""
    # Between two infinite draws there is nothing to interpolate.
    return float(np.quantile(draws, share, method="linear" if np.isfinite(draws).all() else outwards))


def simultaneous(
    values: Float[np.ndarray, "values"], draws: Float[np.ndarray, "values draws"]
) -> tuple[Float[np.ndarray, "values"], Float[np.ndarray, "values"]]:
    """Return intervals of several values that hold all of them at once with 95 %: the bootstrap's max-t band.

    Each interval is its value, and on either side the distance within which 80 % of its draws lie, times one factor, common to
    all: the least under which 95 % of the draws lie inside everywhere. That distance is known from few draws better than one far
    out, and better than a standard deviation where few seeds give long tails. It is that of one half of the draws and the factor is
    that of the other, since it would be too small for the very draws that it was fitted to.

    Args:
        values: The estimates.
        draws: Of every value, paired: draw by draw the same resample. What the values share makes the intervals narrower than
            Bonferroni's; where they share nothing they are about as wide.

    Returns:
        The lower and the upper ends; NaN for a value of which a draw is not finite, and the others do not depend on it.
    """
    low, high = np.full(len(draws), np.nan), np.full(len(draws), np.nan)
    half = draws.shape[1] // 2
    known = np.isfinite(draws).all(1) & np.isfinite(values) if half else np.zeros(len(draws), dtype=bool)
    if not known.any():
        return low, high
    order = np.random.default_rng(0).permutation(draws.shape[1])  # draws may lie in an order of their own
    away = np.abs(draws[known] - values[known, None])[:, order]
    reach = np.quantile(away[:, :half], _WITHIN, axis=1, keepdims=True)
    reach = np.where(
        reach > 0, reach, away.max(1, keepdims=True)
    )  # of draws that are mostly the same, the farthest says it
    distance = np.divide(away, reach, out=np.zeros_like(away), where=away > 0).max(0)[half:]
    factor = np.quantile(distance, min(1.0, LEVEL * (1 + 1 / len(distance))), method="higher")
    low[known], high[known] = values[known] - factor * reach[:, 0], values[known] + factor * reach[:, 0]
    return low, high


def upper(draws: np.ndarray, confidence: float) -> float:
    """Return the bound below which a share of bootstrap draws lies; NaN where there are none."""
    if draws.size == 0 or np.isnan(draws).any():
        return float("nan")
    return _quantile(draws, confidence, "higher")


def weights_of(units: Sequence[str], draws: int, seed: int) -> Float[np.ndarray, "draws units"]:
    """Return the weight of each unit in each draw: exponential of mean 1, and a function of seed, draw and the unit's key alone."""
    keys = torch.tensor([key_of("bootstrap", seed, unit) for unit in units], dtype=torch.int64)
    table = uniform(mix(keys)[None] + torch.arange(draws)[:, None])
    return -np.log1p(-table.double().numpy())


def effective(sizes: Float[np.ndarray, "units"]) -> float:
    """Return Kish's effective number of units, (sum m)^2 / sum m^2; 0 of none."""
    return float(sizes.sum()) ** 2 / max(float((sizes**2).sum()), 1e-300)


def widening(sizes: Float[np.ndarray, "units"]) -> float:
    """Return the factor by which draws are moved away from their value, for the number of units is small.

    With n = (sum m)^2 / sum m^2 the effective number of N units and t Student's quantile of (sum m^1.5)^2 / sum m^3 (N - 1) / N
    degrees of freedom: t / z sqrt((n + 1) / (n - 1)), since the variance of exponential weights is too small by (n - 1) / (n + 1).
    """
    from scipy.stats import norm, t

    total = float(sizes.sum())
    if total <= 0:
        return 1.0
    units, alike = int((sizes > 0).sum()), max(effective(sizes), 2.0)
    freedom = max(float((sizes**1.5).sum()) ** 2 / float((sizes**3).sum()) * (units - 1) / units, 1.0)
    tail = (1 + LEVEL) / 2
    return float(t.ppf(tail, freedom) / norm.ppf(tail)) * ((alike + 1) / (alike - 1)) ** 0.5


def after_choice(
    chosen: int,
    by: Float[np.ndarray, "options"],
    by_draws: Float[np.ndarray, "options draws"],
    values: Float[np.ndarray, "options"],
    draws: Float[np.ndarray, "options draws"],
) -> tuple[float, float, float]:
    """Return estimate and 95 % interval of what was measured at an option that was chosen for having the largest value.

    The largest of several noisy values is too large on average, and its own interval misses the truth too often. Under normal
    errors with the covariance of the draws, the value y at the chosen option is normal around the truth, truncated to where this
    option wins, given the part of the other values that is independent of y. The estimate is median-unbiased, the interval is the
    hybrid one of Andrews, Kitagawa and McCloskey ("Inference on Winners", Quarterly Journal of Economics 139, 2024): conditional
    on the choice, and never outside a simultaneous interval of level 99.5 %.

    Args:
        chosen: The option with the largest value of `by`.
        by: What was chosen by.
        by_draws: Its bootstrap draws, paired with `draws`.
        values: What is measured, which may be the same.
        draws: Its bootstrap draws.
    """
    y = float(values[chosen])
    if len(by) == 1 or not np.isfinite(by_draws).all() or not np.isfinite(draws).all() or draws.shape[1] < 2:
        return (y, *interval(draws[chosen]))
    errors, by_errors = (d - d.mean(1, keepdims=True) for d in (draws, by_draws))
    sigma = float(errors[chosen].std())
    if sigma == 0:
        return (y, *interval(draws[chosen]))
    scales = np.where((scale := errors.std(1, keepdims=True)) > 0, scale, np.inf)
    reach = float(np.quantile(np.abs(errors / scales).max(0), 1 - _BEYOND)) * sigma
    # How far the lead over each other option moves per unit of y, and so up to which y this option still leads.
    lead, slope = by[chosen] - by, (by_errors[chosen] - by_errors) @ errors[chosen] / errors.shape[1] / sigma**2
    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = y - lead / slope
    low = float(max(bounds[slope > 0], default=-np.inf))
    high = float(min(bounds[slope < 0], default=np.inf))
    level = (LEVEL - _BEYOND) / (1 - _BEYOND)
    ends = (_truth_at(share, y, sigma, low, high, reach) for share in (0.5, (1 + level) / 2, (1 - level) / 2))
    estimate, below_it, above_it = ends
    return estimate, below_it, above_it


def _truth_at(share: float, y: float, sigma: float, low: float, high: float, reach: float) -> float:
    """Return the truth under which a truncated normal variable is at most y with a given probability."""
    start, end = y - reach, y + reach
    for _ in range(60):  # the probability falls as the truth rises
        truth = (start + end) / 2
        least, most = (max(low, truth - reach) - truth) / sigma, (min(high, truth + reach) - truth) / sigma
        place = (y - truth) / sigma
        sign = -1.0 if least > 0 else 1.0  # both tails alike: far out on the right, differences would be 0
        whole = abs(_normal(sign * most) - _normal(sign * least))
        part = abs(_normal(sign * place) - _normal(sign * least))
        if whole > 0 and part / whole > share:
            start = truth
        else:
            end = truth
    return (start + end) / 2


def _normal(z: float) -> float:
    """Return the probability that a normal variable is at most z."""
    return math.erfc(-z / math.sqrt(2)) / 2


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Return the Wilson 95 % interval of a share, as fractions."""
    from scipy.stats import binomtest

    bounds = binomtest(hits, n).proportion_ci(LEVEL, method="wilson")
    return float(bounds.low), float(bounds.high)


def wilson_of_units(hits: Bool[Tensor, "queries"], units: Int[Tensor, "queries"]) -> tuple[float, float]:
    """Return the Wilson 95 % interval of a share of queries, several of which may come from one unit.

    Where every unit has one query it is Wilson's. Elsewhere n is the effective number of queries, n / design effect, as Dean and
    Pagano (2015) take it, times (z / t)^2 for few units (Korn and Graubard, 1998). Where all queries agree, and so say nothing
    of how alike those of one unit are, it is the number of units. Of fewer than ten units nothing is known: 0 to 1.

    Args:
        hits: Which queries count.
        units: The unit of each, as any number.
    """
    from scipy.stats import norm, t

    n, share = len(hits), float(hits.double().mean())
    _, place = units.unique(return_inverse=True)
    count = int(place.max()) + 1
    if count == n:
        return wilson(int(hits.sum()), n)
    if count < FEWEST:
        return 0.0, 1.0
    effective = float(count)
    if 0 < share < 1:
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, place, hits.double() - share)
        spread = float(sums.square().sum()) * count / (count - 1)
        effective = n * n * n / (n - 1) * share * (1 - share) / spread if spread > 0 else float(n)
    z = float(norm.ppf((1 + LEVEL) / 2))
    effective *= (z / float(t.ppf((1 + LEVEL) / 2, count - 1))) ** 2
    middle = (share + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * (share * (1 - share) / effective + (z / (2 * effective)) ** 2) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def below(inside: Float[Tensor, "n"], outside: Float[Tensor, "m"]) -> Float[Tensor, "n m"]:
    """Return 1 for every pair in which the first score is below the second, and 1/2 where they tie."""
    return ((outside[None].double() - inside[:, None].double()).sign() + 1) / 2


def pair_sums(
    table: Float[Tensor, "n m"], inside: Float[Tensor, "draws n"], outside: Float[Tensor, "draws m"]
) -> Float[Tensor, "draws"]:
    """Return the sum of a table of pairs in each resample of its rows and columns."""
    return ((inside @ table) * outside).sum(1)


def auc(
    inside: Float[Tensor, "n"],
    outside: Float[Tensor, "m"],
    of_inside: Float[Tensor, "draws n"] | None = None,
    of_outside: Float[Tensor, "draws m"] | None = None,
) -> tuple[float, Float[Tensor, "draws"]]:
    """Return the area under the ROC curve, and in each resample: the probability that the first score is below the second.

    Ties count half, as in `sklearn.metrics.roc_auc_score`. NaN among the scores makes it NaN.

    Args:
        inside: Scores of what is to be detected, which should be low.
        outside: Scores of the rest.
        of_inside: The weight of each of the first in each resample; None for no resamples.
        of_outside: Likewise for the others.
    """
    draws = 0 if of_inside is None else len(of_inside)
    drawn = torch.zeros(draws, dtype=torch.float64)
    if bool(inside.isnan().any()) or bool(outside.isnan().any()):
        return float("nan"), torch.full_like(drawn, float("nan"))
    total = 0.0  # of ones and halves: exact
    for start in range(0, len(inside), _BLOCK):
        table = below(inside[start : start + _BLOCK], outside)
        total += float(table.sum())
        if of_inside is not None and of_outside is not None:
            drawn += pair_sums(table, of_inside[:, start : start + _BLOCK], of_outside)
    if of_inside is not None and of_outside is not None:
        drawn = drawn / (of_inside.sum(1) * of_outside.sum(1))
    return total / (len(inside) * len(outside)), drawn
