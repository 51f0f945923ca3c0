r"""How often a budget is broken on fresh documents by what `tune` chooses, and by the strength a point estimate would choose.

    python benchmarks/budgets.py --models ../shared/models/skillmix --texts ../shared/data/skillmix_heldout

Simulated: documents whose true loss at every strength is known go through the same bootstrap, bound and search as in `tune`; in a
fifth of the runs a document loses everything or nothing, as where a method abstains. Real: methods forget skills of the embedded
demo model and of a model on disk; retain corpora are tuned on documents of their own, and fresh documents, as many, come from the
same sources. A budget is broken where any retain corpus loses more than it. The point estimate is the rule that `tune` had before:
the strength that forgets most while all retain texts together lose no more than the budget, on the same documents and grid.

Prints a table, and writes every run into benchmarks/outputs/budgets.json.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lens_unlearn as lu
from lens_unlearn.core.errors import BudgetError
from lens_unlearn.evaluation.bootstrap import Scores, estimates
from lens_unlearn.evaluation.metrics import metric
from lens_unlearn.evaluation.report import BASE, Measure, Report
from lens_unlearn.methods.budget import CONFIDENCE, strengths_from, upper_bound, within

BUDGET = 0.05
OUT = Path(__file__).parent / "outputs" / "budgets.json"
RULES = ("bound", "point estimate")
TOP1 = metric("top1")


@dataclass
class Run:
    """One search: by rule, which strength was chosen, and by retain corpus what it loses."""

    name: str
    chosen: dict[str, float | None] = field(default_factory=dict)
    """None where no strength was found to keep the budget."""
    fresh: dict[str, list[float]] = field(default_factory=dict)
    """On fresh documents, by retain corpus."""
    true: dict[str, list[float]] = field(default_factory=dict)
    """Known of simulated documents alone."""
    together: dict[str, float] = field(default_factory=dict)
    """On the fresh documents of all retain corpora."""
    forgotten: dict[str, float] = field(default_factory=dict)
    """On fresh documents to forget; known of real ones alone."""


# --- simulated documents --------------------------------------------------------------------------------------------------


@dataclass
class Documents:
    """Documents of one source: how many tokens each predicts right unedited, and what it loses at a strength."""

    right: np.ndarray
    tokens: np.ndarray
    lost: Callable[[float], np.ndarray]

    def report(self, strength: float) -> Measure:
        """Return the share that is lost, with bootstrap draws paired with the unedited model."""
        values = {BASE: self.right, "edit": self.right - self.lost(strength)}
        scores = Scores([TOP1], {name: [v[:, None]] for name, v in values.items()}, self.tokens[:, None])
        report = Report({(name, "retain", m): one for name, m, one in estimates(scores, 1000, 0)})
        return report.drop("edit", "retain")

    def share(self, strength: float) -> float:
        """Return the share of what was right that is lost."""
        return float(self.lost(strength).sum() / self.right.sum())


@dataclass
class Source:
    """Where simulated documents come from: a curve of the true loss over strength, and how documents differ."""

    curve: Callable[[float], float]
    spread: float
    """Of the documents' own factor on the loss, gamma with mean 1: its standard deviation. Infinite: all or nothing."""
    gains: float
    """Tokens that become right, for each token that is lost."""
    length: float
    accuracy: float

    def true(self, strength: float) -> float:
        """Return the expected share that is lost."""
        if np.isinf(self.spread):
            return self.curve(strength)
        factors = np.random.default_rng(0).gamma(self.spread**-2, self.spread**2, 100_000)
        return float(np.minimum(1, self.curve(strength) * factors).mean()) * (1 - self.gains)

    def draw(self, count: int, random: np.random.Generator) -> Documents:
        """Draw documents: the tokens of each have thresholds of their own, so a stronger edit loses those of a weaker and more."""
        tokens = np.maximum(4, random.lognormal(np.log(self.length), 0.6, count)).astype(int)
        right = np.maximum(1, random.binomial(tokens, random.beta(10 * self.accuracy, 10 * (1 - self.accuracy), count)))
        if np.isinf(self.spread):
            at = random.uniform(size=count)
            return Documents(right.astype(float), tokens.astype(float), lambda s: right * (at < self.curve(s)))
        factors = random.gamma(self.spread**-2, self.spread**2, count)
        lost_at, gained_at = ([random.uniform(size=n) for n in right] for _ in "12")

        def lost(strength: float) -> np.ndarray:
            rate = np.minimum(1, self.curve(strength) * factors)
            return np.array(
                [
                    float((lose < r).sum()) - float((gain < self.gains * r).sum())
                    for lose, gain, r in zip(lost_at, gained_at, rate, strict=True)
                ]
            )

        return Documents(right.astype(float), tokens.astype(float), lost)


def simulated(number: int) -> Run:
    """Search on simulated documents, and look at others from the same sources."""
    random = np.random.default_rng(number)
    at_once = number % 5 == 4
    edge, power = np.exp(random.uniform(np.log(0.01), np.log(0.8))), random.uniform(0.7, 2.5)
    sources = []
    for _ in range(int(random.integers(1, 4))):
        dear = random.uniform(0.3, 1.0) if sources else 1.0
        curve = (lambda dear: lambda s: min(1.0, BUDGET * dear * (s / edge) ** power))(dear)
        spread = np.inf if at_once else random.uniform(0.2, 1.5)
        sources.append(
            Source(curve, spread, random.uniform(0, 0.6), random.choice([20, 60, 150]), random.uniform(0.2, 0.7))
        )
    counts = [int(random.choice([50, 100, 200] if at_once else [15, 30, 50, 100])) for _ in sources]
    tuning, fresh = ([s.draw(n, random) for s, n in zip(sources, counts, strict=True)] for _ in "12")
    grid, run = strengths_from(0.005), Run(f"simulated {number}{', all or nothing' if at_once else ''}")
    known: dict[float, list[Measure]] = {}

    def measured(strength: float) -> list[Measure]:
        return known.setdefault(strength, [part.report(strength) for part in tuning])

    def bound(strength: float) -> float:
        return max(upper_bound(d, n, at_once=at_once) for d, n in zip(measured(strength), counts, strict=True))

    def pooled(strength: float) -> float:
        return _pooled(tuning, strength)

    for rule, cost in zip(RULES, (bound, pooled), strict=True):
        passed = within(grid, cost, BUDGET, 10)
        run.chosen[rule] = chosen = passed[-1] if passed else None
        if chosen is not None:
            run.fresh[rule] = [part.share(chosen) for part in fresh]
            run.true[rule] = [source.true(chosen) for source in sources]
            run.together[rule] = _pooled(fresh, chosen)
    return run


def _pooled(documents: Sequence[Documents], strength: float) -> float:
    return sum(float(d.lost(strength).sum()) for d in documents) / sum(float(d.right.sum()) for d in documents)
