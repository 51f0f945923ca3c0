"""Figures, by their data: directions, ranges, colours, names, sizes, and what happens with awkward input."""

import ast
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from figures_helpers import (
    NEURONS,
    QUALITIES,
    array,
    attributions,
    audited,
    data,
    every_figure,
    histogram,
    keys,
    moments,
    of_keys,
    report,
    scores,
    swept_report,
    trained,
)
from skill_graph_helpers import graph

import lens_unlearn as lu
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.conditions import Condition
from lens_unlearn.evaluation.report import Report
from lens_unlearn.evaluation.tofu import Utility
from lens_unlearn.figures import theme
from lens_unlearn.figures.activation_distribution import density, merged
from lens_unlearn.figures.frontier import _columns
from lens_unlearn.figures.rank_axis import Ranks
from lens_unlearn.figures.training_curves import MAX_COMPARED, MAX_POINTS
from lens_unlearn.keyspace import separation
from lens_unlearn.keyspace.key_space import KeySpace
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.attribution import Attribution, Completeness, critical
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.moments import Moments

NAME = re.compile(r"(L\d+\.[a-z_.]+)\[(\d+(?:,\d+)?)\]")
BUDGET = 2_000_000


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def swept() -> Report:
    return swept_report()


@pytest.fixture(scope="module")
def figures(swept: Report) -> dict[str, go.Figure]:
    return every_figure(swept)


def test_every_figure_has_the_house_style_and_says_what_it_is(figures):
    import plotly.io as pio

    before = pio.templates.default
    for name, fig in figures.items():
        figure = fig.to_dict()
        layout = figure["layout"]
        assert isinstance(fig, go.Figure), name
        assert layout["title"]["text"], name
        assert layout["template"]["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)", name
        assert layout["meta"]["lens_unlearn"]["title"], name
        for trace in figure["data"]:
            hover = trace.get("hovertemplate")
            assert "<extra></extra>" in hover if hover else trace.get("hoverinfo") == "skip", name
    assert pio.templates.default == before


def test_every_figure_is_defined_in_the_file_of_its_name():
    from lens_unlearn import figures

    folder = Path(figures.__file__).parent
    for name in figures.__all__:
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], name
        assert getattr(figures, name).__module__ == f"lens_unlearn.figures.{name}"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files - set(figures.__all__) == {
        "theme",
        "saving",
        "key_space_parts",
        "key_space_layers",
        "rank_axis",
        "expert_grid",
    }


def test_layer_zero_is_at_the_bottom(figures):
    figs = figures
    for name in ("importance", "selections", "heatmap", "attributions"):
        low, high = figs[name].layout.yaxis.range
        assert (low, high) == (-0.5, 3.5), name
        assert figs[name].layout.yaxis.title.text == "layer", name
    assert tuple(figs["overlap"].layout.yaxis2.range) == (-0.5, 3.5)
    for name in ("key_space", "key_clusters", "key_volume"):
        assert tuple(figs[name].layout.yaxis.range) == (-0.5, 2.5), name
        assert figs[name].layout.yaxis.title.text == "layer", name


def test_an_audit_s_figures_show_conditions_by_attacks_and_layers_from_the_bottom(figures):
    low, high = figures["recoverability"].layout.yaxis.range
    assert (low, high) == (-0.5, 3.5)
    assert figures["recoverability"].layout.yaxis.title.text == "layer"
    assert figures["recoverability in steps"].layout.xaxis.title.text == "step"
    lines = [t for t in data(figures["recoverability"])["data"] if t.get("mode") == "lines+markers"]
    assert {line["name"]: line["line"]["dash"] for line in lines} == {
        "hides:control": "dot", "removes:control": "dot", "base": "solid", "hides": "solid", "removes": "solid", "reference": "dash"
    }  # fmt: skip
    assert {line["line"]["color"] for line in lines if "control" in line["name"] or line["name"] == "reference"} == {
        theme.CONTROL
    }
    title = figures["recoverability"].layout.title.text
    assert title.startswith("Is it gone? Patching, layer by layer<br>")
    assert "dotted: random control" in title
    alone = lu.plot.recoverability(audited(), conditions=["base", "hides"]).layout.title.text
    assert "dotted" not in alone, "there is no control"
    bands = [t for t in data(figures["recoverability"])["data"] if t.get("fill") == "toself"]
    assert len(bands) == len(lines)
    cells = array(data(figures["audit"])["data"][0]["z"])
    assert cells.shape == (6, 3)
    np.testing.assert_allclose(cells[:, 1], [1, 0.9, 1, 0.1, 0.95, 0])
    assert "no reference" in figures["audit without a reference"].layout.title.text
    assert figures["audit"].layout.coloraxis.cmin == 0


def test_what_is_no_audit_and_curves_that_there_are_not_are_refused():
    for draw in (lu.plot.audit, lu.plot.recoverability):
        with pytest.raises(LensUnlearnError, match="draws what lu.audit returns, not a Report"):
            draw(swept_report())
    with pytest.raises(LensUnlearnError, match="the attack 'probe' was not made: choose from depth, steps"):
        lu.plot.recoverability(audited(), "probe")
    with pytest.raises(LensUnlearnError, match="depth has no curve rank: drop"):
        lu.plot.recoverability(audited(), metric="rank")
    with pytest.raises(LensUnlearnError, match="measured no drop of nobody"):
        lu.plot.recoverability(audited(), conditions=["nobody"])


def test_axes_name_their_quantity(figures):
    for name, fig in figures.items():
        layout = fig.to_dict()["layout"]
        titled = [axis for axis in layout if axis.startswith("xaxis") and layout[axis].get("title", {}).get("text")]
        assert titled or name in ("overlap", "skill graph"), name


def test_signed_scales_are_symmetric_and_magnitudes_start_at_zero():
    logs = scores().map(lambda value: value - 1.0)
    axis = lu.plot.neuron_heatmap(logs).layout.coloraxis
    assert axis.cmin == -axis.cmax
    assert axis.colorscale[0][1] == go.Heatmap(colorscale="RdBu_r").colorscale[0][1]
    axis = lu.plot.neuron_heatmap(abs(logs), signed=False).layout.coloraxis
    assert axis.cmin == 0
    assert axis.colorscale[0][1] == go.Heatmap(colorscale="Viridis").colorscale[0][1]
    axis = lu.plot.specialization_map(moments(0), moments(1)).layout.coloraxis
    assert axis.cmin == 0
    axis = lu.plot.selection_overlap({"a": scores().top(0.1), "b": scores().top(0.2)}).layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0, 1)
    axis = lu.plot.attribution_map(attributions()).layout.coloraxis
    assert (axis.cmin, axis.cmax) == (-1, 1)
    assert axis.colorscale[0][1] == go.Heatmap(colorscale="RdBu_r").colorscale[0][1]


