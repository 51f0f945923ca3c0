"""`generate`: what a model writes, with and without an intervention."""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, overload

import torch
from jaxtyping import Bool
from torch import Tensor

from lens_unlearn.core.counter_rng import key_of
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.interventions.base import Intervention, acting
from lens_unlearn.model.chat import check_messages, ends_of_text, is_conversation, require_chat
from lens_unlearn.model.finite import broken_logits, refuse_broken
from lens_unlearn.model.hooks import Remover, detach_all, on_logits, one_thread
from lens_unlearn.model.host import Model, device_of, require_eval, require_model
from lens_unlearn.model.shortcuts import shortcuts
from lens_unlearn.model.special_tokens import bos_token, encode, end_token, tokenizer_of, written_after

__all__ = ["Conversation", "generate"]


_FORESEEN = 64  # tokens of a text, where it may be longer: many end before
Conversation = Sequence[Mapping[str, Any]]
"""Turns, each with its "role" ("system", "user" or "assistant") and its "content"."""


@overload
def generate(  # type: ignore[overload-overlap]  # a string is a sequence of strings, too
    model: Model,
    prompts: str | Conversation,
    *,
    intervention: Intervention | None = ...,
    max_new_tokens: int = ...,
    temperature: float = ...,
    prepend_bos: bool | None = ...,
    chat: bool = ...,
    system: str | None = ...,
    use_cache: bool = ...,
    batch_size: int = ...,
    seed: int = ...,
) -> str: ...
@overload
def generate(
    model: Model,
    prompts: Sequence[str] | Sequence[Conversation],
    *,
    intervention: Intervention | None = ...,
    max_new_tokens: int = ...,
    temperature: float = ...,
    prepend_bos: bool | None = ...,
    chat: bool = ...,
    system: str | None = ...,
    use_cache: bool = ...,
    batch_size: int = ...,
    seed: int = ...,
) -> list[str]: ...
def generate(
    model: Model,
    prompts: str | Sequence[str] | Conversation | Sequence[Conversation],
    *,
    intervention: Intervention | None = None,
    max_new_tokens: int = 60,
    temperature: float = 0.0,
    prepend_bos: bool | None = None,
    chat: bool = False,
    system: str | None = None,
    use_cache: bool = True,
    batch_size: int = 16,
    seed: int = 0,
) -> str | list[str]:
    """Continue prompts, and return only what was added.

    A text ends at every end-of-text token that the tokenizer, the model's configuration or its `generation_config` names, as in
    transformers, and at the token that ends a turn in the tokenizer's chat template. Where an intervention abstains, its refusal
    is returned in place of a text, or of the assistant's turn.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` with a tokenizer.
        prompts: One or several texts; or one or several conversations, lists of turns with "role" and "content", which the
            assistant answers: they are written in the tokenizer's chat template. There is no padding, so the answers do not
            depend on one another: of prompts that are run together, the longer ones are read on while others are answered.
        intervention: Acts while the text is written; leave it out inside a `with` block.
        max_new_tokens: The longest continuation.
        temperature: 0 takes the most probable token at each step; above it, tokens are drawn.
        prepend_bos: Whether a prompt begins with BOS, once; default as `read_corpus` has it.
        chat: Whether a text is a turn of the user, which the assistant answers.
        system: The system's turn of every conversation that does not begin with one of its own.
        use_cache: Whether to keep keys and values between tokens; the greedy text is the same either way.
        batch_size: Prompts of about one length that are run together, at temperature 0.
        seed: Seeds the tokens that are drawn above temperature 0; the global random state is left as it was.

    Returns:
        The text added to one prompt, or what the assistant answers in one conversation; of several, a list in their order.

    Raises:
        CorpusError: If the model has no tokenizer, or for a conversation no chat template; if a conversation is none, or the
            template refuses it; if a prompt is empty, longer than the context, or holds a token that the model
            does not know; if BOS is wanted and there is none.
        ActivationError: If the model's logits are NaN or infinite; names the layer.
        LensUnlearnError: If there is nothing to write, or no such temperature.
    """
    require_model(model)
    require_eval(model)
    rows = _encoded(model, prompts, prepend_bos, chat, system)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "use_cache": use_cache}
    written = continue_rows(model, rows, intervention, batch_size=batch_size, seed=seed, **options)
    require_unbroken(model, rows, written, intervention)
    texts = [one.text for one in written]
    return texts[0] if isinstance(prompts, str) or is_conversation(prompts) else texts


