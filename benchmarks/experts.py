r"""Neurons inside routed experts: which experts carry a skill, Selective Pruning against controls, and what collecting costs.

    python benchmarks/train_experts.py --texts ../shared/data/skillmix_fit --out .models/experts
    python benchmarks/experts.py --model .models/experts --save benchmarks/outputs/experts.json

    python benchmarks/experts.py --parts shapes --fit-tokens 6000 --save benchmarks/outputs/experts_shapes.json    # random weights

Each skill is forgotten in turn, and the other ones, in equal parts, are the retain corpus. Everything is fitted on documents of
--fit and measured on those of --test. "control" are random neurons of experts with the same load, as many in each layer;
"unmatched" are as many random neurons in each layer, of any expert. Several seeds of each are one condition.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from record import begin, percent

import lens_unlearn as lu
from lens_unlearn.model.hooks import backbone
from lens_unlearn.model.shortcuts import shortcuts

SITE = "experts.post"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".models/experts")
    parser.add_argument("--parts", nargs="+", default=["pruning", "cost"], choices=["pruning", "cost", "shapes"])
    parser.add_argument("--fit", default="../shared/data/skillmix_fit")
    parser.add_argument("--test", default="../shared/data/skillmix_heldout")
    parser.add_argument("--skills", nargs="+", default=["code", "math", "prose"])
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.01, 0.02, 0.05, 0.1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--fit-tokens", type=int, default=15_000)
    parser.add_argument("--test-tokens", type=int, default=3000)
    parser.add_argument(
        "--units", type=int, default=10, help="test documents of each skill, at least, if there are so many"
    )
    parser.add_argument("--repeats", type=int, default=9, help="of the timing")
    parser.add_argument(
        "--widths", nargs="+", type=int, default=[128, 256, 512], help="of the models of random weights"
    )
    parser.add_argument("--tokenizer", default="../shared/models/skillmix", help="of these")
    parser.add_argument("--figure", help="a picture of the experts' loads, ending in .png")
    args, record = begin(parser, given)
    if "shapes" in args.parts:
        shapes(args, record)
        record.end()
        return
    model = lu.load_model(args.model)
    window = int(model.cfg.n_ctx)

    def read(folder: str, skill: str, tokens: int) -> lu.Corpus:
        return lu.read_corpus(f"{folder}/{skill}.jsonl:text", model, tokens=tokens, window=window)

    fit = {skill: read(args.fit, skill, args.fit_tokens) for skill in args.skills}
    # Rows drawn from all documents: an interval needs many of them, more than many tokens.
    test = {skill: read(args.test, skill, 10**6).sample(args.test_tokens, units=args.units) for skill in args.skills}
    moments = {skill: lu.collect(model, corpus, SITE, progress=False) for skill, corpus in fit.items()}
    first = next(iter(moments.values()))
    layers, experts = len(first.sites), len(next(iter(first.routed_tokens.values())))
    record.about(layers=layers, experts=experts, neurons=first.mean.numel())
    if "pruning" in args.parts:
        measures(model, args, record, moments, test)
    if "cost" in args.parts:
        cost(model, args, record, fit[args.skills[0]])
    record.end()


def measures(
    model: Any, args: argparse.Namespace, record: Any, moments: Mapping[str, lu.Moments], test: Mapping[str, lu.Corpus]
) -> None:
    """Print the model's accuracy and its experts' loads, draw these, and prune."""
    base = lu.evaluate(model, test, {}, progress=False)
    table = record.table("base", ["skill", "documents", "tokens", "top-1", "loss"])
    for skill, corpus in test.items():
        loss = f"{base['base', skill, 'loss'].value:.3f}"
        table.row([skill, corpus.n_documents, corpus.n_tokens, percent(base["base", skill, "top1"]), loss])
    loads(args, record, moments)
    pruning(model, args, record, moments, test, base)
    if args.figure:
        figure = lu.plot.expert_load(moments)
        figure.update_layout(paper_bgcolor="white", plot_bgcolor="white", width=1000)
        figure.write_image(args.figure, scale=1)


def loads(args: argparse.Namespace, record: Any, moments: Mapping[str, lu.Moments]) -> None:
    """Print, per layer and skill, the expert of which the skill's tokens take more than the other skills', and how much."""
    table = record.table("loads", ["layer", "skill", "expert", *(f"{skill} routed" for skill in args.skills)])
    shares = {skill: {s: t.numpy() / one.n for s, t in one.routed_tokens.items()} for skill, one in moments.items()}
    for site in next(iter(shares.values())):
        for skill in args.skills:
            others = np.mean([shares[other][site] for other in args.skills if other != skill], axis=0)
            expert = int(np.argmax(shares[skill][site] - others))
            table.row([site.layer, skill, expert, *(f"{shares[name][site][expert]:.1%}" for name in args.skills)])


def pruning(
    model: Any,
    args: argparse.Namespace,
    record: Any,
    moments: Mapping[str, lu.Moments],
    test: Mapping[str, lu.Corpus],
    base: lu.Report,
) -> None:
    """Selective Pruning over fractions, one shot, zero ablation, beside both controls."""
    table = record.table("pruning", ["forgotten", "fraction", "of", *(f"{skill} lost" for skill in args.skills)])
    for skill in args.skills:
        others = [moments[other] for other in args.skills if other != skill]
        retain = others[0]
        for other in others[1:]:
            retain = retain.merge(other)
        for fraction in args.fractions:
            edit = lu.selective_pruning(model, moments[skill], retain, fraction=fraction, site=SITE, progress=False)
            among = moments[skill].mean.live | retain.mean.live
            conditions = {
                "pruned": [edit],
                "control": [lu.random_pruning(model, moments[skill], retain, like=edit, seed=s) for s in args.seeds],
                "unmatched": [lu.random_pruning(model, like=edit, among=among, seed=s) for s in args.seeds],
            }
            report = lu.evaluate(model, test, conditions, progress=False, base=base)
            for condition in conditions:
                lost = [percent(report.drop(condition, name)) for name in args.skills]
                table.row([skill, f"{fraction:.1%}", condition, *lost])


def cost(model: Any, args: argparse.Namespace, record: Any, corpus: lu.Corpus) -> None:
    """Time collecting at every layer's experts beside a forward pass without logits, in turns."""
    forward, collect, ratio = timed(model, args.repeats, corpus)
    table = record.table("cost", ["what", "seconds", "ratio"])
    table.row(["forward", f"{forward:.2f}", "1.00"])
    table.row(["collect", f"{collect:.2f}", f"{ratio:.2f}"])


