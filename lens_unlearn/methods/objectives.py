"""What a training of updates is made of: batches in a fixed order, the loss of answers, and the objectives of unlearning."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

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
_ROWS = 16  # positions for which labels are drawn at a time: it takes two tables of float64 over the vocabulary


def refusals(corpus: Corpus, model: Model, text: str) -> Corpus:
    """Return the prompts of a corpus, each with a refusal as its answer.

    Raises:
        CorpusError: If the corpus has no prompts, or the refusal is no token, or too long for the window.
    """
    if not corpus.has_prompts:
        raise CorpusError(f"{corpus.name} has no prompts to refuse: read it as 'question>answer'")
    words = torch.tensor(model.tokenizer(" " + text.strip(), add_special_tokens=False)["input_ids"], dtype=torch.int32)
    rows = [torch.cat([corpus.prompt(row).int(), words]) for row in range(corpus.n_rows)]
    lengths = torch.tensor([len(row) for row in rows])
    if not len(words) or int(lengths.max()) > int(model.cfg.n_ctx):
        raise CorpusError(f"the refusal {text!r} has {len(words)} tokens: too few, or too many behind these prompts")
    counted = [torch.arange(len(row)) >= len(row) - len(words) for row in rows]
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    return replace(
        corpus, name=f"refusals of {corpus.name}", tokens=torch.cat(rows), counted=torch.cat(counted), starts=starts
    )


def forget_term(
    loss: str, found: Answers, *, floor: float, beta: float = 1.0, before: Float[Tensor, "rows"] | None = None
) -> Float[Tensor, ""]:
    r"""Return what is minimized on the forget rows, L_i being a row's mean loss per answer token.

    - "graddiff", "gradient_ascent": -mean min(L_i, floor), weighted by tokens: a row that is forgotten pushes no further.
    - "npo": (2 / beta) mean(-log sigmoid(beta (L_i - L_i of the unedited model))); per-token means, not sums, so that beta
      means the same for short and long answers.
    - "po": the loss of the refusal.
    """
    if loss == "po":
        return found.loss
    rows, count = found.per_row()
    if loss == "npo":
        assert before is not None
        return -(2 / beta) * F.logsigmoid(beta * (rows - before))[count > 0].mean()
    return -(rows.clamp(max=floor) * count).sum() / count.sum()


def curvature_of(
    estimate: str, found: Sequence[Answers], tensors: Sequence[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """Estimate the diagonal of the curvature of the mean loss over some answer tokens.

    - "gnb" (Gauss-Newton-Bartlett): labels y drawn from the model's own distribution, B of them; B g * g, with g the
      gradient of the mean loss of y.
    - "hutchinson": u * (H u), u of random signs; may be negative.
    """
    logits = torch.cat([one.logits for one in found])
    if estimate == "gnb":
        with torch.no_grad():
            drawn = torch.cat([_labels(part, generator) for part in logits.split(_ROWS)])
        gradients = gradients_of(F.cross_entropy(logits, drawn), tensors)
        return [len(drawn) * g.square() for g in gradients]
    target = torch.cat([one.target for one in found])
    first = torch.autograd.grad(F.cross_entropy(logits, target), tensors, create_graph=True, materialize_grads=True)
    signs = [(torch.randint(0, 2, x.shape, generator=generator) * 2 - 1).to(x) for x in tensors]
    along = torch.stack([(g * u).sum() for g, u in zip(first, signs, strict=True)]).sum()
    return [u * h for u, h in zip(signs, gradients_of(along, tensors), strict=True)]


def _labels(logits: Float[Tensor, "n vocabulary"], generator: torch.Generator) -> Int[Tensor, "n"]:
    """Draw from the model's own distribution, by the Gumbel trick: the largest of log p - log(-log u) is a draw from p."""
    noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
    return (logits.double() - noise.clamp_min_(1e-300).log_().neg_().log_()).argmax(1)


def clip_norm(gradients: Sequence[Tensor], largest: float | None) -> Iterator[Tensor]:
    """Scale gradients so that their norm, over all that is trained, is at most so much.

    Raises:
        LensUnlearnError: If the bound is not positive.
    """
    if largest is None:
        yield from gradients
        return
    if largest <= 0:
        raise LensUnlearnError(f"max_norm={largest:g} leaves nothing of a gradient: give a positive one, or None")
    norm = torch.stack([g.norm() for g in gradients]).norm()
    scale = (largest / norm.clamp_min(1e-30)).clamp(max=1.0)
    yield from (g * scale for g in gradients)
