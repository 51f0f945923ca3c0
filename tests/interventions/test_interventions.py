"""Interventions: a hook is the weight edit it stands for, composition has laws, and afterwards nothing is different."""

import copy
import gc
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from interventions_helpers import (
    FORMS,
    POST,
    Z,
    box_around_half,
    one,
    random_selection,
    selection_of,
    unchanged,
    under,
    value_matrices,
    zoo,
)
from sites_helpers import values_seen
from torch import Tensor

from lens_unlearn.core.errors import ModelError, SelectionError, SiteError
from lens_unlearn.interventions import files
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.interventions.base import Chain, Intervention, Live
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.interventions.patch import Patch
from lens_unlearn.interventions.reroute import Reroute
from lens_unlearn.interventions.update import Update
from lens_unlearn.interventions.when import When
from lens_unlearn.keyspace.regions import Box
from lens_unlearn.methods.ov_basis import ov_basis, value_offset
from lens_unlearn.model.hooks import attach
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons.maps import NeuronMap


def edited(name: str, selection: NeuronMap) -> Tensor:
    """Run weights that were edited before any TransformerLens code saw them (or, for its own models, in their parameters)."""
    if name in tiny.ARCHITECTURES:
        plain = tiny.hugging_face(name)
        for site, chosen in selection.items():
            tiny.zero_rows(plain, name, site, chosen)
        return tiny.logits(plain)
    made = tiny.build(name)
    for site, chosen in selection.items():
        tiny.edit_out(made, site, chosen)
    return tiny.logits(made)


# --- the hook is the weight edit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*tiny.DENSE, *tiny.NATIVE, *tiny.HOOKED])
@pytest.mark.parametrize("kinds", [["mlp.post"], ["attn.z"], ["mlp.post", "attn.z"]], ids="+".join)
def test_ablating_equals_zeroing_rows_of_the_output_matrices(name: str, kinds: list[str]) -> None:
    model = tiny.model(name)
    selection = selection_of(model, kinds)
    base, got = tiny.logits(model), under(model, Ablate(selection))
    assert not torch.allclose(base, got, atol=1e-3), "the ablation does nothing, so the comparison would mean nothing"
    torch.testing.assert_close(got, edited(name, selection), rtol=1e-5, atol=1e-5)


def test_ablating_equals_the_weight_edit_to_ten_digits_in_float64() -> None:
    selection = random_selection({POST[0]: (64,), POST[1]: (64,), Z[0]: (4, 8)})
    plain = tiny.hugging_face("llama").double()
    for site, chosen in selection.items():
        tiny.zero_rows(plain, "llama", site, chosen)
    model = tiny.to_bridge(tiny.hugging_face("llama").double(), "llama")
    torch.testing.assert_close(under(model, Ablate(selection)), tiny.logits(plain), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["mlp.post", "attn.z"])
def test_a_mean_in_place_equals_zeroed_rows_and_a_shifted_output_bias(dense: str, kind: str) -> None:
    selection = selection_of(tiny.model(dense), kind)
    generator = torch.Generator().manual_seed(1)
    value = selection.map(lambda mask: torch.randn(mask.shape, generator=generator))
    plain = tiny.hugging_face(dense)
    for site, chosen in selection.items():
        tiny.add_constant(plain, dense, site, chosen, value[site])
    torch.testing.assert_close(
        under(tiny.model(dense), Ablate(selection, value)), tiny.logits(plain), rtol=1e-5, atol=2e-5
    )


def test_a_number_in_place_equals_the_map_that_is_this_number_everywhere(each: str) -> None:
    model = tiny.model(each)
    selection = selection_of(model, ["mlp.post", "attn.z"])
    full = selection.map(lambda mask: torch.full(mask.shape, 0.75))
    assert torch.equal(under(model, Ablate(selection, 0.75)), under(model, Ablate(selection, full)))


