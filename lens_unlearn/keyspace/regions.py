"""Regions of key space, fitted on the keys of one skill: `Box`, `Ellipsoid`, `Clusters`, `Contrast`, `Linear`.

Every region has a score that is 0 at a centre and grows outwards; a key is inside while its score is at most `limit`.
Knows tensors of keys; knows nothing of models, sites, or of what happens to a query whose key is inside.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_unlearn.core.errors import LensUnlearnError

__all__ = [
    "FEWEST",
    "Box",
    "Clusters",
    "Contrast",
    "Ellipsoid",
    "Linear",
    "Region",
    "Shape",
    "fit_region",
    "region_from_parts",
]

FLOOR = 0.1
"""The smallest scale of a coordinate, as a share of the median positive standard deviation of the layer."""
FEWEST = 8
"""The fewest keys a region is fitted on."""

Shape = Literal["box", "ellipsoid", "clusters", "contrast", "linear"]
R = TypeVar("R", bound="Region")


@dataclass(frozen=True, eq=False)
class Region(ABC):
    """A set of keys around one or several centres, with a scale per coordinate.

    Args:
        centres: Where the scores are 0.
        scale: Length of each coordinate's axis, at score 1.
        limit: The largest score inside.
        k: The score that covers the stated share of the keys it was fitted on, so that `limit` = alpha k.
        floored: Coordinates whose standard deviation was raised to the floor.
    """

    shape: ClassVar[str] = ""

    centres: Float[Tensor, "centres n"]
    scale: Float[Tensor, "n"]
    limit: float
    k: float = 1.0
    floored: int = 0

    def __post_init__(self) -> None:
        """Refuse what no fit gives."""
        if self.centres.ndim != 2 or self.scale.ndim != 1 or self.centres.shape[1] != len(self.scale):
            raise LensUnlearnError(
                f"centres of shape {tuple(self.centres.shape)} and a scale of shape {tuple(self.scale.shape)} make no region: "
                "give [centres, n] and [n]"
            )
        finite = bool(torch.isfinite(self.centres).all()) and bool(torch.isfinite(self.scale).all())
        if not finite or not bool((self.scale > 0).all()) or not self.limit >= 0 or not self.centres.numel():
            raise LensUnlearnError("a region needs finite centres, positive scales and a limit of at least 0")
        if not self.k >= 0 or not isinstance(self.floored, int):
            raise LensUnlearnError(
                f"a region with k={self.k!r} and {self.floored!r} floored coordinates: at least 0, and whole"
            )

    def score(self, keys: Float[Tensor, "*keys n"]) -> Float[Tensor, "*keys"]:
        """Return how far keys are from the nearest centre, in units of the scale; NaN for a key with a NaN."""
        keys = keys.float().contiguous()  # sums over another layout differ in the last digit
        scale = self.scale.to(keys.device)
        scores = [self._norm((keys - centre.to(keys.device)) / scale) for centre in self.centres]
        return scores[0] if len(scores) == 1 else torch.stack(scores).amin(0)

    @abstractmethod
    def _norm(self, z: Float[Tensor, "*keys n"]) -> Float[Tensor, "*keys"]: ...

    def contains(self, keys: Float[Tensor, "*keys n"]) -> Bool[Tensor, "*keys"]:
        """Say which keys are inside; a key with a NaN never is."""
        return self.score(keys) <= self.limit

    @property
    def alpha(self) -> float:
        """The limit in units of the score that covers the fit."""
        return self.limit / self.k if self.k > 0 else math.inf

    def at(self: R, limit: float) -> R:
        """Return the same region with another limit."""
        return replace(self, limit=float(limit))

    @property
    def log_volume(self) -> float:
        """The sum of log sigma over the coordinates, as the published analysis compares volumes."""
        return float(self.scale.double().log().sum())

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a file keeps."""
        header = {"shape": self.shape, "limit": self.limit, "k": self.k, "floored": self.floored}
        return header, {"centres": self.centres, "scale": self.scale}

    def __repr__(self) -> str:
        several = f"{len(self.centres)} centres, " if len(self.centres) > 1 else ""
        floored = f", {self.floored:,} floored" if self.floored else ""
        return f"{type(self).__name__}({several}{len(self.scale):,} coordinates{floored}, alpha={self.alpha:.3g})"


class Box(Region):
    """The keys of which every coordinate is within bounds: score = max over coordinates of |x - mu| / sigma."""

    shape = "box"

    def _norm(self, z: Tensor) -> Tensor:
        return z.abs().amax(-1)


class Ellipsoid(Region):
    """The keys near a centre: score = root of the mean of ((x - mu) / sigma)^2 over coordinates.

    No single coordinate can decide it. Its axes are those of the coordinates: a full covariance (Mahalanobis, shrunk) separated
    skills worse in every comparison made on a few hundred keys.
    """

    shape = "ellipsoid"

    def _norm(self, z: Tensor) -> Tensor:
        return z.square().mean(-1).sqrt()


