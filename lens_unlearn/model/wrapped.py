"""Hook points at the last linear maps of attention and MLPs inside layers that TransformerLens wraps whole.

Knows where such layers (of Nemotron-H, RecurrentGemma, Zamba 2) have these maps; knows nothing of layers whose parts are shown.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lens_unlearn.model.expert_layers import _Layer, _layers
from lens_unlearn.model.experts import plain_block
from lens_unlearn.model.host import Model, part_of

__all__ = ["plain_map", "wrapped_point"]

_MAPS = {
    "mlp.post": ("mlp", ("mixer.down_proj", "mlp_block.down_proj", "shared_transformer.feed_forward.down_proj")),
    "attn.z": ("attn", ("mixer.o_proj", "temporal_block.o_proj", "shared_transformer.self_attn.o_proj")),
}
"""By kind: the part of a block that TransformerLens would show, and where the map is in the blocks of transformers."""


def plain_map(model: Model, layer: int, kind: str) -> nn.Module | None:
    """Return the linear map whose input is a kind of site, in a layer that is wrapped whole; None where there is none."""
    part, paths = _MAPS.get(kind, ("", ()))
    block = plain_block(model, layer)
    if block is None or not part or part_of(model, layer, part) is not None:
        return None
    for path in paths:
        owner: Any = block
        for name in path.split("."):
            owner = getattr(owner, "_original_component", None) or owner
            owner = getattr(owner, name, None)
        if isinstance(owner, nn.Module):
            return owner
    return None


def wrapped_point(model: Model, layer: int, kind: str) -> Any:
    """Return the hook point at the input of `plain_map`, where there is one."""
    module, block = plain_map(model, layer, kind), plain_block(model, layer)
    assert module is not None
    assert block is not None
    if module not in _layers:
        _layers[module] = _Map(module, block, kind, _head_width(block, module) if kind == "attn.z" else 0)
    return _layers[module].point(kind)


def _head_width(block: nn.Module, module: nn.Module) -> int:
    owner: Any = next(parent for parent in block.modules() if any(child is module for child in parent.children()))
    return int(owner.head_dim)


class _Map(_Layer):
    """One linear map: its input passes through the hook point."""

    def __init__(self, module: nn.Module, block: nn.Module, kind: str, d_head: int) -> None:
        super().__init__(module, block)
        self.kind, self.d_head = kind, d_head

    def _places(self, module: nn.Module) -> list[tuple[Any, str, Callable[..., Any]]]:
        def pass_on(module: Any, args: Any, kwargs: Any) -> Any:
            x: torch.Tensor = args[0]
            given = x.unflatten(-1, (-1, self.d_head)) if self.d_head else x
            return (self.points[self.kind](given).reshape(x.shape), *args[1:]), kwargs

        return [(module, "_forward_pre_hooks", pass_on)]
