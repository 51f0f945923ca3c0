"""What `collect` costs beside the forward passes that it cannot avoid: ratios, medians of interleaved repetitions.

    python benchmarks/collect.py                 # GPT-2-small's shape, a small one, and a mixture of experts; random weights
    python benchmarks/collect.py --repeats 15 --threads 2 --batches 6
    python benchmarks/collect.py --model .models/SmolLM2-135M-Instruct.Q4_1.gguf --batches 1 --rows 2 --repeats 5

Compared, over the same tokens: the logits-free Hugging Face forward (1.00), the full forward, `collect` with three sites
at every layer and the default statistics, the same with a histogram of every neuron, and, in GPT-2's shapes, the alternatives:
`run_with_cache` and reduce, and plain PyTorch hooks with naive float32 sums (other libraries are in collectors.py).
The mixture of experts is Mixtral's architecture, with `experts.pre` and `experts.post` in place of the two sites of an MLP.
A pretrained model, a file or folder, is loaded in float32, and given random tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timing import SHAPES, TINY, begin, bridged, corpus_of, gpt2, interleaved, options, show
from torch import Tensor

from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.histogram import Histogram

__all__ = ["corpus_of"]

SITES = ("mlp.pre", "mlp.post", "attn.z")
EXPERT_SITES = ("experts.pre", "experts.post", "attn.z")
BATCH, LENGTH = 8, 128
COLLECT = {"GPT-2-small: 12 layers of 768": 1.05, "small: 6 layers of 256": 1.15}
HISTOGRAM = 1.25
EXPERTS = 1.10
MIXTURES: dict[str, dict[str, int]] = {
    "mixture: 4 layers of 256, 2 of 16 experts": {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_local_experts": 16,
        "vocab_size": 20000,
    },
}
TINY_MIXTURE = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_local_experts": 4,
    "vocab_size": 50,
}


def watched(hf: Any, batches: list[Tensor], add: Callable[[object, Tensor], None]) -> None:
    """Run a plain model with module hooks that hand over each layer's three activations."""
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


def naive_hooks(hf: Any, batches: list[Tensor]) -> None:
    """What a user would write: module hooks and float32 sums of x, x^2, abs(x) and x > 0."""
    sums: dict[object, list[Tensor]] = {}
    watched(hf, batches, lambda key, x: add_up(sums, key, x.reshape(-1, x.shape[-1])))


