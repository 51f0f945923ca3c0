r"""Forget each skill of a model in turn within a retain budget: the tables of docs/results.md.

    python benchmarks/results.py --model ../shared/models/skillmix --fit ../shared/data/skillmix_fit \
        --test ../shared/data/skillmix_heldout --skills code math prose --budgets 0.05 0.10

Each folder holds one ``SKILL.jsonl`` per skill with a field "text". The retain corpus is all other skills together, in
equal parts. Fit and tuning documents are split from --fit, the figures are of the documents in --test.
"""

import argparse
import json
from collections.abc import Sequence

from record import begin, percent

from lens_unlearn.evaluation.evaluate import evaluate
from lens_unlearn.evaluation.report import Report, separability
from lens_unlearn.experiments.experiment import Experiment
from lens_unlearn.experiments.plan import SWEEP, Plan
from lens_unlearn.methods.controls import controls_for
from lens_unlearn.model.loading import load_model

CONTROLS = 5


def forget_one(
    model: object, args: argparse.Namespace, skill: str, budget: float, seed: int
) -> tuple[list[str], Experiment]:
    """Forget one skill; return a row of the table."""
    others = [other for other in args.skills if other != skill]
    plan = Plan(
        model=args.model,
        forget=f"{args.fit}/{skill}.jsonl",
        retain=tuple(f"{args.fit}/{other}.jsonl" for other in others),
        test_forget=f"{args.test}/{skill}.jsonl",
        test_retain=tuple(f"{args.test}/{other}.jsonl" for other in others),
        methods=(args.method,),
        settings={key: json.loads(value) for key, value in (entry.split("=", 1) for entry in args.set)},
        tokens=args.tokens,
        window=args.window,
        retain_drop=budget,
        seed=seed,
    )
    experiment = Experiment(plan, model, progress=False)
    experiment.fit()
    edit = experiment.edits[args.method]
    controls = controls_for(model, edit, range(seed, seed + CONTROLS), *experiment.fitted[args.method])
    conditions = {args.method: edit, "control": controls}
    report = evaluate(model, experiment.documents.test, conditions, seed=seed, progress=False)
    row = [
        skill,
        f"{budget:.0%}",
        str(seed),
        f"{experiment.chosen[args.method]['fraction']:.1%}",
        percent(report.drop(args.method, "forget")),
        percent(report.drop(args.method, "retain")),
        percent(report.drop("control", "forget")),
        percent(report.drop("control", "retain")),
        percent(report.selectivity("control")),
    ]
    return row, experiment


def curve(experiment: Experiment, method: str) -> tuple[Report, list[str]]:
    """Evaluate the fit at fixed fractions; return the report and the method's conditions, weak to strong."""
    report = experiment.curves()
    return report, [f"{method}@{fraction:g}" for fraction in SWEEP]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--fit", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--skills", nargs="+", required=True)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.05, 0.10])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--method", default="selective-pruning")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of the method, as JSON")
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--window", type=int, default=160)
    parser.add_argument("--no-sweep", action="store_true", help="no second table, of fixed fractions")
    args, record = begin(parser, given)
    model = load_model(args.model)
    record.about(model, controls=CONTROLS, sweep=SWEEP)
    rows, sweeps, texts = [], [], {}
    for skill in args.skills:
        for seed in args.seeds:
            for budget in args.budgets:
                row, experiment = forget_one(model, args, skill, budget, seed)
                rows.append(row)
                print("done:", *row, flush=True)
        corpus = experiment.documents.test["forget"]
        texts[skill] = [skill, corpus.n_documents, corpus.n_tokens]
        if args.no_sweep:
            continue
        report, path = curve(experiment, args.method)
        part = separability(report, conditions=path)
        control = [name.replace("@", ":control@") for name in path]
        chance = separability(report, conditions=control)
        gap = f"{part.gap:.1%} [{part.gap_low:.1%}, {part.gap_high:.1%}]"
        sweeps.append(
            [skill, gap, part.at.partition("@")[2], f"{part.area:.2f}", f"{chance.gap:.1%}", f"{chance.area:.2f}"]
        )
    record.table("texts", ["skill", "documents", "tokens"], texts.values())
    head = ["forgotten", "budget", "seed", "fraction", "forget lost", "retain lost", "control: forget lost"]
    record.table("budgets", [*head, "control: retain lost", "control: selectivity"], rows)
    if sweeps:
        head = ["forgotten", "largest (forget - retain) lost", "fraction", "area", "control: largest", "control: area"]
        record.table("fractions", head, sweeps)
    record.end()


if __name__ == "__main__":
    main()
