"""`forgetting_matrix`: the effect of forgetting each skill on every skill, one panel per method.

Knows which part of a comparison's report forgets which skill; runs no comparison.
"""

import math
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.conditions import BASE, SUFFIX, Estimate, conditions_of, families
from lens_unlearn.evaluation.metrics import metric as metric_of
from lens_unlearn.evaluation.metrics import words
from lens_unlearn.evaluation.report import Report
from lens_unlearn.figures import theme

__all__ = ["forgetting_matrix", "reports_by_skill"]

CELL = 34
MAX_WRITTEN = 10
"""Skills at which every cell can still hold a number."""


def reports_by_skill(report: Report, figure: str) -> dict[str, Report]:
    """Return the reports of a comparison, by the skill that each forgets.

    Raises:
        LensUnlearnError: If the report is of no comparison; the message names the figure.
    """
    parts = {str(part.provenance["forgotten"]): part for part in report.parts if "forgotten" in part.provenance}
    if not parts:
        raise LensUnlearnError(
            f"{figure} draws what lu.compare returns, and this report forgets one skill only: compare some"
        )
    return parts


def forgetting_matrix(
    report: Report, *, metric: str = "top1", controls: bool = True, title: str | None = None
) -> go.Figure:
    """Draw the change of every skill (columns) where each skill was forgotten (rows), one panel per method.

    Of a metric that falls as a skill is lost, the share of the unedited model's value that was lost; of loss, perplexity and
    divergence, the difference to it. Red is a loss of skill and blue a gain. A method that forgets one skill and leaves the
    others alone is red on the diagonal and white elsewhere.

    Args:
        report: What `compare` returned.
        metric: Any metric of the report.
        controls: Whether each method's random control stands beside it.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If the report is of no comparison, or the metric was not measured.
    """
    parts = reports_by_skill(report, "forgetting_matrix")
    skills = list(parts)
    if not any(name == metric for part in parts.values() for _, _, name in part.measures):
        known = ", ".join(next(iter(parts.values())).metrics)
        raise LensUnlearnError(f"forgetting_matrix: no {metric!r} was measured: the report has {known}")
    methods = families([c for part in parts.values() for c in conditions_of(part)])
    shown = [name for method in methods for name in ((method, method + SUFFIX) if controls else (method,))]
    columns = 2 if controls else min(3, len(shown))
    rows = -(-len(shown) // columns)
    height = CELL * len(skills) + 58
    fig = make_subplots(
        rows, columns, shared_yaxes=True, vertical_spacing=58 / (rows * height) if rows > 1 else 0,
        horizontal_spacing=0.03, subplot_titles=[_heading(name) for name in shown],
    )  # fmt: skip
    limit = 0.0
    for place, condition in enumerate(shown):
        at = {"row": place // columns + 1, "col": place % columns + 1}
        cells = [
            [_change(part, skill, condition, measured, metric) for measured in skills] for skill, part in parts.items()
        ]
        _panel(fig, cells, skills, condition, metric, at)
        limit = max([limit, *(abs(cell.value) for row in cells for cell in row if math.isfinite(cell.value))])
    falls = metric_of(metric).higher_is_better
    limit = limit or 0.05
    bar = {"title": "share<br>lost" if falls else f"change<br>of {metric}", "thickness": 14}
    bar |= {"tickformat": "~%"} if falls else {}
    scale = {"colorscale": theme.SIGNED, "cmin": -limit, "cmax": limit, "colorbar": bar}
    fig.update_layout(coloraxis=scale, showlegend=False)
    ticks = {"tickvals": list(range(len(skills))), "ticktext": [theme.plain(name, 16) for name in skills]}
    fig.update_xaxes(**ticks, showgrid=False, zeroline=False, tickangle=0 if len(skills) <= 5 else 45)
    fig.update_yaxes(**ticks, showgrid=False, zeroline=False, autorange="reversed")
    fig.update_yaxes(title_text="forgotten", col=1)
    fig.update_xaxes(title_text="measured", row=rows)
    quantity = f"share of {words(metric)} lost" if falls else f"change of {words(metric)}"
    note = (
        "red: lost, blue: gained" if falls else "red: rises, blue: falls"
    ) + "; on the diagonal the forgotten skills, off it the cost to the others"
    return theme.finish(
        fig,
        title or f"Effect of forgetting each skill on every skill: {quantity}",
        note,
        about=f"model {report.provenance['model']}" if report.provenance.get("model") else "",
        height=rows * height + 30,
        columns=columns,
        facets=True,
        provenance=theme.origin(report),
        name="forgetting_matrix",
    )


def _heading(condition: str) -> str:
    return "random control" if condition.endswith(SUFFIX) else f"<b>{theme.plain(condition, 30)}</b>"


def _change(part: Report, forgotten: str, condition: str, measured: str, metric: str) -> Estimate:
    """Return the share that was lost, or the difference; NaN where it was not measured."""
    corpus = "forget" if measured == forgotten else measured
    edited, base = part.measures.get((condition, corpus, metric)), part.measures.get((BASE, corpus, metric))
    if edited is None or (base is None and metric != "kl"):
        return Estimate(math.nan, math.nan, math.nan)
    if metric_of(metric).higher_is_better:
        return Estimate.of(part.drop(condition, corpus, metric))
    return Estimate.of(edited if base is None else edited.minus(base))


def _panel(
    fig: go.Figure,
    cells: list[list[Estimate]],
    skills: list[str],
    condition: str,
    metric: str,
    at: dict[str, Any],
) -> None:
    hover = [
        [_hover(cell, condition, forgotten, measured, metric) for measured, cell in zip(skills, row, strict=True)]
        for forgotten, row in zip(skills, cells, strict=True)
    ]
    number = "%{z:.0%}" if metric_of(metric).higher_is_better else "%{z:.2f}"
    fig.add_heatmap(
        z=[[cell.value for cell in row] for row in cells],
        x=list(range(len(skills))),
        y=list(range(len(skills))),
        text=hover,
        coloraxis="coloraxis",
        texttemplate=number if len(skills) <= MAX_WRITTEN else None,
        hovertemplate="%{text}<extra></extra>",
        hoverongaps=False,
        name=theme.plain(condition),
        xgap=2,
        ygap=2,
        **at,
    )


def _hover(cell: Estimate, condition: str, forgotten: str, measured: str, metric: str) -> str:
    rising = f"{metric} {cell.value:+.3f} [{cell.ends('.3f')}]"
    change = rising if not metric_of(metric).higher_is_better else f"{words(metric)}: {cell.percent()} lost"
    method = theme.plain(condition.removesuffix(SUFFIX)) + (", random control" if condition.endswith(SUFFIX) else "")
    return f"<b>{theme.plain(forgotten)} forgotten by {method}</b><br>measured on {theme.plain(measured)}<br>{change}"
