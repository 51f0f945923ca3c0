"""Updates of weight matrices that live outside the model: `Update`, the value of one.

A matrix is a map from rows to columns, ``[in, out]``, as in TransformerLens: x @ W. The rows of W_out are the neurons of
`mlp.post`, and so are the columns of W_in and W_gate. W_Q is ``[d_model, heads * d_head]``, W_K and W_V are
``[d_model, kv_heads * d_head]`` (fewer heads, where queries share keys), and W_O is ``[heads * d_head, d_model]``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_unlearn.core.errors import ModelError, SelectionError
from lens_unlearn.model.host import is_wrapped
from lens_unlearn.model.matrices import Matrix

__all__ = ["Matrix", "Update", "merge"]

Move = Callable[[Tensor, Tensor], Tensor]
"""Brings a tensor to the device and dtype of another."""


def _plainly(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(device=like.device, dtype=like.dtype if tensor.is_floating_point() else tensor.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class Update:
    """What is added to one matrix: everywhere, in some rows, in some columns, or as a product of two thin matrices.

        D = value,   D[rows] = value,   D[:, columns] = value,   or   D = value @ right

    Nothing is copied: an optimizer may hold the tensors and change them in place.

    Args:
        value: ``[in, out]``; ``[rows, out]`` with `rows`; ``[in, columns]`` with `columns`; ``[in, rank]`` with `right`.
        rows: Which rows, without repeats.
        columns: Which columns, without repeats.
        right: ``[rank, out]``.

    Raises:
        SelectionError: If the tensors do not fit one another, or a value is NaN or infinite.
    """

    value: Float[Tensor, "a b"]
    rows: Int[Tensor, "a"] | None = None
    columns: Int[Tensor, "b"] | None = None
    right: Float[Tensor, "b out"] | None = None

    def __post_init__(self) -> None:
        """Check the tensors against each other."""
        if sum(part is not None for part in (self.rows, self.columns, self.right)) > 1:
            raise SelectionError("an update is of rows, of columns, or a product: give one of rows, columns, right")
        for name, floats in (("value", self.value), ("right", self.right)):
            if floats is None:
                continue
            if floats.ndim != 2 or not floats.is_floating_point():
                raise SelectionError(
                    f"an update's {name} has shape {tuple(floats.shape)}, {floats.dtype}: it is a matrix"
                )
            if not bool(torch.isfinite(floats.detach()).all()):
                raise SelectionError(f"an update's {name} holds NaN or infinity")
        for axis, name in ((0, "rows"), (1, "columns")):
            index = getattr(self, name)
            if index is None:
                continue
            if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32):
                raise SelectionError(f"an update's {name} are their numbers, not {tuple(index.shape)} {index.dtype}")
            if len(index) != self.value.shape[axis]:
                raise SelectionError(
                    f"an update names {len(index)} {name}, and has values for {self.value.shape[axis]}"
                )
            if len(index) != len(index.unique()) or bool((index < 0).any()):
                raise SelectionError(f"an update names one of its {name} twice, or a negative one")
        if self.right is not None and self.right.shape[0] != self.value.shape[1]:
            raise SelectionError(
                f"an update of {tuple(self.value.shape)} times {tuple(self.right.shape)} is no product"
            )

    def apply(
        self,
        x: Float[Tensor, "*batch in"],
        y: Float[Tensor, "*batch out"],
        strength: float = 1.0,
        move: Move = _plainly,
    ) -> Float[Tensor, "*batch out"]:
        """Return y + strength x D, with gradients for x, y and the values.

        Args:
            x: The matrix' input.
            y: What the matrix made of it.
            strength: Times the update.
            move: How the tensors get to the input's device and dtype.
        """
        value = move(self.value, x)
        if self.rows is not None:
            change = x.index_select(-1, move(self.rows, x)) @ value
        else:
            change = x @ value
            if self.right is not None:
                change = change @ move(self.right, x)
        change = (change if strength == 1 else change * strength).to(y)
        return y + change if self.columns is None else y.index_add(-1, move(self.columns, y), change)

    def dense(self, shape: tuple[int, int]) -> Float[Tensor, "in out"]:
        """Return the update as a matrix of a shape, with gradients for the values."""
        zero = torch.zeros(shape, dtype=self.value.dtype, device=self.value.device)
        if self.rows is not None:
            return zero.index_copy(0, self.rows.to(zero.device), self.value)
        if self.columns is not None:
            return zero.index_copy(1, self.columns.to(zero.device), self.value)
        return self.value if self.right is None else self.value @ self.right

    def misfit(self, shape: tuple[int, int]) -> str | None:
        """Say what of this update does not fit a matrix of a shape; None if it fits."""
        rows, columns = self.value.shape[0], (self.value if self.right is None else self.right).shape[1]
        for axis, (name, size) in enumerate((("rows", rows), ("columns", columns))):
            index = getattr(self, name)
            if index is not None and len(index) and int(index.max()) >= shape[axis]:
                return f"one of its {name} is {int(index.max())}, and the last in this model is {shape[axis] - 1}"
            if index is None and size != shape[axis]:
                return f"it has {size} {name}, and the matrix {shape[axis]} in this model"
        return None

    def detach(self) -> "Update":
        """Return the update as it is now: a copy, without gradients."""
        return replace(self, **{name: tensor.detach().clone() for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors there are, by name."""
        given: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: tensor for name, tensor in given.items() if tensor is not None}

    @property
    def kind(self) -> str:
        """What it is of: "dense", "rows", "columns", or "rank"."""
        named = "rows" if self.rows is not None else "columns" if self.columns is not None else None
        return named or ("dense" if self.right is None else "rank")

    def __repr__(self) -> str:
        rows, columns = self.value.shape
        told = {"dense": f"{rows:,} x {columns:,}", "rows": f"{rows:,} rows", "columns": f"{columns:,} columns"}
        return f"Update({told.get(self.kind, f'rank {columns}')})"


