"""The curvature of a loss over some answer tokens, and gradient clipping.

Knows logits, losses and the tensors that are trained. Knows nothing of what is minimized, nor of optimizers.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils import get_total_norm

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.answer_losses import Answers, add_gradients, take_gradients

__all__ = ["clip_norm", "curvature_of"]

_POSITIONS = 16  # for which labels are drawn at a time: it takes two tables of float64 over the vocabulary


def curvature_of(
    estimate: str, answers: Iterable[Answers], tensors: Sequence[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """Estimate the diagonal of the Hessian of the mean loss over some answer tokens.

    - "gnb" (Gauss-Newton-Bartlett): labels y drawn from the model's own distribution, B of them; B g * g, with g the
      gradient of the mean loss of y. Never negative.
    - "hutchinson": u * (H u), u of random signs; may be negative.

    Args:
        estimate: Which one.
        answers: The answer tokens, read one batch after the other if it is a generator, so that activations of one stand at a time.
        tensors: The leaf tensors that are trained.
        generator: Of labels or signs.
    """
    # Both are sums over tokens before they are squared or multiplied: so batches add up.
    count = 0
    if estimate == "gnb":
        # With the true labels, g * g would be the empirical Fisher, which is no estimate of the curvature: near a minimum it
        # vanishes. Bartlett's identity, by which E[B g * g] is the Gauss-Newton diagonal, needs labels of the model's own.
        for part in answers:
            add_gradients(part.predicted.of_logits(_DrawnLoss(generator)).sum(), tensors)
            count += len(part.target)
        return [gradient.square_().div_(max(1, count)) for gradient in take_gradients(tensors)]
    signs = [(torch.randint(0, 2, x.shape, generator=generator) * 2 - 1).to(x) for x in tensors]
    for part in answers:
        first = torch.autograd.grad(part.nll.sum(), tensors, create_graph=True, materialize_grads=True)
        along = [(gradient * sign).sum() for gradient, sign in zip(first, signs, strict=True)]
        add_gradients(torch.stack(along).sum(), tensors)
        count += len(part.target)
    products = take_gradients(tensors)
    return [product.mul_(sign).div_(max(1, count)) for sign, product in zip(signs, products, strict=True)]


class _DrawnLoss:
    """The losses of labels that are drawn from the model's own distribution, each once: asked again, the labels are the same."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.labels: dict[int | None, Tensor] = {}

    def __call__(self, logits: Float[Tensor, "part vocabulary"], part: slice) -> Float[Tensor, "part"]:
        """Return the loss of each token's label."""
        if part.start not in self.labels:
            pieces = logits.detach().split(_POSITIONS)
            self.labels[part.start] = torch.cat([_draw_labels(piece, self.generator) for piece in pieces])
        return F.cross_entropy(logits, self.labels[part.start], reduction="none")


def _draw_labels(logits: Float[Tensor, "n vocabulary"], generator: torch.Generator) -> Int[Tensor, "n"]:
    """Draw labels from the model's own distribution, by the Gumbel trick: argmax(log p - log(-log u)) is a draw from p."""
    # Unlike with `torch.multinomial`, the randomness is uniform noise from a generator on the CPU: a seed means the same labels
    # on every device, and a resumed training draws those of an uninterrupted one. In float64, since rare labels are drawn by
    # the tails of the noise, and in float32 no uniform number lies between 0 and 6e-8.
    noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
    return (logits.double() - noise.clamp_min_(1e-300).log_().neg_().log_()).argmax(1)


def clip_norm(gradients: Sequence[Tensor], max_norm: float | None) -> list[Tensor]:
    """Scale gradients down, in place, so that their norm over all tensors together is at most `max_norm`; None for never.

    Raises:
        LensUnlearnError: If the bound is not positive.
    """
    if max_norm is None:
        return list(gradients)
    if max_norm <= 0:
        raise LensUnlearnError(f"max_norm={max_norm:g} leaves nothing of a gradient: give a positive one, or None")
    # One tensor at a time: the fused kernels of a GPU may round differently, and a checkpoint of an earlier version of this
    # package has to go on to the same bits.
    norm = get_total_norm(gradients, foreach=False)
    scale = (max_norm / norm.clamp_min(1e-30)).clamp(max=1.0)
    return [gradient.mul_(scale.to(gradient.device)) for gradient in gradients]
