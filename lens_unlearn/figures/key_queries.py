"""Figures of a key space at one site: `key_coverage`, `key_roc` and `key_map`."""

from typing import TYPE_CHECKING, Literal

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from lens_unlearn.errors import LensUnlearnError
from lens_unlearn.figures import spaces, theme
from lens_unlearn.sites import Site

if TYPE_CHECKING:
    from lens_unlearn.keyspace import KeySpace

__all__ = ["key_coverage", "key_map", "key_roc"]

MAX_STEPS = 1000
"""Steps of a curve: more cannot be seen."""


def key_coverage(
    space: "KeySpace", skill: str | None = None, site: str | Site | None = None, *, title: str | None = None
) -> go.Figure:
    """Draw the share of held-out queries inside the box mu +- c sigma of a skill, as c grows.

    Args:
        space: What `lu.key_space` returned.
        skill: Whose box; default: the first.
        site: Such as "L5.mlp.post"; default: the last.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If the skill or the site was not measured.
    """
    spaces.require(space, "key_coverage")
    skill, site = spaces.skill_of(space, skill, "key_coverage"), spaces.site_of(space, site, "key_coverage")
    colours, styles = spaces.colours_of(space, skill), spaces.styles_of(space)
    everything = torch.cat([space.scores_of(site, "box", skill, name) for name in space.skills])
    # A scale of 0 has no place on a logarithmic axis.
    scales = _thinned(everything.double().clamp_min(1e-6).unique())
    scales = torch.cat([scales[:1] / 1.1, scales, scales[-1:] * 1.1])
    fig = go.Figure()
    others = [name for name in space.skills if name != skill]
    # The skill's line is drawn second, and the area down to the first is filled.
    for name in [space.others, skill, *others] if len(others) > 1 else [*others, skill]:
        own, pooled = name == skill, name == space.others
        auc = "" if own else f", AUC {space.value(site, 'auc_box', skill, name).value:.2f}"
        label = "all others" if pooled else theme.plain(name)
        fig.add_scatter(
            x=scales.tolist(),
            y=space.coverage(site, skill, name, scales).tolist(),
            mode="lines",
            line={
                "color": colours[name],
                "width": 3 if own else 1.6,
                "dash": "solid" if own or pooled else styles[name][0],
                "shape": "hv",
            },
            fill="tonexty" if own else None,
            fillcolor=theme.with_alpha(theme.FORGET, 0.12),
            name=f"{label}, its own box" if own else label + auc,
            legendrank=900 if own else 1100 if pooled else 1000,
            hovertemplate=f"<b>{label}</b><br>%{{y:.1%}} inside at c = %{{x:.3g}}<extra></extra>",
        )
    marks = [
        (space.value(site, "k", skill).value, "covers the fit", "dot"),
        (space.value(site, "best_scale", skill, space.others).value, "best", "dash"),
    ]
    # Outwards, since the two can be close together.
    for anchor, (at, told, dash) in zip(("right", "left"), sorted(marks), strict=True):
        if np.isfinite(at) and at > 0:
            fig.add_vline(x=at, line={"dash": dash, "width": 1.3, "color": theme.TEXT})
            where = {"x": np.log10(at), "y": 1.0, "yref": "paper", "xanchor": anchor, "yanchor": "bottom"}
            fig.add_annotation(**where, text=f"{told}: {at:.3g}", showarrow=False)
    ticks = [digit * 10**power for power in range(-6, 7) for digit in (1, 2, 5)]
    extent = [float(scales[0].log10()), float(scales[-1].log10())]
    fig.update_xaxes(type="log", range=extent, tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    fig.update_xaxes(title_text="scale c of the box μ ± cσ")
    fig.update_yaxes(title_text="share of queries inside", tickformat=".0%", range=[-0.02, 1.02])
    fig.update_layout(legend_traceorder="normal")
    area = space.value(site, "area_between", skill, space.others)
    note = f"area between {skill} and all others {_interval(area)} (1: apart, 0: no difference)"
    return theme.finish(
        fig,
        title or f"Queries inside the box of {skill} as it grows: {site}",
        note,
        about=spaces.about(space),
        height=400,
        facets=True,
        provenance=spaces.origin(space),
        name="key_coverage",
    )


def key_roc(
    space: "KeySpace", skill: str | None = None, site: str | Site | None = None, *, title: str | None = None
) -> go.Figure:
    """Draw the ROC curves of four distances side by side: a skill's queries found against others taken for it.

    Args:
        space: What `lu.key_space` returned.
        skill: Whose queries are to be found; default: the first.
        site: Such as "L5.mlp.post"; default: the last.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If the skill or the site was not measured.
    """
    spaces.require(space, "key_roc")
    skill, site = spaces.skill_of(space, skill, "key_roc"), spaces.site_of(space, site, "key_roc")
    colours, styles = spaces.colours_of(space, skill), spaces.styles_of(space)
    others = [name for name in space.skills if name != skill]
    names = others if len(others) == 1 else [space.others, *others]
    heads = [
        f"{name}<br>AUC {_interval(space.value(site, f'auc_{distance}', skill, space.others))}"
        for distance, name in spaces.DISTANCES.items()
    ]
    fig = make_subplots(1, len(heads), shared_yaxes=True, column_titles=heads, horizontal_spacing=0.045)
    for column, distance in enumerate(spaces.DISTANCES, start=1):
        fig.add_scatter(
            x=[0, 1],
            y=[0, 1],
            mode="lines",
            line={"color": theme.TEXT, "dash": "dot", "width": 1},
            hoverinfo="skip",
            showlegend=False,
            row=1,
            col=column,
        )
        for name in names:
            own, theirs = (space.scores_of(site, distance, skill, part) for part in (skill, name))
            scales = _thinned(torch.cat([own, theirs]).double().unique())
            found, alarms = (
                np.r_[0, np.searchsorted(part.double().sort().values, scales, "right")] / len(part)
                for part in (own, theirs)
            )
            label = f"against {'all others' if name == space.others else theme.plain(name)}"
            fig.add_scatter(
                x=alarms,
                y=found,
                mode="lines",
                line={
                    "color": theme.FORGET if name == space.others else colours[name],
                    "width": 3 if name == names[0] else 1.5,
                    "dash": "solid" if name == names[0] else styles[name][0],
                },
                name=label,
                legendgroup=label,
                showlegend=column == 1,
                hovertemplate=f"<b>{label}</b><br>%{{y:.1%}} found at %{{x:.1%}} false alarms<extra></extra>",
                row=1,
                col=column,
            )
    fig.update_xaxes(
        title_text="false alarms", range=[-0.02, 1.02], tickvals=[0, 0.5, 1], ticktext=["0", "50%", "100%"]
    )
    fig.update_yaxes(tickformat=".0%", range=[-0.02, 1.02])
    fig.update_yaxes(title_text=f"{theme.plain(skill)} found", col=1)
    return theme.finish(
        fig,
        title or f"Finding queries of {skill} by four distances: {site}",
        "AUC against all others, with 95% intervals over documents; dotted: chance",
        about=spaces.about(space),
        height=380,
        columns=4,
        facets=True,
        provenance=spaces.origin(space),
        name="key_roc",
    )


def key_map(
    space: "KeySpace",
    site: str | Site | None = None,
    *,
    skill: str | None = None,
    outline: Literal["plane", "shadow"] = "plane",
    title: str | None = None,
) -> go.Figure:
    """Draw held-out queries on the two main axes of the keys (PCA), coloured by skill, with the outline of each skill's box.

    Args:
        space: What `lu.key_space` returned.
        site: Such as "L5.mlp.post"; default: the last.
        skill: The one drawn in the warm colour; default: the first.
        outline: "plane": the box of the two coordinates shown, which covers the fitted queries here. "shadow": the projection of
            the box of all coordinates, which is many times as wide: what lies outside of it is outside of the box.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If the skill or the site was not measured.
    """
    spaces.require(space, "key_map")
    skill, site = spaces.skill_of(space, skill, "key_map"), spaces.site_of(space, site, "key_map")
    if outline not in ("plane", "shadow"):
        raise LensUnlearnError(f"key_map: outline={outline!r} is not known: 'plane' or 'shadow'")
    plane, colours, styles = space.planes[site], spaces.colours_of(space, skill), spaces.styles_of(space)
    outlines = plane.boxes if outline == "plane" else plane.shadows
    fig = go.Figure()
    most = max(1, theme.MAX_MARKS // len(space.skills))
    for name in reversed(space.skills):  # the first is drawn last, above the others
        closed = torch.cat([outlines[name], outlines[name][:1]])
        line = {"color": colours[name], "width": 1.8, "dash": styles[name][0]}
        fig.add_scatter(
            x=closed[:, 0].tolist(),
            y=closed[:, 1].tolist(),
            mode="lines",
            line=line,
            legendgroup=theme.plain(name),
            showlegend=False,
            hoverinfo="skip",
        )
        points = plane.points[name][:most]
        fig.add_scatter(
            x=points[:, 0].tolist(),
            y=points[:, 1].tolist(),
            mode="markers",
            marker={
                "color": theme.with_alpha(colours[name], 0.6),
                "symbol": styles[name][1],
                "size": 8,
                "line": {"width": 1, "color": colours[name]},
            },
            name=theme.plain(name),
            legendgroup=theme.plain(name),
            hovertemplate=f"<b>{theme.plain(name)}</b><br>%{{x:.3g}}, %{{y:.3g}}<extra></extra>",
        )
    fig.update_layout(legend_traceorder="reversed")
    everything = torch.cat([*outlines.values(), *plane.points.values()])
    room = 0.04 * (everything.amax(0) - everything.amin(0))
    low, high = (everything.amin(0) - room).tolist(), (everything.amax(0) + room).tolist()
    for i, update in enumerate((fig.update_xaxes, fig.update_yaxes)):
        share = f"{plane.explained[i]:.1%} of the variance"
        update(title_text=f"{('first', 'second')[i]} main axis ({share})", range=[low[i], high[i]])
    told = "box μ ± kσ of these two coordinates" if outline == "plane" else "projection of the box in all coordinates"
    left_out = max(len(part) for part in plane.points.values()) > most
    note = f"lines: {told}, covering the fitted queries" + (
        f"; first {most:,} queries of each skill shown" if left_out else ""
    )
    return theme.finish(
        fig,
        title or f"Keys of the skills on their two main axes: {site}",
        note,
        about=spaces.about(space),
        height=520,
        provenance=spaces.origin(space),
        name="key_map",
    )


def _thinned(values: torch.Tensor) -> torch.Tensor:
    """Return at most so many of the ordered values, evenly, the ends among them."""
    if len(values) <= MAX_STEPS:
        return values
    return values[torch.linspace(0, len(values) - 1, MAX_STEPS).round().long()]


def _interval(value: tuple[float, float, float]) -> str:
    told = f"{value[0]:.2f}"
    return told + (f" [{value[1]:.2f}, {value[2]:.2f}]" if np.isfinite(value[1]) else "")
