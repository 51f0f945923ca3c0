"""Text sources: files, hub data sets, the demo's texts and iterables, opened as a stream of texts or of prompts with answers.

Knows file formats, paths and the field names of data sets; knows nothing of tokens. Files are streamed through `datasets`,
without a cache.
"""

# How a source is written: PATH, hf:NAME/CONFIG:SPLIT or demo:NAME:SPLIT, then `:FIELD` or `:PROMPT>ANSWER`, then `@GROUP`; all but
# the name of the source can be left out. Paths and names of fields can hold ":" and "@" themselves, so nothing is cut by its looks
# alone: the path ends at the last file ending at which there is such a file, and what follows is read in the one way in which the
# first row has all its fields.

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from lens_unlearn.core.errors import CorpusError

__all__ = ["Opened", "Pair", "Row", "Source", "open_source"]

Source = str | os.PathLike[str] | Iterable[Any]
"""A path or name as on the command line, a `datasets` object, or any iterable of strings or rows."""

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
DEFAULT_TEMPLATE = "{prompt} {answer}"
_SEPARATOR = "<|endoftext|>"


class Pair(NamedTuple):
    """A prompt and its answer, from one row."""

    prompt: str
    answer: str
    tests: tuple[str, ...] = ()
    """Unit tests, if the answer is a program: statements that fail if it is wrong, from the field "test_list"."""
    setup: str = ""
    """Code that has to run before the tests, from "test_setup_code" or "test_imports"."""
    perturbed: tuple[str, ...] = ()
    """Wrong answers of the same form, from the field "perturbed_answer"."""
    paraphrase: str = ""
    """A paraphrase of the answer, from "paraphrased_answer"."""
    paraphrased_prompt: str = ""
    """A paraphrase of the prompt, from "paraphrased_question"."""


class Row(NamedTuple):
    """What is read of one row."""

    text: str | Pair | None
    """Its text, or its prompt with the answer; None if it has no text, or lacks a part."""
    group: str | int | None = None
    """The value of the field that names its group, or the number of its run of rows."""


@dataclass(frozen=True)
class Opened:
    """An opened source, whose fields were checked."""

    name: str
    rows: Iterable[Row]
    is_pairs: bool
    template: str = DEFAULT_TEMPLATE
    """How prompts and answers are joined by default."""


def open_source(source: Source, field: str | None = None, group: str | int | None = None) -> Opened:
    """Open a source as a stream of texts, each with its group where groups are named.

    Raises:
        CorpusError: If it does not exist, cannot be read, or has no such field (the message lists those it has).
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, str):
        return _open_name(source, field, group)
    if isinstance(source, bytes | Mapping):
        raise CorpusError(f"a {type(source).__name__} is not a text source: pass a path, or an iterable of strings")
    if not isinstance(source, Iterable):
        raise CorpusError(f"a {type(source).__name__} is not a text source: pass a path, or an iterable of strings")
    return _fields(type(source).__name__, source, field, group)


def _open_name(source: str, field: str | None, group: str | int | None) -> Opened:
    if source.startswith("demo:"):
        return _open_demo(source, field, group)
    if source.startswith("hf:"):
        return _open_hub(source, field, group)
    path, written = _split_path(source)
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        folder = os.path.dirname(path) or "."
        names = os.listdir(folder) if os.path.isdir(folder) else []
        near = difflib.get_close_matches(os.path.basename(path), names, n=1)
        hint = (
            f": did you mean {near[0]}?"
            if near
            else f": {'that folder has no such file' if names else 'no such folder'}"
        )
        raise CorpusError(f"there is no file {path}{hint}")
    suffix = Path(path).suffix.lower()
    if suffix not in _BUILDERS or os.path.isdir(path):
        raise CorpusError(f"{path} is not a file that can be read: give one of {', '.join(_BUILDERS)}")
    if os.path.getsize(path) == 0:
        raise CorpusError(f"{path} is empty")
    rows = _documents(path) if suffix == ".txt" else _load(path, _BUILDERS[suffix])
    return _fields(os.path.basename(path), rows, field, group, written)


def _split_path(source: str) -> tuple[str, str]:
    """Split ``path:field@group`` after the path, which can hold ":" and "@" itself: the longest that is a file."""
    ends = re.finditer(r"\.(?:jsonl|json|csv|parquet|txt)(?=[:@]|$)", source, re.IGNORECASE)
    cuts = [(source[: end.end()], source[end.end() :].removeprefix(":")) for end in ends][::-1]
    if os.path.exists(source) or not cuts:
        return source, ""
    return next((cut for cut in cuts if os.path.isfile(os.path.expanduser(cut[0]))), cuts[0])


def _split_group(name: str) -> tuple[str, str]:
    """Split the name of a data set or of its split before ``@group``."""
    head, at, group = name.rpartition("@")
    return (head, at + group) if at and not os.path.exists(name) else (name, "")


def _load(path: str, builder: str) -> Iterable[Any]:
    import datasets

    try:
        return datasets.load_dataset(builder, data_files=path, split="train", streaming=True)
    except Exception as error:
        raise CorpusError(f"{path} cannot be read as {builder}: {_first_line(error)}") from error


def _documents(path: str) -> Iterator[dict[str, str]]:
    """Split a text file at ``<|endoftext|>`` if it contains that, else at blank lines."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    parts = text.split(_SEPARATOR) if _SEPARATOR in text else re.split(r"\n\s*\n", text)
    return ({"text": part.strip()} for part in parts if part.strip())


