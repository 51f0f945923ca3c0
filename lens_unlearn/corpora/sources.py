"""Text sources: files, demo corpora, data sets of the hub and what is in memory become a stream of texts, pairs or token ids.

Knows names of sources and the fields that are asked for; knows nothing of file formats, nor of tokens.
"""

# How a source is written: PATH, hf:NAME/CONFIG:SPLIT or demo:NAME:SPLIT, then `:FIELD` or `:PROMPT>ANSWER`, then `@GROUP`; all but
# the name of the source can be left out. Paths and names of fields can hold ":" and "@" themselves, so nothing is cut by its looks
# alone: the path is the longest beginning at which there is a file, and what follows is read in the one way in which the first row
# has all its fields.

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from numbers import Integral
from typing import Any

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.corpora.files import is_file, locate, looks_like_file, open_file
from lens_unlearn.corpora.rows import FURTHER, IDS, MESSAGES, Row, plain_row, read_rows
from lens_unlearn.corpora.tables import Table, of_dataset, table_of
from lens_unlearn.model.chat import is_conversation

__all__ = ["Opened", "Source", "open_source"]

Source = str | os.PathLike[str] | Iterable[Any] | Any
"""A path or name as on the command line, or several; a `datasets`, pandas or Arrow table; any iterable of strings or rows."""

DEFAULT_TEMPLATE = "{prompt} {answer}"
_PAIR = ("prompt", "response")
_PEEKED = 1000  # rows in which a field is looked for, where only rows say what fields there are


@dataclass(frozen=True)
class Opened:
    """An opened source, whose fields were checked."""

    name: str
    rows: Iterable[Row]
    is_pairs: bool
    """Whether each row is a prompt with its answer; in a chat, all are conversations."""
    template: str = DEFAULT_TEMPLATE
    """How prompts and answers are joined by default."""
    group: str | int | None = None
    """The field that names groups, or the number of rows in one."""


def open_source(
    source: Source, field: str | None = None, group: str | int | None = None, *, chat: bool = False
) -> Opened:
    """Open a source as a stream of texts, or in a `chat` of conversations, each with its group where groups are named.

    Raises:
        CorpusError: If it does not exist, cannot be read, or has no such field (the message lists those it has).
    """
    if isinstance(source, os.PathLike):
        source = os.fsdecode(source)
    if isinstance(source, str):
        return _open_name(source, field, group, chat)
    if isinstance(source, list | tuple) and (several := _paths(source)):
        opened = [_open_name(path, field, group, chat) for path in several]
        return _joined(opened[0].name if len(opened) == 1 else f"{opened[0].name} and {len(opened) - 1} more", opened)
    if chat and is_conversation(source) and all("role" in turn and "content" in turn for turn in source):
        source = [source]  # one conversation
    table = table_of(source)
    if chat and table.columns is None:  # conversations may stand in a list as they are
        rows = table.rows
        table = replace(
            table, rows=lambda names: ({MESSAGES[0]: r} if isinstance(r, list | tuple) else r for r in rows(names))
        )
    return _fields(table, field, group, chat=chat)


def _paths(source: Sequence[Any]) -> list[str]:
    """Return the sources that a list holds; none if it holds texts or rows."""
    if any(isinstance(item, os.PathLike) for item in source):
        strange = next((item for item in source if not isinstance(item, str | os.PathLike)), None)
        if strange is not None:
            raise CorpusError(f"a list of paths holds a {type(strange).__name__}: give paths alone")
        return [os.fsdecode(item) for item in source]
    if not all(isinstance(item, str) for item in source):
        return []
    named = [text for text in source if _looks_like_source(text)]
    if len(named) == len(source):
        return named
    if (path := next(filter(is_file, named), None)) is not None:
        other = next(text for text in source if not _looks_like_source(text))
        raise CorpusError(
            f"of a list of strings, {path!r} is a file, and {other[:40]!r} is not: give paths alone, or texts as rows, "
            '[{"text": ...}]'
        )
    return []


def _looks_like_source(text: str) -> bool:
    return looks_like_file(text) or (text.startswith(("hf:", "demo:")) and not any(map(str.isspace, text)))


