"""From scores of documents or questions to measures: values, and bootstrap draws that all conditions, corpora and runs share.

Knows units that are resampled and what each adds to a mean; knows nothing of where scores come from.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

from lens_unlearn.core.counter_rng import key_of
from lens_unlearn.core.intervals import effective, weights_of, widening
from lens_unlearn.evaluation.metric import Metric
from lens_unlearn.evaluation.report import BASE, Measure

__all__ = ["WEIGHTS", "Scores", "estimates", "over_dealt", "over_replicates", "transformed"]

WEIGHTS = "exponential, from the key of each unit"
"""How units are resampled, for a report's provenance."""
_BLOCK = 4096  # units whose weights are held at a time


@dataclass
class Scores:
    """What the documents or questions of one corpus add to the means of some metrics, under every condition.

    Attributes:
        metrics: The metrics, in order.
        values: By condition, for each of its interventions: sums of each metric over a document or question.
        counts: How much each document or question counts in each metric: tokens, rows or answers.
        units: For each document or question the key of its unit, which is resampled whole. Empty: each is a unit of its own.
        dealt: By condition of which each document was read under one of several interventions: for each document, which; the same
            for all of a unit. Its `values` are one table then.
    """

    metrics: Sequence[Metric]
    values: dict[str, list[Float[np.ndarray, "documents metrics"]]]
    counts: Float[np.ndarray, "documents metrics"]
    units: Sequence[str] = ()
    dealt: Mapping[str, Int[np.ndarray, "documents"]] = field(default_factory=dict)

    def by_unit(self) -> "Scores":
        """Return what whole units add."""
        if not self.units:
            return replace(self, units=tuple(map(str, range(len(self.counts)))))
        keys = list(dict.fromkeys(self.units))
        place = {key: number for number, key in enumerate(keys)}
        of = np.array([place[key] for key in self.units], dtype=np.int64)

        def together(table: np.ndarray) -> np.ndarray:
            sums = np.zeros((len(keys), table.shape[1]))
            np.add.at(sums, of, table)
            return sums

        values = {name: [together(part) for part in parts] for name, parts in self.values.items()}
        first = [self.units.index(key) for key in keys] if self.dealt else []
        dealt = {name: of_documents[first] for name, of_documents in self.dealt.items()}
        return Scores(self.metrics, values, together(self.counts), keys, dealt)


def estimates(
    scores: Scores,
    resamples: int,
    seed: int,
    derived: Sequence[Metric] = (),
    *,
    judging: Collection[str] = (),
    base: Mapping[str, Measure] | None = None,
    name: str = "",
) -> Iterator[tuple[str, str, Measure]]:
    """Turn sums per document or question into values and bootstrap draws; all conditions share the resampled units.

    A metric is the ratio of two sums over units, so each draw is the ratio of two weighted sums, moved away from the value by
    `widening`. Of a condition with several interventions, the value is the mean over them, and so is each draw, plus what the
    choice of interventions adds; see `over_replicates`. Where they were dealt over the documents, see `over_dealt`.

    Args:
        scores: What documents or questions add.
        resamples: How many draws.
        seed: Seeds the weights of the units in every draw.
        derived: Metrics that transform the means of others among these.
        judging: Conditions that act on the texts alone that a detector finds, so that a text is changed as a whole or not at all.
        base: By metric: the unedited model's measures, where it is not among the conditions; what is lost is a share of these.
        name: Of the corpus, where `judging` names any.

    Yields:
        Condition, metric and measure.
    """
    whole = scores.by_unit()
    parts = [(condition, part) for condition, own in whole.values.items() for part in own]
    resampled = _resampled([whole.counts, *(part for _, part in parts)], whole.units, resamples, seed)
    for column, metric in enumerate(whole.metrics):
        counts = whole.counts[:, column]
        units, total, factor = int((counts > 0).sum()), counts.sum(), widening(counts)
        sums: dict[str, list[tuple[float, np.ndarray]]] = {condition: [] for condition in whole.values}
        for (condition, part), drawn in zip(parts, resampled[1:], strict=True):
            value = _ratio(part[:, column].sum(), total)
            draws = value + factor * (_ratio(drawn[:, column], resampled[0][:, column]) - value)
            if metric.is_fraction and value in (0.0, 1.0) and (condition != BASE or metric.higher_is_better):
                draws = abs(value - _unseen(units, resamples, seed))
            sums[condition].append((float(value), draws))
        unedited = (base or {}).get(metric.name)
        for condition, own in sums.items():
            measure = over_replicates(own, int(total), units, seed)
            if condition in whole.dealt:
                assert unedited is not None, "the unedited model stands before what was dealt"
                more = whole.values[condition][0][:, column] - whole.values[BASE][0][:, column]
                measure = over_dealt(measure, unedited, more, counts, whole.dealt[condition], seed)
            if metric.unit:  # of a task's own metric nobody knows the range
                measure = replace(measure, draws=np.clip(measure.draws, *metric.range))
            unedited = measure if condition == BASE else unedited
            if condition in judging and unedited is not None and metric.is_fraction and metric.higher_is_better:
                measure = _with_unseen(measure, unedited, effective(counts), f"{condition} {name}", seed)
            yield condition, metric.name, measure
            for other in derived:
                if other.derived_from == metric.name:
                    yield condition, other.name, transformed(measure, other)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(top) / bottom


