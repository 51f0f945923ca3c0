"""SIMU, its ablation of the mask: forget-only against dual, and what the paper has no row for, random neurons and none."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import lens_unlearn as lu
from benchmarks.papers.models import MEMORIZED, TRAINED, facts, memorized, trained
from benchmarks.papers.plan import Cell, Plan

SEEDS = (0, 1, 2)
MASKS = ("dual", "forget_only", "union", "random, as many as dual", "none", "all")


@cache
def attributions() -> tuple[lu.NeuronMap, lu.NeuronMap]:
    """Attribute the facts to forget and those to retain."""
    return tuple(lu.attribute(memorized(), facts(name), progress=False) for name in ("forget", "retain"))


@cache
def mask(name: str) -> Any:
    """Return the neurons of a mask, or its name where it needs no attribution."""
    if name in ("none", "all"):
        return name
    if name.startswith("random"):
        like = lu.Ablate(mask("dual"))
        return lu.random_pruning(
            memorized(), facts("forget"), facts("retain"), like=like, seed=0, progress=False
        ).selection
    return lu.critical_mask(*attributions(), kind=name)


def cells() -> Iterator[Cell]:
    """Yield a cell for each mask; attention is trained in low rank beside it, as always."""
    for name in MASKS:

        def rows(name: str = name) -> Iterator[list[str]]:
            chosen = mask(name)
            count = {"none": 0, "all": sum(mask("dual")[site].numel() for site in mask("dual"))}
            neurons = count[name] if name in count else chosen.count()
            yield [str(neurons), *trained(SEEDS, mask=chosen)]

        yield Cell((name,), rows)


PLAN = Plan(
    "simu-masks",
    "SIMU: forget-only against dual neurons, and random ones",
    MEMORIZED,
    ("mask", "neurons", *TRAINED),
    cells,
)
