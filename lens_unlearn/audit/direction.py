"""One direction: how much of the tested facts comes back when a single vector is added.

The vector of a layer is the difference of means between the base's and the condition's residual stream at the prompt's last token,
over half of the facts, and is added to the condition from there on (Seyitoğlu et al., "Extracting Unlearned Information from LLMs
with Activation Steering", arXiv 2411.02631). The logits count as one more place behind the last layer: what only suppresses words
at the very end is undone there. Which place is best is decided on that half, and measured on the other, both ways round.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.audit.attack import ANSWERS, SCORE, Attack, Case, Found, Suspect, answered, curve, each_suspect
from lens_unlearn.audit.layers import require_shape, trace
from lens_unlearn.core.errors import CorpusError
from lens_unlearn.corpora.batching import rows_at_once
from lens_unlearn.evaluation.metric import Metric
from lens_unlearn.evaluation.report import BASE
from lens_unlearn.evaluation.teacher_forcing import Predicted
from lens_unlearn.interventions.base import Chain, HookFunction, Intervention, Live, Parts
from lens_unlearn.model.sites import Site

__all__ = ["ATTACK", "direction"]


@dataclass(frozen=True, eq=False)
class _Push(Intervention):
    """Add a vector behind a block, or to the logits, from the prompt's last token on."""

    vector: Tensor
    layer: int | None

    looks_at_rows = True

    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        return [] if self.layer is None else [(Site(self.layer, "resid"), self._pushed)]

    def finish(self, logits: Tensor, live: Live) -> Tensor:
        return self._pushed(logits, live) if self.layer is None else logits

    def _pushed(self, x: Tensor, live: Live) -> Tensor:
        rows = live.rows
        assert rows is not None
        rows = rows.beside(x)
        behind = rows.cached + torch.arange(rows.text.shape[1], device=x.device) >= rows.ends[:, None]
        return torch.where(behind[:, -x.shape[1] :, None], x + live.like(self.vector, x), x)

    def parts(self) -> Parts:
        raise CorpusError("a push belongs to one audit and is not saved: take the intervention that it was added to")


def direction(case: Case) -> Found:
    """Push everybody back towards the base by one vector, place by place.

    Raises:
        CorpusError: If the facts have no prompts, or are too few to find a direction in one half.
        ModelError: If the reference has another shape.
    """
    require_shape(case)
    if not case.facts.has_prompts:
        raise CorpusError(
            f"{case.facts.name} has no prompts, at whose ends a direction is found: read 'question>answer'"
        )
    halves, places = case.halves, range(case.n_layers + 1)
    base = _means(case, Suspect(case.model), halves)
    values: dict[str, list[np.ndarray]] = {}
    chosen: dict[str, set[int]] = {}
    for name, number, suspect in each_suspect(case, "direction"):
        same = suspect.model is case.model and suspect.intervention is None
        own = base if same else _means(case, suspect, halves)
        table = np.zeros((case.facts.n_documents, len(places) + 1))
        # Nothing is added to the base, nor below the first layer that differs: that is asked once.
        unpushed = functools.cache(functools.partial(answered, case, suspect, case.facts))
        for fit, (half, other) in enumerate((halves, halves[::-1])):
            # what was made impossible is not made possible by adding
            vectors = [torch.nan_to_num(base[fit][i] - own[fit][i], 0.0, 0.0, 0.0) for i in places]
            pushed = np.stack(
                [_pushed(case, suspect, v, i) if bool(v.any()) else unpushed() for i, v in enumerate(vectors)], axis=1
            )  # of all facts: by one half the place is chosen
            best = int(np.nan_to_num(pushed[half], nan=-1.0).mean(0).argmax())
            if not number and any(bool((base[fit][i] - own[fit][i]).any()) for i in places):
                chosen.setdefault(name, set()).add(best)
            table[other, :-1], table[other, -1] = pushed[other], pushed[other, best]
        values.setdefault(name, []).append(table)
    metrics: list[Metric] = curve("pushed", places, ANSWERS, unit="probability")
    metrics.append(Metric(SCORE, f"{ANSWERS}, pushed", unit="probability"))
    known = np.isfinite(values[BASE][0]).astype(np.float64)
    words = {place: f"layer {place}" if place < case.n_layers else "the logits" for place in places}
    found = "; ".join(
        f"{name} at {' and '.join(words[p] for p in sorted(c))}" for name, c in chosen.items() if name != BASE
    )
    notes = (f"places chosen on the other half: {found}",) if found else ()
    return Found(case.measures(metrics, values, known, case.facts), notes)


def _means(case: Case, suspect: Suspect, halves: tuple[list[int], list[int]]) -> list[list[Float[Tensor, "width"]]]:
    """Return for each half of the facts the mean at the prompt's last token behind every block, and of the logits."""
    side = torch.zeros(case.facts.n_documents, dtype=torch.long)
    side[torch.tensor(halves[1])] = 1
    sums: list[list[Any]] = [[0.0] * (case.n_layers + 1) for _ in halves]
    counts = [0, 0]
    with torch.no_grad():
        for batch in case.facts.batches(rows_at_once(suspect.model, case.facts, case.batch_size)):
            predicted, prefix = trace(case, suspect, batch)
            rows = torch.arange(len(batch.rows))
            at_ends = [prefix.stream(layer + 1)[rows, batch.prompt_ends] for layer in range(case.n_layers)]
            at_ends.append(_first_logits(predicted, len(rows)))
            whose = side[case.facts.document[batch.rows]]
            for half in (0, 1):
                mine = whose == half
                counts[half] += int(mine.sum())
                for place, value in enumerate(at_ends):
                    sums[half][place] = sums[half][place] + value[mine.to(value.device)].double().sum(0)
    return [[total / count for total in own] for own, count in zip(sums, counts, strict=True)]


def _first_logits(predicted: Predicted, rows: int) -> Float[Tensor, "rows vocabulary"]:
    """Return the logits that the first counted token of each row is predicted by."""
    first = torch.searchsorted(predicted.row.contiguous(), torch.arange(rows, device=predicted.row.device))
    return predicted.logits(first)  # type: ignore[arg-type]  # an index, as good as a slice


def _pushed(case: Case, suspect: Suspect, vector: Tensor, place: int) -> Float[np.ndarray, "facts"]:
    """Return the probability of every fact's answer when a vector is added at a place."""
    push = _Push(vector, place if place < case.n_layers else None)
    both = push if suspect.intervention is None else Chain((suspect.intervention, push))
    return answered(case, Suspect(suspect.model, both), case.facts)


ATTACK = Attack(
    name="direction",
    run=direction,
    words="one direction",
    asks="How much comes back when one vector, found on other facts, is added?",
    score="probability of the answer with one vector added, at the place that was best on other facts",
    returns="comes back with a single vector added",
    curves={"pushed": "probability of the answer with one vector added"},
)
