"""`reading_once`: a `with` block in which what several methods collect over the same texts is collected once.

Knows statistics by site, and over which corpus each was collected; knows nothing of models but whether something acts on them.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from lens_unlearn.core.errors import LensUnlearnError, SiteError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.model.host import Model
from lens_unlearn.model.sites import Site, extra_points, resolve
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.moments import Moments

__all__ = ["Memory", "memory_of", "reading_once"]


class Memory:
    """What was collected so far, by model, corpus and kind of statistic."""

    def __init__(self, together: Collection[str]) -> None:
        self.together = tuple(together)
        self._known: dict[Any, tuple[Any, set[Site]]] = {}

    def collect(
        self, model: Model, corpus: Corpus, sites: Any, statistic: Any, settings: Any, read: Callable[[list[Site]], Any]
    ) -> Any:
        """Return a statistic at some sites: as it is known, and read where it is not.

        Args:
            model: The model.
            corpus: The corpus.
            sites: As `collect` takes them.
            statistic: An empty one.
            settings: What else decides the result.
            read: Collects at some sites.
        """
        wanted = list(resolve(model, sites))
        key = (id(model), corpus.fingerprint, *_settings_of(statistic), settings)
        known, seen = self._known.get(key, (None, set()))
        missing = [site for site in wanted if site not in seen]
        if missing:
            found, read_now = self._read(
                model, missing, seen, read, isinstance(statistic, Moments) and not statistic.extra
            )
            known = found if known is None else _at(known, found.state() | known.state())
            self._known[key] = known, seen | set(read_now)
        names = set(wanted)
        state = {name: part for name, part in known.state().items() if Site.parse(name.rpartition(".")[0]) in names}
        return _at(known, state)

    def _read(
        self, model: Model, missing: list[Site], seen: set[Site], read: Callable[[list[Site]], Any], together: bool
    ) -> tuple[Any, list[Site]]:
        """Read some sites, and those that are wanted together with them, unless these cannot be read; return which were."""
        beside: list[Site] = []
        with suppress(SiteError):
            beside = [site for kind in self.together if together for site in resolve(model, kind)]
        more = [site for site in beside if site not in seen and site not in missing]
        if more:
            # What cannot be read for a later method is that method's error, and not the one of whoever reads now.
            with suppress(LensUnlearnError):
                return read([*missing, *more]), [*missing, *more]
        return read(missing), missing


def _at(statistic: Any, state: dict[str, Any]) -> Any:
    """Return a statistic of the same settings and texts with another state."""
    made = statistic.fresh().with_state(state)
    made.provenance = dict(statistic.provenance)
    return made


def _settings_of(statistic: Moments | KeySample) -> tuple[Any, ...]:
    if isinstance(statistic, Moments):
        return ("moments", *statistic.extra)
    return "keys", statistic.capacity, statistic.seed, statistic.pool


_memory: ContextVar[Memory | None] = ContextVar("memory", default=None)


def memory_of(model: Model, statistic: Any) -> Memory | None:
    """Return the memory of the block that is open, if it may be used: for a known statistic, while nothing acts on the model."""
    memory = _memory.get()
    if memory is None or type(statistic) not in (Moments, KeySample):
        return None
    points = (*model.hook_dict.values(), *extra_points(model))
    return None if any(hook.fwd_hooks for hook in points) else memory


@contextmanager
def reading_once(together: Collection[str] = ()) -> Iterator[None]:
    """Let `collect` and `query_keys` read each text once, for the length of a `with` block.

    What was collected over a corpus, at whatever sites, is not collected again; where a site is missing, that alone is. It is for
    several methods that are fitted to the same texts one after the other: the model must not change in between. What is collected
    under an intervention, with a transform, or with a checkpoint is not remembered.

    Args:
        together: Kinds of sites whose moments will all be wanted, and so are collected in the first pass that is for one of them.
    """
    token = _memory.set(Memory(together))
    try:
        yield
    finally:
        _memory.reset(token)
