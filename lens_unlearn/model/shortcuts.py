"""`lean`: a bridge's forward pass without the parts of the bridge that nobody looks at.

A `TransformerBridge` puts a component of its own around every module of a Hugging Face model: it calls a hook point at
each intermediate value, and computes attention itself. For the length of a `with` block, `lean` puts the plain module back in
place of each component in which there is no hook. Whatever is hooked stays as it is, so every hook, the user's as well, fires
as before; and the plain modules hold the very same weights.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lens_unlearn.core.counter_rng import mix
from lens_unlearn.model.host import Model

__all__ = ["lean"]

_ORIGINAL = "_original_component"
_OWN_WAYS = ("_OptBlockBridge",)
"""Components that prepare what the hooks inside them are given: OPT runs its MLP on rows of tokens without a batch."""
_INNER = ("transformer_lens.model_bridge.", "transformers.")
"""Where hooks are defined that belong to the works: those of a bridge's block, and those by which transformers returns what
it is asked for (hidden states and patterns)."""


@contextmanager
def lean(model: Model) -> Iterator[dict[nn.Module, nn.Module]]:
    """Take the components that nobody looks at out of a raw bridge's forward pass, for the length of a `with` block.

    To be entered after hooks were added: a hook that is added inside, on a component that is out, does not fire. Values are
    those of the plain Hugging Face modules; they differ from the bridge's by rounding, if at all. Where there is no plain model
    underneath (`HookedTransformer`, compatibility mode, models that TransformerLens built alone), nothing is done.

    Yields:
        The components that are out, and the modules that stand in for them.
    """
    inner = getattr(model, "original_model", None)
    config = getattr(inner, "config", None)
    if inner is None or config is None or getattr(model, "compatibility_mode", False):
        yield {}
        return
    attention = getattr(config, "_attn_implementation", None)
    out: list[tuple[nn.Module, str, nn.Module]] = []
    explicit = {getattr(block, "attn", None) for block in model.blocks}

    def put_back() -> None:
        if attention is not None:
            config._attn_implementation = attention
        for parent, name, component in reversed(out):
            parent._modules[name] = component

    try:
        try:
            _take_out(inner, out, wired=False, seen=set())
            if attention == "eager" and explicit <= {component for _, _, component in out} and _may_fuse(inner):
                config._attn_implementation = "sdpa"
            yield {component: cast(nn.Module, parent._modules[name]) for parent, name, component in out}
        finally:
            put_back()
    finally:  # once more, for an interrupt in the midst of it
        put_back()


def _take_out(parent: nn.Module, out: list[tuple[nn.Module, str, nn.Module]], *, wired: bool, seen: set[int]) -> None:
    """Put originals in place of components, outermost first, and note each before it is done.

    Args:
        parent: Whose children to look at.
        out: Gets the module, the name of the child, and the component that stood there.
        wired: Whether a component around the parent stays, so that its own hooks on its parts are needed.
        seen: The modules that were looked at.
    """
    if id(parent) in seen:
        return
    seen.add(id(parent))
    for name, child in list(parent._modules.items()):
        if child is None:
            continue
        original = child._modules.get(_ORIGINAL)
        if original is None:
            _take_out(child, out, wired=wired, seen=seen)
        elif _as_well(child, original, wired) and _same_weights(child, original):
            out.append((parent, name, child))
            parent._modules[name] = original
            for place, beside in _beside(child, original):
                out.append((original, place, original._modules[place]))  # type: ignore[arg-type]
                original._modules[place] = beside  # to be taken out in turn, if nothing in it is hooked
            _take_out(original, out, wired=wired, seen=seen)
        elif not any(_ORIGINAL in part._modules for part in child.children() if part is not original):
            _take_out(original, out, wired=True, seen=seen)
        # And one that stays and has components of its own computes with them: there nothing can be taken out.


def _hooked(module: nn.Module, wired: bool) -> set[nn.Module]:
    """Return the modules inside one that have a hook; those of the works count if a part around them stays.

    So does a module whose `forward` somebody has replaced.
    """
    found = set()
    for part in module.modules():
        if "forward" in part.__dict__:
            found.add(part)
        # A hook point wraps what it is given.
        given = {
            handle.hook.id: handle.user_hook
            for book in ("fwd_hooks", "bwd_hooks")
            for handle in getattr(part, book, ())
        }
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks = [given.get(key) or hook for key, hook in getattr(part, kind).items()]
            if any(wired or not str(getattr(hook, "__module__", "")).startswith(_INNER) for hook in hooks):
                found.add(part)
    return found


def _as_well(component: nn.Module, original: nn.Module, wired: bool) -> bool:
    """Whether every hook inside a component fires in its original as well, once, and with the same tensor."""
    hooked = _hooked(component, wired)
    if hooked and type(component).__name__ in _OWN_WAYS:
        return False
    beside = {part for _, one in _beside(component, original) for part in one.modules()}
    kept = set(original.modules()) | beside
    if hooked and hasattr(component, "hook_pattern"):
        # Attention: what is around its linear maps is the same in both. In between each has its own ways and shapes.
        linear = [component._modules.get(name) for name in ("q", "k", "v", "o")]
        kept = {part for one in linear if one is not None and one in kept for part in one.modules()} | {original}
    return hooked <= kept


def _beside(component: nn.Module, original: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the output map of an attention that has q, k and v in one, and where in the original its module is.

    There a bridge leaves the plain module in the original, and calls the one with hooks itself.
    """
    o = component._modules.get("o") if hasattr(component, "hook_pattern") else None
    plain = None if o is None else o._modules.get(_ORIGINAL)
    return [(name, o) for name, child in original._modules.items() if o is not None and child is plain is not None]


def _may_fuse(inner: Any) -> bool:
    """Whether attention can be PyTorch's fused one, as it would be without a bridge, which asks for explicit patterns.

    Not in float64, in which models are compared: the explicit softmax of many architectures is in float32 even there.
    """
    soft_capped = getattr(inner.config, "attn_logit_softcapping", None) is not None
    exact = next(iter(inner.parameters())).dtype == torch.float64
    return bool(getattr(inner, "_supports_sdpa", False)) and not soft_capped and not exact


# Per component: the state of its weights when they were last compared, and whether they were the same.
_compared: "weakref.WeakKeyDictionary[nn.Module, tuple[list[tuple[int, int]], bool]]" = weakref.WeakKeyDictionary()


def _same_weights(component: nn.Module, original: nn.Module) -> bool:
    """Whether a component computes with the weights of its original.

    Where the original keeps several matrices in one, a component has views of it, or copies, which may have been edited
    since: then the copies of a dimension have other values than any parameter of the original has.
    """
    held = list(original.parameters())
    places = {p.untyped_storage().data_ptr() for p in held}
    copies = [p for p in component.parameters() if p.untyped_storage().data_ptr() not in places]
    if not copies:
        return True
    if any(p.is_meta or not p.is_floating_point() or p.is_inference() for p in (*copies, *held)):
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
    """Add up scrambled values: the same for the same values in whatever order and however they are cut into tensors."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    values = tensor.detach().contiguous().view(whole)
    return int(mix(values.long()).sum()) % 2**64
