"""Deltas: a model under one is the model with edited weights, and afterwards nothing is different.

The oracle is a plain Hugging Face copy whose weights were edited before any TransformerLens code saw it, or, for models of
TransformerLens alone and in compatibility mode, a second one whose parameters were edited.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from delta_helpers import KINDS, draw, update
from faults_helpers import FailingAt, Fault
from hypothesis import given
from hypothesis import strategies as st
from interventions_helpers import selection_of, unchanged
from positions_helpers import LAST, watching
from torch import Tensor
from typer.testing import CliRunner

import lens_unlearn as lu
from lens_unlearn import Ablate, Abstain, Adjust, Box, Chain, Delta, Intervention, Matrix, Update
from lens_unlearn.cli import app
from lens_unlearn.core.errors import ArtefactError, ModelError, SelectionError, SiteError
from lens_unlearn.model.matrices import matrix_shape, matrix_shapes, matrix_value, on_matrix

FEW = ["gpt2", "neox", "llama", "gpt2-compat", *tiny.HOOKED[:2]]
TIGHT: Any = {"rtol": 0, "atol": 1e-10}
Edits = Mapping[tuple[int, str], Tensor]

# --- models in float64, and their edited copies ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def exact_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep plain NeoX and Phi-3 in float64: they take their softmax in float32, and a bridge does not."""
    real = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=None, dtype=None, **_: real(x, dim=dim))


def build(name: str) -> Any:
    if name in tiny.ARCHITECTURES:
        return tiny.to_bridge(tiny.hugging_face(name).double(), name)
    return tiny.build(name).to(torch.float64)


def exact(name: str) -> Any:
    """Return a model in float64, shared, and guarded like those of `tiny`."""
    key = f"exact {name}"
    if key not in tiny._shared:
        tiny.share(key, build(name))
    tiny.used.add(key)
    return tiny._shared[key]


def view_of(made: Any, name: str, layer: int, matrix: str) -> Tensor:
    """Return where a matrix lies in an edited model."""
    if name in tiny.ARCHITECTURES:
        return tiny.matrix_in(tiny.weight_of(made, name, layer, matrix), name, matrix)
    return tiny.matrix_in_place(made, layer, matrix)


def edited(name: str, edits: Edits) -> Any:
    """Return a model in float64 with other weights; a plain one where there is a plain one."""
    made = tiny.hugging_face(name).double() if name in tiny.ARCHITECTURES else build(name)
    for (layer, matrix), change in edits.items():
        view = view_of(made, name, layer, matrix)
        with torch.no_grad():
            view += change.reshape(view.shape)
    return made


@cache
def twin(name: str) -> Any:
    """Return a model of TransformerLens with the weights that `whole` stands for."""
    model = exact(name)
    made = edited(name, edits_of(whole(model, name), model))
    return tiny.to_bridge(made, name) if name in tiny.ARCHITECTURES else made


def whole(model: Any, name: str) -> Delta:
    """Return updates of every matrix, of every kind in turn."""
    shapes = matrix_shapes(
        model, [Matrix(layer, m) for m in tiny.matrices_of(name.removesuffix("-compat")) for layer in range(2)]
    )
    return Delta({m: update(shape, KINDS[n % 4], n) for n, (m, shape) in enumerate(shapes.items())}, 0.5)


def edits_of(delta: Delta, model: Any) -> dict[tuple[int, str], Tensor]:
    return {m: delta.strength * u.detach().dense(matrix_shape(model, *m)).double() for m, u in delta.updates.items()}


def under(model: Any, intervention: Intervention, tokens: Tensor | None = None) -> Tensor:
    with intervention.on(model):
        return tiny.logits(model, tokens)


# --- a delta is the weight edit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*tiny.DENSE, *tiny.HOOKED])
def test_each_matrix_under_a_delta_is_the_edited_one(name: str) -> None:
    model, other = exact(name), edited(name, {})
    base = tiny.logits(model)
    for n, matrix in enumerate(tiny.matrices_of(name)):
        kinds = ("dense", KINDS[1 + n % 3])
        delta = Delta({(i, matrix): update(matrix_shape(model, i, matrix), kind, i) for i, kind in enumerate(kinds)})
        with torch.no_grad():
            views = {(layer, matrix): view_of(other, name, layer, matrix) for layer in (0, 1)}
            before = {key: view.clone() for key, view in views.items()}
            for key, change in edits_of(delta, model).items():
                views[key] += change.reshape(views[key].shape)
            got, expected = under(model, delta), tiny.logits(other)
            for key, view in views.items():
                view.copy_(before[key])
        torch.testing.assert_close(got, expected, **TIGHT, msg=lambda text, m=matrix: f"{m}: {text}")
        assert float((got - base).abs().max()) > 1e-2, f"the update of {matrix} does nothing"


