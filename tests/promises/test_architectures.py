"""One matrix: every architecture, in every form in which TransformerLens holds it, against oracles that know none of it.

Forms: a raw `TransformerBridge`, one in compatibility mode, a model that TransformerLens built alone, and (where the
installed TransformerLens has it) a `HookedTransformer`, made from a configuration or from converted weights.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from interventions_helpers import selection_of, under
from torch import Tensor

from lens_unlearn.core.errors import ArtefactError
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.interventions.update import Update
from lens_unlearn.model.matrices import Matrix, matrix_names, matrix_shapes
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.maps import NeuronMap

MATRIX = [
    *tiny.DENSE,
    *(f"{name}-compat" for name in tiny.DENSE),
    *tiny.NATIVE,
    *tiny.HOOKED,
    *tiny.CONVERTED,
]
KINDS = ("mlp.pre", "mlp.post", "attn.q", "attn.k", "attn.v", "attn.z", "resid")


@pytest.fixture(params=MATRIX)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def architecture(name: str) -> str | None:
    """Name the plain model with the very same weights; None where there is none."""
    return next((a for a in (name.removesuffix("-compat"), name.removeprefix("converted-")) if a in tiny.DENSE), None)


def unprocessed(name: str) -> bool:
    """Say whether the plain model's activations are this one's as well: nothing was folded or centred."""
    return architecture(name) is not None and not name.endswith("-compat")


def compare(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.log_softmax(-1), expected.log_softmax(-1), rtol=1e-4, atol=2e-5)


def test_a_model_is_the_plain_one_in_another_form(name: str) -> None:
    if (plain := architecture(name)) is None:
        pytest.skip("TransformerLens built it alone: there is no plain model of it")
    compare(tiny.logits(tiny.model(name)), tiny.logits(tiny.hugging_face(plain)))


def test_sites_fire_with_the_right_width(name: str) -> None:
    model = tiny.model(name)
    known = tiny.ARCHITECTURES.get(architecture(name) or "")
    heads, kv, d_head = (known.heads, known.kv_heads, known.d_head) if known else (4, 2 if "llama" in name else 4, 8)
    wide = {"attn.q": (heads, d_head), "attn.k": (kv, d_head), "attn.v": (kv, d_head), "attn.z": (heads, d_head)}
    wide |= {"mlp.pre": (64,), "mlp.post": (64,), "resid": (32,), "mlp.pre_linear": (64,)}
    gated = known.gated if known else "llama" in name
    points = resolve(model, [*KINDS, *(["mlp.pre_linear"] if gated else [])])
    seen: dict[Site, list[int]] = {
        site: [] for site in points
    }  # a bridge's hook points split heads for their users only
    handles = [
        point.hook.register_forward_hook(lambda m, i, o, site=site: seen[site].append(o.numel()))
        for site, point in points.items()
    ]
    try:
        tiny.logits(model)
    finally:
        for handle in handles:
            handle.remove()
    for site, sizes in seen.items():
        assert sizes == [2 * 7 * math.prod(wide[site.kind])], site
        assert points[site].shape == wide[site.kind]


def rows_zeroed(name: str, selection: NeuronMap) -> Tensor:
    """Run a fresh copy whose output matrices were edited: the plain model where there is one, else its own parameters."""
    plain = architecture(name)
    if plain is not None and unprocessed(name):
        edited = tiny.hugging_face(plain)
        for site, chosen in selection.items():
            tiny.zero_rows(edited, plain, site, chosen)
        return tiny.logits(edited)
    made = tiny.build(name)
    with torch.no_grad():
        for site, chosen in selection.items():
            matrix = {"mlp.post": "W_out", "attn.z": "W_O"}[site.kind]
            tiny.matrix_in_place(made, site.layer, matrix)[chosen.reshape(-1)] = 0
    return tiny.logits(made)


@pytest.mark.parametrize("kind", ["mlp.post", "attn.z"])
def test_an_ablation_equals_the_weight_edit(name: str, kind: str) -> None:
    model = tiny.model(name)
    selection = selection_of(model, kind, share=0.4)
    base, got = tiny.logits(model), under(model, Ablate(selection))
    assert not torch.allclose(base, got, atol=1e-3)
    compare(got, rows_zeroed(name, selection))
    assert torch.equal(tiny.logits(model), base)


def updates(model: Any) -> dict[Matrix, Update]:
    draw = torch.Generator().manual_seed(3)
    wanted = [Matrix(layer, matrix) for layer in range(tiny.LAYERS) for matrix in matrix_names(model, layer)]
    shapes = matrix_shapes(model, wanted)
    return {matrix: Update(0.1 * torch.randn(shape, generator=draw)) for matrix, shape in shapes.items()}


def test_a_delta_equals_the_edited_matrices(name: str) -> None:
    model = tiny.model(name)
    given = updates(model)
    assert {matrix.name for matrix in given} >= {"W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"}
    made = tiny.build(name)
    with torch.no_grad():
        for matrix, update in given.items():
            place = tiny.matrix_in_place(made, *matrix)
            place += update.value.reshape(place.shape)
    base, got = tiny.logits(model), under(model, Delta(given))
    assert not torch.allclose(base, got, atol=1e-3)
    compare(got, tiny.logits(made))
    assert torch.equal(tiny.logits(model), base)


def counted_activations(name: str, corpus: Any) -> dict[Site, np.ndarray]:
    """Every site's values at counted positions: through plain PyTorch hooks, or TransformerLens' own cache."""
    parts: dict[Site, list[np.ndarray]] = {}
    plain = architecture(name) if unprocessed(name) else None
    for batch in corpus.batches(1):
        if plain is not None:
            seen = tiny.plain_activations(tiny.hugging_face(plain), plain, KINDS, batch.tokens.long())
        else:
            with torch.no_grad():
                _, cache = tiny.model(name).run_with_cache(batch.tokens.long())
            names = {"resid": "hook_resid_post"}
            seen = {
                Site(layer, kind): cache[f"blocks.{layer}.{names.get(kind, kind.replace('.', '.hook_'))}"]
                for kind in KINDS
                for layer in range(tiny.LAYERS)
            }
        for site, values in seen.items():
            parts.setdefault(site, []).append(values[batch.counted].double().numpy())
    return {site: np.concatenate(values) for site, values in parts.items()}


def test_statistics_equal_the_oracle(name: str) -> None:
    corpus = tiny.corpus((9, 3, 14, 5), uncounted=0.3)
    moments = collect(tiny.model(name), corpus, KINDS, batch_size=3, progress=False)
    expected = counted_activations(name, corpus)
    assert set(moments.sites) == set(expected)
    for site, values in expected.items():
        for reading, oracle in (
            ("mean", values.mean(0)),
            ("std", values.std(0)),
            ("rms", np.sqrt((values**2).mean(0))),
            ("mean_abs", np.abs(values).mean(0)),
        ):
            got = getattr(moments, reading)[site].numpy()
            np.testing.assert_allclose(got, oracle, rtol=2e-4, atol=1e-5, err_msg=f"{site} {reading}")


def both(model: Any) -> Intervention:
    matrix, update = next(iter(updates(model).items()))
    return Ablate(selection_of(model, ["mlp.post", "attn.z"])) + Delta({matrix: update})


def test_what_is_saved_does_the_same_after_loading_and_refuses_another_model(name: str, tmp_path: Path) -> None:
    model = tiny.model(name)
    given = both(model)
    given.save(tmp_path / "both.safetensors", model)
    assert torch.equal(under(model, load_intervention(tmp_path / "both.safetensors", model)), under(model, given))
    other = tiny.model("llama" if name != "llama" else "gpt2")
    with pytest.raises(ArtefactError, match="weights"):
        load_intervention(tmp_path / "both.safetensors", other)


@pytest.mark.parametrize("length", [5, 11])  # within the sliding window of those that have one, and beyond
def test_generation_is_the_same_with_and_without_cache(name: str, length: int) -> None:
    if name in tiny.NATIVE:
        pytest.skip("TransformerLens' native models cannot generate")
    known = tiny.CONVERTED and name in tiny.CONVERTED
    model = tiny.model(name) if known else tiny.speaking(name)
    tokens = tiny.some_tokens(2, length, seed=5)
    options = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    with torch.no_grad():
        base = model.generate(tokens, use_past_kv_cache=True, **options)
        with both(model).on(model):
            cached, whole = (model.generate(tokens, use_past_kv_cache=cache, **options) for cache in (True, False))
            step_by_step = tokens
            for _ in range(6):
                step_by_step = torch.cat([step_by_step, model(step_by_step)[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(model.generate(tokens, use_past_kv_cache=True, **options), base)
    assert torch.equal(cached[:, -6:], whole[:, -6:])
    assert torch.equal(whole[:, -6:], step_by_step[:, -6:])
