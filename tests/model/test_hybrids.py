"""Models of which only some layers have attention, or an MLP: kinds mean the layers that have them, wherever kinds are taken."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import numpy as np
import plotly.graph_objects as go
import pytest
import tiny
import torch
import transformers

import lens_unlearn as lu
from lens_unlearn.core.errors import LensUnlearnError, ModelError, SiteError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.methods.controls import random_pruning
from lens_unlearn.methods.key_space_detection import key_space_detection
from lens_unlearn.methods.ov_basis import ov_basis
from lens_unlearn.methods.selective_pruning import selective_pruning
from lens_unlearn.methods.simu import simu
from lens_unlearn.model.hooks import attach, detach_all, on_forward
from lens_unlearn.model.matrices import matrix_names
from lens_unlearn.model.sites import Site, layers_with, resolve
from lens_unlearn.neurons.attribution import attribute
from lens_unlearn.neurons.collect import collect, load_moments, save_moments
from lens_unlearn.neurons.maps import NeuronMap

USUAL = range(3, families.VOCABULARY)


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, Any]]:
    """Two hybrids: attention in every other layer; in the second, the layers of attention have experts in place of an MLP."""
    made = {name: families.bridge(name) for name in ("jamba", "jamba-moe")}
    for model in made.values():  # what a model sets up for itself at its first forward is not a test's doing
        tiny.logits(model, families.tokens())
    hooks = {name: tiny.hooks_of(model) for name, model in made.items()}
    yield made
    assert {name: tiny.hooks_of(model) for name, model in made.items()} == hooks


@pytest.fixture(params=["jamba", "jamba-moe"])
def model(request: pytest.FixtureRequest, models: dict[str, Any]) -> Any:
    return models[request.param]


def corpora(*, prompts: bool = False) -> tuple[Corpus, Corpus]:
    made = [tiny.corpus([9] * 24, seed=seed, name=str(seed), tokens=USUAL) for seed in (0, 1)]
    if prompts:
        made = [corpus.with_prompts(5) for corpus in made]
    return made[0], made[1]


@pytest.mark.parametrize("name", families.HYBRID)
def test_a_kind_means_the_layers_that_have_it(name: str) -> None:
    if not families.usable(name):
        pytest.skip("this TransformerLens does not know it, or gets it wrong")
    family, model = families.FAMILIES[name], families.bridge(name)
    for kind in ("attn.z", "attn.v", "mlp.pre", "mlp.pre_linear", "mlp.post"):
        shown = kind not in family.lacks and (kind != "mlp.pre_linear" or family.gated)
        letter = kind[0] if shown else "none"
        expected = [layer for layer, has in enumerate(family.layers) if letter in has]
        if expected:
            assert [site.layer for site in resolve(model, kind)] == expected == layers_with(model, kind)
        else:
            with pytest.raises(SiteError, match=rf"^L0\.{kind} .*; no other layer has {kind} either$"):
                resolve(model, kind)
            with pytest.raises(SiteError, match=rf"no other layer has {kind} either$"):
                layers_with(model, kind)
    assert [site.layer for site in resolve(model, "resid")] == list(range(len(family.layers)))


def test_a_site_that_is_named_has_to_exist(models: dict[str, Any]) -> None:
    for name, words in (("jamba", "JambaMambaDecoderLayer with mlp.pre, mlp.pre_linear, mlp.post, resid"),):
        for given in ("L0.attn.z", ["attn.z", "L0.attn.z"], Site(0, "attn.z")):
            with pytest.raises(SiteError, match=rf"^L0\.attn\.z does not exist in this model: layer 0 is a {words}$"):
                collect(models[name], corpora()[0], given, progress=False)
    with pytest.raises(SiteError, match=r"^L1\.mlp\.post has no neuron axis"):
        resolve(models["jamba-moe"], "L1.mlp.post")
    with pytest.raises(SiteError, match="its layers are 0 to 1"):
        resolve(models["jamba"], "L2.attn.z")


def test_experts_are_not_blamed_where_there_is_no_mlp() -> None:
    for name in ("mamba", "rwkv"):
        with pytest.raises(SiteError, match=r"does not exist in this model: layer 0 is a \w+ with resid;") as caught:
            resolve(families.bridge(name), "mlp.post")
        assert "expert" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("youtu", "attn.q", "no axis of positions behind that of texts"),  # [batch, head, pos, d_head]
        ("youtu", "attn.v", "no axis of positions behind that of texts"),
        ("qwen3.5", "attn.q", "holds the gates of attention beside its queries"),
        ("qwen3-next", "attn.q", "holds the gates of attention beside its queries"),
        ("modernbert-decoder", "mlp.pre", "48 wide, but the layer has 24 neurons"),
        ("openai-gpt", "resid", "fired 0 times"),
    ],
)
def test_what_is_laid_out_otherwise_is_refused(name: str, kind: str, words: str) -> None:
    if not families.usable(name):
        pytest.skip("this TransformerLens does not know it, or gets it wrong")
    with pytest.raises(SiteError, match=words):
        resolve(families.bridge(name), kind)


def test_layers_that_take_keys_and_values_from_others_have_none() -> None:
    """Gemma 4's upper layers, whose heads and MLPs are of several widths as well."""
    if not families.usable("gemma4"):
        pytest.skip("this TransformerLens does not know it, or gets it wrong")
    family = families.FAMILIES["gemma4"]
    own = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "global_head_dim": 16, "use_double_wide_mlp": True}
    own["layer_types"] = ["sliding_attention", "full_attention"] * 2
    with tiny.quiet(0):
        config = transformers.Gemma4TextConfig(**{**family.config, **own})
        config._attn_implementation = "eager"
        plain = transformers.Gemma4ForCausalLM(config).eval()
    plain.config.architectures = [family.name]
    tiny.randomize(plain)
    model = families.bridge("gemma4", plain)
    shapes = {
        kind: [(s.layer, p.shape) for s, p in resolve(model, kind).items()] for kind in ("attn.k", "attn.z", "mlp.post")
    }
    assert shapes["attn.k"] == [(0, (2, 8)), (1, (2, 16))]
    assert shapes["attn.z"] == [(0, (4, 8)), (1, (4, 16)), (2, (4, 8)), (3, (4, 16))]
    assert shapes["mlp.post"] == [(0, (24,)), (1, (24,)), (2, (48,)), (3, (48,))]
    assert not lu.check_model(model).failed


