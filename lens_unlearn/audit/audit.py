"""`audit`: is it gone? Everybody is asked about the same facts from several sides, and what comes back is one table.

Knows who is asked (the base, each condition, its random control, a model that never saw the facts), and what a share that comes
back is; knows no attack by name.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lens_unlearn.audit import attacks_of
from lens_unlearn.audit.attack import ANSWERS, RECOVERED, REFERENCE, SCORE, Attack, Case, Suspect, answered
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.core.numbers import check_numbers
from lens_unlearn.corpora.corpus import Corpus, require_corpus
from lens_unlearn.evaluation.bootstrap import WEIGHTS
from lens_unlearn.evaluation.conditions import SUFFIX
from lens_unlearn.evaluation.evaluate import Condition, replicates
from lens_unlearn.evaluation.metric import Metric
from lens_unlearn.evaluation.report import BASE, Measure, provenance_of
from lens_unlearn.methods.controls import controls_for
from lens_unlearn.model.hooks import one_thread
from lens_unlearn.model.host import Model, device_of, require_eval, require_model
from lens_unlearn.model.loading import fingerprint, load_model, model_name

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Audit", "audit"]

FACTS = "facts"
"""What tables call the corpus that is asked about."""
COLUMNS = ["condition", "attack", "corpus", "metric", "value", "low", "high", "n"]


@dataclass(frozen=True, eq=False, repr=False)
class Audit:
    """What every attack found of every condition, with bootstrap 95 % intervals over facts (or the groups they were read with).

    Metric "score" is an attack's one number, "recovered" the share of what the base knows that this is:
    (score - reference) / (base - reference), clipped to 0 to 1; it is left out where there is no reference, or where that does not
    differ from the base. A metric ``name@place`` is a point of a curve.
    """

    measures: dict[tuple[str, str, str], Measure]
    """By condition, attack and metric."""
    answers: dict[str, Measure]
    """By condition, the probability of the answers without any attack."""
    attacks: tuple[Attack, ...]
    """Those that were made, in order."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Attacks that could not be made, each with a sentence that says why."""
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By attack, what was left out of it."""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def conditions(self) -> list[str]:
        """The conditions: the base, each one with its control behind it, and the reference."""
        return list(self.answers)

    @property
    def has_reference(self) -> bool:
        """Whether a model that never saw the facts was asked, too."""
        return REFERENCE in self.answers

    def __getitem__(self, key: tuple[str, str, str]) -> Measure:
        """Return the measure of (condition, attack, metric).

        Raises:
            LensUnlearnError: If it was not measured; the message lists what was.
        """
        if key not in self.measures:
            metrics = dict.fromkeys(metric.partition("@")[0] for _, _, metric in self.measures)
            raise LensUnlearnError(
                f"{key} was not measured: conditions are {', '.join(self.conditions)}; attacks "
                f"{', '.join(attack.name for attack in self.attacks)}; metrics {', '.join(metrics)}"
            )
        return self.measures[key]

    def curve(self, condition: str, attack: str, metric: str) -> dict[str, Measure]:
        """Return the points of a curve by their place, such as a layer; empty where there are none."""
        return {
            name.partition("@")[2]: measure
            for (own, by, name), measure in self.measures.items()
            if (own, by) == (condition, attack) and name.partition("@")[0] == metric and "@" in name
        }

    def kept(self, condition: str) -> Measure | None:
        """Return the share of the base's answers that is left without any attack, between those of the reference and the base.

        None where there is no reference, or where that does not differ from the base.
        """
        return share_of(self.answers[condition], self.answers[BASE], self.answers.get(REFERENCE))

    def to_frame(self) -> "pd.DataFrame":
        """Give one row per condition, attack and metric: condition, attack, corpus, metric, value, low, high, n."""
        import pandas as pd

        rows = [
            [condition, attack, FACTS, metric, measure.value, *measure.interval(), measure.n]
            for (condition, attack, metric), measure in self.measures.items()
        ]
        return pd.DataFrame(rows, columns=pd.Index(COLUMNS))

    def table(self, metric: str | None = None) -> "pd.DataFrame":
        """Give a small table for reading: conditions by attacks, "value [low, high]".

        Args:
            metric: Default "recovered" where there is a reference, else "score".
        """
        import pandas as pd

        metric = metric or (RECOVERED if self.has_reference else SCORE)
        rows = {}
        for condition in self.conditions:
            own = {"answers": _written(self.answers[condition])}
            for attack in self.attacks:
                measure = self.measures.get((condition, attack.name, metric))
                own[attack.name] = _written(measure) if measure else ""
            if not self.has_reference:
                own[REFERENCE] = "no reference"
            rows[condition] = own
        return pd.DataFrame.from_dict(rows, orient="index")

    def csv(self) -> str:
        """Return `to_frame` as CSV, in which a spreadsheet finds nothing to run."""
        from lens_unlearn.evaluation.report import harmless

        frame = self.to_frame()
        for column in ("condition", "attack", "metric"):
            frame[column] = [harmless(name) for name in frame[column]]
        return frame.to_csv(index=False)

    def record(self) -> dict[str, Any]:
        """Return everything in what JSON can hold: the table, what was left out and why, and where it came from."""
        frame = self.to_frame().astype(object)
        rows = [
            {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
            for row in frame.to_dict("records")
        ]
        answers = {name: [one.value, *map(_or_none, one.interval()), one.n] for name, one in self.answers.items()}
        return {
            "rows": rows,
            "answers": answers,
            "left_out": self.left_out,
            "notes": {name: list(notes) for name, notes in self.notes.items()},
            "reference": self.provenance.get("reference") or "no reference",
            "provenance": self.provenance,
        }

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page of its own that opens offline: a sentence a condition, a heat map, layer curves, and the table."""
        from lens_unlearn.core.artefacts import replace_file
        from lens_unlearn.reports.audit_page import audit_page

        replace_file(path, audit_page(self).encode(errors="backslashreplace"))

    @property
    def figures(self) -> dict[str, Any]:
        """The figures of the page by title: the heat map, and the curves of each attack that has some."""
        from lens_unlearn.figures.audit import audit as heat_map
        from lens_unlearn.figures.recoverability import recoverability

        drawn = {"What comes back": heat_map(self)}
        for attack in self.attacks:
            for metric in list(attack.curves)[:1]:
                if any(self.curve(condition, attack.name, metric) for condition in self.conditions):
                    drawn[f"{attack.words}: {attack.curves[metric]}"] = recoverability(self, attack.name)
        return drawn

    def __repr__(self) -> str:
        what = "share recovered" if self.has_reference else "scores, no reference"
        gone = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return f"Audit({len(self.conditions)} conditions, {len(self.attacks)} attacks, {what}{gone})\n{self.table().to_string()}"

    def _repr_html_(self) -> str:
        import html

        gone = "".join(f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in self.left_out.items())
        what = "share recovered" if self.has_reference else "scores; no reference"
        return f"<div>{self.table().to_html()}<p><small>{what}</small></p>{gone and f'<ul>{gone}</ul>'}</div>"


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _written(measure: Measure) -> str:
    low, high = measure.interval()
    return f"{measure.value:.2f}" + ("" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]")


