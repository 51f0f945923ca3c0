"""evaluate: token-weighted sums equal brute force, conditions do not leak, intervals are what they say."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from interventions_helpers import POST, final, selection_of, under
from positions_helpers import LAST, around, everywhere
from positions_helpers import key as key_of
from scipy.stats import beta, t

from lens_unlearn.core.errors import CorpusError, LensUnlearnError, ModelError, SelectionError
from lens_unlearn.core.intervals import weights_of, widening
from lens_unlearn.evaluation import evaluate as evaluating
from lens_unlearn.evaluation.bootstrap import Scores, estimates
from lens_unlearn.evaluation.evaluate import evaluate
from lens_unlearn.evaluation.metrics import metric as metric_of
from lens_unlearn.evaluation.report import BASE, Measure, Report, separability
from lens_unlearn.evaluation.teacher_forcing import Outcome
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.base import Chain
from lens_unlearn.interventions.when import When
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.maps import NeuronMap

QUIET = {"progress": False, "resamples": 50}
TABLE = ("loss", "top1", "top10", "kl")
METRICS = ("loss", "perplexity", "top1", "top10", "top1_rare", "kl")


def brute(corpus: Any, run: Any, base: Any) -> dict[str, float]:
    """All metrics by plain loops, one row at a time, in float64, from functions that give a row's logits."""
    losses, first, ten, rare, kls = [], [], [], [], []
    targets = Counter[int]()
    rows = []
    for row in range(corpus.n_rows):
        start, end = int(corpus.starts[row]), int(corpus.starts[row + 1])
        tokens, counted = corpus.tokens[start:end].long(), corpus.counted[start:end]
        rows.append((tokens, [i for i in range(1, len(tokens)) if counted[i]]))
        targets.update(int(tokens[i]) for i in rows[-1][1])
    common = {token for token, _ in sorted(targets.items(), key=lambda item: (-item[1], item[0]))[:50]}
    for tokens, places in rows:
        if not places:
            continue
        got, unedited = run(tokens[None])[0].double(), base(tokens[None])[0].double()
        for i in places:
            target, scores = int(tokens[i]), got[i - 1]
            losses.append(float(F.cross_entropy(scores[None], tokens[i : i + 1])))
            rank = int((scores > scores[target]).sum())
            first.append(rank == 0)
            ten.append(rank < 10)
            if target not in common:
                rare.append(rank == 0)
            p, q = unedited[i - 1].softmax(0), scores.softmax(0)
            kls.append(float((p * (p.log() - q.log())).sum()))
    loss = float(np.mean(losses))
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "top1": float(np.mean(first)),
        "top10": float(np.mean(ten)),
        "top1_rare": float(np.mean(rare)) if rare else math.nan,
        "kl": float(np.mean(kls)),
    }


def likely(name: str, rows: int = 12, seed: int = 0) -> Any:
    """A corpus that the model predicts now and then: some next tokens are the model's own choice."""
    corpus = tiny.corpus([int(n) for n in np.random.default_rng(seed).integers(2, 30, rows)], seed=seed, uncounted=0.15)
    tokens, plain = corpus.tokens.clone(), tiny.hugging_face(name)
    for row in range(corpus.n_rows):
        start, end = int(corpus.starts[row]), int(corpus.starts[row + 1])
        for at in range(start + 1, end, 2):
            best = tiny.logits(plain, tokens[start:at].long()[None])[0, -1].topk(3).indices
            tokens[at] = best[at % 3]
    return replace(corpus, tokens=tokens)


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_metric_equals_brute_force(name: str, batch_size: int) -> None:
    model, corpus = tiny.model(name), likely(name)
    plain, edited = tiny.hugging_face(name), tiny.hugging_face(name)
    selection = selection_of(model, share=0.2)
    for site, chosen in selection.items():
        tiny.zero_rows(edited, name, site, chosen)
    report = evaluate(model, {"c": corpus}, {"cut": Ablate(selection)}, batch_size=batch_size, **QUIET)
    for condition, run in (("base", plain), ("cut", edited)):
        expected = brute(corpus, lambda t, r=run: tiny.logits(r, t), lambda t: tiny.logits(plain, t))
        assert 0 < expected["top1"] < expected["top10"] < 1
        for metric in METRICS:
            assert report[condition, "c", metric].value == pytest.approx(expected[metric], rel=2e-5, abs=2e-6), metric
    assert report["base", "c", "kl"].value == pytest.approx(0, abs=1e-6)
    assert report["cut", "c", "kl"].value > 0.05
    assert 0 < report["base", "c", "top1_rare"].n < report["base", "c", "top1"].n


def test_the_loss_weighs_tokens_not_rows_or_batches() -> None:
    model, corpus = tiny.model("gpt2"), tiny.corpus((2, 50, 3, 30), seed=4)
    report = evaluate(model, {"c": corpus}, {}, batch_size=1, **QUIET)
    plain, per_row = tiny.hugging_face("gpt2"), []
    for row in range(corpus.n_rows):
        tokens = corpus.row(row)[None]
        per_row.append(F.cross_entropy(tiny.logits(plain, tokens)[0, :-1], tokens[0, 1:], reduction="none"))
    assert report["base", "c", "loss"].value == pytest.approx(float(torch.cat(per_row).mean()), rel=1e-5)
    assert report["base", "c", "loss"].value != pytest.approx(
        float(np.mean([float(x.mean()) for x in per_row])), rel=1e-3
    )
    assert report["base", "c", "loss"].n == 85
    assert report["base", "c", "perplexity"].value == pytest.approx(math.exp(report["base", "c", "loss"].value))


@pytest.mark.parametrize("name", tiny.ALL)
def test_the_result_does_not_depend_on_the_batch_size(name: str) -> None:
    model, corpus = tiny.model(name), tiny.corpus((9, 3, 14, 5, 1, 6, 11, 9, 2), uncounted=0.2)
    prune = Ablate(selection_of(model))
    reports = [evaluate(model, {"c": corpus}, {"cut": prune}, batch_size=size, **QUIET) for size in (1, 3, 64)]
    for report in reports[1:]:
        for key, measure in reports[0].measures.items():
            assert report[key].n == measure.n
            assert report[key].value == pytest.approx(measure.value, rel=1e-5, abs=1e-5, nan_ok=True), key
            np.testing.assert_allclose(report[key].draws, measure.draws, rtol=1e-4, atol=1e-5, err_msg=str(key))


