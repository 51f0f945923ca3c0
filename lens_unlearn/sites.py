"""Hook points: the only module that knows TransformerLens by name.

A `Site` says *where* in a model (layer and kind). `resolve` turns sites into the hook points of one model, after a
probe forward has shown that each of them fires once and has a neuron axis. `attach` adds one hook and returns the one
callable that removes exactly that hook. `backbone` runs a model without its unembedding.

Facts relied on here, measured on TransformerLens 3.9 and 4.3: the names below resolve on `HookedTransformer` and on
`TransformerBridge`, raw or in compatibility mode; on the bridge several names may stand for one `HookPoint`; hook
points of mixture-of-experts layers exist but carry the residual width; `cfg.d_mlp` can be wrong (OPT).
"""

import difflib
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from lens_unlearn.errors import LensUnlearnError, ModelError, SiteError

__all__ = ["KINDS", "Point", "Site", "attach", "backbone", "boot", "processing", "require_eval", "resolve"]

Model = Any
"""A `TransformerBridge` or a `HookedTransformer`: whatever has `hook_dict`, `cfg`, and can be called on tokens."""

KINDS: dict[str, str] = {
    "mlp.pre": "mlp.hook_pre",
    "mlp.pre_linear": "mlp.hook_pre_linear",
    "mlp.post": "mlp.hook_post",
    "attn.q": "attn.hook_q",
    "attn.k": "attn.hook_k",
    "attn.v": "attn.hook_v",
    "attn.z": "attn.hook_z",
    "resid": "hook_resid_post",
}
"""What a site can be, and the TransformerLens name of it inside a block."""

_SITE = re.compile(r"L(\d+)\.([a-z_.]+)")


