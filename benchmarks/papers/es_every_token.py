"""Effective Skill Unlearning: the decision at the end of the prompt alone, or at every token from there on."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from record import percent

import lens_unlearn as lu
from benchmarks.papers.es_queries import SEEDS, WAYS, detectors, sets
from benchmarks.papers.models import SMOLLM2, smollm2
from benchmarks.papers.plan import Cell, Plan

WHEN = ("prompt", "every_token")
QUESTIONS = 40


@cache
def asked() -> dict[str, lu.Corpus]:
    """Return questions with the beginning of their answers, which the model is given token by token."""
    return {name: test.only(range(QUESTIONS)) for name, (_, test) in sets().items() if name in ("gsm8k", "mbpp")}


@cache
def base() -> lu.Report:
    """Return the model's own accuracy on the answers."""
    return lu.evaluate(smollm2(), asked(), {}, progress=False)


def cells() -> Iterator[Cell]:
    """Yield a cell for each set that is forgotten, each way, and each moment of the decision."""
    for forgotten, other in (("gsm8k", "mbpp"), ("mbpp", "gsm8k")):
        for way in WAYS:
            for when in WHEN:

                def rows(
                    forgotten: str = forgotten, other: str = other, way: str = way, when: str = when
                ) -> Iterator[list[str]]:
                    acts = [replace(one, when=when) for one in detectors(forgotten, way)]
                    report = lu.evaluate(smollm2(), asked(), {"withheld": acts}, base=base(), progress=False)
                    yield [percent(report.drop("withheld", name)) for name in (forgotten, other)]

                yield Cell((forgotten, way, when), rows)


PLAN = Plan(
    "es-every-token",
    f"Effective Skill Unlearning: when the decision is made ({len(SEEDS)} draws of the queries that are fitted)",
    SMOLLM2,
    ("forgotten", "way", "when", "lost of it", "lost of the other"),
    cells,
)
