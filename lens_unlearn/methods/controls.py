"""The controls that every result is set beside: what random changes of the same size do.

A control is fair if it differs from the method in nothing but what the texts determined: random neurons are drawn from those
that the method could have chosen, and a random update has the rank and the singular values of the trained one. Inside routed
experts they are drawn from experts with the same load: one to which hardly any token is routed is a cheap victim.

Knows the kinds of intervention, and for each of them what the same at random is; knows nothing of the method that found it.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.core.numbers import check_numbers
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.interventions.affine import Affine
from lens_unlearn.interventions.base import Intervention, Placed
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.update import Update
from lens_unlearn.interventions.when import When
from lens_unlearn.methods.ov_basis import rotate
from lens_unlearn.model.experts import EXPERT_KINDS
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.matrices import Matrix
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.maps import NeuronMap, check_fraction
from lens_unlearn.neurons.moments import Moments

__all__ = [
    "Controls",
    "controls_for",
    "random_affine",
    "random_controls",
    "random_delta",
    "random_pruning",
    "shuffled_controls",
]

Controls = Callable[..., list[Intervention]]
"""Takes ``(model, intervention, seeds, *, fitted, refit)``: what the method was fitted to, and how to fit it to something else."""

RANDOM_NEURONS = "as many random neurons of every layer"
RANDOM_LOADED = f"{RANDOM_NEURONS}, in experts with the same load"
RANDOM_UPDATES = "random updates of the same singular values"
RANDOM_DIRECTIONS = "random directions of the same norm"
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
    among: NeuronMap | None = None,
    load: NeuronMap | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Ablate:
    """Ablate neurons chosen at random, of those that a method could have chosen.

    Inside routed experts, each neuron of `like` is replaced by one of an expert with about the same load: the experts of a layer
    are cut into ten quantiles of it. Where `like` takes whole experts, whole experts are drawn.

    Methods that rank neurons by their activations never choose one that is dead (constant on the forget and on the retain corpus)
    while others remain, and to ablate one changes next to nothing: a control that draws dead neurons is too weak.

    Args:
        model: Where to choose.
        forget: Texts or moments that the method was fitted to: neurons that are dead on both sides are not drawn. Of an ablation
            in a basis, moments in that basis. Where moments lack a site, any of its neurons may be drawn.
        retain: Likewise. Without either, any neuron may be drawn.
        fraction: Share of each layer's neurons, where `like` is not given.
        site: Kind of site, where `like` is not given.
        like: Choose as many neurons per layer as this ablation has, and put the same values in their place. Where it
            takes whole heads, whole heads are chosen.
        among: A selection to draw from, in place of what is alive on `forget` or `retain`.
        load: The loads of experts by which neurons inside them are matched, `Moments.load`; default: those of `retain`.
        seed: The same seed gives the same selection, whatever else was drawn before.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with, where
            `forget` and `retain` are texts.
        progress: Whether to show bars there.

    Returns:
        An `Ablate` with the same per-layer counts.

    Raises:
        SelectionError: If nothing would be selected, or a layer has fewer neurons to draw from than are to be drawn.
    """
    require_model(model)
    check_numbers(seed=seed, batch_size=batch_size)
    if like is None:
        share = check_fraction(fraction)
        pattern = {s: torch.zeros(point.shape, dtype=torch.bool) for s, point in resolve(model, site).items()}
        counts = {s: (round(share * v.numel()), 1) for s, v in pattern.items()}
        if not any(count for count, _ in counts.values()):
            neurons = sum(v.numel() for v in pattern.values())
            raise SelectionError(f"fraction={fraction} selects nothing in layers of {neurons:,} neurons: raise it")
    else:
        if not isinstance(like, Ablate):
            raise SelectionError(
                f"like={like!r} is no ablation: give one, and place the control itself, as in "
                "random_pruning(..., like=prune).placed('generated')"
            )
        pattern = dict(like.selection.shaped())
        counts = {s: _counted(chosen) for s, chosen in pattern.items()}
    if among is None:
        options = {"batch_size": batch_size, "progress": progress}
        known = _moments_of(model, (forget, retain), pattern, None if like is None else like.basis, **options)
        among, load = _alive(known, pattern), _load(known) if load is None else load
    elif not among.is_selection:
        raise SelectionError("among is no selection: give a boolean map, as in moments.std > 0")
    elif load is None and isinstance(retain, Moments):
        load = _load([retain])
    strata = {} if load is None or like is None else {site: _strata(load[site]) for site in load}
    drawn = NeuronMap({s: _draw(s, shape, *counts[s], among, seed, strata.get(s)) for s, shape in pattern.items()})
    return Ablate(drawn) if like is None else Ablate(drawn, like.value, like.basis)


def random_delta(like: Delta, *, seed: int = 0) -> Delta:
    """Change the same rows and columns of the same matrices by an update of the same singular values, in random directions.

    Of an update D = U S V^T of rank r, the control is Q_1 S Q_2^T, with Q_1 and Q_2 uniformly distributed (Haar) matrices of r
    orthonormal columns: as strong as D in every norm that rotations do not change (Frobenius, spectral, nuclear), and of its rank.

    Args:
        like: What it is the control of. The control of a product of two thin matrices is one too.
        seed: The same seed gives the same update.

    Returns:
        A `Delta` of the same strength.
    """
    return Delta({m: _drawn_like(m, update, seed) for m, update in like.updates.items()}, like.strength)


def random_affine(like: Affine, *, seed: int = 0) -> Affine:
    """Map the same activations in the same way along random directions: all of a map's vectors, turned together at random.

    With Q a uniformly distributed (Haar) rotation, the same for all sites of one width, left becomes Q left, right becomes
    right Q^T, and shift becomes Q shift: a projection stays one, and all norms, ranks and angles are the same, also from layer to
    layer. The centre stays.

    Args:
        like: What it is the control of.
        seed: The same seed gives the same map.

    Returns:
        An `Affine` of the same strength.
    """
    columns = {
        site: torch.cat(
            [
                part
                for part in (like.left.get(site), _column(like.right, site), _column(like.shift, site))
                if part is not None
            ],
            1,
        )
        for site in like.sites
    }
    turned: dict[Site, Tensor] = {}
    for width in {len(vectors) for vectors in columns.values()}:
        own = {site: vectors.double() for site, vectors in columns.items() if len(vectors) == width}
        span = torch.linalg.qr(torch.cat([*own.values()], 1)).Q
        drawn = _orthonormal(span.shape[0], span.shape[1], _generator("random_affine", seed, width), span.device)
        turned |= {site: drawn @ (span.T @ vectors) for site, vectors in own.items()}
    left, right, shift = {}, {}, {}
    for site, vectors in turned.items():
        a, b, c = vectors.to(columns[site].dtype).split([like.rank(site), like.rank(site), int(site in like.shift)], 1)
        if site in like.left:
            left[site], right[site] = a, b.T
        if site in like.shift:
            shift[site] = c[:, 0]
    return replace(like, left=left, right=right, shift=shift)


def _column(part: Mapping[Site, Tensor], site: Site) -> Tensor | None:
    """Return a site's vectors as columns: of vectors, or of the rows of a matrix."""
    return None if site not in part else part[site].reshape(-1, part[site].shape[-1]).T


