"""collect: what it gathers is what plain hooks see, it keeps nothing, can be interrupted, and leaves no trace."""

import contextlib
import gc
import tracemalloc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from collect_helpers import counted_values, run_until
from interventions_helpers import selection_of, unchanged
from statistics_helpers import READINGS, assert_close, oracle
from torch import Tensor

from lens_unlearn.core.errors import (
    ActivationError,
    ArtefactError,
    CorpusError,
    LensUnlearnError,
    ModelError,
    SiteError,
)
from lens_unlearn.corpora.corpus import Batch
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons import collect as collecting
from lens_unlearn.neurons.collect import collect, load_moments, save_moments
from lens_unlearn.neurons.histogram import Histogram
from lens_unlearn.neurons.moments import Moments

SITES = ("mlp.pre", "mlp.post", "attn.z", "resid")
EXTRA = Moments(extra=("sqrt", "extrema"))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_moments_equal_those_of_plain_hooks_over_the_same_tokens(dense: str, batch_size: int) -> None:
    corpus = tiny.corpus((9, 3, 14, 5, 1, 6, 11), uncounted=0.3)
    kinds = tiny.kinds_of(dense)
    moments = collect(tiny.model(dense), corpus, kinds, statistic=EXTRA, batch_size=batch_size, progress=False)
    expected = counted_values(dense, kinds, corpus)
    assert set(moments.sites) == set(expected)
    assert moments.n == corpus.n_tokens == len(next(iter(expected.values())))
    for site, values in expected.items():
        if dense.startswith("gpt2") or dense == "opt":  # whose masks are added in another way: rounding of the model
            for name in ("mean", "std", "mean_abs"):
                np.testing.assert_allclose(
                    getattr(moments, name)[site].numpy().reshape(-1), oracle(values)[name], rtol=1e-4, atol=3e-6
                )
        else:
            for name in READINGS:
                np.testing.assert_allclose(
                    getattr(moments, name)[site].numpy().reshape(-1),
                    oracle(values)[name],
                    rtol=1e-4,
                    atol=3e-6,
                    err_msg=f"{site} {name}",
                )


def test_in_float64_the_agreement_is_to_eleven_digits() -> None:
    corpus = tiny.corpus((9, 3, 14), uncounted=0.3)
    plain = tiny.hugging_face("llama").double()
    model = tiny.to_bridge(tiny.hugging_face("llama").double(), "llama")
    moments = collect(model, corpus, "mlp.post", statistic=EXTRA, batch_size=2, progress=False)
    values: dict[Site, list[np.ndarray]] = {}
    for row in range(corpus.n_rows):
        start, end = int(corpus.starts[row]), int(corpus.starts[row + 1])
        for site, value in tiny.plain_activations(
            plain, "llama", ["mlp.post"], corpus.tokens[start:end].long()[None]
        ).items():
            values.setdefault(site, []).append(value[0][corpus.counted[start:end]].numpy())
    for site, parts in values.items():
        assert_close(moments, oracle(np.concatenate(parts)), rtol=1e-11, site=site)


@pytest.mark.parametrize("name", [*tiny.ALL])
def test_the_result_does_not_depend_on_the_batch_size(name: str) -> None:
    corpus = tiny.corpus((9, 3, 14, 5, 1, 6, 11, 9, 2), uncounted=0.2)
    results = [
        collect(tiny.model(name), corpus, SITES, statistic=EXTRA, batch_size=size, progress=False)
        for size in (1, 2, 7, 64)
    ]
    for other in results[1:]:
        assert other.n == results[0].n
        for reading in READINGS:
            for site, value in getattr(results[0], reading).items():
                torch.testing.assert_close(getattr(other, reading)[site], value, rtol=1e-5, atol=2e-6)


def test_the_result_does_not_depend_on_what_stands_in_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, corpus = tiny.model("llama"), tiny.corpus((12, 5, 9))
    clean = collect(model, corpus, SITES, progress=False)
    real = type(corpus)._batch

    def dirty(self: Any, rows: list[int]) -> Batch:
        batch = real(self, rows)
        tokens = batch.tokens.clone()
        tokens[torch.arange(tokens.shape[1])[None] >= batch.lengths[:, None]] = 77
        assert not torch.equal(tokens, batch.tokens), "there is padding in this batch"
        return replace(batch, tokens=tokens)

    monkeypatch.setattr(type(corpus), "_batch", dirty)
    other = collect(model, corpus, SITES, progress=False)
    assert all(torch.equal(value, other.state()[key]) for key, value in clean.state().items())


