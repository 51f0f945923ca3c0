"""LAPE: the published formula in NumPy, a planted neuron, what is refused; and a run with several languages to retain."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from command_line_helpers import call, write_texts

import lens_unlearn as lu
from lens_unlearn import methods
from lens_unlearn.core.errors import LensUnlearnError, SelectionError
from lens_unlearn.methods import by_name
from lens_unlearn.methods.controls import controls_for
from lens_unlearn.methods.lape import lape, specific
from lens_unlearn.model.sites import Site

QUIET: dict[str, Any] = {"progress": False}


def languages(count: int = 3) -> list[lu.Corpus]:
    return [tiny.corpus((9, 14, 11, 8, 12, 10), seed=seed, name=f"language {seed}") for seed in range(count)]


def by_hand(active: np.ndarray, fraction: float, often: float) -> np.ndarray:
    """Follow the paper neuron by neuron."""
    bar = np.sort(active.ravel())[round(often * active.size) - 1]
    entropy = {}
    for neuron, column in enumerate(active.T):
        if column.max() <= bar:
            continue
        shares = column[column > 0] / column.sum()
        entropy[neuron] = -(shares * np.log(shares)).sum()
    chosen = sorted(entropy, key=lambda neuron: (entropy[neuron], neuron))[: round(fraction * active.shape[1])]
    found = np.zeros(active.shape, dtype=bool)
    for neuron in chosen:
        found[:, neuron] = active[:, neuron] > bar
    return found


@pytest.mark.parametrize(("fraction", "often"), [(0.05, 0.95), (0.3, 0.5), (1.0, 0.9)])
def test_the_neurons_of_a_language_are_those_of_the_paper(fraction: float, often: float) -> None:
    active = np.random.default_rng(0).beta(0.5, 2.0, size=(4, 200))
    active[:, :7] = 0  # never active
    active[1, 7:12] = 0  # in one language never
    expected = by_hand(active, fraction, often)
    assert expected.any()
    assert np.array_equal(specific(torch.tensor(active), fraction, often).numpy(), expected)


def test_a_neuron_of_one_language_is_that_languages_alone() -> None:
    active = np.full((3, 100), 0.4)
    active[:, 5], active[:, 6] = (0.9, 0.0, 0.0), (0.0, 0.8, 0.7)
    found = specific(torch.tensor(active), 0.02, 0.95).numpy()
    assert [np.flatnonzero(own).tolist() for own in found] == [[5], [6], [6]]


def test_corpora_and_their_moments_give_the_same_and_the_control_has_as_many() -> None:
    model, corpora = tiny.model("llama"), languages()
    found = lape(model, corpora[0], corpora[1:], fraction=0.3, **QUIET)
    moments = [lu.collect(model, corpus, "mlp.pre", **QUIET) for corpus in corpora]
    assert lape(model, moments[0], moments[1:], fraction=0.3).selection.equals(found.selection)
    active = np.stack([np.concatenate([m.positive[s].numpy() for s in m.positive]) for m in moments])
    expected = by_hand(active, 0.3, 0.95)[0]
    assert np.array_equal(np.concatenate([mask.numpy() for _, mask in found.selection.items()]), expected)
    assert {site.kind for site in found.selection} == {"mlp.post"}
    control = controls_for(model, found, [0], moments[0], moments[1:])[0]
    assert control.selection.count() == found.selection.count()  # type: ignore[attr-defined]
    record = by_name("lape")
    fitted = record.fit(model, corpora[0], record.together(corpora[1:]), QUIET)
    assert record.at(model, fitted, 0.3, {}).selection.equals(found.selection)  # type: ignore[attr-defined]
    assert not record.by_default


def test_what_cannot_be_is_refused_in_a_sentence() -> None:
    model, corpora = tiny.model("llama"), languages(2)
    with pytest.raises(LensUnlearnError, match="often=1"):
        lape(model, *corpora, often=1.0, **QUIET)
    with pytest.raises(LensUnlearnError, match="the same text"):
        lape(model, corpora[0], [corpora[1], corpora[0]], **QUIET)
    few = lu.collect(model, corpora[1], [Site(0, "mlp.pre")], **QUIET)
    with pytest.raises(LensUnlearnError, match="of different layers"):
        lape(model, corpora[0], few, **QUIET)
    with pytest.raises(SelectionError, match="selects nothing of"):
        lape(model, *corpora, fraction=0.0001, **QUIET)


def test_a_run_takes_each_source_to_retain_for_a_language(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    @functools.wraps(lape)
    def watched(model: Any, forget: Any, retain: Any, **options: Any) -> lu.Ablate:
        given.append(retain)
        return lape(model, forget, retain, **options)

    monkeypatch.setattr(methods, "METHODS", (replace(by_name("lape"), function=watched),))
    files = [write_texts(tmp_path / f"{i}.jsonl", i, words=[f"w{i}{j}" for j in range(6)]) for i in range(3)]
    sources = ["--forget", f"{files[0]}:text", "--retain", f"{files[1]}:text", "--retain", f"{files[2]}:text"]
    options = ["--method", "lape", "--set", "fraction=0.5", "--set", "often=0.5", "--tokens", 400, "--window", 32]
    out = tmp_path / "run"
    assert call("run", "--model", model_dir, *sources, *options, "--no-sweep", "--quiet", "--out", out) == 0
    assert given
    assert all(len(retain) == 2 and not lu.NeuronMap.equals(*(one.positive for one in retain)) for retain in given)
    assert (out / "lape.safetensors").exists()
