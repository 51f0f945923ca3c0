"""`skill_graph`: each skill of a set removed in turn while the others are retained, and what that costs every skill.

Knows how a comparison splits documents and fits a method; knows nothing of what the graph says of it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_unlearn.core import artefacts, distributed
from lens_unlearn.core.errors import ArtefactError, LensUnlearnError
from lens_unlearn.core.names import check_name
from lens_unlearn.core.numbers import NUMBERS, Range
from lens_unlearn.core.progress import stage
from lens_unlearn.corpora.corpus import Corpus, require_corpora
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.evaluation.conditions import SUFFIX
from lens_unlearn.evaluation.evaluate import Condition, evaluate
from lens_unlearn.evaluation.metrics import metric as metric_of
from lens_unlearn.evaluation.report import BASE, Report
from lens_unlearn.evaluation.skill_graph import SkillGraph
from lens_unlearn.experiments.compare import GivenTexts, SkillRun, plans_for, split_skills
from lens_unlearn.experiments.documents import CUT, LONGEST, reading_of
from lens_unlearn.experiments.experiment import PILOT_UNITS
from lens_unlearn.experiments.output import new_folder, write_settings
from lens_unlearn.experiments.plan import Plan, settings_of
from lens_unlearn.experiments.report_file import content_of, report_in
from lens_unlearn.experiments.selections import at_keys, selection_of
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.interventions.selections import maps_in, selection_in
from lens_unlearn.methods import by_name
from lens_unlearn.methods.tuning import cut_prompts
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.loading import load_model, model_entry, model_name, require_model_of
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.moments import Moments

__all__ = [
    "GRAPH_FILE",
    "carry_out_graph",
    "graph_of",
    "graph_plans",
    "load_skill_graph",
    "save_skill_graph",
    "skill_graph",
]

GRAPH_FILE = "graph.safetensors"
"""Where the command's folder holds its graph."""
_SEEDS = Range(2, whole=True, what="random controls say nothing of how they vary")


class _OnFitPart(GivenTexts):
    """Fits on all that is not tested on: nothing is tuned."""

    def _shares(self, *, tested: bool) -> dict[str, float]:
        return super()._shares(tested=tested) if tested else {"fit": 1.0}


class _Removal(SkillRun):
    """One skill to forget and all others to retain, by one method, at the strength that its options say."""

    reader = _OnFitPart

    @property
    def method(self) -> str:
        """The name of its method."""
        return self.plan.methods[0]

    def found(self) -> Intervention:
        """Fit the method, and return what removes the skill."""
        self.fit()
        if not self.edits:
            raise self._errors[0]
        return self.edits[self.method]

    def controls(self, first: int) -> list[Intervention]:
        """Return as much removed at random, once for each seed from `first` on.

        Raises:
            LensUnlearnError: If the method has no random control.
        """
        seeds = range(first, first + self.plan.controls)
        found = self._controls(self.method, self.edits[self.method], seeds, None)
        if not found:
            raise LensUnlearnError(
                f"{self.method} has no random control, so that nothing says what is beyond chance: choose another method"
            )
        return found

    def tested(self, corpus: Corpus) -> Corpus:
        """Draw what the skill is tested on: many documents, and not all of each."""
        [cut] = cut_prompts({"": corpus}, [self.records[self.method]], self.plan.seed, longest=CUT).values()
        return cut.shortened(LONGEST).sample(self.plan.tokens, self.plan.seed, units=PILOT_UNITS)

    def score(self) -> NeuronMap | None:
        """Return what the method ranked neurons by, where it has such a score."""
        record, options = self.records[self.method], self.plan.options(self.method)
        fitted = self.fitted[self.method]
        if record.score is None:
            return None
        if isinstance(fitted[0], Corpus):  # in several steps neurons are ranked anew in each: this is the first ranking
            left_out = {key: value for key, value in options.items() if key not in record.costly}
            fitted = record.fit(self.model, *self.fit_pair(record), record.with_progress(left_out, self.progress))
        if not all(isinstance(part, Moments) for part in fitted):
            return None
        return record.score(*fitted, **options)