def test_all_matrices_at_once(each: str) -> None:
    model = exact(each)
    delta = whole(model, each)
    with unchanged(model):
        plain = edited(each, edits_of(delta, model)) if each in tiny.ARCHITECTURES else twin(each)
        torch.testing.assert_close(under(model, delta), tiny.logits(plain), **TIGHT)


def test_the_weights_can_be_read(each: str) -> None:
    model = exact(each)
    plain = tiny.hugging_face(each).double() if each in tiny.ARCHITECTURES else model
    for matrix in tiny.matrices_of(each.removesuffix("-compat")):
        value = matrix_value(model, 1, matrix)
        assert not value.requires_grad
        expected = view_of(plain, each, 1, matrix)
        assert torch.equal(value, expected.flatten(1))
        assert tuple(value.shape) == matrix_shape(model, 1, matrix)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_dtype(dtype: torch.dtype) -> None:
    model = tiny.to_bridge(tiny.hugging_face("llama").to(dtype), "llama")
    delta = whole(model, "llama")
    got = under(model, delta)
    assert got.dtype == dtype
    expected = tiny.logits(edited("llama", edits_of(delta, model))).float()
    assert float((got.float() - expected).abs().max()) < 0.1 * float(expected.abs().max())


@given(st.sampled_from(KINDS), st.integers(5, 9), st.integers(5, 9), st.floats(-2, 2), st.integers(0, 99))
def test_an_update_acts_as_its_dense_form(kind: str, rows: int, columns: int, strength: float, seed: int) -> None:
    made = update((rows, columns), kind, seed)
    x, y = draw(2, 3, rows, seed=seed + 2), draw(2, 3, columns, seed=seed + 3)
    dense = made.dense((rows, columns))
    assert dense.shape == (rows, columns)
    torch.testing.assert_close(made.apply(x, y, strength), y + strength * (x @ dense), **TIGHT)
    torch.testing.assert_close(made.apply(x[0], y[0]), y[0] + x[0] @ dense, **TIGHT)
    assert made.misfit((rows, columns)) is None
    if kind in ("rows", "columns"):
        index = getattr(made, kind)
        rest = torch.ones((rows, columns)[kind == "columns"], dtype=torch.bool)
        rest[index] = False
        assert not bool((dense if kind == "rows" else dense.t())[rest].any())


# --- with masks, with one another -----------------------------------------------------------------------------------------


def orders(model: Any, delta: Intervention, other: Intervention, act: Callable[[], Any]) -> Iterator[Any]:
    """Run something under both, composed and nested in both orders."""
    for nested in ([delta + other], [other + delta], [delta, other], [other, delta]):
        with ExitStack() as stack:
            for one in nested:
                stack.enter_context(one.on(model))
            yield act()


MASKED = ["gpt2", "neox", "opt", "llama", "gemma2", "phi3", "gpt2-compat", "native-llama", *tiny.HOOKED]
if not tiny.HOOKED:  # TransformerLens 3.9 leaves the processed weights of a gated MLP in float32
    MASKED.append("llama-compat")


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("kinds", [["mlp.post"], ["attn.z"], ["mlp.pre", "attn.q", "attn.v"]], ids="+".join)
def test_with_a_mask_it_is_the_edited_model_under_the_mask(name: str, kinds: list[str]) -> None:
    model = exact(name)
    delta, mask = whole(model, name), Ablate(selection_of(model, kinds), 0.7)
    expected = under(twin(name), mask)
    for got in orders(model, delta, mask, lambda: tiny.logits(model)):
        torch.testing.assert_close(got, expected, **TIGHT)


