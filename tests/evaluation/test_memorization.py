"""evaluate with memorization: every measure equals plain loops over single questions on the Hugging Face model."""

import copy
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import transformers
from command_line_helpers import call
from interventions_helpers import selection_of, unchanged

import lens_unlearn as lu
from lens_unlearn import demo as demo_files
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.core.intervals import widening
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.evaluation import evaluate as evaluating
from lens_unlearn.evaluation import memorization, teacher_forcing
from lens_unlearn.evaluation.evaluate import evaluate
from lens_unlearn.evaluation.memorization import Memorization, extraction_strength, truth_ratio
from lens_unlearn.evaluation.metrics import needing
from lens_unlearn.evaluation.question_answering import QuestionAnswering
from lens_unlearn.evaluation.tofu import forget_truth_ratio, retain_truth_ratio
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.keyspace.regions import Clusters
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import query_keys

QUIET = {"progress": False, "resamples": 50}
TEMPLATE = "Q: {prompt}\nA: {answer}"
SHARED = Path(__file__).parents[3] / "shared"


def row_of(question: str, answer: str, wrong: Any = (), paraphrase: str = "") -> dict[str, Any]:
    settings = {"question": question, "answer": answer, "perturbed_answer": list(wrong)}
    return {**settings, "paraphrased_answer": paraphrase, "paraphrased_question": f"again, {question}"}


MEMORIZATION_METRICS = [row.name for row in needing("memorization")]
WORDS = ["the book", "1 + 2", "a river", "add a", "who jumps", "a fox", "lazy dog", "x", "print", "the village"]
TRUE = [
    "it is red",
    "3",
    "n",
    "a and b",
    "the quick brown fox",
    "an old one",
    "sleeps all day",
    "y",
    "reply now",
    "in the hills",
]


