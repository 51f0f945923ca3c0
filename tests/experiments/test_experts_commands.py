"""Whole runs on neurons inside routed experts, in Python and on the command line."""

import json
from pathlib import Path
from typing import Any

import moe
import pytest
import tiny
import torch
from command_line_helpers import WORDS, call, run_arguments, write_texts

import lens_unlearn as lu
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.neurons.collect import load_moments


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mixtral")
    with tiny.quiet(0):
        tiny.save_tokenizer(str(made))
        tokens = tiny.load_tokenizer(str(made))([" ".join(WORDS), " ".join(word[::-1] for word in WORDS)])["input_ids"]
        plain = moe.plain("mixtral")
        adam = torch.optim.AdamW(plain.parameters(), 1e-2)
        for step in range(40):  # so that there is something to lose
            row = torch.tensor([tokens[step % 2]])
            plain(row, labels=row).loss.backward()
            adam.step()
            adam.zero_grad()
        plain.save_pretrained(made)
    return made


def test_a_run_finds_neurons_inside_experts(folder: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--method", "selective-pruning", "--set", "site=experts.post", "--set", "fraction=0.1"]
    assert call(*run_arguments(folder, texts, out), *options) == 0
    run = json.loads((out / "run.json").read_text())
    assert "in experts with the same load" in json.dumps(run)
    page = (out / "report.html").read_text()
    assert "by expert" in page
    assert "How forget and retain are routed" in page
    edit = load_intervention(next(out.glob("**/selective-pruning.safetensors")))
    assert isinstance(edit, Ablate)
    assert edit.selection.kinds == ["experts.post"]
    assert set(edit.selection.experts.values()) == {4}


def test_statistics_of_experts_are_collected_on_the_command_line(
    folder: Path, texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "moments.safetensors"
    arguments = ["collect", "--model", folder, "--corpus", f"{texts['forget']}:text", "--tokens", 300, "--quiet"]
    assert call(*arguments, "--sites", "experts.post,shared.post", "--out", out) != 0
    assert "no other layer has shared.post either" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
    assert call(*arguments, "--sites", "experts.post", "--out", out) == 0
    moments = load_moments(out)
    assert {len(tokens) for tokens in moments.routed_tokens.values()} == {4}
    assert all(float(tokens.sum()) == 2 * moments.n for tokens in moments.routed_tokens.values())


def test_skills_are_compared_on_neurons_inside_experts(folder: Path, tmp_path: Path) -> None:
    texts = {
        "plain": write_texts(tmp_path / "a.jsonl", 1, 60),
        "reversed": write_texts(tmp_path / "b.jsonl", 2, 60, [word[::-1] for word in WORDS]),
    }
    with tiny.quiet():
        model = lu.load_model(folder)
    skills: Any = {name: lu.read_corpus(f"{path}:text", model) for name, path in texts.items()}
    report = lu.compare(
        model, skills, ["selective-pruning"], settings={"site": "experts.post"}, retain_drop=0.5, tokens=400, controls=1,
        progress=False,
    )  # fmt: skip
    assert "in experts with the same load" in report.provenance["controls"]["selective-pruning"]
    assert set(report.conditions) >= {"base", "selective-pruning"}
