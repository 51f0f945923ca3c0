"""SIMU, its sweep of m, the steps of the integrated gradients: which neurons are critical, and what comes of it."""

from collections.abc import Iterator
from functools import cache

import lens_unlearn as lu
from benchmarks.papers.models import MEMORIZED, TRAINED, facts, memorized, trained
from benchmarks.papers.plan import Cell, Plan

STEPS = (1, 2, 5, 10, 20)


@cache
def selected(steps: int) -> tuple[lu.NeuronMap, float]:
    """Return the critical neurons, and the share of the answers' probability that attribution adds up to, over layers."""
    attribution = lu.attribute(memorized(), facts("forget"), steps=steps, progress=False)
    ratios = [layer.ratio for layer in attribution.completeness.values()]
    return lu.critical(attribution), sum(ratios) / len(ratios)


def cells() -> Iterator[Cell]:
    """Yield a cell for each number of steps."""
    for steps in STEPS:

        def rows(steps: int = steps) -> Iterator[list[str]]:
            (chosen, complete), (finest, _) = selected(steps), selected(STEPS[-1])
            both = sum(int((chosen[site] & finest[site]).sum()) for site in chosen)
            either = sum(int((chosen[site] | finest[site]).sum()) for site in chosen)
            yield [str(chosen.count()), f"{complete:.2f}", f"{both / either:.2f}", *trained(mask=chosen)]

        yield Cell((str(steps),), rows)


PLAN = Plan(
    "simu-steps",
    "SIMU: the steps m of the attribution, at threshold .3",
    MEMORIZED,
    ("m", "neurons", "complete to", "overlap with the last", *TRAINED),
    cells,
)
