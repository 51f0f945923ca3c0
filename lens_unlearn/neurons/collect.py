"""The one streaming loop: model x corpus x sites x statistics.

No activation is kept, and each forward pass ends at the last site that was asked for, so memory does not grow with the
corpus and the cost is close to that of the blocks alone.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from functools import partial, reduce
from typing import Any, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lens_unlearn.core import artefacts, distributed
from lens_unlearn.core.errors import ArtefactError, ModelError
from lens_unlearn.corpora.corpus import Batch, Corpus
from lens_unlearn.model.hooks import Remover, attach, backbone, detach_all, one_thread
from lens_unlearn.model.host import Model
from lens_unlearn.model.loading import fingerprint, model_name
from lens_unlearn.model.shortcuts import lean
from lens_unlearn.model.sites import Point, Site, resolve
from lens_unlearn.neurons.moments import Moments
from lens_unlearn.neurons.statistic import S, Statistic

__all__ = ["collect"]

Transform = Mapping[Site, Callable[[Tensor], Tensor]]
_SAVE_EVERY = 20.0  # seconds between checkpoints


@overload
def collect(
    model: Model,
    corpus: Corpus,
    sites: str | Site | Iterable[str | Site] = ...,
    *,
    statistic: None = None,
    batch_size: int = ...,
    transform: Transform | None = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
    progress: bool = ...,
) -> Moments: ...
@overload
def collect(
    model: Model,
    corpus: Corpus,
    sites: str | Site | Iterable[str | Site] = ...,
    *,
    statistic: S,
    batch_size: int = ...,
    transform: Transform | None = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
    progress: bool = ...,
) -> S: ...
def collect(
    model: Model,
    corpus: Corpus,
    sites: str | Site | Iterable[str | Site] = ("mlp.post",),
    *,
    statistic: Any = None,
    batch_size: int = 8,
    transform: Transform | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Any:
    """Stream a corpus through a model once and gather a statistic of every neuron at the given sites.

    Inside an intervention's block the activations are those with the intervention acting: what was attached before is
    seen by what is attached after. Each forward pass ends as soon as every site has fired: hooks of your own further up
    do not run. A forward pass of this model in another thread meanwhile is refused.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
        corpus: What to run. Counted positions enter the statistics, no others.
        sites: Kinds (all layers), sites, or both.
        statistic: An empty statistic to fill; default `Moments()`.
        batch_size: Full-length rows per forward. Results do not depend on it.
        transform: Optional functions applied to the activations of a site before they are counted.
        checkpoint: A file in which the run is kept, every 20 seconds and on interruption. If it exists, the run goes
            on from there, to exactly the result of an uninterrupted run, also after a power cut or `kill -9`. It is removed at
            the end.
        progress: Whether to show a bar, in counted tokens.

    Returns:
        The filled statistic; the one passed is not changed.

    Raises:
        SiteError: If a site does not exist or has no neuron axis.
        ActivationError: If a counted activation is NaN or infinite.
        CorpusError: If the corpus was tokenized for another model.
        ModelError: If the model is in training mode, or another thread has an intervention on it, or measures it.
        ArtefactError: If the checkpoint belongs to another run: another model, corpus, setting, or number of hooks on the
            model.
    """
    total = gather(model, corpus, sites, statistic, batch_size, transform, checkpoint, progress)
    if checkpoint is not None:
        artefacts.remove(own_checkpoint(checkpoint))
    return total


def gather(
    model: Model,
    corpus: Corpus,
    sites: str | Site | Iterable[str | Site],
    statistic: Any,
    batch_size: int,
    transform: Transform | None,
    checkpoint: str | os.PathLike[str] | None,
    progress: bool,
) -> Any:
    """Do what `collect` does, and leave the checkpoint for whoever still has to put the result somewhere."""
    corpus.check(model)
    points = resolve(model, sites)
    total: Any = (Moments() if statistic is None else statistic).fresh()
    checkpoint = None if checkpoint is None else own_checkpoint(checkpoint)
    settings = {} if checkpoint is None else _settings(model, corpus, points, total, batch_size, transform or {})
    total, done = (total, 0) if checkpoint is None else _load(checkpoint, total, settings)
    told = {"desc": f"collect {corpus.name}", "disable": not (progress and distributed.is_first())}
    bar = tqdm(total=corpus.n_tokens, unit=" tokens", unit_scale=True, **told)
    saved, halved = time.monotonic(), 0
    watch = _Watch(points, transform or {})
    # Closed twice, for an interrupt in the first instruction of the one that comes first.
    with one_thread(model), bar, torch.no_grad(), closing(watch), watch, lean(model):
        if (
            not distributed.is_first() and not done
        ):  # sums of all are about the same values, and add up to the same digits
            total = reduce(
                _merged, next(corpus.batches(batch_size)).run(partial(watch.see, model, corpus, total)), total
            )
            total = total.fresh()
        try:
            for number, batch in enumerate(distributed.share(corpus.batches(batch_size))):
                counted = int(batch.counted.sum())
                if number >= done:
                    parts = batch.run(partial(watch.see, model, corpus, total))
                    # Only a batch that went through whole is merged, and it is counted in the same breath.
                    total, done = reduce(_merged, parts, total), number + 1
                    halved += len(parts) > 1
                bar.update(counted)
                if checkpoint is not None and time.monotonic() - saved > _SAVE_EVERY:
                    _save(checkpoint, total, settings, done)
                    saved = time.monotonic()
        except BaseException:
            if checkpoint is not None:
                _save(checkpoint, total, settings, done)
            raise
    if distributed.count() > 1:
        found = distributed.gather((total.state(), halved))
        total = reduce(_merged, (total.fresh().with_state(state) for state, _ in found))
        halved = sum(one for _, one in found)
    return _with_provenance(total, model, corpus, halved)


def _merged(one: Any, other: Any) -> Any:
    return one.merge(other)


def own_checkpoint(checkpoint: str | os.PathLike[str]) -> str:
    """Return the file of this process: each of several keeps its own part."""
    path, processes = os.fspath(checkpoint), distributed.count()
    return path if processes == 1 else f"{path}.{distributed.number()}of{processes}"


class _Enough(BaseException):
    """Every site has been seen: the rest of this forward pass would be for nothing."""


class _Watch:
    """Hooks that hand the activations of each site to the statistic of the batch that runs."""

    part: Statistic
    weight: Tensor
    waiting: int  # sites still to fire in this forward pass

    def __init__(self, points: Mapping[Site, Point], transform: Transform) -> None:
        self.points, self.transform = points, transform
        self.removers: list[Remover] = []
        self.thread = threading.get_ident()

    def see(self, model: Model, corpus: Corpus, total: Any, batch: Batch) -> Any:
        """Run a batch, and return its statistic, of the settings of another."""
        part = self.part = total.fresh()
        self.weight = batch.counted.reshape(-1).float()
        self.waiting = len(self.points)
        locate = getattr(part, "locate", None)
        if locate is not None:
            locate(*corpus.places(batch))
        with suppress(_Enough):
            backbone(model, batch.tokens)
        return part

    def __enter__(self) -> "_Watch":
        for site, point in self.points.items():
            attach(point.hook, self._hook(site), self.removers)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks off."""
        detach_all(self.removers)

    def _hook(self, site: Site) -> Callable[[Tensor], None]:
        change = self.transform.get(site)

        def see(tensor: Tensor) -> None:
            if (
                threading.get_ident() != self.thread
            ):  # its numbers are not to be counted, and `lean` would make them others
                raise ModelError(
                    "another thread measures this model: let it end first, or give each thread a model of its own"
                )
            values = tensor if change is None else change(tensor)
            self.part.update(site, values.reshape(-1, *values.shape[2:]), self.weight)
            self.waiting -= 1
            if self.waiting == 0:
                raise _Enough

        return see