def audit(
    model: Model,
    facts: Corpus,
    conditions: Mapping[str, Condition],
    *,
    reference: Model | str | os.PathLike[str] | None = None,
    attacks: Sequence[str | Attack] | None = None,
    controls: bool | int = True,
    retain: Corpus | None = None,
    unseen: Corpus | None = None,
    labels: Sequence[Any] | None = None,
    batch_size: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Audit:
    """Look from several sides whether what was unlearned is gone, or only not said.

    Each attack is asked of the unedited model, of every condition, of its random control, and of a model that never saw the facts
    where there is one. What it finds is set between the two ends: `recovered` = (attacked - never saw) / (base - never saw), within
    0 and 1. Everything is a hook that is removed again, so the model is bitwise as before.

    An attack that cannot be made here (too few facts, no answers, a reference of another shape) is left out and says why, and the
    others go on.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode, which knows the facts.
        facts: What was to be forgotten: questions with answers, or texts. Where it was read with groups, such as the subjects of
            facts, these are what intervals resample and what splits keep whole.
        conditions: As for `evaluate`; "NAME:control" is the control of "NAME" where you give one of your own.
        reference: A model of the same shape and tokenizer that never saw the facts, or its directory.
        attacks: Names of `lens_unlearn.audit.ATTACKS`, or attacks of your own; None for all.
        controls: Whether each condition gets a random control, or how many with different seeds (their mean is given). What
            selects nothing, such as an `Abstain`, has none unless you give it.
        retain: Texts of the same kind that were to be retained: relearned to see whether the facts come back with them.
        unseen: Texts of the same kind that no model has seen: whom membership tells the facts from.
        labels: For each fact a property that the probe looks for; default the class of the answer's first token.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        resamples: Bootstrap draws.
        seed: Of the bootstrap and of all that is drawn.
        progress: Whether to show bars.

    Returns:
        The table of all of it, with figures and a page.

    Raises:
        CorpusError: If a corpus fits another model, or none of the facts has a token that is predicted.
        LensUnlearnError: If a condition is no intervention or is called "base" or "reference"; if there is no such attack.
        ModelError: If the model is in training mode, or the reference cannot be loaded.
    """
    require_model(model)
    require_eval(model)
    check_numbers(batch_size=batch_size, seed=seed)
    chosen = attacks_of(attacks)
    if not isinstance(conditions, Mapping):
        raise LensUnlearnError(
            f"conditions are given by name: pass {{'a name': intervention}}, and not a {type(conditions).__name__}"
        )
    if REFERENCE in conditions:
        raise LensUnlearnError(
            "the condition 'reference' is the model that never saw the facts: give the intervention another name"
        )
    for role, corpus in (("facts", facts), ("retain", retain), ("unseen", unseen)):
        if corpus is not None or role == "facts":
            require_corpus(corpus, role).check(model)
    asked = _answers_only(facts)
    if labels is not None and len(labels) != facts.n_documents:
        raise LensUnlearnError(f"{len(labels)} labels are given for {facts.n_documents} facts: give one for each")
    if labels is not None and facts.answers:
        labels = [label for label, answer in zip(labels, facts.answers, strict=True) if answer is not None]
    runs = _with_controls(model, conditions, int(controls), retain)
    suspects = {name: [Suspect(model, one) for one in several] for name, several in runs.items()}
    notes: dict[str, tuple[str, ...]] = {}
    if controls and (without := _without_control(runs)):
        notes["controls"] = tuple(
            f"{name} has none, for it selects nothing: give one as '{name}{SUFFIX}'" for name in without
        )
    if reference is not None:
        never_saw, why = _reference(model, facts, reference)
        if never_saw is not None:
            suspects[REFERENCE] = [Suspect(never_saw)]
        else:
            notes[REFERENCE] = (why,)
    options: dict[str, Any] = {"batch_size": batch_size, "resamples": resamples, "seed": seed, "progress": progress}
    case = Case(model, asked, suspects, retain, unseen, labels, **options)
    measures: dict[tuple[str, str, str], Measure] = {}
    made, left_out = [], {}
    with one_thread(model):
        answers = _plain(case)
        for attack in chosen:
            try:
                found = attack.run(case)
            except LensUnlearnError as error:
                left_out[attack.name] = str(error)
                continue
            made.append(attack)
            own, without = _recovered(case, found.measures)
            measures |= {(condition, attack.name, metric): one for (condition, metric), one in own.items()}
            notes |= {attack.name: (*found.notes, *without)} if found.notes or without else {}
    return Audit(measures, answers, tuple(made), left_out, notes, _provenance(case, conditions, reference))


def _answers_only(facts: Corpus) -> Corpus:
    """Return the facts that have answers, if any has, with an end-of-text token behind them not counted.

    Raises:
        CorpusError: If nothing in them is predicted.
    """
    if facts.answers:
        with_answer = [i for i, answer in enumerate(facts.answers) if answer is not None]
        facts = facts if len(with_answer) == facts.n_documents else facts.only(with_answer)
    if facts.answer_eos is not None:
        counted = facts.counted.clone()
        for row in range(facts.n_rows):
            if facts.ends_with_eos(row):
                own = counted[facts.starts[row] : facts.starts[row + 1]]
                own[int(own.nonzero().max())] = False
        facts = replace(facts, counted=counted, answer_eos=None)
    if not any(bool(batch.counted[:, 1:].any()) for batch in facts.batches()):
        raise CorpusError(f"nothing in {facts.name} is predicted: give questions with answers, or longer texts")
    return facts


def _with_controls(
    model: Model, conditions: Mapping[str, Condition], controls: int, retain: Corpus | None
) -> dict[str, list[Any]]:
    """Return everybody's interventions, each with its control behind it."""
    if controls < 0:
        raise LensUnlearnError(f"controls={controls} is no number of controls: True for one each, False for none")
    given = replicates(conditions)
    runs: dict[str, list[Any]] = {BASE: given.pop(BASE)}
    for name, several in given.items():
        runs[name] = list(several)
        drawn = f"{name}{SUFFIX}"
        if (
            controls
            and not name.endswith(SUFFIX)
            and drawn not in given
            and len(several) == 1
            and several[0] is not None
        ):
            found = controls_for(model, several[0], range(controls))
            runs |= {drawn: found} if found else {}
    return runs


def _without_control(runs: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return the conditions that do something and have no control."""
    return [
        name
        for name, several in runs.items()
        if name != BASE and not name.endswith(SUFFIX) and f"{name}{SUFFIX}" not in runs and several != [None]
    ]


def _reference(model: Model, facts: Corpus, reference: Model | str | os.PathLike[str]) -> tuple[Model | None, str]:
    """Return the model that never saw the facts; or why it cannot be asked about them."""
    if isinstance(reference, str | os.PathLike):
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        reference = load_model(os.fspath(reference), dtype=dtype, device=str(device_of(model)))
    require_model(reference)
    require_eval(reference)
    try:
        facts.check(reference)
    except CorpusError as error:
        return None, f"the reference cannot be asked about the facts, so there is none: {error}"
    return reference, ""


def _plain(case: Case) -> dict[str, Measure]:
    """Ask everybody without any attack."""
    values = {
        name: [answered(case, one, case.facts)[:, None] for one in several] for name, several in case.suspects.items()
    }
    known = np.isfinite(values[BASE][0]).astype(np.float64)
    found = case.measures([Metric(SCORE, ANSWERS, unit="probability")], values, known, case.facts)
    return {condition: measure for (condition, _), measure in found.items()}


def _recovered(
    case: Case, found: Mapping[tuple[str, str], Measure]
) -> tuple[dict[tuple[str, str], Measure], tuple[str, ...]]:
    """Add the share of what the base knows that each score is; or say why that is nothing."""
    measures = dict(found)
    base, never = measures.get((BASE, SCORE)), measures.get((REFERENCE, SCORE))
    if base is None or never is None:
        return measures, ()
    for condition in case.suspects:
        if (own := measures.get((condition, SCORE))) is not None:
            share = share_of(own, base, never)
            if share is None:
                return measures, ("the reference scores as the base does, so that there is nothing to be recovered",)
            measures[condition, RECOVERED] = share
    return measures, ()


def share_of(own: Measure, base: Measure, never: Measure | None) -> Measure | None:
    """Return (own - never) / (base - never), clipped to 0 to 1, paired draw by draw; None where the two ends do not differ."""
    if never is None:
        return None
    between = base.minus(never)
    low, high = between.interval()
    if between.value == 0 or math.isnan(between.value) or low <= 0 <= high:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = np.clip(own.minus(never).draws / between.draws, 0, 1) + 0.0  # no negative zero
    value = float(np.clip((own.value - never.value) / between.value, 0, 1)) + 0.0
    return replace(own, value=value, draws=draws, spread=None)


def _provenance(
    case: Case, conditions: Mapping[str, Condition], reference: Model | str | os.PathLike[str] | None
) -> dict[str, Any]:
    facts = case.facts
    settings: dict[str, Any] = {
        "model": model_name(case.model),
        "fingerprint": fingerprint(case.model),
        "facts": {
            "source": facts.name,
            "tokens": facts.n_tokens,
            "documents": facts.n_documents,
            "units": len(set(facts.units)),
            "fingerprint": facts.fingerprint,
        },
        "conditions": {
            name: repr([one.intervention for one in several] if len(several) > 1 else several[0].intervention)
            for name, several in case.suspects.items()
        },
        "bootstrap": {"resamples": case.resamples, "seed": case.seed, "weights": WEIGHTS},
    }
    if case.reference is not None:
        settings["reference"] = (
            str(reference) if isinstance(reference, str | os.PathLike) else model_name(case.reference)
        )
        settings["reference fingerprint"] = fingerprint(case.reference)
    for role in ("retain", "unseen"):
        if (corpus := getattr(case, role)) is not None:
            settings[role] = {"source": corpus.name, "documents": corpus.n_documents, "fingerprint": corpus.fingerprint}
    return provenance_of(settings)
