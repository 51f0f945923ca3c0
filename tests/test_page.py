"""The HTML report: says the report's numbers, escapes everything, and fetches nothing."""

import base64
import html
import io
import json
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from test_figures import every_figure, report, scores, swept_report

import lens_unlearn as lu
from lens_unlearn.evaluation.report import Measure, Report
from lens_unlearn.figures.page import page
from lens_unlearn.figures.summary import findings, headline_metric, summary

EVIL = "</script><script>alert('x')</script>\"'<img src=x onerror=alert(1)>"
BASE = {"forget": 0.5, "retain": 0.4}


def own(document: str) -> str:
    """Return a page without the source of plotly, which it carries whole."""
    from plotly.offline import get_plotlyjs

    assert document.count(get_plotlyjs()) <= 1
    return document.replace(get_plotlyjs(), "")


def words(document: str) -> str:
    """Return what a reader sees, roughly."""
    without = re.sub(r"<(script|style)\b.*?</\1>", " ", own(document), flags=re.S)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", without)))


@pytest.fixture(scope="module")
def told() -> Report:
    values = {
        "base": {**BASE, "news": 0.3},
        "good": {"forget": 0.2, "retain": 0.39, "news": 0.3},
        "good:control": {"forget": 0.48, "retain": 0.38, "news": 0.29},
        "bad": {"forget": 0.45, "retain": 0.36, "news": 0.28},
        "bad:control": {"forget": 0.45, "retain": 0.36, "news": 0.28},
        "barely": {"forget": 0.445, "retain": 0.36, "news": 0.28},
        "barely:control": {"forget": 0.45, "retain": 0.36, "news": 0.28},
        "harmful": {"forget": 0.49, "retain": 0.2, "news": 0.3},
        "harmful:control": {"forget": 0.48, "retain": 0.38, "news": 0.29},
        "alone": {"forget": 0.3, "retain": 0.39, "news": 0.3},
    }
    for strength in (0.1, 0.3):
        values[f"swept@{strength}"] = {"forget": 0.5 - strength, "retain": 0.39, "news": 0.3}
        values[f"swept:control@{strength}"] = {"forget": 0.48, "retain": 0.38, "news": 0.29}
    made = report(values)
    made.provenance["seed"] = 7
    made.samples.append({"prompt": "def f(x):", "base": "return x", "good": "the girl"})
    made.figures["Where it was"] = lu.plot.layer_importance(scores().top(0.1))
    return made


@pytest.fixture(scope="module")
def document(told: Report) -> str:
    return page(told)


def test_the_summary_says_the_numbers_of_the_report(told, document):
    text = words(document)
    for name in ("good", "bad", "harmful", "alone"):
        for corpus in ("forget", "retain", "news"):
            drop = told.drop(name, corpus)
            low, high = drop.interval()
            numbers = f"{100 * drop.value:.1f}% [{100 * low:.1f}, {100 * high:.1f}] on {corpus}".replace("-", "−")
            assert numbers in text, (name, corpus)
    gain = told.selectivity("good")
    assert f"forget loss minus retain loss is {100 * gain.value:.1f}%" in text
    assert "reaches 50.0% on forget, 40.0% on retain and 30.0% on news" in text


def test_verdicts_are_said_plainly(told):
    verdicts = {one.condition.name: one.verdict for one in findings(told, "top1")}
    assert verdicts == {
        "good": "beats",
        "bad": "no better",
        "barely": "no better",
        "harmful": "worse",
        "alone": "no control",
        "swept@0.3": "beats",
    }
    items = [html.unescape(re.sub("<[^>]+>", "", item)) for item in re.findall("<li>.*?</li>", summary(told))]
    by_name = {item.split()[0]: item for item in items}
    assert "It beats its control" in by_name["good"]
    assert "It does not beat its control" in by_name["bad"]
    assert "overlap" in by_name["bad"]
    assert "It does not beat its control, it is worse" in by_name["harmful"]
    assert "No random control was measured" in by_name["alone"]
    assert "most selective of 2 strengths" in by_name["swept"]


