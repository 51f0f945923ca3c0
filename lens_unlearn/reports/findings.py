"""The report in words: what each method took away, what it cost, and whether it beats its control."""

import math
from dataclasses import dataclass
from html import escape
from numbers import Real

from lens_unlearn.evaluation.conditions import (
    BASE,
    FRACTIONS,
    PREFERRED,
    RISING,
    Condition,
    Estimate,
    conditions_of,
    families,
    has,
    words,
)
from lens_unlearn.evaluation.report import Report

__all__ = ["Finding", "budget_of", "exceeds", "findings", "headline_metric", "summary"]

FORGET, RETAIN = "forget", "retain"
SHOWN = 60
CONTROL_KINDS = {
    "Ablate(": "as many random neurons of every layer",
    "Adjust(": "as many random neurons of every layer",
    "Abstain(": "the same method fitted to shuffled labels",
    "Delta(": "random updates of the same norm",
}
"""What a control is, by how its intervention is written in a report's provenance."""


@dataclass(frozen=True)
class Finding:
    """What one condition lost, as shares of the unedited model's metric."""

    condition: Condition
    drops: dict[str, Estimate]
    selectivity: Estimate | None
    """Forget drop minus retain drop; None if the report has no corpora of these names."""
    control: "Finding | None" = None
    best_of: int = 1
    """Out of how many strengths of a sweep this one was picked, for its selectivity."""

    @property
    def verdict(self) -> str:
        """One of "beats", "no better", "worse", "no control", "no interval", and "" without forget and retain."""
        if self.selectivity is None:
            return ""
        if self.control is None or self.control.selectivity is None:
            return "no control"
        mine, chance = self.selectivity, self.control.selectivity
        if not all(math.isfinite(end) for end in (mine.low, mine.high, chance.low, chance.high)):
            return "no interval"
        if mine.low > chance.high:
            return "beats"
        return "worse" if mine.high < chance.low else "no better"


def headline_metric(report: Report) -> str | None:
    """Return the metric to summarize by: one of which a share can be lost; None if there is none."""
    metrics = list(dict.fromkeys(metric for _, _, metric in report.measures))
    measured = {metric for condition, _, metric in report.measures if condition == BASE}
    falling = [m for m in PREFERRED if m in measured] + [m for m in metrics if m in measured and m in FRACTIONS]
    return next((metric for metric in falling if metric not in RISING), None)


def findings(report: Report, metric: str) -> list[Finding]:
    """Return one finding per method; of a sweep, that of its most selective strength."""
    conditions = conditions_of(report)
    found = []
    for method in families(conditions):
        own = [c for c in conditions if c.method == method and not c.control]
        found += [_finding(report, c, metric) for c in own if c.strength is None]
        steps = [_finding(report, c, metric) for c in own if c.strength is not None]
        if steps:
            best = max(steps, key=_rank)
            found.append(Finding(best.condition, best.drops, best.selectivity, best.control, len(steps)))
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
    selectivity = None
    if FORGET in drops and RETAIN in drops:
        selectivity = Estimate.of(report.selectivity(name, FORGET, RETAIN, metric))
    control = None
    if not condition.control and condition.counterpart in report.conditions:
        control = _finding(report, Condition.parse(condition.counterpart), metric)
    return Finding(condition, drops, selectivity, control)


def budget_of(report: Report) -> float | None:
    """Return the share that may be lost on "retain", as the plan of a run has it; None without one."""
    plan = report.provenance.get("plan")
    budget = plan.get("retain_drop") if isinstance(plan, dict) else None
    return float(budget) if isinstance(budget, Real) else None


def exceeds(finding: Finding, budget: float) -> bool:
    """Say whether a method lost more on "retain" than it may, by its value."""
    return finding.drops[RETAIN].value > budget


def summary(report: Report) -> str:
    """Return the summary as HTML: a sentence on what was measured, and a list item per method; "" if there is none."""
    metric = headline_metric(report)
    found = findings(report, metric) if metric else []
    if not metric or not found:
        return ""
    made = report.provenance.get("conditions")
    items = "".join(f"<li>{_item(one, made, budget_of(report))}</li>" for one in found[:SHOWN])
    more = f"<p>{len(found) - SHOWN} more conditions are in the table.</p>" if len(found) > SHOWN else ""
    return f"<p>{_base(report, metric)}</p><ul class='findings'>{items}</ul>{more}"


