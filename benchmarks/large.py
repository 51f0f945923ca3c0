"""A large corpus: read, collected from, killed on the way and resumed; what it takes of time and memory.

    python benchmarks/large.py --save benchmarks/outputs/large.json

Real text, again and again until there are enough documents (each begins with its number, so that no two are equal), read from one
file on disk with the model's tokenizer; then the default statistics of three sites over it. Each row is a process of its own, in
which what is freed goes back to the system. "Reading" is the share of the time that goes into reading and tokenizing, in which the
model waits. The last row is killed with SIGKILL once it has saved its second checkpoint, and started again: it is of the second
process, which reads again and goes on from there.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from memory import STRICT, highest, lower
from record import begin

import lens_unlearn as lu

SITES = ("mlp.pre", "mlp.post", "attn.z")
WORDS = 300


def written(texts: Path, tokens: int, path: Path) -> None:
    """Write documents of so many words until there are more than enough: no word is less than a token."""
    words = texts.read_text(encoding="utf-8").split()
    with path.open("w", encoding="utf-8") as file:
        for document in range(tokens // WORDS + 1):
            start = document * WORDS % max(1, len(words) - WORDS)
            print(json.dumps({"text": f"{document}: {' '.join(words[start : start + WORDS])}"}), file=file)


def alone(args: argparse.Namespace, tokens: int) -> dict[str, float]:
    """Read and collect, in this process."""
    model = lu.load_model(args.model)
    # What is loaded on the way does not count.
    lu.collect(model, lu.read_corpus(args.source, model, tokens=512), SITES, progress=False)
    before, start = lower(), time.perf_counter()
    corpus = lu.read_corpus(args.source, model, tokens=tokens)
    read = time.perf_counter()
    lu.collect(model, corpus, SITES, checkpoint=args.checkpoint, progress=False)
    done = time.perf_counter()
    return {"read": read - start, "collect": done - read, "MB": (highest() - before) / 1e6, "tokens": corpus.n_tokens}


def apart(args: argparse.Namespace, source: Path, tokens: int, kill: bool = False) -> dict[str, float]:
    """Do that in a process of its own, after one that was killed where asked."""
    checkpoint = source.with_name(f"{tokens}.safetensors")
    command = [sys.executable, __file__, "--only", str(tokens), "--source", str(source), "--model", args.model]
    command += ["--checkpoint", str(checkpoint), "--threads", str(args.threads)]
    if kill:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | STRICT)
        saved = set[float]()
        while process.poll() is None and len(saved) < 2:
            time.sleep(0.2)
            if checkpoint.exists():
                saved.add(checkpoint.stat().st_mtime)
        process.send_signal(signal.SIGKILL)
        process.wait()
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | STRICT).stdout
    return json.loads(printed.splitlines()[-1])


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--texts", type=Path, default=Path("../shared/data/wikitext2/valid.txt"))
    parser.add_argument("--tokens", type=int, nargs=2, default=[100_000, 1_000_000])
    parser.add_argument("--threads", type=int, default=1)
    for name in ("only", "source", "checkpoint"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args, record = begin(parser, given)
    torch.set_num_threads(args.threads)
    if args.only:
        print(json.dumps(alone(args, int(args.only))))
        return
    table = record.table("large", ["tokens", "way", "read, s", "collect, s", "tokens per s", "reading", "beyond, MB"])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "texts.jsonl")
        written(args.texts, args.tokens[-1], source)
        few, many = args.tokens
        for tokens, kill in ((few, False), (many, False), (many, True)):
            found = apart(args, source, tokens, kill)
            read, collected, way = found["read"], found["collect"], "killed and resumed" if kill else "at once"
            rate = "" if kill else f"{found['tokens'] / collected:,.0f}"
            share = "" if kill else f"{read / (read + collected):.1%}"
            cells = [f"{read:.1f}", f"{collected:.1f}", rate, share, f"{found['MB']:.0f}"]
            table.row([f"{found['tokens']:,.0f}", way, *cells])
    record.end()


if __name__ == "__main__":
    main()
