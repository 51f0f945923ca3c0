"""`shortcuts`: a bridge's forward pass without those of the bridge's components in which there is no hook.

A `TransformerBridge` wraps every module of a Hugging Face model in a component of its own, which calls a hook point at each
intermediate value and computes attention explicitly. For the length of a `with` block, `shortcuts` puts the plain module back in
place of each component without hooks. Whatever is hooked stays, so every hook fires as before, the user's included; and the
plain modules hold the very same weights.

Knows how a bridge is built from components; knows nothing of sites or of the passes that run meanwhile.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lens_unlearn.core.counter_rng import mix
from lens_unlearn.model.host import Model, is_quantized, stored

__all__ = ["shortcuts", "unbridged"]

_ORIGINAL = "_original_component"
_PREPARES_INPUT = ("_OptBlockBridge",)
"""Components that reshape what the hooks inside them see: OPT runs its MLP on tokens without a batch dimension."""
_INTERNAL = ("transformer_lens.model_bridge.", "transformers.")
"""Modules whose hooks are internal: those of a bridge's block, and those with which transformers collects the hidden states and
attention patterns that it returns."""


@contextmanager
def shortcuts(model: Model) -> Iterator[dict[nn.Module, nn.Module]]:
    """Run a raw bridge without its unhooked components, for the length of a `with` block.

    Enter it after the hooks are added: a hook that is added inside, to a component that is bypassed, does not fire. The values
    are those of the plain Hugging Face modules; they differ from the bridge's by rounding at most. Without a plain model
    underneath (`HookedTransformer`, compatibility mode, models built by TransformerLens itself) it has no effect.

    Yields:
        The bypassed components, each with the module that runs in its place.
    """
    inner = getattr(model, "original_model", None)
    config = getattr(inner, "config", None)
    if inner is None or config is None or getattr(model, "compatibility_mode", False):
        yield {}
        return
    attention = getattr(config, "_attn_implementation", None)
    bypassed: list[tuple[nn.Module, str, nn.Module]] = []
    attentions = {getattr(block, "attn", None) for block in model.blocks}

    def restore() -> None:
        if attention is not None:
            config._attn_implementation = attention
        for parent, name, component in reversed(bypassed):
            parent._modules[name] = component

    try:
        try:
            _bypass(inner, bypassed, wired=False, seen=set())
            if attention == "eager" and attentions <= {component for _, _, component in bypassed} and _may_fuse(inner):
                config._attn_implementation = "sdpa"
            yield {component: cast(nn.Module, parent._modules[name]) for parent, name, component in bypassed}
        finally:
            restore()
    finally:  # once more, for an interrupt in the middle of it
        restore()


@contextmanager
def unbridged(model: Model) -> Iterator[nn.Module]:
    """Yield the plain Hugging Face model inside a raw bridge, without the bridge's components, for the length of a `with` block.

    Hooks at what the bridge alone has do not fire inside.
    """
    inner = model.original_model
    bypassed: list[tuple[nn.Module, str, nn.Module]] = []

    def restore() -> None:
        for parent, name, component in reversed(bypassed):
            parent._modules[name] = component

    try:
        try:
            _bypass(inner, bypassed, wired=False, seen=set(), wholly=True)
            yield inner
        finally:
            restore()
    finally:  # once more, for an interrupt in the middle of it
        restore()


def _bypass(
    parent: nn.Module,
    bypassed: list[tuple[nn.Module, str, nn.Module]],
    *,
    wired: bool,
    seen: set[int],
    wholly: bool = False,
) -> None:
    """Put the original modules in place of components, outermost first; each is recorded before it is done.

    Args:
        parent: The module whose children are considered.
        bypassed: For each component the module it is in, its name there, and the component itself.
        wired: Whether a component around the parent stays, so that its internal hooks on its parts are needed.
        seen: The modules that were visited.
        wholly: Whether to do so with all of them, whatever is hooked in them.
    """
    if id(parent) in seen:
        return
    seen.add(id(parent))
    for name, child in list(parent._modules.items()):
        if child is None:
            continue
        original = child._modules.get(_ORIGINAL)
        if original is None:
            _bypass(child, bypassed, wired=wired, seen=seen, wholly=wholly)
        elif wholly or _fires_the_same(child, original, wired) and _same_weights(child, original):
            bypassed.append((parent, name, child))
            parent._modules[name] = original
            for place, beside in _output_map(child, original):
                bypassed.append((original, place, original._modules[place]))  # type: ignore[arg-type]
                original._modules[place] = beside  # to be bypassed in turn, if nothing in it is hooked
            _bypass(original, bypassed, wired=wired, seen=seen, wholly=wholly)
        elif not any(_ORIGINAL in part._modules for part in child.children() if part is not original):
            _bypass(original, bypassed, wired=True, seen=seen)
        # A component that stays and has components of its own computes with these: nothing in it can be bypassed.


def _hooked(module: nn.Module, wired: bool) -> set[nn.Module]:
    """Return the modules inside one that have hooks, or whose `forward` was replaced.

    Internal hooks count only if a component around the module stays (`wired`).
    """
    hooked = set()
    for part in module.modules():
        if "forward" in part.__dict__:
            hooked.add(part)
        # A hook point wraps the user's function, and the wrapper says nothing of where that was defined.
        wrapped = {
            handle.hook.id: handle.user_hook
            for book in ("fwd_hooks", "bwd_hooks")
            for handle in getattr(part, book, ())
        }
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks = [wrapped.get(key) or hook for key, hook in getattr(part, kind).items()]
            if any(wired or not str(getattr(hook, "__module__", "")).startswith(_INTERNAL) for hook in hooks):
                hooked.add(part)
    return hooked


def _fires_the_same(component: nn.Module, original: nn.Module, wired: bool) -> bool:
    """Whether every hook inside a component also fires in its original module, once and with the same tensor."""
    hooked = _hooked(component, wired)
    if hooked and type(component).__name__ in _PREPARES_INPUT:
        return False
    beside = {part for _, module in _output_map(component, original) for part in module.modules()}
    same = set(original.modules()) | beside
    if hooked and hasattr(component, "hook_pattern"):
        # Attention: the values at its linear maps are the same in both. Between them each computes in its own way and shapes.
        linear = [component._modules.get(name) for name in ("q", "k", "v", "o")]
        same = {part for module in linear if module is not None and module in same for part in module.modules()}
        same |= {original}
    return hooked <= same


def _output_map(component: nn.Module, original: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the output map of an attention whose q, k and v are fused, with the name of its module in the original.

    In such an attention the bridge leaves the plain module in the original, and itself calls the one with hooks.
    """
    o = component._modules.get("o") if hasattr(component, "hook_pattern") else None
    plain = None if o is None else o._modules.get(_ORIGINAL)
    return [(name, o) for name, child in original._modules.items() if o is not None and child is plain is not None]


