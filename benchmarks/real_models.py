r"""Selective Pruning and Neuron Adjust on pretrained models: the first part of docs/results.md.

    python benchmarks/fetch_models.py smollm2 gemma3
    python benchmarks/real_models.py --model smollm2 --save benchmarks/outputs/real_pruning.json

Each skill is forgotten in turn, and the other ones, in equal parts, are the retain corpus. Everything is fitted on documents of
--fit and measured on those of --test, on every skill for itself. A seed changes which documents are fitted on; the interventions of
all seeds are one condition, whose interval has both the spread over seeds and that over test documents. The control of a
condition ablates as many random neurons in each layer, once for each seed; that of Neuron Adjust ablates as many in all.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from record import begin, percent
from skills import Edits, Skills

import lens_unlearn as lu
from lens_unlearn.evaluation.report import Report

FILES = {"smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma3": "gemma-3-270m-Q4_K_M.gguf"}
MODELS = Path(".models")
IMPORTANCES = ("abs", "freq", "rms", "std", "sqrt")
Fit = Callable[[str, int], tuple[lu.Corpus, lu.Corpus, lu.Moments, lu.Moments]]


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
        parts[part](model, args, record, skills.fit, skills.evaluate)
    record.end()


def lost(report: Report, condition: str, skills: Sequence[str]) -> list[str]:
    """Return the share of the accuracy that is lost on each skill."""
    return [percent(report.drop(condition, skill)) for skill in skills]


def fractions(model: Any, args: argparse.Namespace, record: Any, fit: Fit, evaluate: Callable[[Edits], Report]) -> None:
    """Selective Pruning over fractions, one shot, importance "abs", zero ablation at `mlp.post`."""
    table = record.table("fractions", ["forgotten", "fraction", "of", *(f"{skill} lost" for skill in args.skills)])
    for skill in args.skills:
        for fraction in args.fractions:
            edits = [
                lu.selective_pruning(model, *fit(skill, seed)[2:], fraction=fraction, progress=False)
                for seed in args.seeds
            ]
            random = [
                lu.random_pruning(model, like=edit, seed=seed) for edit, seed in zip(edits, args.seeds, strict=True)
            ]
            report = evaluate({"pruned": edits, "control": random})
            for condition in ("pruned", "control"):
                table.row([skill, f"{fraction:.2%}", condition, *lost(report, condition, args.skills)])


def choices(model: Any, args: argparse.Namespace, record: Any, fit: Fit, evaluate: Callable[[Edits], Report]) -> None:
    """What else Selective Pruning may be told, each at 2 % of what it ablates, code forgotten."""
    skill, shared = args.skills[0], {"fraction": 0.02, "progress": False}
    ways: dict[str, dict[str, Any]] = {f"importance {name}": {"importance": name} for name in IMPORTANCES}
    ways |= {"5 steps": {"steps": 5}, "attention": {"site": "attn.z"}}
    table = record.table("choices", ["forgotten", "way", "of", *(f"{skill} lost" for skill in args.skills)])
    for name, way in ways.items():
        edits = []
        for seed in args.seeds:
            forget, retain, of_forget, of_retain = fit(skill, seed)
            data = (forget, retain) if "steps" in way else (of_forget, of_retain)
            edits.append(lu.selective_pruning(model, *data, **shared, **way))
        random = [lu.random_pruning(model, like=edit, seed=seed) for edit, seed in zip(edits, args.seeds, strict=True)]
        report = evaluate({"pruned": edits, "control": random})
        for condition in ("pruned", "control"):
            table.row([skill, name, condition, *lost(report, condition, args.skills)])


def adjust(model: Any, args: argparse.Namespace, record: Any, fit: Fit, evaluate: Callable[[Edits], Report]) -> None:
    """Neuron Adjust at `mlp.pre` over fractions, both rules."""
    table = record.table("adjust", ["forgotten", "fraction", "of", *(f"{skill} lost" for skill in args.skills)])
    for skill in args.skills[:2]:
        for fraction in args.adjusted:
            edits: dict[str, list[lu.Intervention]] = {"random": [], "deterministic": [], "control": []}
            for seed in args.seeds:
                statistics = fit(skill, seed)[2:]
                for rule in ("random", "deterministic"):
                    edit = lu.neuron_adjust(model, *statistics, fraction=fraction, rule=rule, seed=seed, progress=False)
                    edits[rule].append(edit)
                edits["control"].append(lu.random_pruning(model, fraction=fraction, site="mlp.pre", seed=seed))
            report = evaluate(edits)
            for condition in edits:
                table.row([skill, f"{fraction:.2%}", condition, *lost(report, condition, args.skills)])


if __name__ == "__main__":
    main()
