"""Linear probe: can a property of the answer be read off the residual stream where the prompt ends?

Multinomial logistic regression (scikit-learn, L2, standardized features) from the residual stream at the prompt's last token to the
class of the answer's first token, or to a label of your own, layer by layer; cross-validated over facts such that no unit (fact, or
group of facts, such as a subject) stands on both sides. Beside it the majority class, and the same with shuffled labels.
Alain and Bengio, "Understanding intermediate layers using linear classifier probes" (arXiv 1610.01644).
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from lens_unlearn.audit.attack import SCORE, Attack, Case, Found, Suspect, curve, each_suspect
from lens_unlearn.audit.layers import require_shape, trace
from lens_unlearn.core.errors import CorpusError
from lens_unlearn.corpora.batching import rows_at_once
from lens_unlearn.evaluation.metric import Metric
from lens_unlearn.evaluation.report import BASE

__all__ = ["ATTACK", "at_prompt_ends", "cross_validated", "probe"]

FOLDS = 5
FEWEST = 10
"""Facts below which nothing is cross-validated."""

Folds = Sequence[tuple[Int[np.ndarray, "train"], Int[np.ndarray, "test"]]]


def probe(case: Case) -> Found:
    """Probe everybody's residual stream, layer by layer.

    Raises:
        CorpusError: If the facts have no answers and no labels, or are too few to cross-validate.
        ModelError: If the reference has another shape.
    """
    require_shape(case)
    kept, classes, folds = _classes(case)
    shuffled = classes[np.random.default_rng(case.seed).permutation(len(classes))]
    layers = range(case.n_layers)
    metrics = curve("accuracy", layers, "accuracy of the probe") + curve("shuffled", layers, "with shuffled labels")
    metrics.append(Metric("majority", "accuracy of the majority class"))
    values: dict[str, list[np.ndarray]] = {}
    most = _majority(classes, folds)
    for name, _, suspect in each_suspect(case, "probe"):
        streams = at_prompt_ends(case, suspect)[kept]
        columns = [cross_validated(streams[:, i], labels, folds) for labels in (classes, shuffled) for i in layers]
        values.setdefault(name, []).append(np.stack([*columns, most], axis=1))
    best = int(values[BASE][0][:, : case.n_layers].mean(0).argmax())
    metrics.append(Metric(SCORE, f"accuracy of the probe at layer {best}, the base's best"))
    together = {name: [np.append(part, part[:, best : best + 1], axis=1) for part in v] for name, v in values.items()}
    counts = np.ones((len(kept), len(metrics)))
    left = case.facts.n_documents - len(kept)
    notes = [f"the score is the accuracy at layer {best}, where it is highest in the base"]
    notes += [f"{left} facts are left out, whose class too few others have"] if left else []
    return Found(case.measures(metrics, together, counts, case.facts.only(kept)), tuple(notes))


def _classes(case: Case) -> tuple[list[int], Int[np.ndarray, "facts"], Folds]:
    """Return the facts whose class is in several units, their classes as numbers, and the folds."""
    facts = case.facts
    if case.labels is None and not facts.answers:
        raise CorpusError(f"{facts.name} has no answers to probe for: read it as 'question>answer', or give labels")
    labels = list(map(str, case.labels)) if case.labels is not None else _first_tokens(case)
    units: dict[str, set[str]] = {}
    for label, unit in zip(labels, facts.units, strict=True):
        units.setdefault(label, set()).add(unit)
    kept = [i for i, label in enumerate(labels) if len(units[label]) > 1]
    known = sorted({labels[i] for i in kept})
    groups = [facts.units[i] for i in kept]
    if len(known) < 2 or len(kept) < FEWEST or len(set(groups)) < FOLDS:
        raise CorpusError(
            f"{len(kept)} facts of {len(known)} classes in {len(set(groups))} units are too few to cross-validate a probe: at "
            f"least {FEWEST} facts, two classes and {FOLDS} units are needed; give more facts, or labels"
        )
    classes = np.array([known.index(labels[i]) for i in kept])
    from sklearn.model_selection import GroupKFold

    return kept, classes, list(GroupKFold(FOLDS).split(classes[:, None], classes, groups))


def _first_tokens(case: Case) -> list[str]:
    """Return the first counted token of each fact."""
    first: dict[int, str] = {}
    for row, document in enumerate(case.facts.document.tolist()):
        counted = case.facts.counted[int(case.facts.starts[row]) : int(case.facts.starts[row + 1])]
        if document not in first and bool(counted.any()):
            first[document] = str(int(case.facts.row(row)[counted][0]))
    return [first.get(document, "") for document in range(case.facts.n_documents)]


def at_prompt_ends(case: Case, suspect: Suspect) -> Float[np.ndarray, "facts layers d_model"]:
    """Return the residual stream behind every block at the last token of each fact's prompt."""
    found: dict[int, np.ndarray] = {}
    with torch.no_grad():
        for batch in case.facts.batches(rows_at_once(suspect.model, case.facts, case.batch_size)):
            _, prefix = trace(case, suspect, batch)
            rows = torch.arange(len(batch.rows))
            streams = [
                prefix.stream(layer + 1)[rows, batch.prompt_ends].double().cpu() for layer in range(case.n_layers)
            ]
            for row, value in zip(batch.rows.tolist(), torch.stack(streams, dim=1).numpy(), strict=True):
                found.setdefault(int(case.facts.document[row]), value)
    return np.stack([found[document] for document in range(case.facts.n_documents)])


def cross_validated(
    features: Float[np.ndarray, "facts d_model"], classes: Int[np.ndarray, "facts"], folds: Folds
) -> Float[np.ndarray, "facts"]:
    """Return 1 for each fact whose class is predicted by a probe that was fitted to the other folds, else 0."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not np.isfinite(features).all():  # of an edit that breaks the model
        return np.full(len(classes), np.nan)
    right = np.zeros(len(classes))
    for train, test in folds:
        if len(set(classes[train].tolist())) == 1:
            right[test] = classes[test] == classes[train][0]
            continue
        fitted: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted.fit(features[train], classes[train])
        right[test] = fitted.predict(features[test]) == classes[test]
    return right


def _majority(classes: Int[np.ndarray, "facts"], folds: Folds) -> Float[np.ndarray, "facts"]:
    """Return 1 for each fact that has the class that is most frequent among the other folds."""
    right = np.zeros(len(classes))
    for train, test in folds:
        right[test] = classes[test] == Counter(classes[train].tolist()).most_common(1)[0][0]
    return right


ATTACK = Attack(
    name="probe",
    run=probe,
    words="linear probe",
    asks="Can the answer be told, by a line through other facts, from the residual stream where the prompt ends?",
    score="accuracy of the probe at the layer where it is highest in the unedited model",
    returns="is still read by a linear probe",
    curves={"accuracy": "accuracy of the probe, cross-validated", "shuffled": "accuracy with shuffled labels"},
)