def test_bos_and_padding_are_not_counted(each: str) -> None:
    corpus = tiny.corpus((5, 2))
    moments = collect(tiny.model(each), corpus, "mlp.post", progress=False)
    assert moments.n == 7


def test_the_unembedding_is_not_computed(dense: str) -> None:
    model = tiny.build(dense)
    called: list[int] = []
    head = model.original_model.get_output_embeddings()
    head = getattr(head, "original_component", head)
    head.register_forward_hook(lambda *_: called.append(1))
    collect(model, tiny.corpus((5, 4)), "mlp.post", progress=False)
    assert not called
    tiny.logits(model)
    assert called, "the spy sees the unembedding when it is computed"


def test_no_activation_outlives_its_batch() -> None:
    model, gone = tiny.model("gpt2"), []

    class Spy(Moments):
        def fresh(self) -> "Spy":
            return Spy()

        def update(self, site: Site, values: Tensor, weight: Tensor) -> None:
            gone.append(weakref.ref(values.untyped_storage()))
            super().update(site, values, weight)

    result = collect(model, tiny.corpus((9,) * 8), "mlp.post", statistic=Spy(), batch_size=2, progress=False)
    gc.collect()
    assert len(gone) == 8
    assert [ref() for ref in gone] == [None] * 8
    assert result.n == 72


def test_memory_does_not_grow_with_the_corpus() -> None:
    model = tiny.model("gpt2")

    def held(rows: int) -> tuple[int, int]:
        corpus = tiny.corpus(range(3, 3 + rows))
        gc.collect()
        before = sum(t.numel() for t in gc.get_objects() if type(t) is Tensor)
        tracemalloc.start()
        moments = collect(model, corpus, ("mlp.post", "attn.z"), batch_size=1, progress=False)
        gc.collect()
        current, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        after = sum(t.numel() for t in gc.get_objects() if type(t) is Tensor)
        return after - before, current + 0 * moments.n

    held(3)
    (few, python_few), (many, python_many) = held(5), held(50)
    scratch = 60 * 64  # one row longer at most
    assert many - few <= scratch
    assert python_many - python_few < 50_000


def test_it_leaves_the_model_as_it_was_also_after_an_error() -> None:
    for name in ("gpt2", "llama", "gpt2-compat"):
        model = tiny.model(name)
        with unchanged(model):
            collect(model, tiny.corpus(), SITES, progress=False)

        class Failing(Moments):
            def fresh(self) -> "Failing":
                return Failing()

            def update(self, *_: Any) -> None:
                raise KeyboardInterrupt

        with unchanged(model), pytest.raises(KeyboardInterrupt):
            collect(model, tiny.corpus(), SITES, statistic=Failing(), progress=False)


def test_inside_a_block_it_sees_the_ablated_activations() -> None:
    model, corpus = tiny.model("gpt2"), tiny.corpus()
    selection = selection_of(model, "L0.mlp.post")
    with Ablate(selection, 0.25).on(model):
        moments = collect(model, corpus, "mlp.post", progress=False)
    chosen = selection[Site(0, "mlp.post")]
    assert moments.mean[Site(0, "mlp.post")][chosen].eq(0.25).all()
    assert moments.mean.live[Site(0, "mlp.post")].equal(~chosen)
    clean = collect(model, corpus, "mlp.post", progress=False)
    assert not torch.equal(clean.mean[Site(1, "mlp.post")], moments.mean[Site(1, "mlp.post")])


def test_a_transform_acts_before_counting() -> None:
    model, corpus = tiny.model("gpt2"), tiny.corpus()
    plain = collect(model, corpus, "mlp.post", progress=False)
    site = Site(1, "mlp.post")
    changed = collect(model, corpus, "mlp.post", transform={site: lambda x: x + 1}, progress=False)
    torch.testing.assert_close(changed.mean[site], plain.mean[site] + 1, rtol=1e-6, atol=1e-6)
    assert torch.equal(changed.mean[Site(0, "mlp.post")], plain.mean[Site(0, "mlp.post")])


