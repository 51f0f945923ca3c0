"""Each attack against an oracle that uses nothing of the package: plain models, scikit-learn by hand, plain training loops."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from audit_helpers import FORGET, LAYERS, TEMPLATE, grouped, rows, suppressor, world
from interventions_helpers import unchanged
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_layers import log_p, rows_of, streams
from torch import Tensor

import lens_unlearn as lu
from lens_unlearn.audit import direction, relearning
from lens_unlearn.audit.attack import Attack
from lens_unlearn.audit.quantization import rounded
from lens_unlearn.evaluation.answer_losses import rows_at
from lens_unlearn.interventions.base import Chain

QUICK: dict[str, Any] = {"progress": False, "resamples": 50, "controls": False}
SHORT = replace(relearning.ATTACK, run=partial(relearning.relearning, steps=(0, 4)))
"""Relearning, as short as it can be."""
OTHERS: tuple[str | Attack, ...] = ("probe", "prompts", "quantization", SHORT, "direction", "membership")


@pytest.fixture(scope="module")
def found() -> lu.Audit:
    w = world()
    with unchanged(w.model), unchanged(w.never_saw):
        conditions = {"half": w.gone.at(0.5), "gone": w.gone, "hidden": suppressor(), "nothing": Chain(())}
        sources = {"reference": w.never_saw, "unseen": w.unseen}
        return lu.audit(w.model, w.facts, conditions, attacks=OTHERS, **sources, **QUICK)


@pytest.fixture(scope="module")
def halfway() -> Any:
    made, twin = copy.deepcopy(world().plain), dict(world().plain_never_saw.named_parameters())
    for name, parameter in made.named_parameters():
        parameter.data.lerp_(twin[name].data, 0.5)
    return made


def probability(plain: Any, tokens: Tensor, begin: int) -> float:
    return float(log_p(plain(tokens[None]).logits, tokens, begin).mean().exp())


# --- planted cases ---------------------------------------------------------------------------------------------------------


CATCHES_WHAT_HIDES = ("probe", "relearning", "direction", "membership")
"""Of these attacks; depth and logit lens do so too."""


@pytest.mark.parametrize("attack", ["probe", "prompts", "quantization", "relearning", "direction", "membership"])
def test_planted_cases_come_out_as_planted(found: lu.Audit, attack: str) -> None:
    share = {name: found[name, attack, "recovered"].value for name in found.conditions}
    assert share["base"] == pytest.approx(1)
    assert share["nothing"] == pytest.approx(1)
    assert share["reference"] == pytest.approx(0)
    assert share["gone"] == pytest.approx(0, abs=0.02)
    assert (share["hidden"] > 0.9) == (attack in CATCHES_WHAT_HIDES), share
    if attack not in CATCHES_WHAT_HIDES:
        assert share["hidden"] < 0.1


def test_an_identity_is_the_base_in_every_number(found: lu.Audit) -> None:
    for condition, attack, metric in found.measures:
        if condition == "nothing":
            same = found["base", attack, metric]
            np.testing.assert_allclose(found[condition, attack, metric].draws, same.draws, atol=1e-9)


def test_curves_of_steps_and_layers_are_drawn(found: lu.Audit) -> None:
    assert found.left_out == {}
    for attack in ("probe", "relearning", "direction"):
        assert lu.plot.recoverability(found, attack).data
    assert len(found.figures) == 4


# --- oracles ---------------------------------------------------------------------------------------------------------------


def test_the_probe_is_scikit_learn_by_hand(found: lu.Audit, halfway: Any) -> None:
    w = world()
    classes = np.array([int(tokens[begin]) for tokens, begin in rows_of(w.facts)])
    folds = list(GroupKFold(5).split(classes[:, None], classes, w.facts.keys))
    for name, plain in {"base": w.plain, "half": halfway, "reference": w.plain_never_saw}.items():
        for layer in range(LAYERS):
            x = np.stack([streams(plain, tokens)[layer][0, begin - 1].numpy() for tokens, begin in rows_of(w.facts)])
            right = 0
            for train, test in folds:
                probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x[train], classes[train])
                right += int((probe.predict(x[test]) == classes[test]).sum())
            assert found[name, "probe", f"accuracy@{layer}"].value == pytest.approx(right / len(classes)), (name, layer)


def test_no_subject_stands_on_both_sides_of_a_probe_and_labels_can_be_given() -> None:
    w = world()
    labels = [row["person"] for row in FORGET]  # of which no other fold knows any
    made = lu.audit(w.model, grouped(w.facts), {}, attacks=("probe",), labels=labels, **QUICK)
    assert "too few to cross-validate" in made.left_out["probe"]
    parity = [int(row["question"][-1] == "x") for row in FORGET]
    made = lu.audit(w.model, grouped(w.facts), {}, attacks=("probe",), labels=parity, **QUICK)
    assert made["base", "probe", "score"].value > 0.7  # whether the question ends with an x
    assert made["base", "probe", "score"].units == 16


def four_bits(weight: Tensor) -> Tensor:
    """Round a matrix [in, out] by hand: each output's inputs in runs of 64."""
    made = weight.clone()
    for output in range(weight.shape[1]):
        for start in range(0, weight.shape[0], 64):
            run = weight[start : start + 64, output]
            low, high = float(run.min()), float(run.max())
            step = (high - low) / 15
            made[start : start + 64, output] = torch.tensor([low + round((float(x) - low) / step) * step for x in run])
    return made


