"""`Ranks`: an axis of ranks on which the highest and the lowest neurons are seen one by one.

Knows how many neurons share a cell; knows nothing of what they are ranked by.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["Ranks"]

GROWTH = 0.1
"""A cell holds this share of the rank at which it begins, if that fits: the first twenty are single neurons."""
TICKS = (1, 10, 30, 100, 1000, 10_000)


@dataclass(frozen=True)
class Ranks:
    """How ranks become cells: single neurons at both ends, then ever more in one cell."""

    head: list[int]
    """Where the cells from the highest begin, and the last of them ends."""
    tail: list[int]
    """The same from the lowest."""

    @classmethod
    def of(cls, neurons: int, limit: int) -> "Ranks":
        """Lay out a number of neurons in about a limit of cells at most."""
        growth = GROWTH
        while True:
            ranks = cls(_steps((neurons + 1) // 2, growth), _steps(neurons // 2, growth))
            if ranks.cells <= limit or growth > 4:
                return ranks
            growth *= 1.5

    @property
    def cells(self) -> int:
        """The number of cells."""
        return len(self.head) + len(self.tail) - 2

    @property
    def neurons(self) -> int:
        """The number of neurons laid out; wider layers have as many cells."""
        return self.head[-1] + self.tail[-1]

    @property
    def joined(self) -> bool:
        """Whether a cell holds several neurons."""
        return self.cells < self.neurons

    def cut(self, order: np.ndarray) -> list[np.ndarray]:
        """Cut ranked neurons into cells; of a wider layer, the cell in the middle holds more."""
        ends = [len(order) - place for place in reversed(self.tail)]
        return np.split(order, [*self.head[1:-1], *ends[:-1]])

    def ticks(self) -> tuple[list[int], list[str]]:
        """Return cells and the ranks in them, counted from the nearer end."""
        high, low = (_at(edges) for edges in (self.head, self.tail))
        at = list(high) + [self.cells - 1 - cell for cell in low]
        return at, [f"{rank:,}" for rank in (*high.values(), *low.values())]


def _steps(end: int, growth: float) -> list[int]:
    edges = [0]
    while edges[-1] < end:
        edges.append(min(end, edges[-1] + max(1, int(growth * edges[-1]))))
    return edges


def _at(edges: list[int]) -> dict[int, int]:
    """Return cells with the rank to write there; none near the middle, where both ends' would touch."""
    ranks = [rank for rank in TICKS if rank == min(1, edges[-1]) or 2.5 * rank <= edges[-1]]
    return {int(np.searchsorted(edges, rank, side="left")) - 1: rank for rank in ranks}
