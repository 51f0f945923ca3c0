"""Streamed statistics of activations: `Moments` and `Histogram`.

A statistic is a monoid: `fresh` is its empty element, `update` takes one site's activations of one batch, and `merge`
joins two of them, associatively. So a corpus can be cut anywhere, into batches, over resumed runs or over ranks.
State is float64; each batch is reduced in float32 about a value near its own mean, which keeps seven digits of the
standard deviation also where the mean is hundreds of standard deviations away from zero.
"""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.errors import ActivationError, LensUnlearnError
from lens_unlearn.model.sites import Site

__all__ = ["Statistic"]

S = TypeVar("S", bound="Statistic")


@runtime_checkable
class Statistic(Protocol):
    """What `collect` needs of a statistic."""

    def fresh(self: S) -> S:
        """Return an empty statistic of the same settings."""
        ...

    def update(self, site: Site, values: Float[Tensor, "tokens *neurons"], weight: Float[Tensor, "tokens"]) -> None:
        """Add the activations of one batch at one site; `weight` is 1 at counted tokens and 0 elsewhere."""
        ...

    def merge(self: S, other: S) -> S:
        """Return the statistic of both parts together."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return everything that was accumulated, as tensors."""
        ...

    def with_state(self: S, tensors: Mapping[str, Tensor]) -> S:
        """Return a statistic of the same settings that continues from `state`."""
        ...


def joined_provenance(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return where both parts come from: corpora by name, and the tokens of both."""
    told = {**other, **one}
    both = [part for part in (one, other) if "corpus" in part]
    if len(both) == 2:
        told["corpus"] = " + ".join(dict.fromkeys(name for part in both for name in str(part["corpus"]).split(" + ")))
        told["tokens"] = sum(part.get("tokens", 0) for part in both)
    return told


def require_all_read(statistic: S, tensors: Mapping[str, Tensor]) -> S:
    """Return a statistic that was read, if nothing in the file is left over.

    Raises:
        LensUnlearnError: If it would not write the same names.
    """
    odd = sorted(set(tensors) ^ set(statistic.state()))
    if odd:
        raise LensUnlearnError(f"{odd[0]!r:.100} is not what a {type(statistic).__name__} keeps, or twice the same")
    return statistic


def require_finite(site: Site, counted: Float[Tensor, "tokens n"], shape: tuple[int, ...]) -> None:
    bad = (~torch.isfinite(counted)).nonzero()
    if len(bad):
        token, neuron = (int(i) for i in bad[0])
        index = ",".join(str(int(i)) for i in torch.unravel_index(torch.tensor(neuron), shape))
        value = float(counted[token, neuron])
        raise ActivationError(
            f"{site}[{index}] is {value} at the {token + 1}. counted token of a batch: the model overflows or is "
            "broken there; try a wider dtype, or look at that text"
        )