def skill_graph(
    model: Model,
    skills: Mapping[str, Corpus],
    *,
    method: str = "selective-pruning",
    fraction: float | None = None,
    seeds: int = 10,
    test: Mapping[str, Corpus] | None = None,
    metric: str = "top1",
    tokens: int = 20_000,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    batch_size: int | None = None,
    progress: bool = True,
) -> SkillGraph:
    """Find which skill's removal costs which other beyond chance, and where their neurons are.

    The method is fitted once for each skill, which is to be forgotten while all others, in equal parts, are to be retained, and
    every skill is measured with each one removed, on documents that nothing was fitted to. Random neurons, as many in every layer,
    are the chance that a cost has to go beyond.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
        skills: Two or more corpora, by name.
        method: By the name that the command line uses.
        fraction: The strength of the method, of most the share of neurons that are removed; default: the method's own.
        seeds: Random controls of each skill's removal, two at least. Intervals cover how these vary, and of few they are wide.
        test: Separate test texts of each skill. Default: 35 % of each skill's documents, split off.
        metric: What is lost: a metric of next tokens that falls as a skill is lost, such as "top1" or "top10".
        tokens: Tokens of each side to fit on, and of each skill to test on: of 40 documents at least, where there are so many.
        settings: Further options of the method, as in ``{"importance": "rms"}``.
        seed: Of splits, samples, controls and the bootstrap.
        resamples: Bootstrap draws.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        progress: Whether to show bars.

    Returns:
        The graph: `SkillGraph.table` and `SkillGraph.to_frame` for the costs, `overlaps`, `correlations` and `ratios` for where the
        skills are; `lens_unlearn.plot.skill_graph` draws it.

    Raises:
        LensUnlearnError: If there are fewer than two skills, a name, the method or an option cannot be used, or it has no control.
        CorpusError: If a corpus is too short to be split, fits another model, or is a part of another skill's.

    Examples:
        >>> import lens_unlearn as lu
        >>> model = lu.load_model("demo")
        >>> skills = {name: lu.read_corpus(f"demo:{name}", model, tokens=3000) for name in ("python", "esperanto")}
        >>> graph = lu.skill_graph(model, skills, fraction=0.1, seeds=2, tokens=300, progress=False)
        >>> list(graph.table().columns)
        ['python', 'esperanto']
    """
    require_model(model)
    require_corpora(skills, "skills")
    if test is not None:
        require_corpora(test, "test texts")
    plans = graph_plans(
        list(skills), model_name(model), method=method, fraction=fraction, seeds=seeds, metric=metric, tokens=tokens,
        settings=dict(settings or {}), seed=seed, batch_size=batch_size,
    )  # fmt: skip
    NUMBERS["evaluations"].check(resamples, "resamples")
    return graph_of(model, plans, skills, test, metric=metric, resamples=resamples, progress=progress)


def graph_plans(
    skills: Sequence[str],
    model: str,
    *,
    method: str,
    fraction: float | None,
    seeds: int,
    metric: str,
    settings: Mapping[str, Any],
    **others: Any,
) -> dict[str, Plan]:
    """Return one plan per skill, in which it is removed and all others are retained.

    Raises:
        LensUnlearnError: If there are fewer than two skills, or a name, the method, an option or a number cannot be used.
    """
    record = by_name(method)
    known = metric_of(metric)
    if known.needs != "tokens" or not known.higher_is_better:
        raise LensUnlearnError(
            f"metric={metric!r} is none of next tokens that falls as a skill is lost: take 'top1' or 'top10'"
        )
    if fraction is not None:
        settings = {**settings, record.strength: fraction}
    for name in skills:
        check_name(name, "a skill", taken=(BASE, "graph"))
    return plans_for(
        skills, model, methods=(method,), settings=dict(settings), controls=int(_SEEDS.check(seeds, "seeds")), **others
    )


