"""`Training`: one optimization of an update, step by step, with measurements on the way, a choice of step, and checkpoints."""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from lens_unlearn.core import artefacts
from lens_unlearn.core.counter_rng import key_of
from lens_unlearn.core.errors import ArtefactError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.evaluation.answer_losses import Answers, gradients_of, known, read_answers, rows_at
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.update import Update
from lens_unlearn.methods.objectives import clip_norm, curvature_of, forget_term
from lens_unlearn.methods.sophia import Sophia
from lens_unlearn.model.host import Model
from lens_unlearn.model.loading import fingerprint

__all__ = ["Training"]

KEPT: dict[str, Any] = {"step": int, "trajectory": list, "checks": list, "best_check": dict, "stopped": str | None}
"""What a checkpoint keeps besides tensors."""
ADAMW = ("step", "exp_avg", "exp_avg_sq")
NEAR = 0.05
"""Forgotten is what is known no better than what was never seen, plus this share of answer tokens."""


@dataclass
class Training:
    """The state of a training; `options` are those of `simu`."""

    model: Model
    forget: Corpus
    """What the forget term is taken on: the answers, or for "po" the refusals."""
    retain: Corpus | None
    measured: dict[str, Corpus]
    """What is measured on the way: "forget", and "retain" if any was kept out of the loss."""
    delta: Delta
    trained: list[Tensor]
    options: Mapping[str, Any]
    floor: float
    unseen: float | None
    """The share of answer tokens that the model gets right of what it never saw."""
    step: int = 0
    trajectory: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None
    previous: list[Tensor] = field(default_factory=list)
    """The trained tensors before the last update."""

    def __post_init__(self) -> None:
        """Make the optimizer, and remember the start."""
        o = self.options
        self.sophia = self.adamw = None
        if o["optimizer"] == "sophia":
            self.sophia = Sophia(self.trained, lr=o["lr"], rho=o["rho"], weight_decay=o["weight_decay"])
        else:
            self.adamw = torch.optim.AdamW(self.trained, lr=o["lr"], weight_decay=o["weight_decay"])
        self.best: list[Tensor] | None = None
        self.best_check: dict[str, Any] = {}

    def go(self, checkpoint: str | os.PathLike[str] | None, progress: bool) -> None:
        """Train to the end, from the checkpoint if there is one; the trained tensors end as those of the step chosen."""
        o = self.options
        if checkpoint is not None:
            self._resume(checkpoint)
        if not self.checks:
            self._check()
        with tqdm(total=o["steps"], initial=self.step, disable=not progress, desc="simu", unit=" steps") as bar:
            while self.step < o["steps"] and self.stopped is None:
                self._step()
                bar.update(1)
                if self.stopped or self.step % o["check_every"] == 0 or self.step == o["steps"]:
                    found = self._check()
                    bar.set_postfix({name: f"{found[name]:.2f}" for name in self.measured})
                    if checkpoint is not None:
                        self._save(checkpoint)
        if self.best is not None:
            _write(self.trained, self.best)

    def _step(self) -> None:
        o = self.options
        with self.delta.on(self.model):
            total: list[Tensor] | None = None
            told = {"forget": 0.0, "retain": 0.0}
            for part in range(o["accumulation"]):
                value, found = self._objective(self.step * o["accumulation"] + part, told)
                got = gradients_of(value / o["accumulation"], self.trained)
                total = got if total is None else [a + b for a, b in zip(total, got, strict=True)]
            assert total is not None
            bad = [f"the {name} loss" for name, loss in told.items() if not math.isfinite(loss)]
            if not bad and not all(bool(torch.isfinite(g).all()) for g in total):
                bad = ["a gradient"]
            if bad:  # the last update brought a broken loss; where only a gradient is, the update is still good
                self._stop(" and ".join(bad), back=bad != ["a gradient"])
                return
            if self.sophia is not None and self.step % o["curvature_every"] == 0:
                generator = torch.Generator().manual_seed(key_of("labels", o["seed"], self.step) % 2**63)
                found = self._objective(self.step * o["accumulation"], {})[1]
                self.sophia.curve(curvature_of(o["curvature"], found, self.trained, generator))
        self.previous = [tensor.detach().clone() for tensor in self.trained]
        steps = list(clip_norm(total, o["max_norm"]))
        if self.sophia is not None:
            self.sophia.step(steps)
        elif self.adamw is not None:
            for tensor, gradient in zip(self.trained, steps, strict=True):
                tensor.grad = gradient
            self.adamw.step()
            self.adamw.zero_grad(set_to_none=True)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self.trained):
            self._stop("the update", back=True)
            return
        self.step += 1
        entry = {"step": self.step, **told}
        self.trajectory.append(entry if self.sophia is None else {**entry, "clipped": self.sophia.clipped})

    def _stop(self, what: str, *, back: bool) -> None:
        """End the training at something broken, with the update before the last one if the last one brought it."""
        self.stopped = f"{what} became NaN or infinite at step {self.step + 1}"
        if back and self.previous:
            _write(self.trained, self.previous)
        warnings.warn(f"{self.stopped}: the last delta without is returned", RuntimeWarning, stacklevel=6)

    def _objective(self, place: int, told: dict[str, float]) -> tuple[Tensor, list[Answers]]:
        """Return what is minimized at the rows of a place in the order, and note both losses."""
        o = self.options
        batch = rows_at(self.forget, place, o["batch_size"], o["seed"])
        before: Tensor | None = None
        if o["loss"] == "npo":
            before = self.before[batch.rows]
        found = [read_answers(self.model, batch)]
        value = o["forget_weight"] * forget_term(o["loss"], found[0], floor=self.floor, beta=o["beta"], before=before)
        told["forget"] = told.get("forget", 0.0) + found[0].loss.item() / o["accumulation"]
        if self.retain is not None:
            found.append(read_answers(self.model, rows_at(self.retain, place, o["batch_size"], o["seed"])))
            value = value + o["retain_weight"] * found[1].loss
            told["retain"] = told.get("retain", 0.0) + found[1].loss.item() / o["accumulation"]
        return value, found

    @property
    def before(self) -> Float[Tensor, "rows"]:
        """Each forget row's loss under the unedited model: the same model, with the delta off."""
        if not hasattr(self, "_before"):
            self._before = torch.zeros(self.forget.n_rows)
            with self.delta.at(0).on(self.model), torch.no_grad():
                for batch in self.forget.batches(self.options["batch_size"]):
                    self._before[batch.rows] = read_answers(self.model, batch).per_row()[0].float().cpu()
        return self._before.to(self.trained[0].device)

    def _check(self) -> dict[str, Any]:
        """Measure, and keep the update if it is the best so far."""
        entry: dict[str, Any] = {"step": self.step}
        with self.delta.on(self.model):
            for name, corpus in self.measured.items():
                entry[name] = known(self.model, corpus, self.options["batch_size"])[0]
        self.checks.append(entry)
        if self.unseen is None or self._rank(entry) > self._rank(self.best_check):
            self.best_check = entry
            self.best = [tensor.detach().clone() for tensor in self.trained]
        return entry

    @property
    def aim(self) -> float | None:
        """The share of the forget corpus' answer tokens at or below which it counts as forgotten."""
        return None if self.unseen is None else self.unseen + NEAR

    def _rank(self, entry: dict[str, Any]) -> tuple[float, float]:
        """Order measurements: forgotten before not; then by what is kept, less what is forgotten beyond the never seen.

        Of those not forgotten, by how little is left.
        """
        if not entry:
            return (-math.inf, 0.0)
        assert self.unseen is not None
        if entry["forget"] <= self.unseen + NEAR:
            return (1.0, entry.get("retain", 0.0) - max(0.0, self.unseen - entry["forget"]))
        return (-entry["forget"], 0.0)

    def record(self) -> dict[str, Any]:
        """Return what a delta keeps of its training."""
        size = sum(tensor.numel() for tensor in self.trained)
        whole = sum(parameter.numel() for parameter in self.model.parameters())
        moments = 2 * size
        return {
            "settings": {k: v if isinstance(v, int | float | str | None) else repr(v) for k, v in self.options.items()},
            "forget": {"name": self.measured["forget"].name, "fingerprint": self.measured["forget"].fingerprint},
            "retain": None
            if self.retain is None
            else {"name": self.retain.name, "fingerprint": self.retain.fingerprint},
            "trained": size,
            "optimizer_state": {"numbers": moments, "share_of_full": size / whole},
            "floor": self.floor,
            "unseen": self.unseen,
            "aim": self.aim,
            "steps": self.step,
            "chosen": self.best_check.get("step", self.step),
            "stopped": self.stopped,
            "losses": self.trajectory,
            "checks": self.checks,
        }

    # --- checkpoints ---

    def _settings(self) -> dict[str, Any]:
        corpora = {name: corpus.fingerprint for name, corpus in self.measured.items()}
        kept = self.retain.fingerprint if self.retain is not None else None
        told = {k: repr(v) for k, v in self.options.items() if k != "steps"}
        updates = [
            f"{matrix} {sorted(update.tensors())} {tuple(update.value.shape)} {_places(update)}"
            for matrix, update in self.delta.updates.items()
        ]
        own = {"model": fingerprint(self.model), "corpora": {**corpora, "trained on": kept}, "updates": updates}
        return {**told, **own, "floor": self.floor, "unseen": self.unseen}

    def _save(self, path: str | os.PathLike[str]) -> None:
        tensors = {f"trained/{i}": tensor.detach().clone() for i, tensor in enumerate(self.trained)}
        tensors |= {f"best/{i}": tensor for i, tensor in enumerate(self.best or [])}
        tensors |= {f"previous/{i}": tensor for i, tensor in enumerate(self.previous)}
        if self.sophia is not None:
            tensors |= {f"optimizer/{name}": tensor for name, tensor in self.sophia.state().items()}
        elif self.adamw is not None:
            for i, tensor in enumerate(self.trained):
                tensors |= {f"optimizer/{i}/{name}": value for name, value in self.adamw.state[tensor].items()}
        header = {"settings": self._settings(), "state": json.dumps({name: getattr(self, name) for name in KEPT})}
        artefacts.write(path, "simu checkpoint", tensors, header)

    def _resume(self, path: str | os.PathLike[str]) -> None:
        if not os.path.exists(path):
            if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
                raise ArtefactError(f"{path} cannot be written: there is no such folder")
            return
        header, tensors = artefacts.read(path, "simu checkpoint")
        artefacts.require_same(path, header.get("settings"), self._settings(), "this training")
        with artefacts.usable(path, "checkpoint that can be used"):
            state = _state(artefacts.parse(header["state"]))
        if state["step"] > self.options["steps"]:
            raise ArtefactError(
                f"{path} is of step {state['step']} already: give it at least as many steps, or delete it"
            )
        for name, value in state.items():
            setattr(self, name, value)
        with artefacts.usable(path, "checkpoint that can be used"):
            self._restore(tensors)

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back the tensors that `_save` wrote."""
        own: dict[str, dict[str, Tensor]] = {"previous": {}, "best": {}, "optimizer": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            own.setdefault(part, {})[name] = tensor
            place = next((int(one) for one in name.split("/") if one.isdecimal()), -1)
            like = self.trained[place]
            if part == "optimizer" and name == f"{place}/step":
                fits = tensor.ndim == 0 and tensor.is_floating_point()
            else:
                fits = tensor.shape == like.shape and tensor.dtype == like.dtype
            if place < 0 or not fits:
                raise ValueError(f"{key:.100} has another shape or type than what is trained")
            if part != "optimizer" and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{key:.100} holds NaN or infinity")
        listed = lambda part: [own[part].pop(str(i)) for i in range(len(self.trained))] if own[part] else []  # noqa: E731
        _write(self.trained, listed("trained"))
        self.best, self.previous = listed("best") or None, listed("previous")
        optimizer = own.pop("optimizer")
        if self.sophia is not None:
            self.sophia.restore(optimizer)
            optimizer = dict.fromkeys(set(optimizer) - set(self.sophia.state()))
        elif self.adamw is not None and optimizer:
            for i, tensor in enumerate(self.trained):
                self.adamw.state[tensor] = {name: optimizer.pop(f"{i}/{name}") for name in ADAMW}
        if optimizer or any(own.values()):
            raise ValueError("something in it has no meaning to this version: upgrade to read it")


def _places(update: Update) -> str:
    """Tell which rows or columns are trained: as many others have the same shape."""
    index = [part for part in (update.rows, update.columns) if part is not None]
    return hashlib.sha256(b"".join(part.cpu().numpy().tobytes() for part in index)).hexdigest()[:16]


def _state(state: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of where a training stands, and nothing else.

    Raises:
        ValueError: If it is of another form.
    """
    fits = set(state) == set(KEPT) and all(isinstance(state[name], kind) for name, kind in KEPT.items())
    entries = [*state["trajectory"], *state["checks"], *([state["best_check"]] if state["best_check"] else [])]
    for entry in entries if fits else ():
        fits &= isinstance(entry, dict) and type(entry.get("step")) is int
        fits = fits and all(isinstance(value, int | float) for value in entry.values())
    if not fits or state["step"] < 0:
        raise ValueError("its state is not that of a training")
    return state


@torch.no_grad()
def _write(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
