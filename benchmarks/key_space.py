r"""Compare the keys of several skills in every layer, and print the tables of docs/key_space.md.

    python benchmarks/key_space.py --model demo --corpus python=demo:python --corpus english=demo:english \
        --corpus arithmetic=demo:arithmetic --corpus facts=demo:facts
    python benchmarks/key_space.py --model ../shared/models/skillmix --window 160 --template "Q: {prompt}\nA: {answer}" \
        --corpus code=../shared/data/skillmix_heldout/code.jsonl:text \
        --corpus prose=../shared/data/skillmix_heldout/prose.jsonl:text \
        --corpus math=../shared/data/skillmix_heldout/math.jsonl:text \
        --corpus "facts=../shared/data/tofu/full.jsonl:question>answer"

Every corpus is cut into prompts at random places. Where a corpus has prompts of its own, the comparison is made again
with their natural endings. A seed changes the split into halves, the cuts and the draws; rates are means over seeds, with
the lowest and the highest.
"""

import argparse
from collections.abc import Sequence

import torch
from record import Record, begin

from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.keyspace.key_space import KeySpace, key_space
from lens_unlearn.model.loading import load_model
from lens_unlearn.model.sites import Site

Rows = tuple[list[str], list[list[str]]]


def spread(values: Sequence[float], digits: int = 2) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def measured(spaces: Sequence[KeySpace], site: Site, measure: str, skill: str = "", other: str = "") -> list[float]:
    return [space.value(site, measure, skill, other).value for space in spaces]


def inside(spaces: Sequence[KeySpace], site: Site, skill: str, other: str) -> list[float]:
    """Return the shares of held-out queries inside the box that covers the fitted ones."""
    scales = [torch.tensor([space.value(site, "k", skill).value]) for space in spaces]
    return [float(space.coverage(site, skill, other, k)[0]) for space, k in zip(spaces, scales, strict=True)]


def shadows(spaces: Sequence[KeySpace], site: Site, skill: str) -> list[float]:
    """Return how many times as wide as the skill's held-out keys the projection of its box is, on the first principal component."""
    planes = [space.planes[site] for space in spaces]
    widths = [
        [float(part[skill][:, 0].max() - part[skill][:, 0].min()) for part in (p.shadows, p.points)] for p in planes
    ]
    return [shadow / keys for shadow, keys in widths]


def layers(space: KeySpace) -> list[str]:
    one_kind = len({site.kind for site in space.sites}) == 1
    return [f"L{site.layer}" if one_kind else str(site) for site in space.sites]


def aucs(spaces: Sequence[KeySpace]) -> Rows:
    first = spaces[0]
    rows = [
        [skill, distance, *(spread(measured(spaces, s, f"auc_{distance}", skill, first.others)) for s in first.sites)]
        for skill in (*first.skills, first.control)
        for distance in first.distances
    ]
    return ["skill", "distance", *layers(first)], rows


def pairs(spaces: Sequence[KeySpace]) -> Rows:
    first = spaces[0]
    rows = [
        [skill, other, *(spread(measured(spaces, s, "auc_box", skill, other)) for s in first.sites)]
        for skill in first.skills
        for other in first.skills
        if other != skill
    ]
    return ["box", "against", *layers(first)], rows


def boxes(spaces: Sequence[KeySpace], site: Site) -> Rows:
    first, rows = spaces[0], []
    for skill in first.skills:
        pooled = {name: measured(spaces, site, name, skill, first.others) for name in ("area_between", "best_scale")}
        others = [measured(spaces, site, "centre_distance", skill, other) for other in first.skills if other != skill]
        rows.append(
            [
                skill,
                spread(measured(spaces, site, "k", skill), 1),
                spread(inside(spaces, site, skill, skill)),
                spread(inside(spaces, site, skill, first.others)),
                spread(pooled["best_scale"], 1),
                spread(pooled["area_between"]),
                spread(measured(spaces, site, "log_volume", skill), 0),
                spread(measured(spaces, site, "floored", skill), 0),
                spread([min(distances) for distances in zip(*others, strict=True)]),
                spread(shadows(spaces, site, skill), 0),
            ]
        )
    names = ["k", "own inside k", "others inside k", "best scale", "area between", "log volume", "at the floor"]
    return ["skill", *names, "nearest centre", "width of shadow"], rows


def clusters(spaces: Sequence[KeySpace]) -> Rows:
    names = ("adjusted_rand", "silhouette", "silhouette_skills")
    rows = [
        [layer, *(spread(measured(spaces, site, name)) for name in names)]
        for layer, site in zip(layers(spaces[0]), spaces[0].sites, strict=True)
    ]
    return ["site", "adjusted Rand index", "silhouette of clusters", "silhouette of skills"], rows


def show(endings: str, model: object, corpora: dict[str, Corpus], args: argparse.Namespace, record: Record) -> None:
    spaces = [
        key_space(model, corpora, args.sites, capacity=args.capacity, seed=seed, progress=False) for seed in args.seeds
    ]
    print(f"\n## {endings}")
    queries = [[s, *(x.provenance[n] for n in ("fitted", "held_out"))] for s, x in zip(args.seeds, spaces, strict=True)]
    record.table(f"{endings}_queries", ["seed", "fitted", "held out"], queries)
    tables = {"auc": aucs(spaces), "pairs": pairs(spaces), "boxes": boxes(spaces, spaces[0].sites[-1])}
    for name, (columns, rows) in (tables | {"clusters": clusters(spaces)}).items():
        record.table(f"{endings}_{name}", columns, rows)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", action="append", required=True, help="NAME=SOURCE, two or more")
    parser.add_argument("--template")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--window", type=int)
    parser.add_argument("--capacity", type=int, default=400)
    parser.add_argument("--sites", default="mlp.post")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args, record = begin(parser, given)
    model, corpora = load_model(args.model), {}
    record.about(model)
    template = args.template and args.template.replace("\\n", "\n")
    for entry in args.corpus:
        name, _, source = entry.partition("=")
        corpora[name] = read_corpus(source, model, tokens=args.tokens, window=args.window, template=template, name=name)
    natural = [name for name, corpus in corpora.items() if corpus.has_prompts]
    cut = {name: corpus.with_prompts() if corpus.has_prompts else corpus for name, corpus in corpora.items()}
    show("cut", model, cut, args, record)
    if natural:
        show("natural", model, corpora, args, record)
    record.end()


if __name__ == "__main__":
    main()
