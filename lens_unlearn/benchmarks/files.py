"""The files of a benchmark: found in its public layout below a folder, or in a data set of the hub, with their columns checked.

Knows names of files, splits and columns; knows nothing of models, nor of what is measured.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.corpora.files import open_file
from lens_unlearn.corpora.rows import as_text

__all__ = ["Files", "first_of_each"]

Row = dict[str, Any]
_ENDINGS = (".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz", ".json.gz", ".txt")
_SHARD = "-00000-of-00001.parquet"


@dataclass(frozen=True)
class Files:
    """Where a benchmark's data are.

    Attributes:
        source: A folder, or ``hf:OWNER/NAME`` for a data set of the hub.
        benchmark: Its name, for messages.
    """

    source: str
    benchmark: str

    @classmethod
    def of(cls, source: str | os.PathLike[str], benchmark: str) -> "Files":
        """Look at a folder, or take the name of a data set.

        Raises:
            CorpusError: If there is no such folder.
        """
        if not isinstance(source, str | os.PathLike) or not os.fspath(source):
            raise CorpusError(
                f"{benchmark}: {source!r} is no folder: give the one that holds the benchmark's files, or hf:OWNER/NAME"
            )
        name = os.path.expanduser(os.fspath(source))
        if not name.startswith("hf:") and not os.path.isdir(name):
            raise CorpusError(
                f"{benchmark}: there is no folder {name}: give the one that holds the benchmark's files, or hf:OWNER/NAME"
            )
        return cls(name, benchmark)

    @property
    def on_hub(self) -> bool:
        """Whether the data are read from the hub."""
        return self.source.startswith("hf:")

    def path(self, *names: str) -> Path | None:
        """Return the first file of some names (without their endings) that there is; None where there is none."""
        for name in names:
            for ending in (*_ENDINGS, _SHARD):
                if (path := Path(self.source) / f"{name}{ending}").is_file():
                    return path
        return None

    def has(self, *names: str) -> bool:
        """Whether one of some files is there; of the hub nothing is known before it is read."""
        return not self.on_hub and self.path(*names) is not None

    def rows(
        self, columns: Mapping[str, str | None], *names: str, hub: tuple[str | None, str] | None = None
    ) -> list[Row]:
        """Read the rows of the first file of some names that there is.

        Args:
            columns: The columns that are needed, as texts; by name what stands for one that is missing, None for nothing.
            names: Files below the folder, without their endings.
            hub: The configuration and split in which a data set of the hub has them.

        Raises:
            CorpusError: If there is none, it holds no row, or a row lacks a column; the message names the file and its columns.
        """
        return self._checked(columns, *self._open(names, hub))

    def _checked(self, columns: Mapping[str, str | None], where: str, read: Iterator[Any]) -> list[Row]:
        found: list[Row] = []
        for number, row in enumerate(read, 1):
            if isinstance(row, str) and len(columns) == 1:  # a list of texts, as MUSE has them
                row = {next(iter(columns)): row}
            if not isinstance(row, Mapping):
                raise CorpusError(
                    f"{where} holds {type(row).__name__}s and no rows with the columns {_listed(columns)}"
                )
            missing = [name for name, default in columns.items() if name not in row and default is None]
            if missing:
                has = _listed(row) or "nothing"
                raise CorpusError(
                    f"{where}, row {number:,}, has no column {missing[0]!r}: {self.benchmark} needs {_listed(columns)}, "
                    f"and it has {has}"
                )
            kept: Row = dict(row)
            for name, default in columns.items():
                value = row.get(name, default)
                if isinstance(value, list | tuple | Mapping):
                    continue
                text = as_text(value)
                if text is None and default is None:
                    raise CorpusError(f"{where}, row {number:,}: the column {name!r} is empty or no text")
                kept[name] = default if text is None else text
            found.append(kept)
        if not found:
            raise CorpusError(f"{where} is empty")
        return found

    def maybe(
        self, columns: Mapping[str, str | None], *names: str, hub: tuple[str | None, str] | None = None
    ) -> list[Row]:
        """Read the rows of the first file of some names that there is; none where there is none.

        Raises:
            CorpusError: If there is one, and it holds no row, or a row lacks a column.
        """
        if not self.on_hub and not self.has(*names):
            return []
        try:
            opened = self._open(names, hub)
        except CorpusError:
            if self.on_hub:  # which does not say what it has before it is asked
                return []
            raise
        return self._checked(columns, *opened)

    def _open(self, names: Sequence[str], hub: tuple[str | None, str] | None) -> tuple[str, Iterator[Any]]:
        if self.on_hub:
            return self._open_hub(hub or (None, names[0]))
        path = self.path(*names)
        if path is None:
            looked = " or ".join(f"{name}.jsonl" for name in names)
            raise CorpusError(
                f"{self.benchmark} needs {looked} (or .json, .parquet, .csv) in {self.source}, which has none"
            )
        table = open_file(str(path))
        return str(path), _rows(table.rows(table.columns or ()))

    def _open_hub(self, where: tuple[str | None, str]) -> tuple[str, Iterator[Any]]:
        import datasets

        config, split = where
        name = f"{self.source}{f'/{config}' if config else ''}:{split}"
        try:
            return name, iter(datasets.load_dataset(self.source[3:], config, split=split))
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CorpusError(f"{name} cannot be loaded from the hub: {first}") from error


def _rows(read: Iterator[Any]) -> Iterator[Any]:
    """Give rows; a table that was written by columns, as pandas' `to_json` does it by default, is turned."""
    rest = [row for _, row in zip(range(2), read, strict=False)]
    only = rest[0] if len(rest) == 1 else None
    if isinstance(only, Mapping) and only and all(isinstance(column, Mapping) for column in only.values()):
        for key in next(iter(only.values())):
            yield {name: column.get(key) for name, column in only.items()}
        return
    yield from rest
    yield from read


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(map(str, names))


def first_of_each(rows: Sequence[Row], groups: Sequence[Any], count: int | None) -> list[Row]:
    """Return the first so many rows of each group, in their order; all for None."""
    seen: dict[Any, int] = {}
    kept = []
    for row, group in zip(rows, groups, strict=True):
        seen[group] = seen.get(group, 0) + 1
        if count is None or seen[group] <= count:
            kept.append(row)
    return kept
