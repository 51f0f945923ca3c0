"""`compare`: every skill forgotten in turn, on documents kept apart; its table, figures and page; and its command."""

import html
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from command_line_helpers import call
from figures_helpers import array, data, report

import lens_unlearn as lu
from lens_unlearn.core.errors import BudgetError, LensUnlearnError
from lens_unlearn.evaluation.report import Measure, Report
from lens_unlearn.experiments import compare, documents, experiment
from lens_unlearn.experiments.compare import Comparison, plans_for
from lens_unlearn.reports.comparison_page import comparison_page, overall

SKILLS = ("arithmetic", "esperanto")
METHODS = ("selective-pruning", "neuron-adjust")
ARGUMENTS: list[object] = [
    "compare", "--model", "demo", "--skill", "arithmetic=demo:arithmetic", "--skill", "esperanto=demo:esperanto",
    "--method", METHODS[0], "--method", METHODS[1], "--tokens", 60, "--seeds", 2, "--quiet",
    "--retain-drop", 0.1,
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few_documents() -> Iterator[None]:
    """Tune on few documents: what they show is not the point here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "TUNED_ON", 12)
        yield


@pytest.fixture(scope="module")
def demo() -> Any:
    return lu.load_model("demo")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes."""
    out = tmp_path_factory.mktemp("compare") / "out"
    assert call(*ARGUMENTS, "--out", out) == 0
    return out


def test_the_command_writes_the_page_the_matrix_and_every_intervention(written: Path) -> None:
    names = {
        "compare.html",
        "matrix.csv",
        "report.safetensors",
        "run.json",
        *(f"{s}/{m}.safetensors" for s in SKILLS for m in METHODS),
    }
    assert {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()} == names
    assert os.listdir(written.parent) == ["out"]  # nothing is left beside it
    table = pd.read_csv(written / "matrix.csv")
    columns = ["forgotten", "method", "condition", "measured", "metric", "value", "low", "high", "n"]
    assert list(table.columns[:9]) == columns
    conditions = ["base", *(name + end for name in METHODS for end in ("", ":control"))]
    for skill in SKILLS:
        own = table[table.forgotten == skill]
        assert list(own.condition.unique()) == conditions
        assert set(own.measured) == {*SKILLS, "retain"}
        assert {"loss", "top1", "kl"} <= set(own.metric)
    assert set(table.method) == {"base", *METHODS}
    options = json.loads((written / "run.json").read_text())
    assert options["skills"] == list(SKILLS)
    assert options["retain_drop"] == 0.1
    assert options["confidence"] == 0.9
    for skill, other in zip(SKILLS, reversed(SKILLS), strict=True):
        for method in METHODS:
            tuning = options["chosen"][skill][method]["tuning"]
            assert tuning["worst"] == "retain", f"{other} alone is retained"
            assert tuning["retain_drop"] <= tuning["retain_bound"] <= 0.1
    assert options["plan"]["skills"]["esperanto"] == "demo:esperanto"


def test_the_matrix_says_what_the_saved_interventions_do(written: Path, demo: Any) -> None:
    """Measured again, by hand, on the documents that the settings say were kept for the test."""
    table = pd.read_csv(written / "matrix.csv").set_index(["forgotten", "condition", "measured", "metric"])
    whole = lu.read_corpus("demo:esperanto", demo, name="demo:esperanto", tokens=documents.to_read(60))
    test = whole.split(*compare.SHARES, seed=0)[1].sample(60, 0)
    for skill in SKILLS:
        edit = lu.load_intervention(written / skill / "selective-pruning.safetensors", demo)
        again = lu.evaluate(demo, {"esperanto": test}, {"edited": edit}, progress=False)
        for metric in ("loss", "top1"):
            for ours, theirs in (("edited", "selective-pruning"), ("base", "base")):
                value = table.loc[skill, theirs, "esperanto", metric]["value"]
                assert again[ours, "esperanto", metric].value == pytest.approx(value, rel=1e-5)


def test_nothing_is_fitted_tuned_and_tested_on_the_same_documents(demo: Any) -> None:
    plans = plans_for(SKILLS, "demo", retain_drop=0.1, tokens=200)
    texts = {name: lu.read_corpus(f"demo:{name}", demo, tokens=3000) for name in SKILLS}
    runs = compare._skill_runs(plans, demo, compare.split_skills(texts, None, 0), progress=False)
    tests = {}
    for skill, run in runs.items():
        fit, tuning = (
            {key for c in part.values() for key in c.keys} for part in (run.documents.fit, run.documents.tune)
        )
        test = {key for corpus in run.documents.test.values() for key in corpus.keys}
        assert all(fit and tuning and test for _ in "1")
        assert not any(one & other for one, other in combinations((fit, tuning, test), 2))
        assert list(run.documents.test) == ["forget", "retain", *(other for other in SKILLS if other != skill)]
        tests[skill] = run.documents.test
    for skill, part in tests.items():  # a skill is measured on the same documents, whichever is forgotten
        others = [tests[other][skill].fingerprint for other in SKILLS if other != skill]
        assert set(others) == {part["forget"].fingerprint}


def test_an_interrupted_comparison_goes_on_to_the_same_files(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    measured: list[int] = []

    def second_fails(*arguments: Any, **named: Any) -> Report:
        measured.append(1)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return lu.evaluate(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "evaluate", second_fails)
        assert call(*ARGUMENTS, "--out", out) == 130
    assert f"the same command with --resume goes on from {out}.partial" in capsys.readouterr().err
    assert (tmp_path / "out.partial" / "arithmetic" / "neuron-adjust.safetensors").exists()
    assert not out.exists()
    assert call(*ARGUMENTS, "--out", out) == 2
    assert "give --resume to go on" in capsys.readouterr().err
    assert call(*ARGUMENTS, "--seed", 1, "--out", out, "--resume") == 2
    assert "does not belong to this run" in capsys.readouterr().err

    searched: list[str] = []
    tuned = experiment.tune

    def counted(*arguments: Any, **named: Any) -> Any:
        searched.append("")
        return tuned(*arguments, **named)

    monkeypatch.setattr(experiment, "tune", counted)
    assert call(*ARGUMENTS, "--out", out, "--resume") == 0
    assert not searched  # the last evaluation alone was missing
    files = [
        path.relative_to(written) for path in written.rglob("*") if path.suffix in (".csv", ".json", ".safetensors")
    ]
    assert len(files) == 3 + len(SKILLS) * len(METHODS)
    for file in files:
        assert (written / file).read_bytes() == (out / file).read_bytes(), file
    capsys.readouterr()
    assert call(*ARGUMENTS, "--out", out, "--resume") == 0
    assert "finished before" in capsys.readouterr().out


BAD = {
    "one skill": (["--skill", "python=demo:python"], "give two or more"),
    "a name that is a folder": (["--skill", "..=demo:python", "--skill", "b=demo:english"], "cannot name a skill"),
    "a name of a corpus": (["--skill", "retain=demo:python", "--skill", "b=demo:english"], "cannot name a corpus"),
    "twice the same name": (["--skill", "a=demo:python", "--skill", "a=demo:english"], "given twice"),
    "no name": (["--skill", "demo:python", "--skill", "b=demo:english"], "NAME=VALUE"),
    "no such source": (["--skill", "a=demo:pyhton", "--skill", "b=demo:english"], "python"),
    "the same texts": (["--skill", "a=demo:facts", "--skill", "b=demo:facts"], "every document of a also stands in b"),
    "unknown method": (["--skill", "a=demo:facts", "--skill", "b=demo:arithmetic", "--method", "prune"], "choose from"),
    "unknown option": (["--skill", "a=demo:facts", "--skill", "b=demo:arithmetic", "--set", "x=1"], "such an option"),
    "budget above one": (["--skill", "a=demo:facts", "--skill", "b=demo:arithmetic", "--retain-drop", "5"], "0 to 1"),
    "no control": (["--skill", "a=demo:facts", "--skill", "b=demo:arithmetic", "--seeds", "0"], "at least one seed"),
    "tests of others": (
        ["--skill", "a=demo:facts", "--skill", "b=demo:arithmetic", "--test", "a=demo:facts:test"],
        "give each skill's, or none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, options = BAD[case]
    assert call("compare", "--model", "demo", *arguments, "--tokens", 60, "--out", tmp_path / "out", "--quiet") == 2
    error = capsys.readouterr().err.strip()
    assert options in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert call(*ARGUMENTS, "--out", tmp_path) == 2
    assert "give an empty or new folder" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_method_that_stays_within_no_budget_takes_nothing_out(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, refused = experiment.tune, []

    def strict(method: Any, *arguments: Any, **named: Any) -> Any:
        if method.name == "neuron-adjust" and not refused:
            refused.append("of the first skill")
            raise BudgetError("no fraction stays within the budget")
        return tuned(method, *arguments, **named)

    monkeypatch.setattr(experiment, "tune", strict)
    texts = {name: lu.read_corpus(f"demo:{name}", demo, tokens=5000) for name in SKILLS[:2]}
    options: dict[str, Any] = {"tokens": 60, "retain_drop": 0.3, "controls": 1, "progress": False}
    compared = lu.compare(demo, texts, METHODS, **options)
    first, second = compared.parts
    assert first["neuron-adjust", "forget", "loss"].value == first["base", "forget", "loss"].value
    assert second["neuron-adjust", "forget", "loss"].value > second["base", "forget", "loss"].value
    assert "neuron-adjust:control" not in first.conditions
    assert "no fraction" in first.provenance["chosen"]["neuron-adjust"]["nothing"]
    name = (
        "neuron-adjust:control",
        "forget",
        "loss",
    )  # in the means, the unedited model stands for the missing control
    assert compared[name].value == pytest.approx((first["base", "forget", "loss"].value + second[name].value) / 2)
    assert compared.drop("selective-pruning", "forget").value > 0
    assert "changed nothing: no strength was sure to keep the budget" in comparison_page(compared)
    assert "neuron-adjust" in repr(compared)
    assert lu.plot.forgetting_matrix(compared) is not None

    def broken(*_: Any, **__: Any) -> None:
        raise LensUnlearnError("there is nothing to lose")

    monkeypatch.setattr(experiment, "tune", broken)
    with pytest.raises(LensUnlearnError, match="forgetting arithmetic by selective-pruning: there is nothing to lose"):
        lu.compare(demo, texts, METHODS, **options)


# --- figures and page, of made-up numbers -----------------------------------------------------------------------------

BASE = {"a": 0.5, "b": 0.4, "c": 0.8}
LEFT = {
    "good": {"own": 0.1, "rest": 0.99},
    "good:control": {"own": 0.9, "rest": 0.9},
    "costly": {"own": 0.05, "rest": 0.7},
    "costly:control": {"own": 0.6, "rest": 0.6},
    "useless": {"own": 0.95, "rest": 0.96},
    "useless:control": {"own": 0.95, "rest": 0.96},
}
"""Of the unedited model's accuracy, what is left of the forgotten skill and of the others."""


def turn(forgotten: str, left: dict[str, dict[str, float]]) -> Report:
    others = [skill for skill in BASE if skill != forgotten]
    corpora = {"forget": BASE[forgotten], "retain": sum(BASE[o] for o in others) / 2, **{o: BASE[o] for o in others}}
    values = {"base": corpora} | {
        name: {c: v * parts["own" if c == "forget" else "rest"] for c, v in corpora.items()}
        for name, parts in left.items()
    }
    made = report(values, sd=0.004)
    return replace(made, provenance={**made.provenance, "forgotten": forgotten, "retain_drop": 0.05, "chosen": {}})


def made(changed: dict[str, dict[str, dict[str, float]]] | None = None) -> Comparison:
    parts = tuple(turn(skill, {**LEFT, **(changed or {}).get(skill, {})}) for skill in BASE)
    options = {"model": "tiny", "methods": ["good", "costly", "useless"], "retain_drop": 0.05}
    return Comparison(compare._means(parts), options, parts=parts)


def cells(document: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", document, re.S)
    return [
        [words(cell.replace("<", " <")).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)]
        for row in rows
    ]


def words(document: str) -> str:
    return html.unescape(
        re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", re.sub(r"<(script|style)\b.*?</\1>", " ", document, flags=re.S)))
    )


def test_the_matrix_has_the_shares_lost_and_is_symmetric_about_zero() -> None:
    figure = data(lu.plot.forgetting_matrix(made()))
    panels = {trace["name"]: np.round(array(trace["z"]), 6).tolist() for trace in figure["data"]}
    assert list(panels) == list(LEFT)
    assert panels["good"] == [[0.9, 0.01, 0.01], [0.01, 0.9, 0.01], [0.01, 0.01, 0.9]]
    assert panels["useless:control"][0] == [0.05, 0.04, 0.04]
    scale = figure["layout"]["coloraxis"]
    assert scale["cmin"] == -scale["cmax"] == pytest.approx(-0.95)
    assert scale["colorscale"][0][1] == "rgb(5,48,97)"  # of RdBu_r: red is lost
    assert figure["layout"]["yaxis"]["autorange"] == "reversed"  # the first skill above, so that the diagonal falls
    assert figure["layout"]["yaxis"]["ticktext"] == figure["layout"]["xaxis"]["ticktext"] == list(BASE)
    assert "<b>a forgotten by good</b><br>measured on b<br>" in figure["data"][0]["text"][0][1]
    alone = lu.plot.forgetting_matrix(made(), controls=False)
    assert [trace["name"] for trace in data(alone)["data"]] == ["good", "costly", "useless"]


def test_the_matrix_of_a_loss_has_differences() -> None:
    def rising(part: Report) -> Report:
        measures = {(c, n, "loss"): Measure(1 / m.value, 1 / m.draws, m.n) for (c, n, _), m in part.measures.items()}
        return replace(part, measures=measures)

    parts = tuple(map(rising, made().parts))
    figure = data(lu.plot.forgetting_matrix(replace(made(), parts=parts), metric="loss"))
    assert array(figure["data"][0]["z"])[0][0] == pytest.approx(10 * 2 - 2)
    with pytest.raises(LensUnlearnError, match="no 'top1' was measured: the report has loss"):
        lu.plot.forgetting_matrix(replace(made(), parts=parts))


def test_what_was_not_measured_is_left_blank() -> None:
    whole = made()
    parts = (
        replace(whole.parts[0], measures={k: m for k, m in whole.parts[0].measures.items() if k[0] != "good:control"}),
    )
    panels = {
        trace["name"]: array(trace["z"])
        for trace in data(lu.plot.forgetting_matrix(replace(whole, parts=(*parts, *whole.parts[1:]))))["data"]
    }
    assert np.isnan(panels["good:control"][0].astype(float)).all()
    assert not np.isnan(panels["good:control"][1].astype(float)).any()


def test_the_frontier_has_a_panel_for_the_mean_and_one_for_each_skill() -> None:
    whole = made()
    figure = data(lu.plot.frontier(whole))
    assert len(figure["data"]) == 4 * len(LEFT)
    panels = {trace["xaxis"] for trace in figure["data"]}
    assert len(panels) == 4
    good = [trace for trace in figure["data"] if trace["name"] == "good"]
    assert [array(t["x"])[0] for t in good] == pytest.approx([0.01] * 4)
    assert [array(t["y"])[0] for t in good] == pytest.approx([0.9] * 4)
    low, high = whole.parts[0].drop("good", "forget").interval()
    own = next(t for t in good if t["xaxis"] == "x2")  # of the first skill: the first panel is the mean
    assert array(own["error_y"]["array"])[0] == pytest.approx(high - 0.9, abs=1e-9)
    assert array(own["error_y"]["arrayminus"])[0] == pytest.approx(0.9 - low, abs=1e-9)
    mean = next(t for t in good if t["xaxis"] == "x")
    assert array(mean["error_y"]["array"])[0] < array(own["error_y"]["array"])[0]  # three skills say more than one
    assert {t["marker"]["color"] for t in figure["data"] if t["name"].endswith(": control")} == {"#8C8C8C"}
    budgets = [s for s in figure["layout"]["shapes"] if s["line"]["dash"] == "dash"]
    assert {s["x0"] for s in budgets} == {s["x1"] for s in budgets} == {0.05}
    assert len(budgets) == 4
    assert all(figure["layout"][f"xaxis{n}"]["matches"] == "x" for n in ("2", "3", "4"))


@pytest.mark.parametrize("draw", [lu.plot.forgetting_matrix, lu.plot.frontier])
def test_figures_of_a_comparison_refuse_another_report(draw: Any) -> None:
    with pytest.raises(LensUnlearnError, match="draws what lu.compare returns"):
        draw(made().parts[0])


def test_means_are_over_the_turns_whose_draws_are_paired() -> None:
    whole = made()
    assert whole["good", "forget", "top1"].value == pytest.approx(sum(BASE.values()) / 3 * 0.1)
    assert whole["good", "forget", "top1"].n == 3000
    key = ("good", "retain", "top1")
    np.testing.assert_allclose(whole[key].draws, sum(part[key].draws for part in whole.parts) / 3)
    assert "perplexity" not in whole.metrics


def test_the_page_says_in_words_what_the_numbers_are() -> None:
    options = words(overall(made()))
    assert "good forgets most within the budget: on average over the skills 90.0%" in options
    assert "The control is beaten by good on all skills, costly on all skills and useless on no skill." in options
    assert "On every skill some method beats its control." in options
    good, costly, useless = cells(comparison_page(made()))[1:4]
    assert good[1].startswith("90.0% [")
    assert re.search(r"1\.0% \[.*, when [abc] is forgotten ✓ within 5%", good[3])
    assert good[5].startswith("✓ beats its control on all 3 skills lead over it")
    assert costly[3].endswith("forgotten ✗ over 5%")
    assert useless[5].startswith("✗ beats its control on no skill")
    of_a = cells(comparison_page(made()))[5:8]
    assert of_a[1][0] == "costly"
    assert re.match(r"30\.0% \[.*\] [bc] ✗ over 5%", of_a[1][3])


def test_the_budget_is_held_by_the_worst_skill_and_not_by_the_mean() -> None:
    """Of b it took a tenth when c was forgotten; all the others together lost 3 %."""
    whole = made()
    part = whole.parts[2]
    hidden = {
        key: replace(one, value=one.value / 0.99 * 0.9)
        for key, one in part.measures.items()
        if key[:2] == ("good", "b")
    }
    parts = (*whole.parts[:2], replace(part, measures={**part.measures, **hidden}))
    told = words(overall(replace(whole, parts=parts)))
    assert "No method keeps the budget" not in told
    assert "useless forgets most within the budget" in told
    row = cells(comparison_page(replace(whole, parts=parts)))[1]
    assert row[3].startswith("10.0% [")
    assert row[3].endswith("b, when c is forgotten ✗ over 5%")


def test_the_page_says_where_no_method_beats_its_control() -> None:
    useless = {name: LEFT["useless"] for name in LEFT}
    options = words(overall(made({"b": useless})))
    assert "No method beats its control on b." in options
    assert "good on 2 of 3 skills" in options
    all_costly = {skill: dict.fromkeys(LEFT, LEFT["costly"]) for skill in BASE}
    told = words(overall(made(all_costly)))
    assert "No method keeps the budget on every retained skill. The most selective, " in told
    assert "It exceeds the budget when a, b and c are forgotten." in told


def test_the_page_is_one_file_that_fetches_nothing(written: Path) -> None:
    from plotly.offline import get_plotlyjs

    document = (written / "compare.html").read_text()
    rest = document.replace(get_plotlyjs(), "")
    assert len(rest) < len(document)
    assert not re.search(r"(?:src|href)\s*=\s*['\"](?!data:)", rest)
    assert "Content-Security-Policy" in rest
    figures = [json.loads(text) for text in re.findall(r"data-figure='figure-\d'>(.*?)</script>", rest)]
    assert [{trace["type"] for trace in figure["data"]} for figure in figures] == [{"scatter"}, {"heatmap"}]
    assert rest.index("<table class='summary'>") < rest.index("figure-0") < rest.index("Skill by skill")
    table = pd.read_csv(written / "matrix.csv")
    row = table[
        (table.forgotten == "esperanto") & (table.measured == "esperanto") & (table.metric == "top1")
    ].set_index("condition")
    lost = 1 - row.loc["selective-pruning", "value"] / row.loc["base", "value"]
    assert f"{100 * lost:.1f}%" in words(rest)


def test_a_comparison_shows_itself() -> None:
    whole = made()
    table = whole.table()
    assert list(table.index) == [(skill, condition) for skill in BASE for condition in LEFT]
    assert table.loc[("a", "good"), "forgotten skill top1"].startswith("90.0%")
    assert table.loc[("a", "good"), "b top1"].startswith("1.0%")
    assert table.loc[("b", "good"), "b top1"] == ""
    assert "shares of top1 lost" in repr(whole)
    assert "<table" in whole._repr_html_()
    frame = whole.to_frame()
    own = frame[(frame.forgotten == "a") & (frame.condition == "good") & (frame.measured == "a")]
    assert own.value.tolist() == pytest.approx([0.05])
    assert math.isclose(own.difference.item(), -0.45)
    assert comparison_page(replace(whole, figures={})).count("<section>") >= 4


def test_controls_share_the_documents_where_that_is_asked_for(demo: Any, tmp_path: Path) -> None:
    skills = {name: lu.read_corpus(f"demo:{name}", demo, tokens=3000) for name in SKILLS}
    options: dict[str, Any] = {"tokens": 200, "retain_drop": 0.3, "controls": 2, "progress": False}
    methods = ["selective-pruning"]
    every, shared = (lu.compare(demo, skills, methods, deal=deal, **options) for deal in (None, True))
    for one, other in zip(every.parts, shared.parts, strict=True):
        assert "dealt" not in one.provenance
        assert other.provenance["dealt"] == ["selective-pruning:control"]
        key = ("selective-pruning", "forget", "top1")
        assert one[key].value == other[key].value, "what is not shared does not change"
        np.testing.assert_array_equal(one[key].draws, other[key].draws)
        assert other["selective-pruning:control", "forget", "top1"].replicates == 2
    said = "each reads documents of its own"
    assert (said in comparison_page(every), said in comparison_page(shared)) == (False, True)
    assert call(*ARGUMENTS, "--deal-controls", "--out", tmp_path / "out") == 0
    settings = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [turn["deal"] for turn in settings["plan"]["turns"].values()] == [True, True]
    assert settings["dealt"] == [f"{method}:control" for method in sorted(METHODS)]
    assert said in (tmp_path / "out" / "compare.html").read_text()
