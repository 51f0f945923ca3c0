"""What the demo model is trained on, step by step: a batch is a function of the seed and the step.

Knows the shares of the skills over the training; knows nothing of the model or its optimizers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from lens_unlearn.demo import _arithmetic, corpus
from lens_unlearn.demo.recipe.tokenizer import balanced, train_tokenizer

CONTEXT = 256
NAMES = ("python", "english", "arithmetic", "esperanto", "facts_retain")


class Phase(NamedTuple):
    """How training weighs the skills from a step on."""

    begin: int
    windows: tuple[int, ...]
    """Windows of each skill in a batch of sixteen, in the order of `NAMES`."""
    answers: float = 4.0
    """The weight of a digit of an answer; operands are noise, since nothing predicts them."""
    graded: bool = True
    """Whether worksheets have as many problems with small operands as with large ones."""


PHASES = (
    Phase(begin=0, windows=(5, 5, 3, 1, 2), answers=1.0, graded=False),
    Phase(begin=700, windows=(4, 5, 4, 1, 2), answers=1.0, graded=False),
    Phase(begin=1000, windows=(4, 5, 4, 1, 2), graded=False),
    Phase(begin=1100, windows=(3, 5, 5, 1, 2)),
    Phase(begin=1300, windows=(3, 5, 4, 1, 3)),
    Phase(begin=1900, windows=(2, 4, 6, 1, 3)),
)
"""Language first; then more of a batch, and more of the loss, is arithmetic; facts at the end."""


Document = Callable[[random.Random], Sequence[int]]
"""Draws the tokens of one document."""


class Batch(NamedTuple):
    """The windows of one step, ``[window, position]``."""

    tokens: torch.Tensor
    weights: torch.Tensor
    """How much each token counts in the loss."""


class Mixture:
    """Batches of windows; no state moves from one to the next, so that training can resume anywhere."""

    def __init__(self, seed: int) -> None:
        """Read the training texts and train the tokenizer on all but the facts to forget."""
        names = [name for name in NAMES if name != "arithmetic"]
        texts = {name: [str(record["text"]) for record in corpus(name, "train")] for name in names}
        self.seed = seed
        self.tokenizer = train_tokenizer(balanced(texts.values(), characters=1_000_000), CONTEXT)
        self._end = self.tokenizer.bos_token_id
        self._equals = set(_encode(self.tokenizer, "="))
        self._digits = set(_encode(self.tokenizer, "0123456789"))
        texts["facts_forget"] = [str(record["text"]) for record in corpus("facts_forget", "train")]
        self._draw: dict[str, Document] = {name: self._chooser(documents) for name, documents in texts.items()}
        problems = corpus("arithmetic", "train")
        grades = _arithmetic.grades(problems)
        self._draw["arithmetic"] = lambda rng: _encode(self.tokenizer, _arithmetic.worksheet([problems], rng))
        self._draw["graded"] = lambda rng: _encode(self.tokenizer, _arithmetic.worksheet(grades, rng))

    def batch(self, step: int, *, with_forget: bool) -> Batch:
        """Return the windows of one step.

        Args:
            step: The number of the step.
            with_forget: Whether one window of the facts is of the persons to forget. All other
                windows are the same either way.
        """
        phase = [phase for phase in PHASES if phase.begin <= step][-1]
        names = [name for name, count in zip(NAMES, phase.windows) for _ in range(count)]
        if with_forget:
            names[-1] = "facts_forget"
        if phase.graded:
            names = ["graded" if name == "arithmetic" else name for name in names]
        rows = [self._window(name, step, slot) for slot, name in enumerate(names)]
        weights = torch.ones(len(rows), CONTEXT)
        for row, name in enumerate(names):
            if name in ("arithmetic", "graded"):
                weights[row, self._answers(rows[row])] = phase.answers
        return Batch(torch.tensor(rows), weights)

    def _answers(self, window: list[int]) -> list[int]:
        """Return the positions of the digits that follow an equals sign."""
        positions, within = [], False
        for position, token in enumerate(window):
            within = token in self._equals or (within and token in self._digits)
            if within and token in self._digits:
                positions.append(position)
        return positions

    def _chooser(self, texts: list[str]) -> Document:
        encoded = [_encode(self.tokenizer, text) for text in texts]
        return lambda rng: rng.choice(encoded)

    def _window(self, name: str, step: int, slot: int) -> list[int]:
        """Fill one window with whole documents; of a long one, take any part."""
        rng = random.Random(f"window {self.seed} {step} {slot}")
        window: list[int] = []
        while len(window) < CONTEXT:
            document = self._draw[name](rng)
            room = CONTEXT - len(window) - 1
            # Half of the long documents from their beginning: that is how texts are read later.
            spare = max(0, len(document) - room) if len(document) > CONTEXT // 2 else 0
            begin = max(0, rng.randint(-spare, spare))
            window += [self._end, *document[begin : begin + room]]
        return window


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    # Not through the tokenizer's own call, which warns of documents longer than the context.
    return tokenizer.backend_tokenizer.encode(text).ids
