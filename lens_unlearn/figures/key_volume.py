"""`key_volume`: how large each skill's box is, and how far apart the boxes' centres are, by layer.

Knows which measures it draws; panels and lines are those of `key_space_layers`.
"""

from itertools import combinations

import plotly.graph_objects as go

from lens_unlearn.figures import key_space_parts, theme
from lens_unlearn.figures.key_space_layers import add_line, finish_space, make_panels, site_kinds, values_at
from lens_unlearn.keyspace.key_space import KeySpace

__all__ = ["key_volume"]


def key_volume(space: KeySpace, *, skill: str | None = None, title: str | None = None) -> go.Figure:
    """Draw the volume of each skill's box, and the distances between the boxes' centres, by layer.

    Args:
        space: What `lu.key_space` returned.
        skill: The one drawn in the warm colour; default: the first.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If there is nothing to draw.
    """
    key_space_parts.require(space, "key_volume")
    colours = key_space_parts.colours_of(space, key_space_parts.skill_of(space, skill, "key_volume"))
    fig = make_panels(space, ["volume of the box", "distance between centres"], 0.1)
    for row, kind in enumerate(site_kinds(space), start=1):
        for index, name in enumerate(space.skills):
            values, label = values_at(space, kind, "log_volume", name), theme.plain(name, 20)
            add_line(fig, row, 1, label, colours[name], index, values, f"{label}: log volume")
        for index, (a, b) in enumerate(combinations(space.skills, 2)):
            values = values_at(space, kind, "centre_distance", a, b)
            label = f"{theme.plain(a, 20)} to {theme.plain(b, 20)}"
            # A pair is seen by both colours: the line is of one skill, its marks are of the other.
            add_line(fig, row, 2, label, colours[a], index, values, f"{label}: distance", marks=colours[b])
    fig.update_xaxes(title_text="log volume: sum of log σ", row=len(site_kinds(space)), col=1)
    fig.update_xaxes(title_text="distance in σ, root mean square", row=len(site_kinds(space)), col=2)
    fig.update_xaxes(rangemode="tozero", col=2)
    floored = max((v.value for (_, _, _, measure), v in space.values.items() if measure == "floored"), default=0)
    note = f"up to {floored:,.0f} coordinates of a box are nearly constant: σ is at its floor" if floored > 0 else ""
    return finish_space(fig, space, title or "Volume and centres of the skills' boxes", note, "key_volume", 2)
