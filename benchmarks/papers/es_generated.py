"""Effective Skill Unlearning: answers that are generated and checked, with the protocol of `bench effective-skill`."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import lens_unlearn as lu
from benchmarks.papers.models import SMOLLM2, smollm2
from benchmarks.papers.plan import Cell, Plan

ROWS, FITTED = 50, 60
"""Of each skill: questions that are asked, and others that methods are fitted to."""
OPTIONS: dict[str, Any] = {
    "allow_code_execution": True,
    "temperature": 0.0,
    "shots": 2,
    "languages": (),
    "max_new_tokens": 160,
}
SKILLS = ("gsm8k", "mbpp")
METHODS = ("selective-pruning", "neuron-adjust", "key-space-detection")


@cache
def data(forget: str) -> Any:
    """Return the questions, and the rows that methods are fitted to."""
    return lu.benchmarks.effective_skill.benchmark.data("../shared/data", ROWS, {**OPTIONS, "forget": forget})


@cache
def corpora(forget: str) -> tuple[lu.Corpus, lu.Corpus]:
    """Return what methods are fitted to."""
    sides = {"forget": data(forget).forget, "retain": data(forget).retain}
    template = lu.benchmarks.effective_skill.benchmark.template
    forgotten, retained = (
        lu.read_corpus(list(rows[:FITTED]), smollm2(), field="question>answer", template=template, name=name)
        for name, rows in sides.items()
    )
    return forgotten, retained


def fitted(forget: str, method: str) -> lu.Intervention:
    """Fit a method with the fractions of the paper's models, or calibrated to 5 % of the other skill's prompts."""
    sides = corpora(forget)
    if method == "key-space-detection":
        return lu.key_space_detection(smollm2(), *sides, region="linear", false_alarms=0.05, progress=False)
    function = {"selective-pruning": lu.selective_pruning, "neuron-adjust": lu.neuron_adjust}[method]
    return function(smollm2(), *sides, fraction=0.03, progress=False)


def cells() -> Iterator[Cell]:
    """Yield a cell for the model as it is, and for each skill that is forgotten by each method."""
    for forget in ("", *SKILLS):
        for method in METHODS if forget else ("unedited",):

            def rows(forget: str = forget, method: str = method) -> Iterator[list[str]]:
                conditions = {method: fitted(forget, method)} if forget else {}
                asked = lu.benchmarks.effective_skill(smollm2(), data(forget or SKILLS[0]), conditions, progress=False)
                name = method if forget else "base"
                yield [shown(asked[name, skill]) for skill in SKILLS]

            yield Cell((forget or "nothing", method), rows)


def shown(measure: Any) -> str:
    """Write a share with its interval."""
    low, high = measure.interval()
    return f"{measure.value:.0%} [{low:.0%}, {high:.0%}]"


PLAN = Plan(
    "es-generated",
    "Effective Skill Unlearning: generated answers to GSM8K and MBPP, checked",
    SMOLLM2,
    ("forgotten", "method", "gsm8k solved", "mbpp solved"),
    cells,
)