def test_a_ratio_is_shown_as_its_log2():
    ratio = NeuronMap({Site(0, "mlp.post"): torch.tensor([4.0, 1.0, 0.25, 0.0])})
    fig = lu.plot.neuron_heatmap(ratio)
    assert array(data(fig)["data"][0]["z"]).tolist() == [[2.0, 0.0, -2.0, -2.0]]  # 0 at the floor
    assert "log2" in fig.layout.title.text.lower()
    plain = lu.plot.neuron_heatmap(ratio, signed=False)
    assert array(data(plain)["data"][0]["z"]).tolist() == [[4.0, 1.0, 0.25, 0.0]]


def names_in(fig: go.Figure) -> list[str]:
    return [f"{site}[{index}]" for site, index in NAME.findall(json.dumps(data(fig), ensure_ascii=False))]


def test_hover_names_read_back_to_a_site(figures):
    score = scores()
    figs = figures
    for name in ("specialization", "heatmap", "distribution", "attributions of two kinds"):
        found = names_in(figs[name])
        assert found, name
        for text in found:
            site, index = Site.parse(text[: text.index("[")]), text[text.index("[") + 1 : -1]
            assert ("," in index) == (site.kind == "attn.z")
    # Every neuron is named, and its cell holds its own value.
    fig = lu.plot.neuron_heatmap(score, signed=False)
    for trace in data(fig)["data"]:
        for z, labels in zip(array(trace["z"]), trace["text"], strict=True):
            for value, label in zip(z, labels, strict=True):
                site, index = NAME.fullmatch(label).groups()
                where = tuple(int(i) for i in index.split(","))
                assert value == pytest.approx(min(float(score[Site.parse(site)][where]), fig.layout.coloraxis.cmax))


def test_neuron_heatmap_sorts_each_layer_and_bins_what_is_wide():
    wide = NeuronMap({Site(layer, "mlp.post"): rand(5000) for layer in range(3)})
    fig = lu.plot.neuron_heatmap(wide)
    z = array(data(fig)["data"][0]["z"])
    assert z.shape == (3, 512)
    assert (np.diff(z, axis=1) <= 1e-6).all()
    assert NAME.search(fig.data[0].text[0][0])


def test_colours_have_one_meaning(swept):
    lines = {t.name: t.line.color for t in lu.plot.sweep_curves(swept, others=("other",)).data if t.mode != "none"}
    assert (lines["forget"], lines["retain"]) == (theme.FORGET, theme.RETAIN)
    assert {colour for name, colour in lines.items() if "control" in name} == {theme.CONTROL}
    assert lines["other"] not in (theme.FORGET, theme.RETAIN, theme.CONTROL)
    lines = {
        t.name: t.line.color
        for t in lu.plot.activation_distribution({"retain": histogram(), "forget": histogram()}, NEURONS).data
    }
    assert lines == {"forget": theme.FORGET, "retain": theme.RETAIN}
    bars = {t.name: t.marker for t in lu.plot.condition_bars(swept).data}
    assert bars["forget"].color[0] == theme.FORGET
    assert bars["forget"].color[3] == theme.CONTROL
    trade = {t.name: t.line.color for t in lu.plot.tradeoff(swept).data}
    assert trade["m: control"] == theme.CONTROL
    assert not {*theme.METHODS} & {*theme.OTHERS, *theme.MEASURES, theme.FORGET, theme.RETAIN, theme.CONTROL}
    assert not {*theme.OTHERS} & {*theme.MEASURES, theme.FORGET, theme.RETAIN, theme.CONTROL}
    assert trade["m"] not in (theme.FORGET, theme.RETAIN, theme.CONTROL)
    bars = {
        t.name: t.marker.color
        for t in lu.plot.layer_importance({"a": scores().top(0.1), "a:control": scores().top(0.1)}).data
    }
    assert bars["a:control"] == theme.CONTROL
    for trainings in (trained(), {"a": trained(), "b": trained()}):
        lines = {
            t.name: t.line.color for t in lu.plot.training_curves(trainings).data if t.name in ("forget", "retain")
        }
        assert lines == {"forget": theme.FORGET, "retain": theme.RETAIN}
    points = {t.name: t.marker.color for t in lu.plot.forget_quality(QUALITIES).data}
    assert points["m, control"] == theme.CONTROL
    assert points["m"] not in (theme.FORGET, theme.RETAIN, theme.CONTROL)


def test_tradeoff_draws_the_drops_of_the_report(swept):
    fig = lu.plot.tradeoff(swept)
    curve = next(t for t in fig.data if t.name == "m" and t.mode == "lines+markers")
    assert list(curve.x) == pytest.approx([0, *(swept.drop(f"m@{s}", "retain").value for s in (0.05, 0.1, 0.2))])
    assert list(curve.y) == pytest.approx([0, *(swept.drop(f"m@{s}", "forget").value for s in (0.05, 0.1, 0.2))])
    low, high = swept.drop("m@0.2", "forget").interval()
    assert curve.y[-1] + curve.error_y.array[-1] == pytest.approx(high)
    assert curve.y[-1] - curve.error_y.arrayminus[-1] == pytest.approx(low)
    point = next(t for t in fig.data if t.name == "m" and t.mode == "markers")
    assert (point.x[0], point.y[0]) == pytest.approx((0.05, 0.6))
    assert [t.name for t in fig.data if t.showlegend is not False].count("m: control") == 1


