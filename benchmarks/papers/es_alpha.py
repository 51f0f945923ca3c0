"""Effective Skill Unlearning, its sweep of alpha: which share of each set of questions the published box withholds."""

from collections.abc import Iterator
from functools import cache

import numpy as np
from real_detection import questions, share

import lens_unlearn as lu
from benchmarks.papers.models import SMOLLM2, smollm2
from benchmarks.papers.plan import Cell, Plan

ALPHAS = (0.8, 1.0, 1.2, 1.4, 1.6, 2.0, 2.5, 3.0)
"""The paper's figures take 2.0 to forget GSM8K, and 1.4 to forget MBPP."""
SEEDS = (0, 1, 2)
SETS = ("gsm8k", "mbpp", "tofu", "xquad_en")


@cache
def keys(layer: int) -> dict[tuple[str, str, int], lu.KeySample]:
    """Return the keys of whole questions by set, part and seed: 150 to fit the box on, 100 others to ask."""
    found = {}
    for name, *parts in questions("whole", 60_000, smollm2(), 192):
        for part, corpus, count in zip(("fit", "test"), parts, (150, 100), strict=True):
            for seed in SEEDS:
                order = np.random.default_rng(seed).permutation(corpus.n_documents)[:count]
                drawn = corpus.only(order.tolist()).first(10**9)
                options = {"capacity": count, "seed": seed, "progress": False}
                found[name, part, seed] = lu.query_keys(smollm2(), drawn, lu.Site(layer, "mlp.post"), **options)
    return found


def cells() -> Iterator[Cell]:
    """Yield a cell for each set that is forgotten and each alpha, at the last layer."""
    for forgotten in SETS:
        for alpha in ALPHAS:

            def rows(forgotten: str = forgotten, alpha: float = alpha) -> Iterator[list[str]]:
                layer = int(smollm2().cfg.n_layers) - 1
                boxes = [
                    lu.key_space_detection(
                        smollm2(), keys(layer)[forgotten, "fit", seed], layer=layer, alpha=alpha, progress=False
                    )
                    for seed in SEEDS
                ]
                shares = [share(boxes, [keys(layer)[name, "test", seed] for seed in SEEDS]) for name in SETS]
                yield [f"{value:.1%} [{low:.1%}, {high:.1%}]" for value, low, high in shares]

            yield Cell((forgotten, f"{alpha:g}"), rows)


PLAN = Plan(
    "es-alpha",
    "Effective Skill Unlearning: the share withheld by alpha",
    SMOLLM2,
    ("forgotten", "alpha", *SETS),
    cells,
)
