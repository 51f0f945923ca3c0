"""`sweep`: one method over strengths, beside its random control. `tune`: the largest forgetting within a retain budget.

Knows records of methods and how to evaluate; knows no method by name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lens_unlearn.core.errors import BudgetError, LensUnlearnError, SelectionError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.evaluation.evaluate import Condition, evaluate
from lens_unlearn.evaluation.report import BASE, Report
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.methods import record_of
from lens_unlearn.methods.method import Method
from lens_unlearn.model.host import Model
from lens_unlearn.neurons.maps import check_fraction

__all__ = ["Tuned", "cut_prompts", "sweep", "tune"]

Given = Method | str | Callable[..., Intervention]
"""A method as users give it: its function, its name, or its record."""


def cut_prompts(corpora: Mapping[str, Corpus], methods: Sequence[Method], seed: int = 0) -> dict[str, Corpus]:
    """Cut plain texts into prompts and what follows, if a method judges prompts or unlearns answers; others pass through.

    Then every condition is measured on the same tokens: those behind the prompts.
    """
    if not any(method.cuts_prompts for method in methods):
        return dict(corpora)
    return {name: c if c.has_prompts else c.with_prompts(seed=seed) for name, c in corpora.items()}


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
    batch_size: int = 8,
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
        batch_size: Full-length rows per forward.
        progress: Whether to show bars.

    Returns:
        A report whose conditions are named ``method@fraction`` and ``method:control@fraction``.
    """
    record = record_of(method)
    settings = record.with_progress(options or {}, progress)
    strengths = record.grid if fractions is None else fractions
    fitted = record.fit(model, forget, retain, settings)
    conditions: dict[str, Condition] = {}
    for strength in strengths:
        edit = conditions[f"{record.name}@{strength:g}"] = record.at(model, fitted, strength, settings)
        control = record.controls(model, edit, fitted, control_seeds, strength=strength, options=settings)
        if control:
            conditions[f"{record.name}:control@{strength:g}"] = control
    report = evaluate(model, cut_prompts(test, [record]), conditions, batch_size=batch_size, progress=progress)
    shown = {key: value for key, value in settings.items() if key not in ("reference", "progress")}
    about = {"sweep": {"method": record.name, "options": shown}, "controls": {record.name: record.control_words}}
    return replace(report, provenance={**report.provenance, **about})


@dataclass(frozen=True)
class Tuned:
    """What `tune` found."""

    intervention: Intervention
    """Fitted on the fit part, at the chosen fraction."""
    fraction: float
    """The share of neurons; of `key_space_detection`, the false positive rate that was allowed; of `simu`, the strength."""
    report: Report
    """Every fraction that was tried, on the tuning part."""
    forget_drop: float
    retain_drop: float

    def __repr__(self) -> str:
        return (
            f"Tuned(fraction={self.fraction:g}: {self.forget_drop:.1%} of forget lost at {self.retain_drop:.1%} of retain, "
            f"on tuning texts; {self.intervention!r})"
        )


