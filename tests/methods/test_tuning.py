"""tune finds the most forgetting inside the budget, on texts it was not fitted on; sweep sets every strength beside its control."""

from typing import Any

import pytest
import tiny
import torch
from selective_pruning_helpers import PROSE, TEXTS_CODE, TEXTS_PROSE, planted

from lens_unlearn.core.errors import LensUnlearnError, SelectionError
from lens_unlearn.evaluation.report import separability
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.methods.controls import controls_for, random_pruning
from lens_unlearn.methods.key_space_detection import key_space_detection
from lens_unlearn.methods.neuron_adjust import neuron_adjust
from lens_unlearn.methods.selective_pruning import selective_pruning
from lens_unlearn.methods.tuning import _search, sweep, tune
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import collect, query_keys
from lens_unlearn.neurons.maps import NeuronMap

QUIET = {"progress": False}


def texts(tokens: Any, seed: int, rows: int = 10, name: str = "t") -> Any:
    return tiny.corpus([12] * rows, seed=seed, tokens=list(tokens), name=name)


def method_of(drops: Any) -> Any:
    """A method whose intervention carries its fraction; `evaluate` is replaced by a table of drops."""

    def pretend(model: Any, forget: Any, retain: Any, *, fraction: float) -> Ablate:
        return Ablate(NeuronMap({Site(0, "mlp.post"): torch.ones(4, dtype=torch.bool)}), fraction)

    return pretend


def searched(cost: Any, budget: float, evaluations: int = 10) -> dict[float, tuple[float, float]]:
    tried: dict[float, tuple[float, float]] = {}
    for fraction in _search(budget, tried, evaluations):
        assert fraction not in tried, "nothing is tried twice"
        assert 0 < fraction <= 1
        tried[fraction] = (fraction, cost(fraction))
    return tried


@pytest.mark.parametrize("edge", [0.013, 0.05, 0.1, 0.37, 0.7, 0.99])
def test_the_search_closes_in_on_the_edge_of_the_budget(edge: float) -> None:
    tried = searched(lambda f: 0.05 * (f / edge) ** 2, 0.05, evaluations=20)
    best = max(f for f, (_, cost) in tried.items() if cost <= 0.05)
    assert best == pytest.approx(edge, abs=max(0.003, 0.03 * edge))


@pytest.mark.parametrize("evaluations", [1, 2, 5, 10])
def test_the_search_keeps_to_its_number_of_evaluations(evaluations: int) -> None:
    assert len(searched(lambda f: f, 0.05, evaluations)) <= evaluations


def test_where_nothing_costs_anything_the_search_goes_to_the_end() -> None:
    assert max(searched(lambda _: 0.0, 0.05)) == 1


def test_where_everything_breaks_the_budget_smaller_fractions_are_tried() -> None:
    tried = searched(lambda _: 1.0, 0.05, evaluations=20)
    assert min(tried) < 0.005


def test_the_best_within_the_budget_is_chosen_and_fitted_on_other_texts() -> None:
    model = planted([3, 17, 40])
    seen: list[set[str]] = []

    def spy(model: Any, forget: Any, retain: Any, *, fraction: float, progress: bool = True) -> Ablate:
        seen.append({*forget.keys, *retain.keys})
        return selective_pruning(model, forget, retain, fraction=fraction, progress=progress)

    forget, retain = texts(range(10, 60), 1, 40, name="f"), texts(PROSE, 2, 40, name="r")
    found = tune(spy, model, forget, retain, retain_drop=1.0, metric="top10", evaluations=4, **QUIET)
    conditions = [name for name in found.report.conditions if name != "base"]
    assert len(conditions) == len(seen) == 4
    assert all(len(keys) == 48 for keys in seen), "60 % of forty documents each"
    costs = {n: found.report.drop(n, "retain", "top10").value for n in conditions}
    gains = {n: found.report.drop(n, "forget", "top10").value for n in conditions}
    assert found.forget_drop == max(g for n, g in gains.items() if costs[n] <= 1.0)
    assert found.retain_drop <= 1.0
    assert f"fraction={found.fraction:g}" in repr(found)
    assert isinstance(found.intervention, Ablate)


