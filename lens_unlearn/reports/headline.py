"""The result of a report in one to four sentences.

Knows which method is named and which belong into a sentence; `templates/headline.html` knows how the sentence goes.
"""

import math
from typing import Any

from lens_unlearn.evaluation.report import Report
from lens_unlearn.inspection.html import short
from lens_unlearn.reports.findings import (
    FORGET,
    RETAIN,
    Finding,
    budget_of,
    confidence_of,
    control_kind,
    exceeds,
    findings,
    gave_up,
    headline_metric,
)
from lens_unlearn.reports.templating import macro, name

__all__ = ["documents_of", "headline"]

TEMPLATE = "headline.html"


def headline(report: Report) -> list[str]:
    """Return the result in sentences of HTML: what was removed, at what cost, beside which control, and how sure that is.

    The method named is the one that lost most on "forget", among those that beat their control and keep to the budget if
    there are any; if none keeps to it, the one that lost most on "forget" beyond its loss on "retain". Empty where the report
    cannot say, as without corpora named "forget" and "retain".
    """
    metric = headline_metric(report)
    nothing = gave_up(report)
    measured = [one for one in findings(report, metric) if one.selectivity is not None] if metric else []
    found = [one for one in measured if one.condition.method not in nothing]
    budget = budget_of(report)
    if measured and not found and budget is not None:
        return [macro(TEMPLATE, "nothing_removed", budget, nothing)]
    if not metric or not found:
        return []
    best = max(found, key=lambda one: _merit(one, budget))
    sources = {corpus: _source(report, corpus) for corpus in (FORGET, RETAIN)}
    result = macro(TEMPLATE, "result", best, len(found), metric, sources, control_kind(report, best))
    sentences = [result, _controls(found), _budget(found, budget, confidence_of(report), nothing), _sure(report)]
    return [sentence for sentence in sentences if sentence]


def _merit(finding: Finding, budget: float | None) -> tuple[bool, bool, float]:
    within = budget is None or not exceeds(finding, budget)
    lost = finding.drops[FORGET] if within else finding.selectivity
    value = math.nan if lost is None else lost.value
    return finding.verdict == "beats", within, -math.inf if math.isnan(value) else value


def _source(report: Report, corpus: str) -> str:
    """Say where a corpus is from, as the plan has it, or else the corpus itself; "" if that says no more than its name."""
    plan, known = report.provenance.get("plan"), report.provenance.get("corpora")
    source: object = plan.get(corpus) if isinstance(plan, dict) else None
    if source is None and isinstance(known, dict) and isinstance(known.get(corpus), dict):
        source = known[corpus].get("source")
    if isinstance(source, list | tuple):
        source = ", ".join(map(str, source))
    return short(source) if source and source != corpus else ""


def _controls(found: list[Finding]) -> str:
    """Say which methods beat their controls, and which do not."""
    verdicts = (("beats",), ("no better", "worse"), ("no control",), ("no interval",))
    groups = [[one for one in found if one.verdict in group] for group in verdicts]
    return macro(TEMPLATE, "controls", found, *groups)


def _budget(found: list[Finding], budget: float | None, confidence: str, nothing: list[str]) -> str:
    """Say to which budget the methods were tuned, how surely, and which of them cost more on the test documents."""
    if budget is None:
        return ""
    over = [f"{name(one.condition.method)} ({_worst(one)})" for one in found if exceeds(one, budget)]
    wide = [one for one in found if one.worst is not None and one.worst[1].high > budget]
    several = any(len(one.retained) > 1 for one in found)
    return macro(TEMPLATE, "budget", budget, len(found), over, wide, confidence, nothing, several)


def _worst(finding: Finding) -> str:
    """Say what a method took from the retain corpus that lost most, and from which, where there are several."""
    if finding.worst is None:
        return ""
    corpus, lost = finding.worst
    return lost.percent() + (f" on {name(corpus)}" if len(finding.retained) > 1 else "")


def _sure(report: Report) -> str:
    """Say what the intervals are over, where the report knows."""
    known = report.provenance.get("corpora")
    entries = {corpus: known.get(corpus) for corpus in (FORGET, RETAIN)} if isinstance(known, dict) else {}
    documents = {corpus: documents_of(entry) for corpus, entry in entries.items()}
    known_of_both = all(documents.get(corpus) for corpus in (FORGET, RETAIN))
    plan = report.provenance.get("plan")
    facts = isinstance(plan, dict) and bool(plan.get("facts"))
    return macro(TEMPLATE, "sure", documents, "plan" in report.provenance, facts) if known_of_both else ""


def documents_of(entry: Any, noun: str = "") -> str:
    """Say how many documents a corpus has, and in how many groups if those are fewer; "" where the report does not know."""
    documents, units = (entry.get(key) if isinstance(entry, dict) else None for key in ("documents", "units"))
    if not isinstance(documents, int):
        return ""
    grouped = isinstance(units, int) and units < documents
    return f"{documents:,}{noun}" + (f" in {units:,} groups" if grouped else "")
