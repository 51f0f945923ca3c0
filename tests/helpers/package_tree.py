"""The package as its source files show it: modules, and what each imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import lens_unlearn

ROOT = Path(lens_unlearn.__file__).parent


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its name below it; the package itself is ""."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found["" if name == "__init__" else name.removesuffix(".__init__")] = ast.parse(
            path.read_text(encoding="utf-8")
        )
    return found


MODULES = modules()


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Name what is imported anywhere, for type checkers too, and the function or method that does it; ("x.y", "")."""

    def visit(node: ast.AST, inside: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports are absolute"
                yield from ((f"{child.module}.{alias.name}", inside) for alias in child.names)
            named = isinstance(child, ast.ClassDef | ast.FunctionDef)
            yield from visit(child, ".".join(filter(None, (inside, child.name))) if named else inside)

    yield from visit(tree, "")


def own(name: str) -> str | None:
    """Resolve a name of ours to the module it is, or is in."""
    if name != "lens_unlearn" and not name.startswith("lens_unlearn."):
        return None
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts)
