"""RMU: a plain PyTorch model that is trained by hand is the oracle."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command_line_helpers import call, write_texts
from interventions_helpers import unchanged
from torch import Tensor

import lens_unlearn as lu
from lens_unlearn import Matrix
from lens_unlearn.core.errors import CorpusError, LensUnlearnError, ModelError
from lens_unlearn.methods import by_name
from lens_unlearn.methods.rmu import _direction, rmu

QUIET: dict[str, Any] = {"progress": False}
FORGET = tiny.corpus((5, 9, 3), seed=1, uncounted=0.2)
RETAIN = tiny.corpus((4, 8, 6), seed=2, name="other", uncounted=0.2)
ALL = 99  # rows a step: then their order does not matter


def states(plain: Any, name: str, layer: int, corpus: lu.Corpus) -> Tensor:
    """The output of a block at every counted token, a row at a time."""
    seen: list[Tensor] = []
    block = tiny.block(plain, name, layer)
    handle = block.register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    found = []
    for row in range(corpus.n_rows):
        plain(input_ids=corpus.row(row)[None].long())
        found.append(seen.pop()[0][corpus.counted[int(corpus.starts[row]) : int(corpus.starts[row + 1])]])
    handle.remove()
    return torch.cat(found)


def by_hand(name: str, layer: int, layers: list[int], coefficient: float, alpha: float, lr: float, steps: int) -> Any:
    """Follow the paper on a copy of the model, with Adam's formula."""
    frozen = tiny.hugging_face(name)
    plain = copy.deepcopy(frozen)
    weights = [tiny.weight_of(plain, name, number, "W_out") for number in layers]
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    target = coefficient * _direction(32, 0)
    losses = []
    for step in range(1, steps + 1):
        away = (states(plain, name, layer, FORGET) - target).square().mean()
        with torch.no_grad():
            before = states(frozen, name, layer, RETAIN)
        kept = (states(plain, name, layer, RETAIN) - before).square().mean()
        losses.append((away.item(), kept.item()))
        gradients = torch.autograd.grad(away + alpha * kept, weights)
        with torch.no_grad():
            for w, g, m, v in zip(weights, gradients, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                w -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    new, old = (
        [tiny.matrix_in(tiny.weight_of(m, name, n, "W_out"), name, "W_out") for n in layers] for m in (plain, frozen)
    )
    return [(a - b).detach() for a, b in zip(new, old, strict=True)], losses


@pytest.mark.parametrize(("name", "layer", "layers"), [("llama", 1, [0, 1]), ("gpt2", 1, [0]), ("neox", 0, [0])])
def test_it_is_a_plain_model_trained_by_hand(name: str, layer: int, layers: list[int]) -> None:
    model, options = tiny.model(name), {"coefficient": 20.0, "alpha": 5.0, "lr": 0.01, "steps": 4}
    with unchanged(model):
        found = rmu(model, FORGET, RETAIN, layer=layer, layers=layers, batch_size=ALL, **options, **QUIET)
    expected, losses = by_hand(name, layer, layers, **options)
    assert list(found.updates) == [Matrix(number, "W_out") for number in layers]
    for update, value in zip(found.updates.values(), expected, strict=True):
        # Adam divides a gradient by its own size: where that is hardly more than rounding, so is the step's direction
        close = torch.isclose(update.value, value, rtol=1e-3, atol=2e-4)
        assert float(close.float().mean()) > 0.99
    seen = [(entry["forget"], entry["retain"]) for entry in found.record["losses"]]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(losses), rtol=1e-3, atol=1e-5)
    assert seen[-1][0] < seen[0][0]
    assert seen[0][1] == pytest.approx(0, abs=1e-10)


def test_the_random_vector_is_of_numbers_above_zero_and_of_length_one() -> None:
    u = _direction(500, 3)
    assert float(u.norm()) == pytest.approx(1)
    assert float(u.min()) >= 0
    assert float(u.max()) < 1.2 / math.sqrt(500 / 3)
    assert not torch.equal(u, _direction(500, 4))


