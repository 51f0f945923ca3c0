"""The documentation: its code runs, its links lead somewhere, every public name and every error has its place."""

import ast
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from package_tree import MODULES
from test_imports import ROOMS, SHOWS_ITSELF
from typer.testing import CliRunner

import lens_unlearn as lu
from lens_unlearn import figures, methods, testing
from lens_unlearn.audit import ATTACKS
from lens_unlearn.benchmarks import BENCHMARKS, Benchmark
from lens_unlearn.core import artefacts, errors
from lens_unlearn.evaluation.metric import Needs
from lens_unlearn.evaluation.metrics import METRICS
from lens_unlearn.evaluation.teacher_forcing import Outcome
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.keyspace import regions
from lens_unlearn.methods.method import Method
from lens_unlearn.neurons.statistic import Statistic

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
RUN = [
    ROOT / "README.md",
    DOCS / "index.md",
    DOCS / "concepts.md",
    *sorted((DOCS / "howto").glob("*.md")),
    *sorted((DOCS / "methods").glob("*.md")),
]
MADE = {DOCS / "gallery.md", DOCS / "changelog.md"}
"""Pages that docs/hooks.py makes when the site is built."""
FENCE = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
ERRORS = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.LensUnlearnError)
]


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """The text of a page without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text(encoding="utf-8")))


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of one language that can run here, in order: those with a title say what they need."""
    text = path.read_text(encoding="utf-8")
    return [code for _, name, rest, code in FENCE.findall(text) if name == language and "title=" not in rest]


@cache
def demo(name: str = "demo", **options: Any) -> Any:
    return LOAD(name, **options)


LOAD = lu.load_model


@pytest.fixture
def one_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Blocks run in a folder of their own, on models that are loaded once for all pages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lu, "load_model", demo)


@pytest.mark.parametrize("path", [page for page in RUN if blocks(page, "python")], ids=shown)
@pytest.mark.usefixtures("one_demo")
def test_the_code_of_a_page_runs(path: Path) -> None:
    """From top to bottom, as a reader would paste it; the last line of a block is shown, as a notebook would."""
    names: dict[str, Any] = {"__name__": "a_page"}
    for code in blocks(path, "python"):
        tree = ast.parse(code, shown(path))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, shown(path), "exec"), names)  # noqa: S102
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), shown(path), "eval"), names)  # noqa: S307
            repr(value)
            if hasattr(value, "_repr_html_") and not hasattr(value, "to_plotly_json"):
                assert value._repr_html_()


def test_the_commands_of_the_pages_have_these_options() -> None:
    """Every command and option that a page or the README names is one of the command line."""
    from lens_unlearn.cli import app

    help_of: dict[str, str] = {}
    seen = 0
    for path in [*PAGES, ROOT / "README.md"]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for command, rest in re.findall(
            r"(?:lens-unlearn|-m lens_unlearn) +(\w+)([^\n`]*)", "\n".join(code for *_, code in FENCE.findall(text))
        ):
            if command not in help_of:
                done = CliRunner().invoke(app, [command, "--help"], terminal_width=400)
                assert done.exit_code == 0, f"{shown(path)} names the command {command!r}, which there is not"
                help_of[command] = done.output
            for option in re.findall(r"(?<!\S)\[?(--[\w-]+)", rest.partition(" #")[0]):
                assert re.search(rf"{option}\b", help_of[command]), f"{shown(path)}: {command} has no {option}"
                seen += 1
    assert seen > 20


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        found.add(re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=shown)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if there in MADE:
            continue
        assert there.exists(), f"{shown(path)} leads to {target}, which is not there"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{shown(path)} leads to {target}: no such heading"


