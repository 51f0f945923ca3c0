"""How well distances separate the queries of one skill from those of others, and how their keys lie in a plane.

Knows tensors of keys and of scores, and regions; knows nothing of models, corpora or sites, which `key_space` does.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_unlearn.core.intervals import FEWEST, below, interval, pair_sums, weights_of, widening
from lens_unlearn.keyspace.regions import Region

__all__ = [
    "POOLED",
    "Mahalanobis",
    "Plane",
    "Value",
    "Weights",
    "against",
    "best_scale",
    "centre_distance",
    "cluster_agreement",
    "coverage",
    "unit_weights",
]

POOLED = "others"
"""Stands for all other skills together."""
DRAWS = 200
DIRECTIONS = 72
"""Corners that the shadow of a box is drawn with."""
TINY = 1e-12
"""A score of 0 has no logarithm."""


class Value(NamedTuple):
    """A measure with its bootstrap 95 % interval over units; NaN where there is none, as of fewer than ten units."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True, eq=False)
class Mahalanobis:
    """Distance from a mean under a covariance shrunk towards a multiple of the identity (Ledoit and Wolf, 2004).

    With m keys of n coordinates, centred as X, S = X'X / m, t = trace(S) / n and shrinkage s, the covariance is
    (1 - s) S + s t I. Its inverse is exact in the basis of the eigenvectors of X X' (m by m): no n by n matrix is formed.
    """

    mean: Float[Tensor, "n"]
    axes: Float[Tensor, "rank n"]
    variance: Float[Tensor, "rank"]
    rest: float
    """The variance in every direction in which the keys do not vary."""

    @classmethod
    def fit(cls, keys: Float[Tensor, "keys n"]) -> "Mahalanobis":
        """Fit mean and covariance."""
        mean = keys.double().mean(0)
        x = keys.double() - mean
        gram, (m, n) = x @ x.T, x.shape
        t = float(gram.trace()) / (m * n)
        size = float(gram.square().sum()) / m**2  # sum of the squares of the entries of S
        noise = (float(gram.diagonal().square().mean()) - size) / m
        # Never quite 0: directions in which the keys do not vary would be infinitely far.
        s = max(min(noise / (size - n * t**2), 1.0), 1e-6) if size > n * t**2 else 1.0
        spread, vectors = torch.linalg.eigh(gram)
        varying = spread > 1e-10 * spread[-1]
        axes = (vectors[:, varying] / spread[varying].sqrt()).T @ x
        return cls(mean, axes, (1 - s) * spread[varying] / m + s * t, s * t)

    def score(self, keys: Float[Tensor, "keys n"]) -> Float[Tensor, "keys"]:
        """Return the distance of every key."""
        x = keys.double() - self.mean
        along = (x @ self.axes.T).square()
        beside = (x.square().sum(-1) - along.sum(-1)).clamp_min(0)
        return ((along / self.variance).sum(-1) + beside / self.rest).sqrt()


class Weights(NamedTuple):
    """How queries are resampled by units: their documents, or the groups of these.

    Attributes:
        table: The weight of every query in each draw; in the first row, each counts once.
        sizes: How many queries each unit has.
    """

    table: Float[Tensor, "draws queries"]
    sizes: Int[Tensor, "units"]


def unit_weights(units: Int[Tensor, "queries"], seed: int) -> Weights:
    """Draw weights of queries: a unit has the same ones wherever it stands."""
    distinct, place, sizes = units.unique(return_inverse=True, return_counts=True)
    drawn = torch.from_numpy(weights_of([str(unit) for unit in distinct.tolist()], DRAWS, seed))
    return Weights(torch.cat([torch.ones(1, len(place), dtype=torch.float64), drawn[:, place]]), sizes)


def against(
    scores: Mapping[str, Float[Tensor, "_"]],
    skill: str,
    weights: Mapping[str, Weights],
    measure: Literal["auc", "area"],
) -> dict[str, Value]:
    """Compare the scores of a skill's queries with those of each other skill, and of all of them together.

    Over pairs of a query i of the skill and j of another: the AUC is the mean of [s_i < s_j] (ties count half), the area
    between the coverage curves is sum of log(s_j / s_i) over sum of abs(log(s_j / s_i)), and 0 where all are equal.
    """
    own, skill_scores = weights[skill], scores[skill].double()
    sums, sizes = {}, {}
    for other, other_scores in scores.items():
        if other != skill:
            gap = other_scores.double()[None].clamp_min(TINY).log() - skill_scores[:, None].clamp_min(TINY).log()
            auc = measure == "auc"
            tables = [below(skill_scores, other_scores), torch.ones_like(gap)] if auc else [gap, gap.abs()]
            sums[other] = torch.stack([pair_sums(table, own.table, weights[other].table) for table in tables])
            sizes[other] = weights[other].sizes
    sums[POOLED], sizes[POOLED] = torch.stack(list(sums.values())).sum(0), torch.cat(list(sizes.values()))
    return {other: _estimate(*sums[other], own.sizes, sizes[other]) for other in sums}


