"""Half precision and devices: the model's dtype stays, what is added up is not in it, and tensors follow the activation."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from interventions_helpers import FORMS, one, selection_of, unchanged, zoo
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lens_unlearn.evaluation.evaluate import evaluate
from lens_unlearn.evaluation.generation import generate
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.base import Intervention, Live
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.methods.simu import simu
from lens_unlearn.model.matrices import Matrix, matrix_shape
from lens_unlearn.model.positions import Rows
from lens_unlearn.model.shortcuts import shortcuts
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons.attribution import attribute
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.moments import Moments

HALF = [torch.bfloat16, torch.float16]
TOKENS = tiny.some_tokens(4, 7)
QUIET = {"progress": False}
half = pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])


@cache
def rounded(dtype: torch.dtype, wide: bool, name: str = "gpt2") -> Any:
    """A model in half precision, or in single precision with the same rounded weights."""
    plain = tiny.hugging_face(name).to(dtype)
    return tiny.to_bridge(plain.float() if wide else plain, name)


def begun(intervention: Intervention, model: Any, tokens: Tensor = TOKENS) -> Live:
    """An intervention that knows its rows, as at the beginning of a pass."""
    live = Live(intervention, model)
    live.begin(tokens, 0)
    live.norms.update({layer: torch.ones(tokens.shape) for layer in intervention.norm_layers})
    return live


def hooked(intervention: Intervention, name: str = "gpt2") -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Each hook of an intervention as a function of one tensor and a `Live`, with the shape of a token's activation."""
    model = tiny.model(name)
    for site, function in intervention.hooks():
        yield function, resolve(model, [site])[site].shape
    for matrix, change in intervention.matrices():
        rows, columns = matrix_shape(model, *matrix)
        yield (lambda x, live, f=change, n=rows: f(x[..., :n], x[..., n:], live)), (rows + columns,)


# --- the right amount, in the model's dtype ------------------------------------------------------------------------------


@half
@pytest.mark.parametrize("form", FORMS)
def test_a_hook_does_in_half_precision_what_it_does_in_single_but_for_the_rounding(
    form: str, dtype: torch.dtype
) -> None:
    """What puts values in place rounds once; what multiplies matrices, by as much as the parts of a sum."""
    act, generator = one("gpt2", form), torch.Generator().manual_seed(0)
    for hook, shape in hooked(act):
        x = torch.randn(*TOKENS.shape, *shape, generator=generator).to(dtype)
        kept = x.clone()
        got = hook(x, begun(act, tiny.model("gpt2")))
        expected = hook(x.float(), begun(act, tiny.model("gpt2")))
        assert got.dtype == dtype
        assert torch.equal(x, kept), "the input is not written to"
        if form in ("zero", "mean", "heads", "random", "deterministic", "prompt", "abstain", "every token"):
            assert torch.equal(got, expected.to(dtype))
        else:
            near = 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(got.float(), expected, rtol=near, atol=near * float(expected.abs().max()))
        if form not in ("abstain", "every token"):
            assert not torch.equal(got, x[..., -got.shape[-1] :])


@half
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_in_half_precision_is_changed_as_one_in_single(name: str, dtype: torch.dtype) -> None:
    model, wide = rounded(dtype, False, name), rounded(dtype, True, name)
    base, expected_base = tiny.logits(model, TOKENS), tiny.logits(wide, TOKENS)
    noise = float((base.float() - expected_base).abs().max())
    for form, act in zoo(wide).items():
        with act.on(model):
            got = tiny.logits(model, TOKENS)
        with act.on(wide):
            expected = tiny.logits(wide, TOKENS)
        assert got.dtype == dtype
        assert torch.equal(tiny.logits(model, TOKENS), base), form
        if form in ("abstain", "every token", "random", "deterministic"):
            continue  # these decide, and near the edge a rounding decides otherwise; the hooks were compared above
        assert float((expected - expected_base).abs().max()) > 5 * noise, "the effect is lost in the rounding"
        torch.testing.assert_close(got.float(), expected, rtol=0, atol=4 * noise)


# --- what is measured is added up in wider numbers ---------------------------------------------------------------------------


