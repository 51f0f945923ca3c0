"""Overlap of selections and of scores, against plain loops, drawn selections and SciPy."""

import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom, spearmanr

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.overlap import overlap, rank_correlation


def selection(*layers: str) -> NeuronMap:
    return NeuronMap({Site(i, "mlp.post"): torch.tensor([c == "x" for c in row]) for i, row in enumerate(layers)})


def test_counts_and_chance_by_enumeration() -> None:
    """Every pair of selections with as many neurons in each layer, counted one by one."""
    one, other = selection("xx...", "x..."), selection(".xx..", "xx..")
    found = overlap(one, other)
    shared = []
    layers = ((5, 2, 2), (4, 1, 2))
    choices = [[*product(combinations(range(n), a), combinations(range(n), b))] for n, a, b in layers]
    for draw in product(*choices):
        shared.append(sum(len(set(a) & set(b)) for a, b in draw))
    counted = np.array(shared)
    assert (found.first, found.second, found.both, found.either) == (3, 4, 2, 5)
    assert found.jaccard == pytest.approx(2 / 5)
    assert found.expected == pytest.approx(counted.mean())
    assert found.expected_jaccard == pytest.approx(1.3 / 5.7)
    assert found.p_more == pytest.approx((counted >= 2).mean())
    assert found.p_less == pytest.approx((counted <= 2).mean())
    assert found.p == pytest.approx(2 * (counted >= 2).mean())
    assert (counted <= found.high).mean() >= 0.975
    assert (counted < found.high).mean() < 0.975
    assert (counted < found.low).mean() < 0.025


def test_only_what_could_be_chosen_counts_and_missing_sites_are_unselected() -> None:
    one, other = selection("xxx.....", "xx.."), selection("xx.x....")
    alive = selection("xxx.....", "xxxx")  # the fourth of the first layer is dead, and selected all the same
    found = overlap(one, other, alive)
    assert (found.first, found.second, found.both) == (5, 3, 2)
    assert found.p_more == pytest.approx(hypergeom.sf(1, 4, 3, 3))
    assert found.expected == pytest.approx(9 / 4)
    assert (found.low, found.high) == (2, 3), "of four, two selections of three share two at least"
    assert found.p_less == pytest.approx(1 - hypergeom.sf(2, 4, 3, 3))


def test_the_same_and_disjoint_selections_of_a_large_model() -> None:
    flags = torch.zeros(4096, dtype=torch.bool)
    flags[:80] = True
    one = NeuronMap({Site(i, "mlp.post"): flags for i in range(4)})
    same = overlap(one, one)
    assert same.jaccard == 1
    assert same.p_more < 1e-12
    assert same.p_less == 1
    apart = overlap(one, NeuronMap({Site(i, "mlp.post"): flags.roll(80) for i in range(4)}))
    assert apart.jaccard == 0
    assert apart.p_more == 1
    assert apart.p_less == pytest.approx(hypergeom.pmf(0, 4096, 80, 80) ** 4)
    assert apart.low <= apart.expected <= apart.high


def test_the_interval_holds_random_selections() -> None:
    draw = np.random.default_rng(0)
    sizes = ((40, 10, 15), (30, 3, 20))

    def drawn(which: int) -> NeuronMap:
        flags = {}
        for layer, (n, *counts) in enumerate(sizes):
            flags[Site(layer, "mlp.post")] = torch.zeros(n, dtype=torch.bool)
            flags[Site(layer, "mlp.post")][draw.permutation(n)[: counts[which]]] = True
        return NeuronMap(flags)

    pairs = [overlap(drawn(0), drawn(1)) for _ in range(300)]
    assert np.mean([one.low <= one.both <= one.high for one in pairs]) > 0.93
    assert np.mean([one.p <= 0.05 for one in pairs]) <= 0.08
    assert np.mean([one.both for one in pairs]) == pytest.approx(pairs[0].expected, rel=0.1)


def test_nothing_selected_and_what_cannot_be_compared() -> None:
    nothing = overlap(selection("...."), selection("...."))
    assert math.isnan(nothing.jaccard)
    assert (nothing.both, nothing.expected, nothing.p) == (0, 0, 1)
    dead = overlap(selection("x...", "...."), selection("x...", "...."), selection("xxxx", "...."))
    assert (dead.both, dead.expected, dead.p_more) == (1, 0.25, pytest.approx(0.25)), (
        "a layer in which nothing is alive"
    )
    with pytest.raises(SelectionError, match="L0.mlp.post has 3 and 4 neurons"):
        overlap(selection("x.."), selection("x..."))
    with pytest.raises(SelectionError, match="is no selection"):
        overlap(selection("x.."), NeuronMap({Site(0, "mlp.post"): torch.ones(3)}))


def test_rank_correlations_are_scipys_over_candidates() -> None:
    random = torch.Generator().manual_seed(0)
    one, other = (
        NeuronMap({Site(i, "mlp.post"): torch.randint(0, 9, (30,), generator=random).double() for i in range(2)})
        for _ in range(2)
    )
    alive = one > 1
    found = {site: (value, count) for site, value, count in rank_correlation(one, other, alive)}
    kept = [alive[site] for site in one]
    for site, mask in zip(one, kept, strict=True):
        expected = spearmanr(one[site][mask].numpy(), other[site][mask].numpy()).statistic
        assert found[site] == (pytest.approx(expected), int(mask.sum()))
    mask = torch.cat(kept)
    assert found[None][0] == pytest.approx(spearmanr(one.flat()[mask].numpy(), other.flat()[mask].numpy()).statistic)
    assert next(rank_correlation(one, one * 2 + 1))[1] == pytest.approx(1)
    assert math.isnan(next(rank_correlation(one, one * 0.0))[1])
    with pytest.raises(SelectionError, match="L1.mlp.post is not the same in both scores"):
        next(rank_correlation(one, other[0]))
