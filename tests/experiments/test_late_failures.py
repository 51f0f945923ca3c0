"""What a run needs is checked before its first pass over texts; what fails later is reported, and the rest is kept."""

import html
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line_helpers import WORDS, call, run_arguments

import lens_unlearn as lu
from lens_unlearn import methods
from lens_unlearn.core.errors import CorpusError, EmptyStatisticError, LensUnlearnError, SelectionError
from lens_unlearn.experiments import documents, experiment, report_content
from lens_unlearn.experiments.experiment import Experiment, carry_out
from lens_unlearn.experiments.plan import Plan
from lens_unlearn.methods.key_space_detection import METHOD as KSD
from lens_unlearn.methods.method import Method
from lens_unlearn.neurons import collect
from lens_unlearn.neurons.collect import query_keys, query_places
from lens_unlearn.neurons.moments import Moments
from lens_unlearn.reports.comparison_page import comparison_page


@pytest.fixture
def no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at the first pass over texts."""

    def passed(*_: Any) -> None:
        raise AssertionError("texts were run")

    monkeypatch.setattr(collect, "backbone", passed)
    monkeypatch.setattr(experiment, "evaluate", passed)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what only shows."""
    monkeypatch.setattr(experiment.Content, "figures", lambda *_: {})
    monkeypatch.setattr(experiment.Content, "samples", lambda *_: [])


WORKS = {"now": True}


def breaks(model: Any, forget: Moments, retain: Moments, *, fraction: float = 0.3, how: str = "sentence") -> Any:
    if not WORKS["now"]:
        raise {"sentence": LensUnlearnError, "fault": RuntimeError}[how](f"it broke late, as a {how}")
    return lu.Ablate(forget.positive.top(fraction))


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """A method in the table that fails after its passes, until it is told to work."""
    record = Method(name="breaks-late", function=breaks, fitted_to=Moments)
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, record))
    monkeypatch.setitem(WORKS, "now", False)
    return WORKS