@pytest.mark.parametrize("name", ["gpt2", "llama", *tiny.HOOKED[:1]])
@pytest.mark.parametrize("rule", ["deterministic", "random"])
def test_with_an_adjustment_it_is_the_edited_model_adjusted(name: str, rule: Any) -> None:
    model = exact(name)
    chosen = selection_of(model)
    ones = chosen.map(lambda mask: torch.ones(mask.shape))
    adjust = Adjust(chosen, 0.1 * ones, ones, -0.2 * ones, 0.5 * ones, rule)
    delta = whole(model, name)
    expected = under(twin(name), adjust)
    for got in orders(model, delta, adjust, lambda: tiny.logits(model)):
        torch.testing.assert_close(got, expected, **TIGHT)


@pytest.mark.parametrize("name", ["gpt2", "llama", *tiny.HOOKED[:1]])
def test_with_an_abstention_the_keys_are_those_of_the_edited_model(name: str) -> None:
    model = exact(name)
    delta = whole(model, name)
    other = twin(name)
    tokens = tiny.some_tokens(4, 6)
    with watching(other, LAST) as seen:
        tiny.logits(other, tokens)
    region = Box(seen[0][:1, -1].float(), torch.ones(64), 0.05)
    abstain = Abstain({LAST: region})
    with abstain.on(other) as live:
        expected = tiny.logits(other, tokens)
        assert live.abstained.tolist() == [True, False, False, False]
    with abstain.on(model) as live:
        tiny.logits(model, tokens)
        assert not live.abstained.any(), "without the delta, the key is elsewhere"
    for got in orders(model, delta, abstain, lambda: tiny.logits(model, tokens)):
        torch.testing.assert_close(got, expected, **TIGHT)


@pytest.mark.parametrize("name", FEW)
def test_deltas_on_one_matrix_add(name: str) -> None:
    model = exact(name)
    shapes = matrix_shapes(model, [Matrix(0, "W_out"), Matrix(1, "W_K")])
    first = {matrix: update(shape, "rows", 1) for matrix, shape in shapes.items()}
    second = {matrix: update(shape, "rank", 2) for matrix, shape in shapes.items()}
    one, other = Delta(first, 0.5), Delta(second, -1.5)
    total = edits_of(one, model)
    total = {m: total[m] + change for m, change in edits_of(other, model).items()}
    expected = tiny.logits(edited(name, total))
    for got in orders(model, one, other, lambda: tiny.logits(model)):
        torch.testing.assert_close(got, expected, **TIGHT)


@pytest.mark.parametrize("name", FEW)
def test_the_strength_is_a_dial_and_zero_is_bitwise_the_model(name: str) -> None:
    model = exact(name)
    delta = whole(model, name)
    assert torch.equal(under(model, delta.at(0)), tiny.logits(model))
    assert torch.equal(under(model, delta * 0.5), under(model, delta.at(0.25)))
    assert torch.equal(under(model, 2 * delta), under(model, delta.at(1.0)))
    assert (-delta).strength == -0.5
    torch.testing.assert_close(under(model, delta + -delta), tiny.logits(model), **TIGHT)
    opposite = tiny.logits(edited(name, {m: -change for m, change in edits_of(delta, model).items()}))
    torch.testing.assert_close(under(model, -delta), opposite, **TIGHT)


@pytest.mark.parametrize("name", FEW)
def test_an_ablation_is_a_delta(name: str) -> None:
    model = exact(name)
    ablation = Ablate(selection_of(model, ["mlp.post", "attn.z"]))
    delta = Delta.from_ablation(ablation, model)
    with unchanged(model):
        torch.testing.assert_close(under(model, delta), under(model, ablation), **TIGHT)


def test_what_is_no_weight_edit_becomes_no_delta() -> None:
    model = exact("gpt2")
    chosen = selection_of(model)
    for ablation in (
        Ablate(chosen, 0.5),
        Ablate(chosen, chosen.map(lambda mask: torch.zeros(mask.shape))),
        Ablate(selection_of(model, "mlp.pre")),
    ):
        with pytest.raises(SelectionError, match="is no change of weights"):
            Delta.from_ablation(ablation, model)


# --- training ---------------------------------------------------------------------------------------------------------------


def loss_of(logits: Any) -> Tensor:
    logits = logits if isinstance(logits, Tensor) else logits.logits
    return logits.log_softmax(-1)[..., 5].square().sum()


