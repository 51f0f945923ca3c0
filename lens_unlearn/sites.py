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
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_unlearn.errors import ModelError, SiteError

__all__ = [
    "KINDS",
    "MATRICES",
    "Matrix",
    "Point",
    "Site",
    "attach",
    "backbone",
    "boot",
    "matrix_shape",
    "matrix_value",
    "on_matrix",
    "processing",
    "require_eval",
    "resolve",
]

Model = Any
"""A `TransformerBridge` or a `HookedTransformer`: whatever has `hook_dict`, `cfg`, and can be called on tokens."""

Remover = Callable[[], bool]
"""Takes off what was added, and nothing else; False if it was gone already. It may be interrupted, and called again."""

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

    Examples:
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
        ModelError: If this is no TransformerLens model, it is in training mode, or another thread has an intervention on it, or
            measures it.
    """
    require_model(model)
    require_eval(model)
    wanted = parse_sites(sites, int(model.cfg.n_layers))
    with one_thread(model):
        hooks = {site: _hook_point(model, site) for site in wanted}
        known = _probed.setdefault(model, {})
        missing = [s for s in wanted if s not in known or known[s].hook is not hooks[s]]
        if missing:
            known.update(_probe(model, {site: hooks[site] for site in missing}))
        return {site: known[site] for site in wanted}


def require_model(model: Model) -> None:
    """Refuse what is not a TransformerLens model.

    Raises:
        ModelError: If the object has no hook points, or the installed TransformerLens is not one of those supported.
    """
    require_host()
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


def require_float(model: Model) -> None:
    """Refuse a quantized model, through whose weights no gradient flows.

    Raises:
        ModelError: Saying so.
    """
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        raise ModelError("this model is quantized: no gradient flows through its weights; load it unquantized")


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
    mlp: Any = getattr(model.blocks[layer], "mlp", None)
    try:
        matrix = getattr(mlp, "W_out", None)
    except NotImplementedError:  # its values are on a disk; which way round it is stored differs
        found = [p.shape for p in mlp.out.parameters() if p.ndim == 2]
        return sum(found[0]) - int(model.cfg.d_model) if len(found) == 1 else None
    return int(matrix.shape[0]) if isinstance(matrix, Tensor) and matrix.ndim == 2 else None


def _probe(model: Model, hooks: dict[Site, Any]) -> dict[Site, Point]:
    seen: dict[Site, list[Tensor]] = {site: [] for site in hooks}
    removers: list[Remover] = []
    try:
        try:
            for site, hook in hooks.items():
                attach(hook, lambda t, s=site: seen[s].append(t.detach()[:0]), removers, own_thread=True)
            with torch.no_grad():
                backbone(model, torch.zeros(1, 2, dtype=torch.long))
        finally:
            detach_all(removers)
    finally:  # an interrupt may come in front of the line above; where all went well, nothing is left here
        detach_all(removers)
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


def attach(
    hook: Any,
    function: Callable[[Tensor], Tensor | None],
    removers: list[Remover] | None = None,
    *,
    own_thread: bool = False,
) -> Remover:
    """Add one forward hook through a hook point.

    It is registered as permanent, so that a user's `reset_hooks()` does not take it away.

    Args:
        hook: The hook point.
        function: Takes its tensor; returns a new one, or None.
        removers: A list that gets what removes this hook, before the hook is added: so there is no moment at which an
            interrupt finds a hook that nobody knows of.
        own_thread: Whether to act only on forward passes of the thread that attaches.

    Returns:
        A callable that removes this hook and no other; it returns False if the hook was already gone.
    """
    thread, added = threading.get_ident(), False

    def run(tensor: Tensor, hook: Any) -> Tensor | None:
        return None if own_thread and threading.get_ident() != thread else function(tensor)

    def remove() -> bool:
        # By identity, in whatever book it is by now; PyTorch's, by which it is found again, comes last.
        found = [key for key, other in hook._forward_hooks.items() if _closes_over(other, run)]
        hook.fwd_hooks[:] = [handle for handle in hook.fwd_hooks if handle.user_hook is not run]
        for key in found:
            hook._forward_hooks.pop(key, None)
        return bool(found) or not added

    if removers is not None:
        removers.append(remove)
    try:
        hook.add_hook(run, is_permanent=True)
        if not any(handle.user_hook is run for handle in hook.fwd_hooks):  # pragma: no cover - kept elsewhere
            raise SiteError("this TransformerLens does not keep its hooks in HookPoint.fwd_hooks: install >=3.9,<5")
        added = True
    except BaseException:
        remove()
        raise
    return remove


def _closes_over(function: Any, value: Any) -> bool:
    """Whether a function is a closure over a value, as what TransformerLens wraps around a hook is over that hook."""
    return any(cell.cell_contents is value for cell in getattr(function, "__closure__", None) or ())


def detach_all(removers: list[Remover]) -> None:
    """Remove hooks, last added first, empty the list, and say so if somebody else had removed one meanwhile.

    One that raises or is interrupted is tried once more, and does not keep the others.
    """
    there: list[bool] = []
    try:
        while removers:
            there.append(removers[-1]())
            removers.pop()
    except BaseException:
        while removers:
            with suppress(Exception):
                removers.pop()()
        raise
    if not all(there):
        warnings.warn(
            "hooks of this intervention were removed inside its block (reset_hooks(including_permanent=True)?): "
            "from then on it did not act",
            RuntimeWarning,
            stacklevel=4,
        )


class _Use:
    """That a thread is inside `one_thread`."""

    def __init__(self, joining: bool) -> None:
        self.thread, self.joining = threading.current_thread(), joining


# Weak in both: a model can be freed, and a use that nobody could end is over when its frame is. No lock: an interrupt could
# come between taking it and noting that, and then no thread would ever get it again.
_uses: "weakref.WeakKeyDictionary[Any, list[weakref.ref[_Use]]]" = weakref.WeakKeyDictionary()


@contextmanager
def one_thread(model: Model, *, joining: bool = False) -> Iterator[None]:
    """Keep a model from being changed or measured by another thread, for the length of a `with` block.

    Hooks are global to a model: what one thread attaches acts in the forward passes of all. Blocks of one thread nest.

    Args:
        model: The model.
        joining: Whether to enter also where another thread is inside (one that does not join itself), and take part in what
            it attached: for passes that must not be changed on their way.

    Raises:
        ModelError: If another thread is inside such a block for this model.
    """
    require_model(model)
    use = _Use(joining)
    mine, uses = weakref.ref(use), _uses.setdefault(model, [])
    try:
        uses.append(mine)  # first said, then looked: of two that come at once both may be refused, but never none
        other = _elsewhere(uses, use)
        if other is not None:
            raise ModelError(
                f"thread {other!r} has an intervention on this model, or measures it, which would mix with what thread "
                f"{use.thread.name!r} begins here: let it end first, or give each thread a model of its own"
            )
        yield
    finally:
        while mine in uses:
            uses.remove(mine)


def _elsewhere(uses: "list[weakref.ref[_Use]]", own: _Use) -> str | None:
    """Name another thread that is inside, in the way of a use."""
    known = [use for one in tuple(uses) if (use := one()) is not None and (use.joining or not own.joining)]
    return next((use.thread.name for use in known if use.thread is not own.thread and use.thread.is_alive()), None)


def on_forward(
    model: Model, function: Callable[[Tensor | None, int], None], removers: list[Remover] | None = None
) -> Remover:
    """Call a function at the beginning of every forward pass, with its token ids and how many positions are cached.

    The ids are None where a pass begins with embeddings.

    Args:
        model: The model.
        function: What to call.
        removers: As in `attach`.

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

    before = "_forward_pre_hooks"
    return _register([(model.embed, before, embed), (model.blocks[0], before, begin)], removers)


