"""Logits that are computed a few at a time are those of a whole forward pass, whatever a model does to them at last."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from interventions_helpers import selection_of

import lens_unlearn as lu
from lens_unlearn.corpora.corpus import Batch
from lens_unlearn.evaluation import teacher_forcing
from lens_unlearn.evaluation.teacher_forcing import Outcome, outcomes, predict
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.model import unembedding as ends
from lens_unlearn.model.unembedding import unembedding

EVERY = tiny.ALL
QUANTITIES = ("loss", "top1", "top10", "right", "z_score", "kl")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens' logits stand at a time, and two are read at a time."""
    monkeypatch.setattr(ends, "AT_ONCE", 3 * tiny.VOCABULARY)
    monkeypatch.setattr(teacher_forcing, "READ", 4 * 3 * tiny.VOCABULARY)
    monkeypatch.setattr(teacher_forcing, "_IN_CACHE", 2 * tiny.VOCABULARY)


def batch_of(rows: int = 3, length: int = 9) -> Batch:
    tokens = tiny.some_tokens(rows, length)
    counted = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) > 0.3
    return Batch.of(list(tokens), list(counted), range(rows))


@pytest.mark.parametrize("each", EVERY)
def test_logits_are_those_of_a_whole_pass(each: str, few: None) -> None:
    model, batch = tiny.model(each), batch_of()
    where = batch.counted[:, 1:]
    with torch.no_grad():
        expected = model(batch.tokens, return_type="logits")[:, :-1][where]
        predicted = predict(model, batch)
        got = torch.cat([predicted.logits(part) for part in predicted.slices])
    assert len(list(predicted.slices)) > 3
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert predicted.target.tolist() == batch.tokens[:, 1:][where].tolist()


@pytest.mark.parametrize("each", EVERY)
def test_no_model_here_needs_its_logits_whole(each: str) -> None:
    model = tiny.model(each)
    before = len(tiny.hooks_of(model))
    with unembedding(model) as end, torch.no_grad():
        hidden = end.hidden(tiny.some_tokens(2, 5), torch.ones(2, 4, dtype=torch.bool))
    assert hidden.shape == (8, int(model.cfg.d_model))
    assert len(tiny.hooks_of(model)) == before


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"])
def test_what_a_model_does_to_its_logits_at_last_is_done(name: str) -> None:
    """Gemma 2 caps them, Cohere and Falcon H1 scale them, Granite divides them; a change nobody knows is noticed."""
    for known in (True, False):
        with tiny.quiet():
            model = tiny.build("llama")
        inner = model.original_model
        forward = inner.forward

        def change(x: torch.Tensor) -> torch.Tensor:
            return {
                "final_logit_softcapping": 0.05 * torch.tanh(x / 0.05),
                "logit_scale": x * 0.05,
                "logits_scaling": x / 0.05,
                "lm_head_multiplier": x * 0.05,
            }[name]

        def capped(*args: Any, forward: Any = forward, change: Any = change, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            out.logits = change(out.logits)
            return out

        inner.forward = capped
        if known:
            setattr(inner.config, name, 0.05)
        batch = batch_of()
        with torch.no_grad():
            expected = model(batch.tokens, return_type="logits")[:, :-1][batch.counted[:, 1:]]
            predicted = predict(model, batch)
        torch.testing.assert_close(predicted.logits(), expected, rtol=1e-4, atol=1e-4)
        assert (predicted.hidden.shape[1] == int(model.cfg.d_model)) == known


def test_somebodys_hook_on_the_unembedding_sees_every_position() -> None:
    model, batch, seen = tiny.model("gpt2"), batch_of(), list[tuple[int, ...]]()
    model.unembed.hook_out.add_hook(lambda tensor, hook: seen.append(tuple(tensor.shape)) or tensor * 2)
    try:
        with torch.no_grad():
            got = predict(model, batch).logits()
            expected = model(batch.tokens, return_type="logits")[:, :-1][batch.counted[:, 1:]]
    finally:
        model.reset_hooks()
    assert seen == [(3, 9, tiny.VOCABULARY)] * 2
    torch.testing.assert_close(got, expected)


def test_somebodys_module_hook_at_the_unembedding_acts() -> None:
    """Also where the model was looked at before the hook came, and as often as in a pass of the model's own."""
    model, batch, seen = tiny.model("llama"), batch_of(), list[tuple[int, ...]]()
    with torch.no_grad():
        plain = predict(model, batch).logits()
        handle = model.unembed.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)) or out * 2)
        try:
            got = predict(model, batch).logits()
            assert seen == [(3, 9, tiny.VOCABULARY)]
            report = lu.evaluate(model, {"a": tiny.corpus((6, 7))}, {}, resamples=5, progress=False)
        finally:
            handle.remove()
        without = lu.evaluate(model, {"a": tiny.corpus((6, 7))}, {}, resamples=5, progress=False)
    torch.testing.assert_close(got, 2 * plain)
    assert report["base", "a", "loss"].value != without["base", "a", "loss"].value


