"""What the benchmarks share: models of random weights, random texts, and times taken in turn.

Ways of doing the same thing are timed in rounds, each way once per round and in an order that changes from round to round,
so that whatever else the machine does falls on all of them. What is printed is the median, over the rounds, of the ratio to
the first way of the same round, with quartiles. On one thread, time is the processor's (of this process alone); on several,
and on a GPU, it is the clock's.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import GPT2Config, GPT2LMHeadModel

from lens_unlearn.corpora.corpus import Corpus

SHAPES: dict[str, dict[str, int]] = {
    "GPT-2-small: 12 layers of 768": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
    "small: 6 layers of 256": {"n_layer": 6, "n_embd": 256, "n_head": 8, "vocab_size": 20000},
}
TINY: dict[str, dict[str, int]] = {"tiny: 2 layers of 16": {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50}}
Times = Mapping[str, list[float]]


def options(description: str | None, *, repeats: int = 9) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help="interleaved repetitions")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a shape that only shows that the script runs")
    return parser


def begin(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, set the threads, and say on which machine this runs."""
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.tiny:
        args.repeats, _judged[:] = 1, [False]
    print(machine())
    return args


def machine() -> str:
    """Describe the machine and the versions in a line."""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"torch {torch.__version__}, transformers {installed('transformers')}, transformer-lens "
        f"{installed('transformer-lens')}, python {platform.python_version()}, {processor()}, {os.cpu_count()} cores{load}; "
        f"{torch.get_num_threads()} threads"
    )


def processor() -> str:
    """Name the processor, where Linux says it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def installed(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def interleaved(
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    inside: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
) -> dict[str, list[float]]:
    """Time every way once per round, in an order that changes from round to round, after one round to warm up.

    Args:
        ways: What to time, by name.
        repeats: Rounds.
        device: Where it runs.
        inside: For some ways what to be in meanwhile; entering and leaving it is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    for round_ in range(repeats + 1):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            with (inside or {}).get(name, nullcontext)():
                settle(device)
                start = clock()
                ways[name]()
                settle(device)
                if round_:
                    times[name].append(clock() - start)
    return times


def settle(device: str) -> None:
    """Wait for what a GPU was asked to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def ratio(times: Times, way: str, over: str) -> tuple[float, float, float]:
    """Return the median ratio of one way to another within a round, and its quartiles."""
    ratios = sorted(a / b for a, b in zip(times[way], times[over], strict=True))
    return statistics.median(ratios), ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]


def show(
    title: str,
    times: Times,
    *,
    over: str | None = None,
    goals: Mapping[str, float] | None = None,
    per: float = 1.0,
    unit: str = "ms",
) -> None:
    """Print a table: time, ratio to one way (default: the first), its quartiles, and the goal where there is one."""
    first, goals = over or next(iter(times)), goals or {}
    width = max(len(name) for name in times) + 2
    print(f"\n{title}; {len(times[first])} interleaved repetitions")
    print(f"{'':{width}}{unit:>12}{'ratio':>8}   quartiles    goal")
    for way, seconds in times.items():
        middle, low, high = ratio(times, way, first)
        each = statistics.median(seconds) / per * (1000 if unit.startswith("ms") else 1)
        print(f"{way:{width}}{each:12.2f}{middle:8.3f}   {low:.2f}-{high:.2f}    {verdict(middle, goals.get(way))}")
    sys.stdout.flush()


_judged = [True]


def verdict(value: float, goal: float | None) -> str:
    """Say whether a goal is met; nothing of a tiny shape, for which there is none."""
    return "" if goal is None or not _judged[0] else f"<= {goal:g}: {'met' if value <= goal else 'MISSED'}"


def bridged(hf: Any, tokenizer: Any = None) -> Any:
    """Put a TransformerBridge around a Hugging Face model, as `load_model` does."""
    device = str(next(iter(hf.parameters())).device)
    name = type(hf).__name__
    return build_bridge_from_module(hf, architecture=name, hf_config=hf.config, tokenizer=tokenizer, device=device)


def gpt2(shape: Mapping[str, int], positions: int, tokenizer: Any = None, seed: int = 0) -> tuple[Any, Any]:
    """Make a plain model, and a bridge around another one of the same random weights."""
    torch.manual_seed(seed)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    plain = GPT2LMHeadModel(GPT2Config(n_positions=positions, **ends, **shape)).eval()
    # As `load_model` boots it: with explicit patterns.
    inner = GPT2LMHeadModel(GPT2Config(n_positions=positions, attn_implementation="eager", **ends, **shape)).eval()
    inner.load_state_dict(plain.state_dict())
    return plain, bridged(inner, tokenizer)


def corpus_of(tokens: torch.Tensor, prompt: int = 1, name: str = "random tokens") -> Corpus:
    """Wrap random tokens: every position counts but the first ones of a row, such as BOS."""
    rows, length = tokens.shape
    counted = torch.ones(rows, length, dtype=torch.bool)
    counted[:, :prompt] = False
    return Corpus(
        name=name,
        tokens=tokens.reshape(-1).int(),
        counted=counted.reshape(-1),
        starts=torch.arange(rows + 1) * length,
        document=torch.arange(rows),
        keys=tuple(map(str, range(rows))),
        window=length,
        prepend_bos=True,
        vocabulary="",
    )


def random_corpus(vocabulary: int, rows: int, length: int, seed: int = 0, **fields: Any) -> Corpus:
    """Make a corpus of random tokens; further fields as for `corpus_of`."""
    tokens = torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    return corpus_of(tokens, **fields)