def _register(
    places: Sequence[tuple[Any, str, Callable[..., Any]]], removers: list[Remover] | None, *, with_kwargs: bool = True
) -> Remover:
    """Add PyTorch's hooks to modules: where, of which kind ("_forward_hooks" or "_forward_pre_hooks"), and what."""
    added = False

    def remove() -> bool:
        there = [_unhook(*place) for place in places]
        return all(there) or not added

    if removers is not None:
        removers.append(remove)
    try:
        for module, kind, hook in places:
            add = module.register_forward_hook if kind == "_forward_hooks" else module.register_forward_pre_hook
            add(hook, with_kwargs=with_kwargs)
        added = True
    except BaseException:
        remove()
        raise
    return remove


def _unhook(module: Any, kind: str, function: Callable[..., Any]) -> bool:
    """Take a function out of a module's hooks of a kind, by identity; return False if it was gone."""
    hooks = getattr(module, kind)
    found = [key for key, other in hooks.items() if other is function]
    for key in found:
        getattr(module, f"{kind}_with_kwargs").pop(key, None)
        hooks.pop(key, None)  # last: by this it is found again after an interrupt
    return bool(found)


def _cached(value: Any) -> int:
    """Count the positions in what may be a key-value cache, of transformers or of `HookedTransformer`."""
    if hasattr(value, "get_seq_length"):
        return int(value.get_seq_length())
    return int(value.past_keys.shape[1]) if hasattr(value, "past_keys") else 0


