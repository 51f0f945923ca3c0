"""`Metric`: everything that evaluation, figures, pages and the command line need to know of a metric.

Knows what a metric is computed from, its unit and its words; knows no metric by name: the table is `evaluation.metrics`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Metric", "Needs"]

Needs = Literal["tokens", "rows", "answers", "memorization", "membership", "tasks"]


@dataclass(frozen=True)
class Metric:
    """A metric, as the rest of the package sees it.

    What its function takes depends on what it needs:

    - "tokens": quantities of predicted tokens by name, [tokens] each: those named in `quantities`, and "rare", which is 1 for
      targets outside the corpus' most frequent ones. It returns one value per token.
    - "rows": quantities of the rows of a batch by name, [rows] each: "abstained". It returns one value per row.
    - "answers": a generated answer beside the true one, `question_answering.Answered`.
    - "memorization": the true answer to a question under teacher forcing, and wrong ones, `memorization.Question`.
    - "membership": a document under teacher forcing, `membership.Document`.
    - "tasks": nothing; lm-evaluation-harness computes it.
    """

    name: str
    """In reports, in `metrics.csv` and in arguments."""
    words: str
    """What figures and pages call it."""
    needs: Needs = "tasks"
    of: Callable[[Any], Any] | None = None
    """Computes it; see above."""
    over: Callable[[Any], Any] | None = None
    """Takes the same; returns what it is a mean over, as weights. Default: every token, row or question alike."""
    quantities: tuple[str, ...] = ()
    """Properties of `teacher_forcing.Outcome` that its function reads."""
    applies: Callable[[Any], bool] | None = None
    """Takes what is known of a corpus' questions, or what an attack may look at; says whether it is measured. Default: always."""
    derived_from: str = ""
    """Another metric, whose mean it transforms: then `of` takes that mean, or its bootstrap draws."""
    unit: str = "fraction"
    """"fraction", "nats per token", or what else it counts."""
    range: tuple[float, float] = (0.0, 1.0)
    """Between which numbers it lies."""
    higher_is_better: bool = True
    """Of a skill that is to be retained: whether the metric falls as the skill is lost, so that a share of it can be lost."""
    headline: int = 0
    """Pages summarize by the metric with the lowest number here among those measured; 0 for never."""
    brief: bool = False
    """Whether short tables show it: on the command line and on the hub's cards."""

    @property
    def is_fraction(self) -> bool:
        """Whether it is a share, which is written in percent."""
        return self.unit == "fraction"
