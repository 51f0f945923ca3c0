"""`recoverability`: what an attack finds of each condition layer by layer, or step by step, with bands.

Knows the curves of what `lu.audit` returns; asks no model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lens_unlearn.audit.attack import REFERENCE
from lens_unlearn.audit.audit import Audit
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.conditions import BASE, Condition
from lens_unlearn.evaluation.report import Measure
from lens_unlearn.figures import theme
from lens_unlearn.figures.audit import require_audit

__all__ = ["recoverability"]


def recoverability(
    found: Audit,
    attack: str = "depth",
    *,
    metric: str | None = None,
    conditions: Sequence[str] = (),
    title: str | None = None,
) -> go.Figure:
    """Draw a curve of one attack, a line per condition: layer 0 is at the bottom, and a condition's control is grey.

    Where a condition's line is by the base's, the layer still holds the facts; where it is by that of the model that never saw
    them, they are gone. Bands are 95 % intervals over facts, or the groups they were read with.

    Args:
        found: What `lu.audit` returned.
        attack: Which attack.
        metric: Which of its curves; default the first.
        conditions: Which conditions; default all.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If it is no audit, or the attack was not made, or has no such curve.
    """
    require_audit(found, "recoverability")
    made = {one.name: one for one in found.attacks}
    if attack not in made:
        raise LensUnlearnError(f"recoverability: the attack {attack!r} was not made: choose from {', '.join(made)}")
    record = made[attack]
    if not record.curves or (metric is not None and metric not in record.curves):
        raise LensUnlearnError(
            f"recoverability: {attack} has no curve {metric or ''}: {', '.join(record.curves) or 'it has none at all'}"
        )
    metric = metric or next(iter(record.curves))
    shown = [name for name in (conditions or found.conditions) if found.curve(name, attack, metric)]
    if not shown:
        raise LensUnlearnError(
            f"recoverability: {attack} measured no {metric} of {', '.join(conditions) or 'anything'}"
        )
    fig = go.Figure()
    methods = list(dict.fromkeys(Condition.parse(name).method for name in shown if name not in (BASE, REFERENCE)))
    for name in sorted(shown, key=lambda one: not Condition.parse(one).control):  # conditions lie above controls
        points = found.curve(name, attack, metric)
        _line(fig, name, points, _style(name, methods), record.over)
    words = record.curves[metric]
    if record.over == "layer":
        layers = sorted({int(place) for name in shown for place in found.curve(name, attack, metric)})
        fig.update_yaxes(title_text="layer", **theme.layer_ticks(layers))
        fig.update_xaxes(title_text=words)
        height = theme.layer_height(layers) + 120
    else:
        steps = sorted({int(place) for name in shown for place in found.curve(name, attack, metric)})
        fig.update_xaxes(
            title_text=record.over, tickvals=[math.log1p(step) for step in steps], ticktext=list(map(str, steps))
        )
        fig.update_yaxes(title_text=words)
        height = 420
    reference = "" if found.has_reference else "no reference; "
    dotted = "; dotted: random control" if any(Condition.parse(name).control for name in shown) else ""
    head = f"{record.words[:1].upper()}{record.words[1:]}"
    return theme.finish(
        fig,
        title or f"Is it gone? {head}, {'layer by layer' if record.over == 'layer' else 'step by step'}",
        f"{record.asks} {reference}bands: 95% intervals over facts{dotted}",
        about=theme.about_audit(found.provenance),
        height=height,
        provenance={key: found.provenance[key] for key in ("model", "facts", "reference") if key in found.provenance},
        name="recoverability",
    )


def _style(name: str, methods: list[str]) -> tuple[str, str, str]:
    """Return colour, symbol and dash of a condition."""
    if name == BASE:
        return theme.MEASURES[0], "circle", "solid"
    if name == REFERENCE:
        return theme.CONTROL, "circle-open", "dash"
    parsed = Condition.parse(name)
    index = methods.index(parsed.method)
    symbol = theme.SYMBOLS[(index + 1) % len(theme.SYMBOLS)]
    if parsed.control:
        return theme.CONTROL, f"{symbol}-open", "dot"
    return theme.METHODS[index % len(theme.METHODS)], symbol, "solid"


def _line(fig: go.Figure, name: str, points: Mapping[str, Measure], style: tuple[str, str, str], over: str) -> None:
    colour, symbol, dash = style
    layered = over == "layer"
    along = [float(place) if layered else math.log1p(float(place)) for place in points]
    values = [point.value for point in points.values()]
    bounds = np.array([point.interval() for point in points.values()])

    def placed(along: list[float], across: list[float]) -> dict[str, Any]:
        return {"x": across, "y": along} if layered else {"x": along, "y": across}

    label = theme.plain(name)
    if bool(np.isfinite(bounds).all()) and len(along) > 1:
        edges = placed(along + along[::-1], [*bounds[:, 1].tolist(), *bounds[::-1, 0].tolist()])
        look = {"fill": "toself", "fillcolor": theme.with_alpha(colour, 0.12), "mode": "none", "hoverinfo": "skip"}
        fig.add_scatter(**edges, **look, showlegend=False, name=label, legendgroup=label)
    hover = [
        f"<b>{label}</b><br>{over} {place}<br>{point.value:.3f} [{point.ends('.3f')}]"
        for place, point in points.items()
    ]
    fig.add_scatter(
        **placed(along, values),
        mode="lines+markers",
        line={"color": colour, "width": 2, "dash": dash},
        marker={"size": 7, "symbol": symbol},
        name=label,
        legendgroup=label,
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
    )
