"""`load_dictionary`: read a sparse autoencoder from the folder in which SAELens keeps one.

The folder holds `cfg.json` and `sae_weights.safetensors`. Their layout changed with SAELens' versions; here is what each of them
wrote, and what of it is refused. Knows these files; of a `Dictionary` it knows the fields alone.
"""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lens_unlearn.core import artefacts
from lens_unlearn.core.errors import ArtefactError, LensUnlearnError
from lens_unlearn.demo import DICTIONARY_DIR
from lens_unlearn.model.dictionary import ARCHITECTURES, NORMALIZATIONS, Dictionary, layer_of

__all__ = ["load_dictionary"]

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FACTOR = "scaling_factor"
"""Of each feature, before the decoder; written by early versions, also where all are 1."""
DTYPES = {
    f"{prefix}{name}": getattr(torch, name)
    for prefix in ("", "torch.")
    for name in ("float64", "float32", "float16", "bfloat16")
}
SCALED = "expected_average_only_in"
"""The normalization by a number that is not in the folder."""
NOT_ONE = {
    **dict.fromkeys(
        ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder", "clt"),
        "a transcoder writes at another hook point than it reads, so that its features are of neither",
    ),
    **dict.fromkeys(
        ("batchtopk", "matryoshka_batchtopk"),
        "it is of the training, where features depend on the other texts of a batch: save it for inference, as jumprelu, with "
        "SAELens' save_inference_model",
    ),
}
"""Why some architectures cannot be read."""
RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
"""Keys of early versions, and what they are called since."""


def load_dictionary(path: str | os.PathLike[str], *, norm_scaling_factor: float | None = None) -> Dictionary:
    """Read a sparse autoencoder that SAELens saved.

    Architectures "standard", "jumprelu", "topk" and "gated"; one that was trained as batch top-k is saved as "jumprelu". SAELens
    itself is not needed.

    Args:
        path: A folder with ``cfg.json`` and ``sae_weights.safetensors``; "hf:OWNER/NAME/FOLDER" for one on the Hugging Face hub;
            or "demo" for one of the demo model.
        norm_scaling_factor: By how much activations are multiplied before they are encoded, where the configuration says
            "expected_average_only_in": that number is not in the folder. 1 if it is in the weights already.

    Returns:
        The dictionary, to be attached to a model.

    Raises:
        ArtefactError: If a file is missing or damaged, a key of the configuration is missing or means nothing known, or the weights
            have other names or shapes than it says.
    """
    folder = os.fspath(DICTIONARY_DIR if path == "demo" else path)
    config = _Config(folder)
    architecture, k = config.architecture()
    sizes = config.size("d_in"), config.size("d_sae")
    if k is not None and k > sizes[1]:
        raise config.refused(f"k={k} of {sizes[1]} features")
    made = Dictionary(
        config.hook_name(),
        architecture,
        {},
        k=k,
        centered=config.flag("apply_b_dec_to_input", True),
        normalize=config.normalization(norm_scaling_factor),
        heads=config.heads(),
        model_name=config.model_name(),
    )
    weights = _weights(f"{folder}/{WEIGHTS}", ARCHITECTURES[architecture], config.dtype(), *sizes)
    factor = weights.pop(FACTOR, None)
    if factor is not None and config.flag("finetuning_scaling_factor", False):  # of each feature, before the decoder
        weights["W_dec"] = factor[:, None] * weights["W_dec"]
    elif factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        raise config.refused(f"finetuning_scaling_factor=false, and {WEIGHTS} has such factors")
    if architecture == "topk" and config.flag("rescale_acts_by_decoder_norm", False):
        norms = weights["W_dec"].norm(dim=-1)  # features are as if each row of the decoder had the norm 1
        weights |= {"W_enc": weights["W_enc"] * norms, "b_enc": weights["b_enc"] * norms}
        weights["W_dec"] = weights["W_dec"] / norms[:, None]
    if norm_scaling_factor is not None:
        weights["W_enc"] = weights["W_enc"] * norm_scaling_factor
        weights |= {name: weights[name] / norm_scaling_factor for name in ("W_dec", "b_dec")}
    for name, weight in weights.items():
        # An infinite threshold is a feature that is never on.
        if not bool((~weight.isnan() if name == "threshold" else weight.isfinite()).all()):
            raise ArtefactError(f"{name} of {folder}/{WEIGHTS} holds NaN or infinity: the file is damaged")
    return replace(made, weights=weights)


