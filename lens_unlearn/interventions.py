"""Interventions: frozen values that become hooks for the length of a `with` block.

    prune = Ablate(score.top(0.02))
    with prune.on(model):
        model.generate("def fib(n):")

Nothing is written into the model. An intervention keeps no state of a run: what belongs to one lives on the `Live`
object that `on` yields. Each hook takes a tensor and returns a new one of the same shape, dtype and device.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lens_unlearn import artefacts
from lens_unlearn.errors import ArtefactError, SelectionError
from lens_unlearn.maps import NeuronMap
from lens_unlearn.models import fingerprint
from lens_unlearn.sites import Model, Point, Site, attach, detach_all, resolve

__all__ = ["Ablate", "Chain", "Intervention", "Live", "load_intervention"]

HookFunction = Callable[[Tensor, "Live"], Tensor]
Parts = tuple[dict[str, Any], dict[str, Tensor]]


class Live:
    """One intervention acting on one model: yielded by `Intervention.on`, dead after the block."""

    def __init__(self, intervention: "Intervention", model: Model) -> None:
        self.intervention = intervention
        self.model = model
        self.active = True
        self._moved: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def like(self, tensor: Tensor, activation: Tensor) -> Tensor:
        """Return a constant of the intervention on an activation's device; floating ones also in its dtype."""
        dtype = activation.dtype if tensor.is_floating_point() else tensor.dtype
        key = (id(tensor), activation.device, dtype)
        if key not in self._moved:
            self._moved[key] = (tensor, tensor.to(device=activation.device, dtype=dtype))  # keeps the id taken
        return self._moved[key][1]

    def __repr__(self) -> str:
        return f"Live({self.intervention!r}, {'acting' if self.active else 'ended'})"


class Intervention(ABC):
    """A removable change of a model's computation. Subclasses are frozen dataclasses."""

    @abstractmethod
    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return where to act, and what to do with the tensor there."""

    @abstractmethod
    def parts(self) -> Parts:
        """Return what a file keeps of this intervention: a header with its "kind", and tensors."""

    def check(self, points: Mapping[Site, Point]) -> None:  # noqa: B027 - most have nothing to check
        """Refuse a model whose sites have other shapes; called before any hook is added."""

    def __add__(self, other: "Intervention") -> "Chain":
        """Compose: the left one acts first, as if its block were the outer one."""
        if not isinstance(other, Intervention):
            return NotImplemented
        return Chain((*_members(self), *_members(other)))

    @contextmanager
    def on(self, model: Model) -> Iterator[Live]:
        """Attach to a model for the length of a `with` block.

        Every site is resolved before the first hook is added. Leaving the block, in whatever way, removes exactly the
        hooks that were added here; blocks may nest, repeat, and close in any order; a user's own hooks are untouched.

        Raises:
            SiteError: If the model lacks a site, or has another number of neurons there.
            ModelError: If the model is in training mode.
        """
        hooks = list(self.hooks())
        points = resolve(model, [site for site, _ in hooks]) if hooks else {}
        self.check(points)
        live = Live(self, model)
        removers: list[Callable[[], bool]] = []
        try:
            for site, function in hooks:
                removers.append(attach(points[site].hook, lambda t, f=function: f(t, live)))
            yield live
        finally:
            live.active = False
            live._moved.clear()
            detach_all(removers)

    def save(self, path: str | os.PathLike[str], model: Model | None = None, *, note: str = "") -> None:
        """Write a safetensors file with a header and a checksum.

        Args:
            path: Where to.
            model: If given, the file will refuse every other model.
            note: Free text kept in the header.
        """
        header, tensors = self.parts()
        content: dict[str, Any] = {"intervention": header, "text": repr(self), "note": note}
        if model is not None:
            content["model"] = fingerprint(model)
        artefacts.write(path, "intervention", tensors, content)


def _members(intervention: Intervention) -> tuple[Intervention, ...]:
    return intervention.members if isinstance(intervention, Chain) else (intervention,)


@dataclass(frozen=True, eq=False, repr=False)
class Chain(Intervention):
    """Several interventions, acting in order. ``Chain(())`` does nothing."""

    members: tuple[Intervention, ...] = ()

    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return the members' hooks, in order."""
        return [hook for member in self.members for hook in member.hooks()]

    def check(self, points: Mapping[Site, Point]) -> None:
        """Let every member check."""
        for member in self.members:
            member.check(points)

    def parts(self) -> Parts:
        """Return the members' headers, and their tensors under their number."""
        headers, tensors = [], {}
        for number, member in enumerate(self.members):
            header, own = member.parts()
            headers.append(header)
            tensors |= {f"{number}/{name}": tensor for name, tensor in own.items()}
        return {"kind": "chain", "members": headers}, tensors

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.members)) if self.members else "Chain(nothing)"


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(Intervention):
    """Put a fixed value in place of the selected neurons' activations: x' = value where selected, else x.

    With value 0 at `mlp.post` this equals zeroing rows of W_out, at `attn.z` rows of W_O.

    Args:
        selection: A boolean `NeuronMap`, with at least one neuron.
        value: A number, or a `NeuronMap` of values, such as means over a retain corpus.
        basis: Optionally per attention site a matrix per head, ``[heads, d_head, d_head]``; then the selection is of
            directions in that basis: with T the matrix, x' = x + (value - x T) [selected] T^-1.

    Raises:
        SelectionError: If the selection is not boolean or empty, or the value or basis does not cover it.
    """

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
                lacking = [site for site in self._sites() if site not in given]
                if lacking:
                    raise SelectionError(f"the {name} map has nothing at {lacking[0]}, where neurons are selected")
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
        chosen = self.selection[site]
        value = self.value[site] if isinstance(self.value, NeuronMap) else torch.tensor(float(self.value))
        value = value.to(torch.float64)
        if self.basis is None:
            return lambda x, live: torch.where(live.like(chosen, x), live.like(value, x), x)
        forward = self.basis[site].double()
        # x' = x - (x D - c) with D = T diag(selected) T^-1 and c = (value, selected) T^-1: one product per head, and
        # exactly x in a head where nothing is selected.
        inverse = torch.linalg.inv(forward)
        drop = torch.einsum("hij,hj,hjk->hik", forward, chosen.double(), inverse)
        offset = torch.einsum("hj,hjk->hk", torch.where(chosen, value, 0.0), inverse)
        return lambda x, live: x - (torch.einsum("bphi,hij->bphj", x, live.like(drop, x)) - live.like(offset, x))

    def check(self, points: Mapping[Site, Point]) -> None:
        """Refuse a model with other numbers of neurons."""
        for site in self._sites():
            check_shape(site, tuple(self.selection[site].shape), points[site])

    def parts(self) -> Parts:
        """Return the selection, and the values and basis where there are any."""
        header: dict[str, Any] = {
            "kind": "ablate",
            "value": "map" if isinstance(self.value, NeuronMap) else float(self.value),
        }
        tensors = {f"selection/{site}": value.to(torch.uint8) for site, value in self.selection.items()}
        if isinstance(self.value, NeuronMap):
            tensors |= {f"value/{site}": value for site, value in self.value.items() if site in self.selection}
        if self.basis is not None:
            tensors |= {f"basis/{site}": value for site, value in self.basis.items() if site in self.selection}
        return header, tensors

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Ablate":
        """Rebuild from `parts`."""
        flags = maps_in(tensors, "selection")
        for site, value in flags.items():
            if value.dtype != torch.uint8 or bool((value > 1).any()):
                raise SelectionError(f"{site}: a selection holds something other than 0 and 1")
        selection = NeuronMap({site: value.bool() for site, value in flags.items()})
        basis = maps_in(tensors, "basis")
        value = NeuronMap(maps_in(tensors, "value")) if header["value"] == "map" else float(header["value"])
        return cls(selection, value, NeuronMap(basis) if basis else None)

    def __repr__(self) -> str:
        what = "means" if isinstance(self.value, NeuronMap) else "zero" if self.value == 0 else f"{self.value:g}"
        layers = len({site.layer for site in self.selection})
        basis = ", in a per-head basis" if self.basis is not None else ""
        count = f"{self.selection.count():,} of {self.selection.numel():,} neurons"
        return f"Ablate({what}, {count}, {layers} layers, {', '.join(self.selection.kinds)}{basis})"


