"""What SAELens itself computes, of what it saved: run where it is installed (it needs TransformerLens below 4)."""

from pathlib import Path
from typing import Any

import pytest
import sae_helpers
import torch

import lens_unlearn as lu
from lens_unlearn.demo import DICTIONARY_DIR

sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed, and is not needed but to be compared with")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.changes_random_state]  # its classes draw weights

X = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(5)) * 2 + 0.3
CLASSES = {"standard": "StandardSAE", "topk": "TopKSAE", "jumprelu": "JumpReLUSAE", "gated": "GatedSAE"}


def same(theirs: Any, ours: lu.Dictionary, x: torch.Tensor) -> None:
    with torch.no_grad():
        features = theirs.encode(x)
        out = theirs.decode(features)
    torch.testing.assert_close(
        ours.encode(x), features.to_dense() if features.is_sparse else features, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(ours.decode(ours.encode(x), x), out, rtol=1e-5, atol=1e-5)
    assert 0.03 < float((features > 0).float().mean()) < 0.8


@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize("normalize", ["none", "constant_norm_rescale", "layer_norm"])
def test_what_it_saves_is_read_as_it_computes(tmp_path: Path, architecture: str, normalize: str) -> None:
    made = getattr(sae_lens, CLASSES[architecture])
    for centered, heads, rescale in ((True, False, False), (False, True, architecture == "topk")):
        options: dict[str, Any] = {"k": 7} if architecture == "topk" else {}
        if rescale:
            options["rescale_acts_by_decoder_norm"] = True
        config = getattr(sae_lens, f"{CLASSES[architecture]}Config")(
            d_in=32,
            d_sae=sae_helpers.D_SAE,
            apply_b_dec_to_input=centered,
            normalize_activations=normalize,
            reshape_activations="hook_z" if heads else "none",
            **options,
        )
        config.metadata.hook_name = "blocks.0.attn.hook_z" if heads else "blocks.0.hook_resid_post"
        theirs = made(config)
        theirs.load_state_dict(sae_helpers.weights_of(architecture, 32))
        theirs.save_model(tmp_path)
        same(theirs, lu.load_dictionary(tmp_path), X.view(3, 7, 4, 8) if heads else X)


def test_batch_top_k_is_read_as_it_saves_it_for_inference(tmp_path: Path) -> None:
    config = sae_lens.BatchTopKTrainingSAEConfig(d_in=32, d_sae=sae_helpers.D_SAE, k=9)
    config.metadata.hook_name = "blocks.0.hook_resid_post"
    trained = sae_lens.BatchTopKTrainingSAE(config)
    state = trained.state_dict() | sae_helpers.weights_of("standard", 32)
    state["topk_threshold"] = torch.tensor(0.4, dtype=state["topk_threshold"].dtype)
    trained.load_state_dict(state)
    trained.save_inference_model(tmp_path)
    ours = lu.load_dictionary(tmp_path)
    assert ours.architecture == "jumprelu"
    same(sae_lens.SAE.load_from_disk(tmp_path), ours, X)
    trained.save_model(tmp_path)
    with pytest.raises(lu.ArtefactError, match="save_inference_model"):
        lu.load_dictionary(tmp_path)


@pytest.mark.parametrize("architecture", CLASSES)
def test_what_early_versions_saved_is_read_as_it_reads_it(tmp_path: Path, architecture: str) -> None:
    config = {**sae_helpers.config_of(architecture, 32), "activation_fn_str": "relu", "apply_b_dec_to_input": False}
    config["hook_name"] = config.pop("metadata")["hook_name"]
    for key in ("reshape_activations", "normalize_activations"):
        del config[key]
    if architecture == "topk":
        config |= {
            "architecture": "standard",
            "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": config.pop("k")},
        }
    sae_helpers.write(tmp_path, config, sae_helpers.weights_of(architecture, 32))
    same(sae_lens.SAE.load_from_disk(tmp_path), lu.load_dictionary(tmp_path), X)


def test_transcoders_are_refused(tmp_path: Path) -> None:
    config = sae_lens.TranscoderConfig(d_in=32, d_sae=48, d_out=32, apply_b_dec_to_input=False)
    config.metadata.hook_name = "blocks.0.ln2.hook_normalized"
    sae_lens.Transcoder(config).save_model(tmp_path)
    with pytest.raises(lu.ArtefactError, match="writes at another hook point than it reads"):
        lu.load_dictionary(tmp_path)


def test_it_reads_the_demo_models() -> None:
    x = torch.randn(50, 144, generator=torch.Generator().manual_seed(0)) * 1.5
    theirs, ours = sae_lens.SAE.load_from_disk(DICTIONARY_DIR), lu.load_dictionary("demo")
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x))
    assert theirs.cfg.metadata.hook_name == ours.hook_name
