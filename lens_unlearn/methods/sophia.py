"""Sophia: a clipped second-order optimizer for a list of tensors that are changed in place.

Knows tensors, their gradients and estimates of the Hessian's diagonal. Knows nothing of models or losses: who calls it
computes both, and says when there is a new estimate.

With m the exponential moving average (EMA) of the gradients and h that of the Hessian's diagonal, at step t

    m_t = b1 m_(t-1) + (1 - b1) g_t
    h_t = b2 h_(t-k) + (1 - b2) estimate_t    every k steps, else h_(t-1)
    x_t = x_(t-1) - lr w a - lr clip(m_t / max(rho h_t, eps), 1)

after Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training" (arXiv 2305.14342).
The code that SIMU builds on updates m twice a step, takes the squared gradient of the unlearning loss as curvature at every
step, and scales it by a constant batch of 5,120: there nearly every coordinate is clipped, and the step is the sign of m.
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
        lr: The largest change of a coordinate in a step, decay apart.
        betas: b1 of the gradients' EMA, and b2 of the Hessian's.
        rho: Coordinates with abs(m) at least rho h are clipped.
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
        self.m = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.h = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.clipped = float("nan")
        """Share of the coordinates clipped in the last step: near 1, the update is the sign of m."""

    @torch.no_grad()
    def curve(self, estimates: Sequence[Tensor]) -> None:
        """Take an estimate of the Hessian's diagonal into the EMA; where that is negative, `step` takes eps."""
        # One estimate is that of a few rows and one draw of labels (or signs): its noise is about as large as itself, and the
        # EMA averages it out. Between estimates h stays as it is: curvature changes slowly, and each estimate costs forward and
        # backward passes of its own, so one in k steps makes a second-order step about as cheap as a first-order one.
        for h, estimate in zip(self.h, estimates, strict=True):
            h.mul_(self.betas[1]).add_(estimate, alpha=1 - self.betas[1])

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Change the tensors by one step."""
        clipped = total = 0
        for place, (x, gradient, m, h) in enumerate(zip(self.tensors, gradients, self.m, self.h, strict=True)):
            m.mul_(self.betas[0]).add_(gradient, alpha=1 - self.betas[0])
            # m / h is Newton's step, right only where h is: of an estimate that is near 0, negative (Hutchinson's, where the
            # loss is not convex) or out of date it would be huge, or uphill. So h is floored at eps and each coordinate clipped
            # to 1: where the curvature cannot be trusted, the step is that of sign descent with momentum, never above lr.
            # rho sets where one becomes the other: the larger, the fewer coordinates are clipped (`clipped` counts them).
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
        return {f"{name}/{i}": average for name, averages in self._averages() for i, average in enumerate(averages)}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""
        for name, averages in self._averages():
            for i, average in enumerate(averages):
                average.copy_(state[f"{name}/{i}"])

    def _averages(self) -> tuple[tuple[str, list[Tensor]], ...]:
        return (("m", self.m), ("h", self.h))