def test_a_whole_head_ablated_equals_a_head_that_writes_nothing(dense: str) -> None:
    d_head = tiny.ARCHITECTURES[dense].d_head
    mask = torch.zeros(4, d_head, dtype=torch.bool)
    mask[2] = True
    plain = tiny.hugging_face(dense)
    out = tiny.module_of(plain, dense, Z[1])
    handle = out.register_forward_pre_hook(
        lambda _, args: (
            torch.cat(
                [args[0][..., : 2 * d_head], args[0][..., 2 * d_head : 3 * d_head] * 0, args[0][..., 3 * d_head :]], -1
            ),
        )
    )
    expected = tiny.logits(plain)
    handle.remove()
    got = under(tiny.model(dense), Ablate(NeuronMap({Z[1]: mask})))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_dtype(dtype: torch.dtype) -> None:
    model = tiny.to_bridge(tiny.hugging_face("llama").to(dtype), "llama")
    selection = selection_of(model, ["mlp.post", "attn.z"])
    value = selection.map(lambda mask: torch.full(mask.shape, 0.1, dtype=torch.float64))
    for intervention in (Ablate(selection), Ablate(selection, value)):
        assert under(model, intervention).dtype == dtype
    plain = tiny.hugging_face("llama").to(dtype)
    for site, chosen in selection.items():
        tiny.zero_rows(plain, "llama", site, chosen)
    torch.testing.assert_close(under(model, Ablate(selection)), tiny.logits(plain), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["mlp.pre", "attn.q", "attn.k", "attn.v", "resid"])
def test_other_sites_are_set_as_a_plain_hook_would_set_them(kind: str) -> None:
    model = tiny.model("llama")
    selection = selection_of(model, f"L1.{kind}")
    mask = selection[Site(1, kind)]
    plain = tiny.hugging_face("llama")

    def put(_: Any, args: Any, output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output
        changed = torch.where(mask.reshape(-1), torch.tensor(0.3), tensor)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = tiny.module_of(plain, "llama", Site(1, kind)).register_forward_hook(put)
    expected = tiny.logits(plain)
    handle.remove()
    torch.testing.assert_close(under(model, Ablate(selection, 0.3)), expected, rtol=1e-5, atol=1e-5)


# --- bases -----------------------------------------------------------------------------------------------------------------


def test_the_basis_makes_values_and_outputs_share_their_singular_directions(dense: str) -> None:
    basis = ov_basis(tiny.model(dense))
    a, plain = tiny.ARCHITECTURES[dense], tiny.hugging_face(dense)
    for layer in range(tiny.LAYERS):
        w_v = value_matrices(dense, plain, layer)
        w_o = tiny.output_rows(tiny.module_of(plain, dense, Site(layer, "attn.z"))).detach().double()
        w_o = w_o.reshape(a.heads, a.d_head, -1)
        t = basis[Site(layer, "attn.z")]
        left, right = w_v @ t, torch.linalg.inv(t) @ w_o
        for head in range(a.heads):
            singular = torch.linalg.svdvals(w_v[head] @ w_o[head])[: a.d_head]
            torch.testing.assert_close(left[head].T @ left[head], torch.diag(singular), rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(right[head] @ right[head].T, torch.diag(singular), rtol=1e-8, atol=1e-8)


def test_all_directions_ablated_equals_all_neurons_ablated(dense: str) -> None:
    model = tiny.model(dense)
    everything = selection_of(model, "attn.z", share=2.0)
    got, expected = under(model, Ablate(everything, basis=ov_basis(model))), under(model, Ablate(everything))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "gemma2", "phi3"])
