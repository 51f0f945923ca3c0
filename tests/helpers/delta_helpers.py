"""Shared words of the tests: deltas."""

import torch
from torch import Tensor

from lens_unlearn import Update

KINDS = ["dense", "rows", "columns", "rank"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.3


def update(shape: tuple[int, int], kind: str = "dense", seed: int = 0) -> Update:
    some = torch.randperm(min(shape), generator=torch.Generator().manual_seed(seed))[:5]
    if kind == "rows":
        return Update(draw(5, shape[1], seed=seed), rows=some)
    if kind == "columns":
        return Update(draw(shape[0], 5, seed=seed), columns=some)
    if kind == "rank":
        return Update(draw(shape[0], 3, seed=seed), right=draw(3, shape[1], seed=seed + 1))
    return Update(draw(*shape, seed=seed))
