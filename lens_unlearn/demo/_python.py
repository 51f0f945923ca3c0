"""Python source without words: standard-library code, its docstrings and comments removed.

The words are removed so that forgetting Python and retaining English are two different things to ask
of a model. Knows syntax trees; which files there are, `_stdlib` knows.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache

from lens_unlearn.demo._split import up_to
from lens_unlearn.demo._stdlib import NO_CODE_FOLDERS, Module, modules, parse, statements

SHORTEST, LONGEST = 200, 1500


def documents(split: str) -> list[dict[str, object]]:
    """Return the code documents of one split; a module belongs to one split as a whole."""
    records: list[dict[str, object]] = []
    seen: set[str] = set()
    sources = list(modules(NO_CODE_FOLDERS))
    for claimant in up_to(split):
        for module in sources:
            if module.split != claimant:
                continue
            texts = [text for text in _module_pieces(module) if text not in seen]
            seen.update(texts)
            if claimant == split:
                records.extend({"text": text, "source": module.name} for text in dict.fromkeys(texts))
    return records


@cache  # every split reads the modules of those before it
def _module_pieces(module: Module) -> tuple[str, ...]:
    return tuple(pieces(without_words(module.read()) or ""))


def without_words(source: str) -> str | None:
    """Remove docstrings and comments from a module.

    Args:
        source: The text of a module.

    Returns:
        Code that parses, or None where the module does not parse before or after.
    """
    try:
        code = _without_comments(source)
        while True:
            tree = parse(code)
            nodes = list(_docstrings(tree))
            if not nodes:
                break
            code = _without_nodes(code, nodes)
    except (SyntaxError, ValueError, tokenize.TokenError):
        return None
    return re.sub(r"\n(?:[ \t]*\n)+", "\n\n", code).strip("\n") + "\n"


def pieces(code: str) -> Iterator[str]:
    """Cut a module into documents: top-level definitions, cut at line ends where they are long."""
    pending = ""
    for block in _blocks(code):
        if len(pending) >= SHORTEST:
            yield pending.strip("\n")
            pending = ""
        for line in block.splitlines(keepends=True):
            if len(pending) + len(line) > LONGEST and len(pending) >= SHORTEST:
                yield pending.strip("\n")
                pending = ""
            pending += line
    if len(pending.strip("\n")) >= SHORTEST:
        yield pending.strip("\n")


def _blocks(code: str) -> Iterator[str]:
    """Yield the code in runs of lines that each begin at a top-level definition."""
    tree = parse(code)
    starts = [0]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
            starts.append(first - 1)
            starts.append(node.end_lineno or first)
    lines = _lines(code)
    bounds = sorted({*starts, len(lines)})
    for begin, end in zip(bounds[:-1], bounds[1:]):
        yield "".join(lines[begin:end])


def _docstrings(tree: ast.Module) -> Iterator[tuple[ast.Expr, bool]]:
    """Yield each docstring, with whether it is the only statement of its body."""
    for node in statements(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield first, len(node.body) == 1


def _without_nodes(code: str, nodes: list[tuple[ast.Expr, bool]]) -> str:
    # The syntax tree counts columns in UTF-8 bytes, so the editing is done on bytes.
    lines = code.encode().splitlines(keepends=True)
    for node, alone in sorted(nodes, key=lambda item: -item[0].lineno):
        begin, end = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        before, after = lines[begin][: node.col_offset], lines[end][node.end_col_offset :]
        filled = before + (b"pass" if alone else b"") + after
        lines[begin : end + 1] = [filled] if filled.strip() else []
    return b"".join(lines).decode()


def _lines(text: str) -> list[str]:
    """Return the lines that the tokenizer and the syntax tree count, for which a form feed ends none."""
    return io.StringIO(text).readlines()


def _without_comments(source: str) -> str:
    lines = _lines(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            code = lines[row - 1][:column].rstrip()
            lines[row - 1] = code + "\n" if code else ""
    return "".join(lines)
