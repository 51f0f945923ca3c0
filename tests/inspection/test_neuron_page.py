"""A neuron's page: what it writes by an oracle in plain PyTorch, its histogram, its top texts, and what its ablation does."""

from typing import Any

import pytest
import tiny
import torch

import lens_unlearn as lu
from lens_unlearn.core.errors import LensUnlearnError, SelectionError, SiteError
from lens_unlearn.model.direct import direct_logits, written_row

QUIET: dict[str, Any] = {"progress": False}


def layer_norm_writes(plain: Any, layer: int, index: int) -> torch.Tensor:
    """(r - mean(r)) w W_U, of a plain GPT-2."""
    row = plain.transformer.h[layer].mlp.c_proj.weight[index]
    return ((row - row.mean()) * plain.transformer.ln_f.weight) @ plain.lm_head.weight.T


def rms_norm_writes(plain: Any, layer: int, index: int) -> torch.Tensor:
    """r w W_U, of a plain Llama."""
    row = plain.model.layers[layer].mlp.down_proj.weight[:, index]
    return (row * plain.model.norm.weight) @ plain.lm_head.weight.T


@pytest.mark.parametrize(("name", "writes"), [("gpt2", layer_norm_writes), ("llama", rms_norm_writes)])
@pytest.mark.parametrize(("layer", "index"), [(0, 3), (1, 40)])
def test_what_a_neuron_writes_is_its_row_through_the_final_norm_and_the_unembedding(
    name: str, writes: Any, layer: int, index: int
) -> None:
    expected = writes(tiny.hugging_face(name), layer, index).detach()
    model = tiny.model(name)
    for kind in ("mlp.post", "mlp.pre"):
        found = direct_logits(model, written_row(model, lu.Site(layer, kind), index))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_folded_weights_write_the_same_up_to_what_all_tokens_share() -> None:
    """Compatibility mode folds the gain into the unembedding, which it centres as well."""
    expected = layer_norm_writes(tiny.hugging_face("gpt2"), 1, 5).detach()
    model = tiny.model("gpt2-compat")
    found = direct_logits(model, written_row(model, lu.Site(1, "mlp.post"), 5))
    near = {"rtol": 1e-3, "atol": 1e-3 * float(expected.abs().max())}
    torch.testing.assert_close(found - found.mean(), expected - expected.mean(), **near)


def test_a_head_s_neuron_writes_its_row_of_w_o_and_nothing_writes_nothing() -> None:
    plain, model = tiny.hugging_face("gpt2"), tiny.model("gpt2")
    row = plain.transformer.h[1].attn.c_proj.weight[9].detach()
    torch.testing.assert_close(written_row(model, lu.Site(1, "attn.z"), 9), row)
    assert not direct_logits(model, torch.zeros_like(row)).any()
    with pytest.raises(SiteError, match="L0.resid_post has no row of an output matrix: choose from mlp.pre"):
        written_row(model, lu.Site(0, "resid_post"), 0)


def test_the_page_holds_what_the_parts_say(model: Any) -> None:
    corpora = {"one": tiny.corpus(), "<two>": tiny.corpus(seed=1, lengths=(12, 9))}
    page = lu.neuron_page(model, "L1.mlp.post", 7, corpora, examples=2, tokens=4, **QUIET)
    assert page.neuron == "L1.mlp.post[7]"
    logits = direct_logits(model, written_row(model, page.site, 7))
    assert [value for _, value in page.promoted] == pytest.approx(logits.topk(4).values.tolist())
    assert [value for _, value in page.suppressed] == pytest.approx((-(-logits).topk(4).values).tolist())
    assert list(page.to_frame().logits) == sorted(page.to_frame().logits, reverse=True)
    whole = lu.collect(model, corpora["one"], "L1.mlp.post", statistic=lu.Histogram(), **QUIET)
    assert torch.equal(page.histograms["one"].counts(page.site, 7), whole.counts(page.site, 7))
    assert int(page.histograms["one"].counts(page.site, 7).sum()) == int(corpora["one"].counted.sum())
    top = lu.top_examples(model, corpora["one"], page.neuron, k=2, **QUIET)
    assert page.examples["one"].to_frame().equals(top.to_frame())
    mask = torch.zeros(logits.new_empty(0).new_zeros(int(model.cfg.d_mlp)).shape, dtype=torch.bool)
    mask[7] = True
    alone = lu.Ablate(lu.NeuronMap({page.site: mask}))
    expected = lu.evaluate(model, {"one": corpora["one"]}, {"x": alone}, **QUIET)
    assert page.effect["ablated", "one", "loss"].value == expected["x", "one", "loss"].value
    assert page.effect["ablated", "one", "kl"].value > 0
    assert "L1.mlp.post[7]" in repr(page)


def test_the_page_is_html_without_a_script_that_shows_itself(model: Any, tmp_path: Any) -> None:
    corpora = {"<script>one": tiny.corpus(), "retain": tiny.corpus(seed=1)}
    page = lu.neuron_page(model, "L0.mlp.post", 3, corpora, **QUIET)
    written = page._repr_html_()
    assert "<script" not in written
    assert "&lt;script&gt;one" in written
    assert written.count("<polyline") == 2
    assert "stroke='#2E86D1'" in written, "retain is blue, as everywhere"
    for words in ("Activations by corpus", "What it writes", "What its ablation alone does", "Top texts of retain"):
        assert words in written
    assert "nan" not in written.lower().replace("ablation", "")
    page.to_html(tmp_path / "neuron.html")
    assert (tmp_path / "neuron.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("site", "index", "options", "error", "words"),
    [
        ("L9.mlp.post", 0, {}, SiteError, "L9"),
        ("L0.mlp.post", 10_000, {}, SelectionError, "there is no L0.mlp.post"),
        ("L0.resid_post", 0, {}, SiteError, "has no row of an output matrix"),
        ("L0.mlp.post", 0, {"examples": 0}, LensUnlearnError, "examples=0 is no number of examples"),
        ("L0.mlp.post", 0, {"tokens": True}, LensUnlearnError, "tokens=True is no number of tokens"),
    ],
)
def test_what_cannot_be_shown_is_said(
    site: str, index: int, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        lu.neuron_page(tiny.model("gpt2"), site, index, {"one": tiny.corpus()}, **options, **QUIET)
    with pytest.raises(LensUnlearnError):
        lu.neuron_page(tiny.model("gpt2"), "L0.mlp.post", 0, {}, **QUIET)
