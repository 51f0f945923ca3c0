"""`page`: a report as one HTML document that opens offline and can be read without knowing the tool."""

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from html import escape
from itertools import count
from typing import Any

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.conditions import Condition, Estimate, conditions_of, families, words
from lens_unlearn.evaluation.report import Report
from lens_unlearn.figures.condition_bars import condition_bars
from lens_unlearn.figures.sweep_curves import sweep_curves
from lens_unlearn.figures.tradeoff import tradeoff
from lens_unlearn.inspection.html import Html, short
from lens_unlearn.reports.findings import FORGET, RETAIN, headline_metric, name, summary
from lens_unlearn.reports.headline import headline
from lens_unlearn.reports.samples import cut, written
from lens_unlearn.reports.style import CSS, POLICY, SCRIPT

__all__ = ["page"]

SETTINGS_LIMIT = 200_000
CSV_LIMIT = 2_000_000
OPEN_ROWS = 40
OPEN_FIGURES = 2
"""Figures besides the trade-off, the bars and the sweep that are not folded away."""
PANEL_WIDTH = 300

PROMISES = """
<p>These numbers say how much worse the edited model predicts these texts, and what that costs elsewhere. They do not
say that the knowledge is gone: other prompts, a little fine-tuning, or another way of asking may bring it out.</p>
<p>A removable hook is an experiment, not a deletion: whoever detaches it has everything back. The weights are
unchanged.</p>
<p>The intervals show how the values would vary with other documents of the same kind; not with another model,
another choice of forget and retain texts, or another seed of the method.</p>
"""


CONTROLS = (
    ", each beside its control: as many neurons of every layer, chosen at random, or, for a method that judges prompts, "
    "the same method fitted to shuffled labels, or, for a trained update, random numbers of the same norm in each matrix. "
)


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
    title = f"What was unlearned, and at what cost: {name(report.provenance.get('model') or 'a language model')}"
    body = _body(report, counter, 2)
    for number, part in enumerate(report.parts, start=2):
        heading = f"<h2 class='part' id='part-{number}'>{name(part.title or 'Another report')}</h2>"
        body += f"{heading}{_told(headline(part))}{_body(part, counter, 3, number)}"
    library = get_plotlyjs() if next(counter) else ""
    scripts = f"<script>{library}</script><script>{SCRIPT}</script>" if library else ""
    heading = f"<h1>{title}</h1>" + (f"<p class='subtitle'>{name(report.title)}</p>" if report.title else "")
    head = (
        f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><title>{title}</title>"
        f"<style>{CSS}</style></head><body><header>{heading}{_told(headline(report) or [_lead(report)])}"
        f"{_contents(report)}</header><main>{body}</main>"
    )
    return f"{head}{_size(len(head) + len(scripts), len(library))}{scripts}</body></html>"


def _told(sentences: list[str]) -> str:
    """Write the result, a paragraph for each sentence."""
    return f"<div class='headline'><p>{'</p><p>'.join(sentences)}</p></div>" if sentences else ""


def _contents(report: Report) -> str:
    """List the further reports of the page, each with its result."""
    items = "".join(
        f"<li><a href='#part-{number}'>{name(part.title or 'Another report')}</a></li>"
        for number, part in enumerate(report.parts, start=2)
    )
    return (
        f"<nav aria-label='Further reports'><p class='note'>Further down this page:</p><ol>{items}</ol></nav>"
        if items
        else ""
    )


def _size(characters: int, library: int) -> str:
    drawing = f", of which {library / 1e6:.1f} MB draw the figures (plotly.js)" if library else ""
    return (
        f"<footer><p class='note'>This page is one file of {max(0.1, characters / 1e6):.1f} MB{drawing}. It opens offline, and "
        "asks no other address for anything.</p></footer>"
    )


def _body(report: Report, counter: Iterator[int], level: int, number: int = 1) -> str:
    """Write the sections of one report, with headings from a level on; figures are numbered over the whole page."""
    first, more, folded, texts = _sorted(report)

    def drawn(figures: list[tuple[str, Any]]) -> str:
        return "".join(_figure(next(counter), *figure, level + 1) for figure in figures)

    above, below, rest = drawn(first), drawn(more), drawn(folded)
    if rest:
        what = f"{len(folded)} more figures" if len(folded) > 1 else "One more figure"
        rest = f"<details><summary>{what}: neurons, activations, distributions</summary>{rest}</details>"
    sections = [
        ("What was lost, and what it cost", above),
        ("Method by method", summary(report)),
        ("How sure this is, and what it does not say", PROMISES if report.measures and number == 1 else ""),
        ("Before and after, in words", written(report, texts, level + 1)),
        ("Where it was found, and what is left" if first else "Figures", below + rest),
        ("All numbers", _table(report, number)),
        ("How it was done", (f"<p>{_lead(report)}</p>" if headline(report) or level > 2 else "") + _settings(report)),
    ]
    return "".join(
        f"<section><h{level}>{heading}</h{level}>{content}</section>" for heading, content in sections if content
    )


