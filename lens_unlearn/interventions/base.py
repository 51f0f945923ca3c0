"""`Intervention`: a frozen value that becomes hooks for the length of a `with` block; `Live`, its run; `Chain`, several.

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
from types import FrameType
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lens_unlearn.core import artefacts
from lens_unlearn.core.errors import SelectionError
from lens_unlearn.interventions.update import Edit, merge
from lens_unlearn.model.hooks import (
    Remover,
    attach,
    detach_all,
    generation,
    logit_functions,
    on_forward,
    on_logits,
    one_thread,
)
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.layouts import require_known
from lens_unlearn.model.loading import model_entry
from lens_unlearn.model.matrices import Matrix, matrix_shapes, on_matrix
from lens_unlearn.model.positions import Rows, pad_of
from lens_unlearn.model.sites import Point, Site, resolve
from lens_unlearn.model.special_tokens import ends_of_text
from lens_unlearn.neurons.maps import NeuronMap

__all__ = [
    "Chain",
    "HookFunction",
    "Intervention",
    "Live",
    "MatrixFunction",
    "Parts",
    "acting",
    "check_shape",
    "describe_selection",
    "maps_in",
    "selection_in",
]

HookFunction = Callable[[Tensor, "Live"], Tensor]
"""Takes the activation at a hook point; returns a new one, or the same."""
MatrixFunction = Callable[[Tensor, Tensor, "Live"], Tensor]
"""Takes the input and the output of a matrix; returns a new output."""
Parts = tuple[dict[str, Any], dict[str, Tensor]]
"""What a file holds of an intervention: a header for JSON, and tensors by name."""
ReadParts = Callable[[Mapping[str, Any], Mapping[str, Tensor]], "Intervention"]


class Live:
    """One intervention acting on one model: yielded by `Intervention.on`, ended with the block."""

    def __init__(self, intervention: "Intervention", model: Model) -> None:
        self.intervention = intervention
        self.model = model
        self.active = True
        self.abstained: Tensor = torch.zeros(0, dtype=torch.bool)
        """For each row of the last forward pass (or generation), whether the model abstained."""
        self.rows: Rows | None = None
        """Where the current forward pass stands in the texts of its rows; only for interventions that look at rows."""
        self.notes: dict[int, Any] = {}
        """State of the members by their id: from hook to hook, and from a prompt to the tokens generated behind it."""
        self._ends: Tensor | None = None
        self._lengths: Tensor | None = None
        self._stop: tuple[int, ...] = ()
        self._generation: FrameType | None = None
        self._refusals: dict[int, str] = {}
        self._moved: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, int, Tensor]] = {}

    def expect(
        self,
        ends: Int[Tensor, "batch"] | None,
        stop: Sequence[int] = (),
        lengths: Int[Tensor, "batch"] | None = None,
    ) -> None:
        """Announce where each row's prompt ends in the next forward pass, which begins new texts.

        It holds for that pass, and for the generation that the pass begins: announce it again before each pass of a text that you
        continue by hand without a key-value cache.

        Args:
            ends: Positions of the prompts' last tokens; None for each row's last token that is not padding, which is also
                the default where this is not called.
            stop: Tokens that end a text that is being generated, besides the tokenizer's.
            lengths: Tokens of each row of text padded on the right; None to look for the tokenizer's padding token.
        """
        self._ends, self._stop, self._lengths, self.rows = ends, tuple(stop), lengths, None
        self.notes.clear()

    def refusal(self, row: int) -> str | None:
        """Return the refusal written in place of a row of the last forward pass or generation; None if it did not abstain."""
        return self._refusals.get(row)

    def begin(self, tokens: Int[Tensor, "batch pos"] | None, cached: int) -> None:
        """Read the tokens of a forward pass before it runs; None where it runs on something else.

        A hook sees activations alone. Whether the pass begins new texts or goes on with a generation, where the prompts end, and
        which positions are padding can only be read off its tokens and its cache, so it has to be known before any hook fires.
        """
        self._settle()  # the pass before, if it ended before its logits
        if tokens is None:
            self.rows = None
            return
        stop = {*ends_of_text(self.model), *self._stop}
        # A pass with a cache continues whatever filled that. Without one, nothing in the tokens tells the next step of a generation
        # from a text of the user's that happens to be one token longer than the last: only a call of `generate` does.
        call = None if cached else generation(self.model)
        last = self.rows if cached or (call is not None and call is self._generation) else None
        self._generation = call
        self.rows = Rows.of(tokens, cached, last, pad_of(self.model), self._ends, stop, self._lengths)
        self._ends = self._lengths = None
        if not self.rows.continues:
            self.notes.clear()
            self._refusals.clear()
            self.abstained = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    def withhold(self, rows: Bool[Tensor, "batch"], refusal: str) -> None:
        """Note that the model abstains in these rows, and the refusal that is written instead."""
        self.abstained = self.abstained | rows
        for row in rows.nonzero()[:, 0].tolist():
            self._refusals.setdefault(row, refusal)

    def tell(self, refusals: Sequence[str | None]) -> None:
        """Set the refusals of the rows of several passes, in the user's order; None where the model answered."""
        abstained = [refusal is not None for refusal in refusals]
        self.abstained = torch.tensor(abstained, dtype=torch.bool, device=self.abstained.device)
        self._refusals = {row: refusal for row, refusal in enumerate(refusals) if refusal is not None}

    def _settle(self) -> None:
        for member in members_of(self.intervention):
            member.settle(self)

    def _end(self) -> None:
        self.active, self.rows, self._generation = False, None, None
        self._moved.clear()
        self.notes.clear()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Forget the forward passes of a `with` block, which are not the user's."""
        state = dict(vars(self))
        self._refusals, self.notes = {}, {}
        try:
            yield
        finally:
            vars(self).update(state)

    def like(self, tensor: Tensor, activation: Tensor) -> Tensor:
        """Return a tensor of the intervention on an activation's device; floating ones also in its dtype.

        The copy is cached for the next forward pass, until the original is changed in place, and unless it needs a gradient.
        """
        # Copies live here and not on the intervention, which is frozen and may act on several models at once; they go with the
        # block. A tensor is known by its id; the cache holds the tensor too, so that no other one can be given the same id.
        # A copy of a tensor that needs a gradient belongs to one graph, and is made anew.
        dtype = activation.dtype if tensor.is_floating_point() else tensor.dtype
        if tensor.requires_grad:
            return tensor.to(device=activation.device, dtype=dtype)
        key, version = (id(tensor), activation.device, dtype), 0 if tensor.is_inference() else tensor._version
        if key not in self._moved or self._moved[key][1] != version:
            self._moved[key] = (tensor, version, tensor.to(device=activation.device, dtype=dtype))
        return self._moved[key][2]

    def __repr__(self) -> str:
        return f"Live({self.intervention!r}, {'acting' if self.active else 'ended'})"


