"""Speed and memory on a GPU, for the shapes of models that people use: weights are random, so nothing is downloaded.

    python benchmarks/gpu.py                                       # Llama 3 8B, Gemma 2 2B and GPT-2 in bf16, on one GPU
    python benchmarks/gpu.py --model GPT-2 --repeats 15
    python benchmarks/gpu.py --tiny --device cpu                   # only shows that it runs

First the rate of one large matrix product is measured; forward passes are then also given as a share of that rate, at two
operations per weight and token. The rows are those of the CPU's benchmarks: `collect` and histograms beside the logits-free
forward, its memory over a short and a long corpus, forward passes and generation under interventions, attribution beside m
forward and backward passes for each layer, and SIMU's memory beside that of training all weights. Before them two promises are
looked at: that a model is what it was after each intervention, bit by bit, and that an ablation by hooks is that by an edit of
the weights. A plain model and a bridge share their weights. Llama 3 8B takes about 60 GB: 16 for the weights, 16 for the
gradients of the plain passes, and activations; `--skip attribution` does without the gradients. Rows for which there is no time
or memory left are named at the end.
"""

import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attribution import plain
from forward import GOALS, interventions, measure
from generation import GOAL as GENERATION
from generation import measure as generation
from memory import PROMPT, STEPS, full_weights
from memory import ROWS as TRAINED
from timing import begin, bridged, installed, interleaved, options, random_corpus, ratio, settle, show, verdict
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.methods.simu import simu
from lens_unlearn.neurons.attribution import attribute
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.histogram import Histogram

SITES = ("mlp.pre", "mlp.post", "attn.z")
LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
GEMMA = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}
GPT2 = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 512},
    "Gemma-2-2B": {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
    "GPT-2": {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 96, "n_positions": 512},
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Llama-3-8B": (LlamaForCausalLM, LlamaConfig, LLAMA),
    "Gemma-2-2B": (Gemma2ForCausalLM, Gemma2Config, GEMMA),
    "GPT-2": (GPT2LMHeadModel, GPT2Config, GPT2),
}


