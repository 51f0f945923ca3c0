"""Shared words of the tests: collecting."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import tiny

from lens_unlearn.model.sites import Site
from lens_unlearn.neurons import collect as collecting
from lens_unlearn.neurons.collect import collect


def counted_values(name: str, kinds: Any, corpus: Any) -> dict[Site, np.ndarray]:
    """Every counted activation of a plain model, one unpadded row at a time, in float64."""
    plain, values = tiny.hugging_face(name), {}
    for row in range(corpus.n_rows):
        start, end = int(corpus.starts[row]), int(corpus.starts[row + 1])
        seen = tiny.plain_activations(plain, name, kinds, corpus.tokens[start:end].long()[None])
        for site, value in seen.items():
            values.setdefault(site, []).append(value[0][corpus.counted[start:end]].double().flatten(1).numpy())
    return {site: np.concatenate(parts) for site, parts in values.items()}


class Interrupt(BaseException):
    pass


def run_until(monkeypatch: pytest.MonkeyPatch, batch: int, *arguments: Any, **options: Any) -> None:
    """Collect, and be interrupted in the middle of a batch."""
    real, seen = collecting.backbone, Counter[str]()

    def forward(model: Any, tokens: Any) -> None:
        try:
            real(model, tokens)
        finally:
            seen["n"] += 1
            if seen["n"] > batch:
                raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(collecting, "backbone", forward)
        with pytest.raises(Interrupt):
            collect(*arguments, **options)
