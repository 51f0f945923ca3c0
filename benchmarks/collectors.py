"""What users would take instead of `collect`, on the same tokens of the same model: each library's own collector, timed in turn.

    python benchmarks/collectors.py --save benchmarks/outputs/collectors.json

Mean, mean square, mean absolute value and share positive of every MLP neuron (mlp.post) and attention pre-out
(attn.z) in every layer, on GPT-2's architecture of random weights: `lens_unlearn.collect`; plain hooks on the
transformers model; TransformerLens' `run_with_cache` and reduce; nnsight, traced and reduced; taker's own loop (its
collector adds tokens one by one); SAELens' activation store over many hooks, reduced. What is not installed is left
out and said: nnsight, taker and SAELens are no dependencies of this project, and SAELens 6 needs a TransformerLens
below 4.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from collect import add_up
from record import begin
from timing import SHAPES, TINY, corpus_of, gpt2, installed, interleaved, options, ratio
from torch import Tensor

import lens_unlearn as lu

BATCH, LENGTH = 8, 128
SITES = ("mlp.post", "attn.z")
Way = Callable[[], object]


def reduced(sums: dict[object, list[Tensor]], key: object, x: Tensor) -> None:
    """Add up what is asked for of one site of a batch."""
    add_up(sums, key, x.reshape(-1, x.shape[-1]) if x.ndim == 3 else x.flatten(2).flatten(0, 1))


def plain_hooks(hf: Any, rows: list[Tensor]) -> Way:
    """Module hooks on the transformers model, without logits."""

    def way() -> None:
        sums: dict[object, list[Tensor]] = {}
        handles = [
            module.register_forward_pre_hook(lambda m, i, key=(layer, name): reduced(sums, key, i[0]))
            for layer, block in enumerate(hf.transformer.h)
            for name, module in (("post", block.mlp.c_proj), ("z", block.attn.c_proj))
        ]
        for batch in rows:
            hf.transformer(input_ids=batch, use_cache=False)
        for handle in handles:
            handle.remove()

    return way


def cached(bridge: Any, rows: list[Tensor]) -> Way:
    """`run_with_cache` of the same hook points."""
    names = [f"blocks.{i}.{name}" for i in range(bridge.cfg.n_layers) for name in ("mlp.hook_post", "attn.hook_z")]

    def way() -> None:
        sums: dict[object, list[Tensor]] = {}
        for batch in rows:
            _, cache = bridge.run_with_cache(batch, names_filter=names)
            for name in names:
                reduced(sums, name, cache[name])

    return way


def nnsight(hf: Any, rows: list[Tensor]) -> Way:  # pragma: no cover - not installed
    """A trace of the backbone that keeps both activations of each layer."""
    from nnsight import NNsight, save

    wrapped = NNsight(hf.transformer)

    def way() -> None:
        sums: dict[object, list[Tensor]] = {}
        for batch in rows:
            with wrapped.trace(input_ids=batch, use_cache=False):
                activations = save({})
                for layer, block in enumerate(wrapped.h):
                    activations[layer, "z"] = block.attn.c_proj.input
                    activations[layer, "post"] = block.mlp.c_proj.input
            for key, value in activations.items():
                reduced(sums, key, value)

    return way


def taker(hf: Any, rows: list[Tensor]) -> Way:  # pragma: no cover - not installed
    """The loop of its `get_midlayer_data`, a text at a time as there, over our tokens."""
    from taker import Model
    from taker.data_classes import ActivationCollector
    from transformers import AutoTokenizer

    hf.config.n_ctx = LENGTH  # it reads a name that transformers 5 has dropped
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        AutoTokenizer.from_pretrained("../shared/models/skillmix").save_pretrained(folder)
        model = Model(folder, dtype="fp32", model_device="cpu")
    layers, heads = model.cfg.n_layers, model.cfg.n_heads

    def way() -> None:
        feed_forward = ActivationCollector((layers, model.cfg.d_mlp), "cpu")
        attention = ActivationCollector((layers, heads, model.cfg.d_head), "cpu")
        model.hooks.disable_all_collect_hooks()
        model.hooks.enable_collect_hooks(["mlp_pre_out", "attn_pre_out"])
        for row in (row for batch in rows for row in batch):
            model.get_outputs_embeds(input_ids=row[None])
            feed_forward.add_all(model.collect_recent_mlp_pre_out()[0].transpose(0, 1))
            attention.add_all(model.collect_recent_attn_pre_out()[0].transpose(0, 1))
        for collector in (feed_forward, attention):
            collector.summary()

    return way


def sae_lens(hf: Any, rows: list[Tensor]) -> Way:  # pragma: no cover - not installed
    """Its store's forward pass over several hooks, reduced batch by batch; a HookedTransformer of the same shape."""
    from datasets import Dataset
    from sae_lens.training.activations_store import ActivationsStore
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = hf.config
    shape: dict[str, Any] = {
        "n_layers": config.n_layer, "d_model": config.n_embd, "n_heads": config.n_head, "d_head": config.n_embd // config.n_head,
        "d_mlp": 4 * config.n_embd, "d_vocab": config.vocab_size, "n_ctx": LENGTH, "act_fn": "gelu_new",
    }  # fmt: skip
    model = HookedTransformer(HookedTransformerConfig(**shape, normalization_type="LN", device="cpu"))
    names = [f"blocks.{i}.{name}" for i in range(config.n_layer) for name in ("mlp.hook_post", "attn.hook_z")]
    store = ActivationsStore(
        model, Dataset.from_dict({"input_ids": torch.cat(rows).tolist()}), streaming=False, hook_name=names[0],
        hook_head_index=None, context_size=LENGTH, d_in=4 * config.n_embd, n_batches_in_buffer=1, prepend_bos=False,
        total_training_tokens=1, store_batch_size_prompts=BATCH, train_batch_size_tokens=BATCH * LENGTH,
        normalize_activations="none", device=torch.device("cpu"), dtype="float32",
    )  # fmt: skip
    store._hook_names = names
    store._hook_d_ins = {name: 4 * config.n_embd if "mlp" in name else config.n_embd for name in names}

    def way() -> None:
        sums: dict[object, list[Tensor]] = {}
        for batch in rows:
            for name, value in store.get_multi_hook_activations(batch).items():
                reduced(sums, name, value)

    return way


