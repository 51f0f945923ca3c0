"""Sources: whatever holds the texts, they are read as it spells them, or refused in a sentence; nothing is taken for another."""

import csv
import gzip
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_corpora import PAIRS, TEXTS, decoded, write

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.corpora.sources import open_source
from lens_unlearn.methods.tuning import check_units

ROWS = [{"text": text} for text in TEXTS]
SUFFIXES = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"]


def put(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows to a file in the format of its name, whatever the name is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    if kind == "tsv":
        made = path.parent / "rows.tsv"
        with made.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        made = write(path.parent, f".{kind}", rows)
    data = made.read_bytes()
    made.unlink()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pa.Codec("zstd").compress(data, asbytes=True)
    path.write_bytes(data)
    return path


def answers(corpus: Any) -> list[str]:
    return [answer.text for answer in corpus.answers]


# --- paths ---------------------------------------------------------------------------------------------------------------

SIGNS = ["data[1]", "a?b", "a*b", "{a,b}", "[!x]", "a[", "**", "~x", "a b", "a%20b", "hf", "d[0]/x*y"]


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".jsonl.gz", ".txt.zst"])
@pytest.mark.parametrize("name", SIGNS)
def test_a_path_that_exists_is_that_file(model: Any, tmp_path: Path, name: str, suffix: str) -> None:
    for beside in ("data1", "axb", "a", "b", "d0/x1y", "x"):
        put(tmp_path / f"{beside}{suffix}", [{"text": "not this one"}])
    path = put(tmp_path / f"{name}{suffix}", ROWS)
    for source in (path, str(path), [path]):
        assert decoded(read_corpus(source, model), model) == TEXTS


def test_brackets_are_never_a_pattern(model: Any, tmp_path: Path) -> None:
    put(tmp_path / "data1.jsonl", ROWS)
    with pytest.raises(CorpusError, match=r"there is no file .*data\[1\]\.jsonl: did you mean data1\.jsonl\?"):
        read_corpus(tmp_path / "data[1].jsonl", model)
    put(tmp_path / "x[1]a.jsonl", [{"text": "in brackets"}])
    put(tmp_path / "x1b.jsonl", [{"text": "not this one"}])
    assert decoded(read_corpus(f"{tmp_path}/x[1]*.jsonl", model), model) == ["in brackets"]


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """A folder of three files with fields and groups."""
    folder = tmp_path / "texts"
    for file, part in enumerate(("a", "b", "c")):
        rows = [
            {"text": f"{part} text {n}", "q": f"{part} {n}?", "a": f"it is {n}", "who": f"W{(file + n) % 2}"}
            for n in range(3)
        ]
        put(folder / f"{part}.jsonl", rows)
    return folder


ALL = [f"{part} text {n}" for part in "abc" for n in range(3)]


@pytest.mark.parametrize(
    "source",
    [
        lambda folder: folder,
        lambda folder: f"{folder}",
        lambda folder: f"{folder}/",
        lambda folder: f"{folder}:text",
        lambda folder: f"{folder}/*.jsonl",
        lambda folder: folder / "?.jsonl",
        lambda folder: f"{folder.parent}/**/*.jsonl:text",
        lambda folder: [f"{folder}/{part}.jsonl" for part in "abc"],
        lambda folder: tuple(folder / f"{part}.jsonl" for part in "abc"),
        lambda folder: [
            f"{folder}/a.jsonl:text",
            folder / "[bc].jsonl" if False else f"{folder}/b.jsonl",
            f"{folder}/c.jsonl",
        ],
        lambda folder: [f"{folder}/a.jsonl", f"{folder}/?.jsonl"],
    ],
)
def test_several_files_are_read_one_after_another(model: Any, several: Path, source: Callable[[Path], Any]) -> None:
    made = source(several)
    wanted = ALL if not (isinstance(made, list) and "?" in str(made[-1])) else ALL[:3] + ALL
    assert decoded(read_corpus(made, model), model) == wanted


