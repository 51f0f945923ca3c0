"""Directions removed, concepts erased, vectors added: NumPy is the oracle; and a run of every baseline from the command line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from command_line_helpers import call, write_texts

import lens_unlearn as lu
from lens_unlearn.core.errors import CorpusError, LensUnlearnError, SelectionError
from lens_unlearn.methods import by_name
from lens_unlearn.methods.concept_erasure import concept_erasure, leace
from lens_unlearn.methods.direction_removal import direction_removal
from lens_unlearn.methods.steering import steering
from lens_unlearn.model.sites import Site

QUIET: dict[str, Any] = {"progress": False}
FIRST, LAST = Site(0, "resid"), Site(1, "resid")
FORGET, RETAIN = (tiny.corpus((9, 14, 11, 30, 12), seed=seed, name=f"texts {seed}") for seed in (1, 2))


def stream(model: Any, corpus: lu.Corpus) -> np.ndarray:
    """The residual stream behind both blocks at every counted token, row by row: ``[tokens, layers, d_model]``."""
    found = []
    for row in range(corpus.n_rows):
        with torch.no_grad():
            _, cache = model.run_with_cache(corpus.row(row)[None].long())
        both = torch.stack([cache[f"blocks.{layer}.hook_resid_post"][0] for layer in (0, 1)], 1)
        found.append(both[corpus.counted[int(corpus.starts[row]) : int(corpus.starts[row + 1])]].double().numpy())
    return np.concatenate(found)


def test_the_direction_between_the_means_is_gone_behind_every_layer() -> None:
    model = tiny.model("llama")
    means = [stream(model, corpus)[:, 0].mean(0) for corpus in (FORGET, RETAIN)]
    r = (means[0] - means[1]) / np.linalg.norm(means[0] - means[1])
    found = direction_removal(model, FORGET, RETAIN, layer=0, **QUIET)
    assert found.sites == (FIRST, LAST)
    for site in found.sites:
        np.testing.assert_allclose((found.left[site] @ found.right[site]).numpy(), -np.outer(r, r), atol=1e-6)
    for strength, left in ((1.0, 0.0), (0.25, 0.75)):
        with direction_removal(model, FORGET, RETAIN, layer=0, layers=0, strength=strength, **QUIET).on(model):
            got = stream(model, FORGET)[:, 0]
        np.testing.assert_allclose(got @ r, left * stream(model, FORGET)[:, 0] @ r, atol=1e-5)


def test_steering_takes_one_mean_to_the_other() -> None:
    model = tiny.model("gpt2")
    means = [stream(model, corpus).mean(0) for corpus in (FORGET, RETAIN)]
    with steering(model, FORGET, RETAIN, layers=0, coefficient=1.0, **QUIET).on(model):
        np.testing.assert_allclose(stream(model, FORGET)[:, 0].mean(0), means[1][0], atol=1e-5)
    found = steering(model, FORGET, RETAIN, layers=[-1, 0], coefficient=3.0, strength=0.5, **QUIET)
    for site in (FIRST, LAST):
        vector = 3 * (means[1] - means[0])[site.layer]
        np.testing.assert_allclose(found.shift[site].numpy(), vector, atol=1e-5)
    assert (found.strength, found.left) == (0.5, {})


def sampled(n: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(n, width)) @ draw.normal(size=(width, width)) + 3
    z = (draw.random(n) < 0.3).astype(float)
    return x + z[:, None] * draw.normal(size=width), z


def by_hand(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The paper's formula, with SciPy's square root and pseudo-inverse."""
    mean, covariance = x.mean(0), np.cov(x.T, bias=True)
    cross = ((x - mean) * (z - z.mean())[:, None]).mean(0)[:, None]
    whitening = np.real(scipy.linalg.sqrtm(np.linalg.pinv(covariance)))
    projection = whitening @ cross @ np.linalg.pinv(whitening @ cross)
    return x - (x - mean) @ (np.linalg.pinv(whitening) @ projection @ whitening).T


