"""`lu.skill_graph`: on a planted model, against plain PyTorch; its file; and the command."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from command_line_helpers import WORDS, call, write_texts
from skill_graph_helpers import CYCLES, NEURONS, NEXT, accuracy, planted, texts

import lens_unlearn as lu
from lens_unlearn.core import artefacts
from lens_unlearn.core.errors import ArtefactError, CorpusError, LensUnlearnError
from lens_unlearn.evaluation.skill_graph import SkillGraph
from lens_unlearn.methods.controls import controls_for

SEEDS = 5
FRACTION = 10 / (2 * NEURONS)
OPTIONS: dict[str, Any] = {
    "fraction": FRACTION, "seeds": SEEDS, "tokens": 100_000, "batch_size": 16, "resamples": 400, "progress": False
}  # fmt: skip


@pytest.fixture(scope="module")
def models() -> Any:
    return planted()


@pytest.fixture(scope="module")
def corpora() -> tuple[dict[str, Any], dict[str, Any]]:
    return {name: texts(name, 0) for name in CYCLES}, {name: texts(name, 1) for name in CYCLES}


@pytest.fixture(scope="module")
def graph(models: Any, corpora: Any) -> SkillGraph:
    return lu.skill_graph(models[1], corpora[0], test=corpora[1], **OPTIONS)


def neurons(*tokens: int) -> set[int]:
    return {list(NEXT).index(token) for token in tokens}


def test_the_planted_dependence_is_found_and_what_is_separate_is_not(graph: SkillGraph) -> None:
    """The neurons of the first half of a's cycle are b's as well; those of c are nobody else's."""
    chosen = {
        name: set(selection["mlp.post"].stack()[0].nonzero()[:, 0].tolist())
        for name, selection in graph.selections.items()
    }
    assert chosen["a"] == neurons(*CYCLES["a"])
    assert chosen["c"] == neurons(*CYCLES["c"])
    assert chosen["b"] >= neurons(30, 31, 32, 33, 34)
    assert {(one.removed, one.measured) for one in graph.edges} == {("a", "b"), ("b", "a")}
    assert graph.costs["a", "b"].beyond.low > 0.2
    assert all(graph.costs[name, name].beyond.low > 0.5 for name in CYCLES)
    overlaps = graph.overlaps().set_index(["a", "b", "site"])
    shared = overlaps.loc["a", "b", "all"]
    assert shared["both"] == 5
    assert shared["expected_high"] < 5
    assert shared["p_joint"] < 1e-4
    assert overlaps.loc["a", "c", "all"]["both"] == 0
    assert graph.ratios().set_index(["skill", "layer"]).loc[("a", 0)]["share"] == 1, "the second layer does nothing"


