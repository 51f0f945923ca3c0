r"""Train the small mixture-of-experts model that benchmarks/experts.py looks at.

    python benchmarks/train_experts.py --texts ../shared/data/skillmix_fit --out .models/experts

A Mixtral of 4 layers with 16 experts each, of which 2 compute a token, and a tokenizer of 2,048 tokens, both trained on the texts
of all skills in equal parts. Experts are balanced by Mixtral's own auxiliary loss. One thread takes about ten minutes.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ["<bos>", "<eos>", "<pad>"]


def read(path: Path) -> list[str]:
    """Return the texts of a file of rows."""
    return [json.loads(row)["text"] for row in path.read_text(encoding="utf-8").splitlines()]


def tokenizer_of(texts: list[str], size: int) -> Any:
    """Train a byte-level tokenizer that begins texts with BOS."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    names = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def config_of(args: argparse.Namespace) -> transformers.MixtralConfig:
    """Return the model's configuration."""
    return transformers.MixtralConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.columns,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=args.experts,
        num_experts_per_tok=2,
        max_position_embeddings=args.window,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def options(parser: argparse.ArgumentParser, *, out: str, width: int, rate: float) -> None:
    """Add what every training can be told."""
    parser.add_argument("--texts", type=Path, default=Path("../shared/data/skillmix_fit"))
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--rows", type=int, default=12, help="windows of each step, in equal parts of every skill")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=width)
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)


def train(args: argparse.Namespace, make: Callable[[], Any]) -> tuple[Any, Any]:
    """Train a tokenizer and a model on windows of all skills; return both, the model in evaluation mode.

    Args:
        args: What `options` adds.
        make: Makes the model, after the seed is set.
    """
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    draw = random.Random(args.seed)
    texts = {path.stem: read(path) for path in sorted(args.texts.glob("*.jsonl"))}
    tokenizer = tokenizer_of([text for each in texts.values() for text in each], args.vocabulary)
    streams = {}
    for skill, each in texts.items():
        ids = [token for text in draw.sample(each, len(each)) for token in (*tokenizer(text)["input_ids"], 1)]
        streams[skill] = torch.tensor(ids)
    print({skill: len(stream) for skill, stream in streams.items()}, flush=True)
    model = make()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    adam = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.05)
    model.train()
    began, each = time.monotonic(), args.rows // len(streams)
    for step in range(args.steps):
        rate = args.rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in adam.param_groups:
            group["lr"] = rate
        starts = [(s, draw.randrange(len(s) - args.window)) for s in streams.values() for _ in range(each)]
        rows = torch.stack([stream[start : start + args.window] for stream, start in starts])
        loss = model(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        if step % 50 == 0 or step == args.steps - 1:
            print(
                f"step {step} loss {float(loss.detach()):.3f}, {(time.monotonic() - began) / (step + 1):.2f} s a step",
                flush=True,
            )
    return model.eval(), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser, out=".models/experts", width=128, rate=4e-3)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--columns", type=int, default=96)
    args = parser.parse_args()
    model, tokenizer = train(args, lambda: transformers.MixtralForCausalLM(config_of(args)))
    model.config.output_router_logits = False  # only training needs them
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
