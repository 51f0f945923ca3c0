"""`Rows`: which positions of which texts a forward pass covers, whatever the batch, the padding and the key-value cache.

Knows token ids, and which of them the tokenizer pads with or calls special; knows nothing of activations or of what is decided
from them.
"""

# The same text reaches a model in many forms: alone, in a batch, padded on the left or on the right, or token by token with a
# key-value cache. An intervention that looks at prompts, or draws random numbers, has to do the same in each. So everything here
# is counted in real tokens from the beginning of the text, and a pass that continues a cached generation carries on the counts of
# the pass before it (`carry`), whose tokens it no longer sees.
#
# Padding is known by its token id only: an attention mask does not reach the hooks. In GPT-2 the padding token is also BOS and EOS.
# Then a leading BOS is taken for padding, which shifts no key between two runs of the same text, since it is so in both.

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lens_unlearn.core.counter_rng import prefixes
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.model.host import Model
from lens_unlearn.model.special_tokens import special_tokens

__all__ = ["Rows", "pad_of"]


@dataclass(frozen=True, eq=False)
class Rows:
    """The positions that a forward pass covers in the text of each of its rows."""

    tokens: Int[Tensor, "batch pos"]
    cached: int
    """Number of positions before these tokens, in a key-value cache."""
    ends: Int[Tensor, "batch"]
    """The position of each prompt's last token, counted from the beginning of the text."""
    text: Bool[Tensor, "batch pos"]
    """False at padding after a prompt, and after the end of a generated text."""
    number: Int[Tensor, "batch pos"]
    """Which of the text's real tokens each position holds, counted from 1; 0 at padding before the text."""
    keys: Int[Tensor, "batch pos"]
    """A key for random numbers at each position, computed from the real tokens up to it."""
    continues: bool
    """Whether this pass continues the generation of the last one, so that what was decided in that holds."""
    carry: Int[Tensor, "batch 2"]
    """What `prefixes` needs to compute the keys of the pass that continues this one."""
    over: Bool[Tensor, "batch"]
    """Whether the generated text of each row has ended."""

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
        """Describe a forward pass, given the one before it in the same generation.

        A pass continues the last one if its cache holds exactly the positions up to that one's end; or if it has no cache, and its
        tokens are those of the last pass and one more per row.

        Args:
            tokens: Token ids of this pass.
            cached: Number of positions in the key-value cache.
            last: The pass before; None if there was none, or if this pass does not belong to the same generation.
            pad: The padding token, if there is one.
            prompt_ends: Position of the last token of each row's prompt; default the last token that is not padding.
            stop: Tokens that end a generated text.
            lengths: Number of tokens of each row before its padding on the right; default as the padding token says.

        Raises:
            LensUnlearnError: If there are not as many prompt ends as rows.
        """
        rows, width = tokens.shape
        if last is not None and (len(last.tokens) != rows or not last._goes_on(tokens, cached)):
            last = None
        blank = tokens == pad if pad is not None else torch.zeros_like(tokens, dtype=torch.bool)
        known = 0 if last is None else last._width - cached  # so many of these tokens were in the last pass too
        before = last.carry if last is not None and cached else tokens.new_zeros(rows, 2, dtype=torch.int64)
        # Only padding on the left can shift keys: nothing real follows padding on the right.
        leading = blank.long().cumprod(1).bool() & (before[:, :1] == 0)
        number = before[:, :1] + (~leading).long().cumsum(1)
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
        return cls(tokens, cached, ends, text, number, keys, last is not None, carry, over)

    @property
    def repeats(self) -> bool:
        """Whether this pass holds the positions of the last one again, and one more: in a generation without a cache."""
        return self.continues and not self.cached

    def special(self, tokenizer: Any) -> Bool[Tensor, "batch pos"]:
        """Return where there are special tokens of a tokenizer, padding in front, or the first token of a text.

        That token is the attention sink of nearly every model, but for one behind BOS. In GPT-2 the padding token is BOS as well:
        there a leading one counts as BOS.
        """
        ids = sorted(special_tokens(tokenizer)) if tokenizer is not None else []
        bos, pad = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "pad_token_id", None)
        # Of what stands before a pass that goes on with a cache, only padding matters: otherwise no token is the first.
        before = torch.full_like(self.tokens[:, :1], -1 if pad is None or not self.cached else pad)
        first = self.number == 1
        if bos is not None:
            first = first & (torch.cat([before, self.tokens[:, :-1]], dim=1) != bos)
        ours = torch.isin(self.tokens, torch.tensor(ids, dtype=self.tokens.dtype, device=self.tokens.device))
        return ours | (self.number == 0) | first

    @property
    def _width(self) -> int:
        return self.cached + self.tokens.shape[1]

    def _goes_on(self, tokens: Tensor, cached: int) -> bool:
        if cached:
            return cached == self._width
        return not self.cached and self._width == tokens.shape[1] - 1 and torch.equal(self.tokens, tokens[:, :-1])

    def beside(self, activation: Tensor) -> "Rows":
        """Return the same rows on the device of an activation, for models that are spread over several devices."""
        if activation.device == self.tokens.device:
            return self
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return replace(self, **{n: v.to(activation.device) for n, v in values.items() if isinstance(v, Tensor)})

    def check(self, activation: Tensor) -> None:
        """Refuse an activation that does not belong to these tokens.

        Raises:
            LensUnlearnError: If batch or position differ; the message names both shapes.
        """
        if activation.shape[:2] != self.tokens.shape:
            raise LensUnlearnError(
                f"activations of shape {tuple(activation.shape)} are not those of tokens of shape "
                f"{tuple(self.tokens.shape)}: run the model on tokens, from its first layer"
            )


def pad_of(model: Model) -> int | None:
    """Return the tokenizer's padding token; None if it has none."""
    return getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
