"""Helpers shared by tests: the command line."""

import json
import random
import sys
from pathlib import Path

from lens_unlearn import cli

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "green",
    "frogs",
    "sing",
]


def write_texts(path: Path, seed: int, count: int = 30, words: list[str] | None = None) -> Path:
    draw = random.Random(seed)
    rows = [{"text": " ".join(draw.choices(words or WORDS, k=40)), "other": "x"} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(*arguments: object) -> int:
    """Run the command line in this process; return its exit code."""
    try:
        old, sys.argv = sys.argv, ["lens-unlearn", *map(str, arguments)]
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = old
    return 0


def run_arguments(model_dir: Path, texts: dict[str, Path], out: Path) -> list[object]:
    return [
        "run", "--model", model_dir, "--forget", f"{texts['forget']}:text", "--retain", f"{texts['retain']}:text",
        "--out", out, "--tokens", 400, "--window", 32, "--quiet", "--no-sweep",
    ]  # fmt: skip
