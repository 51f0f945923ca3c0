"""GGUF files: what is read are the weights that were written, under a tokenizer that is the file's own."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from lens_unlearn.core.errors import ModelError
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.model import loading, special_tokens
from lens_unlearn.model.gguf import read_gguf
from lens_unlearn.model.loading import fingerprint, load_model
from lens_unlearn.neurons.collect import collect

gguf = pytest.importorskip("gguf")

WIDTH, HEADS, KV_HEADS, NEURONS, LAYERS = 32, 4, 2, 64, 2
TOKENS = ["<|endoftext|>", *(chr(code) for code in range(33, 127)), "Ġ", "Ġa", "th"]
MERGES = ["Ġ a", "t h"]


@pytest.fixture(scope="module")
def plain() -> Any:
    """A Llama of transformers, with weights that can be told apart."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def path(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(plain, file)
    return file


def write(model: Any, file: Path, kind: Any = None, *, eos: int = 0) -> None:
    """Write a Llama as llama.cpp's own converter does: rotary halves interleaved, norms in float32."""
    writer = gguf.GGUFWriter(file, "llama")
    for add, value in (
        (writer.add_block_count, LAYERS),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, WIDTH),
        (writer.add_feed_forward_length, NEURONS),
        (writer.add_head_count, HEADS),
        (writer.add_head_count_kv, KV_HEADS),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_dimension_count, WIDTH // HEADS),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_vocab_size, len(TOKENS)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_token_list, TOKENS),
        (writer.add_token_types, [3, *[1] * (len(TOKENS) - 1)]),
        (writer.add_token_merges, MERGES),
        (writer.add_bos_token_id, 0),
        (writer.add_eos_token_id, eos),
    ):
        add(value)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, weight in model.state_dict().items():
        values, stem = weight.numpy(), name.removesuffix(".weight")
        if stem in whole:
            writer.add_tensor(f"{whole[stem]}.weight", values)
            continue
        _, _, layer, rest = stem.split(".", 3)
        if rest.endswith(("q_proj", "k_proj")):
            heads = HEADS if rest.endswith("q_proj") else KV_HEADS
            values = values.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(values.shape)
        if kind is not None and values.ndim == 2:
            writer.add_tensor(f"blk.{layer}.{names[rest]}.weight", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"blk.{layer}.{names[rest]}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(source: Any, **options: Any) -> Any:
    with tiny.quiet():
        return load_model(source, device="cpu", **options)


def some_tokens() -> torch.Tensor:
    return torch.randint(1, len(TOKENS), (2, 9), generator=torch.Generator().manual_seed(0))


def test_the_numbers_are_those_of_the_model_that_was_written(plain: Any, path: Path) -> None:
    model, tokens = load(path), some_tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), plain(tokens).logits, rtol=1e-5, atol=1e-5)
    assert not any(module.training for module in model.modules())
    assert fingerprint(model)["dtype"] == "float32"
    assert model.tokenizer("that a")["input_ids"][-1] == TOKENS.index("Ġa")
    assert fingerprint(load(str(path))) == fingerprint(model)


def test_quantized_weights_become_the_dtype_asked_for(plain: Any, tmp_path: Path) -> None:
    write(plain, tmp_path / "q8.gguf", gguf.GGMLQuantizationType.Q8_0)
    model, tokens = load(tmp_path / "q8.gguf", dtype="bfloat16"), some_tokens()
    assert fingerprint(model)["dtype"] == "bfloat16"
    with torch.no_grad():
        logits, expected = model(tokens).float(), plain(tokens).logits
    assert float((logits - expected).norm() / expected.norm()) < 0.05


def reading(monkeypatch: pytest.MonkeyPatch, adds: bool, *source: Any, **options: Any) -> Any:
    """Read a file, whose tokenizer adds BOS or does not: what it does later may be what TransformerLens asked it to."""
    with monkeypatch.context() as while_it_is_read:
        while_it_is_read.setattr(special_tokens, "_begins_with", lambda tokenizer, bos: adds)
        return read_gguf(*source, **options)


@pytest.mark.parametrize("adds", [True, False])
def test_texts_begin_as_the_files_own_tokenizer_has_them(
    plain: Any, tmp_path: Path, adds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever TransformerLens asks the tokenizer for, and beside other files, of which the folder cannot be read as one."""
    write(plain, tmp_path / "one.gguf", eos=1)
    write(plain, tmp_path / "other.gguf", eos=1)
    monkeypatch.setattr(loading, "read_gguf", partial(reading, monkeypatch, adds))
    corpus = read_corpus(["that a"], load(tmp_path / "one.gguf"))
    assert (corpus.tokens[0].item() == 0) == adds


@pytest.mark.parametrize("adds", [True, False])
def test_so_they_do_where_model_and_tokenizer_are_given(
    plain: Any, tmp_path: Path, adds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(plain, tmp_path / "one.gguf", eos=1)
    held, tokenizer = reading(monkeypatch, adds, str(tmp_path), "one.gguf", dtype=torch.float32)
    model = load(held, tokenizer=tokenizer)
    fresh, _ = read_gguf(str(tmp_path), "one.gguf", dtype=torch.float32)
    for again in (model, load(fresh, tokenizer=model.tokenizer)):  # also where TransformerLens has changed it by then
        assert (read_corpus(["that a"], again).tokens[0].item() == 0) == adds


def test_it_is_a_model_like_any_other(path: Path) -> None:
    model = load(path)
    score = collect(model, read_corpus(["that a", "a thing"], model), progress=False).mean_abs
    before = tiny.logits(model, some_tokens())
    with Ablate(score.top(0.5)).on(model):
        assert not torch.equal(tiny.logits(model, some_tokens()), before)
    assert torch.equal(tiny.logits(model, some_tokens()), before)


def test_damaged_and_missing_files_are_refused_in_a_sentence(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = path.read_bytes()
    for kept, message in (
        (0, "is no GGUF file"),
        (4, "cannot be loaded as a model"),
        (200, "cannot be loaded as a model"),
        (len(whole) // 2, "cannot be loaded as a model"),
    ):
        (tmp_path / "cut.gguf").write_bytes(whole[:kept])
        with pytest.raises(ModelError, match=message) as caught:
            load(tmp_path / "cut.gguf")
        assert "\n" not in str(caught.value)
    for name in (tmp_path / "none.gguf", "none.gguf", "./none.gguf", tmp_path):
        with pytest.raises(ModelError, match=r"there is no GGUF file|such as .*cut\.gguf"):
            load(name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'lens-unlearn\[gguf\]'"):
        load(path)


def test_a_device_map_places_its_weights_and_a_disk_is_refused_in_a_sentence(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    with tiny.quiet():
        placed, plain = load_model(str(path), device_map="auto"), load_model(str(path))
    assert fingerprint(placed) == fingerprint(plain)
    tokens = tiny.some_tokens(2, 7) % len(TOKENS)
    assert torch.equal(tiny.logits(placed, tokens), tiny.logits(plain, tokens))
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    with pytest.raises(ModelError, match="Disk offload is not supported for models loaded from GGUF"):
        load_model(str(path), device_map={**places, "model.layers.1": "disk"}, offload_folder=tmp_path)