def tune(
    method: Given,
    model: Model,
    forget: Any,
    retain: Any,
    *,
    retain_drop: float = 0.05,
    held_out: tuple[Corpus, Corpus] | None = None,
    facts: bool = False,
    metric: str = "top1",
    options: Mapping[str, Any] | None = None,
    evaluations: int = 10,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> Tuned:
    """Find the fraction that forgets most while the retain corpus loses at most a stated share of its accuracy.

    The method is fitted on one part of the documents and judged on another: fractions are doubled until the retain
    drop passes twice the budget, then the bracket of the budget is halved. Of all fractions tried within the budget the
    one with the largest forget drop is taken.

    Args:
        method: Such as `selective_pruning`; also its name on the command line, or a `Method`.
        model: Where to apply it.
        forget: Texts of the skill to remove; or, with `held_out`, what the method takes in their place.
        retain: Texts of what is to be retained; likewise.
        retain_drop: Budget: the largest share of the retain metric that may be lost, in [0, 1].
        held_out: Tuning texts (forget, retain), if they should not be split off: default, 40 % of the documents.
        facts: Whether `forget` is a list of memorized facts, which is fitted and tuned on whole, while `retain` is split.
        metric: A metric that falls as a skill is lost: "top1", "top10" or "top1_rare".
        options: Further options of the method.
        evaluations: How many fractions to try at most.
        seed: Of the split.
        batch_size: Full-length rows per forward.
        progress: Whether to show bars.

    Raises:
        BudgetError: If even the smallest fraction breaks the budget.
        LensUnlearnError: If there are no texts to tune on, or nothing to lose on them.
    """
    budget = check_fraction(retain_drop, "retain_drop")
    record = record_of(method)
    settings = record.with_progress(options or {}, progress)
    if held_out is None:
        if not isinstance(forget, Corpus) or not isinstance(retain, Corpus):
            raise LensUnlearnError(
                "moments and keys hold no texts to tune on: pass corpora, or held_out=(forget, retain)"
            )
        if facts:
            tune_forget, (retain, _) = forget, retain.without(forget)
        else:
            forget, tune_forget = forget.split(0.6, 0.4, seed=seed)
        retain, tune_retain = retain.split(0.6, 0.4, seed=seed)
    elif facts:
        raise LensUnlearnError("facts are tuned on whole: give facts=True or held_out=(forget, retain), not both")
    else:
        tune_forget, tune_retain = held_out
    corpora = cut_prompts({"forget": tune_forget, "retain": tune_retain}, [record], seed)
    fitted = record.fit(model, forget, retain, settings)
    tried: dict[float, tuple[float, float]] = {}
    edits: dict[float, Intervention] = {}
    measured = {"batch_size": batch_size, "resamples": 200, "progress": progress}
    whole, nothing = evaluate(model, corpora, {}, **measured), None
    for corpus in corpora:
        if whole[BASE, corpus, metric].value == 0:
            raise LensUnlearnError(
                f"the unedited model has {metric} 0 on the {corpus} corpus: there is nothing to lose"
            )
    for fraction in _search(budget, tried, evaluations):
        try:
            edits[fraction] = record.at(model, fitted, fraction, settings)
        except SelectionError as error:  # less than a single unit: there are few heads, say
            tried[fraction], nothing = (0.0, 0.0), error
            continue
        name = f"{record.name}@{fraction:g}"
        part = evaluate(model, corpora, {name: edits[fraction]}, base=whole, **measured)
        tried[fraction] = tuple(part.drop(name, corpus, metric).value for corpus in corpora)  # type: ignore[assignment]
        whole = whole + part
    if not edits and nothing is not None:
        raise nothing
    within = [fraction for fraction in edits if tried[fraction][1] <= budget]
    if not within:
        smallest = min(edits)
        raise BudgetError(
            f"no fraction stays within retain_drop={budget:g}: already {smallest:g} costs {tried[smallest][1]:.1%} of the "
            f"retain {metric}; raise the budget, or choose corpora that differ more"
        )
    best = max(within, key=lambda fraction: tried[fraction][0])
    return Tuned(edits[best], best, whole, *tried[best])


def _search(budget: float, tried: Mapping[float, tuple[float, float]], evaluations: int) -> Iterator[float]:
    """Yield fractions to try; `tried` holds the (forget, retain) drops of those yielded before."""
    fraction = 0.01
    while len(tried) < evaluations:
        yield fraction
        if tried[fraction][1] > 2 * budget or fraction >= 1:
            break
        fraction = min(1.0, fraction * 2)
    while len(tried) < evaluations:
        over = [f for f, (_, cost) in tried.items() if cost > budget]
        if not over:
            return
        high = min(over)
        low = max((f for f in tried if f < high), default=0.0)
        if high - low < max(0.002, 0.02 * high):
            return
        yield round((low + high) / 2, 4)
