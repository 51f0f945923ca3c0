"""Random draws: SplitMix64 as NumPy computes it, uniform and uncorrelated, and keys that know a text's beginning alone."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from counter_rng_helpers import GOLDEN, splitmix_array
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lens_unlearn.core.counter_rng import key_of, mix, prefixes, uniform

MASK = 2**64 - 1
numbers = st.integers(-(2**63), 2**63 - 1)


def splitmix(key: int) -> int:
    """The `key`-th number (from 0) of the published generator that begins at 0, in Python's own unbounded integers."""
    z = (key + 1) * GOLDEN & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@given(st.lists(numbers, min_size=1, max_size=8))
def test_mixing_equals_splitmix64_in_pythons_integers(keys: list[int]) -> None:
    assert mix(torch.tensor(keys)).tolist() == [signed(splitmix(key & MASK)) for key in keys]


def test_mixing_equals_splitmix64_in_numpys_unsigned_integers_and_the_published_first_numbers() -> None:
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 10_000)
    assert np.array_equal(mix(torch.from_numpy(keys)).numpy().view(np.uint64), splitmix_array(keys.view(np.uint64)))
    # The reference implementation's first three numbers from state 0.
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mix(torch.arange(3)).tolist() == [signed(n) for n in first]


def test_uniform_numbers_are_the_upper_24_bits_and_below_one() -> None:
    keys = torch.from_numpy(np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 10_000))
    expected = (splitmix_array(keys.numpy().view(np.uint64)) >> np.uint64(40)).astype(np.float64) * 2.0**-24
    draws = uniform(keys)
    assert draws.dtype == torch.float32
    assert np.array_equal(draws.double().numpy(), expected)
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1


def chi_square(values: Tensor, bins: int) -> float:
    """How far counts are from equal, in standard deviations of the statistic."""
    counts = torch.histc(values.double(), bins, 0, 1)
    expected = values.numel() / bins
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - (bins - 1)) / math.sqrt(2 * (bins - 1))


def drawn(tokens: Tensor, neurons: Tensor, seed: int = 0) -> Tensor:
    """Draw as `Adjust` does: [rows, positions, neurons]."""
    real = torch.ones_like(tokens)
    keys, _ = prefixes(tokens, real, tokens.new_zeros(len(tokens), 2))
    return uniform(keys[:, :, None] + mix(neurons + key_of("test", seed)))


def test_the_draws_are_uniform_also_where_they_stand_next_to_one_another() -> None:
    draws = drawn(tiny.some_tokens(16, 64), torch.arange(200))
    assert abs(chi_square(draws.reshape(-1), 256)) < 4
    for axis in range(3):  # of every row, position and neuron the mean is that of a uniform variable
        rest = [other for other in range(3) if other != axis]
        means = draws.double().mean(rest)
        z = (means - 0.5) * math.sqrt(12 * draws.numel() / draws.shape[axis])
        assert float(z.abs().max()) < 4.5, axis
        assert 0.5 < float(z.square().mean()) < 1.6, axis


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["texts", "positions", "neurons"])
@pytest.mark.parametrize("lag", [1, 2, 7])
def test_neighbours_are_not_correlated(axis: int, lag: int) -> None:
    draws = drawn(tiny.some_tokens(16, 64), torch.arange(200)).double() - 0.5
    length = draws.shape[axis] - lag
    product = draws.narrow(axis, 0, length) * draws.narrow(axis, lag, length)
    z = float(product.mean()) * 12 * math.sqrt(product.numel())
    assert abs(z) < 4
    both = (draws.narrow(axis, 0, length) > 0) & (draws.narrow(axis, lag, length) > 0)
    assert abs(float(both.double().mean()) - 0.25) * math.sqrt(both.numel() / 0.1875) < 4


def test_other_seeds_other_sites_and_one_other_token_give_other_draws() -> None:
    tokens = tiny.some_tokens(4, 32)
    base = drawn(tokens, torch.arange(100))
    for other in (drawn(tokens, torch.arange(100), seed=1), drawn(tokens + 1, torch.arange(100))):
        assert abs(float(np.corrcoef(base.reshape(-1), other.reshape(-1))[0, 1])) * math.sqrt(base.numel()) < 4
        assert not bool((base == other).double().mean() > 1e-4)
    changed = tokens.clone()
    changed[:, 10] += 1
    again = drawn(changed, torch.arange(100))
    assert torch.equal(again[:, :10], base[:, :10])
    assert float((again[:, 10:] == base[:, 10:]).double().mean()) < 1e-4


def test_keys_of_settings_are_the_same_in_every_process_and_differ_by_setting() -> None:
    keys = [key_of("a", 0), key_of("a", 1), key_of("b", 0), key_of("a", "0"), key_of("a0"), key_of(("a", 0))]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= key < 2**63 for key in keys)
    code = "from lens_unlearn.core.counter_rng import key_of; print(key_of('a', 0))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(out.stdout) == keys[0]


# --- keys of a text's beginning ----------------------------------------------------------------------------------------

texts = st.lists(st.lists(st.integers(0, 50_000), min_size=1, max_size=12), min_size=1, max_size=5)


def keys_alone(text: list[int]) -> list[int]:
    tokens = torch.tensor([text])
    return prefixes(tokens, torch.ones_like(tokens), tokens.new_zeros(1, 2))[0][0].tolist()


@given(texts, st.integers(0, 6), st.integers(0, 50_000))
def test_equal_beginnings_have_equal_keys_whatever_stands_around_them(
    rows: list[list[int]], extra: int, filler: int
) -> None:
    width = max(map(len, rows)) + extra
    for left in (True, False):
        tokens = torch.full((len(rows), width), filler)
        real = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(width - len(row), width) if left else slice(0, len(row))
            tokens[i, where], real[i, where] = torch.tensor(row), 1
        keys, carry = prefixes(tokens, real, tokens.new_zeros(len(rows), 2))
        for i, row in enumerate(rows):
            assert keys[i][real[i].bool()].tolist() == keys_alone(row)
            assert int(carry[i, 0]) == len(row)


@given(texts, st.data())
def test_going_on_from_what_was_returned_equals_doing_it_at_once(rows: list[list[int]], data: st.DataObject) -> None:
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    whole, carry = prefixes(tokens, real, tokens.new_zeros(len(rows), 2))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, width - 1)), max_size=3)))
    parts, before = [], tokens.new_zeros(len(rows), 2)
    for start, end in zip([0, *cuts], [*cuts, width], strict=True):
        if start < end:
            part, before = prefixes(tokens[:, start:end], real[:, start:end], before)
            parts.append(part)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(before, carry)


def test_a_key_depends_on_the_order_and_number_of_the_tokens_before_it() -> None:
    rows = [[5, 6, 7], [6, 5, 7], [5, 7, 6], [7], [6, 7], [5, 5, 7], [0, 0, 0], [0, 0], [0]]
    keys = [keys_alone(row)[-1] for row in rows]
    assert len(set(keys)) == len(keys)
    many = torch.arange(30_000)[:, None] % 1000  # 30 rows of a thousand one-token and two-token texts
    tokens = torch.cat([many, torch.arange(30_000)[:, None] // 1000], 1)
    found, _ = prefixes(tokens, torch.ones_like(tokens), tokens.new_zeros(len(tokens), 2))
    assert len(found[:, 1].unique()) == 30_000
    assert len(found[:, 0].unique()) == 1000