def test_a_direction_ablated_equals_an_oracle_with_the_explicit_basis(name: str) -> None:
    model, plain = tiny.model(name), tiny.hugging_face(name)
    basis, selection = ov_basis(model), selection_of(model, "attn.z", share=0.4)
    value = selection.map(lambda mask: torch.linspace(-1, 1, mask.numel()).reshape(mask.shape))
    handles = []
    for site in Z:

        def edit(_: Any, args: Any, site: Site = site) -> Any:
            z = args[0].reshape(*args[0].shape[:2], *selection[site].shape).double().numpy()
            t, mask, put = basis[site].numpy(), selection[site].numpy(), value[site].double().numpy()
            out = z.copy()
            for head in range(z.shape[2]):
                rotated = z[:, :, head] @ t[head]
                rotated[..., mask[head]] = put[head][mask[head]]
                out[:, :, head] = rotated @ torch.linalg.inv(basis[site][head]).numpy()
            return (torch.from_numpy(out).to(args[0]).reshape(args[0].shape),)

        handles.append(tiny.module_of(plain, name, site).register_forward_pre_hook(edit))
    expected = tiny.logits(plain)
    for handle in handles:
        handle.remove()
    assert not torch.allclose(expected, tiny.logits(model), atol=1e-2)
    torch.testing.assert_close(under(model, Ablate(selection, value, basis)), expected, rtol=1e-4, atol=1e-4)


def test_in_a_basis_heads_without_a_selected_direction_are_bitwise_untouched() -> None:
    model = tiny.model("llama")
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[1, :3] = True
    seen: list[Tensor] = []
    point = resolve(model, "L0.attn.z")[Z[0]]
    with ExitStack() as stack:
        for intervention in (Chain(()), Ablate(NeuronMap({Z[0]: mask}), basis=ov_basis(model))):
            stack.enter_context(intervention.on(model))
            with Ablate(NeuronMap({Z[1]: torch.ones(4, 8, dtype=torch.bool)})).on(model):
                remove = _watch(point.hook, seen)
                tiny.logits(model)
                remove()
    clean, changed = seen
    assert torch.equal(clean[:, :, [0, 2, 3]], changed[:, :, [0, 2, 3]])
    assert not torch.equal(clean[:, :, 1], changed[:, :, 1])


def _watch(hook: Any, into: list[Tensor]) -> Any:
    return attach(hook, lambda t: into.append(t.clone()))


@pytest.mark.parametrize(
    "bad", [torch.full((4, 8, 8), float("nan")), torch.zeros(4, 8, 8), torch.ones(4, 8), torch.eye(7).expand(4, 7, 7)]
)
def test_a_basis_that_is_none_is_refused(bad: Tensor) -> None:
    selection = NeuronMap({Z[0]: torch.ones(4, 8, dtype=torch.bool)})
    with pytest.raises(SelectionError, match="basis"):
        Ablate(selection, basis=NeuronMap({Z[0]: bad}))


