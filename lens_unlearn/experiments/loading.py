"""`load_report`: a run's folder back as the report that it was, or as much of it as earlier versions kept.

Knows the files of a run's folder; knows nothing of how they came about.
"""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_unlearn.core.errors import ArtefactError, LensUnlearnError
from lens_unlearn.evaluation.report import Measure, Report
from lens_unlearn.experiments.compare import Comparison
from lens_unlearn.experiments.output import files_of_run, settings_of_run
from lens_unlearn.experiments.report_file import REPORT_FILE, read_report
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.interventions.files import load_intervention

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TableReport", "load_report"]

OTHERS = {
    "bench.html": "a benchmark, whose scores are in scores.csv",
    "audit.html": "an audit, which is in audit.csv",
    "graph.html": "a skill graph, which lu.load_skill_graph reads",
}
"""What other commands write, by the page that only they write."""
NOT_KEPT = "the draws behind its intervals, its figures and its samples"


@dataclass(frozen=True, eq=False, repr=False)
class TableReport(Report):
    """A report of which only the table is known: intervals are those that it states, and further ones cannot be computed."""

    frame: "pd.DataFrame | None" = None

    def to_frame(self) -> "pd.DataFrame":
        """Give the table as it was written."""
        assert self.frame is not None
        return self.frame.copy()


def load_report(folder: str | os.PathLike[str]) -> Report:
    """Read the report of a run: its table with all intervals, its figures, samples and settings, and what each method found.

    `Report.to_frame` is the tidy table, `Report.to_html` writes the page again, and `Report.interventions` holds what the methods
    found, ready for a model. Of a comparison it is the `Comparison`, of a demo run the report with its parts.

    Folders of earlier versions hold the table alone, and a warning says what is missing: values and intervals are as they were
    written, while draws, figures and samples are not there.

    Args:
        folder: What `lens-unlearn run`, `compare`, `evaluate` or `demo` wrote, or `lu.run`.

    Raises:
        ArtefactError: If there is no such folder, it holds no run, or a file of the run is missing or damaged.
        LensUnlearnError: If it holds a benchmark, an audit or a skill graph.

    Examples:
        ```python
        report = lu.load_report("runs/code")
        report.to_frame()
        with report.interventions["selective-pruning"].on(model):
            ...
        ```
    """
    place = Path(folder)
    if not place.is_dir():
        raise ArtefactError(f"there is no folder {place}: give the --out of a run")
    settings, files = settings_of_run(place), files_of_run(place)
    if settings is None or files is None:
        raise ArtefactError(f"{place} holds no finished run: give the --out of one")
    for page, what in OTHERS.items():
        if page in files:
            raise LensUnlearnError(
                f"{place} holds {what}: load_report reads what run, compare, evaluate and demo write"
            )
    if REPORT_FILE not in files:
        return _of_an_earlier_version(place, settings)
    report = _with_interventions(read_report(place / REPORT_FILE), place, files)
    if "skills" in report.provenance:
        own = {one.name: getattr(report, one.name) for one in fields(Report)}
        parts = (
            _with_interventions(one, place / str(one.provenance["forgotten"]), files, place) for one in report.parts
        )
        return Comparison(**{**own, "parts": tuple(parts)})
    below = {one.parent: one for one in map(Path, files) if one.name == "run.json" and one.parent != Path()}
    parts = list(report.parts)
    for name, number in {"the-other-way-round": 0, "persons": 1}.items():
        if Path(name) in below and number < len(parts):
            parts[number] = _with_interventions(parts[number], place / name, files, place)
    return replace(report, parts=tuple(parts))


def _with_interventions(report: Report, place: Path, files: list[str], root: Path | None = None) -> Report:
    """Add what each method found: the intervention files of a run in a folder, by their names."""
    found: dict[str, Intervention] = {}
    for name in files:
        path = (root or place) / name
        if path.parent == place and path.suffix == ".safetensors" and path.name != REPORT_FILE:
            found[path.stem] = load_intervention(path)
    return replace(report, interventions=found)


def _of_an_earlier_version(place: Path, settings: Mapping[str, Any]) -> Report:
    """Read the table of a run that kept nothing else."""
    import pandas as pd

    table = place / ("matrix.csv" if "skills" in settings else "metrics.csv")
    try:
        frame = pd.read_csv(table)
        if "skills" in settings:
            skills = list(dict.fromkeys(frame["forgotten"].astype(str)))
            parts = tuple(_part(frame.query("forgotten == @skill"), str(skill), settings) for skill in skills)
            report: Report = Report({}, dict(settings), title=f"Forget {', '.join(skills)}, each in turn", parts=parts)
        else:
            report = TableReport(_measures(frame), dict(settings), frame=frame)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ArtefactError(f"{table} is no table of a run that can be read: {error}") from error
    warnings.warn(
        f"{place} is of an earlier version ({settings['versions']['lens_unlearn']}), which did not keep {NOT_KEPT}: "
        "differences between its conditions have no intervals but those of its table",
        UserWarning,
        stacklevel=3,
    )
    names = files_of_run(place) or []
    return _with_interventions(report, place, [name for name in names if (place / name).is_file()])


def _part(frame: "pd.DataFrame", skill: str, settings: Mapping[str, Any]) -> TableReport:
    """Make the report of one forgotten skill of its rows in the matrix."""
    rows = frame.rename(columns={"measured": "corpus"})
    rows["corpus"] = rows["corpus"].replace({skill: "forget"})
    return TableReport(_measures(rows), {**settings, "forgotten": skill}, title=f"Forget {skill}", frame=rows)


def _measures(frame: "pd.DataFrame") -> dict[tuple[str, str, str], Measure]:
    import numpy as np

    return {
        (str(row["condition"]), str(row["corpus"]), str(row["metric"])): Measure(
            float(row["value"]),
            np.empty(0),
            int(row["n"]),
            int(row.get("units", 0)),
            stated=(float(row["low"]), float(row["high"])),
        )
        for row in frame.to_dict("records")
    }