# --- checked before the first pass -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_pass")
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "key-space-detection.layer=7"], "there is no layer 7: this model has layers 0 to 1"),
        (["--set", "key-space-detection.vote=2"], "vote=2 needs 3 layers for a majority"),
        (["--set", "selective-pruning.fraction=0.001"], "selects nothing of 128 neurons: raise it"),
        (["--set", "selective-pruning.site=mlp.pre_linear"], "does not exist in this model"),
        (["--retain-drop", "0.1"], "too few to bound what fresh ones lose"),
        (["--answers", "3"], "no corpus has true answers"),
        (["--memorization", "3"], "no corpus has true answers"),
    ],
)  # fmt: skip
def test_what_a_method_needs_is_checked_before_the_first_pass(
    more: list[str], words: str, model_dir: Path, texts: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    several = ["--method", "selective-pruning", "--method", "key-space-detection"]
    assert call(*run_arguments(model_dir, texts, tmp_path / "out"), *several, *more) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


@pytest.mark.usefixtures("no_pass")
def test_too_few_queries_of_the_last_method_are_known_before_the_first_begins(
    model_dir: Path, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(documents, "QUERIES", 12)
    several = ["--method", "selective-pruning", "--method", "neuron-adjust", "--method", "key-space-detection"]
    assert call(*run_arguments(model_dir, texts, tmp_path / "out"), *several) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("lens-unlearn: key-space-detection: ")
    assert "queries are too few" in line
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def pairs(model: Any, count: int, tag: str) -> Any:
    rows = [{"q": f"{tag} the quick {WORDS[i % 14]} {i}", "a": "brown fox"} for i in range(count)]
    return lu.read_corpus(rows, model, field="q>a", group=3, window=32)


@pytest.mark.parametrize("region", ["box", "contrast"])
@pytest.mark.parametrize(("forget", "retain"), [(60, 60), (12, 60), (60, 6), (24, 24), (33, 15), (3, 60)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_check_of_queries_refuses_what_the_method_would(forget: int, retain: int, region: str, model: Any) -> None:
    """On the same queries, dealt out the same way: with groups, whatever their number."""
    sides = pairs(model, forget, "a"), pairs(model, retain, "b")
    sample = query_places(sides[0])
    full = query_keys(model, sides[0], progress=False)
    site = full.sites[0]
    assert sample.n == full.n
    assert torch.equal(sample.documents(sample.sites[0]), full.documents(site))

    def outcome(call: Any) -> str:
        try:
            call()
        except (CorpusError, EmptyStatisticError, LensUnlearnError) as error:
            return type(error).__name__
        return "works"

    keys = [query_keys(model, side, progress=False) for side in sides]
    options: dict[str, Any] = {"region": region, "false_alarms": 0.3, "control": False, "progress": False}
    told = outcome(lambda: KSD.require({"region": region}, model, *sides))
    done = outcome(lambda: lu.key_space_detection(model, *keys, **options))
    assert (told == "works") == (done == "works")


def test_a_function_without_a_check_needs_none(model: Any) -> None:
    Method(name="free", function=breaks, fitted_to=Moments).require({"fraction": 9}, model, None, None)


# --- what fails later --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("how", ["sentence", "fault"])
def test_a_late_failure_keeps_the_rest_is_reported_and_can_be_resumed(
    how: str, late: dict[str, bool], model_dir: Path, texts: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    several = [
        "--method",
        "selective-pruning",
        "--method",
        "breaks-late",
        "--set",
        f"how={how}",
        "--set",
        "fraction=0.3",
    ]
    arguments = [*run_arguments(model_dir, texts, tmp_path / "out"), *several]
    assert call(*arguments) == 1
    output = capsys.readouterr()
    why = f"{'' if how == 'sentence' else 'RuntimeError: '}it broke late, as a {how}"
    assert f"lens-unlearn: breaks-late failed: {why}\n" in output.err
    assert "the same command with --resume tries it again" in output.err
    assert "selective-pruning: Ablate(" in output.out
    out = tmp_path / "out"
    saved = json.loads((out / "run.json").read_text())
    assert saved["failed"] == {"breaks-late": why}
    assert saved["files"] == [
        "metrics.csv",
        "report.html",
        "report.safetensors",
        "run.json",
        "selective-pruning.safetensors",
    ]
    assert {path.name for path in out.iterdir()} == set(saved["files"])
    page = html.unescape((out / "report.html").read_text())
    assert "This run is incomplete:" in page
    assert f"failed: {why}" in page
    assert (tmp_path / "out.partial" / "selective-pruning.safetensors").exists()

    assert call(*arguments) == 2, "it is not replaced unasked"
    assert call(*arguments, "--resume") == 1, "it fails again, and nothing is lost"
    assert json.loads((out / "run.json").read_text()) == saved
    late["now"] = True
    assert call(*arguments, "--resume") == 0
    whole = json.loads((out / "run.json").read_text())
    assert "failed" not in whole
    assert "breaks-late.safetensors" in whole["files"]
    assert "This run is incomplete" not in (out / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]
    again = tmp_path / "again"
    assert call(*run_arguments(model_dir, texts, again), *several) == 0
    assert (again / "metrics.csv").read_bytes() == (out / "metrics.csv").read_bytes()
    assert call(*arguments, "--resume") == 0
    assert "finished before" in capsys.readouterr().out


@pytest.mark.usefixtures("plain", "late")
def test_where_every_method_fails_the_error_is_raised_and_nothing_is_left(
    model_dir: Path, texts: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    assert call(*run_arguments(model_dir, texts, tmp_path / "out"), "--method", "breaks-late") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "lens-unlearn: it broke late, as a sentence"
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def plan_of(model_dir: Path, texts: dict[str, Path], **changed: Any) -> Plan:
    given: dict[str, Any] = {"tokens": 300, "window": 32, "sweep": False, "controls": 1, "settings": {"fraction": 0.5}}
    return Plan(str(model_dir), f"{texts['forget']}:text", (f"{texts['retain']}:text",), **{**given, **changed})


def test_what_fails_after_the_methods_keeps_them(
    model_dir: Path, model: Any, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise LensUnlearnError("no numbers today")

    arguments = run_arguments(model_dir, texts, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "evaluate", fail)
        assert call(*arguments) == 1
    assert capsys.readouterr().err.strip() == (
        "lens-unlearn: no numbers today; the same command with --resume goes on from " + str(tmp_path / "out.partial")
    )
    assert (tmp_path / "out.partial" / "selective-pruning.safetensors").exists()
    monkeypatch.setattr(Experiment, "_find", fail)  # it was found already
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "_controls", fail)
        patch.setattr(report_content, "controls_for", fail)
        patch.setattr(experiment.Content, "samples", fail)
        assert call(*arguments, "--resume") == 1
    saved = json.loads((tmp_path / "out" / "run.json").read_text())
    assert saved["failed"] == dict.fromkeys(
        [
            "the random control of selective-pruning",
            "the texts before and after",
            "the figures of selective-pruning",
        ],
        "no numbers today",
    )
    assert "Every neuron's score" in html.unescape((tmp_path / "out" / "report.html").read_text())
    assert call(*arguments, "--resume") == 0
    assert "selective-pruning:control" in (tmp_path / "out" / "metrics.csv").read_text()


def test_of_several_processes_all_end(
    model_dir: Path, model: Any, texts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Experiment(plan_of(model_dir, texts), model, progress=False)
    monkeypatch.setattr(experiment.distributed, "count", lambda: 2)
    with pytest.raises(SelectionError, match="mine"), run.going_on("a method"):
        raise SelectionError("mine")
    assert not run.failed


@pytest.mark.usefixtures("plain", "late")
def test_a_comparison_goes_on_without_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(record: Any, model: Any, *fitted: Any, **_: Any) -> Any:
        edit = record.at(model, fitted, 0.3, {})
        return SimpleNamespace(intervention=edit, fraction=0.3, report=None, to_dict=dict)

    monkeypatch.setattr(documents, "TUNED_ON", 12)
    monkeypatch.setattr(experiment, "tune", at_once)
    demo = lu.load_model("demo")
    skills = {name: lu.read_corpus(f"demo:{name}", demo, tokens=5000) for name in ("arithmetic", "esperanto")}
    options: dict[str, Any] = {"tokens": 60, "retain_drop": 0.3, "controls": 1, "progress": False}
    found = lu.compare(demo, skills, ("selective-pruning", "breaks-late"), **options)
    why = "forgetting {0} by breaks-late: it broke late, as a sentence"
    assert found.provenance["failed"] == {f"forgetting {s}, breaks-late": why.format(s) for s in skills}
    for part in (found, *found.parts):
        assert part.conditions == ["base", "selective-pruning", "selective-pruning:control"]
    assert set(found.figures) == {"frontier", "matrix"}
    page = html.unescape(comparison_page(found))
    assert "This run is incomplete:" in page
    assert why.format("esperanto") in page


def test_a_plan_with_what_fails_returns_its_report(
    late: dict[str, bool], model_dir: Path, model: Any, texts: dict[str, Path], tmp_path: Path, plain: None
) -> None:
    plan = plan_of(model_dir, texts, methods=("breaks-late", "selective-pruning"))
    done = carry_out(plan, tmp_path / "out", model=model, progress=False)
    assert done is not None
    assert set(done[0].failed) == {"breaks-late"}
    assert done[1].conditions == ["base", "selective-pruning", "selective-pruning:control"]
