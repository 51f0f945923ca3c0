"""Selective Pruning's measures: every score is that of a plain forward pass over each text, token by token."""

import math
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from benchmark_helpers import COLORS, write_choices, write_lines
from interventions_helpers import selection_of, unchanged

import lens_unlearn as lu
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.interventions.ablate import Ablate

QUICK: dict[str, Any] = {"progress": False, "resamples": 20}
RECORD = lu.benchmarks.by_name("selective-pruning")
TEXTS = {
    "forget": [f"def add_{n}(a, b):\n    return a + {COLORS[n % 8]} * b - {n}\n" for n in range(6)],
    "retain": [f"the {COLORS[n % 8]} fox {n} jumps over the lazy dogs of village {n}" for n in range(5)],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for side, texts in TEXTS.items():
        write_lines(tmp_path / f"{side}.jsonl", [{"text": text} for text in texts])
        write_lines(tmp_path / f"{side}_fit.jsonl", [{"content": f"{text} again"} for text in texts])
    return tmp_path


def brute_force(model: Any, texts: list[str]) -> dict[str, float]:
    """Plain forward passes of single texts, and sums in Python; shares no code with the package."""
    rows = [model.tokenizer(text)["input_ids"] for text in texts]
    frequent = Counter(token for row in rows for token in row[1:])
    common = {token for token, _ in sorted(frequent.items(), key=lambda one: (-one[1], one[0]))[:50]}
    found: dict[str, list[float]] = {}
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row]))[0].double()
        for at, token in enumerate(row[1:]):
            others = logits[at].tolist()
            above = sum(one > others[token] for one in others)
            found.setdefault("loss", []).append(math.log(sum(math.exp(one) for one in others)) - others[token])
            for name, places in (("top1", 1), ("top10", 10)):
                found.setdefault(name, []).append(float(above < places))
                if token not in common:
                    found.setdefault(f"{name}_rare", []).append(float(above < places))
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def test_every_score_is_that_of_plain_forward_passes(model: Any, folder: Path) -> None:
    prune = Ablate(selection_of(model, "mlp.post", 0.5))
    with unchanged(model):
        found = lu.benchmarks.selective_pruning(model, folder, {"pruned": prune}, **QUICK)
    scores: dict[str, dict[str, float]] = {}
    for condition, acting in (("base", nullcontext()), ("pruned", prune.on(model))):
        with acting:
            for side, texts in TEXTS.items():
                expected = brute_force(model, texts)
                scores.setdefault(condition, {}).update({f"{side}_{name}": one for name, one in expected.items()})
                expected["perplexity"] = math.exp(expected["loss"])
                for name, value in expected.items():
                    tolerance = 1e-4 if name in ("loss", "perplexity") else 1e-9
                    assert found[condition, f"{side}_{name}"].value == pytest.approx(value, rel=tolerance), name
    lost = {
        side: 1 - scores["pruned"][f"{side}_top1"] / scores["base"][f"{side}_top1"]
        for side in TEXTS
        if scores["base"][f"{side}_top1"]
    }
    if len(lost) == 2:
        assert found["pruned", "selectivity"].value == pytest.approx(lost["forget"] - lost["retain"], abs=1e-9)
    assert found.metrics[:2] == ["forget_top1", "retain_top1"]
    assert found["base", "forget_top1"].n == sum(
        len(model.tokenizer(text)["input_ids"]) - 1 for text in TEXTS["forget"]
    )


def test_scores_are_ratios_of_the_sums_that_are_kept(model: Any, folder: Path) -> None:
    write_choices(folder / "mmlu.jsonl", 3)
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    found = lu.benchmarks.selective_pruning(model, folder, {}, tokens=40, window=tiny.CONTEXT // 2, **QUICK)
    kept = {str(name): part["value"].tolist() for name, part in found.losses.groupby("quantity")}
    for side in TEXTS:
        assert sum(kept[f"{side}_tokens"]) == 40
        for name in ("loss", "top1", "top10"):
            value = math.fsum(kept[f"{side}_{name}"]) / math.fsum(kept[f"{side}_tokens"])
            assert found["base", f"{side}_{name}"].value == pytest.approx(value, abs=1e-9)
    assert found["base", "mmlu"].value == pytest.approx(math.fsum(kept["mmlu"]) / 3, abs=1e-9)


def test_what_is_fitted_to_is_not_measured(folder: Path) -> None:
    data = RECORD.data(folder, None, {})
    assert [row["text"] for row in data.forget] == [f"{text} again" for text in TEXTS["forget"]]
    assert data.more["texts"] == TEXTS
    assert not data.notes
    for side in TEXTS:
        (folder / f"{side}_fit.jsonl").unlink()
    (folder / "retain.jsonl").rename(folder / "away")
    (folder / "retain.txt").write_text("<|endoftext|>".join(TEXTS["retain"]))
    halved = RECORD.data(folder, 2, {})
    assert halved.more["texts"]["retain"] == TEXTS["retain"][:4:2]
    assert [row["text"] for row in halved.retain] == TEXTS["retain"][1::2]
    assert len(halved.notes) == 2


def test_what_cannot_be_is_said_without_a_model(folder: Path) -> None:
    with pytest.raises(LensUnlearnError, match="tokens=0"):
        RECORD.data(folder, None, {"tokens": 0})
    write_lines(folder / "retain.jsonl", [{"code": "a"}])
    with pytest.raises(CorpusError, match=r"row 1 of retain has no text in the column 'text'.*it has code"):
        RECORD.data(folder, None, {})
    (folder / "retain.jsonl").unlink()
    with pytest.raises(CorpusError, match=r"selective-pruning needs retain\.jsonl"):
        RECORD.data(folder, None, {})
