"""Makes tests/data/benchmarks/golden.json: texts and losses, and the scores that the published formulas give of them.

Run as ``python tests/helpers/benchmark_golden.py``. It shares no code with the package: formulas are those of benchmark_helpers.py,
in plain Python, `rouge_score` and SciPy.
"""

import json
import random
from pathlib import Path
from typing import Any

from benchmark_helpers import (
    COLORS,
    TOFU_SETS,
    area,
    lume_rows,
    lume_scores,
    mean,
    muse_scores,
    rouge,
    rwku_scores,
    tofu_rows,
    tofu_scores,
)

FILE = Path(__file__).parents[1] / "data" / "benchmarks" / "golden.json"
COUNT = 4


def texts_of(rows: list[dict[str, str]], draw: random.Random) -> list[dict[str, str]]:
    """Texts as of a model that knows some of it."""
    made = []
    for row in rows:
        words = row["reference"].split()
        known = " ".join(draw.sample(words, draw.randint(1, len(words))))
        text = draw.choice([row["reference"], f" {row['reference'].upper()}\n", "nothing", known, f"{known} running"])
        made.append({**row, "text": text})
    return made


def losses(draw: random.Random, count: int) -> list[float]:
    return [draw.uniform(0.05, 4.0) for _ in range(count)]


def lume(draw: random.Random) -> dict[str, Any]:
    rows = [
        {"id": row["id"], "task": row["task"].lower(), "split": split, "reference": row["output"]}
        for split in ("forget", "retain")
        for row in lume_rows(split, COUNT)
    ]
    texts = texts_of(rows, draw)
    numbers = {"output_loss": losses(draw, len(rows))}
    scores = lume_scores(texts)
    auc = area(*(numbers["output_loss"][part] for part in (slice(None, len(rows) // 2), slice(len(rows) // 2, None))))
    return {
        "base": {
            "texts": texts,
            "numbers": numbers,
            "scores": {**scores, "mia_auc": auc, "mia_score": 1 - 2 * abs(auc - 0.5)},
        }
    }


def tofu(draw: random.Random) -> dict[str, Any]:
    rows = []
    for name in TOFU_SETS:
        split = "forget" if name == "forget" else "retain"
        for number, row in enumerate(tofu_rows(name, COUNT)):
            rows.append({"id": f"{name}-{number}", "task": name, "split": split, "reference": row["answer"]})
            if name == "forget":
                rows.append({**rows[-1], "id": f"{name}-{number}-paraphrased", "task": "forget_paraphrased"})
    made: dict[str, Any] = {}
    for condition in ("base", "reference"):
        numbers: dict[str, list[float]] = {}
        for name in TOFU_SETS:
            for suffix in ("", "_without_eos"):
                for quantity, count in (
                    ("loss", 1),
                    ("paraphrase_loss", 1),
                    ("wrong_loss", 3),
                    ("paraphrased_question_loss", 1),
                ):
                    numbers[f"{name}_{quantity}{suffix}"] = losses(draw, count * COUNT)
        for quantity in ("exact_memorization", "extraction_strength"):
            numbers[f"forget_{quantity}"] = [draw.random() for _ in range(COUNT)]
        made[condition] = {"texts": texts_of(rows, draw), "numbers": numbers}
    for condition, one in made.items():
        rouges = {
            name: mean([rouge(row["text"], row["reference"], stem=True) for row in one["texts"] if row["task"] == name])
            for name in TOFU_SETS
        }
        never = made["reference"]["numbers"] if condition == "base" else None
        one["scores"] = tofu_scores(one["numbers"], rouges, 3, never)
        one["scores"] |= {f"{name}_rouge_l": value for name, value in rouges.items()}
    return made


def muse(draw: random.Random) -> dict[str, Any]:
    rows = [
        {"id": f"verbmem-{n}", "task": "verbmem_f", "split": "forget", "reference": f"jumps over {COLORS[n]} dogs"}
        for n in range(COUNT)
    ]
    for task, split in (("knowmem_f", "forget"), ("knowmem_r", "retain")):
        rows += [
            {"id": f"{task}-{n}", "task": task, "split": split, "reference": f"the {COLORS[n]} fox"}
            for n in range(COUNT)
        ]
    made: dict[str, Any] = {}
    for condition in ("base", "reference"):
        numbers = {f"{side}_min_k": losses(draw, COUNT) for side in ("forget", "holdout")}
        made[condition] = {"texts": texts_of(rows, draw), "numbers": numbers}
    for one in made.values():
        one["scores"] = muse_scores(one["texts"], one["numbers"], made["reference"]["numbers"])
    return made


def rwku(draw: random.Random) -> dict[str, Any]:
    rows = [
        {"id": f"{level}-{n}", "task": level, "split": level.split("_")[0], "reference": f"{COLORS[n]} foxes"}
        for level in ("forget_level1", "forget_level2", "forget_level3", "neighbor_level1", "neighbor_level2")
        for n in range(COUNT)
    ]
    numbers = {f"mia_{side}_loss": losses(draw, COUNT) for side in ("forget", "retain")}
    texts = texts_of(rows, draw)
    scores = {**rwku_scores(texts), **{name: mean(values) for name, values in numbers.items()}}
    return {"base": {"texts": texts, "numbers": numbers, "scores": scores}}


def golden() -> dict[str, Any]:
    return {made.__name__: made(random.Random(made.__name__)) for made in (lume, tofu, muse, rwku)}


if __name__ == "__main__":
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps(golden(), indent=1) + "\n", encoding="utf-8")
