"""Interventions that act on the queries that a detector finds: plain hooks, with the decision made by hand, are the oracle."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interventions_helpers import box_around_half, selection_of, under
from positions_helpers import run, values
from test_placed import masked
from torch import Tensor

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.base import Chain
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.interventions.update import Update
from lens_unlearn.interventions.when import When
from lens_unlearn.keyspace.regions import Box
from lens_unlearn.methods.controls import controls_for
from lens_unlearn.model.matrices import Matrix, matrix_shape
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.maps import NeuronMap

FIRST = Site(0, "mlp.post")
TOKENS = tiny.some_tokens(8, 7)


def behind(model: Any, kind: str = "mlp.post") -> Ablate:
    """Ablate half of the last layer's neurons."""
    selection = selection_of(model, kind, share=0.5)
    last = max(site.layer for site in selection)
    return Ablate(NeuronMap({site: selection[site] for site in selection if site.layer == last}))


def when(model: Any, **options: Any) -> When:
    return When.region({FIRST: box_around_half(model, FIRST)}, behind(model), **options)


def found(model: Any, detector: Abstain) -> Tensor:
    """Decide by hand which rows of `TOKENS` are found: by their last key."""
    box = detector.regions[FIRST]
    keys = values(model, TOKENS, FIRST)[:, -1].flatten(1).float()
    rows = ((keys - box.centres[0]).abs() / box.scale).amax(1) <= box.limit  # type: ignore[attr-defined]
    assert 0 < int(rows.sum()) < len(rows)
    return rows


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_it_acts_from_the_prompts_end_on_in_the_rows_that_are_found(name: str) -> None:
    model, plain = tiny.model(name), tiny.hugging_face(name)
    acting = when(model)
    mask = torch.zeros_like(TOKENS, dtype=torch.bool)
    mask[:, -1] = found(model, acting.detector)
    with masked(plain, name, acting.inner.selection, mask):  # type: ignore[attr-defined]
        expected = tiny.logits(plain, TOKENS)
    got, before = under(model, acting, TOKENS), tiny.logits(model, TOKENS)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[~mask], before[~mask])
    assert not torch.allclose(got[mask], before[mask], atol=1e-4)


def test_an_answer_that_follows_is_acted_on_as_well_and_at_every_token_what_is_found_later() -> None:
    model = tiny.model("gpt2")
    acting, ends = when(model), torch.full((len(TOKENS),), 3)
    keys = values(model, TOKENS, FIRST).flatten(2).float()
    centre = keys[:, 3:].mean((0, 1))
    far = (keys - centre).abs().amax(2)
    box = Box(centre[None], torch.ones(len(centre)), float(far[:, 3:].median()))
    inside = far <= box.limit
    place = torch.arange(TOKENS.shape[1])
    for mode, fired in (
        ("prompt", inside & (place == 3)),
        ("every_token", inside & (place >= 3)),
    ):
        mask = fired.long().cummax(1).values.bool()
        assert bool(mask.any())
        with When(Abstain({FIRST: box}, when=mode), acting.inner).on(model) as live:  # type: ignore[arg-type]
            live.expect(ends)
            got = run(model, TOKENS)
            assert not bool(live.abstained.any())  # it withholds nothing
        with acting.inner.on(model, at=mask):
            torch.testing.assert_close(got, run(model, TOKENS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_is_that_of_each_row_alone_with_a_cache_and_without(name: str) -> None:
    model = tiny.model(name)
    acting = when(model)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "return_type": "tokens"}
    options |= {"stop_at_eos": False}
    with acting.on(model):
        together = model.generate(TOKENS, use_past_kv_cache=True, **options)
        assert torch.equal(model.generate(TOKENS, use_past_kv_cache=False, **options), together)
        for row, tokens in zip(together, TOKENS):
            assert torch.equal(model.generate(tokens[None], use_past_kv_cache=True, **options)[0], row)
    changed = (model.generate(TOKENS, use_past_kv_cache=True, **options) != together).any(1)
    assert bool(changed.any())
    assert not bool((changed & ~found(model, acting.detector)).any())


def test_what_is_never_found_is_bitwise_the_model_and_what_always_is_the_intervention_at_the_end() -> None:
    model = tiny.model("gpt2")
    box = box_around_half(model, FIRST)
    nothing, everything = (box.at(limit) for limit in (0.0, 1e9))
    before = tiny.logits(model, TOKENS)
    assert torch.equal(under(model, When.region({FIRST: nothing}, behind(model)), TOKENS), before)
    always = under(model, When.region({FIRST: everything}, behind(model)), TOKENS)
    assert torch.equal(always, under(model, behind(model).placed("last"), TOKENS))
    assert torch.equal(tiny.logits(model, TOKENS), before)


def test_updates_of_matrices_and_a_chain_are_limited_as_well() -> None:
    model = tiny.model("llama")
    shape = matrix_shape(model, 1, "W_out")
    delta = Delta({Matrix(1, "W_out"): Update(torch.randn(shape, generator=torch.Generator().manual_seed(0)))})
    box, rows = box_around_half(model, FIRST), torch.zeros_like(TOKENS, dtype=torch.bool)
    acting = When.region({FIRST: box}, behind(model) + delta)
    rows[:, -1] = found(model, acting.detector)
    got = under(model, acting, TOKENS)
    with (behind(model) + delta).on(model, at=rows):
        torch.testing.assert_close(got, tiny.logits(model, TOKENS), rtol=1e-6, atol=1e-6)
    detector = Abstain({FIRST: box})
    with (When(detector, behind(model)) + detector).on(model) as live:  # one detector, asked twice
        run(model, TOKENS)
        assert torch.equal(live.abstained, rows[:, -1])


def test_it_comes_back_from_a_file_and_has_a_control_with_the_same_detector(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    acting = When.region({FIRST: box_around_half(model, FIRST)}, behind(model), when="every_token")
    acting.save(tmp_path / "w.safetensors", model)
    loaded = load_intervention(tmp_path / "w.safetensors", model)
    assert repr(loaded) == repr(acting)
    assert torch.equal(under(model, loaded, TOKENS), under(model, acting, TOKENS))
    control = controls_for(model, acting, [0])[0]
    assert isinstance(control, When)
    assert control.detector is acting.detector
    assert control.inner.selection.count() == behind(model).selection.count()  # type: ignore[attr-defined]
    assert list(acting.describe()) == ["L0.mlp.post", "L1.mlp.post"]


def test_what_cannot_depend_on_the_detector_is_refused_in_a_sentence() -> None:
    model = tiny.model("gpt2")
    box, last = box_around_half(model, FIRST), Site(1, "mlp.post")
    with pytest.raises(SelectionError, match="looks at layer 1, and what is to act depends on it already in layer 1"):
        When.region({last: box}, behind(model))
    with pytest.raises(SelectionError, match="already in layer 0"):
        When.region({FIRST: box}, Ablate(selection_of(model)))
    with pytest.raises(SelectionError, match="abstains, which the detector does as it is"):
        When.region({FIRST: box}, Abstain({last: box}))
    with pytest.raises(SelectionError, match="the detector is a Ablate"):
        When(behind(model), behind(model))  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="a int is no intervention"):
        When(Abstain({FIRST: box}), 3)  # type: ignore[arg-type]


def test_what_acts_on_what_is_found_alone_says_so() -> None:
    model = tiny.model("gpt2")
    gated = when(model)
    detector, inner = gated.detector, gated.inner
    assert gated.judges
    assert detector.judges
    assert Chain((detector, gated)).judges
    assert not inner.judges
    assert not Chain((detector, inner)).judges, "the other member acts everywhere"
    assert not Chain(()).judges
