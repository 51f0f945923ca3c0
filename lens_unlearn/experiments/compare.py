"""`compare`: all methods and their controls over a set of skills, each forgotten in turn while the others are retained."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import permutations
from typing import TYPE_CHECKING, Any

from lens_unlearn import figures, methods
from lens_unlearn.core import distributed
from lens_unlearn.core.artefacts import replace_file
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.core.names import check_name
from lens_unlearn.core.numbers import NUMBERS
from lens_unlearn.corpora.corpus import Corpus, require_corpora
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.evaluation.report import BASE, Measure, Report, mean_of, provenance_of
from lens_unlearn.experiments.documents import Reader, reading_of
from lens_unlearn.experiments.experiment import Experiment
from lens_unlearn.experiments.output import write_settings
from lens_unlearn.experiments.plan import Plan, settings_of
from lens_unlearn.experiments.report_file import REPORT_FILE
from lens_unlearn.experiments.run_folder import REPORT, Form, RunFolder
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.methods.budget import CONFIDENCE
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.loading import fingerprint, load_model, model_name
from lens_unlearn.reports.comparison_page import comparison_page

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Comparison",
    "GivenTexts",
    "SkillRun",
    "carry_out_comparison",
    "compare",
    "compared",
    "plans_for",
    "split_skills",
]

SHARES = (0.65, 0.35)
"""Of each skill's documents: to fit and tune on, and to test on; where no separate test texts are given."""
_TAKEN = ("kept", "all others", "compare.html", "matrix.csv", "run.json", REPORT_FILE)
"""What no skill can be called, since something else is: a file of the folder, or what the report means by it."""


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Report):
    """The report of `compare`: its `parts` each forget one skill, and its own measures are means over them.

    `to_frame` is the matrix: one row per forgotten skill, condition, measured skill and metric.
    """

    def to_frame(self) -> "pd.DataFrame":
        """Give one row per forgotten skill, condition, measured corpus and metric.

        The columns are forgotten, method, condition, measured, metric, value, low, high, n, and the difference to the
        unedited model, paired over documents. What is measured is a skill, or "retain": all skills but the forgotten one,
        in equal parts.
        """
        import pandas as pd

        frames = []
        for part in self.parts:
            forgotten = part.provenance["forgotten"]
            frame = part.to_frame().rename(columns={"corpus": "measured"})
            frame["measured"] = frame["measured"].replace({"forget": forgotten})
            frame.insert(0, "method", frame["condition"].str.removesuffix(":control"))
            frame.insert(0, "forgotten", forgotten)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def csv(self) -> str:
        """Return `to_frame` as CSV; names of skills and methods hold nothing that a spreadsheet runs."""
        return self.to_frame().to_csv(index=False)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page that opens offline: both figures, what they say in words, the tables, and the settings."""
        replace_file(path, comparison_page(self).encode(errors="backslashreplace"))

    def table(self, metrics: Sequence[str] = ("top1",)) -> "pd.DataFrame":
        """Give a small table for reading: the share of a metric lost, by forgotten skill and condition.

        Args:
            metrics: Metrics that fall as a skill is lost.
        """
        import pandas as pd

        rows: dict[tuple[str, str], dict[str, str]] = {}
        for part in self.parts:
            forgotten = part.provenance["forgotten"]
            for condition in part.conditions:
                if condition != BASE:
                    rows[forgotten, condition] = _lost(part, condition, metrics)
        index = pd.MultiIndex.from_tuples(rows, names=["forgotten", "condition"]) if rows else None
        return pd.DataFrame(list(rows.values()), index=index).fillna("")

    def __repr__(self) -> str:
        skills = ", ".join(part.provenance["forgotten"] for part in self.parts)
        return f"Comparison({skills}; shares of top1 lost)\n{self.table().to_string()}"


def _lost(part: Report, condition: str, metrics: Sequence[str]) -> dict[str, str]:
    """Write what a condition took from the forgotten skill, from all others together, and from each of them."""
    cells: dict[str, str] = {}
    for metric in metrics:
        for corpus in part.corpora:
            if (condition, corpus, metric) in part.measures:
                drop = part.drop(condition, corpus, metric)
                name = {"forget": "forgotten skill", "retain": "all others"}.get(corpus, corpus)
                cells[f"{name} {metric}"] = f"{drop.value:.1%} [{drop.ends('.1%')}]"
    return cells


class GivenTexts(Reader):
    """Takes corpora that are read and split already, by name."""

    def corpus(self, source: str, *, whole: bool = False) -> Corpus:
        """Return a corpus by its name."""
        return self.known[source]


class SkillRun(Experiment):
    """One skill forgotten and all others retained, on corpora that are read and split already."""

    reader = GivenTexts

    @property
    def goes_on(self) -> bool:
        """Whether a method that cannot keep the budget changes nothing, and the others go on: always."""
        return True

    def _find(self, name: str) -> tuple[Intervention, dict[str, Any]]:
        """Tune a method; errors say of which skill and method."""
        try:
            return super()._find(name)
        except LensUnlearnError as error:
            raise type(error)(f"{self.words_of(name)}{error}") from error

    def words_of(self, name: str) -> str:
        """Return how an error about a method begins: with the skill and the method."""
        return f"forgetting {self.plan.forget} by {name}: "

    def _test_tokens(self) -> dict[str, int]:
        """Test on all texts: a skill's have to be the same whichever is forgotten."""
        return {}

    def expected_test(self) -> dict[str, Corpus]:
        """Return all texts to test on."""
        return self.documents.test

    def _require_some(self) -> None:
        """Go on with the other skills: of all together, `_report` looks whether there is anything."""

    def part(self) -> Report:
        """Measure everything on the test documents."""
        report = self._kept("kept/evaluation.safetensors", REPORT, self._evaluate)
        provenance = {
            **report.provenance,
            "forgotten": self.plan.forget,
            "retain_drop": self.plan.retain_drop,
            "confidence": self.plan.confidence,
            "plan": settings_of(self.plan),
            "protocol": self.plan.protocol,
            "chosen": self.chosen,
            "controls": self.control_words(),
            "documents": self.documents.counts(),
            "retained": list(self.documents.retained),
            **self.failures(),
        }
        return replace(
            report,
            provenance=provenance,
            title=f"Forget {self.plan.forget}, keep the rest",
            interventions=dict(self.edits),
        )


