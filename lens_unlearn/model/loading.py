"""Loading models, and fingerprints by which saved files recognize the model that they were made with.

Knows Hugging Face directories, devices and parameters; knows nothing of hooks or of what is done with a model.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_unlearn.core import artefacts
from lens_unlearn.core.counter_rng import mix
from lens_unlearn.core.errors import ModelError
from lens_unlearn.model.dictionary_files import load_dictionary
from lens_unlearn.model.dtypes import AUTO, dtype_of, has_fast_bfloat16, stored_dtype
from lens_unlearn.model.feature_points import dictionaries_at, require_dictionaries
from lens_unlearn.model.gguf import read_gguf
from lens_unlearn.model.host import Model, bit_sums, boot, is_wrapped, processing, require_model, stored
from lens_unlearn.model.special_tokens import adds_bos_itself

__all__ = ["as_in_file", "fingerprint", "load_model", "model_entry", "model_name", "require_model_of"]

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")


def load_model(
    name: str | os.PathLike[str] | torch.nn.Module,
    *,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
    max_memory: Mapping[str | int, str | int] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    dictionary: str | os.PathLike[str] | None = None,
) -> Model:
    """Load a model as a raw `TransformerBridge`, in evaluation mode.

    A model that does not fit on one device is spread over several by accelerate: ``device_map="auto"``. Hooks and statistics then
    run on the device of each layer.

    Args:
        name: "demo" (the embedded model, offline), a local Hugging Face directory, a GGUF file ("folder/model.gguf", or
            "OWNER/NAME/model.gguf" of the hub; its weights are dequantized), or a hub name. Or a Hugging Face model that you
            hold, such as one that a PEFT adapter was merged into: it becomes a part of the bridge, and is not to be used by itself
            any more.
        device: The device; default "cuda" if available, else "cpu"; of a model that you hold, the one it is on. Of several
            processes started by `torchrun`, each takes the GPU of its local rank.
        dtype: The dtype of the weights, also by name, such as "bfloat16"; default float32, and of a model that you hold, its own.
            "auto" is bfloat16 where the device has instructions for it and the weights are stored in no more than 16 bits, as
            those of a GGUF file; else float32.
        device_map: The placement of the modules, as in `transformers`: "auto", "balanced", or a device for each; weights on "cpu"
            and "disk" are offloaded, and loaded for each forward pass. Instead of `device`. Needs accelerate.
        max_memory: With a `device_map` such as "auto": the memory limit of each device, such as ``{0: "20GiB", "cpu": "60GiB"}``.
        offload_folder: The folder for weights offloaded to "disk"; needs TransformerLens 4.
        revision: A branch, tag or commit of a repository on the hub.
        trust_remote_code: Whether to run the code that comes with a model, if it does: off unless you trust it.
        tokenizer: The tokenizer, for a model that you hold; default the one of the directory or repository that it was loaded from.
        dictionary: A sparse autoencoder as `load_dictionary` takes it, whose features are to be the neurons of the site `sae`.

    Raises:
        ArtefactError: If the dictionary cannot be read.
        ModelError: If the directory or file holds no model, the hub cannot be reached or does not know the name, or the model
            cannot be placed as asked.
    """
    held = isinstance(name, torch.nn.Module)
    if not held and (not isinstance(name, str | os.PathLike) or not os.fspath(name)):
        raise ModelError(
            f"{_kind(name)} is no name of a model: give 'demo', a Hugging Face directory, a GGUF file, a hub name, or a "
            "Hugging Face model that you hold"
        )
    if device is not None and device_map is not None:
        raise ModelError(f"device={device!r} and a device_map were given: give one of them")
    if device_map is None and (max_memory is not None or offload_folder is not None):
        raise ModelError("max_memory and offload_folder are for a device_map: give one, such as device_map='auto'")
    auto = isinstance(dtype, str) and dtype == AUTO
    dtype = None if dtype is None or auto else dtype_of(dtype)
    placed: dict[str, Any] = {"device": device or _default_device()}
    if device_map is not None:
        given = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
        placed = {key: value for key, value in given.items() if value is not None}
    features = (
        None if dictionary is None else load_dictionary(dictionary)
    )  # a wrong one is refused before the model is loaded
    source: Any = name if held else os.fspath(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if held:
        if revision is not None or device_map is not None:
            raise ModelError("revision and device_map are for loading: the model that was given is already loaded")
        model = _wrapped(source, dtype, device, tokenizer)
    elif tokenizer is not None:
        raise ModelError(f"a tokenizer is for a model that you hold: {source!r} comes with its own")
    else:
        model = _loaded(source, dtype, auto, placed, options)
    if features is not None:
        features.attach(model)
    return model


def _loaded(
    source: str, dtype: torch.dtype | None, auto: bool, placed: dict[str, Any], options: dict[str, Any]
) -> Model:
    """Load a model by its name, directory or GGUF file."""
    name, device = source, placed.get("device") or _default_device()
    dtype = dtype or torch.float32
    if source == "demo":
        from lens_unlearn import demo

        source = str(demo.MODEL_DIR)
    if source.lower().endswith(".gguf"):
        folder, file = _gguf(source, options["revision"])
        dtype = _auto(source, device, options) if auto else dtype
        with _as_model_error(source):
            hugging_face, tokenizer = read_gguf(folder, file, dtype=dtype, **placed, **options)
            model = _booted(
                source, dtype=dtype, hf_model=hugging_face, tokenizer=tokenizer, device=placed.get("device")
            )
    else:
        if os.path.isdir(source):
            _check_directory(Path(source))
        elif os.path.isabs(source) or source.startswith((".", "~")) or source.count("/") > 1:
            raise ModelError(f"there is no model directory {source}")
        dtype = _auto(source, device, options) if auto else dtype
        with _as_model_error(source):
            model = boot(source, dtype=dtype, **placed, **{key: value for key, value in options.items() if value})
    return _ready(model, name)


def _wrapped(held: Any, dtype: torch.dtype | None, device: str | None, tokenizer: Any) -> Model:
    """Make a bridge of a Hugging Face model."""
    kind = type(held).__name__
    if is_wrapped(held):
        raise ModelError(f"the {kind} is a model with hook points already: pass it as it is")
    if hasattr(held, "merge_and_unload"):
        raise ModelError(f"the {kind} has adapters that are not merged: give model.merge_and_unload()")
    if not hasattr(held, "config") or not hasattr(held, "get_input_embeddings"):
        raise ModelError(
            f"the {kind} is no Hugging Face model: give one of transformers' classes for causal language models"
        )
    source = str(getattr(held.config, "_name_or_path", "") or "")
    if tokenizer is None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(source or os.devnull)
        except Exception as error:
            raise ModelError(
                f"the {kind} does not say where its tokenizer is: give load_model(model, tokenizer=...)"
            ) from error
    with _as_model_error(kind):
        held = held.to(device=device, dtype=dtype)
        where, first = device or str(held.device), next(held.parameters())
        held.config.architectures = held.config.architectures or [kind]
        model = _booted(source or kind, dtype=first.dtype, hf_model=held, tokenizer=tokenizer, device=where)
    return _ready(model, source or kind)


def _booted(source: str, *, tokenizer: Any, **options: Any) -> Model:
    """Boot a bridge with a tokenizer that is at hand, and note whether that adds BOS before TransformerLens asks it to."""
    adds = adds_bos_itself(tokenizer)
    model = boot(source, tokenizer=tokenizer, **options)
    if adds is not None:
        model.tokenizer._lens_unlearn_adds_bos = adds
    return model


def _ready(model: Model, name: str) -> Model:
    for module in model.modules():
        module.training = False
    _names[model] = name
    return model


@contextlib.contextmanager
def _as_model_error(source: str) -> Iterator[None]:
    """Give whatever goes wrong while a model is loaded as one sentence."""
    try:
        # Building a model draws initial weights, which must not change the caller's random state.
        with _quiet(), torch.random.fork_rng(devices=[]):
            yield
    except ModelError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        reason = reason if len(reason) <= 300 else f"{reason[:297]}..."
        raise ModelError(f"{source!r} cannot be loaded as a model: {reason}") from error


def _gguf(source: str, revision: str | None) -> tuple[str, str]:
    """Return the folder, or the repository, of a GGUF file, and its name there."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"{source!r} is a GGUF file, and the package gguf is missing: pip install 'lens-unlearn[gguf]'"
        )
    path = Path(source)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{source} is no GGUF file: it does not begin with GGUF")
        return str(path.parent), path.name
    parts = source.split("/")
    if len(parts) < 3 or path.is_absolute() or source.startswith((".", "~")) or path.exists():
        raise ModelError(f"there is no GGUF file {source}")
    return "/".join(parts[:2]), "/".join(parts[2:])


