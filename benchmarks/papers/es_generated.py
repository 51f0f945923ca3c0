"""Effective Skill Unlearning: answers that are generated and checked, with the protocol of `bench effective-skill`.

What a model does not solve cannot be seen to go, so this asks the unedited model alone; on one that solves
enough, `lens-unlearn bench effective-skill` sets the methods beside it.
"""

from collections.abc import Iterator
from typing import Any

import lens_unlearn as lu
from benchmarks.papers.models import SMOLLM2, smollm2
from benchmarks.papers.plan import Cell, Plan

ROWS, SHOTS = 50, 2
"""Questions of each skill, and solved ones before each."""
SKILLS = ("gsm8k", "mbpp")
OPTIONS: dict[str, Any] = {
    "allow_code_execution": True,
    "temperature": 0.0,
    "shots": SHOTS,
    "languages": (),
    "max_new_tokens": 160,
}


def cells() -> Iterator[Cell]:
    """Yield a cell for the model as it is."""

    def rows() -> Iterator[list[str]]:
        data = lu.benchmarks.effective_skill.benchmark.data("../shared/data", ROWS, {**OPTIONS, "forget": SKILLS[0]})
        asked = lu.benchmarks.effective_skill(smollm2(), data, {}, progress=False)
        yield [shown(asked["base", skill]) for skill in SKILLS]

    yield Cell(("unedited",), rows)


def shown(measure: Any) -> str:
    """Write a share with its interval."""
    low, high = measure.interval()
    return f"{measure.value:.0%} [{low:.0%}, {high:.0%}]"


PLAN = Plan(
    "es-generated",
    "Effective Skill Unlearning: generated answers to GSM8K and MBPP, checked",
    SMOLLM2,
    ("model", *(f"{skill} solved" for skill in SKILLS)),
    cells,
)
