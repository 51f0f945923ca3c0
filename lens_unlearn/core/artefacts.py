"""Safe files: safetensors with a JSON header and a checksum, written atomically, and errors that say what differs.

Knows tensors, headers and paths; knows nothing of what they mean (an intervention, moments): that is up to the callers.
"""

# Why not pickle (`torch.save`): loading one can run any code, and these files are shared on the Hugging Face hub. Here nothing
# in a file names code: tensors are plain arrays, and callers look up the "kind" of the header in closed tables.
# Why a checksum: safetensors checks sizes but not values, so a flipped bit or an edited header would silently give other
# numbers. It covers header and tensors, and protects from accidents only: whoever forges a file can also compute it.
# Why limits on the header: JSON takes far more memory parsed than written, so a small hostile file could exhaust it.

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
"""Most bytes of a header."""
STALE = 3600.0
"""Seconds after which a temporary file is taken to be left by a killed process, not to be still written."""
MAX_VALUES = 200_000
"""Most values in a header: parsed, each can take seventy times its size in the file."""
MAX_DEPTH = 200
"""Deepest nesting of lists and objects in a header: far below Python's recursion limit."""
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16) + (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
"""The dtypes that a file may hold; PyTorch lacks some operations on the others, such as float8."""
FilePath = str | os.PathLike[str]


def write(path: FilePath, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
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
        flat[name] = plain.clone() if place in places else plain  # safetensors refuses tensors that share memory
        places.add(place)
    # Through JSON and back, so that the checksum is of what `read` will see: keys are strings, tuples are lists.
    content = json.loads(json.dumps({"schema": SCHEMA, "kind": kind, "lens_unlearn": __version__, **header}))
    content["checksum"] = _checksum(flat, content)
    data = save(flat, metadata={KEY: json.dumps(content, sort_keys=True)})
    size = int.from_bytes(data[:8], "little")
    try:
        if size > MAX_HEADER:
            raise ValueError(f"{size:,} bytes of header, and {MAX_HEADER:,} are read")
        _content(_outer(data[8 : 8 + size])[0])
    except ValueError as error:
        raise ArtefactError(f"{path} cannot be written, since it could not be read again: {error}") from error
    replace_file(path, data)


def read(path: FilePath, kind: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file that `write` made.

    Peak memory is that of the tensors, the bytes of the file, and at most some tens of megabytes for the header.

    Args:
        path: The file; for one on the Hugging Face hub, see `local`.
        kind: The kind that it has to be of; None accepts any.

    Returns:
        The header and the tensors.

    Raises:
        ArtefactError: If it is missing, truncated, altered, not a lens_unlearn file, made by a newer version, or of another kind.
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
        raise ArtefactError(f"{path} is not a lens_unlearn file, or it is damaged") from error
    if not intact:
        raise ArtefactError(f"{path} was altered or damaged after it was written: its checksum does not match")
    if kind is not None and content["kind"] != kind:
        raise ArtefactError(f"{path} holds {_short(repr(content['kind']))}, not {kind!r}")
    return content, tensors


def local(path: FilePath) -> FilePath:
    """Return the local path of a file; one on the Hugging Face hub is downloaded into the cache of `huggingface_hub`.

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
    at: dict[str, Any] = {"revision": revision or None}
    try:
        if not file:
            files = [entry for entry in api.list_repo_files(f"{owner}/{repo}", **at) if entry.endswith(".safetensors")]
            if len(files) != 1:
                raise ValueError(f"name one of its {len(files)} .safetensors files: {', '.join(sorted(files)[:20])}")
            file = files[0]
        return api.hf_hub_download(f"{owner}/{repo}", file, **at)
    except Exception as error:
        raise ArtefactError(f"{name} cannot be fetched from the hub: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, or the error's type if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _open(path: FilePath) -> tuple[dict[str, Any], bytes]:
    """Return our header and the bytes of the file, whose length is checked before they are read."""
    where = local(path)
    try:
        if not stat.S_ISREG(os.stat(where).st_mode):  # reading a pipe would block
            raise ArtefactError(f"{path} cannot be read: it is not a regular file")
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
    """Return the text of our header, which is in the header of a safetensors file, and the offset at which its tensors end."""
    entries = parse(header.decode("ascii"))
    text = entries.pop("__metadata__")[KEY]
    return text, max((tensor["data_offsets"][1] for tensor in entries.values()), default=0)


def _content(text: str) -> dict[str, Any]:
    """Parse our header, and refuse one so deeply nested that code walking through it would hit the recursion limit."""
    content = parse(text)
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [value for values in inner for value in values]
        if not level:
            return content
    raise ValueError(f"a header nested more than {MAX_DEPTH} deep")


def parse(text: str) -> dict[str, Any]:
    """Parse a JSON object with at most `MAX_VALUES` values and no key twice.

    Raises:
        ValueError: If the text is anything else.
    """
    # `json.dumps` escapes everything else, and one wide character makes a Python string four times as large.
    if not text.isascii():
        raise ValueError("a header with characters that are never written")
    values = sum(text.count(mark) for mark in "[{,")
    if values > MAX_VALUES:
        raise ValueError(f"{values:,} values in the header, and {MAX_VALUES:,} are read")
    content = json.loads(text, object_pairs_hook=_without_duplicates)
    if not isinstance(content, dict):
        raise ValueError("a header that is not a JSON object")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key that occurs twice")
    return content


@contextmanager
def usable(path: FilePath, content: str) -> Iterator[None]:
    """Turn whatever fails while the content of an intact file is interpreted into one `ArtefactError`.

    Args:
        path: The file.
        content: What the file should hold, for the message; such as "moments that can be read".

    Raises:
        ArtefactError: If the block raises; the message names the file.
    """
    try:
        yield
    except KeyError as error:
        raise ArtefactError(f"{path} holds no {content}: it has no {_short(error)}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ArtefactError(f"{path} holds no {content}: {_short(error, 300)}") from error


def _checksum(tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():  # of an empty one, whose stride may be 0, there are no bytes to view
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_same(path: FilePath, theirs: Any, ours: Mapping[str, Any], owner: str) -> None:
    """Refuse a file that was made with another model, or by a run with other settings.

    Args:
        path: The file.
        theirs: What the file says it was made with.
        ours: What it has to be made with.
        owner: What `ours` describes, for the message; such as "this model".

    Raises:
        ArtefactError: If any field differs; the message names those that do, with both values.
    """
    if not isinstance(theirs, Mapping):
        raise ArtefactError(f"{path} does not say what it was made with: write it again")
    odd = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if odd:
        differences = "; ".join(
            f"{_short(key)}: {_short(theirs.get(key))} in the file, {_short(ours.get(key))} in {owner}"
            for key in odd[:30]
        )
        raise ArtefactError(f"{path} does not belong to {owner}: {differences}")


def _short(value: Any, length: int = 120) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{key}={item}" for key, item in value.items())
    text = str(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def replace_file(path: FilePath, data: bytes) -> None:
    """Write a file atomically: into a temporary file, which then replaces the old one. Of a link, its target is written.

    Raises:
        ArtefactError: If the folder does not exist or cannot be written, or the path is a device, a pipe or a folder.
    """
    # A process can be killed at any byte. Renaming within a folder is atomic, so readers see the old file or the new one and
    # never a part; fsync comes first, or after a power cut the file could be empty. Each writer has its own temporary file, so two
    # at a time never mix: the last one wins. What a killed writer leaves behind is deleted by whoever writes the same file an hour
    # later (`STALE`), not before, since it could still be in use.
    target = Path(path)
    temporary: str | None = None
    try:
        target = Path(os.path.realpath(target))  # a rename would replace the link itself, and any other kind of node
        if os.path.lexists(target) and not target.is_file():
            raise ValueError("it is no file but a folder, a device, a pipe or a link to itself: give another path")
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
    """Return the suffix and the prefix of the names of a path's temporary files or folders.

    The suffix holds a checksum of the whole name, since the prefix is cut: no other path in the folder has the same.
    """
    return f".{zlib.crc32(os.fsencode(target.name)):08x}.part", f".{target.name[:40]}."


def sweep(path: FilePath, age: float = STALE) -> None:
    """Delete the temporary files and folders of a path that killed writers left, if they are at least `age` seconds old."""
    target = Path(path)
    with suppress(OSError):
        for leftover in target.parent.glob(f".*{temporary_name(target)[0]}"):
            if leftover.stat().st_mtime <= time.time() - age:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def remove(path: FilePath) -> None:
    """Delete a file that is no longer needed, and every temporary file that killed writers left of it."""
    Path(path).unlink(missing_ok=True)
    sweep(path, age=0.0)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
