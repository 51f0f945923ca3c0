"""Adding and removing hooks: at hook points, before every forward pass, and on the logits; and who may hook a model when.

Knows the hook lists of TransformerLens (`HookPoint.fwd_hooks`) and of PyTorch (`_forward_hooks`); knows nothing of sites, weights,
or what the functions that it hooks compute.
"""

# Order. PyTorch runs the hooks of a module in the order in which they were added, and nothing that changes an activation
# prepends. So of two nested interventions the inner one sees the outer one's result; a user's hook added before a block sees the
# unedited activation, and one added inside it the edited one.
#
# Permanence. `reset_hooks()` removes every hook that is not permanent. Users call it out of habit, also inside a `with` block,
# where the intervention has to go on acting. So ours are permanent: only `reset_hooks(including_permanent=True)` removes them,
# and `detach_all` warns of that.
#
# Identity. Every remover finds its hook by the function itself, not by a handle or a position: a handle exists only once
# `add_hook` has returned, and TransformerLens rebuilds its lists when others are removed. So exactly this hook goes, in any order.
#
# Interrupts. A KeyboardInterrupt can come between any two bytecode instructions. A remover is therefore in the caller's list
# before its hook is added; it can be called twice; and it deletes last the entry by which it finds the hook. Callers run
# `detach_all` in two nested `finally` clauses, since the interrupt can come before the first line of the inner one.
#
# Copies. `copy.deepcopy` copies the tables of hooks but not the functions in them: a copy made inside a block would stay edited for
# ever. A hook point therefore copies itself without our hooks (`_Copier`), and PyTorch's hooks, which are told what module they are
# called for, do nothing for another one than that to which they were added (`_own`).

import copy
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, wraps
from types import CodeType, FrameType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lens_unlearn.core.errors import ModelError, SiteError
from lens_unlearn.model.host import Model, device_of, require_model
from lens_unlearn.model.routed import takes_routed, through

__all__ = [
    "Remover",
    "announce",
    "attach",
    "backbone",
    "detach_all",
    "generation",
    "logit_functions",
    "on_forward",
    "on_logits",
    "one_thread",
    "register",
    "resting",
]

_rest = threading.local()


def _resting() -> bool:
    return getattr(_rest, "now", False)


@contextmanager
def resting() -> Iterator[None]:
    """Let no hook of this package act in the calling thread's forward passes, but for those added inside, for a `with` block.

    For what is to be measured of the model itself, whatever acts on it now.
    """
    before = _resting()
    try:
        _rest.now = True
        yield
    finally:
        _rest.now = before


Remover = Callable[[], bool]
"""Removes the hook it was made for and no other; returns False if that was already gone. It can be interrupted and called again."""


def attach(
    hook: Any,
    function: Callable[[Tensor], Tensor | None],
    removers: list[Remover] | None = None,
    *,
    own_thread: bool = False,
    always: bool = False,
) -> Remover:
    """Add one permanent forward hook at a hook point.

    Args:
        hook: The hook point.
        function: Takes the activation; returns a new one, or None to leave it. Inside routed experts the tensor of all neurons is
            made for it, unless it is marked by `takes_routed`.
        removers: A list to which the hook's remover is appended before the hook is added, so that at no moment an interrupt
            leaves a hook that nobody can remove.
        own_thread: Whether to act only on forward passes of the calling thread.
        always: As in `register`.

    Returns:
        The hook's remover.

    Raises:
        SiteError: If the installed TransformerLens does not record its hooks in `HookPoint.fwd_hooks`.
    """
    thread, added, rests = threading.get_ident(), False, not always and not _resting()

    def run(tensor: Tensor, hook: Any) -> Tensor | None:
        if (own_thread and threading.get_ident() != thread) or (rests and _resting()):
            return None
        return through(function, tensor)

    takes_routed(run)
    run.__wrapped__ = function  # type: ignore[attr-defined]  # by which whoever added it finds it
    # A hook point that is not TransformerLens' has to know when it is used, see `experts`.
    settle: Callable[[], bool] = getattr(hook, "settle", lambda: True)

    def remove() -> bool:
        # From TransformerLens' list and from PyTorch's; the latter last, since it is where an interrupted removal searches again.
        were_there = _unhook_point(hook, run)
        were_there = settle() and were_there
        if (copier := _Copier.of(hook)) is not None:
            copier.left_out[:] = [other for other in copier.left_out if other is not run]
            if not copier.left_out:
                hook.__dict__.pop("__deepcopy__", None)
        return were_there or not added

    if removers is not None:
        removers.append(remove)
    try:
        copier = hook.__dict__.setdefault("__deepcopy__", _Copier(hook))
        copier.left_out.append(run)
        hook.add_hook(run, is_permanent=True)
        if not any(handle.user_hook is run for handle in hook.fwd_hooks):  # pragma: no cover - another version
            raise SiteError("this TransformerLens does not keep its hooks in HookPoint.fwd_hooks: install >=3.9,<5")
        added = True
    except BaseException:
        remove()
        raise
    return remove


