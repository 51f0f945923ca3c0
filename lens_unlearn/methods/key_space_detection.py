"""Key Space Detection: abstain from queries whose key lies where the forget skill's keys lie.

Source: Li, Sun, Weng, "Effective Skill Unlearning through Intervention and Abstention" (NAACL 2025, arXiv 2503.21730).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.core.intervals import auc, wilson
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.interventions.abstain import REFUSAL, Abstain
from lens_unlearn.keyspace.regions import FEWEST, Region, Shape, fit_region
from lens_unlearn.methods.controls import SHUFFLED_LABELS, shuffled_controls
from lens_unlearn.methods.method import Method
from lens_unlearn.model.host import Model
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import query_keys
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.maps import check_fraction

__all__ = ["METHOD", "key_space_detection"]

SHAPES: tuple[Shape, ...] = ("box", "ellipsoid", "clusters", "contrast")


def key_space_detection(
    model: Model,
    forget: Corpus | KeySample,
    retain: Corpus | KeySample | None = None,
    *,
    layer: int | Sequence[int] | None = None,
    alpha: float | None = None,
    coverage: float = 1.0,
    region: Shape | Literal["auto"] = "box",
    vote: int | None = None,
    when: Literal["prompt", "every_token"] = "prompt",
    false_alarms: float = 0.05,
    site: str = "mlp.post",
    held_out: tuple[Corpus | KeySample, Corpus | KeySample] | None = None,
    refusal: str = REFUSAL,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> Abstain:
    """Fit a region to the keys of the forget skill's queries, and abstain from queries inside.

    With `layer` and `alpha` given this is the published method, and `retain` is not looked at. What is left out is chosen
    on held-out queries: alpha as the largest at which no more than `false_alarms` of the retain queries are abstained from; then,
    of single layers and of majorities among the best three, five, ... layers, those that detect most of the forget queries.
    The rates reached on these held-out queries, with intervals, are in `Abstain.rates`; having been chosen on them, they
    flatter a little.

    A region is fitted at the last token of each prompt, and a corpus of plain texts is cut into prompts at random places
    first. alpha means something only together with the floor on sigma, see `fit_region`.

    Args:
        model: A `TransformerBridge` or `HookedTransformer`.
        forget: Queries of the skill to remove, or their keys (`query_keys`).
        retain: Queries of what is to be retained, or their keys; needed unless both `layer` and `alpha` are given.
        layer: One layer, several that vote, or None to choose; -1 is the last.
        alpha: The limit in units of the score that covers the fit, or None to choose.
        coverage: Share of the fitted queries that alpha = 1 covers, in (0, 1].
        region: "box" (published), "ellipsoid", "clusters", "contrast" (ours: nearer to the forget queries than to 60 % of
            the retain queries), or "auto" to choose.
        vote: How many layers have to agree; None for a majority. With layer=None, the best 2 vote - 1 layers vote, or as
            many as detect most.
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
    sites = [Site(number, site) for number in _layers(layer, vote, int(model.cfg.n_layers))]
    options = {"seed": seed, "batch_size": batch_size, "progress": progress}
    fixed = layer is not None and alpha is not None and region != "auto"
    budget = check_fraction(false_alarms, "false_alarms")
    if retain is None and not fixed and held_out is None:
        raise CorpusError("choosing a layer or alpha needs retain queries: give retain, or both layer and alpha")
    contrasts = region in ("contrast", "auto")
    if retain is None and contrasts:
        raise CorpusError(f"region={region!r} needs retain queries to fit on: give retain")

    def keys_of(part: Corpus | KeySample) -> KeySample:
        return part if isinstance(part, KeySample) else query_keys(model, part, sites, **options)

    keys = inside = outside = keys_of(forget)
    others = None if retain is None or (fixed and not contrasts) else keys_of(retain)
    if held_out is not None and not fixed:
        inside, outside = (keys_of(part) for part in held_out)
    elif not fixed and others is not None:
        keys, inside = keys.split(0.6, 0.4, seed=seed)
        # Only a contrast is fitted on retain queries; the others are all held out.
        others, outside = others.split(0.6, 0.4, seed=seed) if contrasts else (others, others)
    fitting: dict[str, Any] = {"coverage": coverage, "alpha": 1.0 if alpha is None else alpha, "seed": seed}
    fits = {
        shape: {
            s: fit_region(keys[s].flatten(1), shape, others=None if others is None else others[s].flatten(1), **fitting)
            for s in sites
        }
        for shape in (SHAPES if region == "auto" else (region,))
    }
    if fixed:
        regions = next(iter(fits.values()))
        return Abstain(regions, vote or len(sites) // 2 + 1, when, refusal)
    for part, name in ((inside, "forget"), (outside, "retain")):
        if part.n < FEWEST:
            raise CorpusError(
                f"{part.n} held-out {name} queries are too few to choose on: at least {FEWEST}; read more tokens, or shorter rows"
            )
    best: tuple[tuple[float, float], Abstain] | None = None
    for regions in fits.values():
        scores = _Scores(
            {s: regions[s].score(inside[s].flatten(1)) for s in sites},
            {s: regions[s].score(outside[s].flatten(1)) for s in sites},
        )
        for some, votes in _juries(scores.ranked(regions, alpha, budget), free=layer is None, vote=vote):
            chosen = {s: regions[s] for s in sorted(some)}
            if alpha is None:
                chosen = scores.limits(chosen, votes, budget)
            rates = scores.rates(chosen, votes)
            detection, cost = rates["detection"][0], 0.0 if alpha is None else rates["false_alarms"][0]
            quality = (detection - cost, sum(rates["auc"].values()) / len(chosen))
            if best is None or quality > best[0]:
                best = quality, Abstain(chosen, votes, when, refusal, rates=rates)
    assert best is not None
    return best[1]


def _juries(ranked: list[Site], *, free: bool, vote: int | None) -> list[tuple[list[Site], int]]:
    """List which sites may vote together, and how many have to agree."""
    if not free:
        return [(ranked, vote or len(ranked) // 2 + 1)]
    if vote is not None:
        return [(ranked[: 2 * vote - 1], vote)]
    return [(ranked[: 2 * v - 1], v) for v in range(1, (len(ranked) + 1) // 2 + 1)]


def _layers(layer: int | Sequence[int] | None, vote: int | None, count: int) -> list[int]:
    if layer is None:
        if vote is not None and not 1 <= vote <= (count + 1) // 2:
            raise LensUnlearnError(f"vote={vote} needs {2 * vote - 1} layers for a majority, and there are {count}")
        return list(range(count))
    given = [layer] if isinstance(layer, int) else list(layer)
    if not given:
        raise LensUnlearnError(f"layer={layer!r} names no layer: give one at least, or None to choose")
    for number in given:
        if not -count <= number < count:
            raise LensUnlearnError(
                f"there is no layer {number}: this model has layers 0 to {count - 1}, -1 is the last"
            )
    found = sorted({number % count for number in given})
    if vote is not None and not 1 <= vote <= len(found):
        raise LensUnlearnError(f"vote={vote} of {len(found)} layers: from 1 to the number of layers")
    return found


@dataclass
class _Scores:
    """Held-out queries' scores at every site."""

    forget: Mapping[Site, Float[Tensor, "queries"]]
    retain: Mapping[Site, Float[Tensor, "others"]]

    def ranked(self, regions: Mapping[Site, Region], alpha: float | None, budget: float) -> list[Site]:
        """Order the sites: by detection within the budget, or by the difference of the rates at a given alpha; then by AUC."""

        def quality(site: Site) -> tuple[float, float]:
            limit = _limit(self.retain[site], budget) if alpha is None else regions[site].limit
            found = float((self.forget[site] <= limit).float().mean())
            cost = 0.0 if alpha is None else float((self.retain[site] <= limit).float().mean())
            return found - cost, auc(self.forget[site], self.retain[site])[0]

        return sorted(regions, key=quality, reverse=True)

    def limits(self, regions: Mapping[Site, Region], vote: int, budget: float) -> dict[Site, Region]:
        """Set every region's limit at one share of retain queries inside, the largest at which the vote keeps the budget."""
        shares = sorted({i / 200 for i in range(201)} | {budget})
        best = {s: _limit(self.retain[s], 0.0) for s in regions}
        for share in shares:
            tried = {s: _limit(self.retain[s], share) for s in regions}
            votes = torch.stack([self.retain[s] <= tried[s] for s in regions]).sum(0) >= vote
            if int(votes.sum()) > _of(budget, votes):
                break
            best = tried
        return {s: region.at(best[s]) for s, region in regions.items()}

    def rates(self, regions: Mapping[Site, Region], vote: int) -> dict[str, Any]:
        """State detection and false positive rates with 95 % Wilson intervals."""
        rates: dict[str, Any] = {}
        for name, scores in (("detection", self.forget), ("false_alarms", self.retain)):
            fired = torch.stack([scores[s] <= regions[s].limit for s in regions]).sum(0) >= vote
            hits, n = int(fired.sum()), len(fired)
            rates[name] = [hits / n, *wilson(hits, n), n]
        rates["auc"] = {str(s): auc(self.forget[s], self.retain[s])[0] for s in regions}
        return rates


def _limit(retain: Float[Tensor, "queries"], budget: float) -> float:
    """Return the limit in the middle between the last retain query that may be inside and the first that may not."""
    ordered = retain.sort().values  # and limits in its precision, in which scores are compared with them
    inside = min(_of(budget, ordered), len(ordered))
    if inside == len(ordered):
        return float(ordered[-1])
    first = ordered[inside]
    low = torch.minimum(ordered[inside - 1] if inside else 0.9 * first, torch.nextafter(first, first.new_zeros(())))
    middle = (low + first) / 2
    return float(torch.where(middle < first, middle, low))


def _of(share: float, queries: Tensor) -> int:
    """Return how many queries are within a share of them."""
    return int(share * len(queries) + 1e-9)


METHOD = Method(
    name="key-space-detection",
    function=key_space_detection,
    fitted_to=KeySample,
    strength="false_alarms",
    grid=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4),
    control=shuffled_controls,
    control_words=SHUFFLED_LABELS,
    summary="Abstains from prompts whose key lies where the keys of the forget prompts lie (Li, Sun and Weng 2025).",
)