def on_logits(model: Model, function: Callable[[Tensor], Tensor], removers: list[Remover] | None = None) -> Remover:
    """Pass the logits of every forward through a function.

    Args:
        model: The model.
        function: Takes the logits; returns new ones.
        removers: As in `attach`.

    Returns:
        A callable that ends this; it returns False if the hook was already gone.
    """

    def run(module: Any, args: Any, logits: Tensor) -> Tensor:
        return function(logits)

    run.function = function  # type: ignore[attr-defined]
    return _register([(model.unembed, "_forward_hooks", run)], removers, with_kwargs=False)


def logit_functions(model: Model) -> list[Callable[[Tensor], Tensor]]:
    """Return the functions that `on_logits` has put on a model, in the order in which they act."""
    hooks = getattr(getattr(model, "unembed", None), "_forward_hooks", {})
    return [hook.function for hook in hooks.values() if hasattr(hook, "function")]


def device_of(model: Model) -> torch.device:
    """Return where a model takes its tokens."""
    first = next(iter(model.parameters())).device
    if first.type != "meta":
        return first
    # Weights on a disk: the device is the one that accelerate fetches them to.
    hooks = [module.__dict__.get("_hf_hook") for module in model.modules()]
    devices = [getattr(hook, "execution_device", None) for hook in hooks if hook is not None]
    return torch.device(next((device for device in devices if device not in (None, "meta", "disk")), "cpu"))


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


def boot(source: str, *, dtype: torch.dtype, **placed: Any) -> Model:
    """Load a model by hub name or directory as a raw `TransformerBridge`.

    Raises:
        ModelError: If the installed TransformerLens is not one of those supported.
    """
    require_host()
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(source, dtype=dtype, **placed)


def host_version() -> str:
    """Return the version of the installed TransformerLens."""
    from importlib.metadata import version

    return version("transformer-lens")


@cache
def require_host() -> None:
    """Refuse versions of TransformerLens whose hook points nobody has looked at.

    Raises:
        ModelError: Saying what to install.
    """
    numbers = re.match(r"(\d+)\.(\d+)", host_version())
    if not numbers or not (3, 9) <= (int(numbers[1]), int(numbers[2])) < (5, 0):
        raise ModelError(
            f"transformer-lens {host_version()} is not supported: run pip install 'transformer-lens>=3.9,<5' "
            "and start Python again"
        )


# --- weight matrices, as linear maps that are computed somewhere ---------------------------------------------------------