@pytest.mark.parametrize("name", [*tiny.DENSE, "gpt2-compat", "native-llama", *tiny.HOOKED])
def test_gradients_are_those_of_the_edited_weights(name: str) -> None:
    model = exact(name)
    delta = whole(model, name).at(1.0)
    for one in delta.updates.values():
        one.value.requires_grad_()
    leaves = [one.value for one in delta.updates.values()]
    with delta.on(model):
        got = torch.autograd.grad(loss_of(model(tiny.some_tokens())), leaves)
    plain = edited(name, edits_of(delta, model)).requires_grad_(True)
    loss_of(plain(tiny.some_tokens())).backward()
    for (matrix, one), grad in zip(delta.updates.items(), got, strict=True):
        if name in tiny.ARCHITECTURES:
            dense = tiny.matrix_in(tiny.weight_of(plain, name, *matrix).grad, name, matrix.name).flatten(1)
        else:
            dense = tiny.matrix_in_place(plain, *matrix, gradient=True).flatten(1)
        if one.rows is not None:
            dense = dense[one.rows]
        elif one.columns is not None:
            dense = dense[:, one.columns]
        elif one.right is not None:
            dense = dense @ one.right.t()
        assert float(dense.abs().max()) > 1e-6
        torch.testing.assert_close(grad, dense, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("needs", [True, False], ids=["leaf", "constant"])
@pytest.mark.parametrize("name", ["gpt2", *tiny.HOOKED[:1]])
def test_values_changed_in_place_act_at_the_next_forward(name: str, dtype: torch.dtype, needs: bool) -> None:
    """Also where they are cast, and so cannot be the tensors that act."""
    model = exact(name)
    value = torch.zeros(64, 32, dtype=dtype, requires_grad=needs)
    matrix = Matrix(0, "W_out")
    with Delta({matrix: Update(value)}).on(model):
        torch.testing.assert_close(tiny.logits(model), tiny.logits(edited(name, {})), **TIGHT)
        for step in range(3):
            if needs:  # and the graph of one step is not that of the next
                loss_of(model(tiny.some_tokens())).backward()
                assert value.grad is not None
                assert value.grad.dtype == dtype
            with torch.no_grad():
                value += draw(64, 32, seed=step).to(dtype)
            expected = edited(name, {matrix: value.detach().double()})
            torch.testing.assert_close(tiny.logits(model), tiny.logits(expected), **TIGHT)


@pytest.mark.parametrize("name", ["llama", "gpt2", *tiny.HOOKED[:1]])
@pytest.mark.parametrize("trainable", [True, False])
def test_the_models_own_parameters_stay_out_of_it(name: str, trainable: bool) -> None:
    model = build(name)
    for parameter in model.parameters():
        parameter.requires_grad_(trainable)
    leaf = torch.zeros(64, 32, dtype=torch.float64, requires_grad=True)
    before = tiny.weights_hash(model)
    with Delta({Matrix(1, "W_out"): Update(leaf)}).on(model):
        [grad] = torch.autograd.grad(loss_of(model(tiny.some_tokens())), [leaf])
    assert float(grad.abs().max()) > 0
    assert all(p.grad is None and p.requires_grad == trainable for p in model.parameters())
    assert tiny.weights_hash(model) == before


def test_training_with_a_stock_optimizer_reaches_the_target() -> None:
    model = exact("llama")
    leaf = torch.zeros(3, 32, dtype=torch.float64, requires_grad=True)
    delta = Delta({Matrix(1, "W_out"): Update(leaf, rows=torch.tensor([4, 9, 33]))})
    optimizer, losses = torch.optim.AdamW([leaf], lr=0.05), []
    with unchanged(model), delta.on(model):
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(tiny.some_tokens()).log_softmax(-1)[..., 5].mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    expected = edited("llama", edits_of(delta, model))
    torch.testing.assert_close(under(model, delta), tiny.logits(expected), **TIGHT)


# --- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
def test_a_file_holds_the_same_delta(name: str, tmp_path: Path) -> None:
    model = exact(name)
    delta = whole(model, name)
    for one in delta.updates.values():
        one.value.requires_grad_()
    path = tmp_path / "delta.safetensors"
    delta.save(path, model, note="of a test")
    read = lu.load_intervention(path, model)
    assert isinstance(read, Delta)
    assert repr(read) == repr(delta)
    assert list(read.updates) == list(delta.updates)
    for matrix, one in delta.updates.items():
        for part, tensor in one.tensors().items():
            assert torch.equal(read.updates[matrix].tensors()[part], tensor)
    assert not any(one.value.requires_grad for one in read.updates.values())
    assert torch.equal(under(model, read), under(model, delta))


def test_updates_may_share_tensors_and_a_chain_holds_them(tmp_path: Path) -> None:
    model, neurons = exact("llama"), torch.tensor([1, 5])
    value = draw(32, 2)
    delta = Delta({(0, name): Update(value, columns=neurons) for name in ("W_in", "W_gate")})
    both = delta + Ablate(selection_of(model))
    both.save(tmp_path / "both.safetensors", model)
    read = lu.load_intervention(tmp_path / "both.safetensors", model)
    assert repr(read) == repr(both)
    assert torch.equal(under(model, read), under(model, both))


def test_another_models_file_is_refused(tmp_path: Path) -> None:
    delta = whole(exact("gpt2"), "gpt2")
    delta.save(tmp_path / "delta.safetensors", exact("gpt2"))
    with pytest.raises(ArtefactError, match="weights: .* in the file"):
        lu.load_intervention(tmp_path / "delta.safetensors", exact("llama"))
    with pytest.raises(ArtefactError, match="processing: bridge in the file, bridge, compatibility mode"):
        lu.load_intervention(tmp_path / "delta.safetensors", exact("gpt2-compat"))


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"L0.W_out/value": torch.ones(2, 3), "L0.W_out/rows": torch.tensor([0])},
        {"L0.W_out/value": torch.ones(2, 3), "L0.W_out/other": torch.ones(1)},
        {"L0.W_out/rows": torch.tensor([0])},
        {"L0.W_up/value": torch.ones(2, 3)},
        {"W_out": torch.ones(2, 3)},
        {"L0.W_out/value": torch.ones(2, 3).long()},
    ],
)
def test_a_sound_file_with_false_content_is_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    from lens_unlearn.core import artefacts

    path = tmp_path / "delta.safetensors"
    artefacts.write(path, "intervention", tensors, {"intervention": {"kind": "delta", "strength": 1.0}})
    with pytest.raises(lu.LensUnlearnError):
        lu.load_intervention(path)


