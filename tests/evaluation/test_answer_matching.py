"""Scoring of answers: normalisation, numbers, ROUGE-L against a plain longest common subsequence, and where answers end."""

import json
import unicodedata
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lens_unlearn.corpora.corpus import Answer
from lens_unlearn.evaluation.answer_matching import (
    Ending,
    ends_in_number,
    exact_match,
    last_number,
    normalize,
    numeric_match,
    program,
    rouge_l,
)

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        (" \n\t ", ""),
        ("Hello, World!", "hello world"),
        ("the  quick\n\nbrown\tfox", "quick brown fox"),
        ("An apple a day", "apple day"),
        ("theatre another", "theatre another"),
        ("A", "a"),  # a choice, not an article
        ("The A", "the a"),
        ("a.", "a"),
        ("+", "+"),
        ("...", "..."),
        ("Straße", "strasse"),
        ("ＡＢＣ１２", "abc12"),
        ("café", "café"),
        ("\u201cquoted\u201d \u2014 dash", "quoted dash"),
        ("\u00bfQu\u00e9?", "qué"),
        ("don't", "dont"),
        ("well-known", "wellknown"),
        ("-5", "-5"),
        ("(-5)", "-5"),
        ("\u22125", "-5"),
        ("-$5", "-5"),
        ("7-5", "7-5"),
        ("C++, the language", "c++language"),
        ("a = b", "a=b"),
        ("東京、大阪。", "東京大阪"),
        ("3.14.", "3.14"),
        (".5", ".5"),
        ("1,250.50", "1250.50"),
        ("3/4", "3/4"),
        ("either/or", "eitheror"),
        ("a\u00a0b", "b"),
    ],
)
def test_normalization(text: str, expected: str) -> None:
    assert normalize(text) == expected


@given(st.text())
def test_what_is_normalized_has_no_case_no_outer_space_and_is_nothing_only_for_nothing(text: str) -> None:
    made = normalize(text)
    assert made == " ".join(made.split())
    assert made == unicodedata.normalize("NFKC", made)
    assert (made == "") == (unicodedata.normalize("NFKC", text).strip() == "")
    assert exact_match(text, text)
    assert exact_match(f" {text}\n", text)


@given(st.lists(st.sampled_from(["Fox", "fox", "the", "jumps", "over", "12", "x"]), min_size=2, max_size=6))
def test_case_articles_and_punctuation_between_words_do_not_matter(words: list[str]) -> None:
    bare = [word for word in words if word != "the"]
    if bare:
        assert exact_match("! ".join(words).upper() + "?", " ".join(bare))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *[("5", "-5"), ("1.5", "15"), ("Paris", "Paris France"), ("", "a"), ("", "Paris"), ("A", "The")],
        *[("C++", "C"), ("C++", "C#"), ("F#", "F"), ("A+", "A"), ("O+", "O-"), ("O-", "O"), ("x < y", "x > y")],
        *[("a != b", "a = b"), ("x^2", "x2"), ("2*3", "23"), ("foo_bar", "foobar"), ("10:30", "1030"), ("1,2", "12")],
        *[("2-3", "23"), ("-x", "x"), ("a -> b", "a > b"), ("東京", "大阪"), ("~/a", "a"), ("a\\b", "ab")],
    ],
)
def test_different_answers_do_not_match(one: str, other: str) -> None:
    assert not exact_match(one, other)
    if len(one) > 1:
        assert not exact_match(f"It is {other}.", f"it is {one}")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *[("x<y", "x < y"), ("2+2", "2 + 2"), ("**Paris**", "Paris"), ("_Paris_.", "paris"), ("`foo`", "foo")],
        *[("1,234,567", "1234567"), ("1,2,3", "1, 2, 3"), ("1914\u20131918", "1914 - 1918"), ("- Paris", "Paris")],
        *[("50%", "50"), ("$5", "5"), ("AT&T", "ATT"), ("U.S.", "US"), ("東京 タワー", "東京タワー")],
        *[("東京、大阪。", "東京 大阪"), ("สวัสดี ครับ", "สวัสดีครับ"), ("the C++ language", "C++ language")],
    ],
)
def test_answers_that_differ_in_writing_alone_match(one: str, other: str) -> None:
    assert exact_match(one, other)


