r"""Which skill's removal costs which other on a pretrained model, and how far their neurons are the same.

    python benchmarks/fetch_models.py smollm2
    python benchmarks/skill_graph.py --figure docs/images/skill_graph.png --save benchmarks/outputs/skill_graph.json

Code, mathematics, prose and questions about invented authors (TOFU, which the model never saw). Each is removed in turn by
Selective Pruning while the others are retained. "beyond chance" is the share of the accuracy that is lost less that with as many
random neurons of every layer removed; the intervals of all pairs of different skills hold at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import begin

import lens_unlearn as lu

DATA = Path("../shared/data")
SOURCES = {
    "code": ("skillmix_fit/code.jsonl:text", "skillmix_heldout/code.jsonl:text"),
    "math": ("skillmix_fit/math.jsonl:text", "skillmix_heldout/math.jsonl:text"),
    "prose": ("skillmix_fit/prose.jsonl:text", "skillmix_heldout/prose.jsonl:text"),
    "authors": ("tofu/retain90.jsonl:question>answer", "tofu/forget10.jsonl:question>answer"),
}
"""Texts to fit on, and others to measure on."""


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--fraction", type=float, default=0.03)
    parser.add_argument("--seeds", type=int, default=10, help="random controls of each removal")
    parser.add_argument("--tokens", type=int, default=3000, help="of each skill, to fit on and to measure on")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--figure", help="a picture of the graph, ending in .png")
    parser.add_argument("--dtype", default="auto")
    args, record = begin(parser, given)
    lu.tune_allocator()
    model = lu.load_model(args.model, dtype=args.dtype)
    record.about(model, dtype=str(next(model.parameters()).dtype).removeprefix("torch."))

    def read(part: int) -> dict[str, Any]:
        options = {"tokens": 10 * args.tokens, "window": args.window}
        return {
            name: lu.read_corpus(f"{DATA}/{files[part]}", model, name=name, **options)
            for name, files in SOURCES.items()
        }

    graph = lu.skill_graph(
        model, read(0), test=read(1), fraction=args.fraction, seeds=args.seeds, tokens=args.tokens, progress=False
    )
    table = record.table("costs", ["removed", "measured", "lost", "lost at random", "beyond chance", "certain"])
    for cost in graph.costs.values():
        shares = [f"{one.value:.1%} [{one.low:.1%}, {one.high:.1%}]" for one in (cost.drop, cost.chance, cost.beyond)]
        table.row([cost.removed, cost.measured, *shares, "yes" if cost.certain else "no"])
    table = record.table("overlaps", ["one", "other", "in common", "by chance", "p, all pairs at once"])
    for row in graph.overlaps().query("site == 'all'").itertuples():
        chance = f"{row.expected:.0f} [{row.expected_low:.0f}, {row.expected_high:.0f}]"
        table.row([row.a, row.b, row.both, chance, f"{row.p_joint:.2g}"])
    if args.figure:
        figure = lu.plot.skill_graph(graph)
        figure.update_layout(paper_bgcolor="white", plot_bgcolor="white", width=1000)
        figure.write_image(args.figure, scale=1)
    record.end()


if __name__ == "__main__":
    main()
