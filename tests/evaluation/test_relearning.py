"""Relearning: the fine-tuned change outside the model is what plain PyTorch makes of an edited copy's own weights."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from lens_unlearn import (
    Ablate,
    Chain,
    Delta,
    Matrix,
    NeuronMap,
    Relearning,
    Site,
    Update,
    anamnesis_index,
    anamnesis_interval,
    relearn,
)
from lens_unlearn import figures as plot
from lens_unlearn.core.errors import CorpusError, LensUnlearnError, ModelError, SelectionError, SiteError
from lens_unlearn.core.intervals import weights_of
from lens_unlearn.evaluation import relearning
from lens_unlearn.evaluation.answer_losses import rows_at
from lens_unlearn.evaluation.report import Measure
from lens_unlearn.evaluation.teacher_forcing import accuracy
from lens_unlearn.figures import theme
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.keyspace.regions import Box

FACTS = tiny.corpus([9, 12, 7, 10, 8, 11], seed=1).with_prompts(4)
OTHERS = tiny.corpus([8, 13, 9, 7, 12], seed=2)
MEASURED = {"forget": FACTS, "unrelated": OTHERS}
QUICK: dict[str, Any] = {"measured": MEASURED, "lr": 1e-2, "batch_size": 4, "progress": False}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def exact(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, tiny.to_bridge(tiny.hugging_face(request.param).double(), request.param)


def some(kind: str, seed: int = 0, share: float = 0.3) -> NeuronMap:
    generator = torch.Generator().manual_seed(seed)
    shape = (64,) if kind == "mlp.post" else (4, 8)
    return NeuronMap({Site(i, kind): torch.rand(shape, generator=generator) < share for i in range(tiny.LAYERS)})


def some_delta(scale: float = 0.05, strength: float = 1.5) -> Delta:
    generator = torch.Generator().manual_seed(3)
    rows = torch.tensor([3, 9, 40])
    updates = {
        Matrix(0, "W_out"): Update(scale * torch.randn(3, 32, generator=generator), rows),
        Matrix(1, "W_Q"): Update(scale * torch.randn(32, 32, generator=generator)),
        Matrix(1, "W_in"): Update(scale * torch.randn(32, 3, generator=generator), columns=rows),
    }
    return Delta(updates, strength)


@contextmanager
def masked(plain: Any, name: str, selection: NeuronMap) -> Iterator[None]:
    """Put zeros in front of the output projections of a plain model."""
    handles = []
    for site, chosen in selection.items():
        keep = (~chosen.reshape(-1)).double()
        module = tiny.module_of(plain, name, site)
        handles.append(module.register_forward_pre_hook(lambda _, args, keep=keep: (args[0] * keep, *args[1:])))
    yield
    for handle in handles:
        handle.remove()


def fine_tune(plain: Any, name: str, steps: int, lr: float, size: int, seed: int) -> list[float]:
    """Train the matrices of a plain model themselves."""
    weights = {
        id(w): w
        for layer in range(tiny.LAYERS)
        for m in tiny.matrices_of(name)
        for w in [tiny.weight_of(plain, name, layer, m)]
    }
    for parameter in plain.parameters():
        parameter.requires_grad_(id(parameter) in weights)
    optimizer = torch.optim.AdamW(list(weights.values()), lr=lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        logits, targets = [], []
        for row in rows_at(FACTS, step, size, seed).rows.tolist():
            tokens, begin = FACTS.row(row), len(FACTS.prompt(row))
            logits.append(plain(tokens[None]).logits[0, begin - 1 : -1])
            targets.append(tokens[begin:])
        loss = F.cross_entropy(torch.cat(logits), torch.cat(targets))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def matrices(plain: Any, name: str) -> dict[str, Tensor]:
    return {
        f"L{layer}.{m}": tiny.matrix_in(tiny.weight_of(plain, name, layer, m).detach(), name, m).flatten(1)
        for layer in range(tiny.LAYERS)
        for m in tiny.matrices_of(name)
    }


def relearn_exactly(bridge: Any, intervention: Any, attached: bool) -> Relearning:
    return relearn(
        bridge,
        FACTS,
        intervention,
        measured=MEASURED,
        steps=(1, 6),
        lr=2e-3,
        batch_size=4,
        seed=5,
        attached=attached,
        progress=False,
    )


def same_as(
    plain: Any,
    name: str,
    found: Relearning,
    losses: list[float],
    delta: Delta | None,
    logits: Callable[[Tensor], Tensor],
) -> None:
    """Compare losses, weights and logits with those of a plain model that was trained itself."""
    assert found.losses == pytest.approx(losses, abs=1e-9)
    assert found.delta is not None
    merged, model = tiny.hugging_face(name).double(), tiny.to_bridge(tiny.hugging_face(name).double(), name)
    (found.delta if delta is None else delta + found.delta).merge_into(merged, model)
    before, now = matrices(tiny.hugging_face(name).double(), name), matrices(merged, name)
    for key, expected in matrices(plain, name).items():
        torch.testing.assert_close(now[key], expected, rtol=0, atol=1e-9)
        assert float((expected - before[key]).abs().max()) > 1e-3, f"{key} was trained"
    tokens = tiny.some_tokens(3, 12)
    torch.testing.assert_close(logits(tokens), tiny.logits(plain, tokens), rtol=0, atol=1e-9)


# --- the fine-tuning ---------------------------------------------------------------------------------------------------


def test_an_attached_ablation_stays_a_mask_while_the_weights_are_trained(exact: tuple[str, Any]) -> None:
    name, bridge = exact
    for selection in (some("mlp.post"), some("attn.z")):
        ablation = Ablate(selection)
        found = relearn_exactly(bridge, ablation, True)
        plain = tiny.hugging_face(name).double()
        with masked(plain, name, selection):
            losses = fine_tune(plain, name, 6, 2e-3, 4, 5)
            assert found.delta is not None
            with (ablation + found.delta).on(bridge):
                same_as(plain, name, found, losses, None, lambda tokens: tiny.logits(bridge, tokens))
        if "mlp.post" in selection.kinds:
            for site, chosen in selection.items():
                for matrix, update in found.delta.updates.items():
                    if matrix.layer == site.layer and matrix.name in ("W_out", "W_in", "W_gate"):
                        still = update.value[chosen] if matrix.name == "W_out" else update.value[:, chosen]
                        assert not bool(still.any()), "a masked neuron gets no gradient"


def test_a_baked_ablation_is_trained_together_with_the_rest(exact: tuple[str, Any]) -> None:
    name, bridge = exact
    for selection in (some("mlp.post"), some("attn.z")):
        found = relearn_exactly(bridge, Ablate(selection), False)
        plain = tiny.hugging_face(name).double()
        for site, chosen in selection.items():
            tiny.zero_rows(plain, name, site, chosen)
        losses = fine_tune(plain, name, 6, 2e-3, 4, 5)
        assert found.delta is not None
        with found.delta.on(bridge):
            same_as(plain, name, found, losses, None, lambda tokens: tiny.logits(bridge, tokens))
        site = next(iter(selection))
        rows = tiny.output_rows(tiny.module_of(plain, name, site)).detach()[selection[site].reshape(-1)]
        assert bool((rows != 0).any(1).all()), "pruned rows grow back"


def test_a_delta_is_the_same_attached_or_baked(exact: tuple[str, Any]) -> None:
    name, bridge = exact
    delta = some_delta()
    plain = delta.merge_into(tiny.hugging_face(name).double(), bridge)
    losses = fine_tune(plain, name, 6, 2e-3, 4, 5)
    for attached in (True, False):
        found = relearn_exactly(bridge, delta, attached)
        assert found.delta is not None
        whole = Chain((delta, found.delta)) if attached else found.delta
        with whole.on(bridge):
            same_as(plain, name, found, losses, delta if attached else None, lambda x: tiny.logits(bridge, x))


@pytest.mark.parametrize("order", [0, 1])
def test_a_chain_is_baked_as_it_acts(exact: tuple[str, Any], order: int) -> None:
    """A delta sees what the weights see, so the rows behind a mask are zero whatever is added to them."""
    _, bridge = exact
    parts = [Ablate(some("mlp.post", 4)), some_delta(), Ablate(some("attn.z", 5)), Chain((-some_delta(),))]
    chain = Chain(tuple(parts[::-1] if order else parts))
    found = relearn(bridge, FACTS, chain, measured=MEASURED, steps=(0,), attached=False, progress=False)
    assert found.delta is not None
    tokens = tiny.some_tokens(3, 12)
    with chain.on(bridge):
        expected = tiny.logits(bridge, tokens)
    with found.delta.on(bridge):
        torch.testing.assert_close(tiny.logits(bridge, tokens), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "neox-compat", "native-llama", *tiny.HOOKED[:2]])
def test_what_was_known_is_measured_and_the_model_stays(name: str) -> None:
    model = tiny.model(name)
    parameter = next(model.blocks[0].parameters())
    was = parameter.requires_grad
    parameter.requires_grad_(True)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None  # other tests share this model
    with torch.no_grad():
        found = relearn(model, FACTS, Ablate(some("mlp.post")), steps=(2, 5, 24), **QUICK)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    next(model.blocks[0].parameters()).requires_grad_(was)
    with Ablate(some("mlp.post")).on(model):
        assert found["forget"][0] == (0, pytest.approx(accuracy(model, FACTS, 8)[0]))
        assert found.delta is not None
        with found.delta.on(model):
            assert found["unrelated"][-1] == (24, pytest.approx(accuracy(model, OTHERS, 8)[0]))
            assert found["forget"][-1][1] > 0.8, "with such steps anything is learned"
    assert [step for step, _ in found["forget"]] == [0, 2, 5, 24]
    assert len(found.losses) == 24
    assert found.losses[-1] < 2 < 4 < found.losses[0]
    assert not any(update.value.requires_grad for update in found.delta.updates.values())


def test_the_same_seed_gives_the_same_and_another_another() -> None:
    model = tiny.model("gpt2")
    found = [relearn(model, FACTS, None, steps=(3,), seed=seed, **QUICK) for seed in (1, 1, 2)]
    assert found[0].curves == found[1].curves
    assert found[0].losses == found[1].losses != found[2].losses
    options = found[0].provenance["relearning"]
    assert (options["seed"], options["lr"], options["threat"], options["baking"]) == (1, 1e-2, "T1", None)
    assert options["texts"]["fingerprint"] == FACTS.fingerprint
    longer = relearn(model, FACTS, None, steps=(1, 3, 4), seed=1, **QUICK)
    assert longer.losses[:3] == found[0].losses, "measuring changes nothing"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_whatever_happens_the_model_is_as_it_was(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")  # hooks and weights are compared behind every test
    before = tiny.logits(model)
    step = relearning._step

    def until_2(*args: Any) -> float:
        if args[2] == 2:
            raise error
        return step(*args)

    monkeypatch.setattr(relearning, "_step", until_2)
    with pytest.raises(error):
        relearn(model, FACTS, Ablate(some("mlp.post")), **QUICK)
    assert torch.equal(tiny.logits(model), before)


def test_what_cannot_be_baked_is_relearned_attached() -> None:
    model = tiny.model("gpt2")
    everywhere = Box(torch.zeros(1, 64), torch.ones(64), 1e6)
    silent = Abstain({Site(1, "mlp.post"): everywhere})
    found = relearn(model, FACTS, silent, steps=(2,), **QUICK)
    assert found["forget"] == [(0, 0.0), (2, 0.0)], "an answer that is withheld is not known, and cannot be learned"
    assert found.losses == pytest.approx([math.log(tiny.VOCABULARY)] * 2, abs=1e-3)
    for one in (silent, Ablate(some("mlp.post")) + silent):
        with pytest.raises(LensUnlearnError, match="relearn with attached=True"):
            relearn(model, FACTS, one, attached=False, **QUICK)
    for odd in (Ablate(some("mlp.post"), 0.5), Ablate(NeuronMap({Site(0, "mlp.pre"): torch.ones(64) > 0}))):
        with pytest.raises(SelectionError, match="no change of weights"):
            relearn(model, FACTS, odd, attached=False, **QUICK)
    elsewhere = Delta({Matrix(7, "W_out"): Update(torch.zeros(64, 32))})
    for attached in (True, False):
        with pytest.raises(SiteError, match=r"L7.W_out is not in this model"):
            relearn(model, FACTS, elsewhere, attached=attached, **QUICK)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": (0, 4, 2)}, "each above the last"),
        ({"steps": (1, 1)}, "each above the last"),
        ({"steps": (-1, 2)}, "at least 0"),
        ({"steps": (0.5,)}, "whole"),
        ({"steps": ()}, "no numbers of steps"),
        ({"measured": {}}, "nothing would be measured"),
        ({"lr": 0.0}, "lr=0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lr": 1e30}, "the loss is nan at step"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(LensUnlearnError, match=words):
        relearn(tiny.model("gpt2"), FACTS, None, **{"steps": (0, 4), **QUICK, **change})


def test_models_and_corpora_that_do_not_fit_are_refused() -> None:
    model = tiny.build("gpt2")
    with pytest.raises(CorpusError, match="longer than this model's context"):
        relearn(model, tiny.corpus([90]), None, **QUICK)
    with pytest.raises(CorpusError, match="can be predicted"):
        relearn(model, FACTS, None, **{**QUICK, "measured": {"none": tiny.corpus([1, 1], bos=False)}})
    model.train()
    with pytest.raises(ModelError, match="training mode"):
        relearn(model, FACTS, None, **QUICK)


# --- curves and index ----------------------------------------------------------------------------------------------------


def run(*points: tuple[int, float], lr: float | None = None, texts: str = "a", forget: str = "a") -> Relearning:
    options = {"optimizer": "AdamW", "lr": lr, "batch_size": 8, "texts": {"fingerprint": texts}}
    options |= {"measured": {"forget": {"fingerprint": forget}}}
    return Relearning({"forget": list(points)}, provenance={} if lr is None else {"relearning": options})


def test_steps_are_interpolated_between_measurements() -> None:
    curve = run((0, 0.2), (2, 0.4), (4, 0.3), (8, 0.9))
    assert curve.steps_to("forget", 0.1) == curve.steps_to("forget", 0.2) == 0
    assert curve.steps_to("forget", 0.3) == pytest.approx(1)
    assert curve.steps_to("forget", 0.4) == pytest.approx(2), "the first time counts"
    assert curve.steps_to("forget", 0.6) == pytest.approx(6)
    assert curve.steps_to("forget", 0.91) == math.inf
    with pytest.raises(LensUnlearnError, match="'retain' was not measured: there are forget"):
        curve.steps_to("retain", 0.5)
    frame = curve.to_frame()
    assert frame[["corpus", "step", "share"]].to_dict("list") == {
        "corpus": ["forget"] * 4,
        "step": [0, 2, 4, 8],
        "share": [0.2, 0.4, 0.3, 0.9],
    }
    assert frame[["low", "high"]].isna().all(axis=None), "without draws there are no intervals"
    assert all(map(math.isnan, curve.steps_interval("forget", 0.5)))
    assert "8 steps" in repr(curve)
    assert "0.9" in repr(curve)
    assert "<table" in curve._repr_html_()
    assert "0 steps" in repr(Relearning({"forget": [(0, 0.5)]}))


FAST, SLOW = run((0, 0.1), (4, 0.9)), run((0, 0.1), (4, 0.5), (12, 0.9))
THERE, NEVER = run((0, 1.0), (4, 1.0)), run((0, 0.1), (4, 0.2))


@pytest.mark.parametrize(
    ("relearned", "never_saw", "expected"),
    [
        (FAST, SLOW, 4 / 12),
        (SLOW, FAST, 3.0),
        (SLOW, SLOW, 1.0),
        (THERE, SLOW, 0.0),
        (THERE, NEVER, 0.0),
        (FAST, NEVER, 0.0),
        (NEVER, FAST, math.inf),
        (FAST, THERE, math.inf),
        (NEVER, THERE, math.inf),
        (NEVER, NEVER, math.nan),
        (THERE, THERE, math.nan),
    ],
)
def test_the_index_is_a_quotient_of_steps(relearned: Relearning, never_saw: Relearning, expected: float) -> None:
    assert anamnesis_index(relearned, never_saw, 1.0) == pytest.approx(expected, nan_ok=True)


def test_the_index_is_relative_to_the_original_and_compares_like_with_like() -> None:
    assert anamnesis_index(FAST, SLOW, 0.5, within=0.0) == pytest.approx(2 / 4)
    assert anamnesis_index(FAST, SLOW, 0.5, within=0.2) == pytest.approx(1.5 / 3)
    for options in ({"original": 0.0}, {"original": 1.5}, {"original": 1.0, "within": 1.0}, {"original": math.nan}):
        with pytest.raises(LensUnlearnError, match="is a share above 0"):
            anamnesis_index(FAST, SLOW, **options)
    one, other = (run((0, 0.1), (4, 0.9), lr=lr) for lr in (1, 2))
    assert anamnesis_index(one, one, 1.0) == 1.0
    with pytest.raises(LensUnlearnError, match=r"differ in lr: \[1\] and \[2\]"):
        anamnesis_index(one, other, 1.0)
    for change, words in (({"texts": "b"}, "in the texts"), ({"forget": "b"}, "in the corpus 'forget'")):
        with pytest.raises(LensUnlearnError, match=words):
            anamnesis_index(one, run((0, 0.1), (4, 0.9), lr=1, **change), 1.0)
    for of in (anamnesis_index, anamnesis_interval):
        with pytest.raises(LensUnlearnError, match="'retain' was not measured"):
            of(one, one, 1.0, corpus="retain")
        with pytest.raises(LensUnlearnError, match=r"differ in lr: \[1\] and \[2\]"):
            of(one, other, 1.0)


# --- intervals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
def test_shares_have_intervals_over_units_and_equal_weights_at_every_step(grouped: bool) -> None:
    model = tiny.model("gpt2")
    facts = tiny.corpus([9, 12, 7, 10, 8, 11] * 4, seed=7).with_prompts(4)
    if grouped:
        facts = replace(facts, groups=tuple(f"author {number // 2}" for number in range(24)))
    found = relearn(
        model, facts, None, measured={"forget": facts, "few": OTHERS}, steps=(4, 9), lr=1e-2, progress=False
    )
    units = sorted(set(facts.units))
    assert len(units) == (12 if grouped else 24)
    weights = dict(zip(units, weights_of(units, 1000, 0).T, strict=True))
    for step, edit in ((0, None), (9, found.delta)):
        top, bottom = np.zeros(1000), np.zeros(1000)
        right = tokens = 0.0
        for row in range(facts.n_rows):
            ids, begin = facts.row(row), len(facts.prompt(row))
            with nullcontext() if edit is None else edit.on(model):
                guess = tiny.logits(model, ids[None])[0, begin - 1 : -1].argmax(-1)
            hits, weight = float((guess == ids[begin:]).sum()), weights[facts.units[int(facts.document[row])]]
            top, bottom = top + weight * hits, bottom + weight * (len(ids) - begin)
            right, tokens = right + hits, tokens + len(ids) - begin
        measure = found.measures["forget", step]
        assert measure.value == pytest.approx(right / tokens)
        assert (measure.units, measure.n) == (len(units), int(tokens))
        assert dict(found["forget"])[step] == measure.value
        inside = (measure.draws > 0) & (measure.draws < 1)  # draws are moved away from the value, and end at 0 and 1
        if inside.sum() > 100 and 0 < measure.value < 1:
            assert np.corrcoef(measure.draws[inside], (top / bottom)[inside])[0, 1] > 1 - 1e-9
    low, high = found.measures["forget", 4].interval()
    assert low <= dict(found["forget"])[4] <= high
    assert found.to_frame().set_index(["corpus", "step"]).loc[("forget", 4), ["low", "high"]].tolist() == [low, high]
    assert f"[{low:.3f}, {high:.3f}]" in repr(found)
    assert found.measures["few", 4].few
    assert found.to_frame().query("corpus == 'few'")["low"].isna().all(), "of five documents there is no interval"
    assert math.isnan(found.steps_interval("few", 0.5)[0])
    assert found.provenance["relearning"]["bootstrap"]["resamples"] == 1000
    again = relearn(model, facts, None, measured={"forget": facts}, steps=(4,), lr=1e-3, seed=3, progress=False)
    difference = found.measures["forget", 0].minus(again.measures["forget", 0])
    assert not difference.draws.any(), "whatever the run, the weights are the same"


def drawn(curves: np.ndarray, steps: tuple[int, ...] = (0, 4, 8), units: int = 40, forget: str = "a") -> Relearning:
    """A run whose draws are given, [draws, steps]; its curve is their mean."""
    one = run(*zip(steps, curves.mean(0).tolist(), strict=True), lr=1.0, forget=forget)
    measures = {("forget", s): Measure(float(c.mean()), c, 100, units) for s, c in zip(steps, curves.T, strict=True)}
    return replace(one, measures=measures)


def middle(values: list[float]) -> tuple[float, float]:
    """The 2.5th and the 97.5th of a hundred values, in order."""
    ordered = sorted(values)
    return ordered[math.ceil(0.025 * len(ordered)) - 1], ordered[math.ceil(0.975 * len(ordered)) - 1]


def some_curves(seed: int, fast: float) -> np.ndarray:
    random = np.random.default_rng(seed)
    start, rise = random.uniform(0, 0.2, 410), random.uniform(0, fast, (410, 2)).cumsum(1)
    return np.concatenate([start[:, None], start[:, None] + rise], axis=1)


def test_steps_and_index_are_computed_anew_in_every_draw() -> None:
    ours, theirs = some_curves(0, 0.6), some_curves(1, 0.5)
    one, other = drawn(ours), drawn(theirs)
    each = [[run(*zip((0, 4, 8), c.tolist())).steps_to("forget", 0.45) for c in part] for part in (ours, theirs)]
    assert one.steps_interval("forget", 0.45) == pytest.approx(middle(each[0]))
    assert other.steps_interval("forget", 0.45)[1] == math.inf, "more than 2.5 % do not get there"
    pairs = [run(*zip((0, 4, 8), a.tolist())) for a in ours], [run(*zip((0, 4, 8), b.tolist())) for b in theirs]
    indices = [anamnesis_index(a, b, 0.5, within=0.1) for a, b in zip(*pairs, strict=True)]
    low = middle([0.0 if math.isnan(index) else index for index in indices])[0]
    high = middle([math.inf if math.isnan(index) else index for index in indices])[1]
    assert any(map(math.isnan, indices))
    assert anamnesis_interval(one, other, 0.5) == pytest.approx((low, high))


def test_the_interval_of_the_index_is_paired_and_says_when_it_cannot_be() -> None:
    fast = drawn(np.sort(some_curves(0, 0.9), axis=1) + [0, 0.5, 1])
    assert anamnesis_interval(fast, fast, 0.9) == (1.0, 1.0), "unpaired draws would spread"
    few = drawn(some_curves(0, 0.9), units=9)
    for pair in ((few, fast), (fast, few), (run((0, 0.1), lr=1.0), fast)):
        assert all(map(math.isnan, anamnesis_interval(*pair, 0.9)))
    with pytest.raises(LensUnlearnError, match="410 and 100 bootstrap draws: relearn both with the same resamples"):
        anamnesis_interval(fast, drawn(some_curves(0, 0.9)[:100]), 0.9)
    never = drawn(np.zeros((410, 3)))
    assert anamnesis_interval(never, never, 0.9) == (0.0, math.inf), "nothing can be said"
    assert anamnesis_interval(never, fast, 0.9) == (math.inf, math.inf)


# --- the figure ----------------------------------------------------------------------------------------------------------


def test_the_figure_shows_a_line_for_each_method() -> None:
    options = {"threat": "T1", "texts": {"source": "/home/me/facts.jsonl"}, "lr": 1e-4}
    options |= {"measured": {"forget": {"source": "facts", "tokens": 1234}}}
    one = replace(FAST, provenance={"model": "tiny", "relearning": options})
    fig = plot.relearning({"simu": one, "<b>%{x}": SLOW}, never_saw=NEVER, original=0.95)
    lines = {trace.name: trace for trace in theme.traces(fig)}
    assert list(lines) == ["never saw it", "simu", "&lt;b&gt;%&#123;x}", "before unlearning"]
    assert (lines["never saw it"].line.color, lines["never saw it"].line.dash) == (theme.CONTROL, "dash")
    assert lines["before unlearning"].line.dash == "dot"
    assert set(lines["before unlearning"].y) == {0.95}
    assert list(lines["simu"].y) == [0.1, 0.9]
    assert list(lines["simu"].x) == pytest.approx([0.0, math.log(5)])
    assert len({trace.line.color for trace in lines.values()}) == 4
    assert list(fig.layout.xaxis.ticktext) == ["0", "4", "12"]
    assert "step 4<br>accuracy 90.0%" in lines["simu"].hovertext[1]
    text = fig.layout.title.text
    assert "model tiny" in text
    assert "1,234 tokens" in text
    assert "/home" not in text
    assert "control" not in text, "there is none: dotted is the line of before"
    assert len(theme.traces(plot.relearning({"a": FAST}))) == 1
    ours = drawn(some_curves(0, 0.4))
    fig = plot.relearning({"b": FAST, "a": ours, "a:control": drawn(some_curves(1, 0.2))})
    lines = {trace.name: trace for trace in theme.traces(fig) if trace.mode != "none"}
    bands = {trace.name: trace for trace in theme.traces(fig) if trace.mode == "none"}
    assert list(lines) == ["a:control", "b", "a"], "methods lie above controls"
    assert (lines["a:control"].line.color, lines["a:control"].line.dash) == (theme.CONTROL, "dot")
    assert (lines["b"].line.color, lines["a"].line.color) == (theme.METHODS[0], theme.METHODS[1])
    assert list(bands) == ["a:control", "a"], "without intervals there is no band"
    assert "grey and dotted: random control" in fig.layout.meta["lens_unlearn"]["subtitle"]
    low, high = ours.measures["forget", 4].interval()
    assert (bands["a"].y[1], bands["a"].y[-2]) == (high, low)
    assert f"[{low:.1%}, {high:.1%}]" in lines["a"].hovertext[1]
    with pytest.raises(LensUnlearnError, match="nothing to draw"):
        plot.relearning({})
    with pytest.raises(LensUnlearnError, match="'retain' was not measured"):
        plot.relearning({"a": FAST}, corpus="retain")
