"""`tune_allocator`: let the C library keep the memory of large tensors that are made and freed in every layer.

Knows glibc's `mallopt`; knows nothing of tensors.
"""

import ctypes
import os
import sys

__all__ = ["allocator", "tune_allocator"]

_TRIM, _TOP_PAD, _MMAP = -1, -2, -3  # parameters of mallopt, as glibc's malloc.h numbers them
_PAD = 256 * 2**20  # bytes that are asked for beyond what is needed, so that the next tensors fit as well
_tuned = [False]


def tune_allocator() -> bool:
    """Let freed memory stay with this process, so that the next tensor need not be given pages by the system.

    On a processor, a forward pass makes and frees tensors of many megabytes in every layer. By default glibc asks the system for
    each, which hands out zeroed pages one by one, and takes them back: a third of the time of a small language model. The command
    line does this at its start; in Python it is for you to decide, since it holds for the whole process, which from then on keeps
    the most memory that it ever needed. It has no effect on GPU memory.

    Returns:
        Whether it was done: on Linux with glibc, and unless the environment sets that allocator up (`MALLOC_...`,
        `GLIBC_TUNABLES`) or puts another in its place (`LD_PRELOAD`).
    """
    if _tuned[0]:
        return True
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if not sys.platform.startswith("linux") or chosen or "alloc" in os.environ.get("LD_PRELOAD", ""):
        return False
    try:
        library = ctypes.CDLL("libc.so.6")
        mallopt = library.mallopt
    except (OSError, AttributeError):  # another C library, such as musl
        return False
    most = 2**31 - 1
    mapped = mallopt(_MMAP, most) or mallopt(_MMAP, 32 * 2**20)  # versions differ in how much they take
    _tuned[0] = bool(mapped and mallopt(_TRIM, most) and mallopt(_TOP_PAD, _PAD))
    return _tuned[0]


def allocator() -> str:
    """Say how memory is allocated, as `run.json` does."""
    return "glibc, freed memory is kept" if _tuned[0] else "as the system has it"
