"""From scores of documents or questions to measures: values, and bootstrap draws that all conditions share.

Knows units that are resampled and what each adds to a mean; knows nothing of where scores come from.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from lens_unlearn.core.intervals import resamples as resamples_of
from lens_unlearn.evaluation.metric import Metric
from lens_unlearn.evaluation.report import Measure

__all__ = ["Scores", "estimates", "transformed"]


@dataclass
class Scores:
    """What the units of one corpus add to the means of some metrics, under every condition.

    Attributes:
        metrics: The metrics, in order.
        values: By condition, for each of its interventions: sums of each metric over a unit.
        counts: How much each unit counts in each metric: tokens, rows or answers.
    """

    metrics: Sequence[Metric]
    values: dict[str, list[Float[np.ndarray, "units metrics"]]]
    counts: Float[np.ndarray, "units metrics"]


def estimates(
    scores: Scores, resamples: int, seed: int, derived: Sequence[Metric] = ()
) -> Iterator[tuple[str, str, Measure]]:
    """Turn sums per unit into values and bootstrap draws; all conditions share the resampled units.

    A metric is the ratio of two sums over units, so each draw is the ratio of two resampled sums. Of a condition with several
    interventions every draw takes one of them at random, so that its interval holds their spread too.

    Args:
        scores: What units add.
        resamples: How many draws.
        seed: Of the draws.
        derived: Metrics that transform the means of others among these.

    Yields:
        Condition, metric and measure.
    """
    seen = scores.counts[:, 0] > 0
    random = np.random.default_rng(seed)
    units = int(seen.sum())
    draws = resamples if units > 1 else 0  # a single unit says nothing of others
    weights = resamples_of(units, draws, random)
    counts = scores.counts[seen]
    for condition, parts in scores.values.items():
        pick = random.integers(len(parts), size=draws) if len(parts) > 1 else np.zeros(draws, dtype=np.int64)
        for column, metric in enumerate(scores.metrics):
            over = counts[:, column]
            with np.errstate(invalid="ignore", divide="ignore"):
                value = float(np.mean([float(part[seen, column].sum() / over.sum()) for part in parts]))
                drawn = np.stack([(weights @ part[seen, column]) / (weights @ over) for part in parts])
            measure = Measure(value, drawn[pick, np.arange(draws)], int(over.sum()))
            yield condition, metric.name, measure
            for other in derived:
                if other.derived_from == metric.name:
                    yield condition, other.name, transformed(measure, other)


def transformed(measure: Measure, metric: Metric) -> Measure:
    """Return a derived metric's measure: the transform of a mean, and of its draws."""
    assert metric.of is not None
    with np.errstate(over="ignore"):
        return Measure(float(metric.of(measure.value)), np.asarray(metric.of(measure.draws)), measure.n)
