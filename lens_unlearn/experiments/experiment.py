"""`Experiment`: one plan carried out on one model, and `carry_out`, which writes what it found into one folder.

Fit, tune and test on the documents that are for it, every method beside its control. Knows plans, documents, methods by their
records, and folders; knows no method by name, and leaves what the page shows to `report_content`.
"""

import json
import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lens_unlearn.core import artefacts, distributed
from lens_unlearn.core.errors import ArtefactError, BudgetError, LensUnlearnError, ProcessError
from lens_unlearn.core.intervals import FEWEST
from lens_unlearn.core.progress import stage
from lens_unlearn.corpora.batching import batch_tokens, use_batch_tokens
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.evaluation.evaluate import Condition, evaluate
from lens_unlearn.evaluation.memorization import Memorization
from lens_unlearn.evaluation.metrics import needing
from lens_unlearn.evaluation.question_answering import QuestionAnswering
from lens_unlearn.evaluation.report import BASE, Report
from lens_unlearn.experiments.cost import announce, reading, sweep_passes, swept
from lens_unlearn.experiments.documents import CUT, LONGEST, Reader
from lens_unlearn.experiments.output import write_settings
from lens_unlearn.experiments.plan import Plan, command_of, settings_of
from lens_unlearn.experiments.report_content import Content
from lens_unlearn.experiments.report_file import REPORT_FILE
from lens_unlearn.experiments.run_folder import REPORT, TEST_TOKENS, TOKENS, Form, RunFolder, fitted_form
from lens_unlearn.interventions.base import Chain, Intervention
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.methods.method import Fitted, Method
from lens_unlearn.methods.tuning import check_units, cut_prompts, tune
from lens_unlearn.model.host import Model, device_of, versions
from lens_unlearn.model.loading import fingerprint, load_model
from lens_unlearn.neurons.moments import Moments
from lens_unlearn.neurons.reading_once import reading_once

__all__ = ["Experiment", "carry_out"]

PILOT, PILOT_UNITS = 2000, 40
"""Tokens, and documents or groups at least, on which the unedited model shows how many are needed to test on."""
AIM = 0.025
"""Half the width of the interval of accuracy that a test aims at, so that it ends up within 3 points."""
TRAINED = 20
"""Plain texts are no answers to be unlearned word by word, and training reads each some fifty times: of them it is given one in so
many of the tokens that others are fitted to."""
ATTRIBUTED = 300
"""Tokens of plain texts that are attributed, at most: each is run some five times per layer, with gradients."""
PROMPTS = 200
"""Documents or groups to test on, at least, where a method judges prompts: a share of few prompts says little."""


