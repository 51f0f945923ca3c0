"""Groups: what belongs together is named in the source, and neither a split nor a separate test source takes it apart."""

import json
import random
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_corpora import decoded, write

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.neurons.collect import collect, query_keys
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.top_tokens import TopTokens

DATA = Path(__file__).parents[3] / "shared" / "data"
ROWS = [
    {"q": f"what is {n}?", "a": f"it is {n}", "text": f"text {n}", "author": author}
    for n, author in enumerate(["Ann", "Bob", "Ann", "Cy", "Bob", "Ann", "Dee", "Cy", "Dee", "Ann"])
]


def partition(labels: Iterable[Any]) -> set[frozenset[int]]:
    """Which places hold the same label."""
    places: dict[Any, set[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, set()).add(place)
    return {frozenset(part) for part in places.values()}


AUTHORS = partition(row["author"] for row in ROWS)


# --- sources -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("field", ["text", "q>a"])
def test_a_group_is_named_in_the_source_or_beside_it(model: Any, tmp_path: Path, suffix: str, field: str) -> None:
    path = write(tmp_path, suffix, ROWS)
    plain = read_corpus(f"{path}:{field}", model)
    assert plain.groups == ()
    assert plain.units == plain.keys
    read = [
        read_corpus(f"{path}:{field}@author", model),
        read_corpus(path, model, field=field, group="author"),
        read_corpus(f"{path}:{field}", model, group="author"),
        read_corpus(f"{path}@author", model, field=field),
        read_corpus(ROWS, model, field=field, group="author"),
        read_corpus(datasets.Dataset.from_list(ROWS), model, field=field, group="author"),
    ]
    for corpus in read:
        assert partition(corpus.units) == AUTHORS
        assert corpus.keys == plain.keys
        assert corpus.fingerprint == read[0].fingerprint != plain.fingerprint
        assert "10 documents of 4 groups" in repr(corpus)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_runs_of_rows_are_groups(model: Any, tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix, ROWS)
    for corpus in (
        read_corpus(f"{path}@4", model),
        read_corpus(f"{path}:text@4", model),
        read_corpus(path, model, group=4),
        read_corpus([row["text"] for row in ROWS], model, group=4),
    ):
        assert partition(corpus.units) == {frozenset(range(4)), frozenset(range(4, 8)), frozenset({8, 9})}


def test_runs_count_the_rows_that_are_skipped(model: Any) -> None:
    texts = ["a b", "", "c d", None, "e f", "g h", "i j", "k l", "m n"]
    corpus = read_corpus(texts, model, group=3)
    assert decoded(corpus, model) == ["a b", "c d", "e f", "g h", "i j", "k l", "m n"]
    assert partition(corpus.units) == {frozenset({0, 1}), frozenset({2, 3}), frozenset({4, 5, 6})}


def test_the_demos_persons_are_groups() -> None:
    import lens_unlearn as lu
    from lens_unlearn import demo

    model, rows = lu.load_model("demo"), demo.corpus("facts", "test")
    wanted = partition(row["person"] for row in rows)
    for source in ("demo:facts:test@person", "demo:facts:test:question>answer@person"):
        corpus = read_corpus(source, model)
        assert partition(corpus.units) == wanted
        assert all(corpus.answers)
        assert corpus.name == source
    assert partition(read_corpus("demo:facts@person", model).units) == partition(
        row["person"] for row in demo.corpus("facts", "dev")
    )


def test_a_group_is_the_same_in_every_source_that_names_it(model: Any) -> None:
    ann = [read_corpus([{"text": text, "who": who}], model, group="who") for text, who in [("a b", "1"), ("c d", 1)]]
    assert ann[0].groups == ann[1].groups
    one, other = ([{"text": f"{name} {n}"} for name in names for n in range(3)] for names in ("ab", "cba"))
    runs = [read_corpus(rows, model, group=3) for rows in (one, other)]
    assert set(runs[0].groups) < set(runs[1].groups), "by what stands in it, not by its place"
    assert runs[0].groups == read_corpus(one, model, group=3, tokens=20).groups[:9], "a budget cuts the last one short"
    numbered = read_corpus([{"text": "a 0", "n": 0}], model, group="n")
    assert not {*numbered.groups} & {*runs[0].groups, *runs[0].keys}


# --- what is cut where -----------------------------------------------------------------------------------------------------


def rows_with(*fields: str) -> list[dict[str, Any]]:
    return [{field: f"{field} {n % 3 if field == 'b' else n}" for field in fields} for n in range(9)]


@pytest.mark.parametrize(
    ("fields", "written", "first", "groups"),
    [
        (("a@b",), ":a@b", "a@b 0", 0),
        (("a@b", "b"), ":a@b@b", "a@b 0", 3),
        (("a", "b"), ":a@b", "a 0", 3),
        (("a", "x@b"), ":a@x@b", "a 0", 9),
        (("a@b", "c@d"), ":a@b>c@d", "a@b 0 c@d 0", 0),
        (("a@b", "c@d", "b"), ":a@b>c@d@b", "a@b 0 c@d 0", 3),
        (("a@b", "c@d"), ":a@b>c@d@2", "a@b 0 c@d 0", 5),
        (("text", "b"), "@b", "text 0", 3),
        (("text", "b"), ":@b", "text 0", 3),
        (("@b",), ":@b", "@b 0", 0),
        (("a:b", "b"), ":a:b@b", "a:b 0", 3),
        (("a/b", "b"), ":a/b@b", "a/b 0", 3),
    ],
)
@pytest.mark.parametrize(
    "file", ["rows.jsonl", "me@home.jsonl", "a.jsonl@b.jsonl", "x.txt:y@20.jsonl", "d@1/x@y.jsonl"]
)
def test_at_signs_in_names_are_read_as_they_are(
    model: Any, tmp_path: Path, file: str, fields: Any, written: str, first: str, groups: int
) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows_with(*fields))))
    corpus = read_corpus(f"{path}{written}", model)
    assert decoded(corpus, model)[0] == first
    assert len(set(corpus.groups)) == groups


