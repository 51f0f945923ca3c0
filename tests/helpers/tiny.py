"""Tiny seeded random models, corpora and a tokenizer, built without a hub, and oracles that use plain PyTorch only.

Every model has two layers of width 32, biases and norm gains that are not trivial, and is in evaluation mode. `hugging_face` gives
the plain model, `bridge` the same weights as a TransformerBridge, `compat` the same in compatibility mode, `native` a model
built by TransformerLens alone, and `hooked` a HookedTransformer where the installed TransformerLens still has one.
"""

import contextlib
import copy
import hashlib
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
import transformers
from torch import Tensor

from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.model.sites import Site, extra_points

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:
    HookedTransformer = HookedTransformerConfig = None

VOCABULARY = 320
CONTEXT = 64
LAYERS = 2
BOS, EOS, PAD = 0, 1, 2
_IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    **_IDS,
}
_GATED = {**_COMMON, "intermediate_size": 64, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Architecture:
    """How one Hugging Face architecture is made, and where its own modules hold what a site stands for."""

    name: str
    config: Callable[[], Any]
    blocks: str
    """Path of the list of blocks."""
    pre: str
    post: str
    """The module whose input is `mlp.post`: the output projection."""
    z: str
    """The module whose input is `attn.z`: the attention's output projection."""
    pre_linear: str | None = None
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    fused: str = ""
    """How query, key and value lie in a single projection: "thirds", "per head", "ranges"."""
    heads: int = 4
    kv_heads: int = 4
    d_head: int = 8
    neurons: int = 64

    @property
    def gated(self) -> bool:
        return self.pre_linear is not None


def _llama_like(name: str, config: Callable[[], Any], **other: Any) -> Architecture:
    paths = {"pre": "mlp.gate_proj", "pre_linear": "mlp.up_proj", "post": "mlp.down_proj", "z": "self_attn.o_proj"}
    return Architecture(name, config, "model.layers", **{**paths, "kv_heads": 2, **other})


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=32, n_layer=LAYERS, n_head=4, n_inner=64, **_IDS
        ),
        "transformer.h",
        pre="mlp.c_fc",
        post="mlp.c_proj",
        z="attn.c_proj",
        qkv=("attn.c_attn",),
        fused="thirds",
    ),
    "neox": Architecture(
        "GPTNeoXForCausalLM",
        lambda: transformers.GPTNeoXConfig(**_COMMON, intermediate_size=64, rotary_pct=0.5),
        "gpt_neox.layers",
        pre="mlp.dense_h_to_4h",
        post="mlp.dense_4h_to_h",
        z="attention.dense",
        qkv=("attention.query_key_value",),
        fused="per head",
    ),
    "opt": Architecture(
        "OPTForCausalLM",
        lambda: transformers.OPTConfig(**_COMMON, ffn_dim=64, word_embed_proj_dim=32),
        "model.decoder.layers",
        pre="fc1",
        post="fc2",
        z="self_attn.out_proj",
    ),
    "llama": _llama_like("LlamaForCausalLM", lambda: transformers.LlamaConfig(**_GATED)),
    "gemma2": _llama_like(
        "Gemma2ForCausalLM",
        lambda: transformers.Gemma2Config(**_GATED, head_dim=16, sliding_window=8),
        d_head=16,
    ),
    "gemma3": _llama_like(
        "Gemma3ForCausalLM",
        lambda: transformers.Gemma3TextConfig(
            **_GATED, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        ),
        d_head=16,
    ),
    "qwen2": _llama_like("Qwen2ForCausalLM", lambda: transformers.Qwen2Config(**_GATED)),
    "qwen3": _llama_like("Qwen3ForCausalLM", lambda: transformers.Qwen3Config(**_GATED, head_dim=8)),
    "phi3": _llama_like(
        "Phi3ForCausalLM",
        lambda: transformers.Phi3Config(**_GATED),
        pre="mlp.gate_up_proj",
        pre_linear="mlp.gate_up_proj",
        qkv=("self_attn.qkv_proj",),
        fused="ranges",
    ),
    "mixtral": _llama_like("MixtralForCausalLM", lambda: transformers.MixtralConfig(**_GATED, num_local_experts=4)),
}
DENSE = [name for name in ARCHITECTURES if name != "mixtral"]
FOLDED = ["gpt2", "neox", "opt"]
"""The architectures with value biases that compatibility mode folds away."""
NATIVE = ["native-gpt2", "native-llama", "native-neox"]
HOOKED = [] if HookedTransformer is None else ["hooked-gpt2", "hooked-llama", "hooked-folded"]
_ROTARY: dict[str, Any] = {"positional_embedding_type": "rotary", "rotary_dim": 8, "rotary_adjacent_pairs": False}
_GATED_RMS: dict[str, Any] = {
    **_ROTARY,
    "normalization_type": "RMS",
    "final_rms": True,
    "eps": 1e-6,
    "act_fn": "silu",
    "gated_mlp": True,
    "n_key_value_heads": 2,
}
_CONVERTIBLE: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "neox": {**_ROTARY, "rotary_dim": 4, "parallel_attn_mlp": True, "act_fn": "gelu"},
    "opt": {"act_fn": "relu"},
    "llama": _GATED_RMS,
    "qwen2": _GATED_RMS,
    "qwen3": {**_GATED_RMS, "use_qk_norm": True},
    "phi3": {**_GATED_RMS, "eps": 1e-5},
}
"""The architectures whose weights `HookedTransformer` converts, and what its configuration then needs."""
CONVERTED = [] if HookedTransformer is None else [f"converted-{name}" for name in _CONVERTIBLE]
PROCESSED = [*[(name, f"{name}-compat") for name in FOLDED], *([("hooked-gpt2", "hooked-folded")] if HOOKED else [])]
"""A model, and the same one after TransformerLens folded its value biases away."""
ALL = [*DENSE, *[f"{name}-compat" for name in FOLDED], *NATIVE, *HOOKED]
"""Every model that neurons can be looked at in."""
SPEAKING = [*DENSE, *[f"{name}-compat" for name in FOLDED], *HOOKED]
"""Those that can have a tokenizer."""