def _unhook_point(hook: Any, run: Callable[..., Any]) -> bool:
    """Remove a function from a hook point; return False if it was already gone."""
    keys = [key for key, other in hook._forward_hooks.items() if _closes_over(other, run)]
    hook.fwd_hooks[:] = [handle for handle in hook.fwd_hooks if handle.user_hook is not run]
    for key in keys:
        hook._forward_hooks.pop(key, None)
    return bool(keys)


class _Copier:
    """Copies a hook point as `copy.deepcopy` would, but for some hooks; where that function looks, in the hook point itself."""

    def __init__(self, hook: Any) -> None:
        self.hook, self.left_out = weakref.ref(hook), list[Callable[..., Any]]()

    @classmethod
    def of(cls, hook: Any) -> "_Copier | None":
        return hook.__dict__.get("__deepcopy__")

    def __call__(self, memo: dict[int, Any]) -> Any:
        hook = self.hook()
        assert hook is not None
        del hook.__dict__["__deepcopy__"]
        try:
            copied = copy.deepcopy(hook, memo)
        finally:
            hook.__dict__["__deepcopy__"] = self
        for run in self.left_out:
            _unhook_point(copied, run)
        return copied


def _closes_over(function: Any, value: Any) -> bool:
    """Whether a function is a closure over a value, as TransformerLens' wrapper (`full_hook`) is over the user's hook."""
    return any(cell.cell_contents is value for cell in getattr(function, "__closure__", None) or ())


def detach_all(removers: list[Remover]) -> None:
    """Remove hooks, last added first, and empty the list; warn if one had been removed by somebody else.

    A remover that raises or is interrupted is tried once more, and the others are called all the same.
    """
    were_there: list[bool] = []
    try:
        while removers:
            were_there.append(removers[-1]())
            removers.pop()
    except BaseException:
        while removers:
            with suppress(Exception):
                removers.pop()()
        raise
    if not all(were_there):
        warnings.warn(
            "hooks of this intervention were removed inside its block (reset_hooks(including_permanent=True)?): "
            "from then on it did not act",
            RuntimeWarning,
            stacklevel=4,
        )


class _Use:
    """A thread's stay inside `one_thread`."""

    def __init__(self, joining: bool) -> None:
        self.thread, self.joining = threading.current_thread(), joining


# Weak references to both: a model can be freed, and a use whose end was interrupted is over when its frame is freed. No lock:
# an interrupt between acquiring it and entering the `try` would leave it locked for ever.
_uses: "weakref.WeakKeyDictionary[Any, list[weakref.ref[_Use]]]" = weakref.WeakKeyDictionary()


@contextmanager
def one_thread(model: Model, *, joining: bool = False) -> Iterator[None]:
    """Keep other threads from changing or measuring a model, for the length of a `with` block.

    Hooks belong to the model: what one thread attaches acts in the forward passes of all threads. Blocks of one thread nest.

    Args:
        model: The model.
        joining: Whether to enter also if another thread is inside that did not itself join, and run under the hooks it
            attached: for passes during which the hooks must not change, such as those of a generation.

    Raises:
        ModelError: If another thread is inside such a block for this model.
    """
    require_model(model)
    use = _Use(joining)
    mine, uses = weakref.ref(use), _uses.setdefault(model, [])
    try:
        uses.append(mine)  # announce, then look: of two at once both may be refused, but never neither
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


