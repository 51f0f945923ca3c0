"""What makes numbers of public code wrong or not comparable, one test each: ours would fail it if it did the same."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_helpers import area, mean, write_choices, write_lume, write_rwku
from chat_helpers import FAMILIES, OTHERS, chatting
from interventions_helpers import selection_of

import lens_unlearn as lu
from lens_unlearn.benchmarks import asking
from lens_unlearn.benchmarks.asking import Asker
from lens_unlearn.benchmarks.benchmark import Item
from lens_unlearn.benchmarks.lume import score_of
from lens_unlearn.evaluation.answer_matching import rouge_l
from lens_unlearn.interventions.ablate import Ablate

PROMPTS = ["the quick", "the quick brown fox jumps over the lazy dog", "a small village stood beside", "def add(a, b):"]


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """One token at a time, each by a plain forward pass over everything before it."""
    with torch.no_grad():
        for _ in range(count):
            ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    return ids


def test_the_end_of_text_token_is_counted_where_it_is_asked_for_only(model: Any) -> None:
    """One more token of the answer, and nothing else changes."""
    asker, pairs = Asker(model), [("the quick", " brown fox"), ("a small", " village")]
    without, counted = asker.answers(pairs), asker.answers(pairs, end=True)
    for one, other in zip(without, counted, strict=True):
        assert one is not None
        assert other is not None
        assert len(other["loss"]) == len(one["loss"]) + 1
        assert other["loss"][:-1] == pytest.approx(one["loss"], abs=1e-5)


@pytest.mark.parametrize("prompt", ["the", "the quick brown fox jumps over the lazy dog and"])
def test_the_tokens_of_the_prompt_are_not_part_of_the_answers_loss(model: Any, prompt: str) -> None:
    answer = " small village"
    (found,) = Asker(model).answers([(prompt, answer)])
    head, whole = (model.tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
    with torch.no_grad():
        log_p = model(torch.tensor([whole])).float().log_softmax(-1)[0]
    expected = [-float(log_p[at - 1, whole[at]]) for at in range(len(head), len(whole))]
    assert found is not None
    assert found["loss"] == pytest.approx(expected, abs=1e-4)


def test_prompts_of_several_lengths_do_not_shift_each_others_positions(model: Any) -> None:
    """Positions of the model are absolute: padded on the left, it would read, and write, something else."""
    texts = Asker(model, batch_size=4).write(PROMPTS, 8).texts
    rows = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    for row, text in zip(rows, texts, strict=True):
        assert text == model.tokenizer.decode(greedy(model, row, 8)[len(row) :], skip_special_tokens=True)
    padded = [2] * (max(map(len, rows)) - len(rows[0])) + rows[0]
    with torch.no_grad():
        own, shifted = (model(torch.tensor([row]))[0, -1] for row in (rows[0], padded))
    assert not torch.allclose(own, shifted, atol=1e-3), "this model would not show it"


@pytest.mark.parametrize("name", [name for name, one in {**FAMILIES, **OTHERS}.items() if one.bos])
def test_bos_stands_once_before_a_chat_and_before_a_text(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = chatting(name), []
    inner = asking.continue_rows
    monkeypatch.setattr(
        asking, "continue_rows", lambda m, rows, *a, **o: (given.extend(rows), inner(m, rows, *a, **o))[1]
    )
    folder = write_rwku(tmp_path, 1)
    for chat in (True, False):
        lu.benchmarks.rwku(model, folder, {}, chat=chat, max_new_tokens=1, resamples=10, progress=False)
    Asker(model).write(["<bos>the quick"], 1)
    assert len(given) == 11
    assert {row.count(0) for row in given} == {1}
    assert {row[0] for row in given} == {0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("巴黎是法国的首都", 8),
        ("Париж — столица Франции", 3),
        ("القاهرة عاصمة مصر", 3),
        ("नई दिल्ली राजधानी", 3),
        ("Đà Nẵng ở đâu", 4),
    ],
)
def test_rouge_reads_words_of_every_script(text: str, words: int) -> None:
    """The tokenizer of `rouge_score` finds no word in most of these, and so 0 for the true answer itself."""
    item = Item("asc1", "task1", "forget", "x", text, "u")
    assert score_of(item, text) == 1
    assert score_of(item, text.split()[0] if " " in text else text[:1]) == pytest.approx(1 / words)
    assert rouge_l("nothing of it", text) == (0, 0)


@pytest.mark.parametrize("first", [True, False])
def test_options_that_score_equally_are_not_right_for_standing_first(model: Any, first: bool, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

    class Silent(Ablate):
        looks_at_rows = True

        def finish(self, logits: Any, live: Any) -> Any:
            return torch.zeros_like(logits)

    rows = [json.loads(line) for line in write_choices(tmp_path / "c.jsonl", 4).read_text().splitlines()]
    folder = write_lume(tmp_path / "lume", 1)
    lines = [json.dumps({**row, "answer": 0 if first else 3}) + "\n" for row in rows]
    (folder / "mmlu.jsonl").write_text("".join(lines))
    silent = Silent(selection_of(model, "mlp.post", 0.2))
    found = lu.benchmarks.lume(model, folder, {"silent": silent}, max_new_tokens=1, resamples=10, progress=False)
    assert found["silent", "mmlu"].value == 0.25


def test_losses_that_are_equal_are_ties_of_an_attack() -> None:
    """Where a model says the same of everything, an attack that sorts would tell members by their place."""
    from lens_unlearn.benchmarks.scoring import areas

    draw = random.Random(0)
    inside, outside = ([draw.choice([1.0, 2.0]) for _ in range(9)] for _ in range(2))
    units = tuple([f"{side} {n}" for n in range(9)] for side in "ab")
    assert areas({"base": [[1.0] * 9]}, {"base": [[1.0] * 9]}, units, 10, 0)["base"].value == 0.5
    found = areas({"base": [inside]}, {"base": [outside]}, units, 10, 0)["base"].value
    assert found == pytest.approx(area(inside, outside), abs=1e-12)


SHIPPED = {"do_sample": True, "temperature": 3.0, "top_k": 1, "top_p": 0.2, "repetition_penalty": 9.0, "max_length": 5}


def test_a_generation_config_that_the_model_ships_is_not_on(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are greedy, or sampled as the benchmark says, whatever transformers' own `generate` would do."""
    asker = Asker(model, seed=3)
    sampling: dict[str, Any] = {"temperature": 2.0, "top_p": 0.99}
    plain, sampled = asker.write(PROMPTS, 8).texts, asker.write(PROMPTS, 8, **sampling).texts
    assert plain != sampled
    inner = model.original_model
    ids = torch.tensor([model.tokenizer(PROMPTS[1])["input_ids"]])
    asked: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    before = inner.generate(ids, **asked).tolist()
    for name, value in SHIPPED.items():
        monkeypatch.setattr(inner.generation_config, name, value)
    assert asker.write(PROMPTS, 8).texts == plain
    assert asker.write(PROMPTS, 8, **sampling).texts == sampled
    assert inner.generate(ids, **asked).tolist() != before, "this configuration would not show it"


def test_an_answer_that_does_not_fit_is_left_out_and_not_cut(model: Any) -> None:
    """A truncated answer would have another loss, over fewer tokens."""
    long = "the fox jumps over the lazy dog " * 20
    found = Asker(model).answers([("the quick", long), ("the quick", " fox")])
    assert found[0] is None
    assert found[1] is not None
    assert mean(found[1]["loss"].tolist()) > 0
