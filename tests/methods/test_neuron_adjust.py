"""Neuron Adjust: the paper's formula in twenty lines of NumPy, what chance does, and three faults that are not ours."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from counter_rng_helpers import splitmix_array
from hypothesis import given
from hypothesis import strategies as st
from interventions_helpers import selection_of, unchanged
from positions_helpers import ROWS, adjust_of, pad, run, watching
from torch import Tensor

from lens_unlearn.core.counter_rng import key_of
from lens_unlearn.core.errors import ArtefactError, LensUnlearnError, SelectionError
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.interventions.base import Chain, Live
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.methods.neuron_adjust import FLOOR, RANKINGS, adjust_score, neuron_adjust
from lens_unlearn.model.positions import Rows
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.moments import Moments

PRE = Site(0, "mlp.pre")
MAPS = ("forget_mean", "forget_std", "retain_mean", "retain_std")
Array = np.ndarray


def oracle(x: Array, mf: Array, sf: Array, mr: Array, sr: Array, draw: Array | None = None) -> tuple[Array, Array]:
    """Return x' and the log of p_f / p_r, in float64."""
    x = x.astype(np.float64)
    log_f, log_r = (-0.5 * ((x - m) / s) ** 2 - np.log(s) for m, s in ((mf, sf), (mr, sr)))
    odds = log_f - log_r
    change = odds >= 0
    if draw is not None:
        change &= draw < 1 / (1 + np.exp(-odds))
    return np.where(change, 2 * mr - ((x - mf) / sf * sr + mr), x), odds


def draws(rows: Sequence[Sequence[int]], site: Site, neurons: Array, seed: int) -> list[Array]:
    """The random numbers of whole rows: a hash of the tokens up to each position, and of seed, site and neuron."""

    def mixed(key: Any) -> Array:
        return splitmix_array(np.asarray(key).astype(np.uint64))

    found = []
    with np.errstate(over="ignore"):
        of_site = np.asarray(key_of("neuron adjust", seed, str(site)), dtype=np.int64).astype(np.uint64)
        neuron = mixed(neurons.astype(np.uint64) + of_site)
        for row in rows:
            places = np.arange(1, len(row) + 1, dtype=np.uint64)
            running = np.cumsum(mixed(mixed(places) + np.asarray(row, dtype=np.uint64)), dtype=np.uint64)
            found.append((mixed(mixed(running)[:, None] + neuron) >> np.uint64(40)).astype(np.float64) * 2.0**-24)
    return found


def columns(act: Adjust, site: Site) -> tuple[Array, list[Array]]:
    """The selected neurons of a site, and the four parameters of each."""
    index = act.selection[site].reshape(-1).nonzero()[:, 0].numpy()
    return index, [getattr(act, name)[site].reshape(-1).double().numpy()[index] for name in MAPS]


