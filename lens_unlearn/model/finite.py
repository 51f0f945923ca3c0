"""Logits that are no numbers, and the layer in which that begins.

Knows hook points by their names; knows nothing of sites or of what is computed from logits.
"""

import re

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_unlearn.core.errors import ActivationError
from lens_unlearn.model.hooks import Remover, attach, detach_all, one_thread
from lens_unlearn.model.host import Model, device_of

__all__ = ["broken_at", "broken_logits", "refuse_broken"]


def broken_logits(logits: Float[Tensor, "*n vocabulary"]) -> Bool[Tensor, "*n"]:
    """Return where logits hold NaN or infinity, and so say nothing; minus infinity, of a token that cannot come, is none."""
    return ~torch.isfinite(logits.detach().amax(-1))


def refuse_broken(model: Model, tokens: Int[Tensor, "pos"]) -> None:
    """Refuse a model whose logits are not finite at the end of a text, with whatever acts on it.

    Raises:
        ActivationError: Always; names the layer.
    """
    raise ActivationError(
        f"the model's logits are NaN or infinite: that begins in {broken_at(model, tokens)}; try a wider dtype, or look at the "
        "weights there"
    )


def broken_at(model: Model, tokens: Int[Tensor, "pos"]) -> str:
    """Say in which layer the first value that is not finite comes up, and at which hook point."""
    first: list[str] = []

    def look(name: str, tensor: Tensor) -> None:
        values = tensor if isinstance(tensor, Tensor) and tensor.is_floating_point() else torch.zeros(1)
        # Masked attention scores are minus infinity.
        if not first and bool((values.isnan() | values.isposinf()).any()):
            first.append(name)

    removers: list[Remover] = []
    # A point of a bridge has several names: the shortest is that of TransformerLens' own models, such as mlp.hook_post.
    known = model.hook_dict  # which a bridge makes anew each time it is asked for
    names = sorted(known, key=lambda name: (-name.count("."), -len(name)))
    points = {id(known[name]): (name, known[name]) for name in names}
    with one_thread(model), torch.no_grad():
        try:
            for name, point in points.values():
                attach(point, lambda tensor, name=name: look(name, tensor), removers, own_thread=True)
            model(tokens[None].to(device_of(model)), return_type="logits")
        finally:
            detach_all(removers)
    name = first[0] if first else "the unembedding"
    layer = re.match(r"blocks\.(\d+)\.(.+)", name)
    return f"layer {layer[1]}, at {layer[2]}" if layer else name