def _resampled(
    tables: Sequence[Float[np.ndarray, "units metrics"]], units: Sequence[str], draws: int, seed: int
) -> list[Float[np.ndarray, "draws metrics"]]:
    """Return the weighted sums over units of several tables."""
    sums = [np.zeros((draws, table.shape[1])) for table in tables]
    for start in range(0, len(units), _BLOCK):
        weights = weights_of(units[start : start + _BLOCK], draws, seed)
        for table, into in zip(tables, sums, strict=True):
            # Column by column: a product of matrices may round a column in another way when it has other neighbours, and equal
            # conditions are to have equal draws, whatever they are evaluated beside.
            for column, values in enumerate(table[start : start + _BLOCK].T):
                into[:, column] += weights @ np.ascontiguousarray(values)
    return sums


def _with_unseen(measure: Measure, base: Measure, units: float, use: str, seed: int) -> Measure:
    """Return a share that units lose as a whole or keep, with draws of what units that were not seen may lose or keep.

    Where a detector found none of n units, or all of them, the bootstrap says that the next one is never found, or always; of few
    that were found it knows too little of either end. So half a unit that lost everything and half a unit that lost nothing are
    resampled with the n, whose weights are Gamma variables: of units that count alike, the share that is lost then has Jeffreys'
    posterior, Beta(found + 1/2, n - found + 1/2).

    Args:
        measure: Of a condition that acts on what a detector finds.
        base: The same of the unedited model, of the same units.
        units: n; of units that do not count alike, the effective number.
        use: Condition and corpus: what is lost of one says nothing of another.
        seed: Of the draws.
    """
    from scipy.stats import gamma

    if not units or measure.draws.size != base.draws.size or not (base.draws > 0).all():
        return measure
    uniforms = _uniforms(use, 3, base.draws.size, seed)
    seen, lost, kept = (gamma.ppf(uniforms[:, i], shape) for i, shape in enumerate((units, 0.5, 0.5)))
    share = measure.draws / base.draws if measure.value else 0.0  # its draws are `_unseen` ones already
    share = (seen * share + kept) / (seen + lost + kept)
    return replace(measure, draws=base.draws * share, seen=measure.draws)


def _unseen(units: int, draws: int, seed: int) -> Float[np.ndarray, "draws"]:
    """Draw shares of which n units showed nothing: from Beta(1/2, n + 1/2), Jeffreys' posterior of 0 of n.

    A bootstrap of units that are all alike would draw the same share again and again: an interval of no width.
    """
    from scipy.stats import beta

    return beta.ppf(_uniforms("unseen", 1, draws, seed)[:, 0], 0.5, units + 0.5)