def test_every_control_has_its_own_entry_in_the_legend():
    both = report({"base": {"forget": 0.5, "retain": 0.4}} | {
        name: {"forget": 0.4, "retain": 0.4} for name in ("a", "a:control", "b", "b:control")
    })  # fmt: skip
    shown = {t.name: t.marker.symbol for t in lu.plot.tradeoff(both).data if t.showlegend is not False}
    assert {"a", "a: control", "b", "b: control"} <= set(shown)
    assert shown["a: control"] != shown["b: control"]


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-2.1, -0.9, ["0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1", "2", "5"]),
        (0, 1, ["1", "2", "5", "10", "20", "50"]),
        (-2, 1, ["0.01", "0.1", "1", "10"]),
        (3, 6, ["1,000", "10,000", "10<sup>5</sup>", "10<sup>6</sup>"]),
        (-6, 2, ["10<sup>−6</sup>", "0.0001", "0.01", "1", "100"]),
    ],
)
def test_logarithmic_ticks_are_whole_numbers(low, high, words):
    """Plotly's own read 5, 1, 2: one has to guess of which decade."""
    ticks = theme.log_ticks(low, high)
    assert ticks["ticktext"] == words
    assert np.all(np.diff(ticks["tickvals"]) > 0)
    drawn = lu.plot.specialization_map(moments(0), moments(1), kind="mlp.post").layout
    assert drawn.xaxis.tickvals is not None
    assert drawn.yaxis.ticktext == drawn.xaxis.ticktext


@pytest.mark.parametrize(("panels", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3), (6, 3), (7, 4), (9, 3)])
def test_panels_of_a_comparison_leave_few_places_empty(panels, columns):
    assert _columns(panels) == columns


def test_sweep_curves_show_the_share_that_remains(swept):
    fig = lu.plot.sweep_curves(swept)
    curve = next(t for t in fig.data if t.name == "forget" and t.mode == "lines+markers")
    assert list(curve.x) == [0.05, 0.1, 0.2]
    assert list(curve.y) == pytest.approx([0.9, 0.8, 0.6])


def test_a_sweep_from_zero_stays_on_a_linear_axis():
    from_zero = report(
        {"base": {"forget": 0.5, "retain": 0.4}} | {f"m@{s}": {"forget": 0.4, "retain": 0.4} for s in (0, 0.01, 0.5)}
    )
    assert lu.plot.sweep_curves(from_zero).layout.xaxis.type is None
    above_zero = report(
        {"base": {"forget": 0.5, "retain": 0.4}} | {f"m@{s}": {"forget": 0.4, "retain": 0.4} for s in (0.01, 0.5)}
    )
    assert lu.plot.sweep_curves(above_zero).layout.xaxis.type == "log"


def test_condition_bars_go_from_top_to_bottom(swept):
    fig = lu.plot.condition_bars(swept)
    low, high = fig.layout.yaxis.range
    assert low > high
    assert fig.layout.yaxis.ticktext[0] == "base"
    assert list(fig.data[0].x)[:2] == pytest.approx([0.5, 0.2])


def test_layer_importance_is_the_share_selected_and_the_mean():
    score = scores(heads=None)
    chosen = score.top(0.25)
    share, mean = lu.plot.layer_importance(score, chosen).data
    assert list(share.x) == pytest.approx(list(chosen.per_layer().values()))
    of_selected = [float(value[chosen[site]].mean()) for site, value in score.items()]
    assert list(mean.x) == pytest.approx(of_selected)
    assert list(share.y) == [0, 1, 2, 3]
    [mean] = lu.plot.layer_importance(score).data
    assert list(mean.x) == pytest.approx(list(score.per_layer().values()))


def test_a_signed_score_shows_what_the_selected_have_and_not_that_most_neurons_are_below_zero():
    """Neuron Adjust ranks by mu_f - mu_r, whose mean is below zero in every layer of the demo."""
    score = scores(heads=None) - 2.9
    assert max(score.per_layer().values()) < 0
    _, mean = lu.plot.layer_importance(score, score.top(0.01)).data
    assert max(value for value in mean.x if value is not None) > 0
    assert None in list(mean.x), "a layer without any selected has no mean"
    colours = {t.name: t.marker.color for t in lu.plot.layer_importance(
        {"b": score.top(0.1), "c": score.top(0.2)}, colours=theme.method_colours(["a", "b"])
    ).data}  # fmt: skip
    assert colours["b"] == theme.METHODS[1]


def test_kinds_share_the_layer_axis():
    fig = lu.plot.layer_importance(scores())
    assert [a.text for a in fig.layout.annotations] == ["mlp.post", "attn.z"]
    assert fig.layout.yaxis2.matches == "y"


def test_specialization_counts_every_neuron_and_marks_the_selected():
    forget, retain = moments(0), moments(1)
    chosen = forget.mean_abs["mlp.post"].top(0.1)
    fig = lu.plot.specialization_map(forget, retain, selection=chosen, kind="mlp.post")
    assert array(data(fig)["data"][0]["customdata"]).sum() == 120
    marks = next(t for t in fig.data if t.name == "selected")
    assert len(marks.x) == chosen.count() == 12
    site, index = NAME.search(marks.hovertext[0]).groups()
    assert marks.y[0] == pytest.approx(float(forget.mean_abs[Site.parse(site)][int(index)]))
    assert marks.x[0] == pytest.approx(float(retain.mean_abs[Site.parse(site)][int(index)]))
    assert "corpus0" in fig.layout.title.text
    assert "5,000 tokens" in fig.layout.title.text


def test_density_integrates_to_one_over_unequal_bins():
    counted = histogram()
    counts, edges = counted.counts(Site(0, "mlp.post"), 1).numpy(), counted.edges.numpy()
    assert np.nansum(density(counts, edges) * np.diff(edges)) == pytest.approx(1)
    fig = lu.plot.activation_distribution({"forget": counted}, NEURONS[:1])
    low, high = fig.layout.xaxis.range
    assert -6 < low < -1 < 1 < high < 6  # the histogram itself reaches from -1000 to 1000


def test_joined_bins_keep_every_token_and_zero_as_an_edge():
    counted = histogram()
    counts, edges = counted.counts(Site(0, "mlp.post"), 1).numpy(), counted.edges.numpy()
    fewer, wider = merged(counts, edges, (-3.0, 3.0))
    assert fewer.sum() == counts.sum() == 500
    assert len(wider) == len(fewer) + 1 < len(edges)
    assert fewer[wider[:-1] >= 0].sum() == counts[edges[:-1] >= 0].sum()
    drawn = lu.plot.activation_distribution({"forget": counted}, NEURONS[:1]).data[0]
    assert len(drawn.x) == len(drawn.y) == len(drawn.customdata)
    assert np.isfinite(drawn.y).all()
    assert min(drawn.y) > 0


