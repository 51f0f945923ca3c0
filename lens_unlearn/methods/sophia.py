"""Sophia: a clipped second-order optimizer for a list of tensors that are changed in place.

With m the mean of the gradients and h that of the diagonal of the curvature, at step t

    m_t = b1 m_(t-1) + (1 - b1) g_t
    h_t = b2 h_(t-k) + (1 - b2) estimate_t    every k steps, else h_(t-1)
    x_t = x_(t-1) - lr w a - lr clip(m_t / max(rho h_t, eps), 1)

after Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training" (arXiv 2305.14342).
The code that SIMU builds on updates m twice a step, takes the squared gradient of the unlearning loss as curvature at every
step, and scales it by a constant batch of 5,120: there nearly every coordinate is clipped, and what is left is the sign of m.
No library was found that has the Gauss-Newton-Bartlett estimate with sampled labels and takes the estimate as an argument.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lens_unlearn.core.errors import LensUnlearnError

__all__ = ["Sophia"]


class Sophia:
    """The state of one optimization: m and h for every tensor, nothing else.

    Args:
        tensors: What is optimized; changed in place.
        lr: The largest change of a coordinate in a step.
        betas: b1 of the gradients' mean, and b2 of the curvature's.
        rho: Coordinates whose abs(m) is above rho h are clipped.
        eps: The smallest denominator.
        weight_decay: w. It pulls to zero: for updates of weights, to the weights as they were.
        base: If given, what each tensor is added to, and a = base + x: decay as on edited weights. Default: a = x.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        *,
        lr: float,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.05,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        base: Sequence[Tensor] | None = None,
    ) -> None:
        if lr <= 0 or rho <= 0 or eps <= 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise LensUnlearnError(
                f"lr={lr:g}, betas={betas}, rho={rho:g}, eps={eps:g}, weight_decay={weight_decay:g}: the first and the last "
                "two but one must be positive, betas in [0, 1), and the decay not negative"
            )
        self.tensors = list(tensors)
        self.lr, self.betas, self.rho, self.eps, self.weight_decay = lr, betas, rho, eps, weight_decay
        self.base = None if base is None else list(base)
        self.m = [torch.zeros_like(x) for x in self.tensors]
        self.h = [torch.zeros_like(x) for x in self.tensors]
        self.clipped = float("nan")
        """Share of the coordinates clipped in the last step: near 1, the update is the sign of m."""

    @torch.no_grad()
    def curve(self, estimates: Sequence[Tensor]) -> None:
        """Take in an estimate of the curvature's diagonal; what is negative in it is floored at the step."""
        for h, estimate in zip(self.h, estimates, strict=True):
            h.mul_(self.betas[1]).add_(estimate, alpha=1 - self.betas[1])

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Change the tensors by one step."""
        clipped = total = 0
        for place, (x, g, m, h) in enumerate(zip(self.tensors, gradients, self.m, self.h, strict=True)):
            m.mul_(self.betas[0]).add_(g, alpha=1 - self.betas[0])
            ratio = m / (self.rho * h).clamp_min(self.eps)
            clipped += int((ratio.abs() >= 1).sum())
            total += ratio.numel()
            if self.weight_decay:
                decayed = x if self.base is None else x + self.base[place]
                x.sub_(decayed, alpha=self.lr * self.weight_decay)
            x.sub_(ratio.clamp_(-1, 1), alpha=self.lr)
        self.clipped = clipped / max(1, total)

    def state(self) -> dict[str, Tensor]:
        """Return m and h, to be written to a file."""
        return {f"{name}/{i}": one for name, ones in (("m", self.m), ("h", self.h)) for i, one in enumerate(ones)}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""
        for name, ones in (("m", self.m), ("h", self.h)):
            for i, one in enumerate(ones):
                one.copy_(state[f"{name}/{i}"])