def test_a_histogram_counts_every_counted_value() -> None:
    corpus = tiny.corpus(uncounted=0.3)
    made = collect(tiny.model("neox"), corpus, "mlp.post", statistic=Histogram(bins=32), progress=False)
    values = counted_values("neox", ["mlp.post"], corpus)
    site = Site(1, "mlp.post")
    assert made.n == corpus.n_tokens
    got = np.stack([made.counts(site, neuron).numpy() for neuron in range(64)])
    expected = np.stack([np.histogram(values[site][:, i], made.edges.numpy())[0] for i in range(64)])
    assert np.abs(got - expected).sum() <= 4, "but for values within rounding of an edge"
    assert got.sum() == corpus.n_tokens * 64


def test_the_statistic_passed_is_a_pattern_and_is_not_filled() -> None:
    pattern = Moments(extra=("sqrt",))
    first = collect(tiny.model("gpt2"), tiny.corpus(), statistic=pattern, progress=False)
    assert repr(pattern) == "Moments(empty)"
    assert first.extra == ("sqrt",)
    assert first.provenance == {"model": first.provenance["model"], "corpus": "tiny", "tokens": 48}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_each_forward_ends_with_the_last_site_and_the_model_is_as_before(name: str) -> None:
    model, corpus = tiny.model(name), tiny.corpus((9, 3, 14))
    tokens = next(iter(corpus.batches(2))).tokens
    before = model(tokens)
    resolve(model, ("mlp.post",))
    fired: list[str] = []
    hooks = [(f"blocks.{layer}.hook_resid_post", lambda t, hook: fired.append(hook.name)) for layer in (0, 1)]
    with model.hooks(fwd_hooks=hooks):
        part = collect(model, corpus, (Site(1, "attn.z"), Site(0, "mlp.post")), progress=False)
    assert len(set(fired)) == 1, "layer 1 was left after its attention"
    assert torch.equal(model(tokens), before)
    whole = collect(model, corpus, ("attn.z", "mlp.post", "resid"), progress=False)
    assert all(torch.equal(value, whole.state()[key]) for key, value in part.state().items())


# --- what is refused -----------------------------------------------------------------------------------------------------


def test_a_broken_model_is_named_by_its_neuron() -> None:
    model = tiny.build("gpt2")
    with torch.no_grad():
        model.blocks[1].mlp.original_component.c_fc.original_component.bias[5] = float("inf")
    with pytest.raises(ActivationError, match=r"L1\.mlp\.p.*\[5\] is inf"):
        collect(model, tiny.corpus(), ("mlp.pre", "mlp.post"), progress=False)


def test_wrong_models_sites_and_corpora_are_refused() -> None:
    model = tiny.model("gpt2")
    with pytest.raises(SiteError, match="did you mean mlp.post"):
        collect(model, tiny.corpus(), "mlp.posts", progress=False)
    with pytest.raises(CorpusError, match="beyond this model's vocabulary"):
        collect(model, tiny.corpus(tokens=[5000]), progress=False)
    with pytest.raises(CorpusError, match="rows longer than this model's context of 64"):
        collect(model, tiny.corpus((80,)), progress=False)
    with pytest.raises(LensUnlearnError, match="batch_size=0"):
        collect(model, tiny.corpus(), batch_size=0, progress=False)
    training = tiny.build("gpt2")
    training.train()
    with pytest.raises(ModelError, match="training mode"):
        collect(training, tiny.corpus(), progress=False)


