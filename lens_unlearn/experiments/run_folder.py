"""What a run has finished: a folder `OUT.partial` that becomes `OUT` at the end, so that a run that was killed can go on.

The folder fills with the files of the output, and under `kept` with what else would cost time to make again: what methods were
fitted to, SIMU's checkpoint, evaluations. Each file is absent or whole at any moment, and `run.json` is the last to come.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from lens_unlearn.core import artefacts, distributed
from lens_unlearn.core.errors import ArtefactError, LensUnlearnError, ProcessError
from lens_unlearn.experiments.output import (
    check_folder,
    put_in_place,
    reserved,
    settings_of_run,
    taking_the_place_of,
    writing,
)
from lens_unlearn.experiments.report_file import read_report, save_report
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.model.host import Model
from lens_unlearn.model.loading import as_in_file
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.moments import Moments
from lens_unlearn.neurons.prompted import Prompted

__all__ = ["REPORT", "TEST_TOKENS", "TOKENS", "Form", "RunFolder", "fitted_form"]

T = TypeVar("T")


class Form(NamedTuple):
    """How something is written to a file, and read again."""

    save: Callable[[Path, Any], None]
    load: Callable[[Path], Any]


class RunFolder:
    """The folder beside an output that holds what a run has finished, until it takes the output's place.

    Args:
        out: The output folder.
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self.out = Path(out)
        self.folder = self.out.parent / f"{self.out.name}.partial"
        self.kept = self.folder / "kept"
        self.settings = self.kept / "settings.safetensors"
        self.made = False
        """Whether this process has made the folder, so that it may go again."""

    def check(self, plan: Mapping[str, Any], *, resume: bool) -> None:
        """Refuse what would be lost, and what is of another plan, before any work is done.

        Raises:
            LensUnlearnError: If there is something of an interrupted run and `resume` is not set, or of something else.
            ArtefactError: If what is there is of another plan; the message names what differs.
        """
        if not self.folder.exists() and not self.folder.is_symlink():
            return
        begun = self.settings.exists() or self.whole
        if self.folder.is_symlink() or not self.folder.is_dir() or not (begun or self._empty()):
            raise LensUnlearnError(f"{self.folder} is nothing that a run wrote: give another --out, or delete it")
        if not resume:
            raise LensUnlearnError(
                f"{self.folder} is left of an interrupted run: give --resume to go on, or delete it to begin anew"
            )
        if begun:
            artefacts.require_same(self.folder, self._plan(), plan, "this run")

    def _plan(self) -> Any:
        if self.whole:
            file = self.folder / "run.json"
            with artefacts.usable(file, "settings that can be read"):
                return json.loads(file.read_text())["plan"]
        return artefacts.read(self.settings, "run")[0].get("plan")

    def is_finished(self, plan: Mapping[str, Any], *, resume: bool, overwrite: bool) -> bool:
        """Refuse what cannot be, before any work is done; return whether this plan was finished before.

        Raises:
            LensUnlearnError: If the output folder holds something that would be lost, or lacks a file of its run, or an
                interrupted run is there and `resume` is not set.
            ArtefactError: If the interrupted run was of another plan; the message names what differs.
        """
        before = settings_of_run(self.out) if resume and not overwrite else None
        ours = before is not None and before.get("plan") == plan
        if before is not None and ours and not before.get("failed"):
            self._require_whole(before)
            return True
        check_folder(self.out, overwrite=overwrite or ours)
        self.check(plan, resume=resume)
        if self.whole:  # all but the last step was done
            self.commit()
            return True
        return False

    def _require_whole(self, content: Mapping[str, Any]) -> None:
        """Refuse a finished run of which files are missing; one of an earlier version does not say which it wrote."""
        missing = [name for name in content.get("files", ()) if not (self.out / str(name)).is_file()]
        if missing:
            raise LensUnlearnError(
                f"{self.out} lacks {', '.join(missing[:3])}, which its run wrote: give --overwrite to run it again"
            )

    def require_same_texts(self, inputs: Mapping[str, Any]) -> None:
        """Refuse to call a run finished whose texts or model were others than they are now.

        Raises:
            ArtefactError: If any differs; the message names what does.
        """
        theirs = (settings_of_run(self.out) or {}).get("inputs")
        if theirs is None:  # a run of an earlier version
            return
        try:
            artefacts.require_same(self.out, theirs, inputs, "this run")
        except ArtefactError as error:
            raise ArtefactError(f"{error}; give --overwrite to run it again, or another --out") from error

    @property
    def whole(self) -> bool:
        """Whether nothing is missing but the last step, which puts the folder in its place."""
        return (self.folder / "run.json").exists()

    def _empty(self) -> bool:
        return not any(path.is_file() and not path.name.startswith(".") for path in self.folder.rglob("*"))

    @property
    def found(self) -> bool:
        """Whether anything is finished that a run is for: a file of its output."""
        files = (path for path in self.folder.rglob("*") if path.is_file() and self.kept not in path.parents)
        return any(not path.name.startswith(".") for path in files)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Hold the output and make the folder, before anything is loaded; it goes again if nothing comes into it.

        Raises:
            LensUnlearnError: If another process writes this output.
            ArtefactError: If nothing can be written there.
        """
        with reserved(self.out):
            try:
                yield
            finally:
                if self.made and self._empty():
                    shutil.rmtree(self.kept, ignore_errors=True)
                    with suppress(OSError):
                        self.folder.rmdir()

    def make(self) -> None:
        """Make the folder.

        Raises:
            ArtefactError: If it cannot be written.
        """
        with writing(self.kept):
            self.kept.mkdir(parents=True, exist_ok=True)
        self.made = True

    @contextmanager
    def open(self, plan: Mapping[str, Any], texts: Mapping[str, Any], model: Model) -> Iterator[None]:
        """Begin, or go on with what is there, for the length of a `with` block.

        A `LensUnlearnError` in the block deletes what is kept if no method was finished: the same settings would come to the same
        end. Otherwise everything stays, and the error says where.

        Args:
            plan: The settings.
            texts: What else has to be the same: digests of the texts and the model, and what runs them.
            model: The model.

        Raises:
            ArtefactError: If what is there was made with something else; the message names what differs.
        """
        self.make()
        if self.settings.exists():
            header, _ = artefacts.read(self.settings, "run")
            ours = as_in_file(self.folder, header.get("texts"), texts, model)
            artefacts.require_same(self.folder, header.get("texts"), ours, "this run")
        else:
            artefacts.write(self.settings, "run", {}, {"plan": dict(plan), "texts": dict(texts)})
        try:
            yield
        except LensUnlearnError as error:
            if isinstance(error, ArtefactError | ProcessError) or self.found:
                error.kept = str(self.folder)
            else:
                shutil.rmtree(self.kept, ignore_errors=True)
            raise

    def keep(self, name: str, form: Form, make: Callable[[], T], unless: Callable[[], bool] = lambda: False) -> T:
        """Return what a file of the folder holds; if there is none yet, make it and write the file, `unless` it is not to stay."""
        path = self.folder / name
        if distributed.from_first(path.exists):
            return distributed.from_first(lambda: form.load(path))
        made = make()
        if distributed.is_first() and not unless():
            form.save(path, made)
        return made

    @contextmanager
    def result(self, *, whole: bool) -> Iterator[Path]:
        """Yield the folder to write the output into; when the block ends well, it is in the output's place.

        Args:
            whole: Whether everything was done. If not, the output is written beside what is finished, which stays, so that the run
                can go on.
        """
        if whole:
            yield self.folder
            self.commit()
        else:
            with taking_the_place_of(self.out) as work:
                yield work

    def commit(self) -> None:
        """Leave nothing but the output in the folder, and put it in the output's place."""
        shutil.rmtree(self.kept, ignore_errors=True)
        for path in self.folder.rglob(".*.part"):  # of a killed writer
            path.unlink()
        put_in_place(self.folder, self.out)