class _Config:
    """What `cfg.json` says, whichever version of SAELens wrote it."""

    def __init__(self, folder: str) -> None:
        self.path = f"{folder}/{CONFIG}"
        try:
            content = json.loads(Path(artefacts.local(self.path)).read_text(encoding="utf-8"))
        except OSError as error:
            raise ArtefactError(
                f"{self.path} cannot be read ({error.strerror or error}): give the folder in which SAELens saved a dictionary"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ArtefactError(f"{self.path} is not JSON, or it is damaged") from error
        if not isinstance(content, dict):
            raise ArtefactError(f"{self.path} is not the configuration of a dictionary")
        about = content.get("metadata", content.get("meta"))  # from SAELens 6 on, with what says where it was trained
        merged = {**about, **content} if isinstance(about, dict) else content
        self.values = {RENAMED.get(key, key): value for key, value in merged.items()}

    def refused(self, what: str) -> ArtefactError:
        return ArtefactError(f"{self.path} says {what}, which cannot be read")

    def architecture(self) -> tuple[str, int | None]:
        """Return the architecture, and k."""
        values = self.values
        name, function = values.get("architecture", "standard"), values.get("activation_fn", "relu")
        options = values.get("activation_fn_kwargs")
        if function == "topk" and name == "standard":  # before SAELens 6
            name = "topk"
        if not isinstance(name, str) or name not in ARCHITECTURES:
            why = NOT_ONE.get(name) if isinstance(name, str) else None
            known = f"known are {', '.join(ARCHITECTURES)}"
            raise ArtefactError(f"{self.path} is of the architecture {name!r}: {f'{why}; ' if why else ''}{known}")
        if function not in ("relu", "topk") or (function == "topk" and name != "topk"):
            raise self.refused(f"activation_fn={function!r} of the architecture {name!r}")
        if values.get("hook_head_index") is not None:
            raise self.refused(f"hook_head_index={values['hook_head_index']!r}, one head alone")
        if name != "topk":
            return name, None
        if "k" not in values and isinstance(options, dict) and "k" in options:
            values["k"] = options["k"]
        return name, self.size("k")

    def size(self, key: str) -> int:
        """Return a number of at least 1."""
        value = self._required(key)
        if type(value) is not int or value < 1:
            raise self.refused(f"{key}={value!r}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return what is true or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.refused(f"{key}={value!r}")
        return value

    def dtype(self) -> torch.dtype:
        """Return the dtype to compute in."""
        name = self.values.get("dtype", "float32")
        if not isinstance(name, str) or name not in DTYPES:
            raise self.refused(f"dtype={name!r}")
        return DTYPES[name]

    def hook_name(self) -> str:
        """Return where it was trained."""
        name = self._required("hook_name")
        if not isinstance(name, str) or layer_of(name) is None:
            raise ArtefactError(
                f"{self.path} says hook_name={name!r}, which is no hook point of a layer: it has to be TransformerLens' name of "
                "one, such as 'blocks.3.hook_resid_post'"
            )
        return name

    def heads(self) -> bool:
        """Whether all heads are read as one vector."""
        reshaped = self.values.get("reshape_activations")
        if reshaped is None:
            reshaped = "hook_z" if self.hook_name().endswith("hook_z") else "none"
        if reshaped not in ("none", "hook_z"):
            raise self.refused(f"reshape_activations={reshaped!r}")
        return reshaped == "hook_z"

    def normalization(self, factor: float | None) -> str:
        """Return what is done to an activation first."""
        name = self.values.get("normalize_activations")
        name = (
            {None: "none", False: "none", True: SCALED}.get(name, name) if not isinstance(name, list | dict) else name
        )
        if factor is not None and name != SCALED:
            raise LensUnlearnError(
                f"norm_scaling_factor={factor:g} is for dictionaries whose configuration says {SCALED!r}; {self.path} says "
                f"{name!r}: leave it out"
            )
        if factor is not None and not (math.isfinite(factor) and factor > 0):
            raise LensUnlearnError(f"norm_scaling_factor={factor} scales nothing: give a number above 0")
        if name == SCALED:
            if factor is None:
                raise ArtefactError(
                    f"{self.path} says normalize_activations={SCALED!r}, by a number that is not in the folder: give it as "
                    "norm_scaling_factor=, or 1 if it is in the weights already"
                )
            return "none"
        if name not in NORMALIZATIONS:
            raise self.refused(f"normalize_activations={name!r}")
        return str(name)

    def model_name(self) -> str | None:
        """Return the model that it was trained on, if that is said."""
        name = self.values.get("model_name")
        return name if isinstance(name, str) else None

    def _required(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise ArtefactError(
                f"{self.path} has no {key!r}: it is not the configuration of a dictionary that SAELens wrote"
            )
        return self.values[key]


def _weights(path: str, names: tuple[str, ...], dtype: torch.dtype, d_in: int, d_sae: int) -> dict[str, Tensor]:
    """Read weights, which have to be those of an architecture, and of the sizes that the configuration says."""
    try:
        held = load_file(artefacts.local(path))
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ArtefactError(
            f"{path} is not a safetensors file, or it is damaged: {artefacts.first_line(error)}"
        ) from error
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name in names:
        if name not in held:
            raise ArtefactError(f"{path} has no {name}, which its architecture has")
    for name, weight in held.items():
        if name not in (*names, FACTOR):
            raise ArtefactError(f"{path} has {name!r}, which its architecture has not")
        shape = shapes.get(name, (d_sae,))
        if tuple(weight.shape) != shape or not weight.is_floating_point():
            found = f"{tuple(weight.shape)} {str(weight.dtype).removeprefix('torch.')}"
            raise ArtefactError(f"{name} of {path} is {found}, and with the sizes of {CONFIG} it is {shape} of floats")
    return {name: weight.to(dtype) for name, weight in held.items()}
