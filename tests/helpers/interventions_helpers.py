"""Shared words of the tests: interventions."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import tiny
import torch
from torch import Tensor

from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.interventions.affine import Affine
from lens_unlearn.interventions.base import Chain, Intervention
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.update import Update
from lens_unlearn.keyspace.regions import Box
from lens_unlearn.methods.ov_basis import ov_basis
from lens_unlearn.model.hooks import attach, detach_all
from lens_unlearn.model.matrices import matrix_shape
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons.maps import NeuronMap

POST = [Site(0, "mlp.post"), Site(1, "mlp.post")]


Z = [Site(0, "attn.z"), Site(1, "attn.z")]
RESID = Site(0, "resid")


def random_selection(shapes: dict[Site, tuple[int, ...]], share: float = 0.3, seed: int = 0) -> NeuronMap:
    generator = torch.Generator().manual_seed(seed)
    return NeuronMap({site: torch.rand(shape, generator=generator) < share for site, shape in shapes.items()})


def selection_of(model: Any, kinds: str | list[str] = "mlp.post", share: float = 0.3, seed: int = 0) -> NeuronMap:
    return random_selection({site: point.shape for site, point in resolve(model, kinds).items()}, share, seed)


def under(model: Any, intervention: Intervention, tokens: Tensor | None = None) -> Tensor:
    with intervention.on(model):
        return tiny.logits(model, tokens)


def box_around_half(model: Any, site: Site, seed: int = 0) -> Box:
    """A box in key space that holds the last key of about half of some random rows."""
    seen: list[Tensor] = []
    remove = attach(resolve(model, [site])[site].hook, lambda t: seen.append(t.detach()[:, -1].flatten(1).float()))
    try:
        tiny.logits(model, tiny.some_tokens(16, 7, seed=seed))
    finally:
        detach_all([remove])
    keys = seen[0]
    far = (keys - keys.mean(0)).abs().amax(1)
    return Box(keys.mean(0)[None], torch.ones(keys.shape[1]), float(far.median()))


def zoo(model: Any, seed: int = 0) -> dict[str, Intervention]:
    """Return one intervention of every kind and form, for a model; each changes some logits."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def maps(selection: NeuronMap, *, positive: bool = False) -> NeuronMap:
        return selection.map(lambda mask: noise(*mask.shape).abs() + 0.2 if positive else noise(*mask.shape))

    post, z = selection_of(model, seed=seed), selection_of(model, "attn.z", seed=seed + 1)
    pre = selection_of(model, "mlp.pre", seed=seed + 2)
    normal = {
        "forget_mean": maps(pre),
        "forget_std": maps(pre, positive=True),
        "retain_mean": maps(pre),
        "retain_std": maps(pre, positive=True),
    }
    shape = {name: matrix_shape(model, 0, name) for name in ("W_out", "W_in", "W_O", "W_Q")}
    return {
        "zero": Ablate(post | selection_of(model, share=0.1, seed=seed + 3)),
        "mean": Ablate(post, maps(post)),
        "heads": Ablate(z, 0.5),
        "basis": Ablate(z, maps(z), ov_basis(model)),
        "random": Adjust(pre, **normal, rule="random", seed=seed),
        "deterministic": Adjust(pre, **normal, rule="deterministic"),
        "prompt": Ablate(post, maps(post)).placed("prompt", skip_special=True),
        "abstain": Abstain({POST[1]: box_around_half(model, POST[1], seed)}),
        "every token": Abstain(
            {POST[0]: box_around_half(model, POST[0], seed), POST[1]: box_around_half(model, POST[1], seed + 1)},
            vote=2,
            when="every_token",
        ),
        "affine": Affine(
            {RESID: noise(32, 1, scale=0.3)}, {RESID: noise(1, 32, scale=0.3)}, {RESID: noise(32)}, {RESID: noise(32)}
        ),
        "rows": Delta({(0, "W_out"): Update(noise(3, shape["W_out"][1], scale=0.3), torch.tensor([5, 0, 60]))}),
        "columns": Delta(
            {(0, "W_in"): Update(noise(shape["W_in"][0], 2, scale=0.3), columns=torch.tensor([63, 1]))}, strength=0.7
        ),
        "dense": Delta({(1, "W_O"): Update(noise(*shape["W_O"], scale=0.1))}, strength=-1.5),
        "rank": Delta(
            {(1, "W_Q"): Update(noise(shape["W_Q"][0], 2, scale=0.3), right=noise(2, shape["W_Q"][1], scale=0.3))}
        ),
    }


FORMS = [
    "zero",
    "mean",
    "heads",
    "basis",
    "random",
    "deterministic",
    "prompt",
    "abstain",
    "every token",
    "affine",
    "rows",
    "columns",
    "dense",
    "rank",
]
"""The names in `zoo`."""


@cache
def _zoo(name: str, seed: int) -> dict[str, Intervention]:
    return zoo(tiny.model(name), seed)


def one(name: str, form: str, seed: int = 0) -> Intervention:
    """Return an intervention of `zoo` for a shared model; "all" is the sum of them, with those that abstain last."""
    made = _zoo(name, seed)
    tiny.model(name)  # so that the test is guarded
    return sum((made[other] for other in FORMS), Chain(())) if form == "all" else made[form]


def value_matrices(name: str, plain: Any, layer: int) -> Tensor:
    """Read W_V per query head, ``[heads, d_model, d_head]``, from the plain model's own projections."""
    a = tiny.ARCHITECTURES[name]
    weight = tiny.output_rows(tiny.module_of(plain, name, Site(layer, "attn.v"))).detach().double()  # [in, out]
    value = tiny.site_value(name, "attn.v", weight, weight[None], torch.zeros(1, len(weight)))[
        0
    ]  # [in, kv heads, d_head]
    return value.repeat_interleave(a.heads // a.kv_heads, dim=1).transpose(0, 1)


@contextmanager
def unchanged(model: Any) -> Iterator[Tensor]:
    """Demand bitwise equal logits, parameters and hook books afterwards."""
    before, weights, hooks = tiny.logits(model), tiny.weights_hash(model), tiny.hooks_of(model)
    yield before
    assert tiny.hooks_of(model) == hooks
    assert tiny.weights_hash(model) == weights
    assert torch.equal(tiny.logits(model), before)


class Flat(Intervention):
    """Makes the logits constant, or whatever a function makes of the last residual; only for tests."""

    def __init__(self, value: float) -> None:
        self.value = value

    def hooks(self) -> Any:
        return [(site, lambda x, live: torch.full_like(x, self.value)) for site in self.sites]

    def parts(self) -> Any:
        raise NotImplementedError


def final(value: float) -> Flat:
    made = Flat(value)
    made.sites = [Site(1, "resid")]
    return made