def graph_of(
    model: Model,
    plans: Mapping[str, Plan],
    skills: Mapping[str, Corpus],
    test: Mapping[str, Corpus] | None,
    *,
    metric: str = "top1",
    resamples: int = 1000,
    progress: bool = True,
) -> SkillGraph:
    """Do what plans say on corpora that are read; see `skill_graph`."""
    plan = next(iter(plans.values()))
    progress = progress and distributed.is_first()
    texts: dict[Any, Corpus] = split_skills(skills, test, plan.seed)
    runs = {skill: _Removal(own, model, progress=progress, known=texts) for skill, own in plans.items()}
    for run in runs.values():
        run.require()
    conditions: dict[str, Condition] = {}
    edits: dict[str, Intervention] = {}
    selections: dict[str, NeuronMap] = {}
    scores: dict[str, NeuronMap] = {}
    alive: NeuronMap | None = None
    for number, (skill, run) in enumerate(runs.items()):
        with stage(f"remove {number + 1} of {len(runs)}: {skill}"):
            edits[skill] = run.found()
            # Seeds of its own: the same ones would draw much the same neurons for every skill.
            controls = run.controls(plan.seed + number * plan.controls)
            conditions |= {skill: edits[skill], f"{skill}{SUFFIX}": controls}
            if (selection := selection_of(edits[skill], model)) is not None:
                selections[skill] = selection
            if (score := run.score()) is not None:
                scores[skill], live = at_keys(score), at_keys(score.live)
                alive = live if alive is None else alive | live
        run.fitted.clear()
    tests = {skill: run.tested(texts[str(run.plan.test_forget)]) for skill, run in runs.items()}
    report = evaluate(
        model, tests, conditions, batch_size=plan.batch_size, resamples=resamples, seed=plan.seed, progress=progress
    )
    one = next(iter(runs.values()))
    provenance = {
        **report.provenance,
        "method": one.method,
        "options": one.plan.options(one.method),
        "controls": one.control_words(),
        "seeds": plan.controls,
        "metric": metric,
        "plans": {skill: settings_of(own) for skill, own in plans.items()},
        "documents": {skill: run.documents.counts() for skill, run in runs.items()},
        "protocol": plan.protocol,
    }
    whole = Report(report.measures, provenance, title=f"Remove {', '.join(runs)}, each in turn")
    return SkillGraph(whole, selections, scores, alive, metric, edits)


def carry_out_graph(
    plans: Mapping[str, Plan],
    sources: Mapping[str, str],
    out: str | os.PathLike[str],
    *,
    test: Mapping[str, str] | None = None,
    metric: str = "top1",
    overwrite: bool = False,
    progress: bool = True,
) -> SkillGraph | None:
    """Do what plans say, and write everything into a new folder, whole or not at all.

    Args:
        plans: As `graph_plans` makes them.
        sources: Of each skill's texts, as `read_corpus` takes them.
        out: A new folder.
        test: Of separate test texts of each skill.
        metric: What is lost.
        overwrite: Whether an earlier run in `out` is replaced.
        progress: Whether to show bars.

    Returns:
        The graph; None on all processes but the first.

    Raises:
        LensUnlearnError: If `out` holds something that would be lost, or a graph of these texts cannot be made.
    """
    if test and set(test) != set(sources):
        names = ", ".join(test), ", ".join(sources)
        raise LensUnlearnError(f"--test names {names[0]}, and --skill {names[1]}: give each skill's, or none")
    plan = next(iter(plans.values()))
    with new_folder(out, overwrite=overwrite) as folder:
        model = load_model(plan.model, **plan.loading)
        reading = reading_of(plan, whole=False)
        skills, tests = (
            {name: read_corpus(source, model, name=source, **reading) for name, source in (given or {}).items()}
            for given in (sources, test)
        )
        graph = graph_of(model, plans, skills, tests or None, metric=metric, progress=progress)
        if not distributed.is_first():
            return None
        graph.to_html(folder / "graph.html")
        tables = {"overlaps": graph.overlaps(), "correlations": graph.correlations(), "ratios": graph.ratios()}
        written = {"costs": graph.csv()} | {name: table.to_csv(index=False) for name, table in tables.items()}
        for name, table in written.items():  # names of skills hold nothing that a spreadsheet runs
            artefacts.replace_file(folder / f"{name}.csv", table.encode())
        save_skill_graph(folder / GRAPH_FILE, graph, model)
        for skill, edit in graph.interventions.items():
            edit.save(folder / f"{skill}.safetensors", model)
        files = [
            "graph.html",
            GRAPH_FILE,
            *(f"{name}.csv" for name in written),
            *(f"{s}.safetensors" for s in graph.skills),
        ]
        sources_of = {"skills": dict(sources), "test": dict(test) if test else None}
        write_settings(folder, {**graph.provenance, "sources": sources_of}, files)
    return graph


