"""Sites: where in a model neurons are (layer and kind), and the hook points that they are in one model.

Knows the names of TransformerLens' hook points and the shapes at them; knows nothing of weights, texts or statistics.

Facts relied on here, measured on TransformerLens 3.9 and 4.3: the names in `KINDS` resolve on `HookedTransformer` and on
`TransformerBridge`, raw or in compatibility mode; on the bridge several names may stand for one `HookPoint`; hook
points of mixture-of-experts layers exist but have the width of the residual stream, so those inside experts are our own
(`model.experts`), as are those of dictionary features (`model.feature_points`); `cfg.d_mlp` can be wrong (OPT); in hybrids (Jamba,
LFM2, ...) only some layers have attention or an MLP; in multi-head latent attention, q, k, v have heads before positions.
"""

import difflib
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lens_unlearn.core.errors import SiteError
from lens_unlearn.model.experts import EXPERT_KINDS, MOE_KINDS, expert_point, expert_points, experts_in, has_kind, top_k
from lens_unlearn.model.feature_points import FEATURES, attached, feature_point, feature_points
from lens_unlearn.model.hooks import Remover, attach, backbone, detach_all, one_thread
from lens_unlearn.model.host import Model, part_of, require_eval, require_model
from lens_unlearn.model.wrapped import plain_map, wrapped_point

__all__ = ["KINDS", "Point", "Site", "check_kind", "extra_points", "layers_with", "mlp_width", "parse_sites", "resolve"]

KINDS: dict[str, str] = {
    "mlp.pre": "mlp.hook_pre",
    "mlp.pre_linear": "mlp.hook_pre_linear",
    "mlp.post": "mlp.hook_post",
    "attn.q": "attn.hook_q",
    "attn.k": "attn.hook_k",
    "attn.v": "attn.hook_v",
    "attn.z": "attn.hook_z",
    "resid": "hook_resid_post",
    **{kind: kind for kind in MOE_KINDS},
    FEATURES: FEATURES,
}
"""The kinds of sites, and the TransformerLens name of each inside a block; those inside experts, and those of the features of an
attached dictionary, are not TransformerLens'."""

ALIASES = {tail: kind for kind, tail in KINDS.items()} | {"resid_post": "resid"}
"""TransformerLens' own names of the kinds, which are taken wherever a kind is."""
_SITE = re.compile(r"(?:L|blocks\.)(\d+)\.([a-z_.]+)")