@pytest.mark.parametrize("name", ["nemotron-h", "recurrent-gemma", "zamba2"])
def test_layers_that_are_wrapped_whole_have_hook_points_of_their_own(name: str) -> None:
    model = families.bridge(name)
    tiny.logits(model, families.tokens())
    before = tiny.hooks_of(model)
    for kind in ("mlp.post", "attn.z"):
        sites = resolve(model, kind)
        seen: list[torch.Size] = []
        remove = attach(next(iter(sites.values())).hook, lambda x, seen=seen: seen.append(x.shape))
        tiny.logits(model, families.tokens())
        assert remove()
        assert seen == [(2, 7, *next(iter(sites.values())).shape)]
        assert tiny.hooks_of(model) == before
    copied = []
    with Ablate(NeuronMap({s: torch.ones(p.shape, dtype=torch.bool) for s, p in resolve(model, "attn.z").items()})).on(
        model
    ):
        copied.append(copy.deepcopy(model))
    assert torch.equal(tiny.logits(copied[0], families.tokens()), tiny.logits(model, families.tokens()))
    with pytest.raises(SiteError, match="has no OV circuit of one W_V and one W_O per head"):
        ov_basis(model)


def test_weights_that_several_layers_share_have_a_site_in_each() -> None:
    """Zamba 2's attention: its weights are those of one block, run in several layers."""
    family = families.FAMILIES["zamba2"]
    shared = {"hybrid_layer_ids": [1, 3], "layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4}
    with tiny.quiet(0):
        plain = transformers.Zamba2ForCausalLM(transformers.Zamba2Config(**{**family.config, **shared})).eval()
    plain.config.architectures = [family.name]
    model = families.bridge("zamba2", plain)
    assert [site.layer for site in resolve(model, "attn.z")] == [1, 3]
    assert not lu.check_model(model).failed


def test_a_model_of_several_stacks_is_refused() -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 96,
    }
    with tiny.quiet(0):
        config = transformers.HrmTextConfig(**sizes, num_key_value_heads=2, head_dim=4, bos_token_id=0, eos_token_id=1)
        plain = transformers.HrmTextForCausalLM(config).eval()
        try:
            model = build_bridge_from_module(
                plain, architecture="HrmTextForCausalLM", hf_config=config, tokenizer=None, device="cpu"
            ).eval()
        except ValueError as error:
            pytest.skip(f"this TransformerLens does not know it: {error}")
    for look in (lambda: resolve(model, "resid"), lambda: collect(model, corpora()[0]), lambda: lu.check_model(model)):
        with pytest.raises(ModelError, match="^a HrmTextForCausalLM has no single stack of layers"):
            look()


