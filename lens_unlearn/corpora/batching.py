"""How many tokens a forward pass is given at a time, unless that is said: as many as a model runs fastest with here.

Knows models and corpora; knows nothing of what is read out of the passes.
"""

# On a processor, a batch that outgrows the caches costs up to twice the time per token; on a GPU, one that does not fill it does.
# The best size depends on both, so it is measured where there is enough work to be worth it. It is counted in tokens, since rows
# may be of any length. Results depend on it by rounding alone; so that a run that goes on after an interruption has the same
# digits, what it measured is kept with it (`batch_tokens`, `use_batch_tokens`).

import time
import weakref
from collections.abc import Mapping

import torch

from lens_unlearn.core import distributed
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.model.hooks import backbone, one_thread
from lens_unlearn.model.host import Model, device_of
from lens_unlearn.model.shortcuts import shortcuts

__all__ = ["batch_tokens", "rows_at_once", "use_batch_tokens"]

UNMEASURED: Mapping[str, int] = {"cpu": 1024}
"""Tokens at a time where nothing was measured, by device; 4,096 elsewhere."""
_SIZES = (256, 512, 1024, 2048, 4096)
_LARGER = (8192, 16384, 32768)
"""Tried as well elsewhere than on a processor."""
_WORTH = 60_000
"""Tokens of work from which on measuring, which runs about 5,000, pays."""
_AS_GOOD = 1.05
"""A larger size is taken if its time per token is within this factor of the best."""

_used: "weakref.WeakKeyDictionary[Model, int]" = weakref.WeakKeyDictionary()


def rows_at_once(model: Model, corpus: Corpus, batch_size: int | None, *, passes: int = 1) -> int:
    """Return how many rows of full length a forward pass is given: as asked for, or as many as the model runs fastest with.

    Args:
        model: The model.
        corpus: What it is to be run on.
        batch_size: As asked for.
        passes: How often it will be: whether measuring is worth it depends on that.
    """
    if batch_size is not None:
        return batch_size
    longest = min(corpus.window, int(corpus.starts.diff().max())) if corpus.n_rows else 1
    return max(1, batch_tokens(model, corpus, passes=passes) // longest)


def batch_tokens(model: Model, corpus: Corpus, *, passes: int = 1) -> int:
    """Return how many tokens a model is given at a time, measured if that was not done before and pays."""
    if model in _used:
        return _used[model]
    if len(corpus.tokens) * passes < _WORTH:
        return UNMEASURED.get(device_of(model).type, 4096)
    # Of several processes all have to cut their texts alike.
    _used[model] = distributed.from_first(lambda: _fastest(model, corpus))
    return _used[model]


def use_batch_tokens(model: Model, tokens: int) -> None:
    """Give a model so many tokens at a time from now on, instead of measuring."""
    _used[model] = tokens


def _fastest(model: Model, corpus: Corpus) -> int:
    """Run a few batches of several sizes, and return the largest of those with the least time per token."""
    device = device_of(model)
    lengths = corpus.starts.diff()
    order = torch.sort(lengths, descending=True, stable=True).indices.tolist()
    times: dict[int, float] = {}
    with one_thread(model), torch.no_grad(), shortcuts(model):
        for number, size in enumerate((_SIZES[0], *_SIZES, *(() if device.type == "cpu" else _LARGER))):
            rows = order[: max(1, size // int(lengths[order[0]]))]
            tokens = corpus.take(rows).tokens
            if number > 1 and tokens.numel() * 2 <= size:  # there is no more text
                break
            try:
                begin = _now(device)
                backbone(model, tokens)
                spent = (_now(device) - begin) / tokens.numel()
            except torch.OutOfMemoryError:
                break
            if number:  # the first pass is for warming up
                times[size] = spent
            if number > 2 and spent > 1.3 * min(times.values()):
                break
    best = min(times.values())
    return max(size for size, spent in times.items() if spent <= _AS_GOOD * best)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
