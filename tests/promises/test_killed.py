"""Killed processes: whatever dies, and wherever, each file is absent or whole, and who goes on ends as if nothing had happened.

A child is forked from this process, with the model loaded, and dies by SIGKILL: at the n-th of the moments at which files and
results change hands (`Moments of death`, for every n), or at a random time. What it leaves is looked at, and a second one goes on.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from command_line_helpers import WORDS, call, run_arguments, write_texts
from simu_helpers import FORGET, QUICK, RETAIN, some_rows

from lens_unlearn import methods
from lens_unlearn.core import artefacts
from lens_unlearn.core.errors import ArtefactError, LensUnlearnError
from lens_unlearn.evaluation.report import Report
from lens_unlearn.experiments import experiment
from lens_unlearn.experiments.plan import Plan
from lens_unlearn.experiments.report_content import Content
from lens_unlearn.experiments.run_folder import RunFolder, fitted_form
from lens_unlearn.methods import training
from lens_unlearn.methods.simu import simu
from lens_unlearn.model.matrices import Matrix
from lens_unlearn.neurons import collect as collecting
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.histogram import Histogram
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.moments import Moments

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# --- dying -----------------------------------------------------------------------------------------------------------


def fork(action: Callable[[], Any]) -> int:
    """Do something in a forked process; return its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of threads; the child runs on one
        pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def child(action: Callable[[], Any], after: float | None = None) -> bool:
    """Do something in a forked process; return whether it was killed, by itself or after some seconds."""
    pid = fork(action)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the child ended with an error of its own"
    return False


