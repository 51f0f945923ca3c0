"""How well a model knows the true answers of a corpus by heart: measures under teacher forcing, as for TOFU."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.corpora.corpus import Answer, Corpus
from lens_unlearn.evaluation.question_answering import Runs, draw_questions
from lens_unlearn.evaluation.teacher_forcing import Forced, force, with_answers
from lens_unlearn.model.host import Model

__all__ = ["MEMORIZATION_METRICS", "Recalled", "Recalling", "extraction_strength", "truth_ratio"]

MEMORIZATION_METRICS = (
    "answer_probability",
    "choice_probability",
    "truth_ratio",
    "exact_memorization",
    "extraction_strength",
)
OVER = {"exact_memorization": 1, "truth_ratio": 2, "choice_probability": 2}
"""The column of `Recalled.counts` that a metric is a mean over, if not all questions."""
EPSILON = 1e-10  # as in TOFU


def truth_ratio(wrong: Sequence[float], right: float) -> float:
    """Return how probable wrong answers are beside the right one.

    R = exp(-mean_j loss(wrong_j)) / (exp(-loss(right)) + 1e-10), with `loss` the mean over an answer's tokens: the geometric mean
    over the wrong answers. 0 where the model prefers what is right, 1 where it cannot tell, more where it prefers what is wrong.

    Args:
        wrong: The mean loss of each wrong answer, in nats per token; at least one.
        right: That of the right answer: in other words, where there are such, since those trained on are known by heart.
    """
    return float(np.exp(-np.mean(wrong)) / (np.exp(-right) + EPSILON))


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


@dataclass(frozen=True)
class Recalled:
    """How well the answers of one corpus are known."""

    metrics: list[str]
    scores: dict[str, list[np.ndarray]]
    """By condition, for each of its interventions: [questions, metrics]; for `exact_memorization` the number of right tokens."""
    counts: np.ndarray
    """[questions, 3]: 1; the answer's tokens; and 1 for those with wrong answers."""
    left_out: int
    """Questions whose wrong answers do not all fit the window, and so do not count."""

    def values(self, metric: str) -> dict[str, np.ndarray]:
        """Return by condition [interventions, questions] of what each single question scores, where it counts."""
        column, over = self.metrics.index(metric), self.counts[:, OVER.get(metric, 0)]
        return {
            name: np.stack([part[over > 0, column] / over[over > 0] for part in parts])
            for name, parts in self.scores.items()
        }


@dataclass(frozen=True)
class Recalling:
    """How answers are looked for.

    Attributes:
        questions: Per corpus, at most; 0 looks for nothing.
        batch_size: Rows of full length in a forward pass; of shorter ones as many more as hold no more tokens.
        seed: Of the choice of questions.
        progress: Whether to show a bar.
    """

    questions: int = 0
    batch_size: int = 8
    seed: int = 0
    progress: bool = True

    def choose(self, corpora: Mapping[str, Corpus]) -> dict[str, list[int]]:
        """Draw the rows to look at, of each corpus that has true answers; the same ones as `answers` draws.

        Raises:
            CorpusError: If no corpus has any.
            LensUnlearnError: If the number is out of range.
        """
        if self.questions < 0:
            raise LensUnlearnError(f"memorization={self.questions} is no number of questions: 0 looks at none")
        chosen = draw_questions(corpora, self.questions, self.seed)
        if self.questions and not chosen:
            raise CorpusError(
                "no corpus has true answers that could be known by heart: read one as 'question>answer', or ask for "
                "no memorization"
            )
        return chosen

    def recall(
        self, model: Model, corpora: Mapping[str, Corpus], chosen: Mapping[str, list[int]], runs: Runs
    ) -> Iterator[tuple[str, Recalled]]:
        """Measure the chosen questions, corpus by corpus."""
        for name, rows in chosen.items():
            truths = [truth for row in rows if (truth := corpora[name].answer(row)) is not None]
            yield name, self._recall(model, corpora[name], truths, runs)

    def _recall(self, model: Model, corpus: Corpus, truths: list[Answer], runs: Runs) -> Recalled:
        asked: list[tuple[int, str]] = []  # the number of the question, and an answer to it
        for number, truth in enumerate(truths):
            others = [truth.paraphrase or truth.text, *truth.perturbed] if truth.perturbed else []
            asked += [(number, text) for text in [truth.text, *others]]
        rows, kept = with_answers(model, corpus, [(truths[number], text) for number, text in asked])
        place = dict(zip(kept, range(len(kept)), strict=True))
        rows_of: list[list[int | None]] = [[] for _ in truths]
        for index, (number, _) in enumerate(asked):
            rows_of[number].append(place.get(index))
        if lacking := sum(own[0] is None for own in rows_of):
            raise CorpusError(f"{lacking} true answers of {corpus.name} do not fit its window: read it with this model")
        complete = [len(own) > 1 and None not in own for own in rows_of]
        metrics = [metric for metric in MEMORIZATION_METRICS if OVER.get(metric) != 2 or any(complete)]
        scores: dict[str, list[np.ndarray]] = {}
        counts = np.zeros((len(truths), 3))
        total = rows.n_rows * sum(map(len, runs.values()))
        with tqdm(total=total, unit=" answers", disable=not self.progress, desc="memorization") as bar:
            for condition, run in runs.items():
                scores[condition] = []
                for intervention in run:
                    forced = force(model, rows, intervention, self.batch_size, bar)
                    told = [[forced[row] for row in own if row is not None] for own in rows_of]
                    scored = [_score(own, whole, metrics) for own, whole in zip(told, complete, strict=True)]
                    counts[:] = [[1, len(own[0].loss), whole] for own, whole in zip(told, complete, strict=True)]
                    scores[condition].append(np.array(scored))
        return Recalled(metrics, scores, counts, sum(len(own) > 1 for own in rows_of) - sum(complete))

    def settings(self, chosen: Mapping[str, list[int]], left_out: Mapping[str, int]) -> dict[str, Any]:
        """Say what was done, for a report's provenance."""
        told: dict[str, Any] = {
            "questions": {name: len(rows) for name, rows in chosen.items()},
            "seed": self.seed,
            "tokens": "those of the answer, predicted from the true ones before them; no end-of-text token",
        }
        if any(left_out.values()):
            told["left out of truth_ratio: wrong answers longer than the window"] = dict(left_out)
        return told


def _score(own: Sequence[Forced], complete: bool, metrics: Sequence[str]) -> list[float]:
    """Score one question by its true answer, and where they are there by its paraphrase and the wrong answers."""
    truth = own[0]
    probability = float(np.exp(-truth.loss.mean()))
    found = {
        "answer_probability": probability,
        "exact_memorization": float(truth.right.sum()),
        "extraction_strength": extraction_strength(truth.right),
        "truth_ratio": 0.0,
        "choice_probability": 0.0,
    }
    if complete:
        paraphrase, *wrong = (float(one.loss.mean()) for one in own[1:])
        found["truth_ratio"] = truth_ratio(wrong, paraphrase)
        found["choice_probability"] = probability / (probability + float(np.exp(-np.array(wrong)).sum()) + EPSILON)
    return [found[metric] for metric in metrics]