def test_the_logarithmic_axis_of_densities_has_the_ticks_of_the_theme():
    fig = lu.plot.activation_distribution({"forget": histogram(), "retain": histogram(1)}, NEURONS)
    for axis, lines in ((fig.layout.yaxis, fig.data[:2]), (fig.layout.yaxis2, fig.data[2:])):
        low, high = min(min(line.y) for line in lines), max(max(line.y) for line in lines)
        assert axis.type == "log"
        assert [tick for tick in axis.tickvals if low <= tick <= high]
        assert not [text for text in axis.ticktext if "sup" in text], "plotly writes powers larger than other numbers"


def test_overlap_is_jaccard():
    a = NeuronMap({Site(0, "mlp.post"): torch.tensor([True, True, False, False])})
    b = NeuronMap({Site(0, "mlp.post"): torch.tensor([True, False, True, False])})
    none = a & ~a
    whole, layers = lu.plot.selection_overlap({"a": a, "b": b, "none": none}).data
    assert whole.z[0][1] == pytest.approx(1 / 3)
    assert whole.z[0][0] == 1
    assert whole.z[2][0] == 0
    assert math.isnan(whole.z[2][2])
    assert layers.z[0][0] == pytest.approx(1 / 3)


def test_training_curves_draw_the_record():
    fig = lu.plot.training_curves(trained())
    losses, checks = ({t.name: t for t in fig.data if t.yaxis == axis} for axis in ("y", "y2"))
    assert list(losses["retain"].x) == list(range(1, 13))
    assert list(losses["retain"].y) == pytest.approx([1 / i for i in range(1, 13)])
    assert set(losses["floor: no ascent beyond"].y) == {1.5}
    assert list(checks["forget"].x) == [0, 4, 8, 12]
    assert list(checks["forget"].y) == pytest.approx([0.9, 0.7, 0.5, 0.3])
    assert (list(checks["step returned"].x), list(checks["step returned"].y)) == (
        [8, 8],
        pytest.approx([0.5, 0.9 - 8 / 90]),
    )
    aim = next(trace for name, trace in checks.items() if name.startswith("aim"))
    assert set(aim.y) == {0.5}
    clipped = next(trace for trace in fig.data if trace.yaxis == "y3")
    assert clipped.y[0] == pytest.approx(1 - 1 / 99)
    assert "forget: facts.jsonl · retain: others.jsonl · sophia · graddiff" in fig.layout.title.text


def test_trainings_differ_by_dash_and_their_noise_is_averaged():
    fig = lu.plot.training_curves({"a": trained(), "b": trained(400), "c": trained(stopped="it became NaN")})
    dashes = {t.name: t.line.dash for t in fig.data if t.name in "abc"}
    assert len(set(dashes.values())) == 3
    for trace in (t for t in fig.data if t.name == "forget"):
        name = re.match("<b>(.): forget", trace.hovertemplate)[1]
        assert trace.line.dash == dashes[name]
    long = next(t for t in fig.data if t.name == "forget" and t.hovertemplate.startswith("<b>b"))
    assert len(long.x) == len(long.y) == MAX_COMPARED
    assert np.mean(long.y) == pytest.approx(np.mean([i / 5 for i in range(1, 401)]))
    assert "averaged" in fig.layout.title.text
    assert "c stopped early: it became NaN" in fig.layout.title.text
    assert len(lu.plot.training_curves(trained(4000)).data[0].x) == MAX_POINTS


@pytest.mark.parametrize(
    ("changed", "there", "absent"),
    [
        ({"losses": [{"step": 1, "forget": 0.5, "retain": 0.4}]}, "forget", "clipped"),
        ({"retain": None, "checks": [{"step": 0, "forget": 0.5}]}, "forget", "retain"),
        ({"losses": []}, "forget", "clipped"),
        ({"checks": []}, "forget", "step returned"),
        ({"losses": [], "checks": [{"step": 0, "forget": 0.5}], "chosen": 0}, "step returned", "retain"),
        ({"aim": None}, "forget", "aim: hardly above the accuracy on unseen texts"),
        ({"settings": {"loss": "npo"}}, "forget", "floor: no ascent beyond"),
        ({"losses": [{"step": 1, "forget": float("nan"), "retain": float("inf")}]}, "forget", "clipped"),
    ],
)
def test_what_a_training_did_not_record_is_left_out(changed, there, absent):
    fig = lu.plot.training_curves(trained(**changed))
    names = [trace["name"] for trace in data(fig)["data"]]
    assert there in names
    assert absent not in names


def test_attribution_map_ranks_each_layer_by_its_own_highest():
    attribution = attributions()
    heat = lu.plot.attribution_map(attribution).data[0]
    for z, means, labels, (site, value) in zip(heat.z, heat.customdata, heat.text, attribution.items(), strict=True):
        ranked = value.sort(descending=True).values.numpy()
        assert means[0] == pytest.approx(ranked[0])
        assert list(z) == pytest.approx(np.clip(means / ranked[0], -1, 1))
        assert (np.diff(means) <= 0).all()
        assert labels[0] == f"{site}[{int(value.argmax())}], rank 1"
        assert labels[-1] == f"{site}[{int(value.argmin())}], rank 24"


def test_attribution_map_marks_the_critical_and_says_how_complete_it_is():
    attribution = attributions()
    chosen = critical(attribution)
    fig = lu.plot.attribution_map(attribution, chosen)
    marks = next(t for t in fig.data if t.name == "selected")
    for layer, count in enumerate(int(value.sum()) for _, value in chosen.items()):
        # They are the highest of their layer, and no cell is skipped.
        cells = [x for x, y in zip(marks.x, marks.y, strict=True) if y == layer]
        assert cells == list(range(len(cells)))
        assert 1 <= len(cells) <= count
    sums, differences = (
        next(t for t in fig.data if t.name.startswith(name)) for name in ("attributed", "to be attributed")
    )
    assert list(sums.x) == pytest.approx([both.attributed for both in attribution.completeness.values()])
    assert list(differences.x) == pytest.approx([both.difference for both in attribution.completeness.values()])
    assert {text.strip() for text in differences.text} == {"0.80"}
    assert "tiny" in fig.layout.title.text
    assert "99 tokens" in fig.layout.title.text
    difference = attribution - attributions(seed=1)
    assert [t.type for t in lu.plot.attribution_map(difference).data] == ["heatmap"]  # arithmetic leaves no sums


