"""The experiment behind `lens-unlearn run` and `demo`: fit, tune and test on separate documents, with controls, into one folder."""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lens_unlearn import figures
from lens_unlearn.core import artefacts, distributed
from lens_unlearn.core.artefacts import replace_file
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.evaluation.evaluate import Condition, evaluate
from lens_unlearn.evaluation.generation import generate
from lens_unlearn.evaluation.report import BASE, Report, provenance_of
from lens_unlearn.experiments.plan import METHODS, QUERIES, READ, Plan, command_of, told_of
from lens_unlearn.experiments.run_folder import FITTED, REPORT, Form, Partial, put_in_place
from lens_unlearn.inspection.token_values import token_losses
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.keyspace.key_space import key_space
from lens_unlearn.methods.key_space_detection import key_space_detection
from lens_unlearn.methods.neuron_adjust import adjust_score
from lens_unlearn.methods.simu import simu
from lens_unlearn.methods.tuning import Method, controls_for, prepare, prompted, strength_of, tune, with_progress
from lens_unlearn.model.host import Model, device_of
from lens_unlearn.model.loading import fingerprint, load_model
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.histogram import Histogram
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.moments import Moments

__all__ = ["Experiment", "carry_out", "new_folder"]

PROMPT, WRITTEN = 24, 24
"""Tokens of a plain text that are continued, and the longest continuation, where the report shows what is written."""
BEGINNINGS, OTHERS = 2, 3
"""Texts continued of forget and of retain, and further corpora of which one is."""
COLOURED, NATS = 120, 4.0
"""Tokens of a text that the report colours by what they lost, and where the scale ends."""
LAYERS = ("Which layers", "How ")
"""How the titles of figures begin that say where a method acts; the page shows the first figures, and folds the rest away."""


@dataclass
class Parts:
    """The documents of an experiment, by what they are used for."""

    fit: dict[str, Corpus]
    tune: dict[str, Corpus]
    test: dict[str, Corpus]
    queries: dict[str, Corpus]
    """Prompts to fit on, for methods that judge prompts: from the same documents as `fit`."""
    removed: dict[str, int]
    """Documents taken out of the fit because they also stand in a test source."""


