"""`Reroute`: let routers choose among the other experts.

Knows the logits of routers; knows nothing of what the experts compute.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.interventions.base import HookFunction, Intervention, Live, Parts
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.sites import Point, Site, resolve
from lens_unlearn.neurons.maps import NeuronMap

__all__ = ["Experts", "Reroute", "whole_experts"]

Experts = Mapping[int, Iterable[int]] | Iterable[str]
"""By layer the numbers of experts, or their names, such as "L3.experts[17]"."""

_EXPERT = re.compile(r"L(\d+)\.experts\[(\d+)\]")


@dataclass(frozen=True, eq=False, repr=False)
class Reroute(Intervention):
    """Let routers never choose some experts: their logits become minus infinity, so that other experts take over.

    It equals a router without rows for them. An `Ablate` of all their neurons (`whole_experts`) is another thing: there the router
    goes on choosing them, and nothing takes their place.

    Args:
        experts: Which, by layer or by name.

    Raises:
        SelectionError: If none is named, or one of the names is none.

    Examples:
        >>> Reroute({3: [17, 4]})
        Reroute(L3.experts[4], L3.experts[17])
    """

    kind: ClassVar[str] = "reroute"

    experts: Experts

    def __post_init__(self) -> None:
        """Keep the experts by layer."""
        object.__setattr__(self, "experts", by_layer(self.experts))

    @property
    def _by_layer(self) -> dict[int, tuple[int, ...]]:
        return self.experts  # type: ignore[return-value]

    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return one hook per layer."""
        return [(Site(layer, "experts.router"), self._hook(chosen)) for layer, chosen in self._by_layer.items()]

    def _hook(self, chosen: tuple[int, ...]) -> HookFunction:
        def close(logits: Tensor, live: Live) -> Tensor:
            return logits.index_fill(-1, torch.tensor(chosen, device=logits.device), -torch.inf)

        return close

    def check(self, points: Mapping[Site, Point]) -> None:
        """Refuse experts that a model does not have, and so many that too few are left."""
        for layer, chosen in self._by_layer.items():
            point = points[Site(layer, "experts.router")]
            (count,) = point.shape
            _require_experts(layer, chosen, count)
            if count - len(chosen) < point.top_k:
                raise SelectionError(
                    f"of {count} experts in layer {layer}, {count - len(chosen)} are left, and a token is routed to {point.top_k}: "
                    "reroute fewer"
                )

    def describe(self) -> dict[str, str]:
        """Return which experts of each layer are not chosen."""
        return {
            f"L{layer}.experts.router": f"never chosen: {', '.join(map(str, chosen))}"
            for layer, chosen in self._by_layer.items()
        }

    def parts(self) -> Parts:
        """Return the numbers of the experts by layer."""
        return {"kind": self.kind, "experts": {str(layer): list(c) for layer, c in self._by_layer.items()}}, {}

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Reroute":
        """Rebuild from `parts`."""
        return cls({int(layer): chosen for layer, chosen in header["experts"].items()})

    def __repr__(self) -> str:
        names = [f"L{layer}.experts[{number}]" for layer, chosen in self._by_layer.items() for number in chosen]
        return f"Reroute({', '.join(names[:8])}{f', and {len(names) - 8} more' if len(names) > 8 else ''})"


def whole_experts(model: Model, experts: Experts, site: str = "experts.post") -> NeuronMap:
    """Select every neuron of some experts.

    Args:
        model: The model.
        experts: Which, by layer or by name, such as "L3.experts[17]".
        site: A kind of site inside routed experts.

    Returns:
        A boolean map of the layers that are named.

    Raises:
        SelectionError: If none is named, or an expert does not exist.
        SiteError: If a layer has no routed experts.

    Examples:
        >>> whole_experts(model, ["L3.experts[17]"])  # doctest: +SKIP
        NeuronMap(768 of 98,304 neurons, 1 layer, experts.post)
    """
    require_model(model)
    wanted = by_layer(experts)
    points = resolve(model, [Site(layer, site) for layer in wanted])
    selected = {}
    for place, point in points.items():
        if not point.experts:
            raise SelectionError(f"site={site!r} is not inside routed experts: take experts.post")
        _require_experts(place.layer, wanted[place.layer], point.experts)
        mask = torch.zeros(point.experts, point.shape[0] // point.experts, dtype=torch.bool)
        mask[list(wanted[place.layer])] = True
        selected[place] = mask
    return NeuronMap(selected)


def by_layer(experts: Experts) -> dict[int, tuple[int, ...]]:
    """Sort experts by layer and number.

    Raises:
        SelectionError: If there is none, or one is not named as an expert is.
    """
    pairs: set[tuple[int, int]] = set()
    if isinstance(experts, Mapping):
        for layer, given in experts.items():
            numbers = [given] if isinstance(given, int) else list(given)
            if not all(type(number) is int and number >= 0 for number in (layer, *numbers)):
                raise SelectionError(f"experts={{{layer!r}: {given!r}}} are no experts: give whole numbers by layer")
            pairs |= {(int(layer), number) for number in numbers}
    else:
        for name in [experts] if isinstance(experts, str) else list(experts):
            match = _EXPERT.fullmatch(name) if isinstance(name, str) else None
            if match is None:
                raise SelectionError(f"{name!r} names no expert: write it as 'L3.experts[17]', or give {{3: [17]}}")
            pairs.add((int(match[1]), int(match[2])))
    if not pairs:
        raise SelectionError("no expert was named: write it as 'L3.experts[17]', or give {3: [17]}")
    layers = sorted({layer for layer, _ in pairs})
    return {layer: tuple(sorted(number for n, number in pairs if n == layer)) for layer in layers}


def _require_experts(layer: int, chosen: tuple[int, ...], count: int) -> None:
    if chosen[-1] >= count:
        raise SelectionError(
            f"there is no L{layer}.experts[{chosen[-1]}]: that layer has {count} experts, 0 to {count - 1}"
        )
