"""`Histogram`: counts of every neuron's activation in fixed bins, the same for every corpus and model.

Knows activations, site by site, and which tokens count; knows nothing of models, corpora, or how a distribution is drawn.
"""

import math
import threading
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_unlearn.core.errors import EmptyStatisticError, LensUnlearnError
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.statistic import joined_provenance, require_all_read, require_finite

__all__ = ["Histogram"]

_HISTOGRAM_TILE = (1024, 256)  # tokens and neurons binned at a time: few enough to stay in a processor's cache
_SCRATCH = (torch.float32, torch.float32, torch.int32)
_own = threading.local()  # scratch space: two threads may fill histograms, each on a model of its own


class Histogram:
    """Counts of every neuron's activation in fixed bins, the same for every corpus and model.

    Bin edges are equally spaced in asinh(x / scale): fine about zero, and reaching to `limit` on both sides, so two
    histograms always merge and compare. What lies beyond the limits is counted in the outermost bins.

    Args:
        bins: Number of bins; even, so that zero is an edge.
        scale: Where the spacing turns from linear to logarithmic, in units of the activation.
        limit: The largest absolute activation that has a bin of its own.
    """

    def __init__(self, *, bins: int = 128, scale: float = 0.1, limit: float = 1000.0) -> None:
        if bins < 2 or bins % 2 or scale <= 0 or limit <= scale:
            raise LensUnlearnError(
                f"bins={bins}, scale={scale}, limit={limit}: give an even number of bins, and 0 < scale < limit"
            )
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
        if not bool((weight > 0).any()):
            return
        x = values.detach()
        flat, counted = x.reshape(len(x), -1), weight.to(x.device) > 0
        counts = torch.zeros(flat.shape[1], self.bins, dtype=torch.int64)
        # Binning passes over the same numbers several times: on a CPU in tiles that stay in its cache, on a GPU, where each
        # call costs, over everything at once.
        tokens, neurons = _HISTOGRAM_TILE if flat.device.type == "cpu" else flat.shape
        for first in range(0, len(flat), tokens):
            rows = slice(first, first + tokens)
            left_out = (~counted[rows]).nonzero()[:, 0]
            for start in range(0, flat.shape[1], neurons):
                bins = self._bins(flat[rows, start : start + neurons])
                if bins is None:  # something is NaN or infinite, or only their sum: look before raising
                    require_finite(site, flat[counted], tuple(x.shape[1:]))
                    part = flat[rows, start : start + neurons].masked_fill(~counted[rows, None], 0)
                    # Float64 values beyond float32 go to the outermost bins.
                    bins = self._bins(part.float().nan_to_num(), finite=True)
                    assert bins is not None
                # Each neuron has its own range of numbers, so that a single bincount counts for all of them; behind these is one
                # for all positions that do not count.
                width = bins.shape[1]
                offsets = torch.arange(width, dtype=torch.int32, device=bins.device) * self.bins + self.bins // 2
                bins.add_(offsets).index_fill_(0, left_out, width * self.bins)
                tile_counts = torch.bincount(bins.reshape(-1), minlength=width * self.bins + 1)[:-1]
                counts[start : start + width] += tile_counts.view(width, self.bins).cpu()
        counts = counts.reshape(*x.shape[1:], self.bins)
        self._counts[site] = self._counts[site] + counts if site in self._counts else counts

    def _bins(self, x: Float[Tensor, "tokens n"], finite: bool = False) -> Int[Tensor, "tokens n"] | None:
        """Return the bin of each value, counted from zero on: in scratch space, until the next call.

        asinh(y) is the sign of y times log(abs(y) + sqrt(y^2 + 1)), and PyTorch's log is ten times as fast as its asinh. The
        sign is put on the bin, not on the logarithm: next to zero that is zero, and the side would be lost. For a bin b, counted
        outwards from zero, the one on the other side is -1 - b, which is b with all bits flipped: b xor -1.

        Args:
            x: The values.
            finite: Whether that is known. If not, None is returned where their sum is NaN or infinite.
        """
        half = self.bins // 2
        step = half / math.asinh(self.limit / self.scale)
        y, size, negative = self._scratch(x)
        # A sum with 0 turns -0 into 0, which is positive.
        torch.add(
            torch.zeros((), device=x.device), y.copy_(x) if x.dtype != y.dtype else x, alpha=1 / self.scale, out=y
        )
        if not finite and not math.isfinite(float(y.sum())):
            return None
        torch.bitwise_right_shift(y.view(torch.int32), 31, out=negative)  # the sign bit, as -1 or 0
        torch.addcmul(torch.ones((), device=x.device), y, y, out=size).sqrt_().add_(y.abs_()).log_().mul_(step)
        return y.view(torch.int32).copy_(size.clamp_max_(half - 1)).bitwise_xor_(negative)

    def _scratch(self, x: Float[Tensor, "tokens n"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return space for float32, float32 and int32 numbers, as many as there are values.

        On a CPU the same in every call of a thread, since fresh memory costs as much as what is computed in it.
        """
        if x.device.type != "cpu":
            return tuple(torch.empty_like(x, dtype=dtype) for dtype in _SCRATCH)  # type: ignore[return-value]
        buffers = getattr(_own, "buffers", None)
        if buffers is None or buffers[0].numel() < x.numel():
            buffers = _own.buffers = [torch.empty(x.numel(), dtype=dtype) for dtype in _SCRATCH]
        return tuple(buffer[: x.numel()].view(x.shape) for buffer in buffers)  # type: ignore[return-value]

    def merge(self, other: "Histogram") -> "Histogram":
        """Return the counts of both parts together.

        Raises:
            LensUnlearnError: If their bins differ.
        """
        if (self.bins, self.scale, self.limit) != (other.bins, other.scale, other.limit):
            raise LensUnlearnError("histograms with different bins do not merge: collect both with the same settings")
        merged = self.fresh()
        merged.provenance = joined_provenance(self.provenance, other.provenance)
        for site in {**self._counts, **other._counts}:
            parts = [part._counts[site] for part in (self, other) if site in part._counts]
            merged._counts[site] = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return merged

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
                raise LensUnlearnError(f"{site}: the stored tensor does not hold counts in {self.bins} bins")
        return require_all_read(new, tensors)

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