class Experiment:
    """One plan, carried out on one model."""

    def __init__(
        self,
        plan: Plan,
        model: Model | None = None,
        *,
        progress: bool = True,
        known: dict[Any, Corpus] | None = None,
    ) -> None:
        self.plan = plan
        self.progress = progress
        self._known = {} if known is None else known
        """Sources read already, so that several roles, or several plans on one model, read each once."""
        self.model = load_model(plan.model, dtype=plan.dtype, device_map=plan.device_map) if model is None else model
        self.parts = self._read()
        self.edits: dict[str, Intervention] = {}
        self.chosen: dict[str, dict[str, Any]] = {}
        self.fitted: dict[str, tuple[Any, Any]] = {}
        """What each method was fitted to: moments, keys, or the corpora themselves."""
        self.partial: Partial | None = None
        """Where what is finished is kept, so that the run can go on if it is interrupted."""

    def _corpus(self, source: str) -> Corpus:
        plan = self.plan
        told = {"tokens": READ * plan.tokens, "template": plan.template, "window": plan.window}
        key = (source, *told.values())
        if key not in self._known:
            self._known[key] = read_corpus(source, self.model, name=source, **told)
        return self._known[key]

    def _sources(self, sources: Sequence[str]) -> list[Corpus]:
        return [self._corpus(source) for source in sources]

    def _read(self) -> Parts:
        plan = self.plan
        also = {name: self._corpus(source) for name, source in plan.also.items()}
        given = {"forget": self._sources([plan.forget]), "retain": self._sources(plan.retain)}
        tests = {
            "forget": self._sources([plan.test_forget] if plan.test_forget else []),
            "retain": self._sources(plan.test_retain),
        }
        known = [*also.values(), *tests["forget"], *tests["retain"]]
        fit, tuning, test, queries, removed = {}, {}, {}, {}, {}
        for name, wholes in given.items():
            shares = (0.6, 0.4) if tests[name] else (0.4, 0.25, 0.35)
            cleaned = [whole.without(*known) for whole in wholes]
            removed[name] = sum(count for _, count in cleaned)
            parts = list(zip(*(whole.split(*shares, seed=plan.seed) for whole, _ in cleaned), strict=True))
            fit[name] = self._pool(name, parts[0], plan.tokens)
            tuning[name] = self._pool(name, self._prompted(parts[1]), plan.tokens // 2)
            test[name] = self._pool(name, self._prompted(tests[name] or parts[2]), plan.tokens)
            if self.judges_prompts:
                queries[name] = self._queries(name, parts[0])
        if set(fit["forget"].keys) == set(fit["retain"].keys):
            raise CorpusError("forget and retain hold the same documents: nothing could tell them apart")
        test |= {name: self._pool(name, self._prompted([corpus]), plan.tokens) for name, corpus in also.items()}
        return Parts(fit, tuning, test, queries, removed)

    @property
    def judges_prompts(self) -> bool:
        """Whether a method looks at prompts."""
        return any(METHODS[name][0] is key_space_detection for name in self.plan.methods)

    def _prompted(self, corpora: Sequence[Corpus]) -> list[Corpus]:
        functions = [METHODS[method][0] for method in self.plan.methods]
        return [prompted({"": corpus}, functions, self.plan.seed)[""] for corpus in corpora]

    def _queries(self, name: str, corpora: Sequence[Corpus]) -> Corpus:
        """Draw prompts of every source, in equal numbers."""
        cut = self._prompted(corpora)
        per_source = -(-QUERIES // len(cut))
        return self._pool(name, cut, sum(per_source * c.n_tokens // c.n_rows for c in cut))

    def _pool(self, name: str, corpora: Sequence[Corpus], tokens: int) -> Corpus:
        """Join sources, each with an equal share of the tokens, drawn over all of its documents."""
        sampled = [corpus.sample(max(2, tokens // len(corpora)), self.plan.seed) for corpus in corpora]
        whole = sampled[0]
        for more in sampled[1:]:
            whole = whole + more
        return replace(whole, name=f"{name} ({whole.name})")

    def texts(self) -> dict[str, Any]:
        """Return what has to be the same besides the plan for an interrupted run to go on: texts, model, and what runs it."""
        parts = {
            "fit": self.parts.fit,
            "tune": self.parts.tune,
            "test": self.parts.test,
            "queries of": self.parts.queries,
        }
        texts = {f"{use} {name}": c.fingerprint for use, corpora in parts.items() for name, c in corpora.items()}
        host = {"device": str(device_of(self.model)), **provenance_of({})["versions"]}
        return {**texts, "model": fingerprint(self.model), **host}

    def fit(self) -> None:
        """Find every method's intervention: tuned to the retain budget if there is one, else as the options say."""
        for name in self.plan.methods:
            self.fitted[name] = self._kept(
                f"kept/{name}.fitted.safetensors", FITTED, lambda name=name: self._prepare(name)
            )
            found = Form(self._save_edit, _load_edit)
            kept = self._kept(f"{name}.safetensors", found, lambda name=name: self._find(name))
            self.edits[name], self.chosen[name] = kept

    def _kept(self, name: str, form: Form, make: Callable[[], Any]) -> Any:
        return make() if self.partial is None else self.partial.keep(name, form, make)

    def _prepare(self, name: str) -> tuple[Any, Any]:
        function, _ = METHODS[name]
        told = with_progress(function, self.plan.options(name), self.progress)
        if function is simu and self.partial is not None:
            told["checkpoint"] = str(self.partial.kept / f"{name}.checkpoint.safetensors")
        return prepare(function, self.model, *self._fit_pair(function), told)

    def _find(self, name: str) -> tuple[Intervention, dict[str, Any]]:
        function, options = METHODS[name][0], self.plan.options(name)
        got, kept = self.fitted[name]
        if self.plan.retain_drop is None:
            told = with_progress(function, options, self.progress)
            return function(self.model, got, kept, **told), {"options": options}
        options.pop(strength_of(function), None)
        held_out = (self.parts.tune["forget"], self.parts.tune["retain"])
        found = tune(
            function, self.model, got, kept, retain_drop=self.plan.retain_drop, held_out=held_out,
            options=options, batch_size=self.plan.batch_size, progress=self.progress,
        )  # fmt: skip
        cost = {"forget_drop": found.forget_drop, "retain_drop": found.retain_drop}
        return found.intervention, {"options": options, strength_of(function): found.fraction, "tuning": cost}

    def _save_edit(self, path: Path, found: tuple[Intervention, dict[str, Any]]) -> None:
        edit, chosen = found
        edit.save(path, self.model, note=json.dumps(chosen, default=str))

    def _fit_pair(self, function: Method) -> tuple[Corpus, Corpus]:
        part = self.parts.queries if function is key_space_detection else self.parts.fit
        if function is simu:
            part = prompted(part, [simu], self.plan.seed)
        return part["forget"], part["retain"]

    def _control(self, name: str, edit: Intervention, seeds: Sequence[int], **strength: float) -> list[Intervention]:
        """Make the random controls: random neurons; of a method that judges prompts, one fitted to shuffled labels."""
        got, kept = self.fitted[name]
        if not (isinstance(got, KeySample) and isinstance(kept, KeySample)):
            return controls_for(self.model, edit, seeds)
        options = {**self.plan.options(name), **strength, "progress": False}
        return [METHODS[name][0](self.model, *got.shuffled(kept, seed), **options) for seed in seeds]

    def report(self) -> Report:
        """Evaluate everything on the test documents, and gather figures and samples."""
        report = self._kept("kept/evaluation.safetensors", REPORT, self._evaluate)
        provenance = {
            **report.provenance,
            "plan": asdict(self.plan),
            "chosen": self.chosen,
            "documents": self._documents(),
        }
        command = command_of(self.plan)
        provenance |= {"command": command} if command else {}
        report = replace(report, provenance=provenance, samples=self._samples(report.samples))
        curves = self._kept("kept/curves.safetensors", REPORT, self.curves) if self.plan.sweep else None
        return replace(report, figures=self._figures(report, curves))

    def _evaluate(self) -> Report:
        conditions: dict[str, Condition] = {}
        for name, edit in self.edits.items():
            conditions[name] = edit
            strength = {key: self.chosen[name][key] for key in ("false_alarms",) if key in self.chosen[name]}
            seeds = range(self.plan.seed, self.plan.seed + self.plan.controls)
            control = self._control(name, edit, seeds, **strength)
            if control:
                conditions[f"{name}:control"] = control
        told = {"batch_size": self.plan.batch_size, "progress": self.progress, "seed": self.plan.seed}
        asked: dict[str, Any] = {"answers": self.plan.answers, "memorization": self.plan.memorization}
        return evaluate(self.model, self.parts.test, conditions, **told, **asked)

    def _documents(self) -> dict[str, Any]:
        parts = {"fit": self.parts.fit, "tune": self.parts.tune, "test": self.parts.test}
        counts = {
            use: {name: {"documents": c.n_documents, "tokens": c.n_tokens} for name, c in corpora.items()}
            for use, corpora in parts.items()
        }
        return {**counts, "removed_from_fit": self.parts.removed}

    def curves(self) -> Report:
        """Evaluate every method over fractions on the test documents, for the trade-off curves."""
        conditions: dict[str, Condition] = {}
        for name in self.plan.methods:
            function, options = METHODS[name][0], self.plan.options(name)
            strength = strength_of(function)
            options = {key: value for key, value in options.items() if key not in (strength, "steps")}
            got, kept = self.fitted[name]
            if isinstance(got, Corpus):  # what is fitted in several steps shares nothing, but one step of it does
                got, kept = prepare(function, self.model, *self._fit_pair(function), options)
            grids = {"false_alarms": self.plan.false_alarms, "strength": self.plan.strengths}
            for share in grids.get(strength, self.plan.fractions):
                edit = function(self.model, got, kept, **{strength: share}, **with_progress(function, options, False))
                conditions[f"{name}@{share:g}"] = edit
                control = self._control(name, edit, [self.plan.seed], **{strength: share})
                if control:
                    conditions[f"{name}:control@{share:g}"] = control
        # The same texts and seed as the main evaluation, so that both have the same base and the same resamples.
        texts = {name: self.parts.test[name] for name in ("forget", "retain")}
        told = {"batch_size": self.plan.batch_size, "progress": self.progress, "seed": self.plan.seed}
        return evaluate(self.model, texts, conditions, **told)

    def _figures(self, report: Report, curves: Report | None) -> dict[str, Any]:
        """Draw what the page shows: first what each method lost and cost, then where it was found, then the details."""
        drawn: dict[str, Any] = {}
        if curves is not None:
            drawn["Trade-off over strengths"] = self._with_budget(figures.tradeoff(report + curves))
            drawn["What is left as more is taken out"] = figures.sweep_curves(curves)
        found: dict[str, NeuronMap] = {}
        controls: dict[str, NeuronMap] = {}
        details: dict[str, Any] = {}
        for name, edit in self.edits.items():
            if isinstance(edit, Delta):
                rows = self._rows(edit)
                if rows:
                    found[name] = NeuronMap(rows)
            if isinstance(edit, Delta) and edit.record:
                details[f"How {name} was trained"] = figures.training_curves(edit)
            elif isinstance(edit, Abstain):
                details |= self._keys(name, edit)
            elif isinstance(edit, Ablate | Adjust):
                details |= self._neurons(name, edit)
                found[name] = _at_keys(edit.selection)
                control = controls_for(self.model, edit, [self.plan.seed])[0]
                if isinstance(control, Ablate | Adjust):
                    controls[f"{name}:control"] = _at_keys(control.selection)
        if len(found) > 1:
            drawn["Where the methods found the skill"] = figures.layer_importance(
                found, title="Neurons selected, by layer"
            )
        layers = {title: figure for title, figure in details.items() if title.startswith(LAYERS)}
        drawn |= layers | details  # by layer first
        same = found | controls
        if len(same) > 1:
            drawn["Overlap of selections"] = figures.selection_overlap(same)
        return drawn | self._coloured()

    def _with_budget(self, figure: Any) -> Any:
        """Mark the budget in the trade-off."""
        if self.plan.retain_drop is not None:
            told = {"annotation_text": "budget", "annotation_position": "bottom right", "annotation_font_size": 12}
            figure.add_vline(x=self.plan.retain_drop, line={"dash": "dash", "width": 1, "color": "#777777"}, **told)
        return figure

    def _coloured(self) -> dict[str, Any]:
        """Colour one text of forget and one of retain by what each token lost under each intervention."""
        drawn: dict[str, Any] = {}
        for name in ("forget", "retain"):
            with suppress(CorpusError):  # a text of which no token is predicted
                text = self.parts.test[name].only([self._document(name)])
                losses = token_losses(self.model, text, self.edits, batch_size=self.plan.batch_size, progress=False)
                drawn[f"Token by token: what a text of {name} lost"] = figures.texts(losses, limit=NATS, most=COLOURED)
        return drawn

    def _rows(self, edit: Delta) -> dict[Site, Any]:
        """Mark the neurons whose output weights an update changes."""
        marked: dict[Site, Any] = {}
        for matrix, update in edit.updates.items():
            if matrix.name == "W_out" and update.rows is not None:
                site = Site(matrix.layer, "mlp.post")
                marked[site] = torch.zeros(resolve(self.model, site)[site].shape, dtype=torch.bool)
                marked[site][update.rows.cpu()] = True
        return marked

    def _keys(self, name: str, edit: Abstain) -> dict[str, Any]:
        """Draw how the fitted queries lie in key space: all layers, then the first that votes."""
        place = min(edit.regions)
        try:
            space = key_space(
                self.model, self.parts.queries, place.kind,
                seed=self.plan.seed, batch_size=self.plan.batch_size, progress=self.progress,
            )  # fmt: skip
        except CorpusError as error:  # enough to fit one region, not to fit and judge four at every layer
            warnings.warn(f"the report has no figures of the key space: {error}", RuntimeWarning, stacklevel=2)
            return {}
        return {
            f"Which layers tell the queries apart ({name})": figures.key_space(space),
            f"Finding the queries at {place} ({name})": figures.key_roc(space, "forget", place),
            f"The queries' keys at {place} ({name})": figures.key_map(space, place, skill="forget"),
        }

    def _neurons(self, name: str, edit: Ablate | Adjust) -> dict[str, Any]:
        got, kept = self.fitted[name]
        if not (isinstance(got, Moments) and isinstance(kept, Moments)):
            return {}
        chosen = edit.selection
        if isinstance(edit, Adjust):
            score = adjust_score(
                got, kept, rank_by=self.plan.options(name).get("rank_by", "signed"), site=chosen.kinds[0]
            )
        else:
            score = got.mean_abs / (kept.mean_abs + 1e-3)
        title = f"{name}: share selected and mean score per layer"
        drawn: dict[str, Any] = {
            f"Where {name} found the skill": figures.layer_importance(score, chosen, title=title),
            f"Specialization of neurons ({name})": figures.specialization_map(got, kept, selection=chosen),
        }
        if isinstance(edit, Ablate):
            drawn[f"Every neuron's score ({name})"] = figures.neuron_heatmap(
                (got.mean_abs + 1e-3) / (kept.mean_abs + 1e-3), selection=chosen
            )
        drawn[f"Activations of the most specialized neurons ({name})"] = self._distribution(score, chosen)
        return drawn

    def _distribution(self, score: NeuronMap, chosen: NeuronMap) -> Any:
        best = strongest(score.where(chosen, float("-inf")), 6)
        sites = sorted({site for site, _ in best})
        read = {
            name: collect(
                self.model, corpus.first(5000), sites, statistic=Histogram(),
                batch_size=self.plan.batch_size, progress=False,
            )
            for name, corpus in self.parts.fit.items()
        }  # fmt: skip
        return figures.activation_distribution(read, best)

    def _document(self, name: str) -> int:
        """Choose the first document with a short prompt, so that there is something behind it to colour."""
        corpus = self.parts.test[name]
        rows = range(min(50, corpus.n_rows))
        return int(corpus.document[next((row for row in rows if 4 * len(corpus.prompt(row)) < COLOURED), 0)])

    def _samples(self, answered: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Continue the prompts, or the beginnings, of a few test documents with and without each intervention.

        Where questions of a corpus were answered already, those are shown.
        """
        asked = {sample["corpus"] for sample in answered}
        others = [name for name in self.parts.test if name not in ("forget", "retain")][:OTHERS]
        counts = {"forget": BEGINNINGS, "retain": BEGINNINGS, **dict.fromkeys(others, 1)}
        samples = [one for name, count in counts.items() if name not in asked for one in self._begun(name, count)]
        if samples:
            self._continue(samples)
        order = list(self.parts.test)
        return sorted([*samples, *answered], key=lambda sample: order.index(sample["corpus"]))

    def _continue(self, samples: list[dict[str, Any]]) -> None:
        prompts = [sample["prompt"] for sample in samples]
        for condition, edit in {BASE: None, **self.edits}.items():
            written = generate(self.model, prompts, intervention=edit, max_new_tokens=WRITTEN)
            for sample, text in zip(samples, written, strict=True):
                withheld = isinstance(edit, Abstain) and text == edit.refusal
                if withheld:
                    sample.setdefault("withheld", []).append(condition)
                elif "\n" not in sample.get("true answer", "\n"):  # an answer of one line ends where it does
                    text = text.strip().partition("\n")[0]
                sample[condition] = text

    def _begun(self, name: str, count: int) -> Iterator[dict[str, Any]]:
        """Give the first prompts of a corpus, or the beginnings of its texts, with how they go on there."""
        corpus, decode = self.parts.test[name], self.model.tokenizer.decode
        for row in range(min(count, corpus.n_rows)):
            bos, tokens = int(corpus.prepend_bos), corpus.row(row).tolist()
            end = len(corpus.prompt(row)) if corpus.has_prompts else bos + PROMPT
            prompt, answer = decode(tokens[bos:end]), corpus.answer(row)
            true = decode(tokens[end : end + WRITTEN]) if answer is None else answer.text
            if prompt.strip():
                yield {"corpus": name, "prompt": prompt, "true text" if answer is None else "true answer": true}

    def write(self, folder: Path, report: Report) -> None:
        """Write the report, the table, the interventions and the settings into a folder that exists."""
        report.to_html(folder / "report.html")
        report.to_csv(folder / "metrics.csv")
        for name, edit in self.edits.items():
            self._save_edit(folder / f"{name}.safetensors", (edit, self.chosen[name]))
        # The last: where it is, everything is.
        replace_file(folder / "run.json", json.dumps(report.provenance, indent=2, default=str).encode())


def _load_edit(path: Path) -> tuple[Intervention, dict[str, Any]]:
    return load_intervention(path), json.loads(artefacts.read(path)[0]["note"])


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
    to and what it found, the steps of SIMU's training, and evaluations. It stays when the run is interrupted or killed, and
    goes when the run ends with an error that the same plan would bring again.

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
    target, partial = Path(out), Partial(out)
    done = distributed.from_first(lambda: _ready(target, partial, plan, resume=resume, overwrite=overwrite))
    if done:
        return None
    experiment = Experiment(plan, model, progress=progress and distributed.is_first(), known=known)
    with partial.open(told_of(plan), experiment.texts()) if distributed.is_first() else nullcontext():
        experiment.partial = partial
        experiment.fit()
        report = experiment.report()
        if distributed.is_first():
            experiment.write(partial.folder, report)
            partial.commit()
    return experiment, report


def _ready(target: Path, partial: Partial, plan: Plan, *, resume: bool, overwrite: bool) -> bool:
    """Refuse what cannot be; return whether the run was finished before."""
    if resume and not overwrite and _finished(target, plan):
        return True
    check_folder(target, overwrite=overwrite)
    partial.check(told_of(plan), resume=resume)
    if partial.whole:
        partial.commit()
        return True
    return False


def _finished(folder: Path, plan: Plan) -> bool:
    try:
        return json.loads((folder / "run.json").read_text())["plan"] == told_of(plan)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _at_keys(selection: NeuronMap) -> NeuronMap:
    """Name MLP neurons by their keys, so that selections made at pre-activations and at keys can be compared."""
    return NeuronMap(
        {Site(s.layer, "mlp.post") if s.kind.startswith("mlp.") else s: value for s, value in selection.items()}
    )


def strongest(score: NeuronMap, count: int) -> list[tuple[Site, int]]:
    """Return the neurons with the highest scores, as (site, flat index)."""
    ranked = score.flat().double().argsort(descending=True, stable=True)[:count].tolist()
    found: list[tuple[Site, int]] = []
    for position in ranked:
        for site, value in score.items():
            if position < value.numel():
                found.append((site, position))
                break
            position -= value.numel()
    return found


@contextmanager
def new_folder(out: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the block ends well, and vanishes when it does not.

    Raises:
        LensUnlearnError: If `out` holds something and `overwrite` is not set, or holds what no run wrote.
    """
    target = Path(out)
    check_folder(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(*artefacts.temporary_name(target), target.parent))
    try:
        yield work
        os.chmod(work, 0o755)
        put_in_place(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_folder(target: Path, *, overwrite: bool) -> None:
    """Refuse an output folder whose content would be lost, before any work is done.

    Raises:
        LensUnlearnError: As in `new_folder`.
    """
    if target.name in ("", ".."):
        raise LensUnlearnError(f"{target} has no name of its own: give a new folder as --out")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise LensUnlearnError(f"{target} is not a folder: give another --out")
    if not target.exists() or not any(target.iterdir()):
        return
    if not (target / "run.json").is_file():
        raise LensUnlearnError(f"{target} holds files that no run wrote: give an empty or new folder as --out")
    if not overwrite:
        raise LensUnlearnError(f"{target} holds another run: give another --out, or --overwrite to replace it")