def test_four_bits_are_those_of_a_copy_that_was_rounded_by_hand(found: lu.Audit, halfway: Any) -> None:
    copied = copy.deepcopy(halfway)
    for name, parameter in copied.named_parameters():
        if parameter.ndim == 2 and ".h." in name:
            parameter.data.copy_(four_bits(parameter.data))
    expected = np.mean([probability(copied, *row) for row in rows_of(world().facts)])
    assert found["half", "quantization", "int4"].value == pytest.approx(expected, abs=1e-6)
    assert found["half", "quantization", "score"].value == found["half", "quantization", "int4"].value
    assert "hidden is no change of weights" in " ".join(found.notes["quantization"])


def test_rounding_keeps_both_ends_and_what_is_constant_and_cuts_the_rest_short() -> None:
    weights = torch.randn(
        50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )  # 150: two runs and a rest
    made = rounded(weights, 4)
    flat, runs = weights.t().reshape(-1), made.t().reshape(-1)
    for start in (0, 64, 128):
        own, got = flat[start : start + 64], runs[start : start + 64]
        assert len(got.unique()) <= 16
        assert (float(got.min()), float(got.max())) == pytest.approx((float(own.min()), float(own.max())))
        assert float((own - got).abs().max()) <= float(own.max() - own.min()) / 30 + 1e-12
    assert torch.equal(rounded(torch.full((8, 8), 0.3), 4), torch.full((8, 8), 0.3))


@pytest.mark.changes_random_state
def test_relearning_is_a_plain_training_loop_on_an_edited_copy(found: lu.Audit, halfway: Any) -> None:
    w, copied = world(), copy.deepcopy(halfway)
    units = list(dict.fromkeys(w.facts.units))
    others = w.facts.only([i for i, unit in enumerate(w.facts.units) if unit in set(units[::2])])
    tested = w.facts.only([i for i, unit in enumerate(w.facts.units) if unit not in set(units[::2])])
    trained = [p.requires_grad_() for name, p in copied.named_parameters() if p.ndim == 2 and ".h." in name]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    with torch.enable_grad():
        for step in range(4):
            batch = rows_at(others, step, 8, 0)
            logits = copied(batch.tokens).logits[:, :-1]
            where = batch.counted[:, 1:]
            loss = torch.nn.functional.cross_entropy(logits[where], batch.tokens[:, 1:][where])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    right, count = 0, 0
    with torch.no_grad():
        for tokens, begin in rows_of(tested):
            seen = copied(tokens[None]).logits[0, begin - 1 : -1].argmax(-1) == tokens[begin:]
            right, count = right + int(seen.sum()), count + len(seen)
    assert found["half", "relearning", "other@4"].value == pytest.approx(right / count, abs=1e-6)
    assert found["half", "relearning", "score"].value == found["half", "relearning", "other@4"].value


