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
from lens_unlearn.corpora.corpus import Answer
from lens_unlearn.corpora.rows import Ids, Pair, Row
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
    """

    tokenizer: Any
    template: str
    count: str
    bos: int | None
    eos: int | None
    vocabulary: int
    window: int
    budget: int | None
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
            joined = self._tokenized_before(text.ids, place) if isinstance(text, Ids) else self._join(text)
            key = _digest(joined.text.strip())
            yield joined._replace(key=key, group=None if group is None else self._group(group, key), place=place)

    def _join(self, text: str | Pair) -> _Text:
        """Put a prompt and its answer into the template."""
        if isinstance(text, str):
            return _Text(text)
        fields = {"{prompt}": text.prompt, "{tests}": "\n".join(text.tests)}
        head = self.template[: self.template.rindex("{answer}")]
        head = re.sub(r"\{(?:prompt|tests)\}", lambda match: fields[match[0]], head)
        if self.count == "all":
            return _Text(head + text.answer)
        comparisons = (text.perturbed, text.paraphrase, text.paraphrased_prompt)
        answer = Answer(
            text.answer, text.tests, text.setup, self.marker, *comparisons, head, text.prompt, accepted=text.accepted
        )
        return _Text(head + text.answer, len(head), answer)

    def _tokenized_before(self, ids: tuple[int, ...], place: int) -> _Text:
        strange = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if strange is not None:
            raise CorpusError(
                f"row {place + 1:,} holds the token {strange}, which this model's vocabulary of {self.vocabulary:,} has not: "
                "give texts, or token ids of its own tokenizer"
            )
        return _Text(self.tokenizer.decode(list(ids), skip_special_tokens=True), ids=ids)

    def _tokenize(self, chunk: list[_Text]) -> Iterator[Document]:
        whole = [text for text in chunk if not text.ids and not self._is_long(text)]
        tokenized = tokenize(
            self.tokenizer, [text.text for text in whole], [text.begin for text in whole], self.bos, self.eos
        )
        special = special_tokens(self.tokenizer)
        for text in chunk:
            if text.ids:
                ids, counted = _marked(list(text.ids), [True] * len(text.ids), special, self.bos, None)
            else:
                ids, counted = self._beginning(text) if self._is_long(text) else next(tokenized)
            yield Document(ids, counted, text.key, text.answer, text.group, text.begin > 0, text.place)

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
