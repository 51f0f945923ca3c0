"""Quantized weights: packed four bits (bitsandbytes), eight bits (bitsandbytes), and tensors of a class of their own (torchao).

Stand-ins have the layout of each; where the libraries are installed, theirs run as well.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lens_unlearn.core.errors import ModelError
from lens_unlearn.evaluation.relearning import relearn
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.interventions.update import Update
from lens_unlearn.methods.selective_pruning import selective_pruning
from lens_unlearn.methods.simu import simu
from lens_unlearn.model.loading import fingerprint
from lens_unlearn.model.matrices import Matrix, matrix_value
from lens_unlearn.model.residual import residual_scale
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons.attribution import attribute
from lens_unlearn.neurons.collect import collect
from lens_unlearn.testing import check_model


class Linear4bit(nn.Linear):
    """Two values in a byte, as one column: what bitsandbytes' class of this name holds."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None)
        weight = plain.weight.detach()
        self.scale = float(weight.abs().max() / 7)
        values = (weight / self.scale).round().clamp(-8, 7).to(torch.int8) + 8
        pairs = values.to(torch.uint8).reshape(-1, 2)
        self.weight = nn.Parameter((pairs[:, 0] * 16 + pairs[:, 1])[:, None], requires_grad=False)
        self.bias = plain.bias

    def forward(self, input: Tensor) -> Tensor:
        values = torch.cat([self.weight // 16, self.weight % 16], dim=1).float() - 8
        return nn.functional.linear(input, values.reshape(self.out_features, self.in_features) * self.scale, self.bias)


class Linear8bitLt(nn.Linear):
    """Bytes, with a scale per output, as bitsandbytes' class of this name holds them."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None)
        weight = plain.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = plain.bias

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.float() * self.scale, self.bias)


class Int8Tensor(Tensor):
    """A tensor that says it is of floats, and has no memory of its own: how torchao holds weights."""

    def __new__(cls, values: Tensor, scale: Tensor) -> "Int8Tensor":
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values_, self.scale_ = values, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values_", "scale_"], None

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.values_.to(self.scale_.dtype) * self.scale_

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].values_, args[0].scale_)
        args, kwargs = tree_map(lambda t: t.dequantize() if isinstance(t, cls) else t, (args, kwargs or {}))
        return func(*args, **kwargs)


def of_class(plain: nn.Linear) -> nn.Linear:
    scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
    values = (plain.weight.detach() / scale).round().to(torch.int8)
    plain.weight = nn.Parameter(Int8Tensor(values, scale), requires_grad=False)
    return plain


def bitsandbytes_4(plain: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(plain.in_features, plain.out_features, bias=False, compute_dtype=torch.float32)
    made.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4", module=made)
    return made.to("cpu")


def bitsandbytes_8(plain: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, bias=False, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    return made.to("cpu")


def torchao(options: Callable[[Any], Any]) -> Callable[[nn.Linear], nn.Module]:
    def quantize(plain: nn.Linear) -> nn.Module:
        library = pytest.importorskip("torchao.quantization")
        library.quantize_(plain, options(library))
        return plain

    return quantize


QUANTIZED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "packed": Linear4bit,
    "bytes": Linear8bitLt,
    "class": of_class,
    "bitsandbytes int4": bitsandbytes_4,
    "bitsandbytes int8": bitsandbytes_8,
    "torchao int8": torchao(lambda library: library.Int8WeightOnlyConfig()),
    "torchao int4": torchao(
        lambda library: library.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=library.granularity.PerGroup(32)
        )
    ),
}
CORPUS = tiny.corpus([9, 12, 7, 10], seed=1)
_made: dict[str, Any] = {}


def plain(name: str) -> Any:
    with tiny.quiet(0):
        config = transformers.LlamaConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )  # fmt: skip
        config._attn_implementation = "eager"
        model = transformers.LlamaForCausalLM(config).eval()
    tiny.randomize(model)
    with tiny.quiet():
        for module in list(model.model.layers.modules()):
            for place, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, place, QUANTIZED[name](child) if name else child)
    return model


@pytest.fixture(params=QUANTIZED)
def model(request: pytest.FixtureRequest) -> Any:
    if request.param not in _made:
        with tiny.quiet():
            _made[request.param] = tiny.to_bridge(plain(request.param), "llama")
    return _made[request.param]


def test_the_width_is_that_of_the_map_and_not_of_its_storage(model: Any) -> None:
    for layer in range(2):
        points = resolve(model, [f"L{layer}.{kind}" for kind in ("mlp.pre", "mlp.pre_linear", "mlp.post", "attn.z")])
        assert [point.shape for point in points.values()] == [(128,), (128,), (128,), (4, 16)]


def test_statistics_are_those_of_plain_hooks(model: Any) -> None:
    moments = collect(model, CORPUS, "mlp.post", batch_size=1, progress=False)
    seen: list[Tensor] = []
    linear = model.blocks[1].mlp.out.original_component
    handle = linear.register_forward_hook(lambda module, args, output: seen.append(args[0].detach().double()))
    try:
        with torch.no_grad():
            for batch in CORPUS.batches(1):
                model(batch.tokens.long())
                seen[-1] = seen[-1][batch.counted]
    finally:
        handle.remove()
    torch.testing.assert_close(
        moments.mean[Site(1, "mlp.post")].double(), torch.cat(seen).mean(0), rtol=2e-2, atol=1e-3
    )  # of eight bits, activations are rounded, differently in each batch


def test_an_ablation_acts_and_leaves_the_model_as_it_was(model: Any, tmp_path: Path) -> None:
    base, tokens = tiny.logits(model), tiny.some_tokens()
    prune = Ablate(collect(model, CORPUS, ("mlp.post", "attn.z"), progress=False).mean_abs.top(0.3))
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    model.tokenizer = model.tokenizer or tiny.speaking("llama").tokenizer
    with prune.on(model), torch.no_grad():
        assert not torch.allclose(tiny.logits(model), base, atol=1e-2)
        assert model.generate(tokens, **options).shape == (2, tokens.shape[1] + 4)
    assert torch.equal(tiny.logits(model), base)
    prune.save(tmp_path / "prune.safetensors", model)
    loaded = load_intervention(tmp_path / "prune.safetensors", model)
    assert torch.equal(loaded.selection.flat(), prune.selection.flat())  # type: ignore[attr-defined]
    assert len(residual_scale(model)) == 2


def test_the_battery_for_models_passes(model: Any) -> None:
    checks = check_model(model)
    assert not checks.failed, str(checks)
    words = {row.check: row.words for row in checks.rows}
    assert words["ablation"] == "it acts; quantized weights have no edit to compare with"
    assert words["update"].startswith("the weights of L1.W_out are quantized")


def test_weights_that_are_edited_are_another_model() -> None:
    model = tiny.to_bridge(plain("class"), "llama")
    before = fingerprint(model)
    assert fingerprint(model) == before
    model.blocks[0].mlp.out.original_component.weight.values_[3, 4] += 1
    assert fingerprint(model) != before


def test_what_needs_the_weights_is_refused_in_one_sentence(model: Any) -> None:
    facts, others = CORPUS.with_prompts(4), tiny.corpus([8, 9, 10, 11, 9, 8], seed=2).with_prompts(4)
    delta = Delta({Matrix(0, "W_out"): Update(torch.ones(128, 64))})
    words = r"^the weights of L0\.W_out are quantized, and cannot be edited: load the model unquantized$"
    with pytest.raises(ModelError, match=words), delta.on(model):
        pass
    with pytest.raises(ModelError, match=words), (Ablate(_some(model)) + delta).on(model):
        pass
    with pytest.raises(ModelError, match=words):
        matrix_value(model, 0, "W_out")
    quantized = "^this model is quantized: .*; load it unquantized$"
    with pytest.raises(ModelError, match=quantized):
        simu(model, facts, others, steps=1, progress=False)
    with pytest.raises(ModelError, match=quantized):
        relearn(model, facts, {"base": None}, measured={"facts": facts}, steps=(1,), progress=False)
    with pytest.raises(ModelError, match=quantized):
        selective_pruning(model, facts, others, site="attn.z", unit="direction", progress=False)


@pytest.mark.parametrize("name", ["packed", "bytes", "class"])
def test_nothing_is_merged_into_quantized_weights(name: str) -> None:
    holder, source = plain(name), tiny.to_bridge(plain(""), "llama")
    before = copy.deepcopy(list(holder.parameters()))
    delta = Delta({Matrix(0, "W_out"): Update(torch.ones(128, 64))})
    for edit in (delta, Ablate(_some(source))):
        with pytest.raises(ModelError, match="the weights of L0.W_out are quantized: load the model unquantized"):
            edit.merge_into(holder, source)
    after = list(holder.parameters())
    assert all(torch.equal(one.dequantize() if name == "class" and hasattr(one, "values_") else one, other.dequantize()
                           if name == "class" and hasattr(other, "values_") else other)
               for one, other in zip(before, after, strict=True))  # fmt: skip


def _some(model: Any) -> Any:
    return collect(model, CORPUS, "mlp.post", progress=False).mean_abs.top(0.1)


def test_attribution_runs_where_a_gradient_flows(model: Any) -> None:
    def run() -> Any:
        return attribute(model, CORPUS.with_prompts(4), "mlp.post", steps=2, progress=False)

    if model is _made.get("bitsandbytes int4"):  # its kernel for CPUs has no gradient
        with pytest.raises(
            ModelError, match="^this model is quantized: no gradient flows through its weights; load it unq"
        ):
            run()
    else:
        assert all(torch.isfinite(value).all() for _, value in run().items())
