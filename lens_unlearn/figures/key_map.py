"""`key_map`: held-out queries at one site on the first two principal components of the keys, with each skill's box.

Knows the planes that a `KeySpace` holds; projects nothing itself.
"""

from typing import Literal

import plotly.graph_objects as go
import torch

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.figures import key_space_parts, theme
from lens_unlearn.keyspace.key_space import KeySpace
from lens_unlearn.model.sites import Site

__all__ = ["key_map"]


def key_map(
    space: KeySpace,
    site: str | Site | None = None,
    *,
    skill: str | None = None,
    outline: Literal["plane", "shadow"] = "plane",
    title: str | None = None,
) -> go.Figure:
    """Draw held-out queries on the first two principal components of the keys, coloured by skill, with each skill's box in outline.

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
    key_space_parts.require(space, "key_map")
    skill, site = key_space_parts.skill_of(space, skill, "key_map"), key_space_parts.site_of(space, site, "key_map")
    if outline not in ("plane", "shadow"):
        raise LensUnlearnError(f"key_map: outline={outline!r} is not known: 'plane' or 'shadow'")
    plane = space.planes[site]
    colours, styles = key_space_parts.colours_of(space, skill), key_space_parts.styles_of(space)
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
        update(title_text=f"{('first', 'second')[i]} principal component ({share})", range=[low[i], high[i]])
    lines = "box μ ± kσ of these two coordinates" if outline == "plane" else "projection of the box in all coordinates"
    left_out = max(len(part) for part in plane.points.values()) > most
    note = f"lines: {lines}, covering the fitted queries" + (
        f"; first {most:,} queries of each skill shown" if left_out else ""
    )
    return theme.finish(
        fig,
        title or f"Keys of the skills on their first two principal components: {site}",
        note,
        about=key_space_parts.about(space),
        height=520,
        provenance=key_space_parts.origin(space),
        name="key_map",
    )
