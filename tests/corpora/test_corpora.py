"""Corpora: every kind of source gives the same documents, exactly the right tokens count, and nothing is lost in silence."""

import csv
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import lens_unlearn as lu
from lens_unlearn import demo
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.corpora.reading import read_corpus

TEXTS = ["the quick brown fox", "def add(a, b):\n    return a + b", "ünïcödé ✓ text", "one two three four five"]
PAIRS = [("who wrote it?", "Ann Smith"), ("where is it?", "by the slow river"), ("2 + 2?", "4")]


def decoded(corpus: Corpus, model: Any) -> list[str]:
    """The documents of a corpus as texts."""
    documents: dict[int, list[int]] = {}
    for row in range(corpus.n_rows):
        ids = corpus.row(row).tolist()
        documents.setdefault(int(corpus.document[row]), []).extend(ids[corpus.prepend_bos :])
    return [model.tokenizer.decode(ids) for _, ids in sorted(documents.items())]


def write(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("<|endoftext|>".join(row["text"] for row in rows), encoding="utf-8")
    return path


# --- sources -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".txt"])
def test_every_file_type_gives_the_same_documents(model: Any, tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix, [{"text": text} for text in TEXTS])
    for source in (path, str(path)):
        corpus = read_corpus(source, model)
        assert decoded(corpus, model) == TEXTS
        assert corpus.fingerprint == read_corpus(TEXTS, model).fingerprint
        assert corpus.name == f"rows{suffix}"
        assert not corpus.skipped


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_field_is_named_in_the_source_or_beside_it(model: Any, tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix, [{"id": "x", "body": text} for text in TEXTS])
    assert decoded(read_corpus(f"{path}:body", model), model) == TEXTS
    assert decoded(read_corpus(path, model, field="body"), model) == TEXTS
    with pytest.raises(CorpusError, match="has no field 'text': its fields are id, body"):
        read_corpus(path, model)
    with pytest.raises(CorpusError, match="has no field 'boby': its fields are id, body"):
        read_corpus(f"{path}:boby", model)


def test_a_path_that_holds_a_colon_is_a_path(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt:text"
    path.mkdir()
    inside = write(path, ".jsonl", [{"text": text} for text in TEXTS])
    assert decoded(read_corpus(inside, model), model) == TEXTS


def test_a_text_file_is_cut_at_blank_lines_or_at_its_separator(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one two\nthree\n\n\n  four five\n \nsix seven\n")
    assert decoded(read_corpus(path, model), model) == ["one two\nthree", "four five", "six seven"]
    path.write_text("one two\n\nthree<|endoftext|>\nfour five\n<|endoftext|>")
    assert decoded(read_corpus(path, model), model) == ["one two\n\nthree", "four five"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: TEXTS,
        lambda: tuple(TEXTS),
        lambda: iter(TEXTS),
        lambda: (text for text in TEXTS),
        lambda: [{"text": text} for text in TEXTS],
        lambda: ({"text": text, "n": 1} for text in TEXTS),
        lambda: datasets.Dataset.from_dict({"text": TEXTS}),
        lambda: datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
        lambda: datasets.IterableDataset.from_generator(lambda: ({"text": t} for t in TEXTS)),
    ],
    ids=[
        "list",
        "tuple",
        "iterator",
        "generator",
        "rows",
        "row generator",
        "Dataset",
        "iterable Dataset",
        "IterableDataset",
    ],
)
def test_every_iterable_gives_the_same_documents(model: Any, make: Any) -> None:
    corpus = read_corpus(make(), model)
    assert decoded(corpus, model) == TEXTS
    assert corpus.fingerprint == read_corpus(TEXTS, model).fingerprint


def test_a_generator_is_read_no_further_than_the_budget_needs(model: Any) -> None:
    read: list[int] = []

    def endless() -> Any:
        while True:
            read.append(1)
            yield "the quick brown fox"

    corpus = read_corpus(endless(), model, tokens=30)
    assert corpus.n_tokens == 30
    assert len(read) <= 1000


@pytest.mark.parametrize("source", [b"bytes", {"text": "a"}, {}, {"text": {"a": 1}}, {"text": 1}, 3, None, 1.5])
def test_what_is_no_source_is_refused(model: Any, source: Any) -> None:
    with pytest.raises(CorpusError, match="is not a text source: pass a path, or an iterable of strings"):
        read_corpus(source, model)


def test_a_misspelled_file_suggests_the_nearest(model: Any, tmp_path: Path) -> None:
    write(tmp_path, ".jsonl", [{"text": "a b"}])
    for wrong in ("row.jsonl", "rows.json", "rowz.jsonl:text"):
        with pytest.raises(CorpusError, match=r"there is no file .*: did you mean rows\.jsonl\?"):
            read_corpus(str(tmp_path / wrong), model)
    with pytest.raises(CorpusError, match="no such folder"):
        read_corpus(str(tmp_path / "nowhere" / "rows.jsonl"), model)
    with pytest.raises(CorpusError, match="that folder has no such file"):
        read_corpus(str(tmp_path / "zzzzzzzzzzzzzzzzzzzzzzz.csv"), model)


def test_files_that_cannot_be_read_are_refused(model: Any, tmp_path: Path) -> None:
    for name, data, message in [
        ("a.txt", b"", "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.csv", b"", "is empty"),
        ("a.txt", b" \n\n ", "is empty"),
        ("a.txt", b"fine\n\n\xff\xfe broken", r"is not UTF-8 text \(byte 6\)"),
        ("a.jsonl", b"{broken", "cannot be read"),
        ("a.jsonl", b'{"text": "\xff"}', "cannot be read|not UTF-8"),
        ("a.parquet", b"nonsense", "cannot be read"),
        ("a.docx", b"PK", "is not a file that can be read: give one of .jsonl, .json, .csv, .parquet, .txt"),
        ("a", b"text", "is not a file that can be read"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CorpusError, match=message):
            read_corpus(tmp_path / name, model)
    with pytest.raises(CorpusError, match="is not a file that can be read"):
        read_corpus(tmp_path, model)


def test_a_row_that_breaks_later_is_named(model: Any, tmp_path: Path) -> None:
    def rows() -> Any:
        yield "a fine text"
        yield "another one"
        raise OSError("the disk is gone")

    with pytest.raises(CorpusError, match="row 3 or later of generator cannot be read: OSError: the disk is gone"):
        read_corpus(rows(), model)


def test_the_hub_out_of_reach_is_said_in_a_sentence(model: Any) -> None:
    with pytest.raises(CorpusError, match=r"hf:no-such/dataset:train:text cannot be loaded from the hub: \w+"):
        read_corpus("hf:no-such/dataset:train:text", model)


def test_an_unknown_demo_lists_those_there_are(model: Any) -> None:
    with pytest.raises(CorpusError, match=r"demo:klingon.*python"):
        read_corpus("demo:klingon", model)


# --- rows without text -------------------------------------------------------------------------------------------------


def test_rows_without_text_are_counted_and_said(model: Any) -> None:
    texts = ["good text", None, "", "   \n", {7}, "more text", ["list"]]
    for source in (
        texts,
        [{"text": t} for t in texts],
        [{"text": "good text"}, *[{"text": t} for t in texts[1:]], None],
    ):
        corpus = read_corpus(source, model)
        assert decoded(corpus, model) == ["good text", "more text"]
        assert corpus.skipped == {"empty or not text": 5 + (source[-1] is None)}
        assert f"skipped {5 + (source[-1] is None)}" in repr(corpus)


def test_a_row_lacking_the_field_is_counted(model: Any) -> None:
    corpus = read_corpus([{"text": "good text"}, {"other": "x"}, "a string among rows", {"text": "more"}], model)
    assert decoded(corpus, model) == ["good text", "more"]
    assert corpus.skipped == {"empty or not text": 2}


def test_nothing_usable_says_why(model: Any) -> None:
    with pytest.raises(CorpusError, match="list is empty"):
        read_corpus([], model)
    with pytest.raises(
        CorpusError, match="holds no text that can be used: 2 empty or not text, 1 shorter than two tokens"
    ):
        read_corpus([None, "", "a"], model, prepend_bos=False)
    assert read_corpus(["a"], model, prepend_bos=True).n_tokens == 1


# --- budget, window, BOS ---------------------------------------------------------------------------------------------------


@given(st.integers(2, 200), st.integers(4, 64), st.booleans())
def test_the_budget_is_met_exactly(loaded: Any, tokens: int, window: int, bos: bool) -> None:
    corpus = read_corpus(TEXTS * 30, loaded, tokens=tokens, window=window, prepend_bos=bos)
    assert corpus.n_tokens == tokens
    assert int(corpus.starts.diff().max()) <= window
    everything = [i for text in TEXTS * 30 for i in loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert corpus.tokens[corpus.counted].tolist() == everything[:tokens]


@given(st.integers(4, 64), st.booleans(), st.integers(1, 150))
def test_long_documents_are_cut_into_rows_without_loss(loaded: Any, window: int, bos: bool, words: int) -> None:
    text = "the fox " * words
    corpus = read_corpus([text, "short text"], loaded, window=window, prepend_bos=bos)
    assert decoded(corpus, loaded) == [text, "short text"]
    assert int(corpus.starts.diff().max()) <= window
    assert corpus.n_documents == 2
    for row in range(corpus.n_rows):
        counted = corpus.counted[int(corpus.starts[row]) : int(corpus.starts[row + 1])]
        assert bool(counted[bos:].all())
        if bos:
            assert corpus.row(row)[0] == tiny.BOS
            assert not counted[0]


def test_bos_is_the_models_default_and_can_be_set(model: Any) -> None:
    assert read_corpus(TEXTS, model).prepend_bos is True
    with_bos, without = (read_corpus(TEXTS, model, prepend_bos=b) for b in (True, False))
    assert len(with_bos.tokens) == len(without.tokens) + len(TEXTS)
    assert with_bos.n_tokens == without.n_tokens
    assert with_bos.fingerprint != without.fingerprint
    assert "with BOS" in repr(with_bos)
    assert "no BOS" in repr(without)


def test_a_tokenizer_without_bos_prepends_none_unless_asked(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.tokenizer), "bos_token_id", None, raising=False)
    assert read_corpus(TEXTS, model).prepend_bos is False
    with pytest.raises(CorpusError, match="this tokenizer has no BOS token"):
        read_corpus(TEXTS, model, prepend_bos=True)


NO_NUMBERS = (1, 0, -5, 2.5, True, False, "100", float("nan"), float("inf"), [3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 2}, "window=2 does not fit this model: from 3 to 64 tokens"),
        ({"window": 65}, "window=65 does not fit"),
        *(({"tokens": n}, f"tokens={n!r} is no number of tokens: give a whole number, at least 2") for n in NO_NUMBERS),
        *(({"window": n}, f"window={n!r} is no number of tokens: give a whole number, at least 2") for n in NO_NUMBERS),
        *(({"shuffle": n}, f"shuffle={n!r} is no number of documents") for n in NO_NUMBERS),
        *(({"seed": n}, f"seed={n!r} is no seed: give a whole number from 0") for n in (-5, 2.5, True, "1")),
        *(({"group": n}, f"group={n!r} names no groups: give a field, or a whole number") for n in (2.5, True, ["a"])),
        ({"group": -1}, "-1 rows make no group"),
        *(({name: 3}, f"{name}=3 is a int: give a string") for name in ("field", "template", "name")),
        ({"count": "some"}, "count='some' is not known"),
        ({"template": "{prompt}"}, "must hold {prompt} and end with {answer}"),
        ({"template": "{answer} {prompt}"}, "must hold {prompt} and end with {answer}"),
        ({"field": "text"}, "plain strings, which have no field 'text'"),
    ],
)
def test_options_that_cannot_be_are_refused(model: Any, options: Any, message: str) -> None:
    with pytest.raises(CorpusError, match=re.escape(message)):
        read_corpus(TEXTS, model, **{"prepend_bos": True, **options})


NO_COUNTS = NO_NUMBERS[1:]


@pytest.mark.parametrize(
    ("ask", "wrong", "message"),
    [
        (lambda c, n: c.with_prompts(n), NO_COUNTS, "tokens={n!r} makes no prompt: give a whole number, at least 1"),
        (lambda c, n: c.with_prompts(seed=n), (-5, 2.5, True, "1"), "seed={n!r} is no seed"),
        (lambda c, n: c.split(1, 1, seed=n), (-5, 2.5, True, "1"), "seed={n!r} is no seed"),
        (lambda c, n: c.sample(5, n), (-5, 2.5, True, "1"), "seed={n!r} is no seed"),
        (lambda c, n: c.sample(n), NO_COUNTS, "tokens={n!r} is no number of anything"),
        (lambda c, n: c.sample(5, units=n), NO_COUNTS, "units={n!r} is no number of anything"),
        (lambda c, n: c.first(n), NO_COUNTS, "tokens={n!r} is no number of anything"),
        (
            lambda c, n: c.batches(n),
            NO_COUNTS,
            "batch_size={n!r} is no number of rows: give a whole number, at least 1",
        ),
        (
            lambda c, n: c.split(n, 1),
            (0, -1, True, "1", float("nan"), [0.5]),
            "split({n!r}, 1): share={n!r} is no part: give a number above 0",
        ),
        (lambda c, n: c.split(*n), ((0, 0),), "split(0, 0): share=0 is no part: give a number above 0"),
        (lambda c, n: c.split(*n), ((),), "split() names no parts: give their shares, as split(0.6, 0.4)"),
        (
            lambda c, n: c.row(n),
            (4, -1, 1.0, True, "0", None),
            "there is no row of list with the index {n!r}: they are 0 to 3",
        ),
        (lambda c, n: c.prompt(n), (4, -1), "there is no row of list with the index {n!r}: they are 0 to 3"),
        (lambda c, n: c.answer(n), (4, -1), "there is no row of list with the index {n!r}: they are 0 to 3"),
        (lambda c, n: c.take([0, n]), (4, -1), "there is no row of list with the index {n!r}: they are 0 to 3"),
        (lambda c, n: c.take(n), ([],), "no row of list was asked for"),
        (
            lambda c, n: c.only([0, n]),
            (4, -1, 0.0, True),
            "there is no document of list with the index {n!r}: they are 0 to 3",
        ),
        (lambda c, n: c.only(n), (3,), "3 is no list of indices: give several, as [3]"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused_at_once(model: Any, ask: Any, wrong: Any, message: str) -> None:
    corpus = read_corpus(TEXTS, model)
    for n in wrong:
        with pytest.raises(CorpusError) as error:
            ask(corpus, n)
        assert str(error.value).startswith(message.replace("{n!r}", repr(n)))
        assert "\n" not in str(error.value)
    assert next(corpus.batches(np.int64(2))).rows.tolist()
    assert len(corpus.split(np.float32(1), 1)) == 2


def test_a_model_without_tokenizer_is_refused() -> None:
    with pytest.raises(CorpusError, match="this model has no tokenizer"):
        read_corpus(TEXTS, tiny.model("gpt2"))


def test_a_corpus_of_another_vocabulary_is_refused(model: Any) -> None:
    from dataclasses import replace

    corpus = read_corpus(TEXTS, model)
    corpus.check(model)
    with pytest.raises(CorpusError, match="was tokenized with another vocabulary"):
        replace(corpus, vocabulary="0" * 16).check(model)


# --- questions and answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", "rows"])
@pytest.mark.parametrize(
    "template", ["{prompt} {answer}", "Q: {prompt}\nA: {answer}", "{prompt}{answer}", "<{prompt}>\t{answer}"]
)
def test_the_answers_tokens_count_character_by_character(
    model: Any, tmp_path: Path, suffix: str, template: str
) -> None:
    rows = [{"question": q, "answer": a} for q, a in PAIRS]
    source = f"{write(tmp_path, suffix, rows)}:question>answer" if suffix != "rows" else rows
    options = {"field": "question>answer"} if suffix == "rows" else {}
    corpus = read_corpus(source, model, template=template, **options)
    assert corpus.n_documents == len(PAIRS)
    for number, (question, answer) in enumerate(PAIRS):
        ids = corpus.row(number).tolist()
        counted = corpus.counted[int(corpus.starts[number]) : int(corpus.starts[number + 1])].tolist()
        begin = corpus.prepend_bos
        text = template.replace("{answer}", "\0").replace("{prompt}", question).replace("\0", answer)
        assert model.tokenizer.decode(ids[begin:]) == text
        # The oracle: walk over the characters each token stands for.
        head, at = len(text) - len(answer), 0
        assert not any(counted[:begin])
        for i, yes in zip(ids[begin:], counted[begin:], strict=True):
            at += len(model.tokenizer.decode([i]))
            assert yes == (at > head), (text, model.tokenizer.decode([i]))
        first = counted.index(True)
        assert corpus.prompt(number).tolist() == ids[:first]


def test_count_all_counts_the_prompt_as_well(model: Any) -> None:
    rows = [{"q": q, "a": a} for q, a in PAIRS]
    everything, answers = (read_corpus(rows, model, field="q>a", count=c) for c in ("all", "answer"))
    assert torch.equal(everything.tokens, answers.tokens)
    assert everything.n_tokens > answers.n_tokens
    assert everything.n_tokens == len(everything.tokens) - everything.n_documents * everything.prepend_bos


@pytest.mark.parametrize("count", ["answer", "all"])
def test_the_end_of_text_token_behind_an_answer_counts_where_asked(model: Any, count: Any) -> None:
    rows = [*({"q": q, "a": a} for q, a in PAIRS), {"q": "ends", "a": "already<eos>"}]
    plain, ended = (read_corpus(rows, model, field="q>a", count=count, answer_eos=eos) for eos in (False, True))
    assert (plain.answer_eos, ended.answer_eos) == (None, tiny.EOS)
    assert plain.fingerprint != ended.fingerprint
    assert (plain.keys, plain.answers) == (ended.keys, ended.answers)
    for row in range(plain.n_rows):
        added = [] if row == len(PAIRS) else [tiny.EOS]
        assert ended.row(row).tolist() == plain.row(row).tolist() + added
        counted = [c.counted[c.starts[row] : c.starts[row + 1]].tolist() for c in (plain, ended)]
        # An end that the text writes itself is no text, but for where ends are to count.
        assert counted[1] == (counted[0] if added else counted[0][:-1]) + [True]
        assert added or not counted[0][-1]
        assert ended.prompt(row).tolist() == plain.prompt(row).tolist()
        assert ended.ends_with_eos(row) == (count == "answer")
        assert not plain.ends_with_eos(row)
    texts = [read_corpus(TEXTS, model, answer_eos=eos) for eos in (False, True)]
    assert texts[0].fingerprint == texts[1].fingerprint, "plain texts have no answers"
    cut = read_corpus(rows, model, field="q>a", count=count, answer_eos=True, tokens=ended.n_tokens - 1)
    assert not cut.ends_with_eos(cut.n_rows - 1)


def test_answers_with_and_without_an_end_are_not_joined(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, texts = [{"q": q, "a": a} for q, a in PAIRS], read_corpus(TEXTS, model)
    plain, ended = (read_corpus(rows, model, field="q>a", answer_eos=eos) for eos in (False, True))
    with pytest.raises(CorpusError, match="only one has answers that end with the end-of-text token: read both with"):
        _ = plain + ended
    for one in (plain, ended):
        assert (texts + one).answer_eos == (one + texts).answer_eos == (one + one).answer_eos == one.answer_eos
    assert ended.only([1]).answer_eos == ended.answer_eos
    assert ended.with_prompts(1).answer_eos is None
    monkeypatch.setattr(type(model.tokenizer), "eos_token_id", None, raising=False)
    with pytest.raises(CorpusError, match="answer_eos=True, but this tokenizer has no end-of-text token"):
        read_corpus(rows, model, field="q>a", answer_eos=True)


def test_braces_in_questions_and_answers_stay_as_they_are(model: Any) -> None:
    corpus = read_corpus([{"q": "what is {answer}?", "a": "{prompt} {0}"}], model, field="q>a")
    assert decoded(corpus, model) == ["what is {answer}? {prompt} {0}"]


def test_pairs_that_lack_a_part_or_do_not_fit_are_counted(model: Any) -> None:
    rows = [
        {"q": "who?", "a": "Ann"},
        {"q": "who?", "a": None},
        {"q": "", "a": "Ann"},
        {"q": "long " * 80, "a": "Ann"},
        None,
    ]
    corpus = read_corpus(rows, model, field="q>a")
    assert corpus.n_documents == 1
    assert corpus.skipped == {"empty or not text": 3, "prompt and answer longer than the window": 1}
    with pytest.raises(CorpusError, match="has no field 'b': its fields are q, a"):
        read_corpus(rows, model, field="q>b")
    with pytest.raises(CorpusError, match="more than a prompt and an answer"):
        read_corpus(rows, model, field="q>a>b")


def test_a_text_counts_whole_even_where_a_token_stands_for_no_character(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metaspace tokenizers begin with a token of no width; such a text has no prompt and must not be taken for a pair."""
    from transformers import BatchEncoding

    real = type(model.tokenizer).__call__

    def with_empty_first(self: Any, texts: Any, **options: Any) -> Any:
        out = real(self, texts, **options)
        if not options.get("return_offsets_mapping"):
            return out
        return BatchEncoding(
            {
                "input_ids": [[9, *ids] for ids in out["input_ids"]],
                "offset_mapping": [[(0, 0), *spans] for spans in out["offset_mapping"]],
            }
        )

    monkeypatch.setattr(type(model.tokenizer), "__call__", with_empty_first)
    corpus = read_corpus(["the fox " * 100], model, window=32)
    assert corpus.n_documents == 1
    assert corpus.n_tokens == len(corpus.tokens) - corpus.n_rows * corpus.prepend_bos


# --- fingerprint -----------------------------------------------------------------------------------------------------------


def test_fingerprints_change_with_anything_that_matters(model: Any) -> None:
    base = read_corpus(TEXTS, model)
    others = [
        read_corpus(TEXTS[::-1], model),
        read_corpus(TEXTS[:-1], model),
        read_corpus([*TEXTS[:-1], TEXTS[-1] + "."], model),
        read_corpus(TEXTS, model, window=8),
        read_corpus(TEXTS, model, tokens=base.n_tokens - 1),
        read_corpus(TEXTS, model, prepend_bos=not base.prepend_bos),
        read_corpus(["".join(TEXTS[:2]), *TEXTS[2:]], model),
    ]
    assert base.only([0, 1, 2]).fingerprint == others[1].fingerprint
    prints = [corpus.fingerprint for corpus in (base, *others)]
    assert len(set(prints)) == len(prints)
    assert read_corpus(TEXTS, model, name="another name").fingerprint == base.fingerprint


SCRIPT = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, sys.argv[2])
from types import SimpleNamespace
import tiny
from lens_unlearn.corpora.reading import read_corpus
model = SimpleNamespace(tokenizer=tiny.load_tokenizer(sys.argv[1]), cfg=SimpleNamespace(n_ctx=64, d_vocab=320))
corpus = read_corpus([t * 3 for t in tiny.TEXTS], model, window=16)
parts = corpus.split(0.5, 0.3, 0.2, seed=3)
print(corpus.fingerprint, *[part.fingerprint for part in parts], corpus.sample(40).fingerprint)
"""


def test_fingerprints_and_splits_are_the_same_in_every_process(model_dir: Path) -> None:
    seen = set()
    for seed in ("0", "77"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, str(model_dir), str(Path(__file__).parents[1] / "helpers")],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        seen.add(done.stdout)
    assert len(seen) == 1
    assert len(seen.pop().split()) == 5


# --- splitting, taking out, sampling -----------------------------------------------------------------------------------


def many(model: Any, n: int = 40) -> Corpus:
    return read_corpus([f"document number {i} {'word ' * (i % 7)}" for i in range(n)], model)


@pytest.mark.parametrize("shares", [(0.6, 0.4), (0.5, 0.25, 0.25), (1, 1, 1, 1), (0.9, 0.1)])
def test_a_split_deals_out_every_document_once_in_about_the_shares(model: Any, shares: Any) -> None:
    corpus = many(model)
    parts = corpus.split(*shares, seed=1)
    keys = [key for part in parts for key in part.keys]
    assert sorted(keys) == sorted(corpus.keys)
    assert sum(part.n_tokens for part in parts) == corpus.n_tokens
    for part, share in zip(parts, shares, strict=True):
        assert part.n_tokens / corpus.n_tokens == pytest.approx(share / sum(shares), abs=0.06)
        assert set(decoded(part, model)) <= set(decoded(corpus, model))


def test_a_split_is_seeded_and_does_not_depend_on_the_order_of_documents(model: Any) -> None:
    texts = [f"document number {i}" for i in range(30)]
    one, other = read_corpus(texts, model).split(0.5, 0.5), read_corpus(texts[::-1], model).split(0.5, 0.5)
    assert [set(part.keys) for part in one] == [set(part.keys) for part in other]
    again = read_corpus(texts, model).split(0.5, 0.5, seed=1)
    assert set(again[0].keys) != set(one[0].keys)
    assert [p.fingerprint for p in one] == [p.fingerprint for p in read_corpus(texts, model).split(0.5, 0.5)]


def test_equal_documents_fall_into_one_part(model: Any) -> None:
    texts = [f"document number {i % 10}" for i in range(60)]
    parts = read_corpus(texts, model).split(0.5, 0.5)
    assert not set(parts[0].keys) & set(parts[1].keys)
    assert sum(part.n_documents for part in parts) == 60


def test_a_long_documents_rows_stay_together(model: Any) -> None:
    corpus = read_corpus([f"{i} " + "word " * 60 for i in range(8)], model, window=16)
    assert corpus.n_rows > 20
    for part in corpus.split(0.5, 0.5):
        assert all(text in decoded(corpus, model) for text in decoded(part, model))


def test_too_few_documents_to_split_are_refused(model: Any) -> None:
    with pytest.raises(CorpusError, match="has 1 distinct documents, too few to split into 2 parts"):
        read_corpus(["the same text"] * 5, model).split(0.5, 0.5)


def test_taking_out_what_other_corpora_hold(model: Any) -> None:
    corpus, other = read_corpus(["a b", "c d", "e f", "c d"], model), read_corpus(["c d", " e f "], model)
    rest, taken = corpus.without(other)
    assert decoded(rest, model) == ["a b"]
    assert taken == 3
    assert corpus.without(read_corpus(["x y"], model)) == (corpus, 0)
    with pytest.raises(CorpusError, match="every document of .* is also in"):
        other.without(corpus)


def test_only_keeps_documents_in_order_with_their_rows(model: Any) -> None:
    corpus = read_corpus(TEXTS, model, window=4)
    part = corpus.only([3, 1])
    assert decoded(part, model) == [TEXTS[1], TEXTS[3]]
    assert part.document.tolist() == sorted(part.document.tolist())
    with pytest.raises(CorpusError, match="no document"):
        corpus.only([])


def test_a_sample_of_so_many_units_adds_a_row_of_each_that_is_missing(loaded: Any) -> None:
    texts = [" ".join([f"word{n}"] * 60) for n in range(12)]
    corpus = lu.read_corpus(texts, loaded, window=16)
    assert corpus.n_rows > 3 * corpus.n_documents
    few = corpus.sample(5, 3)
    for units in (1, 4, 12, 99):
        part = corpus.sample(5, 3, units=units)
        assert part.n_documents == max(few.n_documents, min(units, 12))
        assert part.n_rows == few.n_rows + part.n_documents - few.n_documents
        assert set(few.keys) <= set(part.keys)
        assert part.fingerprint == corpus.sample(5, 3, units=units).fingerprint
    grouped = replace(corpus, groups=tuple(str(n % 3) for n in range(12)))
    assert len(set(grouped.sample(5, 3, units=99).units)) == 3


@given(st.integers(1, 400), st.integers(0, 3))
def test_a_sample_holds_at_least_the_tokens_asked_for_and_hardly_more(loaded: Any, tokens: int, seed: int) -> None:
    corpus = many(loaded)
    part = corpus.sample(tokens, seed)
    assert part.n_tokens >= min(tokens, corpus.n_tokens)
    longest = int(corpus.starts.diff().max())
    assert part.n_tokens < tokens + longest or part is corpus
    assert set(part.keys) <= set(corpus.keys)
    assert part.fingerprint == corpus.sample(tokens, seed).fingerprint


@given(st.integers(1, 400))
def test_first_takes_whole_documents_from_the_beginning(loaded: Any, tokens: int) -> None:
    corpus = many(loaded)
    part = corpus.first(tokens)
    assert part.keys == corpus.keys[: part.n_documents]
    assert part.n_tokens >= min(tokens, corpus.n_tokens)
    if part.n_documents > 1:
        assert corpus.only(range(part.n_documents - 1)).n_tokens < tokens


def test_a_sum_holds_the_documents_of_both(model: Any) -> None:
    one, other = read_corpus(TEXTS[:2], model, window=4), read_corpus(TEXTS[2:], model, window=8)
    both = one + other
    assert decoded(both, model) == TEXTS
    assert both.n_tokens == one.n_tokens + other.n_tokens
    assert both.n_rows == one.n_rows + other.n_rows
    assert both.window == 8
    with pytest.raises(CorpusError, match="were tokenized differently"):
        one + read_corpus(TEXTS, model, prepend_bos=not one.prepend_bos)


# --- prompts -------------------------------------------------------------------------------------------------------------

documents_of = st.lists(st.integers(1, 60), min_size=1, max_size=20)


def cuts(corpus: Corpus) -> dict[tuple[int, ...], int]:
    """Where each row's prompt ends, by the row's tokens."""
    return {tuple(corpus.row(row).tolist()): len(corpus.prompt(row)) for row in range(corpus.n_rows)}


@given(documents_of, st.booleans(), st.integers(0, 5), st.floats(0, 0.5))
def test_a_prompt_is_a_rows_beginning_and_leaves_something_to_predict(
    lengths: list[int], bos: bool, seed: int, uncounted: float
) -> None:
    corpus = tiny.corpus(lengths, bos=bos, uncounted=uncounted)
    if max(lengths) < 2:
        with pytest.raises(CorpusError, match="no row of tiny is longer than a prompt of 1 tokens: give longer texts"):
            corpus.with_prompts(seed=seed)
        return
    cut = corpus.with_prompts(seed=seed)
    assert cut.has_prompts
    long = [row for row in range(corpus.n_rows) if lengths[row] > 1]
    assert [cut.row(row).tolist() for row in range(cut.n_rows)] == [corpus.row(row).tolist() for row in long]
    assert cut.keys == tuple(corpus.keys[row] for row in long)
    for row in range(cut.n_rows):
        counted = cut.counted[int(cut.starts[row]) : int(cut.starts[row + 1])]
        length, prompt = lengths[long[row]], len(cut.prompt(row)) - bos
        assert cut.prompt(row).tolist() == cut.row(row)[: bos + prompt].tolist()
        assert counted.tolist() == [False] * (bos + prompt) + [True] * (length - prompt)
        room = min(4, length // 2)
        assert room <= prompt
        assert length - prompt >= 1
        assert length - prompt >= room or length < 8
    assert cut.n_tokens == int(cut.counted.sum())


@given(documents_of, st.booleans(), st.integers(1, 20))
def test_prompts_of_a_length_leave_out_the_rows_that_are_no_longer(lengths: list[int], bos: bool, tokens: int) -> None:
    corpus = tiny.corpus(lengths, bos=bos)
    longer = [length for length in lengths if length > tokens]
    if not longer:
        with pytest.raises(CorpusError, match=f"is longer than a prompt of {tokens} tokens"):
            corpus.with_prompts(tokens)
        return
    cut = corpus.with_prompts(tokens)
    assert [len(cut.prompt(row)) for row in range(cut.n_rows)] == [tokens + bos] * len(longer)
    assert cut.n_tokens == sum(longer) - tokens * len(longer)


@given(st.integers(0, 100), st.integers(0, 100))
def test_a_rows_cut_depends_on_the_row_and_the_seed_and_not_on_what_else_is_there(seed: int, other: int) -> None:
    from dataclasses import replace

    corpus = tiny.corpus([12, 30, 9, 60, 25, 31, 8, 17])
    corpus = replace(corpus, document=torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]), keys=("a", "b", "c"))
    whole = cuts(corpus.with_prompts(seed=seed))
    reordered = corpus.only([2]) + corpus.only([0, 1])
    for part in (*corpus.split(0.5, 0.5, seed=other), corpus.sample(60, seed=other), corpus.only([1]), reordered):
        found = cuts(part.with_prompts(seed=seed))
        assert found == {row: whole[row] for row in found}
        assert len(found) == part.n_rows
    before = cuts(corpus.with_prompts(seed=seed).sample(20, seed=other))
    assert before == {row: whole[row] for row in before}


def test_cuts_are_spread_over_the_row_and_other_seeds_cut_elsewhere() -> None:
    corpus = tiny.corpus([23] * 800)
    places = [length - 1 for length in cuts(corpus.with_prompts()).values()]
    counts = [places.count(place) for place in range(4, 20)]
    assert sum(counts) == 800
    assert sum((count - 50) ** 2 / 50 for count in counts) < 15 + 4 * 30**0.5
    others = [length - 1 for length in cuts(corpus.with_prompts(seed=1)).values()]
    assert sum(a == b for a, b in zip(places, others, strict=True)) < 100


@pytest.mark.parametrize("bos", [True, False])
def test_queries_are_the_prompts_alone_and_their_last_tokens_count(model: Any, bos: bool) -> None:
    pairs = [{"q": question, "a": answer} for question, answer in PAIRS]
    for corpus in (
        read_corpus(pairs, model, field="q>a", template="Q: {prompt}\nA: {answer}", prepend_bos=bos),
        read_corpus(TEXTS, model, prepend_bos=bos).with_prompts(seed=3),
    ):
        assert corpus.has_prompts
        queries = corpus.queries()
        assert queries.n_rows == corpus.n_rows
        assert queries.keys == corpus.keys
        assert queries.n_tokens == queries.n_rows
        for row in range(corpus.n_rows):
            assert queries.row(row).tolist() == corpus.prompt(row).tolist()
            counted = queries.counted[int(queries.starts[row]) : int(queries.starts[row + 1])]
            assert counted.tolist() == [False] * (len(counted) - 1) + [True]
        assert "prompts of" in queries.name
    question = read_corpus(pairs, model, field="q>a", template="Q: {prompt}\nA: {answer}", prepend_bos=bos).queries()
    assert model.tokenizer.decode(question.row(0)[bos:].tolist()).startswith("Q: who wrote it?\nA:")


def test_texts_have_no_prompts_and_say_so(model: Any) -> None:
    for bos in (True, False):
        texts = read_corpus(TEXTS, model, prepend_bos=bos)
        assert not texts.has_prompts
        with pytest.raises(CorpusError, match=r"has no prompts: read it as 'question>answer', or cut its texts with"):
            texts.queries()
    mixed = read_corpus(TEXTS, model) + read_corpus(TEXTS, model).with_prompts(seed=1)
    assert not mixed.has_prompts, "not every row has one"
    assert mixed.queries().n_rows == len(TEXTS)
    for tokens in (0, -3):
        with pytest.raises(CorpusError, match=f"tokens={tokens} makes no prompt: give a whole number, at least 1"):
            texts.with_prompts(tokens)


def test_a_text_that_is_cut_has_no_true_answer_any_more(model: Any) -> None:
    pairs = [{"q": f"what is the number after {n}?", "a": "it is the next one, of course"} for n in range(3)]
    corpus = read_corpus(pairs, model, field="q>a")
    assert corpus.answer(0) is not None
    cut = corpus.with_prompts(3)
    assert cut.answer(0) is None
    assert corpus.queries().answer(0) is None
    assert cut.fingerprint != corpus.fingerprint


@given(documents_of, st.integers(1, 9))
def test_places_name_every_token_and_no_two_alike(lengths: list[int], batch_size: int) -> None:
    corpus = tiny.corpus(lengths)
    named: dict[int, set[tuple[int, int]]] = {}
    for batch in corpus.batches(batch_size):
        documents, places = corpus.places(batch)
        assert len(documents) == len(places) == batch.tokens.numel()
        pairs = list(zip(documents.tolist(), places.tolist(), strict=True))
        width = batch.tokens.shape[1]
        for i, row in enumerate(batch.rows.tolist()):
            length = int(corpus.starts[row + 1] - corpus.starts[row])
            named[row] = set(pairs[i * width : i * width + length])
            assert len(named[row]) == length
            assert len({document for document, _ in named[row]}) == 1
    assert len(set().union(*named.values())) == len(corpus.tokens)
    [again] = [corpus.places(batch) for batch in corpus.only([0]).batches(1)]
    assert set(zip(*(part.tolist() for part in again), strict=True)) == named[0]


# --- batches -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 9), st.booleans())
def test_batches_hold_every_row_once_and_nothing_else_counts(lengths: list[int], batch_size: int, bos: bool) -> None:
    corpus = tiny.corpus(lengths, bos=bos, uncounted=0.2)
    rows: list[int] = []
    for batch in corpus.batches(batch_size):
        assert batch.tokens.shape == batch.counted.shape
        assert batch.tokens.numel() <= batch_size * max(corpus.starts.diff().tolist())
        for tokens, counted, row in zip(batch.tokens, batch.counted, batch.rows.tolist(), strict=True):
            length = int(corpus.starts[row + 1] - corpus.starts[row])
            assert torch.equal(tokens[:length], corpus.row(row))
            assert torch.equal(counted[:length], corpus.counted[corpus.starts[row] : corpus.starts[row + 1]])
            assert not counted[length:].any()
            rows.append(row)
    assert sorted(rows) == list(range(len(lengths)))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(1, 40))
def test_a_batch_ends_where_padding_costs_more_than_a_pass(lengths: list[int], batch_size: int) -> None:
    corpus = tiny.corpus(lengths)
    rows = corpus.starts.diff().tolist()
    full = batch_size * max(rows)
    shapes = [(corpus.starts.diff()[batch.rows].tolist(), batch.tokens.numel()) for batch in corpus.batches(batch_size)]
    assert all(size - sum(held) <= max(full / 64, 32) for held, size in shapes)
    assert sorted(rows, reverse=True) == [length for held, _ in shapes for length in held]
    for (held, _), (after, _) in itertools.pairwise(shapes):
        more = [*held, after[0]]
        size = max(more) * len(more)
        assert size > full or size - sum(more) > max(full // 64, 32), "one row more would have cost less than a pass"


def test_errors_are_value_errors_of_one_family(model: Any) -> None:
    with pytest.raises(LensUnlearnError):
        lu.read_corpus([], model)
    assert issubclass(LensUnlearnError, ValueError)


def test_the_demos_questions_are_asked_as_they_were_trained() -> None:
    model = lu.load_model("demo")
    rows = demo.corpus("facts", "test")
    for source, text in (
        ("demo:facts:test", rows[0]["text"]),
        ("demo:facts:test:paraphrased_question>paraphrased_answer", None),
        ("demo:arithmetic:test:question>answer", demo.corpus("arithmetic", "test")[0]["text"]),
    ):
        corpus = read_corpus(source, model, tokens=100, prepend_bos=False)
        text_of_row = model.tokenizer.decode(corpus.row(0).tolist())
        assert text_of_row == (text or f"Q: {rows[0]['paraphrased_question']}\nA: {rows[0]['paraphrased_answer']}")
    other = read_corpus("demo:facts:test", model, tokens=100, prepend_bos=False, template="{prompt} {answer}")
    assert model.tokenizer.decode(other.row(0).tolist()) == f"{rows[0]['question']} {rows[0]['answer']}"
