"""`Patch`: write activations of one run of a model into another, at some layers and positions.

Knows activations by site and where a forward pass stands in its texts; knows nothing of how the run was made, nor of what is read
from the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.errors import LensUnlearnError, SelectionError
from lens_unlearn.interventions.base import HookFunction, Intervention, Live, Parts
from lens_unlearn.interventions.place import At, Place
from lens_unlearn.interventions.selections import check_shape, maps_in
from lens_unlearn.model.sites import ALIASES, KINDS, Point, Site, check_kind

__all__ = ["Patch"]


@dataclass(frozen=True, eq=False, repr=False)
class Patch(Intervention):
    """Put the activations of another run in place of a forward pass's own: x' = that run's value, at some positions, else x.

    Positions are columns, counted from the beginning of the text, also behind a key-value cache: what stood in a column of the run
    is written into the same column, so that both have to be padded alike. Behind the last column of the run nothing is written.
    A run of one row is written into every row; of several, row by row, into passes of as many.

    Args:
        from_run: The activations by site, ``[batch, pos, *neurons]`` each: a mapping of sites, or what TransformerLens'
            `run_with_cache` gives as its cache, of the same model or of another of its shape.
        at: At which positions to write, as in `Intervention.placed`: "prompt", "generated", "last", a mask ``[batch, pos]``, or
            None for all.
        layers: Which layers, or one; None for all of the run.
        site: Which kind of site, or kinds: "resid", the residual stream behind a block, or neurons such as "mlp.post".

    Raises:
        SelectionError: If the run has nothing there, its shapes do not fit each other, or it holds NaN or infinity; if `at` is
            no place.
        SiteError: If there is no such kind of site.

    Examples:
        >>> Patch({Site(1, "resid"): torch.zeros(1, 4, 8)}, at="last")
        Patch(1 row of 4 positions, layer 1, resid, at "last")
    """

    kind: ClassVar[str] = "patch"

    from_run: Mapping[Site, Float[Tensor, "batch pos *neurons"]]
    at: At = None
    layers: int | Sequence[int] | None = None
    site: str | Sequence[str] = "resid"

    looks_at_rows = True  # to know how many positions are behind a cache, and where prompts end

    def __post_init__(self) -> None:
        """Keep what is to be written, by site, and check it."""
        Place(self.at)  # refuses what is no place
        kinds = tuple(map(check_kind, [self.site] if isinstance(self.site, str) else self.site))
        layers = _layers(self.layers)
        run = {
            site: value.detach()
            for site, value in _sites_of(self.from_run).items()
            if site.kind in kinds and (layers is None or site.layer in layers)
        }
        missing = sorted({*(layers or ())} - {site.layer for site in run})
        if not run or missing:
            where = f"layer {missing[0]}" if missing else "any layer"
            raise SelectionError(
                f"the run holds nothing at {where}, {' or '.join(kinds)}: record it there, as model.run_with_cache does"
            )
        first = next(iter(run.values())).shape[:2]
        for site, value in run.items():
            if value.ndim not in (3, 4) or value.shape[:2] != first:
                raise SelectionError(
                    f"{site}: the run holds {tuple(value.shape)}, which is not [batch, pos, neurons] of {tuple(first)}"
                )
            if not bool(torch.isfinite(value).all()):
                raise SelectionError(f"{site}: the run holds NaN or infinity, which is not written anywhere")
        object.__setattr__(self, "from_run", dict(sorted(run.items())))
        object.__setattr__(self, "layers", tuple(sorted({site.layer for site in run})))
        object.__setattr__(self, "site", tuple(kind for kind in KINDS if any(site.kind == kind for site in run)))

    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return one hook per site of the run."""
        return [(site, self._hook(site)) for site in self.from_run]

    def _hook(self, site: Site) -> HookFunction:
        return lambda x, live: self._write(live.like(self.from_run[site], x), x, live, site)

    def _write(self, run: Tensor, x: Tensor, live: Live, site: Site) -> Tensor:
        rows = live.rows
        if rows is None:
            raise LensUnlearnError("a patch needs to know its positions: run the model on tokens")
        batch, width = rows.text.shape
        if len(run) not in (1, batch):
            raise SelectionError(
                f"{site}: the run has {len(run)} rows, and the forward pass {batch}: run as many, or patch from a single row"
            )
        known = run[:, rows.cached : rows.cached + width]
        if not known.shape[1]:
            return x
        where = Place(self.at).within(live, x, site.layer)
        where = where & (torch.arange(width, device=where.device) < known.shape[1])
        source = torch.zeros(batch, width, *run.shape[2:], dtype=x.dtype, device=x.device)
        source[:, : known.shape[1]] = known
        own = x.reshape(source.shape)  # OPT runs its MLP on tokens without a batch dimension
        return torch.where(where.reshape(batch, width, *[1] * (own.ndim - 2)), source, own).reshape(x.shape)

    def check(self, points: Mapping[Site, Point]) -> None:
        """Refuse a model of another width."""
        for site, value in self.from_run.items():
            check_shape(site, tuple(value.shape[2:]), points[site])

    def describe(self) -> dict[str, str]:
        """Return how many rows and positions are written at each site."""
        return {str(site): f"{_size(value)}, {Place(self.at)}" for site, value in self.from_run.items()}

    def parts(self) -> Parts:
        """Return the place, and the activations by site.

        Raises:
            SelectionError: If the place is a mask.
        """
        at = Place(self.at).parts()["at"]
        return {"kind": self.kind, "at": at}, {f"run/{site}": value for site, value in self.from_run.items()}

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Patch":
        """Rebuild from `parts`."""
        run = maps_in(tensors, "run")
        return cls(run, header["at"], site=tuple(dict.fromkeys(site.kind for site in run)) or "resid")

    def __repr__(self) -> str:
        layers = sorted({site.layer for site in self.from_run})
        whole = len(layers) > 2 and layers == [*range(layers[0], layers[-1] + 1)]
        shown = f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
        size = _size(next(iter(self.from_run.values())))
        return f"Patch({size}, layer{'s' * (len(layers) > 1)} {shown}, {', '.join(self.site)}, {Place(self.at)})"


def _size(value: Tensor) -> str:
    rows, width = value.shape[:2]
    return f"{rows:,} row{'s' * (rows > 1)} of {width:,} position{'s' * (width > 1)}"


def _layers(given: Any) -> set[int] | None:
    if given is None:
        return None
    layers = [given] if isinstance(given, int) else list(given)
    if not layers or not all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers):
        raise SelectionError(f"layers={given!r} are no layers: give whole numbers from 0, or None for all of the run")
    return set(layers)


def _sites_of(run: Any) -> dict[Site, Tensor]:
    """Read sites, their names, or TransformerLens' names of hook points; whatever else a cache holds is left out."""
    try:
        entries = dict(run.items())
    except (AttributeError, TypeError):
        raise SelectionError(
            f"from_run is a {type(run).__name__}: give activations by site, or the cache of model.run_with_cache(tokens)"
        ) from None
    found: dict[Site, Tensor] = {}
    for key, value in entries.items():
        if isinstance(key, str):
            if "hook" in key and not any(key.endswith(f".{name}") for name in ALIASES):
                continue  # of a cache, which holds everything
            key = Site.parse(key)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise SelectionError(f"{key}: the run holds a {type(value).__name__}, and no activations")
        found[Site(int(key[0]), check_kind(key[1]))] = value
    return found
