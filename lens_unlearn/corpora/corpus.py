"""Texts become a `Corpus`: tokens, a mask of the positions that count, and document ids. Reading goes through `datasets`.

A source is a file (``texts.jsonl``, ``data.parquet:body``, ``book.txt``), ``hf:name/config:split:field``, ``demo:NAME``
(or ``demo:NAME:SPLIT:FIELD``; the default split is "dev", not trained on and not the test), a
`datasets` object, or any iterable of strings or rows. Question-answer sources name both fields, ``file.jsonl:question>answer``;
then only the answer's tokens count, and the prompt is kept as the query. Where rows also have the fields of MBPP, "test_list"
and "test_setup_code", these are kept as the answer's unit tests; and those of TOFU, "perturbed_answer", "paraphrased_answer" and
"paraphrased_question", as what it is compared with.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lens_unlearn.core.counter_rng import key_of, uniform
from lens_unlearn.core.errors import CorpusError
from lens_unlearn.model.host import Model

__all__ = ["Answer", "Batch", "Corpus"]

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Some rows of a corpus, padded on the right."""

    tokens: Int[Tensor, "batch pos"]
    counted: Bool[Tensor, "batch pos"]
    rows: Int[Tensor, "batch"]

    def run(self, function: Callable[["Batch"], T]) -> list[T]:
        """Return what a function makes of the batch; or of its halves, where the device runs out of memory over the whole.

        The function is called again on each half (and so on, down to single rows), so it must not have kept anything of a call
        that failed.
        """
        try:
            return [function(self)]
        except torch.OutOfMemoryError:
            if len(self.rows) == 1:
                raise
        if torch.cuda.is_available():  # here, where the frames of the failed call are gone
            torch.cuda.empty_cache()
        middle = len(self.rows) // 2
        cuts = [slice(None, middle), slice(middle, None)]
        halves = [Batch(self.tokens[cut], self.counted[cut], self.rows[cut]) for cut in cuts]
        return [one for half in halves for one in half.run(function)]


