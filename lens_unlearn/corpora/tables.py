"""Tables: rows of named fields, of a file or in memory, of which only the fields that are asked for are read.

Knows pandas, Arrow and `datasets` objects; knows nothing of files, nor of what a row says.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import chain
from typing import Any

from lens_unlearn.core.errors import CorpusError

__all__ = ["Table", "of_dataset", "table_of"]

_WHAT = "pass a path, or an iterable of strings or rows"


@dataclass(frozen=True)
class Table:
    """Rows that have not been read yet."""

    name: str
    rows: Callable[[Sequence[str]], Iterator[Any]]
    """Takes names of columns, and returns the rows with these alone; where `columns` is None, whole rows, or plain strings."""
    columns: tuple[str, ...] | None = None
    """The names of the fields that all rows have; None where only the rows themselves say it."""


def table_of(source: Any) -> Table:
    """Return what is in memory as a table.

    Raises:
        CorpusError: If it is no source of texts.
    """
    name = type(source).__name__
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")
    if datasets is not None and isinstance(source, datasets.Dataset | datasets.IterableDataset):
        return of_dataset(name, source)
    if datasets is not None and isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        splits = " and ".join(source) or "nothing"
        raise CorpusError(f"a {name} is not a text source: pass one of its splits; it holds {splits}")
    if pandas is not None and isinstance(source, pandas.DataFrame):
        columns = [source.iloc[:, place] for place in range(source.shape[1])]
        return _of_columns(name, [str(column) for column in source.columns], columns)
    if hasattr(source, "__arrow_c_stream__"):  # Arrow's own tables, and those of polars, duckdb and others
        return _of_arrow(name, source)
    if isinstance(source, Mapping):
        return _of_mapping(name, source)
    if isinstance(source, set | frozenset):
        raise CorpusError(f"a {name} has no order, in which texts are read: pass a list, such as sorted(texts)")
    if isinstance(source, bytes | bytearray) or not isinstance(source, Iterable):
        raise CorpusError(f"a {name} is not a text source: {_WHAT}")
    return Table(name, lambda _: iter(source))


def of_dataset(name: str, dataset: Any) -> Table:
    """Return a `datasets` object as a table; its other columns, such as images, are not decoded."""
    plain = dataset.with_format(None)
    columns = plain.column_names  # None of a stream whose rows have not been seen
    if columns is None:
        return Table(name, lambda _: iter(plain))
    return Table(name, lambda names: iter(plain.select_columns(list(names))), tuple(columns))


def _of_columns(name: str, names: Sequence[str], columns: Sequence[Iterable[Any]]) -> Table:
    def rows(wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
        for values in zip(*(columns[names.index(one)] for one in wanted), strict=True):
            yield dict(zip(wanted, values, strict=True))

    return Table(name, rows, tuple(names))


def _of_mapping(name: str, source: Mapping[Any, Any]) -> Table:
    """Read a mapping as columns: lists, arrays or tensors of one length."""
    lengths: dict[str, int] = {}
    for key, values in source.items():
        if isinstance(values, str | bytes | Mapping) or not (
            isinstance(values, Sized) and isinstance(values, Iterable)
        ):
            raise CorpusError(
                f"a {name} whose {key!r} is a {type(values).__name__} is not a text source: {_WHAT}, or lists by column"
            )
        lengths[str(key)] = len(values)
    if not lengths:
        raise CorpusError(f"a {name} without columns is not a text source: {_WHAT}")
    if len(set(lengths.values())) > 1:
        raise CorpusError(
            f"the columns of a {name} must be of one length, and are of "
            + ", ".join(f"{length:,} ({key})" for key, length in lengths.items())
        )
    return _of_columns(name, list(lengths), list(source.values()))


def _of_arrow(name: str, source: Any) -> Table:
    import pyarrow

    reader = pyarrow.RecordBatchReader.from_stream(source)
    names = reader.schema.names

    def rows(wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
        places = [names.index(one) for one in wanted]
        return chain.from_iterable(
            pyarrow.RecordBatch.from_arrays([batch.column(place) for place in places], list(wanted))
            .slice(start, _AT_ONCE)
            .to_pylist()
            for batch in reader
            for start in range(0, len(batch), _AT_ONCE)
        )

    return Table(name, rows, tuple(names))


_AT_ONCE = 256  # rows that are made Python objects at a time
