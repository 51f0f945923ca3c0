"""`selection_overlap`: how far selections agree, overall and layer by layer.

Knows boolean maps; knows nothing of the methods that selected.
"""

import math
from collections.abc import Mapping
from itertools import combinations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_unlearn.core.errors import LensUnlearnError, SelectionError
from lens_unlearn.figures import theme
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.maps import NeuronMap

__all__ = ["selection_overlap"]

MAX_SELECTIONS = 24
MAX_ANNOTATED = 8
"""Selections, or pairs of them, at which every cell can still hold its number."""

Flat = dict[Site, np.ndarray]
"""A selection, flat at each site."""


def selection_overlap(
    selections: Mapping[str, NeuronMap], *, kind: str | None = None, title: str | None = None, subtitle: str = ""
) -> go.Figure:
    """Draw the Jaccard overlap of selections: over the whole model, and per layer for each pair.

    The overlap is (selected by both) / (selected by either); where neither selects anything it is left blank. Hover
    gives the counts, and the overlap that two random selections of these sizes would have.

    Args:
        selections: Boolean maps by name, two or more; a site that a map lacks counts as unselected there.
        kind: The one kind to compare; default: all.
        title: Instead of the default title.
        subtitle: Such as model and corpora, which a map does not know.

    Raises:
        LensUnlearnError: If there are fewer than two selections, or they are of different models.
    """
    if not isinstance(selections, Mapping) or not 2 <= len(selections) <= MAX_SELECTIONS:
        raise LensUnlearnError(
            f"selection_overlap compares 2 to {MAX_SELECTIONS} selections: pass them by name, as in "
            '{"mine": mine, "random": random}'
        )
    flats = _aligned(selections, kind)
    names = [theme.plain(name, 36) for name in selections]
    pairs = list(combinations(range(len(names)), 2))
    fig = make_subplots(
        1,
        2,
        column_titles=["whole model", "by layer"],
        column_widths=[0.5, 0.5] if len(pairs) > 1 else [0.4, 0.6],
        horizontal_spacing=0.16,
    )
    _matrix(fig, flats, names, [theme.two_lines(name, 36) for name in selections])
    layers = _by_layer(fig, flats, names, pairs)
    fig.update_layout(
        showlegend=False,
        coloraxis={
            "colorscale": theme.MAGNITUDE,
            "cmin": 0,
            "cmax": 1,
            "colorbar": {"title": "Jaccard", "thickness": 14},
        },
    )
    kinds = ", ".join(dict.fromkeys(site.kind for site in flats[0]))
    note = f"{kinds} · selected by both / selected by either; 1 = the same neurons, 0 = none in common"
    return theme.finish(
        fig,
        title or "Overlap of selections (Jaccard index)",
        " · ".join(part for part in (subtitle, note) if part),
        height=max(theme.layer_height(layers), 40 * len(names)) + 130,
        columns=2,
        facets=True,
    )


def _aligned(selections: Mapping[str, NeuronMap], kind: str | None) -> list[Flat]:
    """Return every selection over the union of the sites."""
    sizes: dict[Site, int] = {}
    for name, selection in selections.items():
        theme.require_selection(selection, "selection_overlap")
        for site, value in selection.items():
            if kind is not None and site.kind != kind:
                continue
            if sizes.setdefault(site, value.numel()) != value.numel():
                raise SelectionError(
                    f"selection_overlap: {site} has {value.numel()} neurons in {name!r} and {sizes[site]} in another "
                    "selection: compare selections of one model"
                )
    if not sizes:
        raise SelectionError(
            f"selection_overlap: no selection has the kind {kind!r}: leave it out, or name one they have"
        )
    order = sorted(sizes, key=lambda site: (site.kind, site.layer))
    return [
        {
            site: selection[site].reshape(-1).numpy() if site in selection else np.zeros(sizes[site], dtype=bool)
            for site in order
        }
        for selection in selections.values()
    ]


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Return the share of what either selects that both select; NaN if neither selects anything."""
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else float("nan")


def _hover(a: np.ndarray, b: np.ndarray) -> str:
    """Write the counts, and what chance alone would give: m k / n neurons in common."""
    both, first, second = int((a & b).sum()), int(a.sum()), int(b.sum())
    common = first * second / max(a.size, 1)
    either = first + second - common
    chance = f"<br>by chance: about {common / either:.3f}" if either else ""
    return f"{both:,} in common, of {first:,} and {second:,}{chance}"


def _matrix(fig: go.Figure, flats: list[Flat], names: list[str], labels: list[str]) -> None:
    chosen = [np.concatenate(list(flat.values())) for flat in flats]
    z = [[jaccard(a, b) for b in chosen] for a in chosen]
    text = [
        [f"<b>{names[i]} / {names[j]}</b><br>{_hover(a, b)}" for j, b in enumerate(chosen)]
        for i, a in enumerate(chosen)
    ]
    places = list(range(len(names)))
    fig.add_heatmap(
        z=z,
        x=places,
        y=places,
        text=text,
        coloraxis="coloraxis",
        texttemplate="%{z:.2f}" if len(names) <= MAX_ANNOTATED else None,
        hovertemplate="%{text}<br>Jaccard %{z:.3f}<extra></extra>",
        xgap=2,
        ygap=2,
        row=1,
        col=1,
    )
    # Names are long and pairs of names longer: both x axes refer to selections by number.
    numbers = [str(place + 1) for place in places]
    ticks = {"tickvals": places, "showgrid": False, "zeroline": False}
    fig.update_xaxes(**ticks, ticktext=numbers, tickangle=0, row=1, col=1)
    numbered = [f"{label}  <b>{number}</b>" for label, number in zip(labels, numbers, strict=True)]
    fig.update_yaxes(**ticks, ticktext=numbered, autorange="reversed", row=1, col=1)


def _by_layer(fig: go.Figure, flats: list[Flat], names: list[str], pairs: list[tuple[int, int]]) -> list[int]:
    layers, known = theme.layer_rows(flats[0]), {site.layer for site in flats[0]}
    parts = [{n: np.concatenate([v for s, v in flat.items() if s.layer == n]) for n in known} for flat in flats]
    labels = [f"{names[i]} / {names[j]}" for i, j in pairs]
    fig.add_heatmap(
        z=[[jaccard(parts[i][n], parts[j][n]) if n in known else math.nan for i, j in pairs] for n in layers],
        x=list(range(len(pairs))),
        y=layers,
        text=[
            [f"<b>L{n}: {label}</b><br>{_hover(parts[i][n], parts[j][n])}" for (i, j), label in zip(pairs, labels)]
            if n in known
            else [""] * len(pairs)
            for n in layers
        ],
        coloraxis="coloraxis",
        texttemplate="%{z:.2f}" if len(pairs) <= MAX_ANNOTATED and len(layers) <= 32 else None,
        hovertemplate="%{text}<br>Jaccard %{z:.3f}<extra></extra>",
        hoverongaps=False,
        xgap=2,
        ygap=1,
        row=1,
        col=2,
    )
    shown = [f"{i + 1} / {j + 1}" for i, j in pairs]
    ticks = {
        "tickvals": list(range(len(pairs))),
        "ticktext": shown,
        "tickangle": 0 if len(pairs) <= MAX_ANNOTATED else 90,
    }
    fig.update_xaxes(**ticks, showgrid=False, zeroline=False, row=1, col=2)
    fig.update_yaxes(title_text="layer", **theme.layer_ticks(layers), showgrid=False, row=1, col=2)
    return layers
