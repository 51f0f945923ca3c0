r"""Neuron Adjust and Key Space Detection on the skills of a model: the tables of docs/results.md.

    python benchmarks/effective.py adjust --model ../shared/models/skillmix \
        --skill code=../shared/data/skillmix_fit/code.jsonl=../shared/data/skillmix_heldout/code.jsonl --skill ...
    python benchmarks/effective.py detect --model demo --skill python=demo:python=demo:python:test --skill ...

Each skill names a source to fit on and a source to test on. Documents of the test source are removed from the fit. The retain
side is all other skills, in equal parts. Nothing is chosen on the test texts.
"""

import argparse
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from record import Record, begin, percent

import lens_unlearn as lu
from lens_unlearn.core.intervals import auc
from lens_unlearn.corpora.sources import open_source
from lens_unlearn.methods.tuning import sweep
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import query_keys

FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
CONTROLS = 3
DETECTORS: dict[str, dict[str, Any]] = {
    "as published, alpha 1.4": {"layer": -1, "alpha": 1.4},  # of the paper, for code
    "as published, alpha 2": {"layer": -1, "alpha": 2.0},  # and for mathematics
    "box, last layer, 5 %": {"layer": -1},
    "box, automatic, 2 %": {"false_alarms": 0.02},
    "automatic, 2 %": {"region": "auto", "false_alarms": 0.02},
}
QUERIES, ASKED = 400, 200  # prompts of each skill to fit on, and to test on


def pooled(corpora: Iterable[lu.Corpus]) -> lu.Corpus:
    return functools.reduce(lambda a, b: a + b, corpora)


def read(args: argparse.Namespace, model: Any, prompts: str) -> tuple[dict[str, lu.Corpus], dict[str, lu.Corpus]]:
    """Read fit and test corpora by skill: whole texts, or texts cut into prompts ("cut" or "natural")."""
    fit, test = {}, {}
    for skill, (source, held_out) in args.skills.items():
        reading: dict[str, Any] = {"window": args.window, "template": args.template, "tokens": args.read}
        if prompts == "natural":
            parts = [
                lu.read_corpus(
                    list(natural(s, args.template or "{prompt} {answer}")),
                    model,
                    field="prompt>rest",
                    **{**reading, "template": "{prompt}{answer}"},
                )
                for s in (source, held_out)
            ]
        else:
            parts = [lu.read_corpus(s, model, count="all", **reading) for s in (source, held_out)]
        parts[0] = parts[0].without(parts[1])[0]
        fit[skill], test[skill] = parts
    return fit, test


def natural(source: str, template: str) -> Iterable[dict[str, str]]:
    """Cut texts where a prompt ends by nature: at the question's end, the answer's mark, a sentence's or line's end."""
    opened = open_source(source)
    for text, *_ in opened.rows:
        if isinstance(text, tuple):
            prompt, rest = template.split("{answer}")[0].replace("{prompt}", text[0]).rstrip(), " " + text[1]
        else:
            text = (text or "")[:1500]
            marks = [m.end() for m in re.finditer(r"Answer:|A:|\?(?=\s)", text)] or [
                m.end() for m in re.finditer(r"[.!?](?=\s)|:?\n", text) if m.end() > 20
            ]
            if not marks:
                continue
            prompt, rest = text[: marks[0]], text[marks[0] :]
        if len(prompt) <= 400 and prompt.strip() and rest[:100].strip():
            yield {"prompt": prompt, "rest": rest[: 500 - len(prompt)]}


