"""Neurons inside routed experts: every family against plain PyTorch, and every promise of hooks."""

import copy
import threading
from collections.abc import Iterator
from typing import Any

import moe
import pytest
import tiny
import torch
from sites_helpers import values_seen

from lens_unlearn.core.errors import ActivationError, ModelError, SelectionError, SiteError
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.interventions.reroute import Reroute
from lens_unlearn.model.hooks import attach, detach_all
from lens_unlearn.model.sites import Site, extra_points, resolve
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.moments import Moments
from lens_unlearn.testing import check_intervention

IN_TABLE = [name for name in moe.CONFIGS if name != "llama4"]
WAYS = ["grouped_mm", "batched_mm", "eager"]

pytestmark = pytest.mark.filterwarnings("ignore:mlp.* is the dense half:RuntimeWarning")


@pytest.fixture(params=list(moe.CONFIGS))
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    made = moe.shared(request.param)
    assert not any(point.fwd_hooks or point._forward_hooks for point in extra_points(made))
    assert not any(str(config._experts_implementation).startswith("lens") for config in configs(made))


def configs(made: Any) -> list[Any]:
    return [made.original_model.config, *(m.config for m in moe.experts_of(made) if hasattr(m, "has_gate"))]


def some_neurons(made: Any, kind: str = "experts.post", seed: int = 0) -> NeuronMap:
    generator = torch.Generator().manual_seed(seed)
    return NeuronMap(
        {
            site: torch.rand(point.experts, point.shape[0] // point.experts, generator=generator) < 0.3
            for site, point in resolve(made, kind).items()
        }
    )


def masks(selection: NeuronMap) -> list[torch.Tensor]:
    return [chosen for _, chosen in selection.shaped()]


def edited(name: str, selection: NeuronMap, way: str | None = None) -> torch.Tensor:
    """Return the logits of a bridge whose weights were edited before it was made."""
    plain = moe.plain(name)
    moe.zero_columns(plain, masks(selection))
    if way is not None:
        plain.set_experts_implementation(way)
    return tiny.logits(moe.bridge(name, model=plain))


def test_values_are_those_of_plain_pytorch(name: str) -> None:
    made, tokens = moe.shared(name), tiny.some_tokens(3, 9)
    kinds = ["experts.pre", "experts.post"] + (["experts.pre_linear"] if name != "nemotron-h" else [])
    seen = values_seen(made, kinds, tokens, whole=True)
    expected = moe.values(moe.plain(name), tokens)
    layers = sorted({site.layer for site in seen})
    assert len(layers) == len(expected)
    for site, value in seen.items():
        ours = value.reshape(-1, moe.EXPERTS, moe.WIDTH)
        plain = expected[layers.index(site.layer)][site.kind.removeprefix("experts.")]
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
        assert bool((ours != 0).any())
        assert bool((ours == 0).any())


def test_an_ablation_is_the_edit_of_the_weights_bitwise(name: str) -> None:
    made = moe.shared(name)
    before, selection = tiny.logits(made), some_neurons(made)
    with Ablate(selection).on(made):
        ablated = tiny.logits(made)
    assert torch.equal(ablated, edited(name, selection))
    assert not torch.equal(ablated, before)
    assert torch.equal(tiny.logits(made), before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "nemotron-h"])