def _elsewhere(uses: "list[weakref.ref[_Use]]", wanted: _Use) -> str | None:
    """Return the name of another thread whose use of the model excludes the wanted one, if there is one."""
    known = [use for ref in tuple(uses) if (use := ref()) is not None and (use.joining or not wanted.joining)]
    return next((use.thread.name for use in known if use.thread is not wanted.thread and use.thread.is_alive()), None)


def on_forward(
    model: Model, function: Callable[[Tensor | None, int], None], removers: list[Remover] | None = None
) -> Remover:
    """Call a function at the beginning of every forward pass, with the token ids and the number of cached positions.

    The ids are None if the pass was given embeddings instead of tokens.

    Args:
        model: The model.
        function: What to call.
        removers: As in `attach`.

    Returns:
        The remover of the hooks.
    """
    # Two hooks, since the ids reach the embedding only, and the key-value cache reaches the blocks only.
    seen: list[Tensor] = []
    last: list[Tensor] = []
    states: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def embed(module: Any, args: Any, kwargs: Any) -> None:
        ids = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and not t.is_floating_point()]
        seen[:] = ids[:1]

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        given = (*args, *kwargs.values())
        ids = seen.pop() if seen else None
        x = next((t for t in given if isinstance(t, Tensor) and t.is_floating_point() and t.ndim == 3), None)
        if ids is not None and x is not None and x.shape[:2] != ids.shape:
            # Without a cache, HookedTransformer generates by embedding the new token alone and running the embeddings of all.
            ids = torch.cat([*last, ids], dim=1) if last and len(last[0]) == len(ids) else ids
            ids = ids if ids.shape == x.shape[:2] else None
        last[:] = [] if ids is None else [ids]
        width = 0 if x is None else x.shape[1]
        function(ids, max((_cached(value, states, width) for value in given), default=0))

    # They look at nothing but the call, which the plain module is given as well where `shortcuts` runs it.
    embed.carried = begin.carried = True  # type: ignore[attr-defined]
    before = "_forward_pre_hooks"
    return register([(model.embed, before, embed), (model.blocks[0], before, begin)], removers)


def generation(model: Model) -> FrameType | None:
    """Return the frame of the call of the model's `generate` in which this is called; None outside of any.

    While a reference to it is held, no other call has the same frame: so it tells one generation from another. Without a
    key-value cache nothing that reaches the hooks does.
    """
    codes = _generating(type(model)) | _generating(type(getattr(model, "original_model", None)))
    frame = inspect.currentframe()
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame


@cache
def _generating(kind: type) -> frozenset[CodeType]:
    """Return the code of what generates, of a class of models: of TransformerLens, or the one of transformers inside."""
    found = (getattr(kind, name, None) for name in ("generate", "generate_stream"))
    return frozenset(inspect.unwrap(function).__code__ for function in found if function is not None)


def register(
    places: Sequence[tuple[Any, str, Callable[..., Any]]],
    removers: list[Remover] | None,
    *,
    with_kwargs: bool = True,
    always: bool = False,
    first: bool = False,
) -> Remover:
    """Add PyTorch hooks to modules.

    Args:
        places: For each hook the module, the kind ("_forward_hooks" or "_forward_pre_hooks"), and the function.
        removers: As in `attach`.
        with_kwargs: Whether the functions take the module's keyword arguments too.
        always: Whether they act also where hooks rest: what only hands values to hooks, which rest themselves.
        first: Whether they act before the hooks that are there.

    Returns:
        One remover for all of them.
    """
    added = False

    owned = [(module, kind, _own(module, hook, always)) for module, kind, hook in places]

    def remove() -> bool:
        were_there = [_unhook(*place) for place in owned]
        return all(were_there) or not added

    if removers is not None:
        removers.append(remove)
    try:
        for module, kind, hook in owned:
            add = module.register_forward_hook if kind == "_forward_hooks" else module.register_forward_pre_hook
            add(hook, with_kwargs=with_kwargs, prepend=first)
        added = True
    except BaseException:
        remove()
        raise
    return remove


