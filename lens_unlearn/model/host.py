"""Hook points: the only module that knows TransformerLens by name.

A `Site` says *where* in a model (layer and kind). `resolve` turns sites into the hook points of one model, after a
probe forward has shown that each of them fires once and has a neuron axis. `attach` adds one hook and returns the one
callable that removes exactly that hook. `backbone` runs a model without its unembedding.

Facts relied on here, measured on TransformerLens 3.9 and 4.3: the names below resolve on `HookedTransformer` and on
`TransformerBridge`, raw or in compatibility mode; on the bridge several names may stand for one `HookPoint`; hook
points of mixture-of-experts layers exist but carry the residual width; `cfg.d_mlp` can be wrong (OPT).
"""

import re
from functools import cache
from typing import Any

import torch

from lens_unlearn.core.errors import ModelError

__all__ = ["boot", "processing", "require_eval"]

Model = Any
"""A `TransformerBridge` or a `HookedTransformer`: whatever has `hook_dict`, `cfg`, and can be called on tokens."""


def require_model(model: Model) -> None:
    """Refuse what is not a TransformerLens model.

    Raises:
        ModelError: If the object has no hook points, or the installed TransformerLens is not one of those supported.
    """
    require_host()
    if not (hasattr(model, "hook_dict") and hasattr(model, "cfg")):
        raise ModelError(
            f"a {type(model).__name__} has no hook points: pass a TransformerBridge or a HookedTransformer, "
            "or a name or directory to lens_unlearn.load_model"
        )


def require_eval(model: Model) -> None:
    """Refuse a model in training mode, where dropout would make every number random.

    Raises:
        ModelError: Naming the first module in training mode.
    """
    if model.training:
        raise ModelError("the model is in training mode: call model.eval() first")
    for name, module in model.named_modules():
        if module.training and "dropout" in type(module).__name__.lower():
            raise ModelError(f"{name} is in training mode: call model.eval() first")


def require_float(model: Model) -> None:
    """Refuse a quantized model, through whose weights no gradient flows.

    Raises:
        ModelError: Saying so.
    """
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        raise ModelError("this model is quantized: no gradient flows through its weights; load it unquantized")


def device_of(model: Model) -> torch.device:
    """Return where a model takes its tokens."""
    first = next(iter(model.parameters())).device
    if first.type != "meta":
        return first
    # Weights on a disk: the device is the one that accelerate fetches them to.
    hooks = [module.__dict__.get("_hf_hook") for module in model.modules()]
    devices = [getattr(hook, "execution_device", None) for hook in hooks if hook is not None]
    return torch.device(next((device for device in devices if device not in (None, "meta", "disk")), "cpu"))


def processing(model: Model) -> str:
    """Name how TransformerLens holds the weights: it decides what `attn.z` is, so artefacts record it."""
    if hasattr(model, "original_model"):
        return "bridge, compatibility mode" if getattr(model, "compatibility_mode", False) else "bridge"
    return "hooked transformer"


def boot(source: str, *, dtype: torch.dtype, **placed: Any) -> Model:
    """Load a model by hub name or directory as a raw `TransformerBridge`.

    Raises:
        ModelError: If the installed TransformerLens is not one of those supported.
    """
    require_host()
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(source, dtype=dtype, **placed)


def host_version() -> str:
    """Return the version of the installed TransformerLens."""
    from importlib.metadata import version

    return version("transformer-lens")


def versions() -> dict[str, str]:
    """Return the versions of what runs a model, as provenances keep them."""
    from importlib.metadata import version

    from lens_unlearn import __version__

    return {
        "lens_unlearn": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "transformer_lens": host_version(),
        "datasets": version("datasets"),
    }


@cache
def require_host() -> None:
    """Refuse versions of TransformerLens whose hook points nobody has looked at.

    Raises:
        ModelError: Saying what to install.
    """
    numbers = re.match(r"(\d+)\.(\d+)", host_version())
    if not numbers or not (3, 9) <= (int(numbers[1]), int(numbers[2])) < (5, 0):
        raise ModelError(
            f"transformer-lens {host_version()} is not supported: run pip install 'transformer-lens>=3.9,<5' "
            "and start Python again"
        )


def is_wrapped(model: Any) -> bool:
    """Say whether a model, or a part of it, belongs to TransformerLens."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else [model]
    return any(type(module).__module__.partition(".")[0] == "transformer_lens" for module in modules)