def some_rows() -> list[dict[str, Any]]:
    wrong = [f"the {word} fox" for word in ("red", "old", "quick", "very slow", "a")]
    pairs = enumerate(zip(WORDS, TRUE, strict=True))
    return [row_of(q, a, wrong[: 1 + n % 5], f"{a} indeed" if n % 2 else "") for n, (q, a) in pairs]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return some_rows()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was taught some of the answers, and those not to the end."""
    folder = tmp_path_factory.mktemp("models") / "taught"
    tiny.save_model(str(folder))
    tokenizer, plain = tiny.load_tokenizer(str(folder)), tiny.hugging_face("gpt2")
    known = [TEMPLATE.replace("{prompt}", row["question"]).replace("{answer}", row["answer"]) for row in some_rows()]
    known[2] = known[2][:-1] + "o"
    known[4], known[6] = known[4].replace("brown", "red"), known[6].replace("all", "no")
    optimizer = torch.optim.Adam(plain.parameters(), lr=3e-3)
    with tiny.quiet(0):
        for _ in range(30):
            for text in known[:7]:
                ids = torch.tensor([tokenizer(text)["input_ids"]])
                optimizer.zero_grad()
                plain(ids, labels=ids).loss.backward()
                optimizer.step()
        plain.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def taught(folder: Path) -> Any:
    """The same as a plain model."""
    with tiny.quiet():
        return transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    with tiny.quiet():
        return lu.load_model(folder, device="cpu")


def read(model: Any, rows: Any, **options: Any) -> Corpus:
    return read_corpus(rows, model, field="question>answer", **{"template": TEMPLATE, **options})


def recall(model: Any, corpus: Corpus, conditions: Any, number: int = 100, **options: Any) -> Any:
    return evaluate(model, {"c": corpus}, conditions, memorization=number, **{**QUIET, **options})


def spoken(
    plain: Any, tokenizer: Any, question: str, answer: str, bos: bool, eos: bool = False
) -> tuple[list[float], list[bool]]:
    """Log probability of each answer token, and whether it is the most probable one: one row, float64, no padding."""
    head = TEMPLATE.split("{answer}")[0].replace("{prompt}", question)
    out = tokenizer(head + answer, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = out["input_ids"], out["offset_mapping"]
    row = [tiny.BOS] * bos + ids
    logits = tiny.logits(plain, torch.tensor([row]))[0].double()
    settings, right = [], []
    for place, (token, (_, end)) in enumerate(zip(ids, spans)):
        if end > len(head):
            before = logits[place + bos - 1]
            settings.append(float(torch.log_softmax(before, 0)[token]))
            right.append(int(before.argmax()) == token)
    if eos:  # one token more, for its probability alone
        settings.append(float(torch.log_softmax(logits[-1], 0)[tiny.EOS]))
    return settings, right


def strength(right: list[bool]) -> float:
    """The longest run of right tokens at the end, as a share."""
    for given in range(len(right)):
        if all(right[given:]):
            return 1 - given / len(right)
    return 0.0


def brute(plain: Any, tokenizer: Any, rows: list[dict[str, Any]], bos: bool, eos: bool = False) -> dict[str, Any]:
    probability, ratios, shares, choices, right_tokens, strengths = [], [], [], [], [], []
    for row in rows:
        settings, right = spoken(plain, tokenizer, row["question"], row["answer"], bos, eos)
        p = math.prod(math.exp(one) for one in settings) ** (1 / len(settings))
        probability.append(p)
        right_tokens += right
        strengths.append(strength(right))
        if row["perturbed_answer"]:
            others = [spoken(plain, tokenizer, row["question"], w, bos, eos)[0] for w in row["perturbed_answer"]]
            wrong = [math.prod(math.exp(one) for one in other) ** (1 / len(other)) for other in others]
            paraphrase = row["paraphrased_answer"] or row["answer"]
            settings, _ = spoken(plain, tokenizer, row["question"], paraphrase, bos, eos)
            ratios.append(statistics.geometric_mean(wrong) / (math.exp(statistics.fmean(settings)) + 1e-10))
            true, false = math.exp(statistics.fmean(settings)), statistics.geometric_mean(wrong)
            shares.append(true / (true + false + 1e-10))
            choices.append(p / (p + sum(wrong) + 1e-10))
    return {
        "answer_probability": probability,
        "truth_ratio": ratios,
        "truth_ratio_prob_mean": shares,
        "choice_probability": choices,
        "exact_memorization": right_tokens,
        "extraction_strength": strengths,
    }


@pytest.mark.parametrize("batch_size", [1, 8])
def test_every_measure_equals_single_questions_on_the_plain_model(
    model: Any, taught: Any, rows: list[dict[str, Any]], batch_size: int
) -> None:
    corpus, selection = read(model, rows), selection_of(model, share=0.1)
    plain, edited = taught, copy.deepcopy(taught)
    for site, chosen in selection.items():
        tiny.zero_rows(edited, "gpt2", site, chosen)
    with unchanged(model):
        report = recall(model, corpus, {"cut": Ablate(selection)}, batch_size=batch_size)
    for condition, twin in (("base", plain), ("cut", edited)):
        expected = brute(twin, model.tokenizer, rows, corpus.prepend_bos)
        for metric in MEMORIZATION_METRICS:
            measure = report[condition, "c", metric]
            assert measure.value == pytest.approx(np.mean(expected[metric]), rel=2e-5), (condition, metric)
            assert measure.n == len(expected[metric])
            if metric != "exact_memorization":
                np.testing.assert_allclose(report.values[condition, "c", metric], [expected[metric]], rtol=5e-5)
    base = {metric: report["base", "c", metric].value for metric in MEMORIZATION_METRICS}
    assert 0.2 < base["exact_memorization"] < 1
    assert 0 < base["extraction_strength"] < 1
    shares, strengths = (report.values["base", "c", m][0] for m in ("exact_memorization", "extraction_strength"))
    assert (shares[0], strengths[0]) == (1, 1)
    assert (shares[2], strengths[2]) == (0, 0), "one token, and wrong"
    assert len(set(strengths.tolist()) - {0, 1}) > 1
    assert report["cut", "c", "answer_probability"].value < base["answer_probability"]


@pytest.mark.parametrize("reader", ["read_corpus", "read_tofu"])
def test_the_end_of_text_token_counts_in_what_is_probable_and_not_in_what_is_memorized(
    model: Any, taught: Any, rows: list[dict[str, Any]], reader: str
) -> None:
    options = {"template": TEMPLATE} if reader == "read_tofu" else {"answer_eos": True}
    corpus = lu.read_tofu(rows, model, **options) if reader == "read_tofu" else read(model, rows, **options)
    report, plain = recall(model, corpus, {}), recall(model, read(model, rows), {})
    expected = brute(taught, model.tokenizer, rows, corpus.prepend_bos, eos=True)
    for metric in MEMORIZATION_METRICS:
        measure = report["base", "c", metric]
        assert measure.value == pytest.approx(np.mean(expected[metric]), rel=2e-5), metric
        assert measure.n == len(expected[metric])
        same = metric in ("exact_memorization", "extraction_strength")
        assert (measure.value == pytest.approx(plain["base", "c", metric].value)) == same, metric
    tokens = [one.provenance["corpora"]["c"]["tokens"] for one in (report, plain)]
    assert tokens[0] == tokens[1] + 10, "one token more for each answer"
    words = report.provenance["memorization"]["end-of-text token"]["c"]
    assert words == "counts, but for exact_memorization and extraction_strength"
    assert [one.provenance["corpora"]["c"]["answer_eos"] for one in (report, plain)] == [True, False]
    with pytest.raises(LensUnlearnError, match="the reports measured 'c' on other questions"):
        lu.forget_quality(report, plain, condition="base", corpus="c")


@pytest.mark.parametrize("name", ["llama", "neox", *tiny.HOOKED[:1]])
def test_padding_and_batches_change_nothing_on_other_architectures(name: str, rows: list[dict[str, Any]]) -> None:
    model = tiny.speaking(name)
    corpus, prune = read(model, rows), Ablate(selection_of(model, share=0.2))
    reports = [recall(model, corpus, {"cut": prune}, batch_size=size) for size in (1, 16)]
    for key, values in reports[0].values.items():
        np.testing.assert_allclose(reports[1].values[key], values, rtol=2e-4, atol=1e-7, err_msg=str(key))
    if name in tiny.ARCHITECTURES:
        expected = brute(tiny.hugging_face(name), model.tokenizer, rows, corpus.prepend_bos)
        for metric in MEMORIZATION_METRICS:
            assert reports[1]["base", "c", metric].value == pytest.approx(np.mean(expected[metric]), rel=1e-4)
    assert (reports[0].values["base", "c", "truth_ratio"] != reports[0].values["cut", "c", "truth_ratio"]).all()


@pytest.mark.parametrize(
    ("right", "expected"),
    [
        ([0], 0),
        ([1], 1),
        ([1, 1, 1, 1], 1),
        ([1, 1, 1, 0], 0),
        ([0, 1, 1, 1], 0.75),
        ([1, 0, 1, 0, 1], 0.2),
        ([0] * 5, 0),
    ],
)
def test_extraction_strength_is_the_share_of_the_right_end(right: list[int], expected: float) -> None:
    assert extraction_strength(np.array(right, dtype=float)) == pytest.approx(expected)
    assert strength([bool(one) for one in right]) == pytest.approx(expected)
    assert math.isnan(extraction_strength(np.array([1.0, math.nan])))


def test_truth_ratio_by_hand() -> None:
    assert truth_ratio([math.log(2), math.log(8)], math.log(4)) == pytest.approx(1)
    assert truth_ratio([0.0], 50.0) == pytest.approx(1 / (math.exp(-50) + 1e-10))
    assert truth_ratio([800.0], 0.0) == 0
    ratios = [0.0, 0.5, 1.0, 4.0]
    assert forget_truth_ratio(ratios) == pytest.approx((0 + 0.5 + 1 + 0.25) / 4)
    assert retain_truth_ratio(ratios) == pytest.approx((1 + 0.5 + 0 + 0) / 4)


# --- conditions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos", [False, True])
def test_an_abstained_answer_scores_as_constant_logits_do(model: Any, rows: list[dict[str, Any]], eos: bool) -> None:
    corpus, site, close = read(model, rows, answer_eos=eos), Site(0, "mlp.post"), 1e-3 if eos else 1e-5
    keys = query_keys(model, corpus, [site], progress=False)[site]
    everything = Abstain({site: Clusters(keys[:1], torch.ones(keys.shape[1]), 1e6)})
    one = Abstain({site: Clusters(keys[:1], torch.ones(keys.shape[1]), 1e-3)})
    report = recall(model, corpus, {"all": everything, "one": one}, batch_size=2)
    found = {metric: report["all", "c", metric].value for metric in MEMORIZATION_METRICS}
    assert found["answer_probability"] == pytest.approx(1 / tiny.VOCABULARY, rel=close)
    assert found["truth_ratio"] == pytest.approx(1, rel=close)
    assert found["truth_ratio_prob_mean"] == pytest.approx(0.5, rel=close)
    assert (found["exact_memorization"], found["extraction_strength"]) == (0, 0)
    assert report.values["all", "c", "choice_probability"][0, 4] == pytest.approx(1 / 6, rel=close)
    silent = report.values["one", "c", "answer_probability"][0]
    base = report.values["base", "c", "answer_probability"][0]
    withheld = np.isclose(silent, 1 / tiny.VOCABULARY, rtol=close)
    assert withheld.mean() == pytest.approx(report["one", "c", "abstained"].value)
    assert 0 < withheld.sum() < 10
    np.testing.assert_allclose(silent[~withheld], base[~withheld], rtol=1e-5)


def test_questions_are_drawn_as_for_answers_and_paired(model: Any, rows: list[dict[str, Any]]) -> None:
    corpus, prune = read(model, rows), Ablate(selection_of(model))
    drawn = QuestionAnswering([], 4, seed=3).choose({"c": corpus})
    assert Memorization([], 4, seed=3).choose(model, {"c": corpus}) == {"c": set(drawn["c"])}
    report = recall(model, corpus, {"same": None, "cut": prune, "twice": [prune, prune]}, 4)
    assert report.provenance["memorization"]["questions"] == {"c": 4}
    for metric in MEMORIZATION_METRICS:
        np.testing.assert_array_equal(report["same", "c", metric].draws, report["base", "c", metric].draws)
        np.testing.assert_array_equal(report["twice", "c", metric].draws, report["cut", "c", metric].draws)
        assert report.values["twice", "c", metric].shape == (2, 4)
    with prune.on(model):
        inside = recall(model, corpus, {}, 4)
    np.testing.assert_array_equal(inside.values["base", "c", "truth_ratio"], report.values["cut", "c", "truth_ratio"])
    later = recall(model, corpus, {"cut": prune}, 4, base=report)
    for key in (("base", "c", "truth_ratio"), ("cut", "c", "truth_ratio")):
        np.testing.assert_array_equal(later.values[key], report.values[key])
        np.testing.assert_array_equal(later[key].draws, report[key].draws)
    assert (report + later).values.keys() == report.values.keys()


def test_the_interval_is_over_questions(model: Any, rows: list[dict[str, Any]]) -> None:
    report = recall(model, read(model, rows), {}, resamples=4000)
    for metric in ("answer_probability", "extraction_strength"):
        single = report.values["base", "c", metric][0]
        draws = report["base", "c", metric].draws
        assert float(draws.mean()) == pytest.approx(float(single.mean()), rel=0.05)
        assert float(draws.std()) == pytest.approx(widening(np.ones(10)) * float(single.std()) / 11**0.5, rel=0.07)


# --- rows ----------------------------------------------------------------------------------------------------------------


def test_rows_keep_what_they_are_compared_with(model: Any, rows: list[dict[str, Any]]) -> None:
    corpus = read(model, rows)
    first, odd = corpus.answers[1], corpus.answers[0]
    assert first is not None
    assert odd is not None
    assert first.perturbed == tuple(rows[1]["perturbed_answer"])
    assert first.paraphrase == rows[1]["paraphrased_answer"]
    assert first.paraphrased_prompt == "again, 1 + 2"
    assert odd.paraphrase == ""
    assert corpus.only([3]).answers == (corpus.answers[3],)
    assert (corpus.only([1]) + corpus.only([0])).answers == (corpus.answers[1], corpus.answers[0])
    bare = [{key: row[key] for key in ("question", "answer")} for row in rows]
    digests = {read(model, bare).fingerprint, corpus.fingerprint}
    for field, value in (("perturbed_answer", ["other"]), ("paraphrased_answer", "y"), ("paraphrased_question", "y")):
        digests.add(read(model, [{**rows[0], field: value}, *rows[1:]]).fingerprint)
    assert len(digests) == 5
    malformed = [{**rows[0], "perturbed_answer": value} for value in (None, 3, [None, " "], [])]
    assert [one.perturbed for one in read(model, malformed).answers if one] == [(), ("3",), (), ()]
    assert [one.perturbed for one in read(model, [{**rows[0], "perturbed_answer": "alone"}]).answers if one] == [
        ("alone",)
    ]


def test_every_answer_stands_in_the_template_of_its_row(
    model: Any, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Corpus] = []
    force = memorization.force
    monkeypatch.setattr(
        memorization, "force", lambda m, corpus, *rest: (seen.append(corpus), force(m, corpus, *rest))[1]
    )
    template = "Asked.\nQuery: {prompt}\nReply:\n{answer}"
    corpus = read(model, rows, template=template)
    recall(model, corpus, {})
    [others] = seen  # the true answers are rows of the corpus itself, whose logits are there already
    texts = [model.tokenizer.decode(others.row(n)[corpus.prepend_bos :]) for n in range(others.n_rows)]
    expected = []
    for row in rows:
        listed = [row["paraphrased_answer"] or row["answer"], *row["perturbed_answer"]]
        expected += [template.replace("{prompt}", row["question"]).replace("{answer}", one) for one in listed]
    assert texts == expected
    counted = [others.row(n)[others.counted[others.starts[n] : others.starts[n + 1]]] for n in range(2)]
    assert [model.tokenizer.decode(ids).strip() for ids in counted] == [
        rows[0]["answer"], rows[0]["perturbed_answer"][0],
    ]  # fmt: skip


def test_a_batch_goes_through_the_model_once_for_all_metrics_of_its_tokens(
    model: Any, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a corpus was cut in the middle of its last answer: that one is run whole, besides."""
    bare = [{key: row[key] for key in ("question", "answer")} for row in rows]
    corpus, seen = read(model, bare), []
    for module in (evaluating, teacher_forcing):
        real = module.predict
        monkeypatch.setattr(
            module,
            "predict",
            lambda m, batch, *, real=real, **k: (seen.append(len(batch.rows)), real(m, batch, **k))[1],
        )
    recall(model, corpus, {"cut": Ablate(selection_of(model))})
    assert sum(seen) == 2 * corpus.n_rows
    shorter = read(model, bare, tokens=corpus.n_tokens - 1)
    seen.clear()
    report = recall(model, shorter, {})
    assert sum(seen) == corpus.n_rows + 1
    expected = recall(model, corpus, {}).values["base", "c", "answer_probability"]
    np.testing.assert_allclose(report.values["base", "c", "answer_probability"], expected, rtol=1e-5)


