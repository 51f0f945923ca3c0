"""`benchmark_page`: what a benchmark found as one HTML document: the official scores first, then their parts, and some texts.

Knows which numbers come first; `templates/benchmark.html` writes them. Knows nothing of how anybody was asked.
"""

import json

from lens_unlearn.benchmarks.result import BenchmarkResult
from lens_unlearn.evaluation.conditions import Estimate
from lens_unlearn.reports.numbers import CSV_LIMIT, csv_data
from lens_unlearn.reports.settings import LIMIT
from lens_unlearn.reports.templating import render

__all__ = ["benchmark_page"]

TEXTS = 6
"""Items of which the page shows what everybody wrote."""
LONGEST = 600
"""Characters of a text that it shows."""


def benchmark_page(found: BenchmarkResult) -> str:
    """Write a benchmark's result as one self-contained HTML document, which refers to no address outside itself.

    Args:
        found: What `lu.benchmarks.NAME` returned.
    """
    table = found.csv()
    written = json.dumps(found.provenance, indent=2, default=str, ensure_ascii=False)
    return str(
        render(
            "benchmark.html",
            benchmark=found.benchmark,
            model=found.provenance.get("model") or "a language model",
            reference=found.provenance.get("reference"),
            conditions=found.conditions,
            official=found.official,
            parts=[one for one in found.metrics if one not in found.official],
            scores={key: Estimate.of(one) for key, one in found.measures.items()},
            notes=found.notes,
            samples=_samples(found),
            data=csv_data(table) if len(table) <= CSV_LIMIT else "",
            settings=render("settings.html", command=found.provenance.get("command", ""), settings=written[:LIMIT]),
            library="",
        )
    )


def _samples(found: BenchmarkResult) -> list[dict[str, object]]:
    """Return the first items of each task and split, with what everybody wrote."""
    seen: dict[tuple[str, str], int] = {}
    for number, item in enumerate(found.data.items):
        seen.setdefault((item.task, item.split), number)
    return [
        {
            "item": found.data.items[number],
            "prompt": found.data.items[number].prompt[-LONGEST:],
            "reference": found.data.items[number].reference[:LONGEST],
            "texts": {
                name: (several[0].texts[number] or "")[:LONGEST]
                for name, several in found.raw.items()
                if several[0].texts
            },
        }
        for number in [*seen.values()][:TEXTS]
    ]