def _estimate(top: Float[Tensor, "draws"], bottom: Float[Tensor, "draws"], *sizes: Int[Tensor, "_"]) -> Value:
    """Return a ratio with its interval, as wide as the side with the fewest units asks for."""
    share = torch.where(bottom == 0, 0.0, top / bottom)
    value = float(share[0])
    if min(map(len, sizes)) < FEWEST:
        return Value(value)
    factor = max(widening(side.double().numpy()) for side in sizes)
    low, high = interval((value + factor * (share[1:] - value)).numpy())
    return Value(value, low, high)


def coverage(scores: Float[Tensor, "queries"], scale: Float[Tensor, "scales"]) -> Float[Tensor, "scales"]:
    """Return the share of queries inside at each scale."""
    ordered = scores.double().sort().values
    return torch.searchsorted(ordered, scale.double(), right=True).double() / len(ordered)


def best_scale(skill: Float[Tensor, "queries"], others: Float[Tensor, "others"]) -> tuple[float, float]:
    """Return the scale at which the coverage of a skill exceeds that of others most, and by how much.

    The scale lies in the middle, in proportion, of those that do equally well; NaN if none covers more of the skill.
    """
    steps = torch.cat([skill, others]).double().unique()
    gaps = coverage(skill, steps) - coverage(others, steps)
    best = int(gaps.argmax())
    if float(gaps[best]) <= 0:
        return math.nan, 0.0
    return math.sqrt(float(steps[best]) * float(steps[best + 1])), float(gaps[best])  # at the last step the gap is 0


def centre_distance(a: Region, b: Region) -> float:
    """Return the root mean square, over coordinates, of (mu_a - mu_b) / sqrt((sigma_a^2 + sigma_b^2) / 2)."""
    variance = (a.scale.double().square() + b.scale.double().square()) / 2
    return float(((a.centres[0] - b.centres[0]).double().square() / variance).mean().sqrt())


def cluster_agreement(
    fit: Mapping[str, Float[Tensor, "_ n"]], held: Mapping[str, Float[Tensor, "_ n"]], seed: int
) -> dict[str, float]:
    """Compare k-means clusters with the skills: as many clusters, fitted on one half of the keys, read on the other."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, silhouette_score

    keys = torch.cat(list(held.values())).double()
    skills = [i for i, part in enumerate(held.values()) for _ in part]
    kmeans = KMeans(len(fit), n_init=4, random_state=seed)  # pyright: ignore[reportArgumentType]
    clusters: Any = kmeans.fit(torch.cat(list(fit.values())).double().numpy()).predict(keys.numpy())
    distances = torch.cdist(keys, keys).fill_diagonal_(0).numpy()
    single = len(set(clusters.tolist())) < 2
    return {
        "adjusted_rand": float(adjusted_rand_score(skills, clusters)),
        "silhouette": math.nan if single else float(silhouette_score(distances, clusters, metric="precomputed")),
        "silhouette_skills": float(silhouette_score(distances, skills, metric="precomputed")),
    }


@dataclass(frozen=True, eq=False)
class Plane:
    """The first two principal components of the keys of all skills: held-out queries, and each skill's box.

    A box of hundreds of coordinates casts a shadow many times as wide as the keys it was fitted on, so there is also the
    box of the two coordinates in the plane alone.
    """

    points: Mapping[str, Float[Tensor, "_ 2"]]
    boxes: Mapping[str, Float[Tensor, "4 2"]]
    """mu +- k sigma of the fitted queries' places in the plane."""
    shadows: Mapping[str, Float[Tensor, "directions 2"]]
    """The projection of mu +- k sigma in all coordinates."""
    explained: tuple[float, float]
    """Share of the variance along each axis."""

    @classmethod
    def fit(
        cls,
        fit: Mapping[str, Float[Tensor, "_ n"]],
        held: Mapping[str, Float[Tensor, "_ n"]],
        boxes: Mapping[str, Region],
        seed: int,
    ) -> "Plane":
        """Fit the axes (and the boxes in the plane) on one half of the queries, and place the other half."""
        from sklearn.decomposition import PCA

        fitted_keys = torch.cat(list(fit.values())).double()
        pca = PCA(2, random_state=seed).fit(fitted_keys.numpy())
        axes, mean = torch.from_numpy(pca.components_), fitted_keys.mean(0)

        def place(keys: Tensor) -> Tensor:
            return (keys.double() - mean) @ axes.T

        angles = torch.arange(DIRECTIONS, dtype=torch.float64) * (2 * math.pi / DIRECTIONS)
        directions = torch.stack([angles.cos(), angles.sin()], dim=1) @ axes
        shadows = {
            skill: place(box.centres[0] + directions.sign() * box.k * box.scale.double())
            for skill, box in boxes.items()
        }
        corners = {skill: _rectangle(place(keys)) for skill, keys in fit.items()}
        x, y = (float(share) for share in pca.explained_variance_ratio_)
        return cls({skill: place(keys) for skill, keys in held.items()}, corners, shadows, (x, y))


def _rectangle(points: Float[Tensor, "queries 2"]) -> Float[Tensor, "4 2"]:
    """Return the corners of the smallest mu +- k sigma that covers the points."""
    mean, sigma = points.mean(0), points.std(0).clamp_min(TINY)
    reach = ((points - mean).abs() / sigma).amax() * sigma
    return mean + torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * reach