@half
def test_moments_in_half_precision_are_those_of_the_rounded_activations(dtype: torch.dtype) -> None:
    model, corpus = rounded(dtype, False), tiny.corpus((40, 33, 9, 50, 60, 21), uncounted=0.3)
    seen: dict[Site, list[Tensor]] = {site: [] for site in resolve(model, ("mlp.post", "attn.z"))}

    def keep(site: Site) -> Any:
        return lambda tensor: seen[site].append(tensor.clone()) or tensor

    transform = {site: keep(site) for site in seen}
    got = collect(
        model, corpus, list(seen), batch_size=2, transform=transform, statistic=Moments(extra=("sqrt",)), **QUIET
    )
    masks = [batch.counted for batch in corpus.batches(2)]
    for site, parts in seen.items():
        assert all(part.dtype == dtype for part in parts)
        x = torch.cat([part[mask].double() for part, mask in zip(parts, masks, strict=True)])
        mean = x.mean(0)
        expected = {
            "mean": mean,
            "std": (x - mean).square().mean(0).sqrt(),
            "mean_abs": x.abs().mean(0),
            "mean_sqrt": x.abs().sqrt().mean(0),
        }
        for name, value in expected.items():
            torch.testing.assert_close(getattr(got, name)[site], value, rtol=2e-6, atol=1e-7)


@half
def test_a_loss_is_computed_in_wider_numbers_than_the_logits(dtype: torch.dtype) -> None:
    model, corpus = rounded(dtype, False), tiny.corpus((9, 9, 9))
    act = zoo(rounded(dtype, True))["heads"]
    report = evaluate(model, {"a": corpus}, {"b": act}, resamples=3, **QUIET)
    tokens = torch.stack([corpus.row(i) for i in range(corpus.n_rows)])

    def log_probabilities() -> Tensor:
        with shortcuts(model):  # as `evaluate` runs it, with the plain, fused attention
            logits = tiny.logits(model, tokens)
        assert logits.dtype == dtype
        return logits[:, :-1].double().log_softmax(-1)

    base = log_probabilities()
    with act.on(model):
        edited = log_probabilities()
    for condition, found in (("base", base), ("b", edited)):
        loss = -found.gather(2, tokens[:, 1:, None]).mean()
        assert report.measures[condition, "a", "loss"].value == pytest.approx(float(loss), rel=1e-5)
    kl = (base.exp() * (base - edited)).sum(-1).mean()
    assert report.measures["b", "a", "kl"].value == pytest.approx(float(kl), rel=1e-4)


def test_attributions_in_half_precision_are_near_those_of_the_same_weights() -> None:
    corpus, options = tiny.corpus((9, 8, 11)).with_prompts(4), {"steps": 4, "objective": "logprob", **QUIET}
    got = attribute(rounded(torch.bfloat16, False), corpus, **options)
    expected = attribute(rounded(torch.bfloat16, True), corpus, **options)
    for site, value in expected.items():
        assert got[site].dtype == torch.float64
        size = float(value.abs().max())
        assert float((got[site] - value).abs().max()) < 0.05 * size
        assert float(torch.corrcoef(torch.stack([got[site], value]))[0, 1]) > 0.995


def test_an_update_trained_beside_half_precision_weights_is_kept_in_single_precision() -> None:
    """Steps of 1e-4 on weights of 0.2 would be lost in bfloat16: beside them they are not."""
    model = rounded(torch.bfloat16, False)
    forget, retain = tiny.corpus([9, 8], seed=1).with_prompts(4), tiny.corpus([8, 9, 7, 10, 9], seed=2).with_prompts(4)
    options: dict[str, Any] = {"steps": 2, "check_every": 2, "batch_size": 2, "mask": "all", "floor": 20.0, **QUIET}
    with unchanged(model):
        got = simu(model, forget, retain, attention="lora", rank=2, optimizer="sophia", **options)
    assert {
        value.dtype
        for update in got.updates.values()
        for value in update.tensors().values()
        if value.is_floating_point()
    } == {torch.float32}
    steps = got.updates[Matrix(0, "W_out")].value
    assert 0 < float(steps.abs().max()) < 1e-3
    with got.on(model):
        assert tiny.logits(model).dtype == torch.bfloat16
    weights = model.blocks[0].mlp.out.original_component.weight
    merged = (weights.float() + steps).to(torch.bfloat16)
    assert float((merged == weights).float().mean()) > 0.5, "so that it matters"


