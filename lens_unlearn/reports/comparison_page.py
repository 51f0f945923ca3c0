"""`comparison_page`: what `compare` found as one HTML document: both figures, then in words, then the tables."""

import base64
import math
from html import escape

from lens_unlearn.evaluation.conditions import Estimate, words
from lens_unlearn.evaluation.report import Report
from lens_unlearn.figures.forgetting_matrix import turns_of
from lens_unlearn.reports.findings import Finding, findings, name
from lens_unlearn.reports.report_page import CONTROLS, PROMISES
from lens_unlearn.reports.report_page import _figure as figure_of
from lens_unlearn.reports.report_page import _settings as settings_of
from lens_unlearn.reports.style import CSS, POLICY, SCRIPT

__all__ = ["comparison_page", "comparison_summary"]

METRIC = "top1"


def comparison_page(report: Report) -> str:
    """Write what `compare` returned as one self-contained HTML document, which refers to no address outside itself.

    Args:
        report: What `compare` returned; its `figures` come first.
    """
    from plotly.offline import get_plotlyjs

    title = f"Which method forgets what, and at what cost: {name(report.provenance.get('model') or 'a language model')}"
    figures = "".join(figure_of(number, "", one) for number, one in enumerate(report.figures.values()))
    sections = [
        ("Figures", figures),
        ("Skill by skill", comparison_summary(report)),
        ("What this promises, and what it does not", PROMISES),
        ("All shares lost", _tables(report)),
        ("Settings", settings_of(report)),
    ]
    body = "".join(f"<section><h2>{heading}</h2>{content}</section>" for heading, content in sections)
    return (
        f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><title>{title}</title>"
        f"<style>{CSS}</style></head><body><header><h1>{title}</h1><p class='lead'>{_lead(report)}</p>"
        f"<div class='headline'><p>{overall(report)}</p></div></header><main>{body}</main>"
        f"<script>{get_plotlyjs()}</script><script>{SCRIPT}</script></body></html>"
    )


def _lead(report: Report) -> str:
    skills = [f"<i>{name(skill)}</i>" for skill in turns_of(report, "comparison_page")]
    methods = ", ".join(name(method) for method in report.provenance.get("methods", ()))
    return (
        f"Each of {', '.join(skills)} is forgotten in turn, while all the others, in equal parts, are to stay. Every method "
        f"({methods}) takes out as much as it can while the others lose at most {_budget(report):.0%} of their next-token "
        f"accuracy on tuning documents{CONTROLS}Everything below is measured on test documents, by {words(METRIC)}, as a share "
        "of what the unedited model reaches."
    )


def overall(report: Report) -> str:
    """Say in a few sentences, as HTML, which method forgets most within the budget, and where none beats its control."""
    turns = turns_of(report, "comparison_page")
    means = {finding.condition.method: finding for finding in findings(report, METRIC)}
    within = [one for one in means.values() if _within(one, report)]
    told = ""
    if within:
        best = max(within, key=_forgotten)
        told = (
            f"<b>{name(best.condition.method)}</b> forgets most within the budget: on average over the skills "
            f"<b>{_percent(best, 'forget')}</b> of what was to be forgotten, at {_percent(best, 'retain')} of the rest"
        )
        told += (
            f" (its random control: {_percent(best.control, 'forget')} and {_percent(best.control, 'retain')}). "
            if best.control
            else ". "
        )
    else:
        told = "On average over the skills, no method stays within the budget on the test documents. "
    beaten = {skill: _beating(part) for skill, part in turns.items()}
    without = [skill for skill, methods in beaten.items() if not methods]
    counts = {method: sum(method in methods for methods in beaten.values()) for method in means}
    told += (
        "The control is beaten by " + _join([f"{name(m)} on {_of(n, len(turns))}" for m, n in counts.items()]) + ". "
    )
    if without:
        told += f"<b>No method beats its control on {_join([f'<i>{name(skill)}</i>' for skill in without])}.</b>"
    else:
        told += "On every skill some method beats its control."
    return told


def comparison_summary(report: Report) -> str:
    """Say, as HTML, skill by skill which method forgets most within the budget, and whether it beats its control."""
    items = [_item(skill, part) for skill, part in turns_of(report, "comparison_page").items()]
    return (
        "<p>A method beats its control where its forget loss minus its retain loss is above the control's, and their 95% "
        "intervals, over documents, do not overlap. A negative loss is a gain.</p>"
        f"<ul class='findings'>{''.join(items)}</ul>"
    )


