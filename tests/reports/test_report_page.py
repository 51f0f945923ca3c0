"""The HTML report: says the report's numbers, escapes everything, and fetches nothing."""

import base64
import csv
import html
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from figures_helpers import NEURONS, every_figure, histogram, report, scores, swept_report, trained

import lens_unlearn as lu
from lens_unlearn import cli
from lens_unlearn.evaluation.report import Measure, Report
from lens_unlearn.experiments import experiment
from lens_unlearn.experiments.plan import Plan, command_of
from lens_unlearn.figures.colored_tokens import colored_tokens
from lens_unlearn.reports.findings import findings, headline_metric, summary
from lens_unlearn.reports.headline import headline
from lens_unlearn.reports.report_page import page

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
def made_report() -> Report:
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
    made.figures["Where it was in layers"] = lu.plot.layer_importance(scores().top(0.1))
    return made


@pytest.fixture(scope="module")
def document(made_report: Report) -> str:
    return page(made_report)


def test_the_summary_says_the_numbers_of_the_report(made_report, document):
    text = words(document)
    for name in ("good", "bad", "harmful", "alone"):
        for corpus in ("forget", "retain", "news"):
            drop = made_report.drop(name, corpus)
            low, high = drop.interval()
            numbers = f"{100 * drop.value:.1f}% [{100 * low:.1f}, {100 * high:.1f}] on {corpus}".replace("-", "−")
            assert numbers in text, (name, corpus)
    gain = made_report.selectivity("good")
    assert f"forget loss minus retain loss is {100 * gain.value:.1f}%" in text
    assert "reaches 50.0% on forget, 40.0% on retain and 30.0% on news" in text


def test_verdicts_are_said_plainly(made_report):
    verdicts = {one.condition.name: one.verdict for one in findings(made_report, "top1")}
    assert verdicts == {
        "good": "beats",
        "bad": "no better",
        "barely": "no better",
        "harmful": "worse",
        "alone": "no control",
        "swept@0.3": "beats",
    }
    items = [html.unescape(re.sub("<[^>]+>", "", item)) for item in re.findall("<li>.*?</li>", summary(made_report))]
    by_name = {item.split()[0]: item for item in items}
    assert "It beats its control" in by_name["good"]
    assert "It does not beat its control" in by_name["bad"]
    assert "its lead over one more such control is" in by_name["bad"]
    assert "It does not beat its control, it is worse" in by_name["harmful"]
    assert "No control was measured" in by_name["alone"]
    assert "most selective of 2 strengths" in by_name["swept"]


# --- the result in words -------------------------------------------------------------------------------------------------


def plain_headline(made: Report) -> list[str]:
    return [html.unescape(re.sub("<[^>]+>", "", sentence)) for sentence in headline(made)]


def tuned(values: dict[str, dict[str, float]], budget: float = 0.05) -> Report:
    made = report(values)
    kinds = {"good:control": "[Ablate(zero, 3), Ablate(zero, 3)]", "quiet:control": "Abstain(prompt)"}
    plan = {"retain_drop": budget, "forget": "demo:python", "retain": ["demo:english", "/home/me/x.jsonl"]}
    controls = {"good": "as many random neurons of every layer", "quiet": "the same method fitted to shuffled labels"}
    made.provenance.update({"plan": plan, "confidence": 0.9, "conditions": kinds, "controls": controls})
    return made


GOOD = {"good": {"forget": 0.2, "retain": 0.395}, "good:control": {"forget": 0.48, "retain": 0.38}}
HUSHED = {"quiet": {"forget": 0.1, "retain": 0.2}, "quiet:control": {"forget": 0.49, "retain": 0.39}}
CHANCE = {"chance": {"forget": 0.45, "retain": 0.36}, "chance:control": {"forget": 0.45, "retain": 0.36}}


