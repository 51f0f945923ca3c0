"""Loading models, and the fingerprint by which artefacts know them again."""

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

    A model that does not fit one device is spread over several by accelerate: ``device_map="auto"``. Hooks act, and statistics
    are summed, where each layer is.

    Args:
        name: "demo" (the embedded model, offline), a local Hugging Face directory, or a hub name.
        device: Where to; default "cuda" if there is one, else "cpu". Of several processes that `torchrun` started, each takes the
            GPU of its own number.
        dtype: Of the weights; also by name, such as "bfloat16".
        device_map: Where its parts go, as in `transformers`: "auto", "balanced", or a place for each; "cpu" and "disk" are
            places whose weights are fetched for each forward pass. In place of `device`. Needs accelerate.
        max_memory: With a `device_map` such as "auto": the most that each device takes, such as ``{0: "20GiB", "cpu": "60GiB"}``.
        offload_folder: Where the weights of "disk" are kept; with TransformerLens 4.

    Raises:
        ModelError: If the directory has no model, or the hub cannot be reached or does not know the name; if the model cannot
            be placed as wanted.
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
        # Building a model draws initial weights: the caller's random state is not to depend on that.
        with _quiet(), torch.random.fork_rng(devices=[]):
            model = boot(source, dtype=dtype, **placed)
    except Exception as error:
        lines = str(error).strip().splitlines()
        told = lines[0] if lines else type(error).__name__
        told = told if len(told) <= 300 else f"{told[:297]}..."
        raise ModelError(f"{source!r} cannot be loaded as a model: {told}") from error
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
    elsewhere = []
    for parameter in model.parameters():
        key = (parameter.data_ptr(), tuple(parameter.shape))
        if parameter.is_meta:
            elsewhere.append(parameter)
        elif key not in seen:
            seen[key] = _sample(parameter)
    if elsewhere:
        known = set(seen.values())
        for number, (ndim, sample) in enumerate(_fetched(model, {id(parameter) for parameter in elsewhere})):
            if ndim < 2 or sample not in known:  # a matrix that is there again is one that is shared
                seen[-1, (number,)] = sample
            known.add(sample)
    return hashlib.sha256(b"".join(sorted(seen.values()))).hexdigest()[:16]


def _fetched(model: Model, wanted: set[int]) -> Iterator[tuple[int, bytes]]:
    """Sample weights that accelerate keeps on a disk, or in the main memory for another device, one module at a time."""
    from accelerate.utils import align_module_device

    for module in model.modules():
        names = [name for name, own in module._parameters.items() if own is not None and id(own) in wanted]
        wanted -= {id(module._parameters[name]) for name in names}
        if names and hasattr(module, "_hf_hook"):
            with align_module_device(module):
                for name in names:
                    own = getattr(module, name)
                    yield own.ndim, _sample(own)


def _sample(parameter: Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    index = torch.linspace(0, max(0, flat.numel() - 1), min(64, flat.numel()), dtype=torch.float64).long()
    values = flat[index.to(flat.device)].float().cpu().contiguous()
    return str(sorted(parameter.shape)).encode() + values.numpy().tobytes()