def _item(skill: str, part: Report) -> str:
    found = [one for one in findings(part, METRIC) if one.condition.method not in _nothing(part)]
    within = [one for one in found if _within(one, part)]
    told = f"<strong>{name(skill)}</strong>: "
    if within:
        best = max(within, key=_forgotten)
        told += f"{name(best.condition.method)} forgets most within the budget, {_numbers(best)}."
        told += f" Its random control: {_numbers(best.control)}." if best.control else ""
    else:
        told += "no method stays within the budget on the test documents."
    over = [one for one in found if not _within(one, part)]
    if over:
        told += " Over the budget: " + "; ".join(f"{name(one.condition.method)}, {_numbers(one)}" for one in over) + "."
    if _nothing(part):
        told += f" No strength of {_join([name(m) for m in _nothing(part)])} stayed within it on the tuning documents."
    beating = [one.condition.method for one in found if one.verdict == "beats"]
    not_beating = [one.condition.method for one in found if one.verdict in ("no better", "worse")]
    if beating:
        told += f"<span class='verdict good'>Beats its control: {_join([name(m) for m in beating])}.</span>"
    if not_beating:
        told += f"<span class='verdict bad'>Does not: {_join([name(m) for m in not_beating])}.</span>"
    return f"<li>{told}</li>"


def _nothing(part: Report) -> list[str]:
    """Name the methods of which no strength stayed within the budget, so that nothing was taken out."""
    return [method for method, told in part.provenance.get("chosen", {}).items() if "nothing" in told]


def _beating(part: Report) -> list[str]:
    return [one.condition.method for one in findings(part, METRIC) if one.verdict == "beats"]


def _within(finding: Finding, report: Report) -> bool:
    cost = finding.drops.get("retain")
    return cost is not None and cost.value <= _budget(report)


def _budget(report: Report) -> float:
    budget = report.provenance.get("retain_drop")
    return float(budget) if isinstance(budget, int | float) else math.inf


def _forgotten(finding: Finding) -> float:
    value = finding.drops["forget"].value
    return -math.inf if math.isnan(value) else value


def _percent(finding: Finding, corpus: str) -> str:
    return finding.drops[corpus].percent()


def _numbers(finding: Finding) -> str:
    return f"<b>{_percent(finding, 'forget')}</b> lost at {_percent(finding, 'retain')} of the rest"


def _of(count: int, total: int) -> str:
    return "all skills" if count == total else f"{count} of {total} skills" if count else "no skill"


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else "nothing"


def _tables(report: Report) -> str:
    """Write one table per forgotten skill, folded, and a link to every number as CSV."""
    data = base64.b64encode(report.csv().encode(errors="backslashreplace")).decode()
    link = f"<a download='matrix.csv' href='data:text/csv;charset=utf-8;base64,{data}'>Download every metric as CSV</a>"
    tables = "".join(_table(skill, part) for skill, part in turns_of(report, "comparison_page").items())
    return f"<p class='note'>Shares of {words(METRIC)} lost, with 95% intervals. <span class='download'>{link}</span></p>{tables}"


def _table(skill: str, part: Report) -> str:
    headings = {"forget": skill, "retain": "all others"}
    corpora = [corpus for corpus in part.corpora if any(key[1:] == (corpus, METRIC) for key in part.measures)]
    head = "".join(f"<th>{name(headings.get(corpus, corpus))}</th>" for corpus in corpora)
    rows = ""
    for condition in part.conditions[1:]:
        cells = "".join(_cell(Estimate.of(part.drop(condition, corpus, METRIC))) for corpus in corpora)
        rows += f"<tr><th scope='row'>{name(condition)}</th>{cells}</tr>"
    table = f"<table><thead><tr><th>condition</th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<details><summary>{escape(skill)} forgotten</summary><div class='scroll'>{table}</div></details>"


def _cell(estimate: Estimate) -> str:
    value, bracket, interval = estimate.percent().partition(" [")
    return f"<td>{value}<small>{bracket.strip()}{interval}</small></td>"
