"""Interventions: frozen values that become hooks for the length of a `with` block.

    prune = Ablate(score.top(0.02))
    with prune.on(model):
        model.generate("def fib(n):")

Nothing is written into the model. An intervention keeps no state of a run: what belongs to one lives on the `Live`
object that `on` yields. Each hook takes a tensor and returns a new one of the same shape, dtype and device.
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
from lens_unlearn.interventions.base import Chain, Intervention
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.model.host import Model
from lens_unlearn.model.loading import fingerprint

__all__ = ["load_intervention"]


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
    with artefacts.usable(path, "intervention that can be used"):
        found = _from_parts(header["intervention"], tensors)
        again, names = found.parts()
        if not _within(header["intervention"], again) or not set(tensors) <= set(names):
            raise ArtefactError("something in it has no meaning to this version: upgrade to read it")
        repr(found)
    return found


def _within(theirs: Any, ours: Any) -> bool:
    """Say whether everything that a header says was understood: this version would write it again."""
    if isinstance(theirs, dict) and isinstance(ours, Mapping):
        return all(key in ours and _within(value, ours[key]) for key, value in theirs.items())
    if isinstance(theirs, list) and isinstance(ours, Sequence) and len(theirs) == len(ours):
        return all(map(_within, theirs, ours))
    return theirs is ours or theirs == ours  # the same NaN is itself


def _from_parts(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Intervention:
    if header["kind"] == "chain":
        own: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            number, _, inner = name.partition("/")
            own.setdefault(number, {})[inner] = tensor
        return Chain(tuple(_from_parts(member, own.get(str(n), {})) for n, member in enumerate(header["members"])))
    kinds: dict[str, Any] = {"ablate": Ablate, "adjust": Adjust, "abstain": Abstain, "delta": Delta}
    if header["kind"] not in kinds:
        raise ArtefactError(f"{header['kind']!r} is not a kind of intervention this version knows: upgrade to read it")
    return kinds[header["kind"]].from_parts(header, tensors)