def test_statistics_of_a_kind_are_of_its_layers(model: Any) -> None:
    moments = collect(model, corpora()[0], ("mlp.post", "attn.z"), batch_size=4, progress=False)
    for kind in ("mlp.post", "attn.z"):
        assert [site.layer for site in moments.mean[kind].sites] == layers_with(model, kind)
    assert moments.mean["attn.z"].stack().shape == (len(layers_with(model, "attn.z")), 4, 4)


@pytest.mark.parametrize("unit", ["neuron", "head", "direction"])
def test_attention_is_pruned_where_it_is(model: Any, unit: Any) -> None:
    forget, retain = corpora()
    prune = selective_pruning(
        model, forget, retain, fraction=0.25, site="attn.z", unit=unit, within="layer", batch_size=8, progress=False
    )
    where = layers_with(model, "attn.z")
    assert [site.layer for site in prune.selection.sites] == where
    assert prune.selection.count() == 4 * len(where)
    control = random_pruning(model, forget, retain, like=prune, batch_size=8, progress=False)
    assert control.selection.sites == prune.selection.sites
    base = tiny.logits(model, families.tokens())
    for edit in (prune, control):
        with edit.on(model):
            assert not torch.equal(tiny.logits(model, families.tokens()), base)
    assert torch.equal(tiny.logits(model, families.tokens()), base)
    assert [site.layer for site in ov_basis(model).sites] == where


def test_the_last_layer_is_the_last_that_has_the_site(models: dict[str, Any]) -> None:
    forget, retain = corpora(prompts=True)
    options: dict[str, Any] = {"alpha": 1.0, "batch_size": 8, "progress": False}
    for name, site, last in (("jamba-moe", "mlp.post", 2), ("jamba-moe", "attn.z", 3), ("jamba", "attn.z", 1)):
        found = key_space_detection(models[name], forget, retain, layer=-1, site=site, **options)
        assert list(found.regions) == [Site(last, site)]
    found = key_space_detection(models["jamba-moe"], forget, retain, layer=[-2, -1], site="mlp.post", **options)
    assert list(found.regions) == [Site(0, "mlp.post"), Site(2, "mlp.post")]
    found = key_space_detection(models["jamba-moe"], forget, retain, layer=2, **options)
    assert list(found.regions) == [Site(2, "mlp.post")]
    for layer in (1, 3, -3, [0, 1]):
        with pytest.raises(
            LensUnlearnError, match=r"there is no layer -?\d: this model has mlp.post in layers 0, 2, -1 is"
        ):
            key_space_detection(models["jamba-moe"], forget, retain, layer=layer, **options)
    with pytest.raises(LensUnlearnError, match="vote=2 needs 3 layers for a majority, and there are 2"):
        key_space_detection(models["jamba-moe"], forget, retain, vote=2, **options)


