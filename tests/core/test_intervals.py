"""Intervals, resampling and the area under a curve, against scikit-learn, SciPy and plain loops."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, kstest, norm, t
from sklearn.metrics import roc_auc_score

from lens_unlearn.core import intervals
from lens_unlearn.core.intervals import (
    after_choice,
    auc,
    interval,
    simultaneous,
    upper,
    weights_of,
    widening,
    wilson,
    wilson_of_units,
)


def area(a: np.ndarray, b: np.ndarray, *weights: np.ndarray) -> tuple[float, np.ndarray]:
    value, drawn = auc(torch.from_numpy(a), torch.from_numpy(b), *(torch.from_numpy(w) for w in weights))
    return value, drawn.numpy()


def test_areas_and_their_draws_by_hand() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 6, 9) / 2, draw.integers(1, 7, 7) / 2
    counts = [draw.integers(0, 3, (20, len(x))) for x in (a, b)]
    for some in counts:
        some[:, 0] += 1  # none is empty
    value, drawn = area(a, b, *(some.astype(float) for some in counts))
    assert value == pytest.approx(roc_auc_score([0] * 9 + [1] * 7, [*a, *b]))
    for i in range(20):
        x, y = np.repeat(a, counts[0][i]), np.repeat(b, counts[1][i])
        assert drawn[i] == pytest.approx(roc_auc_score([0] * len(x) + [1] * len(y), [*x, *y]))
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


def test_wilson_of_units_is_wilsons_where_each_has_one_query_and_by_the_effective_number_elsewhere() -> None:
    draw = np.random.default_rng(0)
    alone = torch.from_numpy(draw.random(40) < 0.3)
    assert wilson_of_units(alone, torch.arange(40) * 7) == wilson(int(alone.sum()), 40)
    units = np.repeat(np.arange(25), draw.integers(1, 9, 25))
    hits = draw.random(len(units)) < draw.beta(1, 2, 25)[units]
    low, high = wilson_of_units(torch.from_numpy(hits), torch.from_numpy(units))
    # The Wilson interval is the set of shares that a score test does not reject, with the variance of a mean of clusters.
    n, share = len(units), hits.mean()
    sums = np.array([(hits[units == u] - share).sum() for u in range(25)])
    effective = share * (1 - share) / (25 / 24 * (sums**2).sum() / n**2 * (n - 1) / n)
    effective *= (norm.ppf(0.975) / t.ppf(0.975, 24)) ** 2
    for bound in (low, high):
        assert abs(share - bound) / math.sqrt(bound * (1 - bound) / effective) == pytest.approx(norm.ppf(0.975))
    assert low < wilson(int(hits.sum()), n)[0] < wilson(int(hits.sum()), n)[1] < high


def test_wilson_of_units_that_all_agree_or_are_few() -> None:
    units = torch.arange(60) // 3
    shrunk = round(20 * (norm.ppf(0.975) / t.ppf(0.975, 19)) ** 2, 3)
    low, high = wilson_of_units(torch.ones(60, dtype=torch.bool), units)
    assert (low, high) == (pytest.approx(1 / (1 + norm.ppf(0.975) ** 2 / shrunk), abs=1e-4), pytest.approx(1))
    assert wilson_of_units(torch.ones(60, dtype=torch.bool), torch.arange(60) // 7) == (0, 1), "nine units"
    one_each = torch.tensor([True, False] * 15)  # every unit has one hit: they differ less than chance lets them
    assert wilson_of_units(one_each, torch.arange(30) // 2) == pytest.approx((0.32, 0.68), abs=0.02)


def test_weights_are_exponential_and_depend_on_seed_and_key_alone() -> None:
    drawn = weights_of([f"document {i}" for i in range(300)], 100, 5)
    assert drawn.shape == (100, 300)
    assert kstest(drawn.ravel(), "expon").pvalue > 1e-3
    assert abs(np.corrcoef(drawn.T) - np.eye(300)).max() < 0.55, "units are drawn independently"
    assert abs(np.corrcoef(drawn) - np.eye(100)).max() < 0.35, "and so are draws"
    np.testing.assert_array_equal(
        weights_of(["document 7", "other", "document 7"], 100, 5)[:, [0, 2]], drawn[:, [7, 7]]
    )
    assert not np.array_equal(weights_of(["document 7"], 100, 6)[:, 0], drawn[:, 7])
    np.testing.assert_array_equal(weights_of(["document 7"], 40, 5)[:, 0], drawn[:40, 7])


def test_few_units_widen_by_students_quantile() -> None:
    assert widening(np.ones(10)) == pytest.approx(t.ppf(0.975, 9) / 1.959964 * (11 / 9) ** 0.5)
    assert widening(np.ones(10_000)) == pytest.approx(1, abs=1e-3)
    assert widening(np.array([5.0, 5.0, 0.0])) == pytest.approx(widening(np.ones(2))), "what counts nothing is no unit"
    uneven = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    freedom, effective = (uneven**1.5).sum() ** 2 / (uneven**3).sum() * 5 / 6, 21**2 / 91
    expected = t.ppf(0.975, freedom) / 1.959964 * ((effective + 1) / (effective - 1)) ** 0.5
    assert widening(uneven) == pytest.approx(expected)
    assert widening(np.array([1.0] * 9 + [100.0])) > 2 * widening(np.ones(10)), (
        "one long document is hardly more than one unit"
    )
    assert widening(np.zeros(3)) == 1


def test_an_upper_bound_is_a_quantile() -> None:
    assert upper(np.arange(1001.0), 0.9) == pytest.approx(900)
    assert math.isnan(upper(np.empty(0), 0.9))


@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize("truth", [np.zeros(8), np.linspace(0, 2, 8)], ids=["nothing", "slope"])
def test_what_was_chosen_among_several_is_covered_and_not_flattered(correlation: float, truth: np.ndarray) -> None:
    random = np.random.default_rng(3)
    root = np.linalg.cholesky(np.array([[correlation ** abs(i - j) for j in range(8)] for i in range(8)]))
    hits, errors, plain = 0, [], []
    for _ in range(250):
        values = truth + root @ random.standard_normal(8)
        draws = values[:, None] + root @ random.standard_normal((8, 400))
        best = int(values.argmax())
        estimate, low, high = after_choice(best, values, draws, values, draws)
        hits += low <= truth[best] <= high
        errors.append(estimate - truth[best])
        plain.append(values[best] - truth[best])
    assert 0.92 <= hits / 250 <= 0.98
    assert abs(np.median(errors)) < 0.3 * abs(np.median(plain)) + 0.1


def test_a_clear_winner_keeps_its_own_interval() -> None:
    draws = np.random.default_rng(0).standard_normal((3, 4000)) + np.array([[0.0], [50.0], [1.0]])
    estimate, low, high = after_choice(1, draws.mean(1), draws, draws.mean(1), draws)
    assert estimate == pytest.approx(50, abs=0.05)
    assert (low, high) == pytest.approx(interval(draws[1]), abs=0.15)
    alone = after_choice(0, draws[:1].mean(1), draws[:1], draws[:1].mean(1), draws[:1])
    assert alone[1:] == interval(draws[0])
    still = np.zeros((2, 100))
    assert after_choice(0, still[:, 0], still, still[:, 0], still) == (0, 0, 0), "nothing varies"


def test_an_interval_is_the_central_95_percent_and_nan_where_nothing_was_drawn() -> None:
    assert interval(np.arange(1001.0)) == pytest.approx((25.0, 975.0))
    assert all(map(math.isnan, interval(np.empty(0))))
    assert all(map(math.isnan, interval(np.array([1.0, math.nan]))))


def test_draws_may_be_infinite() -> None:
    """A share of an accuracy that is 0 in some replicates."""
    draws = np.r_[np.full(50, -np.inf), np.linspace(0, 1, 950)]
    assert interval(draws)[0] == -np.inf
    assert 0.9 < interval(draws)[1] < 1
    assert interval(np.r_[draws, np.full(50, np.inf)]) == (-np.inf, np.inf)
    assert interval(np.full(20, -np.inf)) == (-np.inf, -np.inf)
    assert upper(np.r_[np.zeros(80), np.full(20, np.inf)], 0.9) == np.inf


def held_at_once(share: float, values: int, *, runs: int, draws: int = 250, tails: float = math.inf) -> float:
    """How often intervals hold all truths, 0, at once: values that share some of their error, in simulated experiments."""
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(runs):
        # An estimate and its draws around it, as a bootstrap that knows the distribution of the error would have them.
        common, own = draw.normal(size=(1, draws + 1)), draw.normal(size=(values, draws + 1))
        chi = 1.0 if math.isinf(tails) else np.sqrt(draw.chisquare(tails, (values, draws + 1)) / tails)
        errors = (share**0.5 * common + (1 - share) ** 0.5 * own) / chi
        errors[0] *= 100  # of another scale
        low, high = simultaneous(errors[:, 0], errors[:, :1] + errors[:, 1:])
        held += bool(((low <= 0) & (high >= 0)).all())
    return held / runs


@pytest.mark.parametrize(("share", "values", "tails"), [(0.0, 6, math.inf), (0.8, 12, math.inf), (0.3, 6, 4)])
def test_simultaneous_intervals_hold_all_truths_at_once(share: float, values: int, tails: float) -> None:
    """Bonferroni's are no wider than is needed where values are independent; these are narrower where they move together."""
    found = held_at_once(share, values, tails=tails, runs=300)
    assert 0.95 - 3 * (0.95 * 0.05 / 300) ** 0.5 < found < 0.99


