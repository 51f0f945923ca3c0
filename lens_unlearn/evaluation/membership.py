"""`membership`: can an outsider tell texts that a model was trained on from others of the same kind?"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.evaluation.evaluate import Condition, replicates
from lens_unlearn.evaluation.report import Measure, Report, provenance_of
from lens_unlearn.evaluation.teacher_forcing import Forced, force
from lens_unlearn.model.host import Model, require_eval, require_model
from lens_unlearn.model.loading import fingerprint, model_name

__all__ = ["ATTACKS", "membership", "privacy_leak"]

ATTACKS = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")
LEAK = "mia_min_k"  # the attack that privacy_leak is of, as in MUSE
_DIGITS = 6  # of a score: what float32 logits leave open is a tie
_BLOCK = 1024  # members that are compared with all others at a time
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
    batch_size: int = 8,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Measure how well documents that were trained on can be told from others, with and without interventions.

    Each attack gives every document a score that is low where the model knows it, from its counted tokens (in question-answer
    corpora the answer's) under teacher forcing. With NLL_t = -log p(x_t | before), in nats:

    - `mia_loss`: mean_t NLL_t (Yeom et al. 2018).
    - `mia_zlib`: the same over the length of the text, compressed by zlib, in bytes (Carlini et al. 2021).
    - `mia_min_k`: the mean of the share k of largest NLL_t, at least one (Min-K%, Shi et al. 2024).
    - `mia_min_k_plus_plus`: minus the mean of the share k of lowest z_t = (log p(x_t) - mu_t) / sigma_t, with mu_t and
      sigma_t^2 >= 1e-6 the mean and variance of the log probability under the model's own distribution (Min-K%++, Zhang et
      al. 2025).

    Their value is the area under the ROC curve: the probability that a member scores below a non-member, ties half. 0.5 is what a
    model gives that never saw either; above it, members are still known; far below, they are avoided, which tells them as well.
    `privacy_leak` is that of `mia_min_k` beside the retrained model's; see `privacy_leak`.

    Where all answers are withheld, logits are constant, and all of these are 0.5 but `mia_zlib`, which still sees the length of
    the texts.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
        members: What was trained on.
        nonmembers: Held-out texts of the same kind.
        conditions: As for `evaluate`.
        name: The corpus under which the report gives them, so that it can be added to one of `evaluate`.
        k: The share of tokens for Min-K% and Min-K%++.
        retrained: The value of `mia_min_k` of a model that was trained without the members.
        batch_size: Full-length rows per forward.
        resamples: Bootstrap resamples over the documents of both sides, the same for every condition.
        seed: Of the bootstrap.
        progress: Whether to show a bar.

    Raises:
        CorpusError: If a corpus fits another model or has no token that anything predicts, or the model has no tokenizer.
        LensUnlearnError: If k or retrained is out of range.
    """
    require_model(model)
    require_eval(model)
    if not 0 < k <= 1:
        raise LensUnlearnError(f"k={k} is no share of tokens: above 0, at most 1")
    privacy_leak(0.5, retrained)
    runs = replicates(conditions)
    sides = (members, nonmembers)
    for corpus in sides:
        corpus.check(model)
    lengths = [_compressed(model, corpus) for corpus in sides]
    total = sum(corpus.n_rows for corpus in sides) * sum(map(len, runs.values()))
    scores: dict[str, list[Scores]] = {}
    with tqdm(total=total, unit=" rows", disable=not progress, desc="membership") as bar:
        for condition, run in runs.items():
            scores[condition] = []
            for corpus, sizes in zip(sides, lengths, strict=True):
                forced = [_documents(force(model, corpus, one, batch_size, bar), corpus) for one in run]
                scores[condition].append([_scores(told, sizes, k) for told in forced])
    measures = {
        (condition, name, metric): one for condition, metric, one in _measures(scores, retrained, resamples, seed)
    }
    n = [len(one[0]["mia_loss"]) for one in next(iter(scores.values()))]
    settings: dict[str, Any] = {
        "model": model_name(model),
        "fingerprint": fingerprint(model),
        "membership": {
            "members": {"source": members.name, "documents": n[0], "fingerprint": members.fingerprint},
            "nonmembers": {"source": nonmembers.name, "documents": n[1], "fingerprint": nonmembers.fingerprint},
            "k": k,
            "retrained": retrained,
            "bootstrap": {"resamples": resamples, "seed": seed},
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
        tokens[document] += corpus.row(row)[counted].tolist()
    return [len(zlib.compress(tokenizer.decode(ids).encode())) for ids in tokens]


def _documents(rows: list[Forced], corpus: Corpus) -> list[tuple[np.ndarray, np.ndarray]]:
    """Join the rows of each document: losses and scores of its tokens."""
    joined: list[list[Forced]] = [[] for _ in corpus.keys]
    for row, document in zip(rows, corpus.document.tolist(), strict=True):
        joined[document].append(row)
    return [tuple(np.concatenate([getattr(r, n) for r in own]) for n in ("loss", "score")) for own in joined]  # type: ignore[misc]


def _scores(documents: list[tuple[np.ndarray, np.ndarray]], sizes: list[int], k: float) -> dict[str, np.ndarray]:
    """Score the documents in which anything is predicted, by every attack."""
    told = []
    for (loss, score), size in zip(documents, sizes, strict=True):
        if len(loss):
            lowest = max(1, int(len(loss) * k))
            mean = np.round(loss.mean(), _DIGITS)
            told.append([mean, mean / size, np.sort(loss)[-lowest:].mean(), -np.sort(score)[:lowest].mean()])
    if not told:
        raise CorpusError("a corpus to be told from another has no token that anything predicts: give longer texts")
    table = np.array(told)
    table[:, 2:] = np.round(table[:, 2:], _DIGITS)
    return dict(zip(ATTACKS, table.T, strict=True))


def _measures(
    scores: Mapping[str, list[Scores]], retrained: float, resamples: int, seed: int
) -> Iterator[tuple[str, str, Measure]]:
    """Turn scores into areas and their bootstrap draws; all conditions share the resampled documents."""
    sizes = [len(side[0]["mia_loss"]) for side in next(iter(scores.values()))]
    random = np.random.default_rng(seed)
    draws = resamples if min(sizes) > 1 else 0
    weights = [random.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64) for n in sizes]
    for condition, (inside, outside) in scores.items():
        found: dict[str, Measure] = {}
        pick = random.integers(len(inside), size=draws) if len(inside) > 1 else np.zeros(draws, dtype=np.int64)
        for attack in ATTACKS:
            areas = [_area(a[attack], b[attack], *weights) for a, b in zip(inside, outside, strict=True)]
            value = float(np.mean([area[0] for area in areas]))
            drawn = np.stack([area[1] for area in areas])[pick, np.arange(draws)]
            found[attack] = Measure(value, drawn, sum(sizes))
            yield condition, attack, found[attack]
        leaks = np.array([privacy_leak(one, retrained) for one in found[LEAK].draws])
        yield condition, "privacy_leak", Measure(privacy_leak(found[LEAK].value, retrained), leaks, sum(sizes))


def _area(
    members: Float[np.ndarray, "members"],
    others: Float[np.ndarray, "others"],
    of_members: Float[np.ndarray, "draws members"],
    of_others: Float[np.ndarray, "draws others"],
) -> tuple[float, np.ndarray]:
    """Return the probability that a member scores below another, ties half; also where documents are weighted."""
    if np.isnan(members).any() or np.isnan(others).any():
        return float("nan"), np.full(len(of_members), np.nan)
    whole, drawn = 0.0, np.zeros(len(of_members))
    for start in range(0, len(members), _BLOCK):
        part = slice(start, start + _BLOCK)
        below = (members[part, None] < others).astype(np.float64) + 0.5 * (members[part, None] == others)
        whole += float(below.sum())
        drawn += ((of_members[:, part] @ below) * of_others).sum(1)
    pairs = len(members) * len(others)
    return whole / pairs, drawn / pairs