def _may_fuse(inner: Any) -> bool:
    """Whether attention can be PyTorch's fused kernel, as it would be without a bridge, which asks for explicit patterns.

    Not in float64, which is for comparing models: the explicit softmax of many architectures is in float32 even there.
    """
    soft_capped = getattr(inner.config, "attn_logit_softcapping", None) is not None
    exact = next(iter(inner.parameters())).dtype == torch.float64
    return bool(getattr(inner, "_supports_sdpa", False)) and not soft_capped and not exact


# Per component: the state of its weights when they were last compared, and whether they were equal.
_compared: "weakref.WeakKeyDictionary[nn.Module, tuple[list[tuple[int, int]], bool]]" = weakref.WeakKeyDictionary()


def _same_weights(component: nn.Module, original: nn.Module) -> bool:
    """Whether a component computes with the weights of its original.

    Where the original fuses several matrices into one, the component has views of it, or copies, which may have been edited
    since. Copies are compared by a digest that does not depend on how the values are cut into matrices.
    """
    held = list(original.parameters())
    places = {part.untyped_storage().data_ptr() for p in held for part in stored(p)}
    copies = [p for p in component.parameters() if stored(p)[0].untyped_storage().data_ptr() not in places]
    if not copies:
        return True
    if any(p.is_meta or is_quantized(p) or p.is_inference() for p in (*copies, *held)):
        return False
    state = [(p.data_ptr(), p._version) for p in (*copies, *held)]
    if component not in _compared or _compared[component][0] != state:
        sums: dict[int, int] = {}
        for copy in copies:
            sums[copy.ndim] = sums.get(copy.ndim, 0) + _digest(copy)
        known = {(p.ndim, _digest(p)) for p in held}
        _compared[component] = (state, all((ndim, total % 2**64) in known for ndim, total in sums.items()))
    return _compared[component][1]


def _digest(tensor: Tensor) -> int:
    """Return the sum of the hashed values: equal for equal values, in whatever order and however cut into tensors."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    values = tensor.detach().contiguous().view(integer)
    return int(mix(values.long()).sum()) % 2**64
