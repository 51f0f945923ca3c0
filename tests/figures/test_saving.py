"""Figures as files for papers: at the width of a column, with a caption that says where they are from, and from finished runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from command_line_helpers import call
from figures_helpers import report, scores, swept_report

import lens_unlearn as lu
from lens_unlearn.core.errors import ArtefactError, LensUnlearnError
from lens_unlearn.evaluation.report import Report
from lens_unlearn.figures import saving, theme
from lens_unlearn.reports.figures_of_page import figure_of, figures_of

BROWSER = any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")))


@pytest.fixture
def measured() -> Report:
    made = report({"base": {"forget": 0.5, "retain": 0.4}, "m": {"forget": 0.1, "retain": 0.39}})
    made.provenance.update({"plan": {"seed": 3, "controls": 5}})
    return made


@pytest.fixture
def folder(measured: Report, tmp_path: Path) -> Path:
    """What a run leaves behind."""
    run = tmp_path / "run"
    run.mkdir()
    measured.figures["Where <it> was"] = lu.plot.layer_importance(scores().top(0.1))
    measured.to_html(run / "report.html")
    (run / "run.json").write_text(json.dumps(measured.provenance))
    return run


def test_the_caption_says_what_it_shows_of_what_and_with_which_seeds(measured: Report, tmp_path: Path) -> None:
    said = lu.save_figure(lu.plot.tradeoff(measured), tmp_path / "x.html")
    assert said.startswith("Forgetting against its cost: next-token accuracy (top 1). Up and to the left is better;")
    assert "Model tiny · forget.jsonl, 1,000 tokens · retain.jsonl, 1,000 tokens." in said
    assert said.endswith("Seed 3 of splits and bootstrap, and seeds 3 to 7 of the random controls.")
    assert "<html" in (tmp_path / "x.html").read_text()[:200]
    assert saving.caption(lu.plot.layer_importance(scores())) == "Mean score, by layer."
    assert saving.caption(go.Figure(layout={"title": "Mine<br>and more"})) == "Mine."
    swept = report({"base": {"forget": 0.5}, "m": {"forget": 0.1}})
    swept.provenance["bootstrap"] = {"seed": 4, "resamples": 9}
    assert saving.caption(lu.plot.condition_bars(swept)).endswith("Seed 4 of splits and bootstrap.")


@pytest.mark.parametrize("width", [3.25, 6.75])
def test_a_figure_for_a_paper_is_a_copy_of_that_width_without_a_title(width: float) -> None:
    for fig in (
        lu.plot.tradeoff(swept_report()),
        lu.plot.layer_importance(scores()),
        go.Figure(go.Scatter(x=[1], y=[2])),
    ):
        before = fig.to_json()
        paper = saving.for_paper(fig, width)
        layout: Any = paper.layout
        assert layout.width == round(width * 96)
        assert layout.title.text is None
        assert (layout.font.size, layout.paper_bgcolor) == (10.5, "white")
        assert 150 < layout.height < 900
        assert fig.to_json() == before
    high: Any = saving.for_paper(go.Figure(), 3.25, 4.0).layout
    assert high.height == 4 * 96


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("x.tiff", {}, "ends in no format of a figure: choose from svg, pdf, png, html"),
        ("x", {}, "ends in no format"),
        ("x.pdf", {"width": "wide"}, "width='wide' is no size"),
        ("x.pdf", {"width": float("nan")}, "width=nan is no size"),
        ("x.pdf", {"width": True}, "width=True is no size"),
        ("x.pdf", {"height": 0}, "height=0 is no size"),
        ("x.pdf", {"height": 1000.0}, "height=1000.0 is no size"),
    ],
)
def test_what_cannot_be_saved_is_said_and_leaves_no_file(
    name: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(LensUnlearnError, match=words):
        lu.save_figure(go.Figure(), tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_what_is_no_figure_and_a_missing_chrome_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(LensUnlearnError, match="takes a plotly figure, not a str"):
        lu.save_figure("fig", tmp_path / "x.svg")  # type: ignore[arg-type]

    def lacking(*_: Any, **__: Any) -> bytes:
        raise RuntimeError("Kaleido requires Google Chrome to be installed.\nMore")

    monkeypatch.setattr(go.Figure, "to_image", lacking)
    with pytest.raises(
        LensUnlearnError, match=r"x\.svg cannot be drawn here \(Kaleido requires .* installed\.\): pip install"
    ) as caught:
        lu.save_figure(go.Figure(), tmp_path / "x.svg")
    assert "or save" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not BROWSER, reason="there is no chromium or chrome to draw with")
def test_a_browser_draws_it(measured: Report, tmp_path: Path) -> None:
    pytest.importorskip("kaleido")
    lu.save_figure(lu.plot.tradeoff(measured), tmp_path / "x.svg", width="page")
    drawn = (tmp_path / "x.svg").read_text()
    assert 'width="648"' in drawn
    assert "share lost on" in drawn


def test_the_figures_of_a_run_are_read_from_its_page(folder: Path, measured: Report) -> None:
    titles = [theme.meta_of(one)["title"] for one in figures_of(folder)]
    assert titles[0] == "Forgetting against its cost: next-token accuracy (top 1)"
    assert "Where <it> was" in titles
    drawn = figure_of(folder, "tradeoff")
    assert [trace.name for trace in drawn.data] == [trace.name for trace in lu.plot.tradeoff(measured).data]
    for name in ("where <it> was", "Where it was", str(titles.index("Where <it> was") + 1)):
        assert theme.meta_of(figure_of(folder / "report.html", name))["title"] == "Where <it> was"
    said = saving.caption(figure_of(folder, "where-it-was"))
    assert "Model tiny · forget.jsonl, 1,000 tokens" in said
    assert "Seed 3" in said
    with pytest.raises(LensUnlearnError, match="has no figure 'none': choose from 1 Forgetting against its cost"):
        figure_of(folder, "none")
    with pytest.raises(ArtefactError, match="holds no page of a run"):
        figures_of(folder.parent)


def test_the_command_lists_and_saves(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("figure", folder) == 0
    assert " 1  Forgetting against its cost" in capsys.readouterr().out
    out = tmp_path / "x.html"
    assert call("figure", folder, "tradeoff", "--out", out, "--width", "5") == 0
    assert "Model tiny" in capsys.readouterr().out
    assert out.exists()
    for wrong in (("tradeoff",), ("none", "--out", out), ("tradeoff", "--out", out, "--width", "wide")):
        assert call("figure", folder, *wrong) == 2
        assert capsys.readouterr().err.startswith("lens-unlearn: ")
