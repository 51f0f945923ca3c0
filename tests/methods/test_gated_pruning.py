"""Gated pruning: a detector and neurons found each by hand, its control, what is refused, and a run from the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from command_line_helpers import WORDS, call, run_arguments, write_texts

import lens_unlearn as lu
from lens_unlearn.core.errors import LensUnlearnError, SelectionError
from lens_unlearn.interventions.when import When
from lens_unlearn.methods import by_name
from lens_unlearn.methods.gated_pruning import gated_pruning
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.prompted import Prompted

QUIET: dict[str, Any] = {"progress": False}
LENGTHS = (12,) * 60


def skill(tokens: range, seed: int) -> lu.Corpus:
    """Make texts of some tokens only, which a detector can tell from others."""
    return tiny.corpus(LENGTHS, seed=seed, tokens=list(tokens), name=f"skill {seed}").with_prompts(6)


def skills() -> tuple[lu.Corpus, lu.Corpus, lu.Corpus]:
    one, two, three = (skill(range(3 + 2 * k, 5 + 2 * k), k) for k in range(3))
    return one, two, three


def by_hand(
    model: Any, forget: lu.Corpus, others: list[lu.Corpus], layers: list[int], fraction: float
) -> list[set[int]]:
    """Rank the neurons of some layers by the mean size of their activation behind the prompts, and take the first."""
    sizes = []
    for corpora in ([forget], others):
        total, count = 0.0, 0
        for corpus in corpora:
            rows = torch.stack([corpus.row(row).long() for row in range(corpus.n_rows)])  # all of one length
            kept = corpus.counted.reshape(rows.shape).numpy()
            _, cache = model.run_with_cache(rows)
            acts = [cache[f"blocks.{layer}.mlp.hook_post"].float().numpy() for layer in layers]
            total = total + np.concatenate([np.abs(a[kept]).sum(0) for a in acts]).astype(float)
            count += int(kept.sum())
        sizes.append(total / count)
    score = sizes[0] / (sizes[1] + 1e-3)
    best = np.argsort(-score, kind="stable")[: round(fraction * len(score))]
    width = len(score) // len(layers)
    return [{int(n) - k * width for n in best if n // width == k} for k in range(len(layers))]


def test_what_acts_is_selective_pruning_behind_the_middle_layer_in_the_rows_that_are_found() -> None:
    model = tiny.model("llama")
    forget, *others = skills()
    last = int(model.cfg.n_layers) - 1
    acting = gated_pruning(model, forget, others, fraction=0.25, false_alarms=0.2, **QUIET)
    looks = [site.layer for site in acting.detector.regions]
    assert looks == [last // 2]
    behind = list(range(looks[0] + 1, last + 1))
    chosen = {
        site.layer: set(mask.flatten().nonzero().flatten().tolist()) for site, mask in acting.inner.selection.items()
    }  # type: ignore[attr-defined]
    expected = by_hand(model, forget, others, behind, 0.25)
    assert [chosen.get(layer, set()) for layer in behind] == expected
    assert acting.detector.rates["detection"][0] > 0.8  # the skills have no token in common
    assert max(share for share, *_ in acting.detector.rates["false_alarms of each"]) <= 0.3
    keys = [lu.query_keys(model, part, [Site(looks[0], "mlp.post")], **QUIET) for part in (forget, *others)]
    detector = lu.key_space_detection(
        model, keys[0], keys[1:], layer=looks, region="linear", false_alarms=0.2, control=False, **QUIET
    )
    site = Site(looks[0], "mlp.post")
    assert detector.regions[site].limit == acting.detector.regions[site].limit


def test_it_costs_what_is_forgotten_and_hardly_anything_else_and_its_control_does_neither() -> None:
    model = tiny.model("llama")
    forget, *others = skills()
    record = by_name("gated-pruning")
    assert record.judges_prompts
    assert record.cuts_prompts
    fitted = record.fit(model, forget, record.together(others), QUIET)
    assert isinstance(fitted[0], Prompted)
    options = {"fraction": 1.0}
    acting = record.at(model, fitted, 0.1, options)
    again = gated_pruning(model, forget, others, fraction=1.0, false_alarms=0.1, **QUIET)
    assert [r.limit for r in acting.detector.regions.values()] == [r.limit for r in again.detector.regions.values()]  # type: ignore[attr-defined]
    controls = record.controls(model, acting, fitted, [0, 1], strength=0.1, options=options)
    assert all(isinstance(one, When) for one in controls)
    assert controls[0].inner.selection.count() == acting.inner.selection.count()  # type: ignore[attr-defined]
    test = {"forget": skills()[0], "one": others[0], "two": others[1]}
    report = lu.evaluate(model, test, {"gated": acting, "gated:control": controls}, **QUIET)

    def moved(condition: str, corpus: str) -> float:
        return abs(report[condition, corpus, "loss"].value - report["base", corpus, "loss"].value)

    assert moved("gated", "forget") > 5 * max(
        moved("gated", "one"), moved("gated", "two"), moved("gated:control", "forget")
    )


def test_moments_and_keys_of_an_earlier_pass_are_taken_and_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    forget, *others = skills()
    acting = gated_pruning(model, forget, others[0], fraction=0.5, false_alarms=0.2, **QUIET)
    acting.save(tmp_path / "gated.safetensors", model)
    loaded = lu.load_intervention(tmp_path / "gated.safetensors", model)
    tokens = forget.row(0)[None].long()
    with acting.on(model):
        expected = model(tokens)
    with loaded.on(model):
        assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": -1}, "leaves no MLP behind"),
        ({"layer": 99}, "there is no layer 99"),
        ({"fraction": 0.0}, "selects nothing"),
        ({"fraction": 1.5}, "fraction"),
        ({"false_alarms": 2}, "false_alarms"),
        ({"importance": "size"}, "importance='size'"),
        ({"region": "cube"}, "region='cube'"),
        ({"vote": 3}, "vote=3"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_what_cannot_be_is_refused_before_a_pass(options: dict[str, Any], words: str, monkeypatch: Any) -> None:
    model = tiny.model("gpt2")
    forget, other, _ = skills()
    monkeypatch.setattr(
        "lens_unlearn.methods.gated_pruning.query_keys", lambda *_, **__: pytest.fail("a pass was made")
    )
    with pytest.raises(LensUnlearnError, match=words):
        gated_pruning(model, forget, other, **options, **QUIET)
    with pytest.raises(LensUnlearnError, match="same text"):
        gated_pruning(model, forget, [other, forget], **QUIET)


def test_a_fraction_so_small_that_it_takes_no_neuron_is_refused() -> None:
    model = tiny.model("gpt2")
    forget, other, _ = skills()
    with pytest.raises(SelectionError, match="selects nothing"):
        gated_pruning(model, forget, other, fraction=1e-9, **QUIET)


def test_the_budget_holds_with_one_knob() -> None:
    model = tiny.model("llama")
    forget, other, _ = skills()
    test = (tiny.corpus(LENGTHS, seed=7).with_prompts(6), tiny.corpus(LENGTHS, seed=8).with_prompts(6))
    tuned = lu.tune(
        "gated-pruning",
        model,
        forget,
        other,
        retain_drop=0.5,
        held_out=test,
        metric="top10",
        options={"fraction": 1.0},
        **QUIET,
    )
    assert isinstance(tuned.intervention, When)
    assert tuned.retain_bound <= 0.5


def test_a_run_takes_it_by_name_beside_its_control(model_dir: Path, tmp_path: Path) -> None:
    reverse = [word[::-1] for word in WORDS]
    texts = {
        "forget": write_texts(tmp_path / "f.jsonl", 1, words=reverse),
        "retain": write_texts(tmp_path / "r.jsonl", 2),
    }
    options = ["--method", "gated-pruning", "--set", "false_alarms=0.4", "--controls", "1"]
    code = call(*run_arguments(model_dir, texts, tmp_path / "run"), *options)
    assert code == 0
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "shuffled labels" in settings["controls"]["gated-pruning"]
    assert (tmp_path / "run" / "gated-pruning.safetensors").exists()


def test_moments_of_every_layer_are_taken_as_well_and_only_those_behind_count() -> None:
    model = tiny.model("llama")
    forget, other, _ = skills()
    short = by_name("gated-pruning").fit(model, forget, other, QUIET)
    whole = [lu.collect(model, part, ("mlp.post", "attn.z"), **QUIET) for part in (forget, other)]
    fitted = [Prompted(part.keys, moments) for part, moments in zip((short[0], *short[1]), whole, strict=True)]
    options: dict[str, Any] = {"fraction": 0.3, "false_alarms": 0.2, **QUIET}
    ours, theirs = gated_pruning(model, *fitted, **options), gated_pruning(model, short[0], short[1], **options)
    assert isinstance(ours.inner, lu.Ablate)
    assert isinstance(theirs.inner, lu.Ablate)
    assert ours.inner.selection.equals(theirs.inner.selection)
