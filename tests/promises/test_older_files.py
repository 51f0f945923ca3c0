"""Files and folders that earlier versions wrote are read as they were meant: tests/data, written before the rooms were built."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lens_unlearn as lu
from lens_unlearn import demo
from lens_unlearn.core import artefacts
from lens_unlearn.core.errors import ArtefactError
from lens_unlearn.experiments.experiment import carry_out
from lens_unlearn.experiments.plan import Plan
from lens_unlearn.experiments.run_folder import fitted_form
from lens_unlearn.model.host import device_of, versions
from lens_unlearn.neurons.histogram import Histogram
from lens_unlearn.neurons.key_sample import KeySample

DATA = Path(__file__).parents[1] / "data"
EXPECTED = json.loads((DATA / "expected.json").read_text())
TEXT = "12+30=42\n7+8=15\nLa granda hundo kuras."

BEGUN = artefacts.read(DATA / "interrupted-run.partial" / "kept" / "settings.safetensors", "run")[0]["texts"]
"""What the interrupted run was begun with."""

pytestmark = pytest.mark.skipif(
    not (demo.MODEL_DIR / "model.safetensors").exists(), reason="the weights are not in this checkout"
)


@pytest.fixture(scope="module")
def model() -> Any:
    return lu.load_model("demo", device="cpu")


def of_an_earlier_version() -> Any:
    """Expect the warning that a file's check of its model is weaker."""
    return pytest.warns(UserWarning, match="is of an earlier version, which looked at 64 values of each parameter")


def logits_of(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor([model.tokenizer(TEXT, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return tokens, model(tokens, return_type="logits").float()


def loss(model: Any) -> float:
    tokens, logits = logits_of(model)
    return float(-logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None]).mean())


@pytest.mark.parametrize("kind", ["ablate", "adjust", "abstain", "delta", "chain"])
def test_an_intervention_acts_as_it_did_when_it_was_saved(model: Any, kind: str) -> None:
    assert loss(model) == pytest.approx(EXPECTED["loss"]["base"], abs=1e-4)
    with of_an_earlier_version():
        edit = lu.load_intervention(DATA / f"{kind}.safetensors", model)
    # When it was saved, all logits of an abstained text were constant; now those from its end on.
    before_the_end = "base" if kind == "abstain" else kind
    with edit.on(model) as live:
        assert loss(model) == pytest.approx(EXPECTED["loss"][before_the_end], abs=1e-4)
        assert live.abstained.any() == (kind == "abstain")
        if kind == "abstain":
            last = logits_of(model)[1][0, -1].log_softmax(-1)
            torch.testing.assert_close(-last, torch.full_like(last, EXPECTED["loss"][kind]), atol=2e-3, rtol=0)
    count = EXPECTED["repr"][kind].partition(",")[0]
    assert repr(edit).startswith(count)


def test_an_older_file_saved_again_is_sure_of_its_model(model: Any, tmp_path: Path) -> None:
    with of_an_earlier_version():
        edit = lu.load_intervention(DATA / "ablate.safetensors", model)
    edit.save(tmp_path / "again.safetensors", model)
    lu.load_intervention(tmp_path / "again.safetensors", model)
    other = lu.load_model(demo.WITHOUT_FACTS_DIR, device="cpu")
    with pytest.raises(ArtefactError, match="weights: 7623c11f5ef5f844 in the file"):
        lu.load_intervention(DATA / "ablate.safetensors", other)


def test_moments_are_those_that_were_collected(model: Any) -> None:
    with of_an_earlier_version():
        moments = lu.load_moments(DATA / "moments.safetensors", model)
    assert moments.n == EXPECTED["moments"]["n"]
    for name in ("mean_abs", "std"):
        sums = {str(site): float(value.sum()) for site, value in getattr(moments, name).items()}
        assert sums == pytest.approx(EXPECTED["moments"][name], rel=1e-9)


def test_samples_of_keys_and_histograms_are_whole() -> None:
    samples = fitted_form().load(DATA / "key-samples.safetensors")
    assert all(isinstance(sample, KeySample) and sample.n > 0 for sample in samples)
    header, tensors = artefacts.read(DATA / "histogram.safetensors", "histogram")
    settings = {name: header[name] for name in ("bins", "scale", "limit")}
    histogram = Histogram(**settings).with_state(tensors)
    assert histogram.n == EXPECTED["moments"]["n"]


def plan() -> Plan:
    settings = json.loads((DATA / "finished-run" / "run.json").read_text())["plan"]
    lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    return Plan(**{**settings, **lists})


def test_a_finished_run_is_known_to_be_finished(model: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(DATA / "finished-run", out)
    assert carry_out(plan(), out, resume=True, model=model, progress=False) is None
    for name in plan().methods:
        with of_an_earlier_version():
            assert lu.load_intervention(out / f"{name}.safetensors", model) is not None


def test_an_interrupted_run_with_a_budget_does_not_go_on(model: Any, tmp_path: Path) -> None:
    """Its methods were tuned by a rule that later versions do not have; with other versions it is refused by their names."""
    shutil.copytree(DATA / "interrupted-run.partial", tmp_path / "interrupted-run.partial")
    here = {"device": str(device_of(model)), **versions()}
    differing = [name for name, value in here.items() if BEGUN[name] != value]
    with of_an_earlier_version(), pytest.raises(ArtefactError, match=differing[0] if differing else "tune retain"):
        carry_out(plan(), tmp_path / "interrupted-run", resume=True, model=model, progress=False)
