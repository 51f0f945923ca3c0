"""`skill_graph`: which skill's removal costs which other beyond chance, as a matrix and as a graph.

Knows what `lu.skill_graph` returns; removes nothing.
"""

import math

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.metrics import words
from lens_unlearn.evaluation.skill_graph import Cost, SkillGraph
from lens_unlearn.figures import theme

__all__ = ["skill_graph"]

CELL = 46
LEAST = 380
"""Pixels of height at which the circle of skills can be read."""
MAX_WRITTEN = 8
"""Skills at which every cell can still hold a number."""
NODE = 0.17
"""Radius of a node, of a circle of radius 1: arrows begin and end there."""
APART = 0.07
"""Half the distance between the arrows of two skills that cost each other something."""
WIDEST, THINNEST = 7.0, 1.5


def skill_graph(graph: SkillGraph, *, title: str | None = None) -> go.Figure:
    """Draw what removing each skill costs every skill beyond chance: a matrix, and beside it the graph of what is certain.

    In the matrix a row is a removed skill and a column a measured one; red is lost beyond chance, blue is spared. An asterisk
    marks a cost whose interval excludes 0, where the intervals of all costs between different skills hold at once. The diagonal,
    what the skill itself loses, has no colour, since it would outshine all others. In the graph an arrow leads from a removed
    skill to one that loses more than by chance, the wider the more.

    Args:
        graph: What `lu.skill_graph` returned.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If it is no skill graph.
    """
    if not isinstance(graph, SkillGraph):
        raise LensUnlearnError(f"skill_graph draws what lu.skill_graph returns, not a {type(graph).__name__}")
    skills = graph.skills
    height = max(CELL * len(skills) + 90, LEAST)
    fig = make_subplots(
        1,
        2,
        column_titles=["removed (rows), measured (columns)", "what costs what, beyond chance"],
        column_widths=[0.5, 0.5],
        horizontal_spacing=0.17,
    )
    limit = _matrix(fig, graph)
    bar = {
        "title": "lost<br>beyond<br>chance",
        "thickness": 14,
        "tickformat": "~%",
        "x": 0.425,
        "len": 0.9,
        "xanchor": "left",
    }
    fig.update_layout(
        coloraxis={"colorscale": theme.SIGNED, "cmin": -limit, "cmax": limit, "colorbar": bar}, showlegend=False
    )
    _circle(fig, graph)
    edges = len(graph.edges)
    found = "no cost beyond chance is certain" if not edges else f"{edges} cost{'s' * (edges > 1)} beyond chance"
    note = (
        f"share of {words(graph.metric)} lost with a skill removed less that with as many random neurons removed; * and arrows: "
        f"the 95% interval excludes 0, for all costs at once; diagonal: the removed skill itself; {found}"
    )
    method = graph.provenance.get("method")
    about = [f"model {theme.short(graph.provenance['model'])}"] if graph.provenance.get("model") else []
    about += [f"{method}, {graph.provenance.get('seeds', '')} random controls"] if method else []
    kept = ("model", "corpora", "method", "seeds", "metric")
    return theme.finish(
        fig,
        title or "Skill graph: what removing each skill costs the others beyond chance",
        note,
        about=" · ".join(about),
        height=height,
        columns=2,
        width=760,
        facets=True,
        provenance={key: graph.provenance[key] for key in kept if key in graph.provenance},
        name="skill_graph",
    )


def _matrix(fig: go.Figure, graph: SkillGraph) -> float:
    """Draw the matrix, and return where its colours end."""
    skills = graph.skills
    rows = [[graph.costs[i, j] for j in skills] for i in skills]
    values = [[math.nan if cost.own else cost.beyond.value for cost in row] for row in rows]
    limit = max((abs(v) for row in values for v in row if math.isfinite(v)), default=0.0) or 0.05
    places = list(range(len(skills)))
    own = [[0.0 if cost.own else math.nan for cost in row] for row in rows]
    grey = theme.with_alpha(theme.CONTROL, 0.12)
    looks = (
        {"name": "cost beyond chance", "z": values, "coloraxis": "coloraxis"},
        {
            "name": "itself",
            "z": own,
            "colorscale": [[0, grey], [1, grey]],
            "showscale": False,
            "textfont_color": theme.TEXT,
        },
    )
    # Each writes its own cells: numbers over numbers cannot be read. What is nearly transparent takes no contrast of its own.
    for diagonal, look in enumerate(looks):
        fig.add_heatmap(
            x=places,
            y=places,
            text=[[_number(cost) if cost.own == bool(diagonal) else "" for cost in row] for row in rows],
            texttemplate="%{text}" if len(skills) <= MAX_WRITTEN else None,
            hovertext=[[_hover(cost, graph.metric) for cost in row] for row in rows],
            hovertemplate="%{hovertext}<extra></extra>",
            hoverongaps=False,
            xgap=2,
            ygap=2,
            row=1,
            col=1,
            **look,
        )
    ticks = {
        "tickvals": places,
        "ticktext": [theme.plain(name, 16) for name in skills],
        "showgrid": False,
        "zeroline": False,
    }
    fig.update_xaxes(**ticks, tickangle=0 if len(skills) <= 3 else 45, row=1, col=1)
    fig.update_yaxes(**ticks, autorange="reversed", row=1, col=1)
    return limit


