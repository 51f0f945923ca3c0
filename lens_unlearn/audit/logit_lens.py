"""Logit lens: what the base's final norm and unembedding read from each layer of a suspect.

nostalgebraist, "interpreting GPT: the logit lens" (2020). At each layer the mean log-probability of the answer's tokens, and their
rank; what is lost of the base's, beside what the reference loses, is scored as depth is: see `layers.calibrated`.
"""

import torch
from torch import Tensor

from lens_unlearn.audit.attack import Attack, Case, Found
from lens_unlearn.audit.layers import Trace, by_layer
from lens_unlearn.evaluation.teacher_forcing import Predicted
from lens_unlearn.model.replay import Prefix

__all__ = ["ATTACK", "logit_lens"]


def logit_lens(case: Case) -> Found:
    """Read everybody's residual stream through the base's final norm and unembedding, layer by layer.

    Raises:
        ModelError: If the reference has another shape.
    """
    more = (
        ("log_probability", "log-probability of the answer, nats per token"),
        ("rank", "rank of the answer's tokens"),
    )
    return by_layer(case, _read, "loss", "answer's log-probability lost in the lens", more, "logit lens")


def _read(base: Trace, other: Prefix, layer: int) -> dict[str, Tensor]:
    last, theirs = base.case.n_layers - 1, base.like(other.stream(layer + 1))
    if layer not in base.read:
        base.read[layer] = base.passed_on(last, base.prefix.stream(layer + 1)).nll()
    seen = base.passed_on(last, theirs)  # of the base's blocks nothing is left in it
    nll = seen.nll()
    return {"loss": nll - base.read[layer], "log_probability": -nll, "rank": _ranks(seen)}


def _ranks(predicted: Predicted) -> Tensor:
    found = []
    for part in predicted.slices:
        logits, target = predicted.logits(part), predicted.target[part]
        found.append((logits > logits.gather(1, target[:, None])).sum(1) + 1)
    return torch.cat(found)


ATTACK = Attack(
    name="logit_lens",
    run=logit_lens,
    words="logit lens",
    asks="At which layers can the answer be read off the residual stream by the unedited model's own unembedding?",
    score="share of what a model that never saw the facts lacks in the lens that is lacking, weighted over layers",
    returns="is still read by the logit lens",
    curves={
        "log_probability": "log-probability of the answer in the lens, nats per token",
        "rank": "rank of the answer's tokens in the lens",
        "loss": "log-probability lost in the lens, nats per token",
    },
)
