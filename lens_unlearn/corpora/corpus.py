"""`Corpus`: tokenized documents in rows, with a mask of the counted positions; batches, prompts, splits, samples.

Knows token ids, documents and their answers; knows nothing of files, tokenization, or what is measured at the tokens.
"""

# Why prompts do not count: a question and its answer are one text to the model, but the skill is in the answer. If the tokens of
# the question counted, "Who wrote ...?" would make the neurons of questions look like neurons of the facts, and a model that
# abstains would still be credited for predicting the question. So they are context: run, but neither measured nor scored.
#
# Why splits go by a digest of the document's text, not by row or index: rows of one document share their topic and often their
# wording, and data sets repeat documents. A test row whose document, or its copy, was used to select neurons would make the result
# look better than it is. By key, equal documents are always on one side, and `without` finds those that two sources share.

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from scipy.cluster.hierarchy import DisjointSet
from torch import Tensor

from lens_unlearn.core.counter_rng import key_of, uniform
from lens_unlearn.core.errors import CorpusError
from lens_unlearn.core.numbers import NUMBERS, POSITIVE, Range
from lens_unlearn.corpora.near_duplicates import Words, join_near_duplicates, words
from lens_unlearn.model.chat import question_ends
from lens_unlearn.model.host import Model, require_model

