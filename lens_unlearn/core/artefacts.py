"""Files that others can trust: safetensors with a JSON header, a checksum, and refusals that say what differs.

Reading never executes anything: the kind in the header is looked up in closed tables by the callers, and the tensors
are plain arrays. Writing is atomic: a file is either the old one or the whole new one.
"""

import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_unlearn.core.errors import ArtefactError

__all__ = [
    "first_line",
    "local",
    "parse",
    "read",
    "remove",
    "replace_file",
    "require_same",
    "sweep",
    "temporary_name",
    "usable",
    "write",
]

SCHEMA = 1
HUB = "hf:"
KEY = "lens_unlearn"
MAX_HEADER = 5 * 2**20
"""Bytes of a header."""
STALE = 3600.0
"""Seconds after which a temporary file is no longer that of somebody who is still writing."""
MAX_VALUES = 200_000
"""Values in a header: in memory each can take seventy times what it takes in the file."""
MAX_DEPTH = 200
"""Lists and objects inside one another in a header: so deep, nothing recurses to its limit."""
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16) + (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
"""What tensors can be of; of the others some operations do not exist."""
Path_ = str | os.PathLike[str]


def write(path: Path_, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header as one file, atomically.

    Raises:
        ArtefactError: If the file cannot be written, or `read` would refuse it for the size of its header.
    """
    from safetensors.torch import save

    from lens_unlearn import __version__

    flat: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        flat[name] = plain.clone() if place in places else plain  # two may share their values, and in a file not
        places.add(place)
    # As `read` will see it: with text as keys, in the order of that text.
    content = json.loads(json.dumps({"schema": SCHEMA, "kind": kind, "lens_unlearn": __version__, **header}))
    content["checksum"] = _checksum(flat, content)
    data = save(flat, metadata={KEY: json.dumps(content, sort_keys=True)})
    size = int.from_bytes(data[:8], "little")
    try:
        if size > MAX_HEADER:
            raise ValueError(f"{size:,} bytes of header, and {MAX_HEADER:,} are read")
        _content(_outer(data[8 : 8 + size])[0])
    except ValueError as error:
        raise ArtefactError(f"{path} is not written, since it could not be read again: {error}") from error
    replace_file(path, data)


def read(path: Path_, kind: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file that `write` made.

    Besides the tensors, it takes memory for the file and for tens of megabytes of header at most.

    Args:
        path: The file; on the Hugging Face hub as `local` has it.
        kind: What it has to hold; None takes any kind.

    Returns:
        The header and the tensors.

    Raises:
        ArtefactError: If it is missing, truncated, altered, not ours, made by a newer version, or of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content, data = _open(path)
        schema = content.get("schema")
        if type(schema) is int and schema > SCHEMA:
            raise ArtefactError(
                f"{path} was made by a newer lens_unlearn ({_short(content.get('lens_unlearn'))}): upgrade to read it"
            )
        if schema != SCHEMA or not all(isinstance(content.get(key), str) for key in ("kind", "lens_unlearn")):
            raise ValueError("its header does not say what it is")
        tensors = load(data)
        for name, tensor in tensors.items():
            odd = tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any())
            if odd or tensor.dtype not in DTYPES:
                raise ValueError(f"{_short(name)} is of a type that is never written")
        intact = content.pop("checksum", None) == _checksum(tensors, content)
    except ArtefactError:
        raise
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise ArtefactError(f"{path} cannot be read: it does not fit into memory") from error
    except (
        SafetensorError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ArtefactError(f"{path} is no lens_unlearn file: it is damaged, or something else") from error
    if not intact:
        raise ArtefactError(f"{path} was altered or damaged after it was written: its checksum does not fit")
    if kind is not None and content["kind"] != kind:
        raise ArtefactError(f"{path} holds {_short(repr(content['kind']))}, not {kind!r}")
    return content, tensors


def local(path: Path_) -> Path_:
    """Return where a file is on this machine; one that is on the hub is fetched into the cache of `huggingface_hub`.

    Args:
        path: A path, or "hf:OWNER/NAME/FILE"; "hf:OWNER/NAME@REVISION/FILE" takes a branch, tag or commit, and a repository with
            one .safetensors file needs no FILE.

    Raises:
        ArtefactError: If there is no such file on the hub, or the hub cannot be reached.
    """
    name = os.fspath(path)
    if not name.startswith(HUB) or os.path.exists(name):
        return path
    owner, _, rest = name.removeprefix(HUB).partition("/")
    repo, _, file = rest.partition("/")
    repo, _, revision = repo.partition("@")
    if not owner or not repo:
        raise ArtefactError(f"{name} names no file on the hub: write it as hf:OWNER/NAME/FILE")
    from huggingface_hub import HfApi

    api = HfApi(library_name="lens_unlearn")
    told: dict[str, Any] = {"revision": revision or None}
    try:
        if not file:
            files = [one for one in api.list_repo_files(f"{owner}/{repo}", **told) if one.endswith(".safetensors")]
            if len(files) != 1:
                raise ValueError(f"name one of its {len(files)} .safetensors files: {', '.join(sorted(files)[:20])}")
            file = files[0]
        return api.hf_hub_download(f"{owner}/{repo}", file, **told)
    except Exception as error:
        raise ArtefactError(f"{name} cannot be fetched from the hub: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return what an error of another library says, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _open(path: Path_) -> tuple[dict[str, Any], bytes]:
    """Return the header of ours and the bytes of the file, which are not read before their number is right."""
    where = local(path)
    try:
        if not stat.S_ISREG(os.stat(where).st_mode):  # a pipe would be waited for
            raise ArtefactError(f"{path} cannot be read: it is no file")
    except (OSError, ValueError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    with open(where, "rb") as file:
        length, head = os.fstat(file.fileno()).st_size, file.read(9)  # the header's size, and the brace that opens it
        size = int.from_bytes(head[:8], "little")
        if head[8:] != b"{" or size > min(MAX_HEADER, length):
            if head[:2] == b"PK" or head[:1] == b"\x80":
                raise ArtefactError(f"{path} is a pickle or an archive: such files can run code, and are never opened")
            raise ValueError("no header")
        text, end = _outer(b"{" + file.read(size - 1))
        if 8 + size + end != length:
            raise ValueError("tensors of another length")
        content = _content(text)
        file.seek(0)
        return content, file.read()


def _outer(header: bytes) -> tuple[str, int]:
    """Return the text of our header in the header of a safetensors file, and where its tensors end."""
    found = parse(header.decode("ascii"))
    text = found.pop("__metadata__")[KEY]
    return text, max((tensor["data_offsets"][1] for tensor in found.values()), default=0)


def _content(text: str) -> dict[str, Any]:
    """Read our header, if it is not nested too deep for those who look at it."""
    content = parse(text)
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [value for values in inner for value in values]
        if not level:
            return content
    raise ValueError(f"lists inside one another in the header, more than {MAX_DEPTH} deep")


def parse(text: str) -> dict[str, Any]:
    """Read a JSON object out of a file, with at most `MAX_VALUES` values, of different names.

    Raises:
        ValueError: If it is none.
    """
    if not text.isascii():  # what is written escapes the rest, and one odd letter would make a text four times as large
        raise ValueError("a header with letters that are never written")
    values = sum(text.count(mark) for mark in "[{,")
    if values > MAX_VALUES:
        raise ValueError(f"{values:,} values in the header, and {MAX_VALUES:,} are read")
    found = json.loads(text, object_pairs_hook=_once)
    if not isinstance(found, dict):
        raise ValueError("a header that is no object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("two values of one name")
    return found


@contextmanager
def usable(path: Path_, what: str) -> Iterator[None]:
    """Refuse a sound file whose content is false: whatever goes wrong in the block becomes one sentence.

    Args:
        path: The file.
        what: Such as "moments that can be read".

    Raises:
        ArtefactError: Naming the file.
    """
    try:
        yield
    except KeyError as error:
        raise ArtefactError(f"{path} holds no {what}: it has no {_short(error)}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ArtefactError(f"{path} holds no {what}: {_short(error, 300)}") from error


def _checksum(tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_same(path: Path_, theirs: Any, ours: Mapping[str, Any], what: str) -> None:
    """Refuse a file made with something else.

    Raises:
        ArtefactError: Naming the fields that differ.
    """
    if not isinstance(theirs, Mapping):
        raise ArtefactError(f"{path} does not say what it was made with: write it again")
    odd = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if odd:
        told = "; ".join(
            f"{_short(key)}: {_short(theirs.get(key))} in the file, {_short(ours.get(key))} in {what}"
            for key in odd[:30]
        )
        raise ArtefactError(f"{path} does not belong to {what}: {told}")


def _short(value: Any, length: int = 120) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{key}={item}" for key, item in value.items())
    text = str(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def replace_file(path: Path_, data: bytes) -> None:
    """Put a whole file in place, or leave what was there: temporary file, fsync, rename.

    Every writer has a temporary file of its own, so that of two at a time the last one wins, and they never mix. What a killed
    writer left of its own is deleted by whoever writes the same file an hour later.

    Raises:
        ArtefactError: If the folder does not exist or cannot be written.
    """
    target = Path(path)
    temporary: str | None = None
    try:
        sweep(target)
        handle, temporary = tempfile.mkstemp(*temporary_name(target), target.parent)
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


def temporary_name(target: Path) -> tuple[str, str]:
    """Return how the names of a path's temporary files, or folders, end and begin; those of no other path do."""
    return f".{zlib.crc32(os.fsencode(target.name)):08x}.part", f".{target.name[:40]}."


def sweep(path: Path_, age: float = STALE) -> None:
    """Delete the temporary files and folders of a path that killed writers left, if they are so many seconds old."""
    target = Path(path)
    with suppress(OSError):
        for left in target.parent.glob(f".*{temporary_name(target)[0]}"):
            if left.stat().st_mtime <= time.time() - age:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def remove(path: Path_) -> None:
    """Delete a file that is done with, and what killed writers left of it."""
    Path(path).unlink(missing_ok=True)
    sweep(path, age=0.0)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
