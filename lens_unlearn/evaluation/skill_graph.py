"""`SkillGraph`: which skill's removal costs which other beyond chance, where they are, and how far they share neurons.

Knows what was measured with each skill removed and with as much removed at random, and which neurons that were; knows nothing of
how they were found.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from lens_unlearn.core.counter_rng import key_of
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.core.intervals import simultaneous
from lens_unlearn.evaluation.conditions import SUFFIX, Estimate, require_falling, tenths
from lens_unlearn.evaluation.metrics import words
from lens_unlearn.evaluation.report import BASE, Measure, Report, harmless
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.overlap import overlap, rank_correlation

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Cost", "SkillGraph"]

ALL = "all"
"""What tables call all sites, or all layers, together."""
BY_LAYER = "shares by layer"
"""What the table of correlations calls that of the shares of two selections over the layers."""
MARK = "*"


@dataclass(frozen=True)
class Cost:
    """What the removal of one skill costs another, or itself, as shares of the unedited model's accuracy."""

    removed: str
    measured: str
    drop: Estimate
    """The share that is lost with the skill's neurons removed, with an interval of its own."""
    chance: Estimate
    """The share that is lost with as many random neurons removed, on average over the seeds; likewise."""
    beyond: Estimate
    """The difference, drop - chance. Between two skills its interval is one of those that hold all of them at once."""

    @property
    def own(self) -> bool:
        """Whether it is the removed skill itself that was measured."""
        return self.removed == self.measured

    @property
    def certain(self) -> bool:
        """Whether the interval of the difference excludes 0."""
        return self.beyond.low > 0 or self.beyond.high < 0

    @property
    def is_edge(self) -> bool:
        """Whether the removal of one skill costs another more than chance does."""
        return self.beyond.low > 0 and not self.own