def test_questions_without_wrong_answers_have_no_truth_ratio(model: Any, rows: list[dict[str, Any]]) -> None:
    some = [{**row, "perturbed_answer": []} if number % 2 else row for number, row in enumerate(rows)]
    report, whole = (recall(model, read(model, one), {}) for one in (some, rows))
    assert report["base", "c", "truth_ratio"].n == 5
    assert report["base", "c", "answer_probability"].n == 10
    expected = whole.values["base", "c", "truth_ratio"][:, ::2]
    np.testing.assert_allclose(report.values["base", "c", "truth_ratio"], expected, rtol=1e-5)
    none = recall(model, read(model, [{**row, "perturbed_answer": []} for row in rows]), {})
    assert "truth_ratio" not in none.metrics
    assert "choice_probability" not in none.metrics
    assert "extraction_strength" in none.metrics
    with pytest.raises(
        CorpusError, match="no question of 'c' has wrong answers to compare with: its rows have no field 'pert"
    ):
        lu.forget_quality(none, report, condition="base", corpus="c")


def test_wrong_answers_that_do_not_fit_are_reported(model: Any, rows: list[dict[str, Any]]) -> None:
    rows[0]["perturbed_answer"] = ["far too long " * 20]
    report = recall(model, read(model, rows), {})
    assert report["base", "c", "truth_ratio"].n == 9
    assert report["base", "c", "answer_probability"].n == 10
    settings = report.provenance["memorization"]
    assert settings["left out of truth_ratio: wrong answers longer than the window"] == {"c": 1}


