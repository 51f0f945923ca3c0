"""Memorization: how well a model knows the true answers of a corpus, under teacher forcing, as for TOFU.

Knows formulas, questions, and which rows have to be run besides those of the corpus; knows nothing of where reports keep the
results, nor which metrics there are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.core.progress import Bar
from lens_unlearn.corpora.corpus import Answer, Corpus
from lens_unlearn.evaluation.bootstrap import Scores
from lens_unlearn.evaluation.metric import Metric
from lens_unlearn.evaluation.question_answering import Runs, draw_questions
from lens_unlearn.evaluation.teacher_forcing import Forced, force, with_answers
from lens_unlearn.model.host import Model

__all__ = ["Memorization", "Question", "choice_probability", "extraction_strength", "truth_ratio", "truth_share"]

EPSILON = 1e-10  # as in TOFU


def truth_ratio(wrong: Sequence[float], right: float) -> float:
    """Return how probable wrong answers are beside the right one.

    R = exp(-mean_j loss(wrong_j)) / (exp(-loss(right)) + 1e-10), with `loss` the mean over an answer's tokens: the geometric mean
    over the wrong answers. 0 where the model prefers what is right, 1 where it cannot tell, more where it prefers what is wrong.

    Args:
        wrong: The mean loss of each wrong answer, in nats per token; at least one.
        right: That of the right answer: in other words, where there are such, since those trained on are memorized.
    """
    return float(np.exp(-np.mean(wrong)) / (np.exp(-right) + EPSILON))


def truth_share(wrong: Sequence[float], right: float) -> float:
    """Return the right answer's share: true / (true + false + 1e-10), OpenUnlearning's `prob_mean`.

    true = exp(-loss(right)) and false = exp(-mean_j loss(wrong_j)), as in `truth_ratio`, which is false / true: 1 where the model
    prefers what is right, one half where it cannot tell, 0 where it prefers what is wrong.

    Args:
        wrong: The mean loss of each wrong answer, in nats per token; at least one.
        right: That of the right answer, in other words.
    """
    true, false = np.exp(-right), np.exp(-np.mean(wrong))
    return float(true / (true + false + EPSILON))


def extraction_strength(right: np.ndarray) -> float:
    """Return 1 - k / L, with L the tokens of an answer and k the fewest after which all others are predicted right.

    0 where its last token is not. Differs from OpenUnlearning's code, which never gives less than 1 / L there, and so gives 1
    to a wrong answer of a single token.

    Args:
        right: [tokens] Whether each is the most probable one, when those before it are the true ones.
    """
    if np.isnan(right).any():
        return float("nan")
    wrong = np.flatnonzero(right == 0)
    return 1 - float(wrong[-1] + 1 if wrong.size else 0) / len(right)


def choice_probability(probability: float, wrong: Sequence[float]) -> float:
    """Return p / (p + sum_j p_j + 1e-10), with p the true answer's probability and p_j = exp(-loss) of each wrong one.

    Args:
        probability: Of the true answer, per token: the geometric mean.
        wrong: The mean loss of each wrong answer, in nats per token.
    """
    return probability / (probability + float(np.exp(-np.array(wrong)).sum()) + EPSILON)


@dataclass(frozen=True)
class Question:
    """What a model gives the true answer to one question, token by token, and other answers."""

    truth: Forced
    others: tuple[Forced, ...] = ()
    """The true answer in other words (or as it is), then wrong ones; empty where there are none, or not all fit the window."""
    eos: bool = False
    """Whether the end-of-text token is the last of every answer."""

    @property
    def right(self) -> np.ndarray:
        """[tokens] 1 where the true answer's token is the single most probable one; without the end-of-text token."""
        return self.truth["right"][:-1] if self.eos else self.truth["right"]

    @cached_property
    def probability(self) -> float:
        """exp(-mean loss) of the true answer."""
        return float(np.exp(-self.truth["loss"].mean()))

    @property
    def complete(self) -> bool:
        """Whether there are wrong answers to compare with."""
        return bool(self.others)

    @property
    def paraphrase(self) -> float:
        """Mean loss of the true answer in other words, in nats per token."""
        return float(self.others[0]["loss"].mean())

    @property
    def wrong(self) -> list[float]:
        """Mean loss of each wrong answer, in nats per token."""
        return [float(other["loss"].mean()) for other in self.others[1:]]


