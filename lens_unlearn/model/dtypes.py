"""The dtype of a model's weights, by name, or as this machine computes fastest without losing what the weights hold.

Knows what processors and GPUs have instructions for; knows nothing of how a model is loaded.
"""

from typing import Any

import torch

from lens_unlearn.core.errors import ModelError

__all__ = ["AUTO", "DTYPES", "dtype_of", "has_fast_bfloat16", "stored_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
AUTO = "auto"


def dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    """Return a dtype that weights can have, which may be given by its name.

    Raises:
        ModelError: If it is none of those.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelError(f"dtype={dtype!r} is not known: choose from {', '.join(DTYPES)}, {AUTO}")
    return DTYPES[dtype]


def has_fast_bfloat16(device: str) -> bool:
    """Whether a device has instructions for bfloat16: those of AVX-512 or AMX on a processor, those of Ampere on a GPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return False
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(known()) for name in names if (known := getattr(torch.cpu, name, None)) is not None)


def stored_dtype(config: Any) -> torch.dtype:
    """Return the dtype that a configuration says its weights were saved in; float32 where it does not say."""
    found = getattr(config, "dtype", None) or getattr(getattr(config, "text_config", None), "dtype", None)
    if isinstance(found, str):
        found = DTYPES.get(found.removeprefix("torch."))
    return found if isinstance(found, torch.dtype) else torch.float32
