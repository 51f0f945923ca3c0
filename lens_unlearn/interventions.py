"""Interventions: frozen values that become hooks for the length of a `with` block.

    prune = Ablate(score.top(0.02))
    with prune.on(model):
        model.generate("def fib(n):")

Nothing is written into the model. An intervention keeps no state of a run: what belongs to one lives on the `Live`
object that `on` yields. Each hook takes a tensor and returns a new one of the same shape, dtype and device.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lens_unlearn import artefacts
from lens_unlearn.coins import key_of, mix, uniform
from lens_unlearn.deltas import Matrix, Update, merge
from lens_unlearn.errors import ArtefactError, LensUnlearnError, SelectionError
from lens_unlearn.maps import NeuronMap
from lens_unlearn.models import fingerprint
from lens_unlearn.regions import Region, region_from_parts
from lens_unlearn.rows import Rows, ends_of_text, pad_of
from lens_unlearn.sites import (
    MATRICES,
    Model,
    Point,
    Remover,
    Site,
    attach,
    check_matrix,
    detach_all,
    logit_functions,
    matrix_shapes,
    matrix_value,
    on_forward,
    on_logits,
    on_matrix,
    one_thread,
    resolve,
)

__all__ = ["Abstain", "Ablate", "Adjust", "Chain", "Delta", "Intervention", "Live", "load_intervention"]

HookFunction = Callable[[Tensor, "Live"], Tensor]
MatrixFunction = Callable[[Tensor, Tensor, "Live"], Tensor]
"""Takes the input and the output of a matrix; returns a new output."""
Parts = tuple[dict[str, Any], dict[str, Tensor]]


class Live:
    """One intervention acting on one model: yielded by `Intervention.on`, dead after the block."""

    def __init__(self, intervention: "Intervention", model: Model) -> None:
        self.intervention = intervention
        self.model = model
        self.active = True
        self.abstained: Tensor = torch.zeros(0, dtype=torch.bool)
        """For each row of the last forward pass (or generation), whether the model withheld its answer."""
        self.rows: Rows | None = None
        """Where the forward pass that runs stands in its rows; only for interventions that look at rows."""
        self.notes: dict[int, Any] = {}
        """What members keep from hook to hook, and from a prompt to the tokens generated behind it."""
        self._ends: Tensor | None = None
        self._lengths: Tensor | None = None
        self._stop: tuple[int, ...] = ()
        self._refusals: dict[int, str] = {}
        self._moved: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, int, Tensor]] = {}

    def expect(
        self,
        ends: Int[Tensor, "batch"] | None,
        stop: Sequence[int] = (),
        lengths: Int[Tensor, "batch"] | None = None,
    ) -> None:
        """Say where each row's prompt ends in the next forward pass, which begins new texts.

        Args:
            ends: Positions of the prompts' last tokens; None for each row's last token that is no padding, which is what
                holds where nothing was said.
            stop: Tokens that end a text that is being generated, besides the tokenizer's.
            lengths: Tokens of each row of text padded on the right; None where the tokenizer's padding tells.
        """
        self._ends, self._stop, self._lengths, self.rows = ends, tuple(stop), lengths, None
        self.notes.clear()

    def refusal(self, row: int) -> str | None:
        """Return what is written in place of a row of the last forward pass or generation; None if nothing is."""
        return self._refusals.get(row)

    def begin(self, tokens: Int[Tensor, "batch pos"] | None, cached: int) -> None:
        """Look at the tokens of a forward pass before it runs; None where it runs on something else."""
        self._settle()  # of a pass that was cut short
        if tokens is None:
            self.rows = None
            return
        stop = {*ends_of_text(self.model), *self._stop}
        self.rows = Rows.of(tokens, cached, self.rows, pad_of(self.model), self._ends, stop, self._lengths)
        self._ends = self._lengths = None
        if not self.rows.continues:
            self.notes.clear()
            self._refusals.clear()
            self.abstained = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    def withhold(self, rows: Bool[Tensor, "batch"], refusal: str) -> None:
        """Note that rows get no answer but a refusal."""
        self.abstained = self.abstained | rows
        for row in rows.nonzero()[:, 0].tolist():
            self._refusals.setdefault(row, refusal)

    def tell(self, refusals: Sequence[str | None]) -> None:
        """Say of the rows of several passes, in the user's order, what is written in place of each; None for an answer."""
        silent = [told is not None for told in refusals]
        self.abstained = torch.tensor(silent, dtype=torch.bool, device=self.abstained.device)
        self._refusals = {row: told for row, told in enumerate(refusals) if told is not None}

    def _settle(self) -> None:
        for member in _members(self.intervention):
            member.settle(self)

    def _end(self) -> None:
        self.active, self.rows = False, None
        self._moved.clear()
        self.notes.clear()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Forget the forward passes of a `with` block, which are not the user's."""
        kept = (self.rows, self.abstained, self._ends, self._lengths, self._stop, self._refusals, self.notes)
        self._refusals, self.notes = {}, {}
        try:
            yield
        finally:
            self.rows, self.abstained, self._ends, self._lengths, self._stop, self._refusals, self.notes = kept

    def like(self, tensor: Tensor, activation: Tensor) -> Tensor:
        """Return a tensor of the intervention on an activation's device; floating ones also in its dtype.

        It is kept for the next forward pass, until somebody changes it in place, and unless it needs a gradient.
        """
        dtype = activation.dtype if tensor.is_floating_point() else tensor.dtype
        if tensor.requires_grad:
            return tensor.to(device=activation.device, dtype=dtype)
        key, version = (id(tensor), activation.device, dtype), 0 if tensor.is_inference() else tensor._version
        if key not in self._moved or self._moved[key][1] != version:
            self._moved[key] = (tensor, version, tensor.to(device=activation.device, dtype=dtype))  # keeps the id taken
        return self._moved[key][2]

    def __repr__(self) -> str:
        return f"Live({self.intervention!r}, {'acting' if self.active else 'ended'})"


