"""Which split a document belongs to: a fixed function of its key, the same on every machine."""

from __future__ import annotations

import hashlib


def unit(key: str) -> float:
    """Map a key to [0, 1), uniformly. ``hash()`` would differ from process to process."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(key: str, dev: float, test: float) -> str:
    """Name the split of a key, given the shares of dev and test; the rest is train."""
    position = unit(key)
    if position < test:
        return "test"
    return "dev" if position < test + dev else "train"


def up_to(split: str) -> tuple[str, ...]:
    """Name the splits that claim a text before or with this one.

    A text that occurs twice belongs to the first of test, dev, train that has it, so that the splits
    are disjoint and the small ones can be read without reading the large one.
    """
    order = ("test", "dev", "train")
    return order[: order.index(split) + 1]


def words(text: str) -> list[str]:
    """Return the words of a text: a list that is easier to read and to edit than quoted ones."""
    return text.split()
