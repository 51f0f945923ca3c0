"""`diff`: two runs side by side: what changed in the plan, where they selected the same neurons, and what they measured.

Knows reports and what methods found; knows nothing of how runs come about.
"""

import html
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.metrics import metric as metric_of
from lens_unlearn.evaluation.report import Measure, Report, ends
from lens_unlearn.experiments.loading import load_report
from lens_unlearn.experiments.plan import Plan
from lens_unlearn.experiments.selections import neurons_of, selection_of
from lens_unlearn.interventions.base import Intervention

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Diff", "diff"]

MISSING = "–"
PAIRED, UNPAIRED, UNKNOWN = "paired", "unpaired", "no interval"


@dataclass(frozen=True, eq=False)
class Diff:
    """Two runs side by side; `to_html` writes them as a page."""

    names: tuple[str, str]
    """What the two are called."""
    reports: tuple[Report, Report]
    plan: "pd.DataFrame"
    """What differs of plan, chosen strengths, model, versions and texts: one row each, with the values of both."""
    selections: "pd.DataFrame"
    """One row per part, method and site, and one for all sites ("all"): neurons selected by a, b, both; and the Jaccard index."""
    measures: "pd.DataFrame"
    """One row per part, condition, corpus and metric: a, b, the difference b - a with its interval, and whether that is "paired"
    over the same documents, "unpaired", or there is "no interval"."""

    def to_frame(self) -> "pd.DataFrame":
        """Give the tidy table of what was measured."""
        return self.measures.copy()

    def table(self) -> "pd.DataFrame":
        """Give a small table for reading: the brief metrics of what both measured."""
        import pandas as pd

        rows = [row for row in self.measures.to_dict("records") if _brief(row["metric"])]
        shown = [
            {
                **({"part": row["part"]} if row["part"] else {}),
                "condition": row["condition"],
                "corpus": row["corpus"],
                "metric": row["metric"],
                self.names[0]: _number(row["a"]),
                self.names[1]: _number(row["b"]),
                "difference": _number(row["difference"], "+.3f"),
                "95 % interval": ends(row["low"], row["high"], int(row["units"]), "+.3f") if row["how"] else "",
                "": row["how"],
            }
            for row in rows
        ]
        return pd.DataFrame(shown)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page that opens offline."""
        from lens_unlearn.core.artefacts import replace_file
        from lens_unlearn.reports.diff_page import diff_page

        written = diff_page(self.names, self.plan, self.selections, self.measures, self.table(), self.figures())
        replace_file(path, written.encode(errors="backslashreplace"))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `to_frame` as CSV."""
        from lens_unlearn.core.artefacts import replace_file

        replace_file(path, self.measures.to_csv(index=False).encode(errors="backslashreplace"))

    def figures(self) -> dict[str, Any]:
        """Draw the overlap of what both selected, as far as they selected neurons."""
        from lens_unlearn import figures

        maps = {
            f"{name}: {method}": selection
            for name, report in zip(self.names, self.reports, strict=True)
            for method, edit in report.interventions.items()
            if (selection := selection_of(edit)) is not None
        }
        try:
            return {"Overlap of selections": figures.selection_overlap(maps)} if len(maps) > 1 else {}
        except LensUnlearnError:  # of two models that have not the same neurons
            return {}

    def __str__(self) -> str:
        parts = [f"{self.names[0]} (a) and {self.names[1]} (b)"]
        parts += ["what changed:", self.plan.to_string(index=False)] if len(self.plan) else ["the same plan"]
        if len(self.selections):
            overall = self.selections[self.selections["site"] == "all"]
            parts += ["", "neurons selected:", overall.round(3).to_string(index=False)]
        parts += ["", "b - a:", self.table().to_string(index=False)]
        return "\n".join(parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        plan = self.plan.to_html(index=False) if len(self.plan) else "<p>The same plan.</p>"
        overlap = self.selections.round(3).to_html(index=False) if len(self.selections) else ""
        names = " and ".join(map(html.escape, self.names))
        return f"<div><p>{names}</p>{plan}{overlap}{self.table().to_html(index=False)}</div>"


def diff(a: Report | str | os.PathLike[str], b: Report | str | os.PathLike[str]) -> Diff:
    """Put two runs side by side.

    Where both measured a corpus on the same documents, with the same resamples, the interval of a difference is paired over them.
    Elsewhere it is that of two independent samples, which is wider, and says so ("unpaired").

    Args:
        a: A run: its folder, or its report as `lu.run` and `lu.load_report` return it.
        b: Another one.

    Raises:
        ArtefactError: If a folder holds no run; as `load_report`.
        LensUnlearnError: If nothing was measured in both.
    """
    reports = (_report(a), _report(b))
    names = tuple(_name(one, letter) for one, letter in ((a, "a"), (b, "b")))
    if names[0] == names[1]:
        names = (f"{names[0]} (a)", f"{names[1]} (b)")
    measures = _measures(*reports)
    if not measures["how"].astype(bool).any():
        raise LensUnlearnError(
            f"{names[0]} and {names[1]} measured nothing that could be compared: no corpus has the same name"
        )
    return Diff((names[0], names[1]), reports, _plan(*reports), _selections(*reports), measures)


def _report(run: Any) -> Report:
    if isinstance(run, Report):
        return run
    if isinstance(run, str | os.PathLike):
        return load_report(run)
    raise LensUnlearnError(f"a {type(run).__name__} is no run: give a folder that a run wrote, or a report")


def _name(run: Any, letter: str) -> str:
    return Path(run).name or str(run) if isinstance(run, str | os.PathLike) else letter


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            yield from _flat(one, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _settings(report: Report) -> dict[str, Any]:
    """Return what a run was told, chose and ran on, by name; what was left at its default with the default."""
    about = report.provenance
    usual = {one.name: list(one.default) if isinstance(one.default, tuple) else one.default for one in fields(Plan)}
    given = about.get("plan")
    plan = dict(given) if isinstance(given, Mapping) else {}
    usual = {name: value for name, value in usual.items() if isinstance(value, list | str | int | float | bool | None)}
    chosen = {
        method: {key: value for key, value in choice.items() if not isinstance(value, Mapping | list)}
        for method, choice in (about.get("chosen") or {}).items()
        if isinstance(choice, Mapping)
    }
    corpora = {
        name: {key: one.get(key) for key in ("source", "documents", "tokens", "fingerprint")}
        for name, one in (about.get("corpora") or {}).items()
        if isinstance(one, Mapping)
    }
    whole = {**({**usual, **plan} if plan and "turns" not in plan else plan), "chosen": chosen, "tested on": corpora}
    whole |= {"fingerprint": about.get("fingerprint"), "versions": about.get("versions")}
    return dict(_flat(whole, ""))


def _plan(a: Report, b: Report) -> "pd.DataFrame":
    import pandas as pd

    one, other = _settings(a), _settings(b)
    rows = [
        {"setting": name, "a": one.get(name, MISSING), "b": other.get(name, MISSING)}
        for name in dict.fromkeys([*one, *other])
        if one.get(name, MISSING) != other.get(name, MISSING)
    ]
    return pd.DataFrame(rows, columns=pd.Index(["setting", "a", "b"]))


def _parts(report: Report) -> dict[str, Report]:
    """Return a report and its parts, by name; the whole is ""."""
    return {"": report} | {str(part.provenance.get("forgotten") or part.title): part for part in report.parts}


def _selections(a: Report, b: Report) -> "pd.DataFrame":
    import pandas as pd

    rows: list[dict[str, Any]] = []
    columns = pd.Index(["part", "method", "site", "a", "b", "both", "jaccard"])
    if _shape(a) != _shape(b):
        return pd.DataFrame(rows, columns=columns)  # neurons of two models have nothing in common
    for name, (one, other) in _both(_parts(a), _parts(b)):
        for method, (mine, theirs) in _both(one.interventions, other.interventions):
            rows += [{"part": name, "method": method, **row} for row in _overlap(mine, theirs)]
    return pd.DataFrame(rows, columns=columns)


def _shape(report: Report) -> list[Any]:
    """Return what two models whose neurons correspond have in common."""
    return [(report.provenance.get("fingerprint") or {}).get(name) for name in ("layers", "width", "heads")]


def _overlap(mine: Intervention, theirs: Intervention) -> Iterator[dict[str, Any]]:
    """Count the neurons that two interventions select, at all sites and at each; nothing where one selects none."""
    one, other = neurons_of(mine), neurons_of(theirs)
    if not (one and other):
        return
    none = torch.empty(0, dtype=torch.long)
    counts: dict[str, tuple[int, ...]] = {}
    for site in sorted({*one, *other}):
        mine_there, theirs_there = one.get(site, none), other.get(site, none)
        both = int(torch.isin(mine_there, theirs_there).sum())
        counts[str(site)] = (mine_there.numel(), theirs_there.numel(), both)
    total = tuple(sum(column) for column in zip(*counts.values()))
    for site, (first, second, both) in {"all": total, **counts}.items():
        either = first + second - both
        if either:
            yield {"site": site, "a": first, "b": second, "both": both, "jaccard": both / either}


def _both(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    return ((name, (one[name], other[name])) for name in one if name in other)


def _measures(a: Report, b: Report) -> "pd.DataFrame":
    import pandas as pd

    rows = []
    parts = _parts(a), _parts(b)
    empty = Report({})
    for name in dict.fromkeys([*parts[0], *parts[1]]):
        one, other = (part.get(name, empty) for part in parts)
        for key in dict.fromkeys([*one.measures, *other.measures]):
            known = (one.measures.get(key), other.measures.get(key))
            rows.append(
                {"part": name, **dict(zip(("condition", "corpus", "metric"), key)), **_row(one, other, key[1], *known)}
            )
    columns = ["part", "condition", "corpus", "metric", "a", "b", "difference", "low", "high", "units", "how"]
    return pd.DataFrame(rows, columns=pd.Index(columns))


def _row(a: Report, b: Report, corpus: str, one: Measure | None, other: Measure | None) -> dict[str, Any]:
    """Return the values of both, and their difference with its interval, paired where it can be."""
    values = {"a": np.nan if one is None else one.value, "b": np.nan if other is None else other.value}
    nothing = {"difference": np.nan, "low": np.nan, "high": np.nan, "units": 0, "how": ""}
    if one is None or other is None:
        return {**values, **nothing}
    if not (one.draws.size and one.draws.size == other.draws.size):
        return {**values, **nothing, "difference": other.value - one.value, "how": UNKNOWN}
    how = PAIRED if _same_documents(a, b, corpus) and one.units == other.units else UNPAIRED
    if (
        how == UNPAIRED
    ):  # another resample of each for every draw: what the two share by chance is none of the difference
        one = Measure(one.value, np.roll(one.draws, one.draws.size // 2), one.n, one.units, one.replicates)
    difference = other.minus(one)
    low, high = difference.interval()
    return {**values, "difference": difference.value, "low": low, "high": high, "units": difference.units, "how": how}


def _same_documents(a: Report, b: Report, corpus: str) -> bool:
    """Whether two reports measured a corpus on the same documents, and resampled them alike."""
    texts = [(one.provenance.get("corpora") or {}).get(corpus) or {} for one in (a, b)]
    prints = [one.get("fingerprint") for one in texts]
    resamples = [one.provenance.get("bootstrap") for one in (a, b)]
    return None not in prints and prints[0] == prints[1] and None not in resamples and resamples[0] == resamples[1]


def _brief(name: str) -> bool:
    try:
        return metric_of(name).brief
    except LensUnlearnError:
        return True


def _number(value: float, form: str = ".3f") -> str:
    return MISSING if np.isnan(value) else f"{value:{form}}"