def _number(cost: Cost) -> str:
    value = cost.beyond.value
    return "" if not math.isfinite(value) else f"{round(100 * value) + 0:d}%".replace("-", "−") + "*" * cost.certain


def _hover(cost: Cost, metric: str) -> str:
    place = "itself" if cost.own else theme.plain(cost.measured)
    joint = "" if cost.own else ", all at once"
    return (
        f"<b>{theme.plain(cost.removed)} removed</b><br>measured on {place} ({words(metric)})<br>"
        f"beyond chance: {cost.beyond.percent()}{joint}<br>lost: {cost.drop.percent()}<br>by chance: {cost.chance.percent()}"
    )


def _circle(fig: go.Figure, graph: SkillGraph) -> None:
    """Draw the skills on a circle, and an arrow for every cost that is certain to go beyond chance."""
    skills = graph.skills
    angles = [math.pi / 2 - 2 * math.pi * place / len(skills) for place in range(len(skills))]
    at = {name: (math.cos(angle), math.sin(angle)) for name, angle in zip(skills, angles, strict=True)}
    most = max((cost.beyond.value for cost in graph.edges), default=1.0)
    middles: list[tuple[float, float, str]] = []
    for cost in graph.edges:
        (x0, y0), (x1, y1) = at[cost.removed], at[cost.measured]
        length = math.hypot(x1 - x0, y1 - y0)
        along = ((x1 - x0) / length, (y1 - y0) / length)
        aside = (APART * along[1], -APART * along[0])  # the way back lies on the other side
        tail = (x0 + NODE * along[0] + aside[0], y0 + NODE * along[1] + aside[1])
        tip = (x1 - NODE * along[0] + aside[0], y1 - NODE * along[1] + aside[1])
        fig.add_annotation(
            x=tip[0], y=tip[1], ax=tail[0], ay=tail[1], xref="x2", yref="y2", axref="x2", ayref="y2", text="", showarrow=True,
            arrowhead=2, arrowsize=0.7, arrowcolor=theme.FORGET,
            arrowwidth=THINNEST + (WIDEST - THINNEST) * cost.beyond.value / most,
        )  # fmt: skip
        middles.append(((tail[0] + tip[0]) / 2, (tail[1] + tip[1]) / 2, _hover(cost, graph.metric)))
    fig.add_scatter(
        x=[x for x, _, _ in middles],
        y=[y for _, y, _ in middles],
        text=[text for *_, text in middles],
        mode="markers",
        marker={"size": 16, "color": "rgba(0,0,0,0)"},
        hovertemplate="%{text}<extra></extra>",
        name="costs",
        row=1,
        col=2,
    )
    itself = {name: graph.costs[name, name] for name in skills}
    fig.add_scatter(
        x=[x for x, _ in at.values()],
        y=[y for _, y in at.values()],
        text=[theme.plain(name, 16) for name in skills],
        customdata=[_hover(cost, graph.metric) for cost in itself.values()],
        mode="markers+text",
        textposition=[_outside(*place) for place in at.values()],
        marker={"size": 20, "color": theme.RETAIN},
        hovertemplate="%{customdata}<extra></extra>",
        name="skills",
        row=1,
        col=2,
    )
    fig.update_xaxes(visible=False, range=[-1.7, 1.7], row=1, col=2)
    fig.update_yaxes(visible=False, range=[-1.3, 1.3], scaleanchor="x2", row=1, col=2)


def _outside(x: float, y: float) -> str:
    """Return where a node's name stands: away from the middle, where the arrows are."""
    if abs(x) > 0.3:
        return f"middle {'right' if x > 0 else 'left'}"
    return f"{'top' if y > 0 else 'bottom'} center"
