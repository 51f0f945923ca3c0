"""`Affine`: a low-rank affine map of the activations at some sites: a direction removed, a concept erased, or a vector added.

    x' = x + strength ((x - centre) left right + shift)

Of the three terms any may be absent. With r a unit vector, left = -r and right = r^T remove a direction; shift alone is a steering
vector.

Knows activations by site and the map of each; knows nothing of how directions are found.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.interventions.base import HookFunction, Intervention, Live, Parts
from lens_unlearn.interventions.selections import check_shape, maps_in
from lens_unlearn.model.experts import EXPERT_KINDS
from lens_unlearn.model.sites import KINDS, Point, Site, check_kind

__all__ = ["Affine"]

PARTS = ("left", "right", "centre", "shift")


@dataclass(frozen=True, eq=False, repr=False)
class Affine(Intervention):
    """Map activations: x' = x + strength ((x - centre) left right + shift), at every position.

    It is computed in float32 at least. With strength 0 it is the model as it was, bit for bit.

    Args:
        left: By site, ``[neurons, rank]``.
        right: By site, ``[rank, neurons]``; of the same sites.
        centre: By site, the activation that the product leaves as it is, ``[neurons]``; 0 where there is none.
        shift: By site, what is added, ``[neurons]``.
        strength: Times all of it.

    Raises:
        SelectionError: If nothing would be changed, the tensors do not fit one another, or one holds NaN or infinity.
        SiteError: If there is no such kind of site.

    Examples:
        >>> r = torch.tensor([0.6, 0.8])
        >>> Affine(left={Site(1, "resid"): -r[:, None]}, right={Site(1, "resid"): r[None]})
        Affine(strength 1, 1 site, resid, rank 1)
        >>> Affine(shift={"L1.resid": r}, strength=2.0)
        Affine(strength 2, 1 site, resid, shifted)
    """

    kind: ClassVar[str] = "affine"

    left: Mapping[Site, Float[Tensor, "neurons rank"]] = field(default_factory=dict)
    right: Mapping[Site, Float[Tensor, "rank neurons"]] = field(default_factory=dict)
    centre: Mapping[Site, Float[Tensor, "neurons"]] = field(default_factory=dict)
    shift: Mapping[Site, Float[Tensor, "neurons"]] = field(default_factory=dict)
    strength: float = 1.0

    def __post_init__(self) -> None:
        """Check the tensors against each other."""
        for name in PARTS:
            object.__setattr__(self, name, _by_site(name, getattr(self, name)))
        if not self.sites:
            raise SelectionError("nothing would be changed: an Affine needs left and right, or shift, at one site")
        if set(self.left) != set(self.right) or not set(self.centre) <= set(self.left):
            raise SelectionError(
                "left and right are given at other sites than each other, or centre at more than those"
            )
        for site in self.sites:
            shapes = {name: tuple(part[site].shape) for name in PARTS if site in (part := getattr(self, name))}
            width, rank = self._width(site), self.rank(site)
            fitting = {"left": (width, rank), "right": (rank, width), "centre": (width,), "shift": (width,)}
            wrong = [f"{name} {shape}" for name, shape in shapes.items() if shape != fitting[name]]
            if wrong or not width:
                raise SelectionError(
                    f"{site}: {', '.join(wrong)} beside the others fits no [neurons, rank], [rank, neurons] and [neurons]"
                )
        if not math.isfinite(self.strength):
            raise SelectionError(f"strength={self.strength} is not a number to multiply a map with")

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where it acts, by layer."""
        return tuple(sorted({*self.left, *self.shift}))

    def rank(self, site: Site) -> int:
        """Return the rank of the product at a site; 0 where there is none."""
        return self.left[site].shape[-1] if site in self.left else 0

    def _width(self, site: Site) -> int:
        return len(self.left[site] if site in self.left else self.shift[site])

    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return one hook per site."""
        return [(site, self._hook(site)) for site in self.sites]

    def _hook(self, site: Site) -> HookFunction:
        left, right, centre, shift = (getattr(self, name).get(site) for name in PARTS)

        def act(x: Tensor, live: Live) -> Tensor:
            if self.strength == 0:
                return x
            wide = x if x.dtype == torch.float64 else x.float()
            change = torch.zeros_like(wide) if shift is None else live.like(shift, wide).expand_as(wide)
            if left is not None and right is not None:
                moved = wide if centre is None else wide - live.like(centre, wide)
                change = change + (moved @ live.like(left, wide)) @ live.like(right, wide)
            return x + (self.strength * change).to(x.dtype)

        return act

    def check(self, points: Mapping[Site, Point]) -> None:
        """Refuse a model of another width."""
        for site in self.sites:
            check_shape(site, (self._width(site),), points[site])

    def at(self, strength: float) -> "Affine":
        """Return the same map at another strength."""
        return replace(self, strength=float(strength))

    def describe(self) -> dict[str, str]:
        """Return the form of each site's map."""
        return {str(site): self._form(site) for site in self.sites}

    def _form(self, site: Site) -> str:
        rank = self.rank(site)
        return " and ".join([f"rank {rank}"] * (rank > 0) + ["shifted"] * (site in self.shift))

    def parts(self) -> Parts:
        """Return the tensors by site, not copied."""
        tensors = {f"{name}/{site}": value for name in PARTS for site, value in getattr(self, name).items()}
        return {"kind": self.kind, "strength": self.strength}, tensors

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Affine":
        """Rebuild from `parts`."""
        return cls(**{name: maps_in(tensors, name) for name in PARTS}, strength=float(header["strength"]))

    def __repr__(self) -> str:
        count = len(self.sites)
        kinds = ", ".join(kind for kind in KINDS if any(site.kind == kind for site in self.sites))
        forms = ", ".join(dict.fromkeys(map(self._form, self.sites)))
        return f"Affine(strength {self.strength:g}, {count:,} site{'s' * (count > 1)}, {kinds}, {forms})"


def _by_site(name: str, given: Any) -> dict[Site, Tensor]:
    """Read tensors by site or by the name of one."""
    try:
        entries = dict(given.items())
    except (AttributeError, TypeError):
        raise SelectionError(
            f"{name} is a {type(given).__name__}: give tensors by site, as in {{Site(3, 'resid'): v}}"
        ) from None
    found: dict[Site, Tensor] = {}
    for key, value in entries.items():
        site = Site.parse(key) if isinstance(key, str) else Site(int(key[0]), check_kind(key[1]))
        if site.kind in EXPERT_KINDS:
            raise SelectionError(
                f"{site}: inside routed experts there is no vector of all neurons to map: take 'resid'"
            )
        if not isinstance(value, Tensor) or not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise SelectionError(f"{site}: {name} is no tensor of finite numbers")
        found[site] = value.detach().contiguous()
    return dict(sorted(found.items()))