@pytest.mark.parametrize("neurons", [1, 2, 3, 24, 577, 14336])
@pytest.mark.parametrize("limit", [0, 40, 10_000])
def test_ranks_hold_every_neuron_once_and_the_ends_alone(neurons, limit):
    ranks = Ranks.of(neurons, limit)
    for width in (neurons, neurons + 7):
        parts = ranks.cut(np.arange(width))
        assert len(parts) == ranks.cells
        assert all(len(part) for part in parts)
        assert np.concatenate(parts).tolist() == list(range(width))
    parts = ranks.cut(np.arange(neurons))
    assert len(parts[0]) == len(parts[-1]) == 1
    at, text = ranks.ticks()
    for cell, rank in zip(at, text, strict=True):
        rank = int(rank.replace(",", ""))
        assert rank - 1 in parts[cell] or neurons - rank in parts[cell]
    assert ranks.cells <= max(limit, 60)


def test_forget_quality_is_log10_p_against_utility():
    fig = lu.plot.forget_quality(QUALITIES)
    points = {trace.name: trace for trace in fig.data}
    assert set(points["p = 0.05"].y) == {math.log10(0.05)}
    assert (points["simu"].x[0], points["simu"].y[0]) == pytest.approx((0.55, math.log10(0.2)))
    assert (points["base"].x[0], points["base"].y[0]) == (0.6, -20)  # p = 0
    assert "p below 1e-20 is drawn there: base" in fig.layout.meta["lens_unlearn"]["subtitle"]
    assert "p 0, distance 0.900" in points["base"].hovertext[0]
    assert "retain probability 0.700" in points["base"].hovertext[0]
    assert (points["m"].x, points["m"].mode) == ((0.5, 0.4), "lines+markers")  # in order of strength
    assert points["base"].marker.symbol != points["retrained"].marker.symbol
    low, high = fig.layout.yaxis.range
    assert low < -20 < 0 < high
    assert "drawn there" not in lu.plot.forget_quality({"a": (1e-20, 0.5)}).layout.meta["lens_unlearn"]["subtitle"]
    marked = lu.plot.forget_quality({"before": (0.1, 0), "never": (1, 1)}, base="before", retrained="never")
    assert [trace.marker.symbol for trace in marked.data[1:]] == ["cross", "star"]


def test_key_figures_say_of_what_they_are():
    for name, fig in of_keys(keys()).items():
        title = fig.layout.title.text
        assert "model tiny" in title, name
        assert "code: code.jsonl" in title, name
        assert "all cut into prompts" in title, name
        assert "12 queries a skill fitted, 12 held out" in fig.layout.meta["lens_unlearn"]["about"], name
    mixed = keys()
    mixed.provenance["corpora"]["prose"] = "prose.jsonl"
    assert "code.jsonl, cut into prompts · prose: prose.jsonl" in lu.plot.key_map(mixed).layout.title.text


def test_key_coverage_draws_the_shares_inside():
    space = keys()
    site = space.sites[1]
    fig = lu.plot.key_coverage(space, "prose", "L1.mlp.post")
    assert fig.layout.xaxis.type == "log"
    assert {trace.name.split(",")[0]: trace.line.color for trace in fig.data} == {
        "prose": theme.FORGET,
        "code": theme.RETAIN,
        "math": theme.OTHERS[0],
        "all others": theme.CONTROL,
    }
    for trace in fig.data:
        name = {"all others": space.others}.get(trace.name.split(",")[0], trace.name.split(",")[0])
        scores = space.scores_of(site, "box", "prose", name)
        assert list(trace.y) == pytest.approx([float((scores <= c).double().mean()) for c in trace.x])
        assert (trace.y[0], trace.y[-1]) == (0, 1)
    area = space.value(site, "area_between", "prose", space.others)
    assert f"{area.value:.2f} [{area.low:.2f}, {area.high:.2f}]" in fig.layout.title.text
    assert f"best: {space.value(site, 'best_scale', 'prose', space.others).value:.3g}" in [
        note.text for note in fig.layout.annotations
    ]


def test_key_roc_encloses_its_auc():
    space = keys()
    fig = lu.plot.key_roc(space, "code", space.sites[0])
    curves = [trace for trace in fig.data if trace.name == "against all others"]
    assert len(curves) == 4
    for trace, distance in zip(curves, space.distances, strict=True):
        auc = space.value(space.sites[0], f"auc_{distance}", "code", space.others).value
        assert np.trapezoid(trace.y, trace.x) == pytest.approx(auc)
        assert (trace.x[0], trace.y[0], trace.x[-1], trace.y[-1]) == (0, 0, 1, 1)
    two = lu.plot.key_roc(keys(skills=("a", "b")))
    assert [trace.name for trace in two.data if trace.showlegend] == ["against b"]


def test_key_map_shows_held_out_queries_and_boxes_in_range():
    space = keys(n=30)
    plane = space.planes[space.sites[-1]]
    for outline in ("plane", "shadow"):
        fig = lu.plot.key_map(space, outline=outline)
        points = {trace.name: trace for trace in fig.data if trace.mode == "markers"}
        assert list(points) == ["math", "prose", "code"]  # the first is on top
        assert list(points["code"].x) == pytest.approx(plane.points["code"][:, 0].tolist())
        assert points["code"].marker.line.color == theme.FORGET
        assert len({trace.marker.symbol for trace in points.values()}) == 3
        for axis, ends in (("x", fig.layout.xaxis.range), ("y", fig.layout.yaxis.range)):
            drawn = np.concatenate([trace[axis] for trace in fig.data])
            assert ends[0] <= drawn.min()
            assert drawn.max() <= ends[1]
    assert fig.layout.xaxis.title.text.startswith("first principal component (")


def test_layer_figures_draw_the_measures():
    space = keys(kinds=("mlp.post", "attn.z"))
    fig = lu.plot.key_space(space)
    drawn = [trace for trace in fig.data if trace.name.startswith("box")]
    assert len(drawn) == 3 * 2  # skills by kinds of site
    for trace, skill in zip(drawn, space.skills, strict=False):
        values = [space.value(Site(layer, "mlp.post"), "auc_box", skill, space.others) for layer in range(3)]
        assert list(trace.x) == [v.value for v in values]
        assert list(trace.y) == [0, 1, 2]
        assert list(trace.error_x.array) == pytest.approx([v.high - v.value for v in values])
    assert {trace.name for trace in lu.plot.key_clusters(space).data} >= {"silhouette of the skills"}
    volume = {trace.name: trace for trace in lu.plot.key_volume(space, skill="math").data}
    assert volume["math"].line.color == theme.FORGET
    assert volume["code to math"].marker.color == theme.FORGET