MATRICES: dict[str, tuple[str, str, str]] = {
    "W_Q": ("attn", "q", "hook_q"),
    "W_K": ("attn", "k", "hook_k"),
    "W_V": ("attn", "v", "hook_v"),
    "W_O": ("attn", "o", "hook_z"),
    "W_in": ("mlp", "in", "hook_pre"),
    "W_gate": ("mlp", "gate", "hook_pre"),
    "W_out": ("mlp", "out", "hook_post"),
}
"""The matrices of a block: the part they are in; the bridge's module of each; the hook point at its output, or for
W_O and W_out at its input. Beside a gate, the output of W_in is at `hook_pre_linear`."""

_MATRIX = re.compile(r"L(\d+)\.(W_[A-Za-z]+)")


class Matrix(NamedTuple):
    """A weight matrix of a model, as a map ``[in, out]``: a layer and a name of `MATRICES`. Prints as ``L3.W_out``."""

    layer: int
    name: str

    def __repr__(self) -> str:
        return f"L{self.layer}.{self.name}"

    __str__ = __repr__

    @classmethod
    def parse(cls, text: str) -> "Matrix":
        """Read what `repr` wrote.

        Raises:
            SiteError: If the text is not ``L<layer>.<name>`` with a name of `MATRICES`.
        """
        match = _MATRIX.fullmatch(text)
        if match is None:
            raise SiteError(f"{text!r} is not a matrix: write it as 'L3.W_out', with one of {', '.join(MATRICES)}")
        return cls(int(match[1]), check_matrix(match[2]))


def check_matrix(name: str) -> str:
    """Return the name of a matrix that exists.

    Raises:
        SiteError: Otherwise, naming all.
    """
    if name in MATRICES:
        return name
    raise SiteError(f"there is no matrix {name!r}: choose from {', '.join(MATRICES)}")


LinearFunction = Callable[[Tensor, Tensor], Tensor]
"""Takes the input and the output of a linear map, ``[*batch, in]`` and ``[*batch, out]``; returns a new output."""

_shapes: "weakref.WeakKeyDictionary[Any, dict[Matrix, tuple[Any, tuple[int, int]]]]" = weakref.WeakKeyDictionary()


def matrix_shape(model: Model, layer: int, name: str) -> tuple[int, int]:
    """Return the shape ``[in, out]`` of a matrix; heads lie side by side.

    Raises:
        SiteError: If the model does not have it, or does not compute with it as one linear map.
    """
    return matrix_shapes(model, [Matrix(layer, name)])[Matrix(layer, name)]


def matrix_shapes(model: Model, matrices: Iterable[Matrix]) -> dict[Matrix, tuple[int, int]]:
    """Find matrices and prove, with one forward over two tokens, that each is one linear map that is used once.

    Returns:
        The shape ``[in, out]`` of each: as the map is seen to act, however the weights are stored.

    Raises:
        SiteError: If one does not exist here, or is not used once in a forward pass.
        ModelError: If this is no TransformerLens model, it is in training mode, or another thread has an intervention on it, or
            measures it.
    """
    require_model(model)
    require_eval(model)
    wanted = list(dict.fromkeys(matrices))
    with one_thread(model):
        places = {matrix: _computed_by(model, matrix) for matrix in wanted}
        known = _shapes.setdefault(model, {})
        missing = [m for m in wanted if m not in known or known[m][0] is not places[m]]
        seen: dict[Matrix, list[tuple[int, int]]] = {matrix: [] for matrix in missing}
        removers: list[Remover] = []
        thread = threading.get_ident()

        def watch(matrix: Matrix) -> LinearFunction:
            def look(x: Tensor, y: Tensor) -> Tensor:
                if threading.get_ident() == thread:
                    seen[matrix].append((x.shape[-1], y.shape[-1]))
                return y

            return look

        try:
            try:
                for matrix in missing:
                    on_matrix(model, *matrix, watch(matrix), removers)
                if missing:
                    with torch.no_grad():
                        backbone(model, torch.zeros(1, 2, dtype=torch.long))
            finally:
                detach_all(removers)
        finally:  # as in `_probe`
            detach_all(removers)
        for matrix, shapes in seen.items():
            if len(shapes) != 1:
                raise SiteError(f"{matrix} was used {len(shapes)} times in one forward pass: it cannot be changed here")
            known[matrix] = (places[matrix], shapes[0])
        return {matrix: known[matrix][1] for matrix in wanted}


