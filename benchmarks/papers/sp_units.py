"""Selective Pruning: what is pruned.

Feed-forward neurons against attention pre-out neurons, both together, whole heads, and directions of the SVD of W_V W_O. The
paper's number is the largest gap between what is lost of the forget and of the retain corpus along the way; here the fractions
are two, fixed beforehand.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.papers.models import SMOLLM2, skills
from benchmarks.papers.plan import Cell, Plan

SEEDS = (0, 1, 2)
WAYS: dict[str, dict[str, Any]] = {
    "feed-forward": {"site": "mlp.post"},
    "attention": {"site": "attn.z"},
    "both": {"site": ("mlp.post", "attn.z")},
    "attention, whole heads": {"site": "attn.z", "unit": "head"},
    "attention, SVD directions": {"site": "attn.z", "unit": "direction"},
}


def cells() -> Iterator[Cell]:
    """Yield a cell for each way and fraction, code forgotten."""
    for way, options in WAYS.items():
        for fraction in (0.02, 0.05):

            def rows(options: dict[str, Any] = options, fraction: float = fraction) -> Iterator[list[str]]:
                report = skills().pruned("code", SEEDS, fraction=fraction, **options)
                for condition in ("pruned", "control"):
                    yield [condition, *skills().lost(report, condition)]

            yield Cell((way, f"{fraction:.0%}"), rows)


PLAN = Plan(
    "sp-units",
    "Selective Pruning: feed-forward against attention, heads, the SVD basis",
    SMOLLM2,
    ("way", "fraction", "of", "code lost", "math lost", "prose lost"),
    cells,
)
