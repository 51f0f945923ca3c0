"""Neuron Adjust: shift the neurons that tell two skills apart to the retain side, wherever they look like the forget side.

Source: Li, Sun, Weng, "Effective Skill Unlearning through Intervention and Abstention" (NAACL 2025, arXiv 2503.21730).
"""

from typing import Any, Literal

import torch
from torch import Tensor

from lens_unlearn.core.errors import LensUnlearnError, SelectionError
from lens_unlearn.core.numbers import check_numbers
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.methods.method import Method, require_some
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.sites import Site, check_kind
from lens_unlearn.neurons.collect import collect, require_skipped
from lens_unlearn.neurons.maps import NeuronMap, check_fraction
from lens_unlearn.neurons.moments import Moments

__all__ = ["METHOD", "RANKINGS", "adjust_score", "neuron_adjust"]

FLOOR = 1e-3
"""The smallest sigma, as a share of the median positive sigma of its layer."""


def _signed(mf: NeuronMap, sf: NeuronMap, mr: NeuronMap, sr: NeuronMap) -> NeuronMap:
    return mf - mr


def _abs(mf: NeuronMap, sf: NeuronMap, mr: NeuronMap, sr: NeuronMap) -> NeuronMap:
    return abs(mf - mr)


def _cohens_d(mf: NeuronMap, sf: NeuronMap, mr: NeuronMap, sr: NeuronMap) -> NeuronMap:
    return abs(mf - mr) / ((sf * sf + sr * sr) / 2).sqrt()


def _hellinger(mf: NeuronMap, sf: NeuronMap, mr: NeuronMap, sr: NeuronMap) -> NeuronMap:
    # 1 - BC with BC = sqrt(2 sf sr / (sf^2 + sr^2)) exp(-(mf - mr)^2 / (4 (sf^2 + sr^2))); its root is the distance.
    both = sf * sf + sr * sr
    apart = mf - mr
    overlap = ((sf * sr * 2.0) / both).sqrt() * ((apart * apart) / (both * -4.0)).map(torch.exp)
    return (1.0 - overlap).map(lambda v: v.clamp_min(0).sqrt())


RANKINGS = {"signed": _signed, "abs": _abs, "cohens_d": _cohens_d, "hellinger": _hellinger}
"""How far apart a neuron's two distributions are, from their means and standard deviations."""


