"""reading_once: what is remembered equals what is collected, and nothing else is taken for it."""

from typing import Any

import pytest
import tiny
import torch
from interventions_helpers import selection_of

from lens_unlearn.core.errors import ActivationError
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons import collect as collecting
from lens_unlearn.neurons.collect import collect, query_keys
from lens_unlearn.neurons.histogram import Histogram
from lens_unlearn.neurons.moments import Moments
from lens_unlearn.neurons.reading_once import reading_once

CORPUS = tiny.corpus([9, 14, 11, 8, 20, 13], seed=4)
OTHER = tiny.corpus([9, 14, 11, 8, 20, 13], seed=5)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is really read: corpus and sites of every pass."""
    made: list[tuple[Any, ...]] = []
    gather = collecting.gather

    def noted(model: Any, corpus: Any, sites: Any, *rest: Any) -> Any:
        made.append((corpus.name, sites if isinstance(sites, str) else tuple(map(str, sites))))
        return gather(model, corpus, sites, *rest)

    monkeypatch.setattr(collecting, "gather", noted)
    return made


def same(one: Any, other: Any) -> None:
    assert one.provenance == other.provenance
    assert set(one.state()) == set(other.state())
    for name, part in one.state().items():
        torch.testing.assert_close(part, other.state()[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", *tiny.HOOKED[:1]])
def test_each_text_is_read_once_to_the_same_numbers(name: str, passes: list[Any]) -> None:
    model = tiny.model(name)
    quiet: dict[str, Any] = {"progress": False}
    plain = [
        collect(model, CORPUS, "mlp.post", **quiet),
        collect(model, CORPUS, ["attn.z", Site(1, "mlp.post")], **quiet),
        query_keys(model, CORPUS, "mlp.post", **quiet),
        query_keys(model, CORPUS, Site(0, "mlp.post"), **quiet),
        collect(model, OTHER, "mlp.post", **quiet),
    ]
    passes.clear()
    with reading_once():
        got = [
            collect(model, CORPUS, "mlp.post", **quiet),
            collect(model, CORPUS, ["attn.z", Site(1, "mlp.post")], **quiet),
            query_keys(model, CORPUS, "mlp.post", **quiet),
            query_keys(model, CORPUS, Site(0, "mlp.post"), **quiet),
            collect(model, OTHER, "mlp.post", **quiet),
        ]
        again = collect(model, CORPUS, "mlp.post", **quiet)
    for one, other in zip(got, plain, strict=True):
        same(one, other)
    same(again, plain[0])
    assert [sites for _, sites in passes] == [
        tuple(map(str, got[0].sites)),
        tuple(str(site) for site in got[1].sites if site.kind == "attn.z"),
        tuple(map(str, got[2].sites)),
        tuple(map(str, got[4].sites)),
    ]
    collect(model, CORPUS, "mlp.post", **quiet)  # the block is over
    assert len(passes) == 5


def test_kinds_that_are_wanted_together_are_read_in_one_pass(passes: list[Any]) -> None:
    model = tiny.model("gpt2")
    with reading_once(["mlp.post", "attn.z"]):
        mlp = collect(model, CORPUS, "mlp.post", progress=False)
        attention = collect(model, CORPUS, "attn.z", progress=False)
    assert len(passes) == 1
    assert {site.kind for site in mlp.sites} == {"mlp.post"}
    assert {site.kind for site in attention.sites} == {"attn.z"}


def test_what_differs_in_anything_is_read_for_itself(passes: list[Any]) -> None:
    model = tiny.model("gpt2")
    cut = Ablate(selection_of(model))
    quiet: dict[str, Any] = {"progress": False}
    with reading_once():
        before = collect(model, CORPUS, "mlp.post", **quiet)
        with cut.on(model):
            under = collect(model, CORPUS, "mlp.post", **quiet)
        collect(model, CORPUS, "mlp.post", statistic=Moments(extra=("sqrt",)), **quiet)
        collect(model, CORPUS, "mlp.post", statistic=Histogram(), **quiet)
        collect(model, CORPUS, "mlp.post", skip_sinks=5.0, **quiet)
        collect(model, CORPUS, "mlp.post", transform={Site(0, "mlp.post"): torch.relu}, **quiet)
        query_keys(model, CORPUS, "mlp.post", **quiet)
        query_keys(model, CORPUS, "mlp.post", seed=1, **quiet)
        query_keys(model, CORPUS, "mlp.post", pool="mean", **quiet)
        collect(tiny.model("llama"), CORPUS, "mlp.post", **quiet)
        assert len(passes) == 10
        after = collect(model, CORPUS, "mlp.post", **quiet)
    assert len(passes) == 10
    assert not torch.equal(*(one.mean[Site(1, "mlp.post")] for one in (before, under)))
    same(before, after)


def test_an_error_in_the_block_ends_it(passes: list[Any]) -> None:
    model = tiny.model("gpt2")

    def broken() -> None:
        with reading_once():
            collect(model, CORPUS, "mlp.post", progress=False)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        broken()
    collect(model, CORPUS, "mlp.post", progress=False)
    assert len(passes) == 2


def test_a_site_that_cannot_be_read_is_no_error_of_who_reads_another(passes: list[Any]) -> None:
    model = tiny.model("gpt2")
    with reading_once(["mlp.post", "sae"]):  # no dictionary is attached
        assert len(collect(model, CORPUS, "mlp.post", progress=False).sites) == 2
    with reading_once(["mlp.post", "attn.z"]):
        made = collecting.gather

        def fails(model: Any, corpus: Any, sites: Any, *rest: Any) -> Any:
            if any(site.kind == "attn.z" for site in sites):
                raise ActivationError("L0.attn.z holds NaN")
            return made(model, corpus, sites, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collecting, "gather", fails)
            assert {site.kind for site in collect(model, CORPUS, "mlp.post", progress=False).sites} == {"mlp.post"}
            with pytest.raises(ActivationError, match=r"L0\.attn\.z"):
                collect(model, CORPUS, "attn.z", progress=False)
