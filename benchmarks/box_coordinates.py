r"""Which coordinates of the last layer's box detect? Its AUC on some of them, and with other floors on sigma; means over skills.

    python benchmarks/box_coordinates.py --model ../shared/models/skillmix --save benchmarks/outputs/box_coordinates.json \
        --skill code=../shared/data/skillmix_fit/code.jsonl:text=../shared/data/skillmix_heldout/code.jsonl:text --skill ...

Each skill names texts to fit on and texts to judge on; both are cut into prompts at random places. A coordinate is active in a
query where its key is not 0, so this is of models with ReLU.
"""

import argparse
import math
from collections.abc import Sequence
from statistics import mean

import torch
from jaxtyping import Float
from record import begin
from torch import Tensor

import lens_unlearn as lu
from lens_unlearn.core.intervals import auc
from lens_unlearn.keyspace import regions
from lens_unlearn.neurons.collect import query_keys

Keys = Float[Tensor, "queries neurons"]
PARTS = {
    "all": (0.0, 1.0),
    "active in at most 5 %": (0.0, 0.05),
    "in more than 5 %": (0.05, 1.0),
    "in more than 10 %": (0.1, 1.0),
}
FLOORS = (0.01, 0.1, 0.5, 1.0, 2.0)


def judged(fit: Keys, own: Keys, others: Keys, floor: float, budget: float) -> tuple[float, float, float]:
    """Return k, the AUC, and the detection rate where a share `budget` of the others is inside."""
    usual, regions.FLOOR = regions.FLOOR, floor
    try:
        box = regions.fit_region(fit)
    finally:
        regions.FLOOR = usual
    inside, outside = box.score(own), box.score(others)
    return box.k, auc(inside, outside)[0], float((inside <= torch.quantile(outside, budget)).double().mean())


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--skill", action="append", required=True, help="NAME=FIT=TEST")
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--read", type=int, default=60_000)
    parser.add_argument("--window", type=int, default=160)
    parser.add_argument("--budget", type=float, default=0.05)
    args, record = begin(parser, given)
    model = lu.load_model(args.model)
    record.about(model)
    keys = {}
    for entry in args.skill:
        name, *sources = entry.split("=")
        for part, source in zip(("fit", "test"), sources, strict=True):
            corpus = lu.read_corpus(source, model, tokens=args.read, window=args.window, count="all").with_prompts()
            keys[name, part] = query_keys(model, corpus, capacity=args.queries, progress=False)
    skills = list(dict.fromkeys(name for name, _ in keys))
    site = max(keys[skills[0], "fit"].sites, key=lambda site: site.layer)
    heads = ["coordinates", "floor", "share", "k", "AUC", "detected"]
    table = record.table("boxes", heads)
    tried = [*((words, 0.1) for words in PARTS), *(("all", floor) for floor in FLOORS if floor != 0.1)]
    for words, floor in tried:
        least, most = PARTS[words]
        found = []
        for skill in skills:
            fit, own = (keys[skill, part][site] for part in ("fit", "test"))
            others = torch.cat([keys[other, "test"][site] for other in skills if other != skill])
            active = (fit != 0).double().mean(0)
            chosen = (active <= most) & ((active > least) | (least == 0))
            result = judged(fit[:, chosen], own[:, chosen], others[:, chosen], floor, args.budget)
            found.append((float(chosen.double().mean()), *result))
        share, _, area, detected = (mean(column) for column in zip(*found, strict=True))
        ks = sorted(row[1] for row in found)
        table.row(
            [words, f"{floor:g}", f"{share:.0%}", f"{ks[0]:.1f} to {ks[-1]:.1f}", f"{area:.2f}", f"{detected:.0%}"]
        )
    n = [keys[skill, "fit"].n for skill in skills]
    bounds = [f"{(m - 1) / math.sqrt(m):.1f}" for m in n]
    record.table("largest", ["skill", "fitted", "largest k that there can be"], zip(skills, n, bounds, strict=True))
    record.end()


if __name__ == "__main__":
    main()