def test_the_headline_says_what_was_lost_at_what_cost_beside_what_and_how_sure():
    made = tuned({"base": BASE, **GOOD})
    first, second, third, last = plain_headline(made)
    lost, cost = (made.drop("good", corpus) for corpus in ("forget", "retain"))
    for drop in (lost, cost, made.drop("good:control", "forget"), made.drop("good:control", "retain")):
        low, high = drop.interval()
        assert f"{100 * drop.value:.1f}% [{100 * low:.1f}, {100 * high:.1f}]".replace("-", "−") in first
    assert "forget (demo:python)" in first
    assert "retain (demo:english, …/x.jsonl)" in first
    assert "its control, as many random neurons of every layer (mean of 2 draws), lost" in first
    assert second == "It beats its control."
    assert third.startswith(
        "It was tuned to lose at most 5% on retain with 90% confidence, and kept to it on these test documents"
    )
    assert "the interval of good reaches beyond it" in third
    assert last.startswith("In brackets: 95% intervals over the test documents (9 of forget and 9 of retain")


def test_the_headline_names_methods_that_removed_nothing_for_the_budget():
    quiet = {"quiet": {"forget": 0.5, "retain": 0.4}}
    made = tuned({"base": BASE, **GOOD, **quiet})
    made.provenance["chosen"] = {"good": {"fraction": 0.1}, "quiet": {"nothing": "no strength stays within the budget"}}
    sentences = plain_headline(made)
    assert sentences[0].startswith("good removed")
    assert sentences[1] == "It beats its control."
    assert sentences[2].endswith("no strength of quiet was sure to, so nothing was removed by it.")
    alone = tuned({"base": BASE, **quiet})
    alone.provenance["chosen"] = {"quiet": {"nothing": "no strength stays within the budget"}}
    assert plain_headline(alone) == [
        "No strength of quiet was sure to lose at most 5% on retain, so nothing was removed."
    ]
    del made.provenance["confidence"], made.provenance["chosen"]
    assert (
        "tuned to lose at most 5% on retain, and" in plain_headline(made)[2]
        or "5% on retain;" in plain_headline(made)[2]
    )


def test_the_headline_says_plainly_what_does_not_beat_its_control_and_what_exceeds_the_budget():
    both = plain_headline(tuned({"base": BASE, **GOOD, **CHANCE, **HUSHED}))
    assert both[0].startswith("Of 3 methods, good removed 60.0%"), "quiet lost more, but beyond the budget"
    assert both[1].startswith(
        "The controls are beaten by good and quiet; not by chance (forget loss minus retain loss 0.0%"
    )
    assert "chance (10.0% [" in both[2]
    assert "quiet (50.0% [" in both[2]
    assert both[2].endswith("exceed it.")
    none = plain_headline(tuned({"base": BASE, **CHANCE}))
    assert none[1].startswith("It does not beat its control (forget loss minus retain loss")
    two = {name.replace("chance", "other"): values for name, values in CHANCE.items()}
    assert plain_headline(tuned({"base": BASE, **CHANCE, **two}))[1] == "No method beats its control."
    assert "the same method fitted to shuffled labels" in plain_headline(tuned({"base": BASE, **HUSHED}))[0]


def test_the_headline_claims_no_more_than_was_measured():
    alone = {"base": BASE, "good": GOOD["good"]}
    assert plain_headline(report(alone))[1] == "No control was measured."
    assert not [
        sentence for sentence in plain_headline(report(alone)) if "tuned" in sentence or "used to fit" in sentence
    ]
    single = plain_headline(report({"base": BASE, **GOOD}, draws=0))
    assert "nobody can say whether a control is beaten" in single[1]
    assert headline(report({"base": BASE})) == []
    assert headline(report({"base": {"python": 0.5}, "m": {"python": 0.2}})) == []
    lacking = {"base": BASE, "m": BASE, "m:control": {"forget": 0.5}}
    assert "control lost" not in plain_headline(report(lacking))[0]


