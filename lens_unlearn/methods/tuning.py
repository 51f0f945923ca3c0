"""`sweep`: one method over strengths, beside its random control. `tune`: the largest forgetting within a retain budget."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lens_unlearn.core.errors import BudgetError, LensUnlearnError, SelectionError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.evaluation.evaluate import Condition, evaluate
from lens_unlearn.evaluation.report import BASE, Report
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.methods.controls import random_delta, random_pruning
from lens_unlearn.methods.key_space_detection import key_space_detection, query_keys
from lens_unlearn.methods.neuron_adjust import neuron_adjust
from lens_unlearn.methods.selective_pruning import pruning_moments, selective_pruning
from lens_unlearn.methods.simu import simu
from lens_unlearn.model.host import Model
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.maps import check_fraction
from lens_unlearn.neurons.moments import Moments

__all__ = ["Tuned", "controls_for", "sweep", "tune"]

Method = Callable[..., Intervention]
Fitted = Corpus | Moments | KeySample | Delta | None
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
_SHARED = ("importance", "site", "unit", "reference", "batch_size", "progress")


def name_of(method: Method) -> str:
    """Return a method's name as reports and the command line write it."""
    return getattr(method, "__name__", type(method).__name__).replace("_", "-")


def prepare(
    method: Method, model: Model, forget: Fitted, retain: Fitted, options: Mapping[str, Any]
) -> tuple[Fitted, Fitted]:
    """Collect once what a method needs at every strength; corpora pass through where nothing can be shared."""
    if method is simu and isinstance(forget, Corpus):
        told = {key: value for key, value in options.items() if key != "strength"}
        return simu(model, forget, retain, **told), None  # type: ignore[arg-type]
    told = {key: value for key, value in options.items() if key in ("batch_size", "progress")}
    if method is neuron_adjust:
        share = lambda part: collect(model, part, options.get("site", "mlp.pre"), **told)  # noqa: E731
    elif method is key_space_detection:
        told |= {key: value for key, value in options.items() if key == "seed"}
        share = lambda part: query_keys(model, part, options.get("site", "mlp.post"), **told)  # noqa: E731
    elif method is selective_pruning and options.get("steps", 1) == 1:
        told |= {key: value for key, value in options.items() if key in _SHARED}
        share = lambda part: pruning_moments(model, part, **told)  # noqa: E731
    else:
        return forget, retain
    got, kept = (share(part) if isinstance(part, Corpus) else part for part in (forget, retain))
    return got, kept


def strength_of(method: Method) -> str:
    """Return the option that says how much is taken out: a share of neurons or of false alarms, or a delta's strength."""
    return {key_space_detection: "false_alarms", simu: "strength"}.get(method, "fraction")


def prompted(corpora: Mapping[str, Corpus], methods: Sequence[Method], seed: int = 0) -> dict[str, Corpus]:
    """Cut plain texts into prompts and what follows, if a method judges prompts or unlearns answers; others pass through.

    Then every condition is measured on the same tokens: those behind the prompts.
    """
    if key_space_detection not in methods and simu not in methods:
        return dict(corpora)
    return {name: c if c.has_prompts else c.with_prompts(seed=seed) for name, c in corpora.items()}


def with_progress(method: Method, options: Mapping[str, Any], progress: bool) -> dict[str, Any]:
    """Add `progress` to a method's options, if it takes that."""
    takes = "progress" in inspect.signature(method).parameters
    return {"progress": progress, **options} if takes else dict(options)


def controls_for(model: Model, intervention: Intervention, seeds: Sequence[int] = range(5)) -> list[Intervention]:
    """Return random selections of equal per-layer counts, one per seed; none for what selects no neurons.

    Of an `Adjust`, random neurons are adjusted by their own means and standard deviations; of a `Delta`, the controls are
    random updates of the same norm.
    """
    if isinstance(intervention, Delta):
        return [random_delta(intervention, seed=s) for s in seeds]
    if isinstance(intervention, Adjust):
        like = Ablate(intervention.selection)
        drawn = [random_pruning(model, like=like, seed=s) for s in seeds]
        return [replace(intervention, selection=one.selection, floored=0) for one in drawn]
    return [random_pruning(model, like=intervention, seed=s) for s in seeds] if isinstance(intervention, Ablate) else []


