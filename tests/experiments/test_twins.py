"""Python and the command line are twins: `lu.run`, `lu.load_report` and `lu.diff` beside `lens-unlearn run` and `diff`."""

import dataclasses
import html
import inspect
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from command_line_helpers import WORDS, call, write_texts

import lens_unlearn as lu
from lens_unlearn.core import artefacts
from lens_unlearn.evaluation.report import Measure, Report
from lens_unlearn.experiments import experiment, report_file, running
from lens_unlearn.experiments.plan import Plan

OLDER = Path(__file__).parents[1] / "data" / "finished-run"
NEXT: dict[str, Any] = {"window": 32, "tokens": 600, "sweep": False, "controls": 2, "progress": False}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    forget = write_texts(folder / "forget.jsonl", 1, count=50, words=[word[::-1] for word in WORDS])
    return {"forget": f"{forget}:text", "retain": f"{write_texts(folder / 'retain.jsonl', 2, count=50)}:text"}


@pytest.fixture(scope="module")
def runs(
    sources: dict[str, str], loaded: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Report]]:
    """Two runs on one model, of which the second selects more; each with its report."""
    folder = tmp_path_factory.mktemp("runs")
    done = {}
    for name, settings in {"small": {"fraction": 0.1}, "large": {"fraction": 0.2}}.items():
        report = lu.run(loaded, sources["forget"], sources["retain"], folder / name, settings=settings, **NEXT)
        done[name] = (folder / name, report)
    return done


def test_run_takes_whatever_a_plan_has() -> None:
    signature = inspect.signature(lu.run).parameters
    fields = {one.name: one for one in dataclasses.fields(Plan)}
    assert set(fields) == set(signature) - {"out", "track", "resume", "overwrite", "progress"}
    for name, one in fields.items():
        if one.default is not dataclasses.MISSING:
            assert signature[name].default == one.default, name


