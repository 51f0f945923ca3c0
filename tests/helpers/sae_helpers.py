"""Small random dictionaries in SAELens' layout, and their formulas once more, in NumPy and float64."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

D_SAE = 48


def weights_of(architecture: str, d_in: int, d_sae: int = D_SAE, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights with which about a third of the features is on."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    weights = {
        "W_enc": draw(d_in, d_sae, scale=d_in**-0.5),
        "W_dec": draw(d_sae, d_in, scale=d_in**-0.5),
        "b_dec": draw(d_in, scale=0.1),
    }
    if architecture == "gated":
        return weights | {"b_gate": draw(d_sae), "r_mag": draw(d_sae, scale=0.3), "b_mag": draw(d_sae)}
    weights["b_enc"] = draw(d_sae)
    return weights | ({"threshold": draw(d_sae).abs() / 2} if architecture == "jumprelu" else {})


def config_of(
    architecture: str, d_in: int, d_sae: int = D_SAE, hook: str = "blocks.0.hook_resid_post"
) -> dict[str, Any]:
    """What SAELens 6 writes."""
    return {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": hook, "model_name": "tiny", "sae_lens_version": "6.54.12"},
        **({"k": 7, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}),
    }


def write(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "sae_weights.safetensors")
    return folder


def encoded(config: dict[str, Any], weights: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return features and the reconstruction, by the papers' formulas."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    x = x.double().numpy()
    shape = x.shape
    if config["reshape_activations"] == "hook_z":
        x = x.reshape(*shape[:-2], -1)
    scale, offset = np.ones_like(x[..., :1]), np.zeros_like(x[..., :1])
    if config["normalize_activations"] == "constant_norm_rescale":
        scale = np.linalg.norm(x, axis=-1, keepdims=True) / np.sqrt(x.shape[-1])
        x = x / scale
    elif config["normalize_activations"] == "layer_norm":
        offset, scale = x.mean(-1, keepdims=True), x.std(-1, keepdims=True, ddof=1)
        x = (x - offset) / (scale + 1e-5)
    if config["apply_b_dec_to_input"]:
        x = x - w["b_dec"]
    if config["architecture"] == "gated":
        features = np.maximum(x @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"], 0) * (
            x @ w["W_enc"] + w["b_gate"] > 0
        )
    else:
        before = x @ w["W_enc"] + w["b_enc"]
        norms = np.linalg.norm(w["W_dec"], axis=1) if config.get("rescale_acts_by_decoder_norm") else 1.0
        before = before * norms
        features = np.maximum(before, 0)
        if config["architecture"] == "jumprelu":
            features = features * (before > w["threshold"])
        if config["architecture"] == "topk":
            smallest = np.sort(before, axis=-1)[..., -config["k"], None]
            features = features * (before >= smallest)
        w["W_dec"] = w["W_dec"] / np.broadcast_to(norms, len(w["W_dec"]))[:, None]
    out = (features @ w["W_dec"] + w["b_dec"]) * scale + offset
    return features, out.reshape(shape)
