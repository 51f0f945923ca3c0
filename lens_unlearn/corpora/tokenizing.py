"""Texts become token ids, with the mask of those that count, and no more of a text is tokenized than can matter.

Knows templates and tokenizers; knows nothing of where texts come from, nor of rows and windows.
"""

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.corpora import conversations
from lens_unlearn.corpora.corpus import Answer
from lens_unlearn.corpora.rows import Ids, Pair, Row, Turns
from lens_unlearn.model.chat import Chat, check_messages
from lens_unlearn.model.special_tokens import special_tokens

__all__ = ["Document", "Encoder", "tokenize"]

_CHUNK, _CHUNK_CHARACTERS = 256, 2**20  # documents tokenized at a time, and their characters
_CHARACTERS, _BEHIND = (
    8,
    64,
)  # characters of a token, as a rule at most; tokens before a cut that may differ from those of the whole

T = TypeVar("T")


class _Text(NamedTuple):
    """A document before it is tokenized."""

    text: str
    begin: int = 0
    """The character at which its counted part begins."""
    answer: Answer | None = None
    ids: tuple[int, ...] = ()
    """Its tokens, where it was tokenized before."""
    turns: tuple[tuple[int, int], ...] = ()
    """Of a conversation, the characters from which and to which the assistant's turns go."""
    key: str = ""
    group: str | None = None
    place: int = 0


class Document(NamedTuple):
    """A tokenized document."""

    ids: list[int]
    counted: list[bool]
    """Which of its tokens count."""
    key: str
    """A digest of its text."""
    answer: Answer | None = None
    group: str | None = None
    """A digest of its group."""
    prompted: bool = False
    """Whether it begins with a prompt."""
    place: int = 0
    """Where it stands in its source."""
    turns: tuple[int, ...] = ()
    """Of a conversation, the tokens with which the assistant's turns begin."""


