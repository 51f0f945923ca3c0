"""The package's shape: imports point down, nothing unpickles or prints, and importing it is quick."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lens_unlearn

ROOT = Path(lens_unlearn.__file__).parent
ORDER = [
    {"lens_unlearn"},
    {"errors", "coins", "ranks"},
    {"sites"},
    {"maps", "rows", "lean"},
    {"statistics", "regions", "separation", "deltas"},
    {"artefacts"},
    {"demo"},  # the embedded model's place and texts; its recipe, below, is a program
    {"models"},
    {"sources", "corpora"},
    {"collecting", "attribution"},
    {"interventions"},
    {"methods"},
    {"keyspace"},
    {"figures"},
    {"evaluation"},
    {"looking", "hub"},
    {"examples"},
    {"tuning"},
    {"testing"},
    {"keeping"},
    {"run", "showcase", "comparing"},
    {"cli", "__main__", "demo.measure", "demo.train"},
]
WITHIN = [["sources", "corpora"]]
"""Modules of one rank that may import one another downwards only."""


def rank(module: str) -> int:
    parts = module.split(".")
    for length in (2, 1):
        name = ".".join(parts[:length])
        for place, names in enumerate(ORDER):
            if name in names:
                return place
    raise AssertionError(f"{module} has no place in the order of imports: give it one in {Path(__file__).name}")


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found["lens_unlearn" if name == "__init__" else name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def imports(tree: ast.Module) -> Iterator[str]:
    """Name every module that is imported at run time, also inside functions; `from x import y` gives x.y."""
    typing = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    unread = {inner for block in typing for statement in block.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if node in unread:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(name: str) -> str | None:
    """Resolve a name of ours to the module it is, or is in."""
    if name != "lens_unlearn" and not name.startswith("lens_unlearn."):
        return None
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or "lens_unlearn"


@pytest.mark.parametrize("module", [name for name in MODULES if name != "lens_unlearn"])
def test_imports_point_down(module: str) -> None:
    for name in imports(MODULES[module]):
        target = own(name)
        if target is None:
            continue
        if target == "lens_unlearn":
            above = rank(module) >= rank("run")  # there the package may be used as a user would
            assert name == "lens_unlearn.__version__" or above, f"{module} imports {name}"
            continue
        assert rank(target) <= rank(module), f"{module} imports {target}, which stands above it"
        for chain in WITHIN:
            if module in chain and target in chain:
                assert chain.index(target) <= chain.index(module), f"{module} imports {target}"


def test_imports_make_no_circle() -> None:
    """A package and its own parts count as one; a report shows itself with figures, which take reports."""
    graph = {
        m: {
            t
            for n in imports(tree)
            if (t := own(n)) and t not in (m, "lens_unlearn", m.partition(".")[0], f"{m}.{t.rpartition('.')[2]}")
        }
        for m, tree in MODULES.items()
        if m != "lens_unlearn"
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for target in graph[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", [*MODULES])
def test_nothing_is_unpickled_or_evaluated(module: str) -> None:
    tree = MODULES[module]
    names = {name.split(".")[0] for name in imports(tree)}
    assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree):
        if module == "demo.train":  # the recipe goes on from its own checkpoints, as plain tensors
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node)
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {
                ("torch", "load"),
                ("np", "load"),
                ("numpy", "load"),
                ("pd", "read_pickle"),
            }
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile"}


@pytest.mark.parametrize("module", [*MODULES])
def test_nothing_prints_outside_the_command_line(module: str) -> None:
    if module.split(".")[0] in ("cli", "demo", "__main__"):
        return
    calls = [
        n
        for n in ast.walk(MODULES[module])
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print"
    ]
    assert not calls, f"{module} prints in line {calls[0].lineno}"


@pytest.mark.parametrize("module", [name for name in MODULES if name != "sites" and not name.startswith("demo.")])
def test_transformer_lens_is_imported_by_sites_alone(module: str) -> None:
    assert not [name for name in imports(MODULES[module]) if name.split(".")[0] == "transformer_lens"]


@pytest.mark.parametrize("module", [*MODULES])
def test_hooks_are_reset_by_nobody(module: str) -> None:
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in {"reset_hooks", "enable_compatibility_mode", "remove_all_hook_fns"}


@pytest.mark.parametrize("module", [*MODULES])
def test_nobody_writes_to_the_global_random_state(module: str) -> None:
    """Seeding is done inside `fork_rng`, or with generators."""
    if module.startswith("demo."):
        return
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            text = ast.unparse(node.func)
            assert text not in {"random.seed", "np.random.seed", "numpy.random.seed"}
            if text == "torch.manual_seed":
                assert "fork_rng" in ast.unparse(MODULES[module])


SCRIPT = """
import sys
import lens_unlearn
heavy = {"transformer_lens", "transformers", "datasets", "plotly", "pandas", "torch", "typer"} & set(sys.modules)
print(sorted(heavy))
from lens_unlearn import *
assert "Ablate" in dir(lens_unlearn) and Ablate.__name__ == "Ablate"
heavy = {"transformer_lens", "datasets", "plotly", "typer"} & set(sys.modules)
print(sorted(heavy - {"plotly"}))
"""


def test_importing_it_is_quick_and_every_public_name_is_there() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": str(ROOT.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[-2:]
    assert first == "[]", "import lens_unlearn imports nothing heavy"
    assert "transformer_lens" not in second


def test_the_public_names_are_those_of_the_modules() -> None:
    for name in lens_unlearn.__all__:
        assert getattr(lens_unlearn, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lens_unlearn.nothing
    for name, module in MODULES.items():
        for node in module.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" and name != "lens_unlearn":
                listed = ast.literal_eval(node.value)
                defined = {n.name for n in module.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
                defined |= {
                    t.id
                    for n in ast.walk(module)
                    if isinstance(n, ast.Assign | ast.AnnAssign)
                    for t in ast.walk(n)
                    if isinstance(t, ast.Name)
                }
                defined |= {name.split(".")[-1] for name in imports(module)}
                assert set(listed) <= defined, f"{name}.__all__ lists what is not there: {set(listed) - defined}"


def test_the_promises_name_tests_that_exist() -> None:
    text = (ROOT.parent / "docs" / "promises.md").read_text(encoding="utf-8")
    files = {
        name: (Path(__file__).parent / name).read_text(encoding="utf-8")
        for name in re.findall(r"\((?:\.\./tests/)(\w+\.py)\)", text)
    }
    assert len(files) > 8
    for line in text.splitlines():
        sources = "".join(files[name] for name in re.findall(r"\(\.\./tests/(\w+\.py)\)", line))
        for test in re.findall(r"`(test_\w+)`", line):
            assert f"def {test}(" in sources, f"docs/promises.md names {test}, which is not in the files of its line"
