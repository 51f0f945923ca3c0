r"""Our scores beside OpenUnlearning's formulas on the same facts, and what the end-of-text token moves: the tables of peers.md.

    python benchmarks/peers.py --save benchmarks/outputs/peers.json

The peer's formulas are written out here as they stand in its code, and computed from plain forward passes of the plain model,
one answer at a time: nothing of the package is in them. The facts are TOFU's first, asked as in training; one model has memorized
them, the other has not. Texts are not generated. GSM8K's true answers are read as the released code of Effective skill unlearning
reads them (`eval`), which takes no model.
"""

import argparse
import ast
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import begin
from scipy.stats import ks_2samp

import lens_unlearn as lu

EPSILON = 1e-10


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="../shared/models/skillmix-tofu")
    parser.add_argument("--reference", default="../shared/models/skillmix")
    parser.add_argument("--data", default="../shared/data/tofu")
    parser.add_argument("--gsm8k", default="../shared/data/gsm8k/test.jsonl")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--template", default=r"Q: {prompt}\nA: {answer}")
    args, record = begin(parser, given)
    model, never = (lu.load_model(path) for path in (args.model, args.reference))
    asking: dict[str, Any] = {"template": args.template, "rows": args.rows, "max_new_tokens": 1, "progress": False}
    found = lu.benchmarks.tofu(model, args.data, {}, reference=never, resamples=100, **asking)
    record.about(model)
    read = [json.loads(line) for line in Path(args.data, "forget10_perturbed.jsonl").read_text().splitlines()]
    theirs = peer(model, never, read[: args.rows], args.template.replace("\\n", "\n"))
    table = record.table("formulas", ["memorized", "score", "ours", "OpenUnlearning", "difference"])
    for condition, scores in theirs.items():
        for name, value in scores.items():
            own = found[condition, name].value
            memorized = "yes" if condition == "base" else "no"
            table.row([memorized, name, f"{own:.6f}", f"{value:.6f}", f"{abs(own - value):.0e}"])
    table = record.table("eos", ["score", "counted", "left out"])
    for name in ("forget_probability", "retain_probability", "real_authors_probability", "world_facts_probability"):
        table.row([name, *(f"{found['base', f'{name}{suffix}'].value:.3f}" for suffix in ("", "_without_eos"))])
    for name in ("forget_truth_ratio", "retain_truth_ratio", "forget_ks", "forget_quality"):
        table.row([name, *(f"{found['base', f'{name}{suffix}'].value:.3g}" for suffix in ("", "_without_eos"))])
    table = record.table("gsm8k", ["true answers", "no number to eval", "share"])
    answers = [json.loads(line)["answer"] for line in Path(args.gsm8k).read_text().splitlines()]
    broken = [one for one in answers if not is_number(one.split("####")[-1].strip())]
    table.row([len(answers), len(broken), f"{len(broken) / len(answers):.1%}"])
    record.end()


def is_number(written: str) -> bool:
    """Whether Python reads a number: "1,450" is a pair, and "2,050" no expression at all."""
    try:
        return isinstance(ast.literal_eval(written), int | float)
    except (SyntaxError, ValueError):
        return False


def peer(model: Any, never: Any, rows: list[dict[str, Any]], template: str) -> dict[str, dict[str, float]]:
    """Compute OpenUnlearning's scores of the forget set, its formulas as in src/evals/metrics/memorization.py."""
    found: dict[str, dict[str, float]] = {}
    ratios: dict[str, np.ndarray] = {}
    for name, one in (("base", model), ("reference", never)):
        probability, ratio, shares, exact, strength = [], [], [], [], []
        for row in rows:
            answers = [row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]]
            truth, paraphrase, *wrong = (
                spoken(one.original_model, one.tokenizer, row["question"], answer, template) for answer in answers
            )
            probability.append(math.exp(-truth[0]))
            true, false = math.exp(-paraphrase[0]), math.exp(-np.mean([other[0] for other in wrong]))
            ratio.append(false / (true + EPSILON))
            shares.append(true / (true + false + EPSILON))
            right = truth[1]
            exact.append(np.mean(right))
            k = 0
            for k in range(len(right)):  # noqa: B007 - as there: the last k stays where none fits
                if all(right[k:]):
                    break
            strength.append(1 - k / len(right))
        ratios[name] = np.array(ratio)
        found[name] = {
            "forget_probability": float(np.mean(probability)),
            "forget_truth_ratio": float(np.mean(np.minimum(ratios[name], 1 / (ratios[name] + EPSILON)))),
            "forget_truth_ratio_prob_mean": float(np.mean(shares)),
            "forget_exact_memorization": float(np.mean(exact)),
            "forget_extraction_strength": float(np.mean(strength)),
        }
    test: Any = ks_2samp(ratios["base"], ratios["reference"])
    found["base"]["forget_quality"] = float(test.pvalue)
    return found


def spoken(plain: Any, tokenizer: Any, question: str, answer: str, template: str) -> tuple[float, list[bool]]:
    """Return the mean loss of an answer with the end-of-text token behind it, and which of its tokens without that are right."""
    head = template.split(" {answer}")[0].replace("{prompt}", question)
    start = [tokenizer.bos_token_id]
    before = start + tokenizer(head, add_special_tokens=False)["input_ids"]
    ids = start + tokenizer(f"{head} {answer}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        logits = plain(torch.tensor([ids])).logits[0].double()
    target = torch.tensor(ids[len(before) :])
    own = logits[len(before) - 1 : -1]
    loss = -own.log_softmax(-1).gather(1, target[:, None]).mean()
    return float(loss), (own.argmax(-1) == target)[:-1].tolist()


if __name__ == "__main__":
    main()
