"""Chats: how a tokenizer's template writes turns, where the assistant's begin and end, and what ends a generated text.

Knows chat templates as Hugging Face's tokenizers have them; knows nothing of where conversations come from, nor of corpora.
"""

# What a template does can only be seen from what it writes: it is a program. So it is asked to write short conversations that
# differ in one turn's content, and where these differ, and what they share behind that, says how it writes every turn.
#
# Where a question ends, in a chat: at the last token of the user's last turn. Behind it, each prompt goes on with the same tokens,
# which end that turn and begin the assistant's (`Chat.marks`), so they are found at the end of whatever prompt the model is given:
# by `generate`, in a corpus, by the model's own `generate`, or by a harness. What judges questions judges them at one place.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.model.host import Model
from lens_unlearn.model.special_tokens import ends_of_a_text, special_tokens, tokenizer_of

__all__ = [
    "ROLES",
    "Chat",
    "chat_of",
    "check_messages",
    "ends_of_text",
    "is_conversation",
    "marks_of",
    "question_ends",
    "require_chat",
]

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant")
_PROBES = ("0", "1", "so", "Why?")

T = TypeVar("T", str, list[int])


@dataclass(frozen=True)
class Chat:
    """The chat template of a tokenizer, and what was found out about it."""

    tokenizer: Any
    marks: tuple[int, ...] = ()
    """The tokens between the content of a user's turn and what the assistant writes, the same in every prompt."""
    closing: str = ""
    """What stands behind the content of an assistant's turn, up to the special token that ends it, and with that."""
    turn_end: int | None = None
    """That token; None if the template writes none."""
    gap: str = ""
    """What of the closing stands in front of it."""

    def write(self, messages: Sequence[Message], *, answering: bool = False) -> str:
        """Return a conversation as text, as `apply_chat_template` has it.

        Args:
            messages: The turns, with "role" and "content".
            answering: Whether the beginning of the assistant's next turn stands at the end.

        Raises:
            CorpusError: If the template refuses it, such as a system's turn.
        """
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answering)
        except Exception as error:  # it is a program of the tokenizer's author, which may fail in any way
            lines = str(error).strip().splitlines()
            raise CorpusError(
                f"the tokenizer's chat template refuses it: {lines[0] if lines else type(error).__name__}"
            ) from error

    def begins_with(self, bos: int | None) -> bool:
        """Whether it writes BOS at the beginning of a conversation, and that is this token."""
        ids = self.tokenizer(self.write(_asked("0")), add_special_tokens=False, verbose=False)["input_ids"]
        return bos is not None and list(ids[:1]) == [bos]

    def around(self, messages: Sequence[Message], number: int) -> tuple[int, int]:
        """Return where the content of one turn begins and ends in the text of a conversation."""
        # A character that no text has, so that what it is compared with differs in its first one and its last.
        other = next(sign for sign in map(chr, range(0xE000, 0xF8FF)) if sign not in messages[number]["content"])
        changed = [{**turn, "content": other} if i == number else turn for i, turn in enumerate(messages)]
        text, beside = self.write(messages), self.write(changed)
        before = _shared(text, beside)
        behind = _shared(text[before:][::-1], beside[before:][::-1])
        return before, len(text) - behind


