"""`Live`: the run of one intervention on one model, yielded by `Intervention.on`: what is decided in it, row by row.

Knows where a forward pass stands in the texts of its rows, and what a run has to remember from hook to hook; knows nothing of
what any intervention does, nor of how its hooks are added.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_unlearn.model.chat import ends_of_text
from lens_unlearn.model.hooks import generation, logit_functions
from lens_unlearn.model.host import Model
from lens_unlearn.model.positions import Rows, pad_of
from lens_unlearn.model.residual import norms

__all__ = ["Finish", "Live", "acting"]

T = TypeVar("T")


class Live:
    """One intervention acting on one model: yielded by `Intervention.on`, ended with the block."""

    def __init__(self, intervention: Any, model: Model) -> None:
        self.intervention = intervention  # an `Intervention`, a class that is defined in terms of this one
        self.model = model
        self.active = True
        self.abstained: Tensor = torch.zeros(0, dtype=torch.bool)
        """For each row of the last forward pass (or generation), whether the model abstained."""
        self.rows: Rows | None = None
        """Where the current forward pass stands in the texts of its rows; only for interventions that look at rows."""
        self.notes: dict[int, Any] = {}
        """State of the members by their id: from hook to hook, and from a prompt to the tokens generated behind it."""
        self.norms: dict[int, Float[Tensor, "batch pos"]] = {}
        """By layer, the norms of the residual stream at its input in the current forward pass, as multiples of `residual_scale`;
        only of layers that the intervention asks for."""
        self._once: dict[Any, tuple[Rows, Any]] = {}
        self._special: Tensor | None = None
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
        self.norms.clear()
        self._special = None
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

    def measure(self, scale: Sequence[float], layer: int, stream: Float[Tensor, "batch pos d_model"]) -> None:
        """Note the norms of the residual stream at the input of a layer."""
        self.norms[layer] = norms(stream) / scale[layer]

    @property
    def special(self) -> Bool[Tensor, "batch pos"]:
        """Where the current forward pass has special tokens, padding in front, or the first token of a text."""
        special = self._special
        if special is None:
            assert self.rows is not None
            special = self._special = self.rows.special(getattr(self.model, "tokenizer", None))
        return special

    @property
    def generates(self) -> bool:
        """Whether the current forward pass is one of a call of `generate`, or goes on from a key-value cache."""
        return self._generation is not None or (self.rows is not None and self.rows.cached > 0)

    def withhold(self, rows: Bool[Tensor, "batch"], refusal: str) -> None:
        """Note that the model abstains in these rows, and the refusal that is written instead."""
        self.abstained = self.abstained | rows
        for row in rows.nonzero()[:, 0].tolist():
            self._refusals.setdefault(row, refusal)

    def constant_at(self) -> Int[Tensor, "batch pos"] | None:
        """Decide on a forward pass that is over, and return where its logits are constant, as `Intervention.constant_at` does."""
        self._settle()
        return self.intervention.constant_at(self)

    def tell(self, refusals: Sequence[str | None]) -> None:
        """Set the refusals of the rows of several passes, in the user's order; None where the model answered."""
        abstained = [refusal is not None for refusal in refusals]
        self.abstained = torch.tensor(abstained, dtype=torch.bool, device=self.abstained.device)
        self._refusals = {row: refusal for row, refusal in enumerate(refusals) if refusal is not None}

    def _settle(self) -> None:
        self.intervention.settle(self)

    def _end(self) -> None:
        self.active, self.rows, self._special, self._generation = False, None, None, None
        self._moved.clear()
        self._once.clear()
        self.notes.clear()
        self.norms.clear()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Forget the forward passes of a `with` block, which are not the user's."""
        state = dict(vars(self))
        self._refusals, self.notes, self.norms = {}, {}, {}
        try:
            yield
        finally:
            vars(self).update(state)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Return what depends on the rows of the current forward pass alone: made in the first of its hooks, for all of them."""
        assert self.rows is not None
        made = self._once.get(key)
        if made is None or made[0] is not self.rows:
            made = self._once[key] = (self.rows, make())
        return made[1]

    def like(self, tensor: Tensor, activation: Tensor) -> Tensor:
        """Return a tensor of the intervention on an activation's device; floating ones also in its dtype.

        The copy is cached for the next forward pass, until the original is changed in place, and unless it needs a gradient.
        """
        # Copies live here and not on the intervention, which is frozen and may act on several models at once; they go with the
        # block. A tensor is known by its id; the cache holds the tensor too, so that no other one can be given the same id.
        # A copy of a tensor that needs a gradient belongs to one graph, and is made anew. The entry is looked up once: while a
        # thread that runs the model is in here, another one may end the block, which clears all caches.
        dtype = activation.dtype if tensor.is_floating_point() else tensor.dtype
        if tensor.requires_grad:
            return tensor.to(device=activation.device, dtype=dtype)
        key, version = (id(tensor), activation.device, dtype), 0 if tensor.is_inference() else tensor._version
        moved = self._moved.get(key)
        if moved is None or moved[1] != version:
            moved = self._moved[key] = (tensor, version, tensor.to(device=activation.device, dtype=dtype))
        return moved[2]

    def __repr__(self) -> str:
        return f"Live({self.intervention!r}, {'acting' if self.active else 'ended'})"


class Finish:
    """The last hook of an intervention that looks at rows: it passes the logits on to `Intervention.finish`."""

    def __init__(self, live: Live) -> None:
        self.live = live

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the logits as the intervention leaves them."""
        return self.live.intervention.finish(logits, self.live)

    @property
    def expect(self) -> Callable[..., None]:
        """How to announce where prompts end: what `announce` looks for."""
        return self.live.expect


def acting(model: Model) -> list[Live]:
    """Return the interventions that look at rows and act on a model now, outermost first."""
    return [f.live for f in logit_functions(model) if isinstance(f, Finish)]
