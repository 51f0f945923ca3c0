"""Muon: momentum whose update is made orthogonal, for the matrices between hidden states.

`torch.optim.Muon` iterates in bfloat16, which a processor without bfloat16 arithmetic runs some thirty
times slower than float32; this one keeps float32 and takes matrices of one shape together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch


class Muon(torch.optim.Optimizer):
    """Stochastic gradient descent with Nesterov momentum, orthogonalized."""

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        """Take matrices; one step moves each by ``lr`` in every direction that its gradients agree on."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step. There is no closure: the gradients are those of the last backward pass."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
            for value in group["params"]:
                by_shape[value.shape].append(value)
            for (rows, columns), values in by_shape.items():
                momenta = [self._momentum(value, group["momentum"]) for value in values]
                updates = orthogonalized(torch.stack(momenta))
                scale = max(1.0, columns / rows) ** 0.5
                for value, update in zip(values, updates):
                    value.mul_(1 - group["lr"] * group["weight_decay"])
                    value.add_(update, alpha=-group["lr"] * scale)

    def _momentum(self, value: torch.Tensor, momentum: float) -> torch.Tensor:
        gradient = value.grad
        if gradient is None:
            raise ValueError("Muon needs a gradient for every one of its matrices; call backward() first.")
        state = self.state[value]
        if not state:
            state["momentum"] = torch.zeros_like(value)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of a stack of matrices near 1, by five Newton-Schulz iterations."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x