def test_show_says_it_in_words(tmp_path: Path) -> None:
    delta = Delta({(0, "W_out"): update((64, 32), "rows"), (1, "W_Q"): update((32, 32), "rank")}, 0.5)
    delta.save(tmp_path / "delta.safetensors", exact("gpt2"))
    output = CliRunner().invoke(app, ["show", str(tmp_path / "delta.safetensors")]).output
    assert repr(delta) in output
    assert "L0.W_out: Update(5 rows)" in output
    assert "L1.W_Q: Update(rank 3)" in output


def test_a_delta_says_what_it_is() -> None:
    rows = {Matrix(layer, "W_out"): Update(torch.zeros(600, 250), rows=torch.arange(600)) for layer in (1, 0)}
    assert repr(Delta(rows)) == "Delta(strength 1, 2 matrices, 1,200 rows of W_out, 1.2 MB)"
    mixed = {"L0.W_Q": update((32, 32)), "L0.W_K": update((32, 32), "rank"), "L0.W_in": update((32, 64), "columns")}
    assert repr(Delta(mixed, -2)) == "Delta(strength -2, 3 matrices, W_Q, W_K of rank 3, 5 columns of W_in, 0.0 MB)"
    assert repr(Delta({(3, "W_O"): update((4, 4))})) == "Delta(strength 1, 1 matrix, W_O, 0.0 MB)"
    assert list(Delta(rows).updates) == [Matrix(0, "W_out"), Matrix(1, "W_out")]
    assert repr(update((32, 64))) == "Update(32 x 64)"
    assert Matrix.parse("L3.W_out") == Matrix(3, "W_out")
    assert str(Matrix(3, "W_out")) == "L3.W_out"


# --- merging -----------------------------------------------------------------------------------------------------------------


def test_merged_into_a_plain_model_it_gives_the_same_logits(dense: str) -> None:
    model, plain = exact(dense), tiny.hugging_face(dense).double()
    delta = whole(model, dense)
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    needs = [parameter.requires_grad for parameter in plain.parameters()]
    assert delta.merge_into(plain, model) is plain
    torch.testing.assert_close(tiny.logits(plain), under(model, delta), **TIGHT)
    assert [parameter.requires_grad for parameter in plain.parameters()] == needs
    none = (delta + -delta).merge_into(tiny.hugging_face(dense).double(), model)
    for name, tensor in none.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-14)


