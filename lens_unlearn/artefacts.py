"""Files that others can trust: safetensors with a JSON header, a checksum, and refusals that say what differs.

Reading never executes anything: the kind in the header is looked up in closed tables by the callers, and the tensors
are plain arrays. Writing is atomic: a file is either the old one or the whole new one.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_unlearn.errors import ArtefactError

__all__ = ["read", "replace_file", "require_same", "write"]

SCHEMA = 1
KEY = "lens_unlearn"
MAX_HEADER = 8 * 2**20
Path_ = str | os.PathLike[str]


def write(path: Path_, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header as one file, atomically."""
    from safetensors.torch import save

    from lens_unlearn import __version__

    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    content = {"schema": SCHEMA, "kind": kind, "lens_unlearn": __version__, **header}
    content["checksum"] = _checksum(flat, content)
    text = json.dumps(content, sort_keys=True)
    replace_file(path, save(flat, metadata={KEY: text}))


def read(path: Path_, kind: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file that `write` made.

    Args:
        path: The file.
        kind: What it has to hold; None takes any kind.

    Returns:
        The header and the tensors.

    Raises:
        ArtefactError: If it is missing, truncated, altered, not ours, made by a newer version, or of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = _bytes(path)
    try:
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
        content = json.loads(metadata[KEY])
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, RecursionError, OverflowError) as error:
        raise ArtefactError(f"{path} is no lens_unlearn file: it is damaged, or something else") from error
    if not isinstance(content, dict) or not isinstance(content.get("schema"), int):
        raise ArtefactError(f"{path} is no lens_unlearn file: it is damaged, or something else")
    if content["schema"] > SCHEMA:
        raise ArtefactError(
            f"{path} was made by a newer lens_unlearn ({content.get('lens_unlearn')}): upgrade to read it"
        )
    if content.pop("checksum", None) != _checksum(tensors, content):
        raise ArtefactError(f"{path} was altered or damaged after it was written: its checksum does not fit")
    if kind is not None and content.get("kind") != kind:
        raise ArtefactError(f"{path} holds {content.get('kind')!r}, not {kind!r}")
    return content, tensors


def _bytes(path: Path_) -> bytes:
    try:
        with open(path, "rb") as file:
            head = file.read(9)  # the header's size, and the brace that opens it
            size = int.from_bytes(head[:8], "little")
            if head[8:] != b"{" or size > min(MAX_HEADER, os.path.getsize(path)):
                if head[:2] == b"PK" or head[:1] == b"\x80":
                    raise ArtefactError(
                        f"{path} is a pickle or an archive: such files can run code, and are never opened"
                    )
                raise ArtefactError(f"{path} is no lens_unlearn file: it is damaged, or something else")
            return head + file.read()
    except (OSError, ValueError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _checksum(tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_same(path: Path_, theirs: Mapping[str, Any], ours: Mapping[str, Any], what: str) -> None:
    """Refuse a file made with something else.

    Raises:
        ArtefactError: Naming every field that differs.
    """
    odd = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if odd:
        told = "; ".join(
            f"{key}: {_short(theirs.get(key))} in the file, {_short(ours.get(key))} in {what}" for key in odd
        )
        raise ArtefactError(f"{path} does not belong to {what}: {told}")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{key}={item}" for key, item in value.items())
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def replace_file(path: Path_, data: bytes) -> None:
    """Put a whole file in place, or leave what was there: temporary file, fsync, rename.

    Raises:
        ArtefactError: If the folder does not exist or cannot be written.
    """
    target = Path(path)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
        temporary = None
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        if temporary is not None:
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
