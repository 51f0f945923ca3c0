"""What figures read out of a key space: skills and their colours, sites, and words."""

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
"""Steps of a curve: more cannot be seen."""
CUT = ", cut into prompts"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def require(space: KeySpace, what: str) -> None:
    """Refuse what is not a key space, or is empty.

    Raises:
        LensUnlearnError: Naming the figure.
    """
    if not hasattr(space, "planes"):
        raise LensUnlearnError(
            f"{what} draws a KeySpace, not a {type(space).__name__}: pass what lu.key_space returned"
        )
    if not space.sites or len(space.skills) < 2:
        raise LensUnlearnError(f"{what} has nothing to draw: the key space has no site, or fewer than two skills")


def skill_of(space: KeySpace, skill: str | None, what: str) -> str:
    """Return the skill asked for, or the first.

    Raises:
        LensUnlearnError: If there is no such skill.
    """
    if skill is not None and skill not in space.skills:
        raise LensUnlearnError(f"{what}: there is no skill {skill!r}, there are {', '.join(space.skills)}")
    return space.skills[0] if skill is None else skill


def site_of(space: KeySpace, site: str | Site | None, what: str) -> Site:
    """Return the site asked for, or the last.

    Raises:
        LensUnlearnError: If it was not measured.
    """
    found = Site.parse(site) if isinstance(site, str) else site
    if found is not None and found not in space.planes:
        known = ", ".join(str(s) for s in space.sites[:12]) + (", ..." if len(space.sites) > 12 else "")
        raise LensUnlearnError(f"{what}: {found} was not measured, there are {known}")
    return space.sites[-1] if found is None else found


def colours_of(space: KeySpace, skill: str | None = None) -> dict[str, str]:
    """Give the skill looked at (default: the first) the warm colour, the next the cool one, and the others neither."""
    first = skill or space.skills[0]
    rest = [name for name in space.skills if name != first]
    return theme.corpus_colours([first, *rest], first, rest[0]) | {space.others: theme.CONTROL}


def styles_of(space: KeySpace) -> dict[str, tuple[str, str]]:
    """Give every skill a dash and a symbol, so that nobody has to tell them apart by colour alone."""
    names = [*space.skills, space.others]
    return {name: (DASHES[i % len(DASHES)], theme.SYMBOLS[i % len(theme.SYMBOLS)]) for i, name in enumerate(names)}


def about(space: KeySpace) -> str:
    """Say of which model and queries a key space is."""
    told = space.provenance
    corpora = {name: theme.short(source) for name, source in told.get("corpora", {}).items()}
    cut = [name for name, source in corpora.items() if source.endswith(CUT)]
    sources = [name if source == name else f"{name}: {source}" for name, source in corpora.items()]
    if cut and len(cut) == len(corpora):
        sources = [source.removesuffix(CUT) for source in sources]
        sources.append("all cut into prompts")
    counts = [space.queries] if "fitted" in told else []
    return " · ".join([*([f"model {told['model']}"] if told.get("model") else []), *sources, *counts])


def origin(space: KeySpace) -> dict[str, Any]:
    """Return what a figure keeps of a key space's provenance."""
    return dict(space.provenance)


def thinned(values: torch.Tensor) -> torch.Tensor:
    """Return at most so many of the ordered values, evenly, the ends among them."""
    if len(values) <= MAX_STEPS:
        return values
    return values[torch.linspace(0, len(values) - 1, MAX_STEPS).round().long()]


def interval_text(value: tuple[float, float, float]) -> str:
    told = f"{value[0]:.2f}"
    return told + (f" [{value[1]:.2f}, {value[2]:.2f}]" if np.isfinite(value[1]) else "")
