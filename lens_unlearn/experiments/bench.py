"""`carry_out_bench`: a public benchmark on one model, every method fitted on its forget and retain rows, and its random control.

Everything is checked before the model is loaded, written whole or not at all, and goes on after an interruption: what each
condition wrote and lost is kept as soon as it is there. Knows benchmarks and methods by their records; knows none by name.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lens_unlearn import methods
from lens_unlearn.benchmarks import by_name
from lens_unlearn.benchmarks.benchmark import Data, Raw
from lens_unlearn.benchmarks.result import BenchmarkResult
from lens_unlearn.benchmarks.running import REFERENCE, check_reference, measured
from lens_unlearn.core import artefacts
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.core.numbers import COUNT, NOT_NEGATIVE, check_numbers
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.evaluation.conditions import SUFFIX
from lens_unlearn.evaluation.evaluate import Condition
from lens_unlearn.evaluation.report import BASE
from lens_unlearn.experiments.output import write_settings
from lens_unlearn.experiments.plan import option_names
from lens_unlearn.experiments.run_folder import Form, RunFolder
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.methods.controls import controls_for
from lens_unlearn.methods.method import Fitted, Method
from lens_unlearn.methods.tuning import cut_prompts
from lens_unlearn.model.host import Model, device_of, versions
from lens_unlearn.model.loading import fingerprint, load_model

__all__ = ["BenchPlan", "carry_out_bench"]

FILES = ("bench.html", "scores.csv", "generations.jsonl", "losses.csv")


@dataclass(frozen=True)
class BenchPlan:
    """The settings of a benchmark's run, as `run.json` keeps them; refuses what can be refused before a model is loaded."""

    benchmark: str
    model: str
    data: str
    reference: str | None = None
    methods: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    """Options of methods."""
    interventions: tuple[str, ...] = ()
    """Saved interventions."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the benchmark."""
    rows: int | None = None
    controls: int = 1
    tokens: int | None = None
    """Tokens of each side that methods are fitted to; None for all."""
    template: str | None = None
    """How questions and answers are joined, where methods are fitted and where a benchmark that leaves it open asks; default as the
    benchmark has it."""
    prepend_bos: bool | None = None
    seed: int = 0
    batch_size: int | None = None
    dtype: str = "float32"
    device: str | None = None
    device_map: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    dictionary: str | None = None

    def __post_init__(self) -> None:
        """Refuse a benchmark, method, option, file or number that cannot be."""
        record = by_name(self.benchmark)
        check_numbers(tokens=self.tokens, batch_size=self.batch_size, seed=self.seed)
        if self.rows is not None:
            COUNT.check(self.rows, "rows")
        NOT_NEGATIVE.check(self.controls, "controls")
        record.check(self.options)
        if self.template is not None and "template" in self.options:
            raise LensUnlearnError("--template and --option template are the same: give one of them")
        for key in self.settings:
            owner, _, option = key.rpartition(".")
            if not any(option in option_names(name) and owner in ("", name) for name in self.methods):
                raise LensUnlearnError(f"the setting {key!r}: no method of this run has such an option")
        for name in self.methods:
            methods.by_name(name).require(self.method_options(name))
        check_reference(self.reference)
        for path in self.interventions:
            if not path.startswith("hf:") and not Path(path).is_file():
                raise LensUnlearnError(f"there is no intervention file {path}")
        named = [*self.methods, *(Path(path).stem for path in self.interventions)]
        if twice := {name for name in named if named.count(name) > 1 or name in (BASE, REFERENCE)}:
            raise LensUnlearnError(
                f"{sorted(twice)[0]!r} would name two conditions, or one that there is anyway: rename the file, or give it once"
            )

    def method_options(self, name: str) -> dict[str, Any]:
        """Return a method's options: what its name fixes, then what was set."""
        chosen = dict(methods.by_name(name).settings)
        for key, value in self.settings.items():
            owner, _, option = key.rpartition(".")
            if option in option_names(name) and owner in ("", name):
                chosen[option] = value
        return chosen

    @property
    def asking(self) -> dict[str, Any]:
        """The options of the benchmark, with the template where it is one of them."""
        asked = self.template is not None and "template" in by_name(self.benchmark).options
        return self.options | ({"template": self.template} if asked else {})

    @property
    def fitting(self) -> str:
        """How questions and answers are joined where methods are fitted: as they are asked."""
        return str(self.asking.get("template") or self.template or by_name(self.benchmark).template)

    @property
    def loading(self) -> dict[str, Any]:
        """How the model is loaded: options of `load_model`."""
        names = ("dtype", "device", "device_map", "revision", "trust_remote_code", "dictionary")
        return {name: getattr(self, name) for name in names}


