"""`read_corpus`: a text source becomes a `Corpus` of rows, with the mask of the counted positions.

A source is a file (``texts.jsonl``, ``data.parquet:body``, ``book.txt``, ``rows.csv.gz``), a folder of such, a pattern
(``texts/*.jsonl``), or a list of these; ``hf:name/config:split:field``; ``demo:NAME`` (or ``demo:NAME:SPLIT:FIELD``; the default
split is "dev", which the model was not trained on and which is not the test); a `datasets`, pandas or Arrow table, a dict of
lists, or any iterable of strings or rows. Question-answer sources name both fields, ``file.jsonl:question>answer``;
then only the answer's tokens are counted, and the question is the prompt. Documents that belong together, such as those on one
author, are named by a field, ``file.jsonl:question>answer@author``, or as runs of so many rows, ``file.jsonl:question>answer@20``:
splits keep such groups whole, and intervals resample them. Of rows that have the fields of MBPP, "test_list" and "test_setup_code"
become the answer's unit tests; of those that have the fields of TOFU, "perturbed_answer", "paraphrased_answer" and
"paraphrased_question" become what the answer is compared with; "translated_question" is the question in other languages. An
answer that is a list (as in SQuAD) is its first one, and the others are accepted as well. With ``chat=True``, rows are
conversations, in the tokenizer's chat template. Numbers, booleans and dates are text. Rows of "input_ids" were tokenized
before: of these, the tokens are taken that "attention_mask" does not leave out.

Knows tokenizers, templates and windows; knows nothing of file formats (that is `sources`) or of what is measured at the tokens.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.core.numbers import NUMBERS
from lens_unlearn.corpora.corpus import Answer, Corpus, vocabulary_digest
from lens_unlearn.corpora.sources import Source, open_source
from lens_unlearn.corpora.tokenizing import Document, Encoder, tokenize
from lens_unlearn.model.chat import Chat, marks_of, require_chat
from lens_unlearn.model.host import Model
from lens_unlearn.model.special_tokens import bos_token, end_token, special_tokens, tokenizer_of

__all__ = ["read_corpus", "tokenize"]

DEFAULT_WINDOW = 512


def read_corpus(
    source: Source,
    model: Model,
    *,
    tokens: int | None = None,
    shuffle: int | None = None,
    seed: int = 0,
    field: str | None = None,
    group: str | int | None = None,
    template: str | None = None,
    window: int | None = None,
    prepend_bos: bool | None = None,
    count: Literal["all", "answer"] | None = None,
    answer_eos: bool = False,
    chat: bool = False,
    system: str | None = None,
    name: str | None = None,
) -> Corpus:
    """Read texts and tokenize them with a model's tokenizer.

    Args:
        source: A file, a folder, a pattern, ``hf:NAME/CONFIG:SPLIT:FIELD``, ``demo:NAME``, or a list of these; a `datasets`, pandas
            or Arrow table, a dict of lists, or an iterable of strings or rows.
            ``FIELD@GROUP`` names the field of the groups as well (see `group`). Paths and fields that hold ":" or "@" themselves
            are read as they are; where a field with "@" in its name could also be two fields, that is refused.
        model: The model whose tokenizer and context length to use.
        tokens: Stop after exactly this many counted tokens; None reads everything. That is the beginning of the source: for
            one that is sorted, see `shuffle`.
        shuffle: Draw the documents that `tokens` has room for from a buffer of so many: the first ones fill it, then one is
            drawn, and the next one takes its place. They stand in the corpus in the order of the source, and one that `tokens`
            does not cut is the same as without. Default: the documents are taken as they come.
        seed: Of that draw.
        field: The field that holds the text (default "text", else "input_ids"), or "question>answer"; it can also be part of the
            source.
        group: The field that names each document's group, such as its author: splits keep a group whole, and intervals resample
            groups. Equal values are one group, also in two sources. Or a number: so many rows one after another are a group,
            counted in the order of the source with the rows that are skipped (TOFU has 20 questions an author). By default every
            document stands for itself.
        template: How prompt and answer are joined; default "{prompt} {answer}", and for the demo's own questions as the demo
            model was trained. ``{tests}`` stands for the unit tests, if rows have any: without
            them, MBPP does not say how the function is to be called.
        window: Longest row in tokens, BOS included; longer documents become several rows. Default: the model's
            context, at most 512.
        prepend_bos: Whether every row begins with BOS, once, also where the text writes it itself. Default: where the tokenizer
            itself adds BOS, or has one that is its end-of-text token as well (GPT-2, Pythia); the corpus says which it was.
        count: Which tokens are counted: "all", or only the "answer". Default: the answer, if there is one. Special tokens that
            a text writes, such as an end of text inside it or the marks of a chat, are never counted.
        answer_eos: Whether the end-of-text token stands behind every answer of a "question>answer" source, and is counted, as
            TOFU and OpenUnlearning have it; where an answer ends with it already, none is added, and that one is counted.
        chat: Whether the source holds conversations, which are read in the tokenizer's chat template, token for token as its
            `apply_chat_template` writes them: rows with "messages", lists of turns with "role" and "content" (or "conversations"
            with "from" and "value"), or a "prompt>response" source, each row of which is a turn of the user and one of the
            assistant. The assistant's turns count, each with the token that ends it; the prompt is what stands before the last of
            them. BOS is where the template writes it. A conversation longer than the window is left out.
        system: The system's turn of every conversation that does not begin with one of its own.
        name: The name in reports; default the source.

    Raises:
        CorpusError: If the source, the file or the field does not exist, or holds no text of at least two tokens; if a row names no
            group where the others do; if the template, the window or the tokenizer cannot be used; if a conversation is none, or
            the chat template refuses it.
    """
    tokenizer = tokenizer_of(model)
    tokens, window = (_whole(n, name) for n, name in ((tokens, "tokens"), (window, "window")))
    shuffle, seed = _whole(shuffle, "shuffle"), int(NUMBERS["seed"].check(seed, "seed", CorpusError))
    for text, what in ((field, "field"), (template, "template"), (system, "system"), (name, "name")):
        if not isinstance(text, str | None):
            raise CorpusError(f"{what}={text!r} is a {type(text).__name__}: give a string")
    talk = _chat(model, template, answer_eos, prepend_bos) if chat else None
    if system is not None and talk is None:
        raise CorpusError("system is the system's turn of conversations: give chat=True as well, or leave it out")
    bos = bos_token(model, prepend_bos)
    if talk is not None and not talk.begins_with(bos):
        bos = None
    shortest = 2 + (bos is not None)
    longest = min(DEFAULT_WINDOW, int(model.cfg.n_ctx)) if window is None else window
    if not shortest <= longest <= int(model.cfg.n_ctx):
        raise CorpusError(f"window={longest} does not fit this model: from {shortest} to {model.cfg.n_ctx} tokens")
    end = end_token(model)
    if answer_eos and end is None:
        raise CorpusError(
            "answer_eos=True, but this tokenizer has no end-of-text token: set one, or leave answer_eos out"
        )
    opened = open_source(source, field, group, chat=chat)
    eos = end if answer_eos and opened.is_pairs else talk.turn_end if talk is not None else None
    builder = _Builder(longest, bos, tokens)
    counted = count or ("answer" if opened.is_pairs or chat else "all")
    joined = template or opened.template
    encoder = Encoder(
        tokenizer,
        joined,
        counted,
        bos,
        None if chat else eos,
        int(model.cfg.d_vocab),
        longest,
        tokens,
        talk,
        system,
        opened.name,
    )
    for document in encoder.encode(opened.rows, builder.skipped, shuffle, seed):
        if not builder.add(document):
            break
    corpus = builder.build(name or opened.name, vocabulary_digest(tokenizer), special_tokens(tokenizer), eos)
    corpus = replace(corpus, system=system, marks=marks_of(tokenizer))
    if int(corpus.tokens.max()) >= int(model.cfg.d_vocab):
        unknown = tokenizer.convert_ids_to_tokens(int(corpus.tokens.max()))
        raise CorpusError(
            f"{corpus.name} holds {unknown!r}, which the tokenizer knows and the model does not: take it out of the texts"
        )
    if isinstance(opened.group, str) and not shuffle:
        _warn_if_sorted(corpus, opened.group)
    return corpus


def _chat(model: Model, template: str | None, answer_eos: bool, prepend_bos: bool | None) -> Chat:
    """Return the tokenizer's chat template, which decides what these options decide elsewhere."""
    for given, what in (
        (template is not None, "template"),
        (answer_eos, "answer_eos"),
        (prepend_bos is not None, "prepend_bos"),
    ):
        if given:
            raise CorpusError(
                f"{what} cannot be given with chat=True: the tokenizer's chat template says it; leave it out"
            )
    return require_chat(model)