def test_a_merged_model_can_be_saved_and_bridged(tmp_path: Path) -> None:
    model, plain = exact("phi3"), tiny.hugging_face("phi3").double()
    delta = whole(model, "phi3")
    delta.merge_into(plain, model).save_pretrained(tmp_path)
    read = type(plain).from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager").eval()
    torch.testing.assert_close(tiny.logits(tiny.to_bridge(read, "phi3")), under(model, delta), **TIGHT)


def test_only_the_rows_of_the_update_are_written() -> None:
    plain = tiny.hugging_face("llama").to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    update = Update(draw(2, 32), rows=torch.tensor([3, 8]))
    Delta({(1, "W_out"): update}).merge_into(plain, tiny.model("llama"))
    changed = [name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    columns = (plain.state_dict()[changed[0]] != before[changed[0]]).any(0)
    assert columns.nonzero()[:, 0].tolist() == [3, 8]


@pytest.mark.parametrize("name", ["gpt2", "native-gpt2", "gpt2-compat", *tiny.HOOKED[:1]])
def test_a_model_of_transformer_lens_is_not_merged_into(name: str) -> None:
    model = exact(name)
    delta = whole(model, name)
    with unchanged(model), pytest.raises(ModelError, match="belongs to TransformerLens"):
        delta.merge_into(model, model)
    if name == "gpt2":
        with pytest.raises(ModelError, match="belongs to TransformerLens"):
            delta.merge_into(model.original_model, model)


def test_unknown_architectures_and_other_sizes_are_not_merged_into() -> None:
    delta = Delta({(0, "W_out"): update((64, 32)), (1, "W_gate"): update((32, 65))})
    with pytest.raises(ModelError, match="MixtralForCausalLM of type 'mixtral' cannot be merged into: known are gpt2"):
        delta.merge_into(tiny.hugging_face("mixtral"), exact("llama"))
    for thing in (torch.nn.Identity(), None, "gpt2"):
        with pytest.raises(ModelError, match="cannot be merged into"):
            delta.merge_into(thing, exact("llama"))
    for name, error, message in (
        ("llama", SelectionError, "L1.W_gate does not fit: it has 65 columns, and the matrix 64"),
        ("gpt2", SiteError, "L1.W_gate does not exist"),
    ):
        plain = tiny.hugging_face(name)
        before = tiny.weights_hash(plain)
        with pytest.raises(error, match=message):
            delta.merge_into(plain, exact(name))
        assert tiny.weights_hash(plain) == before, "nothing was written before everything was checked"


# --- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({(2, "W_out"): update((64, 32))}, r"L2.W_out is not in this model: its layers are 0 to 1"),
        ({(0, "W_gate"): update((32, 64))}, r"L0.W_gate does not exist in this model: layer 0 has W_Q, W_K, W_V, W_O, W_in, W_out"),
        ({(0, "W_out"): update((65, 32))}, r"L0.W_out does not fit: it has 65 rows, and the matrix 64 in this model"),
        ({(0, "W_out"): update((64, 33))}, r"it has 33 columns, and the matrix 32"),
        ({(0, "W_out"): update((65, 32), "rank")}, r"it has 65 rows, and the matrix 64"),
        ({(1, "W_out"): Update(draw(1, 32), rows=torch.tensor([64]))}, r"L1.W_out does not fit: one of its rows is 64"),
        ({(1, "W_in"): Update(draw(32, 1), columns=torch.tensor([64]))}, r"one of its columns is 64"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["gpt2", *tiny.HOOKED[:1]])
def test_what_does_not_fit_is_refused_before_any_hook_is_added(name: str, updates: Any, message: str) -> None:
    model = tiny.model(name)
    delta = Delta({**updates, (0, "W_Q"): update((32, 32))})
    with unchanged(model):
        for strength in (1, 0):
            with pytest.raises((SiteError, SelectionError), match=message), (delta.at(strength) + Chain(())).on(model):
                pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Delta({}), "nothing would be changed"),
        (lambda: Delta({(0, "W_out"): Update(torch.ones(0, 4), rows=torch.zeros(0).long())}), "nothing would be changed"),
        (lambda: Delta({(0, "W_up"): update((2, 2))}), "no matrix 'W_up': choose from W_Q"),
        (lambda: Delta({"L0.mlp.post": update((2, 2))}), "is not a matrix: write it as 'L3.W_out'"),
        (lambda: Delta({(0, "W_out"): torch.ones(2, 2)}), "L0.W_out is given a Tensor"),
        (lambda: Delta({(0, "W_out"): update((8, 8))}, float("nan")), "strength=nan"),
        (lambda: Update(torch.ones(3)), "give a matrix of floats"),
        (lambda: Update(torch.ones(3, 3).long()), "give a matrix of floats"),
        (lambda: Update(torch.full((3, 3), float("inf"))), "NaN or infinity"),
        (lambda: Update(torch.ones(3, 3), rows=torch.tensor([0, 1, 1])), "one of its rows twice"),
        (lambda: Update(torch.ones(3, 3), rows=torch.tensor([0, 1, -1])), "or a negative one"),
        (lambda: Update(torch.ones(3, 3), columns=torch.tensor([0, 1])), "names 2 columns, but has values for 3"),
        (lambda: Update(torch.ones(3, 3), columns=torch.ones(3).bool()), "give a vector of their indices"),
        (lambda: Update(torch.ones(3, 3), rows=torch.arange(3), columns=torch.arange(3)), "give at most one of"),
        (lambda: Update(torch.ones(3, 3), right=torch.ones(2, 3)), "is no product"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((SelectionError, SiteError), match=message):
        make()


def test_attention_beside_a_mixture_of_experts_has_deltas() -> None:
    model, plain = tiny.model("mixtral"), tiny.hugging_face("mixtral")
    delta = Delta({(0, "W_Q"): update((32, 32)), (1, "W_O"): update((32, 32))})
    for (layer, name), change in edits_of(delta, model).items():
        with torch.no_grad():
            tiny.matrix_in(tiny.weight_of(plain, "mixtral", layer, name), "mixtral", name).add_(change)
    torch.testing.assert_close(under(model, delta), tiny.logits(plain), rtol=1e-4, atol=1e-4)


def test_mixtures_of_experts_and_training_mode_are_refused() -> None:
    mixtral = tiny.model("mixtral")
    delta = Delta({(0, "W_out"): update((64, 32))})
    with pytest.raises(SiteError, match="layer 0 has W_Q, W_K, W_V, W_O"), delta.on(mixtral):
        pass
    model = build("gpt2").train()
    with pytest.raises(ModelError, match="training mode"), delta.on(model):
        pass
    with pytest.raises(ModelError, match="no hook points"), delta.on(tiny.hugging_face("gpt2")):
        pass


@pytest.mark.parametrize("name", ["llama", "gpt2", *tiny.HOOKED[:1]])
def test_options_that_split_a_matrix_by_heads_are_refused_while_they_are_on(name: str) -> None:
    model = build(name)
    for option, matrix in (("use_attn_result", "W_O"), ("use_split_qkv_input", "W_Q"), ("use_attn_in", "W_V")):
        delta = Delta({(0, matrix): update(matrix_shape(model, 0, matrix))})
        getattr(model, f"set_{option}")(True)
        with pytest.raises(SiteError, match=rf"under {option}: call model.set_{option}\(False\)"), delta.on(model):
            pass
        getattr(model, f"set_{option}")(False)
        assert not torch.equal(under(model, delta), tiny.logits(model))


# --- afterwards nothing is different ------------------------------------------------------------------------------------


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, n: int, *, after: bool) -> Iterator[FailingAt]:
    faulty = FailingAt(getattr(owner, name), n, Fault, after=after)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *a, **k: faulty(*a, **k))
        yield faulty