def test_a_file_goes_before_a_group(model: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "in a", "b.jsonl": "x"}')
    source = f"{tmp_path}/a.jsonl@b.jsonl"
    assert len(read_corpus(source, model).groups) == 1
    (tmp_path / "a.jsonl@b.jsonl").write_text('{"text": "in the other"}')
    assert decoded(read_corpus(source, model), model) == ["in the other"]


@pytest.mark.parametrize(
    ("fields", "written", "ways"),
    [
        (("a", "b", "a@b"), "a@b", "field='a@b', group=None or field='a', group='b'"),
        (("a", "b@c", "a@b", "c"), "a@b@c", "field='a', group='b@c' or field='a@b', group='c'"),
        (("a", "20"), "a@20", "field='a', group='20' or field='a', group=20"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(
    model: Any, tmp_path: Path, fields: Any, written: str, ways: str
) -> None:
    path = write(tmp_path, ".jsonl", rows_with(*fields))
    with pytest.raises(CorpusError) as error:
        read_corpus(f"{path}:{written}", model)
    assert str(error.value) == (
        f"rows.jsonl: {written!r} can mean {ways}: read it in Python with these, or rename the field"
    )


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (":text@autor", {}, "rows.jsonl has no field 'autor' to group by: its fields are q, a, text, author"),
        (":txt@author", {}, "rows.jsonl has no field 'txt': its fields are"),
        ("@", {}, "rows.jsonl has no field '' to group by"),
        ("@0:4", {}, "rows.jsonl has no field '0:4' to group by"),
        ("@0", {}, "rows.jsonl: 0 rows make no group: at least 1, or give the field that names the groups"),
        ("", {"group": -1}, "rows.jsonl: -1 rows make no group"),
        ("", {"group": "20"}, "rows.jsonl has no field '20' to group by"),
    ],
)
def test_groups_that_cannot_be_are_refused(model: Any, tmp_path: Path, source: str, options: Any, message: str) -> None:
    path = write(tmp_path, ".jsonl", ROWS)
    with pytest.raises(CorpusError, match=message):
        read_corpus(f"{path}{source}", model, **options)


def test_plain_strings_have_no_field_to_group_by(model: Any) -> None:
    with pytest.raises(CorpusError, match="plain strings, which have no field 'author' to group by"):
        read_corpus(["a b"], model, group="author")


@pytest.mark.parametrize("nothing", [None, "", "  ", float("nan"), ["Ann"]])
def test_a_row_of_nobody_is_refused_unless_it_is_skipped_anyway(model: Any, nothing: Any) -> None:
    rows = [{"text": "a b", "who": "Ann"}, {"text": "", "who": nothing}, {"text": "c d", "who": "Bob"}]
    assert len(read_corpus(rows, model, group="who").groups) == 2
    with pytest.raises(CorpusError, match=r"row 4 of list has .* for 'who', which names no group: name one there"):
        read_corpus([*rows, {"text": "e f", "who": nothing}], model, group="who")


# --- groups go with their documents ----------------------------------------------------------------------------------------


def test_groups_go_with_their_documents(model: Any) -> None:
    corpus = read_corpus(ROWS, model, field="q>a", group="author", window=24)
    of = dict(zip(corpus.keys, corpus.units, strict=True))
    ungrouped = read_corpus(["u v w", "x y z"], model)
    parts = [
        corpus.only([1, 4, 7]), corpus.sample(20), corpus.first(20), corpus.queries(), corpus.with_prompts(4),
        *corpus.split(0.5, 0.5), corpus.without(read_corpus(ROWS[:1], model, field="q>a"))[0],
    ]  # fmt: skip
    for part in parts:
        assert part.groups == tuple(of[key] for key in part.keys)
    both = corpus + ungrouped
    assert both.units == corpus.units + ungrouped.keys
    assert (ungrouped + ungrouped).groups == ()


# --- splits ----------------------------------------------------------------------------------------------------------------


def of_units(keys: list[int], groups: list[int] | None) -> Corpus:
    """A corpus of documents with the given keys and groups, of lengths that differ by key."""
    corpus = tiny.corpus([3 + (7 * key) % 5 for key in keys])
    named = () if groups is None else tuple(f"g{group}" for group in groups)
    return replace(corpus, keys=tuple(f"k{key}" for key in keys), groups=named)


def tied(corpus: Corpus, links: Iterable[tuple[int, int]] = ()) -> set[frozenset[int]]:
    """The oracle: relabel until documents of equal key, equal unit, or linked, have equal labels."""
    labels = list(range(corpus.n_documents))
    pairs = [*links]
    for one, other in combinations(range(corpus.n_documents), 2):
        if corpus.keys[one] == corpus.keys[other] or corpus.units[one] == corpus.units[other]:
            pairs.append((one, other))
    for _ in labels:
        for one, other in pairs:
            labels[one] = labels[other] = min(labels[one], labels[other])
    return partition(labels)


numbered = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=2, max_size=16)