PEERS: dict[str, Callable[[Any, list[Tensor]], Way]] = {"nnsight": nnsight, "taker": taker, "sae_lens": sae_lens}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, repeats=5)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="default: all")
    args, record = begin(parser, arguments)
    torch.set_num_threads(args.threads)
    record.about(peers={name: installed(name.replace("_", "-")) for name in PEERS})
    table = record.table("collectors", ["shape", "collector", "ratio", "quartiles"])
    for shape in list(TINY) if args.tiny else args.shape or SHAPES:
        times = measure({**SHAPES, **TINY}[shape], args)
        for name in times:
            middle, low, high = ratio(times, name, "logits-free forward")
            table.row([shape.partition(":")[0], name, f"{middle:.2f}", f"{low:.2f} to {high:.2f}"])
    record.end()


def measure(shape: dict[str, int], args: Any) -> dict[str, list[float]]:
    """Time every collector that is installed."""
    hf, bridge = gpt2(shape, LENGTH)
    tokens = torch.randint(0, shape["vocab_size"], (BATCH * args.batches, LENGTH))
    rows, corpus = list(tokens.split(BATCH)), corpus_of(tokens)
    ways: dict[str, Way] = {
        "logits-free forward": lambda: [hf.transformer(input_ids=batch, use_cache=False) for batch in rows],
        "lens_unlearn.collect": lambda: lu.collect(bridge, corpus, SITES, batch_size=BATCH, progress=False),
        "plain hooks on transformers": plain_hooks(hf, rows),
        "run_with_cache and reduce": cached(bridge, rows),
    }
    for name, peer in PEERS.items() if not args.tiny else ():  # a tiny vocabulary has no tokenizer
        if importlib.util.find_spec(name) is not None:
            ways[f"{name} {installed(name.replace('_', '-'))}"] = peer(hf, rows)
    with torch.no_grad():
        return interleaved(ways, 1 if args.tiny else args.repeats)


if __name__ == "__main__":
    main()