def test_several_files_have_fields_and_groups(model: Any, several: Path) -> None:
    for source in (f"{several}:q>a@who", f"{several}/*.jsonl:q>a@who", [f"{several}/{p}.jsonl:q>a@who" for p in "abc"]):
        corpus = read_corpus(source, model)
        assert answers(corpus) == [f"it is {n % 3}" for n in range(9)]
        assert len(set(corpus.groups)) == 2, "equal values are one group in all files"
    runs = read_corpus(f"{several}@2", model)
    assert [runs.groups.index(group) for group in runs.groups] == [0, 0, 2, 3, 3, 5, 6, 6, 8], (
        "no run goes on in another file"
    )


def test_the_names_of_several_files_are_short(model: Any, several: Path) -> None:
    assert read_corpus(several, model).name == "texts"
    assert read_corpus(f"{several}/*.jsonl:text", model).name == "*.jsonl"
    assert read_corpus([several / "a.jsonl", several / "b.jsonl"], model).name == "a.jsonl and 1 more"


def test_no_file_is_opened_that_the_budget_has_no_room_for(model: Any, several: Path) -> None:
    (several / "c.jsonl").write_text("{broken")
    assert read_corpus(several, model, tokens=4).n_tokens == 4
    with pytest.raises(CorpusError, match=r"line 1 of .*c\.jsonl cannot be read as JSON"):
        read_corpus(several, model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: [f / "a.jsonl", f / "nothing.jsonl"], r"there is no file .*nothing\.jsonl"),
        (lambda f: [f"{f}/a.jsonl", "nothing.jsonl"], r"there is no file nothing\.jsonl"),
        (lambda f: [f"{f}/a.jsonl", "some text"], "is a file, and 'some text' is not: give paths alone"),
        (lambda f: [f / "a.jsonl", 3], "a list of paths holds a int: give paths alone"),
        (lambda f: f"{f}/*.csv", r"there is no file .*\*\.csv, and none that matches it as a pattern"),
        (lambda f: f.parent, r"is a folder without a file that can be read .*: for files further down, write .*\*\*"),
        (lambda f: f"{f}/d.jsonl", r"there is no file .*/d\.jsonl"),
        (lambda f: f"{f}:body", "a.jsonl has no field 'body': its fields are text, q, a, who"),
        (lambda f: [f"{f}/a.jsonl:q>a", f"{f}/b.jsonl"], "a.jsonl and b.jsonl are not of one kind"),
    ],
)
def test_files_that_cannot_be_read_together_are_refused(
    model: Any, several: Path, make: Callable[[Path], Any], message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        read_corpus(make(several), model)


def test_a_folder_of_several_formats_is_refused_and_other_files_do_not_count(model: Any, several: Path) -> None:
    for name in ("README.md", ".hidden.txt", "_SUCCESS.txt"):
        (several / name).write_text("not a text")
    (several / "none.jsonl").touch()
    assert decoded(read_corpus(several, model), model) == ALL
    (several / "LICENSE.txt").write_text("not a text, either")
    with pytest.raises(
        CorpusError, match=r"a folder of \.jsonl, \.txt files: name those to read, as .*texts/\*\.jsonl$"
    ):
        read_corpus(several, model)


def test_strings_that_only_look_a_little_like_paths_are_texts(model: Any, several: Path) -> None:
    texts = ["see the file a.json", "data and texts", "hf: a place", "demo: a show of it", "either/or is a text"]
    assert decoded(read_corpus(texts, model), model) == texts


# --- formats -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".txt"])
def test_compressed_files_are_read_as_they_are_without(model: Any, tmp_path: Path, suffix: str, packed: str) -> None:
    path = put(tmp_path / f"rows{suffix}{packed}", ROWS)
    for source in (path, f"{path}:text", str(path).replace(packed, packed.upper())):
        if packed in str(source):
            assert decoded(read_corpus(source, model), model) == TEXTS
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(CorpusError, match=r"cannot be read: \w+: Truncated compressed stream"):
        read_corpus(path, model)
    path.write_bytes(b"nonsense")
    with pytest.raises(CorpusError, match="cannot be read"):
        read_corpus(path, model)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt.gz"])
def test_what_is_not_utf8_is_placed(tmp_path: Path, suffix: str) -> None:
    rows = b'{"text": "a b"}\n' * 100_000 if suffix == ".jsonl" else b"text\n" + b"plain words\n\n" * 100_000
    data = rows + "ü".encode("latin-1") + b"\n"
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(data, 1) if suffix.endswith(".gz") else data)
    with pytest.raises(CorpusError, match=rf"rows{suffix} is not UTF-8 text \(byte {len(rows)}\): convert it first"):
        list(open_source(path).rows)


