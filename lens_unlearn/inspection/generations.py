"""`generations`: what a model writes to prompts, with and without interventions.

    lu.generations(model, prompts, {"pruned": prune})

Knows how prompts are put to several conditions; knows nothing of decoding, which is `evaluation.generation`, or of drawing, which
is `figures.generations`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.evaluation.generation import Conversation, generate
from lens_unlearn.evaluation.report import BASE
from lens_unlearn.inspection.shown import Shown, named_conditions, shortened
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.model.chat import is_conversation
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.loading import model_name

__all__ = ["Generations", "generations"]


@dataclass(frozen=True, eq=False)
class Generations(Shown):
    """What a model writes to prompts, under each condition."""

    prompts: tuple[str, ...]
    written: Mapping[str, tuple[str, ...]]
    """By condition, in the order of the prompts."""
    about: str = ""
    """Model and settings."""

    def to_frame(self) -> pd.DataFrame:
        """Give one row per prompt and condition: prompt, condition, text."""
        import pandas as pd

        rows = [
            (prompt, name, texts[number])
            for number, prompt in enumerate(self.prompts)
            for name, texts in self.written.items()
        ]
        return pd.DataFrame(rows, columns=["prompt", "condition", "text"])

    def html(self) -> str:
        """Return what `lens_unlearn.plot.generations` draws of it."""
        from lens_unlearn.figures.generations import generations  # only here does a value reach up to what draws it

        return generations(self)

    def __repr__(self) -> str:
        return f"Generations({len(self.prompts):,} prompts: {shortened(tuple(self.written))})"


def generations(
    model: Model,
    prompts: str | Sequence[str] | Conversation | Sequence[Conversation],
    conditions: Mapping[str, Intervention | None],
    *,
    max_new_tokens: int = 60,
    temperature: float = 0.0,
    prepend_bos: bool | None = None,
    chat: bool = False,
    system: str | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Generations:
    """Continue prompts under several conditions, side by side; `generate` says what the options mean.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` with a tokenizer.
        prompts: One or several texts, or one or several conversations, which the assistant answers.
        conditions: By name: an intervention, or None. The model as it is here always comes first, as "base".
        max_new_tokens: The longest continuation.
        temperature: 0 takes the most probable token at each step; above it, tokens are drawn.
        prepend_bos: Whether a prompt begins with BOS, once; default as `read_corpus` has it.
        chat: Whether a text is a turn of the user.
        system: The system's turn of conversations that have none.
        batch_size: Prompts of about equal length that are run together, at temperature 0.
        seed: Seeds the tokens that are drawn above temperature 0, the same for every condition.

    Raises:
        LensUnlearnError: If a condition is no intervention, or "base" is one.
        CorpusError: If there is no prompt, the model has no tokenizer, or a prompt is empty or longer than the context.
    """
    require_model(model)
    given: tuple[Any, ...] = (prompts,) if isinstance(prompts, str) or is_conversation(prompts) else tuple(prompts)
    for number, prompt in enumerate(given):
        if not prompt:
            raise CorpusError(f"prompt {number} is empty: give a text to continue")
    if not given:
        raise CorpusError("there is no prompt: give at least one")
    written: dict[str, tuple[str, ...]] = {}
    for name, intervention in named_conditions(conditions).items():
        if intervention is None and written:  # a second name for the unedited model
            written[name] = written[BASE]
            continue
        written[name] = tuple(
            generate(
                model,
                given,
                intervention=intervention,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                prepend_bos=prepend_bos,
                chat=chat,
                system=system,
                batch_size=batch_size,
                seed=seed,
            )
        )
    decoding = f"temperature {temperature:g}, seed {seed}" if temperature > 0 else "the most probable tokens"
    shown = tuple(one if isinstance(one, str) else _as_text(one) for one in given)
    return Generations(shown, written, f"{model_name(model)} · {decoding}, at most {max_new_tokens:,}")


def _as_text(conversation: Conversation) -> str:
    """Write a conversation as it is shown."""
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in conversation)
