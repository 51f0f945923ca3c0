"""Models: loading says what is wrong, and a fingerprint tells apart what is different and nothing else."""

import copy
import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from interventions_helpers import selection_of

from lens_unlearn.core.errors import ModelError
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.model import loading
from lens_unlearn.model.host import host_version
from lens_unlearn.model.loading import as_in_file, fingerprint, load_model, model_name
from lens_unlearn.neurons.collect import collect

FIELDS = ["layers", "width", "heads", "vocabulary", "dtype", "processing", "weights"]


@pytest.fixture
def copied(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "copy"))


def load(source: Any, **options: Any) -> Any:
    with tiny.quiet():
        return load_model(source, device="cpu", **options)


def test_a_directory_is_loaded_raw_in_evaluation_mode_with_its_tokenizer(model: Any) -> None:
    assert fingerprint(model)["processing"] == "bridge"
    assert not any(module.training for module in model.modules())
    assert model.tokenizer.bos_token == "<bos>"
    tokens = tiny.some_tokens()
    torch.testing.assert_close(
        tiny.logits(model, tokens), tiny.logits(tiny.hugging_face("gpt2"), tokens), rtol=1e-5, atol=1e-5
    )


def test_strings_and_paths_load_the_same(model: Any, model_dir: Path) -> None:
    assert fingerprint(load(str(model_dir))) == fingerprint(model)
    assert model_name(model) == model_dir.name


def test_a_dtype_may_be_asked_for(model_dir: Path) -> None:
    assert fingerprint(load(model_dir, dtype=torch.bfloat16))["dtype"] == "bfloat16"


def test_loading_leaves_the_global_random_state(model_dir: Path) -> None:

    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_model(model_dir, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("take_away", "message"),
    [
        (["config.json"], "has no config.json: give a Hugging Face model directory"),
        (["model.safetensors"], "has a configuration but no weights"),
    ],
)
def test_an_incomplete_directory_says_what_it_lacks(copied: Path, take_away: list[str], message: str) -> None:
    for name in take_away:
        (copied / name).unlink()
    with pytest.raises(ModelError, match=message):
        load(copied)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_directory_is_refused_in_a_sentence(copied: Path, file: str) -> None:
    (copied / file).write_bytes((copied / file).read_bytes()[:-40])
    with pytest.raises(ModelError, match="cannot be loaded as a model: ") as caught:
        load(copied)
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_refused_in_a_sentence(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config |= {"model_type": "nonsense", "architectures": ["NonsenseForCausalLM"]}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be loaded as a model"):
        load(copied)


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "~/model", "a/b/c"])
def test_a_directory_that_is_not_there_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="there is no model directory"):
        load(name)


def test_a_hub_name_without_a_hub_is_refused_in_a_sentence() -> None:
    with pytest.raises(ModelError, match="'no-such-owner/no-such-model' cannot be loaded as a model: ") as caught:
        load("no-such-owner/no-such-model")
    assert "\n" not in str(caught.value)


# --- fingerprints ------------------------------------------------------------------------------------------------------------


def test_the_fingerprint_describes_the_model(each: str) -> None:
    found = fingerprint(tiny.model(each))
    assert list(found) == FIELDS
    assert {key: found[key] for key in FIELDS[:5]} == {
        "layers": 2,
        "width": 32,
        "heads": 4,
        "vocabulary": tiny.VOCABULARY,
        "dtype": "float32",
    }
    json.dumps(found)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt2-compat", "native-llama", *tiny.HOOKED])
def test_the_same_weights_have_the_same_fingerprint_and_others_another(name: str) -> None:
    again, other = tiny.build(name), tiny.build(name, seed=1)
    assert fingerprint(again) == fingerprint(tiny.model(name))
    differing = {key for key in FIELDS if fingerprint(other)[key] != fingerprint(again)[key]}
    assert differing == {"weights"}


def test_running_caching_and_intervening_do_not_change_the_fingerprint(each: str) -> None:
    model = tiny.build(each)
    before = fingerprint(model)
    tiny.logits(model)
    with torch.no_grad():
        model.run_with_cache(tiny.some_tokens())
    assert fingerprint(model) == before
    with Ablate(selection_of(model)).on(model):
        assert fingerprint(model) == before


@pytest.mark.parametrize("name", tiny.FOLDED)
def test_compatibility_mode_is_another_model(name: str) -> None:
    raw, compat = fingerprint(tiny.model(name)), fingerprint(tiny.model(f"{name}-compat"))
    assert raw["processing"] == "bridge"
    assert compat["processing"] == "bridge, compatibility mode"
    assert raw["weights"] != compat["weights"]


