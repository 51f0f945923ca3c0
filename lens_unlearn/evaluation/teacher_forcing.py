"""Teacher forcing: what a model says of each token of a text when the tokens before it are the text's own.

The one place where a model is asked for logits of texts: `predict` runs a batch, `Outcome` reads every quantity out of the
logits that a metric may need. Knows batches and logits; knows nothing of what the quantities are summed up to.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.core.progress import Bar
from lens_unlearn.corpora.batching import rows_at_once
from lens_unlearn.corpora.corpus import Answer, Batch, Corpus
from lens_unlearn.corpora.reading import tokenize
from lens_unlearn.interventions.base import Intervention, acting, only_constants, with_constants
from lens_unlearn.model.finite import refuse_broken
from lens_unlearn.model.hooks import Remover, backbone, detach_all, logit_functions
from lens_unlearn.model.host import Model
from lens_unlearn.model.recompute import recomputing
from lens_unlearn.model.replay import Prefix
from lens_unlearn.model.residual import on_residual
from lens_unlearn.model.shortcuts import shortcuts
from lens_unlearn.model.special_tokens import bos_token, tokenizer_of
from lens_unlearn.model.unembedding import AT_ONCE, READ, Unembedding, knows_its_end, unembedding

__all__ = [
    "Forced",
    "Outcome",
    "Predicted",
    "accuracy",
    "force",
    "joined_rows",
    "outcomes",
    "predict",
    "predict_found",
    "recalled",
    "require_finite",
    "split_rows",
    "with_answers",
]

_IN_CACHE = 2**20
"""Logits that are read at a time on a processor: what is made of them stays in its caches."""
_BESIDE = 3
"""Models whose logits stand beside those of the unedited one, of which what is read then serves them all."""
_BLOCK = 256
"""Logits of which the largest is found first."""
_PLACES = 10
"""Up to this place the rank of a target matters."""
FLOOR = 1e-6  # of the variance of log probabilities, as in the released Min-K%++


@dataclass(frozen=True)
class Predicted:
    """The tokens of a batch that a model predicts, which are the counted ones with a token before them, and their logits."""

    hidden: Float[Tensor, "n width"]
    """What the model's unembedding is given."""
    target: Int[Tensor, "n"]
    row: Int[Tensor, "n"]
    """Which row of the batch each token is of."""
    abstained: Bool[Tensor, "rows"]
    """Which rows an intervention abstained from."""
    end: Unembedding
    constant: Int[Tensor, "n"] | None = None
    """Where an intervention makes logits constant, as `with_constants` takes it; None for nowhere."""

    @property
    def slices(self) -> list[slice]:
        """Cut the tokens into parts whose logits can stand at a time."""
        return self.end.parts(len(self.target), READ // self.hidden.element_size())

    def logits(self, part: slice = slice(None)) -> Float[Tensor, "n vocabulary"]:
        """Compute the logits of some of the tokens."""
        logits = self.end.logits(self.hidden[part])
        return logits if self.constant is None else with_constants(logits, self.constant[part])

    def of_logits(
        self, function: Callable[[Float[Tensor, "part vocabulary"], slice], Float[Tensor, "part"]]
    ) -> Float[Tensor, "n"]:
        """Apply a function to the logits of some tokens at a time, in float32 at least, with gradients where they are enabled.

        Args:
            function: Takes logits, and which of the tokens they are of; returns a number for each. It may be called again for the
                gradients.
        """

        def of(hidden: Tensor, part: slice) -> Tensor:
            logits = replace(
                self, hidden=hidden, constant=None if self.constant is None else self.constant[part]
            ).logits()
            return function(logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits, part)

        return torch.cat(self.end.in_parts(of, self.hidden))

    def only(self, rows: Bool[Tensor, "rows"], constant: Int[Tensor, "n"] | None = None) -> "Predicted":
        """Return the tokens of some rows, whose places are counted among these then.

        Args:
            rows: Of the batch.
            constant: Where the logits of these tokens are constant; None for where they are here.
        """
        tokens = rows[self.row]
        here = tokens.to(self.hidden.device)
        constant = constant if constant is not None or self.constant is None else self.constant[here]
        row = (rows.cumsum(0) - 1)[self.row[tokens]]
        return replace(
            self,
            hidden=self.hidden[here],
            target=self.target[here],
            row=row,
            abstained=self.abstained[rows],
            constant=constant,
        )

    def nll(self) -> Float[Tensor, "n"]:
        """Return the negative log-likelihood of each token, with gradients where they are enabled."""
        return self.of_logits(lambda logits, part: F.cross_entropy(logits, self.target[part], reduction="none"))


def predict(
    model: Model,
    batch: Batch,
    *,
    last: bool = True,
    prefix: Prefix | None = None,
    start: int = 0,
    twice: bool = False,
    recompute: bool = False,
) -> Predicted:
    """Run a model on a batch, with gradients where they are enabled, up to the logits of its counted tokens.

    Args:
        model: The model, with whatever acts on it.
        batch: The rows.
        last: Whether the last token of the longest rows is run too. Nothing is predicted from it, but an intervention may judge a
            row by it; without it, rows may be one token longer than the context.
        prefix: Where to keep what blocks give in this pass, or where that is kept.
        start: The first block that is run; what those below it give is that of `prefix`.
        twice: Whether gradients will be differentiated once more, as some estimates of curvature do: fused attention has no
            second derivative.
        recompute: Whether to hold little: what happens inside the blocks is computed again for gradients, in the block of
            `frozen`, and fewer logits stand at a time. Not where interventions look at rows, nor where gradients are
            differentiated once more.
    """
    width = batch.tokens.shape[1] - (not last)
    lives = acting(model)
    if not knows_its_end(model):  # then it is run once on other tokens, which are no text of theirs
        with ExitStack() as aside:
            for live in lives:
                aside.enter_context(live.aside())
            with unembedding(model):
                pass
    # A batch is padded with token 0, which may be a token of text: interventions that look at rows have to know where they end.
    for live in lives:
        live.expect(batch.prompt_ends.clamp_max(width - 1), lengths=batch.lengths.clamp_max(width))
    where = batch.counted[:, 1:]
    whole = any(not only_constants(live.intervention) for live in lives) or len(lives) < len(logit_functions(model))
    again = recompute and not twice and not lives
    with (
        nullcontext() if twice else shortcuts(model) as out,
        recomputing(model, out, lambda: shortcuts(model)) if again else nullcontext(),
        nullcontext() if prefix is None else prefix.acting(model, out, start),
        unembedding(model, out, whole=whole, few=recompute and not twice) as end,
    ):
        hidden = end.hidden(batch.tokens[:, :width], where)
    constant = torch.full(where.shape, -1)
    abstained = torch.zeros(len(batch.tokens), dtype=torch.bool)
    for live in lives:
        if not whole and (theirs := live.constant_at()) is not None:
            constant = torch.maximum(constant, theirs[:, : where.shape[1]].cpu())
        abstained |= live.abstained.cpu()
    target, row = batch.tokens[:, 1:][where], where.nonzero()[:, 0]
    at = constant[where].to(hidden.device) if bool((constant >= 0).any()) else None
    return Predicted(hidden, target.to(hidden.device), row.to(hidden.device), abstained, end, at)


class _Seen(BaseException):
    """Ends a forward pass behind the last layer at which a detector looks."""


def predict_found(
    model: Model, batch: Batch, intervention: Intervention, reference: Predicted, prefix: Prefix | None, start: int
) -> tuple[Bool[Tensor, "rows"], Predicted | None]:
    """Do what `predict` does under an intervention that acts in the rows alone that a detector finds, and run only these.

    Args:
        model: The model, on which nothing else acts that looks at rows.
        batch: The rows.
        intervention: With a `row_detector`.
        reference: What the unedited model says of the batch.
        prefix: As in `predict`.
        start: Likewise, of the intervention.

    Returns:
        Which rows were found, and what is said of their tokens; None if there are none. Of all others it is what the unedited model
        says.
    """
    detector = intervention.row_detector
    assert detector is not None, f"{intervention!r} finds no rows"
    last, width = max(site.layer for site, _ in detector.hooks()), batch.tokens.shape[1]

    def stop(*_: Any) -> None:
        raise _Seen

    removers: list[Remover] = []
    with detector.on(model) as live:
        try:
            on_residual(model, [last], stop, removers, output=True)
            live.expect(batch.prompt_ends.clamp_max(width - 1), lengths=batch.lengths.clamp_max(width))
            with (
                shortcuts(model) as out,
                nullcontext() if prefix is None else prefix.acting(model, out, start),
                suppress(_Seen),
            ):
                backbone(model, batch.tokens)
        finally:
            detach_all(removers)
        constant = live.constant_at()
        found = live.abstained.cpu()
    if not bool(found.any()):
        return found, None
    if detector is intervention:
        assert constant is not None, f"{detector!r} found rows, and nowhere in them"
        at = constant.cpu()[:, : width - 1][batch.counted[:, 1:]][found[reference.row]]
        part = reference.only(found, at.to(reference.hidden.device))
        return found, replace(part, abstained=torch.ones_like(part.abstained))
    with intervention.on(model):
        rows = batch.only(found)
        return found, predict(model, rows, prefix=None if prefix is None else prefix.only(found), start=start)


def joined_rows(parts: Sequence[tuple[Bool[Tensor, "rows"], Predicted]]) -> Predicted:
    """Join what is said of the rows of a batch, each of which is in one part, to what is said of the batch.

    Args:
        parts: Which rows each is of.
    """
    first = parts[0][1]
    row = torch.cat([rows.nonzero()[:, 0][part.row] for rows, part in parts])
    order = torch.argsort(row, stable=True)
    here = order.to(first.hidden.device)
    constants = [part.constant if part.constant is not None else torch.full_like(part.target, -1) for _, part in parts]
    abstained = torch.zeros(len(parts[0][0]), dtype=torch.bool)
    for which, part in parts:
        abstained[which] = part.abstained
    constant = torch.cat(constants)[here]
    return Predicted(
        torch.cat([part.hidden for _, part in parts])[here],
        torch.cat([part.target for _, part in parts])[here],
        row[order],
        abstained,
        first.end,
        constant if bool((constant >= 0).any()) else None,
    )


def require_finite(model: Model, batch: Batch, predicted: Predicted, table: Float[np.ndarray, "n quantities"]) -> None:
    """Refuse a model whose logits for a batch hold NaN or infinity, for which `outcomes` gives NaN.

    Raises:
        ActivationError: If so; names the layer.
    """
    broken = np.isnan(table).all(1)
    if broken.any():
        row = int(predicted.row[int(broken.argmax())])
        refuse_broken(model, batch.tokens[row, : min(int(batch.lengths[row]), int(model.cfg.n_ctx))])


class Outcome:
    """What logits say of some targets; each quantity is computed when it is first asked for, and once.

    Args:
        logits: Of the model that is measured.
        target: The tokens that come next.
        reference: What the unedited model says at the same places, for `kl`.
    """

    def __init__(
        self, logits: Float[Tensor, "n v"], target: Int[Tensor, "n"], reference: "Outcome | None" = None
    ) -> None:
        # float32 holds every number of the shorter types, and a processor reads and compares it several times as fast.
        self.logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        self.target, self.reference = target, reference

    @cached_property
    def _own(self) -> Tensor:
        return self.logits.gather(1, self.target[:, None])

    @cached_property
    def _log_p(self) -> Float[Tensor, "n v"]:
        return self.logits.float().log_softmax(1)

    @cached_property
    def _p(self) -> Float[Tensor, "n v"]:
        return self._log_p.exp()

    @property
    def _broken(self) -> Bool[Tensor, "n"]:
        # NaN and infinity among the logits reach the sum by which all probabilities are divided.
        return self.loss.isnan()

    @cached_property
    def _place(self) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"]]:
        """How many logits are above the target's, exactly if fewer than `_PLACES`, and how many are equal to it then."""
        # Most blocks of the vocabulary hold nothing as large, which their maximum says: a tenth of the cost of looking at all.
        whole = self.logits.shape[1] // _BLOCK * _BLOCK
        blocks = self.logits[:, :whole].unflatten(1, (-1, _BLOCK))
        highest = blocks.amax(2)
        above = (highest > self._own).sum(1)  # blocks, each of which holds one at least
        far = above >= _PLACES
        row, block = ((highest >= self._own) & ~far[:, None]).nonzero(as_tuple=True)
        near, own = blocks[row, block], self._own[row]
        rest = self.logits[:, whole:]
        larger, equal = _count(rest > self._own), _count(rest == self._own)
        larger.index_add_(0, row, _count(near > own))
        equal.index_add_(0, row, _count(near == own))
        return torch.where(far, above, larger), equal

    @property
    def _above(self) -> Int[Tensor, "n"]:
        return self._place[0]

    @property
    def _tied(self) -> Int[Tensor, "n"]:
        return self._place[1]

    @property
    def loss(self) -> Float[Tensor, "n"]:
        """Negative log probability of the target, in nats."""
        return -self._log_p.gather(1, self.target[:, None])[:, 0]

    @property
    def top1(self) -> Float[Tensor, "n"]:
        """1 where the target is the most probable token; ties share the place."""
        return self._among(1)

    @property
    def top10(self) -> Float[Tensor, "n"]:
        """1 where the target is one of the ten most probable tokens; ties share the places."""
        return self._among(_PLACES)

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
        if self.reference is None or self.reference is self:
            return torch.zeros_like(self.target, dtype=torch.float32)
        base, p = self.reference._log_p, self.reference._p
        total = torch.sub(base, self._log_p).mul_(p).sum(1)
        if bool(total.isnan().any()):  # what the base cannot say adds nothing
            total = (p * (base - self._log_p)).masked_fill(base == float("-inf"), 0).sum(1)
        return total

    @property
    def z_score(self) -> Float[Tensor, "n"]:
        """(log p(target) - mu) / sigma, as Min-K%++ has it.

        mu and sigma^2 are the mean and variance of the log probability under the model's own distribution; sigma^2 >= 1e-6.
        """
        shifted = self._log_p.masked_fill(self._p == 0, 0)  # what the model cannot say adds nothing
        mean = (self._p * shifted).sum(1)
        variance = (self._p * (shifted - mean[:, None]).square()).sum(1)
        return (-self.loss - mean) / variance.clamp_min(FLOOR).sqrt()

    def table(self, quantities: Sequence[str]) -> Float[Tensor, "n quantities"]:
        """Return some quantities side by side, NaN where the logits are not finite."""
        columns = torch.stack([getattr(self, name) for name in quantities], dim=1)
        return columns.masked_fill(self._broken[:, None], float("nan"))


def _count(flags: Bool[Tensor, "n v"]) -> Int[Tensor, "n"]:
    return flags.view(torch.uint8).sum(1, dtype=torch.int32)  # twice as fast as the sum of flags


def outcomes(
    predicted: Sequence[Predicted], quantities: Sequence[str], reference: Predicted | None = None
) -> list[Float[np.ndarray, "n quantities"]]:
    """Read quantities out of the logits of a batch, in float64, for each of several models that were run on it.

    Args:
        predicted: Of each model.
        quantities: Properties of `Outcome`.
        reference: Of the unedited model, for `kl`; it may be one of them.
    """
    first = reference or predicted[0]
    own = [i for i, one in enumerate(predicted) if one is reference]
    others = [i for i, one in enumerate(predicted) if one is not reference]
    groups = [others[start : start + _BESIDE] for start in range(0, len(others), _BESIDE)] or [[]]
    found: list[list[Tensor]] = [[torch.zeros(0, len(quantities))] for _ in predicted]

    def read(part: slice, beside: Tensor | None, group: Sequence[int], own: Sequence[int]) -> None:
        # The logits of a group go with this function's names, before the next ones come.
        logits, target = {i: predicted[i].logits(part) for i in group}, first.target[part]
        at_once = _IN_CACHE if target.device.type == "cpu" else AT_ONCE
        size = max(1, at_once // int(first.end.model.cfg.d_vocab))
        for cut in (slice(start, start + size) for start in range(0, len(target), size)):
            base = None if beside is None else Outcome(beside[cut], target[cut])
            each = {i: Outcome(logits[i][cut], target[cut], base) for i in group}
            if base is not None:
                each |= dict.fromkeys(own, base)
            for i, outcome in each.items():
                found[i].append(outcome.table(quantities).cpu())

    for part in first.slices:
        beside = None if reference is None else reference.logits(part)
        for number, group in enumerate(groups):
            read(part, beside, group, own if number == 0 else ())
    return [torch.cat(tables).double().numpy() for tables in found]


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
    batch_size: int | None,
    bar: Any,
    quantities: Sequence[str] = ("loss", "right"),
    *,
    recompute: bool = False,
) -> list[Forced]:
    """Run every row of a corpus once, and return what is said of its counted tokens that have a token before them."""
    forced: dict[int, Forced] = {}
    with nullcontext() if intervention is None else intervention.on(model), torch.no_grad():
        for batch in corpus.batches(rows_at_once(model, corpus, batch_size)):
            predicted = predict(model, batch, recompute=recompute)
            (table,) = outcomes([predicted], quantities)
            if intervention is None and not acting(model):
                require_finite(model, batch, predicted, table)
            rows = split_rows(predicted, table, quantities)
            forced |= zip(batch.rows.tolist(), rows, strict=True)
            bar.update(len(batch.rows))
    return [forced[row] for row in range(corpus.n_rows)]


def accuracy(model: Model, corpus: Corpus, batch_size: int | None, *, recompute: bool = False) -> tuple[float, float]:
    """Return the share of a corpus' counted tokens that are the single most probable one, and their mean loss in nats.

    Args:
        model: The model.
        corpus: The corpus.
        batch_size: Rows of full length at a time.
        recompute: As in `predict`.

    Raises:
        CorpusError: If nothing in it is predicted.
    """
    with Bar(disable=True) as silent:
        rows = force(model, corpus, None, batch_size, silent, recompute=recompute)
    right, loss = (np.concatenate([row[name] for row in rows]) for name in ("right", "loss"))
    _require_tokens(len(right), corpus)
    return float(right.mean()), float(loss.mean())


def recalled(
    model: Model, corpus: Corpus, batch_size: int | None
) -> tuple[Float[np.ndarray, "documents"], Float[np.ndarray, "documents"]]:
    """Return of each document how many counted tokens are the single most probable one, and how many are predicted.

    Raises:
        CorpusError: If nothing in it is predicted.
    """
    with Bar(disable=True) as silent:
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
    texts, begins = [true.head + text + true.tail for true, text in answers], [len(true.head) for true, _ in answers]
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
