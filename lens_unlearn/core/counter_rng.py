"""Counter-based random numbers: the same key gives the same number, in whatever batch, order or process it is asked for.

The mixing function is the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", 2014), in the wrapping 64-bit integers of PyTorch.
"""

import hashlib

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["key_of", "mix", "prefixes", "uniform"]

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB


def mix(key: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Scramble 64-bit integers: every bit of the result depends on every bit of the key."""
    x = key * _GOLDEN + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right and fill with zeros; `>>` of signed integers fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def key_of(*parts: object) -> int:
    """Turn settings, such as a seed and a site, into a signed 64-bit key."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def prefixes(
    tokens: Int[Tensor, "batch pos"], real: Int[Tensor, "batch pos"], before: Int[Tensor, "batch 2"]
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch 2"]]:
    """Key every position by the real tokens up to it: equal for equal beginnings of a text, whatever stands around it.

    Args:
        tokens: Token ids.
        real: 1 where a position is no padding.
        before: What an earlier call, on the text before these tokens, returned last; zeros at the beginning of a text.

    Returns:
        The keys, and (number of real tokens, running sum) of each row for the call that continues it.
    """
    place = before[:, :1] + real.cumsum(1)
    running = before[:, 1:] + (mix(mix(place) + tokens) * real).cumsum(1)
    return mix(running), torch.stack([place[:, -1], running[:, -1]], dim=1)


def uniform(key: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Turn mixed keys into float32 numbers in [0, 1), in steps of 2^-24."""
    return _shifted(mix(key), 40).float() * 2.0**-24
