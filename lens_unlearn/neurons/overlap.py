"""How far two selections share neurons, beyond what chance gives, and how far two scores rank neurons alike.

Of n candidates at a site, of which one selection takes a and another b, two random selections of these sizes share a hypergeometric
number of neurons, with mean a b / n. Sites are drawn from independently, so that the total is distributed as the convolution of
theirs: a layer in which both select much explains what they share by that alone.

Knows boolean maps and scores; knows nothing of what was selected, or for what.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.core.intervals import LEVEL
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.maps import NeuronMap

__all__ = ["Overlap", "overlap", "rank_correlation"]

_LEAST = 1e-15  # probabilities at the ends of a distribution that are dropped


@dataclass(frozen=True)
class Overlap:
    """What two selections share, and what random selections of the same size at every site would."""

    first: int
    """Neurons that the first selects."""
    second: int
    both: int
    expected: float
    """Neurons in common, on average, of two random selections."""
    low: int
    """Random selections share as many at least, and at most `high`, with 95 %."""
    high: int
    p_more: float
    """The probability that random selections share as many as this or more."""
    p_less: float
    """Likewise as many or fewer."""

    @property
    def either(self) -> int:
        """How many neurons either selects."""
        return self.first + self.second - self.both

    @property
    def jaccard(self) -> float:
        """The share of what either selects that both select; NaN if neither selects anything."""
        return self.both / self.either if self.either else float("nan")

    @property
    def expected_jaccard(self) -> float:
        """The same where as many are in common as random selections share on average."""
        either = self.first + self.second - self.expected
        return self.expected / either if either else float("nan")

    @property
    def p(self) -> float:
        """The two-sided p-value: twice the smaller tail."""
        return min(1.0, 2 * min(self.p_more, self.p_less))


def overlap(one: NeuronMap, other: NeuronMap, candidates: NeuronMap | None = None) -> Overlap:
    """Compare two selections of one model.

    Args:
        one: A boolean map; a site that it lacks counts as unselected there.
        other: Another one.
        candidates: From which both could choose, such as the neurons that are alive; what either selects is taken to be among them.
            Default: every neuron of the sites that either has.

    Raises:
        SelectionError: If a map is no selection, or they are of different models.
    """
    for part in (one, other, candidates):
        if part is not None and not part.is_selection:
            raise SelectionError(f"{part!r} is no selection: compare the map first, as in score > 2")
    counts = [_counts(site, one, other, candidates) for site in dict.fromkeys([*one, *other])]
    first, second, both = (sum(column) for column in list(zip(*counts))[:3])
    start, chances = _in_common([(a, b, n) for a, b, _, n in counts if a and b])
    at_most = chances.cumsum()
    low, high = (start + int(np.searchsorted(at_most, share)) for share in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    expected = sum(a * b / n for a, b, _, n in counts if n)
    place = both - start  # outside where that many have next to no probability
    p_more, p_less = (min(1.0, float(part.sum())) for part in (chances[max(place, 0) :], chances[: max(place + 1, 0)]))
    return Overlap(first, second, both, expected, low, high, p_more, p_less)


def _counts(site: Site, one: NeuronMap, other: NeuronMap, candidates: NeuronMap | None) -> tuple[int, int, int, int]:
    """Return how many neurons of a site both selections and each of them have, and how many they could choose from."""
    sizes = {part[site].numel() for part in (one, other, candidates) if part is not None and site in part}
    if len(sizes) > 1:
        raise SelectionError(
            f"{site} has {' and '.join(map(str, sorted(sizes)))} neurons: compare selections of one model"
        )
    nothing = torch.zeros(sizes.pop(), dtype=torch.bool)
    a, b = (part[site].flatten() if site in part else nothing for part in (one, other))
    open_to = candidates[site].flatten() if candidates is not None and site in candidates else ~nothing
    return int(a.sum()), int(b.sum()), int((a & b).sum()), int((open_to | a | b).sum())


def _in_common(sizes: list[tuple[int, int, int]]) -> tuple[int, Float[np.ndarray, "counts"]]:
    """Return the distribution of the neurons that random selections share: its least value, and the probabilities from there on."""
    from scipy.stats import hypergeom

    start, chances = 0, np.ones(1)
    for a, b, n in sizes:
        least, most = max(0, a + b - n), min(a, b)
        start += least
        chances = np.convolve(chances, hypergeom.pmf(np.arange(least, most + 1), n, a, b))
        kept = np.flatnonzero(chances > _LEAST)  # layers of thousands of neurons: the ends are never needed
        start, chances = start + int(kept[0]), chances[kept[0] : kept[-1] + 1]
    return start, chances / chances.sum()


def rank_correlation(
    one: NeuronMap, other: NeuronMap, candidates: NeuronMap | None = None
) -> Iterator[tuple[Site | None, float, int]]:
    """Yield Spearman's correlation of two scores, and the number of neurons: over all neurons together, then at each site.

    Args:
        one: A score.
        other: Another one, of the same sites.
        candidates: Of which neurons; default all.

    Yields:
        None for all sites or the site, the correlation (NaN where a score is the same everywhere), and the neurons.
    """
    from scipy.stats import rankdata

    parts: dict[Site, tuple[np.ndarray, np.ndarray]] = {}
    for site in one:
        if site not in other or one[site].numel() != other[site].numel():
            raise SelectionError(f"{site} is not the same in both scores: compare scores of one model")
        kept = None if candidates is None or site not in candidates else candidates[site].flatten().numpy()
        a, b = (part[site].double().flatten().numpy() for part in (one, other))
        parts[site] = (a, b) if kept is None else (a[kept], b[kept])

    def spearman(a: np.ndarray, b: np.ndarray) -> float:
        if len(a) < 2 or np.ptp(x := rankdata(a)) == 0 or np.ptp(y := rankdata(b)) == 0:
            return float("nan")
        return float(np.corrcoef(x, y)[0, 1])

    whole = [np.concatenate(column) for column in zip(*parts.values())]
    yield None, spearman(*whole), len(whole[0])
    for site, (a, b) in parts.items():
        yield site, spearman(a, b), len(a)