__all__ = ["PADDING", "Answer", "Batch", "Corpus", "require_corpora", "require_corpus", "vocabulary_digest"]

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Some rows of a corpus, padded on the right with token 0 (whatever the tokenizer's padding token is)."""

    tokens: Int[Tensor, "batch pos"]
    counted: Bool[Tensor, "batch pos"]
    rows: Int[Tensor, "batch"]
    """The indices of these rows in their corpus."""
    lengths: Int[Tensor, "batch"]
    """Number of tokens of each row, without its padding."""
    heads: Int[Tensor, "batch"]
    """Number of tokens at the beginning of each row that are no text, such as BOS, and no prompt."""
    asked: Int[Tensor, "batch"] | None = None
    """Number of tokens of each row's prompt, where it does not end before the first counted token."""

    @classmethod
    def of(
        cls,
        rows: Sequence[Int[Tensor, "_"]],
        counted: Sequence[Bool[Tensor, "_"]],
        numbers: Sequence[int],
        *,
        heads: Int[Tensor, "batch"] | None = None,
        asked: Int[Tensor, "batch"] | None = None,
    ) -> "Batch":
        """Pad rows of tokens, each with the mask of its counted tokens, to one length."""
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        for i, (row, row_mask) in enumerate(zip(rows, counted, strict=True)):
            tokens[i, : len(row)], mask[i, : len(row)] = row, row_mask
        heads = torch.zeros_like(lengths) if heads is None else heads
        return cls(tokens, mask, torch.tensor(list(numbers)), lengths, heads, asked)

    @property
    def prompt_ends(self) -> Int[Tensor, "batch"]:
        """The position of the last token of each row's prompt: before the first counted token; the row's last if all count.

        In a chat, before the assistant's last turn.
        """
        first = torch.where(self.counted.any(1), self.counted.int().argmax(1), self.lengths)
        first = first if self.asked is None else self.asked
        return torch.where(first > self.heads, first, self.lengths) - 1

    def run(self, function: Callable[["Batch"], T]) -> list[T]:
        """Return the results of a function on the batch, or on its halves if the device runs out of memory.

        Halves are halved again, down to single rows. The function is called again after it has failed, so it must not have stored
        anything by then.
        """
        try:
            return [function(self)]
        except torch.OutOfMemoryError:
            if len(self.rows) == 1:
                raise
        if (
            torch.cuda.is_available()
        ):  # only now: inside `except`, the traceback still holds the tensors of the failed call
            torch.cuda.empty_cache()
        middle = len(self.rows) // 2
        halves = [self.only(slice(None, middle)), self.only(slice(middle, None))]
        return [result for half in halves for result in half.run(function)]

    def only(self, rows: slice | Bool[Tensor, "batch"]) -> "Batch":
        """Return some of the rows, as wide as all."""
        asked = None if self.asked is None else self.asked[rows]
        return Batch(
            self.tokens[rows], self.counted[rows], self.rows[rows], self.lengths[rows], self.heads[rows], asked
        )


@dataclass(frozen=True)
class Answer:
    """The true answer to a row's prompt."""

    text: str
    tests: tuple[str, ...] = ()
    """Unit tests, if the answer is a program: statements that fail if it is wrong."""
    setup: str = ""
    """Code that has to run before the tests."""
    marker: str = ""
    """The beginning of the line with which another prompt would begin (such as "Q:"), which ends a generated answer: the last line
    of the template before the prompt, if it has a letter or digit."""
    perturbed: tuple[str, ...] = ()
    """Wrong answers to the same prompt."""
    paraphrase: str = ""
    """A paraphrase of the answer."""
    paraphrased_prompt: str = ""
    """A paraphrase of the prompt."""
    head: str = field(default="", compare=False, repr=False)
    """The prompt in the template: all text before the answer."""
    tail: str = field(default="", compare=False, repr=False)
    """What stands between the answer and the token that ends it, such as the space of some chat templates."""
    prompt: str = field(default="", compare=False, repr=False)
    """The prompt as it was read, without the template."""
    accepted: tuple[str, ...] = ()
    """Further answers that are right as well."""
    translated_prompts: tuple[str, ...] = ()
    """The prompt in other languages."""

    @property
    def right(self) -> tuple[str, ...]:
        """All answers that are right."""
        return (self.text, *self.accepted)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenized documents, cut into rows no longer than a window, with a mask of the counted positions.

    Every token is counted unless it is special (BOS, padding, or one that the text itself writes), or in question-answer corpora
    part of the prompt. In a chat, all tokens of the assistant's turns count, those that end them too. Statistics are taken
    at counted tokens; the loss is that of predicting counted tokens, so the first token of a row without BOS, which
    nothing predicts, counts for statistics only.
    """

    name: str
    tokens: Int[Tensor, "total"]
    counted: Bool[Tensor, "total"]
    starts: Int[Tensor, "boundaries"]
    document: Int[Tensor, "rows"]
    """The document of each row, as an index into `keys`."""
    keys: tuple[str, ...]
    """A digest of each document's text."""
    window: int
    prepend_bos: bool
    vocabulary: str
    """A digest of the tokenizer's vocabulary."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Documents left out while reading, by reason."""
    answers: tuple[Answer | None, ...] = ()
    """For each document its answer, or None if it was not read as a prompt with an answer; empty if none was."""
    groups: tuple[str, ...] = ()
    """For each document a digest of its group, such as its author; empty where every document stands for itself."""
    answer_eos: int | None = None
    """The end-of-text token that was put behind every answer, and counts; None where answers end with their text."""
    special: tuple[int, ...] = ()
    """The special tokens in it, which are no text: they do not count, but for `answer_eos`."""
    budget: int | None = None
    """The number of counted tokens after which reading stopped; None if the source was read to its end."""
    asked: Int[Tensor, "rows"] | None = None
    """Of conversations, the number of tokens before the assistant's last turn in each row: those of the prompt, which in a chat may
    hold turns that count. None where prompts end before the first counted token."""
    system: str | None = None
    """The system's turn that was put before conversations that had none."""
    marks: tuple[int, ...] = ()
    """The tokens with which every prompt ends in the tokenizer's chat template: the question is what stands before them."""

    @property
    def units(self) -> tuple[str, ...]:
        """For each document the key of what splits keep whole and intervals resample: its group, or the document itself."""
        return self.groups or self.keys

    @property
    def n_tokens(self) -> int:
        """Number of counted tokens."""
        return int(self.counted.sum())

    @property
    def n_read(self) -> int:
        """Number of tokens that a pass reads: those that do not count, as of prompts, as well."""
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return len(self.keys)

    @property
    def n_rows(self) -> int:
        """Number of rows; a document longer than the window has several."""
        return len(self.document)

    def more(self, otherwise: str = "") -> str:
        """Say what to do where there is too little of it, or `otherwise` to give: a budget of tokens is no limit of the source."""
        if self.budget is None:
            return "give a longer source" + (f", or {otherwise}" if otherwise else "")
        return f"raise tokens, since reading stopped at {self.budget:,}" + (
            f", or give {otherwise}" if otherwise else ""
        )

    @property
    def fingerprint(self) -> str:
        """A digest of the tokens, the mask and the document boundaries: equal exactly for equal corpora."""
        digest = hashlib.sha256()
        for tensor in (self.tokens.int(), self.counted, self.starts.long(), self.document.long()):
            digest.update(tensor.contiguous().numpy().tobytes())
        digest.update(f"{self.prepend_bos} {self.vocabulary}".encode())
        if self.answer_eos is not None:
            digest.update(f"answers end with {self.answer_eos}".encode())
        tests = [(place, answer.tests, answer.setup) for place, answer in enumerate(self.answers) if answer]
        if any(statements for _, statements, _ in tests):
            digest.update(repr(tests).encode())
        comparisons = [
            (place, answer.perturbed, answer.paraphrase, answer.paraphrased_prompt)
            for place, answer in enumerate(self.answers)
            if answer and (answer.perturbed or answer.paraphrase or answer.paraphrased_prompt)
        ]
        if comparisons:
            digest.update(repr(comparisons).encode())
        accepted = [(place, answer.accepted) for place, answer in enumerate(self.answers) if answer and answer.accepted]
        if accepted:
            digest.update(f"accepted {accepted!r}".encode())
        translated = [
            (place, a.translated_prompts) for place, a in enumerate(self.answers) if a and a.translated_prompts
        ]
        if translated:
            digest.update(f"translated {translated!r}".encode())
        if self.groups:
            digest.update(repr(self.groups).encode())
        if self.asked is not None:
            digest.update(f"asked {self.asked.tolist()}".encode())
        return digest.hexdigest()[:16]

    def row(self, index: int) -> Int[Tensor, "pos"]:
        """Return the tokens of one row."""
        return self.tokens[self._span(index)].long()

    def _span(self, index: int) -> slice:
        """Return where a row stands among the tokens.

        Raises:
            CorpusError: If there is no such row; they are counted from 0, and none from the end.
        """
        [index] = _indices([index], self.n_rows, f"row of {self.name}")
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def prompt(self, index: int) -> Int[Tensor, "pos"]:
        """Return the tokens of one row before its first counted token: BOS, and the prompt where there is one.

        In a chat, those before the assistant's last turn, which the template writes in front of an answer.
        """
        row = self.row(index)
        return row[: int(self.counted[self._span(index)].int().argmax() if self.asked is None else self.asked[index])]

    def answer(self, index: int) -> Answer | None:
        """Return the true answer to the prompt of one row; None if it was not read as a prompt with an answer."""
        [index] = _indices([index], self.n_rows, f"row of {self.name}")
        return self.answers[int(self.document[index])] if self.answers else None

    def ends_with_eos(self, index: int) -> bool:
        """Say whether one row is a prompt and an answer that ends with the end-of-text token which was put behind it.

        The last row of a corpus may have been cut before it, where its budget of tokens was full.
        """
        counted = self.row(index)[self.counted[self._span(index)]]  # a chat template may go on behind it
        return self.answer(index) is not None and len(counted) > 0 and int(counted[-1]) == self.answer_eos

    @property
    def has_prompts(self) -> bool:
        """Whether every row begins with a prompt: uncounted tokens that are text."""
        return bool((self._prompt_lengths() > self._heads()).all())

    def _prompt_lengths(self) -> Int[Tensor, "rows"]:
        """Return the number of tokens of each row before its first counted one, or its last answer in a chat, BOS included."""
        return self._first(self.counted) if self.asked is None else self.asked

    def _heads(self) -> Int[Tensor, "rows"]:
        """Return the number of tokens at the beginning of each row that are no text: BOS, and other special ones."""
        return self._first(~self._is_special()).clamp_min(int(self.prepend_bos))

    def _is_special(self) -> Bool[Tensor, "total"]:
        return torch.isin(self.tokens, torch.tensor(self.special, dtype=self.tokens.dtype))

    def _first(self, wanted: Bool[Tensor, "total"]) -> Int[Tensor, "rows"]:
        """Return of each row the place of the first token of some, or its length if there is none."""
        lengths = self.starts.diff()
        row_of = torch.repeat_interleave(torch.arange(self.n_rows), lengths)
        place = torch.arange(len(self.tokens)) - self.starts[row_of]
        first = torch.where(wanted, place, lengths[row_of])
        return lengths.scatter_reduce(0, row_of, first, "amin", include_self=False)

    def with_prompts(self, tokens: int | None = None, *, seed: int = 0) -> "Corpus":
        """Turn the beginning of every row into its prompt, which is not counted; the rest of the row is to be predicted.

        Args:
            tokens: Length of each prompt in tokens, without BOS. Default: each row is cut at a random position, so that the
                prompt's last token does not reveal the kind of text.
            seed: The seed of the positions; a row's position depends only on its tokens and the seed.

        Raises:
            CorpusError: If no row is longer than its prompt.
        """
        tokens = None if tokens is None else int(_PROMPT.check(tokens, "tokens", CorpusError))
        seed = int(NUMBERS["seed"].check(seed, "seed", CorpusError))
        head, lengths = self._heads(), self.starts.diff()
        body = lengths - head
        if tokens is None:
            draws = uniform(torch.tensor([self._row_key(row, seed) for row in range(self.n_rows)])).double()
            # At least four tokens of prompt and four of text after it, if the row is long enough.
            room = (body - 1).clamp(1, 4)
            ends = head + (room + draws * (body - 2 * room + 1).clamp_min(1)).long().minimum((body - 1).clamp_min(1))
        else:
            ends = head + tokens
        row_of = torch.repeat_interleave(torch.arange(self.n_rows), lengths)
        place = torch.arange(len(self.tokens)) - self.starts[row_of]
        # The answers are dropped: they belong to the prompts that were read, not to these.
        bare: dict[str, Any] = {"answers": (), "answer_eos": None, "asked": None}
        counted = (place >= ends[row_of]) & ~self._is_special()
        cut = replace(self, name=f"{self.name}, cut into prompts", counted=counted, **bare)
        long_enough = (lengths > ends) & (cut._counted_per_row() > 0)
        if not bool(long_enough.any()):
            cut_short = self.budget is not None and self.budget <= (tokens or 1)
            raise CorpusError(
                f"no row of {self.name} is longer than a prompt of {tokens or 1} tokens: "
                f"{self.more() if cut_short else 'give longer texts'}"
            )
        return cut if bool(long_enough.all()) else cut._rows(long_enough)

    def queries(self) -> "Corpus":
        """Return the prompts alone, with the last token of each as its only counted one.

        In a chat, a prompt ends here with the last token of the user's last turn: before what every prompt has behind it.

        Raises:
            CorpusError: If there are no prompts: read "question>answer", or make some with `with_prompts`.
        """
        ends = self._prompt_lengths()
        prompted = ends > self._heads()
        if not bool(prompted.any()):
            raise CorpusError(
                f"{self.name} has no prompts: read it as 'question>answer', or cut its texts with .with_prompts()"
            )
        ends = self._question_lengths(ends)
        row_of = torch.repeat_interleave(torch.arange(self.n_rows), self.starts.diff())
        place = torch.arange(len(self.tokens)) - self.starts[row_of]
        inside = place < ends[row_of]
        shorter = replace(
            self,
            name=f"prompts of {self.name}",
            tokens=self.tokens[inside],
            counted=(place == ends[row_of] - 1)[inside],
            answers=(),
            answer_eos=None,
            asked=None,
            starts=torch.cat([torch.zeros(1, dtype=torch.long), ends.cumsum(0)]),
        )
        return shorter if bool(prompted.all()) else shorter._rows(prompted)

    def _question_lengths(self, ends: Int[Tensor, "rows"]) -> Int[Tensor, "rows"]:
        """Return the number of tokens of each row up to the end of its question, of those of its prompt."""
        last = torch.full_like(
            ends, len(self.marks)
        )  # in the last tokens of each prompt, one more than there are marks
        tails = self.starts[:-1, None] + ends[:, None] - len(self.marks) - 1 + torch.arange(len(self.marks) + 1)
        shorter = last - question_ends(self.marks, self.tokens[tails.clamp_min(0)].long(), last)
        return torch.where(ends > len(self.marks), ends - shorter, ends)

    def batches(self, batch_size: int = 8) -> Iterator[Batch]:
        """Yield batches of rows of similar length, in a fixed order.

        A batch ends where its tokens are as many as those of `batch_size` full rows, padding included, or where its padding would
        cost more than another pass of the model does.

        Args:
            batch_size: Number of rows per batch, if they fill the window; of shorter rows, as many as have no more tokens.
        """
        batch_size = int(NUMBERS["batch_size"].check(batch_size, "batch_size", CorpusError))
        return self._batches(batch_size)  # what is wrong is said here, not when the first batch is asked for

    def _batches(self, batch_size: int) -> Iterator[Batch]:
        lengths = self.starts.diff()
        order = torch.sort(lengths, descending=True, stable=True).indices.tolist()
        budget = batch_size * min(self.window, int(lengths.max())) if order else 0
        room = max(budget // PADDING, 32)
        rows, longest, padded = list[int](), 0, 0
        for row, length in zip(order, lengths[order].tolist(), strict=True):
            padded += longest - length
            if rows and (longest * (len(rows) + 1) > budget or padded > room):
                yield self._batch(rows)
                rows = []
            if not rows:
                longest, padded = length, 0
            rows.append(row)
        if rows:
            yield self._batch(rows)

    def take(self, rows: Sequence[int]) -> Batch:
        """Return some rows, by index, as one batch.

        Raises:
            CorpusError: If there are none, or there is no such row.
        """
        if not (rows := _indices(rows, self.n_rows, f"row of {self.name}")):
            raise CorpusError(f"no row of {self.name} was asked for: give at least one index")
        return self._batch(rows)

    def _batch(self, rows: Sequence[int]) -> Batch:
        spans = [slice(int(self.starts[row]), int(self.starts[row + 1])) for row in rows]
        tokens, counted = [self.tokens[span] for span in spans], [self.counted[span] for span in spans]
        special, least = set(self.special), int(self.prepend_bos)
        heads = [next((i for i, id in enumerate(row.tolist()) if id not in special), len(row)) for row in tokens]
        asked = None if self.asked is None else self.asked[torch.tensor(list(rows))]
        return Batch.of(tokens, counted, rows, heads=torch.tensor(heads).clamp_min(least), asked=asked)

    def places(self, batch: Batch, *, by_unit: bool = False) -> tuple[Int[Tensor, "tokens"], Int[Tensor, "tokens"]]:
        """Return for every position of a batch a key of its document, or unit, and a number that is unique in it."""
        names = self.units if by_unit else self.keys
        keys = torch.tensor([key_of(names[d]) for d in self.document[batch.rows].tolist()])
        row = torch.tensor([self._row_key(row) for row in batch.rows.tolist()])
        place = row[:, None] + torch.arange(batch.tokens.shape[1])
        return keys[:, None].expand_as(place).reshape(-1), place.reshape(-1)

    def _row_key(self, row: int, seed: int = 0) -> int:
        """Return a key of a row's tokens: unlike the row's index, it stays the same when other rows are left out."""
        return key_of(self.row(row).int().numpy().tobytes(), seed)

    def check(self, model: Model) -> None:
        """Refuse a model with another vocabulary or a shorter context.

        Raises:
            CorpusError: If the model cannot run this corpus; the message names the difference.
        """
        require_model(model)
        if int(self.tokens.max()) >= int(model.cfg.d_vocab):
            raise CorpusError(f"{self.name} has token ids beyond this model's vocabulary: read it with this model")
        tokenizer = getattr(model, "tokenizer", None)
        if self.vocabulary and tokenizer is not None and vocabulary_digest(tokenizer) != self.vocabulary:
            raise CorpusError(f"{self.name} was tokenized with another vocabulary: read it with this model")
        if int(self.starts.diff().max()) > int(model.cfg.n_ctx):
            raise CorpusError(f"{self.name} has rows longer than this model's context of {model.cfg.n_ctx} tokens")

    def only(self, documents: Iterable[int], name: str | None = None) -> "Corpus":
        """Return the corpus of some documents, given by index, in their order here.

        Raises:
            CorpusError: If there are none, or there is no such document.
        """
        documents = _indices(documents, self.n_documents, f"document of {self.name}")
        wanted = torch.zeros(self.n_documents, dtype=torch.bool)
        wanted[torch.tensor(sorted(set(documents)), dtype=torch.long)] = True
        if not bool(wanted.any()):
            raise CorpusError(f"no document of {name or self.name} is left")
        return self._rows(wanted[self.document], name)

    def sample(self, tokens: int, seed: int = 0, *, units: int = 1) -> "Corpus":
        """Return randomly drawn rows, in their order here: with so many counted tokens together, of so many `units`, or all.

        Where rows with enough tokens are of fewer units, one row of each further unit is added.

        Raises:
            CorpusError: If a number cannot be meant.
        """
        tokens, units = (int(_SOME.check(n, name, CorpusError)) for n, name in ((tokens, "tokens"), (units, "units")))
        seed = int(NUMBERS["seed"].check(seed, "seed", CorpusError))
        if self.n_tokens <= tokens:
            return self
        shuffled = list(range(self.n_rows))
        random.Random(f"sample {seed}").shuffle(shuffled)
        per_row = self._counted_per_row()
        enough = int((per_row[shuffled].cumsum(0) < tokens).sum()) + 1
        unit = [self.units[document] for document in self.document.tolist()]
        drawn, seen = shuffled[:enough], {unit[row] for row in shuffled[:enough]}
        for row in shuffled[enough:]:
            if len(seen) < units and unit[row] not in seen:
                seen.add(unit[row])
                drawn.append(row)
        keep = torch.zeros(self.n_rows, dtype=torch.bool)
        keep[drawn] = True
        return self._rows(keep)

    def shortened(self, tokens: int) -> "Corpus":
        """Return each row cut to its first tokens, BOS not counted among them; rows with prompts or answers as they are.

        Raises:
            CorpusError: If the number cannot be meant.
        """
        longest = int(_SOME.check(tokens, "tokens", CorpusError)) + int(self.prepend_bos)
        lengths = self.starts.diff()
        if self.has_prompts or self.answers or not bool((lengths > longest).any()):
            return self
        keep = torch.arange(len(self.tokens)) - self.starts[:-1].repeat_interleave(lengths) < longest
        starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.clamp(max=longest).cumsum(0)])
        return replace(self, tokens=self.tokens[keep], counted=self.counted[keep], starts=starts)

    def _counted_per_row(self) -> Int[Tensor, "rows"]:
        row_of = torch.repeat_interleave(torch.arange(self.n_rows), self.starts.diff())
        return torch.zeros(self.n_rows, dtype=torch.long).index_add_(0, row_of, self.counted.long())

    def _rows(self, rows: Bool[Tensor, "rows"], name: str | None = None) -> "Corpus":
        """Return some rows, with the documents that they belong to."""
        keep = rows.repeat_interleave(self.starts.diff())
        documents = torch.zeros(self.n_documents, dtype=torch.bool)
        documents[self.document[rows]] = True
        return replace(
            self,
            name=name or self.name,
            tokens=self.tokens[keep],
            counted=self.counted[keep],
            starts=torch.cat([torch.zeros(1, dtype=torch.long), self.starts.diff()[rows].cumsum(0)]),
            document=(documents.cumsum(0) - 1)[self.document[rows]],
            asked=None if self.asked is None else self.asked[rows],
            keys=tuple(key for key, yes in zip(self.keys, documents.tolist(), strict=True) if yes),
            answers=tuple(answer for answer, yes in zip(self.answers, documents.tolist(), strict=True) if yes)
            if self.answers
            else (),
            groups=tuple(group for group, yes in zip(self.groups, documents.tolist(), strict=True) if yes)
            if self.groups
            else (),
        )

    def first(self, tokens: int) -> "Corpus":
        """Return the first documents, uncut, with at least so many counted tokens together.

        Raises:
            CorpusError: If that is no number of tokens.
        """
        tokens = int(_SOME.check(tokens, "tokens", CorpusError))
        per_row = self._counted_per_row()
        per_document = torch.zeros(self.n_documents, dtype=torch.long).index_add_(0, self.document, per_row)
        enough = int((per_document.cumsum(0) < tokens).sum()) + 1
        return self if enough >= self.n_documents else self.only(range(enough))

    def __add__(self, other: "Corpus") -> "Corpus":
        """Concatenate two corpora that were read with the same tokenizer.

        Raises:
            CorpusError: If they were tokenized differently.
        """
        require_corpus(other, f"what is added to {self.name}")
        if (self.vocabulary, self.prepend_bos) != (other.vocabulary, other.prepend_bos):
            raise CorpusError(f"{self.name} and {other.name} were tokenized differently: read both with one model")
        ends = {corpus.answer_eos for corpus in (self, other) if corpus.answers}
        if len(ends) > 1:
            raise CorpusError(
                f"of {self.name} and {other.name} only one has answers that end with the end-of-text token: read both with the "
                "same answer_eos"
            )
        return replace(
            self,
            name=f"{self.name} + {other.name}",
            tokens=torch.cat([self.tokens, other.tokens]),
            counted=torch.cat([self.counted, other.counted]),
            starts=torch.cat([self.starts, other.starts[1:] + self.starts[-1]]),
            document=torch.cat([self.document, other.document + self.n_documents]),
            keys=self.keys + other.keys,
            answers=self._answers() + other._answers() if self.answers or other.answers else (),
            groups=self.units + other.units if self.groups or other.groups else (),
            answer_eos=next(iter(ends), None),
            asked=None
            if self.asked is None and other.asked is None
            else torch.cat([self._prompt_lengths(), other._prompt_lengths()]),
            special=tuple(sorted({*self.special, *other.special})),
            budget=max((corpus.budget for corpus in (self, other) if corpus.budget is not None), default=None),
            window=max(self.window, other.window),
            skipped={r: self.skipped.get(r, 0) + other.skipped.get(r, 0) for r in {**self.skipped, **other.skipped}},
        )

    def _answers(self) -> tuple[Answer | None, ...]:
        return self.answers or (None,) * self.n_documents

    def split(self, *shares: float, seed: int = 0, near_duplicates: bool | None = None) -> "list[Corpus]":
        """Split into parts with about the given shares of the counted tokens.

        Groups stay whole, and equal documents and near-duplicates are in the same part: the same question with another answer, or
        texts of which the runs of three words (of a question) or tokens (of a text) have a Jaccard similarity of at least 0.8.
        The split depends only on the documents and the seed.

        Args:
            shares: Of the parts; they need not sum to 1.
            seed: Of the draw.
            near_duplicates: Whether near-duplicates are kept together. Default: questions with answers are, plain texts are not.

        Raises:
            CorpusError: If there are fewer distinct documents, or groups, than parts; if there is no share, or one is not above 0.
        """
        if not shares:
            raise CorpusError("split() names no parts: give their shares, as split(0.6, 0.4)")
        for share in shares:
            _SHARE.check(share, f"split({', '.join(map(repr, shares))}): share", CorpusError)
        seed = int(NUMBERS["seed"].check(seed, "seed", CorpusError))
        size = torch.zeros(self.n_documents, dtype=torch.long)
        lengths = torch.tensor([int(part.sum()) for part in torch.split(self.counted, self.starts.diff().tolist())])
        size.index_add_(0, self.document, lengths)
        [tied] = _tied([self], near_duplicates)
        distinct = sorted(set(tied))
        if len(distinct) < len(shares):
            alike = " (near-identical questions are one)" if any(self.answers) and near_duplicates is not False else ""
            raise CorpusError(
                f"{self.name} has {len(distinct)} distinct {'groups' if self.groups else 'documents'}{alike}, too few to "
                f"split into {len(shares)} parts: {self.more('separate test sources')}"
            )
        random.Random(f"split {seed}").shuffle(distinct)
        by_unit = Counter[str]()
        for unit, tokens in zip(tied, size.tolist(), strict=True):
            by_unit[unit] += tokens
        parts = _deal(distinct, by_unit, shares)
        where = {unit: part for part, units in enumerate(parts) for unit in units}
        return [self.only(i for i, unit in enumerate(tied) if where[unit] == part) for part in range(len(shares))]

    def without(self, *others: "Corpus", near_duplicates: bool | None = None) -> "tuple[Corpus, int]":
        """Remove what other corpora contain too: documents, their near-duplicates, and the groups that stand in both.

        Args:
            others: Corpora such as the test texts.
            near_duplicates: Whether near-duplicates count as the same, as in `split`.

        Returns:
            The remaining corpus, and the number of documents removed.

        Raises:
            CorpusError: If no document remains.
        """
        for other in others:
            require_corpus(other, f"what is taken out of {self.name}")
        tied, *known = _tied([self, *others], near_duplicates)
        elsewhere = set().union(*known)
        rest = [i for i, unit in enumerate(tied) if unit not in elsewhere]
        if not rest:
            raise CorpusError(
                f"every {'group' if self.groups else 'document'} of {self.name} is also in "
                f"{' or '.join(o.name for o in others)}: give other texts"
            )
        return (self, 0) if len(rest) == self.n_documents else (self.only(rest), self.n_documents - len(rest))

    def __repr__(self) -> str:
        skipped = f", skipped {sum(self.skipped.values()):,}" if self.skipped else ""
        bos = "with BOS" if self.prepend_bos else "no BOS"
        groups = f" of {len(set(self.groups)):,} groups" if self.groups else ""
        return (
            f"Corpus({self.name!r}, {self.n_tokens:,} tokens in {self.n_documents:,} documents{groups}, {bos}{skipped})"
        )