@dataclass
class Encoder:
    """Tokenizes documents in chunks.

    Attributes:
        tokenizer: Of the model.
        template: How prompt and answer are joined.
        count: Which tokens count: "all", or those of the "answer".
        bos: The token that will be put before each document.
        eos: The token that ends each.
        vocabulary: Number of tokens that the model knows.
        window: Most tokens of a prompt with its answer, which is left out where it is longer.
        budget: Most counted tokens that are wanted in all.
        chat: The template in which conversations, and prompts with their answers, are written.
        system: The system's turn of conversations that have none.
        name: Of their source.
    """

    tokenizer: Any
    template: str
    count: str
    bos: int | None
    eos: int | None
    vocabulary: int
    window: int
    budget: int | None
    chat: Chat | None = None
    system: str | None = None
    name: str = "the source"
    # The digest of the first text of each run of rows, by the number of its file and its own.
    first_in: dict[tuple[int, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        template = self.template
        if self.count not in ("all", "answer"):
            raise CorpusError(f"count={self.count!r} is not known: count 'all' tokens or the 'answer'")
        if "{prompt}" not in template or not template.rstrip().endswith("{answer}"):
            raise CorpusError(f"the template {template!r} must hold {{prompt}} and end with {{answer}}")
        before = re.split(r"\{(?:prompt|tests)\}", template)[0].strip().splitlines()
        marker = before[-1].strip() if before else ""
        self.marker = marker if re.search(r"\w", marker) else ""  # "#" alone can also begin a line of an answer

    def encode(
        self, rows: Iterable[Row], skipped: Counter[str], shuffle: int | None = None, seed: int = 0
    ) -> Iterator[Document]:
        """Yield the documents of rows, in their order or drawn from a buffer; count those without text by why they are skipped."""
        texts = self._texts(rows, skipped)
        most = _CHUNK_CHARACTERS if self.budget is None else min(_CHARACTERS * self.budget, _CHUNK_CHARACTERS)
        chunk: list[_Text] = []
        size = 0
        for text in texts if shuffle is None else _shuffled(texts, shuffle, seed):
            chunk.append(text)
            size += len(text.text)
            if len(chunk) == _CHUNK or size >= most:
                yield from self._tokenize(chunk)
                chunk, size = [], 0
        yield from self._tokenize(chunk)

    def _texts(self, rows: Iterable[Row], skipped: Counter[str]) -> Iterator[_Text]:
        """Put prompts and answers into the template, in the order of the source."""
        for place, (text, group, lacking) in enumerate(rows):
            if text is None:
                skipped[lacking] += 1
                continue
            joined = self._tokenized_before(text.ids, place) if isinstance(text, Ids) else self._join(text, place)
            if joined is None:
                skipped["without a turn of the assistant"] += 1
                continue
            key = _digest(joined.text.strip())
            yield joined._replace(key=key, group=None if group is None else self._group(group, key), place=place)

    def _join(self, text: str | Pair | Turns, place: int) -> _Text | None:
        """Put a prompt and its answer into the template; None for a conversation in which nothing is answered."""
        if isinstance(text, str):
            return _Text(text)
        if self.chat is not None:
            return self._chatted(self.chat, text, place)
        assert isinstance(text, Pair)
        fields = {"{prompt}": text.prompt, "{tests}": "\n".join(text.tests)}
        head = self.template[: self.template.rindex("{answer}")]
        head = re.sub(r"\{(?:prompt|tests)\}", lambda match: fields[match[0]], head)
        if self.count == "all":
            return _Text(head + text.answer)
        comparisons = (text.perturbed, text.paraphrase, text.paraphrased_prompt)
        answer = Answer(
            text.answer, text.tests, text.setup, self.marker, *comparisons, head, "", text.prompt, text.accepted,
            text.translated_prompts,
        )  # fmt: skip
        return _Text(head + text.answer, len(head), answer)

    def _chatted(self, chat: Chat, text: Pair | Turns, place: int) -> _Text | None:
        """Put a conversation, or a prompt and its answer as one, into the template of the chat."""
        pair = text if isinstance(text, Pair) else None
        given = text.turns if isinstance(text, Turns) else _as_turns(text)
        try:
            messages = check_messages(given, self.system)
            if self.count == "all":
                return _Text(chat.write(messages))
            written = conversations.write(chat, messages)
        except CorpusError as error:
            raise CorpusError(f"row {place + 1:,} of {self.name}: {error}") from error
        if written is None:
            return None
        last = max(number for number, turn in enumerate(messages) if turn["role"] == "assistant")
        begin, end = written.answer
        answer = Answer(
            written.text[begin:end],
            head=written.text[:begin],
            tail=chat.gap if written.turns[-1][1] > end else "",
            # All that was said before: of many conversations the last question alone, such as "Go on", is the same.
            prompt="\n".join(turn["content"] for turn in messages[:last] if turn["role"] != "system"),
        )
        if pair is not None:
            comparisons = (pair.perturbed, pair.paraphrase, pair.paraphrased_prompt)
            answer = Answer(
                answer.text,
                pair.tests,
                pair.setup,
                "",
                *comparisons,
                answer.head,
                answer.tail,
                pair.prompt,
                pair.accepted,
                pair.translated_prompts,
            )
        return _Text(written.text, written.turns[-1][0], answer, turns=written.turns)

    def _tokenized_before(self, ids: tuple[int, ...], place: int) -> _Text:
        strange = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if strange is not None:
            raise CorpusError(
                f"row {place + 1:,} of {self.name} holds the token {strange}, which this model's vocabulary of "
                f"{self.vocabulary:,} has not: "
                "give texts, or token ids of its own tokenizer"
            )
        return _Text(self.tokenizer.decode(list(ids), skip_special_tokens=True), ids=ids)

    def _tokenize(self, chunk: list[_Text]) -> Iterator[Document]:
        whole = [text for text in chunk if not (text.ids or text.turns or self._is_long(text))]
        tokenized = tokenize(
            self.tokenizer, [text.text for text in whole], [text.begin for text in whole], self.bos, self.eos
        )
        chats = [text for text in chunk if text.turns]
        turns = _tokenize_turns(self.tokenizer, [text.text for text in chats], [text.turns for text in chats], self.bos)
        special = special_tokens(self.tokenizer)
        for text in chunk:
            begins: tuple[int, ...] = ()
            if text.turns:
                ids, counted, begins = next(turns)
            elif text.ids:
                ids, counted = _marked(list(text.ids), [True] * len(text.ids), special, self.bos, None)
            else:
                ids, counted = self._beginning(text) if self._is_long(text) else next(tokenized)
            prompted = text.begin > 0 or bool(text.turns)
            yield Document(ids, counted, text.key, text.answer, text.group, prompted, text.place, begins)

    def _most(self, text: _Text) -> float:
        """Return after how many tokens a text is cut, or (a prompt with its answer) left out."""
        return self.window if text.begin else math.inf if self.budget is None else self.budget

    def _is_long(self, text: _Text) -> bool:
        return len(text.text) > _CHARACTERS * (self._most(text) + _BEHIND)

    def _beginning(self, text: _Text) -> tuple[list[int], list[bool]]:
        """Tokenize as much of a long text as there is need of: for one of many megabytes, the whole would take minutes.

        Where a text is cut, its last tokens can differ from those that the whole one has there: these are dropped.
        """
        most = int(self._most(text))
        length = _CHARACTERS * (most + _BEHIND)
        while length < len(text.text):
            [(ids, counted)] = tokenize(self.tokenizer, [text.text[:length]], [text.begin], self.bos)
            ids, counted = ids[:-_BEHIND], counted[:-_BEHIND]
            if text.begin and len(ids) > most:
                return ids, [*counted[:-1], True]  # it is longer than the window, and nothing else matters
            if not text.begin and sum(counted) >= most:
                return ids, counted
            length *= 2
        [whole] = tokenize(self.tokenizer, [text.text], [text.begin], self.bos, self.eos)
        return whole

    def _group(self, group: str | tuple[int, int], key: str) -> str:
        """Return a digest of a group: of its name, or of the text with which a run begins.

        Not of the run's number, which means nothing in another file: by its text, an author is the same group there.
        """
        return _digest(f"group {group}" if isinstance(group, str) else f"run of {self.first_in.setdefault(group, key)}")


def _shuffled(items: Iterable[T], size: int, seed: int) -> Iterator[T]:
    """Yield items in an order drawn from a buffer: each time, one of `size` items is taken, and the next one put in its place."""
    draw = random.Random(f"shuffle {seed}")
    buffer: list[T] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = draw.randrange(size)
        taken, buffer[place] = buffer[place], item
        yield taken
    draw.shuffle(buffer)
    yield from buffer


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tokenize(
    tokenizer: Any, texts: list[str], begins: list[int], bos: int | None = None, eos: int | None = None
) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield each text's token ids, and the mask of the counted ones: those that end after the character `begin`.

    Special tokens that a text writes do not count. The `bos` that will be put before it is left out, where it writes that
    itself; `eos` ends each text, and is counted.
    """
    if not texts:
        return
    # Prompt and answer are tokenized together, as the model reads them. So a token can straddle their border, such as the space
    # before the answer; it is counted, since predicting it takes predicting the answer's first characters.
    fast = getattr(tokenizer, "is_fast", False)
    # verbose=False: documents longer than the context are cut into rows here, so its warning would mislead.
    out = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    special = special_tokens(tokenizer)
    for i, (text, begin) in enumerate(zip(texts, begins, strict=True)):
        ids = list(out["input_ids"][i])
        if begin == 0:  # also tokens that cover no character
            counted = [True] * len(ids)
        elif fast:
            counted = [end > begin for _, end in out["offset_mapping"][i]]
        else:
            # Behind the last token that the prompt has alone as well: its own last ones may go on into the answer.
            alone = tokenizer(text[:begin], add_special_tokens=False, verbose=False)["input_ids"]
            before = next((place for place, (a, b) in enumerate(zip(alone, ids)) if a != b), min(len(alone), len(ids)))
            counted = [place >= before for place in range(len(ids))]
        yield _marked(ids, counted, special, bos, eos)


def _tokenize_turns(
    tokenizer: Any, texts: list[str], turns: list[tuple[tuple[int, int], ...]], bos: int | None
) -> Iterator[tuple[list[int], list[bool], tuple[int, ...]]]:
    """Yield each conversation's token ids, the mask of those in the assistant's turns, and where these begin.

    All of a turn counts, the token that ends it too. The `bos` that will be put before the conversation is left out.
    """
    if not texts:
        return
    if not getattr(tokenizer, "is_fast", False):
        raise CorpusError(
            "this tokenizer does not say which characters its tokens stand for, so that the turns of a chat cannot be told "
            "apart: load the fast one, or read texts without chat=True"
        )
    out = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for i, own in enumerate(turns):
        ids, offsets = list(out["input_ids"][i]), out["offset_mapping"][i]
        head = int(bos is not None and ids[:1] == [bos])
        counted = [any(end > begin and start < over for begin, over in own) for start, end in offsets]
        begins = [next((at for at, (_, end) in enumerate(offsets) if end > begin), len(ids)) - head for begin, _ in own]
        yield ids[head:], counted[head:], tuple(begins)


def _as_turns(pair: Pair) -> tuple[dict[str, str], ...]:
    return {"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.answer}


def _marked(
    ids: list[int], counted: list[bool], special: frozenset[int], bos: int | None, eos: int | None
) -> tuple[list[int], list[bool]]:
    """Do with special tokens as `tokenize` says."""
    counted = [yes and id not in special for id, yes in zip(ids, counted, strict=True)]
    if bos is not None and ids[:1] == [bos]:
        ids, counted = ids[1:], counted[1:]
    if eos is not None:
        written = ids[-1:] == [eos]
        ids, counted = (ids, [*counted[:-1], True]) if written else ([*ids, eos], [*counted, True])
    return ids, counted