# --- folded value biases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unprocessed", "processed"), tiny.PROCESSED)
def test_pruning_attention_of_a_processed_model_is_the_pruning_of_the_raw_one(unprocessed: str, processed: str) -> None:
    from lens_unlearn.methods.selective_pruning import selective_pruning

    raw, compat = tiny.model(unprocessed), tiny.model(processed)
    corpora = tiny.corpus(seed=1), tiny.corpus(seed=2, name="other")
    options = {"site": "attn.z", "fraction": 0.3, "progress": False}
    on_raw = selective_pruning(raw, *corpora, **options)
    on_compat = selective_pruning(compat, *corpora, **options, reference=raw)
    assert on_raw.selection.equals(on_compat.selection)
    expected, got = under(raw, on_raw).log_softmax(-1), under(compat, on_compat).log_softmax(-1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    trap = under(compat, Ablate(on_raw.selection)).log_softmax(-1)
    assert float((trap - expected).abs().max()) > 1e-2, "zero in the processed model is another ablation"


@pytest.mark.parametrize("name", tiny.FOLDED)
def test_the_offset_is_the_value_bias_with_what_the_norm_adds(name: str) -> None:
    offset = value_offset(tiny.model(f"{name}-compat"), tiny.model(name))
    assert offset is not None
    tokens = tiny.some_tokens(2, 5)
    raw = tiny.plain_activations(tiny.hugging_face(name), name, ["attn.z"], tokens)
    compat = values_seen(tiny.model(f"{name}-compat"), ["attn.z"], tokens, whole=True)
    for site in Z:
        expected = (raw[site] - compat[site]).mean((0, 1)).double()
        torch.testing.assert_close(offset[site], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [processed for _, processed in tiny.PROCESSED])
def test_without_the_raw_model_a_processed_one_is_refused(name: str) -> None:
    from lens_unlearn.methods.selective_pruning import selective_pruning

    with pytest.raises(SiteError, match="lacks its value biases.*pass it as reference="):
        selective_pruning(tiny.model(name), tiny.corpus(seed=1), tiny.corpus(seed=2), site="attn.z", progress=False)


def test_a_raw_bridge_has_no_offset(dense: str) -> None:
    assert value_offset(tiny.model(dense)) is None


@pytest.mark.parametrize("name", ["llama-compat", "qwen3-compat", *tiny.HOOKED[:2]])
def test_where_nothing_was_folded_no_reference_is_asked_for(name: str) -> None:
    model = tiny.build(name)
    assert value_offset(model) is None


def test_another_model_as_reference_is_refused() -> None:
    other = tiny.build("gpt2", seed=5)
    with pytest.raises(SiteError, match="it is another model"):
        value_offset(tiny.model("gpt2-compat"), other)


# --- afterwards nothing is different ------------------------------------------------------------------------------------


class Boom(Exception):
    pass


class Failing(Intervention):
    """Raises in its hook."""

    def hooks(self) -> Any:
        def fail(x: Tensor, live: Live) -> Tensor:
            raise Boom("in a hook")

        return [(POST[1], fail)]

    def parts(self) -> Any:
        raise NotImplementedError


def test_after_the_block_everything_is_bitwise_as_before(each: str) -> None:
    model = tiny.model(each)
    with unchanged(model) as before:
        assert not torch.equal(under(model, Ablate(selection_of(model, ["mlp.post", "attn.z"]))), before)


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, SystemExit, GeneratorExit, torch.OutOfMemoryError])
def test_after_an_error_in_the_body_everything_is_bitwise_as_before(error: type[BaseException]) -> None:
    model = tiny.model("gpt2")
    prune = Ablate(selection_of(model))

    def act() -> None:
        with prune.on(model):
            tiny.logits(model)
            raise error

    with unchanged(model), pytest.raises(error):
        act()


def test_after_an_error_in_a_hook_everything_is_bitwise_as_before(each: str) -> None:
    model = tiny.model(each)
    with unchanged(model), pytest.raises(Boom), (Ablate(selection_of(model)) + Failing()).on(model):
        tiny.logits(model)


def test_nesting_and_using_one_object_twice() -> None:
    model = tiny.model("gpt2")
    one, other = (Ablate(selection_of(model, share=0.2, seed=seed)) for seed in (1, 2))
    with unchanged(model) as before, one.on(model):
        alone = tiny.logits(model)
        with other.on(model):
            both = tiny.logits(model)
            with one.on(model):
                assert torch.equal(tiny.logits(model), both)
            assert torch.equal(tiny.logits(model), both)
        assert torch.equal(tiny.logits(model), alone)
        assert not torch.equal(alone, before)
    assert torch.equal(under(model, one), alone), "a second use acts as the first"


def test_one_object_on_two_models_at_once() -> None:
    gpt2, neox = tiny.model("gpt2"), tiny.model("neox")
    prune = Ablate(random_selection({POST[0]: (64,)}))
    alone = under(gpt2, prune), under(neox, prune)
    with prune.on(gpt2), prune.on(neox):
        assert torch.equal(tiny.logits(gpt2), alone[0])
        assert torch.equal(tiny.logits(neox), alone[1])


def test_blocks_may_close_in_any_order() -> None:
    model = tiny.model("gpt2")
    first, second = (Ablate(selection_of(model, share=0.2, seed=seed)) for seed in (1, 2))
    only_second = under(model, second)
    with unchanged(model):
        opened = [ExitStack(), ExitStack()]
        opened[0].enter_context(first.on(model))
        opened[1].enter_context(second.on(model))
        opened[0].close()
        assert torch.equal(tiny.logits(model), only_second)
        opened[1].close()


