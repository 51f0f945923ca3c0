"""The answers of a batch with gradients: what training an update, or fine-tuning a model again, reads at each step.

Knows of teacher forcing and of the order in which rows are taken; knows nothing of objectives or optimizers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_unlearn.core.counter_rng import key_of
from lens_unlearn.corpora.corpus import Batch, Corpus
from lens_unlearn.evaluation.teacher_forcing import Predicted, predict
from lens_unlearn.model.host import Model

__all__ = ["Answers", "add_gradients", "gradients_of", "read_answers", "rows_at", "take_gradients"]


@dataclass(frozen=True)
class Answers:
    """What a model gives the answer tokens of some rows."""

    predicted: Predicted
    rows: int

    @cached_property
    def nll(self) -> Float[Tensor, "n"]:
        """The negative log-likelihood of each answer token, in nats; computed when it is first asked for."""
        return self.predicted.nll()

    @property
    def logits(self) -> Float[Tensor, "n vocabulary"]:
        """All logits at once, in float32 at least."""
        return self.logits_of(slice(None))

    def logits_of(self, part: slice) -> Float[Tensor, "part vocabulary"]:
        """Return the logits of some of the answer tokens, in float32 at least."""
        logits = self.predicted.logits(part)
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    @property
    def target(self) -> Int[Tensor, "n"]:
        """The answer tokens."""
        return self.predicted.target

    @property
    def loss(self) -> Float[Tensor, ""]:
        """Mean negative log-likelihood per answer token, in nats."""
        return self.nll.mean()

    def per_row(self) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
        """Return each row's mean negative log-likelihood per answer token, and its number of answer tokens."""
        count = torch.zeros(self.rows, dtype=self.nll.dtype, device=self.nll.device)
        count = count.index_add(0, self.predicted.row, torch.ones_like(self.nll))
        total = torch.zeros_like(count).index_add(0, self.predicted.row, self.nll)
        return total / count.clamp_min(1), count


def read_answers(model: Model, batch: Batch, *, twice: bool = False, recompute: bool = False) -> Answers:
    """Run a model on a batch of rows and look at its counted tokens, teacher-forced, with gradients where they are enabled.

    Args:
        model: The model.
        batch: The rows.
        twice: Whether gradients will be differentiated once more.
        recompute: As in `predict`.
    """
    return Answers(predict(model, batch, twice=twice, recompute=recompute), len(batch.tokens))


def rows_at(corpus: Corpus, step: int, size: int, seed: int) -> Batch:
    """Return the batch of a step: rows without replacement until all were had, then in another order.

    It depends on the step and the seed alone, so that a training can go on where it was interrupted.
    """
    size = min(size, corpus.n_rows)
    epochs = range(step * size // corpus.n_rows, ((step + 1) * size - 1) // corpus.n_rows + 1)
    seeds = {epoch: torch.Generator().manual_seed(key_of("rows", seed, epoch) % 2**63) for epoch in epochs}
    orders = torch.cat([torch.randperm(corpus.n_rows, generator=seeds[epoch]) for epoch in epochs])
    begin = step * size - epochs[0] * corpus.n_rows
    return corpus.take(list(dict.fromkeys(orders[begin : begin + size].tolist())))


def gradients_of(value: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients for these tensors and no others: none is kept in any parameter."""
    return list(torch.autograd.grad(value, list(tensors), materialize_grads=True))


def add_gradients(value: Tensor, tensors: Sequence[Tensor]) -> None:
    """Add the gradients of a value for these leaf tensors, and no others, to what `take_gradients` will return.

    Those of several values, one after the other, take the memory of one, and so do the activations behind them.
    """
    if value.requires_grad:
        torch.autograd.backward(value, inputs=list(tensors))


def take_gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return what was added by `add_gradients`, zeros where there was nothing, and leave nothing in the tensors."""
    gradients = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    return gradients
