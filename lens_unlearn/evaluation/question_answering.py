"""Put the questions of a corpus to a model, with and without interventions, and score what it answers.

Knows how answers are generated and where they end; knows nothing of which metrics there are: each is given, and asks for what it
needs of an `Answered`.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.core.progress import Bar
from lens_unlearn.corpora.corpus import Answer, Corpus
from lens_unlearn.evaluation.answer_matching import (
    FEW,
    NORMALIZATION,
    Ending,
    ends_in_number,
    program,
    rouge_l,
)
from lens_unlearn.evaluation.bootstrap import Scores
from lens_unlearn.evaluation.code_tests import check_runner, isolation, passes_tests
from lens_unlearn.evaluation.generation import Written, continue_rows, require_unbroken
from lens_unlearn.evaluation.metric import Metric
from lens_unlearn.interventions.base import Intervention, acting
from lens_unlearn.model.host import Model

__all__ = ["Answered", "Asked", "QuestionAnswering", "Runs", "draw_questions", "line_breaks"]

SAMPLES = 3
MOST = 32
"""Texts that are written at a time, at most: a cache of keys and values stands for each."""
_CHUNK = 4  # batches between two steps of the progress bar

Runs = Mapping[str, Sequence[Intervention | None]]


@dataclass(frozen=True)
class Answered:
    """One answer beside the true one; what is costly is found when it is first asked for."""

    text: str
    truth: Answer
    abstained: bool = False
    """Whether it was refused."""
    cut: bool = False
    """Whether it goes on where no more tokens were allowed."""
    allow_code_execution: bool = False

    @cached_property
    def rouge(self) -> tuple[float, float]:
        """ROUGE-L: recall and F-measure, each beside the answer that is right and closest."""
        recalls, measures = zip(*(rouge_l(self.text, right) for right in self.truth.right), strict=True)
        return max(recalls), max(measures)

    @cached_property
    def passes(self) -> bool:
        """Whether it is a program that passes its unit tests."""
        allow = self.allow_code_execution
        return bool(self.truth.tests) and passes_tests(
            program(self.text), self.truth.tests, self.truth.setup, allow_code_execution=allow
        )


@dataclass(frozen=True)
class About:
    """What is known of the questions of a corpus, by which a metric says whether it applies."""

    numbers: bool
    """Whether nearly all true answers end in numbers."""
    tests: bool
    """Whether there are unit tests, and they may be run."""
    abstains: bool
    """Whether an intervention may abstain."""


@dataclass(frozen=True)
class Asked:
    """How the questions of one corpus were answered."""

    scores: Scores
    samples: list[dict[str, Any]]
    """The first questions: corpus, prompt, true answer, and what is answered under each condition."""


@dataclass(frozen=True)
class QuestionAnswering:
    """How questions are asked.

    Attributes:
        metrics: What is measured, of those that need answers.
        answers: Questions per corpus, at most; 0 asks nothing.
        max_new_tokens: The longest answer; it also ends with the model's context.
        batch_size: Rows of full length in a forward pass; of shorter ones as many more as hold no more tokens.
        allow_code_execution: Whether to run answers that are programs against their unit tests.
        seed: Of the choice of questions.
        progress: Whether to show a bar.
    """

    metrics: Sequence[Metric]
    answers: int = 0
    max_new_tokens: int = 100
    batch_size: int = 8
    allow_code_execution: bool = False
    seed: int = 0
    progress: bool = True

    def choose(self, corpora: Mapping[str, Corpus]) -> dict[str, list[int]]:
        """Draw the rows to ask, of each corpus that has true answers; the same for every condition.

        Raises:
            CorpusError: If no corpus has any.
            LensUnlearnError: If a number is out of range, or unit tests are wanted and cannot run here.
        """
        if self.answers < 0:
            raise LensUnlearnError(f"answers={self.answers} is no number of questions: 0 asks none")
        if self.max_new_tokens < 1:
            raise LensUnlearnError(f"max_new_tokens={self.max_new_tokens} leaves nothing to write: at least 1")
        chosen = draw_questions(corpora, self.answers, self.seed)
        if self.answers and not chosen:
            raise CorpusError(
                "no corpus has true answers to compare with: read one as 'question>answer', or ask for no answers"
            )
        if self.allow_code_execution and any(_has_tests(corpora[name], rows) for name, rows in chosen.items()):
            check_runner()
        return chosen

    def ask(
        self, model: Model, corpora: Mapping[str, Corpus], chosen: Mapping[str, list[int]], runs: Runs
    ) -> Iterator[tuple[str, Asked]]:
        """Answer and score the chosen questions, corpus by corpus."""
        total = sum(map(len, chosen.values())) * sum(map(len, runs.values()))
        with Bar(total=total, unit=" answers", disable=not (self.progress and total), desc="answers") as bar:
            for name, rows in chosen.items():
                yield name, self._ask(model, name, corpora[name], rows, runs, bar)

    def _ask(self, model: Model, name: str, corpus: Corpus, rows: list[int], runs: Runs, bar: Any) -> Asked:
        truths = [truth for row in rows if (truth := corpus.answer(row)) is not None]
        ending, metrics = Ending.of(_truths(corpus)), self._applying(model, corpus, rows, runs)
        prompts = [corpus.prompt(row).tolist() for row in rows]
        stop = line_breaks(model) if ending.line else []
        bos, allow = int(corpus.prepend_bos), self.allow_code_execution
        samples: list[dict[str, Any]] = [
            {
                "corpus": name,
                "prompt": model.tokenizer.decode(prompt[bos:], skip_special_tokens=True),
                "true answer": " / ".join(truth.right),
            }
            for prompt, truth in zip(prompts[:SAMPLES], truths)
        ]
        values: dict[str, list[np.ndarray]] = {}
        for condition, run in runs.items():
            values[condition] = []
            for intervention in run:
                written = self._write(model, prompts, intervention, stop, corpus.window, bar)
                if intervention is None:
                    require_unbroken(model, prompts, written)
                texts = [ending.cut(one.text, truth.marker) for one, truth in zip(written, truths, strict=True)]
                answered = [
                    Answered(text, truth, one.abstained, one.cut and ending.is_open(one.text, truth.marker), allow)
                    for text, truth, one in zip(texts, truths, written, strict=True)
                ]
                table = np.array([[_value(metric, one) for metric in metrics] for one in answered])
                table[[one.broken for one in written]] = np.nan  # as everywhere where an edit breaks the model
                values[condition].append(table)
                for sample, one, text, answer in zip(samples, written, texts, answered):
                    if condition not in sample:
                        sample[condition] = one.text if one.abstained else text
                        if answer.cut:
                            sample.setdefault("cut", []).append(condition)
        blank = [Answered("", truth) for truth in truths]
        counts = np.array([[1.0 if m.over is None else float(m.over(one)) for m in metrics] for one in blank])
        units = [corpus.units[document] for document in corpus.document[torch.tensor(rows)].tolist()]
        return Asked(Scores(metrics, values, counts, units), samples)

    def _applying(self, model: Model, corpus: Corpus, rows: list[int], runs: Runs) -> list[Metric]:
        """Return what is measured on a corpus, in order."""
        truths = _truths(corpus)
        interventions = [one for run in runs.values() for one in run if one is not None]
        interventions += [live.intervention for live in acting(model)]
        about = About(
            numbers=sum(not ends_in_number(truth.text) for truth in truths) <= FEW * len(truths),
            tests=self.allow_code_execution and _has_tests(corpus, rows),
            abstains=any(one.abstains for one in interventions),
        )
        return [metric for metric in self.metrics if metric.applies is None or metric.applies(about)]

    def _write(
        self,
        model: Model,
        prompts: Sequence[list[int]],
        intervention: Intervention | None,
        stop: Sequence[int],
        window: int,
        bar: Any,
    ) -> list[Written]:
        """Continue prompts greedily; where an answer is one line, up to a token of `stop`, which are those of line breaks."""
        room = max(map(len, prompts)) + self.max_new_tokens
        together = min(MOST, max(1, self.batch_size * window // room))
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "batch_size": together}
        written: dict[int, Written] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        with nullcontext() if intervention is None else intervention.on(model):
            for start in range(0, len(order), _CHUNK * together):
                part = order[start : start + _CHUNK * together]
                written |= zip(part, continue_rows(model, [prompts[i] for i in part], stop=stop, **options))
                # A line break before anything else does not end an answer.
                blank = [i for i in part if stop and not written[i].abstained and not written[i].text.strip()]
                if blank:
                    written |= zip(blank, continue_rows(model, [prompts[i] for i in blank], **options))
                bar.update(len(part))
        return [written[i] for i in range(len(prompts))]

    def settings(self, corpora: Mapping[str, Corpus], chosen: Mapping[str, list[int]]) -> dict[str, Any]:
        """Say what was done, for a report's provenance."""
        settings: dict[str, Any] = {
            "questions": {name: len(rows) for name, rows in chosen.items()},
            "seed": self.seed,
            "max_new_tokens": self.max_new_tokens,
            "decoding": "greedy",
            "an answer ends at": {name: str(Ending.of(_truths(corpora[name]))) for name in chosen},
            "normalization": NORMALIZATION,
            "rouge_l": "recall of the longest common subsequence, with Porter stemming; rouge_l_f: its F-measure",
        }
        tested = [name for name, rows in chosen.items() if _has_tests(corpora[name], rows)]
        if tested:
            allowed = f"run {isolation().words}" if self.allow_code_execution else "not run: not allowed"
            settings["unit_tests"] = dict.fromkeys(tested, allowed)
        return settings


