"""Sites: every hook point is what its name says, on every architecture, and whatever is not is refused by name."""

from typing import Any

import pytest
import tiny
import torch
import transformers
from sites_helpers import values_seen
from torch import nn

import lens_unlearn as lu
from lens_unlearn.core.errors import ModelError, SelectionError, SiteError
from lens_unlearn.model import host, sites
from lens_unlearn.model.hooks import attach
from lens_unlearn.model.host import processing
from lens_unlearn.model.sites import KINDS, Site, parse_sites, resolve
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.maps import NeuronMap

CORPUS = tiny.corpus((5,), tokens=range(3, 60))


def test_every_kind_holds_what_plain_hooks_see_in_the_plain_model(dense: str) -> None:
    tokens, kinds = tiny.some_tokens(3, 11), tiny.kinds_of(dense)
    expected = tiny.plain_activations(tiny.hugging_face(dense), dense, kinds, tokens)
    seen = values_seen(tiny.model(dense), kinds, tokens, whole=True)
    assert seen.keys() == expected.keys()
    for site, value in expected.items():
        torch.testing.assert_close(
            seen[site].reshape(value.shape), value, rtol=1e-5, atol=1e-5, msg=lambda m, s=site: f"{s}: {m}"
        )


@pytest.mark.parametrize("name", [*tiny.ALL])
def test_the_backbone_gives_the_values_of_a_full_forward(name: str) -> None:
    model, tokens = tiny.model(name), tiny.some_tokens(2, 9)
    kinds = ["mlp.pre", "mlp.post", "attn.z", "resid"]
    full, short = (values_seen(model, kinds, tokens, whole=whole) for whole in (True, False))
    assert full.keys() == short.keys()
    for site, value in full.items():
        torch.testing.assert_close(short[site], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", tiny.FOLDED)
def test_compatibility_mode_changes_z_by_a_constant_and_mlp_values_not_at_all(name: str) -> None:
    tokens = tiny.some_tokens(3, 11)
    raw, compat = (
        values_seen(tiny.model(n), ["mlp.post", "attn.z"], tokens, whole=True) for n in (name, f"{name}-compat")
    )
    for layer in range(tiny.LAYERS):
        torch.testing.assert_close(raw[Site(layer, "mlp.post")], compat[Site(layer, "mlp.post")], rtol=1e-4, atol=1e-4)
        difference = raw[Site(layer, "attn.z")] - compat[Site(layer, "attn.z")]
        assert float(difference.abs().max()) > 0.05
        assert float((difference - difference[:1, :1]).abs().max()) < 1e-4


def test_points_have_the_shape_and_dtype_of_the_activation(each: str) -> None:
    points = resolve(tiny.model(each), ["mlp.pre", "mlp.post", "attn.q", "attn.z", "resid"])
    d_head = 16 if each.startswith("gemma") else 8
    shapes = {"mlp.pre": (64,), "mlp.post": (64,), "attn.q": (4, d_head), "attn.z": (4, d_head), "resid": (32,)}
    for site, point in points.items():
        assert point.shape == shapes[site.kind], site
        assert point.dtype == torch.float32


def test_a_wrong_width_in_the_configuration_does_not_matter() -> None:
    model = tiny.model("opt")
    assert model.cfg.d_mlp != 64, "OPT's configuration is expected to be wrong; the test means nothing otherwise"
    assert resolve(model, "mlp.post")[Site(0, "mlp.post")].shape == (64,)


def test_grouped_queries_have_fewer_keys_and_values_but_all_heads_in_z() -> None:
    points = resolve(tiny.model("llama"), ["attn.k", "attn.v", "attn.z"])
    assert points[Site(1, "attn.k")].shape == (2, 8)
    assert points[Site(1, "attn.v")].shape == (2, 8)
    assert points[Site(1, "attn.z")].shape == (4, 8)


def test_the_linear_gate_exists_only_where_the_mlp_is_gated(dense: str) -> None:
    if tiny.ARCHITECTURES[dense].gated:
        assert len(resolve(tiny.model(dense), "mlp.pre_linear")) == tiny.LAYERS
    else:
        words = r"L0\.mlp\.pre_linear does not exist in this model: layer 0 is a \w+ with mlp\.pre, mlp\.post, attn\.q"
        with pytest.raises(SiteError, match=words) as caught:
            resolve(tiny.model(dense), "mlp.pre_linear")
        assert str(caught.value).endswith("resid; no other layer has mlp.pre_linear either")


def test_mixture_of_experts_is_refused_by_name() -> None:
    for kind in ("mlp.pre", "mlp.post"):
        with pytest.raises(SiteError, match=rf"L0\.{kind} has no neuron axis: layer 0 has a MoE.*mixture-of-experts"):
            resolve(tiny.model("mixtral"), kind)
    assert resolve(tiny.model("mixtral"), "attn.z")[Site(0, "attn.z")].shape == (4, 8)


@pytest.mark.parametrize(
    ("kind", "near"),
    [("mlp.psot", "mlp.post"), ("attn.hok_z", "attn.z"), ("mlp.hok_post", "mlp.post"), ("residual", "resid")],
)
def test_a_misspelled_kind_names_the_nearest(kind: str, near: str) -> None:
    with pytest.raises(SiteError, match=f"'{kind}'.*{near}"):
        parse_sites(kind, 2)


def test_a_kind_like_nothing_lists_all() -> None:
    with pytest.raises(SiteError) as caught:
        parse_sites("%%%", 2)
    assert all(kind in str(caught.value) for kind in KINDS)


@pytest.mark.parametrize("site", ["L2.mlp.post", Site(2, "mlp.post"), Site(-1, "mlp.post")])
def test_a_layer_out_of_range_says_which_there_are(site: Any) -> None:
    with pytest.raises(SiteError, match="its layers are 0 to 1"):
        resolve(tiny.model("gpt2"), site)


def test_asking_for_nothing_is_an_error() -> None:
    with pytest.raises(SiteError, match="no sites"):
        resolve(tiny.model("gpt2"), [])


def test_sites_print_as_they_are_parsed_and_sort_out_repeats() -> None:
    for kind in KINDS:
        for layer in (0, 7, 31):
            assert Site.parse(str(Site(layer, kind))) == Site(layer, kind)
    assert parse_sites(["mlp.post", "L1.mlp.post", Site(0, "attn.z")], 2) == [
        Site(0, "mlp.post"),
        Site(1, "mlp.post"),
        Site(0, "attn.z"),
    ]
    for text in ("", "L1", "mlp.post", "L-1.mlp.post", "L1.mlp.post ", "l1.mlp.post"):
        with pytest.raises(SiteError):
            Site.parse(text)


def test_training_mode_is_refused_naming_where() -> None:
    model = tiny.build("gpt2")
    model.train()
    with pytest.raises(ModelError, match="training mode: call model.eval"):
        resolve(model, "mlp.post")
    model.eval()
    dropout = next(module for module in model.modules() if isinstance(module, nn.Dropout))
    dropout.train()
    with pytest.raises(ModelError, match=r"drop.* is in training mode"):
        resolve(model, "mlp.post")


@pytest.mark.parametrize("other", [nn.Linear(2, 2), None, "gpt2", 3])
def test_what_is_no_transformer_lens_model_is_refused(other: Any) -> None:
    with pytest.raises(
        ModelError,
        match="has no hook points: pass (a TransformerBridge or a HookedTransformer|lens_unlearn.load_model)",
    ):
        resolve(other, "mlp.post")


def test_a_plain_hugging_face_model_is_refused() -> None:
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no hook points"):
        resolve(tiny.hugging_face("gpt2"), "mlp.post")


def test_a_hook_point_under_two_names_is_one(each: str) -> None:
    model = tiny.model(each)
    seen = []
    point = resolve(model, "L0.mlp.post")[Site(0, "mlp.post")]
    remove = attach(point.hook, lambda t: seen.append(t.shape))
    try:
        tiny.logits(model)
    finally:
        assert remove()
    assert len(seen) == 1
    aliases = [name for name, hook in model.hook_dict.items() if hook is point.hook]
    assert "blocks.0.mlp.hook_post" in aliases


def test_a_site_that_fires_twice_is_refused() -> None:
    model = tiny.build("gpt2")
    hook = model.hook_dict["blocks.0.mlp.hook_post"]
    inner, first = type(hook).forward, []

    def twice(x: torch.Tensor) -> torch.Tensor:
        if not first:
            first.append(1)
            hook(x)
        return inner(hook, x)

    hook.forward = twice
    with pytest.raises(SiteError, match=r"L0\.mlp\.post fired 2 times"):
        resolve(model, "mlp.post")


def test_a_site_that_never_fires_is_refused() -> None:
    model = tiny.build("gpt2")
    dead = type(model.hook_dict["blocks.0.mlp.hook_post"])()
    name = next(n for n in model.hook_dict if n.endswith("0.mlp.hook_post"))
    hooks = dict(model.hook_dict)
    hooks[name] = dead
    stand_in = _StandIn(model, hooks)
    with pytest.raises(SiteError, match=r"L0\.mlp\.post fired 0 times"):
        resolve(stand_in, "L0.mlp.post")


def test_a_site_of_another_width_than_the_output_matrix_is_refused() -> None:
    model = tiny.model("gpt2")
    hooks = dict(model.hook_dict)
    hooks["blocks.0.mlp.hook_post"] = model.hook_dict["blocks.0.mlp.hook_out"]
    with pytest.raises(SiteError, match=r"L0\.mlp\.post is 32 wide, but the layer has 64 neurons"):
        resolve(_StandIn(model, hooks), "L0.mlp.post")


def test_a_site_without_a_neuron_axis_is_refused() -> None:
    model = tiny.model("gpt2")
    hooks = dict(model.hook_dict)
    hooks["blocks.0.attn.hook_z"] = model.hook_dict["blocks.0.hook_resid_post"]
    with pytest.raises(SiteError, match="there is no neuron axis"):
        resolve(_StandIn(model, hooks), "L0.attn.z")


class _StandIn:
    """A model with other hook names."""

    def __init__(self, model: Any, hooks: dict[str, Any]) -> None:
        self.model, self.hook_dict = model, hooks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def test_a_failing_probe_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("gpt2")
    before = tiny.hooks_of(model)
    monkeypatch.setattr("lens_unlearn.model.sites.backbone", lambda *_: (_ for _ in ()).throw(MemoryError("boom")))
    with pytest.raises(MemoryError):
        resolve(model, ["mlp.post", "attn.z"])
    assert tiny.hooks_of(model) == before


def test_resolving_is_probed_once_and_again_after_hook_points_were_replaced(monkeypatch: pytest.MonkeyPatch) -> None:

    model, calls = tiny.build("gpt2"), []
    real = sites.backbone
    monkeypatch.setattr(sites, "backbone", lambda *a: (calls.append(1), real(*a))[1])
    resolve(model, "mlp.post")
    resolve(model, "mlp.post")
    assert len(calls) == 1
    resolve(model, ["mlp.post", "attn.z"])
    assert len(calls) == 2

    stand_in = _StandIn(model, dict(model.hook_dict))
    resolve(stand_in, "L0.mlp.pre")
    stand_in.hook_dict["blocks.0.mlp.hook_pre"] = model.hook_dict["blocks.0.mlp.hook_post"]
    point = resolve(stand_in, "L0.mlp.pre")[Site(0, "mlp.pre")]
    assert point.hook is model.hook_dict["blocks.0.mlp.hook_post"]


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba"])
def test_a_model_without_mlps_is_not_taken_for_one_of_experts(kind: str) -> None:
    builder = pytest.importorskip("transformer_lens.model_bridge.sources")
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 4}
    with tiny.quiet():
        plain = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
        plain.config.architectures = [type(plain).__name__]
        model = builder.build_bridge_from_module(
            plain, architecture=type(plain).__name__, hf_config=plain.config, device="cpu"
        ).eval()
    for look in (lambda: resolve(model, "mlp.post"), lambda: resolve(model, "mlp.pre"), lambda: collect(model, CORPUS)):
        with pytest.raises(
            SiteError, match=rf"does not exist in this model: layer 0 is a {kind}\w+ with resid; no other layer has mlp"
        ):
            look()
    assert len(resolve(model, "resid")) == 3