def rows(corpus: lu.Corpus, count: int, seed: int) -> lu.Corpus:
    """Draw about so many rows."""
    return corpus.sample(max(2, count * corpus.n_tokens // corpus.n_rows), seed)


def adjust(args: argparse.Namespace, model: Any, record: Record) -> None:
    """Print the frontier over fractions, beside Selective Pruning's and the controls of equal size."""
    fit, test = read(args, model, "texts")
    table = record.table("adjust", ["forgotten", "seed", "method", "lost", *(f"{f:.0%}" for f in args.fractions)])
    for skill in args.forget or fit:
        others = [other for other in fit if other != skill]
        for seed in args.seeds:
            forget = fit[skill].sample(args.tokens, seed)
            retain = pooled(fit[o].sample(args.tokens // len(others), seed) for o in others)
            texts = {
                "forget": test[skill].sample(args.tokens, seed),
                "retain": pooled(test[o].sample(args.tokens // len(others), seed) for o in others),
            }
            for name, method, options in (
                ("neuron-adjust, random", lu.neuron_adjust, {"rule": "random", "seed": seed}),
                ("neuron-adjust, deterministic", lu.neuron_adjust, {"rule": "deterministic"}),
                ("selective-pruning", lu.selective_pruning, {}),
            ):
                report = sweep(
                    method, model, forget, retain, texts, fractions=args.fractions, options=options,
                    control_seeds=range(seed, seed + CONTROLS), progress=False,
                )  # fmt: skip
                family = method.__name__.replace("_", "-")
                for label, condition in ((name, family), (f"{name}: control", f"{family}:control")):
                    for corpus in ("forget", "retain"):
                        lost = [percent(report.drop(f"{condition}@{f:g}", corpus)) for f in args.fractions]
                        table.row([skill, seed, label, corpus, *lost])


def detect(args: argparse.Namespace, model: Any, record: Record) -> None:
    """Print AUC, the shares abstained from and lost, as published and chosen automatically, each beside its control."""
    heads = ["forgotten", "prompts", "seed", "AUC, box, last layer", "method", "abstained", "lost"]
    table = record.table("detect", [*heads, "most abstained of another", "most lost of another", "chosen"])
    last = Site(int(model.cfg.n_layers) - 1, "mlp.post")
    for prompts in args.prompts:
        fit, test = read(args, model, prompts)
        for seed in args.seeds:
            if prompts == "cut":
                queries, asked = ({s: c.with_prompts(seed=seed) for s, c in part.items()} for part in (fit, test))
            else:
                queries, asked = fit, test
            asked = {s: rows(c, ASKED, seed) for s, c in asked.items()}
            for skill in args.forget or fit:
                others = [other for other in fit if other != skill]
                forget = query_keys(model, rows(queries[skill], QUERIES, seed), progress=False)
                retain = query_keys(model, pooled(rows(queries[o], QUERIES, seed) for o in others), progress=False)
                shuffled = forget.shuffled(retain, seed)  # the control: the same method fitted to shuffled labels
                options = {"seed": seed, "control": False, "progress": False}
                edits = {
                    f"{name}{end}": lu.key_space_detection(model, *pair, **options, **choices)
                    for name, choices in DETECTORS.items()
                    for end, pair in (("", (forget, retain)), (": control", shuffled))
                }
                keys = {s: query_keys(model, c, last, progress=False)[last] for s, c in asked.items()}
                scores = {s: edits["box, last layer, 5 %"].regions[last].score(k) for s, k in keys.items()}
                area, _ = auc(scores[skill], torch.cat([scores[o] for o in others]))
                report = lu.evaluate(model, asked, edits, progress=False, seed=seed)
                for name, edit in edits.items():
                    worst = max(others, key=lambda o: report[name, o, "abstained"].value)
                    most = max(others, key=lambda o: report.drop(name, o).value)
                    shape = next(iter(edit.regions.values())).shape
                    layers = ",".join(str(s.layer) for s in edit.regions)
                    others_lost = [
                        f"{worst} {percent(report[name, worst, 'abstained'])}",
                        f"{most} {percent(report.drop(name, most))}",
                    ]
                    own = [percent(report[name, skill, "abstained"]), percent(report.drop(name, skill))]
                    chosen = f"{shape}, {edit.vote} of layers {layers}"
                    table.row([skill, prompts, seed, f"{area:.3f}", name, *own, *others_lost, chosen])


def skill(text: str) -> tuple[str, tuple[str, str]]:
    name, source, held_out = text.split("=")
    return name, (source, held_out)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("adjust", "detect"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--skill", type=skill, action="append", required=True, dest="skills", metavar="NAME=FIT=TEST")
    parser.add_argument("--forget", nargs="+", default=[], help="skills to forget, each in turn; default all")
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--prompts", nargs="+", default=["cut", "natural"], choices=("cut", "natural"))
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--read", type=int, default=200_000)
    parser.add_argument("--window", type=int, default=160)
    parser.add_argument("--template")
    args, record = begin(parser, given)
    args.skills = dict(args.skills)
    args.template = args.template and args.template.replace("\\n", "\n")
    model = lu.load_model(args.model)
    record.about(model, queries=QUERIES, asked=ASKED, controls=CONTROLS)
    print(f"{args.model}, {args.tokens:,} tokens a side, window {args.window}")
    {"adjust": adjust, "detect": detect}[args.what](args, model, record)
    record.end()


if __name__ == "__main__":
    main()