@dataclass(frozen=True, eq=False, repr=False)
class SkillGraph:
    """Where skills depend on each other.

    The cost of removing skill i to skill j is the share of j's accuracy that is lost less the share that is lost with as many
    random neurons of every layer removed. Its interval covers other test documents and other random neurons: whether it excludes 0
    says whether the neurons of skill i could be any. The intervals of all costs between different skills hold at once with 95 %
    (`lens_unlearn.core.intervals.simultaneous`); a skill's cost to itself has an interval of its own.

    A method that spares what it retains takes neurons that matter less than chance to the others, so costs may well be negative.
    """

    report: Report
    """What was measured: conditions are the skills, each removed, and "SKILL:control"; corpora are the skills."""
    selections: dict[str, NeuronMap] = field(default_factory=dict)
    """The neurons that were removed with each skill; none for a method that selects none."""
    scores: dict[str, NeuronMap] = field(default_factory=dict)
    """What the method ranked neurons by, for each skill; none for a method without a score."""
    candidates: NeuronMap | None = None
    """The neurons that could have been selected: those that are alive on any of the skills, where that is known."""
    metric: str = "top1"
    """Of what shares are lost."""
    interventions: dict[str, Intervention] = field(default_factory=dict)
    """What removes each skill."""

    def __post_init__(self) -> None:
        require_falling(self.report, tuple(self.skills), self.metric, "a skill graph")

    @property
    def skills(self) -> list[str]:
        """The skills, in order."""
        return [name for name in self.report.conditions if name != BASE and not name.endswith(SUFFIX)]

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the numbers come from."""
        return self.report.provenance

    def beyond_chance(self, removed: str, measured: str) -> Measure:
        """Return the drop with a skill removed less that with as much removed at random, paired over documents.

        Its draws are those of the difference to one more random control, not to the mean over those that there are: a selection
        that is itself random differs from that mean as well. The controls of different skills are drawn independently.

        Raises:
            LensUnlearnError: If there is no such skill.
        """
        for name in (removed, measured):
            if name not in self.skills:
                raise LensUnlearnError(
                    f"there is no skill {name!r} in this graph: choose from {', '.join(self.skills)}"
                )
        drop, chance = (self.report.drop(name, measured, self.metric) for name in (removed, f"{removed}{SUFFIX}"))
        found = drop.minus(chance).beside_another()
        if found.spread is None:
            return found
        # A report gives every condition the same contrasts of seeds. These controls share none, so each skill's are dealt anew.
        order = np.random.default_rng(key_of("skill graph", removed) % 2**63).permutation(found.spread.size)
        spread = found.spread[order]
        return replace(found, draws=found.draws - found.spread + spread, spread=spread)

    @cached_property
    def costs(self) -> dict[tuple[str, str], Cost]:
        """Every cost, by the removed and the measured skill."""
        found = {(i, j): self.beyond_chance(i, j) for i in self.skills for j in self.skills}
        ends = {pair: measure.interval() for pair, measure in found.items()}
        between = [pair for pair in found if pair[0] != pair[1]]
        resamples = max((found[pair].draws.size for pair in between), default=0)
        known = [pair for pair in between if found[pair].draws.size == resamples and not found[pair].few]
        if known and resamples:
            values = np.array([found[pair].value for pair in known])
            low, high = simultaneous(values, np.stack([found[pair].draws for pair in known]))
            ends |= {pair: (float(a), float(b)) for pair, a, b in zip(known, low, high, strict=True)}
        return {
            (i, j): Cost(
                i,
                j,
                Estimate.of(self.report.drop(i, j, self.metric)),
                Estimate.of(self.report.drop(f"{i}{SUFFIX}", j, self.metric)),
                Estimate(measure.value, *ends[i, j], measure.units),
            )
            for (i, j), measure in found.items()
        }

    @property
    def edges(self) -> list[Cost]:
        """The costs beyond chance between different skills, largest first."""
        return sorted((c for c in self.costs.values() if c.is_edge), key=lambda c: -c.beyond.value)

    def to_frame(self) -> "pd.DataFrame":
        """Give one row per removed and measured skill.

        The columns are removed, measured, drop, drop_low, drop_high, chance, chance_low, chance_high, cost = drop - chance, low,
        high, joint (whether low and high are of those that hold all at once), certain (whether they exclude 0), and units, the
        number of documents or groups.
        """
        import pandas as pd

        rows = []
        for one in self.costs.values():
            ends = [end for part in (one.drop, one.chance, one.beyond) for end in (part.value, part.low, part.high)]
            rows.append([one.removed, one.measured, *ends, not one.own, one.certain, one.beyond.units])
        numbers = [name + end for name in ("drop", "chance") for end in ("", "_low", "_high")]
        names = ["removed", "measured", *numbers, "cost", "low", "high", "joint", "certain", "units"]
        return pd.DataFrame(rows, columns=pd.Index(names))

    def overlaps(self) -> "pd.DataFrame":
        """Give one row per pair of skills and site, and one for all sites: how far they share neurons, beside chance.

        The columns are a, b, site, first and second (neurons of each), both, jaccard, expected (in common, of random selections of
        these sizes in every layer, among the candidates), expected_low, expected_high (95 % of them), expected_jaccard, p
        (two-sided, hypergeometric), and p_joint (times the number of comparisons of its kind: Bonferroni).
        """
        import pandas as pd

        rows: list[list[Any]] = []
        for a, b in combinations(self.selections, 2):
            one, other = self.selections[a], self.selections[b]
            sites = sorted({*one, *other}, key=lambda site: (site.kind, site.layer))
            pairs = len(self.selections) * (len(self.selections) - 1) // 2
            for name, part, times in ((ALL, sites, pairs), *((str(s), [s], pairs * len(sites)) for s in sites)):
                if not all(any(site in selection for site in part) for selection in (one, other)):
                    continue
                mine, theirs = (s[[site for site in part if site in s]] for s in (one, other))
                x = overlap(mine, theirs, self.candidates)
                counts = [x.first, x.second, x.both, x.jaccard, x.expected, x.low, x.high, x.expected_jaccard]
                rows.append([a, b, name, *counts, x.p, min(1.0, x.p * times)])
        names = ["first", "second", "both", "jaccard", "expected", "expected_low", "expected_high", "expected_jaccard"]
        return pd.DataFrame(rows, columns=pd.Index(["a", "b", "site", *names, "p", "p_joint"]))

    def correlations(self) -> "pd.DataFrame":
        """Give Spearman's correlation of the scores of each pair of skills: over all neurons, and at each site.

        A further row, "shares by layer", correlates the shares of two selections over the layers of every kind of site. The columns
        are a, b, site, spearman, n (neurons, or layers).
        """
        import pandas as pd

        rows: list[list[Any]] = []
        for a, b in combinations(self.skills, 2):
            if a in self.scores and b in self.scores:
                found = rank_correlation(self.scores[a], self.scores[b], self.candidates)
                rows += [[a, b, ALL if site is None else str(site), value, n] for site, value, n in found]
            if a in self.selections and b in self.selections:
                value, n = _correlation(*(dict(self.selections[name].per_layer()) for name in (a, b)))
                rows.append([a, b, BY_LAYER, value, n])
        return pd.DataFrame(rows, columns=pd.Index(["a", "b", "site", "spearman", "n"]))

    def ratios(self) -> "pd.DataFrame":
        """Give one row per skill, region (kind of site) and layer, and one for all layers of a region.

        The columns are skill, region, layer (a number, or "all"), selected, neurons, ratio = selected / neurons, and share =
        selected / all that the skill's selection has.
        """
        import pandas as pd

        rows: list[list[Any]] = []
        for skill, selection in self.selections.items():
            whole = max(selection.count(), 1)
            for kind in selection.kinds:
                parts = {ALL: selection[kind]} | {site.layer: selection[[site]] for site in selection[kind]}
                for layer, part in parts.items():
                    count, neurons = part.count(), part.numel()
                    rows.append([skill, kind, layer, count, neurons, count / neurons, count / whole])
        columns = ["skill", "region", "layer", "selected", "neurons", "ratio", "share"]
        return pd.DataFrame(rows, columns=pd.Index(columns))

    def table(self) -> "pd.DataFrame":
        """Give a small table for reading: removed skills by measured ones, what is lost beyond chance, "cost [low, high]".

        Where the interval excludes 0 there is an asterisk.
        """
        import pandas as pd

        rows = {i: {j: written(self.costs[i, j]) for j in self.skills} for i in self.skills}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index="removed", columns="measured")

    def csv(self) -> str:
        """Return `to_frame` as CSV, in which a spreadsheet finds nothing to run."""
        frame = self.to_frame()
        for column in ("removed", "measured"):
            frame[column] = [harmless(name) for name in frame[column]]
        return frame.to_csv(index=False)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page that opens offline: the graph, a sentence an edge, the tables, and the settings."""
        from lens_unlearn.core.artefacts import replace_file
        from lens_unlearn.reports.skill_graph_page import skill_graph_page

        replace_file(path, skill_graph_page(self).encode(errors="backslashreplace"))

    @property
    def _title(self) -> str:
        by = f" by {self.provenance['method']}" if self.provenance.get("method") else ""
        return f"{len(self.skills)} skills{by}; shares of {words(self.metric)} lost beyond chance, joint 95 % intervals"

    def __repr__(self) -> str:
        return f"SkillGraph({self._title})\n{self.table().to_string()}"

    def _repr_html_(self) -> str:
        import html

        return f"<div>{self.table().to_html()}<p><small>{html.escape(self._title)}</small></p></div>"


def written(cost: Cost) -> str:
    """Write a cost with its interval, and an asterisk where that excludes 0."""
    one = cost.beyond
    if np.isnan(one.value):
        return "not defined"
    ends = f"{tenths(one.low)}, {tenths(one.high)}" if np.isfinite(one.low) else one.ends("")
    return f"{tenths(one.value)}% [{ends}]{MARK if cost.certain else ''}"


def _correlation(one: dict[Site, float], other: dict[Site, float]) -> tuple[float, int]:
    """Return Spearman's correlation of the shares of two selections over their sites, and how many these are."""
    from scipy.stats import spearmanr

    sites: Sequence[Site] = sorted({*one, *other})
    shares = [[part.get(site, 0.0) for site in sites] for part in (one, other)]
    if len(sites) < 2 or any(len(set(part)) < 2 for part in shares):
        return float("nan"), len(sites)
    return float(np.asarray(spearmanr(shares[0], shares[1]))[0]), len(sites)