# --- what is global stays as it is --------------------------------------------------------------------------------------------

FLAGS = """
import torch
def flags():
    b = torch.backends
    return (torch.get_float32_matmul_precision(), b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32, b.cudnn.benchmark,
        b.cudnn.deterministic, b.cuda.matmul.allow_bf16_reduced_precision_reduction, torch.get_default_dtype(),
        torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(),
        b.cuda.flash_sdp_enabled(), b.cuda.math_sdp_enabled(), torch.is_autocast_enabled("cpu"), str(torch.get_default_device()))
"""
_space: dict[str, Any] = {}
exec(FLAGS, _space)
flags = _space["flags"]


def test_importing_everything_leaves_torchs_settings() -> None:
    """A wrong default of TransformerLens or transformers would show here too."""
    code = (
        FLAGS
        + "before = flags()\nimport lens_unlearn as lu\n[getattr(lu, n) for n in lu.__all__]\nassert flags() == before, flags()\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:less than 10%")
def test_what_one_calls_leaves_torchs_settings(model: Any, tmp_path: Any) -> None:
    corpus = tiny.corpus((9, 8, 7, 9, 8)).with_prompts(3)
    act = Ablate(selection_of(model))
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            before = flags()
            collect(model, corpus, **QUIET)
            attribute(model, corpus, steps=1, **QUIET)
            evaluate(model, {"a": corpus}, {"b": act}, resamples=3, **QUIET)
            generate(model, "def", intervention=act, max_new_tokens=2)
            simu(model, corpus, corpus, steps=1, batch_size=2, mask="all", attention="none", floor=20.0, **QUIET)
            act.save(tmp_path / "a", model)
            load_intervention(tmp_path / "a", model)
            assert flags() == before
        finally:
            torch.set_float32_matmul_precision("highest")


