"""Sources on the command line: what Python reads is read there, too, and what cannot be read is one sentence."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from command_line_helpers import call, write_texts

import lens_unlearn as lu
from lens_unlearn.experiments.documents import Reader, reading_of
from lens_unlearn.experiments.plan import Plan, command_of, settings_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that a pattern could confuse, and a folder of questions."""
    write_texts(tmp_path / "data[1].jsonl", 1, 3)
    write_texts(tmp_path / "data1.jsonl", 2, 5)
    facts = tmp_path / "facts"
    facts.mkdir()
    for part in range(2):
        rows = [{"q": f"what is {n}?", "a": [n, f"it is {n}"], "who": f"W{n % 2}"} for n in range(4)]
        (facts / f"{part}.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return tmp_path


def test_sources_are_read_as_in_python(folder: Path, model_dir: Path, model: Any) -> None:
    names = {
        "one": f"{folder}/data[1].jsonl", "all": f"{folder}/data*.jsonl:text", "facts": f"{folder}/facts:q>a@who",
    }  # fmt: skip
    corpora = [word for name, source in names.items() for word in ("--corpus", f"{name}={source}")]
    assert call("evaluate", "--model", model_dir, *corpora, "--window", 64, "--out", folder / "out", "--quiet") == 0
    found = json.loads((folder / "out" / "run.json").read_text())["corpora"]
    assert {name: one["documents"] for name, one in found.items()} == {"one": 3, "all": 8, "facts": 8}
    assert found["facts"]["units"] == 2
    for name, source in names.items():
        assert found[name]["fingerprint"] == lu.read_corpus(source, model, window=64).fingerprint


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("data[2].jsonl", (), "there is no file"),
        ("*.csv", (), "and none that matches it as a pattern"),
        ("facts:q>b", (), "0.jsonl.gz has no field 'b': its fields are q, a, who"),
        ("data1.jsonl", ("--tokens", -5), "tokens=-5 is no number of tokens: give a whole number, at least 2"),
        ("data1.jsonl", ("--shuffle", 0), "shuffle=0 is no number of documents to draw from"),
        ("data1.jsonl", ("--batch-size", 0), "batch_size=0 is no number of rows: give a whole number, at least 1"),
        ("data1.jsonl", ("--window", 1), "window=1 is no number of tokens: give a whole number, at least 2"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(
    folder: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], source: str, options: Any, message: str
) -> None:
    out = folder / "moments.safetensors"
    assert call("collect", "--model", model_dir, "--corpus", folder / source, "--out", out, "--quiet", *options) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not out.exists()


def test_a_shuffle_is_a_setting_of_a_run(folder: Path, model: Any) -> None:
    plan = Plan("demo", f"{folder}/data1.jsonl", ("demo:english",), shuffle=5, seed=3, tokens=100)
    assert reading_of(plan, whole=False) | {"shuffle": 5, "seed": 3} == reading_of(plan, whole=False)
    assert "--shuffle 5" in command_of(plan)
    assert settings_of(plan)["shuffle"] == 5
    usual = Plan("demo", f"{folder}/data1.jsonl", ("demo:english",), tokens=100)
    assert "shuffle" not in settings_of(usual), "plans of earlier runs are the same without"
    read = [Reader(one, model, {}).corpus(one.forget) for one in (plan, usual)]
    assert read[0].fingerprint == read[1].fingerprint, "all of it is read"


def test_a_shuffle_is_an_option_of_every_command_that_reads(folder: Path, model_dir: Path) -> None:
    rows = [{"text": f"document number {n}", "who": f"W{n // 50}"} for n in range(400)]
    (folder / "sorted.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = f"c={folder}/sorted.jsonl:text@who"
    out = folder / "out"
    reading = ["--model", model_dir, "--corpus", corpus, "--tokens", 300, "--out", out, "--quiet", "--overwrite"]
    units = []
    for options in (("--shuffle", 400), ()):
        if options:
            assert call("evaluate", *reading, *options) == 0
        else:
            with pytest.warns(
                UserWarning, match="seems to be sorted by 'who', and tokens=300 took the first 1 groups alone"
            ):
                assert call("evaluate", *reading) == 0
        units.append(json.loads((out / "run.json").read_text())["corpora"]["c"]["units"])
    assert units[0] > 3 > units[1] == 1
