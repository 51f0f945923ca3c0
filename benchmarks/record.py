"""Stored outputs: what a benchmark printed, as small json with the command that printed it.

    args, record = begin(parser, arguments)                       # adds --save FILE, parses, starts the clock
    record.about(model, queries=400)                              # shape of the model; further settings by name
    table = record.table("budgets", ["forgotten", "budget", "lost"])   # prints the head of a markdown table
    table.row(["code", "10%", "71.5% [68.3%, 74.7%]"])            # prints a row at once
    record.end()                                                  # prints the seconds; with --save writes the file

The command on a page names its output, so that each can be found from the other: ``python benchmarks/results.py ... --save
benchmarks/outputs/pruning.json``. In such a file stand

    command    as typed, with --save, in shell quoting
    argv       the same, split
    settings   every argument with its default, and what `Record.about` added
    versions   of Python, torch, transformers, transformer-lens and this package
    threads, seconds (of the clock), cpu_seconds
    tables     by name: {"columns": [...], "rows": [[cells as printed, all strings], ...]}

docs/make_results.py fills the tables of the pages from them and recomputes the numbers in their prose; tests/test_numbers.py
fails where a page and an output differ. Columns that prose selects rows by should be one word (``forgotten``, ``seed``); a cell
holds one value, with its interval in brackets.
"""

import argparse
import json
import math
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lens_unlearn.evaluation.report import provenance_of


def begin(
    parser: argparse.ArgumentParser, given: Sequence[str] | None = None, module: str | None = None
) -> tuple[argparse.Namespace, "Record"]:
    """Add ``--save``, parse, and start a record; of a package, ``python -m module`` is the command."""
    parser.add_argument("--save", type=Path, metavar="FILE", help="store what is printed: benchmarks/outputs/NAME.json")
    args = parser.parse_args(given)
    program = ["-m", module] if module else [f"benchmarks/{Path(sys.argv[0]).name}"]
    typed = ["python", *program, *(sys.argv[1:] if given is None else given)]
    settings = {name: value for name, value in vars(args).items() if name != "save"}
    return args, Record(typed, args.save, settings)


def percent(measure: Any) -> str:
    """Print a measure and its interval as percentages, where it has one."""
    low, high = measure.interval()
    return f"{measure.value:.1%}" + ("" if math.isnan(low) else f" [{low:.1%}, {high:.1%}]")


def line(cells: Iterable[object]) -> str:
    """Print a row of a markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


@dataclass
class Table:
    """A markdown table that is printed as it grows."""

    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    grown: Callable[[], None] = lambda: None

    def head(self) -> str:
        """Return the head in markdown."""
        return f"{line(self.columns)}\n{line(['---'] * len(self.columns))}"

    def row(self, cells: Iterable[object]) -> None:
        """Add a row and print it."""
        made = list(map(str, cells))
        if len(made) != len(self.columns):
            raise ValueError(f"a row of {len(made)} cells, {made}, in a table of {len(self.columns)} columns")
        self.rows.append(made)
        print(line(made), flush=True)
        self.grown()

    def add(self, rows: Iterable[Iterable[object]]) -> None:
        """Add rows that belong together: what is kept of an interrupted run has all of them or none."""
        kept, self.grown = self.grown, lambda: None
        try:
            for cells in rows:
                self.row(cells)
        finally:
            self.grown = kept
        self.grown()


@dataclass
class Record:
    """What a run printed, and how it was made."""

    argv: list[str]
    save: Path | None
    settings: dict[str, Any]
    tables: dict[str, Table] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def about(self, model: Any = None, **settings: Any) -> None:
        """Note the model's shape and settings that are no argument."""
        if model is not None:
            cfg = model.cfg
            shape = {"layers": int(cfg.n_layers), "width": int(cfg.d_model), "neurons": int(cfg.n_layers * cfg.d_mlp)}
            self.settings["shape"] = {**shape, "parameters": sum(p.numel() for p in model.parameters())}
        self.settings.update(settings)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Iterable[object]] = ()) -> Table:
        """Start a table and print its head, and the rows that there are."""
        if name in self.tables:
            raise ValueError(f"the output has a table {name!r} already")
        table = self.tables[name] = Table(list(columns), grown=self._keep)
        print(f"\n{table.head()}", flush=True)
        for row in rows:
            table.row(row)
        return table

    def left(self, name: str) -> list[list[str]]:
        """Return the rows of a table that an interrupted run with the same arguments has left; none if there was none."""
        if self.save is None or not self._unfinished(self.save).exists():
            return []
        stored = json.loads(self._unfinished(self.save).read_text(encoding="utf-8"))
        same = stored["settings"] == json.loads(json.dumps(self.settings, default=str))
        return stored["tables"][name]["rows"] if same and name in stored["tables"] else []

    def end(self) -> None:
        """Print versions and seconds; write the file, if one was asked for."""
        seconds, cpu = time.monotonic() - self.started, time.process_time()
        versions = {"python": platform.python_version(), **provenance_of({})["versions"]}
        print(f"\n{versions}; {torch.get_num_threads()} threads, {seconds:.0f} s ({cpu:.0f} s of CPU)")
        if self.save is None:
            return
        self._write(self.save, versions)
        self._unfinished(self.save).unlink(missing_ok=True)
        print(f"stored in {self.save}")

    def _keep(self) -> None:
        """Keep what there is beside the file, in case the run does not come to its end."""
        if self.save is not None:
            self._write(self._unfinished(self.save), {})

    @staticmethod
    def _unfinished(path: Path) -> Path:
        return path.with_name(f"{path.name}.unfinished")

    def _write(self, path: Path, versions: dict[str, Any]) -> None:
        stored = {
            "command": shlex.join(self.argv),
            "argv": self.argv,
            "settings": self.settings,
            "versions": versions,
            "threads": torch.get_num_threads(),
            "seconds": round(time.monotonic() - self.started),
            "cpu_seconds": round(time.process_time()),
            "tables": {name: {"columns": t.columns, "rows": t.rows} for name, t in self.tables.items()},
        }
        text = json.dumps(stored, indent=1, default=str, ensure_ascii=False)
        # A row of cells in a line, so that a diff shows which rows changed.
        text = re.sub(r"\[\s+((?:\"(?:[^\"\\]|\\.)*\",?\s*)+)\]", lambda m: f"[{' '.join(m[1].split())}]", text)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