def _drawn_like(matrix: Matrix, update: Update, seed: int) -> Update:
    value, right = update.value.detach(), update.right
    generator = _generator("random_delta", seed, matrix)
    orthonormal = partial(_orthonormal, generator=generator, device=value.device)
    if right is None:
        sizes = torch.linalg.svdvals(value.double())
        rank = len(sizes)
        change = orthonormal(value.shape[0], rank) * sizes @ orthonormal(value.shape[1], rank).T
        return Update(change.to(value.dtype), update.rows, update.columns)
    left_core = torch.linalg.qr(value.double()).R
    right_core = torch.linalg.qr(right.detach().double().T).R
    sizes = torch.linalg.svdvals(left_core @ right_core.T)
    scale, rank = sizes.sqrt(), len(sizes)
    return Update(
        (orthonormal(value.shape[0], rank) * scale).to(value.dtype),
        right=(orthonormal(right.shape[1], rank) * scale).T.contiguous().to(right.dtype),
    )


def _orthonormal(
    rows: int, columns: int, generator: torch.Generator, device: torch.device
) -> Float[Tensor, "rows columns"]:
    """Draw a matrix of orthonormal columns, uniformly: the Q of normal numbers, with R's diagonal made positive."""
    normal = torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(device)
    q, r = torch.linalg.qr(normal)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def _generator(purpose: str, seed: int, place: object) -> torch.Generator:
    """Return a stream of random numbers of its own for each place."""
    digest = hashlib.sha256(f"{purpose} {seed} {place}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _counted(chosen: Bool[Tensor, "*neurons"]) -> tuple[int, int]:
    """Return how many units are selected at a site, and how many neurons a unit has: a head's, where whole heads are selected."""
    whole = chosen.ndim == 2 and bool((chosen.all(-1) == chosen.any(-1)).all())
    block = chosen.shape[-1] if whole else 1
    return int(chosen.sum()) // block, block


def _moments_of(
    model: Model,
    parts: Sequence[Any],
    pattern: Mapping[Site, Tensor],
    basis: NeuronMap | None,
    *,
    batch_size: int | None = None,
    progress: bool = False,
) -> list[Moments]:
    """Return the moments of corpora, in a basis if there is one, and those that were given; of anything else there are none."""
    kinds = tuple(dict.fromkeys(site.kind for site in pattern))
    turn = None if basis is None else {site: partial(rotate, basis=basis[site]) for site in basis}
    known = []
    for part in [one for side in parts for one in (side if isinstance(side, list) else [side])]:  # several to retain
        part = getattr(part, "moments", part)  # of what was collected beside them
        if isinstance(part, Corpus) or not (
            part is None or hasattr(part, "fresh")
        ):  # no statistic: `collect` refuses it
            part = collect(model, part, kinds, transform=turn, batch_size=batch_size, progress=progress)
        if isinstance(part, Moments):
            known.append(part)
    return known


def _load(known: Sequence[Moments]) -> NeuronMap | None:
    """Return the loads of experts in the last moments, those of the retain side; None where nothing is inside experts."""
    return known[-1].load if known and known[-1].routed_tokens else None


def _strata(load: Float[Tensor, "neurons"]) -> Tensor:
    """Return which of ten quantiles of load each neuron's expert is in."""
    edges = torch.quantile(load.double().unique(), torch.arange(1, 10, dtype=torch.float64) / 10)
    return torch.bucketize(load.double(), edges)


def _alive(known: Sequence[Moments], pattern: Mapping[Site, Tensor]) -> NeuronMap:
    """Mark the neurons, or directions in a basis, that are alive on one text at least; all of a site of which nothing is known."""
    lives = [part.mean.live for part in known]
    flags = {site: [live[site] for live in lives if site in live] for site in pattern}
    return NeuronMap(
        {
            site: torch.stack(flags[site]).any(0) if flags[site] else torch.ones_like(chosen, dtype=torch.bool)
            for site, chosen in pattern.items()
        }
    )


def _draw(
    site: Site, like: Tensor, count: int, block: int, among: NeuronMap, seed: int, strata: Tensor | None = None
) -> Bool[Tensor, "*neurons"]:
    """Choose `count` runs of `block` neurons in which there is a candidate, as many of each stratum; a site has its own stream."""
    flat = torch.zeros(like.numel() // block, dtype=torch.bool)
    if count:
        candidates = among[site]
        expected = like.reshape(-1) if site.kind in EXPERT_KINDS else like
        if candidates.shape != expected.shape:
            shapes = f"{tuple(candidates.shape)} and {tuple(expected.shape)}"
            raise SelectionError(f"{site}: candidates and neurons have shapes {shapes}: are they of the same model?")
        possible = candidates.reshape(-1, block).any(-1)
        generator = _generator("random_pruning", seed, site)
        if strata is None:
            _draw_into(flat, possible, count, generator, site, block)
        else:
            levels, wanted = strata.reshape(-1, block)[:, 0], like.reshape(-1, block).any(-1)
            for level in levels[wanted].unique().tolist():
                here = levels == level
                _draw_into(flat, possible & here, int((wanted & here).sum()), generator, site, block)
    return flat.repeat_interleave(block).reshape(like.shape)


def _draw_into(flat: Tensor, possible: Tensor, count: int, generator: torch.Generator, site: Site, block: int) -> None:
    where = possible.nonzero()[:, 0]
    if len(where) < count:
        whole = "experts" if site.kind in EXPERT_KINDS else "heads"
        raise SelectionError(
            f"{site}: {count:,} {whole if block > 1 else 'neurons'} are to be drawn, and {len(where):,} of {len(flat):,} "
            "are candidates (alive on forget or retain, or in among): draw fewer, or give other texts"
        )
    flat[where[torch.randperm(len(where), generator=generator)[:count]]] = True


def _random_adjust(
    model: Model, intervention: Adjust, seed: int, among: NeuronMap | None, load: NeuronMap | None
) -> Intervention:
    """Adjust random neurons, by their own means and standard deviations."""
    drawn = random_pruning(model, like=Ablate(intervention.selection), among=among, load=load, seed=seed)
    return replace(intervention, selection=drawn.selection, floored=0)


AT_RANDOM: dict[type[Intervention], Callable[[Model, Any, int, NeuronMap | None, NeuronMap | None], Intervention]] = {
    Ablate: lambda model, intervention, seed, among, load: random_pruning(
        model, like=intervention, among=among, load=load, seed=seed
    ),
    Adjust: _random_adjust,
    Affine: lambda model, intervention, seed, among, load: random_affine(intervention, seed=seed),
    Delta: lambda model, intervention, seed, among, load: random_delta(intervention, seed=seed),
}
"""For each kind of intervention that selects something, the same of as much at random."""


def controls_for(
    model: Model, intervention: Intervention, seeds: Sequence[int] = range(5), forget: Any = None, retain: Any = None
) -> list[Intervention]:
    """Return random selections of equal per-layer counts, one per seed; none for what selects nothing.

    Inside routed experts the counts are equal also for experts of the same load, see `random_pruning`.

    Of an `Adjust`, random neurons are adjusted by their own means and standard deviations; of a `Delta`, the controls are
    random updates of the same singular values, and of an `Affine` the same map along random directions. What acts at some
    positions only has controls that act there.

    Args:
        model: The model.
        intervention: What is to be controlled.
        seeds: One for each control.
        forget: What the method was fitted to. Corpora and moments say which neurons it could have chosen: those that are alive on
            either side, and, where there were too few of them, those that it has chosen; so does a map of scores. Anything else
            says nothing.
        retain: Likewise.
    """
    if isinstance(intervention, Placed):
        inner = controls_for(model, intervention.inner, seeds, forget, retain)
        return [Placed(control, intervention.place) for control in inner]
    if isinstance(intervention, When):
        inner = controls_for(model, intervention.inner, seeds, forget, retain)
        return [When(intervention.detector, control) for control in inner]
    draw = AT_RANDOM.get(type(intervention))
    if draw is None:
        return []
    among = load = None
    if isinstance(intervention, Ablate | Adjust):
        selection = intervention.selection
        pattern = dict(selection.items())
        if isinstance(forget, NeuronMap):  # the scores that neurons were selected by, which know what was alive
            return [draw(model, intervention, seed, forget.live | selection, None) for seed in seeds]
        known = _moments_of(model, (forget, retain), pattern, getattr(intervention, "basis", None))
        among, load = _alive(known, pattern) | selection, _load(known)
    return [draw(model, intervention, seed, among, load) for seed in seeds]


def random_controls(
    model: Model, intervention: Intervention, seeds: Sequence[int], *, fitted: tuple[Any, Any], **_: Any
) -> list[Intervention]:
    """Draw the controls of a record from `controls_for`, of what was alive on what the method was fitted to."""
    return controls_for(model, intervention, seeds, *fitted)


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
    retain = KeySample.joined(retain) if isinstance(retain, list) else retain
    if not (isinstance(forget, KeySample) and isinstance(retain, KeySample)):
        return []
    return [refit(*forget.shuffled(retain, seed)) for seed in seeds]
