"""`Reroute`: equal to a model from which the experts were removed, on every family."""

from typing import Any

import moe
import pytest
import tiny
import torch

from lens_unlearn.core.errors import SelectionError, SiteError
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.interventions.reroute import Reroute, whole_experts
from lens_unlearn.model.sites import Site, extra_points, resolve
from lens_unlearn.neurons.collect import collect

GROUPED = ["deepseek-v2", "deepseek-v3"]
REROUTED = [name for name in moe.CONFIGS if name not in GROUPED]

pytestmark = pytest.mark.filterwarnings("ignore:mlp.* is the dense half:RuntimeWarning")


def without(name: str, expert: int) -> Any:
    """Return a bridge of a model that never had an expert: its rows are taken out of every weight, in all layers."""
    plain = moe.plain(name)
    kept = [e for e in range(moe.EXPERTS) if e != expert]
    for experts in moe.experts_of(plain):
        owner = next(m for m in plain.modules() if experts in m.children())
        routers = [
            part for key in ("gate", "router") if key in owner._modules for part in owner._modules[key].modules()
        ]  # type: ignore[union-attr]
        for module in (owner, experts, *routers):
            for places in (module._parameters, module._buffers):
                for key, value in places.items():
                    if value is not None and moe.EXPERTS in value.shape:
                        cut = value.index_select(value.shape.index(moe.EXPERTS), torch.tensor(kept))
                        places[key] = torch.nn.Parameter(cut) if places is module._parameters else cut
            for key in ("num_experts", "n_routed_experts"):
                if getattr(module, key, None) == moe.EXPERTS:
                    setattr(module, key, len(kept))
    return moe.bridge(name, model=plain)


@pytest.mark.parametrize("name", REROUTED)
def test_it_is_a_model_without_the_expert(name: str) -> None:
    made = moe.shared(name)
    before, layers = tiny.logits(made), [site.layer for site in resolve(made, "experts.post")]
    with Reroute({layer: [2] for layer in layers}).on(made):
        rerouted = tiny.logits(made)
        load = collect(made, tiny.corpus(), "experts.post", progress=False).routed_tokens
    assert all(float(tokens[2]) == 0 and float(tokens.sum()) > 0 for tokens in load.values())
    torch.testing.assert_close(rerouted, tiny.logits(without(name, 2)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(rerouted, before, atol=1e-3)
    assert torch.equal(tiny.logits(made), before)
    assert not any(point._forward_hooks for point in extra_points(made))


@pytest.mark.parametrize("name", GROUPED)
def test_routers_of_groups_are_refused(name: str) -> None:
    with (
        pytest.raises(SiteError, match="first chooses 1 of 2 groups of experts"),
        Reroute({1: [0]}).on(moe.shared(name)),
    ):
        pass


def test_the_biases_of_a_selection_do_not_bring_an_expert_back() -> None:
    plain = moe.plain("glm4-moe")
    next(m for m in plain.modules() if "e_score_correction_bias" in m._buffers).e_score_correction_bias[2] = 100.0
    made = moe.bridge("glm4-moe", model=plain)
    always = collect(made, tiny.corpus(), "experts.post", progress=False).load
    with Reroute(["L1.experts[2]"]).on(made):
        never = collect(made, tiny.corpus(), "experts.post", progress=False).routed_tokens[Site(1, "experts.post")]
    assert float(always.flat()[2 * moe.WIDTH]) == 1
    assert float(never[2]) == 0


def test_it_composes_is_saved_and_generates(tmp_path: Any) -> None:
    made = moe.bridge("qwen3-moe")
    before = tiny.logits(made)
    both = Reroute({0: [1], 1: [3]}) + Ablate(whole_experts(made, {1: [0]}))
    both.save(tmp_path / "both.safetensors", made)
    again = load_intervention(tmp_path / "both.safetensors", made)
    assert repr(again) == repr(both)
    assert repr(both).startswith("Reroute(L0.experts[1], L1.experts[3]) + Ablate(zero, 24 of 96 neurons")
    options = {"max_new_tokens": 5, "do_sample": False, "verbose": False, "stop_at_eos": False}
    tokens = tiny.some_tokens(2, 5)
    with tiny.quiet(), both.on(made):
        expected = tiny.logits(made)
        cached = made.generate(tokens, use_past_kv_cache=True, **options)
        assert torch.equal(made.generate(tokens, use_past_kv_cache=False, **options), cached)
    with again.on(made):
        assert torch.equal(tiny.logits(made), expected)
    with pytest.raises(ZeroDivisionError), both.on(made):
        raise ZeroDivisionError
    assert torch.equal(tiny.logits(made), before)


def test_only_at_some_positions() -> None:
    made, tokens = moe.bridge("mixtral"), tiny.some_tokens(1, 6)
    before = tiny.logits(made, tokens)
    mask = torch.tensor([[False] * 4 + [True] * 2])
    with Reroute({0: [0, 1]}).on(made, at=mask):
        placed = tiny.logits(made, tokens)
    torch.testing.assert_close(placed[:, :4], before[:, :4], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(placed[:, 4:], before[:, 4:])


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ({}, "no expert was named"),
        ([], "no expert was named"),
        (["L1.experts.post"], r"'L1\.experts\.post' names no expert: write it as 'L3\.experts\[17\]'"),
        ([3], "3 names no expert"),
        ({0: [-1]}, "are no experts: give whole numbers by layer"),
        ({0: [1.5]}, "are no experts"),
    ],
)
def test_what_names_no_expert_is_refused(experts: Any, words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        Reroute(experts)


def test_experts_that_a_model_does_not_have_are_refused() -> None:
    made = moe.shared("qwen3-moe")
    for wanted, words in (
        ({0: [4]}, r"there is no L0\.experts\[4\]: that layer has 4 experts, 0 to 3"),
        ({0: [0, 1, 2]}, "of 4 experts in layer 0, 1 are left, and a token is routed to 2: reroute fewer"),
    ):
        with pytest.raises(SelectionError, match=words), Reroute(wanted).on(made):
            pass
    with pytest.raises(SelectionError, match=r"there is no L1\.experts\[9\]"):
        whole_experts(made, ["L1.experts[9]"])
    with pytest.raises(SelectionError, match="is not inside routed experts"):
        whole_experts(made, {0: 1}, "attn.z")
    with pytest.raises(SiteError, match="its layers are 0 to 1"), Reroute({7: [0]}).on(made):
        pass
    with (
        pytest.raises(SiteError, match=r"no .*experts\.router|experts\.router does not exist"),
        Reroute({0: [0]}).on(tiny.model("llama")),
    ):
        pass
