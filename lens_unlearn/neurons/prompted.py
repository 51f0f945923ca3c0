"""`Prompted`: what a corpus of prompts left behind, for methods that look at the prompt and act on what follows.

Knows two statistics; knows nothing of methods.
"""

from dataclasses import dataclass

from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.moments import Moments

__all__ = ["Prompted"]


@dataclass(frozen=True)
class Prompted:
    """The keys at the ends of a corpus's prompts, and the moments of what follows."""

    of_prompts = True

    keys: KeySample
    """At `mlp.post` of the layers where a detector may look."""
    moments: Moments
    """At `mlp.post` behind them at least, over the counted tokens."""
