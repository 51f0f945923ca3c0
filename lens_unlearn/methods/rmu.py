"""RMU: MLPs are trained so that the output of a layer is a random vector at forget tokens, and as it was at others; a baseline.

Li et al., "The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning" (arXiv 2403.03218): representation
misdirection for unlearning. With h the residual stream behind layer l, u a random unit vector (uniform numbers in [0, 1), divided
by their norm), c the coefficient and d the width,

    L = mean_forget |h - c u|^2 / d + alpha mean_retain |h - h_unedited|^2 / d

is minimized by Adam over the down projections (W_out) of layers l - 2 to l; means are over tokens. As in the released code,
distances are means over the dimensions too.

Here nothing is written into the model: what is trained is a `Delta`. The released code lets AdamW decay the weights a little (5e-7
of them a step), and counts padding and BOS as tokens; neither is done here. Its numbers are those of models of 7 billion
parameters; the defaults here are of small ones, see docs/methods/baselines.md.

Knows hidden states and where they are; knows nothing of answers or of words.
"""

import math
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.counter_rng import key_of
from lens_unlearn.core.errors import CorpusError, LensUnlearnError, SiteError
from lens_unlearn.core.numbers import COUNT, NOT_NEGATIVE, POSITIVE, SEED, STRENGTH
from lens_unlearn.core.progress import Bar
from lens_unlearn.corpora.corpus import Batch, Corpus, require_corpus
from lens_unlearn.evaluation.answer_losses import gradients_of, rows_at
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.update import Update
from lens_unlearn.methods.controls import RANDOM_UPDATES
from lens_unlearn.methods.method import Fitted, Method
from lens_unlearn.methods.residual import RESID, STRENGTHS, check_layers, check_sides, layers_of
from lens_unlearn.model.hooks import Remover, announce, attach, backbone, detach_all, one_thread
from lens_unlearn.model.host import Model, require_eval, require_float, require_model
from lens_unlearn.model.matrices import Matrix, matrix_names, matrix_value
from lens_unlearn.model.shortcuts import shortcuts
from lens_unlearn.model.sites import Point, Site, layers_with, resolve

__all__ = ["rmu"]

NORMS = 5.0
"""The coefficient, where none is given, in mean norms of the forget tokens' states (Adaptive RMU, arXiv 2408.06223)."""


