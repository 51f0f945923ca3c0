"""Figures with a cell for each routed expert show the numbers that they are given."""

import numpy as np
import pytest
import torch

import lens_unlearn as lu
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.model.routed import Routed
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.moments import Moments


def moments(shares: list[int], *, layers: tuple[int, ...] = (0, 2)) -> Moments:
    """Make moments of ten tokens, so many of which are routed to each expert."""
    found = Moments()
    expert = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(shares))
    token = torch.cat([torch.arange(n) for n in shares])
    for layer in layers:
        values = Routed(torch.ones(len(token), 3), torch.full((len(token),), 0.5), expert, token, len(shares), (1, 10))
        found.update_routed(Site(layer, "experts.post"), values, torch.ones(10))
    found.provenance = {"model": "tiny", "corpus": "some.jsonl", "tokens": 10}
    return found


def test_loads_are_the_shares_of_tokens() -> None:
    fig = lu.plot.expert_load({"code": moments([10, 4, 1, 0]), "prose": moments([2, 8, 0, 5])})
    first, second = fig.data
    np.testing.assert_allclose(np.array(first.z, float)[[0, 2]], [[1.0, 0.4, 0.1, 0.0]] * 2)
    assert np.isnan(np.array(first.z, float)[1]).all(), "a layer without experts"
    np.testing.assert_allclose(np.array(second.z, float)[0], [0.2, 0.8, 0.0, 0.5])
    assert "L2.experts.post[1, :]" in first.text[2][1]
    assert "4 tokens, mean gate 0.5" in first.text[2][1]
    assert first.coloraxis == second.coloraxis == "coloraxis"


def test_loads_against_another_corpus_are_differences() -> None:
    fig = lu.plot.expert_load({"code": moments([10, 4, 1, 0]), "prose": moments([2, 8, 0, 5])}, against="prose")
    np.testing.assert_allclose(np.array(fig.data[0].z, float)[0], [0.8, -0.4, 0.1, -0.5])
    assert fig.data[0].coloraxis != fig.data[1].coloraxis


def test_layer_importance_by_expert_is_the_mean_over_each_experts_neurons() -> None:
    site = Site(1, "experts.post")
    score = NeuronMap({site: torch.arange(12.0).view(3, 4)})
    chosen, means = lu.plot.layer_importance(score, score.top(0.5), by="expert").data
    np.testing.assert_allclose(np.array(chosen.z, float), [[0.0, 0.5, 1.0]])
    np.testing.assert_allclose(np.array(means.z, float), [[1.5, 5.5, 9.5]])
    assert [
        trace.name for trace in lu.plot.layer_importance({"a": score.top(0.5), "b": score.top(0.2)}, by="expert").data
    ] == ["a", "b"]
    lu.plot.layer_importance(score, score.top(0.5))
    lu.plot.neuron_heatmap(score, selection=score.top(0.5))
    assert "L1.experts.post[2, 3]" in str(lu.plot.neuron_heatmap(score).data[0].text)


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: lu.plot.expert_load({}), "draws Moments"),
        (lambda: lu.plot.expert_load({"a": 3}), "draws Moments"),  # type: ignore[dict-item]
        (lambda: lu.plot.expert_load(Moments()), "no routed experts: collect at 'experts.post'"),
        (lambda: lu.plot.expert_load({"a": moments([1, 2])}, against="b"), "against='b' is none of the corpora"),
        (
            lambda: lu.plot.expert_load({"a": moments([1, 2]), "b": moments([1, 2, 3])}),
            "differ in their layers or experts",
        ),
        (lambda: lu.plot.expert_load({str(n): moments([1, 2]) for n in range(9)}), "draws 8 corpora at most, not 9"),
        (
            lambda: lu.plot.layer_importance(NeuronMap({Site(0, "mlp.post"): torch.ones(3)}), by="expert"),
            "knows its experts",
        ),
        (
            lambda: lu.plot.layer_importance(NeuronMap({Site(0, "mlp.post"): torch.ones(3)}), by="head"),
            "by='head' is not known",
        ),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_drawn_is_said(draw, words) -> None:
    with pytest.raises(LensUnlearnError, match=words):
        draw()
