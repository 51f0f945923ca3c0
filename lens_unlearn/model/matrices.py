"""Weight matrices: which a model has, their values as ``[in, out]``, and hooks on the linear map that each computes.

Knows where TransformerLens computes with which weights, fused or not; knows nothing of what is added to a matrix, or why.
"""

# Why hooks on maps instead of edited weights: an edit that is interrupted, or undone in floating point, leaves other weights
# than before. Here a change of W is added to the map's output, `x @ W + x @ dW`, and no parameter is ever written to.
#
# For this the input `x` of the map itself is needed, with every mask and intervention applied. Hook points are not enough:
# an ablation attached later, at the same point, would change x after we read it. Where the map is a module (a bridge's linear
# component) a hook on that module sees exactly its input. Where it is not (`HookedTransformer`, and gated MLPs in compatibility
# mode, compute with bare parameters), the last hook point before the map is read by a hook that is moved behind all others at
# the beginning of every pass.
#
# Fused matrices (such as GPT-2's c_attn, which holds W_Q, W_K and W_V side by side) need no hooks of their own: the bridge splits
# them into linear components, and `HookedTransformer` into parameters. `matrix_shapes` runs the model once and relies only on what
# it sees there: the width of input and output, and one use per pass.

import re
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lens_unlearn.core.errors import ModelError, SiteError
from lens_unlearn.model.hooks import Remover, backbone, detach_all, one_thread, register
from lens_unlearn.model.host import Model, is_quantized, part_of, require_eval, require_model
from lens_unlearn.model.wrapped import plain_map

__all__ = [
    "MATRICES",
    "LinearFunction",
    "Matrix",
    "check_matrix",
    "matrix_bias",
    "matrix_names",
    "matrix_shape",
    "matrix_shapes",
    "matrix_value",
    "on_matrix",
]

MATRICES: dict[str, tuple[str, str, str]] = {
    "W_Q": ("attn", "q", "hook_q"),
    "W_K": ("attn", "k", "hook_k"),
    "W_V": ("attn", "v", "hook_v"),
    "W_O": ("attn", "o", "hook_z"),
    "W_in": ("mlp", "in", "hook_pre"),
    "W_gate": ("mlp", "gate", "hook_pre"),
    "W_out": ("mlp", "out", "hook_post"),
}
"""The matrices of a block: the part that each is in; its module in the bridge; and the hook point at its output, or at its
input for W_O and W_out. In a gated MLP, the output of W_in is at `hook_pre_linear` instead."""

_MATRIX = re.compile(r"L(\d+)\.(W_[A-Za-z]+)")


class Matrix(NamedTuple):
    """A weight matrix of a model, as a map ``[in, out]``: a layer and a name of `MATRICES`. Prints as ``L3.W_out``."""

    layer: int
    name: str

    def __repr__(self) -> str:
        return f"L{self.layer}.{self.name}"

    __str__ = __repr__

    @classmethod
    def parse(cls, text: str) -> "Matrix":
        """Read what `repr` wrote.

        Raises:
            SiteError: If the text is not ``L<layer>.<name>`` with a name of `MATRICES`.
        """
        match = _MATRIX.fullmatch(text)
        if match is None:
            raise SiteError(f"{text!r} is not a matrix: write it as 'L3.W_out', with one of {', '.join(MATRICES)}")
        return cls(int(match[1]), check_matrix(match[2]))


def check_matrix(name: str) -> str:
    """Return the name of a matrix, if it is one of `MATRICES`.

    Raises:
        SiteError: If there is no such matrix; the message names all.
    """
    if name in MATRICES:
        return name
    raise SiteError(f"there is no matrix {name!r}: choose from {', '.join(MATRICES)}")


LinearFunction = Callable[[Tensor, Tensor], Tensor]
"""Takes the input ``[*batch, in]`` and the output ``[*batch, out]`` of a linear map; returns a new output."""

_shapes: "weakref.WeakKeyDictionary[Any, dict[Matrix, tuple[Any, tuple[int, int]]]]" = weakref.WeakKeyDictionary()


def matrix_shape(model: Model, layer: int, name: str) -> tuple[int, int]:
    """Return the shape ``[in, out]`` of a matrix; heads are concatenated.

    Raises:
        SiteError: If the model does not have it, or does not compute with it as one linear map.
    """
    return matrix_shapes(model, [Matrix(layer, name)])[Matrix(layer, name)]


