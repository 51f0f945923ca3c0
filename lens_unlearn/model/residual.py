"""The residual stream of a model: how to look at it, how large it is, and where it is far larger than that: at attention sinks.

Knows the inputs and outputs of blocks, their norms, and a model's usual ones; knows nothing of what is left out or left alone
because of them.
"""

# Some positions of a text, its first one above all and often delimiters, carry a few huge activations ("massive activations", Sun
# et al. 2024) by which later tokens attend to them without reading anything ("attention sinks", Xiao et al. 2023). Their norm is
# far from that of all other positions, so where the line is drawn matters little.
#
# An intervention cannot compare a position with its row: the row's later positions are not there yet, and under a key-value cache
# the earlier ones are not there any more. What it compares with is therefore a property of the model alone.

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_unlearn.core.counter_rng import key_of, mix, uniform
from lens_unlearn.model.hooks import Remover, backbone, detach_all, one_thread, register, resting
from lens_unlearn.model.host import Model, bit_sums, stored
from lens_unlearn.model.special_tokens import special_tokens

__all__ = ["norms", "on_residual", "residual_scale", "sinks_of"]

_PROBE = 64  # tokens of the text on which the usual norms of a model are measured

# Per model: the state of its weights when it was measured, and the median norm at the input of each layer.
_measured: "weakref.WeakKeyDictionary[Any, tuple[list[bytes], tuple[float, ...]]]" = weakref.WeakKeyDictionary()


def on_residual(
    model: Model,
    layers: Iterable[int],
    function: Callable[[int, Float[Tensor, "batch pos d_model"]], None],
    removers: list[Remover] | None = None,
    *,
    output: bool = False,
) -> Remover:
    """Show a function the residual stream at the input of layers, or at the output of their blocks, in every forward pass.

    Of a bridge it is the plain module that is looked at, which `shortcuts` runs as well.

    Args:
        model: The model.
        layers: Which layers.
        function: Takes the number of the layer and the stream, before anything in the layer runs (or behind all of it).
        removers: As in `attach`.
        output: Whether to look at the output.

    Returns:
        The remover of the hooks.
    """

    def show(layer: int, given: Iterable[Any]) -> None:
        function(layer, next(t for t in given if isinstance(t, Tensor) and t.is_floating_point() and t.ndim == 3))

    def before(layer: int) -> Callable[..., None]:
        return lambda module, args, kwargs: show(layer, (*args, *kwargs.values()))

    def behind(layer: int) -> Callable[..., None]:
        return lambda module, args, kwargs, result: show(layer, result if isinstance(result, tuple) else [result])

    kind, hook = ("_forward_hooks", behind) if output else ("_forward_pre_hooks", before)
    blocks = {layer: model.blocks[layer] for layer in layers}
    plain = {layer: getattr(block, "original_component", None) or block for layer, block in blocks.items()}
    return register([(block, kind, hook(layer)) for layer, block in plain.items()], removers)


def norms(stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos"]:
    """Return the norm of the residual stream at each position, in float32, in which the largest do not overflow."""
    return torch.linalg.vector_norm(stream.detach(), dim=-1, dtype=torch.float32)


def sinks_of(
    stream: Float[Tensor, "batch pos d_model"], real: Bool[Tensor, "batch pos"], ratio: float
) -> Bool[Tensor, "batch pos"]:
    """Return the positions whose norm is more than `ratio` times the median of the real positions of their row.

    What is not finite is none: it is a fault, and to be seen.
    """
    size = norms(stream)
    median = torch.where(real.to(size.device), size, torch.nan).nanmedian(1, keepdim=True).values
    return (size > ratio * median) & torch.isfinite(size)


def residual_scale(model: Model) -> tuple[float, ...]:
    """Return the median norm of the residual stream at the input of each layer, on a fixed text of random tokens without its first.

    It is of the model without interventions, measured once for the same weights.
    """
    state = [bit_sums(p) for held in model.parameters() for p in stored(held) if not p.is_meta]
    state.append(bytes([bool(getattr(model, "compatibility_mode", False))]))
    known = _measured.get(model)
    if known is None or known[0] != state:
        known = _measured[model] = (state, _measure(model))
    return known[1]


def _measure(model: Model) -> tuple[float, ...]:
    special = torch.tensor(sorted(special_tokens(model.tokenizer)) if getattr(model, "tokenizer", None) else [])
    usual = torch.arange(int(model.cfg.d_vocab))
    usual = usual[~torch.isin(usual, special)]
    places = torch.arange(min(_PROBE, int(model.cfg.n_ctx)))
    drawn = uniform(mix(places + key_of("residual scale"))).double() * len(usual)
    medians: dict[int, float] = {}
    removers: list[Remover] = []
    with one_thread(model), resting(), torch.no_grad():
        try:
            try:
                layers = range(int(model.cfg.n_layers))
                on_residual(model, layers, lambda n, x: medians.update({n: float(norms(x)[0, 1:].median())}), removers)
                backbone(model, usual[drawn.long()][None])
            finally:
                detach_all(removers)
        finally:  # once more, for an interrupt just before the line above
            detach_all(removers)
    return tuple(medians[layer] for layer in layers)
