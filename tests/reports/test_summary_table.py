"""The table at the top of a page: a row a method, whose budget is held by the retain corpus that lost most."""

import html
import re
from dataclasses import replace
from typing import Any

import pytest
from figures_helpers import report

from lens_unlearn.evaluation.report import Report
from lens_unlearn.reports.findings import findings, retained, summary
from lens_unlearn.reports.headline import headline
from lens_unlearn.reports.report_page import page
from lens_unlearn.reports.summary_table import of_run

BASE = {"forget": 0.5, "retain": 0.4, "english": 0.3, "sums": 0.5, "news": 0.3}
HIDING = {"m": {**BASE, "forget": 0.2, "retain": 0.37, "english": 0.18, "sums": 0.56, "news": 0.1}, "m:control": BASE}
"""A method that cost little on average, and two fifths of one corpus; what it cost elsewhere is no part of the budget."""


def made(values: dict[str, dict[str, float]] = HIDING, **provenance: Any) -> Report:
    found = report({"base": {c: BASE[c] for c in next(iter(values.values()))}, **values})
    found.provenance.update({"plan": {"retain_drop": 0.1}, **provenance})
    return found


def cells(written: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", written, re.S)
    plain = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]
    return [
        [html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", cell))).strip() for cell in row] for row in plain
    ]


def test_the_corpus_that_lost_most_is_named_and_holds_the_budget() -> None:
    found = made(retained=["english", "sums"])
    head, row = cells(of_run(found))
    columns = ["method", "forget lost", "retain lost", "worst retain corpus", "most lost elsewhere"]
    assert head == [*columns, "its control lost", "verdict"]
    assert row[0] == "m"
    assert row[1].startswith("60.0% [")
    assert row[2].startswith("7.5% [")
    assert row[3].startswith("40.0% [")
    assert row[3].endswith("english ✗ over 10%")
    assert row[4].startswith("66.7% [")
    assert row[4].endswith("news"), "of what is not retained, and so without a budget"
    assert re.match(r"0\.0% \[.*\] of forget 0\.0% \[.*\] of retain", row[5])
    assert row[6].startswith("✓ beats its control lead over it 52.5% [")
    assert "class='mark bad'" in of_run(found)
    assert "class='tone good'" in of_run(found)
    first, *rest = (re.sub("<[^>]+>", "", sentence) for sentence in headline(found))
    assert "of which english lost most, 40.0% [" in first
    assert any("10% on each retain corpus" in one and "on english) exceeds it" in one for one in rest)
    assert "Of the retain corpora, it lost" in page(found)
    within = made(retained=["english", "sums"], plan={"retain_drop": 0.5})
    assert cells(of_run(within))[1][3].endswith("✓ within 50%")


def test_without_a_further_corpus_nothing_is_said_of_one() -> None:
    values = {name: {c: v for c, v in of.items() if c != "news"} for name, of in HIDING.items()}
    written = of_run(made(values, retained=["english", "sums"]))
    assert "lsewhere" not in written


def test_a_single_retain_corpus_holds_the_budget_itself() -> None:
    head, row = cells(of_run(made()))
    assert "worst retain corpus" not in head
    assert row[2].endswith("✓ within 10%")
    assert cells(of_run(made(plan={})))[1][2].endswith("]"), "without a budget nothing is said of one"


@pytest.mark.parametrize(
    ("provenance", "known"),
    [
        ({"retained": ["english", "sums", "lost"]}, ("english", "sums")),
        ({"retained": []}, ("retain",)),
        # Of earlier runs, which did not say:
        ({"plan": {"test_retain": ["e:test", "s:test"], "also": {"english": "e:test", "news": "n"}}}, ("english",)),
        ({"plan": {"retain": ["e", "s"], "also": {"sums": "s", "news": "n"}}}, ("sums",)),
        ({"plan": {"retain": ["e"], "also": {"news": "n"}}}, ("retain",)),
        ({"forgotten": "python"}, ("english", "sums", "news")),
        ({"plan": "odd", "retained": 3}, ("retain",)),
    ],
)
def test_the_retain_corpora_are_known_of_older_runs_too(provenance: dict[str, Any], known: tuple[str, ...]) -> None:
    assert retained(made(**provenance)) == known


def test_verdicts_have_words_and_signs() -> None:
    values = {
        "bad": {**BASE, "forget": 0.45, "retain": 0.36},
        "bad:control": {**BASE, "forget": 0.45, "retain": 0.36},
        "worse": {**BASE, "retain": 0.2},
        "worse:control": BASE,
        "alone": {**BASE, "forget": 0.3},
        "idle": BASE,
    }
    found = made(values, chosen={"idle": {"nothing": "no strength"}})
    verdicts = {row[0]: row[-1] for row in cells(of_run(found))[1:]}
    assert verdicts["bad"].startswith("✗ no better than its control lead over it")
    assert verdicts["worse"].startswith("✗ worse than its control")
    assert verdicts["alone"] == "? no control was measured"
    assert verdicts["idle"] == "? changed nothing: no strength was sure to keep the budget"
    few = replace(found, measures={key: replace(one, units=5) for key, one in found.measures.items()})
    assert {row[0]: row[-1] for row in cells(of_run(few))[1:]}["bad"] == "? too few documents to say"


def test_without_forget_and_retain_there_is_no_table() -> None:
    assert of_run(report({"base": {"python": 0.5}, "m": {"python": 0.2}})) == ""
    assert of_run(Report({})) == ""


def test_what_is_not_defined_is_never_the_worst() -> None:
    found = made({"m": {**BASE, "english": 0.18}}, retained=["news", "english"])
    nothing = {
        key: replace(one, value=0.0, draws=one.draws * 0) for key, one in found.measures.items() if key[1] == "news"
    }
    [one] = findings(replace(found, measures={**found.measures, **nothing}), "top1")
    assert one.worst is not None
    assert one.worst[0] == "english"


def test_what_was_gained_is_not_called_a_negative_loss() -> None:
    """Once "took away -3.3 %"."""
    values = {"m": {"forget": 0.2, "retain": 0.42}, "m:control": {"forget": 0.51, "retain": 0.39}}
    found = report({"base": {"forget": 0.5, "retain": 0.4}, **values})
    first = html.unescape(re.sub("<[^>]+>", "", headline(found)[0]))
    assert re.search(r"m removed 60\.0% \[.*\] .* on forget \(forget\.jsonl\) and gained 5\.0% \[.*\] on retain", first)
    assert re.search(r"its control gained 2\.0% \[.*\] and lost 2\.5% \[", first)
    text = re.sub(r"\s+", " ", html.unescape(re.sub("<[^>]+>", "", summary(found))))
    assert "m lost 60.0%" in text
    assert "and gained 5.0%" in text
    worse = report({"base": {"forget": 0.5, "retain": 0.4}, "m": {"forget": 0.52, "retain": 0.4}})
    first = html.unescape(re.sub("<[^>]+>", "", headline(worse)[0]))
    assert re.search(
        r"m left the model's .* on forget \(forget\.jsonl\) better by 4\.0% \[.*\], at a cost of 0\.0%", first
    )
