"""`load_intervention`: read what `Intervention.save` wrote, of the kinds in a closed table.

A file names its kind, and the kind is looked up here: so a file can never say what code is run. Knows which interventions there
are; knows nothing of what any of them does.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lens_unlearn.core import artefacts
from lens_unlearn.core.errors import ArtefactError
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.interventions.affine import Affine
from lens_unlearn.interventions.base import Chain, Intervention, Placed
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.patch import Patch
from lens_unlearn.interventions.reroute import Reroute
from lens_unlearn.interventions.when import When
from lens_unlearn.model.host import Model
from lens_unlearn.model.loading import require_model_of

__all__ = ["CLASSES", "load_intervention"]

CLASSES = (Ablate, Adjust, Abstain, Affine, Delta, Patch, Reroute, Chain, Placed, When)
"""Every intervention that can be read from a file: a new one is a file of this room and a name here."""
_BY_KIND: dict[str, Any] = {cls.kind: cls for cls in CLASSES}


def load_intervention(path: str | os.PathLike[str], model: Model | None = None) -> Intervention:
    """Read an intervention that `save` wrote.

    Args:
        path: The file.
        model: The model to be used with; if the file knows its model, this has to be the same. If not, a warning says so.

    Raises:
        ArtefactError: If the file is damaged, not ours, or made with another model; the message names what differs.
    """
    header, tensors = artefacts.read(path, "intervention")
    with artefacts.usable(path, "intervention that can be used"):
        intervention = _from_parts(header["intervention"], tensors)
        # What it would write now has to contain all that was read: nothing that another version wrote is silently dropped.
        rewritten, names = intervention.parts()
        if not _within(header["intervention"], rewritten) or not set(tensors) <= set(names):
            raise ArtefactError("something in it has no meaning to this version: upgrade to read it")
        repr(intervention)
    require_model_of(path, header, model)
    return intervention


def _within(theirs: Any, ours: Any) -> bool:
    """Return whether everything in a header was understood: this version would write it again."""
    if isinstance(theirs, dict) and isinstance(ours, Mapping):
        return all(key in ours and _within(value, ours[key]) for key, value in theirs.items())
    if isinstance(theirs, list) and isinstance(ours, Sequence) and len(theirs) == len(ours):
        return all(map(_within, theirs, ours))
    return theirs is ours or theirs == ours  # the same NaN is itself


def _from_parts(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Intervention:
    if header["kind"] not in _BY_KIND:
        raise ArtefactError(f"{header['kind']!r} is not a kind of intervention this version knows: upgrade to read it")
    cls = _BY_KIND[header["kind"]]
    return cls.from_parts(header, tensors, *([_from_parts] if cls in (Chain, Placed, When) else []))
