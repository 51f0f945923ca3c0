"""`Delta`: add updates to weight matrices while a block is open, at any strength, without touching the weights.

Knows matrices by name, and `Update`; knows nothing of how updates are trained, nor of where a model keeps its weights.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.interventions.ablate import WRITES, Ablate
from lens_unlearn.interventions.base import HookFunction, Intervention, MatrixFunction, Parts
from lens_unlearn.interventions.update import Edit, Update
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.matrices import MATRICES, Matrix, check_matrix, matrix_value
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.maps import NeuronMap

__all__ = ["Delta"]


@dataclass(frozen=True, eq=False, repr=False)
class Delta(Intervention):
    """Add updates to weight matrices: each x W becomes x (W + strength D).

    The weights stay as they are; x D is added where x W is computed. So a delta sees what the weights see: the input behind
    every mask, whatever the order in which they were attached or composed. Several deltas on one matrix add. Under
    `enable_compatibility_mode()` the matrices are the processed ones, which the model then has.

    The tensors may be leaves that need gradients, and may change in place between forward passes.

    Args:
        updates: What is added to which matrix, as in ``{Matrix(3, "W_out"): Update(value, rows)}``.
        strength: Times every update; 0 is the model as it was, bit for bit.

    Raises:
        SelectionError: If there is no update, or the strength is not finite.
        SiteError: If a name is not one of a matrix.
    """

    kind: ClassVar[str] = "delta"

    updates: Mapping[Matrix, Update]
    strength: float = 1.0
    record: Mapping[str, Any] = field(default_factory=dict)
    """How it was trained, in what JSON can hold; stored in the file."""

    def __post_init__(self) -> None:
        """Check the arguments, and put the matrices in order."""
        given = {
            Matrix.parse(key) if isinstance(key, str) else Matrix(int(key[0]), check_matrix(key[1])): update
            for key, update in self.updates.items()
        }
        for matrix, update in given.items():
            if not isinstance(update, Update):
                raise SelectionError(f"{matrix} is given a {type(update).__name__}: write it as Update(values)")
        if not any(update.value.numel() for update in given.values()):
            raise SelectionError("nothing would be changed: a Delta needs an update of one matrix at least")
        if not math.isfinite(self.strength):
            raise SelectionError(f"strength={self.strength} is not a number to multiply weights with")
        order = list(MATRICES)
        ordered = sorted(given, key=lambda matrix: (matrix.layer, order.index(matrix.name)))
        object.__setattr__(self, "updates", {matrix: given[matrix] for matrix in ordered})

    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return none: it acts on matrices."""
        return ()

    def matrices(self) -> Sequence[tuple[Matrix, MatrixFunction]]:
        """Return one change per matrix."""
        return [(matrix, self._change(update)) for matrix, update in self.updates.items()]

    def _change(self, update: Update) -> MatrixFunction:
        if self.strength == 0:
            return lambda x, y, live: y
        return lambda x, y, live: update.apply(x, y, self.strength, live.like)

    def check_matrices(self, shapes: Mapping[Matrix, tuple[int, int]]) -> None:
        """Refuse a model with matrices of another shape."""
        for matrix, update in self.updates.items():
            wrong = update.misfit(shapes[matrix])
            if wrong:
                raise SelectionError(f"the update of {matrix} does not fit: {wrong}")

    def at(self, strength: float) -> "Delta":
        """Return the same updates at another strength."""
        return replace(self, strength=float(strength))

    def __mul__(self, factor: float) -> "Delta":
        """Return the same updates, so many times as strong."""
        return self.at(self.strength * factor)

    __rmul__ = __mul__

    def __neg__(self) -> "Delta":
        """Return the updates subtracted."""
        return self * -1

    def edits(self) -> Sequence[Edit]:
        """Return the updates, to be added to the weights."""
        return [Edit(matrix, self._added(update)) for matrix, update in self.updates.items()]

    def _added(self, update: Update) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        def change(weights: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
            added = self.strength * update.detach().dense((weights.shape[0], weights.shape[1])).to(weights)
            return weights + added, -moved @ added

        return change

    @classmethod
    def from_ablation(cls, ablation: Ablate, model: Model) -> "Delta":
        """Write an ablation to zero as an update, -W at the rows of the ablated neurons.

        Raises:
            SelectionError: If it is of another value, in a basis, or not at `mlp.post` or `attn.z` alone.
        """
        require_model(model)
        elsewhere = [site for site in ablation._sites() if site.kind not in WRITES]
        if elsewhere or isinstance(ablation.value, NeuronMap) or ablation.value != 0 or ablation.basis is not None:
            raise SelectionError(f"{ablation!r} is no change of weights: ablate to value 0 at {', '.join(WRITES)}")
        updates = {}
        for site in ablation._sites():
            rows = ablation.selection[site].reshape(-1).nonzero()[:, 0]
            matrix = Matrix(site.layer, WRITES[site.kind])
            weights = matrix_value(model, *matrix)
            updates[matrix] = Update(-weights[rows.to(weights.device)], rows)
        return cls(updates)

    def describe(self) -> dict[str, str]:
        """Return the update of each matrix, in words."""
        return {str(matrix): repr(update) for matrix, update in self.updates.items()}

    def parts(self) -> Parts:
        """Return the tensors of every update, not copied."""
        tensors = {
            f"{matrix}/{name}": tensor.detach()
            for matrix, update in self.updates.items()
            for name, tensor in update.tensors().items()
        }
        return {"kind": self.kind, "strength": self.strength, "record": dict(self.record)}, tensors

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Delta":
        """Rebuild from `parts`."""
        by_matrix: dict[Matrix, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            matrix, _, name = key.partition("/")
            by_matrix.setdefault(Matrix.parse(matrix), {})[name] = tensor
        updates = {matrix: Update(**parts) for matrix, parts in by_matrix.items()}
        return cls(updates, float(header["strength"]), dict(header.get("record", {})))

    def __repr__(self) -> str:
        counts: dict[str, int | None] = {}  # rows or columns over all layers, by what they are of
        for matrix, update in self.updates.items():
            forms = {"rows": f"rows of {matrix.name}", "columns": f"columns of {matrix.name}", "dense": matrix.name}
            form = forms.get(update.kind, f"{matrix.name} of rank {update.value.shape[1]}")
            index = getattr(update, update.kind, None) if update.kind in ("rows", "columns") else None
            counts[form] = None if index is None else (counts.get(form) or 0) + len(index)
        shown = ", ".join(form if count is None else f"{count:,} {form}" for form, count in counts.items())
        size = sum(t.numel() * t.element_size() for u in self.updates.values() for t in u.tensors().values())
        matrices = f"{len(self.updates):,} {'matrix' if len(self.updates) == 1 else 'matrices'}"
        return f"Delta(strength {self.strength:g}, {matrices}, {shown}, {size / 1e6:.1f} MB)"
