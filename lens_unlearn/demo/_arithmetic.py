"""Arithmetic: sums and differences of two numbers below 100, with answers that can be checked."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from lens_unlearn.demo._split import split_of

LIMIT = 100


def problems(split: str) -> list[dict[str, object]]:
    """Return the problems of one split.

    The unordered pair of operands decides the split, whatever the operator: ``37+48``, ``48+37`` and
    ``48-37`` are in one split together.
    """
    records: list[dict[str, object]] = []
    for first in range(LIMIT):
        for second in range(LIMIT):
            low, high = sorted((first, second))
            if split_of(f"pair:{low},{high}", dev=0.1, test=0.1) == split:
                records.append(_problem(f"{first}+{second}=", first + second))
                if first >= second:
                    records.append(_problem(f"{first}-{second}=", first - second))
    return records


def grades(records: Sequence[dict[str, object]]) -> list[list[dict[str, object]]]:
    """Sort problems by how many of their operands are below ten: two, one, none.

    Two such operands are one problem in a hundred, and they are the table that all others need.
    """
    sorted_out: list[list[dict[str, object]]] = [[], [], []]
    for record in records:
        operands = re.findall(r"\d+", str(record["question"]))
        sorted_out[sum(len(operand) > 1 for operand in operands)].append(record)
    return sorted_out


def worksheet(pools: Sequence[Sequence[dict[str, object]]], rng: random.Random) -> str:
    """Return four to twelve problems, one on each line: what the demo model was trained on."""
    return "\n".join(str(rng.choice(rng.choice(pools))["text"]) for _ in range(rng.randint(4, 12)))


def _problem(question: str, result: int) -> dict[str, object]:
    return {
        "text": f"{question}{result}",
        "source": "sum" if "+" in question else "difference",
        "question": question,
        "answer": str(result),
    }