PADDING = 64
"""Another pass costs about as much as 1/64 of a full batch, and never less than a few tokens."""
_PROMPT = Range(1, whole=True, what="makes no prompt")
_SHARE = replace(POSITIVE, what="is no part")
_SOME = Range(1, whole=True, what="is no number of anything")


def _indices(given: Iterable[int], count: int, what: str) -> list[int]:
    """Check indices, which are counted from 0."""
    if not isinstance(given, Iterable):
        raise CorpusError(f"{given!r} is no list of indices: give several, as [{given!r}]")
    indices = list(given)
    for index in indices:
        whole = isinstance(index, Integral) and not isinstance(index, bool)
        if not whole or not 0 <= index < count:
            raise CorpusError(f"there is no {what} with the index {index!r}: they are 0 to {count - 1}")
    return indices


def require_corpus(value: Any, role: str = "corpus") -> Corpus:
    """Return a corpus; refuse anything else that stands in its place, saying how to make one of it.

    Raises:
        CorpusError: If it is none.
    """
    if isinstance(value, Corpus):
        return value
    read = "lens_unlearn.read_corpus"
    match value:
        case str() | os.PathLike():
            raise CorpusError(
                f"{role} is {os.fspath(value)!r}, which has not been read: pass {read}({os.fspath(value)!r}, model)"
            )
        case None:
            raise CorpusError(f"{role} is None, and no corpus: pass {read}(source, model)")
        case Mapping():
            raise CorpusError(
                f"{role} is a {type(value).__name__}, and no corpus: pass one of those in it, or {read}(source, model)"
            )
        case _ if hasattr(value, "hook_dict"):
            raise CorpusError(
                f"{role} is a model, and no corpus: pass the model first, and {read}(source, model) behind it"
            )
        case _:
            raise CorpusError(f"{role} is a {type(value).__name__}, and no corpus: pass {read}(texts, model)")


