"""Key Space Detection: abstain from queries whose key lies where the forget skill's keys lie.

Source: Li, Sun, Weng, "Effective Skill Unlearning through Intervention and Abstention" (NAACL 2025, arXiv 2503.21730).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.collecting import collect
from lens_unlearn.corpora import Corpus
from lens_unlearn.errors import CorpusError, LensUnlearnError
from lens_unlearn.interventions import REFUSAL, Abstain
from lens_unlearn.maps import check_fraction
from lens_unlearn.regions import FEWEST, Region, Shape, fit_region
from lens_unlearn.sites import Model, Site
from lens_unlearn.statistics import KeySample

__all__ = ["auc", "key_space_detection", "query_keys"]

CAPACITY = 4000


def query_keys(
    model: Model,
    corpus: Corpus,
    sites: str | Site | Sequence[str | Site] = "mlp.post",
    *,
    capacity: int = CAPACITY,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> KeySample:
    """Sample the keys at the last token of each prompt of a corpus.

    A corpus of plain texts is cut into prompts at random places first (`Corpus.with_prompts`).

    Args:
        model: A `TransformerBridge` or `HookedTransformer`.
        corpus: Queries: prompts with answers, or texts.
        sites: Where to take the keys.
        capacity: The most queries to keep, drawn uniformly.
        seed: Of the draw, and of the places where texts are cut.
        batch_size: Full-length rows per forward.
        progress: Whether to show bars.

    Raises:
        CorpusError: If nothing is long enough to make a prompt.
    """
    queries = (corpus if corpus.has_prompts else corpus.with_prompts(seed=seed)).queries()
    return collect(
        model, queries, sites, statistic=KeySample(capacity, seed=seed), batch_size=batch_size, progress=progress
    )


def key_space_detection(
    model: Model,
    forget: Corpus,
    retain: Corpus | None = None,
    *,
    layer: int | Sequence[int] | None = None,
    alpha: float | None = None,
    coverage: float = 1.0,
    region: Shape = "box",
    vote: int = 1,
    when: Literal["prompt", "every_token"] = "prompt",
    false_alarms: float = 0.05,
    site: str = "mlp.post",
    held_out: tuple[Corpus, Corpus] | None = None,
    refusal: str = REFUSAL,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> Abstain:
    """Fit a region to the keys of the forget skill's queries, and abstain from queries inside.

    With `layer` and `alpha` given this is the published method, and `retain` is not looked at. What is left out is chosen
    on held-out queries: alpha as the largest at which no more than `false_alarms` of the retain queries are inside, the
    layer as the one with the highest detection rate then. With several layers or `vote` > 1 the same share of false alarms
    holds for the vote. The rates reached on the held-out queries, with intervals, are in `Abstain.rates`.

    A region is fitted at the last token of each prompt, and a corpus of plain texts is cut into prompts at random places
    first. alpha means something only together with the floor on sigma, see `fit_region`.

    Args:
        model: A `TransformerBridge` or `HookedTransformer`.
        forget: Queries of the skill to remove.
        retain: Queries of what is to stay; needed unless both `layer` and `alpha` are given.
        layer: One layer, several that vote, or None to choose; -1 is the last.
        alpha: The limit in units of the score that covers the fit, or None to choose.
        coverage: Share of the fitted queries that alpha = 1 covers, in (0, 1].
        region: "box" (published), "ellipsoid" or "clusters".
        vote: How many layers have to agree. If more than the layers given by `layer`, an error; with layer=None the best
            2 vote - 1 layers are taken, so that it is a majority.
        when: "prompt" or "every_token", see `Abstain`.
        false_alarms: Budget: the largest share of held-out retain queries to abstain from, where alpha is chosen.
        site: Kind of site: "mlp.post" are the keys of the published method.
        held_out: Queries (forget, retain) to choose on, if they should not be split off; default: 40 % of the forget
            documents, and all of retain, which the fit does not see.
        refusal: What `lu.generate` writes for an abstained row.
        seed: Of the split, the sample and the places where texts are cut.
        batch_size: Full-length rows per forward.
        progress: Whether to show bars.

    Raises:
        CorpusError: If there are no queries to fit or to choose on.
        LensUnlearnError: If a layer does not exist, an argument is out of range, or there are too few queries.
    """
    layers = _layers(layer, vote, int(model.cfg.n_layers))
    sites = [Site(number, site) for number in layers]
    told = {"seed": seed, "batch_size": batch_size, "progress": progress}
    fixed = layer is not None and alpha is not None
    budget = check_fraction(false_alarms, "false_alarms")
    if not fixed and held_out is None:
        if retain is None:
            raise CorpusError("choosing a layer or alpha needs retain queries: give retain, or both layer and alpha")
        fit, forget_out = forget.split(0.6, 0.4, seed=seed)
        held_out = (forget_out, retain)
    else:
        fit = forget
    keys = query_keys(model, fit, sites, **told)
    regions = {
        s: fit_region(keys[s].flatten(1), region, coverage=coverage, alpha=alpha or 1.0, seed=seed) for s in sites
    }
    if fixed or held_out is None:
        return Abstain(regions, vote, when, refusal)
    inside, outside = (query_keys(model, part, sites, **told) for part in held_out)
    for part, name in ((inside, "forget"), (outside, "retain")):
        if part.n < FEWEST:
            raise CorpusError(f"{part.n} held-out {name} queries are too few to choose on: at least {FEWEST}")
    scores = _Scores(
        {s: regions[s].score(inside[s].flatten(1)) for s in sites},
        {s: regions[s].score(outside[s].flatten(1)) for s in sites},
    )
    if layer is None:
        ranked = sorted(sites, key=lambda s: scores.quality(s, regions[s], alpha, budget), reverse=True)
        sites = sorted(ranked[: 2 * vote - 1])
    if alpha is None:
        regions = scores.limits({s: regions[s] for s in sites}, vote, budget)
    chosen = {s: regions[s] for s in sites}
    return Abstain(chosen, vote, when, refusal, rates=scores.rates(chosen, vote))


def _layers(layer: int | Sequence[int] | None, vote: int, count: int) -> list[int]:
    if layer is None:
        if not 1 <= vote <= (count + 1) // 2:
            raise LensUnlearnError(f"vote={vote} needs {2 * vote - 1} layers for a majority, and there are {count}")
        return list(range(count))
    given = [layer] if isinstance(layer, int) else list(layer)
    for number in given:
        if not -count <= number < count:
            raise LensUnlearnError(
                f"there is no layer {number}: this model has layers 0 to {count - 1}, -1 is the last"
            )
    found = sorted({number % count for number in given})
    if not 1 <= vote <= len(found):
        raise LensUnlearnError(f"vote={vote} of {len(found)} layers: from 1 to the number of layers")
    return found


@dataclass
class _Scores:
    """Held-out queries' scores at every site."""

    forget: Mapping[Site, Float[Tensor, "queries"]]
    retain: Mapping[Site, Float[Tensor, "queries"]]

    def quality(self, site: Site, region: Region, alpha: float | None, budget: float) -> tuple[float, float]:
        """Rank a site: by detection within the budget, or by the difference of the rates at a given alpha; then by AUC."""
        limit = _limit(self.retain[site], budget) if alpha is None else region.limit
        found = float((self.forget[site] <= limit).float().mean())
        cost = 0.0 if alpha is None else float((self.retain[site] <= limit).float().mean())
        return found - cost, auc(self.forget[site], self.retain[site])

    def limits(self, regions: Mapping[Site, Region], vote: int, budget: float) -> dict[Site, Region]:
        """Set every region's limit at one share of retain queries inside, the largest at which the vote keeps the budget."""
        shares = torch.linspace(0, 1, 201).tolist()
        best = {s: _limit(self.retain[s], 0.0) for s in regions}
        for share in shares:
            tried = {s: _limit(self.retain[s], share) for s in regions}
            votes = torch.stack([self.retain[s] <= tried[s] for s in regions]).sum(0) >= vote
            if float(votes.float().mean()) > budget:
                break
            best = tried
        return {s: region.at(best[s]) for s, region in regions.items()}

    def rates(self, regions: Mapping[Site, Region], vote: int) -> dict[str, Any]:
        """State detection and false alarms with 95 % Wilson intervals."""
        told: dict[str, Any] = {}
        for name, scores in (("detection", self.forget), ("false_alarms", self.retain)):
            fired = torch.stack([scores[s] <= regions[s].limit for s in regions]).sum(0) >= vote
            hits, n = int(fired.sum()), len(fired)
            told[name] = [hits / n, *wilson(hits, n), n]
        told["auc"] = {str(s): auc(self.forget[s], self.retain[s]) for s in regions}
        return told


def _limit(retain: Float[Tensor, "queries"], budget: float) -> float:
    """Return the limit in the middle between the last retain query that may be inside and the first that may not."""
    ordered = retain.double().sort().values
    inside = min(int(budget * len(ordered)), len(ordered))
    if inside == len(ordered):
        return float(ordered[-1])
    low = float(ordered[inside - 1]) if inside else 0.9 * float(ordered[0])
    return (low + float(ordered[inside])) / 2 if float(ordered[inside]) > low else math.nextafter(low, 0.0)


def auc(inside: Float[Tensor, "queries"], outside: Float[Tensor, "others"]) -> float:
    """Return the probability that a query of the skill scores lower than another; ties count half."""
    both = torch.cat([inside, outside]).double()
    order = both.sort().values
    low, high = torch.searchsorted(order, both), torch.searchsorted(order, both, right=True)
    rank = (low + high + 1).double() / 2  # mean rank of ties, from 1
    n, m = len(inside), len(outside)
    return float(1 - (rank[:n].sum() - n * (n + 1) / 2) / (n * m))


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson 95 % interval of a share."""
    share, extra = hits / n, z * z / n
    middle = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(share * (1 - share) / n + extra / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)
