"""Teacher forcing: what a model says of each token of a text when the tokens before it are the text's own."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.corpora.corpus import Answer, Batch, Corpus
from lens_unlearn.corpora.reading import tokenize
from lens_unlearn.interventions.base import Intervention, acting
from lens_unlearn.model.host import Model, device_of

__all__ = ["Forced", "expect", "force", "prompt_ends", "with_answers"]

_CHUNK = 1024  # positions whose full distribution is held at a time
FLOOR = 1e-6  # of the variance of log probabilities, as in the released Min-K%++


@dataclass(frozen=True)
class Forced:
    """What a model says of the predicted tokens of one row, in their order. NaN where its logits are not finite."""

    loss: np.ndarray
    """[tokens] negative log probability, in nats."""
    right: np.ndarray
    """[tokens] 1 where the token's logit is above all others, else 0. A tie is not right: constant logits predict nothing."""
    score: np.ndarray
    """[tokens] (log p(token) - mu) / sigma, with mu and sigma^2 the mean and variance of the log probability under the model's own
    distribution, and sigma^2 at least 1e-6; as Min-K%++ has it."""


def prompt_ends(batch: Batch, corpus: Corpus) -> Int[Tensor, "batch"]:
    """Return where each row's prompt ends: at its last token, where all of it counts."""
    lengths = corpus.starts.diff()[batch.rows]
    first = torch.where(batch.counted.any(1), batch.counted.int().argmax(1), lengths)
    return torch.where(first > int(corpus.prepend_bos), first, lengths) - 1


def expect(model: Model, batch: Batch, corpus: Corpus) -> None:
    """Tell what acts on the model where the prompts and the texts of a batch end: its padding is no token of the tokenizer's."""
    for live in acting(model):
        live.expect(prompt_ends(batch, corpus), lengths=corpus.starts.diff()[batch.rows])


def force(model: Model, corpus: Corpus, intervention: Intervention | None, batch_size: int, bar: Any) -> list[Forced]:
    """Run every row of a corpus once, and return what is said of its counted tokens that have a token before them."""
    forced: dict[int, Forced] = {}
    device = device_of(model)
    with nullcontext() if intervention is None else intervention.on(model), torch.no_grad():
        for batch in corpus.batches(batch_size):
            expect(model, batch, corpus)
            logits = model(batch.tokens.to(device), return_type="logits")[:, :-1]
            where = batch.counted[:, 1:]
            targets = batch.tokens[:, 1:][where].to(logits.device)
            parts = zip(logits[where.to(logits.device)].split(_CHUNK), targets.split(_CHUNK), strict=True)
            told = torch.cat([_outcomes(*part) for part in parts]).double().cpu()
            for row, part in zip(batch.rows.tolist(), told.split(where.sum(1).tolist()), strict=True):
                forced[row] = Forced(*part.numpy().T)
            bar.update(len(batch.rows))
    return [forced[row] for row in range(corpus.n_rows)]


def _outcomes(logits: Float[Tensor, "n v"], target: Int[Tensor, "n"]) -> Float[Tensor, "n 3"]:
    """Give the loss, whether it is right, and the Min-K%++ score of each position."""
    logits = logits.float()
    own = logits.gather(1, target[:, None])
    right = (logits >= own).sum(1) == 1
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    shifted = log_p.masked_fill(p == 0, 0)  # what the model cannot say adds nothing
    mean = (p * shifted).sum(1)
    variance = (p * (shifted - mean[:, None]).square()).sum(1)
    told = log_p.gather(1, target[:, None])[:, 0]
    columns = torch.stack([-told, right.float(), (told - mean) / variance.clamp_min(FLOOR).sqrt()], dim=1)
    return columns.masked_fill(~torch.isfinite(logits.logsumexp(1))[:, None], float("nan"))


def with_answers(model: Model, corpus: Corpus, answers: Sequence[tuple[Answer, str]]) -> tuple[Corpus, list[int]]:
    """Join answers to the prompts of others, in the template that these were read with.

    Args:
        model: Whose tokenizer to use.
        corpus: Where the prompts come from; says the window, and whether rows begin with BOS.
        answers: A true answer, whose prompt is meant, and what is to stand in its place.

    Returns:
        A corpus with one row for each that fits the window and has a token that its prompt predicts, and which these are.

    Raises:
        CorpusError: If none does, or the model has no tokenizer.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise CorpusError("this model has no tokenizer: answers cannot be put to it")
    texts, begins = [true.head + text for true, text in answers], [len(true.head) for true, _ in answers]
    head = [tokenizer.bos_token_id] if corpus.prepend_bos else []
    window = min(corpus.window, int(model.cfg.n_ctx))
    rows, masks, kept = [], [], []
    for number, (ids, counted) in enumerate(tokenize(tokenizer, texts, begins)):
        mask = [False] * len(head) + counted
        if len(mask) <= window and any(mask[1:]):
            rows.append(head + ids)
            masks.append(mask)
            kept.append(number)
    if not kept:
        raise CorpusError(f"no answer of {corpus.name} fits its window of {window} tokens")
    joined = replace(
        corpus,
        tokens=torch.tensor([token for row in rows for token in row], dtype=torch.int32),
        counted=torch.tensor([yes for mask in masks for yes in mask]),
        starts=torch.tensor([0, *map(len, rows)]).cumsum(0),
        document=torch.arange(len(rows)),
        keys=tuple(map(str, kept)),
        answers=(),
    )
    return joined, kept
