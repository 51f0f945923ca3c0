"""What `attribute` costs beside plain forward and backward passes, m for each of L layers: ratios, medians of interleaved rounds.

    python benchmarks/attribution.py                 # GPT-2-small's shape and a small one, random weights
    python benchmarks/attribution.py --repeats 9 --batch-size 16

Compared, over the same rows of a prompt and an answer, with the same steps and objective: plain PyTorch on the Hugging Face
model, for every layer and step a whole forward and backward pass with gradients of all parameters (1.00); the same with
parameters frozen; the same in nnsight's traces, where it is installed; and `attribute`, teacher-forced, on a bridge of the same
weights, whose attributions are compared too.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timing import SHAPES, TINY, begin, corpus_of, gpt2, interleaved, options, ratio, show, verdict
from torch import Tensor

from lens_unlearn.neurons.attribution import attribute

GOAL, OVER_NNSIGHT = 0.5, 0.7


def plain(hf: Any, places: Sequence[torch.nn.Module], batches: Sequence[Tensor], prompt: int, steps: int) -> Tensor:
    """Scale one layer's keys in a hook, and go forward and backward through the whole model."""
    totals = []
    for place in places:
        total: Any = 0
        for tokens in batches:
            for step in range(1, steps + 1):
                keys, gradient = once(hf, place, tokens, prompt, step / steps)
                total = total + (keys * gradient)[:, prompt - 1 :].sum((0, 1)).double() / steps
        totals.append(total.cpu())
    return torch.stack(totals)


def once(hf: Any, place: torch.nn.Module, tokens: Tensor, prompt: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return a layer's keys, and the gradient of the answers' probabilities by them where they are scaled."""
    seen: list[Tensor] = []

    def change(module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        factor = torch.ones(args[0].shape[1], 1, dtype=args[0].dtype, device=args[0].device)
        factor[prompt - 1 :] = scale
        scaled = args[0] * factor
        if scaled.requires_grad:
            scaled.retain_grad()
        else:
            scaled.requires_grad_()
        seen[:] = [args[0].detach(), scaled]
        return (scaled,)

    handle = place.register_forward_pre_hook(change)
    logits = hf(input_ids=tokens[:, :-1], use_cache=False).logits[:, prompt - 1 :]
    handle.remove()
    logits.log_softmax(-1).gather(2, tokens[:, prompt:, None]).exp().sum().backward()
    hf.zero_grad(set_to_none=True)
    gradient = seen[1].grad
    assert gradient is not None
    return seen[0], gradient


def traced(hf: Any, batches: Sequence[Tensor], prompt: int, steps: int) -> Tensor:  # pragma: no cover - not installed
    """Do the same in nnsight's traces, with parameters frozen."""
    from nnsight import NNsight, save

    wrapped, totals = NNsight(hf), []
    for layer in range(int(hf.config.n_layer)):
        total: Any = 0
        for tokens in batches:
            for step in range(1, steps + 1):
                factor = torch.ones(tokens.shape[1] - 1, 1)
                factor[prompt - 1 :] = step / steps
                with wrapped.trace(input_ids=tokens[:, :-1], use_cache=False):
                    place = wrapped.transformer.h[layer].mlp.c_proj
                    keys = save(place.input)
                    scaled = (keys.detach() * factor).requires_grad_()
                    place.input = scaled
                    logits = wrapped.lm_head.output[:, prompt - 1 :]
                    answer = logits.log_softmax(-1).gather(2, tokens[:, prompt:, None]).exp().sum()
                    with answer.backward():
                        gradient = save(scaled.grad)
                total = total + (keys.detach() * gradient)[:, prompt - 1 :].sum((0, 1)).double() / steps
        totals.append(total)
    return torch.stack(totals)


NNSIGHT = "nnsight, parameters frozen"


def measure(shape: Mapping[str, int], args: Any) -> tuple[dict[str, list[float]], float]:
    """Time every way, and say how far the results differ."""
    length = args.prompt + args.answer
    hf, bridge = gpt2(shape, length)
    frozen, _ = gpt2(shape, length)
    frozen.requires_grad_(False)
    places = {id(model): [block.mlp.c_proj for block in model.transformer.h] for model in (hf, frozen)}
    tokens = torch.randint(0, shape["vocab_size"], (args.batch_size * args.batches, length))
    rows, corpus = list(tokens.split(args.batch_size)), corpus_of(tokens, args.prompt)
    results: dict[str, Tensor] = {}

    def recorded(name: str, way: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: results.update({name: way()})

    settings = {"steps": args.steps, "batch_size": args.batch_size, "progress": False}
    ways = {
        "plain, all gradients": lambda: plain(hf, places[id(hf)], rows, args.prompt, args.steps),
        "plain, parameters frozen": lambda: plain(frozen, places[id(frozen)], rows, args.prompt, args.steps),
        "attribute": lambda: attribute(bridge, corpus, **settings).stack(),
    }
    if importlib.util.find_spec("nnsight") is not None:  # pragma: no cover - not installed
        ways[NNSIGHT] = lambda: traced(frozen, rows, args.prompt, args.steps)
    times = interleaved({name: recorded(name, way) for name, way in ways.items()}, args.repeats)
    expected = results["plain, all gradients"]
    return times, max(float((found - expected).abs().max() / expected.abs().max()) for found in results.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, repeats=7)
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=24)
    parser.add_argument("--answer", type=int, default=40)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    args = begin(parser, arguments)
    for name in list(TINY) if args.tiny else args.shape or SHAPES:
        shape = {**SHAPES, **TINY}[name]
        times, difference = measure(shape, args)
        title = (
            f"attribution, {name}, vocabulary {shape['vocab_size']:,}, float32; batches of {args.batch_size}, prompts of "
            f"{args.prompt} and answers of {args.answer} tokens, {args.steps} steps"
        )
        show(title, times, goals={"attribute": GOAL}, per=args.batches, unit="s")
        if NNSIGHT in times:  # pragma: no cover - not installed
            middle, low, high = ratio(times, "attribute", NNSIGHT)
            print(f"attribute over nnsight {middle:.3f}   {low:.2f}-{high:.2f}    {verdict(middle, OVER_NNSIGHT)}")
        print(f"largest difference of an attribution: {difference:.1e} of the largest attribution")


if __name__ == "__main__":
    main()
