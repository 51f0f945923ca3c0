"""`Adjust`: carry activations that look like those of the forget texts over to the distribution of the retain texts.

Knows selections and two normal distributions per neuron; knows nothing of how either was measured, nor of how neurons are
ranked (`methods.neuron_adjust` does).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_unlearn.core.counter_rng import key_of, mix, uniform
from lens_unlearn.core.errors import LensUnlearnError, SelectionError
from lens_unlearn.interventions.base import (
    HookFunction,
    Intervention,
    Live,
    Parts,
)
from lens_unlearn.interventions.selections import check_shape, describe_selection, maps_in, selection_in
from lens_unlearn.model.routed import Routed, takes_routed
from lens_unlearn.model.sites import Point, Site
from lens_unlearn.neurons.maps import NeuronMap

__all__ = ["Adjust"]

TOGETHER = 2**15
"""The most draws of a forward pass that are made for all sites at once: more do not stay in a processor's cache."""


@dataclass(frozen=True, eq=False, repr=False)
class Adjust(Intervention):
    """Neuron Adjust: carry the selected neurons' activations that look like the forget texts to the retain side.

    With N the normal density, per selected neuron and position:

        p_r = N(x; mu_r, sigma_r),  p_f = N(x; mu_f, sigma_f)
        x' = mu_r - sigma_r (x - mu_f) / sigma_f   if p_f >= p_r (and, for rule "random", with probability
                                                   p_f / (p_r + p_f)), else x

    In log-densities, since both densities underflow in the tails. The random rule's draw depends on the seed, the neuron
    and the tokens up to the position, and on nothing else: not on the batch, the padding or the cache.

    Source: Li, Sun, Weng, "Effective Skill Unlearning through Intervention and Abstention" (2025). The released code
    keeps the variance under the name of sigma, overwrites sigma_f with mu_f, and draws one random number per row.

    Args:
        selection: A boolean `NeuronMap`, with at least one neuron.
        forget_mean: mu_f, for every neuron of the selection's sites.
        forget_std: sigma_f, likewise.
        retain_mean: mu_r, likewise.
        retain_std: sigma_r, likewise.
        rule: "random" (published) or "deterministic".
        seed: Of the random rule's draws.
        floored: How many of the selected neurons' sigmas were raised to a floor; kept for `repr`.

    Raises:
        SelectionError: If the selection is not boolean or empty, or a sigma of a selected neuron is not positive.
    """

    kind: ClassVar[str] = "adjust"

    selection: NeuronMap
    forget_mean: NeuronMap
    forget_std: NeuronMap
    retain_mean: NeuronMap
    retain_std: NeuronMap
    rule: Literal["random", "deterministic"] = "random"
    seed: int = 0
    floored: int = 0

    def __post_init__(self) -> None:
        """Check the maps against each other."""
        if not self.selection.is_selection or self.selection.count() == 0:
            raise SelectionError(
                "Adjust needs a boolean map with at least one neuron: select first, as in score.top(0.02)"
            )
        if self.rule not in ("random", "deterministic"):
            raise SelectionError(f"rule={self.rule!r} is not known: choose from random, deterministic")
        for site in self._sites():
            for name in self._MAPS:
                given = getattr(self, name)
                if site not in given or given[site].shape != self.selection[site].shape:
                    raise SelectionError(f"{site}: {name} does not cover the selection")
                values = given[site][self.selection[site]]
                if not bool(torch.isfinite(values).all()) or (name.endswith("std") and not bool((values > 0).all())):
                    raise SelectionError(f"{site}: {name} of a selected neuron is not finite, or not positive")

    _MAPS: ClassVar[tuple[str, ...]] = ("forget_mean", "forget_std", "retain_mean", "retain_std")

    def _sites(self) -> list[Site]:
        return [site for site in self.selection if bool(self.selection[site].any())]

    @property
    def looks_at_rows(self) -> bool:  # type: ignore[override]
        """Whether it draws: the random rule's draws depend on the text."""
        return self.rule == "random"

    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return one hook per site with a selected neuron."""
        sites = self._sites()
        chosen = [self.selection[site].reshape(-1).nonzero()[:, 0] for site in sites]
        draws = _Draws(
            [mix(index + key_of("neuron adjust", self.seed, str(site))) for site, index in zip(sites, chosen)]
        )
        return [(site, self._hook(site, chosen[i], partial(draws.at, i))) for i, site in enumerate(sites)]

    def _hook(self, site: Site, index: Tensor, draw: Callable[[Tensor, Live], Tensor]) -> HookFunction:
        mu_f, sigma_f, mu_r, sigma_r = (getattr(self, m)[site].reshape(-1)[index].float() for m in self._MAPS)
        log_ratio = (sigma_r / sigma_f).log()  # log p_f - log p_r where x is at both means
        means, stds = (torch.stack(pair)[:, None, None] for pair in ((mu_f, mu_r), (sigma_f, sigma_r)))
        random = self.rule == "random"

        def act(x: Any, live: Live) -> Any:
            if isinstance(x, Routed):
                where = live.like(index, x.key)
                return x.with_selected(where, adjusted(x.selected(where), live))
            if random and live.rows is not None:
                live.rows.check(x)  # here, where an error can say what shape all of it has
            flat = x.reshape(*x.shape[:2], -1)
            where = live.like(index, x)
            return flat.index_copy(2, where, adjusted(flat.index_select(2, where), live)).reshape(x.shape)

        def adjusted(x: Tensor, live: Live) -> Tensor:
            # Few operations, each of several rows of numbers: in generation, of a few tokens, it is their number that costs.
            mean, std, mr, sr, offset = (t.to(x.device) for t in (means, stds, mu_r, sigma_r, log_ratio))
            z_f, z_r = ((x.float() - mean) / std).unbind()
            # log p_f / p_r = (z_r^2 - z_f^2) / 2 + log sigma_r / sigma_f. Some 15 sigmas out both densities are 0 in float32,
            # and their ratio is NaN, but its logarithm is not. Written as a product, since each square may overflow.
            log_odds = 0.5 * (z_r - z_f) * (z_r + z_f) + offset
            flip = log_odds >= 0
            if random:
                flip &= draw(x, live) < log_odds.sigmoid()  # p_f / (p_r + p_f)
            return torch.where(flip, (mr - sr * z_f).to(x.dtype), x)

        return takes_routed(act)

    def check(self, points: Mapping[Site, Point]) -> None:
        """Refuse a model with other numbers of neurons."""
        for site in self._sites():
            check_shape(site, self.selection.shape_of(site), points[site])

    def describe(self) -> dict[str, str]:
        """Return how many neurons of each site are adjusted."""
        return describe_selection(self.selection)

    def parts(self) -> Parts:
        """Return the selection and the four maps."""
        header = {"kind": self.kind, "rule": self.rule, "seed": self.seed, "floored": self.floored}
        tensors = {f"selection/{site}": value.to(torch.uint8) for site, value in self.selection.shaped()}
        for name in self._MAPS:
            tensors |= {f"{name}/{s}": v.float() for s, v in getattr(self, name).shaped() if s in self.selection}
        return header, tensors

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Adjust":
        """Rebuild from `parts`."""
        maps = {name: NeuronMap(maps_in(tensors, name)) for name in cls._MAPS}
        settings = {"rule": header["rule"], "seed": int(header["seed"]), "floored": int(header["floored"])}
        return cls(selection_in(tensors), **maps, **settings)

    def __repr__(self) -> str:
        floored = f", {self.floored:,} sigmas floored" if self.floored else ""
        seed = f", seed {self.seed}" if self.rule == "random" else ""
        layers = len({site.layer for site in self._sites()})
        count = f"{self.selection.count():,} of {self.selection.numel():,} neurons"
        return f"Adjust({self.rule}{seed}, {count}, {layers} layers, {', '.join(self.selection.kinds)}{floored})"


class _Draws:
    """A uniform number for every selected neuron of every site at every position of a forward pass.

    From the key of the text up to the position, and of the neuron; not from a random generator, whose next number depends on what
    was drawn before: on the batch, its padding, and whether there is a cache.
    """

    def __init__(self, neurons: Sequence[Int[Tensor, "chosen"]]) -> None:
        self.neurons, self.sizes, self.all = neurons, [len(keys) for keys in neurons], torch.cat(list(neurons))

    def at(self, number: int, x: Float[Tensor, "batch pos chosen"], live: Live) -> Float[Tensor, "batch pos chosen"]:
        """Return the numbers of one site.

        Raises:
            LensUnlearnError: If the model does not run on tokens, or the activations are of others.
        """
        rows = live.rows
        if rows is None:
            raise LensUnlearnError("rule='random' needs token ids: run the model on tokens, or take 'deterministic'")
        rows.check(x)
        keys = rows.beside(x).keys[:, :, None]
        if rows.tokens.numel() * len(self.all) > TOGETHER:
            return uniform(keys + live.like(self.neurons[number], x))
        # Of a few tokens, as in generation, for all layers at once: a draw is some twenty operations, whatever the number of draws.
        return live.once((self, x.device), lambda: uniform(keys + live.like(self.all, x)).split(self.sizes, 2))[number]