def _base(report: Report, metric: str) -> str:
    parts = [
        f"{_percent(report[BASE, corpus, metric].value)} on <i>{name(corpus)}</i>"
        for corpus in report.corpora
        if (BASE, corpus, metric) in report.measures
    ]
    return (
        f"Measured by {name(words(metric))}. The unedited model reaches {join(parts)}. "
        "Losses below are shares of these values, with 95% intervals over documents; a negative loss is a gain."
    )


def _percent(value: float) -> str:
    return "nothing" if math.isnan(value) else f"{100 * value:.1f}%"


def share(value: float) -> str:
    """Write a share in percent, with the digits that it has."""
    return f"{100 * value:.3g}%"


def join(parts: list[str]) -> str:
    """List names in a sentence."""
    return "".join(parts) if len(parts) < 2 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def name(text: object, length: int = 80) -> str:
    """Escape a name from data, and cut it where it would fill the page."""
    told = str(text)
    return escape(told if len(told) <= length else f"{told[: length - 1]}…")


def _item(finding: Finding, made: object, budget: float | None) -> str:
    condition = finding.condition
    told = f"<strong>{name(condition.method)}</strong>"
    if condition.strength is not None:
        told += f" at strength {condition.strength:g}"
    if finding.best_of > 1:
        told += f" (the most selective of {finding.best_of} strengths, picked on these same texts, so it flatters)"
    main = [corpus for corpus in (FORGET, RETAIN) if corpus in finding.drops]
    rest = [corpus for corpus in finding.drops if corpus not in main]
    told += f" lost {_drops(finding, main or rest)}."
    if finding.control is not None:
        told += f" Its control{control_kind(finding, made)} lost {_drops(finding.control, main or rest)}."
    told += _verdict(finding) + _over(finding, budget)
    if main and rest:
        told += f"<span class='rest'>Elsewhere it lost {_drops(finding, rest)}.</span>"
    what = made.get(condition.name) if isinstance(made, dict) else None
    return told + (f"<span class='rest'>What it is: {name(what, 240)}</span>" if what else "")


def _over(finding: Finding, budget: float | None) -> str:
    if budget is None or finding.selectivity is None or not exceeds(finding, budget):
        return ""
    sure = finding.drops[RETAIN].low > budget
    doubt = "" if sure else ", though the interval includes it"
    return f"<span class='verdict bad'>It exceeds the budget of {share(budget)} on <i>{RETAIN}</i>{doubt}.</span>"


def control_kind(finding: Finding, made: object) -> str:
    """Say what a method's control is, between commas, where the report knows."""
    told = str(made.get(finding.condition.counterpart, "") if isinstance(made, dict) else "").lstrip("[")
    begin = next((begin for begin in CONTROL_KINDS if told.startswith(begin)), None)
    if begin is None:
        return ""
    draws = told.count(begin)
    return f", {CONTROL_KINDS[begin]}{f' (mean of {draws} draws)' if draws > 1 else ''},"


def _drops(finding: Finding, corpora: list[str]) -> str:
    return join(
        [f"{bold(finding.drops[corpus])} on <i>{name(corpus)}</i>" for corpus in corpora if corpus in finding.drops]
    )


def bold(estimate: Estimate) -> str:
    """Write an estimate with its value bold and its interval small."""
    value, bracket, interval = estimate.percent().partition(" [")
    return f"<b>{value}</b>" + (f" <small>[{interval}</small>" if bracket else "")


def _verdict(finding: Finding) -> str:
    verdict, mine = finding.verdict, finding.selectivity
    if mine is None:
        return ""
    own = f"forget loss minus retain loss is {mine.percent()}"
    chance = finding.control.selectivity.percent() if finding.control and finding.control.selectivity else ""
    sentence = {
        "beats": f"It beats its control: {own}, against {chance}.",
        "no better": f"It does not beat its control: {own}, against {chance}, and these intervals overlap.",
        "worse": f"It does not beat its control, it is worse: {own}, against {chance}.",
        "no control": f"No control was measured, so what any edit of its size would do is unknown: {own}.",
        "no interval": f"Without intervals, nobody can say whether it beats its control: {own}, against {chance}.",
    }[verdict]
    tone = {"beats": "good", "no better": "bad", "worse": "bad"}.get(verdict, "open")
    return f"<span class='verdict {tone}'>{sentence}</span>"