def test_it_is_so_under_every_implementation(name: str, way: str) -> None:
    made = moe.bridge(name)
    made.original_model.set_experts_implementation(way)
    before, selection = tiny.logits(made), some_neurons(made)
    with Ablate(selection).on(made):
        assert torch.equal(tiny.logits(made), edited(name, selection, way))
    assert torch.equal(tiny.logits(made), before)
    assert {config._experts_implementation for config in configs(made)} == {way}


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "llama4"])
def test_in_half_precision_too(name: str) -> None:
    plain, zeroed = moe.plain(name).bfloat16(), moe.plain(name).bfloat16()
    made = moe.bridge(name, model=plain)
    before, selection = tiny.logits(made), some_neurons(made)
    moe.zero_columns(zeroed, masks(selection))
    with Ablate(selection).on(made):
        assert torch.equal(tiny.logits(made), tiny.logits(moe.bridge(name, model=zeroed)))
    assert torch.equal(tiny.logits(made), before)
    moments = collect(made, tiny.corpus(), "experts.post", progress=False)
    exact = collect(moe.shared(name), tiny.corpus(), "experts.post", progress=False)
    site = moments.sites[0]
    torch.testing.assert_close(moments.rms[site].mean(), exact.rms[site].mean(), rtol=0.1, atol=0.01)


def test_a_hook_that_changes_nothing_changes_no_bit(name: str) -> None:
    made, plain = moe.shared(name), moe.plain(name)
    plain.set_experts_implementation("eager")
    expected, before = tiny.logits(moe.bridge(name, model=plain)), tiny.logits(made)
    kinds = ["experts.pre", "experts.post"]
    removers: list[Any] = []
    for point in resolve(made, kinds).values():
        attach(point.hook, lambda t: t.clone(), removers)
    try:
        assert torch.equal(tiny.logits(made), before)
        torch.testing.assert_close(before, expected, rtol=1e-5, atol=1e-5)  # another way to compute them
    finally:
        detach_all(removers)


@pytest.mark.parametrize("name", ["gpt-oss", "mixtral", "nemotron-h", "llama4"])
def test_so_many_keys_are_activated_at_a_time_as_without_hooks(name: str) -> None:
    """Of what does not fill a vector of the processor, the last bit depends on it; on some processors no logits show it."""
    made = moe.bridge(name)
    if name != "llama4":
        made.original_model.set_experts_implementation("eager")
    points = resolve(made, ["experts.pre", "experts.post"])  # which runs a few tokens
    sizes: set[int] = set()
    for module in moe.experts_of(made):
        if hasattr(module, "act_fn"):
            module.act_fn.register_forward_pre_hook(lambda _, args: sizes.add(args[0].numel()))
        else:
            gate = module._apply_gate
            module._apply_gate = lambda x, gate=gate: (sizes.add(x.numel()), gate(x))[1]
    tiny.logits(made)
    without = set(sizes)
    sizes.clear()
    removers: list[Any] = []
    for point in points.values():
        attach(point.hook, lambda t: t.clone(), removers)
    tiny.logits(made)
    detach_all(removers)
    assert sizes == without != set()


