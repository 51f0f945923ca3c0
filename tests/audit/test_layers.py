"""Depth and logit lens: two plain models with plain PyTorch hooks are the oracle."""

from typing import Any

import numpy as np
import pytest
import tiny
from audit_helpers import LAYERS, suppressor, world
from interventions_helpers import selection_of
from torch import Tensor

import lens_unlearn as lu
from lens_unlearn.audit import layers
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.base import Chain

QUICK: dict[str, Any] = {"progress": False, "resamples": 50}


def rows_of(corpus: Any) -> list[tuple[Tensor, int]]:
    """Each fact's tokens, and where its answer begins."""
    return [(corpus.row(i), len(corpus.prompt(i))) for i in range(corpus.n_rows)]


def streams(plain: Any, tokens: Tensor) -> list[Tensor]:
    """What each block of a plain model gives, by plain hooks."""
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for block in plain.transformer.h
    ]
    plain(tokens[None])
    for handle in handles:
        handle.remove()
    return seen


def log_p(logits: Tensor, tokens: Tensor, begin: int) -> Tensor:
    return logits[0, begin - 1 : -1].log_softmax(-1).gather(1, tokens[begin:, None])[:, 0]


def patched(plain: Any, tokens: Tensor, layer: int, stream: Tensor, begin: int) -> Tensor:
    """The logits of a plain model that is given another stream where the answer is predicted."""

    def write(module: Any, args: Any, out: Any) -> Any:
        mine = (out[0] if isinstance(out, tuple) else out).clone()
        mine[:, begin - 1 : -1] = stream[:, begin - 1 : -1]
        return (mine, *out[1:]) if isinstance(out, tuple) else mine

    handle = plain.transformer.h[layer].register_forward_hook(write)
    logits = plain(tokens[None]).logits
    handle.remove()
    return logits


def plain_depth(plain: Any, others: dict[str, Any]) -> dict[str, np.ndarray]:
    """[facts, layers] of the mean log-probability that each loses."""
    found: dict[str, list[list[float]]] = {name: [] for name in others}
    for tokens, begin in rows_of(world().facts):
        full = log_p(plain(tokens[None]).logits, tokens, begin)
        for name, other in others.items():
            theirs = streams(other, tokens)
            own = [log_p(patched(plain, tokens, i, theirs[i], begin), tokens, begin) for i in range(LAYERS)]
            found[name].append([float((full - one).mean()) for one in own])
    return {name: np.array(lost) for name, lost in found.items()}


