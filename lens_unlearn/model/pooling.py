"""The key of a text: the activation at one of its tokens, or the mean over its tokens up to there.

Knows activations, and which positions count; knows nothing of models, nor of what is done with a key.
"""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_unlearn.core.errors import LensUnlearnError

__all__ = ["Carry", "Pool", "check_pool", "running_mean"]

Pool = Literal["last", "mean"]
"""Which key a text has at a token: that of the token itself, or the mean over the tokens up to it that are text."""

Carry = tuple[Float[Tensor, "batch n"], Float[Tensor, "batch 1"]]
"""The sum of the keys that counted so far in each row, and how many there were."""


def check_pool(pool: Any) -> Pool:
    """Return the name of a way to pool.

    Raises:
        LensUnlearnError: If there is none of that name.
    """
    if pool not in get_args(Pool):
        raise LensUnlearnError(f"pool={pool!r} is not known: choose from {', '.join(get_args(Pool))}")
    return pool


def running_mean(
    keys: Float[Tensor, "batch pos n"], counts: Bool[Tensor, "batch pos"], before: Carry | None = None
) -> tuple[Float[Tensor, "batch pos n"], Carry]:
    """Return at each position the mean over the keys up to there that count, in float32, and what the next pass goes on from.

    Where none counts so far, as at the first token of a text, it is the key of the position itself.

    Args:
        keys: Activations of one forward pass.
        counts: Which positions count.
        before: What was returned for the pass before, whose positions stand before these.
    """
    keys, counted = keys.float(), counts.to(keys.device)[..., None]
    sums, number = keys.where(counted, 0.0).cumsum(1), counted.float().cumsum(1)
    if before is not None:
        sums, number = sums + before[0].to(keys.device)[:, None], number + before[1].to(keys.device)[:, None]
    return torch.where(number > 0, sums / number.clamp_min(1), keys), (sums[:, -1], number[:, -1])
