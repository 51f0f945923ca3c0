r"""Do Key Space Detection's stated rates hold? Simulated keys, fitted many times, each judged on many fresh queries.

    python benchmarks/calibration_key_space.py --save benchmarks/outputs/calibration_key_space.json

Of every repetition the stated detection and false positive rates, with their 95 % intervals, are set beside the rates on fresh
queries of the same kind: how often the interval holds those, and what the mean fresh false positive rate is beside the budget.
No model is needed: keys are normal numbers, those of the skill shifted, and those of a document correlated.
"""

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
from record import begin

from lens_unlearn.methods.key_space_detection import key_space_detection
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.key_sample import KeySample

FRESH = 4000  # queries of either side that the truth is measured on


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Attributes:
        shift: Distance of the skill from the rest, in standard deviations of every coordinate, at the layer where it is largest.
        layers: How many there are; the shift falls from the last to none at the first.
        forget: Queries of the skill.
        retain: Queries of the rest.
        per_document: Queries of a document.
        within: Share of the variance of a key that its document explains.
        budget: `false_alarms`.
        region: `region`.
        width: Coordinates of a key.
    """

    shift: float = 0.0
    layers: int = 4
    forget: int = 400
    retain: int = 800
    per_document: int = 1
    within: float = 0.0
    budget: float = 0.05
    region: Any = "auto"
    width: int = 8


@dataclass(frozen=True)
class Outcome:
    """Means over repetitions.

    Attributes:
        detection: Stated detection rate.
        fresh_detection: On fresh queries.
        detection_coverage: How often the interval holds the fresh rate.
        false_alarms: Likewise for the false positive rate.
        fresh_false_alarms: Likewise.
        false_alarms_coverage: Likewise.
        within_budget: Share of repetitions whose fresh false positive rate is at most the budget.
    """

    detection: float
    fresh_detection: float
    detection_coverage: float
    false_alarms: float
    fresh_false_alarms: float
    false_alarms_coverage: float
    within_budget: float


def keys(
    setting: Setting, count: int, sign: float, start: int, generator: torch.Generator, per_document: int
) -> KeySample:
    """Draw the keys of so many queries at every layer."""
    sample = KeySample(max(count, 1))
    documents = torch.arange(count) // per_document
    sample.locate(documents + start, torch.arange(count))
    size = int(documents.max()) + 1
    for layer in range(setting.layers):
        shift = sign * setting.shift * (layer + 1) / setting.layers / 2
        shared = torch.randn(size, setting.width, generator=generator)[documents]
        own = torch.randn(count, setting.width, generator=generator)
        values = setting.within**0.5 * shared + (1 - setting.within) ** 0.5 * own + shift
        sample.update(Site(layer, "mlp.post"), values, torch.ones(count))
    return sample


def calibration_of(setting: Setting, repetitions: int, seed: int = 0) -> Outcome:
    """Fit so many times, and compare the stated rates with those on fresh queries.

    Args:
        setting: What to simulate.
        repetitions: How often.
        seed: Seeds the simulated queries.
    """
    model: Any = SimpleNamespace(cfg=SimpleNamespace(n_layers=setting.layers))
    rows = []
    for repetition in range(repetitions):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + repetition)
        sides = [
            keys(setting, count, sign, start, generator, setting.per_document)
            for count, sign, start in ((setting.forget, 1.0, 0), (setting.retain, -1.0, 10**6))
        ]
        with warnings.catch_warnings():
            # Of few queries a small budget is kept by abstaining from nothing.
            warnings.simplefilter("ignore", RuntimeWarning)
            act = key_space_detection(
                model, *sides, region=setting.region, false_alarms=setting.budget, control=False, seed=repetition,
                progress=False,
            )  # fmt: skip
        row = []
        for name, sign in (("detection", 1.0), ("false_alarms", -1.0)):
            fresh = keys(setting, FRESH, sign, 0, generator, 1)
            votes = torch.stack([region.contains(fresh[site]) for site, region in act.regions.items()]).sum(0)
            truth = float((votes >= act.vote).double().mean())
            stated, low, high, _ = act.rates[name]
            row += [stated, truth, float(low <= truth <= high)]
        rows.append([*row, float(truth <= setting.budget)])
    columns = [field.name for field in fields(Outcome)]
    return Outcome(**dict(zip(columns, torch.tensor(rows, dtype=torch.float64).mean(0).tolist(), strict=True)))


SETTINGS = {
    "no signal": Setting(),
    "no signal, few queries": Setting(forget=100, retain=200),
    "no signal, 2 %": Setting(budget=0.02),
    "signal": Setting(shift=1.2),
    "signal, few queries": Setting(shift=1.2, forget=100, retain=200),
    "signal, 2 %": Setting(shift=1.2, budget=0.02),
    "signal, one layer's box": Setting(shift=1.2, layers=1, region="box"),
    "signal, 5 queries a document": Setting(shift=1.2, per_document=5, within=0.3),
    "no signal, 5 queries a document": Setting(per_document=5, within=0.3),
}


HEADS = ["simulated", "budget", "detection", "fresh detection", "interval covers it"]
HEADS += ["false positives", "fresh false positives", "their interval covers it", "within budget"]


def cells(name: str, setting: Setting, outcome: Outcome) -> list[str]:
    """Print an outcome as a row under `HEADS`."""
    o = outcome
    own = [f"{o.detection:.1%}", f"{o.fresh_detection:.1%}", f"{o.detection_coverage:.1%}"]
    others = [f"{o.false_alarms:.2%}", f"{o.fresh_false_alarms:.2%}", f"{o.false_alarms_coverage:.1%}"]
    return [name, f"{setting.budget:.0%}", *own, *others, f"{o.within_budget:.0%}"]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--simulated", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seed", type=int, default=0)
    args, record = begin(parser, given)
    record.about(fresh=FRESH, simulations={name: asdict(SETTINGS[name]) for name in args.simulated})
    table = record.table("calibration", HEADS)
    for name in args.simulated:
        table.row(cells(name, SETTINGS[name], calibration_of(SETTINGS[name], args.repetitions, args.seed)))
    record.end()


if __name__ == "__main__":
    main()
