"""Whether what was unlearned is gone: attacks that look for it, one a file, and the table of them, `ATTACKS`.

Knows interventions, their controls, and how answers are measured; knows nothing of how a result is drawn or written.
"""

from collections.abc import Sequence

from lens_unlearn.audit import depth, direction, logit_lens, membership, probe, prompts, quantization, relearning
from lens_unlearn.audit.attack import Attack
from lens_unlearn.core.errors import LensUnlearnError

__all__ = ["ATTACKS", "attacks_of"]

ATTACKS: tuple[Attack, ...] = (
    depth.ATTACK,
    logit_lens.ATTACK,
    probe.ATTACK,
    prompts.ATTACK,
    quantization.ATTACK,
    relearning.ATTACK,
    direction.ATTACK,
    membership.ATTACK,
)
"""Every attack, in the order of tables and pages. A new one is a file of its own, and a line here."""


def attacks_of(chosen: Sequence[str | Attack] | None) -> tuple[Attack, ...]:
    """Return attacks by their names, or as they are; all for None.

    Raises:
        LensUnlearnError: If there is none of that name, none at all, or two have one name.
    """
    if chosen is None:
        return ATTACKS
    known = {attack.name: attack for attack in ATTACKS}
    found = []
    for one in [chosen] if isinstance(chosen, str | Attack) else chosen:
        if isinstance(one, Attack):
            found.append(one)
        elif one in known:
            found.append(known[one])
        else:
            raise LensUnlearnError(f"there is no attack {one!r}: choose from {', '.join(known)}")
    if len({one.name for one in found}) < len(found) or not found:
        raise LensUnlearnError(f"attacks={chosen!r} name none, or one twice: choose from {', '.join(known)}")
    return tuple(found)