def _with_provenance(total: Any, model: Model, corpus: Corpus, halved: int) -> Any:
    if hasattr(total, "provenance"):
        total.provenance = {"model": model_name(model), "corpus": corpus.name, "tokens": corpus.n_tokens}
        if halved:
            total.provenance["batches cut for lack of memory"] = halved
    return total


def _settings(
    model: Model,
    corpus: Corpus,
    points: Mapping[Site, Point],
    total: Statistic,
    batch_size: int,
    transform: Transform,
) -> dict[str, Any]:
    return {
        "model": fingerprint(model),
        "corpus": corpus.fingerprint,
        "sites": [str(site) for site in points],
        "statistic": repr(total.fresh()) + str(getattr(total, "extra", "")),
        "batch_size": batch_size,
        **({"processes": distributed.count()} if distributed.count() > 1 else {}),
        "transform": sorted(str(site) for site in transform),
        "hooks on the model": sum(
            len(hook.fwd_hooks) for hook in {id(h): h for h in model.hook_dict.values()}.values()
        ),
    }


def _save(path: str | os.PathLike[str], total: Statistic, settings: dict[str, Any], done: int) -> None:
    artefacts.write(path, "collect checkpoint", total.state(), {"settings": settings, "batches": done})


def _load(path: str | os.PathLike[str], total: Any, settings: dict[str, Any]) -> tuple[Any, int]:
    if not os.path.exists(path):
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise ArtefactError(f"{path} cannot be written: there is no such folder")
        return total, 0
    header, tensors = artefacts.read(path, "collect checkpoint")
    artefacts.require_same(path, header.get("settings"), settings, "this run")
    with artefacts.usable(path, "checkpoint that can be used"):
        done = header["batches"]
        if type(done) is not int or done < 0:
            raise ValueError(f"{done!r} is no number of batches")
        return total.with_state(tensors), done


def save_moments(path: str | os.PathLike[str], moments: Moments, model: Model | None = None) -> None:
    """Write moments to a safetensors file.

    Args:
        path: Where to.
        moments: What `collect` returned.
        model: If given, its fingerprint is kept, so that the file can say later which model it is of.
    """
    header = {"extra": list(moments.extra), "provenance": moments.provenance}
    if model is not None:
        header["model"] = fingerprint(model)
    artefacts.write(path, "moments", moments.state(), header)


def load_moments(path: str | os.PathLike[str], model: Model | None = None) -> Moments:
    """Read what `save_moments` wrote.

    Raises:
        ArtefactError: If the file is not intact moments, or (where both are known) of another model.
    """
    header, tensors = artefacts.read(path, "moments")
    if model is not None and "model" in header:
        artefacts.require_same(path, header["model"], fingerprint(model), "this model")
    with artefacts.usable(path, "moments that can be read"):
        if not set(header) <= {"schema", "kind", "lens_unlearn", "extra", "provenance", "model"}:
            raise ValueError("something in it has no meaning to this version: upgrade to read it")
        moments = Moments(extra=header["extra"]).with_state(tensors)
        moments.provenance = dict(header.get("provenance", {}))
        repr(moments)
    return moments