def test_run_in_python_is_the_command(
    runs: dict[str, tuple[Path, Report]], sources: dict[str, str], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, report = runs["small"]
    again = lu.run(model, sources["forget"], [sources["retain"]], out, settings={"fraction": 0.1}, resume=True, **NEXT)
    pd.testing.assert_frame_equal(again.to_frame(), report.to_frame())
    with pytest.raises(lu.LensUnlearnError, match="holds another run"):
        lu.run(model, sources["forget"], sources["retain"], out, **NEXT)
    asked: list[Any] = []
    monkeypatch.setattr(experiment, "carry_out", lambda plan, *_, **__: asked.append(plan))
    monkeypatch.setattr(running, "carry_out", lambda plan, *_, **__: asked.append(plan) or (None, report))
    lu.run("demo", "a", ["b", "c"], "out", also={"d": "e"}, methods="simu", settings={"lr": 0.1}, device="cpu", **NEXT)
    arguments = [
        "--forget",
        "a",
        "--retain",
        "b",
        "--retain",
        "c",
        "--also",
        "d=e",
        "--method",
        "simu",
        "--set",
        "lr=0.1",
    ]
    arguments += [
        "--device",
        "cpu",
        "--tokens",
        "600",
        "--window",
        "32",
        "--control-seeds",
        "2",
        "--no-sweep",
        "--quiet",
    ]
    assert call("run", "--model", "demo", *arguments, "--out", "out") == 0
    assert asked[0] == asked[1]


def test_what_failed_is_warned_of(runs: dict[str, tuple[Path, Report]], monkeypatch: pytest.MonkeyPatch) -> None:
    report = dataclasses.replace(runs["small"][1], provenance={"failed": {"the figures": "no ink"}})
    monkeypatch.setattr(running, "carry_out", lambda *_, **__: (None, report))
    with pytest.warns(RuntimeWarning, match="the figures failed: no ink; the rest is in the report"):
        assert lu.run("demo", "a", "b", "out") is report


def test_a_report_comes_back_whole(runs: dict[str, tuple[Path, Report]], model: Any, tmp_path: Path) -> None:
    out, report = runs["small"]
    loaded = lu.load_report(out)
    pd.testing.assert_frame_equal(loaded.to_frame(), report.to_frame())
    pd.testing.assert_frame_equal(pd.read_csv(out / "metrics.csv"), loaded.to_frame(), rtol=1e-12)
    keys = [(condition, "forget", "loss") for condition in ("selective-pruning", "base")]
    assert loaded[keys[0]].minus(loaded[keys[1]]).interval() == report[keys[0]].minus(report[keys[1]]).interval()
    assert loaded.samples == report.samples
    drawn = [title for title in report.figures if not title.startswith("Token by token")]
    assert list(loaded.figures) == drawn
    for title, figure in loaded.figures.items():
        before = report.figures[title]  # whose arrays a file holds as lists
        assert (len(figure.data), figure.layout.meta) == (len(before.data), before.layout.meta)
        assert figure.layout.title.text == before.layout.title.text
    loaded.to_html(tmp_path / "again.html")
    page = html.unescape((tmp_path / "again.html").read_text())
    assert all(title in page for title in drawn)
    found = lu.load_intervention(out / "selective-pruning.safetensors", model)
    assert torch.equal(loaded.interventions["selective-pruning"].selection.flat(), found.selection.flat())  # type: ignore[attr-defined]
    assert repr(report.interventions["selective-pruning"]) == repr(found)


def test_what_the_other_commands_write_comes_back(model_dir: Path, sources: dict[str, str], tmp_path: Path) -> None:
    arguments = ["--model", model_dir, "--window", 32, "--tokens", 300, "--quiet"]
    assert call("evaluate", *arguments, "--corpus", f"a={sources['forget']}", "--out", tmp_path / "measured") == 0
    assert lu.load_report(tmp_path / "measured").corpora == ["a"]
    for page, words in (("bench.html", "holds a benchmark"), ("audit.html", "holds an audit")):
        folder = tmp_path / page
        folder.mkdir()
        (folder / "run.json").write_text(
            json.dumps({"versions": {"lens_unlearn": "0.1.0"}, "files": [page, "run.json"]})
        )
        with pytest.raises(lu.LensUnlearnError, match=words):
            lu.load_report(folder)
    for place, words in ((tmp_path / "nowhere", "there is no folder"), (tmp_path, "holds no finished run")):
        with pytest.raises(lu.ArtefactError, match=words):
            lu.load_report(place)


def test_a_report_with_parts_and_single_values_comes_back(tmp_path: Path) -> None:
    def small(seed: int, **more: Any) -> Report:
        draws = np.random.default_rng(seed).random(20)
        keys = [("base", "forget", "top1"), ("edit", "forget", "top1")]
        measures = {key: Measure(float(draws[0]), draws, 30, 12, 2, spread=draws - 0.5) for key in keys}
        return Report(measures, {"seed": seed}, values={keys[0]: np.arange(6.0).reshape(2, 3)}, **more)

    samples = [{"corpus": "forget", "prompt": "a", "base": "b", "withheld": ["edit"]}]
    whole = small(1, title="One", samples=samples, parts=(small(2, title="Two", parts=(small(3),)),))
    report_file.save_report(tmp_path / "report.safetensors", whole)
    again = report_file.read_report(tmp_path / "report.safetensors")
    for one, other in (
        (whole, again),
        (whole.parts[0], again.parts[0]),
        (whole.parts[0].parts[0], again.parts[0].parts[0]),
    ):
        pd.testing.assert_frame_equal(one.to_frame(), other.to_frame())
        assert (one.title, one.samples, one.provenance) == (other.title, other.samples, other.provenance)
        [(key, values)] = one.values.items()
        assert np.array_equal(other.values[key], values)
        assert np.array_equal(other["edit", "forget", "top1"].spread, one["edit", "forget", "top1"].spread)


@pytest.mark.parametrize("damage", ["surplus", "missing", "bomb", "no figure", "deep"])
def test_a_damaged_report_is_refused(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.safetensors"
    content: dict[str, Any] = {
        "measures": [["base", "a", "top1", 0.5, 3]],
        "values": [],
        "provenance": {},
        "samples": [],
    }
    tensors = {"draws/0": torch.linspace(0, 1, 20, dtype=torch.float64)}
    if damage == "surplus":
        tensors["draws/1"] = tensors["draws/0"]
    elif damage == "missing":
        tensors = {}
    elif damage in ("bomb", "no figure"):
        monkeypatch.setattr(report_file, "LARGEST", 1000)
        packed = zlib.compress(b" " * 5000) if damage == "bomb" else b"nothing that was packed"
        tensors["figures/0"] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        content["figures"] = ["One"]
    else:
        for _ in range(6):
            content = {"measures": [], "values": [], "provenance": {}, "samples": [], "parts": [content]}
    artefacts.write(path, "report", tensors, {"report": json.dumps(content)})
    with pytest.raises(lu.ArtefactError, match="report"):
        report_file.read_report(path)


def older(folder: Path = OLDER) -> Report:
    with pytest.warns(UserWarning, match="earlier version") as caught:
        report = lu.load_report(folder)
    assert any(
        "did not keep the draws behind its intervals, its figures and its samples" in str(one.message) for one in caught
    )
    return report


def test_a_folder_of_an_earlier_version_is_its_table_and_says_what_is_missing(tmp_path: Path) -> None:
    report = older()
    table = pd.read_csv(OLDER / "metrics.csv")
    pd.testing.assert_frame_equal(report.to_frame(), table)
    row = table.set_index(["condition", "corpus", "metric"]).loc[("selective-pruning", "forget", "top1")]
    measure = report["selective-pruning", "forget", "top1"]
    assert (measure.value, *measure.interval(), measure.n) == (row.value, row.low, row.high, row.n)
    assert np.isnan(report.drop("selective-pruning", "forget").interval()).all(), "not to be known without the draws"
    assert set(report.interventions) == {"selective-pruning", "key-space-detection"}
    report.to_html(tmp_path / "page.html")
    assert "selective-pruning" in (tmp_path / "page.html").read_text()
    shutil.copytree(OLDER, tmp_path / "damaged")
    (tmp_path / "damaged" / "metrics.csv").write_text("condition,corpus\nbase,forget\n")
    with pytest.raises(lu.ArtefactError, match="no table of a run"):
        lu.load_report(tmp_path / "damaged")


def test_two_runs_side_by_side(
    runs: dict[str, tuple[Path, Report]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small, one), (large, other) = runs["small"], runs["large"]
    found = lu.diff(small, large)
    changed = found.plan.set_index("setting")
    assert list(changed.loc["settings.fraction"]) == [0.1, 0.2]
    assert not any(name.startswith(("versions", "fingerprint", "tested on")) for name in changed.index)
    [overall] = found.selections[found.selections.site == "all"].to_dict("records")
    first, second = (report.interventions["selective-pruning"].selection.flat() for report in (one, other))  # type: ignore[attr-defined]
    assert (overall["a"], overall["b"]) == (int(first.sum()), int(second.sum()))
    assert overall["jaccard"] == int((first & second).sum()) / int((first | second).sum())
    key = ("selective-pruning", "forget", "top1")
    row = found.measures.set_index(["condition", "corpus", "metric"]).loc[key]
    paired = other[key].minus(one[key])
    assert (row.difference, row.low, row.high, row.how) == (paired.value, *paired.interval(), "paired")
    assert lu.diff(one, other).measures.equals(found.measures), "reports are as good as folders"
    assert set(lu.diff(one, one).measures.difference.dropna()) == {0.0}
    assert len(lu.diff(one, one).plan) == 0

    capsys.readouterr()
    assert call("diff", small, large, "--out", tmp_path / "diff.html") == 0
    text = capsys.readouterr().out
    assert "settings.fraction" in text
    assert "paired" in text
    page = (tmp_path / "diff.html").read_text()
    assert all(
        words in page for words in ("settings.fraction", "Jaccard index", "paired over them", "Overlap of selections")
    )
    assert "unpaired" not in page.partition("<h2>")[0].partition("<h1>")[2]
    assert call("diff", small, large, "--out", tmp_path / "diff.html") == 2
    assert call("diff", small, large, "--out", tmp_path / "diff.csv") == 0
    assert len(pd.read_csv(tmp_path / "diff.csv")) == len(found.measures)
    assert call("diff", small, tmp_path / "nowhere") == 2
    assert found._repr_html_()


def test_where_documents_differ_intervals_are_unpaired_and_say_so(
    runs: dict[str, tuple[Path, Report]], tmp_path: Path
) -> None:
    one, key = runs["small"][1], ("base", "forget", "loss")
    corpora = {name: {**about, "fingerprint": "another"} for name, about in one.provenance["corpora"].items()}
    other = dataclasses.replace(one, provenance={**one.provenance, "corpora": corpora})
    resampled = dataclasses.replace(one, provenance={**one.provenance, "bootstrap": {"resamples": 1000, "seed": 7}})
    for alike in (other, resampled):
        found = lu.diff(one, alike)
        assert set(found.measures.how) == {"unpaired"}
        row = found.measures.set_index(["condition", "corpus", "metric"]).loc[key]
        assert (row.high - row.low) / (2 * 1.96) == pytest.approx(np.sqrt(2 * np.var(one[key].draws)), rel=0.2)
    found = lu.diff(one, other)
    assert "tested on.forget.fingerprint" in set(found.plan.setting)
    found.to_html(tmp_path / "diff.html")
    assert "two independent samples" in (tmp_path / "diff.html").read_text()


def test_where_a_run_kept_no_draws_there_is_no_interval_and_of_two_models_no_overlap(
    runs: dict[str, tuple[Path, Report]],
) -> None:
    found = lu.diff(runs["small"][1], older())
    assert set(found.measures.how) <= {"no interval", ""}
    assert len(found.selections) == 0
    row = found.measures.set_index(["condition", "corpus", "metric"]).loc[("base", "forget", "top1")]
    assert row.how == "no interval"
    assert not np.isnan(row.difference)
    assert np.isnan(row.low)
    assert str(found)
    with pytest.raises(lu.LensUnlearnError, match="measured nothing that could be compared"):
        lu.diff(runs["small"][1], Report({}))
    with pytest.raises(lu.LensUnlearnError, match="a int is no run"):
        lu.diff(runs["small"][1], 3)  # type: ignore[arg-type]
