"""Streamed statistics of activations: `Moments` and `Histogram`.

A statistic is a monoid: `fresh` is its empty element, `update` takes one site's activations of one batch, and `merge`
joins two of them, associatively. So a corpus can be cut anywhere, into batches, over resumed runs or over ranks.
State is float64; each batch is reduced in float32 about a value near its own mean, which keeps seven digits of the
standard deviation also where the mean is hundreds of standard deviations away from zero.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_unlearn.coins import key_of, mix
from lens_unlearn.errors import ActivationError, EmptyStatisticError, LensUnlearnError
from lens_unlearn.maps import NeuronMap
from lens_unlearn.sites import Site

__all__ = ["Histogram", "KeySample", "Moments", "Statistic"]

EXTRAS = ("sqrt", "extrema")
LIVE_RATIO = 1e-6
"""A neuron whose standard deviation is below this share of its mean is constant, so dead or ablated."""

_TILE = 2**22  # activations reduced at a time: few enough to stay in a processor's cache between the passes
_HISTOGRAM_TILE = (1024, 256)  # tokens and neurons put into bins at a time: likewise
_ROWS = 128  # tokens added up in float32 at a time: few enough to keep six digits

S = TypeVar("S", bound="Statistic")


@runtime_checkable
class Statistic(Protocol):
    """What `collect` needs of a statistic."""

    def fresh(self: S) -> S:
        """Return an empty statistic of the same settings."""
        ...

    def update(self, site: Site, values: Float[Tensor, "tokens *neurons"], weight: Float[Tensor, "tokens"]) -> None:
        """Add the activations of one batch at one site; `weight` is 1 at counted tokens and 0 elsewhere."""
        ...

    def merge(self: S, other: S) -> S:
        """Return the statistic of both parts together."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return everything that was accumulated, as tensors."""
        ...

    def with_state(self: S, tensors: Mapping[str, Tensor]) -> S:
        """Return a statistic of the same settings that continues from `state`."""
        ...