def with_parts(**changed) -> KeySpace:
    return replace(keys(layers=1, n=8), **changed)


def scored(factor: float, constant: float) -> dict:
    scores = keys(layers=1, n=8).scores
    return {key: {name: factor * part + constant for name, part in parts.items()} for key, parts in scores.items()}


def one_point() -> separation.Plane:
    points, corners = ({skill: torch.zeros(n, 2) for skill in ("code", "prose", "math")} for n in (1, 4))
    return separation.Plane(points, corners, corners, (0.0, 0.0))


AWKWARD_SPACES = {
    "one layer": lambda: keys(layers=1),
    "two skills": lambda: keys(layers=1, skills=("a", "b")),
    "nine skills": lambda: keys(layers=1, n=8, skills=tuple("abcdefghi")),
    "no value": lambda: with_parts(values={key: separation.Value(math.nan) for key in keys(layers=1).values}),
    "values missing": lambda: with_parts(values={}),
    "equal scores": lambda: with_parts(scores=scored(0, 1)),
    "scores of zero": lambda: with_parts(scores=scored(0, 0)),
    "no provenance": lambda: with_parts(provenance={}),
    "one point": lambda: with_parts(planes={Site(0, "mlp.post"): one_point()}),
}


@pytest.mark.parametrize("case", AWKWARD_SPACES)
def test_awkward_key_spaces_are_drawn(case):
    for fig in of_keys(AWKWARD_SPACES[case]()).values():
        assert data(fig)["data"]


def test_key_figures_stay_small_and_change_nothing():
    one = keys(layers=1, skills=("a", "b", "c", "d", "e", "f"), n=400, width=4)
    sites = [Site(layer, "mlp.post") for layer in range(80)]
    values = {(site, *key[1:]): value for site in sites for key, value in one.values.items()}
    scores = {(site, *key[1:]): parts for site in sites for key, parts in one.scores.items()}
    planes = {site: one.planes[one.sites[0]] for site in sites}
    space = KeySpace(one.skills, values, scores, planes, one.provenance)
    before = (space.to_frame(), {key: part.clone() for key, part in space.scores[space.sites[0], "box", "a"].items()})
    for name, fig in of_keys(space).items():
        assert len(fig.to_json()) < BUDGET, name
    points = [trace for trace in lu.plot.key_map(space).data if trace.mode == "markers"]
    assert sum(len(trace.x) for trace in points) <= theme.MAX_MARKS
    assert "queries of each skill shown" in lu.plot.key_map(space).layout.meta["lens_unlearn"]["subtitle"]
    assert space.to_frame().equals(before[0])
    after = space.scores[space.sites[0], "box", "a"]
    assert all(torch.equal(after[key], part) for key, part in before[1].items())


def test_two_megabytes_at_most():
    big = NeuronMap({Site(layer, kind): rand(14336) for layer in range(80) for kind in ("mlp.post", "mlp.pre")})
    chosen = big.top(0.02)
    large = {
        "importance": lu.plot.layer_importance(big, chosen),
        "heatmap": lu.plot.neuron_heatmap(big, selection=chosen),
        "overlap": lu.plot.selection_overlap({f"selection {i}": chosen for i in range(8)}),
        "trainings": lu.plot.training_curves({f"run {i}": trained(3000, 10) for i in range(6)}),
        "training": lu.plot.training_curves(trained(30_000, 10)),
    }
    complete = {site: Completeness(1.0, 1.0) for site in big}
    large["attributions"] = lu.plot.attribution_map(Attribution(dict(big.items()), complete, {}), chosen)
    forget, retain = (moments(seed, layers=8, width=4000) for seed in (0, 1))
    large["specialization"] = lu.plot.specialization_map(forget, retain, selection=forget.mean_abs.top(0.5))
    for name, fig in large.items():
        assert len(fig.to_json()) < BUDGET, name
    marks = next(t for t in large["specialization"].data if t.name == "selected" and len(t.x))
    assert len(marks.x) <= theme.MAX_MARKS
    assert "evenly sampled" in large["specialization"].layout.meta["lens_unlearn"]["subtitle"]


def awkward() -> dict[str, NeuronMap]:
    site = Site(0, "mlp.post")
    nan, inf = float("nan"), float("inf")
    return {
        "one neuron": NeuronMap({site: torch.tensor([2.0])}),
        "one layer": NeuronMap({site: torch.arange(5.0)}),
        "all equal": NeuronMap({site: torch.ones(5), Site(1, "mlp.post"): torch.ones(5)}),
        "all zero": NeuronMap({site: torch.zeros(5)}),
        "some NaN": NeuronMap({site: torch.tensor([1.0, nan, 3.0])}),
        "all NaN": NeuronMap({site: torch.tensor([nan, nan])}),
        "infinite": NeuronMap({site: torch.tensor([inf, 1.0, -inf])}),
        "layers of different width": NeuronMap({site: rand(3), Site(1, "mlp.post"): rand(7)}),
        "half precision": NeuronMap({site: rand(3).half()}),
        "a distant layer": NeuronMap({Site(30, "mlp.post"): rand(3)}),
    }


@pytest.mark.parametrize("case", awkward())
def test_awkward_maps_are_drawn(case):
    score = awkward()[case]
    empty = score.map(lambda value: torch.zeros_like(value, dtype=torch.bool))
    for fig in (
        lu.plot.layer_importance(score),
        lu.plot.layer_importance(score, empty),
        lu.plot.layer_importance(empty),
        lu.plot.neuron_heatmap(score),
        lu.plot.neuron_heatmap(score, selection=empty, signed=True),
        lu.plot.neuron_heatmap(score, signed=False),
        lu.plot.selection_overlap({"a": empty, "b": ~empty}),
        lu.plot.attribution_map(score),
        lu.plot.attribution_map(-score, empty),
        lu.plot.attribution_map(
            Attribution(dict(score.items()), {site: Completeness(0.0, 0.0) for site in score}, {}), ~empty
        ),
    ):
        assert data(fig)["data"]


