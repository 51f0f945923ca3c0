"""LUME: twelve parts and three aggregates equal the published formulas, from files in the public layout to the page."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
from benchmark_helpers import area, lume_scores, write_choices, write_lines, write_lume
from interventions_helpers import selection_of, unchanged

import lens_unlearn as lu
from lens_unlearn.benchmarks.benchmark import Item, Raw
from lens_unlearn.benchmarks.lume import score_of
from lens_unlearn.core.errors import CorpusError, LensUnlearnError, ModelError
from lens_unlearn.interventions.ablate import Ablate

QUICK: dict[str, Any] = {"progress": False, "resamples": 30, "max_new_tokens": 6}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_lume(tmp_path / "lume")


@pytest.fixture
def prune(model: Any) -> Ablate:
    return Ablate(selection_of(model, "mlp.post", 0.3))


def test_every_score_is_that_of_the_published_formulas_on_the_texts(model: Any, folder: Path, prune: Ablate) -> None:
    with unchanged(model):
        found = lu.benchmarks.lume(model, folder, {"pruned": prune}, **QUICK)
    frame = found.to_frame()
    assert list(frame.columns) == ["condition", "metric", "value", "low", "high", "n"]
    assert list(found.generations.columns) == ["condition", "id", "task", "split", "prompt", "reference", "text"]
    assert len(found.generations) == 2 * 2 * 27
    for condition in ("base", "pruned"):
        texts = found.generations[found.generations["condition"] == condition].to_dict("records")
        for name, value in lume_scores(texts).items():
            assert found[condition, name].value == pytest.approx(value, abs=1e-9), name
        own = found.losses[found.losses["condition"] == condition]["value"].tolist()
        auc = area(own[:27], own[27:])
        assert found[condition, "mia_auc"].value == pytest.approx(auc, abs=1e-9)
        assert found[condition, "mia_score"].value == pytest.approx(1 - 2 * abs(auc - 0.5), abs=1e-9)
    assert ("base", "final") not in found.measures
    assert any("no MMLU" in note for note in found.notes)


def test_the_formulas_hold_where_texts_are_right_in_part(tmp_path: Path) -> None:
    """Texts as a model that knows some of it would write them: every part has a value of its own, so none can stand for another."""
    record = next(one for one in lu.benchmarks.BENCHMARKS if one.name == "lume")
    data = record.data(write_lume(tmp_path, 4), None, {})
    texts, rows, draw = [], [], random.Random(3)
    for item in data.items:
        known = " ".join(draw.sample(item.reference.split(), draw.randint(1, len(item.reference.split()))))
        text = draw.choice([item.reference, f" {item.reference.upper()}\n", "nothing", known])
        texts.append(text)
        rows.append({"id": item.id, "task": item.task, "split": item.split, "reference": item.reference, "text": text})
    raw = {"base": [Raw(tuple(texts), (), {"output_loss": tuple(float(i % 5) for i in range(len(texts)))})]}
    scores = record.score(data, raw, 20, 0).measures
    expected = lume_scores(rows)
    assert len({round(value, 6) for value in expected.values()}) > 4
    for name, value in expected.items():
        assert scores["base", name].value == pytest.approx(value, abs=1e-9), name


def test_mmlu_and_the_challenges_attack_are_read_from_their_files(model: Any, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    write_choices(folder / "mmlu.jsonl")
    for side, word in (("member", "fox"), ("nonmember", "dog")):
        write_lines(
            folder / "mia_data" / f"{side}.jsonl", [{"id": n, "document": f"the {word} {n} jumps"} for n in range(5)]
        )
    found = lu.benchmarks.lume(model, folder, {}, rows=1, **QUICK)
    own = {name: part["value"].tolist() for name, part in found.losses.groupby("quantity")}
    assert found["base", "mia_auc"].value == pytest.approx(area(own["member_loss"], own["nonmember_loss"]), abs=1e-9)
    assert found.metrics[:4] == ["final", "task_aggregate", "mia_score", "mmlu"]
    three = [found["base", name].value for name in ("task_aggregate", "mia_score", "mmlu")]
    assert found["base", "final"].value == pytest.approx(sum(three) / 3, abs=1e-9)
    assert len(own["mmlu"]) == 1
    assert len(found.generations) == 12
    floored = lu.benchmarks.lume(model, folder, {}, rows=1, mmlu_floor=1.01, **QUICK)
    assert floored["base", "final"].value == 0


def test_a_reference_and_controls_are_conditions(model: Any, folder: Path, prune: Ablate, tmp_path: Path) -> None:
    found = lu.benchmarks.lume(model, folder, {"pruned": prune}, rows=1, reference=model, controls=2, **QUICK)
    assert found.conditions == ["base", "pruned", "pruned:control", "reference"]
    assert found["reference", "task1_retain_regurgitation"].value == found["base", "task1_retain_regurgitation"].value
    assert len(found.raw["pruned:control"]) == 2
    assert "task_aggregate" in found._repr_html_()
    found.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.index("task_aggregate") < page.index("task1_forget_knowledge")
    assert "pruned:control" in page


WRONG = {
    "forget.jsonl, row 1, has no column 'output'": ("forget.jsonl", [{"id": "1sc1", "input": "a", "task": "Task1"}]),
    "has the task 'Task9'": ("forget.jsonl", [{"id": "1sc1", "input": "a", "output": "b", "task": "Task9"}]),
    "ends neither in sc": ("retain.jsonl", [{"id": "1", "input": "a", "output": "b", "task": "Task1"}]),
    "the column 'input' is empty": ("retain.jsonl", [{"id": "1qa0", "input": " ", "output": "b", "task": "Task1"}]),
    "forget has no knowledge row of task1": (
        "forget.jsonl",
        [{"id": "1sc1", "input": "a", "output": "b", "task": "Task1"}],
    ),
    "retain.jsonl is empty": ("retain.jsonl", []),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_with_the_files_is_said_in_one_sentence(model: Any, folder: Path, message: str) -> None:
    name, rows = WRONG[message]
    write_lines(folder / name, rows)
    with pytest.raises(CorpusError, match=message.replace("[", r"\[")):
        lu.benchmarks.lume(model, folder, {}, **QUICK)


def test_what_cannot_be_is_refused(model: Any, folder: Path, prune: Ablate) -> None:
    (folder / "retain.jsonl").unlink()
    with pytest.raises(CorpusError, match=r"lume needs retain\.jsonl"):
        lu.benchmarks.lume(model, folder, {}, **QUICK)
    with pytest.raises(CorpusError, match="there is no folder"):
        lu.benchmarks.lume(model, folder / "nowhere", {}, **QUICK)
    write_lume(folder)
    with pytest.raises(LensUnlearnError, match="give the intervention another name"):
        lu.benchmarks.lume(model, folder, {"reference": prune}, **QUICK)
    with pytest.raises(ModelError, match="there is no reference model"):
        lu.benchmarks.lume(model, folder, {}, reference="/nowhere/at/all", **QUICK)
    with pytest.raises(LensUnlearnError, match="rows=0"):
        lu.benchmarks.lume(model, folder, {}, rows=0, **QUICK)


def test_files_may_be_tables_by_columns_and_parquet(folder: Path, tmp_path: Path) -> None:
    """As the challenge's own instructions write them: `DataFrame.to_json`, without arguments, under the name of lines."""
    import pandas as pd

    record = lu.benchmarks.by_name("lume")
    expected = record.data(folder, None, {}).items
    for split in ("forget", "retain"):
        frame = pd.read_json(folder / f"{split}.jsonl", lines=True)
        (tmp_path / "columns").mkdir(exist_ok=True)
        (tmp_path / "parquet" / "data").mkdir(parents=True, exist_ok=True)
        frame.to_json(tmp_path / "columns" / f"{split}.jsonl")
        frame.to_parquet(tmp_path / "parquet" / "data" / f"{split}_train-00000-of-00001.parquet")
    assert record.data(tmp_path / "columns", None, {}).items == expected
    assert record.data(tmp_path / "parquet", None, {}).items == expected


def test_prompts_that_do_not_fit_are_left_out_and_said(model: Any, folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "forget.jsonl").read_text().splitlines()]
    rows[0]["input"] = "the fox jumps over the lazy dog " * tiny.CONTEXT
    write_lines(folder / "forget.jsonl", rows)
    found = lu.benchmarks.lume(model, folder, {}, **QUICK)
    assert len(found.generations) == 53
    assert found["base", "task1_forget_regurgitation"].n == 2
    assert any("left out: 1 prompts" in note for note in found.notes)


def test_one_continuation_scores_as_the_released_code_has_it() -> None:
    assert score_of(Item('"a"sc1', "task1", "forget", "x", "the cats sat", "u"), "a cat") == pytest.approx(1 / 3)
    assert score_of(Item("aqa12", "task1", "forget", "x", "Blue", "u"), " bLUE\n") == 1
    assert score_of(Item("aqa12", "task1", "forget", "x", "Blue", "u"), "blue.") == 0