class Site(NamedTuple):
    """A place in a model that has neurons: a layer and a kind. Prints as ``L3.mlp.post``.

    Example:
        >>> Site(3, "mlp.post")
        L3.mlp.post
        >>> Site.parse("L3.mlp.post").layer
        3
    """

    layer: int
    kind: str

    def __repr__(self) -> str:
        return f"L{self.layer}.{self.kind}"

    __str__ = __repr__

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read what `repr` wrote.

        Raises:
            SiteError: If the text is not ``L<layer>.<kind>`` with a kind of `KINDS`.
        """
        match = _SITE.fullmatch(text)
        if match is None:
            raise SiteError(f"{text!r} is not a site: write it as 'L3.mlp.post', with one of {', '.join(KINDS)}")
        return cls(int(match[1]), check_kind(match[2]))


@dataclass(frozen=True)
class Point:
    """A site of one model, as the probe forward found it."""

    site: Site
    hook: Any
    shape: tuple[int, ...]
    """``(neurons,)``, or ``(heads, d_head)`` in attention."""
    dtype: torch.dtype
    device: torch.device


def check_kind(kind: str) -> str:
    """Return a kind that exists.

    Raises:
        SiteError: Otherwise, naming the nearest kinds.
    """
    if kind in KINDS:
        return kind
    near = difflib.get_close_matches(kind, KINDS, n=3, cutoff=0.3) or list(KINDS)
    raise SiteError(f"there is no site kind {kind!r}: did you mean {' or '.join(near)}?")


def parse_sites(sites: str | Site | Iterable[str | Site], n_layers: int) -> list[Site]:
    """Expand kinds to every layer; keep the order given, without repeats.

    Raises:
        SiteError: If a kind or a layer does not exist, or nothing was asked for.
    """
    given = [sites] if isinstance(sites, str | Site) else list(sites)
    found: dict[Site, None] = {}
    for item in given:
        if isinstance(item, str) and not _SITE.fullmatch(item):
            found |= {Site(layer, check_kind(item)): None for layer in range(n_layers)}
            continue
        site = Site.parse(item) if isinstance(item, str) else Site(item.layer, check_kind(item.kind))
        if not 0 <= site.layer < n_layers:
            raise SiteError(f"{site} is not in this model: its layers are 0 to {n_layers - 1}")
        found[site] = None
    if not found:
        raise SiteError(f"no sites were asked for: name at least one of {', '.join(KINDS)}")
    return list(found)


# The probe's findings per model. Weak, so that a model can be freed; checked against the live hook points on each use,
# because compatibility mode and the split options of TransformerLens replace them.
_probed: "weakref.WeakKeyDictionary[Any, dict[Site, Point]]" = weakref.WeakKeyDictionary()


def resolve(model: Model, sites: str | Site | Iterable[str | Site]) -> dict[Site, Point]:
    """Find the hook points of sites and prove, with one forward over two tokens, that each is what it should be.

    Args:
        model: A `TransformerBridge` or `HookedTransformer`, in evaluation mode.
        sites: Kinds (all layers), sites, or both.

    Returns:
        One `Point` per site, in the order asked for.

    Raises:
        SiteError: If a site does not exist here (naming those that do), does not fire exactly once, or has no neuron
            axis, as in mixture-of-experts layers.
        ModelError: If this is no TransformerLens model, or it is in training mode.
    """
    require_model(model)
    require_eval(model)
    wanted = parse_sites(sites, int(model.cfg.n_layers))
    hooks = {site: _hook_point(model, site) for site in wanted}
    known = _probed.setdefault(model, {})
    missing = [s for s in wanted if s not in known or known[s].hook is not hooks[s]]
    if missing:
        known.update(_probe(model, {site: hooks[site] for site in missing}))
    return {site: known[site] for site in wanted}


def require_model(model: Model) -> None:
    """Refuse what is not a TransformerLens model.

    Raises:
        ModelError: If the object has no hook points.
    """
    if not (hasattr(model, "hook_dict") and hasattr(model, "cfg")):
        raise ModelError(
            f"a {type(model).__name__} has no hook points: pass a TransformerBridge or a HookedTransformer, "
            "or a name or directory to lens_unlearn.load_model"
        )


def require_eval(model: Model) -> None:
    """Refuse a model in training mode, where dropout would make every number random.

    Raises:
        ModelError: Naming the first module in training mode.
    """
    if model.training:
        raise ModelError("the model is in training mode: call model.eval() first")
    for name, module in model.named_modules():
        if module.training and "dropout" in type(module).__name__.lower():
            raise ModelError(f"{name} is in training mode: call model.eval() first")


def _hook_point(model: Model, site: Site) -> Any:
    name = f"blocks.{site.layer}.{KINDS[site.kind]}"
    if site.kind.startswith("mlp") and mlp_width(model, site.layer) is None:
        mlp = type(getattr(model.blocks[site.layer], "mlp", None)).__name__
        raise SiteError(
            f"{site} has no neuron axis: layer {site.layer} has a {mlp}, without one output matrix "
            "(mixture-of-experts layers route each token to other neurons, and are not supported)"
        )
    try:
        return model.hook_dict[name]
    except KeyError:
        prefix = f"blocks.{site.layer}."
        here = [kind for kind, tail in KINDS.items() if prefix + tail in model.hook_dict]
        raise SiteError(f"{site} does not exist in this model: layer {site.layer} has {', '.join(here)}") from None


def mlp_width(model: Model, layer: int) -> int | None:
    """Count the neurons of a layer's MLP from its output matrix; None where it has no single one."""
    matrix = getattr(getattr(model.blocks[layer], "mlp", None), "W_out", None)
    return int(matrix.shape[0]) if isinstance(matrix, Tensor) and matrix.ndim == 2 else None


def _probe(model: Model, hooks: dict[Site, Any]) -> dict[Site, Point]:
    seen: dict[Site, list[Tensor]] = {site: [] for site in hooks}
    detach: list[Callable[[], bool]] = []
    try:
        for site, hook in hooks.items():
            detach.append(attach(hook, lambda t, s=site: seen[s].append(t.detach()[:0])))
        with torch.no_grad():
            backbone(model, torch.zeros(1, 2, dtype=torch.long))
    finally:
        for remove in detach:
            remove()
    return {site: _check(model, site, hooks[site], tensors) for site, tensors in seen.items()}