@pytest.mark.parametrize(
    ("made", "count"),
    [
        ("Ablate(zero, 3 of 9 neurons, 2 layers, mlp.post, attn.z)", ""),
        ("[Ablate(zero, 1,638 of 9,000 neurons, mlp.post)]", ""),
        ("[Ablate(zero, a, b) + Adjust(x, [1, 2]), Ablate(zero, a, b) + Adjust(x, [1, 2])]", " (mean of 2 draws)"),
        ("(Delta(1), Delta(2), Delta(3))", " (mean of 3 draws)"),
        ("(Delta(1),)", ""),
    ],
)
def test_what_a_control_is_says_whoever_made_it_and_its_draws_are_counted(made, count):
    values = {"base": BASE, **GOOD}
    known = report(values)
    known.provenance.update({"conditions": {"good:control": made}, "controls": {"good": "<b>chance</b>"}})
    assert f"its control, <b>chance</b>{count}, lost" in html.unescape(headline(known)[0])
    assert f"Its control, &lt;b&gt;chance&lt;/b&gt;{count}, lost" in summary(known)
    assert "each beside its control: <b>chance</b>. Texts" in words(page(known))
    silent = report(values)
    silent.provenance["conditions"] = {"good:control": made}
    assert "its control lost" in headline(silent)[0]
    assert "each beside its control. Texts" in words(page(silent))


def test_the_kinds_of_control_are_each_named_once():
    kinds = {"good": "random neurons", "quiet": "shuffled labels", "chance": "random neurons"}
    known = report({"base": BASE, **GOOD, **HUSHED, **CHANCE})
    known.provenance["controls"] = kinds
    assert "each beside its control: random neurons, or shuffled labels. Texts" in words(page(known))


def test_the_method_named_where_none_keeps_to_the_budget_is_the_most_selective():
    crude = {"crude": {"forget": 0.05, "retain": 0.1}, "crude:control": {"forget": 0.5, "retain": 0.05}}
    fine = {"fine": {"forget": 0.2, "retain": 0.37}, "fine:control": {"forget": 0.5, "retain": 0.37}}
    assert plain_headline(tuned({"base": BASE, **crude, **fine}))[0].startswith("Of 2 methods, fine removed")


def test_what_was_written_is_marked_where_it_leaves_the_unedited_models_text():
    made = report({"base": BASE, "m": BASE})
    written = {"true answer": "the girl", "base": "the <girl>", "m": "the <boy>", "same": "the <girl>", "quiet": "No."}
    made.samples.append({"corpus": "forget", "prompt": "Who?", **written, "withheld": ["quiet"], "empty": ""})
    document = page(made)
    assert "the &lt;<mark>boy&gt;</mark>" in document
    text = words(document)
    assert "same · as the unedited model" in text
    assert "quiet · abstained" in text
    assert "<mark>the girl" not in document, "a true answer is no change"
    assert "(nothing)" in text


def test_samples_are_tidy_and_aligned():
    made = report({"base": BASE, "m": BASE})
    long = " ".join(f"word{number}" for number in range(200))
    for corpus, base in (("forget", "\n\n  x = 1\n\n \n\n  y = 2\n"), ("forget", "a"), ("retain", "b"), ("news", "c")):
        made.samples.append(
            {"corpus": corpus, "prompt": long, "reference": "r", "base": base, "m": base, "n": base, "o": "z"}
        )
    document = page(made)
    assert "<pre>  x = 1\n  y = 2</pre>" in document, "blank lines are left out, and what is indented stays so"
    assert re.search(r"<pre class='prompt'>… \([\d,]+ characters before\)\nword\d+ word", document)
    shown, folded = document.split("2 more texts")
    assert shown.count("<pre class='prompt'>") == 2
    assert "On <i>forget</i>" in shown
    assert "On <i>retain</i>" in shown
    assert folded.count("<pre class='prompt'>") == 2
    assert document.count("--columns:3'") == 4, "five panels in two rows"


