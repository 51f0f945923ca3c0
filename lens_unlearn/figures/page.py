"""`page`: a report as one HTML document that opens offline and can be read without knowing the tool."""

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from html import escape
from itertools import count
from typing import TYPE_CHECKING, Any

from lens_unlearn.errors import LensUnlearnError
from lens_unlearn.figures.bars import condition_bars
from lens_unlearn.figures.conditions import Condition, Estimate, conditions_of, families, words
from lens_unlearn.figures.style import CSS, POLICY, SCRIPT
from lens_unlearn.figures.summary import FORGET, RETAIN, headline_metric, name, summary
from lens_unlearn.figures.sweeps import sweep_curves
from lens_unlearn.figures.theme import short
from lens_unlearn.figures.tradeoff import tradeoff

if TYPE_CHECKING:
    from lens_unlearn.evaluation.report import Report

__all__ = ["page"]

TEXT_LIMIT = 4000
SETTINGS_LIMIT = 200_000
CSV_LIMIT = 2_000_000
OPEN_ROWS = 40
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


def page(report: "Report") -> str:
    """Write a report as one self-contained HTML document.

    What has nothing to show is left out: without corpora named "forget" and "retain", for instance, the trade-off.

    Args:
        report: What `evaluate`, `sweep`, or a run measured; its `figures` and `samples` are shown as well.

    Returns:
        The document. It carries plotly.js (about 5 MB), and refers to no address outside itself.
    """
    from plotly.offline import get_plotlyjs

    counter = count()
    title = f"What was unlearned, and at what cost: {name(report.provenance.get('model') or 'a language model')}"
    body = _body(report, counter, first=True)
    for part in report.parts:
        lead = f"<p class='lead'>{_lead(part)}</p>"
        body += f"<section><h1>{name(part.title or 'Another report')}</h1>{lead}</section>{_body(part, counter)}"
    scripts = f"<script>{get_plotlyjs()}</script><script>{SCRIPT}</script>" if next(counter) else ""
    heading = f"<h1>{title}</h1>" + (f"<h2>{name(report.title)}</h2>" if report.title else "")
    return (
        f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><title>{title}</title>"
        f"<style>{CSS}</style></head><body><header>{heading}<p class='lead'>{_lead(report)}</p></header>"
        f"<main>{body}</main>{scripts}</body></html>"
    )


def _body(report: "Report", counter: Iterator[int], *, first: bool = False) -> str:
    """Write the sections of one report; figures are numbered over the whole page."""
    sections = [
        ("Summary", summary(report)),
        ("What this promises, and what it does not", PROMISES if report.measures and first else ""),
        ("Figures", "".join(_figure(next(counter), *figure) for figure in _figures(report))),
        ("Before and after, in words", _samples(report)),
        ("All numbers", _table(report)),
        ("Settings", _settings(report)),
    ]
    return "".join(f"<section><h2>{heading}</h2>{content}</section>" for heading, content in sections if content)


def _lead(report: "Report") -> str:
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


def _figures(report: "Report") -> Iterator[tuple[str, Any]]:
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
    """Return what `theme.finish` noted in a figure; nothing in figures from elsewhere."""
    meta = figure.to_plotly_json().get("layout", {}).get("meta")
    return meta.get("lens_unlearn", {}) if isinstance(meta, dict) else {}


def _measured(report: "Report", conditions: list[str], metric: str) -> list[str]:
    return [c for c in conditions if any(key[0] == c and key[2] == metric for key in report.measures)]


def _figure(index: int, title: str, figure: Any) -> str:
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
    text = json.dumps(content).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    caption = f"<h3>{name(heading, 200)}</h3>" + (f"<p>{name(subtitle, 1000)}</p>" if subtitle else "")
    return (
        f"<figure><figcaption>{caption}</figcaption><div class='scroll'><div id='figure-{index}' "
        f"style='min-width:{width}px;height:{int(layout.get('height') or 450)}px'></div></div>"
        f"<script type='application/json' data-figure='figure-{index}'>{text}</script></figure>"
    )


def _samples(report: "Report") -> str:
    parts = []
    for sample in report.samples:
        texts = "".join(
            f"<div><h4>{name(condition)}</h4><pre>{_text(text)}</pre></div>"
            for condition, text in sample.items()
            if condition not in ("prompt", "corpus")
        )
        origin = f" from <i>{name(sample['corpus'])}</i>" if "corpus" in sample else ""
        prompt = f"<p class='note'>Prompt{origin}</p><pre>{_text(sample['prompt'])}</pre>" if "prompt" in sample else ""
        parts.append(f"<article>{prompt}<div class='samples'>{texts}</div></article>")
    return "".join(parts)


def _text(text: object) -> str:
    told = str(text)
    more = f" … ({len(told) - TEXT_LIMIT:,} more characters)" if len(told) > TEXT_LIMIT else ""
    return escape(told[:TEXT_LIMIT] + more)


def _table(report: "Report") -> str:
    """Write one row per condition and corpus, one column per metric, and a link to everything as CSV."""
    if not report.measures:
        return ""
    metrics = list(dict.fromkeys(metric for _, _, metric in report.measures))
    head = "".join(f"<th title='{name(words(metric))}'>{name(metric)}</th>" for metric in metrics)
    rows = []
    for condition in report.conditions:
        corpora = [c for c in report.corpora if any((condition, c, m) in report.measures for m in metrics)]
        for index, corpus in enumerate(corpora):
            cells = "".join(_cell(report.measures.get((condition, corpus, metric))) for metric in metrics)
            group = f"<th scope='rowgroup' rowspan='{len(corpora)}'>{name(condition)}</th>" if index == 0 else ""
            opening = "<tr class='first'>" if index == 0 else "<tr>"
            rows.append(f"{opening}{group}<th scope='row'>{name(corpus)}</th>{cells}</tr>")
    table = (
        f"<div class='scroll'><table><thead><tr><th>condition</th><th>corpus</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    if len(rows) > OPEN_ROWS:
        table = f"<details><summary>Show {len(rows)} rows</summary>{table}</details>"
    what = "Values with 95% intervals over documents; losses in nats per token, accuracies as fractions."
    return f"<p class='note'>{what} {_download(report)}</p>{table}"


def _cell(measure: Any) -> str:
    if measure is None:
        return "<td></td>"
    estimate = Estimate.of(measure)
    span = "" if estimate.low != estimate.low else f"<small>[{estimate.low:.3f}, {estimate.high:.3f}]</small>"
    return f"<td>{estimate.value:.3f}{span}</td>"


def _download(report: "Report") -> str:
    table = report.csv()
    if len(table) > CSV_LIMIT:
        return "<span class='download'>As CSV it is too large for this page: write it with to_csv.</span>"
    data = base64.b64encode(table.encode(errors="backslashreplace")).decode()
    link = f"<a download='metrics.csv' href='data:text/csv;charset=utf-8;base64,{data}'>Download as CSV</a>"
    return f"<span class='download'>{link}, with differences to the unedited model.</span>"


def _settings(report: "Report") -> str:
    if not report.provenance:
        return ""
    told = json.dumps(report.provenance, indent=2, default=str, ensure_ascii=False)
    more = f"\n… ({len(told) - SETTINGS_LIMIT:,} more characters)" if len(told) > SETTINGS_LIMIT else ""
    return (
        "<details><summary>Model, texts, seeds and versions</summary>"
        f"<pre>{escape(told[:SETTINGS_LIMIT] + more)}</pre></details>"
    )
