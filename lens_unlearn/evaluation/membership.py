"""`membership`: can an outsider tell texts that a model was trained on from others of the same kind?"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.core.intervals import auc, weights_of, widening
from lens_unlearn.core.progress import Bar
from lens_unlearn.corpora.corpus import Corpus, require_corpus
from lens_unlearn.evaluation.bootstrap import WEIGHTS, over_replicates, transformed
from lens_unlearn.evaluation.evaluate import Condition, replicates
from lens_unlearn.evaluation.gradient_norm import gradient_norms
from lens_unlearn.evaluation.metric import Metric
from lens_unlearn.evaluation.metrics import METRICS, needing
from lens_unlearn.evaluation.report import Measure, Report, provenance_of
from lens_unlearn.evaluation.teacher_forcing import Forced, force
from lens_unlearn.model.host import Model, require_eval, require_model
from lens_unlearn.model.loading import fingerprint, model_name

__all__ = ["Document", "membership", "privacy_leak"]

_EPSILON = 1e-10

Scores = list[dict[str, np.ndarray]]
"""For each intervention of a condition, by attack: [documents]."""


def membership(
    model: Model,
    members: Corpus,
    nonmembers: Corpus,
    conditions: Mapping[str, Condition],
    *,
    name: str = "forget",
    k: float = 0.4,
    retrained: float = 0.5,
    reference: Model | None = None,
    gradients: bool = False,
    batch_size: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Measure how well documents that were trained on can be distinguished from others, with and without interventions.

    Each attack gives every document a score that is low where the model knows it, from its counted tokens (in question-answer
    corpora the answer's) under teacher forcing. With NLL_t = -log p(x_t | before), in nats:

    - `mia_loss`: mean_t NLL_t (Yeom et al. 2018).
    - `mia_zlib`: the same over the length of the text, compressed by zlib, in bytes (Carlini et al. 2021).
    - `mia_min_k`: the mean of the share k of largest NLL_t, at least one (Min-K%, Shi et al. 2024).
    - `mia_min_k_plus_plus`: minus the mean of the share k of lowest z_t = (log p(x_t) - mu_t) / sigma_t, with mu_t and
      sigma_t^2 >= 1e-6 the mean and variance of the log probability under the model's own distribution (Min-K%++, Zhang et
      al. 2025).
    - `mia_reference`, with `reference`: mean_t NLL_t minus the same of the reference model, which says how hard a text is anyway
      (Carlini et al. 2021).
    - `mia_grad_norm`, with `gradients`: the L2 norm of the gradient of mean_t NLL_t with respect to all weights (Wang et al. 2024).

    Their value is the area under the ROC curve: the probability that a member scores below a non-member, ties half. 0.5 is what a
    model gives that never saw either; above it, members are still known; far below, they are avoided, which tells them as well.
    `privacy_leak` is that of `mia_min_k` beside the retrained model's; see `privacy_leak`.

    Where an intervention abstains from every prompt, logits are constant, and all of these are 0.5 but `mia_zlib`, which still
    sees the length of the texts. An end-of-text token behind the answers (`read_corpus(answer_eos=True)`) does not count here.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
        members: What was trained on.
        nonmembers: Held-out texts of the same kind.
        conditions: As for `evaluate`.
        name: The corpus under which the report gives them, so that it can be added to one of `evaluate`.
        k: The share of tokens for Min-K% and Min-K%++.
        retrained: The value of `mia_min_k` of a model that was trained without the members.
        reference: Another model with the same tokenizer, trained on texts of the same kind but not on the members.
        gradients: Whether to look at gradients as well, which takes a backward pass for each row, one row at a time.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        resamples: Bootstrap resamples over the documents of both sides, the same for every condition.
        seed: Of the bootstrap.
        progress: Whether to show a bar.

    Raises:
        CorpusError: If a corpus fits another model or has no token that anything predicts, or the model has no tokenizer.
        LensUnlearnError: If k or retrained is out of range.
        ModelError: If gradients are wanted of quantized weights, or the reference is in training mode.
    """
    require_model(model)
    require_eval(model)
    if reference is not None:
        require_model(reference)
        require_eval(reference)
    if not 0 < k <= 1:
        raise LensUnlearnError(f"k={k} is no share of tokens: above 0, at most 1")
    privacy_leak(0.5, retrained)
    runs = replicates(conditions)
    sides = (members, nonmembers)
    for role, corpus in zip(("members", "nonmembers"), sides, strict=True):
        require_corpus(corpus, role).check(model)
        if reference is not None:
            corpus.check(reference)
    sizes = [_compressed(model, corpus) for corpus in sides]
    known = Known(gradients, reference is not None)
    attacks = [one for one in needing("membership") if one.applies is None or one.applies(known)]
    quantities = tuple(dict.fromkeys(name for attack in attacks for name in attack.quantities))
    passes = (1 + gradients) * sum(map(len, runs.values())) + (reference is not None)
    total = sum(corpus.n_rows for corpus in sides) * passes
    scores: dict[str, list[Scores]] = {}
    with Bar(total=total, unit=" rows", disable=not progress, desc="membership") as bar:
        beside = [_reference_losses(reference, corpus, batch_size, bar) for corpus in sides]
        for condition, run in runs.items():
            scores[condition] = []
            for corpus, own, theirs in zip(sides, sizes, beside, strict=True):
                forced = [force(model, corpus, one, batch_size, bar, quantities) for one in run]
                norms = [gradient_norms(model, corpus, one, bar) if gradients else None for one in run]
                found = [_documents(*pair, corpus, own, k, theirs) for pair in zip(forced, norms, strict=True)]
                scores[condition].append([_scores(documents, attacks) for documents in found])
    units = [_units(corpus) for corpus in sides]
    measures = {
        (condition, name, metric): one
        for condition, metric, one in _measures(scores, units, retrained, resamples, seed)
    }
    n = [len(next(iter(side[0].values()))) for side in next(iter(scores.values()))]
    settings: dict[str, Any] = {
        "model": model_name(model),
        "fingerprint": fingerprint(model),
        "membership": {
            "members": {"source": members.name, "documents": n[0], "fingerprint": members.fingerprint},
            "nonmembers": {"source": nonmembers.name, "documents": n[1], "fingerprint": nonmembers.fingerprint},
            "k": k,
            "retrained": retrained,
            **({} if reference is None else {"reference": fingerprint(reference)}),
            "bootstrap": {"resamples": resamples, "seed": seed, "weights": WEIGHTS},
        },
    }
    return Report(measures, provenance_of(settings))


