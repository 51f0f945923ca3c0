"""What `collect` costs beside the forward passes that it cannot avoid: ratios, medians of interleaved repetitions.

    python benchmarks/collect.py                 # GPT-2-small's shape and a small one, random weights
    python benchmarks/collect.py --repeats 15 --threads 2

Compared, over the same tokens: the logits-free Hugging Face forward (1.00), the full forward, `collect` with three sites
at every layer and the default statistics, `run_with_cache` and reduce, and plain PyTorch hooks with naive float32 sums.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import GPT2Config, GPT2LMHeadModel

from lens_unlearn.collecting import collect
from lens_unlearn.corpora import Corpus
from lens_unlearn.sites import host_version

SITES = ("mlp.pre", "mlp.post", "attn.z")
SHAPES = {
    "GPT-2-small: 12 layers of 768": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
    "small: 6 layers of 256": {"n_layer": 6, "n_embd": 256, "n_head": 8, "vocab_size": 20000},
}
BATCH, LENGTH = 8, 128


def corpus_of(tokens: torch.Tensor, prompt: int = 1) -> Corpus:
    """Wrap random tokens: every position counts but the first ones of a row, such as BOS."""
    rows, length = tokens.shape
    counted = torch.ones(rows, length, dtype=torch.bool)
    counted[:, :prompt] = False
    return Corpus(
        name="random tokens",
        tokens=tokens.reshape(-1).int(),
        counted=counted.reshape(-1),
        starts=torch.arange(rows + 1) * length,
        document=torch.arange(rows),
        keys=tuple(map(str, range(rows))),
        window=length,
        prepend_bos=True,
        vocabulary="",
    )


def naive_hooks(hf: GPT2LMHeadModel, batches: list[torch.Tensor]) -> None:
    """What a user would write: module hooks and float32 sums of x, x^2, abs(x) and x > 0."""
    sums: dict[object, list[torch.Tensor]] = {}

    def add(key: object, x: torch.Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        parts = [flat.sum(0), flat.pow(2).sum(0), flat.abs().sum(0), (flat > 0).sum(0)]
        sums[key] = [a.double() + b for a, b in zip(parts, sums[key])] if key in sums else parts

    handles = []
    for layer, block in enumerate(hf.transformer.h):
        handles += [
            block.mlp.c_fc.register_forward_hook(lambda m, i, o, k=(layer, "pre"): add(k, o)),
            block.mlp.c_proj.register_forward_pre_hook(lambda m, i, k=(layer, "post"): add(k, i[0])),
            block.attn.c_proj.register_forward_pre_hook(lambda m, i, k=(layer, "z"): add(k, i[0])),
        ]
    for batch in batches:
        hf.transformer(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()


def cache_and_reduce(bridge: object, batches: list[torch.Tensor]) -> None:
    """`run_with_cache` of the same hook points, reduced batch by batch."""
    names = [
        f"blocks.{i}.{name}"
        for i in range(bridge.cfg.n_layers)
        for name in ("mlp.hook_pre", "mlp.hook_post", "attn.hook_z")
    ]
    sums: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        _, cache = bridge.run_with_cache(batch, names_filter=names)
        for name in names:
            flat = cache[name].flatten(2).flatten(0, 1) if cache[name].ndim == 4 else cache[name].flatten(0, 1)
            parts = [flat.sum(0), flat.pow(2).sum(0), flat.abs().sum(0), (flat > 0).sum(0)]
            sums[name] = [a.double() + b for a, b in zip(parts, sums[name])] if name in sums else parts


def measure(shape: dict[str, int], repeats: int, batches: int) -> dict[str, list[float]]:
    """Time every way once per round, in an order that changes from round to round."""
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(n_positions=LENGTH, **shape)).eval()
    # As `load_model` boots it: the bridge computes attention itself, and Hugging Face makes the mask once for all layers.
    other = GPT2LMHeadModel(GPT2Config(n_positions=LENGTH, attn_implementation="eager", **shape)).eval()
    bridge = build_bridge_from_module(
        other, architecture="GPT2LMHeadModel", hf_config=other.config, tokenizer=None, device="cpu"
    )
    tokens = torch.randint(0, shape["vocab_size"], (BATCH * batches, LENGTH))
    rows = list(tokens.split(BATCH))
    corpus = corpus_of(tokens)
    ways: dict[str, Callable[[], object]] = {
        "logits-free forward": lambda: [hf.transformer(input_ids=b, use_cache=False) for b in rows],
        "full forward": lambda: [hf(input_ids=b, use_cache=False) for b in rows],
        "collect": lambda: collect(bridge, corpus, SITES, batch_size=BATCH, progress=False),
        "run_with_cache and reduce": lambda: cache_and_reduce(bridge, rows),
        "plain hooks, naive sums": lambda: naive_hooks(hf, rows),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for round_ in range(repeats + 1):
            order = list(ways)[round_ % len(ways) :] + list(ways)[: round_ % len(ways)]
            for name in order:
                start = time.perf_counter()
                ways[name]()
                if round_:  # the first round warms up
                    times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, transformer-lens {host_version()}, "
        f"python {platform.python_version()}, {torch.get_num_threads()} threads; batches of {BATCH} by {LENGTH}, float32"
    )
    for name, shape in SHAPES.items():
        times = measure(shape, args.repeats, args.batches)
        base = times["logits-free forward"]
        print(f"\n{name}, vocabulary {shape['vocab_size']:,}; {args.repeats} interleaved repetitions")
        print(f"{'':28} {'ms per batch':>14} {'x logits-free':>14} {'(quartiles)':>16}")
        for way, seconds in times.items():
            ratios = sorted(a / b for a, b in zip(seconds, base, strict=True))
            low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
            each = statistics.median(seconds) / args.batches * 1000
            print(f"{way:28} {each:14.1f} {statistics.median(ratios):14.2f} {f'({low:.2f}-{high:.2f})':>16}")


if __name__ == "__main__":
    main()
