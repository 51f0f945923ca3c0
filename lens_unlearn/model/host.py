"""The host library: which TransformerLens is installed, how it loads a model, and in what state the model has to be.

Knows `HookedTransformer` and `TransformerBridge` as objects with `hook_dict` and `cfg`; knows nothing of single hook points.
"""

import os
import re
from functools import cache
from typing import Any

import torch

from lens_unlearn.core.errors import ModelError

__all__ = [
    "Model",
    "boot",
    "device_of",
    "host_version",
    "is_quantized",
    "is_wrapped",
    "part_of",
    "processing",
    "require_eval",
    "require_float",
    "require_host",
    "require_model",
    "bit_sums",
    "stored",
    "versions",
]

Model = Any
"""A `TransformerBridge` or a `HookedTransformer`: anything with `hook_dict` and `cfg` that can be called on tokens."""


def require_model(model: Model) -> None:
    """Refuse an object that is not a TransformerLens model: the first line of every public function that takes a model.

    Raises:
        ModelError: If the object has no hook points, or the installed TransformerLens is not one of those supported.
    """
    require_host()
    if not isinstance(model, type) and all(hasattr(model, name) for name in ("hook_dict", "cfg", "named_modules")):
        if hasattr(model, "blocks"):
            return
        kind = type(getattr(model, "original_model", model)).__name__
        raise ModelError(f"a {kind} has no single stack of layers (as encoder-decoders have not), and is not supported")
    if isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        raise ModelError(f"{name!r} is a name, and has no hook points: pass lens_unlearn.load_model({name!r})")
    what = "None" if model is None else f"a {type(model).__name__}"
    if isinstance(model, type):
        what = f"the class {model.__name__}"
    elif isinstance(model, torch.nn.Module):
        what = f"a plain {type(model).__name__}"
    raise ModelError(
        f"{what} has no hook points: pass a TransformerBridge or a HookedTransformer, as "
        "lens_unlearn.load_model(NAME_OR_DIRECTORY) returns it"
    )


def require_eval(model: Model) -> None:
    """Refuse a model in training mode, in which dropout would make every result random.

    Raises:
        ModelError: If the model, or a dropout module of it, is in training mode.
    """
    if model.training:
        raise ModelError("the model is in training mode: call model.eval() first")
    for name, module in model.named_modules():
        if module.training and "dropout" in type(module).__name__.lower():
            raise ModelError(f"{name} is in training mode: call model.eval() first")


def require_float(model: Model, why: str = "no gradient flows through its weights") -> None:
    """Refuse a quantized model, through whose weights no gradient flows.

    Raises:
        ModelError: If a parameter is quantized.
    """
    if any(map(is_quantized, model.parameters())):
        raise ModelError(f"this model is quantized: {why}; load it unquantized")


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a weight is stored as other numbers than it means: integers, maybe packed, or in a class of its own (torchao's)."""
    return not weight.is_floating_point() or type(weight).dequantize is not torch.Tensor.dequantize


def stored(weight: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors in which a weight is stored: itself, or those of a class that has no memory of its own (torchao's)."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    return [part for name in names for part in stored(getattr(weight, name))]


def bit_sums(weight: torch.Tensor) -> bytes:
    """Return the sums over the bits of a weight, by row and by column, eight bytes at a time: about as fast as memory is read.

    They tell whether it is as it was. PyTorch's own count of changes does not, where they are written through `.data`.
    """
    if not weight.numel():
        return b""
    rows = weight.detach().reshape(-1 if weight.ndim == 0 else weight.shape).contiguous().view(torch.uint8)
    rows = rows.view(torch.int64) if rows.shape[-1] % 8 == 0 else rows.long()
    rows = rows.reshape(
        -1, rows.shape[-1]
    )  # columns as well: heads are columns of an output matrix, and may be swapped there
    return torch.cat([rows.sum(-1), rows.sum(0)]).cpu().numpy().tobytes()


def device_of(model: Model) -> torch.device:
    """Return the device on which a model takes its tokens."""
    first = next(iter(model.parameters())).device
    if first.type != "meta":
        return first
    # Offloaded weights are on "meta" between forward passes: the device is the one to which accelerate loads them.
    hooks = [module.__dict__.get("_hf_hook") for module in model.modules()]
    devices = [getattr(hook, "execution_device", None) for hook in hooks if hook is not None]
    return torch.device(next((device for device in devices if device not in (None, "meta", "disk")), "cpu"))


def part_of(model: Model, layer: int, name: str) -> Any:
    """Return the attention ("attn") or MLP ("mlp") of a layer; None where TransformerLens shows none, as in layers of hybrids."""
    block = model.blocks[layer]
    part = getattr(block, name, None)
    return getattr(block, "shared_mlp", None) if part is None and name == "mlp" else part  # Granite's hybrids


def processing(model: Model) -> str:
    """Return in what form TransformerLens holds the weights; saved files record it, since it decides what `attn.z` is."""
    if hasattr(model, "original_model"):
        return "bridge, compatibility mode" if getattr(model, "compatibility_mode", False) else "bridge"
    return "hooked transformer"


def boot(source: str, *, dtype: torch.dtype, **options: Any) -> Model:
    """Load a model by hub name or directory, or wrap a loaded one (`hf_model`), as a raw `TransformerBridge`.

    Raises:
        ModelError: If the installed TransformerLens is not one of those supported.
    """
    require_host()
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(source, dtype=dtype, **options)


def host_version() -> str:
    """Return the version of the installed TransformerLens."""
    return _installed("transformer-lens")


def versions() -> dict[str, str]:
    """Return the versions of the libraries that run a model, as reports and saved files record them."""
    from lens_unlearn import __version__

    return {
        "lens_unlearn": __version__,
        "torch": torch.__version__,
        "transformers": _installed("transformers"),
        "transformer_lens": host_version(),
        "datasets": _installed("datasets"),
    }


@cache  # it is looked up on disk, and every report asks
def _installed(package: str) -> str:
    from importlib.metadata import version

    return version(package)


@cache
def require_host() -> None:
    """Refuse a TransformerLens whose hook points this package was not tested with.

    Raises:
        ModelError: If the installed version is none of those supported; the message says what to install.
    """
    numbers = re.match(r"(\d+)\.(\d+)", host_version())
    if not numbers or not (3, 9) <= (int(numbers[1]), int(numbers[2])) < (5, 0):
        raise ModelError(
            f"transformer-lens {host_version()} is not supported: run pip install 'transformer-lens>=3.9,<5' "
            "and start Python again"
        )


def is_wrapped(model: Any) -> bool:
    """Whether a model, or a module inside it, is of a class of TransformerLens."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else [model]
    return any(type(module).__module__.partition(".")[0] == "transformer_lens" for module in modules)
