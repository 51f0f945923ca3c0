"""Bounds that hold on fresh documents, against bounds known in closed form; the search, against trying every strength."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.report import Measure
from lens_unlearn.methods.budget import check_confidence, fewest_at_once, strengths_from, upper_bound, within


def bootstrapped(losses: np.ndarray, seed: int = 0, draws: int = 4000) -> Measure:
    """The mean of losses, with draws of the Bayesian bootstrap, written out."""
    weights = np.random.default_rng(seed).dirichlet(np.ones(len(losses)), size=draws)
    return Measure(float(losses.mean()), weights @ losses, len(losses))


def clopper_pearson(hits: int, n: int, confidence: float) -> float:
    return binomtest(hits, n, alternative="less").proportion_ci(confidence, method="exact").high


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95])
def test_the_bound_is_that_of_the_difference_of_two_samples(confidence: float) -> None:
    draws = 0.03 + 0.01 * np.random.default_rng(1).standard_normal(40_000)
    expected = 0.03 + norm.ppf(confidence) * 0.01 * math.sqrt(2)
    assert upper_bound(Measure(0.03, draws, 1), 100, confidence) == pytest.approx(expected, abs=1e-3)
    assert math.isnan(upper_bound(Measure(0.03, np.empty(0), 1), 1, confidence))


@pytest.mark.parametrize(("n", "confidence"), [(20, 0.9), (45, 0.9), (100, 0.95)])
def test_documents_of_which_none_was_lost_bound_as_clopper_and_pearson_do(n: int, confidence: float) -> None:
    none = bootstrapped(np.zeros(n), draws=40_000)
    assert upper_bound(none, n, confidence) == 0, "what no document shows, the bootstrap cannot know"
    expected = clopper_pearson(0, n, confidence)
    assert upper_bound(none, n, confidence, at_once=True) == pytest.approx(expected, rel=0.04)
    few = bootstrapped(np.r_[np.ones(3), np.zeros(n - 3)], draws=40_000)
    assert upper_bound(few, n, confidence, at_once=True) > clopper_pearson(3, n, confidence), "fresh ones vary too"


def test_of_documents_that_were_not_seen_the_bound_knows_by_itself() -> None:
    none = bootstrapped(np.zeros(45), draws=40_000)
    told = replace(none, draws=np.random.default_rng(0).beta(0.5, 45.5, 40_000), seen=none.draws)
    assert upper_bound(told, 45, at_once=True) == upper_bound(none, 45, at_once=True)


@pytest.mark.parametrize(("budget", "confidence"), [(0.05, 0.9), (0.1, 0.9), (0.02, 0.95), (0.5, 0.5)])
def test_the_fewest_documents_are_those_that_clopper_and_pearson_need(budget: float, confidence: float) -> None:
    fewest = int(fewest_at_once(budget, confidence))
    assert clopper_pearson(0, fewest, confidence) <= budget + 1e-12
    assert fewest == 1 or clopper_pearson(0, fewest - 1, confidence) > budget
    assert fewest_at_once(0, confidence) == math.inf
    assert fewest_at_once(1, confidence) == 1


@pytest.mark.parametrize("kind", ["graded", "all or nothing"])
def test_fresh_documents_lose_more_than_the_bound_in_one_of_ten_samples_at_most(kind: str) -> None:
    random, broken, runs = np.random.default_rng(3), 0, 600
    for run in range(runs):
        draw = (lambda: random.gamma(2, 0.03, 60)) if kind == "graded" else (lambda: (random.random(60) < 0.1) * 1.0)
        bound = upper_bound(bootstrapped(draw(), run, 500), 60, 0.9, at_once=kind != "graded")
        broken += float(draw().mean()) > bound
    # All or nothing is bounded more safely than it has to be; of graded losses, an eighth is two standard errors more than a tenth.
    assert broken / runs <= 0.125
    assert broken > 0


# --- the search ----------------------------------------------------------------------------------------------------------


def test_strengths_are_twenty_in_equal_ratios_up_to_one() -> None:
    for weakest in (0.0025, 0.005, 0.05):
        grid = strengths_from(weakest)
        assert len(grid) == 20
        assert (grid[0], grid[-1]) == (weakest, 1)
        ratios = np.diff(np.log(grid))
        assert ratios.min() > 0
        assert ratios == pytest.approx(np.full(19, -math.log(weakest) / 19), abs=0.06)


def searched(bounds: Any, evaluations: int = 10, budget: float = 0.5) -> tuple[list[int], list[int]]:
    """Indices that passed, and those that were tried."""
    tried: list[int] = []

    def bound(strength: float) -> float:
        assert strength not in tried, "nothing is tried twice"
        tried.append(int(strength))
        return bounds[int(strength)]

    passed = within([float(i) for i in range(len(bounds))], bound, budget, evaluations)
    return [int(p) for p in passed], tried


@pytest.mark.parametrize("passing", range(21))
def test_where_bounds_rise_the_search_ends_where_trying_one_after_the_other_would(passing: int) -> None:
    passed, tried = searched([0.1] * passing + [0.9] * (20 - passing))
    assert (passed[-1] if passed else -1) == passing - 1
    assert len(tried) <= 7


def test_what_passes_is_weaker_than_all_that_failed() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        bounds = random.random(20)
        passed, tried = searched(bounds)
        assert passed == sorted(passed)
        assert all(bounds[i] <= 0.5 for i in passed)
        assert not [i for i in tried if bounds[i] > 0.5 and passed and i < passed[-1]]


@pytest.mark.parametrize("evaluations", [1, 2, 5])
def test_the_search_keeps_to_its_number_of_evaluations(evaluations: int) -> None:
    assert len(searched([0.1] * 9 + [0.9] * 11, evaluations)[1]) == evaluations


def test_a_bound_that_is_not_known_is_not_within_any_budget() -> None:
    assert searched([math.nan] * 20)[0] == []


@pytest.mark.parametrize("confidence", [0.3, 1.0, float("nan"), -1])
def test_what_is_no_confidence_is_refused(confidence: float) -> None:
    with pytest.raises(LensUnlearnError, match=f"confidence={confidence} is no confidence of a bound"):
        check_confidence(confidence)