def _sorted(report: Report) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Part the figures into the trade-off, those that follow, those that are folded away, and coloured texts."""
    own, texts = list(_figures(report)), []
    first, more, others = [], [], []
    for title, figure in own:
        if isinstance(figure, Html):
            texts.append((title, figure))
        elif _own(figure).get("name") == "tradeoff" and not first:
            first.append((title, figure))
        elif _own(figure).get("name") in ("condition_bars", "sweep_curves"):
            more.append((title, figure))
        else:
            others.append((title, figure))
    shown = OPEN_FIGURES if len(others) > OPEN_FIGURES + 1 else len(others)  # one alone is not worth folding away
    return first, [*others[:shown], *more], others[shown:], texts


def _lead(report: Report) -> str:
    """Say what was compared, and on which texts."""
    known = report.provenance.get("corpora")
    told = []
    for corpus in report.corpora:
        entry = known.get(corpus) if isinstance(known, dict) else None
        part = f"<i>{name(corpus)}</i>"
        if isinstance(entry, dict):
            sizes = [f"{entry[key]:,} {key}" for key in ("documents", "tokens") if isinstance(entry.get(key), int)]
            part += f" ({', '.join([name(short(entry.get('source', corpus))), *sizes])})"
        told.append(part)
    parsed = conditions_of(report)
    single = [name(c.method) for c in parsed if c.strength is None and not c.control]
    swept = families([c for c in parsed if c.strength is not None and not c.control])
    methods = [*single, *(f"{name(method)} over a range of strengths" for method in swept)]
    compared = f"The unedited model against {', '.join(methods)}" if methods else "The unedited model alone"
    compared += CONTROLS if any(c.control for c in parsed) else ". "
    return f"{compared}Texts: {'; '.join(told)}." if told else "This report is empty: nothing was evaluated."


def _figures(report: Report) -> Iterator[tuple[str, Any]]:
    """Yield titles and figures in reading order; what a report has no data for is left out.

    A trade-off or sweep among the report's own figures, which may hold more than the report, replaces that of the page.
    """
    metric = headline_metric(report)
    brought = {name: key for key, figure in report.figures.items() if (name := _own(figure).get("name"))}
    others = [corpus for corpus in report.corpora if corpus not in (FORGET, RETAIN)]
    single = [c for c in report.conditions if Condition.parse(c).strength is None]
    makers: dict[str, Callable[[str], Any]] = {
        "tradeoff": lambda metric: tradeoff(report, metric=metric),
        "bars": lambda metric: condition_bars(report, metric, conditions=_measured(report, single, metric)),
        "sweep_curves": lambda metric: sweep_curves(report, metric=metric, others=others),
    }
    for name, make in makers.items():
        if name in brought:
            yield brought[name], report.figures[brought[name]]
        elif metric is not None:
            # Such as no sweep, or no corpus of that name.
            with suppress(LensUnlearnError):
                yield "", make(metric)
    above = {brought[name] for name in makers if name in brought}
    yield from ((key, figure) for key, figure in report.figures.items() if key not in above)


def _own(figure: Any) -> dict[str, Any]:
    """Return what `theme.finish` noted in a figure; nothing in figures from elsewhere, and in coloured texts."""
    if isinstance(figure, Html):
        return {}
    meta = figure.to_plotly_json().get("layout", {}).get("meta")
    return meta.get("lens_unlearn", {}) if isinstance(meta, dict) else {}


def _measured(report: Report, conditions: list[str], metric: str) -> list[str]:
    return [c for c in conditions if any(key[0] == c and key[2] == metric for key in report.measures)]


def _figure(index: int, title: str, figure: Any, level: int = 3) -> str:
    """Write a figure as JSON that the script draws, its title and subtitle as text, which wraps on a phone."""
    content = json.loads(figure.to_json())
    layout = content.setdefault("layout", {})
    layout.pop("meta", None)  # of the figure's origin, of which the page has said its own
    own = _own(figure)
    heading = title or own.get("title", "")
    told = [own.get("title", "") if heading != own.get("title") else "", own.get("subtitle", "")]
    told.insert(1, "" if own.get("name") in ("tradeoff", "sweep_curves", "condition_bars") else own.get("about", ""))
    subtitle = " · ".join(part for part in told if part)
    subtitle = subtitle[:1].upper() + subtitle[1:]
    if own:
        layout.pop("title", None)
        layout.pop("width", None)
        top = 56 if own.get("headings") else 34  # room for the buttons that plotly puts there
        removed = layout.get("margin", {}).get("t", top) - top
        layout["margin"] = {**layout.get("margin", {}), "t": top}
        layout["height"] = layout.get("height", 450) - removed
    width = PANEL_WIDTH * own.get("columns", 1) if own.get("columns", 1) > 1 else 0
    height = int(layout.get("height") or 450)
    text = json.dumps(content).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    caption = f"<h{level}>{name(heading, 200)}</h{level}>" + (f"<p>{name(subtitle, 1000)}</p>" if subtitle else "")
    said = name(". ".join(part for part in (heading, subtitle) if part), 1000) or "Figure"
    return (
        f"<figure><figcaption>{caption}</figcaption><div class='scroll'{_focus(said) if width else ''}>"
        f"<div id='figure-{index}' role='img' aria-label='{said}' "
        f"style='min-width:{width}px;height:{height}px'></div></div>"
        f"<script type='application/json' data-figure='figure-{index}'>{text}</script></figure>"
    )


def _focus(said: str) -> str:
    """Let a box that scrolls be reached with the keyboard."""
    return f" tabindex='0' role='region' aria-label='{said}'"


def _table(report: Report, number: int = 1) -> str:
    """Write one row per condition and corpus, one column per metric, and a link to everything as CSV."""
    if not report.measures:
        return ""
    metrics = list(dict.fromkeys(metric for _, _, metric in report.measures))
    head = "".join(f"<th scope='col' title='{name(words(metric))}'>{name(metric)}</th>" for metric in metrics)
    rows = []
    for condition in report.conditions:
        corpora = [c for c in report.corpora if any((condition, c, m) in report.measures for m in metrics)]
        for index, corpus in enumerate(corpora):
            cells = "".join(_cell(report.measures.get((condition, corpus, metric))) for metric in metrics)
            group = f"<th scope='rowgroup' rowspan='{len(corpora)}'>{name(condition)}</th>" if index == 0 else ""
            opening = "<tr class='first'>" if index == 0 else "<tr>"
            rows.append(f"{opening}{group}<th scope='row'>{name(corpus)}</th>{cells}</tr>")
    table = (
        f"<div class='scroll'{_focus('All numbers')}><table><thead><tr><th scope='col'>condition</th>"
        f"<th scope='col'>corpus</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    if len(rows) > OPEN_ROWS:
        table = f"<details class='numbers'><summary>Show {len(rows)} rows</summary>{table}</details>"
    what = "Values with 95% intervals over documents; losses in nats per token, accuracies as fractions."
    return f"<p class='note'>{what} {_download(report, number)}</p>{table}"


def _cell(measure: Any) -> str:
    if measure is None:
        return "<td></td>"
    estimate = Estimate.of(measure)
    if estimate.value != estimate.value:
        return "<td>–</td>"
    span = "" if estimate.low != estimate.low else f"<small>[{estimate.low:.3f}, {estimate.high:.3f}]</small>"
    return f"<td>{estimate.value:.3f}{span}</td>"


def _download(report: Report, number: int) -> str:
    table = report.csv()
    if len(table) > CSV_LIMIT:
        return "<span class='download'>As CSV it is too large for this page: write it with to_csv.</span>"
    data = base64.b64encode(table.encode(errors="backslashreplace")).decode()
    file = "metrics.csv" if number == 1 else f"metrics-{number}.csv"
    link = f"<a download='{file}' href='data:text/csv;charset=utf-8;base64,{data}'>Download as CSV</a>"
    return f"<span class='download'>{link}, with differences to the unedited model.</span>"


def _settings(report: Report) -> str:
    if not report.provenance:
        return ""
    told = json.dumps(report.provenance, indent=2, default=str, ensure_ascii=False)
    more = f"\n… ({len(told) - SETTINGS_LIMIT:,} more characters)" if len(told) > SETTINGS_LIMIT else ""
    command = report.provenance.get("command")
    repeat = f"<p>To repeat it:</p><pre class='prompt'>{cut(command)}</pre>" if command else ""
    return (
        f"<details><summary>Settings: {'the command that repeats it, ' if command else ''}model, texts, seeds and versions"
        f"</summary>{repeat}<pre>{escape(told[:SETTINGS_LIMIT] + more)}</pre></details>"
    )
