"""The objectives of unlearning: what is minimized on the forget rows, the curvature of a loss, and gradient clipping.

Knows the logits and losses of answer tokens, and the tensors that are trained. Knows nothing of optimizers, of the order of
batches, or of where in a model the tensors act.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils import get_total_norm

from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.evaluation.answer_losses import Answers, gradients_of
from lens_unlearn.model.host import Model

__all__ = [
    "LOSSES",
    "clip_norm",
    "curvature_of",
    "forget_term",
    "refusals",
]

LOSSES = ("graddiff", "npo", "po", "gradient_ascent")
_POSITIONS = 16  # for which labels are drawn at a time: it takes two tables of float64 over the vocabulary


def refusals(corpus: Corpus, model: Model, text: str) -> Corpus:
    """Return the prompts of a corpus, each with a refusal as its answer.

    Raises:
        CorpusError: If the corpus has no prompts, the refusal has no token, or a prompt with it exceeds the context window.
    """
    if not corpus.has_prompts:
        raise CorpusError(f"{corpus.name} has no prompts to refuse: read it as 'question>answer'")
    chat = corpus.asked is not None  # there, a turn begins without a space, and ends with a token of its own
    words = text.strip() if chat else " " + text.strip()
    ids = list(model.tokenizer(words, add_special_tokens=False)["input_ids"])
    end = [corpus.answer_eos] if chat and corpus.answer_eos is not None else []
    refusal = torch.tensor(ids + end, dtype=torch.int32)
    rows = [torch.cat([corpus.prompt(row).int(), refusal]) for row in range(corpus.n_rows)]
    lengths = torch.tensor([len(row) for row in rows])
    if not len(refusal) or int(lengths.max()) > int(model.cfg.n_ctx):
        raise CorpusError(f"the refusal {text!r} has {len(refusal)} tokens: too few, or too many behind these prompts")
    counted = [torch.arange(len(row)) >= len(row) - len(refusal) for row in rows]
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    return replace(
        corpus,
        name=f"refusals of {corpus.name}",
        tokens=torch.cat(rows),
        counted=torch.cat(counted),
        starts=starts,
        asked=None,
    )


def forget_term(
    loss: str, answers: Answers, *, floor: float, beta: float = 1.0, before: Float[Tensor, "rows"] | None = None
) -> Float[Tensor, ""]:
    r"""Return what is minimized on the forget rows, with L_i the mean loss of row i, in nats per answer token.

    - "graddiff", "gradient_ascent": -mean min(L_i, floor), weighted by tokens: a row above the floor has no gradient.
    - "npo": (2 / beta) mean(-log sigmoid(beta (L_i - L_i of the reference))), the reference being the unedited model, whose
      L_i are `before`; per-token means, not sums, so that beta means the same for short and long answers.
    - "po": the loss of the refusal.
    """
    if loss == "po":
        return answers.loss
    row_losses, n_tokens = answers.per_row()
    if loss == "npo":
        assert before is not None
        # The log ratio of NPO's paper is summed over an answer's tokens, and grows with their number: the sigmoid of a long
        # answer saturates, and its gradient vanishes, after a small change per token, while short answers are still pushed.
        # With means, the push on every row fades as its loss per token rises, on the same scale of 1 / beta nats.
        return -(2 / beta) * F.logsigmoid(beta * (row_losses - before))[n_tokens > 0].mean()
    # -L has no minimum: without the floor, rows that are forgotten already would be pushed on, and their growing losses would
    # outweigh the retain term, at the cost of everything else. At the loss of facts never seen, more forgetting gains nothing.
    return -(row_losses.clamp(max=floor) * n_tokens).sum() / n_tokens.sum()


def curvature_of(
    estimate: str, answers: Sequence[Answers], tensors: Sequence[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """Estimate the diagonal of the Hessian of the mean loss over some answer tokens.

    - "gnb" (Gauss-Newton-Bartlett): labels y drawn from the model's own distribution, B of them; B g * g, with g the
      gradient of the mean loss of y. Never negative.
    - "hutchinson": u * (H u), u of random signs; may be negative.
    """
    logits = torch.cat([part.logits for part in answers])
    if estimate == "gnb":
        # With the true labels, g * g would be the empirical Fisher, which is no estimate of the curvature: near a minimum it
        # vanishes. Bartlett's identity, by which E[B g * g] is the Gauss-Newton diagonal, needs labels of the model's own.
        with torch.no_grad():
            labels = torch.cat([_draw_labels(part, generator) for part in logits.split(_POSITIONS)])
        gradients = gradients_of(F.cross_entropy(logits, labels), tensors)
        return [len(labels) * gradient.square() for gradient in gradients]
    target = torch.cat([part.target for part in answers])
    first = torch.autograd.grad(F.cross_entropy(logits, target), tensors, create_graph=True, materialize_grads=True)
    signs = [(torch.randint(0, 2, x.shape, generator=generator) * 2 - 1).to(x) for x in tensors]
    along = torch.stack([(gradient * sign).sum() for gradient, sign in zip(first, signs, strict=True)]).sum()
    return [sign * product for sign, product in zip(signs, gradients_of(along, tensors), strict=True)]


def _draw_labels(logits: Float[Tensor, "n vocabulary"], generator: torch.Generator) -> Int[Tensor, "n"]:
    """Draw labels from the model's own distribution, by the Gumbel trick: argmax(log p - log(-log u)) is a draw from p."""
    # Unlike with `torch.multinomial`, the randomness is uniform noise from a generator on the CPU: a seed means the same labels
    # on every device, and a resumed training draws those of an uninterrupted one. In float64, since rare labels are drawn by
    # the tails of the noise, and in float32 no uniform number lies between 0 and 6e-8.
    noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
    return (logits.double() - noise.clamp_min_(1e-300).log_().neg_().log_()).argmax(1)


def clip_norm(gradients: Sequence[Tensor], max_norm: float | None) -> list[Tensor]:
    """Return gradients scaled down so that their norm, over all tensors together, is at most `max_norm`; None for never.

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
    return [gradient * scale.to(gradient.device) for gradient in gradients]
