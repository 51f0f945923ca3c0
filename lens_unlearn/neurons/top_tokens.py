"""`TopTokens`: for every neuron, at which tokens of a corpus its k highest activations are, in one streaming pass.

It serves all neurons of a model at once, as ``lu.collect(model, corpus, statistic=lu.TopTokens())``, and is the statistic
behind `lu.top_examples`. Knows activations, and documents and places as numbers; knows nothing of texts, and how to show them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_unlearn.core.counter_rng import key_of
from lens_unlearn.core.errors import ActivationError, EmptyStatisticError, LensUnlearnError, SelectionError
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.maps import NeuronMap, neuron_name

__all__ = ["FIELDS", "By", "Tops", "TopTokens"]

By = Literal["max", "min", "abs"]
FIELDS = ("values", "documents", "places")
"""The tensors of a site's state, in the order of the fields of `Tops`."""
_LOW = 2**32 - 1  # the lower half of a 64-bit key
_TILE = 2**22  # activations ranked together: bounds the memory of their keys


@dataclass(frozen=True, eq=False)
class Tops:
    """Where the highest activations of the neurons of one site are, best first."""

    values: Float[Tensor, "k neurons"]
    """The activations; NaN where a neuron has fewer than the others."""
    documents: Int[Tensor, "k neurons"]
    """Keys of documents, as `Corpus.places` gives them."""
    places: Int[Tensor, "k neurons"]
    """Keys of the tokens in their documents."""


