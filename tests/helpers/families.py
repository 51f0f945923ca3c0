"""Tiny random models of decoder families, far more than `tiny` knows, and where plain PyTorch finds what in them.

A model has two layers (hybrids up to four) of width 16, and an MLP 24 wide, a width that nothing else in it has. Families of
routed experts are in `moe`.
"""

import copy
import tempfile
from dataclasses import dataclass
from functools import cache
from typing import Any

import moe
import tiny
import torch
import transformers
from torch import Tensor

from lens_unlearn.model.host import host_version

VOCABULARY = 96
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **_IDS,
}
_WIDE: dict[str, Any] = {**_BASE, "intermediate_size": 24}
_COMMON: dict[str, Any] = {**_WIDE, "num_key_value_heads": 2, "head_dim": 4}
_EIGHT = {"head_dim": 8}
_SLIDING: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, **_IDS,
}  # fmt: skip
_MAMBA: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, **_IDS}
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_expand": 2, "mamba_chunk_size": 8,
}  # fmt: skip
_DELTA: dict[str, Any] = {
    "linear_key_head_dim": 4, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_JAMBA: dict[str, Any] = {
    **_COMMON, "num_experts": 1, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
    "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How one family is made, and where its own modules hold what a site stands for."""

    name: str
    """The class of transformers."""
    config: dict[str, Any]
    blocks: str = "model.layers"
    post: str = "mlp.down_proj"
    """The module whose input is `mlp.post`."""
    z: str = "self_attn.o_proj"
    """The module whose input is `attn.z`."""
    layers: tuple[str, ...] = ("am", "am")
    """What TransformerLens shows of each layer: "a" for attention, "m" for an MLP of its own."""
    gated: bool = True
    neurons: int = 24
    d_head: int = 4
    lacks: tuple[str, ...] = ()
    """Kinds that cannot be used although the layers have attention, or an MLP."""
    bad_cache: bool = False
    """Whether it generates other tokens with a cache than without, or not at all, also without any intervention."""


def _gpt(name: str, config: dict[str, Any] | None = None, **other: Any) -> Family:
    given = {"blocks": "transformer.h", "post": "mlp.c_proj", "z": "attn.c_proj", "gated": False, **other}
    return Family(name, _GPT if config is None else config, **given)


def _llama(name: str, /, gated: bool = True, d_head: int = 4, lacks: tuple[str, ...] = (), **config: Any) -> Family:
    return Family(name, {**_COMMON, "head_dim": d_head, **config}, gated=gated, d_head=d_head, lacks=lacks)


_Q, _QKV = ("attn.q",), ("attn.q", "attn.k", "attn.v")
_WHOLE = (*_QKV, "mlp.pre")
"""What layers lack that TransformerLens wraps whole."""

DENSE: dict[str, Family] = {
    "gpt2": _gpt("GPT2LMHeadModel"),
    "gpt-neo": _gpt(
        "GPTNeoForCausalLM",
        {**_BASE, "num_layers": 2, "num_heads": 4, "intermediate_size": 24, "window_size": 8,
         "attention_types": [[["global", "local"], 1]]},
        z="attn.attention.out_proj",
    ),
    "gpt-neox": Family(
        "GPTNeoXForCausalLM", _WIDE, "gpt_neox.layers", "mlp.dense_4h_to_h", "attention.dense", gated=False
    ),
    "gpt-j": _gpt("GPTJForCausalLM", {**_GPT, "rotary_dim": 4}, post="mlp.fc_out", z="attn.out_proj"),
    "codegen": _gpt("CodeGenForCausalLM", {**_GPT, "rotary_dim": 4}, post="mlp.fc_out", z="attn.out_proj"),
    "gpt-bigcode": _gpt("GPTBigCodeForCausalLM", {**_GPT, "multi_query": True}),
    "openai-gpt": _gpt("OpenAIGPTLMHeadModel", neurons=64, lacks=("resid",)),
    "opt": Family(
        "OPTForCausalLM", {**_BASE, "ffn_dim": 24, "word_embed_proj_dim": 16}, "model.decoder.layers", "fc2",
        "self_attn.out_proj", gated=False,
    ),
    "xglm": Family(
        "XGLMForCausalLM",
        {**_BASE, "d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 4},
        post="fc2", z="self_attn.out_proj", gated=False,
    ),
    "bloom": Family(
        "BloomForCausalLM", {**_BASE, "n_layer": 2, "n_head": 4}, "transformer.h", "mlp.dense_4h_to_h",
        "self_attention.dense", gated=False, neurons=64,
    ),
    "falcon": Family(
        "FalconForCausalLM", {**_BASE, "ffn_hidden_size": 24, "new_decoder_architecture": False, "alibi": False},
        "transformer.h", "mlp.dense_4h_to_h", "self_attention.dense", gated=False,
    ),
    "mpt": Family(
        "MptForCausalLM",
        {"vocab_size": VOCABULARY, "d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, **_IDS},
        "transformer.blocks", "ffn.down_proj", "attn.out_proj", gated=False, neurons=64,
    ),
    "llama": _llama("LlamaForCausalLM"),
    "mistral": _llama("MistralForCausalLM", sliding_window=8),
    "ministral3": _llama("Ministral3ForCausalLM"),
    "gemma": _llama("GemmaForCausalLM", d_head=8),
    "gemma2": _llama("Gemma2ForCausalLM", d_head=8, **_SLIDING),
    "gemma3": _llama("Gemma3ForCausalLM", d_head=8, **_SLIDING),
    "gemma4": _llama(
        "Gemma4ForCausalLM", d_head=8, global_head_dim=8, num_kv_shared_layers=0, hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCABULARY, **_SLIDING,
    ),
    "vaultgemma": _llama("VaultGemmaForCausalLM", d_head=8, **_SLIDING),
    "phi": Family("PhiForCausalLM", _COMMON, post="mlp.fc2", z="self_attn.dense", gated=False),
    "phi3": _llama("Phi3ForCausalLM"),
    "qwen2": _llama("Qwen2ForCausalLM"),
    "qwen3": _llama("Qwen3ForCausalLM"),
    "olmo": _llama("OlmoForCausalLM"),
    "olmo2": _llama("Olmo2ForCausalLM"),
    "olmo3": _llama("Olmo3ForCausalLM", **_SLIDING),
    "glm": _llama("GlmForCausalLM"),
    "glm4": _llama("Glm4ForCausalLM"),
    "cohere": _llama("CohereForCausalLM"),
    "cohere2": _llama("Cohere2ForCausalLM", **_SLIDING),
    "granite": _llama("GraniteForCausalLM", logits_scaling=2.0, residual_multiplier=0.5),
    "stablelm": _llama("StableLmForCausalLM", partial_rotary_factor=0.5),
    "starcoder2": Family("Starcoder2ForCausalLM", _COMMON, post="mlp.c_proj", gated=False),
    "smollm3": _llama("SmolLM3ForCausalLM", no_rope_layers=[1, 0]),
    "nemotron": _llama("NemotronForCausalLM", gated=False),
    "arcee": _llama("ArceeForCausalLM", gated=False),
    "apertus": _llama("ApertusForCausalLM", gated=False),
    "exaone4": _llama("Exaone4ForCausalLM", sliding_window_pattern="LG", **_SLIDING),
    "ernie4.5": _llama("Ernie4_5ForCausalLM"),
    "seed-oss": _llama("SeedOssForCausalLM"),
    "hunyuan": _llama("HunYuanDenseV1ForCausalLM"),
    "jais2": _llama("Jais2ForCausalLM", gated=False),
    "bitnet": _llama("BitNetForCausalLM"),
    "nanochat": Family("NanoChatForCausalLM", _COMMON, post="mlp.fc2", gated=False),
    "youtu": _llama(
        "YoutuForCausalLM", num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=4, lacks=_QKV,
    ),
    "modernbert-decoder": Family(
        "ModernBertDecoderForCausalLM", {**_WIDE, "local_attention": 8, "cls_token_id": 0, "sep_token_id": 1},
        post="mlp.Wo", z="attn.Wo", gated=False, lacks=("mlp.pre",),
    ),
}  # fmt: skip
"""Every layer has attention and an MLP."""

HYBRID: dict[str, Family] = {
    "falcon-h1": Family(
        "FalconH1ForCausalLM", {**_COMMON, **_MAMBA2, "mamba_d_ssm": 32}, post="feed_forward.down_proj"
    ),
    "jamba": Family("JambaForCausalLM", _JAMBA, post="feed_forward.down_proj", layers=("m", "am")),
    "jamba-moe": Family(
        "JambaForCausalLM", {**_JAMBA, "num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2},
        post="feed_forward.down_proj", layers=("m", "a", "m", "a"),
    ),
    "bamba": Family(
        "BambaForCausalLM", {**_COMMON, **_MAMBA2, "attn_layer_indices": [1]}, post="feed_forward.down_proj",
        layers=("m", "am"), bad_cache=True,
    ),
    "granite-hybrid": Family(
        "GraniteMoeHybridForCausalLM",
        {**_COMMON, **_MAMBA2, "layer_types": ["mamba", "attention"], "num_local_experts": 0, "num_experts_per_tok": 0,
         "shared_intermediate_size": 24, "position_embedding_type": "rope"},
        post="shared_mlp.output_linear", layers=("m", "am"),
    ),
    "lfm2": Family(
        "Lfm2ForCausalLM",
        {**_COMMON, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "block_ff_dim": 24},
        post="feed_forward.w2", z="self_attn.out_proj", layers=("m", "am"),
    ),
    "lfm2-moe": Family(
        "Lfm2MoeForCausalLM",
        {**_COMMON, "layer_types": ["conv", "full_attention"], "moe_intermediate_size": 8, "num_experts": 4,
         "num_experts_per_tok": 2, "num_dense_layers": 1},
        post="feed_forward.w2", z="self_attn.out_proj", layers=("m", "a"),
    ),
    "olmo-hybrid": Family(
        "OlmoHybridForCausalLM", {**_COMMON, **_DELTA}, layers=("m", "am"), bad_cache=True
    ),
    "qwen3.5": Family("Qwen3_5ForCausalLM", {**_COMMON, **_DELTA}, layers=("m", "am"), lacks=_Q),
    "qwen3-next": Family(
        "Qwen3NextForCausalLM",
        {**_COMMON, **_DELTA, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12, "num_experts": 4,
         "num_experts_per_tok": 2},
        layers=("", "a"), lacks=_Q,
    ),
    "nemotron-h": Family(
        "NemotronHForCausalLM",
        {**_COMMON, "num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 4,
         "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 4, "chunk_size": 8},
        post="mixer.down_proj", z="mixer.o_proj", layers=("", "a", "m"), gated=False, lacks=_WHOLE,
    ),
    "zamba2": Family(
        "Zamba2ForCausalLM",
        {**_WIDE, "num_hidden_layers": 3, "mamba_d_state": 4, "mamba_headdim": 8, "n_mamba_heads": 4, "mamba_ngroups": 1,
         "chunk_size": 8, "hybrid_layer_ids": [1], "layers_block_type": ["mamba", "hybrid", "mamba"], "num_mem_blocks": 1,
         "num_key_value_heads": 4, "attention_head_dim": 8, "use_shared_mlp_adapter": False, "adapter_rank": 4},
        post="shared_transformer.feed_forward.down_proj", z="shared_transformer.self_attn.o_proj", layers=("", "am", ""),
        gated=False, d_head=8, lacks=_WHOLE,
    ),
    "recurrent-gemma": Family(
        "RecurrentGemmaForCausalLM",
        {**_COMMON, **_EIGHT, "num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 8},
        post="mlp_block.down_proj", z="temporal_block.o_proj", layers=("m", "m", "am"), gated=False, neurons=12, d_head=8,
        lacks=_WHOLE,
    ),
    "mamba": Family("MambaForCausalLM", _MAMBA, "backbone.layers", layers=("", "")),
    "mamba2": Family(
        "Mamba2ForCausalLM", {**_MAMBA, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "expand": 2},
        "backbone.layers", layers=("", ""),
    ),
    "falcon-mamba": Family("FalconMambaForCausalLM", _MAMBA, "backbone.layers", layers=("", "")),
    "rwkv": Family(
        "RwkvForCausalLM",
        {**_BASE, "attention_hidden_size": 16, "intermediate_size": 24, "context_length": 64}, "rwkv.blocks",
        layers=("", ""),
    ),
}  # fmt: skip
"""Some layers lack attention or an MLP, or TransformerLens shows neither of any."""

FAMILIES = {**DENSE, **HYBRID}
EXPERTS = [name for name in moe.CONFIGS if name not in FAMILIES and name != "jamba"]
"""The names in `moe` of those that are not above already."""


WRONG_IN_3 = {
    **dict.fromkeys(("cohere", "cohere2", "hunyuan"), "logits"),
    "mpt": "generation",
    **dict.fromkeys(("qwen3.5", "qwen3-next", "qwen3.5-moe"), "any"),
}
"""What TransformerLens 3.9 gets wrong of a family (with this transformers), whatever is done with it."""


def usable(name: str) -> bool:
    """Whether the installed TransformerLens knows a family, and gets it right."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    kind = FAMILIES[name].name if name in FAMILIES else moe.CONFIGS[name][0]
    return kind in SUPPORTED_ARCHITECTURES and not (host_version().startswith("3.") and name in WRONG_IN_3)


@cache
def _plain(name: str) -> Any:
    family = FAMILIES[name]
    kind = getattr(transformers, family.name)
    with tiny.quiet(0):
        config = kind.config_class(**copy.deepcopy(family.config))
        config._attn_implementation = "eager"
        config.architectures = [family.name]
        model = kind(config).eval()
    tiny.randomize(model)
    return model


def plain(name: str) -> Any:
    """Return the plain model: a fresh copy, to run, to edit, or to bridge."""
    return copy.deepcopy(_plain(name))


@cache
def _tokenizer() -> Any:
    with tempfile.TemporaryDirectory() as folder, tiny.quiet():
        tiny.save_tokenizer(folder)
        return tiny.load_tokenizer(folder)


def bridge(name: str, model: Any = None) -> Any:
    """Bridge a plain model (which changes it); default a fresh one, also of `EXPERTS`.

    Its tokenizer, without which some cannot generate, has more tokens than the model: it is there for the special ones.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    if name in EXPERTS:
        made = moe.bridge(name, model=model)
        made.tokenizer = _tokenizer()
        return made
    model = plain(name) if model is None else model
    with tiny.quiet():
        made = build_bridge_from_module(
            model, architecture=FAMILIES[name].name, hf_config=model.config, tokenizer=None, device="cpu"
        )
    made.eval()
    made.tokenizer = _tokenizer()
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    return made


def tokens(rows: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    """Return random tokens, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
