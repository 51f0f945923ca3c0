"""Hook points: the only module that knows TransformerLens by name.

A `Site` says *where* in a model (layer and kind). `resolve` turns sites into the hook points of one model, after a
probe forward has shown that each of them fires once and has a neuron axis. `attach` adds one hook and returns the one
callable that removes exactly that hook. `backbone` runs a model without its unembedding.

Facts relied on here, measured on TransformerLens 3.9 and 4.3: the names below resolve on `HookedTransformer` and on
`TransformerBridge`, raw or in compatibility mode; on the bridge several names may stand for one `HookPoint`; hook
points of mixture-of-experts layers exist but carry the residual width; `cfg.d_mlp` can be wrong (OPT).
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_unlearn.model.hooks import Remover, detach_all, logit_functions, one_thread
from lens_unlearn.model.host import Model, device_of

__all__ = []


class Replay:
    """A forward pass whose blocks' outputs were kept, so that its upper layers can run again without those below.

    Made by `replaying`. A model's own `forward` does the rest of the work (masks, positions, final norm, soft-capping), so
    nothing about an architecture is known here but that a block hands one residual stream to the next. This is tried once:
    where it does not hold, and where logits pass through the functions of `on_logits`, every run is a whole one.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.shortcut = not logit_functions(model)
        """Whether the blocks below are left out in `again`."""
        unembed = model.unembed.modules()
        self._few = self.shortcut and not any(m._forward_hooks or m._forward_pre_hooks for m in unembed)
        self._kept: dict[int, Any] = {}
        self._below = 0  # in this run, blocks under this one give what they gave before; -1: keep what they give
        self._rows = self._tokens = torch.zeros(0, dtype=torch.long)
        self._width = 0
        self._where: Tensor | None = None  # in this run, the only positions that are unembedded
        self._thread = threading.get_ident()  # whose runs these are: what other threads run passes as it is

    def first(
        self, tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "n vocabulary"]:
        """Run the model, keep what its blocks give, and return the logits of some positions."""
        untried = self.shortcut and not self._kept
        self._tokens = tokens.to(device_of(self.model))
        self._kept.clear()
        logits = self._run(-1, torch.arange(len(tokens)), where, few=False)
        if untried:
            last = int(self.model.cfg.n_layers) - 1
            try:
                again = self._run(last, torch.arange(len(tokens)), where, self._few)
                self.shortcut = bool(torch.isclose(again, logits, rtol=1e-2, atol=1e-2).float().mean() > 0.99)
            except Exception:  # a model of another make: then without
                self.shortcut = False
            self._few = self._few and self.shortcut
        return logits

    def again(
        self, layer: int, rows: Int[Tensor, "runs"], where: Bool[Tensor, "runs width"]
    ) -> Float[Tensor, "n vocabulary"]:
        """Run some rows of the first run again, from a layer's block on, up to a position; return the logits of positions.

        Hooks at and above that layer act; what stands below it is as in the first run.
        """
        return self._run(layer if self.shortcut else 0, rows, where, self._few)

    def _run(self, below: int, rows: Tensor, where: Tensor, few: bool) -> Tensor:
        device = self._tokens.device
        where = where.to(device)
        self._below, self._rows, self._width = below, rows.to(device), where.shape[1]
        self._where = where if few else None
        try:
            logits = self.model(self._tokens[self._rows, : self._width], return_type="logits")
        finally:
            self._below, self._where = 0, None
        return logits[0] if few else logits[where]

    def block(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Make what stands in for a block's `forward`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return forward(*args, **kwargs)
            if number < self._below:
                return self._take(self._kept[number])
            out = forward(*args, **kwargs)
            if self._below < 0:
                self._kept[number] = out
            return out

        return run

    def _take(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._take, value))
        if isinstance(value, Tensor) and value.shape[:2] == self._tokens.shape and value.ndim == 3:
            return value[self._rows.to(value.device), : self._width]
        return value

    def unembed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Make what stands in for the unembedding's `forward`."""

        def run(residual: Tensor, *args: Any, **kwargs: Any) -> Any:
            few = self._where is not None and threading.get_ident() == self._thread
            return forward(residual[self._where][None] if few else residual, *args, **kwargs)

        return run


@contextmanager
def replaying(model: Model, stand_ins: Mapping[Any, Any] | None = None) -> Iterator[Replay]:
    """Let a model's forward passes be repeated in part, for the length of a `with` block.

    Args:
        model: The model.
        stand_ins: For components that are out of its forward pass, what runs in their place: as `lean` yields them.

    Blocks and unembedding are wrapped inside the hooks of their modules, which act in every run, and only once. Leaving
    the block, in whatever way, takes exactly these wrappings off.

    Raises:
        ModelError: If another thread has an intervention on this model, or measures it.
    """
    removers: list[Remover] = []
    with one_thread(model):
        replay = Replay(model)
        try:
            try:
                runs = {**(stand_ins or {})}
                for number, block in enumerate(model.blocks):
                    _wrap(runs.get(block, block), partial(replay.block, number), removers)
                _wrap(runs.get(model.unembed, model.unembed), replay.unembed, removers)
                yield replay
            finally:
                detach_all(removers)
        finally:  # as in `_probe`
            detach_all(removers)


def _wrap(module: Any, make: Callable[[Callable[..., Any]], Callable[..., Any]], removers: list[Remover]) -> None:
    own = {"forward": module.__dict__["forward"]} if "forward" in module.__dict__ else {}  # accelerate's, for one
    wrapped = make(module.forward)

    def unwrap() -> bool:
        module.__dict__.pop("forward", None)
        module.__dict__.update(own)
        return True

    removers.append(unwrap)
    module.__dict__["forward"] = wrapped