_SPLIT = {"W_Q": "self_attn.q_proj", "W_K": "self_attn.k_proj", "W_V": "self_attn.v_proj", "W_O": "self_attn.o_proj"}
_GATED = {"W_gate": "mlp.gate_proj", "W_in": "mlp.up_proj", "W_out": "mlp.down_proj"}
_LLAMA = {**_SPLIT, **_GATED}
_LAYOUTS: dict[str, tuple[str, dict[str, str]]] = {
    "gpt2": (
        "h",
        {
            **dict.fromkeys(("W_Q", "W_K", "W_V"), "attn.c_attn"),
            **{"W_O": "attn.c_proj", "W_in": "mlp.c_fc", "W_out": "mlp.c_proj"},
        },
    ),
    "gpt_neox": (
        "layers",
        {
            **dict.fromkeys(("W_Q", "W_K", "W_V"), "attention.query_key_value"),
            **{"W_O": "attention.dense", "W_in": "mlp.dense_h_to_4h", "W_out": "mlp.dense_4h_to_h"},
        },
    ),
    "opt": ("decoder.layers", {**_SPLIT, "W_O": "self_attn.out_proj", "W_in": "fc1", "W_out": "fc2"}),
    "phi3": (
        "layers",
        {
            **dict.fromkeys(("W_Q", "W_K", "W_V"), "self_attn.qkv_proj"),
            **dict.fromkeys(("W_gate", "W_in"), "mlp.gate_up_proj"),
            **{"W_O": "self_attn.o_proj", "W_out": "mlp.down_proj"},
        },
    ),
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), ("layers", _LLAMA)),
}
"""For each `model_type` of Hugging Face: where its base model has the list of blocks, and a block its matrices."""


def merge(updates: Mapping[Matrix, Update], strength: float, hf_model: Any) -> Any:
    """Add updates to the weights of a plain Hugging Face model, in place; return it.

    Raises:
        ModelError: If it is not a plain model, of an architecture whose layout is known here.
        SelectionError: If it lacks a matrix, or an update does not fit; then nothing was changed.
    """
    kind = str(getattr(getattr(hf_model, "config", None), "model_type", None))
    if is_wrapped(hf_model):
        raise ModelError(
            f"this {type(hf_model).__name__} belongs to TransformerLens, which cannot be saved as a Hugging Face model: load a "
            "plain copy with transformers, and merge into that"
        )
    if kind not in _LAYOUTS or not isinstance(hf_model, torch.nn.Module):
        raise ModelError(
            f"a {type(hf_model).__name__} of type {kind!r} cannot be merged into: known are {', '.join(_LAYOUTS)}"
        )
    path, names = _LAYOUTS[kind]
    blocks: Any = hf_model.base_model.get_submodule(path)  # pyright: ignore[reportAttributeAccessIssue,reportCallIssue]
    views: dict[Matrix, Tensor] = {}
    for matrix, update in updates.items():
        if not 0 <= matrix.layer < len(blocks) or matrix.name not in names:
            raise SelectionError(
                f"{matrix} is not in this model: it has {', '.join(names)} in layers 0 to {len(blocks) - 1}"
            )
        view = _part(blocks[matrix.layer].get_submodule(names[matrix.name]), kind, matrix.name, hf_model.config)
        wrong = update.misfit((view.shape[0], view[0].numel()))
        if wrong:
            raise SelectionError(f"the update of {matrix} does not fit: {wrong}")
        views[matrix] = view
    with torch.no_grad():
        for matrix, view in views.items():
            change = updates[matrix].dense((view.shape[0], view[0].numel())).to(view.device, torch.float64)
            view.copy_(view.double() + strength * change.reshape(view.shape))  # rounded once
    return hf_model


def _part(module: Any, kind: str, name: str, config: Any) -> Tensor:
    """Return where a matrix lies in the weights of a module: a view ``[in, *out]``."""
    weight = module.weight.detach()
    if not weight.is_floating_point() or weight.ndim != 2:
        raise ModelError(f"the weights of {name} are quantized: load the model unquantized, and merge into that")
    rows = weight if type(module).__name__ == "Conv1D" else weight.t()
    if kind == "phi3" and name in ("W_gate", "W_in"):
        return rows.chunk(2, dim=1)[name == "W_in"]
    if kind not in ("gpt2", "gpt_neox", "phi3") or name not in ("W_Q", "W_K", "W_V"):
        return rows
    which, heads = "QKV".index(name[-1]), config.num_attention_heads
    if kind == "gpt2":
        return rows.chunk(3, dim=1)[which]
    if kind == "gpt_neox":
        return rows.unflatten(1, (heads, 3, -1))[:, :, which]
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return rows.split([head * heads, head * config.num_key_value_heads, head * config.num_key_value_heads], dim=1)[
        which
    ]
