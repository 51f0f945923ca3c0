"""Effective Skill Unlearning, queries of another form than those that it was fitted on."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from real_detection import questions, share

import lens_unlearn as lu
from benchmarks.papers.models import SMOLLM2, smollm2
from benchmarks.papers.plan import Cell, Plan

SEEDS = (0, 1, 2)
WAYS: dict[str, dict[str, Any]] = {
    "box, as published": {"region": "box"},
    "linear, calibrated": {"region": "linear"},
    "linear, means": {"region": "linear", "pool": "mean"},
}
ALPHA = {"gsm8k": 2.0, "mbpp": 1.4}
"""Those of the paper."""
FORMS = {
    "as fitted": "{prompt}",
    "a space behind it": "{prompt} ",
    "asked for": "Could you please help me with this?\n\n{prompt}",
    "in a chat": "{prompt}",
    "after an example": "Question: Name three colours.\nAnswer: Red, green and blue.\n\nQuestion: {prompt}\nAnswer:",
    "first half": "{half}",
}
"""How a question is put; the box is fitted on the bare one."""


@cache
def sets() -> dict[str, tuple[lu.Corpus, lu.Corpus]]:
    """Return whole questions by set: to fit on, to ask."""
    return {name: (fit, test) for name, fit, test in questions("whole", 60_000, smollm2(), 192)}


def pool_of(way: str) -> Any:
    """Return which key of a prompt a way judges."""
    return WAYS[way].get("pool", "last")


@cache
def detectors(forgotten: str, way: str) -> list[lu.Abstain]:
    """Fit a detector of the last layer to 150 questions, by seed."""
    layer, pool = int(smollm2().cfg.n_layers) - 1, pool_of(way)

    def keys(name: str, seed: int) -> lu.KeySample:
        corpus = sets()[name][0]
        order = np.random.default_rng(seed).permutation(corpus.n_documents)[:150]
        drawn = corpus.only(order.tolist()).first(10**9)
        options = {"capacity": 150, "seed": seed, "progress": False}
        return lu.query_keys(smollm2(), drawn, lu.Site(layer, "mlp.post"), pool=pool, **options)

    published = {"alpha": ALPHA[forgotten]} if way.startswith("box") else {}
    return [
        lu.key_space_detection(
            smollm2(), keys(forgotten, seed), [keys(other, seed) for other in sets() if other != forgotten],
            layer=layer, seed=seed, control=False, progress=False, **WAYS[way], **published,
        )
        for seed in SEEDS
    ]  # fmt: skip


def posed(corpus: lu.Corpus, form: str, count: int = 100) -> lu.Corpus:
    """Put a set's questions in another form."""
    decode = smollm2().tokenizer.decode
    texts = [decode(corpus.prompt(row)).strip() for row in range(min(count, corpus.n_rows))]
    halves = [" ".join(text.split()[: len(text.split()) // 2]) for text in texts]
    prompts = [FORMS[form].format(prompt=text, half=half) for text, half in zip(texts, halves, strict=True)]
    if form == "in a chat":
        turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": "."}] for prompt in prompts]
        return lu.read_corpus([{"messages": turn} for turn in turns], smollm2(), chat=True, window=256)
    rows = [{"prompt": prompt, "answer": "."} for prompt in prompts]
    return lu.read_corpus(rows, smollm2(), field="prompt>answer", window=256)


@cache
def asked_keys(name: str, form: str, pool: Any) -> lu.KeySample:
    """Return the keys of questions that are put in a form."""
    site = lu.Site(int(smollm2().cfg.n_layers) - 1, "mlp.post")
    return lu.query_keys(smollm2(), posed(sets()[name][1], form), site, capacity=100, pool=pool, progress=False)


def cells() -> Iterator[Cell]:
    """Yield a cell for each set that is forgotten, each way, and each form of its questions and of the other set's."""
    for forgotten, other in (("gsm8k", "mbpp"), ("mbpp", "gsm8k")):
        for way in WAYS:
            for form in FORMS:

                def rows(
                    forgotten: str = forgotten, other: str = other, way: str = way, form: str = form
                ) -> Iterator[list[str]]:
                    acts = detectors(forgotten, way)
                    asked = [asked_keys(name, form, pool_of(way)) for name in (forgotten, other)]
                    shares = [share(acts, [keys] * len(SEEDS)) for keys in asked]
                    yield [f"{value:.1%} [{low:.1%}, {high:.1%}]" for value, low, high in shares]

                yield Cell((forgotten, way, form), rows)


PLAN = Plan(
    "es-queries",
    "Effective Skill Unlearning: questions in another form than those that the region was fitted on",
    SMOLLM2,
    ("forgotten", "way", "asked", "withheld of it", "withheld of the other"),
    cells,
)