class Site(NamedTuple):
    """A place in a model where neurons are: a layer and a kind. Prints as ``L3.mlp.post``.

    Examples:
        >>> Site(3, "mlp.post")
        L3.mlp.post
        >>> Site.parse("L3.mlp.post").layer
        3
        >>> Site.parse("blocks.3.mlp.hook_post")
        L3.mlp.post
    """

    layer: int
    kind: str

    def __repr__(self) -> str:
        return f"L{self.layer}.{self.kind}"

    __str__ = __repr__

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read what `repr` wrote, or the name of a hook point of TransformerLens.

        Raises:
            SiteError: If the text is not ``L<layer>.<kind>`` with a kind of `KINDS`, or ``blocks.<layer>.<name>`` with one of
                TransformerLens' names of these.
        """
        match = _SITE.fullmatch(text)
        if match is None:
            raise SiteError(f"{text!r} is not a site: write it as 'L3.mlp.post', with one of {', '.join(KINDS)}")
        return cls(int(match[1]), check_kind(match[2]))


@dataclass(frozen=True)
class Point:
    """A site of one model: its hook point, and what a probe forward pass measured there."""

    site: Site
    hook: Any
    shape: tuple[int, ...]
    """``(neurons,)``, or ``(heads, d_head)`` in attention. Neurons of routed experts are counted expert by expert."""
    dtype: torch.dtype
    device: torch.device
    experts: int = 0
    """How many experts a token may be routed to; 0 elsewhere."""
    top_k: int = 0
    """At a router, how many experts it chooses for each token; 0 elsewhere."""
    note: str = ""
    """What else is to be known of the neurons there."""

    @property
    def lies(self) -> tuple[int, ...]:
        """How the neurons lie: the shape, or ``(experts, columns)``."""
        return (self.experts, self.shape[0] // self.experts) if self.experts else self.shape


def check_kind(kind: str) -> str:
    """Return a kind of site, if it is one or TransformerLens' name of one (``mlp.hook_post``, ``resid_post``).

    Raises:
        SiteError: If there is no such kind; the message names the nearest ones.
    """
    if kind in KINDS:
        return kind
    if kind in ALIASES:
        return ALIASES[kind]
    near = difflib.get_close_matches(kind, KINDS, n=3, cutoff=0.3) or list(KINDS)
    raise SiteError(f"there is no site kind {kind!r}: did you mean {' or '.join(near)}?")


def parse_sites(
    sites: str | Site | Iterable[str | Site], n_layers: int, having: Callable[[str], Iterable[int]] | None = None
) -> list[Site]:
    """Expand kinds to every layer that has them, in the order given and without repeats.

    Args:
        sites: Kinds, sites, or both.
        n_layers: How many layers there are.
        having: The layers that have a kind; default all.

    Raises:
        SiteError: If a kind or a layer does not exist, or nothing was asked for.
    """
    given = [sites] if isinstance(sites, str | Site) else list(sites)
    unique: dict[Site, None] = {}  # as an ordered set
    for item in given:
        if isinstance(item, str) and not _SITE.fullmatch(item):
            kind = check_kind(item)
            unique |= {Site(layer, kind): None for layer in (having(kind) if having else range(n_layers))}
            continue
        site = Site.parse(item) if isinstance(item, str) else Site(item.layer, check_kind(item.kind))
        if not 0 <= site.layer < n_layers:
            raise SiteError(f"{site} is not in this model: its layers are 0 to {n_layers - 1}")
        unique[site] = None
    if not unique:
        raise SiteError(f"no sites were asked for: name at least one of {', '.join(KINDS)}")
    return list(unique)


def layers_with(model: Model, kind: str) -> list[int]:
    """Return the layers of a model that have a kind of site: in a hybrid, not all of them.

    Raises:
        SiteError: If no layer has it; the message says what the first layer is.
        ModelError: If this is no TransformerLens model.
    """
    require_model(model)
    return _layers_with(model, model.hook_dict, kind)


def _layers_with(model: Model, points: Mapping[str, Any], kind: str) -> list[int]:
    layers = range(int(model.cfg.n_layers))
    found = [layer for layer in layers if _has(model, points, Site(layer, check_kind(kind)))]
    if not found:
        others = f"; no other layer has {kind} either" if len(layers) > 1 else ""
        raise SiteError(_missing(model, points, Site(0, kind)) + others)
    return found


# Points already probed, per model. Weak references, so that a model can be freed; compared with the current hook points on each
# use, because compatibility mode and the split options of TransformerLens replace these.
_probed: "weakref.WeakKeyDictionary[Any, dict[Site, Point]]" = weakref.WeakKeyDictionary()


def resolve(model: Model, sites: str | Site | Iterable[str | Site]) -> dict[Site, Point]:
    """Find the hook points of sites, and verify each with one forward pass over two tokens.

    Args:
        model: A `TransformerBridge` or `HookedTransformer`, in evaluation mode.
        sites: Kinds (all layers that have them), sites, or both.

    Returns:
        One `Point` per site, in the order asked for.

    Raises:
        SiteError: If a site does not exist in this model (the message names those that do), does not fire exactly once, or has
            no neuron axis, as in mixture-of-experts layers.
        ModelError: If this is no TransformerLens model, it is in training mode, or another thread has an intervention on it, or
            measures it.
    """
    require_model(model)
    require_eval(model)
    with one_thread(model):
        points = model.hook_dict  # which a bridge makes anew each time it is asked for
        wanted = parse_sites(sites, int(model.cfg.n_layers), lambda kind: _layers_with(model, points, kind))
        hooks = {site: _hook_point(model, points, site) for site in wanted}
        known = _probed.setdefault(model, {})
        missing = [s for s in wanted if s not in known or known[s].hook is not hooks[s]]
        if missing:
            known.update(_probe(model, {site: hooks[site] for site in missing}))
        return {site: known[site] for site in wanted}


def _hook_point(model: Model, points: Mapping[str, Any], site: Site) -> Any:
    if not _has(model, points, site):
        raise SiteError(_missing(model, points, site))
    if site.kind in MOE_KINDS:
        return expert_point(model, site.layer, site.kind)
    if site.kind == FEATURES:
        return feature_point(model, points, site.layer)
    name = _name(points, site)
    return points[name] if name in points else wrapped_point(model, site.layer, site.kind)


def _name(points: Mapping[str, Any], site: Site) -> str:
    name = f"blocks.{site.layer}.{KINDS[site.kind]}"
    return name if name in points else name.replace(".mlp.", ".shared_mlp.")  # as in `part_of`


def extra_points(model: Model) -> list[Any]:
    """Return the hook points of a model that are not TransformerLens' and were asked for so far."""
    return [*expert_points(model), *feature_points(model)]


def _has(model: Model, points: Mapping[str, Any], site: Site) -> bool:
    if site.kind == FEATURES:
        return site.layer in attached(model)
    if site.kind in MOE_KINDS:
        # In Granite's hybrids the bridge shows the shared experts as the MLP.
        shown = site.kind == "shared.post" and mlp_width(model, site.layer) is not None
        return has_kind(model, site.layer, site.kind) and not shown
    neurons = not site.kind.startswith("mlp") or mlp_width(model, site.layer) is not None
    return (_name(points, site) in points and neurons) or plain_map(model, site.layer, site.kind) is not None