@dataclass(frozen=True)
class Answer:
    """The true answer to a row's prompt."""

    text: str
    tests: tuple[str, ...] = ()
    """Where the answer is a program: statements that fail if it is wrong."""
    setup: str = ""
    """What the tests need before them."""
    marker: str = ""
    """How a line begins with which the next prompt begins: the last line of what the template has before the prompt, where
    that holds a letter or digit."""
    perturbed: tuple[str, ...] = ()
    """Wrong answers to the same prompt."""
    paraphrase: str = ""
    """The answer in other words."""
    paraphrased_prompt: str = ""
    """The prompt in other words."""
    head: str = field(default="", compare=False, repr=False)
    """What the template makes of the prompt: all that stands before the answer."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenized documents, cut into rows no longer than a window, with a mask of the positions that count.

    A token counts unless it is BOS, padding, or (in question-answer corpora) part of the prompt. Statistics are taken
    at counted tokens; the loss is that of predicting counted tokens, so the first token of a row without BOS, which
    nothing predicts, counts for statistics only.
    """

    name: str
    tokens: Int[Tensor, "total"]
    counted: Bool[Tensor, "total"]
    starts: Int[Tensor, "boundaries"]
    document: Int[Tensor, "rows"]
    """Which document each row is of: an index into `keys`."""
    keys: tuple[str, ...]
    """A digest of each document's text."""
    window: int
    prepend_bos: bool
    vocabulary: str
    """A digest of the tokenizer's vocabulary."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Documents left out while reading, by reason."""
    answers: tuple[Answer | None, ...] = ()
    """For each document its answer, where it was read as a prompt and an answer; empty where none was."""

    @property
    def n_tokens(self) -> int:
        """Counted tokens."""
        return int(self.counted.sum())

    @property
    def n_documents(self) -> int:
        """Documents."""
        return len(self.keys)

    @property
    def n_rows(self) -> int:
        """Rows: a document longer than the window has several."""
        return len(self.document)

    @property
    def fingerprint(self) -> str:
        """A digest of the tokens, the mask and the document boundaries: equal exactly for equal corpora."""
        digest = hashlib.sha256()
        for tensor in (self.tokens.int(), self.counted, self.starts.long(), self.document.long()):
            digest.update(tensor.contiguous().numpy().tobytes())
        digest.update(f"{self.prepend_bos} {self.vocabulary}".encode())
        tests = [(place, answer.tests, answer.setup) for place, answer in enumerate(self.answers) if answer]
        if any(told for _, told, _ in tests):
            digest.update(repr(tests).encode())
        others = [
            (place, answer.perturbed, answer.paraphrase, answer.paraphrased_prompt)
            for place, answer in enumerate(self.answers)
            if answer and (answer.perturbed or answer.paraphrase or answer.paraphrased_prompt)
        ]
        if others:
            digest.update(repr(others).encode())
        return digest.hexdigest()[:16]

    def row(self, index: int) -> Int[Tensor, "pos"]:
        """Return the tokens of one row."""
        return self.tokens[int(self.starts[index]) : int(self.starts[index + 1])].long()

    def prompt(self, index: int) -> Int[Tensor, "pos"]:
        """Return the tokens of one row before its first counted token: BOS, and the prompt where there is one."""
        counted = self.counted[int(self.starts[index]) : int(self.starts[index + 1])]
        return self.row(index)[: int(counted.int().argmax())]

    def answer(self, index: int) -> Answer | None:
        """Return the true answer to the prompt of one row; None where it was not read as a prompt and an answer."""
        return self.answers[int(self.document[index])] if self.answers else None

    @property
    def has_prompts(self) -> bool:
        """Whether every row begins with a prompt: tokens besides BOS that do not count."""
        return bool((self._prompt_lengths() > int(self.prepend_bos)).all())

    def _prompt_lengths(self) -> Int[Tensor, "rows"]:
        """Count the tokens of each row before its first counted one, BOS included."""
        lengths = self.starts.diff()
        row_of = torch.repeat_interleave(torch.arange(self.n_rows), lengths)
        place = torch.arange(len(self.tokens)) - self.starts[row_of]
        first = torch.where(self.counted, place, lengths[row_of])
        return lengths.scatter_reduce(0, row_of, first, "amin", include_self=False)

    def with_prompts(self, tokens: int | None = None, *, seed: int = 0) -> "Corpus":
        """Make the beginning of every row its prompt: it no longer counts, and what follows is what is predicted.

        Args:
            tokens: Length of each prompt, BOS not included. Default: each row is cut at a random place, so that the
                prompt's last token gives nothing away of the kind of text.
            seed: Of the random places; a row's place depends on its tokens and the seed alone.

        Raises:
            CorpusError: If no row is longer than its prompt.
        """
        if tokens is not None and tokens < 1:
            raise CorpusError(f"tokens={tokens} makes no prompt: at least 1")
        head, lengths = int(self.prepend_bos), self.starts.diff()
        body = lengths - head
        if tokens is None:
            drawn = uniform(torch.tensor([self._row_key(row, seed) for row in range(self.n_rows)])).double()
            # At least four tokens of prompt and of text behind it, where the row is long enough.
            room = (body - 1).clamp(1, 4)
            ends = head + (room + drawn * (body - 2 * room + 1).clamp_min(1)).long().minimum((body - 1).clamp_min(1))
        else:
            ends = torch.full_like(body, head + tokens)
        row_of = torch.repeat_interleave(torch.arange(self.n_rows), lengths)
        place = torch.arange(len(self.tokens)) - self.starts[row_of]
        # What the true answers answer is no longer the prompt.
        cut = replace(self, name=f"{self.name}, cut into prompts", counted=place >= ends[row_of], answers=())
        kept = lengths > ends
        if not bool(kept.any()):
            raise CorpusError(
                f"no row of {self.name} is longer than a prompt of {tokens or 1} tokens: give longer texts"
            )
        return cut if bool(kept.all()) else cut._rows(kept)

    def queries(self) -> "Corpus":
        """Return the prompt of every row alone, with its last token as the one that counts.

        Raises:
            CorpusError: If there are no prompts: read "question>answer", or make some with `with_prompts`.
        """
        ends = self._prompt_lengths()
        kept = ends > int(self.prepend_bos)
        if not bool(kept.any()):
            raise CorpusError(
                f"{self.name} has no prompts: read it as 'question>answer', or cut its texts with .with_prompts()"
            )
        row_of = torch.repeat_interleave(torch.arange(self.n_rows), self.starts.diff())
        place = torch.arange(len(self.tokens)) - self.starts[row_of]
        inside = place < ends[row_of]
        shorter = replace(
            self,
            name=f"prompts of {self.name}",
            tokens=self.tokens[inside],
            counted=(place == ends[row_of] - 1)[inside],
            answers=(),
            starts=torch.cat([torch.zeros(1, dtype=torch.long), ends.cumsum(0)]),
        )
        return shorter if bool(kept.all()) else shorter._rows(kept)

    def batches(self, batch_size: int = 8) -> Iterator[Batch]:
        """Yield batches of rows of similar length, in a fixed order.

        Args:
            batch_size: Rows of full window length per batch; of shorter rows as many more as hold no more tokens.
        """
        if batch_size < 1:
            raise CorpusError(f"batch_size={batch_size} is too small: at least 1")
        lengths = self.starts.diff()
        order = torch.sort(lengths, descending=True, stable=True).indices.tolist()
        budget = batch_size * min(self.window, int(lengths.max())) if order else 0
        start = 0
        while start < len(order):
            longest = int(lengths[order[start]])
            end = start + max(1, budget // longest)
            yield self._batch(order[start:end], longest)
            start = end

    def take(self, rows: Sequence[int]) -> Batch:
        """Return some rows, by index, as one batch."""
        return self._batch(list(rows), max(int(self.starts[row + 1] - self.starts[row]) for row in rows))

    def _batch(self, rows: list[int], longest: int) -> Batch:
        tokens = torch.zeros(len(rows), longest, dtype=torch.long)
        counted = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            start, end = int(self.starts[row]), int(self.starts[row + 1])
            tokens[i, : end - start] = self.tokens[start:end]
            counted[i, : end - start] = self.counted[start:end]
        return Batch(tokens, counted, torch.tensor(rows))

    def places(self, batch: Batch) -> tuple[Int[Tensor, "tokens"], Int[Tensor, "tokens"]]:
        """Return for every position of a batch a key of its document, and a number that tells it from the others there."""
        keys = torch.tensor([key_of(self.keys[d]) for d in self.document[batch.rows].tolist()])
        row = torch.tensor([self._row_key(row) for row in batch.rows.tolist()])
        place = row[:, None] + torch.arange(batch.tokens.shape[1])
        return keys[:, None].expand_as(place).reshape(-1), place.reshape(-1)

    def _row_key(self, row: int, seed: int = 0) -> int:
        """Return a number for a row's tokens; a row's number in its document is another one where rows were left out."""
        return key_of(self.row(row).int().numpy().tobytes(), seed)

    def check(self, model: Model) -> None:
        """Refuse a model with another vocabulary or a shorter context.

        Raises:
            CorpusError: Naming the difference.
        """
        if int(self.tokens.max()) >= int(model.cfg.d_vocab):
            raise CorpusError(f"{self.name} has token ids beyond this model's vocabulary: read it with this model")
        tokenizer = getattr(model, "tokenizer", None)
        if self.vocabulary and tokenizer is not None and vocabulary_digest(tokenizer) != self.vocabulary:
            raise CorpusError(f"{self.name} was tokenized with another vocabulary: read it with this model")
        if int(self.starts.diff().max()) > int(model.cfg.n_ctx):
            raise CorpusError(f"{self.name} has rows longer than this model's context of {model.cfg.n_ctx} tokens")

    def only(self, documents: Iterable[int], name: str | None = None) -> "Corpus":
        """Return the corpus of some documents, by index, in this corpus' order.

        Raises:
            CorpusError: If none is left.
        """
        wanted = torch.zeros(self.n_documents, dtype=torch.bool)
        wanted[torch.tensor(sorted(set(documents)), dtype=torch.long)] = True
        if not bool(wanted.any()):
            raise CorpusError(f"no document of {name or self.name} is left")
        return self._rows(wanted[self.document], name)

    def sample(self, tokens: int, seed: int = 0) -> "Corpus":
        """Return rows drawn at random over all documents, in their order, until they hold so many counted tokens."""
        if self.n_tokens <= tokens:
            return self
        shuffled = list(range(self.n_rows))
        random.Random(f"sample {seed}").shuffle(shuffled)
        per_row = self._counted_per_row()
        enough = int((per_row[shuffled].cumsum(0) < tokens).sum()) + 1
        keep = torch.zeros(self.n_rows, dtype=torch.bool)
        keep[shuffled[:enough]] = True
        return self._rows(keep)

    def _counted_per_row(self) -> Int[Tensor, "rows"]:
        row_of = torch.repeat_interleave(torch.arange(self.n_rows), self.starts.diff())
        return torch.zeros(self.n_rows, dtype=torch.long).index_add_(0, row_of, self.counted.long())

    def _rows(self, rows: Bool[Tensor, "rows"], name: str | None = None) -> "Corpus":
        """Keep some rows, and the documents that still have any."""
        keep = rows.repeat_interleave(self.starts.diff())
        kept = torch.zeros(self.n_documents, dtype=torch.bool)
        kept[self.document[rows]] = True
        return replace(
            self,
            name=name or self.name,
            tokens=self.tokens[keep],
            counted=self.counted[keep],
            starts=torch.cat([torch.zeros(1, dtype=torch.long), self.starts.diff()[rows].cumsum(0)]),
            document=(kept.cumsum(0) - 1)[self.document[rows]],
            keys=tuple(key for key, yes in zip(self.keys, kept.tolist(), strict=True) if yes),
            answers=tuple(one for one, yes in zip(self.answers, kept.tolist(), strict=True) if yes)
            if self.answers
            else (),
        )

    def first(self, tokens: int) -> "Corpus":
        """Return whole documents from the beginning, until they hold at least so many counted tokens."""
        per_row = self._counted_per_row()
        per_document = torch.zeros(self.n_documents, dtype=torch.long).index_add_(0, self.document, per_row)
        enough = int((per_document.cumsum(0) < tokens).sum()) + 1
        return self if enough >= self.n_documents else self.only(range(enough))

    def __add__(self, other: "Corpus") -> "Corpus":
        """Join two corpora of one tokenizer into one.

        Raises:
            CorpusError: If they were tokenized differently.
        """
        if (self.vocabulary, self.prepend_bos) != (other.vocabulary, other.prepend_bos):
            raise CorpusError(f"{self.name} and {other.name} were tokenized differently: read both with one model")
        return replace(
            self,
            name=f"{self.name} + {other.name}",
            tokens=torch.cat([self.tokens, other.tokens]),
            counted=torch.cat([self.counted, other.counted]),
            starts=torch.cat([self.starts, other.starts[1:] + self.starts[-1]]),
            document=torch.cat([self.document, other.document + self.n_documents]),
            keys=self.keys + other.keys,
            answers=self._answers() + other._answers() if self.answers or other.answers else (),
            window=max(self.window, other.window),
            skipped={r: self.skipped.get(r, 0) + other.skipped.get(r, 0) for r in {**self.skipped, **other.skipped}},
        )

    def _answers(self) -> tuple[Answer | None, ...]:
        return self.answers or (None,) * self.n_documents

    def split(self, *shares: float, seed: int = 0) -> "list[Corpus]":
        """Split by document into parts of about the given shares of the counted tokens.

        Equal documents fall into the same part. The split depends on the documents and the seed alone.

        Raises:
            CorpusError: If there are fewer distinct documents than parts.
        """
        size = torch.zeros(self.n_documents, dtype=torch.long)
        lengths = torch.tensor([int(part.sum()) for part in torch.split(self.counted, self.starts.diff().tolist())])
        size.index_add_(0, self.document, lengths)
        distinct = sorted(set(self.keys))
        if len(distinct) < len(shares):
            raise CorpusError(
                f"{self.name} has {len(distinct)} distinct documents, too few to split into {len(shares)} parts: "
                "give a longer source, or separate test sources"
            )
        random.Random(f"split {seed}").shuffle(distinct)
        by_key = Counter[str]()
        for key, tokens in zip(self.keys, size.tolist(), strict=True):
            by_key[key] += tokens
        parts = _deal(distinct, by_key, shares)
        where = {key: part for part, keys in enumerate(parts) for key in keys}
        return [self.only(i for i, key in enumerate(self.keys) if where[key] == part) for part in range(len(shares))]

    def without(self, *others: "Corpus") -> "tuple[Corpus, int]":
        """Take out the documents that also stand in other corpora.

        Returns:
            The rest, and how many documents were taken out.

        Raises:
            CorpusError: If nothing is left.
        """
        known = {key for other in others for key in other.keys}
        rest = [i for i, key in enumerate(self.keys) if key not in known]
        if not rest:
            raise CorpusError(f"every document of {self.name} also stands in {' or '.join(o.name for o in others)}")
        return (self, 0) if len(rest) == self.n_documents else (self.only(rest), self.n_documents - len(rest))

    def __repr__(self) -> str:
        left = f", skipped {sum(self.skipped.values()):,}" if self.skipped else ""
        bos = "with BOS" if self.prepend_bos else "no BOS"
        return f"Corpus({self.name!r}, {self.n_tokens:,} tokens in {self.n_documents:,} documents, {bos}{left})"


def _deal(keys: list[str], size: Counter[str], shares: Sequence[float]) -> list[list[str]]:
    """Deal shuffled documents to parts, each to the part that is furthest below its share; no part stays empty."""
    whole, parts = sum(shares), [list[str]() for _ in shares]
    filled = [0.0] * len(shares)
    total = max(1, sum(size.values()))
    for index, key in enumerate(keys):
        lacking = [share / whole - have / total for share, have in zip(shares, filled, strict=True)]
        part = index if index < len(shares) else max(range(len(shares)), key=lacking.__getitem__)
        parts[part].append(key)
        filled[part] += size[key]
    return parts


def vocabulary_digest(tokenizer: Any) -> str:
    """Return a digest of what a tokenizer maps to what."""
    known = getattr(tokenizer, "_lens_unlearn_digest", None)
    if known is None:
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
        known = hashlib.sha256(vocabulary.encode()).hexdigest()[:16]
        tokenizer._lens_unlearn_digest = known
    return known