def _whole(value: int | None, name: str) -> int | None:
    """Check a number of tokens or documents; None stands for the default."""
    return None if value is None else int(NUMBERS[name].check(value, name, CorpusError))


def _warn_if_sorted(corpus: Corpus, group: str) -> None:
    """Say that the budget took the first groups alone, where it cut a source in which each stands in one piece."""
    named = [name for name, _ in groupby(corpus.groups)]
    if corpus.budget is not None and len(set(named)) == len(named) < corpus.n_documents:
        warnings.warn(
            f"{corpus.name} seems to be sorted by {group!r}, and tokens={corpus.budget:,} took the first {len(named):,} groups "
            "alone: give shuffle=10_000, say, to draw from so many documents, or raise tokens",
            stacklevel=3,
        )


@dataclass
class _Read:
    """A document as rows of tokens, each with the mask of the counted ones."""

    place: int
    key: str
    answer: Answer | None
    group: str | None
    turns: tuple[int, ...] = ()
    rows: list[tuple[Tensor, Tensor]] = dataclass_field(default_factory=list)


class _Builder:
    """Cuts documents into rows, until the token budget is used up."""

    def __init__(self, window: int, bos: int | None, budget: int | None) -> None:
        self.window, self.bos, self.budget = window, bos, math.inf if budget is None else budget
        self.documents: list[_Read] = []
        self.skipped: Counter[str] = Counter()
        self.total = 0

    def add(self, document: Document) -> bool:
        """Add a document; return whether the budget has room for more."""
        ids, counted = document.ids, document.counted
        if len(ids) + (self.bos is not None) < 2 or not any(counted):
            self.skipped["shorter than two tokens"] += 1
            return True
        body = self.window - (self.bos is not None)
        # Without a prompt, nothing is answered.
        read = _Read(
            document.place, document.key, None if all(counted) else document.answer, document.group, document.turns
        )
        if (
            document.prompted
        ):  # a prompt and its answer are never cut apart: without the prompt, the answer is another task
            if len(ids) > body:
                self.skipped[f"{'conversation' if read.turns else 'prompt and answer'} longer than the window"] += 1
                return True
            self._row(read, ids, counted)
            if read.turns and len(read.rows[0][0]) <= read.turns[-1] + (self.bos is not None):
                read.answer = None  # the budget ended in a turn before it
        else:
            for start in range(0, len(ids), body):
                if self.total < self.budget and any(counted[start : start + body]):
                    self._row(read, ids[start : start + body], counted[start : start + body])
        self.documents.append(read)
        return self.total < self.budget

    def _row(self, document: _Read, ids: list[int], counted: list[bool]) -> None:
        remaining = self.budget - self.total
        if sum(counted) > remaining:  # end with the token that uses up the budget
            end = [i for i, yes in enumerate(counted) if yes][int(remaining) - 1] + 1
            ids, counted = ids[:end], counted[:end]
        self.total += sum(counted)
        head = [] if self.bos is None else [self.bos]
        tokens = torch.tensor(head + ids, dtype=torch.int32)
        document.rows.append((tokens, torch.tensor([False] * len(head) + counted)))

    def build(self, name: str, vocabulary: str, special: Iterable[int], eos: int | None) -> Corpus:
        if not self.documents:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.skipped.items()) or "no documents"
            raise CorpusError(f"{name} holds no text that can be used: {reasons}")
        # Also those that were drawn at random stand in the order of the source.
        documents = sorted(self.documents, key=lambda document: document.place)
        rows = [(number, *row) for number, document in enumerate(documents) for row in document.rows]
        lengths = torch.tensor([len(ids) for _, ids, _ in rows])
        answers = tuple(document.answer for document in documents)
        return Corpus(
            name=name,
            tokens=torch.cat([ids for _, ids, _ in rows]),
            counted=torch.cat([counted for _, _, counted in rows]),
            starts=torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
            document=torch.tensor([number for number, _, _ in rows]),
            keys=tuple(document.key for document in documents),
            window=self.window,
            prepend_bos=self.bos is not None,
            vocabulary=vocabulary,
            skipped=dict(self.skipped),
            answers=answers if any(answers) else (),
            groups=tuple(document.group for document in documents if document.group is not None),
            answer_eos=eos,
            special=tuple(sorted(special)),
            asked=self._asked(documents, lengths),
            budget=int(self.budget) if self.total >= self.budget else None,
        )

    def _asked(self, documents: list[_Read], lengths: Tensor) -> Tensor | None:
        """Return the number of tokens before the last of the assistant's turns that is in each row; None if there are no chats."""
        if not any(document.turns for document in documents):
            return None
        head = self.bos is not None
        before = [[begin + head for begin in document.turns] for document in documents for _ in document.rows]
        # The last row may end within a turn before the last one, where it uses up the budget.
        return torch.tensor(
            [
                max(begin for begin in begins if begin < end)
                for begins, end in zip(before, lengths.tolist(), strict=True)
            ]
        )