@pytest.mark.parametrize(
    ("text", "truth", "recall"),
    [
        ("東京です", "東京", 1.0),
        ("日本の首都", "日本の首都は東京", 5 / 8),
        ("コーヒーを飲む", "コーヒーが好き", 4 / 7),
        ("北京", "中国的首都是北京", 2 / 8),
        ("กรุงเทพ", "กรุงเทพมหานคร", 6 / 12),
        ("ພາສາ", "ພາສາລາວ", 4 / 7),
        ("iPhoneを買う 2024年", "iPhone 2024 年", 1.0),
        ("हिन्दी भाषा", "हिन्दी साहित्य", 1 / 2),
        ("über café", "cafe", 0.0),
    ],
)
def test_words_of_scripts_without_spaces_are_their_characters(text: str, truth: str, recall: float) -> None:
    assert rouge_l(text, truth)[0] == pytest.approx(recall)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("no number", None),
        ("", None),
        ("72", 72),
        ("0", 0),
        ("007", 7),
        ("he has 3, she has 4.", 4),
        ("1,234,567 people", 1234567),
        ("$2,125.50.", Fraction(4251, 2)),
        ("1,2,3", 3),
        ("12,34", 34),
        ("1234,567", 567),
        ("3.", 3),
        ("3.0", 3),
        (".25", Fraction(1, 4)),
        ("-.5", Fraction(-1, 2)),
        ("x = -5", -5),
        ("7-5", 5),
        ("7 - 5", 5),
        ("f(2)-5", 5),
        ("-$5", -5),
        ("$-5", -5),
        ("\u22127", -7),
        ("--5", -5),
        ("3/4", Fraction(3, 4)),
        ("-3/4.", Fraction(-3, 4)),
        ("3/0", 0),
        ("50%", 50),
        ("12.05.1990", 1990),
        ("\u0663", 3),
        ("10\u00b2", 10),
        ("5 dozen\n#### 60\nQuestion: 7 and 8", 60),
        ("#### \n#### 4", 4),
        ("#### none\nso 9", 9),
        ("####-3", -3),
        ("#### 1,000", 1000),
        ("1/3 or so", Fraction(1, 3)),
    ],
)
def test_the_last_number(text: str, number: int | Fraction | None) -> None:
    assert last_number(text) == number


@given(st.integers(-(10**12), 10**12), st.integers(0, 999))
def test_a_number_is_read_as_it_was_written(whole: int, thousandths: int) -> None:
    exact = Fraction(abs(whole) * 1000 + thousandths, 1000) * (-1 if whole < 0 else 1)
    for written in (f"{whole}.{thousandths:03d}", f"{whole:,}.{thousandths:03d}"):
        assert last_number(f"so it is {written}") == exact
        assert last_number(f"first 12, then {written}.") == exact
        assert ends_in_number(written)
        assert numeric_match(f"= {written}.", written)


def test_numbers_are_compared_by_value_and_a_missing_one_never_matches() -> None:
    assert numeric_match("it is 0.75", "3/4")
    assert numeric_match("18.00", "#### 18")
    assert not numeric_match("18", "#### -18")
    assert not numeric_match("", "#### 18")
    assert not numeric_match("no number", "no number")


def test_a_number_may_be_longer_than_python_converts_at_once() -> None:
    assert last_number("9" * 6000) == 10**6000 - 1
    assert numeric_match("9" * 6000 + ".50", "9" * 6000 + ".5")


