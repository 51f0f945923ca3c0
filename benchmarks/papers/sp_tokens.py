"""Selective Pruning, its tables of top-1 and top-10 accuracy, with all tokens and without the 50 commonest of the corpus."""

from collections.abc import Iterator

from benchmarks.papers.models import SMOLLM2, skills
from benchmarks.papers.plan import Cell, Plan

SEEDS = (0, 1, 2)
METRICS = {"top1": "top-1", "top10": "top-10", "top1_rare": "top-1, without the 50 commonest"}


def cells() -> Iterator[Cell]:
    """Yield a cell for each skill that is forgotten, at 2 % of the feed-forward neurons."""
    for skill in ("code", "math", "prose"):

        def rows(skill: str = skill) -> Iterator[list[str]]:
            report = skills().pruned(skill, SEEDS, fraction=0.02)
            for metric, name in METRICS.items():
                for condition in ("pruned", "control"):
                    yield [name, condition, *skills().lost(report, condition, metric)]

        yield Cell((skill,), rows)


PLAN = Plan(
    "sp-tokens",
    "Selective Pruning: top-1 and top-10, and without the 50 commonest tokens",
    SMOLLM2,
    ("forgotten", "accuracy", "of", "code lost", "math lost", "prose lost"),
    cells,
)
