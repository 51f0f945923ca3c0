"""Methods, their controls and figures on neurons inside routed experts."""

from typing import Any

import moe
import pytest
import tiny
import torch

import lens_unlearn as lu
from lens_unlearn.core.errors import SelectionError
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.reroute import whole_experts
from lens_unlearn.methods.controls import controls_for, random_pruning
from lens_unlearn.methods.neuron_adjust import neuron_adjust
from lens_unlearn.methods.selective_pruning import pruning_score, selective_pruning
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.moments import Moments

FORGET, RETAIN = tiny.corpus(seed=1, name="forget"), tiny.corpus(seed=2, name="retain")
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def made() -> Any:
    return moe.shared("qwen3-moe")


@pytest.fixture(scope="module")
def both(made: Any) -> tuple[Moments, Moments]:
    return tuple(collect(made, corpus, "experts.post", **QUIET) for corpus in (FORGET, RETAIN))  # type: ignore[return-value]


def loaded(tokens: dict[Site, list[float]]) -> Moments:
    """Make moments of 1,000 tokens in which every neuron lives and experts have the given loads."""
    state: dict[str, torch.Tensor] = {}
    for site, loads in tokens.items():
        sums = torch.zeros(5, len(loads), 3, dtype=torch.float64)
        sums[2] = 10.0
        routing = torch.stack([torch.tensor(loads).double(), torch.tensor(loads).double() / 2])
        state |= {f"{site}.count": torch.tensor(1000), f"{site}.moments": sums, f"{site}.routing": routing}
    return Moments().with_state(state)


def test_selective_pruning_is_the_score_over_all_tokens(made: Any, both: tuple[Moments, Moments]) -> None:
    prune = selective_pruning(made, FORGET, RETAIN, fraction=0.1, site="experts.post", **QUIET)
    forget, retain = both
    eps = {site: 1e-3 * gates.mean() / retain.n for site, gates in retain.gate_sums.items()}
    for site in prune.selection:
        expected = forget.mean_abs[site] / (retain.mean_abs[site] + eps[site])
        torch.testing.assert_close(pruning_score(forget, retain)[site], expected)
    assert prune.selection.count() == round(0.1 * 2 * 96)
    assert prune.selection.experts == {Site(0, "experts.post"): 4, Site(1, "experts.post"): 4}
    assert selective_pruning(made, *both, fraction=0.1, site="experts.post").selection.equals(prune.selection)
    twice = selective_pruning(made, FORGET, RETAIN, fraction=0.1, site="experts.post", steps=2, **QUIET)
    assert twice.selection.count() == prune.selection.count()
    assert twice.selection.experts == prune.selection.experts


def test_means_are_put_where_a_neuron_is_computed(made: Any, both: tuple[Moments, Moments]) -> None:
    prune = selective_pruning(made, *both, fraction=0.1, site="experts.post", replacement="mean")
    assert isinstance(prune.value, NeuronMap)
    for site in prune.selection:
        torch.testing.assert_close(prune.value[site], both[1].mean_given_routed[site])


def test_neuron_adjust_changes_routed_values_alone(made: Any) -> None:
    adjust = neuron_adjust(made, FORGET, RETAIN, fraction=0.2, site="experts.pre", rule="deterministic", **QUIET)
    before = tiny.logits(made)
    load = collect(made, FORGET, "L0.experts.pre", **QUIET).routed_tokens
    with adjust.on(made):
        assert not torch.equal(tiny.logits(made), before)
        under = collect(made, FORGET, "L0.experts.pre", **QUIET)
    assert all(torch.equal(under.routed_tokens[site], tokens) for site, tokens in load.items())
    assert torch.equal(tiny.logits(made), before)