def shapes(args: argparse.Namespace, record: Any) -> None:
    """Time the same on models of random weights: Mixtral's shape, 4 layers of 16 experts, as wide inside as outside."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    table = record.table("shapes", ["width", "forward, s", "collect, s", "ratio"])
    for width in args.widths:
        torch.manual_seed(0)
        config = MixtralConfig(
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_local_experts=16,
            vocab_size=len(tokenizer),
            max_position_embeddings=256,
        )
        model = lu.load_model(MixtralForCausalLM(config).eval(), tokenizer=tokenizer)
        source = f"{args.fit}/{args.skills[0]}.jsonl:text"
        corpus = lu.read_corpus(source, model, tokens=args.fit_tokens, window=256)
        forward, collect, ratio = timed(model, args.repeats, corpus)
        table.row([width, f"{forward:.2f}", f"{collect:.2f}", f"{ratio:.2f}"])


def timed(model: Any, repeats: int, corpus: lu.Corpus) -> tuple[float, float, float]:
    """Return the median seconds of a forward pass without logits and of collecting, taken in turns, and their median ratio."""
    batches = list(corpus.batches(16))

    def forward() -> None:
        with torch.no_grad(), shortcuts(model):
            for batch in batches:
                backbone(model, batch.tokens)

    def collect() -> None:
        lu.collect(model, corpus, SITE, batch_size=16, progress=False)

    seconds: dict[str, list[float]] = {"forward": [], "collect": []}
    for _ in range(repeats):
        for name, run in (("forward", forward), ("collect", collect)):
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    ratio = float(np.median(np.array(seconds["collect"]) / np.array(seconds["forward"])))
    return float(np.median(seconds["forward"])), float(np.median(seconds["collect"])), ratio


if __name__ == "__main__":
    main()
