"""What autograd holds of a forward pass: `frozen` weights take no part in it, `recomputing` keeps a block's input alone.

Knows that a model is a stack of blocks; knows nothing of what is trained, nor of what the gradients are for.
"""

# A linear map keeps its input for the gradient of its weights, whether anybody asks for that gradient or not, and what is kept of
# a block is some forty times the residual stream. So where the weights stay as they are, they are taken out of the graph; and
# where memory matters more than time, only what enters a block is kept, and the block is run once more when the gradient comes
# to it. This is PyTorch's checkpointing; what is ours is where it is put, so that hooks inside a block act in both runs.

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers.cache_utils import Cache

from lens_unlearn.core.errors import ModelError
from lens_unlearn.model.hooks import Remover, detach_all
from lens_unlearn.model.host import Model
from lens_unlearn.model.unembedding import wrap_forward

__all__ = ["frozen", "recomputing"]


@contextmanager
def frozen(model: Model, *, recompute: bool = False) -> Iterator[None]:
    """Take a model's parameters out of gradients, for the length of a `with` block that holds forward and backward passes.

    Args:
        model: The model.
        recompute: Whether forward passes inside are `recomputing`. What is run again is then run by the calling thread, also on a
            GPU, since hooks may be meant for one thread.

    Raises:
        ModelError: If a block that is run again is seen to do something else.
    """
    held = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        try:
            for parameter in held:
                parameter.requires_grad_(False)
            with torch.autograd.set_multithreading_enabled(False) if recompute else nullcontext():
                yield
        except CheckpointError as error:
            raise ModelError(
                "a block of this model gives something else when it is run again, as one does that keeps a state: leave out "
                "memory='low'"
            ) from error
        finally:
            for parameter in held:
                parameter.requires_grad_(True)
    finally:  # once more, for an interrupt in the middle of it
        for parameter in held:
            parameter.requires_grad_(True)


@contextmanager
def recomputing(
    model: Model,
    stand_ins: Mapping[Any, Any] | None = None,
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[None]:
    """Keep only what enters each block in the forward passes of a `with` block that have gradients; the rest is computed again.

    The backward pass may come later, while the hooks of the forward pass still act. A pass without gradients is left alone.

    Args:
        model: The model.
        stand_ins: The modules that run in place of components that are out of the forward pass, as `shortcuts` yields them.
        inside: What the forward pass is in and the backward pass may not be, such as `shortcuts`.
    """
    removers: list[Remover] = []

    def make(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            args = tuple(map(_without_cache, args))
            kwargs = {name: _without_cache(value) for name, value in kwargs.items()}
            return checkpoint(
                forward,
                *args,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing is drawn: models are in evaluation mode
                context_fn=lambda: (nullcontext(), inside()),
                **kwargs,
            )

        return run

    try:
        try:
            for block in model.blocks:
                wrap_forward((stand_ins or {}).get(block, block), make, removers)
            yield
        finally:
            detach_all(removers)
    finally:  # once more, for an interrupt in the first instruction of the one before
        detach_all(removers)


def _without_cache(argument: Any) -> Any:
    """Return None for a key-value cache, to which the first run of a block would write what its second run would find there."""
    return None if isinstance(argument, Cache) else argument
