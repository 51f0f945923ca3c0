"""What the allocator, the batch and bfloat16 save beside `evaluate`: collect, key space, attribution, SIMU and relearning.

    python benchmarks/fetch_models.py smollm2
    python benchmarks/real_work.py --save benchmarks/outputs/real_work.json

On SmolLM2, seconds of the processor, medians over repetitions after one to warm up. Each way is a process of its own, since the
allocator is set up for a whole process: float32 with the allocator as it is, in batches of eight full rows; with the allocator told
to keep its memory (`lu.tune_allocator`); in batches of the default size; and in bfloat16. Batches of trainings stay as they are,
since they decide the result.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from record import begin

ROOT = Path(__file__).parents[1]
MODEL = ".models/SmolLM2-135M-Instruct.Q4_1.gguf"
WAYS: dict[str, dict[str, Any]] = {
    "float32, batches of 8 rows": {"dtype": "float32", "kept": False, "batch": 8},
    "and memory kept": {"dtype": "float32", "kept": True, "batch": 8},
    "and batches by default": {"dtype": "float32", "kept": True, "batch": None},
    "and bfloat16": {"dtype": "bfloat16", "kept": True, "batch": None},
}
TASKS = ("collect", "key space", "attribute", "simu", "relearn")


def work(task: str, model: Any, data: Path, batch: int | None) -> Callable[[], object]:
    """Return what is timed: on about a thousand tokens of code, or some of TOFU's facts."""
    import lens_unlearn as lu

    def texts(name: str, tokens: int) -> lu.Corpus:
        return lu.read_corpus(f"{data}/skillmix_heldout/{name}.jsonl:text", model, tokens=tokens)

    def facts(name: str, count: int) -> lu.Corpus:
        read = lu.read_corpus(f"{data}/tofu/{name}.jsonl", model, field="question>answer", tokens=150 * count)
        return read.only(range(count))

    if task == "collect":
        code = texts("code", 2000)
        return lambda: lu.collect(model, code, ("mlp.pre", "mlp.post", "attn.z"), batch_size=batch, progress=False)
    if task == "key space":
        code = texts("code", 2000).with_prompts(20)
        return lambda: lu.query_keys(model, code, capacity=20, batch_size=batch, progress=False)
    few = facts("forget10", 4)
    if task == "attribute":
        return lambda: lu.attribute(
            model, few, steps=1, progress=False, **({} if batch is None else {"batch_size": batch})
        )
    if task == "simu":
        mask = lu.NeuronMap({lu.Site(layer, "mlp.post"): some(model, layer) for layer in range(model.cfg.n_layers)})
        settings: dict[str, Any] = {"mask": mask, "steps": 2, "check_every": 2, "batch_size": 4, "progress": False}
        return lambda: lu.simu(model, few, facts("retain90", 10), **settings)
    training: dict[str, Any] = {"steps": [2], "batch_size": 4, "resamples": 10, "progress": False}
    return lambda: lu.relearn(model, few, measured={"facts": few}, **training)


def some(model: Any, layer: int) -> Any:
    """Choose a hundredth of a layer's neurons."""
    import torch

    return torch.rand(int(model.cfg.d_mlp), generator=torch.Generator().manual_seed(layer)) < 0.01


def alone(task: str, way: dict[str, Any], args: argparse.Namespace) -> float:
    """Time one task in this process."""
    import torch

    import lens_unlearn as lu

    torch.set_num_threads(args.threads)
    if way["kept"]:
        lu.tune_allocator()
    model = lu.load_model(args.model, dtype=way["dtype"], device="cpu")
    done = work(task, model, Path(args.data), way["batch"])
    spent = []
    for _ in range(args.repeats + 1):
        start = time.process_time()
        done()
        spent.append(time.process_time() - start)
    return statistics.median(spent[1:])


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args, record = begin(parser, given)
    if args.only:
        task, way = json.loads(args.only)
        print(alone(task, WAYS[way], args))
        return
    table = record.table("work", ["task", "way", "seconds", "over the first"])
    for task in args.task or TASKS:
        first = 0.0
        for way in WAYS:
            command = [sys.executable, __file__, "--only", json.dumps([task, way]), "--model", args.model]
            command += ["--data", args.data, "--repeats", str(args.repeats), "--threads", str(args.threads)]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            seconds = float(printed.splitlines()[-1])
            first = first or seconds
            table.row([task, way, f"{seconds:.1f}", f"{seconds / first:.2f}"])
    record.end()


if __name__ == "__main__":
    main()
