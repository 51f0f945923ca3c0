"""What attention pre-out values need: the singular basis of each head's OV circuit, and folded value biases."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.errors import LensUnlearnError, ModelError, SiteError
from lens_unlearn.model.hooks import attach, backbone, detach_all
from lens_unlearn.model.host import Model, part_of, processing, require_float, require_model
from lens_unlearn.model.loading import load_model
from lens_unlearn.model.sites import Site, layers_with, resolve
from lens_unlearn.neurons.maps import NeuronMap

__all__ = ["ov_basis", "rotate", "value_offset"]


def ov_basis(model: Model) -> NeuronMap:
    """Compute each head's basis in which W_V and W_O share the singular directions of their product.

    With QR factors W_V = Q_v R_v and W_O^T = Q_o R_o, and the SVD R_v R_o^T = U S V^T (so that W_V W_O = Q_v U S V^T Q_o^T),
    the basis is T = R_v^-1 U sqrt(S): pre-out values z T are what the head would hold with W_V' = W_V T and
    W_O' = T^-1 W_O, that is, in its own singular directions. No weight is touched.

    Returns:
        One matrix per head at every `attn.z` site, ``[heads, d_head, d_head]``, float64.

    Raises:
        ModelError: If the model is quantized.
        SiteError: If a head has no W_V of its own, as in multi-head latent attention.
    """
    require_model(model)
    require_float(model, "its matrices cannot be read")
    return NeuronMap({Site(layer, "attn.z"): _head_bases(model, layer) for layer in layers_with(model, "attn.z")})


def rotate(
    z: Float[Tensor, "batch pos heads d_head"], basis: Float[Tensor, "heads d_head d_head"]
) -> Float[Tensor, "batch pos heads d_head"]:
    """Return pre-out values in a basis per head: z T."""
    return torch.einsum("bphi,hij->bphj", z, basis.to(z))


def _head_bases(model: Model, layer: int) -> Float[Tensor, "heads d_head d_head"]:
    attention = part_of(model, layer, "attn")
    try:
        w_o, w_v = (getattr(attention, name).detach().double().cpu() for name in ("W_O", "W_V"))
    except AttributeError as error:  # multi-head latent attention, or a layer that is wrapped whole
        raise SiteError(
            f"the attention of layer {layer} has no OV circuit of one W_V and one W_O per head: use unit='neuron'"
        ) from error
    if len(w_v) != len(w_o):  # grouped queries: several heads read one value head
        w_v = w_v.repeat_interleave(len(w_o) // len(w_v), dim=0)
    r_v = torch.linalg.qr(w_v).R
    r_o = torch.linalg.qr(w_o.transpose(1, 2)).R
    u, s, _ = torch.linalg.svd(r_v @ r_o.transpose(1, 2))
    floor = s[:, :1] * 1e-9  # a direction the head never writes keeps a finite scale
    scaled = u * s.clamp_min(floor).sqrt()[:, None, :]
    try:
        return torch.linalg.solve(r_v, scaled)
    except RuntimeError as error:
        raise LensUnlearnError(f"a value matrix of layer {layer} has not full rank: use unit='neuron' there") from error


def value_offset(model: Model, reference: Model | None = None) -> NeuronMap | None:
    """Return what folding value biases took away from `attn.z`: raw z minus this model's z, a constant per head.

    `HookedTransformer.from_pretrained` and compatibility mode move value biases (and what LayerNorm adds to them) into
    the output bias, because attention weights sum to one. Then zero at `attn.z` is not the ablation it is in the
    unprocessed model; minus this offset is.

    Args:
        model: Any model.
        reference: The same model, unprocessed. Without it, a model that was processed is loaded again by its name.

    Returns:
        The offset at every `attn.z` site, or None where nothing was folded.

    Raises:
        SiteError: If value biases were folded and the unprocessed model is not at hand.
    """
    if not _may_be_folded(model):
        return None
    raw = reference
    if raw is None:
        name = getattr(model.cfg, "tokenizer_name", None) or getattr(model.cfg, "model_name", None)
        try:
            raw = load_model(str(name))
        except ModelError as error:
            raise SiteError(
                "attn.z of this model lacks its value biases, which were folded into the output bias, so zero is not the "
                f"ablation it seems, and the unprocessed model cannot be loaded ({error}): pass it as reference="
            ) from error
    sites = [Site(layer, "attn.z") for layer in layers_with(model, "attn.z")]
    here, there = _last_values(model, sites), _last_values(raw, sites)
    offset = NeuronMap({site: _constant(site, there[site] - here[site]) for site in sites})
    return offset if float(offset.flat().abs().max()) > 1e-6 else None


def _may_be_folded(model: Model) -> bool:
    """Say whether TransformerLens moved value biases into the output bias: only then all are zero, and some of these not."""
    if processing(model) == "bridge":
        return False
    attentions = [attn for block in model.blocks if (attn := getattr(block, "attn", None)) is not None]
    values = [_bias(attn, "b_V") for attn in attentions]
    outputs = [_bias(attn, "b_O") for attn in attentions]
    return not any(map(_is_some, values)) and any(map(_is_some, outputs))


def _bias(attention: Any, name: str) -> Tensor | None:
    try:
        return getattr(attention, name)
    except AttributeError:  # the bridge of an architecture without such biases
        return None


def _is_some(bias: Tensor | None) -> bool:
    return bias is not None and bool(bias.any())


def _last_values(model: Model, sites: list[Site]) -> dict[Site, Float[Tensor, "pos heads d_head"]]:
    """Run a few arbitrary tokens and keep z: the offset shows at any of them."""
    seen: dict[Site, Tensor] = {}
    points = resolve(model, sites)
    removers: list[Callable[[], bool]] = []
    try:
        for site, point in points.items():
            attach(point.hook, lambda t, s=site: seen.update({s: t.detach()[0]}), removers, own_thread=True)
        with torch.no_grad():
            backbone(model, torch.arange(4)[None] % int(model.cfg.d_vocab))
    finally:
        detach_all(removers)
    return {site: seen[site].double().cpu() for site in sites}


def _constant(site: Site, difference: Float[Tensor, "pos heads d_head"]) -> Float[Tensor, "heads d_head"]:
    mean = difference.mean(0)
    if float((difference - mean).abs().max()) > 1e-3 * max(1.0, float(mean.abs().max())):
        raise SiteError(f"{site} differs from the reference by more than a constant: it is another model")
    return mean
