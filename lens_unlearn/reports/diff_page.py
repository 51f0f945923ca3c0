"""`diff_page`: two runs side by side as one HTML document: what changed, where both selected, what both measured.

Knows the tables of a comparison of two runs; `templates/diff.html` writes them. Knows nothing of runs.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lens_unlearn.reports.figure_html import drawing
from lens_unlearn.reports.numbers import CSV_LIMIT, csv_data
from lens_unlearn.reports.templating import render

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["diff_page"]


def diff_page(
    names: tuple[str, str],
    plan: "pd.DataFrame",
    selections: "pd.DataFrame",
    measures: "pd.DataFrame",
    table: "pd.DataFrame",
    figures: Mapping[str, Any],
) -> str:
    """Write two runs side by side as one self-contained HTML document, which refers to no address outside itself.

    Args:
        names: What the two are called.
        plan: What differs between them.
        selections: How far the same neurons were selected.
        measures: Everything that was measured, for the download.
        table: The rows that are shown.
        figures: By title.
    """
    from plotly.offline import get_plotlyjs

    data = measures.to_csv(index=False)
    kinds = set(measures["how"]) - {""}
    return str(
        render(
            "diff.html",
            names=names,
            plan=plan.to_dict("records"),
            selections=selections.to_dict("records"),
            columns=list(table.columns),
            rows=[list(row) for row in table.itertuples(index=False)],
            kinds=kinds,
            figures=[drawing(number, title, one) for number, (title, one) in enumerate(figures.items())],
            data=csv_data(data) if len(data) <= CSV_LIMIT else "",
            library=get_plotlyjs() if figures else "",
        )
    )
