"""Hook points: the only module that knows TransformerLens by name.

A `Site` says *where* in a model (layer and kind). `resolve` turns sites into the hook points of one model, after a
probe forward has shown that each of them fires once and has a neuron axis. `attach` adds one hook and returns the one
callable that removes exactly that hook. `backbone` runs a model without its unembedding.

Facts relied on here, measured on TransformerLens 3.9 and 4.3: the names below resolve on `HookedTransformer` and on
`TransformerBridge`, raw or in compatibility mode; on the bridge several names may stand for one `HookPoint`; hook
points of mixture-of-experts layers exist but carry the residual width; `cfg.d_mlp` can be wrong (OPT).
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lens_unlearn.core.errors import ModelError, SiteError
from lens_unlearn.model.host import Model, device_of, require_model

__all__ = ["attach", "backbone"]

Remover = Callable[[], bool]
"""Takes off what was added, and nothing else; False if it was gone already. It may be interrupted, and called again."""


def attach(
    hook: Any,
    function: Callable[[Tensor], Tensor | None],
    removers: list[Remover] | None = None,
    *,
    own_thread: bool = False,
) -> Remover:
    """Add one forward hook through a hook point.

    It is registered as permanent, so that a user's `reset_hooks()` does not take it away.

    Args:
        hook: The hook point.
        function: Takes its tensor; returns a new one, or None.
        removers: A list that gets what removes this hook, before the hook is added: so there is no moment at which an
            interrupt finds a hook that nobody knows of.
        own_thread: Whether to act only on forward passes of the thread that attaches.

    Returns:
        A callable that removes this hook and no other; it returns False if the hook was already gone.
    """
    thread, added = threading.get_ident(), False

    def run(tensor: Tensor, hook: Any) -> Tensor | None:
        return None if own_thread and threading.get_ident() != thread else function(tensor)

    def remove() -> bool:
        # By identity, in whatever book it is by now; PyTorch's, by which it is found again, comes last.
        found = [key for key, other in hook._forward_hooks.items() if _closes_over(other, run)]
        hook.fwd_hooks[:] = [handle for handle in hook.fwd_hooks if handle.user_hook is not run]
        for key in found:
            hook._forward_hooks.pop(key, None)
        return bool(found) or not added

    if removers is not None:
        removers.append(remove)
    try:
        hook.add_hook(run, is_permanent=True)
        if not any(handle.user_hook is run for handle in hook.fwd_hooks):  # pragma: no cover - kept elsewhere
            raise SiteError("this TransformerLens does not keep its hooks in HookPoint.fwd_hooks: install >=3.9,<5")
        added = True
    except BaseException:
        remove()
        raise
    return remove


def _closes_over(function: Any, value: Any) -> bool:
    """Whether a function is a closure over a value, as what TransformerLens wraps around a hook is over that hook."""
    return any(cell.cell_contents is value for cell in getattr(function, "__closure__", None) or ())


def detach_all(removers: list[Remover]) -> None:
    """Remove hooks, last added first, empty the list, and say so if somebody else had removed one meanwhile.

    One that raises or is interrupted is tried once more, and does not keep the others.
    """
    there: list[bool] = []
    try:
        while removers:
            there.append(removers[-1]())
            removers.pop()
    except BaseException:
        while removers:
            with suppress(Exception):
                removers.pop()()
        raise
    if not all(there):
        warnings.warn(
            "hooks of this intervention were removed inside its block (reset_hooks(including_permanent=True)?): "
            "from then on it did not act",
            RuntimeWarning,
            stacklevel=4,
        )


class _Use:
    """That a thread is inside `one_thread`."""

    def __init__(self, joining: bool) -> None:
        self.thread, self.joining = threading.current_thread(), joining


# Weak in both: a model can be freed, and a use that nobody could end is over when its frame is. No lock: an interrupt could
# come between taking it and noting that, and then no thread would ever get it again.
_uses: "weakref.WeakKeyDictionary[Any, list[weakref.ref[_Use]]]" = weakref.WeakKeyDictionary()


@contextmanager
def one_thread(model: Model, *, joining: bool = False) -> Iterator[None]:
    """Keep a model from being changed or measured by another thread, for the length of a `with` block.

    Hooks are global to a model: what one thread attaches acts in the forward passes of all. Blocks of one thread nest.

    Args:
        model: The model.
        joining: Whether to enter also where another thread is inside (one that does not join itself), and take part in what
            it attached: for passes that must not be changed on their way.

    Raises:
        ModelError: If another thread is inside such a block for this model.
    """
    require_model(model)
    use = _Use(joining)
    mine, uses = weakref.ref(use), _uses.setdefault(model, [])
    try:
        uses.append(mine)  # first said, then looked: of two that come at once both may be refused, but never none
        other = _elsewhere(uses, use)
        if other is not None:
            raise ModelError(
                f"thread {other!r} has an intervention on this model, or measures it, which would mix with what thread "
                f"{use.thread.name!r} begins here: let it end first, or give each thread a model of its own"
            )
        yield
    finally:
        while mine in uses:
            uses.remove(mine)


def _elsewhere(uses: "list[weakref.ref[_Use]]", own: _Use) -> str | None:
    """Name another thread that is inside, in the way of a use."""
    known = [use for one in tuple(uses) if (use := one()) is not None and (use.joining or not own.joining)]
    return next((use.thread.name for use in known if use.thread is not own.thread and use.thread.is_alive()), None)


def on_forward(
    model: Model, function: Callable[[Tensor | None, int], None], removers: list[Remover] | None = None
) -> Remover:
    """Call a function at the beginning of every forward pass, with its token ids and how many positions are cached.

    The ids are None where a pass begins with embeddings.

    Args:
        model: The model.
        function: What to call.
        removers: As in `attach`.

    Returns:
        A callable that ends this; it returns False if the hooks were already gone.
    """
    seen: list[Tensor] = []
    last: list[Tensor] = []

    def embed(module: Any, args: Any, kwargs: Any) -> None:
        ids = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and not t.is_floating_point()]
        seen[:] = ids[:1]

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        given = (*args, *kwargs.values())
        ids = seen.pop() if seen else None
        x = next((t for t in given if isinstance(t, Tensor) and t.is_floating_point() and t.ndim == 3), None)
        if ids is not None and x is not None and x.shape[:2] != ids.shape:
            # HookedTransformer generates without a cache by embedding the new token, and running all embeddings.
            ids = torch.cat([*last, ids], dim=1) if last and len(last[0]) == len(ids) else ids
            ids = ids if ids.shape == x.shape[:2] else None
        last[:] = [] if ids is None else [ids]
        function(ids, max(map(_cached, given), default=0))

    before = "_forward_pre_hooks"
    return register([(model.embed, before, embed), (model.blocks[0], before, begin)], removers)


def register(
    places: Sequence[tuple[Any, str, Callable[..., Any]]], removers: list[Remover] | None, *, with_kwargs: bool = True
) -> Remover:
    """Add PyTorch's hooks to modules: where, of which kind ("_forward_hooks" or "_forward_pre_hooks"), and what."""
    added = False

    def remove() -> bool:
        there = [_unhook(*place) for place in places]
        return all(there) or not added

    if removers is not None:
        removers.append(remove)
    try:
        for module, kind, hook in places:
            add = module.register_forward_hook if kind == "_forward_hooks" else module.register_forward_pre_hook
            add(hook, with_kwargs=with_kwargs)
        added = True
    except BaseException:
        remove()
        raise
    return remove


