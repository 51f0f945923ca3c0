"""`Asker`: one model under one intervention, as a benchmark asks it: texts that it continues, and losses of texts and answers.

Prompts are tokenized as everywhere in the package, run without padding on the left, begin with BOS once, and are continued
as the benchmark says, whatever generation configuration the model ships. Knows models and tokens; knows no benchmark.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.core.progress import Bar
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.evaluation.evaluate import ROWS
from lens_unlearn.evaluation.generation import chat_prompt, continue_rows, require_unbroken
from lens_unlearn.evaluation.question_answering import MOST, line_breaks
from lens_unlearn.evaluation.teacher_forcing import Forced, force
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.model.host import Model
from lens_unlearn.model.special_tokens import bos_token, encode, end_token, tokenizer_of

__all__ = ["Asker", "Texts", "mean_loss"]


@dataclass(frozen=True)
class Texts:
    """What was written to some prompts."""

    texts: tuple[str | None, ...]
    """None where logits were no numbers, and where the prompt was left out."""
    left_out: tuple[int, ...]
    """The numbers of prompts that are longer than the context."""


@dataclass(frozen=True)
class Asker:
    """One model under one intervention.

    Attributes:
        model: With a tokenizer, in evaluation mode.
        intervention: What acts while it is asked.
        batch_size: Rows of full length per forward pass; None for as many as this machine runs fastest with.
        prepend_bos: Whether texts begin with BOS; None for as the tokenizer has it.
        progress: Whether to show bars.
        name: Of the condition, for the bars.
        seed: Of texts that are sampled.
    """

    model: Model
    intervention: Intervention | None = None
    batch_size: int | None = None
    prepend_bos: bool | None = None
    progress: bool = False
    name: str = ""
    seed: int = 0

    @property
    def has_end(self) -> bool:
        """Whether there is an end-of-text token."""
        return end_token(self.model) is not None

    @property
    def has_chat(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.model.tokenizer, "chat_template", None))

    @property
    def line_breaks(self) -> list[int]:
        """The tokens whose text holds a line break."""
        return line_breaks(self.model)

    def chat(self, prompt: str) -> str:
        """Return what the model is given of a turn of the user, in its chat template, up to where the assistant's begins."""
        return chat_prompt(self.model, prompt)

    def write(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        *,
        stop: Sequence[int] = (),
        written: bool = False,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> Texts:
        """Continue prompts, greedily unless a temperature is given.

        Args:
            prompts: The texts.
            max_new_tokens: The longest continuation.
            stop: Tokens that end a text besides those that end every text.
            written: Whether prompts are written in a chat template, which has BOS where it belongs.
            temperature: 0 takes the most probable token at each step; above it, tokens are drawn.
            top_p: Draw from the fewest most probable tokens that have this share of the probability together.
        """
        tokenizer = tokenizer_of(self.model, "a benchmark cannot be asked")
        bos = None if written else bos_token(self.model, self.prepend_bos)
        rows = [encode(tokenizer, prompt, bos) for prompt in prompts]
        context = int(self.model.cfg.n_ctx)
        left_out = tuple(number for number, row in enumerate(rows) if len(row) >= context)
        kept = [number for number in range(len(rows)) if number not in set(left_out)]
        texts: list[str | None] = [None] * len(rows)
        # As many texts at a time as hold no more tokens than that many of full length.
        room = min(context, max((len(rows[number]) for number in kept), default=1) + max_new_tokens)
        together = min(MOST, max(1, (self.batch_size or ROWS) * context // room))
        size = 4 * together
        kept.sort(key=lambda number: len(rows[number]))
        with Bar(total=len(kept), unit=" answers", disable=not self.progress, desc=self.name) as bar:
            for start in range(0, len(kept), size):
                part = kept[start : start + size]
                ids = [rows[number] for number in part]
                options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": together}
                options |= {"temperature": temperature, "top_p": top_p, "seed": self.seed}
                done = continue_rows(self.model, ids, self.intervention, stop=stop, **options)
                if self.intervention is None:
                    require_unbroken(self.model, ids, done)
                for number, one in zip(part, done, strict=True):
                    texts[number] = None if one.broken else one.text
                bar.update(len(part))
        return Texts(tuple(texts), left_out)

    def answers(
        self, pairs: Sequence[tuple[str, str]], *, template: str = "{prompt}{answer}", end: bool = False
    ) -> list[Forced | None]:
        """Return what is said of each token of answers behind their prompts; None for those that do not fit the context.

        Args:
            pairs: Prompts and answers.
            template: How they are joined.
            end: Whether the end-of-text token behind an answer counts, as its last token.
        """
        rows = [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
        reading: dict[str, Any] = {"window": int(self.model.cfg.n_ctx), "prepend_bos": self.prepend_bos}
        corpus = read_corpus(rows, self.model, field="prompt>answer", template=template, answer_eos=end, **reading)
        forced = self.forced(corpus)
        found: list[Forced | None] = [None] * len(pairs)
        at = 0
        for number, (prompt, answer) in enumerate(pairs):  # those that do not fit are missing, the others are in order
            truth = corpus.answers[at] if at < len(corpus.answers) else None
            if truth is not None and (truth.prompt, truth.text) == (prompt, answer):
                found[number] = forced[at]
                at += 1
        return found

    def texts(self, texts: Sequence[str], quantities: Sequence[str] = ("loss",)) -> list[Forced | None]:
        """Return what is said of each token of texts; None for those of which nothing is predicted."""
        tokenizer, bos = tokenizer_of(self.model), bos_token(self.model, self.prepend_bos)
        long = [len(encode(tokenizer, text, bos)) > 1 + (bos is not None) for text in texts]
        given = [{"text": text} for text, yes in zip(texts, long, strict=True) if yes]
        reading: dict[str, Any] = {"window": int(self.model.cfg.n_ctx), "prepend_bos": self.prepend_bos}
        forced = iter(self.forced(read_corpus(given, self.model, **reading), quantities))
        return [next(forced) if yes else None for yes in long]

    def forced(self, corpus: Any, quantities: Sequence[str] = ("loss", "right")) -> list[Forced]:
        """Return quantities of each predicted token of a corpus, by document."""
        with Bar(total=corpus.n_rows, unit=" rows", disable=not self.progress, desc=self.name) as bar:
            rows = force(self.model, corpus, self.intervention, self.batch_size, bar, quantities)
        parts: list[list[Forced]] = [[] for _ in corpus.keys]
        for row, document in zip(rows, corpus.document.tolist(), strict=True):
            parts[document].append(row)
        return [{name: np.concatenate([row[name] for row in own]) for name in own[0]} for own in parts]

    def tasks(self, tasks: Sequence[str | Mapping[str, Any]], limit: int | None = None) -> dict[str, tuple[float, ...]]:
        """Return the accuracy on each document of multiple-choice tasks of lm-evaluation-harness; equal scores share the point.

        Raises:
            LensUnlearnError: If the harness is not installed, or knows no such task.
        """
        from lens_unlearn.evaluation.harness import TaskOptions, run_tasks

        options: dict[str, Any] = {"options": TaskOptions(limit), "batch_size": self.batch_size or ROWS}
        done, _ = run_tasks(self.model, tasks, {"": [self.intervention]}, progress=False, **options)
        found = {}
        for name, asked in done.items():
            column = next((i for i, metric in enumerate(asked.scores.metrics) if metric.name == "acc"), None)
            if column is None:
                raise CorpusError(f"the task {name} has no accuracy: give tasks of multiple choice")
            found[name] = tuple(asked.scores.values[""][0][:, column].tolist())
        return found


def mean_loss(forced: Forced | None, *, without_end: bool = False) -> float:
    """Return the mean loss of an answer's tokens in nats; NaN where it was left out."""
    if forced is None:
        return float("nan")
    losses = forced["loss"][:-1] if without_end else forced["loss"]
    return float(losses.mean()) if len(losses) else float("nan")
