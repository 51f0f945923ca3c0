"""Every decoder family that TransformerLens bridges, tiny and random, against plain PyTorch on the plain model's own modules.

The first tests know of a model only where its modules are (`families`), and share no code with the battery for users. That one is
run on every family too, and has to find what stands in docs/models.md: on some here, on all with ``-m families`` (`make families`).
"""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import families
import pytest
import tiny
import torch
from families import Family
from torch import Tensor

from lens_unlearn.core.errors import SiteError
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.model.host import host_version
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.maps import NeuronMap

ROOT = Path(__file__).parents[2]
LETTERS = {
    "attn.q": "a",
    "attn.k": "a",
    "attn.v": "a",
    "attn.z": "a",
    "mlp.pre": "m",
    "mlp.post": "m",
    "mlp.pre_linear": "m",
}
OUTPUT = ("mlp.post", "attn.z")


class Case(NamedTuple):
    """A family: its plain model, the bridge, and the plain modules inside the bridge, found before it was one."""

    family: Family
    plain: Any
    model: Any
    inside: dict[Site, Any]
    base: Tensor


def modules(plain: Any, family: Family) -> dict[Site, Any]:
    """Find the modules whose inputs are `mlp.post` and `attn.z`."""
    blocks = plain.get_submodule(family.blocks)
    paths = {"mlp.post": family.post, "attn.z": family.z}
    return {
        Site(layer, kind): blocks[layer].get_submodule(path)
        for kind, path in paths.items()
        for layer, has in enumerate(family.layers)
        if LETTERS[kind] in has
    }


