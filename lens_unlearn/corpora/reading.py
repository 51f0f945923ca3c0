"""`read_corpus`: a text source becomes a `Corpus` of rows, with the mask of the counted positions.

A source is a file (``texts.jsonl``, ``data.parquet:body``, ``book.txt``), ``hf:name/config:split:field``, ``demo:NAME``
(or ``demo:NAME:SPLIT:FIELD``; the default split is "dev", which the model was not trained on and which is not the test), a
`datasets` object, or any iterable of strings or rows. Question-answer sources name both fields, ``file.jsonl:question>answer``;
then only the answer's tokens are counted, and the question is the prompt. Documents that belong together, such as those on one
author, are named by a field, ``file.jsonl:question>answer@author``, or as runs of so many rows, ``file.jsonl:question>answer@20``:
splits keep such groups whole, and intervals resample them. Of rows that have the fields of MBPP, "test_list" and "test_setup_code"
become the answer's unit tests; of those that have the fields of TOFU, "perturbed_answer", "paraphrased_answer" and
"paraphrased_question" become what the answer is compared with.

Knows tokenizers, templates and windows; knows nothing of file formats (that is `sources`) or of what is measured at the tokens.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.corpora.corpus import Answer, Corpus, vocabulary_digest
from lens_unlearn.corpora.sources import Pair, Row, Source, open_source
from lens_unlearn.model.host import Model
from lens_unlearn.model.special_tokens import bos_token, end_token, special_tokens, tokenizer_of

__all__ = ["read_corpus", "tokenize"]

DEFAULT_WINDOW = 512
_CHUNK = 256  # documents tokenized at a time


def read_corpus(
    source: Source,
    model: Model,
    *,
    tokens: int | None = None,
    field: str | None = None,
    group: str | int | None = None,
    template: str | None = None,
    window: int | None = None,
    prepend_bos: bool | None = None,
    count: Literal["all", "answer"] | None = None,
    answer_eos: bool = False,
    name: str | None = None,
) -> Corpus:
    """Read texts and tokenize them with a model's tokenizer.

    Args:
        source: A file, ``hf:NAME/CONFIG:SPLIT:FIELD``, ``demo:NAME``, a `datasets` object, or an iterable of strings or rows.
            ``FIELD@GROUP`` names the field of the groups as well (see `group`). Paths and fields that hold ":" or "@" themselves
            are read as they are; where a field with "@" in its name could also be two fields, that is refused.
        model: The model whose tokenizer and context length to use.
        tokens: Stop after exactly this many counted tokens; None reads everything.
        field: The field that holds the text (default "text"), or "question>answer"; it can also be part of the source.
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
        name: The name in reports; default the source.

    Raises:
        CorpusError: If the source, the file or the field does not exist, or holds no text of at least two tokens; if a row names no
            group where the others do; if the template, the window or the tokenizer cannot be used.
    """
    tokenizer = tokenizer_of(model)
    bos = bos_token(model, prepend_bos)
    shortest = 2 + (bos is not None)
    longest = min(DEFAULT_WINDOW, int(model.cfg.n_ctx)) if window is None else int(window)
    if not shortest <= longest <= int(model.cfg.n_ctx):
        raise CorpusError(f"window={longest} does not fit this model: from {shortest} to {model.cfg.n_ctx} tokens")
    if tokens is not None and tokens < 2:
        raise CorpusError(f"tokens={tokens} is too small a budget: at least 2")
    end = end_token(model)
    if answer_eos and end is None:
        raise CorpusError(
            "answer_eos=True, but this tokenizer has no end-of-text token: set one, or leave answer_eos out"
        )
    opened = open_source(source, field, group)
    eos = end if answer_eos and opened.is_pairs else None
    builder = _Builder(longest, bos, tokens)
    counted = count or ("answer" if opened.is_pairs else "all")
    encoder = _Encoder(tokenizer, template or opened.template, counted, bos, eos)
    for document in encoder.encode(opened.rows, builder.skipped):
        if not builder.add(*document):
            break
    corpus = builder.build(name or opened.name, vocabulary_digest(tokenizer), special_tokens(tokenizer), eos)
    if int(corpus.tokens.max()) >= int(model.cfg.d_vocab):
        unknown = tokenizer.convert_ids_to_tokens(int(corpus.tokens.max()))
        raise CorpusError(
            f"{corpus.name} holds {unknown!r}, which the tokenizer knows and the model does not: take it out of the texts"
        )
    return corpus


_Document = tuple[list[int], list[bool], str, Answer | None, str | None, bool]
"""Token ids, the mask of those that are counted, a digest of the text, the answer, a digest of the group, and whether it has a
prompt."""
_Text = tuple[str, int, Answer | None]
"""A text, the character at which its counted part begins, and the answer."""


class _Encoder:
    """Tokenizes documents in chunks, with the mask of the counted tokens of each."""

    def __init__(self, tokenizer: Any, template: str, count: str, bos: int | None, eos: int | None) -> None:
        if count not in ("all", "answer"):
            raise CorpusError(f"count={count!r} is not known: count 'all' tokens or the 'answer'")
        if "{prompt}" not in template or not template.rstrip().endswith("{answer}"):
            raise CorpusError(f"the template {template!r} must hold {{prompt}} and end with {{answer}}")
        self.tokenizer, self.template, self.count, self.bos, self.eos = tokenizer, template, count, bos, eos
        before = re.split(r"\{(?:prompt|tests)\}", template)[0].strip().splitlines()
        marker = before[-1].strip() if before else ""
        self.marker = marker if re.search(r"\w", marker) else ""  # "#" alone can also begin a line of an answer
        self.first_in: dict[int, str] = {}  # the digest of the first text of each run of rows, by the run's number

    def encode(self, rows: Iterable[Row], skipped: Counter[str]) -> Iterator[_Document]:
        chunk: list[tuple[_Text, str | int | None]] = []
        for text, group in rows:
            if text is None:
                skipped["empty or not text"] += 1
                continue
            chunk.append((self._join(text), group))
            if len(chunk) == _CHUNK:
                yield from self._tokenize(chunk)
                chunk = []
        if chunk:
            yield from self._tokenize(chunk)

    def _join(self, text: str | Pair) -> _Text:
        """Put a prompt and its answer into the template."""
        if isinstance(text, str):
            return text, 0, None
        fields = {"{prompt}": text.prompt, "{tests}": "\n".join(text.tests)}
        head = self.template[: self.template.rindex("{answer}")]
        head = re.sub(r"\{(?:prompt|tests)\}", lambda match: fields[match[0]], head)
        if self.count == "all":
            return head + text.answer, 0, None
        comparisons = (text.perturbed, text.paraphrase, text.paraphrased_prompt)
        answer = Answer(text.answer, text.tests, text.setup, self.marker, *comparisons, head, text.prompt)
        return head + text.answer, len(head), answer

    def _tokenize(self, chunk: list[tuple[_Text, str | int | None]]) -> Iterator[_Document]:
        texts, begins = [text for (text, *_), _ in chunk], [begin for (_, begin, _), _ in chunk]
        tokenized = tokenize(self.tokenizer, texts, begins, self.bos, self.eos)
        for ((text, begin, answer), group), (ids, counted) in zip(chunk, tokenized, strict=True):
            key = _digest(text.strip())
            yield ids, counted, key, answer, None if group is None else self._group(group, key), begin > 0

    def _group(self, group: str | int, key: str) -> str:
        """Return a digest of a group: of its name, or of the text with which a run begins.

        Not of the run's number, which means nothing in another file: by its text, an author is the same group there.
        """
        return _digest(f"group {group}" if isinstance(group, str) else f"run of {self.first_in.setdefault(group, key)}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tokenize(
    tokenizer: Any, texts: list[str], begins: list[int], bos: int | None = None, eos: int | None = None
) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield each text's token ids, and the mask of the counted ones: those that end after the character `begin`.

    Special tokens that a text writes do not count. The `bos` that will be put before it is left out, where it writes that
    itself; `eos` ends each text, and is counted.
    """
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
        counted = [yes and id not in special for id, yes in zip(ids, counted, strict=True)]
        if bos is not None and ids[:1] == [bos]:
            ids, counted = ids[1:], counted[1:]
        if eos is not None:
            written = ids[-1:] == [eos]
            ids, counted = (ids, [*counted[:-1], True]) if written else ([*ids, eos], [*counted, True])
        yield ids, counted


