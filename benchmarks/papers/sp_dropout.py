"""Selective Pruning: two models that differ in nothing but the dropout of their training (benchmarks/train_dropout.py)."""

from collections.abc import Iterator
from functools import cache

from record import percent
from skills import Skills

import lens_unlearn as lu
from benchmarks.papers.plan import Cell, Plan

SEEDS = (0, 1, 2)
DROPOUT = ("0", "0.1")
SITES = {"feed-forward": "mlp.post", "attention": "attn.z"}


@cache
def skills(dropout: str) -> Skills:
    """Return the skills of a model."""
    return Skills(lu.load_model(f".models/dropout-{dropout}"), test_tokens=4000, units=40)


def cells() -> Iterator[Cell]:
    """Yield a cell for each model, each skill that is forgotten, what is pruned, and each fraction."""
    for dropout in DROPOUT:
        for forgotten in ("code", "math"):
            for site in SITES:
                for fraction in (0.1, 0.2):

                    def rows(
                        dropout: str = dropout, forgotten: str = forgotten, site: str = site, fraction: float = fraction
                    ) -> Iterator[list[str]]:
                        known = skills(dropout)
                        report = known.pruned(forgotten, SEEDS, fraction=fraction, site=SITES[site])
                        before = percent(known.base["base", forgotten, "top1"])
                        for condition in ("pruned", "control"):
                            yield [condition, before, *known.lost(report, condition)]

                    yield Cell((dropout, forgotten, site, f"{fraction:.0%}"), rows)


PLAN = Plan(
    "sp-dropout",
    "Selective Pruning: the effect of dropout in training",
    "two models of 2.2 million parameters, trained with and without",
    ("dropout", "forgotten", "neurons", "fraction", "of", "top-1 before", "code lost", "math lost", "prose lost"),
    cells,
)
