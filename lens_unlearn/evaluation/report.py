"""`Report`: a tidy table of what was measured, with bootstrap intervals, and where it came from."""

import html
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.core.intervals import interval
from lens_unlearn.model.host import versions

__all__ = ["Measure", "Report", "Separability", "separability"]

COLUMNS = ["condition", "corpus", "metric", "value", "low", "high", "n"]
BASE = "base"
FORMULA = tuple("=+-@＝＋－＠")
"""What a name that a spreadsheet runs begins with, behind `BLANK`."""
BLANK = " \t\ufeff"


@dataclass(frozen=True, eq=False)
class Measure:
    """One metric of one condition on one corpus."""

    value: float
    draws: np.ndarray
    """Bootstrap draws of the value, over documents; the same resamples for every condition, so differences are paired."""
    n: int
    """Tokens (or answers) behind it."""

    def interval(self) -> tuple[float, float]:
        """Return the bootstrap 95 % interval."""
        return interval(self.draws)

    def __repr__(self) -> str:
        low, high = self.interval()
        return f"Measure({self.value:.3f} [{low:.3f}, {high:.3f}], n={self.n:,})"


@dataclass(frozen=True, eq=False)
class Report:
    """What an evaluation measured: condition by corpus by metric, with bootstrap 95 % intervals over documents.

    Metrics: `loss` (nats per token), `perplexity` = exp(loss), `top1`, `top10` and `top1_rare` (fractions), `kl` to the
    unedited model (nats per token), and those of generated answers; `evaluate` says what each is.
    """

    measures: dict[tuple[str, str, str], Measure]
    provenance: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    """Figures that `to_html` shows beside its own, by title."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Texts for `to_html`: a prompt, and what the model writes under each condition."""
    title: str = ""
    """What was done, in a few words; heads the page."""
    parts: "tuple[Report, ...]" = ()
    """Further reports that `to_html` shows below this one."""
    values: dict[tuple[str, str, str], np.ndarray] = field(default_factory=dict)
    """[interventions, questions] of what single questions score, where `evaluate` was asked for memorization."""

    @property
    def conditions(self) -> list[str]:
        """The conditions, in order."""
        return list(dict.fromkeys(condition for condition, _, _ in self.measures))

    @property
    def corpora(self) -> list[str]:
        """The corpora, in order."""
        return list(dict.fromkeys(corpus for _, corpus, _ in self.measures))

    @property
    def metrics(self) -> list[str]:
        """The metrics, in order."""
        return list(dict.fromkeys(metric for _, _, metric in self.measures))

    def __getitem__(self, key: tuple[str, str, str]) -> Measure:
        """Return the measure of (condition, corpus, metric).

        Raises:
            LensUnlearnError: If it was not measured; the message lists what was.
        """
        if key not in self.measures:
            raise LensUnlearnError(
                f"{key} was not measured: conditions are {', '.join(self.conditions)}; corpora {', '.join(self.corpora)}; "
                f"metrics {', '.join(self.metrics)}"
            )
        return self.measures[key]

    def drop(self, condition: str, corpus: str, metric: str = "top1") -> Measure:
        """Return the share of the base's value that was lost: 1 - value / base, paired over documents.

        For `loss`, `perplexity` and `kl`, which rise as a skill is lost, use the difference in `to_frame`.
        """
        edited, base = self[condition, corpus, metric], self[BASE, corpus, metric]
        if base.value == 0:
            return Measure(float("nan"), np.full(1, np.nan), edited.n)
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = 1 - edited.draws / base.draws
        return Measure(1 - edited.value / base.value, draws, edited.n)

    def selectivity(
        self, condition: str, forget: str = "forget", retain: str = "retain", metric: str = "top1"
    ) -> Measure:
        """Return the drop on the forget corpus minus the drop on the retain corpus, as fractions of the base."""
        lost, cost = self.drop(condition, forget, metric), self.drop(condition, retain, metric)
        both = lost.draws.size == cost.draws.size  # a corpus of a single document has no draws
        draws = lost.draws - cost.draws if both else np.empty(0)
        return Measure(lost.value - cost.value, draws, min(lost.n, cost.n))

    def to_frame(self) -> pd.DataFrame:
        """Give one row per condition, corpus and metric; the difference to the base is paired over documents."""
        import pandas as pd

        rows = []
        for (condition, corpus, metric), measure in self.measures.items():
            low, high = measure.interval()
            row = [condition, corpus, metric, measure.value, low, high, measure.n]
            base = self.measures.get((BASE, corpus, metric))
            if base is None or condition == BASE:
                rows.append([*row, float("nan"), float("nan"), float("nan")])
            else:
                rows.append([*row, measure.value - base.value, *interval(measure.draws - base.draws)])
        extra = ["difference", "difference_low", "difference_high"]
        return pd.DataFrame(rows, columns=pd.Index([*COLUMNS, *extra]))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `csv` to a file."""
        from lens_unlearn.core.artefacts import replace_file

        replace_file(path, self.csv().encode(errors="backslashreplace"))

    def csv(self) -> str:
        """Return `to_frame` as CSV, in which a spreadsheet finds nothing to run.

        A name that would be a formula begins with an apostrophe, and line breaks in names are blanks.
        """
        frame = self.to_frame()
        for column in ("condition", "corpus", "metric"):
            frame[column] = [_harmless(name) for name in frame[column]]
        return frame.to_csv(index=False)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page that opens offline: the figures, the table, and the settings."""
        from lens_unlearn.core.artefacts import replace_file
        from lens_unlearn.reports.report_page import page

        replace_file(path, page(self).encode(errors="backslashreplace"))  # a text may hold half a surrogate pair

    def table(self, metrics: Sequence[str] = ("top1", "loss")) -> pd.DataFrame:
        """Give a small table for reading: conditions by corpora, "value [low, high]"."""
        import pandas as pd

        rows: dict[str, dict[str, str]] = {}
        for (condition, corpus, metric), measure in self.measures.items():
            if metric in metrics:
                low, high = measure.interval()
                rows.setdefault(condition, {})[f"{corpus} {metric}"] = f"{measure.value:.3f} [{low:.3f}, {high:.3f}]"
        return pd.DataFrame.from_dict(rows, orient="index").fillna("")

    def __add__(self, other: "Report") -> "Report":
        """Join two reports on the same texts; what both measured is taken from the right one.

        Raises:
            LensUnlearnError: If their unedited model has other values, so that differences would mean nothing.
        """
        for key, measure in self.measures.items():
            twin = other.measures.get(key)
            if key[0] == BASE and twin is not None and not np.array_equal(measure.draws, twin.draws, equal_nan=True):
                raise LensUnlearnError(
                    f"the reports measured {key[1]} on other texts or resamples: evaluate them together"
                )
        return Report(
            {**self.measures, **other.measures},
            {**self.provenance, **other.provenance},
            {**self.figures, **other.figures},
            [*self.samples, *other.samples],
            self.title or other.title,
            (*self.parts, *other.parts),
            {**self.values, **other.values},
        )

    def __repr__(self) -> str:
        return f"Report({len(self.conditions)} conditions, {len(self.corpora)} corpora)\n{self.table().to_string()}"

    def _repr_html_(self) -> str:
        settings = html.escape(json.dumps(self.provenance, default=str)[:400])
        table = self.table()
        table.index, table.columns = table.index.map(_cut), table.columns.map(_cut)
        return f"<div>{table.to_html()}<p><small>{settings}</small></p></div>"


