"""Figures of maps take every kind of site, the features of dictionaries among them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lens_unlearn as lu
from lens_unlearn.figures import theme
from lens_unlearn.model.sites import KINDS


def features(seed: int) -> torch.Tensor:
    """Draw sparse values of 48 features."""
    return (torch.randn(60, 48, generator=torch.Generator().manual_seed(seed)) - 1).relu()


def moments(seed: int) -> lu.Moments:
    found = lu.Moments()
    for layer in (1, 3):
        found.update(lu.Site(layer, "sae"), features(seed + layer), torch.ones(60))
    return found


def histogram(seed: int) -> lu.Histogram:
    found = lu.Histogram()
    found.update(lu.Site(3, "sae"), features(seed), torch.ones(60))
    return found


FORGET, RETAIN = moments(0), moments(10)
SCORE = FORGET.mean_abs / (RETAIN.mean_abs + 1e-3)
FIGURES: dict[str, Callable[[], Any]] = {
    "specialization_map": lambda: lu.plot.specialization_map(FORGET, RETAIN),
    "layer_importance": lambda: lu.plot.layer_importance(SCORE, SCORE.top(0.1)),
    "neuron_heatmap": lambda: lu.plot.neuron_heatmap(SCORE),
    "selection_overlap": lambda: lu.plot.selection_overlap({"a": SCORE.top(0.1), "b": FORGET.mean.top(0.1)}),
    "activation_distribution": lambda: lu.plot.activation_distribution(
        {"forget": histogram(0), "retain": histogram(1)}, [(lu.Site(3, "sae"), 5)]
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_place_in_figures(kind: str) -> None:
    score = lu.NeuronMap({lu.Site(0, "resid"): torch.arange(4.0), lu.Site(1, kind): torch.arange(6.0)})
    assert set(theme.kinds_of(score, None)) == {"resid", kind}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_of_maps_take_features(name: str) -> None:
    assert "sae" in FIGURES[name]().to_json()