def test_one_direction_undoes_what_one_direction_did() -> None:
    w = world()
    generator = torch.Generator().manual_seed(0)
    away = direction._Push(6 * torch.randn(64, generator=generator, dtype=torch.float64), 1)
    made = lu.audit(w.model, w.facts, {"away": away}, reference=w.never_saw, attacks=("direction", "depth"), **QUICK)
    assert made.answers["away"].value < 0.6
    assert made["away", "direction", "pushed@1"].value == pytest.approx(made.answers["base"].value, abs=1e-6)
    assert made["away", "direction", "recovered"].value > 0.98
    assert "away at layer 1" in made.notes["direction"][0]


def test_what_is_made_impossible_gives_no_nan() -> None:
    w = world()
    made = lu.audit(
        w.model, w.facts, {"never": suppressor(float("inf"))}, reference=w.never_saw, attacks=("direction",), **QUICK
    )
    assert made["never", "direction", "score"].value == 0


def test_membership_is_that_of_the_function(found: lu.Audit) -> None:
    w = world()
    own = lu.membership(w.model, w.facts, w.unseen, {"half": w.gone.at(0.5)}, progress=False, resamples=50)
    for name in ("base", "half"):
        assert found[name, "membership", "mia_loss"].value == own[name, "forget", "mia_loss"].value
        assert found[name, "membership", "score"].value == own[name, "forget", "mia_min_k"].value


def asked(text: str, answer: str) -> tuple[Tensor, int]:
    tokenizer = world().model.tokenizer
    return torch.tensor(tokenizer(text + answer).input_ids), len(tokenizer(text).input_ids)


def texts_of() -> Iterator[dict[str, tuple[str, str]]]:
    """Every fact in every way, put together by hand."""
    for i, row in enumerate(FORGET):
        shown = [FORGET[(i + step) % len(FORGET)] for step in (1, 2)]
        question, answer = row["question"], row["answer"]
        yield {
            "plain": (f"{question}=", answer),
            "template_1": (f"I would like to know the following. {question}=", answer),
            "template_2": (f"{question} Please answer in one sentence.=", answer),
            "few_shot": ("".join(f"{s['question']}={s['answer']}\n" for s in shown) + f"{question}=", answer),
            "second_turn": (f"{question}=I do not know.\nAre you sure? {question}=", answer),
        }


def test_every_way_of_asking_is_the_text_put_together_by_hand(found: lu.Audit, halfway: Any) -> None:
    values: dict[str, list[float]] = {}
    for ways in texts_of():
        for name, (text, answer) in ways.items():
            values.setdefault(name, []).append(probability(halfway, *asked(text, answer)))
    for name, own in values.items():
        assert found["half", "prompts", name].value == pytest.approx(np.mean(own), abs=1e-6), name
    worst = np.max([*values.values()], axis=0)
    assert found["half", "prompts", "score"].value >= worst.mean() - 1e-9


