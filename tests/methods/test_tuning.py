"""tune finds the most forgetting inside the budget, on texts it was not fitted on; sweep sets every strength beside its control."""

import json
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from selective_pruning_helpers import PROSE, TEXTS_CODE, TEXTS_PROSE, planted

from lens_unlearn.core.errors import BudgetError, CorpusError, LensUnlearnError, SelectionError
from lens_unlearn.evaluation import evaluate as evaluating
from lens_unlearn.evaluation.report import Measure, Report, separability
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.methods import tuning
from lens_unlearn.methods.budget import strengths_from, upper_bound
from lens_unlearn.methods.controls import controls_for, random_pruning
from lens_unlearn.methods.key_space_detection import key_space_detection
from lens_unlearn.methods.method import Method
from lens_unlearn.methods.neuron_adjust import neuron_adjust
from lens_unlearn.methods.selective_pruning import selective_pruning
from lens_unlearn.methods.tuning import Tuned, sweep, tune
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


def test_the_best_within_the_budget_is_chosen_and_fitted_on_other_texts() -> None:
    model = planted([3, 17, 40])
    seen: list[set[str]] = []

    def spy(model: Any, forget: Any, retain: Any, *, fraction: float, progress: bool = True) -> Ablate:
        seen.append({*forget.keys, *retain.keys})
        return selective_pruning(model, forget, retain, fraction=fraction, progress=progress)

    forget, retain = texts(range(10, 60), 1, 40, name="f"), texts(PROSE, 2, 40, name="r")
    found = tune(spy, model, forget, retain, retain_drop=1.0, metric="top10", evaluations=3, **QUIET)
    conditions = [name for name in found.report.conditions if name != "base"]
    assert len(conditions) == len(seen) == 3
    assert all(len(keys) == 48 for keys in seen), "60 % of forty documents each"
    gains = {n: found.report.drop(n, "forget", "top10").value for n in conditions}
    kept = {n for n in conditions if upper_bound(found.report.drop(n, "retain", "top10"), 16) <= 1.0}
    assert found.forget_drop == max(gains[n] for n in kept)
    assert found.retain_drop <= found.retain_bound <= 1.0
    assert found.worst == "retain"
    assert f"fraction={found.fraction:g}" in repr(found)
    assert isinstance(found.intervention, Ablate)


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


def test_the_unedited_model_need_be_measured_once_for_several_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    model, held = tiny.model("gpt2"), (texts(range(10, 60), 5, 30), texts(PROSE, 6, 30))
    settings: dict[str, Any] = {"held_out": held, "retain_drop": 1, "metric": "top10", "evaluations": 2, **QUIET}
    conditions: list[list[str]] = []
    real = evaluating._run

    def counted(model: Any, common: Any, runs: Any, *rest: Any) -> Any:
        conditions.append(list(runs))
        return real(model, common, runs, *rest)

    monkeypatch.setattr(evaluating, "_run", counted)
    first = tune(neuron_adjust, model, TEXTS_CODE, TEXTS_PROSE, **settings)
    assert ["base"] in conditions
    conditions.clear()
    given = tune(selective_pruning, model, TEXTS_CODE, TEXTS_PROSE, base=first.report, **settings)
    assert conditions
    assert not any("base" in one for one in conditions)
    alone = tune(selective_pruning, model, TEXTS_CODE, TEXTS_PROSE, **settings)
    assert (given.fraction, given.forget_drop, given.retain) == (alone.fraction, alone.forget_drop, alone.retain)
    assert given.report.conditions == alone.report.conditions, "and none of another method's"
    others = {**settings, "held_out": held[::-1]}
    with pytest.raises(LensUnlearnError, match="base is not of the corpus 'forget'"):
        tune(selective_pruning, model, TEXTS_CODE, TEXTS_PROSE, base=first.report, **others)


def test_warnings_of_what_is_chosen_are_told_and_of_what_is_only_tried_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_drops(monkeypatch, lambda f: (f, f))

    def warning(model: Any, forget: Any, retain: Any, *, fraction: float) -> Ablate:
        warnings.warn(f"at {fraction:g}", RuntimeWarning, stacklevel=2)
        return method_of(None)(model, forget, retain, fraction=fraction)

    with pytest.warns(RuntimeWarning) as told:
        found = tune(warning, tiny.model("gpt2"), TEXTS_CODE, TEXTS_PROSE, held_out=HELD, retain_drop=0.2, **QUIET)
    assert [str(one.message) for one in told] == [f"at {found.fraction:g}"]