def rmu(
    model: Model,
    forget: Corpus | Delta,
    retain: Corpus | None,
    *,
    layer: int | None = None,
    layers: int | Sequence[int] | None = None,
    coefficient: float | None = None,
    alpha: float = 100.0,
    lr: float = 1e-3,
    steps: int = 80,
    batch_size: int = 4,
    strength: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> Delta:
    """Train a removable update of MLPs that misdirects the hidden states of one corpus and keeps those of another.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode. Its parameters are never written.
        forget: Texts, or prompts with answers, to forget. Given a `Delta`, it is returned at `strength`.
        retain: Texts, or prompts with answers, to retain.
        layer: Behind which layer states are misdirected; -1 is the last. Default: 7 of 32, and that share of other depths, but
            at least the third.
        layers: Of which layers the down projections are trained, none above `layer`. Default: that one and the two below it.
        coefficient: The length of the random vector. Default: 5 times the mean norm of the forget tokens' states there.
        alpha: Of the retain term.
        lr: Of Adam.
        steps: Updates.
        batch_size: Rows of each corpus in a step.
        strength: Of the delta that is returned, above 0 and at most 1.
        seed: Of the random vector, and of the order of rows.
        progress: Whether to show a bar.

    Returns:
        The update. Its `record` holds the losses and settings, and why the training stopped early, if it did: at NaN, the update
        before is returned, and a warning names the step.

    Raises:
        CorpusError: If there is nothing to retain.
        SiteError: If a layer that is to be trained has no down projection.
        ModelError: If the model is quantized, or in training mode.
        LensUnlearnError: If a layer does not exist, or an option is out of range.
    """
    if isinstance(forget, Delta):
        return forget.at(strength)
    require_model(model)
    given = {"layer": layer, "layers": layers, "coefficient": coefficient, "alpha": alpha, "lr": lr, "steps": steps}
    _check(model, forget, retain, **given, batch_size=batch_size, strength=strength, seed=seed)
    corpora = {"forget": require_corpus(forget, "forget"), "retain": require_corpus(retain, "retain")}
    at, numbers = _places(model, layer, layers)
    updates = {Matrix(n, "W_out"): Update(_zeros(matrix_value(model, n, "W_out"))) for n in numbers}
    delta, trained = Delta(updates), [update.value for update in updates.values()]
    adam = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    losses: list[dict[str, float]] = []
    stopped = None
    point = resolve(model, Site(at, RESID))[Site(at, RESID)]
    with one_thread(model), Bar(total=steps, disable=not progress, desc="rmu", unit=" steps") as bar:
        if coefficient is None:
            with torch.no_grad():
                first = _states(model, point, rows_at(corpora["forget"], 0, batch_size, seed))
            coefficient = NORMS * float(first.norm(dim=-1).mean())
        target = coefficient * _direction(int(model.cfg.d_model), seed)
        for step in range(steps):
            batches = {name: rows_at(corpus, step, batch_size, seed) for name, corpus in corpora.items()}
            with torch.no_grad():
                unedited = _states(model, point, batches["retain"])
            with delta.on(model):
                terms = {
                    "forget": _mean_square(_states(model, point, batches["forget"]) - target.to(unedited)),
                    "retain": _mean_square(_states(model, point, batches["retain"]) - unedited),
                }
                gradients = gradients_of(terms["forget"] + alpha * terms["retain"], trained)
            before = [tensor.detach().clone() for tensor in trained]
            for tensor, gradient in zip(trained, gradients, strict=True):
                tensor.grad = gradient
            adam.step()
            adam.zero_grad(set_to_none=True)
            if not all(bool(torch.isfinite(tensor).all()) for tensor in trained):
                stopped = f"the update became NaN or infinite at step {step + 1}"
                warnings.warn(f"{stopped}: that before is returned; lower lr", RuntimeWarning, stacklevel=2)
                with torch.no_grad():
                    for tensor, value in zip(trained, before, strict=True):
                        tensor.copy_(value)
                break
            losses.append({"step": step + 1, **{name: term.item() for name, term in terms.items()}})
            bar.update(1)
    settings = {**given, "layer": at, "layers": str(numbers), "coefficient": coefficient, "batch_size": batch_size}
    record = {
        "settings": {**settings, "seed": seed},
        **{name: {"name": corpus.name, "fingerprint": corpus.fingerprint} for name, corpus in corpora.items()},
        "trained": sum(tensor.numel() for tensor in trained),
        "unit": "squared distance per dimension",
        "losses": losses,
        "stopped": stopped,
    }
    return Delta({matrix: update.detach() for matrix, update in updates.items()}, strength, record)


class _Reached(BaseException):
    """Ends a forward pass at the layer whose output was wanted."""


def _states(model: Model, point: Point, batch: Batch) -> Float[Tensor, "tokens width"]:
    """Return the activations at a point at the counted tokens of a batch, in float32 at least, with gradients where enabled."""
    seen: list[Tensor] = []
    removers: list[Remover] = []

    def keep(x: Tensor) -> None:
        seen.append(x)
        raise _Reached

    try:
        try:
            attach(point.hook, keep, removers)
            announce(model, batch.prompt_ends, batch.lengths)
            with shortcuts(model), suppress(_Reached):
                backbone(model, batch.tokens)
        finally:
            detach_all(removers)
    finally:  # once more, for an interrupt just before the line above
        detach_all(removers)
    states = seen[0][batch.counted.to(seen[0].device)]
    return states if states.dtype == torch.float64 else states.float()


def _mean_square(x: Float[Tensor, "tokens width"]) -> Float[Tensor, ""]:
    """Return the mean of the squares; 0 where a batch has no token that counts."""
    return x.square().sum() / max(1, x.numel())


def _direction(width: int, seed: int) -> Float[Tensor, "width"]:
    """Draw a unit vector as the released code does: uniform numbers in [0, 1), divided by their norm."""
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(key_of("rmu", seed) % 2**63))
    return drawn / drawn.norm()


