"""The one table of metrics. A new metric is a row here, and the function that the row names.

Knows how each metric is computed from scores; knows nothing of models, of how scores are summed up, or of figures.
"""

from collections.abc import Iterable
from math import inf
from typing import Any

import numpy as np

from lens_unlearn.evaluation.answer_matching import exact_match, numeric_match
from lens_unlearn.evaluation.memorization import choice_probability, extraction_strength, truth_ratio, truth_share
from lens_unlearn.evaluation.metric import Metric, Needs

__all__ = ["METRICS", "in_order", "metric", "needing", "words"]

_NATS: dict[str, Any] = {"unit": "nats per token", "range": (0.0, inf), "higher_is_better": False}
_AUC: dict[str, Any] = {"needs": "membership", "unit": "area under the ROC curve"}
_DIGITS = 6  # of a membership score: what float32 logits leave open is a tie


def _most(values: np.ndarray, share: float) -> np.ndarray:
    """Return the share of largest values, at least one."""
    return np.sort(values)[-max(1, int(len(values) * share)) :]


def _mean_loss(document: Any) -> float:
    return np.round(document.loss.mean(), _DIGITS)


METRICS: tuple[Metric, ...] = (
    Metric(
        "loss", "loss (nats per token)", "tokens", lambda t: t["loss"], quantities=("loss",), brief=True, **_NATS,
    ),
    Metric(
        "perplexity", "perplexity", "tokens", np.exp, derived_from="loss", unit="perplexity", range=(1.0, inf),
        higher_is_better=False,
    ),
    Metric(
        "top1", "next-token accuracy (top 1)", "tokens", lambda t: t["top1"], quantities=("top1",), headline=1, brief=True,
    ),
    Metric("top10", "next-token accuracy (top 10)", "tokens", lambda t: t["top10"], quantities=("top10",), headline=5),
    Metric(
        "top1_rare", "next-token accuracy on rare tokens (top 1)", "tokens", lambda t: t["top1"] * t["rare"],
        over=lambda t: t["rare"], quantities=("top1",),
    ),
    Metric("kl", "divergence from the unedited model (nats per token)", "tokens", lambda t: t["kl"], quantities=("kl",), **_NATS),
    Metric("abstained", "share of rows abstained from", "rows", lambda r: r["abstained"], higher_is_better=False),
    Metric(
        "exact_match", "share of exactly matching answers", "answers",
        lambda a: any(exact_match(a.text, right) for right in a.truth.right),
        headline=3, brief=True,
    ),
    Metric(
        "numeric_match", "share of answers with the right number", "answers",
        lambda a: any(numeric_match(a.text, right) for right in a.truth.right),
        applies=lambda asked: asked.numbers, brief=True,
    ),
    Metric("rouge_l", "ROUGE-L of the answers (recall)", "answers", lambda a: a.rouge[0], headline=2, brief=True),
    Metric("rouge_l_f", "ROUGE-L of the answers (F-measure)", "answers", lambda a: a.rouge[1]),
    Metric(
        "unit_tests", "share of answers that pass their unit tests", "answers", lambda a: a.passes,
        over=lambda a: bool(a.truth.tests), applies=lambda asked: asked.tests, brief=True,
    ),
    Metric(
        "truncated", "share of answers cut at the limit of tokens", "answers", lambda a: a.cut, higher_is_better=False,
    ),
    Metric(
        "refused", "share of generated answers refused", "answers", lambda a: a.abstained,
        applies=lambda asked: asked.abstains, higher_is_better=False,
    ),
    Metric(
        "answer_probability", "probability of the true answer", "memorization", lambda q: q.probability, headline=4, brief=True,
    ),
    Metric(
        "choice_probability", "probability of the true answer among the options", "memorization",
        lambda q: choice_probability(q.probability, q.wrong), over=lambda q: q.complete,
    ),
    Metric(
        "truth_ratio", "truth ratio", "memorization", lambda q: truth_ratio(q.wrong, q.paraphrase), over=lambda q: q.complete,
        unit="ratio", range=(0.0, inf), higher_is_better=False, brief=True,
    ),
    Metric(
        "truth_ratio_prob_mean", "truth ratio as true / (true + false)", "memorization",
        lambda q: truth_share(q.wrong, q.paraphrase), over=lambda q: q.complete,
    ),
    Metric(
        "exact_memorization", "exact memorization", "memorization", lambda q: q.right.sum(), over=lambda q: len(q.right),
        headline=6, brief=True,
    ),
    Metric(
        "extraction_strength", "extraction strength", "memorization", lambda q: extraction_strength(q.right), brief=True,
    ),
    Metric("mia_loss", "membership AUC (loss)", of=_mean_loss, quantities=("loss",), **_AUC),
    Metric(
        "mia_zlib", "membership AUC (loss per compressed byte)", of=lambda d: _mean_loss(d) / d.size, quantities=("loss",),
        **_AUC,
    ),
    Metric(
        "mia_min_k", "membership AUC (Min-K%)", of=lambda d: np.round(_most(d.loss, d.k).mean(), _DIGITS),
        quantities=("loss",), **_AUC,
    ),
    Metric(
        "mia_min_k_plus_plus", "membership AUC (Min-K%++)", of=lambda d: np.round(_most(-d.z_score, d.k)[::-1].mean(), _DIGITS),
        quantities=("z_score",), **_AUC,
    ),
    Metric(
        "mia_grad_norm", "membership AUC (norm of the gradient)", of=lambda d: np.round(d.gradient, _DIGITS),
        applies=lambda known: known.gradients, **_AUC,
    ),
    Metric(
        "mia_reference", "membership AUC (loss beside a reference model's)",
        of=lambda d: np.round(_mean_loss(d) - d.reference, _DIGITS),
        applies=lambda known: known.reference, quantities=("loss",), **_AUC,
    ),
    Metric("privacy_leak", "privacy leak", "membership", derived_from="mia_min_k", unit="privacy leak", range=(-inf, 1.0)),
    Metric("acc", "accuracy", brief=True),
    Metric("acc_norm", "accuracy (by normalized length)", brief=True),
    Metric(
        "loss_per_word", "loss (nats per word)", unit="nats per word", range=(0.0, inf), higher_is_better=False, brief=True,
    ),
    Metric(
        "word_perplexity", "perplexity per word", of=np.exp, derived_from="loss_per_word", unit="perplexity",
        range=(1.0, inf), higher_is_better=False, brief=True,
    ),
    Metric("bits_per_byte", "bits per byte", unit="bits per byte", range=(0.0, inf), higher_is_better=False, brief=True),
    Metric(
        "byte_perplexity", "perplexity per byte", of=np.exp2, derived_from="bits_per_byte", unit="perplexity",
        range=(1.0, inf), higher_is_better=False,
    ),
    Metric(
        "loss_per_continuation", "loss (nats per continuation)", unit="nats per continuation", range=(0.0, inf),
        higher_is_better=False,
    ),
)  # fmt: skip
"""Every metric, in the order of reports."""


def metric(name: str) -> Metric:
    """Return a metric by its name; one that nobody knows, as a task may bring it, is called by its name."""
    for row in METRICS:
        if row.name == name:
            return row
    return Metric(name, name, unit="")


def words(name: str) -> str:
    """Say what a metric is."""
    return metric(name).words


def needing(needs: Needs) -> list[Metric]:
    """Return the metrics that need something and are not derived from others, in order."""
    return [row for row in METRICS if row.needs == needs and not row.derived_from]


def in_order(names: Iterable[str]) -> list[str]:
    """Return names of metrics in the order of the table, others behind."""
    place = {row.name: number for number, row in enumerate(METRICS)}
    return sorted(names, key=lambda name: place.get(name, len(place)))