def matrix_shapes(model: Model, matrices: Iterable[Matrix]) -> dict[Matrix, tuple[int, int]]:
    """Find matrices, and verify with one forward pass over two tokens that each is one linear map that is used once.

    Returns:
        The shape ``[in, out]`` of each, taken from the input and output of the map, however the weights are stored.

    Raises:
        SiteError: If a matrix does not exist in this model, or is not used exactly once in a forward pass.
        ModelError: If its weights are quantized, so that they cannot be edited; if this is no TransformerLens model, it is in
            training mode, or another thread has an intervention on it, or measures it.
    """
    require_model(model)
    require_eval(model)
    wanted = list(dict.fromkeys(matrices))
    with one_thread(model):
        places = {matrix: _computed_by(model, matrix) for matrix in wanted}
        for matrix, module in places.items():
            if any(is_quantized(weight) for weight in _held(model, module, matrix.name)):
                raise ModelError(
                    f"the weights of {matrix} are quantized, and cannot be edited: load the model unquantized"
                )
        known = _shapes.setdefault(model, {})
        missing = [m for m in wanted if m not in known or known[m][0] is not places[m]]
        seen: dict[Matrix, list[tuple[int, int]]] = {matrix: [] for matrix in missing}
        removers: list[Remover] = []
        thread = threading.get_ident()

        def watch(matrix: Matrix) -> LinearFunction:
            def look(x: Tensor, y: Tensor) -> Tensor:
                if threading.get_ident() == thread:
                    seen[matrix].append((x.shape[-1], y.shape[-1]))
                return y

            return look

        try:
            try:
                for matrix in missing:
                    on_matrix(model, *matrix, watch(matrix), removers)
                if missing:
                    with torch.no_grad():
                        backbone(model, torch.zeros(1, 2, dtype=torch.long))
            finally:
                detach_all(removers)
        finally:  # as in `_probe`
            detach_all(removers)
        for matrix, shapes in seen.items():
            if len(shapes) != 1:
                raise SiteError(f"{matrix} was used {len(shapes)} times in one forward pass: it cannot be changed here")
            known[matrix] = (places[matrix], shapes[0])
        return {matrix: known[matrix][1] for matrix in wanted}


def matrix_value(model: Model, layer: int, name: str) -> Tensor:
    """Return the values of a matrix as ``[in, out]``, detached; often a view of the weights, so do not write to it.

    Raises:
        SiteError: If the model does not have it.
        ModelError: If its weights are quantized.
    """
    shape = matrix_shape(model, layer, name)
    module = _computed_by(model, Matrix(layer, name))
    if hasattr(model, "original_model"):
        weight = module.weight.detach()
        value = weight if type(module).__name__ == "Conv1D" else weight.t()
    else:
        # With grouped queries, `W_K` repeats the heads that are stored once as `_W_K`; with `ungroup_grouped_query_attention`
        # the model computes with the repeated ones. The one that has the size of the map is meant.
        held = [weight.detach() for weight in _held(model, module, name)]
        weight = next((weight for weight in held if weight.numel() == shape[0] * shape[1]), held[0])
        value = weight.transpose(0, 1).flatten(1) if name in ("W_Q", "W_K", "W_V") else weight.flatten(0, -2)
    if tuple(value.shape) != shape:
        raise SiteError(f"{Matrix(layer, name)} is stored as {tuple(weight.shape)} {weight.dtype}, not as {shape}")
    return value


def _held(model: Model, module: Any, name: str) -> list[Tensor]:
    """Return the parameters in which the module that computes with a matrix may have it."""
    if hasattr(model, "original_model"):
        return [module.weight]
    return [getattr(module, key) for key in (f"_{name}", name) if hasattr(module, key)]


def matrix_bias(model: Model, layer: int, name: str) -> Tensor | None:
    """Return the bias behind a matrix as ``[out]``, detached; None if there is none.

    Raises:
        SiteError: If the model does not have the matrix.
    """
    module = _computed_by(model, Matrix(layer, name))
    names = ("bias",) if hasattr(model, "original_model") else (f"_b{name[1:]}", f"b{name[1:]}")  # as in `matrix_value`
    held = [getattr(module, key) for key in names if getattr(module, key, None) is not None]
    return held[0].detach().flatten() if held else None


_FORKED = {
    "W_Q": ("use_split_qkv_input", "use_attn_in"),
    "W_K": ("use_split_qkv_input", "use_attn_in"),
    "W_V": ("use_split_qkv_input", "use_attn_in"),
    "W_O": ("use_attn_result",),
}
"""Options of TransformerLens under which a matrix is not one linear map, but one per head."""


def _computed_by(model: Model, matrix: Matrix) -> Any:
    """Return the module that computes with a matrix: the linear module of a bridge, else the attention or MLP itself."""
    if not 0 <= matrix.layer < int(model.cfg.n_layers):
        raise SiteError(f"{matrix} is not in this model: its layers are 0 to {int(model.cfg.n_layers) - 1}")
    part, module, _ = MATRICES[check_matrix(matrix.name)]
    for option in _FORKED.get(matrix.name, ()):
        if getattr(model.cfg, option, False):
            raise SiteError(f"{matrix} is used head by head under {option}: call model.set_{option}(False) first")
    here = matrix_names(model, matrix.layer)
    if matrix.name not in here:
        raise SiteError(f"{matrix} does not exist in this model: layer {matrix.layer} has {', '.join(here) or 'none'}")
    owner = part_of(model, matrix.layer, part)
    if owner is None:
        return plain_map(model, matrix.layer, _INSIDE[matrix.name])
    return _linear(owner, module).original_component if hasattr(model, "original_model") else owner


_INSIDE = {"W_out": "mlp.post", "W_O": "attn.z"}
"""The matrices that are known in layers that TransformerLens wraps whole, by the sites in front of them."""


