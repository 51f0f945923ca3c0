"""Controls: random neurons are drawn from what a method could have chosen, random updates have the same singular values."""

import re
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interventions_helpers import selection_of

from lens_unlearn import methods
from lens_unlearn.core.errors import SelectionError
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.interventions.base import Placed
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.update import Update
from lens_unlearn.methods.controls import controls_for, random_delta, random_pruning
from lens_unlearn.methods.method import Method
from lens_unlearn.methods.neuron_adjust import neuron_adjust
from lens_unlearn.methods.selective_pruning import pruning_moments, selective_pruning
from lens_unlearn.model.matrices import Matrix
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.maps import NeuronMap

FORGET, RETAIN = tiny.corpus((9, 14, 11, 20), seed=1, name="forget"), tiny.corpus((12, 7, 16, 9), seed=2, name="retain")
QUIET: dict[str, Any] = {"progress": False}
DEAD = {"mlp.post": torch.arange(64) % 2 == 0, "mlp.pre": torch.arange(64) % 2 == 0, "attn.z": torch.arange(32) < 16}
"""Every other MLP neuron, and the first two heads."""


@pytest.fixture(scope="module")
def half_dead() -> Any:
    """An OPT in which half of the neurons of each kind never vary."""
    plain = tiny.hugging_face("opt")
    with torch.no_grad():
        for layer in range(tiny.LAYERS):
            block = tiny.block(plain, "opt", layer)
            block.fc1.weight[DEAD["mlp.pre"]] = 0
            block.fc1.bias[DEAD["mlp.pre"]] = -1
            block.self_attn.v_proj.weight[DEAD["attn.z"]] = 0
            block.self_attn.v_proj.bias[DEAD["attn.z"]] = 0
    return tiny.to_bridge(plain, "opt")


def dead_in(selection: NeuronMap) -> int:
    return sum(int((chosen.reshape(-1) & DEAD[site.kind]).sum()) for site, chosen in selection.items())


def counts(selection: NeuronMap) -> dict[Site, int]:
    return {site: int(chosen.sum()) for site, chosen in selection.items()}


# --- random neurons ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("selective-pruning", {"fraction": 0.2}),
        ("selective-pruning", {"fraction": 0.2, "steps": 3}),
        ("selective-pruning", {"fraction": 0.2, "within": "layer", "replacement": "mean"}),
        ("selective-pruning-attention", {"fraction": 0.2}),
        ("selective-pruning-attention", {"fraction": 0.25, "unit": "head"}),
        ("neuron-adjust", {"fraction": 0.2}),
        ("neuron-adjust", {"fraction": 0.2, "rank_by": "hellinger"}),
    ],
)
def test_no_control_of_a_method_draws_what_the_method_would_never_choose(
    half_dead: Any, name: str, options: dict[str, Any]
) -> None:
    record = methods.by_name(name)
    fitted = record.fit(half_dead, FORGET, RETAIN, {**options, **QUIET})
    edit = record.at(half_dead, fitted, None, {**options, **QUIET})
    controls = record.controls(half_dead, edit, fitted, range(12), options=options)
    assert isinstance(edit, Ablate | Adjust)
    assert dead_in(edit.selection) == 0
    for control in controls:
        assert isinstance(control, Ablate | Adjust)
        assert counts(control.selection) == counts(edit.selection)
        assert dead_in(control.selection) == 0
    drawn = NeuronMap(
        {s: sum(c.selection[s].long() for c in controls) > 0 for s in edit.selection}  # type: ignore[union-attr]
    )
    assert drawn.count() > edit.selection.count(), "the controls differ"


def test_texts_moments_or_a_selection_say_what_may_be_drawn(half_dead: Any) -> None:
    prune = selective_pruning(half_dead, FORGET, RETAIN, fraction=0.3, **QUIET)
    moments = [collect(half_dead, corpus, "mlp.post", **QUIET) for corpus in (FORGET, RETAIN)]
    alive = (moments[0].std + moments[1].std) > 0
    by_texts = random_pruning(half_dead, FORGET, RETAIN, like=prune, seed=1, **QUIET).selection
    assert dead_in(by_texts) == 0
    for control in (
        random_pruning(half_dead, *moments, like=prune, seed=1),
        random_pruning(half_dead, like=prune, among=alive, seed=1),
        controls_for(half_dead, prune, [1], FORGET, RETAIN)[0],
    ):
        assert isinstance(control, Ablate)
        assert control.selection.equals(by_texts)
    assert dead_in(random_pruning(half_dead, like=prune, seed=1).selection) > 0, "without texts nothing is known"
    assert dead_in(random_pruning(half_dead, FORGET, RETAIN, fraction=0.4, **QUIET).selection) == 0
    elsewhere = collect(half_dead, FORGET, "attn.z", **QUIET)
    assert random_pruning(half_dead, elsewhere, like=prune).selection.equals(
        random_pruning(half_dead, like=prune).selection
    )


