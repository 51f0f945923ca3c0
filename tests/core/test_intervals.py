"""Intervals, resampling and the area under a curve, against scikit-learn, SciPy and plain loops."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from lens_unlearn.core import intervals
from lens_unlearn.core.intervals import auc, interval, resamples, wilson


def area(a: np.ndarray, b: np.ndarray, *weights: np.ndarray) -> tuple[float, np.ndarray]:
    value, drawn = auc(torch.from_numpy(a), torch.from_numpy(b), *(torch.from_numpy(w) for w in weights))
    return value, drawn.numpy()


def test_areas_and_their_draws_by_hand() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 6, 9) / 2, draw.integers(1, 7, 7) / 2
    counts = [resamples(len(x), 20, draw) for x in (a, b)]
    value, drawn = area(a, b, *counts)
    assert value == pytest.approx(roc_auc_score([0] * 9 + [1] * 7, [*a, *b]))
    for i in range(20):
        x, y = np.repeat(a, counts[0][i].astype(int)), np.repeat(b, counts[1][i].astype(int))
        assert drawn[i] == pytest.approx(roc_auc_score([0] * 9 + [1] * 7, [*x, *y]))
    assert area(np.zeros(3), np.ones(2))[0] == 1
    assert area(np.ones(2), np.zeros(3))[0] == 0
    assert math.isnan(area(np.array([math.nan]), b)[0])


def test_many_scores_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    a, b = draw.normal(0, 1, 50), draw.normal(0.5, 1, 40)
    weights = draw.random((3, 50)), draw.random((3, 40))
    at_once = area(a, b, *weights)
    monkeypatch.setattr(intervals, "_BLOCK", 7)
    parts = area(a, b, *weights)
    assert parts[0] == at_once[0]
    np.testing.assert_allclose(parts[1], at_once[1])


@pytest.mark.parametrize(("hits", "n"), [(0, 9), (9, 9), (3, 40), (200, 201)])
def test_wilson_is_scipys_and_stays_between_0_and_1(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson(hits, n) == (expected.low, expected.high)
    assert 0 <= wilson(hits, n)[0] <= hits / n <= wilson(hits, n)[1] <= 1


def test_a_resample_has_as_many_units_and_depends_on_its_generator_alone() -> None:
    drawn = resamples(11, 300, np.random.default_rng(5))
    assert drawn.shape == (300, 11)
    assert (drawn.sum(1) == 11).all()
    np.testing.assert_array_equal(drawn, resamples(11, 300, np.random.default_rng(5)))
    assert drawn.mean() == 1
    assert drawn.var() == pytest.approx(1 - 1 / 11, rel=0.1), "of a binomial of 11 draws"


def test_an_interval_is_the_central_95_percent_and_nan_where_nothing_was_drawn() -> None:
    assert interval(np.arange(1001.0)) == pytest.approx((25.0, 975.0))
    assert all(map(math.isnan, interval(np.empty(0))))
    assert all(map(math.isnan, interval(np.array([1.0, math.nan]))))
