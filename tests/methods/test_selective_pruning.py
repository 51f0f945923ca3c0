"""Selective Pruning and its control: the paper's score from NumPy, planted neurons, steps, sites, heads and directions."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from collect_helpers import counted_values
from hypothesis import given
from hypothesis import strategies as st
from interventions_helpers import under, value_matrices
from selective_pruning_helpers import TEXTS_CODE, TEXTS_PROSE, planted

from lens_unlearn.core.errors import LensUnlearnError, SelectionError, SiteError
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.methods.controls import random_pruning
from lens_unlearn.methods.ov_basis import ov_basis
from lens_unlearn.methods.selective_pruning import IMPORTANCES, pruning_moments, pruning_score, selective_pruning
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.moments import Moments

FORGET, RETAIN = tiny.corpus((9, 14, 11, 20), seed=1, name="forget"), tiny.corpus((12, 7, 16, 9), seed=2, name="retain")
QUIET = {"progress": False}


def importance(kind: str, x: np.ndarray) -> np.ndarray:
    """The paper's definitions, over ``[tokens, neurons]``."""
    return {
        "abs": lambda: np.abs(x).mean(0),
        "freq": lambda: (x > 0).mean(0),
        "rms": lambda: np.sqrt((x**2).mean(0)),
        "std": lambda: np.sqrt(((x - x.mean(0)) ** 2).mean(0)),
        "sqrt": lambda: np.sqrt(np.abs(x)).mean(0),
    }[kind]()


def expected_scores(name: str, site_kind: str, kind: str, eps: float) -> np.ndarray:
    """Scores ``[layers, neurons]`` from plain hooks on the plain model."""
    got, kept = (counted_values(name, [site_kind], corpus) for corpus in (FORGET, RETAIN))
    return np.stack(
        [
            importance(kind, got[Site(layer, site_kind)]) / (importance(kind, kept[Site(layer, site_kind)]) + eps)
            for layer in range(tiny.LAYERS)
        ]
    )


def chosen_indices(selection: NeuronMap) -> set[int]:
    return {int(i) for i in selection.flat().nonzero()}


@pytest.mark.parametrize("kind", [*IMPORTANCES])
@pytest.mark.parametrize(
    ("name", "site", "eps"), [("gpt2", "mlp.post", 1e-3), ("llama", "mlp.post", 1e-3), ("neox", "attn.z", 1e-4)]
)
def test_the_highest_ratios_of_importance_are_pruned(name: str, site: str, eps: float, kind: str) -> None:
    scores = expected_scores(name, site, kind, eps).reshape(-1)
    count = round(0.1 * scores.size)
    order = np.argsort(-scores, kind="stable")
    # Only a clear gap makes the set of the best one certain in float32.
    while scores[order[count - 1]] - scores[order[count]] < 1e-4 * scores[order[count]]:
        count += 1
    prune = selective_pruning(
        tiny.model(name), FORGET, RETAIN, fraction=count / scores.size, importance=kind, site=site, **QUIET
    )
    assert prune.selection.count() == count
    assert chosen_indices(prune.selection) == set(order[:count].tolist())
    assert prune.value == 0.0


@pytest.mark.parametrize("kind", [*IMPORTANCES])
def test_the_score_is_the_ratio_with_the_papers_eps(kind: str) -> None:
    for name, site, eps in (("llama", "mlp.post", 1e-3), ("llama", "attn.z", 1e-4)):
        moments = [pruning_moments(tiny.model(name), c, importance=kind, site=site, **QUIET) for c in (FORGET, RETAIN)]
        for settings, used in ((None, eps), (0.5, 0.5), (0.0, 0.0)):
            score = pruning_score(*moments, importance=kind, eps=settings)
            np.testing.assert_allclose(
                score.stack().reshape(tiny.LAYERS, -1).numpy(), expected_scores(name, site, kind, used), rtol=1e-4
            )


