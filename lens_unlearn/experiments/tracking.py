"""`--track`: a finished run's table and page in an experiment tracker, through accelerate's.

Knows reports and trackers; a run knows nothing of it: what is tracked is what is in its folder, when that is whole.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lens_unlearn.core.artefacts import first_line
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.report import Report

__all__ = ["TRACKERS", "check_tracker", "track"]

TRACKERS = ("tensorboard", "wandb", "mlflow")
PROJECT = "lens-unlearn"
NUMBERS = ("value", "low", "high", "difference")
"""Columns of the table that are logged, by condition, corpus and metric."""
LONGEST = 250
"""Characters of a setting: trackers take no longer ones."""


def check_tracker(name: str) -> None:
    """Refuse a tracker that cannot be used, before any work is done.

    Raises:
        LensUnlearnError: If there is none of that name, or it is not installed.
    """
    if name not in TRACKERS:
        raise LensUnlearnError(f"there is no tracker {name!r}: choose from {', '.join(TRACKERS)}")
    from accelerate.tracking import get_available_trackers

    if name not in [str(getattr(one, "value", one)) for one in get_available_trackers()]:
        raise LensUnlearnError(f"--track {name} needs {name}: pip install 'lens-unlearn[{name}]'")


def track(report: Report, folder: str | os.PathLike[str], name: str) -> None:
    """Log the tidy table, the settings and the page of a finished run, of which nothing is changed.

    Nothing needs a connection: tensorboard and wandb write into a folder of their name beside the run's, wandb offline where nobody
    is logged in (`wandb sync` sends it later), and mlflow to where it is set to, which is files unless somebody said otherwise.

    Args:
        report: The run's report.
        folder: Its folder.
        name: "tensorboard", "wandb" or "mlflow".

    Raises:
        LensUnlearnError: If the tracker cannot be used, or refuses; the run's folder is whole all the same.
    """
    check_tracker(name)
    place = Path(folder)
    try:
        _log(report, place, name)
    except Exception as error:
        raise LensUnlearnError(f"{place} is whole, but {name} did not take it: {first_line(error)}") from error


def _log(report: Report, place: Path, name: str) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    beside = place.absolute().parent
    made: dict[str, dict[str, Any]] = {
        "tensorboard": {"run_name": place.name, "logging_dir": beside / "tensorboard"},
        "wandb": {"run_name": PROJECT, "name": place.name, "dir": str(beside), "mode": _mode()},
        "mlflow": {"experiment_name": PROJECT, "run_name": place.name},
    }
    tracker = LOGGER_TYPE_TO_CLASS[name](**made[name])
    tracker.start()
    try:
        tracker.store_init_configuration(dict(_settings(report.provenance)))
        tracker.log(numbers(report), step=0)
        page = place / "report.html"
        if page.is_file():
            _log_page(tracker, name, page, place)
    finally:
        tracker.finish()


def _log_page(tracker: Any, name: str, page: Path, place: Path) -> None:
    """Log the page as what each tracker has for it; tensorboard shows text alone, so where the page is and the table."""
    if name == "wandb":
        import wandb

        tracker.tracker.log({"report": wandb.Html(page.read_text(encoding="utf-8", errors="replace"))}, step=0)
    elif name == "mlflow":
        for file in ("report.html", "metrics.csv", "run.json"):
            if (place / file).is_file():
                tracker.log_artifact(str(place / file))
    else:
        table = (place / "metrics.csv").read_text(encoding="utf-8", errors="replace")
        tracker.tracker.add_text("report", f"The page: {page.absolute()}\n\n" + _as_code(table), 0)


def _as_code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def numbers(report: Report) -> dict[str, float]:
    """Return the tidy table as trackers take it: one number by "condition/corpus/metric", and its interval's ends.

    These are "condition/corpus/metric.low" and so on: mlflow's files are a folder for each part of a name, and none can be both.
    """
    logged: dict[str, float] = {}
    for row in report.to_frame().to_dict("records"):
        parts = (row.get("forgotten", ""), row["condition"], row.get("corpus", row.get("measured", "")), row["metric"])
        name = "/".join(re.sub(r"[^\w.\- ]", "_", str(part)) for part in parts if part)
        for column in NUMBERS:
            if math.isfinite(row[column]):
                logged[name if column == "value" else f"{name}.{column}"] = float(row[column])
    return logged


def _settings(provenance: Mapping[str, Any]) -> Iterator[tuple[str, bool | str | float | int]]:
    """Give the settings of a plan, and what was chosen, as trackers take them."""
    plan = provenance.get("plan")
    chosen = {f"chosen.{name}": value for name, value in (provenance.get("chosen") or {}).items()}
    for name, value in {
        "model": provenance.get("model"),
        **(plan if isinstance(plan, Mapping) else {}),
        **chosen,
    }.items():
        plain = isinstance(value, bool | str | float | int)
        yield str(name), value if plain and not isinstance(value, str) else _text(value)


def _text(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value, default=str))[:LONGEST]


def _mode() -> str | None:
    """Return how wandb writes: as the environment says; else offline where nobody is logged in, so that it asks nothing."""
    import wandb

    if os.environ.get("WANDB_MODE"):
        return None
    return None if wandb.api.api_key else "offline"
