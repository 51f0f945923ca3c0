"""What a plan is: an experiment as a table that is computed cell by cell."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Cell", "Plan"]


class Cell(NamedTuple):
    """Some rows of a plan's table that are computed together.

    Attributes:
        key: How its rows begin. No other cell's do.
        rows: Computes what comes after the key, row by row.
    """

    key: tuple[str, ...]
    rows: Callable[[], Iterable[Sequence[object]]]


@dataclass(frozen=True)
class Plan:
    """An experiment of a paper, repeated.

    Attributes:
        name: On the command line, as in "sp-units".
        repeats: The figure or table of the paper.
        model: What it is repeated on here.
        columns: Of its table.
        cells: Yields the cells, loading what they need. Cells must not depend on each other, so that a plan can go on with those
            that are missing.
    """

    name: str
    repeats: str
    model: str
    columns: tuple[str, ...]
    cells: Callable[[], Iterator[Cell]]
