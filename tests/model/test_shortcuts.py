"""`shortcuts`: the same values and the same hooks, from fewer modules; and the bridge is what it was afterwards."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from interventions_helpers import selection_of
from torch import Tensor, nn

from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.model import shortcuts as shortcuts_module
from lens_unlearn.model.hooks import Remover, attach, backbone, detach_all, on_forward
from lens_unlearn.model.residual import on_residual
from lens_unlearn.model.shortcuts import _may_fuse, shortcuts
from lens_unlearn.model.sites import resolve

BRIDGED = tiny.DENSE
SITES = [["mlp.pre"], ["mlp.post"], ["attn.z"], ["attn.q"], ["attn.k", "resid"], ["mlp.post", "attn.v"]]


def components(model: Any) -> int:
    """Count the parts of a bridge that a forward pass goes through."""
    return sum("_original_component" in module._modules for module in model.original_model.modules())


def tree(model: Any) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BRIDGED)
def test_without_hooks_nothing_of_the_bridge_is_left_and_the_logits_are_the_plain_models(name: str) -> None:
    model, tokens = tiny.model(name), tiny.some_tokens(2, 20)
    before, base = tree(model), tiny.logits(model, tokens)
    with shortcuts(model):
        assert components(model) == 0
        close(tiny.logits(model, tokens), tiny.logits(tiny.hugging_face(name), tokens))
    assert tree(model) == before
    assert model.original_model.config._attn_implementation == "eager"
    assert torch.equal(tiny.logits(model, tokens), base)


@pytest.mark.parametrize("name", BRIDGED)
@pytest.mark.parametrize("kinds", SITES, ids="+".join)
def test_what_is_hooked_stays_and_acts(name: str, kinds: list[str]) -> None:
    model, tokens = tiny.model(name), tiny.some_tokens(2, 20)
    ablate: Intervention = Ablate(selection_of(model, kinds), 0.3)
    base = tiny.logits(model, tokens)
    with ablate.on(model):
        expected = tiny.logits(model, tokens)
        assert not torch.allclose(expected, base, atol=1e-3)
        with shortcuts(model):
            assert components(model) > 0
            close(tiny.logits(model, tokens), expected)
    assert torch.equal(tiny.logits(model, tokens), base)


@pytest.mark.parametrize("name", ["gpt2", "neox", "opt", "llama", "qwen3", "phi3"])
def test_every_hook_point_of_the_user_fires_with_its_value(name: str) -> None:
    """One at a time, whatever it is: also those for which a whole block of the bridge has to stay."""
    model, tokens = tiny.model(name), tiny.some_tokens(2, 9)
    points = {id(point): (key, point) for key, point in model.hook_dict.items()}
    for key, point in points.values():
        seen: list[Tensor] = []
        # As a user adds it: some points fire only where TransformerLens knows of a hook.
        detach = attach(point, lambda t, seen=seen: seen.append(t) if isinstance(t, Tensor) else None)
        try:
            expected = tiny.logits(model, tokens)
            was, seen[:] = list(seen), []
            with shortcuts(model):
                logits = tiny.logits(model, tokens)
        finally:
            detach()
        close(logits, expected)
        assert len(seen) == len(was), key
        for one, other in zip(seen, was):
            if one.is_floating_point() and not torch.isinf(other).any():
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["gpt2", "neox", "phi3"])
@pytest.mark.parametrize("matrix", ["W_Q", "W_O"])
def test_edited_weights_are_those_that_are_used(name: str, matrix: str) -> None:
    """A bridge has views of fused projections, or copies, of whose edits the plain module does not know."""
    model, tokens = tiny.build(name), tiny.some_tokens(2, 9)
    base = tiny.logits(model, tokens)
    with shortcuts(model):
        assert components(model) == 0
    with torch.no_grad():
        tiny.matrix_in_place(model, 0, matrix).mul_(1.5)
    expected = tiny.logits(model, tokens)
    assert not torch.allclose(base, expected, atol=1e-3)
    with shortcuts(model):
        assert bool(components(model)) == (name == "neox" and matrix == "W_Q")
        close(tiny.logits(model, tokens), expected)


def test_it_leaves_nothing_after_an_error_and_may_be_nested() -> None:
    model = tiny.model("llama")
    before = tree(model)
    for _ in range(2):
        with shortcuts(model), shortcuts(model):
            assert components(model) == 0
    with pytest.raises(KeyboardInterrupt), shortcuts(model), shortcuts(model):
        raise KeyboardInterrupt
    assert tree(model) == before


@pytest.mark.parametrize("name", ["gpt2-compat", "llama-compat", *tiny.NATIVE, *tiny.HOOKED])
def test_elsewhere_it_does_nothing(name: str) -> None:
    model = tiny.model(name)
    before, base = tree(model), tiny.logits(model)
    with shortcuts(model):
        assert tree(model) == before
        assert torch.equal(tiny.logits(model), base)


def test_attention_that_caps_its_scores_stays_explicit() -> None:
    model = tiny.model("gemma2")
    with shortcuts(model):
        assert model.original_model.config._attn_implementation == "eager"
    with shortcuts(tiny.model("llama")):
        assert tiny.model("llama").original_model.config._attn_implementation == "sdpa"
    tiny.logits(tiny.model("llama"))


@pytest.mark.parametrize(
    ("supported", "cap", "dtype", "fused"),
    [
        (True, None, torch.float32, True),
        (True, None, torch.bfloat16, True),
        (True, 50.0, torch.float32, False),  # some versions of transformers drop the cap without a word
        (False, None, torch.float32, False),
        (True, None, torch.float64, False),
    ],
)
def test_attention_is_fused_only_where_it_stays_the_same(
    supported: bool, cap: float | None, dtype: torch.dtype, fused: bool
) -> None:
    inner = torch.nn.ParameterList([torch.zeros(2, dtype=dtype)])
    inner._supports_sdpa, inner.config = supported, SimpleNamespace(attn_logit_softcapping=cap)  # type: ignore[assignment]
    assert _may_fuse(inner) == fused


def test_a_pattern_that_is_looked_at_is_computed() -> None:
    model, tokens = tiny.model("llama"), tiny.some_tokens(1, 6)
    seen: list[Tensor] = []
    handle = model.hook_dict["blocks.1.attn.hook_pattern"].register_forward_hook(lambda m, i, o: seen.append(o))
    try:
        with shortcuts(model), torch.no_grad():
            backbone(model, tokens)
    finally:
        handle.remove()
    assert [tuple(pattern.shape) for pattern in seen] == [(1, 4, 6, 6)]
    assert resolve(model, "mlp.post")


@pytest.mark.parametrize("name", ["gpt2", "neox", "phi3", "llama", "qwen3"])
def test_attention_is_fused_where_only_its_output_map_is_hooked(name: str) -> None:
    """Also where q, k and v are one projection, and the bridge keeps its output map beside the plain attention."""
    model, tokens = tiny.model(name), tiny.some_tokens(2, 9)
    before, points = tree(model), resolve(model, "attn.z")
    seen: list[Tensor] = []
    handles = [point.hook.register_forward_hook(lambda m, i, o: seen.append(o)) for point in points.values()]
    try:
        backbone(model, tokens)
        was, seen[:] = list(seen), []
        with shortcuts(model):
            assert model.original_model.config._attn_implementation == "sdpa"
            backbone(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == len(was) == tiny.LAYERS
    for one, other in zip(seen, was):
        close(one, other)
    assert tree(model) == before


@pytest.mark.parametrize("name", BRIDGED)
def test_where_a_pass_begins_is_known_before_anything_acts_and_keeps_nothing_of_the_bridge(name: str) -> None:
    """As an intervention that looks at rows knows it: only the unembedding stays, and attention is fused as without one."""
    model, tokens = tiny.model(name), tiny.some_tokens(2, 9)
    before, seen, first = tree(model), list[Any](), {model.embed, model.blocks[0]}
    removers: list[Remover] = []
    try:
        on_residual(model, [0], lambda layer, stream: seen.append("stream"), removers)
        on_forward(model, lambda ids, cached: seen.append((None if ids is None else ids.clone(), cached)), removers)
        with shortcuts(model) as out:
            assert first <= set(out) or name == "opt"  # whose block stays where something inside it is hooked
            for text in (tokens, tokens[:, :5]):
                seen.clear()
                backbone(model, text)
                (ids, cached), stream = seen
                assert torch.equal(ids, text)
                assert (cached, stream) == (0, "stream")
        seen.clear()
        backbone(model, tokens)
        assert len(seen) == 2
    finally:
        detach_all(removers)
    assert tree(model) == before


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_what_is_bypassed_is_the_same_where_the_model_was_like_this_before(name: str) -> None:
    """Random hooks, in the order in which conditions come: remembered decisions are those of a fresh look."""
    model, draw = tiny.model(name), random.Random(0)
    points = [*model.hook_dict.values(), *model.original_model.modules()]
    states = [draw.sample(range(len(points)), count) for count in (0, 1, 1, 2, 3, 5)]

    def bypassed(state: list[int]) -> dict[nn.Module, nn.Module]:
        handles = [points[place].register_forward_hook(lambda *_: None) for place in state]
        try:
            with shortcuts(model) as found:
                return dict(found)
        finally:
            for handle in handles:
                handle.remove()

    fresh = []
    for state in states:
        shortcuts_module._plans.clear()
        fresh.append(bypassed(state))
    assert len({frozenset(found) for found in fresh}) > 2, "hooks make a difference"
    shortcuts_module._plans.clear()
    for _ in range(3):
        for place in draw.sample(range(len(states)), len(states)):
            assert bypassed(states[place]) == fresh[place]
    assert len(shortcuts_module._plans[model.original_model]) == len({tuple(sorted(state)) for state in states})


EDITS = {
    "in place": lambda weight: weight.mul_(1.5),
    "in place, not counted": lambda weight: weight.data.mul_(1.5),
    "one value, not counted": lambda weight: weight.data[2, 3].add_(3.0),
    "rows that change places": lambda weight: weight.copy_(weight.roll(5, 0)),
    "columns that change places": lambda weight: weight.data.copy_(weight.data.roll(8, 1)),
    "another tensor": lambda weight: setattr(weight, "data", weight.data * 1.5),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "phi3"])
def test_an_edit_of_a_weight_is_heeded_by_the_next_pass(name: str, edit: str) -> None:
    """Copies of fused weights are looked at anew, also where the memory of before is given out again and nothing counts."""
    with tiny.quiet():
        model = tiny.build(name)
    tokens = tiny.some_tokens(2, 9)
    edited = next(iter(model.blocks[0].attn.q.parameters()))

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        with shortcuts(model):
            found = model(tokens, return_type="logits")
        return found, model(tokens, return_type="logits")

    with torch.no_grad():
        before, _ = both()
        for _ in range(4):
            EDITS[edit](edited)
            found, expected = both()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(expected, before, atol=1e-3)
            before = expected