def _check(model: Model, site: Site, hook: Any, tensors: list[Tensor]) -> Point:
    if len(tensors) != 1:
        raise SiteError(f"{site} fired {len(tensors)} times in one forward pass: it cannot be used in this model")
    tensor = tensors[0]
    shape = tuple(tensor.shape[2:])
    if len(shape) != (2 if site.kind.startswith("attn") else 1):
        raise SiteError(f"{site} has shape {tuple(tensor.shape)}: there is no neuron axis at that place")
    width = mlp_width(model, site.layer) if site.kind.startswith("mlp") else None
    if width is not None and shape != (width,):
        raise SiteError(f"{site} is {shape[0]} wide, but the layer has {width} neurons: it is not a neuron axis")
    return Point(site, hook, shape, tensor.dtype, tensor.device)


def attach(hook: Any, function: Callable[[Tensor], Tensor | None]) -> Callable[[], bool]:
    """Add one forward hook through a hook point.

    It is registered as permanent, so that a user's `reset_hooks()` does not take it away.

    Returns:
        A callable that removes this hook and no other; it returns False if the hook was already gone.
    """

    def run(tensor: Tensor, hook: Any) -> Tensor | None:
        return function(tensor)

    before, known = len(hook.fwd_hooks), set(hook._forward_hooks)
    try:
        hook.add_hook(run, is_permanent=True)
    except BaseException:  # interrupted between registering and returning
        for handle in hook.fwd_hooks[before:]:
            _remove(hook, handle)
        for key in set(hook._forward_hooks) - known:  # or before TransformerLens noted it
            del hook._forward_hooks[key]
        raise
    handle = hook.fwd_hooks[-1]
    if len(hook.fwd_hooks) != before + 1:  # pragma: no cover - a TransformerLens that keeps hooks elsewhere
        raise SiteError("this TransformerLens does not keep its hooks in HookPoint.fwd_hooks: install >=3.9,<5")
    return lambda: _remove(hook, handle)


def _remove(hook: Any, handle: Any) -> bool:
    handle.hook.remove()
    for index, other in enumerate(hook.fwd_hooks):
        if other is handle:  # by identity: handles compare equal by value
            del hook.fwd_hooks[index]
            return True
    return False


def detach_all(removers: Sequence[Callable[[], bool]]) -> None:
    """Remove hooks, last added first, and say so if somebody else had removed one meanwhile."""
    there: list[bool] = []
    with ExitStack() as stack:  # one that fails does not keep the others
        for remove in removers:
            stack.callback(lambda r=remove: there.append(r()))
    if not all(there):
        warnings.warn(
            "hooks of this intervention were removed inside its block (reset_hooks(including_permanent=True)?): "
            "from then on it did not act",
            RuntimeWarning,
            stacklevel=4,
        )


def on_forward(model: Model, function: Callable[[Tensor | None, int], None]) -> Callable[[], bool]:
    """Call a function at the beginning of every forward pass, with its token ids and how many positions are cached.

    The ids are None where a pass begins with embeddings.

    Returns:
        A callable that ends this; it returns False if the hooks were already gone.
    """
    seen: list[Tensor] = []
    last: list[Tensor] = []

    def embed(module: Any, args: Any, kwargs: Any) -> None:
        ids = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and not t.is_floating_point()]
        seen[:] = ids[:1]

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        given = (*args, *kwargs.values())
        ids = seen.pop() if seen else None
        x = next((t for t in given if isinstance(t, Tensor) and t.is_floating_point() and t.ndim == 3), None)
        if ids is not None and x is not None and x.shape[:2] != ids.shape:
            # HookedTransformer generates without a cache by embedding the new token, and running all embeddings.
            ids = torch.cat([*last, ids], dim=1) if last and len(last[0]) == len(ids) else ids
            ids = ids if ids.shape == x.shape[:2] else None
        last[:] = [] if ids is None else [ids]
        function(ids, max(map(_cached, given), default=0))

    places = [(model.embed, embed), (model.blocks[0], begin)]

    def remove() -> bool:
        there = [_unhook(module, "_forward_pre_hooks", hook) for module, hook in places]
        return all(there)

    try:
        for module, hook in places:
            module.register_forward_pre_hook(hook, with_kwargs=True)
    except BaseException:  # interrupted between registering and returning
        remove()
        raise
    return remove


