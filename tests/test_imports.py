"""The rooms of the package: imports point down, nobody goes in a circle, and few files lie flat at the top."""

import ast
from collections.abc import Iterator

import pytest
from package_tree import MODULES, ROOT, imports, own

ROOMS = (
    "core",
    "demo",  # the embedded model's place and its texts; its recipe, below, is a program
    "model",
    "corpora",
    "neurons",
    "keyspace",
    "interventions",
    "evaluation",
    "methods",
    "audit",
    "benchmarks",
    "inspection",
    "figures",
    "reports",
    "experiments",
    "testing",
    "cli",
    "__main__",
    "demo.recipe",
)
"""From the ground up: a room imports only rooms that stand before it."""
SHOWS_ITSELF = {
    ("audit.audit", "Audit.to_html", "reports.audit_page"),
    ("audit.audit", "Audit.figures", "figures.audit"),
    ("audit.audit", "Audit.figures", "figures.recoverability"),
    ("benchmarks.result", "BenchmarkResult.to_html", "reports.benchmark_page"),
    ("evaluation.report", "Report.to_html", "reports.report_page"),
    ("evaluation.skill_graph", "SkillGraph.to_html", "reports.skill_graph_page"),
    ("inspection.token_values", "TokenValues.html", "figures.texts"),
    ("inspection.generations", "Generations.html", "figures.generations"),
    ("inspection.top_examples", "TopExamples.html", "figures.examples"),
}
"""The only imports that point up: inside a method by which a value shows itself. From where, in which method, and what."""


def room(module: str) -> str:
    return next(
        (name for name in reversed(ROOMS) if module == name or module.startswith(f"{name}.")), module.partition(".")[0]
    )


def arrows() -> Iterator[tuple[str, str, str]]:
    """Every import of one of our modules by another: from where, in which function, and which; none of the package itself."""
    for module, tree in MODULES.items():
        for name, inside in imports(tree):
            target = own(name)
            if module and target and target != module:
                yield module, inside, target


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_every_module_is_in_a_room(module: str) -> None:
    assert room(module) in ROOMS, f"{module} is in no room: give it a place in ROOMS"


def test_imports_point_down() -> None:
    place = {name: number for number, name in enumerate(ROOMS)}
    up = {arrow for arrow in arrows() if place[room(arrow[2])] > place[room(arrow[0])]}
    assert up <= SHOWS_ITSELF, f"these imports point up: {sorted(up - SHOWS_ITSELF)}"
    assert up == SHOWS_ITSELF, f"these do not exist any more: {sorted(SHOWS_ITSELF - up)}"


def test_the_package_itself_is_imported_only_from_above_the_rooms() -> None:
    """There it may be used as a user would; below, a room says which module it needs."""
    for module, tree in MODULES.items():
        for name, _ in imports(tree):
            if module and own(name) == "" and name != "lens_unlearn.__version__":
                assert room(module) in ("cli", "__main__"), f"{module} imports {name}"


def test_imports_make_no_circle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, inside, target in arrows():
        if (module, inside, target) not in SHOWS_ITSELF:
            graph[module].add(target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_few_files_lie_flat_at_the_top() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("name", sorted({room(module) for module in MODULES if module} - {"cli", "__main__"}))
def test_a_room_says_what_it_knows(name: str) -> None:
    told = ast.get_docstring(MODULES[name]) or ""
    assert "Knows" in told, f"{name}/__init__.py opens with what the room knows and does not know"