@pytest.mark.parametrize("name", ["gpt2", "phi3", *tiny.HOOKED[1:2]])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("where", ["register_forward_hook", "register_forward_pre_hook"])
def test_when_the_nth_hook_cannot_be_added_none_stays(
    monkeypatch: pytest.MonkeyPatch, name: str, after: bool, where: str
) -> None:
    model = exact(name)
    delta = whole(model, name) + Ablate(selection_of(model))
    through = 0
    for n in range(80):
        with unchanged(model), failing(monkeypatch, torch.nn.Module, where, n, after=after) as faulty:
            try:
                under(model, delta)
                through = n
            except Fault:
                continue
        assert faulty.calls == n
        break
    bridged = hasattr(model, "original_model")
    assert through >= (10 if not bridged or where == "register_forward_hook" else 0)


@pytest.mark.parametrize("name", ["gpt2", *tiny.HOOKED[:1]])
@pytest.mark.parametrize("error", [Fault, KeyboardInterrupt, torch.OutOfMemoryError])
def test_after_an_error_anywhere_nothing_is_different(
    monkeypatch: pytest.MonkeyPatch, name: str, error: type[BaseException]
) -> None:
    model = exact(name)
    delta = whole(model, name)

    def act(*, fail: bool) -> None:
        with delta.on(model):
            tiny.logits(model)
            if fail:
                raise error

    with unchanged(model), pytest.raises(error):
        act(fail=True)
    for n in (0, 1, 5, 11):
        faulty = FailingAt(Update.apply, n, error)
        with unchanged(model), monkeypatch.context() as patch:
            patch.setattr(Update, "apply", lambda *a, f=faulty: f(*a))
            with pytest.raises(error):
                act(fail=False)
        assert faulty.calls == n + 1


