"""Interventions on dictionary features: in files, under a condition, and in generation."""

from pathlib import Path
from typing import Any

import pytest
import sae_helpers
import tiny
import torch
from interventions_helpers import box_around_half, under

import lens_unlearn as lu
from lens_unlearn.core.errors import ArtefactError, SiteError
from lens_unlearn.model.direct import written_row

FIRST = lu.Site(0, "mlp.post")
QUIET: dict[str, Any] = {"progress": False}
FORGET, RETAIN = (
    tiny.corpus((9, 12, 7), seed=1, tokens=range(3, 60)),
    tiny.corpus((9, 12, 7), seed=2, tokens=range(60, 120)),
)


def dictionary(folder: Path, seed: int = 0, hook: str = "blocks.0.hook_resid_post") -> lu.Dictionary:
    weights = sae_helpers.weights_of("jumprelu", 32, seed=seed)
    return lu.load_dictionary(sae_helpers.write(folder, sae_helpers.config_of("jumprelu", 32, hook=hook), weights))


def ablation(one: lu.Dictionary) -> lu.Ablate:
    mask = torch.zeros(one.d_sae, dtype=torch.bool)
    mask[::3] = True
    return lu.Ablate(lu.NeuronMap({one.site: mask}))


def test_files_name_the_dictionary_and_refuse_another(tmp_path: Path) -> None:
    model, one, other = tiny.model("gpt2"), dictionary(tmp_path / "a"), dictionary(tmp_path / "b", seed=1)
    prune, file, sums = ablation(one), tmp_path / "prune.safetensors", tmp_path / "moments.safetensors"
    with pytest.raises(SiteError, match="no dictionary is attached to layer 0"):
        prune.save(file, model)
    with one.on(model):
        moments = lu.collect(model, FORGET, "sae", **QUIET)
        prune.save(file, model)
        lu.save_moments(sums, moments, model)
        assert repr(lu.load_intervention(file, model)) == repr(prune)
        assert torch.equal(lu.load_moments(sums, model).mean[one.site], moments.mean[one.site])
    same = dictionary(tmp_path / "again")  # the same weights, read once more
    with same.on(model):
        lu.load_intervention(file, model)
    for read, path in ((lu.load_intervention, file), (lu.load_moments, sums)):
        with pytest.raises(ArtefactError, match=r"dictionary at blocks\.0\.hook_resid_post, and none is attached"):
            read(path, model)
        with other.on(model), pytest.raises(ArtefactError, match=r"dictionary attached at L0\.sae: weights: "):
            read(path, model)
    neurons = torch.ones(64, dtype=torch.bool)
    with one.on(model):
        lu.Ablate(lu.NeuronMap({lu.Site(0, "mlp.post"): neurons})).save(file, model)
    lu.load_intervention(file, model)  # which is of no features


def test_a_checkpoint_of_other_features_is_refused(tmp_path: Path) -> None:
    model, one, other = tiny.model("gpt2"), dictionary(tmp_path / "a"), dictionary(tmp_path / "b", seed=1)
    checkpoint = tmp_path / "checkpoint"

    class Stop(lu.Moments):
        def fresh(self) -> lu.Moments:
            return Stop()

        def update(self, *_: Any) -> None:
            raise KeyboardInterrupt

    with one.on(model), pytest.raises(KeyboardInterrupt):
        lu.collect(model, FORGET, "sae", statistic=Stop(), checkpoint=checkpoint, **QUIET)
    with other.on(model), pytest.raises(ArtefactError, match="dictionaries"):
        lu.collect(model, FORGET, "sae", checkpoint=checkpoint, **QUIET)


