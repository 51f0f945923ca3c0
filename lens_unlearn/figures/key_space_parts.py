"""What the figures of a key space share: checks, skills and their colours, sites, and what they say of its origin.

Knows what a `KeySpace` holds; draws nothing.
"""

from typing import Any

import numpy as np
import torch

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.figures import theme
from lens_unlearn.keyspace.key_space import KeySpace
from lens_unlearn.model.sites import Site

__all__ = ["DISTANCES", "about", "colours_of", "require", "skill_of", "site_of", "styles_of"]

DISTANCES = {
    "box": "box (largest coordinate)",
    "ellipsoid": "ellipsoid (mean square)",
    "mahalanobis": "Mahalanobis (shrunk)",
    "clusters": "nearest of 4 clusters",
}
MAX_STEPS = 1000
"""Steps of a curve: more than there are pixels cannot be seen."""
CUT = ", cut into prompts"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def require(space: KeySpace, figure: str) -> None:
    """Refuse what is not a key space, or is empty.

    Raises:
        LensUnlearnError: Naming the figure.
    """
    if not hasattr(space, "planes"):
        raise LensUnlearnError(
            f"{figure} draws a KeySpace, not a {type(space).__name__}: pass what lu.key_space returned"
        )
    if not space.sites or len(space.skills) < 2:
        raise LensUnlearnError(f"{figure} has nothing to draw: the key space has no site, or fewer than two skills")


def skill_of(space: KeySpace, skill: str | None, figure: str) -> str:
    """Return the skill asked for, or the first.

    Raises:
        LensUnlearnError: If there is no such skill.
    """
    if skill is not None and skill not in space.skills:
        raise LensUnlearnError(f"{figure}: there is no skill {skill!r}, there are {', '.join(space.skills)}")
    return space.skills[0] if skill is None else skill


def site_of(space: KeySpace, site: str | Site | None, figure: str) -> Site:
    """Return the site asked for, or the last.

    Raises:
        LensUnlearnError: If it was not measured.
    """
    asked = Site.parse(site) if isinstance(site, str) else site
    if asked is not None and asked not in space.planes:
        known = ", ".join(str(s) for s in space.sites[:12]) + (", ..." if len(space.sites) > 12 else "")
        raise LensUnlearnError(f"{figure}: {asked} was not measured, there are {known}")
    return space.sites[-1] if asked is None else asked


def colours_of(space: KeySpace, skill: str | None = None) -> dict[str, str]:
    """Give the skill in question (default: the first) the warm colour, the next the cool one, and the others neither."""
    first = skill or space.skills[0]
    rest = [name for name in space.skills if name != first]
    return theme.corpus_colours([first, *rest], first, rest[0]) | {space.others: theme.CONTROL}


def styles_of(space: KeySpace) -> dict[str, tuple[str, str]]:
    """Give every skill a dash and a symbol, so that nobody has to tell them apart by colour alone."""
    names = [*space.skills, space.others]
    return {name: (DASHES[i % len(DASHES)], theme.SYMBOLS[i % len(theme.SYMBOLS)]) for i, name in enumerate(names)}


def about(space: KeySpace) -> str:
    """Say of which model and queries a key space is."""
    provenance = space.provenance
    corpora = {name: theme.short(source) for name, source in provenance.get("corpora", {}).items()}
    cut = [name for name, source in corpora.items() if source.endswith(CUT)]
    sources = [name if source == name else f"{name}: {source}" for name, source in corpora.items()]
    if cut and len(cut) == len(corpora):
        sources = [source.removesuffix(CUT) for source in sources]
        sources.append("all cut into prompts")
    counts = [space.queries] if "fitted" in provenance else []
    model = [f"model {provenance['model']}"] if provenance.get("model") else []
    return " · ".join([*model, *sources, *counts])


def origin(space: KeySpace) -> dict[str, Any]:
    """Return what a figure keeps of a key space's provenance."""
    return dict(space.provenance)


def thinned(values: torch.Tensor) -> torch.Tensor:
    """Return at most `MAX_STEPS` of the ordered values, evenly, the first and the last among them."""
    # A curve of every query's score would make a figure of megabytes. Ranks are thinned rather than the range, so that the curve
    # keeps its shape where scores crowd; and with both ends it still begins at 0 and ends at 1.
    if len(values) <= MAX_STEPS:
        return values
    return values[torch.linspace(0, len(values) - 1, MAX_STEPS).round().long()]


def interval_text(value: tuple[float, float, float]) -> str:
    return f"{value[0]:.2f}" + (f" [{value[1]:.2f}, {value[2]:.2f}]" if np.isfinite(value[1]) else "")
