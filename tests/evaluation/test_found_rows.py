"""evaluate runs only the rows that a detector finds: the numbers are those of a run of every row, at the cost of the rows."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from interventions_helpers import box_around_half, selection_of
from positions_helpers import about, around

from lens_unlearn.core.errors import ModelError
from lens_unlearn.evaluation.evaluate import evaluate
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.when import When
from lens_unlearn.model.hooks import attach, detach_all
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons.maps import NeuronMap

FIRST = Site(0, "mlp.post")
QUIET: dict[str, Any] = {"progress": False, "resamples": 50}
METRICS = ("loss", "top1", "top10", "top1_rare", "kl", "abstained")


def corpus_of(rows: int = 9) -> Any:
    return tiny.corpus([int(n) for n in np.random.default_rng(3).integers(9, 30, rows)], seed=3).with_prompts(seed=1)


def last(model: Any) -> Ablate:
    selection = selection_of(model, "mlp.post", share=0.5)
    return Ablate(NeuronMap({s: selection[s] for s in selection if s.layer == max(x.layer for x in selection)}))


def prompt(model: Any, row: int) -> Abstain:
    """Find the prompt of one row."""
    return about(model, corpus_of().prompt(row).tolist(), FIRST)


NOTHING = 1e4
"""A key far from all others."""

FORMS: dict[str, Any] = {
    "abstain": lambda m: Abstain({FIRST: box_around_half(m, FIRST)}),
    "abstain, every token": lambda m: Abstain({FIRST: box_around_half(m, FIRST)}, when="every_token"),
    "abstain, mean": lambda m: Abstain({FIRST: box_around_half(m, FIRST)}, pool="mean"),
    "abstain, two layers": lambda m: Abstain({s: box_around_half(m, s) for s in (FIRST, Site(1, "mlp.post"))}, vote=1),
    "abstain, the last layer": lambda m: Abstain({Site(1, "mlp.post"): box_around_half(m, Site(1, "mlp.post"))}),
    "when": lambda m: When(Abstain({FIRST: box_around_half(m, FIRST)}), last(m)),
    "when, every token": lambda m: When(Abstain({FIRST: box_around_half(m, FIRST)}, when="every_token"), last(m)),
    "nothing is found": lambda m: When(Abstain({FIRST: around(torch.full((m.cfg.d_mlp,), NOTHING))}), last(m)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["gpt2", "llama", *tiny.HOOKED[:1]])
def test_the_numbers_are_those_of_a_run_of_every_row(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, corpus = tiny.speaking(name), corpus_of()
    edit = FORMS[form](model)
    conditions = {"edit": edit, "edit:control": [edit, edit]}
    some = evaluate(model, {"c": corpus}, conditions, batch_size=4, **QUIET)
    for kind in (Abstain, When):
        monkeypatch.setattr(kind, "row_detector", None)
    every = evaluate(model, {"c": corpus}, conditions, batch_size=4, **QUIET)
    for condition in conditions:
        for metric in (m for m in METRICS if (condition, "c", m) in every.measures):
            one, other = some[condition, "c", metric], every[condition, "c", metric]
            assert one.value == pytest.approx(other.value, rel=2e-5, abs=2e-6), metric
            np.testing.assert_allclose(one.draws, other.draws, rtol=1e-4, atol=1e-5)
    assert set(some.measures) == set(every.measures)
    if form == "nothing is found":
        for metric in METRICS[:-2]:
            assert some["edit", "c", metric].value == some["base", "c", metric].value
        assert some["edit", "c", "kl"].value == 0


def counted_rows(model: Any, layer: int, run: Any) -> int:
    """Count the rows that a layer sees."""
    seen: list[int] = []
    removers: list[Any] = []
    attach(resolve(model, "mlp.post")[Site(layer, "mlp.post")].hook, lambda x: seen.append(len(x)), removers)
    try:
        run()
    finally:
        detach_all(removers)
    return sum(seen)


@pytest.mark.parametrize("name", ["gpt2", *tiny.HOOKED[:1]])
def test_layers_behind_the_detector_see_the_rows_that_were_found_and_no_others(name: str) -> None:
    model, corpus = tiny.speaking(name), corpus_of()
    evaluate(model, {"c": corpus}, {"cut": When(prompt(model, 2), last(model))}, **QUIET)  # it is tried what replays
    for edit, expected in (
        (prompt(model, 2), 0),
        (When(prompt(model, 2), last(model)), 1),
        (When(Abstain({FIRST: around(torch.full((model.cfg.d_mlp,), NOTHING))}), last(model)), 0),
    ):
        run = counted_rows(model, 1, lambda edit=edit: evaluate(model, {"c": corpus}, {"edit": edit}, **QUIET))
        assert run == corpus.n_rows + expected


def test_an_error_on_the_way_leaves_no_hook_and_the_next_run_is_sound() -> None:
    model, corpus = tiny.speaking("gpt2"), corpus_of()
    edit = When(prompt(model, 2), last(model))
    before = evaluate(model, {"c": corpus}, {"edit": edit}, **QUIET)
    hooks = sum(len(hook.fwd_hooks) for hook in model.hook_dict.values())
    model.train()
    with pytest.raises(ModelError):
        evaluate(model, {"c": corpus}, {"edit": edit}, **QUIET)
    model.eval()
    calls: list[int] = []
    removers: list[Any] = []

    def broken(x: Any) -> None:
        calls.append(1)
        if len(calls) == 2:  # in the pass of the rows that were found
            raise RuntimeError("broken")

    attach(resolve(model, "mlp.post")[Site(1, "mlp.post")].hook, broken, removers)
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(model, {"c": corpus}, {"edit": edit}, **QUIET)
    detach_all(removers)
    assert sum(len(hook.fwd_hooks) for hook in model.hook_dict.values()) == hooks
    after = evaluate(model, {"c": corpus}, {"edit": edit}, **QUIET)
    assert after["edit", "c", "loss"].value == before["edit", "c", "loss"].value
