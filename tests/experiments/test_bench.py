"""`lens-unlearn bench`: every file checked before a model is loaded, a folder whole or absent, and resumable after a kill."""

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from benchmark_helpers import lume_scores, write_effective, write_lines, write_lume, write_tofu
from command_line_helpers import call

import lens_unlearn as lu
from lens_unlearn.benchmarks.asking import Asker
from lens_unlearn.experiments import bench

FILES = ["bench.html", "generations.jsonl", "losses.csv", "run.json", "scores.csv", "selective-pruning.safetensors"]


@pytest.fixture
def arguments(tmp_path: Path, model_dir: Path) -> list[Any]:
    folder = write_lume(tmp_path / "lume", 2)
    given = ["bench", "lume", "--model", model_dir, "--data", folder, "--rows", 2, "--quiet"]
    return [*given, "--option", "max_new_tokens=4", "--method", "selective-pruning", "--set", "fraction=0.2"]


def test_a_folder_holds_base_method_control_and_reference(
    arguments: list[Any], model_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    assert call(*arguments, "--reference", model_dir, "--out", out) == 0
    assert sorted(os.listdir(out)) == FILES
    assert not (tmp_path / "out.partial").exists()
    scores = pd.read_csv(out / "scores.csv").set_index(["condition", "metric"])["value"]
    conditions = ["base", "selective-pruning", "selective-pruning:control", "reference"]
    assert list(dict.fromkeys(scores.index.get_level_values(0))) == conditions
    texts = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    for condition in conditions:
        own = [row for row in texts if row["condition"] == condition]
        for name, value in lume_scores(own).items():
            assert scores[condition, name] == pytest.approx(value, abs=1e-9)
    assert "task_aggregate" in capsys.readouterr().out
    page = (out / "bench.html").read_text()
    assert page.index("harmonic mean of the twelve parts") < page.index("task1_forget_knowledge")
    settings = json.loads((out / "run.json").read_text())
    assert settings["plan"]["benchmark"] == "lume"
    assert sorted(settings["files"]) == FILES


def test_a_run_that_was_killed_goes_on_to_the_same_numbers(
    arguments: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call(*arguments, "--out", whole) == 0
    asked: list[str] = []
    write = Asker.write

    def killed(self: Asker, *given: Any, **options: Any) -> Any:
        asked.append(self.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return write(self, *given, **options)

    monkeypatch.setattr(Asker, "write", killed)
    assert call(*arguments, "--out", out) == 130
    assert not out.exists()
    assert call(*arguments, "--out", out) == 2
    assert call(*arguments, "--out", out, "--resume", "--seed", 1) == 2
    assert call(*arguments, "--out", out, "--resume") == 0
    assert asked == ["base", "selective-pruning", "selective-pruning", "selective-pruning:control"]
    for name in ("scores.csv", "generations.jsonl", "losses.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert call(*arguments, "--out", out, "--resume") == 0
    assert len(asked) == 4
    assert call(*arguments, "--out", out) == 2


WRONG: dict[str, tuple[list[Any], str]] = {
    "a benchmark": (["nothing"], "there is no benchmark 'nothing'"),
    "a reference": (["lume", "--reference", "/nowhere/at/all"], "there is no reference model /nowhere/at/all"),
    "a file": (["lume", "--intervention", "nowhere.safetensors"], "there is no intervention file nowhere.safetensors"),
    "an option": (["lume", "--option", "shots=5"], "lume has no option 'shots'"),
    "an option of methods": (
        ["lume", "--method", "simu", "--set", "shots=5"],
        "no method of this run has such an option",
    ),
    "a method": (["lume", "--method", "none"], "'none'"),
    "rows": (["lume", "--rows", 0], "rows=0"),
    "a method twice": (["lume", "--method", "simu", "--method", "simu"], "'simu' would name two conditions"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_before_the_model_is_loaded(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(bench, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    (name, *rest), message = WRONG[what]
    folder = write_lume(tmp_path / "lume", 1)
    assert call("bench", name, "--model", "m", "--data", folder, "--out", tmp_path / "out", *rest) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lume"]


def test_a_wrong_column_and_a_missing_split_are_said_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(bench, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    given = ["bench", "lume", "--model", "m", "--data", tmp_path / "lume", "--out", tmp_path / "out"]
    write_lume(tmp_path / "lume", 1)
    write_lines(tmp_path / "lume" / "retain.jsonl", [{"id": "asc1", "prompt": "x", "output": "y", "task": "Task1"}])
    assert call(*given) == 2
    assert (
        "has no column 'input': lume needs id, input, output, task, and it has id, prompt, output, task"
        in capsys.readouterr().err
    )
    (tmp_path / "lume" / "retain.jsonl").unlink()
    assert call(*given) == 2
    assert "lume needs retain.jsonl" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lume"]


def test_a_saved_intervention_is_a_condition_with_its_control(model: Any, model_dir: Path, tmp_path: Path) -> None:
    edit = lu.random_pruning(model, fraction=0.2, seed=1)
    edit.save(tmp_path / "mine.safetensors", model)
    folder = write_lume(tmp_path / "lume", 1)
    given = ["bench", "lume", "--model", model_dir, "--data", folder, "--out", tmp_path / "out", "--quiet"]
    assert (
        call(*given, "--intervention", tmp_path / "mine.safetensors", "--option", "max_new_tokens=3", "--controls", 2)
        == 0
    )
    scores = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert set(scores["condition"]) == {"base", "mine", "mine:control"}


@pytest.mark.parametrize(
    "given", [["--template", r"Q: {prompt}\nA: {answer}"], ["--option", r"template=Q: {prompt}\nA: {answer}"]]
)
def test_questions_are_asked_as_methods_are_fitted_to_them(
    given: list[str], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    read: list[str] = []
    inner = bench.read_corpus
    monkeypatch.setattr(bench, "read_corpus", lambda *a, **o: (read.append(o["template"]), inner(*a, **o))[1])
    folder = write_tofu(tmp_path / "tofu")
    arguments = ["bench", "tofu", "--model", model_dir, "--data", folder, "--rows", 2, "--quiet", "--controls", 0]
    arguments += ["--option", "max_new_tokens=2", "--option", "answer_eos=false"]
    arguments += ["--method", "selective-pruning", "--set", "fraction=0.2"]
    assert call(*arguments, *given, "--out", tmp_path / "out") == 0
    texts = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    assert texts
    assert all(row["prompt"].startswith("Q: ") and row["prompt"].endswith("\nA:") for row in texts)
    assert set(read) == {"Q: {prompt}\nA: {answer}"}
    both = ["--template", "a {prompt} {answer}", "--option", "template=b {prompt} {answer}"]
    assert call(*arguments, *both, "--out", tmp_path / "both") == 2
    assert "are the same: give one of them" in capsys.readouterr().err
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize("name", ["selective-pruning", "effective-skill"])
def test_benchmarks_of_the_methods_papers_are_fitted_to_what_they_do_not_measure(
    name: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, int] = {}
    inner = bench.read_corpus
    monkeypatch.setattr(
        bench, "read_corpus", lambda rows, *a, **o: (read.update({o["name"]: len(rows)}), inner(rows, *a, **o))[1]
    )
    folder = tmp_path / "data"
    given = [
        "bench",
        name,
        "--model",
        model_dir,
        "--data",
        folder,
        "--rows",
        2,
        "--quiet",
        "--method",
        "selective-pruning",
    ]
    given += ["--set", "fraction=0.2", "--out", tmp_path / "out"]
    if name == "selective-pruning":
        for side, text in (("forget", "def add(a, b):"), ("retain", "the quick brown fox")):
            write_lines(folder / f"{side}.jsonl", [{"text": f"{text} {n}"} for n in range(6)])
        expected, official = {f"{name} forget": 3, f"{name} retain": 3}, "forget_top1"
    else:
        write_effective(folder, 4)
        given += ["--option", "shots=0", "--option", "max_new_tokens=3", "--option", "allow_code_execution=true"]
        expected, official = {f"{name} forget": 4, f"{name} retain": 4 + 2 + 2}, "forget_left"
    assert call(*given) == 0
    assert read == expected
    scores = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert list(dict.fromkeys(scores["condition"])) == ["base", "selective-pruning", "selective-pruning:control"]
    assert scores["metric"].iloc[0] == official
    assert official in (tmp_path / "out" / "bench.html").read_text()
