"""Several processes on one job: which process runs which batches, and how their results are gathered.

`torchrun --nproc_per_node=N` (or `accelerate launch`) starts N processes of the same program. Each runs all of it with the same
settings and comes to the same decisions; only the passes over a corpus are divided, batch by batch, and every process goes on
with the merged result. The first process writes the files. In a single process, as in a notebook, nothing here has any effect.

Knows ranks and `torch.distributed`; knows nothing of what is gathered.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from lens_unlearn.core.errors import ProcessError

__all__ = ["count", "from_first", "gather", "is_first", "number", "share"]

T = TypeVar("T")


def _here() -> tuple[int, int]:
    """Return this process' rank and the number of processes; join the process group if a launcher started several."""
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    if world_size < 2 or "RANK" not in os.environ:
        return 0, 1
    import torch.distributed as distributed

    if not distributed.is_initialized():
        try:
            distributed.init_process_group("gloo")
        except (RuntimeError, ValueError) as error:
            raise ProcessError(
                f"the {world_size} processes of WORLD_SIZE={world_size} did not find each other ({_line(error)}): start them with "
                "torchrun, or unset WORLD_SIZE"
            ) from error
    return distributed.get_rank(), distributed.get_world_size()


def count() -> int:
    """Return the number of processes on this job."""
    return _here()[1]


def number() -> int:
    """Return the rank of this process, from 0."""
    return _here()[0]


def is_first() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return _here()[0] == 0


def share(items: Iterable[T]) -> Iterator[T]:
    """Yield this process' share of the items: every N-th, which balances batches sorted by length."""
    rank, ranks = _here()
    return (item for number, item in enumerate(items) if number % ranks == rank)


def gather(value: T) -> list[T]:
    """Return the values that all processes passed, in order of rank; every process has to call this at the same point.

    Raises:
        ProcessError: If another process has ended.
    """
    if count() == 1:
        return [value]
    import torch.distributed as distributed

    values: list[Any] = [None] * count()
    _together(lambda: distributed.all_gather_object(values, value))
    return values


def from_first(make: Callable[[], T]) -> T:
    """Return, in every process, what `make` returns in the first one; the others do not call it.

    Raises:
        ProcessError: If another process has ended.
    """
    if count() == 1:
        return make()
    import torch.distributed as distributed

    values: list[Any] = [make() if is_first() else None]
    _together(lambda: distributed.broadcast_object_list(values, 0))
    return values[0]


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
