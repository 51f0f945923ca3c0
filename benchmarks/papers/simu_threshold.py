"""SIMU, its sweep of the threshold t: how many neurons are critical, in all and by layer, and what comes of it."""

from collections.abc import Iterator
from functools import cache

import lens_unlearn as lu
from benchmarks.papers.models import MEMORIZED, TRAINED, facts, memorized, trained
from benchmarks.papers.plan import Cell, Plan

THRESHOLDS = (0.1, 0.2, 0.3, 0.5, 0.7)


@cache
def attribution() -> lu.NeuronMap:
    """Attribute the forget facts with the paper's five steps."""
    return lu.attribute(memorized(), facts("forget"), progress=False)


def cells() -> Iterator[Cell]:
    """Yield a cell for each threshold."""
    for threshold in THRESHOLDS:

        def rows(threshold: float = threshold) -> Iterator[list[str]]:
            chosen = lu.critical(attribution(), threshold)
            layers = " ".join(str(int(mask.sum())) for _, mask in chosen.items())
            yield [str(chosen.count()), layers, *trained(mask=chosen)]

        yield Cell((f"{threshold:g}",), rows)


PLAN = Plan(
    "simu-threshold",
    "SIMU: the threshold t, and the neurons that it selects, at m = 5",
    MEMORIZED,
    ("t", "neurons", "by layer", *TRAINED),
    cells,
)
