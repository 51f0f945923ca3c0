"""Experts computed so that their keys, and their routers' logits, pass through hook points.

Knows how transformers computes the experts of a layer (its table of expert implementations, from 5.9 on); knows nothing of where in
a model experts are, nor of what hooks there do.
"""

# The table is keyed by a name in the model's configuration. While something is hooked at a layer of a model, that name is ours, and
# it says which implementation was there before: "lens_unlearn:grouped_mm". Ours runs that very implementation: its own function, on
# an object that stands for the module and through whose gating the keys pass; so nothing that is not changed changes in any bit.
# Only "eager" is each model class' own loop, which no key can be taken out of: it is written once more here. Layers without hooks
# run as before.
#
# Whether the name is ours follows from the hooks alone (`_Layer.settle`, called after each change of them). So blocks may end in
# any order, and an interrupted end is mended by the next.
#
# Llama 4 has experts outside the table, all of which are computed for all tokens, with inputs of 0 where a token is not routed.
# There a hook on the module computes its output again.
#
# A router computes its logits and what it chooses by them in one function. A hook on it runs that function once more, in a mode
# in which the logits pass through the hook point on their way. What is -inf there is -inf in the choice, too: scores to which a
# bias is added after a sigmoid would otherwise still be chosen.

import weakref
from collections.abc import Callable
from functools import partial, wraps
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lens_unlearn.core.errors import SiteError
from lens_unlearn.model.hooks import Remover, register
from lens_unlearn.model.routed import Routed, through

__all__ = ["EXPERT_KINDS", "MOE_KINDS", "layer_of", "known_layers"]

EXPERT_KINDS = ("experts.pre", "experts.pre_linear", "experts.post")
MOE_KINDS = (*EXPERT_KINDS, "experts.router", "shared.post")
_OURS = "lens_unlearn:"

# By the module of experts, or the last linear map of shared ones; weak references, so that a model can be freed.
_layers: "weakref.WeakKeyDictionary[nn.Module, _Layer]" = weakref.WeakKeyDictionary()


