"""A run tests on as many texts as its intervals need, and sweeps over strengths near the one that was chosen."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line_helpers import WORDS, call, run_arguments, write_texts

import lens_unlearn as lu
from lens_unlearn.evaluation.report import BASE
from lens_unlearn.experiments import documents, experiment
from lens_unlearn.experiments.experiment import Experiment, carry_out
from lens_unlearn.experiments.plan import AROUND, Plan, command_of

QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture
def long(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "texts").mkdir()
    forget = write_texts(tmp_path / "texts" / "forget.jsonl", 1, 120, [word[::-1] for word in WORDS])
    return {"forget": forget, "retain": write_texts(tmp_path / "texts" / "retain.jsonl", 2, 120)}


@pytest.fixture
def plan(model_dir: Path, long: dict[str, Path]) -> Plan:
    sources = {name: f"{path}:text" for name, path in long.items()}
    return Plan(
        str(model_dir), sources["forget"], (sources["retain"],), tokens=1500, window=32, sweep=False, controls=1
    )


def counts_of(plan: Plan, out: Path, **options: Any) -> dict[str, dict[str, int]]:
    done = carry_out(plan, out, **QUIET, **options)
    assert done is not None
    return done[1].provenance["documents"]["test"]


def test_as_many_texts_are_tested_on_as_the_interval_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = lu.load_model("demo")
    plan = Plan("demo", "demo:python", ("demo:english",), tokens=3000, window=64)

    def sizes() -> dict[str, int]:
        found = Experiment(plan, demo, known=known, **QUIET)
        found.fit()
        measured = lu.evaluate(demo, found.documents.test, {}, **QUIET)
        for text in found.documents.test:
            low, high = measured[BASE, text, "top1"].interval()
            widths[text] = (high - low) / 2
        return {name: text.n_tokens for name, text in found.documents.test.items()}

    known: dict[Any, lu.Corpus] = {}
    widths: dict[str, float] = {}
    whole = sizes()
    assert min(whole.values()) >= 3000  # no more than twice the pilot: as they are
    monkeypatch.setattr(experiment, "PILOT", 700)
    monkeypatch.setattr(experiment, "PILOT_UNITS", 20)
    monkeypatch.setattr(experiment, "AIM", 0.04)
    enough = sizes()
    assert all(700 < enough[name] < whole[name] for name in whole)
    assert max(widths.values()) <= 0.05  # a width is known to a fifth from so few
    monkeypatch.setattr(experiment, "AIM", 0.01)  # takes sixteen times as many: all that there are
    assert sizes() == whole


def test_the_size_is_kept_and_the_run_is_known_again_by_all_of_its_texts(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "PILOT", 300)
    monkeypatch.setattr(experiment, "PILOT_UNITS", 8)
    monkeypatch.setattr(experiment, "AIM", 0.03)
    before = counts_of(plan, tmp_path / "before")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "_evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            carry_out(plan, tmp_path / "again", **QUIET)
    monkeypatch.setattr(experiment, "AIM", 1.0)  # what is kept is used, not measured again
    assert counts_of(plan, tmp_path / "again", resume=True) == before
    assert carry_out(plan, tmp_path / "again", resume=True, **QUIET) is None
    bad = tmp_path / "tests.safetensors"
    for wrong in (5, {"forget": 0}, {"forget": "all"}, None):
        lu.core.artefacts.write(bad, "sizes of tests", {}, {"tokens": wrong})
        with pytest.raises(lu.core.errors.ArtefactError, match="sizes of tests that can be used"):
            experiment.TEST_TOKENS.load(bad)


@pytest.mark.parametrize("facts", [False, True])
def test_the_number_of_tokens_can_be_said(
    plan: Plan, tmp_path: Path, facts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "PILOT_UNITS", 8)
    found = counts_of(replace(plan, test_tokens=400, facts=facts), tmp_path / "out")
    assert found["retain"]["tokens"] == pytest.approx(400, rel=0.1)
    assert (found["forget"]["documents"] == 120) == facts  # facts to forget are tested on whole
    assert "--test-tokens 400" in command_of(replace(plan, test_tokens=400, controls=5))


def test_on_the_command_line(model_dir: Path, long: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    arguments = [*run_arguments(model_dir, long, tmp_path / "out"), "--test-tokens", 100]
    assert call(*arguments) == 0
    settings = json.loads((tmp_path / "out" / "run.json").read_text())
    assert settings["plan"]["test_tokens"] == 100
    assert settings["documents"]["test"]["retain"]["tokens"] < settings["documents"]["fit"]["retain"]["tokens"]
    assert call(*arguments[:-1], 1, "--overwrite") == 2
    assert "test_tokens=1 is no number of tokens" in capsys.readouterr().err


def test_a_sweep_goes_around_the_strength_that_was_chosen(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan.strengths_of("selective-pruning", 0.04) == tuple(m * 0.04 for m in AROUND)
    assert plan.strengths_of("selective-pruning", 0.5) == (0.125, 0.25, 1.0)
    assert replace(plan, fractions=(0.3,)).strengths_of("selective-pruning", 0.04) == (0.3,)
    each = plan.strengths_of("selective-pruning", {"mlp.post": 0.1})  # by site: nothing to go around
    assert each == plan.records["selective-pruning"].grid
    monkeypatch.setattr(experiment, "PILOT", 100)
    monkeypatch.setattr(experiment, "PILOT_UNITS", 8)
    swept = Experiment(replace(plan, settings={"fraction": 0.1}), **QUIET)
    swept.fit()
    curves = swept.curves()
    points = {f"selective-pruning{control}@{0.1 * m:g}" for m in AROUND for control in ("", ":control")}
    assert set(curves.conditions) == {BASE, "selective-pruning", "selective-pruning:control", *points}
    tested = curves.provenance["corpora"]["retain"]["tokens"]
    assert tested < swept.documents.test["retain"].n_tokens / 2


def test_plain_texts_are_shortened_before_they_are_cut_into_prompts_and_training_is_given_a_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    demo = lu.load_model("demo")
    monkeypatch.setattr(documents, "CUT", 24)
    monkeypatch.setattr(experiment, "CUT", 24)
    methods = ("selective-pruning", "key-space-detection", "simu")
    plan = Plan("demo", "demo:python", ("demo:english",), methods=methods, tokens=4000, window=64, test_tokens=500)
    found = Experiment(plan, demo, **QUIET)
    prompted = [
        *found.documents.test.values(),
        *found.documents.queries.values(),
        *found.fit_pair(found.records["simu"]),
    ]
    for corpus in prompted:
        assert corpus.has_prompts
        assert int(corpus.starts.diff().max()) <= 24 + int(corpus.prepend_bos)
    assert int(found.documents.fit["forget"].starts.diff().max()) > 40  # of which nothing is cut
    few = found.fit_pair(found.records["simu"])
    assert all(200 <= corpus.n_tokens < 260 or corpus.n_documents == 10 for corpus in few)
    trained: list[dict[str, Any]] = []
    simu = replace(found.records["simu"], prepare=lambda *_, **options: trained.append(options))
    found.records = {"simu": simu, "again": simu}
    found._prepare("simu")
    assert trained[-1]["attribution_tokens"] == experiment.ATTRIBUTED
    found.plan = replace(plan, settings={"simu.attribution_tokens": 7})
    found._prepare("simu")
    assert trained[-1]["attribution_tokens"] == 7


def test_answers_are_trained_on_and_attributed_whole(long: dict[str, Path], model_dir: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"q": f"what is number {i}", "a": f"it is {i} and no more than {i + 1}"}) for i in range(80)]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines))
    source = f"{tmp_path / 'facts.jsonl'}:q>a"
    demo = lu.load_model("demo")
    plan = Plan("demo", source, ("demo:english",), methods=("simu",), tokens=3000, window=64)
    found = Experiment(plan, demo, **QUIET)
    assert found.fit_pair(found.records["simu"])[0] is found.documents.fit["forget"]


def test_shared_controls_are_said_on_the_page_and_on_the_command_line(
    model_dir: Path, long: dict[str, Path], tmp_path: Path
) -> None:
    arguments = [*run_arguments(model_dir, long, tmp_path / "out"), "--control-seeds", 4, "--set", "fraction=0.2"]
    assert call(*arguments, "--deal-controls") == 0
    settings = json.loads((tmp_path / "out" / "run.json").read_text())
    assert settings["plan"]["deal"] is True
    assert settings["dealt"] == [f"{name}:control" for name in sorted(settings["plan"]["methods"])]
    assert "(mean of 4 draws, each on documents of its own)" in (tmp_path / "out" / "report.html").read_text()
    assert call(*arguments, "--no-deal-controls", "--overwrite") == 0
    assert "dealt" not in json.loads((tmp_path / "out" / "run.json").read_text())
    assert "(mean of 4 draws)" in (tmp_path / "out" / "report.html").read_text()