def test_paraphrases_and_beginnings_are_asked_where_there_are_any() -> None:
    w = world()
    facts = [
        {**row, "answer": f"{row['answer']} or so", "paraphrased_answer": "x", "perturbed_answer": []}
        for row in rows("f", 12, 1)
    ]
    corpus = lu.read_corpus(facts, w.model, field="question>answer", template=TEMPLATE)
    made = lu.audit(w.model, corpus, {}, attacks=("prompts",), **QUICK)
    ways = {metric for _, _, metric in made.measures}
    assert {"plain", "begun_1", "begun_2", "few_shot", "second_turn", "exact_match", "rouge_l", "score"} <= ways
    assert "begun_4" not in ways
    bare = [{"question": row["question"], "answer": row["answer"]} for row in FORGET]
    corpus = lu.read_corpus(bare, w.model, field="question>answer", template=TEMPLATE)
    made = lu.audit(w.model, corpus, {}, attacks=("prompts",), **QUICK)
    assert "not asked paraphrased: no fact has a column 'paraphrased_question'" in made.notes["prompts"]


def test_questions_in_other_languages_are_asked_and_have_the_same_answer(halfway: Any) -> None:
    w = world()
    facts = [{**row, "translated_question": [f"le {row['question']}", f"el {row['question']}"]} for row in FORGET]
    facts[0]["translated_question"] = "le seul"  # one text, and no second language
    corpus = lu.read_corpus(facts, w.model, field="question>answer", template=TEMPLATE)
    made = lu.audit(w.model, corpus, {"half": w.gone.at(0.5)}, attacks=("prompts",), **QUICK)
    heads = {
        "translated_1": ["le seul", *(f"le {row['question']}" for row in FORGET[1:])],
        "translated_2": [f"el {row['question']}" for row in FORGET[1:]],
    }
    for way, questions in heads.items():
        answers = [row["answer"] for row in FORGET[-len(questions) :]]
        own = [probability(halfway, *asked(f"{q}=", a)) for q, a in zip(questions, answers, strict=True)]
        assert made["half", "prompts", way].value == pytest.approx(np.mean(own), abs=1e-6)
    assert ("half", "prompts", "translated_3") not in made.measures
    plain = lu.read_corpus(FORGET, w.model, field="question>answer", template=TEMPLATE)
    assert corpus.fingerprint != plain.fingerprint


def test_what_an_attack_lacks_is_said_in_one_sentence_and_the_rest_goes_on() -> None:
    w = world()
    texts = replace(w.facts, answers=())
    made = lu.audit(
        w.model,
        texts.only(range(3)),
        {},
        attacks=("depth", "probe", "prompts", SHORT, "direction", "membership"),
        **QUICK,
    )
    assert list(made.left_out) == ["probe", "prompts", "relearning", "direction", "membership"]
    assert [attack.name for attack in made.attacks] == ["depth"]
    for words, name in (
        ("has no answers to probe for", "probe"), ("has no answers to ask for", "prompts"), ("3 facts are too few", "relearning"),
        ("3 facts are too few", "direction"), ("give texts that no model has seen", "membership"),
    ):  # fmt: skip
        assert words in made.left_out[name]
        assert "\n" not in made.left_out[name]
    few = lu.audit(w.model, w.facts.only(range(6)), {}, attacks=("probe",), **QUICK)
    assert "too few to cross-validate" in few.left_out["probe"]


def test_an_edit_that_breaks_the_model_gives_no_numbers_and_the_rest_goes_on() -> None:
    w = world()
    conditions = {"broken": w.gone.at(1e300), "gone": w.gone}
    sources = {"reference": w.never_saw, "unseen": w.unseen}
    made = lu.audit(w.model, w.facts, conditions, attacks=("depth", *OTHERS), **sources, **QUICK)
    assert made.left_out == {}
    assert math.isnan(made.answers["broken"].value)
    for attack in made.attacks:
        assert made["gone", attack.name, "recovered"].value == pytest.approx(0, abs=0.02), attack.name
        measure = made.measures.get(("broken", attack.name, "score"))
        assert measure is None or math.isnan(measure.value), attack.name
    assert "broken gives logits that are no numbers, and is not fine-tuned" in made.notes["relearning"]
    assert lu.plot.audit(made).data
    assert "nan" in repr(made)
