"""What `evaluate` costs on a pretrained model, beside plain forward passes of the same tokens with logits, in the same run.

    python benchmarks/fetch_models.py smollm2 gemma3
    python benchmarks/real.py --save benchmarks/outputs/real_cost_smollm2.json
    python benchmarks/real.py --model gemma3 --save benchmarks/outputs/real_cost_gemma3.json
    python benchmarks/real.py --model gemma3 --memory --save benchmarks/outputs/real_memory_gemma3.json

Each way runs in a process of its own, since the allocator is set up for a whole process, and so that its peak memory is its own.
The plain pass is that of the Hugging Face model, without a bridge, with the dtype, batches and allocator of the row.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timing
import torch
from record import Table, begin

FILES = {"smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma3": "gemma-3-270m-Q4_K_M.gguf"}
ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "skillmix_heldout"
COLUMNS = ["dtype", "rows", "allocator", "plain", "conditions", "seconds", "over plain"]
CONDITIONS = (1, 2, 7)
"""Base alone; with one ablation; with that and 5 random controls of the same size."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = timing.options(__doc__, repeats=3)
    parser.add_argument("--model", choices=sorted(FILES), default="smollm2")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--conditions", type=int, nargs="+", default=list(CONDITIONS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], help="with the allocator set up")
    parser.add_argument("--memory", action="store_true", help="peaks of resident memory in place of times; on Linux")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args, record = begin(parser, arguments)
    if args.one:
        print(json.dumps(measure(**json.loads(args.one))))
        return
    torch.set_num_threads(args.threads)
    print(timing.machine())
    shared = {"model": args.model, "tokens": args.tokens, "repeats": args.repeats, "threads": args.threads}
    if args.memory:
        remembered(record.table("memory", ["dtype", "conditions", "peak"]), {**shared, "repeats": 0}, args)
    else:
        timed(record.table("cost", COLUMNS), shared, args)
    record.end()


def timed(table: Table, shared: dict[str, Any], args: argparse.Namespace) -> None:
    """Add a row for each way and number of conditions."""
    ways = [
        {"dtype": "float32", "batch": 8, "tuned": False},
        *({"dtype": dtype, "batch": batch, "tuned": True} for dtype in args.dtypes for batch in (8, 2, None)),
    ]
    for way in ways:
        conditions = args.conditions if way["batch"] is None else args.conditions[:2]
        found = child({**shared, **way, "conditions": conditions})
        rows = f"{found['rows']}" if way["batch"] else f"measured: {found['rows']}"
        for n in map(str, conditions):
            cells = [way["dtype"], rows, "kept" if way["tuned"] else "as it is", f"{found['plain']:.2f}", n]
            table.row([*cells, f"{found['seconds'][n]:.2f}", f"{found['ratios'][n]:.2f}"])


def remembered(table: Table, shared: dict[str, Any], args: argparse.Namespace) -> None:
    """Add a row for each dtype and number of conditions, in a process of its own."""
    for dtype in dict.fromkeys(["float32", *args.dtypes]):
        for n in args.conditions:
            found = child({**shared, "dtype": dtype, "batch": 8, "tuned": False, "conditions": [n]})
            table.row([dtype, n, f"{found['peak']:.0f} MB"])


def child(task: dict[str, Any]) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    model: str,
    tokens: int,
    dtype: str,
    batch: int | None,
    tuned: bool,
    conditions: list[int],
    repeats: int,
    threads: int,
) -> dict[str, Any]:
    """Time plain passes and evaluations in turn; with no repeats, look at the memory of one evaluation instead."""
    from transformers import AutoModelForCausalLM

    import lens_unlearn as lu
    from lens_unlearn.corpora.batching import rows_at_once

    torch.set_num_threads(threads)
    if tuned:
        lu.tune_allocator()
    path = ROOT / ".models" / FILES[model]
    loaded = lu.load_model(path, dtype=dtype, device="cpu")
    corpus = lu.read_corpus(f"{DATA / 'code.jsonl'}:text", loaded, tokens=tokens, window=512)
    rows = rows_at_once(loaded, corpus, batch)
    generator = torch.Generator().manual_seed(0)
    width = int(loaded.cfg.d_mlp)

    def edit() -> lu.Ablate:
        some = {
            lu.Site(layer, "mlp.post"): torch.rand(width, generator=generator) < 0.02
            for layer in range(loaded.cfg.n_layers)
        }
        return lu.Ablate(lu.NeuronMap(some))

    ways = {n: {f"edit {i}": edit() for i in range(n - 1)} for n in conditions}

    def run(n: int) -> None:
        lu.evaluate(loaded, {"code": corpus}, ways[n], batch_size=rows, progress=False, resamples=50)

    if not repeats:
        return {"peak": peak(lambda: run(conditions[0]))}
    plain = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=getattr(torch, dtype)).eval()

    def forward() -> None:
        with torch.no_grad():
            for one in corpus.batches(rows):
                plain(one.tokens, use_cache=False).logits  # noqa: B018

    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {"plain": [], **{str(n): [] for n in conditions}}
    for round_ in range(repeats + 1):
        for name, way in [("plain", forward), *((str(n), lambda n=n: run(n)) for n in conditions)]:
            begin = clock()
            way()
            if round_:
                times[name].append(clock() - begin)
    over = {name: timing.ratio(times, name, "plain")[0] / int(name) for name in times if name != "plain"}
    middle = {name: sorted(spent)[len(spent) // 2] for name, spent in times.items()}
    return {"rows": rows, "plain": middle.pop("plain"), "seconds": middle, "ratios": over}


def peak(work: Callable[[], None]) -> float:
    """Return how far resident memory rises above what is held before, in MB."""

    def now(key: str) -> float:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading left behind, hundreds of MB, would hide as much of the peak
    Path("/proc/self/clear_refs").write_text("5")
    before = now("VmRSS")
    work()
    return now("VmHWM") - before


if __name__ == "__main__":
    main()
