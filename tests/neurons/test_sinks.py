"""Statistics without attention sinks: sums over plain PyTorch hooks and NumPy are the oracle."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from collect_helpers import run_until

from lens_unlearn.core.errors import ActivationError, ArtefactError, LensUnlearnError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.inspection.top_examples import top_examples
from lens_unlearn.methods import by_name
from lens_unlearn.methods.neuron_adjust import neuron_adjust
from lens_unlearn.methods.selective_pruning import selective_pruning
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import collect, load_moments, save_moments
from lens_unlearn.neurons.histogram import Histogram
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.moments import Moments
from lens_unlearn.neurons.top_tokens import TopTokens

QUIET: dict[str, Any] = {"progress": False}
RATIO = 1.2
"""Above the median by so much are some positions of random models at each layer, and not the same ones."""


def norms_at(plain: Any, name: str, tokens: torch.Tensor) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The norms at the input and at the output of each block, of one row."""
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    handles = []
    for layer in range(tiny.LAYERS):

        def see(_: Any, args: Any, kwargs: Any, output: Any, layer: int = layer) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            made = output[0] if isinstance(output, tuple) else output
            found[layer] = tuple(np.sqrt((x.double().numpy() ** 2).sum(-1)).reshape(-1) for x in (given, made))

        handles.append(tiny.block(plain, name, layer).register_forward_hook(see, with_kwargs=True))
    with torch.no_grad():
        plain(tokens)
    for handle in handles:
        handle.remove()
    return found


def kept_values(plain: Any, name: str, kinds: list[str], corpus: Corpus, ratio: float) -> Any:
    """Every counted activation at a position that is no sink of its layer, one row at a time; and which positions these are."""
    values: dict[Site, list[np.ndarray]] = {}
    kept: dict[Site, list[np.ndarray]] = {}
    for row in range(corpus.n_rows):
        start, end = int(corpus.starts[row]), int(corpus.starts[row + 1])
        tokens, counted = corpus.tokens[start:end].long()[None], corpus.counted[start:end].numpy()
        norms = norms_at(plain, name, tokens)
        for site, value in tiny.plain_activations(plain, name, kinds, tokens).items():
            # torch's median is the lower of the two in the middle
            sinks = [n > ratio * np.sort(n)[(len(n) - 1) // 2] for n in norms[site.layer]]
            keep = counted & ~(sinks[0] | sinks[1])
            values.setdefault(site, []).append(value[0].flatten(1).double().numpy()[keep])
            kept.setdefault(site, []).append(keep)
    return tuple({site: np.concatenate(parts) for site, parts in found.items()} for found in (values, kept))


def test_the_means_are_those_over_the_other_positions(dense: str) -> None:
    kinds = ["mlp.post", "attn.z", "resid"]
    corpus = tiny.corpus((9, 14, 5, 11, 16))
    expected, kept = kept_values(tiny.hugging_face(dense), dense, kinds, corpus, RATIO)
    got = collect(tiny.model(dense), corpus, kinds, skip_sinks=RATIO, **QUIET)
    state = got.state()
    assert any(len(values) < corpus.n_tokens for values in expected.values())
    if dense == "gpt2":
        assert (kept[Site(0, "resid")] != kept[Site(1, "resid")]).any(), "layers have their own"
    for site, values in expected.items():
        assert int(state[f"{site}.count"]) == len(values)
        torch.testing.assert_close(
            got.mean[site].flatten(), torch.from_numpy(values.mean(0)), rtol=1e-4, atol=1e-5, check_dtype=False
        )
        torch.testing.assert_close(
            got.std[site].flatten(), torch.from_numpy(values.std(0)), rtol=1e-3, atol=1e-5, check_dtype=False
        )


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt2-compat", "native-llama", *tiny.HOOKED[:1]])
def test_the_result_depends_on_the_rows_and_not_on_the_batch(name: str) -> None:
    corpus, model = tiny.corpus((9, 14, 5, 11, 16)), tiny.model(name)
    kinds = ["mlp.post", "attn.z", "resid"]
    found = [collect(model, corpus, kinds, skip_sinks=RATIO, batch_size=size, **QUIET) for size in (1, 2, 8)]
    usual = collect(model, corpus, kinds, **QUIET)
    for other in found[1:]:
        for site in usual.sites:
            assert torch.equal(found[0].state()[f"{site}.count"], other.state()[f"{site}.count"])
            torch.testing.assert_close(found[0].mean[site], other.mean[site], rtol=1e-4, atol=1e-6)
    assert any(found[0].state()[f"{site}.count"] < usual.state()[f"{site}.count"] for site in usual.sites)


def sinking(name: str) -> Any:
    """A model that embeds one token as an attention sink."""
    plain = tiny.hugging_face(name)
    with torch.no_grad():
        plain.get_input_embeddings().weight[77] *= 300
    return tiny.to_bridge(plain, name)


def with_tokens(rows: list[list[int]]) -> Corpus:
    sizes = torch.tensor([len(row) for row in rows])
    flat = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    return replace(
        tiny.corpus(tuple(len(row) for row in rows), bos=False),
        tokens=flat,
        counted=torch.ones(len(flat), dtype=torch.bool),
        starts=torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]),
    )


