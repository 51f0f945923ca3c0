"""`unembedding`: forward passes that end at the unembedding, so that logits are computed of some positions, and some at a time.

Logits, [batch, pos, vocabulary], can take more memory than the model: 4 GB for 4,096 tokens of a vocabulary of 262,144. What
is read out of them is a few numbers per position, and the vector that the unembedding is given at a position is all they need.
Knows how a model ends, and what it may do to logits at last; knows nothing of what is read out of them.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lens_unlearn.model.hooks import Remover, detach_all, logit_functions, register
from lens_unlearn.model.host import Model, device_of

__all__ = ["Unembedding", "knows_its_end", "unembedding", "wrap_forward"]

AT_ONCE = 2**24
"""Logits that stand at a time: 64 MB in float32."""
READ = 2**27
"""Bytes of logits that stand at a time where a few numbers are read out of each: every part reads the whole matrix once."""
FEW, FEW_POSITIONS = 2**20, 16
"""Logits that stand at a time where memory is short, and of how many positions at least."""
AtLast = Callable[[Tensor], Tensor]
"""What a model does to the output of its unembedding."""
_AT_LAST: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,  # Gemma 2
    "output_logits_soft_cap": lambda logits, cap: cap * torch.nn.functional.tanh(logits / cap),  # HookedTransformer
    "logit_scale": lambda logits, scale: logits * scale,  # Cohere
    "logits_scaling": lambda logits, scale: logits / scale,  # Granite
    "lm_head_multiplier": lambda logits, scale: logits * scale,  # Falcon H1
}
"""By the name of their number in a configuration; they are tried on the model before they are believed."""


class Unembedding:
    """The end of a model; made by `unembedding`.

    Args:
        forward: What turns the last hidden states into logits, [..., width] to [..., vocabulary]; None where a model's logits
            cannot be computed a few at a time: then `hidden` are logits.
        few: Whether memory is short.
    """

    def __init__(self, model: Model, forward: AtLast | None, few: bool = False) -> None:
        self.model, self._forward, self._few = model, forward, few
        self._where: Tensor | None = None
        self._hidden = torch.zeros(0)
        self._thread = threading.get_ident()  # forward passes of other threads are left alone

    def hidden(self, tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"]) -> Float[Tensor, "n width"]:
        """Run the model up to its unembedding, and return what that is given at some positions."""
        where = where.to(device_of(self.model))
        if self._forward is None:
            logits = self.model(tokens.to(where.device), return_type="logits")[:, : where.shape[1]]
            return logits[where.to(logits.device)]
        self._where = where
        try:
            self.model(tokens.to(where.device), return_type="logits")
        except _Reached:
            return self._hidden
        finally:
            self._where, self._hidden = None, torch.zeros(0)
        raise AssertionError("the model's unembedding did not run")

    def logits(self, hidden: Float[Tensor, "n width"]) -> Float[Tensor, "n vocabulary"]:
        """Return the logits at positions of which the hidden states are given."""
        return hidden if self._forward is None else self._forward(hidden[None])[0]

    def parts(self, count: int, at_once: int | None = None) -> list[slice]:
        """Cut so many positions into parts whose logits can stand at a time, `AT_ONCE` of them unless another number is given."""
        vocabulary = int(self.model.cfg.d_vocab)
        size = max(FEW_POSITIONS, FEW // vocabulary) if self._few else max(1, (at_once or AT_ONCE) // vocabulary)
        return [slice(start, start + size) for start in range(0, count, size)]

    def in_parts(self, function: Callable[[Tensor, slice], Tensor], hidden: Float[Tensor, "n width"]) -> list[Tensor]:
        """Apply a function to the hidden states of each part and that part; with gradients where they are enabled.

        The gradient of a part needs its logits, which are computed again then rather than kept. Where memory is short, what is
        kept is the gradient for the hidden states: weights get none, and a value has to be of one position, or the sum of those.
        """
        parts = [(hidden[part], part) for part in self.parts(len(hidden))]
        if self._few and torch.is_grad_enabled() and hidden.requires_grad:
            return [_WithGradient.apply(*one, function) for one in parts]  # type: ignore[misc]
        again = len(parts) > 1 and torch.is_grad_enabled()
        return [checkpoint(function, *one, use_reentrant=False) if again else function(*one) for one in parts]

    def _stop(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._where is None or threading.get_ident() != self._thread:
                return forward(hidden, *args, **kwargs)
            self._hidden = hidden[:, : self._where.shape[1]][self._where.to(hidden.device)]
            raise _Reached

        return run


class _WithGradient(torch.autograd.Function):
    """Values of positions, with the gradients that they will need: so logits stand in the forward pass alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, part: slice, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Return what the function gives."""
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            values = function(leaf, part)
            ctx.save_for_backward(*torch.autograd.grad(values.sum(), leaf))
        return values.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        """Return the gradient for the hidden states: row by row, since no value is of two positions."""
        return gradients[0].reshape(-1, 1).to(ctx.saved_tensors[0].dtype) * ctx.saved_tensors[0], None, None


class _Reached(BaseException):
    """Ends a forward pass that has come to the unembedding."""


@contextmanager
def unembedding(
    model: Model, stand_ins: Mapping[Any, Any] | None = None, *, whole: bool = False, few: bool = False
) -> Iterator[Unembedding]:
    """Let forward passes end at the unembedding, for the length of a `with` block; its logits can be asked for later as well.

    Interventions that change logits are not seen by them (`on_logits`): the caller has to know what those do.

    Args:
        model: The model.
        stand_ins: The modules that run in place of components that are out of the forward pass, as `shortcuts` yields them.
        whole: Whether to compute all logits within the pass. Without, that is so where somebody's hooks look at the
            unembedding, and where a model does something unknown to its logits.
        few: Whether memory is short: fewer logits stand at a time, at some cost of time.
    """
    parts = list(model.unembed.modules())[1:] if not whole else []
    watched = any(part._forward_hooks or part._forward_pre_hooks for part in parts) or model.unembed._forward_pre_hooks
    # Of hooks at the unembedding itself, those of `on_logits` are the caller's business; others are somebody's own.
    watched = watched or len(model.unembed._forward_hooks) > len(logit_functions(model))
    at_last = None if whole or watched else _at_last(model)
    if at_last is None:
        yield Unembedding(model, None, few)
        return
    module = (stand_ins or {}).get(model.unembed, model.unembed)
    forward = module.forward
    end = Unembedding(model, lambda hidden: at_last(forward(hidden)), few)
    removers: list[Remover] = []
    try:
        try:
            wrap_forward(module, end._stop, removers)
            yield end
        finally:
            detach_all(removers)
    finally:  # once more, for an interrupt in the first instruction of the one before
        detach_all(removers)


def wrap_forward(
    module: Any, make: Callable[[Callable[..., Any]], Callable[..., Any]], removers: list[Remover]
) -> None:
    """Replace a module's `forward`, inside its hooks, by what is made of it, until it is removed."""
    # Somebody else may have replaced `forward` on this instance, such as accelerate: that is put back.
    before = {"forward": module.__dict__["forward"]} if "forward" in module.__dict__ else {}
    wrapped = make(module.forward)

    def unwrap() -> bool:
        module.__dict__.pop("forward", None)
        module.__dict__.update(before)
        return True

    removers.append(unwrap)
    module.__dict__["forward"] = wrapped