def _auto(source: str, device: str, options: Mapping[str, Any]) -> torch.dtype:
    """Return bfloat16 where that is fast and the weights are stored in no more bits, else float32."""
    if not has_fast_bfloat16(device):
        return torch.float32
    if source.lower().endswith(".gguf"):
        return torch.bfloat16
    from transformers import AutoConfig

    with _as_model_error(source):
        config = AutoConfig.from_pretrained(source, **{key: value for key, value in options.items() if value})
    return torch.bfloat16 if stored_dtype(config) in (torch.bfloat16, torch.float16) else torch.float32


def _kind(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, str) else f"a {type(value).__name__}"


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
        files = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"the path of its GGUF file, such as {path / files[0]}" if files else "a Hugging Face model directory"
        raise ModelError(f"{path} has no config.json: give {hint}")
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

    The digest of the weights covers every bit of every weight, and where in the model it is. It is the same on every device, for
    any number of threads, with weights offloaded or not, and under TransformerLens 3.9 and 4. Compatibility mode and dtype are
    part of the fingerprint, because they change the activations. A `HookedTransformer` holds the weights in another form, so the
    same model has another fingerprint as a bridge.
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


def model_entry(path: str | os.PathLike[str], model: Model | None, sites: Iterable[Any] = ()) -> dict[str, Any]:
    """Return what a file's header holds of its model; without one, nothing, and a warning says what follows.

    Args:
        path: The file.
        model: Its model.
        sites: What the file is about: of the features of a dictionary, the header holds that dictionary's fingerprint too.

    Raises:
        SiteError: If a site is of features, and no dictionary is attached there.
    """
    if model is not None:
        entry = {"model": fingerprint(model)}  # which refuses what is no model
        dictionaries = dictionaries_at(model, sites)
        return {**entry, **({"dictionaries": dictionaries} if dictionaries else {})}
    warnings.warn(f"{os.fspath(path)} will not know its model: {_ANY_MODEL}", stacklevel=3)
    return {}