def reference() -> list[str]:
    """What the API reference holds, by full name."""
    pages = [*(DOCS / "api").glob("*.md"), *(DOCS / "errors").glob("*.md")]
    return [
        name for path in pages for name in re.findall(r"^::: (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def test_every_public_name_is_in_the_reference_once_and_is_there() -> None:
    listed = reference()
    assert len(listed) == len(set(listed))
    last = {name.rpartition(".")[2] for name in listed}
    public = {*lu.__all__, *figures.__all__, *testing.__all__} - {"__version__", "plot"}
    assert public <= last, f"not in docs/api: {sorted(public - last)}"
    for name in listed:
        module, _, own = name.rpartition(".")
        found = importlib.import_module(name) if name in sys.modules else getattr(importlib.import_module(module), own)
        assert found.__doc__, f"{name} has no docstring"


def page_of(error: type) -> Path:
    return DOCS / "errors" / (re.sub(r"(?<=[a-z])(?=[A-Z])", "_", error.__name__).lower() + ".md")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_has_its_page(error: type) -> None:
    text = page_of(error).read_text(encoding="utf-8")
    assert f"::: lens_unlearn.core.errors.{error.__name__}\n" in text
    assert "## What to do" in text
    assert page_of(error).name in (DOCS / "errors" / "index.md").read_text(encoding="utf-8")
    assert f"errors/{page_of(error).name}" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_no_page_is_of_an_error_that_is_gone() -> None:
    assert {path.name for path in (DOCS / "errors").glob("*_error.md")} == {page_of(error).name for error in ERRORS}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.usefixtures("one_demo")
def test_the_examples_of_an_errors_page_raise_it_with_that_message(error: type) -> None:
    """A block of Python that is followed by text raises the error, and the text is its message (... is left out)."""
    found = FENCE.findall(page_of(error).read_text(encoding="utf-8"))
    for (_, name, rest, code), (_, next_name, _, message) in zip(found, found[1:]):
        if (name, next_name) == ("python", "text") and "title=" not in rest:
            with pytest.raises(error) as caught:
                exec(compile(code, shown(page_of(error)), "exec"), {"__name__": "a_page"})  # noqa: S102
            pattern = re.escape(" ".join(message.split())).replace(r"\.\.\.", ".*")
            assert re.fullmatch(pattern, f"{type(caught.value).__name__}: {caught.value}"), caught.value


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in {*PAGES, *MADE}:
        assert re.search(rf"\b{re.escape(path.relative_to(DOCS).as_posix())}$", text, re.MULTILINE), (
            f"{shown(path)} is nowhere"
        )


@pytest.mark.parametrize("path", PAGES, ids=shown)
def test_calls_that_are_not_run_are_calls_that_there_are(path: Path) -> None:
    """Blocks that need a hub: they are Python, and name functions and arguments that exist."""
    for _, name, rest, code in FENCE.findall(path.read_text(encoding="utf-8")):
        if name != "python" or "title=" not in rest:
            continue
        for node in ast.walk(ast.parse(code, shown(path))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("lu."):
                function = lu
                for part in ast.unparse(node.func).split(".")[1:]:
                    function = getattr(function, part)
                takes = inspect.signature(function).parameters  # type: ignore[arg-type]
                unknown = {word.arg for word in node.keywords if word.arg} - set(takes)
                assert not unknown, f"{shown(path)}: {ast.unparse(node.func)} takes no {sorted(unknown)}"


# --- the architecture ----------------------------------------------------------------------------------------------------

ARCHITECTURE = DOCS / "architecture.md"


def section(heading: str) -> str:
    """The text of the architecture's page below one heading."""
    return ARCHITECTURE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_the_rooms_of_the_page_are_those_that_are_enforced() -> None:
    """In the order of imports; every file that a row names is in its room, and every exception is named."""
    rows = re.findall(r"^\| `([\w/.]+)` \|(.*)$", section("The rooms"), re.MULTILINE)
    assert [name.removesuffix("/").removesuffix(".py").replace("/", ".") for name, _ in rows] == [*ROOMS]
    for name, rest in rows:
        if name.endswith("/"):
            files = [file for file in re.findall(r"`(\w+\.py)`", rest) if file != "NAME.py"]
            assert [file for file in files if not (ROOT / "lens_unlearn" / name / file).is_file()] == []
    assert all(f"`{method}`" in section("The rooms") for _, method, _ in SHOWS_ITSELF)


def test_the_architecture_names_files_and_tests_that_there_are() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    for file in re.findall(r"`((?:lens_unlearn|benchmarks|tests)/[\w/.]+)`", text):
        assert "NAME" in file or (ROOT / file).exists(), f"there is no {file}"
    for paragraph in re.split(r"\n\n|\n(?=\|)", text):
        links = re.findall(r"\]\((\.\./tests/[\w/]+\.py)\)", paragraph)
        linked = "".join((DOCS / link).read_text(encoding="utf-8") for link in links)
        for test in re.findall(r"`(test_\w+)`", paragraph):
            assert f"def {test}(" in linked, f"{test} is in none of {links}"


def defined(room: str, kind: type) -> Iterator[type]:
    """The classes of one kind that the modules of a room define, without abstract and private ones."""
    for name in MODULES:
        if name.startswith(f"{room}."):
            module = importlib.import_module(f"lens_unlearn.{name}")
            own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
            for value in own:
                public = value is not kind and not inspect.isabstract(value) and not value.__name__.startswith("_")
                if public and issubclass(value, kind):
                    yield value


def test_every_method_is_in_the_table() -> None:
    """Whatever file has a record, METHODS has it too, with a sentence for --help; the page names no other."""
    made = [
        value
        for name in MODULES
        if name.startswith("methods.")
        for value in vars(importlib.import_module(f"lens_unlearn.{name}")).values()
        if isinstance(value, Method)
    ]
    missing = [record.name for record in made if record not in methods.METHODS]
    assert not missing, f"METHODS in lens_unlearn/methods/__init__.py lacks {missing}"
    assert len({record.name for record in methods.METHODS}) == len(methods.METHODS)
    for record in methods.METHODS:
        assert record.summary, f"{record.name} has no summary for --help"
        assert record.strength in record.options, f"{record.name} has no option {record.strength}"
    named = set(re.findall(r"`([a-z]+(?:-[a-z]+)*)`", (DOCS / "methods.md").read_text(encoding="utf-8")))
    assert named <= set(methods.names()), "docs/methods.md names a method that there is not"


def test_every_attack_is_in_the_table_and_on_a_page() -> None:
    """Whatever file has a record, ATTACKS has it too; the how-to names each."""
    rooms = [importlib.import_module(f"lens_unlearn.{name}") for name in MODULES if name.startswith("audit.")]
    made = {id(v): v for room in rooms for v in vars(room).values() if isinstance(v, lu.Attack)}
    missing = [record.name for record in made.values() if record not in ATTACKS]
    assert not missing, f"ATTACKS in lens_unlearn/audit/__init__.py lacks {missing}"
    page = (DOCS / "howto" / "audit.md").read_text(encoding="utf-8")
    assert [record.name for record in ATTACKS if f"| `{record.name}` |" not in page] == []


def test_every_public_benchmark_is_in_the_table_and_on_a_page() -> None:
    """Whatever file has a record, BENCHMARKS has it too; the how-to gives the formula of each official score."""
    rooms = [importlib.import_module(f"lens_unlearn.{name}") for name in MODULES if name.startswith("benchmarks.")]
    made = {id(v): v for room in rooms for v in vars(room).values() if isinstance(v, Benchmark)}
    assert [record.name for record in made.values() if record not in BENCHMARKS] == []
    page = (DOCS / "howto" / "bench.md").read_text(encoding="utf-8")
    for record in BENCHMARKS:
        assert f"## {record.words}" in page
        assert [score for score in record.official if f"`{score}`" not in page] == []
        assert callable(getattr(lu.benchmarks, record.name.replace("-", "_")))
        assert record.summary


def test_every_row_of_the_metric_table_holds_together() -> None:
    assert len({row.name for row in METRICS}) == len(METRICS)
    for row in METRICS:
        assert row.words, f"{row.name} has no words for figures and pages"
        assert row.range[0] < row.range[1]
        assert row.needs in get_args(Needs)
        for quantity in row.quantities:
            assert hasattr(Outcome, quantity), f"{row.name} reads {quantity}, which Outcome does not have"
        if row.derived_from:
            assert row.derived_from in {other.name for other in METRICS}, f"{row.name} is derived from no metric"
        else:
            assert callable(row.of) == (row.needs != "tasks"), f"{row.name} has no function, or one that nobody calls"


def test_every_metric_is_on_a_page() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "evaluation.md").read_text(encoding="utf-8"), re.MULTILINE)
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    missing = {row.name for row in METRICS} - explained
    assert not missing, f"docs/evaluation.md explains no {sorted(missing)}"


def test_every_figure_is_in_a_file_of_its_name() -> None:
    for name in figures.__all__:
        assert getattr(figures, name).__module__ == f"lens_unlearn.figures.{name}"


@pytest.mark.filterwarnings("ignore:.* does not know its model:UserWarning")
def test_every_kind_is_public_and_can_be_read() -> None:
    """Statistics, regions and interventions: each has a public name; of the latter two, files are read."""
    of_regions, edits = [*defined("keyspace", regions.Region)], [*defined("interventions", Intervention)]
    for kind in (*defined("neurons", Statistic), *of_regions, *edits):
        assert kind.__name__ in lu.__all__, f"{kind.__name__} is not in the table of public names"
    assert {region.shape for region in of_regions} == set(get_args(regions.Shape))
    with pytest.raises(lu.LensUnlearnError) as caught:
        lu.fit_region(torch.ones(9, 2), "nothing")  # type: ignore[arg-type]
    assert all(region.shape in str(caught.value) for region in of_regions)
    stored = sorted((ROOT / "tests" / "data" / "golden").glob("*.safetensors"))
    read = {type(lu.load_intervention(path)) for path in stored if artefacts.read(path)[0]["kind"] == "intervention"}
    assert read == {*edits}, "files.py reads every kind of intervention, and tests/data/golden has a file of each"


def test_every_benchmark_is_on_a_page() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    files = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {
        "record",
        "skills",
        "timing",
    }  # which the others share
    assert set(re.findall(r"(?<!lens_unlearn/)(?<!tests/)benchmarks/(\w+)\.py", text)) - {"NAME"} == files


def test_every_command_is_on_a_page() -> None:
    from lens_unlearn.cli import app

    page = (DOCS / "howto" / "command_line.md").read_text(encoding="utf-8")
    for command in app.registered_commands:
        name = command.name or getattr(command.callback, "__name__", "")
        assert f"`{name}`" in page, f"docs/howto/command_line.md does not name the command {name}"


# --- the site ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hooks() -> Any:
    """docs/hooks.py, which mkdocs reads from its file."""
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def test_a_notebook_becomes_a_page_of_its_stored_outputs(hooks: Any, tmp_path: Path) -> None:
    figure = {"layout": {"title": {"text": "Importance of [every] neuron<br><sup>demo</sup>"}}}
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["said\n"]},
        {"output_type": "stream", "name": "stderr", "text": ["a progress bar"]},
        {"output_type": "display_data", "data": {"application/vnd.plotly.v1+json": figure, "image/png": PNG}},
        {"output_type": "execute_result", "data": {"text/html": ["<table>\n", "</table>"], "text/plain": "a table"}},
        {"output_type": "execute_result", "data": {"text/html": "<script>1</script>", "text/plain": "only text"}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# A *story*\n", "[![Open](https://x.org/badge.svg)](https://x.org/nb)"]},
        {"cell_type": "code", "source": "one = 1", "outputs": outputs},
    ]
    path = tmp_path / "01_story.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    page = hooks.page_of(path)
    assert page.title == "A story"
    assert "[Open](https://x.org/nb)" in page.text
    assert "badge.svg" not in page.text
    assert "```python\none = 1\n```" in page.text
    assert "```text\nsaid\n```" in page.text
    assert "progress bar" not in page.text
    assert "<script" not in page.text
    assert "only text" in page.text
    assert "![Importance of (every) neuron](01_story-1.png){ #figure-1" in page.text
    assert [*page.raw.values()] == ["<table>\n</table>"]
    assert page.pictures[0].png.startswith(b"\x89PNG")
    drawn = hooks.gallery({"01_story": page})
    assert "notebooks/01_story.md#figure-1" in drawn
    assert "notebooks/01_story-1.png" in drawn


