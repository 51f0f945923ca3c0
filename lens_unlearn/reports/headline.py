"""`headline`: the result of a report in one to four sentences."""

import math

from lens_unlearn.evaluation.conditions import Estimate, words
from lens_unlearn.evaluation.report import Report
from lens_unlearn.inspection.html import short
from lens_unlearn.reports.findings import (
    FORGET,
    RETAIN,
    Finding,
    bold,
    budget_of,
    control_kind,
    exceeds,
    findings,
    headline_metric,
    join,
    name,
    share,
)

__all__ = ["headline"]

NAMED = 4
"""Methods that a sentence names; it counts the others."""


def headline(report: Report) -> list[str]:
    """Return the result in sentences of HTML: what was taken away, at what cost, beside which control, and how sure that is.

    The method told of is the one that lost most on "forget", among those that beat their control and keep to the budget if
    there are any; if none keeps to it, the one that lost most on "forget" beyond its loss on "retain". Empty where the report
    cannot say, as without corpora named "forget" and "retain".
    """
    metric = headline_metric(report)
    found = [one for one in findings(report, metric) if one.selectivity is not None] if metric else []
    if not metric or not found:
        return []
    budget = budget_of(report)
    best = max(found, key=lambda one: _merit(one, budget))
    sentences = [_result(report, best, metric, len(found)), _controls(found), _budget(found, budget), _sure(report)]
    return [sentence for sentence in sentences if sentence]


def _merit(finding: Finding, budget: float | None) -> tuple[bool, bool, float]:
    within = budget is None or not exceeds(finding, budget)
    lost = finding.drops[FORGET] if within else finding.selectivity
    value = math.nan if lost is None else lost.value
    return finding.verdict == "beats", within, -math.inf if math.isnan(value) else value


def _result(report: Report, best: Finding, metric: str, count: int) -> str:
    told = f"<b>{name(best.condition.method)}</b>"
    if best.condition.strength is not None:
        told += f" at strength {best.condition.strength:g}"
    if best.best_of > 1:
        told += f" (the most selective of {best.best_of}, picked on these same texts, which flatters)"
    told = f"Of {count} methods, {told}" if count > 1 else told
    told += (
        f" took away {bold(best.drops[FORGET])} of the model's {name(words(metric))} on {_texts(report, FORGET)}, "
        f"at a cost of {bold(best.drops[RETAIN])} on {_texts(report, RETAIN)}"
    )
    if best.control is None or best.control.selectivity is None:
        return f"{told}."
    kind = control_kind(best, report.provenance.get("conditions"))
    lost = [bold(best.control.drops[corpus]) for corpus in (FORGET, RETAIN)]
    return f"{told}; its control{kind} lost {lost[0]} and {lost[1]}."


def _texts(report: Report, corpus: str) -> str:
    """Name a corpus, and where its texts are from: as the plan says it, or else the corpus itself."""
    plan, known = report.provenance.get("plan"), report.provenance.get("corpora")
    told: object = plan.get(corpus) if isinstance(plan, dict) else None
    if told is None and isinstance(known, dict) and isinstance(known.get(corpus), dict):
        told = known[corpus].get("source")
    if isinstance(told, list | tuple):
        told = ", ".join(map(str, told))
    return f"<i>{corpus}</i>" + (f" ({name(short(told))})" if told and told != corpus else "")


def _controls(found: list[Finding]) -> str:
    """Say which methods beat their controls, and which do not."""
    beating, losing = _of(found, "beats"), _of(found, "no better", "worse")
    alone, unmeasured = len(found) == 1, _of(found, "no control")
    told = []
    if len(beating) == len(found):
        told.append("It beats its control" if alone else f"All {len(found)} methods beat their controls")
    elif beating:
        told.append(f"The controls are beaten by {_named(beating)}")
    if len(losing) == len(found):
        told.append(
            _alarm("It does not beat its control" if alone else "No method beats its control") + _against(losing)
        )
    elif losing:
        told.append(
            _alarm(f"not by {_named(losing)}" if beating else f"No control is beaten by {_named(losing)}")
            + _against(losing)
        )
    if unmeasured:
        told.append("no control was measured" + ("" if len(unmeasured) == len(found) else f" of {_named(unmeasured)}"))
    if _of(found, "no interval"):
        told.append("without intervals, nobody can say whether a control is beaten")
    sentence = "; ".join(told)
    return f"{sentence[:1].upper()}{sentence[1:]}." if sentence else ""


def _of(found: list[Finding], *verdicts: str) -> list[Finding]:
    return [one for one in found if one.verdict in verdicts]


def _alarm(text: str) -> str:
    return f"<b class='bad'>{text}</b>"


def _against(losing: list[Finding]) -> str:
    """Give the numbers of the one method that does not beat its control."""
    control = losing[0].control
    if len(losing) > 1 or control is None:
        return ""
    mine, chance = losing[0].selectivity, control.selectivity
    return f" (forget loss minus retain loss {_percent(mine)}, against {_percent(chance)})"


def _percent(estimate: Estimate | None) -> str:
    return "not defined" if estimate is None else estimate.percent()


def _named(found: list[Finding]) -> str:
    names = [name(one.condition.method) for one in found[:NAMED]]
    return join([*names, f"{len(found) - NAMED} more"] if len(found) > NAMED else names)


def _budget(found: list[Finding], budget: float | None) -> str:
    """Say which methods cost more than the budget that they were tuned to."""
    if budget is None:
        return ""
    over = [one for one in found if exceeds(one, budget)]
    told = f"They were tuned to lose at most {share(budget)} on <i>{RETAIN}</i>" if len(found) > 1 else ""
    told = told or f"It was tuned to lose at most {share(budget)} on <i>{RETAIN}</i>"
    if over:
        costs = [f"{name(one.condition.method)} ({one.drops[RETAIN].percent()})" for one in over[:NAMED]]
        costs += [f"{len(over) - NAMED} more"] if len(over) > NAMED else []
        return f"{told}; on these test documents {_alarm(f'{join(costs)} exceed' + ('s it' if len(over) == 1 else ' it'))}."
    wide = [one for one in found if one.drops[RETAIN].high > budget]
    doubt = f", though the interval of {_named(wide)} reaches beyond it" if wide else ""
    return f"{told}, and {'kept' if len(found) == 1 else 'all kept'} to it on these test documents{doubt}."


def _sure(report: Report) -> str:
    """Say what the intervals are over."""
    known = report.provenance.get("corpora")
    counts = {corpus: known.get(corpus) for corpus in (FORGET, RETAIN)} if isinstance(known, dict) else {}
    sizes = [
        f"{entry['documents']:,} of <i>{corpus}</i>"
        for corpus, entry in counts.items()
        if isinstance(entry, dict) and isinstance(entry.get("documents"), int)
    ]
    if len(sizes) < 2:
        return ""
    of_run = "plan" in report.provenance
    apart = ", none of them used to fit or to tune" if of_run else ""
    return f"In brackets: 95% intervals over the {'test documents' if of_run else 'documents'} ({join(sizes)}{apart})."
