r"""Run every recipe of docs/reproductions/, with small models and texts in the place of those on the hub.

    python benchmarks/recipes.py --save benchmarks/outputs/recipes.json

The code and the commands are taken from the pages. What cannot be had here is replaced in their text, by `STAND_INS`, and so are
sizes: this shows that each recipe runs as it is written and changes what it is to change, not what the papers measured. Every
replacement has to be found in its recipe, so the pages cannot drift away from this script.
"""

import argparse
import ast
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from record import Table, begin, percent

import lens_unlearn as lu

PAGES = Path(__file__).parents[1] / "docs" / "reproductions"
BLOCK = re.compile(r"^```(python|bash)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHARED = "../shared"
SKILLMIX, MEMORIZED = f"{SHARED}/models/skillmix", f"{SHARED}/models/skillmix-tofu"
CODE, SUMS = f"{SHARED}/data/code_python/python_files.jsonl", f"{SHARED}/data/gsm8k/train.jsonl"
PROSE = f"{SHARED}/data/skillmix_fit/prose.jsonl"
Replaced = Mapping[str, str]


def load_dataset(name: str, config: str | None = None, *, split: str = "train", streaming: bool = False) -> Any:
    """Give a local data set with the columns that the recipes ask for, in the place of one on the hub."""
    rows: list[dict[str, Any]]
    if name == "monology/pile-uncopyrighted":
        rows = [{"text": text, "meta": {"pile_set_name": "Wikipedia (en)"}} for text in column(PROSE, "text")]
    elif name.startswith("codeparrot/"):
        rows = [{"code": text} for text in column(CODE, "text")]
    elif name == "google/civil_comments":  # not toxicity: two skills that the model has
        rows = [{"text": text, "toxicity": 1.0} for text in column(CODE, "text")]
        rows += [{"text": text, "toxicity": 0.0} for text in column(PROSE, "text")]
    elif name == "facebook/mlqa":  # not languages, of which the model has one: mathematics and prose
        prose = [text[start : start + 600] for text in column(PROSE, "text") for start in range(0, len(text), 600)]
        texts = column(SUMS, "answer") if config == "mlqa.de.de" else prose
        rows = [{"context": text} for text in texts]
    else:
        file = {"openai/gsm8k": SUMS, "google-research-datasets/mbpp": f"{SHARED}/data/mbpp/mbpp.jsonl"}[name]
        rows = pd.read_json(file, lines=True).to_dict("records")
    made = datasets.Dataset.from_list(rows)
    return made.to_iterable_dataset() if streaming else made


def column(file: str, name: str) -> list[str]:
    return pd.read_json(file, lines=True)[name].tolist()


HUB = {"datasets.load_dataset": "load_dataset"}
FILES = {
    "hf:codeparrot/github-code-clean/all-all:train:code": f"{CODE}:text",
    "hf:codeparrot/github-code-clean/Python-all:train:code": f"{CODE}:text",
    "hf:monology/pile-uncopyrighted:train:text": f"{PROSE}:text",
    "hf:Salesforce/wikitext/wikitext-103-raw-v1:train:text": f"{SHARED}/data/wikitext2/valid.txt",
    "hf:openai/gsm8k/main:test:question>answer": f"{SHARED}/data/gsm8k/test.jsonl:question>answer",
    "hf:openai/gsm8k/main:train:question>answer": f"{SUMS}:question>answer",
    "hf:google-research-datasets/mbpp/full:test:text>code": f"{SHARED}/data/mbpp/mbpp.jsonl:text>code",
    "hf:google-research-datasets/mbpp/full:train:text>code": f"{SHARED}/data/mbpp/mbpp.jsonl:text>code",
    "hf:locuslab/TOFU/forget10:train:question>answer": f"{SHARED}/data/tofu/forget10.jsonl:question>answer",
    "hf:locuslab/TOFU/retain90:train:question>answer": f"{SHARED}/data/tofu/retain90.jsonl:question>answer",
    "hf:locuslab/TOFU/holdout10:train:question>answer": f"{SHARED}/data/tofu/holdout10.jsonl:question>answer",
    "hf:locuslab/TOFU/forget10_perturbed:train:question>answer": (
        f"{SHARED}/data/tofu/forget10_perturbed.jsonl:question>answer"
    ),
}
"""Sources on the hub, and the files in their place."""


@dataclass(frozen=True)
class Recipe:
    """Some blocks of a section of the page, in order, and what they are to come to.

    Attributes:
        name: In the table.
        section: Its page and the heading it is under.
        blocks: Which of the section's blocks, counted from 0, share their names.
        stand_ins: Further text to replace, and its replacement.
        rows: Takes the names that the Python blocks leave, with the value of the last expression as ``_``, and gives rows of
            (condition, corpus, metric, value). A command's rows are those of its metrics.csv.
    """

    name: str
    section: str
    blocks: tuple[int, ...]
    stand_ins: Replaced
    rows: Callable[[dict[str, Any]], list[tuple[str, str, str, str]]] | None = None


def measured(report: Any, *metrics: str) -> list[tuple[str, str, str, str]]:
    """Give what was lost of the accuracy, or other metrics of a report, under each of its conditions."""
    rows = []
    for condition in report.conditions:
        for corpus in report.corpora:
            for metric in metrics:
                if metric == "lost" and condition != "base":
                    rows.append((condition, corpus, "top-1 lost", percent(report.drop(condition, corpus))))
                elif (condition, corpus, metric) in report.measures:
                    rows.append((condition, corpus, metric, percent(report[condition, corpus, metric])))
    return rows


def on_fitted(edits: str, forget: str, retain: str) -> Callable[[dict[str, Any]], list[tuple[str, str, str, str]]]:
    """Measure what a recipe that evaluates nothing has found, on the texts that it was fitted to."""

    def rows(names: dict[str, Any]) -> list[tuple[str, str, str, str]]:
        texts = {"fitted forget texts": names[forget], "fitted retain texts": names[retain]}
        found = {name: names[name] for name in edits.split()}
        found = {("last" if name == "_" else name): edit for name, edit in found.items()}
        return measured(lu.evaluate(names["model"], texts, found, progress=False), "lost")

    return rows


RECIPES = (
    Recipe(
        "Selective Pruning, the curve",
        "selective_pruning#Settings",
        (0, 1),
        {
            '"facebook/opt-1.3b"': f'"{SKILLMIX}"',
            "torch.float16": "torch.float32",
            '"tokens": 100_000, "window": 1000': '"tokens": 2_000, "window": 160',
            ".skip(2_000)": ".skip(60)",
            "(1, 2, 5, 10, 15, 20, 25)": "(1, 5, 15)",
            "range(5)": "range(2)",
            **HUB,
        },
        lambda names: measured(names["report"], "lost"),
    ),
    Recipe(
        "Selective Pruning, toxicity",
        "selective_pruning#Settings",
        (0, 2),
        {
            '"facebook/opt-1.3b"': f'"{SKILLMIX}"',
            '"tokens": 100_000, "window": 1000': '"tokens": 2_000, "window": 160',
            '"gpt2-large"': f'"{SKILLMIX}"',
            '"meta-llama/Llama-2-7b-hf"': f'"{SKILLMIX}"',
            "torch.float16": "torch.float32",
            "tokens=100_000": "tokens=2_000, window=160",
            **HUB,
        },
        on_fitted("_", "toxic", "polite"),
    ),
    Recipe(
        "Selective Pruning, the command",
        "selective_pruning#Settings",
        (3,),
        {"facebook/opt-1.3b": SKILLMIX, "--tokens 100000 --window 1000": "--tokens 3000 --window 160"},
    ),
    Recipe(
        "Neuron Adjust and Key Space Detection",
        "effective_skill#Settings",
        (0, 1),
        {
            '"meta-llama/Meta-Llama-3-8B"': f'"{SKILLMIX}"',
            "torch.bfloat16": "torch.float32",
            "answers=200": "answers=20",
            "max_new_tokens=400": "max_new_tokens=40",
            "tokens=20_000": "tokens=3_000",
            **HUB,
        },
        lambda names: measured(names["_"], "lost", "abstained", "exact_match", "code_passes", "last_number"),
    ),
    Recipe(
        "Neuron Adjust, languages",
        "effective_skill#Settings",
        (0, 2),
        {'"meta-llama/Meta-Llama-3-8B"': f'"{SKILLMIX}"', "torch.bfloat16": "torch.float32", **HUB},
        on_fitted("_", "german", "others"),
    ),
    Recipe(
        "Key Space Detection, the command",
        "effective_skill#Settings",
        (3,),
        {"meta-llama/Meta-Llama-3-8B": SKILLMIX, "--answers 200": "--answers 5 --tokens 12000"},
    ),
    Recipe(
        "SIMU",
        "simu#Settings",
        (0,),
        {
            '"path/to/llama2-7b-finetuned-on-tofu"': f'"{MEMORIZED}"',
            '"[INST] {prompt} [/INST] {answer}"': '"Q: {prompt}\\nA: {answer}"',
            "template=template)\nretain": "template=template, tokens=1_500)\nretain",
            "template=template)\nunseen": "template=template, tokens=1_500)\nunseen",
            "template=template)\ndelta": "template=template, tokens=1_500)\ndelta",
            "steps=500": "steps=12",
            "lr=5e-6": "lr=3e-4",
            "memorization=400, answers=400": "memorization=20, answers=5",
        },
        lambda names: measured(names["_"], "lost", "exact_memorization", "answer_probability"),
    ),
    Recipe(
        "SIMU, the command",
        "simu#Settings",
        (1,),
        {
            "path/to/llama2-7b-finetuned-on-tofu": MEMORIZED,
            '"[INST] {prompt} [/INST] {answer}"': '"Q: {prompt}\\nA: {answer}"',
            "steps=500": "steps=12",
            "lr=5e-6": "lr=3e-4",
            "--memorization 400": "--memorization 20 --tokens 1500",
        },
    ),
    Recipe(
        "GPT-2, the command",
        "index#GPT-2, as a first real model",
        (0,),
        {"gpt2 ": f"{SKILLMIX} ", "--tokens 20000": "--tokens 4000 --window 160"},
    ),
)


def blocks_of(recipe: Recipe) -> list[tuple[str, str]]:
    """Return language and text of a recipe's blocks, with everything replaced that cannot be had here."""
    page, _, heading = recipe.section.partition("#")
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = BLOCK.findall(section)
    chosen, missing = [found[i] for i in recipe.blocks], set(recipe.stand_ins)
    made = []
    for language, text in chosen:
        for old, new in recipe.stand_ins.items():
            missing -= {old} if old in text else set()
            text = text.replace(old, new)
        for old, new in FILES.items():
            text = text.replace(old, new)
        made.append((language, text))
    if missing:
        raise ValueError(f"{recipe.name}: {page}.md has no {sorted(missing)} any more: mend its stand-ins")
    return made


def python(recipe: Recipe, names: dict[str, Any], text: str) -> None:
    """Run a block; the value of its last statement, if that is an expression, is left as ``_``."""
    tree = ast.parse(text, recipe.name)
    if isinstance(tree.body[-1], ast.Expr):
        tree.body[-1] = ast.Assign([ast.Name("_", ast.Store())], tree.body[-1].value)
    exec(compile(ast.fix_missing_locations(tree), recipe.name, "exec"), names)  # noqa: S102


def command(text: str, folder: str) -> list[tuple[str, str, str, str]]:
    """Run a command into a folder, and give the rows of its metrics.csv."""
    words = shlex.split(text.replace("\\\n", " "))
    words[words.index("--out") + 1] = out = f"{folder}/run"
    done = subprocess.run([sys.executable, "-m", "lens_unlearn", *words[1:]], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(words)}\n{done.stderr[-2000:]}")
    table = pd.read_csv(f"{out}/metrics.csv")
    shown = {"metric": ("top1", "abstained", "exact_memorization"), "corpus": ("forget", "retain")}
    rows = [row for row in table.to_dict("records") if all(row[name] in words for name, words in shown.items())]
    made = [(row["condition"], row["corpus"], row["metric"], f"{row['value']:.1%}") for row in rows]
    return [row for row in made if "@" not in row[0]]


def run(recipe: Recipe, table: Table) -> None:
    names: dict[str, Any] = {"load_dataset": load_dataset, "__name__": "recipe"}
    rows: list[tuple[str, str, str, str]] = []
    for language, text in blocks_of(recipe):
        if language == "python":
            python(recipe, names, text)
        else:
            with tempfile.TemporaryDirectory() as folder:
                rows += command(text, folder)
    if recipe.rows is not None:
        rows += recipe.rows(names)
    for row in rows:
        table.row([recipe.name, *row])


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=[recipe.name for recipe in RECIPES])
    args, record = begin(parser, given)
    record.about(stand_ins={r.name: dict(r.stand_ins) for r in RECIPES}, files=FILES)
    table = record.table("recipes", ["recipe", "condition", "texts", "metric", "value"])
    for recipe in RECIPES:
        if recipe.name in args.recipes:
            run(recipe, table)
    record.end()


if __name__ == "__main__":
    main()