def test_defaults_are_recorded_and_the_update_is_saved_scaled_and_removed(tmp_path: Path) -> None:
    model, record = tiny.model("llama"), by_name("rmu")
    fitted = record.fit(model, FORGET, RETAIN, {"steps": 2, **QUIET})
    found = record.at(model, fitted, 1.0, {})
    assert isinstance(found, lu.Delta)
    settings = found.record["settings"]
    norm = states(tiny.hugging_face("llama"), "llama", 1, FORGET).norm(dim=-1).mean().item()
    assert settings["coefficient"] == pytest.approx(5 * norm, rel=1e-4)
    assert (settings["layer"], settings["layers"], settings["alpha"]) == (1, "[0, 1]", 100.0)
    assert found.record["trained"] == 2 * 64 * 32
    again = rmu(model, FORGET, RETAIN, steps=2, **QUIET)
    assert all(
        torch.equal(a.value, b.value) for a, b in zip(found.updates.values(), again.updates.values(), strict=True)
    )
    found.save(tmp_path / "rmu.safetensors", model)
    loaded = lu.load_intervention(tmp_path / "rmu.safetensors", model)
    assert isinstance(loaded, lu.Delta)
    assert loaded.record["losses"] == found.record["losses"]
    half = record.at(model, fitted, 0.5, {})
    assert isinstance(half, lu.Delta)
    assert half.strength == 0.5
    [control] = record.controls(model, found, fitted, [0])
    assert repr(control) == repr(found)
    assert (record.by_default, record.trains) == (False, True)
    figure = lu.plot.training_curves(found)
    assert [trace.name for trace in figure.data] == ["forget", "retain"]
    assert "squared distance per dimension" in figure.layout.annotations[0].text


def test_a_training_that_breaks_returns_the_update_before() -> None:
    with pytest.warns(RuntimeWarning, match="became NaN or infinite at step"):
        found = rmu(tiny.model("gpt2"), FORGET, RETAIN, lr=1e30, steps=5, **QUIET)
    assert found.record["stopped"]
    assert all(bool(torch.isfinite(update.value).all()) for update in found.updates.values())


REFUSED: dict[str, dict[str, Any]] = {
    "coefficient=0": {"coefficient": 0},
    "alpha=-1": {"alpha": -1},
    "lr=0": {"lr": 0},
    "steps=0": {"steps": 0},
    "batch_size=0": {"batch_size": 0},
    "strength=1.5": {"strength": 1.5},
    "seed=-1": {"seed": -1},
    "there is no layer 7, in layer:": {"layer": 7},
    "there is no layer -3, in layers": {"layers": [0, -3]},
    "layer 1 is above layer 0": {"layer": 0, "layers": [0, 1]},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_is_refused_before_a_pass(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lens_unlearn.methods.rmu.backbone", lambda *_: pytest.fail("a pass was made"))
    with pytest.raises(LensUnlearnError, match=words):
        rmu(tiny.model("gpt2"), FORGET, RETAIN, **REFUSED[words])


def test_corpora_and_models_that_cannot_be_trained_on_are_refused() -> None:
    model = tiny.model("gpt2")
    with pytest.raises(LensUnlearnError, match="the same text"):
        rmu(model, FORGET, FORGET)
    with pytest.raises(CorpusError, match="give one"):
        rmu(model, FORGET, None)
    training = tiny.build("gpt2").train()
    with pytest.raises(ModelError, match="in training mode"):
        rmu(training, FORGET, RETAIN)


def test_it_runs_from_the_command_line_beside_its_control(model_dir: Path, tmp_path: Path) -> None:
    files = [write_texts(tmp_path / f"{i}.jsonl", i, words=[f"w{i}{j}" for j in range(6)]) for i in range(2)]
    sources = ["--forget", f"{files[0]}:text", "--retain", f"{files[1]}:text", "--tokens", 400, "--window", 32]
    options, out = ["--method", "rmu", "--set", "steps=3", "--no-sweep", "--quiet"], tmp_path / "run"
    assert call("run", "--model", model_dir, *sources, *options, "--out", out) == 0
    assert {"rmu", "rmu:control"} <= set(lu.load_report(out).conditions)
    edit = lu.load_intervention(out / "rmu.safetensors")
    assert isinstance(edit, lu.Delta)
    assert "How rmu was trained" in (out / "report.html").read_text()