def _zeros(weights: Tensor) -> Tensor:
    """Return an update to be trained, zero as yet; float32 also for weights of half precision."""
    dtype = weights.dtype if weights.dtype == torch.float64 else torch.float32
    return torch.zeros(weights.shape, dtype=dtype, device=weights.device, requires_grad=True)


def _places(model: Model, layer: int | None, layers: int | Sequence[int] | None) -> tuple[int, list[int]]:
    """Return the layer whose output is misdirected, and those that are trained.

    Raises:
        LensUnlearnError: If one does not exist, or is trained above the other.
        SiteError: If one to be trained has no down projection.
    """
    count = len(layers_with(model, RESID))
    [at] = layers_of(model, layer, [min(count - 1, max(2, math.floor(count * 7 / 32)))], "layer")
    having = [number for number in range(count) if "W_out" in matrix_names(model, number)]
    trained = layers_of(model, layers, [number for number in range(max(0, at - 2), at + 1) if number in having])
    without = sorted(set(trained) - set(having))
    if without or not trained:
        where = f"layer {without[0]}" if without else f"layers {max(0, at - 2)} to {at}"
        raise SiteError(f"{where}: there is no W_out to train in this model; choose others by layers")
    if trained[-1] > at:
        raise LensUnlearnError(
            f"layer {trained[-1]} is above layer {at}, whose output does not depend on it: train layers up to {at}"
        )
    return at, trained


def _check(model: Model | None, forget: Any, retain: Any, **options: Any) -> None:
    """Refuse options and corpora; without a model, options alone."""
    given = METHOD.defaults() | options
    check_layers([given["layer"]] if given["layer"] is not None else None, "layer")
    check_layers(given["layers"])
    STRENGTH.check(given["strength"], "strength")
    SEED.check(given["seed"], "seed")
    POSITIVE.check(1 if given["coefficient"] is None else given["coefficient"], "coefficient")
    POSITIVE.check(given["lr"], "lr")
    NOT_NEGATIVE.check(given["alpha"], "alpha")
    for name in ("steps", "batch_size"):
        COUNT.check(given[name], name)
    if isinstance(forget, Delta):
        return
    check_sides(forget, retain)
    if model is not None:
        require_eval(model)
        require_float(model)
        for corpus, name in ((forget, "forget"), (retain, "retain")):
            require_corpus(corpus, name).check(model)
            if not corpus.n_tokens:
                raise CorpusError(f"{corpus.name} has no token that counts: there is nothing to train on")
        _places(model, given["layer"], given["layers"])


def _prepare(model: Model, forget: Corpus | Delta, retain: Corpus | None, **options: Any) -> Fitted:
    """Train once for all strengths: the update at a strength is the same update, scaled."""
    if isinstance(forget, Delta):
        return forget, retain
    return rmu(model, forget, retain, **{name: value for name, value in options.items() if name != "strength"}), None


METHOD = Method(
    name="rmu",
    function=rmu,
    strength="strength",
    grid=STRENGTHS,
    prepare=_prepare,
    check=_check,
    control_words=RANDOM_UPDATES,
    trains=True,
    baseline=True,
    summary="Trains a removable update of MLPs that turns the output of a layer into a random vector on the forget corpus and "
    "keeps it on the retain corpus (RMU, Li et al. 2024); a baseline.",
)
