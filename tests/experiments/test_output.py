"""Outputs: one process at a time, written to before a model is loaded, and replaced only where a run wrote every file."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line_helpers import call, run_arguments

import lens_unlearn as lu
from lens_unlearn.core.errors import ArtefactError, LensUnlearnError
from lens_unlearn.experiments import compare, demo_report, experiment
from lens_unlearn.experiments.experiment import carry_out
from lens_unlearn.experiments.output import (
    check_folder,
    files_of_run,
    new_folder,
    put_in_place,
    reserved,
    strangers,
    write_settings,
)
from lens_unlearn.experiments.plan import Plan
from lens_unlearn.model.host import versions

DATA = Path(__file__).parents[1] / "data"


def refuse_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a model is to be loaded."""

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was to be loaded")

    for room in (lu, experiment, compare, demo_report):
        monkeypatch.setattr(room, "load_model", load, raising=False)


def a_run(folder: Path, files: tuple[str, ...] = ("report.html", "a/edit.safetensors"), **content: Any) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the run's {name}")
    write_settings(folder, {"versions": versions(), **content}, files)
    return folder


def everything(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes().decode("latin-1")
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


# --- held by one ---------------------------------------------------------------------------------------------------------


def _hold(out: str, held: Any, done: Any) -> None:
    with reserved(out):
        held.set()
        done.wait(60)


@pytest.fixture
def held_elsewhere(tmp_path: Path) -> Iterator[Path]:
    """An output that another process holds."""
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path / "out.safetensors"), held, done))
    process.start()
    assert held.wait(60)
    yield tmp_path / "out.safetensors"
    done.set()
    process.join()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_second_process_is_refused_from_the_first_second(
    held_elsewhere: Path, model_dir: Path, texts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    refuse_to_load(monkeypatch)
    source = f"{texts['forget']}:text"
    commands: list[list[object]] = [
        [*run_arguments(model_dir, texts, held_elsewhere)],
        [*run_arguments(model_dir, texts, held_elsewhere), "--resume"],
        [*run_arguments(model_dir, texts, held_elsewhere), "--overwrite"],
        ["compare", "--model", "x", "--skill", f"a={source}", "--skill", f"b={source}", "--out", held_elsewhere],
        ["evaluate", "--model", "x", "--corpus", f"a={source}", "--out", held_elsewhere],
        ["collect", "--model", "x", "--corpus", source, "--out", held_elsewhere],
        ["demo", "--out", held_elsewhere],
    ]
    for command in commands:
        assert call(*command) == 2, command[0]
        [line] = capsys.readouterr().err.strip().splitlines()
        assert line.endswith("is being written by another process: wait for its end, or give another --out")
    assert not held_elsewhere.exists()


def test_whoever_ends_gives_the_output_free_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deeper" / "out"
    with pytest.raises(ZeroDivisionError), reserved(out):
        1 / (not out.parent.is_dir())  # the folder is there, so this is 1 / 0
    assert not list(tmp_path.iterdir())
    with reserved(out):
        out.mkdir()
    with reserved(out), pytest.raises(LensUnlearnError, match="is being written by another process"), reserved(out):
        pass
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def nowhere(tmp_path: Path) -> list[Path]:
    """Places where nothing can be written, also by root."""
    (tmp_path / "file").write_text("")
    return [tmp_path / "file" / "out.safetensors", tmp_path / ("x" * 300 + ".safetensors")]


def test_an_output_that_cannot_be_written_is_said_before_a_model_is_loaded(
    model_dir: Path, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    refuse_to_load(monkeypatch)
    source = f"{texts['forget']}:text"
    for out in nowhere(tmp_path):
        before = sorted(os.listdir(tmp_path))
        for command in (
            run_arguments(model_dir, texts, out),
            ["compare", "--model", "x", "--skill", f"a={source}", "--skill", f"b={source}", "--out", out],
            ["evaluate", "--model", "x", "--corpus", f"a={source}", "--out", out],
            ["collect", "--model", "x", "--corpus", source, "--out", out],
            ["demo", "--out", out],
        ):
            assert call(*command) == 2, command[0]
            [line] = capsys.readouterr().err.strip().splitlines()
            assert "cannot be written: " in line
        assert sorted(os.listdir(tmp_path)) == before


# --- replaced only where a run wrote every file ---------------------------------------------------------------------------


def test_overwriting_removes_what_the_run_lists_and_nothing_else(tmp_path: Path) -> None:
    out = a_run(tmp_path / "out")
    with new_folder(out, overwrite=True) as work:
        a_run(work, ("report.html",), second=True)
    assert set(everything(out)) == {"report.html", "run.json"}
    assert json.loads((out / "run.json").read_text())["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "mine", ["notes.txt", "mine.safetensors", "a/data.csv", ".hidden", "new/deep/x", "metrics.csv"]
)
def test_a_folder_with_files_of_ones_own_is_not_replaced(mine: str, tmp_path: Path) -> None:
    out = a_run(tmp_path / "out")
    (out / mine).parent.mkdir(parents=True, exist_ok=True)
    (out / mine).write_text("mine")
    before = everything(out)
    with (
        pytest.raises(LensUnlearnError, match=r"holds files besides those of its run \(.*\): move them, or give"),
        new_folder(out, overwrite=True),
    ):
        pass
    with pytest.raises(LensUnlearnError, match="holds another run: give another --out, or --overwrite"):
        check_folder(out, overwrite=False)
    assert everything(out) == before


@pytest.mark.parametrize(
    "settings",
    ["", "{}", "[]", "3", "not json", '{"versions": {}}', '{"plan": {"methods": ["x"]}}', "[" * 100_000],
    ids=lambda text: text[:20],
)
def test_a_run_json_of_ones_own_makes_no_run(settings: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(settings)
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(LensUnlearnError, match="holds files that no run wrote"):
            check_folder(tmp_path / "out", overwrite=overwrite)
    assert files_of_run(tmp_path / "out") is None


@pytest.mark.parametrize(
    "listed", [["../mine"], ["/etc/passwd"], ["a/../../mine"], ["C:x"], [3], "run.json", None, [""], ["."]]
)
def test_a_list_that_leads_elsewhere_is_no_list(listed: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(json.dumps({"versions": versions(), "files": listed}))
    with pytest.raises(LensUnlearnError, match="holds files that no run wrote"):
        check_folder(tmp_path / "out", overwrite=True)
    assert (tmp_path / "mine").exists()


def test_links_are_nobodys_files(tmp_path: Path) -> None:
    out, mine = a_run(tmp_path / "out"), tmp_path / "mine"
    mine.mkdir()
    (mine / "edit.safetensors").write_text("mine")
    shutil.rmtree(out / "a")
    (out / "a").symlink_to(mine)
    assert strangers(out, files_of_run(out) or ()) == ["a"]
    with pytest.raises(LensUnlearnError, match=r"besides those of its run \(a\)"):
        check_folder(out, overwrite=True)
    work = a_run(tmp_path / "work")
    put_in_place(work, out)  # had it come in meanwhile: the link stays one, and what it leads to is untouched
    assert (mine / "edit.safetensors").read_text() == "mine"
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(LensUnlearnError, match="is not a folder"):
        check_folder(tmp_path / "link", overwrite=True)


def test_a_file_that_comes_in_at_the_last_moment_is_kept(tmp_path: Path) -> None:
    out = a_run(tmp_path / "out")
    with new_folder(out, overwrite=True) as work:
        a_run(work, ("report.html",))
        (out / "new" / "x").parent.mkdir()
        (out / "new" / "x").write_text("mine")
        (out / "note.txt").write_text("mine")
    assert {name: text for name, text in everything(out).items() if text == "mine"} == {
        "new/x": "mine",
        "note.txt": "mine",
    }
    assert set(everything(out)) == {"new/x", "note.txt", "report.html", "run.json"}


def test_a_run_of_an_earlier_version_goes_by_the_names_that_it_gave(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(DATA / "finished-run", out)
    names = [
        "report.html",
        "metrics.csv",
        "run.json",
        "selective-pruning.safetensors",
        "key-space-detection.safetensors",
    ]
    assert files_of_run(out) == names
    check_folder(out, overwrite=True)
    (out / "other.safetensors").write_text("mine")
    with pytest.raises(LensUnlearnError, match=r"\(other\.safetensors\)"):
        check_folder(out, overwrite=True)
    settings = {"versions": versions(), "skills": ["a", "../b"], "methods": ["simu"]}
    (out / "run.json").write_text(json.dumps(settings))
    assert files_of_run(out) is None
    (out / "run.json").write_text(json.dumps(settings | {"skills": ["a", "b"]}))
    assert files_of_run(out) == ["compare.html", "matrix.csv", "run.json", "a/simu.safetensors", "b/simu.safetensors"]
    (out / "run.json").write_text(json.dumps({"versions": versions(), "command": "lens-unlearn demo --tokens 9"}))
    assert {"the-other-way-round/report.html", "persons/simu.safetensors"} <= set(files_of_run(out) or ())


# --- finished, and of what -----------------------------------------------------------------------------------------------


def plan_of(model_dir: Path, texts: dict[str, Path], **changed: Any) -> Plan:
    given: dict[str, Any] = {"tokens": 300, "window": 32, "sweep": False, "controls": 1, "settings": {"fraction": 0.5}}
    return Plan(str(model_dir), f"{texts['forget']}:text", (f"{texts['retain']}:text",), **{**given, **changed})


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what only shows."""
    monkeypatch.setattr(experiment.Content, "figures", lambda *_: {})
    monkeypatch.setattr(experiment.Content, "samples", lambda *_: [])


@pytest.mark.usefixtures("plain")
def test_a_run_is_finished_only_with_its_files_its_plan_and_its_texts(
    model_dir: Path, model: Any, texts: dict[str, Path], tmp_path: Path
) -> None:
    plan, out = plan_of(model_dir, texts), tmp_path / "out"
    options: dict[str, Any] = {"model": model, "progress": False}
    assert carry_out(plan, out, **options) is not None
    listed = json.loads((out / "run.json").read_text())["files"]
    assert listed == ["metrics.csv", "report.html", "report.safetensors", "run.json", "selective-pruning.safetensors"]
    assert carry_out(plan, out, resume=True, **options) is None
    for name in listed[:2]:
        (out / name).rename(tmp_path / name)
        with pytest.raises(LensUnlearnError, match=rf"lacks {name}, which its run wrote: give --overwrite"):
            carry_out(plan, out, resume=True, **options)
        (tmp_path / name).rename(out / name)
    with pytest.raises(LensUnlearnError, match="holds another run"):
        carry_out(plan_of(model_dir, texts, settings={"fraction": 0.05}), out, resume=True, **options)
    source = texts["retain"].read_text()
    texts["retain"].write_text(source.replace("the", "then"))
    before = everything(out)
    with pytest.raises(ArtefactError, match=r"does not belong to this run: fit retain: .*; give --overwrite"):
        carry_out(plan, out, resume=True, **options)
    assert everything(out) == before
    texts["retain"].write_text(source)
    assert carry_out(plan, out, resume=True, **options) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]


@pytest.mark.usefixtures("plain")
def test_what_was_found_with_other_options_is_not_gone_on_with(
    model_dir: Path, model: Any, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of a plan with fraction 0.05 is never taken for that of one with 0.5."""
    options: dict[str, Any] = {"model": model, "progress": False}
    carry_out(plan_of(model_dir, texts, settings={"fraction": 0.05}), tmp_path / "other", **options)

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            carry_out(plan_of(model_dir, texts), tmp_path / "out", **options)
    name = "selective-pruning.safetensors"
    shutil.copy(tmp_path / "other" / name, tmp_path / "out.partial" / name)
    with pytest.raises(ArtefactError, match=r"fraction=0\.05 there, 0\.5 in this run"):
        carry_out(plan_of(model_dir, texts), tmp_path / "out", resume=True, **options)


def test_every_command_lists_what_it_wrote(model_dir: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "evaluated"
    arguments = ["evaluate", "--model", model_dir, "--corpus", f"a={texts['retain']}:text", "--window", 32, "--quiet"]
    assert call(*arguments, "--tokens", 100, "--out", out) == 0
    assert files_of_run(out) == ["metrics.csv", "report.html", "report.safetensors", "run.json"]
    assert not strangers(out, files_of_run(out) or ())
    (out / "mine.txt").write_text("mine")
    assert call(*arguments, "--tokens", 100, "--out", out, "--overwrite") == 2
    assert (out / "mine.txt").exists()
