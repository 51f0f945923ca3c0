"""`written_row`, `direct_logits`: what a neuron writes into the residual stream, and the logits that this is directly.

Knows the final norm and the unembedding of a model, whatever kinds they are; knows nothing of how they are shown.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.errors import SiteError
from lens_unlearn.model.feature_points import FEATURES, attached
from lens_unlearn.model.host import Model, device_of
from lens_unlearn.model.matrices import matrix_value
from lens_unlearn.model.sites import Site

__all__ = ["direct_logits", "written_row"]

ROWS = {"mlp.pre": "W_out", "mlp.pre_linear": "W_out", "mlp.post": "W_out", "attn.z": "W_O"}
"""By kind of site, the matrix of which a neuron has a row."""
LARGE = 1e4
"""The size at which a norm's epsilon is nothing beside its input."""


def written_row(model: Model, site: Site, index: int) -> Float[Tensor, "width"]:
    """Return what a neuron adds to the residual stream for each unit of its activation: its row of the output matrix.

    Of a dictionary's feature it is its row of the decoder, where the dictionary reads the residual stream or what is added to it.

    Args:
        model: The model.
        site: At an MLP or attention, or of a dictionary's features; of an MLP's pre-activations, the row of the same neuron.
        index: The neuron's flat index.

    Raises:
        SiteError: If a neuron there has no row of its own.
    """
    if site.kind == FEATURES and (dictionary := attached(model).get(site.layer)) is not None:
        return dictionary.written(index)
    if site.kind not in ROWS:
        raise SiteError(f"a neuron at {site} has no row of an output matrix: choose from {', '.join(ROWS)}, {FEATURES}")
    return matrix_value(model, site.layer, ROWS[site.kind])[index].detach().clone()


def direct_logits(model: Model, written: Float[Tensor, "width"]) -> Float[Tensor, "vocabulary"]:
    """Return the logits that a vector in the residual stream is, through the final norm and the unembedding.

    With w the gain of the norm and W_U the unembedding: (v - mean(v)) w W_U for a LayerNorm, v w W_U for an RMSNorm, where the
    residual stream has the scale 1. Neither biases nor what the blocks behind make of it are counted.
    """
    norm, unembed, device = getattr(model, "ln_final", None), model.unembed, device_of(model)
    with torch.no_grad():
        vector = written.to(device)[None, None]

        def run(module: Any, value: Tensor) -> Tensor:
            return module(value) - module(torch.zeros_like(value))  # without biases

        if norm is not None and bool(vector.any()):
            # A norm divides by the size of what it is given, and its gain is kept in another place by every kind of model: so it is
            # run, and the size put back.
            shown = vector * (LARGE / vector.float().pow(2).mean().sqrt()).to(vector)
            shifted = run(norm, shown + LARGE)
            normed = run(norm, shown)
            centred = torch.allclose(shifted, normed, rtol=1e-2, atol=1e-3 * float(normed.abs().max()))
            size = vector - vector.mean() if centred else vector
            vector = normed * size.float().pow(2).mean().sqrt().to(vector)
        return run(unembed, vector)[0, 0].float()
