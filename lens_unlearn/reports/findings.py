"""The findings of a report: what each method removed, what it cost, and whether it beats its control.

Knows how a report's numbers become statements, and what its provenance says of a control; `templates/findings.html` knows how
they are written. Knows nothing of how a method or its control is made.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real

from lens_unlearn.evaluation.conditions import BASE, Condition, Estimate, conditions_of, families, has
from lens_unlearn.evaluation.metrics import metric as metric_of
from lens_unlearn.evaluation.report import Measure, Report, chosen_among
from lens_unlearn.reports.templating import name, render

__all__ = [
    "Finding",
    "budget_of",
    "confidence_of",
    "control_kind",
    "controls_of",
    "exceeds",
    "failures",
    "findings",
    "gave_up",
    "headline_metric",
    "retained",
    "summary",
]

FORGET, RETAIN = "forget", "retain"
SHOWN = 60


@dataclass(frozen=True)
class Finding:
    """What one condition lost, as shares of the unedited model's metric."""

    condition: Condition
    drops: dict[str, Estimate]
    selectivity: Estimate | None
    """Forget drop minus retain drop; None if the report has no corpora of these names."""
    control: "Finding | None" = None
    lead: Estimate | None = None
    """How much more selective it is than a random control; None without one."""
    retained: tuple[str, ...] = (RETAIN,)
    """The corpora of which "retain" is made, each measured for itself; "retain" where it is one."""
    best_of: int = 1
    """Out of how many strengths of a sweep this one was chosen, for its selectivity; its numbers are corrected for that."""

    @property
    def main(self) -> list[str]:
        """The corpora that the verdict is about, of those that were measured."""
        return [corpus for corpus in (FORGET, RETAIN) if corpus in self.drops]

    @property
    def rest(self) -> list[str]:
        """All other corpora, those of which "retain" is made first."""
        others = [corpus for corpus in self.drops if corpus not in (FORGET, RETAIN)]
        return sorted(others, key=lambda corpus: corpus not in self.retained)

    @property
    def worst(self) -> tuple[str, Estimate] | None:
        """The retain corpus that lost most, by its value; None where none was measured."""
        return self._most_lost([corpus for corpus in self.retained if corpus in self.drops])

    @property
    def elsewhere(self) -> tuple[str, Estimate] | None:
        """Of what is neither forgotten nor retained, the corpus that lost most; None where none was measured."""
        return self._most_lost([corpus for corpus in self.rest if corpus not in self.retained])

    def _most_lost(self, corpora: Sequence[str]) -> tuple[str, Estimate] | None:
        known = [(corpus, self.drops[corpus]) for corpus in corpora]
        defined = [one for one in known if not math.isnan(one[1].value)]
        return max(defined or known, key=lambda one: one[1].value, default=None)

    @property
    def verdict(self) -> str:
        """One of "beats", "no better", "worse", "no control", "no interval", and "" without forget and retain."""
        if self.selectivity is None:
            return ""
        if self.lead is None:
            return "no control"
        if not (math.isfinite(self.lead.low) and math.isfinite(self.lead.high)):
            return "no interval"
        if self.lead.low > 0:
            return "beats"
        return "worse" if self.lead.high < 0 else "no better"


def headline_metric(report: Report) -> str | None:
    """Return the metric to summarize by: one of which a share can be lost; None if there is none."""
    metrics = list(dict.fromkeys(metric for _, _, metric in report.measures))
    measured = {metric for condition, _, metric in report.measures if condition == BASE}
    rows = [metric_of(metric) for metric in metrics if metric in measured]
    first = sorted((row for row in rows if row.headline), key=lambda row: row.headline)
    falling = [row.name for row in (*first, *rows) if row.is_fraction and row.higher_is_better]
    return falling[0] if falling else None


def findings(report: Report, metric: str) -> list[Finding]:
    """Return one finding per method; of a sweep, that of its most selective strength."""
    conditions = conditions_of(report)
    found = []
    for method in families(conditions):
        own = [c for c in conditions if c.method == method and not c.control]
        found += [_finding(report, c, metric) for c in own if c.strength is None]
        steps = [_finding(report, c, metric) for c in own if c.strength is not None]
        if steps:
            found.append(_best(report, steps, metric))
    return [one for one in found if one.drops]


def _rank(finding: Finding) -> float:
    value = finding.selectivity.value if finding.selectivity else math.nan
    return -math.inf if math.isnan(value) else value


def _finding(report: Report, condition: Condition, metric: str) -> Finding:
    name = condition.name
    drops = {
        corpus: Estimate.of(report.drop(name, corpus, metric))
        for corpus in report.corpora
        if has(report, name, corpus, metric)
    }
    selectivity = lead = control = None
    if FORGET in drops and RETAIN in drops:
        selectivity = Estimate.of(report.selectivity(name, FORGET, RETAIN, metric))
    if not condition.control and condition.counterpart in report.conditions:
        control = _finding(report, Condition.parse(condition.counterpart), metric)
        if selectivity and control.selectivity:
            lead = Estimate.of(_lead(report, condition, metric))
    return Finding(condition, drops, selectivity, control, lead, retained(report))


def _lead(report: Report, condition: Condition, metric: str) -> Measure:
    """Return how much more selective a condition is than one more random control of the kind that was measured."""
    own, chance = (report.selectivity(name, FORGET, RETAIN, metric) for name in (condition.name, condition.counterpart))
    return own.minus(chance).beside_another()


