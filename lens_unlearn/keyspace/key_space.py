"""How the keys of several skills lie in key space, at every site: `key_space` measures, `KeySpace` holds the results.

Every region is fitted on one half of a skill's documents, and every rate is measured on the other half and on the other
halves of the other skills: nothing is judged on a query it was fitted on.
Knows corpora, and has their keys collected; knows nothing of interventions, nor of how the results are drawn.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.counter_rng import key_of
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.corpora.corpus import Corpus, require_corpus
from lens_unlearn.keyspace.regions import FEWEST, Region, Shape, fit_region
from lens_unlearn.keyspace.separation import (
    POOLED,
    Mahalanobis,
    Plane,
    Value,
    against,
    best_scale,
    centre_distance,
    cluster_agreement,
    coverage,
    unit_weights,
)
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.loading import model_name
from lens_unlearn.model.pooling import Pool
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.key_sample import KeySample

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["KeySpace", "key_space"]

CAPACITY = 400
CONTROL = "shuffled labels"
"""Stands for a skill that is none: an equal part of the queries of every skill."""

Keys = Mapping[str, Float[Tensor, "_ n"]]


@dataclass(frozen=True, eq=False)
class KeySpace:
    """What `key_space` measured, for tables and figures.

    Of a skill against another one (or against all of them, "others"), on held-out queries, with intervals:

    - `auc_box`, ...: probability that a query of the skill has the lower distance: one for each of `distances`
    - `area_between`: area between the two coverage curves over log c, as a share of what it can be at the mean distance
      between pairs: 1 if every query of the skill is inside a smaller box than any of the other, 0 if none is on average
    - `best_scale`: the box scale c at which the coverages differ most; NaN if the skill's is never the larger
    - `best_gap`: that difference. Its place was chosen on the same queries: no rate to expect elsewhere

    The AUCs of "shuffled labels" are the control: of regions fitted to an equal part of every skill's queries, 0.5 but for chance.

    Of the fitted boxes: `log_volume` (sum of log sigma), `k` (the scale that covers the fitted queries), `floored`
    (coordinates whose sigma was raised to the floor), and `centre_distance` between two of them (root mean square over
    coordinates of (mu_a - mu_b) / sqrt((sigma_a^2 + sigma_b^2) / 2)).

    Of a site: `adjusted_rand`, the agreement with the skills of as many k-means clusters, fitted on one half of the
    queries and read on the other (1: the same, 0: by chance); `silhouette` of these clusters, and `silhouette_skills`
    of the skills, both in [-1, 1].
    """

    distances: ClassVar[tuple[str, ...]] = ("box", "ellipsoid", "mahalanobis", "clusters")
    others: ClassVar[str] = POOLED
    control: ClassVar[str] = CONTROL

    skills: tuple[str, ...]
    values: Mapping[tuple[Site, str, str, str], Value]
    """By site, skill, other and measure; skill and other are "" where there is none."""
    scores: Mapping[tuple[Site, str, str], Mapping[str, Float[Tensor, "_"]]]
    """Held-out queries' distances: by site, distance and fitted skill, then by the skill that the queries are of."""
    planes: Mapping[Site, Plane]
    provenance: Mapping[str, Any]

    @property
    def sites(self) -> list[Site]:
        """The sites, by kind and layer."""
        return list(self.planes)

    def value(self, site: Site, measure: str, skill: str = "", other: str = "") -> Value:
        """Return one measure; NaN if it was not taken."""
        return self.values.get((site, skill, other, measure), Value(math.nan))

    def scores_of(self, site: Site, distance: str, skill: str, other: str) -> Float[Tensor, "queries"]:
        """Return the distances from a skill's region of the held-out queries of a skill, or of all "others"."""
        return _scores_of(self.scores[site, distance, skill], skill, other)

    def coverage(self, site: Site, skill: str, other: str, scale: Float[Tensor, "scales"]) -> Float[Tensor, "scales"]:
        """Return the share of held-out queries inside mu +- c sigma of a skill's box, at each scale c."""
        return coverage(self.scores_of(site, "box", skill, other), scale)

    def to_frame(self) -> "pd.DataFrame":
        """Give one row per site, skill, other and measure; `low` and `high` are 95 % intervals over units."""
        import pandas as pd

        columns = ["site", "layer", "skill", "other", "measure", "value", "low", "high"]
        rows = [[str(s), s.layer, skill, other, name, *value] for (s, skill, other, name), value in self.values.items()]
        return pd.DataFrame(rows, columns=pd.Index(columns))

    def table(self) -> "pd.DataFrame":
        """Give a small table for reading: AUC of every distance against all other skills, and the clusters, by site."""
        import pandas as pd

        rows = {}
        for site in self.sites:
            rows_of = (*self.skills, CONTROL)
            aucs = {(s, d): self.value(site, f"auc_{d}", s, POOLED).value for s in rows_of for d in self.distances}
            clusters = {("k-means", name): self.value(site, name).value for name in ("adjusted_rand", "silhouette")}
            rows[str(site)] = {**aucs, **clusters}
        return pd.DataFrame.from_dict(rows, orient="index").round(3)

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(site.kind for site in self.sites))
        extent = f"{len(self.skills)} skills, {len(self.sites)} sites, {kinds}"
        return f"KeySpace({extent}; {self.queries})\nAUC against all other skills\n{self.table().to_string()}"

    def _repr_html_(self) -> str:
        corpora = "; ".join(f"{name}: {source}" for name, source in self.provenance["corpora"].items())
        caption = html.escape(f"AUC against all other skills · {self.provenance['model']} · {corpora} · {self.queries}")
        return f"<div>{self.table().to_html()}<p><small>{caption}</small></p></div>"

    @property
    def queries(self) -> str:
        """Say how many queries were fitted and held out."""
        means = ", means over prompts" if self.provenance.get("pool") == "mean" else ""
        return f"{self.provenance['fitted']:,} queries a skill fitted, {self.provenance['held_out']:,} held out{means}"