def matrix_value(model: Model, layer: int, name: str) -> Tensor:
    """Return a matrix as ``[in, out]``: the weights as they are now, without gradients; they are not to be changed.

    Raises:
        SiteError: If the model does not have it, or not as plain numbers (as in quantized models).
    """
    shape = matrix_shape(model, layer, name)
    module = _computed_by(model, Matrix(layer, name))
    if hasattr(model, "original_model"):
        weight = module.weight.detach()
        value = weight if type(module).__name__ == "Conv1D" else weight.t()
    else:
        # Queries that share keys do so in the weights as well, unless these are ungrouped.
        held = [getattr(module, key).detach() for key in (f"_{name}", name) if hasattr(module, key)]
        weight = next((weight for weight in held if weight.numel() == shape[0] * shape[1]), held[0])
        value = weight.transpose(0, 1).flatten(1) if name in ("W_Q", "W_K", "W_V") else weight.flatten(0, -2)
    if not value.is_floating_point() or tuple(value.shape) != shape:
        raise SiteError(
            f"{Matrix(layer, name)} is kept as {tuple(weight.shape)} {weight.dtype}: it cannot be read here"
        )
    return value


def is_wrapped(model: Any) -> bool:
    """Say whether a model, or a part of it, belongs to TransformerLens."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else [model]
    return any(type(module).__module__.partition(".")[0] == "transformer_lens" for module in modules)


_FORKED = {
    "W_Q": ("use_split_qkv_input", "use_attn_in"),
    "W_K": ("use_split_qkv_input", "use_attn_in"),
    "W_V": ("use_split_qkv_input", "use_attn_in"),
    "W_O": ("use_attn_result",),
}
"""Options of TransformerLens under which a matrix is not one linear map, but one for each head."""


def _computed_by(model: Model, matrix: Matrix) -> Any:
    """Return the module that computes with a matrix: the linear one of a bridge, else the block's part."""
    if not 0 <= matrix.layer < int(model.cfg.n_layers):
        raise SiteError(f"{matrix} is not in this model: its layers are 0 to {int(model.cfg.n_layers) - 1}")
    part, module, _ = MATRICES[check_matrix(matrix.name)]
    for option in _FORKED.get(matrix.name, ()):
        if getattr(model.cfg, option, False):
            raise SiteError(f"{matrix} is used head by head under {option}: call model.set_{option}(False) first")
    here = matrix_names(model, matrix.layer)
    if matrix.name not in here:
        raise SiteError(f"{matrix} does not exist in this model: layer {matrix.layer} has {', '.join(here) or 'none'}")
    owner = getattr(model.blocks[matrix.layer], part)
    return getattr(owner, module).original_component if hasattr(model, "original_model") else owner


def matrix_names(model: Model, layer: int) -> list[str]:
    """Name the matrices that a layer has."""
    bridged = hasattr(model, "original_model")
    found = []
    for name, (part, module, _) in MATRICES.items():
        owner = getattr(model.blocks[layer], part, None)
        inner = getattr(getattr(owner, module, None), "original_component", None) if bridged else None
        if (getattr(inner, "weight", None) is not None) if bridged else hasattr(owner, name):
            found.append(name)
    return found


def on_matrix(
    model: Model, layer: int, name: str, function: LinearFunction, removers: list[Remover] | None = None
) -> Remover:
    """Pass what a linear map makes of its input through a function, which sees the input that the map itself sees.

    That is the input behind every hook point in front of the map, whatever is attached there, and whenever; the hook
    points behind the map see the function's result.

    Args:
        model: The model.
        layer: The matrix' layer.
        name: The matrix' name.
        function: Takes the input and the output; returns a new output.
        removers: As in `attach`.

    Returns:
        A callable that ends this; it returns False if the hooks were already gone.

    Raises:
        SiteError: If the model does not have the matrix.
    """
    module = _computed_by(model, Matrix(layer, name))
    part = MATRICES[name][0]
    owner = getattr(model.blocks[layer], part)
    if not hasattr(model, "original_model"):
        places = _around(module, name, function)
    elif part == "mlp" and getattr(owner, "_use_processed_weights", False) and hasattr(owner, "gate"):
        places = _between(owner, name, function)
    else:

        def run(module: Any, args: Any, kwargs: Any, y: Tensor) -> Tensor:
            return function(args[0] if args else next(iter(kwargs.values())), y)

        places = [(module, "_forward_hooks", run)]

    return _register(places, removers)


