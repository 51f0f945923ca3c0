"""Selective Pruning: ablate the neurons that matter more to the forget corpus than to the retain corpus.

Pochinkov and Schoots, "Dissecting Language Models: Machine Unlearning via Selective Pruning" (arXiv 2403.01267), here with
hooks instead of edited weights. For neuron k of layer l, with importance I over the counted tokens of a corpus:

    score(l, k) = I_forget(l, k) / (I_retain(l, k) + eps)

and the neurons with the highest scores, over all layers together, are set to zero.

Differs from the released code: `std` and `rms` use the true standard deviation (there, the variance under its name);
moments stay float64; BOS does not count; dead neurons are not candidates; ablated neurons are excluded explicitly.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lens_unlearn.core.errors import LensUnlearnError, SelectionError
from lens_unlearn.core.numbers import NOT_NEGATIVE, STEPS, check_numbers
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.methods.method import Fitted, Method, require_some
from lens_unlearn.methods.ov_basis import ov_basis, rotate, value_offset
from lens_unlearn.model.feature_points import FEATURES
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.sites import ALIASES, Site, check_kind
from lens_unlearn.neurons.collect import collect, require_skipped
from lens_unlearn.neurons.maps import NeuronMap, check_fraction
from lens_unlearn.neurons.moments import Moments

__all__ = ["ATTENTION", "IMPORTANCES", "METHOD", "pruning_moments", "pruning_score", "selective_pruning"]

IMPORTANCES: dict[str, Callable[[Moments], NeuronMap]] = {
    "abs": lambda moments: moments.mean_abs,
    "freq": lambda moments: moments.positive,
    "rms": lambda moments: moments.rms,
    "std": lambda moments: moments.std,
    "sqrt": lambda moments: moments.mean_sqrt,
}
"""How much a neuron matters to a corpus: mean abs(x) (the paper's best), frequency of x > 0, rms, std, mean sqrt(abs(x))."""

EPS = {"mlp": 1e-3, "shared": 1e-3, "experts": 1e-3, "attn": 1e-4, FEATURES: 0.1}
"""The paper's code's eps: of MLP and of attention neurons. Of dictionary features, which are mostly 0 and have a scale of their
own, in units of their mean on the retain corpus."""

Fraction = float | Mapping[str, float]
Unit = Literal["neuron", "head", "direction"]


def selective_pruning(
    model: Model,
    forget: Corpus | Moments,
    retain: Corpus | Moments,
    *,
    fraction: Fraction = 0.02,
    importance: str = "abs",
    site: str | tuple[str, ...] = "mlp.post",
    steps: int = 1,
    within: Literal["model", "layer"] = "model",
    eps: float | None = None,
    eps_relative: float = 0.0,
    replacement: Literal["zero", "mean"] = "zero",
    unit: Unit = "neuron",
    reference: Model | None = None,
    skip_sinks: float | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Ablate:
    """Find the neurons of a skill by Selective Pruning.

    Inside routed experts (site "experts.post") eps is multiplied by the mean gate of a neuron, and "mean" is that over the tokens
    routed to its expert.

    Args:
        model: Where to look.
        forget: Texts of the skill to remove, or moments already collected (only with ``steps=1`` and ``unit`` other
            than "direction").
        retain: Texts of what is to be retained, or moments of the same sites.
        fraction: Share of the neurons to ablate, in [0, 1]; per site kind if several, as in
            ``{"mlp.post": 0.02, "attn.z": 0.01}``. Each kind is ranked for itself.
        importance: "abs", "freq", "rms", "std" or "sqrt".
        site: "mlp.post" (feed-forward neurons), "experts.post" (those inside routed experts), "attn.z" (attention pre-out
            neurons), "sae" (the features of attached dictionaries), or several in a tuple.
        steps: Reach the fraction in this many equal steps; each ranks anew on activations collected under the
            ablation so far.
        within: Rank over the whole model, or the same fraction in each layer.
        eps: Added to the retain importance; default 1e-3 for MLP and 1e-4 for attention sites, as in the paper's code, and for
            features a tenth of the mean of all features on the retain corpus.
        eps_relative: Adds this share of the layer's median retain importance to eps, so that it has the layer's scale.
        replacement: Put "zero", or the "mean" over the retain corpus, in place of a pruned neuron.
        unit: Prune single neurons, whole attention "head"s (by mean score), or "direction"s: attention neurons in the
            singular basis of each head's W_V W_O.
        reference: The same model unprocessed; needed where TransformerLens folded value biases away, because then
            `attn.z` lacks a constant and zero would be another ablation (see `value_offset`).
        skip_sinks: Leave attention sinks out of the importance, see `collect`.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        progress: Whether to show bars.

    Returns:
        An `Ablate` of exactly round(fraction * units) units per kind.

    Raises:
        SelectionError: If a fraction is outside [0, 1], or so small that nothing is selected.
        LensUnlearnError: If an option is unknown, or both corpora are the same text.

    Examples:
        >>> import lens_unlearn as lu
        >>> model = lu.load_model("demo")
        >>> code = lu.read_corpus("demo:python", model, tokens=500)
        >>> prose = lu.read_corpus("demo:english", model, tokens=500)
        >>> lu.selective_pruning(model, code, prose, fraction=0.02, progress=False)  # doctest: +ELLIPSIS
        Ablate(zero, ... neurons, ... layers, mlp.post)
    """
    require_model(model)
    _check(
        model, forget, retain, fraction=fraction, importance=importance, site=site, steps=steps, within=within, eps=eps,
        eps_relative=eps_relative, replacement=replacement, unit=unit, skip_sinks=skip_sinks, batch_size=batch_size,
    )  # fmt: skip
    fractions = _fractions(fraction, _kinds(site))
    if steps > 1 and not (isinstance(forget, Corpus) and isinstance(retain, Corpus)):
        raise LensUnlearnError("steps > 1 collects anew under the mask so far: pass corpora, not moments")
    frame = _Frame(model, tuple(fractions), unit, reference, skip_sinks)
    chosen: Ablate | None = None
    first: Moments | None = None
    for step in range(1, steps + 1):
        forget_stats, retain_stats = (
            require_skipped(part, skip_sinks)
            if isinstance(part, Moments)
            else frame.collect(part, importance, chosen, batch_size, progress)
            for part in (forget, retain)
        )
        first = first or retain_stats
        score = pruning_score(forget_stats, retain_stats, importance=importance, eps=eps, eps_relative=eps_relative)
        selection = _select(score, fractions, step / steps, within, unit, chosen)
        chosen = Ablate(selection, frame.value(replacement, first), frame.basis)
    assert chosen is not None  # there is a step at least
    return chosen


def pruning_score(
    forget: Moments, retain: Moments, *, importance: str = "abs", eps: float | None = None, eps_relative: float = 0.0
) -> NeuronMap:
    """Score neurons by I_forget / (I_retain + eps); high means: prune.

    Args:
        forget: Moments over the forget corpus.
        retain: Moments over the retain corpus, of the same sites.
        importance: A key of `IMPORTANCES`.
        eps: As in `selective_pruning`.
        eps_relative: As in `selective_pruning`.
    """
    if importance not in IMPORTANCES:
        raise LensUnlearnError(f"importance={importance!r} is not known: choose from {', '.join(IMPORTANCES)}")
    measure = IMPORTANCES[importance]
    top, bottom = measure(forget), measure(retain)
    floors = {
        site: torch.full_like(value, _eps(site, retain) if eps is None else eps) + eps_relative * value.median()
        for site, value in bottom.items()
    }
    ratio = top / (bottom + NeuronMap(floors))
    # With eps = 0 a neuron that neither corpus moves scores 0/0: it matters to neither.
    return ratio.map(lambda value: torch.nan_to_num(value, nan=0.0, posinf=float("inf")))


def _eps(site: Site, retain: Moments) -> float:
    """Return eps by default: times the mean gate inside routed experts, whose values are multiplied by gates and mostly 0."""
    if site.kind == FEATURES:
        return EPS[FEATURES] * float(retain.mean_abs[site].mean())
    gates = retain.gate_sums.get(site)
    scale = 1.0 if gates is None else float(gates.mean()) / retain.n
    return EPS.get(site.kind.partition(".")[0], 0.0) * scale


def pruning_moments(
    model: Model,
    corpus: Corpus,
    *,
    importance: str = "abs",
    site: str | tuple[str, ...] = "mlp.post",
    unit: Unit = "neuron",
    reference: Model | None = None,
    skip_sinks: float | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Moments:
    """Collect what `selective_pruning` scores, so that several fractions can share one pass over the corpus."""
    frame = _Frame(model, _kinds(site), unit, reference, skip_sinks)
    return frame.collect(corpus, importance, None, batch_size, progress)


class _Frame:
    """The coordinates in which units are scored: raw pre-out values, and the OV basis if asked for."""

    def __init__(
        self, model: Model, kinds: tuple[str, ...], unit: Unit, reference: Model | None, skip_sinks: float | None
    ) -> None:
        self.model, self.kinds, self.skip_sinks = model, kinds, skip_sinks
        self.basis = ov_basis(model) if unit == "direction" else None
        self.offset = value_offset(model, reference) if "attn.z" in kinds else None

    def collect(
        self, corpus: Corpus, importance: str, under: Ablate | None, batch_size: int | None, progress: bool
    ) -> Moments:
        """Collect moments of the raw (and rotated) activations, under what was pruned so far."""
        statistic = Moments(extra=("sqrt",) if importance == "sqrt" else ())
        options = {
            "statistic": statistic,
            "batch_size": batch_size,
            "skip_sinks": self.skip_sinks,
            "progress": progress,
            "transform": self._transform(),
        }
        if under is None:
            return collect(self.model, corpus, self.kinds, **options)
        with under.on(self.model):
            return collect(self.model, corpus, self.kinds, **options)

    def _transform(self) -> dict[Site, Callable[[Tensor], Tensor]]:
        functions: dict[Site, Callable[[Tensor], Tensor]] = {}
        for site in self.offset or self.basis or ():
            offset = None if self.offset is None else self.offset[site]
            basis = None if self.basis is None else self.basis[site]
            functions[site] = lambda z, c=offset, t=basis: _rotate(z if c is None else z + c.to(z), t)
        return functions

    def value(self, replacement: str, retain: Moments) -> float | NeuronMap:
        """Return what to put in place of a unit, in the coordinates of the model's own `attn.z`."""
        if replacement == "zero" and self.offset is None:
            return 0.0
        value = _means(retain) if replacement == "mean" else retain.mean * 0.0
        if self.offset is None:
            return value
        shift = {
            s: _rotate(c[None, None], None if self.basis is None else self.basis[s])[0, 0]
            for s, c in self.offset.items()
        }
        return NeuronMap({site: v - shift[site] if site in shift else v for site, v in value.items()})


def _means(moments: Moments) -> NeuronMap:
    """Return the means over the tokens at which each neuron is computed."""
    routed = {} if not moments.routed_tokens else dict(moments.mean_given_routed.shaped())
    return NeuronMap(dict(moments.mean.shaped()) | routed)


def _rotate(z: Tensor, basis: Tensor | None) -> Tensor:
    return z if basis is None else rotate(z, basis)


def _select(
    score: NeuronMap,
    fractions: Mapping[str, float],
    share: float,
    within: Literal["model", "layer"],
    unit: Unit,
    chosen: Ablate | None,
) -> NeuronMap:
    parts: dict[Site, Tensor] = {}
    for kind, fraction in fractions.items():
        part = score[kind]
        live = part.live
        if unit == "head":
            part, live = part.map(lambda v: v.mean(-1)), live.map(lambda v: v.any(-1))
        if chosen is not None:
            # What is pruned stays pruned: it ranks above everything, and the rest is chosen among the living. By now it
            # is constant, so the score's own knowledge of what lives has to go: it would rank what is pruned last.
            before = chosen.selection[kind]
            before = before.map(lambda v: v.all(-1)) if unit == "head" else before
            part, live = NeuronMap(dict(part.where(~before, float("inf")).shaped())), live | before
        selection = part.top(fraction * share, within=within, among=live)
        if unit == "head":
            selection = NeuronMap({s: v[:, None].expand_as(score[s]) for s, v in selection.items()})
        parts |= dict(selection.shaped())
    selection = NeuronMap(parts)
    if selection.count() == 0:
        raise SelectionError(f"fraction={dict(fractions)} selects nothing of {score.numel():,} neurons: raise it")
    return selection


def _kinds(site: str | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(check_kind, (site,) if isinstance(site, str) else site))


def _fractions(fraction: Fraction, kinds: tuple[str, ...]) -> dict[str, float]:
    if not isinstance(fraction, Mapping):
        return {kind: check_fraction(fraction) for kind in kinds}
    fraction = {ALIASES.get(kind, kind): share for kind, share in fraction.items()}
    odd = set(fraction) ^ set(kinds) if set(fraction) - set(kinds) else set()
    if odd:
        raise SelectionError(
            f"fraction names {', '.join(sorted(odd))}, and site is {', '.join(kinds)}: they must agree"
        )
    return {kind: check_fraction(fraction[kind], f"fraction[{kind!r}]") for kind in kinds if kind in fraction}


def _check(
    model: Model | None,
    forget: Any,
    retain: Any,
    *,
    fraction: Fraction = 0.02,
    importance: str = "abs",
    site: str | tuple[str, ...] = "mlp.post",
    steps: int = 1,
    within: str = "model",
    eps: float | None = None,
    eps_relative: float = 0.0,
    replacement: str = "zero",
    unit: str = "neuron",
    skip_sinks: float | None = None,
    batch_size: int | None = None,
    **_: Any,
) -> None:
    """Refuse options and corpora; without a model, options alone."""
    for name, given, known in (
        ("importance", importance, tuple(IMPORTANCES)),
        ("replacement", replacement, ("zero", "mean")),
        ("unit", unit, ("neuron", "head", "direction")),
        ("within", within, ("model", "layer")),
    ):
        if given not in known:
            raise LensUnlearnError(f"{name}={given!r} is not known: choose from {', '.join(known)}")
    fractions = _fractions(fraction, _kinds(site))
    if not any(fractions.values()) and model is None:  # with one, its neurons are counted below
        raise SelectionError(f"fraction={fraction} selects nothing: raise it")
    STEPS.check(steps, "steps")
    NOT_NEGATIVE.check(0 if eps is None else eps, "eps")
    NOT_NEGATIVE.check(eps_relative, "eps_relative")
    check_numbers(batch_size=batch_size, skip_sinks=skip_sinks)
    if unit != "neuron" and tuple(fractions) != ("attn.z",):
        raise LensUnlearnError(f"unit={unit!r} is of attention: use it with site='attn.z' alone")
    if isinstance(forget, Corpus) and isinstance(retain, Corpus) and forget.fingerprint == retain.fingerprint:
        raise LensUnlearnError(f"forget and retain are the same text ({forget.name}): nothing could tell them apart")
    if model is not None:
        require_some(model, fractions, within=within, heads=unit == "head")


_COLLECTED_WITH = ("importance", "site", "unit", "reference", "skip_sinks", "batch_size", "progress")


def _prepare(model: Model, forget: Corpus | Moments, retain: Corpus | Moments, **options: Any) -> Fitted:
    """Collect both sides' moments once for all fractions; in several steps each fraction collects anew, from the corpora."""
    if options.get("steps", 1) != 1:
        return forget, retain
    shared = {name: value for name, value in options.items() if name in _COLLECTED_WITH}
    forget, retain = (
        pruning_moments(model, part, **shared) if isinstance(part, Corpus) else part for part in (forget, retain)
    )
    return forget, retain


def _score(forget: Moments, retain: Moments, **options: Any) -> NeuronMap:
    shared = {name: value for name, value in options.items() if name in ("importance", "eps", "eps_relative")}
    return pruning_score(forget, retain, **shared)


METHOD = Method(
    name="selective-pruning",
    function=selective_pruning,
    fitted_to=Moments,
    settings={"site": "mlp.post"},
    prepare=_prepare,
    check=_check,
    costly=("steps",),
    score=_score,
    summary="Sets to zero the MLP neurons that matter more to the forget corpus than to the retain corpus "
    "(Pochinkov and Schoots 2024).",
)
ATTENTION = replace(
    METHOD,
    name="selective-pruning-attention",
    settings={"site": "attn.z"},
    summary="Selective Pruning of attention's pre-out neurons (Pochinkov and Schoots 2024).",
)
