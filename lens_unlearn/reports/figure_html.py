"""Figures on a page: as JSON that the page's script draws, with the title and subtitle as text, which wraps on a phone.

Knows what `figures.theme` notes in a figure of ours, and takes figures from elsewhere as they are; `templates/figure.html` writes
them. Knows nothing of reports.
"""

import json
from dataclasses import dataclass
from typing import Any

from lens_unlearn.figures.theme import LONGEST, meta_of, plain
from lens_unlearn.inspection.html import Html

__all__ = ["Drawing", "drawing", "origin"]

PANEL_WIDTH, LEAST = 300, 170
"""Pixels of a panel, and the least, where there are so many that the page would cut them."""
PAGE_WIDTH = 1040
"""Pixels between the margins of a page on a desk."""
ABOUT_THE_PAGE = ("tradeoff", "sweep_curves", "condition_bars")
"""Figures whose model and texts are those of the page, which has named them."""


@dataclass(frozen=True)
class Drawing:
    """A figure as the page shows it."""

    number: int
    heading: str
    subtitle: str
    width: int
    """At least so many pixels, for what has several panels side by side; 0 if it fits everywhere."""
    height: int
    content: dict[str, Any]

    @property
    def label(self) -> str:
        """What a screen reader says in its place."""
        return ". ".join(part for part in (self.heading, self.subtitle) if part) or "Figure"


def drawing(number: int, title: str, figure: Any) -> Drawing:
    """Prepare a figure for the page, under a title, or under its own."""
    content = json.loads(figure.to_json())
    layout = content.setdefault("layout", {})
    own = origin(figure)
    layout.pop("meta", None)
    if own:  # of the figure's origin what the page says as well, escaped as all its texts are; `figures_of` reads it
        kept = {key: plain(value, LONGEST) if isinstance(value, str) else value for key, value in own.items()}
        layout["meta"] = {"lens_unlearn": {**kept, "provenance": {}}}
    heading = title or own.get("title", "")
    about = "" if own.get("name") in ABOUT_THE_PAGE else own.get("about", "")
    parts = [own.get("title", "") if heading != own.get("title") else "", about, own.get("subtitle", "")]
    subtitle = " · ".join(part for part in parts if part)
    if own:
        layout.pop("title", None)
        layout.pop("width", None)
        top = 56 if own.get("headings") else 34  # room for the buttons that plotly puts there
        removed = layout.get("margin", {}).get("t", top) - top
        layout["margin"] = {**layout.get("margin", {}), "t": top}
        layout["height"] = layout.get("height", 450) - removed
    columns = own.get("columns", 1)
    panels = max(min(PANEL_WIDTH * columns, PAGE_WIDTH), LEAST * columns) if columns > 1 else 0
    width = max(panels, int(own.get("width", 0)))
    height = int(layout.get("height") or 450)
    return Drawing(number, heading, subtitle[:1].upper() + subtitle[1:], width, height, content)


def origin(figure: Any) -> dict[str, Any]:
    """Return what `theme.finish` noted in a figure; nothing in figures from elsewhere, and in coloured texts."""
    if isinstance(figure, Html):
        return {}
    return meta_of(figure) if hasattr(figure, "to_plotly_json") else {}
