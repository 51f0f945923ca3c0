"""What depth and logit lens share: everybody's residual streams, the base's pass on from one of them, and a score over layers.

Knows `Prefix`, by which a pass begins at a layer, and `Patch`, where an architecture does not allow that; knows nothing of which
stream is put where, or why.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.audit.attack import REFERENCE, SCORE, Case, Found, Suspect, curve
from lens_unlearn.core.errors import ModelError
from lens_unlearn.core.progress import Bar
from lens_unlearn.corpora.batching import rows_at_once
from lens_unlearn.corpora.corpus import Batch
from lens_unlearn.evaluation.metric import Metric
from lens_unlearn.evaluation.report import BASE
from lens_unlearn.evaluation.teacher_forcing import Predicted, predict
from lens_unlearn.interventions.patch import Patch
from lens_unlearn.model.replay import Prefix
from lens_unlearn.model.sites import Site

__all__ = ["COUNTS_FROM", "Trace", "by_layer", "calibrated", "require_shape"]

COUNTS_FROM = 0.05
"""Nats per token that the reference has to lose at a layer for it to count."""

Losing = Callable[["Trace", Prefix, int], dict[str, Float[Tensor, "tokens"]]]
"""Takes the base's pass, another's streams and a layer; returns what each predicted token loses, and what else is read there."""


@dataclass(frozen=True)
class Trace:
    """The base's pass on one batch, from any layer of which others can begin."""

    case: Case
    batch: Batch
    predicted: Predicted
    prefix: Prefix
    replays: bool
    """Whether blocks pass on nothing but the residual stream, as was tried: else every pass is a whole one."""
    read: dict[int, Float[Tensor, "tokens"]] = field(default_factory=dict)
    """By layer, what was read of the base already, so that it is read once for everybody."""

    @classmethod
    def of(cls, case: Case, batch: Batch, replays: bool | None = None) -> "Trace":
        """Run the base on a batch; try whether a pass may begin at a layer, unless that is known."""
        predicted, prefix = trace(case, Suspect(case.model), batch)
        found = cls(case, batch, predicted, prefix, True)
        if replays is None:
            replays = False
            try:
                again = found.passed_on(0, prefix.stream(1)).hidden
                size = predicted.hidden.float().abs().amax().clamp_min(1e-30)
                replays = bool((again - predicted.hidden).float().abs().amax() <= 1e-3 * size)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # noqa: S110 - an architecture of another structure
                pass
        return cls(case, batch, predicted, prefix, replays)

    def passed_on(self, layer: int, stream: Float[Tensor, "batch pos d_model"]) -> Predicted:
        """Let the base go on from a residual stream behind the block of a layer."""
        if self.replays:
            changed = self.prefix.changed(layer + 1, stream)
            return predict(self.case.model, self.batch, prefix=changed, start=layer + 1)
        with Patch({Site(layer, "resid"): stream}).on(self.case.model):
            return predict(self.case.model, self.batch)

    def like(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Bring another model's residual stream to the base's device and dtype."""
        return stream.to(self.prefix.stream(1))


def trace(case: Case, suspect: Suspect, batch: Batch) -> tuple[Predicted, Prefix]:
    """Run somebody on a batch, and keep the residual stream behind every block."""
    prefix = Prefix(range(1, case.n_layers + 1))
    with suspect.acting():
        return predict(suspect.model, batch, prefix=prefix), prefix


def require_shape(case: Case) -> None:
    """Refuse a reference of another shape, whose residual stream is none of the model's.

    Raises:
        ModelError: If it has other layers or another width; the message names both.
    """
    if case.reference is None:
        return
    shapes = [(int(m.cfg.n_layers), int(m.cfg.d_model)) for m in (case.model, case.reference)]
    if shapes[0] != shapes[1]:
        (layers, width), (others, other) = shapes
        raise ModelError(
            f"the reference has {others} layers of width {other}, and the model {layers} of width {width}: give one of its shape"
        )


def calibrated(
    lost: Float[np.ndarray, "facts layers"], by_reference: Float[np.ndarray, "facts layers"]
) -> tuple[Float[np.ndarray, "facts"], Float[np.ndarray, "facts"]]:
    """Return of each fact the share of what the reference loses that is lost, over the layers where it loses more than 0.05 nats.

    sum_l D1_l clip(D2_l / D1_l, 0, 1) / sum_l D1_l, with D1 what the reference loses and D2 the one in question: 0 is as intact as
    in the base, 1 as absent as in the reference. The second value is 0 for a fact without such a layer, which does not count.
    """
    counts = by_reference > COUNTS_FROM
    weight = np.where(counts, by_reference, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(counts, np.clip(lost / by_reference, 0, 1), 0.0)
        score = np.divide((weight * share).sum(1), weight.sum(1))
    known = np.asarray(counts.any(1), dtype=np.float64)
    return np.where(known > 0, score + 0.0, 0.0), known  # no negative zero


def by_layer(case: Case, losing: Losing, name: str, words: str, more: Sequence[tuple[str, str]], what: str) -> Found:
    """Measure layer by layer what everybody loses of the facts, and make one score of it where there is a reference.

    Args:
        case: The case.
        losing: What a token loses at a layer: `name`, and whatever else, each a tensor.
        name: Of the curve of what is lost.
        words: What its values are.
        more: Names and words of further curves.
        what: For the bar.
    """
    require_shape(case)
    names = [name, *(other for other, _ in more)]
    shape = (case.facts.n_documents, case.n_layers * len(names))
    sums = {condition: [np.zeros(shape) for _ in several] for condition, several in case.suspects.items()}
    counts = np.zeros(case.facts.n_documents)
    for documents, condition, number, columns in _tokens(case, losing, names, what):
        if columns is None:
            np.add.at(counts, documents, 1)
        else:
            np.add.at(sums[condition][number], documents, columns)
    with np.errstate(invalid="ignore", divide="ignore"):
        tables = {condition: [part / counts[:, None] for part in several] for condition, several in sums.items()}
    layers = range(case.n_layers)
    metrics = curve(name, layers, words, unit="nats per token", range=(-np.inf, np.inf), higher_is_better=False)
    for other, its_words in more:
        metrics += curve(other, layers, its_words, unit="", range=(-np.inf, np.inf))
    known = np.repeat((counts > 0).astype(np.float64)[:, None], len(metrics), axis=1)
    measures = case.measures(metrics, tables, known, case.facts)
    if case.reference is None:
        return Found(measures, ("no reference: what is lost is not calibrated, and there is no score",))
    reference = tables[REFERENCE][0][:, : case.n_layers]
    shares: dict[str, list[np.ndarray]] = {}
    counted = np.zeros(len(counts))
    for condition, several in tables.items():
        shares[condition] = []
        for part in several:
            share, counted = calibrated(part[:, : case.n_layers], reference)
            shares[condition].append(share[:, None])
    left = int((counts > 0).sum() - counted.sum())
    note = f"{left} of {int((counts > 0).sum())} facts are left out: the reference loses nothing of them at any layer"
    if not counted.any():
        return Found(measures, (note,))
    score = Metric(SCORE, "share that is absent", unit="share", higher_is_better=False)
    measures |= case.measures([score], shares, counted[:, None], case.facts)
    return Found(measures, (note,) if left else ())


def _tokens(
    case: Case, losing: Losing, names: Sequence[str], what: str
) -> Iterator[tuple[np.ndarray, str, int, np.ndarray | None]]:
    """Go through the predicted tokens batch by batch: their documents once, and then everybody's [tokens, columns]."""
    everybody = [(name, number, one) for name, several in case.suspects.items() for number, one in enumerate(several)]
    rows, replays = rows_at_once(case.model, case.facts, case.batch_size), None
    bar = Bar(total=case.facts.n_rows * len(everybody), desc=what, disable=not case.progress, unit=" rows")
    with bar, torch.no_grad():
        for batch in case.facts.batches(rows):
            if not bool(batch.counted[:, 1:].any()):
                continue
            base = Trace.of(case, batch, replays)
            replays = base.replays
            documents = case.facts.document[batch.rows[base.predicted.row.cpu()]].numpy()
            yield documents, BASE, 0, None
            for condition, number, suspect in everybody:
                same = suspect.model is case.model and suspect.intervention is None
                prefix = base.prefix if same else trace(case, suspect, batch)[1]
                read = [losing(base, prefix, layer) for layer in range(case.n_layers)]
                columns = [[one[name].double().cpu().numpy() for one in read] for name in names]
                yield documents, condition, number, np.concatenate([np.stack(part, axis=1) for part in columns], axis=1)
                bar.update(len(batch.rows))