def build(name: str, *, tiny: bool, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Make a plain model with random weights on the device, and a bridge around a second one that shares the weights."""
    kind, config, shape = MODELS[name]
    shape = TINY[name] if tiny else shape
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            hf = kind(config(**shape, **ends)).eval()
        with torch.device("meta"):
            inner = kind(config(**shape, **ends, attn_implementation="eager")).eval()
    finally:
        torch.set_default_dtype(before)
    inner.load_state_dict(hf.state_dict(), assign=True)
    for path, value in hf.named_buffers():
        owner, _, leaf = path.rpartition(".")
        inner.get_submodule(owner)._buffers[leaf] = value
    return hf, bridged(inner)


def weights(hf: Any) -> int:
    """Count the weights that a token is multiplied with on its way to the logits: the blocks'."""
    base = hf.base_model
    return sum(
        p.numel() for name, p in base.named_parameters() if p.ndim == 2 and not name.startswith(("embed", "wte", "wpe"))
    )


def outputs(hf: Any) -> list[nn.Module]:
    """Return the module of W_out of each layer."""
    return (
        [block.mlp.c_proj for block in hf.transformer.h]
        if hasattr(hf, "transformer")
        else [layer.mlp.down_proj for layer in hf.model.layers]
    )


def matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """Return the operations per second of a large matrix product: the median of ten, of random numbers."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(13):
        settle(device)
        start = time.perf_counter()
        torch.mm(a, b)
        settle(device)
        taken.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(taken[3:])


class Peak:
    """The most memory that was allocated on the device since this was made; on a CPU, the process's highest size."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def read(self) -> int:
        """Return bytes."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def promises(hf: Any, bridge: Any, args: Any, rate: float) -> None:
    """Bitwise restoration after every kind of intervention, and an ablation beside the edit that it stands for."""
    tokens = torch.randint(1, int(hf.config.vocab_size), (2, min(args.length, 64)), device=args.device)
    print("\n0: promises")
    with torch.no_grad():
        base = bridge(tokens, return_type="logits")
        for name, intervention in interventions(bridge).items():
            with intervention.on(bridge):
                edited = bridge(tokens, return_type="logits")
                if isinstance(intervention, Ablate):
                    by_hooks, selection = edited, intervention.selection
            same = torch.equal(bridge(tokens, return_type="logits"), base)
            print(f"{name}: moves logits by {(edited - base).abs().max():.2g}; after it bitwise {same}")
            if not same:
                raise AssertionError(f"{name} left something behind")
        kept = []
        for (_, chosen), module in zip(selection.items(), outputs(hf), strict=True):
            weight, off = module.weight, chosen.to(args.device)
            kept.append((weight, weight.clone()))
            # GPT-2 keeps its matrices the other way round.
            weight.data[off if weight.shape[0] == len(off) and hasattr(module, "nf") else (slice(None), off)] = 0
        by_weights = bridge(tokens, return_type="logits")
        for weight, before in kept:
            weight.data.copy_(before)
    apart = float((by_hooks - by_weights).abs().max() / (by_weights - base).abs().max())
    print(f"Ablate beside zeros in W_out: largest difference {apart:.2g} of the largest effect")
    if apart > 0.1:  # of bf16's rounding, a few hundredths at most
        raise AssertionError("hooks and edit differ")


def rows_one_and_two(hf: Any, bridge: Any, args: Any, rate: float) -> None:
    """`collect`, and with histograms."""
    corpus = random_corpus(int(hf.config.vocab_size), args.batch_size * args.batches, args.length)
    batches = [batch.tokens.to(args.device) for batch in corpus.batches(args.batch_size)]
    base = hf.base_model
    settings: dict[str, Any] = {"batch_size": args.batch_size, "progress": False}
    ways: dict[str, Callable[[], object]] = {
        "logits-free forward": lambda: [base(input_ids=batch, use_cache=False) for batch in batches],
        "full forward": lambda: [hf(input_ids=batch, use_cache=False) for batch in batches],
        "collect": lambda: collect(bridge, corpus, SITES, **settings),
        "collect, histograms": lambda: collect(bridge, corpus, SITES, statistic=Histogram(), **settings),
    }
    with torch.no_grad():
        times = interleaved(ways, args.repeats, args.device)
    show(
        "1 and 2: collect",
        times,
        goals={"collect": 1.05, "collect, histograms": 1.25},
        per=args.batches,
        unit="ms per batch",
    )
    tokens = args.batch_size * args.batches * args.length
    for way in ways:
        speed = tokens / statistics.median(times[way])
        print(f"{way:24}{speed:14,.0f} tokens per second, {2 * weights(hf) * speed / rate:.1%} of the matrix rate")


def row_three(hf: Any, bridge: Any, args: Any, rate: float) -> None:
    """The memory of `collect` over once and 20 times the tokens."""
    peaks = []
    for times in (1, 20):
        corpus = random_corpus(int(hf.config.vocab_size), args.batch_size * times, args.length)
        peak = Peak(args.device)
        collect(bridge, corpus, SITES, batch_size=args.batch_size, progress=False)
        peaks.append(peak.read())
    print(
        f"\n3: highest memory of collect {peaks[0] / 1e9:.3f} GB, over 20 times the tokens {peaks[1] / 1e9:.3f} GB:",
        end=" ",
    )
    print(f"{peaks[1] / peaks[0]:.3f}, {verdict(peaks[1] / peaks[0], 1.02)}")


def row_four(hf: Any, bridge: Any, args: Any, rate: float) -> None:
    """Forward passes under interventions."""
    tokens = torch.randint(1, int(hf.config.vocab_size), (args.batch_size, args.length), device=args.device)
    peak = Peak(args.device)
    times = measure(bridge, tokens, args.repeats, outputs(hf), args.device)
    show("4: forward under an intervention", times, goals=GOALS)
    speed = tokens.numel() / statistics.median(times["no intervention"])
    print(f"{speed:,.0f} tokens per second, {2 * weights(hf) * speed / rate:.1%} of the matrix rate, ", end="")
    print(f"highest memory {peak.read() / 1e9:.2f} GB")


def row_five(hf: Any, bridge: Any, args: Any, rate: float) -> None:
    """Greedy generation."""
    new = 4 if args.tiny else 128
    peak = Peak(args.device)
    times = generation(hf, bridge, int(hf.config.vocab_size), new, args.repeats, args.device)
    goals = {f"lens_unlearn, {condition}": GENERATION for condition in ("no intervention", *GOALS)}
    show(f"5: greedy generation of {new} tokens with a cache", times, goals=goals)
    print(f"highest memory {peak.read() / 1e9:.2f} GB")


def row_eight(hf: Any, bridge: Any, args: Any, rate: float) -> None:
    """Attribution."""
    prompt, length, size, steps = (4, 12, 2, 2) if args.tiny else (24, 64, 4, 5)
    corpus = random_corpus(int(hf.config.vocab_size), size, length, prompt=prompt)
    rows = [corpus.take(range(size)).tokens.to(args.device)]
    ways: Mapping[str, Callable[[], object]] = {
        "plain, all gradients": lambda: plain(hf, outputs(hf), rows, prompt, steps),
        "attribute": lambda: attribute(bridge, corpus, steps=steps, batch_size=size, progress=False),
    }
    peak = Peak(args.device)
    times = interleaved(ways, min(args.repeats, 7), args.device)
    show(f"8: attribution, {steps} steps", times, goals={"attribute": 0.5}, unit="s")
    print(
        f"highest memory {peak.read() / 1e9:.2f} GB; ratio {ratio(times, 'attribute', 'plain, all gradients')[0]:.3f}"
    )


def row_nine(hf: Any, bridge: Any, args: Any, rate: float) -> None:
    """SIMU's memory beyond the model, over that of Sophia on all weights."""
    length = 12 if args.tiny else 64
    vocabulary, prompt = int(hf.config.vocab_size), min(PROMPT, length // 2)
    forget, retain = (random_corpus(vocabulary, 10, length, seed=s, prompt=prompt) for s in (1, 2))
    settings: dict[str, Any] = {"steps": STEPS, "batch_size": TRAINED, "check_every": STEPS, "curvature_every": 2}
    settings |= {"optimizer": "sophia", "progress": False, "attention": "none"}
    ways: dict[str, Callable[[], object]] = {
        "simu": lambda: simu(bridge, forget, retain, **settings),
        'simu, memory="low"': lambda: simu(bridge, forget, retain, memory="low", **settings),
        "full weights, Sophia": lambda: full_weights(hf, forget, retain),
    }
    beyond = {}
    for name, way in ways.items():
        peak = Peak(args.device)
        way()
        beyond[name] = peak.read() - peak.before
        gc.collect()
    print("\n9: memory of a training without attention beyond the model")
    for name, size in beyond.items():
        share = size / max(1, beyond["full weights, Sophia"])
        judged = "" if name.startswith("full") else verdict(share, 0.10)
        print(f"{name:24}{size / 1e9:8.3f} GB, {share:.3f} {judged}")


RUNS: dict[str, Callable[[Any, Any, Any, float], None]] = {
    "promises": promises,
    "collect": rows_one_and_two,
    "memory": row_three,
    "forward": row_four,
    "generation": row_five,
    "attribution": row_eight,
    "simu": row_nine,
}
ALL_WEIGHTS = 6
"""Training all weights takes so many times their size: weights, gradients, momentum, curvature, and what a step makes of them."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--model", choices=list(MODELS), action="append")
    parser.add_argument("--skip", choices=list(RUNS), action="append", default=[])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=9, help="after which no further row begins")
    args, start = begin(parser, arguments), time.monotonic()
    print(time.strftime("%Y-%m-%d"))
    left: list[str] = []
    dtype = torch.bfloat16
    if args.tiny:
        args.length, args.batches, args.batch_size = 16, 2, 2
    if args.device.startswith("cuda"):
        print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, accelerate {installed('accelerate')}")
    rate = matmul_rate(args.device, dtype, 64 if args.tiny else 8192)
    print(f"a large bf16 matrix product runs at {rate / 1e12:.3g} TFLOP/s")
    for name in args.model or MODELS:
        torch.manual_seed(0)
        hf, bridge = build(name, tiny=args.tiny, device=args.device, dtype=dtype)
        total = sum(p.numel() for p in hf.parameters())
        print(f"\n=== {name}, {total:,} random weights, bf16; batches of {args.batch_size} by {args.length}")
        for row, run in RUNS.items():
            if row in args.skip:
                continue
            if time.monotonic() - start > 60 * args.minutes or (row == "simu" and not fits(total, args.device)):
                left.append(f"{row} of {name}")
                continue
            run(hf, bridge, args, rate)
        del hf, bridge
        gc.collect()
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    print(f"\nleft out for time or memory: {', '.join(left) or 'nothing'}; {time.monotonic() - start:.0f} s")


def fits(weights: int, device: str) -> bool:
    """Whether all weights could be trained, in bf16."""
    if not device.startswith("cuda"):
        return True
    return 2 * weights * ALL_WEIGHTS < torch.cuda.get_device_properties(device).total_memory


if __name__ == "__main__":
    main()