def test_nan_leaves_a_gap_and_infinity_takes_the_end_colour():
    fig = lu.plot.neuron_heatmap(NeuronMap({Site(0, "mlp.post"): torch.tensor([float("inf"), 2.0, float("nan")])}))
    z = array(data(fig)["data"][0]["z"])[0]
    assert z[0] == fig.layout.coloraxis.cmax
    assert math.isnan(z[2])


@pytest.mark.parametrize("constant", [None, 0.0, 2.0])
def test_awkward_moments_are_drawn(constant):
    one = moments(0, layers=1, width=1, constant=constant)
    empty = one.mean.map(lambda value: torch.zeros_like(value, dtype=torch.bool))
    for importance in ("abs", "freq", "rms", "std"):
        assert data(lu.plot.specialization_map(one, one, importance=importance))["data"]
    assert "empty" in lu.plot.specialization_map(one, one, selection=empty).layout.title.text


def test_a_report_of_one_document_is_drawn_without_intervals():
    values = {name: {"forget": 0.5 - i, "retain": 0.5} for i, name in enumerate(("base", "m@0.1", "m@0.2", "n"))}
    alone = report(values, draws=0)
    for fig in (lu.plot.tradeoff(alone), lu.plot.sweep_curves(alone), lu.plot.condition_bars(alone)):
        assert data(fig)["data"]
    nothing = report({"base": {"forget": 0.0, "retain": 0.5}, "m@1": {"forget": 0.0, "retain": 0.4}})
    for fig in (lu.plot.tradeoff(nothing), lu.plot.sweep_curves(nothing)):
        assert data(fig)["data"]


def test_inputs_are_not_changed(swept):
    score = scores(layers=3, width=40)
    chosen = score.top(0.1)
    forget, retain, counted = moments(0), moments(1), histogram()
    before = [score.flat().clone(), chosen.flat().clone(), forget.mean_abs.flat().clone(), swept.to_frame()]
    state = {name: tensor.clone() for name, tensor in {**forget.state(), **counted.state()}.items()}
    lu.plot.layer_importance(score, chosen)
    lu.plot.neuron_heatmap(score, selection=chosen)
    lu.plot.specialization_map(forget, retain, selection=chosen)
    lu.plot.selection_overlap({"a": chosen, "b": chosen})
    lu.plot.activation_distribution({"forget": counted}, NEURONS)
    lu.plot.tradeoff(swept)
    lu.plot.condition_bars(swept)
    assert torch.equal(score.flat(), before[0])
    assert torch.equal(chosen.flat(), before[1])
    assert torch.equal(forget.mean_abs.flat(), before[2])
    assert swept.to_frame().equals(before[3])
    assert all(torch.equal(state[name], tensor) for name, tensor in {**forget.state(), **counted.state()}.items())


def test_figures_are_deterministic(swept, figures):
    again = every_figure(swept)
    assert {name: fig.to_json() for name, fig in figures.items()} == {
        name: fig.to_json() for name, fig in again.items()
    }


def test_names_from_data_cannot_write_tags(swept):
    evil = "<a href='javascript:alert(1)'>%{x}</a>"
    selections = {evil: scores().top(0.1), "b": scores().top(0.2)}
    renamed = report(
        {"base": {"forget": 0.5, "retain": 0.4, evil: 0.3}, evil: {"forget": 0.4, "retain": 0.4, evil: 0.3}}
    )
    renamed.provenance["model"] = evil
    for fig in (
        lu.plot.layer_importance(selections),
        lu.plot.selection_overlap(selections),
        lu.plot.activation_distribution({evil: histogram()}, NEURONS),
        lu.plot.tradeoff(renamed),
        lu.plot.condition_bars(renamed),
        lu.plot.training_curves({evil: trained(), "b": trained(forget={"name": evil}, stopped=evil)}),
        lu.plot.training_curves(trained(forget={"name": evil}, settings={"loss": evil})),
        lu.plot.attribution_map(
            Attribution(dict(attributions().items()), attributions().completeness, {"model": evil})
        ),
        lu.plot.forget_quality({evil: (0.0, Utility(0.5, {evil: 0.5})), "b": (0.1, 0.5)}),
        *of_keys(keys(layers=1, skills=(evil, "b"), name=evil)).values(),
        *of_keys(keys(layers=1, skills=("b", evil, "c"))).values(),
    ):
        figure = fig.to_dict()
        del figure["layout"]["meta"]
        text = json.dumps(figure, default=str)
        assert "<a href" not in text
        assert "%{x}</a>" not in text


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("forget (/home/me/secret/code.jsonl)", "forget (…/code.jsonl)"),
        ("/data/x/code.jsonl:text", "…/code.jsonl:text"),
        ("C:\\Users\\me\\code.txt", "…/code.txt"),
        ("data/code.jsonl", "data/code.jsonl"),
        ("hf:wikitext/wikitext-2-raw-v1:test:text", "hf:wikitext/wikitext-2-raw-v1:test:text"),
        ("demo:python", "demo:python"),
    ],
)
def test_folders_are_left_out_of_sources(source, shown):
    assert theme.short(source) == shown


@pytest.mark.parametrize(
    ("name", "method", "control", "strength"),
    [
        ("selective-pruning", "selective-pruning", False, None),
        ("a:control", "a", True, None),
        ("a@0.05", "a", False, 0.05),
        ("a:control@0.05", "a", True, 0.05),
        ("me@home", "me@home", False, None),
        ("a@nan", "a@nan", False, None),
        ("@1", "@1", False, None),
        (":control", ":control", False, None),
    ],
)
def test_condition_names_are_taken_apart(name, method, control, strength):
    parsed = Condition.parse(name)
    assert (parsed.method, parsed.control, parsed.strength) == (method, control, strength)