def privacy_leak(auc: float, retrained: float = 0.5) -> float:
    """Return how far a membership attack's AUC is from that of a model trained without the members.

    ((1 - AUC) - (1 - AUC_retrained)) / ((1 - AUC_retrained) + 1e-10): 0 is ideal, below 0 members are still known (-1 where
    the attack is always right and AUC_retrained 0.5), above 0 they are avoided. Source: PrivLeak of MUSE (Shi et al. 2025) as
    in OpenUnlearning, which gives it in percent.

    >>> privacy_leak(1.0), privacy_leak(0.5), privacy_leak(0.3, 0.4)
    (-0.99..., 0.0, 0.16...)
    """
    if not 0 <= retrained < 1:
        raise LensUnlearnError(f"retrained={retrained} is no AUC to compare with: from 0 to below 1")
    return (retrained - auc) / (1 - retrained + _EPSILON)


def _compressed(model: Model, corpus: Corpus) -> list[int]:
    """Return the length of each document's counted text, compressed, in bytes."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise CorpusError("this model has no tokenizer: the texts' length, which membership compares, is unknown")
    tokens: list[list[int]] = [[] for _ in corpus.keys]
    for row, document in enumerate(corpus.document.tolist()):
        counted = corpus.counted[int(corpus.starts[row]) : int(corpus.starts[row + 1])]
        tokens[document] += corpus.row(row)[counted].tolist()[: -1 if corpus.ends_with_eos(row) else None]
    return [len(zlib.compress(tokenizer.decode(ids).encode())) for ids in tokens]


@dataclass(frozen=True)
class Document:
    """One document under teacher forcing, as an attack sees it."""

    loss: np.ndarray
    """[tokens] Negative log probability, in nats."""
    z_score: np.ndarray
    """[tokens] As `Outcome.z_score`."""
    size: int
    """Length of its counted text, compressed, in bytes."""
    k: float
    """The share of tokens that Min-K% looks at."""
    gradient: float = float("nan")
    """The norm of the gradient of its mean loss."""
    reference: float = float("nan")
    """Its mean loss under a reference model."""


@dataclass(frozen=True)
class Known:
    """What there is to look at, by which an attack says whether it applies."""

    gradients: bool
    reference: bool


def _reference_losses(reference: Model | None, corpus: Corpus, batch_size: int | None, bar: Any) -> np.ndarray:
    """Return each document's mean loss under a reference model; NaN without one, and where nothing is predicted."""
    found = np.full(corpus.n_documents, np.nan)
    if reference is not None:
        for document, own in enumerate(
            _by_document(force(reference, corpus, None, batch_size, bar, ("loss",)), corpus)
        ):
            losses = _joined(own, "loss")
            found[document] = losses.mean() if len(losses) else np.nan
    return found


