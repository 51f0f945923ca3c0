"""English prose: the standard library's documentation, reduced to its sentences.

Knows what reads like a sentence; which files there are, `_stdlib` knows.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import NamedTuple

from lens_unlearn.demo._split import split_of, up_to
from lens_unlearn.demo._stdlib import NO_PROSE_FOLDERS, Module, modules, parse, statements

SHORTEST, LONGEST = 60, 1200
"""Characters of a sentence, and of a document."""
MARKUP = (
    (re.compile(r":[a-z:]+:`~?([^`<]+)(?:<[^`>]*>)?`"), r"\1"),
    (re.compile(r"`+"), ""),
    (re.compile(r"\*{1,2}(\w[^*]*)\*{1,2}"), r"\1"),
    (re.compile(r"^(?:[*+-]|\d+[.)]|\([a-z0-9]\)) "), ""),
    (re.compile(r" \[\d+\]"), ""),
    (re.compile(r"::$"), ":"),
)
CODE = re.compile(r">>>|\.\.\. |::=| = |==|->|\\|[{}<>|~^$@]|__|\w\(\w*\)? ?\w*=|^\.\.|^:|Copyright|http")
WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*")


def documents(split: str) -> list[dict[str, object]]:
    """Return the prose documents of one split; a module or topic belongs to one split as a whole."""
    records: list[dict[str, object]] = []
    seen: set[str] = set()
    sources = list(_sources())
    for claimant in up_to(split):
        for source in sources:
            if source.split != claimant:
                continue
            lines = [line for line in source.paragraphs() if line not in seen]
            seen.update(lines)
            if claimant == split:
                texts = _joined(dict.fromkeys(lines))
                records.extend({"text": text, "source": source.name} for text in texts)
    return records


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a documentation text that are sentences, each on one line."""
    sentences = []
    for block in re.split(r"\n[ \t]*\n", text):
        line = " ".join(block.split())
        if len(line) < SHORTEST:  # most are; without markup it is no longer
            continue
        for pattern, replacement in MARKUP:
            line = pattern.sub(replacement, line)
        if is_prose(line):
            sentences.append(line)
    return sentences


def is_prose(line: str) -> bool:
    """Say whether a line reads as sentences rather than as code, a table or a heading."""
    if len(line) < SHORTEST or line[-1] not in ".?!:" or not line[0].isupper() or CODE.search(line):
        return False
    words = [word.strip(".,;:?!()'\"") for word in line.split()]
    plain = sum(bool(WORD.fullmatch(word[:1].lower() + word[1:])) for word in words)
    letters = sum(character.isalpha() or character == " " for character in line)
    return plain >= 0.85 * len(words) and letters >= 0.92 * len(line)


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """Join consecutive paragraphs into documents of at most about ``LONGEST`` characters."""
    pending = ""
    for line in lines:
        if pending and len(pending) + len(line) > LONGEST:
            yield pending
            pending = ""
        pending = f"{pending}\n{line}" if pending else line
    if pending:
        yield pending


class _Source(NamedTuple):
    """Something documented: its name, its split, and how to read its paragraphs."""

    name: str
    split: str
    paragraphs: Callable[[], Iterable[str]]


def _sources() -> Iterator[_Source]:
    """Yield the manual's topics, then the modules, in a fixed order."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for key in sorted(topics):
        split = split_of(f"topic:{key}", dev=0.07, test=0.07)
        yield _Source(f"topic {key}", split, partial(paragraphs, topics[key]))
    for module in modules(NO_PROSE_FOLDERS):
        yield _Source(module.name, module.split, partial(_module_paragraphs, module))


@cache  # every split reads the modules of those before it
def _module_paragraphs(module: Module) -> tuple[str, ...]:
    return tuple(line for text in _module_texts(module) for line in paragraphs(text))


def _module_texts(module: Module) -> Iterator[str]:
    """Yield a module's docstrings, then its comments."""
    source = module.read()
    try:
        tree = parse(source)
    except (SyntaxError, ValueError):
        return
    for node in statements(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
    yield "\n".join(_comments(source))


def _comments(source: str) -> Iterator[str]:
    """Yield the comments that have a line of their own, with an empty line wherever code intervenes."""
    for line in source.splitlines():
        stripped = line.strip()
        yield stripped.lstrip("#!: ") if stripped.startswith("#") else ""
