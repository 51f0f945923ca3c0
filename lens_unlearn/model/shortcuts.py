"""`shortcuts`: a bridge's forward pass without those of the bridge's components in which there is no hook.

A `TransformerBridge` wraps every module of a Hugging Face model in a component of its own, which calls a hook point at each
intermediate value and computes attention explicitly. For the length of a `with` block, `shortcuts` puts the plain module back in
place of each component without hooks. Whatever is hooked stays, so every hook fires as before, the user's included; and the
plain modules hold the very same weights. What only looks at the call of a component (`carried`: where a forward pass begins) keeps
nothing: it looks at the plain module's meanwhile.

Knows how a bridge is built from components; knows nothing of sites or of the passes that run meanwhile.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lens_unlearn.core.counter_rng import mix
from lens_unlearn.model.hooks import Remover, detach_all, register
from lens_unlearn.model.host import Model, bit_sums, is_quantized, stored

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
    removers: list[Remover] = []
    attentions = {getattr(block, "attn", None) for block in model.blocks}

    def restore() -> None:
        detach_all(removers)
        if attention is not None:
            config._attn_implementation = attention
        for parent, name, component in reversed(bypassed):
            parent._modules[name] = component

    try:
        try:
            _bypass_unhooked(inner, bypassed)
            for parent, name, component in list(bypassed):
                _carry(component, cast(nn.Module, parent._modules[name]), removers)
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


Swap = tuple[int, str, int, int]
"""In a module, by its place in the walk, and under a name: the module that is there, and what takes its place."""
_PLANS = 64
"""That many states of one model are remembered: a run has that of each of its conditions."""
Asked = tuple[int, int, bool]
"""By their places in the walk, a component with copies of weights and its original, and whether those were the same."""
# Per model and state: its modules, what is swapped in that state, and which copies that rests on.
_plans: "weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[list[weakref.ref[nn.Module]], list[Swap], list[Asked]]]]"
_plans = weakref.WeakKeyDictionary()


def _bypass_unhooked(inner: nn.Module, bypassed: list[tuple[nn.Module, str, nn.Module]]) -> None:
    """Put the original modules in place of unhooked components, as `_bypass` does, or as it did when the model was like this.

    To look into every component for hooks takes as long as a small model's forward pass, and a measurement comes back to the same
    few states for every batch. A state is all that the decision depends on: the modules, what is hooked in each, where the weights
    are. Copies of weights are read once more each time, since PyTorch does not count what is written through `.data`.
    """
    modules = _modules_of(inner)
    state = (tuple(map(id, modules)), _hooks_in(modules), _weights_of(modules))
    known = _plans.setdefault(inner, {})
    found = None if state[-1] is None else known.get(state)
    # An id may be another module's that was made since.
    if (
        found is not None
        and all(held() is module for held, module in zip(found[0], modules, strict=True))
        and all(_same_weights(modules[component], modules[plain]) is same for component, plain, same in found[2])
    ):
        for parent, name, component, instead in found[1]:
            bypassed.append((modules[parent], name, modules[component]))
            modules[parent]._modules[name] = modules[instead]
        return
    done: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
    asked: list[tuple[nn.Module, nn.Module, bool]] = []
    _bypass(inner, bypassed, wired=False, seen=set(), done=done, asked=asked)
    place = {module: index for index, module in enumerate(modules)}
    if state[-1] is not None:
        if len(known) >= _PLANS:
            del known[next(iter(known))]
        swaps = [(place[parent], name, place[before], place[after]) for parent, name, before, after in done]
        rests = [(place[component], place[plain], same) for component, plain, same in asked]
        known[state] = ([weakref.ref(module) for module in modules], swaps, rests)


def _modules_of(inner: nn.Module) -> list[nn.Module]:
    """Return every module inside once, as `inner.modules()` does, without the names, which take most of its time."""
    found, waiting = dict[nn.Module, None](), [inner]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            waiting += [part for part in module._modules.values() if part is not None]
    return list(found)


def _hooks_in(modules: list[nn.Module]) -> tuple[tuple[int, ...], ...]:
    """Return for each module that has hooks, or a `forward` of its own, its place and what `_counts` says in every case."""
    return tuple(
        (place, *(_counts(module, wired, itself) for wired in (False, True) for itself in (False, True)))
        for place, module in enumerate(modules)
        if module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _weights_of(modules: list[nn.Module]) -> tuple[tuple[int, int], ...] | None:
    """Return where each parameter is and how often it was changed; None where that cannot be told."""
    held = [p for module in modules for p in module._parameters.values() if p is not None]
    if any(p.is_meta or is_quantized(p) or p.is_inference() for p in held):
        return None
    return tuple((p.data_ptr(), p._version) for p in held)


def _bypass(
    parent: nn.Module,
    bypassed: list[tuple[nn.Module, str, nn.Module]],
    *,
    wired: bool,
    seen: set[int],
    wholly: bool = False,
    done: list[tuple[nn.Module, str, nn.Module, nn.Module]] | None = None,
    asked: list[tuple[nn.Module, nn.Module, bool]] | None = None,
) -> None:
    """Put the original modules in place of components, outermost first; each is recorded before it is done.

    Args:
        parent: The module whose children are considered.
        bypassed: For each component the module it is in, its name there, and the component itself.
        wired: Whether a component around the parent stays, so that its internal hooks on its parts are needed.
        seen: The modules that were visited.
        wholly: Whether to do so with all of them, whatever is hooked in them.
        done: What was done, in order: as in `bypassed`, and the module that took the component's place.
        asked: The components whose weights are copies, each with its original, and whether they were the same.
    """
    if id(parent) in seen:
        return
    seen.add(id(parent))
    for name, child in list(parent._modules.items()):
        if child is None:
            continue
        original = child._modules.get(_ORIGINAL)
        if original is None:
            _bypass(child, bypassed, wired=wired, seen=seen, wholly=wholly, done=done, asked=asked)
        elif wholly or _fires_the_same(child, original, wired) and _same_weights(child, original, asked):
            _swap(parent, name, original, bypassed, done)
            for place, beside in _output_map(child, original):
                _swap(original, place, beside, bypassed, done)  # to be bypassed in turn, if nothing in it is hooked
            _bypass(original, bypassed, wired=wired, seen=seen, wholly=wholly, done=done, asked=asked)
        elif not any(_ORIGINAL in part._modules for part in child.children() if part is not original):
            _bypass(original, bypassed, wired=True, seen=seen, done=done, asked=asked)
        # A component that stays and has components of its own computes with these: nothing in it can be bypassed.


def _swap(
    parent: nn.Module,
    name: str,
    instead: nn.Module,
    bypassed: list[tuple[nn.Module, str, nn.Module]],
    done: list[tuple[nn.Module, str, nn.Module, nn.Module]] | None,
) -> None:
    before = cast(nn.Module, parent._modules[name])
    bypassed.append((parent, name, before))
    parent._modules[name] = instead
    if done is not None:
        done.append((parent, name, before, instead))


def _carry(component: nn.Module, original: nn.Module, removers: list[Remover]) -> None:
    """Let the hooks of a bypassed component that only look at its call look at that of the module in its place."""
    for hook in reversed(component._forward_pre_hooks.values()):
        if getattr(hook, "carried", False):
            # First, as the component's were before whatever is hooked in the module inside it.
            carried = partial(lambda hook, _, *given: hook(component, *given), hook)
            register([(original, "_forward_pre_hooks", carried)], removers, first=True)


def _hooked(module: nn.Module, wired: bool) -> set[nn.Module]:
    """Return the modules inside one that have hooks, or whose `forward` was replaced; the module itself if some are not carried.

    Internal hooks count only if a component around the module stays (`wired`).
    """
    return {part for part in module.modules() if _counts(part, wired, part is module)}


def _counts(part: nn.Module, wired: bool, itself: bool) -> bool:
    """Whether a module's `forward` was replaced, or it has hooks that count; of the component `itself` carried ones do not."""
    if "forward" in part.__dict__:
        return True
    # A hook point wraps the user's function, and the wrapper says nothing of where that was defined.
    wrapped = {
        handle.hook.id: handle.user_hook for book in ("fwd_hooks", "bwd_hooks") for handle in getattr(part, book, ())
    }
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        hooks = [wrapped.get(key) or hook for key, hook in getattr(part, kind).items()]
        hooks = [hook for hook in hooks if not itself or not getattr(hook, "carried", False)]
        if any(wired or not str(getattr(hook, "__module__", "")).startswith(_INTERNAL) for hook in hooks):
            return True
    return False


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


