"""Reading what each version of SAELens wrote, and refusing in one sentence what cannot be read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sae_helpers
import torch

import lens_unlearn as lu
from lens_unlearn.core.errors import ArtefactError, LensUnlearnError

X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))


def old_config(architecture: str, **other: Any) -> dict[str, Any]:
    """What SAELens wrote before version 6."""
    return {
        "architecture": architecture,
        "d_in": 32,
        "d_sae": sae_helpers.D_SAE,
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "apply_b_dec_to_input": False,
        "finetuning_scaling_factor": False,
        "context_size": 128,
        "model_name": "gpt2-small",
        "hook_name": "blocks.1.hook_resid_pre",
        "hook_layer": 1,
        "hook_head_index": None,
        "prepend_bos": True,
        "normalize_activations": "none",
        "dtype": "torch.float32",
        "device": "mps",
        "sae_lens_training_version": "3.12.2",
        **other,
    }


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_configurations_before_version_six_are_read(tmp_path: Path, architecture: str) -> None:
    weights = sae_helpers.weights_of(architecture, 32)
    config = old_config(architecture)
    if architecture == "topk":  # an activation function of the standard architecture then
        config |= {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}}
    one = lu.load_dictionary(sae_helpers.write(tmp_path, config, weights))
    assert (one.architecture, one.hook_name, one.centered) == (architecture, "blocks.1.hook_resid_pre", False)
    assert repr(one) == f"Dictionary(48 features of blocks.1.hook_resid_pre, {architecture}, of gpt2-small)"
    new = sae_helpers.config_of(architecture, 32) | {"apply_b_dec_to_input": False}
    assert torch.equal(one.encode(X), lu.load_dictionary(sae_helpers.write(tmp_path, new, weights)).encode(X))


def test_a_model_is_loaded_with_its_dictionary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = lu.load_model("demo", dictionary="demo")
    assert list(lu.collect(model, lu.read_corpus("demo:python", model, tokens=50), "sae", progress=False).sites)
    monkeypatch.setattr("lens_unlearn.model.loading.boot", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ArtefactError, match="nowhere"):
        lu.load_model("demo", dictionary=tmp_path / "nowhere")


def test_the_earliest_names_and_values_are_read(tmp_path: Path) -> None:
    config = old_config(
        "standard", normalize_activations=False, activation_fn="relu", hook_point="blocks.0.attn.hook_z"
    )
    for key in ("architecture", "apply_b_dec_to_input", "hook_name", "dtype", "activation_fn_str"):
        del config[key]
    weights = sae_helpers.weights_of("standard", 32) | {"scaling_factor": torch.ones(48)}
    one = lu.load_dictionary(sae_helpers.write(tmp_path, config, weights))
    assert (one.hook_name, one.heads, one.centered, one.dtype) == ("blocks.0.attn.hook_z", True, True, torch.float32)
    assert torch.equal(one.encode(X.view(2, 5, 4, 8)), one.encode(X))


def test_factors_are_part_of_what_a_feature_writes(tmp_path: Path) -> None:
    weights, factor = sae_helpers.weights_of("standard", 32), torch.linspace(0.5, 2, 48)
    config = old_config("standard", finetuning_scaling_factor=True)
    one = lu.load_dictionary(sae_helpers.write(tmp_path, config, weights | {"scaling_factor": factor}))
    plain = lu.load_dictionary(sae_helpers.write(tmp_path, old_config("standard"), weights))
    assert torch.equal(one.encode(X), plain.encode(X))
    torch.testing.assert_close(one.decode(one.encode(X), X), plain.decode(plain.encode(X) * factor, X))
    sae_helpers.write(tmp_path, old_config("standard"), weights | {"scaling_factor": factor})
    with pytest.raises(ArtefactError, match="finetuning_scaling_factor=false, and .* has such factors"):
        lu.load_dictionary(tmp_path)


def test_features_of_rescaled_decoders_are_those_of_the_formula(tmp_path: Path) -> None:
    weights = sae_helpers.weights_of("topk", 32)
    config = sae_helpers.config_of("topk", 32) | {"rescale_acts_by_decoder_norm": True}
    one = lu.load_dictionary(sae_helpers.write(tmp_path, config, weights))
    features, out = sae_helpers.encoded(config, weights, X)
    np.testing.assert_allclose(one.encode(X), features, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(one.decode(one.encode(X), X), out, rtol=1e-5, atol=1e-5)


def test_a_scale_that_is_not_in_the_folder_has_to_be_given(tmp_path: Path) -> None:
    weights, config = sae_helpers.weights_of("standard", 32), old_config("standard", normalize_activations=True)
    sae_helpers.write(tmp_path, config, weights)
    with pytest.raises(ArtefactError, match=r"'expected_average_only_in', by a number .* norm_scaling_factor="):
        lu.load_dictionary(tmp_path)
    plain = lu.load_dictionary(tmp_path, norm_scaling_factor=1)
    scaled = lu.load_dictionary(tmp_path, norm_scaling_factor=0.25)
    torch.testing.assert_close(scaled.encode(X), plain.encode(X * 0.25))
    torch.testing.assert_close(scaled.decode(scaled.encode(X), X), plain.decode(plain.encode(X * 0.25), X) / 0.25)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(LensUnlearnError, match="scales nothing"):
            lu.load_dictionary(tmp_path, norm_scaling_factor=wrong)
    sae_helpers.write(tmp_path, old_config("standard"), weights)
    with pytest.raises(LensUnlearnError, match="leave it out"):
        lu.load_dictionary(tmp_path, norm_scaling_factor=0.25)


def test_weights_are_computed_with_in_the_dtype_of_the_configuration(tmp_path: Path) -> None:
    halves = {name: weight.half() for name, weight in sae_helpers.weights_of("jumprelu", 32).items()}
    one = lu.load_dictionary(sae_helpers.write(tmp_path, sae_helpers.config_of("jumprelu", 32), halves))
    assert one.encode(X.bfloat16()).dtype == torch.float32
    x = X.bfloat16()
    changed = one.encode(x).clone()
    changed[..., 2] += 3
    assert one.replaced(x, one.encode(x), changed).dtype == torch.bfloat16


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
REFUSED: dict[str, tuple[Change, str]] = {
    "transcoder": (
        lambda c, w: c.update(architecture="jumprelu_transcoder"),
        "writes at another hook point than it reads",
    ),
    "batch top-k": (lambda c, w: c.update(architecture="batchtopk"), "save_inference_model"),
    "architecture": (
        lambda c, w: c.update(architecture="temporal"),
        "architecture 'temporal': known are standard, topk",
    ),
    "architecture, no text": (lambda c, w: c.update(architecture=["standard"]), "architecture"),
    "no d_sae": (lambda c, w: c.pop("d_sae"), "has no 'd_sae'"),
    "no d_in": (lambda c, w: c.pop("d_in"), "has no 'd_in'"),
    "no hook": (lambda c, w: c.pop("metadata"), "has no 'hook_name'"),
    "empty hook": (lambda c, w: c["metadata"].update(hook_name=None), "has no 'hook_name'"),
    "hook outside": (lambda c, w: c["metadata"].update(hook_name="hook_embed"), "no hook point of a layer"),
    "hook of Hugging Face": (lambda c, w: c["metadata"].update(hook_name="model.layers.3"), "no hook point of a layer"),
    "size": (lambda c, w: c.update(d_sae="48"), "d_sae='48'"),
    "size 0": (lambda c, w: c.update(d_in=0), "d_in=0"),
    "one head": (lambda c, w: c["metadata"].update(hook_head_index=3), "one head alone"),
    "dtype, no text": (lambda c, w: c.update(dtype=["float32"]), "dtype"),
    "dtype": (lambda c, w: c.update(dtype="int8"), "dtype='int8'"),
    "flag": (lambda c, w: c.update(apply_b_dec_to_input="yes"), "apply_b_dec_to_input='yes'"),
    "activation": (lambda c, w: c.update(activation_fn="tanh-relu"), "activation_fn='tanh-relu'"),
    "shape": (lambda c, w: c.update(reshape_activations="hook_q"), "reshape_activations='hook_q'"),
    "normalization": (lambda c, w: c.update(normalize_activations="covariance_whitening"), "'covariance_whitening'"),
    "normalization, no text": (lambda c, w: c.update(normalize_activations=["none"]), "normalize_activations"),
    "other width": (lambda c, w: c.update(d_in=31), r"of .* is \(.*32.*\) float32, and .*31"),
    "other features": (lambda c, w: c.update(d_sae=47), r"of .* is \(.*48.*\) float32, and .*47"),
    "transposed": (lambda c, w: w.update(W_dec=w["W_dec"].T), r"W_dec of .* is \(32, 48\)"),
    "missing weight": (lambda c, w: w.pop("threshold"), "has no threshold"),
    "other weight": (lambda c, w: w.update(W_skip=w["W_enc"].clone()), "has 'W_skip'"),
    "NaN": (lambda c, w: w["W_enc"].fill_(float("nan")), "W_enc of .* holds NaN"),
    "integers": (lambda c, w: w.update(b_dec=w["b_dec"].int()), "b_dec of .* int32"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path: Path, what: str) -> None:
    change, words = REFUSED[what]
    config, weights = sae_helpers.config_of("jumprelu", 32), sae_helpers.weights_of("jumprelu", 32)
    change(config, weights)
    with pytest.raises(ArtefactError, match=words) as caught:
        lu.load_dictionary(sae_helpers.write(tmp_path, config, weights))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("k", [0, 49, "7", None, True])
def test_a_k_that_is_no_number_of_features_is_refused(tmp_path: Path, k: Any) -> None:
    config = sae_helpers.config_of("topk", 32) | {"k": k}
    with pytest.raises(ArtefactError, match="k"):
        lu.load_dictionary(sae_helpers.write(tmp_path, config, sae_helpers.weights_of("topk", 32)))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="give the folder in which SAELens saved a dictionary"):
        lu.load_dictionary(tmp_path / "nowhere")
    sae_helpers.write(tmp_path, sae_helpers.config_of("standard", 32), sae_helpers.weights_of("standard", 32))
    weights = tmp_path / "sae_weights.safetensors"
    whole = weights.read_bytes()
    for data in (whole[:-100], whole[:4], b"", b"\x80\x02" + whole):
        weights.write_bytes(data)
        with pytest.raises(ArtefactError, match="is not a safetensors file, or it is damaged"):
            lu.load_dictionary(tmp_path)
    weights.unlink()
    with pytest.raises(ArtefactError, match="cannot be read"):
        lu.load_dictionary(tmp_path)
    weights.write_bytes(whole)
    for text in ("{", "[1]", "\xff", json.dumps("standard"), "[" * 100_000):
        (tmp_path / "cfg.json").write_text(text, encoding="latin-1")
        with pytest.raises(ArtefactError, match=r"cfg\.json is not"):
            lu.load_dictionary(tmp_path)