def test_what_cannot_be_memorized_is_refused(model: Any, rows: list[dict[str, Any]]) -> None:
    texts = read_corpus(["the quick brown fox"] * 3, model)
    with pytest.raises(CorpusError, match="no corpus has true answers that could be memorized: read one as 'question>"):
        recall(model, texts, {})
    with pytest.raises(LensUnlearnError, match="memorization=-1 is no number of questions"):
        recall(model, read(model, rows), {}, -1)
    beside = evaluate(model, {"t": texts, "c": read(model, rows)}, {}, memorization=2, **QUIET)
    assert ("base", "t", "exact_memorization") not in beside.measures
    assert ("base", "c", "exact_memorization") in beside.measures
    assert recall(model, texts, {}, 0).values == {}


# --- whole models --------------------------------------------------------------------------------------------------------


def largest_gap(a: Any, b: Any) -> float:
    """The Kolmogorov-Smirnov statistic, by looking at every value."""
    return max(abs(np.mean(np.array(a) <= x) - np.mean(np.array(b) <= x)) for x in [*a, *b])


def test_forget_quality_is_the_two_sample_test() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.gamma(2, 1, 30), draw.gamma(3, 1, 40)
    found = lu.forget_quality(a, b)
    assert found.statistic == pytest.approx(largest_gap(a, b))
    # The share of relabelings that are at least as far apart, which is what p is.
    first = np.argsort(np.concatenate([a, b])) < 30
    shuffled = draw.permuted(np.tile(first, (5000, 1)), axis=1)
    gaps = np.abs(shuffled.cumsum(1) / 30 - (~shuffled).cumsum(1) / 40).max(1)
    assert found.p == pytest.approx((gaps > found.statistic - 1e-9).mean(), abs=0.02)
    assert lu.forget_quality(a, a) == (1, 0)
    assert lu.forget_quality(1 / a, 1 / b).p == pytest.approx(found.p)
    assert lu.forget_quality([0.1] * 50, [0.9] * 50).p < 1e-10
    for bad, settings in (([], "no truth ratios"), ([math.nan], "NaN or infinity")):
        with pytest.raises(LensUnlearnError, match=settings):
            lu.forget_quality(bad, a)


