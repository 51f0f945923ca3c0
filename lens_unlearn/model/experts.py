"""Where in a model routed experts are, with the shared ones and the routers beside them, and their hook points.

Knows the names of these modules in transformers, and the blocks of a bridge; knows nothing of how experts are computed
(`expert_layers` does), nor of sites' names in files.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from lens_unlearn.model.expert_layers import EXPERT_KINDS, MOE_KINDS, known_layers, layer_of
from lens_unlearn.model.host import Model

__all__ = [
    "EXPERT_KINDS",
    "MOE_KINDS",
    "expert_point",
    "expert_points",
    "experts_in",
    "has_kind",
    "plain_block",
    "top_k",
]

_SHARED = ("shared_expert", "shared_experts", "shared_mlp")
_LAST = ("down_proj", "output_linear", "w2")
"""The names of the modules of shared experts, and of their last linear map, in the models of transformers."""
_ROUTERS = ("gate", "router")
"""Those of what chooses among the experts, beside them."""


def plain_block(model: Model, layer: int) -> nn.Module | None:
    """Return the module of transformers that a bridge's block wraps; None where there is none."""
    if not hasattr(model, "original_model"):
        return None
    return getattr(model.blocks[layer], "original_component", None)


def experts_in(model: Model, layer: int) -> nn.Module | None:
    """Return the module that holds the routed experts of a layer; None if the layer has none."""
    block = plain_block(model, layer)
    return None if block is None else next((module for module in block.modules() if _holds_experts(module)), None)


def _holds_experts(module: nn.Module) -> bool:
    down = module._parameters.get("down_proj")  # a bridge's components have the attributes of what they wrap
    return down is not None and down.ndim == 3


def _shared_in(model: Model, layer: int) -> nn.Module | None:
    """Return the last linear map of the shared experts beside the routed ones of a layer; None if there is none."""
    block = plain_block(model, layer)
    if block is None or experts_in(model, layer) is None:
        return None
    for name, module in block.named_modules():
        *owners, last = name.split(".")
        if last in _LAST and set(owners) & set(_SHARED):
            return _unwrapped(module)
    return None


def _router_in(model: Model, layer: int) -> nn.Module | None:
    """Return what chooses among the routed experts of a layer; None if there are none, or it is not known."""
    block, experts = plain_block(model, layer), experts_in(model, layer)
    if block is None or experts is None:
        return None
    for owner in block.modules():
        if any(_unwrapped(part) is experts for part in owner.children()):  # a bridge's component can be one as well
            for part in map(owner._modules.get, _ROUTERS):
                if part is not None:
                    return _unwrapped(part)
    return None


def _unwrapped(module: nn.Module) -> nn.Module:
    while (inner := module._modules.get("_original_component")) is not None:
        module = inner
    return module


def top_k(model: Model, layer: int) -> int:
    """Return how many experts the router of a layer chooses for each token."""
    router: Any = _router_in(model, layer)
    names = ("top_k", "num_experts_per_tok", "top_k_experts", "moe_k")
    places = (router, model.original_model.config)
    return next(
        int(value) for place in places for name in names if isinstance(value := getattr(place, name, None), int)
    )


def has_kind(model: Model, layer: int, kind: str) -> bool:
    """Whether a layer has a kind of `MOE_KINDS`."""
    if kind in _FINDERS:
        return _FINDERS[kind](model, layer) is not None
    experts = experts_in(model, layer)
    return experts is not None and (kind != "experts.pre_linear" or getattr(experts, "has_gate", True))


def expert_point(model: Model, layer: int, kind: str) -> Any:
    """Return the hook point of a kind of `MOE_KINDS` in a layer that has it.

    Raises:
        SiteError: If the experts are computed in a way in which their keys cannot be had; the message says what to do.
    """
    module, block = _FINDERS.get(kind, experts_in)(model, layer), plain_block(model, layer)
    assert module is not None
    assert block is not None
    found = layer_of(module, block, kind)
    found.require(f"L{layer}.{kind}")
    return found.point(kind)


_FINDERS: dict[str, Callable[[Model, int], nn.Module | None]] = {
    "shared.post": _shared_in,
    "experts.router": _router_in,
}
"""The module at which a kind is, where that is not the one of the routed experts."""


def expert_points(model: Model) -> list[Any]:
    """Return the hook points inside experts of a model that were asked for so far."""
    inside = set(model.modules())
    return [point for module, layer in known_layers().items() if module in inside for point in layer.points.values()]