def test_saved_data_sets_are_read(model: Any, tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list([{"text": text, "other": n} for n, text in enumerate(TEXTS)])
    saved.save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "saved", f"{tmp_path}/saved:text", [tmp_path / "saved"]):
        assert decoded(read_corpus(source, model), model) == TEXTS
    both = datasets.DatasetDict(train=saved, test=saved.select([1]))
    both.save_to_disk(tmp_path / "splits")
    assert decoded(read_corpus(f"{tmp_path}/splits/test", model), model) == TEXTS[1:2]
    with pytest.raises(CorpusError, match=r"splits holds the splits train, test: name one, as .*splits/train$"):
        read_corpus(tmp_path / "splits", model)
    with pytest.raises(
        CorpusError, match="a DatasetDict is not a text source: pass one of its splits; it holds train and test"
    ):
        read_corpus(both, model)


MISSING = [None, float("nan"), pd.NA, pd.NaT, ""]


@pytest.mark.parametrize(
    "make",
    [
        pd.DataFrame,
        lambda columns: pd.DataFrame(columns, index=[7, 7, 1, 0]),
        lambda columns: pd.DataFrame(columns).astype("category"),
        pa.table,
        lambda columns: pa.table(columns).to_batches(max_chunksize=3)[0] if False else pa.table(columns).to_reader(3),
        lambda columns: columns,
        lambda columns: {name: tuple(values) for name, values in columns.items()},
        lambda columns: {name: np.array(values) for name, values in columns.items()},
        lambda columns: {name: pd.Series(values) for name, values in columns.items()},
        datasets.Dataset.from_dict,
        lambda columns: datasets.Dataset.from_dict(columns).with_format("pandas"),
        lambda columns: pytest.importorskip("polars").DataFrame(columns),
        lambda columns: pytest.importorskip("polars").LazyFrame(columns).collect(),
    ],
)
def test_tables_are_their_rows(model: Any, make: Callable[[Any], Any]) -> None:
    columns = {"number": [1, 2, 3, 4], "text": TEXTS, "who": ["A", "B", "A", "B"]}
    corpus = read_corpus(make(columns), model, group="who")
    assert decoded(corpus, model) == TEXTS
    assert corpus.fingerprint == read_corpus(pd.DataFrame(columns).to_dict("records"), model, group="who").fingerprint
    assert answers(read_corpus(make(columns), model, field="text>number")) == ["1", "2", "3", "4"]
    with pytest.raises(CorpusError, match="has no field 'body': its fields are number, text, who"):
        read_corpus(make(columns), model, field="body")