def test_quantities_are_those_of_plain_numpy(few: None) -> None:
    model, batch = tiny.model("llama"), batch_of()
    edit = Ablate(selection_of(model, seed=1))
    with torch.no_grad():
        base = predict(model, batch)
        with edit.on(model):
            other = predict(model, batch)
            logits = model(batch.tokens, return_type="logits")[:, :-1][batch.counted[:, 1:]].double().numpy()
        plain = model(batch.tokens, return_type="logits")[:, :-1][batch.counted[:, 1:]].double().numpy()
        tables = outcomes([base, other], QUANTITIES, base)
    target = batch.tokens[:, 1:][batch.counted[:, 1:]].numpy()
    p_base = np.exp(plain - np.logaddexp.reduce(plain, axis=1, keepdims=True))
    for table, x in zip(tables, (plain, logits), strict=True):
        log_p = x - np.logaddexp.reduce(x, axis=1, keepdims=True)
        p, own = np.exp(log_p), log_p[np.arange(len(target)), target]
        mean = (p * log_p).sum(1)
        sigma = np.sqrt(np.maximum((p * (log_p - mean[:, None]) ** 2).sum(1), 1e-6))
        rank = (x > x[np.arange(len(target)), target][:, None]).sum(1)
        expected = [
            -own,
            rank < 1,
            rank < 10,
            rank < 1,
            (own - mean) / sigma,
            (p_base * (np.log(p_base) - log_p)).sum(1),
        ]
        np.testing.assert_allclose(table, np.stack(expected, axis=1), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5, 6, 7), (5, 0, 3), (3, 1), (0,), (4, 4, 0, 0)])
def test_each_of_many_models_is_read_as_it_is_alone(few: None, order: tuple[int, ...], dtype: torch.dtype) -> None:
    """0 is the unedited model, which may stand anywhere among them, or not at all."""
    with tiny.quiet():
        model = tiny.build("llama").to(dtype)
    batch, read = batch_of(), []
    with torch.no_grad():
        base = predict(model, batch)
        for seed in range(1, 8):
            with Ablate(selection_of(model, share=0.1 * seed, seed=seed)).on(model):
                read.append(predict(model, batch))
        every = [base, *read]
        together = outcomes([every[i] for i in order], QUANTITIES, base)
        alone = [outcomes([every[i]], QUANTITIES, base)[0] for i in order]
    for number, table, other in zip(order, together, alone, strict=True):
        np.testing.assert_array_equal(table, other)
        assert table.shape == (len(base.target), len(QUANTITIES))
        assert bool((table[:, -1] == 0).all()) == (number == 0), "only the unedited model is as far from itself as that"