def _missing(model: Model, points: Mapping[str, Any], site: Site) -> str:
    """Say why a layer lacks a kind of site: what it is, and what it has."""
    if site.kind == FEATURES:
        return (
            f"{site} does not exist in this model: attach a dictionary of a hook point of layer {site.layer} first, as in "
            "lu.load_dictionary(FOLDER).attach(model)"
        )
    block = model.blocks[site.layer]
    has = ", ".join(kind for kind in KINDS if _has(model, points, Site(site.layer, kind))) or "no site"
    mlp = part_of(model, site.layer, "mlp")
    if site.kind.startswith("mlp") and mlp is not None and mlp_width(model, site.layer) is None:
        return (
            f"{site} has no neuron axis: layer {site.layer} has a {type(mlp).__name__}, without one output matrix "
            "(mixture-of-experts layers route each token to other neurons"
            + (": ask for experts.post)" if has_kind(model, site.layer, "experts.post") else ")")
        )
    if site.kind in MOE_KINDS and not hasattr(model, "original_model") and getattr(model.cfg, "num_experts", None):
        has += " (its experts are TransformerLens' own: load the model as a TransformerBridge)"
    elif (
        site.kind in MOE_KINDS
        and mlp is not None
        and mlp_width(model, site.layer) is None
        and not has_kind(model, site.layer, "experts.post")
    ):
        has += f" (its {type(_original(mlp)).__name__} computes experts outside transformers' table of implementations)"
    return f"{site} does not exist in this model: layer {site.layer} is a {type(_original(block)).__name__} with {has}"


def _original(component: Any) -> Any:
    """Return the module of the model itself that a bridge's component stands for."""
    return getattr(component, "original_component", None) or component


def mlp_width(model: Model, layer: int) -> int | None:
    """Return the number of neurons of a layer's MLP, from its output matrix; None if it does not have exactly one."""
    if (inside := plain_map(model, layer, "mlp.post")) is not None:
        return int(inside.in_features)  # type: ignore[arg-type]
    mlp: Any = part_of(model, layer, "mlp")
    out = _original(getattr(mlp, "out", None) or getattr(mlp, "dense_out", None))
    if isinstance(width := getattr(out, "in_features", None), int):  # weights may be packed, or elsewhere
        return width
    matrix = getattr(out, "weight", None) if type(out).__name__ == "Conv1D" else getattr(mlp, "W_out", None)
    return int(matrix.shape[0]) if isinstance(matrix, Tensor) and matrix.ndim == 2 else None


def _probe(model: Model, hooks: dict[Site, Any]) -> dict[Site, Point]:
    seen: dict[Site, list[Tensor]] = {site: [] for site in hooks}
    removers: list[Remover] = []
    heads = {getattr(model.cfg, name, None) for name in ("n_heads", "n_key_value_heads")}
    length = next(n for n in (2, 3, 4) if n not in heads)  # so that an axis of heads is not taken for one of positions
    try:
        try:
            for site, hook in hooks.items():
                attach(hook, lambda t, s=site: seen[s].append(t.detach()[:0]), removers, own_thread=True)
            with torch.no_grad():
                backbone(model, torch.zeros(1, length, dtype=torch.long))
        finally:
            detach_all(removers)
    finally:  # an interrupt can come just before the line above; otherwise the list is empty by now
        detach_all(removers)
    return {site: _check(model, site, hooks[site], tensors, length) for site, tensors in seen.items()}


def _check(model: Model, site: Site, hook: Any, tensors: list[Tensor], length: int) -> Point:
    if len(tensors) != 1:
        raise SiteError(f"{site} fired {len(tensors)} times in one forward pass: it cannot be used in this model")
    tensor = tensors[0]
    shape = tuple(tensor.shape[2:])
    if tensor.ndim > 2 and tensor.shape[1] != length:
        raise SiteError(f"{site} has no axis of positions behind that of texts in this model: it cannot be used")
    if site.kind == "attn.q" and getattr(model.cfg, "gated_q_proj", False):
        raise SiteError(f"{site} holds the gates of attention beside its queries in this model: it cannot be used")
    if len(shape) != (2 if site.kind.startswith("attn") else 1):
        raise SiteError(f"{site} has shape {tuple(tensor.shape)}: there is no neuron axis here")
    width = mlp_width(model, site.layer) if site.kind.startswith("mlp") else None
    if width is not None and shape != (width,):
        raise SiteError(f"{site} is {shape[0]} wide, but the layer has {width} neurons: it is not a neuron axis")
    return Point(site, hook, shape, tensor.dtype, tensor.device, **_of_experts(model, site))


def _of_experts(model: Model, site: Site) -> dict[str, Any]:
    """Return what a point says of routed experts in its layer."""
    experts: Any = experts_in(model, site.layer)
    if experts is None:
        return {}
    count = int(experts.num_experts)
    if site.kind in EXPERT_KINDS:
        return {"experts": count}
    if site.kind == "experts.router":
        return {"top_k": top_k(model, site.layer)}
    if site.kind.startswith("mlp"):
        note = f"the dense half of a layer that also routes tokens to {count} experts: their neurons are at {EXPERT_KINDS[-1]}"
        warnings.warn(f"{site.kind} is {note}", RuntimeWarning, stacklevel=5)
        return {"note": note}
    return {}