def compared() -> tuple[str, ...]:
    """Return the methods that are compared unless others are named: those that train nothing, without the baselines."""
    return tuple(method.name for method in methods.METHODS if method.by_default)


class _SkillFolder(RunFolder):
    """What one skill's run has finished, in the folder of the whole comparison."""

    def __init__(self, whole: RunFolder, skill: str) -> None:
        super().__init__(whole.out)
        self.skill = skill
        self.kept = whole.kept / skill

    def keep(self, name: str, form: Form, make: Any, unless: Any = lambda: False) -> Any:
        kept = name.startswith("kept/")
        own = f"kept/{self.skill}/{name.removeprefix('kept/')}" if kept else f"{self.skill}/{name}"
        (self.folder / own).parent.mkdir(parents=True, exist_ok=True)
        return super().keep(own, form, make, unless)


def compare(
    model: Model,
    skills: Mapping[str, Corpus],
    methods: Sequence[str] | None = None,
    *,
    test: Mapping[str, Corpus] | None = None,
    facts: bool = False,
    retain_drop: float = 0.05,
    confidence: float = CONFIDENCE,
    tokens: int = 20_000,
    settings: Mapping[str, Any] | None = None,
    controls: int = 3,
    deal: bool | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Comparison:
    """Forget each skill of a set in turn, by every method and its random control, within one budget.

    While one skill is forgotten, all others together, in equal parts, are the retain corpus. Each method is fitted on one part
    of the documents, tuned on another as `tune` does, so that every other skill loses at most the budget, and
    reported on a third. A method of which no strength stays within the budget takes nothing out, and the report says so.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
        skills: Two or more corpora, by name.
        methods: By the names that the command line uses, such as "selective-pruning". Default: all but "simu", which
            unlearns answers, by training.
        test: Separate test texts of each skill. Default: 35 % of each skill's documents, split off.
        facts: Whether the skills are lists of memorized facts: the forgotten one is fitted, tuned and tested on whole, and the
            others are split, or tested on `test`.
        retain_drop: The budget: the largest share of top-1 accuracy that each other skill may lose, in [0, 1].
        confidence: With which fresh documents of every other skill are to lose no more, as in `tune`.
        tokens: Tokens of each side to fit on, and to test on; half as many to tune on.
        settings: Options of the methods, as in ``{"importance": "rms", "neuron-adjust.site": "mlp.post"}``.
        controls: Random controls per method, each with a seed of its own.
        deal: Whether a method's controls share the test documents, instead of each reading all (see `evaluate`): one pass in place
            of as many, and a wider interval; None where there are several methods, and four controls at least.
        seed: Of splits, samples, controls and the bootstrap.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        progress: Whether to show bars.

    Returns:
        A report whose `parts` each forget one skill: there "forget" is that skill and "retain" all others, and every other skill
        is measured for itself too. Its own measures are means over the parts. `lens_unlearn.plot.forgetting_matrix` and
        `lens_unlearn.plot.frontier` draw it.

    Raises:
        LensUnlearnError: If there are fewer than two skills, or a name or method cannot be used.
        CorpusError: If a corpus is too short to be split, fits another model, or is a part of another skill's.
    """
    require_model(model)
    require_corpora(skills, "skills")
    if test is not None:
        require_corpora(test, "test texts")
    chosen = compared() if methods is None else tuple(methods)
    plans = plans_for(
        list(skills), model_name(model), methods=chosen, retain_drop=retain_drop, confidence=confidence, tokens=tokens,
        settings=dict(settings or {}), controls=controls, deal=deal, seed=seed, batch_size=batch_size, facts=facts,
    )  # fmt: skip
    runs = _skill_runs(plans, model, split_skills(skills, test, seed, facts=facts), progress=progress)
    _announce(runs)
    return _report(runs, {skill: run.part() for skill, run in _fitted(runs)})


def _announce(runs: Mapping[str, SkillRun]) -> None:
    first, *others = runs.values()
    first.announce(*others)


def plans_for(skills: Sequence[str], model: str, **settings: Any) -> dict[str, Plan]:
    """Return one plan per skill, in which it is forgotten and all others are retained.

    Raises:
        LensUnlearnError: If there are fewer than two skills, or a name, method, budget or number cannot be used.
    """
    for number, name in enumerate(skills):
        check_name(name, "a skill", taken=(*_TAKEN, *skills[:number]))
    if len(skills) < 2:
        raise LensUnlearnError(f"there are {len(skills)} skills to compare on: give two or more, each by a name")
    if "retain_drop" in settings:  # without it, methods are used at the strength that their options say
        NUMBERS["retain_drop"].check(settings["retain_drop"], "retain_drop")
    plans, facts = {}, settings.get("facts", False)
    for skill in skills:
        others = [name for name in skills if name != skill]
        plans[skill] = Plan(
            model=model, forget=skill, retain=tuple(map(_rest, others) if facts else others),
            also={name: _test(name) for name in others}, test_forget=None if facts else _test(skill),
            test_retain=tuple(map(_test, others)), sweep=False, **settings,
        )  # fmt: skip
        plans[skill].require_options()
    return plans


def _test(skill: str) -> str:
    """Name the test texts of a skill, which stand beside those that are fitted and tuned on."""
    return f"{skill}:test"


def _rest(skill: str) -> str:
    """Name the texts of a skill that are fitted and tuned on, where the skill itself is known as a whole."""
    return f"{skill}:rest"


def split_skills(
    skills: Mapping[str, Corpus], test: Mapping[str, Corpus] | None, seed: int, *, facts: bool = False
) -> dict[str, Corpus]:
    """Return what to fit and tune on, by skill, and what to test on; of facts also each skill as a whole."""
    if test is not None and set(test) != set(skills):
        raise LensUnlearnError(
            f"test texts are of {_list(test)}, and skills are {_list(skills)}: give each skill's, or none"
        )
    for one, other in permutations(skills, 2):
        if set(skills[one].keys) <= set(skills[other].keys):
            raise CorpusError(f"every document of {one} also stands in {other}: nothing could tell these skills apart")
    texts: dict[str, Corpus] = {}
    for name, corpus in skills.items():
        texts[_rest(name) if facts else name], texts[_test(name)] = (
            corpus.split(*SHARES, seed=seed) if test is None else (corpus, test[name])
        )
    return texts | dict(skills) if facts else texts


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "nothing"


def _skill_runs(
    plans: Mapping[str, Plan], model: Model, texts: dict[Any, Corpus], *, progress: bool
) -> dict[str, SkillRun]:
    options = {"progress": progress and distributed.is_first(), "known": texts}
    return {skill: SkillRun(plan, model, **options) for skill, plan in plans.items()}


def _fitted(runs: Mapping[str, SkillRun]) -> Iterator[tuple[str, SkillRun]]:
    """Fit and tune every method, skill by skill; what each needs is checked before the first pass."""
    for run in runs.values():
        run.require()
    for skill, run in runs.items():
        run.fit()
        yield skill, run
        run.fitted.clear()  # statistics of every method and skill need not be held together


def _report(runs: Mapping[str, SkillRun], parts: Mapping[str, Report]) -> Comparison:
    one = next(iter(runs.values()))
    if not any(run.edits for run in runs.values()):
        raise one._errors[0]
    settings = {
        "model": model_name(one.model),
        "fingerprint": fingerprint(one.model),
        "skills": list(parts),
        "methods": list(one.plan.methods),
        "retain_drop": one.plan.retain_drop,
        "confidence": one.plan.confidence,
        "protocol": one.plan.protocol,
        "controls": one.control_words(),
        "corpora": {},
        "chosen": {skill: part.provenance["chosen"] for skill, part in parts.items()},
        "documents": {skill: part.provenance["documents"] for skill, part in parts.items()},
    }
    if dealt := sorted({name for part in parts.values() for name in part.provenance.get("dealt", ())}):
        settings["dealt"] = dealt
    title = f"Forget {', '.join(parts)}, each in turn"
    whole = Comparison(_means(list(parts.values())), provenance_of(settings), title=title, parts=tuple(parts.values()))
    drawn: dict[str, Any] = {}
    for name, draw in {"frontier": figures.frontier, "matrix": figures.forgetting_matrix}.items():
        with one.going_on(f"the figure of the {name}"):
            drawn[name] = draw(whole)
    failed = {f"forgetting {skill}, {what}": why for skill, run in runs.items() for what, why in run.failed.items()}
    provenance = {**whole.provenance, **({"failed": failed} if failed else {})}
    return replace(whole, figures=drawn, provenance=provenance)


def _means(parts: Sequence[Report]) -> dict[tuple[str, str, str], Measure]:
    """Average the measures of the forgotten and the retained texts over the skills.

    A document that stands in several skills' runs has the same weight in all of them, so their draws are paired. Where a skill's
    run has no such condition, as no control of a method that changed nothing, the unedited model stands for it.
    """
    keys = dict.fromkeys(key for part in parts for key in part.measures if key[1] in ("forget", "retain"))
    means: dict[tuple[str, str, str], Measure] = {}
    incomplete = {method for part in parts for method in part.provenance.get("failed", {})}
    for condition, corpus, metric in keys:
        if condition.removesuffix(":control") in incomplete:
            continue  # for what failed, the unedited model does not stand
        found = [p.measures.get((condition, corpus, metric), p.measures.get((BASE, corpus, metric))) for p in parts]
        known = [one for one in found if one is not None]
        if metric != "perplexity" and len(known) == len(parts):
            means[condition, corpus, metric] = mean_of(known)
    order = {BASE: 0} | {condition: 1 for condition, _, _ in means if condition != BASE}
    return dict(sorted(means.items(), key=lambda item: order[item[0][0]]))


def carry_out_comparison(
    plans: Mapping[str, Plan],
    sources: Mapping[str, str],
    out: str | os.PathLike[str],
    *,
    test: Mapping[str, str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Comparison | None:
    """Do what plans say, and write everything into a new folder, whole or not at all, as `carry_out` does.

    Args:
        plans: As `plans_for` makes them.
        sources: Of each skill's texts, as `read_corpus` takes them.
        out: A new folder: `compare.html`, `matrix.csv`, `run.json`, and `<skill>/<method>.safetensors`.
        test: Of separate test texts of each skill.
        resume: Whether to go on with what an interrupted comparison of the same plans has finished.
        overwrite: Whether an earlier run in `out` is replaced.
        progress: Whether to show bars.

    Returns:
        The report; None where `resume` finds that this comparison was finished before.

    Raises:
        LensUnlearnError: As `carry_out` does.
    """
    folder = RunFolder(out)
    settings: dict[str, Any] = {"skills": dict(sources), "test": test and dict(test)}
    settings |= {"turns": {skill: settings_of(plan) for skill, plan in plans.items()}}
    if test and set(test) != set(sources):
        raise LensUnlearnError(f"--test names {_list(test)}, and --skill {_list(sources)}: give each skill's, or none")
    with folder.begun():
        return _carried_out(
            plans, sources, test, folder, settings, resume=resume, overwrite=overwrite, progress=progress
        )


def _carried_out(
    plans: Mapping[str, Plan],
    sources: Mapping[str, str],
    test: Mapping[str, str] | None,
    folder: RunFolder,
    settings: dict[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    progress: bool,
) -> Comparison | None:
    finished = distributed.from_first(lambda: folder.is_finished(settings, resume=resume, overwrite=overwrite))
    if not finished and distributed.is_first():
        folder.make()
    plan = next(iter(plans.values()))
    model = load_model(plan.model, **plan.loading)
    reading = reading_of(plan, whole=plan.facts)
    skills, tests = (
        {name: read_corpus(source, model, name=source, **reading) for name, source in (given or {}).items()}
        for given in (sources, test)
    )
    texts = split_skills(skills, tests or None, plan.seed, facts=plan.facts)
    runs = _skill_runs(plans, model, texts, progress=progress)
    known = {f"{skill}: {key}": value for skill, run in runs.items() for key, value in run.texts().items()}
    if finished:
        folder.require_same_texts(known)
        return None
    inputs = {f"{skill}: {key}": value for skill, run in runs.items() for key, value in run.inputs().items()}
    with folder.open(settings, inputs, model) if distributed.is_first() else nullcontext():
        for skill, run in runs.items():
            run.folder = _SkillFolder(folder, skill)
        _announce(runs)
        report = _report(runs, {skill: run.part() for skill, run in _fitted(runs)})
        report = replace(report, provenance={**report.provenance, "plan": settings})
        if distributed.is_first():
            with folder.result(whole="failed" not in report.provenance) as result:
                report.to_html(result / "compare.html")
                report.to_csv(result / "matrix.csv")
                REPORT.save(result / REPORT_FILE, report)
                edits = [f"{skill}/{name}.safetensors" for skill, run in runs.items() for name in run.edits]
                for edit in edits if result != folder.folder else ():
                    (result / edit).parent.mkdir(exist_ok=True)
                    shutil.copyfile(folder.folder / edit, result / edit)
                write_settings(
                    result, {**report.provenance, "inputs": known}, ("compare.html", "matrix.csv", REPORT_FILE, *edits)
                )
    return report
