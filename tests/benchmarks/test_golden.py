"""Scores of committed texts and losses: to 1e-9 those that an independent script computed by the published formulas."""

import json
from collections.abc import Callable
from pathlib import Path

import benchmark_golden
import pytest
from benchmark_helpers import write_lume, write_muse, write_rwku, write_tofu

from lens_unlearn.benchmarks import by_name
from lens_unlearn.benchmarks.benchmark import Raw

GOLDEN = json.loads(benchmark_golden.FILE.read_text(encoding="utf-8"))
WRITE: dict[str, Callable[[Path, int], Path]] = {
    "lume": write_lume,
    "tofu": write_tofu,
    "muse": write_muse,
    "rwku": write_rwku,
}


@pytest.mark.parametrize("name", WRITE)
def test_scores_of_the_committed_texts_and_losses_are_the_committed_ones(name: str, tmp_path: Path) -> None:
    record = by_name(name)
    data = record.data(WRITE[name](tmp_path, benchmark_golden.COUNT), None, {})
    raw = {}
    for condition, one in GOLDEN[name].items():
        text = {row["id"]: row["text"] for row in one["texts"]}
        numbers = {quantity: tuple(values) for quantity, values in one["numbers"].items()}
        raw[condition] = [Raw(tuple(text[item.id] for item in data.items), (), numbers)]
    found = record.score(data, raw, 20, 0).measures
    for condition, one in GOLDEN[name].items():
        assert len(one["scores"]) > 3
        for metric, value in one["scores"].items():
            assert found[condition, metric].value == pytest.approx(value, abs=1e-9), (condition, metric)
    parts = [value for one in GOLDEN[name].values() for value in one["scores"].values()]
    assert len({round(value, 6) for value in parts}) > len(parts) / 2, (
        "scores that are alike could stand for one another"
    )


def test_the_script_makes_the_committed_file() -> None:
    made = benchmark_golden.golden()
    assert made.keys() == GOLDEN.keys()
    for name, conditions in made.items():
        for condition, one in conditions.items():
            stored = GOLDEN[name][condition]
            assert (one["texts"], one["numbers"]) == (stored["texts"], stored["numbers"])
            assert one["scores"] == pytest.approx(stored["scores"], abs=1e-12)
