"""`Training`: one optimization of an update, step by step, with measurements on the way, a choice of step, and checkpoints.

Knows the objective, the optimizers and the tensors that are trained. Knows nothing of neurons or of how the tensors were
selected, and never writes a parameter of the model.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core import artefacts
from lens_unlearn.core.counter_rng import key_of
from lens_unlearn.core.errors import ArtefactError, LensUnlearnError
from lens_unlearn.core.numbers import COUNT, NOT_NEGATIVE, POSITIVE, SEED
from lens_unlearn.core.progress import Bar
from lens_unlearn.corpora.corpus import Batch, Corpus
from lens_unlearn.evaluation.answer_losses import (
    Answers,
    add_gradients,
    read_answers,
    rows_at,
    take_gradients,
)
from lens_unlearn.evaluation.teacher_forcing import accuracy
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.update import Update
from lens_unlearn.methods.curvature import clip_norm, curvature_of
from lens_unlearn.methods.objectives import OBJECTIVES, Objective, Step, Term
from lens_unlearn.methods.sophia import Sophia
from lens_unlearn.model.host import Model
from lens_unlearn.model.loading import as_in_file, fingerprint
from lens_unlearn.model.recompute import frozen

__all__ = ["LEARNING_RATES", "Training", "TrainingSettings", "check_choices", "check_counts"]

LEARNING_RATES = {"sophia": 1e-4, "adamw": 3e-4}
"""The optimizers, each with its default learning rate."""
STATE: dict[str, Any] = {"step": int, "trajectory": list, "checks": list, "best_check": dict, "stopped": str | None}
"""What a checkpoint holds besides tensors and settings."""
ADAMW = ("step", "exp_avg", "exp_avg_sq")
MEMORY = ("default", "low")
FREE = ("steps", "memory")
"""Settings that a training may be resumed with other values of: longer, or in less memory."""
LATER = ("attribution_tokens",)
"""Settings that came later: None says nothing, so that a checkpoint of an earlier version is known again."""
MARGIN = 0.05
"""Forgotten means: accuracy at most that on what the model never saw, plus this share of answer tokens."""


def check_choices(settings: object, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse a setting that is not one of its choices, by a `LensUnlearnError`."""
    for name, allowed in choices.items():
        value = getattr(settings, name)
        if value not in allowed:
            raise LensUnlearnError(f"{name}={value!r} is not known: choose from {', '.join(allowed)}")


