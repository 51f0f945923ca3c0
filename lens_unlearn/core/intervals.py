"""Confidence intervals and their ingredients: resampling of units, the area under a ROC curve, Wilson's interval of a share.

Knows numbers; knows nothing of what was measured. Everything here that is random is a function of a generator or a seed.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["LEVEL", "auc", "below", "interval", "pair_sums", "resamples", "wilson"]

LEVEL = 0.95
_BLOCK = 1024  # rows of a table of pairs that are held at a time


def interval(draws: np.ndarray) -> tuple[float, float]:
    """Return the central 95 % of bootstrap draws; NaN where there are none, as from a single document."""
    if draws.size == 0 or np.isnan(draws).any():
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def resamples(units: int, draws: int, generator: np.random.Generator) -> Float[np.ndarray, "draws units"]:
    """Return how often each unit occurs in each resample: as many draws as units, with replacement."""
    return generator.multinomial(units, np.full(units, 1 / units), size=draws).astype(np.float64)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Return the Wilson 95 % interval of a share, as fractions."""
    from scipy.stats import binomtest

    bounds = binomtest(hits, n).proportion_ci(LEVEL, method="wilson")
    return float(bounds.low), float(bounds.high)


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
        of_inside: How often each of the first is in each resample; None for no resamples.
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
    pairs = len(inside) * len(outside)
    return total / pairs, drawn / pairs
