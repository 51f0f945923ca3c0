"""Draw the pictures of the README and of the docs, from the embedded demo model and from stored outputs.

    pip install -e ".[export]" && python docs/make_images.py

Drawing needs a Chrome or Chromium that kaleido can find (set BROWSER_PATH if it does not); the table is drawn by the same.
"""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from plotly.subplots import make_subplots

import lens_unlearn as lu
from lens_unlearn.evaluation.report import Report
from lens_unlearn.experiments.experiment import Experiment
from lens_unlearn.experiments.plan import Plan
from lens_unlearn.figures import theme
from lens_unlearn.reports.summary_table import of_run

IMAGES = Path(__file__).parent / "images"
OUTPUTS = Path(__file__).parents[1] / "benchmarks" / "outputs"
FRONTIER = {
    "methods, and LAPE": ("frontier.json", "frontier_gated.json"),
    "other baselines": ("frontier_baselines.json",),
}
"""By row of the picture, the stored outputs of what is in it."""
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
    frontier(IMAGES / "frontier.png")
    growth(IMAGES / "growth.png")
    for path in ("map.png", "table.png", "frontier.png", "growth.png"):
        print(IMAGES / path)


def specialization_map(path: Path) -> None:
    model = lu.load_model("demo")
    code, prose = (lu.read_corpus(f"demo:{skill}", model, tokens=5000) for skill in ("python", "english"))
    forget, retain = (lu.collect(model, corpus, "mlp.post", progress=False) for corpus in (code, prose))
    score = forget.mean_abs / (retain.mean_abs + 1e-3)
    figure = lu.plot.specialization_map(forget, retain, selection=score.top(0.1))
    figure.update_layout(paper_bgcolor="white", plot_bgcolor="white", width=900, height=620)
    figure.write_image(path, scale=2)


def frontier(path: Path) -> None:
    """Draw what each method forgets against what it costs, from the stored outputs: a column for each skill that is forgotten."""
    groups = {
        group: [row for name in names for row in json.loads((OUTPUTS / name).read_text())["tables"]["frontier"]["rows"]]
        for group, names in FRONTIER.items()
    }
    skills = list(dict.fromkeys(row[0] for rows in groups.values() for row in rows))
    titles = [f"{skill} forgotten" for skill in skills] + [""] * len(skills) * (len(groups) - 1)
    fig = make_subplots(
        len(groups), len(skills), subplot_titles=titles, shared_yaxes=True, shared_xaxes=True, vertical_spacing=0.04,
        row_titles=list(groups),
    )  # fmt: skip
    for line, rows in enumerate(groups.values(), 1):
        methods = list(dict.fromkeys(row[1] for row in rows))
        methods.remove("gated-pruning, 100% of the neurons, random neurons") if line == 1 else None  # all, as without
        for column, skill in enumerate(skills, 1):
            place = {"row": line, "col": column}
            fig.add_shape(
                type="rect", x0=-1, x1=2, y0=60, y1=100, **place, line_width=0, fillcolor="rgba(63,158,99,.18)"
            )
            for number, method in enumerate(methods):
                points = [row for row in rows if row[:2] == [skill, method]]
                cost, lost = ([float(row[place].split("%")[0]) for row in points] for place in (-1, -2))
                random = "random" in method
                colour = theme.CONTROL if random else (*theme.METHODS, *theme.OTHERS)[number % 12]
                fig.add_scatter(
                    x=cost, y=lost, name=method.removeprefix("baseline: "), legendgroup=method, showlegend=column == 1,
                    legend="legend" if line == 1 else "legend2", mode="lines+markers", **place,
                    marker={"symbol": "x" if random else theme.SYMBOLS[number % 5], "size": 9, "color": colour},
                )  # fmt: skip
            fig.update_xaxes(range=[-1, 20], **place)
            if line == len(groups):
                fig.update_xaxes(title="lost by the worst other skill, %", **place)
        fig.update_yaxes(title="lost by the forgotten, %", range=[-2, 102], row=line, col=1)
    layout = {
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "template": theme.template(),
        "width": 1100,
        "height": 960,
    }
    legends = {
        "legend": {"orientation": "h", "y": -0.08, "title": "above: "},
        "legend2": {"orientation": "h", "y": -0.3, "title": "below: "},
    }
    fig.update_layout(**layout, **legends, margin={"t": 50, "b": 40})
    fig.write_image(path, scale=2)


def growth(path: Path) -> None:
    """Draw how time and memory grow with each size, over those of the smallest, from the stored output."""
    table = json.loads((OUTPUTS / "growth.json").read_text())["tables"]["growth"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    tasks, sizes = (list(dict.fromkeys(row[column] for row in rows)) for column in ("task", "varied"))
    times = [int(column.split()[0]) for column in table["columns"] if column.endswith(" x, s")]
    fig = make_subplots(1, len(tasks), subplot_titles=tasks, shared_yaxes=True)
    for column, task in enumerate(tasks, 1):
        fig.add_scatter(
            x=times, y=times, name="linear", mode="lines", line={"dash": "dot", "color": theme.CONTROL}, row=1, col=column,
            showlegend=column == 1,
        )  # fmt: skip
        for number, size in enumerate(sizes):
            for row in (row for row in rows if (row["task"], row["varied"]) == (task, size)):
                taken = [float(row[f"{n} x, s"]) for n in times]
                fig.add_scatter(
                    x=times, y=[one / taken[0] for one in taken], name=size, legendgroup=size, mode="lines+markers",
                    showlegend=not any(trace.name == size for trace in fig.data), row=1, col=column,
                    marker={"symbol": theme.SYMBOLS[number % 5], "size": 9, "color": (*theme.METHODS, *theme.OTHERS)[number]},
                )  # fmt: skip
        ticks = {"type": "log", "tickvals": times, "ticktext": [f"{n}x" for n in times]}
        fig.update_xaxes(title="so many times as much", **ticks, row=1, col=column)
        fig.update_yaxes(**ticks, row=1, col=column)
    fig.update_yaxes(title="time, over that of 1x", row=1, col=1)
    layout = {
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "template": theme.template(),
        "width": 1100,
        "height": 420,
    }
    fig.update_layout(**layout, legend={"orientation": "h", "y": -0.25}, margin={"t": 50, "b": 40})
    fig.write_image(path, scale=2)


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
