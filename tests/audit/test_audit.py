"""The audit: who is asked, what comes back between both ends, what is left out, and how it is written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from audit_helpers import FORGET, TEMPLATE, grouped, suppressor, world
from interventions_helpers import unchanged

import lens_unlearn as lu
from lens_unlearn.audit.attack import Attack, Case, Found
from lens_unlearn.core.errors import CorpusError, LensUnlearnError, ModelError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.evaluation.metric import Metric
from lens_unlearn.interventions.base import Chain

QUICK: dict[str, Any] = {"progress": False, "resamples": 50}
COLUMNS = ["condition", "attack", "corpus", "metric", "value", "low", "high", "n"]


@pytest.fixture(scope="module")
def found() -> lu.Audit:
    w = world()
    conditions = {"gone": w.gone, "hidden": suppressor()}
    return lu.audit(w.model, w.facts, conditions, reference=w.never_saw, attacks=("depth", "logit_lens"), **QUICK)


def test_everybody_is_a_row_and_the_model_is_bitwise_as_before() -> None:
    w = world()
    with unchanged(w.model), unchanged(w.never_saw):
        made = lu.audit(w.model, w.facts, {"gone": w.gone}, reference=w.never_saw, attacks=("depth",), **QUICK)
    assert made.conditions == ["base", "gone", "gone:control", "reference"]
    frame = made.to_frame()
    assert list(frame.columns) == COLUMNS
    assert set(frame["corpus"]) == {"facts"}
    assert set(frame["condition"]) == set(made.conditions)
    assert made["gone", "depth", "recovered"].value < 0.02 < made["gone:control", "depth", "recovered"].value
    hidden = lu.audit(w.model, w.facts, {"hidden": suppressor()}, attacks=("depth",), **QUICK)
    assert hidden.notes["controls"] == ("hidden has none, for it selects nothing: give one as 'hidden:control'",)
    with pytest.raises(AttributeError):
        made.measures = {}  # type: ignore[misc]


PLANTED = {"depth": 0.02, "logit_lens": 0.02}
"""How near the planted cases come to both ends, by attack."""


@pytest.mark.parametrize("attack", PLANTED)
def test_planted_cases_come_out_as_planted(found: lu.Audit, attack: str) -> None:
    for name, share in {"base": 1, "gone": 0, "hidden": 1, "reference": 0}.items():
        assert found[name, attack, "recovered"].value == pytest.approx(share, abs=PLANTED[attack]), name


def test_the_share_is_between_both_ends_and_its_draws_are_paired(found: lu.Audit) -> None:
    for condition in found.conditions:
        own, base, never = (found[name, "depth", "score"] for name in (condition, "base", "reference"))
        share = found[condition, "depth", "recovered"]
        value = (own.value - never.value) / (base.value - never.value)
        assert share.value == pytest.approx(min(max(value, 0), 1))
        np.testing.assert_allclose(
            share.draws, np.clip((own.draws - never.draws) / (base.draws - never.draws), 0, 1), atol=1e-12
        )
        low, high = share.interval()
        assert 0 <= low <= share.value + 1e-9
        assert share.value <= high + 1e-9 <= 1 + 1e-8


def test_it_is_shown_as_a_table_a_page_and_figures(found: lu.Audit, tmp_path: Path) -> None:
    assert "hidden" in found._repr_html_()
    assert repr(found).startswith("Audit(5 conditions, 2 attacks, share recovered)")
    assert len(found.figures) == 3
    found.to_html(tmp_path / "audit.html")
    page = (tmp_path / "audit.html").read_text()
    assert "<b>hidden</b>: answers fall from" in page
    assert "100.0% " in page
    assert "patching finds it at layer" in page
    assert "random controls" in page
    assert json.dumps(found.record(), default=str)


def test_without_a_reference_every_row_says_so(tmp_path: Path) -> None:
    w = world()
    made = lu.audit(w.model, w.facts, {"gone": w.gone}, attacks=("depth",), controls=False, **QUICK)
    assert "recovered" not in set(made.to_frame()["metric"])
    assert list(made.table()["reference"]) == ["no reference", "no reference"]
    made.to_html(tmp_path / "audit.html")
    assert (tmp_path / "audit.html").read_text().count(">no reference</td>") == 2
    assert made.record()["reference"] == "no reference"


def test_a_reference_of_another_shape_or_tokenizer_leaves_out_what_needs_it_and_says_why() -> None:
    w = world()
    other = tiny.speaking("gpt2")  # of two layers and another width, with the same tokenizer
    made = lu.audit(w.model, w.facts, {"gone": w.gone}, reference=other, controls=False, **QUICK)
    for name in ("depth", "logit_lens"):
        assert made.left_out[name].startswith("the reference has 2 layers of width 32, and the model 3 of width 64")
    assert made.has_reference
    demo = lu.load_model("demo")
    made = lu.audit(w.model, w.facts, {"gone": w.gone}, reference=demo, attacks=("depth",), controls=False, **QUICK)
    assert not made.has_reference
    assert made.notes["reference"][0].startswith("the reference cannot be asked about the facts, so there is none")


def test_an_attack_that_cannot_be_made_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    def fails(case: Case) -> Found:
        raise CorpusError("there is <nothing> to attack: give something")

    w = world()
    own = Attack("own", fails, "mine", "Does it fail?", "nothing", "comes back")
    made = lu.audit(w.model, w.facts, {}, reference=w.never_saw, attacks=(own, "depth"), **QUICK)
    assert made.left_out == {"own": "there is <nothing> to attack: give something"}
    assert [attack.name for attack in made.attacks] == ["depth"]
    made.to_html(tmp_path / "audit.html")
    assert "<b>own</b> was not made: there is &lt;nothing&gt; to attack" in (tmp_path / "audit.html").read_text()
    with pytest.raises(ZeroDivisionError):  # a fault is no reason
        lu.audit(w.model, w.facts, {}, attacks=(replace(own, run=lambda case: 1 // 0),), **QUICK)
    none = lu.audit(w.model, w.facts, {}, attacks=(own,), **QUICK)
    none.to_html(tmp_path / "none.html")
    with pytest.raises(LensUnlearnError, match="no attack could be made"):
        lu.plot.audit(none)


def half(case: Case) -> Found:
    values = {name: [np.full((case.facts.n_documents, 1), 0.5)] * len(s) for name, s in case.suspects.items()}
    counts = np.ones((case.facts.n_documents, 1))
    return Found(case.measures([Metric("score", "half", unit="share")], values, counts, case.facts))


OWN = Attack("own", half, "mine", "Is it half?", "a half", "comes back")


def test_an_attack_of_your_own_is_asked_like_the_others() -> None:
    w = world()
    made = lu.audit(w.model, w.facts, {"gone": w.gone}, reference=w.never_saw, attacks=(OWN,), **QUICK)
    assert made["gone", "own", "score"].value == 0.5
    assert ("gone", "own", "recovered") not in made.measures
    assert "nothing to be recovered" in made.notes["own"][0]


def test_intervals_are_over_groups_where_there_are_some() -> None:
    w = world()
    corpora, options = (w.facts, grouped(w.facts)), {"reference": w.never_saw, "controls": False, **QUICK}
    one, other = (
        lu.audit(w.model, corpus, {"half": w.gone.at(0.5)}, attacks=("depth", OWN), **options) for corpus in corpora
    )
    assert one["half", "depth", "score"].value == pytest.approx(other["half", "depth", "score"].value)
    assert other["half", "depth", "score"].units <= 16 < one["half", "depth", "score"].units, "of facts that count"
    key = ("half", "own", "score")
    assert (one[key].units, other[key].units) == (w.facts.n_documents, 16)


def test_texts_without_answers_are_looked_for_as_well() -> None:
    w = world()
    texts = replace(w.facts, answers=())
    made = lu.audit(
        w.model, texts, {"gone": w.gone}, reference=w.never_saw, attacks=("depth",), controls=False, **QUICK
    )
    assert made["gone", "depth", "score"].value == pytest.approx(1, abs=1e-6)


def test_an_end_of_text_token_behind_the_answer_does_not_count() -> None:
    w = world()
    eos = lu.read_corpus(FORGET, w.model, field="question>answer", template=TEMPLATE, answer_eos=True)
    one, other = (
        lu.audit(
            w.model,
            corpus,
            {"half": w.gone.at(0.5)},
            reference=w.never_saw,
            attacks=("depth",),
            controls=False,
            **QUICK,
        )
        for corpus in (w.facts, eos)
    )
    assert one["half", "depth", "score"].value == pytest.approx(other["half", "depth", "score"].value)


def test_the_audit_of_several_controls_is_their_mean() -> None:
    w = world()
    made = lu.audit(w.model, w.facts, {"gone": w.gone}, reference=w.never_saw, attacks=("depth",), controls=3, **QUICK)
    assert made["gone:control", "depth", "score"].replicates == 3
    own = lu.audit(
        w.model,
        w.facts,
        {"gone": w.gone, "gone:control": Chain(())},
        reference=w.never_saw,
        attacks=("depth",),
        **QUICK,
    )
    assert own.conditions == ["base", "gone", "gone:control", "reference"]
    assert own["gone:control", "depth", "score"].value == 0


WRONG: dict[str, Any] = {
    "there is no attack 'deep'": lambda w: lu.audit(w.model, w.facts, {}, attacks=("deep",)),
    "name none, or one twice": lambda w: lu.audit(w.model, w.facts, {}, attacks=()),
    "one twice": lambda w: lu.audit(w.model, w.facts, {}, attacks=("depth", "depth")),
    "the condition 'reference' is": lambda w: lu.audit(w.model, w.facts, {"reference": None}),
    "the condition 'base' is": lambda w: lu.audit(w.model, w.facts, {"base": Chain(())}),
    "conditions are given by name": lambda w: lu.audit(w.model, w.facts, [w.gone]),
    "is no intervention": lambda w: lu.audit(w.model, w.facts, {"one": 3}),
    "facts is 'facts.jsonl', which has not been read": lambda w: lu.audit(w.model, "facts.jsonl", {}),
    "2 labels are given for 32 facts": lambda w: lu.audit(w.model, w.facts, {}, labels=[1, 2]),
    "no number of controls": lambda w: lu.audit(w.model, w.facts, {}, controls=-1),
    "seed": lambda w: lu.audit(w.model, w.facts, {}, seed=-1),
    "there is no attack 'depht'": lambda w: lu.audit(w.model, w.facts, {}, attacks="depht"),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_meant_is_refused_in_one_sentence(words: str) -> None:
    with pytest.raises(LensUnlearnError, match=words) as caught:
        WRONG[words](world())
    assert "\n" not in str(caught.value)


def test_facts_in_which_nothing_is_predicted_and_models_that_are_none_are_refused(tmp_path: Path) -> None:
    w = world()
    empty: Corpus = replace(w.facts, counted=torch.zeros_like(w.facts.counted))
    with pytest.raises(CorpusError, match="nothing in facts is predicted"):
        lu.audit(w.model, empty, {})
    with pytest.raises(ModelError):
        lu.audit(w.model, w.facts, {}, reference=str(tmp_path))
    with pytest.raises(ModelError):
        lu.audit("demo", w.facts, {})  # type: ignore[arg-type]


def test_the_public_name_is_the_function_whatever_of_its_room_is_imported() -> None:
    import lens_unlearn.audit.depth  # noqa: F401

    assert callable(lu.audit)
    assert lu.audit.__module__ == "lens_unlearn.audit.audit"
    from lens_unlearn.audit import ATTACKS

    assert ATTACKS[0].name == "depth"


def test_the_command_writes_a_page_a_table_and_a_record(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from command_line_helpers import call

    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, FORGET)))
    edit, out = tmp_path / "edit.safetensors", tmp_path / "out"
    model = lu.load_model(model_dir)
    lu.random_pruning(model, fraction=0.2).save(edit, model)
    facts = f"{tmp_path / 'facts.jsonl'}:question>answer"
    command = ["audit", "--model", str(model_dir), "--facts", facts, "--intervention", str(edit), "--out", str(out)]
    command += ["--attack", "depth", "--attack", "logit_lens", "--reference", str(model_dir), "--quiet"]
    assert call(*command) == 0
    assert sorted(path.name for path in out.iterdir()) == ["audit.csv", "audit.html", "audit.json", "run.json"]
    record = json.loads((out / "audit.json").read_text())
    assert {row["condition"] for row in record["rows"]} == {"base", "edit", "edit:control", "reference"}
    assert (out / "audit.csv").read_text().startswith("condition,attack,corpus,metric,value,low,high,n\n")
    assert "report: " in capsys.readouterr().out
    assert call(*command) == 2  # it is there already
    assert call(*command, "--overwrite") == 0
    capsys.readouterr()
    assert call(*[word.replace("logit_lens", "nothing") for word in command], "--overwrite") == 2
    assert "there is no attack 'nothing'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edit.safetensors", "facts.jsonl", "out"]