def test_a_relative_eps_has_the_scale_of_its_layer() -> None:
    moments = [pruning_moments(tiny.model("gpt2"), c, **QUIET) for c in (FORGET, RETAIN)]
    score = pruning_score(*moments, eps=0.0, eps_relative=0.1)
    for layer in range(tiny.LAYERS):
        site = Site(layer, "mlp.post")
        top, bottom = (m.mean_abs[site].numpy() for m in moments)
        median = np.sort(bottom)[(len(bottom) - 1) // 2]
        np.testing.assert_allclose(score[site].numpy(), top / (bottom + 0.1 * median), rtol=1e-12)


def test_neither_moved_by_either_corpus_scores_zero_without_eps() -> None:
    x = torch.tensor([[0.0, 1.0, 1.0], [0.0, 2.0, -1.0]])
    moments = Moments()
    moments.update(Site(0, "mlp.post"), x, torch.ones(2))
    other = Moments()
    other.update(Site(0, "mlp.post"), x * torch.tensor([0.0, 0.0, 1.0]), torch.ones(2))
    assert pruning_score(moments, other, eps=0.0)[Site(0, "mlp.post")].tolist() == [0.0, float("inf"), 1.0]


def test_the_released_codes_variance_as_standard_deviation_scores_and_ranks_otherwise() -> None:
    """There, `std` is the ratio of variances and `rms` of sqrt(variance^2 + mean^2)."""
    got, kept = (counted_values("gpt2", ["mlp.post"], corpus) for corpus in (FORGET, RETAIN))

    def stacked(values: Any, function: Any) -> np.ndarray:
        return np.concatenate([function(values[Site(layer, "mlp.post")]) for layer in range(tiny.LAYERS)])

    def legacy_std(x: np.ndarray) -> np.ndarray:
        return x.var(0, ddof=1)

    def legacy_rms(x: np.ndarray) -> np.ndarray:
        return np.sqrt(x.var(0, ddof=1) ** 2 + x.mean(0) ** 2)

    scores = stacked(got, legacy_std) / (stacked(kept, legacy_std) + 1e-3)
    moments = [pruning_moments(tiny.model("gpt2"), corpus, importance="std", **QUIET) for corpus in (FORGET, RETAIN)]
    ours = pruning_score(*moments, importance="std").flat().numpy()
    np.testing.assert_allclose(scores, ours**2, rtol=0.4)  # eps stands beside another scale
    assert np.abs(scores / ours - 1).max() > 0.5

    scores = stacked(got, legacy_rms) / (stacked(kept, legacy_rms) + 1e-3)
    theirs = set(np.argsort(-scores, kind="stable")[:25].tolist())
    prune = selective_pruning(tiny.model("gpt2"), FORGET, RETAIN, fraction=25 / 128, importance="rms", **QUIET)
    assert chosen_indices(prune.selection) != theirs
    assert len(chosen_indices(prune.selection) & theirs) > 5, "but it is not another method"


# --- planted neurons -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["abs", "rms", "std", "sqrt"])
def test_planted_neurons_are_found(kind: str) -> None:
    neurons = [3, 17, 40]
    model = planted(neurons)
    prune = selective_pruning(model, TEXTS_CODE, TEXTS_PROSE, fraction=3 / 128, importance=kind, **QUIET)
    assert chosen_indices(prune.selection) == set(neurons)


def test_a_dead_neuron_is_not_pruned() -> None:
    model = planted([3])
    weights = model.blocks[1].mlp.original_component.c_fc.original_component
    with torch.no_grad():
        weights.weight[:, 9] = 0
        weights.bias[9] = -0.5
    score = pruning_score(*[pruning_moments(model, c, **QUIET) for c in (TEXTS_CODE, TEXTS_PROSE)])
    site = Site(1, "mlp.post")
    rank = int((score.flat() > score[site][9]).sum())
    prune = selective_pruning(model, TEXTS_CODE, TEXTS_PROSE, fraction=(rank + 5) / 128, **QUIET)
    assert not prune.selection[site][9], "it would be among them by its score alone"
    everything = selective_pruning(model, TEXTS_CODE, TEXTS_PROSE, fraction=1.0, **QUIET)
    assert everything.selection.count() == 128


# --- steps -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3, 5])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_each_step_ranks_anew_under_the_mask_so_far(name: str, steps: int) -> None:
    model, fraction, total = tiny.model(name), 0.25, tiny.LAYERS * 64
    pruned: list[int] = []
    for step in range(1, steps + 1):  # the oracle: a plain model with the rows zeroed, and plain hooks
        masks = np.zeros(total, dtype=bool)
        masks[pruned] = True
        scores = []
        for layer in range(tiny.LAYERS):
            got, kept = (values_under(name, masks, corpus)[Site(layer, "mlp.post")] for corpus in (FORGET, RETAIN))
            scores.append(np.abs(got).mean(0) / (np.abs(kept).mean(0) + 1e-3))
        flat = np.concatenate(scores)
        flat[masks] = -1
        order = [int(i) for i in np.argsort(-flat, kind="stable") if not masks[i]]
        pruned += order[: round(fraction * step / steps * total) - len(pruned)]
    prune = selective_pruning(model, FORGET, RETAIN, fraction=fraction, steps=steps, **QUIET)
    assert prune.selection.count() == round(fraction * total)
    assert chosen_indices(prune.selection) == set(pruned)
    assert chosen_indices(selective_pruning(model, FORGET, RETAIN, fraction=fraction, **QUIET).selection) != set(pruned)


def values_under(name: str, masks: np.ndarray, corpus: Any) -> dict[Site, np.ndarray]:
    plain, values = tiny.hugging_face(name), {}
    for layer in range(tiny.LAYERS):
        tiny.zero_rows(plain, name, Site(layer, "mlp.post"), torch.from_numpy(masks.reshape(tiny.LAYERS, -1)[layer]))
    for row in range(corpus.n_rows):
        start, end = int(corpus.starts[row]), int(corpus.starts[row + 1])
        seen = tiny.plain_activations(plain, name, ["mlp.post"], corpus.tokens[start:end].long()[None])
        for site, value in seen.items():
            values.setdefault(site, []).append(value[0][corpus.counted[start:end]].double().numpy())
    return {site: np.concatenate(parts) for site, parts in values.items()}


@pytest.mark.parametrize(
    "options",
    [{}, {"within": "layer"}, {"replacement": "mean"}, {"site": "attn.z"}, {"site": "attn.z", "unit": "head"}],
)
def test_what_is_pruned_stays_pruned_in_later_steps(options: Any) -> None:
    model = tiny.model("gpt2")
    first = selective_pruning(model, FORGET, RETAIN, fraction=0.25, **options, **QUIET)
    both = selective_pruning(model, FORGET, RETAIN, fraction=0.5, steps=2, **options, **QUIET)
    assert (first.selection & both.selection).equals(first.selection)
    assert both.selection.count() == 2 * first.selection.count()


# --- sites, units, replacement ---------------------------------------------------------------------------------------------


def test_each_site_has_its_own_fraction_and_is_ranked_for_itself() -> None:
    model = tiny.model("llama")
    sites = ("mlp.post", "attn.z")
    both = selective_pruning(model, FORGET, RETAIN, fraction={"mlp.post": 0.1, "attn.z": 0.25}, site=sites, **QUIET)
    assert both.selection["mlp.post"].count() == round(0.1 * 128)
    assert both.selection["attn.z"].count() == round(0.25 * 64)
    for kind, fraction in (("mlp.post", 0.1), ("attn.z", 0.25)):
        alone = selective_pruning(model, FORGET, RETAIN, fraction=fraction, site=kind, **QUIET)
        assert alone.selection.equals(both.selection[kind])


def test_within_a_layer_every_layer_gives_its_share() -> None:
    prune = selective_pruning(tiny.model("gpt2"), FORGET, RETAIN, fraction=0.125, within="layer", **QUIET)
    assert [int(mask.sum()) for _, mask in prune.selection.items()] == [8, 8]


def test_whole_heads_are_ranked_by_their_mean_score() -> None:
    scores = expected_scores("neox", "attn.z", "abs", 1e-4).reshape(tiny.LAYERS * 4, 8).mean(1)
    prune = selective_pruning(tiny.model("neox"), FORGET, RETAIN, fraction=3 / 8, site="attn.z", unit="head", **QUIET)
    flags = prune.selection.stack().reshape(8, 8)
    assert torch.equal(flags.any(1), flags.all(1))
    assert {int(i) for i in flags.all(1).nonzero()} == set(np.argsort(-scores)[:3].tolist())


def test_directions_are_scored_in_each_heads_own_basis() -> None:
    name, model = "llama", tiny.model("llama")
    prune = selective_pruning(model, FORGET, RETAIN, fraction=0.25, site="attn.z", unit="direction", **QUIET)
    basis = ov_basis(model)
    assert prune.basis is not None
    assert prune.basis.equals(basis)
    got, kept = (counted_values(name, ["attn.z"], corpus) for corpus in (FORGET, RETAIN))
    scores = []
    for site in sorted(got):
        t = basis[site].numpy()
        top, bottom = (
            np.abs(np.einsum("nhi,hij->nhj", values[site].reshape(-1, 4, 8), t)).mean(0) for values in (got, kept)
        )
        scores.append((top / (bottom + 1e-4)).reshape(-1))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    assert chosen_indices(prune.selection) == set(order[:16].tolist())
    assert value_matrices(name, tiny.hugging_face(name), 0).shape == (4, 32, 8)


def test_means_stand_in_for_pruned_neurons() -> None:
    model = tiny.model("gpt2")
    prune = selective_pruning(model, FORGET, RETAIN, fraction=0.2, replacement="mean", **QUIET)
    mean = {site: values.mean(0) for site, values in counted_values("gpt2", ["mlp.post"], RETAIN).items()}
    assert isinstance(prune.value, NeuronMap)
    for site, value in prune.value.items():
        np.testing.assert_allclose(value.numpy(), mean[site], rtol=1e-4, atol=1e-6)
    zero = selective_pruning(model, FORGET, RETAIN, fraction=0.2, **QUIET)
    assert prune.selection.equals(zero.selection)


def test_with_steps_the_means_are_those_of_the_unpruned_model() -> None:
    model = tiny.model("gpt2")
    once, often = (
        selective_pruning(model, FORGET, RETAIN, fraction=0.2, replacement="mean", steps=s, **QUIET) for s in (1, 3)
    )
    assert isinstance(once.value, NeuronMap)
    assert isinstance(often.value, NeuronMap)
    assert once.value.equals(often.value)


def test_moments_stand_in_for_corpora() -> None:
    model = tiny.model("gpt2")
    moments = [collect(model, corpus, "mlp.post", **QUIET) for corpus in (FORGET, RETAIN)]
    from_moments = selective_pruning(model, *moments, fraction=0.1)
    assert from_moments.selection.equals(selective_pruning(model, FORGET, RETAIN, fraction=0.1, **QUIET).selection)
    shared = [pruning_moments(model, corpus, importance="sqrt", **QUIET) for corpus in (FORGET, RETAIN)]
    assert selective_pruning(model, *shared, fraction=0.1, importance="sqrt").selection.count() == 13


@given(st.integers(1, 128))
def test_exactly_the_rounded_share_is_pruned_and_more_includes_less(count: int) -> None:
    model = tiny.model("gpt2")
    moments = MOMENTS.get("gpt2") or [collect(model, corpus, "mlp.post", **QUIET) for corpus in (FORGET, RETAIN)]
    MOMENTS["gpt2"] = moments
    some = selective_pruning(model, *moments, fraction=count / 128).selection
    assert some.count() == count
    if count < 128:
        more = selective_pruning(model, *moments, fraction=(count + 1) / 128).selection
        assert (some & more).equals(some)


MOMENTS: dict[str, Any] = {}


def test_corpora_exchanged_prune_other_neurons() -> None:
    model = tiny.model("gpt2")
    one, other = (
        selective_pruning(model, a, b, fraction=0.1, **QUIET) for a, b in ((FORGET, RETAIN), (RETAIN, FORGET))
    )
    assert not (one.selection & other.selection).count()


# --- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"importance": "median"},
            LensUnlearnError,
            "importance='median' is not known: choose from abs, freq, rms, std, sqrt",
        ),
        ({"replacement": "noise"}, LensUnlearnError, "replacement='noise' is not known: choose from zero, mean"),
        ({"unit": "heads"}, LensUnlearnError, "unit='heads' is not known: choose from neuron, head, direction"),
        ({"within": "head"}, LensUnlearnError, "within='head' is not known"),
        ({"unit": "head"}, LensUnlearnError, "unit='head' is of attention: use it with site='attn.z' alone"),
        ({"unit": "direction", "site": ("mlp.post", "attn.z")}, LensUnlearnError, "unit='direction' is of attention"),
        ({"steps": 0}, LensUnlearnError, "steps=0 is no number of steps"),
        ({"fraction": 1.5}, SelectionError, "fraction=1.5 is not a share"),
        ({"fraction": -0.1}, SelectionError, "fraction=-0.1 is not a share"),
        ({"fraction": 0.001}, SelectionError, "selects nothing of 128 neurons: raise it"),
        ({"fraction": 0}, SelectionError, "selects nothing"),
        ({"fraction": {"attn.z": 0.1}}, SelectionError, "fraction names attn.z, mlp.post, and site is mlp.post"),
        ({"fraction": {"mlp.post": 2}}, SelectionError, r"fraction\['mlp.post'\]=2 is not a share"),
        ({"site": "mlp.posts"}, SiteError, "did you mean mlp.post"),
    ],
)
def test_options_that_cannot_be_are_refused(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        selective_pruning(tiny.model("gpt2"), FORGET, RETAIN, **options, **QUIET)


def test_the_same_text_twice_is_refused() -> None:
    with pytest.raises(LensUnlearnError, match=r"forget and retain are the same text \(forget\)"):
        selective_pruning(tiny.model("gpt2"), FORGET, tiny.corpus((9, 14, 11, 20), seed=1, name="other"), **QUIET)


def test_steps_over_moments_are_refused() -> None:
    moments = collect(tiny.model("gpt2"), FORGET, "mlp.post", **QUIET)
    with pytest.raises(LensUnlearnError, match="steps > 1 collects anew under the mask so far: pass corpora"):
        selective_pruning(tiny.model("gpt2"), moments, RETAIN, steps=2, **QUIET)


def test_mixtures_of_experts_are_refused_and_their_attention_is_not() -> None:
    with pytest.raises(SiteError, match="mixture-of-experts"):
        selective_pruning(tiny.model("mixtral"), FORGET, RETAIN, **QUIET)
    prune = selective_pruning(tiny.model("mixtral"), FORGET, RETAIN, site="attn.z", fraction=0.25, **QUIET)
    assert prune.selection.count() == 16


# --- the control -----------------------------------------------------------------------------------------------------------


def per_layer(prune: Ablate) -> dict[Site, int]:
    return {site: int(mask.sum()) for site, mask in prune.selection.items()}


@given(st.integers(0, 1000), st.floats(0.02, 1.0))
def test_the_control_has_the_same_counts_in_every_layer(seed: int, fraction: float) -> None:
    model = tiny.model("gpt2")
    moments = MOMENTS.get("gpt2") or [collect(model, corpus, "mlp.post", **QUIET) for corpus in (FORGET, RETAIN)]
    MOMENTS["gpt2"] = moments
    prune = selective_pruning(model, *moments, fraction=fraction)
    control = random_pruning(model, like=prune, seed=seed)
    assert per_layer(control) == per_layer(prune)
    assert random_pruning(model, like=prune, seed=seed).selection.equals(control.selection)


def test_the_control_takes_means_whole_heads_and_bases_as_the_method_does() -> None:
    model = tiny.model("llama")
    for options in ({"unit": "head"}, {"unit": "direction"}, {"replacement": "mean"}):
        prune = selective_pruning(model, FORGET, RETAIN, site="attn.z", fraction=0.25, **options, **QUIET)
        control = random_pruning(model, like=prune, seed=3)
        assert per_layer(control) == per_layer(prune)
        assert control.value is prune.value
        assert control.basis is prune.basis
        assert not torch.equal(under(model, control), tiny.logits(model))
        if options == {"unit": "head"}:
            assert all(torch.equal(m.any(1), m.all(1)) for _, m in control.selection.items())


def test_controls_of_other_seeds_and_layers_differ() -> None:
    drawn = [random_pruning(tiny.model("gpt2"), fraction=0.5, seed=seed).selection.stack() for seed in range(5)]
    flat = {tuple(layer.tolist()) for selection in drawn for layer in selection}
    assert len(flat) == 10


def test_the_control_chooses_every_neuron_equally_often() -> None:
    hits = sum(
        random_pruning(tiny.model("gpt2"), fraction=0.25, seed=seed).selection.stack().double() for seed in range(400)
    )
    assert isinstance(hits, torch.Tensor)
    z = (hits - 100) / (400 * 0.25 * 0.75) ** 0.5
    assert float(z.abs().max()) < 4.5
    assert 0.8 < float(z.std()) < 1.2


def test_the_control_does_not_depend_on_the_global_random_state_nor_changes_it() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        one = random_pruning(tiny.model("gpt2"), fraction=0.1, seed=0)
        torch.manual_seed(2)
        other = random_pruning(tiny.model("gpt2"), fraction=0.1, seed=0)
    assert one.selection.equals(other.selection)


def test_without_a_pattern_it_takes_a_share_of_each_layer_of_a_site() -> None:
    prune = random_pruning(tiny.model("llama"), fraction=0.25, site="attn.z")
    assert per_layer(prune) == {Site(0, "attn.z"): 8, Site(1, "attn.z"): 8}
    for fraction in (0.0, 0.001):
        with pytest.raises(SelectionError, match="selects nothing"):
            random_pruning(tiny.model("llama"), fraction=fraction)
    with pytest.raises(SelectionError, match="is not a share"):
        random_pruning(tiny.model("llama"), fraction=2)
