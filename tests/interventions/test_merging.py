"""What is merged into a plain copy gives the logits of the model under its hooks, or is refused.

The oracle is the hooked model itself: a bridge, raw or in compatibility mode, or a `HookedTransformer`, in float64.
"""

import contextlib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from delta_helpers import draw, update
from interventions_helpers import random_selection, under, zoo
from torch import Tensor

from lens_unlearn.core.errors import ModelError, SelectionError
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.model.matrices import Matrix, matrix_shape
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.maps import NeuronMap

RAW = [*tiny.DENSE, *tiny.CONVERTED]
PROCESSED = [f"{name}-compat" for name in ("gpt2", "neox", "opt", "llama")]
PROCESSED += [f"{name}-folded" for name in tiny.CONVERTED if name.endswith(("gpt2", "llama"))]
NO_BIAS = {"mlp.post": ["gemma2", "gemma3", "qwen2", "qwen3", "phi3"], "attn.z": ["qwen2", "phi3"]}
"""Architectures that have no bias behind W_out or W_O, and no option for one."""


@pytest.fixture(autouse=True)
def exact_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep plain NeoX and Phi-3 in float64: they take their softmax in float32."""
    real = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=None, dtype=None, **_: real(x, dim=dim))


def plain_name(name: str) -> str:
    return name.removeprefix("converted-").removesuffix("-compat").removesuffix("-folded")


@cache
def exact(name: str) -> Any:
    """Return a model in float64."""
    if name.startswith("converted-"):
        made = tiny.build(name.removesuffix("-folded")).to(torch.float64)
        if name.endswith("-folded"):  # as `HookedTransformer.from_pretrained` does
            with tiny.quiet():
                made.load_and_process_state_dict({key: value.clone() for key, value in made.state_dict().items()})
        return made.eval()
    made = tiny.to_bridge(copy(name), plain_name(name))
    if name.endswith("-compat"):
        with tiny.quiet(), contextlib.redirect_stdout(None):
            made.enable_compatibility_mode()
        made.eval()
    return made


def copy(name: str) -> Any:
    return tiny.hugging_face(plain_name(name)).double()


def selection(name: str, kind: str, seed: int = 0) -> NeuronMap:
    a = tiny.ARCHITECTURES[plain_name(name)]
    shape = (a.neurons,) if kind == "mlp.post" else (a.heads, a.d_head)
    return random_selection({Site(layer, kind): shape for layer in range(tiny.LAYERS)}, 0.3, seed)


def means(chosen: NeuronMap, seed: int = 0) -> NeuronMap:
    return NeuronMap({site: draw(*mask.shape, seed=seed + n) for n, (site, mask) in enumerate(chosen.items())})


def basis(chosen: NeuronMap) -> NeuronMap:
    return NeuronMap(
        {s: draw(*mask.shape, mask.shape[1], seed=9) + 2 * torch.eye(mask.shape[1]) for s, mask in chosen.items()}
    )


def ablation(name: str, kind: str, form: str) -> Ablate:
    chosen = selection(name, kind)
    return {
        "zero": lambda: Ablate(chosen),
        "mean": lambda: Ablate(chosen, means(chosen)),
        "basis": lambda: Ablate(chosen, basis=basis(chosen)),
        "mean in a basis": lambda: Ablate(chosen, means(chosen), basis(chosen)),
    }[form]()


def logp(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)  # compatibility mode subtracts a constant from the logits


def is_exported(name: str, intervention: Intervention) -> None:
    model, plain = exact(name), copy(name)
    before = logp(tiny.logits(model))
    room = 1e-9 if name in tiny.DENSE else 1e-5  # TransformerLens processes in single precision
    torch.testing.assert_close(logp(tiny.logits(plain)), before, rtol=0, atol=room)
    expected = logp(under(model, intervention))
    assert float((expected - before).abs().max()) > 1e-2, "so that it matters"
    assert intervention.merge_into(plain, model) is plain
    torch.testing.assert_close(logp(tiny.logits(plain)), expected, rtol=0, atol=room)


FORMS = [("mlp.post", "zero"), ("mlp.post", "mean")]
FORMS += [("attn.z", form) for form in ("zero", "mean", "basis", "mean in a basis")]


@pytest.mark.parametrize(("kind", "form"), FORMS)
@pytest.mark.parametrize("name", [*RAW, *PROCESSED])
def test_an_ablation_is_the_same_in_the_weights_or_refused(name: str, kind: str, form: str) -> None:
    edit = ablation(name, kind, form)
    if "mean" in form and plain_name(name) in NO_BIAS[kind]:
        plain = copy(name)
        before = tiny.weights_hash(plain)
        with pytest.raises(ModelError, match="has no bias there, and no option to have one; ablate to zero instead"):
            edit.merge_into(plain, exact(name))
        assert tiny.weights_hash(plain) == before
    else:
        is_exported(name, edit)


@pytest.mark.parametrize("matrix", tiny.MATRICES)
@pytest.mark.parametrize("name", [*RAW, *PROCESSED])
def test_an_update_of_any_matrix_is_the_same_in_the_weights_or_refused(name: str, matrix: str) -> None:
    """Refused of a processed model, where its matrix is another one."""
    if matrix not in tiny.matrices_of(plain_name(name)):
        pytest.skip("it has no such matrix")
    model = exact(name)
    delta = Delta({(i, matrix): update(matrix_shape(model, i, matrix), "dense", i) for i in range(tiny.LAYERS)}, 0.5)
    if name in PROCESSED and matrix not in ("W_out", "W_O"):
        plain = copy(name)
        before = tiny.weights_hash(plain)
        with pytest.raises(ModelError, match=f"L0.{matrix} is not the same in this copy as in the model"):
            delta.merge_into(plain, model)
        assert tiny.weights_hash(plain) == before
    else:
        is_exported(name, delta)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-compat", "llama", "neox-compat", *tiny.CONVERTED[:1]])
def test_a_sum_is_merged_as_it_acts(name: str) -> None:
    """Where ablations overlap the last wins; an update is behind every mask, wherever it stands."""
    model = exact(name)
    delta = Delta({(1, m): update(matrix_shape(model, 1, m), "rank", 3) for m in ("W_out", "W_O")})
    parts: list[Intervention] = [
        Ablate(selection(name, "mlp.post", 1), means(selection(name, "mlp.post", 1))),
        delta,
        Ablate(selection(name, "mlp.post", 2)),
        ablation(name, "attn.z", "mean in a basis"),
        Ablate(selection(name, "attn.z", 5), 0.3),
        delta * -0.4,
    ]
    for order in (parts, parts[::-1]):
        is_exported(name, sum(order[1:], order[0]))


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "mlp.post"), ("llama", "attn.z"), ("qwen3", "attn.z"), ("gemma2", "attn.z")]
)
def test_biases_that_a_configuration_allows_are_saved_with_the_copy(name: str, kind: str, tmp_path: Path) -> None:
    model, plain = exact(name), copy(name)
    edit = ablation(name, kind, "mean")
    edit.merge_into(plain, model).save_pretrained(tmp_path)
    option = {"mlp.post": "mlp_bias", "attn.z": "attention_bias"}[kind]
    read = type(plain).from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager").eval()
    assert getattr(read.config, option)
    torch.testing.assert_close(tiny.logits(read), under(model, edit), rtol=0, atol=1e-5)  # Gemma's scale is single


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_in_half_precision_is_the_same_model(dtype: torch.dtype) -> None:
    model, plain = tiny.model("gpt2-compat"), tiny.hugging_face("gpt2").to(dtype)
    edit = ablation("gpt2", "mlp.post", "mean")
    weights = tiny.module_of(plain, "gpt2", Site(0, "mlp.post")).weight.clone()
    edit.merge_into(plain, model)
    now = tiny.module_of(plain, "gpt2", Site(0, "mlp.post")).weight
    chosen = edit.selection[Site(0, "mlp.post")]
    assert not bool(now[chosen].any())
    assert torch.equal(now[~chosen], weights[~chosen])


@pytest.mark.parametrize("gain", [1.0, 0.997])
def test_half_precision_hides_no_gain(gain: float) -> None:
    """An update of a matrix with a gain of nearly 1 folded into it is refused, though it has almost the same values."""
    bridge, plain = (tiny.hugging_face("llama").to(torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        bridge.model.layers[0].mlp.up_proj.weight *= gain
    model, delta = tiny.to_bridge(bridge, "llama"), Delta({(0, "W_in"): update((32, 64))})
    if gain == 1:
        delta.merge_into(plain, model)
        return
    with pytest.raises(ModelError, match="L0.W_in is not the same in this copy"):
        delta.merge_into(plain, model)


def test_a_copy_of_other_weights_is_refused() -> None:
    model, other = exact("gpt2"), tiny.hugging_face("gpt2", seed=1).double()
    before = tiny.weights_hash(other)
    for edit in (ablation("gpt2", "mlp.post", "zero"), Delta({(0, "W_Q"): update((32, 32))})):
        with pytest.raises(
            ModelError, match="is not the same in this copy as in the model: load both from the same weights"
        ):
            edit.merge_into(other, model)
    with pytest.raises(ModelError, match="is not the same in this copy"):
        ablation("gpt2", "mlp.post", "zero").merge_into(copy("opt"), model)
    assert tiny.weights_hash(other) == before


def test_what_is_no_change_of_weights_is_refused() -> None:
    model = tiny.model("gpt2")
    for name, edit in zoo(model).items():
        if not isinstance(edit, Ablate | Delta):
            with pytest.raises(SelectionError, match="is no change of weights, and cannot be merged into them"):
                edit.merge_into(copy("gpt2"), model)
            with pytest.raises(SelectionError, match="is no change of weights"):
                (edit + ablation("gpt2", "mlp.post", "zero")).merge_into(copy("gpt2"), model)
            assert name
    elsewhere = Ablate(random_selection({Site(0, "mlp.pre"): (64,)}))
    with pytest.raises(SelectionError, match=r"is no change of weights at L0.mlp.pre: ablate at mlp.post, attn.z"):
        elsewhere.merge_into(copy("gpt2"), model)
    wide = Ablate(random_selection({Site(0, "mlp.post"): (65,)}))
    with pytest.raises(SelectionError, match="65"):
        wide.merge_into(copy("gpt2"), model)
    assert Matrix(0, "W_out") in [edit.matrix for edit in ablation("gpt2", "mlp.post", "zero").edits()]