def _open_hub(source: str, field: str | None, group: str | int | None) -> Opened:
    """Open ``hf:name/config:split:field@group``; the name can have an owner, and all but the name is optional."""
    import datasets

    where, split, written = (source[3:].split(":") + ["", ""])[:3]
    if not split:
        where, written = _split_group(where)
    elif not written:
        split, written = _split_group(split)
    name, config = where, None
    if where.count("/") == 2 or (where.count("/") == 1 and not os.path.exists(where)):
        name, _, config = where.rpartition("/")
    attempts = [(name, config), (where, None)] if config else [(where, None)]
    failure: Exception | None = None
    for repository, configuration in attempts:
        try:
            rows = datasets.load_dataset(repository, configuration, split=split or "train", streaming=True)
            return _fields(source, rows, field, group, written)
        except CorpusError:
            raise
        except Exception as error:
            failure = failure or error
    raise CorpusError(f"{source} cannot be loaded from the hub: {_first_line(failure)}") from failure


def _open_demo(source: str, field: str | None, group: str | int | None) -> Opened:
    from lens_unlearn import demo

    # "dev" by default, for exploring and fitting: "test" is for the final evaluation, and the model was trained on "train".
    _, name, split, written = (source.split(":", 3) + ["", ""])[:4]
    if not split:
        name, written = _split_group(name)
    elif not written:
        split, written = _split_group(split)
    try:
        rows = demo.corpus(name, split or "dev")
    except ValueError as error:
        raise CorpusError(f"{source}: {error}") from error
    facts = name.startswith("facts")
    opened = _fields(source, rows, field or ("question>answer" if facts else None), group, written)
    # The format in which the demo model was trained.
    return replace(opened, template="Q: {prompt}\nA: {answer}" if facts else "{prompt}{answer}")


def _fields(
    name: str, rows: Iterable[Any], field: str | None, group: str | int | None = None, written: str = ""
) -> Opened:
    """Check the fields in the first row, then stream texts, or prompts with answers for ``question>answer``.

    What is `written` after the name of a source, ``field@group``, goes before the arguments.
    """
    stream = iter(rows)
    try:
        first = next(stream)
    except StopIteration:
        raise CorpusError(f"{name} is empty") from None
    except UnicodeDecodeError as error:
        raise CorpusError(f"{name} is not UTF-8 text: convert it first") from error
    except Exception as error:
        raise CorpusError(f"{name} cannot be read: {_first_line(error)}") from error
    all_rows = chain([first], _guard(name, stream))
    if written and isinstance(first, Mapping):
        field, group = _as_written(name, first, written, field or "text", group)
    if isinstance(group, int) and group < 1:
        raise CorpusError(f"{name}: {group} rows make no group: at least 1, or give the field that names the groups")
    if not isinstance(first, Mapping):
        if field is not None:
            raise CorpusError(f"{name} holds plain strings, which have no field {field!r}")
        if isinstance(group, str):
            raise CorpusError(
                f"{name} holds plain strings, which have no field {group!r} to group by: give rows, or a number of them"
            )
        return Opened(name, (Row(_text(row), _run(group, i)) for i, row in enumerate(all_rows)), is_pairs=False)
    names = _names(field or "text")
    if len(names) > 2:
        raise CorpusError(f"{field!r} names more than a prompt and an answer: write 'question>answer'")
    for wanted in names:
        if wanted not in first:
            raise CorpusError(f"{name} has no field {wanted!r}: its fields are {', '.join(map(str, first))}")
    if isinstance(group, str) and group not in first:
        raise CorpusError(f"{name} has no field {group!r} to group by: its fields are {', '.join(map(str, first))}")
    return Opened(name, _rows(name, all_rows, names, group), is_pairs=len(names) == 2)


