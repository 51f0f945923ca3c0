"""`comparison_page`: what `compare` found as one HTML document: a row a method, a sentence, both figures, then skill by skill.

Knows the parts of a comparison and what decides between its methods; `templates/comparison.html` and `comparison_words.html`
write it. Knows nothing of how the methods were fitted and tuned.
"""

import math

from lens_unlearn.evaluation.conditions import Estimate
from lens_unlearn.evaluation.report import Report
from lens_unlearn.figures.forgetting_matrix import reports_by_skill
from lens_unlearn.reports.figure_html import drawing
from lens_unlearn.reports.findings import (
    Finding,
    budget_of,
    confidence_of,
    controls_of,
    exceeds,
    failures,
    findings,
    gave_up,
)
from lens_unlearn.reports.numbers import csv_data
from lens_unlearn.reports.settings import settings
from lens_unlearn.reports.summary_table import of_comparison
from lens_unlearn.reports.templating import macro, render

__all__ = ["comparison_page", "overall"]

METRIC = "top1"
WORDS = "comparison_words.html"


def comparison_page(report: Report) -> str:
    """Write what `compare` returned as one self-contained HTML document, which refers to no address outside itself.

    Args:
        report: What `compare` returned; its `figures` come first.
    """
    from plotly.offline import get_plotlyjs

    results = reports_by_skill(report, "comparison_page")
    table, of_skills = of_comparison(report, results, METRIC)
    known = (words for one in (report, *report.parts) for words in controls_of(one).values())
    return str(
        render(
            "comparison.html",
            model=report.provenance.get("model") or "a language model",
            skills=list(results),
            methods=report.provenance.get("methods", ()),
            budget=budget_of(report),
            confidence=confidence_of(report),
            kinds=list(dict.fromkeys(known)),
            dealt=bool(report.provenance.get("dealt")),
            metric=METRIC,
            protocol=report.provenance.get("protocol", ""),
            overall=overall(report),
            failed=failures(report),
            figures=[drawing(number, "", figure) for number, figure in enumerate(report.figures.values())],
            summary=table,
            of_skills=of_skills,
            data=csv_data(report.csv()),
            tables={skill: _table(skill, part) for skill, part in results.items()},
            settings=settings(report),
            library=get_plotlyjs(),
        )
    )


def overall(report: Report) -> str:
    """Say in a few sentences, as HTML, which method forgets most within the budget, and where none beats its control.

    Within the budget is a method that keeps it on every retained skill, whichever is forgotten; where none does, the one named
    is the most selective.
    """
    results = {skill: findings(part, METRIC) for skill, part in reports_by_skill(report, "comparison_page").items()}
    budget, idle = budget_of(report), set.intersection(*(set(gave_up(part)) for part in report.parts))
    means = [one for one in findings(report, METRIC) if one.condition.method not in idle]
    over = {
        one.condition.method: [skill for skill, of in results.items() if _exceeds(of, one.condition.method, budget)]
        for one in means
    }
    best = max(means, key=lambda one: _merit(one, within=not over[one.condition.method]), default=None)
    beaten = {skill: [one.condition.method for one in of if one.verdict == "beats"] for skill, of in results.items()}
    counts = {one.condition.method: sum(one.condition.method in of for of in beaten.values()) for one in means}
    without = [skill for skill, of in beaten.items() if not of]
    beyond = over[best.condition.method] if best is not None else []
    return macro(WORDS, "overall", best, beyond, counts, len(results), without)


def _exceeds(found: list[Finding], method: str, budget: float | None) -> bool:
    return budget is not None and any(one.condition.method == method and exceeds(one, budget) for one in found)


def _merit(finding: Finding, *, within: bool) -> tuple[bool, float]:
    lost = finding.drops["forget"] if within else finding.selectivity
    value = math.nan if lost is None else lost.value
    return within, -math.inf if math.isnan(value) else value


def _table(skill: str, part: Report) -> dict[str, object]:
    """Return what every condition lost of each corpus, with what the corpora are called."""
    headings = {"forget": skill, "retain": "all others"}
    corpora = [corpus for corpus in part.corpora if any(key[1:] == (corpus, METRIC) for key in part.measures)]
    rows = {
        condition: [Estimate.of(part.drop(condition, corpus, METRIC)) for corpus in corpora]
        for condition in part.conditions[1:]
    }
    return {"headings": [headings.get(corpus, corpus) for corpus in corpora], "rows": rows}