def neuron_adjust(
    model: Model,
    forget: Corpus | Moments,
    retain: Corpus | Moments,
    *,
    fraction: float = 0.03,
    rank_by: Literal["signed", "abs", "cohens_d", "hellinger"] = "signed",
    rule: Literal["random", "deterministic"] = "random",
    site: str = "mlp.pre",
    within: Literal["model", "layer"] = "model",
    seed: int = 0,
    skip_sinks: float | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Adjust:
    """Fit Neuron Adjust: mean and true standard deviation per neuron on both sides, and the neurons most apart.

    The score of a neuron is, with `rank_by`:

    - "signed" (published): mu_f - mu_r;
    - "abs": |mu_f - mu_r|;
    - "cohens_d": |mu_f - mu_r| / sqrt((sigma_f^2 + sigma_r^2) / 2);
    - "hellinger": the Hellinger distance of the two normal distributions.

    What is done at the selected neurons: see `Adjust`. A sigma below a thousandth of the median positive one of its layer
    is raised to that; how many were is in the `repr`. On a ReLU model with plain MLPs this amounts to a conditional
    ablation: the shifted pre-activations are mostly negative.

    Args:
        model: A `TransformerBridge` or `HookedTransformer`; not needed where both sides are moments.
        forget: Texts of the skill to remove, or their `Moments`.
        retain: Texts of what is to be retained, or their `Moments`.
        fraction: Share of the neurons to adjust, in [0, 1].
        rank_by: How neurons are scored.
        rule: "random" (published) or "deterministic".
        site: "mlp.pre" (in a gated MLP the gate, before its activation function), or another kind of site.
        within: Whether the fraction is of the whole model or of each layer.
        seed: Of the random rule's draws.
        skip_sinks: Leave attention sinks out of means and standard deviations, see `collect`.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        progress: Whether to show bars.

    Raises:
        SelectionError: If the selection is empty, or the moments lack the site.
        LensUnlearnError: If an option is unknown, or no neuron varies on one side.
    """
    if model is not None or not (isinstance(forget, Moments) and isinstance(retain, Moments)):
        require_model(model)
    _check(
        model, forget, retain, fraction=fraction, rank_by=rank_by, rule=rule, site=site, within=within, seed=seed,
        skip_sinks=skip_sinks, batch_size=batch_size,
    )  # fmt: skip
    share, site = check_fraction(fraction), check_kind(site)
    forget_stats, retain_stats = (
        require_skipped(part, skip_sinks)
        if isinstance(part, Moments)
        else collect(model, part, site, batch_size=batch_size, skip_sinks=skip_sinks, progress=progress)
        for part in (forget, retain)
    )
    maps, raised = _maps(forget_stats, retain_stats, site)
    selection = _score(maps, rank_by).top(
        share, within=within, among=forget_stats.mean[site].live | retain_stats.mean[site].live
    )
    if selection.count() == 0:
        raise SelectionError(f"fraction={fraction:g} selects nothing of {selection.numel():,} neurons: raise it")
    floored = sum(int(raised[s][selection[s]].sum()) for s in selection)
    return Adjust(selection, *maps, rule=rule, seed=seed, floored=floored)


def adjust_score(forget: Moments, retain: Moments, *, rank_by: str = "signed", site: str = "mlp.pre") -> NeuronMap:
    """Return the score by which `neuron_adjust` ranks neurons."""
    return _score(_maps(forget, retain, check_kind(site))[0], rank_by)


def _score(maps: tuple[NeuronMap, ...], rank_by: str) -> NeuronMap:
    return RANKINGS[rank_by](*maps)


def _maps(forget_stats: Moments, retain_stats: Moments, kind: str) -> tuple[tuple[NeuronMap, ...], dict[Site, Tensor]]:
    """Return mu_f, sigma_f, mu_r, sigma_r with floors, and how many of each neuron's two sigmas were raised."""
    means, stds, raised = [], [], dict[Site, Tensor]()
    for moments in (forget_stats, retain_stats):
        if not any(site.kind == kind for site in moments.sites):
            raise SelectionError(f"these moments have nothing of {kind}: collect at {kind}")
    shapes = [
        {site: value.shape for site, value in moments.mean[kind].items()} for moments in (forget_stats, retain_stats)
    ]
    if shapes[0] != shapes[1]:
        raise SelectionError(
            "the moments of the two sides differ in their layers or neurons: collect both with one model"
        )
    for moments in (forget_stats, retain_stats):
        floors: dict[Site, Tensor] = {}
        std = moments.std[kind]
        for site, value in std.items():
            positive = value[value > 0]
            if len(positive) == 0:
                raise LensUnlearnError(f"{site}: every neuron is constant over {moments!r}: give more, or other, texts")
            floor = FLOOR * positive.median()
            raised[site] = raised.get(site, 0) + (value < floor).long()
            floors[site] = value.clamp_min(floor)
        means.append(moments.mean[kind])
        stds.append(NeuronMap(floors, experts=std.experts))
    return (means[0], stds[0], means[1], stds[1]), raised


def _check(
    model: Model | None,
    forget: Any,
    retain: Any,
    *,
    fraction: float = 0.03,
    rank_by: str = "signed",
    rule: str = "random",
    site: str = "mlp.pre",
    within: str = "model",
    seed: int = 0,
    skip_sinks: float | None = None,
    batch_size: int | None = None,
    **_: Any,
) -> None:
    """Refuse options and corpora; without a model, options alone."""
    for name, given, known in (
        ("rank_by", rank_by, tuple(RANKINGS)),
        ("rule", rule, ("random", "deterministic")),
        ("within", within, ("model", "layer")),
    ):
        if given not in known:
            raise LensUnlearnError(f"{name}={given!r} is not known: choose from {', '.join(known)}")
    share = check_fraction(fraction)
    if not share and model is None:  # with one, its neurons are counted below
        raise SelectionError(f"fraction={fraction:g} selects nothing: raise it")
    site = check_kind(site)
    check_numbers(seed=seed, batch_size=batch_size, skip_sinks=skip_sinks)
    if isinstance(forget, Corpus) and isinstance(retain, Corpus) and forget.fingerprint == retain.fingerprint:
        raise LensUnlearnError(f"forget and retain are the same text ({forget.name}): nothing could tell them apart")
    if model is not None:
        require_some(model, {site: share}, within=within)


def _figure_score(forget: Moments, retain: Moments, **options: Any) -> NeuronMap:
    shared = {name: value for name, value in options.items() if name in ("rank_by", "site")}
    return adjust_score(forget, retain, **shared)


METHOD = Method(
    name="neuron-adjust",
    function=neuron_adjust,
    fitted_to=Moments,
    check=_check,
    score=_figure_score,
    summary="Mirrors the neurons that tell the two corpora apart to the retain side, wherever they look like the forget side "
    "(Li, Sun and Weng 2025).",
)