def _encoded(
    model: Model, prompts: str | Sequence[Any], prepend_bos: bool | None, chat: bool, system: str | None
) -> list[list[int]]:
    """Return the tokens of each prompt."""
    tokenizer = tokenizer_of(model, "text cannot be generated")
    given: list[Any] = [prompts] if isinstance(prompts, str) or is_conversation(prompts) else list(prompts)
    if not chat and all(isinstance(one, str) for one in given):
        if system is not None:
            raise CorpusError("system is the system's turn of conversations: give chat=True as well, or leave it out")
        bos = bos_token(model, prepend_bos)
        return [encode(tokenizer, text, bos) for text in given]
    if prepend_bos is not None:
        raise CorpusError("prepend_bos cannot be given for conversations: the chat template says it; leave it out")
    return [encode(tokenizer, chat_prompt(model, one, system), None) for one in given]


def chat_prompt(model: Model, prompt: str | Conversation, system: str | None = None) -> str:
    """Return what a model is given of a conversation, or of a turn of the user: up to where the assistant's turn begins.

    Raises:
        CorpusError: If there is no chat template, or it refuses the conversation; if that is none, or has its answer.
    """
    turns = check_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, system)
    if turns[-1]["role"] != "user":
        raise CorpusError(
            f"the last turn of a conversation is the {turns[-1]['role']}'s, and nothing is asked: end it with a turn of the user"
        )
    return require_chat(model).write(turns, answering=True)


def require_unbroken(
    model: Model, rows: Sequence[Sequence[int]], written: Sequence["Written"], intervention: Intervention | None = None
) -> None:
    """Refuse a model that wrote something from logits that are no numbers.

    Raises:
        ActivationError: If so; names the layer.
    """
    for ids, one in zip(rows, written, strict=True):
        if one.broken:
            with nullcontext() if intervention is None else intervention.on(model):
                refuse_broken(model, torch.tensor([*ids, *one.ids]))


@dataclass(frozen=True)
class Written:
    """What was added to one prompt."""

    text: str
    abstained: bool
    cut: bool = False
    """Whether it ended only where no more tokens were allowed, or the context was full."""
    broken: bool = False
    """Whether logits were NaN or infinite while it was written."""
    ids: tuple[int, ...] = ()
    """The tokens, up to the one that ended it or at which logits broke."""