def test_logits_of_a_short_type_are_read_as_numbers_of_float32() -> None:
    logits = (4 * torch.randn(7, 700, generator=torch.Generator().manual_seed(2))).bfloat16()
    target = logits.float().topk(5, dim=1).indices[:, 4]
    outcome, exact = Outcome(logits, target), logits.double().log_softmax(1)
    torch.testing.assert_close(outcome.loss.double(), -exact.gather(1, target[:, None])[:, 0], rtol=1e-6, atol=1e-6)
    ahead = (logits > logits.gather(1, target[:, None])).sum(1)
    ties = (logits == logits.gather(1, target[:, None])).sum(1)
    torch.testing.assert_close(outcome.top10, ((10 - ahead) / ties).clamp(0, 1).float())


def test_logits_in_double_precision_are_compared_in_it() -> None:
    logits = torch.tensor([[1.0, 1 + 1e-12, 0.0]], dtype=torch.float64)
    first, second = (Outcome(logits, torch.tensor([target])) for target in (0, 1))
    assert (float(first.top1), float(second.top1), float(second.right)) == (0, 1, 1)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_logits_anywhere_in_a_row_are_seen_whatever_is_asked_for(odd: float, dtype: torch.dtype) -> None:
    logits = torch.zeros(4, 600, dtype=dtype)
    for row, place in ((0, 0), (1, 599), (3, 300)):
        logits[row, place] = odd
    table = Outcome(logits, torch.tensor([0, 1, 2, 3])).table(["top1"])
    assert table.isnan()[:, 0].tolist() == [True, True, False, True]


def test_losses_in_parts_have_the_gradients_of_a_whole_pass(few: None) -> None:
    with tiny.quiet():
        model = tiny.build("llama")
    batch, parameters = batch_of(), [p.requires_grad_() for p in model.parameters()]
    where = batch.counted[:, 1:]
    logits = model(batch.tokens, return_type="logits")[:, :-1][where]
    whole = torch.autograd.grad(F.cross_entropy(logits, batch.tokens[:, 1:][where]), parameters, allow_unused=True)
    nll = predict(model, batch).nll()
    parts = torch.autograd.grad(nll.mean(), parameters, allow_unused=True)
    assert sum(one is not None for one in parts) > 5
    for one, other in zip(parts, whole, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_an_error_in_the_pass_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    before = dict(model.unembed.__dict__)
    for error in (RuntimeError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)), unembedding(model):
            raise error
    assert model.unembed.__dict__.keys() == before.keys()
    everywhere = torch.ones(1, 2, dtype=torch.bool)
    with monkeypatch.context() as patch, unembedding(model) as end:
        patch.setattr(model, "forward", lambda *a, **k: (_ for _ in ()).throw(ValueError("broken")))
        with pytest.raises(ValueError, match="broken"):
            end.hidden(tiny.some_tokens(1, 3), everywhere)
    assert model.unembed.__dict__.keys() == before.keys()


def test_an_abstaining_row_is_constant_in_every_part(few: None) -> None:
    model = tiny.speaking("gpt2")
    corpus = tiny.corpus([9] * 12).with_prompts(seed=1)
    act = lu.Abstain({lu.Site(0, "mlp.post"): Everything(len_of(model))})
    for batch in corpus.batches(12):
        with torch.no_grad(), act.on(model):
            predicted = predict(model, batch)
            whole = model(batch.tokens, return_type="logits")
        assert bool(predicted.abstained.all())
        got = torch.cat([predicted.logits(part) for part in predicted.slices])
        assert bool((got.amax(1) <= 1e-3).all())
        assert bool((got.sum(1) - 1e-3).abs().max() < 1e-6)
        assert whole.shape[0] == 12


def len_of(model: Any) -> int:
    return int(model.cfg.d_mlp)


class Everything:
    """A region that every key is in."""

    def __init__(self, width: int) -> None:
        self.scale = torch.ones(width)

    def contains(self, keys: torch.Tensor) -> torch.Tensor:
        return torch.ones(keys.shape[:-1], dtype=torch.bool)
