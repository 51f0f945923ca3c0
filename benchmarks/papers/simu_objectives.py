"""SIMU with every objective there is: the paper's gradient difference and NPO, and those that it is compared with or could be."""

from collections.abc import Iterator

from benchmarks.papers.models import MEMORIZED, TRAINED, trained
from benchmarks.papers.plan import Cell, Plan
from lens_unlearn.methods.objectives import OBJECTIVES

SEEDS = (0, 1, 2)


def cells() -> Iterator[Cell]:
    """Yield a cell for each objective, with the settings that it has by default."""
    for name in OBJECTIVES:

        def rows(name: str = name) -> Iterator[list[str]]:
            yield trained(SEEDS, loss=name)

        yield Cell((name,), rows)


PLAN = Plan("simu-objectives", "SIMU: the objectives, on the same mask", MEMORIZED, ("objective", *TRAINED), cells)