def test_selections_drops_and_chance_are_those_of_plain_hooks(models: Any, corpora: Any, graph: SkillGraph) -> None:
    plain, model = models
    fit, test = corpora
    activations: dict[str, torch.Tensor] = {}
    for name, corpus in fit.items():
        seen: list[torch.Tensor] = []

        def watch(_: Any, args: Any, seen: list[torch.Tensor] = seen) -> None:
            seen.append(args[0][0].abs().double())

        handles = [block.mlp.c_proj.register_forward_pre_hook(watch) for block in plain.transformer.h]
        accuracy(plain, corpus)
        for handle in handles:
            handle.remove()
        activations[name] = torch.stack([torch.cat(seen[layer::2]) for layer in range(2)])  # [layers, tokens, neurons]
    base = {name: accuracy(plain, corpus).mean() for name, corpus in test.items()}
    assert base["a"] > 0.8
    for number, removed in enumerate(CYCLES):
        others = torch.cat([activations[name] for name in CYCLES if name != removed], dim=1)
        score = activations[removed].mean(1) / (others.mean(1) + 1e-3)
        live = (torch.cat([activations[removed], others], dim=1).std(1) > 1e-6).double()
        best = (score * live).flatten().topk(10).indices
        mask = torch.zeros(2 * NEURONS, dtype=torch.bool)
        mask[best] = True
        mask = mask.reshape(2, NEURONS)
        assert torch.equal(mask, graph.selections[removed]["mlp.post"].stack())
        seeds = range(number * SEEDS, (number + 1) * SEEDS)
        rest = [corpus for name, corpus in fit.items() if name != removed]
        drawn = controls_for(model, graph.interventions[removed], seeds, fit[removed], rest[0] + rest[1])
        chances = [one.selection.stack() for one in drawn if isinstance(one, lu.Ablate)]
        assert len({tuple(one.flatten().nonzero()[:, 0].tolist()) for one in chances}) == SEEDS
        for measured, corpus in test.items():
            cost = graph.costs[removed, measured]
            lost = 1 - accuracy(plain, corpus, dict(enumerate(mask))).mean() / base[measured]
            by_chance = np.mean(
                [1 - accuracy(plain, corpus, dict(enumerate(one))).mean() / base[measured] for one in chances]
            )
            assert cost.drop.value == pytest.approx(lost, abs=1e-9)
            assert cost.chance.value == pytest.approx(by_chance, abs=1e-9)
            assert cost.beyond.value == pytest.approx(lost - by_chance, abs=1e-9)


def test_without_test_texts_documents_are_split_and_none_is_used_twice(models: Any, corpora: Any) -> None:
    found = lu.skill_graph(models[1], corpora[0], **{**OPTIONS, "seeds": 2, "resamples": 50})
    for skill, counts in found.provenance["documents"].items():
        tested = found.provenance["corpora"][skill]["documents"]
        assert counts["fit"]["forget"]["documents"] + tested == 30
        assert 8 <= tested <= 13
        assert not counts["tune"]


def test_a_graph_comes_back_from_its_file(graph: SkillGraph, models: Any, tmp_path: Path) -> None:
    path = tmp_path / "graph.safetensors"
    lu.save_skill_graph(path, graph, models[1])
    again = lu.load_skill_graph(path, models[1])
    pd.testing.assert_frame_equal(again.to_frame(), graph.to_frame())
    pd.testing.assert_frame_equal(again.overlaps(), graph.overlaps())
    pd.testing.assert_frame_equal(again.correlations(), graph.correlations())
    pd.testing.assert_frame_equal(again.ratios(), graph.ratios())
    assert again.provenance["method"] == "selective-pruning"
    header, tensors = artefacts.read(path)
    for change in ({"selections": ["a", "b"]}, {"metric": "loss"}, {"report": "{}"}, {"scores": 3}):
        artefacts.write(path, "skill graph", tensors, {**header, **change})
        with pytest.raises(ArtefactError, match="holds no skill graph that can be read"):
            lu.load_skill_graph(path)
    with pytest.raises(ArtefactError, match="holds no skill graph"):
        lu.load_skill_graph(tmp_path)
    os.truncate(path, 1000)
    with pytest.raises(ArtefactError, match="damaged"):
        lu.load_skill_graph(path)


def test_what_cannot_be_a_graph_is_refused_before_anything_is_run(models: Any, corpora: Any) -> None:
    model, (fit, test) = models[1], corpora
    one, two = {"a": fit["a"]}, {"a": fit["a"], "b": fit["b"]}
    wrong: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (one, {}, "there are 1 skills to compare on"),
        ({"base": fit["a"], "b": fit["b"]}, {}, "'base' cannot name a skill"),
        (two, {"seeds": 1}, "seeds=1 random controls say nothing of how they vary: give a whole number, at least 2"),
        (two, {"method": "nothing"}, "there is no method 'nothing'"),
        (two, {"metric": "loss"}, "metric='loss' is none of next tokens that falls"),
        (two, {"metric": "exact_match"}, "metric='exact_match' is none of next tokens"),
        (two, {"fraction": 2}, "fraction=2 is not a share of the neurons"),
        (two, {"fraction": 0.0}, "selects nothing"),
        (two, {"settings": {"unknown": 1}}, "no method of this run has such an option"),
        (two, {"resamples": 0}, "resamples=0"),
        (two, {"test": {"a": test["a"]}}, "give each skill's, or none"),
        ({"a": fit["a"], "b": fit["a"]}, {}, "every document of a also stands in b"),
    ]
    for skills, options, message in wrong:
        with pytest.raises(LensUnlearnError, match=message):
            lu.skill_graph(model, skills, **{**OPTIONS, **options})
    with pytest.raises(CorpusError, match="skills are given by name"):
        lu.skill_graph(model, fit["a"], **OPTIONS)