def _by_document(rows: list[Forced], corpus: Corpus) -> list[list[Forced]]:
    """Put the rows of each document together, without an end-of-text token behind an answer, which is no text of it."""
    found: list[list[Forced]] = [[] for _ in corpus.keys]
    for number, (row, document) in enumerate(zip(rows, corpus.document.tolist(), strict=True)):
        end = -1 if corpus.ends_with_eos(number) else None
        found[document].append({quantity: values[:end] for quantity, values in row.items()})
    return found


def _documents(
    rows: list[Forced], norms: np.ndarray | None, corpus: Corpus, sizes: list[int], k: float, beside: np.ndarray
) -> list[Document]:
    """Join the rows of each document; leave out those in which nothing is predicted."""
    gradients = np.full(corpus.n_documents, np.nan) if norms is None else norms
    documents = [
        Document(_joined(own, "loss"), _joined(own, "z_score"), size, k, float(norm), float(reference))
        for own, size, norm, reference in zip(_by_document(rows, corpus), sizes, gradients, beside, strict=True)
    ]
    return [document for document in documents if len(document.loss)]


def _joined(rows: list[Forced], quantity: str) -> np.ndarray:
    return np.concatenate([row[quantity] for row in rows])


def _scores(documents: list[Document], attacks: Sequence[Metric]) -> dict[str, np.ndarray]:
    """Score documents by every attack."""
    if not documents:
        raise CorpusError(
            "a corpus to be distinguished from another has no token that anything predicts: give longer texts"
        )
    return {attack.name: np.array([attack.of(one) for one in documents]) for attack in attacks if attack.of}


def _units(corpus: Corpus) -> list[str]:
    """Return the unit of each document in which anything is predicted."""
    seen = torch.zeros(corpus.n_documents, dtype=torch.bool)
    for batch in corpus.batches():
        seen[corpus.document[batch.rows[batch.counted[:, 1:].any(1)]]] = True
    return [unit for unit, yes in zip(corpus.units, seen.tolist(), strict=True) if yes]


def _measures(
    scores: Mapping[str, list[Scores]], units: Sequence[Sequence[str]], retrained: float, resamples: int, seed: int
) -> Iterator[tuple[str, str, Measure]]:
    """Turn scores into areas and their bootstrap draws; all conditions share the resampled units."""
    weights = [torch.from_numpy(weights_of(side, resamples, seed)) for side in units]
    sizes = [np.unique(np.array(side), return_counts=True)[1] for side in units]
    fewest, factor = min(map(len, sizes)), max(widening(side.astype(float)) for side in sizes)
    derived = [row for row in METRICS if row.needs == "membership" and row.derived_from]
    for condition, (inside, outside) in scores.items():
        for attack in inside[0]:
            own: list[tuple[float, np.ndarray]] = []
            for pair in zip(inside, outside, strict=True):
                area, drawn = auc(*(torch.from_numpy(side[attack]) for side in pair), *weights)
                own.append((area, area + factor * (drawn.numpy() - area)))
            measure = over_replicates(own, sum(map(len, units)), fewest, seed)
            yield condition, attack, measure
            for row in derived:
                if row.derived_from == attack:
                    leak = replace(row, of=np.vectorize(lambda area: privacy_leak(area, retrained), otypes=[float]))
                    yield condition, row.name, transformed(measure, leak)