def save_skill_graph(path: str | os.PathLike[str], graph: SkillGraph, model: Model | None = None) -> None:
    """Write a graph to a safetensors file, with the draws behind its intervals; interventions are files of their own.

    Args:
        path: The file.
        graph: What `skill_graph` returned.
        model: Its model: the file will refuse every other one. Without it, any is accepted.
    """
    tensors: dict[str, Tensor] = {}
    content = content_of(graph.report, "report/", tensors)
    for name, maps in (("selection", graph.selections), ("score", graph.scores)):
        for number, skill in enumerate(maps):
            tensors |= {f"{name}/{number}/{site}": value for site, value in _plain(maps[skill])}
    if graph.candidates is not None:
        tensors |= {f"candidates/{site}": value for site, value in _plain(graph.candidates)}
    header = {
        "report": json.dumps(content, default=str),  # as text, the order stays
        "metric": graph.metric,
        "selections": list(graph.selections),
        "scores": list(graph.scores),
        **model_entry(path, model),
    }
    artefacts.write(path, "skill graph", tensors, header)


def _plain(values: NeuronMap) -> list[tuple[Any, Tensor]]:
    """Return a map as a file holds it: selections as 0 and 1."""
    return [(site, value.to(torch.uint8) if value.dtype == torch.bool else value) for site, value in values.shaped()]


def load_skill_graph(path: str | os.PathLike[str], model: Model | None = None) -> SkillGraph:
    """Read a graph that `save_skill_graph` wrote, or the folder that `lens-unlearn graph` wrote, with its interventions.

    Args:
        path: The file, or the folder.
        model: Where given, the graph has to be of this model.

    Raises:
        ArtefactError: If there is no intact graph, or it is of another model.
    """
    place = Path(path)
    file = place / GRAPH_FILE if place.is_dir() else path
    if place.is_dir() and not (place / GRAPH_FILE).is_file():
        raise ArtefactError(f"{place} holds no skill graph: give the --out of lens-unlearn graph, or a file of one")
    header, tensors = artefacts.read(file, "skill graph")
    with artefacts.usable(file, "skill graph that can be read"):
        unread = dict(tensors)
        report = report_in(artefacts.parse(header["report"]), "report/", unread)
        selections, scores = (
            {str(skill): _read(unread, f"{name}/{number}", name != "score") for number, skill in enumerate(header[of])}
            for name, of in (("selection", "selections"), ("score", "scores"))
        )
        alive = any(name.startswith("candidates/") for name in unread)
        candidates = _read(unread, "candidates", True) if alive else None
        if unread:
            raise ValueError("it holds more than its header says")
        graph = SkillGraph(report, selections, scores, candidates, str(header["metric"]))
        repr(graph)
    require_model_of(file, header, model)
    if not place.is_dir():
        return graph
    edits = {skill: load_intervention(place / f"{skill}.safetensors", model) for skill in graph.skills}
    return SkillGraph(report, selections, scores, candidates, graph.metric, edits)


def _read(tensors: dict[str, Tensor], start: str, flags: bool) -> NeuronMap:
    """Take a map from the tensors of a file."""
    own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{start}/")}
    if flags:
        return selection_in({f"selection/{name.removeprefix(f'{start}/')}": value for name, value in own.items()})
    return NeuronMap(maps_in(own, start))