def test_an_edit_of_any_matrix_changes_the_fingerprint() -> None:
    model = tiny.build("gpt2")
    before = fingerprint(model)["weights"]
    seen = {before}
    parameters = {p.data_ptr(): p for p in model.parameters()}
    for parameter in parameters.values():
        with torch.no_grad():
            parameter.add_(0.25)
        seen.add(fingerprint(model)["weights"])
    assert len(seen) == len(parameters) + 1


def test_what_is_no_model_has_no_fingerprint() -> None:
    with tiny.quiet(), pytest.raises(ModelError, match="has no hook points"):
        fingerprint(torch.nn.Linear(2, 2))


def test_weights_on_a_disk_are_fetched_as_they_are_needed(model_dir: Path, tmp_path: Path) -> None:
    """A model spread by accelerate: the numbers, the fingerprint and the interventions are those of the whole one."""
    pytest.importorskip("accelerate")
    if host_version().startswith("3."):
        pytest.skip("TransformerLens 3 has no folder for weights on a disk")
    whole = load(model_dir)
    parts = ["transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head", "transformer.h.0"]
    places = {**dict.fromkeys(parts, "cpu"), "transformer.h.1": "disk"}
    with tiny.quiet():
        spread = load_model(model_dir, device_map=places, offload_folder=tmp_path / "weights")
    assert any(parameter.is_meta for parameter in spread.parameters())
    assert fingerprint(spread) == fingerprint(whole)
    tokens = tiny.some_tokens(3, 9)
    corpus = tiny.corpus()
    found, expected = (
        collect(model, corpus, ("mlp.post", "attn.z"), progress=False).mean_abs for model in (spread, whole)
    )
    for site, value in expected.items():
        torch.testing.assert_close(found[site], value, rtol=1e-5, atol=1e-6)
    edit = Ablate(expected["mlp.post"].top(0.2))
    before = tiny.logits(spread, tokens)
    with edit.on(spread), torch.no_grad():
        under = spread(tokens)
    with edit.on(whole), torch.no_grad():
        torch.testing.assert_close(under, whole(tokens), rtol=1e-4, atol=1e-5)
    assert not torch.equal(under, before)
    assert torch.equal(tiny.logits(spread, tokens), before)


def test_places_that_make_no_sense_are_refused(model_dir: Path) -> None:
    with pytest.raises(ModelError, match="give one of them"):
        load_model(model_dir, device="cpu", device_map="auto")
    with pytest.raises(ModelError, match="are for a device_map"):
        load_model(model_dir, max_memory={"cpu": "1GiB"})
    with pytest.raises(ModelError, match="cannot be loaded as a model") as caught:
        load_model(model_dir, device_map="nowhere")
    assert len(str(caught.value)) < 600


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert loading._default_device() == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found.append(loading._default_device())
    assert found == ["cuda:0", "cuda:1", "cuda:0"]


def test_a_dtype_has_a_name(model_dir: Path) -> None:
    assert fingerprint(load(model_dir, dtype="bfloat16"))["dtype"] == "bfloat16"
    with pytest.raises(ModelError, match="choose from float32, bfloat16, float16, float64"):
        load(model_dir, dtype="int8")


def test_a_matrix_that_two_share_on_a_disk_counts_once(tmp_path: Path) -> None:
    """The demo model unembeds with its embedding."""
    pytest.importorskip("accelerate")
    if host_version().startswith("3."):
        pytest.skip("TransformerLens 3 has no folder for weights on a disk")
    whole = load("demo")
    near = ["transformer.wpe", "transformer.ln_f", *(f"transformer.h.{i}" for i in range(whole.cfg.n_layers))]
    places = {**dict.fromkeys(near, "cpu"), "transformer.wte": "disk", "lm_head": "disk"}
    with tiny.quiet():
        spread = load_model("demo", device_map=places, offload_folder=tmp_path)
    assert fingerprint(spread) == fingerprint(whole)


# --- every value and its place --------------------------------------------------------------------------------------------------


