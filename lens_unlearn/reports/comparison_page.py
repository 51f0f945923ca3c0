"""`comparison_page`: what `compare` found as one HTML document: both figures, then in words, then the tables.

Knows the parts of a comparison and what decides between its methods; `templates/comparison.html` and `comparison_words.html`
write it. Knows nothing of how the methods were fitted and tuned.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from lens_unlearn.evaluation.conditions import Estimate
from lens_unlearn.evaluation.report import Report
from lens_unlearn.figures.forgetting_matrix import reports_by_skill
from lens_unlearn.reports.figure_html import drawing
from lens_unlearn.reports.findings import Finding, confidence_of, controls_of, failures, findings, gave_up
from lens_unlearn.reports.numbers import csv_data
from lens_unlearn.reports.settings import settings
from lens_unlearn.reports.templating import macro, render

__all__ = ["comparison_page", "comparison_summary", "overall"]

METRIC = "top1"
WORDS = "comparison_words.html"


@dataclass(frozen=True)
class SkillResult:
    """What was found when one skill was to be forgotten."""

    best: Finding | None
    """Of those within the budget."""
    over: list[Finding]
    """Beyond the budget."""
    nothing: list[str]
    """Methods of which no strength stayed within the budget, so that they took nothing out."""
    beating: list[str] = field(default_factory=list)
    not_beating: list[str] = field(default_factory=list)


def comparison_page(report: Report) -> str:
    """Write what `compare` returned as one self-contained HTML document, which refers to no address outside itself.

    Args:
        report: What `compare` returned; its `figures` come first.
    """
    from plotly.offline import get_plotlyjs

    results = reports_by_skill(report, "comparison_page")
    known = (words for one in (report, *report.parts) for words in controls_of(one).values())
    return str(
        render(
            "comparison.html",
            model=report.provenance.get("model") or "a language model",
            skills=list(results),
            methods=report.provenance.get("methods", ()),
            budget=_budget(report),
            confidence=confidence_of(report),
            kinds=list(dict.fromkeys(known)),
            metric=METRIC,
            protocol=report.provenance.get("protocol", ""),
            overall=overall(report),
            failed=failures(report),
            figures=[drawing(number, "", figure) for number, figure in enumerate(report.figures.values())],
            summary=comparison_summary(report),
            data=csv_data(report.csv()),
            tables={skill: _table(skill, part) for skill, part in results.items()},
            settings=settings(report),
            library=get_plotlyjs(),
        )
    )


def overall(report: Report) -> str:
    """Say in a few sentences, as HTML, which method forgets most within the budget, and where none beats its control."""
    results = reports_by_skill(report, "comparison_page")
    means = findings(report, METRIC)
    best = _best(one for one in means if _within(one, report))
    beaten = {skill: _verdict(findings(part, METRIC), "beats") for skill, part in results.items()}
    counts = {
        one.condition.method: sum(one.condition.method in methods for methods in beaten.values()) for one in means
    }
    without = [skill for skill, methods in beaten.items() if not methods]
    return macro(WORDS, "overall", best, counts, len(results), without)


def comparison_summary(report: Report) -> str:
    """Say, as HTML, skill by skill which method forgets most within the budget, and whether it beats its control."""
    results = {skill: _result(part) for skill, part in reports_by_skill(report, "comparison_page").items()}
    return macro(WORDS, "summary", results)


def _result(part: Report) -> SkillResult:
    nothing = gave_up(part)
    found = [one for one in findings(part, METRIC) if one.condition.method not in nothing]
    return SkillResult(
        best=_best(one for one in found if _within(one, part)),
        over=[one for one in found if not _within(one, part)],
        nothing=nothing,
        beating=_verdict(found, "beats"),
        not_beating=_verdict(found, "no better", "worse"),
    )


def _best(found: Iterable[Finding]) -> Finding | None:
    return max(found, key=_forgotten, default=None)


def _verdict(found: list[Finding], *verdicts: str) -> list[str]:
    """Return the methods of which one of these is said."""
    return [one.condition.method for one in found if one.verdict in verdicts]


def _within(finding: Finding, report: Report) -> bool:
    cost = finding.drops.get("retain")
    return cost is not None and cost.value <= _budget(report)


def _budget(report: Report) -> float:
    budget = report.provenance.get("retain_drop")
    return float(budget) if isinstance(budget, int | float) else math.inf


def _forgotten(finding: Finding) -> float:
    value = finding.drops["forget"].value
    return -math.inf if math.isnan(value) else value


def _table(skill: str, part: Report) -> dict[str, object]:
    """Return what every condition lost of each corpus, with what the corpora are called."""
    headings = {"forget": skill, "retain": "all others"}
    corpora = [corpus for corpus in part.corpora if any(key[1:] == (corpus, METRIC) for key in part.measures)]
    rows = {
        condition: [Estimate.of(part.drop(condition, corpus, METRIC)) for corpus in corpora]
        for condition in part.conditions[1:]
    }
    return {"headings": [headings.get(corpus, corpus) for corpus in corpora], "rows": rows}