def test_what_is_a_little_over_the_budget_is_not_chosen_though_it_forgets_more() -> None:
    model = planted([3, 17, 40])
    tempting = 0
    for budget in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        found = tune(
            selective_pruning,
            model,
            TEXTS_PROSE,
            TEXTS_PROSE,
            retain_drop=budget,
            metric="top10",
            evaluations=8,
            **QUIET,
        )  # of one text with itself: what forgets more costs more
        assert found.retain_drop <= budget
        tried = [name for name in found.report.conditions if name != "base"]
        costs = {name: found.report.drop(name, "retain", "top10").value for name in tried}
        gains = {name: found.report.drop(name, "forget", "top10").value for name in tried}
        assert found.forget_drop == max(gains[name] for name in tried if costs[name] <= budget)
        tempting += any(budget < costs[n] <= 2 * budget and gains[n] > found.forget_drop for n in tried)
    assert tempting, "nothing a little over the budget was ever better: the test would mean nothing"


def test_held_out_texts_are_used_where_they_are_given() -> None:
    model = tiny.model("gpt2")
    held = texts(range(10, 60), 5, 30), texts(PROSE, 6, 30)
    fits = [collect(model, corpus, "mlp.post", **QUIET) for corpus in (TEXTS_CODE, TEXTS_PROSE)]
    one = tune(
        selective_pruning,
        model,
        TEXTS_CODE,
        TEXTS_PROSE,
        held_out=held,
        retain_drop=1,
        metric="top10",
        evaluations=2,
        **QUIET,
    )
    other = tune(selective_pruning, model, *fits, held_out=held, retain_drop=1, metric="top10", evaluations=2, **QUIET)
    assert one.fraction == other.fraction
    assert one.intervention.selection.equals(other.intervention.selection)
    assert one.report.provenance["corpora"]["forget"]["fingerprint"] == held[0].fingerprint
    with pytest.raises(LensUnlearnError, match="hold no texts to tune on"):
        tune(selective_pruning, model, *fits, **QUIET)


def fake_drops(monkeypatch: pytest.MonkeyPatch, table: Any) -> None:
    """Let `evaluate` answer from a function fraction -> (forget, retain) drop."""
    import numpy as np

    from lens_unlearn.evaluation.report import Measure, Report
    from lens_unlearn.methods import tuning

    def pretend(model: Any, corpora: Any, conditions: Any, **_: Any) -> Report:
        measures = {}
        for name, edit in {"base": None, **conditions}.items():
            lost = (0.0, 0.0) if edit is None else table(edit.value)
            for corpus, drop in zip(("forget", "retain"), lost, strict=True):
                measures[name, corpus, "top1"] = Measure(0.5 * (1 - drop), np.full(3, 0.5 * (1 - drop)), 10)
        return Report(measures)

    monkeypatch.setattr(tuning, "evaluate", pretend)


def test_of_all_within_the_budget_the_one_that_forgets_most_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    # Forgetting is not monotone: 0.04 forgets more than what costs more, also inside the budget.
    fake_drops(monkeypatch, lambda f: (0.9 if f == 0.04 else f, f))
    held = texts(range(10, 60), 5, 30), texts(PROSE, 6, 30)
    found = tune(method_of(None), None, TEXTS_CODE, TEXTS_PROSE, held_out=held, retain_drop=0.2, **QUIET)
    assert found.fraction == 0.04
    assert found.forget_drop == pytest.approx(0.9)
    assert found.retain_drop == pytest.approx(0.04)
    assert found.intervention.value == 0.04


def test_a_budget_that_cannot_be_kept_says_what_the_least_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_drops(monkeypatch, lambda f: (1.0, 0.5))
    held = texts(range(10, 60), 5, 30), texts(PROSE, 6, 30)
    with pytest.raises(
        LensUnlearnError,
        match=r"no fraction stays within retain_drop=0.05: already 0\.00\d+ costs 50.0% of the retain top1",
    ):
        tune(method_of(None), None, TEXTS_CODE, TEXTS_PROSE, held_out=held, **QUIET)


