"""`BenchmarkResult`: a benchmark's scores under every condition, and the texts and losses that they are made of.

Anybody can compute the scores again from these. Knows how a result is shown as tables; knows no benchmark by name.
"""

import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lens_unlearn.benchmarks.benchmark import Benchmark, Data, Raw
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.report import Measure, harmless

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["BenchmarkResult"]

COLUMNS = ["condition", "metric", "value", "low", "high", "n"]
TEXTS = ["condition", "id", "task", "split", "prompt", "reference", "text"]
NUMBERS = ["condition", "intervention", "quantity", "row", "value"]


@dataclass(frozen=True, eq=False, repr=False)
class BenchmarkResult:
    """What a benchmark measured: condition by metric, the official scores first, with bootstrap 95 % intervals."""

    benchmark: Benchmark
    measures: dict[tuple[str, str], Measure]
    """By condition and metric."""
    data: Data
    raw: Mapping[str, Sequence[Raw]]
    """By condition, what each of its interventions wrote and lost."""
    notes: tuple[str, ...] = ()
    """What was left out, and where public code would give another number."""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def conditions(self) -> list[str]:
        """The conditions, in order: the base, each one with its control behind it, and the reference."""
        return list(self.raw)

    @property
    def metrics(self) -> list[str]:
        """The metrics, the official scores first."""
        named = dict.fromkeys(metric for _, metric in self.measures)
        return [
            *(one for one in self.benchmark.official if one in named),
            *(one for one in named if one not in self.benchmark.official),
        ]

    @property
    def official(self) -> list[str]:
        """The official scores that were measured."""
        return [one for one in self.metrics if one in self.benchmark.official]

    def __getitem__(self, key: tuple[str, str]) -> Measure:
        """Return the measure of (condition, metric).

        Raises:
            LensUnlearnError: If it was not measured; the message lists what was.
        """
        if key not in self.measures:
            raise LensUnlearnError(
                f"{key} was not measured: conditions are {', '.join(self.conditions)}; metrics {', '.join(self.metrics)}"
            )
        return self.measures[key]

    def to_frame(self) -> "pd.DataFrame":
        """Give one row per condition and metric: condition, metric, value, low, high, n; the official scores first."""
        import pandas as pd

        rows = [
            [condition, metric, one.value, *one.interval(), one.n]
            for condition in self.conditions
            for metric in self.metrics
            if (one := self.measures.get((condition, metric))) is not None
        ]
        return pd.DataFrame(rows, columns=pd.Index(COLUMNS))

    @property
    def generations(self) -> "pd.DataFrame":
        """What everybody wrote: condition, id, task, split, prompt, reference, text; without what did not fit the context."""
        import pandas as pd

        rows = [
            [condition, item.id, item.task, item.split, item.prompt, item.reference, text]
            for condition, several in self.raw.items()
            for one in several
            for number, (item, text) in enumerate(zip(self.data.items, one.texts, strict=False))
            if number not in one.left_out
        ]
        return pd.DataFrame(rows, columns=pd.Index(TEXTS))

    @property
    def losses(self) -> "pd.DataFrame":
        """The losses and other numbers that scores are made of: condition, intervention (by number), quantity, row, value."""
        import pandas as pd

        rows = [
            [condition, which, name, number, value]
            for condition, several in self.raw.items()
            for which, one in enumerate(several)
            for name, values in one.numbers.items()
            for number, value in enumerate(values)
        ]
        return pd.DataFrame(rows, columns=pd.Index(NUMBERS))

    def table(self, metrics: Sequence[str] | None = None) -> "pd.DataFrame":
        """Give a small table for reading: conditions by metrics, "value [low, high]"; default the official scores."""
        import pandas as pd

        shown = list(metrics) if metrics is not None else self.official or self.metrics
        rows = {
            condition: {metric: _written(self.measures.get((condition, metric))) for metric in shown}
            for condition in self.conditions
        }
        return pd.DataFrame.from_dict(rows, orient="index", columns=pd.Index(shown))

    def csv(self) -> str:
        """Return `to_frame` as CSV, in which a spreadsheet finds nothing to run."""
        frame = self.to_frame()
        frame["condition"] = [harmless(name) for name in frame["condition"]]
        return frame.to_csv(index=False)

    def generations_jsonl(self) -> str:
        """Return `generations` as lines of JSON."""
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.generations.to_dict("records"))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page that opens offline: the official scores, then their parts, with intervals, and some of the texts."""
        from lens_unlearn.core.artefacts import replace_file
        from lens_unlearn.reports.benchmark_page import benchmark_page

        replace_file(path, benchmark_page(self).encode(errors="backslashreplace"))

    def __repr__(self) -> str:
        shown = self.table()
        return f"{self.benchmark.words}({len(self.conditions)} conditions, {len(self.metrics)} metrics)\n{shown.to_string()}"

    def _repr_html_(self) -> str:
        noted = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        rest = self.table([one for one in self.metrics if one not in self.official]).T
        parts = f"<details><summary>parts</summary>{rest.to_html()}</details>" if len(rest) else ""
        return f"<div>{self.table().to_html()}{parts}{noted and f'<ul>{noted}</ul>'}</div>"


def _written(measure: Measure | None) -> str:
    if measure is None:
        return "–"
    low, high = measure.interval()
    return f"{measure.value:.3f}" + ("" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]")