def test_two_hundred_blocks_leave_nothing() -> None:
    model = tiny.model("gpt2")
    prune = Ablate(selection_of(model))
    with unchanged(model):
        for _ in range(200):
            with prune.on(model):
                pass


def test_the_live_object_ends_with_the_block_and_keeps_nothing() -> None:
    model = tiny.model("gpt2")
    prune = Ablate(selection_of(model))
    with prune.on(model) as live:
        tiny.logits(model)
        assert live.active
        assert "acting" in repr(live)
    assert not live.active
    assert "ended" in repr(live)
    assert not live._moved


def test_a_model_is_freed_after_the_block() -> None:
    model = tiny.build("gpt2")
    prune = Ablate(selection_of(model))
    with prune.on(model):
        tiny.logits(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# --- with the user's own hooks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt2-compat", *tiny.HOOKED[:1]])
def test_the_users_hooks_stay_in_their_order_and_act(name: str) -> None:
    model = tiny.build(name)
    hook = model.hook_dict["blocks.0.mlp.hook_post"]
    calls: list[str] = []

    def note(text: str) -> Any:
        return lambda tensor, hook: calls.append(text)

    selection = selection_of(model)  # and with it the probe, which the user's hooks would see
    hook.add_hook(note("temporary"))
    hook.add_hook(note("permanent"), is_permanent=True)
    hook.add_hook(note("backward"), dir="bwd")
    before = tiny.hooks_of(model)
    with Ablate(selection).on(model):
        hook.add_hook(note("inside"))
        tiny.logits(model)
        assert calls == ["temporary", "permanent", "inside"]
    after = tiny.hooks_of(model)
    assert [h for h in after if h in before] == before
    assert len(after) == len(before) + 2, "what the user added inside stays: once in each book"
    calls.clear()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(tiny.some_tokens(), return_type="loss").backward()
    assert calls == ["temporary", "permanent", "inside", "backward"]


@pytest.mark.parametrize("name", ["gpt2", "gpt2-compat", "native-llama", *tiny.HOOKED[:1]])
@pytest.mark.parametrize("form", [*FORMS, "all"])
def test_a_copy_made_inside_a_block_is_of_the_unedited_model(name: str, form: str) -> None:
    model = tiny.model(name)
    act = one(name, form)
    before = tiny.logits(model)
    with act.on(model):
        edited = tiny.logits(model)
        with act.on(model):
            copied = copy.deepcopy(model)
        part = copy.deepcopy(model.blocks)
        again = copy.deepcopy(copied)
        assert torch.equal(tiny.logits(copied), before)
        assert torch.equal(tiny.logits(again), before)
        assert torch.equal(tiny.logits(model), edited), "copying changes nothing of the model"
        assert not [each for each in part.modules() if getattr(each, "fwd_hooks", ()) and ours(each)]
    assert torch.equal(tiny.logits(copied), before)
    assert not [module for each in (model, copied) for module in each.modules() if "__deepcopy__" in vars(module)]


def ours(hook_point: Any) -> bool:
    """Whether a function of this package is at a hook point."""
    return any(handle.user_hook.__module__.startswith("lens_unlearn") for handle in hook_point.fwd_hooks)


def test_a_copy_keeps_the_users_hooks() -> None:
    model, calls = tiny.build("gpt2"), list[str]()
    hook = model.hook_dict["blocks.0.mlp.hook_post"]
    hook.add_hook(lambda tensor, hook: calls.append("mine"), is_permanent=True)
    with Ablate(selection_of(model)).on(model):
        copied = copy.deepcopy(model)
    calls.clear()
    tiny.logits(copied)
    assert calls == ["mine"]


@pytest.mark.parametrize("name", ["gpt2", "gpt2-compat", "native-llama", *tiny.HOOKED[:1]])
def test_it_survives_the_users_reset_hooks_run_with_cache_and_run_with_hooks(name: str) -> None:
    model, tokens = tiny.model(name), tiny.some_tokens()
    selection = selection_of(model)
    prune = Ablate(selection)
    alone = under(model, prune)
    with unchanged(model), prune.on(model):
        model.reset_hooks()
        assert torch.equal(tiny.logits(model), alone)
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens)
            assert not cache["blocks.0.mlp.hook_post"][..., selection[POST[0]]].any()
            assert torch.equal(tiny.logits(model), alone)
            model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.mlp.hook_post", lambda t, hook: t * 2)])
        assert torch.equal(tiny.logits(model), alone)
        with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda t, hook: t + 1)]):
            assert not torch.equal(tiny.logits(model), alone)
        assert torch.equal(tiny.logits(model), alone)