class Clusters(Ellipsoid):
    """The union of ellipsoids of one scale, around the centres of a k-means clustering of the keys."""

    shape = "clusters"


@dataclass(frozen=True, eq=False, repr=False)
class Contrast(Ellipsoid):
    """The keys nearer to the skill than to the rest: score = distance from its ellipsoid over that from the others' one.

    Not published: the other regions are fitted on the skill's own keys alone, this one also on those of the other skills.

    Args:
        other_centre: Mean of the other keys.
        other_scale: Their standard deviations, floored like `scale`.
    """

    shape = "contrast"

    other_centre: Float[Tensor, "n"] = field(default_factory=lambda: torch.zeros(0))
    other_scale: Float[Tensor, "n"] = field(default_factory=lambda: torch.ones(0))

    def __post_init__(self) -> None:
        """Check the other side too."""
        super().__post_init__()
        Ellipsoid(self.other_centre[None], self.other_scale, self.limit)
        if len(self.other_scale) != len(self.scale):
            raise LensUnlearnError("the two sides of a contrast have different numbers of coordinates")

    def score(self, keys: Float[Tensor, "*keys n"]) -> Float[Tensor, "*keys"]:
        """Return the ratio of the two distances; NaN for a key with a NaN."""
        return super().score(keys) / Ellipsoid(self.other_centre[None], self.other_scale, 1.0).score(keys)

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a file keeps."""
        header, tensors = super().parts()
        return header, {**tensors, "other_centre": self.other_centre, "other_scale": self.other_scale}


@dataclass(frozen=True, eq=False, repr=False)
class Linear(Region):
    """The keys on one side of a plane: score = 1 / (1 + exp(w z + b)), z = (x - mu) / sigma: how probable another skill is.

    Not published: like `Contrast` it is fitted on keys of both sides. w and b are those of a logistic regression that minimizes the
    mean log loss, both sides weighing the same, + |w|^2 / 2; mu and sigma, floored, are of both sides together.

    Args:
        weight: w.
        bias: b.
    """

    shape = "linear"

    weight: Float[Tensor, "n"] = field(default_factory=lambda: torch.zeros(0))
    bias: Float[Tensor, "1"] = field(default_factory=lambda: torch.zeros(1))

    def __post_init__(self) -> None:
        """Check the plane too."""
        super().__post_init__()
        if self.weight.shape != self.scale.shape or self.bias.shape != (1,):
            raise LensUnlearnError("a plane needs one weight for each coordinate, and one bias")
        if not bool(torch.isfinite(self.weight).all() & torch.isfinite(self.bias).all()):
            raise LensUnlearnError("a plane needs finite weights")

    def score(self, keys: Float[Tensor, "*keys n"]) -> Float[Tensor, "*keys"]:
        """Return the probability that a key is not of the skill; NaN for a key with a NaN."""
        keys = keys.float().contiguous()  # as in `Region.score`
        return self._norm((keys - self.centres[0].to(keys.device)) / self.scale.to(keys.device))

    def _norm(self, z: Tensor) -> Tensor:
        margin = (z * self.weight.to(z.device)).sum(-1) + self.bias[0].to(z.device)
        # In float64, whose last digit, in which a vector's differ from a number's, is not seen in float32. What is not finite lies
        # on no side.
        return torch.sigmoid(-margin.double()).float().masked_fill(~torch.isfinite(margin), math.nan)

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a file keeps."""
        header, tensors = super().parts()
        return header, {**tensors, "weight": self.weight, "bias": self.bias}

    def __repr__(self) -> str:
        return f"Linear({len(self.scale):,} coordinates, limit={self.limit:.3g})"


_SHAPES: dict[str, type[Region]] = {kind.shape: kind for kind in (Box, Ellipsoid, Clusters, Contrast, Linear)}


