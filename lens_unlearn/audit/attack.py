"""What an attack is, what it is given, and what it gives back.

Knows that several suspects are asked about the same facts, and how their answers become measures with paired intervals; knows no
attack by name (`audit.ATTACKS` lists them).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.core.progress import Bar
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.evaluation.bootstrap import Scores, estimates
from lens_unlearn.evaluation.metric import Metric
from lens_unlearn.evaluation.report import Measure
from lens_unlearn.evaluation.teacher_forcing import force
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.model.host import Model

__all__ = ["ANSWERS", "REFERENCE", "SCORE", "Attack", "Case", "Found", "Suspect", "answered", "curve", "each_suspect"]

REFERENCE = "reference"
"""The condition of the model that never saw the facts."""
SCORE, RECOVERED = "score", "recovered"
"""The metrics that every attack has: its one number, and the share of what the base knows that this is."""
ANSWERS = "probability of the answer"
"""exp of the mean log-probability of the answer's tokens: their geometric mean."""

Key = tuple[str, str]
"""Condition and metric; of a curve, the metric is ``name@place``, such as "drop@3" at layer 3."""


@dataclass(frozen=True)
class Suspect:
    """A model that may know the facts, with what acts on it."""

    model: Model
    intervention: Intervention | None = None

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Let the intervention act for a `with` block."""
        with nullcontext() if self.intervention is None else self.intervention.on(self.model):
            yield


@dataclass(frozen=True)
class Case:
    """What every attack is given: the facts, and everybody who is asked about them."""

    model: Model
    facts: Corpus
    """What was to be forgotten; the counted tokens are those of the answers, without an end-of-text token behind them."""
    suspects: Mapping[str, Sequence[Suspect]]
    """By condition: "base" first, of controls one per seed, and "reference" where there is one."""
    retain: Corpus | None = None
    """Texts of the same kind that were to be retained."""
    unseen: Corpus | None = None
    """Texts of the same kind that no model has seen."""
    labels: Sequence[Any] | None = None
    """For each fact the property that a probe looks for; default the class of the answer's first token."""
    batch_size: int | None = None
    resamples: int = 1000
    seed: int = 0
    progress: bool = False

    @property
    def reference(self) -> Model | None:
        """The model that never saw the facts."""
        own = self.suspects.get(REFERENCE)
        return own[0].model if own else None

    @cached_property
    def n_layers(self) -> int:
        """Blocks of the model."""
        return int(self.model.cfg.n_layers)

    @cached_property
    def halves(self) -> tuple[list[int], list[int]]:
        """Two halves of the facts, such that no unit (fact, or group of facts) stands in both.

        Raises:
            CorpusError: If there are too few.
        """
        units = list(dict.fromkeys(self.facts.units))
        if len(units) < 4:
            kind = "groups" if self.facts.groups else "facts"
            raise CorpusError(f"{len(units)} {kind} are too few to attack one half with the other: give at least 4")
        first = set(units[::2])
        side = [unit in first for unit in self.facts.units]
        return [i for i, yes in enumerate(side) if yes], [i for i, yes in enumerate(side) if not yes]

    def measures(
        self, metrics: Sequence[Metric], values: Mapping[str, Sequence[np.ndarray]], counts: np.ndarray, facts: Corpus
    ) -> dict[Key, Measure]:
        """Turn what each fact scores into means with bootstrap draws over units, the same for all conditions.

        Args:
            metrics: What the columns are.
            values: By condition, for each of its suspects: [facts, metrics].
            counts: [facts, metrics]: 1 where a fact counts, else 0.
            facts: The corpus that the rows are the documents of.
        """
        sums = {
            name: [np.where(counts > 0, part, 0.0) * counts for part in several] for name, several in values.items()
        }
        found = estimates(Scores(metrics, sums, counts, facts.units), self.resamples, self.seed)
        return {(condition, metric): measure for condition, metric, measure in found}


@dataclass(frozen=True)
class Found:
    """What one attack found."""

    measures: dict[Key, Measure]
    """By condition and metric; "score" among them, unless it needs a reference that there is not."""
    notes: tuple[str, ...] = ()
    """What was left out of it, and why; sentences for the page."""


@dataclass(frozen=True)
class Attack:
    """An attack, as the audit, figures, pages and the command line see it."""

    name: str
    """In tables and on the command line."""
    run: Callable[[Case], Found]
    words: str
    """What figures and pages call it."""
    asks: str
    """What it asks, in a sentence."""
    score: str
    """What its one number is."""
    returns: str
    """How the page says that a share came back: "comes back ..."."""
    curves: Mapping[str, str] = field(default_factory=dict)
    """Its curves: the metric before the "@", and what its values are."""
    over: str = "layer"
    """What the places of its curves are."""


def each_suspect(case: Case, what: str) -> Iterator[tuple[str, int, Suspect]]:
    """Go through everybody, with a bar."""
    everybody = [(name, i, suspect) for name, several in case.suspects.items() for i, suspect in enumerate(several)]
    yield from Bar(everybody, desc=what, disable=not case.progress, unit=" suspects")


def curve(name: str, places: Sequence[int], words: str, **options: Any) -> list[Metric]:
    """Return the metrics of a curve, one at each place."""
    return [Metric(f"{name}@{place}", words, **options) for place in places]


def answered(case: Case, suspect: Suspect, corpus: Corpus) -> Float[np.ndarray, "documents"]:
    """Return the probability of the counted tokens of each document: their geometric mean.

    NaN where none is predicted, and where an intervention breaks the model.
    """
    with Bar(disable=True) as silent:
        rows = force(suspect.model, corpus, suspect.intervention, case.batch_size, silent, ("loss",))
    sums, counts = np.zeros(corpus.n_documents), np.zeros(corpus.n_documents)
    for row, document in zip(rows, corpus.document.tolist(), strict=True):
        sums[document] += row["loss"].sum()
        counts[document] += len(row["loss"])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.exp(-sums / counts)
