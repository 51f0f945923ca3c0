"""`dtype="auto"`: bfloat16 where it is fast and loses nothing that the weights hold, float32 elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

import lens_unlearn as lu
from lens_unlearn.model import dtypes, loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.save_model(str(path))
    return path


@pytest.mark.parametrize(
    ("stored", "fast", "expected"),
    [
        ("float32", True, torch.float32),
        ("bfloat16", True, torch.bfloat16),
        ("float16", True, torch.bfloat16),
        ("bfloat16", False, torch.float32),
    ],
)
def test_auto(
    folder: Path, stored: str, fast: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with tiny.quiet():
        held = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, stored))
        held.save_pretrained(tmp_path)
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "has_fast_bfloat16", lambda device: fast)
    model = lu.load_model(tmp_path, dtype="auto", device="cpu")
    assert next(model.parameters()).dtype == expected
    assert next(lu.load_model(tmp_path, device="cpu").parameters()).dtype == torch.float32


def test_what_a_configuration_says_of_its_weights() -> None:
    class Config:
        dtype: Any = None
        text_config: Any = None

    config = Config()
    assert dtypes.stored_dtype(config) is torch.float32
    config.text_config = Config()
    config.text_config.dtype = "torch.float16"
    assert dtypes.stored_dtype(config) is torch.float16
    config.dtype = torch.bfloat16
    assert dtypes.stored_dtype(config) is torch.bfloat16
    config.dtype = "int8"
    assert dtypes.stored_dtype(config) is torch.float32


def test_fast_is_what_has_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in ({"_is_avx512_bf16_supported"}, {"_is_amx_tile_supported"}, set[str]()):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda name=name, names=names: name in names, raising=False)
        assert dtypes.has_fast_bfloat16("cpu") == bool(names)
    assert not dtypes.has_fast_bfloat16("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert dtypes.has_fast_bfloat16("cuda:1") == supported
