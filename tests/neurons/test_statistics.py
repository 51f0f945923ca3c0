"""Streamed statistics equal a two-pass float64 computation, however the tokens are cut, and merge like the parts they are."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from statistics_helpers import READINGS, A, B, Z, assert_close, oracle
from torch import Tensor

from lens_unlearn.core.errors import ActivationError, EmptyStatisticError, LensUnlearnError
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons import histogram as histograms
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.histogram import Histogram
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.moments import Moments

EXTRA = ("sqrt", "extrema")


def gathered(
    x: Tensor, weight: Tensor | None = None, *, chunk: int = 64, extra: Any = EXTRA, site: Site = A
) -> Moments:
    moments = Moments(extra=extra)
    weight = torch.ones(len(x)) if weight is None else weight
    for part, w in zip(x.split(chunk), weight.split(chunk), strict=True):
        moments.update(site, part, w)
    return moments


def normal(tokens: int, neurons: int = 6, *, mean: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-3, 2, neurons)
    return torch.randn(tokens, neurons, generator=generator) * scale + mean * scale


@pytest.mark.parametrize("mean", [0.0, 0.5, -3.0, 30.0, 300.0, -300.0])
@pytest.mark.parametrize("tokens", [1, 2, 17, 1000, 9000])
def test_moments_equal_the_two_pass_oracle(tokens: int, mean: float) -> None:
    x = normal(tokens, mean=mean)
    for chunk in (1024, 100):
        assert_close(gathered(x, chunk=chunk), oracle(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_equal_the_oracle_of_the_same_rounded_values(dtype: torch.dtype) -> None:
    x = (torch.randn(4000, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1, 3, 30, 300]) + 3).to(
        dtype
    )
    assert_close(gathered(x, chunk=512), oracle(x.double()))


def test_histograms_that_are_filled_in_two_threads_share_no_memory() -> None:
    def place() -> int:
        return Histogram()._scratch(torch.zeros(8, 4))[0].untyped_storage().data_ptr()

    with ThreadPoolExecutor(1) as other:
        assert place() == place() != other.submit(place).result()


def test_a_relu_neuron_and_a_negative_one() -> None:
    x = torch.stack([normal(3000, 1)[:, 0].relu(), -normal(3000, 1, mean=4)[:, 0].abs() - 1], dim=1)
    assert_close(gathered(x), oracle(x))


def test_attention_sites_keep_their_shape() -> None:
    x = torch.randn(50, 4, 8, generator=torch.Generator().manual_seed(0))
    moments = gathered(x, site=Z)
    assert moments.mean[Z].shape == (4, 8)
    assert_close(moments, oracle(x.reshape(50, -1)), site=Z)


@pytest.mark.parametrize("through_merge", [False, True])
def test_a_beginning_unlike_the_rest_costs_no_digits(through_merge: bool) -> None:
    x = torch.cat([torch.zeros(4, 3), torch.randn(40_000, 3, generator=torch.Generator().manual_seed(0)) + 300])
    total = Moments(extra=EXTRA)
    for part in (x[:4], *x[4:].split(500)):
        one = total.fresh() if through_merge else total
        one.update(A, part, torch.ones(len(part)))
        total = total.merge(one) if through_merge else total
    assert_close(total, oracle(x), rtol=1e-7)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(-50, 50))
def test_parts_about_different_shifts_merge_exactly(one: int, other: int, apart: float) -> None:
    x, y = normal(one, seed=1), normal(other, seed=2) + apart
    assert_close(gathered(x).merge(gathered(y)), oracle(torch.cat([x, y])), rtol=3e-6)


columns = st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1, max_size=24).map(
    torch.tensor
)


def states_close(one: Moments, other: Moments, rtol: float) -> None:
    assert one.state().keys() == other.state().keys()
    assert one.n == other.n
    for name in READINGS:
        a, b = getattr(one, name)[A].numpy(), getattr(other, name)[A].numpy()
        scale = np.maximum(one.max[A].abs().numpy(), one.min[A].abs().numpy()) + 1e-30
        # The standard deviation is a root of a difference: compare where it is not lost in rounding.
        if name == "std":
            a, b, scale = a**2, b**2, scale**2
        np.testing.assert_array_less(np.abs(a - b), rtol * scale + 1e-300, err_msg=name)


@given(columns, columns, columns)
def test_merging_is_associative_and_commutative_and_the_empty_one_is_neutral(x: Tensor, y: Tensor, z: Tensor) -> None:
    a, b, c = (gathered(t, chunk=7) for t in (x, y, z))
    states_close(a.merge(b).merge(c), a.merge(b.merge(c)), 1e-12)
    states_close(a.merge(b), b.merge(a), 1e-12)
    for same in (a.merge(Moments(extra=EXTRA)), Moments(extra=EXTRA).merge(a)):
        assert all(torch.equal(v, same.state()[k]) for k, v in a.state().items())
    assert_close(a.merge(b).merge(c), oracle(torch.cat([x, y, z])), rtol=2e-6) if len(x) > 4 and float(
        x.abs().min()
    ) > 1 else None


@pytest.mark.parametrize("statistic", [Moments, Histogram, KeySample])
def test_what_is_merged_says_where_all_of_it_comes_from(statistic: Any) -> None:
    parts = [statistic() for _ in range(3)]
    for part, corpus in zip(parts, ("english", "sums", "english"), strict=True):
        part.provenance = {"model": "tiny", "corpus": corpus, "tokens": 10}
    merged = parts[0].merge(parts[1]).merge(statistic()).merge(parts[2])
    assert merged.provenance == {"model": "tiny", "corpus": "english + sums", "tokens": 30}


@given(columns, columns)
def test_merging_changes_neither_part(x: Tensor, y: Tensor) -> None:
    a, b = gathered(x), gathered(y)
    before = [{k: v.clone() for k, v in part.state().items()} for part in (a, b)]
    merged = a.merge(b)
    merged.update(A, x, torch.ones(len(x)))
    for part, old in zip((a, b), before, strict=True):
        assert all(torch.equal(v, old[k]) for k, v in part.state().items())


@given(st.integers(0, 10_000), st.lists(st.integers(1, 200), min_size=1, max_size=8))
def test_any_cutting_and_order_gives_the_same(seed: int, sizes: list[int]) -> None:
    x = normal(sum(sizes), mean=2.0, seed=seed)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    whole = gathered(x, chunk=len(x))
    cut = Moments(extra=EXTRA)
    for part in x[order].split(sizes):
        cut.update(A, part, torch.ones(len(part)))
    for name in READINGS:
        torch.testing.assert_close(getattr(cut, name)[A], getattr(whole, name)[A], rtol=2e-6, atol=2e-9)
    assert torch.equal(cut.min[A], whole.min[A])
    assert torch.equal(cut.max[A], whole.max[A])
    assert torch.equal(cut.positive[A], whole.positive[A])
    assert cut.n == whole.n == sum(sizes)


@pytest.mark.parametrize("garbage", [0.0, 1e30, -7.0, float("nan"), float("inf"), float("-inf")])
def test_what_stands_at_uncounted_positions_does_not_matter_bitwise(garbage: float) -> None:
    x, weight = normal(200, mean=1.0), torch.ones(200)
    weight[torch.randperm(200, generator=torch.Generator().manual_seed(0))[:90]] = 0
    clean, dirty = x.clone(), x.clone()
    clean[weight == 0] = 0.5
    dirty[weight == 0] = garbage
    one, other = gathered(clean, weight), gathered(dirty, weight)
    assert all(torch.equal(v, other.state()[k]) for k, v in one.state().items())
    assert_close(one, oracle(x[weight > 0]))
    assert one.n == 110


def test_a_batch_without_counted_positions_changes_nothing() -> None:
    moments = gathered(normal(40))
    before = {k: v.clone() for k, v in moments.state().items()}
    moments.update(A, torch.full((5, 6), float("nan")), torch.zeros(5))
    moments.update(B, torch.ones(5, 6), torch.zeros(5))
    assert moments.state().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in moments.state().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("statistic", [Moments, Histogram])
def test_a_counted_value_that_is_not_finite_raises_naming_the_neuron(value: float, statistic: Any) -> None:
    x = normal(20)
    x[7, 2] = value
    weight = torch.ones(20)
    weight[3] = 0
    with pytest.raises(
        ActivationError, match=rf"L3\.mlp\.post\[2\] is {value} at token 7 of those of a batch that count:"
    ) as caught:
        statistic().update(B, x, weight)
    assert "wider dtype" in str(caught.value)
    z = torch.zeros(4, 2, 3)
    z[1, 1, 2] = value
    with pytest.raises(ActivationError, match=r"L1\.attn\.z\[1,2\]"):
        statistic().update(Z, z, torch.ones(4))


def test_a_batch_that_raises_leaves_the_moments_as_they_were() -> None:
    moments = gathered(normal(40))
    before = {k: v.clone() for k, v in moments.state().items()}
    with pytest.raises(ActivationError):
        moments.update(A, torch.full((5, 6), float("nan")), torch.ones(5))
    assert all(torch.equal(v, before[k]) for k, v in moments.state().items())


def test_huge_finite_values_do_not_overflow() -> None:
    x = normal(50) * 1e25
    assert_close(gathered(x), oracle(x))
    x = torch.full((8, 2), 60000.0, dtype=torch.float16) * torch.tensor([[1.0], [-1.0]], dtype=torch.float16).repeat(
        4, 1
    )
    assert_close(gathered(x), oracle(x.double()))


def test_one_token_has_no_spread() -> None:
    moments = gathered(torch.tensor([[1.5, -2.0]]))
    assert moments.std[A].tolist() == [0, 0]
    assert moments.mean[A].tolist() == [1.5, -2.0]
    assert moments.mean_abs[A].tolist() == [1.5, 2.0]


@pytest.mark.parametrize("tokens", [2, 3, 16, 17, 1000])
def test_constant_neurons_are_exact_and_not_alive(tokens: int) -> None:
    constants = torch.tensor([0.0, 0.1, 1 / 3, -1e4, 1e-12, 3.0])
    x = torch.cat([constants.expand(tokens, 6), normal(tokens, 2, seed=1) + torch.tensor([0.0, 1e3])], dim=1)
    moments = gathered(x, chunk=100)
    assert moments.std[A][:6].tolist() == [0] * 6
    np.testing.assert_allclose(moments.mean[A][:6].numpy(), constants.double().numpy(), rtol=1e-12)
    assert moments.mean.live[A].tolist() == [False] * 6 + [True] * 2
    assert moments.std.live.equals(moments.mean_abs.live)


def test_a_neuron_that_moves_once_is_alive() -> None:
    x = torch.zeros(5000, 2)
    x[4321, 1] = 1e-3
    assert gathered(x).mean.live[A].tolist() == [False, True]


@pytest.mark.parametrize("name", READINGS)
def test_empty_moments_cannot_be_read(name: str) -> None:
    with pytest.raises(EmptyStatisticError, match="collect over a corpus first"):
        getattr(Moments(extra=EXTRA), name)


def test_extras_that_were_not_kept_say_how_to_get_them() -> None:
    moments = gathered(normal(5), extra=())
    for name, extra in (("mean_sqrt", "sqrt"), ("min", "extrema"), ("max", "extrema")):
        with pytest.raises(EmptyStatisticError, match=rf"without '{extra}'"):
            getattr(moments, name)
    with pytest.raises(LensUnlearnError, match="extra='median' is not known: choose from sqrt, extrema"):
        Moments(extra=("median",))
    with pytest.raises(LensUnlearnError, match="do not merge"):
        moments.merge(Moments(extra=("sqrt",)))


@pytest.mark.parametrize("extra", [(), ("sqrt",), ("extrema",), EXTRA, ("extrema", "sqrt")])
def test_each_extra_alone(extra: Any) -> None:
    x = normal(100)
    moments, expected = gathered(x, extra=extra), oracle(x)
    for name in (
        "mean",
        "std",
        "rms",
        "mean_abs",
        "positive",
        *(["mean_sqrt"] * ("sqrt" in extra)),
        *(["min", "max"] * ("extrema" in extra)),
    ):
        np.testing.assert_allclose(
            getattr(moments, name)[A].numpy(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("extra", [(), EXTRA])
def test_state_goes_out_and_in_again_and_can_be_continued(extra: Any) -> None:
    x, y = normal(100), normal(60, seed=1)
    moments = gathered(x, extra=extra)
    moments.update(Z, torch.ones(3, 2, 2), torch.ones(3))
    again = Moments(extra=extra).with_state(moments.state())
    assert again.sites == moments.sites
    for part in (moments, again):
        part.update(A, y, torch.ones(60))
    assert all(torch.equal(v, again.state()[k]) for k, v in moments.state().items())
    assert again.n == 160


def test_scratch_space_does_not_grow_with_the_number_of_batch_shapes() -> None:
    moments = Moments()
    for tokens in range(1, 200):
        moments.update(A, torch.ones(tokens, 6), torch.ones(tokens))
    held = sum(tensor.numel() for tensor in moments._buffers.values() if isinstance(tensor, Tensor))
    assert 0 < held <= 6 * 256


def test_readings_are_maps_in_float64_and_moments_show_themselves() -> None:
    moments = gathered(normal(100))
    assert isinstance(moments.mean, NeuronMap)
    assert moments.mean[A].dtype == torch.float64
    assert moments.sites == [A]
    assert repr(moments) == "Moments(100 tokens, 1 layers, mlp.post)"
    assert repr(Moments()) == "Moments(empty)"
    assert repr(moments.fresh()) == "Moments(empty)"


def test_the_released_codes_standard_deviation_is_ours_squared() -> None:
    """taker and separability keep the variance in a field called std (and build rms from it)."""
    x = normal(1000, mean=0.5)
    moments = gathered(x)
    legacy_std = x.double().var(0, correction=1)
    legacy_rms = (legacy_std**2 + x.double().mean(0) ** 2).sqrt()
    torch.testing.assert_close(moments.std[A] ** 2, legacy_std, rtol=2e-3, atol=0)
    assert float((moments.std[A] / legacy_std).max()) > 100
    assert float((moments.rms[A] / legacy_rms).max()) > 1.5


# --- histograms ------------------------------------------------------------------------------------------------------


def histogram(x: Tensor, weight: Tensor | None = None, **settings: Any) -> Histogram:
    made = Histogram(**settings)
    made.update(A, x, torch.ones(len(x)) if weight is None else weight)
    return made


def test_histogram_counts_equal_numpys() -> None:
    x = normal(5000) + 0.01
    made = histogram(x, bins=64, limit=10.0)
    edges = made.edges.numpy()
    for neuron in range(6):
        column = x[:, neuron].double().numpy().clip(-9.999, 9.999)
        expected = np.histogram(column, edges)[0]
        got = made.counts(A, neuron).numpy()
        # A value within rounding of an edge may fall on either side.
        near = sum(np.abs(column - edge).min() < 1e-5 * max(1e-3, abs(edge)) for edge in edges)
        assert np.abs(got - expected).sum() <= 2 * near, neuron
        assert got.sum() == 5000


def test_a_histogram_puts_the_smallest_and_the_largest_values_on_their_side() -> None:
    x = torch.tensor(
        [[0.0], [-0.0], [1e-30], [-1e-30], [-1e-9], [3e38], [-3e38], [1e300], [-1e300]], dtype=torch.float64
    )
    counts = histogram(x, bins=8).counts(A, 0).tolist()
    assert counts == [2, 0, 0, 2, 3, 0, 0, 2]


def test_a_histogram_is_the_same_in_tiles_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = 3 * torch.randn(50, 4, 5, generator=torch.Generator().manual_seed(0)), torch.ones(50)
    weight[[0, 7, 49]] = 0
    x[7] = math.nan
    whole = histogram(x, weight).state()
    monkeypatch.setattr(histograms, "_HISTOGRAM_TILE", (16, 7))
    for name, counts in histogram(x, weight).state().items():
        assert torch.equal(counts, whole[name])
        assert counts.shape == (4, 5, 128)
        assert int(counts.sum()) == 47 * 20
    x[8, 3, 4] = math.inf
    with pytest.raises(ActivationError, match=r"L0\.mlp\.post\[3,4\] is inf"):
        histogram(x, weight)


def test_histogram_edges_are_symmetric_about_zero_and_reach_the_limit() -> None:
    for bins, scale, limit in ((128, 0.1, 1000.0), (2, 0.5, 1.0), (10, 0.01, 5.0)):
        edges = Histogram(bins=bins, scale=scale, limit=limit).edges
        assert len(edges) == bins + 1
        assert float(edges[bins // 2]) == pytest.approx(0, abs=1e-12)
        torch.testing.assert_close(edges, -edges.flip(0))
        assert float(edges[-1]) == pytest.approx(limit)
        assert bool((edges.diff() > 0).all())


def test_what_lies_beyond_the_limits_is_counted_in_the_outermost_bins() -> None:
    made = histogram(torch.tensor([[-1e9], [1e9], [0.0], [1e-9], [-1e-9]]), bins=4, limit=2.0)
    assert made.counts(A, 0).tolist() == [1, 1, 2, 1]


@given(columns, columns)
def test_histograms_merge_exactly(x: Tensor, y: Tensor) -> None:
    one, other = histogram(x), histogram(y)
    both = histogram(torch.cat([x, y]))
    for merged in (one.merge(other), other.merge(one)):
        assert torch.equal(merged.state()[f"{A}.histogram"], both.state()[f"{A}.histogram"])
    assert one.merge(Histogram()).n == len(x)
    assert Histogram().merge(one).n == len(x)
    assert one.n == len(x), "merging changes no part"


def test_histograms_count_counted_positions_alone() -> None:
    x, weight = normal(50), torch.ones(50)
    weight[10:30] = 0
    dirty = x.clone()
    dirty[10:30] = float("nan")
    assert torch.equal(histogram(dirty, weight).counts(A, 3), histogram(x[weight > 0]).counts(A, 3))
    empty = histogram(x, torch.zeros(50))
    assert empty.n == 0


def test_histograms_of_other_bins_do_not_merge_and_bad_bins_are_refused() -> None:
    for other in (Histogram(bins=64), Histogram(scale=0.2), Histogram(limit=10.0)):
        with pytest.raises(LensUnlearnError, match="do not merge"):
            Histogram().merge(other)
        assert repr(other) != repr(Histogram()), "a checkpoint knows them apart by this"
    for bad in ({"bins": 3}, {"bins": 0}, {"scale": 0.0}, {"scale": 2.0, "limit": 1.0}):
        with pytest.raises(LensUnlearnError, match="even number of bins"):
            Histogram(**bad)


def test_histogram_state_goes_out_and_in_again() -> None:
    made = Histogram(bins=8)
    made.update(Z, torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(9))
    again = Histogram(bins=8).with_state(made.state())
    assert again.sites == [Z]
    assert again.n == 9
    assert torch.equal(again.counts(Z, 5), made.counts(Z, 5))
    with pytest.raises(EmptyStatisticError, match=r"nothing of L0\.mlp\.post"):
        made.counts(A, 0)


def test_the_extra_state_is_what_the_mean_absolute_value_is_made_of() -> None:
    """abs(x) = 2 relu(x) - x: cancellation must not show where the mean is far above the spread."""
    x = normal(4096, mean=300.0)
    np.testing.assert_allclose(gathered(x).mean_abs[A].numpy(), oracle(x)["mean_abs"], rtol=1e-6)
    assert math.isfinite(float(gathered(x).mean_abs[A].sum()))


# --- samples of keys -----------------------------------------------------------------------------------------------------


def key_of_token(document: Tensor, place: Tensor) -> Tensor:
    """A key that says which token it is of."""
    return torch.stack([document, place, document * 1000 + place], dim=1).float()


def sampled(
    tokens: list[tuple[int, int]], capacity: int = 20, seed: int = 0, chunk: int = 7, sites: tuple[Site, ...] = (A, B)
) -> KeySample:
    """A sample of tokens (document, place), in batches, as `collect` makes it."""
    total = KeySample(capacity, seed=seed)
    for start in range(0, len(tokens), chunk):
        document, place = torch.tensor(tokens[start : start + chunk]).T
        part = total.fresh()
        part.locate(document, place)
        for site in sites:
            part.update(site, key_of_token(document, place) + site.layer, torch.ones(len(document)))
        total = total.merge(part)
    return total


def same(one: KeySample, other: KeySample) -> bool:
    mine, theirs = one.state(), other.state()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


many_tokens = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), min_size=1, max_size=40)


@given(many_tokens, st.integers(1, 30), st.integers(1, 40), st.randoms(use_true_random=False))
def test_a_sample_does_not_depend_on_batches_or_order(
    tokens: list[tuple[int, int]], capacity: int, chunk: int, shuffle: Any
) -> None:
    """Also where a token comes twice, in one batch or in two: it counts once."""
    once = sampled(tokens, capacity, chunk=1)
    mixed = list(tokens)
    shuffle.shuffle(mixed)
    assert same(sampled(mixed, capacity, chunk=chunk), once)
    assert once.n == min(capacity, len(set(tokens)))
    places = [tuple(map(int, key[:2])) for key in once[A]]
    assert len(set(places)) == len(places)
    assert set(places) <= set(tokens)
    assert torch.equal(once[A] + B.layer, once[B]), "the same tokens at every site"
    assert torch.equal(once.documents(A).float(), once[A][:, 0])


@given(many_tokens, many_tokens, many_tokens, st.integers(1, 30))
def test_merging_is_associative_commutative_and_idempotent_on_overlap(
    x: list[tuple[int, int]], y: list[tuple[int, int]], z: list[tuple[int, int]], capacity: int
) -> None:
    a, b, c = (sampled(part, capacity) for part in (x, y, z))
    kept = a.state()
    whole = sampled(x + y + z, capacity)
    assert same(a.merge(b).merge(c), whole)
    assert same(a.merge(b.merge(c)), whole)
    assert same(c.merge(a).merge(b), whole)
    assert same(a.merge(a), a)
    assert same(a.merge(KeySample(capacity)), a)
    assert same(KeySample(capacity).merge(a), a)
    assert all(torch.equal(a.state()[name], kept[name]) for name in kept), "merging changes no part"


def test_a_sample_is_uniform_over_tokens_and_pairs_of_them() -> None:
    documents, places, capacity, runs = 20, 5, 25, 400
    tokens = [(document, place) for document in range(documents) for place in range(places)]
    counts, pairs = torch.zeros(documents, places), torch.zeros(documents)
    for seed in range(runs):
        kept = sampled(tokens, capacity, seed, chunk=100, sites=(A,))[A][:, :2].long()
        assert len(kept) == capacity
        counts[kept[:, 0], kept[:, 1]] += 1
        inside = torch.zeros(documents, places)
        inside[kept[:, 0], kept[:, 1]] = 1
        pairs += inside[:, 0] * inside[:, 1]  # neighbours of one document
    share = capacity / len(tokens)
    z = (counts / runs - share) / math.sqrt(share * (1 - share) / runs)
    chi_square = float(z.square().sum())
    assert abs(chi_square - len(tokens)) < 4 * math.sqrt(2 * len(tokens))
    assert float(z.abs().max()) < 4.5
    both = share * (capacity - 1) / (len(tokens) - 1)
    assert abs(float(pairs.mean()) / runs - both) < 4.5 * math.sqrt(both * (1 - both) / (runs * documents))


def test_a_smaller_sample_is_the_beginning_of_a_larger_one_and_other_seeds_keep_others() -> None:
    tokens = [(document, place) for document in range(9) for place in range(9)]
    large, small = sampled(tokens, 50), sampled(tokens, 10)
    assert torch.equal(large[A][:10], small[A])
    assert not torch.equal(sampled(tokens, 10, seed=1)[A], small[A])
    # A part of the tokens keeps, of those, what the whole would keep first.
    part = sampled(tokens[:40], 10)
    ranked = [tuple(map(int, key[:2])) for key in sampled(tokens, 81)[A]]
    assert [tuple(map(int, key[:2])) for key in part[A]] == [one for one in ranked if one in tokens[:40]][:10]


def test_a_samples_state_goes_out_and_in_again_and_goes_on() -> None:
    tokens = [(document, place) for document in range(9) for place in range(4)]
    first, rest = sampled(tokens[:20]), sampled(tokens[20:])
    again = KeySample(20).with_state(first.state())
    assert same(again, first)
    assert same(again.merge(rest), sampled(tokens))
    assert again.sites == [A, B]
    state = first.state()
    for bad in (state[f"{A}.ids"][:, :3], state[f"{A}.ids"][:2], state[f"{A}.ids"].reshape(-1)):
        with pytest.raises(LensUnlearnError, match="keys, and ids of shape"):
            KeySample(20).with_state({**state, f"{A}.ids": bad})


def test_only_counted_tokens_are_kept_and_what_is_no_number_is_refused() -> None:
    document, place = torch.arange(6), torch.zeros(6, dtype=torch.long)
    keys = key_of_token(document, place)
    keys[2] = math.nan
    made = KeySample()
    made.locate(document, place)
    made.update(A, keys, torch.tensor([1.0, 0, 0, 1, 1, 0]))
    made.update(B, keys, torch.zeros(6))
    assert sorted(made[A][:, 0].tolist()) == [0, 3, 4]
    assert made.sites == [A]
    with pytest.raises(ActivationError, match=r"L0\.mlp\.post\[0\] is nan"):
        made.update(A, keys, torch.ones(6))
    half = KeySample()
    half.locate(document, place)
    half.update(Z, torch.ones(6, 2, 3, dtype=torch.bfloat16), torch.ones(6))
    assert half[Z].shape == (6, 2, 3)
    assert half[Z].dtype == torch.float32


def test_a_sample_has_to_know_which_tokens_it_is_given() -> None:
    made = KeySample()
    with pytest.raises(LensUnlearnError, match=r"call locate\(\) with .* of these 4 tokens first"):
        made.update(A, torch.ones(4, 3), torch.ones(4))
    made.locate(torch.arange(3), torch.arange(3))
    with pytest.raises(LensUnlearnError, match="these 4 tokens"):
        made.update(A, torch.ones(4, 3), torch.ones(4))


def test_samples_of_other_settings_do_not_merge_and_show_themselves_apart() -> None:
    for other in (KeySample(7), KeySample(seed=1), KeySample(pool="mean")):
        with pytest.raises(LensUnlearnError, match="different capacity, seed or pool do not merge"):
            KeySample().merge(other)
        assert repr(other) != repr(KeySample()), "a checkpoint knows them apart by this"
    with pytest.raises(LensUnlearnError, match="capacity=0 keeps no key: at least 1"):
        KeySample(0)
    with pytest.raises(EmptyStatisticError, match=r"no key of L1\.attn\.z"):
        sampled([(0, 0)])[Z]
    assert repr(sampled([(0, 0), (0, 1)])) == "KeySample(2 of at most 20 keys, 2 sites, mlp.post)"
    assert repr(KeySample(9, seed=3)) == "KeySample(0 of at most 9 keys, 0 sites, empty, seed 3)"


def test_a_sample_is_split_by_document() -> None:
    tokens = [(document, place) for document in range(50) for place in range(3)]
    whole = sampled(tokens, 150)
    parts = whole.split(0.6, 0.4, seed=2)
    documents = [set(part.documents(A).tolist()) for part in parts]
    assert [len(found) for found in documents] == [30, 20]
    assert not documents[0] & documents[1]
    assert documents[0] | documents[1] == set(range(50))
    assert same(parts[0].merge(parts[1]), whole)
    assert torch.equal(parts[0].documents(A), parts[0].documents(B))
    assert all(same(x, y) for x, y in zip(whole.split(0.6, 0.4, seed=2), parts, strict=True))
    assert not same(whole.split(0.6, 0.4, seed=3)[0], parts[0])
    assert [part.n for part in sampled(tokens[:6], 9).split(0.999, 0.001)] == [3, 3], "no part is left without"
    with pytest.raises(EmptyStatisticError, match="1 documents are too few to split into 2 parts"):
        sampled(tokens[:3], 9).split(0.6, 0.4)
    with pytest.raises(EmptyStatisticError, match="0 documents"):
        KeySample().split(1.0)


def test_shuffled_labels_deal_whole_documents_and_lose_no_key() -> None:
    forget = sampled([(document, place) for document in range(20) for place in range(3)], 60)
    retain = sampled([(document, place) for document in range(100, 130) for place in range(2)], 60)
    one, two = forget.shuffled(retain, seed=1)
    documents = [set(part.documents(A).tolist()) for part in (one, two)]
    assert [len(found) for found in documents] == [20, 30]
    assert not documents[0] & documents[1]
    assert documents[0] & set(range(20))
    assert documents[0] & set(range(100, 130)), "both kinds are in both"
    assert sorted(torch.cat([one[A], two[A]]).tolist()) == sorted(torch.cat([forget[A], retain[A]]).tolist())
    assert all(same(x, y) for x, y in zip(forget.shuffled(retain, seed=1), (one, two), strict=True))
    assert not same(forget.shuffled(retain, seed=2)[0], one)


def test_the_keys_that_are_collected_are_those_of_the_documents_they_name(each: str) -> None:
    from lens_unlearn.core.counter_rng import key_of
    from lens_unlearn.model.hooks import attach, detach_all
    from lens_unlearn.model.sites import resolve

    model, corpus = tiny.model(each), tiny.corpus((9, 3, 14, 5), uncounted=0.3)
    made = collect(model, corpus, ("mlp.post", "attn.z"), statistic=KeySample(1000), batch_size=3, progress=False)
    assert made.n == corpus.n_tokens
    seen: dict[Site, Tensor] = {}
    points = resolve(model, ("mlp.post", "attn.z"))
    removers = [attach(point.hook, lambda t, s=site: seen.update({s: t.clone()})) for site, point in points.items()]
    try:
        for row in range(corpus.n_rows):
            start, end = int(corpus.starts[row]), int(corpus.starts[row + 1])
            with torch.no_grad():
                model(corpus.row(row)[None])
            for site, values in seen.items():
                own = made[site][made.documents(site) == key_of(corpus.keys[row])]
                expected = values[0][corpus.counted[start:end]]
                distance = torch.cdist(own.flatten(1), expected.flatten(1))
                assert len(own) == len(expected)
                assert float(distance.amin(1).max()) < 1e-4
                assert float(distance.amin(0).max()) < 1e-4
    finally:
        detach_all(removers)


def test_what_is_collected_does_not_depend_on_the_batch_size_nor_on_how_the_corpus_is_cut() -> None:
    model = tiny.model("gpt2")
    corpus = tiny.corpus((9, 3, 14, 5, 6, 11, 8))
    options = {"statistic": KeySample(15, seed=1), "progress": False}
    whole = collect(model, corpus, **options)
    for size in (1, 2, 64):
        again = collect(model, corpus, batch_size=size, **options)
        assert all(torch.equal(again.documents(s), whole.documents(s)) for s in whole.sites)
        assert all(torch.allclose(again[s], whole[s], atol=1e-5) for s in whole.sites)
    for parts in (corpus.split(0.5, 0.5), [corpus.only([0, 1, 2]), corpus.only([2, 3, 4, 5, 6])]):
        one, other = (collect(model, part, **options) for part in parts)
        for site, keys in one.merge(other)._keys.items():
            assert torch.allclose(keys, whole[site], atol=1e-5)


def test_documents_that_come_twice_count_once_and_a_part_of_the_rows_names_tokens_as_the_whole_does() -> None:
    """Long documents have several rows; which row it is may not depend on whether an earlier one was sampled."""
    from dataclasses import replace

    model = tiny.model("gpt2")
    base = tiny.corpus((9, 8, 7, 9, 8, 7))
    # The six rows are those of two documents.
    corpus = replace(base, document=torch.tensor([0, 0, 0, 1, 1, 1]), keys=("a", "b"))
    options = {"statistic": KeySample(1000), "progress": False}
    whole = collect(model, corpus, **options)
    assert whole.n == corpus.n_tokens
    for seed in range(4):
        parts = [corpus.sample(15, seed=seed), corpus]
        one, other = (collect(model, part, **options) for part in parts)
        merged = one.merge(other)
        assert torch.equal(merged._ids[A], whole._ids[A]), "the part's tokens are among the whole's"
    twice = corpus + corpus
    for size in (1, 2, 100):
        again = collect(model, twice, batch_size=size, **options)
        assert torch.equal(again._ids[A], whole._ids[A])
