"""What several commands take, options from a file, and the options of methods as the command line shows them."""

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from command_line_helpers import call
from typer.testing import CliRunner

import lens_unlearn as lu
from lens_unlearn import methods
from lens_unlearn.cli import app
from lens_unlearn.cli.options import Loading
from lens_unlearn.experiments import bench, compare, experiment
from lens_unlearn.experiments.bench import BenchPlan
from lens_unlearn.experiments.plan import Plan, command_of, option_names, settings_of
from lens_unlearn.methods.options import options_of

SOURCES = {"model": "demo", "forget": "demo:python", "retain": ("demo:english",)}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that `run` carries out, which are not carried out here."""
    plans: list[Plan] = []
    monkeypatch.setattr(experiment, "carry_out", lambda plan, *_, **__: plans.append(plan))
    return plans


def commands() -> list[str]:
    return [str(one.name or getattr(one.callback, "__name__", "")) for one in app.registered_commands]


def shown(*arguments: str) -> str:
    return CliRunner().invoke(app, [*arguments], terminal_width=200).output


def test_every_command_has_help_by_a_letter_and_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"lens-unlearn {lu.__version__}\n"
    for command in commands():
        assert f"lens-unlearn {command}" in shown(command, "-h")


@pytest.mark.parametrize(
    "command", ["run", "compare", "graph", "bench", "collect", "evaluate", "audit", "generate", "check"]
)
def test_whatever_loads_a_model_says_where_it_runs(command: str) -> None:
    text = shown(command, "--help")
    assert all(
        option in text
        for option in ("--device ", "--device-map", "--dictionary", "--dtype", "--revision", "--trust-remote-code")
    )


@pytest.mark.parametrize("plan", [Plan, BenchPlan])
def test_a_plan_loads_its_model_as_the_options_say(plan: Any) -> None:
    names = [option.name for option in fields(Loading)]
    given = SimpleNamespace(**{name: f"the {name}" for name in names})
    assert plan.loading.fget(given) == vars(given), "an option that is not passed on would be ignored without a word"


@pytest.mark.parametrize("command", ["run", "compare", "graph", "bench", "audit"])
def test_whatever_has_controls_takes_their_number_under_one_name(command: str) -> None:
    assert "--control-seeds" in shown(command, "--help")


def test_a_script_for_the_shell_completes_commands() -> None:
    assert "lens-unlearn" in shown("--show-completion", "bash")


ASKED: dict[str, Any] = {
    "methods": ("neuron-adjust", "simu"),
    "also": {"third": "demo:esperanto"},
    "settings": {"neuron-adjust.fraction": 0.25, "mask": "none", "site": "mlp.pre"},
    "test_forget": "demo:python:test",
    "test_retain": ("demo:english:test", "demo:facts:test"),
    "retain_drop": 0.1,
    "tokens": 321,
    "window": 64,
    "sweep": False,
    "facts": False,
    "prepend_bos": False,
    "controls": 2,
    "fractions": (0.1, 0.2),
    "device": "cpu",
    "template": "{prompt}\n{answer}",
}


def test_a_plan_comes_back_from_its_command_and_from_a_file(planned: list[Plan], tmp_path: Path) -> None:
    import shlex

    plan = Plan(**SOURCES, **ASKED)
    command = shlex.split(command_of(plan))
    assert call(*command[1:]) == 0
    for name, content in (("run.json", {"plan": settings_of(plan)}), ("run.yaml", settings_of(plan))):
        file = tmp_path / name
        file.write_text(json.dumps(content) if name.endswith("json") else yaml.safe_dump(content))
        assert call("run", "--config", file, "--out", tmp_path / "out") == 0
    assert planned == [plan, plan, plan]


def test_what_is_on_the_command_line_wins_over_the_file(planned: list[Plan], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: demo\nforget: demo:python\nretain: demo:english\ntokens: 300\nsweep: no\ncontrol-seeds: null\n"
    )
    assert call("run", "--out", tmp_path / "out", "--tokens", 500, "--config", file, "--sweep") == 0
    assert planned == [Plan(**SOURCES, tokens=500)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("tokenz: 3", "run has no option 'tokenz': did you mean 'tokens'?"),
        ("metods: [simu]", "did you mean 'methods'?"),
        ("retaindrop: 0.1", "did you mean 'retain_drop'?"),
        ("out: there", "run has no option 'out'"),
        ("3: 4", "run has no option '3'"),
        ("tokens: many", "tokens: 'many' cannot be meant here"),
        ("tokens: [1, 2]", "tokens: [1, 2] cannot be meant here"),
        ("tokens: true", "tokens: True cannot be meant here"),
        ("sweep: 3", "sweep: 3 cannot be meant here"),
        ("- model", "holds no options"),
        ("", "holds no options"),
        ("a: [", "cannot be read"),
        ("also: {third: demo:esperanto, forget: b}", "cannot name a corpus"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_in_one_sentence(
    content: str, words: str, planned: list[Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    arguments = ["--model", "demo", "--forget", "demo:python", "--retain", "demo:english", "--out", tmp_path / "out"]
    assert call("run", "--config", file, *arguments) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert not planned


def test_compare_and_bench_take_files_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(compare, "carry_out_comparison", lambda plans, skills, *_, **__: seen.append((plans, skills)))
    file = tmp_path / "compare.yaml"
    file.write_text("model: demo\nskills: {a: demo:python, b: demo:english}\ncontrols: 2\nmethods: [neuron-adjust]\n")
    assert call("compare", "--config", file, "--out", tmp_path / "out") == 0
    [(plans, skills)] = seen
    assert skills == {"a": "demo:python", "b": "demo:english"}
    assert (plans["a"].controls, plans["a"].methods) == (2, ("neuron-adjust",))
    monkeypatch.setattr(bench, "carry_out_bench", lambda plan, *_, **__: seen.append(plan))
    file.write_text("model: demo\ndata: nowhere\noptions: {n: 3}\n")
    assert call("bench", "tofu", "--config", file, "--out", tmp_path / "out", "--option", "template={question}") in (
        0,
        2,
    )


def test_every_method_says_what_each_of_its_options_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("methods") == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(methods.names())
    for method in methods.METHODS:
        assert call("methods", method.name) == 0
        text = capsys.readouterr().out
        assert [option.name for option in options_of(method)] == option_names(method.name)
        for option in options_of(method):
            assert option.meaning, f"{method.name} does not say what {option.name} means"
            assert option.type != "any"
            assert f"  {option.name}  ({option.type}; default {option.shown})" in text
    attention = {option.name: option for option in options_of(methods.by_name("selective-pruning-attention"))}
    assert attention["site"].shown == "attn.z"
    assert attention["within"].type == "model | layer"
    assert attention["skip_sinks"].type == "float | null"
    assert call("methods", "simmu") == 2
    assert "choose from" in capsys.readouterr().err


UPDATE = ["run", "--model", "demo", "--forget", "demo:facts_forget", "--retain", "demo:facts_retain", "--method"]


def test_memory_is_an_option_with_a_name_of_its_own(planned: list[Plan], tmp_path: Path) -> None:
    assert call(*UPDATE, "simu", "--memory", "low", "--set", "rank=4", "--out", tmp_path / "out") == 0
    assert planned[0].settings == {"rank": 4, "memory": "low"}
    assert planned[0].options("simu")["memory"] == "low"
    assert "--set rank=4 --set memory=low" in command_of(planned[0])


@pytest.mark.parametrize(
    ("method", "memory", "refusal"),
    [
        ("simu", "little", "memory='little' is not known: choose from default, low"),
        ("selective-pruning", "low", "the setting 'memory': no method of this run has such an option"),
    ],
)
def test_a_memory_that_is_none_is_refused(
    method: str, memory: str, refusal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*UPDATE, method, "--memory", memory, "--out", tmp_path / "out") == 2
    assert refusal in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
