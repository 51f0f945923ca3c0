"""Two processes against one, one thread each: `collect` over the same corpus, interleaved, and whether the results agree.

    python -m torch.distributed.run --standalone --nproc_per_node=2 benchmarks/ranks.py [--repeats 7] [--tiny]

Both variants run in one launch: for "alone" the first process does everything while the others wait.
"""

import argparse
import os
import statistics
import sys
import time
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from timing import SHAPES, TINY, gpt2, machine, random_corpus

from lens_unlearn.core import distributed
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.moments import Moments

SITES = ("mlp.pre", "mlp.post", "attn.z")
READINGS = ("mean", "std", "rms", "mean_abs", "positive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--tiny", action="store_true", help="A model and corpus that only show that this runs.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if distributed.count() < 2:
        sys.exit("start this with: python -m torch.distributed.run --standalone --nproc_per_node=2 benchmarks/ranks.py")
    name, shape = list((TINY if args.tiny else SHAPES).items())[-1]
    rows, repeats = (16, 1) if args.tiny else (args.rows, args.repeats)
    _, model = gpt2(shape, 128)
    corpus = random_corpus(shape["vocab_size"], rows, 128)
    settings = {"batch_size": 8, "progress": False}
    times: dict[str, list[float]] = {"alone": [], "together": []}
    stats: dict[str, Moments] = {}
    collect(model, corpus, SITES, **settings)  # warm
    for _ in range(repeats):
        for variant in times:
            dist.barrier()
            start = time.perf_counter()
            if variant == "together":
                stats[variant] = collect(model, corpus, SITES, **settings)
            elif distributed.is_first():
                with patch.object(distributed, "_here", lambda: (0, 1)):
                    stats[variant] = collect(model, corpus, SITES, **settings)
            times[variant].append(time.perf_counter() - start)
            dist.barrier()
    if distributed.is_first():
        ratios = [b / a for a, b in zip(times["alone"], times["together"])]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        apart = max(
            float((a - b).abs().max() / a.abs().max())
            for reading in READINGS
            for a, b in (
                (getattr(stats["alone"], reading)[site], getattr(stats["together"], reading)[site])
                for site in stats["alone"].sites
            )
        )
        print(machine())
        print(f"{name}, {rows} rows of 128 tokens, one thread each")
        print(
            f"alone {statistics.median(times['alone']):.2f} s; {distributed.count()} processes / alone: "
            f"{statistics.median(ratios):.2f} ({low:.2f}-{high:.2f}); largest relative difference {apart:.1e}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