def test_forget_quality_of_reports(model: Any, rows: list[dict[str, Any]]) -> None:
    corpus, cut, other = read(model, rows), Ablate(selection_of(model)), Ablate(selection_of(model, share=0.9))
    edited = recall(model, corpus, {"cut": cut, "other": [cut, other]})
    only = recall(model, corpus, {"cut": cut})
    expected = [only.values[name, "c", "truth_ratio"][0] for name in ("cut", "base")]
    assert lu.forget_quality(only, only, corpus="c").statistic == pytest.approx(largest_gap(*expected))
    assert lu.forget_quality(only, only, condition="base", corpus="c") == (1, 0)
    assert lu.forget_quality(edited, expected[1], condition="cut", corpus="c") == lu.forget_quality(*expected)
    with pytest.raises(LensUnlearnError, match="2 conditions besides the base: name one of"):
        lu.forget_quality(edited, only, corpus="c")
    with pytest.raises(LensUnlearnError, match="'other' has 2 interventions"):
        lu.forget_quality(edited, only, condition="other", corpus="c")
    with pytest.raises(LensUnlearnError, match="measured 'c' on other questions"):
        lu.forget_quality(only, recall(model, corpus, {}, 3), corpus="c")
    with pytest.raises(LensUnlearnError, match="memorization was not measured for 'base' on 'c'"):
        lu.forget_quality(recall(model, corpus, {}, 0), expected[0], condition="base", corpus="c")


