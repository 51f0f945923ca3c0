"""Fewer bits: whether what an update took out comes back when the weights are rounded.

Small updates vanish under rounding (Zhang et al., "Catastrophic Failure of LLM Unlearning via Quantization", arXiv 2410.16454). The
intervention is merged into the weights of every block, and these are rounded to the nearest of 2^b values between the least and the
largest of each run of 64, as they are stored (output by output): 4 bits, and as milder steps 8 bits and bfloat16. Embeddings, norms
and biases stay, as with bitsandbytes. Nothing is written: the difference to the model's own weights is a `Delta`.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.audit.attack import ANSWERS, SCORE, Attack, Case, Found, Suspect, answered, each_suspect
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.metric import Metric
from lens_unlearn.evaluation.relearning import dense_edits
from lens_unlearn.evaluation.report import BASE
from lens_unlearn.interventions.base import Chain
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.update import Update
from lens_unlearn.model.matrices import matrix_value

__all__ = ["ATTACK", "quantization", "rounded"]

GROUP = 64


def rounded(weights: Float[Tensor, "in out"], bits: int) -> Float[Tensor, "in out"]:
    """Round weights to the nearest of 2^bits values between the least and the largest of each run of 64, output by output."""
    flat = weights.t().reshape(-1)
    whole = len(flat) // GROUP * GROUP
    parts = [flat[:whole].reshape(-1, GROUP), flat[whole:][None]]
    done = []
    for part in (part for part in parts if part.numel()):
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        step = (high - low) / (2**bits - 1)
        steps = ((part - low) / torch.where(step > 0, step, 1)).round()
        done.append((low + steps * step).reshape(-1))
    return torch.cat(done).reshape(weights.t().shape).t()


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": lambda weights: weights.to(torch.bfloat16).to(weights.dtype),
    "int8": partial(rounded, bits=8),
    "int4": partial(rounded, bits=4),
}


def quantization(case: Case) -> Found:
    """Round everybody's weights, and ask for the answers.

    Raises:
        SiteError: If a model's weights cannot be read as matrices.
    """
    values: dict[str, list[np.ndarray]] = {}
    beside: list[str] = []
    for name, number, suspect in each_suspect(case, "quantization"):
        columns = []
        for to in STEPS.values():
            fewer, merged = _with_fewer_bits(suspect, to)
            columns.append(answered(case, fewer, case.facts))
            beside += [] if merged or number or name in beside else [name]
        values.setdefault(name, []).append(np.stack([*columns, columns[-1]], axis=1))
    metrics = [Metric(name, f"{ANSWERS}, {name}", unit="probability") for name in STEPS]
    metrics.append(Metric(SCORE, f"{ANSWERS}, 4 bits", unit="probability"))
    known = np.isfinite(values[BASE][0]).astype(np.float64)
    notes = tuple(f"{name} is no change of weights: it acts as a hook beside the rounded ones" for name in beside)
    return Found(case.measures(metrics, values, known, case.facts), notes)


def _with_fewer_bits(suspect: Suspect, to: Callable[[Tensor], Tensor]) -> tuple[Suspect, bool]:
    """Return somebody with rounded weights, and whether the intervention was merged into them before."""
    merged = True
    try:
        edits = dense_edits(suspect.model, suspect.intervention)
    except LensUnlearnError:
        edits, merged = dense_edits(suspect.model, None), False
    updates = {}
    for matrix, edit in edits.items():
        weights = matrix_value(suspect.model, *matrix).to(edit.dtype)
        change = to(weights + edit) - weights
        if not bool(torch.isfinite(change).all()):  # an edit that breaks the model does so with any bits
            return suspect, merged
        updates[matrix] = Update(change)
    whole = Delta(updates)
    kept = suspect.intervention
    return Suspect(suspect.model, whole if merged or kept is None else Chain((kept, whole))), merged


ATTACK = Attack(
    name="quantization",
    run=quantization,
    words="4 bits",
    asks="Does the answer come back when the edited weights are rounded to 4 bits?",
    score="probability of the answer with weights of 4 bits, the geometric mean over its tokens",
    returns="comes back with weights of 4 bits",
)
