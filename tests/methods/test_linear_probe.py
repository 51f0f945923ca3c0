"""The linear probe: the conditions of its minimum, a planted neuron, what is ranked and ablated, what is refused."""

from typing import Any

import pytest
import tiny
import torch

import lens_unlearn as lu
from lens_unlearn.core.errors import CorpusError, LensUnlearnError, SelectionError
from lens_unlearn.methods import by_name
from lens_unlearn.methods.linear_probe import _scores, fitted_probe, probe_ranking

QUIET: dict[str, Any] = {"progress": False}
FORGET, RETAIN = (tiny.corpus((9, 14, 11, 30, 12), seed=seed, name=f"texts {seed}") for seed in (1, 2))


def keys(n: int = 300, width: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    forget, retain = torch.randn(2, n, width, generator=draw) * torch.linspace(0.1, 5, width) + 1
    forget[:, 3] += 0.2  # of a small neuron
    retain[:, 7] += 2.0
    forget[:, 12], retain[:, 12] = 0.1, 0.1
    return forget, retain


@pytest.mark.parametrize(("l1", "l2"), [(1e-2, 1e-3), (0.1, 0.0), (0.0, 1e-2)])
def test_the_probe_is_at_the_minimum_of_its_objective(l1: float, l2: float) -> None:
    forget, retain = keys()
    weights, slopes = fitted_probe(forget, retain, l1, l2)
    x = torch.cat([forget, retain]).double()
    std = x.std(0, correction=0)
    x = (x - x.mean(0)) / torch.where(std > 0, std, 1)
    y = torch.cat([torch.ones(len(forget)), -torch.ones(len(retain))]).double()
    w, b = weights.clone().requires_grad_(), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    smooth = (
        torch.nn.functional.softplus(-y * (x @ w + b)).mean() + l2 * w.square().sum()
    )  # as many on each side: b = 0
    gradient, at_b = torch.autograd.grad(smooth, (w, b))
    assert abs(float(at_b)) < 1e-3
    torch.testing.assert_close(slopes, gradient.detach(), rtol=1e-3, atol=2e-4)
    used = weights != 0
    torch.testing.assert_close(gradient[used], -l1 * weights[used].sign(), rtol=0, atol=2e-4)
    assert bool((gradient[~used].abs() <= l1 + 2e-4).all())
    assert float(weights[12]) == 0
    if l1:
        assert 0 < int(used.sum()) < 20


def test_what_tells_the_sides_apart_is_ranked_first_whatever_its_scale_and_what_has_no_weight_last() -> None:
    weights, slopes = fitted_probe(*keys(), 0.02, 1e-3)
    scores = _scores(weights, slopes, 0.02)
    assert sorted(scores.argsort(descending=True)[:2].tolist()) == [3, 7]
    assert (float(weights[3]) > 0, float(weights[7]) < 0) == (True, True)
    without = weights == 0
    assert float(scores[without].max()) < float(scores[~without].min())
    order = scores[without].argsort(descending=True)
    assert torch.equal(order, slopes[without].abs().argsort(descending=True))


def test_the_highest_scores_are_ablated_and_the_control_has_as_many_in_every_layer() -> None:
    model, record = tiny.model("llama"), by_name("linear-probe")
    fitted = record.fit(model, FORGET, RETAIN, {"l1": 0.01, **QUIET})
    found = record.at(model, fitted, 0.25, QUIET)
    assert isinstance(found, lu.Ablate)
    assert found.selection.equals(probe_ranking(model, FORGET, RETAIN, fraction=0.25, l1=0.01, **QUIET).selection)
    sides = [lu.collect(model, corpus, statistic=lu.KeySample(), progress=False) for corpus in (FORGET, RETAIN)]
    flat = [torch.cat([side[site] for site in fitted[0]], 1) for side in sides]
    scores = _scores(*fitted_probe(*flat, 0.01), 0.01)
    torch.testing.assert_close(fitted[0].flat(), scores)
    assert torch.equal(found.selection.flat().nonzero()[:, 0], scores.argsort(descending=True)[:32].sort().values)
    [control] = record.controls(model, found, fitted, [2])
    assert isinstance(control, lu.Ablate)
    assert control.selection.per_layer() == found.selection.per_layer()
    assert not control.selection.equals(found.selection)
    fewer = probe_ranking(model, FORGET, RETAIN, fraction=0.25, l1=0.01, samples=9, seed=1, **QUIET)
    assert not fewer.selection.equals(found.selection)
    assert not record.by_default


def test_what_cannot_be_is_refused_before_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    with pytest.raises(SelectionError, match="l1=10 leaves the probe no weight"):
        probe_ranking(model, FORGET, RETAIN, l1=10, fraction=0.1, **QUIET)
    monkeypatch.setattr("lens_unlearn.methods.linear_probe.collect", lambda *_, **__: pytest.fail("a pass was made"))
    for options, words in (({"samples": 0}, "samples=0"), ({"l1": -1}, "l1=-1"), ({"l2": "x"}, "l2='x'")):
        with pytest.raises(LensUnlearnError, match=words):
            probe_ranking(model, FORGET, RETAIN, fraction=0.1, **options)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="selects nothing of"):
        probe_ranking(model, FORGET, RETAIN, fraction=0.0001)
    with pytest.raises(LensUnlearnError, match="the same text"):
        probe_ranking(model, FORGET, FORGET, fraction=0.1)
    with pytest.raises(CorpusError, match="give one"):
        probe_ranking(model, FORGET, None, fraction=0.1)