class Experiment:
    """One plan, carried out on one model.

    Args:
        plan: What to do.
        model: The plan's model, where it is loaded already.
        progress: Whether to show bars.
        known: Sources read already, so that several plans on one model read each once.
    """

    reader: type[Reader] = Reader
    """Where its documents come from."""

    def __init__(
        self,
        plan: Plan,
        model: Model | None = None,
        *,
        progress: bool = True,
        known: dict[Any, Corpus] | None = None,
    ) -> None:
        plan.require_options()
        self.plan, self.records = plan, plan.records
        self.progress = progress
        self.model = load_model(plan.model, **plan.loading) if model is None else model
        self.documents = self.reader(plan, self.model, {} if known is None else known).read()
        self._fingerprints = self.documents.fingerprints(plan.also)  # of all of them: fewer may be tested on
        self.edits: dict[str, Intervention] = {}
        self.chosen: dict[str, dict[str, Any]] = {}
        """By method: the options that it was used with, and what tuning chose."""
        self.fitted: dict[str, Fitted] = {}
        """What each method was fitted to: moments, keys, or the corpora themselves."""
        self.failed: dict[str, str] = {}
        """What could not be done, by method or part, and why; the rest goes on without it."""
        self._errors: list[Exception] = []
        self._tuning_base: Report | None = None
        """Has the unedited model's measures on the tuning texts, once one method was tuned."""
        self.folder: RunFolder | None = None
        """Where what is finished is kept, so that the run can go on if it is interrupted."""

    def texts(self) -> dict[str, Any]:
        """Return what has to be the same besides the plan for a finished run to be this one: texts and model."""
        return {**self._fingerprints, "model": fingerprint(self.model)}

    def inputs(self) -> dict[str, Any]:
        """Return what has to be the same for an interrupted run to go on: also what runs the model."""
        return {**self.texts(), "device": str(device_of(self.model)), **versions()}

    def require(self) -> None:
        """Refuse, before the first pass over texts, whatever a method, the budget or a measure would refuse later.

        Raises:
            LensUnlearnError: If a method cannot be used as it was asked for, or on these documents; the message names it.
        """
        for name, record in self.records.items():
            try:
                record.require(self.plan.as_given(name), self.model, *self.fit_pair(record))
                if self.plan.retain_drop is not None:
                    tuned = cut_prompts(self.documents.tuned_retain, [record])
                    check_units(tuned, self.plan.retain_drop, self.plan.confidence, at_once=record.judges_prompts)
            except LensUnlearnError as error:
                raise type(error)(f"{self.words_of(name)}{error}") from error
        asked = QuestionAnswering(needing("answers"), self.plan.answers, seed=self.plan.seed)
        asked.choose(self.documents.test)
        recalled = Memorization(needing("memorization"), self.plan.memorization, seed=self.plan.seed)
        recalled.choose(self.model, self.documents.test)

    def words_of(self, name: str) -> str:
        """Return how an error about a method begins: with its name, where there are several."""
        return f"{name}: " if len(self.records) > 1 else ""

    @contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """Note what fails in a `with` block, so that the rest is finished and reported.

        Of several processes, all end instead: only one of them may have failed, and the others wait for it. So they do where files
        cannot be written.
        """
        try:
            yield
        except (ArtefactError, ProcessError):
            raise
        except Exception as error:
            if distributed.count() > 1:
                raise
            if isinstance(error, LensUnlearnError):
                self.failed[what] = str(error)
            else:  # a fault of ours or of a library, which whoever looks for it needs to see
                self.failed[what] = f"{type(error).__name__}: {artefacts.first_line(error)}"
                logging.getLogger("lens_unlearn").error("%s failed; the rest goes on", what, exc_info=error)
            self._errors.append(error)

    def reading(self, test: Mapping[str, Corpus]) -> dict[str, int]:
        """Return how many tokens each step sends through the model, where this is tested on."""
        pairs = {name: self.fit_pair(record) for name, record in self.records.items()}
        return reading(self.plan, pairs, self.documents.tune, test)

    def expected_test(self) -> dict[str, Corpus]:
        """Return what will be tested on, as far as that is known before the first pass: no less than the pilot."""
        if self.plan.test_tokens is None:
            return self.documents.test | self._pilot()
        given = dict.fromkeys(self._long(), self.plan.test_tokens)
        return self.documents.tested_on(given, self._test_units, self.plan.seed).test

    def announce(self, *others: "Experiment") -> None:
        """Say what will be done, in this experiment and in others with the same model and methods, and how long that takes."""
        if not self.progress:
            return
        steps, test = Counter[str](), dict[str, Corpus]()
        for one in (self, *others):
            test = one.expected_test()
            steps.update(one.reading(test))
        text = max(test.values(), key=lambda text: text.n_read)
        announce(self.model, steps, list(self.records.values()), text)

    def fit(self) -> None:
        """Find every method's intervention: tuned to the retain budget if there is one, else as the options say.

        Raises:
            Exception: If every method fails, that of the first; what only some fail with is noted in `failed`.
        """
        if self.plan.batch_size is None:
            use_batch_tokens(self.model, self._kept("kept/batch.safetensors", TOKENS, self._batch_tokens))
        self.documents = self.documents.tested_on(
            self._kept("kept/tests.safetensors", TEST_TOKENS, self._test_tokens),
            self._test_units,
            self.plan.seed,
            LONGEST if self.plan.test_tokens is None else None,
        )
        with reading_once(self._sites_of_moments()):
            for number, name in enumerate(self.records, 1):
                of = f"{number} of {len(self.records)}: {name}" if len(self.records) > 1 else name
                with self.going_on(name), stage(f"{'fit' if self.plan.retain_drop is None else 'tune'} {of}"):
                    self.fitted[name] = self._kept(
                        f"kept/{name}.fitted.safetensors",
                        fitted_form(self.model),
                        lambda name=name: self._prepare(name),
                    )
                    form = Form(self._save_edit, self._load_edit)
                    self.edits[name], self.chosen[name] = self._kept(
                        f"{name}.safetensors", form, lambda name=name: self._find(name)
                    )
        self._require_some()

    def _sites_of_moments(self) -> list[str]:
        """Return the kinds of sites at which several methods want moments of the same texts; none where it is one method."""
        kinds: list[str] = []
        records = {name: record for name, record in self.records.items() if record.fitted_to is Moments}
        for name, record in records.items():
            site = {**record.defaults(), **self.plan.options(name)}.get("site", record.sites)
            kinds += [site] if isinstance(site, str) else site
        return list(dict.fromkeys(kinds)) if len(records) > 1 else []

    def _batch_tokens(self) -> int:
        texts = [*self.documents.fit.values(), *self.documents.test.values()]
        passes = len(self.plan.methods) * (1 + self.plan.controls)
        return batch_tokens(self.model, max(texts, key=lambda text: text.n_tokens), passes=passes)

    def _test_tokens(self) -> dict[str, int]:
        """Return on how many tokens of which corpora to test: fewer than there are, where that is precise enough."""
        if self.plan.test_tokens is not None:
            return dict.fromkeys(self._long(), self.plan.test_tokens)
        pilot = self._pilot()
        if not pilot:
            return {}
        with stage("how much to test on"):
            report = evaluate(self.model, pilot, {}, **self._measuring())
        widths = {name: np.diff(report[BASE, name, "top1"].interval())[0] / 2 for name in pilot}
        # Its variance falls as tokens are added; what is too few for an interval at all says nothing, and all is used.
        return {
            name: math.ceil(pilot[name].n_tokens * max(1.0, (float(width) / AIM) ** 2))
            for name, width in widths.items()
            if not math.isnan(width)
        }

    def _long(self) -> dict[str, Corpus]:
        """Return the corpora that may be tested on in part: all but memorized facts, which are tested on whole."""
        return {name: text for name, text in self.documents.test.items() if not (self.plan.facts and name == "forget")}

    def _pilot(self) -> dict[str, Corpus]:
        """Return what shows how much has to be tested on, of those corpora that are much longer."""
        return {
            name: text.shortened(LONGEST).sample(PILOT, self.plan.seed, units=PILOT_UNITS)
            for name, text in self._long().items()
            if text.n_tokens > 2 * PILOT
        }

    @property
    def _test_units(self) -> int:
        judged = [PROMPTS] if any(record.judges_prompts for record in self.records.values()) else []
        return max([PILOT_UNITS, self.plan.answers, self.plan.memorization, *judged])

    def _require_some(self) -> None:
        if not self.edits:
            raise self._errors[0]

    def _kept(self, name: str, form: Form, make: Callable[[], Any]) -> Any:
        """Return what the folder holds, or make it, and keep it if it is all that it was to be."""
        if self.folder is None:
            return make()
        return self.folder.keep(name, form, make, unless=lambda: bool(self.failed) and form is REPORT)

    def _prepare(self, name: str) -> Fitted:
        record = self.records[name]
        options = record.with_progress(self.plan.options(name), self.progress)
        if self._trains_on_plain_texts(record):
            options = record.takes({"attribution_tokens": ATTRIBUTED}) | options
        if self.folder is not None:
            options |= record.takes({"checkpoint": str(self.folder.kept / f"{name}.checkpoint.safetensors")})
        return record.fit(self.model, *self.fit_pair(record), options)

    @property
    def goes_on(self) -> bool:
        """Whether a method that cannot keep the budget changes nothing, and the others go on; alone, its error is raised."""
        return len(self.records) > 1

    def _find(self, name: str) -> tuple[Intervention, dict[str, Any]]:
        """Find a method's intervention; where no strength keeps the budget, one that changes nothing, with the reason."""
        try:
            return self._found(name)
        except BudgetError as error:
            if not self.goes_on:
                raise
            return Chain(()), {"options": self.plan.options(name), "nothing": str(error)}

    def _found(self, name: str) -> tuple[Intervention, dict[str, Any]]:
        record, options = self.records[name], self.plan.options(name)
        if self.plan.retain_drop is None:
            found = record.at(self.model, self.fitted[name], None, record.with_progress(options, self.progress))
            return found, {"options": options}
        options.pop(record.strength, None)
        held_out = self.documents.tune["forget"], self.documents.tuned_retain
        tuned = tune(
            record, self.model, *self.fitted[name], retain_drop=self.plan.retain_drop, confidence=self.plan.confidence,
            held_out=held_out, options=options, batch_size=self.plan.batch_size, base=self._tuning_base, progress=self.progress,
        )  # fmt: skip
        self._tuning_base = tuned.report
        return tuned.intervention, {"options": options, record.strength: tuned.fraction, "tuning": tuned.to_dict()}

    def _save_edit(self, path: Path, edit_and_choice: tuple[Intervention, dict[str, Any]]) -> None:
        edit, chosen = edit_and_choice
        edit.save(path, self.model, note=json.dumps(chosen, default=str))

    def _load_edit(self, path: Path) -> tuple[Intervention, dict[str, Any]]:
        with artefacts.usable(path, "intervention of this run"):
            chosen = json.loads(artefacts.read(path)[0]["note"])
            options = json.loads(json.dumps(self.plan.options(path.stem), default=str))
            for name, value in chosen["options"].items():
                if options.get(name) != value:
                    raise ArtefactError(f"{name}={value!r} there, {options.get(name)!r} in this run")
        return load_intervention(path, self.model), chosen

    def fit_pair(self, record: Method) -> tuple[Corpus, Any]:
        """Return what a method is fitted to: forget, and what is to be retained as the method takes it."""
        part = self.documents.queries if record.judges_prompts else self.documents.fit
        part = cut_prompts(part, [record], self.plan.seed, longest=CUT)
        if self._trains_on_plain_texts(record):
            few = max(1, self.plan.tokens // TRAINED)
            part = {name: corpus.sample(few, self.plan.seed, units=FEWEST) for name, corpus in part.items()}
        of_source = self.documents.retain_fit if record.by_source else []
        asked = self.documents.retain_queries if record.judges_prompts else of_source
        sources = [cut_prompts({"": source}, [record], self.plan.seed, longest=CUT)[""] for source in asked]
        return part["forget"], record.together(sources) if len(sources) > 1 else part["retain"]

    def _trains_on_plain_texts(self, record: Method) -> bool:
        return record.trains and record.cuts_prompts and not self.documents.fit["forget"].has_prompts

    def _controls(
        self, name: str, edit: Intervention, seeds: Sequence[int], strength: float | None
    ) -> list[Intervention]:
        options = self.plan.options(name)
        return self.records[name].controls(
            self.model, edit, self.fitted[name], seeds, strength=strength, options=options
        )

    def report(self) -> Report:
        """Evaluate everything on the test documents, and gather figures and samples."""
        report = self._kept("kept/evaluation.safetensors", REPORT, self._evaluate)
        provenance = {
            **report.provenance,
            "plan": settings_of(self.plan),
            "protocol": self.plan.protocol,
            "confidence": self.plan.confidence,
            "chosen": self.chosen,
            "controls": self.control_words(),
            "documents": self.documents.counts(),
            "retained": list(self.documents.retained),
        }
        provenance["command"] = command_of(self.plan)
        content = Content(
            self.model, self.plan, self.documents, self.edits, self.fitted, self.progress, self.going_on
        )  # fmt: skip
        report, curves = replace(report, provenance=provenance), None
        with self.going_on("the texts before and after"):
            report = replace(report, samples=content.samples(report.samples))
        if self.plan.sweep:
            with self.going_on("the trade-off over strengths"):
                curves = self._kept("kept/curves.safetensors", REPORT, self.curves)
        with self.going_on("the figures"):
            report = replace(report, figures=content.figures(curves))
        return replace(report, provenance={**provenance, **self.failures()}, interventions=dict(self.edits))

    def failures(self) -> dict[str, Any]:
        """Return what `run.json` says of what failed: nothing if nothing did."""
        return {"failed": dict(self.failed)} if self.failed else {}

    def control_words(self) -> dict[str, str]:
        """Return what each method's control is, as reports say it."""
        return {name: record.words_of_control(self.plan.options(name)) for name, record in self.records.items()}

    def _evaluate(self) -> Report:
        conditions: dict[str, Condition] = {}
        for name, edit in self.edits.items():
            conditions[name] = edit
            if "nothing" in self.chosen[name]:
                continue
            seeds = range(self.plan.seed, self.plan.seed + self.plan.controls)
            with self.going_on(f"the random control of {name}"):
                controls = self._controls(name, edit, seeds, self.chosen[name].get(self.records[name].strength))
                if controls:
                    conditions[f"{name}:control"] = controls
        asked: dict[str, Any] = {"answers": self.plan.answers, "memorization": self.plan.memorization}
        asked["deal"] = self.plan.deals
        return evaluate(self.model, self.documents.test, conditions, **self._measuring(), **asked)

    def _measuring(self) -> dict[str, Any]:
        return {"batch_size": self.plan.batch_size, "progress": self.progress, "seed": self.plan.seed}

    def curves(self) -> Report:
        """Evaluate every method over strengths on the test documents, for the trade-off curves."""
        conditions: dict[str, Condition] = {}
        for name in self.edits:
            with self.going_on(f"the strengths of {name}"):
                conditions |= self._strengths(name)
        # A part of the tests shows how the curves run; it has to be the same for all of them, the chosen strengths included.
        test = self.documents.test
        rest = sum(tokens for step, tokens in self.reading(test).items() if step != "sweep")
        texts = swept(test, rest, sweep_passes(self.plan), self.plan.seed)
        with stage("sweep"):
            return evaluate(self.model, texts, conditions, **self._measuring())

    def _strengths(self, name: str) -> dict[str, Condition]:
        """Return a method as it was found and over strengths, each beside one control."""
        record, edit = self.records[name], self.edits[name]
        chosen = self.chosen[name].get(record.strength)
        conditions: dict[str, Condition] = {name: edit}
        if "nothing" not in self.chosen[name] and (controls := self._controls(name, edit, [self.plan.seed], chosen)):
            conditions[f"{name}:control"] = controls
        chosen = (record.defaults() | self.plan.options(name)).get(record.strength) if chosen is None else chosen
        left_out = (record.strength, *record.costly)
        options = {key: value for key, value in self.plan.options(name).items() if key not in left_out}
        fitted = self.fitted[name]
        if isinstance(fitted[0], Corpus):  # what is fitted in several steps shares nothing, but one step of it does
            fitted = record.fit(self.model, *self.fit_pair(record), options)
        for strength in self.plan.strengths_of(name, chosen):
            with warnings.catch_warnings():  # at some of them a method may do nothing, which the curves show
                warnings.simplefilter("ignore", RuntimeWarning)
                edit = record.at(self.model, fitted, strength, record.with_progress(options, False))
                controls = self._controls(name, edit, [self.plan.seed], strength)
            conditions[f"{name}@{strength:g}"] = edit
            if controls:
                conditions[f"{name}:control@{strength:g}"] = controls
        return conditions

    def write(self, folder: Path, report: Report, more: Sequence[str] = ()) -> None:
        """Write the report, the table, the interventions, and the settings, which list all these files and `more`."""
        report.to_html(folder / "report.html")
        report.to_csv(folder / "metrics.csv")
        REPORT.save(folder / REPORT_FILE, report)
        for name, edit in self.edits.items():
            self._save_edit(folder / f"{name}.safetensors", (edit, self.chosen[name]))
        files = ("report.html", "metrics.csv", REPORT_FILE, *(f"{name}.safetensors" for name in self.edits))
        write_settings(folder, {**report.provenance, "inputs": self.texts()}, (*files, *more))


def carry_out(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    model: Model | None = None,
    known: dict[Any, Corpus] | None = None,
) -> tuple[Experiment, Report] | None:
    """Do what a plan says, and write everything into a new folder, whole or not at all.

    What is finished on the way is kept in a folder `OUT.partial`, which becomes `out` at the end: what each method was fitted
    to and what it found, the steps of SIMU's training, and evaluations. It stays when the run is interrupted or killed.

    Whatever a method needs is checked before the first pass over texts. What fails later (a method, its control, a figure) is
    noted in the report's provenance, "failed"; the rest goes on, `out` is written without it, and `OUT.partial` stays, so that
    `resume` tries it again. An error that leaves nothing finished is raised.

    Args:
        plan: What to do.
        out: A new folder.
        resume: Whether to go on with what an interrupted run of the same plan has finished, if there is anything: to the same
            numbers and interventions as without interruption.
        overwrite: Whether an earlier run in `out` is replaced.
        progress: Whether to show bars.
        model: The plan's model, where it is loaded already.
        known: As in `Experiment`.

    Returns:
        The experiment and its report; None where `resume` finds that the run of this plan was finished before.

    Raises:
        LensUnlearnError: If `out` holds something that would be lost, or an interrupted run is there and `resume` is not set.
        ArtefactError: If the interrupted run was another one; the message names what differs.
    """
    plan.require_options()
    folder, settings = RunFolder(out), settings_of(plan)
    with folder.begun():
        finished = distributed.from_first(lambda: folder.is_finished(settings, resume=resume, overwrite=overwrite))
        if not finished and distributed.is_first():
            folder.make()
        experiment = Experiment(plan, model, progress=progress and distributed.is_first(), known=known)
        if finished:
            folder.require_same_texts(experiment.texts())
            return None
        with folder.open(settings, experiment.inputs(), experiment.model) if distributed.is_first() else nullcontext():
            experiment.require()
            experiment.announce()
            experiment.folder = folder
            experiment.fit()
            report = experiment.report()
            if distributed.is_first():
                with folder.result(whole=not experiment.failed) as result:
                    experiment.write(result, report)
    return experiment, report
