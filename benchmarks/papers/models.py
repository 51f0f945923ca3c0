"""The models that plans run on, loaded once."""

import functools
from typing import Any

from forgetting import share
from skills import Skills

import lens_unlearn as lu

__all__ = ["MEMORIZED", "SMOLLM2", "TRAINED", "facts", "memorized", "skills", "smollm2", "trained"]

SMOLLM2 = "SmolLM2-135M-Instruct"
MEMORIZED = "skillmix-tofu, which memorized 400 of TOFU's facts"
TOFU = "../shared/data/tofu"


@functools.cache
def smollm2() -> Any:
    """Return SmolLM2 from its GGUF file, in bfloat16 where that is fast."""
    return lu.load_model(".models/SmolLM2-135M-Instruct.Q4_1.gguf", dtype="auto")


@functools.cache
def skills() -> Skills:
    """Return SmolLM2's code, mathematics and prose."""
    return Skills(smollm2())


@functools.cache
def memorized() -> Any:
    """Return the small model that memorized facts."""
    return lu.load_model("../shared/models/skillmix-tofu")


@functools.cache
def facts(name: str) -> lu.Corpus:
    """Return facts of the memorized model: 40 to forget, 80 to retain, 40 neighbours, 40 that it never saw."""
    file, begin, end = {
        "forget": ("forget10", 0, 40),
        "retain": ("retain90", 0, 80),
        "neighbours": ("retain90", 200, 240),
        "unseen": ("holdout10", 0, 40),
    }[name]
    whole = lu.read_corpus(
        f"{TOFU}/{file}.jsonl:question>answer", memorized(), template="Q: {prompt}\nA: {answer}", window=160
    )
    return whole.only(range(begin, end))


TRAINED = ("forget", "retain", "neighbours", "unseen")
"""What `trained` gives the accuracy of: shares of answer tokens that are the most probable ones."""


def trained(seeds: tuple[int, ...] = (0,), **options: Any) -> list[str]:
    """Train SIMU to forget the forget facts, with the default settings but for these, and return the accuracy on each set."""
    corpora = {name: facts(name) for name in TRAINED}
    forget, retain, unseen = corpora["forget"], corpora["retain"], corpora["unseen"]
    deltas = [
        lu.simu(memorized(), forget, retain, unseen=unseen, seed=seed, progress=False, **options) for seed in seeds
    ]
    report = lu.evaluate(memorized(), corpora, {"simu": deltas}, progress=False)
    return [share(report["simu", name, "top1"]) for name in TRAINED]
