"""What one row of a source says: a text, a prompt with its answers, a conversation, or token ids, and the group that it belongs to.

Knows the values that rows hold, and the field names of data sets; knows nothing of files, nor of tokenization.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.model.chat import check_messages, is_conversation

__all__ = ["FURTHER", "IDS", "Ids", "MESSAGES", "Pair", "Row", "Turns", "plain_row", "read_rows"]

IDS = "input_ids"
MESSAGES = ("messages", "conversations", "conversation")
"""The fields in which data sets have their conversations."""
_SENDERS = {"human": "user", "gpt": "assistant"}
FURTHER = (
    "attention_mask", "test_list", "test_setup_code", "test_imports", "perturbed_answer", "paraphrased_answer",
    "paraphrased_question", "translated_question",
)  # fmt: skip
"""The fields that are read without being named."""
_NO_TEXT = "empty or not text"
_NO_UNICODE = "not Unicode (half a surrogate pair)"


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
    accepted: tuple[str, ...] = ()
    """Further answers that are right as well, where the row lists several."""
    translated_prompts: tuple[str, ...] = ()
    """The prompt in other languages, from the field "translated_question", which is a text or a list of texts."""


class Ids(NamedTuple):
    """A text that was tokenized before."""

    ids: tuple[int, ...]


class Turns(NamedTuple):
    """A conversation."""

    turns: tuple[Mapping[str, Any], ...]
    """With "role" and "content"."""


class Row(NamedTuple):
    """What is read of one row."""

    text: str | Pair | Ids | Turns | None
    """Its text, its prompt with the answer, or its conversation; None if it has no text, or lacks a part."""
    group: str | tuple[int, int] | None = None
    """The value of the field that names its group, or the number of its file and of its run of rows in it."""
    lacking: str = _NO_TEXT
    """Why it is skipped, if it is."""


def plain_row(value: Any, group: int | None, number: int) -> Row:
    """Read an item that is not made of fields: a string, or else nothing."""
    return _row(value if isinstance(value, str) and value.strip() else None, _run(group, number))


def read_rows(
    name: str, rows: Iterable[Any], fields: Sequence[str], group: str | int | None, *, chat: bool = False
) -> Iterator[Row]:
    """Read a text, a prompt and its answer, or in a chat the turns of a conversation, of each row."""
    read = _conversation if chat and len(fields) == 1 else _text_of_row
    for number, row in enumerate(rows):
        try:
            text = read(row, fields) if isinstance(row, Mapping) else None
        except CorpusError as error:
            raise CorpusError(f"row {number + 1:,} of {name}: {error}") from error
        if text is None:
            yield Row(None)
        else:
            yield _row(text, _value(name, row, group, number) if isinstance(group, str) else _run(group, number))


def _text_of_row(row: Mapping[str, Any], fields: Sequence[str]) -> str | Pair | Ids | None:
    first = row.get(fields[0])
    prompt = as_text(first)
    if len(fields) == 1:
        return _ids(first, row) if prompt is None else prompt
    answers = _answers(row.get(fields[1]))
    if prompt is None or not answers:
        return None
    return Pair(
        prompt, answers[0], *_tests(row), *_comparisons(row), tuple(answers[1:]), _texts(row.get("translated_question"))
    )


def _conversation(row: Mapping[str, Any], fields: Sequence[str]) -> Turns | None:
    """Read the turns of a conversation; those of ShareGPT say "from" and "value"."""
    value = _as_list(row.get(fields[0]))
    if value is None or (isinstance(value, list | tuple) and not value):
        return None
    if is_conversation(value) and all("from" in turn and "role" not in turn for turn in value):
        value = [{"role": _SENDERS.get(turn["from"], turn["from"]), "content": turn.get("value")} for turn in value]
    try:
        return Turns(tuple(check_messages(value)))
    except CorpusError as error:
        if not is_conversation(value):
            raise CorpusError(
                f"{fields[0]!r} is {error}: name the field that is one, or those of prompt and response, as "
                "'prompt>response'"
            ) from error
        raise


def _row(text: str | Pair | Ids | Turns | None, group: str | tuple[int, int] | None) -> Row:
    """Make a row, unless its text cannot be written in Unicode, and so is none to a tokenizer."""
    try:
        parts = [turn["content"] for turn in text.turns] if isinstance(text, Turns) else text or ()
        for part in (text,) if isinstance(text, str) else parts:
            for string in (part,) if isinstance(part, str) else part:
                if isinstance(string, str):
                    string.encode()
    except UnicodeEncodeError:
        return Row(None, lacking=_NO_UNICODE)
    return Row(text, group)


def as_text(value: Any) -> str | None:
    """Return a value as text: numbers, booleans and dates are text, as they are written; what is missing or blank is none."""
    if isinstance(value, str):
        text = str(value)
    elif (
        isinstance(value, bool | int | float | Decimal | date | time | np.generic) and value == value
    ):  # not NaN, not NaT
        # A table may keep a day as a moment: its midnight was not written.
        text = str(value).removesuffix(" 00:00:00") if isinstance(value, datetime) else str(value)
    else:
        return None
    return text if text.strip() else None


def _answers(value: Any) -> list[str]:
    """Return the answers that are right, the first one first: a row may list several, also as SQuAD does, under "text"."""
    value = _as_list(value.get("text") if isinstance(value, Mapping) else value)
    texts = map(as_text, value) if isinstance(value, list | tuple) else [as_text(value)]
    return list(dict.fromkeys(text for text in texts if text is not None))


def _ids(value: Any, row: Mapping[str, Any]) -> Ids | None:
    """Return token ids without their padding, if a value is a list of such."""
    ids, mask = _as_list(value), _as_list(row.get("attention_mask"))
    if not isinstance(ids, list | tuple) or not ids or not all(type(token) is int for token in ids):
        return None
    if isinstance(mask, list | tuple) and len(mask) == len(ids):
        ids = [token for token, kept in zip(ids, mask, strict=True) if kept]
    return Ids(tuple(ids)) if ids else None


def _as_list(value: Any) -> Any:
    """Return an array or a tensor as a list."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, np.generic) else value