# --- devices --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("random", "prompt", "abstain", "every token")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_an_intervention_holds_follows_the_activation_to_its_device(form: str, dtype: torch.dtype) -> None:
    act = one("gpt2", form)
    live = Live(act, tiny.model("gpt2"))
    for hook, shape in hooked(act):
        for device in ("meta", "cpu", "meta"):  # as in a model spread over devices, of which one object serves all
            x = torch.ones(2, 7, *shape, dtype=dtype, device=device)
            got = hook(x, live)
            assert (got.device, got.dtype) == (x.device, dtype)
            assert got.shape[:2] == x.shape[:2]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Tensors that say they are on several GPUs, hold nothing, and refuse to be mixed, where there is no GPU.

    What torch does on the way in C, with a real device in hand, is said here in operations that go without.
    """

    def item(x: Tensor, index: Any) -> Tensor:
        picked: list[Tensor | None] = []
        dim = 0
        for number, at in enumerate(index := index if isinstance(index, tuple) else (index,)):
            if at is None:
                x = x.unsqueeze(dim)
            elif at is Ellipsis:
                dim = x.ndim - sum(other is not None for other in index[number + 1 :]) - 1
            elif isinstance(at, slice):
                end = sys.maxsize if at.stop is None else at.stop
                x = torch.ops.aten.slice.Tensor(x, dim, at.start, end, at.step or 1)
            picked += [None] * (dim + 1 - len(picked)) if not isinstance(at, Tensor) else [at]
            dim += 1
        return torch.ops.aten.index.Tensor(x, picked) if any(p is not None for p in picked) else x

    monkeypatch.setattr(FakeTensor, "__getitem__", item, raising=False)
    for name, dtype in (("float", torch.float32), ("long", torch.int64), ("bool", torch.bool)):
        monkeypatch.setattr(FakeTensor, name, lambda x, dtype=dtype: x.to(dtype), raising=False)
    monkeypatch.setattr(FakeTensor, "__invert__", torch.logical_not, raising=False)
    monkeypatch.setattr(FakeTensor, "__bool__", lambda x: True, raising=False)
    monkeypatch.setattr(Live, "withhold", lambda live, rows, refusal: None)  # looks at the values
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_may_be_spread_over_devices(fake: FakeTensorMode, form: str) -> None:
    """Tokens on one, each layer that is hooked on another, and the logits on a third."""
    act = one("gpt2", form)
    read = Rows.of(TOKENS, 0, None, tiny.PAD)
    hooks = list(hooked(act))
    with fake:
        live = Live(act, tiny.model("gpt2"))
        given = {one.name: getattr(read, one.name) for one in fields(read)}
        live.rows = replace(read, **{n: v.to("cuda:0") for n, v in given.items() if isinstance(v, Tensor)})
        live.abstained = torch.zeros(len(TOKENS), dtype=torch.bool, device="cuda:0")
        live.norms.update({layer: torch.ones(TOKENS.shape, device="cuda:0") for layer in act.norm_layers})
        for number, (hook, shape) in enumerate(hooks, 1):
            x = torch.zeros(*TOKENS.shape, *shape, dtype=torch.bfloat16, device=f"cuda:{number}")
            got = hook(x, live) if not isinstance(act, Delta) else _split(act, x, live)
            assert (got.device, got.dtype) == (x.device, x.dtype)
        if act.looks_at_rows:
            logits = torch.zeros(*TOKENS.shape, tiny.VOCABULARY, dtype=torch.bfloat16, device="cuda:9")
            got = act.finish(logits, live)
            assert (got.device, got.dtype, got.shape) == (logits.device, logits.dtype, logits.shape)


def _split(act: Delta, x: Tensor, live: Live) -> Tensor:
    """As in `hooked`, without slices."""
    [(matrix, change)] = act.matrices()
    rows, columns = matrix_shape(tiny.model("gpt2"), *matrix)
    return change(*x.split([rows, columns], -1), live)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@needs_gpu
@pytest.mark.parametrize("form", [*FORMS, "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_on_a_gpu_everything_is_bitwise_as_before(form: str, dtype: torch.dtype) -> None:
    model = on_gpu(dtype)
    act, tokens = one("gpt2", form), TOKENS.cuda()
    before = tiny.logits(model, tokens)
    with act.on(model):
        inside = tiny.logits(model, tokens)
        assert (inside.device, inside.dtype) == (before.device, dtype)
        assert torch.equal(tiny.logits(model, tokens), inside)
    assert torch.equal(tiny.logits(model, tokens), before)
    if dtype == torch.float32 and form not in ("all", "abstain", "every token"):
        with act.on(tiny.model("gpt2")):
            torch.testing.assert_close(inside.cpu(), tiny.logits(tiny.model("gpt2"), TOKENS), rtol=1e-3, atol=1e-3)


@needs_gpu
def test_on_a_gpu_the_moments_are_those_of_the_cpu() -> None:
    corpus, model = tiny.corpus((40, 33, 9, 50)), on_gpu(torch.float32)
    for act in (one("gpt2", "zero"), one("gpt2", "rows")):
        with act.on(model), act.on(tiny.model("gpt2")):
            got, expected = (collect(m, corpus, ("mlp.post", "attn.z"), **QUIET) for m in (model, tiny.model("gpt2")))
        for name in ("mean", "std", "mean_abs"):
            for site, value in getattr(expected, name).items():
                torch.testing.assert_close(getattr(got, name)[site].cpu(), value, rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize("form", [*FORMS, "all"])
def test_a_model_on_two_gpus_is_changed_as_on_one(form: str) -> None:
    from accelerate import dispatch_model

    plain = tiny.hugging_face("gpt2")
    parts = {
        "transformer.wte": 0,
        "transformer.wpe": 0,
        "transformer.h.0": 0,
        "transformer.h.1": 1,
        "transformer.ln_f": 1,
        "lm_head": 1,
    }
    model, act = tiny.to_bridge(dispatch_model(plain, parts), "gpt2"), one("gpt2", form)
    before = tiny.logits(model, TOKENS.cuda())
    with act.on(model):
        got = tiny.logits(model, TOKENS.cuda()).cpu()
    assert torch.equal(tiny.logits(model, TOKENS.cuda()), before)
    with act.on(tiny.model("gpt2")):
        torch.testing.assert_close(got, tiny.logits(tiny.model("gpt2"), TOKENS), rtol=1e-3, atol=1e-3)


@cache
def on_gpu(dtype: torch.dtype) -> Any:
    with tiny.quiet():
        return tiny.build("gpt2").to(device="cuda", dtype=dtype)
