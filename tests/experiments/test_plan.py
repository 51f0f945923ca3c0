"""Plans: whatever can be refused is refused when a plan is made, before a model is loaded, and names what was given."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from command_line_helpers import call

import lens_unlearn as lu
from lens_unlearn import cli, methods
from lens_unlearn.core.errors import LensUnlearnError, ModelError, SelectionError
from lens_unlearn.experiments.compare import plans_for
from lens_unlearn.experiments.plan import Plan, command_of, settings_of
from lens_unlearn.model import dtypes, loading

MOST_FIRING = "most-firing"


def plan(**changed: Any) -> Plan:
    return Plan(**{"model": "nowhere", "forget": "a.txt", "retain": ("b.txt",), **changed})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"retain_drop": 5}, r"^retain_drop=5 is not a share of the accuracy: give a number from 0 to 1$"),
        ({"retain_drop": -0.1}, "^retain_drop=-0.1"),
        ({"retain_drop": math.nan}, "^retain_drop=nan"),
        ({"retain_drop": math.inf}, "^retain_drop=inf"),
        ({"retain_drop": True}, "^retain_drop=True"),
        ({"confidence": 1}, "^confidence=1 is no confidence of a bound"),
        ({"confidence": None}, "^confidence=None"),
        ({"tokens": 0}, "^tokens=0"),
        ({"tokens": None}, "^tokens=None"),
        ({"window": 0}, "^window=0"),
        ({"seed": -1}, "^seed=-1"),
        ({"batch_size": 0}, "^batch_size=0"),
        ({"controls": 0}, "^controls=0"),
        ({"answers": -1}, "^answers=-1"),
        ({"memorization": 0.5}, "^memorization=0.5"),
        ({"fractions": (0.1, 0)}, "^fractions=0"),
        ({"false_alarms": (2,)}, "^false_alarms=2"),
        ({"strengths": (math.nan,)}, "^strengths=nan"),
        ({"dtype": "int8"}, "^dtype='int8' is not known"),
        ({"retain": ()}, "^there is nothing to retain"),
        ({"methods": ()}, "^no method was named"),
    ],
)
def test_a_number_that_cannot_be_meant_is_refused_by_its_name(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(LensUnlearnError, match=words):
        plan(**changed)


OPTIONS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "selective-pruning": [
        ({"fraction": 1.5}, "fraction=1.5"),
        ({"fraction": 0}, "fraction=0 selects nothing: raise it"),
        ({"fraction": True}, "fraction=True"),
        ({"fraction": "lots"}, "fraction='lots'"),
        ({"fraction": math.nan}, "fraction=nan"),
        ({"importance": "absolute"}, "choose from abs"),
        ({"site": "mlp.past"}, "did you mean mlp.post"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"eps": -1}, "eps=-1"),
        ({"eps_relative": math.inf}, "eps_relative=inf"),
        ({"within": "head"}, "within='head'"),
        ({"unit": "head"}, "unit='head' is of attention"),
    ],
    "neuron-adjust": [
        ({"fraction": -0.1}, "fraction=-0.1"),
        ({"rank_by": "size"}, "rank_by='size'"),
        ({"rule": "never"}, "rule='never'"),
        ({"site": "mlp.prre"}, "did you mean mlp.pre"),
    ],
    "key-space-detection": [
        ({"false_alarms": 1.2}, "false_alarms=1.2"),
        ({"coverage": 0}, "coverage=0"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"alpha": -1}, "alpha=-1"),
        ({"layer": 1.5}, "layer=1.5"),
        ({"layer": (0, "one")}, "layer='one'"),
        ({"vote": 0}, "vote=0"),
        ({"region": "cube"}, "region='cube'"),
        ({"when": "never"}, "when='never'"),
        ({"refusal": 3}, "refusal=3"),
    ],
    "simu": [
        ({"threshold": 1}, "threshold=1"),
        ({"attribution_steps": 0}, "attribution_steps=0"),
        ({"objective": "x"}, "objective='x'"),
        ({"mask": "x"}, "mask='x'"),
        ({"rank": True}, "rank=True"),
        ({"loss": "x"}, "loss='x'"),
        ({"lr": 0}, "lr=0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"weight_decay": -1}, "weight_decay=-1"),
        ({"forget_weight": math.inf}, "forget_weight=inf"),
        ({"retain_weight": -1}, "retain_weight=-1"),
        ({"beta": 0}, "beta=0"),
        ({"max_norm": 0}, "max_norm=0"),
        ({"steps": 0}, "steps=0"),
        ({"steps": "many"}, "steps='many'"),
        ({"seed": -1}, "seed=-1"),
        ({"refusal": " "}, "refusal=' '"),
        ({"strength": math.nan}, "strength=nan"),
        ({"attention": "none", "mask": "none"}, "leave nothing to train"),
    ],
    "direction-removal": [
        ({"layer": 1.5}, "layer=1.5"),
        ({"layers": ()}, "names no layer"),
        ({"strength": 2}, "strength=2"),
    ],
    "concept-erasure": [
        ({"samples": 0}, "samples=0"),
        ({"strength": 0}, "strength=0"),
        ({"layers": "all"}, "layers='all'"),
    ],
    "steering": [({"coefficient": -1}, "coefficient=-1"), ({"skip_sinks": 0.5}, "skip_sinks=0.5")],
    "linear-probe": [
        ({"fraction": 0}, "selects nothing: raise it"),
        ({"l1": math.nan}, "l1=nan"),
        ({"samples": 1.5}, "samples=1.5"),
    ],
    "rmu": [
        ({"lr": 0}, "lr=0"),
        ({"alpha": -1}, "alpha=-1"),
        ({"steps": 0}, "steps=0"),
        ({"layer": True}, "layer=True"),
    ],
}


def test_every_method_of_the_table_says_what_it_needs() -> None:
    assert {record.name for record in methods.METHODS if record.check is not None} >= set(OPTIONS)
    for record in methods.METHODS:
        record.require(record.settings)  # its defaults are right


@pytest.mark.parametrize(
    ("method", "options", "words"), [(name, *case) for name, cases in OPTIONS.items() for case in cases]
)
def test_an_option_that_cannot_be_is_refused_with_the_plan(method: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(LensUnlearnError, match=words):
        plan(methods=(method,), settings=options).require_options()
    owned = {f"{method}.{name}": value for name, value in options.items()}
    with pytest.raises(LensUnlearnError, match=words):
        plan(methods=("selective-pruning-attention", method), settings=owned).require_options()


def test_with_a_budget_the_strength_is_not_asked_for() -> None:
    plan(settings={"fraction": 0}, retain_drop=0.1).require_options()
    plan(settings={"importance": "rms"}, retain_drop=0).require_options()


@pytest.mark.parametrize(
    ("skills", "words"),
    [
        (("run.json", "b"), "'run.json' cannot name a skill"),
        (("compare.html", "b"), "cannot name a skill"),
        (("Matrix.CSV", "b"), "cannot name a skill"),
        (("kept", "b"), "cannot name a skill"),
        (("a" * 300, "b"), "cannot name a skill: use letters.* at most 150 bytes"),
        (("../evil", "b"), "cannot name a skill"),
        (("..", "b"), "cannot name a skill"),
        (("a/b", "b"), "cannot name a skill"),
        (("a\nb", "b"), "cannot name a skill"),
        (("nul", "b"), "cannot name a skill"),
        (("b", "B"), "'B' cannot name a skill: that name means something else there"),
        (("a",), "give two or more"),
    ],
)
def test_a_skill_whose_folder_would_be_something_else_is_refused(skills: tuple[str, ...], words: str) -> None:
    with pytest.raises(LensUnlearnError, match=words):
        plans_for(skills, "nowhere", retain_drop=0.1)


@pytest.mark.parametrize("budget", [5, -1, math.nan, math.inf, True, "0.1", None])
def test_a_comparison_takes_budgets_as_plans_do(budget: Any) -> None:
    with pytest.raises(LensUnlearnError, match="^retain_drop=.* is not a share of the accuracy"):
        plans_for(("a", "b"), "nowhere", retain_drop=budget)


COMMANDS: dict[str, list[object]] = {
    "run": ["run", "--model", "x", "--forget", "a.txt", "--retain", "b.txt"],
    "compare": ["compare", "--model", "x", "--skill", "a=a.txt", "--skill", "b=b.txt"],
    "graph": ["graph", "--model", "x", "--skill", "a=a.txt", "--skill", "b=b.txt"],
    "collect": ["collect", "--model", "x", "--corpus", "a.txt"],
    "evaluate": ["evaluate", "--model", "x", "--corpus", "a=a.txt"],
    "generate": ["generate", "--model", "x", "--prompt", "a"],
    "demo": ["demo"],
    "audit": ["audit", "--model", "x", "--facts", "a.jsonl:q>a", "--intervention", "a.safetensors"],
    "bench": ["bench", "lume", "--model", "x", "--data", "a"],
    "check": ["check", "x"],
}
WRONG = [
    ("run", "--retain-drop", "5", "retain_drop=5"),
    ("run", "--retain-drop", "nan", "retain_drop=nan"),
    ("run", "--retain-drop", "-1", "retain_drop=-1"),
    ("run", "--confidence", "inf", "confidence=inf"),
    ("run", "--tokens", "0", "tokens=0"),
    ("run", "--seed", "-1", "seed=-1"),
    ("run", "--batch-size", "0", "batch_size=0"),
    ("run", "--set", "fraction=-0.5", "fraction=-0.5"),
    ("run", "--set", "fraction=NaN", "fraction=nan"),
    ("run", "--set", "fraction=Infinity", "fraction=inf"),
    ("run", "--set", "fraction=true", "fraction=True"),
    ("run", "--dtype", "int8", "dtype='int8'"),
    ("compare", "--seeds", "0", "controls=0"),
    ("compare", "--retain-drop", "nan", "retain_drop=nan"),
    ("compare", "--skill", "run.json=c.txt", "'run.json' cannot name a skill"),
    ("compare", "--tokens", "1", "tokens=1"),
    ("graph", "--seeds", "1", "seeds=1"),
    ("graph", "--fraction", "-1", "fraction=-1"),
    ("graph", "--skill", "base=c.txt", "'base' cannot name a skill"),
    ("graph", "--metric", "kl", "metric='kl'"),
    ("collect", "--tokens", "-5", "tokens=-5"),
    ("collect", "--window", "0", "window=0"),
    ("collect", "--batch-size", "0", "batch_size=0"),
    ("evaluate", "--answers", "-1", "answers=-1"),
    ("evaluate", "--max-new-tokens", "0", "max_new_tokens=0"),
    ("evaluate", "--task-limit", "0", "task_limit=0"),
    ("evaluate", "--seed", "-1", "seed=-1"),
    ("generate", "--temperature", "nan", "temperature=nan"),
    ("generate", "--max-new-tokens", "0", "max_new_tokens=0"),
    ("demo", "--tokens", "0", "tokens=0"),
    ("audit", "--seed", "-1", "seed=-1"),
    ("audit", "--batch-size", "0", "batch_size=0"),
    ("bench", "--rows", "0", "rows=0"),
    ("bench", "--seed", "-1", "seed=-1"),
    ("check", "--dtype", "int8", "dtype='int8'"),
]


@pytest.mark.parametrize(("command", "option", "value", "words"), WRONG)
def test_on_the_command_line_it_is_one_sentence_before_a_model_is_loaded(
    command: str, option: str, value: str, words: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was to be loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "boot", loaded)
    out = [] if command in ("generate", "check") else ["--out", tmp_path / "out.safetensors"]
    assert call(*COMMANDS[command], option, value, *out) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("lens-unlearn: ")
    assert words in line
    assert not list(tmp_path.iterdir())


SIDE = tiny.corpus(seed=1)
CALLS: dict[str, Callable[[Any], Any]] = {
    "tune(retain_drop=5)": lambda model: lu.tune("selective-pruning", model, SIDE, SIDE, retain_drop=5),
    "tune(retain_drop=True)": lambda model: lu.tune("selective-pruning", model, SIDE, SIDE, retain_drop=True),
    "tune(confidence=nan)": lambda model: lu.tune("selective-pruning", model, SIDE, SIDE, confidence=math.nan),
    "tune(evaluations=0)": lambda model: lu.tune("selective-pruning", model, SIDE, SIDE, evaluations=0),
    "tune(seed=-1)": lambda model: lu.tune("selective-pruning", model, SIDE, SIDE, seed=-1),
    "sweep(fractions=[0])": lambda model: lu.sweep("selective-pruning", model, SIDE, SIDE, {}, fractions=[0]),
    "sweep(fractions=['x'])": lambda model: lu.sweep("selective-pruning", model, SIDE, SIDE, {}, fractions=["x"]),
    "selective_pruning(fraction=True)": lambda model: lu.selective_pruning(model, SIDE, SIDE, fraction=True),
    "selective_pruning(steps=True)": lambda model: lu.selective_pruning(model, SIDE, SIDE, steps=True),
    "neuron_adjust(fraction=True)": lambda model: lu.neuron_adjust(model, SIDE, SIDE, fraction=True),
    "neuron_adjust(seed=-1)": lambda model: lu.neuron_adjust(model, SIDE, SIDE, seed=-1),
    "key_space_detection(false_alarms=True)": lambda model: lu.key_space_detection(
        model, SIDE, SIDE, false_alarms=True
    ),
    "key_space_detection(alpha=inf)": lambda model: lu.key_space_detection(model, SIDE, SIDE, alpha=math.inf),
    "simu(lr=-1)": lambda model: lu.simu(model, SIDE, SIDE, lr=-1),
    "simu(rank=0)": lambda model: lu.simu(model, SIDE, SIDE, rank=0),
    "random_pruning(fraction=True)": lambda model: lu.random_pruning(model, fraction=True),
    "collect(batch_size=0)": lambda model: lu.collect(model, SIDE, batch_size=0),
    "attribute(steps=True)": lambda model: lu.attribute(model, SIDE, steps=True),
    "compare(retain_drop=5)": lambda model: lu.compare(model, {"a": SIDE, "b": SIDE}, retain_drop=5),
    "compare(controls=0)": lambda model: lu.compare(model, {"a": SIDE, "b": SIDE}, controls=0),
}


@pytest.mark.parametrize("given", CALLS)
def test_from_python_too(given: str) -> None:
    name = given.partition("(")[2].partition("=")[0]
    with pytest.raises(LensUnlearnError, match=rf"^{name}=[^\n]*: give a (whole )?number[^\n]*$"):
        CALLS[given](tiny.model("gpt2"))


@pytest.mark.parametrize("value", [True, False, math.nan, math.inf, -0.1, 1.1, "0.1", None])
def test_a_map_takes_no_truth_value_for_a_share(value: Any) -> None:
    score = lu.NeuronMap({lu.Site(0, "mlp.post"): tiny.torch.arange(8.0)})
    with pytest.raises(SelectionError, match=f"^fraction={value!r} is not a share of the neurons"):
        score.top(value)


def test_a_dtype_is_known_by_its_name() -> None:
    assert dtypes.dtype_of("bfloat16") is dtypes.dtype_of(tiny.torch.bfloat16)
    for wrong in ("int8", 3, None):
        with pytest.raises(ModelError, match="is not known: choose from float32"):
            dtypes.dtype_of(wrong)


def test_the_commands_are_those_of_the_command_line() -> None:
    names = {command.name or command.callback.__name__ for command in cli.app.registered_commands}  # type: ignore[union-attr]
    assert set(COMMANDS) | {"diff", "figure", "methods", "show", "push"} == names


def test_fields_that_came_later_do_not_tell_a_plan_from_an_earlier_one() -> None:
    """Whatever field is added: with its default, the plan is that of a run which did not have it."""
    earlier = json.loads((Path(__file__).parents[1] / "data" / "finished-run" / "run.json").read_text())["plan"]
    lists = {name: tuple(value) for name, value in earlier.items() if isinstance(value, list)}
    assert settings_of(Plan(**{**earlier, **lists})) == earlier
    assert settings_of(plan(facts=True, answer_eos=True)).keys() - earlier.keys() == {"facts", "answer_eos"}


def test_controls_share_the_documents_where_there_are_several_methods_and_enough_of_them() -> None:
    two = ("selective-pruning", "neuron-adjust")
    several = Plan("m", "f", ("r",), methods=two)
    assert several.deals
    assert not Plan("m", "f", ("r",)).deals
    assert not replace(several, controls=3).deals
    assert not replace(several, memorization=5).deals
    assert not replace(several, deal=False).deals
    assert Plan("m", "f", ("r",), deal=True, controls=2).deals
    assert "--deal-controls" in command_of(Plan("m", "f", ("r",), deal=True)).split()
    assert "--no-deal-controls" in command_of(replace(several, deal=False)).split()
    assert "deal" not in " ".join(command_of(several).split())
    assert "deal" not in settings_of(several)
    with pytest.raises(LensUnlearnError, match="--deal-controls shares the test documents"):
        replace(several, deal=True, memorization=5)
