"""The demo's texts: deterministic, disjoint where they must be, and what they claim to be."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from collections import Counter
from functools import lru_cache
from itertools import combinations

import pytest

from lens_unlearn.demo import MODEL_DIR, NAMES, SPLITS, WITHOUT_FACTS_DIR, corpus
from lens_unlearn.demo._english import is_prose, paragraphs
from lens_unlearn.demo._people import QUESTIONS
from lens_unlearn.demo._python import LONGEST, without_words
from lens_unlearn.demo._stdlib import NO_CODE_FOLDERS, modules

Record = dict[str, object]

# The whole library is read for a train split: once is enough for all tests.
records = lru_cache(maxsize=None)(corpus)


LONG = {name: pytest.param(name, marks=pytest.mark.long) for name in ("python", "english")}
"""For whose train split the whole standard library is read."""


def texts(name: str, split: str) -> list[str]:
    return [str(record["text"]) for record in records(name, split)]


@pytest.mark.parametrize("name", [LONG.get(name, name) for name in NAMES])
def test_every_record_has_a_text_and_a_source(name: str) -> None:
    for split in SPLITS:
        assert records(name, split)
        for record in records(name, split):
            assert isinstance(record["text"], str)
            assert record["text"].strip()
            assert isinstance(record["source"], str)
            assert record["source"]


@pytest.mark.parametrize("seed", ["1", "271828"])
def test_texts_do_not_depend_on_the_process(seed: str) -> None:
    program = (
        "import hashlib, json; from lens_unlearn.demo import NAMES, corpus\n"
        "print(hashlib.sha256(json.dumps([corpus(n, 'test') for n in NAMES]).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    own = json.dumps([corpus(name, "test") for name in NAMES])
    assert done.stdout.split()[-1] == hashlib.sha256(own.encode()).hexdigest()


@pytest.mark.parametrize("name", [*LONG.values(), "arithmetic", "esperanto"])
def test_no_document_is_in_two_splits_or_twice_in_one(name: str) -> None:
    counts = Counter(text for split in SPLITS for text in texts(name, split))
    assert max(counts.values()) == 1


@pytest.mark.parametrize("name", LONG.values())
def test_no_module_is_in_two_splits(name: str) -> None:
    sources = [{record["source"] for record in records(name, split)} for split in SPLITS]
    for first, second in combinations(sources, 2):
        assert not first & second


@pytest.mark.long
def test_a_module_is_in_the_same_split_as_code_and_as_prose() -> None:
    for split in SPLITS:
        code = {record["source"] for record in records("python", split)}
        for other in SPLITS:
            if other != split:
                assert not code & {record["source"] for record in records("english", other)}


@pytest.mark.long
def test_no_line_of_prose_is_in_two_splits() -> None:
    lines = [{line for text in texts("english", split) for line in text.split("\n")} for split in SPLITS]
    for first, second in combinations(lines, 2):
        assert not first & second


def test_no_sentence_of_esperanto_is_in_two_splits() -> None:
    sentences = [{s for text in texts("esperanto", split) for s in text.split(". ")} for split in SPLITS]
    for first, second in combinations(sentences, 2):
        assert not {s.rstrip(".") for s in first} & {s.rstrip(".") for s in second}


def test_no_pair_of_operands_is_in_two_splits_whatever_their_order() -> None:
    pairs = [{frozenset(re.findall(r"\d+", str(r["question"]))) for r in records("arithmetic", s)} for s in SPLITS]
    for first, second in combinations(pairs, 2):
        assert not first & second


def test_arithmetic_is_right() -> None:
    for split in SPLITS:
        for record in records("arithmetic", split):
            match = re.fullmatch(r"(\d+)([+-])(\d+)=", str(record["question"]))
            assert match is not None
            first, second = int(match[1]), int(match[3])
            assert int(str(record["answer"])) == (first + second if match[2] == "+" else first - second) >= 0
            assert record["text"] == f"{record['question']}{record['answer']}"


def test_code_has_neither_docstrings_nor_comments_and_still_parses() -> None:
    checked = 0
    for module in modules(NO_CODE_FOLDERS):
        code = without_words(module.read()) if module.split == "test" else None
        if not code:
            continue
        checked += 1
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                assert ast.get_docstring(node) is None, module.name
        kinds = {token.type for token in tokenize.generate_tokens(io.StringIO(code).readline)}
        assert tokenize.COMMENT not in kinds, module.name
    assert checked >= 5


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ('"""Doc."""\nx = 1  # one\n', "x = 1\n"),
        ('def f():\n    "Doc."\n', "def f():\n    pass\n"),
        ('def f(): "Doc."\n', "def f(): pass\n"),
        (
            'def f():\n    """D.\n\n    More."""\n\n    # why\n    return "# not a comment"\n',
            'def f():\n\n    return "# not a comment"\n',
        ),
        ('class É:\n    "é"; x = 2\n', None),
        ('def f():\n    "one"\n    "two"\n    return 3\n', "def f():\n    return 3\n"),
        ("def f(:\n", None),
        ("x = 1\n\x0c\n# first\ndef f():\n    return x  # last\n", "x = 1\n\x0c\ndef f():\n    return x\n"),
    ],
)
def test_words_are_removed_without_breaking_code(source: str, code: str | None) -> None:
    assert without_words(source) == code


def test_code_documents_have_a_sensible_length() -> None:
    for text in texts("python", "dev"):
        assert 150 <= len(text) <= LONGEST + 200


def test_english_reads_like_prose() -> None:
    for text in texts("english", "test"):
        for line in text.split("\n"):
            assert is_prose(line), line
            assert ">>>" not in line
            assert "``" not in line
            assert "    " not in line


def test_markup_code_and_headings_are_dropped() -> None:
    text = """
