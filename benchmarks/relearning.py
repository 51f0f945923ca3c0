r"""How fast the demo model relearns eight persons after each method unlearned them: the table of docs/results.md.

    python benchmarks/relearning.py --seeds 0 1 2

Each method is fitted to forget the persons and to retain the others; then all matrices are fine-tuned on the persons' questions,
with the intervention attached and, where that can be, baked into the weights. The model that never saw the persons is fine-tuned in
the same way; the anamnesis index is the ratio of the steps to within 10 % of the unedited model's accuracy. Below each method
stands its control, fine-tuned in the same way: as many random neurons, a random update of the same singular values, or shuffled
labels. Intervals are over the questions, or the groups they are read with, and paired in the index.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from record import Table, begin

import lens_unlearn as lu
from lens_unlearn import demo
from lens_unlearn.core.intervals import FEWEST
from lens_unlearn.methods import by_name

STEPS = (0, 1, 2, 4, 8, 16, 32, 64)
SIMU: dict[str, Any] = {
    "optimizer": "adamw",
    "attention": "lora",
    "lr": 1e-3,
    "forget_weight": 0.4,
    "steps": 60,
    "weight_decay": 0.0,
}


def read(model: Any, source: str, tokens: int | None = None) -> lu.Corpus:
    return lu.read_corpus(f"demo:{source}", model, tokens=tokens)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args, record = begin(parser, given)
    model, unaware = lu.load_model("demo"), lu.load_model(str(demo.WITHOUT_FACTS_DIR))
    persons, others = read(model, "facts_forget:train"), read(model, "facts_retain:dev")
    quiet: dict[str, Any] = {"progress": False}
    unseen = read(model, "facts_holdout:dev")
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        "simu": ("simu", {"unseen": unseen, **SIMU}),
        "selective-pruning, 10 %": ("selective-pruning", {"fraction": 0.1}),
        "neuron-adjust, 10 %": ("neuron-adjust", {"fraction": 0.1}),
        "key-space-detection": ("key-space-detection", {"region": "auto"}),
    }
    record.about(model, questions=persons.n_documents, fraction=0.1, recovered=0.9)
    units = len(set(persons.units))
    print(
        f"demo, lr 1e-4, {persons.n_documents} questions, resampled in {units} units{'' if units >= FEWEST else ': too few'}"
    )
    columns = ["method", "seed", "threat", *map(str, STEPS)]
    table = record.table("relearning", [*columns, "neighbours, 0", "neighbours, 64", "index"])
    for seed in args.seeds:
        settings: dict[str, Any] = {"steps": STEPS, "seed": seed, **quiet}
        base = read(unaware, "facts_forget:train")
        measured = {"forget": base, "neighbours": read(unaware, "facts_retain:test", 2000)}
        never = lu.relearn(unaware, base, measured=measured, **settings)
        show(table, "never saw", seed, "", never, "")
        measured = {"forget": persons, "neighbours": read(model, "facts_retain:test", 2000)}
        for name, (method, given_options) in methods.items():
            found = by_name(method)
            options = given_options | found.takes({"seed": seed, **quiet})
            fitted = found.fit(model, persons, others, options)
            edit = found.at(model, fitted, None, options)
            control = found.controls(model, edit, fitted, [seed], options=options)
            edits = {name: edit, **{f"{name}: control": one for one in control}}
            for attached in (True, False):
                for condition, one in edits.items():
                    try:
                        run = lu.relearn(model, persons, one, measured=measured, attached=attached, **settings)
                    except lu.LensUnlearnError as error:
                        if attached:
                            print(f"{condition}, attached: {error}", flush=True)
                        continue
                    index = with_ends(
                        lu.anamnesis_index(run, never, 1.0), lu.anamnesis_interval(run, never, 1.0), ".2f"
                    )
                    show(table, condition, seed, "attached" if attached else "baked", run, index)
    record.end()


def with_ends(value: float, interval: tuple[float, float], form: str) -> str:
    low, high = interval
    return f"{value:{form}}" + (f" [{low:{form}}, {high:{form}}]" if low == low else "")


def show(table: Table, name: str, seed: int, threat: str, run: lu.Relearning, index: str) -> None:
    last = STEPS[-1]
    places = [*(("forget", step) for step in STEPS), ("neighbours", 0), ("neighbours", last)]
    cells = [with_ends(run.measures[place].value, run.measures[place].interval(), ".3f") for place in places]
    table.row([name, seed, threat, *cells, index])


if __name__ == "__main__":
    main()
