"""Memory: of `collect` over a short and a long corpus, and of SIMU beside training all weights.

    python benchmarks/memory.py

Every measurement is a process of its own, at its highest (Linux's VmHWM, set back once the model is made and has run once), in
which what is freed goes back to the system.
First `collect` of three sites over a corpus and over one 20 times as long. Then what a training takes beyond the model,
activations included: SIMU from attribution to the finished delta, with and without the attention's matrices, as it is and with
`memory="low"`, and plain PyTorch with the same objective and the same Sophia over all weights; two rows of 64 tokens of each
corpus at a time.
"""

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from timing import SHAPES, TINY, begin, gpt2, options, random_corpus, verdict
from torch.nn import functional as F

from lens_unlearn.evaluation.answer_losses import gradients_of
from lens_unlearn.methods.curvature import clip_norm
from lens_unlearn.methods.simu import simu
from lens_unlearn.methods.sophia import Sophia
from lens_unlearn.neurons.collect import collect

LENGTH = 64
ROWS, STEPS, PROMPT = 2, 4, 24
SITES = ("mlp.pre", "mlp.post", "attn.z")
# Otherwise glibc keeps freed memory back in pieces, more from batch to batch, for whoever asks: also for a plain forward pass.
STRICT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
GOALS = {"simu, attention": 0.25, "simu, no attention": 0.10}
GOALS |= {f"{way}, low": goal for way, goal in GOALS.items()}


def highest() -> int:
    """Return this process's highest resident size since `lower`, in bytes."""
    try:
        with open("/proc/self/status", encoding="utf-8") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def lower() -> int:
    """Begin to look for the highest anew, where the system can; return the size now."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")
    except OSError:
        pass
    return highest()


def collecting(shape: dict[str, int], times: int) -> tuple[int, int]:
    """Collect over so many times 2,048 tokens."""
    _, bridge = gpt2(shape, LENGTH)
    corpus = random_corpus(shape["vocab_size"], 32 * times, LENGTH)
    with torch.no_grad():
        bridge(torch.ones(1, 4, dtype=torch.long), return_type="logits")
    before = lower()
    collect(bridge, corpus, SITES, progress=False)
    return before, highest()


def training(shape: dict[str, int], way: str) -> tuple[int, int]:
    """Train a few steps in one of the ways; a tiny model first, so that what is loaded on the way does not count."""
    train(next(iter(TINY.values())), way)
    return train(shape, way)


def train(shape: dict[str, int], way: str) -> tuple[int, int]:
    """Train, and return the size before and the highest."""
    # One batch to forget, and a path of one step: attribution takes most of the time, and no two of its passes stand at a time.
    rows = {1: ROWS, 2: 10}
    forget, retain = (random_corpus(shape["vocab_size"], n, LENGTH, seed=s, prompt=PROMPT) for s, n in rows.items())
    hf, bridge = gpt2(shape, LENGTH)
    if way == "full weights, Sophia":
        bridge = None
    else:
        hf = None
    with torch.no_grad():
        (bridge or hf)(forget.take(range(ROWS)).tokens)
    gc.collect()
    before = lower()
    if bridge is None:
        full_weights(hf, forget, retain)
    else:
        attention: Any = "none" if "no attention" in way else "full"
        settings: dict[str, Any] = {"steps": STEPS, "batch_size": ROWS, "check_every": STEPS, "curvature_every": 2}
        settings["attribution_steps"] = 1
        settings["memory"] = "low" if way.endswith("low") else "default"
        simu(bridge, forget, retain, attention=attention, optimizer="sophia", progress=False, **settings)
    return before, highest()


def full_weights(hf: Any, forget: Any, retain: Any) -> None:
    """Descend on the retain loss and ascend on the forget loss with Sophia over every parameter."""
    parameters = list(hf.parameters())
    sophia = Sophia(parameters, lr=1e-5)

    def read(corpus: Any, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = corpus.take([(step * ROWS + i) % corpus.n_rows for i in range(ROWS)])
        tokens, where = (part.to(parameters[0].device) for part in (rows.tokens, rows.counted[:, 1:]))
        return hf(input_ids=tokens, use_cache=False).logits[:, :-1][where], tokens[:, 1:][where]

    for step in range(STEPS):
        forget_answers, retain_answers = read(forget, step), read(retain, step)
        loss = 2 * F.cross_entropy(*retain_answers) - F.cross_entropy(*forget_answers)
        gradients = gradients_of(loss, parameters)
        if step % 2 == 0:
            logits = torch.cat([read(forget, step)[0], read(retain, step)[0]])
            drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
            sophia.curve([len(drawn) * g.square() for g in gradients_of(F.cross_entropy(logits, drawn), parameters)])
        sophia.step(list(clip_norm(gradients, 1.0)))


def apart(shape: str, task: str, repeats: int) -> tuple[float, float]:
    """Measure in processes of their own; return the medians of the size before and of the highest, in bytes."""
    if shape in TINY:
        return alone(shape, task)
    sizes = []
    for _ in range(repeats):
        command = [sys.executable, __file__, "--only", task, "--of", shape]
        printed = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | STRICT).stdout
        sizes.append(json.loads(printed.splitlines()[-1]))
    return statistics.median(before for before, _ in sizes), statistics.median(high for _, high in sizes)


def alone(shape: str, task: str) -> tuple[int, int]:
    """Do one measurement in this process: `collect` over so many times the tokens, or a way of training."""
    numbers = {**SHAPES, **TINY}[shape]
    return collecting(numbers, int(task)) if task.isdecimal() else training(numbers, task)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, repeats=3)
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--of", help=argparse.SUPPRESS)
    if "--only" in (sys.argv[1:] if arguments is None else arguments):
        args = parser.parse_args(arguments)
        torch.set_num_threads(1)
        print(json.dumps(alone(args.of, args.only)))
        return
    args = begin(parser, arguments)
    for shape in list(TINY) if args.tiny else args.shape or SHAPES:
        print(f"\n{shape}; medians of {args.repeats} processes each; MB{'':18}before   highest")
        once, more = (apart(shape, times, args.repeats) for times in ("1", "20"))
        for tokens, (before, high) in (("2,048", once), ("40,960", more)):
            print(f"collect over {tokens:>6} tokens{'':26}{before / 1e6:10.0f}{high / 1e6:10.0f}")
        print(f"ratio of the highest {more[1] / once[1]:.3f}, {verdict(more[1] / once[1], 1.02)}")
        ways = ("full weights, Sophia", *GOALS)
        beyond = {way: apart(shape, way, args.repeats) for way in ways}
        full = max(1, beyond[ways[0]][1] - beyond[ways[0]][0])  # a tiny shape may fit into memory that is there
        for way, (before, high) in beyond.items():
            share = (high - before) / full
            print(
                f"{way:24} beyond the model{(high - before) / 1e6:7.0f} MB {before / 1e6:10.0f}{high / 1e6:10.0f}"
                f"   {share:.3f} {verdict(share, GOALS.get(way))}"
            )


if __name__ == "__main__":
    main()
