"""evaluate(deal=True): controls that share the documents; values equal a run of each alone, and intervals hold."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from interventions_helpers import selection_of
from positions_helpers import LAST, around
from scipy.stats import t

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.bootstrap import Scores, estimates
from lens_unlearn.evaluation.evaluate import _dealt, evaluate
from lens_unlearn.evaluation.metrics import metric as metric_of
from lens_unlearn.evaluation.report import BASE, Report
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.model.hooks import attach, detach_all
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons.maps import NeuronMap

QUIET: dict[str, Any] = {"progress": False, "resamples": 200}
METRICS = ("loss", "top1", "top10", "top1_rare", "kl")


def corpus_of(rows: int = 23, *, grouped: bool = False) -> Any:
    corpus = tiny.corpus([int(n) for n in np.random.default_rng(5).integers(9, 30, rows)], seed=5, uncounted=0.1)
    groups = tuple(f"g{number // 2}" for number in range(corpus.n_documents))
    return replace(corpus, groups=groups) if grouped else corpus


def controls(model: Any, count: int = 3) -> list[Ablate]:
    """Ablations that begin in different layers, so that some are replayed from a layer on."""
    parts = []
    for seed in range(count):
        selection = selection_of(model, "mlp.post", share=0.5, seed=seed)
        first = seed % 2
        parts.append(Ablate(NeuronMap({s: selection[s] for s in selection if s.layer >= first})))
    return parts


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", *tiny.HOOKED[:1]])
def test_each_document_is_read_under_the_control_that_it_was_dealt(name: str, grouped: bool) -> None:
    model, corpus = tiny.speaking(name), corpus_of(grouped=grouped)
    edits = controls(model)
    report = evaluate(model, {"c": corpus}, {"x:control": edits, "x": edits[0]}, deal=True, batch_size=4, **QUIET)
    of = _dealt(corpus, 3, 0)
    sums, tokens = Counter[str](), 0
    differences, shares = [], []
    for number, edit in enumerate(edits):
        own = corpus.only([int(document) for document in np.flatnonzero(of == number)])
        alone = evaluate(model, {"c": own}, {"x": edit}, **QUIET)
        n = alone["x", "c", "loss"].n
        tokens += n
        shares.append(n)
        sums.update({metric: alone["x", "c", metric].value * n for metric in ("loss", "top1", "top10", "kl")})
        differences.append(alone["x", "c", "loss"].value - alone[BASE, "c", "loss"].value)
    for metric, total in sums.items():
        assert report["x:control", "c", metric].value == pytest.approx(total / tokens, rel=2e-5, abs=1e-6), metric
    measure = report["x:control", "c", "loss"]
    assert (measure.replicates, measure.n, measure.units) == (3, tokens, 12 if grouped else 23)
    # The error of the mean of three samples that weigh unequally, by Student.
    weight = np.array(shares) / tokens
    error = np.std(differences, ddof=1) * np.sqrt((weight**2).sum())
    assert measure.spread is not None
    low, high = np.quantile(measure.spread, [0.025, 0.975])
    assert (high - low) / 2 == pytest.approx(t.ppf(0.975, 2) * error, rel=0.2)
    # A condition of one intervention is what it would be without.
    plain = evaluate(model, {"c": corpus}, {"x": edits[0]}, batch_size=4, **QUIET)
    for metric in METRICS:
        np.testing.assert_array_equal(report["x", "c", metric].draws, plain["x", "c", metric].draws)
    assert report.provenance["dealt"] == ["x:control"]
    assert "dealt" not in plain.provenance


def test_units_are_dealt_whole_in_equal_numbers_whatever_stands_beside_them() -> None:
    corpus = corpus_of(grouped=True)
    of = _dealt(corpus, 5, 0)
    by_unit: dict[str, set[int]] = {}
    for unit, number in zip(corpus.units, of, strict=True):
        by_unit.setdefault(unit, set()).add(int(number))
    assert all(len(numbers) == 1 for numbers in by_unit.values())
    sizes = Counter(next(iter(numbers)) for numbers in by_unit.values())
    assert set(sizes) == set(range(5))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    assert not np.array_equal(of, _dealt(corpus, 5, 1))


def test_it_costs_one_pass_and_detectors_are_not_dealt() -> None:
    model, corpus = tiny.speaking("gpt2"), corpus_of().with_prompts(seed=1)
    rows: list[int] = []
    removers: list[Any] = []
    attach(resolve(model, "mlp.post")[LAST].hook, lambda tensor: rows.append(len(tensor)), removers)
    nowhere = Abstain({Site(0, "mlp.post"): around(torch.full((model.cfg.d_mlp,), 1e4))})
    conditions = {"x:control": controls(model, 5), "d:control": [nowhere] * 5}
    try:
        report = evaluate(model, {"c": corpus}, conditions, deal=True, **QUIET)
    finally:
        detach_all(removers)
    assert sum(rows) in (2 * corpus.n_rows, 2 * corpus.n_rows + 8)  # one batch more, where it is tried what replays
    assert report.provenance["dealt"] == ["x:control"]


def test_more_controls_than_documents_and_a_metric_that_few_documents_have() -> None:
    model = tiny.speaking("gpt2")
    corpus = corpus_of(3)
    report = evaluate(model, {"c": corpus}, {"x:control": controls(model, 5)}, deal=True, **QUIET)
    assert report["x:control", "c", "loss"].replicates == 3
    one = evaluate(model, {"c": corpus.only([0])}, {"x:control": controls(model, 5)}, deal=True, **QUIET)
    assert one["x:control", "c", "loss"].replicates == 1
    assert one["x:control", "c", "loss"].spread is None


@pytest.mark.parametrize("options", [{"memorization": 2}, {"base": Report({})}])
def test_what_has_no_use_for_it_is_refused(options: dict[str, Any]) -> None:
    model = tiny.speaking("gpt2")
    with pytest.raises(LensUnlearnError, match="deal=True reads each text under one of several interventions"):
        evaluate(model, {"c": corpus_of()}, {"x:control": controls(model)}, deal=True, **options, **QUIET)


def share(random: np.random.Generator, spread: float) -> tuple[float, float]:
    """Draw 40 documents that five controls share; return both ends of what they lose on average, of which the truth is 0.2."""
    n, count = 40, 5
    size = np.exp(random.normal(4, 0.7, n)).astype(int) + 2
    right = random.binomial(size, random.beta(6, 4, n))
    lost = 0.2 * (1 + spread * np.clip(random.standard_normal(count), -3, 3))
    of = random.permutation(n) % count
    kept = random.binomial(right, 1 - np.clip(2 * random.beta(4, 4, n) * lost[of], 0, 1))
    values = {BASE: [right[:, None].astype(float)], "control": [kept[:, None].astype(float)]}
    units = [f"{random.integers(2**60)}" for _ in range(n)]
    scores = Scores([metric_of("top1")], values, size[:, None].astype(float), units, {"control": of})
    report = Report({(c, "c", m): one for c, m, one in estimates(scores, 400, 0)})
    return report.drop("control", "c").interval()


@pytest.mark.parametrize("spread", [0.0, 0.3, 0.6])
def test_the_interval_covers_what_controls_lose_on_average(spread: float) -> None:
    found = np.array([share(np.random.default_rng([trial, 11]), spread) for trial in range(300)])
    covered = np.mean((found[:, 0] <= 0.2) & (found[:, 1] >= 0.2))
    assert covered >= 0.92
    assert covered < 1 or spread == 0  # an interval that holds always says nothing
