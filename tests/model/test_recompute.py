"""Gradients of blocks that are run twice, and beside frozen weights, are those of a plain pass that keeps everything."""

import weakref
from typing import Any

import families
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from lens_unlearn.core.errors import ModelError
from lens_unlearn.corpora.corpus import Batch
from lens_unlearn.evaluation.teacher_forcing import predict
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.update import Update
from lens_unlearn.model import unembedding as ends
from lens_unlearn.model.matrices import Matrix, matrix_shape
from lens_unlearn.model.recompute import frozen

EVERY = [*tiny.ALL, "mixtral"]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens' logits stand at a time where memory is short."""
    monkeypatch.setattr(ends, "FEW", 0)
    monkeypatch.setattr(ends, "FEW_POSITIONS", 3)


def batch_of(tokens: Tensor | None = None) -> Batch:
    tokens = tiny.some_tokens(2, 9) if tokens is None else tokens
    counted = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) > 0.3
    return Batch.of(list(tokens), list(counted), range(len(tokens)))


def updates_of(model: Any, name: str = "W_O") -> tuple[Delta, list[Tensor]]:
    """Updates of a matrix of every layer that are not zero."""
    generator = torch.Generator().manual_seed(1)
    shapes = {Matrix(layer, name): matrix_shape(model, layer, name) for layer in range(tiny.LAYERS)}
    updates = {
        matrix: Update((torch.randn(shape, generator=generator) / 20).requires_grad_())
        for matrix, shape in shapes.items()
    }
    return Delta(updates), [update.value for update in updates.values()]


class Saved:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept(batch: Batch, model: Any, trained: list[Tensor], **options: Any) -> tuple[list[Tensor], int]:
    """Return the gradients of a pass, and how many numbers autograd kept for them beside parameters."""
    held: weakref.WeakSet[Saved] = weakref.WeakSet()  # what a graph inside the pass saved is gone at its end

    def pack(tensor: Tensor) -> Saved:
        held.add(saved := Saved(tensor))
        return saved

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = predict(model, batch, **options).nll().mean()
    storages = {saved.tensor.untyped_storage().data_ptr(): saved.tensor.untyped_storage().nbytes() for saved in held}
    numbers = sum(size // 4 for address, size in storages.items() if address not in weights)
    return list(torch.autograd.grad(loss, trained)), numbers


@pytest.mark.parametrize("each", EVERY)
def test_gradients_are_those_of_a_plain_pass(each: str) -> None:
    model, batch = tiny.model(each), batch_of()
    delta, trained = updates_of(model)
    where = batch.counted[:, 1:]
    with delta.on(model):
        logits = model(batch.tokens, return_type="logits")[:, :-1][where]
        expected = torch.autograd.grad(F.cross_entropy(logits, batch.tokens[:, 1:][where]), trained)
        with frozen(model, recompute=True):
            found, few = kept(batch, model, trained, recompute=True)
            _, many = kept(batch, model, trained)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert few < many / 2


@pytest.mark.parametrize("each", ["gpt2", "llama", *tiny.HOOKED[:1]])
def test_frozen_weights_leave_less_to_keep_and_are_as_before(each: str) -> None:
    with tiny.quiet():
        model = tiny.build(each)
    parameters = list(model.parameters())
    for number, parameter in enumerate(parameters):
        parameter.requires_grad_(number % 3 > 0)
    delta, trained = updates_of(model)
    with delta.on(model):
        expected, many = kept(batch_of(), model, trained)
        with frozen(model):
            found, few = kept(batch_of(), model, trained)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

        def interrupted() -> None:
            with frozen(model), frozen(model, recompute=True):
                assert not any(parameter.requires_grad for parameter in parameters)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
    assert few < many
    assert [parameter.requires_grad for parameter in parameters] == [
        number % 3 > 0 for number in range(len(parameters))
    ]
    assert all(parameter.grad is None for parameter in parameters)


def test_a_hook_inside_a_block_acts_in_both_runs_and_one_behind_it_in_one() -> None:
    model, batch, seen = tiny.model("gpt2"), batch_of(), []
    delta, trained = updates_of(model)

    def hook(name: str) -> Any:
        return lambda tensor, hook: (seen.append(name), tensor * 1.5)[1]

    places = [("blocks.1.mlp.hook_post", hook("inside")), ("blocks.0.hook_resid_post", hook("behind"))]
    with delta.on(model), model.hooks(fwd_hooks=places), frozen(model, recompute=True):
        expected, _ = kept(batch, model, trained)
        seen.clear()
        found, _ = kept(batch, model, trained, recompute=True)
    assert (seen.count("inside"), seen.count("behind")) == (2, 1)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(not families.usable("recurrent-gemma"), reason="an architecture that this TransformerLens lacks")
def test_a_block_that_keeps_a_state_is_refused() -> None:
    model = families.bridge("recurrent-gemma")
    delta, trained = updates_of(model, "W_out")
    with delta.on(model), pytest.raises(ModelError, match="leave out memory='low'"), frozen(model, recompute=True):
        kept(batch_of(families.tokens()), model, trained, recompute=True)
