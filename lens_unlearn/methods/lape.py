"""LAPE: the neurons of one language, by the entropy of activation probabilities over languages; a baseline.

Tang et al., "Language-Specific Neurons: The Key to Multilingual Capabilities in Large Language Models" (arXiv 2402.16438). With
P_k(j) the share of tokens of language k at which neuron j is active, and p its normalization over languages,

    LAPE(j) = -sum_k p_k(j) log p_k(j),    p_k(j) = P_k(j) / sum_i P_i(j)

Neurons that are rarely active in every language are left out; those of the lowest entropy are specific, each to the languages in
which it is often active. The published method sets those of one language to zero.

Knows activation probabilities; knows nothing of what makes a text one of a language, and any texts will do.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lens_unlearn.core.errors import LensUnlearnError, SelectionError
from lens_unlearn.core.numbers import Range, check_numbers
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.methods.method import Method, require_some
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.maps import NeuronMap, check_fraction
from lens_unlearn.neurons.moments import Moments

__all__ = ["lape"]

SITE = "mlp.pre"
"""Where a neuron is active: before the activation function, which is positive where its input is."""


def lape(
    model: Model,
    forget: Corpus | Moments,
    retain: Corpus | Moments | Sequence[Corpus | Moments],
    *,
    fraction: float = 0.01,
    often: float = 0.95,
    batch_size: int | None = None,
    progress: bool = True,
) -> Ablate:
    """Find the neurons of a language by LAPE, and ablate them to zero.

    Where several languages share a neuron that is specific to few of them, it is ablated with each: the published code does so too.

    Args:
        model: Where to look.
        forget: Texts of the language to remove, or moments at `mlp.pre`.
        retain: Those of each other language, in a list; joined, they count as one.
        fraction: Share of the neurons that are specific to any of the languages, in (0, 1], those of the one to forget among them.
        often: A neuron is often active in a language if that is more than this quantile of all probabilities.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        progress: Whether to show bars.

    Returns:
        An ablation to zero at `mlp.post`.

    Raises:
        SelectionError: If no neuron is specific to what is to be forgotten.
        LensUnlearnError: If an option is out of range, or the sides have other sites.
    """
    require_model(model)
    _check(model, forget, retain, fraction=fraction, often=often, batch_size=batch_size)
    parts = [forget, *(retain if isinstance(retain, list | tuple) else [retain])]
    moments = [
        part if isinstance(part, Moments) else collect(model, part, SITE, batch_size=batch_size, progress=progress)
        for part in parts
    ]
    active = [dict(one.positive[SITE].items()) for one in moments]
    if any(set(one) != set(active[0]) for one in active):
        raise LensUnlearnError("the moments of the languages are of different layers: collect all with one model")
    flat = torch.stack([torch.cat([one[site].flatten() for site in active[0]]).double() for one in active])
    ours = specific(flat, fraction, often)[0]
    if not bool(ours.any()):
        raise SelectionError(
            f"no neuron is specific to the texts to forget: of {flat.shape[1]:,}, {fraction:g} are specific to any; raise fraction"
        )
    sizes = [value.numel() for value in active[0].values()]
    masks = zip(active[0].items(), ours.split(sizes), strict=True)
    return Ablate(NeuronMap({Site(s.layer, "mlp.post"): mask.reshape(value.shape) for (s, value), mask in masks}))


def specific(active: Tensor, fraction: float, often: float) -> Tensor:
    """Say which neurons are specific to which language.

    Args:
        active: ``[languages, neurons]``, the shares of tokens at which they are active.
        fraction: Of all neurons, which are specific to any language: those of the lowest entropy.
        often: The quantile of all shares above which a neuron is often active.

    Returns:
        ``[languages, neurons]`` of booleans.
    """
    shares = active / active.sum(0).clamp_min(1e-30)
    entropy = -torch.xlogy(shares, shares).sum(0)
    bar = active.flatten().kthvalue(max(1, round(often * active.numel()))).values
    entropy[(active <= bar).all(0)] = torch.inf  # rarely active everywhere
    count = round(fraction * active.shape[1])
    lowest = torch.zeros(active.shape[1], dtype=torch.bool)
    lowest[entropy.argsort(stable=True)[:count]] = True
    return (active > bar) & lowest & entropy.isfinite()


def _check(
    model: Model | None,
    forget: Any,
    retain: Any,
    *,
    fraction: float = 0.01,
    often: float = 0.95,
    batch_size: int | None = None,
    **_: Any,
) -> None:
    """Refuse options and corpora; without a model, options alone."""
    share = check_fraction(fraction)
    if not share and model is None:
        raise SelectionError(f"fraction={fraction:g} selects nothing: raise it")
    Range(0, 1, above=True, below=True, what="is no quantile").check(often, "often")
    check_numbers(batch_size=batch_size)
    for other in retain if isinstance(retain, list | tuple) else [retain]:
        if isinstance(forget, Corpus) and isinstance(other, Corpus) and forget.fingerprint == other.fingerprint:
            raise LensUnlearnError(
                f"forget and retain are the same text ({forget.name}): nothing could tell them apart"
            )
    if model is not None:
        require_some(model, {"mlp.post": share})


METHOD = Method(
    name="lape",
    function=lape,
    fitted_to=Moments,
    sites=SITE,
    grid=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4),
    check=_check,
    by_source=True,
    baseline=True,
    summary="Sets to zero the MLP neurons that are active in few of the languages (or skills), that to forget among them "
    "(Tang et al. 2024); a baseline.",
)