# --- the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return {
        "forward": write_texts(folder / "forward.jsonl", 1),
        "back": write_texts(folder / "back.jsonl", 2, words=[word[::-1] for word in WORDS]),
    }


def arguments(model_dir: Path, sources: dict[str, Path], out: Path) -> list[object]:
    skills = [part for name, path in sources.items() for part in ("--skill", f"{name}={path}:text")]
    return [
        "graph", "--model", model_dir, *skills, "--fraction", 0.1, "--seeds", 2, "--tokens", 300, "--window", 32,
        "--metric", "top10", "--quiet", "--out", out,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def written(model_dir: Path, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("graph") / "out"
    assert call(*arguments(model_dir, sources, out)) == 0
    return out


def test_the_command_writes_the_page_tables_graph_and_interventions(written: Path, model: Any) -> None:
    tables = ("costs", "overlaps", "correlations", "ratios")
    names = {"graph.html", "graph.safetensors", "run.json", "forward.safetensors", "back.safetensors"}
    assert {path.name for path in written.iterdir()} == names | {f"{table}.csv" for table in tables}
    assert os.listdir(written.parent) == ["out"]
    found = lu.load_skill_graph(written, model)
    assert found.skills == ["forward", "back"]
    table = pd.read_csv(written / "costs.csv")
    np.testing.assert_allclose(table.cost, found.to_frame().cost)
    assert len(pd.read_csv(written / "ratios.csv")) == len(found.ratios())
    assert isinstance(found.interventions["forward"], lu.Ablate)
    assert torch.equal(found.interventions["forward"].selection.flat(), found.selections["forward"].flat())
    settings = json.loads((written / "run.json").read_text())
    assert settings["method"] == "selective-pruning"
    assert settings["options"]["fraction"] == 0.1
    assert set(settings["files"]) == {path.name for path in written.iterdir()}
    page = (written / "graph.html").read_text()
    assert "beyond chance" in page
    with pytest.raises(LensUnlearnError, match="holds a skill graph, which lu.load_skill_graph reads"):
        lu.load_report(written)


def test_bad_input_is_one_sentence_and_leaves_nothing(
    model_dir: Path, sources: dict[str, Path], written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = arguments(model_dir, sources, tmp_path / "out")
    one = {"forward": sources["forward"]}
    missing = {**sources, "third": tmp_path / "missing.jsonl"}
    wrong: list[tuple[list[object], str]] = [
        (arguments(model_dir, one, tmp_path / "out"), "there are 1 skills"),
        (arguments(model_dir, missing, tmp_path / "out"), "missing.jsonl"),
        ([*good, "--test", f"forward={sources['forward']}:text"], "give each skill's, or none"),
        ([*good, "--method", "nothing"], "there is no method 'nothing'"),
        ([*good, "--metric", "loss"], "metric='loss'"),
        ([*good, "--skill", "no"], "write it as NAME=VALUE"),
        ([*good[:-1], written], "holds another run"),
    ]
    for given, message in wrong:
        assert call(*given) == 2, message
        said = capsys.readouterr().err.strip()
        assert message in said
        assert len(said.splitlines()) == 1
        assert os.listdir(tmp_path) == []