@dataclass(frozen=True)
class _Questions:
    """The questions of one corpus, and where each answer's row is: in the corpus, or among rows of their own."""

    truths: list[Answer]
    own: list[int | None]
    """For each question the corpus' row that is its prompt and its whole true answer; None where that is among `others`."""
    others: Corpus | None
    """Rows that stand in the corpus nowhere: wrong answers, paraphrases, and true answers that were cut."""
    rows: list[list[int]]
    """For each question its rows of `others`: the true answer first where `own` has none."""
    complete: list[bool]
    left_out: int
    """Questions whose wrong answers do not all fit the window, and so do not count."""
    units: list[str]
    """For each question the key of what is resampled whole."""
    eos: bool
    """Whether the end-of-text token is the last of every answer."""


@dataclass
class Memorization:
    """How true answers are looked for.

    Attributes:
        metrics: What is measured, of those that need memorization.
        questions: Per corpus, at most; 0 looks for nothing.
        batch_size: Rows of full length in a forward pass; of shorter ones as many more as hold no more tokens.
        seed: Of the choice of questions.
        progress: Whether to show a bar.
    """

    metrics: Sequence[Metric]
    questions: int = 0
    batch_size: int | None = None
    seed: int = 0
    progress: bool = True
    _known: dict[str, _Questions] = field(default_factory=dict)

    def choose(self, model: Model, corpora: Mapping[str, Corpus]) -> dict[str, set[int]]:
        """Draw the questions of each corpus that has true answers; the same ones as `answers` draws.

        Returns:
            By corpus, the rows whose tokens are to be kept when the corpus itself is scored: those of true answers.

        Raises:
            CorpusError: If no corpus has any, or a true answer does not fit its window.
            LensUnlearnError: If the number is out of range.
        """
        if self.questions < 0:
            raise LensUnlearnError(f"memorization={self.questions} is no number of questions: 0 looks at none")
        chosen = draw_questions(corpora, self.questions, self.seed)
        if self.questions and not chosen:
            raise CorpusError(
                "no corpus has true answers that could be memorized: read one as 'question>answer', or ask for no memorization"
            )
        self._known |= {name: _questions(model, corpora[name], rows) for name, rows in chosen.items()}
        return {name: {row for row in known.own if row is not None} for name, known in self._known.items()}

    def measure(
        self, model: Model, runs: Runs, forced: Mapping[str, Mapping[str, list[dict[int, Forced]]]]
    ) -> Iterator[tuple[str, Scores]]:
        """Measure the chosen questions, corpus by corpus.

        Args:
            model: The model.
            runs: By condition, its interventions.
            forced: By corpus and condition, for each intervention: the rows that `choose` asked to keep.
        """
        total = sum(known.others.n_rows if known.others else 0 for known in self._known.values())
        total *= sum(map(len, runs.values()))
        with Bar(total=total, unit=" answers", disable=not (self.progress and total), desc="memorization") as bar:
            for name, known in self._known.items():
                questions = {
                    condition: [
                        self._ask(model, known, one, own, bar)
                        for one, own in zip(run, forced[name][condition], strict=True)
                    ]
                    for condition, run in runs.items()
                }
                yield name, self._scores(known, questions)

    def _ask(
        self, model: Model, known: _Questions, intervention: Any, own: Mapping[int, Forced], bar: Any
    ) -> list[Question]:
        """Run what stands in the corpus nowhere, and put each question's answers together."""
        others = [] if known.others is None else force(model, known.others, intervention, self.batch_size, bar)
        asked = []
        for row, rows, complete in zip(known.own, known.rows, known.complete, strict=True):
            answers = ([] if row is None else [own[row]]) + [others[other] for other in rows]
            asked.append(Question(answers[0], tuple(answers[1:]) if complete else (), known.eos))
        return asked

    def _scores(self, known: _Questions, questions: Mapping[str, list[list[Question]]]) -> Scores:
        metrics = [row for row in self.metrics if any(known.complete) or not _needs_wrong_answers(row)]
        first = next(iter(questions.values()))[0]
        counts = np.array([[1.0 if m.over is None else float(m.over(q)) for m in metrics] for q in first])
        values = {
            condition: [
                np.array([[_value(metric, question) for metric in metrics] for question in part]) for part in parts
            ]
            for condition, parts in questions.items()
        }
        return Scores(metrics, values, counts, known.units)

    def settings(self) -> dict[str, Any]:
        """Say what was done, for a report's provenance."""
        settings: dict[str, Any] = {
            "questions": {name: len(known.truths) for name, known in self._known.items()},
            "seed": self.seed,
            "tokens": "those of the answer, predicted from the true ones before them",
            "end-of-text token": {
                name: "counts, but for exact_memorization and extraction_strength" if known.eos else "none"
                for name, known in self._known.items()
            },
        }
        left_out = {name: known.left_out for name, known in self._known.items()}
        if any(left_out.values()):
            settings["left out of truth_ratio: wrong answers longer than the window"] = left_out
        return settings


