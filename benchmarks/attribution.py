"""What `attribute` costs beside plain forward and backward passes, m for each of L layers: ratios, medians of interleaved rounds.

    python benchmarks/attribution.py                 # GPT-2-small's shape and a small one, random weights
    python benchmarks/attribution.py --repeats 9 --threads 2 --batch-size 16

Compared, over the same rows of a prompt and an answer, with the same steps and objective: plain PyTorch on the Hugging Face
model, for every layer and step a whole forward and backward pass with gradients of all parameters (1.00); the same with
parameters frozen; and `attribute`, teacher-forced, on a bridge of the same weights, whose attributions are compared too.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from collect import corpus_of
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import GPT2Config, GPT2LMHeadModel

from lens_unlearn.attribution import attribute
from lens_unlearn.sites import host_version

SHAPES = {
    "GPT-2-small: 12 layers of 768": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
    "small: 6 layers of 256": {"n_layer": 6, "n_embd": 256, "n_head": 8, "vocab_size": 20000},
}


def plain(hf: GPT2LMHeadModel, batches: list[Tensor], prompt: int, steps: int) -> Tensor:
    """Scale one layer's keys in a hook, and go forward and backward through the whole model."""
    totals = []
    for block in hf.transformer.h:
        total = torch.zeros(block.mlp.c_proj.nx, dtype=torch.float64)
        for tokens in batches:
            for step in range(1, steps + 1):
                keys, gradient = once(hf, block.mlp.c_proj, tokens, prompt, step / steps)
                total += (keys * gradient)[:, prompt - 1 :].sum((0, 1)).double() / steps
        totals.append(total)
    return torch.stack(totals)


def once(
    hf: GPT2LMHeadModel, place: torch.nn.Module, tokens: Tensor, prompt: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return a layer's keys, and the gradient of the answers' probabilities by them where they are scaled."""
    kept: list[Tensor] = []

    def change(module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        factor = torch.ones(args[0].shape[1], 1)
        factor[prompt - 1 :] = scale
        scaled = args[0] * factor
        if scaled.requires_grad:
            scaled.retain_grad()
        else:
            scaled.requires_grad_()
        kept[:] = [args[0].detach(), scaled]
        return (scaled,)

    handle = place.register_forward_pre_hook(change)
    logits = hf(input_ids=tokens[:, :-1], use_cache=False).logits[:, prompt - 1 :]
    handle.remove()
    logits.log_softmax(-1).gather(2, tokens[:, prompt:, None]).exp().sum().backward()
    hf.zero_grad(set_to_none=True)
    gradient = kept[1].grad
    assert gradient is not None
    return kept[0], gradient


def measure(shape: dict[str, int], args: argparse.Namespace) -> tuple[dict[str, list[float]], float]:
    """Time every way once per round, in an order that changes from round to round; and say how far results differ."""
    torch.manual_seed(0)
    length = args.prompt + args.answer
    hf, frozen, other = (GPT2LMHeadModel(GPT2Config(n_positions=length, **shape)).eval() for _ in range(3))
    for copy in (frozen, other):
        copy.load_state_dict(hf.state_dict())
    frozen.requires_grad_(False)
    other.config._attn_implementation = "eager"
    bridge = build_bridge_from_module(
        other, architecture="GPT2LMHeadModel", hf_config=other.config, tokenizer=None, device="cpu"
    )
    tokens = torch.randint(0, shape["vocab_size"], (args.batch_size * args.batches, length))
    rows, corpus = list(tokens.split(args.batch_size)), corpus_of(tokens, args.prompt)
    ways: dict[str, Callable[[], Tensor]] = {
        "plain, all gradients": lambda: plain(hf, rows, args.prompt, args.steps),
        "plain, parameters frozen": lambda: plain(frozen, rows, args.prompt, args.steps),
        "attribute": lambda: attribute(
            bridge, corpus, steps=args.steps, batch_size=args.batch_size, progress=False
        ).stack(),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Tensor] = {}
    for round_ in range(args.repeats + 1):
        order = list(ways)[round_ % len(ways) :] + list(ways)[: round_ % len(ways)]
        for name in order:
            start = time.perf_counter()
            results[name] = ways[name]()
            if round_:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    expected = results["plain, all gradients"]
    return times, float((results["attribute"] - expected).abs().max() / expected.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=24)
    parser.add_argument("--answer", type=int, default=40)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, transformer-lens {host_version()}, "
        f"python {platform.python_version()}, {torch.get_num_threads()} threads; batches of {args.batch_size}, prompts of "
        f"{args.prompt} and answers of {args.answer} tokens, {args.steps} steps, float32"
    )
    for name in args.shape or SHAPES:
        times, difference = measure(SHAPES[name], args)
        base = times["plain, all gradients"]
        print(f"\n{name}, vocabulary {SHAPES[name]['vocab_size']:,}; {args.repeats} interleaved repetitions")
        print(f"{'':28} {'s per batch':>12} {'x plain':>9} {'(quartiles)':>14}")
        for way, seconds in times.items():
            ratios = sorted(a / b for a, b in zip(seconds, base, strict=True))
            low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
            each = statistics.median(seconds) / args.batches
            print(f"{way:28} {each:12.2f} {statistics.median(ratios):9.2f} {f'({low:.2f}-{high:.2f})':>14}")
        print(f"largest difference of an attribution: {difference:.1e} of the largest attribution")


if __name__ == "__main__":
    main()
