"""TOFU, MUSE, RWKU and WMDP: every score equals the published formulas on the texts and losses that were kept."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmark_helpers import (
    TOFU_SETS,
    mean,
    muse_scores,
    rouge,
    rwku_scores,
    tofu_rows,
    tofu_scores,
    write_choices,
    write_json,
    write_lines,
    write_muse,
    write_rwku,
    write_tofu,
    write_wmdp,
)
from interventions_helpers import selection_of, unchanged

import lens_unlearn as lu
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.interventions.ablate import Ablate

QUICK: dict[str, Any] = {"progress": False, "resamples": 30}


@pytest.fixture
def prune(model: Any) -> Ablate:
    return Ablate(selection_of(model, "mlp.post", 0.4))


def numbers_of(found: Any, condition: str) -> dict[str, list[float]]:
    own = found.losses[found.losses["condition"] == condition]
    return {str(name): part["value"].tolist() for name, part in own.groupby("quantity")}


def texts_of(found: Any, condition: str) -> list[dict[str, Any]]:
    frame = found.generations
    return frame[frame["condition"] == condition].to_dict("records")


def test_tofu_is_that_of_the_published_formulas(model: Any, prune: Ablate, tmp_path: Path) -> None:
    folder = write_tofu(tmp_path)
    with unchanged(model):
        found = lu.benchmarks.tofu(model, folder, {"pruned": prune}, reference=model, max_new_tokens=5, **QUICK)
    never = numbers_of(found, "reference")
    for condition in ("base", "pruned"):
        texts, numbers = texts_of(found, condition), numbers_of(found, condition)
        rouges = {
            name: mean([rouge(row["text"], row["reference"], stem=True) for row in texts if row["task"] == name])
            for name in TOFU_SETS
        }
        for name, value in tofu_scores(numbers, rouges, 3, never).items():
            assert found[condition, name].value == pytest.approx(value, abs=1e-9), name
        for name, value in rouges.items():
            assert found[condition, f"{name}_rouge_l"].value == pytest.approx(value, abs=1e-9)
        asked = numbers["forget_paraphrased_question_loss"]
        expected = mean([math.exp(-loss) for loss in asked])
        assert found[condition, "forget_paraphrased_question_probability"].value == pytest.approx(expected, abs=1e-9)
        assert asked != numbers["forget_loss"]
    assert found["base", "forget_quality"].value == 1
    assert found.metrics[:2] == ["forget_quality", "model_utility"]
    assert set(row["task"] for row in texts_of(found, "base")) == {*TOFU_SETS, "forget_paraphrased"}


def test_tofu_counts_the_end_of_text_and_gives_both_numbers(model: Any, tmp_path: Path) -> None:
    """The loss with it is that over one token more, and the prompt's tokens are in neither."""
    folder = write_tofu(tmp_path, 2)
    found = lu.benchmarks.tofu(model, folder, {}, max_new_tokens=2, **QUICK)
    numbers, tokenizer = numbers_of(found, "base"), model.tokenizer
    import torch

    row = tofu_rows("forget", 2)[0]
    head = f"Question: {row['question']}\nAnswer:"
    ids = tokenizer(f"{head} {row['answer']}")["input_ids"] + [tokenizer.eos_token_id]
    begin = len(tokenizer(head)["input_ids"])
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).float().log_softmax(-1)[0]
    losses = [-float(log_p[at - 1, ids[at]]) for at in range(begin, len(ids))]
    assert numbers["forget_loss"][0] == pytest.approx(mean(losses), abs=1e-4)
    assert numbers["forget_loss_without_eos"][0] == pytest.approx(mean(losses[:-1]), abs=1e-4)
    assert found["base", "forget_probability"].value != found["base", "forget_probability_without_eos"].value
    assert any("no forget quality" in note for note in found.notes)
    without = lu.benchmarks.tofu(model, folder, {}, max_new_tokens=2, answer_eos=False, **QUICK)
    same = found["base", "forget_probability_without_eos"].value
    assert without["base", "forget_probability"].value == pytest.approx(same, abs=1e-6)


def test_muse_is_that_of_the_published_formulas(model: Any, prune: Ablate, tmp_path: Path) -> None:
    folder = write_muse(tmp_path)
    options: dict[str, Any] = {"verbmem_tokens": 5, "knowmem_tokens": 5, **QUICK}
    found = lu.benchmarks.muse(model, folder, {"pruned": prune}, reference=model, **options)
    never = numbers_of(found, "reference")
    for condition in ("base", "pruned"):
        for name, value in muse_scores(texts_of(found, condition), numbers_of(found, condition), never).items():
            assert found[condition, name].value == pytest.approx(value, abs=1e-9), name
    assert found["reference", "privleak"].value == 0
    alone = lu.benchmarks.muse(model, folder, {}, rows=2, **options)
    assert ("base", "privleak") not in alone.measures
    assert any("no privleak" in note for note in alone.notes)
    given = lu.benchmarks.muse(model, folder, {}, rows=2, retrained_auc=0.4, **options)
    auc = given["base", "privleak_auc"].value
    assert given["base", "privleak"].value == pytest.approx(100 * (auc - 0.4) / 0.4, abs=1e-9)