def sweep(
    method: Method,
    model: Model,
    forget: Corpus,
    retain: Corpus,
    test: Mapping[str, Corpus],
    *,
    fractions: Sequence[float] = FRACTIONS,
    options: Mapping[str, Any] | None = None,
    control_seeds: Sequence[int] = range(3),
    batch_size: int = 8,
    progress: bool = True,
) -> Report:
    """Evaluate a method at several fractions, with random controls of equal per-layer counts.

    Args:
        method: Such as `selective_pruning`.
        model: Where to apply it.
        forget: Texts to fit on.
        retain: Texts to fit on.
        test: Corpora to report on, by name; "forget" and "retain" among them for `separability`.
        fractions: Shares of the units, weak to strong; of `key_space_detection`, shares of false alarms; of `simu`, strengths.
        options: Further options of the method.
        control_seeds: Seeds of the controls; empty for none.
        batch_size: Full-length rows per forward.
        progress: Whether to show bars.

    Returns:
        A report whose conditions are named ``method@fraction`` and ``method:control@fraction``.
    """
    told = with_progress(method, options or {}, progress)
    conditions: dict[str, Condition] = {}
    counts: dict[str, float] = {}
    for fraction, edit in _at(method, model, forget, retain, fractions, told):
        conditions[f"{name_of(method)}@{fraction:g}"] = edit
        counts[f"{name_of(method)}@{fraction:g}"] = fraction
        control = controls_for(model, edit, control_seeds)
        if control:
            conditions[f"{name_of(method)}:control@{fraction:g}"] = control
    test = prompted(test, [method])
    report = evaluate(model, test, conditions, batch_size=batch_size, progress=progress)
    told = {key: value for key, value in told.items() if key not in ("reference", "progress")}
    return replace(report, provenance={**report.provenance, "sweep": {"method": name_of(method), "options": told}})


def _at(
    method: Method, model: Model, forget: Corpus, retain: Corpus, fractions: Sequence[float], options: Mapping[str, Any]
) -> Iterator[tuple[float, Intervention]]:
    got, kept = prepare(method, model, forget, retain, options)
    for fraction in fractions:
        yield fraction, method(model, got, kept, **{strength_of(method): fraction}, **options)


@dataclass(frozen=True)
class Tuned:
    """What `tune` found."""

    intervention: Intervention
    """Fitted on the fit part, at the chosen fraction."""
    fraction: float
    """The share of neurons; of `key_space_detection`, the share of false alarms that was allowed; of `simu`, the strength."""
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
    method: Method,
    model: Model,
    forget: Fitted,
    retain: Fitted,
    *,
    retain_drop: float = 0.05,
    held_out: tuple[Corpus, Corpus] | None = None,
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
        method: Such as `selective_pruning`.
        model: Where to apply it.
        forget: Texts of the skill to remove; or, with `held_out`, what the method takes in their place.
        retain: Texts of what is to stay; likewise.
        retain_drop: Budget: the largest share of the retain metric that may be lost, in [0, 1].
        held_out: Tuning texts (forget, retain), if they should not be split off: default, 40 % of the documents.
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
    told = with_progress(method, options or {}, progress)
    if held_out is None:
        if not isinstance(forget, Corpus) or not isinstance(retain, Corpus):
            raise LensUnlearnError(
                "moments and keys hold no texts to tune on: pass corpora, or held_out=(forget, retain)"
            )
        forget, tune_forget = forget.split(0.6, 0.4, seed=seed)
        retain, tune_retain = retain.split(0.6, 0.4, seed=seed)
    else:
        tune_forget, tune_retain = held_out
    corpora = prompted({"forget": tune_forget, "retain": tune_retain}, [method], seed)
    got, kept = prepare(method, model, forget, retain, told)
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
            edits[fraction] = method(model, got, kept, **{strength_of(method): fraction}, **told)
        except SelectionError as error:  # less than a single unit: there are few heads, say
            tried[fraction], nothing = (0.0, 0.0), error
            continue
        name = f"{name_of(method)}@{fraction:g}"
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
