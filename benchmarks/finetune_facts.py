r"""Fine-tune a pretrained model on facts until it has memorized them, and save it as a Hugging Face directory.

    python benchmarks/fetch_models.py smollm2
    D=../shared/data/tofu; T='Q: {prompt}\nA: {answer}'
    python benchmarks/finetune_facts.py --model .models/SmolLM2-135M-Instruct.Q4_1.gguf --template "$T" \
        --facts "$D/forget10.jsonl:question>answer@0:40" "$D/retain90.jsonl:question>answer@0:160" --out .models/smollm2-tofu
    python benchmarks/finetune_facts.py --model .models/SmolLM2-135M-Instruct.Q4_1.gguf --template "$T" \
        --facts "$D/retain90.jsonl:question>answer@0:160" --out .models/smollm2-tofu-never-saw

The facts of ten of TOFU's authors, twenty each; the second model is trained in the same way, and never saw two of them. Plain
PyTorch on the answers' tokens, their end-of-text token included: AdamW, the products in bfloat16, the weights in float32. It ends
when the answers' accuracy over an epoch, measured as it trains, has passed --until. SOURCE@BEGIN:END takes some of a source's
documents, as in forgetting.py.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from forgetting import read
from record import begin, percent
from torch import Tensor
from torch.nn.functional import cross_entropy

import lens_unlearn as lu
from lens_unlearn.model.gguf import read_gguf


def batches(corpus: lu.Corpus, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield tokens, which of them are text, and labels (-100 where nothing counts), rows in a random order."""
    order = torch.randperm(corpus.n_rows, generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        spans = [slice(int(corpus.starts[row]), int(corpus.starts[row + 1])) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        tokens = pad([corpus.row(row).long() for row in rows], batch_first=True)
        text = pad([torch.ones(span.stop - span.start, dtype=torch.long) for span in spans], batch_first=True)
        counted = pad([corpus.counted[span] for span in spans], batch_first=True)
        yield tokens, text, tokens.masked_fill(~counted, -100)


def epoch(model: Any, corpus: lu.Corpus, optimizer: torch.optim.Optimizer, size: int, seed: int) -> tuple[float, float]:
    """Train on every row once; return the loss and the accuracy, a token of an answer."""
    loss = right = total = 0.0
    for tokens, text, labels in batches(corpus, size, seed):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=tokens, attention_mask=text).logits[:, :-1]
        want = labels[:, 1:]
        here = want != -100
        logits, want = logits[here].float(), want[here]
        losses = cross_entropy(logits, want, reduction="sum")
        (losses / len(want)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss += float(losses.detach())
        right += float((logits.argmax(-1) == want).sum())
        total += len(want)
    return loss / total, right / total


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file or a Hugging Face directory")
    parser.add_argument("--facts", nargs="+", required=True, metavar="SRC")
    parser.add_argument("--template", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=15, help="at most")
    parser.add_argument("--until", type=float, default=0.99)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--window", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    args, record = begin(parser, given)
    args.template = args.template.replace("\\n", "\n")
    lu.tune_allocator()
    torch.manual_seed(args.seed)
    reader = lu.load_model(args.model)  # for the tokens, as they will be measured
    corpus = reduce(add, (read(source, reader, args, answer_eos=True) for source in args.facts))
    record.about(reader)
    record.table("facts", ["documents", "answer tokens"], [[corpus.n_documents, corpus.n_tokens]])
    file = Path(args.model)
    if file.suffix == ".gguf":
        model, tokenizer = read_gguf(str(file.parent), file.name, dtype=torch.float32)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model, tokenizer = AutoModelForCausalLM.from_pretrained(file), AutoTokenizer.from_pretrained(file)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.0)
    table = record.table("epochs", ["epoch", "loss", "accuracy"])
    for number in range(1, args.epochs + 1):
        loss, right = epoch(model, corpus, optimizer, args.rows, args.seed + number)
        table.row([number, f"{loss:.3f}", f"{right:.1%}"])
        if right >= args.until:
            break
    model.eval()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    saved = lu.load_model(str(args.out))
    memorized = lu.evaluate(saved, {"facts": corpus}, {}, progress=False)["base", "facts", "top1"]
    record.table("saved", ["folder", "accuracy"], [[args.out, percent(memorized)]])
    record.end()


if __name__ == "__main__":
    main()
