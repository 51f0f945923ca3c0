"""What a run has finished: a folder `OUT.partial` that becomes `OUT` at the end, so that a run that was killed can go on.

The folder fills with the files of the output, and under `kept` with what else would cost time to make again: what methods were
fitted to, SIMU's checkpoint, evaluations. Each file is absent or whole at any moment, and `run.json` is the last to come.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lens_unlearn.core import artefacts, distributed
from lens_unlearn.core.errors import ArtefactError, LensUnlearnError, ProcessError
from lens_unlearn.evaluation.report import Measure, Report
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.model.host import Model
from lens_unlearn.model.loading import as_in_file
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.moments import Moments

__all__ = ["REPORT", "Form", "RunFolder", "check_folder", "fitted_form", "new_folder"]

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
            LensUnlearnError: If the output folder holds something that would be lost, or an interrupted run is there and
                `resume` is not set.
            ArtefactError: If the interrupted run was of another plan; the message names what differs.
        """
        if resume and not overwrite and self._holds(plan):
            return True
        check_folder(self.out, overwrite=overwrite)
        self.check(plan, resume=resume)
        if self.whole:  # all but the last step was done
            self.commit()
            return True
        return False

    def _holds(self, plan: Mapping[str, Any]) -> bool:
        try:
            return json.loads((self.out / "run.json").read_text())["plan"] == plan
        except (OSError, ValueError, LookupError, TypeError):
            return False

    @property
    def whole(self) -> bool:
        """Whether nothing is missing but the last step, which puts the folder in its place."""
        return (self.folder / "run.json").exists()

    def _empty(self) -> bool:
        return not any(path.is_file() and not path.name.startswith(".") for path in self.folder.rglob("*"))

    @contextmanager
    def open(self, plan: Mapping[str, Any], texts: Mapping[str, Any], model: Model) -> Iterator[None]:
        """Begin, or go on with what is there, for the length of a `with` block.

        A `LensUnlearnError` in the block deletes everything: the same settings would come to the same end. An `ArtefactError`,
        as from a full disk, does not; nor does any other.

        Args:
            plan: The settings.
            texts: What else has to be the same: digests of the texts and the model, and what runs them.
            model: The model.

        Raises:
            ArtefactError: If what is there was made with something else; the message names what differs.
        """
        made = [path for path in (self.kept, self.folder, *self.out.absolute().parents) if not path.exists()]
        if self.settings.exists():
            header, _ = artefacts.read(self.settings, "run")
            ours = as_in_file(self.folder, header.get("texts"), texts, model)
            artefacts.require_same(self.folder, header.get("texts"), ours, "this run")
        else:
            try:
                self.kept.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ArtefactError(f"{self.kept} cannot be written: {error.strerror or error}") from error
            artefacts.write(self.settings, "run", {}, {"plan": dict(plan), "texts": dict(texts)})
        try:
            yield
        except (ArtefactError, ProcessError):
            raise
        except LensUnlearnError:
            shutil.rmtree(self.folder, ignore_errors=True)
            for path in made:
                with suppress(OSError):
                    path.rmdir()
            raise

    def keep(self, name: str, form: Form, make: Callable[[], T]) -> T:
        """Return what a file of the folder holds; if there is none yet, make it, and write the file."""
        path = self.folder / name
        if distributed.from_first(path.exists):
            return distributed.from_first(lambda: form.load(path))
        made = make()
        if distributed.is_first():
            form.save(path, made)
        return made

    def commit(self) -> None:
        """Leave nothing but the output in the folder, and put it in the output's place."""
        shutil.rmtree(self.kept, ignore_errors=True)
        for path in self.folder.rglob(".*.part"):  # of a killed writer
            path.unlink()
        put_in_place(self.folder, self.out)


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


