"""`Report`: a tidy table of what was measured, with bootstrap intervals, and where it came from."""

import numpy as np

__all__ = []

LEVEL = 0.95


def interval(draws: np.ndarray) -> tuple[float, float]:
    """Return the central 95 % of bootstrap draws; NaN where there are none, as from a single document."""
    if draws.size == 0 or np.isnan(draws).any():
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
