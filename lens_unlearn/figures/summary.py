"""The report in words: what each method took away, what it cost, and whether it beats its control."""

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from lens_unlearn.figures.conditions import (
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

if TYPE_CHECKING:
    from lens_unlearn.evaluation.report import Report

__all__ = ["Finding", "findings", "headline_metric", "summary"]

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


def headline_metric(report: "Report") -> str | None:
    """Return the metric to summarize by: one of which a share can be lost; None if there is none."""
    metrics = list(dict.fromkeys(metric for _, _, metric in report.measures))
    measured = {metric for condition, _, metric in report.measures if condition == BASE}
    falling = [m for m in PREFERRED if m in measured] + [m for m in metrics if m in measured and m in FRACTIONS]
    return next((metric for metric in falling if metric not in RISING), None)


def findings(report: "Report", metric: str) -> list[Finding]:
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


def _finding(report: "Report", condition: Condition, metric: str) -> Finding:
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


def summary(report: "Report") -> str:
    """Return the summary as HTML: a sentence on what was measured, and a list item per method; "" if there is none."""
    metric = headline_metric(report)
    found = findings(report, metric) if metric else []
    if not metric or not found:
        return ""
    items = "".join(f"<li>{_item(one)}</li>" for one in found[:SHOWN])
    more = f"<p>{len(found) - SHOWN} more conditions are in the table.</p>" if len(found) > SHOWN else ""
    return f"<p>{_base(report, metric)}</p><ul class='findings'>{items}</ul>{more}"


def _base(report: "Report", metric: str) -> str:
    parts = [
        f"{_percent(report[BASE, corpus, metric].value)} on <i>{name(corpus)}</i>"
        for corpus in report.corpora
        if (BASE, corpus, metric) in report.measures
    ]
    return (
        f"Measured by {name(words(metric))}. The unedited model reaches {_join(parts)}. "
        "Losses below are shares of these values, with 95% intervals over documents; a negative loss is a gain."
    )


def _percent(value: float) -> str:
    return "nothing" if math.isnan(value) else f"{100 * value:.1f}%"


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def name(text: object, length: int = 80) -> str:
    """Escape a name from data, and cut it where it would fill the page."""
    told = str(text)
    return escape(told if len(told) <= length else f"{told[: length - 1]}…")


def _item(finding: Finding) -> str:
    condition = finding.condition
    told = f"<strong>{name(condition.method)}</strong>"
    if condition.strength is not None:
        told += f" at strength {condition.strength:g}"
    if finding.best_of > 1:
        told += f" (the most selective of {finding.best_of} strengths, picked on these same texts, so it flatters)"
    told += f" lost {_drops(finding)}."
    if finding.control is not None:
        told += f" Its random control lost {_drops(finding.control, others=finding.selectivity is None)}."
    return told + _verdict(finding)


def _drops(finding: Finding, *, others: bool = True) -> str:
    order = sorted(finding.drops, key=lambda corpus: {FORGET: 0, RETAIN: 1}.get(corpus, 2))
    order = [corpus for corpus in order if others or corpus in (FORGET, RETAIN)]
    return _join([f"{_bold(finding.drops[corpus])} on <i>{name(corpus)}</i>" for corpus in order])


def _bold(estimate: Estimate) -> str:
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
        "no control": f"No random control was measured, so what any edit of its size would do is unknown: {own}.",
        "no interval": f"Without intervals, nobody can say whether it beats its control: {own}, against {chance}.",
    }[verdict]
    tone = {"beats": "good", "no better": "bad", "worse": "bad"}.get(verdict, "open")
    return f"<span class='verdict {tone}'>{sentence}</span>"
