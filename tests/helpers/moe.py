"""Tiny seeded random mixture-of-experts models of every family that TransformerLens bridges, built without a hub.

`CONFIGS` names them; `plain(name)` is a fresh Hugging Face model of two layers or so, to run or edit as an oracle, `bridge(name)`
is a TransformerBridge of the same weights. Four experts, two of them for each token (one in Llama 4), hidden size 32, and expert
width 24 (no other width is 24), so that an axis that was mistaken shows.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import tiny
import torch
import transformers

EXPERTS, WIDTH = 4, 24
_IDS = {"bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
_BASE: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    **_IDS,
}
_WIDE = {**_BASE, "intermediate_size": 40, "moe_intermediate_size": WIDTH}
_LOCAL = {**_BASE, "intermediate_size": WIDTH, "num_local_experts": EXPERTS}
_MLA: dict[str, Any] = {
    **_WIDE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}


def _config(name: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**settings)


CONFIGS: dict[str, tuple[str, Callable[[], Any]]] = {
    "mixtral": ("MixtralForCausalLM", _config("MixtralConfig", **_LOCAL)),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        _config("Qwen2MoeConfig", **_WIDE, num_experts=EXPERTS, shared_expert_intermediate_size=16),
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", _config("Qwen3MoeConfig", **_WIDE, head_dim=8, num_experts=EXPERTS)),
    "qwen3-next": (
        "Qwen3NextForCausalLM",
        _config(
            "Qwen3NextConfig", **_WIDE, **_LINEAR, head_dim=8, num_experts=EXPERTS, shared_expert_intermediate_size=16
        ),
    ),
    "qwen3.5-moe": (
        "Qwen3_5MoeForCausalLM",
        _config(
            "Qwen3_5MoeTextConfig",
            **_WIDE,
            **_LINEAR,
            head_dim=8,
            num_experts=EXPERTS,
            shared_expert_intermediate_size=16,
        ),
    ),
    "olmoe": (
        "OlmoeForCausalLM",
        _config("OlmoeConfig", **{**_BASE, "intermediate_size": WIDTH, "num_experts": EXPERTS}),
    ),
    "deepseek-v2": (
        "DeepseekV2ForCausalLM",
        _config("DeepseekV2Config", **_MLA, topk_method="group_limited_greedy"),
    ),
    "deepseek-v3": ("DeepseekV3ForCausalLM", _config("DeepseekV3Config", **_MLA)),
    "glm4-moe": (
        "Glm4MoeForCausalLM",
        _config(
            "Glm4MoeConfig",
            **_WIDE,
            head_dim=8,
            n_routed_experts=EXPERTS,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
        ),
    ),
    "glm4-moe-lite": (
        "Glm4MoeLiteForCausalLM",
        _config("Glm4MoeLiteConfig", **{**_MLA, "n_group": 1}, mlp_layer_types=["dense", "sparse"]),
    ),
    "gpt-oss": ("GptOssForCausalLM", _config("GptOssConfig", **_LOCAL, head_dim=8, sliding_window=8)),
    "phimoe": ("PhimoeForCausalLM", _config("PhimoeConfig", **_LOCAL)),
    "granite-moe": ("GraniteMoeForCausalLM", _config("GraniteMoeConfig", **_LOCAL)),
    "granite-moe-hybrid": (
        "GraniteMoeHybridForCausalLM",
        _config(
            "GraniteMoeHybridConfig",
            **_LOCAL,
            shared_intermediate_size=16,
            mamba_n_heads=4,
            layer_types=["attention", "attention"],
            position_embedding_type="rope",
        ),
    ),
    "llama4": (
        "Llama4ForCausalLM",
        _config(
            "Llama4TextConfig",
            **{**_LOCAL, "num_experts_per_tok": 1},
            intermediate_size_mlp=40,
            head_dim=8,
            moe_layers=[1],
        ),
    ),
    "gemma4": (
        "Gemma4ForCausalLM",
        _config(
            "Gemma4TextConfig",
            **{k: v for k, v in _WIDE.items() if k != "num_experts_per_tok"},
            head_dim=8,
            global_head_dim=8,
            sliding_window=8,
            enable_moe_block=True,
            num_experts=EXPERTS,
            top_k_experts=2,
            layer_types=["sliding_attention", "full_attention"],
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=tiny.VOCABULARY,
            num_kv_shared_layers=0,
        ),
    ),
    "jamba": (
        "JambaForCausalLM",
        _config(
            "JambaConfig",
            **{**_BASE, "intermediate_size": WIDTH, "num_experts": EXPERTS},
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=4,
            mamba_d_conv=2,
            mamba_expand=2,
            use_mamba_kernels=False,
        ),
    ),
    "minimax-m2": ("MiniMaxM2ForCausalLM", _config("MiniMaxM2Config", **_LOCAL, head_dim=8, rotary_dim=4)),
    "ernie4.5-moe": (
        "Ernie4_5_MoeForCausalLM",
        _config(
            "Ernie4_5_MoeConfig",
            **{k: v for k, v in _WIDE.items() if k != "num_experts_per_tok"},
            moe_num_experts=EXPERTS,
            moe_k=2,
            moe_num_shared_experts=1,
            moe_layer_start_index=1,
            moe_layer_end_index=1,
            moe_layer_interval=1,
        ),
    ),
    "afmoe": (
        "AfmoeForCausalLM",
        _config(
            "AfmoeConfig",
            **_WIDE,
            head_dim=8,
            num_experts=EXPERTS,
            num_shared_experts=1,
            num_dense_layers=1,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=8,
        ),
    ),
    "flex-olmo": (
        "FlexOlmoForCausalLM",
        _config("FlexOlmoConfig", **{**_BASE, "intermediate_size": WIDTH, "num_experts": EXPERTS}),
    ),
    "lfm2-moe": (
        "Lfm2MoeForCausalLM",
        _config(
            "Lfm2MoeConfig",
            **_WIDE,
            num_experts=EXPERTS,
            num_dense_layers=1,
            layer_types=["conv", "full_attention"],
        ),
    ),
    "laguna": ("LagunaForCausalLM", _config("LagunaConfig", **_WIDE, head_dim=8, num_experts=EXPERTS)),
    "nemotron-h": (
        "NemotronHForCausalLM",
        _config(
            "NemotronHConfig",
            **{**_WIDE, "num_hidden_layers": 3},
            head_dim=8,
            n_routed_experts=EXPERTS,
            n_shared_experts=1,
            moe_shared_expert_intermediate_size=16,
            n_group=1,
            topk_group=1,
            layers_block_type=["attention", "moe", "mlp"],
        ),
    ),
}
"""By name: the class of the model in transformers, and what makes its configuration."""
if tiny.HookedTransformer is not None:  # the bridge of TransformerLens 3.9 does not run these under transformers 5.23
    del CONFIGS["qwen3-next"], CONFIGS["qwen3.5-moe"]


@cache
def _made(name: str, seed: int) -> Any:
    kind, config = CONFIGS[name]
    with tiny.quiet(0):
        settings = config()
        settings._attn_implementation = "eager"
        model = getattr(transformers, kind)(settings).eval()
    model.config.architectures = [kind]
    tiny.randomize(model, seed)
    return model


def plain(name: str, seed: int = 0) -> Any:
    """Return a fresh plain model, never bridged."""
    return copy.deepcopy(_made(name, seed))


def bridge(name: str, seed: int = 0, tokenizer: Any = None, model: Any = None) -> Any:
    """Return the same as a fresh TransformerBridge; of another plain model, if one is given."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf = plain(name, seed) if model is None else model
    kind = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}.get(CONFIGS[name][0], CONFIGS[name][0])
    with tiny.quiet():
        made = build_bridge_from_module(hf, architecture=kind, hf_config=hf.config, tokenizer=tokenizer, device="cpu")
    made.eval()
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    return made


