"""The sums of `Moments` inside routed experts, from the pairs of tokens and experts alone.

Knows routed values and which tokens count; knows nothing of what becomes of the sums.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_unlearn.core.errors import ActivationError
from lens_unlearn.model.routed import Routed
from lens_unlearn.model.sites import Site

__all__ = ["routed_sums"]


def routed_sums(
    site: Site, routed: Routed, counted: Bool[Tensor, "tokens"], extra: Sequence[str]
) -> tuple[Float[Tensor, "statistics experts columns"], Float[Tensor, "2 experts"]]:
    """Return the sums of one batch about 0, in the rows of `Moments`, and each expert's counted tokens and their gates' sum.

    About 0, where the values at most tokens are; in float64, in which the digits of a standard deviation do not cancel, and gate
    times key is not rounded once more.

    Raises:
        ActivationError: If a counted value is NaN or infinite; names the neuron.
    """
    pairs = counted.to(routed.device)[routed.token].nonzero()[:, 0]
    pairs = pairs[torch.argsort(routed.expert[pairs], stable=True)]
    key, gates, expert = routed.key.detach(), routed.gate.detach().double(), routed.expert[pairs]
    sizes = torch.bincount(expert, minlength=routed.experts)
    rows = 5 + ("sqrt" in extra) + 2 * ("extrema" in extra)
    sums = key.new_zeros(rows, routed.experts, routed.columns, dtype=torch.float64)
    every = int(counted.sum())
    for number, places in enumerate(pairs.split(sizes.tolist())):
        if not len(places):
            continue
        # With gates that are not negative each sum over gate times key is a product of a vector of gates with a matrix of keys.
        part, gate = key[places].double(), gates[places] if routed.weighted else torch.ones_like(gates[places])
        if bool((gate < 0).any()):
            part, gate = part * gate[:, None], torch.ones_like(gate)
        one = sums[:, number]
        torch.mv(part.T, gate, out=one[1])
        above = part.clamp_min(0)
        torch.mv(above.T, gate, out=one[3])
        torch.mv(above.sign_().T, (gate > 0).double(), out=one[4])
        if "sqrt" in extra:
            torch.mv(part.abs().sqrt_().T, gate.sqrt(), out=one[5])
        if "extrema" in extra:
            values, zero = part * gate[:, None], math.inf if len(places) == every else 0.0
            one[-2], one[-1] = values.amin(0).clamp_max(zero), values.amax(0).clamp_min(-zero)
        torch.mv(part.square_().T, gate.square(), out=one[2])
    if not bool(torch.isfinite(sums).all()):
        _refuse(site, routed.values.detach()[pairs], expert)
    of_experts = torch.zeros_like(sizes, dtype=torch.float64).index_add_(0, expert, gates[pairs])
    return sums.cpu(), torch.stack([sizes.double(), of_experts]).cpu()


def _refuse(site: Site, values: Float[Tensor, "pairs columns"], expert: Tensor) -> None:
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        row, column = (int(i) for i in bad[0])
        raise ActivationError(
            f"{site}[{int(expert[row])}, {column}] is {float(values[row, column])}: the model overflows or is broken there; "
            "try a wider dtype, or look at that text"
        )
