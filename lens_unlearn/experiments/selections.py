"""Which neurons an intervention acts on, named so that those of several methods can be compared.

Knows kinds of interventions; knows nothing of which method chose them.
"""

import torch
from torch import Tensor

from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.interventions.base import Intervention, Limited
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.model.experts import EXPERT_KINDS
from lens_unlearn.model.host import Model
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons.maps import NeuronMap

__all__ = ["at_keys", "neurons_of", "selection_of"]


def selection_of(edit: Intervention, model: Model | None = None) -> NeuronMap | None:
    """Mark the neurons that an intervention acts on, MLP neurons at their keys; None for what selects none.

    Args:
        edit: The intervention.
        model: Its model; needed for a `Delta`, which does not say how many neurons there are.
    """
    if isinstance(edit, Limited):
        return selection_of(edit.inner, model)
    if isinstance(edit, Ablate | Adjust):
        return at_keys(edit.selection)
    if model is None:
        return None
    marked: dict[Site, Tensor] = {}
    for site, rows in neurons_of(edit).items():
        marked[site] = torch.zeros(resolve(model, site)[site].shape, dtype=torch.bool)
        marked[site][rows] = True
    return NeuronMap(marked) if marked else None


def neurons_of(edit: Intervention) -> dict[Site, Tensor]:
    """Return the flat indices of the neurons that an intervention acts on, by site; nothing for what selects none."""
    if isinstance(edit, Limited):
        return neurons_of(edit.inner)
    if isinstance(edit, Ablate | Adjust):
        return {site: value.flatten().nonzero().flatten() for site, value in at_keys(edit.selection).items()}
    if not isinstance(edit, Delta):
        return {}
    return {
        Site(matrix.layer, "mlp.post"): update.rows.cpu()
        for matrix, update in edit.updates.items()
        if matrix.name == "W_out" and update.rows is not None
    }


def at_keys(selection: NeuronMap) -> NeuronMap:
    """Name MLP neurons and those of experts by their keys, so that selections at pre-activations and at keys can be compared."""
    keys = {"mlp.pre": "mlp.post", "mlp.pre_linear": "mlp.post", **dict.fromkeys(EXPERT_KINDS, "experts.post")}
    return NeuronMap({Site(s.layer, keys.get(s.kind, s.kind)): value for s, value in selection.shaped()})
