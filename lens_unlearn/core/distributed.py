"""Several processes on one job: who does which batches, and how their sums come together.

`torchrun --nproc_per_node=N` (or `accelerate launch`) starts N processes of the same program. Each of them runs the whole of it
on the same settings and comes to the same decisions; only the passes over a corpus are shared out, batch by batch, and every
process goes on with the merged result of all. The first one writes. In a notebook there is one, and nothing here does anything.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from lens_unlearn.core.errors import ProcessError

__all__ = ["count", "from_first", "gather", "is_first", "number", "share"]

T = TypeVar("T")


def _here() -> tuple[int, int]:
    """Return which process this is, and of how many; join the others where a launcher started several."""
    asked = int(os.environ.get("WORLD_SIZE") or 1)
    if asked < 2 or "RANK" not in os.environ:
        return 0, 1
    import torch.distributed as distributed

    if not distributed.is_initialized():
        try:
            distributed.init_process_group("gloo")
        except (RuntimeError, ValueError) as error:
            raise ProcessError(
                f"the {asked} processes of WORLD_SIZE={asked} did not find each other ({_line(error)}): start them with "
                "torchrun, or unset WORLD_SIZE"
            ) from error
    return distributed.get_rank(), distributed.get_world_size()


def count() -> int:
    """Return how many processes work together."""
    return _here()[1]


def number() -> int:
    """Return which of them this process is, from 0."""
    return _here()[0]


def is_first() -> bool:
    """Whether this process is the one that writes and shows."""
    return _here()[0] == 0


def share(items: Iterable[T]) -> Iterator[T]:
    """Yield this process' share of items: every N-th."""
    rank, ranks = _here()
    return (item for number, item in enumerate(items) if number % ranks == rank)


def gather(value: T) -> list[T]:
    """Return what every process passed, in order; each has to call this, at the same place.

    Raises:
        ProcessError: If another process ended meanwhile.
    """
    if count() == 1:
        return [value]
    import torch.distributed as distributed

    found: list[Any] = [None] * count()
    _together(lambda: distributed.all_gather_object(found, value))
    return found


def from_first(make: Callable[[], T]) -> T:
    """Return, in every process, what the first one makes; the others do not call it.

    Raises:
        ProcessError: If another process ended meanwhile.
    """
    if count() == 1:
        return make()
    import torch.distributed as distributed

    found: list[Any] = [make() if is_first() else None]
    _together(lambda: distributed.broadcast_object_list(found, 0))
    return found[0]


def _together(call: Callable[[], None]) -> None:
    try:
        call()
    except RuntimeError as error:
        raise ProcessError(
            f"another of the {count()} processes has ended ({_line(error)}): look above for its reason, and start the same "
            "command with --resume"
        ) from error


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