def require_model_of(path: str | os.PathLike[str], header: Mapping[str, Any], model: Model | None) -> None:
    """Refuse a file of another model, as its header has it from `model_entry`; warn of one that knows no model.

    Raises:
        ArtefactError: If both are known and differ; the message names what does.
    """
    if "model" not in header:
        warnings.warn(f"{os.fspath(path)} does not know its model: {_ANY_MODEL}", stacklevel=3)
    elif model is not None:
        ours = as_in_file(path, header["model"], fingerprint(model), model)
        artefacts.require_same(path, header["model"], ours, "this model")
        require_dictionaries(path, header.get("dictionaries", {}), model)


_ANY_MODEL = "any model of the right shape is accepted; save it together with the model, as in save(path, model)"


def as_in_file(path: str | os.PathLike[str], theirs: Any, ours: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """Return a model's fingerprint in the form in which a file holds it, to be compared with that.

    Files of earlier versions hold a digest of 64 values of each parameter. Where it is that of this model, it takes the place of
    the one of every weight, and a warning says that it tells less.

    Args:
        path: The file, for the warning.
        theirs: The fingerprint in the file, or settings with fingerprints among their values.
        ours: The model's fingerprint, or settings with it in the same places.
        model: The model.
    """
    if not isinstance(theirs, Mapping):
        return dict(ours)
    found = {k: as_in_file(path, theirs.get(k), v, model) if isinstance(v, Mapping) else v for k, v in ours.items()}
    digest = theirs.get("weights")
    if "weights" in ours and isinstance(digest, str) and len(digest) == SAMPLED:
        sampled = _sampled_digests(model)
        found["weights"] = digest if digest in sampled else sampled[0]
        if digest in sampled:
            warnings.warn(
                f"{os.fspath(path)} is of an earlier version, which looked at 64 values of each parameter: it may be of another "
                "model than this one, if that is almost the same; save it again to be sure from now on",
                stacklevel=3,
            )
    return found


# What the digest is of: every weight, with its place, which is its name without what the wrappers add to it. A tied weight has
# several places, and is read once. A bias of zeros is left out: where a model has no bias of the unembedding, TransformerLens
# gives it one, as a parameter (3.9) or as a buffer (4). Buffers count in a bridge alone; those of a `HookedTransformer` are tables
# that follow from its configuration. What a bridge splits out of a fused weight counts beside it, be it a view (GPT-2) or a copy
# (NeoX, and whatever is offloaded), since that is what the bridge computes with.
#
# A weight is read in blocks. The number of a block is the sum of (bits of a value, as an integer) x (a pseudo-random 64-bit
# integer for its place in the block), modulo 2^64: integers are exact, so that order, threads and device do not matter. Two
# blocks with different values have the same number with a probability of 2^-33 or less. That is against accidents, not against
# whoever looks for two such blocks.
#
# A weight's digest is not taken again while its memory, shape, version and the sums over its bits are the same: the sums find what
# goes round PyTorch's count of changes (`weight.data`, a NumPy view of the memory), in the time in which memory is read.
# Offloaded weights are read every time.

SAMPLED = 16
"""Hexadecimal digits of a digest from earlier versions, of 64 values of each parameter; a digest of all has twice as many."""
BLOCK = 2**16
"""Values in a block."""

_read: "weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], bytes]]" = weakref.WeakKeyDictionary()
"""By model: what was read of each weight, by the state it was in."""


def _digest(model: Model) -> str:
    before, now = _read.get(model, {}), {}
    entries: set[str] = set()
    states: dict[int, tuple[Any, ...]] = {}
    weights = list(
        _weights(model)
    )  # held, so that no other one is given the same id: loading offloaded ones makes new tensors
    for place, weight, module, name in weights:
        if id(weight) not in states:  # each has several places in a bridge
            states[id(weight)] = state = _state_of(weight)
            if state not in now:
                now[state] = before[state] if state in before else _read_bits(weight, module, name)
        digest = now[states[id(weight)]]
        if digest or name != "bias":
            entries.add(f"{place} {weight.dtype} {tuple(weight.shape)} {digest.hex()}")
    _read[model] = {state: digest for state, digest in now.items() if isinstance(state[-1], bytes)}
    return hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest()[: 2 * SAMPLED]


def _weights(model: Model) -> Iterator[tuple[str, Tensor, Any, str]]:
    """Yield the place of every weight, itself, its module, and its name there; a weight may have several places."""
    bridged = hasattr(model, "original_model")
    for path, module in (model.original_model if bridged else model).named_modules(remove_duplicate=False):
        parts = [part for part in path.split(".") if part != "_original_component"]
        kept = (
            {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set} if bridged else {}
        )
        for name, weight in {**module._parameters, **kept}.items():
            if weight is not None and not (weight.is_meta and not hasattr(module, "_hf_hook")):
                yield ".".join([*parts, name]), weight, module, name


def _state_of(weight: Tensor) -> tuple[Any, ...]:
    """Return what is the same as long as a weight's bits are; without sums at its end if that cannot be told."""
    if weight.is_meta or weight.is_inference():
        return (id(weight),)
    if (parts := stored(weight))[0] is not weight:
        return tuple(state for part in parts for state in _state_of(part))
    where = (weight.device, weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype)
    return (*where, weight._version, bit_sums(weight))


def _read_bits(weight: Tensor, module: Any, name: str) -> bytes:
    """Return a digest of all bits of a weight; of an offloaded one after loading it. Empty if they are zeros."""
    if not weight.is_meta:
        return _digest_of_bits(weight)
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return _digest_of_bits(getattr(module, name))


def _digest_of_bits(weight: Tensor) -> bytes:
    if (parts := stored(weight))[0] is not weight:
        return b"".join(map(_digest_of_bits, parts))
    flat = weight.detach().contiguous().reshape(-1)
    flat = flat if flat.device.type in ("cpu", "cuda") else flat.cpu()
    bits = flat.view({1: torch.uint8, 2: torch.int16}.get(flat.element_size(), torch.int32))
    factors = _factors(bits.device)
    at_once = torch.get_num_threads() if bits.device.type == "cpu" else 128
    room = torch.empty(at_once, BLOCK, dtype=torch.int64, device=bits.device)
    whole = len(bits) // BLOCK * BLOCK
    sums = [
        torch.mul(rows, factors, out=room[: len(rows)]).sum(1)
        for rows in bits[:whole].view(-1, BLOCK).split(at_once)
        if len(rows)
    ]
    sums.append((bits[whole:] * factors[: len(bits) - whole]).sum(0, keepdim=True))
    numbers = torch.cat(sums).cpu().numpy().astype("<i8").tobytes()
    return hashlib.sha256(numbers).digest()[:16] if any(numbers) else b""


@functools.cache
def _factors(device: torch.device) -> Tensor:
    return (mix(torch.arange(BLOCK)) | 1).to(device)


def _sampled_digests(model: Model) -> list[str]:
    """Return the digests that earlier versions could have given this model, under this TransformerLens first."""
    samples: dict[tuple[int, tuple[int, ...]], bytes] = {}
    offloaded = []
    for parameter in model.parameters():
        key = (stored(parameter)[0].data_ptr(), tuple(parameter.shape))
        if parameter.is_meta:
            offloaded.append(parameter)
        elif key not in samples:
            samples[key] = _sample(parameter)
    if offloaded:
        known = set(samples.values())
        for number, (ndim, sample) in enumerate(_fetched(model, {id(parameter) for parameter in offloaded})):
            if (
                ndim < 2 or sample not in known
            ):  # a matrix that occurs twice is shared (tied embeddings), and counts once
                samples[-1, (number,)] = sample
            known.add(sample)
    # Of the bias of the unembedding, TransformerLens makes a parameter (3.9), which was sampled, or a buffer (4).
    ours, biases = list(samples.values()), set()
    for _, weight, _, name in _weights(model):
        if name == "bias" and tuple(weight.shape) == (int(model.cfg.d_vocab),) and not weight.is_meta:
            biases.add(_sample(weight))
    without = [sample for sample in ours if sample not in biases]
    return [hashlib.sha256(b"".join(sorted(s))).hexdigest()[:SAMPLED] for s in (ours, without, [*without, *biases])]


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
