"""Steering: a vector from the mean of one corpus to that of another is added to the residual stream; a baseline.

Turner et al., "Steering Language Models With Activation Engineering" (arXiv 2308.10248); Rimsky et al., "Steering Llama 2 via
Contrastive Activation Addition" (arXiv 2312.06681). With mu_f and mu_r the means behind a layer over the tokens of forget and
retain,

    v = mu_r - mu_f,    x' = x + strength coefficient v

so that with a coefficient of 1 the mean of the forget tokens comes to be that of the retain tokens. The convention is repeng's (a
vector for each layer that is steered, times one coefficient), but for its vectors of length 1, the first principal components of
differences of pairs: two corpora have no pairs.

Knows means and shifts; knows nothing of what the corpora are about.
"""

from collections.abc import Sequence
from typing import Any

from lens_unlearn.core.numbers import POSITIVE
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.interventions.affine import Affine
from lens_unlearn.methods.controls import RANDOM_DIRECTIONS
from lens_unlearn.methods.method import Method
from lens_unlearn.methods.residual import (
    RESID,
    STRENGTHS,
    check_residual,
    layers_of,
    mean_differences,
    middle_layer,
)
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.neurons.moments import Moments

__all__ = ["steering"]


def steering(
    model: Model,
    forget: Corpus | Moments,
    retain: Corpus | Moments,
    *,
    layers: int | Sequence[int] | None = None,
    coefficient: float = 2.0,
    strength: float = 1.0,
    skip_sinks: float | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Affine:
    """Steer away from the texts to forget: add the vector from their mean to that of the texts to retain.

    Args:
        model: A `TransformerBridge` or `HookedTransformer`.
        forget: Texts of the skill to remove, or their moments at `resid`.
        retain: Texts of what is to be retained, or their moments.
        layers: Behind which layers a vector is added, one or several, each its own; -1 is the last. Default: the middle one.
        coefficient: How many times the distance of the means is added, at a strength of 1.
        strength: The share of that, above 0 and at most 1.
        skip_sinks: Leave attention sinks out of the means, see `collect`.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        progress: Whether to show bars.

    Returns:
        A shift at `resid`.

    Raises:
        SelectionError: If both means of a layer are equal, or moments lack it.
        LensUnlearnError: If a layer does not exist, or an option is out of range.
    """
    require_model(model)
    options: dict[str, Any] = {"skip_sinks": skip_sinks, "batch_size": batch_size}
    _check(model, forget, retain, layers=layers, coefficient=coefficient, strength=strength, **options)
    steered = layers_of(model, layers, [middle_layer(model)])
    vectors = mean_differences(model, forget, retain, steered, progress=progress, **options)
    return Affine(shift={site: coefficient * vector for site, vector in vectors.items()}, strength=strength)


def _check(model: Model | None, forget: Any, retain: Any, *, coefficient: float = 2.0, **options: Any) -> None:
    """Refuse options and corpora; without a model, options alone."""
    POSITIVE.check(coefficient, "coefficient")
    check_residual(model, forget, retain, **options)


METHOD = Method(
    name="steering",
    function=steering,
    fitted_to=Moments,
    strength="strength",
    sites=RESID,
    grid=STRENGTHS,
    check=_check,
    control_words=RANDOM_DIRECTIONS,
    baseline=True,
    summary="Adds the vector from the mean of the forget corpus to that of the retain corpus to the residual stream (Turner et al. "
    "2023; Rimsky et al. 2023); a baseline.",
)
