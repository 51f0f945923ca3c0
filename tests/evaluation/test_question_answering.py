"""evaluate with answers: the metrics are the mean over single questions, under any intervention, whatever the batch."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from interventions_helpers import selection_of, unchanged

import lens_unlearn as lu
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.core.intervals import widening
from lens_unlearn.corpora.corpus import Answer, Corpus
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.evaluation import question_answering
from lens_unlearn.evaluation.answer_matching import Ending, exact_match, rouge_l
from lens_unlearn.evaluation.code_tests import isolation
from lens_unlearn.evaluation.evaluate import evaluate
from lens_unlearn.evaluation.generation import Written, continue_rows, generate
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.keyspace.regions import Clusters
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons.collect import query_keys

QUIET = {"progress": False, "resamples": 50}
TEMPLATE = "Q: {prompt}\nA:{answer}"
QUESTIONS = [
    "who wrote the book?", "1 + 2 =", "the quick brown fox", "what is a river", "add a and b", "who jumps over",
    "where is the village", "4 + 5 =", "print i", "a lazy dog?", "reply", "who is he",
]  # fmt: skip
NEW = 8
SHARED = Path(__file__).parents[3] / "shared"


def pairs(model: Any, known: int, prune: Any = None) -> list[dict[str, str]]:
    """Questions of which the model answers the first few as it should, since these are its own answers."""
    heads = [TEMPLATE.partition("{answer}")[0].replace("{prompt}", q) for q in QUESTIONS]
    own = generate(model, heads, intervention=prune, max_new_tokens=NEW)
    own = [text.strip().split("\n")[0] or "x" for text in own]
    return [{"q": q, "a": f" {own[i]}" if i < known else " never this"} for i, q in enumerate(QUESTIONS)]


@pytest.fixture
def prune(model: Any) -> Ablate:
    generator = torch.Generator().manual_seed(0)
    shapes = {site: point.shape for site, point in resolve(model, "mlp.post").items()}
    return Ablate(lu.NeuronMap({s: torch.rand(shape, generator=generator) < 0.6 for s, shape in shapes.items()}))


@pytest.fixture
def corpus(model: Any) -> Corpus:
    return read_corpus(pairs(model, 7), model, field="q>a", template=TEMPLATE)


def ask(model: Any, corpus: Any, conditions: Any, answers: int = 100, **options: Any) -> Any:
    return evaluate(model, {"c": corpus}, conditions, answers=answers, **{**QUIET, "max_new_tokens": NEW, **options})


def alone(model: Any, corpus: Corpus, intervention: Any, *, cache: bool = True) -> dict[str, float]:
    """Every question for itself, without the early stop."""
    ending = Ending.of([a for a in corpus.answers if a])
    exact, recall, f = [], [], []
    for row in range(corpus.n_rows):
        [one] = continue_rows(
            model, [corpus.prompt(row).tolist()], intervention, max_new_tokens=NEW, use_cache=cache
        )  # fmt: skip
        truth = corpus.answer(row)
        assert truth is not None
        text = ending.cut(one.text, "Q:")
        exact.append(exact_match(text, truth.text) and not one.abstained)
        recall.append(0 if one.abstained else rouge_l(text, truth.text)[0])
        f.append(0 if one.abstained else rouge_l(text, truth.text)[1])
    return {"exact_match": np.mean(exact), "rouge_l": np.mean(recall), "rouge_l_f": np.mean(f)}


@pytest.mark.parametrize(("batch_size", "cache"), [(1, True), (8, False)])
def test_the_scores_are_those_of_questions_asked_one_by_one(
    model: Any, corpus: Corpus, prune: Ablate, batch_size: int, cache: bool
) -> None:
    with unchanged(model):
        report = ask(model, corpus, {"cut": prune}, batch_size=batch_size)
    for condition, edit in (("base", None), ("cut", prune)):
        for metric, expected in alone(model, corpus, edit, cache=cache).items():
            assert report[condition, "c", metric].value == pytest.approx(expected), (condition, metric)
            assert report[condition, "c", metric].n == len(QUESTIONS)
    assert report["base", "c", "exact_match"].value >= 7 / 12
    assert report["cut", "c", "exact_match"].value < report["base", "c", "exact_match"].value


def test_the_answers_under_an_intervention_are_its_own(model: Any, prune: Ablate) -> None:
    corpus = read_corpus(pairs(model, 7, prune), model, field="q>a", template=TEMPLATE)
    report = ask(model, corpus, {"cut": prune})
    assert report["cut", "c", "exact_match"].value >= 7 / 12 > report["base", "c", "exact_match"].value
    with prune.on(model):
        inside = ask(model, corpus, {})
    assert inside["base", "c", "exact_match"].value == report["cut", "c", "exact_match"].value


@pytest.mark.parametrize("outside", [False, True])
def test_an_answer_that_is_refused_earns_nothing_and_is_counted(model: Any, corpus: Corpus, outside: bool) -> None:
    site = Site(1, "mlp.post")
    keys = query_keys(model, corpus, [site], progress=False)[site]
    silent = Abstain({site: Clusters(keys[:3], torch.ones(keys.shape[1]), 1e-3)})
    expected = [continue_rows(model, [corpus.prompt(r).tolist()], silent, max_new_tokens=NEW)[0] for r in range(12)]
    silenced = [one.abstained for one in expected]
    assert 0 < sum(silenced) < 12
    with silent.on(model) if outside else nullcontext():
        report = ask(model, corpus, {} if outside else {"silent": silent}, batch_size=2)
    name = "base" if outside else "silent"
    assert report[name, "c", "refused"].value == pytest.approx(np.mean(silenced))
    for metric, value in alone(model, corpus, silent).items():
        assert report[name, "c", metric].value == pytest.approx(value)
    refusals = [sample[name] for sample in report.samples]
    assert refusals == [
        one.text if one.abstained else Ending(line=True).cut(one.text, "Q:") for one in expected[: len(refusals)]
    ]
    if not outside:
        assert report["base", "c", "refused"].value == 0
        assert report["silent", "c", "refused"].value == report["silent", "c", "abstained"].value


def test_what_withholds_everything_scores_zero(model: Any, corpus: Corpus) -> None:
    site = Site(0, "mlp.post")
    keys = query_keys(model, corpus, [site], progress=False)[site]
    everything = Abstain({site: Clusters(keys[:1], torch.ones(keys.shape[1]), 1e6)})
    report = ask(model, corpus, {"silent": everything})
    assert report["silent", "c", "refused"].value == 1
    assert [report["silent", "c", m].value for m in ("exact_match", "rouge_l", "rouge_l_f")] == [0, 0, 0]


def test_the_questions_are_drawn_once_and_the_same_for_all(model: Any, corpus: Corpus, prune: Ablate) -> None:
    reports = [
        ask(model, corpus, {"same": Ablate(prune.selection), "cut": [prune, prune]}, 5, seed=s) for s in (0, 0, 1)
    ]
    same = reports[0]
    assert same["base", "c", "rouge_l"].n == same.provenance["answers"]["questions"]["c"] == 5
    for metric in ("exact_match", "rouge_l"):
        np.testing.assert_array_equal(same["same", "c", metric].draws, same["cut", "c", metric].draws)
        np.testing.assert_array_equal(same["base", "c", metric].draws, reports[1]["base", "c", metric].draws)
    assert same.samples == reports[1].samples
    assert same.samples != reports[2].samples
    every = question_answering.QuestionAnswering([], 100).choose({"c": corpus})["c"]
    some = question_answering.QuestionAnswering([], 5).choose({"c": corpus})["c"]
    assert every == list(range(12))
    assert some == sorted(set(some))
    assert len(some) == 5


def test_the_interval_is_over_questions(model: Any, corpus: Corpus) -> None:
    measure = ask(model, corpus, {}, resamples=2000)["base", "c", "exact_match"]
    p, n = measure.value, len(QUESTIONS)
    assert float(measure.draws.mean()) == pytest.approx(p, abs=0.02)
    of_a_mean = (p * (1 - p) / (n + 1)) ** 0.5  # under exponential weights
    assert float(measure.draws.std()) == pytest.approx(widening(np.ones(n)) * of_a_mean, rel=0.1)
    one = ask(model, corpus.only([0]), {})["base", "c", "exact_match"]
    assert np.isnan(one.interval()).all()


def test_texts_without_answers_are_not_asked(model: Any, corpus: Corpus) -> None:
    texts = read_corpus(["the quick brown fox jumps"] * 3, model)
    report = evaluate(model, {"c": corpus, "t": texts}, {}, answers=3, max_new_tokens=2, **QUIET)
    assert ("base", "c", "exact_match") in report.measures
    assert ("base", "t", "exact_match") not in report.measures
    assert ("base", "t", "top1") in report.measures
    for none in (texts, texts.with_prompts(), corpus.with_prompts(2), corpus.queries()):
        with pytest.raises(CorpusError, match="no corpus has true answers to compare with"):
            ask(model, none, {}, 3)
    both = evaluate(model, {"b": texts + corpus}, {}, answers=100, max_new_tokens=2, **QUIET)
    assert both["base", "b", "exact_match"].n == corpus.n_rows
    silent = ask(model, corpus, {}, 0)
    assert "exact_match" not in silent.metrics
    assert "answers" not in silent.provenance
    assert silent.samples == []


def test_settings_that_make_no_sense_are_refused(model: Any, corpus: Corpus) -> None:
    with pytest.raises(LensUnlearnError, match="answers=-1"):
        ask(model, corpus, {}, -1)
    with pytest.raises(LensUnlearnError, match="max_new_tokens=0 leaves nothing to write"):
        ask(model, corpus, {}, max_new_tokens=0)


def test_the_report_says_how_answers_were_scored(model: Any, corpus: Corpus, prune: Ablate, tmp_path: Path) -> None:
    report = ask(model, corpus, {"cut": prune}, 4)
    settings = report.provenance["answers"]
    assert settings["max_new_tokens"] == NEW
    assert "NFKC" in settings["normalization"]
    assert settings["an answer ends at"]["c"].startswith("the first line break")
    assert "unit_tests" not in settings
    assert len(report.samples) == 3
    assert list(report.samples[0]) == ["corpus", "prompt", "true answer", "base", "cut"]
    assert report.samples[0]["prompt"].startswith("Q: ")
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "true answer" in page
    assert "share of exactly matching answers" in page


# --- what was read -------------------------------------------------------------------------------------------------------


def test_answers_stay_with_their_documents(model: Any) -> None:
    rows = [{"q": f"number {i}?", "a": f"it is {i}"} for i in range(20)]
    corpus = read_corpus(rows, model, field="q>a", template="Asked.\nQ: {prompt} A: {answer}", window=40)
    assert corpus.answers[3] == Answer("it is 3", marker="Q:")

    def holds(part: Corpus) -> None:
        for row in range(part.n_rows):
            answer = part.answer(row)
            start, end = int(part.starts[row]), int(part.starts[row + 1])
            counted = part.tokens[start:end][part.counted[start:end]].tolist()
            assert answer is not None
            assert model.tokenizer.decode(counted).strip() == answer.text

    for part in (corpus, corpus.only([3, 5]), corpus.sample(30), corpus.first(30), *corpus.split(0.5, 0.5)):
        assert len(part.answers) == part.n_documents
        holds(part)
    holds(corpus.only([1]) + corpus.only([2]))
    assert corpus.without(corpus.only([0]))[0].answers == corpus.answers[1:]
    everything = read_corpus(rows, model, field="q>a", count="all")
    assert everything.answers == ()


def test_unit_tests_are_read_and_may_stand_in_the_prompt(model: Any) -> None:
    rows = [
        {"text": "Add.", "code": "x", "test_list": ["assert 1", "assert 2"], "test_setup_code": "y = 1"},
        {"text": "Sub.", "code": "z", "test_list": ["assert {prompt}"], "test_imports": ["import re", "import os"]},
        {"text": "None.", "code": "z", "test_list": None},
        {"text": "Odd.", "code": "z", "test_list": [1]},
    ]
    corpus = read_corpus(rows, model, field="text>code", template="# {prompt}\n{tests}\n{answer}")
    assert [(a.tests, a.setup) for a in corpus.answers if a] == [
        (("assert 1", "assert 2"), "y = 1"), (("assert {prompt}",), "import re\nimport os"), ((), ""), ((), ""),
    ]  # fmt: skip
    heads = [model.tokenizer.decode(corpus.prompt(row)[corpus.prepend_bos :]) for row in range(4)]
    assert heads[:2] == ["# Add.\nassert 1\nassert 2\n", "# Sub.\nassert {prompt}\n"]
    assert {a.marker for a in corpus.answers if a} == {""}, "a line of code may begin so too"
    other = [{**row, "test_list": ["assert 3"]} for row in rows]
    plain = {"field": "text>code"}
    assert read_corpus(rows, model, **plain).fingerprint != read_corpus(other, model, **plain).fingerprint


def test_a_demo_source_may_name_its_field(model: Any) -> None:
    named = read_corpus("demo:arithmetic:dev:question>answer", model, template="{prompt}{answer}", tokens=200)
    assert named.answers[0] is not None
    assert named.fingerprint == read_corpus(
        "demo:arithmetic", model, field="question>answer", template="{prompt}{answer}", tokens=200
    ).fingerprint  # fmt: skip
    assert read_corpus("demo:arithmetic", model, tokens=20).answers == ()


# --- answers that a writer of our own gives ----------------------------------------------------------------------------------


def writes(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str], model: Any) -> list[int]:
    """Let the model answer by rote: by a word of the prompt."""
    calls: list[int] = []

    def write(model_: Any, rows: Any, intervention: Any = None, *, stop: Any = (), **_: Any) -> list[Written]:
        calls.append(len(rows))
        texts = [next(a for word, a in answers.items() if word in model.tokenizer.decode(row)) for row in rows]
        if stop:  # a token of a line break ends the text, as in continue_rows
            texts = [text[: text.find("\n") + 1] if "\n" in text else text for text in texts]
        return [Written(text, False) for text in texts]

    monkeypatch.setattr(question_answering, "continue_rows", write)
    return calls


def test_numbers_count_where_the_true_answers_end_in_them(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"q": "one", "a": "1 + 1 = 2\n#### 2"}, {"q": "two", "a": "#### 1,000"}, {"q": "ten", "a": "#### -3"}]
    corpus = read_corpus(rows, model, field="q>a", template="Question: {prompt}\nAnswer: {answer}")
    right = {"one": " it is 2.\n\nQuestion: 3?", "two": " 999 +\n1\n#### 1000\n7", "ten": " 3"}
    writes(monkeypatch, right, model)
    report = ask(model, corpus, {})
    assert report["base", "c", "numeric_match"].value == pytest.approx(2 / 3)
    assert report["base", "c", "exact_match"].value == 0
    assert "line break" not in report.provenance["answers"]["an answer ends at"]["c"]
    words = read_corpus([*rows, {"q": "x", "a": "none"}], model, field="q>a")
    writes(monkeypatch, {**right, "x": "none"}, model)
    assert "numeric_match" not in ask(model, words, {}).metrics


def test_every_answer_that_a_row_lists_counts_as_right(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"q": "one", "a": ["Paris", "the city of light"]},
        {"q": "two", "a": {"text": ["Rome"], "answer_start": [0]}},
        {"q": "ten", "a": [10, "ten"]},
        {"q": "six", "a": 6},
    ]
    corpus = read_corpus(rows, model, field="q>a")
    writes(monkeypatch, {"one": " City of light!\n", "two": " Roma\n", "ten": " Ten.\n", "six": " 6\n"}, model)
    report = ask(model, corpus, {})
    assert report["base", "c", "exact_match"].value == 3 / 4
    assert report["base", "c", "rouge_l"].value == pytest.approx((3 / 4 + 1 + 1) / 4)
    assert report.samples[0]["true answer"] == "Paris / the city of light"
    first = read_corpus([{**rows[0], "a": "Paris"}, *rows[1:]], model, field="q>a")
    assert ask(model, first, {})["base", "c", "exact_match"].value == 2 / 4
    numbers = read_corpus([{"q": "six", "a": ["7", "6"]}, {"q": "ten", "a": 10}], model, field="q>a")
    writes(monkeypatch, {"six": " it is 6\n", "ten": " 11\n"}, model)
    assert ask(model, numbers, {})["base", "c", "numeric_match"].value == 1 / 2


def test_a_line_break_before_the_answer_does_not_end_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = read_corpus([{"q": "one", "a": "Paris"}, {"q": "two", "a": "Rome"}], model, field="q>a")
    calls = writes(monkeypatch, {"one": "\n Paris\nand so on", "two": " Rome\nof course"}, model)
    assert ask(model, corpus, {})["base", "c", "exact_match"].value == 1
    assert calls == [2, 1]


ADD = {"text": "add", "code": "def f(a, b):\n    return a + b", "test_list": ["assert f(1, 2) == 3"]}
SUB = {
    "text": "sub",
    "code": "def f(a, b):\n    return a - b",
    "test_list": ["assert f(x, 2) == 1"],
    "test_setup_code": "x = 3",
}
BARE = {"text": "bare", "code": "x = 1", "test_list": []}


def test_unit_tests_run_where_allowed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = read_corpus([ADD, SUB, BARE], model, field="text>code")
    added = f"```python\n{ADD['code']}\n```\nThat is it."
    writes(monkeypatch, {"add": added, "sub": " " + ADD["code"], "bare": "x"}, model)
    report = ask(model, corpus, {}, allow_code_execution=True)
    assert report["base", "c", "unit_tests"].value == 0.5
    assert report["base", "c", "unit_tests"].n == 2, "a row without tests cannot fail"
    assert report["base", "c", "exact_match"].n == 3
    assert report.provenance["answers"]["unit_tests"] == {"c": f"run {isolation().words}"}
    writes(monkeypatch, {"add": added, "sub": " " + SUB["code"] + "\n\nIt is simple", "bare": "x"}, model)
    assert ask(model, corpus, {}, allow_code_execution=True)["base", "c", "unit_tests"].value == 1


def test_no_code_runs_unless_it_is_allowed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    corpus = read_corpus([ADD, SUB, BARE], model, field="text>code")
    monkeypatch.setattr(subprocess, "Popen", None)
    report = ask(model, corpus, {})
    assert "unit_tests" not in report.metrics
    assert report.provenance["answers"]["unit_tests"] == {"c": "not run: not allowed"}


# --- trained models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> Any:
    with tiny.quiet():
        return lu.load_model("demo", device="cpu")


def test_the_demo_model_answers_as_was_measured_without_this_library(demo: Any) -> None:
    sums = read_corpus("demo:arithmetic:test:question>answer", demo, template="{prompt}{answer}")
    facts = read_corpus("demo:facts:train", demo, template="Q: {prompt}\nA: {answer}")
    settings = {"max_new_tokens": 20, "resamples": 20, "progress": False}
    report = evaluate(
        demo, {"sums": sums.split(0.2, 0.8)[0], "facts": facts}, {}, answers=80, batch_size=32, **settings
    )
    assert report["base", "sums", "exact_match"].value > 0.88
    assert report["base", "sums", "numeric_match"].value == report["base", "sums", "exact_match"].value
    assert report["base", "facts", "exact_match"].value > 0.93
    assert report["base", "facts", "rouge_l"].value > 0.97
    assert report["base", "facts", "rouge_l"].n == 80
    assert "numeric_match" not in {m for _, c, m in report.measures if c == "facts"}


@pytest.mark.skipif(not (SHARED / "data" / "gsm8k").is_dir(), reason="the shared texts are not at hand")
def test_files_of_gsm8k_and_mbpp_work(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "Question: {prompt}\nAnswer: {answer}"
    path = SHARED / "data" / "gsm8k" / "test.jsonl"
    sums = read_corpus(f"{path}:question>answer", demo, template=template, tokens=600)
    report = ask(demo, sums, {}, 3)
    assert report["base", "c", "numeric_match"].n == 3
    assert report["base", "c", "numeric_match"].value == 0
    tasks = read_corpus(f"{SHARED / 'data' / 'mbpp' / 'mbpp.jsonl'}:text>code", demo, tokens=300)
    assert tasks.answers[0] is not None
    assert tasks.answers[0].tests[0].startswith("assert ")
    truths = {}
    for row, answer in enumerate(tasks.answers):
        assert answer is not None
        truths[demo.tokenizer.decode(tasks.prompt(row))] = answer.text
    writes(monkeypatch, truths, demo)
    report = ask(demo, tasks, {}, allow_code_execution=True)
    assert report["base", "c", "unit_tests"].value == 1
    assert report["base", "c", "exact_match"].value == 1


# --- ending early --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loaded", *tiny.HOOKED])
@pytest.mark.parametrize("cache", [True, False])
def test_writing_may_end_at_further_tokens(model: Any, name: str, cache: bool) -> None:
    one = model if name == "loaded" else tiny.model(name)
    rows = [[5, 6, 7], [8, 9, 10], [20, 21, 22], [30, 31]]
    settings = {"max_new_tokens": 12, "use_cache": cache}
    whole = [written.text for written in continue_rows(one, rows, **settings)]
    letters = sorted({character for text in whole for character in text[1:4]})
    assert letters
    for letter in letters[:3]:
        stop = [token for token in range(tiny.VOCABULARY) if letter in one.tokenizer.decode([token])]
        for batch_size in (1, 16):
            for text, short in zip(whole, continue_rows(one, rows, stop=stop, batch_size=batch_size, **settings)):
                assert text.startswith(short.text)
                assert letter not in text or short.text[: text.index(letter) + 1] == text[: text.index(letter) + 1]
    assert any(len(s.text) < len(t) for t, s in zip(whole, continue_rows(one, rows, stop=stop, **settings)))


def test_the_tokens_of_a_line_break(model: Any) -> None:
    found = question_answering.line_breaks(model)
    assert model.tokenizer("\n", add_special_tokens=False)["input_ids"][0] in found
    assert all("\n" in model.tokenizer.decode([token]) for token in found)
    assert found == [token for token in range(tiny.VOCABULARY) if "\n" in model.tokenizer.decode([token])]


def test_answers_cut_at_the_limit_are_marked_and_their_share_is_reported(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [{"question": q, "answer": "Rome"} for q in ("one", "two", "three")]
    corpus = read_corpus(rows, model, field="question>answer")
    texts = {"one": "Paris, which is", "two": "Rome\nand so on", "three": "Oslo"}

    def write(model_: Any, rows_: Any, intervention: Any = None, **_: Any) -> list[Written]:
        asked = [next(q for q in texts if q in model.tokenizer.decode(row)) for row in rows_]
        return [Written(texts[q], False, cut=q != "three") for q in asked]

    monkeypatch.setattr(question_answering, "continue_rows", write)
    report = evaluate(model, {"c": corpus}, {"same": Ablate(selection_of(model))}, answers=3, **QUIET)
    for condition in ("base", "same"):
        assert report[condition, "c", "truncated"].value == pytest.approx(1 / 3)
    assert [sample.get("cut") for sample in report.samples] == [
        ["base", "same"] if sample["base"].startswith("Paris") else None for sample in report.samples
    ]
    report.to_html(tmp_path / "r.html")
    assert "cut at the limit of tokens" in (tmp_path / "r.html").read_text()
