"""`Statistic`: the protocol of everything that `collect` can fill, and the checks that its implementations share.

A statistic is a monoid: `fresh` is its empty element, `update` takes one site's activations of one batch, and `merge`
joins two of them, associatively. So a corpus can be cut anywhere: into batches, over resumed runs or over processes.
Knows sites; knows nothing of what any one statistic accumulates, nor of models and corpora.
"""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.errors import ActivationError, LensUnlearnError
from lens_unlearn.model.sites import Site

__all__ = ["S", "Statistic", "joined_provenance", "require_all_read", "require_finite"]

S = TypeVar("S", bound="Statistic")
"""A type variable: some statistic, the same one going in and coming out."""


@runtime_checkable
class Statistic(Protocol):
    """What `collect` needs of a statistic: an empty one, updates, and merging, with a state that can be saved."""

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


def joined_provenance(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the provenance of two merged parts: the names of their corpora, and the tokens of both together."""
    joined = {**second, **first}
    parts = [part for part in (first, second) if "corpus" in part]
    if len(parts) == 2:
        names = [name for part in parts for name in str(part["corpus"]).split(" + ")]
        joined["corpus"] = " + ".join(dict.fromkeys(names))
        joined["tokens"] = sum(part.get("tokens", 0) for part in parts)
    return joined


def require_all_read(statistic: S, tensors: Mapping[str, Tensor]) -> S:
    """Return a statistic that was read from a file, if it used every tensor of that file.

    Raises:
        LensUnlearnError: If its own state would have other names.
    """
    unexpected = sorted(set(tensors) ^ set(statistic.state()))
    if unexpected:
        raise LensUnlearnError(
            f"{unexpected[0]!r:.100} does not belong in the state of a {type(statistic).__name__}, or is there twice"
        )
    return statistic


def require_finite(site: Site, counted: Float[Tensor, "tokens n"], shape: tuple[int, ...]) -> None:
    """Refuse activations that are not numbers, which an average would hide.

    Raises:
        ActivationError: At the first that is NaN or infinite; names the neuron.
    """
    bad = (~torch.isfinite(counted)).nonzero()
    if len(bad):
        token, neuron = (int(i) for i in bad[0])
        index = ",".join(str(int(i)) for i in torch.unravel_index(torch.tensor(neuron), shape))
        value = float(counted[token, neuron])
        raise ActivationError(
            f"{site}[{index}] is {value} at token {token + 1} of those of a batch that count: the model overflows or is "
            "broken there; try a wider dtype, or look at that text"
        )