def test_simultaneous_intervals_by_hand() -> None:
    draw = np.random.default_rng(3)
    draws = draw.normal(size=(4, 4000)) * [[1], [5], [0], [1]] + [[0], [10], [2], [0]]
    draws[3, 7] = np.nan
    values = np.array([0.0, 10.0, 2.0, 0.0])
    low, high = simultaneous(values, draws)
    factor = norm.ppf(0.5 + 0.95**0.5 / 2)  # of two independent normal values
    np.testing.assert_allclose(low[:3], [-factor, 10 - 5 * factor, 2], atol=0.25)
    np.testing.assert_allclose(high[:3], [factor, 10 + 5 * factor, 2], atol=0.25)
    assert math.isnan(low[3])
    assert math.isnan(high[3]), "a value without an interval, which the others do not depend on"
    np.testing.assert_array_equal(simultaneous(values[:3], draws[:3])[0], low[:3])
    one = simultaneous(values[:1], draws[:1])
    assert (one[0][0], one[1][0]) == pytest.approx(intervals.interval(draws[0]), abs=0.1), "alone it is the usual one"
    inside = ((draws[:3] >= low[:3, None]) & (draws[:3] <= high[:3, None])).all(0)
    assert inside.mean() == pytest.approx(0.95, abs=0.01)
    assert np.isnan(simultaneous(values[:2], np.empty((2, 0)))).all()


def test_simultaneous_intervals_of_draws_that_are_mostly_the_same() -> None:
    """As at the end of a metric's range: it does not widen the others, and its own interval reaches over what was drawn."""
    draw = np.random.default_rng(4)
    usual, rare = draw.normal(size=(3, 1000)), np.where(np.arange(1000) < 70, draw.random(1000), 0.0)
    low, high = simultaneous(np.zeros(4), np.stack([*usual, rare]))
    assert low[3] == -high[3]
    assert rare.max() <= high[3] < 4
    assert np.abs([*low[:3], *high[:3]]).max() < 4