def chat_of(tokenizer: Any) -> Chat | None:
    """Return the chat template of a tokenizer; None if it has none, or one that cannot write a question and its answer."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    known = getattr(tokenizer, "_lens_unlearn_chat", None)
    if known is None or known[0] != template:
        known = (template, _found(tokenizer))
        tokenizer._lens_unlearn_chat = known
    return known[1]


def require_chat(model: Model) -> Chat:
    """Return the chat template of a model's tokenizer.

    Raises:
        CorpusError: If it has none, or one that cannot write a question and its answer.
    """
    tokenizer = tokenizer_of(model)
    if not getattr(tokenizer, "chat_template", None):
        raise CorpusError(
            "this model's tokenizer has no chat template: take one that was trained on chats, or set "
            "model.tokenizer.chat_template, or read texts without chat=True"
        )
    chat = chat_of(tokenizer)
    if chat is None:
        Chat(tokenizer).write(_asked("0"), answering=True)  # says what is wrong
        raise CorpusError("this tokenizer's chat template writes no question with an answer: set another one")
    return chat


def _found(tokenizer: Any) -> Chat | None:
    plain = Chat(tokenizer)
    try:
        prompts = [plain.write(_asked(probe), answering=True) for probe in _PROBES]
        answered = [*_asked("0"), {"role": "assistant", "content": "0"}]
        whole, (_, end) = plain.write(answered), plain.around(answered, 1)
    except CorpusError:
        return None
    ids: list[list[int]] = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    shared = min(_shared(ids[0][::-1], other[::-1]) for other in ids[1:])
    marks = tuple(ids[0][len(ids[0]) - shared :])
    behind, names = whole[end:], {tokenizer.convert_ids_to_tokens(id): id for id in special_tokens(tokenizer)}
    places = sorted((behind.find(name), -len(name), name) for name in names if name and name in behind)
    if not places:
        return Chat(tokenizer, marks)
    place, _, name = places[0]
    return Chat(tokenizer, marks, behind[: place + len(name)], names[name], behind[:place])


def _asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _shared(a: T, b: T) -> int:
    """Return the length of the beginning that two have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


def is_conversation(value: Any) -> bool:
    """Say whether something is one conversation: a list of turns."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def check_messages(messages: Any, system: str | None = None) -> list[dict[str, Any]]:
    """Return the turns of a conversation, behind a system's turn if one is given and it has none of its own.

    Raises:
        CorpusError: If it is none: what a turn lacks, in words that go behind the name of the conversation.
    """
    if not is_conversation(messages):
        raise CorpusError("no list of turns, each with a role and its content")
    turns: list[dict[str, Any]] = []
    for number, turn in enumerate(messages):
        if turn.get("role") not in ROLES:
            raise CorpusError(
                f"turn {number + 1} has the role {turn.get('role')!r}: the roles that can be read are {', '.join(ROLES)}"
            )
        content = turn.get("content")
        if not isinstance(content, str):
            raise CorpusError(
                f"the content of turn {number + 1} is a {type(content).__name__}, and no text: give a string"
                if content is not None
                else f"turn {number + 1} has no content: give a string, or leave the turn out"
            )
        turns.append({key: value for key, value in turn.items() if value is not None})
    has_system = turns[0]["role"] == "system"
    return turns if system is None or has_system else [{"role": "system", "content": system}, *turns]


def marks_of(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens with which prompts end in the tokenizer's chat template, if it has one."""
    chat = chat_of(tokenizer)
    return chat.marks if chat else ()


def question_ends(
    marks: Sequence[int], tokens: Int[Tensor, "batch pos"], ends: Int[Tensor, "batch"]
) -> Int[Tensor, "batch"]:
    """Return where the question of each prompt ends: before the marks with which a chat goes over to the assistant.

    Args:
        marks: As `marks_of` returns them.
        tokens: The rows.
        ends: The position of each prompt's last token, in these tokens or outside of them.

    Returns:
        For a prompt that ends with the marks, the position of the last token before them; for any other, its end.
    """
    if not marks:
        return ends
    places = ends[:, None] - len(marks) + 1 + torch.arange(len(marks), device=tokens.device)
    inside = (places[:, 0] > 0) & (ends < tokens.shape[1])
    written = tokens.gather(1, places.clamp(0, tokens.shape[1] - 1)) == tokens.new_tensor(marks)
    return torch.where(inside & written.all(1), ends - len(marks), ends)


def ends_of_text(model: Model) -> set[int]:
    """Return every token that ends a text: those of `ends_of_a_text`, and the one that ends a turn in the chat template."""
    chat = chat_of(getattr(model, "tokenizer", None))
    ends = ends_of_a_text(model)
    known = chat is not None and chat.turn_end is not None and chat.turn_end < int(model.cfg.d_vocab)
    return {*ends, chat.turn_end} if known and chat and chat.turn_end is not None else ends