def test_coloured_tokens_stand_by_the_texts_and_nothing_but_ours_is_taken_for_html():
    shown = colored_tokens(["<b>", " two"], [0.5, -1.0])
    document = page(Report({}, {}, {"Tokens": shown}))
    assert str(shown) in document
    with pytest.raises(AttributeError):
        page(Report({}, {}, {"Tokens": str(shown)}))


def test_the_page_says_how_large_it_is(document):
    size = float(re.search(r"one file of ([\d.]+) MB", document)[1])
    assert size == pytest.approx(len(document.encode()) / 1e6, abs=0.1)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {
            "methods": ("simu", "neuron-adjust"),
            "settings": {"simu.lr": 1e-3, "simu.attention": "lora", "rank_by": ("a", 2)},
        },
        {
            "also": {"sums": "demo:arithmetic:test:question>answer"},
            "template": "Q: {prompt}\nA: {answer}",
            "sweep": False,
        },
        {
            "test_forget": "t.jsonl",
            "test_retain": ("a b.jsonl", "c.jsonl"),
            "retain_drop": 0.05,
            "seed": 3,
            "answers": 4,
            "answer_eos": True,
        },
    ],
)
def test_the_command_in_a_report_repeats_the_run(monkeypatch, capsys, more):
    plan = Plan("demo", "demo:python", ("demo:english", "x'y.txt"), tokens=700, **more)
    asked = []
    monkeypatch.setattr(experiment, "carry_out", lambda plan, out, **_: asked.append((plan, str(out))))
    monkeypatch.setattr(sys, "argv", shlex.split(command_of(plan)))
    cli.app(standalone_mode=False)
    assert asked == [(plan, "again")]
    assert "again" in capsys.readouterr().out


def test_what_only_python_could_set_once_is_in_the_command_too():
    command = command_of(Plan("demo", "a.txt", ("b.txt",), controls=2, fractions=(0.1,)))
    assert "--control-seeds 2" in command
    assert "--fractions 0.1" in command


def test_without_intervals_nothing_is_claimed():
    single = report({"base": BASE, "m": {"forget": 0.1, "retain": 0.4}, "m:control": BASE}, draws=0)
    assert [one.verdict for one in findings(single, "top1")] == ["no interval"]
    assert "No intervals, so nobody can say whether a control is beaten" in words(page(single))


def test_of_few_documents_nothing_is_claimed():
    """Every difference is plain to see, and five documents are too few for an interval all the same."""
    many = report({"base": BASE, "m": {"forget": 0.1, "retain": 0.4}, "m:control": BASE})
    assert [one.verdict for one in findings(many, "top1")] == ["beats"]
    few = replace(many, measures={key: replace(one, units=5) for key, one in many.measures.items()})
    assert [one.verdict for one in findings(few, "top1")] == ["no interval"]
    text = words(page(few))
    assert "Too few documents for an interval (5), so nobody can say whether a control is beaten" in text
    assert "It beats its control" not in text
    assert "beat their controls" not in text
    assert "[nan" not in text


