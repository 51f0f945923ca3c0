"""`Ablate`: put a fixed value in place of the activations of selected neurons, or of directions in a basis per head.

Knows selections, and how to apply one at a hook point; knows nothing of how neurons are selected, nor of what it costs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.interventions.base import (
    HookFunction,
    Intervention,
    Live,
    Parts,
)
from lens_unlearn.interventions.selections import check_shape, describe_selection, maps_in, selection_in
from lens_unlearn.interventions.update import Edit
from lens_unlearn.model.experts import EXPERT_KINDS
from lens_unlearn.model.matrices import Matrix
from lens_unlearn.model.routed import Routed, takes_routed
from lens_unlearn.model.sites import Point, Site
from lens_unlearn.neurons.maps import NeuronMap

__all__ = ["WRITES", "Ablate"]

WRITES = {"mlp.post": "W_out", "attn.z": "W_O"}
"""The matrix whose input each site is."""


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(Intervention):
    """Put a fixed value in place of the selected neurons' activations: x' = value where selected, else x.

    With value 0 at `mlp.post` this equals zeroing rows of W_out, at `attn.z` rows of W_O, and at `experts.post` columns of the
    experts' down projections. Inside routed experts the value is put at the tokens that are routed to the neuron's expert: at all
    others the neuron is not computed.

    Args:
        selection: A boolean `NeuronMap`, with at least one neuron.
        value: A number, or a `NeuronMap` of values, such as means over a retain corpus.
        basis: Optionally per attention site a matrix per head, ``[heads, d_head, d_head]``; then the selection is of
            directions in that basis: with T the matrix, x' = x + (value - x T) [selected] T^-1.

    Raises:
        SelectionError: If the selection is not boolean or empty, or the value or basis does not cover it.
    """

    kind: ClassVar[str] = "ablate"

    selection: NeuronMap
    value: float | NeuronMap = 0.0
    basis: NeuronMap | None = None

    def __post_init__(self) -> None:
        """Check the three arguments against each other."""
        if not self.selection.is_selection:
            raise SelectionError("Ablate needs a boolean map: select first, as in score.top(0.02)")
        if self.selection.count() == 0:
            raise SelectionError(
                "the selection is empty: nothing would be ablated; raise the fraction or the threshold"
            )
        for given, name in ((self.value, "value"), (self.basis, "basis")):
            if isinstance(given, NeuronMap):
                missing = [site for site in self._sites() if site not in given]
                if missing:
                    raise SelectionError(f"the {name} map has nothing at {missing[0]}, where neurons are selected")
        if isinstance(self.value, NeuronMap):
            for site in self._sites():
                if self.value[site].shape != self.selection[site].shape:
                    raise SelectionError(f"{site}: the value map has another shape than the selection")
                if not bool(torch.isfinite(self.value[site][self.selection[site]]).all()):
                    raise SelectionError(f"{site}: the value map holds NaN or infinity at a selected neuron")
        elif not torch.isfinite(torch.tensor(float(self.value))):
            raise SelectionError(f"value={self.value} is not a number to put in place of an activation")
        if self.basis is not None:
            for site in self._sites():
                _check_basis(site, self.basis[site], tuple(self.selection[site].shape))

    def _sites(self) -> list[Site]:
        return [site for site in self.selection if bool(self.selection[site].any())]

    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return one hook per site with a selected neuron."""
        return [(site, self._hook(site)) for site in self._sites()]

    def _hook(self, site: Site) -> HookFunction:
        chosen, value = self.selection[site], self._value(site)
        if self.basis is None:

            def put(x: Any, live: Live) -> Any:
                if not isinstance(x, Routed):
                    return torch.where(live.like(chosen, x), live.like(value, x), x)
                new = live.like(value, x.key)
                where = x.at_neurons(live.like(chosen, x.key))
                return x.replaced(where, float(self.value) if new.ndim == 0 else x.at_neurons(new))  # type: ignore[arg-type]

            return takes_routed(put)
        removed, offset = self._removed(site)
        return lambda x, live: x - (torch.einsum("bphi,hij->bphj", x, live.like(removed, x)) - live.like(offset, x))

    def _value(self, site: Site) -> Tensor:
        value = self.value[site] if isinstance(self.value, NeuronMap) else torch.tensor(float(self.value))
        return value.to(torch.float64)

    def _removed(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return D and c of x' = x - (x D - c) per head: D = T diag(selected) T^-1 and c = (value, selected) T^-1.

        So it is one product per head, and exactly x in a head where nothing is selected.
        """
        assert self.basis is not None
        chosen, basis = self.selection[site], self.basis[site].double()
        inverse = torch.linalg.inv(basis)
        removed = torch.einsum("hij,hj,hjk->hik", basis, chosen.double(), inverse)
        return removed, torch.einsum("hj,hjk->hk", torch.where(chosen, self._value(site), 0.0), inverse)

    def edits(self) -> Sequence[Edit]:
        """Return the rows of W_out and W_O that a mask of their input comes to, and what its values add to the biases.

        Raises:
            SelectionError: If it is not at `mlp.post` or `attn.z` alone.
        """
        elsewhere = [site for site in self._sites() if site.kind not in WRITES]
        if elsewhere:
            kind = "no change of weights that is known" if elsewhere[0].kind in EXPERT_KINDS else "no change of weights"
            raise SelectionError(f"{self!r} is {kind} at {elsewhere[0]}: ablate at {', '.join(WRITES)}")
        return [
            Edit(Matrix(site.layer, WRITES[site.kind]), self._masked(site), True, bool(self._constant(site).any()))
            for site in self._sites()
        ]

    def _constant(self, site: Site) -> Tensor:
        if self.basis is not None:
            return self._removed(site)[1]
        return torch.where(self.selection[site], self._value(site), 0.0)

    def _masked(self, site: Site) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        # With W the matrix, x' W = x (1 - D) W + c W. Where the copy's input is x + m, that is
        # (x + m) (1 - D) W + (c + m D) W - m W, of which the last is in the copy's bias already.
        def change(weights: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
            constant = self._constant(site).to(weights)
            if self.basis is None:
                chosen = self.selection[site].reshape(-1).to(weights.device)
                constant = constant.reshape(-1) + torch.where(chosen, moved, 0.0)
                return torch.where(chosen[:, None], 0.0, weights), constant @ weights
            removed = self._removed(site)[0].to(weights)
            heads, size = constant.shape
            constant = constant + torch.einsum("hi,hij->hj", moved.reshape(heads, size), removed)
            gone = torch.einsum("hij,hjo->hio", removed, weights.reshape(heads, size, -1))
            return weights - gone.reshape(weights.shape), constant.reshape(-1) @ weights

        return change

    def check(self, points: Mapping[Site, Point]) -> None:
        """Refuse a model with other numbers of neurons."""
        for site in self._sites():
            check_shape(site, self.selection.shape_of(site), points[site])

    def describe(self) -> dict[str, str]:
        """Return how many neurons of each site are ablated."""
        return describe_selection(self.selection)

    def parts(self) -> Parts:
        """Return the selection, and the values and basis where there are any."""
        header: dict[str, Any] = {
            "kind": self.kind,
            "value": "map" if isinstance(self.value, NeuronMap) else float(self.value),
        }
        tensors = {f"selection/{site}": value.to(torch.uint8) for site, value in self.selection.shaped()}
        if isinstance(self.value, NeuronMap):
            tensors |= {f"value/{site}": value for site, value in self.value.shaped() if site in self.selection}
        if self.basis is not None:
            tensors |= {f"basis/{site}": value for site, value in self.basis.items() if site in self.selection}
        return header, tensors

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Ablate":
        """Rebuild from `parts`."""
        selection = selection_in(tensors)
        basis = maps_in(tensors, "basis")
        value = NeuronMap(maps_in(tensors, "value")) if header["value"] == "map" else float(header["value"])
        return cls(selection, value, NeuronMap(basis) if basis else None)

    def __repr__(self) -> str:
        value = "means" if isinstance(self.value, NeuronMap) else "zero" if self.value == 0 else f"{self.value:g}"
        layers = len({site.layer for site in self.selection})
        basis = ", in a per-head basis" if self.basis is not None else ""
        count = f"{self.selection.count():,} of {self.selection.numel():,} neurons"
        return f"Ablate({value}, {count}, {layers} layers, {', '.join(self.selection.kinds)}{basis})"


def _check_basis(site: Site, basis: Tensor, shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or tuple(basis.shape) != (*shape, *shape[-1:]):
        raise SelectionError(f"{site}: the basis has shape {tuple(basis.shape)}, and the selection {shape}")
    if not bool(torch.isfinite(basis).all()) or bool(torch.linalg.inv_ex(basis.double()).info.any()):
        raise SelectionError(f"{site}: the basis holds a matrix that cannot be inverted")