def _between(owner: Any, name: str, function: LinearFunction) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return hooks for a gated MLP in compatibility mode, which computes with its weights beside their modules.

    The hook points before and behind the weights still fire: the input is looked at as it leaves the one (behind every
    other hook there), and the output is changed as it enters the other.
    """
    linear = getattr(owner, MATRICES[name][1])
    point, behind = (linear.hook_in if name == "W_out" else owner.hook_in), linear.hook_out
    seen: list[Tensor] = []

    def look(module: Any, args: Any, kwargs: Any, x: Tensor) -> None:
        seen[:] = [x]

    def last(module: Any, args: Any, kwargs: Any) -> None:
        for key in [key for key, hook in point._forward_hooks.items() if hook is look]:
            point._forward_hooks.move_to_end(key)  # behind masks that were attached since

    def change(module: Any, args: Any, kwargs: Any) -> Any:
        return ((function(seen.pop(), args[0]), *args[1:]), kwargs) if seen else None

    before, after = "_forward_pre_hooks", "_forward_hooks"
    return [(owner, before, last), (point, after, look), (behind, before, change)]


def _around(owner: Any, name: str, function: LinearFunction) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return hooks for a part of a `HookedTransformer`, whose maps are no modules: where, of which kind, and what."""
    point = getattr(owner, MATRICES[name][2])
    if name == "W_in" and hasattr(owner, "W_gate"):
        point = owner.hook_pre_linear
    seen: list[Tensor] = []
    before, after = "_forward_pre_hooks", "_forward_hooks"

    def keep(tensor: Tensor) -> None:
        seen[:] = [tensor]

    if name in ("W_O", "W_out"):

        def look(module: Any, args: Any, kwargs: Any, x: Tensor) -> None:
            keep(x.flatten(2))

        def last(module: Any, args: Any, kwargs: Any) -> None:
            for key in [key for key, hook in point._forward_hooks.items() if hook is look]:
                point._forward_hooks.move_to_end(key)  # behind masks that were attached since

        def add(module: Any, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
            return function(seen.pop(), y) if seen else None

        return [(owner, before, last), (point, after, look), (owner, after, add)]
    given = {"W_Q": "query_input", "W_K": "key_input", "W_V": "value_input"}.get(name, "x")

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        keep(kwargs[given] if given in kwargs else args["QKV".index(name[-1]) if name[-1] in "QKV" else 0])

    def change(module: Any, args: Any, kwargs: Any) -> Any:
        y = args[0]
        return ((function(seen.pop(), y.flatten(2)).reshape(y.shape), *args[1:]), kwargs) if seen else None

    return [(owner, before, enter), (point, before, change)]


class Replay:
    """A forward pass whose blocks' outputs were kept, so that its upper layers can run again without those below.

    Made by `replaying`. A model's own `forward` does the rest of the work (masks, positions, final norm, soft-capping), so
    nothing about an architecture is known here but that a block hands one residual stream to the next. This is tried once:
    where it does not hold, and where logits pass through the functions of `on_logits`, every run is a whole one.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.shortcut = not logit_functions(model)
        """Whether the blocks below are left out in `again`."""
        unembed = model.unembed.modules()
        self._few = self.shortcut and not any(m._forward_hooks or m._forward_pre_hooks for m in unembed)
        self._kept: dict[int, Any] = {}
        self._below = 0  # in this run, blocks under this one give what they gave before; -1: keep what they give
        self._rows = self._tokens = torch.zeros(0, dtype=torch.long)
        self._width = 0
        self._where: Tensor | None = None  # in this run, the only positions that are unembedded
        self._thread = threading.get_ident()  # whose runs these are: what other threads run passes as it is

    def first(
        self, tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "n vocabulary"]:
        """Run the model, keep what its blocks give, and return the logits of some positions."""
        untried = self.shortcut and not self._kept
        self._tokens = tokens.to(device_of(self.model))
        self._kept.clear()
        logits = self._run(-1, torch.arange(len(tokens)), where, few=False)
        if untried:
            last = int(self.model.cfg.n_layers) - 1
            try:
                again = self._run(last, torch.arange(len(tokens)), where, self._few)
                self.shortcut = bool(torch.isclose(again, logits, rtol=1e-2, atol=1e-2).float().mean() > 0.99)
            except Exception:  # a model of another make: then without
                self.shortcut = False
            self._few = self._few and self.shortcut
        return logits

    def again(
        self, layer: int, rows: Int[Tensor, "runs"], where: Bool[Tensor, "runs width"]
    ) -> Float[Tensor, "n vocabulary"]:
        """Run some rows of the first run again, from a layer's block on, up to a position; return the logits of positions.

        Hooks at and above that layer act; what stands below it is as in the first run.
        """
        return self._run(layer if self.shortcut else 0, rows, where, self._few)

    def _run(self, below: int, rows: Tensor, where: Tensor, few: bool) -> Tensor:
        device = self._tokens.device
        where = where.to(device)
        self._below, self._rows, self._width = below, rows.to(device), where.shape[1]
        self._where = where if few else None
        try:
            logits = self.model(self._tokens[self._rows, : self._width], return_type="logits")
        finally:
            self._below, self._where = 0, None
        return logits[0] if few else logits[where]

    def block(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Make what stands in for a block's `forward`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return forward(*args, **kwargs)
            if number < self._below:
                return self._take(self._kept[number])
            out = forward(*args, **kwargs)
            if self._below < 0:
                self._kept[number] = out
            return out

        return run

    def _take(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._take, value))
        if isinstance(value, Tensor) and value.shape[:2] == self._tokens.shape and value.ndim == 3:
            return value[self._rows.to(value.device), : self._width]
        return value

    def unembed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Make what stands in for the unembedding's `forward`."""

        def run(residual: Tensor, *args: Any, **kwargs: Any) -> Any:
            few = self._where is not None and threading.get_ident() == self._thread
            return forward(residual[self._where][None] if few else residual, *args, **kwargs)

        return run


@contextmanager
def replaying(model: Model, stand_ins: Mapping[Any, Any] | None = None) -> Iterator[Replay]:
    """Let a model's forward passes be repeated in part, for the length of a `with` block.

    Args:
        model: The model.
        stand_ins: For components that are out of its forward pass, what runs in their place: as `lean` yields them.

    Blocks and unembedding are wrapped inside the hooks of their modules, which act in every run, and only once. Leaving
    the block, in whatever way, takes exactly these wrappings off.

    Raises:
        ModelError: If another thread has an intervention on this model, or measures it.
    """
    removers: list[Remover] = []
    with one_thread(model):
        replay = Replay(model)
        try:
            try:
                runs = {**(stand_ins or {})}
                for number, block in enumerate(model.blocks):
                    _wrap(runs.get(block, block), partial(replay.block, number), removers)
                _wrap(runs.get(model.unembed, model.unembed), replay.unembed, removers)
                yield replay
            finally:
                detach_all(removers)
        finally:  # as in `_probe`
            detach_all(removers)


def _wrap(module: Any, make: Callable[[Callable[..., Any]], Callable[..., Any]], removers: list[Remover]) -> None:
    own = {"forward": module.__dict__["forward"]} if "forward" in module.__dict__ else {}  # accelerate's, for one
    wrapped = make(module.forward)

    def unwrap() -> bool:
        module.__dict__.pop("forward", None)
        module.__dict__.update(own)
        return True

    removers.append(unwrap)
    module.__dict__["forward"] = wrapped
