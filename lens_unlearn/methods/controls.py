"""The controls that every result is set beside: what random changes of the same size do.

Knows the kinds of intervention, and for each of them what the same at random is; knows nothing of the method that found it.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.update import Update
from lens_unlearn.model.host import Model
from lens_unlearn.model.matrices import Matrix
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.maps import NeuronMap, check_fraction
from lens_unlearn.neurons.moments import Moments

__all__ = ["Controls", "controls_for", "random_controls", "random_delta", "random_pruning", "shuffled_controls"]

Controls = Callable[..., list[Intervention]]
"""Takes ``(model, intervention, seeds, *, fitted, refit)``: what the method was fitted to, and how to fit it to something else."""

RANDOM_NEURONS = "as many random neurons of every layer"
RANDOM_UPDATES = "random updates of the same norm"
SHUFFLED_LABELS = "the same method fitted to shuffled labels"
"""What reports call the controls below."""


def random_pruning(
    model: Model,
    forget: Corpus | Moments | None = None,
    retain: Corpus | Moments | None = None,
    *,
    fraction: float = 0.02,
    site: str = "mlp.post",
    like: Ablate | None = None,
    seed: int = 0,
) -> Ablate:
    """Ablate neurons chosen at random, without looking at any text.

    Args:
        model: Where to choose.
        forget: Not used; methods share one signature.
        retain: Not used.
        fraction: Share of each layer's neurons, where `like` is not given.
        site: Kind of site, where `like` is not given.
        like: Choose as many neurons per layer as this ablation has, and put the same values in their place. Where it
            takes whole heads, whole heads are chosen.
        seed: The same seed gives the same selection, whatever else was drawn before.

    Returns:
        An `Ablate` with the same per-layer counts.

    Raises:
        SelectionError: If nothing would be selected.
    """
    if like is None:
        share = check_fraction(fraction)
        counts = {s: torch.zeros(point.shape) for s, point in resolve(model, site).items()}
        selection = NeuronMap(
            {s: _draw(s, tuple(v.shape), round(share * v.numel()), 1, seed) for s, v in counts.items()}
        )
        if selection.count() == 0:
            raise SelectionError(
                f"fraction={fraction} selects nothing in layers of {selection.numel():,} neurons: raise it"
            )
        return Ablate(selection)
    drawn: dict[Site, Tensor] = {}
    for at, chosen in like.selection.items():
        whole = chosen.ndim == 2 and bool((chosen.all(-1) == chosen.any(-1)).all())
        block = chosen.shape[-1] if whole else 1
        drawn[at] = _draw(at, tuple(chosen.shape), int(chosen.sum()) // block, block, seed)
    return Ablate(NeuronMap(drawn), like.value, like.basis)


def random_delta(like: Delta, *, seed: int = 0) -> Delta:
    """Change the same rows and columns of the same matrices, by normal numbers of the same norm.

    Args:
        like: What it is the control of. Of a product of two thin matrices, the product's norm is kept.
        seed: The same seed gives the same update.

    Returns:
        A `Delta` of the same strength; in each matrix its norm is that of `like`.
    """
    return Delta({m: _drawn_like(m, update, seed) for m, update in like.updates.items()}, like.strength)


def _drawn_like(matrix: Matrix, update: Update, seed: int) -> Update:
    digest = hashlib.sha256(f"random_delta {seed} {matrix}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    change = (update.value if update.right is None else update.value @ update.right).detach()
    noise = torch.randn(change.shape, generator=generator, dtype=torch.float64).to(change.device)
    noise = (noise * (change.double().norm() / noise.norm().clamp_min(1e-30))).to(change.dtype)
    return Update(noise, update.rows, update.columns)


def _draw(site: Site, shape: tuple[int, ...], count: int, block: int, seed: int) -> Tensor:
    """Choose `count` runs of `block` neurons; each site has its own stream."""
    digest = hashlib.sha256(f"random_pruning {seed} {site}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    blocks = torch.Size(shape).numel() // block
    flat = torch.zeros(blocks, dtype=torch.bool)
    flat[torch.randperm(blocks, generator=generator)[:count]] = True
    return flat.repeat_interleave(block).reshape(shape)


def _random_adjust(model: Model, intervention: Adjust, seed: int) -> Intervention:
    """Adjust random neurons, by their own means and standard deviations."""
    drawn = random_pruning(model, like=Ablate(intervention.selection), seed=seed)
    return replace(intervention, selection=drawn.selection, floored=0)


AT_RANDOM: dict[type[Intervention], Callable[[Model, Any, int], Intervention]] = {
    Ablate: lambda model, intervention, seed: random_pruning(model, like=intervention, seed=seed),
    Adjust: _random_adjust,
    Delta: lambda model, intervention, seed: random_delta(intervention, seed=seed),
}
"""For each kind of intervention that selects something, the same of as much at random."""


def controls_for(model: Model, intervention: Intervention, seeds: Sequence[int] = range(5)) -> list[Intervention]:
    """Return random selections of equal per-layer counts, one per seed; none for what selects nothing.

    Of an `Adjust`, random neurons are adjusted by their own means and standard deviations; of a `Delta`, the controls are
    random updates of the same norm.
    """
    draw = AT_RANDOM.get(type(intervention))
    return [draw(model, intervention, seed) for seed in seeds] if draw else []


def random_controls(model: Model, intervention: Intervention, seeds: Sequence[int], **_: Any) -> list[Intervention]:
    """Draw the controls of a record from `controls_for`, whatever the method was fitted to."""
    return controls_for(model, intervention, seeds)


def shuffled_controls(
    model: Model,
    intervention: Intervention,
    seeds: Sequence[int],
    *,
    fitted: tuple[Any, Any],
    refit: Callable[[Any, Any], Intervention],
) -> list[Intervention]:
    """Fit a method again to samples whose documents were dealt to forget and retain at random; none without samples."""
    forget, retain = fitted
    if not (isinstance(forget, KeySample) and isinstance(retain, KeySample)):
        return []
    return [refit(*forget.shuffled(retain, seed)) for seed in seeds]