class _Finish:
    """The last hook of an intervention that looks at rows: it passes the logits on to `Intervention.finish`."""

    def __init__(self, live: Live) -> None:
        self.live = live

    def __call__(self, logits: Tensor) -> Tensor:
        return self.live.intervention.finish(logits, self.live)


def acting(model: Model) -> list[Live]:
    """Return the interventions that look at rows and act on a model now, outermost first."""
    return [f.live for f in logit_functions(model) if isinstance(f, _Finish)]


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

    def settle(self, live: Live) -> None:  # noqa: B027 - most have nothing to decide
        """Decide from what the hooks noted in a forward pass that is over; only called where `looks_at_rows`."""

    def finish(self, logits: Tensor, live: Live) -> Tensor:
        """Change the logits at the end of a forward pass; only called where `looks_at_rows`."""
        return logits

    def __add__(self, other: "Intervention") -> "Chain":
        """Compose: the left one acts first, as if its block were the outer one."""
        if not isinstance(other, Intervention):
            return NotImplemented
        return Chain((*members_of(self), *members_of(other)))

    @contextmanager
    def on(self, model: Model) -> Iterator[Live]:
        """Attach to a model for the length of a `with` block.

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
        require_model(model)
        hooks, changes = list(self.hooks()), list(self.matrices())
        live = Live(self, model)
        removers: list[Remover] = []
        with one_thread(model):
            with ExitStack() as outer:
                for other in acting(model):  # to resolve, a probe is run, which is no text of theirs
                    outer.enter_context(other._aside())
                points = resolve(model, [site for site, _ in hooks]) if hooks else {}
                shapes = matrix_shapes(model, [matrix for matrix, _ in changes]) if changes else {}
            self.check(points)
            self.check_matrices(shapes)
            try:
                # At one place, hooks act in the order in which they were added: those of an outer block before those of an inner
                # one, and those of a chain from left to right. The functions on logits, one for each block, do so too.
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
            model: The model it is for: the file will refuse every other one. Without it, any of the right shape is accepted.
            note: Free text for the header.
        """
        header, tensors = self.parts()
        content = {"intervention": header, "text": repr(self), "note": note, **model_entry(path, model)}
        artefacts.write(path, "intervention", tensors, content)


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

    def edits(self) -> Sequence[Edit]:
        """Return the members' edits, those of the last one first."""
        return [edit for member in reversed(self.members) for edit in member.edits()]

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


def check_shape(site: Site, shape: tuple[int, ...], point: Point) -> None:
    """Refuse a site of another shape.

    Raises:
        SelectionError: Naming both shapes.
    """
    if shape != point.shape:
        raise SelectionError(
            f"{site} has neurons of shape {point.shape} in this model, and {shape} in the intervention"
        )


def describe_selection(selection: NeuronMap) -> dict[str, str]:
    """Return how many neurons of each site a selection has, of those sites that have any."""
    return {
        str(site): f"{int(chosen.sum()):,} of {chosen.numel():,} neurons"
        for site, chosen in selection.items()
        if bool(chosen.any())
    }


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
