"""`--track`: the finished run's table and page in a tracker, of which the run itself knows nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line_helpers import call

import lens_unlearn as lu
from lens_unlearn.evaluation.report import Measure, Report
from lens_unlearn.experiments import running, tracking

PLAN = {"forget": "a", "tokens": 5, "settings": {"fraction": 0.1}, "window": None, "template": "x" * 400}


@pytest.fixture
def report() -> Report:
    draws = np.linspace(0.4, 0.6, 20)
    keys = [("base", "forget", "top1"), ("edit:control", "for@get", "top1"), ("edit", "forget", "top1")]
    measures = {key: Measure(0.5, draws, 30, 12) for key in keys} | {
        ("edit", "forget", "kl"): Measure(float("nan"), draws, 3)
    }
    return Report(measures, {"model": "demo", "plan": PLAN, "chosen": {"edit": {"fraction": 0.1}}})


class Kept:
    """A tracker that keeps what it is given."""

    def __init__(self, **made: Any) -> None:
        self.made, self.seen = made, dict[str, Any]()
        self.tracker = self
        last.append(self)

    def start(self) -> None:
        self.seen["started"] = True

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.seen["settings"] = values

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        if broken:
            raise ConnectionError("nobody answers\nat all")
        self.seen["numbers"] = values

    def log_artifact(self, path: str) -> None:
        self.seen.setdefault("files", []).append(Path(path).name)

    def add_text(self, name: str, text: str, step: int) -> None:
        self.seen["text"] = text

    def finish(self) -> None:
        self.seen["finished"] = True


last: list[Kept] = []
broken: list[bool] = []


@pytest.fixture(autouse=True)
def trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.tracking

    last.clear()
    broken.clear()
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["tensorboard", "mlflow"])
    monkeypatch.setattr(accelerate.tracking, "LOGGER_TYPE_TO_CLASS", {"tensorboard": Kept, "mlflow": Kept})


@pytest.fixture
def folder(report: Report, tmp_path: Path) -> Path:
    out = tmp_path / "runs" / "one"
    out.mkdir(parents=True)
    (out / "report.html").write_text("<p>page</p>")
    report.to_csv(out / "metrics.csv")
    return out


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_the_table_the_settings_and_the_page_are_logged(name: str, report: Report, folder: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    tracking.track(report, folder, name)
    [kept] = last
    assert kept.made["run_name"] == "one"
    assert kept.seen["numbers"]["base/forget/top1"] == 0.5
    assert kept.seen["numbers"]["edit_control/for_get/top1.low"] == report["base", "forget", "top1"].interval()[0]
    assert kept.seen["numbers"]["edit/forget/top1.difference"] == 0.0
    names = set(kept.seen["numbers"])
    assert not [name for name in names if any(other.startswith(f"{name}/") for other in names)], "a file or a folder"
    assert not any(np.isnan(value) for value in kept.seen["numbers"].values())
    settings = kept.seen["settings"]
    assert (settings["tokens"], settings["settings"], settings["model"]) == (5, '{"fraction": 0.1}', "demo")
    assert len(settings["template"]) == tracking.LONGEST
    assert all(isinstance(value, bool | str | int | float) for value in settings.values())
    if name == "mlflow":
        assert kept.seen["files"] == ["report.html", "metrics.csv"]
    else:
        assert kept.made["logging_dir"] == folder.parent / "tensorboard", (
            "not in the run's folder, whose files are listed"
        )
        assert "base,forget,top1" in kept.seen["text"]
    assert kept.seen["finished"]
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_tracker_that_cannot_be_used_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "demo", "--forget", "nowhere", "--retain", "elsewhere", "--out", tmp_path / "out"]
    for name, words in (
        ("wandb", "pip install 'lens-unlearn[wandb]'"),
        ("excel", "choose from tensorboard, wandb, mlflow"),
    ):
        assert call("run", *arguments, "--track", name) == 2
        assert words in capsys.readouterr().err
        with pytest.raises(lu.LensUnlearnError, match=name):
            lu.run("demo", "nowhere", "elsewhere", tmp_path / "out", track=name)
    assert not list(tmp_path.iterdir())


def test_where_the_tracker_fails_the_run_is_whole(
    report: Report, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "carry_out", lambda *_, **__: (None, report))
    broken.append(True)
    with pytest.raises(lu.LensUnlearnError, match="one is whole, but tensorboard did not take it: nobody answers"):
        lu.run("demo", "a", "b", folder, track="tensorboard")
    assert last[0].seen["finished"]
    broken.clear()
    assert lu.run("demo", "a", "b", folder, track="tensorboard") is report
    assert last[1].seen["numbers"]
