"""`generate`: what a model writes, with and without an intervention."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from lens_unlearn.errors import CorpusError, LensUnlearnError
from lens_unlearn.interventions import Intervention
from lens_unlearn.sites import Model, device_of, require_eval

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
    seed: int = 0,
) -> list[str]:
    """Continue prompts, and return only what was added.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` with a tokenizer.
        prompts: One or several texts. Each is run for itself, so the answers do not depend on one another.
        intervention: Acts while the text is written; leave it out inside a `with` block.
        max_new_tokens: The longest continuation.
        temperature: 0 takes the most probable token at each step; above it, tokens are drawn.
        prepend_bos: Whether the prompt begins with BOS; default as the model was trained.
        use_cache: Whether to keep keys and values between tokens; the greedy text is the same either way.
        seed: Of the draws; the global random state is left as it was.

    Raises:
        CorpusError: If the model has no tokenizer, or a prompt is empty or longer than the context.
    """
    require_eval(model)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise CorpusError("this model has no tokenizer: text cannot be generated")
    if max_new_tokens < 1:
        raise LensUnlearnError(f"max_new_tokens={max_new_tokens} leaves nothing to write: at least 1")
    bos = bool(getattr(model.cfg, "default_prepend_bos", True)) if prepend_bos is None else prepend_bos
    head = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []
    texts: list[str] = []
    with nullcontext() if intervention is None else intervention.on(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            ids = head + tokenizer(prompt, add_special_tokens=False)["input_ids"]
            room = int(model.cfg.n_ctx) - len(ids)
            if not ids or room < 1:
                raise CorpusError(
                    f"a prompt of {len(ids)} tokens does not fit a context of {model.cfg.n_ctx}: {prompt[:40]!r}"
                )
            with torch.no_grad():
                out = model.generate(
                    torch.tensor([ids], device=device_of(model)),
                    max_new_tokens=min(max_new_tokens, room),
                    do_sample=temperature > 0,
                    temperature=temperature or 1.0,
                    use_past_kv_cache=use_cache,
                    stop_at_eos=tokenizer.eos_token_id is not None,
                    return_type="tokens",
                    verbose=False,
                )
            texts.append(tokenizer.decode(out[0, len(ids) :].tolist(), skip_special_tokens=True))
    return texts