def test_a_sink_is_left_out_of_every_statistic() -> None:
    model = sinking("llama")
    texts = with_tokens([[77, 40, 41, 42, 43, 44], [50, 51, 77, 52, 53, 54, 55]])
    site = Site(0, "mlp.post")
    assert collect(model, texts, skip_sinks=10, **QUIET).state()[f"{site}.count"] == 11
    assert collect(model, texts, **QUIET).state()[f"{site}.count"] == 13
    histogram = collect(model, texts, statistic=Histogram(), skip_sinks=10, **QUIET)
    assert int(histogram.counts(site, 0).sum()) == 11
    tops = collect(model, texts, site, statistic=TopTokens(13), skip_sinks=10, **QUIET)
    assert tops.state()[f"{site}.values"].shape[0] == 11


def test_the_top_examples_of_a_neuron_may_be_those_elsewhere() -> None:
    model = tiny.to_bridge(sinking("llama").original_model, "llama", tiny.speaking("llama").tokenizer)
    texts = with_tokens([[77, 40, 41, 42, 43, 44], [50, 51, 77, 52, 53, 54, 55]])
    site = Site(0, "resid")
    values = collect(model, texts, site, statistic=TopTokens(13, by="abs"), **QUIET)[site].values
    every, others = (
        top_examples(model, texts, (site, 3), k=13, by="abs", per_document=False, skip_sinks=ratio, **QUIET)
        for ratio in (None, 10)
    )
    found = [[example.value for example in one.examples["L0.resid[3]"]] for one in (every, others)]
    assert [len(part) for part in found] == [13, 11]
    assert found[0][2:] == found[1], "the two strongest are at the sinks"
    assert values.shape[0] == 13


def test_without_sinks_nothing_is_left_out_and_the_digits_are_the_same() -> None:
    model, corpus = tiny.model("llama"), tiny.corpus()
    state, usual = (collect(model, corpus, skip_sinks=ratio, **QUIET).state() for ratio in (1000, None))
    assert all(torch.equal(state[name], usual[name]) for name in usual)


def test_what_is_not_finite_is_a_fault_and_no_sink() -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.original_model.get_input_embeddings().weight[40] = float("inf")
    with pytest.raises(ActivationError, match="overflows or is broken"):
        collect(model, with_tokens([[41, 42, 40, 43, 44]]), skip_sinks=10, **QUIET)


