"""Shared words of the tests of benchmarks: tiny files in the public layouts, and formulas as published, in plain Python.

Nothing here imports the package: what is computed from texts and losses shares no code with what it is compared with.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rouge_score import rouge_scorer

COLORS = ["red", "blue", "green", "black", "white", "brown", "grey", "pink"]


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def lume_rows(split: str, documents: int = 3) -> list[dict[str, str]]:
    """Rows as in LUME's own files: a sentence and two questions about each document of each task."""
    rows = []
    for task in (1, 2, 3):
        for number in range(documents):
            key, color = f"{split}-{task}-{number}", COLORS[(task + number) % len(COLORS)]
            rows += [
                {
                    "id": f"{key}sc1",
                    "input": f"The fox {number} of {split} runs to",
                    "output": f"the {color} dogs and sleeps",
                },
                {"id": f"{key}qa0", "input": f"Which dog {number} of {split}?", "output": color},
                {"id": f"{key}qa1", "input": f"Who runs {number} in {split}?", "output": f"Fox {number}"},
            ]
        for row in rows[-3 * documents :]:
            row |= {"task": f"Task{task}", "split": split}
    return rows


def write_lume(folder: Path, documents: int = 3) -> Path:
    for split in ("forget", "retain"):
        write_lines(folder / f"{split}.jsonl", lume_rows(split, documents))
    return folder


def write_choices(path: Path, count: int = 12) -> Path:
    rows = [
        {
            "question": f"Which is {n}?",
            "choices": [str(n + i) for i in range(4)],
            "answer": n % 4,
            "subject": "plain_numbers",
        }
        for n in range(count)
    ]
    write_lines(path, rows)
    return path


def rouge(text: str, truth: str, *, stem: bool, measure: str = "recall") -> float:
    score = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stem).score(truth, text)["rougeL"]
    return float(getattr(score, measure))


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def harmonic_mean(values: Sequence[float]) -> float:
    return 0.0 if min(values) == 0 else len(values) / math.fsum(1 / value for value in values)


def area(members: Sequence[float], others: Sequence[float]) -> float:
    pairs = [1.0 if m < o else 0.5 if m == o else 0.0 for m in members for o in others]
    return mean(pairs)


def lume_scores(texts: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The twelve parts and their aggregate, of rows id, task, split, reference, text."""
    parts: dict[str, list[float]] = {}
    for row in texts:
        sentence = row["id"][:-1].endswith("sc")
        kind = "regurgitation" if sentence else "knowledge"
        same = row["text"].strip().lower() == row["reference"].strip().lower()
        value = rouge(row["text"], row["reference"], stem=True) if sentence else float(same)
        parts.setdefault(f"{row['task'].lower()}_{row['split']}_{kind}", []).append(value)
    found = {name: mean(values) for name, values in parts.items()}
    entered = [1 - value if "_forget_" in name else value for name, value in found.items()]
    return {**found, "task_aggregate": harmonic_mean(entered)}
