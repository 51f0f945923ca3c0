"""`forget_quality`: how like a model that never saw the facts an edit makes a model, against the utility that remains.

Knows pairs of TOFU's forget quality and model utility; computes neither.
"""

import math
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.conditions import BASE, Condition, families
from lens_unlearn.figures import theme

__all__ = ["forget_quality"]

ALIKE = 0.05
LOWEST = 1e-20
"""A p below this is drawn here: they go down to 0, which has no logarithm."""


def forget_quality(
    points: Mapping[str, tuple[Any, Any]],
    *,
    base: str = BASE,
    retrained: str = "retrained",
    title: str | None = None,
    subtitle: str = "",
) -> go.Figure:
    """Draw TOFU's forget quality, as log10 p, against model utility, one point per condition.

    Above the dotted line the truth ratios cannot be distinguished from those of a model that never saw the facts (p > 0.05).
    The points of a sweep (``method@strength``) are joined in order of strength; controls (``method:control``) are grey.

    Args:
        points: For each condition its forget quality (`lens_unlearn.forget_quality`, or p) and its utility
            (`lens_unlearn.tofu_utility`, or a number).
        base: The name of the unedited model among the points.
        retrained: The name of the model that never saw the facts.
        title: Instead of the default title.
        subtitle: Such as model and corpora, which the points do not know.

    Raises:
        LensUnlearnError: If there is no point, a p is outside [0, 1], or a utility is negative or no number.

    Examples:
        >>> fig = forget_quality({"base": (1e-9, 0.6), "retrained": (1.0, 0.58), "simu": (0.2, 0.5)})
        >>> [trace.name for trace in fig.data]
        ['p = 0.05', 'base', 'retrained', 'simu']
    """
    if not isinstance(points, Mapping) or not points:
        raise LensUnlearnError("forget_quality has nothing to draw: pass a quality and a utility by condition")
    places = {str(name): _place(name, *_pair(name, point)) for name, point in points.items()}
    fig = go.Figure()
    right = 1.1 * max([0.1, *(utility for _, utility in places.values())])
    fig.add_scatter(
        x=[0, right],
        y=[math.log10(ALIKE)] * 2,
        mode="lines",
        line={"color": theme.TEXT, "dash": "dot", "width": 1.5},
        name=f"p = {ALIKE:g}",
        legendrank=1200,
        hoverinfo="skip",
    )
    hover = {name: _hover(name, *points[name]) for name in places}
    for name, symbol in ((base, "cross"), (retrained, "star")):
        if name in places:
            _draw(fig, [name], places, hover, colour=theme.TEXT, symbol=symbol, name=name)
    rest = [Condition.parse(name) for name in places if name not in (base, retrained)]
    for index, method in enumerate(families(rest)):
        colour = theme.METHODS[index % len(theme.METHODS)]
        symbol = theme.SYMBOLS[index % len(theme.SYMBOLS)]
        for control in (False, True):
            family = [c for c in rest if c.method == method and c.control == control]
            steps = sorted((c for c in family if c.strength is not None), key=lambda c: c.strength or 0.0)
            for part in ([c for c in family if c.strength is None], steps):
                if part:
                    style = (theme.CONTROL, f"{symbol}-open") if control else (colour, symbol)
                    label = f"{method}, control" if control else method
                    _draw(fig, [c.name for c in part], places, hover, colour=style[0], symbol=style[1], name=label)
    low = min(math.log10(ALIKE), *(height for height, _ in places.values()))
    fig.update_xaxes(title_text="model utility", range=[0, right])
    fig.update_yaxes(title_text="forget quality (log10 p)", range=[1.08 * low - 0.1, 0.06 * abs(low) + 0.1])
    beyond = [name for name, (quality, _) in points.items() if _p(quality) < LOWEST]
    notes = [
        subtitle,
        "up and to the right is better; above the dotted line, the test sees no difference from a model that never saw the facts",
    ]
    notes.append(f"p below {LOWEST:g} is drawn there: {', '.join(map(str, beyond))}" if beyond else "")
    return theme.finish(
        fig,
        title or "Forget quality against model utility",
        " · ".join(note for note in notes if note),
        height=440,
        name="forget_quality",
    )


def _pair(name: Any, point: Any) -> tuple[Any, Any]:
    try:
        quality, utility = point
    except (TypeError, ValueError):
        raise LensUnlearnError(
            f"forget_quality: {name!r} is no pair: give its forget quality (or p) and its utility"
        ) from None
    return quality, utility


def _p(quality: Any) -> float:
    return float(getattr(quality, "p", quality))


def _place(name: Any, quality: Any, utility: Any) -> tuple[float, float]:
    """Return the height of a point, and how far right it is."""
    p, value = _p(quality), float(utility)
    if not 0 <= p <= 1:
        raise LensUnlearnError(f"forget_quality: p of {name!r} is {p}: it is a probability, from 0 to 1")
    if not (math.isfinite(value) and value >= 0):
        raise LensUnlearnError(f"forget_quality: the utility of {name!r} is {value}: it is a number from 0 on")
    return math.log10(max(p, LOWEST)), value


def _hover(name: str, quality: Any, utility: Any) -> str:
    lines = [f"<b>{theme.plain(name)}</b>", f"p {_p(quality):.3g}"]
    if hasattr(quality, "statistic"):
        lines[1] += f", distance {float(quality.statistic):.3f}"
    lines.append(f"utility {float(utility):.3f}")
    lines += [f"· {theme.plain(part)} {value:.3f}" for part, value in getattr(utility, "components", {}).items()]
    return "<br>".join(lines)


def _draw(
    fig: go.Figure,
    names: list[str],
    places: Mapping[str, tuple[float, float]],
    hover: Mapping[str, str],
    *,
    colour: str,
    symbol: str,
    name: str,
) -> None:
    shown = theme.plain(name)
    fig.add_scatter(
        x=[places[point][1] for point in names],
        y=[places[point][0] for point in names],
        mode="lines+markers" if len(names) > 1 else "markers",
        line={"color": colour, "width": 1.5},
        marker={"color": colour, "symbol": symbol, "size": 13, "line": {"width": 2, "color": colour}},
        name=shown,
        legendgroup=shown,
        showlegend=theme.is_first(fig, shown),
        hovertext=[hover[point] for point in names],
        hovertemplate="%{hovertext}<extra></extra>",
        cliponaxis=False,
    )
