"""`page`: a report as one HTML document that opens offline and can be read without knowing the tool.

Knows what a page shows of a report, in which order its figures come, and which are folded away; `templates/report.html` arranges
it. Knows nothing of models: what a condition is, the report says.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from markupsafe import Markup

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.conditions import Condition, conditions_of, families
from lens_unlearn.evaluation.report import Report
from lens_unlearn.figures.condition_bars import condition_bars
from lens_unlearn.figures.sweep_curves import sweep_curves
from lens_unlearn.figures.tradeoff import tradeoff
from lens_unlearn.inspection.html import Html, short
from lens_unlearn.reports import summary_table
from lens_unlearn.reports.figure_html import Drawing, drawing, origin
from lens_unlearn.reports.findings import FORGET, RETAIN, controls_of, failures, headline_metric, summary
from lens_unlearn.reports.headline import documents_of, headline
from lens_unlearn.reports.numbers import numbers
from lens_unlearn.reports.samples import written
from lens_unlearn.reports.settings import settings
from lens_unlearn.reports.templating import name, render

__all__ = ["page"]

OPEN_FIGURES = 1
"""Figures besides the trade-off that are not folded away."""


@dataclass(frozen=True)
class Part:
    """What the page shows of one report; what is empty is left out."""

    title: str
    level: int
    """Of its headings."""
    table: str
    """A row a method."""
    headline: list[str]
    failed: dict[str, str]
    lead: str
    first: list[Drawing]
    more: list[Drawing]
    folded: list[Drawing]
    summary: str
    measured: bool
    samples: str
    numbers: str
    settings: str


def page(report: Report) -> str:
    """Write a report as one self-contained HTML document.

    The result in words comes first, then the trade-off, then each method beside its control. What has nothing to show is left
    out: without corpora named "forget" and "retain", for instance, the trade-off.

    Args:
        report: What `evaluate`, `sweep`, or a run measured; its `figures` and `samples` are shown as well.

    Returns:
        The document. It carries plotly.js (about 5 MB), and refers to no address outside itself.
    """
    from plotly.offline import get_plotlyjs

    counter = count()
    parts = [_part(one, counter, number) for number, one in enumerate((report, *report.parts), start=1)]
    model = report.provenance.get("model") or "a language model"
    library = get_plotlyjs() if next(counter) else ""
    return str(render("report.html", model=model, parts=parts, library=library))


def _part(report: Report, counter: Iterator[int], number: int) -> Part:
    """Collect what is shown of one report; figures are numbered over the whole page."""
    first, more, folded, texts = _sorted(report)
    level = 2 if number == 1 else 3
    return Part(
        title=report.title,
        level=level,
        table=summary_table.of_run(report),
        headline=headline(report),
        failed=failures(report),
        lead=_lead(report),
        first=[drawing(next(counter), *figure) for figure in first],
        more=[drawing(next(counter), *figure) for figure in more],
        folded=[drawing(next(counter), *figure) for figure in folded],
        summary=summary(report),
        measured=bool(report.measures),
        samples=written(report, texts, level + 1),
        numbers=numbers(report, number),
        settings=settings(report),
    )


def _sorted(report: Report) -> tuple[list[Any], list[Any], list[Any], list[tuple[str, Markup]]]:
    """Part the figures into the trade-off, those that follow, those that are folded away, and coloured texts."""
    first, bars, others, texts = [], [], [], []
    for title, figure in _figures(report):
        if isinstance(figure, Html):
            texts.append((title, Markup(figure)))  # HTML by construction: `inspection` has escaped the texts in it
        elif origin(figure).get("name") == "tradeoff" and not first:
            first.append((title, figure))
        elif origin(figure).get("name") in ("condition_bars", "sweep_curves"):
            bars.append((title, figure))
        else:
            others.append((title, figure))
    if not others:  # nothing says where it was found
        return first, bars, [], texts
    return first, others[:OPEN_FIGURES], [*bars, *others[OPEN_FIGURES:]], texts


def _lead(report: Report) -> str:
    """Say what was compared, and on which texts."""
    known = report.provenance.get("corpora")
    texts = {c: _details(c, known.get(c) if isinstance(known, dict) else None) for c in report.corpora}
    parsed = conditions_of(report)
    single = [name(c.method) for c in parsed if c.strength is None and not c.control]
    swept = families([c for c in parsed if c.strength is not None and not c.control])
    methods = [*single, *(f"{name(method)} over a range of strengths" for method in swept)]
    kinds = list(dict.fromkeys(controls_of(report).values())) if any(c.control for c in parsed) else None
    protocol = report.provenance.get("protocol", "")
    return render("lead.html", methods=methods, kinds=kinds, texts=texts, protocol=protocol)


def _details(corpus: str, entry: Any) -> list[str]:
    """Say where a corpus is from and how large it is, where the report knows."""
    if not isinstance(entry, dict):
        return []
    tokens = [f"{entry['tokens']:,} tokens"] if isinstance(entry.get("tokens"), int) else []
    return [name(short(entry.get("source", corpus))), *filter(None, [documents_of(entry, " documents")]), *tokens]


def _figures(report: Report) -> Iterator[tuple[str, Any]]:
    """Yield titles and figures in reading order; what a report has no data for is left out.

    A trade-off or sweep among the report's own figures, which may hold more than the report, replaces that of the page.
    """
    metric = headline_metric(report)
    brought = {kind: key for key, figure in report.figures.items() if (kind := origin(figure).get("name"))}
    others = [corpus for corpus in report.corpora if corpus not in (FORGET, RETAIN)]
    single = [c for c in report.conditions if Condition.parse(c).strength is None]
    makers: dict[str, Callable[[str], Any]] = {
        "tradeoff": lambda metric: tradeoff(report, metric=metric),
        "bars": lambda metric: condition_bars(report, metric, conditions=_measured(report, single, metric)),
        "sweep_curves": lambda metric: sweep_curves(report, metric=metric, others=others),
    }
    for kind, make in makers.items():
        if kind in brought:
            yield brought[kind], report.figures[brought[kind]]
        elif metric is not None:
            # Such as no sweep, or no corpus of that name.
            with suppress(LensUnlearnError):
                yield "", make(metric)
    above = {brought[kind] for kind in makers if kind in brought}
    yield from ((key, figure) for key, figure in report.figures.items() if key not in above)


def _measured(report: Report, conditions: list[str], metric: str) -> list[str]:
    return [c for c in conditions if any(key[0] == c and key[2] == metric for key in report.measures)]
