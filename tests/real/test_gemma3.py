"""Gemma-3-270M, a base model of many languages with a vocabulary larger than the rest of it; `make real` fetches it."""

import ctypes
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import lens_unlearn as lu
from lens_unlearn.evaluation.teacher_forcing import predict

pytestmark = pytest.mark.real

FILE = Path(__file__).parents[2] / ".models" / "gemma-3-270m-Q4_K_M.gguf"
GIGABYTE = 2**30


@pytest.fixture(scope="module")
def gemma3() -> Any:
    if not FILE.is_file():
        pytest.skip(f"{FILE.name} is not here: make real fetches it")
    pytest.importorskip("gguf")
    with tiny.quiet():
        return lu.load_model(FILE, device="cpu")


def test_it_is_read_in_its_own_shape(gemma3: Any) -> None:
    assert (gemma3.cfg.n_layers, gemma3.cfg.d_model, gemma3.cfg.d_vocab) == (18, 640, 262_144)


def test_texts_begin_with_the_bos_that_it_was_trained_with(gemma3: Any) -> None:
    corpus = lu.read_corpus(["Das Meer ist blau."], gemma3)
    assert corpus.tokens[: corpus.n_tokens].tolist()[0] == gemma3.tokenizer.bos_token_id


def test_logits_in_parts_are_those_of_a_whole_pass(gemma3: Any) -> None:
    (batch,) = lu.read_corpus(["Das Meer ist blau.", "The sea is blue, and so is the sky."], gemma3).batches(8)
    with torch.no_grad():
        predicted = predict(gemma3, batch)
        expected = gemma3(batch.tokens, return_type="logits")[:, :-1][batch.counted[:, 1:]]
    assert predicted.hidden.shape[1] == 640
    torch.testing.assert_close(predicted.logits(), expected, rtol=1e-3, atol=1e-2)  # with another attention


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_evaluating_takes_less_than_a_gigabyte_beyond_the_model(gemma3: Any) -> None:
    """The logits of this one batch, of 2,000 tokens, alone would take 2 GB in float32."""
    corpus = lu.read_corpus(["The sea is blue. " * 200] * 8, gemma3, window=512)
    edits = {
        f"{n}": lu.Ablate(lu.NeuronMap({lu.Site(0, "mlp.post"): torch.arange(2048) < n})) for n in (20, 40, 60, 80)
    }

    def memory(key: str) -> int:
        with open("/proc/self/status", encoding="utf-8") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # of glibc
        trim(0)  # what loading left behind would hide as much of the peak
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    lu.evaluate(gemma3, {"c": corpus.first(2000)}, edits, batch_size=8, resamples=10, progress=False)
    assert memory("VmHWM") - before < GIGABYTE
