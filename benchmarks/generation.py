"""What greedy generation with a key-value cache costs under an intervention, beside plain Hugging Face `generate`.

    python benchmarks/generation.py

`lu.generate` on a bridge, whole: attaching, generating, detaching, decoding; against `generate` of an unbridged copy of the
same weights. Two prompts of 16 tokens, 128 new tokens each. The bridge's own `generate`, under the same ablation, is what one
would run without `lens_unlearn.generate`, which bypasses the bridge's parts that have no hook.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from forward import interventions
from timing import SHAPES, TINY, begin, gpt2, interleaved, options, show

from lens_unlearn.evaluation.generation import continue_rows

PROMPTS, PROMPT = 2, 16
NEW = 128
GOAL = 1.3


class Numbers:
    """A tokenizer of sorts: texts are numbers, and none ends a text."""

    eos_token_id = pad_token_id = bos_token_id = None

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """Write numbers."""
        return " ".join(map(str, ids))


def measure(
    hf: Any, bridge: Any, vocabulary: int, new: int, repeats: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Time plain generation, and the bridge's under each intervention."""
    bridge.tokenizer = Numbers()
    bridge.cfg.eos_token_id = None
    # No token ends a text, in neither copy: or the rows of a batch, which may end apart, would be written one by one.
    for inner in (hf, bridge.original_model):
        inner.generation_config.eos_token_id = None
    rows = torch.randint(1, vocabulary, (PROMPTS, PROMPT), device=device)
    settings = {"max_new_tokens": new, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    given = rows.tolist()
    made = interventions(bridge)

    def ours(name: str | None) -> Callable[[], object]:
        return lambda: continue_rows(bridge, given, None if name is None else made[name], max_new_tokens=new)

    def bridged() -> None:
        with made["Ablate"].on(bridge):
            bridge.generate(
                rows, max_new_tokens=new, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False
            )

    expected = hf.generate(rows, **settings)[:, PROMPT:].tolist()
    written = [continued.text for continued in continue_rows(bridge, given, max_new_tokens=new)]
    assert [len(text.split()) for text in written] == [new] * PROMPTS == [len(row) for row in expected]
    same = sum(a == b for row, text in zip(expected, written, strict=True) for a, b in zip(map(str, row), text.split()))
    print(f"without an intervention, {same} of {new * PROMPTS} tokens are those of the plain model")
    ways: dict[str, Callable[[], object]] = {
        "plain Hugging Face generate": lambda: hf.generate(rows, attention_mask=torch.ones_like(rows), **settings),
        "lens_unlearn, no intervention": ours(None),
        **{f"lens_unlearn, {name}": ours(name) for name in made},
        "the bridge's generate, Ablate": bridged,
    }
    with torch.no_grad():
        return interleaved(ways, repeats, device)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, repeats=7)
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    args = begin(parser, arguments)
    new = 4 if args.tiny else NEW
    for name in list(TINY) if args.tiny else args.shape or SHAPES:
        shape = {**SHAPES, **TINY}[name]
        hf, bridge = gpt2(shape, PROMPT + NEW)
        times = measure(hf, bridge, shape["vocab_size"], new, args.repeats)
        goals = {
            f"lens_unlearn, {condition}": GOAL
            for condition in ("no intervention", "Ablate", "Adjust", "Abstain", "Delta")
        }
        show(f"greedy generation of {new} tokens with a cache; {name}; {PROMPTS} prompts", times, goals=goals)


if __name__ == "__main__":
    main()
