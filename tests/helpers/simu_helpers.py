"""Corpora, options of a quick training, and random masks, shared by the tests of SIMU."""

from typing import Any

import tiny
import torch

from lens_unlearn import NeuronMap, Site

FORGET = tiny.corpus([9, 12, 7, 10, 8, 11], seed=1).with_prompts(4)


RETAIN = tiny.corpus([8, 13, 9, 7, 12, 10, 9, 8, 11, 10], seed=2).with_prompts(4)


QUICK: dict[str, Any] = {
    "optimizer": "sophia",
    "attention": "full",
    "weight_decay": 0.0,
    "floor": 20.0,
    "steps": 6,
    "check_every": 2,
    "batch_size": 3,
    "progress": False,
    "curvature_every": 2,
}


def some_rows(share: float = 0.2, seed: int = 0) -> NeuronMap:
    generator = torch.Generator().manual_seed(seed)
    return NeuronMap({Site(i, "mlp.post"): torch.rand(64, generator=generator) < share for i in range(tiny.LAYERS)})