def fit_region(
    keys: Float[Tensor, "keys n"],
    shape: Shape = "box",
    *,
    others: Float[Tensor, "others n"] | None = None,
    coverage: float = 1.0,
    alpha: float = 1.0,
    clusters: int = 4,
    seed: int = 0,
) -> Region:
    """Fit a region to the keys of one skill.

    mu and sigma are each coordinate's mean and sample standard deviation (n - 1); sigma is raised to a tenth of the median
    of the positive ones where it is smaller, since hundreds of coordinates of a ReLU layer can be constant. k is the
    smallest score that covers the share `coverage` of the keys, the largest for coverage 1; in closed form for the box:
    k = max_i max_d |v_id - mu_d| / sigma_d. The limit is alpha k.

    Source: Li, Sun, Weng, "Effective Skill Unlearning through Intervention and Abstention" (2025), whose released code finds
    k by bisection and has no floor.

    Args:
        keys: One row per query.
        shape: "box" (published), "ellipsoid", "clusters", "contrast", or "linear".
        others: Keys of other skills; needed for "contrast" and "linear", and ignored otherwise.
        coverage: Share of the keys that alpha = 1 covers, in (0, 1]. Below 1, one outlier does not set the limit.
        alpha: The limit in units of k.
        clusters: Centres of "clusters".
        seed: Of the clustering.

    Raises:
        LensUnlearnError: If there are too few keys, an argument is out of range, or no coordinate varies.
    """
    if shape not in _SHAPES:
        raise LensUnlearnError(f"region={shape!r} is not known: choose from {', '.join(_SHAPES)}")
    if not 0 < coverage <= 1:
        raise LensUnlearnError(f"coverage={coverage} is out of range: a share of the fitted keys, in (0, 1]")
    if not alpha > 0:
        raise LensUnlearnError(f"alpha={alpha} is out of range: give one above 0")
    if len(keys) < FEWEST:
        raise LensUnlearnError(f"{len(keys)} queries are too few to fit a region: give at least {FEWEST}")
    if shape in ("contrast", "linear") and (others is None or len(others) < FEWEST):
        raise LensUnlearnError(f"region={shape!r} needs {FEWEST} queries of other skills at least: give retain queries")
    fitted = keys if shape != "linear" or others is None else torch.cat([keys, others])
    centres, sigma, floored = _spread(fitted, clusters if shape == "clusters" else 1, seed)
    other_side: dict[str, Any] = {}
    if shape == "linear" and others is not None:
        other_side["weight"], other_side["bias"] = _plane((fitted - centres) / sigma, len(keys))
    if shape == "contrast" and others is not None:
        centre, other_side["other_scale"], _ = _spread(others, 1, seed)
        other_side["other_centre"] = centre[0]
    region = _SHAPES[shape](centres, sigma, 1.0, 1.0, floored, **other_side)
    # The smallest score that covers so many keys: a quantile that interpolates between n - 1 gaps would cover one more.
    k = float(region.score(keys).sort().values[math.ceil(coverage * len(keys) - 1e-9) - 1])
    return replace(region, limit=alpha * k, k=k)


def _spread(
    keys: Float[Tensor, "keys n"], clusters: int, seed: int
) -> tuple[Float[Tensor, "centres n"], Float[Tensor, "n"], int]:
    """Return centres, the standard deviation about them with its floor, and how many coordinates were raised to that."""
    values = keys.double()
    if not bool(torch.isfinite(values).all()):
        raise LensUnlearnError("a key to fit on holds NaN or infinity")
    centres = values.mean(0, keepdim=True) if clusters == 1 else _centres(values, clusters, seed)
    nearest = centres[torch.cdist(values, centres).argmin(1)]
    sigma = ((values - nearest).square().sum(0) / (len(values) - len(centres))).sqrt()
    # The keys of one skill leave many neurons of a ReLU layer constant, or nearly so: divided by such a sigma, any new query
    # would be infinitely far, and by a few coordinates alone. The floor is a share of the median, so that scaling a layer
    # changes nothing, and of the positive ones, since where half of the coordinates are constant the median of all is 0.
    positive = sigma[sigma > 1e-12 * values.abs().amax(0)]
    if len(positive) == 0:
        raise LensUnlearnError("every coordinate of the keys is constant: these queries all end in the same state")
    floor = FLOOR * positive.median()
    return centres.float(), sigma.clamp_min(floor).float(), int((sigma < floor).sum())


def _plane(z: Float[Tensor, "keys n"], inside: int) -> tuple[Float[Tensor, "n"], Float[Tensor, "1"]]:
    """Return weights and bias of the plane between the first keys, so many, and all others."""
    from sklearn.linear_model import LogisticRegression

    # C weighs the sum of the losses against |w|^2 / 2: 1 / n makes that their mean, whatever the number of keys.
    model = LogisticRegression(C=1 / len(z), class_weight="balanced", max_iter=1000)
    model.fit(z.double().numpy(), [1] * inside + [0] * (len(z) - inside))
    return torch.from_numpy(model.coef_[0]).float(), torch.from_numpy(model.intercept_).float()


def _centres(values: Float[Tensor, "keys n"], count: int, seed: int) -> Float[Tensor, "centres n"]:
    from sklearn.cluster import KMeans

    if not 1 <= count <= len(values) // 2:
        raise LensUnlearnError(f"clusters={count} does not fit {len(values)} queries: give at least two for each")
    spread = values.std(0)
    scale = torch.where(spread > 0, spread, torch.ones_like(spread))
    kmeans = KMeans(n_clusters=count, n_init=4, random_state=seed)  # pyright: ignore[reportArgumentType]
    kmeans.fit((values / scale).numpy())
    return torch.from_numpy(kmeans.cluster_centers_).to(values) * scale


def region_from_parts(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Region:
    """Rebuild a region from `parts`.

    Raises:
        LensUnlearnError: If they make no region.
    """
    if header["shape"] not in _SHAPES:
        raise LensUnlearnError(f"{header['shape']!r} is not a region this version knows: upgrade to read it")
    numbers = {name: header[name] for name in ("limit", "k", "floored")}
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    return _SHAPES[header["shape"]](**floats, **numbers)