def check_counts(settings: object, *names: str) -> None:
    """Refuse a setting that is no whole number of at least 1, by a `LensUnlearnError`."""
    for name in names:
        COUNT.check(getattr(settings, name), name)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How an update is trained. Every field is the argument of `simu` of its name, and explained there.

    Raises:
        LensUnlearnError: If one is unknown or out of range.
    """

    loss: str
    forget_weight: float
    retain_weight: float
    beta: float
    refusal: str
    floor: float | None
    """As given; `Training.floor` is the number that it comes to."""
    optimizer: str
    lr: float
    rho: float
    weight_decay: float
    curvature: str
    curvature_every: int
    max_norm: float | None
    steps: int
    batch_size: int
    accumulation: int
    check_every: int
    memory: str
    seed: int

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        choices = {"loss": tuple(OBJECTIVES), "optimizer": tuple(LEARNING_RATES), "curvature": ("gnb", "hutchinson")}
        choices |= {"memory": MEMORY}
        check_choices(self, choices)
        check_counts(self, "steps", "batch_size", "accumulation", "check_every", "curvature_every")
        for name in ("lr", "rho", "beta", *(() if self.max_norm is None else ("max_norm",))):
            POSITIVE.check(getattr(self, name), name)
        for name in ("forget_weight", "retain_weight", "weight_decay", *(() if self.floor is None else ("floor",))):
            NOT_NEGATIVE.check(getattr(self, name), name)
        SEED.check(self.seed, "seed")
        if not isinstance(self.refusal, str) or not self.refusal.strip():
            raise LensUnlearnError(f"refusal={self.refusal!r} is no answer: give a text")


@dataclass
class Training:
    """The state of a training."""

    model: Model
    forget: Corpus
    """The answers to forget."""
    retain: Corpus | None
    measured: dict[str, Corpus]
    """What accuracy is measured on: "forget", and "retain" if some documents were held out of the loss."""
    delta: Delta
    trained: list[Tensor]
    settings: TrainingSettings
    floor: float
    """In nats per answer token."""
    unseen: float | None
    """The model's accuracy on what it never saw, as a share of answer tokens."""
    other_settings: Mapping[str, Any] = field(default_factory=dict)
    """How the trained tensors were selected: recorded, and compared with a checkpoint's."""
    refusals: Corpus | None = None
    """The prompts to forget with refusals, if the objective reads them."""
    step: int = 0
    trajectory: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None
    previous: list[Tensor] = field(default_factory=list)
    """The trained tensors before the last update."""

    def __post_init__(self) -> None:
        """Make the optimizer."""
        lr, weight_decay = self.settings.lr, self.settings.weight_decay
        self.sophia = self.adamw = None
        if self.settings.optimizer == "sophia":
            self.sophia = Sophia(self.trained, lr=lr, rho=self.settings.rho, weight_decay=weight_decay)
        else:
            self.adamw = torch.optim.AdamW(self.trained, lr=lr, weight_decay=weight_decay)
        self.best: list[Tensor] | None = None
        self.best_check: dict[str, Any] = {}
        self.before: dict[str, Tensor] = {}
        """Each row's loss under the unedited model, of the parts that the objective compares with it."""

    @property
    def objective(self) -> Objective:
        """What is minimized."""
        return OBJECTIVES[self.settings.loss]

    def _corpus(self, part: str) -> Corpus:
        corpus = {"forget": self.forget, "refusals": self.refusals, "retain": self.retain}[part]
        assert corpus is not None, f"loss={self.settings.loss!r} reads {part}"
        return corpus

    def go(self, checkpoint: str | os.PathLike[str] | None, progress: bool) -> None:
        """Train to the end, from the checkpoint if there is one; the trained tensors end as those of the step chosen."""
        steps, check_every = self.settings.steps, self.settings.check_every
        if checkpoint is not None:
            self._resume(checkpoint)
        # Here, where the delta is off: in its block, a resumed training would take the half-trained model for the unedited one.
        self.before = {part: self._row_losses(self._corpus(part)) for part in self.objective.before}
        if not self.checks:
            self._check()
        with Bar(total=steps, initial=self.step, disable=not progress, desc="simu", unit=" steps") as bar:
            while self.step < steps and self.stopped is None:
                self._step()
                bar.update(1)
                if self.stopped or self.step % check_every == 0 or self.step == steps:
                    check = self._check()
                    bar.set_postfix({name: f"{check[name]:.2f}" for name in self.measured})
                    if checkpoint is not None:
                        self._save(checkpoint)
        if self.best is not None:
            _write(self.trained, self.best)

    # --- one step ---

    def _step(self) -> None:
        """Make one update, or stop where something is NaN or infinite."""
        losses = {"forget": 0.0, "retain": 0.0}
        gradients = self._gradients(losses)
        broken = [f"the {name} loss" for name, loss in losses.items() if not math.isfinite(loss)]
        if broken:
            self._stop(" and ".join(broken), back=True)
            return
        if not _all_finite(gradients):  # the losses are sound, and so is the last update
            self._stop("a gradient", back=False)
            return
        if self.sophia is not None and self.step % self.settings.curvature_every == 0:
            self.previous.clear()  # of the last step, whose loss is sound: not beside the curvature
            with self._recording():
                self._estimate_curvature(self.sophia)
        self.previous.clear()
        self.previous = [tensor.detach().clone() for tensor in self.trained]
        self._update(clip_norm(gradients, self.settings.max_norm))
        if not _all_finite(self.trained):
            self._stop("the update", back=True)
            return
        self.step += 1
        entry = {"step": self.step, **losses}
        self.trajectory.append(entry if self.sophia is None else {**entry, "clipped": self.sophia.clipped})

    def _stop(self, broken: str, *, back: bool) -> None:
        """End the training at something broken, with the update before the last one if the last one brought it."""
        self.stopped = f"{broken} became NaN or infinite at step {self.step + 1}"
        if back and self.previous:
            _write(self.trained, self.previous)
        warnings.warn(f"{self.stopped}: the last delta without is returned", RuntimeWarning, stacklevel=5)

    def _gradients(self, losses: dict[str, float]) -> list[Tensor]:
        """Return the gradients of the objective over the batches of a step, and add their mean losses to `losses`."""
        # The objective is a sum of terms over rows of their own, and so is its gradient: forward and backward pass of one term
        # come before those of the next, so that the activations of one stand at a time.
        accumulation = self.settings.accumulation
        for part in range(accumulation):
            batches = self._batches(self.step * accumulation + part)
            before = {name: rows[next(iter(batches.values())).rows] for name, rows in self.before.items()}
            with torch.no_grad():
                unedited = {name: self._read(batches[name]) for name in self.objective.unedited}
            with self._recording():
                for kind, (names, weight, term) in self._terms().items():
                    answers = {name: self._read(batches[name]) for name in names}
                    step = Step(answers, before, unedited, self.floor, self.settings.beta)
                    add_gradients(weight * term(step) / accumulation, self.trained)
                    with torch.no_grad():
                        losses[kind] += answers[names[0]].loss.item() / accumulation
        return take_gradients(self.trained)

    def _terms(self) -> dict[str, tuple[tuple[str, ...], float, Term]]:
        """Return the terms of the objective: which parts each reads, its weight, and the function."""
        terms = {"forget": (self.objective.reads, self.settings.forget_weight, self.objective.forget)}
        if self.objective.retain is not None:
            terms["retain"] = (("retain",), self.settings.retain_weight, self.objective.retain)
        return terms

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Let the delta act, and nothing but what is trained take part in gradients."""
        with self.delta.on(self.model), frozen(self.model, recompute=self._low):
            yield

    @property
    def _low(self) -> bool:
        return self.settings.memory == "low"

    def _read(self, batch: Batch, *, twice: bool = False) -> Answers:
        return read_answers(self.model, batch, twice=twice, recompute=self._low)

    def _batches(self, place: int) -> dict[str, Batch]:
        """Return the rows of each part that is read, at a place in their order; refusals are those of the forget rows."""
        size, seed = self.settings.batch_size, self.settings.seed
        return {part: rows_at(self._corpus(part), place, size, seed) for part in self.objective.parts}

    def _row_losses(self, corpus: Corpus) -> Float[Tensor, "rows"]:
        """Return each row's loss under the model as it is; outside of the delta's block, under the unedited one."""
        losses = torch.zeros(corpus.n_rows)
        with torch.no_grad():
            for batch in corpus.batches(self.settings.batch_size):
                losses[batch.rows] = self._read(batch).per_row()[0].float().cpu()
        return losses.to(self.trained[0].device)

    def _estimate_curvature(self, sophia: Sophia) -> None:
        """Give Sophia an estimate over the first forget and retain rows of the step."""
        generator = torch.Generator().manual_seed(key_of("labels", self.settings.seed, self.step) % 2**63)
        batches = self._batches(self.step * self.settings.accumulation)
        twice = self.settings.curvature == "hutchinson"
        answers = (self._read(batch, twice=twice) for batch in batches.values())
        sophia.curve(curvature_of(self.settings.curvature, answers, self.trained, generator))

    def _update(self, gradients: list[Tensor]) -> None:
        if self.sophia is not None:
            self.sophia.step(gradients)
        elif self.adamw is not None:
            for tensor, gradient in zip(self.trained, gradients, strict=True):
                tensor.grad = gradient
            self.adamw.step()
            self.adamw.zero_grad(set_to_none=True)

    # --- measurements, and the choice of step ---

    def _check(self) -> dict[str, Any]:
        """Measure accuracy, and hold on to the update if it is the best so far."""
        check: dict[str, Any] = {"step": self.step}
        with self.delta.on(self.model):
            for name, corpus in self.measured.items():
                check[name] = accuracy(self.model, corpus, self.settings.batch_size, recompute=self._low)[0]
        self.checks.append(check)
        if self.unseen is None:  # the last is returned, which is what is trained
            self.best_check, self.best = check, None
        elif self._rank(check) > self._rank(self.best_check):
            self.best_check = check
            self.best = [tensor.detach().clone() for tensor in self.trained]
        return check

    @property
    def aim(self) -> float | None:
        """The accuracy on the forget corpus at or below which it counts as forgotten."""
        return None if self.unseen is None else self.unseen + MARGIN

    def _rank(self, check: dict[str, Any]) -> tuple[float, float]:
        """Order measurements, best last: forgotten ones by held-out retain accuracy, less what was forgotten beyond `unseen`.

        All others come before these, by falling accuracy on the forget corpus.
        """
        # The model should end like one that never saw the forget corpus. A lower accuracy than that gives the corpus away too
        # (the model avoids what it memorized), so each point below costs as much as a point of retain accuracy. That is
        # measured on documents held out of the loss: those in it are learned ever better, whatever happens to the others.
        if not check:
            return (-math.inf, 0.0)
        assert self.unseen is not None
        if check["forget"] <= self.unseen + MARGIN:
            return (1.0, check.get("retain", 0.0) - max(0.0, self.unseen - check["forget"]))
        return (-check["forget"], 0.0)

    @property
    def all_settings(self) -> dict[str, Any]:
        """The settings of the training and the others, by name."""
        return {**self.other_settings, **vars(self.settings)}

    def record(self) -> dict[str, Any]:
        """Return what a delta keeps of its training."""
        n_trained = sum(tensor.numel() for tensor in self.trained)
        n_model = sum(parameter.numel() for parameter in self.model.parameters())
        settings = self.all_settings.items()
        n_state = 2 * n_trained  # m and h of Sophia, or both moments of AdamW
        return {
            "settings": {k: v if isinstance(v, int | float | str | None) else repr(v) for k, v in settings},
            "forget": _source(self.measured["forget"]),
            "retain": None if self.retain is None else _source(self.retain),
            "trained": n_trained,
            "optimizer_state": {"numbers": n_state, "share_of_full": n_trained / n_model},
            "floor": self.floor,
            "ascends": self.objective.ascends,
            "refuses": self.objective.reads[0] == "refusals",
            "unseen": self.unseen,
            "aim": self.aim,
            "steps": self.step,
            "chosen": self.best_check.get("step", self.step),
            "stopped": self.stopped,
            "losses": self.trajectory,
            "checks": self.checks,
        }

    # --- checkpoints ---
    # The rows and the drawn labels of a step depend on its number and the seed alone, so a file needs no random state: with the
    # trained tensors, the optimizer's state and the measurements, a resumed training is the uninterrupted one, bit for bit.
    # `best` is in it, since the step chosen may lie before the file was written, and `previous`, since the first step after
    # resuming may find that the last update broke the loss.

    def _settings(self) -> dict[str, Any]:
        """Return all that must be the same for a checkpoint to be of this training: every setting but those of `FREE`."""
        said = {name: v for name, v in self.all_settings.items() if not (v is None and name in LATER)}
        settings = {name: repr(value) for name, value in said.items() if name not in FREE}
        corpora = {name: corpus.fingerprint for name, corpus in self.measured.items()}
        trained_on = self.retain.fingerprint if self.retain is not None else None
        updates = [
            f"{matrix} {sorted(update.tensors())} {tuple(update.value.shape)} {_indices_hash(update)}"
            for matrix, update in self.delta.updates.items()
        ]
        context = {"model": fingerprint(self.model), "corpora": {**corpora, "trained on": trained_on}}
        return {**settings, **context, "updates": updates, "floor": self.floor, "unseen": self.unseen}

    def _save(self, path: str | os.PathLike[str]) -> None:
        tensors = {f"trained/{i}": tensor.detach().clone() for i, tensor in enumerate(self.trained)}
        tensors |= {f"best/{i}": tensor for i, tensor in enumerate(self.best or [])}
        tensors |= {f"previous/{i}": tensor for i, tensor in enumerate(self.previous)}
        if self.sophia is not None:
            tensors |= {f"optimizer/{name}": tensor for name, tensor in self.sophia.state().items()}
        elif self.adamw is not None:
            for i, tensor in enumerate(self.trained):
                tensors |= {f"optimizer/{i}/{name}": value for name, value in self.adamw.state[tensor].items()}
        header = {"settings": self._settings(), "state": json.dumps({name: getattr(self, name) for name in STATE})}
        artefacts.write(path, "simu checkpoint", tensors, header)

    def _resume(self, path: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint, if there is one; refuse one of another training."""
        if not os.path.exists(path):
            if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
                raise ArtefactError(f"{path} cannot be written: there is no such folder")
            return
        header, tensors = artefacts.read(path, "simu checkpoint")
        ours = as_in_file(path, header.get("settings"), self._settings(), self.model)
        artefacts.require_same(path, header.get("settings"), ours, "this training")
        with artefacts.usable(path, "checkpoint that can be used"):
            state = _checked_state(artefacts.parse(header["state"]))
        if state["step"] > self.settings.steps:
            raise ArtefactError(
                f"{path} is of step {state['step']} already: give it at least as many steps, or delete it"
            )
        for name, value in state.items():
            setattr(self, name, value)
        with artefacts.usable(path, "checkpoint that can be used"):
            self._restore(tensors)

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back the tensors that `_save` wrote."""
        parts: dict[str, dict[str, Tensor]] = {"previous": {}, "best": {}, "optimizer": {}}
        for key, tensor in tensors.items():
            self._check_tensor(key, tensor)
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = tensor
        _write(self.trained, self._take(parts["trained"]))
        self.best, self.previous = self._take(parts["best"]) or None, self._take(parts["previous"])
        optimizer = parts.pop("optimizer")
        if self.sophia is not None:
            self.sophia.restore(optimizer)
            optimizer = {name: tensor for name, tensor in optimizer.items() if name not in self.sophia.state()}
        elif self.adamw is not None and optimizer:
            for i, tensor in enumerate(self.trained):
                self.adamw.state[tensor] = {name: optimizer.pop(f"{i}/{name}") for name in ADAMW}
        if optimizer or any(parts.values()):
            raise ValueError("something in it has no meaning to this version: upgrade to read it")

    def _check_tensor(self, key: str, tensor: Tensor) -> None:
        """Refuse, by a `ValueError`, a tensor of a file that is not like the trained tensor whose number its name holds."""
        part, _, name = key.partition("/")
        place = next((int(word) for word in name.split("/") if word.isdecimal()), -1)
        like = self.trained[place]
        if part == "optimizer" and name == f"{place}/step":
            fits = tensor.ndim == 0 and tensor.is_floating_point()
        else:
            fits = tensor.shape == like.shape and tensor.dtype == like.dtype
        if place < 0 or not fits:
            raise ValueError(f"{key:.100} has another shape or type than what is trained")
        if part != "optimizer" and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{key:.100} holds NaN or infinity")

    def _take(self, numbered: dict[str, Tensor]) -> list[Tensor]:
        """Take out of a part of a file one tensor for each that is trained; nothing out of one that was not written."""
        return [numbered.pop(str(i)) for i in range(len(self.trained))] if numbered else []


def _source(corpus: Corpus) -> dict[str, str]:
    return {"name": corpus.name, "fingerprint": corpus.fingerprint}


def _indices_hash(update: Update) -> str:
    """Hash which rows or columns are trained: two masks may select as many, and look the same in words."""
    indices = [index for index in (update.rows, update.columns) if index is not None]
    return hashlib.sha256(b"".join(index.cpu().numpy().tobytes() for index in indices)).hexdigest()[:16]


def _checked_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of where a training stands, and nothing else.

    Raises:
        ValueError: If it is of another form.
    """
    fits = set(state) == set(STATE) and all(isinstance(state[name], kind) for name, kind in STATE.items())
    entries = [*state["trajectory"], *state["checks"], *([state["best_check"]] if state["best_check"] else [])]
    for entry in entries if fits else ():
        fits &= isinstance(entry, dict) and type(entry.get("step")) is int
        fits = fits and all(isinstance(value, int | float) for value in entry.values())
    if not fits or state["step"] < 0:
        raise ValueError("its state is not that of a training")
    return state


def _all_finite(tensors: list[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@torch.no_grad()
def _write(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