def test_controls_are_drawn_from_experts_with_the_same_load() -> None:
    made, site = moe.shared("qwen3-moe"), Site(0, "experts.post")
    loads = [float(10 * (e // 4) ** 2) for e in range(40)]  # ten loads, four experts with each
    retain = loaded({site: loads})
    chosen = torch.zeros(40, 3, dtype=torch.bool)
    chosen[[0, 1, 17, 18, 19, 39], [0, 1, 2, 0, 1, 1]] = True
    prune = Ablate(NeuronMap({site: chosen}))
    wanted = torch.bincount(torch.tensor([e // 4 for e in range(40)])[chosen.nonzero()[:, 0]], minlength=10)
    drawn = [random_pruning(made, None, retain, like=prune, seed=seed).selection for seed in range(8)]
    for selection in drawn:
        experts = selection[site].view(40, 3).nonzero()[:, 0]
        assert torch.equal(torch.bincount(experts // 4, minlength=10), wanted)
        assert selection.experts == {site: 40}
    assert len({tuple(selection.flat().nonzero()[:, 0].tolist()) for selection in drawn}) > 4
    for control in controls_for(made, prune, [3], retain, retain):
        assert isinstance(control, Ablate)
        assert control.selection.equals(random_pruning(made, retain, retain, like=prune, seed=3).selection)


def test_controls_of_whole_experts_are_whole_experts() -> None:
    made, site = moe.shared("qwen3-moe"), Site(0, "experts.post")
    retain = loaded({site: [float(10 * (e // 4) ** 2) for e in range(40)]})
    chosen = torch.zeros(40, 3, dtype=torch.bool)
    chosen[[5, 22, 23]] = True
    for seed in range(4):
        drawn = random_pruning(made, None, retain, like=Ablate(NeuronMap({site: chosen})), seed=seed).selection
        each = drawn[site].view(40, 3)
        assert torch.equal(each.all(1), each.any(1))
        assert sorted((each.all(1).nonzero()[:, 0] // 4).tolist()) == [1, 5, 5]


def test_too_few_candidates_of_a_load_are_said() -> None:
    made, site = moe.shared("qwen3-moe"), Site(0, "experts.post")
    retain = loaded({site: [float(e) for e in range(10)]})
    chosen = torch.zeros(10, 3, dtype=torch.bool)
    chosen[4, :2] = True
    among = NeuronMap({site: torch.arange(30).view(10, 3) != 13})
    among = among & NeuronMap({site: torch.arange(30).view(10, 3) != 12})
    with pytest.raises(SelectionError, match="2 neurons are to be drawn, and 1 of 30 are candidates"):
        random_pruning(made, None, retain, like=Ablate(NeuronMap({site: chosen})), among=among)


def test_a_control_without_what_it_is_like_is_drawn_from_all(made: Any) -> None:
    drawn = random_pruning(made, FORGET, RETAIN, fraction=0.1, site="experts.post", **QUIET).selection
    assert {site: int(mask.sum()) for site, mask in drawn.items()} == dict.fromkeys(resolve(made, "experts.post"), 10)


def test_the_words_of_a_control_say_that_loads_are_matched() -> None:
    from lens_unlearn.methods import by_name

    record = by_name("selective-pruning")
    assert record.words_of_control({"site": "experts.post"}).endswith("in experts with the same load")
    assert record.words_of_control({}) == "as many random neurons of every layer"


def test_a_sweep_has_loads_matched_and_whole_experts_can_be_compared(made: Any) -> None:
    report = lu.sweep(
        selective_pruning, made, FORGET, RETAIN, {"forget": FORGET, "retain": RETAIN},
        fractions=[0.1], options={"site": "experts.post"}, control_seeds=[0], **QUIET,
    )  # fmt: skip
    assert "in experts with the same load" in report.provenance["controls"]["selective-pruning"]
    conditions = {"off": Ablate(whole_experts(made, {0: [1]})), "rerouted": lu.Reroute({0: [1]})}
    frame = lu.evaluate(made, {"forget": FORGET}, conditions, **QUIET).to_frame()
    assert set(frame["condition"]) == {"base", "off", "rerouted"}


def test_a_report_is_of_plain_passes_under_each_intervention(made: Any) -> None:
    """Also where several conditions begin in the last layer, below which nothing is run again."""
    off = Ablate(whole_experts(made, {1: [0, 2]}))
    conditions = {"off": off, "rerouted": lu.Reroute({1: [0]}), "both": lu.Reroute({0: [1]}) + off}
    report = lu.evaluate(made, {"forget": FORGET}, conditions, **QUIET)
    rows = list(zip(FORGET.starts, FORGET.starts[1:], strict=False))
    for name, intervention in conditions.items():
        losses = []
        with intervention.on(made), torch.no_grad():
            for start, end in rows:
                row = FORGET.tokens[start:end].long()
                scores = made(row[None])[0, :-1].log_softmax(-1)
                losses.append(-scores.gather(1, row[1:, None])[:, 0][FORGET.counted[start:end][1:]])
        assert report[name, "forget", "loss"].value == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_neurons_inside_experts_can_be_named_and_looked_at(made: Any) -> None:
    from lens_unlearn.inspection.shown import neurons_of

    places, _ = neurons_of(made, ["L1.experts.post[3, 17]", "L0.experts.post[2,5]"])
    assert places == {
        "L1.experts.post[3, 17]": (Site(1, "experts.post"), 3 * 24 + 17),
        "L0.experts.post[2, 5]": (Site(0, "experts.post"), 2 * 24 + 5),
    }
    for name in ("L1.experts.post[4, 0]", "L1.experts.post[0, 24]"):
        with pytest.raises(SelectionError, match=r"neurons 0 to 95, or \[expert, place\] of \(4, 24\)"):
            neurons_of(made, [name])
