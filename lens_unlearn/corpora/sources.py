"""Text sources: files, hub data sets, the demo's texts and iterables, opened as a stream of texts or of prompts with answers.

Knows file formats, paths and the field names of data sets; knows nothing of tokens. Files are streamed through `datasets`,
without a cache.
"""

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from lens_unlearn.core.errors import CorpusError

__all__ = ["Opened", "Pair", "Source", "open_source"]

Source = str | os.PathLike[str] | Iterable[Any]
"""A path or name as on the command line, a `datasets` object, or any iterable of strings or rows."""

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
DEFAULT_TEMPLATE = "{prompt} {answer}"
_SEPARATOR = "<|endoftext|>"


class Pair(NamedTuple):
    """A prompt and its answer, from one row."""

    prompt: Any
    answer: Any
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


@dataclass(frozen=True)
class Opened:
    """An opened source, whose fields were checked."""

    name: str
    texts: Iterable[str | Pair | None]
    """Texts, or prompts with answers; None for a row without text."""
    is_pairs: bool
    template: str = DEFAULT_TEMPLATE
    """How prompts and answers are joined by default."""


def open_source(source: Source, field: str | None = None) -> Opened:
    """Open a source as a stream of texts.

    Raises:
        CorpusError: If it does not exist, cannot be read, or has no such field (the message lists those it has).
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, str):
        return _open_name(source, field)
    if isinstance(source, bytes | Mapping):
        raise CorpusError(f"a {type(source).__name__} is not a text source: pass a path, or an iterable of strings")
    if not isinstance(source, Iterable):
        raise CorpusError(f"a {type(source).__name__} is not a text source: pass a path, or an iterable of strings")
    return _fields(type(source).__name__, source, field)


def _open_name(source: str, field: str | None) -> Opened:
    if source.startswith("demo:"):
        return _open_demo(source, field)
    if source.startswith("hf:"):
        return _open_hub(source, field)
    path, within = _split_path(source)
    field = within or field
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
    return _fields(os.path.basename(path), rows, field)


def _split_path(source: str) -> tuple[str, str | None]:
    """Split ``path:field`` at the last colon after a file ending; paths can contain colons themselves."""
    match = re.fullmatch(r"(.+\.(?:jsonl|json|csv|parquet|txt)):([^/\\]+)", source, re.IGNORECASE)
    return (match[1], match[2]) if match and not os.path.exists(source) else (source, None)


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


def _open_hub(source: str, field: str | None) -> Opened:
    """Open ``hf:name/config:split:field``; the name can have an owner, and config, split and field are optional."""
    import datasets

    where, split, within = (source[3:].split(":") + ["", ""])[:3]
    name, config = where, None
    if where.count("/") == 2 or (where.count("/") == 1 and not os.path.exists(where)):
        name, _, config = where.rpartition("/")
    attempts = [(name, config), (where, None)] if config else [(where, None)]
    failure: Exception | None = None
    for repository, configuration in attempts:
        try:
            rows = datasets.load_dataset(repository, configuration, split=split or "train", streaming=True)
            return _fields(source, rows, within or field)
        except CorpusError:
            raise
        except Exception as error:
            failure = failure or error
    raise CorpusError(f"{source} cannot be loaded from the hub: {_first_line(failure)}") from failure


def _open_demo(source: str, field: str | None) -> Opened:
    from lens_unlearn import demo

    # "dev" by default, for exploring and fitting: "test" is for the final evaluation, and the model was trained on "train".
    _, name, split, within = (source.split(":", 3) + ["", ""])[:4]
    field = within or field
    try:
        rows = demo.corpus(name, split or "dev")
    except ValueError as error:
        raise CorpusError(f"{source}: {error}") from error
    facts = name.startswith("facts")
    opened = _fields(source, rows, "question>answer" if facts and field is None else field)
    # The format in which the demo model was trained.
    return replace(opened, template="Q: {prompt}\nA: {answer}" if facts else "{prompt}{answer}")


def _fields(name: str, rows: Iterable[Any], field: str | None) -> Opened:
    """Check the fields in the first row, then stream texts, or prompts with answers for ``question>answer``."""
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
    if not isinstance(first, Mapping):
        if field is not None:
            raise CorpusError(f"{name} holds plain strings, which have no field {field!r}")
        return Opened(name, (row if isinstance(row, str) else None for row in all_rows), is_pairs=False)
    names = [part.strip() for part in (field or "text").split(">")]
    if len(names) > 2:
        raise CorpusError(f"{field!r} names more than a prompt and an answer: write 'question>answer'")
    for wanted in names:
        if wanted not in first:
            raise CorpusError(f"{name} has no field {wanted!r}: its fields are {', '.join(map(str, first))}")
    if len(names) == 1:
        return Opened(name, (_get(row, names[0]) for row in all_rows), is_pairs=False)
    prompt, answer = names
    pairs = (Pair(_get(row, prompt), _get(row, answer), *_tests(row), *_comparisons(row)) for row in all_rows)
    return Opened(name, pairs, is_pairs=True)


def _get(row: Any, name: str) -> Any:
    return row.get(name) if isinstance(row, Mapping) else None


def _tests(row: Any) -> tuple[tuple[str, ...], str]:
    """Return a row's unit tests and their setup code, from the fields of MBPP; empty if it has none."""
    tests, imports = _get(row, "test_list"), _get(row, "test_imports")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        return (), ""
    setup = [_get(row, "test_setup_code"), *(imports if isinstance(imports, list) else [])]
    return tuple(tests), "\n".join(part for part in setup if isinstance(part, str) and part)


def _comparisons(row: Any) -> tuple[tuple[str, ...], str, str]:
    """Return a row's wrong answers, and the paraphrases of answer and prompt, from the fields of TOFU; empty if it has none."""
    wrong = _get(row, "perturbed_answer")
    wrong = wrong if isinstance(wrong, list) else [wrong]
    paraphrases = (_get(row, f"paraphrased_{part}") for part in ("answer", "question"))
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