def test_moments_are_those_of_a_float64_model(name: str) -> None:
    made, corpus = moe.shared(name), tiny.corpus(uncounted=0.3)
    kinds = ["experts.pre", "experts.post"]
    moments = collect(made, corpus, kinds, statistic=Moments(extra=("sqrt", "extrema")), batch_size=2, progress=False)
    plain = moe.plain(name).double()
    plain.set_experts_implementation("eager")  # no other knows float64
    parts: list[list[dict[str, torch.Tensor]]] = []
    for start, end in zip(corpus.starts, corpus.starts[1:], strict=False):
        counted, layers_of = corpus.counted[start:end], moe.values(plain, corpus.tokens[start:end][None].long())
        parts.append([{kind: value[counted] for kind, value in layer.items()} for layer in layers_of])
    layers = sorted({site.layer for site in moments.sites})
    for site in moments.sites:
        rows = [part[layers.index(site.layer)] for part in parts]
        x = torch.cat([row[site.kind.removeprefix("experts.")] for row in rows]).flatten(1)
        gates = torch.cat([row["gate"] for row in rows])
        close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(moments.mean[site], x.mean(0), **close)
        torch.testing.assert_close(moments.std[site], x.std(0, correction=0), **close)
        torch.testing.assert_close(moments.mean_abs[site], x.abs().mean(0), **close)
        torch.testing.assert_close(moments.rms[site], x.square().mean(0).sqrt(), **close)
        torch.testing.assert_close(moments.positive[site], (x > 0).double().mean(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(moments.mean_sqrt[site], x.abs().sqrt().mean(0), **close)
        torch.testing.assert_close(moments.min[site], x.amin(0), **close)
        torch.testing.assert_close(moments.max[site], x.amax(0), **close)
        torch.testing.assert_close(moments.routed_tokens[site], (gates != 0).double().sum(0), rtol=0, atol=0)
        torch.testing.assert_close(moments.gate_sums[site], gates.sum(0), **close)
        routed = (gates != 0).double().sum(0).clamp_min(1)[:, None]
        means = (x.view(-1, moe.EXPERTS, moe.WIDTH).sum(0) / routed).flatten()
        torch.testing.assert_close(moments.mean_given_routed[site], means, **close)


# --- what every hook promises -------------------------------------------------------------------------------------------


@pytest.fixture
def made() -> Iterator[Any]:
    """A bridge of its own, looked at afterwards: no hook, implementation or module hook may remain."""
    model = moe.bridge("qwen3-moe")
    before, hooks = tiny.logits(model), tiny.hooks_of(model)
    yield model
    assert not any(point._forward_hooks or point.fwd_hooks for point in extra_points(model))
    assert {config._experts_implementation for config in configs(model)} == {"grouped_mm"}
    assert tiny.hooks_of(model) == hooks
    assert torch.equal(tiny.logits(model), before)


def test_blocks_nest_and_end_in_any_order_and_by_exceptions(made: Any) -> None:
    first, second = some_neurons(made), some_neurons(made, seed=1)
    outer, inner = Ablate(first).on(made), Ablate(second).on(made)
    outer.__enter__()
    inner.__enter__()
    assert torch.equal(tiny.logits(made), edited("qwen3-moe", first | second))
    outer.__exit__(None, None, None)
    assert torch.equal(tiny.logits(made), edited("qwen3-moe", second))
    inner.__exit__(None, None, None)
    with pytest.raises(ZeroDivisionError), Ablate(first).on(made), Ablate(second).on(made):
        raise ZeroDivisionError


def test_an_exception_in_a_hook_leaves_nothing(made: Any) -> None:
    def fail(t: torch.Tensor) -> None:
        raise ZeroDivisionError

    removers: list[Any] = []
    point = resolve(made, "L1.experts.post")[Site(1, "experts.post")]
    attach(point.hook, fail, removers)
    with pytest.raises(ZeroDivisionError):
        tiny.logits(made)
    detach_all(removers)


def test_other_threads_are_refused_inside_and_see_the_model_as_it_was_after(made: Any) -> None:
    selection, found = some_neurons(made), list[Any]()

    def other() -> None:
        try:
            with Ablate(selection).on(made):
                found.append("entered")
        except ModelError as error:
            found.append(error)

    with Ablate(selection).on(made):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(found) == 1
    assert isinstance(found[0], ModelError)


def test_generation_with_a_cache_is_generation_without(made: Any) -> None:
    tokens = tiny.some_tokens(2, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with tiny.quiet(), Ablate(some_neurons(made)).on(made):
        cached = made.generate(tokens, use_past_kv_cache=True, **options)
        assert torch.equal(made.generate(tokens, use_past_kv_cache=False, **options), cached)
    plain = moe.plain("qwen3-moe")
    moe.zero_columns(plain, masks(some_neurons(made)))
    with torch.no_grad():
        expected = tokens
        for _ in range(6):
            expected = torch.cat([expected, plain(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, expected)


def test_a_copy_made_inside_a_block_is_the_unedited_model(made: Any) -> None:
    with Ablate(some_neurons(made)).on(made):
        copied = copy.deepcopy(made)
    assert torch.equal(tiny.logits(copied), tiny.logits(made))
    with Ablate(some_neurons(copied)).on(copied):
        assert torch.equal(tiny.logits(copied), edited("qwen3-moe", some_neurons(made)))


def test_an_implementation_chosen_inside_a_block_stays_and_is_warned_of() -> None:
    model = moe.bridge("mixtral")
    with pytest.warns(RuntimeWarning, match="were removed inside its block"), Ablate(some_neurons(model)).on(model):
        model.original_model.set_experts_implementation("eager")
    assert {config._experts_implementation for config in configs(model)} == {"eager"}


def test_only_the_given_positions_are_ablated(made: Any) -> None:
    tokens, selection = tiny.some_tokens(2, 7), some_neurons(made)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 5:] = True
    with Ablate(selection).on(made, at=mask):
        placed = tiny.logits(made, tokens)
    before = tiny.logits(made, tokens)
    with Ablate(selection).on(made):
        everywhere = tiny.logits(made, tokens)
    # Where other positions are routed elsewhere, an expert is given another number of rows, and rounds them differently.
    torch.testing.assert_close(placed[0], before[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(placed[1, :5], before[1, :5], rtol=1e-5, atol=1e-5)
    assert not torch.equal(placed[1, 5:], before[1, 5:])
    assert not torch.equal(placed[1, 5:], everywhere[1, 5:])


@pytest.mark.parametrize("value", [0.0, 0.25, "means"])
def test_a_hook_of_tensors_does_the_same_as_one_of_routed_values(made: Any, value: Any) -> None:
    selection = some_neurons(made)
    means = collect(made, tiny.corpus(), "experts.post", progress=False).mean_given_routed
    quick = Ablate(selection, means if value == "means" else value)
    removers: list[Any] = []
    for site, point in resolve(made, "experts.post").items():
        new = means[site].float() if value == "means" else torch.tensor(value)
        attach(point.hook, lambda t, c=selection[site], v=new: torch.where(c, v, t), removers)
    try:
        slow = tiny.logits(made)
    finally:
        detach_all(removers)
    with quick.on(made):
        torch.testing.assert_close(tiny.logits(made), slow, rtol=1e-5, atol=1e-5)
        seen = values_seen(made, ["experts.post"], tiny.some_tokens(), whole=True)
    for site, x in seen.items():
        new = means[site].float() if value == "means" else torch.tensor(value)
        chosen, routed = selection[site].expand_as(x), x.unflatten(-1, (moe.EXPERTS, -1)).ne(0).any(-1, keepdim=True)
        where = (chosen & routed.expand(*routed.shape[:-1], moe.WIDTH).flatten(-2)).nonzero(as_tuple=True)
        torch.testing.assert_close(x[where], new.expand_as(x)[where], rtol=1e-4, atol=1e-6)
        assert not bool(x[(chosen & ~routed.expand(*routed.shape[:-1], moe.WIDTH).flatten(-2))].any())


def test_gradients_flow_through_hooks_of_tensors() -> None:
    """Of a neuron, the sum over tokens of value times gradient is that over its column of the weights of weight times gradient."""
    model, tokens, leaves = moe.bridge("mixtral"), tiny.some_tokens(2, 5), list[torch.Tensor]()

    def leaf(t: torch.Tensor) -> torch.Tensor:
        leaves.append(t.detach().requires_grad_())
        return leaves[-1]

    removers: list[Any] = []
    attach(resolve(model, "L1.experts.post")[Site(1, "experts.post")].hook, leaf, removers)
    try:
        logits = model(tokens)
        logits[..., 7].sum().backward()
    finally:
        detach_all(removers)
    assert torch.equal(logits.detach(), tiny.logits(model, tokens))
    assert leaves[0].grad is not None
    plain = moe.plain("mixtral")
    plain(tokens).logits[..., 7].sum().backward()
    weights = moe.experts_of(plain)[1].down_proj
    expected = (weights * weights.grad).sum(1).flatten()
    torch.testing.assert_close((leaves[0] * leaves[0].grad).sum((0, 1)), expected.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rule", ["random", "deterministic"])
def test_an_adjustment_of_routed_values_is_one_of_the_tensor_of_all(made: Any, rule: Any) -> None:
    chosen = some_neurons(made)
    maps = {
        n: chosen.map(lambda m, v=v: torch.full(m.shape, v))
        for n, v in zip(Adjust._MAPS, (0.02, 0.3, -0.05, 0.2), strict=True)
    }

    class Dense(Adjust):
        def hooks(self) -> Any:
            return [(site, lambda x, live, f=function: f(x, live)) for site, function in super().hooks()]

    before = tiny.logits(made)
    with Adjust(chosen, **maps, rule=rule).on(made):
        quick = tiny.logits(made)
    with Dense(chosen, **maps, rule=rule).on(made):
        torch.testing.assert_close(quick, tiny.logits(made), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(quick, before)


def test_a_file_of_moments_without_sensible_loads_is_refused(made: Any, tmp_path: Any) -> None:
    from lens_unlearn.core.errors import LensUnlearnError

    moments = collect(made, tiny.corpus(), "experts.post", progress=False)
    state, key = moments.state(), "L0.experts.post.routing"
    for wrong in (state[key][:, :3], state[key] + moments.n, -state[key], state[key].float(), state[key] * torch.inf):
        with pytest.raises(LensUnlearnError, match="the stored loads cannot be those of experts"):
            Moments().with_state({**state, key: wrong})


def test_a_whole_expert_ablated_is_its_projection_zeroed(made: Any) -> None:
    selection = NeuronMap({site: torch.arange(4)[:, None].expand(4, 24) == 2 for site in resolve(made, "experts.post")})
    with Ablate(selection).on(made):
        assert torch.equal(tiny.logits(made), edited("qwen3-moe", selection))


@pytest.mark.parametrize("kind", ["ablate and reroute", "adjust", "shared and pre"])
def test_the_public_battery_is_passed(kind: str) -> None:
    model = moe.bridge("qwen2-moe")
    chosen = some_neurons(model)
    if kind == "ablate and reroute":
        subject: Any = Ablate(chosen, 0.1) + Reroute({0: [1], 1: [3]})
    elif kind == "adjust":
        maps = {
            n: chosen.map(lambda m, v=v: torch.full(m.shape, v))
            for n, v in zip(Adjust._MAPS, (0.02, 1, -0.05, 0.5), strict=True)
        }
        subject = Adjust(chosen, **maps)
    else:
        shared = NeuronMap({site: torch.arange(16) % 3 == 0 for site in resolve(model, "shared.post")})
        subject = Ablate(some_neurons(model, "experts.pre")).placed("prompt") + Ablate(shared)
    results = check_intervention(subject, model, tokens=tiny.some_tokens(4, 6))
    lacking = {
        "generates_alike",
        "ignores_padding_on_the_left",
        "ignores_padding_on_the_right",
    }  # there is no tokenizer
    assert {promise for promise, seen in results.items() if seen != "kept"} <= lacking, results


def test_hooks_of_the_user_are_given_tensors_and_may_be_added_as_to_any_hook_point(made: Any) -> None:
    seen: list[torch.Size] = []
    point = resolve(made, "L1.experts.post")[Site(1, "experts.post")].hook
    point.add_hook(lambda x, hook: seen.append(x.shape))
    tiny.logits(made)
    tiny.logits(made, tiny.some_tokens(1, 3))
    assert seen == [(2, 7, 96), (1, 3, 96)]
    point.remove_hooks()
    point.settle()


def test_backward_hooks_of_the_user_are_given_the_gradient(made: Any) -> None:
    seen: list[torch.Tensor] = []
    point = resolve(made, "L1.experts.post")[Site(1, "experts.post")].hook
    embed = made.hook_dict["embed.hook_out"]
    embed.add_hook(lambda x, hook: x.detach().requires_grad_())
    point.add_hook(lambda grad, hook: seen.append(grad.clone()), dir="bwd")
    try:
        made(tiny.some_tokens(2, 5))[..., 7].sum().backward()
    finally:
        point.remove_hooks("bwd")
        point.settle()
        embed.remove_hooks()
    plain, tokens = moe.plain("qwen3-moe"), tiny.some_tokens(2, 5)
    plain(tokens).logits[..., 7].sum().backward()
    weights = moe.experts_of(plain)[1].down_proj
    value = moe.values(plain, tokens)[1]["post"].flatten(1)
    expected = (weights * weights.grad).sum(1).flatten().detach()
    torch.testing.assert_close((value * seen[0].flatten(0, 1)).sum(0), expected, rtol=1e-3, atol=1e-4)


# --- shared experts, mixed blocks, and what is refused -------------------------------------------------------------------

SHARED = {
    "qwen2-moe": "shared_expert.down_proj",
    "deepseek-v3": "shared_experts.down_proj",
    "llama4": "shared_expert.down_proj",
    "ernie4.5-moe": "shared_experts.down_proj",
    "nemotron-h": "shared_experts.down_proj",
}


@pytest.mark.parametrize("name", list(SHARED))
def test_shared_experts_are_the_input_of_their_last_matrix(name: str) -> None:
    made, plain, tokens = moe.bridge(name), moe.plain(name), tiny.some_tokens(3, 9)
    before, hooks = tiny.logits(made), tiny.hooks_of(made)
    seen = values_seen(made, ["shared.post"], tokens, whole=True)
    linears = [module for path, module in plain.named_modules() if path.endswith(SHARED[name])]
    inputs: list[torch.Tensor] = []
    handles = [m.register_forward_pre_hook(lambda m, args: inputs.append(args[0])) for m in linears]
    tiny.logits(plain, tokens)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(inputs) > 0
    for value, expected in zip(seen.values(), inputs, strict=True):
        torch.testing.assert_close(value, expected.reshape(value.shape), rtol=1e-4, atol=1e-5)
    chosen = {site: torch.arange(value.shape[-1]) % 3 == 0 for site, value in seen.items()}
    for module, mask in zip(linears, chosen.values(), strict=True):
        module.weight.data[:, mask] = 0
    with Ablate(NeuronMap(chosen)).on(made):
        assert torch.equal(tiny.logits(made), tiny.logits(moe.bridge(name, model=plain)))
    assert torch.equal(tiny.logits(made), before)
    assert tiny.hooks_of(made) == hooks


def test_shared_experts_that_the_bridge_shows_as_mlp_are_mlp_post() -> None:
    made = moe.bridge("granite-moe-hybrid")
    assert resolve(made, "mlp.post")[Site(0, "mlp.post")].shape == (16,)
    with pytest.raises(SiteError, match=r"L0\.shared\.post does not exist in this model: .* with mlp\.pre"):
        resolve(made, "shared.post")


def test_mixed_blocks_say_that_mlp_post_is_the_dense_half() -> None:
    made = moe.bridge("gemma4")
    with pytest.warns(
        RuntimeWarning, match=r"mlp\.post is the dense half of a layer that also routes tokens to 4 experts"
    ):
        points = resolve(made, ("mlp.post", "experts.post"))
    assert "the dense half" in repr(points[Site(0, "mlp.post")])
    assert points[Site(0, "mlp.post")].shape == (40,)
    assert points[Site(1, "experts.post")].shape == (96,)
    assert points[Site(1, "experts.post")].experts == 4


def test_kinds_are_expanded_to_the_layers_that_have_experts() -> None:
    assert list(resolve(moe.shared("deepseek-v3"), "experts.post")) == [Site(1, "experts.post")]


@pytest.mark.parametrize(
    ("name", "sites", "words"),
    [
        (
            "deepseek-v3",
            "L0.experts.post",
            r"L0\.experts\.post does not exist in this model: layer 0 is a .* with mlp\.pre",
        ),
        ("qwen3-moe", "L7.experts.post", "its layers are 0 to 1"),
        ("qwen3-moe", "shared.post", r"with attn\.q, .*; no other layer has shared\.post either"),
        ("nemotron-h", "experts.pre_linear", "no other layer has experts.pre_linear either"),
        ("qwen3-moe", "L0.mlp.post", "route each token to other neurons: ask for experts.post"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(name: str, sites: str, words: str) -> None:
    with pytest.raises(SiteError, match=words):
        resolve(moe.shared(name), sites)


def test_a_dense_model_has_no_experts() -> None:
    with pytest.raises(SiteError, match=r"no other layer has experts\.post either"):
        resolve(tiny.model("llama"), "experts.post")


@pytest.mark.skipif(tiny.HookedTransformer is None, reason="this TransformerLens has no HookedTransformer")
def test_transformer_lens_own_experts_are_refused_and_the_rest_works() -> None:
    settings = {**tiny._settings("llama"), "num_experts": 4, "experts_per_token": 2}
    with tiny.quiet(0):
        own = tiny.HookedTransformer(tiny.HookedTransformerConfig(**settings, seed=0)).eval()
    for kind in ("experts.post", "experts.router", "mlp.post"):
        with pytest.raises(
            SiteError, match=r"TransformerLens' own: load the model as a TransformerBridge|mixture-of-experts"
        ):
            resolve(own, kind)
    before = tiny.logits(own)
    selection = NeuronMap({site: torch.arange(32).view(4, 8) % 3 == 0 for site in resolve(own, "attn.z")})
    with Ablate(selection).on(own):
        assert not torch.equal(tiny.logits(own), before)
    assert torch.equal(tiny.logits(own), before)
    assert collect(own, tiny.corpus(), ("attn.z", "resid"), progress=False).n > 0


def test_experts_that_are_fused_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = moe.bridge("mixtral")
    monkeypatch.setattr(made.original_model.config, "_experts_implementation_internal", "sonicmoe")
    with pytest.raises(SiteError, match="'sonicmoe', which fuses the experts: call"):
        resolve(made, "experts.post")


def test_experts_outside_the_table_are_refused() -> None:
    made = moe.bridge("llama4")
    type(moe.experts_of(made)[0]).__name__ = "OwnExperts"
    try:
        with pytest.raises(SiteError, match="OwnExperts fuses its experts without transformers' table"):
            resolve(made, "experts.post")
    finally:
        type(moe.experts_of(made)[0]).__name__ = "Llama4TextExperts"


def test_experts_that_are_no_one_module_are_told_apart() -> None:
    import transformers
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "kv_channels": 8,
        "intermediate_size": 24,
    }
    config = transformers.JetMoeConfig(vocab_size=320, num_local_experts=4, max_position_embeddings=64, **sizes)
    config._attn_implementation = "eager"
    with tiny.quiet(0):
        plain = transformers.JetMoeForCausalLM(config).eval()
        model = build_bridge_from_module(
            plain, architecture="JetMoeForCausalLM", hf_config=config, tokenizer=None, device="cpu"
        )
    model.eval()
    with pytest.raises(
        SiteError, match="its JetMoeMoE computes experts outside transformers' table of implementations"
    ):
        resolve(model, "experts.post")


def test_transformers_without_the_table_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    made = moe.bridge("mixtral")
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(SiteError, match=r"does not have: install transformers>=5\.9"):
        resolve(made, "experts.post")


def test_a_map_of_another_number_of_experts_is_refused(made: Any) -> None:
    same_size = NeuronMap({Site(0, "experts.post"): torch.ones(8, 12, dtype=torch.bool)})
    with pytest.raises(SelectionError, match="4 experts of 24 neurons in this model, and 8 experts of 12"):
        Ablate(same_size).on(made).__enter__()
    with pytest.raises(SelectionError, match="4 experts of 24 neurons in this model, and 5 experts of 24"):
        Ablate(NeuronMap({Site(0, "experts.post"): torch.ones(5, 24, dtype=torch.bool)})).on(made).__enter__()
    with pytest.raises(SelectionError, match=r"the maps are of 8 and 4 experts"):
        _ = same_size & some_neurons(made)[[Site(0, "experts.post")]]


def test_a_value_that_is_not_finite_is_named(made: Any) -> None:
    broken = moe.plain("qwen3-moe")
    moe.experts_of(broken)[1].gate_up_proj.data[2, 5] = torch.inf
    with pytest.raises(ActivationError, match=r"L1\.experts\.post\[2, 5\] is"):
        collect(moe.bridge("qwen3-moe", model=broken), tiny.corpus(), "experts.post", progress=False)


# --- maps and statistics -------------------------------------------------------------------------------------------------


def test_maps_are_flat_expert_by_expert() -> None:
    site = Site(3, "experts.post")
    score = NeuronMap({site: torch.arange(12.0).view(3, 4)})
    assert score[site].shape == (12,)
    assert score.shape_of(site) == (3, 4)
    assert score.experts == {site: 3}
    for derived in (
        score * 2,
        score.top(0.5),
        ~(score > 3),
        score.sqrt(),
        score[[site]],
        score.unflatten(score.flat()),
    ):
        assert derived.experts == {site: 3}
    frame = score.to_frame()
    assert list(frame["expert"]) == [0] * 4 + [1] * 4 + [2] * 4
    assert list(frame["neuron"]) == list(range(12))
    flat = NeuronMap({site: torch.arange(12.0)})
    assert (flat + score).experts == {site: 3}
    assert flat.shape_of(site) == (12,)
    with pytest.raises(SelectionError, match="12 neurons are not those of 5 experts"):
        NeuronMap({site: torch.arange(12.0)}, experts={site: 5})


def test_statistics_do_not_depend_on_batches_and_are_saved(made: Any, tmp_path: Any) -> None:
    from lens_unlearn.neurons.collect import load_moments, save_moments

    corpus = tiny.corpus(uncounted=0.3)
    one = collect(made, corpus, "experts.post", batch_size=1, progress=False)
    all_at_once = collect(made, corpus, "experts.post", batch_size=6, progress=False)
    for a, b in zip(one.state().values(), all_at_once.state().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    save_moments(tmp_path / "moments.safetensors", one, made)
    read = load_moments(tmp_path / "moments.safetensors", made)
    assert all(torch.equal(tensor, one.state()[name]) for name, tensor in read.state().items())
    assert read.load.equals(one.load)
    assert read.mean.experts == one.mean.experts


def test_routed_values_are_counted_as_the_tensor_of_all_would_be(made: Any) -> None:
    class Dense(Moments):
        update_routed = None  # type: ignore[assignment]

        def fresh(self) -> Any:
            return Dense(extra=self.extra)

    corpus = tiny.corpus(uncounted=0.3)
    routed = collect(made, corpus, "experts.post", progress=False)
    empty: Any = Dense()
    dense = collect(made, corpus, "experts.post", statistic=empty, progress=False)
    for measure in ("mean", "std", "mean_abs", "positive", "rms"):
        ours, theirs = getattr(routed, measure).flat(), getattr(dense, measure).flat()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_an_ablation_is_saved_with_its_experts(made: Any, tmp_path: Any) -> None:
    from lens_unlearn.interventions.files import load_intervention

    ablate = Ablate(some_neurons(made), collect(made, tiny.corpus(), "experts.post", progress=False).mean_given_routed)
    ablate.save(tmp_path / "a.safetensors", made)
    read = load_intervention(tmp_path / "a.safetensors", made)
    assert isinstance(read, Ablate)
    assert read.selection.equals(ablate.selection)
    assert read.selection.experts == ablate.selection.experts
    with ablate.on(made):
        expected = tiny.logits(made)
    with read.on(made):
        assert torch.equal(tiny.logits(made), expected)