STATISTICS: dict[str, tuple[type, Callable[[Any], dict[str, Any]]]] = {
    "Moments": (Moments, lambda moments: {"extra": moments.extra}),
    "KeySample": (KeySample, lambda sample: {"capacity": sample.capacity, "seed": sample.seed}),
}
"""The statistics that a folder keeps, and what they are made with. Others are collected again when a run goes on."""
PROMPTED = ("keys", "moments")
"""Those of a `Prompted`."""


def fitted_form(model: Model | None = None) -> Form:
    """Return how what a method was fitted to is written, and read again for the same model."""
    return Form(lambda path, fitted: _save_fitted(path, fitted, model), lambda path: _load_fitted(path, model))


def _save_fitted(path: Path, fitted: tuple[Any, Any], model: Model | None) -> None:
    """Write what a method was fitted to; corpora are there anyway."""
    if isinstance(fitted[0], Delta):
        fitted[0].save(path, model)
        return
    if isinstance(fitted[0], NeuronMap):
        maps = {"scores": fitted[0], "live": fitted[0].live}
        tensors = {f"{name}/{site}": value.contiguous() for name, part in maps.items() for site, value in part.shaped()}
        artefacts.write(path, "fitted", tensors, {"scores": list(map(str, fitted[0]))})
        return
    several = [fitted[0], *(fitted[1] if isinstance(fitted[1], list) else [fitted[1]])]
    if not all(isinstance(one, Prompted) or type(one).__name__ in STATISTICS for one in several):
        return
    entries, tensors = [], {}
    for number, one in enumerate(several):
        entry, own = _entry_of(one)
        entries.append(entry)
        tensors |= {f"{number}/{name}": tensor for name, tensor in own.items()}
    artefacts.write(path, "fitted", tensors, {"statistics": entries})


