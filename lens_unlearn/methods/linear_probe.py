"""Linear probe: neurons ranked by the weights of a probe that tells forget from retain tokens by them, and ablated; a baseline.

Dalvi et al., "What Is One Grain of Sand in the Desert? Analyzing Individual Neurons in Deep NLP Models" (arXiv 1812.09355), and
their toolkit NeuroX. With h_t the activations of all MLP neurons at token t, each less its mean and divided by its standard
deviation, and y_t = 1 at forget tokens and -1 at retain tokens,

    min over w, b:  mean_t log(1 + exp(-y_t (w . h_t + b))) + l1 |w|_1 + l2 |w|_2^2

The score of a neuron is |w_j|: of its weight on plain activations, that times its standard deviation. Behind those with a weight
come the others, in the order of their gradients: that in which they would be given one if l1 were less. The first are set to zero.

NeuroX trains with Adam for ten epochs, without regularization unless it is asked for, adds the norm |w|_2 and not its square,
leaves it to the user to standardize, and ranks by the share of a class' weight mass; with two classes that is an order by |w_j|.
Here the minimum is found by L-BFGS-B (SciPy), so that nothing depends on a learning rate.

Knows activations with a label; knows nothing of what the corpora are about.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.core.numbers import COUNT, NOT_NEGATIVE, check_numbers
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.methods.method import Fitted, Method, require_some
from lens_unlearn.methods.residual import check_sides
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.sites import resolve
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.maps import NeuronMap, check_fraction

__all__ = ["fitted_probe", "probe_ranking"]

SITE = "mlp.post"
SAMPLES = 2000
MOST = 2**27
"""Activations that are kept of each side, at most: half a gigabyte."""


def probe_ranking(
    model: Model,
    forget: Corpus | NeuronMap,
    retain: Corpus | None,
    *,
    fraction: float = 0.02,
    samples: int = SAMPLES,
    l1: float = 1e-3,
    l2: float = 1e-3,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Ablate:
    """Rank the MLP neurons by a linear probe between two corpora, and ablate the first to zero.

    Args:
        model: A `TransformerBridge` or `HookedTransformer`.
        forget: Texts of the skill to remove. Given a map of scores, its highest are ablated.
        retain: Texts of what is to be retained.
        fraction: Share of the neurons to ablate, in (0, 1].
        samples: The most tokens of each side that the probe is trained on, drawn uniformly; fewer in a model in which they would
            take more than half a gigabyte.
        l1: Of the absolute values of the weights.
        l2: Of their squares.
        seed: Of the draw.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        progress: Whether to show bars.

    Returns:
        An ablation to zero at `mlp.post`.

    Raises:
        SelectionError: If the fraction selects nothing, or the probe has no weight at all.
        LensUnlearnError: If an option is out of range.
    """
    require_model(model)
    options = {"samples": samples, "l1": l1, "l2": l2, "seed": seed, "batch_size": batch_size}
    _check(model, forget, retain, fraction=fraction, **options)
    score, _ = _prepare(model, forget, retain, progress=progress, **options)
    return Ablate(score.top(check_fraction(fraction)))


def fitted_probe(
    forget: Float[Tensor, "n neurons"], retain: Float[Tensor, "m neurons"], l1: float = 1e-3, l2: float = 1e-3
) -> tuple[Float[Tensor, "neurons"], Float[Tensor, "neurons"]]:
    """Return the weights of the probe on standardized activations, and their gradient but for that of l1.

    Args:
        forget: Activations at tokens of the skill to remove.
        retain: At tokens of what is to be retained.
        l1: Of the absolute values of the weights.
        l2: Of their squares.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    x = torch.cat([forget, retain]).float()
    varies = x.amax(0) > x.amin(0)
    x = torch.where(varies, (x - x.mean(0)) / x.std(0, correction=0), 0)
    features, width = x.numpy(), x.shape[1]
    y = np.concatenate([np.ones(len(forget)), -np.ones(len(retain))])

    # |w|_1 has no gradient at 0, where most weights are to end: as the difference of two numbers above 0, w = p - n, it is p + n.
    def objective(parts: np.ndarray) -> tuple[float, np.ndarray]:
        w = parts[:width] - parts[width:-1]
        margin = y * (features @ w.astype(np.float32) + parts[-1])
        slope = -y * expit(-margin) / len(y)
        smooth = features.T @ slope.astype(np.float32) + 2 * l2 * w
        value = np.logaddexp(0, -margin).mean() + l1 * parts[:-1].sum() + l2 * (w @ w)
        return float(value), np.concatenate([smooth + l1, l1 - smooth, [slope.sum()]])

    bounds = [(0, None)] * (2 * width) + [(None, None)]
    options = {"maxiter": 1000, "maxfun": 2000, "ftol": 1e-10, "gtol": 1e-7}
    found = minimize(objective, np.zeros(2 * width + 1), jac=True, bounds=bounds, method="L-BFGS-B", options=options).x
    slopes = objective(found)[1]
    return torch.from_numpy(found[:width] - found[width:-1]), torch.from_numpy(slopes[:width] - l1)