def _run(length: int | None, number: int) -> tuple[int, int] | None:
    """Return which run of so many rows the row of an index is in, counted over all rows, those without text as well."""
    return None if length is None else (0, number // length)


def _value(name: str, row: Mapping[str, Any], group: str, number: int) -> str:
    """Return the value of the field that names a row's group: without one, it could be anybody's, on either side of a split."""
    value = as_text(row.get(group))
    if value is None or _row(value, None).text is None:
        raise CorpusError(
            f"row {number + 1:,} of {name} has {row.get(group)!r} for {group!r}, which names no group: "
            "name one there, or leave the row out"
        )
    return value.strip()


def _tests(row: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """Return a row's unit tests and their setup code, from the fields of MBPP; empty if it has none."""
    tests, imports = row.get("test_list"), row.get("test_imports")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        return (), ""
    setup = [row.get("test_setup_code"), *(imports if isinstance(imports, list) else [])]
    return tuple(tests), "\n".join(part for part in setup if isinstance(part, str) and part)


def _comparisons(row: Mapping[str, Any]) -> tuple[tuple[str, ...], str, str]:
    """Return a row's wrong answers, and the paraphrases of answer and prompt, from the fields of TOFU; empty if it has none."""
    wrong = _texts(row.get("perturbed_answer"))
    answer, prompt = (as_text(row.get(f"paraphrased_{part}")) or "" for part in ("answer", "question"))
    return wrong, answer, prompt


def _texts(value: Any) -> tuple[str, ...]:
    """Return the texts of a field that holds one, or a list of them."""
    value = _as_list(value)
    texts = map(as_text, value if isinstance(value, list | tuple) else [value])
    return tuple(text for text in texts if text is not None)
