"""Conversations become text, as the tokenizer's chat template writes it, with the places of the assistant's turns.

Knows turns and templates; knows nothing of tokens, nor of where conversations come from.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.model.chat import Chat

__all__ = ["Written", "write"]


class Written(NamedTuple):
    """A conversation as text."""

    text: str
    turns: tuple[tuple[int, int], ...]
    """Where the assistant's turns begin and end: behind what a prompt ends with, and behind what ends the turn."""
    answer: tuple[int, int]
    """Where the content of the last of them does."""


def write(chat: Chat, messages: Sequence[Mapping[str, Any]]) -> Written | None:
    """Write a conversation, and find the assistant's turns in it; None if there are none.

    Raises:
        CorpusError: If the template refuses it, or writes what stands before a turn otherwise once that turn is there.
    """
    text = chat.write(messages)
    turns: list[tuple[int, int]] = []
    answer = (0, 0)
    for number, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        answer = begin, end = chat.around(messages, number)
        if number:  # a conversation that begins with the assistant has no prompt before that
            prompt = chat.write(messages[:number], answering=True)
            if not text.startswith(prompt) or len(prompt) > begin:
                raise CorpusError(
                    f"the tokenizer's chat template writes what stands before turn {number + 1} otherwise once that turn is "
                    "there, so that a model would be asked something else than what is read: give shorter conversations, or "
                    "set another template"
                )
            begin = len(prompt)
        turns.append((begin, end + len(chat.closing) * text.startswith(chat.closing, end)))
    return Written(text, tuple(turns), answer) if turns else None