def naive_histograms(hf: Any, batches: list[Tensor], bins: int = 128) -> None:
    """The same with `torch.bucketize` into fixed bins, and `bincount`."""
    counts: dict[object, Tensor] = {}
    edges = torch.linspace(-10, 10, bins - 1)

    def add(key: object, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        index = torch.bucketize(flat, edges) + torch.arange(flat.shape[1]) * bins
        counted = torch.bincount(index.reshape(-1), minlength=flat.shape[1] * bins)
        counts[key] = counts[key] + counted if key in counts else counted

    watched(hf, batches, add)


def cache_and_reduce(bridge: Any, batches: list[Tensor]) -> None:
    """`run_with_cache` of the same hook points, reduced batch by batch."""
    names = [
        f"blocks.{i}.{name}"
        for i in range(bridge.cfg.n_layers)
        for name in ("mlp.hook_pre", "mlp.hook_post", "attn.hook_z")
    ]
    sums: dict[object, list[Tensor]] = {}
    for batch in batches:
        _, cache = bridge.run_with_cache(batch, names_filter=names)
        for name in names:
            add_up(
                sums, name, cache[name].flatten(2).flatten(0, 1) if cache[name].ndim == 4 else cache[name].flatten(0, 1)
            )


def add_up(sums: dict[object, list[Tensor]], key: object, flat: Tensor) -> None:
    """Add the sums of x, x^2, abs(x) and x > 0 over tokens, ``[tokens, neurons]``, to those of earlier batches."""
    parts = [flat.sum(0), flat.pow(2).sum(0), flat.abs().sum(0), (flat > 0).sum(0)]
    sums[key] = [a.double() + b for a, b in zip(parts, sums[key], strict=True)] if key in sums else parts


def mixtral(shape: Mapping[str, Any]) -> tuple[Any, Any]:
    """Make a plain mixture of experts, and a bridge around another one of the same random weights."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": LENGTH}
    eager: dict[str, Any] = {"attn_implementation": "eager"}
    plain = MixtralForCausalLM(MixtralConfig(**heads, **shape)).eval()
    inner = MixtralForCausalLM(MixtralConfig(**heads, **shape, **eager)).eval()
    inner.load_state_dict(plain.state_dict())
    return plain, bridged(inner)


def pretrained(path: Path) -> tuple[Any, Any]:
    """Load a plain model, and a bridge around another one."""
    from transformers import AutoModelForCausalLM

    from lens_unlearn.model.loading import load_model

    file = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    plain = AutoModelForCausalLM.from_pretrained(path.parent if file else path, **file, dtype=torch.float32).eval()
    return plain, load_model(path, dtype=torch.float32, device="cpu")


def alternatives(hf: Any, bridge: Any, rows: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Return what else one would do, in a model of GPT-2's architecture."""
    ways: dict[str, Callable[[], object]] = {
        "run_with_cache and reduce": lambda: cache_and_reduce(bridge, rows),
        "plain hooks, naive sums": lambda: naive_hooks(hf, rows),
        "plain hooks, bucketize": lambda: naive_histograms(hf, rows),
    }
    return ways


def measure(
    hf: Any, bridge: Any, batches: Sequence[Tensor], repeats: int, sites: Sequence[str] = SITES, *, others: bool = False
) -> dict[str, list[float]]:
    """Time every way."""
    rows, corpus, size = list(batches), corpus_of(torch.cat(list(batches))), len(batches[0])

    def ours(sites: Sequence[str] = sites, statistic: Any = None) -> Callable[[], object]:
        return lambda: collect(bridge, corpus, sites, statistic=statistic, batch_size=size, progress=False)

    ways: dict[str, Callable[[], object]] = {
        "logits-free forward": lambda: [hf.base_model(input_ids=b, use_cache=False) for b in rows],
        "full forward": lambda: [hf(input_ids=b, use_cache=False) for b in rows],
        "collect": ours(),
    }
    if sites == SITES:
        ways["collect, histograms"] = ours(statistic=Histogram())
    else:
        ways["collect, experts.post alone"] = ours(["experts.post"])
    with torch.no_grad():
        return interleaved({**ways, **(alternatives(hf, bridge, rows) if others else {})}, repeats)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rows", type=int, default=BATCH, help="of a batch")
    parser.add_argument("--shape", choices=[*SHAPES, *MIXTURES], action="append")
    parser.add_argument("--model", type=Path, action="append", help="a pretrained model, in place of random weights")
    args = begin(parser, arguments)
    mixtures = {"tiny mixture": TINY_MIXTURE} if args.tiny else MIXTURES

    def tell(name: str, vocabulary: int, times: Mapping[str, list[float]], goals: Mapping[str, float]) -> None:
        title = f"{name}, vocabulary {vocabulary:,}, float32; batches of {args.rows} by {LENGTH}"
        show(title, times, goals=goals, per=args.batches, unit="ms per batch")

    def tokens(vocabulary: int) -> list[Tensor]:
        return [torch.randint(0, vocabulary, (args.rows, LENGTH)) for _ in range(args.batches)]

    for path in args.model or ():
        hf, bridge = pretrained(path)
        size = int(hf.config.get_text_config().vocab_size)
        tell(path.name, size, measure(hf, bridge, tokens(size), args.repeats), {})
    for name in [] if args.model else [*TINY, *mixtures] if args.tiny else args.shape or [*SHAPES, *MIXTURES]:
        if name in mixtures:
            size = mixtures[name]["vocab_size"]
            hf, bridge = mixtral(mixtures[name])
            times = measure(hf, bridge, tokens(size), args.repeats, EXPERT_SITES)
            tell(name, size, times, {"collect": EXPERTS, "collect, experts.post alone": EXPERTS})
            continue
        shape = {**SHAPES, **TINY}[name]
        hf, bridge = gpt2(shape, LENGTH)
        times = measure(hf, bridge, tokens(shape["vocab_size"]), args.repeats, others=True)
        goals = {"collect": COLLECT.get(name, 1.15), "collect, histograms": HISTOGRAM}
        tell(name, shape["vocab_size"], times, goals)


if __name__ == "__main__":
    main()
