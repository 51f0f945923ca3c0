"""`audit_page`: what an audit found as one HTML document: a sentence a condition, the heat map, curves, and the whole table.

Knows what is said of a condition, and from which numbers; `templates/audit.html` writes it. Knows nothing of how anybody was asked.
"""

import json
from dataclasses import dataclass

from lens_unlearn.audit.attack import RECOVERED, REFERENCE, SCORE, Attack
from lens_unlearn.audit.audit import Audit
from lens_unlearn.audit.layers import COUNTS_FROM
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.conditions import SUFFIX, Estimate
from lens_unlearn.evaluation.report import BASE, Measure
from lens_unlearn.reports.figure_html import drawing
from lens_unlearn.reports.numbers import CSV_LIMIT, csv_data
from lens_unlearn.reports.settings import LIMIT
from lens_unlearn.reports.templating import render

__all__ = ["audit_page"]

LITTLE = 0.1
"""A share below which nothing is said to come back."""


@dataclass(frozen=True)
class Sentence:
    """What the page says of one condition first."""

    condition: str
    control: bool
    before: Estimate
    after: Estimate
    best: Attack | None
    """The attack that brings back most; None without a reference, or where none brings back anything worth a word."""
    share: Estimate | None
    layers: str
    """At which layers patching finds it; "" for none."""


def audit_page(found: Audit) -> str:
    """Write an audit as one self-contained HTML document, which refers to no address outside itself.

    Args:
        found: What `lu.audit` returned.
    """
    from plotly.offline import get_plotlyjs

    try:
        figures = [drawing(number, title, one) for number, (title, one) in enumerate(found.figures.items())]
    except LensUnlearnError:  # no attack could be made
        figures = []
    table = found.csv()
    written = json.dumps(found.provenance, indent=2, default=str, ensure_ascii=False)
    asked = [name for name in found.conditions if name not in (BASE, REFERENCE)]
    return str(
        render(
            "audit.html",
            model=found.provenance.get("model") or "a language model",
            facts=found.provenance.get("facts") or {},
            reference=found.provenance.get("reference") if found.has_reference else None,
            sentences=[_sentence(found, name) for name in asked],
            figures=figures,
            attacks=found.attacks,
            left_out=found.left_out,
            notes=found.notes,
            conditions=found.conditions,
            answers={name: Estimate.of(one) for name, one in found.answers.items()},
            scores={key: Estimate.of(one) for key, one in found.measures.items() if key[2] in (SCORE, RECOVERED)},
            data=csv_data(table) if len(table) <= CSV_LIMIT else "",
            settings=render("settings.html", command=found.provenance.get("command", ""), settings=written[:LIMIT]),
            library=get_plotlyjs() if figures else "",
        )
    )


def _sentence(found: Audit, condition: str) -> Sentence:
    shares: list[tuple[Attack, Measure]] = [
        (attack, one)
        for attack in found.attacks
        if (one := found.measures.get((condition, attack.name, RECOVERED))) is not None
    ]
    best, share = max(shares, key=lambda pair: pair[1].value, default=(None, None))
    return Sentence(
        condition=condition,
        control=condition.endswith(SUFFIX),
        before=Estimate.of(found.answers[BASE]),
        after=Estimate.of(found.answers[condition]),
        best=best if share is not None and share.value >= LITTLE else None,
        share=None if share is None else Estimate.of(share),
        layers=_layers(found, condition),
    )


def _layers(found: Audit, condition: str) -> str:
    """Name the layers at which patching finds more than half of what the reference lacks there."""
    lost, whole = (found.curve(one, "depth", "drop") for one in (condition, REFERENCE))
    holding = [
        int(layer)
        for layer, one in whole.items()
        if one.value > COUNTS_FROM and layer in lost and lost[layer].value < one.value / 2
    ]
    if not holding:
        return ""
    whole_run = holding == [*range(holding[0], holding[-1] + 1)]
    if len(holding) == 1:
        return f"layer {holding[0]}"
    return f"layers {holding[0]} to {holding[-1]}" if whole_run else f"layers {', '.join(map(str, holding))}"
