"""Helpers shared by tests: padding, prompts and keys."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tiny
import torch
from interventions_helpers import selection_of
from torch import Tensor

from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.keyspace.regions import Box
from lens_unlearn.model.hooks import attach, detach_all
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons.maps import NeuronMap

LAST = Site(1, "mlp.post")


RADIUS = 2e-3


ROWS = [[40, 41, 42], [50, 51, 52, 53, 54, 55, 56], [60], [70, 71, 72, 73, 74]]


def pad(rows: Sequence[Sequence[int]], side: str, extra: int = 0, value: int = tiny.PAD) -> tuple[Tensor, Tensor]:
    """Return the tokens of rows padded on one side, and where they are real."""
    width = max(map(len, rows)) + extra
    tokens, mask = torch.full((len(rows), width), value), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[i, where], mask[i, where] = torch.tensor(row), 1
    return tokens, mask


def run(model: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(tokens, **({} if mask is None else {"attention_mask": mask})).clone()


@contextmanager
def watching(model: Any, site: Site) -> Iterator[list[Tensor]]:
    """Keep what passes a site, as what was attached before left it."""
    seen: list[Tensor] = []
    remove = attach(resolve(model, [site])[site].hook, lambda t: seen.append(t.detach().clone()))
    try:
        yield seen
    finally:
        detach_all([remove])


def values(model: Any, tokens: Tensor, site: Site, mask: Tensor | None = None) -> Tensor:
    with watching(model, site) as seen:
        run(model, tokens, mask)
    return seen[0]


def key(model: Any, row: Sequence[int], site: Site = LAST, at: int = -1) -> Tensor:
    return values(model, torch.tensor([list(row)]), site)[0, at].flatten().float()


def around(*keys: Tensor, radius: float = RADIUS) -> Box:
    """A box about one key, or, for several, none that a test should need."""
    [only] = keys
    return Box(only[None], torch.ones(len(only)), radius)


def everywhere(model: Any, site: Site = LAST) -> Box:
    width = math.prod(resolve(model, [site])[site].shape)
    return Box(torch.zeros(1, width), torch.ones(width), 1e30)


def about(model: Any, row: Sequence[int], site: Site = LAST, **options: Any) -> Abstain:
    """Abstain from one prompt."""
    return Abstain({site: around(key(model, row, site))}, **options)


def ids(model: Any, text: str) -> list[int]:
    return [model.tokenizer.bos_token_id] + model.tokenizer(text, add_special_tokens=False)["input_ids"]


def adjust_of(model: Any, kinds: Any = "mlp.pre", seed: int = 0, rule: Any = "random", share: float = 0.5) -> Adjust:
    """An adjustment whose two distributions overlap, so that chance has a say at most positions."""
    selection = selection_of(model, kinds, share)

    def drawn(scale: float, shift: float, number: int) -> NeuronMap:
        generator = torch.Generator().manual_seed(number)
        return selection.map(lambda m: torch.rand(m.shape, generator=generator) * scale + shift)

    parts = [drawn(0.4, -0.2, 1), drawn(0.4, 0.6, 2), drawn(0.4, -0.2, 3), drawn(0.4, 0.8, 4)]
    return Adjust(selection, *parts, rule=rule, seed=seed)