class HalfWriting:
    """A file that stops for a moment in the middle of what it is given."""

    def __init__(self, file: Any, tick: Callable[[], None]) -> None:
        self.file, self.tick = file, tick

    def __enter__(self) -> "HalfWriting":
        self.file.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self.file.__exit__(*details)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.tick()
        self.file.write(data[len(data) // 2 :])


def die_at(n: int, *places: tuple[Any, str]) -> None:
    """Make this process kill itself at the n-th moment: before and after each change to files, and each call at `places`."""
    passed = count(1)

    def tick() -> None:
        if next(passed) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            tick()
            result = real(*args, **kwargs)
            tick()
            return result

        setattr(owner, name, call)

    opened = os.fdopen
    os.fdopen = lambda *args, **kwargs: HalfWriting(opened(*args, **kwargs), tick)  # type: ignore[assignment]
    files = [(tempfile, "mkstemp"), (os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")]
    for owner, name in (*files, *places):
        around(owner, name)


def at_every_moment(action: Callable[[Path], Any], places: Any, folder: Path, stride: int = 1) -> list[Path]:
    """Kill the action at each moment, or at each of so many, in a folder of its own; return the folders."""
    left = []
    for n in count(1, stride):
        own = folder / f"killed-{n:03}"
        own.mkdir()

        def until_then(n: int = n, own: Path = own) -> None:
            die_at(n, *places)
            action(own)

        if not child(until_then):
            return left
        left.append(own)
    raise AssertionError


def assert_whole(folder: Path) -> None:
    """Every file under a folder can be read, but for the temporary ones of who was killed."""
    for path in folder.rglob("*"):
        if path.is_dir() or (path.name.startswith(".") and path.name.endswith((".part", ".lock"))):
            continue
        if path.suffix in (".safetensors", ".partial"):
            artefacts.read(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            assert len(pd.read_csv(path))
            assert path.read_text().endswith("\n")
        else:
            assert path.read_text().rstrip().endswith("</html>")


# --- collect ---------------------------------------------------------------------------------------------------------

CORPUS = tiny.corpus((9, 3, 14, 5, 6, 11))
BATCHES = len(list(CORPUS.batches(1)))
STATISTICS = {
    "moments": (Moments(extra=("sqrt", "extrema")), 3),
    "histogram": (Histogram(bins=16), 5),
    "keys": (KeySample(10, seed=2), 5),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_collect_killed_at_any_moment_counts_nothing_twice(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistic, stride = STATISTICS[name]
    model = tiny.model("gpt2")
    options: dict[str, Any] = {
        "sites": ("mlp.post", "attn.z"),
        "statistic": statistic,
        "batch_size": 1,
        "progress": False,
    }
    whole = collect(model, CORPUS, **options)
    monkeypatch.setattr(collecting, "_SAVE_EVERY", 0.0)
    places = [(collecting, "backbone"), (type(statistic), "merge")]
    killed = at_every_moment(
        lambda own: collect(model, CORPUS, **options, checkpoint=own / "run.partial"), places, tmp_path, stride
    )
    assert len(killed) > 10 * BATCHES // stride
    real, calls = collecting.backbone, []
    monkeypatch.setattr(collecting, "backbone", lambda *a: (calls.append(1), real(*a))[1])
    done_before = set()
    for own in killed:
        assert_whole(own)
        file = own / "run.partial"
        done = artefacts.read(file)[0]["batches"] if file.exists() else 0
        done_before.add(done)
        calls.clear()
        resumed = collect(model, CORPUS, **options, checkpoint=file)
        assert len(calls) == BATCHES - done, "each batch once"
        assert resumed.n == whole.n
        assert all(torch.equal(value, resumed.state()[key]) for key, value in whole.state().items())
        assert not list(own.iterdir()), "nothing is left, of the killed one neither"
    assert done_before >= set(range(BATCHES))


def test_collect_killed_at_random_times_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file, draw = tiny.model("gpt2"), tmp_path / "run.safetensors", random.Random(7)
    corpus = tiny.corpus([9, 3, 14, 5, 6, 11] * 8)
    options: dict[str, Any] = {"batch_size": 1, "progress": False}
    whole, kills = collect(model, corpus, **options), 0
    monkeypatch.setattr(collecting, "_SAVE_EVERY", 0.0)
    for _ in range(12):
        kills += child(lambda: collect(model, corpus, **options, checkpoint=file), after=draw.uniform(0, 0.12))
        assert_whole(tmp_path)
    resumed = collect(model, corpus, **options, checkpoint=file)
    assert kills
    assert all(torch.equal(value, resumed.state()[key]) for key, value in whole.state().items())
    assert not list(tmp_path.iterdir())


# --- training --------------------------------------------------------------------------------------------------------


def same_delta(one: Any, other: Any) -> bool:
    return one.record == other.record and all(
        torch.equal(tensor, other.updates[matrix].tensors()[name])
        for matrix, update in one.updates.items()
        for name, tensor in update.tensors().items()
    )


def test_a_training_killed_at_any_moment_ends_with_the_same_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("gpt2")
    options: Any = {**QUICK, "mask": some_rows(), "unseen": RETAIN}
    whole = simu(model, FORGET, RETAIN, **options)
    places = [(training.Training, "_step"), (training.Training, "_check")]
    killed = at_every_moment(
        lambda own: simu(model, FORGET, RETAIN, checkpoint=str(own / "run.safetensors"), **options), places, tmp_path, 4
    )
    assert len(killed) > 9
    step, steps = training.Training._step, []
    monkeypatch.setattr(training.Training, "_step", lambda self: steps.append(self.step) or step(self))
    begun = set()
    for own in killed:
        assert_whole(own)
        steps.clear()
        assert same_delta(simu(model, FORGET, RETAIN, checkpoint=str(own / "run.safetensors"), **options), whole)
        assert steps == list(range(steps[0], 6)) if steps else True
        begun.add(steps[0] if steps else 6)
    assert begun >= {0, 2, 4}


def test_a_trainings_checkpoint_is_of_the_very_rows_and_never_beyond_its_steps(tmp_path: Path) -> None:
    model, file = tiny.model("gpt2"), str(tmp_path / "run.safetensors")
    mask = some_rows()
    simu(model, FORGET, RETAIN, mask=mask, checkpoint=file, **QUICK)
    site = next(iter(mask))
    others = type(mask)({s: value.roll(1) if s == site else value for s, value in mask.items()})
    assert repr(others) == repr(mask)
    with pytest.raises(ArtefactError, match="updates"):
        simu(model, FORGET, RETAIN, mask=others, checkpoint=file, **QUICK)
    with pytest.raises(ArtefactError, match="unseen"):
        simu(model, FORGET, RETAIN, mask=mask, unseen=RETAIN, checkpoint=file, **QUICK)
    with pytest.raises(ArtefactError, match="is of step 6 already"):
        simu(model, FORGET, RETAIN, mask=mask, checkpoint=file, **{**QUICK, "steps": 4})
    more = simu(model, FORGET, RETAIN, mask=mask, checkpoint=file, **{**QUICK, "steps": 8})
    assert more.record["steps"] == 8
    assert Matrix(site.layer, "W_out") in more.updates


# --- run -------------------------------------------------------------------------------------------------------------

SETTINGS = {
    "fraction": 0.1,
    "key-space-detection.false_alarms": 0.2,
    "simu.steps": 4,
    "simu.check_every": 2,
    "simu.mask": "all",
    "simu.attention": "none",
}


@pytest.fixture(scope="module")
def texts_on_disk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    forget = write_texts(folder / "forget.jsonl", 1, words=[word[::-1] for word in WORDS])
    return {"forget": forget, "retain": write_texts(folder / "retain.jsonl", 2)}


@pytest.fixture
def plan(model_dir: Path, texts_on_disk: dict[str, Path]) -> Plan:
    names = {"model": str(model_dir), "forget": str(texts_on_disk["forget"]), "retain": (str(texts_on_disk["retain"]),)}
    methods = ("selective-pruning", "simu")
    settings = {key: value for key, value in SETTINGS.items() if key.rpartition(".")[0] in ("", *methods)}
    options: dict[str, Any] = {"tokens": 150, "window": 32, "controls": 1, "fractions": (0.3,), "strengths": (0.5,)}
    return Plan(**names, methods=methods, settings=settings, **options)


@pytest.fixture(scope="module")
def known() -> dict[Any, Any]:
    return {}


def leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what only shows: figures and samples take longer than all the rest."""
    monkeypatch.setattr(Content, "figures", lambda *_: {})
    monkeypatch.setattr(Content, "samples", lambda *_: [])
    monkeypatch.setattr(Report, "to_html", lambda _, path: artefacts.replace_file(path, b"<html></html>"))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out(monkeypatch)


def contents(folder: Path) -> dict[str, bytes]:
    assert not [path for path in folder.iterdir() if path.is_dir()]
    shown = {
        "report.html",
        "report.safetensors",
    }  # with figures, which some of these tests leave out; metrics.csv has the numbers
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in shown}


@pytest.mark.filterwarnings("ignore:less than 10%", "ignore:nothing has a positive")
@pytest.mark.usefixtures("plain")
def test_run_killed_at_any_moment_ends_with_the_same_folder(
    plan: Plan, model: Any, known: dict[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"progress": False, "model": model, "known": known}
    experiment.carry_out(plan, tmp_path / "whole", **options)
    whole = contents(tmp_path / "whole")
    assert set(whole) == {"metrics.csv", "run.json", "selective-pruning.safetensors", "simu.safetensors"}
    killed = at_every_moment(lambda own: experiment.carry_out(plan, own / "out", **options), [], tmp_path, 9)
    assert len(killed) > 10
    fitted: list[str] = []
    prepare, find = experiment.Experiment._prepare, experiment.Experiment._find
    monkeypatch.setattr(
        experiment.Experiment, "_prepare", lambda self, n: fitted.append(f"kept/{n}.fitted") or prepare(self, n)
    )
    monkeypatch.setattr(experiment.Experiment, "_find", lambda self, n: fitted.append(n) or find(self, n))
    places = set()
    for own in killed:
        assert_whole(own)
        out, partial = own / "out", RunFolder(own / "out")
        assert not out.exists() or contents(out) == whole, "the output is absent or whole"
        assert not (out.exists() and partial.folder.exists())
        had = {path.name for path in own.rglob("*.safetensors")}
        places.add(len(had))
        if partial.folder.exists():
            with pytest.raises(LensUnlearnError, match="is left of an interrupted run: give --resume"):
                experiment.carry_out(plan, out, **options)
        fitted.clear()
        experiment.carry_out(plan, out, resume=True, **options)
        assert contents(out) == whole
        assert not {Path(name).name + ".safetensors" for name in fitted} & had, "what was found is not sought again"
        assert sorted(os.listdir(own)) == ["out"], "and nothing else is left"
        assert experiment.carry_out(plan, out, resume=True, **options) is None, "it is finished"
    assert len(places) > 4


@pytest.mark.filterwarnings("ignore:less than 10%", "ignore:nothing has a positive")
@pytest.mark.usefixtures("plain")
def test_run_killed_at_random_times_again_and_again(
    plan: Plan, model: Any, known: dict[Any, Any], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"progress": False, "model": model, "known": known}
    experiment.carry_out(plan, tmp_path / "whole", **options)
    draw, kills = random.Random(3), 0
    for attempt in range(2):
        out = tmp_path / f"out-{attempt}"
        for _ in range(6):
            kills += child(
                lambda out=out: experiment.carry_out(plan, out, resume=True, **options), after=draw.uniform(0.05, 0.4)
            )
            assert_whole(tmp_path)
        experiment.carry_out(plan, out, resume=True, **options)
        assert contents(out) == contents(tmp_path / "whole")
    assert kills
    assert sorted(os.listdir(tmp_path)) == ["out-0", "out-1", "whole"]


@pytest.mark.filterwarnings("ignore:less than 10%", "ignore:nothing has a positive")
def test_every_method_is_found_again_and_not_sought_again(
    plan: Plan, model: Any, known: dict[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(plan, methods=methods.names(), settings=SETTINGS, false_alarms=(0.3,))
    options: dict[str, Any] = {"progress": False, "model": model, "known": known}
    with monkeypatch.context() as patch:
        leave_out(patch)
        experiment.carry_out(plan, tmp_path / "whole", **options)

        def first() -> None:
            experiment.Experiment.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
            experiment.carry_out(plan, tmp_path / "out", **options)

        assert child(first)
    for name in ("_prepare", "_find", "_evaluate", "curves"):
        monkeypatch.setattr(experiment.Experiment, name, lambda *_: pytest.fail("this was finished"))
    experiment.carry_out(plan, tmp_path / "out", resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    page = (tmp_path / "out" / "report.html").read_text()
    for name in ("Where neuron-adjust found the skill", "Trade-off over strengths", "How simu was trained"):
        assert name in page


@pytest.mark.usefixtures("plain")
def test_an_interrupted_run_of_another_plan_is_refused_naming_what_differs(
    plan: Plan, model: Any, known: dict[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = replace(plan, methods=("selective-pruning",), settings={"fraction": 0.1}), tmp_path / "out"
    options: dict[str, Any] = {"progress": False, "model": model, "known": known}

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment.Experiment, "report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            experiment.carry_out(plan, out, **options)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    assert len(kept) == 5
    for change, named in (
        ({"settings": {"fraction": 0.2}}, "settings: fraction=0.1 in the file, fraction=0.2 in this run"),
        ({"seed": 1}, "seed: 0 in the file, 1 in this run$"),
        ({"batch_size": 4}, "batch_size"),
        ({"methods": ("selective-pruning-attention",)}, "methods"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(
                experiment, "Experiment", lambda *_, **__: pytest.fail("the model need not be loaded for this")
            )
            with pytest.raises(ArtefactError, match=named):
                experiment.carry_out(replace(plan, **change), out, resume=True, **options)
    with tiny.quiet():
        options["model"] = tiny.build("gpt2", seed=4, tokenizer=model.tokenizer)
    with pytest.raises(ArtefactError, match="model: .* in the file"):
        experiment.carry_out(plan, out, resume=True, **options)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == kept
    options["model"] = model
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            experiment.carry_out(plan, out, resume=True, **options)
    with pytest.raises(ArtefactError, match="seed: 0 in the file, 1 in this run$"):
        experiment.carry_out(replace(plan, seed=1), out, resume=True, **options)
    assert experiment.carry_out(plan, out, resume=True, **options) is None, "all but the last step was done"
    assert not (tmp_path / "out.partial").exists()


def test_files_that_no_run_wrote_are_left_alone(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    mine = tmp_path / "out.partial" / "thesis.tex"
    mine.write_text("...")
    for resume in (False, True):
        with pytest.raises(LensUnlearnError, match="nothing that a run wrote"):
            experiment.carry_out(plan, tmp_path / "out", resume=resume, progress=False)
    assert mine.exists()


@pytest.mark.usefixtures("plain")
def test_an_error_that_would_come_again_leaves_nothing_and_a_full_disk_leaves_everything(
    plan: Plan, model: Any, known: dict[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(plan, methods=("selective-pruning",), settings={"fraction": 0.0})
    options: dict[str, Any] = {"progress": False, "model": model, "known": known}
    with pytest.raises(LensUnlearnError, match="selects nothing"):
        experiment.carry_out(plan, tmp_path / "runs" / "out", **options)
    assert not list(tmp_path.iterdir())
    plan, real = replace(plan, settings={"fraction": 0.1}), artefacts.replace_file

    def full(path: Any, data: bytes) -> None:
        if "evaluation" in str(path):
            raise ArtefactError(f"{path} cannot be written: No space left on device")
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(artefacts, "replace_file", full)
        with pytest.raises(ArtefactError, match="No space left"):
            experiment.carry_out(plan, tmp_path / "runs" / "out", **options)
    monkeypatch.setattr(experiment.Experiment, "_find", lambda *_: pytest.fail("this was finished"))
    experiment.carry_out(plan, tmp_path / "runs" / "out", resume=True, **options)


# --- the command line ------------------------------------------------------------------------------------------------

DYING = """
import os, signal, sys
from lens_unlearn import cli
from lens_unlearn.experiments import experiment
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
experiment.{name} = die
sys.argv = sys.argv[1:]
cli.main()
"""


def killed(code: str, arguments: list[object]) -> bool:
    done = subprocess.run(
        [sys.executable, "-c", code, "lens-unlearn", *map(str, arguments)],
        capture_output=True,
        timeout=300,
        check=False,
    )
    return done.returncode == -signal.SIGKILL


def test_commands_killed_in_processes_of_their_own_go_on_with_resume(
    model_dir: Path, texts_on_disk: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = run_arguments(model_dir, texts_on_disk, tmp_path / "whole")
    assert call(*arguments) == 0
    arguments[arguments.index(tmp_path / "whole")] = tmp_path / "out"
    assert killed(DYING.format(name="Experiment.report"), arguments)
    # The lock's file is left, and is free.
    assert sorted(name for name in os.listdir(tmp_path) if not name.endswith(".lock")) == ["out.partial", "whole"]
    capsys.readouterr()
    assert call(*arguments) == 2
    stderr = capsys.readouterr().err.strip()
    assert len(stderr.splitlines()) == 1
    assert "give --resume to go on" in stderr
    assert call(*arguments, "--resume", "--seed", 1) == 2
    assert "seed: 0 in the file, 1 in this run" in capsys.readouterr().err
    assert call(*arguments, "--resume") == 0
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    capsys.readouterr()
    assert call(*arguments, "--resume") == 0
    assert "finished before" in capsys.readouterr().out
    assert call(*arguments) == 2


def test_collect_killed_before_its_result_is_written_loses_nothing(
    model_dir: Path, texts_on_disk: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    arguments = ["collect", "--model", model_dir, "--corpus", texts_on_disk["forget"], "--window", 16, "--quiet"]
    assert call(*arguments, "--out", whole) == 0
    monkeypatch.setattr(collecting, "_SAVE_EVERY", 0.0)

    def until_saving() -> None:
        monkeypatch.setattr("lens_unlearn.save_moments", lambda *_: os.kill(os.getpid(), signal.SIGKILL), raising=False)
        call(*arguments, "--out", out)

    assert child(until_saving)
    monkeypatch.setattr(collecting, "backbone", lambda *_: pytest.fail("all batches were counted"))
    assert call(*arguments, "--out", out, "--resume") == 0
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["out.safetensors", "whole.safetensors"]


# --- temporary files -------------------------------------------------------------------------------------------------


def test_what_a_killed_writer_leaves_goes_with_a_later_one_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"

    def until_half() -> None:
        die_at(3)
        artefacts.replace_file(file, b"first")

    assert child(until_half)
    (left,) = tmp_path.iterdir()
    (tmp_path / ".a.safetensors.backup").write_bytes(b"mine")
    artefacts.replace_file(file, b"second")
    assert left.exists(), "it may be of somebody who is still writing"
    os.utime(left, (0, 0))
    artefacts.replace_file(tmp_path / "b.safetensors", b"another")
    assert left.exists(), "it is of another file"
    artefacts.replace_file(file, b"third")
    assert sorted(os.listdir(tmp_path)) == [".a.safetensors.backup", "a.safetensors", "b.safetensors"]
    assert file.read_bytes() == b"third"


def test_two_processes_that_write_one_file_never_mix(tmp_path: Path) -> None:
    file, sizes = tmp_path / "a.safetensors", (200_000, 300_000)

    def writing(value: int) -> None:
        for _ in range(15):
            artefacts.write(file, "test", {"x": torch.full((sizes[value],), float(value))}, {"value": value})

    running, seen = {fork(lambda value=value: writing(value)) for value in (0, 1)}, []
    while running:
        running -= {pid for pid in running if os.waitpid(pid, os.WNOHANG) != (0, 0)}
        if file.exists():
            header, tensors = artefacts.read(file)
            assert len(tensors["x"]) == sizes[header["value"]]
            seen.append(header["value"])
    assert set(seen) == {0, 1}
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_what_methods_are_fitted_to_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    for number, statistic in enumerate((Moments(extra=("sqrt",)), KeySample(7, seed=3))):
        pair = tuple(
            collect(model, tiny.corpus(seed=seed), ("mlp.post", "attn.z"), statistic=statistic, progress=False)
            for seed in (1, 2)
        )
        fitted_form().save(tmp_path / f"{number}.safetensors", pair)
        for one, again in zip(pair, fitted_form().load(tmp_path / f"{number}.safetensors"), strict=True):
            assert again.provenance == one.provenance
            assert again.state().keys() == one.state().keys()
            assert all(torch.equal(value, again.state()[key]) for key, value in one.state().items())