def _best(report: Report, steps: list[Finding], metric: str) -> Finding:
    """Return the most selective strength of a sweep, with what its numbers are given that it was chosen among several."""
    best = max(steps, key=_rank)
    rivals = {one.condition.name: one for one in steps if one.selectivity and not math.isnan(one.selectivity.value)}
    if len(rivals) < 2:
        return replace(best, best_of=len(steps))
    by = {name: report.selectivity(name, FORGET, RETAIN, metric) for name in rivals}
    chosen = best.condition.name

    def corrected(measured: Mapping[str, Measure]) -> Estimate:
        return Estimate(*chosen_among(chosen, by, measured), measured[chosen].units)

    drops = {
        corpus: corrected({name: report.drop(name, corpus, metric) for name in rivals})
        if all(corpus in one.drops for one in rivals.values())
        else estimate
        for corpus, estimate in best.drops.items()
    }
    lead = best.lead
    if all(one.lead for one in rivals.values()):
        lead = corrected({name: _lead(report, one.condition, metric) for name, one in rivals.items()})
    return replace(best, drops=drops, selectivity=corrected(by), lead=lead, best_of=len(steps))


def retained(report: Report) -> tuple[str, ...]:
    """Return the corpora of which "retain" is made, of those that were measured for themselves; "retain" itself without any.

    Earlier runs did not say; theirs are the further corpora of the plan that are sources to retain as well.
    """
    said, plan = report.provenance.get("retained"), report.provenance.get("plan")
    if said is None and "forgotten" in report.provenance:  # of a comparison, where every other skill is retained
        said = [corpus for corpus in report.corpora if corpus not in (FORGET, RETAIN)]
    if said is None and isinstance(plan, Mapping):
        sources, also = plan.get("test_retain") or plan.get("retain"), plan.get("also")
        known = also.items() if isinstance(also, Mapping) and isinstance(sources, list | tuple) else ()
        said = [name for name, source in known if source in sources]
    names = said if isinstance(said, list | tuple) else ()
    return tuple(str(one) for one in names if one in report.corpora) or (RETAIN,)


def budget_of(report: Report) -> float | None:
    """Return the share that every retain corpus may lose, as a run or a comparison has it; None without one."""
    plan = report.provenance.get("plan")
    budget = report.provenance.get("retain_drop", plan.get("retain_drop") if isinstance(plan, dict) else None)
    return float(budget) if isinstance(budget, Real) else None


def confidence_of(report: Report) -> str:
    """Return with which confidence fresh documents were to keep the budget, as "90%"; "" where the run did not say."""
    plan = report.provenance.get("plan")
    known = report.provenance.get("confidence", plan.get("confidence") if isinstance(plan, dict) else None)
    return f"{100 * float(known):.3g}%" if isinstance(known, Real) else ""


def gave_up(report: Report) -> list[str]:
    """Return the methods of which no strength kept the budget, so that they changed nothing."""
    chosen = report.provenance.get("chosen")
    known = chosen.items() if isinstance(chosen, Mapping) else ()
    return [str(method) for method, choice in known if isinstance(choice, Mapping) and "nothing" in choice]


def failures(report: Report) -> dict[str, str]:
    """Return what a run could not do, and why, by method or part."""
    failed = report.provenance.get("failed")
    return {str(what): str(why) for what, why in failed.items()} if isinstance(failed, Mapping) else {}


def exceeds(finding: Finding, budget: float) -> bool:
    """Say whether a method lost more than it may on the retain corpus that lost most, by its value."""
    return finding.worst is not None and finding.worst[1].value > budget


def summary(report: Report) -> str:
    """Return the summary as HTML: a sentence on what was measured, and a list item per method; "" if there is none."""
    metric = headline_metric(report)
    found = findings(report, metric) if metric else []
    if not metric or not found:
        return ""
    reached = [(c, report[BASE, c, metric].value) for c in report.corpora if (BASE, c, metric) in report.measures]
    budget, made = budget_of(report), _made(report)
    items = [
        {
            "finding": one,
            "control": control_kind(report, one),
            "exceeds": budget is not None and one.selectivity is not None and exceeds(one, budget),
            "made": made.get(one.condition.name),
        }
        for one in found[:SHOWN]
    ]
    return render(
        "findings.html", metric=metric, reached=reached, budget=budget, items=items, more=len(found) - len(items)
    )


def controls_of(report: Report) -> dict[str, str]:
    """Return what the control of each method is, in words, as far as whoever made them wrote it into the provenance."""
    known = report.provenance.get("controls")
    return {str(method): str(words) for method, words in known.items()} if isinstance(known, Mapping) else {}


def control_kind(report: Report, finding: Finding) -> str:
    """Say what a method's control is, between commas; "" where the report does not know."""
    words = controls_of(report).get(finding.condition.method)
    if not words:
        return ""
    counterpart = finding.condition.counterpart
    draws, dealt = _count(str(_made(report).get(counterpart, ""))), report.provenance.get("dealt")
    each = ", each on documents of its own" if isinstance(dealt, list) and counterpart in dealt else ""
    return f", {name(words, 200)}{f' (mean of {draws} draws{each})' if draws > 1 else ''},"


def _made(report: Report) -> Mapping[str, object]:
    """Return what was measured under the name of each condition: an intervention, or several, as they print themselves."""
    made = report.provenance.get("conditions")
    return made if isinstance(made, Mapping) else {}


def _count(made: str) -> int:
    """Count interventions that print themselves as a list, or as one alone."""
    if made[:1] not in ("[", "("):
        return 1
    depth, commas = 0, 0
    for character in made[1:-1].rstrip(","):  # an intervention has commas too, but all of them inside of its brackets
        depth += (character in "([{") - (character in ")]}")
        commas += character == "," and depth == 0
    return commas + 1
