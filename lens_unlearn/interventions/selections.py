"""What interventions on selected neurons have in common: shapes, words, and how a file holds maps.

Knows neuron maps and points; knows nothing of what is done to the neurons.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.model.sites import Point, Site
from lens_unlearn.neurons.maps import NeuronMap

__all__ = ["check_shape", "describe_selection", "maps_in", "selection_in"]


def check_shape(site: Site, shape: tuple[int, ...], point: Point) -> None:
    """Refuse a site of another shape: inside routed experts ``(experts, columns)``, or the number of neurons where it is not known.

    Raises:
        SelectionError: Naming both shapes.
    """
    if shape == point.shape:
        return
    ours, theirs = f"neurons of shape {point.shape}", str(shape)
    if point.experts:
        columns = point.shape[0] // point.experts
        if shape == (point.experts, columns):
            return
        ours = f"{point.experts} experts of {columns} neurons"
        theirs = f"{shape[0]} experts of {shape[1]}" if len(shape) == 2 else f"{math.prod(shape):,} neurons"
    raise SelectionError(f"{site} has {ours} in this model, and {theirs} in the intervention")


def describe_selection(selection: NeuronMap) -> dict[str, str]:
    """Return how many neurons of each site a selection has, of those sites that have any."""
    return {
        str(site): f"{int(chosen.sum()):,} of {chosen.numel():,} neurons"
        for site, chosen in selection.items()
        if bool(chosen.any())
    }


def maps_in(tensors: Mapping[str, Tensor], prefix: str) -> dict[Site, Tensor]:
    """Read the tensors ``prefix/site`` of a file."""
    return {Site.parse(n.removeprefix(f"{prefix}/")): t for n, t in tensors.items() if n.startswith(f"{prefix}/")}


def selection_in(tensors: Mapping[str, Tensor]) -> NeuronMap:
    """Read the selection of a file."""
    flags = maps_in(tensors, "selection")
    for site, value in flags.items():
        if value.dtype != torch.uint8 or bool((value > 1).any()) or value.ndim not in (1, 2):
            raise SelectionError(f"{site}: a selection holds something other than 0 and 1 for each neuron")
    return NeuronMap({site: value.bool() for site, value in flags.items()})
