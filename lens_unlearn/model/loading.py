"""Loading models, and fingerprints by which saved files recognize the model that they were made with.

Knows Hugging Face directories, devices and parameters; knows nothing of hooks or of what is done with a model.
"""

import contextlib
import hashlib
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_unlearn.core.errors import ModelError
from lens_unlearn.model.host import Model, boot, processing, require_model

__all__ = ["fingerprint", "load_model", "model_name"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")


def load_model(
    name: str | os.PathLike[str],
    *,
    device: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    device_map: str | Mapping[str, str | int] | None = None,
    max_memory: Mapping[str | int, str | int] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> Model:
    """Load a model as a raw `TransformerBridge`, in evaluation mode.

    A model that does not fit on one device is spread over several by accelerate: ``device_map="auto"``. Hooks and statistics then
    run on the device of each layer.

    Args:
        name: "demo" (the embedded model, offline), a local Hugging Face directory, or a hub name.
        device: The device; default "cuda" if available, else "cpu". Of several processes started by `torchrun`, each takes the
            GPU of its local rank.
        dtype: The dtype of the weights, also by name, such as "bfloat16".
        device_map: The placement of the modules, as in `transformers`: "auto", "balanced", or a device for each; weights on "cpu"
            and "disk" are offloaded, and loaded for each forward pass. Instead of `device`. Needs accelerate.
        max_memory: With a `device_map` such as "auto": the memory limit of each device, such as ``{0: "20GiB", "cpu": "60GiB"}``.
        offload_folder: The folder for weights offloaded to "disk"; needs TransformerLens 4.

    Raises:
        ModelError: If the directory holds no model, the hub cannot be reached or does not know the name, or the model cannot be
            placed as asked.
    """
    if device is not None and device_map is not None:
        raise ModelError(f"device={device!r} and a device_map were given: give one of them")
    if device_map is None and (max_memory is not None or offload_folder is not None):
        raise ModelError("max_memory and offload_folder are for a device_map: give one, such as device_map='auto'")
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ModelError(f"dtype={dtype!r} is not known: choose from {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    source = os.fspath(name)
    if source == "demo":
        from lens_unlearn import demo

        source = str(demo.MODEL_DIR)
    if os.path.isdir(source):
        _check_directory(Path(source))
    elif os.path.isabs(source) or source.startswith((".", "~")) or source.count("/") > 1:
        raise ModelError(f"there is no model directory {source}")
    placed: dict[str, Any] = {"device": device or _default_device()}
    if device_map is not None:
        given = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
        placed = {key: value for key, value in given.items() if value is not None}
    try:
        # Building a model draws initial weights, which must not change the caller's random state.
        with _quiet(), torch.random.fork_rng(devices=[]):
            model = boot(source, dtype=dtype, **placed)
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        reason = reason if len(reason) <= 300 else f"{reason[:297]}..."
        raise ModelError(f"{source!r} cannot be loaded as a model: {reason}") from error
    for module in model.modules():
        module.training = False
    _names[model] = str(name)
    return model


def _default_device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    local = os.environ.get("LOCAL_RANK") if int(os.environ.get("WORLD_SIZE") or 1) > 1 else None
    return "cuda" if local is None else f"cuda:{int(local) % torch.cuda.device_count()}"


_names: "weakref.WeakKeyDictionary[Any, str]" = weakref.WeakKeyDictionary()


def model_name(model: Model) -> str:
    """Return the name of a model: the one it was loaded by, else the one in its configuration."""
    known = _names.get(model)
    return Path(known).name if known else str(getattr(model.cfg, "model_name", None) or type(model).__name__)


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: give a Hugging Face model directory")
    if not any(True for pattern in _WEIGHTS for _ in path.glob(pattern)):
        raise ModelError(f"{path} has a configuration but no weights (no .safetensors or pytorch_model.bin)")


@contextlib.contextmanager
def _quiet() -> Any:
    """Hide the progress bars of transformers while a model is loaded."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def fingerprint(model: Model) -> dict[str, Any]:
    """Describe a model so that saved files can distinguish it from other models, and from itself in another state.

    The digest of the weights samples 64 values of each parameter; parameter names do not enter. The bridges of TransformerLens
    3.9 and 4 hold other parameters of the same model, so a file that one of them wrote is refused under the other. Compatibility
    mode and dtype are part of the fingerprint, because they change the activations.
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
    offloaded = []
    for parameter in model.parameters():
        key = (parameter.data_ptr(), tuple(parameter.shape))
        if parameter.is_meta:
            offloaded.append(parameter)
        elif key not in seen:
            seen[key] = _sample(parameter)
    if offloaded:
        known = set(seen.values())
        for number, (ndim, sample) in enumerate(_fetched(model, {id(parameter) for parameter in offloaded})):
            if (
                ndim < 2 or sample not in known
            ):  # a matrix that occurs twice is shared (tied embeddings), and counts once
                seen[-1, (number,)] = sample
            known.add(sample)
    return hashlib.sha256(b"".join(sorted(seen.values()))).hexdigest()[:16]


def _fetched(model: Model, wanted: set[int]) -> Iterator[tuple[int, bytes]]:
    """Sample weights that accelerate has offloaded to disk or to main memory, loading one module at a time."""
    from accelerate.utils import align_module_device

    for module in model.modules():
        names = [name for name, weight in module._parameters.items() if weight is not None and id(weight) in wanted]
        wanted -= {id(module._parameters[name]) for name in names}
        if names and hasattr(module, "_hf_hook"):
            with align_module_device(module):
                for name in names:
                    weight = getattr(module, name)
                    yield weight.ndim, _sample(weight)


def _sample(parameter: Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    index = torch.linspace(0, max(0, flat.numel() - 1), min(64, flat.numel()), dtype=torch.float64).long()
    values = flat[index.to(flat.device)].float().cpu().contiguous()
    return str(sorted(parameter.shape)).encode() + values.numpy().tobytes()
