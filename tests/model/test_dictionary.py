"""Dictionaries as sites: features are those of the formulas, and what is changed of them is added, times the decoder."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import sae_helpers
import tiny
import torch

import lens_unlearn as lu
from lens_unlearn.core.errors import ModelError, SiteError
from lens_unlearn.model.sites import extra_points, resolve
from lens_unlearn.testing import check_intervention

CORPUS = tiny.corpus((5, 9, 3, 12), tokens=range(3, 60))
QUIET: dict[str, Any] = {"progress": False}


def dictionary(
    folder: Path, architecture: str = "jumprelu", hook: str = "blocks.0.hook_resid_post", **other: Any
) -> Any:
    config = {**sae_helpers.config_of(architecture, 32, hook=hook), **other}
    return lu.load_dictionary(sae_helpers.write(folder, config, sae_helpers.weights_of(architecture, 32)))


def chosen(site: lu.Site, features: Any = (1, 5, 40)) -> lu.NeuronMap:
    mask = torch.zeros(sae_helpers.D_SAE, dtype=torch.bool)
    mask[list(features)] = True
    return lu.NeuronMap({site: mask})


def plain(model: Any, hook: str, change: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits with a plain hook at a hook point, added as a user would."""
    point = model.hook_dict[hook]
    handle = point.register_forward_hook(lambda module, args, out: change(out))
    try:
        with torch.no_grad():
            return model(tokens, return_type="logits")
    finally:
        handle.remove()


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
@pytest.mark.parametrize("normalize", ["none", "constant_norm_rescale", "layer_norm"])
def test_features_and_reconstructions_are_those_of_the_formulas(
    tmp_path: Path, architecture: str, normalize: str
) -> None:
    weights = sae_helpers.weights_of(architecture, 32)
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1)) * 2 + 0.3
    for centered in (True, False):
        config = sae_helpers.config_of(architecture, 32)
        config |= {"normalize_activations": normalize, "apply_b_dec_to_input": centered}
        one = lu.load_dictionary(sae_helpers.write(tmp_path, config, weights))
        features, out = sae_helpers.encoded(config, weights, x)
        torch.testing.assert_close(one.encode(x).double(), torch.from_numpy(features), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.decode(one.encode(x), x).double(), torch.from_numpy(out), rtol=1e-5, atol=1e-5)
        assert 0.05 < float((one.encode(x) > 0).float().mean()) < 0.8
        changed = one.encode(x).clone()
        changed[..., 3] += 1.0
        moved = one.replaced(x, one.encode(x), changed)
        error = x.double() - torch.from_numpy(out)
        torch.testing.assert_close((moved - one.decode(changed, x)).double(), error, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", *tiny.HOOKED[:2]])
@pytest.mark.parametrize(
    "hook",
    ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "attn.hook_z"],
)
def test_an_ablation_is_a_plain_hook_that_subtracts_decoder_rows(tmp_path: Path, name: str, hook: str) -> None:
    model, tokens = tiny.model(name), tiny.some_tokens(3, 9)
    full = f"blocks.1.{hook}"
    heads = {"reshape_activations": "hook_z"} if hook == "attn.hook_z" else {}
    one = dictionary(tmp_path, hook=full, **heads)
    weights = one.weights

    def subtract(x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(*x.shape[:2], 32)
        before = (flat - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
        features = before.relu() * (before > weights["threshold"])
        return (flat - features[..., [1, 5, 40]] @ weights["W_dec"][[1, 5, 40]]).reshape(x.shape)

    expected, base = plain(model, full, subtract, tokens), model(tokens, return_type="logits")
    with one.on(model), lu.Ablate(chosen(one.site)).on(model):
        found = model(tokens, return_type="logits")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float((found - base).abs().max()) > 1e-3
    assert torch.equal(model(tokens, return_type="logits"), base)


def test_moments_are_those_of_the_features(tmp_path: Path) -> None:
    model, one = tiny.model("gpt2"), dictionary(tmp_path)
    with one.on(model):
        moments = lu.collect(model, CORPUS, "sae", **QUIET)
    seen: list[torch.Tensor] = []
    for batch in CORPUS.batches(4):
        plain(model, one.hook_name, lambda x, c=batch.counted: seen.append(one.encode(x)[c]), batch.tokens.long())
    values = torch.cat(seen).double()
    torch.testing.assert_close(moments.mean["sae"][one.site], values.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.positive["sae"][one.site], (values > 0).double().mean(0))
    assert moments.sites == [lu.Site(0, "sae")]


def test_looking_at_features_changes_no_bit_and_only_touched_positions_change(tmp_path: Path) -> None:
    model, tokens, one = tiny.model("gpt2"), tiny.some_tokens(3, 9), dictionary(tmp_path, "topk")
    base = model(tokens, return_type="logits")
    with one.on(model):
        point = resolve(model, one.site)[one.site]
        assert (point.shape, point.dtype) == ((48,), torch.float32)
        seen: list[torch.Tensor] = []
        with lu.Ablate(chosen(one.site), lu.NeuronMap({one.site: torch.zeros(48)})).on(model):
            plain(model, one.hook_name, seen.append, tokens)
            with lu.Ablate(chosen(one.site)).on(model):  # once more changes nothing
                plain(model, one.hook_name, seen.append, tokens)
        plain(model, one.hook_name, seen.append, tokens)
        edited, again, before = seen
        untouched = (one.encode(before)[..., [1, 5, 40]] == 0).all(-1)
        assert 0 < int(untouched.sum()) < untouched.numel()
        assert torch.equal(edited[untouched], before[untouched])
        assert bool((edited != before).any(-1)[~untouched].all())
        assert torch.equal(edited, again)
        lu.collect(model, CORPUS, "sae", **QUIET)
        assert torch.equal(model(tokens, return_type="logits"), base)
    assert not any(point._forward_hooks or point.fwd_hooks for point in extra_points(model))


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.0.hook_resid_pre"])
def test_every_promise_of_interventions_holds(tmp_path: Path, hook: str) -> None:
    model, one = tiny.model("gpt2"), dictionary(tmp_path, hook=hook)
    assert one.site == lu.Site(0, "sae")  # the input of a layer is the output of the one below
    with one.on(model):
        check_intervention(lu.Ablate(chosen(one.site), 0.7).placed(skip_special=True), model)


def test_a_site_is_there_while_the_dictionary_is_attached(tmp_path: Path) -> None:
    model, one = tiny.model("gpt2"), dictionary(tmp_path)
    with pytest.raises(SiteError, match=r"L0\.sae does not exist.*load_dictionary\(FOLDER\)\.attach\(model\)"):
        resolve(model, "sae")
    with pytest.raises(ModelError, match="is not attached"):
        one.detach(model)
    assert one.attach(model) is one
    try:
        with one.on(model):  # attached already, and so it stays
            pass
        assert list(resolve(model, "sae")) == [one.site]
        other = dictionary(tmp_path / "other", hook="blocks.0.hook_mlp_out")
        with pytest.raises(SiteError, match=r"layer 0 has a dictionary at blocks\.0\.hook_resid_post already"):
            other.attach(model)
        upper = dictionary(tmp_path / "upper", hook="blocks.1.hook_resid_post")
        with upper.on(model):
            assert list(resolve(model, "sae")) == [one.site, upper.site]
            assert copy.deepcopy(model) is not model
    finally:
        one.detach(model)
    with pytest.raises(SiteError, match="does not exist"):
        resolve(model, one.site)


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        ("blocks.7.hook_resid_post", "its layers are 0 to 1"),
        ("blocks.1.hook_nothing", r"blocks\.1\.hook_nothing, .*is no hook point"),
        ("blocks.1.mlp.hook_post", r"has 64 values here, and the dictionary reads 32: .*another model \(tiny\)"),
    ],
)
def test_a_dictionary_of_another_model_is_refused_and_leaves_nothing(tmp_path: Path, hook: str, words: str) -> None:
    model, one = tiny.model("gpt2"), dictionary(tmp_path, hook=hook)
    with pytest.raises(SiteError, match=words):
        one.attach(model)
    with pytest.raises(SiteError, match="attach a dictionary"):
        resolve(model, "sae")


def test_a_model_with_a_dictionary_can_be_freed(tmp_path: Path) -> None:
    model, one = tiny.build("gpt2"), dictionary(tmp_path)
    one.attach(model)
    with lu.Ablate(chosen(one.site)).on(model):
        model(tiny.some_tokens())
        copied = copy.deepcopy(model)
    base = model(tiny.some_tokens(), return_type="logits")
    assert torch.equal(copied(tiny.some_tokens(), return_type="logits"), base)
    gone = weakref.ref(model)
    del model, copied
    gc.collect()
    assert gone() is None
