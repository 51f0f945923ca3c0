"""`Place`: at which positions of a text an intervention acts, the same with a key-value cache and without one.

Knows where prompts end, which tokens are special and which positions are attention sinks; knows nothing of what is done there.
"""

import reprlib
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from lens_unlearn.core.errors import LensUnlearnError, SelectionError
from lens_unlearn.core.numbers import SINKS
from lens_unlearn.interventions.live import Live
from lens_unlearn.model.positions import Rows

__all__ = ["SINK_RATIO", "WHERE", "At", "Place"]

At = str | Tensor | None
"""A name of `WHERE`, a mask ``[batch, pos]`` of booleans, or None for every position."""
WHERE = ("prompt", "generated", "last")
SINK_RATIO = 10.0
"""By default, a position is an attention sink from so many times the model's usual norm on."""


@dataclass(frozen=True, eq=False)
class Place:
    """The positions at which an intervention acts: see `Intervention.placed`.

    Raises:
        SelectionError: If there is no such place, or the ratio is not above 1.
    """

    at: At = None
    skip_special: bool = False
    sink_ratio: float = SINK_RATIO

    def __post_init__(self) -> None:
        """Check the arguments."""
        if isinstance(self.at, Tensor):
            if self.at.dtype != torch.bool or self.at.ndim != 2:
                raise SelectionError(
                    f"at= is a mask of shape {tuple(self.at.shape)}, {self.at.dtype}: give booleans for batch and position"
                )
        elif self.at is not None and not (isinstance(self.at, str) and self.at in WHERE):
            raise SelectionError(
                f"at={reprlib.repr(self.at)} is no place in a text: choose from {', '.join(WHERE)}, or give a mask"
            )
        if not isinstance(self.skip_special, bool):
            raise SelectionError(f"skip_special={self.skip_special!r} is not True or False")
        object.__setattr__(self, "sink_ratio", SINKS.check(self.sink_ratio, "sink_ratio", SelectionError))

    def within(self, live: Live, x: Tensor, layer: int | None) -> Bool[Tensor, "batch pos"]:
        """Return the positions of the current forward pass at which to act.

        Args:
            live: The run.
            x: An activation, ``[batch, pos, ...]`` or ``[batch * pos, ...]``, for its device.
            layer: Where it is; None behind all of them.

        Raises:
            LensUnlearnError: If the model does not run on tokens.
            SelectionError: If a mask does not cover the forward pass.
        """
        rows = live.rows
        if rows is None:
            raise LensUnlearnError("acting at some positions needs token ids: run the model on tokens")
        rows = rows.beside(x)
        where = self._named(live, rows)
        if self.skip_special:
            where = where.masked_fill(live.special.to(x.device), False)
            if layer is not None and (size := live.norms.get(layer)) is not None:  # none yet at the embeddings
                where = where & (size.to(x.device) <= self.sink_ratio)
        return where

    def _named(self, live: Live, rows: Rows) -> Bool[Tensor, "batch pos"]:
        if self.at is None:
            return torch.ones_like(rows.text)
        if isinstance(self.at, Tensor):
            return self._masked(self.at, live, rows)
        place = rows.cached + torch.arange(rows.text.shape[1], device=rows.text.device)
        ends = rows.ends[:, None]
        if self.at == "last":
            return place == ends
        return place <= ends if self.at == "prompt" else (place > ends) & rows.text

    @staticmethod
    def _masked(mask: Tensor, live: Live, rows: Rows) -> Bool[Tensor, "batch pos"]:
        # A mask is of a whole text. A shorter pass is a part of one only in a generation, behind a cache, or where the prompt was
        # announced (`Live.expect`) to end behind the pass; any other is of a text that the mask was not made for.
        begin, end = rows.cached, rows.cached + rows.text.shape[1]
        part = live.generates or bool((rows.ends >= end).any())
        if mask.shape[0] != rows.text.shape[0] or end > mask.shape[1] or (end < mask.shape[1] and not part):
            raise SelectionError(
                f"at= is a mask of {mask.shape[0]} rows and {mask.shape[1]} positions, and the forward pass has "
                f"{rows.text.shape[0]} rows and positions {begin} to {end - 1}: give a mask of the tokens' shape"
            )
        return mask[:, begin:end].to(rows.text.device)

    def parts(self) -> dict[str, Any]:
        """Return what a file holds of it.

        Raises:
            SelectionError: If it is a mask.
        """
        if isinstance(self.at, Tensor):
            raise SelectionError(
                "a mask belongs to one batch of tokens and is not saved: save the intervention, and give at= to on()"
            )
        return {"at": self.at, "skip_special": self.skip_special, "sink_ratio": self.sink_ratio}

    def __str__(self) -> str:
        where = "every position" if self.at is None else "a mask" if isinstance(self.at, Tensor) else f'"{self.at}"'
        return f"at {where}" + (
            f", not at special tokens and sinks ({self.sink_ratio:g} x)" if self.skip_special else ""
        )