def test_links_that_leave_the_pages_lead_to_a_page_of_the_site_or_to_the_source(hooks: Any) -> None:
    assert hooks.leads_to("../results.md", "howto/find.md") == "../results.md"
    assert hooks.leads_to("../CHANGELOG.md", "promises.md") == "changelog.md"
    assert hooks.leads_to("../../notebooks/01_x.ipynb", "howto/find.md") == "../notebooks/01_x.md"
    assert hooks.leads_to("02_y.ipynb", "notebooks/01_x.md") == "02_y.md"
    assert hooks.leads_to("../docs/results.md", "notebooks/01_x.md") == "../results.md"
    assert hooks.leads_to("../tests/test_docs.py", "promises.md").endswith("/blob/main/tests/test_docs.py")
    assert hooks.outside_code("[a](b)\n```text\n[a](b)\n```\n", str.upper) == "[A](B)\n```text\n[a](b)\n```\n"


def test_what_a_page_would_fetch_is_told(hooks: Any) -> None:
    page = '<a href="https://x.org"><link rel="canonical" href="https://y.org"><img alt="" src="pictures/a.png">'
    assert hooks.requests(page) == []
    assert hooks.requests(page + '<script async src="https://cdn.x.org/a.js"></script>') == ["https://cdn.x.org/a.js"]
    assert hooks.requests('<link rel="stylesheet" href="//fonts.x.org/css">') == ["//fonts.x.org/css"]


def test_equations_become_mathml(hooks: Any) -> None:
    done = hooks.on_page_content('<p><span class="arithmatex">\\(p_f &gt; 0\\)</span></p>', page=Anything("a.md"))
    assert "<math" in done
    assert "arithmatex" not in done
    assert "<msub>" in done
    assert 'display="block"' in hooks.on_page_content('<div class="arithmatex">\\[x\\]</div>', page=Anything("a.md"))


class Anything:
    """A page, as far as the hooks look at one."""

    def __init__(self, path: str) -> None:
        self.file = SimpleNamespace(src_uri=path)