def put_in_place(work: Path, target: Path) -> None:
    """Make a finished folder the target, in place of what may be there."""
    artefacts.sweep(target)
    if not target.exists():
        os.replace(work, target)
        return
    suffix, prefix = artefacts.temporary_name(target)
    old = target.with_name(f"{prefix}{os.urandom(4).hex()}{suffix}")
    os.replace(target, old)
    try:
        os.replace(work, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


STATISTICS: dict[str, tuple[type, Callable[[Any], dict[str, Any]]]] = {
    "Moments": (Moments, lambda moments: {"extra": moments.extra}),
    "KeySample": (KeySample, lambda sample: {"capacity": sample.capacity, "seed": sample.seed}),
}
"""The statistics that a folder keeps, and what they are made with. Others are collected again when a run goes on."""


def fitted_form(model: Model | None = None) -> Form:
    """Return how what a method was fitted to is written, and read again for the same model."""
    return Form(lambda path, fitted: _save_fitted(path, fitted, model), lambda path: _load_fitted(path, model))


def _save_fitted(path: Path, fitted: tuple[Any, Any], model: Model | None) -> None:
    """Write what a method was fitted to; corpora are there anyway."""
    if isinstance(fitted[0], Delta):
        fitted[0].save(path, model)
        return
    if not all(type(statistic).__name__ in STATISTICS for statistic in fitted):
        return
    entries, tensors = [], {}
    for number, statistic in enumerate(fitted):
        kind = type(statistic).__name__
        settings = STATISTICS[kind][1](statistic)
        entries.append({"kind": kind, "provenance": statistic.provenance, "settings": settings})
        tensors |= {f"{number}/{name}": tensor for name, tensor in statistic.state().items()}
    artefacts.write(path, "fitted", tensors, {"statistics": entries})


def _load_fitted(path: Path, model: Model | None) -> tuple[Any, Any]:
    header, tensors = artefacts.read(path)
    if header["kind"] == "intervention":
        return load_intervention(path, model), None
    with artefacts.usable(path, "statistics that can be read"):
        one, other = (_statistic(entry, tensors, f"{number}/") for number, entry in enumerate(header["statistics"]))
        return one, other


def _statistic(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], start: str) -> Moments | KeySample:
    empty = STATISTICS[entry["kind"]][0](**entry["settings"])
    statistic = empty.with_state({n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)})
    statistic.provenance = dict(entry["provenance"])
    return statistic


def _save_report(path: Path, report: Report) -> None:
    """Write the measures, samples and provenance of a report without figures or parts."""
    tensors = {f"draws/{i}": torch.from_numpy(one.draws) for i, one in enumerate(report.measures.values())}
    tensors |= {
        f"spread/{i}": torch.from_numpy(one.spread)
        for i, one in enumerate(report.measures.values())
        if one.spread is not None
    }
    tensors |= {f"values/{i}": torch.from_numpy(one) for i, one in enumerate(report.values.values())}
    content = {
        "measures": [[*key, one.value, one.n, one.units, one.replicates] for key, one in report.measures.items()],
        "values": [list(key) for key in report.values],
        "provenance": report.provenance,
        "samples": report.samples,
    }
    artefacts.write(path, "report", tensors, {"report": json.dumps(content, default=str)})  # as text, the order stays


def _load_report(path: Path) -> Report:
    header, tensors = artefacts.read(path, "report")
    with artefacts.usable(path, "report that can be read"):
        content = artefacts.parse(header["report"])
        measures = {
            _key(entry[:3]): _measure(entry[3:], tensors[f"draws/{i}"], tensors.get(f"spread/{i}"))
            for i, entry in enumerate(content["measures"])
        }
        values = {_key(key): tensors[f"values/{i}"].numpy() for i, key in enumerate(content["values"])}
        flat = all(tensor.ndim == 1 and tensor.dtype == torch.float64 for tensor in tensors.values())
        named = {f"draws/{i}" for i in range(len(measures))} | {f"values/{i}" for i in range(len(values))}
        named |= {f"spread/{i}" for i, one in enumerate(measures.values()) if one.spread is not None}
        if not flat or len(content["measures"]) > len(measures) or set(tensors) != named:
            raise ValueError("its numbers are not those of its measures")
        samples = [{str(key): str(text) for key, text in sample.items()} for sample in content["samples"]]
        found = Report(measures, dict(content["provenance"]), samples=samples, values=values)
        found.to_frame()
    return found


def _measure(numbers: Sequence[Any], draws: Tensor, spread: Tensor | None) -> Measure:
    """Read a measure; files of earlier versions say nothing of units and replicates."""
    value, n, units, replicates = map(_number, [*numbers, *(0, 1)[len(numbers) - 2 :]])
    if spread is not None and spread.shape != draws.shape:
        raise ValueError("its spread is not that of its draws")
    over = None if spread is None else spread.numpy()
    return Measure(value, draws.numpy(), int(n), int(units), int(replicates), over)


def _key(parts: Sequence[Any]) -> tuple[str, str, str]:
    condition, corpus, metric = parts
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{parts!r} is no name of a measure")
    return condition, corpus, metric


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is no number")
    return float(value)


REPORT = Form(_save_report, _load_report)