def _unhook(module: Any, kind: str, function: Callable[..., Any]) -> bool:
    """Take a function out of a module's hooks of a kind, by identity; return False if it was gone."""
    hooks = getattr(module, kind)
    found = [key for key, other in hooks.items() if other is function]
    for key in found:
        del hooks[key]
        getattr(module, f"{kind}_with_kwargs").pop(key, None)
    return bool(found)


def _cached(value: Any) -> int:
    """Count the positions in what may be a key-value cache, of transformers or of `HookedTransformer`."""
    if hasattr(value, "get_seq_length"):
        return int(value.get_seq_length())
    return int(value.past_keys.shape[1]) if hasattr(value, "past_keys") else 0


def on_logits(model: Model, function: Callable[[Tensor], Tensor]) -> Callable[[], bool]:
    """Pass the logits of every forward through a function.

    Returns:
        A callable that ends this; it returns False if the hook was already gone.
    """
    module = model.unembed

    def run(module: Any, args: Any, logits: Tensor) -> Tensor:
        return function(logits)

    run.function = function  # type: ignore[attr-defined]
    try:
        module.register_forward_hook(run)
    except BaseException:
        _unhook(module, "_forward_hooks", run)
        raise
    return lambda: _unhook(module, "_forward_hooks", run)


def logit_functions(model: Model) -> list[Callable[[Tensor], Tensor]]:
    """Return the functions that `on_logits` has put on a model, in the order in which they act."""
    hooks = getattr(getattr(model, "unembed", None), "_forward_hooks", {})
    return [hook.function for hook in hooks.values() if hasattr(hook, "function")]


def device_of(model: Model) -> torch.device:
    """Return where a model takes its tokens."""
    return next(iter(model.parameters())).device


def backbone(model: Model, tokens: Int[Tensor, "batch pos"]) -> None:
    """Run every block on right-padded tokens, without the unembedding: hooks fire with the values of a full forward.

    No attention mask is passed: attention is causal and padding stands on the right, so no counted position sees it.
    """
    tokens = tokens.to(device_of(model))
    inner = getattr(model, "original_model", None)
    base = getattr(inner, "base_model", None)
    if base is not None and base is not inner:
        base(input_ids=tokens, use_cache=False)
    elif inner is not None:
        model(tokens, return_type=None)
    else:
        model(tokens, return_type=None, stop_at_layer=int(model.cfg.n_layers))


def processing(model: Model) -> str:
    """Name how TransformerLens holds the weights: it decides what `attn.z` is, so artefacts record it."""
    if hasattr(model, "original_model"):
        return "bridge, compatibility mode" if getattr(model, "compatibility_mode", False) else "bridge"
    return "hooked transformer"


def boot(source: str, *, device: str, dtype: torch.dtype) -> Model:
    """Load a model by hub name or directory as a raw `TransformerBridge`.

    Raises:
        LensUnlearnError: If the installed TransformerLens has no bridge.
    """
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:  # pragma: no cover - depends on the installed version
        raise LensUnlearnError(
            "TransformerLens 3.9 or later is needed: pip install 'transformer-lens>=3.9,<5'"
        ) from error
    return TransformerBridge.boot_transformers(source, device=device, dtype=dtype)


def host_version() -> str:
    """Return the version of the installed TransformerLens."""
    from importlib.metadata import version

    return version("transformer-lens")
