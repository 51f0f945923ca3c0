"""Where a plain Hugging Face model keeps each weight matrix and its bias: `weight_view` and `bias_view` find them.

Knows, by `model_type`, the modules of each architecture and which matrices are stored as one; knows nothing of what is done to
a matrix, nor of models that belong to TransformerLens (`model.matrices` has those).
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.errors import ModelError, SelectionError
from lens_unlearn.model.host import is_quantized, is_wrapped
from lens_unlearn.model.matrices import Matrix

__all__ = ["add_biases", "bias_view", "norm_bias", "require_bias", "require_known", "weight_view"]

_SPLIT = {"W_Q": "self_attn.q_proj", "W_K": "self_attn.k_proj", "W_V": "self_attn.v_proj", "W_O": "self_attn.o_proj"}
_GATED = {"W_gate": "mlp.gate_proj", "W_in": "mlp.up_proj", "W_out": "mlp.down_proj"}
_LLAMA = {**_SPLIT, **_GATED}
_LAYOUTS: dict[str, tuple[str, dict[str, str]]] = {
    "gpt2": (
        "h",
        {
            **dict.fromkeys(("W_Q", "W_K", "W_V"), "attn.c_attn"),
            **{"W_O": "attn.c_proj", "W_in": "mlp.c_fc", "W_out": "mlp.c_proj"},
        },
    ),
    "gpt_neox": (
        "layers",
        {
            **dict.fromkeys(("W_Q", "W_K", "W_V"), "attention.query_key_value"),
            **{"W_O": "attention.dense", "W_in": "mlp.dense_h_to_4h", "W_out": "mlp.dense_4h_to_h"},
        },
    ),
    "opt": ("decoder.layers", {**_SPLIT, "W_O": "self_attn.out_proj", "W_in": "fc1", "W_out": "fc2"}),
    "phi3": (
        "layers",
        {
            **dict.fromkeys(("W_Q", "W_K", "W_V"), "self_attn.qkv_proj"),
            **dict.fromkeys(("W_gate", "W_in"), "mlp.gate_up_proj"),
            **{"W_O": "self_attn.o_proj", "W_out": "mlp.down_proj"},
        },
    ),
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), ("layers", _LLAMA)),
}
"""For each `model_type` of Hugging Face: where its base model has the list of blocks, and a block its matrices."""


def _type_of(hf_model: Any) -> str:
    return str(getattr(getattr(hf_model, "config", None), "model_type", None))


def require_known(hf_model: Any) -> None:
    """Refuse what is not a plain Hugging Face model of a known architecture.

    Raises:
        ModelError: If it belongs to TransformerLens, or its layout is not known here.
    """
    if is_wrapped(hf_model):
        raise ModelError(
            f"this {type(hf_model).__name__} belongs to TransformerLens, which cannot be saved as a Hugging Face model: load a "
            "plain copy with transformers, and merge into that"
        )
    if _type_of(hf_model) not in _LAYOUTS or not isinstance(hf_model, torch.nn.Module):
        raise ModelError(
            f"a {type(hf_model).__name__} of type {_type_of(hf_model)!r} cannot be merged into: known are "
            f"{', '.join(_LAYOUTS)}"
        )


def weight_view(hf_model: Any, matrix: Matrix) -> Float[Tensor, "in *out"]:
    """Return a matrix as a view of the weights of a model for which `require_known` passed.

    Architectures with fused layouts store several matrices in one weight; the view is of that part alone.

    Returns:
        ``[in, out]``, without gradients; or ``[in, heads, d_head]``, where the heads do not lie side by side.

    Raises:
        SelectionError: If the model lacks the matrix.
        ModelError: If its weights are quantized.
    """
    module = _module(hf_model, matrix)
    weight = module.weight.detach()
    if is_quantized(module.weight) or weight.ndim != 2:
        raise ModelError(f"the weights of {matrix} are quantized: load the model unquantized, and merge into that")
    rows = weight if type(module).__name__ == "Conv1D" else weight.t()  # of torch's Linear, the columns are the inputs
    return _part(rows, matrix.name, hf_model)


def bias_view(hf_model: Any, matrix: Matrix) -> Float[Tensor, "*out"] | None:
    """Return the bias behind a matrix as a view of the weights, as `weight_view` does; None if there is none.

    Raises:
        SelectionError: If the model lacks the matrix.
    """
    bias = getattr(_module(hf_model, matrix), "bias", None)
    return None if bias is None else _part(bias.detach()[None], matrix.name, hf_model)[0]


_NORMS = {"gpt2": "ln_1", "gpt_neox": "input_layernorm", "opt": "self_attn_layer_norm"}
"""The norm before attention, where it has a bias."""


def norm_bias(hf_model: Any, layer: int) -> Float[Tensor, "d_model"] | None:
    """Return the bias of the norm before attention; None if it has none."""
    name = _NORMS.get(_type_of(hf_model))
    bias = None if name is None else getattr(_blocks(hf_model)[layer].get_submodule(name), "bias", None)
    return None if bias is None else bias.detach()


_OPTIONS = {"W_O": ("attention_bias", ("W_Q", "W_K", "W_V", "W_O")), "W_out": ("mlp_bias", ("W_in", "W_gate", "W_out"))}
"""Where an architecture leaves it to its configuration: the option with which a matrix has a bias, and those that then have one."""


def require_bias(hf_model: Any, matrix: Matrix) -> None:
    """Refuse a matrix that has no bias, and cannot be given one by `add_biases`.

    Raises:
        ModelError: Saying what to do instead.
    """
    option = _OPTIONS.get(matrix.name, ("", ()))[0]
    if bias_view(hf_model, matrix) is None and not hasattr(hf_model.config, option):
        raise ModelError(
            f"a constant cannot be merged into {matrix}: a {type(hf_model).__name__} has no bias there, and no option to have "
            "one; ablate to zero instead"
        )


def add_biases(hf_model: Any, matrix: Matrix) -> None:
    """Give a matrix a bias, of zeros, if it has none: by the option of the configuration, and so in all layers."""
    if bias_view(hf_model, matrix) is not None:
        return
    option, names = _OPTIONS[matrix.name]
    for layer in range(len(_blocks(hf_model))):
        for name in names:
            module = _module(hf_model, Matrix(layer, name))
            if module.bias is None:
                zeros = module.weight.detach().new_zeros(module.weight.shape[0])
                module.bias = torch.nn.Parameter(zeros, requires_grad=module.weight.requires_grad)
    setattr(hf_model.config, option, True)


def _blocks(hf_model: Any) -> Any:
    return hf_model.base_model.get_submodule(_LAYOUTS[_type_of(hf_model)][0])


def _module(hf_model: Any, matrix: Matrix) -> Any:
    blocks, names = _blocks(hf_model), _LAYOUTS[_type_of(hf_model)][1]
    if not 0 <= matrix.layer < len(blocks) or matrix.name not in names:
        raise SelectionError(
            f"{matrix} is not in this model: it has {', '.join(names)} in layers 0 to {len(blocks) - 1}"
        )
    return blocks[matrix.layer].get_submodule(names[matrix.name])


def _part(rows: Float[Tensor, "in out"], name: str, hf_model: Any) -> Float[Tensor, "in *part"]:
    """Return the part of a module's weights, or of its bias as one row, that one matrix has, of those stored in it as one."""
    kind, config = _type_of(hf_model), hf_model.config
    if kind == "phi3" and name in ("W_gate", "W_in"):
        return rows.chunk(2, dim=1)[name == "W_in"]
    if kind not in ("gpt2", "gpt_neox", "phi3") or name not in ("W_Q", "W_K", "W_V"):
        return rows
    number, heads = "QKV".index(name[-1]), config.num_attention_heads
    if kind == "gpt2":  # all queries, then all keys, then all values
        return rows.chunk(3, dim=1)[number]
    if kind == "gpt_neox":  # query, key and value of each head in turn
        return rearrange(rows, "d_in (heads qkv d_head) -> qkv d_in heads d_head", heads=heads, qkv=3)[number]
    head = getattr(config, "head_dim", None) or config.hidden_size // heads  # Phi-3: fewer heads of keys and values
    sizes = [head * heads, head * config.num_key_value_heads, head * config.num_key_value_heads]
    return rows.split(sizes, dim=1)[number]