def test_an_update_is_of_the_matrices_that_there_are(model: Any) -> None:
    forget, retain = corpora(prompts=True)
    update = simu(
        model, forget, retain, mask="all", attention="full", inner=True, steps=1, batch_size=8, progress=False
    )
    assert isinstance(update, Delta)
    found = {(matrix.layer, matrix.name) for matrix in update.updates}
    attention = {(layer, name) for layer in layers_with(model, "attn.z") for name in ("W_Q", "W_K", "W_V", "W_O")}
    neurons = {(layer, name) for layer in layers_with(model, "mlp.post") for name in ("W_in", "W_gate", "W_out")}
    assert found == attention | neurons
    for layer in range(len(model.blocks)):
        assert {(layer, name) for name in matrix_names(model, layer)} == {pair for pair in found if pair[0] == layer}


def test_a_routers_gate_is_no_matrix_of_an_mlp() -> None:
    assert matrix_names(families.bridge("lfm2-moe"), 1) == ["W_Q", "W_K", "W_V", "W_O"]
    assert matrix_names(tiny.model("mixtral"), 0) == ["W_Q", "W_K", "W_V", "W_O"]


def test_attribution_runs_upper_layers_again(model: Any) -> None:
    forget, _ = corpora(prompts=True)
    found = attribute(model, forget, ("mlp.post", "attn.z"), steps=2, batch_size=8, progress=False)
    for kind in ("mlp.post", "attn.z"):
        assert [site.layer for site in found[kind].sites] == layers_with(model, kind)


def test_what_is_saved_is_loaded_again(model: Any, tmp_path: Path) -> None:
    forget, retain = corpora()
    prune = selective_pruning(
        model, forget, retain, fraction=0.3, site=("attn.z", "mlp.post"), batch_size=8, progress=False
    )
    prune.save(tmp_path / "prune.safetensors", model)
    loaded = load_intervention(tmp_path / "prune.safetensors", model)
    assert isinstance(loaded, Ablate)
    assert all(torch.equal(loaded.selection[site], value) for site, value in prune.selection.items())
    moments = collect(model, forget, ("attn.z", "mlp.post"), batch_size=8, progress=False)
    save_moments(tmp_path / "moments.safetensors", moments, model)
    again = load_moments(tmp_path / "moments.safetensors", model)
    assert all(torch.equal(again.mean[site], value) for site, value in moments.mean.items())


def test_figures_have_a_row_for_every_layer_between(models: dict[str, Any]) -> None:
    forget, retain = (collect(models["jamba-moe"], part, "mlp.post", progress=False) for part in corpora())
    score = forget.mean_abs["mlp.post"] / (retain.mean_abs["mlp.post"] + 1e-3)
    for fig in (
        lu.plot.neuron_heatmap(score, selection=score.top(0.2)),
        lu.plot.attribution_map(score),
        lu.plot.selection_overlap({"one": score.top(0.2), "other": score.top(0.4)}),
    ):
        heat = [trace for trace in fig.data if isinstance(trace, go.Heatmap)][-1]
        assert list(heat.y) == [0, 1, 2], "a layer without the site leaves a gap, not a wider row beside it"
        values = np.array(heat.z, dtype=float)
        assert np.isnan(values[1]).all()
        assert not np.isnan(values[::2]).any()


@pytest.mark.parametrize("name", ["jamba", "jamba-moe", "lfm2", "falcon-h1", "granite-hybrid", "qwen3.5", "mamba2"])
def test_cached_positions_are_counted(name: str) -> None:
    """Also where no layer of the cache is of attention, and none knows."""
    if not families.usable(name):
        pytest.skip("this TransformerLens does not know it, or gets it wrong")
    model, seen = families.bridge(name), []
    removers: list[Any] = []
    on_forward(model, lambda ids, cached: seen.append((None if ids is None else ids.shape[1], cached)), removers)
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    try:
        for _ in range(2):
            with torch.no_grad():
                model.generate(families.tokens(2, 11), **options)
    finally:
        detach_all(removers)
    assert seen == [(11, 0), (1, 11), (1, 12), (1, 13)] * 2
