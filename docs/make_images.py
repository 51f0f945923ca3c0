"""Draw the pictures of the README and of the front page from the embedded demo model.

    pip install -e ".[export]" && python docs/make_images.py

Drawing needs a Chrome or Chromium that kaleido can find (set BROWSER_PATH if it does not); the table is drawn by the same.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import lens_unlearn as lu
from lens_unlearn.evaluation.report import Report
from lens_unlearn.experiments.experiment import Experiment
from lens_unlearn.experiments.plan import Plan
from lens_unlearn.reports.summary_table import of_run

IMAGES = Path(__file__).parent / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PLAN = Plan(
    "demo",
    "demo:python",
    ("demo:english", "demo:arithmetic"),
    methods=("selective-pruning", "neuron-adjust", "key-space-detection"),
    settings={"fraction": 0.1, "false_alarms": 0.1},
    tokens=2500,
    test_tokens=1500,
    controls=2,
    batch_size=8,
    sweep=False,
)
"""The run of which the README shows the table."""


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    specialization_map(IMAGES / "map.png")
    experiment = Experiment(PLAN)
    experiment.fit()
    summary_table(experiment.report(), IMAGES / "table.png")
    for path in ("map.png", "table.png"):
        print(IMAGES / path)


def specialization_map(path: Path) -> None:
    model = lu.load_model("demo")
    code, prose = (lu.read_corpus(f"demo:{skill}", model, tokens=5000) for skill in ("python", "english"))
    forget, retain = (lu.collect(model, corpus, "mlp.post", progress=False) for corpus in (code, prose))
    score = forget.mean_abs / (retain.mean_abs + 1e-3)
    figure = lu.plot.specialization_map(forget, retain, selection=score.top(0.1))
    figure.update_layout(paper_bgcolor="white", plot_bgcolor="white", width=900, height=620)
    figure.write_image(path, scale=2)


def summary_table(report: Report, path: Path) -> None:
    """Draw the table at the top of a run's page."""
    style = (Path(lu.__file__).parent / "reports" / "templates" / "page.css").read_text(encoding="utf-8")
    browser = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)))
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "table.html"
        page.write_text(
            f"<!DOCTYPE html><meta charset='utf-8'><style>{style}</style>{of_run(report)}", encoding="utf-8"
        )
        flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars --force-device-scale-factor=2"
        subprocess.run(
            [browser, *flags.split(), "--window-size=1100,390", f"--screenshot={path}", page.as_uri()],
            check=True,
            capture_output=True,
        )


if __name__ == "__main__":
    main()