class Moments:
    """Mean, standard deviation and relatives of every neuron, over the counted tokens of a corpus.

    With N counted tokens and activation x of one neuron:

    - `mean`: (1/N) sum x
    - `std`: sqrt((1/N) sum (x - mean)^2), a true standard deviation
    - `rms`: sqrt((1/N) sum x^2)
    - `mean_abs`: (1/N) sum abs(x)
    - `positive`: (1/N) sum [x > 0], a fraction
    - `mean_sqrt`: (1/N) sum sqrt(abs(x)); extra "sqrt"
    - `min`, `max`: extra "extrema"

    Differs from the released Selective Pruning and Neuron Adjust codes, which keep the variance under the name of the
    standard deviation, and cast the moments to half precision.

    Args:
        extra: Further statistics to keep, of "sqrt" and "extrema". They cost time.
    """

    def __init__(self, *, extra: Sequence[str] = ()) -> None:
        unknown = sorted(set(extra) - set(EXTRAS))
        if unknown:
            raise LensUnlearnError(f"extra={unknown[0]!r} is not known: choose from {', '.join(EXTRAS)}")
        self.extra = tuple(name for name in EXTRAS if name in extra)
        self.provenance: dict[str, Any] = {}
        """What was measured: model, corpus, tokens; set by `collect`, shown in figures."""
        self._count: dict[Site, int] = {}
        # Rows: a shift c near the mean, sum of x - c, sum of (x - c)^2, sum of relu(x), count of x > 0, then the extras.
        self._state: dict[Site, Tensor] = {}
        self._shift: dict[Site, Tensor] = {}  # of the statistic this one is `fresh` from, so that the two add up
        self._buffers: dict[Any, Any] = {}  # scratch space, shared with `fresh` so that it is allocated once

    def fresh(self) -> "Moments":
        """Return an empty statistic of the same settings."""
        new = Moments(extra=self.extra)
        new._buffers = self._buffers
        new._shift = self._shift | {site: state[0] for site, state in self._state.items()}
        return new

    def update(self, site: Site, values: Float[Tensor, "tokens *neurons"], weight: Float[Tensor, "tokens"]) -> None:
        """Add the activations of one batch at one site; `weight` is 1 at counted tokens and 0 elsewhere.

        Raises:
            ActivationError: If a counted activation is NaN or infinite; names the neuron.
        """
        rows = self._rows_of(weight)
        if rows.count == 0:
            return
        x = values.detach()
        flat = x.reshape(x.shape[0], -1)
        if flat.dtype in (torch.bfloat16, torch.float16):
            flat = flat.float()
        known = self._state[site][0] if site in self._state else self._shift.get(site)
        # In the model's own precision: then differences of half-precision values are exact in float32.
        shift = rows.centre(flat).to(x.dtype) if known is None else known.reshape(-1).to(flat.device)
        state = self._reduce(flat, rows, shift)
        if not _well_centred(state, rows.count):
            # An uncounted position may hold NaN, and zero times NaN is NaN: look at the counted ones alone.
            counted = rows.like(flat) > 0
            _require_finite(site, flat[counted], tuple(x.shape[1:]))
            flat = flat.masked_fill(~counted[:, None], 0)
            state = self._reduce(flat, rows, shift)
            if not _well_centred(state, rows.count):
                state = self._reduce(flat, rows, rows.centre(flat))
            if not bool(torch.isfinite(state).all()):  # finite, but their squares are not
                flat = flat.double()
                state = self._reduce(flat, rows, rows.centre(flat))
        self._fold(site, rows.count, state.reshape(len(state), *x.shape[1:]).cpu())

    def _rows_of(self, weight: Float[Tensor, "tokens"]) -> "_Rows":
        """Look at a batch's weights once, not once per site."""
        known = self._buffers.get("rows")
        if known is None or known.weight is not weight:
            known = self._buffers["rows"] = _Rows(weight)
        return known

    def _reduce(
        self, x: Float[Tensor, "tokens n"], rows: "_Rows", shift: Float[Tensor, "n"]
    ) -> Float[Tensor, "statistics n"]:
        # Few and large operations: on a small model the number of calls costs as much as the arithmetic.
        state = shift.new_zeros(5 + ("sqrt" in self.extra), x.shape[1], dtype=torch.float64)
        state[0] = shift
        shift = shift.to(x.dtype)
        for start, end, rows_each in _pieces(len(x), x.shape[1]):
            part = x[start:end]
            buffer = self._scratch("values", part.shape, part)
            grouped = buffer.view(-1, rows_each, x.shape[1])
            weights = rows.like(x)[start:end].view(-1, 1, rows_each)
            sums = self._scratch("sums", (len(state) - 1, len(grouped), 1, x.shape[1]), part)
            torch.sub(part, shift, out=buffer)
            torch.bmm(weights, grouped, out=sums[0])
            buffer.square_()
            torch.bmm(weights, grouped, out=sums[1])
            torch.clamp_min(part, 0, out=buffer)
            torch.bmm(weights, grouped, out=sums[2])
            buffer.sign_()
            torch.bmm(weights, grouped, out=sums[3])
            if "sqrt" in self.extra:
                torch.abs(part, out=buffer).sqrt_()
                torch.bmm(weights, grouped, out=sums[4])
            state[1:] += sums.sum((1, 2), dtype=torch.float64)
        if "extrema" in self.extra:
            counted = (rows.like(x) > 0)[:, None]
            low = torch.where(counted, x, math.inf).amin(0)
            high = torch.where(counted, x, -math.inf).amax(0)
            state = torch.cat([state, torch.stack([low, high]).double()])
        return state

    def _scratch(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        key, size = (name, like.dtype, like.device), math.prod(shape)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return self._buffers[key][:size].view(*shape)

    def _fold(self, site: Site, count: int, state: Tensor) -> None:
        """Merge one more state: sums about the same shift add up, others meet at their common mean."""
        if site not in self._state:
            self._count[site], self._state[site] = count, state
            return
        n, old = self._count[site], self._state[site]
        if not torch.equal(old[0], state[0]):
            mean = (n * old[0] + old[1] + count * state[0] + state[1]) / (n + count)
            middle = mean.float().double()  # as the activations will see it
            old, state = _about(middle, old, n), _about(middle, state, count)
        new = old + state
        new[0] = old[0]
        if "extrema" in self.extra:
            new[-2] = torch.minimum(old[-2], state[-2])
            new[-1] = torch.maximum(old[-1], state[-1])
        self._count[site], self._state[site] = n + count, new

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both parts together; neither part is changed.

        Raises:
            LensUnlearnError: If they keep different extras.
        """
        if self.extra != other.extra:
            raise LensUnlearnError(f"moments with extras {self.extra} and {other.extra} do not merge")
        whole = self.fresh()
        whole.provenance = _joined(self.provenance, other.provenance)
        for part in (self, other):
            for site, state in part._state.items():
                whole._fold(site, part._count[site], state)
        return whole

    def state(self) -> dict[str, Tensor]:
        """Return everything that was accumulated, as tensors named by site."""
        counts = {f"{site}.count": torch.tensor(n, dtype=torch.int64) for site, n in self._count.items()}
        return counts | {f"{site}.moments": state for site, state in self._state.items()}

    def with_state(self, tensors: Mapping[str, Tensor]) -> "Moments":
        """Return moments of the same settings that continue from `state`."""
        new = self.fresh()
        rows = 5 + ("sqrt" in self.extra) + 2 * ("extrema" in self.extra)
        for name, tensor in tensors.items():
            site, _, what = name.rpartition(".")
            if what == "moments":
                counted = tensors[f"{site}.count"]
                count = int(counted)
                whole = counted.dtype == torch.int64 and counted.ndim == 0 and count >= 1
                if not whole or tensor.dtype != torch.float64 or tensor.ndim < 2 or not _possible(tensor, count, rows):
                    raise LensUnlearnError(f"{site}: these are no moments of {count} tokens")
                new._state[Site.parse(site)], new._count[Site.parse(site)] = tensor, count
        return _whole(new, tensors)

    @property
    def sites(self) -> list[Site]:
        """The sites that were seen."""
        return list(self._state)

    @property
    def n(self) -> int:
        """Counted tokens (the most at any site)."""
        return max(self._count.values(), default=0)

    def _map(self, of: Callable[[Tensor, int], Tensor]) -> NeuronMap:
        if not self._state:
            raise EmptyStatisticError("these moments have seen no counted token: collect over a corpus first")
        values = {site: of(state, self._count[site]) for site, state in self._state.items()}
        return NeuronMap(values, live=self._live())

    def _live(self) -> dict[Site, Tensor]:
        return {
            site: _variance(state, self._count[site]).sqrt() > LIVE_RATIO * _mean(state, self._count[site]).abs()
            for site, state in self._state.items()
        }

    @property
    def mean(self) -> NeuronMap:
        """Mean activation."""
        return self._map(_mean)

    @property
    def std(self) -> NeuronMap:
        """Standard deviation (division by N)."""
        return self._map(lambda state, n: _variance(state, n).sqrt())

    @property
    def rms(self) -> NeuronMap:
        """Root of the mean square."""
        return self._map(lambda state, n: (_variance(state, n) + _mean(state, n) ** 2).sqrt())

    @property
    def mean_abs(self) -> NeuronMap:
        """Mean absolute activation: abs(x) = 2 relu(x) - x."""
        return self._map(lambda state, n: (2 * state[3] / n - _mean(state, n)).clamp_min(0))

    @property
    def positive(self) -> NeuronMap:
        """Fraction of counted tokens with a positive activation."""
        return self._map(lambda state, n: state[4] / n)

    @property
    def mean_sqrt(self) -> NeuronMap:
        """Mean of the root of the absolute activation."""
        self._require("sqrt")
        return self._map(lambda state, n: state[5] / n)

    @property
    def min(self) -> NeuronMap:
        """Smallest activation."""
        self._require("extrema")
        return self._map(lambda state, n: state[-2])

    @property
    def max(self) -> NeuronMap:
        """Largest activation."""
        self._require("extrema")
        return self._map(lambda state, n: state[-1])

    def _require(self, extra: str) -> None:
        if extra not in self.extra:
            raise EmptyStatisticError(
                f"these moments were collected without {extra!r}: collect with extra=({extra!r},)"
            )

    def __repr__(self) -> str:
        if not self._state:
            return "Moments(empty)"
        kinds = ", ".join(dict.fromkeys(site.kind for site in self._state))
        layers = len({site.layer for site in self._state})
        source = self.provenance.get("corpus")
        return f"Moments({self.n:,} tokens{f' of {source}' if source else ''}, {layers} layers, {kinds})"


def _joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return where both parts come from: corpora by name, and the tokens of both."""
    told = {**other, **one}
    both = [part for part in (one, other) if "corpus" in part]
    if len(both) == 2:
        told["corpus"] = " + ".join(dict.fromkeys(name for part in both for name in str(part["corpus"]).split(" + ")))
        told["tokens"] = sum(part.get("tokens", 0) for part in both)
    return told


def _possible(state: Tensor, n: int, rows: int) -> bool:
    """Say whether some activations of n tokens have such sums."""
    if len(state) != rows or not state.numel() or not bool(torch.isfinite(state).all()):
        return False
    return bool((state[3:5] >= 0).all() and (state[4] <= n).all())


def _whole(statistic: S, tensors: Mapping[str, Tensor]) -> S:
    """Return a statistic that was read, if nothing in the file is left over.

    Raises:
        LensUnlearnError: If it would not write the same names.
    """
    odd = sorted(set(tensors) ^ set(statistic.state()))
    if odd:
        raise LensUnlearnError(f"{odd[0]!r:.100} is not what a {type(statistic).__name__} keeps, or twice the same")
    return statistic


def _mean(state: Float[Tensor, "statistics *neurons"], n: int) -> Float[Tensor, "*neurons"]:
    return state[0] + state[1] / n


def _variance(state: Float[Tensor, "statistics *neurons"], n: int) -> Float[Tensor, "*neurons"]:
    return (state[2] / n - (state[1] / n) ** 2).clamp_min(0)


def _about(shift: Tensor, state: Tensor, n: int) -> Tensor:
    """Rewrite a state's sums about another shift: sum of (x - c')^2 = sum of (x - c)^2 + 2 d sum of (x - c) + n d^2."""
    moved, d = state.clone(), state[0] - shift
    moved[0], moved[1] = shift, state[1] + n * d
    moved[2] = state[2] + d * (2 * state[1] + n * d)
    return moved


def _well_centred(state: Tensor, n: int) -> bool:
    """Whether every sum is finite and no mean is more than ten standard deviations from its shift."""
    low, high = torch.aminmax(torch.addcmul(state[2] * (0.99 * n), state[1], state[1], value=-1))
    return float(low) >= 0 and float(high) < math.inf  # both false for NaN


def _pieces(tokens: int, width: int) -> Iterator[tuple[int, int, int]]:
    """Cut a batch into pieces that stay in the cache: (start, end, rows that are summed in float32)."""
    whole = tokens // _ROWS * _ROWS
    size = max(1, _TILE // (width * _ROWS)) * _ROWS
    for start in range(0, whole, size):
        yield start, min(start + size, whole), _ROWS
    if whole < tokens:
        yield whole, tokens, tokens - whole


class _Rows:
    """The weights of one batch's positions, and a few counted positions spread over it."""

    def __init__(self, weight: Float[Tensor, "tokens"]) -> None:
        self.weight = weight
        counted = weight.nonzero().reshape(-1)
        self.count = len(counted)
        size = 1 << min(4, max(0, self.count.bit_length() - 1))
        spread = torch.linspace(0, max(0, self.count - 1), size).long()
        self.sample = counted[spread.to(counted.device)] if self.count else counted
        self._moved: dict[Any, Tensor] = {}

    def like(self, x: Tensor) -> Float[Tensor, "tokens"]:
        """Return the weights in the dtype and on the device of the activations."""
        key = (x.dtype, x.device)
        if key not in self._moved:
            self._moved[key] = self.weight.to(device=x.device, dtype=x.dtype)
        return self._moved[key]

    def centre(self, x: Float[Tensor, "tokens n"]) -> Float[Tensor, "n"]:
        """Return a value near the mean of the batch: the mean of at most 16 counted rows.

        A constant neuron's centre is exactly its value: pairs of equal numbers are averaged.
        """
        sample = x[self.sample.to(x.device)]
        while len(sample) > 1:
            sample = (sample[0::2] + sample[1::2]) / 2
        return torch.nan_to_num(sample[0], nan=0.0, posinf=0.0, neginf=0.0)


def _require_finite(site: Site, counted: Float[Tensor, "tokens n"], shape: tuple[int, ...]) -> None:
    bad = (~torch.isfinite(counted)).nonzero()
    if len(bad):
        token, neuron = (int(i) for i in bad[0])
        index = ",".join(str(int(i)) for i in torch.unravel_index(torch.tensor(neuron), shape))
        value = float(counted[token, neuron])
        raise ActivationError(
            f"{site}[{index}] is {value} at the {token + 1}. counted token of a batch: the model overflows or is "
            "broken there; try a wider dtype, or look at that text"
        )


class KeySample:
    """A uniform sample of keys (activations at counted tokens), with the document each is of.

    Every counted token has a random priority that depends on its document, its place and the seed alone; those with the
    lowest priorities are kept. So the sample is the same whatever the batches, their order and the parts that are merged,
    and the same tokens are kept at every site.

    Args:
        capacity: The most keys to keep.
        seed: Of the priorities.
    """

    def __init__(self, capacity: int = 2000, *, seed: int = 0) -> None:
        if capacity < 1:
            raise LensUnlearnError(f"capacity={capacity} keeps no key: at least 1")
        self.capacity, self.seed = capacity, seed
        self.provenance: dict[str, Any] = {}
        self._keys: dict[Site, Tensor] = {}
        self._ids: dict[Site, Tensor] = {}  # rows: priority, document, place
        self._now = torch.zeros(3, 0, dtype=torch.int64)

    def fresh(self) -> "KeySample":
        """Return an empty sample of the same settings."""
        return KeySample(self.capacity, seed=self.seed)

    def locate(self, documents: Int[Tensor, "tokens"], places: Int[Tensor, "tokens"]) -> None:
        """Say which tokens the next updates are of: a key of each token's document, and its place there."""
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
            raise LensUnlearnError(f"say with locate() which {len(weight)} tokens these are, before update()")
        keys = values.detach()[counted.to(values.device)]
        _require_finite(site, keys.reshape(len(keys), -1), tuple(keys.shape[1:]))
        self._add(site, keys.float().cpu(), self._now[:, counted.cpu()])

    def _add(self, site: Site, keys: Tensor, ids: Tensor) -> None:
        if site in self._keys:
            keys, ids = torch.cat([self._keys[site], keys]), torch.cat([self._ids[site], ids], dim=1)
        numbers = {one: i for i, one in reversed([*enumerate(zip(*ids.tolist()))])}  # a token counts once
        order = [numbers[one] for one in sorted(numbers)[: self.capacity]]
        self._keys[site], self._ids[site] = keys[order], ids[:, order]

    def merge(self, other: "KeySample") -> "KeySample":
        """Return the sample of both parts together; a token that is in both is kept once.

        Raises:
            LensUnlearnError: If capacity or seed differ.
        """
        if (self.capacity, self.seed) != (other.capacity, other.seed):
            raise LensUnlearnError("samples of different capacity or seed do not merge")
        whole = self.fresh()
        whole.provenance = _joined(self.provenance, other.provenance)
        for part in (self, other):
            for site, keys in part._keys.items():
                whole._add(site, keys, part._ids[site])
        return whole

    def state(self) -> dict[str, Tensor]:
        """Return the keys and what identifies them, named by site."""
        keys = {f"{site}.keys": keys for site, keys in self._keys.items()}
        return keys | {f"{site}.ids": ids for site, ids in self._ids.items()}

    def with_state(self, tensors: Mapping[str, Tensor]) -> "KeySample":
        """Return a sample of the same settings that continues from `state`."""
        new = self.fresh()
        for name, tensor in tensors.items():
            site, _, what = name.rpartition(".")
            if what == "keys":
                ids = tensors[f"{site}.ids"]
                if ids.dtype != torch.int64 or tuple(ids.shape) != (3, len(tensor)) or len(tensor) > self.capacity:
                    raise LensUnlearnError(f"{site}: {len(tensor)} keys, and ids of shape {tuple(ids.shape)}")
                if tensor.dtype != torch.float32 or tensor.ndim < 2 or not bool(torch.isfinite(tensor).all()):
                    raise LensUnlearnError(f"{site}: these are no keys")
                order = list(zip(*ids.tolist()))
                if any(a >= b for a, b in zip(order, order[1:])):
                    raise LensUnlearnError(f"{site}: the keys are not in order, or one is there twice")
                new._keys[Site.parse(site)], new._ids[Site.parse(site)] = tensor, ids
        return _whole(new, tensors)

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
        """Split by document into parts of about the given shares of the documents.

        Raises:
            EmptyStatisticError: If there are fewer documents than parts.
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
        """Deal the documents of both at random into two samples of the same numbers of documents: a control."""
        documents = [next(iter(part._ids.values()))[1].unique() for part in (self, other)]
        both = torch.cat(documents).unique()
        both = both[mix(both + key_of("shuffled", seed)).argsort()]
        whole = KeySample(self.capacity + other.capacity, seed=self.seed)
        for part in (self, other):
            for site, keys in part._keys.items():
                whole._add(site, keys, part._ids[site])
        return whole._only(both[: len(documents[0])]), whole._only(both[len(documents[0]) :])

    def _only(self, documents: Int[Tensor, "documents"]) -> "KeySample":
        new = self.fresh()
        new.provenance = dict(self.provenance)
        for site, ids in self._ids.items():
            keep = torch.isin(ids[1], documents)
            new._keys[site], new._ids[site] = self._keys[site][keep], ids[:, keep]
        return new

    def documents(self, site: Site) -> Int[Tensor, "keys"]:
        """Return a key of each key's document: equal for keys of one document."""
        self[site]
        return self._ids[site][1]

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(site.kind for site in self._keys)) or "empty"
        seed = f", seed {self.seed}" if self.seed else ""
        return f"KeySample({self.n:,} of at most {self.capacity:,} keys, {len(self._keys)} sites, {kinds}{seed})"


class Histogram:
    """Counts of every neuron's activation in fixed bins, the same for every corpus and model.

    Bin edges are equally spaced in asinh(x / scale): fine about zero, and reaching to `limit` on both sides, so two
    histograms always merge and compare. What lies beyond the limits is counted in the outermost bins.

    Args:
        bins: Number of bins; even, so that zero is an edge.
        scale: Where the spacing turns from linear to logarithmic, in units of the activation.
        limit: The largest absolute activation that is told apart.
    """

    def __init__(self, *, bins: int = 128, scale: float = 0.1, limit: float = 1000.0) -> None:
        if bins < 2 or bins % 2 or scale <= 0 or limit <= scale:
            raise LensUnlearnError("a histogram needs an even number of bins and 0 < scale < limit")
        self.bins, self.scale, self.limit = bins, scale, limit
        self.provenance: dict[str, Any] = {}
        self._counts: dict[Site, Tensor] = {}

    def fresh(self) -> "Histogram":
        """Return an empty histogram with the same bins."""
        return Histogram(bins=self.bins, scale=self.scale, limit=self.limit)

    @property
    def edges(self) -> Float[Tensor, "edges"]:
        """The bin edges, in units of the activation."""
        top = math.asinh(self.limit / self.scale)
        return self.scale * torch.sinh(torch.linspace(-top, top, self.bins + 1, dtype=torch.float64))

    def update(self, site: Site, values: Float[Tensor, "tokens *neurons"], weight: Float[Tensor, "tokens"]) -> None:
        """Add the activations of one batch at one site; `weight` is 1 at counted tokens and 0 elsewhere."""
        rows = weight.to(values.device).nonzero()[:, 0]
        if len(rows) == 0:
            return
        x = values.detach()
        flat = x.reshape(len(x), -1)
        counts = torch.zeros(flat.shape[1], self.bins, dtype=torch.int64)
        tokens, neurons = _HISTOGRAM_TILE if flat.device.type == "cpu" else flat.shape
        for some in rows.split(tokens):
            for start in range(0, flat.shape[1], neurons):
                part = flat[:, start : start + neurons].index_select(0, some).float()
                if not math.isfinite(float(part.sum())):
                    _require_finite(site, flat[rows], tuple(x.shape[1:]))
                    part = part.nan_to_num()  # what float32 cannot hold
                width, bins = part.shape[1], self._bins(part)
                bins += torch.arange(width, dtype=torch.int32, device=bins.device) * self.bins
                found = torch.bincount(bins.reshape(-1), minlength=width * self.bins)
                counts[start : start + width] += found.view(width, self.bins).cpu()
        counts = counts.reshape(*x.shape[1:], self.bins)
        self._counts[site] = self._counts[site] + counts if site in self._counts else counts

    def _bins(self, x: Float[Tensor, "tokens n"]) -> Int[Tensor, "tokens n"]:
        """Return the bin of each value, in a new tensor.

        asinh(y) is the sign of y times log(abs(y) + sqrt(y^2 + 1)), and PyTorch's log is ten times as fast as its asinh. The
        sign is put on the bin: next to zero the logarithm is zero, and which side it is would be lost.
        """
        half = self.bins // 2
        step = half / math.asinh(self.limit / self.scale)
        y = torch.zeros((), device=x.device).add(x, alpha=1 / self.scale)  # also makes -0 to 0, which is positive
        negative = y.view(torch.int32) >> 31  # -1 where it is
        y.abs_()
        size = torch.addcmul(torch.ones((), device=x.device), y, y).sqrt_().add_(y).log_().mul_(step)
        return size.clamp_max_(half - 1).int().bitwise_xor_(negative).add_(half)

    def merge(self, other: "Histogram") -> "Histogram":
        """Return the counts of both parts together.

        Raises:
            LensUnlearnError: If their bins differ.
        """
        if (self.bins, self.scale, self.limit) != (other.bins, other.scale, other.limit):
            raise LensUnlearnError("histograms with different bins do not merge")
        whole = self.fresh()
        whole.provenance = _joined(self.provenance, other.provenance)
        for site in {**self._counts, **other._counts}:
            parts = [part._counts[site] for part in (self, other) if site in part._counts]
            whole._counts[site] = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return whole

    def state(self) -> dict[str, Tensor]:
        """Return the counts, named by site."""
        return {f"{site}.histogram": counts for site, counts in self._counts.items()}

    def with_state(self, tensors: Mapping[str, Tensor]) -> "Histogram":
        """Return a histogram of the same bins that continues from `state`."""
        new = self.fresh()
        ending = ".histogram"
        new._counts = {Site.parse(n.removesuffix(ending)): t for n, t in tensors.items() if n.endswith(ending)}
        for site, counts in new._counts.items():
            if (
                counts.dtype != torch.int64
                or counts.ndim < 2
                or counts.shape[-1] != self.bins
                or bool((counts < 0).any())
            ):
                raise LensUnlearnError(f"{site}: these are no counts in {self.bins} bins")
        return _whole(new, tensors)

    @property
    def sites(self) -> list[Site]:
        """The sites that were seen."""
        return list(self._counts)

    @property
    def n(self) -> int:
        """Counted tokens."""
        return max((int(counts.reshape(-1, self.bins)[0].sum()) for counts in self._counts.values()), default=0)

    def counts(self, site: Site, neuron: int) -> Tensor:
        """Return the counts of one neuron, by its flat index.

        Raises:
            EmptyStatisticError: If that site was not collected.
        """
        if site not in self._counts:
            raise EmptyStatisticError(f"this histogram has nothing of {site}: collect over it first")
        return self._counts[site].reshape(-1, self.bins)[neuron].clone()

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(site.kind for site in self._counts)) or "empty"
        return f"Histogram({self.n:,} tokens, {self.bins} bins of scale {self.scale:g} up to {self.limit:g}, {kinds})"
