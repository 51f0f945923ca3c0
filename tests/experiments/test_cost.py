"""A run says what it will read and how long that takes before its first pass, and the sweep takes a fifth of it at most."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line_helpers import WORDS, write_texts

import lens_unlearn as lu
from lens_unlearn import methods
from lens_unlearn.experiments import cost, experiment
from lens_unlearn.experiments.experiment import Experiment, carry_out
from lens_unlearn.experiments.plan import Plan


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    forget = write_texts(folder / "forget.jsonl", 1, 150, [word[::-1] for word in WORDS])
    return {"forget": f"{forget}:text", "retain": f"{write_texts(folder / 'retain.jsonl', 2, 150)}:text"}


def plan_of(model_dir: Path, sources: dict[str, str], **more: Any) -> Plan:
    return Plan(
        str(model_dir), sources["forget"], (sources["retain"],), **{"tokens": 2000, "window": 64, "controls": 2, **more}
    )


def test_the_line_says_what_will_be_read_and_how_long_it_takes() -> None:
    steps = {"collect": 40_000, "tune": 60_400, "evaluate": 170_000, "sweep": 65_000}
    records = [methods.by_name("selective-pruning"), methods.by_name("neuron-adjust")]
    assert cost.words(steps, 466.0, records) == (
        "selective-pruning, neuron-adjust: collect 40k, tune 60k, evaluate 170k, sweep 65k tokens at 466 tokens/s: "
        "about 12 minutes; --no-sweep saves 2 minutes"
    )
    words = cost.words({"evaluate": 900}, 45.0, [methods.by_name("simu")])
    assert words == "simu: evaluate 900 tokens at 45 tokens/s: about 20 seconds, and the training of simu"


def test_it_is_said_before_the_first_pass_and_is_what_is_read(
    model_dir: Path, sources: dict[str, str], model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "SWEPT_LEAST", 50)
    said: list[tuple[dict[str, int], float]] = []
    seen: list[str] = []
    monkeypatch.setattr(cost, "say", lambda line: seen.append(line))
    monkeypatch.setattr(cost, "words", lambda steps, speed, _: said.append((dict(steps), speed)) or "said")
    read = {"tokens": 0, "sweep": 0}
    real = experiment.evaluate

    def counting(model: Any, corpora: Any, conditions: Any, **options: Any) -> Any:
        assert seen == ["said"]
        runs = 1 + sum(len(one) if isinstance(one, list) else 1 for one in conditions.values())
        step = "sweep" if any("@" in name for name in conditions) else "tokens"
        read[step] += runs * sum(corpus.n_read for corpus in corpora.values())
        return real(model, corpora, conditions, **options)

    monkeypatch.setattr(experiment, "evaluate", counting)
    options: dict[str, Any] = {"progress": True, "model": model}
    assert carry_out(plan_of(model_dir, sources, settings={"fraction": 0.1}), tmp_path / "out", **options) is not None
    [(steps, speed)] = said
    assert speed > 0
    assert read["tokens"] == steps["evaluate"]
    assert read["sweep"] == pytest.approx(steps["sweep"], rel=0.01)
    assert steps["sweep"] <= 0.2 * sum(steps.values())


def test_a_comparison_says_what_all_its_skills_read(
    sources: dict[str, str], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[dict[str, int]] = []
    monkeypatch.setattr(cost, "say", lambda line: None)
    monkeypatch.setattr(cost, "words", lambda steps, *_: said.append(dict(steps)) or "said")
    read, real = [], experiment.evaluate

    def counting(model: Any, corpora: Any, conditions: Any, **options: Any) -> Any:
        assert said, "before the first pass"
        read.append(sum(corpus.n_read for corpus in corpora.values()))
        return real(model, corpora, conditions, **options)

    monkeypatch.setattr(experiment, "evaluate", counting)
    names = {"reversed": "forget", "plain": "retain"}
    skills = {name: lu.read_corpus(sources[of], model, window=64) for name, of in names.items()}
    options: dict[str, Any] = {"retain_drop": 0.9, "controls": 1, "tokens": 500}
    lu.compare(model, skills, ["selective-pruning"], **options)
    [steps] = said
    assert len(read) == 2
    assert steps["evaluate"] == 3 * sum(read), (
        "the unedited model, the method and its control, unless it changes nothing"
    )


def test_prompts_are_read_as_well(model: Any) -> None:
    texts = lu.read_corpus([" ".join(WORDS[i:] * 3) for i in range(12)], model, window=40)
    asked = texts.with_prompts(10)
    assert asked.n_read == sum(len(asked.row(i)) for i in range(asked.n_rows)) > asked.n_tokens > 0
    plan = Plan("m", "f", ("r",), controls=2, sweep=False)
    fitted = {"selective-pruning": (asked, replace(asked))}
    assert cost.reading(plan, fitted, {}, {"forget": asked}) == {
        "collect": 2 * asked.n_read,
        "evaluate": 4 * asked.n_read,
    }
    tuned = cost.reading(replace(plan, retain_drop=0.1), fitted, {"retain": asked}, {})
    assert tuned["tune"] == (1 + cost.EVALUATIONS) * asked.n_read


def test_several_methods_read_a_text_once_and_their_controls_share_the_tests(model: Any) -> None:
    texts = lu.read_corpus([" ".join(WORDS[i:] * 3) for i in range(12)], model, window=40)
    asked, other = texts.with_prompts(10), texts.with_prompts(11)
    names = ("selective-pruning", "neuron-adjust", "key-space-detection")
    plan = Plan("m", "f", ("r",), methods=names, controls=5, sweep=False)
    fitted: dict[str, Any] = dict.fromkeys(names[:2], (texts, other)) | {names[2]: (asked, other)}
    steps = cost.reading(plan, fitted, {}, {"forget": asked})
    prompts = asked.n_read - asked.n_tokens + other.n_read - other.n_tokens
    assert steps["collect"] == texts.n_read + other.n_read + prompts
    assert steps["evaluate"] == round((1 + 2 + 2 + 6 * cost.FOUND) * asked.n_read)
    every = cost.reading(replace(plan, deal=False), fitted, {}, {"forget": asked})
    assert every["evaluate"] == round((1 + 6 + 6 + 6 * cost.FOUND) * asked.n_read)


def test_the_sweep_keeps_its_share_where_prompts_are_read_as_well(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "SWEPT_LEAST", 50)
    texts = lu.read_corpus([" ".join(WORDS[i % 9 :] * 3) + f" {i}" for i in range(80)], model, window=40)
    test = dict.fromkeys(("forget", "retain"), texts.with_prompts(20))
    rest, passes = 20_000, 5
    read = sum(text.n_read for text in cost.swept(test, rest, passes, 0).values()) * passes
    assert 0.15 * (rest + read) < read <= 0.2 * (rest + read)


def test_quiet_is_quiet(
    model_dir: Path,
    sources: dict[str, str],
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Experiment(plan_of(model_dir, sources), model, progress=False)
    monkeypatch.setattr(cost, "_speed", lambda *_: pytest.fail("nobody asked"))
    run.announce()
    assert capsys.readouterr().err == ""


def test_rows_are_cut_to_their_beginnings_and_those_with_prompts_are_not(model: Any) -> None:
    texts = lu.read_corpus([" ".join(WORDS * 4), "the dog", " ".join(WORDS)], model, window=60)
    short = texts.shortened(8)
    bos = int(texts.prepend_bos)
    assert [len(short.row(i)) for i in range(short.n_rows)] == [
        min(len(texts.row(i)), 8 + bos) for i in range(texts.n_rows)
    ]
    for i in range(texts.n_rows):
        assert short.row(i).tolist() == texts.row(i).tolist()[: 8 + bos]
    assert (short.keys, short.document.tolist()) == (texts.keys, texts.document.tolist())
    assert short.n_tokens == int(short.counted.sum()) < texts.n_tokens
    assert short.shortened(100) is short
    asked = texts.with_prompts(4)
    assert asked.shortened(2) is asked
    with pytest.raises(lu.CorpusError, match="tokens=0"):
        texts.shortened(0)


def test_a_test_that_is_made_as_small_as_it_may_be_has_many_documents_and_short_rows(
    model_dir: Path, sources: dict[str, str], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PILOT": 300, "PILOT_UNITS": 20, "LONGEST": 15, "AIM": 0.5}.items():
        monkeypatch.setattr(experiment, name, value)
    run = Experiment(plan_of(model_dir, sources), model, progress=False)
    assert all(text.n_documents >= 20 for text in run.expected_test().values())
    run.fit()
    for text in run.documents.test.values():
        assert text.n_documents >= 20
        assert int(text.starts.diff().max()) <= 15 + int(text.prepend_bos)
    given = Experiment(plan_of(model_dir, sources, test_tokens=400), model, progress=False)
    given.fit()
    assert max(int(text.starts.diff().max()) for text in given.documents.test.values()) > 20, "as they are"