# Per component: the sums over its weights when they were last compared, and whether they were equal.
_compared: "weakref.WeakKeyDictionary[nn.Module, tuple[list[bytes], bool]]" = weakref.WeakKeyDictionary()


def _same_weights(
    component: nn.Module, original: nn.Module, asked: list[tuple[nn.Module, nn.Module, bool]] | None = None
) -> bool:
    """Whether a component computes with the weights of its original.

    Where the original fuses several matrices into one, the component has views of it, or copies, which may have been edited
    since. Copies are compared by a digest that does not depend on how the values are cut into matrices. It is taken anew only
    where a sum over a row or column has changed; to look takes about as long as to read the weights. Rows or columns that changed
    places, as where heads are swapped, are the one thing that it would not see.

    Args:
        component: The component.
        original: The module inside it.
        asked: Where a component that has copies is noted, with its original and the answer.
    """
    held = list(original.parameters())
    places = {part.untyped_storage().data_ptr() for p in held for part in stored(p)}
    copies = [p for p in component.parameters() if stored(p)[0].untyped_storage().data_ptr() not in places]
    if not copies:
        return True
    if any(p.is_meta or is_quantized(p) or p.is_inference() for p in (*copies, *held)):
        return False
    state = [bit_sums(p) for p in (*copies, *held)]
    before, equal = _compared.get(component, ([], False))
    if equal and before != state and _rows(before) == _rows(state):
        equal = False
    elif before != state:
        sums: dict[int, int] = {}
        for copy in copies:
            sums[copy.ndim] = sums.get(copy.ndim, 0) + _digest(copy)
        known = {(p.ndim, _digest(p)) for p in held}
        equal = all((ndim, total % 2**64) in known for ndim, total in sums.items())
        _compared[component] = (state, equal)
    if asked is not None:
        asked.append((component, original, equal))
    return equal


def _rows(sums: list[bytes]) -> list[bytes]:
    """Return the sums over rows and columns in order of size, whichever row or column each is of."""
    return sorted(one[start : start + 8] for one in sums for start in range(0, len(one), 8))


def _digest(tensor: Tensor) -> int:
    """Return the sum of the hashed values: equal for equal values, in whatever order and however cut into tensors."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    values = tensor.detach().contiguous().view(integer)
    return int(mix(values.long()).sum()) % 2**64