@given(numbered, st.booleans(), st.integers(0, 3), st.integers(2, 3))
def test_a_split_keeps_whole_what_is_tied_in_any_number_of_steps(
    documents: list[tuple[int, int]], named: bool, seed: int, count: int
) -> None:
    corpus = of_units([key for key, _ in documents], [group for _, group in documents] if named else None)
    classes = tied(corpus)
    if len(classes) < count:
        kind = "groups" if named else "documents"
        with pytest.raises(
            CorpusError, match=f"has {len(classes)} distinct {kind}, too few to split into {count} parts"
        ):
            corpus.split(*[1.0] * count, seed=seed)
        return
    parts = corpus.split(*[1.0] * count, seed=seed)
    assert sum(part.n_tokens for part in parts) == corpus.n_tokens
    assert all(part.n_documents for part in parts)
    where = [next(i for i, part in enumerate(parts) if key in part.keys) for key in corpus.keys]
    assert all(len({where[i] for i in whole}) == 1 for whole in classes)
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    again = of_units([documents[i][0] for i in order], [documents[i][1] for i in order] if named else None)
    assert [set(part.keys) for part in again.split(*[1.0] * count, seed=seed)] == [set(part.keys) for part in parts]


@given(numbered, st.booleans(), numbered, st.booleans())
def test_what_stands_in_a_test_source_is_removed_with_all_that_is_tied_to_it(
    documents: list[tuple[int, int]], named: bool, others: list[tuple[int, int]], named_too: bool
) -> None:
    corpus = of_units([key for key, _ in documents], [group for _, group in documents] if named else None)
    test = of_units([key for key, _ in others], [group for _, group in others] if named_too else None)
    both = corpus + test
    classes = tied(both)
    lost = {i for whole in classes for i in whole if any(other >= len(documents) for other in whole)}
    left = [i for i in range(len(documents)) if i not in lost]
    if not left:
        with pytest.raises(CorpusError, match=f"every {'group' if named else 'document'} of tiny is also in tiny"):
            corpus.without(test)
        return
    rest, removed = corpus.without(test)
    assert removed == len(documents) - len(left)
    assert rest.keys == tuple(corpus.keys[i] for i in left)


