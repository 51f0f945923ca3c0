"""Every number of a report: a table to read, and the whole as CSV inside the page.

Knows the report's measures and how large a page may become; `templates/numbers.html` writes the table.
"""

import base64

from lens_unlearn.evaluation.conditions import Estimate
from lens_unlearn.evaluation.report import Report
from lens_unlearn.reports.templating import render

__all__ = ["csv_data", "numbers"]

CSV_LIMIT = 2_000_000


def numbers(report: Report, number: int = 1) -> str:
    """Write one row per condition and corpus, one column per metric, and a link to everything as CSV.

    Args:
        report: Nothing is written of one without measures.
        number: Of this report among those of the page, for the name of the CSV.
    """
    if not report.measures:
        return ""
    measured = {(condition, corpus) for condition, corpus, _ in report.measures}
    groups = [(one, [c for c in report.corpora if (one, c) in measured]) for one in report.conditions]
    table = report.csv()
    return render(
        "numbers.html",
        metrics=report.metrics,
        groups=groups,
        estimates={key: Estimate.of(measure) for key, measure in report.measures.items()},
        file="metrics.csv" if number == 1 else f"metrics-{number}.csv",
        data=csv_data(table) if len(table) <= CSV_LIMIT else "",
    )


def csv_data(table: str) -> str:
    """Return a table as an address that holds all of it."""
    data = base64.b64encode(table.encode(errors="backslashreplace")).decode()  # a name may hold half a surrogate pair
    return f"data:text/csv;charset=utf-8;base64,{data}"