def test_a_condition_knows_its_control():
    assert Condition.parse("a@0.05").counterpart == "a:control@0.05"
    assert Condition.parse("a").counterpart == "a:control"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: lu.plot.tradeoff(r, metric="loss"), "rises"),
        (lambda r: lu.plot.tradeoff(r, forget="code"), "corpora are forget, retain, other"),
        (lambda r: lu.plot.tradeoff(report({"base": {"forget": 1, "retain": 1}})), "at least one condition"),
        (lambda r: lu.plot.tradeoff(Report({})), "not measured"),
        (lambda r: lu.plot.sweep_curves(report({"base": {"forget": 1, "retain": 1}})), "method@strength"),
        (lambda r: lu.plot.condition_bars(r, "bleu"), "bleu"),
        (lambda r: lu.plot.condition_bars(r, conditions=["x"]), "'x'"),
        (lambda r: lu.plot.layer_importance({}), "nothing to draw"),
        (lambda r: lu.plot.layer_importance(scores(), scores()), "boolean"),
        (lambda r: lu.plot.layer_importance(scores(), kind="mlp.pre"), "mlp.pre"),
        (lambda r: lu.plot.neuron_heatmap([1, 2]), "NeuronMap"),
        (lambda r: lu.plot.neuron_heatmap(scores(), kind="resid"), "resid"),
        (lambda r: lu.plot.neuron_heatmap(scores(), selection=scores(width=9).top(0.1)), "shape"),
        (lambda r: lu.plot.neuron_heatmap(NeuronMap({Site(0, "mlp.post"): torch.zeros(0)})), "no neurons"),
        (lambda r: lu.plot.specialization_map(moments(0), moments(1), importance="max"), "max"),
        (lambda r: lu.plot.specialization_map(moments(0), moments(1, width=9)), "shape"),
        (lambda r: lu.plot.specialization_map(moments(0), moments(1), kind="mlp.pre"), "mlp.pre"),
        (lambda r: lu.plot.specialization_map(Moments(), moments(1)), "no counted token"),
        (lambda r: lu.plot.activation_distribution({}, NEURONS), "nothing to draw"),
        (lambda r: lu.plot.activation_distribution({"a": histogram()}, []), "nothing to draw"),
        (lambda r: lu.plot.activation_distribution({"a": histogram()}, [(Site(0, "mlp.post"), 9)]), "0 to 3"),
        (lambda r: lu.plot.activation_distribution({"a": histogram()}, [(Site(7, "mlp.post"), 0)]), "collect"),
        (lambda r: lu.plot.activation_distribution({"a": histogram()}, NEURONS * 20), "at most"),
        (lambda r: lu.plot.selection_overlap({"a": scores().top(0.1)}), "2 to"),
        (lambda r: lu.plot.selection_overlap({"a": scores().top(0.1), "b": scores(width=9).top(0.1)}), "one model"),
        (lambda r: lu.plot.selection_overlap({"a": scores(), "b": scores()}), "boolean"),
        (lambda r: lu.plot.key_space({}), "not a dict"),
        (lambda r: lu.plot.key_clusters(KeySpace((), {}, {}, {}, {})), "nothing to draw"),
        (lambda r: lu.plot.key_coverage(keys(1), "fiction"), "there are code, prose, math"),
        (lambda r: lu.plot.key_roc(keys(1), "code", "L7.mlp.post"), "there are L0.mlp.post"),
        (lambda r: lu.plot.training_curves({}), "1 to 6 trainings"),
        (lambda r: lu.plot.training_curves({str(i): trained() for i in range(7)}), "not 7"),
        (lambda r: lu.plot.training_curves(SimpleNamespace(record={})), "without a record of a training"),
        (lambda r: lu.plot.training_curves({"mine": scores()}), "'mine' is a NeuronMap"),
        (lambda r: lu.plot.attribution_map([1, 2]), "NeuronMap"),
        (lambda r: lu.plot.attribution_map(attributions(), scores(width=9).top(0.1)), "another shape"),
        (lambda r: lu.plot.attribution_map(attributions(), scores()), "boolean"),
        (lambda r: lu.plot.forget_quality({}), "nothing to draw"),
        (lambda r: lu.plot.forget_quality({"a": 0.5}), "'a' is no pair"),
        (lambda r: lu.plot.forget_quality({"a": (1.5, 0.5)}), "from 0 to 1"),
        (lambda r: lu.plot.forget_quality({"a": (0.5, math.nan)}), "utility of 'a' is nan"),
        (lambda r: lu.plot.key_map(keys(1), outline="hull"), "'plane' or 'shadow'"),
        (lambda r: lu.plot.key_volume(keys(1), skill="fiction"), "no skill 'fiction'"),
    ],
)
def test_bad_input_gets_a_sentence(swept, call, message):
    with pytest.raises(LensUnlearnError, match=re.escape(message)):
        call(swept)


def test_a_skill_graph_marks_what_is_certain_and_draws_it_as_arrows():
    edges = {("code", "math"): 0.3, ("math", "code"): 0.2}
    made = graph(edges=edges)
    fig = lu.plot.skill_graph(made)
    costs, itself, middles, nodes = data(fig)["data"]
    cells = array(costs["z"])
    assert cells.shape == (3, 3)
    assert np.isnan(np.diag(cells)).all()
    assert cells[0, 1] == pytest.approx(made.costs["code", "math"].beyond.value)
    assert [[text.endswith("*") for text in row] for row in costs["text"]] == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert [text for row in itself["text"] for text in row if text] == [itself["text"][i][i] for i in range(3)]
    assert "<b>code removed</b><br>measured on math" in costs["hovertext"][0][1]
    assert "all at once" in costs["hovertext"][0][1]
    arrows = [one for one in fig.layout.annotations if one.showarrow and not one.text]
    assert len(arrows) == len(middles["x"]) == 2
    widths = {text.partition(" removed")[0]: arrow.arrowwidth for text, arrow in zip(middles["text"], arrows)}
    assert widths["<b>code"] > widths["<b>math"], "the more it costs, the wider"
    assert nodes["text"] == ["code", "math", "prose"]
    x, y = nodes["x"], nodes["y"]
    tip, tail = (arrows[0].x, arrows[0].y), (arrows[0].ax, arrows[0].ay)
    assert math.dist(tip, (x[1], y[1])) < math.dist(tip, (x[0], y[0])), "from the removed skill to the one that pays"
    assert math.dist(tail, (x[0], y[0])) < math.dist(tail, (x[1], y[1]))
    limit = fig.layout.coloraxis
    assert limit.cmin == -limit.cmax
    none = lu.plot.skill_graph(graph(edges={}))
    assert "no cost beyond chance is certain" in none.layout.meta["lens_unlearn"]["subtitle"]
    assert not [one for one in none.layout.annotations if one.showarrow and not one.text]
    with pytest.raises(LensUnlearnError, match="skill_graph draws what lu.skill_graph returns, not a Report"):
        lu.plot.skill_graph(made.report)
