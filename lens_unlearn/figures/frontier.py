"""`frontier`: how much each method forgets within the budget, against the cost to all other skills, skill by skill.

Knows the reports of a comparison and its retain budget; runs no comparison.
"""

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_unlearn.evaluation.conditions import Condition, Estimate, conditions_of, families, has, require_falling
from lens_unlearn.evaluation.metrics import words
from lens_unlearn.evaluation.report import Report
from lens_unlearn.figures import theme
from lens_unlearn.figures.forgetting_matrix import reports_by_skill

__all__ = ["frontier"]

COLUMNS = 3
PANEL = 250
ALL = "mean over the skills"


def frontier(report: Report, *, metric: str = "top1", title: str | None = None) -> go.Figure:
    """Draw the share lost of the forgotten skill against the share lost of all others, for every method and its control.

    One panel per forgotten skill, after one for their mean, all on the same axes. Bars are 95% intervals, controls are grey, and
    the dashed line is the budget that the methods were tuned to on other documents. On the dotted diagonal nothing
    was removed selectively.

    Args:
        report: What `compare` returned.
        metric: A metric that falls as a skill is lost.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If the report is of no comparison, or the metric rises or was not measured.
    """
    by_skill = reports_by_skill(report, "frontier")
    for part in (report, *by_skill.values()):
        require_falling(part, ("forget", "retain"), metric, "frontier")
    panels = {ALL: report, **by_skill}
    columns = _columns(len(panels))
    rows = -(-len(panels) // columns)
    height = PANEL + 75
    fig = make_subplots(
        rows, columns, horizontal_spacing=0.04,
        vertical_spacing=75 / (rows * height) if rows > 1 else 0,
        specs=[[{} if n < len(panels) else None for n in range(row, row + columns)] for row in range(0, rows * columns, columns)],
        subplot_titles=[f"<b>{ALL}</b>", *(f"{theme.plain(name, 30)} forgotten" for name in by_skill)],
    )  # fmt: skip
    methods = families([c for part in panels.values() for c in conditions_of(part)])
    for place, (skill, part) in enumerate(panels.items()):
        at = {"row": place // columns + 1, "col": place % columns + 1}
        drawn = [_Point(part, c, metric) for c in conditions_of(part) if has(part, c.name, "forget", metric)]
        _panel(fig, drawn, methods, skill, at)
    _lines(fig, report)
    fig.update_xaxes(matches="x")
    fig.update_yaxes(matches="y")
    for place in range(len(panels)):
        row, column = place // columns + 1, place % columns + 1
        lowest = place + columns >= len(panels)  # the panel below it is missing, or it stands in the last row
        fig.update_xaxes(
            title_text="share lost of all others" if lowest else None, tickformat="~%", showticklabels=lowest, nticks=6,
            row=row, col=column,
        )  # fmt: skip
        fig.update_yaxes(
            title_text="share lost of the forgotten" if column == 1 else None,
            tickformat="~%",
            showticklabels=column == 1,
            row=row,
            col=column,
        )
    note = "up and to the left is better; grey: random controls; bars: 95% intervals; dotted: both lose the same share"
    budget = report.provenance.get("retain_drop")
    note += f"; dashed: the budget of {budget:.0%}" if isinstance(budget, float) else ""
    return theme.finish(
        fig,
        title or f"Forgetting against its cost to all other skills: {words(metric)}",
        note,
        about=f"model {report.provenance['model']}" if report.provenance.get("model") else "",
        height=rows * height + 30,
        columns=columns,
        facets=True,
        provenance=theme.origin(report),
        name="frontier",
    )


def _columns(panels: int) -> int:
    """Return how many panels stand side by side: about three, in three rows at most, and so that few places stay empty."""
    known = (columns for columns in (2, 3, 4) if columns <= panels)
    return min(known, key=lambda c: (panels > 3 * c, -panels % c, abs(c - COLUMNS)), default=1)


class _Point:
    """One condition, with the shares lost on all other skills (x) and on the forgotten one (y)."""

    def __init__(self, part: Report, condition: Condition, metric: str) -> None:
        self.condition = condition
        self.cost, self.lost = (Estimate.of(part.drop(condition.name, name, metric)) for name in ("retain", "forget"))


def _panel(fig: go.Figure, points: list[_Point], methods: list[str], skill: str, at: dict[str, Any]) -> None:
    for point in sorted(points, key=lambda point: not point.condition.control):  # methods lie above controls
        control, index = point.condition.control, methods.index(point.condition.method)
        colour = theme.CONTROL if control else theme.METHODS[index % len(theme.METHODS)]
        symbol = theme.SYMBOLS[index % len(theme.SYMBOLS)]
        name = theme.plain(point.condition.method) + (": control" if control else "")
        bars = {"color": theme.with_alpha(colour, 0.7), "thickness": 1.4, "width": 3}
        fig.add_scatter(
            x=[point.cost.value],
            y=[point.lost.value],
            mode="markers",
            marker={"color": colour, "symbol": f"{symbol}-open" if control else symbol, "size": 11}
            | {"line": {"width": 2, "color": colour}},
            name=name,
            legendgroup=name,
            legendrank=1000 + 2 * index + control,
            showlegend=theme.is_first(fig, name),
            hovertext=[_hover(point, skill)],
            hovertemplate="%{hovertext}<extra></extra>",
            error_x=_error(point.cost) | bars,
            error_y=_error(point.lost) | bars,
            **at,
        )


def _error(estimate: Estimate) -> dict[str, Any]:
    up, down = estimate.arms
    return {"type": "data", "array": [up], "arrayminus": [down]}


def _hover(point: _Point, skill: str) -> str:
    condition = point.condition
    name = f"<b>{theme.plain(condition.method)}{', random control' if condition.control else ''}</b>"
    forgotten = "the forgotten skills" if skill == ALL else theme.plain(skill)
    return f"{name}<br>lost of {forgotten}: {point.lost.percent()}<br>lost of all others: {point.cost.percent()}"


def _lines(fig: go.Figure, report: Report) -> None:
    """Draw the diagonal and the budget into every panel, as far as the points reach."""
    ends = {axis: [e for t in theme.traces(fig) for e in _reach(t, axis)] for axis in ("x", "y")}
    low = max(min(0.0, *values) for values in ends.values())
    high = min(max(0.05, *values) for values in ends.values())
    diagonal = {"x0": low, "y0": low, "x1": high, "y1": high}
    diagonal |= {"line": {"color": theme.TEXT, "dash": "dot", "width": 1.5}}
    fig.add_shape(type="line", layer="below", row="all", col="all", **diagonal)  # type: ignore[arg-type]
    budget = report.provenance.get("retain_drop")
    if isinstance(budget, float):
        fig.add_vline(x=budget, line={"color": theme.TEXT, "dash": "dash", "width": 1.2}, layer="below")


def _reach(trace: Any, axis: str) -> list[float]:
    """Return the ends of a point's error bars."""
    value, error = getattr(trace, axis)[0], getattr(trace, f"error_{axis}")
    ends = [value - error.arrayminus[0], value + error.array[0]]
    return [float(end) for end in ends if math.isfinite(end)] or [float(np.float64(0))]
