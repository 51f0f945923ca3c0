"""Effective skill unlearning: what is left of each skill is score / base score, by the formulas of the released code."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
from benchmark_helpers import (
    PLUS_TEST,
    effective_left,
    effective_scores,
    squad,
    write_effective,
    write_json,
    write_lines,
)
from interventions_helpers import selection_of, unchanged

import lens_unlearn as lu
from lens_unlearn.benchmarks.benchmark import Raw
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.evaluation.code_tests import passes_tests
from lens_unlearn.evaluation.generation import continue_rows
from lens_unlearn.interventions.ablate import Ablate

QUICK: dict[str, Any] = {"progress": False, "resamples": 20, "shots": 0, "max_new_tokens": 4, "language_tokens": 3}
RECORD = lu.benchmarks.by_name("effective-skill")
ALLOWED = {"allow_code_execution": True}


def test_every_score_is_that_of_the_released_code_on_the_texts(tmp_path: Path) -> None:
    """Texts as models that know some of it write them; programs are taken as run."""
    data = RECORD.data(write_effective(tmp_path, 8), None, {"shots": 2, "forget": "es", **ALLOWED})
    draw, raw, expected = random.Random(1), {}, {}
    for condition in ("base", "edited"):
        texts, rows = [], []
        for item in data.items:
            number = item.reference.split("####")[-1].strip()
            text = draw.choice(
                [
                    f" So it is {number}. The answer is {number}.\n\nQ: 3?\nA: The answer is 3.",
                    f"maybe {number}",
                    "",
                    "12",
                ]
                if item.task == "gsm8k"
                else [item.reference, f"a {item.reference}.", item.reference.upper(), "nothing"]
            )
            texts.append(text)
            rows.append({"task": item.task, "reference": item.reference, "text": text})
        passed = tuple(float(draw.random() < 0.6) for item in data.items if item.task == "mbpp")
        raw[condition] = [Raw(tuple(texts), (), {"mbpp_passed": passed})]
        expected[condition] = effective_scores(rows, passed)
    found = RECORD.score(data, raw, 20, 0).measures
    assert all(0 < value < 1 for value in expected["base"].values())
    assert len(set(expected["edited"].values())) > 2
    for condition, scores in expected.items():
        left = effective_left(scores, expected["base"], "language_es")
        for name, value in {**scores, **left}.items():
            assert found[condition, name].value == pytest.approx(value, abs=1e-9), (condition, name)
    assert found["base", "retain_left"].value == 1


def test_a_model_is_asked_as_published_and_left_as_it_was(model: Any, tmp_path: Path) -> None:
    prune = Ablate(selection_of(model, "mlp.post", 0.4))
    with unchanged(model):
        found = lu.benchmarks.effective_skill(
            model, write_effective(tmp_path, 4), {"pruned": prune}, rows=2, forget="mbpp", **ALLOWED, **QUICK
        )
    texts = found.generations[found.generations["condition"] == "base"]
    assert texts.groupby("task").size().to_dict() == {"gsm8k": 2, "mbpp": 2}
    prompt = texts.set_index("id")["prompt"]
    assert prompt["gsm8k-0"] == "Q: 500 foxes and 500?\nA:"
    assert prompt["mbpp-11"] == '"""\nWrite a function to add 0.\nassert add(1) == 1\n"""\n'
    assert set(texts[texts["split"] == "forget"]["task"]) == {"mbpp"}
    assert found.metrics[0] == "forget_left"
    assert any("language_en is left out: none of its prompts fits" in note for note in found.notes)
    assert math.isnan(found["pruned", "mbpp_left"].value)
    assert any("of mbpp nothing could be lost" in note for note in found.notes)
    assert any("every fourth paragraph" in note for note in found.notes)
    assert "top-p" in found.provenance["decoding"]
    assert set(found.losses["quantity"]) == {"mbpp_passed"}


def test_gsm8k_is_drawn_from_the_share_that_is_asked_for(model: Any) -> None:
    """With a tiny top-p only the most probable token is left, whatever the temperature; without, other texts are drawn."""
    ids = [model.tokenizer("the quick brown fox")["input_ids"]] * 2
    options: dict[str, Any] = {"max_new_tokens": 8}
    greedy = continue_rows(model, ids, **options)
    narrow = continue_rows(model, ids, temperature=5.0, top_p=1e-6, **options)
    assert [one.text for one in narrow] == [one.text for one in greedy]
    wide = continue_rows(model, ids, temperature=5.0, top_p=0.999, **options)
    assert wide[0].text != wide[1].text
    assert [one.text for one in continue_rows(model, ids, temperature=5.0, top_p=0.999, **options)] == [
        one.text for one in wide
    ]
    with pytest.raises(LensUnlearnError, match="top_p=0 is no share"):
        continue_rows(model, ids, temperature=1.0, top_p=0, **options)


def test_methods_are_fitted_to_what_is_not_asked(tmp_path: Path) -> None:
    data = RECORD.data(write_effective(tmp_path, 8), None, {"forget": "en", **ALLOWED})
    asked = {item.prompt for item in data.items}
    assert len(data.forget) == 4
    assert len(data.retain) == 8 + 8 + 4
    assert not asked & {row["question"] for row in data.forget}
    assert not {item.id for item in data.items} & {f"mbpp-{n}" for n in range(601, 700)}
    tasks = [row["question"] for row in data.retain if row["question"].startswith('"""')]
    assert len(tasks) == 8
    assert all("\r" not in row["answer"] for row in data.retain)
    for language in ("en", "es"):
        pair = f"context-{language}-question-{language}.json"
        write_json(tmp_path / "mlqa" / "test" / f"test-{pair}", squad(language, 8))
        write_json(tmp_path / "mlqa" / "dev" / f"dev-{pair}", squad(f"{language}, dev", 3))
    of_mlqa = RECORD.data(tmp_path, None, {"forget": "en", "languages": ("en", "es")})
    assert len(of_mlqa.forget) == 6
    assert sum(item.task == "language_en" for item in of_mlqa.items) == 16
    assert not any("set aside" in note for note in of_mlqa.notes)


