"""Run the notebooks in place, and store outputs that also show where plotly's JavaScript does not run.

    python notebooks/execute.py                        # all of them
    python notebooks/execute.py notebooks/01_quickstart.ipynb
    python notebooks/execute.py --check                # only say what is wrong with the stored outputs

Every notebook gets a fresh kernel, with `notebooks/` as its working directory. Each plotly figure is stored twice, as the
interactive figure and as a PNG; progress bars, warnings, timings and whatever belongs to this machine are left out. A
notebook whose cells fail stays as it was. Drawing PNGs needs a Chrome or Chromium that kaleido can find (set BROWSER_PATH
if it does not).
"""

import argparse
import base64
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
LIVE = ("application/vnd.jupyter.widget-view+json", "application/javascript")
"""Outputs that say nothing once the kernel is gone."""
MOST_OUTPUT, MOST_NOTEBOOK = 1_000_000, 5_000_000
"""Bytes."""
NO_INTERVAL = ("too few documents for an interval", "[nan")
"""How a number says that it has no interval: a notebook measures on enough documents that each has one."""
WIDTH, HEIGHT = 900, 480
"""Of a figure that does not set its own."""
ROOTS = ("home", "root", "Users", "tmp", "private", "mnt")
"""Folders below which the paths of a machine stand."""


def execute(path: Path, timeout: int = 600) -> float:
    """Run a notebook and write it with clean outputs; return the seconds that it ran.

    Raises:
        CellExecutionError: If a cell fails; the file stays as it was.
    """
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"  # PNGs are drawn below, all in one browser
    start = time.perf_counter()
    NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    seconds = time.perf_counter() - start
    clean(notebook)
    draw(notebook)
    nbformat.validate(notebook)
    beside = path.with_suffix(".ipynb.partial")
    nbformat.write(notebook, beside)
    os.replace(beside, path)
    return seconds


def clean(notebook: NotebookNode) -> None:
    """Remove what another run, or another machine, would have written differently, and what shows nothing."""
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _joined([output for output in cell.outputs if not _is_noise(output)])
            for data in _bundles(cell):
                if PLOTLY in data:
                    data["text/plain"] = title_of(data[PLOTLY])


def _is_noise(output: NotebookNode) -> bool:
    if output.output_type == "stream":
        return output.name == "stderr"
    return any(kind in output.get("data", {}) for kind in LIVE)


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Make one output of what was printed in several pieces, which depends on how fast the machine was."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def title_of(figure: dict) -> str:
    """Return what a plotly figure is called, in plain text."""
    title = figure.get("layout", {}).get("title", "")
    text = title.get("text", "") if isinstance(title, dict) else title
    return re.sub(r"<[^>]+>", "", re.sub(r"<br.*", "", text or "", flags=re.DOTALL)) or "Figure"


def draw(notebook: NotebookNode) -> None:
    """Put a PNG beside every interactive figure."""
    waiting = [data for cell in notebook.cells for data in _bundles(cell) if PLOTLY in data and PNG not in data]
    if not waiting:
        return
    import kaleido
    import plotly.graph_objects as go

    kaleido.start_sync_server(silence_warnings=True)
    try:
        warnings.filterwarnings("ignore", message="The kopts argument")  # plotly's own call to kaleido
        for data in waiting:
            # A figure of a newer notebook may hold more than this plotly knows; none of it is lost in what is stored.
            figure = go.Figure({key: data[PLOTLY][key] for key in ("data", "layout")}, skip_invalid=True)
            figure.update_layout(paper_bgcolor="white", plot_bgcolor="white")
            size = {"width": figure.layout.width or WIDTH, "height": figure.layout.height or HEIGHT}
            data[PNG] = base64.b64encode(figure.to_image("png", scale=1.5, **size)).decode()
    finally:
        kaleido.stop_sync_server(silence_warnings=True)


def check(path: Path) -> list[str]:
    """Return what is wrong with the outputs that a notebook stores, one sentence each; nothing if all is well."""
    notebook = nbformat.read(path, as_version=4)
    faults = []
    if path.stat().st_size > MOST_NOTEBOOK:
        faults.append(f"{path.name} is above {MOST_NOTEBOOK:,} bytes")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not any(cell.outputs for cell in code):
        faults.append(f"{path.name} has no stored outputs: run notebooks/execute.py")
    for cell in code:
        where = f"{path.name}, cell {cell.id}"
        if cell.execution_count is None and cell.source.strip():
            faults.append(f"{where}: was not run")
        for output in cell.outputs:
            faults += [f"{where}: {fault}" for fault in _faults(output)]
    return faults


def _faults(output: NotebookNode) -> Iterator[str]:
    if output.output_type == "error":
        yield "a traceback"
    if output.output_type == "stream" and output.name == "stderr":
        yield "what was written to stderr"
    data = output.get("data", {})
    if PLOTLY in data and PNG not in data:
        yield "a figure without a PNG beside it"
    if any(kind in data for kind in LIVE):
        yield "a widget, which shows nothing without its kernel"
    size = len(json.dumps(output))
    if size > MOST_OUTPUT:
        yield f"an output of {size:,} bytes, above {MOST_OUTPUT:,}"
    text = json.dumps({**output, "data": {kind: content for kind, content in data.items() if kind != PNG}})
    if any(words in text for words in NO_INTERVAL):
        yield "a number without an interval: measure on more documents"
    for path in machine_paths():
        at = re.search(r"(?<![\w.+/])" + re.escape(json.dumps(path)[1:-1]), text)
        if at:
            yield f"a path of a machine: {text[at.start() : at.start() + 60]!r}"


def machine_paths() -> list[str]:
    """Return how paths begin that mean nothing to a reader."""
    here = [HERE.parents[0], Path.home(), Path(tempfile.gettempdir()), Path(sys.prefix)]
    roots = [*(f"/{name}/" for name in ROOTS), "C:\\Users"]
    return list(dict.fromkeys([*roots, *(str(path) for path in here if len(path.parts) > 1)]))


def _bundles(cell: NotebookNode) -> list[NotebookNode]:
    return [output["data"] for output in cell.get("outputs", []) if "data" in output]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, or check, the notebooks that were named; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="notebooks; default: all beside this script")
    parser.add_argument("--check", action="store_true", help="run nothing; say what is wrong with the stored outputs")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that a cell may take")
    args = parser.parse_args(arguments)
    faults = []
    for path in args.files or sorted(HERE.glob("*.ipynb")):
        if not args.check:
            print(f"{path.name}: {execute(path.resolve(), args.timeout):.0f} s", flush=True)
        faults += check(path)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