def test_what_is_missing_in_a_table_is_skipped(model: Any) -> None:
    frame = pd.DataFrame({"text": ["a fine text", *MISSING]})
    corpus = read_corpus(frame, model)
    assert decoded(corpus, model) == ["a fine text"]
    assert corpus.skipped == {"empty or not text": len(MISSING)}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"text": ["a b", "c d"], "n": [1]},
            r"the columns of a dict must be of one length, and are of 2 \(text\), 1 \(n\)",
        ),
        ({"text": ["a b"], "n": 3}, "a dict whose 'n' is a int is not a text source"),
        (pd.DataFrame([["a b", "c d"]], columns=["text", "text"]), "DataFrame has several columns 'text'"),
        (pd.DataFrame({"text": []}), "DataFrame is empty"),
        ({"text": []}, "dict is empty"),
        ({"b text", "a text"}, "a set has no order"),
    ],
)
def test_tables_that_cannot_be_read_are_refused(model: Any, source: Any, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        read_corpus(source, model)


# --- tokens ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: rows,
        datasets.Dataset.from_list,
        lambda rows: datasets.Dataset.from_list(rows).with_format("torch"),
        lambda rows: pd.DataFrame(rows),
        lambda rows: [{name: torch.tensor(values) for name, values in row.items()} for row in rows],
        lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
    ],
)
@pytest.mark.parametrize("bos", [True, False])
def test_token_ids_are_documents_without_their_padding(model: Any, make: Callable[[Any], Any], bos: bool) -> None:
    plain = [[tiny.BOS] * bos + model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    longest = max(map(len, plain)) + 1
    rows = [
        {
            "input_ids": [0] * (longest - len(ids)) + ids,
            "attention_mask": [0] * (longest - len(ids)) + [1] * len(ids),
        }
        for ids in plain
    ]
    wanted = read_corpus(TEXTS, model, prepend_bos=bos)
    for field in (None, "input_ids"):
        corpus = read_corpus(make(rows), model, field=field, prepend_bos=bos)
        assert (corpus.fingerprint, corpus.keys) == (wanted.fingerprint, wanted.keys)


def test_what_a_tokenizer_returns_is_read(model: Any, tmp_path: Path) -> None:
    made = model.tokenizer(TEXTS, add_special_tokens=False)
    assert decoded(read_corpus(made, model), model) == TEXTS
    path = write(tmp_path, ".jsonl", [{"input_ids": ids} for ids in made["input_ids"]])
    assert decoded(read_corpus(path, model), model) == TEXTS
    cut = read_corpus(made, model, tokens=12, window=6)
    assert cut.fingerprint == read_corpus(TEXTS, model, tokens=12, window=6).fingerprint


def test_tokens_of_another_vocabulary_are_refused(model: Any) -> None:
    for token in (-1, model.cfg.d_vocab):
        with pytest.raises(
            CorpusError, match=f"row 2 of .* holds the token {token}, which this model's vocabulary of 320 has not"
        ):
            read_corpus([{"input_ids": [5, 6]}, {"input_ids": [5, token]}], model)


# --- values -----------------------------------------------------------------------------------------------------------------

SPELLED = [
    "4",
    "007",
    "-0",
    "4.0",
    "1e3",
    "True",
    "true",
    "FALSE",
    "1975-06-30",
    "12:30",
    "NA",
    "None",
    "null",
    "nan",
    "N/A",
    "Paris",
]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("last", range(len(SPELLED)))
def test_words_stay_as_they_are_spelled(model: Any, tmp_path: Path, suffix: str, last: int) -> None:
    """In any order, since what comes first or last is what a guess at a column's type would hang on."""
    words = SPELLED[last + 1 :] + SPELLED[: last + 1]
    path = put(tmp_path / f"rows{suffix}", [{"q": f"what is {n}?", "a": word} for n, word in enumerate(words)])
    corpus = read_corpus(f"{path}:q>a", model)
    assert answers(corpus) == words
    assert not corpus.skipped


@pytest.mark.parametrize("alone", SPELLED)
def test_a_column_of_one_kind_stays_as_it_is_spelled(model: Any, tmp_path: Path, alone: str) -> None:
    for suffix in (".csv", ".jsonl"):
        path = put(tmp_path / f"rows{suffix}", [{"q": f"what is {n}?", "a": alone} for n in range(3)])
        assert answers(read_corpus(f"{path}:q>a", model)) == [alone] * 3


NUMBERS = [
    "4",
    "-0",
    "4.0",
    "1e3",
    "1.50",
    "true",
    "false",
    "0.1",
    "12345678901234567890123",
    "-7",
    '"007"',
    '"1975-06-30"',
]


@pytest.mark.parametrize("last", range(len(NUMBERS)))
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_numbers_of_json_are_text_as_they_are_spelled(model: Any, tmp_path: Path, last: int, suffix: str) -> None:
    spelled = NUMBERS[last:] + NUMBERS[:last]
    rows = [f'{{"q": "what is {n}?", "a": {number}}}' for n, number in enumerate(spelled)]
    path = tmp_path / f"rows{suffix}"
    path.write_text("\n".join(rows) if suffix == ".jsonl" else f"[{', '.join(rows)}]")
    assert answers(read_corpus(f"{path}:q>a", model)) == [number.strip('"') for number in spelled]


def test_mixed_numbers_and_words_are_all_kept(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(f'{{"q": "what is {n}?", "a": {a}}}' for n, a in enumerate(["4", '"four"', "true", "2.5"]))
    )
    assert answers(read_corpus(f"{path}:q>a", model)) == ["4", "four", "true", "2.5"]


def test_values_in_memory_are_text(model: Any, tmp_path: Path) -> None:
    day = date(1975, 6, 30)
    values = [
        4,
        2.5,
        True,
        day,
        datetime(1975, 6, 30),
        datetime(1975, 6, 30, 12, 30),
        np.float32(0.1),
        np.int64(7),
        pd.Timestamp(day),
    ]
    wanted = ["4", "2.5", "True", "1975-06-30", "1975-06-30", "1975-06-30 12:30:00", "0.1", "7", "1975-06-30"]
    rows = [{"q": f"what is {n}?", "a": value} for n, value in enumerate(values)]
    assert answers(read_corpus(rows, model, field="q>a")) == wanted
    pq.write_table(pa.table({"q": ["when was it?"] * 2, "a": [day, date(2000, 1, 1)]}), tmp_path / "days.parquet")
    assert answers(read_corpus(f"{tmp_path}/days.parquet:q>a", model)) == ["1975-06-30", "2000-01-01"]
    frame = pd.DataFrame({"q": ["when was it?"], "a": pd.to_datetime(["1975-06-30"])})
    assert answers(read_corpus(frame, model, field="q>a")) == ["1975-06-30"]


def test_what_is_missing_in_json_is_skipped(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(f'{{"q": "what is it?", "a": {a}}}' for a in ["null", "NaN", '""', "[]", "{}", '"it"']))
    corpus = read_corpus(f"{path}:q>a", model)
    assert answers(corpus) == ["it"]
    assert corpus.skipped == {"empty or not text": 5}


@pytest.mark.parametrize(
    ("listed", "first", "others"),
    [
        (["Paris", "the city of Paris", "Paris"], "Paris", ("the city of Paris",)),
        ([1984, "1984 or so", None], "1984", ("1984 or so",)),
        ({"text": ["Rome", "Roma"], "answer_start": [3, 8]}, "Rome", ("Roma",)),
        (["only one"], "only one", ()),
        (np.array(["Oslo", "Kristiania"]), "Oslo", ("Kristiania",)),
    ],
)
def test_several_answers_are_accepted_and_the_first_is_read(model: Any, listed: Any, first: str, others: Any) -> None:
    rows = [{"q": "where is it?", "a": listed}, {"q": "and that?", "a": "there"}]
    corpus = read_corpus(rows, model, field="q>a")
    assert answers(corpus) == [first, "there"]
    assert corpus.answers[0].accepted == others
    assert corpus.answers[0].right == (first, *others)
    alone = read_corpus([{**rows[0], "a": first}, rows[1]], model, field="q>a")
    assert torch.equal(alone.tokens, corpus.tokens)
    assert (alone.fingerprint == corpus.fingerprint) == (not others)


# --- csv and columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["q,a", "q,a,", "\ufeffq,a"])
@pytest.mark.parametrize("end", [",", ",,", "", ", "[:1]])
def test_commas_at_the_ends_of_rows_shift_nothing(model: Any, tmp_path: Path, head: str, end: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("".join([head, "\n", *(f"{q},{a}{end}\n" for q, a in PAIRS)]), encoding="utf-8")
    corpus = read_corpus(f"{path}:q>a", model)
    assert [(answer.prompt, answer.text) for answer in corpus.answers] == PAIRS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "text\nhello, world\n",
            r"line 2 of .*rows\.csv has 2 values for 1 columns: put a value that holds ',' in quotes",
        ),
        ('text,n\n"never closed,1\n', r"line \d of .*rows\.csv cannot be read as csv: unexpected end of data"),
        ('text,n\n"he said "no" there",1\n', r"line 2 of .*rows\.csv cannot be read as csv"),
        ("text\n", "rows.csv is empty"),
        ("text,text\na b,c d\n", "rows.csv has several columns 'text'"),
    ],
)
def test_a_csv_that_says_something_else_than_it_seems_is_refused(
    model: Any, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(CorpusError, match=message):
        read_corpus(tmp_path / "rows.csv", model)


def test_a_row_of_a_csv_that_ends_early_is_skipped_and_long_values_are_read(model: Any, tmp_path: Path) -> None:
    long = "one, two\n" * 30_000
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["n", "text"], ["1", long], ["2"], [], ["3", "the end"]])
    before = csv.field_size_limit()
    corpus = read_corpus(tmp_path / "rows.csv", model)
    assert decoded(corpus, model) == [long, "the end"]
    assert corpus.skipped == {"empty or not text": 1}
    assert csv.field_size_limit() == before


