"""`Update`: what is added to one weight matrix, as a value outside the model; and `merge`, which writes changes into weights.

A matrix is a map from rows to columns, ``[in, out]``, as in TransformerLens: x @ W. The rows of W_out are the neurons of
`mlp.post`, and so are the columns of W_in and W_gate. W_Q is ``[d_model, heads * d_head]``, W_K and W_V are
``[d_model, kv_heads * d_head]`` (fewer heads, where queries share keys), and W_O is ``[heads * d_head, d_model]``.

Knows tensors and their shapes; knows nothing of hooks, nor of where a model keeps its matrices (`model.layouts` does).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor

from lens_unlearn.core.errors import ModelError, SelectionError
from lens_unlearn.model.host import Model
from lens_unlearn.model.layouts import add_biases, bias_view, norm_bias, require_bias, require_known, weight_view
from lens_unlearn.model.matrices import Matrix, matrix_bias, matrix_value

__all__ = ["Edit", "Update", "merge"]

Move = Callable[[Tensor, Tensor], Tensor]
"""Brings a tensor to the device and dtype of another."""


def _moved(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(device=like.device, dtype=like.dtype if tensor.is_floating_point() else tensor.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class Update:
    """What is added to one matrix: everywhere, in some rows, in some columns, or as a product of two thin matrices.

        D = value,   D[rows] = value,   D[:, columns] = value,   or   D = value @ right

    Nothing is copied, since an optimizer may hold the tensors and change them in place; but for a tensor without gradients that
    does not lie in memory row by row, with which products would be rounded otherwise than from a file.

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
            if not floats.requires_grad and not floats.is_contiguous():
                object.__setattr__(self, name, floats.contiguous())
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


class Edit(NamedTuple):
    """What an intervention comes to in the weights of one matrix, and in the bias behind it."""

    matrix: Matrix
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Takes the weights ``[in, out]``, and how far the matrix' input in their model is from that in the model of the
    intervention, ``[in]``; returns new weights, and what is added to the bias. All in float64."""
    masks: bool = False
    """Whether it masks the input. A mask is in front of every update of the matrix, however they were composed."""
    constant: bool = False
    """Whether it adds something to the bias where the inputs are the same."""


def merge(edits: Sequence[Edit], hf_model: Any, model: Model) -> Any:
    """Write edits into the weights of a plain Hugging Face model, in place, masks from the last to the first; return it.

    Raises:
        ModelError: If it is not a plain model, of an architecture whose layout is known here, or a matrix has other values than
            in `model`, or no bias that a constant could go into; then nothing was changed.
        SelectionError: If it lacks a matrix; then nothing was changed.
    """
    require_known(hf_model)
    # Every matrix is found and checked before the first is written, so that an error leaves the model as it was.
    views: dict[Matrix, Tensor] = {}
    moved: dict[Matrix, Tensor] = {}
    for matrix in dict.fromkeys(edit.matrix for edit in edits):
        views[matrix] = weight_view(hf_model, matrix)
        _require_same(matrix, hf_model, model)
        moved[matrix] = _moved_input(matrix, hf_model, model)
    constant = {edit.matrix for edit in edits if edit.constant} | {m for m, shift in moved.items() if bool(shift.any())}
    for matrix in constant:
        require_bias(hf_model, matrix)
    with torch.no_grad():
        for matrix, view in views.items():
            # Computed in float64 and rounded once, by the copy into the weights. In a half-precision model's own dtype, a
            # change would be rounded before it is added, and the sum again.
            weights = view.double().flatten(1)
            shift = weights.new_zeros(weights.shape[1])
            for edit in sorted((edit for edit in edits if edit.matrix == matrix), key=lambda edit: edit.masks):
                weights, added = edit.change(weights, moved[matrix])
                shift += added
            view.copy_(weights.reshape(view.shape))
            if matrix in constant:
                add_biases(hf_model, matrix)
                bias = bias_view(hf_model, matrix)
                assert bias is not None
                bias.copy_(bias.double() + shift.reshape(bias.shape))
    return hf_model


def _require_same(matrix: Matrix, hf_model: Any, model: Model) -> None:
    """Refuse a copy in which a matrix is another one, for which a change of it would mean something else.

    TransformerLens processes weights in compatibility mode, and when it loads a `HookedTransformer`. Of what is written to the
    residual stream, it only takes the mean, which the norms behind it do not see; the matrices that read from the stream get
    the norm's gain folded in, and the biases behind them the norm's bias.
    """
    ours, theirs = matrix_value(model, *matrix), weight_view(hf_model, matrix).flatten(1)
    if matrix.name in ("W_out", "W_O"):
        # In single precision at best, in which TransformerLens takes the mean whatever the dtype.
        eps = max(torch.finfo(dtype).eps for dtype in (torch.float32, ours.dtype, theirs.dtype))
        ours, theirs = (weights.double() - weights.double().mean(1, keepdim=True) for weights in (ours, theirs))
        same = ours.shape == theirs.shape
        same = same and bool((ours.to(theirs.device) - theirs).abs().max() <= 8 * eps * theirs.abs().max())
    else:
        same = _same(ours, theirs) and _same(*_biases(matrix, hf_model, model))
    if not same:
        raise ModelError(
            f"{matrix} is not the same in this copy as in the model: load both from the same weights, and the model as "
            "lens_unlearn.load_model does, since compatibility mode and HookedTransformer.from_pretrained change matrices"
        )


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors have equal values in the coarser one's dtype: one was loaded in another than the other."""
    coarse = max((ours.dtype, theirs.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    return ours.shape == theirs.shape and torch.equal(ours.to(theirs.device, coarse), theirs.to(coarse))


def _biases(matrix: Matrix, hf_model: Any, model: Model) -> tuple[Tensor, Tensor]:
    """Return the bias behind a matrix in the model and in the copy, zeros where there is none."""
    none = torch.zeros_like(weight_view(hf_model, matrix).flatten(1)[0])
    found = matrix_bias(model, *matrix), bias_view(hf_model, matrix)
    ours, theirs = (none if bias is None else bias.flatten().to(none.device) for bias in found)
    return ours, theirs


def _moved_input(matrix: Matrix, hf_model: Any, model: Model) -> Float[Tensor, "in"]:
    """Return how far a matrix' input in a copy is from that in the model: at `attn.z`, where biases may have been folded away.

    Attention sums to 1, so what is constant in the values is added to z as it is: the bias of the values, and what W_V makes of
    the bias of the norm before it, which is in the bias of the values where the norm is folded. Each head of keys and values
    serves several queries.
    """
    weights = weight_view(hf_model, matrix)
    if matrix.name != "W_O":
        return torch.zeros(weights.shape[0], dtype=torch.float64, device=weights.device)
    value = Matrix(matrix.layer, "W_V")
    ours, theirs = (bias.to(weights.device, torch.float64) for bias in _biases(value, hf_model, model))
    norm, values = norm_bias(hf_model, matrix.layer), weight_view(hf_model, value).flatten(1)
    moved = theirs - ours
    if norm is not None and not _same(matrix_value(model, *value), values):
        moved = moved + norm.to(moved) @ values.to(moved)
    times = weights.shape[0] // len(moved)
    return repeat(moved, "(heads d_head) -> (heads times d_head)", d_head=int(model.cfg.d_head), times=times)