def _unhook(module: Any, kind: str, function: Callable[..., Any]) -> bool:
    """Take a function out of a module's hooks of a kind, by identity; return False if it was gone."""
    hooks = getattr(module, kind)
    found = [key for key, other in hooks.items() if other is function]
    for key in found:
        getattr(module, f"{kind}_with_kwargs").pop(key, None)
        hooks.pop(key, None)  # last: by this it is found again after an interrupt
    return bool(found)


def _cached(value: Any) -> int:
    """Count the positions in what may be a key-value cache, of transformers or of `HookedTransformer`."""
    if hasattr(value, "get_seq_length"):
        return int(value.get_seq_length())
    return int(value.past_keys.shape[1]) if hasattr(value, "past_keys") else 0


def on_logits(model: Model, function: Callable[[Tensor], Tensor], removers: list[Remover] | None = None) -> Remover:
    """Pass the logits of every forward through a function.

    Args:
        model: The model.
        function: Takes the logits; returns new ones.
        removers: As in `attach`.

    Returns:
        A callable that ends this; it returns False if the hook was already gone.
    """

    def run(module: Any, args: Any, logits: Tensor) -> Tensor:
        return function(logits)

    run.function = function  # type: ignore[attr-defined]
    return register([(model.unembed, "_forward_hooks", run)], removers, with_kwargs=False)


def logit_functions(model: Model) -> list[Callable[[Tensor], Tensor]]:
    """Return the functions that `on_logits` has put on a model, in the order in which they act."""
    hooks = getattr(getattr(model, "unembed", None), "_forward_hooks", {})
    return [hook.function for hook in hooks.values() if hasattr(hook, "function")]


def backbone(model: Model, tokens: Int[Tensor, "batch pos"]) -> None:
    """Run every block on right-padded tokens, without the unembedding: hooks fire with the values of a full forward.

    No attention mask is passed: attention is causal and padding stands on the right, so no counted position sees it.
    """
    tokens = tokens.to(device_of(model))
    inner = getattr(model, "original_model", None)
    base = getattr(inner, "base_model", None)
    if base is not None and base is not inner:
        base(input_ids=tokens, use_cache=False)
    elif inner is not None:
        model(tokens, return_type=None)
    else:
        model(tokens, return_type=None, stop_at_layer=int(model.cfg.n_layers))
