"""What the methods on the residual stream share: which layers, and how far apart the means of two corpora are there.

Knows corpora and moments at `resid`; knows nothing of what is done with a direction.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.errors import CorpusError, LensUnlearnError, SelectionError
from lens_unlearn.core.numbers import STRENGTH, Range, check_numbers
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.model.host import Model
from lens_unlearn.model.sites import Site, layers_with
from lens_unlearn.neurons.collect import collect, require_skipped
from lens_unlearn.neurons.moments import Moments

__all__ = [
    "RESID",
    "STRENGTHS",
    "check_layers",
    "check_residual",
    "check_sides",
    "layers_of",
    "mean_differences",
    "middle_layer",
]

RESID = "resid"
STRENGTHS = (0.1, 0.25, 0.5, 0.75, 1.0)
"""The strengths that are swept over: factors of the whole change."""
Layers = int | Sequence[int] | None


def check_layers(layers: Any, name: str = "layers") -> None:
    """Refuse what names no layers of any model.

    Raises:
        LensUnlearnError: If it is neither None, a whole number, nor a list with at least one.
    """
    given = [] if layers is None else list(layers) if isinstance(layers, list | tuple) else [layers]
    if layers is not None and not given:
        raise LensUnlearnError(f"{name}={layers!r} names no layer: give one at least, or None for the default")
    for number in given:
        Range(whole=True, what="is no number of a layer").check(number, name)


def layers_of(model: Model, layers: Layers, default: Sequence[int], name: str = "layers") -> list[int]:
    """Return layers of a model in order; negative numbers count from the last.

    Raises:
        LensUnlearnError: If the model does not have one of them.
    """
    check_layers(layers, name)
    having = layers_with(model, RESID)
    given = default if layers is None else [layers] if isinstance(layers, int) else layers
    for number in given:
        if not -len(having) <= number < len(having):
            raise LensUnlearnError(
                f"there is no layer {number}, in {name}: this model has layers 0 to {len(having) - 1}, -1 is the last"
            )
    return sorted({having[number] for number in given})


def middle_layer(model: Model) -> int:
    """Return the layer in the middle."""
    return len(layers_with(model, RESID)) // 2


def check_residual(
    model: Model | None,
    forget: Any,
    retain: Any,
    *,
    layers: Any = None,
    strength: float = 1.0,
    seed: int = 0,
    skip_sinks: float | None = None,
    batch_size: int | None = None,
    **_: Any,
) -> None:
    """Refuse options that these methods share, and corpora; without a model, options alone.

    Raises:
        LensUnlearnError: If an option is out of range, a layer does not exist, or nothing could tell the sides apart.
    """
    STRENGTH.check(strength, "strength")
    check_layers(layers)
    check_numbers(seed=seed, skip_sinks=skip_sinks, batch_size=batch_size)
    check_sides(forget, retain)
    if model is not None:
        layers_of(model, layers, [0])


def check_sides(forget: Any, retain: Any) -> None:
    """Refuse sides that nothing could tell apart.

    Raises:
        CorpusError: If there is nothing to retain.
        LensUnlearnError: If both are the same text.
    """
    if retain is None and forget is not None:
        raise CorpusError("what tells the forget corpus apart is found against a retain corpus: give one")
    if isinstance(forget, Corpus) and isinstance(retain, Corpus) and forget.fingerprint == retain.fingerprint:
        raise LensUnlearnError(f"forget and retain are the same text ({forget.name}): nothing could tell them apart")


def mean_differences(
    model: Model,
    forget: Corpus | Moments,
    retain: Corpus | Moments,
    layers: Sequence[int],
    *,
    skip_sinks: float | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Mapping[Site, Float[Tensor, "d_model"]]:
    """Return at each layer the mean of the retain tokens less that of the forget tokens, in float32.

    Raises:
        SelectionError: If moments lack a layer, or the means of one are equal.
    """
    sites = [Site(layer, RESID) for layer in layers]
    sides = [
        require_skipped(side, skip_sinks)
        if isinstance(side, Moments)
        else collect(model, side, sites, batch_size=batch_size, skip_sinks=skip_sinks, progress=progress)
        for side in (forget, retain)
    ]
    first, second = (side.mean for side in sides)
    found = {site: (second[site] - first[site]).float() for site in sites}
    for site, difference in found.items():
        if not bool(difference.any()):
            raise SelectionError(f"{site}: forget and retain have the same mean: no direction tells them apart")
    return found