def _names(field: str) -> list[str]:
    return [part.strip() for part in field.split(">")]


def _as_written(
    name: str, first: Mapping[str, Any], written: str, field: str, group: str | int | None
) -> tuple[str, str | int | None]:
    """Return the field and the group of ``field@group``: of all places where it can be cut, the one at which the fields exist."""
    cuts: list[tuple[str, str | int | None]] = [(written, group)]
    for at in (i for i, character in enumerate(written) if character == "@"):
        after = written[at + 1 :].strip()
        # A field whose name is a number, and a number of rows, are two ways to read it.
        cuts += [(written[:at] or field, found) for found in ([after, int(after)] if after.isdecimal() else [after])]
    fits = [
        (fields, found)
        for fields, found in cuts
        if all(part in first for part in _names(fields)) and (not isinstance(found, str) or found in first)
    ]
    if len(fits) > 1:
        ways = " or ".join(f"field={fields!r}, group={found!r}" for fields, found in fits)
        raise CorpusError(f"{name}: {written!r} can mean {ways}: read it in Python with these, or rename the field")
    # Where nothing fits, the last cut is what was meant, and the field that it lacks is named.
    return fits[0] if fits else cuts[-1]


def _rows(name: str, rows: Iterable[Any], names: list[str], group: str | int | None) -> Iterator[Row]:
    for i, row in enumerate(rows):
        parts = [_text(row.get(wanted)) for wanted in names] if isinstance(row, Mapping) else []
        match [part for part in parts if part is not None]:
            case [text] if len(names) == 1:
                pass
            case [prompt, answer]:
                text = Pair(prompt, answer, *_tests(row), *_comparisons(row))
            case _:
                yield Row(None)
                continue
        yield Row(text, _value(name, row, group, i) if isinstance(group, str) else _run(group, i))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _run(length: int | None, i: int) -> int | None:
    """Return which run of so many rows the row of an index is in, counted over all rows, those without text as well."""
    return None if length is None else i // length


def _value(name: str, row: Mapping[str, Any], group: str, i: int) -> str:
    """Return the value of the field that names a row's group: without one, it could be anybody's, on either side of a split."""
    value = row.get(group)
    if not isinstance(value, str | int | float) or value != value or not str(value).strip():
        raise CorpusError(
            f"row {i + 1:,} of {name} has {value!r} for {group!r}, which names no group: "
            "name one there, or leave the row out"
        )
    return str(value).strip()


def _tests(row: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """Return a row's unit tests and their setup code, from the fields of MBPP; empty if it has none."""
    tests, imports = row.get("test_list"), row.get("test_imports")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        return (), ""
    setup = [row.get("test_setup_code"), *(imports if isinstance(imports, list) else [])]
    return tuple(tests), "\n".join(part for part in setup if isinstance(part, str) and part)


def _comparisons(row: Mapping[str, Any]) -> tuple[tuple[str, ...], str, str]:
    """Return a row's wrong answers, and the paraphrases of answer and prompt, from the fields of TOFU; empty if it has none."""
    wrong = row.get("perturbed_answer")
    wrong = wrong if isinstance(wrong, list) else [wrong]
    paraphrases = (row.get(f"paraphrased_{part}") for part in ("answer", "question"))
    answer, prompt = (text if isinstance(text, str) and text.strip() else "" for text in paraphrases)
    return tuple(text for text in wrong if isinstance(text, str) and text.strip()), answer, prompt


def _guard(name: str, rows: Iterator[Any]) -> Iterator[Any]:
    """Pass rows on; raise a `CorpusError` that names the row if one cannot be read."""
    number = 1
    while True:
        number += 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise CorpusError(f"row {number:,} or later of {name} cannot be read: {_first_line(error)}") from error
        yield row


def _first_line(error: Exception | None) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"