def test_it_says_so_when_the_user_removed_it() -> None:
    model = tiny.model("gpt2")
    prune = Ablate(selection_of(model))

    def act(before: Tensor) -> None:
        with prune.on(model):
            model.reset_hooks(including_permanent=True)
            assert torch.equal(tiny.logits(model), before)

    with unchanged(model) as before, pytest.warns(RuntimeWarning, match="were removed inside its block"):
        act(before)


def test_an_upstream_tensor_is_never_written_to() -> None:
    model = tiny.model("gpt2")
    for kind, basis in (("mlp.post", None), ("attn.z", None), ("attn.z", ov_basis(model))):
        prune = Ablate(selection_of(model, kind), 0.5, basis)
        hook = resolve(model, kind)[Site(0, kind)].hook
        kept: list[tuple[Tensor, Tensor]] = []
        hook.add_hook(lambda tensor, hook, kept=kept: kept.append((tensor, tensor.clone())))
        try:
            under(model, prune)
        finally:
            hook.remove_hooks("fwd")
        assert len(kept) == 1
        assert all(torch.equal(tensor, copy) for tensor, copy in kept)


def test_gradients_flow_around_the_ablated_neurons_alone() -> None:
    model = tiny.build("llama")
    selection = selection_of(model, "L0.mlp.post")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with Ablate(selection).on(model):
        model(tiny.some_tokens(), return_type="loss").backward()
    plain = tiny.hugging_face("llama")
    tiny.zero_rows(plain, "llama", POST[0], selection[POST[0]])
    tokens = tiny.some_tokens()
    plain(tokens, labels=tokens).loss.backward()
    expected = tiny.module_of(plain, "llama", Site(0, "mlp.pre")).weight.grad
    got = model.blocks[0].mlp.gate.original_component.weight.grad
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert not expected[selection[POST[0]]].any()


# --- laws --------------------------------------------------------------------------------------------------------------

masks = st.lists(st.booleans(), min_size=64, max_size=64).filter(any).map(torch.tensor)
values = st.floats(-2, 2, width=32)
sites = st.sampled_from(POST)
ablations = st.builds(lambda site, mask, value: Ablate(NeuronMap({site: mask}), value), sites, masks, values)


@given(ablations, ablations)
def test_a_sum_is_nesting(a: Ablate, b: Ablate) -> None:
    model = tiny.model("gpt2")
    with a.on(model), b.on(model):
        nested = tiny.logits(model)
    assert torch.equal(under(model, a + b), nested)


@given(ablations, ablations, ablations)
def test_sums_are_associative_and_the_empty_chain_is_neutral(a: Ablate, b: Ablate, c: Ablate) -> None:
    model = tiny.model("gpt2")
    assert torch.equal(under(model, (a + b) + c), under(model, a + (b + c)))
    alone = under(model, a)
    assert torch.equal(under(model, Chain(()) + a), alone)
    assert torch.equal(under(model, a + Chain(())), alone)


@given(ablations)
def test_an_ablation_twice_is_the_ablation(a: Ablate) -> None:
    model = tiny.model("gpt2")
    assert torch.equal(under(model, a + a), under(model, a))


@given(sites, sites, masks, masks, values, values)
def test_disjoint_ablations_commute(s: Site, t: Site, m: Tensor, n: Tensor, v: float, w: float) -> None:
    n = n & ~m if s == t else n
    if not n.any():
        return
    model, a, b = tiny.model("gpt2"), Ablate(NeuronMap({s: m}), v), Ablate(NeuronMap({t: n}), w)
    assert torch.equal(under(model, a + b), under(model, b + a))


