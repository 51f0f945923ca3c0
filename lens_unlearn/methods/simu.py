r"""SIMU: find the neurons that answers hang on, and train an update of their output weights that unlearns them.

Agarwal, Pamnani, Hakkani-Tür, "SIMU: Selective Influence Machine Unlearning" (arXiv 2510.07822). Critical neurons of the forget
corpus are found by attribution (`lens_unlearn.attribute`); then the rows of W_out of these neurons, and the attention's
projections, are trained against the answers to be forgotten and for those to be kept, with a second-order optimizer:

    L = -L_forget + gamma L_retain        ("graddiff"; others in `lens_unlearn.methods.objectives.forget_term`)

The paper edits the weights and masks each step's moments and weights three times. Here only the critical rows exist, as a
`Delta` outside the model, which gives the same numbers (all operations are elementwise). The code was never released: what the
paper leaves open is an option, and the defaults are said below.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lens_unlearn.core.counter_rng import key_of
from lens_unlearn.core.errors import CorpusError, LensUnlearnError, SelectionError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.evaluation.answer_losses import known
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.update import Update
from lens_unlearn.methods.objectives import LOSSES, refusals
from lens_unlearn.methods.training import Training
from lens_unlearn.model.host import Model, require_eval, require_float, require_model
from lens_unlearn.model.matrices import Matrix, matrix_names, matrix_value
from lens_unlearn.model.sites import resolve
from lens_unlearn.neurons.attribution import attribute, critical_mask
from lens_unlearn.neurons.maps import NeuronMap

__all__ = ["critical_neurons", "simu"]

LEARNING_RATES = {"sophia": 1e-4, "adamw": 3e-4}
KEPT_APART = 0.2
"""The share of the retain documents that is measured, and not trained on."""


def simu(
    model: Model,
    forget: Corpus | Delta,
    retain: Corpus | None,
    *,
    threshold: float = 0.3,
    attribution_steps: int = 5,
    objective: Literal["prob", "logprob"] = "prob",
    mode: Literal["teacher_forced", "prefix"] = "teacher_forced",
    mask: str | NeuronMap = "dual",
    attention: Literal["full", "lora", "none"] = "full",
    rank: int = 8,
    inner: bool = False,
    loss: Literal["graddiff", "npo", "po", "gradient_ascent"] = "graddiff",
    forget_weight: float = 1.0,
    retain_weight: float = 2.0,
    beta: float = 1.0,
    refusal: str = "I do not know that.",
    unseen: Corpus | None = None,
    floor: float | None = None,
    optimizer: Literal["sophia", "adamw"] = "sophia",
    lr: float | None = None,
    rho: float = 0.05,
    weight_decay: float = 0.0,
    curvature: Literal["gnb", "hutchinson"] = "gnb",
    curvature_every: int = 10,
    max_norm: float | None = 1.0,
    steps: int = 300,
    batch_size: int = 8,
    accumulation: int = 1,
    check_every: int = 20,
    strength: float = 1.0,
    seed: int = 0,
    checkpoint: str | None = None,
    progress: bool = True,
) -> Delta:
    """Train a removable update that forgets the answers of one corpus and keeps those of another.

    A fifth of the retain documents is kept out of the loss. Every `check_every` steps, the share of answer tokens still
    right is measured on the forget corpus and on that fifth. Which step is returned: with `unseen`, of those where the forget
    corpus is no better known than `unseen` is, plus 5 points, the one with the largest share on the kept-out fifth, less what
    the forget corpus falls below `unseen` (forgetting beyond what was never seen is no success); if there is none, the one
    where the forget corpus is known least. Without `unseen`, the last.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode. Its parameters are never written, and get no
            gradients.
        forget: Prompts with the answers to forget. Given a `Delta`, it is returned at `strength`.
        retain: Prompts with answers to keep, or texts; not used by "gradient_ascent".
        threshold: Share of a layer's largest attribution above which a neuron is critical.
        attribution_steps: As `steps` in `attribute`; the other settings of attribution are `objective` and `mode`.
        objective: What is attributed.
        mode: How it is attributed.
        mask: "dual" (critical for forget), "forget_only", "union"; "all" neurons, "none"; or a boolean map at `mlp.post`, such
            as a random one.
        attention: Whether W_Q, W_K, W_V and W_O are trained: "full", as products of `rank` ("lora"), or not.
        rank: Of "lora".
        inner: Whether the critical columns of W_in (and W_gate) are trained too; in the paper they are not.
        loss: See `lens_unlearn.methods.objectives.forget_term`.
        forget_weight: Of the forget term; 0 for a control that only goes on learning the retain corpus.
        retain_weight: gamma, of the retain loss.
        beta: Of "npo".
        refusal: The answer that "po" teaches.
        unseen: Prompts with answers of the same kind that the model never saw. Its accuracy decides which step is returned.
        floor: The loss of a row, in nats per answer token, up to which forgetting pushes. Default: that of `unseen`, else
            0.9 log(vocabulary).
        optimizer: "sophia", or "adamw" (torch) for comparison.
        lr: Default 1e-4 for Sophia, 3e-4 for AdamW.
        rho: Of Sophia.
        weight_decay: Towards the weights as they were, per step and lr. The paper's decays the edited weights.
        curvature: Sophia's estimate, over the forget and retain rows of a step.
        curvature_every: Steps between estimates.
        max_norm: Gradients are scaled down to this norm, over all that is trained; None for never.
        steps: Updates.
        batch_size: Rows of each corpus in a forward.
        accumulation: Forwards per update.
        check_every: Steps between measurements.
        strength: Of the delta that is returned; see `Delta.at`.
        seed: Of the order of rows, the labels drawn, and the start of "lora".
        checkpoint: A file to go on from, written every `check_every` steps; the result is the same as without interruption.
        progress: Whether to show bars.

    Returns:
        The update. Its `record` holds losses, measurements, the share of clipped coordinates, critical neurons per layer, the
        settings, which step was returned, and why the training stopped early, if it did: at NaN, the last delta without is
        returned, and a warning names the step.

    Raises:
        CorpusError: If a corpus has no answers, or cannot be split.
        SelectionError: If no neuron is critical, and attention is not trained.
        ModelError: If the model is quantized, or in training mode.
        LensUnlearnError: If an option is unknown or out of range.
    """
    if isinstance(forget, Delta):
        return forget.at(strength)
    given = {
        k: v for k, v in locals().items() if k not in ("model", "forget", "retain", "unseen", "checkpoint", "progress")
    }
    options = given | {"lr": LEARNING_RATES.get(optimizer) if lr is None else lr}
    _check(model, forget, retain, options)
    alone = retain is None or loss == "gradient_ascent"
    kept, apart = (None, None) if alone or retain is None else retain.split(1 - KEPT_APART, KEPT_APART, seed=seed)
    told: dict[str, Any] = {"steps": attribution_steps, "objective": objective, "mode": mode}
    told |= {"batch_size": batch_size, "progress": progress}
    chosen = mask if isinstance(mask, NeuronMap) else critical_neurons(model, forget, kept, mask, threshold, **told)
    updates, trained = _begin(model, chosen, options)
    right, highest = None, 0.9 * math.log(int(model.cfg.d_vocab))
    if unseen is not None:
        right, highest = known(model, unseen, batch_size)
    training = Training(
        model,
        refusals(forget, model, refusal) if loss == "po" else forget,
        kept,
        {"forget": forget} | ({} if apart is None else {"retain": apart}),
        Delta(updates),
        trained,
        options,
        highest if floor is None else floor,
        right,
    )
    training.go(checkpoint, progress)
    counts = {str(site): int(value.sum()) for site, value in chosen.items()} if chosen is not None else {}
    record = training.record() | {"critical": counts}
    return Delta({matrix: update.detach() for matrix, update in updates.items()}, strength, record)


def critical_neurons(
    model: Model, forget: Corpus, retain: Corpus | None, mask: str, threshold: float, **told: Any
) -> NeuronMap | None:
    """Select the neurons to train: by attribution, or all of them; None for none."""
    if mask == "none":
        return None
    if mask == "all":
        return NeuronMap({s: torch.ones(p.shape, dtype=torch.bool) for s, p in resolve(model, "mlp.post").items()})
    got = attribute(model, forget, "mlp.post", **told)
    if mask == "dual":  # the retain corpus does not matter then
        return critical_mask(got, got, threshold)
    if retain is None:
        raise LensUnlearnError(f"mask={mask!r} compares with a retain corpus, and there is none: take 'dual'")
    return critical_mask(got, attribute(model, retain, "mlp.post", **told), threshold, kind=mask)  # type: ignore[arg-type]


def _begin(
    model: Model, chosen: NeuronMap | None, options: Mapping[str, Any]
) -> tuple[dict[Matrix, Update], list[Tensor]]:
    """Make updates that change nothing yet, and list the tensors that are trained."""
    updates: dict[Matrix, Update] = {}
    trained: list[Tensor] = []

    def leaf(start: Tensor, like: Tensor) -> Tensor:
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        trained.append(start.to(device=like.device, dtype=dtype).requires_grad_())
        return trained[-1]

    for site, value in (chosen or {}).items():
        index = value.nonzero()[:, 0]
        if len(index) == 0:
            continue
        weights = matrix_value(model, site.layer, "W_out")
        updates[Matrix(site.layer, "W_out")] = Update(leaf(torch.zeros(len(index), weights.shape[1]), weights), index)
        for name in matrix_names(model, site.layer) if options["inner"] else ():
            if name in ("W_in", "W_gate"):
                rows = matrix_value(model, site.layer, name).shape[0]
                updates[Matrix(site.layer, name)] = Update(leaf(torch.zeros(rows, len(index)), weights), columns=index)
    for layer in range(int(model.cfg.n_layers)) if options["attention"] != "none" else ():
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            weights = matrix_value(model, layer, name)
            rows, columns = weights.shape
            if options["attention"] == "full":
                updates[Matrix(layer, name)] = Update(leaf(torch.zeros(rows, columns), weights))
                continue
            generator = torch.Generator().manual_seed(key_of("lora", options["seed"], layer, name) % 2**63)
            start = torch.randn(rows, options["rank"], generator=generator) / math.sqrt(rows)
            thin = leaf(start, weights)
            updates[Matrix(layer, name)] = Update(thin, right=leaf(torch.zeros(options["rank"], columns), weights))
    return updates, trained


def _check(model: Model, forget: Corpus, retain: Corpus | None, options: Mapping[str, Any]) -> None:
    require_model(model)
    require_eval(model)
    require_float(model)
    forget.check(model)
    if not forget.has_prompts:
        raise CorpusError(f"{forget.name} has no answers to forget: read it as 'question>answer'")
    if retain is not None:
        retain.check(model)
    elif options["loss"] != "gradient_ascent":
        raise CorpusError(f"loss={options['loss']!r} needs a retain corpus: only 'gradient_ascent' goes without")
    choices: dict[str, tuple[str, ...]] = {
        "attention": ("full", "lora", "none"),
        "loss": LOSSES,
        "optimizer": tuple(LEARNING_RATES),
        "curvature": ("gnb", "hutchinson"),
    }
    if isinstance(options["mask"], str):
        choices["mask"] = ("dual", "forget_only", "union", "all", "none")
    for name, known_ones in choices.items():
        if options[name] not in known_ones:
            raise LensUnlearnError(f"{name}={options[name]!r} is not known: choose from {', '.join(known_ones)}")
    for name in ("steps", "batch_size", "accumulation", "check_every", "curvature_every", "rank", "attribution_steps"):
        if not isinstance(options[name], int) or options[name] < 1:
            raise LensUnlearnError(f"{name}={options[name]!r} is no number of anything: a whole number, at least 1")
    if not options["lr"] > 0 or options["weight_decay"] < 0:
        raise LensUnlearnError(
            f"lr={options['lr']} and weight_decay={options['weight_decay']}: above 0, and at least 0"
        )
    if options["attention"] == "none" and isinstance(options["mask"], str) and options["mask"] == "none":
        raise SelectionError("attention='none' and mask='none' leave nothing to train")