def _uniforms(use: str, columns: int, draws: int, seed: int) -> Float[np.ndarray, "draws columns"]:
    """Return evenly spread numbers in (0, 1), a function of their use and the seed: scrambled Sobol points.

    Student's tails for few seeds are long, and quantiles of some hundred independent draws would be off by a tenth.
    """
    from scipy.stats.qmc import Sobol

    points = Sobol(columns, rng=np.random.default_rng(key_of(use, seed, columns) % 2**63)).random_base2(
        max(draws - 1, 0).bit_length()
    )
    return np.clip(points[:draws], 2.0**-25, 1 - 2.0**-25)


def over_replicates(own: Sequence[tuple[float, np.ndarray]], n: int, units: int, seed: int) -> Measure:
    """Return the mean over several interventions, such as random controls with different seeds.

    With m_s the value of intervention s out of S, each draw is the mean of the interventions' draws plus sum_s c_s m_s. The c are
    random contrasts: their sum is 0, and sum_s c_s m_s is distributed as t_(S-1) sd(m) / sqrt(S), Student's error of a mean. Every
    corpus, metric and condition has the same contrasts in the same draw, so where two corpora move together from seed to seed,
    their difference does not move.

    Args:
        own: Of each intervention the value, and its draws.
        n: Tokens, rows or answers behind it.
        units: Resampled units behind it.
        seed: Of the contrasts.
    """
    values, draws = np.array([value for value, _ in own]), np.stack([drawn for _, drawn in own])
    count, spread = len(own), None
    if count > 1:
        spread = _contrasts(count, draws.shape[1], seed) @ (values - values.mean())
    drawn = draws.mean(0) if spread is None else draws.mean(0) + spread
    return Measure(float(values.mean()), drawn, n, units, count, spread)


def over_dealt(
    pooled: Measure,
    base: Measure,
    more: Float[np.ndarray, "units"],
    counts: Float[np.ndarray, "units"],
    dealt: Int[np.ndarray, "units"],
    seed: int,
) -> Measure:
    """Return the mean over several interventions that the units were dealt to: each unit was read under one of them.

    The units of an intervention are a sample of their own, and so the S differences to the unedited model,
    d_s = sum_s (m - b) / sum_s n, are independent: what they differ by is due to interventions and units together. With w_s the
    share of the tokens in sample s, each draw is the unedited model's, plus the pooled difference, plus sum_s c_s d_s times
    sqrt(S sum_s w_s^2), with the contrasts c of `over_replicates`: Student's error of a mean of S.

    Args:
        pooled: The condition's value over all units.
        base: The unedited model's measure.
        more: Of each unit, what its sum differs by from that of the unedited model.
        counts: How much each unit counts.
        dealt: Which intervention each unit was read under.
        seed: Of the contrasts.
    """
    numbers = dealt[counts > 0]
    of = [dealt == number for number in np.unique(numbers)]
    tokens = np.array([counts[units].sum() for units in of])
    differences = np.array([more[units].sum() for units in of]) / tokens
    count = len(of)
    if count < 2:  # one intervention read all that counts
        return pooled
    factor = np.sqrt(count * np.square(tokens / tokens.sum()).sum())
    spread = factor * (_contrasts(count, base.draws.shape[0], seed) @ (differences - differences.mean()))
    return replace(pooled, draws=base.draws + (pooled.value - base.value) + spread, replicates=count, spread=spread)


@lru_cache(maxsize=8)
def _contrasts(count: int, draws: int, seed: int) -> Float[np.ndarray, "draws count"]:
    """Return the contrasts of so many interventions, which every corpus, metric and condition shares."""
    from scipy.stats import chi2, norm

    uniforms = _uniforms("replicates", count + 1, draws, seed)
    normal = norm.ppf(uniforms[:, 1:])
    freedom = count - 1
    student = np.sqrt(freedom / chi2.ppf(uniforms[:, :1], freedom))
    return student * (normal - normal.mean(1, keepdims=True)) / np.sqrt(count * freedom)


def transformed(measure: Measure, metric: Metric) -> Measure:
    """Return a derived metric's measure: the transform of a mean, and of its draws."""
    of = metric.of
    assert of is not None
    with np.errstate(over="ignore"):
        draws = np.asarray(of(measure.draws))
        spread = None if measure.spread is None else draws - np.asarray(of(measure.draws - measure.spread))
        return replace(measure, value=float(of(measure.value)), draws=draws, spread=spread)