def carry_out_bench(
    plan: BenchPlan,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    model: Model | None = None,
) -> BenchmarkResult | None:
    """Do what a plan says, and write everything into a new folder, whole or not at all.

    Args:
        plan: What to do.
        out: A new folder.
        resume: Whether to go on with what an interrupted run of the same plan has finished, if there is anything.
        overwrite: Whether an earlier run in `out` is replaced.
        progress: Whether to show bars.
        model: The plan's model, where it is loaded already.

    Returns:
        What was found; None where `resume` finds that the run of this plan was finished before.

    Raises:
        CorpusError: If a file or a column of the benchmark is missing; before the model is loaded.
        LensUnlearnError: If `out` holds something that would be lost, or an interrupted run is there and `resume` is not set.
        ArtefactError: If the interrupted run was another one; the message names what differs.
    """
    record = by_name(plan.benchmark)
    data = record.data(plan.data, plan.rows, plan.asking)
    if plan.methods and not (data.forget and data.retain):
        raise CorpusError(
            f"{plan.benchmark} has no texts here that a method could be fitted to: give --intervention, or the files of both splits"
        )
    folder = RunFolder(out)
    settings = json.loads(json.dumps({**vars(plan)}, default=str))
    with folder.begun():
        finished = folder.is_finished(settings, resume=resume, overwrite=overwrite)
        if finished:
            return None
        folder.make()
        model = load_model(plan.model, **plan.loading) if model is None else model
        texts = {"model": fingerprint(model), "data": _digest(data), "device": str(device_of(model)), **versions()}
        with folder.open(settings, texts, model):
            edits = _edits(plan, model, data, folder, progress)
            form = Form(_save_raw, _load_raw)
            names: dict[str, str] = {}

            def keep(name: str, make: Any) -> Raw:
                names[name] = f"kept/{len(names)}.raw.json"
                return folder.keep(names[name], form, make)

            conditions, saved = edits
            found = measured(
                record, model, data, conditions, reference=plan.reference, rows=plan.rows, prepend_bos=plan.prepend_bos,
                batch_size=plan.batch_size, seed=plan.seed, progress=progress, keep=keep, options=plan.asking,
            )  # fmt: skip
            found = replace(
                found, provenance={**found.provenance, "plan": settings, "inputs": texts, "data": plan.data}
            )
            with folder.result(whole=True) as result:
                found.to_html(result / "bench.html")
                artefacts.replace_file(result / "scores.csv", found.csv().encode(errors="backslashreplace"))
                lines = found.generations_jsonl().encode(errors="backslashreplace")
                artefacts.replace_file(result / "generations.jsonl", lines)
                artefacts.replace_file(result / "losses.csv", found.losses.to_csv(index=False).encode())
                write_settings(result, found.provenance, (*FILES, *saved))
    return found


def _edits(
    plan: BenchPlan, model: Model, data: Data, folder: RunFolder, progress: bool
) -> tuple[dict[str, Condition], list[str]]:
    """Return every condition with its control behind it, and the files of what methods found."""
    conditions: dict[str, Condition] = {}
    saved: list[str] = []
    seeds = range(plan.seed, plan.seed + plan.controls)
    sides = _corpora(plan, model, data) if plan.methods else {}
    for name in plan.methods:
        record = methods.by_name(name)
        options = record.with_progress(plan.method_options(name), progress)
        given = cut_prompts(sides, [record], plan.seed)
        fitted: list[Fitted] = []

        def fit(
            record: Method = record, given: dict[str, Corpus] = given, fitted: list[Fitted] = fitted, o: Any = options
        ) -> Fitted:
            if not fitted:
                fitted.append(record.fit(model, given["forget"], given["retain"], o))
            return fitted[0]

        form = Form(lambda path, edit: edit.save(path, model), lambda path: load_intervention(path, model))
        edit: Intervention = folder.keep(
            f"{name}.safetensors", form, lambda record=record, fit=fit, o=options: record.at(model, fit(), None, o)
        )
        saved.append(f"{name}.safetensors")
        conditions[name] = edit
        if plan.controls and (drawn := record.controls(model, edit, fit(), seeds, options=options)):
            conditions[f"{name}{SUFFIX}"] = drawn
    for path in plan.interventions:
        name = Path(path).stem
        edit = load_intervention(path, model)
        conditions[name] = edit
        if plan.controls and (drawn := controls_for(model, edit, seeds)):
            conditions[f"{name}{SUFFIX}"] = drawn
    return conditions, saved


def _corpora(plan: BenchPlan, model: Model, data: Data) -> dict[str, Corpus]:
    """Read the rows that methods are fitted to."""
    found = {}
    for side, rows in (("forget", data.forget), ("retain", data.retain)):
        pairs = "question" in rows[0]
        reading: dict[str, Any] = {"tokens": plan.tokens, "prepend_bos": plan.prepend_bos}
        reading |= {"name": f"{plan.benchmark} {side}"}
        if pairs:
            reading |= {"field": "question>answer", "template": plan.fitting.replace("\\n", "\n")}
        found[side] = read_corpus(list(rows), model, **reading)
    return found


def _digest(data: Data) -> str:
    return hashlib.sha256(
        repr((data.items, data.forget, data.retain, sorted(data.more.items()))).encode(errors="backslashreplace")
    ).hexdigest()


def _save_raw(path: Path, raw: Raw) -> None:
    content = {"texts": raw.texts, "left_out": raw.left_out, "numbers": dict(raw.numbers)}
    artefacts.replace_file(path, json.dumps(content).encode())


def _load_raw(path: Path) -> Raw:
    with artefacts.usable(path, "answers that can be read"):
        content = json.loads(path.read_text())
        numbers = {str(name): tuple(map(float, values)) for name, values in content["numbers"].items()}
        return Raw(tuple(content["texts"]), tuple(content["left_out"]), numbers)