def test_a_model_is_freed_although_its_points_were_remembered() -> None:
    import gc
    import weakref

    model = tiny.build("llama")
    resolve(model, ["mlp.post", "attn.z"])
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_removing_takes_that_hook_alone_and_says_whether_it_was_there() -> None:
    model = tiny.build("gpt2")
    hook = model.hook_dict["blocks.0.mlp.hook_post"]
    seen = []
    first, second = (attach(hook, lambda t, n=n: seen.append(n)) for n in (1, 2))
    assert first() is True
    assert first() is False
    tiny.logits(model)
    assert seen == [2]
    assert second() is True


def test_processing_tells_modes_apart() -> None:
    assert processing(tiny.model("gpt2")) == "bridge"
    assert processing(tiny.model("gpt2-compat")) == "bridge, compatibility mode"


@pytest.mark.parametrize("version", ["2.18.0", "3.8.1", "5.0.0", "5.0.0a1", "nightly"])
def test_other_versions_of_the_host_are_refused_saying_what_to_install(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(host, "host_version", lambda: version)
    host.require_host.cache_clear()
    try:
        with pytest.raises(
            ModelError, match=r"transformer-lens \S+ is not supported: run pip install 'transformer-lens>=3"
        ):
            resolve(tiny.model("gpt2"), "mlp.post")
        with pytest.raises(ModelError, match="is not supported"):
            host.boot("anywhere", device="cpu", dtype=torch.float32)
    finally:
        host.require_host.cache_clear()


@pytest.mark.parametrize("version", ["3.9.0", "3.10.2", "4.0.0", "4.3.0", "4.11.0rc1"])
def test_supported_versions_of_the_host_are_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(host, "host_version", lambda: version)
    host.require_host.cache_clear()
    try:
        assert resolve(tiny.model("gpt2"), "mlp.post")
    finally:
        host.require_host.cache_clear()


@pytest.mark.parametrize("kind", sites.KINDS)
def test_transformer_lens_names_are_taken_wherever_a_site_is(kind: str) -> None:
    name = f"blocks.1.{sites.KINDS[kind]}"
    assert Site.parse(name) == Site(1, kind)
    assert sites.parse_sites([name, sites.KINDS[kind]], 2) == [Site(1, kind), Site(0, kind)]
    made = NeuronMap({Site(layer, kind): torch.arange(3.0) + layer for layer in range(2)})
    assert torch.equal(made[name], torch.arange(3.0) + 1)
    assert torch.equal(made[f"L1.{kind}"], made[name])
    assert torch.equal(made[1][f"L1.{kind}"], made[name])
    assert made[sites.KINDS[kind]].sites == made.sites
    assert sites.check_kind("resid_post") == "resid"
    with pytest.raises(SelectionError, match=r"L4\..* is not in this map"):
        made[f"L4.{kind}"]
    for wrong in ("blocks.1.hook_attn_out", "blocks.x.mlp.hook_post", "L1.mlp.hook_nothing", "hook_post"):
        with pytest.raises(SiteError):
            sites.parse_sites(wrong, 2)


def test_methods_take_them_as_well() -> None:
    model, forget, retain = tiny.model("llama"), tiny.corpus((8, 9), seed=1), tiny.corpus((8, 9), seed=2)
    quiet: dict[str, Any] = {"fraction": 0.1, "progress": False}
    for method, kind in (
        (lu.selective_pruning, "mlp.post"),
        (lu.selective_pruning, "attn.z"),
        (lu.neuron_adjust, "mlp.pre"),
    ):
        found = method(model, forget, retain, site=sites.KINDS[kind], **quiet)
        assert repr(found) == repr(method(model, forget, retain, site=kind, **quiet))
    shares = {"mlp.hook_post": 0.1, "attn.z": 0.2}
    mixed = lu.selective_pruning(
        model, forget, retain, fraction=shares, site=("mlp.post", "attn.hook_z"), progress=False
    )
    assert set(mixed.selection.kinds) == {"mlp.post", "attn.z"}
    wanted = lu.collect(model, forget, ["blocks.0.mlp.hook_post", "resid_post"], progress=False)
    assert [str(site) for site in wanted.sites] == ["L0.mlp.post", "L0.resid", "L1.resid"]
    prompts = tiny.corpus([9] * 30, seed=3).with_prompts(seed=0)
    options: dict[str, Any] = {"layer": -1, "alpha": 1.4, "progress": False}
    assert repr(lu.key_space_detection(model, prompts, site="mlp.hook_post", **options)) == repr(
        lu.key_space_detection(model, prompts, site="mlp.post", **options)
    )