_bridges: dict[str, Any] = {}


def shared(name: str) -> Any:
    """Return a bridge that all tests share, which have to leave it as it was."""
    if name not in _bridges:
        _bridges[name] = bridge(name)
        with tiny.quiet(), torch.no_grad():
            _bridges[name](tiny.some_tokens())
    return _bridges[name]


def experts_of(model: Any) -> list[Any]:
    """List the modules of routed experts of a plain or bridged model, in order of layers."""
    inner = getattr(model, "original_model", model)
    found = [m for m in inner.modules() if m._parameters.get("down_proj") is not None]
    return list({id(m): m for m in found}.values())


# --- oracles: plain PyTorch, token by token ----------------------------------------------------------------------------


def zero_columns(model: Any, selection: list[torch.Tensor]) -> None:
    """Zero columns of the experts' down projections, in place: for each layer with experts a mask ``[experts, columns]``."""
    for module, chosen in zip(experts_of(model), selection, strict=True):
        inputs_first = module.down_proj.shape[1] == WIDTH
        with torch.no_grad():
            (module.down_proj if inputs_first else module.down_proj.transpose(1, 2))[chosen] = 0


def values(model: Any, tokens: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Run a plain model; for each layer with experts, return values ``[tokens, experts, columns]`` of each kind, and gates."""
    found: list[dict[str, torch.Tensor]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        found.append(_values(module, *args, *kwargs.values()))

    handles = [module.register_forward_pre_hook(look, with_kwargs=True) for module in experts_of(model)]
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _values(module: Any, hidden: torch.Tensor, index: Any = None, weights: Any = None) -> dict[str, torch.Tensor]:
    if index is None:  # Llama 4: every expert is given every token, times its gate
        hidden = hidden.view(EXPERTS, -1, hidden.shape[-1])
        number = hidden.shape[1]
    else:
        number = len(hidden)
    out = {kind: torch.zeros(number, EXPERTS, WIDTH).to(hidden) for kind in ("pre", "pre_linear", "post")}
    out["gate"] = torch.zeros(number, EXPERTS).to(hidden)
    for token in range(number):
        if index is None:
            routed = [(e, hidden[e, token], 1.0) for e in range(EXPERTS) if bool((hidden[e, token] != 0).any())]
        else:
            routed = [(int(e), hidden[token], weights[token, slot]) for slot, e in enumerate(index[token])]
        for e, x, gate in routed:
            matrix = (module.up_proj if hasattr(module, "up_proj") else module.gate_up_proj)[e]
            up = x @ matrix if matrix.shape[0] == len(x) and matrix.shape[1] != len(x) else matrix @ x
            if type(module).__name__ == "GptOssExperts":
                up = up + module.gate_up_proj_bias[e]
                pre, linear = up[::2], up[1::2]
                a, b = pre.clamp(max=module.limit), linear.clamp(-module.limit, module.limit)
                key = (b + 1) * a / (1 + torch.exp(-module.alpha * a))
            elif hasattr(module, "up_proj"):
                pre, linear, key = up, up * 0, module.act_fn(up)
            else:
                pre, linear = up[:WIDTH], up[WIDTH:]
                key = module.act_fn(pre) * linear
            out["pre"][token, e], out["pre_linear"][token, e] = pre, linear
            out["post"][token, e], out["gate"][token, e] = gate * key, gate
    return out