def _own(module: Any, hook: Callable[..., Any], always: bool) -> Callable[..., Any]:
    """Make a PyTorch hook that does nothing when it is called for another module, such as a copy of its own, or rests."""
    reference, rests = weakref.ref(module), not always and not _resting()

    @wraps(hook)
    def run(called: Any, *args: Any) -> Any:
        return hook(called, *args) if called is reference() and not (rests and _resting()) else None

    run.module = reference  # type: ignore[attr-defined]
    return run


def _unhook(module: Any, kind: str, function: Callable[..., Any]) -> bool:
    """Remove a function, by identity, from a module's hooks of a kind; return False if it was already gone."""
    hooks = getattr(module, kind)
    keys = [key for key, other in hooks.items() if other is function]
    for key in keys:
        getattr(module, f"{kind}_with_kwargs").pop(key, None)
        hooks.pop(key, None)  # last: after an interrupt the hook is found again by this entry
    return bool(keys)


def _cached(value: Any, states: "weakref.WeakKeyDictionary[Any, int]", width: int) -> int:
    """Return the number of positions in a key-value cache of transformers or of `HookedTransformer`; 0 for anything else.

    Args:
        value: What may be a cache.
        states: How many positions each cache without attention layers (Mamba's) has had, which none of its layers knows.
        width: How many this pass adds.
    """
    if hasattr(value, "get_seq_length"):
        try:
            return int(value.get_seq_length())
        except ValueError:
            past = states.get(value, 0)
            states[value] = past + width
            return past
    return int(value.past_keys.shape[1]) if hasattr(value, "past_keys") else 0


def on_logits(model: Model, function: Callable[[Tensor], Tensor], removers: list[Remover] | None = None) -> Remover:
    """Pass the logits of every forward pass through a function.

    Args:
        model: The model.
        function: Takes the logits; returns new ones.
        removers: As in `attach`.

    Returns:
        The remover of the hook.
    """

    def run(module: Any, args: Any, logits: Tensor) -> Tensor:
        return function(logits)

    run.function = function  # type: ignore[attr-defined]
    return register([(model.unembed, "_forward_hooks", run)], removers, with_kwargs=False)


def logit_functions(model: Model) -> list[Callable[[Tensor], Tensor]]:
    """Return the functions that `on_logits` has added to a model, in the order in which they act."""
    unembed = getattr(model, "unembed", None)
    hooks = getattr(unembed, "_forward_hooks", {}).values()
    return [hook.function for hook in hooks if hasattr(hook, "function") and hook.module() is unembed]


def announce(model: Model, ends: Int[Tensor, "batch"], lengths: Int[Tensor, "batch"]) -> None:
    """Tell whatever looks at rows where each row's prompt, and each row, ends in the next forward pass.

    Args:
        model: The model.
        ends: Positions of the prompts' last tokens.
        lengths: Tokens of each row before its padding on the right.
    """
    for function in logit_functions(model):
        expect = getattr(function, "expect", None)
        if expect is not None:
            expect(ends, lengths=lengths)


def backbone(model: Model, tokens: Int[Tensor, "batch pos"]) -> None:
    """Run every block on right-padded tokens, but not the unembedding; hooks see the same values as in a full forward pass.

    No attention mask is passed: attention is causal and the padding is on the right, so no counted position attends to it.
    """
    # The unembedding, [batch, pos, vocabulary], often takes more memory than all the rest, and no neuron depends on it.
    tokens = tokens.to(device_of(model))
    inner = getattr(model, "original_model", None)
    base = getattr(inner, "base_model", None)
    if base is not None and base is not inner:
        base(input_ids=tokens, use_cache=False)
    elif inner is not None:
        model(tokens, return_type=None)
    else:
        model(tokens, return_type=None, stop_at_layer=int(model.cfg.n_layers))