def test_neurons_that_one_text_alone_moves_may_be_drawn(half_dead: Any) -> None:
    moments = collect(half_dead, FORGET, "mlp.post", **QUIET)
    prune = Ablate(NeuronMap({Site(0, "mlp.post"): torch.arange(64) < 5}))
    still = torch.zeros(64, dtype=torch.bool)
    still[:8] = True
    known = moments.with_state(
        {name: torch.where(still, 0.0, t) if name.endswith("moments") else t for name, t in moments.state().items()}
    )
    first = torch.arange(64) < 8
    drawn = [random_pruning(half_dead, moments, known, like=prune, seed=seed).selection for seed in range(20)]
    assert any(bool((d[Site(0, "mlp.post")] & first).any()) for d in drawn)
    drawn = [random_pruning(half_dead, known, known, like=prune, seed=seed).selection for seed in range(20)]
    assert not any(bool((d[Site(0, "mlp.post")] & first).any()) for d in drawn)


def test_directions_are_drawn_where_the_rotated_values_vary() -> None:
    """Of each head the first half of the neurons is dead; in a basis that reverses them, the second half of the directions."""
    plain = tiny.hugging_face("opt")
    with torch.no_grad():
        for layer in range(tiny.LAYERS):
            value = tiny.block(plain, "opt", layer).self_attn.v_proj
            value.weight.view(4, 8, 32)[:, :4] = 0
            value.bias.view(4, 8)[:, :4] = 0
    model = tiny.to_bridge(plain, "opt")
    sites = [Site(layer, "attn.z") for layer in range(tiny.LAYERS)]
    chosen = NeuronMap({site: torch.arange(32).view(4, 8) % 8 > 5 for site in sites})
    reverse = NeuronMap({site: torch.eye(8).flip(0).expand(4, 8, 8) for site in sites})
    for basis, living in ((None, range(4, 8)), (reverse, range(4))):
        drawn = torch.zeros(8, dtype=torch.bool)
        for seed in range(10):
            control = random_pruning(model, FORGET, RETAIN, like=Ablate(chosen, basis=basis), seed=seed, **QUIET)
            assert control.basis is basis
            assert counts(control.selection) == counts(chosen)
            drawn |= control.selection.stack().any(0).any(0)
        assert drawn.nonzero()[:, 0].tolist() == [*living]


def test_moments_of_directions_say_the_same_as_texts() -> None:
    model = tiny.model("llama")
    prune = selective_pruning(model, FORGET, RETAIN, site="attn.z", unit="direction", fraction=0.2, **QUIET)
    known = [pruning_moments(model, c, site="attn.z", unit="direction", **QUIET) for c in (FORGET, RETAIN)]
    control = random_pruning(model, FORGET, RETAIN, like=prune, **QUIET)
    assert control.selection.equals(random_pruning(model, *known, like=prune).selection)


def test_too_few_candidates_are_refused_in_a_sentence(half_dead: Any) -> None:
    prune = Ablate(NeuronMap({Site(1, "mlp.post"): torch.arange(64) < 40}))
    words = (
        "L1.mlp.post: 40 neurons are to be drawn, and 32 of 64 are candidates (alive on forget or retain, or in among)"
    )
    with pytest.raises(SelectionError, match=re.escape(words)):
        random_pruning(half_dead, FORGET, RETAIN, like=prune, **QUIET)
    with pytest.raises(SelectionError, match="38 neurons are to be drawn, and 32 of 64"):
        random_pruning(half_dead, FORGET, RETAIN, fraction=0.6, **QUIET)
    heads = Ablate(NeuronMap({Site(0, "attn.z"): (torch.arange(4) < 3)[:, None].expand(4, 8)}))
    with pytest.raises(SelectionError, match="3 heads are to be drawn, and 2 of 4"):
        random_pruning(half_dead, FORGET, RETAIN, like=heads, **QUIET)
    with pytest.raises(SelectionError, match="among is no selection"):
        random_pruning(half_dead, like=prune, among=NeuronMap({Site(1, "mlp.post"): torch.ones(64)}))
    with pytest.raises(SelectionError, match=r"L1.mlp.post is not in this map"):
        random_pruning(half_dead, like=prune, among=NeuronMap({Site(0, "mlp.post"): torch.ones(64) > 0}))
    with pytest.raises(SelectionError, match=r"L1.mlp.post: candidates and neurons have shapes \(32,\) and \(64,\)"):
        random_pruning(half_dead, like=prune, among=NeuronMap({Site(1, "mlp.post"): torch.ones(32) > 0}))


