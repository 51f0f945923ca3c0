"""`generate`: what a model writes, with and without an intervention."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lens_unlearn.core.counter_rng import key_of
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.interventions.base import Intervention, acting
from lens_unlearn.model.hooks import one_thread
from lens_unlearn.model.host import Model, device_of, require_eval, require_model
from lens_unlearn.model.shortcuts import shortcuts

__all__ = ["generate"]


def generate(
    model: Model,
    prompts: str | Sequence[str],
    *,
    intervention: Intervention | None = None,
    max_new_tokens: int = 60,
    temperature: float = 0.0,
    prepend_bos: bool | None = None,
    use_cache: bool = True,
    batch_size: int = 16,
    seed: int = 0,
) -> list[str]:
    """Continue prompts, and return only what was added.

    Where an intervention abstains, its refusal is returned in place of a text.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` with a tokenizer.
        prompts: One or several texts. Each is run for itself, or beside prompts of the same length: there is no padding,
            so the answers do not depend on one another.
        intervention: Acts while the text is written; leave it out inside a `with` block.
        max_new_tokens: The longest continuation.
        temperature: 0 takes the most probable token at each step; above it, tokens are drawn.
        prepend_bos: Whether the prompt begins with BOS; default as the model was trained.
        use_cache: Whether to keep keys and values between tokens; the greedy text is the same either way.
        batch_size: Prompts of one length that are run together, at temperature 0.
        seed: Of the draws; the global random state is left as it was.

    Raises:
        CorpusError: If the model has no tokenizer, or a prompt is empty or longer than the context.
    """
    require_model(model)
    require_eval(model)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise CorpusError("this model has no tokenizer: text cannot be generated")
    bos = bool(getattr(model.cfg, "default_prepend_bos", True)) if prepend_bos is None else prepend_bos
    head = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    rows = [head + tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "use_cache": use_cache}
    written = continue_rows(model, rows, intervention, batch_size=batch_size, seed=seed, **options)
    return [one.text for one in written]


@dataclass(frozen=True)
class Written:
    """What was added to one prompt."""

    text: str
    abstained: bool


def continue_rows(
    model: Model,
    rows: Sequence[Sequence[int]],
    intervention: Intervention | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    use_cache: bool = True,
    batch_size: int = 16,
    seed: int = 0,
    stop: Sequence[int] = (),
) -> list[Written]:
    """Continue rows of token ids; `generate` for what is tokenized already. A text may also end with a token of `stop`."""
    if max_new_tokens < 1:
        raise LensUnlearnError(f"max_new_tokens={max_new_tokens} leaves nothing to write: at least 1")
    if batch_size < 1:
        raise LensUnlearnError(f"batch_size={batch_size} is too small: at least 1")
    tokenizer, context = model.tokenizer, int(model.cfg.n_ctx)
    ends = [*_end_tokens(model), *stop]
    for ids in rows:
        if not 0 < len(ids) < context:
            start = repr(tokenizer.decode(list(ids))[:40])
            raise CorpusError(f"a prompt of {len(ids)} tokens does not fit a context of {context}: {start}")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i])) if temperature == 0 else range(len(rows))
    groups: list[list[int]] = []
    for i in order:
        together = bool(groups) and temperature == 0 and len(rows[groups[-1][0]]) == len(rows[i])
        if together and len(groups[-1]) < batch_size:
            groups[-1].append(i)
        else:
            groups.append([i])
    written: dict[int, Written] = {}
    refusals: dict[int, dict[int, str | None]] = defaultdict(dict)  # by intervention that acts, then by row
    device, drawn = device_of(model), Counter[tuple[int, ...]]()
    forked = [device] if device.type == "cuda" else []
    # Without an intervention of its own, it writes under that of the thread that started this one, if there is one.
    entered = one_thread(model, joining=True) if intervention is None else intervention.on(model)
    with entered, shortcuts(model), torch.random.fork_rng(devices=forked):
        for group in groups:
            tokens = torch.tensor([list(rows[i]) for i in group], device=device)
            width = tokens.shape[1]
            if temperature > 0:  # draws of its own for each prompt, and for each time it is asked
                ids = tuple(rows[group[0]])
                torch.manual_seed(key_of("generate", seed, ids, drawn[ids]))
                drawn[ids] += 1
            for live in acting(model):
                live.expect(None, stop)
            with torch.no_grad():
                out = model.generate(
                    tokens,
                    max_new_tokens=min(max_new_tokens, context - width),
                    do_sample=temperature > 0,
                    temperature=temperature or 1.0,
                    use_past_kv_cache=use_cache,
                    stop_at_eos=bool(ends),
                    eos_token_id=ends or None,
                    return_type="tokens",
                    verbose=False,
                )
            for place, i in enumerate(group):
                for live in acting(model):
                    refusals[id(live)][i] = live.refusal(place)
                refusal = next((texts[i] for texts in refusals.values() if texts[i] is not None), None)
                text = tokenizer.decode(out[place, width:].tolist(), skip_special_tokens=True)
                written[i] = Written(text if refusal is None else refusal, refusal is not None)
        for live in acting(model):
            live.tell([refusals[id(live)][i] for i in range(len(rows))])
    return [written[i] for i in range(len(rows))]


def _end_tokens(model: Model) -> list[int]:
    """Return the tokens that end a text: the tokenizer's, or those that TransformerLens knows of a chat model."""
    known = getattr(model.cfg, "eos_token_id", None)
    known = model.tokenizer.eos_token_id if known is None else known
    return [] if known is None else [known] if isinstance(known, int) else list(known)
