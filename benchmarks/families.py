"""Run `lu.check_model` on a tiny random model of every decoder family: what docs/models.md says of each.

    python benchmarks/families.py --save benchmarks/outputs/families.json
    python docs/make_results.py   # writes the tables of the page

Models are those of tests/helpers/families.py and moe.py; tests/promises/test_families.py compares what it stored with what is
found now.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import families
import moe
from record import begin

from lens_unlearn.model.sites import KINDS
from lens_unlearn.testing import ModelChecks, check_model

COLUMNS = ["family", "class in transformers", "sites", "ablation", "generation", "what does not work, and why"]
_USUAL = {"mlp.pre_linear"}
"""Kinds whose absence needs no word: where an MLP is not gated."""


def row_of(name: str) -> list[str]:
    """Check a family, and return its row."""
    kind = families.FAMILIES[name].name if name in families.FAMILIES else moe.CONFIGS[name][0]
    return [name, f"`{kind}`", *cells(check_model(families.bridge(name)))]


def cells(checks: ModelChecks) -> list[str]:
    """Return sites, ablation, generation, and what does not work."""
    sites = [(row.what, row.words) for row in checks.rows if row.check == "site" and row.outcome == "works"]
    layers = {kind: words.partition(" in ")[2].partition(" (")[0] for kind, words in sites}
    ways: dict[str, list[str]] = {}
    for kind in KINDS:
        if kind in layers:
            ways.setdefault(layers[kind], []).append(kind)
    where = "; ".join(", ".join(kinds) + ("" if way == "every layer" else f" in {way}") for way, kinds in ways.items())
    ablations = [row for row in checks.rows if row.check == "ablation"]
    bitwise = all(row.words.endswith("bit for bit") for row in ablations)
    ablation = "none" if not ablations else "bitwise the edit" if bitwise else "the edit, to rounding"
    generation = next(row for row in checks.rows if row.check == "generation")
    reasons: dict[str, list[str]] = {}
    for row in checks.rows:
        if row.outcome != "works" and row.what not in _USUAL:
            subject = row.what if row.check == "site" else f"{row.check} of {row.what}" if row.what else row.check
            reasons.setdefault(re.sub(r"^L\d+\.[a-z_.]+ ", "", row.words), []).append(subject)
    words = [f"{', '.join(subjects)}: {reason}" for reason, subjects in reasons.items()]
    return [where, ablation, "yes" if generation.outcome == "works" else "no", "; ".join(words).replace("|", "\\|")]


def main(given: Sequence[str] | None = None) -> None:
    """Check all."""
    _, record = begin(argparse.ArgumentParser(description=__doc__), given)
    record.about(vocabulary=families.VOCABULARY)
    for title, names in (("dense", families.DENSE), ("hybrid", families.HYBRID), ("experts", families.EXPERTS)):
        table = record.table(title, COLUMNS)
        for name in names:
            table.row(row_of(name))
    record.end()


if __name__ == "__main__":
    main()