def test_a_method_that_ran_out_of_living_neurons_still_has_its_control(half_dead: Any) -> None:
    record = methods.by_name("selective-pruning")
    fitted = record.fit(half_dead, FORGET, RETAIN, QUIET)
    edit = record.at(half_dead, fitted, 0.7, QUIET)
    assert isinstance(edit, Ablate)
    assert dead_in(edit.selection) > 0
    for control in record.controls(half_dead, edit, fitted, [0, 1]):
        assert isinstance(control, Ablate)
        assert counts(control.selection) == counts(edit.selection)


def test_the_control_of_a_method_of_ones_own_is_drawn_from_what_lives(half_dead: Any) -> None:
    def most_firing(model: Any, forget: Any, retain: Any, *, fraction: float = 0.2) -> Ablate:
        return Ablate(forget.positive.top(fraction))

    record = Method(name="most-firing", function=most_firing, fitted_to=methods.by_name("selective-pruning").fitted_to)
    fitted = record.fit(half_dead, FORGET, RETAIN, {})
    edit = record.at(half_dead, fitted, None, {})
    assert [dead_in(c.selection) for c in record.controls(half_dead, edit, fitted, range(3))] == [0, 0, 0]  # type: ignore[attr-defined]


def test_an_adjustment_without_texts_has_a_control_too(half_dead: Any) -> None:
    edit = neuron_adjust(half_dead, FORGET, RETAIN, fraction=0.3, **QUIET)
    assert counts(controls_for(half_dead, edit, [0])[0].selection) == counts(edit.selection)  # type: ignore[attr-defined]


# --- random updates ------------------------------------------------------------------------------------------------------

IN, OUT = 24, 40
MATRIX = Matrix(0, "W_in")


def trained(form: str, rank: int, seed: int = 0, dtype: np.dtype[Any] | type = np.float64) -> Update:
    """An update of a form and rank, whose singular values fall."""
    random = np.random.default_rng(seed)
    shape = {"rows": (5, OUT), "columns": (IN, 7)}.get(form, (IN, OUT))
    left, right = random.normal(size=(shape[0], rank)), random.normal(size=(rank, shape[1]))
    left = (left * 0.5 ** np.arange(rank)).astype(dtype)
    if form == "thin":
        return Update(torch.from_numpy(left), right=torch.from_numpy(right.astype(dtype)))
    value = torch.from_numpy((left @ right).astype(dtype))
    index = {form: torch.arange(min(value.shape)) * 2} if form in ("rows", "columns") else {}
    return Update(value, **index)


def matrix_of(update: Update) -> np.ndarray:
    value = update.value.double().numpy()
    return value if update.right is None else value @ update.right.double().numpy()


def control_of(update: Update, seed: int = 0, matrix: Matrix = MATRIX) -> Update:
    return random_delta(Delta({matrix: update}), seed=seed).updates[matrix]


@settings(max_examples=30)
@given(
    form=st.sampled_from(["dense", "thin", "rows", "columns"]),
    rank=st.integers(1, 5),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([np.float64, np.float32]),
)
def test_a_random_update_has_the_singular_values_the_form_and_the_rank(
    form: str, rank: int, seed: int, dtype: type
) -> None:
    update = trained(form, rank, seed, dtype)
    control = control_of(update, seed)
    digits = 1e-10 if dtype is np.float64 else 1e-5
    expected, found = (np.linalg.svd(matrix_of(u), compute_uv=False) for u in (update, control))
    np.testing.assert_allclose(found, expected, rtol=0, atol=digits * expected[0])
    assert np.linalg.matrix_rank(matrix_of(control), tol=100 * digits * expected[0]) == rank
    assert (control.kind, control.value.dtype) == (update.kind, update.value.dtype)
    assert control.value.shape == update.value.shape
    for name in ("rows", "columns"):
        index = getattr(update, name)
        assert index is None or torch.equal(getattr(control, name), index)


