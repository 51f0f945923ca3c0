"""Affine maps of the residual stream: a plain PyTorch hook with the formula is the oracle."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interventions_helpers import unchanged, under
from torch import Tensor

import lens_unlearn as lu
from lens_unlearn.core.errors import SelectionError, SiteError
from lens_unlearn.interventions.affine import Affine
from lens_unlearn.methods.controls import controls_for, random_affine
from lens_unlearn.model.sites import Site

TOKENS = tiny.some_tokens(3, 8)
FIRST, LAST = Site(0, "resid"), Site(1, "resid")
WIDTH = 32


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 3


def made(strength: float = 0.7) -> Affine:
    left, right, centre = drawn(WIDTH, 2), drawn(2, WIDTH, seed=1), drawn(WIDTH, seed=2)
    return Affine({FIRST: left}, {FIRST: right}, {FIRST: centre}, {FIRST: drawn(WIDTH, seed=3), LAST: centre}, strength)


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "gemma2"])
def test_it_is_a_plain_hook_with_the_formula(name: str) -> None:
    plain, act = tiny.hugging_face(name), made()

    def mapped(site: Site) -> Any:
        def hook(module: Any, args: Any, out: Any) -> Any:
            x = (out[0] if isinstance(out, tuple) else out).double()
            change = act.shift[site].double()
            if site in act.left:
                change = change + (x - act.centre[site].double()) @ (act.left[site].double() @ act.right[site].double())
            new = (x + 0.7 * change).float()
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return hook

    blocks = plain.get_submodule(tiny.ARCHITECTURES[name].blocks)
    handles = [blocks[site.layer].register_forward_hook(mapped(site)) for site in (FIRST, LAST)]
    expected = tiny.logits(plain, TOKENS)
    for handle in handles:
        handle.remove()
    model = tiny.model(name)
    with unchanged(model):
        got = under(model, act, TOKENS)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    assert not torch.allclose(got, tiny.logits(model, TOKENS), atol=1e-3)
    assert torch.equal(under(model, act.at(0), TOKENS), tiny.logits(model, TOKENS))


def test_a_file_gives_it_back(tmp_path: Path) -> None:
    model, act = tiny.model("gpt2"), made()
    act.save(tmp_path / "a.safetensors", model)
    again = lu.load_intervention(tmp_path / "a.safetensors", model)
    assert repr(again) == repr(act) == "Affine(strength 0.7, 2 sites, resid, rank 2 and shifted, shifted)"
    assert again.describe() == {"L0.resid": "rank 2 and shifted", "L1.resid": "shifted"}
    assert torch.equal(under(model, again, TOKENS), under(model, act, TOKENS))


def test_the_control_is_the_same_map_turned() -> None:
    act = made()
    [control] = controls_for(tiny.model("gpt2"), act, [3])
    assert isinstance(control, Affine)
    assert all(torch.equal(control.shift[s], random_affine(act, seed=3).shift[s]) for s in act.shift)
    assert torch.equal(control.centre[FIRST], act.centre[FIRST])
    vectors = [torch.stack([a.shift[FIRST], a.shift[LAST], *a.left[FIRST].T, *a.right[FIRST]]) for a in (act, control)]
    torch.testing.assert_close(*(v @ v.T for v in vectors), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*vectors, atol=0.1)
    r = torch.nn.functional.normalize(drawn(WIDTH), dim=0)
    projection = Affine(dict.fromkeys((FIRST, LAST), -r[:, None]), dict.fromkeys((FIRST, LAST), r[None]))
    turned = random_affine(projection)
    torch.testing.assert_close(turned.left[FIRST], -turned.right[LAST].T)
    assert float(turned.right[FIRST] @ turned.right[LAST].T) == pytest.approx(1)
    assert abs(float(turned.right[FIRST] @ r)) < 0.9


V = torch.ones(WIDTH)
REFUSED: dict[str, tuple[Any, type[Exception]]] = {
    "nothing would be changed": (lambda: Affine(), SelectionError),
    "left is a Tensor": (lambda: Affine(V), SelectionError),  # type: ignore[arg-type]
    "other sites than each other": (lambda: Affine({FIRST: V[:, None]}, {LAST: V[None]}), SelectionError),
    "centre at more": (lambda: Affine(centre={FIRST: V}, shift={FIRST: V}), SelectionError),
    r"right \(2, 32\)": (lambda: Affine({FIRST: V[:, None]}, {FIRST: torch.ones(2, WIDTH)}), SelectionError),
    r"shift \(1, 32\)": (lambda: Affine(shift={FIRST: V[None]}), SelectionError),
    "no tensor of finite": (lambda: Affine(shift={FIRST: V / 0}), SelectionError),
    "strength=nan": (lambda: Affine(shift={FIRST: V}, strength=float("nan")), SelectionError),
    "inside routed experts": (lambda: Affine(shift={"L0.experts.post": V}), SelectionError),  # type: ignore[dict-item]
    "no site kind 'residd'": (lambda: Affine(shift={Site(0, "residd"): V}), SiteError),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_no_map_is_refused_in_a_sentence(words: str) -> None:
    make, error = REFUSED[words]
    with pytest.raises(error, match=words):
        make()


def test_a_model_of_another_shape_is_refused_before_a_hook_is_added() -> None:
    model = tiny.model("gpt2")
    for act in (Affine(shift={FIRST: torch.ones(5)}), Affine(shift={Site(0, "attn.z"): V})):
        with unchanged(model), pytest.raises(SelectionError, match="in this model, and"), act.on(model):
            pass