# --- models ----------------------------------------------------------------------------------------------------------

used: set[str] = set()
"""Names of the models that the present test has asked for; `conftest` looks whether it left them as they were."""


@contextlib.contextmanager
def quiet(seed: int | None = None) -> Iterator[None]:
    """Build something without a trace in the global random state, and without the warnings of other libraries."""
    state = random.getstate()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        if seed is not None:
            torch.manual_seed(seed)
        yield
    random.setstate(state)


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter values at which a lost bias, gain or row would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
            parameter.copy_(noise * 0.2 if parameter.ndim > 1 else parameter + noise * 0.2)


@cache
def _plain(name: str, seed: int) -> Any:
    architecture = ARCHITECTURES[name]
    with quiet(0):
        config = architecture.config()
        config._attn_implementation = "eager"
        model = getattr(transformers, architecture.name)(config).eval()
    randomize(model, seed)
    return model


def hugging_face(name: str, seed: int = 0) -> Any:
    """Return the plain model: a fresh copy, never bridged, to run or edit as an oracle."""
    return copy.deepcopy(_plain(name, seed))


def to_bridge(model: Any, name: str, tokenizer: Any = None) -> Any:
    """Bridge a plain model (which changes it)."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    with quiet():
        made = build_bridge_from_module(
            model,
            architecture=ARCHITECTURES[name].name,
            hf_config=model.config,
            tokenizer=tokenizer,
            device="cpu",
        )
    made.eval()
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    return made


def build(name: str, seed: int = 0, tokenizer: Any = None) -> Any:
    """Build a fresh model by its name in `ALL`, or "mixtral"."""
    if name.startswith("native-"):
        return _native(name.removeprefix("native-"), seed)
    if name.startswith("hooked-"):
        return _hooked(name.removeprefix("hooked-"), seed)
    if name.startswith("converted-"):
        return _converted(name.removeprefix("converted-"), seed)
    made = to_bridge(hugging_face(name.removesuffix("-compat"), seed), name.removesuffix("-compat"), tokenizer)
    if name.endswith("-compat"):
        with quiet(), contextlib.redirect_stdout(None):
            made.enable_compatibility_mode()
        made.eval()
    return made


def _settings(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "d_model": 32,
        "d_head": 8,
        "n_heads": 4,
        "n_layers": LAYERS,
        "n_ctx": CONTEXT,
        "d_vocab": VOCABULARY,
        "d_mlp": 64,
        "act_fn": "gelu_new",
        "normalization_type": "LN",
        "device": "cpu",
    }
    if name == "llama":
        rotary = {"positional_embedding_type": "rotary", "rotary_dim": 8, "n_key_value_heads": 2}
        return {**settings, "act_fn": "silu", "normalization_type": "RMS", "gated_mlp": True, **rotary}
    if name == "neox":
        return {**settings, "parallel_attn_mlp": True, "positional_embedding_type": "rotary", "rotary_dim": 4}
    return settings


def _native(name: str, seed: int) -> Any:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    with quiet(0):
        made = TransformerBridge.boot_native(TransformerBridgeConfig(**_settings(name), seed=0)).eval()
    randomize(made, seed)
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    return made


def _hooked(name: str, seed: int) -> Any:
    assert HookedTransformer is not None
    settings = _settings("gpt2" if name == "folded" else name)
    with quiet(0), tempfile.TemporaryDirectory() as folder:
        made = HookedTransformer(HookedTransformerConfig(**settings, seed=0)).eval()
        save_tokenizer(folder)  # without one, its cached generation loses count of positions
        made.set_tokenizer(load_tokenizer(folder), default_padding_side="right")
    randomize(made, seed)
    if name == "folded":
        with quiet():
            made.load_and_process_state_dict({key: value.clone() for key, value in made.state_dict().items()})
            made.eval()
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    return made


def _converted(name: str, seed: int) -> Any:
    """Load the weights of a plain model into a HookedTransformer, as its `from_pretrained` does, but without a hub."""
    import transformer_lens.pretrained.weight_conversions as conversions

    assert HookedTransformer is not None
    own = {**_settings("gpt2"), **_CONVERTIBLE[name]}
    unprocessed = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    with quiet(0), tempfile.TemporaryDirectory() as folder:
        config = HookedTransformerConfig(**own, seed=0)
        made = HookedTransformer(config)
        state = getattr(conversions, f"convert_{name}_weights")(_plain(name, seed), config)
        state = {key: value.detach().clone() for key, value in state.items()}
        made.load_and_process_state_dict(state, **dict.fromkeys(unprocessed, False))
        save_tokenizer(folder)
        made.set_tokenizer(load_tokenizer(folder), default_padding_side="right")
    made.eval()
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    return made


_shared: dict[str, Any] = {}
_found: dict[str, tuple[str, list[Any]]] = {}


def model(name: str) -> Any:
    """Return a model by its name in `ALL`, or "mixtral"; it is shared by all tests, which have to leave it as it was."""
    if name not in _shared:
        _shared[name] = build(name)
        share(name, build(name))
    used.add(name)
    return _shared[name]


def share(name: str, made: Any) -> None:
    """Put a model among the shared ones, and remember its state."""
    with (
        quiet(),
        torch.no_grad(),
    ):  # what a model sets up for itself at its first forward and cache is not a test's doing
        made(some_tokens())
        made.run_with_cache(some_tokens())
    _shared[name] = made
    _found[name] = (weights_hash(made), hooks_of(made))


def speaking(name: str) -> Any:
    """Return a shared model that has a tokenizer, by its name in `SPEAKING`."""
    if name.startswith("hooked-"):
        return model(name)
    key = f"speaking {name}"
    if key not in _shared:
        with tempfile.TemporaryDirectory() as folder, quiet():
            save_tokenizer(folder)
            share(key, build(name, tokenizer=load_tokenizer(folder)))
    used.add(key)
    return _shared[key]


def left_behind(name: str) -> str:
    """Say what differs in a shared model from how it was built; empty where nothing does."""
    digest, hooks = _found[name]
    now = _shared[name]
    found = []
    if hooks_of(now) != hooks:
        found.append("hooks")
    if weights_hash(now) != digest:
        found.append("parameters")
    if now.training:
        found.append("training mode")
    if found and name.removeprefix("speaking ") in ALL:  # the next test shall not pay for it
        del _shared[name], _found[name]
    return ", ".join(found)


def hooks_of(made: torch.nn.Module) -> list[Any]:
    """List every hook of every module, in order: PyTorch's and TransformerLens' own books."""
    found: list[Any] = []
    for path, module in made.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            found += [(path, kind, id(function)) for function in getattr(module, kind).values()]
        for kind in ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"):
            found += [(path, kind, key) for key in getattr(module, kind)]
        for kind in ("fwd_hooks", "bwd_hooks"):
            found += [(path, kind, id(handle)) for handle in getattr(module, kind, [])]
    for point in extra_points(made):  # inside experts, and how these are computed
        found += [
            ("experts", point.name, id(function)) for function in (*point._forward_hooks.values(), *point.fwd_hooks)
        ]
    ways = [getattr(getattr(m, "config", None), "_experts_implementation", None) for m in made.modules()]
    return found + [("experts", "way", way) for way in ways if str(way).startswith("lens_unlearn")]


def weights_hash(made: torch.nn.Module) -> str:
    """Digest every parameter and buffer, with its name."""
    digest = hashlib.sha256()
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tensor.requires_grad}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- inputs ----------------------------------------------------------------------------------------------------------


def some_tokens(rows: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    """Return random tokens, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(made: Any, tokens: Tensor | None = None) -> Tensor:
    """Run a TransformerLens or a plain model, and return a copy of its logits."""
    tokens = some_tokens() if tokens is None else tokens
    with torch.no_grad():
        out = made(tokens)
    return (out if isinstance(out, Tensor) else out.logits).clone()