def _check_basis(site: Site, basis: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(basis.shape) != (*shape, *shape[-1:]):
        raise SelectionError(f"{site}: the basis has shape {tuple(basis.shape)}, and the selection {shape}")
    if not bool(torch.isfinite(basis).all()) or bool(torch.linalg.inv_ex(basis.double()).info.any()):
        raise SelectionError(f"{site}: the basis holds a matrix that cannot be inverted")


def check_shape(site: Site, shape: tuple[int, ...], point: Point) -> None:
    """Refuse a site of another shape.

    Raises:
        SelectionError: Naming both shapes.
    """
    if shape != point.shape:
        raise SelectionError(
            f"{site} has neurons of shape {point.shape} in this model, and {shape} in the intervention"
        )


def maps_in(tensors: Mapping[str, Tensor], prefix: str) -> dict[Site, Tensor]:
    """Read the tensors ``prefix/site`` of a file."""
    return {Site.parse(n.removeprefix(f"{prefix}/")): t for n, t in tensors.items() if n.startswith(f"{prefix}/")}


def load_intervention(path: str | os.PathLike[str], model: Model | None = None) -> Intervention:
    """Read an intervention that `save` wrote.

    Args:
        path: The file.
        model: Where it is to be used; if the file knows its model, this has to be the same.

    Raises:
        ArtefactError: If the file is damaged, not ours, or made with another model; the message names what differs.
    """
    header, tensors = artefacts.read(path, "intervention")
    if model is not None and "model" in header:
        artefacts.require_same(path, header["model"], fingerprint(model), "this model")
    try:
        return _from_parts(header["intervention"], tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ArtefactError(f"{path} holds no intervention that can be used: {error}") from error


def _from_parts(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Intervention:
    if header["kind"] == "chain":
        members = []
        for number, member in enumerate(header["members"]):
            prefix = f"{number}/"
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            members.append(_from_parts(member, own))
        return Chain(tuple(members))
    kinds = {"ablate": Ablate}
    if header["kind"] not in kinds:
        raise ArtefactError(f"{header['kind']!r} is not a kind of intervention this version knows: upgrade to read it")
    return kinds[header["kind"]].from_parts(header, tensors)
