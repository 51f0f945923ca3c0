"""`NeuronMap`: one tensor per site, with arithmetic, comparison, boolean algebra and exact selection.

Everything known about neurons is such a map. A score is an expression on maps, and a selection is a boolean map:

    score = forget.mean_abs["mlp.post"] / (retain.mean_abs["mlp.post"] + 1e-3)
    chosen = score.top(0.02)

Knows sites by name, and tensors; knows nothing of models, nor of where the values come from.
"""

import html
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.core.numbers import Range
from lens_unlearn.model.experts import EXPERT_KINDS
from lens_unlearn.model.sites import Site, check_kind

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["NeuronMap", "check_fraction", "neuron_name"]

Values = Shaped[Tensor, "*neurons"]
Scalar = float | int | bool


class NeuronMap:
    """An immutable map from sites to tensors of one value per neuron.

    MLP sites hold ``[neurons]``, attention sites ``[heads, d_head]``. Sites inside routed experts hold ``[experts * columns]``,
    expert by expert; what is given as ``[experts, columns]`` is flattened, and the map knows how many experts there are. Operators
    act neuron by neuron; two maps must have the same sites. A boolean map is a selection.

    A map read from a statistic also knows which neurons were alive (their activation varied over the corpus).
    Arithmetic keeps that knowledge (alive in either operand), and `top` uses it: it never prefers a neuron that is
    dead everywhere, or ablated already, to a live one.

    Args:
        values: The tensors; copied to the CPU, detached.
        live: Optionally the boolean tensors of neurons that are alive; the same sites and shapes.
        experts: Of sites inside routed experts, how many experts there are, where the values are flat; optional.

    Raises:
        SelectionError: If there is no site, or `live` or `experts` does not match `values`.

    Examples:
        >>> score = NeuronMap({Site(0, "mlp.post"): torch.tensor([0.5, 2.0, 1.0])})
        >>> score.top(1 / 3)
        NeuronMap(1 of 3 neurons, 1 layer, mlp.post)
        >>> (score > 0.7).count()
        2
    """

    __slots__ = ("_experts", "_live", "_values")
    __hash__ = None  # type: ignore[assignment]  # == compares neuron by neuron

    def __init__(
        self,
        values: Mapping[Site, Values],
        *,
        live: Mapping[Site, Tensor] | None = None,
        experts: Mapping[Site, int] | None = None,
    ) -> None:
        if not values:
            raise SelectionError("a NeuronMap needs at least one site")
        self._values = {Site(*site): value.detach().cpu().clone() for site, value in sorted(values.items(), key=_order)}
        self._experts = {site: n for site, n in (experts or {}).items() if site in self._values}
        for site, value in self._values.items():
            if site.kind in EXPERT_KINDS and value.ndim == 2:
                self._experts[site], self._values[site] = value.shape[0], value.reshape(-1)
            if value.numel() % (count := self._experts.get(site, 1)):
                raise SelectionError(f"{site}: {value.numel():,} neurons are not those of {count:,} experts")
        self._live = None
        if live is not None:
            self._live = {
                site: live[site].detach().cpu().bool().reshape(value.shape).clone()
                if live[site].numel() == value.numel()
                else live[site]
                for site, value in self._values.items()
            }
        for site, mask in (self._live or {}).items():
            if mask.shape != self._values[site].shape:
                raise SelectionError(
                    f"{site}: {tuple(mask.shape)} live flags for {tuple(self._values[site].shape)} values"
                )

    # --- reading -----------------------------------------------------------------------------------------------------

    @property
    def sites(self) -> list[Site]:
        """The sites, ordered by kind, then layer."""
        return list(self._values)

    @property
    def kinds(self) -> list[str]:
        """The kinds of site, in order."""
        return list(dict.fromkeys(site.kind for site in self._values))

    @property
    def is_selection(self) -> bool:
        """Whether every value is boolean."""
        return all(value.dtype == torch.bool for value in self._values.values())

    @property
    def live(self) -> "NeuronMap":
        """The neurons whose activation varied; all of them where nothing is known."""
        flags = self._live or {site: torch.ones_like(value, dtype=torch.bool) for site, value in self._values.items()}
        return NeuronMap(flags, experts=self._experts)

    @property
    def experts(self) -> dict[Site, int]:
        """How many routed experts each site has, of those sites inside experts of which it is known."""
        return dict(self._experts)

    def shape_of(self, site: Site) -> tuple[int, ...]:
        """Return how the neurons of a site lie: ``(neurons,)``, ``(heads, d_head)``, or ``(experts, columns)``."""
        value = self._values[site]
        count = self._experts.get(site)
        return tuple(value.shape) if count is None else (count, value.numel() // count)

    def shaped(self) -> Iterator[tuple[Site, Tensor]]:
        """Yield each site and a copy of its tensor, in the shape in which the neurons lie: what files hold."""
        return ((site, value.reshape(self.shape_of(site)).clone()) for site, value in self._values.items())

    def __iter__(self) -> Iterator[Site]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, site: object) -> bool:
        return site in self._values

    def items(self) -> Iterator[tuple[Site, Tensor]]:
        """Yield each site and a copy of its tensor."""
        return ((site, value.clone()) for site, value in self._values.items())

    def __getitem__(self, key: Any) -> Any:
        """Return the tensor of a `Site` or its name (a copy), or the part of the map of one kind, layer, or of several sites.

        Raises:
            SelectionError: If the map has nothing there; the message says what it has.
        """
        if isinstance(key, Site):
            if key in self._values:
                return self._values[key].clone()
            raise SelectionError(f"{key} is not in this map, which has {self._extent()}")
        if isinstance(key, str) and key[:1] in "Lb":  # a site's name, ours or TransformerLens'
            return self[Site.parse(key)]
        if isinstance(key, str):
            kind = check_kind(key)
            return self._part(lambda site: site.kind == kind, key)
        if isinstance(key, int):
            return self._part(lambda site: site.layer == key, f"layer {key}")
        wanted = set(key)
        return self._part(lambda site: site in wanted, key)

    def _part(self, keep: Callable[[Site], bool], key: object) -> "NeuronMap":
        chosen = {site: value for site, value in self._values.items() if keep(site)}
        if not chosen:
            raise SelectionError(f"{key!r} is not in this map, which has {self._extent()}")
        return NeuronMap(chosen, live=self._live, experts=self._experts)

    def flat(self) -> Tensor:
        """Concatenate all values into one vector, in the order of `sites`."""
        return torch.cat([value.reshape(-1) for value in self._values.values()])

    def stack(self) -> Tensor:
        """Stack the layers of a map of one kind into ``[layers, *neurons]``.

        Raises:
            SelectionError: If the map has several kinds, or layers of different width.
        """
        if len(self.kinds) != 1 or len({value.shape for value in self._values.values()}) != 1:
            raise SelectionError(f"only layers of one kind and width stack, and this map has {self._extent()}")
        return torch.stack(list(self._values.values()))

    def numel(self) -> int:
        """Count the neurons of the map."""
        return sum(value.numel() for value in self._values.values())

    def count(self) -> int:
        """Count the neurons that a selection selects."""
        return int(sum(int((value != 0).sum()) for value in self._values.values()))

    def per_layer(self) -> dict[Site, float]:
        """Give the mean value of every site; for a selection, the share of its neurons that is selected."""
        return {site: float(value.double().mean()) for site, value in self._values.items()}

    def to_frame(self) -> "pd.DataFrame":
        """Give one row per neuron: layer, site, neuron (its flat index), head (attention only), expert (where known), value."""
        import pandas as pd

        frames = []
        for site, value in self._values.items():
            columns = {"layer": site.layer, "site": site.kind, "neuron": range(value.numel())}
            if len(shape := self.shape_of(site)) == 2:
                place = "expert" if site in self._experts else "head"
                columns[place] = [index // shape[1] for index in range(value.numel())]
            frames.append(
                pd.DataFrame(
                    {
                        **columns,
                        "value": value.reshape(-1).float().numpy()
                        if value.dtype != torch.bool
                        else value.reshape(-1).numpy(),
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)

    # --- arithmetic --------------------------------------------------------------------------------------------------

    def map(self, function: Callable[[Tensor], Tensor]) -> "NeuronMap":
        """Apply a function to every tensor. If it changes shapes, the knowledge of which neurons were alive is dropped."""
        values = {site: function(value.clone()) for site, value in self._values.items()}
        same_shapes = all(values[site].shape == value.shape for site, value in self._values.items())
        return NeuronMap(values, **(self._knowledge if same_shapes else {}))

    @property
    def _knowledge(self) -> dict[str, Any]:
        return {"live": self._live, "experts": self._experts}

    def combine(self, other: "NeuronMap | Scalar", function: Callable[[Any, Any], Tensor]) -> "NeuronMap":
        """Apply a function of two tensors, site by site; a number stands for itself at every site.

        Raises:
            SelectionError: If the maps do not have the same sites and shapes.
        """
        if not isinstance(other, NeuronMap):
            return self.map(lambda value: function(value, other))
        if self.sites != other.sites:
            unshared = sorted(str(site) for site in {*self.sites} ^ {*other.sites})
            raise SelectionError(f"the maps differ in their sites: only one of them has {', '.join(unshared[:4])}")
        for site, value in self._values.items():
            if value.shape != other._values[site].shape:
                shapes = f"{tuple(value.shape)} and {tuple(other._values[site].shape)}"
                raise SelectionError(f"{site}: the maps have shapes {shapes}: are they of the same model?")
        for site, count in self._experts.items():
            if other._experts.get(site, count) != count:
                raise SelectionError(
                    f"{site}: the maps are of {count} and {other._experts[site]} experts: are they of the same model?"
                )
        values = {site: function(value, other._values[site]) for site, value in self._values.items()}
        live = self._live or other._live
        if self._live is not None and other._live is not None:
            live = {site: self._live[site] | other._live[site] for site in values}
        return NeuronMap(values, live=live, experts=other._experts | self._experts)

    def where(self, keep: "NeuronMap", other: Scalar) -> "NeuronMap":
        """Keep the values that a selection selects, and put a number everywhere else."""
        return self.combine(
            keep, lambda value, mask: torch.where(mask, value, torch.as_tensor(other, dtype=value.dtype))
        )

    def __add__(self, other: Any) -> "NeuronMap":
        return self.combine(other, operator.add)

    def __radd__(self, other: Any) -> "NeuronMap":
        return self.combine(other, lambda a, b: b + a)

    def __sub__(self, other: Any) -> "NeuronMap":
        return self.combine(other, operator.sub)

    def __rsub__(self, other: Any) -> "NeuronMap":
        return self.combine(other, lambda a, b: b - a)

    def __mul__(self, other: Any) -> "NeuronMap":
        return self.combine(other, operator.mul)

    def __rmul__(self, other: Any) -> "NeuronMap":
        return self.combine(other, lambda a, b: b * a)

    def __truediv__(self, other: Any) -> "NeuronMap":
        return self.combine(other, operator.truediv)

    def __rtruediv__(self, other: Any) -> "NeuronMap":
        return self.combine(other, lambda a, b: b / a)

    def __pow__(self, other: Any) -> "NeuronMap":
        return self.combine(other, operator.pow)

    def __neg__(self) -> "NeuronMap":
        return self.map(operator.neg)

    def __abs__(self) -> "NeuronMap":
        return self.map(operator.abs)

    def log(self) -> "NeuronMap":
        """Take natural logarithms."""
        return self.map(torch.log)

    def sqrt(self) -> "NeuronMap":
        """Take square roots."""
        return self.map(torch.sqrt)

    def __lt__(self, other: Any) -> "NeuronMap":
        return self.combine(other, operator.lt)

    def __le__(self, other: Any) -> "NeuronMap":
        return self.combine(other, operator.le)

    def __gt__(self, other: Any) -> "NeuronMap":
        return self.combine(other, operator.gt)

    def __ge__(self, other: Any) -> "NeuronMap":
        return self.combine(other, operator.ge)

    def __eq__(self, other: Any) -> "NeuronMap":  # type: ignore[override]
        return self.combine(other, operator.eq)

    def __ne__(self, other: Any) -> "NeuronMap":  # type: ignore[override]
        return self.combine(other, operator.ne)

    def __and__(self, other: Any) -> "NeuronMap":
        return self._logical(other, operator.and_)

    def __or__(self, other: Any) -> "NeuronMap":
        return self._logical(other, operator.or_)

    def __xor__(self, other: Any) -> "NeuronMap":
        return self._logical(other, operator.xor)

    def __invert__(self) -> "NeuronMap":
        return self._logical(True, operator.xor)

    def _logical(self, other: Any, function: Callable[[Any, Any], Tensor]) -> "NeuronMap":
        for side in (self, other):
            if isinstance(side, NeuronMap) and not side.is_selection:
                raise SelectionError("&, |, ^ and ~ combine selections: compare the map first, as in score > 2")
        return self.combine(other, function)

    def equals(self, other: object) -> bool:
        """Say whether two maps have the same sites and exactly the same values."""
        if not isinstance(other, NeuronMap) or self.sites != other.sites:
            return False
        return all(torch.equal(self._values[site], other._values[site]) for site in self._values)

    # --- selection ---------------------------------------------------------------------------------------------------

    def top(
        self, fraction: float, *, within: Literal["model", "layer"] = "model", among: "NeuronMap | None" = None
    ) -> "NeuronMap":
        """Select the neurons with the highest values: exactly ``round(fraction * neurons)`` of them.

        Ties go to the lower site, then the lower index. Neurons that are known to be dead, or lie outside `among`,
        are taken only when no others remain.

        Args:
            fraction: Share of the neurons to select, in [0, 1].
            within: Rank all neurons of the map together ("model"), or each site for itself ("layer").
            among: A selection of candidates to prefer.

        Returns:
            A boolean map.

        Raises:
            SelectionError: If the fraction is outside [0, 1] or a value is NaN (naming the neuron).
        """
        fraction = check_fraction(fraction)
        if within not in ("model", "layer"):
            raise SelectionError(f"within={within!r} is not known: rank within 'model' or within each 'layer'")
        candidates = self.live if among is None else self.live & among
        if within == "layer":
            parts = [
                NeuronMap({site: value})._top(fraction, candidates[[site]]) for site, value in self._values.items()
            ]
            return NeuronMap({site: part._values[site] for part in parts for site in part}, experts=self._experts)
        return self._top(fraction, candidates)

    def _top(self, fraction: float, candidates: "NeuronMap") -> "NeuronMap":
        for site, value in self._values.items():
            nan = torch.isnan(value.double()).reshape(-1).nonzero()
            if len(nan):
                raise SelectionError(f"the score of {site}[{int(nan[0])}] is NaN: fix the expression before selecting")
        count = round(fraction * self.numel())
        by_value = torch.sort(self.flat().double(), descending=True, stable=True).indices
        preferred = candidates.flat()[by_value]
        chosen = torch.cat([by_value[preferred], by_value[~preferred]])[:count]
        mask = torch.zeros(self.numel(), dtype=torch.bool)
        mask[chosen] = True
        return self.unflatten(mask)

    def unflatten(self, vector: Tensor) -> "NeuronMap":
        """Cut a vector with one entry per neuron into a map of this shape; the inverse of `flat`."""
        sizes = [value.numel() for value in self._values.values()]
        parts = torch.split(vector, sizes)
        values = {s: part.reshape(v.shape) for (s, v), part in zip(self._values.items(), parts, strict=True)}
        return NeuronMap(values, experts=self._experts)

    # --- showing -----------------------------------------------------------------------------------------------------

    def _extent(self) -> str:
        layers = len({site.layer for site in self._values})
        return f"{layers} layer{'s' if layers != 1 else ''}, {', '.join(self.kinds)}"

    def __repr__(self) -> str:
        if self.is_selection:
            return f"NeuronMap({self.count():,} of {self.numel():,} neurons, {self._extent()})"
        flat = self.flat().double()
        spread = f"{float(flat.min()):.3g} to {float(flat.max()):.3g}, mean {float(flat.mean()):.3g}"
        return f"NeuronMap({self.numel():,} neurons, {self._extent()}: {spread})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{site}</td><td>{value.numel():,}</td><td>{float(value.double().mean()):.4g}</td>"
            f"<td>{float(value.double().max()):.4g}</td></tr>"
            for site, value in self._values.items()
        )
        head = "<tr><th>site</th><th>neurons</th><th>mean</th><th>max</th></tr>"
        return f"<div><p>{html.escape(repr(self))}</p><table>{head}{rows}</table></div>"


def check_fraction(fraction: float, name: str = "fraction") -> float:
    """Return a share in [0, 1] as a float.

    Raises:
        SelectionError: If it is not one.
    """
    return _OF_NEURONS.check(fraction, name, SelectionError)


_OF_NEURONS = Range(0, 1, what="is not a share of the neurons")


def _order(item: tuple[Site, Any]) -> tuple[str, int]:
    return item[0].kind, item[0].layer


def neuron_name(site: Site, neuron: SupportsIndex, shape: Sequence[int]) -> str:
    """Name a neuron, by its flat index: ``L3.mlp.post[1742]``, ``L3.attn.z[2,17]``, ``L3.experts.post[17, 402]``."""
    between = ", " if site.kind in EXPERT_KINDS else ","
    return f"{site}[{between.join(str(int(i)) for i in np.unravel_index(int(neuron), tuple(shape)))}]"