HELD = texts(range(10, 60), 5, 30), texts(PROSE, 6, 30)


def fake_drops(monkeypatch: pytest.MonkeyPatch, table: Any, noise: float = 0.0) -> list[float]:
    """Let `evaluate` answer from a function fraction -> drops of forget and of retain corpora; return the fractions asked for."""
    asked: list[float] = []

    def pretend(model: Any, corpora: Any, conditions: Any, **_: Any) -> Report:
        measures = {}
        for name, edit in {"base": None, **conditions}.items():
            asked.extend([] if edit is None else [edit.value])
            lost = (0.0,) * len(corpora) if edit is None else table(edit.value)
            for corpus, drop in zip(corpora, lost, strict=True):
                draws = np.random.default_rng(0).normal(drop, 0.0 if edit is None else noise, 2000)
                measures[name, corpus, "top1"] = Measure(0.5 * (1 - drop), 0.5 * (1 - draws), 10)
        return Report(measures)

    monkeypatch.setattr(tuning, "evaluate", pretend)
    return asked


def pretended(**settings: Any) -> Tuned:
    return tune(method_of(None), tiny.model("gpt2"), TEXTS_CODE, TEXTS_PROSE, **{"held_out": HELD, **QUIET, **settings})


def test_of_all_within_the_budget_the_one_that_forgets_most_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    # Forgetting is not monotone: the first that is tried forgets more than what costs more, also inside the budget.
    asked = fake_drops(monkeypatch, lambda f: (0.9 if f < 0.02 else f, f))
    found = pretended(retain_drop=0.2)
    assert found.fraction == asked[0] < 0.02
    assert found.forget_drop == pytest.approx(0.9)
    assert found.retain_drop == pytest.approx(found.fraction)
    assert found.intervention.value == found.fraction
    assert max(fraction for fraction in asked if fraction <= 0.2) > 0.1


