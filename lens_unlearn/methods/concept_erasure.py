"""LEACE: what tells two corpora apart linearly is erased from the residual stream, at the least change; a baseline.

Belrose et al., "LEACE: Perfect linear concept erasure in closed form" (arXiv 2306.03819). With Sigma_xx the covariance of the
residual stream behind a layer, Sigma_xz its cross-covariance with the label z (forget or retain), and mu its mean,

    W = Sigma_xx^(-1/2),    x' = x - strength W^+ P W (x - mu),    P the orthogonal projection onto the columns of W Sigma_xz

Then x' has the same mean on both sides, no linear probe fitted to these tokens does better than a constant, and of all maps with
that property this one moves x least. The square root is that of the pseudo-inverse.

The released code shrinks the covariance, and bends the map where the trace of the covariance would grow; neither is done here, so
that the guarantee is exact on the tokens that it was fitted to. Several layers are each fitted to the model as it is, where
concept scrubbing fits one after another.

Knows activations with a label; knows nothing of what the corpora are about.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.core.numbers import COUNT
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.interventions.affine import Affine
from lens_unlearn.methods.controls import RANDOM_DIRECTIONS
from lens_unlearn.methods.method import Fitted, Method
from lens_unlearn.methods.residual import RESID, STRENGTHS, check_residual, layers_of, middle_layer
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.key_sample import KeySample

__all__ = ["concept_erasure", "leace"]

SAMPLES = 4000


def concept_erasure(
    model: Model,
    forget: Corpus | KeySample,
    retain: Corpus | KeySample,
    *,
    layers: int | Sequence[int] | None = None,
    samples: int = SAMPLES,
    strength: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Affine:
    """Erase what tells two corpora apart linearly from the residual stream, by LEACE.

    Args:
        model: A `TransformerBridge` or `HookedTransformer`.
        forget: Texts of the skill to remove, or a sample of activations at `resid`.
        retain: Texts of what is to be retained, or a sample.
        layers: Behind which layers it is erased, one or several; -1 is the last. Default: the middle one.
        samples: The most tokens of each side that a map is fitted to, drawn uniformly.
        strength: The share of the erasure, above 0 and at most 1.
        seed: Of the draw.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        progress: Whether to show bars.

    Returns:
        A map of rank 1 about the mean, at `resid`.

    Raises:
        SelectionError: If both sides have the same mean.
        LensUnlearnError: If a layer does not exist, or an option is out of range.
    """
    require_model(model)
    _check(model, forget, retain, layers=layers, samples=samples, strength=strength, seed=seed, batch_size=batch_size)
    options = {"layers": layers, "samples": samples, "seed": seed, "batch_size": batch_size, "progress": progress}
    first, second = _prepare(model, forget, retain, **options)
    sites = [Site(number, RESID) for number in layers_of(model, layers, [middle_layer(model)])]
    maps = {site: leace(first[site], second[site], str(site)) for site in sites}
    left, right, centre = ({site: parts[i] for site, parts in maps.items()} for i in range(3))
    return Affine(left, right, centre, strength=strength)


def leace(
    forget: Float[Tensor, "n d_model"], retain: Float[Tensor, "m d_model"], name: str = "the sample"
) -> tuple[Float[Tensor, "d_model 1"], Float[Tensor, "1 d_model"], Float[Tensor, "d_model"]]:
    """Return left, right and mu of the erasure x + (x - mu) left right, computed in float64.

    Raises:
        SelectionError: If both sides have the same mean.
    """
    x = torch.cat([forget, retain]).double()
    z = torch.cat([torch.ones(len(forget)), torch.zeros(len(retain))]).double()
    mean = x.mean(0)
    x, z = x - mean, z - z.mean()
    sizes, vectors = torch.linalg.eigh(x.T @ x / len(x))
    known = sizes > sizes[-1] * len(sizes) * torch.finfo(sizes.dtype).eps  # the others are zero, but for rounding
    root = torch.where(known, sizes, 0).sqrt()
    whitening = vectors * torch.where(known, 1 / root, 0) @ vectors.T
    direction = whitening @ (x.T @ z / len(x))
    if not bool(direction.norm() > 1e-9):
        raise SelectionError(f"{name}: forget and retain have the same mean: there is no concept to erase")
    u = direction / direction.norm()
    unwhitening = vectors * root @ vectors.T
    return -(whitening @ u)[:, None].float(), (unwhitening @ u)[None].float(), mean.float()


def _check(model: Model | None, forget: Any, retain: Any, *, samples: int = SAMPLES, **options: Any) -> None:
    """Refuse options and corpora; without a model, options alone."""
    COUNT.check(samples, "samples")
    check_residual(model, forget, retain, **options)


def _prepare(
    model: Model,
    forget: Any,
    retain: Any,
    *,
    layers: Any = None,
    samples: int = SAMPLES,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    **_: Any,
) -> Fitted:
    """Sample the residual stream of both sides once for all strengths."""
    sites = [Site(number, RESID) for number in layers_of(model, layers, [middle_layer(model)])]

    def sampled(side: Corpus | KeySample) -> KeySample:
        if isinstance(side, KeySample):
            return side
        statistic = KeySample(samples, seed=seed)
        return collect(model, side, sites, statistic=statistic, batch_size=batch_size, progress=progress)

    return sampled(forget), sampled(retain)


METHOD = Method(
    name="concept-erasure",
    function=concept_erasure,
    strength="strength",
    grid=STRENGTHS,
    prepare=_prepare,
    check=_check,
    control_words=RANDOM_DIRECTIONS,
    baseline=True,
    summary="Erases what tells both corpora apart linearly from the residual stream, at the least change (LEACE, Belrose et al. "
    "2023); a baseline.",
)
