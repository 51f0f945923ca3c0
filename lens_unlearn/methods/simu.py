r"""SIMU: find the neurons that an answer depends on, and train an update of their output weights that unlearns it.

Knows which weights of a model are trained, and in which order the parts of the method come. Knows nothing of gradients, optimizers
or checkpoints: these are the business of `lens_unlearn.methods.training`.

Agarwal, Pamnani, Hakkani-Tür, "SIMU: Selective Influence Machine Unlearning" (arXiv 2510.07822). Critical neurons of the forget
corpus are found by attribution (`lens_unlearn.attribute`); then the rows of W_out of these neurons, and the attention
projections, are trained against the answers of the forget corpus and for those of the retain corpus, in the paper with a
second-order optimizer:

    L = -L_forget + gamma L_retain        ("graddiff"; others in `lens_unlearn.methods.objectives`)

The paper edits the weights and masks each step's moments and weights three times. Here only the critical rows exist, as a
`Delta` outside the model, which gives the same numbers (all operations are elementwise). The code was never released: what the
paper leaves open is an option. The defaults forget memorized facts at the least cost that was measured; they are not the paper's
(AdamW, and attention in low rank): docs/methods/simu.md.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lens_unlearn.core.counter_rng import key_of
from lens_unlearn.core.errors import CorpusError, LensUnlearnError, SelectionError
from lens_unlearn.core.numbers import NUMBER, THRESHOLD
from lens_unlearn.corpora.corpus import Corpus, require_corpus
from lens_unlearn.evaluation.teacher_forcing import accuracy
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.update import Update
from lens_unlearn.methods.controls import RANDOM_UPDATES
from lens_unlearn.methods.method import Fitted, Method
from lens_unlearn.methods.objectives import OBJECTIVES, refusals
from lens_unlearn.methods.training import LEARNING_RATES, Training, TrainingSettings, check_choices, check_counts
from lens_unlearn.model.host import Model, require_eval, require_float, require_model
from lens_unlearn.model.matrices import Matrix, matrix_names, matrix_value
from lens_unlearn.model.sites import layers_with, resolve
from lens_unlearn.neurons.attribution import Mode, Objective, attribute, critical_mask
from lens_unlearn.neurons.maps import NeuronMap

__all__ = ["METHOD", "AttributionSettings", "MaskSettings", "critical_neurons", "simu"]

HELD_OUT = 0.2
"""The share of the retain documents that is measured, and not trained on."""
PASSES = 15
"""Passes over the forget corpus, unless a number of steps is given."""
LOW_RANK_RATE = 1e-3
"""The learning rate of AdamW where attention is trained in low rank."""


@dataclass(frozen=True, kw_only=True)
class AttributionSettings:
    """How critical neurons are found. Every field is the argument of `simu` of its name, and explained there.

    Raises:
        LensUnlearnError: If one is unknown or out of range.
    """

    threshold: float
    attribution_steps: int
    attribution_tokens: int | None = None
    objective: Objective
    mode: Mode

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        check_choices(self, {"objective": get_args(Objective), "mode": get_args(Mode)})
        check_counts(self, "attribution_steps", *(() if self.attribution_tokens is None else ("attribution_tokens",)))
        THRESHOLD.check(self.threshold, "threshold", SelectionError)


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskSettings:
    """Which weights are trained. Every field is the argument of `simu` of its name, and explained there.

    Raises:
        LensUnlearnError: If one is unknown or out of range.
        SelectionError: If nothing would be trained.
    """

    mask: str | NeuronMap
    attention: str
    rank: int
    inner: bool

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        choices: dict[str, tuple[str, ...]] = {"attention": ("full", "lora", "none")}
        if isinstance(self.mask, str):
            choices["mask"] = ("dual", "forget_only", "union", "all", "none")
        check_choices(self, choices)
        check_counts(self, "rank")
        if self.attention == "none" and isinstance(self.mask, str) and self.mask == "none":
            raise SelectionError("attention='none' and mask='none' leave nothing to train")


def simu(
    model: Model,
    forget: Corpus | Delta,
    retain: Corpus | None,
    *,
    threshold: float = 0.3,
    attribution_steps: int = 5,
    attribution_tokens: int | None = None,
    objective: Literal["prob", "logprob"] = "prob",
    mode: Literal["teacher_forced", "prefix"] = "teacher_forced",
    mask: str | NeuronMap = "dual",
    attention: Literal["full", "lora", "none"] = "lora",
    rank: int = 8,
    inner: bool = False,
    loss: Literal["graddiff", "npo", "po", "gradient_ascent", "kl", "simnpo", "dpo", "undial", "jensun"] = "graddiff",
    forget_weight: float = 0.4,
    retain_weight: float = 2.0,
    beta: float | None = None,
    refusal: str = "I do not know that.",
    unseen: Corpus | None = None,
    floor: float | None = None,
    optimizer: Literal["sophia", "adamw"] = "adamw",
    lr: float | None = None,
    rho: float = 0.05,
    weight_decay: float = 10.0,
    curvature: Literal["gnb", "hutchinson"] = "gnb",
    curvature_every: int = 10,
    max_norm: float | None = 1.0,
    steps: int | None = None,
    batch_size: int = 8,
    accumulation: int = 1,
    check_every: int = 20,
    memory: Literal["default", "low"] = "default",
    strength: float = 1.0,
    seed: int = 0,
    checkpoint: str | None = None,
    progress: bool = True,
) -> Delta:
    """Train a removable update that unlearns the answers of one corpus and retains those of another.

    A fifth of the retain documents is held out of the loss. Every `check_every` steps, accuracy (the share of answer tokens that
    are the most probable ones) is measured on the forget corpus and on that fifth. Which step is returned: with `unseen`, of
    those where accuracy on the forget corpus is at most that on `unseen` plus 5 points, the one with the highest held-out
    accuracy, less what accuracy on the forget corpus is below that on `unseen` (forgetting beyond what was never seen is no
    success); if there is none, the one with the lowest accuracy on the forget corpus. Without `unseen`, the last.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode. Its parameters are never written, and get no
            gradients.
        forget: Prompts with the answers to forget. Given a `Delta`, it is returned at `strength`.
        retain: Prompts with answers to retain, or texts; not used by "gradient_ascent".
        threshold: Share of a layer's largest attribution above which a neuron is critical.
        attribution_steps: As `steps` in `attribute`; the other settings of attribution are `objective` and `mode`.
        attribution_tokens: Answer tokens that are attributed, at most, of rows drawn at random; None for all. Attribution runs each
            token some `attribution_steps` times per layer, far more often than training does.
        objective: What is attributed.
        mode: How it is attributed.
        mask: "dual" (critical for forget), "forget_only", "union"; "all" neurons, "none"; or a boolean map at `mlp.post`, such
            as a random one.
        attention: Whether W_Q, W_K, W_V and W_O are trained: "full", as products of `rank` ("lora"), or not ("none").
        rank: Of "lora".
        inner: Whether the critical columns of W_in (and W_gate) are trained too; in the paper they are not.
        loss: See `lens_unlearn.methods.objectives`: "graddiff"; "gradient_ascent", without retain rows; "kl", which holds the
            retain rows to the unedited model; "npo" and "simnpo"; "po" and "dpo", towards `refusal`; "undial" and "jensun".
        forget_weight: Of the forget term; 0 for a control that only goes on learning the retain corpus.
        retain_weight: gamma, of the retain loss.
        beta: Of "npo", "simnpo", "dpo" and "undial"; default 1, 2.5, 1 and 10.
        refusal: The answer that "po", "dpo" and "jensun" teach.
        unseen: Prompts with answers of the same kind that the model never saw. Its accuracy decides which step is returned.
        floor: The loss of a row, in nats per answer token, up to which forgetting pushes. Default: that of `unseen`, else
            log(vocabulary) / 2.
        optimizer: "adamw" (torch), or "sophia", the paper's.
        lr: Default 1e-4 for Sophia; for AdamW 1e-3 with attention in low rank, else 3e-4.
        rho: Of Sophia.
        weight_decay: Towards the weights as they were, per step and lr: what no gradient holds in place returns, so that what is in
            no loss is retained. The paper's decays the edited weights.
        curvature: Sophia's estimate, over the forget and retain rows of a step.
        curvature_every: Steps between estimates.
        max_norm: Gradients are scaled down to this norm, over all that is trained; None for never.
        steps: Updates. Default: those of 15 passes over the forget corpus.
        batch_size: Rows of each corpus, facts where a row is one, in a forward: a step takes that many times `accumulation`.
        accumulation: Forwards per update.
        check_every: Steps between measurements.
        memory: "low" takes less of it and more time, for the same update up to rounding: what happens inside a block is computed
            again for gradients instead of being kept, in attribution as well, and fewer logits stand at a time.
        strength: Of the delta that is returned; see `Delta.at`.
        seed: Of the order of rows, the labels drawn, and the start of "lora".
        checkpoint: A file to resume from, written every `check_every` steps; the result is the same as without interruption.
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
    require_model(model)
    require_corpus(forget, "forget")
    attribution = AttributionSettings(
        threshold=threshold, attribution_steps=attribution_steps, attribution_tokens=attribution_tokens,
        objective=objective, mode=mode,
    )  # fmt: skip
    masking = MaskSettings(mask=mask, attention=attention, rank=rank, inner=inner)
    settings = TrainingSettings(
        loss=loss,
        forget_weight=forget_weight,
        retain_weight=retain_weight,
        beta=_beta(loss) if beta is None else beta,
        refusal=refusal,
        floor=floor,
        optimizer=optimizer,
        lr=_learning_rate(optimizer, attention) if lr is None else lr,
        rho=rho,
        weight_decay=weight_decay,
        curvature=curvature,
        curvature_every=curvature_every,
        max_norm=max_norm,
        steps=math.ceil(PASSES * forget.n_rows / max(1, batch_size * accumulation)) if steps is None else steps,
        batch_size=batch_size,
        accumulation=accumulation,
        check_every=check_every,
        memory=memory,
        seed=seed,
    )
    _check_inputs(model, forget, retain, loss)
    trained_on, held_out = _split(retain, settings)
    critical = mask
    if not isinstance(critical, NeuronMap):
        critical = critical_neurons(
            model, forget, trained_on, critical, attribution,
            batch_size=batch_size, memory=memory, seed=seed, progress=progress,
        )  # fmt: skip
    updates = dict([*_mlp_updates(model, critical, inner), *_attention_updates(model, masking, seed)])
    unseen_accuracy, default_floor = _unseen(model, unseen, batch_size, memory)
    training = Training(
        model,
        forget,
        trained_on,
        {"forget": forget} | ({} if held_out is None else {"retain": held_out}),
        Delta(updates),
        [tensor for update in updates.values() for tensor in (update.value, update.right) if tensor is not None],
        settings,
        default_floor if floor is None else floor,
        unseen_accuracy,
        vars(attribution) | vars(masking) | {"strength": strength},
        refusals(forget, model, refusal) if "refusals" in OBJECTIVES[loss].reads else None,
    )
    training.go(checkpoint, progress)
    counts = {} if critical is None else {str(site): int(selected.sum()) for site, selected in critical.items()}
    record = training.record() | {"critical": counts}
    return Delta({matrix: update.detach() for matrix, update in updates.items()}, strength, record)


