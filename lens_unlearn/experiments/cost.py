"""What a run will read, and how long that takes here: said before the first pass over texts.

Knows how many tokens each step of an experiment reads, and a measured speed; knows nothing of what is done with them.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lens_unlearn.core.intervals import FEWEST
from lens_unlearn.core.progress import say
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.evaluation.teacher_forcing import predict
from lens_unlearn.experiments.plan import Plan
from lens_unlearn.methods.method import Method
from lens_unlearn.model.hooks import one_thread
from lens_unlearn.model.host import Model, device_of
from lens_unlearn.neurons.key_sample import KeySample

__all__ = ["announce", "reading", "sweep_passes", "swept"]

SWEPT = 0.2
"""Share of a run's tokens that the trade-off over strengths may take."""
SWEPT_LEAST = 500
"""Tokens of each corpus that it is measured on, at least."""
SWEPT_LONGEST, SWEPT_SHORTEST = 128, 16
"""Between these are the tokens of a row, at most, that it is measured on."""
FOUND = 0.2
"""Share of a text that is run under a method that judges prompts: one layer of every row, and all behind of those that it finds."""
EVALUATIONS = 7
"""Strengths that tuning tries: as many as it needs at most."""
MEASURED = 1024
"""Tokens of the pass by which the speed is measured."""


def reading(
    plan: Plan, fitted_to: Mapping[str, tuple[Corpus, Any]], tuned_on: Mapping[str, Corpus], test: Mapping[str, Corpus]
) -> dict[str, int]:
    """Return how many tokens each step of a run sends through the model, once for each time that it does.

    Args:
        plan: Says what is done.
        fitted_to: By method, the texts of forget and retain that it is fitted to; several of retain in a list.
        tuned_on: What is tuned on.
        test: What is tested on.
    """
    steps = {"collect": 0, "tune": 0, "evaluate": 0, "sweep": 0}
    read = set[tuple[int, bool]]()
    for name, record in plan.records.items():
        forget, retain = fitted_to[name]
        for text in (forget, *(retain if isinstance(retain, list) else [retain])):
            if record.judges_prompts and (id(text), True) not in read:
                read.add((id(text), True))
                steps["collect"] += text.n_read - text.n_tokens
            if record.fitted_to not in (Corpus, KeySample) and (id(text), False) not in read:
                read.add((id(text), False))
                steps["collect"] += min(text.n_read, plan.tokens) if record.judges_prompts else text.n_read
    if plan.retain_drop is not None:
        steps["tune"] = (1 + EVALUATIONS * len(plan.records)) * _tokens(tuned_on.values())
    controls = {name: 1 if plan.deals and not r.judges_prompts else plan.controls for name, r in plan.records.items()}
    passes = 1 + sum((1 + controls[name]) * _share(record) for name, record in plan.records.items())
    steps["evaluate"] = round(passes * _tokens(test.values()))
    if plan.sweep:
        passes = sweep_passes(plan)
        steps["sweep"] = round(passes * _tokens(swept(test, sum(steps.values()), passes, plan.seed).values()))
    return {step: tokens for step, tokens in steps.items() if tokens}


def _share(record: Method) -> float:
    """Return how much of a text a pass under a method runs."""
    return FOUND if record.judges_prompts else 1.0


def sweep_passes(plan: Plan) -> float:
    """Return how often the sweep reads a text: the unedited model, each method as found and at each strength, with a control."""
    chosen = {name: record.defaults().get(record.strength) for name, record in plan.records.items()}
    strengths = {name: len(plan.strengths_of(name, chosen[name])) for name in plan.records}
    return 1 + sum((2 + 2 * strengths[name]) * _share(record) for name, record in plan.records.items())


def swept(test: Mapping[str, Corpus], rest: int, passes: float, seed: int) -> dict[str, Corpus]:
    """Return the part of the test texts that the sweep is measured on, so that it takes its share of all tokens at most.

    Fewer documents than an interval needs say nothing, so long ones are cut first.

    Args:
        test: What is tested on.
        rest: Tokens that everything else sends through the model.
        passes: How often the sweep reads a text.
        seed: Of the draw.
    """
    tokens = max(SWEPT_LEAST, int(rest * SWEPT / (1 - SWEPT) / (2 * passes)))
    longest = min(SWEPT_LONGEST, max(SWEPT_SHORTEST, tokens // (2 * FEWEST)))
    most = max(1, tokens - longest)  # a draw ends with the row that makes it enough
    texts = {name: test[name].shortened(longest) for name in ("forget", "retain")}
    counted = {name: max(1, most * text.n_tokens // max(1, text.n_read)) for name, text in texts.items()}
    return {name: text.sample(counted[name], seed, units=FEWEST) for name, text in texts.items()}


def announce(model: Model, steps: Mapping[str, int], records: Sequence[Method], text: Corpus) -> None:
    """Say what will be done, how much is read for it, how fast this machine is, and how long it will take.

    Args:
        model: The model.
        steps: Tokens by step, as `reading` returns them.
        records: The methods.
        text: Some text, to measure the speed.
    """
    say(words(steps, _speed(model, text), records))


def words(steps: Mapping[str, int], speed: float, records: Sequence[Method]) -> str:
    """Write the announcement.

    Args:
        steps: Tokens by step.
        speed: Tokens per second.
        records: The methods.
    """
    listed = ", ".join(f"{step} {_short(tokens)}" for step, tokens in steps.items())
    names = ", ".join(record.name for record in records)
    saved = f"; --no-sweep saves {_time(steps['sweep'] / speed)}" if steps.get("sweep") else ""
    trained = [record.name for record in records if record.trains]
    training = f", and the training of {', '.join(trained)}" if trained else ""
    took = _time(sum(steps.values()) / speed)
    return f"{names}: {listed} tokens at {_short(round(speed))} tokens/s: about {took}{training}{saved}"


def _tokens(corpora: Iterable[Corpus]) -> int:
    return sum(corpus.n_read for corpus in corpora)


def _short(number: int) -> str:
    return f"{number / 1000:.0f}k" if number >= 10_000 else f"{number / 1000:.1f}k" if number >= 1000 else str(number)


def _time(seconds: float) -> str:
    if seconds < 55:
        return f"{max(1, round(seconds / 5) * 5)} seconds"
    minutes = max(1, round(seconds / 60))
    return f"{minutes} minute{'s' if minutes > 1 else ''}"


def _speed(model: Model, corpus: Corpus) -> float:
    """Return how many tokens per second a model reads and predicts here."""
    lengths = corpus.starts.diff()
    rows = lengths.cumsum(0).le(MEASURED).nonzero().flatten().tolist() or [0]
    took = 1e-9
    with one_thread(model), torch.no_grad():
        for part in (rows[:1], rows):  # the first is for warming up
            batch = corpus.take(part)
            begin = time.perf_counter()
            predict(model, batch)
            if device_of(model).type == "cuda":
                torch.cuda.synchronize(device_of(model))
            took = time.perf_counter() - begin
    return float(lengths[rows].sum()) / took