def test_selective_pruning_ablates_features_and_composes(tmp_path: Path) -> None:
    model, one = tiny.model("gpt2"), dictionary(tmp_path)
    with one.on(model):
        prune = lu.selective_pruning(model, FORGET, RETAIN, site="sae", fraction=0.125, **QUIET)
        assert repr(prune) == "Ablate(zero, 6 of 48 neurons, 1 layers, sae)"
        forget, retain = (lu.collect(model, corpus, "sae", **QUIET) for corpus in (FORGET, RETAIN))
        control = lu.random_pruning(model, forget, retain, like=prune)
        assert control.selection.count() == 6
        report = lu.evaluate(model, {"forget": FORGET}, {"both": prune + control}, **QUIET)
        assert {"base", "both"} <= set(report.to_frame().condition)
        with prune.on(model):
            under = lu.collect(model, FORGET, "sae", **QUIET)
    chosen = prune.selection[one.site]
    assert float(under.mean_abs[one.site][chosen].max()) == 0
    assert torch.equal(under.mean[one.site][~chosen], forget.mean[one.site][~chosen])
    floor = 0.1 * float(retain.mean_abs[one.site].mean())
    score = forget.mean_abs[one.site] / (retain.mean_abs[one.site] + floor)
    assert torch.equal(chosen, score >= score.topk(6).values[-1])


def test_features_are_clamped_where_a_detector_finds_a_query(tmp_path: Path) -> None:
    model, one, tokens = (
        tiny.model("gpt2"),
        dictionary(tmp_path, hook="blocks.1.hook_resid_post"),
        tiny.some_tokens(8, 7),
    )
    clamp = lu.Ablate(ablation(one).selection, 0.5)
    acting = lu.When.region({FIRST: box_around_half(model, FIRST)}, clamp)
    with one.on(model):
        base, everywhere, found = tiny.logits(model, tokens), under(model, clamp, tokens), under(model, acting, tokens)
        acting.save(tmp_path / "when.safetensors", model)
        assert torch.equal(under(model, lu.load_intervention(tmp_path / "when.safetensors", model), tokens), found)
    changed = (found != base).any(-1)
    assert 0 < int(changed[:, -1].sum()) < len(tokens)
    assert not bool(changed[:, :-1].any())
    torch.testing.assert_close(found[changed], everywhere[changed])


@pytest.mark.parametrize("name", ["gpt2", "llama", *tiny.HOOKED[:1]])
def test_generation_is_the_same_with_a_cache_in_a_batch_and_alone(tmp_path: Path, name: str) -> None:
    model, one, tokens = tiny.model(name), dictionary(tmp_path), tiny.some_tokens(3, 7)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with one.on(model):
        before = model.generate(tokens, use_past_kv_cache=True, **options)
        with lu.Ablate(ablation(one).selection, 2.0).on(model):
            cached, whole = (model.generate(tokens, use_past_kv_cache=flag, **options) for flag in (True, False))
            alone = [model.generate(row[None], use_past_kv_cache=True, **options) for row in tokens]
    assert torch.equal(cached, whole)
    assert torch.equal(cached, torch.cat(alone))
    assert not torch.equal(cached, before)


def test_attributions_of_features_add_up_to_what_they_do(tmp_path: Path) -> None:
    model, one = tiny.model("gpt2"), dictionary(tmp_path)
    corpus = tiny.corpus((6, 4), seed=3)
    with one.on(model):
        found = lu.attribute(model, corpus, "sae", objective="loss", steps=32, rule="midpoint", progress=False)
    attributed, difference = found.completeness[one.site]
    assert abs(difference) > 0.01
    assert attributed == pytest.approx(difference, rel=0.02)


def test_what_a_feature_writes_is_its_decoder_row(tmp_path: Path) -> None:
    model, one = tiny.model("gpt2"), dictionary(tmp_path)
    with one.on(model):
        assert torch.equal(written_row(model, one.site, 5), one.weights["W_dec"][5])
    inside = dictionary(tmp_path, hook="blocks.0.attn.hook_z")  # read as one vector per head here
    with pytest.raises(SiteError, match="adds nothing to the residual stream itself"):
        inside.written(5)
    with pytest.raises(SiteError, match="has no row of an output matrix"):
        written_row(model, one.site, 5)
