"""Every benchmark still runs, on shapes that show nothing but that; and what they share measures what it says."""

import argparse
import importlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
PRINTED = {
    "collect": ["collect, histograms", "plain hooks, naive sums", "run_with_cache and reduce", "experts.post alone"],
    "forward": ["no intervention", "Ablate", "Adjust", "Abstain", "Delta", "plain mask hooks"],
    "generation": ["plain Hugging Face generate", "lens_unlearn, Ablate", "8 of 8 tokens are those of the plain model"],
    "sweeps": ["separate evaluations", "sweep", "evaluating in every step", "steps, evaluated once"],
    "memory": ["ratio of the highest", "simu, attention", "simu, no attention", "full weights, Sophia"],
    "start": ["log-normal", "lens-unlearn --help"],
    "attribution": ["plain, all gradients", "attribute", "largest difference of an attribution"],
    "gpu": [
        "=== Llama-3-8B",
        "=== Gemma-2-2B",
        "=== GPT-2",
        "tokens per second",
        "5: greedy",
        "8: attribution",
        "bitwise True",
        "9: memory",
    ],
}

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="only where the repository is")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a benchmark, which finds the others beside it; afterwards nothing of them is left."""
    threads, known = torch.get_num_threads(), set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n == "gpu" else n for n in PRINTED])
@pytest.mark.changes_random_state
# Two steps attribute next to nothing where a norm follows the MLP, as in Gemma 2, and that is said.
@pytest.mark.filterwarnings("ignore:less than 10% of what")
def test_a_benchmark_runs_and_prints_its_rows(
    name: str, load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    load(name).main(["--tiny", *(["--device", "cpu"] if name == "gpu" else [])])
    out = capsys.readouterr().out
    assert out.startswith("torch ")
    assert not [row for row in PRINTED[name] if row not in out]
    assert "MISSED" not in out  # of a tiny shape nothing is judged
    assert "nan" not in out.lower().split()


def test_attention_sinks_are_counted_in_every_layer(
    load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    load("attention_sinks").main(["--model", "demo", "--tokens", "300", "--window", "64", "--ratio", "1.1"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [int(row[0]) for row in rows] == [*range(len(rows))]
    assert all(float(row[2]) >= 1 for row in rows)
    assert any(int(row[1]) for row in rows)
    assert all((int(row[1]) > 0) == (row[3] != "0.0%") for row in rows)


@pytest.mark.changes_random_state
def test_budgets_are_kept_by_the_bound_and_broken_by_the_point_estimate(
    load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    budgets = load("budgets")
    budgets.main(["--simulated", "12", "--real", "0"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| simulated | ")]
    assert [row[1] for row in rows] == list(budgets.RULES)
    broken = [float(row[3].partition("%")[0]) for row in rows]
    assert broken[0] < 20 < broken[1]


@pytest.mark.changes_random_state
def test_memory_is_measured_in_a_process_of_its_own(
    load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    memory = load("memory")
    memory.main(["--only", "1", "--of", next(iter(memory.TINY))])
    before, highest = json.loads(capsys.readouterr().out)
    assert 0 < before <= highest


@pytest.mark.changes_random_state
def test_growth_is_measured_along_every_size(
    load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    load("growth").main(["--tiny", "--task", "collect"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [row[:2] for row in rows] == [["collect", size] for size in ("tokens", "layers", "vocabulary", "sites")]


@pytest.mark.changes_random_state
def test_collectors_are_timed_over_a_forward_pass(
    load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    load("collectors").main(["--tiny"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [row[1] for row in rows][:2] == ["logits-free forward", "lens_unlearn.collect"]
    assert float(rows[0][2]) == 1 < float(rows[1][2])


@pytest.mark.changes_random_state
@pytest.mark.parametrize("task", ["collect", "simu"])
def test_other_work_is_timed_as_well(task: str, load: Callable[[str], ModuleType]) -> None:
    if not (data := FOLDER.parents[1] / "shared" / "data").is_dir():
        pytest.skip("the texts are not here")
    module = load("real_work")
    args = argparse.Namespace(model="demo", data=data, threads=1, repeats=1)
    assert module.alone(task, {"dtype": "float32", "kept": False, "batch": 8}, args) > 0


def test_evaluation_is_set_beside_plain_passes_condition_by_condition(
    load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = load("real")

    def child(task: dict[str, Any]) -> dict[str, Any]:
        if not task["repeats"]:
            return {"peak": 10.0 * task["conditions"][0]}
        times = {str(n): 2.0 * n + task["tuned"] for n in task["conditions"]}
        ratios = {n: seconds / int(n) / 2 for n, seconds in times.items()}
        return {"rows": task["batch"] or 4, "plain": 2.0, "seconds": times, "ratios": ratios}

    monkeypatch.setattr(real, "child", child)
    for more in ([], ["--memory"]):
        real.main(["--conditions", "1", "2", "7", "--dtypes", "bfloat16", *more])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert ["float32", "8", "as it is", "2.00", "2", "4.00", "1.00"] in rows
    assert ["bfloat16", "measured: 4", "kept", "2.00", "7", "15.00", "1.07"] in rows
    assert ["bfloat16", "7", "70 MB"] in rows


def test_what_grows_faster_than_linearly_is_said(
    load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    growth, timing, now = load("growth"), load("timing"), [0.0]

    def work(task: str, varied: str, times: int, base: object) -> Callable[[], None]:
        return lambda: now.__setitem__(0, now[0] + times ** (2 if varied == "layers" else 1))

    monkeypatch.setattr(timing.time, "process_time", lambda: now[0])
    monkeypatch.setattr(growth, "work", work)
    held = {size: [100.0, 200.0, 800.0 if size == "tokens" else 400.0] for size in growth.TASKS["collect"]}
    monkeypatch.setattr(growth, "memory", lambda task, base: held)
    growth.main(["--tiny", "--task", "collect"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [(row[1], *row[8:]) for row in rows] == [
        ("tokens", "1.00", "2.00", "no"),
        ("layers", "4.00", "1.00", "no"),
        ("vocabulary", "1.00", "1.00", "yes"),
        ("sites", "1.00", "1.00", "yes"),
    ]


def test_times_are_taken_in_turn_and_without_what_is_around(load: Callable[[str], ModuleType]) -> None:
    timing, order, now = load("timing"), [], [0.0]

    def takes(name: str, seconds: float) -> Callable[[], None]:
        return lambda: (order.append(name), now.__setitem__(0, now[0] + seconds))[0]

    @contextmanager
    def slow() -> Iterator[None]:
        now[0] += 100
        yield
        now[0] += 100

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.time, "process_time", lambda: now[0])
        patch.setattr(timing.time, "perf_counter", lambda: now[0])
        times = timing.interleaved({"a": takes("a", 2), "b": takes("b", 3)}, 2, inside={"b": slow})
    assert order == ["a", "b", "b", "a", "a", "b"]  # the first round warms up
    assert times == {"a": [2, 2], "b": [3, 3]}


def test_the_ratio_is_the_median_over_rounds(load: Callable[[str], ModuleType]) -> None:
    timing = load("timing")
    times = {"slow": [2.0, 30.0, 4.0, 6.0, 8.0], "plain": [1.0, 10.0, 1.0, 1.0, 1.0]}
    assert timing.ratio(times, "slow", "plain") == (4.0, 3.0, 6.0)


def test_what_is_printed_is_stored_with_its_command(
    load: Callable[[str], ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record_module, path = load("record"), tmp_path / "outputs" / "one.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/some.py"])
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--skill")
    typed = ["--skill", "a b", "--save", str(path)]
    args, record = record_module.begin(parser, typed)
    assert args.tokens == 8000
    record.about(queries=400)
    table = record.table("losses", ["skill", "lost"], [["code", '71.5% ["x"]']])
    table.row(["math", 3])
    with pytest.raises(ValueError, match="a row of 1 cells"):
        table.row(["math"])
    with pytest.raises(ValueError, match="has a table 'losses' already"):
        record.table("losses", ["skill"])
    assert not path.exists()
    record.end()
    lines = ["| skill | lost |", "| --- | --- |", '| code | 71.5% ["x"] |', "| math | 3 |"]
    assert "\n".join(lines) in capsys.readouterr().out
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["argv"] == ["python", "benchmarks/some.py", *typed]
    assert shlex.split(stored["command"]) == stored["argv"]
    assert stored["settings"] == {"tokens": 8000, "skill": "a b", "queries": 400}
    assert {"python", "torch", "transformer_lens", "lens_unlearn"} <= set(stored["versions"])
    rows = [["code", '71.5% ["x"]'], ["math", "3"]]
    assert stored["tables"] == {"losses": {"columns": ["skill", "lost"], "rows": rows}}
    assert '    ["math", "3"]\n' in path.read_text(encoding="utf-8")  # a row is a line


def test_a_measure_without_an_interval_is_printed_without(load: Callable[[str], ModuleType]) -> None:
    percent = load("record").percent
    for low, high, printed in ((0.1, 0.3, "21.4% [10.0%, 30.0%]"), (float("nan"), float("nan"), "21.4%")):
        assert percent(SimpleNamespace(value=0.2142, interval=lambda a=low, b=high: (a, b))) == printed


def paper_plans(load: Callable[[str], ModuleType]) -> tuple[ModuleType, ModuleType]:
    """Import the command line of the papers' plans, and their list."""
    return load("benchmarks.papers.__main__"), load("benchmarks.papers.plans")