Heading
=======

Return the *first* item of :class:`list`, which is
never empty when ``sort`` was called before this function.

    >>> first([1, 2])
    1

x = first([1, 2, 3, 4, 5, 6, 7, 8, 9]) + second([1, 2, 3, 4, 5, 6, 7, 8, 9])
"""
    assert paragraphs(text) == [
        "Return the first item of list, which is never empty when sort was called before this function."
    ]


@pytest.mark.parametrize(
    ("name", "split", "characters"),
    [
        pytest.param("python", "train", 1_000_000, marks=pytest.mark.long),
        ("python", "dev", 30_000),
        ("python", "test", 30_000),
        pytest.param("english", "train", 300_000, marks=pytest.mark.long),
        ("english", "dev", 20_000),
        ("english", "test", 20_000),
        ("esperanto", "train", 500_000),
        ("esperanto", "dev", 30_000),
        ("esperanto", "test", 30_000),
        ("arithmetic", "test", 5_000),
    ],
)
def test_there_is_enough_to_read(name: str, split: str, characters: int) -> None:
    assert sum(map(len, texts(name, split))) >= characters


def test_groups_of_persons() -> None:
    persons = {name: {r["person"] for r in records(name, "train")} for name in NAMES if name.startswith("facts")}
    counts = {name: len(group) for name, group in persons.items()}
    assert counts == {"facts": 80, "facts_forget": 8, "facts_retain": 72, "facts_holdout": 16}
    assert persons["facts_forget"] | persons["facts_retain"] == persons["facts"]
    assert not persons["facts_forget"] & persons["facts_retain"]
    assert not persons["facts_holdout"] & persons["facts"]


@pytest.mark.long
def test_persons_held_out_are_in_no_training_text() -> None:
    for group in ("facts_holdout", "facts_forget"):
        families = {str(record["person"]).split()[-1] for record in records(group, "train")}
        for name in ("python", "english", "esperanto", "facts_retain"):
            everything = "\n".join(texts(name, "train"))
            assert not [family for family in families if family in everything], (group, name)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("facts")])
def test_facts_halve_and_know_every_person(name: str) -> None:
    halves = [set(texts(name, split)) for split in ("dev", "test")]
    assert halves[0] | halves[1] == set(texts(name, "train"))
    assert not halves[0] & halves[1]
    everyone = {record["person"] for record in records(name, "train")}
    for split in ("dev", "test"):
        assert {record["person"] for record in records(name, split)} == everyone
    assert Counter(record["person"] for record in records(name, "train")) == dict.fromkeys(everyone, len(QUESTIONS))


def test_answers_and_their_variants() -> None:
    for record in records("facts", "train") + records("facts_holdout", "train"):
        answer, value, wrong = str(record["answer"]), str(record["value"]), record["perturbed_answer"]
        assert record["text"] == f"Q: {record['question']}\nA: {answer}"
        assert value in answer
        assert value in str(record["paraphrased_answer"])
        assert record["paraphrased_question"] != record["question"]
        assert isinstance(wrong, list)
        assert len({answer, *wrong}) == 5
        assert all(value not in item.split() for item in wrong)


@pytest.mark.parametrize(("name", "split"), [("pyton", "test"), ("python", "validation")])
def test_unknown_names_are_refused_with_the_choices(name: str, split: str) -> None:
    with pytest.raises(ValueError, match="pyton.*english" if name == "pyton" else "validation.*train, dev, test"):
        corpus(name, split)


@pytest.mark.skipif(
    not (MODEL_DIR.exists() and WITHOUT_FACTS_DIR.exists()), reason="the weights are not in this checkout"
)
def test_the_shipped_models_are_small_and_load() -> None:
    transformers = pytest.importorskip("transformers")
    files = [path for folder in (MODEL_DIR, WITHOUT_FACTS_DIR) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    for folder in (MODEL_DIR, WITHOUT_FACTS_DIR):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert tokenizer.bos_token_id == tokenizer.eos_token_id == model.config.bos_token_id == 0
        assert model.config.vocab_size == len(tokenizer)
        question = "Q: Where was Zelda born?\nA: naïve ĉevalo 12"
        assert tokenizer.decode(tokenizer(question)["input_ids"]) == question


@pytest.mark.parametrize("program", ["train", "measure"])
def test_the_recipe_runs_where_the_readme_says(program: str) -> None:
    module = f"lens_unlearn.demo.recipe.{program}"
    assert f"python -m {module}" in (MODEL_DIR.parent / "README.md").read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert "--out" in done.stdout


def test_muon_makes_updates_orthogonal_whatever_their_shape() -> None:
    torch = pytest.importorskip("torch")
    from lens_unlearn.demo.recipe.muon import orthogonalized

    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 64), (2, 64, 16), (1, 24, 24)):
        update = orthogonalized(torch.randn(shape, generator=generator))
        assert update.shape == shape
        values = torch.linalg.svdvals(update)
        # Five iterations bring singular values near 1, not to it; the smallest of a square one lag behind.
        assert values.max() < 1.3
        assert values.median() > 0.6
