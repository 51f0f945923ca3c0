"""The package's manners: nothing unpickles or prints, and importing it is quick."""

import ast
import os
import re
import subprocess
import sys

import pytest
from package_tree import MODULES, ROOT, imports

import lens_unlearn


@pytest.mark.parametrize("module", [*MODULES])
def test_nothing_is_unpickled_or_evaluated(module: str) -> None:
    if (
        module == "evaluation.code_process"
    ):  # runs generated programs; a script of its own, which the package does not import
        return
    tree = MODULES[module]
    names = {name.split(".")[0] for name, _ in imports(tree)}
    assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree):
        if module == "demo.recipe.train":  # the recipe goes on from its own checkpoints, as plain tensors
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


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith(("model", "demo.recipe"))])
def test_transformer_lens_and_transformers_models_are_known_to_one_room(module: str) -> None:
    names = {name for name, _ in imports(MODULES[module]) if name.split(".")[0] in ("transformer_lens", "transformers")}
    assert not names, f"{module} imports {names}: only the room model knows these"


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
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" and name:
                listed = ast.literal_eval(node.value)
                defined = {n.name for n in module.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
                defined |= {
                    t.id
                    for n in ast.walk(module)
                    if isinstance(n, ast.Assign | ast.AnnAssign)
                    for t in ast.walk(n)
                    if isinstance(t, ast.Name)
                }
                defined |= {name.split(".")[-1] for name, _ in imports(module)}
                assert set(listed) <= defined, f"{name}.__all__ lists what is not there: {set(listed) - defined}"


def test_the_promises_name_tests_that_exist() -> None:
    page = ROOT.parent / "docs" / "promises.md"
    text = page.read_text(encoding="utf-8")
    links = {
        name: (page.parent / name).read_text(encoding="utf-8")
        for name in re.findall(r"\((\.\./tests/[\w/]+\.py)\)", text)
    }
    assert len(links) > 8
    for line in text.splitlines():
        sources = "".join(links[name] for name in re.findall(r"\((\.\./tests/[\w/]+\.py)\)", line))
        for test in re.findall(r"`(test_\w+)`", line):
            assert f"def {test}(" in sources, f"docs/promises.md names {test}, which is not in the files of its line"
