"""How time and memory grow: with tokens, layers, vocabulary, and what is asked for at once.

    python benchmarks/growth.py

`collect` (three sites, the default statistics), `evaluate` (base and ablations), Key Space Detection (from texts to the detector,
calibrated beside other skills) and `attribute` (from answers to a score of every neuron), on GPT-2's architecture of random
weights. One size is varied at a time: as it is, twice and four times; all others stay. Times are taken in turn. Memory is
the highest resident size beyond the model, each in a process in which what is freed goes back to the system. The last columns say
how much four times as much costs, over four times the cost: 1 is linear, and below 1 something is shared.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from memory import STRICT, highest, lower
from record import begin
from timing import gpt2, interleaved, options, random_corpus

import lens_unlearn as lu

BASE = {"layers": 4, "vocabulary": 4000, "tokens": 4096}
TASKS: dict[str, tuple[str, ...]] = {
    "collect": ("tokens", "layers", "vocabulary", "sites"),
    "evaluate": ("tokens", "layers", "vocabulary", "conditions"),
    "key space": ("tokens", "layers", "vocabulary", "skills"),
    "attribute": ("tokens", "layers", "vocabulary", "steps"),
}
"""What is measured, and what is varied of it."""
TIMES = (1, 2, 4)
LENGTH, WIDTH, PROMPT = 64, 128, 24
GOAL = 1.1
"""Of the cost of four times as much, over four times the cost; what is above 1 may be noise."""
NOISE = 16.0
"""MB: less than that beyond the model is what Python and its allocator happen to hold."""
SITES = ("mlp.pre", "mlp.post", "attn.z", "resid")


@cache
def model(layers: int, vocabulary: int) -> Any:
    """Return a model of random weights."""
    shape = {"n_layer": layers, "n_embd": WIDTH, "n_head": 4, "vocab_size": vocabulary}
    return gpt2(shape, LENGTH)[1]


@cache
def corpus(vocabulary: int, tokens: int, seed: int, prompt: int = 1) -> lu.Corpus:
    """Return a corpus of random tokens."""
    return random_corpus(vocabulary, max(2, tokens // LENGTH), LENGTH, seed=seed, prompt=prompt)


def work(task: str, varied: str, times: int, base: Mapping[str, int] = BASE) -> Callable[[], object]:
    """Return what to time: a task, of which one size is so many times that of the base."""
    size = {**base, **({varied: base[varied] * times} if varied in base else {})}
    many = times if varied not in base else 1
    bridge, tokens, vocabulary = model(size["layers"], size["vocabulary"]), size["tokens"], size["vocabulary"]
    match task:
        case "collect":
            texts = corpus(vocabulary, tokens, 0)
            sites = SITES[:many] if varied == "sites" else SITES[:3]
            return lambda: lu.collect(bridge, texts, sites, progress=False)
        case "evaluate":
            texts = corpus(vocabulary, tokens, 0)
            edits = {str(seed): ablation(bridge, seed) for seed in range(many)}
            return lambda: lu.evaluate(bridge, {"texts": texts}, edits, resamples=10, progress=False)
        case "key space":
            forget = corpus(vocabulary, tokens, 0, PROMPT)
            retain = [corpus(vocabulary, tokens, 1 + skill, PROMPT) for skill in range(many)]
            return lambda: lu.key_space_detection(bridge, forget, retain, layer=-1, control=False, progress=False)
        case _:
            facts = corpus(vocabulary, max(2 * LENGTH, tokens // 16), 0, PROMPT)
            return lambda: lu.attribute(bridge, facts, steps=2 * many, progress=False)


def ablation(bridge: Any, seed: int) -> lu.Ablate:
    """Return an ablation of a hundredth of the neurons of every layer."""
    chosen = torch.rand(int(bridge.cfg.n_layers), 4 * WIDTH, generator=torch.Generator().manual_seed(seed)) < 0.01
    return lu.Ablate(lu.NeuronMap({lu.Site(layer, "mlp.post"): row for layer, row in enumerate(chosen)}))


def memory(task: str, base: Mapping[str, int] = BASE) -> dict[str, list[float]]:
    """Return the highest size beyond the model, in MB, by what is varied; for this process, which `apart` starts."""
    found: dict[str, list[float]] = {}
    work(task, "tokens", 1, base)()  # what is loaded on the way does not count
    for varied in TASKS[task]:
        gc.collect()
        for times in TIMES:
            task_at = work(task, varied, times, base)
            before = lower()
            task_at()
            found.setdefault(varied, []).append(max(0.0, (highest() - before) / 1e6))
    return found


def apart(task: str) -> dict[str, list[float]]:
    """Measure memory in a process that keeps nothing back."""
    command = [sys.executable, __file__, "--only", task]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | STRICT).stdout
    return json.loads(printed.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, repeats=3)
    parser.add_argument("--task", choices=list(TASKS), action="append", help="default: all")
    parser.add_argument("--only", choices=list(TASKS), help="print the memory of one task as json")
    args, record = begin(parser, arguments)
    torch.set_num_threads(args.threads)
    base = {"layers": 1, "vocabulary": 50, "tokens": 2048} if args.tiny else BASE
    if args.only:
        print(json.dumps(memory(args.only, base)))
        return
    record.about(**base, width=WIDTH, length=LENGTH)
    columns = ["task", "varied", *(f"{times} x, s" for times in TIMES), *(f"{times} x, MB" for times in TIMES)]
    table = record.table("growth", [*columns, "time", "memory", f"at most {GOAL:g}"])
    for task, axes in ((task, TASKS[task]) for task in args.task or TASKS):
        held = memory(task, base) if args.tiny else apart(task)
        for varied in axes:
            ways = {str(times): work(task, varied, times, base) for times in TIMES}
            taken = [
                statistics.median(seconds) for seconds in interleaved(ways, 1 if args.tiny else args.repeats).values()
            ]
            used = held[varied]
            time_, size = taken[-1] / taken[0] / TIMES[-1], used[-1] / max(used[0], NOISE) / TIMES[-1]
            met = "yes" if max(time_, size) <= GOAL else "no"
            cells = [f"{s:.2f}" for s in taken] + [f"{m:.0f}" for m in used]
            table.row([task, varied, *cells, f"{time_:.2f}", f"{size:.2f}", met])
    record.end()


if __name__ == "__main__":
    main()
