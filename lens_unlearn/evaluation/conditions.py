"""What figures and the page read out of a report: condition names, drops with their intervals, and words."""

import math
from dataclasses import dataclass
from typing import Any

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.metrics import metric as metric_of
from lens_unlearn.evaluation.report import BASE, Report, ends

__all__ = ["BASE", "Condition", "Estimate", "conditions_of", "require_falling"]

SUFFIX = ":control"


@dataclass(frozen=True)
class Condition:
    """A condition's name, taken apart: ``method``, ``method:control``, ``method@0.05``, ``method:control@0.05``."""

    name: str
    method: str
    control: bool
    strength: float | None

    @classmethod
    def parse(cls, name: str) -> "Condition":
        """Read a name; what is not written as a sweep writes it is a method of that name."""
        family, strength = name, None
        head, at, tail = name.rpartition("@")
        if at and head:
            try:
                number = float(tail)
            except ValueError:
                number = math.nan
            if math.isfinite(number):
                family, strength = head, number
        control = family.endswith(SUFFIX) and family != SUFFIX
        return cls(name, family.removesuffix(SUFFIX) if control else family, control, strength)

    @property
    def counterpart(self) -> str:
        """The name of this method's control, at the same strength."""
        return f"{self.method}{SUFFIX}{self.name[len(self.method) :]}"


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval, which is NaN where none could be drawn."""

    value: float
    low: float
    high: float
    units: int = 0
    """Resampled units behind it; 0 where that is not known."""

    @classmethod
    def of(cls, measure: Any) -> "Estimate":
        """Read a report's measure."""
        low, high = measure.interval()
        return cls(float(measure.value), low, high, measure.units)

    @property
    def arms(self) -> tuple[float, float]:
        """The lengths of the error bar, up and down; 0 where there is no interval."""
        up, down = self.high - self.value, self.value - self.low
        return (max(up, 0.0) if math.isfinite(up) else 0.0), (max(down, 0.0) if math.isfinite(down) else 0.0)

    def percent(self) -> str:
        """Write it as ``63.2% [60.1, 66.0]``."""
        if math.isnan(self.value):
            return "not defined"
        known = f"{tenths(self.low)}, {tenths(self.high)}" if math.isfinite(self.low) else self.ends("")
        return f"{tenths(self.value)}% [{known}]"

    @property
    def gain(self) -> "Estimate | None":
        """What was gained, where less than nothing was lost, by the digits that are written; None elsewhere."""
        return Estimate(-self.value, -self.high, -self.low, self.units) if round(100 * self.value, 1) < 0 else None

    def ends(self, form: str) -> str:
        """Write both ends in a number format, or why there are none."""
        return ends(self.low, self.high, self.units, form)


def tenths(share: float) -> str:
    """Write a share in percent with one decimal, a true minus, and no minus before a zero."""
    return f"{round(100 * share, 1) + 0.0:.1f}".replace("-", "−")


def conditions_of(report: Report) -> list[Condition]:
    """Return the conditions besides the base, in order."""
    return [Condition.parse(name) for name in report.conditions if name != BASE]


def families(conditions: list[Condition]) -> list[str]:
    """Return the methods, in order of their first appearance."""
    return list(dict.fromkeys(condition.method for condition in conditions))


def has(report: Report, condition: str, corpus: str, metric: str) -> bool:
    """Say whether a drop can be computed: both the condition and the base were measured."""
    return (condition, corpus, metric) in report.measures and (BASE, corpus, metric) in report.measures


def require_falling(report: Report, corpora: tuple[str, ...], metric: str, what: str) -> None:
    """Refuse a report in which no share of a metric can be lost.

    Raises:
        LensUnlearnError: If the metric rises, or a corpus or the base is missing.
    """
    if not metric_of(metric).higher_is_better:
        raise LensUnlearnError(f"{what} shows the share of a metric that is lost, and {metric} rises: take 'top1'")
    for corpus in corpora:
        if (BASE, corpus, metric) not in report.measures:
            known = ", ".join(report.corpora) or "none"
            raise LensUnlearnError(
                f"{what}: {metric} of the unedited model ('base') on {corpus!r} was not measured: the report's corpora "
                f"are {known}; name two of them as forget= and retain="
            )