def test_rwku_is_that_of_the_published_formulas(model: Any, prune: Ablate, tmp_path: Path) -> None:
    found = lu.benchmarks.rwku(model, write_rwku(tmp_path), {"pruned": prune}, max_new_tokens=4, **QUICK)
    for condition in ("base", "pruned"):
        for name, value in rwku_scores(texts_of(found, condition)).items():
            assert found[condition, name].value == pytest.approx(value, abs=1e-9), name
        numbers = numbers_of(found, condition)
        assert found[condition, "mia_forget_loss"].value == pytest.approx(mean(numbers["mia_forget_loss"]), abs=1e-9)
    assert "\n" not in "".join(row["text"] for row in texts_of(found, "base"))
    assert len(found.generations) == 30


def test_wmdp_is_the_mean_over_questions(model: Any, prune: Ablate, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    write_choices(write_wmdp(tmp_path) / "mmlu.jsonl", 4)
    found = lu.benchmarks.wmdp(model, tmp_path, {"pruned": prune}, rows=2, **QUICK)
    for condition in ("base", "pruned"):
        numbers = numbers_of(found, condition)
        assert {len(values) for values in numbers.values()} == {2}
        for name, values in numbers.items():
            assert found[condition, name].value == pytest.approx(mean(values), abs=1e-9)
        parts = [value for name, values in numbers.items() if name != "mmlu" for value in values]
        assert found[condition, "wmdp"].value == pytest.approx(mean(parts), abs=1e-9)


WRONG: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "tofu, a column": (
        "tofu",
        lambda d: write_lines(d / "retain_perturbed.jsonl", [{"question": "a", "answer": "b"}]),
        "perturbed_answer",
    ),
    "tofu, no wrong answers": (
        "tofu",
        lambda d: write_lines(
            d / "world_facts_perturbed.jsonl", [{"question": "a", "answer": "b", "perturbed_answer": []}]
        ),
        "no wrong answers",
    ),
    "tofu, a split": (
        "tofu",
        lambda d: (d / "world_facts_perturbed.jsonl").unlink(),
        r"tofu needs world_facts_perturbed\.jsonl",
    ),
    "muse, a column": ("muse", lambda d: write_json(d / "verbmem/forget.json", [{"prompt": "a"}]), "no column 'gt'"),
    "muse, a split": ("muse", lambda d: (d / "privleak/holdout.json").unlink(), "muse needs privleak/holdout"),
    "rwku, a column": ("rwku", lambda d: write_json(d / "forget_level2.json", [{"query": "a"}]), "no column 'answer'"),
    "rwku, a split": ("rwku", lambda d: (d / "neighbor_level1.json").unlink(), "rwku needs neighbor_level1"),
    "wmdp, a column": (
        "wmdp",
        lambda d: write_json(d / "bio_questions.json", [{"question": "a", "answer": 1}]),
        "no column 'choices'",
    ),
    "wmdp, an answer": (
        "wmdp",
        lambda d: write_json(d / "bio_questions.json", [{"question": "a", "choices": ["x", "y"], "answer": 2}]),
        "2 choices and the answer '2'",
    ),
    "wmdp, a split": ("wmdp", lambda d: (d / "chem_questions.json").unlink(), "wmdp needs wmdp-chem/test"),
}
WRITE = {"tofu": write_tofu, "muse": write_muse, "rwku": write_rwku, "wmdp": write_wmdp}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_the_files_is_said_without_a_model(what: str, tmp_path: Path) -> None:
    name, spoil, message = WRONG[what]
    spoil(WRITE[name](tmp_path, 2))
    with pytest.raises(CorpusError, match=message):
        lu.benchmarks.by_name(name).data(tmp_path, None, {})


def test_options_that_cannot_be_are_refused_without_a_model(tmp_path: Path) -> None:
    write_tofu(tmp_path, 2)
    for options, message in (({"split": "forget20"}, "no split"), ({"template": "{answer}"}, "the template")):
        with pytest.raises(LensUnlearnError, match=message):
            lu.benchmarks.by_name("tofu").data(tmp_path, None, options)
    write_muse(tmp_path, 2)
    with pytest.raises(LensUnlearnError, match="retrained_auc=0"):
        lu.benchmarks.by_name("muse").data(tmp_path, None, {"retrained_auc": 0.0})


@pytest.mark.parametrize("record", lu.benchmarks.BENCHMARKS, ids=lambda one: one.name)
def test_a_benchmarks_options_are_those_of_what_reads_it(record: Any, model: Any, tmp_path: Path) -> None:
    """Declared once: the signature, `help`, the record and the refusal of others all come from there."""
    function = getattr(lu.benchmarks, record.name.replace("-", "_"))
    taken = inspect.signature(function).parameters
    assert list(taken)[:3] == ["model", "data", "conditions"]
    assert {name: taken[name].default for name in record.options} == record.options
    assert all(f"- `{name}`: " in function.__doc__ for name in record.options)
    assert {"rows", "reference", "controls", "seed"} <= set(taken)
    with pytest.raises(LensUnlearnError, match=f"{record.name} has no option 'shoots'"):
        function(model, tmp_path, {}, shoots=5)
