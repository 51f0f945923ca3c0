"""Relearning: how much of the tested facts comes back with a little fine-tuning on other texts.

Half of the facts are tested, and the model is fine-tuned on the other half, on a dozen of those, or on retained facts only (Lynch
et al., arXiv 2402.16835; Hu et al., "Unlearning or Obfuscating?", arXiv 2406.13356). The reference is fine-tuned alike: what comes
as slowly as in it was not there. See `evaluation.relearning`: weights are trained by AdamW outside the model, with the intervention
written into them where it is a change of weights, and in force otherwise; what acts on the logits alone is not fine-tuned with.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lens_unlearn.audit.attack import SCORE, Attack, Case, Found, Suspect, answered, each_suspect
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.evaluation.bootstrap import over_replicates
from lens_unlearn.evaluation.relearning import dense_edits, relearn
from lens_unlearn.evaluation.report import Measure
from lens_unlearn.interventions.base import Chain, Intervention, members_of
from lens_unlearn.model.host import Model

__all__ = ["ATTACK", "BATCH", "LR", "STEPS", "relearning"]

STEPS = (0, 1, 2, 4, 8, 16, 32)
LR, BATCH, DOZEN = 1e-4, 8, 12


def relearning(case: Case, *, lr: float = LR, steps: Sequence[int] = STEPS, batch_size: int = BATCH) -> Found:
    """Fine-tune everybody, and measure the share of the tested facts' tokens that are known after each number of steps.

    Results depend on the rate: for another one, give ``replace(ATTACK, run=partial(relearning, lr=1e-3))`` as an attack.

    Args:
        case: The case.
        lr: Of AdamW.
        steps: After how many steps to measure; the score is the last one's.
        batch_size: Rows in a step.

    Raises:
        CorpusError: If there are too few facts to test one half with the other.
        ModelError: If a model is quantized.
    """
    others, tested = (case.facts.only(half) for half in case.halves)
    texts = {"other": others}
    texts |= {"dozen": others.only(range(DOZEN))} if others.n_documents > DOZEN else {}
    texts |= {"retain": case.retain} if case.retain is not None else {}
    options: dict[str, Any] = {"steps": steps, "lr": lr, "batch_size": batch_size}
    options |= {"seed": case.seed, "resamples": case.resamples, "progress": False, "measured": {"facts": tested}}

    def curve(suspect: Suspect, corpus: Corpus) -> dict[int, Measure]:
        edit = in_weights_or_inside(suspect.intervention)
        run = relearn(suspect.model, corpus, edit, attached=not _is_edit(suspect.model, edit), **options)
        return {step: measure for (_, step), measure in run.measures.items()}

    seen: dict[tuple[str, str], list[Measure]] = {}
    broken: list[str] = []
    for name, _, suspect in each_suspect(case, "relearning"):
        if not np.isfinite(answered(case, suspect, tested)).all():
            broken.append(name)
            continue
        for what, corpus in texts.items():
            for step, measure in curve(suspect, corpus).items():
                seen.setdefault((name, f"{what}@{step}"), []).append(measure)
    measures = {key: _mean(several, case.seed) for key, several in seen.items()}
    measures |= {
        (name, SCORE): measures[name, f"other@{steps[-1]}"] for name in dict.fromkeys(name for name, _ in seen)
    }
    notes = [] if "retain" in texts else ["relearning retained facts only was left out: give retain"]
    notes += [f"{name} gives logits that are no numbers, and is not fine-tuned" for name in dict.fromkeys(broken)]
    notes += [
        f"{name} acts on the logits alone, which whoever fine-tunes the weights does not run: it is fine-tuned without"
        for name, several in case.suspects.items()
        if (own := several[0].intervention) is not None and members_of(own) and in_weights_or_inside(own) is None
    ]
    return Found(measures, tuple(notes))


def in_weights_or_inside(intervention: Intervention | None) -> Intervention | None:
    """Return what of an intervention is fine-tuned with: whoever has the weights does not run what acts on the logits alone."""
    if intervention is None:
        return None
    kept = tuple(one for one in members_of(intervention) if one.hooks() or one.matrices())
    return kept[0] if len(kept) == 1 else Chain(kept) if kept else None


def _is_edit(model: Model, intervention: Intervention | None) -> bool:
    """Whether what acts can be written into the weights."""
    try:
        dense_edits(model, intervention)
    except LensUnlearnError:
        return False
    return True


def _mean(several: list[Measure], seed: int) -> Measure:
    if len(several) == 1:
        return several[0]
    pairs: list[tuple[float, np.ndarray]] = [(one.value, one.draws) for one in several]
    return over_replicates(pairs, several[0].n, several[0].units, seed)


ATTACK = Attack(
    name="relearning",
    run=relearning,
    words="relearning",
    asks="How much of the tested facts comes back when the model is fine-tuned on other facts for a few steps?",
    score=f"share of the tested facts' tokens that are known after {STEPS[-1]} steps of AdamW at lr {LR:g} on the other half",
    returns="comes back with other facts relearned",
    curves={
        "other": "share of tokens known; fine-tuned on the other half of the facts",
        "dozen": "share of tokens known; fine-tuned on a dozen of the others",
        "retain": "share of tokens known; fine-tuned on retained facts only",
    },
    over="step",
)
