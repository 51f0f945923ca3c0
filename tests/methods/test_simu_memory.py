"""SIMU in less memory: `memory="low"` trains the same update, and no gradient is larger than what is trained."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from simu_helpers import FORGET, QUICK, RETAIN, some_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lens_unlearn as lu
from lens_unlearn import Delta
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.methods import training
from lens_unlearn.methods.simu import simu
from lens_unlearn.model import unembedding as ends

DEFAULT: dict[str, Any] = {"steps": 3, "check_every": 2, "batch_size": 3, "progress": False, "mask": some_rows()}


@pytest.fixture(scope="module")
def exact() -> Any:
    return tiny.to_bridge(tiny.hugging_face("gpt2").double(), "gpt2")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens' logits stand at a time where memory is short."""
    monkeypatch.setattr(ends, "FEW", 0)
    monkeypatch.setattr(ends, "FEW_POSITIONS", 2)


def require_same(found: Delta, expected: Delta, atol: float) -> None:
    assert found.updates.keys() == expected.updates.keys()
    for matrix, update in expected.updates.items():
        for name, tensor in update.tensors().items():
            torch.testing.assert_close(found.updates[matrix].tensors()[name], tensor, rtol=0, atol=atol)
    assert found.record["critical"] == expected.record["critical"]
    assert found.record["checks"] == expected.record["checks"]
    assert found.record["settings"] == expected.record["settings"] | {"memory": "low"}


@pytest.mark.parametrize(
    "options",
    [
        {**QUICK, "mask": "dual", "steps": 3},
        {**QUICK, "mask": some_rows(), "steps": 3, "curvature": "hutchinson"},
        {"mask": some_rows(), "loss": "kl", "accumulation": 2, "unseen": RETAIN},
        {"mask": some_rows(), "loss": "undial", "attention": "none"},
        {"mask": some_rows(), "loss": "npo", "inner": True},
    ],
)
def test_low_memory_trains_the_same_update(exact: Any, few: None, options: dict[str, Any]) -> None:
    expected = simu(exact, FORGET, RETAIN, **{**DEFAULT, **options})
    hooks = tiny.hooks_of(exact)
    found = simu(exact, FORGET, RETAIN, **{**DEFAULT, **options}, memory="low")
    require_same(found, expected, atol=1e-9)
    assert tiny.hooks_of(exact) == hooks


@pytest.mark.parametrize("each", ["llama", *tiny.HOOKED[:1]])
@pytest.mark.filterwarnings("ignore:less than 10% of what")
def test_so_it_does_in_single_precision_and_other_models(each: str, few: None) -> None:
    model = tiny.model(each)
    options: dict[str, Any] = {**DEFAULT, "mask": "dual", "steps": 2}
    expected = simu(model, FORGET, RETAIN, **options)
    require_same(simu(model, FORGET, RETAIN, memory="low", **options), expected, atol=1e-5)


def test_so_it_does_where_another_intervention_looks_at_rows(exact: Any, few: None) -> None:
    around = lu.Ablate(some_rows(seed=5))
    with around.on(exact, at="prompt"):
        expected = simu(exact, FORGET, RETAIN, **DEFAULT)
        found = simu(exact, FORGET, RETAIN, memory="low", **DEFAULT)
    require_same(found, expected, atol=1e-9)
    with pytest.raises(AssertionError):
        require_same(found, simu(exact, FORGET, RETAIN, **DEFAULT), atol=1e-9)  # it acted


def test_a_training_goes_on_in_less_memory(exact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, options = tmp_path / "going.safetensors", {**DEFAULT, "steps": 4}
    expected = simu(exact, FORGET, RETAIN, **options)
    simu(exact, FORGET, RETAIN, checkpoint=str(path), **{**options, "steps": 2})
    require_same(simu(exact, FORGET, RETAIN, checkpoint=str(path), memory="low", **options), expected, atol=1e-9)


def test_another_memory_is_refused() -> None:
    with pytest.raises(LensUnlearnError, match="memory='little' is not known: choose from default, low"):
        simu(tiny.model("gpt2"), FORGET, RETAIN, **DEFAULT, memory="little")  # type: ignore[arg-type]
    with pytest.raises(LensUnlearnError, match="memory='little' is not known: choose from default, low"):
        lu.attribute(tiny.model("gpt2"), FORGET, memory="little")  # type: ignore[arg-type]


class Made(TorchDispatchMode):
    """Notes the shapes of all matrices that are computed."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights, self.shapes = weights, set[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in self.weights:
                self.shapes.add(tuple(one.shape))
        return out


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("optimizer", ["sophia", "adamw"])
def test_of_a_matrix_gradients_and_state_are_of_the_trained_rows_alone(
    memory: Any, optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tiny.quiet():
        model = tiny.build("gpt2")
    weights = list(model.parameters())
    for weight in weights:
        weight.requires_grad_(True)
    matrix = (64, 32)  # W_out
    places = {weight.untyped_storage().data_ptr() for weight in weights}
    with Made(places) as made:
        model(torch.arange(8)[None], return_type="logits").sum().backward()
    assert matrix in made.shapes  # the gradient of all of it would be seen
    model.zero_grad()
    step = training.Training._step

    def watched(self: Any) -> None:
        with made:
            step(self)

    made.shapes.clear()
    monkeypatch.setattr(training.Training, "_step", watched)
    options: dict[str, Any] = {**DEFAULT, "mask": some_rows(0.05), "attention": "none", "optimizer": optimizer}
    found = simu(model, FORGET, RETAIN, memory=memory, **options)
    assert made.shapes & {tuple(update.value.shape) for update in found.updates.values()}
    assert not made.shapes & {matrix, matrix[::-1]}
    with made:
        lu.attribute(model, FORGET, memory=memory, progress=False)
    assert not made.shapes & {matrix, matrix[::-1]}
    assert all(weight.grad is None and weight.requires_grad for weight in weights)