class _Builder:
    """Cuts documents into rows, until the token budget is used up."""

    def __init__(self, window: int, bos: int | None, budget: int | None) -> None:
        self.window, self.bos, self.budget = window, bos, math.inf if budget is None else budget
        self.tokens: list[Tensor] = []
        self.counted: list[Tensor] = []
        self.lengths: list[int] = []
        self.document: list[int] = []
        self.keys: list[str] = []
        self.answers: list[Answer | None] = []
        self.groups: list[str] = []
        self.skipped: Counter[str] = Counter()
        self.total = 0

    def add(
        self,
        ids: list[int],
        counted: list[bool],
        key: str,
        answer: Answer | None = None,
        group: str | None = None,
        prompted: bool = False,
    ) -> bool:
        """Add a document; return whether the budget has room for more."""
        if len(ids) + (self.bos is not None) < 2 or not any(counted):
            self.skipped["shorter than two tokens"] += 1
            return True
        body = self.window - (self.bos is not None)
        if prompted:  # a prompt and its answer are never cut apart: without the prompt, the answer is another task
            if len(ids) > body:
                self.skipped["prompt and answer longer than the window"] += 1
                return True
            self._row(ids, counted)
        else:
            for start in range(0, len(ids), body):
                if self.total < self.budget and any(counted[start : start + body]):
                    self._row(ids[start : start + body], counted[start : start + body])
        self.keys.append(key)
        self.answers.append(None if all(counted) else answer)  # without a prompt, nothing is answered
        self.groups += [] if group is None else [group]
        return self.total < self.budget

    def _row(self, ids: list[int], counted: list[bool]) -> None:
        remaining = self.budget - self.total
        if sum(counted) > remaining:  # end with the token that uses up the budget
            end = [i for i, yes in enumerate(counted) if yes][int(remaining) - 1] + 1
            ids, counted = ids[:end], counted[:end]
        self.total += sum(counted)
        head = [] if self.bos is None else [self.bos]
        self.tokens.append(torch.tensor(head + ids, dtype=torch.int32))
        self.counted.append(torch.tensor([False] * len(head) + counted))
        self.lengths.append(len(head) + len(ids))
        self.document.append(len(self.keys))

    def build(self, name: str, vocabulary: str, special: Iterable[int], eos: int | None) -> Corpus:
        if not self.keys:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.skipped.items()) or "no documents"
            raise CorpusError(f"{name} holds no text that can be used: {reasons}")
        lengths = torch.tensor(self.lengths)
        return Corpus(
            name=name,
            tokens=torch.cat(self.tokens),
            counted=torch.cat(self.counted),
            starts=torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
            document=torch.tensor(self.document),
            keys=tuple(self.keys),
            window=self.window,
            prepend_bos=self.bos is not None,
            vocabulary=vocabulary,
            skipped=dict(self.skipped),
            answers=tuple(self.answers) if any(self.answers) else (),
            groups=tuple(self.groups),
            answer_eos=eos,
            special=tuple(sorted(special)),
        )