@given(sites, masks, masks, values)
def test_two_ablations_to_one_value_are_the_ablation_of_the_union(s: Site, m: Tensor, n: Tensor, v: float) -> None:
    model, one, other = tiny.model("gpt2"), NeuronMap({s: m}), NeuronMap({s: n})
    assert torch.equal(under(model, Ablate(one, v) + Ablate(other, v)), under(model, Ablate(one | other, v)))


@given(masks, masks, values, values)
def test_on_overlap_the_last_wins(m: Tensor, n: Tensor, v: float, w: float) -> None:
    model, site = tiny.model("gpt2"), POST[0]
    both = NeuronMap({site: m | n})
    merged = NeuronMap({site: torch.where(n, torch.tensor(w), torch.tensor(v))})
    chained = Ablate(NeuronMap({site: m}), v) + Ablate(NeuronMap({site: n}), w)
    assert torch.equal(under(model, chained), under(model, Ablate(both, merged)))


@given(masks)
def test_the_empty_chain_does_nothing_and_an_ablation_does_something(m: Tensor) -> None:
    model = tiny.model("gpt2")
    assert torch.equal(under(model, Chain(())), tiny.logits(model))
    assert not torch.equal(under(model, Ablate(NeuronMap({POST[0]: m}))), tiny.logits(model))


def test_sums_are_flat() -> None:
    a = Ablate(random_selection({POST[0]: (64,)}))
    assert ((a + a) + (a + Chain(()))).members == (a, a, a)
    with pytest.raises(TypeError):
        _ = a + 1  # type: ignore[operator]


