"""`sweep`: one method over strengths, beside its random control. `tune`: the largest forgetting within a retain budget.

Knows records of methods and how to evaluate; knows no method by name.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lens_unlearn.core.errors import BudgetError, CorpusError, LensUnlearnError, SelectionError
from lens_unlearn.core.intervals import FEWEST
from lens_unlearn.core.numbers import NUMBERS, STRENGTH, check_numbers
from lens_unlearn.corpora.corpus import Corpus, require_corpora, require_corpus
from lens_unlearn.evaluation.evaluate import Condition, evaluate
from lens_unlearn.evaluation.report import BASE, Report
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.methods import record_of
from lens_unlearn.methods.budget import (
    CONFIDENCE,
    check_confidence,
    fewest_at_once,
    strengths_from,
    upper_bound,
    within,
)
from lens_unlearn.methods.method import Method
from lens_unlearn.model.host import Model, require_model

__all__ = ["Tuned", "check_units", "cut_prompts", "sweep", "tune"]

Given = Method | str | Callable[..., Intervention]
"""A method as users give it: its function, its name, or its record."""


def cut_prompts(
    corpora: Mapping[str, Corpus], methods: Sequence[Method], seed: int = 0, *, longest: int | None = None
) -> dict[str, Corpus]:
    """Cut plain texts into prompts and what follows, if a method judges prompts or unlearns answers; others pass through.

    Then every condition is measured on the same tokens: those behind the prompts.

    Args:
        corpora: By name.
        methods: Their records.
        seed: Of the places.
        longest: Tokens of a plain text that are used, at most, prompt and all; default all.
    """
    if not any(method.cuts_prompts for method in methods):
        return dict(corpora)
    texts = {name: c if longest is None else c.shortened(longest) for name, c in corpora.items()}
    return {name: c if c.has_prompts else c.with_prompts(seed=seed) for name, c in texts.items()}


def sweep(
    method: Given,
    model: Model,
    forget: Corpus,
    retain: Corpus,
    test: Mapping[str, Corpus],
    *,
    fractions: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    control_seeds: Sequence[int] = range(3),
    batch_size: int | None = None,
    progress: bool = True,
) -> Report:
    """Evaluate a method at several fractions, with random controls of equal per-layer counts.

    Args:
        method: Such as `selective_pruning`; also its name on the command line, or a `Method`.
        model: Where to apply it.
        forget: Texts to fit on.
        retain: Texts to fit on.
        test: Corpora to report on, by name; "forget" and "retain" among them for `separability`.
        fractions: Strengths, weak to strong: shares of the units; of `key_space_detection`, of false positives; of `simu`, factors.
            Default: the method's own grid.
        options: Further options of the method.
        control_seeds: Seeds of the controls; empty for none.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        progress: Whether to show bars.

    Returns:
        A report whose conditions are named ``method@fraction`` and ``method:control@fraction``.
    """
    require_model(model)
    require_corpora(test, "test corpora")
    record = record_of(method)
    settings = record.with_progress(options or {}, progress)
    strengths = record.grid if fractions is None else [STRENGTH.check(one, "fractions") for one in fractions]
    check_numbers(batch_size=batch_size)
    fitted = record.fit(model, forget, retain, settings)
    conditions: dict[str, Condition] = {}
    for strength in strengths:
        edit = conditions[f"{record.name}@{strength:g}"] = record.at(model, fitted, strength, settings)
        control = record.controls(model, edit, fitted, control_seeds, strength=strength, options=settings)
        if control:
            conditions[f"{record.name}:control@{strength:g}"] = control
    report = evaluate(model, cut_prompts(test, [record]), conditions, batch_size=batch_size, progress=progress)
    shown = {key: value for key, value in settings.items() if key not in ("reference", "progress")}
    about = {
        "sweep": {"method": record.name, "options": shown},
        "controls": {record.name: record.words_of_control(settings)},
    }
    return replace(report, provenance={**report.provenance, **about})


@dataclass(frozen=True)
class Tuned:
    """What `tune` found."""

    intervention: Intervention
    """At the chosen strength, fitted on the fit part; if it unlearns answers, refitted on all that is to be forgotten."""
    fraction: float
    """The share of neurons; of `key_space_detection`, the false positive rate that was allowed; of `simu`, the strength."""
    report: Report
    """Every strength that was tried, on the tuning part."""
    forget_drop: float
    """The share of the forget metric that was lost, on the tuning part."""
    retain: dict[str, tuple[float, float]]
    """By retain corpus: the share of its metric that was lost on the tuning part, and what as many fresh documents lose at most."""
    confidence: float
    """Of these bounds."""

    @property
    def worst(self) -> str:
        """The retain corpus with the largest bound."""
        return max(self.retain, key=lambda corpus: self.retain[corpus][1])

    @property
    def retain_drop(self) -> float:
        """What the worst retain corpus lost on the tuning part."""
        return self.retain[self.worst][0]

    @property
    def retain_bound(self) -> float:
        """What as many fresh documents of any retain corpus lose at most, with the stated confidence."""
        return self.retain[self.worst][1]

    def to_dict(self) -> dict[str, Any]:
        """Return what was found but the intervention and the report, as `run.json` keeps it."""
        return {
            "forget_drop": self.forget_drop,
            "retain_drop": self.retain_drop,
            "retain_bound": self.retain_bound,
            "confidence": self.confidence,
            "worst": self.worst,
            "retain": {corpus: {"drop": drop, "bound": bound} for corpus, (drop, bound) in self.retain.items()},
        }

    def __repr__(self) -> str:
        of = "" if len(self.retain) == 1 else f" (of {self.worst}, the worst of {len(self.retain)})"
        return (
            f"Tuned(fraction={self.fraction:g}: {self.forget_drop:.1%} of forget lost at {self.retain_drop:.1%} of retain{of} on "
            f"tuning texts, at most {self.retain_bound:.1%} on fresh ones with {self.confidence:.0%} confidence; "
            f"{self.intervention!r})"
        )


def tune(
    method: Given,
    model: Model,
    forget: Any,
    retain: Any,
    *,
    retain_drop: float = 0.05,
    confidence: float = CONFIDENCE,
    held_out: tuple[Corpus, Corpus | Mapping[str, Corpus]] | None = None,
    facts: bool = False,
    metric: str = "top1",
    options: Mapping[str, Any] | None = None,
    evaluations: int = 10,
    seed: int = 0,
    batch_size: int | None = None,
    base: Report | None = None,
    progress: bool = True,
) -> Tuned:
    """Find the strength that forgets most while fresh retain documents lose at most a stated share of their accuracy.

    The method is fitted on one part of the documents and judged on another. Twenty strengths in equal ratios are tested from weak
    to strong, by galloping and bisection: each by an upper bound, at a stated confidence, of what as many fresh documents lose, on
    every retain corpus. Of those tried within the budget the one with the largest forget drop is taken. The bound is of the
    bootstrap over documents, or groups; it speaks for documents like those that were tuned on, and for as many or more of them.
    Why it holds although many strengths are tried is said in `lens_unlearn.methods.budget`.

    A method that unlearns answers is fitted again at the chosen strength, on all that is to be forgotten and retained: facts that
    were held out to tune would not be unlearned. Its bounds are those of the fit that was tuned.

    Args:
        method: Such as `selective_pruning`; also its name on the command line, or a `Method`.
        model: Where to apply it.
        forget: Texts of the skill to remove; or, with `held_out`, what the method takes in their place.
        retain: Texts of what is to be retained, as one corpus, or several by name: the method is fitted on all together, and has
            to keep the budget on each. With `held_out`, likewise, or what the method takes.
        retain_drop: Budget: the largest share of the retain metric that may be lost, in [0, 1].
        confidence: Of the bound that has to be within the budget, from 0.5 to below 1.
        held_out: Tuning texts (forget, retain), if they should not be split off: default, 40 % of the documents. Here too, retain
            is a corpus, or several by name.
        facts: Whether `forget` is a list of memorized facts, which is fitted and tuned on whole, while `retain` is split.
        metric: A metric that falls as a skill is lost: "top1", "top10" or "top1_rare".
        options: Further options of the method.
        evaluations: How many strengths to try at most; seven are always enough.
        seed: Of the split.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        base: A report with the unedited model's measures on the tuning texts, so that several methods need it once; see `evaluate`.
        progress: Whether to show bars.

    Raises:
        BudgetError: If even the smallest strength may break the budget.
        CorpusError: If a retain corpus has fewer than 10 documents, or groups, to tune on.
        LensUnlearnError: If there are no texts to tune on, or nothing to lose on them.
    """
    require_model(model)
    budget = NUMBERS["retain_drop"].check(retain_drop, "retain_drop", SelectionError)
    confidence = check_confidence(confidence)
    check_numbers(evaluations=evaluations, seed=seed, batch_size=batch_size)
    record = record_of(method)
    settings = record.with_progress(options or {}, progress)
    whole_forget, whole_retain = forget, _together(retain, record)
    if held_out is None:
        texts = [forget, *(whole_retain if isinstance(whole_retain, list) else [whole_retain])]
        if not all(isinstance(text, Corpus) for text in texts):
            for role, part in zip(("forget", *["retain"] * len(texts)), texts, strict=False):
                if not hasattr(part, "fresh"):  # no statistic, either
                    require_corpus(part, role)
            raise LensUnlearnError(
                "moments and keys hold no texts to tune on: pass corpora, or held_out=(forget, retain)"
            )
        named = _by_name(retain)
        if facts:
            tune_forget, named = forget, {name: corpus.without(forget)[0] for name, corpus in named.items()}
        else:
            forget, tune_forget = forget.split(0.6, 0.4, seed=seed)
        parts = {name: corpus.split(0.6, 0.4, seed=seed) for name, corpus in named.items()}
        retain = {name: fit for name, (fit, _) in parts.items()}
        tune_retain = {name: tuning for name, (_, tuning) in parts.items()}
    elif facts:
        raise LensUnlearnError("facts are tuned on whole: give facts=True or held_out=(forget, retain), not both")
    else:
        tune_forget, tune_retain = held_out[0], _by_name(held_out[1])
    corpora = cut_prompts({"forget": tune_forget, **tune_retain}, [record], seed)
    tuned_on = {name: corpora[name] for name in tune_retain}
    units = check_units(tuned_on, budget, confidence, at_once=record.judges_prompts)
    fitted = record.fit(model, forget, _together(retain, record), settings)
    edits: dict[float, Intervention] = {}
    said: dict[float, list[warnings.WarningMessage]] = {}  # of strengths that are only tried, nobody has to hear
    forgotten: dict[float, float] = {}
    retained: dict[float, dict[str, tuple[float, float]]] = {}
    measured = {"batch_size": batch_size, "progress": progress}
    report, nothing = evaluate(model, corpora, {}, base=base, **measured), None
    for corpus in corpora:
        if report[BASE, corpus, metric].value == 0:
            raise LensUnlearnError(
                f"the unedited model has {metric} 0 on the {corpus} corpus: there is nothing to lose"
            )

    def bound(strength: float) -> float:
        nonlocal report, nothing
        try:
            with warnings.catch_warnings(record=True) as said[strength]:
                warnings.simplefilter("always")
                edits[strength] = record.at(model, fitted, strength, settings)
        except SelectionError as error:  # less than a single unit: there are few heads, say
            nothing = error
            return 0.0
        name = f"{record.name}@{strength:g}"
        report += evaluate(model, corpora, {name: edits[strength]}, base=report, **measured)
        forgotten[strength] = report.drop(name, "forget", metric).value
        drops = {corpus: report.drop(name, corpus, metric) for corpus in units}
        bounds = {c: upper_bound(drops[c], n, confidence, at_once=record.judges_prompts) for c, n in units.items()}
        retained[strength] = {corpus: (drops[corpus].value, bounds[corpus]) for corpus in units}
        return max(bounds.values())

    passed = within(strengths_from(min(record.grid) / 2), bound, budget, evaluations)
    if not edits and nothing is not None:
        raise nothing
    passed = [strength for strength in passed if strength in edits]
    if not passed:
        weakest = min(edits)
        worst, (drop, most) = max(retained[weakest].items(), key=lambda item: item[1][1])
        raise BudgetError(
            f"no {record.strength} stays within retain_drop={budget:g} with {confidence:.0%} confidence: already {weakest:g} costs "
            f"{drop:.1%} of the {worst} {metric}, up to {most:.1%} on fresh documents; raise the budget, give more retain texts, "
            "or choose corpora that differ more"
        )
    best = max(passed, key=lambda strength: (forgotten[strength], strength))  # few documents tie
    found = edits[best]
    for one in said[best]:
        warnings.warn(one.message, one.category, stacklevel=2)
    if held_out is None and record.unlearns_answers and not facts:
        found = record.at(model, record.fit(model, whole_forget, whole_retain, settings), best, settings)
    return Tuned(found, best, report, forgotten[best], retained[best], confidence)


def _by_name(retain: Corpus | Mapping[str, Corpus]) -> dict[str, Corpus]:
    """Return retain corpora by name."""
    named = {"retain": retain} if isinstance(retain, Corpus) else dict(require_corpora(retain, "retain corpora"))
    if not named or "forget" in named:
        raise LensUnlearnError("give one retain corpus, or several by names other than 'forget'")
    return named


def _together(retain: Any, record: Method) -> Any:
    """Return retain corpora that are given by name as a method takes them; anything else is returned as it is."""
    if isinstance(retain, Mapping):
        require_corpora(retain, "retain corpora")
    return record.together(list(retain.values())) if isinstance(retain, Mapping) and retain else retain


def check_units(corpora: Mapping[str, Corpus], budget: float, confidence: float, *, at_once: bool) -> dict[str, int]:
    """Return how many documents, or groups, of each retain corpus there are to tune on; refuse so few that they bound nothing.

    Raises:
        CorpusError: If there are fewer than 10 of any corpus.
        BudgetError: If losses come all at once, and even if none were seen, more than the budget could be lost.
    """
    units = {name: len(set(corpus.units)) for name, corpus in corpora.items()}
    corpus = min(units, key=lambda name: units[name])
    few, fewest = units[corpus], fewest_at_once(budget, confidence) if at_once else 0
    if few < FEWEST:
        raise CorpusError(
            f"the {corpus} corpus has {few} documents or groups to tune on, too few to bound what fresh ones lose: "
            f"{corpora[corpus].more()}, so that the part that is tuned on, 25 to 40 % where they are split, has at least {FEWEST}"
        )
    if few < fewest:
        raise BudgetError(
            f"the {corpus} corpus has {few} documents or groups to tune on: though none were abstained from, more than "
            f"retain_drop={budget:g} of fresh ones could be, with {confidence:.0%} confidence; give at least {fewest}, or raise "
            "the budget"
        )
    return units
