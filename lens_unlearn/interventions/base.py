"""`Intervention`: a frozen value that becomes hooks for the length of a `with` block; `Chain`, several; `Placed`, somewhere only.

    prune = Ablate(score.top(0.02))
    with prune.on(model):
        model.generate("def fib(n):")

Nothing is written into the model. An intervention keeps no state of a run: what belongs to one lives on the `Live`
object that `on` yields. Each hook takes a tensor and returns a new one of the same shape, dtype and device.

Knows how hooks are added, removed and given their tensors, and how an intervention is saved; knows nothing of what any of them
does, nor which of them a file may hold (`interventions.files` does).
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_unlearn.core import artefacts
from lens_unlearn.core.errors import SelectionError
from lens_unlearn.interventions.live import Finish, Live, acting
from lens_unlearn.interventions.place import SINK_RATIO, At, Place
from lens_unlearn.interventions.update import Edit, merge
from lens_unlearn.model.hooks import (
    Remover,
    attach,
    detach_all,
    on_forward,
    on_logits,
    one_thread,
)
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.layouts import require_known
from lens_unlearn.model.loading import model_entry
from lens_unlearn.model.matrices import Matrix, matrix_shapes, on_matrix
from lens_unlearn.model.residual import on_residual, residual_scale
from lens_unlearn.model.routed import Routed, takes_routed
from lens_unlearn.model.sites import Point, Site, resolve

__all__ = [
    "Chain",
    "HookFunction",
    "Intervention",
    "Limited",
    "Live",
    "MatrixFunction",
    "Parts",
    "Placed",
    "acting",
    "only_constants",
    "with_constants",
]

HookFunction = Callable[[Tensor, "Live"], Tensor]
"""Takes the activation at a hook point; returns a new one, or the same."""
MatrixFunction = Callable[[Tensor, Tensor, "Live"], Tensor]
"""Takes the input and the output of a matrix; returns a new output."""
Parts = tuple[dict[str, Any], dict[str, Tensor]]
"""What a file holds of an intervention: a header for JSON, and tensors by name."""
ReadParts = Callable[[Mapping[str, Any], Mapping[str, Tensor]], "Intervention"]


class Intervention(ABC):
    """A removable change of a model's computation. Subclasses are frozen dataclasses."""

    kind: ClassVar[str] = ""
    """The name of the class in the header of a file."""

    @abstractmethod
    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return where to act, and what to do with the tensor there."""

    @abstractmethod
    def parts(self) -> Parts:
        """Return what a file holds of this intervention: a header with its "kind", and tensors."""

    def describe(self) -> dict[str, str]:
        """Return in words what it does at each place, by the name of the site or matrix; empty if it does not tell."""
        return {}

    def matrices(self) -> Sequence[tuple[Matrix, MatrixFunction]]:
        """Return which weight matrices to change, and what to do with the input and output of each."""
        return ()

    def check(self, points: Mapping[Site, Point]) -> None:  # noqa: B027 - most have nothing to check
        """Refuse a model whose sites have other shapes; called before any hook is added."""

    def check_matrices(self, shapes: Mapping[Matrix, tuple[int, int]]) -> None:  # noqa: B027 - most have none
        """Refuse a model whose matrices have other shapes; called before any hook is added."""

    looks_at_rows: bool = False
    """Whether the hooks need to know which text each row is, and where its prompt ends."""

    abstains: bool = False
    """Whether it can abstain from answering."""

    judges: bool = False
    """Whether it acts on the rows alone that a detector finds, so that a text is changed as a whole or not at all."""

    @property
    def row_detector(self) -> "Intervention | None":
        """What finds the rows in which alone it changes anything, without changing anything before the logits itself."""
        return None

    @property
    def norm_layers(self) -> frozenset[int]:
        """The layers at whose input the norms of the residual stream are wanted, in `Live.norms`; only where `looks_at_rows`."""
        return frozenset()

    def settle(self, live: Live) -> None:  # noqa: B027 - most have nothing to decide
        """Decide from what the hooks noted in a forward pass that is over; only called where `looks_at_rows`."""

    def constant_at(self, live: Live) -> Int[Tensor, "batch pos"] | None:
        """Return at which positions of a forward pass that was settled the logits are constant; None for nowhere.

        There it is the token that is ahead, or the number of all tokens if none is, and -1 elsewhere. Only called where
        `looks_at_rows`.
        """
        return None

    def finish(self, logits: Tensor, live: Live) -> Tensor:
        """Change the logits at the end of a forward pass; only called where `looks_at_rows`."""
        self.settle(live)
        where = self.constant_at(live)
        return (
            logits if where is None else with_constants(logits, where[:, -logits.shape[1] :])
        )  # of the last positions only

    def __add__(self, other: "Intervention") -> "Chain":
        """Compose: the left one acts first, as if its block were the outer one."""
        if not isinstance(other, Intervention):
            return NotImplemented
        return Chain((*members_of(self), *members_of(other)))

    def placed(self, at: At = None, *, skip_special: bool = False, sink_ratio: float = SINK_RATIO) -> "Placed":
        """Return the intervention acting at some positions only: at all others its hooks leave what they see bitwise as it is.

        Args:
            at: "prompt", the positions up to the prompt's end; "generated", those behind it; "last", the prompt's last token, from
                which the first new one is predicted; a boolean mask ``[batch, pos]`` for forward passes of that shape, whose
                columns are counted from the beginning of the text also behind a key-value cache; None for every position. In
                generation the prompt is what was given, and in teacher forcing what stands before the counted answer. Every
                position of a text without an answer, and of a plain forward pass, belongs to the prompt, unless `Live.expect`
                says where that ends.
            skip_special: Whether never to act at special tokens (BOS, the marks of a chat, padding in front) nor at attention
                sinks: the first token of a text, and every position where the residual stream is too large at the layer's input.
            sink_ratio: From how many times the model's usual norm there on it is: the median on a fixed text of random tokens, so
                that nothing else in the batch decides. A layer that makes a sink of a later token than the first still acts there.

        Raises:
            SelectionError: If there is no such place, or it abstains: that is decided on whole prompts.
        """
        return Placed(self, Place(at, skip_special, sink_ratio))

    @contextmanager
    def on(self, model: Model, *, at: At = None, skip_special: bool = False) -> Iterator[Live]:
        """Attach to a model for the length of a `with` block.

        With `at` or `skip_special`, it acts at some positions only, see `placed`.

        Every site and matrix is resolved before the first hook is added. Leaving the block, in whatever way, removes exactly the
        hooks that were added here; blocks may nest, repeat, and close in any order; a user's own hooks are untouched.

        The hooks belong to the model, not to a thread: they act on every forward pass while the block is open, so that a
        text can be streamed from a thread that was started inside it. Let that thread end before the block does, and run
        one forward pass at a time. While one thread is inside a block, or in `collect`, `evaluate` or `attribute`, another one
        that enters any of these for the same model is refused, since each would see the other's hooks.

        An interrupt (Ctrl-C) leaves no hook behind wherever it comes, even while hooks are added or removed. If it comes in
        the first or last instruction of the `with` statement itself, which Python lets nobody guard, the hooks go when the
        traceback does: in a notebook with the next error, or after `del sys.last_traceback, sys.last_value`.

        Raises:
            SiteError: If the model lacks a site or a matrix.
            SelectionError: If it has another number of neurons there, or another shape.
            ModelError: If the model is in training mode, or another thread has an intervention on it, or measures it.
        """
        if at is not None or skip_special:
            with self.placed(at, skip_special=skip_special).on(model) as live:
                yield live
            return
        require_model(model)
        hooks, changes = list(self.hooks()), list(self.matrices())
        live = Live(self, model)
        removers: list[Remover] = []
        with one_thread(model):
            with ExitStack() as outer:
                for other in acting(model):  # to resolve, a probe is run, which is no text of theirs
                    outer.enter_context(other.aside())
                points = resolve(model, [site for site, _ in hooks]) if hooks else {}
                shapes = matrix_shapes(model, [matrix for matrix, _ in changes]) if changes else {}
                scale = residual_scale(model) if self.norm_layers else ()
            self.check(points)
            self.check_matrices(shapes)
            try:
                # At one place, hooks act in the order in which they were added: those of an outer block before those of an inner
                # one, and those of a chain from left to right. The functions on logits, one for each block, do so too.
                try:
                    if self.looks_at_rows:
                        on_forward(model, live.begin, removers)
                        on_logits(model, Finish(live), removers)
                        on_residual(model, self.norm_layers, partial(live.measure, scale), removers)
                    for site, function in hooks:
                        attach(points[site].hook, _in_run(function, live), removers)
                    for matrix, change in changes:
                        on_matrix(model, *matrix, lambda x, y, f=change: f(x, y, live), removers)
                    yield live
                finally:
                    detach_all(removers)
            finally:  # an interrupt may come just before the line above; otherwise nothing remains to be removed here
                detach_all(removers)
                live._end()

    def edits(self) -> Sequence[Edit]:
        """Return what it comes to in the weights, the last mask of an input first.

        Raises:
            SelectionError: If that is no change of weights.
        """
        raise SelectionError(f"{self!r} is no change of weights, and cannot be merged into them")

    def merge_into(self, hf_model: Any, model: Model) -> Any:
        """Write it into the weights of a plain Hugging Face model, in place, so that it can be saved and shared.

        An ablation at `mlp.post` or `attn.z` becomes rows of W_out or W_O and, if it is not to zero, a part of the bias behind
        them; a model without these biases is given them if its configuration has an option for it (`mlp_bias`,
        `attention_bias`). An update is added to its matrix.

        Args:
            hf_model: A copy that you loaded with transformers for this, not the model inside a bridge.
            model: The model that it was made for, with which the copy is compared. The result is right for an ablation whether
                or not it is in compatibility mode; updates of matrices that this mode changes are refused.

        Returns:
            The same copy.

        Raises:
            ModelError: If the copy belongs to TransformerLens, its architecture is not one of those known, it has other weights
                than the model, or no bias that a constant could go into; then nothing was changed.
            SelectionError: If this is no change of weights, or does not fit the model; then nothing was changed.
        """
        require_model(model)
        edits = self.edits()
        require_known(hf_model)
        self.check(resolve(model, sites) if (sites := [site for site, _ in self.hooks()]) else {})
        self.check_matrices(matrix_shapes(model, m) if (m := [matrix for matrix, _ in self.matrices()]) else {})
        return merge(edits, hf_model, model)

    def save(self, path: str | os.PathLike[str], model: Model | None = None, *, note: str = "") -> None:
        """Write a safetensors file with a header and a checksum.

        Args:
            path: The file.
            model: The model it is for: the file will refuse every other one, and another dictionary where this acts on the
                features of one. Without it, any of the right shape is accepted.
            note: Free text for the header.

        Raises:
            ArtefactError: If the file cannot be written.
            SiteError: If it acts on features, and their dictionary is not attached to the model.
        """
        header, tensors = self.parts()
        entry = model_entry(path, model, (site for site, _ in self.hooks()))
        content = {"intervention": header, "text": repr(self), "note": note, **entry}
        artefacts.write(path, "intervention", tensors, content)


def with_constants(
    logits: Float[Tensor, "*batch vocabulary"], where: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch vocabulary"]:
    """Put constants in place of the logits at some positions: 0, and 0.001 for the token that is ahead there.

    Args:
        logits: Of any positions.
        where: For each of them that token, or the number of all tokens if there is none; -1 leaves a position as it is.
    """
    where = where.to(logits.device)
    if not bool((where >= 0).any()):  # logits are large: they are not copied where none changes
        return logits
    changed = logits.masked_fill((where >= 0)[..., None], 0)
    ahead = (where >= 0) & (where < logits.shape[-1])
    token = where.clamp(0, logits.shape[-1] - 1)[..., None]
    return changed.scatter(-1, token, torch.where(ahead[..., None], 1e-3, changed.gather(-1, token)))


def only_constants(intervention: Intervention) -> bool:
    """Whether all that an intervention does to logits is to make them constant where `constant_at` says."""
    if isinstance(intervention, Limited):  # of what it limits, it limits the change of logits as well
        return only_constants(intervention.inner) and type(intervention.inner).constant_at is Intervention.constant_at
    if isinstance(intervention, Chain):
        return all(map(only_constants, intervention.members))
    return type(intervention).finish is Intervention.finish


def _in_run(function: HookFunction, live: Live) -> Callable[[Any], Any]:
    def act(x: Any) -> Any:
        return function(x, live)

    return takes_routed(act) if getattr(function, "takes_routed", False) else act


def members_of(intervention: Intervention) -> tuple[Intervention, ...]:
    if not isinstance(intervention, Chain):
        return (intervention,)
    return tuple(inner for member in intervention.members for inner in members_of(member))


@dataclass(frozen=True, eq=False, repr=False)
class Chain(Intervention):
    """Several interventions, acting in order. ``Chain(())`` does nothing."""

    kind: ClassVar[str] = "chain"

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

    @property
    def abstains(self) -> bool:  # type: ignore[override]
        """Whether any member can."""
        return any(member.abstains for member in self.members)

    @property
    def judges(self) -> bool:  # type: ignore[override]
        """Whether all members do."""
        return bool(self.members) and all(member.judges for member in self.members)

    def edits(self) -> Sequence[Edit]:
        """Return the members' edits, those of the last one first."""
        return [edit for member in reversed(self.members) for edit in member.edits()]

    @property
    def norm_layers(self) -> frozenset[int]:
        """Those of all members."""
        return frozenset[int]().union(*(member.norm_layers for member in self.members))

    def settle(self, live: Live) -> None:
        """Let every member decide."""
        for member in self.members:
            member.settle(live)

    def constant_at(self, live: Live) -> Int[Tensor, "batch pos"] | None:
        """Return where any member makes them constant."""
        found = [where for member in self.members if (where := member.constant_at(live)) is not None]
        return torch.stack(found).amax(0) if found else None

    def finish(self, logits: Tensor, live: Live) -> Tensor:
        """Let every member finish, in order."""
        for member in self.members:
            logits = member.finish(logits, live)
        return logits

    def describe(self) -> dict[str, str]:
        """Return what the members do; where several act at one place, what the last of them does."""
        return {place: text for member in self.members for place, text in member.describe().items()}

    def parts(self) -> Parts:
        """Return the members' headers, and their tensors under their number."""
        headers, tensors = [], {}
        for number, member in enumerate(self.members):
            header, member_tensors = member.parts()
            headers.append(header)
            tensors |= {f"{number}/{name}": tensor for name, tensor in member_tensors.items()}
        return {"kind": self.kind, "members": headers}, tensors

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor], read: ReadParts) -> "Chain":
        """Rebuild from `parts`; `read` rebuilds a member, of whatever kind it is."""
        by_member: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            number, _, inner = name.partition("/")
            by_member.setdefault(number, {})[inner] = tensor
        return cls(tuple(read(member, by_member.get(str(n), {})) for n, member in enumerate(header["members"])))

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.members)) if self.members else "Chain(nothing)"


