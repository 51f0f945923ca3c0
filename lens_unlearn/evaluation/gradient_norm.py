"""`gradient_norms`: how far a document would move a model's weights, for membership inference.

Knows parameters and their gradients; writes into neither.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.errors import ModelError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.evaluation.teacher_forcing import predict
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.model.host import Model, is_quantized

__all__ = ["gradient_norms"]


def gradient_norms(
    model: Model, corpus: Corpus, intervention: Intervention | None = None, bar: Any = None
) -> Float[np.ndarray, "documents"]:
    """Return of each document the L2 norm of the gradient of its mean loss; NaN where nothing is predicted.

    The norm is that of all weights together, since that does not depend on how a model cuts its weights into tensors. An
    end-of-text token behind an answer does not count.

    Args:
        model: In evaluation mode.
        corpus: Whose documents.
        intervention: What acts meanwhile; its own tensors are no weights.
        bar: Of progress, one step a row.

    Raises:
        ModelError: If weights are quantized, which have no gradients.
    """
    counts = np.zeros(corpus.n_documents)
    sums: dict[int, list[Tensor | None]] = {}
    found = np.full(corpus.n_documents, np.nan)
    last = {document: row for row, document in enumerate(corpus.document.tolist())}
    with nullcontext() if intervention is None else intervention.on(model), _trainable(model) as weights:
        for row, document in enumerate(corpus.document.tolist()):
            nll = predict(model, corpus.take([row])).nll()
            nll = nll[: len(nll) - corpus.ends_with_eos(row)]
            if len(nll):
                counts[document] += len(nll)
                parts = torch.autograd.grad(nll.double().sum(), weights, allow_unused=True)
                before = sums.get(document, [None] * len(weights))
                sums[document] = [a if b is None else b if a is None else a + b for a, b in zip(before, parts)]
            if row == last[document] and document in sums:  # nothing is kept of a document that is over
                squares = [part.double().square().sum() for part in sums.pop(document) if part is not None]
                found[document] = float(torch.stack(squares).sum().sqrt()) / counts[document] if squares else 0.0
            if bar is not None:
                bar.update(1)
    return found


@contextmanager
def _trainable(model: Model) -> Iterator[list[Tensor]]:
    """Give the weights, which take part in gradients for the length of the block."""
    weights = [one for one in model.parameters() if one.is_floating_point()]
    if any(map(is_quantized, model.parameters())):
        raise ModelError(
            "quantized weights have no gradients: leave gradients=True out, or load the model without quantization"
        )
    before = [one.requires_grad for one in weights]
    try:
        for one in weights:
            one.requires_grad_(True)
        with torch.enable_grad():
            yield weights
    finally:
        for one, had in zip(weights, before, strict=True):
            one.requires_grad_(had)
