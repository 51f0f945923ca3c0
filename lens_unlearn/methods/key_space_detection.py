"""Key Space Detection: abstain from queries whose key lies where the forget skill's keys lie.

Source: Li, Sun, Weng, "Effective Skill Unlearning through Intervention and Abstention" (NAACL 2025, arXiv 2503.21730).
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.core.intervals import auc, wilson_of_units
from lens_unlearn.core.numbers import Range, check_numbers
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.interventions.abstain import REFUSAL, Abstain
from lens_unlearn.keyspace.regions import FEWEST, Region, Shape, fit_region
from lens_unlearn.methods.controls import SHUFFLED_LABELS, shuffled_controls
from lens_unlearn.methods.method import Method
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.pooling import Pool, check_pool
from lens_unlearn.model.sites import Site, check_kind, layers_with
from lens_unlearn.neurons.collect import query_keys, query_places
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.maps import check_fraction

__all__ = ["METHOD", "key_space_detection"]

SHAPES: tuple[Shape, ...] = ("box", "ellipsoid", "clusters", "contrast", "linear")
_CONTRASTS = ("contrast", "linear", "auto")
"""What is fitted on retain queries as well."""

TINY = 1e-30

Regions = dict[Site, Region]


def key_space_detection(
    model: Model,
    forget: Corpus | KeySample,
    retain: Corpus | KeySample | Sequence[Corpus | KeySample] | None = None,
    *,
    layer: int | Sequence[int] | None = None,
    alpha: float | None = None,
    coverage: float = 1.0,
    region: Shape | Literal["auto"] = "box",
    vote: int | None = None,
    when: Literal["prompt", "every_token"] = "prompt",
    pool: Pool = "last",
    false_alarms: float = 0.05,
    site: str = "mlp.post",
    held_out: tuple[Corpus | KeySample, Corpus | KeySample] | None = None,
    refusal: str = REFUSAL,
    control: bool = True,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Abstain:
    """Fit a region to the keys of the forget skill's queries, and abstain from queries inside.

    With `layer` and `alpha` given this is the published method, and `retain` is not looked at. What is left out is chosen
    on held-out queries, and every task has queries (whole documents or groups) of its own:

    - shape, layer and majority: those that detect most of the forget queries within `false_alarms`;
    - alpha, one factor for all limits: the largest at which a fresh retain query is inside with a probability of at most
      `false_alarms`, by split conformal prediction. The false positive rate of one fit varies around that, the less the more retain
      queries there are;
    - `Abstain.rates`, with 95 % intervals, on queries that nothing was fitted to or chosen on; "control" among them are the rates
      of the same method fitted to shuffled labels.

    A region is fitted to the keys at the last token of each prompt, or to means over prompts (`pool`); a corpus of plain texts is
    cut into prompts at random places first. alpha means something only together with the floor on sigma, see `fit_region`.

    Args:
        model: A `TransformerBridge` or `HookedTransformer`.
        forget: Queries of the skill to remove, or their keys (`query_keys`).
        retain: Queries of what is to be retained, or their keys; needed unless both `layer` and `alpha` are given. Of several,
            in a list, `false_alarms` holds for each, and not for all together, among which one could pay for the others.
        layer: One layer, several that vote, or None to choose; -1 is the last that has such a site.
        alpha: The limit in units of the score that covers the fit, or None to choose.
        coverage: Share of the fitted queries that alpha = 1 covers, in (0, 1].
        region: "box" (published), "ellipsoid", "clusters"; of ours, fitted to 40 % of the retain queries as well, "contrast"
            (nearer to the forget queries than to those) and "linear" (on the forget side of a plane between both), which is the
            best on pretrained models; or "auto" to choose.
        vote: How many layers have to agree; None for a majority. With layer=None, the best 2 vote - 1 layers vote, or as
            many as detect most.
        when: "prompt" or "every_token", see `Abstain`.
        pool: "last" judges the key of the prompt's last token (published), "mean" the mean over the prompt's tokens, without
            special ones and the first of a text (ours). Keys that are given have to be such.
        false_alarms: Budget: the share of retain queries to abstain from, where alpha is chosen.
        site: Kind of site: "mlp.post" are the keys of the published method.
        held_out: Queries (forget, retain) to choose on and to state rates on, if they should not be split off; default: 40 % of the
            forget documents, and of the retain documents those that the fit does not see.
        refusal: What `lu.generate` writes for an abstained row.
        control: Whether to fit again to shuffled labels.
        seed: Of the splits, the sample, the shuffled labels and the places where texts are cut.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        progress: Whether to show bars.

    Raises:
        CorpusError: If there are no queries to fit or to choose on.
        LensUnlearnError: If a layer does not exist, an argument is out of range, or there are too few queries.
    """
    if not isinstance(forget, KeySample):
        require_model(model)
    _check(
        model, forget, retain, layer=layer, alpha=alpha, coverage=coverage, region=region, vote=vote, when=when,
        pool=pool, false_alarms=false_alarms, site=site, held_out=held_out, refusal=refusal, seed=seed, batch_size=batch_size,
    )  # fmt: skip
    site = check_kind(site)
    sites = [Site(number, site) for number in layers_of(layer, vote, _having(model, forget, site), site)]
    fixed = layer is not None and alpha is not None and region != "auto"
    budget, contrasts = check_fraction(false_alarms, "false_alarms"), region in _CONTRASTS

    def keys_of(part: Corpus | KeySample) -> KeySample:
        if isinstance(part, KeySample):
            return part
        return query_keys(model, part, sites, pool=pool, seed=seed, batch_size=batch_size, progress=progress)

    keys = keys_of(forget)
    several = [keys_of(part) for part in _listed(retain)] if contrasts or not fixed else []
    others = KeySample.joined(several) if several else None
    sources = [part.documents(sites[0]) for part in several] if len(several) > 1 else []
    held = None if held_out is None or fixed else (keys_of(held_out[0]), keys_of(held_out[1]))
    shapes: Sequence[Shape] = SHAPES if region == "auto" else (region,)

    def detector(keys: KeySample, others: KeySample | None, held: tuple[KeySample, KeySample] | None) -> Abstain:
        if held is None and others is not None and not fixed:
            keys, others, held = _parted(keys, others, contrasts=contrasts, seed=seed)
        fitting: dict[str, Any] = {"coverage": coverage, "alpha": 1.0 if alpha is None else alpha, "seed": seed}
        fits: list[Regions] = [
            {
                s: fit_region(
                    keys[s].flatten(1), shape, others=None if others is None else others[s].flatten(1), **fitting
                )
                for s in sites
            }
            for shape in shapes
        ]
        if held is None:
            return Abstain(fits[0], vote or len(sites) // 2 + 1, when, refusal, pool=pool)
        choosing = len(fits) > 1 or len(sites) > 1
        to_choose, to_set, to_state = _dealt(*held, choosing=choosing, setting=alpha is None, seed=seed)
        regions, votes = fits[0], 1
        if to_choose is not None:
            regions, votes = _chosen(fits, to_choose, alpha, budget, free=layer is None, vote=vote)
        if to_set is not None:
            regions = _within_budget(regions, votes, to_set, budget, sources)
        return Abstain(regions, votes, when, refusal, rates=_rates(regions, votes, *to_state, sources), pool=pool)

    act = detector(keys, others, held)
    if not control or fixed or others is None:
        return act
    sources = []  # of shuffled labels there are none
    # Documents of unequal lengths can leave too few queries for a task once they are shuffled, and that is no news.
    with suppress(LensUnlearnError), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        shuffled = detector(*keys.shuffled(others, seed), None if held is None else held[0].shuffled(held[1], seed))
        return replace(act, rates={**act.rates, "control": shuffled.rates})
    return act


def _parted(
    keys: KeySample, others: KeySample, *, contrasts: bool, seed: int
) -> tuple[KeySample, KeySample | None, tuple[KeySample, KeySample]]:
    """Hold out queries of both sides; only a contrast is fitted on retain queries, which otherwise are all held out."""
    keys, inside = keys.split(0.6, 0.4, seed=seed)
    fitted, outside = others.split(0.4, 0.6, seed=seed) if contrasts else (None, others)
    return keys, fitted, (inside, outside)


def _check(
    model: Model | None,
    forget: Any,
    retain: Any,
    *,
    layer: int | Sequence[int] | None = None,
    alpha: float | None = None,
    coverage: float = 1.0,
    region: str = "box",
    vote: int | None = None,
    when: str = "prompt",
    pool: str = "last",
    false_alarms: float = 0.05,
    site: str = "mlp.post",
    held_out: Any = None,
    refusal: str = REFUSAL,
    seed: int = 0,
    batch_size: int | None = None,
    **_: Any,
) -> None:
    """Refuse options and corpora; without a model, options alone. Of corpora, the queries are dealt out as they will be."""
    retain = _listed(retain) or None
    for name, given, known in (
        ("region", region, (*SHAPES, "auto")),
        ("when", when, ("prompt", "every_token")),
    ):
        if given not in known:
            raise LensUnlearnError(f"{name}={given!r} is not known: choose from {', '.join(known)}")
    check_pool(pool)
    for keys in (forget, *(retain or []), *(held_out or ())):
        if isinstance(keys, KeySample) and keys.pool != pool:
            raise LensUnlearnError(
                f"pool={pool!r} is asked of keys that were collected with pool={keys.pool!r}: collect them so, or give that here"
            )
    given_layers = [] if layer is None else [layer] if not isinstance(layer, list | tuple) else layer
    for number in given_layers:
        Range(whole=True, what="is no number of a layer").check(number, "layer")
    Range(0, 1, above=True, what="is out of range").check(coverage, "coverage")
    Range(0, above=True, what="is out of range").check(1 if alpha is None else alpha, "alpha")
    Range(1 if model is None else -math.inf, whole=True, what="is no number of layers").check(
        1 if vote is None else vote, "vote"
    )
    check_fraction(false_alarms, "false_alarms")
    site = check_kind(site)
    check_numbers(seed=seed, batch_size=batch_size)
    if not isinstance(refusal, str):
        raise LensUnlearnError(f"refusal={refusal!r} is no text")
    if model is None:
        return
    layers = layers_of(layer, vote, _having(model, forget, site), site)
    fixed = layer is not None and alpha is not None and region != "auto"
    if retain is None and not fixed and held_out is None:
        raise CorpusError("choosing a layer or alpha needs retain queries: give retain, or both layer and alpha")
    if retain is None and region in _CONTRASTS:
        raise CorpusError(f"region={region!r} needs retain queries to fit on: give retain")
    parts = _listed(retain)
    if held_out is not None or not parts or not all(isinstance(part, Corpus) for part in (forget, *parts)):
        return  # of keys that are collected, nothing is lost by finding out later
    keys, others = (KeySample.joined([query_places(part, seed=seed) for part in side]) for side in ([forget], parts))
    if not fixed:
        contrasts, choosing = region in _CONTRASTS, region == "auto" or len(layers) > 1
        keys, others, held = _parted(keys, others, contrasts=contrasts, seed=seed)
        _dealt(*held, choosing=choosing, setting=alpha is None, seed=seed)
    for part, name in ((keys, "forget"), (others if region in _CONTRASTS else None, "retain")):
        if part is not None and part.n < FEWEST:
            raise CorpusError(
                f"{part.n} {name} queries are too few to fit a region: at least {FEWEST}; read more tokens, or shorter rows"
            )


def _listed(retain: Any) -> list[Any]:
    return [] if retain is None else list(retain) if isinstance(retain, list | tuple) else [retain]


def _dealt(
    inside: KeySample, outside: KeySample, *, choosing: bool, setting: bool, seed: int
) -> tuple[tuple[KeySample, KeySample] | None, KeySample | None, tuple[KeySample, KeySample]]:
    """Deal held-out documents to three tasks: (forget, retain) to choose on, retain to set alpha on, and both to state rates on."""
    # Rates would flatter on queries that chose anything. And alpha set on queries that chose the layer lets in too many others: of
    # several layers, the one whose limit happens to be too wide detects most.
    dealt = []
    for part, name, shares in (
        (inside, "forget", {"choose": int(choosing), "state rates": 1}),
        (outside, "retain", {"choose": int(choosing), "set alpha": 2 * setting, "state rates": 1}),
    ):
        if part.n < FEWEST:
            raise CorpusError(
                f"{part.n} held-out {name} queries are too few to choose on: at least {FEWEST}; read more tokens, or shorter rows"
            )
        tasks = [task for task, share in shares.items() if share]
        parts = dict(zip(tasks, part.split(*(shares[task] for task in tasks), seed=seed), strict=True))
        dealt.append(parts)
    forget, retain = dealt
    to_choose = (forget["choose"], retain["choose"]) if choosing else None
    return to_choose, retain.get("set alpha"), (forget["state rates"], retain["state rates"])


def _chosen(
    fits: Sequence[Regions],
    held: tuple[KeySample, KeySample],
    alpha: float | None,
    budget: float,
    *,
    free: bool,
    vote: int | None,
) -> tuple[Regions, int]:
    """Choose shape, layers and votes by detection within the budget, or by the difference of the rates at a given alpha."""
    best: tuple[tuple[float, float], Regions, int] | None = None
    for regions in fits:
        forget, retain = (_scores(regions, part) for part in held)
        scores = _Scores(forget, retain)
        for some, votes in _juries(scores.ranked(regions, alpha, budget), free=free, vote=vote):
            chosen = {s: regions[s] for s in sorted(some)}
            if alpha is None:
                chosen = scores.limits(chosen, votes, budget)
            found, cost = (float(_inside(chosen, votes, part).double().mean()) for part in (forget, retain))
            areas = [auc(forget[s], retain[s])[0] for s in chosen]
            quality = (found - (0.0 if alpha is None else cost), sum(areas) / len(areas))
            if best is None or quality > best[0]:
                best = quality, chosen, votes
    assert best is not None
    return best[1:]


def _within_budget(
    regions: Regions, votes: int, retain: KeySample, budget: float, sources: Sequence[Int[Tensor, "documents"]] = ()
) -> Regions:
    """Multiply all limits by the largest factor at which a fresh retain query is inside with a probability within the budget.

    A fresh query is as likely at each place in the order of itself and m others, so it is one of the lowest j + 1 with a
    probability of (j + 1) / (m + 1), and j = budget (m + 1) - 1 of the m may be inside: split conformal prediction. Of documents
    with several queries, m is the effective number. Of several sources, each by its documents, the smallest factor is taken.
    """
    # A query is inside from its votes-th smallest ratio of score to limit on. These queries set that factor alone, and no limit of
    # a layer: the argument above needs that.
    ratios = torch.stack([score / max(regions[s].limit, TINY) for s, score in _scores(regions, retain).items()])
    smallest = ratios.sort(0).values[votes - 1]
    units = retain.documents(next(iter(regions)))
    parts = [torch.isin(units, documents) for documents in sources] or [torch.ones_like(units, dtype=torch.bool)]
    factor = min(_factor(smallest[part], units[part], budget) for part in parts)
    return {s: region.at(factor * region.limit) for s, region in regions.items()}


def _factor(smallest: Float[Tensor, "queries"], units: Int[Tensor, "queries"], budget: float) -> float:
    """Return the largest factor at which a fresh query is inside with a probability within the budget."""
    m = _effective(smallest, units) if len(smallest) else 0.0
    allowed = math.floor((budget * (m + 1) - 1) * len(smallest) / max(m, 1.0) + 1e-9)
    if allowed < 0 < budget:
        warnings.warn(
            f"false_alarms={budget:g} cannot be kept by alpha set on {m:.0f} independent retain queries, so this abstains from "
            f"nothing: {1 / budget - 1:.0f} are needed; give more retain documents, or raise false_alarms",
            RuntimeWarning,
            stacklevel=5,
        )
    # The last digits of a product are rounded: a hair below the first query that may not be inside, or above the last of all.
    return 0.0 if allowed < 0 else _limit(smallest, allowed) * (1 - 1e-6 if allowed < len(smallest) else 1 + 1e-6)


def _effective(scores: Float[Tensor, "queries"], units: Int[Tensor, "queries"]) -> float:
    """Return how many independent queries say as much: n / (1 + (size - 1) rho), rho the intraclass correlation of the ranks."""
    _, place, sizes = units.unique(return_inverse=True, return_counts=True)
    n, count, sizes = len(scores), len(sizes), sizes.double()
    if count == n or count == 1:
        return float(count)
    ranks = scores.argsort().argsort().double()
    means = torch.zeros(count, dtype=torch.float64).index_add_(0, place, ranks) / sizes
    between = float((sizes * (means - ranks.mean()).square()).sum()) / (count - 1)
    within = float((ranks - means[place]).square().sum()) / (n - count)
    typical = float(sizes.square().sum()) / n
    of_one = (n - typical) / (count - 1)
    correlation = (between - within) / max(between + (of_one - 1) * within, 1e-30)
    return n / (1 + (typical - 1) * min(max(correlation, 0.0), 1.0))


def _scores(regions: Regions, keys: KeySample) -> dict[Site, Float[Tensor, "queries"]]:
    return {s: region.score(keys[s].flatten(1)) for s, region in regions.items()}


def _inside(regions: Regions, votes: int, scores: Mapping[Site, Tensor]) -> Bool[Tensor, "queries"]:
    """Say which queries are inside at so many sites."""
    return torch.stack([scores[s] <= region.limit for s, region in regions.items()]).sum(0) >= votes


def _rates(
    regions: Regions,
    votes: int,
    forget: KeySample,
    retain: KeySample,
    sources: Sequence[Int[Tensor, "documents"]] = (),
) -> dict[str, Any]:
    """State detection and false positive rates, with 95 % intervals, on queries that nothing was fitted to or chosen on."""
    rates: dict[str, Any] = {}
    of_forget, of_retain = _scores(regions, forget), _scores(regions, retain)
    for name, part, scores in (("detection", forget, of_forget), ("false_alarms", retain, of_retain)):
        hits = _inside(regions, votes, scores)
        low, high = wilson_of_units(hits, part.documents(next(iter(regions))))
        rates[name] = [float(hits.double().mean()), low, high, len(hits)]
        if name == "false_alarms" and sources:
            units = part.documents(next(iter(regions)))
            inside = [torch.isin(units, documents) for documents in sources]
            rates["false_alarms of each"] = [
                [float(hits[own].double().mean()), *wilson_of_units(hits[own], units[own]), int(own.sum())]
                for own in inside
                if bool(own.any())
            ]
    rates["auc"] = {str(s): auc(of_forget[s], of_retain[s])[0] for s in regions}
    return rates


def _juries(ranked: list[Site], *, free: bool, vote: int | None) -> list[tuple[list[Site], int]]:
    """List which sites may vote together, and how many have to agree."""
    if not free:
        return [(ranked, vote or len(ranked) // 2 + 1)]
    if vote is not None:
        return [(ranked[: 2 * vote - 1], vote)]
    return [(ranked[: 2 * v - 1], v) for v in range(1, (len(ranked) + 1) // 2 + 1)]


def _having(model: Model, forget: Any, site: str) -> list[int]:
    """Return the layers that can be asked for: those of keys that are given, or those of the model that have such a site."""
    if not isinstance(forget, KeySample):
        return layers_with(model, site)
    found = [place.layer for place in forget.sites if place.kind == site]
    if not found:
        raise LensUnlearnError(f"there is no key of {site}: collect over it first")
    return sorted(found)


def layers_of(layer: int | Sequence[int] | None, vote: int | None, having: Sequence[int], site: str) -> list[int]:
    """Choose among the layers that have a kind of site; negative numbers count these from the last.

    Raises:
        LensUnlearnError: If there is no such layer, or there are too few for a vote.
    """
    count = len(having)
    if layer is None:
        if vote is not None and not 1 <= vote <= (count + 1) // 2:
            raise LensUnlearnError(f"vote={vote} needs {2 * vote - 1} layers for a majority, and there are {count}")
        return list(having)
    given = [layer] if isinstance(layer, int) else list(layer)
    if not given:
        raise LensUnlearnError(f"layer={layer!r} names no layer: give one at least, or None to choose")
    for number in given:
        if number not in having and not -count <= number < 0:
            whole = list(having) == list(range(count))
            known = f"layers 0 to {count - 1}" if whole else f"{site} in layers {', '.join(map(str, having))}"
            raise LensUnlearnError(f"there is no layer {number}: this model has {known}, -1 is the last")
    found = sorted({having[number] if number < 0 else number for number in given})
    if vote is not None and not 1 <= vote <= len(found):
        raise LensUnlearnError(f"vote={vote} of {len(found)} layers: from 1 to the number of layers")
    return found


@dataclass
class _Scores:
    """Scores at every site of the queries to choose on."""

    forget: Mapping[Site, Float[Tensor, "queries"]]
    retain: Mapping[Site, Float[Tensor, "others"]]

    def ranked(self, regions: Mapping[Site, Region], alpha: float | None, budget: float) -> list[Site]:
        """Order the sites: by detection within the budget, or by the difference of the rates at a given alpha; then by AUC."""

        def quality(site: Site) -> tuple[float, float]:
            limit = _limit(self.retain[site], _of(budget, self.retain[site])) if alpha is None else regions[site].limit
            found = float((self.forget[site] <= limit).float().mean())
            cost = 0.0 if alpha is None else float((self.retain[site] <= limit).float().mean())
            return found - cost, auc(self.forget[site], self.retain[site])[0]

        return sorted(regions, key=quality, reverse=True)

    def limits(self, regions: Mapping[Site, Region], vote: int, budget: float) -> dict[Site, Region]:
        """Set every region's limit at one share of retain queries inside, the largest at which the vote keeps the budget."""
        shares = sorted({i / 200 for i in range(201)} | {budget})
        best = {s: _limit(self.retain[s], 0) for s in regions}
        for share in shares:
            tried = {s: _limit(self.retain[s], _of(share, self.retain[s])) for s in regions}
            votes = torch.stack([self.retain[s] <= tried[s] for s in regions]).sum(0) >= vote
            if int(votes.sum()) > _of(budget, votes):
                break
            best = tried
        return {s: region.at(best[s]) for s, region in regions.items()}


def _limit(scores: Float[Tensor, "queries"], allowed: int) -> float:
    """Return the largest limit that no more than so many scores are within: just below the next one."""
    ordered = scores.sort().values  # and limits in its precision, in which scores are compared with them
    if allowed < len(ordered) and bool(torch.isfinite(ordered[allowed])):
        return float(torch.nextafter(ordered[allowed], ordered.new_zeros(())))
    finite = ordered[torch.isfinite(ordered)]
    return float(finite[-1]) if len(finite) else 0.0


def _of(share: float, queries: Tensor) -> int:
    """Return how many queries are a share of them."""
    return int(share * len(queries) + 1e-9)


METHOD = Method(
    name="key-space-detection",
    function=key_space_detection,
    fitted_to=KeySample,
    strength="false_alarms",
    grid=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4),
    check=_check,
    control=shuffled_controls,
    control_words=SHUFFLED_LABELS,
    by_source=True,
    summary="Abstains from prompts whose key lies where the keys of the forget prompts lie (Li, Sun and Weng 2025).",
)
