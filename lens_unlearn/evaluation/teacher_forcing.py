"""Teacher forcing: what a model says of each token of a text when the tokens before it are the text's own.

The one place where a model is asked for logits of texts: `predict` runs a batch, `Outcome` reads every quantity out of the
logits that a metric may need. Knows batches and logits; knows nothing of what the quantities are summed up to.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.corpora.corpus import Answer, Batch, Corpus
from lens_unlearn.corpora.reading import tokenize
from lens_unlearn.interventions.base import Intervention, acting
from lens_unlearn.model.finite import broken_logits, refuse_broken
from lens_unlearn.model.host import Model, device_of
from lens_unlearn.model.special_tokens import bos_token, tokenizer_of

__all__ = [
    "Forced",
    "Outcome",
    "Predicted",
    "accuracy",
    "force",
    "outcomes",
    "predict",
    "recalled",
    "require_finite",
    "split_rows",
    "with_answers",
]

_CHUNK = 1024  # positions whose full distribution is held at a time
FLOOR = 1e-6  # of the variance of log probabilities, as in the released Min-K%++


@dataclass(frozen=True)
class Predicted:
    """The logits of the tokens of a batch that a model predicts: counted ones with a token before them."""

    logits: Float[Tensor, "n vocabulary"]
    target: Int[Tensor, "n"]
    row: Int[Tensor, "n"]
    """Which row of the batch each token is of."""
    abstained: Bool[Tensor, "rows"]
    """Which rows an intervention abstained from."""


def predict(model: Model, batch: Batch, *, last: bool = True) -> Predicted:
    """Run a model on a batch, with gradients where they are enabled, and pick the logits of its counted tokens.

    Args:
        model: The model, with whatever acts on it.
        batch: The rows.
        last: Whether the last token of the longest rows is run too. Nothing is predicted from it, but an intervention may judge a
            row by it; without it, rows may be one token longer than the context.
    """
    width = batch.tokens.shape[1] - (not last)
    # A batch is padded with token 0, which may be a token of text: interventions that look at rows have to know where they end.
    for live in acting(model):
        live.expect(batch.prompt_ends.clamp_max(width - 1), lengths=batch.lengths.clamp_max(width))
    where = batch.counted[:, 1:]
    logits = model(batch.tokens[:, :width].to(device_of(model)), return_type="logits")[:, : where.shape[1]]
    picked = logits[where.to(logits.device)]
    silent = torch.zeros(len(batch.tokens), dtype=torch.bool)
    for live in acting(model):
        silent |= live.abstained.cpu()
    target, row = batch.tokens[:, 1:][where], where.nonzero()[:, 0]
    return Predicted(picked, target.to(picked.device), row.to(picked.device), silent)


def require_finite(model: Model, batch: Batch, predicted: Predicted) -> None:
    """Refuse a model whose logits for a batch hold NaN or infinity.

    Raises:
        ActivationError: If so; names the layer.
    """
    broken = broken_logits(predicted.logits)
    if bool(broken.any()):
        row = int(predicted.row[broken.nonzero()[0, 0]])
        refuse_broken(model, batch.tokens[row, : min(int(batch.lengths[row]), int(model.cfg.n_ctx))])


class Outcome:
    """What logits say of some targets; each quantity is computed when it is first asked for, and once.

    Args:
        logits: Of the model that is measured.
        target: The tokens that come next.
        reference: Logits of the unedited model at the same places, for `kl`.
    """

    def __init__(
        self, logits: Float[Tensor, "n v"], target: Int[Tensor, "n"], reference: Float[Tensor, "n v"] | None = None
    ) -> None:
        self.logits, self.target = logits.float(), target
        self.reference = reference

    @cached_property
    def _own(self) -> Float[Tensor, "n 1"]:
        return self.logits.gather(1, self.target[:, None])

    @cached_property
    def _log_sum(self) -> Float[Tensor, "n"]:
        return self.logits.logsumexp(1)

    @cached_property
    def _above(self) -> Int[Tensor, "n"]:
        return (self.logits > self._own).sum(1)

    @cached_property
    def _tied(self) -> Int[Tensor, "n"]:
        return (self.logits == self._own).sum(1)

    @property
    def loss(self) -> Float[Tensor, "n"]:
        """Negative log probability of the target, in nats."""
        return self._log_sum - self._own[:, 0]

    @property
    def top1(self) -> Float[Tensor, "n"]:
        """1 where the target is the most probable token; ties share the place."""
        return self._among(1)

    @property
    def top10(self) -> Float[Tensor, "n"]:
        """1 where the target is one of the ten most probable tokens; ties share the places."""
        return self._among(10)

    def _among(self, places: int) -> Float[Tensor, "n"]:
        # Some places are left for `tied` equal candidates: each gets an equal share, so constant logits earn k / vocabulary.
        return ((places - self._above) / self._tied.clamp_min(1)).clamp(0, 1)

    @property
    def right(self) -> Float[Tensor, "n"]:
        """1 where the target's logit is above all others. A tie is not right: constant logits predict nothing."""
        return ((self._above == 0) & (self._tied == 1)).float()

    @property
    def kl(self) -> Float[Tensor, "n"]:
        """KL(reference || logits) in nats; 0 without a reference."""
        if self.reference is None:
            return torch.zeros_like(self._log_sum)
        base = self.reference.float().log_softmax(1)
        terms = base.exp() * (base - self.logits + self._log_sum[:, None])
        return terms.masked_fill(base == float("-inf"), 0).sum(1)  # what the base cannot say adds nothing

    @property
    def z_score(self) -> Float[Tensor, "n"]:
        """(log p(target) - mu) / sigma, as Min-K%++ has it.

        mu and sigma^2 are the mean and variance of the log probability under the model's own distribution; sigma^2 >= 1e-6.
        """
        log_p = self.logits.log_softmax(1)
        p = log_p.exp()
        shifted = log_p.masked_fill(p == 0, 0)  # what the model cannot say adds nothing
        mean = (p * shifted).sum(1)
        variance = (p * (shifted - mean[:, None]).square()).sum(1)
        return (log_p.gather(1, self.target[:, None])[:, 0] - mean) / variance.clamp_min(FLOOR).sqrt()

    def table(self, quantities: Sequence[str]) -> Float[Tensor, "n quantities"]:
        """Return some quantities side by side, NaN where the logits are not finite."""
        columns = torch.stack([getattr(self, name) for name in quantities], dim=1)
        return columns.masked_fill(~torch.isfinite(self._log_sum)[:, None], float("nan"))


