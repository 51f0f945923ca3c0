"""The promises of statistics, each as a check on made-up activations.

Knows what any statistic has to do (`update`, `merge`, `state`); knows nothing of what a particular one measures.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from lens_unlearn.core import artefacts
from lens_unlearn.core.errors import EmptyStatisticError, LensUnlearnError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.model.host import Model
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.moments import Moments
from lens_unlearn.neurons.statistic import Statistic
from lens_unlearn.testing.promises import Promises, Seen, demand, moved_by

__all__ = ["StatisticPromises"]

_SITES: dict[Site, tuple[int, ...]] = {Site(0, "mlp.post"): (24,), Site(1, "attn.z"): (3, 8)}
_N = 420


def maps_of(statistic: Any) -> Mapping[str, Tensor]:
    """Return every property that is a map and not empty; the state, if there are none."""
    maps: dict[str, Tensor] = {}
    for name in dir(type(statistic)):
        if not name.startswith("_") and isinstance(getattr(type(statistic), name), property):
            with suppress(EmptyStatisticError):
                value = getattr(statistic, name)
                maps |= {f"{name} at {site}": x for site, x in value.items()} if isinstance(value, NeuronMap) else {}
    return maps or statistic.state()


class StatisticPromises(Promises):
    """A statistic, filled with made-up activations: of small and large variance, near zero and far from it."""

    def __init__(
        self,
        make: Callable[[], Statistic],
        sites: Mapping[Site, tuple[int, ...]] | None,
        read: Callable[[Any], Mapping[str, Tensor]] | None,
        model: Model | None,
    ) -> None:
        self.subject, self.model, self._make = getattr(make, "__name__", "the statistic"), model, make
        self._sites, self._reading = sites or _SITES, read or maps_of
        generator = torch.Generator().manual_seed(0)
        self._values = {
            site: torch.randn(_N, *shape, generator=generator)
            * torch.logspace(-2, 2.5, math.prod(shape)).reshape(shape)
            + torch.linspace(-3, 40, math.prod(shape)).reshape(shape)
            for site, shape in self._sites.items()
        }
        self._weight = (torch.rand(_N, generator=generator) < 0.7).float()

    def _fill(
        self,
        statistic: Any,
        rows: Sequence[int] | Tensor = range(_N),
        values: Mapping[Site, Tensor] | None = None,
        weight: Tensor | None = None,
        piece: int = 60,
    ) -> Any:
        """Update a statistic with some of the tokens, `piece` at a time."""
        for part in torch.as_tensor(rows, dtype=torch.long).split(piece):
            counted = (self._weight if weight is None else weight)[part]
            if hasattr(statistic, "locate"):
                statistic.locate(part // 50, part % 50)
            for site, x in (self._values if values is None else values).items():
                statistic.update(site, x[part], counted)
        return statistic

    def _thirds(self) -> list[Any]:
        return [self._fill(self._make(), range(start, _N, 3)) for start in range(3)]

    def _read(self, statistic: Any) -> dict[str, Tensor]:
        try:
            return {name: torch.as_tensor(x).clone() for name, x in self._reading(statistic).items()}
        except EmptyStatisticError:
            return {}

    def _same(self, context: str, one: Any, other: Any, tolerance: float = 0.0) -> None:
        """Demand that two statistics read the same, up to a relative tolerance."""
        a, b = (x if isinstance(x, dict) else self._read(x) for x in (one, other))
        for name in {**a, **b}:
            demand(
                name in a and name in b and a[name].shape == b[name].shape,
                f"{context} only one has {name}, or its shape",
            )
            x, y = a[name].double(), b[name].double()
            bad = ~((x == y) | ((x - y).abs() <= tolerance * x.abs().clamp_min(1.0)))
            if bad.any():
                raise Seen(f"{context} {name} is {float(x[bad][0]):.8g} and {float(y[bad][0]):.8g}")

    def is_a_statistic(self) -> None:
        """It has fresh, update, merge, state and with_state, and a repr of one line."""
        made = self._make()
        for name in ("fresh", "update", "merge", "state", "with_state"):
            demand(callable(getattr(made, name, None)), f"it has no {name}")
        demand("\n" not in repr(made) and " object at 0x" not in repr(made), f"its repr is {made!r}")

    def makes_fresh_ones(self) -> None:
        """`fresh` is empty, has the same settings, and shares no memory with the statistic that it came from."""
        full = self._fill(self._make())
        before, fresh = self._read(full), full.fresh()
        self._same("fresh and newly made,", fresh, self._make())
        demand(repr(fresh) == repr(self._make()), f"its repr is {fresh!r}, and that of a new one {self._make()!r}")
        self._fill(fresh, range(90))
        self._same("before and after the fresh one was filled,", before, full)

    def is_safe_when_empty(self) -> None:
        """Read while empty it raises an EmptyStatisticError or returns numbers, and two empty ones merge."""
        for name, x in self._read(self._make()).items():
            demand(torch.isfinite(x.double()).all(), f"{name} is NaN or infinite")
        self._same("merged and empty,", self._make().merge(self._make()), self._make())

    def leaves_its_input(self) -> None:
        """`update` writes neither to the activations nor to the weight."""
        values, weight = {site: x.clone() for site, x in self._values.items()}, self._weight.clone()
        made: Any = self._make()
        if hasattr(made, "locate"):
            made.locate(torch.arange(_N), torch.arange(_N))
        for site, x in values.items():
            made.update(site, x, weight)
            demand(torch.equal(x, self._values[site]), f"it wrote to the activations at {site}")
            demand(torch.equal(weight, self._weight), f"it wrote to the weight at {site}")

    def skips_what_does_not_count(self) -> None:
        """Activations of weight 0 have no effect, not even NaN; nor have batches in which all weights are 0."""
        clean, uncounted = self._fill(self._make()), (self._weight == 0).nonzero()[:, 0]
        for garbage in (1e30, math.nan, math.inf):
            dirty = {site: x.index_fill(0, uncounted, garbage) for site, x in self._values.items()}
            self._same(f"without and with {garbage} there,", clean, self._fill(self._make(), values=dirty))
        for rows in (uncounted[:9], uncounted[:0]):
            self._same(f"empty and with {len(rows)} such tokens,", self._make(), self._fill(self._make(), rows))

    def refuses_what_is_no_number(self) -> None:
        """A counted activation that is NaN or infinite raises an error that names the site, and changes nothing."""
        made = self._fill(self._make(), range(200))
        before, row = self._read(made), int(self._weight[200:].nonzero()[0]) + 200
        for site, x in self._values.items():
            for bad in (math.nan, math.inf):
                broken = x.index_fill(0, torch.tensor([row]), bad)
                try:
                    self._fill(made, range(200, row + 5), values={site: broken})
                except LensUnlearnError as error:
                    demand(str(site) in str(error), f"at {site} the error says {str(error)!r}")
                else:
                    raise Seen(f"at {site} it took {bad}")
                self._same(f"before and after the error at {site},", before, made)

    def keeps_no_graph(self) -> None:
        """Activations that require gradients are detached."""
        with torch.enable_grad():
            made = self._fill(
                self._make(), values={site: x * torch.ones(1).requires_grad_() for site, x in self._values.items()}
            )
        held = [name for name, x in made.state().items() if x.requires_grad]
        demand(not held, f"its state holds gradients of {', '.join(held)}")

    def keeps_sites_apart(self) -> None:
        """What it holds for one site does not depend on the other sites."""
        parts: dict[str, Tensor] = {}
        for site, x in self._values.items():
            parts |= self._read(self._fill(self._make(), values={site: x}))
        self._same("site by site and together,", parts, self._fill(self._make()))

    def merges_in_any_grouping(self) -> None:
        """`merge` is associative, to twelve digits."""
        a, b, c = self._thirds()
        self._same("in (a b) c and a (b c),", a.merge(b).merge(c), a.merge(b.merge(c)), 1e-12)

    def merges_in_any_order(self) -> None:
        """`merge` is commutative, to twelve digits."""
        a, b, _ = self._thirds()
        self._same("in a b and b a,", a.merge(b), b.merge(a), 1e-12)

    def merges_with_nothing(self) -> None:
        """Merging with an empty one changes nothing."""
        a, _, _ = self._thirds()
        for nothing in (a.fresh(), self._make()):
            self._same("merged with an empty one and alone,", a.merge(nothing), a, 1e-12)
            self._same("merged into an empty one and alone,", nothing.merge(a), a, 1e-12)

    def merges_into_a_new_one(self) -> None:
        """`merge` changes neither of its inputs, then or later."""
        a, b, _ = self._thirds()
        before = [self._read(part) for part in (a, b)]
        for one, other in ((a, b), (a, self._make()), (self._make(), b)):
            self._fill(one.merge(other), range(90))
            for old, part in zip(before, (a, b), strict=True):
                self._same("before and after the merge,", old, part)

    def does_not_depend_on_batches(self) -> None:
        """However the tokens are batched, ordered and merged, the result is the same to six digits."""
        at_once, generator = self._fill(self._make(), piece=_N), torch.Generator().manual_seed(1)
        a, b, c = self._thirds()
        cuts = {
            "seven at a time": self._fill(self._make(), piece=7),
            "in another order": self._fill(self._make(), torch.randperm(_N, generator=generator), piece=61),
            "merged from parts": c.merge(a).merge(b),
        }
        for name, cut in cuts.items():
            self._same(f"at once and {name},", at_once, cut, 2e-6)

    def comes_back_from_its_state(self) -> None:
        """`with_state` of `state`, through a file, reads the same, continues the same, and shares no memory with it."""
        half = self._fill(self._make(), range(0, _N, 2))
        with tempfile.TemporaryDirectory() as folder:
            artefacts.write(Path(folder) / "state", "statistic", half.state(), {})
            read = self._make().with_state(artefacts.read(Path(folder) / "state")[1])
        before, copy = self._read(half), self._make().with_state(half.state())
        self._same("before and after,", before, read)
        self._fill(copy, range(1, _N, 2))
        self._same("before and after its copy went on,", before, half)
        for one in (half, read):
            self._fill(one, range(1, _N, 2))
        self._same("gone on with and read back,", half, read, 1e-12)

    def sums_in_full_precision(self) -> None:
        """Activations in half precision give the result of the same numbers in single precision, to five digits."""
        for dtype in (torch.bfloat16, torch.float16):
            half = {site: x.to(dtype) for site, x in self._values.items()}
            single = self._fill(self._make(), values={site: x.float() for site, x in half.items()})
            self._same(f"of float32 and {dtype},", single, self._fill(self._make(), values=half), 1e-5)

    def collects(self) -> None:
        """`collect` over a model gives the same at every batch size, and does not advance the random states."""
        if self.model is None:
            raise SkipTest("no model was given")
        generator, sizes = torch.Generator().manual_seed(0), torch.tensor([9, 3, 14, 5, 6, 11, 2])
        tokens = torch.randint(int(self.model.cfg.d_vocab), (int(sizes.sum()),), generator=generator).int()
        counted, starts = (
            torch.rand(len(tokens), generator=generator) < 0.8,
            torch.cat([torch.zeros(1), sizes.cumsum(0)]).long(),
        )
        keys = tuple(f"made up {number}" for number in range(len(sizes)))
        corpus = Corpus("made up", tokens, counted, starts, torch.arange(len(sizes)), keys, 14, False, "")
        kinds = sorted({site.kind for site in self._sites})

        def run(statistic: Any, size: int = 8) -> Any:
            return collect(self.model, corpus, kinds, statistic=statistic, batch_size=size, progress=False)

        empty = self._make()
        one = run(empty, 1)
        for size in (2, 8):
            self._same("at batch size 1 and a larger one,", one, run(empty, size), 1e-4)
        self._same("new and handed over,", self._make(), empty)
        moved = moved_by(self.model, lambda: run(self._make())) - moved_by(self.model, lambda: run(Moments()))
        demand(not moved, f"the random state of {', '.join(sorted(moved))} moved")