def test_which_texts_end_in_a_number() -> None:
    assert all(map(ends_in_number, ["72", "#### 72", "The year was 1926.", "5 %", "(3)", "1/2\n"]))
    assert not any(map(ends_in_number, ["72 eggs", "", "none", "3rd", "#### 5 cm"]))


@pytest.mark.skipif(not GSM8K.is_file(), reason="the shared texts are not at hand")
def test_every_answer_of_gsm8k_ends_in_the_number_behind_its_mark() -> None:
    answers = [json.loads(line)["answer"] for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    assert len(answers) > 1000
    for answer in answers:
        assert ends_in_number(answer)
        assert last_number(answer) == int(answer.split("####")[1].replace(",", ""))


# --- ROUGE-L -------------------------------------------------------------------------------------------------------------


def common(a: list[str], b: list[str]) -> int:
    """The longest common subsequence, by trying every way."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + common(a[1:], b[1:])
    return max(common(a[1:], b), common(a, b[1:]))


WORDS = st.lists(st.sampled_from(["fox", "dog", "ran", "red", "café", "日", "भाषा", "7"]), max_size=6)


@given(WORDS, WORDS)
def test_rouge_l_is_the_longest_common_subsequence(text: list[str], truth: list[str]) -> None:
    recall, f_measure = rouge_l(" ".join(text), "; ".join(truth).upper())
    shared = common(text, truth)
    assert recall == pytest.approx(shared / len(truth) if truth else 0)
    assert f_measure == pytest.approx(2 * shared / (len(text) + len(truth)) if shared else 0)


@given(st.text(alphabet=st.characters(max_codepoint=127)), st.text(alphabet=st.characters(max_codepoint=127)))
def test_in_ascii_rouge_l_is_the_librarys(text: str, truth: str) -> None:
    from rouge_score import rouge_scorer

    expected = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True).score(truth, text)["rougeL"]
    assert rouge_l(text, truth) == (expected.recall, expected.fmeasure)


def test_rouge_l_stems_and_an_empty_answer_earns_nothing() -> None:
    assert rouge_l("running foxes", "run fox") == (1.0, 1.0)
    assert rouge_l("", "run fox") == (0.0, 0.0)
    assert rouge_l("e\u0301tude", "\u00e9tude") == (1.0, 1.0)


# --- where an answer ends ------------------------------------------------------------------------------------------------


def test_an_answer_ends_with_its_line_where_the_true_ones_are_lines() -> None:
    lines = Ending.of([Answer("Paris"), Answer(" Rome.\n")])
    assert lines.line
    assert lines.cut(" Paris. \nIt is") == "Paris."
    assert lines.cut("\n\n Paris\r\nIt") == "Paris"
    assert lines.cut("") == lines.cut(" \n ") == ""
    assert "first line break" in str(lines)
    several = Ending.of([Answer("1 + 1\n= 2"), Answer("2")])
    assert not several.line
    assert several.cut(" a\n\nb\r\nc ") == "a\n\nb\nc"
    assert Ending.of([Answer("one line")] * 99 + [Answer("two\nlines")]).line, "one in a hundred is an exception"
    assert not Ending.of([Answer("one line")] * 97 + [Answer("two\nlines")]).line


def test_an_answer_ends_where_the_next_prompt_begins() -> None:
    ending = Ending(line=False)
    assert ending.cut("x = 2\n#### 2\n\n  Question: why?\nmore", "Question:") == "x = 2\n#### 2"
    assert ending.cut("the Question: is\nnot one", "Question:") == "the Question: is\nnot one"
    assert ending.cut("Question: at once", "Question:") == ""
    assert ending.cut("a\n[INST] b", "[INST]") == "a"


def test_the_program_in_an_answer() -> None:
    assert program("x = 1\ny = 2") == "x = 1\ny = 2"
    assert program("Here:\n```python\nx = 1\n```\nand\n```\ny\n```") == "x = 1\n"
    assert program("```\nx = 1\n") == "x = 1\n"
    assert program("x = '``` no fence'") == "x = '``` no fence'"
