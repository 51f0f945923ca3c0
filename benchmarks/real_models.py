r"""Selective Pruning and Neuron Adjust on pretrained models: the first part of docs/results.md.

    python benchmarks/fetch_models.py smollm2 gemma3
    python benchmarks/real_models.py --model smollm2 --save benchmarks/outputs/real_pruning.json

Each skill is forgotten in turn, and the other ones, in equal parts, are the retain corpus. Everything is fitted on documents of
--fit and measured on those of --test, on every skill for itself. A seed changes which documents are fitted on; the interventions of
all seeds are one condition, whose interval has both the spread over seeds and that over test documents. The control of a
condition ablates as many random neurons in each layer, once for each seed; that of Neuron Adjust ablates as many in all.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import begin, percent
from skills import Skills

import lens_unlearn as lu

FILES = {"smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma3": "gemma-3-270m-Q4_K_M.gguf"}
MODELS = Path(".models")
IMPORTANCES = ("abs", "freq", "rms", "std", "sqrt")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(FILES), required=True)
    parser.add_argument("--parts", nargs="+", default=["fractions"], choices=["fractions", "choices", "adjust"])
    parser.add_argument("--fit", default="../shared/data/skillmix_fit")
    parser.add_argument("--test", default="../shared/data/skillmix_heldout")
    parser.add_argument("--skills", nargs="+", default=["code", "math", "prose"])
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.0025, 0.005, 0.01, 0.02, 0.04, 0.08])
    parser.add_argument("--adjusted", nargs="+", type=float, default=[0.01, 0.03])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--fit-tokens", type=int, default=5000)
    parser.add_argument("--test-tokens", type=int, default=2000)
    parser.add_argument(
        "--units", type=int, default=10, help="test documents of each skill, at least, if there are so many"
    )
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    args, record = begin(parser, given)
    lu.tune_allocator()
    model = lu.load_model(MODELS / FILES[args.model], dtype=args.dtype)
    record.about(model, dtype=str(next(model.parameters()).dtype).removeprefix("torch."))

    skills = Skills(
        model, args.fit, args.test, args.skills, fit_tokens=args.fit_tokens, test_tokens=args.test_tokens,
        units=args.units, window=args.window,
    )  # fmt: skip
    table = record.table("base", ["skill", "documents", "tokens", "top-1", "loss"])
    for skill, corpus in skills.test.items():
        loss = f"{skills.base['base', skill, 'loss'].value:.3f}"
        top1 = percent(skills.base["base", skill, "top1"])
        table.row([skill, corpus.n_documents, corpus.n_tokens, top1, loss])
    parts = {"fractions": fractions, "choices": choices, "adjust": adjust}
    for part in args.parts:
        parts[part](args, record, skills)
    record.end()


def fractions(args: argparse.Namespace, record: Any, found: Skills) -> None:
    """Selective Pruning over fractions, one shot, importance "abs", zero ablation at `mlp.post`."""
    table = record.table("fractions", ["forgotten", "fraction", "of", *(f"{skill} lost" for skill in args.skills)])
    for skill in args.skills:
        for fraction in args.fractions:
            report = found.pruned(skill, args.seeds, fraction=fraction)
            for condition in ("pruned", "control"):
                table.row([skill, f"{fraction:.2%}", condition, *found.lost(report, condition)])


def choices(args: argparse.Namespace, record: Any, found: Skills) -> None:
    """What else Selective Pruning may be told, each at 2 % of what it ablates, code forgotten."""
    skill = args.skills[0]
    ways: dict[str, dict[str, Any]] = {f"importance {name}": {"importance": name} for name in IMPORTANCES}
    ways |= {"5 steps": {"steps": 5}, "attention": {"site": "attn.z"}}
    table = record.table("choices", ["forgotten", "way", "of", *(f"{skill} lost" for skill in args.skills)])
    for name, way in ways.items():
        report = found.pruned(skill, args.seeds, fraction=0.02, **way)
        for condition in ("pruned", "control"):
            table.row([skill, name, condition, *found.lost(report, condition)])


def adjust(args: argparse.Namespace, record: Any, found: Skills) -> None:
    """Neuron Adjust at `mlp.pre` over fractions, both rules."""
    table = record.table("adjust", ["forgotten", "fraction", "of", *(f"{skill} lost" for skill in args.skills)])
    for skill in args.skills[:2]:
        for fraction in args.adjusted:
            edits: dict[str, list[lu.Intervention]] = {"random": [], "deterministic": [], "control": []}
            for seed in args.seeds:
                statistics = found.fit(skill, seed)[2:]
                for rule in ("random", "deterministic"):
                    edit = lu.neuron_adjust(
                        found.model, *statistics, fraction=fraction, rule=rule, seed=seed, progress=False
                    )
                    edits[rule].append(edit)
                edits["control"].append(lu.random_pruning(found.model, fraction=fraction, site="mlp.pre", seed=seed))
            report = found.evaluate(edits)
            for condition in edits:
                table.row([skill, f"{fraction:.2%}", condition, *found.lost(report, condition)])


if __name__ == "__main__":
    main()
