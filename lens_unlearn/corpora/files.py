"""Files, folders and patterns as tables: where a path ends in what was written, and how each format is read.

Rows are streamed, so that no more of a file is read than is asked for, and every value of a text format stays as the file spells
it: `007`, `NA` and `1975-06-30` are texts. Knows file formats; knows nothing of fields, nor of what a row says.
"""

import codecs
import csv
import difflib
import glob
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.corpora.tables import Table, of_dataset

__all__ = ["FORMATS", "Located", "is_file", "looks_like_file", "locate", "open_file"]

FORMATS = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".tsv")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_ENDINGS = r"\.(?:(?:jsonl|json|csv|tsv|txt)(?:\.gz|\.zst)?|parquet)"
_ENDING, _AT_END = (re.compile(_ENDINGS + behind, re.IGNORECASE) for behind in (r"(?=[:@]|$)", "$"))
_SEPARATOR = "<|endoftext|>"
_LOOKED_AT = 2**28  # characters of a text file that are searched for its separator
_BLOCK = 2**20
_LONGEST_PATH = 1000
_MOST = 2**31 - 1  # characters of a value in a csv; Python's own limit is 131,072


class Located:
    """What a source names: files, and what is written after their path."""

    def __init__(self, paths: Sequence[str], name: str, written: str) -> None:
        self.paths, self.name, self.written = paths, name, written


def locate(source: str) -> Located:
    """Find the files that ``path:field@group`` names, and what is written after the path.

    Paths can hold ":" and "@", and any sign of patterns: the longest beginning of the source that exists is the path. Only where
    there is none, "*", "?" and "**" stand for any names; brackets are always part of a name.

    Raises:
        CorpusError: If there is no such file, or it cannot be read.
    """
    ends = [at for at, character in enumerate(source) if character in ":@"]
    cuts = [(source[:at], source[at:].removeprefix(":")) for at in [*ends, len(source)][::-1] if at]
    for path, written in cuts:
        path = os.path.expanduser(path)
        # Behind a folder, a name of a file is one that was meant to be in it.
        if os.path.isfile(path) or (os.path.isdir(path) and not _ENDING.search(written)):
            return Located(_inside(path), _name(path), written)
    for path, written in cuts:
        if found := _matching(os.path.expanduser(path)):
            return Located(found, _name(path), written)
    path = next((source[: end.end()] for end in [*_ENDING.finditer(source)][::-1]), source)
    raise CorpusError(_missing(os.path.expanduser(path)))


def is_file(text: str) -> bool:
    """Say whether a string is the path of something that exists, with or without ``:field@group`` behind it."""
    if not 0 < len(text) < _LONGEST_PATH or "\n" in text:
        return False
    ending = _ENDING.search(text)
    path = text[: ending.end()] if ending else text if "/" in text else ""
    return os.path.exists(os.path.expanduser(path))


def looks_like_file(text: str) -> bool:
    """Say whether a string is more likely a path than a text: it ends like one and has no blanks, or there is such a file."""
    return (len(text) < _LONGEST_PATH and bool(_ENDING.search(text)) and not re.search(r"\s", text)) or is_file(text)


def _name(path: str) -> str:
    return os.path.basename(os.path.normpath(path))


def _format(path: str) -> str:
    """Return the ending that says how a file is read, without that of its compression; empty if none does."""
    found = _AT_END.search(path)
    return "." + found[0].split(".")[1].lower() if found else ""


def _matching(path: str) -> list[str]:
    """Return the files, and saved data sets, that a pattern stands for."""
    if not re.search(r"[*?]", path):
        return []
    found = glob.glob(path.replace("[", "[[]"), recursive=True)
    return sorted(one for one in found if os.path.isfile(one) or _is_saved(one))


