"""What starting costs, and how much of a batch is padding.

    python benchmarks/start.py

Seconds that a fresh Python process takes to import PyTorch, to import lens_unlearn (which loads its parts when they are first
used) and all of its parts, and to print the command line's help: the processor's seconds, which hardly depend on what else the
machine does, and the clock's. Then the share of positions that are
padding in `Corpus.batches` over texts of mixed length, beside batches in the given order, and beside padding everything to the
longest text.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
from timing import begin, options, show, verdict

from lens_unlearn.corpora.corpus import Corpus

STARTS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "import lens_unlearn": [sys.executable, "-c", "import lens_unlearn"],
    "import all of lens_unlearn": [sys.executable, "-c", "from lens_unlearn import *"],
    "lens-unlearn --help": [sys.executable, "-m", "lens_unlearn", "--help"],
}


def started(command: list[str]) -> tuple[float, float]:
    """Run a process; return the processor's and the clock's seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, time.perf_counter() - start


def starts(repeats: int) -> None:
    """Time the three processes in turn."""
    processor: dict[str, list[float]] = {name: [] for name in STARTS}
    clock: dict[str, list[float]] = {name: [] for name in STARTS}
    for round_ in range(repeats + 1):
        for name, command in STARTS.items():
            used, passed = started(command)
            if round_:
                processor[name].append(used)
                clock[name].append(passed)
    show("starting, processor's seconds", processor, unit="s")
    show("starting, the clock's seconds", clock, unit="s")
    middle = {name: float(torch.tensor(values).median()) for name, values in processor.items()}
    more = middle["import lens_unlearn"] - middle["import torch"]
    print(f"import lens_unlearn takes {more:+.2f} s beside torch, {verdict(more, 0.3)}")
    helped = middle["lens-unlearn --help"]
    print(f"lens-unlearn --help takes {helped:.2f} s, {verdict(helped, 1.0)}")


def mixed(lengths: torch.Tensor) -> Corpus:
    """Make a corpus of rows of given lengths."""
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    total, rows = int(starts[-1]), len(lengths)
    tokens, counted = torch.ones(total, dtype=torch.int32), torch.ones(total, dtype=torch.bool)
    names = tuple(map(str, range(rows)))
    return Corpus("mixed", tokens, counted, starts, torch.arange(rows), names, int(lengths.max()), False, "")


def padding(rows: int) -> None:
    """Compare how much is padding."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.empty(rows).log_normal_(4.5, 0.8, generator=generator)
    kinds = {
        "log-normal, median 90": spread.long().clamp(4, 512),
        "uniform from 10 to 512": torch.randint(10, 513, (rows,), generator=generator),
        "few: 100 rows of these": torch.randint(10, 513, (min(rows, 100),), generator=generator),
    }
    print(f"\n{'positions that are padding':28}{'batches(8)':>12}{'given order':>14}{'to the longest':>16}    goal")
    for name, lengths in kinds.items():
        batches = list(mixed(lengths).batches(8))
        real = int(lengths.sum())
        ours = 1 - real / sum(batch.tokens.numel() for batch in batches)
        order = 1 - real / sum(int(part.max()) * len(part) for part in lengths.split(8))
        longest = 1 - real / (int(lengths.max()) * len(lengths))
        print(f"{name:28}{ours:>12.1%}{order:>14.1%}{longest:>16.1%}    {verdict(ours, 0.04)}")


def main(arguments: Sequence[str] | None = None) -> None:
    args = begin(options(__doc__), arguments)
    padding(50 if args.tiny else 2000)
    if args.tiny:
        print(f"lens-unlearn --help: {started(STARTS['lens-unlearn --help'])[1]:.2f} s")
    else:
        starts(args.repeats)


if __name__ == "__main__":
    main()
