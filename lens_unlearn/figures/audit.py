"""`audit`: which attack brings back how much of what each condition was to forget, as a heat map.

Knows what `lu.audit` returns; asks no model.
"""

import math

import plotly.graph_objects as go

from lens_unlearn.audit.attack import RECOVERED, SCORE
from lens_unlearn.audit.audit import Audit
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.conditions import SUFFIX, Estimate
from lens_unlearn.figures import theme

__all__ = ["audit", "require_audit"]

CELL = 38
COLUMN, NAMES = 64, 220
"""Pixels at which a column's number and name can be read, and of what stands beside the columns."""


def require_audit(found: object, figure: str) -> Audit:
    """Return an audit; refuse anything else, and one without a measure.

    Raises:
        LensUnlearnError: Naming the figure.
    """
    if not isinstance(found, Audit):
        raise LensUnlearnError(f"{figure} draws what lu.audit returns, not a {type(found).__name__}")
    if not found.measures:
        raise LensUnlearnError(f"{figure} has nothing to draw: no attack could be made")
    return found


def audit(found: Audit, *, metric: str | None = None, title: str | None = None) -> go.Figure:
    """Draw conditions (rows) by attacks (columns): how much of the facts each attack finds, or brings back.

    The first column is without any attack. 0 % is what a model that never saw the facts shows, 100 % what the unedited one does: a
    method that removes is dark in every column, one that hides is dark in the first only.

    Args:
        found: What `lu.audit` returned.
        metric: "recovered", or "score": each attack's own number; default the first where there is a reference.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If it is no audit, or nothing in it was measured.
    """
    require_audit(found, "audit")
    metric = metric or (RECOVERED if found.has_reference else SCORE)
    plain = {c: found.kept(c) if metric == RECOVERED else found.answers[c] for c in found.conditions}
    columns = ["no attack", *(attack.words for attack in found.attacks)]
    rows = found.conditions
    cells = [
        [plain[name], *(found.measures.get((name, attack.name, metric)) for attack in found.attacks)] for name in rows
    ]
    share = "~%" if metric == RECOVERED else ".2f"
    written = [[theme.number(one, metric == RECOVERED) for one in row] for row in cells]
    hover = [
        [_hover(name, column, one, metric) for column, one in zip(columns, row, strict=True)]
        for name, row in zip(rows, cells, strict=True)
    ]
    fig = go.Figure()
    fig.add_heatmap(
        z=[[math.nan if one is None else one.value for one in row] for row in cells],
        x=list(range(len(columns))),
        y=list(range(len(rows))),
        text=written,
        texttemplate="%{text}",
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
        hoverongaps=False,
        coloraxis="coloraxis",
        name="audit",
        xgap=2,
        ygap=2,
    )
    bar = {"title": "share<br>recovered" if metric == RECOVERED else "score", "thickness": 14, "tickformat": share}
    high = max([1.0, *(one.value for row in cells for one in row if one is not None and math.isfinite(one.value))])
    fig.update_layout(
        coloraxis={"colorscale": theme.MAGNITUDE, "cmin": 0, "cmax": high, "colorbar": bar}, showlegend=False
    )
    flat = {"showgrid": False, "zeroline": False}
    ticks = {"tickvals": list(range(len(columns))), "ticktext": [name.replace(" ", "<br>", 1) for name in columns]}
    fig.update_xaxes(**ticks, **flat, side="bottom", tickangle=0, title_text="attack")
    names = [theme.two_lines(name, 24) for name in rows]
    fig.update_yaxes(tickvals=list(range(len(rows))), ticktext=names, **flat, autorange="reversed")
    note = (
        "0%: as in a model that never saw the facts; 100%: as in the unedited model; empty: nothing that could be recovered"
        if metric == RECOVERED
        else "each attack's own number; there is no reference" * (not found.has_reference)
    )
    return theme.finish(
        fig,
        title
        or ("Is it gone? What each attack brings back" if metric == RECOVERED else "Is it gone? Every attack's score"),
        note,
        about=theme.about_audit(found.provenance),
        height=CELL * len(rows) + 120,
        width=COLUMN * len(columns) + NAMES,
        provenance={key: found.provenance[key] for key in ("model", "facts", "reference") if key in found.provenance},
        name="audit",
    )


def _hover(condition: str, attack: str, one: object, metric: str) -> str:
    name = theme.plain(condition.removesuffix(SUFFIX)) + (", random control" if condition.endswith(SUFFIX) else "")
    if one is None:
        return f"<b>{name}</b><br>{attack}: nothing that could be recovered"
    estimate = Estimate.of(one)
    value = (
        f"{estimate.percent()} recovered" if metric == RECOVERED else f"{estimate.value:.3f} [{estimate.ends('.3f')}]"
    )
    return f"<b>{name}</b><br>{attack}: {value}"
