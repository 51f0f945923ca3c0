"""`Moments`: mean, standard deviation and relatives of every neuron, in one pass and in numbers that do not cancel.

State is float64; each batch is reduced in float32 about a value near its own mean, which keeps seven digits of the
standard deviation also where the mean is hundreds of standard deviations away from zero.
Knows activations, site by site, and which tokens count; knows nothing of models, corpora or methods.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.errors import EmptyStatisticError, LensUnlearnError
from lens_unlearn.model.experts import EXPERT_KINDS
from lens_unlearn.model.routed import Routed
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.routed_sums import routed_sums
from lens_unlearn.neurons.statistic import joined_provenance, require_all_read, require_finite

__all__ = ["Moments"]

EXTRAS = ("sqrt", "extrema")
LIVE_RATIO = 1e-6
"""A neuron whose standard deviation is below this share of its mean is constant, so dead or ablated."""

_TILE = 2**22  # activations reduced at a time: few enough to stay in a processor's cache between the passes
_ROWS = 128  # tokens summed in float32 at a time: few enough to keep six digits


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

    Inside routed experts x is 0 at tokens that are routed elsewhere, and these zeros count. There are besides:

    - `routed_tokens`, `gate_sums`: for each expert how many counted tokens were routed to it, and the sum of their gates
    - `load`: for each neuron, the share of counted tokens that were routed to its expert
    - `mean_given_routed`: mean / load

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
        self._routing: dict[
            Site, Tensor
        ] = {}  # inside routed experts: counted tokens of each expert, and their gates' sum
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
        # Sums are of x - c with a shift c near the mean: in (1/N) sum x^2 - mean^2 the digits of a standard deviation cancel
        # where the mean is far from zero. The first batch of a site sets c, and later ones use it too, because sums about one
        # shift simply add up. In the model's own precision: then differences of half-precision values are exact in float32.
        known_shift = self._state[site][0] if site in self._state else self._shift.get(site)
        shift = rows.centre(flat).to(x.dtype) if known_shift is None else known_shift.reshape(-1).to(flat.device)
        state = self._reduce(flat, rows, shift)
        if not _well_centred(state, rows.count):
            # This batch is unlike the first one, or holds something that is not finite. What helps is tried in turn, the
            # cheapest first: without the uncounted positions, about a shift of this batch's own, and in float64.
            # An uncounted position may hold NaN, and zero times NaN is NaN: look at the counted ones alone.
            counted = rows.like(flat) > 0
            require_finite(site, flat[counted], tuple(x.shape[1:]))
            flat = flat.masked_fill(~counted[:, None], 0)
            state = self._reduce(flat, rows, shift)
            if not _well_centred(state, rows.count):
                state = self._reduce(flat, rows, rows.centre(flat))
            if not bool(torch.isfinite(state).all()):  # finite, but their squares are not
                flat = flat.double()
                state = self._reduce(flat, rows, rows.centre(flat))
        self._fold(site, rows.count, state.reshape(len(state), *x.shape[1:]).cpu())

    def update_routed(self, site: Site, routed: Routed, weight: Float[Tensor, "tokens"]) -> None:
        """Add the values of one batch inside routed experts: what `update` would of the tensor of all neurons, which is never made.

        Raises:
            ActivationError: If a counted value is NaN or infinite; names the neuron.
        """
        rows = self._rows_of(weight)
        if rows.count == 0:
            return
        sums, routing = routed_sums(site, routed, weight > 0, self.extra)
        self._fold(site, rows.count, sums)
        self._add_routing(site, routing)

    def _add_routing(self, site: Site, routing: Tensor) -> None:
        self._routing[site] = self._routing[site] + routing if site in self._routing else routing

    def _rows_of(self, weight: Float[Tensor, "tokens"]) -> "_Rows":
        """Look at a batch's weights once, not once per site."""
        rows = self._buffers.get("rows")
        if rows is None or rows.weight is not weight:
            rows = self._buffers["rows"] = _Rows(weight)
        return rows

    def _reduce(
        self, x: Float[Tensor, "tokens n"], rows: "_Rows", shift: Float[Tensor, "n"]
    ) -> Float[Tensor, "statistics n"]:
        """Return the sums of one batch about a shift, in float64.

        Within a group of `_ROWS` tokens they are float32, in which a model is computed and a processor is fast; the groups are
        summed in float64, so that the rounding of a sum does not grow with the tokens.
        """
        # Few and large operations: on a small model the number of calls costs as much as the arithmetic. A bmm of each
        # group's weights (0 or 1) with its values leaves out the uncounted tokens and sums the others in one call, for all
        # groups at once and without a copy of the counted values.
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
        """Merge one more state: sums about the same shift add up, others are first rewritten about their common mean."""
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
            raise LensUnlearnError(
                f"moments with extras {self.extra} and {other.extra} do not merge: collect both with the same extras"
            )
        merged = self.fresh()
        merged.provenance = joined_provenance(self.provenance, other.provenance)
        for part in (self, other):
            for site, state in part._state.items():
                merged._fold(site, part._count[site], state)
            for site, routing in part._routing.items():
                merged._add_routing(site, routing)
        return merged

    def state(self) -> dict[str, Tensor]:
        """Return everything that was accumulated, as tensors named by site."""
        counts = {f"{site}.count": torch.tensor(n, dtype=torch.int64) for site, n in self._count.items()}
        routing = {f"{site}.routing": sums for site, sums in self._routing.items()}
        return counts | {f"{site}.moments": state for site, state in self._state.items()} | routing

    def with_state(self, tensors: Mapping[str, Tensor]) -> "Moments":
        """Return moments of the same settings that continue from `state`."""
        new = self.fresh()
        rows = 5 + ("sqrt" in self.extra) + 2 * ("extrema" in self.extra)
        for name, tensor in tensors.items():
            site, _, field = name.rpartition(".")
            if field == "moments":
                counted = tensors[f"{site}.count"]
                count = int(counted)
                is_count = counted.dtype == torch.int64 and counted.ndim == 0 and count >= 1
                is_state = tensor.dtype == torch.float64 and tensor.ndim >= 2 and _possible(tensor, count, rows)
                if not is_count or not is_state:
                    raise LensUnlearnError(f"{site}: the stored sums cannot be those of {count} tokens")
                new._state[Site.parse(site)], new._count[Site.parse(site)] = tensor, count
                if Site.parse(site).kind in EXPERT_KINDS:
                    routing = tensors[f"{site}.routing"]
                    fits = routing.dtype == torch.float64 and tensor.ndim == 3 and routing.shape == (2, tensor.shape[1])
                    if not (
                        fits
                        and bool(torch.isfinite(routing).all())
                        and bool((routing[0] * (count - routing[0]) >= 0).all())
                    ):
                        raise LensUnlearnError(
                            f"{site}: the stored loads cannot be those of experts and {count} tokens"
                        )
                    new._routing[Site.parse(site)] = routing
        return require_all_read(new, tensors)

    def only(self, sites: Iterable[Site]) -> "Moments":
        """Return the moments of some of the sites.

        Raises:
            EmptyStatisticError: If one of them was not seen.
        """
        wanted = dict.fromkeys(sites)
        for site in wanted:
            if site not in self._state:
                raise EmptyStatisticError(
                    f"{site} was not collected: there are {', '.join(map(str, self._state)) or 'none'}"
                )
        kept = self.with_state(
            {name: part for name, part in self.state().items() if Site.parse(name.rpartition(".")[0]) in wanted}
        )
        kept.provenance = self.provenance
        return kept

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

    @property
    def routed_tokens(self) -> dict[Site, Float[Tensor, "experts"]]:
        """For each expert of the sites inside routed experts, how many counted tokens were routed to it."""
        return {site: routing[0].clone() for site, routing in self._routing.items()}

    @property
    def gate_sums(self) -> dict[Site, Float[Tensor, "experts"]]:
        """Likewise, the sum of the gates with which they were."""
        return {site: routing[1].clone() for site, routing in self._routing.items()}

    @property
    def load(self) -> NeuronMap:
        """For each neuron inside routed experts, the share of counted tokens that were routed to its expert."""
        if not self._routing:
            raise EmptyStatisticError("these moments have no site inside routed experts: collect at 'experts.post'")
        shares = {
            site: (routing[0] / self._count[site])[:, None].expand(self._state[site].shape[1:])
            for site, routing in self._routing.items()
        }
        return NeuronMap(shares)

    @property
    def mean_given_routed(self) -> NeuronMap:
        """Mean activation over the tokens that were routed to the neuron's expert; 0 if there was none."""
        load = self.load
        return (self.mean[load.sites] / load).map(lambda value: torch.nan_to_num(value, nan=0.0))

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


def _possible(state: Tensor, n: int, rows: int) -> bool:
    """Say whether some activations of n tokens have such sums."""
    if len(state) != rows or not state.numel() or not bool(torch.isfinite(state).all()):
        return False
    return bool((state[3:5] >= 0).all() and (state[4] <= n).all())


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
    grouped = tokens // _ROWS * _ROWS  # tokens in full groups; the last group may be smaller
    size = max(1, _TILE // (width * _ROWS)) * _ROWS
    for start in range(0, grouped, size):
        yield start, min(start + size, grouped), _ROWS
    if grouped < tokens:
        yield grouped, tokens, tokens - grouped


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
