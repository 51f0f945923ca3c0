"""Activations of one run in another: a plain PyTorch hook that writes them is the oracle."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interventions_helpers import selection_of, unchanged, under
from torch import Tensor

from lens_unlearn.core.errors import LensUnlearnError, SelectionError, SiteError
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.interventions.patch import Patch
from lens_unlearn.model.sites import Site

TOKENS, OTHERS = tiny.some_tokens(3, 8), tiny.some_tokens(3, 8, seed=1)
FEW = ["gpt2", "llama", "opt", "gpt2-compat", *tiny.HOOKED[:1]]


def cache(model: Any, tokens: Tensor = OTHERS) -> Any:
    with torch.no_grad():
        return model.run_with_cache(tokens)[1]


@contextmanager
def plain_patch(plain: Any, name: str, layer: int, kind: str, where: Tensor) -> Iterator[None]:
    """Run a plain model on the other tokens, and write what it had into its next passes, where a mask says."""
    a = tiny.ARCHITECTURES[name]
    block = plain.get_submodule(a.blocks)[layer]
    seen: list[Tensor] = []

    def write(own: Tensor) -> Tensor:
        if not seen:
            seen.append(own.clone())
            return own
        shape = (*where.shape, *[1] * (own.ndim - 2)) if own.shape[:2] == where.shape else (-1, 1)
        return torch.where(where.reshape(shape), seen[0], own)

    def output(module: Any, args: Any, out: Any) -> Any:
        return (write(out[0]), *out[1:]) if isinstance(out, tuple) else write(out)

    if kind == "resid":
        handle = block.register_forward_hook(output)
    else:
        module = tiny.module_of(plain, name, Site(layer, kind))
        handle = module.register_forward_pre_hook(lambda module, args: (write(args[0]),))
    tiny.logits(plain, OTHERS)
    yield
    handle.remove()


EVERYWHERE = [("gpt2", "mlp.post"), ("gpt2", "attn.z"), ("llama", "mlp.post"), ("opt", "mlp.post"), ("neox", "attn.z")]


@pytest.mark.parametrize(
    ("dense", "kind"), [*((name, "resid") for name in ("gpt2", "llama", "neox", "gemma2")), *EVERYWHERE]
)
def test_a_patch_is_a_plain_hook_that_writes_another_run(dense: str, kind: str) -> None:
    model, plain = tiny.model(dense), tiny.hugging_face(dense)
    where = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    patch = Patch(cache(model), at=where, layers=1, site=kind)
    with plain_patch(plain, dense, 1, kind, where):
        expected = tiny.logits(plain, TOKENS)
    got = under(model, patch, TOKENS)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, tiny.logits(model, TOKENS), atol=1e-3)


@pytest.mark.parametrize("name", FEW)
def test_the_whole_stream_of_another_run_gives_its_logits_and_its_own_nothing(name: str) -> None:
    model = tiny.model(name)
    with unchanged(model):
        assert torch.equal(under(model, Patch(cache(model)), TOKENS), tiny.logits(model, OTHERS))
        own = Patch(cache(model, TOKENS), site=["resid", "mlp.post", "attn.z"])
        assert torch.equal(under(model, own, TOKENS), tiny.logits(model, TOKENS))


@pytest.mark.parametrize("name", FEW)
def test_at_the_last_position_of_the_last_layer_only_that_is_the_other_run(name: str) -> None:
    model = tiny.model(name)
    got = under(model, Patch(cache(model), at="last", layers=1), TOKENS)
    assert torch.equal(got[:, :-1], tiny.logits(model, TOKENS)[:, :-1])
    torch.testing.assert_close(got[:, -1], tiny.logits(model, OTHERS)[:, -1], rtol=1e-5, atol=1e-5)


def test_behind_the_last_position_of_the_run_nothing_is_written_and_one_row_is_for_all() -> None:
    model = tiny.model("gpt2")
    short = Patch(cache(model, OTHERS[:1, :3]), layers=[1])
    got, base, other = under(model, short, TOKENS), tiny.logits(model, TOKENS), tiny.logits(model, OTHERS[:1])
    assert torch.equal(got[:, 3:], base[:, 3:])  # nothing attends to what is written behind the last block
    torch.testing.assert_close(got[:, :3], other[:, :3].expand(3, -1, -1), rtol=1e-5, atol=1e-5)


def test_a_run_under_an_intervention_is_written_like_any_other() -> None:
    model = tiny.model("gpt2")
    prune = Ablate(selection_of(model))
    with prune.on(model):
        run = cache(model, TOKENS)
    torch.testing.assert_close(under(model, Patch(run), TOKENS), under(model, prune, TOKENS))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_cache_changes_nothing(name: str) -> None:
    model = tiny.speaking(name)
    run = cache(model, OTHERS[:1, :5])
    texts = []
    for use_past_kv_cache in (True, False):
        with Patch(run, layers=0).on(model):
            options = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False, "verbose": False}
            texts.append(
                model.generate(TOKENS[:1, :5], return_type="tokens", use_past_kv_cache=use_past_kv_cache, **options)
            )
    assert torch.equal(*texts)


def test_it_comes_back_from_a_file_unless_it_is_of_one_batch_s_mask(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    patch = Patch(cache(model), at="last", site=["resid", "attn.z"])
    patch.save(tmp_path / "patch.safetensors", model)
    again = load_intervention(tmp_path / "patch.safetensors", model)
    assert isinstance(again, Patch)
    assert repr(again) == repr(patch) == 'Patch(3 rows of 8 positions, layers 0, 1, attn.z, resid, at "last")'
    assert torch.equal(under(model, again, TOKENS), under(model, patch, TOKENS))
    with pytest.raises(SelectionError, match="mask belongs to one batch"):
        Patch(cache(model), at=torch.ones(3, 8, dtype=torch.bool)).save(tmp_path / "no.safetensors", model)
    assert [path.name for path in tmp_path.iterdir()] == ["patch.safetensors"]


def test_what_is_changed_in_the_cache_later_is_not_in_the_patch_and_no_gradient_is_kept() -> None:
    model = tiny.model("gpt2")
    run = {Site(1, "resid"): cache(model)["resid_post", 1].clone().requires_grad_()}
    patch = Patch(run)
    run.clear()
    assert not patch.from_run[Site(1, "resid")].requires_grad
    assert patch.layers == (1,)


WRONG: dict[str, Any] = {
    "nothing at layer 7": lambda run: Patch(run, layers=[0, 7]),
    "nothing at any layer, mlp.post": lambda run: Patch({Site(0, "resid"): torch.zeros(1, 2, 32)}, site="mlp.post"),
    "are no layers": lambda run: Patch(run, layers=[]),
    "no layers": lambda run: Patch(run, layers=[-1]),
    "is no place in a text": lambda run: Patch(run, at="first"),
    "from_run is a Tensor": lambda run: Patch(torch.zeros(1, 2, 32)),  # type: ignore[arg-type]
    "NaN or infinity": lambda run: Patch({Site(0, "resid"): torch.full((1, 2, 32), float("nan"))}),
    "is not .batch, pos, neurons.": lambda run: Patch({Site(0, "resid"): torch.zeros(2, 32)}),
    "of .1, 2.": lambda run: Patch({Site(0, "resid"): torch.zeros(1, 2, 32), Site(1, "resid"): torch.zeros(1, 3, 32)}),
    "no activations": lambda run: Patch({Site(0, "resid"): torch.zeros(1, 2, 32).long()}),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_written_is_refused_in_one_sentence(words: str) -> None:
    run = cache(tiny.model("gpt2"))
    with pytest.raises(SelectionError, match=words) as caught:
        WRONG[words](run)
    assert "\n" not in str(caught.value)


def test_kinds_and_names_that_there_are_not_are_refused() -> None:
    with pytest.raises(SiteError, match="no site kind"):
        Patch(cache(tiny.model("gpt2")), site="residual")
    with pytest.raises(SiteError, match="is not a site"):
        Patch({"resid_post": torch.zeros(1, 2, 32)})  # type: ignore[dict-item]


def test_a_model_or_a_pass_of_another_shape_is_refused_and_nothing_stays() -> None:
    model = tiny.model("gpt2")
    with unchanged(model):
        with (
            pytest.raises(SelectionError, match="in this model"),
            Patch({Site(0, "resid"): torch.zeros(1, 2, 8)}).on(model),
        ):
            pass
        with pytest.raises(SelectionError, match="the run has 3 rows, and the forward pass 2"):
            under(model, Patch(cache(model)), TOKENS[:2])
        with pytest.raises(LensUnlearnError, match="no change of weights"):
            Patch(cache(model)).edits()
