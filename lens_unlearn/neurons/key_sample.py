"""`KeySample`: a uniform random sample of keys (activations at counted tokens), with the document or group that each is of.

Knows activations, and documents and places as numbers; knows nothing of models, corpora, or the regions fitted to keys.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_unlearn.core.counter_rng import key_of, mix
from lens_unlearn.core.errors import EmptyStatisticError, LensUnlearnError
from lens_unlearn.model.pooling import Pool, check_pool
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.statistic import joined_provenance, require_all_read, require_finite

__all__ = ["KeySample"]


class KeySample:
    """A uniform sample of keys (activations at counted tokens), with the document each is of, or the group where those are named.

    Every counted token has a random priority that depends on its document, its place and the seed alone; those with the
    lowest priorities are kept. So the sample is the same whatever the batches, their order and the parts that are merged,
    and the same tokens are kept at every site.

    Args:
        capacity: The most keys to keep.
        seed: Of the priorities.
        pool: "last" takes the activation of the counted token itself; "mean" the mean over those of its row up to it, without
            special tokens and the first of a text, which `collect` computes.
    """

    # Why not reservoir sampling: a reservoir draws from a random stream in the order in which tokens come, so its sample would
    # depend on batches and on how the corpus is cut over processes, and two reservoirs cannot be merged exactly. The k lowest
    # of independent random priorities are a uniform sample too, and the k lowest of a union are among those of its parts.

    of_prompts = True
    """That methods fitted to it decide prompt by prompt."""

    by_unit = True
    """That `collect` calls `locate` with groups in the place of documents, where the corpus names them."""

    def __init__(self, capacity: int = 2000, *, seed: int = 0, pool: Pool = "last") -> None:
        if capacity < 1:
            raise LensUnlearnError(f"capacity={capacity} keeps no key: at least 1")
        self.capacity, self.seed = capacity, seed
        self.pool: Pool = check_pool(pool)
        self.provenance: dict[str, Any] = {}
        self._keys: dict[Site, Tensor] = {}
        self._ids: dict[Site, Tensor] = {}  # rows: priority, document, place
        self._now = torch.zeros(3, 0, dtype=torch.int64)

    def fresh(self) -> "KeySample":
        """Return an empty sample of the same settings."""
        return KeySample(self.capacity, seed=self.seed, pool=self.pool)

    def locate(self, documents: Int[Tensor, "tokens"], places: Int[Tensor, "tokens"]) -> None:
        """Name the tokens of the next updates: a key of each token's document, and its place there."""
        priority = mix(mix(documents + key_of("key sample", self.seed)) + places)
        self._now = torch.stack([priority, documents, places])

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
        keys = values.detach()[counted.to(values.device)]
        require_finite(site, keys.reshape(len(keys), -1), tuple(keys.shape[1:]))
        self._add(site, keys.float().cpu(), self._now[:, counted.cpu()])

    def _add(self, site: Site, keys: Tensor, ids: Tensor) -> None:
        if site in self._keys:
            keys, ids = torch.cat([self._keys[site], keys]), torch.cat([self._ids[site], ids], dim=1)
        # By token, its first row: a token that is in both parts counts once. Ties of priorities go by document and place.
        row_of = {token: row for row, token in reversed([*enumerate(zip(*ids.tolist()))])}
        order = [row_of[token] for token in sorted(row_of)[: self.capacity]]
        self._keys[site], self._ids[site] = keys[order], ids[:, order]

    def merge(self, other: "KeySample") -> "KeySample":
        """Return the sample of both parts together; a token that is in both is kept once.

        Raises:
            LensUnlearnError: If capacity, seed or pool differ.
        """
        if (self.capacity, self.seed, self.pool) != (other.capacity, other.seed, other.pool):
            raise LensUnlearnError(
                "samples of different capacity, seed or pool do not merge: collect both with the same settings"
            )
        merged = self.fresh()
        merged.provenance = joined_provenance(self.provenance, other.provenance)
        for part in (self, other):
            for site, keys in part._keys.items():
                merged._add(site, keys, part._ids[site])
        return merged

    @classmethod
    def joined(cls, samples: Sequence["KeySample"]) -> "KeySample":
        """Merge samples into one that is as large as they are together."""
        if len(samples) == 1:
            return samples[0]
        whole = cls(sum(sample.capacity for sample in samples), seed=samples[0].seed, pool=samples[0].pool)
        for sample in samples:
            grown = cls(whole.capacity, seed=whole.seed, pool=sample.pool).with_state(sample.state())
            grown.provenance = sample.provenance
            whole = whole.merge(grown)
        return whole

    def state(self) -> dict[str, Tensor]:
        """Return the keys and what identifies them, named by site."""
        keys = {f"{site}.keys": keys for site, keys in self._keys.items()}
        return keys | {f"{site}.ids": ids for site, ids in self._ids.items()}

    def with_state(self, tensors: Mapping[str, Tensor]) -> "KeySample":
        """Return a sample of the same settings that continues from `state`."""
        new = self.fresh()
        for name, tensor in tensors.items():
            site, _, field = name.rpartition(".")
            if field == "keys":
                ids = tensors[f"{site}.ids"]
                if ids.dtype != torch.int64 or tuple(ids.shape) != (3, len(tensor)) or len(tensor) > self.capacity:
                    raise LensUnlearnError(f"{site}: {len(tensor)} keys, and ids of shape {tuple(ids.shape)}")
                if tensor.dtype != torch.float32 or tensor.ndim < 2 or not bool(torch.isfinite(tensor).all()):
                    raise LensUnlearnError(f"{site}: the stored keys are not finite float32 vectors")
                order = list(zip(*ids.tolist()))
                if any(a >= b for a, b in zip(order, order[1:])):
                    raise LensUnlearnError(
                        f"{site}: the stored keys are not in the order of their priorities, or one is there twice"
                    )
                new._keys[Site.parse(site)], new._ids[Site.parse(site)] = tensor, ids
        return require_all_read(new, tensors)

    @property
    def sites(self) -> list[Site]:
        """The sites that were seen."""
        return list(self._keys)

    @property
    def n(self) -> int:
        """Keys (the most at any site)."""
        return max(map(len, self._keys.values()), default=0)

    def __getitem__(self, site: Site) -> Float[Tensor, "keys *neurons"]:
        """Return the keys of a site, in the order of their priorities: its beginning is a smaller uniform sample.

        Raises:
            EmptyStatisticError: If that site was not collected.
        """
        if site not in self._keys:
            raise EmptyStatisticError(f"this sample has no key of {site}: collect over it first")
        return self._keys[site]

    def split(self, *shares: float, seed: int = 0) -> "list[KeySample]":
        """Split by document, or by group where those are named, into parts of about the given shares of them.

        Raises:
            EmptyStatisticError: If there are fewer documents, or groups, than parts.
        """
        documents = torch.cat([torch.zeros(0, dtype=torch.int64), *(ids[1] for ids in self._ids.values())]).unique()
        if len(documents) < len(shares):
            raise EmptyStatisticError(
                f"{len(documents)} documents are too few to split into {len(shares)} parts: give more queries"
            )
        shuffled = documents[mix(documents + key_of("split", seed)).argsort()]
        ends = [round(len(shuffled) * sum(shares[: i + 1]) / sum(shares)) for i in range(len(shares))]
        # Every part gets a document at least.
        ends = [min(max(end, i + 1), len(shuffled) - len(shares) + i + 1) for i, end in enumerate(ends)]
        return [self._only(shuffled[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def shuffled(self, other: "KeySample", seed: int = 0) -> "tuple[KeySample, KeySample]":
        """Deal the documents, or groups, of both samples at random into two of the same numbers of them: a control."""
        documents = [next(iter(part._ids.values()))[1].unique() for part in (self, other)]
        dealt = torch.cat(documents).unique()
        dealt = dealt[mix(dealt + key_of("shuffled", seed)).argsort()]
        pooled = KeySample(self.capacity + other.capacity, seed=self.seed, pool=self.pool)
        for part in (self, other):
            for site, keys in part._keys.items():
                pooled._add(site, keys, part._ids[site])
        return pooled._only(dealt[: len(documents[0])]), pooled._only(dealt[len(documents[0]) :])

    def _only(self, documents: Int[Tensor, "documents"]) -> "KeySample":
        new = self.fresh()
        new.provenance = dict(self.provenance)
        for site, ids in self._ids.items():
            keep = torch.isin(ids[1], documents)
            new._keys[site], new._ids[site] = self._keys[site][keep], ids[:, keep]
        return new

    def documents(self, site: Site) -> Int[Tensor, "keys"]:
        """Return for each key a number of its document, or of its group where those are named: equal where they are the same."""
        self[site]  # raises where nothing was collected
        return self._ids[site][1]

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(site.kind for site in self._keys)) or "empty"
        seed = (f", seed {self.seed}" if self.seed else "") + (", means" if self.pool == "mean" else "")
        return f"KeySample({self.n:,} of at most {self.capacity:,} keys, {len(self._keys)} sites, {kinds}{seed})"
