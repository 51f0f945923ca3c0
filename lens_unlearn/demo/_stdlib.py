"""The running interpreter's standard library, as a list of modules with their source text."""

from __future__ import annotations

import ast
import fnmatch
import os
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lens_unlearn.demo._split import split_of

NO_PROSE_FOLDERS = (
    "__pycache__",
    "__phello__",
    "config-*",
    "dist-packages",
    "encodings",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
)
"""Generated tables, jokes, and what is not the standard library."""

NO_CODE_FOLDERS = (*NO_PROSE_FOLDERS, "ensurepip", "idlelib", "lib2to3", "test", "tests", "turtledemo")
"""Tests and bundled applications are unlike library code; their comments are still prose."""

SKIPPED_MODULES = ("__hello__", "_sysconfigdata*", "antigravity", "html.entities", "this", "token")
"""Jokes, and modules that are tables."""


class Module(NamedTuple):
    """One module of the standard library."""

    name: str
    path: Path

    @property
    def split(self) -> str:
        """The module's split. A module in pure Python (``_pyio``) stays with its accelerated twin."""
        family = self.name
        if family.startswith("_"):
            family = family.lstrip("_").removeprefix("py")
        return split_of(f"module:{family}", dev=0.07, test=0.07)

    def read(self) -> str:
        """Return the source text, empty where a distribution has locked or re-encoded the file."""
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""


def modules(skipped_folders: tuple[str, ...]) -> Iterator[Module]:
    """Yield the modules of the standard library, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, subfolders, files in os.walk(root):
        # Pruned while walking: site-packages can be larger than everything else.
        subfolders[:] = [name for name in subfolders if not _matches([name], skipped_folders)]
        paths.extend(Path(folder, name).relative_to(root) for name in files if name.endswith(".py"))
    for path in sorted(paths, key=lambda path: path.parts):
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        if not _matches([name], SKIPPED_MODULES):
            yield Module(name, root / path)


def parse(source: str) -> ast.Module:
    """Parse source text; the warnings about it are for its authors, and must not become errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield what holds statements, and the statements, in the order of `ast.walk`, which looks into every expression as well."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for name in node._fields:
            inside = getattr(node, name, None)
            if (
                isinstance(inside, list)
                and inside
                and isinstance(inside[0], (ast.stmt, ast.excepthandler, ast.match_case))
            ):
                waiting.extend(inside)


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)
