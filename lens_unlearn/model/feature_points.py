"""The hook points of dictionary features: where a dictionary that was attached to a model reads, and writes what hooks change.

Knows hook points, and of a dictionary that it encodes and how a change of features moves the activation; knows nothing of the
formulas by which it does (`dictionary` does).
"""

# The features are computed only while something is hooked at them: then a hook of ours at the dictionary's own hook point encodes
# what passes there, hands the features through a hook point of their own, and adds what was changed on the way, times the decoder.
# What is not changed is not decoded either: so the error of the reconstruction stays in the model, and where no hook changes a
# feature the activation stays bitwise as it is. Whether our hook is there follows from the hooks at the features alone
# (`settle`), as with experts: blocks may end in any order, and an interrupted end is mended by the next.

import os
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from lens_unlearn.core import artefacts
from lens_unlearn.core.errors import ArtefactError, SiteError
from lens_unlearn.model.hooks import Remover, attach
from lens_unlearn.model.host import Model

__all__ = [
    "FEATURES",
    "Encodes",
    "attached",
    "dictionaries_at",
    "feature_point",
    "feature_points",
    "put",
    "require_dictionaries",
    "take",
]

FEATURES = "sae"
"""The kind of site that a dictionary's features are."""


class Encodes(Protocol):
    """What is asked of a dictionary here."""

    @property
    def hook_name(self) -> str:
        """TransformerLens' name of where it was trained."""
        ...

    @property
    def reads(self) -> str:
        """That of where it reads, if that is the same place under another name."""
        ...

    @property
    def layer(self) -> int:
        """The layer of where it reads."""
        ...

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells it from others, for the headers of files."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """Return the features of an activation."""
        ...

    def written(self, index: int) -> Tensor:
        """Return what a feature adds to the residual stream."""
        ...

    def replaced(self, x: Tensor, features: Tensor, new: Tensor) -> Tensor:
        """Return the activation with other features, and the same reconstruction error."""
        ...


class _Features:
    """The hook point of one dictionary's features in one model."""

    def __init__(self, dictionary: Encodes, base: Any) -> None:
        from transformer_lens.hook_points import HookPoint

        self.dictionary, self.base = dictionary, weakref.ref(base)
        self.removers: list[Remover] = []
        self.point: Any = HookPoint()
        self.point.name = f"{dictionary.hook_name}.{FEATURES}"
        self.point.settle = self.settle
        self._add_hook = self.point.add_hook
        self.point.add_hook = self._add

    def _add(self, *args: Any, **kwargs: Any) -> Any:
        handle = self._add_hook(*args, **kwargs)
        self.settle()
        return handle

    def settle(self) -> bool:
        """Hook the dictionary's hook point while the features are hooked; return False if somebody took that hook away."""
        base, hooked = self.base(), bool(self.point._forward_hooks)
        if base is None:  # the model is gone
            return True
        in_place = any(getattr(handle.user_hook, "__wrapped__", None) == self._carry for handle in base.fwd_hooks)
        was_there = in_place or not self.removers
        if not (hooked and in_place):
            while self.removers:
                self.removers[-1]()
                self.removers.pop()
            if hooked:
                attach(base, self._carry, self.removers, always=True)
        return was_there

    def _carry(self, x: Tensor) -> Tensor | None:
        features = self.dictionary.encode(x)
        new = self.point(features)
        return None if new is features else self.dictionary.replaced(x, features, new)


# By model, then layer; weak references, so that a model can be freed. A copy of a model has no dictionaries.
_attached: "weakref.WeakKeyDictionary[Any, dict[int, Encodes]]" = weakref.WeakKeyDictionary()
_points: "weakref.WeakKeyDictionary[Any, dict[int, _Features]]" = weakref.WeakKeyDictionary()


def attached(model: Model) -> Mapping[int, Encodes]:
    """Return the dictionaries that are attached to a model, by layer."""
    return _attached.get(model, {})


def put(model: Model, dictionary: Encodes) -> None:
    """Attach a dictionary to a model: from then on its layer has the site of its features.

    Raises:
        SiteError: If another one is attached to that layer.
    """
    known = _attached.setdefault(model, {})
    other = known.get(dictionary.layer)
    if other is not None and other is not dictionary:
        raise SiteError(
            f"layer {dictionary.layer} has a dictionary at {other.hook_name} already: detach that one first, as in "
            "dictionary.detach(model)"
        )
    known[dictionary.layer] = dictionary


def take(model: Model, dictionary: Encodes) -> None:
    """Detach a dictionary from a model; what is hooked at its features now acts until its block ends."""
    known = _attached.get(model, {})
    if known.get(dictionary.layer) is dictionary:
        del known[dictionary.layer]


def feature_point(model: Model, points: Mapping[str, Any], layer: int) -> Any:
    """Return the hook point of the features of a layer that has a dictionary.

    Args:
        model: The model.
        points: Its hook points by name.
        layer: Which.

    Raises:
        SiteError: If the model has no hook point of the name that the dictionary was trained at.
    """
    dictionary, known = _attached[model][layer], _points.setdefault(model, {})
    if dictionary.hook_name not in points:
        raise SiteError(f"{dictionary.hook_name}, where this dictionary was trained, is no hook point of this model")
    base, found = points[dictionary.reads], known.get(layer)
    # Compatibility mode and the split options of TransformerLens replace hook points.
    if found is None or found.dictionary is not dictionary or found.base() is not base:
        found = known[layer] = _Features(dictionary, base)
    return found.point


def dictionaries_at(model: Model, sites: Iterable[Any]) -> dict[str, Any]:
    """Return what a file's header holds of the dictionaries whose features some sites are: their fingerprints, by site.

    Raises:
        SiteError: If no dictionary is attached at one of them.
    """
    known = attached(model)
    wanted = sorted({site.layer for site in sites if site.kind == FEATURES})
    for layer in wanted:
        if layer not in known:
            raise SiteError(
                f"no dictionary is attached to layer {layer} of this model: attach the one whose features these are first"
            )
    return {f"L{layer}.{FEATURES}": known[layer].fingerprint for layer in wanted}


def require_dictionaries(path: str | os.PathLike[str], said: Any, model: Model) -> None:
    """Refuse a file of the features of other dictionaries than those that are attached to a model, as its header has them.

    Raises:
        ArtefactError: If one is not attached, or another one is; the message names what differs.
    """
    known = {f"L{layer}.{FEATURES}": dictionary for layer, dictionary in attached(model).items()}
    if not isinstance(said, Mapping):
        raise ArtefactError(f"{path} does not say of which dictionaries it is: write it again")
    for site, theirs in said.items():
        if site not in known:
            hook = theirs.get("hook") if isinstance(theirs, Mapping) else site
            raise ArtefactError(
                f"{path} is of the features of a dictionary at {hook}, and none is attached there to this model: load that one, "
                "and attach it first"
            )
        artefacts.require_same(path, theirs, known[site].fingerprint, f"the dictionary attached at {site}")


def feature_points(model: Model) -> list[Any]:
    """Return the hook points of features that were asked for in a model so far."""
    return [found.point for found in _points.get(model, {}).values()]