def single_values(scores: Scores, column: int) -> dict[str, np.ndarray]:
    """Return by condition [interventions, questions] of what each single question scores in a metric, where it counts."""
    over = scores.counts[:, column]
    return {
        name: np.stack([part[over > 0, column] / over[over > 0] for part in parts])
        for name, parts in scores.values.items()
    }


_WITHOUT_WRONG_ANSWERS = Question({"loss": np.zeros(1), "right": np.zeros(1)})


def _needs_wrong_answers(metric: Metric) -> bool:
    return metric.over is not None and not metric.over(_WITHOUT_WRONG_ANSWERS)


def _value(metric: Metric, question: Question) -> float:
    assert metric.of is not None
    return float(metric.of(question)) if metric.over is None or metric.over(question) else 0.0


def _counting(corpus: Corpus, row: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of one row up to the last that counts, and which of them do."""
    batch = corpus.take([row])
    end = int(batch.counted[0].nonzero().max()) + 1  # a chat template may go on behind it, which changes nothing before
    return batch.tokens[0, :end], batch.counted[0, :end]


def _questions(model: Model, corpus: Corpus, rows: Sequence[int]) -> _Questions:
    """Find which rows of a corpus are whole true answers, and make rows of everything else that is to be looked at.

    A row of the corpus serves only where it is, token for token, what its prompt and its true answer come to: the last row of a
    corpus may have been cut where its budget of tokens was full.
    """
    truths = [truth for row in rows if (truth := corpus.answer(row)) is not None]
    asked: list[tuple[int, str]] = []  # the number of the question, and an answer to it
    for number, truth in enumerate(truths):
        others = [truth.paraphrase or truth.text, *truth.perturbed] if truth.perturbed else []
        asked += [(number, text) for text in [truth.text, *others]]
    joined, fitting = with_answers(model, corpus, [(truths[number], text) for number, text in asked])
    place = dict(zip(fitting, range(len(fitting)), strict=True))
    rows_of: list[list[int | None]] = [[] for _ in truths]
    for index, (number, _) in enumerate(asked):
        rows_of[number].append(place.get(index))
    if lacking := sum(answers[0] is None for answers in rows_of):
        raise CorpusError(f"{lacking} true answers of {corpus.name} do not fit its window: read it with this model")
    complete = [len(answers) > 1 and None not in answers for answers in rows_of]
    left_out = sum(len(answers) > 1 for answers in rows_of) - sum(complete)
    own: list[int | None] = []
    wanted: list[list[int]] = []
    for row, answers, whole in zip(rows, rows_of, complete, strict=True):
        needed = [answer for answer in (answers if whole else answers[:1]) if answer is not None]
        # Of a conversation, further turns count in its own row.
        same = all(map(torch.equal, _counting(joined, needed[0]), _counting(corpus, row)))
        own.append(row if same else None)
        wanted.append(needed[int(same) :])
    needed_rows = sorted({answer for answers in wanted for answer in answers})
    number_of = {answer: number for number, answer in enumerate(needed_rows)}
    others = joined.only(needed_rows) if needed_rows else None  # one row is one document here
    units = [corpus.units[document] for document in corpus.document[torch.tensor(rows)].tolist()]
    places = [[number_of[answer] for answer in answers] for answers in wanted]
    return _Questions(truths, own, others, places, complete, left_out, units, corpus.answer_eos is not None)
