r"""SIMU and its baselines, on facts that a model has memorized: the tables of docs/results.md.

    python benchmarks/forgetting.py --model ../shared/models/skillmix-tofu --template 'Q: {prompt}\nA: {answer}' \
        --forget '../shared/data/tofu/forget10.jsonl:question>answer@0:100' \
        --retain '../shared/data/tofu/retain90.jsonl:question>answer@0:200' \
        --neighbours '../shared/data/tofu/retain90.jsonl:question>answer@200:280' \
        --unseen '../shared/data/tofu/holdout10.jsonl:question>answer' --skill code=... --seeds 0 1 2

SOURCE@BEGIN:END takes some of its documents; that is this script's own, and comes after the groups of a source, as in
forget10.jsonl:question>answer@20@0:100. The condition "simu" is the call without options, `lu.simu(model, forget, retain)`; in all
others, half of the unseen facts sets the floor and the aim of forgetting. The other half is reported. Neighbours are memorized
too, and not in the retain loss. Values are accuracies: shares of answer tokens (of all tokens, for skills) that are the most
probable ones, with intervals over documents, or the groups they are read with. Below each training stands its control, a random
update of the same singular values in every matrix; the condition "no forget term" is what the same training does that is not
told what to forget.
"""

import argparse
import functools
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import begin, percent
from scipy.stats import ks_2samp

import lens_unlearn as lu
from lens_unlearn.evaluation.report import Measure

ADAMW: dict[str, Any] = {"optimizer": "adamw", "attention": "full", "lr": 3e-4, "forget_weight": 0.4}
DEFAULT = "simu"
CONDITIONS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "simu, AdamW": ADAMW,
    "simu, Sophia": {"optimizer": "sophia", "attention": "full", "lr": 1e-4, "forget_weight": 0.4},
    "simu, low rank": {"optimizer": "adamw", "attention": "lora", "lr": 1e-3, "forget_weight": 0.4},
    "low rank, NPO": {"optimizer": "adamw", "attention": "lora", "lr": 1e-3, "loss": "npo", "beta": 1.0},
    "low rank, refusals": {"optimizer": "adamw", "attention": "lora", "lr": 1e-3, "loss": "po"},
    "all weights": ADAMW | {"mask": "all", "inner": True},
    "all weights, NPO": ADAMW | {"mask": "all", "inner": True, "loss": "npo", "beta": 1.0, "forget_weight": 1.0},
    "attention alone": ADAMW | {"mask": "none"},
    "critical rows alone": ADAMW | {"attention": "none", "lr": 4e-3},
    "random rows alone": ADAMW | {"attention": "none", "lr": 4e-3, "mask": "random"},
    "random rows and attention": ADAMW | {"mask": "random"},
    "no forget term": ADAMW | {"forget_weight": 0.0},
}


def read(source: str, model: Any, args: argparse.Namespace, **options: Any) -> lu.Corpus:
    """Read a source, or with ``@BEGIN:END`` after it some of its documents."""
    cut = re.fullmatch(r"(.*)@(\d+):(\d+)", source)
    source = cut[1] if cut else source
    corpus = lu.read_corpus(source, model, template=args.template, window=args.window, **options)
    if not cut:
        return corpus
    begin, end = int(cut[2]), int(cut[3])
    return corpus.only(range(begin, min(end, corpus.n_documents)))


def share(measure: Measure) -> str:
    """Print a share, with its interval where it has one."""
    low, high = measure.interval()
    return f"{measure.value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low == low else "")