def test_a_metric_of_which_nothing_is_there_to_lose_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lens_unlearn.evaluation.report import Measure, Report
    from lens_unlearn.methods import tuning

    def nothing(model: Any, corpora: Any, conditions: Any, **_: Any) -> Report:
        return Report(
            {(c, n, "top1"): Measure(0.0, torch.zeros(2).numpy(), 3) for c in ("base", *conditions) for n in corpora}
        )

    monkeypatch.setattr(tuning, "evaluate", nothing)
    held = texts(range(10, 60), 5, 4), texts(PROSE, 6, 4)
    with pytest.raises(
        LensUnlearnError, match="the unedited model has top1 0 on the forget corpus: there is nothing to lose"
    ):
        tune(method_of(None), None, TEXTS_CODE, TEXTS_PROSE, held_out=held, **QUIET)


def test_where_no_fraction_selects_anything_the_reason_is_given() -> None:
    def never(model: Any, forget: Any, retain: Any, *, fraction: float) -> Ablate:
        raise SelectionError("selects nothing")

    held = texts(range(10, 60), 5, 4), texts(PROSE, 6, 4)
    with pytest.raises(SelectionError, match="selects nothing"):
        tune(never, tiny.model("gpt2"), TEXTS_CODE, TEXTS_PROSE, held_out=held, metric="top10", **QUIET)


@pytest.mark.parametrize("budget", [-0.1, 1.5, float("nan")])
def test_a_budget_that_is_no_share_is_refused(budget: float) -> None:
    with pytest.raises(SelectionError, match="retain_drop=.* is not a share"):
        tune(selective_pruning, tiny.model("gpt2"), TEXTS_CODE, TEXTS_PROSE, retain_drop=budget, **QUIET)


def test_few_units_can_be_tuned_although_the_first_fraction_selects_nothing() -> None:
    model = tiny.model("gpt2")
    held = texts(range(10, 60), 5, 30), texts(PROSE, 6, 30)
    found = tune(
        selective_pruning,
        model,
        TEXTS_CODE,
        TEXTS_PROSE,
        held_out=held,
        retain_drop=1,
        metric="top10",
        options={"site": "attn.z", "unit": "head"},
        **QUIET,
    )
    assert found.intervention.selection.count() >= 8


def test_a_sweep_sets_every_strength_beside_a_control_of_equal_counts() -> None:
    model, fractions = tiny.model("gpt2"), (0.1, 0.3)
    test = {"forget": texts(range(10, 60), 5, 30), "retain": texts(PROSE, 6, 30)}
    report = sweep(
        selective_pruning,
        model,
        TEXTS_CODE,
        TEXTS_PROSE,
        test,
        fractions=fractions,
        options={"importance": "rms"},
        **QUIET,
    )
    assert report.conditions == [
        "base",
        "selective-pruning@0.1",
        "selective-pruning:control@0.1",
        "selective-pruning@0.3",
        "selective-pruning:control@0.3",
    ]
    assert report.provenance["sweep"] == {"method": "selective-pruning", "options": {"importance": "rms"}}
    direct = selective_pruning(model, TEXTS_CODE, TEXTS_PROSE, fraction=0.1, importance="rms", **QUIET)
    from lens_unlearn.evaluation.evaluate import evaluate

    again = evaluate(model, test, {"x": direct, "y": controls_for(model, direct, range(3))}, **QUIET)
    for corpus in test:
        assert again["x", corpus, "loss"].value == report["selective-pruning@0.1", corpus, "loss"].value
        assert again["y", corpus, "loss"].value == report["selective-pruning:control@0.1", corpus, "loss"].value
    curve = separability(report, metric="top10", conditions=["selective-pruning@0.1", "selective-pruning@0.3"])
    assert curve.at.startswith("selective-pruning@")
    alone = sweep(selective_pruning, model, TEXTS_CODE, TEXTS_PROSE, test, fractions=(0.1,), control_seeds=(), **QUIET)
    assert alone.conditions == ["base", "selective-pruning@0.1"]