def test_it_is_recorded_and_a_checkpoint_of_another_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, corpus, path = tiny.model("llama"), tiny.corpus(), tmp_path / "moments.safetensors"
    moments = collect(model, corpus, skip_sinks=RATIO, **QUIET)
    save_moments(path, moments, model)
    assert load_moments(path, model).provenance["skip_sinks"] == RATIO
    assert "skip_sinks" not in collect(model, corpus, **QUIET).provenance
    partial = tmp_path / "partial"
    options = {"checkpoint": partial, "batch_size": 1, **QUIET}
    run_until(monkeypatch, 2, model, corpus, skip_sinks=RATIO, **options)
    for other in (None, 3.0):
        with pytest.raises(ArtefactError, match="skip_sinks"):
            collect(model, corpus, skip_sinks=other, **options)
    resumed = collect(model, corpus, skip_sinks=RATIO, **options).state()
    whole = collect(model, corpus, skip_sinks=RATIO, batch_size=1, **QUIET).state()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("ratio", [1, 0, -2, float("nan"), float("inf"), "10", True])
def test_a_ratio_that_cannot_be_meant_is_refused(ratio: Any) -> None:
    model, corpora = tiny.model("gpt2"), (tiny.corpus(seed=1), tiny.corpus(seed=2))
    calls = (
        lambda: collect(model, corpora[0], skip_sinks=ratio, **QUIET),
        lambda: selective_pruning(model, *corpora, skip_sinks=ratio, **QUIET),
        lambda: neuron_adjust(model, *corpora, skip_sinks=ratio, **QUIET),
    )
    for call in calls:
        with pytest.raises(LensUnlearnError, match="skip_sinks=.* give a number above 1"):
            call()


def test_a_sample_of_keys_is_refused() -> None:
    with pytest.raises(LensUnlearnError, match="leave out skip_sinks"):
        collect(tiny.model("gpt2"), tiny.corpus(), statistic=KeySample(5), skip_sinks=10, **QUIET)


@pytest.mark.parametrize("steps", [1, 2])
def test_methods_leave_them_out(steps: int) -> None:
    model, corpora = tiny.model("llama"), (tiny.corpus(seed=1), tiny.corpus(seed=2))
    moments = [collect(model, corpus, skip_sinks=RATIO, **QUIET) for corpus in corpora]
    pruned = selective_pruning(model, *corpora, fraction=0.3, steps=steps, skip_sinks=RATIO, **QUIET)
    if steps == 1:
        assert pruned.selection.equals(selective_pruning(model, *moments, fraction=0.3).selection)
        given = selective_pruning(model, *moments, fraction=0.3, skip_sinks=RATIO)
        assert pruned.selection.equals(given.selection)
        pre = [collect(model, corpus, "mlp.pre", skip_sinks=RATIO, **QUIET) for corpus in corpora]
        one = neuron_adjust(model, *corpora, fraction=0.3, skip_sinks=RATIO, **QUIET)
        assert one.forget_mean.equals(neuron_adjust(model, *pre, fraction=0.3).forget_mean)
    assert not pruned.selection.equals(selective_pruning(model, *corpora, fraction=0.3, steps=steps, **QUIET).selection)


def test_moments_that_count_them_are_refused_where_they_are_to_be_left_out() -> None:
    model, corpora = tiny.model("llama"), (tiny.corpus(seed=1), tiny.corpus(seed=2))
    usual: list[Moments] = [collect(model, corpus, ("mlp.post", "mlp.pre"), **QUIET) for corpus in corpora]
    for method in (selective_pruning, neuron_adjust):
        with pytest.raises(
            LensUnlearnError, match="skip_sinks=10 is asked of moments .* collected with skip_sinks=None"
        ):
            method(model, *usual, skip_sinks=10)


def test_sweeps_collect_once_without_them() -> None:
    model, corpora = tiny.model("llama"), (tiny.corpus(seed=1), tiny.corpus(seed=2))
    for name in ("selective-pruning", "neuron-adjust"):
        record, options = by_name(name), {"skip_sinks": RATIO, **QUIET}
        fitted = record.fit(model, *corpora, options)
        assert [part.provenance["skip_sinks"] for part in fitted] == [RATIO, RATIO]
        assert record.at(model, fitted, 0.3, options) is not None
