"""What `torch.compile` does to a forward pass, and to interventions that come after it.

    python benchmarks/compiled.py

The plain Hugging Face model and the bridge, as they are and compiled; the bridge under an ablation that was attached after it was
compiled. Differences of logits are printed as well: an intervention that did not act in a compiled model would show there.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from forward import interventions
from timing import SHAPES, TINY, begin, gpt2, interleaved, options, show

BATCH, WINDOW = 8, 128


def measure(shape: Mapping[str, int], repeats: int, backend: str) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Time every way; and say how long compiling took, and how far logits are from those of the uncompiled bridge."""
    hf, bridge = gpt2(shape, WINDOW)
    tokens = torch.randint(0, shape["vocab_size"], (BATCH, WINDOW))
    edit = interventions(bridge)["Ablate"]
    facts: dict[str, float] = {}
    compiled = {name: torch.compile(model, backend=backend) for name, model in (("plain", hf), ("bridge", bridge))}

    def under(model: Any) -> Callable[[], object]:
        def run() -> object:
            with edit.on(bridge):
                return model(tokens)

        return run

    with torch.no_grad():
        expected, edited = bridge(tokens), under(bridge)()
        for name, model in compiled.items():
            start = time.perf_counter()
            model(tokens)
            facts[f"seconds to compile, {name}"] = time.perf_counter() - start
        start = time.perf_counter()
        under_ablation: Any = under(compiled["bridge"])()
        facts["seconds to compile again under Ablate"] = time.perf_counter() - start
        facts["largest difference of logits, compiled bridge"] = float(
            (compiled["bridge"](tokens) - expected).abs().max()
        )
        facts["the same, both under Ablate"] = float((under_ablation - edited).abs().max())
        facts["what Ablate changes"] = float((edited - expected).abs().max())
        ways = {
            "plain Hugging Face": lambda: hf(tokens),
            "plain Hugging Face, compiled": lambda: compiled["plain"](tokens),
            "the bridge": lambda: bridge(tokens),
            "the bridge, compiled": lambda: compiled["bridge"](tokens),
            "the bridge under Ablate": under(bridge),
            "the bridge under Ablate, compiled": under(compiled["bridge"]),
        }
        return interleaved(ways, repeats), facts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, repeats=7)
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    args = begin(parser, arguments)
    for name in list(TINY) if args.tiny else args.shape or ["small: 6 layers of 256"]:
        # On tiny shapes nothing is generated: that takes a C++ compiler, and a minute.
        times, facts = measure({**SHAPES, **TINY}[name], args.repeats, "eager" if args.tiny else "inductor")
        show(f"forward with logits; {name}; batches of {BATCH} by {WINDOW} tokens", times)
        for fact, value in facts.items():
            print(f"{fact}: {value:.3g}")


if __name__ == "__main__":
    main()