def test_eight_worked_examples_stand_before_a_question(tmp_path: Path) -> None:
    data = RECORD.data(write_effective(tmp_path, 1), None, {})
    assert data.items[0].prompt.count("The answer is") == 8
    assert data.items[0].prompt.startswith("Q: There are 15 trees in the grove.")
    assert data.items[0].prompt.endswith("The answer is 8.\n\nQ: 500 foxes and 500?\nA:")
    assert any("MBPP is left out" in note for note in data.notes)
    assert {item.task for item in data.items} == {"gsm8k", "language_en", "language_es"}
    assert data.items[-1].prompt == (
        "Only output the exact phrase in the following context that best answers the question:\n\n"
        "Context: The red fox 0 jumps (es).\n\nquestion: Which fox 0, 1?\n\nanswer: \n"
    )


@pytest.mark.parametrize(
    ("code", "passes"), [("def add(x):\n    return x + 1", True), ("def add(x):\n    return x + 1.1", False)]
)
def test_the_tests_of_mbpp_plus_run_without_numpy(code: str, passes: bool, tmp_path: Path) -> None:
    row = {"task_id": "2", "prompt": "Add one.", "code": "", "test_list": ["assert add(1) == 2"], "test": PLUS_TEST}
    write_lines(tmp_path / "mbppplus" / "test.jsonl", [row])
    data = RECORD.data(tmp_path, None, ALLOWED)
    setup, tests = data.more["tests"]["mbpp-2"]
    assert passes_tests(code, tests, setup, allow_code_execution=True, seconds=60) is passes


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "shots": ({"shots": 9}, "shots=9"),
    "a language": ({"languages": "fr"}, "no language 'fr'"),
    "a language without a file": ({"languages": ("de",)}, "has no file of the language 'de'"),
    "a skill": ({"forget": "mbpp"}, "nothing here to measure 'mbpp' on: forget one of gsm8k, en, es"),
    "top-p": ({"top_p": 0.0}, "top_p=0.0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_said_without_a_model(what: str, tmp_path: Path) -> None:
    options, message = WRONG[what]
    with pytest.raises(LensUnlearnError, match=message):
        RECORD.data(write_effective(tmp_path, 1), None, options)


def test_files_of_another_layout_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"effective-skill needs gsm8k/test\.jsonl"):
        RECORD.data(tmp_path, None, {})
    write_effective(tmp_path, 1)
    write_json(tmp_path / "xquad" / "xquad.es.json", {"data": [{"paragraphs": [{"context": "a"}]}]})
    with pytest.raises(CorpusError, match="language_es is not in SQuAD's layout"):
        RECORD.data(tmp_path, None, {})
    write_lines(tmp_path / "gsm8k" / "test.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(CorpusError, match="no number behind '####'"):
        RECORD.data(tmp_path, None, {})