def test_the_directions_of_a_random_update_are_uniform_and_know_nothing_of_the_trained_one() -> None:
    """Of a uniform direction u in n dimensions, E u u^T = I / n, and E (u . v)^2 = 1 / n for any v; the sign is even."""
    draws = 400
    for form, n, side in (("dense", IN, 0), ("dense", OUT, 1), ("thin", IN, 0), ("thin", OUT, 1), ("rows", 5, 0)):
        update = trained(form, 3)
        own = np.linalg.svd(matrix_of(update))[0 if side == 0 else 2]
        own = own[:, 0] if side == 0 else own[0]
        second, overlap = np.zeros((n, n)), []
        for seed in range(draws):
            u, _, v = np.linalg.svd(matrix_of(control_of(update, seed)), full_matrices=False)
            one = u[:, 0] if side == 0 else v[0]
            second += np.outer(one, one) / draws
            overlap.append((one @ own) ** 2)
        deviation = np.abs(second - np.eye(n) / n).max()
        assert deviation < 6 / n / draws**0.5 * 1.5, (form, side)
        # (u . v)^2 is Beta(1/2, (n - 1) / 2): its mean 1/n, its variance 2 (n - 1) / (n^2 (n + 2)).
        spread = (2 * (n - 1) / (n**2 * (n + 2)) / draws) ** 0.5
        assert abs(np.mean(overlap) - 1 / n) < 4.5 * spread, (form, side)


def test_the_sign_of_a_drawn_matrix_is_even() -> None:
    """Without the sign fix, LAPACK's Q has a diagonal of one sign."""
    from lens_unlearn.methods.controls import _orthonormal

    cpu = torch.device("cpu")
    drawn = [_orthonormal(4, 4, torch.Generator().manual_seed(seed), cpu).numpy() for seed in range(600)]
    for q in drawn[:20]:
        np.testing.assert_allclose(q.T @ q, np.eye(4), atol=1e-12)
    positive = np.mean([q > 0 for q in drawn], axis=0)
    assert np.abs(positive - 0.5).max() < 4.5 * 0.5 / 600**0.5
    determinants = [np.linalg.det(q) for q in drawn]
    assert abs(np.mean(determinants)) < 4.5 / 600**0.5, "rotations and reflections alike"


def test_seeds_matrices_and_nothing_else_decide_what_is_drawn() -> None:
    update = trained("dense", 3)
    same, other = control_of(update, 1), control_of(update, 2)
    assert torch.equal(control_of(update, 1).value, same.value)
    assert not torch.allclose(other.value, same.value)
    assert not torch.allclose(control_of(update, 1, Matrix(1, "W_in")).value, same.value)
    whole = random_delta(Delta({MATRIX: update, Matrix(1, "W_Q"): trained("thin", 2)}, strength=0.5), seed=1)
    assert torch.equal(whole.updates[MATRIX].value, same.value)
    assert whole.strength == 0.5


def test_an_update_of_nothing_and_of_full_rank_have_controls() -> None:
    zero = Update(torch.zeros(IN, OUT))
    assert not control_of(zero).value.any()
    thin = Update(torch.ones(IN, 2), right=torch.zeros(2, OUT))
    assert not matrix_of(control_of(thin)).any()
    none = Update(torch.zeros(0, OUT), rows=torch.zeros(0, dtype=torch.long))
    both = Delta({MATRIX: none, Matrix(1, "W_in"): trained("dense", 1)})
    assert random_delta(both).updates[MATRIX].value.shape == (0, OUT)
    random = np.random.default_rng(0)
    for update in (
        Update(torch.from_numpy(random.normal(size=(IN, OUT)))),
        Update(
            torch.from_numpy(random.normal(size=(IN, IN + 4))),
            right=torch.from_numpy(random.normal(size=(IN + 4, OUT))),
        ),
    ):
        expected, found = (np.linalg.svd(matrix_of(u), compute_uv=False) for u in (update, control_of(update)))
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_what_is_half_precision_stays_so_and_needs_no_gradient() -> None:
    leaf = torch.from_numpy(np.random.default_rng(0).normal(size=(IN, OUT))).bfloat16().requires_grad_()
    control = control_of(Update(leaf))
    assert control.value.dtype == torch.bfloat16
    assert not control.value.requires_grad
    expected, found = (np.linalg.svd(u.detach().double().numpy(), compute_uv=False) for u in (leaf, control.value))
    np.testing.assert_allclose(found, expected, atol=2e-2 * expected[0])


def test_the_control_of_what_acts_somewhere_only_acts_there() -> None:
    model = tiny.model("llama")
    prune = Ablate(selection_of(model))
    inner = controls_for(model, prune, [0, 1])
    controls = controls_for(model, prune.placed("generated", skip_special=True), [0, 1])
    assert len(controls) == 2
    for control, other in zip(controls, inner, strict=True):
        assert isinstance(control, Placed)
        assert (control.place.at, control.place.skip_special) == ("generated", True)
        assert isinstance(control.inner, Ablate)
        assert isinstance(other, Ablate)
        assert control.inner.selection.equals(other.selection)
    with pytest.raises(SelectionError, match="is no ablation: give one"):
        random_pruning(model, like=prune.placed("last"))  # type: ignore[arg-type]