def test_in_every_order_of_closing_the_rest_acts(each: str) -> None:
    model = exact(each)
    delta, mask = whole(model, each), Ablate(selection_of(model))
    only_mask, only_delta = under(model, mask), under(model, delta)
    for first, left in ((0, only_mask), (1, only_delta)):
        opened = [ExitStack(), ExitStack()]
        with unchanged(model):
            for stack, one in zip(opened, (delta, mask), strict=True):
                stack.enter_context(one.on(model))
            opened[first].close()
            assert torch.equal(tiny.logits(model), left)
            opened[1 - first].close()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt2-compat", *tiny.HOOKED])
def test_it_survives_the_users_own_hooks_and_is_seen_by_them(name: str) -> None:
    model = tiny.model(name)
    delta = whole(model, name)
    alone = under(model, delta)
    seen: list[Tensor] = []
    with unchanged(model), delta.on(model):
        _, cache = model.run_with_cache(tiny.some_tokens())
        model.run_with_hooks(tiny.some_tokens(), fwd_hooks=[("blocks.1.hook_mlp_out", lambda t, hook: seen.append(t))])
        model.reset_hooks()
        assert torch.equal(tiny.logits(model), alone)
    torch.testing.assert_close(cache["blocks.1.hook_mlp_out"], seen[0])
    with torch.no_grad():
        _, clean = model.run_with_cache(tiny.some_tokens())
    for place in ("attn.hook_q", "attn.hook_v", "mlp.hook_pre", "hook_mlp_out", "hook_attn_out"):
        assert not torch.allclose(cache[f"blocks.0.{place}"], clean[f"blocks.0.{place}"], atol=1e-3)


def test_when_a_delta_is_torn_out_it_says_so() -> None:
    model = exact("gpt2")
    linear = model.blocks[0].mlp.out.original_component

    def tear() -> None:
        with Delta({(0, "W_out"): update((64, 32))}).on(model):
            linear._forward_hooks.clear()
            linear._forward_hooks_with_kwargs.clear()

    with unchanged(model), pytest.warns(RuntimeWarning, match="were removed inside its block"):
        tear()


@pytest.mark.parametrize("name", ["gpt2", *tiny.HOOKED[:1]])
def test_the_input_is_seen_behind_masks_that_come_later(name: str) -> None:
    model = exact(name)
    seen: list[Tensor] = []
    remove = on_matrix(model, 0, "W_out", lambda x, y: seen.append(x) or y)
    mask = selection_of(model, "L0.mlp.post")
    under(model, Ablate(mask, 3.0))
    assert remove()
    assert not remove()
    assert bool((seen[0][..., next(iter(mask.items()))[1]] == 3.0).all())


# --- generation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "neox", "gemma2", "phi3", "gpt2-compat", *tiny.HOOKED[:2]])
def test_generation_is_the_same_with_and_without_a_cache(name: str) -> None:
    model = tiny.speaking(name)
    delta = whole(model, name)
    tokens, options = (
        tiny.some_tokens(2, 5),
        {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False},
    )
    base = model.generate(tokens, use_past_kv_cache=True, **options)
    with unchanged(model), delta.on(model):
        cached, whole_rows = (model.generate(tokens, use_past_kv_cache=cache, **options) for cache in (True, False))
        greedy = tokens
        for _ in range(4):
            greedy = torch.cat([greedy, tiny.logits(model, greedy)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, whole_rows)
    assert torch.equal(cached, greedy)
    assert not torch.equal(cached, base)
