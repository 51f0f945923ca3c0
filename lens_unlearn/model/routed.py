"""`Routed`: the values of neurons inside routed experts in one forward pass, held for the experts that each token was routed to.

Knows pairs of a token and an expert; knows nothing of models, nor of how the experts are computed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Routed", "takes_routed", "through"]


@dataclass(frozen=True, eq=False)
class Routed:
    """One value per (token, expert that it was routed to, column); at all other experts of a token it is 0.

    The value of column j of expert e at a token is ``gate * key``: the key is what the expert's down projection is applied to, and
    the gate the weight with which the expert's output is added up. So a value of 0 is a zeroed column of that projection.
    """

    key: Float[Tensor, "pairs columns"]
    gate: Float[Tensor, "pairs"]
    expert: Int[Tensor, "pairs"]
    token: Int[Tensor, "pairs"]
    """Position in the batch, counted row by row."""
    experts: int
    batch: tuple[int, int]
    """Rows and positions."""
    weighted: bool = True
    """False before the activation function, where the value is what the expert computes there, without the gate."""

    @property
    def device(self) -> torch.device:
        """The device of the values."""
        return self.key.device

    @cached_property
    def values(self) -> Float[Tensor, "pairs columns"]:
        """Gate times key."""
        return self.key * self._gates if self.weighted else self.key

    @property
    def _gates(self) -> Float[Tensor, "pairs 1"]:
        return self.gate[:, None].to(self.key.dtype)

    @property
    def columns(self) -> int:
        """Neurons of each expert."""
        return self.key.shape[1]

    def dense(self) -> Float[Tensor, "batch pos neurons"]:
        """Return the values of all neurons, expert by expert, with the zeros."""
        rows, positions = self.batch
        full = self.values.new_zeros(rows * positions, self.experts, self.columns)
        return full.index_put((self.token, self.expert), self.values).reshape(rows, positions, -1)

    def with_dense(self, new: Float[Tensor, "batch pos neurons"]) -> "Routed":
        """Return what has these values; at experts that a token was not routed to there is nothing to change."""
        values = new.reshape(-1, self.experts, self.columns)[self.token, self.expert]
        changed = self.replaced(values != self.values, values)
        if not (torch.is_grad_enabled() and values.requires_grad):
            return changed
        # What is left as it is keeps its key, but its gradient is that of the new value, which may be a leaf of its own.
        same = self.key.detach() + self._keyed(values - values.detach())
        return replace(self, key=torch.where(values != self.values, changed.key, same))

    def replaced(
        self, where: Bool[Tensor, "pairs columns"], values: Float[Tensor, "pairs columns"] | float
    ) -> "Routed":
        """Put other values in some places, and leave the rest bitwise as it is.

        Where the gate is 0 no value but 0 can be had: the key becomes 0 there.
        """
        if not (isinstance(values, float) and values == 0):
            values = self._keyed(torch.as_tensor(values, dtype=self.key.dtype, device=self.key.device))
        key = self.key.masked_fill(where, values) if isinstance(values, float) else torch.where(where, values, self.key)
        return replace(self, key=key.to(self.key.dtype))

    def selected(self, index: Int[Tensor, "chosen"]) -> Float[Tensor, "batch pos chosen"]:
        """Return the values of some neurons, by their flat indices, with the zeros: of `dense` only that part is made."""
        rows, positions = self.batch
        found = self.values.new_zeros(rows * positions, len(index))
        for pairs, columns, chosen in self._parts(index):
            found[self.token[pairs][:, None], chosen] = self.values[pairs][:, columns]
        return found.view(rows, positions, -1)

    def with_selected(self, index: Int[Tensor, "chosen"], new: Float[Tensor, "batch pos chosen"]) -> "Routed":
        """Return what has other values at some neurons, where a token is routed to their experts."""
        flat, values = new.reshape(-1, len(index)), self.values.clone()
        for pairs, columns, chosen in self._parts(index):
            values[pairs[:, None], columns] = flat[self.token[pairs][:, None], chosen].to(values.dtype)
        return self.replaced(values != self.values, values)

    def _parts(self, index: Int[Tensor, "chosen"]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield, for each expert with some of the neurons, its pairs, the neurons' columns, and their places in the index."""
        of, columns = index // self.columns, index % self.columns
        for expert in of.unique().tolist():
            chosen = (of == expert).nonzero()[:, 0]
            yield (self.expert == expert).nonzero()[:, 0], columns[chosen], chosen

    def _keyed(self, values: Tensor) -> Tensor:
        """Return the keys that have some values."""
        gate = self._gates
        return torch.where(gate == 0, 0.0, values / gate) if self.weighted else values

    def limited(self, to: Bool[Tensor, "batch pos"], before: "Routed") -> "Routed":
        """Return the same at some positions, and what was before at all others."""
        return replace(self, key=torch.where(to.reshape(-1)[self.token][:, None], self.key, before.key))

    def at_neurons(self, vector: Tensor) -> Tensor:
        """Return, for each pair, the part of a vector over all neurons that belongs to its expert."""
        return vector.view(self.experts, self.columns)[self.expert]


def takes_routed(function: Any) -> Any:
    """Mark a hook as one that takes `Routed` values as they are; every other one is given a tensor."""
    function.takes_routed = True
    return function


def through(function: Callable[[Any], Any], value: Any) -> Any:
    """Call a hook on an activation: a tensor, or `Routed` values, of which it may have to be given the dense tensor."""
    if not isinstance(value, Routed) or getattr(function, "takes_routed", False):
        return function(value)
    new = function(value.dense())
    return None if new is None else value.with_dense(new)