def test_the_shares_are_met_in_whole_groups() -> None:
    corpus = of_units(list(range(400)), [n // 20 for n in range(400)])
    for seed in range(5):
        parts = corpus.split(0.4, 0.25, 0.35, seed=seed)
        assert [len(set(part.groups)) for part in parts] == pytest.approx([8, 5, 7], abs=1)
        assert not set.intersection(*(set(part.groups) for part in parts))


# --- near-duplicates ---------------------------------------------------------------------------------------------------------


def together(corpus: Corpus, one: int, other: int, **options: Any) -> bool:
    """Whether two documents are on the same side of every split."""
    splits = [corpus.split(0.5, 0.5, seed=seed, **options) for seed in range(12)]
    return all((corpus.keys[one] in parts[0].keys) == (corpus.keys[other] in parts[0].keys) for parts in splits)


LONG = (
    "A shop sells seven green frogs and nine quick foxes on each day of the week but for the first one, on which it is "
    "closed. How many animals are sold there in a year?"
)
ASKED = [
    ("Who wrote the book of frogs?", "Ann Smith"),
    ("who wrote the  book of frogs", "Bob Jones"),
    (LONG, "5840"),
    (LONG.replace("nine", "eight"), "5475"),
    ("What is 3 + 4?", "7"),
    ("What is 3 - 4?", "-1"),
    *[(f"Where does number {n} live?", f"in town {n}") for n in range(8)],
]
"""The first two ask the same, the next two nearly; the others are questions of their own."""


@pytest.mark.parametrize("template", [None, "Follow these words, and no others, to the very end: {prompt}\n{answer}"])
def test_near_identical_questions_stay_together(loaded: Any, template: str | None) -> None:
    model = SimpleNamespace(tokenizer=loaded.tokenizer, cfg=SimpleNamespace(n_ctx=512, d_vocab=320))
    rows = [{"q": question, "a": answer} for question, answer in ASKED]
    corpus = read_corpus(rows, model, field="q>a", template=template)
    assert together(corpus, 0, 1)
    assert together(corpus, 2, 3)
    assert not together(corpus, 4, 5), "the signs of arithmetic are no punctuation"
    assert not together(corpus, 0, 1, near_duplicates=False)
    assert not together(corpus, 2, 3, near_duplicates=False)
    assert len({corpus.without(corpus.only([other]))[1] for other in (0, 1, 2, 3)}) == 1
    assert corpus.without(corpus.only([0]))[1] == 2
    assert corpus.without(corpus.only([0]), near_duplicates=False)[1] == 1
    order = list(range(len(rows)))[::-1]
    turned = read_corpus([rows[i] for i in order], model, field="q>a", template=template)
    assert [set(p.keys) for p in turned.split(0.5, 0.5)] == [set(p.keys) for p in corpus.split(0.5, 0.5)]
    with pytest.raises(CorpusError, match=r"has 1 distinct documents \(near-identical questions are one\), too few"):
        corpus.only([0, 1]).split(0.5, 0.5)


def test_near_identical_texts_stay_together_if_asked(loaded: Any) -> None:
    model = SimpleNamespace(tokenizer=loaded.tokenizer, cfg=SimpleNamespace(n_ctx=512, d_vocab=320))
    texts = [LONG, LONG.replace("year", "month"), *(f"{n} " * 9 + "frogs sing" for n in range(8))]
    corpus = read_corpus(texts, model, window=32)
    assert corpus.n_rows > corpus.n_documents
    assert not together(corpus, 0, 1)
    assert together(corpus, 0, 1, near_duplicates=True)


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), min_size=2, max_size=12))
def test_near_duplicates_are_those_that_share_four_fifths_of_their_shingles(texts: list[list[str]]) -> None:
    """The oracle compares all pairs, and knows neither hashing nor disjoint sets."""
    from scipy.cluster.hierarchy import DisjointSet

    from lens_unlearn.corpora.near_duplicates import join_near_duplicates

    made = [tuple(text) for text in texts]
    found = DisjointSet(made)
    join_near_duplicates(dict.fromkeys(made), found)
    assert partition(map(found.__getitem__, made)) == alike(made)
    if len(set(made)) > 1:
        turned = DisjointSet(made)
        join_near_duplicates(dict.fromkeys(made[::-1]), turned)
        assert partition(map(turned.__getitem__, made)) == alike(made)