def plain_lens(plain: Any, others: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """[facts, layers] of mean log-probability in the lens, and of mean rank."""
    values: dict[str, list[list[float]]] = {name: [] for name in others}
    ranks: dict[str, list[list[float]]] = {name: [] for name in others}
    for tokens, begin in rows_of(world().facts):
        for name, other in others.items():
            logits = [plain.lm_head(plain.transformer.ln_f(x)) for x in streams(other, tokens)]
            values[name].append([float(log_p(one, tokens, begin).mean()) for one in logits])
            answers = [one[0, begin - 1 : -1] for one in logits]
            own = [one.gather(1, tokens[begin:, None]) for one in answers]
            ranks[name].append([float(((o > a).sum(1) + 1).double().mean()) for o, a in zip(answers, own, strict=True)])
    return tuple({name: np.array(v) for name, v in one.items()} for one in (values, ranks))  # type: ignore[return-value]


def by_hand(lost: np.ndarray, reference: np.ndarray) -> tuple[float, int]:
    scores = []
    for own, never in zip(lost, reference, strict=True):
        counted = [(d1, d2) for d1, d2 in zip(never, own, strict=True) if d1 > 0.05]
        if counted:
            total = sum(d1 for d1, _ in counted)
            scores.append(sum(d1 * min(max(d2 / d1, 0.0), 1.0) for d1, d2 in counted) / total)
    return float(np.mean(scores)), len(scores)


@pytest.fixture(scope="module")
def halfway() -> Any:
    """The plain model that is half way to its twin, which a delta at half strength makes of the other."""
    import copy

    made = copy.deepcopy(world().plain)
    twin = dict(world().plain_never_saw.named_parameters())
    for name, parameter in made.named_parameters():
        parameter.data.lerp_(twin[name].data, 0.5)
    return made


@pytest.fixture(scope="module")
def found() -> Any:
    w = world()
    conditions = {"half": w.gone.at(0.5), "gone": w.gone, "hidden": suppressor(), "nothing": Chain(())}
    return lu.audit(
        w.model, w.facts, conditions, reference=w.never_saw, attacks=("depth", "logit_lens"), controls=False, **QUICK
    )


def test_depth_is_what_two_plain_models_with_plain_hooks_give(found: Any, halfway: Any) -> None:
    w = world()
    lost = plain_depth(w.plain, {"half": halfway, "reference": w.plain_never_saw})
    for name, table in lost.items():
        got = [found[name, "depth", f"drop@{layer}"].value for layer in range(LAYERS)]
        np.testing.assert_allclose(got, table.mean(0), atol=1e-6)
    score, n = by_hand(lost["half"], lost["reference"])
    assert found["half", "depth", "score"].value == pytest.approx(score, abs=1e-6)
    assert 0.02 < score < 0.98
    assert found["half", "depth", "score"].n == n


def test_the_logit_lens_is_what_a_plain_model_s_own_norm_and_unembedding_read(found: Any, halfway: Any) -> None:
    w = world()
    values, ranks = plain_lens(w.plain, {"base": w.plain, "half": halfway, "reference": w.plain_never_saw})
    for name in values:
        got = [found[name, "logit_lens", f"log_probability@{layer}"].value for layer in range(LAYERS)]
        np.testing.assert_allclose(got, values[name].mean(0), atol=1e-6)
        got = [found[name, "logit_lens", f"rank@{layer}"].value for layer in range(LAYERS)]
        np.testing.assert_allclose(got, ranks[name].mean(0), atol=1e-6)
    score, _ = by_hand(values["base"] - values["half"], values["base"] - values["reference"])
    assert found["half", "logit_lens", "score"].value == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("attack", ["depth", "logit_lens"])
def test_at_both_ends_and_for_what_only_hides(found: Any, attack: str) -> None:
    for name, score in {"base": 0, "nothing": 0, "hidden": 0, "gone": 1, "reference": 1}.items():
        assert found[name, attack, "score"].value == pytest.approx(score, abs=0.02), name
        assert found[name, attack, "recovered"].value == pytest.approx(1 - score, abs=0.02), name
    base, nothing = (found.curve(name, attack, next(iter({"depth": ["drop"], "logit_lens": ["rank"]}[attack]))) for name in (
        "base", "nothing"))  # fmt: skip
    assert [one.value for one in base.values()] == pytest.approx([one.value for one in nothing.values()], abs=1e-9)


def test_where_blocks_pass_on_more_whole_passes_give_the_same(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    w, of = world(), layers.Trace.of
    monkeypatch.setattr(layers.Trace, "of", lambda case, batch, replays=None: of(case, batch, False))
    again = lu.audit(
        w.model,
        w.facts,
        {"half": w.gone.at(0.5)},
        reference=w.never_saw,
        attacks=("depth", "logit_lens"),
        controls=False,
        **QUICK,
    )
    for key, measure in again.measures.items():
        assert measure.value == pytest.approx(found[key].value, abs=1e-9), key


def test_depth_costs_no_more_than_the_passes_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    w, ran = world(), []
    for model in (w.model, w.never_saw):
        for block in model.blocks:
            inner = block.original_component.forward
            monkeypatch.setitem(
                block.original_component.__dict__, "forward", lambda *a, f=inner, **k: (ran.append(1), f(*a, **k))[1]
            )
    lu.audit(
        w.model, w.facts, {"half": w.gone.at(0.5)}, reference=w.never_saw, attacks=("depth",), controls=False, **QUICK
    )
    everybody = 2  # the condition and the reference; the base's own stream changes nothing, and is not written
    plain = 3  # everybody's answers without an attack
    needed = (plain + 1 + everybody) * LAYERS + everybody * sum(LAYERS - 1 - layer for layer in range(LAYERS))
    assert 0 < len(ran) <= 1.3 * needed


def test_without_a_reference_the_curves_are_there_and_no_score() -> None:
    w = world()
    alone = lu.audit(w.model, w.facts, {"gone": w.gone}, attacks=("depth", "logit_lens"), controls=False, **QUICK)
    assert {metric for _, _, metric in alone.measures if "@" not in metric} == set()
    assert alone["gone", "depth", "drop@2"].value > 0.05
    assert all("no reference" in " ".join(alone.notes[name]) for name in ("depth", "logit_lens"))
    assert list(alone.table()["reference"]) == ["no reference"] * 2


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "gpt2-compat", "native-gpt2", *tiny.HOOKED[:1]])
def test_on_other_models_passes_from_a_layer_on_give_what_whole_passes_give(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = tiny.model(name), tiny.build(name, seed=1)
    corpus = tiny.corpus([9, 12, 7, 10, 8, 11, 9, 8, 12, 10], seed=1).with_prompts(4)
    conditions = {"pruned": Ablate(selection_of(model)), "nothing": Chain(())}
    options = {"reference": other, "attacks": ("depth", "logit_lens"), "controls": False, **QUICK}
    tried, of = [], layers.Trace.of
    monkeypatch.setattr(layers.Trace, "of", lambda *given: tried.append(made := of(*given)) or made)
    quick = lu.audit(model, corpus, conditions, **options)
    assert all(one.replays for one in tried)
    monkeypatch.setattr(layers.Trace, "of", lambda case, batch, replays=None: of(case, batch, False))
    whole = lu.audit(model, corpus, conditions, **options)
    for key, measure in quick.measures.items():
        assert measure.value == pytest.approx(whole[key].value, abs=1e-4), key
    assert quick["nothing", "depth", "score"].value == pytest.approx(0, abs=1e-3)
    assert quick["reference", "depth", "score"].value == pytest.approx(1)
    assert quick["pruned", "depth", "score"].value > 0
