"""`tradeoff`: the share lost on the forget corpus, against the share lost on the retain corpus.

Knows reports of `lu.evaluate` and `lu.sweep`; measures nothing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.conditions import Condition, Estimate, conditions_of, families, has, require_falling
from lens_unlearn.evaluation.metrics import words
from lens_unlearn.evaluation.report import Report
from lens_unlearn.figures import theme

__all__ = ["tradeoff"]


@dataclass(frozen=True)
class Point:
    """One condition, with the shares lost on the retain corpus (x) and on the forget corpus (y)."""

    condition: Condition
    cost: Estimate
    lost: Estimate

    @property
    def strength(self) -> float:
        """The place of a point on its curve."""
        return self.condition.strength or 0.0


def tradeoff(
    report: Report,
    *,
    forget: str = "forget",
    retain: str = "retain",
    metric: str = "top1",
    title: str | None = None,
) -> go.Figure:
    """Draw the share lost on the forget corpus against the share lost on the retain corpus, one point per condition.

    The points of a sweep (``method@strength``) are joined from the unedited model on, in order of strength; controls
    are grey. On the dotted diagonal both corpora lose the same share, so nothing was removed selectively.

    Args:
        report: What `evaluate` or `sweep` returned.
        forget: The corpus on the y axis.
        retain: The corpus on the x axis.
        metric: A metric that falls as a skill is lost.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If there is no condition, or the metric or a corpus was not measured.
    """
    require_falling(report, (forget, retain), metric, "tradeoff")
    points: list[Point] = []
    for condition in conditions_of(report):
        if has(report, condition.name, forget, metric) and has(report, condition.name, retain, metric):
            drops = [Estimate.of(report.drop(condition.name, corpus, metric)) for corpus in (retain, forget)]
            points.append(Point(condition, *drops))
    if not points:
        raise LensUnlearnError("tradeoff has nothing to draw: evaluate at least one condition besides the base")
    fig = go.Figure()
    _diagonal(fig, points)
    methods = families([point.condition for point in points])
    shown: set[str] = set()
    for index, method in enumerate(methods):
        for control in (True, False):
            family = [p for p in points if p.condition.method == method and p.condition.control == control]
            steps = sorted((p for p in family if p.condition.strength is not None), key=lambda p: p.strength)
            for part in (steps, [p for p in family if p.condition.strength is None]):
                if part:
                    group = f"{'control' if control else 'method'} {theme.plain(method)}"
                    in_legend = None if group in shown else group
                    _points(fig, part, index, (forget, retain), joined=part is steps, group=in_legend)
                    shown.add(group)
    fig.update_xaxes(title_text=f"share lost on {theme.plain(retain)}", tickformat="~%")
    fig.update_yaxes(title_text=f"share lost on {theme.plain(forget)}", tickformat="~%")
    note = "up and to the left is better; on the dotted line both lose the same share; bars: 95% intervals"
    return theme.finish(
        fig,
        title or f"Forgetting against its cost: {words(metric)}",
        note,
        about=theme.subtitle_of(report, (forget, retain)),
        height=440,
        provenance=theme.origin(report),
        name="tradeoff",
    )


def _diagonal(fig: go.Figure, points: list[Point]) -> None:
    ends = [
        [end for e in axis for end in (e.value, e.low, e.high)] for axis in zip(*((p.cost, p.lost) for p in points))
    ]
    (low_x, high_x), (low_y, high_y) = ([np.nanmin([0.0, *axis]), np.nanmax([0.05, *axis])] for axis in ends)
    # Only as far as the points reach on both axes: a longer line would squeeze them together.
    low, high = max(low_x, low_y), min(high_x, high_y)
    fig.add_scatter(
        x=[low, high],
        y=[low, high],
        mode="lines",
        line={"color": theme.TEXT, "dash": "dot", "width": 1.5},
        name="no selectivity",
        legendrank=1200,
        hoverinfo="skip",
    )


def _points(
    fig: go.Figure, points: list[Point], index: int, corpora: tuple[str, str], *, joined: bool, group: str | None
) -> None:
    """Draw one method's, or one control's, points; a sweep starts from the unedited model at the origin.

    The legend shows the first trace of each group.
    """
    control = points[0].condition.control
    colour = theme.CONTROL if control else theme.METHODS[index % len(theme.METHODS)]
    symbol = theme.SYMBOLS[index % len(theme.SYMBOLS)]
    start = [0.0] if joined else []
    bars = {"color": theme.with_alpha(colour, 0.55), "thickness": 1.3, "width": 3}
    fig.add_scatter(
        x=start + [p.cost.value for p in points],
        y=start + [p.lost.value for p in points],
        mode="lines+markers" if joined else "markers",
        line={"color": colour, "width": 2, "dash": "dash" if control else "solid"},
        marker={
            "color": colour,
            "symbol": f"{symbol}-open" if control else symbol,
            "size": [0] * len(start) + [9 if joined else 13] * len(points),
            "line": {"width": 2, "color": colour},
            "opacity": 1,
        },
        name=theme.plain(points[0].condition.method) + (": control" if control else ""),
        legendgroup=group,
        legendrank=1000 + 2 * index + control,
        showlegend=group is not None,
        hovertext=[""] * len(start) + [_hover(p, corpora) for p in points],
        hovertemplate="%{hovertext}<extra></extra>",
        error_x=_error([None] * len(start) + [p.cost for p in points]) | bars,
        error_y=_error([None] * len(start) + [p.lost for p in points]) | bars,
    )


def _error(estimates: list[Estimate | None]) -> dict[str, Any]:
    arms = [(0.0, 0.0) if estimate is None else estimate.arms for estimate in estimates]
    return {"type": "data", "array": [up for up, _ in arms], "arrayminus": [down for _, down in arms]}


def _hover(point: Point, corpora: tuple[str, str]) -> str:
    condition, cost, lost = point.condition, point.cost, point.lost
    kind = f"{theme.plain(condition.method)}{', random control' if condition.control else ''}"
    strength = "" if condition.strength is None else f"<br>strength {condition.strength:g}"
    forget, retain = (theme.plain(corpus) for corpus in corpora)
    return f"<b>{kind}</b>{strength}<br>lost on {forget}: {lost.percent()}<br>lost on {retain}: {cost.percent()}"
