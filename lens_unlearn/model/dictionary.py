"""`Dictionary`: the features that a sparse autoencoder finds in the activations at one hook point.

    dictionary = lu.load_dictionary("folder")
    with dictionary.on(model):
        moments = lu.collect(model, corpus, "sae")

Knows the formulas of the architectures that SAELens trains, and that a dictionary can be attached to a model; knows nothing of
files (`dictionary_files` does), nor of what is done with the features.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.errors import ModelError, SiteError
from lens_unlearn.model.feature_points import FEATURES, attached, put, take
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.sites import Site, resolve

__all__ = ["ARCHITECTURES", "NORMALIZATIONS", "Dictionary", "layer_of"]

ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"),
}
"""The architectures that are known, and the weights of each by SAELens' names."""
NORMALIZATIONS = ("none", "constant_norm_rescale", "layer_norm")
"""What may be done to an activation before it is encoded, by SAELens' names."""
STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""Hook points at the residual stream, or at what is added to it."""
_HOOK, _INPUT = re.compile(r"blocks\.(\d+)\..+"), re.compile(r"blocks\.(\d+)\.hook_resid_pre")


def layer_of(hook_name: str) -> int | None:
    """Return the layer that a hook point is in; None outside of the blocks."""
    match = _HOOK.fullmatch(hook_name)
    return int(match[1]) if match else None


@dataclass(frozen=True, eq=False, repr=False)
class Dictionary:
    """A sparse autoencoder at one hook point of a model: an encoder to features, and a decoder row for each.

    Made by `lu.load_dictionary`. With x the activation at the hook point, its features are, after what `normalize` does to x,
    and with b_dec subtracted where `centered`:

    - standard: relu(x W_enc + b_enc)
    - topk: the same, where it is among the k largest; 0 elsewhere
    - jumprelu: the same, where x W_enc + b_enc > threshold; 0 elsewhere
    - gated: relu(x W_enc exp(r_mag) + b_mag), where x W_enc + b_gate > 0; 0 elsewhere

    and the reconstruction is features W_dec + b_dec, scaled back.

    While it is attached to a model, its features are the neurons of a site: ``Site(layer, "sae")``, or "sae" for those of all
    attached dictionaries. What an intervention changes of them is added to the activation, times the decoder: setting feature i
    to v adds (v - f_i) W_dec[i]. So the error of the reconstruction is kept, and a model whose features nobody changes is bitwise
    the same.
    """

    hook_name: str
    """TransformerLens' name of the hook point that it was trained at, such as ``blocks.3.hook_resid_post``."""
    architecture: str
    """A key of `ARCHITECTURES`."""
    weights: Mapping[str, Tensor]
    """By SAELens' names: ``W_enc [d_in, d_sae]``, ``W_dec [d_sae, d_in]``, and vectors."""
    k: int | None = None
    """Of "topk"."""
    centered: bool = True
    """Whether b_dec is subtracted before encoding."""
    normalize: str = "none"
    """One of `NORMALIZATIONS`."""
    heads: bool = False
    """Whether it reads the values of all heads of an attention (``attn.hook_z``) as one vector."""
    model_name: str | None = None
    """Of the model that it was trained on, if that is known."""

    @property
    def reads(self) -> str:
        """The hook point that is read: the input of a layer is the output of the one below, and read as that."""
        match = _INPUT.fullmatch(self.hook_name)
        return f"blocks.{int(match[1]) - 1}.hook_resid_post" if match and int(match[1]) else self.hook_name

    @property
    def layer(self) -> int:
        """The layer of the hook point that is read."""
        layer = layer_of(self.reads)
        assert layer is not None, "the reader refuses others"
        return layer

    @property
    def site(self) -> Site:
        """The site of its features."""
        return Site(self.layer, FEATURES)

    @property
    def d_in(self) -> int:
        """Values of an activation."""
        return int(self.weights["W_enc"].shape[0])

    @property
    def d_sae(self) -> int:
        """Features."""
        return int(self.weights["W_enc"].shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it computes, whatever that of the model."""
        return self.weights["W_enc"].dtype

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells it from other dictionaries: where and how it reads, and a digest of its weights."""
        reading = {"k": self.k, "centered": self.centered, "normalize": self.normalize, "heads": self.heads}
        shape = {"hook": self.hook_name, "architecture": self.architecture, "features": self.d_sae}
        return {**shape, **reading, "weights": self._digest}

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for name, weight in sorted(self.weights.items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]

    def encode(self, x: Float[Tensor, "*batch_and_d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the features of activations.

        Args:
            x: At the hook point; ``[..., d_in]``, or ``[..., heads, d_head]`` where it reads all heads as one vector.

        Raises:
            SiteError: If an activation has another number of values than the dictionary reads.
        """
        here = self._at(x.device)
        weights, (x, _, _) = here.weights, here._normed(here._flat(x))
        if self.centered:
            x = x - weights["b_dec"]
        projected = x @ weights["W_enc"]
        if self.architecture == "gated":
            magnitude = torch.relu(projected * weights["r_mag"].exp() + weights["b_mag"])
            return torch.where(projected + weights["b_gate"] > 0, magnitude, 0)
        before = projected + weights["b_enc"]
        features = torch.relu(before)
        if self.architecture == "jumprelu":
            return torch.where(before > weights["threshold"], features, 0)
        if self.architecture == "topk":
            largest = before.topk(self.k, dim=-1).indices  # type: ignore[arg-type]
            return torch.zeros_like(features).scatter(-1, largest, features.gather(-1, largest))
        return features

    def decode(
        self, features: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch_and_d_in"]
    ) -> Float[Tensor, "*batch_and_d_in"]:
        """Return the reconstruction from features.

        Args:
            features: What `encode` returned, or others.
            x: The activations whose scale the reconstruction is given, where `normalize` is not "none"; and whose shape.
        """
        here = self._at(x.device)
        _, scale, offset = here._normed(here._flat(x))
        out = (features @ here.weights["W_dec"] + here.weights["b_dec"]) * scale + offset
        return out.reshape(x.shape)

    def replaced(
        self,
        x: Float[Tensor, "*batch_and_d_in"],
        features: Float[Tensor, "*batch d_sae"],
        new: Float[Tensor, "*batch d_sae"],
    ) -> Float[Tensor, "*batch_and_d_in"]:
        """Return activations with other features and the same reconstruction error: x + (new - features) W_dec, scaled.

        Where no feature is another one, an activation is bitwise what it was.
        """
        here = self._at(x.device)
        changed = new != features
        rows, flat = here.weights["W_dec"], here._flat(x)
        _, scale, _ = here._normed(flat)
        if torch.is_grad_enabled() and new.requires_grad:  # equal values may have gradients of their own
            moved = flat + ((new - features) @ rows) * scale
            return moved.to(x.dtype).reshape(x.shape)
        some = changed.reshape(-1, self.d_sae).any(0).nonzero()[:, 0]  # few of many thousands
        moved = flat + ((new[..., some] - features[..., some]) @ rows[some]) * scale
        touched = changed.any(-1, keepdim=True).expand_as(flat).reshape(x.shape)
        return torch.where(touched, moved.to(x.dtype).reshape(x.shape), x)

    def written(self, index: int) -> Float[Tensor, "d_in"]:
        """Return what a feature adds to the residual stream for each unit of its activation: its row of the decoder.

        Raises:
            SiteError: If the dictionary reads other activations than the residual stream, or what a layer adds to it.
        """
        if not self.reads.endswith(STREAM):
            raise SiteError(
                f"a feature of {self.hook_name} adds nothing to the residual stream itself: only features of hook points that end "
                f"in {', '.join(STREAM)} do"
            )
        return self.weights["W_dec"][index].clone()

    def _flat(self, x: Tensor) -> Tensor:
        flat = x.flatten(-2) if self.heads and x.ndim > 1 and x.shape[-1] != self.d_in else x
        if flat.shape[-1] != self.d_in:
            raise SiteError(
                f"{self.hook_name} has {flat.shape[-1]} values here, and the dictionary reads {self.d_in}: it was trained on "
                f"another model{f' ({self.model_name})' if self.model_name else ''}"
            )
        return flat.to(self.dtype)

    def _normed(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Return what is encoded, and the scale and offset that a reconstruction of it is given."""
        if self.normalize == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / self.d_in**0.5
            return x / scale, scale, 0.0
        if self.normalize == "layer_norm":
            mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            return (x - mean) / (std + 1e-5), std, mean
        return x, 1.0, 0.0

    def _at(self, device: torch.device) -> "Dictionary":
        """Return the same on a device; the copy is kept, since every forward pass asks for it."""
        if self.weights["W_enc"].device == device:
            return self
        copies: dict[torch.device, Dictionary] = self.__dict__.setdefault("_copies", {})
        if device not in copies:
            moved = {name: weight.to(device) for name, weight in self.weights.items()}
            copies[device] = replace(self, weights=moved)
        return copies[device]

    def attach(self, model: Model) -> "Dictionary":
        """Attach to a model, until `detach`: from then on it has the site of the features.

        Nothing is computed for it until something is collected, or an intervention acts, there.

        Returns:
            The same dictionary.

        Raises:
            SiteError: If the model has no such hook point, another number of values there, or another dictionary in that layer.
            ModelError: If this is no TransformerLens model, or it is in training mode.
        """
        require_model(model)
        if (layer_of(self.hook_name) or 0) >= int(model.cfg.n_layers):
            raise SiteError(f"{self.hook_name} is not in this model: its layers are 0 to {int(model.cfg.n_layers) - 1}")
        known = attached(model).get(self.layer)
        put(model, self)
        try:
            resolve(model, self.site)
        except BaseException:
            if known is None:
                take(model, self)
            raise
        return self

    def detach(self, model: Model) -> None:
        """Detach from a model.

        Raises:
            ModelError: If it is not attached to it.
        """
        require_model(model)
        if attached(model).get(self.layer) is not self:
            raise ModelError(f"{self!r} is not attached to this model")
        take(model, self)

    @contextmanager
    def on(self, model: Model) -> Iterator["Dictionary"]:
        """Attach to a model for the length of a `with` block; one that is attached already stays so.

        Raises:
            SiteError: As `attach`.
            ModelError: As `attach`.
        """
        require_model(model)
        before = attached(model).get(self.layer) is self
        try:
            yield self.attach(model)
        finally:
            if not before:
                take(model, self)

    def __repr__(self) -> str:
        trained = f", of {self.model_name}" if self.model_name else ""
        return f"Dictionary({self.d_sae:,} features of {self.hook_name}, {self.architecture}{trained})"