def alike(texts: list[tuple[str, ...]]) -> set[frozenset[int]]:
    """Which texts are near-duplicates, in any number of steps: all pairs are compared."""
    runs = [{" ".join(text[i : i + 3]) for i in range(max(1, len(text) - 2))} for text in texts]
    links = [
        (i, j)
        for i, j in combinations(range(len(texts)), 2)
        if texts[i] == texts[j] or 5 * len(runs[i] & runs[j]) >= 4 * len(runs[i] | runs[j])
    ]
    labels = list(range(len(texts)))
    for _ in labels:
        moved = False
        for i, j in links:
            if labels[i] != labels[j]:
                labels[i] = labels[j] = min(labels[i], labels[j])
                moved = True
        if not moved:
            break
    return partition(labels)


needs_data = pytest.mark.skipif(not (DATA / "tofu").is_dir(), reason="the shared texts are not at hand")


@needs_data
@pytest.mark.parametrize(("file", "field", "joined"), [("mbpp/mbpp", "text", 17), ("gsm8k/test", "question", 0)])
def test_near_duplicates_of_real_questions_are_found(file: str, field: str, joined: int) -> None:
    from scipy.cluster.hierarchy import DisjointSet

    from lens_unlearn.corpora.near_duplicates import join_near_duplicates, words

    rows = [json.loads(line) for line in (DATA / f"{file}.jsonl").read_text().splitlines()]
    made = [words(row[field]) for row in rows]
    found = DisjointSet(made)
    join_near_duplicates(dict.fromkeys(made), found)
    assert partition(map(found.__getitem__, made)) == alike(made)
    assert len(rows) - found.n_subsets == joined


@needs_data
def test_authors_of_tofu_stay_whole(loaded: Any) -> None:
    model = SimpleNamespace(tokenizer=loaded.tokenizer, cfg=SimpleNamespace(n_ctx=1024, d_vocab=320))
    path = DATA / "tofu" / "forget10.jsonl"
    corpus = read_corpus(f"{path}:question>answer@20", model, window=1024)
    assert corpus.n_documents == 400
    assert partition(corpus.units) == {frozenset(range(20 * n, 20 * n + 20)) for n in range(20)}
    fit, tune, test = corpus.split(0.4, 0.25, 0.35)
    authors = [set(part.units) for part in (fit, tune, test)]
    assert [len(found) for found in authors] == pytest.approx([8, 5, 7], abs=1)
    assert sum(map(len, authors)) == len(set.union(*authors)) == 20
    loose = read_corpus(f"{path}:question>answer", model, window=1024).split(0.4, 0.25, 0.35)
    of = dict(zip(corpus.keys, corpus.units, strict=True))
    assert len({of[key] for key in loose[2].keys} & {of[key] for key in loose[0].keys}) == 20, "all authors leak"
    # The authors stand at other places in the whole file, and are the same groups.
    full = read_corpus(f"{DATA / 'tofu' / 'full.jsonl'}:question>answer@20", model, window=1024)
    rest, removed = full.without(corpus)
    assert removed == 400
    assert rest.n_documents == full.n_documents - 400


# --- statistics ------------------------------------------------------------------------------------------------------------


def test_keys_are_sampled_by_group_and_top_tokens_by_document(model: Any) -> None:
    corpus = read_corpus(ROWS, model, field="q>a", group="author")
    plain = replace(corpus, groups=())
    keys = query_keys(model, corpus, progress=False)
    [site, *_] = keys.sites
    assert sorted(map(len, partition(keys.documents(site).tolist()))) == sorted(map(len, AUTHORS))
    assert len(set(query_keys(model, plain, progress=False).documents(site).tolist())) == len(ROWS)
    for seed in range(3):
        fit, held = (set(part.documents(site).tolist()) for part in keys.split(0.5, 0.5, seed=seed))
        assert not fit & held
        assert len(fit | held) == 4
    tops = [collect(model, c, statistic=TopTokens(3), progress=False)[site] for c in (corpus, plain)]
    assert torch.equal(tops[0].documents, tops[1].documents)
    samples = [collect(model, c, statistic=KeySample(5), progress=False) for c in (plain, replace(plain))]
    assert torch.equal(samples[0][site], samples[1][site])