def test_sections_come_in_reading_order(document):
    text = words(document)
    order = [
        "its control lost",
        "Of 6 methods",
        "Forgetting against its cost",
        "Where it was found",
        "Where it was in layers",
        "Before and after",
        "What it does not say",
        "Method by method",
        "2 more figures",
        "by condition",
        "Remaining next-token accuracy",
        "All numbers",
        "How it was done",
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


def test_a_fuller_trade_off_replaces_that_of_the_page(made_report):
    single = {key: measure for key, measure in made_report.measures.items() if "@" not in key[0]}
    figures = {"First": lu.plot.layer_importance(scores().top(0.1)), "All strengths": lu.plot.tradeoff(made_report)}
    text = words(page(Report(single, made_report.provenance, figures)))
    assert text.count("Forgetting against its cost") == 1
    assert text.index("All strengths") < text.index("First") < text.index("by condition")


def test_every_figure_of_a_report_is_shown_once(made_report):
    swept_figures = every_figure(swept_report())
    single = {key: measure for key, measure in made_report.measures.items() if "@" not in key[0]}
    text = page(Report(single, made_report.provenance, {f"Figure {name}": fig for name, fig in swept_figures.items()}))
    for name in swept_figures:
        assert text.count(f"<h3>Figure {name}<") == 1, name
    assert "more figures" in text


def test_figures_from_elsewhere_are_shown_as_they_are(made_report):
    figure = go.Figure(go.Bar(x=[1, 2], y=[3, 4]), layout={"title": "Mine", "height": 300})
    document = page(Report(made_report.measures, made_report.provenance, {"Another": figure}))
    blocks = re.findall(r"<script type='application/json' data-figure='[^']+'>(.*?)</script>", document, re.S)
    assert "Mine" in [json.loads(block)["layout"].get("title", {}).get("text") for block in blocks]
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
    assert "9,999,500 characters before" in outside


def test_the_csv_is_the_table_of_the_report(made_report, document):
    encoded = re.search(r"href='data:text/csv;charset=utf-8;base64,([^']+)'", document)[1]
    frame = pd.read_csv(io.BytesIO(base64.b64decode(encoded)))
    expected = made_report.to_frame()
    assert list(frame.columns) == list(expected.columns)
    assert np.allclose(frame["value"], expected["value"])


def test_a_formula_in_a_name_is_quoted():
    sneaky = report({"base": {"=1+1": 0.3}, "+cmd": {"=1+1": 0.2}})
    encoded = re.search(r"base64,([^']+)'", page(sneaky))[1]
    frame = pd.read_csv(io.BytesIO(base64.b64decode(encoded)))
    assert set(frame["corpus"]) == {"'=1+1"}
    assert "'+cmd" in set(frame["condition"])


def test_the_table_has_every_value(made_report, document):
    text = words(document)
    for key in (("good", "forget", "top1"), ("bad:control", "retain", "top1")):
        low, high = made_report[key].interval()
        assert f"{made_report[key].value:.3f}[{low:.3f}, {high:.3f}]" in text


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
    assert "control" not in text.split("Method by method")[1].split("How sure this is")[0]


def test_to_html_writes_the_page(made_report, tmp_path):
    path = tmp_path / "report.html"
    made_report.to_html(path)
    assert path.read_text(encoding="utf-8") == page(made_report)


# --- hostile content -----------------------------------------------------------------------------------------------------

MARKUP = {
    "ends the script": "</script><script>document.title='owned'</script>",
    "ends the title": "</title></style><script>document.title='owned'</script>",
    "image": "<img src='http://example.invalid/x.png' onerror='document.title=`owned`'>",
    "svg": "<svg onload=\"document.title='owned'\"><image href='https://example.invalid/x.svg'/></svg>",
    "quotes": "\"' onmouseover='document.title=`owned`' style='background:url(//example.invalid/q)",
    "link": "<a href='javascript:document.title=1'>javascript:alert(1)</a><link rel=stylesheet href=//example.invalid/l.css>",
    "style": "<style>@import 'http://example.invalid/s.css';</style><iframe src=//example.invalid/f></iframe>",
    "comment": "<!-- <script> --!> ]]> <![CDATA[",
    "template": "%{customdata} ${x} {{x}} $\\href{javascript:alert(1)}{x}$ <extra>",
    "plotly": "<b onclick='document.title=`owned`'>b</b><span style='background:url(//example.invalid/p)'>s</span><br>",
    "entities": "&lt;script&gt;document.title='owned'&lt;/script&gt;&#60;img src=x&#62;",
    "odd letters": "\u2028\u2029\u202e\x00\x1b[2J",
}
EVERY = " ".join(MARKUP.values())


def hostile_report(evil: str, metric: str = "top1") -> Report:
    """A report in which everything that can come from data is hostile."""
    values = {"base": {**BASE, evil: 0.3}, evil: {"forget": 0.2, "retain": 0.3, evil: 0.3}}
    values |= {f"{evil}:control": values["base"], f"{evil}@0.1": values[evil], f"{evil}@0.2": values[evil]}
    made = report(values, metric=metric)
    made.provenance.update({"model": evil, evil: [evil], "conditions": {evil: evil}, "controls": {evil: evil}})
    made.provenance["corpora"] = {name: {"source": evil, "tokens": 3, "documents": evil} for name in ("forget", evil)}
    made.samples.append({"prompt": evil, "corpus": evil, "base": evil, evil: evil})
    selections = {evil: scores().top(0.1), f"b{evil}": scores().top(0.2)}
    made.figures[evil] = lu.plot.layer_importance(selections, title=evil, subtitle=evil)
    made.figures[f"2{evil}"] = lu.plot.selection_overlap(selections, title=evil, subtitle=evil)
    made.figures[f"3{evil}"] = lu.plot.activation_distribution({evil: histogram()}, NEURONS, title=evil)
    made.figures[f"4{evil}"] = lu.plot.training_curves(
        {evil: trained(), "b": trained(forget={"name": evil}, stopped=evil)}
    )
    made.figures[f"5{evil}"] = lu.plot.condition_bars(made, metric)
    return replace(made, title=evil, parts=(replace(report({"base": BASE, evil: BASE}), title=evil),))


class Elements(HTMLParser):
    """Notes every element with its attributes, as a browser would see them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {key: value or "" for key, value in attrs}))


def elements(document: str) -> list[tuple[str, dict[str, str]]]:
    reader = Elements()
    reader.feed(document)
    return reader.found


TAGS = "html head meta title style body header main section h1 h2 h3 h4 p i b strong small ul li span figure figcaption div script"
TAGS += " table thead tbody tr th td details summary pre article a nav ol mark footer"
ATTRIBUTES = "lang charset http-equiv content name class id style type data-figure title scope rowspan href download"
ATTRIBUTES += " role tabindex aria-label data-label"


def requests_in(document: str) -> list[str]:
    """List what in a page could make a request or run, beside its own two scripts; the policy has to come before all of it."""
    outside = own(document)
    found = elements(outside)
    odd = [tag for tag, _ in found if tag not in TAGS.split()]
    odd += [f"{tag} {name}" for tag, attributes in found for name in attributes if name not in ATTRIBUTES.split()]
    for tag, attributes in found:
        href = attributes.get("href", "data:text/csv;")
        odd += [f"href={href[:40]}"] * (not re.match(r"data:text/csv;|#part-\d+$", href))
        odd += [f"{tag} style" for word in ("url(", "image", "expression") if word in attributes.get("style", "")]
        odd += [f"{tag} refresh"] * (
            attributes.get("http-equiv", "Content-Security-Policy") != "Content-Security-Policy"
        )
    odd += [f"style {one}" for sheet in re.findall(r"<style>(.*?)</style>", outside, re.S)
            for one in ("@import", "url(", "image-set", "src:", "@font-face") if one in sheet]  # fmt: skip
    scripts = re.findall(r"<script>(.*?)</script>", outside, re.S)
    odd += [f"{len(scripts)} scripts"] * (
        len(scripts) not in (0, 2)
    )  # plotly, which `own` leaves empty, and what draws
    asking = ("fetch(", "XMLHttpRequest", "import(", "WebSocket", "EventSource", "sendBeacon", ".src")
    odd += [word for word in asking for script in scripts if word in script]
    order = [tag if tag != "meta" else next(iter(attributes)) for tag, attributes in found[:4]]
    return odd + ["the policy is late"] * (order != ["html", "head", "charset", "http-equiv"])


def drawn_strings(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (text for one in value.values() for text in drawn_strings(one))
    elif isinstance(value, list):
        yield from (text for one in value for text in drawn_strings(one))
    elif isinstance(value, str):
        yield value


def require_text_alone(document: str) -> None:
    """Nothing in a page makes a request or runs, and no text in its figures has tags but ours."""
    assert requests_in(document) == []
    blocks = re.findall(r"<script type='application/json' data-figure='[^']+'>(.*?)</script>", document, re.S)
    assert len(blocks) > 6
    for text in (text for block in blocks for text in drawn_strings(json.loads(block))):
        tags = {*re.findall(r"<[^>]*>?", text)}
        assert tags <= {"<b>", "</b>", "<br>", "<extra>", "</extra>", "<span style='font-size:12px'>", "</span>"}, text
        assert "%{customdata} " not in text


@pytest.mark.parametrize("name", [*MARKUP, "every"])
def test_markup_from_anywhere_is_shown_as_text(name):
    require_text_alone(page(hostile_report(MARKUP.get(name, EVERY))))


def test_marks_that_reverse_text_and_controls_are_shown_by_their_code_points():
    document = page(hostile_report("a\u202eb\x1b\u2066c"))
    figures_apart = re.sub(r"<script.*?</script>", "", document, flags=re.DOTALL)
    assert "a[U+202E]b[U+001B][U+2066]c" in figures_apart
    assert not {"\u202e", "\x1b", "\u2066"} & set(figures_apart)


@pytest.mark.parametrize("metric", ["image", "plotly"])
def test_a_metric_of_ones_own_is_shown_as_text(metric):
    require_text_alone(page(hostile_report("m", MARKUP[metric])))


def test_the_ordinary_page_makes_no_request(document):
    assert requests_in(document) == []


@pytest.mark.parametrize(
    "added",
    [
        "<img src=x>", "<a href='http://example.invalid'>x</a>", "<p onclick='x'>", "<script>x</script>", "<base href=x>",
        "<p style='background:url(x)'>", "<meta http-equiv='refresh' content='0;url=x'>", "<object data=x>", "<form action=x>",
    ],
)  # fmt: skip
def test_what_would_make_a_request_is_found(document, added):
    assert requests_in(document.replace("<main>", f"<main>{added}", 1))


def test_ten_megabytes_are_cut_wherever_they_come_from():
    names, huge = "<b>" + "x" * 200_000, "<b>" + "x" * 10_000_000
    made = hostile_report(names)
    made.samples.append({"prompt": huge, "base": huge})
    made.provenance["model"] = huge
    made.provenance["corpora"]["forget"]["source"] = huge
    made.figures[huge] = lu.plot.tradeoff(made, title=huge)
    document = page(replace(made, title=huge))
    assert len(own(document)) < 1_000_000  # of which the settings of two reports are 200,000 each
    assert "too large for this page" in document
    assert requests_in(document) == []


def test_a_figure_of_ones_own_cannot_end_its_script():
    figure = go.Figure(go.Bar(x=[EVERY], y=[1], name=EVERY), layout={"title": EVERY, "meta": {EVERY: EVERY}})
    document = page(Report({}, {}, {"Mine": figure}))
    assert requests_in(document) == []


def test_the_notebook_shows_markup_as_text():
    shown = hostile_report(EVERY)._repr_html_()
    assert {tag for tag, _ in elements(shown)} <= {"div", "table", "thead", "tbody", "tr", "th", "td", "p", "small"}
    long = hostile_report("<b>" + "y" * 200_000)._repr_html_()
    assert len(long) < 100_000
    assert "<b>" not in long
    assert Report({})._repr_html_()


def test_half_a_letter_does_not_stop_the_writing(tmp_path):
    """JSON can hold half a pair of surrogates, which UTF-8 cannot."""
    made = report({"base": BASE, "m": BASE})
    made.samples.append({"prompt": "a \ud800 b", "base": "\udfff"})
    made.provenance["corpora"]["forget"]["source"] = "\ud800.jsonl"
    made.to_html(tmp_path / "report.html")
    assert "a [U+D800] b" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "begin", ["=", "+", "-", "@", "\t=", "\r=", "\n@", " =", "＝", "\0=", "\ufeff=", "a\r=", "a\n="]
)
def test_no_name_is_a_formula(tmp_path, begin):
    name = f"{begin}cmd|' /C calc'!A0"
    made = report({"base": {name: 0.3}, name: {name: -0.25}}, metric=name)
    made.to_csv(tmp_path / "metrics.csv")
    text = (tmp_path / "metrics.csv").read_bytes().decode()
    encoded = re.search(r"base64,([^']+)'", page(made))[1]
    assert base64.b64decode(encoded).decode() == text == made.csv()
    lines = text.splitlines()
    assert len(lines) == 3, "a line break in a name would begin a line with a formula"
    rows = list(csv.reader(lines))
    for cell in (rows[1][1], rows[1][2], *rows[2][:3]):
        assert cell.lstrip()[0] in "'a"
        assert "cmd|' /C calc'!A0" in cell
    assert [float(row[3]) for row in rows[1:]] == [0.3, -0.25]  # a number that is negative is no formula
    assert set(made.to_frame()["corpus"]) == {name}


def test_ordinary_names_stay_as_they_are():
    made = report({"base": {"forget": 0.3}, "a-b=c@0.1": {"forget": 0.2}})
    assert "a-b=c@0.1,forget,top1," in made.csv()
    assert "'" not in made.csv()


# --- in a browser --------------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
QUIET = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
)
QUIET += "--disable-sync --disable-default-apps --no-pings --virtual-time-budget=6000 --dump-dom"
WITNESS = """<script>
document.querySelectorAll("details").forEach(function (one) { one.open = true; });  // figures inside are drawn when they are seen
setTimeout(function () {
  var asked = performance.getEntriesByType("resource").map(function (entry) { return entry.name; });
  document.documentElement.setAttribute("data-asked", JSON.stringify(asked));
}, 4000)</script>"""


def opened(document: str, folder: Path) -> tuple[str, list[str]]:
    """Open a page in a browser that reaches nothing: what it became, and the addresses that it asked for."""
    path = folder / "page.html"
    path.write_bytes((document + WITNESS).encode(errors="backslashreplace"))
    alone = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [BROWSER, *QUIET.split(), *alone, path.as_uri()], capture_output=True, timeout=300, check=False
    )
    shown = done.stdout.decode()
    found = re.search('data-asked="([^"]*)"', shown)
    if found is None:
        pytest.skip(f"the browser does not run here: {done.stderr.decode()[-200:]}")
    return shown, json.loads(html.unescape(found[1]))


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium to open the page in")
def test_a_browser_asks_for_nothing_and_runs_nothing_of_the_texts(tmp_path):
    shown, asked = opened(f"<!DOCTYPE html><title>A</title>{MARKUP['ends the script']}{MARKUP['image']}", tmp_path)
    assert asked == ["http://example.invalid/x.png"], "what is to be found is found"
    assert "<title>owned</title>" in shown
    document = page(hostile_report(EVERY))
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", document)  # it is not the policy alone
    assert len(bare) < len(document)
    shown, asked = opened(bare, tmp_path)
    assert asked == []
    assert "<title>What was unlearned" in shown
    body = re.sub(r"<script\b.*?</script>", "", shown.split("<body>", 1)[1], flags=re.S)
    assert body.count("js-plotly-plot") == document.count("data-figure=")
    seen = elements(body)
    assert not {tag for tag, _ in seen} & {"img", "iframe", "link", "base", "object", "embed", "form", "script"}
    assert not [name for _, attributes in seen for name in attributes if name.startswith("on")]
    links = [attributes.get("href") or attributes.get("xlink:href") or "" for _, attributes in seen]
    assert all(link.startswith(("data:text/csv;", "data:image/png;base64,", "#part-")) for link in links if link)
    assert "&lt;script&gt;document.title" in body
