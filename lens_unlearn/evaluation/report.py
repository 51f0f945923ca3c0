"""`Report`: a tidy table of what was measured, with bootstrap intervals, and where it came from."""

import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from lens_unlearn.core.allocator import allocator
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.core.intervals import FEWEST, after_choice, interval
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.model.host import versions

__all__ = ["Measure", "Report", "Separability", "chosen_among", "ends", "mean_of", "separability"]

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
    """Bootstrap draws of the value, over units; the same resamples for every condition and corpus, so differences are paired."""
    n: int
    """Tokens (or answers) behind it."""
    units: int = 0
    """Units that were resampled: documents, questions, or the groups they were read with; 0 where that is not known."""
    replicates: int = 1
    """Interventions that it is the mean over, such as random controls with different seeds."""
    spread: np.ndarray | None = None
    """What the choice of these interventions adds to each draw; None for nothing."""
    seen: np.ndarray | None = None
    """The draws without what units that were not seen may add, where it is added."""
    stated: tuple[float, float] | None = None
    """Its interval, where that is known without the draws, as from the table of an earlier version."""

    @property
    def few(self) -> bool:
        """Whether it rests on too few units for an interval."""
        return 0 < self.units < FEWEST

    def interval(self) -> tuple[float, float]:
        """Return the bootstrap 95 % interval; NaN where there are too few units."""
        if self.stated is not None:
            return self.stated
        return interval(self.draws[:0] if self.few else self.draws)

    def ends(self, form: str) -> str:
        """Write both ends of the interval in a number format, or why there is none."""
        return ends(*self.interval(), self.units, form)

    def minus(self, other: "Measure") -> "Measure":
        """Return the difference to another measure, paired draw by draw; without draws if either has none."""
        paired = self.draws.size == other.draws.size
        known = [one.units for one in (self, other) if one.units]
        with np.errstate(invalid="ignore"):  # shares of nothing are infinite
            draws = self.draws - other.draws if paired else np.empty(0)
            spread = _minus(self.spread, other.spread) if paired else None
        return Measure(
            self.value - other.value,
            draws,
            min(self.n, other.n),
            min(known, default=0),
            max(self.replicates, other.replicates),
            spread,
        )

    def beside_another(self) -> "Measure":
        """Return draws for one more intervention of the same kind in place of the mean over those that there are.

        The mean over S interventions errs by sd / sqrt(S), one more intervention is sqrt(1 + 1 / S) sd away from it.
        """
        if self.spread is None:
            return self
        more = (math.sqrt(self.replicates + 1) - 1) * self.spread
        return replace(self, draws=self.draws + more, spread=self.spread + more)

    def __repr__(self) -> str:
        return f"Measure({self.value:.3f} [{self.ends('.3f')}], n={self.n:,})"


