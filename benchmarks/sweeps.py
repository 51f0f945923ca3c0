"""What sharing saves: a sweep beside separate evaluations, and pruning in steps beside evaluating at every step.

    python benchmarks/sweeps.py

On the embedded demo model and its texts. `sweep` measures 20 fractions of Selective Pruning on two corpora, on statistics
collected once and with one pass of the unedited model beside all of them; against it stand 20 calls of `evaluate`, one for each
ablation, fitted on statistics that were collected once as well. `selective_pruning(steps=15)` collects anew under the mask so far
in every step, and is evaluated once; against it stands the same loop written out with an evaluation in each step.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from timing import TINY, begin, gpt2, interleaved, options, random_corpus, show

import lens_unlearn as lu
from lens_unlearn.methods.tuning import sweep

GOAL = 0.6
QUIET: dict[str, Any] = {"progress": False}


def separately(model: Any, fit: Sequence[Any], corpora: dict[str, Any], fractions: Sequence[float]) -> None:
    """One evaluation for each fraction; statistics are collected once."""
    moments = [lu.collect(model, part, **QUIET) for part in fit]
    for fraction in fractions:
        lu.evaluate(model, corpora, {"x": lu.selective_pruning(model, *moments, fraction=fraction)}, **QUIET)


def stepwise(model: Any, fit: Sequence[Any], corpora: dict[str, Any], steps: int, fraction: float) -> None:
    """Collect under the ablation so far, rank, and evaluate, in every step."""
    ablation: lu.Intervention = lu.Chain(())
    for step in range(1, steps + 1):
        with ablation.on(model):
            forget, retain = (lu.collect(model, part, **QUIET) for part in fit)
        score = forget.mean_abs["mlp.post"] / (retain.mean_abs["mlp.post"] + 1e-3)
        if isinstance(ablation, lu.Ablate):
            score = score.where(~ablation.selection, float("inf"))
        ablation = lu.Ablate(score.top(fraction * step / steps))
        lu.evaluate(model, corpora, {"x": ablation}, **QUIET)


def at_once(model: Any, fit: Sequence[Any], corpora: dict[str, Any], steps: int, fraction: float) -> None:
    """The same steps, evaluated at the end."""
    edit = lu.selective_pruning(model, *fit, fraction=fraction, steps=steps, **QUIET)
    lu.evaluate(model, corpora, {"x": edit}, **QUIET)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, repeats=7)
    parser.add_argument("--tokens", type=int, default=1000, help="of each of the four corpora")
    args = begin(parser, arguments)
    tokens, count, steps = (64, 2, 2) if args.tiny else (args.tokens, 20, 15)
    if args.tiny:
        shape = next(iter(TINY.values()))
        model: Any = gpt2(shape, 32)[1]
        fit, test = ([random_corpus(shape["vocab_size"], 2, 32, seed=2 * s + i) for i in (0, 1)] for s in (0, 1))
    else:
        model = lu.load_model("demo")
        names = ("python", "english")
        fit = [lu.read_corpus(f"demo:{name}", model, tokens=tokens) for name in names]
        test = [lu.read_corpus(f"demo:{name}:test", model, tokens=tokens) for name in names]
    corpora = dict(zip(("forget", "retain"), test, strict=True))
    fractions = [0.02 * (i + 1) for i in range(count)]
    settings: dict[str, Any] = {"fractions": fractions, "control_seeds": (), **QUIET}
    ways = {
        "separate evaluations": partial(separately, model, fit, corpora, fractions),
        "sweep": lambda: sweep(lu.selective_pruning, model, *fit, corpora, **settings),
    }
    title = f"{count} fractions on two corpora of {tokens:,} tokens, demo model"
    show(title, interleaved(ways, args.repeats), goals={"sweep": GOAL}, unit="s")
    ways = {
        "evaluating in every step": partial(stepwise, model, fit, corpora, steps, 0.1),
        "steps, evaluated once": partial(at_once, model, fit, corpora, steps, 0.1),
    }
    title = f"pruning in {steps} steps, collecting two corpora of {tokens:,} tokens in each"
    show(title, interleaved(ways, args.repeats), goals={"steps, evaluated once": GOAL}, unit="s")


if __name__ == "__main__":
    main()