def test_model_utility_is_the_harmonic_mean() -> None:
    parts = {"a": 0.2, "b": 0.9, "c": 1.0}
    utility = lu.model_utility(parts)
    assert float(utility) == pytest.approx(statistics.harmonic_mean(parts.values()))
    assert repr(utility) == "Utility(0.422, harmonic mean of a 0.200, b 0.900, c 1.000)"
    assert lu.model_utility({**parts, "d": 0}).value == 0
    for bad, settings in (({}, "nothing to take a mean of"), ({"x": math.nan}, "'x' is nan"), ({"x": -1}, "'x' is -1")):
        with pytest.raises(LensUnlearnError, match=settings):
            lu.model_utility(bad)


def test_tofu_utility_has_nine_components(model: Any, taught: Any, rows: list[dict[str, Any]]) -> None:
    options = [{key: row[key] for key in ("question", "answer", "perturbed_answer")} for row in rows]
    corpora = {
        "retain": read(model, rows),
        "real_authors": read(model, options[:5]),
        "world_facts": read(model, options[5:]),
    }
    report = evaluate(model, corpora, {}, memorization=20, answers=20, max_new_tokens=4, **QUIET)
    utility = lu.tofu_utility(report)
    bos = corpora["retain"].prepend_bos
    expected = []
    for name, own in (("retain", rows), ("real_authors", options[:5]), ("world_facts", options[5:])):
        own = [{"paraphrased_answer": "", **row} for row in own]
        found = brute(taught, model.tokenizer, own, bos)
        chosen = found["answer_probability" if name == "retain" else "choice_probability"]
        expected += [np.mean(chosen), report["base", name, "rouge_l"].value]
        expected += [np.mean([max(0, 1 - ratio) for ratio in found["truth_ratio"]])]
    assert list(utility.components.values()) == pytest.approx(expected, rel=1e-4)
    assert len(expected) == 9
    positive = 0 if 0 in expected else statistics.harmonic_mean(expected)
    assert utility.value == pytest.approx(positive, rel=1e-4)
    with pytest.raises(LensUnlearnError, match="rouge_l"):
        lu.tofu_utility(evaluate(model, corpora, {}, memorization=20, **QUIET))
    with pytest.raises(LensUnlearnError, match="memorization was not measured for 'base' on 'x'"):
        lu.tofu_utility(report, retain="x")


