"""`training_curves`: losses and accuracies of the training of an update, from the record that it leaves.

Knows the entries of such a record; trains nothing.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.figures import theme

__all__ = ["training_curves"]

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MAX_POINTS = 1500
"""Points of each line of one training: more than there are pixels cannot be seen."""
MAX_COMPARED = 50
"""Points of each line where there are several trainings: dashes of a line that jumps cannot be followed."""
COLOURS = {"forget": theme.FORGET, "retain": theme.RETAIN}
UNIT = "nats per answer token"
"""Of the losses, unless the record says another."""
CHECKS = "share of answer tokens recalled (accuracy)"
CLIPPED = "share of coordinates clipped"


def training_curves(trainings: Any, title: str | None = None) -> go.Figure:
    """Draw the losses of a training, the accuracy at its checks, and the share of coordinates that Sophia clipped.

    The losses are those of the rows of a step, so they jump from step to step. Accuracy was measured on the whole forget
    corpus, and on the retain documents that were held out of the loss; the step that was returned has a ring.

    Args:
        trainings: What `simu` or `rmu` returned, or several by name; anything that has such a `record`.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If there is no record of a training, or there are more than can be distinguished.

    Examples:
        >>> from types import SimpleNamespace
        >>> losses = [{"step": 1, "forget": 0.5, "retain": 0.4}, {"step": 2, "forget": 0.9, "retain": 0.4}]
        >>> checks = [{"step": 0, "forget": 0.8}, {"step": 2, "forget": 0.3}]
        >>> edit = SimpleNamespace(record={"losses": losses, "checks": checks, "chosen": 2})
        >>> [trace.name for trace in training_curves(edit).data]
        ['forget', 'retain', 'forget', 'step returned']
    """
    records = _records(trainings)
    units = ", ".join(dict.fromkeys(_unit(record) for record in records.values()))
    panels = [f"loss at each step ({units})"]
    if any(_entries(record, "checks") for record in records.values()):
        panels.append(CHECKS)
    if CHECKS in panels and any(
        "clipped" in entry for record in records.values() for entry in _entries(record, "losses")
    ):
        panels.append(CLIPPED)
    heights = [0.42, 0.42, 0.16] if CLIPPED in panels else [1 / len(panels)] * len(panels)
    fig = make_subplots(
        len(panels), 1, shared_xaxes=True, subplot_titles=panels, row_heights=heights, vertical_spacing=0.09
    )
    several = len(records) > 1
    limit = MAX_COMPARED if several else MAX_POINTS
    for (name, record), dash in zip(records.items(), DASHES):
        prefix = f"{theme.plain(name)}: " if several else ""
        _losses(fig, record, dash, prefix, limit)
        _checks(fig, record, dash, prefix)
        if CLIPPED in panels:
            _clipped(fig, record, dash, prefix, limit)
    last = max(e["step"] for record in records.values() for p in ("losses", "checks") for e in _entries(record, p))
    _limit(fig, 1, [r.get("floor") for r in records.values() if _ascends(r)], last, "floor: no ascent beyond")
    if CHECKS in panels:
        _limit(fig, 2, [r.get("aim") for r in records.values()], last, "aim: hardly above the accuracy on unseen texts")
    if several:
        for name, dash in zip(records, DASHES):
            line = {"color": theme.TEXT, "dash": dash, "width": 2}
            fig.add_scatter(x=[None], y=[None], mode="lines", line=line, name=theme.plain(name), hoverinfo="skip")
    if CHECKS in panels:
        fig.update_yaxes(tickformat="~%", rangemode="tozero", row=2, col=1)
    if CLIPPED in panels:
        fig.update_yaxes(tickformat="~%", range=[0, 1.02], nticks=3, row=3, col=1)
    fig.update_xaxes(range=[-0.01 * last, 1.02 * last] if last else None, zeroline=False)
    fig.update_xaxes(title_text="step", row=len(panels), col=1)
    averaged = any(len(_entries(record, "losses")) > limit for record in records.values())
    notes = [
        f"losses of each step's rows{', averaged over neighbouring steps' if averaged else ''}",
        *["accuracy: on the forget corpus, and on retain documents held out of the loss"] * (CHECKS in panels),
        *(_stopped(name if several else "", record) for name, record in records.items()),
    ]
    return theme.finish(
        fig,
        title or "Training curves: losses and accuracy by step",
        " · ".join(note for note in notes if note),
        about=_about(records),
        height=240 * len(panels) - (120 if CLIPPED in panels else 0),
        facets=True,
        provenance={"trainings": {name: record.get("settings", {}) for name, record in records.items()}},
        name="training_curves",
    )


def _records(trainings: Any) -> dict[str, dict[str, Any]]:
    """Return the records by name.

    Raises:
        LensUnlearnError: If one has none.
    """
    named = trainings if isinstance(trainings, Mapping) else {"training": trainings}
    if not 1 <= len(named) <= len(DASHES):
        raise LensUnlearnError(
            f"training_curves draws 1 to {len(DASHES)} trainings, not {len(named)}: draw fewer at a time"
        )
    records = {}
    for name, training in named.items():
        record = getattr(training, "record", None)
        if not isinstance(record, Mapping) or not (_entries(record, "losses") or _entries(record, "checks")):
            raise LensUnlearnError(
                f"training_curves has nothing to draw: {name!r} is a {type(training).__name__} without a record of a "
                "training, which the updates that simu returns have"
            )
        records[str(name)] = dict(record)
    return records


def _unit(record: Mapping[str, Any]) -> str:
    return str(record.get("unit", UNIT))


def _entries(record: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    return list(record.get(part) or [])


def _ascends(record: Mapping[str, Any]) -> bool:
    """Say whether the objective raises the forget loss, up to the floor."""
    named = record.get("settings", {}).get("loss", "graddiff") in ("graddiff", "gradient_ascent")
    return bool(record.get("ascends", named))  # an older file has no such word


def _losses(fig: go.Figure, record: Mapping[str, Any], dash: str, prefix: str, limit: int) -> None:
    entries = _entries(record, "losses")
    for corpus in COLOURS:
        # Without a retain corpus its loss is noted as 0.
        if corpus == "retain" and "retain" in record and record["retain"] is None:
            continue
        refused = corpus == "forget" and record.get("refuses", record.get("settings", {}).get("loss") == "po")
        label = f"{prefix}{corpus}{' (of the refusals)' if refused else ''}"
        _line(fig, 1, entries, corpus, dash, label, f"%{{y:.3f}} {_unit(record)}", name=corpus, limit=limit)


def _checks(fig: go.Figure, record: Mapping[str, Any], dash: str, prefix: str) -> None:
    entries = _entries(record, "checks")
    for corpus in COLOURS:
        _line(fig, 2, entries, corpus, dash, f"{prefix}{corpus}", "%{y:.1%} of answer tokens recalled", name=corpus)
    chosen = [entry for entry in entries if entry["step"] == record.get("chosen")][-1:]
    points = [(entry["step"], entry[corpus]) for entry in chosen for corpus in COLOURS if corpus in entry]
    if points:
        fig.add_scatter(
            x=[step for step, _ in points],
            y=[share for _, share in points],
            mode="markers",
            marker={"symbol": "circle-open", "size": 15, "color": theme.TEXT, "line": {"width": 2}},
            name="step returned",
            legendgroup="step returned",
            legendrank=1050,
            showlegend=theme.is_first(fig, "step returned"),
            hoverinfo="skip",
            row=2,
            col=1,
        )


def _clipped(fig: go.Figure, record: Mapping[str, Any], dash: str, prefix: str, limit: int) -> None:
    entries = [entry for entry in _entries(record, "losses") if "clipped" in entry]
    label = f"{prefix}clipped"
    _line(fig, 3, entries, "clipped", dash, label, "%{y:.1%} of coordinates", name="clipped", limit=limit)


def _line(
    fig: go.Figure,
    row: int,
    entries: Sequence[Mapping[str, Any]],
    key: str,
    dash: str,
    label: str,
    unit: str,
    *,
    name: str,
    limit: int = MAX_POINTS,
) -> None:
    """Draw one quantity over the steps; values that are not finite leave gaps."""
    points = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
    if not points:
        return
    colour = COLOURS.get(key, theme.CONTROL)
    steps, values = _thinned(points, limit)
    fig.add_scatter(
        x=steps,
        y=values,
        mode="lines+markers" if row == 2 or len(steps) == 1 else "lines",
        line={"color": colour, "dash": dash, "width": 1.5 if row == 1 else 2},
        marker={"size": 6, "color": colour, "symbol": "circle" if key == "forget" else "square"},
        name=name,
        legendgroup=name,
        showlegend=name in COLOURS and theme.is_first(fig, name),
        hovertemplate=f"<b>{label}</b><br>step %{{x}}<br>{unit}<extra></extra>",
        row=row,
        col=1,
    )


def _thinned(points: Sequence[tuple[int, float]], limit: int) -> tuple[list[int], list[float | None]]:
    """Average neighbouring steps where there are more points than can be seen."""
    # The losses of single steps are noisy: every n-th of them would show noise as if it were the course, a mean does not.
    parts = np.array_split(np.array(points, dtype=float), min(len(points), limit))
    values = [float(part[:, 1].mean()) for part in parts]
    return [round(part[:, 0].mean()) for part in parts], [value if math.isfinite(value) else None for value in values]


def _limit(fig: go.Figure, row: int, values: Sequence[float | None], last: int, name: str) -> None:
    """Draw a dotted line at each value."""
    for value in dict.fromkeys(value for value in values if value is not None):
        fig.add_scatter(
            x=[0, last],
            y=[value, value],
            mode="lines",
            line={"color": theme.TEXT, "dash": "dot", "width": 1.5},
            name=name,
            legendgroup=name,
            legendrank=1100,
            showlegend=theme.is_first(fig, name),
            hovertemplate=f"<b>{name}</b><br>%{{y:.3f}}<extra></extra>",
            row=row,
            col=1,
        )


def _stopped(name: str, record: Mapping[str, Any]) -> str:
    reason = record.get("stopped")
    return f"{name}{' ' if name else ''}stopped early: {reason}" if reason else ""


def _about(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Name the corpora, where all trainings have the same ones, and how one was trained."""
    parts = []
    for corpus in COLOURS:
        names = {str(part["name"]) for r in records.values() if isinstance(part := r.get(corpus), Mapping)}
        if len(names) == 1:
            parts.append(f"{corpus}: {theme.short(names.pop())}")
    if len(records) == 1:
        (record,) = records.values()
        settings = record.get("settings", {})
        parts += [str(settings[key]) for key in ("optimizer", "loss") if key in settings]
    return " · ".join(parts)