def _is_saved(path: str) -> bool:
    """Say whether a folder was written by `Dataset.save_to_disk`."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def _inside(path: str) -> list[str]:
    """Return a file, or the files of a folder that can be read: all of one format, since others may be something else."""
    if os.path.isfile(path) or _is_saved(path):
        return [path]
    found = sorted(
        entry.path
        for entry in os.scandir(path)
        if entry.is_file() and _format(entry.path) and entry.name[0] not in "._"
    )
    formats = sorted({_format(one) for one in found})
    if len(formats) > 1:
        raise CorpusError(
            f"{path} is not a file that can be read, but a folder of {', '.join(formats)} files: name those to read, as "
            f"{os.path.join(path, '*' + formats[0])}"
        )
    if not found:
        raise CorpusError(
            f"{path} is a folder without a file that can be read ({_formats()}): for files further down, write "
            f"{os.path.join(path, '**', '*.jsonl')}"
        )
    return found


def _formats() -> str:
    return f"{', '.join(FORMATS)}, also with {' or '.join(_COMPRESSED)}"


def _missing(path: str) -> str:
    if re.search(r"[*?]", path):
        return f"there is no file {path}, and none that matches it as a pattern"
    folder = os.path.dirname(path) or "."
    names = os.listdir(folder) if os.path.isdir(folder) else []
    near = difflib.get_close_matches(os.path.basename(path), names, n=1)
    if near:
        return f"there is no file {path}: did you mean {near[0]}?"
    return f"there is no file {path}: {'that folder has no such file' if names else 'no such folder'}"


def open_file(path: str) -> Table:
    """Open a file, or a folder that `Dataset.save_to_disk` wrote.

    Raises:
        CorpusError: If it cannot be read.
    """
    name, kind = _name(path), _format(path)
    if os.path.isdir(path):
        return _saved(name, path)
    if not kind:
        raise CorpusError(f"{path} is not a file that can be read: give one of {_formats()}")
    if os.path.getsize(path) == 0:
        raise CorpusError(f"{path} is empty")
    match kind:
        case ".csv" | ".tsv":
            return _csv(name, path, "\t" if kind == ".tsv" else ",")
        case ".parquet":
            return _parquet(name, path)
        case ".jsonl":
            return Table(name, lambda _: _json_lines(path))
        case ".json":
            return Table(name, lambda _: _json(path))
        case _:
            return Table(name, lambda _: _documents(path))


# --- text files --------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: str, newline: str | None = None) -> Iterator[IO[str]]:
    """Open a text file, compressed or not; what cannot be read in it is said in a sentence."""
    try:
        with _bytes(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text (byte {_undecodable(path)}): convert it first") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _bytes(path: str) -> Any:
    codec = _COMPRESSED.get(Path(path).suffix.lower())
    if codec is None:
        return open(path, "rb")  # noqa: SIM115
    import pyarrow

    return pyarrow.input_stream(path, compression=codec)


def _undecodable(path: str) -> int:
    """Return the place of the first byte that is not UTF-8."""
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    with _bytes(path) as file:
        while True:
            block, pending = file.read(_BLOCK), len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return read - pending + error.start
            read += len(block)


def _documents(path: str) -> Iterator[dict[str, str]]:
    """Split a text file at ``<|endoftext|>`` if that stands in its first 256 million characters, else at blank lines."""
    with _opened(path) as file:
        looked, at_marks = 0, False
        for line in file:
            looked, at_marks = looked + len(line), _SEPARATOR in line
            if at_marks or looked > _LOOKED_AT:
                break
    lines: list[str] = []
    with _opened(path) as file:
        for line in file:
            *ended, rest = line.split(_SEPARATOR) if at_marks else ["", line] if not line.strip() else [line]
            for part in ended:
                if text := "".join([*lines, part]).strip():
                    yield {"text": text}
                lines = []
            lines.append(rest)
    if text := "".join(lines).strip():
        yield {"text": text}


def _csv(name: str, path: str, delimiter: str) -> Table:
    def records() -> Iterator[tuple[int, list[str]]]:
        with _opened(path, newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            while True:
                # Python's limit on a value's length is one for all readers: it is lifted for this row alone.
                limit = csv.field_size_limit(_MOST)
                try:
                    record = next(reader, None)
                except csv.Error as error:
                    raise CorpusError(f"line {reader.line_num:,} of {path} cannot be read as csv: {error}") from error
                finally:
                    csv.field_size_limit(limit)
                if record is None:
                    return
                if record:
                    yield reader.line_num, record

    _, columns = next(records(), (0, []))

    def rows(wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
        places = [(one, columns.index(one)) for one in wanted]
        lines = records()
        next(lines)
        for line, record in lines:
            if any(record[len(columns) :]):  # commas at the end of a row add nothing
                raise CorpusError(
                    f"line {line:,} of {path} has {len(record)} values for {len(columns)} columns: put a value that holds "
                    f"{delimiter!r} in quotes"
                )
            yield {one: record[place] if place < len(record) else None for one, place in places}

    return Table(name, rows, tuple(columns))


# --- JSON --------------------------------------------------------------------------------------------------------------


def _whole(spelled: str) -> int | str:
    """Read a whole number, unless it would not be written the same way again."""
    return int(spelled) if len(spelled) < 20 and spelled != "-0" else spelled


_DECODER = json.JSONDecoder(
    parse_float=str, parse_int=_whole, parse_constant=lambda spelled: None if spelled == "NaN" else spelled
)
"""Numbers stay as they are spelled; NaN, which is no JSON, is what Python writes for a missing one."""


def _as_spelled(value: Any) -> Any:
    """Return a decoded row with its booleans as they are spelled."""
    match value:
        case bool():
            return "true" if value else "false"
        case dict():
            return {key: _as_spelled(part) if isinstance(part, bool | list) else part for key, part in value.items()}
        case list() if any(isinstance(part, bool) for part in value):
            return [_as_spelled(part) for part in value]
        case _:
            return value


def _json_lines(path: str) -> Iterator[Any]:
    with _opened(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _row_of_line(path, number, line)


def _row_of_line(path: str, number: int, line: str) -> Any:
    try:
        return _as_spelled(_DECODER.decode(line))
    except (json.JSONDecodeError, RecursionError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else "it is nested too deeply"
        raise CorpusError(f"line {number:,} of {path} cannot be read as JSON: {what}") from error


def _json(path: str) -> Iterator[Any]:
    """Read an array of rows, rows that stand one on a line, or a single one."""
    with _opened(path) as file:
        head = file.read(_BLOCK)
        if head.lstrip().startswith("["):
            for row in _elements(path, file, head, head.index("[") + 1):
                yield _as_spelled(row)
            return
    lines = _json_lines(path)
    try:
        first = next(lines, None)
    except CorpusError:
        with _opened(path) as file:
            yield _row_of_line(path, 1, file.read())
        return
    if first is not None:
        yield first
        yield from lines


def _elements(path: str, file: IO[str], text: str, at: int) -> Iterator[Any]:
    """Decode the elements of an array one by one, from a place behind its bracket."""
    while True:
        at = _GAP.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith("]", at):
            return
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            value, end, wrong = None, len(text), error
        else:
            wrong = None
        # What reaches to the end of the text may go on behind it.
        if end == len(text) and (more := file.read(max(_BLOCK, len(text) - at))):
            text, at = text[at:] + more, 0
        elif wrong is not None or end == len(text):
            what = getattr(wrong, "msg", "the array does not end")
            raise CorpusError(f"{path} cannot be read as JSON: {what}") from wrong
        else:
            yield value
            at = end


_GAP = re.compile(r"[\s,]*")


# --- tables ------------------------------------------------------------------------------------------------------------


def _parquet(name: str, path: str) -> Table:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = tuple(file.schema_arrow.names)
    except (OSError, pyarrow.ArrowException) as error:
        raise CorpusError(f"{path} cannot be read as parquet: {error}") from error

    def rows(wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_AT_ONCE, columns=list(wanted)):
                yield from batch.to_pylist()

    return Table(name, rows, columns)


def _saved(name: str, path: str) -> Table:
    import datasets

    try:
        saved = datasets.load_from_disk(path)
    except Exception as error:
        raise CorpusError(f"{path} cannot be read as a saved data set: {type(error).__name__}: {error}") from error
    if isinstance(saved, datasets.DatasetDict):
        if len(saved) != 1:
            one = os.path.join(path, str(next(iter(saved), "")))
            raise CorpusError(f"{path} holds the splits {', '.join(map(str, saved))}: name one, as {one}")
        [saved] = saved.values()
    return of_dataset(name, saved)


_AT_ONCE = 256  # rows that are made Python objects at a time