def _harmless(name: object) -> str:
    line = " ".join(str(name).replace("\0", " ").splitlines())
    return f"'{line}" if line.lstrip(BLANK)[:1] in FORMULA else line


def _cut(name: object) -> str:
    text = str(name)
    return text if len(text) <= 80 else f"{text[:79]}…"


@dataclass(frozen=True)
class Separability:
    """How far a sweep parts two skills."""

    gap: float
    """The largest (forget drop - retain drop) along the sweep, as fractions of the base."""
    at: str
    """The condition where it is reached."""
    gap_low: float
    gap_high: float
    area: float
    """Area under retain against forget performance, over that of a straight line: 1 no separation, 2 perfect."""

    def __repr__(self) -> str:
        gap = f"{self.gap:.1%} [{self.gap_low:.1%}, {self.gap_high:.1%}]"
        return f"Separability(forget lost less retain lost: {gap} at {self.at}; area {self.area:.2f})"


def separability(
    report: Report,
    *,
    forget: str = "forget",
    retain: str = "retain",
    metric: str = "top1",
    conditions: Sequence[str] = (),
) -> Separability:
    """Summarize a sweep, ordered from weak to strong.

    With points (x_i, y_i) = (forget, retain) performance, i = 0 the base, and the origin appended:
    area = integral of y dx by the trapezoid rule, over x_0 y_0 / 2.

    Differs from the released Selective Pruning code, whose axes follow the alphabetical order of the corpora's names.

    Args:
        report: What `sweep` returned.
        forget: The corpus on the x axis.
        retain: The corpus on the y axis.
        metric: A metric that falls as a skill is lost.
        conditions: The points of the sweep, weak to strong; default: all but the base, in order.

    Raises:
        LensUnlearnError: If there is no point, or the base was not measured.
    """
    path = list(conditions) or [name for name in report.conditions if name != BASE]
    if not path:
        raise LensUnlearnError("this report has no condition besides the base: sweep over strengths first")
    gaps = {name: report.selectivity(name, forget, retain, metric) for name in path}
    best = max(gaps, key=lambda name: gaps[name].value)
    points = [(report[name, forget, metric].value, report[name, retain, metric].value) for name in [BASE, *path]]
    x, y = (np.array(column + (0.0,)) for column in zip(*points, strict=True))
    area = float(np.sum((x[:-1] - x[1:]) * (y[:-1] + y[1:]) / 2))
    low, high = gaps[best].interval()
    triangle = 0.5 * float(x[0] * y[0])
    return Separability(gaps[best].value, best, low, high, area / triangle if triangle else float("nan"))


def provenance_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Add versions to the settings of a run."""
    return {**settings, "versions": versions()}
