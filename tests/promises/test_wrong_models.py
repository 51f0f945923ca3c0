"""What stands in the model's place without being one is refused first of all, in one sentence that says what to pass."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import lens_unlearn as lu
from lens_unlearn.core.errors import LensUnlearnError, ModelError
from lens_unlearn.evaluation.harness import HarnessModel
from lens_unlearn.testing import check_intervention


@functools.cache
def _plain() -> Any:
    return tiny.hugging_face("gpt2")


class _HalfAModel:
    cfg, hook_dict = None, {}


WRONG: dict[str, Callable[[], Any]] = {
    "a name": lambda: "gpt2",
    "a path": lambda: Path("models") / "gpt2",
    "nothing": lambda: None,
    "a number": lambda: 3,
    "an object": object,
    "a plain Hugging Face model": _plain,
    "a module": lambda: torch.nn.Identity(),
    "a class": lambda: torch.nn.Identity,
    "what only has the names": _HalfAModel,
}


def _takes_a_model(function: Any) -> bool:
    given = inspect.signature(function).parameters.get("model")
    return given is not None and given.default is inspect.Parameter.empty


FUNCTIONS = {
    name: function
    for name in lu.__all__
    if inspect.isfunction(function := getattr(lu, name)) and _takes_a_model(function)
}


def _edit() -> Any:
    site = lu.Site(0, "mlp.post")
    return lu.Ablate(lu.NeuronMap({site: torch.ones(4, dtype=torch.bool)}))


def _with_methods() -> dict[str, Callable[[Any], Any]]:
    """The functions, with whatever else they need left empty, and the methods of objects that take a model."""

    def call(function: Any) -> Callable[[Any], Any]:
        needed = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
        return lambda wrong: function(**{name: wrong if name == "model" else None for name in needed})

    calls = {name: call(function) for name, function in FUNCTIONS.items()}
    calls |= {
        "Intervention.on": lambda wrong: _edit().on(wrong).__enter__(),
        "Intervention.merge_into": lambda wrong: _edit().merge_into(_plain(), wrong),
        "Delta.from_ablation": lambda wrong: lu.Delta.from_ablation(_edit(), wrong),
        "Corpus.check": lambda wrong: tiny.corpus().check(wrong),
        "HarnessModel": HarnessModel,
        "check_intervention": lambda wrong: check_intervention(_edit(), wrong),
    }
    return calls


CALLS = _with_methods()


def test_every_public_function_that_takes_a_model_is_looked_at() -> None:
    assert set(FUNCTIONS) >= {
        "collect", "evaluate", "generate", "tune", "sweep", "relearn", "attribute", "membership", "compare", "read_corpus",
        "fingerprint", "top_examples", "token_losses", "key_space", "selective_pruning", "neuron_adjust",
        "key_space_detection", "simu",
    }  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_model_is_refused_saying_what_to_pass(name: str) -> None:
    named = ("a name", "a path") if name == "run" else ()  # as on the command line, it takes these for a model
    for wrong in (wrong for what, wrong in WRONG.items() if what not in named):
        with pytest.raises(ModelError, match=r"^[^\n]*pass [^\n]*lens_unlearn\.load_model[^\n]*$"):
            CALLS[name](wrong())


def test_a_name_is_given_back_in_what_to_pass() -> None:
    with pytest.raises(
        ModelError, match=r"^'gpt2' is a name, and has no hook points: pass lens_unlearn\.load_model\('gpt2'\)$"
    ):
        lu.collect("gpt2", tiny.corpus())
    with pytest.raises(ModelError, match=r"^None has no hook points: pass "):
        lu.generate(None, "the")
    with pytest.raises(ModelError, match=r"^a plain GPT2LMHeadModel has no hook points"):
        lu.evaluate(_plain(), {"a": tiny.corpus()}, {})


def test_files_with_a_wrong_model_are_not_written(tmp_path: Path) -> None:
    for wrong in ("gpt2", 3, torch.nn.Identity()):
        with pytest.raises(ModelError, match="pass"):
            _edit().save(tmp_path / "edit.safetensors", wrong)
        with pytest.raises(ModelError, match="pass"):
            lu.push_to_hub(_edit(), "somebody/a", model=wrong)
    assert not list(tmp_path.iterdir())
    _edit().save(tmp_path / "edit.safetensors", tiny.model("gpt2"))
    with pytest.raises(ModelError, match="pass"):
        lu.load_intervention(tmp_path / "edit.safetensors", "gpt2")


@pytest.mark.parametrize("wrong", [None, 3, "", ["gpt2"], torch.nn.Identity(), torch.nn.Identity, b"gpt2"], ids=repr)
def test_what_is_no_name_is_not_loaded(wrong: Any) -> None:
    with pytest.raises(LensUnlearnError, match="is no (name of a model|Hugging Face model): give "):
        lu.load_model(wrong)
