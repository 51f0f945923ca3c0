"""`expert_load`: how many of a corpus' tokens each routed expert computes.

Knows moments with their loads; knows nothing of the model that they are of.
"""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.figures import theme
from lens_unlearn.figures.expert_grid import Panel, expert_grid
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.moments import Moments

__all__ = ["expert_load"]

MAX_CORPORA = 8


def expert_load(
    moments: Moments | Mapping[str, Moments],
    *,
    against: str | None = None,
    title: str | None = None,
    subtitle: str = "",
) -> go.Figure:
    """Draw the share of tokens that is routed to each expert of each layer, corpora side by side.

    Args:
        moments: Collected at a site inside routed experts, such as "experts.post"; of several corpora by name.
        against: The name of a corpus: the others show by how much more (or less) of their tokens go to each expert than of its.
        title: Instead of the default title.
        subtitle: A further line below the title.

    Returns:
        A heat map for each corpus.

    Raises:
        LensUnlearnError: If there is nothing to draw, there is no such corpus, or the corpora are of different experts.

    Examples:
        >>> import torch
        >>> from lens_unlearn.model.routed import Routed
        >>> moments, tokens = Moments(), torch.arange(4)
        >>> moments.update_routed(
        ...     Site(0, "experts.post"), Routed(torch.ones(4, 3), torch.ones(4), tokens % 2, tokens, 2, (1, 4)), torch.ones(4)
        ... )
        >>> [trace.type for trace in expert_load({"code": moments}).data]
        ['heatmap']
    """
    given = {"all tokens": moments} if isinstance(moments, Moments) else dict(moments)
    if not given or not all(isinstance(one, Moments) for one in given.values()):
        raise LensUnlearnError(
            "expert_load draws Moments, or Moments by the names of corpora: collect at 'experts.post'"
        )
    if len(given) > MAX_CORPORA:
        raise LensUnlearnError(
            f"expert_load draws {MAX_CORPORA} corpora at most, not {len(given)}: draw fewer at a time"
        )
    if against is not None and against not in given:
        raise LensUnlearnError(f"against={against!r} is none of the corpora: choose from {', '.join(given)}")
    loads = {name: _loads(name, one) for name, one in given.items()}
    _require_alike(loads)
    panels = []
    for name, load in loads.items():
        details = _details(given[name])
        if against in (None, name):
            panels.append(Panel(name, load, "share of tokens", details=details))
        else:
            panels.append(
                Panel(f"{name} − {against}", _less(load, loads[against]), "difference in shares", "+.1%", True, details)
            )
    fig = expert_grid(panels)
    about = " · ".join(theme.source(one.provenance, name) for name, one in given.items() if one.provenance)
    layers = theme.layer_rows(site for load in loads.values() for site in load)
    return theme.finish(
        fig,
        title or "Share of tokens routed to each expert",
        subtitle,
        about=about,
        height=theme.layer_height(layers) + 90,
        columns=len(panels),
        facets=True,
        name="expert_load",
    )


def _loads(name: str, moments: Moments) -> dict[Site, np.ndarray]:
    """Return the share of tokens of each expert, by layer, of the first kind of site there is."""
    routed = moments.routed_tokens
    if not routed:
        raise LensUnlearnError(
            f"expert_load: the moments of {name!r} have no routed experts: collect at 'experts.post'"
        )
    kind = next(iter(routed)).kind
    return {site: (tokens / moments.n).numpy() for site, tokens in routed.items() if site.kind == kind}


def _require_alike(loads: Mapping[str, Mapping[Site, np.ndarray]]) -> None:
    shapes = {name: {site.layer: len(load) for site, load in one.items()} for name, one in loads.items()}
    first = next(iter(shapes))
    for name, shape in shapes.items():
        if shape != shapes[first]:
            raise LensUnlearnError(
                f"expert_load: {first!r} and {name!r} differ in their layers or experts: are they of one model?"
            )


def _less(load: Mapping[Site, np.ndarray], other: Mapping[Site, np.ndarray]) -> dict[Site, np.ndarray]:
    by_layer = {site.layer: value for site, value in other.items()}
    return {site: value - by_layer[site.layer] for site, value in load.items()}


def _details(moments: Moments) -> dict[Site, list[str]]:
    gates, routed = moments.gate_sums, moments.routed_tokens
    return {
        site: [
            f"{int(n):,} tokens, mean gate {float(g) / float(n) if n else 0:.3g}"
            for n, g in zip(tokens, gates[site], strict=True)
        ]
        for site, tokens in routed.items()
    }
