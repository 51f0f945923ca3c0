"""Loading models, and the fingerprint by which artefacts know them again."""

import contextlib
import hashlib
import os
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_unlearn.errors import ModelError
from lens_unlearn.sites import Model, boot, processing, require_model

__all__ = ["fingerprint", "load_model", "model_name"]

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")


def load_model(name: str | os.PathLike[str], *, device: str | None = None, dtype: torch.dtype = torch.float32) -> Model:
    """Load a model as a raw `TransformerBridge`, in evaluation mode.

    Args:
        name: "demo" (the embedded model, offline), a local Hugging Face directory, or a hub name.
        device: Where to; default "cuda" if there is one, else "cpu".
        dtype: Of the weights.

    Raises:
        ModelError: If the directory has no model, or the hub cannot be reached or does not know the name.
    """
    source = os.fspath(name)
    if source == "demo":
        from lens_unlearn import demo

        source = str(demo.MODEL_DIR)
    if os.path.isdir(source):
        _check_directory(Path(source))
    elif os.path.isabs(source) or source.startswith((".", "~")) or source.count("/") > 1:
        raise ModelError(f"there is no model directory {source}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Building a model draws initial weights: the caller's random state is not to depend on that.
        with _quiet(), torch.random.fork_rng(devices=[]):
            model = boot(source, device=device, dtype=dtype)
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise ModelError(
            f"{source!r} cannot be loaded as a model: {lines[0] if lines else type(error).__name__}"
        ) from error
    for module in model.modules():
        module.training = False
    _names[model] = str(name)
    return model


_names: "weakref.WeakKeyDictionary[Any, str]" = weakref.WeakKeyDictionary()


def model_name(model: Model) -> str:
    """Return what a model is called: as it was loaded, or as its configuration says."""
    known = _names.get(model)
    return Path(known).name if known else str(getattr(model.cfg, "model_name", None) or type(model).__name__)


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: give a Hugging Face model directory")
    if not any(True for pattern in _WEIGHTS for _ in path.glob(pattern)):
        raise ModelError(f"{path} has a configuration but no weights (no .safetensors or pytorch_model.bin)")


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep transformers' loading bars out of notebooks and reports; leave its settings as they were."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def fingerprint(model: Model) -> dict[str, Any]:
    """Describe a model so that another, or the same in another state, can be told apart.

    The weights' digest samples 64 values of each parameter; names do not enter, so it is the same under every
    TransformerLens version. Compatibility mode and dtype are part of it, because they change what activations are.
    """
    require_model(model)
    cfg = model.cfg
    return {
        "layers": int(cfg.n_layers),
        "width": int(cfg.d_model),
        "heads": int(cfg.n_heads),
        "vocabulary": int(cfg.d_vocab),
        "dtype": str(next(iter(model.parameters())).dtype).removeprefix("torch."),
        "processing": processing(model),
        "weights": _digest(model),
    }


def _digest(model: Model) -> str:
    seen: dict[tuple[int, tuple[int, ...]], bytes] = {}
    for parameter in model.parameters():
        key = (parameter.data_ptr(), tuple(parameter.shape))
        if key not in seen and not parameter.is_meta:
            seen[key] = _sample(parameter)
    return hashlib.sha256(b"".join(sorted(seen.values()))).hexdigest()[:16]


def _sample(parameter: Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    index = torch.linspace(0, max(0, flat.numel() - 1), min(64, flat.numel()), dtype=torch.float64).long()
    values = flat[index.to(flat.device)].float().cpu().contiguous()
    return str(sorted(parameter.shape)).encode() + values.numpy().tobytes()