@pytest.mark.parametrize("edge", [0.013, 0.05, 0.1, 0.37, 0.7, 0.99])
@pytest.mark.parametrize("noise", [0.0, 0.004])
def test_the_strongest_whose_bound_is_within_the_budget_is_found(
    edge: float, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake_drops(monkeypatch, lambda f: (f, 0.05 * (f / edge) ** 2), noise)
    found = pretended()
    z = 1.2816 * 2**0.5 * noise  # of the difference of two samples, at 90 % confidence
    grid = strengths_from(0.005)
    bounds = {f: 0.05 * (f / edge) ** 2 + z for f in grid}
    assert bounds[found.fraction] <= 0.05 + 4e-4
    assert all(bounds[f] > 0.05 - 4e-4 for f in grid if f > found.fraction)
    assert found.retain_bound == pytest.approx(found.retain_drop + z, abs=4e-4)
    assert len(asked) <= 7
    assert "at most" in repr(found)
    assert "with 90% confidence" in repr(found)


def test_more_confidence_forgets_less(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_drops(monkeypatch, lambda f: (f, f), 0.005)
    assert pretended(confidence=0.99).fraction < pretended(confidence=0.9).fraction < pretended(confidence=0.5).fraction
    with pytest.raises(LensUnlearnError, match="confidence=1 is no confidence"):
        pretended(confidence=1)


def test_every_retain_corpus_has_to_keep_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    retain = {"cheap": texts(PROSE, 6, 30), "dear": texts(PROSE, 7, 30), "free": texts(PROSE, 8, 30)}
    fake_drops(monkeypatch, lambda f: (f, f / 10, f, 0.0))
    found = pretended(held_out=(HELD[0], retain), retain_drop=0.1)
    assert found.worst == "dear"
    assert 0.07 < found.fraction <= 0.1
    assert found.retain_drop == found.retain_bound == pytest.approx(found.fraction)
    assert list(found.retain) == list(retain)
    assert found.retain["cheap"] == pytest.approx((found.fraction / 10,) * 2)
    kept = found.to_dict()
    assert json.loads(json.dumps(kept)) == kept
    assert kept["retain"]["dear"] == {"drop": found.retain_drop, "bound": found.retain_bound}
    assert "of dear, the worst of 3" in repr(found)
    for wrong in ({}, {"forget": HELD[1]}):
        with pytest.raises(LensUnlearnError, match="several by names other than 'forget'"):
            pretended(held_out=(HELD[0], wrong))


def test_several_retain_corpora_are_fitted_together_and_split_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    retain = {name: texts(PROSE, seed, 40, name=name) for name, seed in (("a", 2), ("b", 3))}
    fitted: list[Any] = []

    def spy(model: Any, forget: Any, retain: Any, *, fraction: float) -> Ablate:
        fitted.append(retain)
        return Ablate(NeuronMap({Site(0, "mlp.post"): torch.ones(4, dtype=torch.bool)}), fraction)

    fake_drops(monkeypatch, lambda f: (f, f, f))
    tune(spy, tiny.model("gpt2"), texts(range(10, 60), 1, 40), retain, **QUIET)
    parts = [corpus.split(0.6, 0.4)[0].keys for corpus in retain.values()]
    assert {part.keys for part in fitted} == {parts[0] + parts[1]}


def test_a_budget_that_cannot_be_kept_says_what_the_least_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_drops(monkeypatch, lambda f: (1.0, 0.5))
    with pytest.raises(
        BudgetError,
        match=r"no fraction stays within retain_drop=0.05 with 90% confidence: already 0\.005 costs 50.0% of the retain top1, up",
    ):
        pretended()
    assert len(asked) == 3, "the weakest of all is found by bisection"


def test_so_few_documents_that_they_bound_nothing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_drops(monkeypatch, lambda f: (f, f))
    few = texts(PROSE, 6, 9)
    with pytest.raises(
        CorpusError, match=r"the retain corpus has 9 documents or groups to tune on, too few .* has at least 10"
    ):
        pretended(held_out=(HELD[0], few))
    grouped = replace(HELD[1], groups=tuple(str(i % 5) for i in range(30)))
    with pytest.raises(CorpusError, match="has 5 documents or groups"):
        pretended(held_out=(HELD[0], grouped))
    with pytest.raises(
        BudgetError, match="has 30 documents or groups to tune on: though none were abstained from"
    ) as error:
        tune(key_space_detection, tiny.model("gpt2"), *HELD, held_out=HELD, **QUIET)
    assert "give at least 45, or raise the budget" in str(error.value)


def test_what_unlearns_answers_is_fitted_again_on_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[tuple[int, int]] = []

    def pretend(model: Any, forget: Any, retain: Any, *, fraction: float) -> Ablate:
        fitted.append((forget.n_documents, retain.n_documents))
        return Ablate(NeuronMap({Site(0, "mlp.post"): torch.ones(4, dtype=torch.bool)}), fraction)

    fake_drops(monkeypatch, lambda f: (f, f))
    corpora = texts(range(10, 60), 1, 50), texts(PROSE, 2, 50)
    record = Method(name="own", function=pretend, unlearns_answers=True)
    found = tune(record, tiny.model("gpt2"), *corpora, retain_drop=0.3, **QUIET)
    assert fitted[-1] == (50, 50)
    assert set(fitted[:-1]) == {(30, 30)}
    assert found.intervention.value == found.fraction
    fitted.clear()
    tune(record, tiny.model("gpt2"), *corpora, held_out=HELD, retain_drop=0.3, **QUIET)
    assert set(fitted) == {(50, 50)}, "what is held out explicitly is not trained on"
    fitted.clear()
    tune(replace(record, unlearns_answers=False), tiny.model("gpt2"), *corpora, retain_drop=0.3, **QUIET)
    assert set(fitted) == {(30, 30)}


def test_a_metric_of_which_nothing_is_there_to_lose_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(model: Any, corpora: Any, conditions: Any, **_: Any) -> Report:
        return Report(
            {(c, n, "top1"): Measure(0.0, torch.zeros(2).numpy(), 3) for c in ("base", *conditions) for n in corpora}
        )

    monkeypatch.setattr(tuning, "evaluate", nothing)
    held = texts(range(10, 60), 5, 4), texts(PROSE, 6, 10)
    with pytest.raises(
        LensUnlearnError, match="the unedited model has top1 0 on the forget corpus: there is nothing to lose"
    ):
        tune(method_of(None), tiny.model("gpt2"), TEXTS_CODE, TEXTS_PROSE, held_out=held, **QUIET)


def test_where_no_fraction_selects_anything_the_reason_is_given() -> None:
    def never(model: Any, forget: Any, retain: Any, *, fraction: float) -> Ablate:
        raise SelectionError("selects nothing")

    held = texts(range(10, 60), 5, 4), texts(PROSE, 6, 10)
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
    assert silent.fraction in strengths_from(0.0025)
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