def erased(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    left, right, mean = (part.double().numpy() for part in leace(torch.tensor(x[z > 0]), torch.tensor(x[z == 0])))
    return x + (x - mean) @ left @ right


def test_leace_is_the_formula_and_leaves_nothing_to_a_linear_probe() -> None:
    x, z = sampled(300, 12)
    got = erased(x, z)
    np.testing.assert_allclose(got, by_hand(x, z), atol=1e-4)
    np.testing.assert_allclose(got[z > 0].mean(0), got[z == 0].mean(0), atol=1e-4)
    np.testing.assert_allclose(((got - got.mean(0)) * (z - z.mean())[:, None]).mean(0), 0, atol=1e-4)
    design = np.column_stack([got, np.ones(len(got))])
    fitted = design @ np.linalg.lstsq(design, z, rcond=1e-5)[0]  # what is erased is there as rounding
    np.testing.assert_allclose(fitted, z.mean(), atol=1e-4)  # the best linear guess is the share of each
    apart = (x[z > 0].mean(0) - x[z == 0].mean(0))[:, None]
    orthogonal = x - (x - x.mean(0)) @ apart @ np.linalg.pinv(apart)
    assert np.square(got - x).sum() < np.square(orthogonal - x).sum()


def test_leace_of_fewer_tokens_than_dimensions_still_makes_the_means_equal() -> None:
    x, z = sampled(20, 40)
    got = erased(x, z)
    np.testing.assert_allclose(got[z > 0].mean(0), got[z == 0].mean(0), atol=1e-4)


def test_leace_is_that_of_the_authors() -> None:
    theirs = pytest.importorskip("concept_erasure")
    x, z = sampled(400, 10, seed=1)
    options = {"shrinkage": False, "constrain_cov_trace": False, "svd_tol": 1e-9}
    eraser = theirs.LeaceEraser.fit(torch.tensor(x), torch.tensor(z), **options)
    np.testing.assert_allclose(erased(x, z), eraser(torch.tensor(x)).numpy(), atol=1e-3)


def test_in_the_model_the_means_of_both_corpora_become_equal() -> None:
    model = tiny.model("llama")
    found = concept_erasure(model, FORGET, RETAIN, layers=0, **QUIET)
    with found.on(model):
        first, second = (stream(model, corpus)[:, 0].mean(0) for corpus in (FORGET, RETAIN))
    np.testing.assert_allclose(first, second, atol=1e-4)
    part = concept_erasure(model, FORGET, RETAIN, layers=[0, 1], samples=20, seed=3, **QUIET)
    assert part.sites == (FIRST, LAST)
    assert not torch.equal(part.left[FIRST], found.left[FIRST])


@pytest.mark.parametrize("name", ["direction-removal", "concept-erasure", "steering"])
def test_what_was_fitted_once_serves_every_strength_and_its_control(name: str) -> None:
    model, record = tiny.model("gpt2"), by_name(name)
    options = {"layers": [1], **QUIET}
    fitted = record.fit(model, FORGET, RETAIN, options)
    for strength in (0.5, 1.0):
        found = record.at(model, fitted, strength, options)
        alone = record.function(model, FORGET, RETAIN, strength=strength, **options)
        assert isinstance(found, lu.Affine)
        assert repr(found) == repr(alone)
        for part in ("left", "right", "centre", "shift"):
            torch.testing.assert_close(getattr(found, part), getattr(alone, part), rtol=1e-4, atol=1e-5)
        [control] = record.controls(model, found, fitted, [1], strength=strength, options=options)
        assert repr(control) == repr(found)
    assert record.baseline
    assert not record.by_default


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (direction_removal, {"layer": 2}, "there is no layer 2, in layer: this model has layers 0 to 1"),
    (direction_removal, {"layer": True}, "layer=True"),
    (direction_removal, {"layers": [0, -3]}, "there is no layer -3, in layers"),
    (direction_removal, {"strength": 0}, "strength=0"),
    (concept_erasure, {"samples": 0}, "samples=0"),
    (concept_erasure, {"layers": []}, "names no layer"),
    (concept_erasure, {"strength": 1.5}, "strength=1.5"),
    (steering, {"coefficient": 0}, "coefficient=0"),
    (steering, {"layers": "all"}, "layers='all'"),
]


@pytest.mark.parametrize(("method", "options", "words"), REFUSED)
def test_what_cannot_be_is_refused_before_a_pass(
    method: Any, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("methods.residual", "methods.concept_erasure"):
        monkeypatch.setattr(f"lens_unlearn.{room}.collect", lambda *_, **__: pytest.fail("a pass was made"))
    with pytest.raises(LensUnlearnError, match=words):
        method(tiny.model("gpt2"), FORGET, RETAIN, **options)


@pytest.mark.parametrize("method", [direction_removal, concept_erasure, steering])
def test_sides_that_nothing_tells_apart_are_refused(method: Any) -> None:
    model = tiny.model("gpt2")
    with pytest.raises(LensUnlearnError, match="the same text"):
        method(model, FORGET, FORGET, **QUIET)
    with pytest.raises(CorpusError, match="give one"):
        method(model, FORGET, None, **QUIET)
    record = by_name(method.__name__.replace("_", "-"))
    both = record.fit(model, FORGET, RETAIN, QUIET)[0]
    with pytest.raises(SelectionError, match="the same mean"):
        method(model, both, both, **QUIET)


def test_every_one_runs_from_the_command_line_beside_its_control(model_dir: Path, tmp_path: Path) -> None:
    files = [write_texts(tmp_path / f"{i}.jsonl", i, words=[f"w{i}{j}" for j in range(6)]) for i in range(2)]
    names = ("direction-removal", "concept-erasure", "steering", "linear-probe")
    chosen = [part for name in names for part in ("--method", name)]
    sources = ["--forget", f"{files[0]}:text", "--retain", f"{files[1]}:text", "--tokens", 400, "--window", 32]
    out = tmp_path / "run"
    assert (
        call(
            "run",
            "--model",
            model_dir,
            *sources,
            *chosen,
            "--set",
            "fraction=0.2",
            "--no-sweep",
            "--quiet",
            "--out",
            out,
        )
        == 0
    )
    report = lu.load_report(out)
    for name in names:
        assert {name, f"{name}:control"} <= set(report.conditions)
        assert isinstance(lu.load_intervention(out / f"{name}.safetensors"), lu.Affine | lu.Ablate)
