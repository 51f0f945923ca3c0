"""Depth by patching: at which layers the suspect still holds what the base needs for the answer.

The Unlearning Depth Score of "Measuring the Depth of LLM Unlearning via Activation Patching" (arXiv 2605.24614). With y the
answer's tokens and s_t their log-probability under the base: the residual stream behind block l is replaced by the suspect's at
the positions that predict y, the base goes on from there, and D_l = mean_t (s_t - s_t, patched). What the reference loses so, at
the layers where that is more than 0.05 nats, is the yardstick: see `layers.calibrated`.
"""

import torch
from torch import Tensor

from lens_unlearn.audit.attack import Attack, Case, Found
from lens_unlearn.audit.layers import Trace, by_layer
from lens_unlearn.model.replay import Prefix

__all__ = ["ATTACK", "depth"]


def depth(case: Case) -> Found:
    """Patch everybody's residual stream into the base, layer by layer.

    It costs a pass of everybody, and for each layer the base's pass from there on; logits are computed of the answers only.

    Raises:
        ModelError: If the reference has another shape.
    """
    return by_layer(case, _lost, "drop", "answer's log-probability lost when patched", (), "depth")


def _lost(base: Trace, other: Prefix, layer: int) -> dict[str, Tensor]:
    nll = base.predicted.nll()
    if other is base.prefix:
        return {"drop": torch.zeros_like(nll)}
    own, theirs = base.prefix.stream(layer + 1), base.like(other.stream(layer + 1))
    where = torch.zeros(own.shape[:2], dtype=torch.bool)
    where[:, : base.batch.counted.shape[1] - 1] = base.batch.counted[:, 1:]
    patched = base.passed_on(layer, torch.where(where.to(own.device)[..., None], theirs, own))
    return {"drop": patched.nll() - nll}


ATTACK = Attack(
    name="depth",
    run=depth,
    words="patching",
    asks="At which layers does the residual stream still hold what the unedited model needs for the answer?",
    score="share of what a model that never saw the facts lacks that is lacking, weighted over layers: 0 intact, 1 absent",
    returns="is still found by patching",
    curves={"drop": "log-probability of the answer lost, nats per token"},
)
