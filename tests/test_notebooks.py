"""The notebooks as they are stored: valid, readable without a kernel or JavaScript, about names that exist. None is run."""

import ast
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import plotly.graph_objects as go
import pytest

import lens_unlearn as lu

nbformat = pytest.importorskip("nbformat")

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/lens-unlearn/lens_unlearn/blob/main/notebooks/{})"
)
NOT_DRAWN = {
    "expert_load": "the demo model has no experts; docs/results.md shows the loads of a model that was trained for that",
}
"""Figures that no notebook draws, and why."""
HOMES = {"lu": lu, "lens_unlearn": lu}
"""What prose and code call the package."""


@cache
def tool() -> ModuleType:
    """`notebooks/execute.py`, which is a script beside the notebooks."""
    spec = importlib.util.spec_from_file_location("notebooks_execute", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["notebooks_execute"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def notebook(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_of(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def prose_of(notebook: Any) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def missing(dotted: str) -> str | None:
    """Return a dotted name, as in ``lu.plot.tradeoff``, if it does not exist."""
    first, *rest = dotted.split(".")
    found: Any = HOMES[first]
    for name in rest:
        try:
            found = getattr(found, name)
        except AttributeError:
            return dotted
    return None


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


def test_a_notebook_is_valid_and_runs_in_the_plain_kernel(path: Path, notebook: Any) -> None:
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell["id"] for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]  # nbformat would mend them
    assert len(set(ids)) == len(ids)
    for source in code_of(notebook):
        ast.parse("\n".join(line for line in source.splitlines() if not line.startswith("%")))
        assert ".show()" not in source, "a figure is the last line of its cell"


def test_a_notebook_opens_in_colab_and_begins_with_its_model(path: Path, notebook: Any) -> None:
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert BADGE.format(path.name) in first.source
    setup = code_of(notebook)[0]
    assert re.search(r'^MODEL = "[^"]+" +# .*hub', setup, re.MULTILINE), (
        "the first code cell says how to take another model"
    )
    assert 'MODEL = "demo"' in setup, "it runs without any download"
    assert "# %pip install lens-unlearn" in setup
    assert any("load_model(MODEL" in source for source in code_of(notebook))


def test_stored_outputs_are_complete(path: Path) -> None:
    assert tool().check(path) == []


def test_prose_and_code_name_what_exists(notebook: Any) -> None:
    spans = re.findall(r"`([^`\n]+)`", prose_of(notebook))
    named = [name for text in [*spans, *code_of(notebook)] for name in re.findall(r"\blu(?:\.[a-z_]\w*)+", text, re.I)]
    assert [name for name in map(missing, sorted(set(named))) if name] == []


def test_every_figure_is_drawn_in_a_notebook() -> None:
    """The gallery shows what notebooks draw; figures of texts are HTML, and are on the notebooks' pages alone."""
    source = "\n".join("\n".join(code_of(nbformat.read(path, as_version=4))) for path in NOTEBOOKS)
    drawn = set(re.findall(r"\blu\.plot\.(\w+)\(", source))
    figures = {
        name
        for name in lu.plot.__all__
        if issubclass(inspect.signature(getattr(lu.plot, name)).return_annotation, go.Figure)
    }
    assert figures - drawn == set(NOT_DRAWN)


def test_links_between_notebooks_and_docs_lead_somewhere(path: Path, notebook: Any) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", prose_of(notebook))
    # Notebooks and pages that are still being written are checked by the strict build of the documentation.
    assert [to for to in targets if to.endswith(".ipynb") and not re.fullmatch(r"0[1-8]_\w+\.ipynb", to)] == []
    assert [to for to in targets if to.startswith("../docs/") and not (path.parent / to).exists()] == []


# --- the check itself ----------------------------------------------------------------------------------------------------


FIGURE = {"data": [{"type": "bar", "y": [1]}], "layout": {"title": {"text": "Lost<br><span>by layer</span>"}}}


def stored(tmp_path: Path, *outputs: dict[str, Any], run: bool = True) -> Path:
    """A notebook of one code cell with these outputs."""
    cell = nbformat.v4.new_code_cell("1 + 1", id="sum", execution_count=1 if run else None)
    cell.outputs = [nbformat.from_dict(output) for output in outputs]
    path = tmp_path / "one.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    return path


def shown(**data: Any) -> dict[str, Any]:
    return {
        "output_type": "display_data",
        "metadata": {},
        "data": {kind.replace("__", "/"): v for kind, v in data.items()},
    }


def plotly(**more: Any) -> dict[str, Any]:
    return {"output_type": "display_data", "metadata": {}, "data": {tool().PLOTLY: FIGURE, **more}}


FAULTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "a figure alone": (plotly, "without a PNG"),
    "a traceback": (
        lambda: {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []},
        "a traceback",
    ),
    "stderr": (lambda: {"output_type": "stream", "name": "stderr", "text": "a warning"}, "stderr"),
    "a widget": (
        lambda: {"output_type": "display_data", "metadata": {}, "data": {tool().LIVE[0]: {"model_id": "1"}}},
        "a widget",
    ),
    "a long output": (lambda: shown(text__plain="a" * 1_000_001), "above 1,000,000"),
    "somebody's home": (lambda: shown(text__plain="saved to '/home/ada/no-python.safetensors'"), "a path of a machine"),
    "this machine": (lambda: shown(text__html=f"<p>{FOLDER}</p>"), "a path of a machine"),
    "a table without intervals": (
        lambda: shown(text__html="<td>0.444 [too few documents for an interval (9)]</td>"),
        "without an interval",
    ),
    "bounds that are no numbers": (
        lambda: {"output_type": "stream", "name": "stdout", "text": "0.5% lost [nan%, nan%]\n"},
        "without an interval",
    ),
    "a path in a figure": (
        lambda: plotly(**{"image/png": "iVBO", "text/html": f"{Path.home()}/model"}),
        "a path of a machine",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_check_finds(name: str, tmp_path: Path) -> None:
    make, options = FAULTS[name]
    assert [fault for fault in tool().check(stored(tmp_path, make())) if options in fault], options


def test_the_check_finds_cells_that_were_not_run(tmp_path: Path) -> None:
    faults = tool().check(stored(tmp_path, run=False))
    assert any("no stored outputs" in fault for fault in faults)
    assert any("was not run" in fault for fault in faults)


def test_the_check_lets_good_outputs_pass(tmp_path: Path) -> None:
    addresses = shown(text__html="<a href='https://example.org/home/page'>a page</a>, and 1/tmp/2 of a share")
    assert tool().check(stored(tmp_path, plotly(**{"image/png": "/home/"}), addresses)) == []


def test_cleaning_takes_out_what_belongs_to_one_run(tmp_path: Path) -> None:
    path = stored(tmp_path, FAULTS["stderr"][0](), FAULTS["a widget"][0](), plotly(**{"text/plain": "Figure({...})"}))
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].metadata["execution"] = {"iopub.execute_input": "2020-01-01T00:00:00"}
    notebook.metadata["language_info"] = {"name": "python", "version": "3.11.2"}
    tool().clean(notebook)
    assert [output.data["text/plain"] for output in notebook.cells[0].outputs] == ["Lost"]
    assert notebook.cells[0].metadata == {}
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def test_what_was_printed_in_pieces_is_one_output(tmp_path: Path) -> None:
    said = [{"output_type": "stream", "name": "stdout", "text": text} for text in ("one\n", "two\n")]
    notebook = nbformat.read(stored(tmp_path, said[0], FAULTS["stderr"][0](), said[1]), as_version=4)
    tool().clean(notebook)
    assert [output.text for output in notebook.cells[0].outputs] == ["one\ntwo\n"]


def test_the_script_says_what_is_wrong_and_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = stored(tmp_path, plotly())
    assert tool().main(["--check", str(bad)]) == 1
    assert "one.ipynb, cell sum: a figure without a PNG beside it" in capsys.readouterr().err
    good = stored(tmp_path, plotly(**{"image/png": "iVBO"}))
    assert tool().main(["--check", str(good)]) == 0