def key_space(
    model: Model,
    corpora: Mapping[str, Corpus],
    sites: str | Site | Sequence[str | Site] = "mlp.post",
    *,
    capacity: int = CAPACITY,
    pool: Pool = "last",
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> KeySpace:
    """Compare where the keys of several skills lie: coverage of boxes, four distances, clusters, and a map, per site.

    A key is the activation at the last token of a prompt, or the mean over its tokens (`pool`). A corpus of plain texts is cut into
    prompts at random places first (`Corpus.with_prompts`). Prompts with their natural endings may be separated by the last token
    alone: to compare skills, cut question-answer corpora as well.

    Each corpus is split by document into a half that regions are fitted on and a half that everything is measured on;
    documents with a query that is word for word also in the first half are left out of the second. Every skill has
    as many queries as the one with the fewest, so that volumes and clusters can be compared.

    Args:
        model: A `TransformerBridge` or `HookedTransformer`.
        corpora: Queries of two skills or more, by name: prompts with answers, or texts.
        sites: Where to take the keys.
        capacity: The most queries of a skill in each half. They take 4 bytes x coordinates, over all sites.
        pool: "last" for the key of the prompt's last token, "mean" for the mean over its tokens, as in `query_keys`.
        seed: Of the split, the draws, the clusterings, and the places where texts are cut.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        progress: Whether to show bars.

    Raises:
        CorpusError: If there are not enough queries or documents.
        SiteError: If a site does not exist.
        LensUnlearnError: If there are fewer than two corpora, `pool` is not known, or all queries of a skill have the same
            key.
    """
    require_model(model)
    if not isinstance(corpora, Mapping) or len(corpora) < 2 or {POOLED, CONTROL, ""} & set(corpora):
        raise LensUnlearnError(
            f"key_space compares two corpora or more: pass them by name (other than {POOLED!r} and {CONTROL!r}), "
            'as in {"python": code, "english": prose}'
        )
    for name, corpus in corpora.items():
        require_corpus(corpus, f"the corpus {name!r}")
    if capacity < FEWEST:
        raise LensUnlearnError(f"capacity={capacity} leaves too few queries to fit a region: give at least {FEWEST}")
    queries = {name: c if c.has_prompts else c.with_prompts(seed=seed) for name, c in corpora.items()}
    halves = {name: _halves(name, corpus, seed) for name, corpus in queries.items()}
    options = {"batch_size": batch_size, "progress": progress}
    samples = []
    for part in (0, 1):
        n = min(capacity, *(pair[part].n_rows for pair in halves.values()))
        statistic = KeySample(n, seed=seed, pool=pool)
        drawn = {name: pair[part].sample(n, seed) for name, pair in halves.items()}
        samples.append({name: collect(model, c, sites, statistic=statistic, **options) for name, c in drawn.items()})
    fit, held = samples
    first = next(iter(held.values()))
    units = {name: sample.documents(first.sites[0]) for name, sample in held.items()}
    values, scores, planes = {}, {}, {}
    for site in sorted(first.sites, key=lambda site: (site.kind, site.layer)):
        to_fit, to_judge = ({name: sample[site].flatten(1) for name, sample in half.items()} for half in samples)
        measures, distances, planes[site] = _at_site(site, to_fit, to_judge, units, seed)
        values |= {(site, *key): value for key, value in measures.items()}
        scores |= {(site, *key): value for key, value in distances.items()}
    provenance = {
        "model": model_name(model),
        "corpora": {name: corpus.name for name, corpus in queries.items()},
        "fitted": next(iter(fit.values())).n,
        "held_out": first.n,
        "seed": seed,
        "pool": pool,
    }
    return KeySpace(tuple(corpora), values, scores, planes, provenance)


def _halves(name: str, corpus: Corpus, seed: int) -> tuple[Corpus, Corpus]:
    """Return queries to fit on, and queries to judge on, of other documents and with other words."""
    fit, held = corpus.queries().split(0.5, 0.5, seed=seed)
    known = {tuple(fit.row(i).tolist()) for i in range(fit.n_rows)}
    repeated = {int(held.document[i]) for i in range(held.n_rows) if tuple(held.row(i).tolist()) in known}
    new = sorted(set(range(held.n_documents)) - repeated)
    held = held.only(new) if new else None
    count = held.n_rows if held else 0
    if held is None or min(fit.n_rows, count) < FEWEST:
        raise CorpusError(
            f"{name}: {fit.n_rows} queries to fit on and {count} others to judge on are too few, at least {FEWEST} each: "
            f"{corpus.more()}"
        )
    return fit, held


def _scores_of(scores: Mapping[str, Tensor], skill: str, other: str) -> Tensor:
    """Return the scores of the queries of one skill, or of all but the skill fitted, if asked for the pooled others."""
    return torch.cat([scores[name] for name in scores if name != skill]) if other == POOLED else scores[other]


def _distances(keys: Float[Tensor, "keys n"], seed: int) -> dict[str, Region | Mahalanobis]:
    shapes: tuple[Shape, ...] = ("box", "ellipsoid", "clusters")
    return {**{shape: fit_region(keys, shape, seed=seed) for shape in shapes}, "mahalanobis": Mahalanobis.fit(keys)}


def _equal_parts(keys: Keys) -> dict[str, int]:
    """Return how many queries of each skill make up as many as one skill has."""
    n, skills = len(next(iter(keys.values()))), len(keys)
    return {name: n * (i + 1) // skills - n * i // skills for i, name in enumerate(keys)}


def _at_site(
    site: Site, fit: Keys, held: Keys, units: Mapping[str, Tensor], seed: int
) -> tuple[dict[tuple[str, str, str], Value], dict[tuple[str, str], dict[str, Tensor]], Plane]:
    """Measure one site: values by skill, other and measure, and scores by distance and skill."""
    values: dict[tuple[str, str, str], Value] = {}
    scores: dict[tuple[str, str], dict[str, Tensor]] = {}
    boxes = {}
    draw = key_of("key space", seed)
    weights = {name: unit_weights(part, draw) for name, part in units.items()}
    for skill, keys in fit.items():
        try:
            distances = _distances(keys, seed)
        except LensUnlearnError as error:
            raise LensUnlearnError(f"{skill} at {site}: {error}") from error
        box = boxes[skill] = distances["box"]
        assert isinstance(box, Region)
        for name, value in (("log_volume", box.log_volume), ("k", box.k), ("floored", float(box.floored))):
            values[skill, "", name] = Value(value)
        for distance, region in distances.items():
            from_region = scores[distance, skill] = {name: region.score(part).double() for name, part in held.items()}
            for other, value in against(from_region, skill, weights, "auc").items():
                values[skill, other, f"auc_{distance}"] = value
        from_box = scores["box", skill]
        for other, value in against(from_box, skill, weights, "area").items():
            values[skill, other, "area_between"] = value
            scale, gap = best_scale(from_box[skill], _scores_of(from_box, skill, other))
            values[skill, other, "best_scale"], values[skill, other, "best_gap"] = Value(scale), Value(gap)
    # Labels mean nothing to the control: it is fitted to, and detects, an equal part of each skill's queries.
    shares = _equal_parts(fit), _equal_parts(held)
    mixed = torch.cat([keys[: shares[0][name]] for name, keys in fit.items()])
    parts = {
        CONTROL: {n: slice(None, k) for n, k in shares[1].items()},
        POOLED: {n: slice(k, None) for n, k in shares[1].items()},
    }
    dealt = {
        label: unit_weights(torch.cat([units[name][cut] for name, cut in cuts.items()]), draw)
        for label, cuts in parts.items()
    }
    for distance, region in _distances(mixed, seed).items():
        of = {name: region.score(keys).double() for name, keys in held.items()}
        of_parts = {label: torch.cat([of[name][cut] for name, cut in cuts.items()]) for label, cuts in parts.items()}
        values[CONTROL, POOLED, f"auc_{distance}"] = against(of_parts, CONTROL, dealt, "auc")[POOLED]
    for a in boxes:
        values |= {(a, b, "centre_distance"): Value(centre_distance(boxes[a], boxes[b])) for b in boxes if b != a}
    values |= {("", "", name): Value(value) for name, value in cluster_agreement(fit, held, seed).items()}
    return values, scores, Plane.fit(fit, held, boxes, seed)