def _value(metric: Metric, answered: Answered) -> float:
    """Score one answer; one that was refused earns nothing but in the metric that counts refusals, which falls."""
    assert metric.of is not None
    if answered.abstained and metric.higher_is_better:
        return 0.0
    return float(metric.of(answered))


def draw_questions(corpora: Mapping[str, Corpus], questions: int, seed: int) -> dict[str, list[int]]:
    """Draw at most so many rows of each corpus that has true answers."""
    chosen: dict[str, list[int]] = {}
    for name, corpus in corpora.items():
        rows = [row for row in range(corpus.n_rows) if corpus.answer(row) is not None]
        if rows and questions:
            chosen[name] = sorted(random.Random(f"answers {seed}").sample(rows, min(questions, len(rows))))
    return chosen


def line_breaks(model: Model) -> list[int]:
    """Return the tokens whose text holds a line break."""
    tokenizer = model.tokenizer
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return [token for token, text in enumerate(texts) if "\n" in text and token < int(model.cfg.d_vocab)]


def _truths(corpus: Corpus) -> list[Answer]:
    return [answer for answer in corpus.answers if answer is not None]


def _has_tests(corpus: Corpus, rows: Sequence[int]) -> bool:
    return any((answer := corpus.answer(row)) is not None and answer.tests for row in rows)