def test_constant_logits_earn_what_guessing_earns() -> None:
    model = tiny.build("gpt2")
    with torch.no_grad():
        model.unembed.original_component.weight.zero_()
    assert float(tiny.logits(model).std()) == 0
    report = evaluate(model, {"c": tiny.corpus((30, 20))}, {}, **QUIET)
    assert report["base", "c", "top1"].value == pytest.approx(1 / tiny.VOCABULARY)
    assert report["base", "c", "top10"].value == pytest.approx(10 / tiny.VOCABULARY)
    assert report["base", "c", "loss"].value == pytest.approx(math.log(tiny.VOCABULARY), rel=1e-6)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=14, max_size=14), st.integers(0, 13))
def test_ties_share_the_places_that_are_left(scores: list[float], target: int) -> None:
    logits = torch.tensor([scores])
    out = Outcome(logits, torch.tensor([target]), Outcome(logits, torch.tensor([target]))).table(TABLE)[0]
    above = sum(s > scores[target] for s in scores)
    tied = sum(s == scores[target] for s in scores)
    for column, k in ((1, 1), (2, 10)):
        assert float(out[column]) == pytest.approx(max(0.0, min(1.0, (k - above) / tied)))
    assert float(out[0]) == pytest.approx(float(F.cross_entropy(logits, torch.tensor([target]))), abs=1e-6)
    assert float(out[3]) == pytest.approx(0, abs=1e-6)