_known: "weakref.WeakKeyDictionary[Any, AtLast | None]" = weakref.WeakKeyDictionary()


def knows_its_end(model: Model) -> bool:
    """Whether `unembedding` has looked at a model before: if not, it runs the model once, on some tokens of its own."""
    return model in _known


def _at_last(model: Model) -> AtLast | None:
    """Return what a model does to the output of its unembedding, as seen in a forward pass; None if that is not known."""
    if model not in _known:
        seen: list[Tensor] = []
        removers: list[Remover] = []
        tokens = torch.arange(min(4, int(model.cfg.d_vocab)), device=device_of(model))[None]
        try:
            # The last hook of the unembedding: what it sees is what the model goes on with, whoever else changes logits.
            register(
                [(model.unembed, "_forward_hooks", lambda module, args, out: seen.append(out))],
                removers,
                with_kwargs=False,
            )
            with torch.no_grad():
                logits = model(tokens, return_type="logits")
        finally:
            detach_all(removers)
        _known[model] = _explained(model, seen[-1], logits) if seen and isinstance(seen[-1], Tensor) else None
    return _known[model]


def _explained(model: Model, out: Tensor, logits: Tensor) -> AtLast | None:
    if out.shape != logits.shape:
        return None
    if torch.equal(out.to(logits), logits):
        return lambda x: x
    inner = getattr(getattr(model, "original_model", None), "config", None)
    for config in (inner, getattr(inner, "text_config", None), model.cfg):
        for name, function in _AT_LAST.items():
            number = getattr(config, name, None)
            if isinstance(number, int | float) and number and torch.equal(function(out, number).to(logits), logits):
                return lambda x, function=function, number=number: function(x, number)
    return None