def test_a_plan_that_was_interrupted_goes_on_with_the_cells_that_are_missing(
    load: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    main, plans = paper_plans(load)
    made = load("benchmarks.papers.plan")
    asked: list[str] = []

    def cells() -> Iterator[object]:
        for key in ("a", "b", "c"):

            def rows(key: str = key) -> Iterator[list[str]]:
                asked.append(key)
                yield ["first", key * 2]
                if len(asked) == 2:
                    raise KeyboardInterrupt  # in the middle of a cell
                yield ["second", key * 3]

            yield made.Cell((key,), rows)

    plan = made.Plan("one", "a figure", "a model", ("key", "which", "value"), cells)
    monkeypatch.setattr(plans, "PLANS", (plan,))
    path = tmp_path / "one.json"
    with pytest.raises(KeyboardInterrupt):
        main.main(["one", "--save", str(path)])
    assert asked == ["a", "b"]
    assert not path.exists()
    main.main(["one", "--save", str(path)])
    assert asked == ["a", "b", "b", "c"]
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["argv"][:3] == ["python", "-m", "benchmarks.papers"]
    assert stored["tables"]["rows"]["rows"] == [
        [key, which, key * times] for key in "abc" for which, times in (("first", 2), ("second", 3))
    ]
    assert not list(tmp_path.glob("*.unfinished"))
    main.main([])
    assert "one                  a figure [a model]" in capsys.readouterr().out


def test_each_plan_of_a_paper_is_listed_and_its_cells_have_keys_of_their_own(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    plans = paper_plans(load)[1].PLANS
    files = {path.stem for path in (FOLDER / "papers").glob("*.py")}
    assert {plan.name.replace("-", "_") for plan in plans} == files - {
        "__init__",
        "__main__",
        "plan",
        "plans",
        "models",
    }
    for plan in plans:
        keys = [cell.key for cell in plan.cells()]  # nothing is loaded or computed yet
        assert len(set(keys)) == len(keys) > 0
        assert all(len(key) < len(plan.columns) for key in keys)
