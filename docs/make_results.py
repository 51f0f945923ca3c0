"""Fill the tables of the pages from the stored outputs of benchmarks, and recompute the numbers in their prose.

    python docs/make_results.py                  # rewrite README.md and the pages where outputs say otherwise
    python docs/make_results.py --list           # every command of the pages, with the minutes that it took
    python docs/make_results.py --run [NAME ...] # run them again (all, or some), one thread each, and rewrite the pages

A page shows the command of an output: ``python benchmarks/results.py ... --save benchmarks/outputs/pruning.json``. What stands in
that file (benchmarks/record.py) is named in HTML comments, which no reader sees:

    <!-- table pruning.budgets -->   <!-- end -->                  the table "budgets" of pruning.json, filled in between
    72 %<!-- = pruning.budgets(forgotten="code", budget="10%")["forget lost"] -->       a number of the prose

After ``=`` is a Python expression: an output, its table, the rows in which columns have these values (a tuple: one of these), and
a column, which gives a NumPy array of the rows' values, percentages as fractions. The text says how they are summed up: one number
is what every value rounds to (``.min()``, ``.max()`` and the like make one of many), "46 to 63" are the lowest and the highest,
"5, 6 and 7" are one value each, and what comes after "below", "under", "less than", "above", "over" or "more than" is a bound.
Values are rounded as written. All other numbers of README.md and docs/results.md must be settings: of a command of the same
section, or of an output that it quotes; versions in pyproject.toml; or conventions, such as intervals of 95 %. What is not right is
said, and tests/test_numbers.py fails.
"""

import argparse
import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
OUTPUTS = "benchmarks/outputs"
COVERED = ("README.md", "docs/results.md")
"""Pages in which every number is a claim or a setting."""
CONVENTIONS = {0.0, 1.0, 2.0, 95.0, 0.05}
"""Of definitions: nothing, one, two; intervals of 95 %, tests at .05."""
NO_NUMBERS = (r"`[^`\n]*`", r"!\[[^\]]*\]\([^)]*\)", r"\]\([^)]*\)", r"\d{4}\.\d{5}", r"\b[A-Z][a-z]+ 20\d\d\b")
"""Code, pictures, links, numbers of arXiv, dates."""

NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
SIGNED = rf"[-−]?{NUMBER}"
UNIT = r"\s*%|\s+points?|\s+times"
BETWEEN = r"(?:,\s+and\s+|,\s+|\s+and\s+|\s+or\s+|\s+to\s+)"
CLAIM = re.compile(
    rf"(?<![\w.,-])(?P<numbers>{SIGNED}(?:{BETWEEN}{SIGNED})*)(?P<unit>{UNIT})?<!--\s*=(?P<source>.*?)-->", re.DOTALL
)
BOUND = re.compile(r"\b(?:(below|under|less\s+than|fewer\s+than)|(above|over|more\s+than))\s+\Z")
TABLE = re.compile(r"(<!-- table (\w+)\.(\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
FENCE = re.compile(r"^( *)```[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


class Rows:
    """Some rows of a stored table."""

    def __init__(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.name, self.columns, self.rows = name, list(columns), rows

    def __call__(self, **wanted: Any) -> "Rows":
        """Keep the rows in which columns have these values; a tuple: one of these."""
        kept = self.rows
        for column, value in wanted.items():
            place = self._place(column)
            values = set(map(str, value if isinstance(value, tuple) else (value,)))
            missing = values - {row[place] for row in kept}
            if missing:
                raise ValueError(f"{self.name} has no such row with {column} {', '.join(sorted(missing))}")
            kept = [row for row in kept if row[place] in values]
        return Rows(self.name, self.columns, kept)

    def __getitem__(self, column: str) -> np.ndarray:
        """Return a column's values, percentages as fractions, without their intervals."""
        place = self._place(column)
        return np.array([value_of(row[place], f"{self.name}, {column}") for row in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def _place(self, column: str) -> int:
        if column not in self.columns:
            raise ValueError(f"{self.name} has no column {column!r}: it has {', '.join(self.columns)}")
        return self.columns.index(column)

    def markdown(self) -> str:
        """Return the table as a page shows it."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def value_of(cell: str, where: str) -> float:
    """Return the value in a cell: its first number outside brackets."""
    found = re.search(rf"(-?{NUMBER}(?:e[-+]?\d+)?)(\s*%)?", re.sub(r"\[.*?\]|\(.*?\)", "", cell))
    if found is None:
        raise ValueError(f"{where}: there is no number in the cell {cell!r}")
    return float(found[1].replace(",", "")) / (100 if found[2] else 1)


@dataclass
class Output:
    """What one command printed."""

    name: str
    stored: Mapping[str, Any]

    def __getattr__(self, table: str) -> Rows:
        """Return a table."""
        tables = self.stored["tables"]
        if table not in tables:
            raise ValueError(f"{self.name}.json has no table {table!r}: it has {', '.join(tables)}")
        return Rows(f"{self.name}.{table}", tables[table]["columns"], tables[table]["rows"])


def outputs(folder: Path = ROOT / OUTPUTS) -> dict[str, Output]:
    """Read every stored output."""
    files = sorted(folder.glob("*.json"))
    return {path.stem: Output(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in files}


def pages(root: Path = ROOT) -> dict[str, str]:
    """Read the README and all pages, by their path in the repository."""
    files = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in files}


# --- commands ------------------------------------------------------------------------------------------------------------


def commands(text: str) -> dict[str, str]:
    """Return the code blocks of a page that store outputs, by output; each is a script for a shell."""
    return {
        name: block for _, block in FENCE.findall(text) for name in re.findall(rf"--save {OUTPUTS}/(\w+)\.json", block)
    }


def typed(block: str, name: str) -> list[str]:
    """Return the command of a block that stores an output, in words."""
    lines = block.replace("\\\n", " ").splitlines()
    return shlex.split(next(line for line in lines if f"{OUTPUTS}/{name}.json" in line))


def run(names: Sequence[str], blocks: Mapping[str, str]) -> None:
    """Run commands of the pages again, one after the other, each on one thread."""
    unknown = set(names) - set(blocks)
    if unknown:
        raise SystemExit(f"no page stores an output {', '.join(sorted(unknown))}: choose from {', '.join(blocks)}")
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    failed = []
    for name in names or blocks:
        print(f"\n=== {name}\n{blocks[name]}", flush=True)
        if subprocess.run(["bash", "-ec", blocks[name]], cwd=ROOT, env=env, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed, and what they stored before is unchanged: {', '.join(failed)}")


# --- tables and numbers --------------------------------------------------------------------------------------------------


def filled(text: str, stored: Mapping[str, Output]) -> str:
    """Fill the tables of a page, and write the numbers of its prose anew; what cannot be computed stays."""

    def table(match: re.Match[str]) -> str:
        try:
            return f"{match[1]}\n{getattr(stored[match[2]], match[3]).markdown()}\n{match[4]}"
        except (KeyError, ValueError):
            return match[0]

    def claim(match: re.Match[str]) -> str:
        try:
            values = [] if bound_of(match) else values_of(match, stored)
        except ValueError:
            values = []
        made, end = "", 0
        for number, value in last(match, values):
            new = number[0] if right(number[0], value) else rounded_as(number[0], value)
            made += match["numbers"][end : number.start()] + new
            end = number.end()
        return made + match[0][end:]

    return CLAIM.sub(claim, TABLE.sub(table, text))


def bound_of(match: re.Match[str]) -> re.Match[str] | None:
    """Return the words that make the number of a claim a bound, if it is one."""
    return BOUND.search(match.string[: match.start()])


def values_of(match: re.Match[str], stored: Mapping[str, Output]) -> list[float]:
    """Return the values for the last numbers of a claim, in its unit: one for each, or all for a bound.

    Raises:
        ValueError: If the expression fails, or gives other values than the text has numbers for.
    """
    source = " ".join(match["source"].split())
    try:
        found = np.atleast_1d(np.asarray(eval(source, {"np": np, **stored}), float)).ravel()
    except Exception as error:
        raise ValueError(f"{source}: {error}") from error
    if not len(found) or not np.isfinite(found).all():
        raise ValueError(f"{source} gives {found}")
    scale = 100 if re.search("%|point", match["unit"] or "") else 1
    values = [float(value) * scale for value in found]
    numbers = re.findall(SIGNED, match["numbers"])
    if bound_of(match):
        return values
    if re.search(r"\s+to\s+\S+\Z", match["numbers"]):
        return [min(values), max(values)]
    if len(values) <= len(numbers):
        return values
    if len(numbers) > 1 or rounded_as(numbers[0], min(values)) != rounded_as(numbers[0], max(values)):
        raise ValueError(f"{source} gives {shown(values)}")
    return values[:1]


def last(match: re.Match[str], values: Sequence[float]) -> Iterator[tuple[re.Match[str], float]]:
    """Pair the last numbers of a claim with its values: of "seed 0, 22 %" and one value the second."""
    numbers = [*re.finditer(SIGNED, match["numbers"])]
    return zip(numbers[len(numbers) - len(values) :], values, strict=True)


def right(number: str, value: float) -> bool:
    """Whether a value rounds to a number as written; what lies in the middle may be rounded either way."""
    written = float(number.replace("−", "-").replace(",", ""))
    return abs(value - written) <= 0.5 * 10.0 ** -decimals(number) + 1e-9


def rounded_as(number: str, value: float) -> str:
    """Write a value with as many decimals as a number has, and without a leading zero where that has none."""
    made = f"{value:{',' if ',' in number else ''}.{decimals(number)}f}"
    return re.sub(r"^(-?)0\.", r"\1.", made) if number.lstrip("-−").startswith(".") else made


def decimals(number: str) -> int:
    """Return how many decimals a number is written with."""
    return len(number.partition(".")[2])


def shown(values: Sequence[float]) -> str:
    """Write values for a message."""
    return ", ".join(f"{value:.4g}" for value in values)


# --- what is not right ---------------------------------------------------------------------------------------------------


def problems(path: str, text: str, stored: Mapping[str, Output]) -> Iterator[str]:
    """Say, a sentence each, what of a page is not as the outputs have it."""
    for name, block in commands(text).items():
        if name not in stored:
            yield f"{path}: {OUTPUTS}/{name}.json is not there: run python docs/make_results.py --run {name}"
        elif typed(block, name) != list(stored[name].stored["argv"]):
            yield f"{path}: the command of {name} is not the stored one: {stored[name].stored['command']}"
    for match in TABLE.finditer(text):
        known = match[2] in stored and match[3] in stored[match[2]].stored["tables"]
        if not known or filled(match[0], stored) != match[0]:
            yield f"{path}: the table {match[2]}.{match[3]} is not the stored one: run python docs/make_results.py"
    released = versions()
    for part in re.split(r"^(?=## )", text, flags=re.MULTILINE):
        where = f"{path}, {part.partition(chr(10))[0].lstrip('# ')}"
        claims, beside = [*CLAIM.finditer(part)], set(commands(part))
        for match in claims:
            yield from wrong(where, match, stored)
        quoted = {match[2] for match in TABLE.finditer(part)}.union(*(names_in(match["source"]) for match in claims))
        quoted &= set(stored)
        if path == "docs/results.md":
            for name in sorted(quoted - beside):
                yield f"{where}: numbers are of {name}, whose command is not in this section"
        if path in COVERED:
            known = settings_of(stored[name] for name in quoted | beside & set(stored))
            for number, near in unclaimed(part, stored):
                if number not in released and float(re.sub(r"[,%\s]|points?|times", "", number)) not in known:
                    yield f"{where}: {number!r} in {near!r} is no setting of a command here, and names no output"
    for stray in re.findall(r".{0,30}<!--\s*=.{0,40}", CLAIM.sub("", text)):
        yield f"{path}: an expression that is not right behind a number: {stray!r}"


def wrong(where: str, match: re.Match[str], stored: Mapping[str, Output]) -> Iterator[str]:
    """Say what of a claim is wrong."""
    said, bound = " ".join(f"{match['numbers']}{match['unit'] or ''}".split()), bound_of(match)
    try:
        values = values_of(match, stored)
    except ValueError as error:
        yield f"{where}: {said!r}: {error}"
        return
    if bound:
        limit = float(re.findall(SIGNED, match["numbers"])[-1].replace(",", ""))
        if not (max(values) < limit if bound[1] else min(values) > limit):
            yield f"{where}: '{bound[0]}{said}', but the output gives {shown(values)}"
    elif not all(right(number[0], value) for number, value in last(match, values)):
        yield f"{where}: {said!r}, but the output gives {shown(values)}"


def names_in(source: str) -> set[str]:
    """Return the names in an expression."""
    try:
        return {node.id for node in ast.walk(ast.parse(source.strip(), mode="eval")) if isinstance(node, ast.Name)}
    except SyntaxError:
        return set()


def unclaimed(text: str, stored: Mapping[str, Output]) -> Iterator[tuple[str, str]]:
    """Return the numbers of a text that are in no code, table of an output, link, name or claim, with what is around them."""

    def before(match: re.Match[str]) -> str:
        try:
            values = [] if bound_of(match) else values_of(match, stored)
        except ValueError:
            values = []
        first = next((number for number, _ in last(match, values)), None)
        return match["numbers"][: first.start()] if first else ""

    text = TABLE.sub("", FENCE.sub("", text))
    for pattern in NO_NUMBERS:
        text = re.sub(pattern, "x", text)
    text = re.sub(r"<[^>]*>", "x", CLAIM.sub(before, text))
    for match in re.finditer(rf"(?<![\w.\-/]){NUMBER}(?![\w\-]|\.\d)(?:{UNIT})?", text):
        yield match[0], " ".join(text[max(0, match.start() - 30) : match.end() + 20].split())


def settings_of(found: Iterable[Output]) -> set[float]:
    """Return all numbers in the settings of outputs, fractions also as percentages; and what is the same everywhere."""
    text = " ".join(json.dumps(output.stored["settings"]) for output in found)
    values = {float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", text)}
    return CONVENTIONS | values | {round(100 * value, 6) for value in values if value <= 1}


def versions(root: Path = ROOT) -> set[str]:
    """Return the versions that the package is made for."""
    text = "".join((root / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt"))
    lines = re.findall(r"^.*(?:[Pp]ython|transformer-lens).*$", text, re.MULTILINE)
    return {number for line in lines for number in re.findall(r"\d+\.\d+", line)}


def took(output: Output | None) -> str:
    """Say how long a command took."""
    seconds = output.stored.get("cpu_seconds") if output else None
    return f"{seconds / 60:.1f} minutes of CPU" if seconds else "not measured yet"


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only list the commands")
    parser.add_argument(
        "--run", nargs="*", metavar="NAME", help="run the commands of these outputs; none named: of all"
    )
    args = parser.parse_args(given)
    blocks = {name: block for text in pages().values() for name, block in commands(text).items()}
    stored = outputs()
    if args.list:
        for name, block in blocks.items():
            print(f"{name}: {took(stored.get(name))}\n{block}")
        return 0
    if args.run is not None:
        run(args.run, blocks)
    stored, found = outputs(), []
    for path, text in pages().items():
        made = filled(text, stored)
        if made != text:
            (ROOT / path).write_text(made, encoding="utf-8")
            print(f"{path}: rewritten")
        found += problems(path, made, stored)
    print("\n".join(found) or "every number is in its output")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