# --- interruption --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", range(5))
@pytest.mark.parametrize("statistic", [EXTRA, Histogram(bins=16)], ids=["moments", "histogram"])
def test_an_interrupted_run_goes_on_to_bitwise_the_same_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch: int, statistic: Any
) -> None:
    model, corpus, file = tiny.model("gpt2"), tiny.corpus((9, 3, 14, 5, 6, 11)), tmp_path / "run.safetensors"
    options = {"statistic": statistic, "batch_size": 1, "checkpoint": file, "progress": False}
    whole = collect(model, corpus, SITES, **{**options, "checkpoint": None})
    run_until(monkeypatch, batch, model, corpus, SITES, **options)
    assert file.exists()
    calls = []
    real = collecting.backbone
    monkeypatch.setattr(collecting, "backbone", lambda *a: (calls.append(1), real(*a))[1])
    resumed = collect(model, corpus, SITES, **options)
    batches = len(list(corpus.batches(1)))
    assert len(calls) == batches - batch, "no batch twice, none lost"
    assert all(torch.equal(value, resumed.state()[key]) for key, value in whole.state().items())
    assert not file.exists(), "a finished run needs no checkpoint"


def test_a_checkpoint_knows_the_hooks_and_transforms_it_was_made_under(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, corpus, file = tiny.model("gpt2"), tiny.corpus((9, 3, 14, 5)), tmp_path / "run.safetensors"
    options: dict[str, Any] = {"batch_size": 1, "checkpoint": file, "progress": False}
    run_until(monkeypatch, 2, model, corpus, "mlp.post", **options)
    with (
        model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", lambda t, hook: t * 2)]),
        pytest.raises(ArtefactError, match="hooks"),
    ):
        collect(model, corpus, "mlp.post", **options)
    with pytest.raises(ArtefactError, match="transform"):
        collect(model, corpus, "mlp.post", transform={Site(0, "mlp.post"): torch.abs}, **options)
    collect(model, corpus, "mlp.post", **options)


def test_a_run_may_be_interrupted_again_and_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, corpus, file = tiny.model("gpt2"), tiny.corpus((9, 3, 14, 5, 6, 11)), tmp_path / "run.safetensors"
    options = {"batch_size": 1, "checkpoint": file, "progress": False}
    whole = collect(model, corpus, **{**options, "checkpoint": None})
    for _ in range(3):
        run_until(monkeypatch, 1, model, corpus, **options)
    assert all(torch.equal(v, collect(model, corpus, **options).state()[k]) for k, v in list(whole.state().items())[:1])


def test_a_checkpoint_of_another_run_is_refused_naming_what_differs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, corpus, file = tiny.model("gpt2"), tiny.corpus((9, 3, 14)), tmp_path / "run.safetensors"
    base: dict[str, Any] = {"sites": "mlp.post", "batch_size": 1, "statistic": Moments()}
    run_until(monkeypatch, 1, model, corpus, **base, checkpoint=file, progress=False)
    kept = file.read_bytes()
    for change, difference in [
        ({"corpus": tiny.corpus((9, 3, 14), seed=3)}, "corpus"),
        ({"corpus": tiny.corpus((9, 3, 14), uncounted=0.5)}, "corpus"),
        ({"model": tiny.model("neox")}, "model"),
        ({"model": tiny.model("gpt2-compat")}, "model"),
        ({"sites": "attn.z"}, "sites"),
        ({"batch_size": 2}, "batch_size"),
        ({"statistic": Moments(extra=("sqrt",))}, "statistic"),
        ({"statistic": Histogram()}, "statistic"),
    ]:
        arguments = {"model": model, "corpus": corpus, **base, **change}
        with pytest.raises(ArtefactError, match=rf"does not belong to this run: {difference}"):
            collect(**arguments, checkpoint=file, progress=False)
        assert file.read_bytes() == kept, "a refused checkpoint stays as it is"


def test_a_checkpoint_of_other_batches_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, corpus, file = tiny.model("gpt2"), tiny.corpus((9, 3, 14)), tmp_path / "run.safetensors"
    with monkeypatch.context() as before:
        before.setattr("lens_unlearn.neurons.collect.PADDING", 1)
        run_until(before, 1, model, corpus, batch_size=1, checkpoint=file, progress=False)
    with pytest.raises(ArtefactError, match="padding"):
        collect(model, corpus, batch_size=1, checkpoint=file, progress=False)


def test_a_histograms_checkpoint_is_refused_by_other_bins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, corpus, file = tiny.model("gpt2"), tiny.corpus((9, 3, 14)), tmp_path / "run.safetensors"
    run_until(monkeypatch, 1, model, corpus, statistic=Histogram(), batch_size=1, checkpoint=file, progress=False)
    with pytest.raises(ArtefactError, match="statistic"):
        collect(model, corpus, statistic=Histogram(scale=0.2), batch_size=1, checkpoint=file, progress=False)


def test_a_checkpoint_in_a_folder_that_is_not_there_says_so_at_once(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError):
        collect(tiny.model("gpt2"), tiny.corpus(), checkpoint=tmp_path / "no" / "run.safetensors", progress=False)


# --- saving --------------------------------------------------------------------------------------------------------------


def test_moments_are_saved_and_read_back_whole(tmp_path: Path) -> None:
    model, file = tiny.model("gpt2"), tmp_path / "m.safetensors"
    moments = collect(model, tiny.corpus(), ("mlp.post", "attn.z"), statistic=EXTRA, progress=False)
    save_moments(file, moments, model)
    again = load_moments(file, model)
    assert again.provenance == moments.provenance
    assert again.extra == moments.extra
    assert again.sites == moments.sites or set(again.sites) == set(moments.sites)
    assert all(torch.equal(value, again.state()[key]) for key, value in moments.state().items())
    for reading in READINGS:
        assert getattr(again, reading).equals(getattr(moments, reading))
    with pytest.raises(ArtefactError, match="does not belong to this model: weights"):
        load_moments(file, tiny.build("gpt2", seed=4))
    with pytest.raises(ArtefactError, match="processing: bridge in the file, bridge, compatibility mode in this model"):
        load_moments(file, tiny.model("gpt2-compat"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    moments = collect(tiny.model("gpt2"), tiny.corpus(), progress=False)
    moments._state[Site(0, "mlp.post")][0, 3] = bad
    save_moments(tmp_path / "m.safetensors", moments, tiny.model("gpt2"))
    with pytest.raises(ArtefactError, match="holds no moments that can be read"):
        load_moments(tmp_path / "m.safetensors")


def test_moments_of_another_shape_or_count_are_refused(tmp_path: Path) -> None:
    moments = collect(tiny.model("gpt2"), tiny.corpus(), progress=False)
    site = Site(0, "mlp.post")
    whole = moments._state[site]
    for broken, count in ((whole[:3], 48), (whole, 0), (whole, -5), (whole[0], 48)):
        moments._state[site], moments._count[site] = broken, count
        save_moments(tmp_path / "m.safetensors", moments, tiny.model("gpt2"))
        with pytest.raises(ArtefactError, match="holds no moments that can be read"):
            load_moments(tmp_path / "m.safetensors")


# --- a device without room ---------------------------------------------------------------------------------------------------


def small_device(monkeypatch: pytest.MonkeyPatch, positions: int) -> list[int]:
    """Let every forward pass over more positions than a number run out of memory, after its hooks have fired."""
    seen: list[int] = []
    real = collecting.backbone

    def run(model: Any, tokens: Any) -> None:
        seen.append(tokens.numel())
        if tokens.numel() <= positions:
            real(model, tokens)
            return
        with contextlib.suppress(BaseException):
            real(model, tokens)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(collecting, "backbone", run)
    return seen


def test_a_batch_without_room_is_halved_and_nothing_is_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, corpus = tiny.model("gpt2"), tiny.corpus((9, 3, 14, 5, 6, 11), uncounted=0.2)
    options: dict[str, Any] = {"statistic": EXTRA, "batch_size": 6, "progress": False}
    expected = collect(model, corpus, ("mlp.post", "attn.z"), **options)
    seen = small_device(monkeypatch, 30)
    got = collect(model, corpus, ("mlp.post", "attn.z"), **options)
    assert max(seen) > 30
    assert got.n == expected.n
    for name in READINGS:
        for site, value in getattr(expected, name).items():
            torch.testing.assert_close(getattr(got, name)[site], value, rtol=1e-5, atol=1e-6)
    assert got.provenance["batches cut for lack of memory"] == 1
    assert "batches cut for lack of memory" not in expected.provenance


def test_a_row_without_room_says_so_and_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    small_device(monkeypatch, 4)
    with pytest.raises(torch.OutOfMemoryError):
        collect(model, tiny.corpus((9, 3)), "mlp.post", progress=False)
