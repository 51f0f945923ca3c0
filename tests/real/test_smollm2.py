"""SmolLM2-135M, a pretrained chat model: what holds on the toy models has to hold there. `make real` fetches it and runs this."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import lens_unlearn as lu

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
FILE = ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def smollm2() -> Any:
    if not FILE.is_file():
        pytest.skip(f"{FILE.name} is not here: make real fetches it")
    pytest.importorskip("gguf")
    with tiny.quiet():
        return lu.load_model(FILE, device="cpu")


def read(model: Any, part: str, skill: str, tokens: int) -> lu.Corpus:
    file = DATA / f"skillmix_{part}" / f"{skill}.jsonl"
    if not file.is_file():
        pytest.skip(f"{file.name} is not here")
    return lu.read_corpus(f"{file}:text", model, tokens=tokens, window=128)


def test_it_knows_what_it_was_trained_on(smollm2: Any) -> None:
    assert (smollm2.cfg.n_layers, smollm2.cfg.d_model, smollm2.cfg.d_vocab) == (30, 576, 49_152)
    (answer,) = lu.generate(smollm2, "The capital of France is", max_new_tokens=4)
    assert answer.startswith(" Paris")


def test_its_numbers_are_those_of_transformers(smollm2: Any) -> None:
    from transformers import AutoModelForCausalLM

    with tiny.quiet():
        plain = AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32).eval()
    tokens = torch.tensor([smollm2.tokenizer("def add(a, b):\n    return a + b\n")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(smollm2(tokens), plain(tokens).logits, rtol=1e-3, atol=1e-3)


def test_texts_begin_as_it_was_trained(smollm2: Any) -> None:
    corpus = lu.read_corpus(["The sea is blue."], smollm2)
    assert corpus.tokens[: corpus.n_tokens].tolist() == smollm2.tokenizer("The sea is blue.")["input_ids"]


def test_a_fiftieth_of_its_neurons_holds_much_of_code_and_little_of_prose(smollm2: Any) -> None:
    """The papers' fractions work on a real model; of the toy models a quarter of the neurons is needed for as much."""
    code, prose = (read(smollm2, "fit", skill, 2000) for skill in ("code", "prose"))
    prune = lu.selective_pruning(smollm2, code, prose, fraction=0.02, progress=False)
    control = lu.random_pruning(smollm2, code, prose, like=prune)
    test = {"forget": read(smollm2, "heldout", "code", 1200), "retain": read(smollm2, "heldout", "prose", 1200)}
    report = lu.evaluate(smollm2, test, {"pruned": prune, "control": control}, progress=False, batch_size=2)
    assert report.drop("pruned", "forget").value > 0.12
    assert report.drop("pruned", "retain").value < 0.08
    assert report.drop("control", "forget").value < 0.08
    assert report.drop("control", "retain").value < 0.08
