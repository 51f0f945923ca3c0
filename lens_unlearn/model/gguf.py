"""Reading GGUF files, in which many models are passed around: transformers dequantizes them, and a bridge takes what it gives."""

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any

import torch

from lens_unlearn.model.special_tokens import note_bos

__all__ = ["read_gguf"]


def read_gguf(source: str, file: str, *, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """Read a model and its tokenizer from a GGUF file; the weights are dequantized into a dtype.

    Args:
        source: A folder, or a repository of the hub.
        file: The name of the file there.
        dtype: The dtype of the weights.
        options: `device`, or `device_map` and its options; `revision`, `trust_remote_code`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = options.pop("device", None)
    shared = {key: options[key] for key in ("revision", "trust_remote_code") if options.get(key)}
    with contextlib.redirect_stderr(io.StringIO()), _silent():  # its progress bar cannot be turned off
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file, **shared)
        note_bos(tokenizer)  # its folder could not say it later
        options = {key: value for key, value in options.items() if value}
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=dtype, **options)
    # What says that the weights were quantized keeps a bridge from taking a model whose weights are so no longer.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.config.architectures = [type(model).__name__]
    return model.to(device) if device is not None else model, tokenizer


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hide a warning that another dtype than float32 is slow, which is so for weights that stay packed; these do not."""
    log = logging.getLogger("transformers.quantizers.quantizer_gguf")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