@pytest.fixture(scope="module", params=families.FAMILIES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    name: str = request.param
    family = families.FAMILIES[name]
    if not families.usable(name):
        pytest.skip(f"this TransformerLens does not know {family.name}, or gets it wrong")
    inner = families.plain(name)
    inside = modules(inner, family)
    model = families.bridge(name, inner)
    base = tiny.logits(model, families.tokens())
    hooks, weights = tiny.hooks_of(model), tiny.weights_hash(model)
    yield Case(family, families.plain(name), model, inside, base)
    assert tiny.hooks_of(model) == hooks
    assert tiny.weights_hash(model) == weights
    assert torch.equal(tiny.logits(model, families.tokens()), base)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_model_is_the_plain_one_and_has_the_sites_that_it_should(case: Case) -> None:
    family, model = case.family, case.model
    close(case.base, tiny.logits(case.plain, families.tokens()))
    for kind, letter in LETTERS.items():
        layers = [layer for layer, has in enumerate(family.layers) if letter in has]
        if not layers or kind in family.lacks or (kind == "mlp.pre_linear" and not family.gated):
            with pytest.raises(SiteError, match=rf"\.{kind} "):
                resolve(model, kind)
            continue
        points = resolve(model, kind)
        assert [site.layer for site in points] == layers
        for site, point in points.items():
            if letter == "m":
                assert point.shape == (family.neurons,)
                continue
            heads, d_head = point.shape
            assert d_head == family.d_head
            if kind in OUTPUT:
                module = case.inside[site]
                width = module.weight.shape[0 if type(module).__name__ == "Conv1D" else 1]
                assert heads * d_head == width
            assert heads == 4 if kind in ("attn.q", "attn.z") else 4 % heads == 0


def inputs(plain: Any, sites: dict[Site, Any], tokens: Tensor) -> dict[Site, Tensor]:
    """Run a plain model under plain PyTorch hooks, and return what the modules are given, ``[tokens, neurons]`` in float64."""
    seen: dict[Site, Tensor] = {}

    def watch(site: Site) -> Any:
        return lambda module, args: seen.update({site: args[0].detach().double().reshape(tokens.numel(), -1)})

    handles = [module.register_forward_pre_hook(watch(site)) for site, module in sites.items()]
    try:
        with torch.no_grad():
            plain(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_statistics_are_those_of_plain_hooks(case: Case) -> None:
    sites = modules(case.plain, case.family)
    if not sites:
        pytest.skip("TransformerLens shows no MLP and no attention of it")
    corpus = tiny.corpus([9, 9, 9, 9], bos=False, tokens=range(3, families.VOCABULARY))
    moments = collect(case.model, corpus, list(sites), batch_size=3, progress=False)
    expected = inputs(case.plain, sites, corpus.tokens.long().reshape(4, 9))
    for site, values in expected.items():
        close(moments.mean[site].reshape(-1).double(), values.mean(0))
        close(moments.mean_abs[site].reshape(-1).double(), values.abs().mean(0))
        close(moments.rms[site].reshape(-1).double(), values.square().mean(0).sqrt())


def third(case: Case, kind: str) -> NeuronMap | None:
    draw = torch.Generator().manual_seed(3)
    sites = [site for site in case.inside if site.kind == kind]
    points = resolve(case.model, sites) if sites else {}
    return NeuronMap({s: torch.rand(p.shape, generator=draw) < 0.3 for s, p in points.items()}) if points else None


def zero(modules: dict[Site, Any], selection: NeuronMap) -> None:
    with torch.no_grad():
        for site, chosen in selection.items():
            weight = modules[site].weight
            rows = weight if type(modules[site]).__name__ == "Conv1D" else weight.t()
            rows[chosen.reshape(-1)] = 0


@pytest.mark.parametrize("kind", OUTPUT)
def test_an_ablation_is_bitwise_the_edit_of_the_weights(case: Case, kind: str) -> None:
    selection = third(case, kind)
    if selection is None:
        pytest.skip(f"TransformerLens shows no {kind} of it")
    tokens = families.tokens()
    with Ablate(selection).on(case.model):
        ablated = tiny.logits(case.model, tokens)
    assert not torch.allclose(ablated, case.base, atol=1e-3)
    held = {site: case.inside[site].weight.detach().clone() for site in selection}
    try:
        zero(case.inside, selection)
        assert torch.equal(tiny.logits(case.model, tokens), ablated)
    finally:
        with torch.no_grad():
            for site, weight in held.items():
                case.inside[site].weight.copy_(weight)
    edited = families.copy.deepcopy(case.plain)
    zero(modules(edited, case.family), selection)
    close(ablated, tiny.logits(edited, tokens))
    assert torch.equal(tiny.logits(case.model, tokens), case.base)


def test_generation_is_the_same_with_and_without_a_cache(case: Case) -> None:
    model, tokens = case.model, families.tokens(2, 11, seed=5)  # beyond the windows of those that have one
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    parts = [part for kind in OUTPUT if (part := third(case, kind)) is not None]
    edits = [None, *([Ablate(NeuronMap({s: v for part in parts for s, v in part.items()}))] if parts else [])]
    for edit in edits:
        with torch.no_grad(), edit.on(model) if edit else torch.no_grad():
            stepwise = tokens
            for _ in range(4):
                stepwise = torch.cat([stepwise, model(stepwise)[:, -1:].argmax(-1)], dim=1)
            assert torch.equal(model.generate(tokens, use_past_kv_cache=False, **options)[:, -4:], stepwise[:, -4:])
            if case.family.bad_cache:
                continue
            assert torch.equal(model.generate(tokens, use_past_kv_cache=True, **options)[:, -4:], stepwise[:, -4:])


# --- the battery, and the page --------------------------------------------------------------------------------------------


def script() -> Any:
    spec = importlib.util.spec_from_file_location("families_script", ROOT / "benchmarks" / "families.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


STORED = ROOT / "benchmarks" / "outputs" / "families.json"
SOME = ("bloom", "gemma3", "phi3", "cohere2", "youtu", "lfm2-moe", "nemotron-h", "gpt-oss")
EVERY = [*families.FAMILIES, *families.EXPERTS]


@pytest.mark.skipif(not STORED.is_file(), reason="only where the repository is")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SOME else pytest.mark.families) for name in EVERY]
)
def test_the_battery_finds_what_the_page_says(name: str) -> None:
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    if stored["versions"]["transformer_lens"] != host_version():
        pytest.skip(f"the page is of TransformerLens {stored['versions']['transformer_lens']}")
    rows = {row[0]: row for table in stored["tables"].values() for row in table["rows"]}
    assert script().row_of(name) == rows[name]


@pytest.mark.skipif(not STORED.is_file(), reason="only where the repository is")
def test_the_page_has_at_least_sixty_families() -> None:
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    names = [row[0] for table in ("dense", "hybrid", "experts") for row in stored["tables"][table]["rows"]]
    assert len(set(names)) == len(names) >= 60
    if stored["versions"]["transformer_lens"] == host_version():
        assert names == EVERY