def require_corpora(value: Any, role: str = "corpora") -> Mapping[str, Corpus]:
    """Return corpora by name; refuse anything else, saying how to make such of it.

    Raises:
        CorpusError: If it is no mapping, or holds what is no corpus.
    """
    if isinstance(value, Corpus):
        raise CorpusError(f"{role} are given by name: pass {{'a name': corpus}}, and not the corpus {value.name} alone")
    if not isinstance(value, Mapping):
        raise CorpusError(
            f"{role} are given by name: pass {{'a name': lens_unlearn.read_corpus(source, model)}}, not {_short(value)}"
        )
    for name, corpus in value.items():
        require_corpus(corpus, f"the corpus {name!r}")
    return value


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _tied(corpora: Sequence[Corpus], near_duplicates: bool | None) -> list[list[str]]:
    """Return for each document of some corpora the unit that it must stay in: the least key of what is tied to it."""
    together = DisjointSet()
    texts: dict[Words, None] = {}
    for corpus in corpora:
        spans = torch.split(corpus.tokens, corpus.starts.diff().tolist()) if near_duplicates else ()
        rows: list[list[int]] = [[] for _ in corpus.keys]
        for span, document in zip(spans, corpus.document.tolist()):
            rows[document] += span.tolist()
        for unit, key, answer, row in zip(corpus.units, corpus.keys, corpus._answers(), rows, strict=True):
            together.add(unit)
            together.add(key)
            together.merge(unit, key)
            text = words(answer.prompt) if answer and answer.prompt and near_duplicates is not False else tuple(row)
            if text:
                together.add(text)
                together.merge(unit, text)
                texts[text] = None
    join_near_duplicates(texts, together)
    least: dict[Any, str] = {}
    for unit in (unit for corpus in corpora for unit in corpus.units):
        least[together[unit]] = min(unit, least.get(together[unit], unit))
    return [[least[together[unit]] for unit in corpus.units] for corpus in corpora]


def _deal(keys: list[str], size: Counter[str], shares: Sequence[float]) -> list[list[str]]:
    """Assign shuffled units one by one to the part that is furthest below its share; no part stays empty."""
    sum_of_shares, parts = sum(shares), [list[str]() for _ in shares]
    filled = [0.0] * len(shares)
    total = max(1, sum(size.values()))
    for index, key in enumerate(keys):
        lacking = [share / sum_of_shares - have / total for share, have in zip(shares, filled, strict=True)]
        part = index if index < len(shares) else max(range(len(shares)), key=lacking.__getitem__)
        parts[part].append(key)
        filled[part] += size[key]
    return parts


def vocabulary_digest(tokenizer: Any) -> str:
    """Return a digest of a tokenizer's vocabulary: its tokens and their ids."""
    known = getattr(tokenizer, "_lens_unlearn_digest", None)
    if known is None:
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
        known = hashlib.sha256(vocabulary.encode()).hexdigest()[:16]
        tokenizer._lens_unlearn_digest = known
    return known
