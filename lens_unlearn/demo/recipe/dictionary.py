"""Train the demo model's dictionary: ``python -m lens_unlearn.demo.recipe.dictionary --out DIR``.

A top-k sparse autoencoder (Gao et al., "Scaling and evaluating sparse autoencoders", arXiv 2406.04093) of the residual stream
behind the fourth of the six blocks, on the training texts of the demo's own corpora. It is saved in SAELens' layout, in float16;
minutes on one core.

Knows torch and transformers, and the demo's texts; nothing of the package that reads the result.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from lens_unlearn.demo import MODEL_DIR, corpus

LAYER, WIDTH, FEATURES, K = 3, 144, 576, 16
CONTEXT = 256
TOKENS = {"python": 120_000, "english": 100_000, "esperanto": 50_000, "arithmetic": 50_000, "facts": 40_000}
"""Of each corpus: as many as its texts have, repeated if need be."""
STEPS, BATCH, RATE = 4000, 1024, 2e-3
DEAD = 100
"""Steps without being among the k largest after which a feature counts as dead."""


def windows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Tensor:
    """Return windows of whole documents in random order, each document behind the token that ends a text."""
    rng, rows = random.Random(seed), []
    for name, tokens in TOKENS.items():
        texts = [str(record["text"]) for record in corpus(name, "train")]
        row: list[int] = []
        while len(row) < tokens:
            for text in rng.sample(texts, len(texts)):
                row += [tokenizer.bos_token_id, *tokenizer.backend_tokenizer.encode(text).ids][:CONTEXT]
        rows.append(torch.tensor(row[: tokens // CONTEXT * CONTEXT]).view(-1, CONTEXT))
    return torch.cat(rows)


def activations(tokens: Tensor) -> Tensor:
    """Return the residual stream behind the layer at every position."""
    model = GPT2LMHeadModel.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    with torch.no_grad():
        parts = [
            model.transformer(part, output_hidden_states=True).hidden_states[LAYER + 1] for part in tokens.split(16)
        ]
    return torch.cat(parts).reshape(-1, WIDTH)


class Autoencoder(torch.nn.Module):
    """The encoder, and a decoder whose rows have the norm 1."""

    def __init__(self, mean: Tensor, generator: torch.Generator) -> None:
        """Begin with an encoder that is the decoder transposed."""
        super().__init__()
        rows = torch.nn.functional.normalize(torch.randn(FEATURES, WIDTH, generator=generator), dim=1)
        self.W_dec, self.W_enc = torch.nn.Parameter(rows), torch.nn.Parameter(rows.T.clone())
        self.b_dec, self.b_enc = torch.nn.Parameter(mean), torch.nn.Parameter(torch.zeros(FEATURES))

    def before(self, x: Tensor) -> Tensor:
        """Return what the k largest are taken of."""
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def decoded(self, values: Tensor, index: Tensor) -> Tensor:
        """Return the sum of decoder rows, without the bias."""
        features = torch.zeros(len(values), FEATURES).scatter(1, index, values.relu())
        return features @ self.W_dec


def train(x: Tensor, steps: int, seed: int) -> Autoencoder:
    """Minimize the squared error, and have dead features explain what is left of it."""
    generator = torch.Generator().manual_seed(seed)
    model = Autoencoder(x[torch.randperm(len(x), generator=generator)[:10_000]].median(0).values, generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.99))
    unused, spread = torch.zeros(FEATURES), x.var(0).sum()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 100, (steps - step) / (0.3 * steps))
        batch = x[torch.randint(len(x), (BATCH,), generator=generator)]
        before = model.before(batch)
        values, index = before.topk(K, dim=1)
        left = batch - model.b_dec - model.decoded(values, index)
        loss = left.square().sum(1).mean() / spread
        unused += 1
        unused[index[values > 0]] = 0
        dead = unused > DEAD
        if bool(dead.any()):
            count = min(int(dead.sum()), WIDTH // 2)
            rest = model.decoded(*before.masked_fill(~dead, -torch.inf).topk(count, dim=1))
            loss = loss + (left.detach() - rest).square().sum(1).mean() / spread / 32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.W_dec.div_(model.W_dec.norm(dim=1, keepdim=True))
        if (step + 1) % 500 == 0:
            print(f"step {step + 1} unexplained {float(loss.detach()):.4f}, {int(dead.sum())} dead", flush=True)
    return model


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the demo model's dictionary.")
    parser.add_argument("--out", type=Path, required=True, help="folder for cfg.json and sae_weights.safetensors")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = train(activations(windows(tokenizer, options.seed)), options.steps, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().half().contiguous() for name, value in model.named_parameters()}
    save_file(weights, options.out / "sae_weights.safetensors")
    config = {
        "architecture": "topk",
        "d_in": WIDTH,
        "d_sae": FEATURES,
        "k": K,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "model_name": "lens_unlearn demo",
            "hook_name": f"blocks.{LAYER}.hook_resid_post",
            "prepend_bos": True,
            "context_size": CONTEXT,
            "sae_lens_version": "6.0.0",
        },
    }
    (options.out / "cfg.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