@given(st.integers(0, 500))
def test_divergence_equals_torchs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, base = (torch.randn(5, 40, generator=generator) * 4 for _ in range(2))
    target = torch.zeros(5, dtype=torch.long)
    got = Outcome(logits, target, Outcome(base, target)).kl
    expected = F.kl_div(
        logits.double().log_softmax(1), base.double().log_softmax(1), log_target=True, reduction="none"
    ).sum(1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    assert bool((got >= -1e-5).all())


def test_tokens_that_neither_model_can_say_do_not_break_the_divergence() -> None:
    logits = torch.tensor([[1.0, 2.0, float("-inf")]])
    out = Outcome(logits, torch.tensor([0]), Outcome(logits, torch.tensor([0]))).table(TABLE)[0]
    assert bool(torch.isfinite(out).all())
    assert float(out[3]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_logits_are_reported_and_not_averaged_away(value: float) -> None:
    model = tiny.model("gpt2")
    report = evaluate(model, {"c": tiny.corpus((9, 5))}, {"broken": final(value), "fine": None}, **QUIET)
    for metric in METRICS:
        assert math.isnan(report["broken", "c", metric].value), metric
        assert all(math.isnan(x) for x in report["broken", "c", metric].interval())
    assert not math.isnan(report["fine", "c", "loss"].value)
    frame = report.to_frame()
    assert frame[frame.condition == "broken"]["value"].isna().all()


def test_a_single_broken_position_makes_its_metric_nan() -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = float("nan")
    target = torch.zeros(3, dtype=torch.long)
    out = Outcome(logits, target, Outcome(torch.zeros(3, 4), target)).table(TABLE)
    assert out.isnan().any(1).tolist() == [False, True, False]


def test_a_loss_beyond_exp_is_an_infinite_perplexity_without_a_warning() -> None:
    scores = Scores([metric_of("loss")], {"base": [np.array([[2000.0]] * 2)]}, np.ones((2, 1)))
    values = {name: measure.value for _, name, measure in estimates(scores, 5, 0, [metric_of("perplexity")])}
    assert values["perplexity"] == math.inf


# --- conditions --------------------------------------------------------------------------------------------------------------


def test_conditions_do_not_leak_into_one_another_in_any_order() -> None:
    model = tiny.model("llama")
    corpora = {"a": tiny.corpus((9, 5, 12), seed=1), "b": tiny.corpus((4, 20), seed=2)}
    conditions = {
        "one": Ablate(selection_of(model, seed=1)),
        "none": None,
        "two": Ablate(selection_of(model, "attn.z", seed=2), 0.5),
        "both": Ablate(selection_of(model, seed=1)) + Ablate(selection_of(model, "attn.z", seed=2), 0.5),
        "empty": Chain(()),
    }
    whole = evaluate(model, corpora, conditions, **QUIET)
    for names in (list(conditions)[::-1], ["two", "both", "none", "empty", "one"]):
        other = evaluate(model, corpora, {name: conditions[name] for name in names}, **QUIET)
        same_values(whole, other)
    for name, condition in conditions.items():
        same_values(evaluate(model, corpora, {name: condition}, **QUIET), whole)
    for name in ("none", "empty"):
        for corpus in corpora:
            for metric in METRICS:
                one, base = whole[name, corpus, metric], whole["base", corpus, metric]
                assert np.array_equal([one.value, *one.draws], [base.value, *base.draws], equal_nan=True)


def same_values(part: Report, whole: Report) -> None:
    for key, measure in part.measures.items():
        assert np.array_equal(measure.value, whole[key].value, equal_nan=True), key
        assert np.array_equal(measure.draws, whole[key].draws, equal_nan=True), key


def test_the_model_is_as_before_afterwards() -> None:
    from interventions_helpers import unchanged

    model = tiny.model("gpt2")
    with unchanged(model):
        evaluate(model, {"c": tiny.corpus()}, {"cut": Ablate(selection_of(model))}, **QUIET)


def test_inside_a_block_the_base_is_the_model_as_it_acts_there() -> None:
    model, corpus = tiny.model("gpt2"), tiny.corpus()
    prune = Ablate(selection_of(model))
    outside = evaluate(model, {"c": corpus}, {"cut": prune}, **QUIET)
    with prune.on(model):
        inside = evaluate(model, {"c": corpus}, {}, **QUIET)
    assert inside["base", "c", "loss"].value == outside["cut", "c", "loss"].value


def test_replicates_are_averaged_and_their_spread_enters_the_interval() -> None:
    model, corpus = tiny.model("gpt2"), tiny.corpus((20, 20, 20, 20))
    controls = [Ablate(selection_of(model, seed=seed, share=0.4)) for seed in range(4)]
    alone = [
        evaluate(model, {"c": corpus}, {"x": c}, resamples=400, progress=False)["x", "c", "loss"] for c in controls
    ]
    together = evaluate(model, {"c": corpus}, {"x": controls}, resamples=400, progress=False)["x", "c", "loss"]
    assert together.value == pytest.approx(float(np.mean([m.value for m in alone])))
    assert np.var(together.draws) > np.mean([np.var(m.draws) for m in alone])
    assert np.var(together.draws) == pytest.approx(
        np.mean([np.var(m.draws) for m in alone]) + np.var([m.draws.mean() for m in alone]), rel=0.5
    )


@pytest.mark.parametrize(
    ("corpora", "conditions", "error", "message"),
    [
        ({}, {}, LensUnlearnError, "there is no corpus to evaluate on"),
        ({"c": tiny.corpus()}, {"base": final(0.0)}, LensUnlearnError, "the condition 'base' is the unedited model"),
        ({"c": tiny.corpus()}, {"x": 3}, LensUnlearnError, "the condition 'x' is no intervention"),
        ({"c": tiny.corpus()}, {"x": []}, LensUnlearnError, "the condition 'x' is no intervention"),
        ({"c": tiny.corpus()}, {"x": ["a"]}, LensUnlearnError, "the condition 'x' is no intervention"),
        ({"c": tiny.corpus((1, 1), bos=False)}, {}, CorpusError, "nothing in tiny can be predicted"),
        ({"c": tiny.corpus(tokens=[5000])}, {}, CorpusError, "beyond this model's vocabulary"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(corpora: Any, conditions: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(tiny.model("gpt2"), corpora, conditions, **QUIET)


def test_base_may_be_named_and_is_measured_once() -> None:
    report = evaluate(tiny.model("gpt2"), {"c": tiny.corpus()}, {"base": None}, **QUIET)
    assert report.conditions == ["base"]


def test_training_mode_and_other_models_are_refused() -> None:
    model = tiny.build("gpt2")
    model.train()
    with pytest.raises(ModelError, match="training mode"):
        evaluate(model, {"c": tiny.corpus()}, {}, **QUIET)
    with pytest.raises(ModelError, match="no hook points"):
        evaluate(tiny.hugging_face("gpt2"), {"c": tiny.corpus()}, {}, **QUIET)
    with pytest.raises(SelectionError):
        evaluate(
            tiny.model("gpt2"), {"c": tiny.corpus()}, {"x": Ablate(NeuronMap({POST[0]: torch.ones(9) > 0}))}, **QUIET
        )


# --- intervals ---------------------------------------------------------------------------------------------------------------


def simulated(documents: int, seed: int = 0, mean: float = 2.0) -> Scores:
    random = np.random.default_rng(seed)
    counts = random.integers(5, 50, documents)[:, None].astype(float)
    per_document = random.normal(mean, 1.0, documents)
    return Scores([metric_of("loss")], {"base": [per_document[:, None] * counts]}, counts)


def width(scores: Scores, seed: int = 0) -> float:
    measure = next(m for _, name, m in estimates(scores, 600, seed) if name == "loss")
    low, high = measure.interval()
    assert low <= measure.value <= high
    return high - low


def test_intervals_narrow_with_the_root_of_the_number_of_documents() -> None:
    widths = [np.mean([width(simulated(n, seed)) for seed in range(12)]) for n in (25, 100, 400)]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.2)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.2)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    hits = 0
    for seed in range(120):
        measure = next(m for _, name, m in estimates(simulated(60, seed), 300, 0) if name == "loss")
        low, high = measure.interval()
        hits += low <= 2.0 <= high
    assert 0.86 <= hits / 120 <= 1.0


def test_the_bootstrap_is_seeded_and_touches_no_global_state() -> None:
    sums = simulated(30)
    first, again, other = ({(c, m): x.draws for c, m, x in estimates(sums, 100, seed)} for seed in (0, 0, 1))
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not np.array_equal(first["base", "loss"], other["base", "loss"])
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    list(estimates(sums, 10, 0))
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_a_draw_is_the_ratio_of_weighted_sums() -> None:
    sums = simulated(12)
    part, counts = sums.values["base"][0][:, 0], sums.counts[:, 0]
    measure = next(m for _, name, m in estimates(sums, 50, 3) if name == "loss")
    weights = weights_of([str(i) for i in range(12)], 50, 3)
    for draw, weight in zip(measure.draws, weights, strict=True):
        ratio = sum(w * x for w, x in zip(weight, part, strict=True)) / sum(
            w * n for w, n in zip(weight, counts, strict=True)
        )
        assert draw == pytest.approx(measure.value + widening(counts) * (ratio - measure.value))
    assert measure.units == 12


def test_groups_are_resampled_whole_and_alike_in_every_corpus() -> None:
    """Two corpora that share a unit are drawn jointly; of equally many others the weights are independent."""
    sums = simulated(40)
    groups = [f"author {i // 4}" for i in range(40)]
    one = next(iter(estimates(replace(sums, units=groups), 400, 0)))[2]
    by_hand = Scores(
        sums.metrics, {"base": [sums.values["base"][0].reshape(10, 4).sum(1)[:, None]]},
        sums.counts.reshape(10, 4).sum(1)[:, None], [f"author {i}" for i in range(10)],
    )  # fmt: skip
    together = next(iter(estimates(by_hand, 400, 0)))[2]
    assert (one.units, together.units) == (10, 10)
    np.testing.assert_allclose(one.draws, together.draws)
    other = next(iter(estimates(replace(sums, units=[f"other {i}" for i in range(40)]), 400, 0)))[2]
    assert abs(np.corrcoef(one.draws, other.draws)[0, 1]) < 0.2


def replicates_of(values: np.ndarray, units: int = 200) -> Scores:
    """Several interventions of which every document scores the same."""
    counts = np.ones((units, 1))
    return Scores([metric_of("loss")], {"control": [np.full((units, 1), float(v)) for v in values]}, counts)


def test_of_several_seeds_the_interval_is_students_of_their_mean() -> None:
    values = np.array([1.0, 1.5, 2.5, 1.2, 1.9])
    measure = next(iter(estimates(replicates_of(values), 20_000, 1)))[2]
    assert measure.value == pytest.approx(values.mean())
    expected = t.interval(0.95, 4, values.mean(), values.std(ddof=1) / 5**0.5)
    assert measure.interval() == pytest.approx(expected, abs=0.05)
    one_more = measure.beside_another()
    expected = t.interval(0.95, 4, values.mean(), values.std(ddof=1) * (1 + 1 / 5) ** 0.5)
    assert one_more.interval() == pytest.approx(expected, abs=0.1)


def test_seeds_are_drawn_once_for_all_corpora() -> None:
    """A control whose selectivity is exactly 0 at every seed has an interval of no width."""
    measures = {}
    for corpus in ("forget", "retain"):
        base = Scores([metric_of("top1")], {BASE: [np.full((30, 1), 0.8)]}, np.ones((30, 1)))
        control = replace(base, values={**base.values, "c": [np.full((30, 1), v) for v in (0.1, 0.4, 0.7)]})
        control = replace(control, units=[f"{corpus} {i}" for i in range(30)])
        measures |= {(c, corpus, m): one for c, m, one in estimates(control, 500, 0)}
    report = Report(measures)
    assert report.drop("c", "forget").interval()[1] - report.drop("c", "forget").interval()[0] > 0.5
    assert report.selectivity("c").interval() == pytest.approx((0, 0), abs=1e-9)


def test_what_nobody_showed_is_still_uncertain() -> None:
    """0 of 40 right: not [0, 0] but Jeffreys' interval."""
    none = Scores([metric_of("exact_match")], {"cut": [np.zeros((40, 1))]}, np.ones((40, 1)))
    low, high = next(iter(estimates(none, 4000, 0)))[2].interval()
    assert low < 0.001
    assert high == pytest.approx(beta.ppf(0.975, 0.5, 40.5), rel=0.1)
    every = replace(none, values={"cut": [np.ones((40, 1))]})
    assert next(iter(estimates(every, 4000, 0)))[2].interval() == pytest.approx((1 - high, 1 - low))


def test_documents_are_resampled_whole() -> None:
    """One document in many rows has no interval; the same rows as many documents have one."""
    model, corpus = tiny.model("gpt2"), tiny.corpus((9, 5, 12, 7, 6, 8, 4, 5, 9, 6))
    single = replace(corpus, document=torch.zeros(10, dtype=torch.long), keys=("one",))
    many, one = (evaluate(model, {"c": c}, {}, **QUIET)["base", "c", "loss"] for c in (corpus, single))
    assert many.value == pytest.approx(one.value, rel=1e-9)
    assert not math.isnan(many.interval()[0])
    assert all(math.isnan(x) for x in one.interval())


# --- reports -----------------------------------------------------------------------------------------------------------------


def test_the_largest_gap_of_a_sweep_is_corrected_for_the_choice() -> None:
    """Eight strengths without selectivity: the gap is 0 on average, and the interval leaves it out rarely."""
    random, names = np.random.default_rng(4), [f"m@{i}" for i in range(8)]
    gaps, plain, missed = [], [], 0
    for _ in range(120):
        measures = {}
        for corpus in ("forget", "retain"):
            noise = np.cumsum(random.normal(0, 0.02, (8, 1)), axis=0)  # neighbouring strengths move together
            drawn = noise + np.cumsum(random.normal(0, 0.02, (8, 300)), axis=0)
            measures[BASE, corpus, "top1"] = Measure(1.0, np.ones(300), 100, units=40)
            for name, value, draws in zip(names, noise[:, 0], drawn, strict=True):
                measures[name, corpus, "top1"] = Measure(0.5 + value, 0.5 + draws, 100, units=40)
        report = Report(measures)
        found = separability(report)
        gaps.append(found.gap)
        plain.append(report.selectivity(found.at).value)
        missed += not found.gap_low <= 0 <= found.gap_high
    assert missed / 120 < 0.1
    assert abs(np.median(gaps)) < 0.3 * np.median(plain)
    few = replace(report, measures={key: replace(one, units=5) for key, one in report.measures.items()})
    assert "too few documents for an interval (5)" in repr(separability(few))


def small_report() -> Report:
    model = tiny.model("gpt2")
    corpora = {"forget": tiny.corpus((9, 5, 12) * 4, seed=1), "retain": tiny.corpus((4, 20) * 5, seed=2)}
    return evaluate(model, corpora, {"cut": Ablate(selection_of(model))}, **QUIET)


def test_the_frame_is_tidy_and_differences_are_paired() -> None:
    report = small_report()
    frame = report.to_frame()
    columns = [
        "condition",
        "corpus",
        "metric",
        "value",
        "low",
        "high",
        "n",
        "difference",
        "difference_low",
        "difference_high",
        "units",
    ]
    assert list(frame.columns) == columns
    assert len(frame) == 2 * 2 * 6
    assert list(frame.condition[:12]) == ["base"] * 12
    row = frame[(frame.condition == "cut") & (frame.corpus == "forget") & (frame.metric == "loss")].iloc[0]
    cut, base = report["cut", "forget", "loss"], report["base", "forget", "loss"]
    assert row.value == cut.value
    assert (row.low, row.high) == cut.interval()
    assert row.difference == cut.value - base.value
    paired = np.quantile(cut.draws - base.draws, [0.025, 0.975])
    assert (row.difference_low, row.difference_high) == (pytest.approx(paired[0]), pytest.approx(paired[1]))
    unpaired = (cut.draws.var() + base.draws.var()) ** 0.5
    assert (cut.draws - base.draws).std() < unpaired


def test_asking_for_what_was_not_measured_lists_what_was() -> None:
    with pytest.raises(
        LensUnlearnError, match="conditions are base, cut; corpora forget, retain; metrics loss, perplexity, top1"
    ):
        small_report()["cut", "forget", "top5"]


def test_drops_and_selectivity_are_shares_of_the_base() -> None:
    def measure(value: float) -> Measure:
        return Measure(value, np.array([value, value * 1.1]), 10)

    report = Report(
        {
            ("base", "forget", "top1"): measure(0.5),
            ("base", "retain", "top1"): measure(0.4),
            ("cut", "forget", "top1"): measure(0.1),
            ("cut", "retain", "top1"): measure(0.38),
        }
    )
    assert report.drop("cut", "forget").value == pytest.approx(0.8)
    assert report.drop("cut", "retain").value == pytest.approx(0.05)
    assert report.selectivity("cut").value == pytest.approx(0.75)
    np.testing.assert_allclose(report.selectivity("cut").draws, [0.75, 0.75])
    zero = Report({("base", "c", "top1"): measure(0.0), ("cut", "c", "top1"): measure(0.0)})
    assert math.isnan(zero.drop("cut", "c").value)


def test_a_corpus_of_one_document_has_no_interval_and_breaks_nothing() -> None:
    model = tiny.model("gpt2")
    corpora = {"forget": tiny.corpus((40,), seed=1), "retain": likely("gpt2", 5)}
    report = evaluate(model, corpora, {"cut": Ablate(selection_of(model))}, **QUIET)
    for metric in ("top10", "loss"):
        measure = report.selectivity("cut", metric=metric)
        assert all(math.isnan(x) for x in measure.interval())
    report.to_frame()
    separability(report, metric="top10")
    assert "[too few documents for an interval (1)]" in repr(report)
    assert "nan" not in repr(report)


def test_reports_of_the_same_texts_join_and_others_do_not() -> None:
    model = tiny.model("gpt2")
    corpora = {"c": tiny.corpus((9, 5, 12), seed=1)}
    one, two = (
        evaluate(model, corpora, {n: Ablate(selection_of(model, seed=s))}, **QUIET) for n, s in (("x", 1), ("y", 2))
    )
    assert math.isnan(one["base", "c", "top1_rare"].value), "so few tokens that none is rare: this must not hinder"
    joined = one + two
    assert joined.conditions == ["base", "x", "y"]
    assert joined["y", "c", "loss"] is two["y", "c", "loss"]
    other = evaluate(model, {"c": tiny.corpus((9, 5, 12), seed=7)}, {"z": None}, **QUIET)
    with pytest.raises(LensUnlearnError, match="on other texts or resamples"):
        _ = one + other


def test_an_earlier_base_saves_its_runs_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    corpora = {"a": tiny.corpus((9, 5, 12), seed=1), "b": tiny.corpus((30, 8), seed=2)}
    edit = Ablate(selection_of(model, seed=1))
    whole, base = evaluate(model, corpora, {"x": edit}, **QUIET), evaluate(model, corpora, {}, **QUIET)
    runs: list[int] = []
    predict = evaluating.predict
    monkeypatch.setattr(evaluating, "predict", lambda m, batch, **more: runs.append(1) or predict(m, batch, **more))
    saved = evaluate(model, corpora, {"x": edit, "none": None}, base=base, **QUIET)
    assert len(runs) == 4, "two corpora of a batch each, under two conditions, and no base beside them"
    assert saved.conditions == ["base", "x", "none"]
    assert "kl" not in saved.metrics
    for corpus in corpora:
        for metric in METRICS[:-1]:
            for condition, twin in (("base", "base"), ("x", "x"), ("none", "base")):
                got, expected = saved[condition, corpus, metric], whole[twin, corpus, metric]
                np.testing.assert_array_equal(got.draws, expected.draws)
                np.testing.assert_equal(got.value, expected.value)
    assert (base + saved).conditions == saved.conditions


def test_a_base_of_something_else_is_refused() -> None:
    model, corpora = tiny.model("gpt2"), {"a": tiny.corpus((9, 5, 12), seed=1)}
    base = evaluate(model, corpora, {}, **QUIET)
    with pytest.raises(LensUnlearnError, match="not of this model"):
        evaluate(tiny.model("opt"), corpora, {}, base=base, **QUIET)
    for other in ({"a": tiny.corpus((9, 5, 12), seed=2)}, {"b": corpora["a"]}):
        with pytest.raises(LensUnlearnError, match="not of the corpus"):
            evaluate(model, other, {}, base=base, **QUIET)
    with pytest.raises(LensUnlearnError, match="other resamples"):
        evaluate(model, corpora, {}, base=base, progress=False, resamples=50, seed=1)


def test_csv_is_written_whole_and_formulas_are_quoted(tmp_path: Path) -> None:
    import pandas as pd

    report = small_report()
    report.to_csv(tmp_path / "m.csv")
    again = pd.read_csv(tmp_path / "m.csv")
    pd.testing.assert_frame_equal(again, report.to_frame(), check_dtype=False)
    evil = Report({("=cmd()", "+x", "loss"): report["base", "forget", "loss"]})
    evil.to_csv(tmp_path / "e.csv")
    text = (tmp_path / "e.csv").read_text()
    assert "'=cmd()" in text
    assert "'+x" in text


def test_reports_show_themselves_and_their_provenance() -> None:
    report = small_report()
    assert repr(report).startswith("Report(2 conditions, 2 corpora)")
    assert "<table" in report._repr_html_()
    assert report.provenance["bootstrap"] == {"resamples": 50, "seed": 0}
    assert report.provenance["corpora"]["forget"]["tokens"] == 4 * 26
    assert report.provenance["conditions"]["cut"].startswith("Ablate(zero")
    assert {"torch", "transformer_lens", "lens_unlearn"} <= set(report.provenance["versions"])


def test_a_measure_shows_its_value_and_interval_and_not_its_draws() -> None:
    assert repr(Measure(0.25, np.linspace(0, 1, 1001), 6000)) == "Measure(0.250 [0.025, 0.975], n=6,000)"
    assert repr(Measure(0.25, np.empty(0), 10)) == "Measure(0.250 [no interval], n=10)"
    few = Measure(0.25, np.linspace(0, 1, 11), 10, units=9)
    assert repr(few) == "Measure(0.250 [too few documents for an interval (9)], n=10)"
    assert few.interval()[0] != few.interval()[0]


# --- separability --------------------------------------------------------------------------------------------------------------


def sweep_report(points: list[tuple[float, float]]) -> Report:
    """Conditions p1, p2, ... with (forget, retain) performance; the first point is the base."""
    measures = {}
    for number, (x, y) in enumerate(points):
        name = "base" if number == 0 else f"p{number}"
        for corpus, value in (("forget", x), ("retain", y)):
            measures[name, corpus, "top1"] = Measure(value, np.full(3, value), 10)
    return Report(measures)


def test_a_straight_line_is_one_a_perfect_separation_two_and_the_wrong_way_nothing() -> None:
    straight = [(0.8 * t, 0.5 * t) for t in (1, 0.75, 0.5, 0.25, 0)]
    assert separability(sweep_report(straight)).area == pytest.approx(1)
    assert separability(sweep_report([(0.8, 0.5), (0.4, 0.5), (0.0, 0.5), (0.0, 0.0)])).area == pytest.approx(2)
    assert separability(sweep_report([(0.8, 0.5), (0.8, 0.2), (0.8, 0.0), (0.0, 0.0)])).area == pytest.approx(0)
    assert separability(sweep_report([(0.8, 0.5), (0.0, 0.5)])).area == pytest.approx(2)


def test_the_axes_are_forget_and_retain_whatever_their_order() -> None:
    report = sweep_report([(0.8, 0.5), (0.2, 0.45), (0.1, 0.3), (0.0, 0.0)])
    turned = Report(dict(reversed(report.measures.items())))
    one = separability(report)
    other = separability(turned, conditions=["p1", "p2", "p3"])
    assert (one.area, one.gap, one.at) == (other.area, other.gap, other.at)
    exchanged = separability(report, forget="retain", retain="forget")
    assert one.area > 1 > exchanged.area
    assert one.area + exchanged.area == pytest.approx(2), "the two areas fill the rectangle"


def test_the_gap_is_the_largest_difference_of_drops() -> None:
    found = separability(sweep_report([(0.8, 0.5), (0.4, 0.475), (0.2, 0.4), (0.0, 0.0)]))
    assert found.at == "p2"
    assert found.gap == pytest.approx((1 - 0.2 / 0.8) - (1 - 0.4 / 0.5))
    assert (found.gap_low, found.gap_high) == (pytest.approx(found.gap), pytest.approx(found.gap))
    assert repr(found) == "Separability(forget lost less retain lost: 55.0% [55.0%, 55.0%] at p2; area 1.61)"


def test_a_report_without_a_sweep_is_refused() -> None:
    with pytest.raises(LensUnlearnError, match="no condition besides the base"):
        separability(sweep_report([(0.8, 0.5)]))


def test_the_ablated_model_in_the_report_is_the_ablated_model() -> None:
    model, corpus = tiny.model("gpt2"), tiny.corpus((30,))
    prune = Ablate(selection_of(model))
    tokens = corpus.row(0)[None]
    loss = F.cross_entropy(under(model, prune, tokens)[0, :-1], tokens[0, 1:])
    report = evaluate(model, {"c": corpus}, {"cut": prune}, **QUIET)
    assert report["cut", "c", "loss"].value == pytest.approx(float(loss), rel=1e-6)


# --- abstained -----------------------------------------------------------------------------------------------------------


def silent_at(model: Any, corpus: Any, rows: list[int]) -> Chain:
    """Abstain from the prompts of some rows, and from no others."""
    return Chain(tuple(Abstain({LAST: around(key_of(model, corpus.prompt(row).tolist()))}) for row in rows))


@pytest.mark.parametrize("name", ["gpt2", "llama", *tiny.HOOKED[:1]])
def test_an_abstained_rows_tokens_are_predicted_by_chance_and_the_others_as_ever(name: str) -> None:
    model = tiny.speaking(name)
    corpus = tiny.corpus([12, 20, 9, 30, 15, 18]).with_prompts(seed=1)
    silent = [0, 3]
    report = evaluate(model, {"c": corpus}, {"silent": silent_at(model, corpus, silent)}, batch_size=3, **QUIET)
    assert report["silent", "c", "abstained"].value == pytest.approx(2 / 6)
    assert report["silent", "c", "abstained"].n == 6
    assert report["base", "c", "abstained"].value == 0
    counts = [int(corpus.counted[int(a) : int(b)].sum()) for a, b in zip(corpus.starts[:-1], corpus.starts[1:])]
    losses = []
    for row in range(corpus.n_rows):
        alone = evaluate(model, {"c": corpus.only([row])}, {}, **QUIET)
        losses.append(alone["base", "c", "loss"].value)
    expected = [math.log(tiny.VOCABULARY) if row in silent else losses[row] for row in range(6)]
    total = sum(n * loss for n, loss in zip(counts, expected)) / sum(counts)
    assert report["silent", "c", "loss"].value == pytest.approx(total, abs=1e-4)
    assert report["base", "c", "loss"].value == pytest.approx(
        sum(n * loss for n, loss in zip(counts, losses)) / sum(counts), abs=1e-5
    )


def test_all_rows_abstained_lose_what_chance_loses() -> None:
    model = tiny.speaking("gpt2")
    corpus = tiny.corpus([12, 20, 9]).with_prompts(seed=1)
    act = Abstain({LAST: everywhere(model)})
    written = corpus.tokens.clone()
    written[written == tiny.EOS] = 7
    ending = written.clone()
    ending[corpus.starts[1:] - 1] = tiny.EOS  # the last token of each row, of 12, 20 and 9 less their prompts
    n, v, ahead = corpus.n_tokens, tiny.VOCABULARY, 1e-3
    total = v - 1 + math.exp(ahead)
    chance: dict[str, float]
    for speaks, tokens, ends in ((True, written, 0), (True, ending, 3), (False, ending, 3)):
        model, given = (tiny.speaking if speaks else tiny.model)("gpt2"), replace(corpus, tokens=tokens)
        report = evaluate(model, {"c": given}, {"silent": act}, **QUIET)
        share = ends / n
        if speaks:  # the end-of-text token is ahead of all others, which share the places behind it
            loss = math.log(total) - ahead * share
            chance = {"top1": share, "top10": share + (1 - share) * 9 / (v - 1), "loss": loss}
        else:  # no end-of-text token is known: all tie
            chance = {"top1": 1 / v, "top10": 10 / v, "loss": math.log(v)}
        base = [
            tiny.logits(model, given.row(i)[None])[0, int(given.counted[a:b].int().argmax()) - 1 : -1].double()
            for i, (a, b) in enumerate(zip(corpus.starts[:-1], corpus.starts[1:]))
        ]
        base_p = torch.cat(base).softmax(-1)
        told = math.log(total) - ahead * base_p[:, tiny.EOS] if speaks else math.log(v)
        chance["kl"] = float((told + (base_p * base_p.log()).sum(-1)).mean())
        chance |= {"abstained": 1, "perplexity": math.exp(chance["loss"])}
        for metric, value in chance.items():
            assert report["silent", "c", metric].value == pytest.approx(value, rel=1e-5), (metric, speaks, ends)


def test_rows_without_prompts_are_judged_at_their_last_token_whatever_stands_in_the_padding() -> None:
    model = tiny.speaking("gpt2")
    texts = tiny.corpus([12, 20, 9, 30])
    act = Abstain({LAST: around(key_of(model, texts.row(2).tolist()))})
    for size in (1, 2, 64):
        report = evaluate(model, {"c": texts}, {"silent": act}, batch_size=size, **QUIET)
        assert report["silent", "c", "abstained"].value == 1 / 4
        for metric in ("loss", "top1", "kl"):  # nothing is predicted from there on, and nothing before it is changed
            expected = 0 if metric == "kl" else report["base", "c", metric].value
            assert report["silent", "c", metric].value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("vocabulary", [50, 255, 256, 700, 5000])
@pytest.mark.parametrize("kind", ["apart", "ties", "constant", "minus infinity"])
def test_a_targets_place_is_that_of_counting_all_logits(vocabulary: int, kind: str) -> None:
    """The largest of each block decides whether a block is looked at: for vocabularies that blocks fill and do not."""
    random = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(40, vocabulary, generator=random)
    logits = {"ties": (3 * logits).round(), "constant": torch.zeros_like(logits)}.get(kind, logits)
    if kind == "minus infinity":
        logits[:, ::2] = float("-inf")
    best = logits.argsort(1, descending=True)[:20, :12]
    target = torch.cat(
        [best[torch.arange(20), torch.arange(20) % 12], torch.randint(0, vocabulary, (20,), generator=random)]
    )
    own = logits.gather(1, target[:, None])
    above, equal = (logits > own).sum(1), (logits == own).sum(1)
    got = Outcome(logits, target)
    for places, found in ((1, got.top1), (10, got.top10)):
        torch.testing.assert_close(found, ((places - above) / equal).clamp(0, 1))
    assert torch.equal(got.right.bool(), (above == 0) & (equal == 1))


def lost(found: np.ndarray, size: np.ndarray, seed: int = 0, draws: int = 4000) -> Measure:
    """The share that is lost where a detector finds some documents, and whoever is found loses everything."""
    right = size[:, None]
    values = {BASE: [0.5 * right], "edit": [0.5 * right * ~found[:, None]]}
    units = [f"{seed} {i}" for i in range(len(size))]
    scores = Scores([metric_of("top1")], values, right, units)
    made = estimates(scores, draws, seed, judging={"edit"}, name="c")
    return Report({(condition, "c", metric): one for condition, metric, one in made}).drop("edit", "c")


@pytest.mark.parametrize("found", [0, 1, 10, 39, 40])
def test_of_documents_that_a_detector_finds_the_share_lost_has_the_interval_of_jeffreys(found: int) -> None:
    drop = lost(np.arange(40) < found, np.full(40, 30.0))
    assert drop.value == pytest.approx(found / 40)
    expected = beta.ppf([0.025, 0.975], found + 0.5, 40.5 - found)
    assert drop.interval() == pytest.approx(expected, abs=0.02), "Student's widening of 40 units is a little on top"
    if 0 < found < 40:
        assert drop.interval()[1] - drop.interval()[0] >= expected[1] - expected[0]


@pytest.mark.parametrize(("n", "share"), [(50, 0.02), (30, 0.9), (40, 0.3)])
def test_what_a_detector_costs_is_in_its_interval_as_often_as_that_says(n: int, share: float) -> None:
    random, runs, held = np.random.default_rng(n), 300, 0
    for run in range(runs):
        drop = lost(random.random(n) < share, np.exp(random.normal(4, 0.5, n)).round(), run, 300)
        low, high = drop.interval()
        held += low <= share <= high
    assert held / runs >= 0.92


def test_only_what_acts_on_whole_texts_may_take_one_that_was_not_seen() -> None:
    model = tiny.model("gpt2")
    corpora = {"c": tiny.corpus([9] * 20, seed=4).with_prompts(4)}
    nothing = Abstain({LAST: around(torch.full((int(model.cfg.d_mlp),), 1e4))})
    first = Abstain({Site(0, LAST.kind): around(torch.full((int(model.cfg.d_mlp),), 1e4))})
    behind = Ablate(NeuronMap({LAST: torch.ones(int(model.cfg.d_mlp), dtype=torch.bool)}))
    conditions = {"silent": nothing, "gated": When(first, behind), "several": [nothing, first], "none": Chain(())}
    report = evaluate(model, corpora, conditions, progress=False)
    for metric in ("top1", "top10"):
        if not report[BASE, "c", metric].value:
            continue
        upper = beta.ppf(0.975, 0.5, 20.5)
        for name in ("silent", "gated", "several"):
            drop = report.drop(name, "c", metric)
            assert drop.value == 0
            assert drop.interval()[0] == pytest.approx(0, abs=1e-3)
            assert drop.interval()[1] == pytest.approx(upper, rel=0.1)
            assert drop.seen is not None
            np.testing.assert_allclose(drop.seen, 0, atol=1e-12)
        assert report.drop("none", "c", metric).interval() == (0, 0)
    assert report["silent", "c", "top10"].interval() != report["gated", "c", "top10"].interval(), "each for itself"
    given = evaluate(model, corpora, conditions, base=evaluate(model, corpora, {}, progress=False), progress=False)
    np.testing.assert_array_equal(given["silent", "c", "top10"].draws, report["silent", "c", "top10"].draws)


def test_the_batch_size_and_other_conditions_do_not_matter_to_who_abstains() -> None:
    model = tiny.speaking("gpt2")
    corpora = {"a": tiny.corpus([12, 20, 9, 30, 15]).with_prompts(seed=1), "b": tiny.corpus([9, 8, 7], seed=5)}
    act = silent_at(model, corpora["a"], [1, 4])
    prune = Ablate(selection_of(model))
    base = evaluate(model, corpora, {"silent": act}, batch_size=1, **QUIET)
    several = {"pruned": prune, "other": silent_at(model, corpora["a"], [0]), "silent": act, "twice": act + act}
    for size in (2, 64):
        report = evaluate(model, corpora, several, batch_size=size, **QUIET)
        for name in ("a", "b"):
            for metric in ("loss", "abstained", "top10"):
                expected = base["silent", name, metric].value
                assert report["silent", name, metric].value == pytest.approx(expected, abs=1e-5)
                assert report["twice", name, metric].value == pytest.approx(expected, abs=1e-5)
            assert report["pruned", name, "abstained"].value == 0
            assert report["base", name, "abstained"].value == 0
        assert report["other", "a", "abstained"].value == pytest.approx(1 / 5)
    report = evaluate(model, corpora, {"pruned": prune}, **QUIET)
    with pytest.raises(LensUnlearnError, match="abstained'. was not measured"):
        report["pruned", "a", "abstained"]


def test_inside_a_block_everything_is_measured_with_it_and_the_block_goes_on_as_before() -> None:
    model = tiny.speaking("gpt2")
    corpus = tiny.corpus([12, 20, 9, 30]).with_prompts(seed=1)
    prompt = corpus.prompt(1)[None]
    with silent_at(model, corpus, [1]).on(model) as live:
        report = evaluate(model, {"c": corpus}, {"more": silent_at(model, corpus, [2])}, **QUIET)
        tiny.logits(model, prompt)
        assert live.abstained.tolist() == [True], "judged at its own end, not at that of the last batch"
        tiny.logits(model, corpus.row(1)[None])
        assert live.abstained.tolist() == [False]
    assert report["base", "c", "abstained"].value == 1 / 4
    assert report["more", "c", "abstained"].value == 2 / 4
    outside = evaluate(model, {"c": corpus}, {"both": silent_at(model, corpus, [1, 2])}, **QUIET)
    assert report["more", "c", "loss"].value == pytest.approx(outside["both", "c", "loss"].value, abs=1e-6)


def test_the_share_that_abstains_has_an_interval_over_documents() -> None:
    model = tiny.speaking("gpt2")
    corpus = tiny.corpus([9] * 40).with_prompts(seed=1)
    act = silent_at(model, corpus, list(range(0, 40, 4)))
    report = evaluate(model, {"c": corpus}, {"silent": act}, resamples=400, progress=False)
    measure = report["silent", "c", "abstained"]
    assert measure.value == pytest.approx(0.25)
    low, high = measure.interval()
    assert 0.08 < low < 0.2
    assert 0.3 < high < 0.45


def test_a_batch_without_room_is_halved_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, corpus = tiny.model("gpt2"), tiny.corpus((9, 3, 14, 5, 6, 11), uncounted=0.2)
    conditions = {"x": Ablate(selection_of(model))}
    options: dict[str, Any] = {"batch_size": 6, "resamples": 10, "progress": False}
    expected = evaluate(model, {"a": corpus}, conditions, **options)
    real, seen = evaluating.predict, []

    def predict(model: Any, batch: Any, **more: Any) -> Any:
        seen.append(batch.tokens.numel())
        if len(seen) > 1 and batch.tokens.numel() > 30:  # the unedited model goes through, and then there is no room
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch, **more)

    monkeypatch.setattr(evaluating, "predict", predict)
    got = evaluate(model, {"a": corpus}, conditions, **options)
    assert max(seen) > 30
    assert list(got.measures) == list(expected.measures)
    for key, measure in expected.measures.items():
        assert got.measures[key].n == measure.n
        assert got.measures[key].value == pytest.approx(measure.value, rel=1e-5, abs=1e-7, nan_ok=True)
    assert got.provenance["batches cut for lack of memory"] == {"a": 1}
    assert "batches cut for lack of memory" not in expected.provenance


@pytest.mark.parametrize("each", ["gpt2", "llama", "gemma3", "opt", "gpt2-compat", "native-llama", *tiny.HOOKED[:1]])
def test_what_begins_in_a_higher_layer_does_not_run_those_below_again(
    each: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever runs from a layer on has the numbers of a whole pass, and the blocks below are skipped."""
    model, corpus = tiny.model(each), tiny.corpus((9, 5, 12), seed=1)
    last = {site: chosen for site, chosen in selection_of(model, seed=1).items() if site.layer == 1}
    edits = {"all": Ablate(selection_of(model, seed=1)), "last": Ablate(NeuronMap(last)), "nothing": Chain(())}
    starts: list[int] = []
    real = evaluating.predict
    monkeypatch.setattr(evaluating, "_replay", {})
    monkeypatch.setattr(evaluating, "predict", lambda *a, **k: starts.append(k.get("start", 0)) or real(*a, **k))
    report = evaluate(model, {"c": corpus}, edits, **QUIET)
    assert starts == [0, 2, 0, 1, 2], "the unedited model, twice where that is tried; then all, last, nothing"
    monkeypatch.setattr(evaluating, "_prefix", lambda *_: None)
    whole = evaluate(model, {"c": corpus}, edits, **QUIET)
    for key, measure in whole.measures.items():
        assert report.measures[key].value == pytest.approx(measure.value, rel=1e-5, abs=1e-6, nan_ok=True)
    assert report["nothing", "c", "kl"].value == pytest.approx(0, abs=1e-6)
    assert report["last", "c", "kl"].value > 1e-6


def test_a_model_whose_blocks_pass_on_more_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, corpus = tiny.model("llama"), tiny.corpus((9, 5, 12), seed=1)
    monkeypatch.setattr(evaluating, "_replay", {})
    real = evaluating.predict

    def other(model: Any, batch: Any, **options: Any) -> Any:
        found = real(model, batch, **options)
        return replace(found, hidden=found.hidden + 1) if options.get("start") else found

    last = {site: chosen for site, chosen in selection_of(model, seed=1).items() if site.layer == 1}
    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "predict", other)
        report = evaluate(model, {"c": corpus}, {"last": Ablate(NeuronMap(last))}, **QUIET)
    assert evaluating._replay[model] is False
    whole = evaluate(model, {"c": corpus}, {"last": Ablate(NeuronMap(last))}, **QUIET)
    for key, measure in whole.measures.items():
        np.testing.assert_equal(report.measures[key].value, measure.value)
