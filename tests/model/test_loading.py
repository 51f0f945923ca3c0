"""Models: loading says what is wrong, and a fingerprint tells apart what is different and nothing else."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interventions_helpers import selection_of

from lens_unlearn.core.errors import ModelError
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.model import loading
from lens_unlearn.model.host import host_version
from lens_unlearn.model.loading import fingerprint, load_model, model_name
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