def weights_of(model: Any) -> str:
    return fingerprint(model)["weights"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt2-compat", *tiny.HOOKED[:1]])
def test_layers_in_another_order_are_another_model(name: str) -> None:
    """With the same parameters, each of the same shape: the digest of earlier versions sorted them, and could not tell."""
    model = tiny.build(name)
    before = fingerprint(model)
    sampled, logits = loading._sampled_digests(model), tiny.logits(model)
    with torch.no_grad():
        first, last = (dict(model.blocks[i].named_parameters()) for i in (0, 1))
        views = ("q", "k", "v") if name == "gpt2" else ()  # of the fused matrix, which is among them
        for key, value in first.items():
            if set(views) & set(key.split(".")):
                continue
            here, there = value.clone(), last[key].clone()
            value.copy_(there)
            last[key].copy_(here)
    assert not torch.allclose(tiny.logits(model), logits)
    assert {key for key, value in fingerprint(model).items() if value != before[key]} == {"weights"}
    assert loading._sampled_digests(model) == sampled


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox-compat", *tiny.HOOKED[1:2]])
def test_one_changed_bit_of_any_weight_is_seen(name: str) -> None:
    """Of 400 places drawn at random, the lowest or the sign bit; and each change undone is the model as it was."""
    model = tiny.build(name)
    before, draw = weights_of(model), np.random.default_rng(0)
    held = [parameter for parameter in model.parameters()]
    for number in range(400):
        weight = held[draw.integers(len(held))].detach()
        place = tuple(int(draw.integers(size)) for size in weight.shape)
        bit = (1, -(2**31))[number % 2]
        for changed in (True, False):
            weight.view(torch.int32)[place] ^= bit
            assert (weights_of(model) != before) is changed, (number, tuple(weight.shape), place)


def test_a_zeroed_neuron_is_seen_in_every_layer() -> None:
    model = tiny.build("gpt2")
    seen = {weights_of(model)}
    for layer in range(tiny.LAYERS):
        for neuron in range(0, 64, 3):
            with torch.no_grad():
                model.blocks[layer].mlp.out.original_component.weight[neuron] = 0
            seen.add(weights_of(model))
    assert len(seen) == 1 + tiny.LAYERS * 22


def number_of(values: np.ndarray) -> bytes:
    """Digest values as `loading` says, in Python's own integers."""

    def mixed(key: int) -> int:  # SplitMix64
        x = (key * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    width = {1: "u1", 2: "<i2"}.get(values.dtype.itemsize, "<i4")
    bits = [int(bit) for bit in np.ascontiguousarray(values).reshape(-1).view(width)]
    factors = [mixed(i) | 1 for i in range(min(len(bits), loading.BLOCK))]
    blocks = [bits[i : i + loading.BLOCK] for i in range(0, len(bits), loading.BLOCK)]
    if not len(bits) % loading.BLOCK:
        blocks.append([])
    sums = [sum(bit * factor for bit, factor in zip(block, factors, strict=False)) % 2**64 for block in blocks]
    return hashlib.sha256(b"".join(number.to_bytes(8, "little") for number in sums)).digest()[:16]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("size", [(3,), (5, 7), (300, 450), (256, 256), (2, 3, 4)])
def test_the_number_of_a_weight_is_its_formula(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    values = (torch.randn(size, generator=torch.Generator().manual_seed(0)) * 50).abs().to(dtype)
    plain = values.view(torch.int16).numpy() if dtype == torch.bfloat16 else values.numpy()
    expected = number_of(plain)
    assert loading._digest_of_bits(values) == expected
    turned = values.movedim(0, -1).contiguous().movedim(-1, 0)  # the same values, in another order in memory
    assert loading._digest_of_bits(turned) == expected
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert loading._digest_of_bits(values) == expected
    finally:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        assert loading._digest_of_bits(values.cuda()) == expected


def test_weights_are_read_again_when_they_have_changed_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    read: list[Any] = []
    real = loading._digest_of_bits
    monkeypatch.setattr(loading, "_digest_of_bits", lambda weight: read.append(weight) or real(weight))
    before = weights_of(model)
    first = len(read)
    assert weights_of(model) == before
    assert len(read) == first, "nothing is read twice"
    weight = model.blocks[1].mlp.out.original_component.weight
    changes = [
        lambda: weight.add_(1),
        lambda: weight.data.mul_(0.5),  # not counted by PyTorch
        lambda: weight.data[3, 5].add_(0.5),
        lambda: weight.data.copy_(weight.data.flip(0)),  # the same values, in another order
        lambda: weight.data.copy_(weight.data.roll(8, 1)),
        lambda: setattr(weight, "data", weight.data.clone() + 1),
        lambda: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, strict=False),
    ]
    seen = {before}
    for change in changes:
        with torch.no_grad():
            change()
        seen.add(weights_of(model))
    assert len(seen) == 1 + len(changes)


def test_a_tied_matrix_counts_once_and_untied_with_equal_values_is_the_same_model() -> None:
    tied = tiny.hugging_face("gpt2")
    assert tied.lm_head.weight is tied.transformer.wte.weight
    untied = tiny.hugging_face("gpt2")
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.detach().clone())
    models = [tiny.to_bridge(plain, "gpt2") for plain in (tied, untied)]
    assert weights_of(models[0]) == weights_of(models[1])
    with torch.no_grad():
        untied.lm_head.original_component.weight[3, 4] += 1
    assert weights_of(models[0]) != weights_of(models[1])


DIGESTS = {
    "gpt2": "e3569566cb4d81d1614f291a19bb3411",
    "neox": "57e7a87b3b24473b8fdb2a2e8e4885f0",
    "opt": "19176d3e11bd6bde554de6f642a67c94",
    "llama": "92c16262ffb99d9f96fc75c7c4d7f6b6",
    "gemma3": "7434fa234275035d6b66629a84c68415",
    "phi3": "29977c44b4ddb814479768aba53e32e3",
    "demo": "0b5b86eb985ef914dab45bf08f5e6aa7",
}
"""The same under TransformerLens 3.9 and 4."""


@pytest.mark.parametrize("name", DIGESTS)
def test_both_versions_of_transformer_lens_give_one_digest(name: str) -> None:
    model = load("demo") if name == "demo" else tiny.model(name)
    assert weights_of(model) == DIGESTS[name]


def test_digests_of_earlier_versions_are_recognized_under_either_transformer_lens() -> None:
    model = load("demo")
    for digest in ("7623c11f5ef5f844", "56801a927ec2f393"):  # written under 4.3 and under 3.9
        ours = fingerprint(model)
        theirs = {**ours, "weights": digest}
        with pytest.warns(
            UserWarning, match="file is of an earlier version, which looked at 64 values of each parameter"
        ):
            assert as_in_file("file", theirs, ours, model) == theirs
        with pytest.warns(UserWarning, match="of an earlier version"):
            settings = as_in_file("file", {"model": theirs, "a": 1}, {"model": ours, "a": 2}, model)
        assert settings == {"model": theirs, "a": 2}
    other = {**fingerprint(model), "weights": "0" * 16}
    assert as_in_file("file", other, ours, model)["weights"] not in (ours["weights"], other["weights"])
    for theirs in (None, {}, {"weights": 3}, [1]):
        assert as_in_file("file", theirs, ours, model) == ours


# --- models that one holds -----------------------------------------------------------------------------------------------------


def test_a_hugging_face_model_is_taken_as_it_is(model: Any, model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    for dtype in (torch.float32, torch.bfloat16):
        held = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
        tokens = tiny.some_tokens()
        with torch.no_grad():
            expected = held.eval()(tokens).logits
        wrapped = load_model(held)
        assert next(wrapped.parameters()).dtype == dtype
        if dtype == torch.float32:  # in half precision, fused attention, which a bridge replaces, rounds otherwise
            torch.testing.assert_close(tiny.logits(wrapped, tokens), expected)
        assert wrapped.tokenizer.bos_token == "<bos>"
        assert model_name(wrapped) == model_dir.name
        assert not any(module.training for module in wrapped.modules())
    held = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    assert fingerprint(load_model(held, dtype="float32"))["dtype"] == "float32"


def test_a_model_without_a_directory_needs_its_tokenizer_given(model: Any) -> None:
    held = tiny.hugging_face("gpt2")
    with pytest.raises(ModelError, match="give load_model\\(model, tokenizer=...\\)"):
        load_model(held)
    assert load_model(copy.deepcopy(held), tokenizer=model.tokenizer).tokenizer.bos_token == "<bos>"


def test_what_cannot_be_taken_as_it_is_is_refused_saying_what_can(model: Any, model_dir: Path) -> None:
    class Adapted(torch.nn.Module):
        def merge_and_unload(self) -> None: ...

    for given, message in (
        (model, "hook points already: pass it as it is"),
        (Adapted(), r"give model\.merge_and_unload\(\)"),
        (torch.nn.Linear(2, 2, device="meta"), "is no Hugging Face model"),
    ):
        with pytest.raises(ModelError, match=message):
            load_model(given)
    with pytest.raises(ModelError, match="already loaded"):
        load_model(tiny.hugging_face("gpt2"), tokenizer=model.tokenizer, revision="main")
    with pytest.raises(ModelError, match="comes with its own"):
        load_model(model_dir, tokenizer=model.tokenizer)