def continue_rows(
    model: Model,
    rows: Sequence[Sequence[int]],
    intervention: Intervention | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    use_cache: bool = True,
    batch_size: int = 16,
    seed: int = 0,
    stop: Sequence[int] = (),
) -> list[Written]:
    """Continue rows of token ids; `generate` for what is tokenized already.

    A text may also end with a token of `stop`. With `top_p` below 1, tokens are drawn from the fewest most probable ones that have
    this share of the probability together.
    """
    if max_new_tokens < 1:
        raise LensUnlearnError(f"max_new_tokens={max_new_tokens} leaves nothing to write: at least 1")
    if batch_size < 1:
        raise LensUnlearnError(f"batch_size={batch_size} is too small: at least 1")
    if not 0 <= temperature < math.inf:
        raise LensUnlearnError(f"temperature={temperature} is no temperature: 0 for the most probable token, or above")
    if not 0 < top_p <= 1:
        raise LensUnlearnError(f"top_p={top_p} is no share of the probability: above 0, at most 1")
    tokenizer, context = model.tokenizer, int(model.cfg.n_ctx)
    of_text = ends_of_text(model)
    ends = {*of_text, *stop}
    if (
        ends and end_token(model) is None
    ):  # rows that end before others are filled with a token that this model may not know
        batch_size = 1
    for ids in rows:
        if not 0 < len(ids) < context:
            start = repr(tokenizer.decode(list(ids))[:40])
            raise CorpusError(f"a prompt of {len(ids)} tokens does not fit a context of {context}: {start}")
        if max(ids) >= int(model.cfg.d_vocab):
            unknown = tokenizer.convert_ids_to_tokens(int(max(ids)))
            raise CorpusError(
                f"a prompt holds {unknown!r}, which the tokenizer knows and the model does not: leave it out"
            )
    written: dict[int, Written] = {}
    refusals: dict[int, dict[int, str | None]] = defaultdict(dict)  # by intervention that acts, then by row
    device, drawn = device_of(model), Counter[tuple[int, ...]]()
    forked = [device] if device.type == "cuda" else []
    # Without an intervention of its own, it writes under that of the thread that started this one, if there is one.
    entered = one_thread(model, joining=True) if intervention is None else intervention.on(model)
    with entered, _noticing_broken(model) as (breaks, given), shortcuts(model), torch.random.fork_rng(devices=forked):
        # What an intervention decides at the end of a prompt, it decides for all rows of a pass at one place.
        apart = any(live.intervention.looks_at_rows for live in acting(model))
        for group in _groups(rows, 1 if temperature > 0 else batch_size, 0 if apart else max_new_tokens, ends):
            breaks.clear()
            width = min(len(rows[i]) for i in group)
            longest = max(len(rows[i]) for i in group)
            tokens = torch.tensor([list(rows[i][:width]) for i in group], device=device)
            given[:] = [list(rows[i][width:]) for i in group]
            if temperature > 0:  # draws of its own for each prompt, and for each time it is asked
                ids = tuple(rows[group[0]])
                torch.manual_seed(key_of("generate", seed, ids, drawn[ids]))
                drawn[ids] += 1
            for live in acting(model):
                live.expect(None, stop)
            with torch.no_grad():
                out = model.generate(
                    tokens,
                    max_new_tokens=min(longest + max_new_tokens, context) - width,
                    do_sample=temperature > 0,
                    temperature=temperature or 1.0,
                    top_p=top_p if temperature > 0 and top_p < 1 else None,
                    use_past_kv_cache=use_cache,
                    stop_at_eos=bool(ends),
                    eos_token_id=sorted(ends) or None,
                    return_type="tokens",
                    verbose=False,
                )
            for place, i in enumerate(group):
                for live in acting(model):
                    refusals[id(live)][i] = live.refusal(place)
                refusal = next((texts[i] for texts in refusals.values() if texts[i] is not None), None)
                if refusal is not None:
                    written[i] = Written(refusal, abstained=True)
                    continue
                before = len(rows[i]) - width  # steps at which this row was still given its own tokens
                new = out[place, width + before :][: min(max_new_tokens, context - len(rows[i]))].tolist()
                over = next((at for at, token in enumerate(new) if token in ends), None)
                # What ended the text is no part of it, but for a token of `stop`, whose text may go on before the line break.
                kept = new if over is None else new[: over + (new[over] not in of_text)]
                until = len(new) if over is None else over + 1
                broken = next(
                    (step for step, rows_at in enumerate(breaks[before:][:until]) if bool(rows_at[place])), None
                )
                kept = kept[:broken]
                text = written_after(tokenizer, rows[i], kept)
                written[i] = Written(text, False, over is None, broken is not None, tuple(kept))
        for live in acting(model):
            live.tell([refusals[id(live)][i] for i in range(len(rows))])
    return [written[i] for i in range(len(rows))]


def _groups(rows: Sequence[Sequence[int]], most: int, new: int, ends: Collection[int]) -> list[list[int]]:
    """Return which rows are run together: those of one length, and of others up to half of the steps that are to come.

    There is no padding: a group begins with as many tokens as its shortest row has, and the others are given theirs on the way.
    So a token that would end a text must not stand among these.

    Args:
        rows: The tokens.
        most: Rows of a group.
        new: Tokens that are to be written; 0 keeps lengths apart.
        ends: Tokens that end a text.
    """
    groups: list[list[int]] = []
    spread = min(new, _FORESEEN) // 2
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])) if most > 1 else range(len(rows)):
        shortest = len(rows[groups[-1][0]]) if groups else 0
        more = rows[i][shortest:]
        if groups and len(groups[-1]) < most and len(more) <= spread and not set(ends).intersection(more):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@contextmanager
def _noticing_broken(model: Model) -> Iterator[tuple[list[Bool[Tensor, "batch"]], list[list[int]]]]:
    """Note in which rows the logits of each step are no numbers, and put zeros there, so that the other rows go on.

    Yields:
        The rows at each step, and a list to be filled with the tokens that each row is given at its first steps.
    """
    steps: list[Tensor] = []
    given: list[list[int]] = []

    def look(logits: Tensor) -> Tensor:
        broken = broken_logits(logits[:, -1])
        steps.append(broken)
        logits = torch.where(broken[:, None, None], 0, logits) if bool(broken.any()) else logits
        forced = [(place, row[len(steps) - 1]) for place, row in enumerate(given) if len(row) >= len(steps)]
        if forced:
            logits = logits.clone()
            for place, token in forced:
                logits[place, -1] = 0
                logits[place, -1, token] = 1
        return logits

    removers: list[Remover] = []
    try:
        on_logits(model, look, removers)
        yield steps, given
    finally:
        detach_all(removers)