def _linear(owner: Any, name: str) -> Any:
    """Return a linear module of a bridge's attention or MLP; None if there is none."""
    # In a model with experts, an MLP without any (of Jamba, LFM2, ...) has names of its own, and "gate" is the router.
    if "MoE" in type(owner).__name__:
        return getattr(owner, f"dense_{name}", None)
    return getattr(owner, name, None)


def matrix_names(model: Model, layer: int) -> list[str]:
    """Return the names of the matrices that a layer has."""
    bridged = hasattr(model, "original_model")
    names = []
    for name, (part, module, _) in MATRICES.items():
        owner = part_of(model, layer, part)
        inner = getattr(_linear(owner, module), "original_component", None) if bridged else None
        if owner is None and name in _INSIDE:
            inner = plain_map(model, layer, _INSIDE[name])
        if (getattr(inner, "weight", None) is not None) if bridged else hasattr(owner, name):
            names.append(name)
    return names


def on_matrix(
    model: Model, layer: int, name: str, function: LinearFunction, removers: list[Remover] | None = None
) -> Remover:
    """Pass the output of a linear map through a function, which also gets the map's input.

    The input is the one that the map itself gets: after all hooks at the hook points before the map, whenever they were added.
    The hook points after the map see the function's result.

    Args:
        model: The model.
        layer: The layer of the matrix.
        name: The name of the matrix.
        function: Takes the input and the output; returns a new output.
        removers: As in `attach`.

    Returns:
        The remover of the hooks.

    Raises:
        SiteError: If the model does not have the matrix.
    """
    module = _computed_by(model, Matrix(layer, name))
    part = MATRICES[name][0]
    owner = part_of(model, layer, part)
    if not hasattr(model, "original_model"):
        places = _around(module, name, function)
    elif part == "mlp" and getattr(owner, "_use_processed_weights", False) and hasattr(owner, "gate"):
        places = _between(owner, name, function)
    else:

        def run(module: Any, args: Any, kwargs: Any, y: Tensor) -> Tensor:
            return function(args[0] if args else next(iter(kwargs.values())), y)

        places = [(module, "_forward_hooks", run)]

    return register(places, removers)


def _between(owner: Any, name: str, function: LinearFunction) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return hooks for a gated MLP in compatibility mode, which computes with processed weights and not through its modules.

    The hook points before and after the weights still fire: the input is read where it leaves the one, after all other hooks
    there, and the output is replaced where it enters the other.
    """
    linear = _linear(owner, MATRICES[name][1])
    point, after_map = (linear.hook_in if name == "W_out" else owner.hook_in), linear.hook_out
    seen: list[Tensor] = []

    def look(module: Any, args: Any, kwargs: Any, x: Tensor) -> None:
        seen[:] = [x]

    def last(module: Any, args: Any, kwargs: Any) -> None:
        for key in [key for key, hook in point._forward_hooks.items() if getattr(hook, "__wrapped__", None) is look]:
            point._forward_hooks.move_to_end(key)  # after ablations that were attached since

    def change(module: Any, args: Any, kwargs: Any) -> Any:
        return ((function(seen.pop(), args[0]), *args[1:]), kwargs) if seen else None

    before, after = "_forward_pre_hooks", "_forward_hooks"
    return [(owner, before, last), (point, after, look), (after_map, before, change)]


def _around(owner: Any, name: str, function: LinearFunction) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return hooks for the attention or MLP of a `HookedTransformer`, whose linear maps are not modules.

    W_O and W_out: the input is read at the hook point before the map, and the output is that of the whole attention or MLP. All
    others: the input is that of the whole module, and the output is replaced where it enters the hook point after the map.
    """
    point = getattr(owner, MATRICES[name][2])
    if name == "W_in" and hasattr(owner, "W_gate"):
        point = owner.hook_pre_linear
    seen: list[Tensor] = []
    before, after = "_forward_pre_hooks", "_forward_hooks"

    def remember(tensor: Tensor) -> None:
        seen[:] = [tensor]

    if name in ("W_O", "W_out"):

        def look(module: Any, args: Any, kwargs: Any, x: Tensor) -> None:
            remember(x.flatten(2))

        def last(module: Any, args: Any, kwargs: Any) -> None:
            for key in [
                key for key, hook in point._forward_hooks.items() if getattr(hook, "__wrapped__", None) is look
            ]:
                point._forward_hooks.move_to_end(key)  # after ablations that were attached since

        def add(module: Any, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
            return function(seen.pop(), y) if seen else None

        return [(owner, before, last), (point, after, look), (owner, after, add)]
    argument = {"W_Q": "query_input", "W_K": "key_input", "W_V": "value_input"}.get(name, "x")

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        remember(kwargs[argument] if argument in kwargs else args["QKV".index(name[-1]) if name[-1] in "QKV" else 0])

    def change(module: Any, args: Any, kwargs: Any) -> Any:
        y = args[0]
        return ((function(seen.pop(), y.flatten(2)).reshape(y.shape), *args[1:]), kwargs) if seen else None

    return [(owner, before, enter), (point, before, change)]