def _joined(name: str, parts: Iterable[Opened]) -> Opened:
    """Read one opened source after another; a run of rows does not go on in the next one."""
    rest = iter(parts)
    first = next(rest)

    def rows() -> Iterator[Row]:
        for number, part in enumerate(chain([first], rest)):
            if (part.is_pairs, part.template) != (first.is_pairs, first.template):
                raise CorpusError(
                    f"{first.name} and {part.name} are not of one kind, questions with answers in one template, or texts: "
                    "read them apart, and add the corpora"
                )
            for row in part.rows:
                yield row._replace(group=(number, row.group[1])) if isinstance(row.group, tuple) else row

    return replace(first, name=name, rows=rows())


def _open_name(source: str, field: str | None, group: str | int | None, chat: bool) -> Opened:
    if source.startswith("demo:"):
        return _open_demo(source, field, group, chat)
    if source.startswith("hf:"):
        return _open_hub(source, field, group, chat)
    found = locate(source)
    # Files without any content are no reason to leave a folder unread.
    paths = [path for path in found.paths if os.path.getsize(path)] or found.paths
    return _joined(found.name, (_fields(open_file(path), field, group, found.written, chat=chat) for path in paths))


def _split_group(name: str) -> tuple[str, str]:
    """Split the name of a data set or of its split before ``@group``."""
    head, at, group = name.rpartition("@")
    return (head, at + group) if at else (name, "")


def _open_hub(source: str, field: str | None, group: str | int | None, chat: bool) -> Opened:
    """Open ``hf:name/config:split:field@group``; the name can have an owner, and all but the name is optional."""
    import datasets

    where, split, written = ([*source[3:].split(":", 2), "", ""])[:3]
    if not split:
        where, written = _split_group(where)
    elif not written:
        split, written = _split_group(split)
    name, config = where, None
    if where.count("/") in (1, 2):
        name, _, config = where.rpartition("/")
    attempts = [(name, config), (where, None)] if config else [(where, None)]
    failure: Exception | None = None
    for repository, configuration in attempts:
        try:
            rows = datasets.load_dataset(_on_hub(repository), configuration, split=split or "train", streaming=True)
            return _fields(of_dataset(source, rows), field, group, written, chat=chat)
        except CorpusError:
            raise
        except Exception as error:
            failure = failure or error
    raise CorpusError(f"{source} cannot be loaded from the hub: {_first_line(failure)}") from failure


def _on_hub(repository: str) -> str:
    """Return a name that `datasets` takes for one on the hub, also where a folder or a file format has the same name."""
    from datasets import packaged_modules

    if not repository or repository in packaged_modules._PACKAGED_DATASETS_MODULES:
        raise CorpusError(f"hf:{repository} is no data set on the hub: give its name, as hf:OWNER/NAME, or a path")
    return f"hf://datasets/{repository}" if os.path.exists(repository) else repository


def _open_demo(source: str, field: str | None, group: str | int | None, chat: bool) -> Opened:
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
    opened = _fields(
        Table(source, lambda _: iter(rows)), field or ("question>answer" if facts else None), group, written, chat=chat
    )
    # The format in which the demo model was trained.
    return replace(opened, template="Q: {prompt}\nA: {answer}" if facts else "{prompt}{answer}")


def _fields(
    table: Table, field: str | None, group: str | int | None = None, written: str = "", *, chat: bool = False
) -> Opened:
    """Check the fields, then stream texts, or prompts with answers for ``question>answer``.

    What is `written` after the name of a source, ``field@group``, goes before the arguments.
    """
    name = table.name
    if table.columns is None:
        return _fields_of_rows(name, _guard(name, table.rows(())), field, group, written, chat)
    fields, group = _asked(name, table.columns, field, group, written, chat)
    named: dict[str, None] = dict.fromkeys([*fields, *([group] if isinstance(group, str) else []), *FURTHER])
    stream = _guard(name, table.rows([one for one in named if one in table.columns]))
    if not (seen := [*islice(stream, 1)]):
        raise CorpusError(f"{name} is empty")
    read = read_rows(name, chain(seen, stream), fields, group, chat=chat)
    return Opened(name, read, is_pairs=len(fields) == 2 and not chat, group=group)


