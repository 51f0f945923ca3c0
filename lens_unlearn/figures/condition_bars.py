"""`condition_bars`: a metric under every condition, on every corpus.

Knows the measures of a report and how conditions are named; knows nothing of how a metric is computed.
"""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.conditions import BASE, Condition, Estimate
from lens_unlearn.evaluation.metrics import metric as metric_of
from lens_unlearn.evaluation.metrics import words
from lens_unlearn.evaluation.report import Report
from lens_unlearn.figures import theme

__all__ = ["condition_bars"]

ROW = 18


def condition_bars(
    report: Report,
    metric: str = "top1",
    *,
    conditions: Sequence[str] | None = None,
    forget: str = "forget",
    retain: str = "retain",
    title: str | None = None,
) -> go.Figure:
    """Draw a metric as bars: a group per condition, a bar per corpus, with 95% intervals; controls are hatched.

    Args:
        report: What `evaluate` returned.
        metric: Any metric of the report.
        conditions: The ones to draw, top to bottom; default: all.
        forget: The corpus drawn in the warm colour.
        retain: The corpus drawn in the cool colour.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If the metric, or a condition, was not measured.
    """
    measured = {(c, n): m for (c, n, which), m in report.measures.items() if which == metric}
    names = _names(report, metric, measured, conditions)
    corpora = [name for name in report.corpora if any(corpus == name for _, corpus in measured)]
    colours = theme.corpus_colours(corpora, forget, retain)
    fig = go.Figure()
    for corpus in corpora:
        rows = [
            (i, name, Estimate.of(measured[name, corpus])) for i, name in enumerate(names) if (name, corpus) in measured
        ]
        _bars(fig, corpus, colours[corpus], rows, {name: measured[name, corpus].n for _, name, _ in rows})
        if BASE in names and (BASE, corpus) in measured:
            line = {"color": colours[corpus], "dash": "dot", "width": 1}
            fig.add_vline(x=measured[BASE, corpus].value, line=line)
    places = list(range(len(names)))
    ticks = [theme.two_lines(name) for name in names]
    fig.update_yaxes(tickvals=places, ticktext=ticks, range=[len(names) - 0.45, -0.55], showgrid=False, zeroline=False)
    share = metric_of(metric).is_fraction
    fig.update_xaxes(
        title_text=theme.plain(words(metric), 80),
        tickformat="~%" if share else None,
        rangemode="tozero",
        nticks=7,
        tickangle=0,
    )
    fig.update_layout(barmode="group", bargap=0.25, bargroupgap=0.05)
    note = "bars: 95% intervals over documents; dotted: unedited model"
    controls = "; hatched: random control" if any(Condition.parse(name).control for name in names) else ""
    return theme.finish(
        fig,
        title or f"{words(metric)[0].upper()}{words(metric)[1:]}, by condition",
        note + controls,
        about=theme.subtitle_of(report, tuple(corpora)),
        height=max(120, len(names) * (ROW * len(corpora) + 12)) + 70,
        provenance=theme.origin(report),
        name="condition_bars",
    )


def _names(
    report: Report, metric: str, measured: dict[tuple[str, str], Any], conditions: Sequence[str] | None
) -> list[str]:
    """Return the conditions to draw, having checked that they were measured."""
    names = [name for name in report.conditions if any(c == name for c, _ in measured)]
    if conditions is not None:
        missing = [name for name in conditions if name not in names]
        if missing:
            raise LensUnlearnError(
                f"condition_bars: {metric} of {missing[0]!r} was not measured: there is {_list(names)}"
            )
        names = list(conditions)
    if not names:
        known = _list(list(dict.fromkeys(which for _, _, which in report.measures)))
        raise LensUnlearnError(f"condition_bars: no {metric!r} was measured: the report has {known}")
    return names


def _list(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "nothing"


def _bars(
    fig: go.Figure, corpus: str, colour: str, rows: list[tuple[int, str, Estimate]], sizes: dict[str, int]
) -> None:
    control = [Condition.parse(name).control for _, name, _ in rows]
    fig.add_bar(
        x=[estimate.value for _, _, estimate in rows],
        y=[place for place, _, _ in rows],
        orientation="h",
        name=theme.plain(corpus),
        marker={
            "color": [theme.CONTROL if is_control else colour for is_control in control],
            "line": {"color": colour, "width": 1.5},
            "pattern": {
                "shape": ["/" if is_control else "" for is_control in control],
                "fgcolor": colour,
                "fillmode": "replace",
                "size": 6,
                "solidity": 0.35,
            },
        },
        error_x={
            "type": "data",
            "array": [estimate.arms[0] for _, _, estimate in rows],
            "arrayminus": [estimate.arms[1] for _, _, estimate in rows],
            "color": theme.TEXT,
            "thickness": 1.3,
            "width": 3,
        },
        hovertext=[
            f"<b>{theme.plain(name)}</b> on {theme.plain(corpus)}<br>{e.value:.4g} [{e.ends('.4g')}]"
            f"<br>over {sizes[name]:,} tokens or answers"
            for _, name, e in rows
        ],
        hovertemplate="%{hovertext}<extra></extra>",
    )
