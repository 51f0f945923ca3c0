"""The command line: what it writes, and that bad input ends with one sentence, exit code 2, and nothing left behind."""

import html
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from command_line_helpers import WORDS, call, run_arguments, write_texts

import lens_unlearn as lu
from lens_unlearn.core import artefacts
from lens_unlearn.core.errors import BudgetError
from lens_unlearn.experiments import compare, experiment
from lens_unlearn.experiments.plan import Plan, command_of, settings_of


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    return {
        "forget": write_texts(tmp_path / "forget.jsonl", 1, words=[word[::-1] for word in WORDS]),
        "retain": write_texts(tmp_path / "retain.jsonl", 2),
        "third": write_texts(tmp_path / "third.jsonl", 3),
    }


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    output = capsys.readouterr().out
    assert all(
        command in output
        for command in (
            "demo",
            "run",
            "compare",
            "graph",
            "collect",
            "evaluate",
            "audit",
            "bench",
            "generate",
            "check",
            "methods",
            "diff",
            "show",
            "figure",
            "push",
        )
    )


def test_help_does_not_import_torch() -> None:
    code = "import sys; sys.argv=['lens-unlearn','--help']\nimport lens_unlearn.cli as c\n"
    code += "try:\n c.main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformer_lens', 'datasets', 'plotly', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_run_writes_report_table_artefact_and_settings(
    model_dir: Path, texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "one"
    arguments = [*run_arguments(model_dir, texts, out), "--also", f"third={texts['third']}", "--set", "fraction=0.1"]
    arguments += ["--method", "selective-pruning", "--method", "selective-pruning-attention"]
    assert call(*arguments, "--set", "importance=rms") == 0
    assert sorted(os.listdir(out)) == [
        "metrics.csv", "report.html", "report.safetensors", "run.json",
        "selective-pruning-attention.safetensors", "selective-pruning.safetensors",
    ]  # fmt: skip
    table = pd.read_csv(out / "metrics.csv")
    assert list(table.columns[:7]) == ["condition", "corpus", "metric", "value", "low", "high", "n"]
    methods = ["selective-pruning", "selective-pruning-attention"]
    assert list(table.condition.unique()) == ["base", *(name + end for name in methods for end in ("", ":control"))]
    assert list(table.corpus.unique()) == ["forget", "retain", "third"]
    assert {"loss", "perplexity", "top1", "top10", "top1_rare", "kl"} == set(table.metric)
    saved = json.loads((out / "run.json").read_text())
    assert saved["plan"]["settings"] == {"fraction": 0.1, "importance": "rms"}
    assert saved["plan"]["seed"] == 0
    assert {"torch", "transformer_lens", "lens_unlearn"} <= set(saved["versions"])
    assert saved["fingerprint"]["weights"]
    assert "<script" in (out / "report.html").read_text()
    assert not [name for name in os.listdir(out.parent) if name != "one"]  # no working folder is left
    capsys.readouterr()
    assert call("show", out / "selective-pruning.safetensors") == 0
    assert "Ablate(zero" in capsys.readouterr().out


