"""`Rows`: where a forward pass stands in the texts of its rows, whatever their batch, padding and cache."""

from collections.abc import Collection
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lens_unlearn.core.counter_rng import prefixes
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.model.host import Model

__all__ = ["Rows", "ends_of_text", "pad_of"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Where a forward pass stands in the texts of its rows."""

    tokens: Int[Tensor, "batch pos"]
    cached: int
    """How many positions stand before these tokens, in a cache."""
    ends: Int[Tensor, "batch"]
    """The position of each prompt's last token, counted from the beginning of the text."""
    text: Bool[Tensor, "batch pos"]
    """False at padding behind a prompt, and behind a text whose generation has ended."""
    keys: Int[Tensor, "batch pos"]
    """A random key per position, of the real tokens up to it: independent of batch, padding and cache."""
    continues: bool
    """Whether this pass goes on with a generation, so that what was decided at the prompt stays."""
    carry: Int[Tensor, "batch 2"]
    over: Bool[Tensor, "batch"]
    """Where the text that is generated has ended."""

    @classmethod
    def of(
        cls,
        tokens: Int[Tensor, "batch pos"],
        cached: int,
        last: "Rows | None",
        pad: int | None = None,
        prompt_ends: Int[Tensor, "batch"] | None = None,
        stop: Collection[int] = (),
        lengths: Int[Tensor, "batch"] | None = None,
    ) -> "Rows":
        """Read one pass, given the one before it.

        A pass goes on with the one before if it has that one's positions and no others in its cache, or if it has no
        cache, and its tokens are that one's and one more for each row.
        """
        rows, width = tokens.shape
        if last is not None and (len(last.tokens) != rows or not last._goes_on(tokens, cached)):
            last = None
        blank = tokens == pad if pad is not None else torch.zeros_like(tokens, dtype=torch.bool)
        known = 0 if last is None else last._width - cached  # of these tokens, in the pass before
        before = last.carry if last is not None and cached else tokens.new_zeros(rows, 2, dtype=torch.int64)
        # Padding on the right is followed by nothing that has a key, so that only padding on the left matters.
        leading = blank.long().cumprod(1).bool() & (before[:, :1] == 0)
        keys, carry = prefixes(tokens.long(), (~leading).long(), before)
        if last is not None:
            ends = last.ends
            ended = torch.isin(tokens[:, known:], tokens.new_tensor(sorted(stop))).long().cummax(1).values.bool()
            ended |= last.over[:, None]
            text, over = torch.cat([last.text[:, :known], ~ended], dim=1), ended[:, -1]
        else:
            after = blank.flip(1).long().cumprod(1).flip(1).bool()
            if lengths is not None:
                after = torch.arange(width, device=tokens.device) >= lengths.to(tokens.device)[:, None]
            text, over = ~after, torch.zeros_like(after[:, 0])
            ends = cached + torch.where(after.all(1), width - 1, width - 1 - after.sum(1))
            if prompt_ends is not None:
                if prompt_ends.shape != ends.shape:
                    raise LensUnlearnError(f"{len(prompt_ends)} ends of prompts were given for {rows} rows")
                ends = prompt_ends.to(tokens.device)
        return cls(tokens, cached, ends, text, keys, last is not None, carry, over)

    @property
    def _width(self) -> int:
        return self.cached + self.tokens.shape[1]

    def _goes_on(self, tokens: Tensor, cached: int) -> bool:
        if cached:
            return cached == self._width
        return not self.cached and self._width == tokens.shape[1] - 1 and torch.equal(self.tokens, tokens[:, :-1])

    def beside(self, activation: Tensor) -> "Rows":
        """Return the rows on the device of an activation, which is another one where a model is spread over several."""
        if activation.device == self.tokens.device:
            return self
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        return replace(self, **{n: v.to(activation.device) for n, v in given.items() if isinstance(v, Tensor)})

    def check(self, activation: Tensor) -> None:
        """Refuse an activation that is not of these tokens.

        Raises:
            LensUnlearnError: Naming both shapes.
        """
        if activation.shape[:2] != self.tokens.shape:
            raise LensUnlearnError(
                f"activations of shape {tuple(activation.shape)} are not those of tokens of shape "
                f"{tuple(self.tokens.shape)}: run the model on tokens, from its first layer"
            )


def pad_of(model: Model) -> int | None:
    """Return the token that pads, if the model's tokenizer has one."""
    return getattr(getattr(model, "tokenizer", None), "pad_token_id", None)


def ends_of_text(model: Model) -> set[int]:
    """Return the tokens that end a text."""
    known = (getattr(m, "eos_token_id", None) for m in (getattr(model, "tokenizer", None), model.cfg))
    return {t for one in known if one is not None for t in ([one] if isinstance(one, int) else one)}
