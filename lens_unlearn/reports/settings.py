"""The settings at the end of a page: how to repeat what it shows.

Knows a report's provenance as a mapping to be written as JSON; `templates/settings.html` writes it.
"""

import json

from lens_unlearn.evaluation.report import Report
from lens_unlearn.reports.samples import cut
from lens_unlearn.reports.templating import render

__all__ = ["settings"]

LIMIT = 200_000


def settings(report: Report) -> str:
    """Write the provenance as it is, folded, and the command that repeats the run if there is one."""
    if not report.provenance:
        return ""
    written = json.dumps(report.provenance, indent=2, default=str, ensure_ascii=False)
    more = f"\n… ({len(written) - LIMIT:,} more characters)" if len(written) > LIMIT else ""
    command = report.provenance.get("command")
    return render("settings.html", command=cut(command) if command else "", settings=written[:LIMIT] + more)