def _split(retain: Corpus | None, settings: TrainingSettings) -> tuple[Corpus | None, Corpus | None]:
    """Return the retain documents that are trained on, and those held out of the loss."""
    if retain is None or OBJECTIVES[settings.loss].retain is None:
        return None, None
    trained_on, held_out = retain.split(1 - HELD_OUT, HELD_OUT, seed=settings.seed)
    return trained_on, held_out


def _learning_rate(optimizer: str, attention: str) -> float:
    """Return the default of an optimizer; products of low rank start at zero, and have to be learned faster."""
    return LOW_RANK_RATE if (optimizer, attention) == ("adamw", "lora") else LEARNING_RATES.get(optimizer, math.nan)


def _beta(loss: str) -> float:
    """Return the default of an objective; of an unknown one, which is refused later, any."""
    return OBJECTIVES[loss].beta if loss in OBJECTIVES else 1.0


def _unseen(model: Model, unseen: Corpus | None, batch_size: int, memory: str) -> tuple[float | None, float]:
    """Return accuracy and loss (in nats per token) on what a model never saw; if there is none, None and half that of chance."""
    if unseen is None:
        # A model that never saw an answer still knows its form: at the loss of chance it would have lost much more than the fact.
        return None, math.log(int(model.cfg.d_vocab)) / 2
    return accuracy(model, require_corpus(unseen, "unseen"), batch_size, recompute=memory == "low")