def _entry_of(statistic: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a file's header holds of a statistic, and its tensors."""
    if isinstance(statistic, Prompted):
        parts = {name: _entry_of(getattr(statistic, name)) for name in PROMPTED}
        tensors = {f"{name}/{key}": tensor for name, (_, own) in parts.items() for key, tensor in own.items()}
        return {"kind": "Prompted", **{name: entry for name, (entry, _) in parts.items()}}, tensors
    kind = type(statistic).__name__
    settings = STATISTICS[kind][1](statistic)
    return {"kind": kind, "provenance": statistic.provenance, "settings": settings}, statistic.state()


def _load_fitted(path: Path, model: Model | None) -> tuple[Any, Any]:
    header, tensors = artefacts.read(path)
    if header["kind"] == "intervention":
        return load_intervention(path, model), None
    with artefacts.usable(path, "statistics that can be read"):
        if "scores" in header:  # of every neuron, where a method makes nothing else of its corpora
            scores, live = (
                NeuronMap({Site.parse(site): tensors[f"{name}/{site}"] for site in header["scores"]})
                for name in ("scores", "live")
            )
            return NeuronMap(dict(scores.shaped()), live=dict(live.shaped())), None
        forget, first, *more = (
            _statistic(entry, tensors, f"{number}/") for number, entry in enumerate(header["statistics"])
        )
        return forget, [first, *more] if more else first  # of each source to retain, where a method keeps them apart


def _statistic(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], start: str) -> Any:
    if entry["kind"] == "Prompted":
        return Prompted(**{name: _statistic(entry[name], tensors, f"{start}{name}/") for name in PROMPTED})
    empty = STATISTICS[entry["kind"]][0](**entry["settings"])
    statistic = empty.with_state({n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)})
    statistic.provenance = dict(entry["provenance"])
    return statistic


def _load_tokens(path: Path) -> int:
    tokens = artefacts.read(path, "batch size")[0].get("tokens")
    with artefacts.usable(path, "batch size that can be used"):
        return _tokens(tokens)


def _load_test_tokens(path: Path) -> dict[str, int]:
    tokens = artefacts.read(path, "sizes of tests")[0].get("tokens")
    with artefacts.usable(path, "sizes of tests that can be used"):
        if not isinstance(tokens, dict):
            raise ValueError(f"{tokens!r} are no numbers of tokens by corpus")
        return {str(name): _tokens(number) for name, number in tokens.items()}


def _tokens(number: Any) -> int:
    if type(number) is not int or number < 1:
        raise ValueError(f"{number!r} is no number of tokens")
    return number


REPORT = Form(save_report, read_report)
TOKENS = Form(lambda path, tokens: artefacts.write(path, "batch size", {}, {"tokens": tokens}), _load_tokens)
TEST_TOKENS = Form(
    lambda path, tokens: artefacts.write(path, "sizes of tests", {}, {"tokens": tokens}), _load_test_tokens
)