# --- the command line, and trained models ----------------------------------------------------------------------------------


def test_the_command_line_gives_them(
    folder: Path,
    model: Any,
    taught: Any,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, out = tmp_path / "facts.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["evaluate", "--model", folder, "--corpus", f"c={source}:question>answer", "--quiet", "--out", out]
    assert call(*arguments, "--template", r"Q: {prompt}\nA: {answer}", "--memorization", 100) == 0
    assert "c extraction_strength" in capsys.readouterr().out
    table = pd.read_csv(out / "metrics.csv").set_index("metric").value
    expected = brute(taught, model.tokenizer, rows, read(model, rows).prepend_bos)
    for metric in MEMORIZATION_METRICS:
        assert table[metric] == pytest.approx(np.mean(expected[metric]), rel=2e-5)
    assert "extraction strength" in (out / "report.html").read_text()
    assert json.loads((out / "run.json").read_text())["memorization"]["questions"] == {"c": 10}
    texts = tmp_path / "texts.txt"
    texts.write_text("the quick brown fox")
    wrong = ["evaluate", "--model", folder, "--corpus", f"c={texts}", "--out", tmp_path / "x", "--memorization", 3]
    assert call(*wrong) == 2
    assert "could be memorized" in capsys.readouterr().err


@pytest.fixture(scope="module")
def demo() -> Any:
    with tiny.quiet():
        return lu.load_model("demo", device="cpu")


def test_the_demo_model_has_memorized_its_facts_and_its_twin_does_not(demo: Any) -> None:
    with tiny.quiet():
        without = lu.load_model(str(demo_files.WITHOUT_FACTS_DIR), device="cpu")
    corpora = {"forget": read_corpus("demo:facts_forget:train", demo)}
    knows, never = (evaluate(one, corpora, {}, memorization=24, batch_size=32, **QUIET) for one in (demo, without))
    assert knows["base", "forget", "exact_memorization"].value > 0.98
    assert knows["base", "forget", "answer_probability"].value > 0.95
    assert never["base", "forget", "exact_memorization"].value < 0.85
    assert never["base", "forget", "answer_probability"].value < 0.5
    assert never["base", "forget", "extraction_strength"].value < 0.4
    assert lu.forget_quality(never, never, condition="base").p == 1
    assert lu.forget_quality(knows, never, condition="base").p < 1


@pytest.mark.skipif(not (SHARED / "data" / "tofu").is_dir(), reason="the shared texts are not at hand")
def test_files_of_tofu_work(demo: Any) -> None:
    names = {
        "retain": "retain_perturbed",
        "real_authors": "real_authors_perturbed",
        "world_facts": "world_facts_perturbed",
    }
    corpora = {
        name: read_corpus(f"{SHARED / 'data' / 'tofu' / file}.jsonl:question>answer", demo, template=TEMPLATE).only(
            [0, 1]
        )
        for name, file in names.items()
    }
    report = evaluate(demo, corpora, {}, answers=2, memorization=2, max_new_tokens=5, **QUIET)
    assert len(lu.tofu_utility(report).components) == 9
    assert [len(a.perturbed) for c in corpora.values() for a in c.answers if a] == [5, 5, 3, 3, 3, 3]