def critical_neurons(
    model: Model,
    forget: Corpus,
    retain: Corpus | None,
    mask: str,
    settings: AttributionSettings,
    *,
    batch_size: int = 8,
    memory: Literal["default", "low"] = "default",
    seed: int = 0,
    progress: bool = True,
) -> NeuronMap | None:
    """Select the neurons to train: by attribution, or all of them; None for none."""
    if mask == "none":
        return None
    if mask == "all":
        points = resolve(model, "mlp.post")
        return NeuronMap({site: torch.ones(point.shape, dtype=torch.bool) for site, point in points.items()})

    def attribution(corpus: Corpus) -> NeuronMap:
        return attribute(
            model,
            corpus if settings.attribution_tokens is None else corpus.sample(settings.attribution_tokens, seed),
            "mlp.post",
            steps=settings.attribution_steps,
            objective=settings.objective,
            mode=settings.mode,
            batch_size=batch_size,
            memory=memory,
            progress=progress,
        )

    forget_attribution = attribution(forget)
    if mask == "dual":  # the retain corpus does not matter then
        return critical_mask(forget_attribution, forget_attribution, settings.threshold)
    if retain is None:
        raise LensUnlearnError(f"mask={mask!r} compares with a retain corpus, and there is none: take 'dual'")
    return critical_mask(forget_attribution, attribution(retain), settings.threshold, kind=mask)  # type: ignore[arg-type]