class Limited(Intervention):
    """An intervention that acts at some positions only: what is left of another one, at `where`."""

    inner: Intervention
    """What acts; a field of every subclass."""

    looks_at_rows = True

    @abstractmethod
    def where(self, live: Live, x: Tensor, layer: int | None) -> Bool[Tensor, "batch pos"]:
        """Return the positions of the current forward pass at which to act, on the device of an activation.

        Args:
            live: The run.
            x: The activation, ``[batch, pos, ...]`` or ``[batch * pos, ...]``.
            layer: Where it is; None behind all of them.
        """

    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return the hooks, each limited to the positions."""

        def limited(site: Site, function: HookFunction) -> HookFunction:
            def act(x: Any, live: Live) -> Any:
                return self._limit(live, site.layer, x, function(x, live))

            return takes_routed(act) if getattr(function, "takes_routed", False) else act

        return [(site, limited(site, function)) for site, function in self.inner.hooks()]

    def matrices(self) -> Sequence[tuple[Matrix, MatrixFunction]]:
        """Return the changes, each limited to the positions."""

        def limited(matrix: Matrix, function: MatrixFunction) -> MatrixFunction:
            return lambda x, y, live: self._limit(live, matrix.layer, y, function(x, y, live))

        return [(matrix, limited(matrix, function)) for matrix, function in self.inner.matrices()]

    def _limit(self, live: Live, layer: int | None, before: Any, after: Any) -> Any:
        if after is before:
            return before
        where = self.where(live, before, layer)
        if isinstance(after, Routed):
            return after.limited(where, before)
        if before.shape[:2] != where.shape:  # OPT runs its MLP on tokens without a batch dimension
            where = where.reshape(-1)
        return torch.where(where.reshape(*where.shape, *[1] * (before.ndim - where.ndim)), after, before)

    @property
    def norm_layers(self) -> frozenset[int]:
        """Those of what acts."""
        return self.inner.norm_layers

    def check(self, points: Mapping[Site, Point]) -> None:
        """Let what acts check."""
        self.inner.check(points)

    def check_matrices(self, shapes: Mapping[Matrix, tuple[int, int]]) -> None:
        """Let what acts check."""
        self.inner.check_matrices(shapes)

    def settle(self, live: Live) -> None:
        """Let what acts decide."""
        self.inner.settle(live)

    def finish(self, logits: Tensor, live: Live) -> Tensor:
        """Change the logits at the positions."""
        after = self.inner.finish(logits, live)
        if after is logits:
            return logits
        where = self.where(live, logits, None)[:, -logits.shape[1] :]  # the model may have kept the last ones only
        return torch.where(where[..., None], after, logits)


@dataclass(frozen=True, eq=False, repr=False)
class Placed(Limited):
    """An intervention that acts at some positions of a text only; made by `Intervention.placed`.

    Args:
        inner: What acts.
        place: Where.

    Raises:
        SelectionError: If `inner` abstains.
    """

    kind: ClassVar[str] = "placed"

    inner: Intervention
    place: Place

    def __post_init__(self) -> None:
        """Refuse what judges whole prompts."""
        if self.inner.abstains:
            raise SelectionError(
                f"{self.inner!r} abstains, which is decided on whole prompts and not at some positions: place what else acts, and "
                "add the abstention to it"
            )

    def where(self, live: Live, x: Tensor, layer: int | None) -> Bool[Tensor, "batch pos"]:
        """Return the positions of the place."""
        return self.place.within(live, x, layer)

    @property
    def norm_layers(self) -> frozenset[int]:
        """Every layer where it acts, if it has to know the attention sinks."""
        if not self.place.skip_special:
            return self.inner.norm_layers
        layers = {where.layer for where, _ in (*self.inner.hooks(), *self.inner.matrices())}
        return self.inner.norm_layers | layers

    def describe(self) -> dict[str, str]:
        """Return what is done where."""
        return {place: f"{text}, {self.place}" for place, text in self.inner.describe().items()}

    def parts(self) -> Parts:
        """Return the place and what acts there."""
        header, tensors = self.inner.parts()
        return {"kind": self.kind, **self.place.parts(), "inner": header}, tensors

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor], read: ReadParts) -> "Placed":
        """Rebuild from `parts`; `read` rebuilds what acts, of whatever kind it is."""
        place = Place(header["at"], header["skip_special"], header["sink_ratio"])
        return cls(read(header["inner"], tensors), place)

    def __repr__(self) -> str:
        return f"Placed({self.inner!r}, {self.place})"