def test_rows_do_not_depend_on_their_neighbours(each: str) -> None:
    model, tokens = tiny.model(each), tiny.some_tokens(5, 6)
    prune = Ablate(selection_of(model, ["mlp.post", "attn.z"]))
    together = under(model, prune, tokens)
    alone = torch.cat([under(model, prune, tokens[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


# --- what cannot be ablated ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((NeuronMap({POST[0]: torch.rand(4, generator=torch.Generator())}),), "boolean map"),
        ((NeuronMap({POST[0]: torch.zeros(4, dtype=torch.bool)}),), "selection is empty"),
        ((NeuronMap({POST[0]: torch.ones(4, dtype=torch.bool)}), float("nan")), "is not a number"),
        ((NeuronMap({POST[0]: torch.ones(4, dtype=torch.bool)}), float("inf")), "is not a number"),
        ((NeuronMap({POST[0]: torch.ones(4, dtype=torch.bool)}), NeuronMap({POST[1]: torch.ones(4)})), "nothing at L0"),
        ((NeuronMap({POST[0]: torch.ones(4, dtype=torch.bool)}), NeuronMap({POST[0]: torch.ones(5)})), "another shape"),
        (
            (
                NeuronMap({POST[0]: torch.tensor([True, False])}),
                NeuronMap({POST[0]: torch.tensor([float("nan"), 0.0])}),
            ),
            "NaN or infinity",
        ),
        (
            (NeuronMap({Z[0]: torch.ones(2, 2, dtype=torch.bool)}), 0.0, NeuronMap({Z[1]: torch.ones(2, 2, 2)})),
            "basis map",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        Ablate(*arguments)


def test_nan_at_a_neuron_that_is_not_selected_does_not_matter() -> None:
    value = torch.zeros(64)
    value[1:] = float("nan")
    mask = torch.zeros(64, dtype=torch.bool)
    mask[0] = True
    model = tiny.model("gpt2")
    selection = NeuronMap({POST[0]: mask})
    assert torch.equal(under(model, Ablate(selection, NeuronMap({POST[0]: value}))), under(model, Ablate(selection)))


def test_another_model_is_refused_before_any_hook_is_added() -> None:
    model = tiny.model("gpt2")
    with unchanged(model):
        for selection, error, message in (
            (
                NeuronMap({POST[0]: torch.ones(63, dtype=torch.bool)}),
                SelectionError,
                r"shape \(64,\) in this model, and \(63,\)",
            ),
            (NeuronMap({Site(7, "mlp.post"): torch.ones(64, dtype=torch.bool)}), SiteError, "layers are 0 to 1"),
            (
                NeuronMap({POST[0]: torch.ones(64, dtype=torch.bool), Z[1]: torch.ones(2, 16, dtype=torch.bool)}),
                SelectionError,
                "L1.attn.z",
            ),
        ):
            with pytest.raises(error, match=message), Ablate(selection).on(model):
                pytest.fail("the block must not be entered")  # pragma: no cover


def test_training_mode_is_refused() -> None:
    model = tiny.build("gpt2")
    model.train()
    with pytest.raises(ModelError, match="training mode"), Ablate(random_selection({POST[0]: (64,)})).on(model):
        pass


def test_interventions_are_frozen_and_show_themselves() -> None:
    prune = Ablate(random_selection({POST[0]: (64,), POST[1]: (64,)}, share=2.0))
    with pytest.raises(AttributeError):
        prune.value = 1.0  # type: ignore[misc]
    assert repr(prune) == "Ablate(zero, 128 of 128 neurons, 2 layers, mlp.post)"
    assert repr(prune + Ablate(prune.selection, 0.5)) == f"{prune!r} + {str(prune).replace('zero', '0.5')}"
    assert repr(Chain(())) == "Chain(nothing)"


def test_describe_says_what_is_done_at_each_place() -> None:
    mask = torch.arange(2048) < 1030
    selection = NeuronMap({POST[1]: mask, POST[0]: torch.zeros(2048, dtype=torch.bool), Z[0]: torch.ones(2, 16) > 0})
    counts = {"L0.attn.z": "32 of 32 neurons", "L1.mlp.post": "1,030 of 2,048 neurons"}
    ablation = Ablate(selection)
    assert ablation.describe() == counts, "sites without a selected neuron are left out"
    normal = selection.map(lambda chosen: torch.ones(chosen.shape))
    adjustment = Adjust(selection, normal, normal, normal, normal)
    assert adjustment.describe() == counts
    box = Box(torch.zeros(1, 4), torch.ones(4), 2.0)
    abstention = Abstain({POST[1]: box, Z[1]: box})
    assert list(abstention.describe().items()) == [("L1.attn.z", repr(box)), ("L1.mlp.post", repr(box))], "in order"
    delta = Delta({(1, "W_out"): Update(torch.ones(3, 5), rows=torch.arange(3)), (0, "W_Q"): Update(torch.ones(5, 5))})
    assert delta.describe() == {"L0.W_Q": "Update(5 x 5)", "L1.W_out": "Update(3 rows)"}
    assert Chain(()).describe() == {}
    assert (ablation + delta).describe() == {**counts, **delta.describe()}
    assert (ablation + abstention).describe() == {**counts, **abstention.describe()}, "of two at a place, the last"

    class Silent(Ablate):
        describe = Intervention.describe

    assert Silent(selection).describe() == {}, "none has to"


def test_every_kind_in_the_table_of_files_is_written_and_read_by_its_own_class(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    written = {}
    patch, reroute = Patch({POST[1]: torch.ones(1, 2, 64)}, site="mlp.post"), Reroute({1: [0]})
    others = (patch, reroute, When.region({POST[0]: box_around_half(model, POST[0])}, reroute))
    for intervention in (*zoo(model).values(), Chain(tuple(zoo(model).values())), *others):
        header, _ = intervention.parts()
        assert header["kind"] == type(intervention).kind
        intervention.save(tmp_path / "it.safetensors", model)
        again = load_intervention(tmp_path / "it.safetensors", model)
        assert type(again) is type(intervention)
        assert again.describe() == intervention.describe()
        written[header["kind"]] = type(intervention)
    assert written == {cls.kind: cls for cls in files.CLASSES}