def outcomes(
    predicted: Predicted, quantities: Sequence[str], reference: Float[Tensor, "n v"] | None = None
) -> Float[np.ndarray, "n quantities"]:
    """Read quantities out of the logits of a batch, a few positions at a time, in float64."""
    if not len(predicted.target):
        return np.zeros((0, len(quantities)))
    beside = [None] * len(predicted.logits) if reference is None else reference.split(_CHUNK)
    chunks = zip(predicted.logits.split(_CHUNK), predicted.target.split(_CHUNK), beside)
    return torch.cat([Outcome(*chunk).table(quantities) for chunk in chunks]).double().cpu().numpy()


Forced = dict[str, np.ndarray]
"""Quantities of the predicted tokens of one row, in their order: [tokens] each."""


def split_rows(predicted: Predicted, table: np.ndarray, quantities: Sequence[str]) -> Iterator[Forced]:
    """Give each row of a batch the quantities of its tokens."""
    counts = torch.bincount(predicted.row, minlength=len(predicted.abstained)).cumsum(0).tolist()
    for part in np.split(table, counts[:-1]):
        yield dict(zip(quantities, part.T, strict=True))


def force(
    model: Model,
    corpus: Corpus,
    intervention: Intervention | None,
    batch_size: int,
    bar: Any,
    quantities: Sequence[str] = ("loss", "right"),
) -> list[Forced]:
    """Run every row of a corpus once, and return what is said of its counted tokens that have a token before them."""
    forced: dict[int, Forced] = {}
    with nullcontext() if intervention is None else intervention.on(model), torch.no_grad():
        for batch in corpus.batches(batch_size):
            predicted = predict(model, batch)
            if intervention is None and not acting(model):
                require_finite(model, batch, predicted)
            rows = split_rows(predicted, outcomes(predicted, quantities), quantities)
            forced |= zip(batch.rows.tolist(), rows, strict=True)
            bar.update(len(batch.rows))
    return [forced[row] for row in range(corpus.n_rows)]


