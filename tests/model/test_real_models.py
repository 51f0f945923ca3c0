"""Small real trained models and real text, where they are at hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lens_unlearn as lu

SHARED = Path(__file__).parents[3] / "shared"
MODELS, DATA = SHARED / "models", SHARED / "data"
pytestmark = pytest.mark.skipif(
    not (MODELS / "skillmix").is_dir(), reason="the shared models and texts are not at hand"
)


@pytest.fixture(scope="module")
def skillmix() -> Any:
    return lu.load_model(MODELS / "skillmix")


def read(model: Any, part: str, skill: str, tokens: int = 4000) -> lu.Corpus:
    whole = lu.read_corpus(DATA / f"skillmix_{part}" / f"{skill}.jsonl", model, window=160)
    return whole.sample(tokens)


def test_selective_pruning_forgets_code_and_keeps_prose_and_maths(skillmix: Any) -> None:
    prose, maths = (read(skillmix, "fit", skill) for skill in ("prose", "math"))
    prune = lu.selective_pruning(
        skillmix, read(skillmix, "fit", "code", 8000), prose + maths, fraction=0.3, progress=False
    )
    controls = [lu.random_pruning(skillmix, like=prune, seed=seed) for seed in range(3)]
    test = {
        name: read(skillmix, "heldout", skill, 6000)
        for name, skill in (("forget", "code"), ("retain", "prose"), ("math", "math"))
    }
    report = lu.evaluate(skillmix, test, {"pruned": prune, "pruned:control": controls}, progress=False)
    assert report.drop("pruned", "forget").value > 0.45
    assert report.drop("pruned", "retain").value < 0.2
    assert report.drop("pruned", "math").value < 0.2
    assert report.selectivity("pruned").interval()[0] > report.selectivity("pruned:control").interval()[1]
    assert abs(report.selectivity("pruned:control").value) < 0.12


def test_the_dead_neurons_of_a_relu_model_are_known(skillmix: Any) -> None:
    code, prose = read(skillmix, "fit", "code", 8000), read(skillmix, "fit", "prose", 8000)
    score = lu.collect(skillmix, code, progress=False).mean_abs / (
        lu.collect(skillmix, prose, progress=False).mean_abs + 1e-3
    )
    dead = ~score.live
    assert 20 <= dead.count() <= 80  # 35 of 4,608 on the texts of the first measurement
    assert (score.top(1 - dead.count() / score.numel()) & dead).count() == 0


def test_a_grouped_query_model_is_ablated_and_restored_bit_for_bit() -> None:
    model = lu.load_model(MODELS / "stories260K")
    tokens = torch.arange(3, 43)[None]
    stories = lu.read_corpus(DATA / "tinystories" / "gusjengis_2MiB.txt", model, tokens=2000, window=128)
    assert stories.n_documents >= 5
    moments = lu.collect(model, stories, ("mlp.pre_linear", "mlp.post", "attn.z"), progress=False)
    before = model(tokens)
    edit = lu.Ablate(moments.mean_abs["mlp.post"].top(0.3)) + lu.Ablate(moments.rms["attn.z"].top(0.1))
    with edit.on(model):
        assert not torch.equal(model(tokens), before)
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize(
    ("source", "least"),
    [
        ("gsm8k/test.jsonl:question>answer", 100),
        ("mbpp/mbpp.jsonl:text>code", 100),
        ("code_python/python_files.jsonl:text", 20),
        ("tofu/forget10.jsonl:question>answer", 100),
    ],
)
def test_real_files_are_read_as_they_are(skillmix: Any, source: str, least: int) -> None:
    corpus = lu.read_corpus(f"{DATA}/{source}", skillmix, tokens=20_000)
    assert corpus.n_documents >= least or corpus.n_tokens == 20_000
    if ">" in source:
        row = corpus.row(0)
        assert 0 < len(corpus.prompt(0)) < len(row)
