"""`key_coverage`: which share of each skill's held-out queries is inside one skill's box, as the box grows, at one site.

Knows the scores of a box; knows nothing of how it was fitted.
"""

import numpy as np
import plotly.graph_objects as go
import torch

from lens_unlearn.figures import key_space_parts, theme
from lens_unlearn.figures.key_space_parts import interval_text, thinned
from lens_unlearn.keyspace.key_space import KeySpace
from lens_unlearn.model.sites import Site

__all__ = ["key_coverage"]


def key_coverage(
    space: KeySpace, skill: str | None = None, site: str | Site | None = None, *, title: str | None = None
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
    key_space_parts.require(space, "key_coverage")
    skill = key_space_parts.skill_of(space, skill, "key_coverage")
    site = key_space_parts.site_of(space, site, "key_coverage")
    colours, styles = key_space_parts.colours_of(space, skill), key_space_parts.styles_of(space)
    everything = torch.cat([space.scores_of(site, "box", skill, name) for name in space.skills])
    # A scale of 0 has no place on a logarithmic axis.
    scales = thinned(everything.double().clamp_min(1e-6).unique())
    scales = torch.cat([scales[:1] / 1.1, scales, scales[-1:] * 1.1])
    fig = go.Figure()
    others = [name for name in space.skills if name != skill]
    # The skill's line is drawn second, and the area down to the first is filled.
    for name in [space.others, skill, *others] if len(others) > 1 else [*others, skill]:
        is_own, pooled = name == skill, name == space.others
        auc = "" if is_own else f", AUC {space.value(site, 'auc_box', skill, name).value:.2f}"
        label = "all others" if pooled else theme.plain(name)
        fig.add_scatter(
            x=scales.tolist(),
            y=space.coverage(site, skill, name, scales).tolist(),
            mode="lines",
            line={
                "color": colours[name],
                "width": 3 if is_own else 1.6,
                "dash": "solid" if is_own or pooled else styles[name][0],
                "shape": "hv",
            },
            fill="tonexty" if is_own else None,
            fillcolor=theme.with_alpha(theme.FORGET, 0.12),
            name=f"{label}, its own box" if is_own else label + auc,
            legendrank=900 if is_own else 1100 if pooled else 1000,
            hovertemplate=f"<b>{label}</b><br>%{{y:.1%}} inside at c = %{{x:.3g}}<extra></extra>",
        )
    marks = [
        (space.value(site, "k", skill).value, "covers the fit", "dot"),
        (space.value(site, "best_scale", skill, space.others).value, "best", "dash"),
    ]
    # Outwards, since the two can be close together.
    for anchor, (at, label, dash) in zip(("right", "left"), sorted(marks), strict=True):
        if np.isfinite(at) and at > 0:
            fig.add_vline(x=at, line={"dash": dash, "width": 1.3, "color": theme.TEXT})
            where = {"x": np.log10(at), "y": 1.0, "yref": "paper", "xanchor": anchor, "yanchor": "bottom"}
            fig.add_annotation(**where, text=f"{label}: {at:.3g}", showarrow=False)
    extent = [float(scales[0].log10()), float(scales[-1].log10())]
    fig.update_xaxes(type="log", range=extent, **theme.log_ticks(*extent))
    fig.update_xaxes(title_text="scale c of the box μ ± cσ")
    fig.update_yaxes(title_text="share of queries inside", tickformat=".0%", range=[-0.02, 1.02])
    fig.update_layout(legend_traceorder="normal")
    area = space.value(site, "area_between", skill, space.others)
    note = f"area between {skill} and all others {interval_text(area)} (1: apart, 0: no difference)"
    return theme.finish(
        fig,
        title or f"Queries inside the box of {skill} as it grows: {site}",
        note,
        about=key_space_parts.about(space),
        height=400,
        facets=True,
        provenance=key_space_parts.origin(space),
        name="key_coverage",
    )