def detectable(count: int) -> float:
    """Return the smallest distance that the test calls a difference, of so many questions on each side."""
    ranks = np.arange(count)
    return next(k / count for k in range(1, count + 1) if ks_2samp(ranks, ranks + k - 0.5).pvalue < 0.05)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    for name in ("forget", "retain", "neighbours", "unseen"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--skill", action="append", default=[], metavar="NAME=SRC")
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--retain-weight", type=float, default=2.0)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--tokens", type=int, default=4000, help="of each skill")
    parser.add_argument("--spread", action="store_true", help="draw them over all documents, instead of the first ones")
    parser.add_argument("--window", type=int, default=160)
    parser.add_argument("--template")
    parser.add_argument("--dtype", default="float32", help="of the weights; updates are trained in float32")
    parser.add_argument("--keep", metavar="DIR", help="save every update that is trained there, to be audited")
    parser.add_argument("--completeness", action="store_true", help="print how complete the attribution is")
    parser.add_argument("--retrained", help="a model that never saw what is to be forgotten, for forget quality")
    args, record = begin(parser, given)
    args.template = args.template and args.template.replace("\\n", "\n")
    lu.tune_allocator()
    model = lu.load_model(args.model, dtype=args.dtype)
    facts = {name: read(getattr(args, name), model, args) for name in ("forget", "retain", "neighbours", "unseen")}
    aim, facts["unseen"] = facts["unseen"].split(0.5, 0.5, seed=0)
    skills = dict(source.split("=", 1) for source in args.skill)
    if args.spread:
        skills = {name: read(source, model, args).sample(args.tokens) for name, source in skills.items()}
    else:
        skills = {name: read(source, model, args, tokens=args.tokens) for name, source in skills.items()}
    corpora = facts | skills
    base = lu.evaluate(model, corpora, {}, progress=False)
    record.about(model)
    for rule in ("right", "midpoint") if args.completeness else ():
        attribution = lu.attribute(model, facts["forget"], rule=rule, progress=False)
        ratios = [layer.ratio for layer in attribution.completeness.values()]
        print(f"{rule} sum of 5 steps, complete to {[round(ratio, 3) for ratio in ratios]} by layer")
    texts = ([name, c.n_documents, c.n_tokens] for name, c in corpora.items())
    record.table("texts", ["corpus", "documents", "tokens"], texts)
    never = None
    if args.retrained:
        other = lu.load_model(args.retrained, dtype=args.dtype)
        asked = {"forget": read(args.forget, other, args)}
        never = lu.evaluate(other, asked, {}, memorization=1000, progress=False)
        unedited = lu.evaluate(model, {"forget": facts["forget"]}, {}, memorization=1000, progress=False)
        memorized = never["base", "forget", "exact_memorization"]
        quality = lu.forget_quality(unedited, never, condition="base")
        count = asked["forget"].n_documents
        record.table(
            "retrained",
            ["forget", "forget quality of the unedited", "questions", "smallest D with p < .05"],
            [[share(memorized), f"p = {quality.p:.2g}", count, f"{detectable(count):.3f}"]],
        )
    heads = [*facts, *(f"{name} lost" for name in skills), "forget quality", "trained", "step", "clipped", "s"]
    table = record.table("forgetting", ["condition", "seed", *heads])
    unchanged = [share(base["base", name, "top1"]) for name in facts]
    table.row(["unedited", "", *unchanged, *[""] * (len(heads) - len(unchanged))])

    @functools.cache
    def critical() -> lu.NeuronMap:
        """Attribution takes long on a large model, and not all conditions need it."""
        return lu.critical(lu.attribute(model, facts["forget"], progress=False))

    trajectories: list[tuple[list[Any], dict[int, str]]] = []
    for name in args.conditions:
        for seed in args.seeds:
            options: dict[str, Any] = {}
            if name != DEFAULT:
                options = {"unseen": aim, "steps": args.steps, "retain_weight": args.retain_weight}
                options |= {"forget_weight": 1.0, "weight_decay": 0.0}
            options |= CONDITIONS[name]
            if name != DEFAULT and "mask" not in options:
                options["mask"] = critical()
            if CONDITIONS[name].get("mask") == "random":
                options["mask"] = lu.random_pruning(
                    model, facts["forget"], facts["retain"], like=lu.Ablate(critical()), seed=seed, progress=False
                ).selection
            if args.lr and options and options.get("attention") != "none":
                options["lr"] = args.lr
            began = time.time()
            delta = lu.simu(
                model,
                facts["forget"],
                facts["retain"],
                seed=seed,
                progress=False,
                **options,
            )
            seconds = time.time() - began
            if args.keep:
                delta.save(Path(args.keep) / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.safetensors", model)
            edits = {name: delta, f"{name}: control": lu.random_delta(delta, seed=seed)}
            report = lu.evaluate(model, corpora, edits, base=base, progress=False)
            asked = {"forget": facts["forget"]}
            edited = None if never is None else lu.evaluate(model, asked, edits, memorization=1000, progress=False)
            trained = delta.record
            clipped = trained["losses"][-1].get("clipped")
            training = [
                f"{trained['trained']:,}",
                f"{trained['chosen']}",
                f"{clipped:.0%}" if clipped else "",
                f"{seconds:.0f}",
            ]
            for condition in edits:
                cells = [share(report[condition, key, "top1"]) for key in facts]
                cells += [percent(report.drop(condition, key)) for key in skills]
                quality = edited and never and lu.forget_quality(edited, never, condition=condition)
                cells.append(f"p = {quality.p:.2g}" if quality else "")
                table.row([condition, seed, *cells, *(training if condition == name else [""] * len(training))])
            for part in ("forget", "retain"):
                path = {check["step"]: f"{check[part]:.2f}" for check in trained["checks"]}
                trajectories.append(([name, seed, part], path))
    # During training; the retained facts are those held out of the loss.
    steps = sorted({step for _, path in trajectories for step in path})
    table = record.table("steps", ["condition", "seed", "facts", *map(str, steps)])
    for which, path in trajectories:
        table.row([*which, *(path.get(step, "") for step in steps)])
    record.end()


if __name__ == "__main__":
    main()