def _mlp_updates(model: Model, critical: NeuronMap | None, inner: bool) -> Iterator[tuple[Matrix, Update]]:
    """Make updates of critical neurons, zero as yet: their rows of W_out, and their columns of W_in and W_gate if `inner`."""
    for site, selected in (critical or {}).items():
        index = selected.nonzero()[:, 0]
        if len(index) == 0:
            continue
        weights = matrix_value(model, site.layer, "W_out")
        yield Matrix(site.layer, "W_out"), Update(_leaf(torch.zeros(len(index), weights.shape[1]), weights), index)
        for name in matrix_names(model, site.layer) if inner else ():
            if name in ("W_in", "W_gate"):
                rows = matrix_value(model, site.layer, name).shape[0]
                yield Matrix(site.layer, name), Update(_leaf(torch.zeros(rows, len(index)), weights), columns=index)


def _attention_updates(model: Model, settings: MaskSettings, seed: int) -> Iterator[tuple[Matrix, Update]]:
    """Make updates of the attention projections, zero as yet: whole, or products of a random and a zero matrix."""
    for layer in layers_with(model, "attn.z") if settings.attention != "none" else ():
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            weights = matrix_value(model, layer, name)
            rows, columns = weights.shape
            if settings.attention == "full":
                yield Matrix(layer, name), Update(_leaf(torch.zeros(rows, columns), weights))
                continue
            # Of a product of two zero matrices both gradients are zero: one of them has to start at random.
            generator = torch.Generator().manual_seed(key_of("lora", seed, layer, name) % 2**63)
            start = torch.randn(rows, settings.rank, generator=generator) / math.sqrt(rows)
            right = _leaf(torch.zeros(settings.rank, columns), weights)
            yield Matrix(layer, name), Update(_leaf(start, weights), right=right)


def _leaf(start: Tensor, like: Tensor) -> Tensor:
    """Return a tensor to be trained, on the device of some weights; float32 also for those of half precision."""
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    return start.to(device=like.device, dtype=dtype).requires_grad_()


def _check_inputs(model: Model, forget: Corpus, retain: Corpus | None, loss: str) -> None:
    require_eval(model)
    require_float(model)
    require_corpus(forget, "forget").check(model)
    if not forget.has_prompts:
        raise CorpusError(f"{forget.name} has no answers to forget: read it as 'question>answer'")
    if retain is not None:
        require_corpus(retain, "retain").check(model)
    elif OBJECTIVES[loss].retain is not None:
        raise CorpusError(f"loss={loss!r} needs a retain corpus: only 'gradient_ascent' goes without")


def _check(model: Model | None, forget: Any, retain: Any, **options: Any) -> None:
    """Refuse options and corpora; without a model, options alone."""
    given = METHOD.defaults() | options
    given |= {"lr": _learning_rate(given["optimizer"], given["attention"])} if given["lr"] is None else {}
    given |= {"steps": 1} if given["steps"] is None else {}
    given |= {"beta": _beta(given["loss"])} if given["beta"] is None else {}

    def checked(kind: Any) -> Any:
        return kind(**{one.name: given[one.name] for one in fields(kind)})

    checked(AttributionSettings)
    checked(MaskSettings)
    settings = checked(TrainingSettings)
    NUMBER.check(given["strength"], "strength")
    if model is not None and isinstance(forget, Corpus):
        _check_inputs(model, forget, retain, given["loss"])
        _split(retain, settings)
        if "refusals" in OBJECTIVES[given["loss"]].reads:
            refusals(forget, model, given["refusal"])


def _prepare(model: Model, forget: Corpus | Delta, retain: Corpus | None, **options: Any) -> Fitted:
    """Train once for all strengths: the update at a strength is the same update, scaled."""
    if isinstance(forget, Delta):
        return forget, retain
    return simu(model, forget, retain, **{name: value for name, value in options.items() if name != "strength"}), None


METHOD = Method(
    name="simu",
    function=simu,
    fitted_to=Corpus,
    strength="strength",
    grid=(0.1, 0.25, 0.5, 0.75, 1.0),
    prepare=_prepare,
    check=_check,
    control_words=RANDOM_UPDATES,
    unlearns_answers=True,
    trains=True,
    summary="Trains a removable update of critical neurons and attention that forgets the answers of one corpus and keeps "
    "those of another (Agarwal, Pamnani and Hakkani-Tür 2025).",
)