class _Layer:
    """The hook points of one layer's experts, and what has to be in place while something is hooked there."""

    def __init__(self, module: nn.Module, block: nn.Module) -> None:
        self.module, self.block = weakref.ref(module), weakref.ref(block)
        self.points: dict[str, Any] = {}
        self.removers: list[Remover] = []
        self.batch = (0, 0)

    def point(self, kind: str) -> Any:
        """Return the hook point of a kind."""
        from transformer_lens.hook_points import HookPoint

        if kind not in self.points:
            point: Any = HookPoint()
            point.name = kind
            point.settle = self.settle
            point.add_hook = partial(self._add, point.add_hook)
            self.points[kind] = point
        return self.points[kind]

    def _add(self, add: Callable[..., Any], hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Add a hook, which may be the user's: it is given tensors."""

        @wraps(hook)
        def run(value: Any, hook: Any) -> Any:
            return through(lambda tensor: given(tensor, hook=hook), value)

        given, function = hook, hook if getattr(hook, "takes_routed", False) else run
        handle = add(function, *args, **kwargs)
        self.settle()
        return handle

    def hooked(self, *kinds: str) -> bool:
        """Whether something is hooked, at one of some kinds or at any."""
        points = [point for kind, point in self.points.items() if kind in kinds or not kinds]
        return any(point._forward_hooks or point._backward_hooks for point in points)

    def require(self, name: str) -> None:
        """Refuse experts whose keys cannot be had."""

    def settle(self) -> bool:
        """Put in place what the hooks need, or take it away; return False if somebody else took it away meanwhile."""
        block, module = self.block(), self.module()
        if block is None or module is None:  # the model is gone
            return True
        in_place = any(getattr(hook, "__wrapped__", None) == self._note for hook in block._forward_pre_hooks.values())
        if not (self.hooked() and in_place):
            while self.removers:
                self.removers[-1]()
                self.removers.pop()
            if self.hooked():
                places = [(block, "_forward_pre_hooks", self._note), *self._places(module)]
                register(places, self.removers, always=True)
        return True

    def _places(self, module: nn.Module) -> list[tuple[Any, str, Callable[..., Any]]]:
        return []

    def _note(self, module: Any, args: Any, kwargs: Any) -> None:
        # Experts are given tokens without a batch dimension: how many rows and positions there are is seen at the block alone.
        given = (*args, *kwargs.values())
        stream = next(t for t in given if isinstance(t, Tensor) and t.is_floating_point() and t.ndim == 3)
        self.batch = (stream.shape[0], stream.shape[1])


class _SharedLayer(_Layer):
    """Shared experts: the input of their last linear map."""

    def _places(self, module: nn.Module) -> list[tuple[Any, str, Callable[..., Any]]]:
        def pass_on(module: Any, args: Any, kwargs: Any) -> Any:
            x = args[0]
            return (self.points["shared.post"](x.reshape(*self.batch, -1)).reshape(x.shape), *args[1:]), kwargs

        return [(module, "_forward_pre_hooks", pass_on)]


class _RouterLayer(_Layer):
    """Routers: the logits of all experts, before any is chosen."""

    def require(self, name: str) -> None:
        """Refuse a router that first chooses among groups of experts."""
        router: Any = self.module()
        groups, chosen = int(getattr(router, "num_group", None) or 1), int(getattr(router, "topk_group", None) or 1)
        if groups > chosen and getattr(router, "topk_method", "") != "greedy":
            raise SiteError(
                f"{name} is not supported: this router first chooses {chosen} of {groups} groups of experts, so that an expert's "
                "place is not taken by the next one; ablate the expert's neurons at experts.post"
            )

    def _places(self, module: nn.Module) -> list[tuple[Any, str, Callable[..., Any]]]:
        def again(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            with _Logits(self._pass_on):
                return module.forward(*args, **kwargs)

        return [(module, "_forward_hooks", again)]

    def _pass_on(self, logits: Tensor) -> Tensor:
        new = self.points["experts.router"](logits.reshape(*self.batch, -1))
        return new.reshape(logits.shape)


class _Logits(TorchFunctionMode):
    """Passes the result of the first linear map through a function; what is -inf then is in no maximum of scores of that shape."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.out = function, None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "topk" and self.out is not None and args[0].shape == self.out.shape:
            args = (args[0].masked_fill(self.out, -torch.inf), *args[1:])
        result = func(*args, **(kwargs or {}))
        if name == "linear" and self.out is None:
            result = self.function(result)
            self.out = result == -torch.inf
        return result


class _ExpertsLayer(_Layer):
    """Routed experts: how keys, and what is before them, pass through the hook points."""

    def keys(
        self,
        gate_up: Tensor,
        activate: Callable[[Tensor], Tensor],
        pairs: Callable[..., Routed],
        *,
        gated: bool = True,
        interleaved: bool = False,
    ) -> Tensor:
        """Return the keys of pairs, from the output of the experts' first matrix."""
        if self.hooked("experts.pre", "experts.pre_linear"):
            if not gated:
                parts = {"experts.pre": gate_up}
            elif interleaved:
                parts = {"experts.pre": gate_up[..., ::2], "experts.pre_linear": gate_up[..., 1::2]}
            else:
                parts = dict(zip(EXPERT_KINDS, gate_up.chunk(2, dim=-1), strict=False))
            given = {
                kind: pairs(part.contiguous() if self.hooked(kind) else part, False) for kind, part in parts.items()
            }
            seen = {kind: self._passed(kind, values) for kind, values in given.items()}
            if any(seen[kind] is not given[kind] for kind in given):  # what is only looked at is not put together again
                new = [values.key for values in seen.values()]
                gate_up = (
                    new[0]
                    if not gated
                    else torch.stack(new, dim=-1).flatten(-2)
                    if interleaved
                    else torch.cat(new, dim=-1)
                )
        key = activate(gate_up)
        return self._passed("experts.post", pairs(key)).key if self.hooked("experts.post") else key

    def _passed(self, kind: str, values: Routed) -> Routed:
        point = self.points.get(kind)
        if point is None:
            return values
        # PyTorch calls backward hooks of modules that return tensors.
        return values.with_dense(point(values.dense())) if point._backward_hooks else point(values)


class _TableLayer(_ExpertsLayer):
    """Experts that transformers computes through its table."""

    def require(self, name: str) -> None:
        """Refuse an implementation that fuses the experts, and experts that are spread over processes."""
        module: Any = self.module()
        assert module is not None
        previous = _previous(module)
        if previous not in _WAYS:
            raise SiteError(
                f"{name} cannot be seen under the expert implementation {previous!r}, which fuses the experts: call "
                "model.original_model.set_experts_implementation('grouped_mm') first"
            )
        if getattr(module, "_is_expert_parallel", False):
            raise SiteError(f"{name} cannot be seen where the experts are spread over processes: load the model in one")
        try:
            from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: F401
        except ImportError:
            raise SiteError(
                f"{name} needs the table of expert implementations, which transformers {version('transformers')} does not have: "
                "install transformers>=5.9"
            ) from None

    def settle(self) -> bool:
        """Besides, put our name into the configuration, or the one that was there before."""
        module: Any = self.module()
        if module is None:
            return True
        config = module.config
        were_there = not self.removers or _is_ours(config)  # or somebody chose another implementation meanwhile
        super().settle()
        on = any(
            isinstance(other, _TableLayer) and other.hooked()
            for held, other in list(_layers.items())
            if getattr(held, "config", None) is config
        )
        name = _previous(module)
        if on and not _is_ours(config):
            _register(name)
            config._experts_implementation_internal = _OURS + name
        elif not on and _is_ours(config):
            config._experts_implementation_internal = name
        return were_there


def _is_ours(config: Any) -> bool:
    return str(config._experts_implementation).startswith(_OURS)


def _previous(module: Any) -> str:
    return str(module.config._experts_implementation).removeprefix(_OURS)


def _register(previous: str) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if _OURS + previous not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(_OURS + previous, partial(_forward, previous))


def _forward(previous: str, module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Compute a layer's experts as an implementation does, their keys passing through the layer's hook points if it has hooks."""
    layer = _layers.get(module)
    if layer is None or not layer.hooked():  # another layer, or a copy of the model
        if previous == "eager":
            return type(module).forward.__wrapped__(module, *args, **kwargs)
        return _function(previous)(module, *args, **kwargs)
    hidden, index, weights = (*args, *kwargs.values())
    assert isinstance(layer, _TableLayer)
    return _WAYS[previous](layer, module, hidden, index, weights)


def _function(name: str) -> Callable[..., Tensor]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS[name]


class _Gating:
    """Stands for a module of experts in a function of the table, for which only what gates or activates is another."""

    def __init__(self, module: Any, keys: Callable[[Tensor], Tensor]) -> None:
        self._module, self._keys = module, keys

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self._keys(gate_up)

    def act_fn(self, up: Tensor) -> Tensor:
        return self._keys(up)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _grouped(layer: _TableLayer, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    expert, order = torch.sort(index.reshape(-1))  # as the function itself does
    return _by_table("grouped_mm", layer, module, (hidden, index, weights), expert, order)


def _batched(layer: _TableLayer, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    order = torch.arange(index.numel(), device=index.device)
    return _by_table("batched_mm", layer, module, (hidden, index, weights), index.reshape(-1), order)


def _by_table(
    name: str, layer: _TableLayer, module: Any, given: tuple[Tensor, Tensor, Tensor], expert: Tensor, order: Tensor
) -> Tensor:
    pairs = partial(_pairs, layer, module, expert, order // given[1].shape[-1], given[2].reshape(-1)[order])
    return _function(name)(_Gating(module, partial(_keys, layer, module, pairs)), *given)


def _pairs(
    layer: _Layer, module: Any, expert: Tensor, token: Tensor, gate: Tensor, key: Tensor, weighted: bool = True
) -> Routed:
    return Routed(key, gate, expert, token, int(module.num_experts), layer.batch, weighted)


def _keys(
    layer: _TableLayer, module: Any, pairs: Callable[..., Routed], gate_up: Tensor, counts: list[int] | None = None
) -> Tensor:
    """Activate, all at once or so many rows at a time, as is done without hooks.

    The last numbers of a tensor, which do not fill a vector of the processor, are rounded differently by its functions.
    """
    whole = module._apply_gate if module.has_gate else module.act_fn

    def activate(values: Tensor) -> Tensor:
        return whole(values) if counts is None else torch.cat([whole(part) for part in values.split(counts)])

    return layer.keys(gate_up, activate, pairs, gated=module.has_gate, interleaved=not module.is_concatenated)


def _eager(layer: _TableLayer, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute one expert after the other, as the classes of transformers do; keys of all experts before the first output."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    with torch.no_grad():
        mask = F.one_hot(index, num_classes=module.num_experts).permute(2, 1, 0)
        hit = mask.sum(dim=(-1, -2)).nonzero()[:, 0].tolist()
    places = [torch.where(mask[e]) for e in hit]  # for each expert, which of a token's experts it is, and the tokens
    rows = [_linear(module, name, e, hidden[token]) for e, (_, token) in zip(hit, places, strict=True)]
    counts = [len(part) for part in rows]
    expert = torch.repeat_interleave(torch.tensor(hit, device=index.device), torch.tensor(counts, device=index.device))
    slot, token = (torch.cat(parts) for parts in zip(*places, strict=True))
    pairs = partial(_pairs, layer, module, expert, token, weights[token, slot])
    keys = _keys(layer, module, pairs, torch.cat(rows), counts)
    result = torch.zeros_like(hidden)
    for e, (slot, token), key in zip(hit, places, keys.split(counts), strict=True):
        out = _linear(module, "down_proj", e, key)
        if module.has_post_expert_norm:
            out = module.post_expert_norm(out)
        out = out * weights[token, slot, None]
        result.index_add_(0, token, out.to(result.dtype))
    return result


def _linear(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    y = x @ weight if module.is_transposed else F.linear(x, weight)
    return y + getattr(module, f"{name}_bias")[expert] if module.has_bias else y


_WAYS: dict[str, Callable[..., Tensor]] = {"eager": _eager, "grouped_mm": _grouped, "batched_mm": _batched}
"""The implementations whose keys can be had."""


class _Llama4Layer(_ExpertsLayer):
    """Llama 4's experts, to which tokens come already multiplied by their gates: here the gate of every pair is 1."""

    def require(self, name: str) -> None:
        """Refuse experts of any other kind that are not in the table."""
        module = self.module()
        if type(module).__name__ != "Llama4TextExperts":
            raise SiteError(
                f"{name} cannot be seen: {type(module).__name__} fuses its experts without transformers' table of expert "
                "implementations"
            )

    def _places(self, module: nn.Module) -> list[tuple[Any, str, Callable[..., Any]]]:
        def again(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            return self._computed(module, *args, **kwargs)

        return [(module, "_forward_hooks", again)]

    def _computed(self, module: Any, hidden_states: Tensor) -> Tensor:
        experts = module.gate_up_proj.shape[0]
        given = hidden_states.view(experts, -1, module.hidden_size)
        expert, token = (given != 0).any(-1).nonzero(as_tuple=True)
        pairs = partial(_pairs, self, module, expert, token, given.new_ones(len(token)))

        all_up = torch.bmm(given, module.gate_up_proj)

        def activate(gate_up: Tensor) -> Tensor:  # of all tokens: see `_keys`
            gate, up = all_up.index_put((expert, token), gate_up).chunk(2, dim=-1)
            return (up * module.act_fn(gate))[expert, token]

        found = self.keys(all_up[expert, token], activate, pairs)
        keys = found.new_zeros(*all_up.shape[:2], found.shape[-1]).index_put((expert, token), found)
        return torch.bmm(keys, module.down_proj).view(-1, module.hidden_size)


def layer_of(module: nn.Module, block: nn.Module, kind: str) -> _Layer:
    """Return the hook points at a module of experts, a router or the last map of shared experts, in a block."""
    if module not in _layers:
        made: Any = {"shared.post": _SharedLayer, "experts.router": _RouterLayer}.get(kind)
        made = made or (_TableLayer if hasattr(module, "has_gate") else _Llama4Layer)
        _layers[module] = made(module, block)
    return _layers[module]


def known_layers() -> dict[nn.Module, _Layer]:
    """Return those that were asked for so far, by module."""
    return dict(_layers)
