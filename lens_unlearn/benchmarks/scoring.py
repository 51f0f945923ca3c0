"""From single answers and losses to a benchmark's scores, with intervals over documents or the groups they belong to.

Means go through `evaluation.bootstrap` as everywhere; what is made of several means is made of their draws, resample by resample.
Knows numbers and units; knows no benchmark.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float

from lens_unlearn.benchmarks.benchmark import Data, Item, Raw
from lens_unlearn.core.errors import CorpusError
from lens_unlearn.core.intervals import auc, weights_of, widening
from lens_unlearn.evaluation.bootstrap import Scores, estimates, over_replicates
from lens_unlearn.evaluation.metric import Metric
from lens_unlearn.evaluation.report import Measure

__all__ = ["Column", "areas", "combined", "harmonic", "left_out", "means", "of_texts", "plain"]

Values = Sequence[float] | np.ndarray


class Column:
    """One mean: which rows are in it, and what each scores under each condition.

    Args:
        name: Of the metric.
        words: What pages call it.
        units: Of each row, what is resampled whole.
        values: By condition, for each of its interventions: the score of each row, or the sum over what the row counts for.
        counts: Which rows count, under every condition alike, or for how much; default all, once.
        range: Between which numbers it lies.
    """

    def __init__(
        self,
        name: str,
        words: str,
        units: Sequence[str],
        values: Mapping[str, Sequence[Values]],
        counts: Sequence[float] | np.ndarray | None = None,
        range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.metric = Metric(name, words, range=range, unit="fraction" if range == (0.0, 1.0) else "number")
        self.units, self.values = units, values
        self.counts = np.ones(len(units)) if counts is None else np.array(counts, dtype=np.float64)


def left_out(raw: Mapping[str, Sequence[Raw]]) -> set[int]:
    """Return the items that are longer than anybody's context."""
    return {number for several in raw.values() for one in several for number in one.left_out}


def of_texts(
    data: Data,
    raw: Mapping[str, Sequence[Raw]],
    score: Callable[[Item, str], float],
    numbers: Sequence[int] | None = None,
) -> dict[str, list[list[float]]]:
    """Return by condition, for each of its interventions, what its texts score; NaN where logits were no numbers.

    Args:
        data: Whose items were asked.
        raw: What everybody wrote.
        score: Takes an item and a text.
        numbers: Of the items that are meant; default all.
    """
    mine = range(len(data.items)) if numbers is None else numbers
    return {
        name: [
            [float("nan") if (text := one.texts[n]) is None else score(data.items[n], text) for n in mine]
            for one in several
        ]
        for name, several in raw.items()
    }


def means(columns: Sequence[Column], resamples: int, seed: int) -> dict[tuple[str, str], Measure]:
    """Return the mean of each column under each condition.

    Raises:
        CorpusError: If a column has no row that counts.
    """
    found: dict[tuple[str, str], Measure] = {}
    for column in columns:
        if not column.counts.any():
            raise CorpusError(
                f"nothing is left for {column.metric.name}: there is no such row, or none that fits the model's context"
            )
        counts = column.counts[:, None]
        values = {
            name: [np.where(column.counts > 0, np.asarray(one, dtype=np.float64), 0.0)[:, None] for one in several]
            for name, several in column.values.items()
        }
        scores = Scores([column.metric], values, counts, column.units)
        found |= {(name, metric): one for name, metric, one in estimates(scores, resamples, seed)}
    return found


def combined(function: Callable[[Float[np.ndarray, "parts *draws"]], np.ndarray], parts: Sequence[Measure]) -> Measure:
    """Return what a function makes of several measures, resample by resample.

    Args:
        function: Takes numbers, the parts along the first axis.
        parts: Measures that were resampled together.
    """
    value = float(function(np.array([one.value for one in parts])))
    n, units = sum(one.n for one in parts), min((one.units for one in parts if one.units), default=0)
    replicates = max(one.replicates for one in parts)
    if len({one.draws.size for one in parts}) > 1:
        return Measure(value, np.empty(0), n, units, replicates)
    draws = np.asarray(function(np.stack([one.draws for one in parts])))
    spread = None
    if any(one.spread is not None for one in parts):
        without = [one.draws if one.spread is None else one.draws - one.spread for one in parts]
        spread = draws - np.asarray(function(np.stack(without)))
    return Measure(value, draws, n, units, replicates, spread)


def harmonic(parts: Float[np.ndarray, "parts *draws"]) -> np.ndarray:
    """Return the harmonic mean over the first axis, 0 where a part is 0.

    >>> float(harmonic(np.array([1.0, 0.5]))), float(harmonic(np.array([1.0, 0.0])))
    (0.666..., 0.0)
    """
    with np.errstate(divide="ignore"):
        return np.asarray(len(parts) / (1 / np.maximum(parts, 0)).sum(0))


def areas(
    inside: Mapping[str, Sequence[Values]],
    outside: Mapping[str, Sequence[Values]],
    units: tuple[Sequence[str], Sequence[str]],
    resamples: int,
    seed: int,
) -> dict[str, Measure]:
    """Return by condition how well losses tell members from others: the area under the ROC curve, ties half.

    Args:
        inside: By condition, for each of its interventions: the score of each member, low where the model knows it.
        outside: The same of the others.
        units: Of both sides, what is resampled whole.
        resamples: Bootstrap draws.
        seed: Seeds the bootstrap.

    Raises:
        CorpusError: If a side is empty.
    """
    if not all(units):
        raise CorpusError("membership has no rows on one side: nothing could be told apart")
    weights = [torch.from_numpy(weights_of(side, resamples, seed)) for side in units]
    sizes = [np.unique(np.array(side), return_counts=True)[1] for side in units]
    factor = max(widening(side.astype(float)) for side in sizes)
    found = {}
    for name in inside:
        own: list[tuple[float, np.ndarray]] = []
        for pair in zip(inside[name], outside[name], strict=True):
            area, drawn = auc(*(torch.tensor(side, dtype=torch.float64) for side in pair), *weights)
            own.append((area, np.clip(area + factor * (drawn.numpy() - area), 0, 1)))
        found[name] = over_replicates(own, sum(map(len, units)), min(map(len, sizes)), seed)
    return found


def plain(value: float, n: int, units: int = 0) -> Measure:
    """Return a measure without an interval, such as a p-value."""
    return Measure(value, np.empty(0), n, units)
