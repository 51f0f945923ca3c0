"""Membership: whether the facts can be told from facts that no model has seen.

The attacks of `evaluation.membership` (loss, zlib, Min-K% and Min-K%++), each an area under the ROC curve.
"""

from lens_unlearn.audit.attack import REFERENCE, SCORE, Attack, Case, Found
from lens_unlearn.core.errors import CorpusError
from lens_unlearn.evaluation.evaluate import Condition
from lens_unlearn.evaluation.membership import membership as measured
from lens_unlearn.evaluation.report import BASE

__all__ = ["ATTACK", "membership"]

METRICS = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")


def membership(case: Case) -> Found:
    """Tell the facts from unseen ones by what everybody makes of them.

    Raises:
        CorpusError: If there are no unseen texts.
    """
    if case.unseen is None:
        raise CorpusError("there is nothing to tell the facts from: give texts that no model has seen as unseen")
    options = {"batch_size": case.batch_size, "resamples": case.resamples, "seed": case.seed, "progress": False}
    edits: dict[str, Condition] = {
        name: [one.intervention for one in several if one.intervention is not None] or None
        for name, several in case.suspects.items()
        if name not in (BASE, REFERENCE)
    }
    report = measured(case.model, case.facts, case.unseen, edits, **options)
    measures = {(name, metric): report[name, "forget", metric] for name in (BASE, *edits) for metric in METRICS}
    if case.reference is not None:
        never = measured(case.reference, case.facts, case.unseen, {}, **options)
        measures |= {(REFERENCE, metric): never[BASE, "forget", metric] for metric in METRICS}
    measures |= {(name, SCORE): measures[name, "mia_min_k"] for name in case.suspects}
    return Found(measures)


ATTACK = Attack(
    name="membership",
    run=membership,
    words="membership",
    asks="Can the facts be told from facts that no model has seen, by how probable they are?",
    score="area under the ROC curve of Min-K%: 0.5 where nothing can be told",
    returns="of the lead over unseen facts is still there for membership inference",
)
