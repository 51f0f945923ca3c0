"""`SkillGraph`: joint intervals on simulated experiments of known truth, and its tables by hand."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr
from skill_graph_helpers import drawn_graph, graph

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.report import Report
from lens_unlearn.evaluation.skill_graph import SkillGraph
from lens_unlearn.model.sites import Site

SKILLS = ("code", "math", "prose")
PAIRS = [(i, j) for i in SKILLS for j in SKILLS]
BETWEEN = [(i, j) for i, j in PAIRS if i != j]


def simulated(runs: int, *, random: bool, seeds: int = 4) -> tuple[float, float]:
    """How often the intervals of all costs hold the truth at once, and each of its own, where that is known.

    Args:
        runs: Simulated experiments.
        random: Whether the selections of the method are random like those of the controls, so that nothing is beyond chance; else
            what each costs is fixed, and beyond chance is what it costs more than random selections on average.
        seeds: Random controls.
    """
    at_once, single = 0, 0.0
    draw = np.random.default_rng(7)
    fixed = {pair: 0.15 * number / len(PAIRS) for number, pair in enumerate(PAIRS)}
    for run in range(runs):
        # What a selection costs differs from one to the next, and in part alike on every skill.
        chances = {}
        for i in SKILLS:
            common = draw.normal(0, 0.04, seeds + 1)
            chances |= {(i, j): 0.1 + common + draw.normal(0, 0.04, seeds + 1) for j in SKILLS}
        effects = {pair: chances[pair][0] if random else fixed[pair] for pair in PAIRS}
        found = drawn_graph(effects, {pair: own[1:] for pair, own in chances.items()}, draw, run=run)
        truth = {pair: 0.0 if random else fixed[pair] - 0.1 for pair in BETWEEN}
        costs = {pair: found.costs[pair].beyond for pair in BETWEEN}
        at_once += all(costs[pair].low <= truth[pair] <= costs[pair].high for pair in BETWEEN)
        alone = {pair: found.beyond_chance(*pair).interval() for pair in BETWEEN}
        single += np.mean([alone[pair][0] <= truth[pair] <= alone[pair][1] for pair in BETWEEN])
    return at_once / runs, single / runs


@pytest.mark.parametrize("random", [True, False])
def test_all_intervals_hold_the_truth_at_once_as_often_as_they_say(random: bool) -> None:
    runs = 40
    at_once, single = simulated(runs, random=random)
    assert at_once >= 0.95 - 2.6 * (0.95 * 0.05 / runs) ** 0.5
    assert at_once <= single + 0.02 or single > 0.98, "each alone holds its own truth more often than all do at once"


def test_a_planted_edge_is_found_and_no_other() -> None:
    found = graph()
    assert [(one.removed, one.measured) for one in found.edges] == [("code", "math")]
    edge = found.costs["code", "math"]
    assert edge.beyond.low > 0.1
    assert edge.is_edge
    assert edge.certain
    assert found.costs["code", "code"].certain
    assert not found.costs["code", "code"].is_edge, "what a skill costs itself is no edge"
    assert graph(edges={}).edges == []
    assert graph(edges={("code", "math"): -0.3}).costs["code", "math"].beyond.high < 0, "spared beyond chance"
    assert graph(edges={("code", "math"): -0.3}).edges == []


def test_costs_are_the_drop_less_that_by_chance() -> None:
    found = graph()
    for (i, j), cost in found.costs.items():
        drop, chance = found.report.drop(i, j), found.report.drop(f"{i}:control", j)
        assert cost.drop.value == drop.value
        assert cost.chance.value == chance.value
        assert cost.beyond.value == pytest.approx(drop.value - chance.value)
        alone = found.beyond_chance(i, j)
        wide = 0.5 * (cost.beyond.high - cost.beyond.low) if i != j else math.inf
        assert wide > 0.5 * np.subtract(*alone.interval()[::-1]), "an interval that holds with others is wider"
        if i == j:
            assert (cost.beyond.low, cost.beyond.high) == alone.interval()
    row, again = (found.beyond_chance("code", other).spread for other in ("math", "prose"))
    column = found.beyond_chance("prose", "math").spread
    assert row is not None
    assert again is not None
    assert column is not None
    # The controls of one removal are the same neurons whatever is measured; those of two removals have nothing in common.
    seeds = np.corrcoef(np.sort(row), np.sort(column))[0, 1]
    assert seeds > 0.9
    assert abs(spearmanr(row, column)[0]) < 0.2


def test_tables() -> None:
    found = graph()
    frame = found.to_frame()
    assert list(zip(frame.removed, frame.measured)) == PAIRS
    np.testing.assert_allclose(frame.cost, frame["drop"] - frame.chance)
    assert list(frame[frame.certain & frame.joint].measured) == ["math"]
    assert not frame[frame.removed == frame.measured].joint.any()
    table = found.table()
    assert table.loc["code", "math"].endswith("]*")
    assert not table.loc["math", "code"].endswith("*")
    assert "3 skills by selective-pruning" in repr(found)
    assert "math" in found._repr_html_()
    assert found.csv().splitlines()[0].startswith("removed,measured,drop")


def test_overlaps_correlations_and_ratios_by_brute_force() -> None:
    found = graph()
    overlaps = found.overlaps().set_index(["a", "b", "site"])
    correlations = found.correlations().set_index(["a", "b", "site"])
    ratios = found.ratios().set_index(["skill", "region", "layer"])
    for a, b in (("code", "math"), ("code", "prose"), ("math", "prose")):
        sets = {
            s: {(str(site), i) for site, v in found.selections[s].items() for i in v.nonzero()[:, 0].tolist()}
            for s in (a, b)
        }
        row = overlaps.loc[a, b, "all"]
        assert (row["first"], row["second"], row["both"]) == (len(sets[a]), len(sets[b]), len(sets[a] & sets[b]))
        assert row["jaccard"] == pytest.approx(len(sets[a] & sets[b]) / len(sets[a] | sets[b]))
        counts = {s: [sum(name == f"L{layer}.mlp.post" for name, _ in sets[s]) for layer in range(3)] for s in (a, b)}
        assert row["expected"] == pytest.approx(sum(x * y / 20 for x, y in zip(counts[a], counts[b])))
        assert row["p_joint"] == pytest.approx(min(1, 3 * row["p"]))
        for layer in range(3):
            assert overlaps.loc[a, b, f"L{layer}.mlp.post"]["first"] == counts[a][layer]
        for site in found.scores[a]:
            values = [found.scores[s][site].flatten().numpy() for s in (a, b)]
            assert correlations.loc[a, b, str(site)]["spearman"] == pytest.approx(spearmanr(*values)[0])
        whole = [found.scores[s].flat().numpy() for s in (a, b)]
        assert correlations.loc[a, b, "all"]["spearman"] == pytest.approx(spearmanr(*whole)[0])
        if len({*counts[a]}) > 1 and len({*counts[b]}) > 1:
            expected = spearmanr(counts[a], counts[b])[0]
            assert correlations.loc[a, b, "shares by layer"]["spearman"] == pytest.approx(expected)
        for layer, count in enumerate(counts[a]):
            row = ratios.loc[a, "mlp.post", layer]
            assert (row["selected"], row["ratio"]) == (count, pytest.approx(count / 20))
            assert row["share"] == pytest.approx(count / len(sets[a]))
        assert ratios.loc[a, "mlp.post", "all"]["ratio"] == pytest.approx(0.2)


def test_few_documents_have_no_interval_and_others_do_not_depend_on_them() -> None:
    from dataclasses import replace

    found = graph()
    measures = {key: replace(one, units=5) if key[1] == "prose" else one for key, one in found.report.measures.items()}
    less = SkillGraph(Report(measures, found.provenance))
    assert math.isnan(less.costs["code", "prose"].beyond.low)
    assert not less.costs["code", "prose"].certain
    assert "too few documents" in less.table().loc["code", "prose"]
    one, other = (x.costs["code", "math"].beyond for x in (less, found))
    assert one.low > other.low, "fewer intervals are to hold at once"
    assert one.low > 0
    empty = SkillGraph(Report(measures, {}))
    assert len(empty.overlaps()) == len(empty.ratios()) == len(empty.correlations()) == 0


def test_what_is_no_graph_is_refused() -> None:
    found = graph()
    with pytest.raises(
        LensUnlearnError, match="there is no skill 'cooking' in this graph: choose from code, math, prose"
    ):
        found.beyond_chance("code", "cooking")
    with pytest.raises(LensUnlearnError, match="loss rises"):
        SkillGraph(found.report, metric="loss")
    assert Site(0, "mlp.post") in found.selections["code"]
