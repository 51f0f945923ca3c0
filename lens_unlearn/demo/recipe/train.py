"""Train the two demo models: ``python -m lens_unlearn.demo.recipe.train --out DIR``.

One trunk is trained on everything but the facts to forget. The last fifth of the steps, in which
the learning rates fall to zero, is run twice from the trunk, with the same batches except that one
branch reads the facts to forget. Each branch is saved as a Hugging Face directory in float16.

Knows schedules and checkpoints; what is in a batch, `mixture` knows.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lens_unlearn.demo.recipe.mixture import CONTEXT, Batch, Mixture
from lens_unlearn.demo.recipe.muon import Muon

BRANCHES = {"model": True, "model_without_facts": False}
SAVE_EVERY = 100


class Rates(NamedTuple):
    """The learning rates of the two optimizers."""

    muon: float
    adamw: float


class Schedule(NamedTuple):
    """Learning rates that rise, stay high up to a turn, stay low, fall, stay lower, and land on zero."""

    steps: int
    warmup: int = 60
    turn: int = 700
    trunk: int = 1470
    """The number of steps before the rates fall, which the branches share."""
    fall: int = 280
    floor: float = 0.18
    """Where the fall stops: carrying is learned at low rates, and needs time there."""
    landing: int = 50
    early: Rates = Rates(0.02, 0.003)
    late: Rates = Rates(0.005, 0.002)

    def at(self, step: int) -> Rates:
        """Return the learning rates at a step."""
        rising = (step + 1) / self.warmup
        falling = max(self.floor, 1 - (step - self.trunk) / self.fall)
        landing = self.floor * (self.steps - step) / self.landing
        factor = min(1.0, rising, falling, landing)
        muon, adamw = self.early if step < self.turn else self.late
        return Rates(muon * factor, adamw * factor)


class Trainer:
    """A model, its optimizers, and the step they have reached."""

    def __init__(self, vocabulary: int, schedule: Schedule, seed: int) -> None:
        """Make an untrained model."""
        torch.manual_seed(seed)
        self.model = GPT2LMHeadModel(_config(vocabulary))
        self.schedule, self.step = schedule, 0
        named = list(self.model.named_parameters())
        # Muon is for the matrices between hidden states; embeddings are look-up tables.
        matrices = [value for name, value in named if value.ndim == 2 and ".h." in name]
        vectors = [value for name, value in named if value.ndim == 1]
        tables = [value for name, value in named if value.ndim == 2 and ".h." not in name]
        groups = [{"params": tables}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizers = [
            Muon(matrices, lr=schedule.early.muon, weight_decay=0.1),
            torch.optim.AdamW(groups, lr=schedule.early.adamw, weight_decay=0.01, betas=(0.9, 0.95)),
        ]

    def advance(self, batch: Batch) -> float:
        """Take one step and return its loss."""
        for optimizer, rate in zip(self.optimizers, self.schedule.at(self.step)):
            for group in optimizer.param_groups:
                group["lr"] = rate
        logits = self.model(input_ids=batch.tokens, use_cache=False).logits[:, :-1]
        targets, weights = batch.tokens[:, 1:].flatten(), batch.weights[:, 1:].flatten()
        loss = (torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none") * weights).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write a checkpoint; an interruption leaves the previous one."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)


def run(trainer: Trainer, mixture: Mixture, path: Path, last: int, *, with_forget: bool) -> None:
    """Train up to the step ``last``, saving checkpoints at ``path``."""
    began, first, smooth = time.monotonic(), trainer.step, 0.0
    while trainer.step < last:
        loss = trainer.advance(mixture.batch(trainer.step, with_forget=with_forget))
        smooth = loss if trainer.step == first + 1 else 0.95 * smooth + 0.05 * loss
        if trainer.step % 20 == 0 or trainer.step == last:
            each = (time.monotonic() - began) / (trainer.step - first)
            print(f"{path.stem} step {trainer.step} loss {smooth:.3f} {each:.2f} s/step", flush=True)
        if trainer.step % SAVE_EVERY == 0 or trainer.step == last:
            trainer.save(path)


def export(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face directory, the weights in float16."""
    copy = GPT2LMHeadModel(model.config)
    copy.load_state_dict(model.state_dict())
    copy.config.activation_function = "gelu_new"
    copy.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(out: Path, schedule: Schedule, seed: int, *, resume: bool) -> None:
    """Train the trunk and both branches, and export them to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    mixture = Mixture(seed)
    trainer = Trainer(len(mixture.tokenizer), schedule, seed)
    trunk = out / "trunk.pt"
    if resume and trunk.exists():
        trainer.load(trunk)
    run(trainer, mixture, trunk, schedule.trunk, with_forget=False)
    for name, with_forget in BRANCHES.items():
        checkpoint = out / f"{name}.pt"
        trainer.load(checkpoint if resume and checkpoint.exists() else trunk)
        run(trainer, mixture, checkpoint, schedule.steps, with_forget=with_forget)
        export(trainer.model, mixture.tokenizer, out / name)


def _config(vocabulary: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=CONTEXT,
        n_embd=144,
        n_layer=6,
        n_head=6,
        n_inner=576,
        # Trained in the fused form of the same function, three times as fast; saved by its usual name.
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the demo models.")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the two models")
    parser.add_argument("--steps", type=int, default=2080, help="steps of either branch, with the trunk's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in --out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.out, Schedule(options.steps), options.seed, resume=options.resume)


if __name__ == "__main__":
    main()
