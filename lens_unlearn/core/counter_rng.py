"""A counter-based random generator: a number is a function of its key alone, whatever the batch, order or process.

The mixing function is the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", 2014), in the wrapping 64-bit integers of PyTorch.

Knows integers and token ids; knows nothing of what the random numbers decide.
"""

# Why not `torch.Generator`: its numbers depend on how many were drawn before. A neuron adjusted at random would then change with
# the batch size, the padding, the order of rows, the key-value cache and the number of processes, and would move the user's
# random state. Here the key of a number is (seed, site, neuron, tokens so far), so the same text always gets the same numbers,
# and a generated text gets the same with a cache and without.

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
    """Shift to the right, filling with zeros; `>>` on PyTorch's signed integers fills with the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def key_of(*parts: object) -> int:
    """Hash settings, such as a seed and a site, into a signed 64-bit key.

    Through SHA-256 of their `repr`: Python's own `hash` differs from one process to the next.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def prefixes(
    tokens: Int[Tensor, "batch pos"], real: Int[Tensor, "batch pos"], before: Int[Tensor, "batch 2"]
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch 2"]]:
    """Compute a key for every position from the real tokens up to it: equal for equal prefixes, whatever the padding or batch.

    Args:
        tokens: Token ids.
        real: 1 where a position is a real token, 0 at padding.
        before: The second value that an earlier call returned for the text before these tokens; zeros at the beginning of a text.

    Returns:
        The keys; and for each row its number of real tokens and its running sum, for the call that continues it.
    """
    # The place enters each summand, or texts of the same tokens in another order would get the same key. A sum can be continued
    # from its last value alone, so a cached generation does not need the tokens before.
    place = before[:, :1] + real.cumsum(1)
    running = before[:, 1:] + (mix(mix(place) + tokens) * real).cumsum(1)
    return mix(running), torch.stack([place[:, -1], running[:, -1]], dim=1)


def uniform(key: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Turn keys into uniform float32 numbers in [0, 1), in steps of 2^-24, the finest even spacing in float32."""
    return _shifted(mix(key), 40).float() * 2.0**-24