def corpus(
    lengths: Sequence[int] = (9, 3, 14, 5, 6, 11),
    *,
    seed: int = 0,
    bos: bool = True,
    name: str = "tiny",
    uncounted: float = 0.0,
    tokens: Sequence[int] | None = None,
) -> Corpus:
    """Make a corpus of random tokens: one document per length, where BOS and a random share of the rest do not count."""
    draw = np.random.default_rng(seed)
    rows, masks = [], []
    for length in lengths:
        row = draw.choice(tokens, length) if tokens is not None else draw.integers(3, VOCABULARY, length)
        mask = draw.random(length) >= uncounted
        rows.append(np.concatenate([[BOS], row]) if bos else row)
        masks.append(np.concatenate([[False], mask]) if bos else mask)
    sizes = torch.tensor([len(row) for row in rows])
    return Corpus(
        name=name,
        tokens=torch.tensor(np.concatenate(rows), dtype=torch.int32),
        counted=torch.tensor(np.concatenate(masks)),
        starts=torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]),
        document=torch.arange(len(rows)),
        keys=tuple(f"{seed}-{number}" for number in range(len(rows))),
        window=CONTEXT,
        prepend_bos=bos,
        vocabulary="",
    )


# --- oracles: plain PyTorch on a Hugging Face model's own modules -----------------------------------------------------