def _scores(weights: Float[Tensor, "neurons"], slopes: Float[Tensor, "neurons"], l1: float) -> Float[Tensor, "neurons"]:
    """Return the absolute weights; below the least of them, in the order of their gradients (at most l1), what has none."""
    scores = weights.abs()
    without = scores == 0
    return torch.where(without, scores[~without].min() * 0.999 * slopes.abs() / max(l1, 1e-30), scores)


def _check(
    model: Model | None,
    forget: Any,
    retain: Any,
    *,
    fraction: float = 0.02,
    samples: int = SAMPLES,
    l1: float = 1e-3,
    l2: float = 1e-3,
    seed: int = 0,
    batch_size: int | None = None,
    **_: Any,
) -> None:
    """Refuse options and corpora; without a model, options alone."""
    share = check_fraction(fraction)
    if not share and model is None:
        raise SelectionError(f"fraction={fraction:g} selects nothing: raise it")
    COUNT.check(samples, "samples")
    for name, value in (("l1", l1), ("l2", l2)):
        NOT_NEGATIVE.check(value, name)
    check_numbers(seed=seed, batch_size=batch_size)
    if not isinstance(forget, NeuronMap):
        check_sides(forget, retain)
    if model is not None:
        require_some(model, {SITE: share})


def _prepare(
    model: Model,
    forget: Any,
    retain: Any,
    *,
    samples: int = SAMPLES,
    l1: float = 1e-3,
    l2: float = 1e-3,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    **_: Any,
) -> Fitted:
    """Train the probe once for all strengths, and return its scores."""
    if isinstance(forget, NeuronMap):
        return forget, None
    points = resolve(model, SITE)
    capacity = max(1, min(samples, MOST // sum(point.shape[0] for point in points.values())))
    sides = [
        collect(model, side, SITE, statistic=KeySample(capacity, seed=seed), batch_size=batch_size, progress=progress)
        for side in (forget, retain)
    ]
    first, second = (torch.cat([side[site] for site in points], 1) for side in sides)
    weights, slopes = fitted_probe(first, second, l1, l2)
    if not bool(weights.any()):
        raise SelectionError(f"l1={l1:g} leaves the probe no weight to rank neurons by: lower it")
    scores = _scores(weights, slopes, l1).split([point.shape[0] for point in points.values()])
    parts = dict(zip(points, scores, strict=True))
    seen = {site: torch.cat([side[site] for side in sides]) for site in points}
    live = {site: keys.amax(0) > keys.amin(0) for site, keys in seen.items()}
    return NeuronMap(parts, live=live), None


METHOD = Method(
    name="linear-probe",
    function=probe_ranking,
    sites=SITE,
    grid=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4),
    prepare=_prepare,
    check=_check,
    baseline=True,
    summary="Sets to zero the MLP neurons of the largest weights in a linear probe between both corpora (Dalvi et al. 2019); a "
    "baseline.",
)
