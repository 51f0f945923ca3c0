"""`key_roc`: ROC curves of four distances at one site, a skill's held-out queries against the others'.

Knows scores by skill; knows nothing of how a distance is computed.
"""

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from lens_unlearn.figures import key_space_parts, theme
from lens_unlearn.figures.key_space_parts import interval_text, thinned
from lens_unlearn.keyspace.key_space import KeySpace
from lens_unlearn.model.sites import Site

__all__ = ["key_roc"]


def key_roc(
    space: KeySpace, skill: str | None = None, site: str | Site | None = None, *, title: str | None = None
) -> go.Figure:
    """Draw the ROC curves of four distances side by side: the share of a skill's queries detected against that of others.

    Args:
        space: What `lu.key_space` returned.
        skill: Whose queries are to be detected; default: the first.
        site: Such as "L5.mlp.post"; default: the last.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If the skill or the site was not measured.
    """
    key_space_parts.require(space, "key_roc")
    skill, site = key_space_parts.skill_of(space, skill, "key_roc"), key_space_parts.site_of(space, site, "key_roc")
    colours, styles = key_space_parts.colours_of(space, skill), key_space_parts.styles_of(space)
    others = [name for name in space.skills if name != skill]
    names = others if len(others) == 1 else [space.others, *others]
    heads = [
        f"{name}<br>AUC {interval_text(space.value(site, f'auc_{distance}', skill, space.others))}"
        for distance, name in key_space_parts.DISTANCES.items()
    ]
    fig = make_subplots(1, len(heads), shared_yaxes=True, column_titles=heads, horizontal_spacing=0.045)
    for column, distance in enumerate(key_space_parts.DISTANCES, start=1):
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
            own, other = (space.scores_of(site, distance, skill, part) for part in (skill, name))
            scales = thinned(torch.cat([own, other]).double().unique())
            detected, false_positives = (
                np.r_[0, np.searchsorted(part.double().sort().values, scales, "right")] / len(part)
                for part in (own, other)
            )
            label = f"against {'all others' if name == space.others else theme.plain(name)}"
            fig.add_scatter(
                x=false_positives,
                y=detected,
                mode="lines",
                line={
                    "color": theme.FORGET if name == space.others else colours[name],
                    "width": 3 if name == names[0] else 1.5,
                    "dash": "solid" if name == names[0] else styles[name][0],
                },
                name=label,
                legendgroup=label,
                showlegend=column == 1,
                hovertemplate=f"<b>{label}</b><br>true positive rate %{{y:.1%}}"
                "<br>false positive rate %{x:.1%}<extra></extra>",
                row=1,
                col=column,
            )
    fig.update_xaxes(
        title_text="false positive rate", range=[-0.02, 1.02], tickvals=[0, 0.5, 1], ticktext=["0", "50%", "100%"]
    )
    fig.update_yaxes(tickformat=".0%", range=[-0.02, 1.02])
    fig.update_yaxes(title_text=f"true positive rate, {theme.plain(skill, 24)}", col=1)
    return theme.finish(
        fig,
        title or f"Detecting queries of {skill} by four distances: {site}",
        "AUC against all others, with 95% intervals over documents; dotted: chance",
        about=key_space_parts.about(space),
        height=380,
        columns=4,
        facets=True,
        provenance=key_space_parts.origin(space),
        name="key_roc",
    )