def test_the_corpora_are_run_once_for_all_strengths(monkeypatch: pytest.MonkeyPatch) -> None:
    import lens_unlearn.methods.selective_pruning as module

    runs: list[str] = []
    real = module.collect
    monkeypatch.setattr(
        module, "collect", lambda model, corpus, *a, **k: (runs.append(corpus.name), real(model, corpus, *a, **k))[1]
    )
    test = {"forget": texts(range(10, 60), 5, 30), "retain": texts(PROSE, 6, 30)}
    sweep(
        selective_pruning,
        tiny.model("gpt2"),
        TEXTS_CODE,
        TEXTS_PROSE,
        test,
        fractions=(0.1, 0.2, 0.3),
        control_seeds=(),
        **QUIET,
    )
    assert sorted(runs) == ["code", "prose"]


def test_controls_are_of_ablations_alone() -> None:
    model = tiny.model("gpt2")
    prune = random_pruning(model, fraction=0.1)
    controls = controls_for(model, prune, range(4))
    assert len({tuple(c.selection.flat().tolist()) for c in controls}) == 4
    assert controls_for(model, prune + prune) == []


# --- the other methods ---------------------------------------------------------------------------------------------------


def test_tune_finds_a_fraction_for_neuron_adjust_and_false_alarms_for_detection() -> None:
    model = tiny.model("gpt2")
    held = texts(range(10, 60), 5, 30), texts(PROSE, 6, 30)
    settings: dict[str, Any] = {"held_out": held, "retain_drop": 1, "metric": "top10", "evaluations": 2, **QUIET}
    adjusted = tune(neuron_adjust, model, TEXTS_CODE, TEXTS_PROSE, **settings)
    moments = [collect(model, corpus, "mlp.pre", **QUIET) for corpus in (TEXTS_CODE, TEXTS_PROSE)]
    again = neuron_adjust(model, *moments, fraction=adjusted.fraction)
    assert isinstance(adjusted.intervention, Adjust)
    assert adjusted.intervention.selection.equals(again.selection)

    many = texts(range(10, 60), 7, 60), texts(PROSE, 8, 60)
    silent = tune(key_space_detection, model, *many, **settings)
    assert isinstance(silent.intervention, Abstain)
    assert silent.fraction in (0.01, 0.02)
    keys = [query_keys(model, corpus, **QUIET) for corpus in many]
    other = key_space_detection(model, *keys, false_alarms=silent.fraction, **QUIET)
    assert repr(other) == repr(silent.intervention)
    assert silent.report["base", "forget", "abstained"].value == 0
    assert silent.report.provenance["corpora"]["forget"]["source"].endswith("cut into prompts")


def test_sweep_measures_detection_behind_prompts() -> None:
    model = tiny.model("gpt2")
    many = texts(range(10, 60), 7, 60), texts(PROSE, 8, 60)
    test = {"forget": texts(range(10, 60), 9, 20), "retain": texts(PROSE, 10, 20)}
    report = sweep(key_space_detection, model, *many, test, fractions=(0.05, 0.5), **QUIET)
    name = "key-space-detection"
    assert report.conditions == ["base", *(f"{name}{c}@{f}" for f in (0.05, 0.5) for c in ("", ":control"))]
    assert report.provenance["controls"] == {name: "the same method fitted to shuffled labels"}
    shares = [report[f"key-space-detection@{f}", "retain", "abstained"].value for f in (0.05, 0.5)]
    assert shares[0] < shares[1]
    assert report["base", "forget", "top1"].n < test["forget"].n_tokens


def test_the_control_of_an_adjustment_has_as_many_neurons_per_layer_and_their_own_statistics() -> None:
    model = tiny.model("gpt2")
    edit = neuron_adjust(model, TEXTS_CODE, TEXTS_PROSE, fraction=0.2, rule="deterministic", progress=False)
    one, other = controls_for(model, edit, [0, 1])
    assert isinstance(one, Adjust)
    assert isinstance(other, Adjust)
    assert one.selection.per_layer() == edit.selection.per_layer() == other.selection.per_layer()
    assert not one.selection.equals(edit.selection)
    assert not one.selection.equals(other.selection)
    assert one.rule == "deterministic"
    assert one.forget_mean.equals(edit.forget_mean)
