"""Texts before and after begin and go on with whole words, and show no special tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lens_unlearn.experiments.report_content import _beginnings, word_after

PIECES = ["<s>", "def", " f", "ib", "on", "acci", "(", "n", "):", "\n", "return", " n", "<|end|>"]


class Pieces:
    """Decodes numbers to the pieces of that place."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False, **_: Any) -> str:
        return "".join(PIECES[id] for id in ids if not (skip_special_tokens and PIECES[id].startswith("<")))


@pytest.mark.parametrize(
    ("place", "found"),
    [
        (2, 2),  # " f" begins a word
        (3, 9),  # within "fibonacci(n):", whose end is followed by a line
        (10, 10),  # behind the end of a line
        (11, 11),
        (12, 11),  # nothing behind it does: the last before it
        (40, 40),
    ],
)
def test_a_text_goes_on_where_a_word_begins(place: int, found: int) -> None:
    assert word_after(Pieces(), list(range(len(PIECES))), place) == found


def test_where_no_word_begins_the_place_stays() -> None:
    assert word_after(Pieces(), [3, 4, 5, 4, 5, 3], 2) == 2


def test_rows_are_those_with_which_documents_begin() -> None:
    corpus: Any = SimpleNamespace(document=torch.tensor([0, 0, 0, 1, 2, 2, 3]), n_rows=7)
    assert _beginnings(corpus, 3) == [0, 3, 4]
    assert _beginnings(corpus, 9) == [0, 3, 4, 6]
