"""Removal of a direction: the difference of the means of two corpora is projected out of the residual stream; a baseline.

Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction" (arXiv 2406.11717). With mu_f and mu_r the means of
the residual stream behind one layer over the tokens of forget and retain,

    r = (mu_f - mu_r) / |mu_f - mu_r|,    x' = x - strength r r^T x    behind every layer

The published method removes r wherever something is written into the stream, embeddings and attention included, takes it at the
last tokens of instructions, and chooses layer and position by refusal rates. Here it is removed behind blocks, all counted tokens
are averaged, and the layer is an option.

Knows means and projections; knows nothing of what the corpora are about.
"""

from collections.abc import Sequence
from typing import Any

from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.interventions.affine import Affine
from lens_unlearn.methods.controls import RANDOM_DIRECTIONS
from lens_unlearn.methods.method import Method
from lens_unlearn.methods.residual import (
    RESID,
    STRENGTHS,
    check_layers,
    check_residual,
    layers_of,
    mean_differences,
    middle_layer,
)
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.sites import Site, layers_with
from lens_unlearn.neurons.moments import Moments

__all__ = ["direction_removal"]


def direction_removal(
    model: Model,
    forget: Corpus | Moments,
    retain: Corpus | Moments,
    *,
    layer: int | None = None,
    layers: int | Sequence[int] | None = None,
    strength: float = 1.0,
    skip_sinks: float | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Affine:
    """Remove the direction between the means of two corpora from the residual stream.

    Args:
        model: A `TransformerBridge` or `HookedTransformer`.
        forget: Texts of the skill to remove, or their moments at `resid`.
        retain: Texts of what is to be retained, or their moments.
        layer: Behind which layer the direction is taken; -1 is the last. Default: the middle one.
        layers: Behind which layers it is removed, one or several. Default: all.
        strength: The share of each activation's component that is removed, above 0 and at most 1.
        skip_sinks: Leave attention sinks out of the means, see `collect`.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        progress: Whether to show bars.

    Returns:
        A projection of rank 1 at `resid`.

    Raises:
        SelectionError: If both means are equal, or moments lack the layer.
        LensUnlearnError: If a layer does not exist, or an option is out of range.
    """
    require_model(model)
    options: dict[str, Any] = {"skip_sinks": skip_sinks, "batch_size": batch_size}
    _check(model, forget, retain, layer=layer, layers=layers, strength=strength, **options)
    source = layers_of(model, layer, [middle_layer(model)], "layer")
    [difference] = mean_differences(model, forget, retain, source, progress=progress, **options).values()
    r = difference / difference.norm()
    sites = [Site(number, RESID) for number in layers_of(model, layers, layers_with(model, RESID))]
    return Affine(dict.fromkeys(sites, -r[:, None]), dict.fromkeys(sites, r[None]), strength=strength)


def _check(model: Model | None, forget: Any, retain: Any, *, layer: Any = None, **options: Any) -> None:
    """Refuse options and corpora; without a model, options alone."""
    check_layers([layer] if layer is not None else None, "layer")
    check_residual(model, forget, retain, **options)
    if model is not None:
        layers_of(model, layer, [0], "layer")


METHOD = Method(
    name="direction-removal",
    function=direction_removal,
    fitted_to=Moments,
    strength="strength",
    sites=RESID,
    grid=STRENGTHS,
    check=_check,
    control_words=RANDOM_DIRECTIONS,
    baseline=True,
    summary="Projects the difference of the means of both corpora out of the residual stream (Arditi et al. 2024); a baseline.",
)
