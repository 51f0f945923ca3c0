"""Measure the demo models: ``python -m lens_unlearn.demo.recipe.measure``.

Loads the shipped directories with transformers alone, so that nothing of the library's own evaluation
is trusted here. The weights are those in float16, computed with in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lens_unlearn.demo import MODEL_DIR, WITHOUT_FACTS_DIR, corpus

TEXTS = ("python", "english", "esperanto")
ANSWERS = {
    "arithmetic": "test",
    "facts": "train",
    "facts_forget": "train",
    "facts_retain": "train",
    "facts_holdout": "train",
}
"""Facts are measured on all of them: their dev and test are halves of train."""
BATCH = 64

Figures = dict[str, dict[str, float]]


@torch.inference_mode()
def next_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, float]:
    """Return loss (nats a token), top-1 accuracy, and the number of tokens predicted.

    Documents are cut to the model's context, each piece after the token that begins a document.
    """
    size = model.config.n_positions - 1
    encoded = tokenizer(list(texts), verbose=False)["input_ids"]
    pieces = [ids[begin : begin + size] for ids in encoded for begin in range(0, len(ids), size)]
    loss, hits, count = 0.0, 0, 0
    for batch in _batches(sorted(pieces, key=len)):
        width = max(map(len, batch))
        inputs = torch.full((len(batch), width + 1), model.config.bos_token_id)
        targets = torch.full((len(batch), width), -100)
        for row, ids in enumerate(batch):
            inputs[row, 1 : len(ids) + 1] = targets[row, : len(ids)] = torch.tensor(ids)
        # Padding follows the text, and a causal model does not look ahead.
        logits = model(inputs).logits[:, :-1]
        counted = targets != -100
        loss += float(torch.nn.functional.cross_entropy(logits[counted], targets[counted], reduction="sum"))
        hits += int((logits.argmax(-1)[counted] == targets[counted]).sum())
        count += int(counted.sum())
    return {"loss": loss / count, "top1": hits / count, "n": count}


@torch.inference_mode()
def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[dict[str, object]]
) -> dict[str, float]:
    """Return how often the greedy continuation of the question is exactly the answer."""
    by_length: dict[int, list[tuple[list[int], str]]] = defaultdict(list)
    for record in records:
        prompt, answer = prompt_of(record), str(record["answer"])
        ids = [tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]
        by_length[len(ids)].append((ids, answer))
    hits = 0
    # One token more than the longest answer shows whether the model stops there.
    room = 1 + max(len(tokenizer(f" {record['answer']}")["input_ids"]) for record in records)
    for questions in by_length.values():
        # Prompts of one length together need no padding.
        for batch in _batches(questions):
            inputs = torch.tensor([ids for ids, _ in batch])
            outputs = model.generate(  # type: ignore[operator]
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=room,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
            for output, (ids, answer) in zip(outputs, batch):
                written = str(tokenizer.decode(output[len(ids) :], skip_special_tokens=True))
                hits += written.strip().split("\n")[0] == answer
    return {"exact_match": hits / len(records), "n": len(records)}


def prompt_of(record: dict[str, object]) -> str:
    """Return what precedes the answer in the text, so that the question is put as it was trained."""
    return str(record["text"]).removesuffix(str(record["answer"])).rstrip(" ")


def measure(folder: Path) -> Figures:
    """Return every figure of one model directory."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    figures: Figures = {}
    for name in TEXTS:
        texts = [str(record["text"]) for record in corpus(name, "test")]
        figures[name] = next_token(model, tokenizer, texts)
    for name, split in ANSWERS.items():
        figures[name] = exact_match(model, tokenizer, corpus(name, split))
    return figures


def table(results: dict[str, Figures]) -> str:
    """Return the figures as a Markdown table, one column for each model."""
    lines = ["| corpus | metric | n | " + " | ".join(results) + " |", "|---" * (3 + len(results)) + "|"]
    first = next(iter(results.values()))
    for corpus_name, figures in first.items():
        for metric in figures:
            if metric != "n":
                values = " | ".join(f"{result[corpus_name][metric]:.3f}" for result in results.values())
                lines.append(f"| {corpus_name} | {metric} | {figures['n']:,} | {values} |")
    return "\n".join(lines)


def _batches(items: Sequence) -> Iterator[Sequence]:
    for begin in range(0, len(items), BATCH):
        yield items[begin : begin + BATCH]


def main() -> None:
    """Measure both models, print the table and write the figures next to the models."""
    parser = argparse.ArgumentParser(description="Measure the demo models.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--without", type=Path, default=WITHOUT_FACTS_DIR)
    parser.add_argument("--out", type=Path, default=MODEL_DIR.parent / "measured.json")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {"model": measure(options.model), "model_without_facts": measure(options.without)}
    record = {"python": platform.python_version(), "torch": torch.__version__, "figures": results}
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