def _at(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


def block(plain: Any, name: str, layer: int) -> Any:
    """Return one block of a plain model."""
    return _at(plain, ARCHITECTURES[name].blocks)[layer]


def site_value(name: str, kind: str, inputs: Tensor, output: Any, tokens: Tensor) -> Tensor:
    """Turn the input and output of the module behind a site into the site's value, ``[rows, pos, *neurons]``."""
    a = ARCHITECTURES[name]
    n, p = tokens.shape
    if kind == "resid":
        return (output[0] if isinstance(output, tuple) else output).reshape(n, p, -1)
    if kind == "mlp.post":
        return inputs.reshape(n, p, -1)
    if kind == "attn.z":
        return inputs.reshape(n, p, a.heads, a.d_head)
    out = output.reshape(n, p, -1)
    if kind.startswith("mlp"):
        if a.pre == a.pre_linear:  # gate and up in one projection
            return out.chunk(2, dim=-1)[kind == "mlp.pre_linear"]
        return out
    which = "qkv".index(kind[-1])
    heads = a.heads if which == 0 else a.kv_heads
    if a.fused == "thirds":
        out = out.chunk(3, dim=-1)[which]
    elif a.fused == "per head":
        out = out.reshape(n, p, a.heads, 3, a.d_head)[:, :, :, which]
    elif a.fused == "ranges":
        out = out.split([a.heads * a.d_head, a.kv_heads * a.d_head, a.kv_heads * a.d_head], dim=-1)[which]
    return out.reshape(n, p, heads, a.d_head)


def module_of(plain: Any, name: str, site: Site) -> Any:
    """Return the plain module whose input or output a site is."""
    a = ARCHITECTURES[name]
    here = block(plain, name, site.layer)
    if site.kind == "resid":
        return here
    paths = {"mlp.pre": a.pre, "mlp.pre_linear": a.pre_linear, "mlp.post": a.post, "attn.z": a.z}
    path = paths[site.kind] if site.kind in paths else a.qkv[0 if a.fused else "qkv".index(site.kind[-1])]
    assert path is not None
    return _at(here, path)


def kinds_of(name: str) -> list[str]:
    """Name the kinds of site that an architecture has."""
    kinds = ["mlp.pre", "mlp.post", "attn.q", "attn.k", "attn.v", "attn.z", "resid"]
    return [*kinds, "mlp.pre_linear"] if ARCHITECTURES[name].gated else kinds


def plain_activations(plain: Any, name: str, kinds: Sequence[str], tokens: Tensor) -> dict[Site, Tensor]:
    """Run a plain model under plain PyTorch hooks, and return every site's values."""
    seen: dict[Site, Tensor] = {}
    handles = []
    for site in [Site(layer, kind) for kind in kinds for layer in range(LAYERS)]:

        def watch(_: Any, args: Any, kwargs: Any, output: Any, site: Site = site) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            seen[site] = site_value(name, site.kind, given, output, tokens).detach().clone()

        handles.append(module_of(plain, name, site).register_forward_hook(watch, with_kwargs=True))
    try:
        with torch.no_grad():
            plain(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def output_rows(module: Any) -> Tensor:
    """Return an output projection as ``[inputs, outputs]``, a view of the weights."""
    weight = module.weight
    return weight if type(module).__name__ == "Conv1D" else weight.t()


def zero_rows(plain: Any, name: str, site: Site, selected: Tensor) -> None:
    """Edit a plain model: the rows of the output projection behind `mlp.post` or `attn.z` become zero."""
    with torch.no_grad():
        output_rows(module_of(plain, name, site))[selected.reshape(-1)] = 0


def add_constant(plain: Any, name: str, site: Site, selected: Tensor, value: Tensor) -> None:
    """Edit a plain model: what constant values at the selected neurons would write goes into the output bias."""
    module = module_of(plain, name, site)
    rows = output_rows(module).double()
    shift = (torch.where(selected, value.double(), 0.0).reshape(-1) @ rows).to(module.weight.dtype)
    with torch.no_grad():
        if module.bias is None:
            module.bias = torch.nn.Parameter(shift)
        else:
            module.bias.add_(shift)
    zero_rows(plain, name, site, selected)


MATRICES = ["W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out"]


def matrices_of(name: str) -> list[str]:
    """Name the weight matrices that a layer of an architecture has."""
    gated = ARCHITECTURES[name].gated if name in ARCHITECTURES else "llama" in name
    return [matrix for matrix in MATRICES if gated or matrix != "W_gate"]


def weight_of(plain: Any, name: str, layer: int, matrix: str) -> Any:
    """Return the parameter of a plain model that holds a matrix, alone or with others."""
    kinds = {"W_O": "attn.z", "W_out": "mlp.post", "W_gate": "mlp.pre"}
    kinds |= {"W_in": "mlp.pre_linear" if ARCHITECTURES[name].gated else "mlp.pre"}
    return module_of(plain, name, Site(layer, kinds.get(matrix, f"attn.{matrix[-1].lower()}"))).weight


def matrix_in(weight: Tensor, name: str, matrix: str) -> Tensor:
    """Return where a matrix lies in its parameter, or in that one's gradient: a view ``[in, *out]``."""
    a = ARCHITECTURES[name]
    rows = weight if name == "gpt2" else weight.t()
    if matrix in ("W_gate", "W_in") and a.pre == a.pre_linear:
        return rows[:, : a.neurons] if matrix == "W_gate" else rows[:, a.neurons :]
    if matrix not in ("W_Q", "W_K", "W_V") or not a.fused:
        return rows
    which = "QKV".index(matrix[-1])
    if a.fused == "per head":
        return rows.unflatten(1, (a.heads, 3, a.d_head))[:, :, which]
    widths = [a.heads * a.d_head, a.kv_heads * a.d_head, a.kv_heads * a.d_head]
    return rows.split(widths, dim=1)[which]


def matrix_in_place(made: Any, layer: int, matrix: str, *, gradient: bool = False) -> Tensor:
    """Return a matrix of a TransformerLens model, or its gradient: a view ``[in, *out]`` of what it computes with."""
    block = made.blocks[layer]
    part = block.attn if matrix in ("W_Q", "W_K", "W_V", "W_O") else block.mlp
    if hasattr(made, "original_model"):
        names = dict(zip(MATRICES, ("q", "k", "v", "o", "in", "gate", "out"), strict=True))
        linear = getattr(part, names[matrix]).original_component
        weight = linear.weight.grad if gradient else linear.weight
        return weight if type(linear).__name__ == "Conv1D" else weight.t()
    weight = getattr(part, f"_{matrix}" if f"_{matrix}" in part._parameters else matrix)  # grouped heads
    weight = weight.grad if gradient else weight
    return weight.transpose(0, 1) if matrix in ("W_Q", "W_K", "W_V") else weight.flatten(0, -2)


def edit_out(made: Any, site: Site, selected: Tensor) -> None:
    """Edit a native or Hooked model built for it: zero rows of W_out, or of W_O."""
    inner = made.blocks[site.layer]
    matrix = inner.mlp.W_out if site.kind == "mlp.post" else inner.attn.W_O
    with torch.no_grad():
        matrix[selected] = 0
    again = inner.mlp.W_out if site.kind == "mlp.post" else inner.attn.W_O
    assert not bool(again[selected].any()), "the oracle's edit did not reach the weights"


# --- tokenizer and a model on disk -----------------------------------------------------------------------------------

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "the quick brown fox jumps over the lazy dog",
    "a small village stood beside the slow green river",
    "for i in range(10):\n    print(i * i)\n",
    "question and answer, prompt and reply: who wrote the book?",
    "1 + 2 = 3, 4 + 5 = 9, and 10 - 7 = 3",
]


def save_tokenizer(folder: str) -> None:
    """Train a byte-level tokenizer of `VOCABULARY` entries that adds BOS, and save it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)


def load_tokenizer(folder: str) -> Any:
    """Load what `save_tokenizer` saved (TransformerLens needs a tokenizer that came from disk)."""
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def save_model(folder: str, name: str = "gpt2") -> None:
    """Save a plain model with its tokenizer, as a Hugging Face directory."""
    hugging_face(name).save_pretrained(folder)
    save_tokenizer(folder)