class TopTokens:
    """For every neuron, the k counted tokens at which it fires most, with the document and the place of each.

    Equal activations are ordered by the keys of document and place, which depend on the texts alone. So the result is the same
    whatever the batches, their order and the parts that are merged (up to the model's own rounding), and a document that
    stands in a corpus twice enters once.

    Args:
        k: Tokens to keep per neuron.
        by: Which activations are the top ones: the highest ("max"), lowest ("min"), or furthest from zero ("abs").
        per_document: Whether to keep at most one token of each document.
        among: A selection: the neurons to keep tokens of. Default: all at the sites that are collected.

    Raises:
        LensUnlearnError: If k is below 1 or `by` is not known.
    """

    def __init__(
        self, k: int = 10, *, by: By = "max", per_document: bool = False, among: NeuronMap | None = None
    ) -> None:
        if k < 1:
            raise LensUnlearnError(f"k={k} keeps no token: give at least 1")
        if by not in ("max", "min", "abs"):
            raise LensUnlearnError(f"by={by!r} is not known: choose 'max', 'min' or 'abs'")
        if among is not None and not among.is_selection:
            raise SelectionError("a boolean map is needed to name neurons: select first, as in score.top(0.02)")
        self.k, self.per_document, self.among = k, per_document, among
        self.by: By = by
        self.provenance: dict[str, Any] = {}
        self._tops: dict[Site, Tops] = {}
        self._now = torch.zeros(2, 0, dtype=torch.int64)

    def fresh(self) -> "TopTokens":
        """Return an empty statistic of the same settings."""
        return TopTokens(self.k, by=self.by, per_document=self.per_document, among=self.among)

    def locate(self, documents: Int[Tensor, "tokens"], places: Int[Tensor, "tokens"]) -> None:
        """Name the tokens of the next updates: a key of each token's document, and of its place there."""
        self._now = torch.stack([documents, places])

    def update(self, site: Site, values: Float[Tensor, "tokens *neurons"], weight: Float[Tensor, "tokens"]) -> None:
        """Add the activations of one batch at one site; `weight` is 1 at counted tokens and 0 elsewhere.

        Raises:
            ActivationError: If a counted activation is NaN or infinite; names the neuron.
        """
        counted = weight > 0
        if not bool(counted.any()):
            return
        if self._now.shape[1] != len(weight):
            raise LensUnlearnError(f"call locate() with the documents and places of these {len(weight)} tokens first")
        x = values.detach()[counted.to(values.device)].flatten(1).float()
        columns = self._columns(site, tuple(values.shape[1:]))
        x = x if columns is None else x[:, columns.to(x.device)]
        bad = (~torch.isfinite(x)).nonzero()
        if len(bad):
            token, column = (int(i) for i in bad[0])
            name = neuron_name(site, column if columns is None else int(columns[column]), values.shape[1:])
            raise ActivationError(
                f"{name} is {float(x[token, column])} at a counted token: the model overflows or is broken there; "
                "try a wider dtype, or look at that text"
            )
        # In the order of their keys, so that ties of activations are broken alike in every batch.
        documents, places = self._now[:, counted.cpu()]
        order = torch.from_numpy(np.lexsort((places.numpy(), documents.numpy())))
        documents, places, x = documents[order], places[order], x[order.to(x.device)]
        size = max(1, _TILE // len(x))
        parts = [self._best(part, documents, places) for part in x.split(size, dim=1)]
        self._fold(site, Tops(*(torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))))

    def _columns(self, site: Site, shape: tuple[int, ...]) -> Int[Tensor, "chosen"] | None:
        if self.among is None:
            return None
        mask = self.among[site]
        if (
            tuple(mask.shape) != shape
            and self.among.shape_of(site) != shape
            and (mask.ndim, mask.numel()) != (1, math.prod(shape))
        ):
            raise SelectionError(f"{site}: the selection has shape {tuple(mask.shape)}, and the activations {shape}")
        return mask.reshape(-1).nonzero()[:, 0]

    def _strength(self, x: Tensor) -> Tensor:
        """Return what is ranked, the highest first; adding 0 gives zero one sign."""
        return (x if self.by == "max" else -x if self.by == "min" else x.abs()) + 0.0

    def _best(
        self, x: Float[Tensor, "tokens n"], documents: Int[Tensor, "tokens"], places: Int[Tensor, "tokens"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return values, documents and places of the top tokens of one batch, which stands in the order of these keys."""
        # One integer for each activation, so that a single topk ranks by strength and then by token: the float's bits, in a form
        # that orders integers as it orders floats, above the token's rank. No two are equal.
        bits = self._strength(x).view(torch.int32).long()
        keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32
        keys += (_LOW - torch.arange(len(x), device=x.device))[:, None]
        differs = documents.diff() != 0
        differs = differs if self.per_document else differs | (places.diff() != 0)
        group = torch.cat([torch.zeros(1, dtype=torch.long), differs.cumsum(0)])
        if int(group[-1]) + 1 < len(x):  # of repeated tokens, or of the tokens of one document, the best
            lowest = torch.full((int(group[-1]) + 1, x.shape[1]), torch.iinfo(torch.int64).min, device=x.device)
            keys = lowest.scatter_reduce(0, group.to(x.device)[:, None].expand_as(keys), keys, "amax")
        rank = _LOW - (keys.topk(min(self.k, len(keys)), dim=0).values & _LOW)
        values, rank = x.gather(0, rank).cpu(), rank.cpu()
        return values, documents[rank], places[rank]

    def _fold(self, site: Site, new: Tops) -> None:
        """Join new top tokens with those of before: sort, drop repeated ones, and keep the best."""
        old = self._tops.get(site)
        parts = [(part.values, part.documents, part.places) for part in (old, new) if part is not None]
        values, documents, places = (torch.cat(columns).numpy() for columns in zip(*parts, strict=True))
        strength = self._strength(torch.from_numpy(values)).nan_to_num(nan=-torch.inf).numpy()
        if old is not None:
            keys = (places, -strength, documents) if self.per_document else (-strength, places, documents)
            order = np.lexsort(keys, axis=0)
            values, documents, places, strength = _take(order, values, documents, places, strength)
            repeated = documents[1:] == documents[:-1]
            repeated = repeated if self.per_document else repeated & (places[1:] == places[:-1])
            strength[1:][repeated] = -np.inf
        order = np.lexsort((places, documents, -strength), axis=0)[: self.k]
        values, documents, places, strength = _take(order, values, documents, places, strength)
        values[strength == -np.inf] = np.nan
        rows = int((strength > -np.inf).any(1).sum())
        self._tops[site] = Tops(*(torch.from_numpy(a[:rows].copy()) for a in (values, documents, places)))

    def merge(self, other: "TopTokens") -> "TopTokens":
        """Return the top tokens of both parts together; neither part is changed.

        Raises:
            LensUnlearnError: If their settings differ.
        """
        if repr(self.fresh()) != repr(other.fresh()):
            raise LensUnlearnError(f"{self.fresh()!r} and {other.fresh()!r} do not merge: their settings differ")
        merged = self.fresh()
        merged.provenance = dict(self.provenance or other.provenance)
        for part in (self, other):
            for site, tops in part._tops.items():
                merged._fold(site, tops)
        return merged

    def state(self) -> dict[str, Tensor]:
        """Return values, documents and places, named by site."""
        named = ((f"{site}.{name}", getattr(t, name)) for site, t in self._tops.items() for name in FIELDS)
        return dict(named)

    def with_state(self, tensors: Mapping[str, Tensor]) -> "TopTokens":
        """Return a statistic of the same settings that continues from `state`."""
        new = self.fresh()
        for name in tensors:
            site, _, field = name.rpartition(".")
            if field == "values":
                values, documents, places = (tensors[f"{site}.{field}"] for field in FIELDS)
                if values.ndim != 2 or not values.shape == documents.shape == places.shape or len(values) > self.k:
                    raise LensUnlearnError(f"{site}: the stored tensors do not hold the top {self.k} tokens")
                new._tops[Site.parse(site)] = Tops(values.float(), documents.long(), places.long())
        return new

    @property
    def sites(self) -> list[Site]:
        """The sites that were seen."""
        return list(self._tops)

    def __getitem__(self, site: Site) -> Tops:
        """Return the top tokens of a site, a column for each of its neurons (heads side by side), or of those among them.

        Raises:
            EmptyStatisticError: If that site was not collected.
        """
        if site not in self._tops:
            raise EmptyStatisticError(f"there are no top tokens of {site}: collect over it first")
        return self._tops[site]

    def __repr__(self) -> str:
        each = ", one per document" if self.per_document else ""
        kinds = ", ".join(dict.fromkeys(site.kind for site in self._tops)) or "empty"
        chosen = "" if self.among is None else f" among {self.among.count():,} neurons ({_digest(self.among)})"
        return f"TopTokens({self.k} by {self.by}{each}{chosen}, {len(self._tops)} sites, {kinds})"


def _take(order: np.ndarray, *columns: np.ndarray) -> list[np.ndarray]:
    return [np.take_along_axis(column, order, axis=0) for column in columns]


def _digest(selection: NeuronMap) -> str:
    """Return a short name by which selections of equal size can be distinguished."""
    return f"{key_of([(str(site), mask.nonzero().tolist()) for site, mask in selection.items()]) & 0xFFFFFFFF:08x}"