def _fields_of_rows(
    name: str, stream: Iterator[Any], field: str | None, group: str | int | None, written: str, chat: bool
) -> Opened:
    """Do so where only the rows say which fields there are: the first ones may lack some, or be no rows at all."""
    seen: list[Any] = []

    def more() -> bool:
        """See one row more, if there is one, and not too many were seen."""
        before = len(seen)
        seen.extend(islice(stream, 1 if before < _PEEKED else 0))
        return len(seen) > before

    if not more():
        raise CorpusError(f"{name} is empty")
    while not isinstance(seen[-1], str | Mapping) and more():
        pass
    if not isinstance(seen[-1], Mapping):
        if chat:
            raise CorpusError(
                f"{name} holds plain strings, and no conversations: give rows with messages, or read it without chat=True"
            )
        run = _run_of_strings(name, field, group, written)
        return Opened(
            name, (plain_row(row, run, i) for i, row in enumerate(chain(seen, stream))), is_pairs=False, group=run
        )
    keys = dict.fromkeys(seen[-1])
    while True:
        try:
            fields, group = _asked(name, tuple(keys), field, group, written, chat)
            break
        except CorpusError:
            if not more():
                raise
            keys |= dict.fromkeys(seen[-1]) if isinstance(seen[-1], Mapping) else {}
    read = read_rows(name, chain(seen, stream), fields, group, chat=chat)
    return Opened(name, read, is_pairs=len(fields) == 2 and not chat, group=group)


def _run_of_strings(name: str, field: str | None, group: str | int | None, written: str) -> int | None:
    """Return how many plain strings are a group; they have no fields that could be asked for."""
    before, at, after = written.rpartition("@")
    if at and after.isdecimal():
        written, group = before, int(after)
    if field or written:
        raise CorpusError(f"{name} holds plain strings, which have no field {written or field!r}")
    if isinstance(group, str):
        raise CorpusError(
            f"{name} holds plain strings, which have no field {group!r} to group by: give rows, or a number of them"
        )
    return _checked_run(name, group)


def _checked_run(name: str, length: int | None) -> int | None:
    if length is not None and (isinstance(length, bool) or not isinstance(length, Integral)):
        raise CorpusError(f"{name}: group={length!r} names no groups: give a field, or a whole number of rows")
    if length is not None and length < 1:
        raise CorpusError(f"{name}: {length} rows make no group: at least 1, or give the field that names the groups")
    return None if length is None else int(length)


def _asked(
    name: str, known: Sequence[str], field: str | None, group: str | int | None, written: str, chat: bool
) -> tuple[list[str], str | int | None]:
    """Return the fields and the group that were asked for, all of which there are."""
    usual = IDS if IDS in known and "text" not in known else "text"
    if chat:
        pair = ">".join(_PAIR) if all(one in known for one in _PAIR) else MESSAGES[0]
        usual = next((one for one in MESSAGES if one in known), pair)
    if written:
        field, group = _as_written(name, known, written, field or usual, group)
    fields = _names(field or usual)
    if len(fields) > 2:
        raise CorpusError(f"{field!r} names more than a prompt and an answer: write 'question>answer'")
    for wanted, purpose in [
        *((one, "") for one in fields),
        *([(group, " to group by")] if isinstance(group, str) else []),
    ]:
        if wanted not in known:
            raise CorpusError(f"{name} has no field {wanted!r}{purpose}: its fields are {', '.join(map(str, known))}")
        if list(known).count(wanted) > 1:
            raise CorpusError(f"{name} has several columns {wanted!r}: rename those that are not to be read")
    return fields, group if isinstance(group, str) else _checked_run(name, group)


def _names(field: str) -> list[str]:
    return [part.strip() for part in field.split(">")]


def _as_written(
    name: str, known: Sequence[str], written: str, field: str, group: str | int | None
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
        if all(part in known for part in _names(fields)) and (not isinstance(found, str) or found in known)
    ]
    if len(fits) > 1:
        ways = " or ".join(f"field={fields!r}, group={found!r}" for fields, found in fits)
        raise CorpusError(f"{name}: {written!r} can mean {ways}: read it in Python with these, or rename the field")
    # Where nothing fits, the last cut is what was meant, and the field that it lacks is named.
    return fits[0] if fits else cuts[-1]


def _guard(name: str, rows: Iterator[Any]) -> Iterator[Any]:
    """Pass rows on; raise a `CorpusError` that names the row if one cannot be read."""
    number = 0
    while True:
        number += 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except CorpusError:
            raise
        except Exception as error:
            which = f"row {number:,} or later of {name}" if number > 1 else name
            raise CorpusError(f"{which} cannot be read: {_first_line(error)}") from error
        yield row


def _first_line(error: Exception | None) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"