def test_without_intervals_nothing_is_claimed():
    single = report({"base": BASE, "m": {"forget": 0.1, "retain": 0.4}, "m:control": BASE}, draws=0)
    assert [one.verdict for one in findings(single, "top1")] == ["no interval"]
    assert "Without intervals" in words(page(single))


def test_sections_come_in_reading_order(document):
    text = words(document)
    order = [
        "Summary",
        "Forgetting against its cost",
        "by condition",
        "What is left at each",
        "Where it was",
        "All numbers",
    ]
    assert sorted(order, key=text.index) == order
    assert "whoever detaches it has everything back" in text


def test_one_document_that_fetches_nothing(document):
    outside = own(document)
    assert document.count("<!DOCTYPE html>") == 1
    assert not re.search(r"""\b(src|href|action|poster|data)\s*=\s*["']?\s*(https?:|//)""", outside, re.I)
    assert not re.search(r"@import|url\s*\(|<link\b|<iframe\b|<img\b|<script[^>]+src", outside, re.I)
    assert "https://" not in outside
    assert "http://" not in outside
    assert "default-src 'none'" in document
    assert outside.count("<script") == outside.count("</script>")


def test_every_figure_can_be_read_back(document):
    blocks = re.findall(r"<script type='application/json' data-figure='([^']+)'>(.*?)</script>", document, re.S)
    assert len(blocks) == 4
    for name, block in blocks:
        figure = json.loads(block)
        assert figure["data"]
        assert figure["layout"]["template"]["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"
        assert f"id='{name}'" in document
    assert "prefers-color-scheme: dark" in document
    assert "@media print" in document
    assert "name='viewport'" in document


def test_a_fuller_trade_off_replaces_that_of_the_page(told):
    single = {key: measure for key, measure in told.measures.items() if "@" not in key[0]}
    figures = {"First": lu.plot.layer_importance(scores().top(0.1)), "All strengths": lu.plot.tradeoff(told)}
    text = words(page(Report(single, told.provenance, figures)))
    assert text.count("Forgetting against its cost") == 1
    assert text.index("All strengths") < text.index("by condition") < text.index("First")


def test_every_figure_of_a_report_is_shown_once(told):
    swept_figures = every_figure(swept_report())
    single = {key: measure for key, measure in told.measures.items() if "@" not in key[0]}
    text = page(Report(single, told.provenance, {f"Figure {name}": fig for name, fig in swept_figures.items()}))
    for name in swept_figures:
        assert text.count(f"<h3>Figure {name}<") == 1, name


def test_figures_from_elsewhere_are_shown_as_they_are(told):
    figure = go.Figure(go.Bar(x=[1, 2], y=[3, 4]), layout={"title": "Mine", "height": 300})
    document = page(Report(told.measures, told.provenance, {"Another": figure}))
    block = re.findall(r"<script type='application/json' data-figure='[^']+'>(.*?)</script>", document, re.S)[-1]
    assert json.loads(block)["layout"]["title"]["text"] == "Mine"
    assert "height:300px" in document


def test_folders_of_the_machine_are_not_in_the_text():
    where = report({"base": BASE, "m": {"forget": 0.2, "retain": 0.4}})
    where.provenance["corpora"]["forget"]["source"] = "forget (/home/me/private/code.jsonl)"
    text = words(page(where))
    assert "private" not in text.split("Settings")[0]
    assert "…/code.jsonl" in text


def test_everything_from_data_is_escaped():
    values = {"base": {**BASE, EVIL: 0.3}, EVIL: {"forget": 0.2, "retain": 0.3, EVIL: 0.3}}
    values |= {f"{EVIL}:control": values["base"], f"{EVIL}@0.1": values[EVIL]}
    evil = report(values, metric="top1")
    evil.provenance.update({"model": EVIL, EVIL: [EVIL]})
    evil.provenance["corpora"] = {"forget": {"source": EVIL, "tokens": 3, "documents": EVIL}}
    evil.samples.append({"prompt": EVIL, "base": EVIL, EVIL: EVIL})
    evil.figures[EVIL] = lu.plot.layer_importance({EVIL: scores().top(0.1)}, title=EVIL)
    outside = own(page(evil))
    assert "alert('x')</script>" not in outside
    assert "<img" not in outside
    harmless = re.sub(r"<script type='application/json'.*?</script>", "", outside, flags=re.S)
    assert harmless.count("<script") == 2
    assert re.findall(r"<(?!/?(?:[a-z][a-z0-9]*[\s>]|!DOCTYPE))", harmless.split("<script>")[0]) == []
    for block in re.findall(r"data-figure='[^']+'>(.*?)</script>", outside, re.S):
        assert "<" not in block
        json.loads(block)


def test_long_texts_are_cut():
    long = report({"base": BASE, "x" * 10_000: {"forget": 0.2, "retain": 0.3}})
    long.samples.append({"prompt": "p" * 10_000_000, "base": "b"})
    outside = own(page(long))
    assert len(outside) < 400_000
    assert "more characters" in outside


def test_the_csv_is_the_table_of_the_report(told, document):
    encoded = re.search(r"href='data:text/csv;charset=utf-8;base64,([^']+)'", document)[1]
    frame = pd.read_csv(io.BytesIO(base64.b64decode(encoded)))
    expected = told.to_frame()
    assert list(frame.columns) == list(expected.columns)
    assert np.allclose(frame["value"], expected["value"])


def test_a_formula_in_a_name_is_quoted():
    sneaky = report({"base": {"=1+1": 0.3}, "+cmd": {"=1+1": 0.2}})
    encoded = re.search(r"base64,([^']+)'", page(sneaky))[1]
    frame = pd.read_csv(io.BytesIO(base64.b64decode(encoded)))
    assert set(frame["corpus"]) == {"'=1+1"}
    assert "'+cmd" in set(frame["condition"])


def test_the_table_has_every_value(told, document):
    text = words(document)
    for key in (("good", "forget", "top1"), ("bad:control", "retain", "top1")):
        low, high = told[key].interval()
        assert f"{told[key].value:.3f}[{low:.3f}, {high:.3f}]" in text


def test_samples_and_settings_are_shown(document):
    text = words(document)
    assert "def f(x):" in text
    assert "the girl" in text
    assert '"seed": 7' in text


@pytest.mark.parametrize(
    "odd",
    [
        Report({}),
        report({"base": BASE}),
        report({"base": {"python": 0.5, "english": 0.4}, "m": {"python": 0.2, "english": 0.4}}),
        report({"base": BASE, "m": {"forget": 1.0, "retain": 1.0}}, metric="loss"),
        report({"base": {"forget": 0.0, "retain": 0.0}, "m": {"forget": 0.0, "retain": 0.1}}),
        report({"m": BASE, "n": BASE}),
        report({"base": BASE, "m": {"forget": float("nan"), "retain": 0.1}}),
        Report(
            {
                ("base", "forget", "top1"): Measure(0.5, np.zeros(0), 1),
                ("m", "retain", "kl"): Measure(1, np.zeros(0), 1),
            }
        ),
    ],
    ids=["empty", "base only", "other corpora", "loss only", "all zero", "no base", "nan", "unlike"],
)
def test_whatever_a_report_lacks_is_left_out(odd):
    text = words(page(odd))
    assert "What was unlearned" in text
    assert ("Forgetting against its cost" in text) == (
        headline_metric(odd) is not None
        and "m" in odd.conditions
        and bool(
            {"forget", "retain"} <= {corpus for condition, corpus, _ in odd.measures if condition == "m"}
            and ("base", "retain", "top1") in odd.measures
        )
    )


def test_other_corpora_are_summarized_without_a_verdict():
    text = words(page(report({"base": {"python": 0.5, "english": 0.4}, "m": {"python": 0.2, "english": 0.4}})))
    assert "60.0%" in text
    assert "control" not in text.split("Summary")[1].split("What this promises")[0]


def test_to_html_writes_the_page(told, tmp_path):
    path = tmp_path / "report.html"
    told.to_html(path)
    assert path.read_text(encoding="utf-8") == page(told)
