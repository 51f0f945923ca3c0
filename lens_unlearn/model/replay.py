"""Replaying a forward pass from a layer on, with the stored outputs of the blocks below it.

Knows that a model is a stack of blocks and an unembedding; knows nothing of attention, of hooks at sites, or of the caller's aim.
"""

# Attribution runs the same text many times, each time with something changed at one layer. Everything below that layer is the
# same in every run, so it is computed once (half of the work, on average over the layers), and logits are left to the caller, who
# needs those of some positions. Instead of rebuilding a forward pass out of its parts, which differ between architectures,
# `forward` of each block is replaced by a function that returns the stored output: masks, position embeddings, the final norm and
# soft-capping stay the model's own. The wrapper is inside the module's hooks, so hooks at a block act in every run, and once.

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
from lens_unlearn.model.unembedding import Unembedding, unembedding, wrap_forward

__all__ = ["Prefix", "Replay", "replaying"]


class Replay:
    """A forward pass whose block outputs are stored, so that the upper layers can run again without those below.

    Made by `replaying`. It assumes that a block passes nothing but the residual stream on to the next. That is tried once, on the
    first text: if it does not hold, or if logits pass through functions of `on_logits`, every run is a full forward pass.
    """

    def __init__(self, model: Model, end: Unembedding) -> None:
        self.model, self.end = model, end
        self.shortcut = not logit_functions(model)
        """Whether `again` skips the blocks below its layer."""
        self._outputs: dict[int, Any] = {}
        self._below = 0  # in this run, blocks below this one return their stored outputs; -1: the outputs are stored
        self._rows = self._tokens = torch.zeros(0, dtype=torch.long)
        self._width = 0
        self._thread = threading.get_ident()  # forward passes of other threads are left alone

    def first(self, tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"]) -> Float[Tensor, "n width"]:
        """Run the model, store the outputs of its blocks, and return what its unembedding is given at some positions.

        Of that, `end` makes logits.
        """
        untried = self.shortcut and not self._outputs
        self._tokens = tokens.to(device_of(self.model))
        self._outputs.clear()
        hidden = self._run(-1, torch.arange(len(tokens)), where)
        if untried:
            last = int(self.model.cfg.n_layers) - 1
            try:
                again = self._run(last, torch.arange(len(tokens)), where)
                self.shortcut = bool(torch.isclose(again, hidden, rtol=1e-2, atol=1e-2).float().mean() > 0.99)
            except Exception:  # an architecture of another structure: then without the shortcut
                self.shortcut = False
        return hidden

    def again(
        self, layer: int, rows: Int[Tensor, "runs"], where: Bool[Tensor, "runs width"]
    ) -> Float[Tensor, "n width"]:
        """Run some rows again, from a layer's block on, and return what the unembedding is given at some positions.

        Hooks at that layer and above act; below it the activations are those of the first run.

        Args:
            layer: The first block that runs.
            rows: Rows of the first run, which may repeat.
            where: The positions that are returned; the rows are cut to this width.
        """
        return self._run(layer if self.shortcut else 0, rows, where)

    def _run(self, below: int, rows: Tensor, where: Tensor) -> Tensor:
        self._below, self._rows, self._width = below, rows.to(self._tokens.device), where.shape[1]
        try:
            return self.end.hidden(self._tokens[self._rows, : self._width], where)
        finally:
            self._below = 0

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


@contextmanager
def replaying(model: Model, stand_ins: Mapping[Any, Any] | None = None, *, few: bool = False) -> Iterator[Replay]:
    """Make a model's forward pass replayable from a layer on, for the length of a `with` block.

    `forward` of the blocks is wrapped; leaving the block, in whatever way, removes exactly these wrappers.

    Args:
        model: The model.
        stand_ins: The modules that run in place of components that are out of the forward pass, as `shortcuts` yields them.
        few: As of `unembedding`.

    Raises:
        ModelError: If another thread has an intervention on this model, or measures it.
    """
    removers: list[Remover] = []
    with one_thread(model), unembedding(model, stand_ins, whole=bool(logit_functions(model)), few=few) as end:
        replay = Replay(model, end)
        try:
            try:
                runs = {**(stand_ins or {})}
                for number, block in enumerate(model.blocks):
                    wrap_forward(runs.get(block, block), partial(replay.block, number), removers)
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

    def only(self, rows: Bool[Tensor, "batch"]) -> "Prefix":
        """Return the same for passes on some of the rows."""
        part = Prefix(self.layers)
        part._outputs = {layer: _rows_of(output, rows) for layer, output in self._outputs.items()}
        return part

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


def _rows_of(output: Any, rows: Bool[Tensor, "batch"]) -> Any:
    """Return the output of a block for some rows: of all in it that has rows."""
    if isinstance(output, tuple):
        return tuple(_rows_of(part, rows) for part in output)
    if isinstance(output, Tensor) and output.ndim == 3 and len(output) == len(rows):
        return output[rows.to(output.device)]
    return output