def _minus(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
    if one is None or other is None:
        return one if other is None else -other
    return one - other


def mean_of(measures: Sequence[Measure]) -> Measure:
    """Return the mean of several measures, paired draw by draw; without draws if any has none."""
    paired = len({one.draws.size for one in measures}) == 1
    spreads = [one.spread for one in measures if one.spread is not None]
    return Measure(
        float(np.mean([one.value for one in measures])),
        np.mean([one.draws for one in measures], axis=0) if paired else np.empty(0),
        sum(one.n for one in measures),
        min((one.units for one in measures if one.units), default=0),
        max(one.replicates for one in measures),
        np.sum(spreads, axis=0) / len(measures) if spreads and paired else None,
    )


def ends(low: float, high: float, units: int, form: str) -> str:
    """Write both ends of an interval in a number format, or why there is none."""
    if 0 < units < FEWEST:
        return f"too few documents for an interval ({units})"
    return "no interval" if math.isnan(low) else f"{low:{form}}, {high:{form}}"


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
    interventions: dict[str, Intervention] = field(default_factory=dict)
    """What each method of a run found, by condition."""

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
            return replace(edited, value=float("nan"), draws=np.full(1, np.nan), spread=None, seen=None, stated=None)
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = 1 - edited.draws / base.draws
            spread = None if edited.spread is None else -edited.spread / base.draws
            seen = None if edited.seen is None else 1 - edited.seen / base.draws
        value = 1 - edited.value / base.value
        return replace(edited, value=value, draws=draws, spread=spread, seen=seen, stated=None)

    def selectivity(
        self, condition: str, forget: str = "forget", retain: str = "retain", metric: str = "top1"
    ) -> Measure:
        """Return the drop on the forget corpus minus the drop on the retain corpus, as fractions of the base."""
        return self.drop(condition, forget, metric).minus(self.drop(condition, retain, metric))

    def to_frame(self) -> pd.DataFrame:
        """Give one row per condition, corpus and metric; the difference to the base is paired over documents."""
        import pandas as pd

        rows = []
        for (condition, corpus, metric), measure in self.measures.items():
            low, high = measure.interval()
            row = [condition, corpus, metric, measure.value, low, high, measure.n]
            base = self.measures.get((BASE, corpus, metric))
            if base is None or condition == BASE:
                rows.append([*row, float("nan"), float("nan"), float("nan"), measure.units])
            else:
                difference = measure.minus(base)
                rows.append([*row, difference.value, *difference.interval(), measure.units])
        extra = ["difference", "difference_low", "difference_high", "units"]
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
            frame[column] = [harmless(name) for name in frame[column]]
        return frame.to_csv(index=False)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page that opens offline: the figures, the table, and the settings."""
        from lens_unlearn.core.artefacts import replace_file
        from lens_unlearn.reports.report_page import page

        replace_file(path, page(self).encode(errors="backslashreplace"))  # a text may hold half a surrogate pair

    def table(self, metrics: Sequence[str] = ("top1", "loss")) -> pd.DataFrame:
        """Give a small table for reading: conditions by corpora, "value [low, high]".

        A corpus with none of these metrics (a task of the evaluation harness, say) is shown with all that it has.
        """
        import pandas as pd

        shown = {corpus for _, corpus, metric in self.measures if metric in metrics}
        rows: dict[str, dict[str, str]] = {}
        for (condition, corpus, metric), measure in self.measures.items():
            if metric in metrics or corpus not in shown:
                rows.setdefault(condition, {})[f"{corpus} {metric}"] = f"{measure.value:.3f} [{measure.ends('.3f')}]"
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
            {**self.interventions, **other.interventions},
        )

    def __repr__(self) -> str:
        return f"Report({len(self.conditions)} conditions, {len(self.corpora)} corpora)\n{self.table().to_string()}"

    def _repr_html_(self) -> str:
        settings = html.escape(json.dumps(self.provenance, default=str)[:400])
        table = self.table()
        table.index, table.columns = table.index.map(_cut), table.columns.map(_cut)
        return f"<div>{table.to_html()}<p><small>{settings}</small></p></div>"


def harmless(name: object) -> str:
    line = " ".join(str(name).replace("\0", " ").splitlines())
    return f"'{line}" if line.lstrip(BLANK)[:1] in FORMULA else line


def _cut(name: object) -> str:
    text = str(name)
    return text if len(text) <= 80 else f"{text[:79]}…"


@dataclass(frozen=True)
class Separability:
    """How far a sweep parts two skills."""

    gap: float
    """(forget drop - retain drop) where it is largest along the sweep, as fractions of the base; corrected for the choice."""
    at: str
    """The condition where it is reached."""
    gap_low: float
    gap_high: float
    area: float
    """Area under retain against forget performance, over that of a straight line: 1 no separation, 2 perfect."""
    units: int = 0
    """Documents, or groups, on the smaller side; 0 where that is not known."""

    def __repr__(self) -> str:
        gap = f"{self.gap:.1%} [{ends(self.gap_low, self.gap_high, self.units, '.1%')}]"
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

    The largest of several noisy gaps is too large on average: estimate and interval of the gap are conditional on the choice, see
    `lens_unlearn.core.intervals.after_choice`. With fewer than ten documents on a side there is no interval, and the gap is as
    measured.

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
    gap, low, high = chosen_among(best, gaps, gaps)
    triangle = 0.5 * float(x[0] * y[0])
    return Separability(gap, best, low, high, area / triangle if triangle else float("nan"), gaps[best].units)


def chosen_among(best: str, by: Mapping[str, Measure], measured: Mapping[str, Measure]) -> tuple[float, float, float]:
    """Return estimate and interval of what was measured at the condition with the largest value of `by`; see `after_choice`."""
    names = list(by)
    sizes = {one.draws.size for one in (*by.values(), *measured.values())}
    if any(one.few for one in measured.values()) or len(sizes) > 1:
        return (measured[best].value, *measured[best].interval())
    values, draws = zip(
        *((np.array([m[n].value for n in names]), np.stack([m[n].draws for n in names])) for m in (by, measured))
    )
    return after_choice(names.index(best), values[0], draws[0], values[1], draws[1])


def provenance_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Add versions to the settings of a run."""
    return {**settings, "versions": versions(), "allocator": allocator()}