def seen(model: Any, act: Any, tokens: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """A site's values before and after, with everything below it as it is under the intervention."""
    with watching(model, site) as before, act.on(model), watching(model, site) as after:
        run(model, tokens)
    return before[0], after[0]


def compare(before: Tensor, after: Tensor, act: Adjust, site: Site, draw: Array | None = None) -> int:
    """Hold a site's values against the oracle; return how many were replaced."""
    index, parameters = columns(act, site)
    x, y = (t.reshape(*t.shape[:2], -1) for t in (before, after))
    rest = torch.ones(x.shape[-1], dtype=torch.bool)
    rest[torch.from_numpy(index)] = False
    assert torch.equal(x[..., rest], y[..., rest]), "what is not selected is bitwise as it was"
    x, y = x[..., ~rest], y[..., ~rest]
    expected, odds = oracle(x.numpy(), *parameters, draw)
    clear = np.abs(odds) > 1e-4
    if draw is not None:
        clear &= np.abs(draw - 1 / (1 + np.exp(-odds))) > 1e-5
    assert clear.mean() > 0.99
    np.testing.assert_allclose(y.double().numpy()[clear], expected[clear], rtol=1e-5, atol=1e-6)
    kept = torch.from_numpy((expected == x.double().numpy()) & clear)
    assert torch.equal(x[kept], y[kept]), "what is kept is bitwise as it was"
    return int((expected != x.double().numpy()).sum())


# --- the rule, in models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.ALL)
def test_both_rules_do_what_the_oracle_does_in_every_model(name: str) -> None:
    model, tokens = tiny.model(name), torch.tensor([ROWS[1], ROWS[1][::-1], [7] * 7])
    random = adjust_of(model, "mlp.pre", seed=3)
    sites = [Site(layer, "mlp.pre") for layer in range(tiny.LAYERS)]
    for site in sites:
        drawn = np.stack(draws(tokens.tolist(), site, columns(random, site)[0], 3))
        changed = compare(*seen(model, random, tokens, site), random, site, drawn)
        sure = replace(random, rule="deterministic")
        all_changed = compare(*seen(model, sure, tokens, site), sure, site)
        assert 20 < changed < all_changed
    with unchanged(model), random.on(model):
        assert not torch.equal(tiny.logits(model, tokens), run(model, tokens) * 0)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2"])
def test_in_a_gated_model_the_gate_is_adjusted_before_its_activation_function(name: str) -> None:
    model, tokens = tiny.model(name), tiny.some_tokens()
    expected = tiny.plain_activations(tiny.hugging_face(name), name, ["mlp.pre"], tokens)[PRE]
    before, after = seen(model, adjust_of(model, "L0.mlp.pre"), tokens, PRE)
    torch.testing.assert_close(before, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("name", ["gpt2", "llama", *tiny.HOOKED[:1]])
@pytest.mark.parametrize("kind", ["attn.z", "attn.q", "attn.v", "mlp.post", "resid"])
def test_other_sites_too(name: str, kind: str) -> None:
    model, tokens, site = tiny.model(name), tiny.some_tokens(3, 9), Site(1, kind)
    act = adjust_of(model, f"L1.{kind}")
    drawn = np.stack(draws(tokens.tolist(), site, columns(act, site)[0], 0))
    assert compare(*seen(model, act, tokens, site), act, site, drawn) > 5
    assert not torch.equal(seen(model, act, tokens, site)[0], seen(model, act, tokens, site)[1])


def test_the_adjusted_value_reaches_the_output_as_a_plain_hook_would_put_it() -> None:
    model, tokens = tiny.model("gpt2"), tiny.some_tokens()
    act = adjust_of(model, "L1.mlp.pre", rule="deterministic")
    index, parameters = columns(act, Site(1, "mlp.pre"))
    plain = tiny.hugging_face("gpt2")

    def put(_: Any, args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        new, _ = oracle(output[..., index].numpy(), *parameters)
        changed[..., index] = torch.from_numpy(new).float()
        return changed

    handle = tiny.module_of(plain, "gpt2", Site(1, "mlp.pre")).register_forward_hook(put)
    expected = tiny.logits(plain, tokens)
    handle.remove()
    with act.on(model):
        torch.testing.assert_close(tiny.logits(model, tokens), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(tiny.logits(model, tokens), expected, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_decides_in_single_precision(dtype: torch.dtype) -> None:
    model = tiny.to_bridge(tiny.hugging_face("llama").to(dtype), "llama")
    act = adjust_of(model)
    tokens = tiny.some_tokens(2, 9)
    before, after = seen(model, act, tokens, PRE)
    assert after.dtype == dtype
    index, parameters = columns(act, PRE)
    drawn = np.stack(draws(tokens.tolist(), PRE, index, 0))
    expected, odds = oracle(before[..., index].float().numpy(), *parameters, drawn)
    clear = (np.abs(odds) > 1e-3) & (np.abs(drawn - 1 / (1 + np.exp(-odds))) > 1e-3)
    got = after[..., index].double().numpy()
    assert np.array_equal(
        (got != before[..., index].double().numpy())[clear], (expected != before[..., index].double().numpy())[clear]
    )
    np.testing.assert_allclose(got[clear], expected[clear], rtol=2**-7, atol=1e-3)
    with act.on(model):
        assert run(model, tokens).dtype == dtype


# --- the rule, by itself -------------------------------------------------------------------------------------------------


def single(
    x: Any, mf: float, sf: float, mr: float, sr: float, rule: Any = "deterministic", tokens: Tensor | None = None
) -> Tensor:
    """Adjust given values of one neuron, without a model: [rows, positions]."""
    values = torch.as_tensor(x, dtype=torch.float32)
    act = adjust(mf, sf, mr, sr, rule=rule)
    live = Live(act, None)
    if rule == "random":
        assert tokens is not None
        live.rows = Rows.of(tokens, 0, None)
    [(_, function)] = act.hooks()
    return function(values[..., None], live)[..., 0]


def adjust(mf: float, sf: float, mr: float, sr: float, **options: Any) -> Adjust:
    maps = [NeuronMap({PRE: torch.tensor([value], dtype=torch.float64)}) for value in (mf, sf, mr, sr)]
    return Adjust(NeuronMap({PRE: torch.ones(1, dtype=torch.bool)}), *maps, **options)


means, sigmas = st.floats(-20, 20), st.floats(1e-3, 20)


@given(means, sigmas, means, sigmas, st.lists(st.floats(-100, 100), min_size=1, max_size=20))
def test_the_deterministic_rule_equals_the_oracle(mf: float, sf: float, mr: float, sr: float, xs: list[float]) -> None:
    x = np.array([xs], dtype=np.float32)
    rounded = [float(np.float32(value)) for value in (mf, sf, mr, sr)]
    expected, odds = oracle(x, *(np.array(value) for value in rounded))
    got = single(x, *rounded).double().numpy()
    clear = np.abs(odds) > 1e-4 * (1 + np.abs((x - mf) / sf) ** 2 + np.abs((x - mr) / sr) ** 2)
    scale = 1e-5 * (np.abs(x) + abs(mf)) / rounded[1] * rounded[3] + 1e-5 * (np.abs(expected) + abs(mr)) + 1e-6
    assert (np.abs(got - expected) <= scale)[clear].all()


def test_carrying_over_and_mirroring() -> None:
    """x is two forget sigmas above mu_f, so it lands two retain sigmas below mu_r."""
    assert single([[5.0]], mf=4, sf=0.5, mr=0, sr=2).tolist() == [[-4.0]]
    assert single([[4.0]], mf=4, sf=0.5, mr=0, sr=2).tolist() == [[0.0]]
    assert single([[0.1, -3.0]], mf=4, sf=0.5, mr=0, sr=2).tolist() == [[pytest.approx(0.1), -3.0]], (
        "these look retained"
    )


def test_equal_densities_count_as_forgotten() -> None:
    assert single([[0.0, 1.0]], mf=1, sf=1, mr=1, sr=1).tolist() == [[2.0, 1.0]]
    assert single([[0.0]], mf=1, sf=1, mr=-1, sr=1).tolist() == [[0.0]]  # -1 - 1 (0 - 1) / 1


@pytest.mark.parametrize("x", [30.0, -30.0, 1e3, -1e4, 1e10, -1e15])
def test_in_the_tails_where_both_densities_are_zero(x: float) -> None:
    """The quotient of the densities is 0 / 0 there; their logarithms still say which is greater: the wider one's."""
    from scipy.stats import norm

    assert norm.pdf(x, 1, 0.5) == norm.pdf(x, 0, 0.7) == 0
    for mf, sf, mr, sr in ((1, 0.5, 0, 0.7), (1, 0.7, 0, 0.5)):
        forgotten = norm.logpdf(x, mf, sf) >= norm.logpdf(x, mr, sr)
        assert forgotten == (sf > sr)
        expected = mr - sr * (x - mf) / sf if forgotten else x
        assert float(single([[x]], mf, sf, mr, sr)[0, 0]) == pytest.approx(expected, rel=1e-5)
        tokens = torch.arange(50)[:, None]
        drawn = single([[x]] * 50, mf, sf, mr, sr, "random", tokens)
        assert torch.allclose(drawn, torch.tensor(expected, dtype=torch.float32)), "its probability is 1 there, not NaN"


@pytest.mark.parametrize("rule", ["deterministic", "random"])
def test_what_is_no_number_passes_and_makes_none_of_numbers(rule: Any) -> None:
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1e30, 3e38, -3e38, 0.0]])
    tokens = torch.arange(7)[None]
    for sigmas_ in ((1e-30, 1.0), (1.0, 1e-30), (1e-3, 1e-3), (1e30, 1e30)):
        got = single(x, 0.5, sigmas_[0], -0.5, sigmas_[1], rule, tokens)
        assert math.isnan(float(got[0, 0]))
        assert not bool(torch.isnan(got[0, 1:]).any()), sigmas_


def test_tiny_sigmas() -> None:
    """A forget spike at 1: only the spike itself is carried over."""
    got = single([[1.0, 1.0 + 1e-5, 0.3]], mf=1, sf=1e-9, mr=0, sr=1)
    assert got.tolist() == [[0.0, pytest.approx(1 + 1e-5), pytest.approx(0.3)]]
    # A retain spike at 0: everything but the spike is forgotten, and goes very near it.
    got = single([[0.0, 0.5, 1.0]], mf=1, sf=1, mr=0, sr=1e-9)
    assert got[0, 0] == 0
    assert float(got.abs().max()) < 1e-8


def test_a_neuron_is_replaced_as_often_as_its_chance_says() -> None:
    mf, sf, mr, sr = 1.0, 0.8, 0.0, 1.1
    n = 4000
    xs = np.linspace(-2.5, 4, 27, dtype=np.float32)
    tokens = torch.stack([torch.arange(n) % 300, torch.arange(n) // 300, torch.full((n,), 9)], 1)
    for x in xs:
        got = single(np.full((n, 3), x), mf, sf, mr, sr, "random", tokens)[:, 1:]
        _, odds = oracle(np.array(x), *(np.array(v) for v in (mf, sf, mr, sr)))
        chance = 1 / (1 + math.exp(-odds)) if odds >= 0 else 0.0
        share = float((got != float(x)).double().mean())
        assert abs(share - chance) <= 4.5 * math.sqrt(chance * (1 - chance) / (2 * n)) + 1e-12, x
        assert chance == 0 or chance >= 0.5


def test_its_input_is_never_written_to() -> None:
    model = tiny.model("gpt2")
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        points = resolve(model, [PRE])
        points[PRE].hook.add_hook(lambda t, hook: kept.append((t, t.clone())))
        try:
            with adjust_of(model).on(model):
                model(tiny.some_tokens())
        finally:
            points[PRE].hook.remove_hooks()
    [(tensor, copy)] = kept
    assert torch.equal(tensor, copy)


# --- composition, files, refusals ----------------------------------------------------------------------------------------


def test_a_sum_with_an_ablation_is_nesting() -> None:
    model, tokens = tiny.model("llama"), tiny.some_tokens()
    prune, act = Ablate(selection_of(model, ["mlp.pre", "attn.z"])), adjust_of(model)
    results = []
    for one, other in ((prune, act), (act, prune)):
        with one.on(model), other.on(model):
            nested = run(model, tokens)
        with (one + other).on(model):
            assert torch.equal(run(model, tokens), nested)
        results.append(nested)
    assert not torch.equal(*results), "on overlap the order matters"


def test_what_is_saved_does_the_same_in_another_process_of_the_same_model_and_no_other(tmp_path: Path) -> None:
    model, other, tokens = tiny.model("gpt2"), tiny.model("opt"), tiny.some_tokens()
    for act in (
        adjust_of(model, seed=5),
        adjust_of(model, "attn.z", rule="deterministic"),
        replace(adjust_of(model), floored=3),
        Ablate(selection_of(model)) + adjust_of(model, seed=2),
    ):
        path = tmp_path / "edit.safetensors"
        act.save(path, model)
        again = load_intervention(path, model)
        assert repr(again) == repr(act)
        with act.on(model):
            expected = run(model, tokens)
        with again.on(model):
            assert torch.equal(run(model, tokens), expected)
        with pytest.raises(ArtefactError, match="does not belong to this model"):
            load_intervention(path, other)
    fitted = neuron_adjust(model, tiny.corpus(seed=1), tiny.corpus(seed=2), fraction=0.2, progress=False)
    fitted.save(path, model)
    again = load_intervention(path, model)
    with fitted.on(model):
        expected = run(model, tokens)
    with again.on(model):
        assert torch.equal(run(model, tokens), expected), (
            "float64 maps are used in single precision, so nothing is lost"
        )


def test_another_models_shape_is_refused_before_any_hook_is_added() -> None:
    model = tiny.model("gpt2")
    wide = NeuronMap({PRE: torch.ones(65, dtype=torch.bool)})
    act = Adjust(wide, *[wide.map(lambda m: m.double())] * 4)
    with unchanged(model), pytest.raises(SelectionError, match=r"shape \(64,\) in this model, and \(65,\)"):
        act.on(model).__enter__()


def test_maps_that_do_not_fit_are_refused() -> None:
    chosen = NeuronMap({PRE: torch.tensor([True, False])})
    fine = NeuronMap({PRE: torch.tensor([1.0, 1.0])})
    assert Adjust(chosen, fine, fine, fine, fine).selection is chosen
    unselected = NeuronMap({PRE: torch.tensor([1.0, math.nan])})
    assert Adjust(chosen, fine, unselected, fine, fine).floored == 0, "what is not selected does not matter"
    for number, (bad, words) in enumerate(
        [
            (
                NeuronMap({PRE: torch.tensor([0.0, 1.0])}),
                "forget_std of a selected neuron is not finite, or not positive",
            ),
            (NeuronMap({PRE: torch.tensor([-1.0, 1.0])}), "not positive"),
            (NeuronMap({PRE: torch.tensor([math.nan, 1.0])}), "not finite"),
            (NeuronMap({PRE: torch.tensor([math.inf, 1.0])}), "not finite"),
            (NeuronMap({PRE: torch.ones(3)}), "forget_std does not cover the selection"),
            (NeuronMap({Site(1, "mlp.pre"): torch.ones(2)}), "does not cover"),
        ]
    ):
        with pytest.raises(SelectionError, match=words):
            Adjust(chosen, fine, bad, fine, fine)
        assert number >= 0
    with pytest.raises(SelectionError, match="forget_mean of a selected neuron is not finite"):
        Adjust(chosen, fine * math.nan, fine, fine, fine)
    with pytest.raises(SelectionError, match="at least one neuron"):
        Adjust(chosen.map(torch.zeros_like), fine, fine, fine, fine)
    with pytest.raises(SelectionError, match="boolean map"):
        Adjust(fine, fine, fine, fine, fine)
    with pytest.raises(SelectionError, match="rule='maybe' is not known: choose from random, deterministic"):
        Adjust(chosen, fine, fine, fine, fine, rule="maybe")  # type: ignore[arg-type]


def test_by_chance_needs_tokens_and_for_sure_does_not() -> None:
    act = adjust(0, 1, 1, 1, rule="random")
    assert act.looks_at_rows
    assert not replace(act, rule="deterministic").looks_at_rows
    assert (act + act).looks_at_rows
    with pytest.raises(LensUnlearnError, match="needs token ids"):
        act.hooks()[0][1](torch.zeros(1, 1, 1), Live(act, None))


def test_it_shows_itself() -> None:
    act = adjust_of(tiny.model("gpt2"), seed=4)
    count = act.selection.count()
    assert repr(act) == f"Adjust(random, seed 4, {count} of 128 neurons, 2 layers, mlp.pre)"
    settings = repr(replace(act, rule="deterministic", floored=1234))
    assert settings == f"Adjust(deterministic, {count} of 128 neurons, 2 layers, mlp.pre, 1,234 sigmas floored)"


# --- fitting -------------------------------------------------------------------------------------------------------------


def two_pass(name: str, corpus: Any, kind: str = "mlp.pre") -> dict[Site, Array]:
    """Every counted position's activations of the plain model, in float64: [tokens, neurons] by site."""
    plain, found = tiny.hugging_face(name), dict[Site, list[Tensor]]()
    for row in range(corpus.n_rows):
        counted = corpus.counted[int(corpus.starts[row]) : int(corpus.starts[row + 1])]
        values = tiny.plain_activations(plain, name, [kind], corpus.row(row)[None])
        for site, value in values.items():
            found.setdefault(site, []).append(value[0][counted].flatten(1).double())
    return {site: torch.cat(parts).numpy() for site, parts in found.items()}


def parameters_of(name: str, forget: Any, retain: Any) -> tuple[list[Site], list[Array]]:
    got, kept = two_pass(name, forget), two_pass(name, retain)
    sites = sorted(got)
    stacked = [np.stack([of(part[site], axis=0) for site in sites]) for part in (got, kept) for of in (np.mean, np.std)]
    return sites, stacked


def hellinger(mf: float, sf: float, mr: float, sr: float) -> float:
    """The root of half the integral of (sqrt p - sqrt q)^2, by adding up."""
    low, high = min(mf - 12 * sf, mr - 12 * sr), max(mf + 12 * sf, mr + 12 * sr)
    x = np.linspace(low, high, 20_001)
    p, q = (np.exp(-0.5 * ((x - m) / s) ** 2) / (s * math.sqrt(2 * math.pi)) for m, s in ((mf, sf), (mr, sr)))
    return math.sqrt(0.5 * np.trapezoid((np.sqrt(p) - np.sqrt(q)) ** 2, x))


SCORES = {
    "signed": lambda mf, sf, mr, sr: mf - mr,
    "abs": lambda mf, sf, mr, sr: np.abs(mf - mr),
    "cohens_d": lambda mf, sf, mr, sr: np.abs(mf - mr) / np.sqrt((sf**2 + sr**2) / 2),
    "hellinger": np.vectorize(hellinger),
}


@pytest.mark.parametrize("rank_by", list(RANKINGS))
def test_the_neurons_chosen_are_those_most_apart_of_all_layers(rank_by: Any) -> None:
    name = "gpt2"
    forget, retain = tiny.corpus((9, 8, 12), seed=1), tiny.corpus((10, 7, 5), seed=2, uncounted=0.2)
    sites, (mf, sf, mr, sr) = parameters_of(name, forget, retain)
    score = SCORES[rank_by](mf, sf, mr, sr)
    settings = {"rank_by": rank_by, "progress": False}
    act = neuron_adjust(tiny.model(name), forget, retain, fraction=0.1, **settings)
    chosen = np.stack([act.selection[site].numpy() for site in sites])
    assert chosen.sum() == round(0.1 * score.size)
    assert score[chosen].min() > score[~chosen].max()
    for map_name, values in zip(MAPS, (mf, sf, mr, sr), strict=True):
        given = np.stack([getattr(act, map_name)[site].double().numpy() for site in sites])
        np.testing.assert_allclose(given, values, rtol=1e-4, atol=1e-6)
    assert (act.rule, act.floored) == ("random", 0)
    moments = [collect(tiny.model(name), part, "mlp.pre", progress=False) for part in (forget, retain)]
    found = adjust_score(*moments, rank_by=rank_by)
    np.testing.assert_allclose(np.stack([found[s].double().numpy() for s in sites]), score, rtol=1e-3, atol=1e-5)
    again = neuron_adjust(tiny.model(name), *moments, fraction=0.1, **settings)
    assert all(torch.equal(again.selection[s], act.selection[s]) for s in sites)
    per_layer = neuron_adjust(tiny.model(name), *moments, fraction=0.1, within="layer", **settings)
    assert [int(per_layer.selection[s].sum()) for s in sites] == [6, 6]


def test_distances_that_have_closed_forms_agree_with_integration_where_sigmas_differ_much() -> None:
    draw = np.random.default_rng(0)
    given = [draw.normal(size=40), draw.uniform(0.05, 3, 40), draw.normal(size=40), draw.uniform(0.05, 3, 40)]
    maps = [NeuronMap({PRE: torch.from_numpy(values)}) for values in given]
    np.testing.assert_allclose(
        RANKINGS["hellinger"](*maps)[PRE].numpy(), SCORES["hellinger"](*given), rtol=1e-6, atol=1e-7
    )
    same = RANKINGS["hellinger"](maps[0], maps[1], maps[0], maps[1])[PRE]
    assert float(same.max()) < 1e-7
    assert bool((same >= 0).all())


def test_sigmas_near_zero_get_a_floor_and_it_is_said_how_many_were_chosen() -> None:
    width = 8
    generator = torch.Generator().manual_seed(0)

    def moments(shift: float, constant: list[int]) -> Moments:
        x = torch.randn(200, width, generator=generator) * torch.linspace(0.5, 2, width) + shift
        x[:, constant] = 3.0 + shift
        made = Moments()
        made.update(PRE, x, torch.ones(200))
        return made

    forget, retain = moments(1.0, [2, 3]), moments(0.0, [3, 4])
    act = neuron_adjust(None, forget, retain, fraction=1.0)
    for part, name, constant in ((forget, "forget_std", [2, 3]), (retain, "retain_std", [3, 4])):
        sigma = part.std[PRE]
        floor = FLOOR * float(sigma[sigma > 0].median())
        expected = sigma.clone()
        expected[constant] = floor
        torch.testing.assert_close(getattr(act, name)[PRE], expected)
    # Neuron 3 is dead on both sides, and is chosen only because everything is.
    assert act.floored == 4
    assert "4 sigmas floored" in repr(act)
    assert neuron_adjust(None, forget, retain, fraction=7 / 8).selection[PRE].tolist() == [i != 3 for i in range(8)]
    fewer = neuron_adjust(None, forget, retain, fraction=7 / 8)
    assert fewer.floored == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fraction": 0.0}, "selects nothing of 128 neurons: raise it"),
        ({"fraction": 0.001}, "fraction=0.001 selects nothing of 128 neurons"),
        ({"fraction": 1.5}, "fraction"),
        ({"fraction": math.nan}, "fraction"),
        ({"rank_by": "size"}, "rank_by='size' is not known: choose from signed, abs, cohens_d, hellinger"),
        ({"rule": "never"}, "rule='never' is not known: choose from random, deterministic"),
        ({"within": "head"}, "within='head' is not known: choose from model, layer"),
        ({"site": "mlp.prre"}, "did you mean mlp.pre"),
        ({"site": "mlp.pre_linear"}, "does not exist in this model"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(LensUnlearnError, match=words):
        neuron_adjust(tiny.model("gpt2"), tiny.corpus(), tiny.corpus(seed=1), **{"progress": False, **options})


def test_moments_of_another_site_of_another_model_or_of_constants_are_refused() -> None:
    model = tiny.model("gpt2")
    good = collect(model, tiny.corpus(), "mlp.pre", progress=False)
    post = collect(model, tiny.corpus(), "mlp.post", progress=False)
    with pytest.raises(SelectionError, match=r"have nothing of mlp\.pre: collect at mlp\.pre"):
        neuron_adjust(model, good, post)
    constant = Moments()
    constant.update(PRE, torch.ones(9, 64), torch.ones(9))
    constant.update(Site(1, "mlp.pre"), torch.ones(9, 64), torch.ones(9))
    with pytest.raises(LensUnlearnError, match=r"L0\.mlp\.pre: every neuron is constant over"):
        neuron_adjust(model, good, constant)
    narrow = Moments()
    narrow.update(PRE, torch.randn(9, 63, generator=torch.Generator().manual_seed(0)), torch.ones(9))
    for one, other in ((good, narrow), (narrow, good)):
        with pytest.raises(SelectionError, match="differ in their layers or neurons: collect both with one model"):
            neuron_adjust(model, one, other)


# --- faults of the released code that are not ours -----------------------------------------------------------------------


def two_skills(seed: int = 0, n: int = 4000) -> tuple[Array, Array, list[float]]:
    """Forget and retain activations of one neuron whose two distributions overlap: mu 0.6 and 0, sigma 0.3 and 0.4."""
    draw = np.random.default_rng(seed)
    parameters = [0.6, 0.3, 0.0, 0.4]
    return draw.normal(0.6, 0.3, n), draw.normal(0.0, 0.4, n), parameters


def test_fault_the_variance_in_place_of_sigma_leaves_more_of_the_skill() -> None:
    """sigma^2 below 1 is too narrow: fewer activations are moved, and those that are land elsewhere."""
    forget, _, (mf, sf, mr, sr) = two_skills()
    x = forget[None].astype(np.float32)
    ours = single(x, mf, sf, mr, sr).numpy()[0]
    faulty = single(x, mf, sf**2, mr, sr**2).numpy()[0]
    expected, _ = oracle(x[0], *(np.array(v) for v in (mf, sf, mr, sr)))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    moved, moved_faulty = (ours != x[0]).mean(), (faulty != x[0]).mean()
    assert moved == pytest.approx(0.87, abs=0.04)
    assert abs(moved - moved_faulty) > 0.02
    assert np.abs(ours - faulty).mean() > 0.05
    assert abs(np.std(faulty[faulty != x[0]]) / np.std(ours[ours != x[0]]) - 1) > 0.2


def test_fault_sigma_f_overwritten_with_mu_f_changes_the_place_and_the_spread_or_breaks() -> None:
    forget, retain, (mf, sf, mr, sr) = two_skills()
    for x, least in ((forget, 0.1), (retain, 0.02)):
        ours = single(x[None], mf, sf, mr, sr).numpy()[0]
        faulty = single(x[None], mf, mf, mr, sr).numpy()[0]
        assert np.abs(ours - faulty).mean() > least
    # Where mu_f is twice sigma_f, other activations are taken for forgotten ones: here fewer, of either side.
    for x in (forget, retain):
        ours, faulty = (single(x[None], mf, s, mr, sr).numpy()[0] != x.astype(np.float32) for s in (sf, mf))
        assert abs(ours.mean() - faulty.mean()) > 0.05
    # A negative mean makes no sigma at all: scipy's density is NaN, no comparison holds, and nothing is ever adjusted.
    from scipy.stats import norm

    with np.errstate(invalid="ignore"):
        assert np.isnan(norm.pdf(forget, -mf, -mf)).all()
    with pytest.raises(SelectionError, match="not positive"):
        adjust(-mf, -mf, mr, sr)


def test_fault_one_draw_per_row_adjusts_all_of_a_row_or_nothing() -> None:
    forget, _, (mf, sf, mr, sr) = two_skills(n=40 * 100)
    x = forget.reshape(40, 100).astype(np.float32)
    tokens = torch.randint(0, 300, (40, 100), generator=torch.Generator().manual_seed(0))
    ours = (single(x, mf, sf, mr, sr, "random", tokens).numpy() != x).astype(float)
    _, odds = oracle(x, *(np.array(v) for v in (mf, sf, mr, sr)))
    chance = np.where(odds >= 0, 1 / (1 + np.exp(-odds)), 0)
    one_draw = np.random.default_rng(1).random((40, 1))
    faulty = (one_draw < chance).astype(float)
    assert ours.mean() == pytest.approx(chance.mean(), abs=0.03)
    # The share that is adjusted varies from row to row by far more than independent draws would let it.
    independent = math.sqrt((chance * (1 - chance)).sum(1).mean()) / 100
    within = np.sqrt(((ours - chance).mean(1) ** 2).mean())
    within_faulty = np.sqrt(((faulty - chance).mean(1) ** 2).mean())
    assert within < 1.5 * independent
    assert within_faulty > 2 * independent
    # And two positions of a row decide alike, given their chances.
    left, right = (ours - chance)[:, :-1], (ours - chance)[:, 1:]
    assert abs(np.corrcoef(left.reshape(-1), right.reshape(-1))[0, 1]) < 0.06
    left, right = (faulty - chance)[:, :-1], (faulty - chance)[:, 1:]
    assert np.corrcoef(left.reshape(-1), right.reshape(-1))[0, 1] > 0.2


def test_an_empty_chain_beside_it_changes_nothing() -> None:
    model, tokens = tiny.model("gpt2"), pad(ROWS, "right")[0]
    act = adjust_of(model)
    with act.on(model):
        expected = run(model, tokens)
    with (Chain(()) + act).on(model):
        assert torch.equal(run(model, tokens), expected)