def test_run_with_methods_that_adjust_and_abstain(
    model_dir: Path, texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = [*run_arguments(model_dir, texts, out), "--method", "neuron-adjust", "--method", "key-space-detection"]
    arguments += ["--set", "neuron-adjust.fraction=0.3", "--set", "rule=deterministic", "--set", "false_alarms=0.2"]
    assert call(*arguments) == 0
    table = pd.read_csv(out / "metrics.csv")
    silent = table[table.metric == "abstained"].set_index(["condition", "corpus"]).value
    assert silent["key-space-detection", "forget"] > silent["base", "forget"] == 0
    saved = json.loads((out / "run.json").read_text())
    assert saved["corpora"]["forget"]["source"].endswith("cut into prompts)")
    page = html.unescape((out / "report.html").read_text())
    for figure in ("Which layers tell the queries apart", "Finding the queries at L", "The queries' keys at L"):
        assert figure in page
    capsys.readouterr()
    assert call("show", out / "neuron-adjust.safetensors") == 0
    assert "Adjust(deterministic" in capsys.readouterr().out
    assert call("show", out / "key-space-detection.safetensors") == 0
    assert "held-out queries" in capsys.readouterr().out
    both = [
        part
        for name in ("neuron-adjust", "key-space-detection")
        for part in ("--intervention", out / f"{name}.safetensors")
    ]
    assert call("generate", "--model", model_dir, *both, "--prompt", "the quick brown", "--max-new-tokens", 3) == 0


@pytest.mark.filterwarnings("ignore:less than 10%", "ignore:nothing has a positive")
def test_run_with_a_trained_update(
    model_dir: Path, texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = [*run_arguments(model_dir, texts, out), "--method", "simu"]
    assert call(*arguments, "--set", "simu.steps=2", "--set", "attention=none", "--set", "mask=all") == 0
    table = pd.read_csv(out / "metrics.csv")
    assert {"base", "simu", "simu:control"} <= set(table.condition)
    assert "How simu was trained" in (out / "report.html").read_text()
    capsys.readouterr()
    assert call("show", out / "simu.safetensors") == 0
    assert "rows of W_out" in capsys.readouterr().out


def test_run_asks_for_answers_and_looks_how_well_they_are_known(
    model_dir: Path, texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {}
    for name in ("forget", "retain"):
        lines = [json.loads(line)["text"].split() for line in texts[name].read_text().splitlines()]
        rows = [{"q": " ".join(words[:2]), "a": f"{words[2]} {i}"} for i, words in enumerate(lines)]
        paths[name] = tmp_path / f"{name}_pairs.jsonl"
        paths[name].write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "asked"
    arguments = ["--model", model_dir, "--forget", f"{paths['forget']}:q>a", "--retain", f"{paths['retain']}:q>a"]
    arguments += ["--method", "selective-pruning", "--tokens", 300, "--window", 64]
    arguments += ["--out", out, "--no-sweep", "--quiet"]
    assert call("run", *arguments, "--answers", 3, "--memorization", 3) == 0
    table = pd.read_csv(out / "metrics.csv")
    assert {"exact_match", "rouge_l", "answer_probability", "exact_memorization", "extraction_strength"} <= set(
        table.metric
    )
    saved = json.loads((out / "run.json").read_text())
    assert saved["answers"]["questions"] == saved["memorization"]["questions"]
    capsys.readouterr()
    plain = ["--model", model_dir, "--forget", texts["forget"], "--retain", texts["retain"], "--tokens", 300]
    plain += ["--method", "selective-pruning", "--out", tmp_path / "none", "--no-sweep", "--quiet"]
    assert call("run", *plain, "--memorization", 3) == 2
    assert "no corpus has true answers" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_run_keeps_fit_tune_and_test_documents_apart(model_dir: Path, texts: dict[str, Path], model: Any) -> None:
    lines = texts["forget"].read_text().splitlines()
    test_file = texts["forget"].with_name("test.jsonl")
    test_file.write_text("\n".join(lines[:5]) + "\n")  # these stand in the fit source as well
    plan = Plan(
        model=str(model_dir), forget=str(texts["forget"]), retain=(str(texts["retain"]),), tokens=400, window=32,
        test_forget=str(test_file), test_retain=(str(texts["third"]),),
    )  # fmt: skip
    parts = experiment.Experiment(plan, model, progress=False).documents
    assert list(parts.tune) == ["forget", "retain"]
    assert len(set(parts.tune["retain"].units)) >= 10
    for name in ("forget", "retain"):
        used = [set(part[name].keys) for part in (parts.fit, parts.tune, parts.test)]
        assert not used[0] & used[1]
        assert not used[0] & used[2]
        assert not used[1] & used[2]
    assert parts.removed == {"forget": 5, "retain": 0}


def test_groups_stay_whole_on_the_command_line(
    model_dir: Path, texts: dict[str, Path], model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every command that reads texts, up to the settings and the page; what is wrong is one sentence."""
    for name, path in texts.items():
        rows = [
            json.loads(line) | {"author": f"{name} {n // 3}"} for n, line in enumerate(path.read_text().splitlines())
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {name: f"{path}:text@author" for name, path in texts.items()}
    plan = Plan(str(model_dir), sources["forget"], (f"{texts['retain']}:text@3",), tokens=4000, window=32)
    documents = experiment.Experiment(plan, model, progress=False).documents
    for name in ("forget", "retain"):
        units = [set(part[name].units) for part in (documents.fit, documents.tune, documents.test)]
        assert sum(map(len, units)) == len(set.union(*units)) == 10

    out = tmp_path / "run"
    arguments = run_arguments(model_dir, texts, out)
    arguments[arguments.index("--forget") + 1], arguments[arguments.index("--retain") + 1] = plan.forget, plan.retain[0]
    assert call(*arguments, "--method", "selective-pruning", "--set", "fraction=0.1") == 0
    saved = json.loads((out / "run.json").read_text())
    assert (saved["plan"]["forget"], saved["plan"]["retain"]) == (plan.forget, list(plan.retain))
    assert "units" in saved["corpora"]["forget"]
    assert f"{saved['corpora']['forget']['units']} groups" in (out / "report.html").read_text()

    reading = ["--model", model_dir, "--window", 32, "--quiet"]
    assert call("evaluate", *reading, "--corpus", f"c={sources['third']}", "--out", tmp_path / "evaluated") == 0
    corpora = json.loads((tmp_path / "evaluated" / "run.json").read_text())["corpora"]
    assert (corpora["c"]["documents"], corpora["c"]["units"]) == (30, 10)
    assert call("collect", *reading, "--corpus", sources["third"], "--out", tmp_path / "third.safetensors") == 0
    skills = {name: lu.read_corpus(sources[name], model, window=32) for name in ("forget", "third")}
    compared = compare.split_skills(skills, None, 0)
    for name in skills:
        assert not set(compared[name].units) & set(compared[f"{name}:test"].units)

    capsys.readouterr()
    for wrong, said in ((":text@autor", "has no field 'autor' to group by"), ("@0", "0 rows make no group")):
        assert (
            call("collect", *reading, "--corpus", f"{texts['third']}{wrong}", "--out", tmp_path / "x.safetensors") == 2
        )
        [line] = capsys.readouterr().err.strip().splitlines()
        assert said in line


def test_tuning_on_few_documents_is_refused(
    model_dir: Path, texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*run_arguments(model_dir, texts, tmp_path / "tuned"), "--retain-drop", "0.5") == 2
    assert "documents or groups to tune on, too few to bound what fresh ones lose" in capsys.readouterr().err
    assert not (tmp_path / "tuned").exists()


def test_a_method_that_cannot_keep_the_budget_leaves_the_others_alone(
    model_dir: Path, texts: dict[str, Path], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strict(method: Any, *_: Any, **__: Any) -> Any:
        raise BudgetError("no fraction stays within the budget")

    monkeypatch.setattr(experiment, "tune", strict)
    sources = {"model": str(model_dir), "forget": str(texts["forget"]), "retain": (str(texts["retain"]),)}
    settings: dict[str, Any] = {**sources, "tokens": 300, "window": 32, "retain_drop": 0.1, "sweep": False}
    both = experiment.Experiment(
        Plan(**settings, methods=("selective-pruning", "neuron-adjust")), model, progress=False
    )
    both.fit()
    assert all(choice["nothing"] == "no fraction stays within the budget" for choice in both.chosen.values())
    assert both.report().conditions == ["base", "selective-pruning", "neuron-adjust"], "no controls"
    alone = experiment.Experiment(Plan(**settings), model, progress=False)
    with pytest.raises(BudgetError, match="no fraction stays"):
        alone.fit()


def test_run_is_reproducible(model_dir: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        assert call(*run_arguments(model_dir, texts, out), "--set", "fraction=0.1") == 0
    for name in ("metrics.csv", "selective-pruning.safetensors"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()


def test_collect_evaluate_and_generate_work_together(
    model_dir: Path, texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = tmp_path / "stats.safetensors"
    assert (
        call(
            "collect",
            "--model",
            model_dir,
            "--corpus",
            texts["forget"],
            "--sites",
            "mlp.post,attn.z",
            "--out",
            stats,
            "--quiet",
        )
        == 0
    )
    moments = lu.load_moments(stats)
    assert {site.kind for site in moments.sites} == {"mlp.post", "attn.z"}
    model = lu.load_model(model_dir)
    edit = lu.Ablate(moments.mean_abs["mlp.post"].top(0.5))
    edit.save(tmp_path / "half.safetensors", model)
    out = tmp_path / "evaluated"
    half = tmp_path / "half.safetensors"
    assert (
        call(
            "evaluate",
            "--model",
            model_dir,
            "--corpus",
            f"a={texts['retain']}",
            "--intervention",
            half,
            "--out",
            out,
            "--quiet",
        )
        == 0
    )
    assert set(pd.read_csv(out / "metrics.csv").condition) == {"base", "half"}
    capsys.readouterr()
    assert (
        call("generate", "--model", model_dir, "--intervention", half, "--prompt", "the quick", "--max-new-tokens", 5)
        == 0
    )
    output = capsys.readouterr().out.rstrip("\n")
    assert output == "the quick" + lu.generate(model, "the quick", intervention=edit, max_new_tokens=5)


def test_attention_sinks_are_left_out_where_that_is_asked_for_and_it_is_recorded(
    model_dir: Path, texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = []
    for number, more in enumerate(([], ["--skip-sinks", 1.1])):
        out = tmp_path / f"{number}.safetensors"
        reading = ["--model", model_dir, "--corpus", texts["forget"], "--window", 16, "--quiet"]
        assert call("collect", *reading, "--out", out, *more) == 0
        moments = lu.load_moments(out)
        assert moments.provenance.get("skip_sinks") == (1.1 if more else None)
        counts.append(int(moments.state()["L1.mlp.post.count"]))
    assert counts[1] < counts[0]
    assert call(*run_arguments(model_dir, texts, tmp_path / "run"), "--skip-sinks", 1.1) == 0
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["plan"]["settings"] == {"skip_sinks": 1.1}
    capsys.readouterr()
    for method, ratio, refusal in (
        (
            "selective-pruning",
            1,
            "skip_sinks=1.0 times the usual norm makes sinks of usual positions: give a number above 1",
        ),
        ("key-space-detection", 3, "the setting 'skip_sinks': no method of this run has such an option"),
    ):
        given = ["--method", method, "--skip-sinks", ratio]
        assert call(*run_arguments(model_dir, texts, tmp_path / "refused"), *given) == 2
        assert refusal in capsys.readouterr().err
    assert call("collect", *reading, "--out", tmp_path / "no.safetensors", "--skip-sinks", "nan") == 2
    assert not (tmp_path / "refused").exists()
    assert not (tmp_path / "no.safetensors").exists()


def test_collect_resumes_to_the_same_bytes(
    model_dir: Path, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lens_unlearn.neurons import collect

    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    arguments = [
        "collect",
        "--model",
        model_dir,
        "--corpus",
        texts["forget"],
        "--window",
        16,
        "--batch-size",
        2,
        "--quiet",
    ]
    assert call(*arguments, "--out", whole) == 0
    real, calls = collect.backbone, iter(range(100))

    def interrupted(model: Any, tokens: torch.Tensor) -> None:
        if next(calls) == 7:
            raise KeyboardInterrupt
        real(model, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(collect, "backbone", interrupted)
        assert call(*arguments, "--out", resumed) == 130
    assert not resumed.exists()
    assert call(*arguments, "--out", resumed) == 2  # the rest of it is not overwritten silently
    assert call(*arguments, "--out", resumed, "--resume") == 0
    assert whole.read_bytes() == resumed.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_an_interrupted_run_says_how_to_go_on(
    model_dir: Path,
    texts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call(*run_arguments(model_dir, texts, whole)) == 0

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    arguments = run_arguments(model_dir, texts, out)
    for place, stored in (("load_model", False), ("evaluate", True), ("evaluate", True)):
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(experiment, place, interrupted)
            assert call(*arguments, "--resume") == 130
        output = capsys.readouterr().err.strip()
        assert len(output.splitlines()) == 1
        assert output.startswith("lens-unlearn: interrupted")
        assert output.endswith(f": the same command with --resume goes on from {out}.partial") == stored
        assert (tmp_path / "out.partial").exists() == stored
        assert not out.exists()
    assert call(*arguments) == 2
    assert "give --resume to go on" in capsys.readouterr().err
    assert call(*arguments, "--resume") == 0
    for name in ("metrics.csv", "run.json", "selective-pruning.safetensors"):
        assert (whole / name).read_bytes() == (out / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out", "whole"]


BAD = {
    "unknown model": (["--model", "no/such/model/here"], "no model directory"),
    "directory without weights": (["--model", "EMPTY"], "no weights"),
    "misspelled file": (["--forget", "FOLDER/forgte.jsonl"], "did you mean forget.jsonl"),
    "missing field": (["--forget", "FORGET:body"], "its fields are text, other"),
    "unknown method": (["--method", "selective-prunning"], "choose from"),
    "unknown setting": (["--set", "fractoin=0.1"], "no method of this run has such an option"),
    "malformed setting": (["--set", "fraction"], "NAME=VALUE"),
    "unknown importance": (["--set", "importance=absolute"], "choose from abs"),
    "unknown site": (["--set", "site=mlp.past"], "did you mean mlp.post"),
    "fraction above one": (["--set", "fraction=1.5"], "from 0 to 1"),
    "fraction not a number": (["--set", "fraction=lots"], "from 0 to 1"),
    "empty selection": (["--set", "fraction=0"], "selects nothing"),
    "same text": (["--forget", "RETAIN:text"], "same text"),
    "same documents": (["--forget", "COPY"], "same documents"),
    "empty file": (["--forget", "BLANK"], "is empty"),
    "one document": (["--forget", "SHORT"], "too few to split"),
    "budget above one": (["--retain-drop", "5"], "from 0 to 1"),
    "test of one side only": (["--test-forget", "FORGET"], "in pairs"),
    "corpus called forget": (["--also", "forget=RETAIN"], "cannot name a corpus"),
    "folder without a name": (["--out", "."], "has no name of its own"),
    "window beyond the context": (["--window", "100000"], "does not fit"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_to_run_is_one_sentence_and_exit_code_2(
    case: str, model_dir: Path, texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text("{}")
    (tmp_path / "blank.jsonl").write_text("")
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "only one document in here"}) + "\n")
    (tmp_path / "copy.jsonl").write_text(texts["retain"].read_text())
    names = {
        "EMPTY": tmp_path / "hollow", "FOLDER": tmp_path, "FORGET": texts["forget"], "RETAIN": texts["retain"],
        "COPY": tmp_path / "copy.jsonl", "BLANK": tmp_path / "blank.jsonl", "SHORT": tmp_path / "short.jsonl",
    }  # fmt: skip
    extra, expected = BAD[case]
    for short, path in names.items():
        extra = [text.replace(short, str(path)) for text in extra]
    out = tmp_path / "out"
    before = sorted(os.listdir(tmp_path))
    assert call(*run_arguments(model_dir, texts, out), *extra) == 2
    output = capsys.readouterr().err.strip()
    assert output.startswith("lens-unlearn: ")
    assert len(output.splitlines()) == 1
    assert expected in output
    assert sorted(os.listdir(tmp_path)) == before


def test_an_output_folder_with_another_run_is_not_replaced_unless_asked(
    model_dir: Path, texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [*run_arguments(model_dir, texts, out), "--set", "fraction=0.1"]
    assert call(*arguments) == 0
    first = (out / "run.json").stat().st_mtime_ns
    assert call(*arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "run.json").stat().st_mtime_ns == first
    assert call(*arguments, "--overwrite") == 0
    assert (out / "run.json").stat().st_mtime_ns != first
    (out / "run.json").unlink()
    assert call(*arguments, "--overwrite") == 2  # not a run's folder: never deleted
    assert (out / "report.html").exists()


@pytest.mark.parametrize("kind", ["truncated", "pickle", "other model", "not ours", "missing"])
def test_bad_artefacts_are_refused_by_name(
    kind: str, model_dir: Path, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "edit.safetensors", tmp_path / "out"
    edit = lu.random_pruning(model, fraction=0.5)
    edit.save(path, model)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-3])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    elif kind == "not ours":
        path.write_text("hello, hello, hello")
    elif kind == "missing":
        path.unlink()
    elif kind == "other model":
        from lens_unlearn.core import artefacts

        header, tensors = artefacts.read(path)
        header["model"]["weights"] = "0123456789abcdef"
        header.pop("kind")
        artefacts.write(path, "intervention", tensors, header)
    arguments = [
        "evaluate",
        "--model",
        model_dir,
        "--corpus",
        f"a={tmp_path / 'texts.jsonl'}",
        "--intervention",
        path,
        "--out",
        out,
    ]
    write_texts(tmp_path / "texts.jsonl", 1)
    assert call(*arguments, "--quiet") == 2
    output = capsys.readouterr().err.strip()
    assert len(output.splitlines()) == 1
    assert str(path) in output
    assert {"other model": "weights", "pickle": "pickle", "missing": "cannot be read"}.get(kind, "") in output
    assert not out.exists()


def test_evaluate_answers_questions_and_runs_code_only_where_allowed(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"q": f"add {n}", "a": "def f(): pass", "test_list": ["assert f() == 1"]} for n in range(4)]
    source = tmp_path / "tasks.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "answers"
    arguments = ["evaluate", "--model", model_dir, "--corpus", f"c={source}:q>a", "--out", out, "--quiet"]
    arguments += ["--answers", 3, "--max-new-tokens", 4, "--overwrite"]
    assert call(*arguments) == 0
    assert "unit tests were not run: give --allow-code-execution to run them" in capsys.readouterr().out
    table = pd.read_csv(out / "metrics.csv").set_index("metric")
    assert {"exact_match", "rouge_l", "rouge_l_f"} <= set(table.index)
    assert "unit_tests" not in table.index
    assert table.n["exact_match"] == 3
    saved = json.loads((out / "run.json").read_text())["answers"]
    assert saved["questions"] == {"c": 3}
    assert saved["unit_tests"] == {"c": "not run: not allowed"}
    assert "true answer" in (out / "report.html").read_text()
    assert call(*arguments, "--allow-code-execution") == 0
    assert "not run" not in capsys.readouterr().out
    assert pd.read_csv(out / "metrics.csv").set_index("metric").value["unit_tests"] == 0
    before = sorted(tmp_path.iterdir())
    texts = write_texts(tmp_path / "texts.jsonl", 1)
    assert (
        call("evaluate", "--model", model_dir, "--corpus", f"c={texts}", "--out", tmp_path / "x", "--answers", 3) == 2
    )
    assert "no corpus has true answers" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == sorted([*before, texts])


def test_weights_may_be_of_another_dtype(model_dir: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    options = ["--model", model_dir, "--corpus", f"{texts['forget']}:text", "--tokens", 200, "--window", 32, "--quiet"]
    assert call("collect", *options, "--out", tmp_path / "a.safetensors", "--dtype", "bfloat16") == 0
    assert artefacts.read(tmp_path / "a.safetensors")[0]["model"]["dtype"] == "bfloat16"
    assert call("collect", *options, "--out", tmp_path / "b.safetensors", "--dtype", "int8") == 2
    assert call("collect", *options, "--out", tmp_path / "b.safetensors", "--device-map", "nowhere") == 2
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("bos", [True, False])
def test_whether_prompts_begin_with_bos_is_an_option(
    model_dir: Path, capsys: pytest.CaptureFixture[str], bos: bool
) -> None:
    prompt, flag = "the quick brown", "--prepend-bos" if bos else "--no-prepend-bos"
    capsys.readouterr()
    assert call("generate", "--model", model_dir, "--prompt", prompt, "--max-new-tokens", 6, flag) == 0
    [written] = lu.generate(lu.load_model(model_dir), [prompt], max_new_tokens=6, prepend_bos=bos)
    assert capsys.readouterr().out == f"{prompt}{written}\n"
    plan = Plan("demo", "demo:python", ("demo:english",), prepend_bos=bos)
    assert f" {flag} " in command_of(plan)
    assert settings_of(plan)["prepend_bos"] is bos
    assert "prepend_bos" not in settings_of(Plan("demo", "demo:python", ("demo:english",)))
