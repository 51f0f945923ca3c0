r"""Is it gone? Every method and its control under every attack of `lu.audit`: the tables of docs/results.md.

    python benchmarks/audit.py                                    # the demo's eight persons
    python benchmarks/audit.py --model ../shared/models/skillmix-tofu --reference ../shared/models/skillmix \
        --template 'Q: {prompt}\nA: {answer}' --forget '../shared/data/tofu/forget10.jsonl:question>answer@0:40' ...

Each method is fitted to forget the facts and retain the others. SOURCE@BEGIN:END takes some of a source's documents, as in
forgetting.py. Shares recovered are (attacked - reference) / (base - reference), within 0 and 1; an empty cell has nothing that
could be recovered, since the reference scores as the unedited model does. Below each method stands its control: as many random
neurons, a random update of the same singular values, or the same fitted to shuffled labels. Intervals are over facts.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from forgetting import read, share
from record import begin
from relearning import SIMU

import lens_unlearn as lu
from lens_unlearn import demo
from lens_unlearn.audit import ATTACKS
from lens_unlearn.methods import by_name

SOURCES = {"forget": "demo:facts_forget:train", "retain": "demo:facts_retain:dev", "unseen": "demo:facts_holdout:dev"}
METHODS = ("selective-pruning", "neuron-adjust", "key-space-detection", "simu")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--reference", default=str(demo.WITHOUT_FACTS_DIR))
    for name, source in SOURCES.items():
        parser.add_argument(f"--{name}", default=source)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--attacks", nargs="+", default=[a.name for a in ATTACKS], choices=[a.name for a in ATTACKS])
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=60, help="of SIMU")
    parser.add_argument(
        "--intervention",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a saved one beside these, as forgetting.py keeps",
    )
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--template")
    parser.add_argument("--window", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args, record = begin(parser, given)
    if args.reference == str(demo.WITHOUT_FACTS_DIR):
        args.reference = record.settings["reference"] = (
            demo.WITHOUT_FACTS_DIR.name
        )  # as everywhere, wherever it is installed
    args.template = args.template and args.template.replace("\\n", "\n")
    lu.tune_allocator()
    model = lu.load_model(args.model, dtype=args.dtype)
    never_saw = lu.load_model(
        str(demo.WITHOUT_FACTS_DIR) if args.reference == demo.WITHOUT_FACTS_DIR.name else args.reference,
        dtype=args.dtype,
    )
    facts, retain, unseen = (read(getattr(args, name), model, args) for name in SOURCES)
    record.about(model, facts=facts.n_documents)
    record.table(
        "texts",
        ["corpus", "documents", "tokens"],
        ([n, c.n_documents, c.n_tokens] for n, c in zip(SOURCES, (facts, retain, unseen))),
    )
    conditions: dict[str, Any] = {}
    options_of: dict[str, dict[str, Any]] = {
        "simu": {"unseen": unseen, **SIMU, "steps": args.steps},
        "key-space-detection": {"region": "auto"},
    }
    for name in args.methods:
        method = by_name(name)
        options = options_of.get(name, {"fraction": args.fraction}) | method.takes(
            {"seed": args.seed, "progress": False}
        )
        fitted = method.fit(model, facts, retain, options)
        conditions[name] = method.at(model, fitted, None, options)
        control = method.controls(model, conditions[name], fitted, [args.seed], options=options)
        conditions |= {f"{name}:control": control} if control else {}
        print(f"{name}: {conditions[name]!r}", flush=True)
    for name, path in (given.split("=", 1) for given in args.intervention):
        conditions[name] = lu.load_intervention(path, model)
        conditions[f"{name}:control"] = lu.random_delta(conditions[name], seed=args.seed)
        print(f"{name}: {conditions[name]!r}", flush=True)
    began, cpu = time.monotonic(), time.process_time()
    found = lu.audit(
        model, facts, conditions, reference=never_saw, attacks=args.attacks, controls=False, retain=retain, unseen=unseen,
        seed=args.seed, progress=False,
    )  # fmt: skip
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    names = [attack.name for attack in found.attacks]
    for metric in ("recovered", "score"):
        table = record.table(metric, ["condition", "answers", *names])
        for condition in found.conditions:
            cells = [found.measures.get((condition, name, metric)) for name in names]
            table.row(
                [condition, share(found.answers[condition]), *("" if one is None else share(one) for one in cells)]
            )
    for attack, curve in (("depth", "drop"), ("relearning", "other"), ("relearning", "retain")):
        if attack in names and (places := found.curve("base", attack, curve)):
            table = record.table(f"{attack}_{curve}", ["condition", *places])
            for condition in found.conditions:
                table.row([condition, *(share(one) for one in found.curve(condition, attack, curve).values())])
    left = [[name, why] for name, why in found.left_out.items()]
    left += [[name, why] for name, notes in found.notes.items() for why in notes]
    record.table("left out", ["attack", "why"], left)
    record.table(
        "cost",
        ["models asked", "attacks", "seconds", "seconds of CPU"],
        [[len(found.conditions), len(names), round(seconds), round(cpu)]],
    )
    record.end()


if __name__ == "__main__":
    main()
