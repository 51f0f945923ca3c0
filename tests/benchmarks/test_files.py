"""A benchmark's data are the same from a folder of its files and from a data set of the hub: as far as loading can be, offline."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmark_helpers import write_effective, write_lines, write_muse, write_rwku, write_tofu, write_wmdp

from lens_unlearn.benchmarks import by_name
from lens_unlearn.core.errors import CorpusError

Splits = dict[tuple[str, str], Path]


def write_hub(folder: Path, splits: Splits) -> str:
    """A data set as repositories of the hub have it: files by configuration and split, named at the head of a README."""
    lines = ["---", "configs:"]
    for config in dict.fromkeys(config for config, _ in splits):
        lines += [f"- config_name: {config}", "  data_files:"]
        for (own, split), source in splits.items():
            if own == config:
                text = source.read_text(encoding="utf-8")
                rows = json.loads(text) if source.suffix == ".json" else [json.loads(one) for one in text.splitlines()]
                rows = [{"text": row} if isinstance(row, str) else row for row in rows]
                write_lines(folder / config / f"{split}.jsonl", rows)
                lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return f"hf:{folder}"


def tofu(folder: Path) -> Splits:
    return {(path.stem, "train"): path for path in sorted(write_tofu(folder, 2).glob("*.jsonl"))}


def muse(folder: Path) -> Splits:
    return {(path.parent.name, path.stem): path for path in sorted(write_muse(folder, 2).glob("*/*.json"))}


def rwku(folder: Path) -> Splits:
    names = {"forget_mia": "mia_forget", "retain_mia": "mia_retain"}
    return {(names.get(path.stem, path.stem), "test"): path for path in sorted(write_rwku(folder, 2).glob("*.json"))}


def wmdp(folder: Path) -> Splits:
    return {(f"wmdp-{path.stem[:-10]}", "test"): path for path in sorted(write_wmdp(folder, 2).glob("*.json"))}


HUB: dict[str, Callable[[Path], Splits]] = {"tofu": tofu, "muse": muse, "rwku": rwku, "wmdp": wmdp}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", HUB)
def test_a_data_set_of_the_hub_is_read_as_the_files_are(name: str, tmp_path: Path) -> None:
    splits = HUB[name](tmp_path / "local")
    record = by_name(name)
    local = record.data(tmp_path / "local", None, {})
    there = record.data(write_hub(tmp_path / "there", splits), None, {})
    assert there.items == local.items
    assert (there.forget, there.retain) == (local.forget, local.retain) or name == "muse"
    for key in ("sets", "attack", "choices"):
        assert there.more.get(key) == local.more.get(key)


def test_a_skill_of_the_hub_is_measured_alone(tmp_path: Path) -> None:
    """GSM8K, and XQuAD with rows as the hub has them, flat."""
    local = write_effective(tmp_path / "local", 4)
    record, options = by_name("effective-skill"), {"shots": 0}
    expected = record.data(local, None, options)
    files = {("main", split): local / "gsm8k" / f"{split}.jsonl" for split in ("test", "train")}
    sums = record.data(write_hub(tmp_path / "gsm8k", files), None, options)
    assert sums.more["skills"] == ["gsm8k"]
    assert [one.prompt for one in sums.items] == [one.prompt for one in expected.items if one.task == "gsm8k"]
    assert sums.forget == expected.forget
    (article,) = json.loads((local / "xquad" / "xquad.es.json").read_text())["data"]
    flat: list[dict[str, Any]] = [
        {
            "context": one["context"],
            "question": asked["question"],
            "answers": {"text": [a["text"] for a in asked["answers"]]},
        }
        for one in article["paragraphs"]
        for asked in one["qas"]
    ]
    write_lines(tmp_path / "flat.jsonl", flat)
    spanish = record.data(
        write_hub(tmp_path / "xquad", {("xquad.es", "validation"): tmp_path / "flat.jsonl"}), None, {"languages": "es"}
    )
    assert [(one.prompt, one.reference) for one in spanish.items] == [
        (one.prompt, one.reference) for one in expected.items if one.task == "language_es"
    ]


def test_what_the_hub_has_not_is_said_with_its_name(tmp_path: Path) -> None:
    splits = {key: path for key, path in rwku(tmp_path / "local").items() if key[0] != "neighbor_level2"}
    there = write_hub(tmp_path / "there", splits)
    with pytest.raises(CorpusError, match=r"there/neighbor_level2:test cannot be loaded from the hub"):
        by_name("rwku").data(there, None, {})
    with pytest.raises(CorpusError, match="cannot be loaded from the hub"):
        by_name("tofu").data("hf:nobody/nothing", None, {})
