r"""How fast the demo model relearns eight persons after each method unlearned them: the table of docs/results.md.

    python benchmarks/relearning.py --seeds 0 1 2

Each method is fitted to forget the persons and to retain the others; then all matrices are fine-tuned on the persons' questions,
with the intervention attached and, where that can be, baked into the weights. The model that never saw the persons is fine-tuned in
the same way; the anamnesis index is the ratio of the steps to within 10 % of the unedited model's accuracy.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from record import Table, begin

import lens_unlearn as lu
from lens_unlearn import demo

STEPS = (0, 1, 2, 4, 8, 16, 32, 64)
SIMU: dict[str, Any] = {"optimizer": "adamw", "attention": "lora", "lr": 1e-3, "forget_weight": 0.4, "steps": 60}


def read(model: Any, source: str, tokens: int | None = None) -> lu.Corpus:
    return lu.read_corpus(f"demo:{source}", model, tokens=tokens)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args, record = begin(parser, given)
    model, unaware = lu.load_model("demo"), lu.load_model(str(demo.WITHOUT_FACTS_DIR))
    persons, others = read(model, "facts_forget:train"), read(model, "facts_retain:dev")
    quiet: dict[str, Any] = {"progress": False}
    methods: dict[str, Callable[[int], Any]] = {
        "simu": lambda s: lu.simu(
            model, persons, others, unseen=read(model, "facts_holdout:dev"), seed=s, **SIMU, **quiet
        ),
        "selective-pruning, 10 %": lambda s: lu.selective_pruning(model, persons, others, fraction=0.1, **quiet),
        "neuron-adjust, 10 %": lambda s: lu.neuron_adjust(model, persons, others, fraction=0.1, seed=s, **quiet),
        "key-space-detection": lambda s: lu.key_space_detection(model, persons, others, region="auto", seed=s, **quiet),
    }
    record.about(model, questions=persons.n_documents, fraction=0.1, recovered=0.9)
    print(f"demo, lr 1e-4, {persons.n_documents} questions")
    columns = ["method", "seed", "threat", *map(str, STEPS)]
    table = record.table("relearning", [*columns, "neighbours, 0", "neighbours, 64", "index"])
    for seed in args.seeds:
        settings: dict[str, Any] = {"steps": STEPS, "seed": seed, **quiet}
        base = read(unaware, "facts_forget:train")
        measured = {"forget": base, "neighbours": read(unaware, "facts_retain:test", 2000)}
        never = lu.relearn(unaware, base, measured=measured, **settings)
        show(table, "never saw", seed, "", never, "")
        measured = {"forget": persons, "neighbours": read(model, "facts_retain:test", 2000)}
        for name, fit in methods.items():
            edit = fit(seed)
            for attached in (True, False):
                try:
                    run = lu.relearn(model, persons, edit, measured=measured, attached=attached, **settings)
                except lu.LensUnlearnError as error:
                    if attached:
                        print(f"{name}, attached: {error}", flush=True)
                    continue
                index = lu.anamnesis_index(run, never, 1.0)
                show(table, name, seed, "attached" if attached else "baked", run, f"{index:.2f}")
    record.end()


def show(table: Table, name: str, seed: int, threat: str, run: Any, index: str) -> None:
    forget, near = run.curves["forget"], run.curves["neighbours"]
    cells = [f"{share:.3f}" for _, share in forget] + [f"{near[0][1]:.3f}", f"{near[-1][1]:.3f}", index]
    table.row([name, seed, threat, *cells])


if __name__ == "__main__":
    main()
