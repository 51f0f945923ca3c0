"""`sweep_curves`: the share of a metric that remains at each strength of a method, beside its control.

Knows the names of conditions that `lu.sweep` gives; sweeps nothing.
"""

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.conditions import Condition, Estimate, conditions_of, families, has, require_falling
from lens_unlearn.evaluation.metrics import words
from lens_unlearn.evaluation.report import Report
from lens_unlearn.figures import theme

__all__ = ["sweep_curves"]

LOG_SPAN = 15
"""Strengths that span more than this factor are drawn on a logarithmic axis."""


def sweep_curves(
    report: Report,
    *,
    forget: str = "forget",
    retain: str = "retain",
    metric: str = "top1",
    others: Sequence[str] = (),
    title: str | None = None,
) -> go.Figure:
    """Draw the share of a metric that remains over the strength of a sweep, a line per corpus, a panel per method.

    Args:
        report: What `sweep` returned: conditions ``method@strength``, and ``method:control@strength`` in grey.
        forget: The corpus drawn in the warm colour.
        retain: The corpus drawn in the cool colour.
        metric: A metric that falls as a skill is lost.
        others: Further corpora to draw.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If there is no sweep in the report, or the metric or a corpus was not measured.
    """
    corpora = (forget, retain, *others)
    require_falling(report, corpora, metric, "sweep_curves")
    steps = sorted((c for c in conditions_of(report) if c.strength is not None), key=lambda c: c.strength or 0.0)
    if not steps:
        raise LensUnlearnError(
            "sweep_curves has nothing to draw: no condition is named method@strength, as sweep names them"
        )
    methods = families([c for c in conditions_of(report) if c.strength is not None])
    colours = theme.corpus_colours(corpora, forget, retain)
    fig = make_subplots(1, len(methods), shared_yaxes=True, column_titles=[theme.plain(m) for m in methods])
    for column, method in enumerate(methods, start=1):
        for control in (True, False):
            for index, corpus in enumerate(corpora):
                run = [
                    c
                    for c in steps
                    if c.method == method and c.control == control and has(report, c.name, corpus, metric)
                ]
                if run:
                    colour = theme.CONTROL if control else colours[corpus]
                    _curve(fig, column, report, run, corpus, metric, colour, index)
    _strength_axis(fig, [c.strength for c in steps if c.strength is not None])
    fig.update_yaxes(tickformat="~%", rangemode="tozero")
    fig.update_yaxes(title_text="share remaining", col=1)
    note = "strength: share of neurons, of false positives, or of an update; bands: 95% intervals over documents; grey: control"
    return theme.finish(
        fig,
        title or f"Remaining {words(metric)}, by strength",
        note,
        about=theme.subtitle_of(report, corpora),
        columns=len(methods),
        facets=True,
        provenance=theme.origin(report),
        name="sweep_curves",
    )


def _strength_axis(fig: go.Figure, strengths: list[float]) -> None:
    if min(strengths) > 0 and max(strengths) > LOG_SPAN * min(strengths):
        # Otherwise the weak end, where methods are used, is a few pixels wide.
        fig.update_xaxes(type="log", **theme.log_ticks(math.log10(min(strengths)), math.log10(max(strengths))))
    fig.update_xaxes(title_text="strength")  # short: panels are narrow on a phone and on paper


def _curve(
    fig: go.Figure,
    column: int,
    report: Report,
    run: list[Condition],
    corpus: str,
    metric: str,
    colour: str,
    index: int,
) -> None:
    drops = [Estimate.of(report.drop(c.name, corpus, metric)) for c in run]
    x = [c.strength for c in run]
    remaining, top, bottom = ([1 - value for value in part] for part in zip(*((d.value, d.low, d.high) for d in drops)))
    control = run[0].control
    name = f"{theme.plain(corpus)}, control" if control else theme.plain(corpus)
    shared = {"legendgroup": name, "row": 1, "col": column}
    if np.isfinite([*top, *bottom]).all() and len(run) > 1:
        band = theme.with_alpha(colour, 0.16)
        edges = {"x": x + x[::-1], "y": top + bottom[::-1], "fill": "toself", "fillcolor": band, "mode": "none"}
        fig.add_scatter(**edges, hoverinfo="skip", showlegend=False, name=name, **shared)
    fig.add_scatter(
        x=x,
        y=remaining,
        mode="lines+markers",
        line={"color": colour, "width": 2, "dash": ("dash", "dot", "dashdot")[index % 3] if control else "solid"},
        marker={"size": 6, "symbol": theme.SYMBOLS[index % len(theme.SYMBOLS)] + ("-open" if control else "")},
        name=name,
        showlegend=theme.is_first(fig, name),
        legendrank=1100 if control else 1000,
        hovertext=[f"<b>{name}</b><br>strength {c.strength:g}<br>lost {d.percent()}" for c, d in zip(run, drops)],
        hovertemplate="%{hovertext}<extra></extra>",
        **shared,
    )
