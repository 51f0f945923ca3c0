"""`Update`: what is added to one weight matrix, as a value outside the model; and `merge`, which writes updates into weights.

A matrix is a map from rows to columns, ``[in, out]``, as in TransformerLens: x @ W. The rows of W_out are the neurons of
`mlp.post`, and so are the columns of W_in and W_gate. W_Q is ``[d_model, heads * d_head]``, W_K and W_V are
``[d_model, kv_heads * d_head]`` (fewer heads, where queries share keys), and W_O is ``[heads * d_head, d_model]``.

Knows tensors and their shapes; knows nothing of hooks, nor of where a model keeps its matrices (`model.layouts` does).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.model.layouts import require_known, weight_view
from lens_unlearn.model.matrices import Matrix

__all__ = ["Update", "merge"]

Move = Callable[[Tensor, Tensor], Tensor]
"""Brings a tensor to the device and dtype of another."""


def _moved(tensor: Tensor, like: Tensor) -> Tensor:
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
            raise SelectionError(
                "an update is of rows, of columns, or a product: give at most one of rows, columns, right"
            )
        for name, floats in (("value", self.value), ("right", self.right)):
            if floats is None:
                continue
            if floats.ndim != 2 or not floats.is_floating_point():
                raise SelectionError(
                    f"an update's {name} has shape {tuple(floats.shape)}, {floats.dtype}: give a matrix of floats"
                )
            if not bool(torch.isfinite(floats.detach()).all()):
                raise SelectionError(f"an update's {name} holds NaN or infinity: give finite values")
        for axis, name in ((0, "rows"), (1, "columns")):
            index = getattr(self, name)
            if index is None:
                continue
            if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32):
                raise SelectionError(
                    f"an update's {name} have shape {tuple(index.shape)}, {index.dtype}: give a vector of their indices"
                )
            if len(index) != self.value.shape[axis]:
                raise SelectionError(
                    f"an update names {len(index)} {name}, but has values for {self.value.shape[axis]}"
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
        move: Move = _moved,
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
        """Return in words what of this update does not fit a matrix of a shape; None if it fits."""
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
        given: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in given.items() if tensor is not None}

    @property
    def kind(self) -> str:
        """Its form: "dense", "rows", "columns", or "rank"."""
        part = "rows" if self.rows is not None else "columns" if self.columns is not None else None
        return part or ("dense" if self.right is None else "rank")

    def __repr__(self) -> str:
        rows, columns = self.value.shape
        extents = {"dense": f"{rows:,} x {columns:,}", "rows": f"{rows:,} rows", "columns": f"{columns:,} columns"}
        return f"Update({extents.get(self.kind, f'rank {columns}')})"


def merge(updates: Mapping[Matrix, Update], strength: float, hf_model: Any) -> Any:
    """Add updates to the weights of a plain Hugging Face model, in place; return it.

    Raises:
        ModelError: If it is not a plain model, of an architecture whose layout is known here.
        SelectionError: If it lacks a matrix, or an update does not fit; then nothing was changed.
    """
    require_known(hf_model)
    # Every matrix is found and checked before the first is written, so that an error leaves the model as it was.
    views: dict[Matrix, Tensor] = {}
    for matrix, update in updates.items():
        view = weight_view(hf_model, matrix)
        wrong = update.misfit((view.shape[0], view[0].numel()))
        if wrong:
            raise SelectionError(f"the update of {matrix} does not fit: {wrong}")
        views[matrix] = view
    with torch.no_grad():
        for matrix, view in views.items():
            # The sum is computed in float64 and rounded once, by the copy into the weights. In a half-precision model's own
            # dtype, the change would be rounded before it is added, and the sum again.
            change = updates[matrix].dense((view.shape[0], view[0].numel())).to(view.device, torch.float64)
            view.copy_(view.double() + strength * change.reshape(view.shape))
    return hf_model
