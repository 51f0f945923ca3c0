"""The table at the top of a page: a row a method, with what it forgot, what that cost at worst, its control, and the verdict.

Knows which numbers decide about a method and in which words; `templates/summary_table.html` writes them, a colour beside each
word. The same table stands on the page of a run and on that of a comparison, and the retain corpus that lost most holds the budget.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lens_unlearn.evaluation.conditions import Estimate
from lens_unlearn.evaluation.report import Report
from lens_unlearn.reports.findings import (
    FORGET,
    RETAIN,
    Finding,
    budget_of,
    confidence_of,
    exceeds,
    findings,
    gave_up,
    headline_metric,
)
from lens_unlearn.reports.templating import render

__all__ = ["Row", "of_comparison", "of_run"]

MOST = 60
"""Rows of a table."""
VERDICTS = {
    "beats": ("beats its control", "good"),
    "no better": ("no better than its control", "bad"),
    "worse": ("worse than its control", "bad"),
    "no control": ("no control was measured", "open"),
    "no interval": ("too few documents to say", "open"),
}
"""By what a finding says: words, and the colour beside them."""
UNCHANGED = ("changed nothing: no strength was sure to keep the budget", "open")


@dataclass(frozen=True)
class Row:
    """What the table says of one method."""

    finding: Finding
    words: str
    """The verdict."""
    tone: str
    """Of the verdict: "good", "bad" or "open"."""
    worst: tuple[str, Estimate] | None
    """The retain corpus that lost most, as the table names it."""
    over: bool | None
    """Whether that is more than the budget; None without one."""
    compared: bool = True
    """Whether the verdict is about the control."""

    @property
    def note(self) -> str:
        """What stands below the method's name."""
        condition, best_of = self.finding.condition, self.finding.best_of
        at = f"at strength {condition.strength:g}" if condition.strength is not None else ""
        return f"{at}, the most selective of {best_of}" if best_of > 1 else at

    @property
    def lead(self) -> Estimate | None:
        """How much more selective it is than a random control, where that is known and the verdict is about it."""
        lead = self.finding.lead
        return lead if lead is not None and math.isfinite(lead.low) and self.compared else None


def of_run(report: Report) -> str:
    """Write the table of a run as HTML; "" where the report cannot say, as without corpora named "forget" and "retain"."""
    metric = headline_metric(report)
    rows = _rows(report, metric) if metric else []
    if not metric:
        return ""
    elsewhere = any(row.finding.elsewhere for row in rows)
    return _table(report, rows, metric, (FORGET, RETAIN), several=_several(rows), elsewhere=elsewhere)


def of_comparison(report: Report, parts: Mapping[str, Report], metric: str) -> tuple[str, dict[str, str]]:
    """Write the table of a comparison as HTML, and that of each skill.

    Args:
        report: What `compare` returned: means over the skills.
        parts: By the skill that each forgot.
        metric: A metric that falls as a skill is lost.
    """
    rows = {skill: _rows(part, metric) for skill, part in parts.items()}
    tables = {
        skill: _table(parts[skill], of, metric, (skill, "the rest"), several=_several(of)) for skill, of in rows.items()
    }
    return _table(report, _rows_over(report, rows, metric), metric, ("skill", "the rest"), several=True), tables


def _several(rows: Sequence[Row]) -> bool:
    """Say whether "retain" is made of several corpora."""
    return any(len(row.finding.retained) > 1 for row in rows)


def _rows(report: Report, metric: str) -> list[Row]:
    """Return a row for each method of which it is known what it took from "forget" and "retain"."""
    budget, nothing = budget_of(report), gave_up(report)
    rows = []
    for one in findings(report, metric):
        if one.selectivity is None:
            continue
        changed = one.condition.method not in nothing
        words, tone = VERDICTS[one.verdict] if changed else UNCHANGED
        rows.append(Row(one, words, tone, one.worst, None if budget is None else exceeds(one, budget), changed))
    return rows


def _rows_over(report: Report, of_skills: Mapping[str, list[Row]], metric: str) -> list[Row]:
    """Return a row for each method of a comparison: means over the skills, and the worst of what any skill's forgetting cost."""
    rows = []
    for row in _rows(report, metric):
        method = row.finding.condition.method
        own = {skill: one for skill, of in of_skills.items() for one in of if one.finding.condition.method == method}
        costs = [
            (f"{one.worst[0]}, when {skill} is forgotten", one.worst[1]) for skill, one in own.items() if one.worst
        ]
        worst = max(costs, key=lambda cost: -math.inf if math.isnan(cost[1].value) else cost[1].value, default=None)
        over = [one.over for one in own.values() if one.over is not None]
        words, tone = _on_skills([one.finding.verdict for one in own.values() if one.tone != "open"], len(of_skills))
        rows.append(replace(row, words=words, tone=tone, worst=worst, over=any(over) if over else None))
    return rows


def _on_skills(verdicts: Sequence[str], total: int) -> tuple[str, str]:
    """Say on how many skills a control is beaten."""
    count = sum(verdict == "beats" for verdict in verdicts)
    if count == total:
        return f"beats its control on all {total} skills", "good"
    if not verdicts:
        return "no skill says whether it beats its control", "open"
    return (
        (f"beats its control on {count} of {total} skills", "open")
        if count
        else ("beats its control on no skill", "bad")
    )


def _table(
    report: Report,
    rows: Sequence[Row],
    metric: str,
    names: tuple[str, str],
    *,
    several: bool,
    elsewhere: bool = False,
) -> str:
    """Write rows.

    Args:
        report: Where they are from.
        rows: A row for each method.
        metric: Of which shares are lost.
        names: What is forgotten, and what is retained.
        several: Whether the latter is several corpora.
        elsewhere: Whether corpora were measured that are neither.
    """
    if not rows:
        return ""
    return render(
        "summary_table.html",
        rows=rows[:MOST],
        more=len(rows) - MOST,
        metric=metric,
        names=names,
        several=several,
        elsewhere=elsewhere,
        budget=budget_of(report),
        confidence=confidence_of(report),
    )
