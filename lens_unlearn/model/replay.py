"""Replaying a forward pass from a layer on, with the stored outputs of the blocks below it.

Knows that a model is a stack of blocks and an unembedding; knows nothing of attention, of hooks at sites, or of the caller's aim.
"""

# Attribution runs the same text many times, each time with something changed at one layer. Everything below that layer is the
# same in every run, so it is computed once (half of the work, on average over the layers), and only the positions that are asked
# for are unembedded. Instead of rebuilding a forward pass out of its parts, which differ between architectures, `forward` of each
# block is replaced by a function that returns the stored output: masks, position embeddings, the final norm and soft-capping stay
# the model's own. The wrapper is inside the module's hooks, so hooks at a block act in every run, and once.

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_unlearn.model.hooks import Remover, detach_all, logit_functions, one_thread
from lens_unlearn.model.host import Model, device_of
from lens_unlearn.model.unembedding import wrap_forward

__all__ = ["Prefix", "Replay", "replaying"]


class Replay:
    """A forward pass whose block outputs are stored, so that the upper layers can run again without those below.

    Made by `replaying`. It assumes that a block passes nothing but the residual stream on to the next. That is tried once, on the
    first text: if it does not hold, or if logits pass through functions of `on_logits`, every run is a full forward pass.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.shortcut = not logit_functions(model)
        """Whether `again` skips the blocks below its layer."""
        unembed = model.unembed.modules()
        self._unembeds_few = self.shortcut and not any(m._forward_hooks or m._forward_pre_hooks for m in unembed)
        self._outputs: dict[int, Any] = {}
        self._below = 0  # in this run, blocks below this one return their stored outputs; -1: the outputs are stored
        self._rows = self._tokens = torch.zeros(0, dtype=torch.long)
        self._width = 0
        self._where: Tensor | None = None  # in this run, the only positions that are unembedded; None: all
        self._thread = threading.get_ident()  # forward passes of other threads are left alone

    def first(
        self, tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "n vocabulary"]:
        """Run the model, store the outputs of its blocks, and return the logits at some positions."""
        untried = self.shortcut and not self._outputs
        self._tokens = tokens.to(device_of(self.model))
        self._outputs.clear()
        logits = self._run(-1, torch.arange(len(tokens)), where, few=False)
        if untried:
            last = int(self.model.cfg.n_layers) - 1
            try:
                again = self._run(last, torch.arange(len(tokens)), where, self._unembeds_few)
                self.shortcut = bool(torch.isclose(again, logits, rtol=1e-2, atol=1e-2).float().mean() > 0.99)
            except Exception:  # an architecture of another structure: then without the shortcut
                self.shortcut = False
            self._unembeds_few = self._unembeds_few and self.shortcut
        return logits

    def again(
        self, layer: int, rows: Int[Tensor, "runs"], where: Bool[Tensor, "runs width"]
    ) -> Float[Tensor, "n vocabulary"]:
        """Run some rows again, from a layer's block on, and return the logits at some positions.

        Hooks at that layer and above act; below it the activations are those of the first run.

        Args:
            layer: The first block that runs.
            rows: Rows of the first run, which may repeat.
            where: The positions whose logits are returned; the rows are cut to this width.
        """
        return self._run(layer if self.shortcut else 0, rows, where, self._unembeds_few)

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
        """Return the function that replaces a block's `forward`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return forward(*args, **kwargs)
            if number < self._below:
                return self._select(self._outputs[number])
            out = forward(*args, **kwargs)
            if self._below < 0:
                self._outputs[number] = out
            return out

        return run

    def _select(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._select, value))
        if isinstance(value, Tensor) and value.shape[:2] == self._tokens.shape and value.ndim == 3:
            return value[self._rows.to(value.device), : self._width]
        return value

    def unembed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function that replaces the unembedding's `forward`."""

        def run(residual: Tensor, *args: Any, **kwargs: Any) -> Any:
            few = self._where is not None and threading.get_ident() == self._thread
            return forward(residual[self._where][None] if few else residual, *args, **kwargs)

        return run


@contextmanager
def replaying(model: Model, stand_ins: Mapping[Any, Any] | None = None) -> Iterator[Replay]:
    """Make a model's forward pass replayable from a layer on, for the length of a `with` block.

    `forward` of the blocks and of the unembedding is wrapped; leaving the block, in whatever way, removes exactly these wrappers.

    Args:
        model: The model.
        stand_ins: The modules that run in place of components that are out of the forward pass, as `shortcuts` yields them.

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
                    wrap_forward(runs.get(block, block), partial(replay.block, number), removers)
                wrap_forward(runs.get(model.unembed, model.unembed), replay.unembed, removers)
                yield replay
            finally:
                detach_all(removers)
        finally:  # as in `_probe`
            detach_all(removers)


class Prefix:
    """What the blocks below some layers gave in one forward pass, for others on the same tokens that differ from a layer on.

    Like `Replay`, it assumes that a block passes nothing but the residual stream on to the next: whoever uses it has to try that.

    Args:
        layers: The layers from which other passes may begin.
    """

    def __init__(self, layers: Collection[int]) -> None:
        self.layers = frozenset(layers)
        self._outputs: dict[int, Any] = {}

    def stream(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """Return what is stored for a layer: the residual stream at its input, or behind the last block."""
        output = self._outputs[layer]
        return output[_place_of_stream(output)] if isinstance(output, tuple) else output

    def changed(self, layer: int, stream: Float[Tensor, "batch pos d_model"]) -> "Prefix":
        """Return the same for passes that begin at a layer with another residual stream at its input."""
        changed, output = Prefix([layer]), self._outputs[layer]
        if isinstance(output, tuple):
            place = _place_of_stream(output)
            output = (*output[:place], stream, *output[place + 1 :])
        else:
            output = stream
        changed._outputs[layer] = output
        return changed

    @contextmanager
    def acting(self, model: Model, stand_ins: Mapping[Any, Any] | None = None, start: int = 0) -> Iterator[None]:
        """Store outputs of blocks in the forward pass of a `with` block; or return them instead of running those below a layer.

        Args:
            model: The model.
            stand_ins: As in `replaying`.
            start: The first block that runs, one of `layers`; 0 to run all and store.
        """
        removers: list[Remover] = []
        thread, runs = threading.get_ident(), stand_ins or {}

        def record(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                out = forward(*args, **kwargs)
                if threading.get_ident() == thread:
                    self._outputs[number + 1] = out
                return out

            return run

        def skip(forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                return self._outputs[start] if threading.get_ident() == thread else forward(*args, **kwargs)

            return run

        try:
            try:
                for number, block in enumerate(model.blocks):
                    if number < start:
                        wrap_forward(runs.get(block, block), skip, removers)
                    elif not start and number + 1 in self.layers:
                        wrap_forward(runs.get(block, block), partial(record, number), removers)
                yield
            finally:
                detach_all(removers)
        finally:  # once more, for an interrupt in the first instruction of the one before
            detach_all(removers)


def _place_of_stream(output: tuple[Any, ...]) -> int:
    """Return where in the output of a block the residual stream is."""
    return next(i for i, t in enumerate(output) if isinstance(t, Tensor) and t.is_floating_point() and t.ndim == 3)