class _Finish:
    """The last hook of an intervention that looks at rows: hands it the logits."""

    def __init__(self, live: Live) -> None:
        self.live = live

    def __call__(self, logits: Tensor) -> Tensor:
        return self.live.intervention.finish(logits, self.live)


def acting(model: Model) -> list[Live]:
    """Return the interventions that look at rows and act on a model now, outermost first."""
    return [f.live for f in logit_functions(model) if isinstance(f, _Finish)]


class Intervention(ABC):
    """A removable change of a model's computation. Subclasses are frozen dataclasses."""

    @abstractmethod
    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return where to act, and what to do with the tensor there."""

    @abstractmethod
    def parts(self) -> Parts:
        """Return what a file keeps of this intervention: a header with its "kind", and tensors."""

    def matrices(self) -> Sequence[tuple[Matrix, MatrixFunction]]:
        """Return which weight matrices to change, and what to do with the input and output of each."""
        return ()

    def check(self, points: Mapping[Site, Point]) -> None:  # noqa: B027 - most have nothing to check
        """Refuse a model whose sites have other shapes; called before any hook is added."""

    def check_matrices(self, shapes: Mapping[Matrix, tuple[int, int]]) -> None:  # noqa: B027 - most have none
        """Refuse a model whose matrices have other shapes; called before any hook is added."""

    looks_at_rows: bool = False
    """Whether the hooks need to know which text each row is, and where its prompt ends."""

    @property
    def abstains(self) -> bool:
        """Whether it can withhold an answer."""
        return any(isinstance(member, Abstain) for member in _members(self))

    def settle(self, live: Live) -> None:  # noqa: B027 - most have nothing to decide
        """Decide on what the hooks saw in a forward pass that is over; only called where `looks_at_rows`."""

    def finish(self, logits: Tensor, live: Live) -> Tensor:
        """Change the logits at the end of a forward pass; only called where `looks_at_rows`."""
        return logits

    def __add__(self, other: "Intervention") -> "Chain":
        """Compose: the left one acts first, as if its block were the outer one."""
        if not isinstance(other, Intervention):
            return NotImplemented
        return Chain((*_members(self), *_members(other)))

    @contextmanager
    def on(self, model: Model) -> Iterator[Live]:
        """Attach to a model for the length of a `with` block.

        Every site and matrix is resolved before the first hook is added. Leaving the block, in whatever way, removes exactly the
        hooks that were added here; blocks may nest, repeat, and close in any order; a user's own hooks are untouched.

        The hooks belong to the model, not to a thread: they act on every forward pass while the block is open, so that a
        text can be streamed from a thread that was started inside it. Let that thread end before the block does, and run
        one forward pass at a time. While one thread is inside a block, or in `collect`, `evaluate` or `attribute`, another one
        that enters any of these for the same model is refused, since each would see the other's hooks.

        An interrupt (Ctrl-C) is taken care of wherever it comes, even while hooks are added or removed. If it comes in the
        first or last instruction of the `with` statement itself, which Python gives nobody a chance to guard, the hooks go
        when the traceback does: in a notebook with the next error, or after `del sys.last_traceback, sys.last_value`.

        Raises:
            SiteError: If the model lacks a site or a matrix.
            SelectionError: If it has another number of neurons there, or another shape.
            ModelError: If the model is in training mode, or another thread has an intervention on it, or measures it.
        """
        hooks, changes = list(self.hooks()), list(self.matrices())
        live = Live(self, model)
        removers: list[Remover] = []
        with one_thread(model):
            with ExitStack() as outer:
                for other in acting(model):  # the probe is no text of theirs
                    outer.enter_context(other._aside())
                points = resolve(model, [site for site, _ in hooks]) if hooks else {}
                shapes = matrix_shapes(model, [matrix for matrix, _ in changes]) if changes else {}
            self.check(points)
            self.check_matrices(shapes)
            try:
                try:
                    if self.looks_at_rows:
                        on_forward(model, live.begin, removers)
                        on_logits(model, _Finish(live), removers)
                    for site, function in hooks:
                        attach(points[site].hook, lambda t, f=function: f(t, live), removers)
                    for matrix, change in changes:
                        on_matrix(model, *matrix, lambda x, y, f=change: f(x, y, live), removers)
                    yield live
                finally:
                    detach_all(removers)
            finally:  # an interrupt may come in front of the line above; where all went well, nothing is left here
                detach_all(removers)
                live._end()

    def save(self, path: str | os.PathLike[str], model: Model | None = None, *, note: str = "") -> None:
        """Write a safetensors file with a header and a checksum.

        Args:
            path: Where to.
            model: If given, the file will refuse every other model.
            note: Free text kept in the header.
        """
        header, tensors = self.parts()
        content: dict[str, Any] = {"intervention": header, "text": repr(self), "note": note}
        if model is not None:
            content["model"] = fingerprint(model)
        artefacts.write(path, "intervention", tensors, content)


def _members(intervention: Intervention) -> tuple[Intervention, ...]:
    if not isinstance(intervention, Chain):
        return (intervention,)
    return tuple(one for member in intervention.members for one in _members(member))


@dataclass(frozen=True, eq=False, repr=False)
class Chain(Intervention):
    """Several interventions, acting in order. ``Chain(())`` does nothing."""

    members: tuple[Intervention, ...] = ()

    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return the members' hooks, in order."""
        return [hook for member in self.members for hook in member.hooks()]

    def matrices(self) -> Sequence[tuple[Matrix, MatrixFunction]]:
        """Return the members' changes, in order."""
        return [change for member in self.members for change in member.matrices()]

    def check(self, points: Mapping[Site, Point]) -> None:
        """Let every member check."""
        for member in self.members:
            member.check(points)

    def check_matrices(self, shapes: Mapping[Matrix, tuple[int, int]]) -> None:
        """Let every member check."""
        for member in self.members:
            member.check_matrices(shapes)

    @property
    def looks_at_rows(self) -> bool:  # type: ignore[override]
        """Whether any member does."""
        return any(member.looks_at_rows for member in self.members)

    def finish(self, logits: Tensor, live: Live) -> Tensor:
        """Let every member finish, in order."""
        for member in self.members:
            logits = member.finish(logits, live)
        return logits

    def parts(self) -> Parts:
        """Return the members' headers, and their tensors under their number."""
        headers, tensors = [], {}
        for number, member in enumerate(self.members):
            header, own = member.parts()
            headers.append(header)
            tensors |= {f"{number}/{name}": tensor for name, tensor in own.items()}
        return {"kind": "chain", "members": headers}, tensors

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.members)) if self.members else "Chain(nothing)"


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(Intervention):
    """Put a fixed value in place of the selected neurons' activations: x' = value where selected, else x.

    With value 0 at `mlp.post` this equals zeroing rows of W_out, at `attn.z` rows of W_O.

    Args:
        selection: A boolean `NeuronMap`, with at least one neuron.
        value: A number, or a `NeuronMap` of values, such as means over a retain corpus.
        basis: Optionally per attention site a matrix per head, ``[heads, d_head, d_head]``; then the selection is of
            directions in that basis: with T the matrix, x' = x + (value - x T) [selected] T^-1.

    Raises:
        SelectionError: If the selection is not boolean or empty, or the value or basis does not cover it.
    """

    selection: NeuronMap
    value: float | NeuronMap = 0.0
    basis: NeuronMap | None = None

    def __post_init__(self) -> None:
        """Check the three arguments against each other."""
        if not self.selection.is_selection:
            raise SelectionError("Ablate needs a boolean map: select first, as in score.top(0.02)")
        if self.selection.count() == 0:
            raise SelectionError(
                "the selection is empty: nothing would be ablated; raise the fraction or the threshold"
            )
        for given, name in ((self.value, "value"), (self.basis, "basis")):
            if isinstance(given, NeuronMap):
                lacking = [site for site in self._sites() if site not in given]
                if lacking:
                    raise SelectionError(f"the {name} map has nothing at {lacking[0]}, where neurons are selected")
        if isinstance(self.value, NeuronMap):
            for site in self._sites():
                if self.value[site].shape != self.selection[site].shape:
                    raise SelectionError(f"{site}: the value map has another shape than the selection")
                if not bool(torch.isfinite(self.value[site][self.selection[site]]).all()):
                    raise SelectionError(f"{site}: the value map holds NaN or infinity at a selected neuron")
        elif not torch.isfinite(torch.tensor(float(self.value))):
            raise SelectionError(f"value={self.value} is not a number to put in place of an activation")
        if self.basis is not None:
            for site in self._sites():
                _check_basis(site, self.basis[site], tuple(self.selection[site].shape))

    def _sites(self) -> list[Site]:
        return [site for site in self.selection if bool(self.selection[site].any())]

    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return one hook per site with a selected neuron."""
        return [(site, self._hook(site)) for site in self._sites()]

    def _hook(self, site: Site) -> HookFunction:
        chosen = self.selection[site]
        value = self.value[site] if isinstance(self.value, NeuronMap) else torch.tensor(float(self.value))
        value = value.to(torch.float64)
        if self.basis is None:
            return lambda x, live: torch.where(live.like(chosen, x), live.like(value, x), x)
        forward = self.basis[site].double()
        # x' = x - (x D - c) with D = T diag(selected) T^-1 and c = (value, selected) T^-1: one product per head, and
        # exactly x in a head where nothing is selected.
        inverse = torch.linalg.inv(forward)
        drop = torch.einsum("hij,hj,hjk->hik", forward, chosen.double(), inverse)
        offset = torch.einsum("hj,hjk->hk", torch.where(chosen, value, 0.0), inverse)
        return lambda x, live: x - (torch.einsum("bphi,hij->bphj", x, live.like(drop, x)) - live.like(offset, x))

    def check(self, points: Mapping[Site, Point]) -> None:
        """Refuse a model with other numbers of neurons."""
        for site in self._sites():
            check_shape(site, tuple(self.selection[site].shape), points[site])

    def parts(self) -> Parts:
        """Return the selection, and the values and basis where there are any."""
        header: dict[str, Any] = {
            "kind": "ablate",
            "value": "map" if isinstance(self.value, NeuronMap) else float(self.value),
        }
        tensors = {f"selection/{site}": value.to(torch.uint8) for site, value in self.selection.items()}
        if isinstance(self.value, NeuronMap):
            tensors |= {f"value/{site}": value for site, value in self.value.items() if site in self.selection}
        if self.basis is not None:
            tensors |= {f"basis/{site}": value for site, value in self.basis.items() if site in self.selection}
        return header, tensors

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Ablate":
        """Rebuild from `parts`."""
        selection = selection_in(tensors)
        basis = maps_in(tensors, "basis")
        value = NeuronMap(maps_in(tensors, "value")) if header["value"] == "map" else float(header["value"])
        return cls(selection, value, NeuronMap(basis) if basis else None)

    def __repr__(self) -> str:
        what = "means" if isinstance(self.value, NeuronMap) else "zero" if self.value == 0 else f"{self.value:g}"
        layers = len({site.layer for site in self.selection})
        basis = ", in a per-head basis" if self.basis is not None else ""
        count = f"{self.selection.count():,} of {self.selection.numel():,} neurons"
        return f"Ablate({what}, {count}, {layers} layers, {', '.join(self.selection.kinds)}{basis})"


@dataclass(frozen=True, eq=False, repr=False)
class Adjust(Intervention):
    """Neuron Adjust: carry the selected neurons' activations that look like the forget texts to the retain side.

    With N the normal density, per selected neuron and position:

        p_r = N(x; mu_r, sigma_r),  p_f = N(x; mu_f, sigma_f)
        x' = mu_r - sigma_r (x - mu_f) / sigma_f   if p_f >= p_r (and, for rule "random", with probability
                                                   p_f / (p_r + p_f)), else x

    In log-densities, since both densities underflow in the tails. The random rule's coin depends on the seed, the neuron
    and the tokens up to the position, and on nothing else: not on the batch, the padding or the cache.

    Source: Li, Sun, Weng, "Effective Skill Unlearning through Intervention and Abstention" (2025). The released code
    keeps the variance under the name of sigma, overwrites sigma_f with mu_f, and draws one coin per row.

    Args:
        selection: A boolean `NeuronMap`, with at least one neuron.
        forget_mean: mu_f, for every neuron of the selection's sites.
        forget_std: sigma_f, likewise.
        retain_mean: mu_r, likewise.
        retain_std: sigma_r, likewise.
        rule: "random" (published) or "deterministic".
        seed: Of the coins.
        floored: How many of the selected neurons' sigmas were raised to a floor; kept for `repr`.

    Raises:
        SelectionError: If the selection is not boolean or empty, or a sigma of a selected neuron is not positive.
    """

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
        """The random rule's coins depend on the text."""
        return self.rule == "random"

    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return one hook per site with a selected neuron."""
        return [(site, self._hook(site)) for site in self._sites()]

    def _hook(self, site: Site) -> HookFunction:
        index = self.selection[site].reshape(-1).nonzero()[:, 0]
        mu_f, sigma_f, mu_r, sigma_r = (getattr(self, m)[site].reshape(-1)[index].float() for m in self._MAPS)
        lift = (sigma_r / sigma_f).log()  # log p_f - log p_r where x is at both means
        neuron = mix(index + key_of("neuron adjust", self.seed, str(site)))
        random = self.rule == "random"

        def act(x: Tensor, live: Live) -> Tensor:
            flat = x.reshape(*x.shape[:2], -1)
            where = live.like(index, x)
            mf, sf, mr, sr, up = (t.to(x.device) for t in (mu_f, sigma_f, mu_r, sigma_r, lift))
            chosen = flat.index_select(2, where).float()
            z = (chosen - mf) / sf
            away = (chosen - mr) / sr
            odds = 0.5 * (away - z) * (away + z) + up  # log p_f / p_r; the squares' difference, before they overflow
            flip = odds >= 0
            if random:
                if live.rows is None:
                    raise LensUnlearnError(
                        "rule='random' needs token ids: run the model on tokens, or take 'deterministic'"
                    )
                live.rows.check(x)
                keys = live.rows.beside(x).keys
                flip &= uniform(keys[:, :, None] + live.like(neuron, x)) < odds.sigmoid()
            new = torch.where(flip, (mr - sr * z).to(x.dtype), flat.index_select(2, where))
            return flat.index_copy(2, where, new).reshape(x.shape)

        return act

    def check(self, points: Mapping[Site, Point]) -> None:
        """Refuse a model with other numbers of neurons."""
        for site in self._sites():
            check_shape(site, tuple(self.selection[site].shape), points[site])

    def parts(self) -> Parts:
        """Return the selection and the four maps."""
        header = {"kind": "adjust", "rule": self.rule, "seed": self.seed, "floored": self.floored}
        tensors = {f"selection/{site}": value.to(torch.uint8) for site, value in self.selection.items()}
        for name in self._MAPS:
            tensors |= {f"{name}/{s}": v.float() for s, v in getattr(self, name).items() if s in self.selection}
        return header, tensors

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Adjust":
        """Rebuild from `parts`."""
        maps = {name: NeuronMap(maps_in(tensors, name)) for name in cls._MAPS}
        told = {"rule": header["rule"], "seed": int(header["seed"]), "floored": int(header["floored"])}
        return cls(selection_in(tensors), **maps, **told)

    def __repr__(self) -> str:
        floored = f", {self.floored:,} sigmas floored" if self.floored else ""
        seed = f", seed {self.seed}" if self.rule == "random" else ""
        layers = len({site.layer for site in self._sites()})
        count = f"{self.selection.count():,} of {self.selection.numel():,} neurons"
        return f"Adjust({self.rule}{seed}, {count}, {layers} layers, {', '.join(self.selection.kinds)}{floored})"


REFUSAL = "Sorry, your query is not valid."


@dataclass(frozen=True, eq=False, repr=False)
class Abstain(Intervention):
    """Withhold the answer to a query whose key lies in a region: its logits are constant, its text is a refusal.

    Each row is judged for itself, by the key at its own last prompt token, whatever the padding and its neighbours. An
    abstained row's logits carry nothing of the input: they are equal for all tokens, but for the end-of-text token, which
    is ahead by a hair, so that greedy generation stops at once. `lu.generate` writes the refusal instead.

    Args:
        regions: One region per voting site, usually `mlp.post` of some layers.
        vote: At how many of them the key has to be inside.
        when: "prompt" decides at the prompt's end and keeps to that; "every_token" looks at each position from there on,
            and is silent from the first that is inside.
        refusal: What `lu.generate` writes.
        rates: What was measured on held-out queries when it was fitted: "detection" and "false_alarms", each as
            [share, low, high, queries].

    Raises:
        LensUnlearnError: If there is no region, or `vote` or `when` is out of range.
    """

    regions: Mapping[Site, Region]
    vote: int = 1
    when: Literal["prompt", "every_token"] = "prompt"
    refusal: str = REFUSAL
    rates: Mapping[str, Any] = field(default_factory=dict)

    looks_at_rows = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not self.regions:
            raise LensUnlearnError("Abstain needs a region at one site at least")
        if not 1 <= self.vote <= len(self.regions):
            raise LensUnlearnError(f"vote={self.vote} of {len(self.regions)} sites: from 1 to the number of sites")
        if self.when not in ("prompt", "every_token"):
            raise LensUnlearnError(f"when={self.when!r} is not known: choose from prompt, every_token")
        for name in {"detection", "false_alarms"} & set(self.rates):
            rate = self.rates[name]
            if len(rate) != 4 or not all(isinstance(part, int | float) for part in rate):
                raise LensUnlearnError(f"the rate {name!r} is {rate!r}: write it as [share, low, high, queries]")

    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return one hook per site: it only looks."""
        return [(site, self._hook(site, region)) for site, region in self.regions.items()]

    def _hook(self, site: Site, region: Region) -> HookFunction:
        def look(x: Tensor, live: Live) -> Tensor:
            rows = live.rows
            if rows is None:
                raise LensUnlearnError("Abstain needs token ids: run the model on tokens")
            rows.check(x)
            rows = rows.beside(x)
            keys = x.detach().flatten(2)
            ends, width = rows.ends - rows.cached, x.shape[1]  # in this pass, or before or behind it
            if self.when == "every_token":
                inside = region.contains(keys) & (torch.arange(width, device=x.device) >= ends[:, None]) & rows.text
            else:
                fresh = (ends >= (width - 1 if rows.continues and not rows.cached else 0)) & (ends < width)
                at = keys[torch.arange(len(keys), device=x.device), ends.clamp(0, width - 1)]
                inside = (region.contains(at) & fresh)[:, None]
            live.notes.setdefault(id(self), {}).setdefault("votes", {})[site] = inside
            return x

        return look

    def settle(self, live: Live) -> None:
        """Count the votes of the pass that is over: where in it is silence, and which rows keep silent from then on."""
        note = live.notes.get(id(self), {})
        votes = note.pop("votes", None)
        if not votes:
            return
        fired = torch.stack([vote.to(live.abstained.device) for vote in votes.values()]).sum(0) >= self.vote
        silent, before = fired.long().cummax(1).values.bool(), note.get("silent")
        if before is not None:
            # Without a cache, a generation's next pass holds the positions of the one before again.
            again = self.when == "every_token" and live.rows is not None and not live.rows.cached
            silent = silent | (torch.cat([before, before[:, -1:]], dim=1) if again else before[:, -1:])
        note["silent"] = silent
        live.withhold(silent[:, -1], self.refusal)

    def finish(self, logits: Tensor, live: Live) -> Tensor:
        """Make the logits of abstained rows constant."""
        self.settle(live)
        silent = live.notes.get(id(self), {}).get("silent")
        if silent is None or not bool(silent.any()):  # logits are large: they are not copied for nothing
            return logits
        # The model may have kept the logits of the last positions only.
        where = silent[:, -1:] if silent.shape[1] < logits.shape[1] else silent[:, -logits.shape[1] :]
        constant = torch.zeros(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        end = getattr(getattr(live.model, "tokenizer", None), "eos_token_id", None)
        if end is not None:
            constant[end] = 1e-3
        return torch.where(where.to(logits.device)[..., None], constant, logits)

    def check(self, points: Mapping[Site, Point]) -> None:
        """Refuse a model with other numbers of neurons."""
        for site, region in self.regions.items():
            width = math.prod(points[site].shape)
            if width != len(region.scale):
                raise SelectionError(
                    f"{site} has {width} neurons in this model, and the region {len(region.scale)} coordinates"
                )

    def parts(self) -> Parts:
        """Return the regions."""
        header: dict[str, Any] = {"kind": "abstain", "vote": self.vote, "when": self.when}
        header |= {"refusal": self.refusal, "rates": dict(self.rates)}
        headers, tensors = {}, {}
        for site, region in self.regions.items():
            headers[str(site)], own = region.parts()
            tensors |= {f"{name}/{site}": tensor for name, tensor in own.items()}
        return {**header, "regions": headers}, tensors

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Abstain":
        """Rebuild from `parts`."""
        own: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, site = key.partition("/")
            own.setdefault(site, {})[name] = tensor
        regions = {Site.parse(site): region_from_parts(told, own[site]) for site, told in header["regions"].items()}
        return cls(regions, int(header["vote"]), header["when"], str(header["refusal"]), header["rates"])

    def __repr__(self) -> str:
        shapes = ", ".join(f"{site} {region!r}" for site, region in self.regions.items())
        vote = f", {self.vote} of {len(self.regions)} votes" if len(self.regions) > 1 else ""
        told = "".join(
            f", {name} {share:.0%} [{low:.0%}, {high:.0%}] of {n:,} held-out queries"
            for name, (share, low, high, n) in (
                (name.replace("_", " "), self.rates[name])
                for name in ("detection", "false_alarms")
                if name in self.rates
            )
        )
        return f"Abstain({self.when.replace('_', ' ')}, {shapes}{vote}{told})"


@dataclass(frozen=True, eq=False, repr=False)
class Delta(Intervention):
    """Add updates to weight matrices: each x W becomes x (W + strength D).

    The weights stay as they are; x D is added where x W is computed. So a delta sees what the weights see: the input behind
    every mask, whatever the order in which they were attached or composed. Several deltas on one matrix add. Under
    `enable_compatibility_mode()` the matrices are the processed ones, which the model then has.

    The tensors may be leaves that need gradients, and may change in place between forward passes.

    Args:
        updates: What is added to which matrix, as in ``{Matrix(3, "W_out"): Update(value, rows)}``.
        strength: Times every update; 0 is the model as it was, bit for bit.

    Raises:
        SelectionError: If there is no update, or the strength is not finite.
        SiteError: If a name is not one of a matrix.
    """

    updates: Mapping[Matrix, Update]
    strength: float = 1.0
    record: Mapping[str, Any] = field(default_factory=dict)
    """How it came about: what a training noted, in what JSON can hold; kept in the file."""

    def __post_init__(self) -> None:
        """Check the arguments, and put the matrices in order."""
        given = {
            Matrix.parse(key) if isinstance(key, str) else Matrix(int(key[0]), check_matrix(key[1])): update
            for key, update in self.updates.items()
        }
        for matrix, update in given.items():
            if not isinstance(update, Update):
                raise SelectionError(f"{matrix} is given a {type(update).__name__}: write it as Update(values)")
        if not any(update.value.numel() for update in given.values()):
            raise SelectionError("nothing would be changed: a Delta needs an update of one matrix at least")
        if not math.isfinite(self.strength):
            raise SelectionError(f"strength={self.strength} is not a number to multiply weights with")
        order = list(MATRICES)
        ordered = sorted(given, key=lambda matrix: (matrix.layer, order.index(matrix.name)))
        object.__setattr__(self, "updates", {matrix: given[matrix] for matrix in ordered})

    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return none: it acts on matrices."""
        return ()

    def matrices(self) -> Sequence[tuple[Matrix, MatrixFunction]]:
        """Return one change per matrix."""
        return [(matrix, self._change(update)) for matrix, update in self.updates.items()]

    def _change(self, update: Update) -> MatrixFunction:
        if self.strength == 0:
            return lambda x, y, live: y
        return lambda x, y, live: update.apply(x, y, self.strength, live.like)

    def check_matrices(self, shapes: Mapping[Matrix, tuple[int, int]]) -> None:
        """Refuse a model with matrices of another shape."""
        for matrix, update in self.updates.items():
            wrong = update.misfit(shapes[matrix])
            if wrong:
                raise SelectionError(f"the update of {matrix} does not fit: {wrong}")

    def at(self, strength: float) -> "Delta":
        """Return the same updates at another strength."""
        return replace(self, strength=float(strength))

    def __mul__(self, factor: float) -> "Delta":
        """Return the same updates, so many times as strong."""
        return self.at(self.strength * factor)

    __rmul__ = __mul__

    def __neg__(self) -> "Delta":
        """Return the updates subtracted."""
        return self * -1

    def merge_into(self, hf_model: Any) -> Any:
        """Add the updates to the weights of a plain Hugging Face model, in place, so that it can be saved and shared.

        Args:
            hf_model: A copy that you loaded with transformers for this, not the model inside a bridge. The matrices have to
                be those that the delta was made for: raw ones, not those of compatibility mode.

        Returns:
            The same model.

        Raises:
            ModelError: If it belongs to TransformerLens, or its architecture is not one of those known.
            SelectionError: If it lacks a matrix, or an update does not fit; then nothing was changed.
        """
        return merge(self.updates, self.strength, hf_model)

    @classmethod
    def from_ablation(cls, ablation: Ablate, model: Model) -> "Delta":
        """Write an ablation to zero as an update, -W at the rows of the ablated neurons.

        Raises:
            SelectionError: If it is of another value, in a basis, or not at `mlp.post` or `attn.z` alone.
        """
        names = {"mlp.post": "W_out", "attn.z": "W_O"}
        odd = [site for site in ablation._sites() if site.kind not in names]
        if odd or isinstance(ablation.value, NeuronMap) or ablation.value != 0 or ablation.basis is not None:
            raise SelectionError(f"{ablation!r} is no change of weights: that takes value 0 at {', '.join(names)}")
        updates = {}
        for site in ablation._sites():
            rows = ablation.selection[site].reshape(-1).nonzero()[:, 0]
            weights = matrix_value(model, site.layer, names[site.kind])
            updates[Matrix(site.layer, names[site.kind])] = Update(-weights[rows.to(weights.device)], rows)
        return cls(updates)

    def parts(self) -> Parts:
        """Return the tensors of every update, not copied."""
        tensors = {
            f"{matrix}/{name}": tensor.detach()
            for matrix, update in self.updates.items()
            for name, tensor in update.tensors().items()
        }
        return {"kind": "delta", "strength": self.strength, "record": dict(self.record)}, tensors

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Delta":
        """Rebuild from `parts`."""
        own: dict[Matrix, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            matrix, _, name = key.partition("/")
            own.setdefault(Matrix.parse(matrix), {})[name] = tensor
        updates = {matrix: Update(**told) for matrix, told in own.items()}
        return cls(updates, float(header["strength"]), dict(header.get("record", {})))

    def __repr__(self) -> str:
        told: dict[str, int | None] = {}
        for matrix, update in self.updates.items():
            parts = {"rows": f"rows of {matrix.name}", "columns": f"columns of {matrix.name}", "dense": matrix.name}
            what = parts.get(update.kind, f"{matrix.name} of rank {update.value.shape[1]}")
            count = getattr(update, update.kind, None) if update.kind in ("rows", "columns") else None
            told[what] = None if count is None else (told.get(what) or 0) + len(count)
        shown = ", ".join(what if count is None else f"{count:,} {what}" for what, count in told.items())
        size = sum(t.numel() * t.element_size() for u in self.updates.values() for t in u.tensors().values())
        matrices = f"{len(self.updates):,} {'matrix' if len(self.updates) == 1 else 'matrices'}"
        return f"Delta(strength {self.strength:g}, {matrices}, {shown}, {size / 1e6:.1f} MB)"


def _check_basis(site: Site, basis: Tensor, shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or tuple(basis.shape) != (*shape, *shape[-1:]):
        raise SelectionError(f"{site}: the basis has shape {tuple(basis.shape)}, and the selection {shape}")
    if not bool(torch.isfinite(basis).all()) or bool(torch.linalg.inv_ex(basis.double()).info.any()):
        raise SelectionError(f"{site}: the basis holds a matrix that cannot be inverted")


def check_shape(site: Site, shape: tuple[int, ...], point: Point) -> None:
    """Refuse a site of another shape.

    Raises:
        SelectionError: Naming both shapes.
    """
    if shape != point.shape:
        raise SelectionError(
            f"{site} has neurons of shape {point.shape} in this model, and {shape} in the intervention"
        )


def maps_in(tensors: Mapping[str, Tensor], prefix: str) -> dict[Site, Tensor]:
    """Read the tensors ``prefix/site`` of a file."""
    return {Site.parse(n.removeprefix(f"{prefix}/")): t for n, t in tensors.items() if n.startswith(f"{prefix}/")}


def selection_in(tensors: Mapping[str, Tensor]) -> NeuronMap:
    """Read the selection of a file."""
    flags = maps_in(tensors, "selection")
    for site, value in flags.items():
        if value.dtype != torch.uint8 or bool((value > 1).any()) or value.ndim not in (1, 2):
            raise SelectionError(f"{site}: a selection holds something other than 0 and 1 for each neuron")
    return NeuronMap({site: value.bool() for site, value in flags.items()})


def load_intervention(path: str | os.PathLike[str], model: Model | None = None) -> Intervention:
    """Read an intervention that `save` wrote.

    Args:
        path: The file.
        model: Where it is to be used; if the file knows its model, this has to be the same.

    Raises:
        ArtefactError: If the file is damaged, not ours, or made with another model; the message names what differs.
    """
    header, tensors = artefacts.read(path, "intervention")
    if model is not None and "model" in header:
        artefacts.require_same(path, header["model"], fingerprint(model), "this model")
    with artefacts.usable(path, "intervention that can be used"):
        found = _from_parts(header["intervention"], tensors)
        again, names = found.parts()
        if not _within(header["intervention"], again) or not set(tensors) <= set(names):
            raise ArtefactError("something in it has no meaning to this version: upgrade to read it")
        repr(found)
    return found


def _within(theirs: Any, ours: Any) -> bool:
    """Say whether everything that a header says was understood: this version would write it again."""
    if isinstance(theirs, dict) and isinstance(ours, Mapping):
        return all(key in ours and _within(value, ours[key]) for key, value in theirs.items())
    if isinstance(theirs, list) and isinstance(ours, Sequence) and len(theirs) == len(ours):
        return all(map(_within, theirs, ours))
    return theirs is ours or theirs == ours  # the same NaN is itself


def _from_parts(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Intervention:
    if header["kind"] == "chain":
        own: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            number, _, inner = name.partition("/")
            own.setdefault(number, {})[inner] = tensor
        return Chain(tuple(_from_parts(member, own.get(str(n), {})) for n, member in enumerate(header["members"])))
    kinds: dict[str, Any] = {"ablate": Ablate, "adjust": Adjust, "abstain": Abstain, "delta": Delta}
    if header["kind"] not in kinds:
        raise ArtefactError(f"{header['kind']!r} is not a kind of intervention this version knows: upgrade to read it")
    return kinds[header["kind"]].from_parts(header, tensors)