def accuracy(model: Model, corpus: Corpus, batch_size: int) -> tuple[float, float]:
    """Return the share of a corpus' counted tokens that are the single most probable one, and their mean loss in nats.

    Raises:
        CorpusError: If nothing in it is predicted.
    """
    with tqdm(disable=True) as silent:
        rows = force(model, corpus, None, batch_size, silent)
    right, loss = (np.concatenate([row[name] for row in rows]) for name in ("right", "loss"))
    _require_tokens(len(right), corpus)
    return float(right.mean()), float(loss.mean())


def recalled(
    model: Model, corpus: Corpus, batch_size: int
) -> tuple[Float[np.ndarray, "documents"], Float[np.ndarray, "documents"]]:
    """Return of each document how many counted tokens are the single most probable one, and how many are predicted.

    Raises:
        CorpusError: If nothing in it is predicted.
    """
    with tqdm(disable=True) as silent:
        rows = force(model, corpus, None, batch_size, silent, ("right",))
    document = corpus.document.numpy()
    right, tokens = (
        np.bincount(document, [float(of(row["right"])) for row in rows], corpus.n_documents) for of in (np.sum, len)
    )
    _require_tokens(int(tokens.sum()), corpus)
    return right, tokens


def _require_tokens(predicted: int, corpus: Corpus) -> None:
    if not predicted:
        raise CorpusError(f"nothing in {corpus.name} can be predicted: no counted token has a token before it")


def with_answers(model: Model, corpus: Corpus, answers: Sequence[tuple[Answer, str]]) -> tuple[Corpus, list[int]]:
    """Join answers to the prompts of others, in the template that these were read with, and with the same end.

    Args:
        model: Whose tokenizer to use.
        corpus: Where the prompts come from; says the window, and whether rows begin with BOS.
        answers: A true answer, whose prompt is meant, and what is to stand in its place.

    Returns:
        A corpus with one row for each that fits the window and has a token that its prompt predicts, and which these are.

    Raises:
        CorpusError: If none does, or the model has no tokenizer.
    """
    tokenizer = tokenizer_of(model, "answers cannot be put to it")
    texts, begins = [true.head + text for true, text in answers], [len(true.head) for true, _ in answers]
    bos = bos_token(model, corpus.prepend_bos)
    head = [] if bos is None else [bos]
    window = min(corpus.window, int(model.cfg.n_ctx))
    rows, masks, fitting = [], [], []
    for number, (ids, counted) in enumerate(tokenize(tokenizer, texts, begins, bos, corpus.answer_eos)):
        mask = [False] * len(head) + counted
        if len(mask) <= window and any(mask[1:]):
            rows.append(head + ids)
            masks.append(mask)
            fitting.append(number)
    if not fitting:
        raise CorpusError(f"no answer of {corpus.name} fits its window of {window} tokens")
    joined = replace(
        corpus,
        tokens=torch.tensor([token for row in rows for token in row], dtype=torch.int32),
        counted=torch.tensor([counts for mask in masks for counts in mask]),
        starts=torch.tensor([0, *map(len, rows)]).cumsum(0),
        document=torch.arange(len(rows)),
        keys=tuple(map(str, fitting)),
        answers=(),
        groups=(),
        asked=None,
    )
    return joined, fitting