def test_columns_that_nobody_asked_for_do_not_matter(model: Any, tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "other": None, "filler": "x" * 1_000_000} for n in range(12)]
    rows += [{"text": "the last", "other": "a string at last", "filler": 3}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = read_corpus(tmp_path / "rows.jsonl", model)
    assert corpus.n_documents == 13
    assert not corpus.skipped


def test_a_column_that_nobody_asked_for_is_not_decoded(model: Any, tmp_path: Path) -> None:
    class Never:
        def __str__(self) -> str:
            raise AssertionError("nobody asked")

    frame = pd.DataFrame({"text": TEXTS, "image": [Never()] * 4})
    assert decoded(read_corpus(frame, model), model) == TEXTS
    images = datasets.Dataset.from_dict({"text": TEXTS, "image": [b"no image"] * 4})
    images = images.cast_column("image", datasets.Image())
    assert decoded(read_corpus(images, model), model) == TEXTS
    images.to_parquet(tmp_path / "images.parquet")
    assert decoded(read_corpus(tmp_path / "images.parquet", model), model) == TEXTS


def test_a_field_may_be_missing_in_the_first_rows(model: Any, tmp_path: Path) -> None:
    rows = [{"n": n} for n in range(5)] + [{"text": text, "who": "A"} for text in TEXTS]
    path = write(tmp_path, ".jsonl", rows)
    assert decoded(read_corpus(f"{path}:text@who", model), model) == TEXTS


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".tsv"])
def test_a_byte_order_mark_is_no_text(model: Any, tmp_path: Path, suffix: str) -> None:
    path = put(tmp_path / f"rows{suffix}", ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert decoded(read_corpus(path, model), model) == TEXTS


def test_json_is_read_in_every_layout(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text in (
        json.dumps(ROWS), json.dumps(ROWS, indent=4), "\n \n" + json.dumps(ROWS), "\n".join(map(json.dumps, ROWS)),
        json.dumps(TEXTS), "[" + json.dumps(ROWS)[1:-1] + ",]",
    ):  # fmt: skip
        path.write_text(text)
        assert decoded(read_corpus(path, model), model) == TEXTS
    path.write_text(json.dumps(ROWS[0], indent=1))
    assert decoded(read_corpus(path, model), model) == TEXTS[:1]
    for broken, message in [
        (json.dumps(ROWS)[:-1], "cannot be read as JSON"),
        (json.dumps(ROWS)[:-9], "cannot be read as JSON"),
        ('{"text": ', "line 1 of .* cannot be read as JSON"),
        ("[]", "rows.json is empty"),
        ("[" * 100_000, "cannot be read as JSON"),
    ]:
        path.write_text(broken)
        with pytest.raises(CorpusError, match=message):
            read_corpus(path, model)


@given(st.lists(st.text(max_size=30), min_size=1, max_size=8), st.integers(1, 40), st.sampled_from([None, 1, 3]))
def test_an_array_is_decoded_piece_by_piece(texts: list[str], block: int, indent: int | None) -> None:
    import io

    from lens_unlearn.corpora import files

    values = [*texts, 12, [True, {"a": None}], -0.5]
    file = io.StringIO(json.dumps(values, indent=indent))
    before, files._BLOCK = files._BLOCK, block
    try:
        head = file.read(block)
        assert [*files._elements("it", file, head, 1)] == [*texts, 12, [True, {"a": None}], "-0.5"]
    finally:
        files._BLOCK = before


# --- Unicode -----------------------------------------------------------------------------------------------------------------


def test_half_a_surrogate_pair_is_no_text(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good text"}\n{"text": "half \\ud83d of it"}\n{"text": "whole \\ud83d\\ude00 pair"}\n')
    for source in (path, ["good text", "half \ud83d of it", "whole \U0001f600 pair"]):
        corpus = read_corpus(source, model)
        assert decoded(corpus, model) == ["good text", "whole \U0001f600 pair"]
        assert corpus.skipped == {"not Unicode (half a surrogate pair)": 1}
    with pytest.raises(CorpusError, match=r"holds no text that can be used: 1 not Unicode \(half a surrogate pair\)"):
        read_corpus(["\ud83d alone"], model)
    good = {"q": "who?", "a": "Ann"}
    for bad in ({"q": "\ud83d?"}, {"a": "\ud83d"}, {"a": ["Ann", "\ud83d"]}, {"perturbed_answer": ["Bob", "\ud83d"]}):
        corpus = read_corpus([good, {**good, **bad}], model, field="q>a")
        assert (corpus.n_documents, sum(corpus.skipped.values())) == (1, 1)
    with pytest.raises(CorpusError, match="row 1 of list has .* for 'who', which names no group"):
        read_corpus([{"text": "a b", "who": "\ud83d"}], model, group="who")


# --- the budget ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_the_work_is_bounded_by_the_budget(model: Any, tmp_path: Path, suffix: str) -> None:
    text = "the quick brown fox jumps over it. " * 500_000
    path = put(tmp_path / f"rows{suffix}", [{"text": text}, {"text": "the end"}])
    begun = time.monotonic()
    corpus = read_corpus(path, model, tokens=100)
    assert time.monotonic() - begun < 5
    assert corpus.n_tokens == 100
    assert corpus.fingerprint == read_corpus([text[:2000]], model, tokens=100).fingerprint


def test_a_prompt_far_longer_than_the_window_is_skipped_unread(model: Any) -> None:
    rows = [{"q": q, "a": a} for q, a in (("long " * 3_000_000, "Ann"), ("who?", "Ann " * 3_000_000), ("who?", "Ann"))]
    begun = time.monotonic()
    for eos in (False, True):
        corpus = read_corpus(rows, model, field="q>a", answer_eos=eos)
        assert corpus.skipped == {"prompt and answer longer than the window": 2}
    assert time.monotonic() - begun < 5


@given(st.integers(2, 300), st.integers(0, 20), st.sampled_from(["", " ", "\n", "ab c", "    "]))
def test_a_text_that_is_cut_has_the_tokens_of_the_whole(loaded: Any, tokens: int, seed: int, between: str) -> None:
    draw = random.Random(seed)
    text = between.join("".join(draw.choices("abc déf 12\n \t", k=draw.randrange(1, 9))) for _ in range(2500))
    whole = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    corpus = read_corpus([text], loaded, tokens=tokens)
    assert corpus.tokens[corpus.counted].tolist() == whole[:tokens]


def test_rows_beyond_the_budget_are_hardly_read(model: Any) -> None:
    read: list[int] = []

    def rows() -> Iterator[str]:
        while True:
            read.append(1)
            yield "the quick brown fox jumps over it " * 100

    read_corpus(rows(), model, tokens=100)
    assert len(read) == 1


def sorted_rows(n: int = 400, groups: int = 8) -> list[dict[str, str]]:
    return [{"text": f"document number {i}", "who": f"W{i * groups // n}"} for i in range(n)]


def test_a_shuffle_draws_from_more_of_the_source_than_the_budget_has_room_for(model: Any) -> None:
    rows = sorted_rows()
    everything = [row["text"] for row in rows]
    drawn = read_corpus(rows, model, tokens=400, shuffle=400, group="who")
    texts = decoded(drawn, model)
    assert drawn.n_tokens == 400
    assert len(set(drawn.groups)) > 4
    assert [text for text in everything if text in texts[:-1] or text.startswith(texts[-1])][: len(texts) - 2] == [
        text for text in texts if text in everything
    ][: len(texts) - 2], "in the order of the source"
    assert drawn.fingerprint == read_corpus(rows, model, tokens=400, shuffle=400, group="who").fingerprint
    assert drawn.fingerprint != read_corpus(rows, model, tokens=400, shuffle=400, seed=1, group="who").fingerprint
    near = decoded(read_corpus(rows, model, tokens=400, shuffle=60), model)
    assert max(everything.index(text) for text in near if text in everything) < 200, "as far as the buffer reaches"


def test_a_source_with_room_for_all_of_it_is_the_same_shuffled(model: Any) -> None:
    rows = sorted_rows(50)
    for options in ({}, {"group": "who"}, {"group": 7}, {"tokens": 10_000}):
        plain = read_corpus(rows, model, **options)
        assert plain.fingerprint == read_corpus(rows, model, shuffle=10, **options).fingerprint
        assert plain.budget is None


def test_runs_of_rows_are_the_same_groups_shuffled(model: Any) -> None:
    rows = sorted_rows(100)
    whole = read_corpus(rows, model, group=5)
    of = dict(zip(whole.keys, whole.groups, strict=True))
    drawn = read_corpus(rows, model, group=5, tokens=200, shuffle=100)
    assert all(of[key] == group for key, group in zip(drawn.keys, drawn.groups, strict=True))


def test_a_budget_that_cuts_a_sorted_source_is_said(model: Any, no_warnings: None) -> None:
    rows = sorted_rows()
    with pytest.warns(
        UserWarning,
        match=r"list seems to be sorted by 'who', and tokens=300 took the first \d groups alone: give shuffle=",
    ):
        read_corpus(rows, model, tokens=300, group="who")
    read_corpus(rows, model, group="who")
    read_corpus(rows, model, tokens=300)
    read_corpus(rows, model, tokens=300, group=20)
    read_corpus(rows, model, tokens=300, group="who", shuffle=400)
    random.Random(0).shuffle(rows)
    read_corpus(rows, model, tokens=300, group="who")
    read_corpus([{**row, "who": n} for n, row in enumerate(rows)], model, tokens=300, group="who")


def test_what_is_too_little_because_of_the_budget_says_so(model: Any) -> None:
    cut = read_corpus(["a text " * 40] * 3, model, tokens=20)
    assert cut.budget == 20
    with pytest.raises(
        CorpusError, match=r"too few to split into 2 parts: raise tokens, since reading stopped at 20, or"
    ):
        cut.split(0.5, 0.5)
    with pytest.raises(CorpusError, match="raise tokens, since reading stopped at 20"):
        cut.with_prompts(50)
    with pytest.raises(
        CorpusError, match="too few to bound what fresh ones lose: raise tokens, since reading stopped at 20"
    ):
        check_units({"retain": cut}, 0.05, 0.9, at_once=False)
    for part in (cut.only([0]), cut + read_corpus(TEXTS, model).only([0]), cut.sample(5)):
        assert part.budget == 20
    with pytest.raises(
        CorpusError, match="too few to split into 2 parts: give a longer source, or separate test sources"
    ):
        read_corpus(["one text"] * 3, model).split(0.5, 0.5)


# --- the hub -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mine", "mine:train:text", "me/mine", "me/mine/config", "./mine", "mine/", "json", "text", "csv:train", ""]
)
def test_a_hub_name_never_means_a_local_folder(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "me/mine", "me/mine/config", "."):
        put(tmp_path / folder / "train.jsonl", ROWS)
    with pytest.raises(CorpusError, match=f"^hf:{re.escape(name.partition(':')[0])}") as error:
        read_corpus(f"hf:{name}", model)
    assert "\n" not in str(error.value)


def test_a_stream_of_the_hub_is_read_by_field_and_group(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        if config == "b":
            raise ValueError("no such data set")
        rows = [{"q": f"what is {n}?", "a": n, "who": n // 2} for n in range(4)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus = read_corpus("hf:a/b:test:q>a@who", model)
    assert answers(corpus) == ["0", "1", "2", "3"]
    assert len(set(corpus.groups)) == 2
    assert asked == [("a", "b", "test", True), ("a/b", None, "test", True)]
    assert answers(read_corpus("hf:a/b/c:test:q>a", model)) == ["0", "1", "2", "3"]
    with pytest.raises(CorpusError, match="has no field 'text': its fields are q, a, who"):
        read_corpus("hf:a", model)
