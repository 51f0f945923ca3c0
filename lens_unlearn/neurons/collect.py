"""`collect`: the one streaming loop, in which a model reads a corpus and a statistic is filled at some sites.

No activation is stored, and each forward pass ends at the last site that was asked for, so memory does not grow with the
corpus and the cost is close to that of the blocks alone.
Knows models, corpora and checkpoints; of a statistic it knows the protocol alone, and nothing of what it accumulates.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial, reduce
from typing import Any, overload

import torch
from torch import Tensor

from lens_unlearn.core import artefacts, distributed
from lens_unlearn.core.errors import ArtefactError, LensUnlearnError, ModelError
from lens_unlearn.core.numbers import check_numbers
from lens_unlearn.core.progress import Bar
from lens_unlearn.corpora.batching import rows_at_once
from lens_unlearn.corpora.corpus import PADDING, Batch, Corpus, require_corpus
from lens_unlearn.model.feature_points import dictionaries_at
from lens_unlearn.model.hooks import Remover, announce, attach, backbone, detach_all, one_thread
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.loading import as_in_file, fingerprint, model_entry, model_name, require_model_of
from lens_unlearn.model.pooling import Pool, running_mean
from lens_unlearn.model.positions import Rows, pad_of
from lens_unlearn.model.residual import on_residual, sinks_of
from lens_unlearn.model.routed import Routed, takes_routed
from lens_unlearn.model.shortcuts import shortcuts
from lens_unlearn.model.sites import Point, Site, extra_points, resolve
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.moments import Moments
from lens_unlearn.neurons.reading_once import memory_of
from lens_unlearn.neurons.statistic import S, Statistic

__all__ = ["collect", "gather", "load_moments", "own_checkpoint", "query_keys", "require_skipped", "save_moments"]

Transform = Mapping[Site, Callable[[Tensor], Tensor]]
MOST_KEYS = 4000
"""The default of how many keys `query_keys` keeps."""
_SAVE_EVERY = 20.0  # seconds between checkpoints


@overload
def collect(
    model: Model,
    corpus: Corpus,
    sites: str | Site | Iterable[str | Site] = ...,
    *,
    statistic: None = None,
    batch_size: int | None = ...,
    skip_sinks: float | None = ...,
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
    batch_size: int | None = ...,
    skip_sinks: float | None = ...,
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
    batch_size: int | None = None,
    skip_sinks: float | None = None,
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
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with. Results
            do not depend on it.
        skip_sinks: Leave out attention sinks, whose activations dominate means: at each layer the positions at which the norm of
            the residual stream, at the layer's input or at its output, is more than so many times the median over the row. Default:
            count them.
        transform: Optional functions applied to the activations of a site before they are counted.
        checkpoint: A file in which the run is saved, every 20 seconds and on interruption. If it exists, the run resumes
            from it, to exactly the result of an uninterrupted run, also after a power cut or `kill -9`. It is removed at the
            end.
        progress: Whether to show a bar, in tokens that are read.

    Returns:
        The filled statistic; the one passed is not changed.

    Raises:
        SiteError: If a site does not exist or has no neuron axis.
        ActivationError: If a counted activation is NaN or infinite.
        CorpusError: If the corpus was tokenized for another model.
        ModelError: If the model is in training mode, or another thread has an intervention on it, or measures it.
        ArtefactError: If the checkpoint belongs to another run: another model, corpus, setting, or number of hooks on the
            model.
        LensUnlearnError: If `skip_sinks` is not above 1, or the statistic is a sample of keys, which holds the same tokens at
            every layer.
    """
    require_model(model)
    statistic = Moments() if statistic is None else statistic
    memory = memory_of(model, statistic)
    if memory is not None and checkpoint is None and not transform:

        def read(missing: list[Site]) -> Any:
            return gather(model, corpus, missing, statistic, batch_size, None, None, progress, skip_sinks)

        return memory.collect(model, require_corpus(corpus), sites, statistic, skip_sinks, read)
    total = gather(model, corpus, sites, statistic, batch_size, transform, checkpoint, progress, skip_sinks)
    if checkpoint is not None:
        artefacts.remove(own_checkpoint(checkpoint))
    return total


def query_keys(
    model: Model,
    corpus: Corpus,
    sites: str | Site | Sequence[str | Site] = "mlp.post",
    *,
    capacity: int = MOST_KEYS,
    pool: Pool = "last",
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> KeySample:
    """Sample the keys at the last token of each prompt of a corpus, or the mean over each prompt.

    A corpus of plain texts is cut into prompts at random places first (`Corpus.with_prompts`).

    Args:
        model: A `TransformerBridge` or `HookedTransformer`.
        corpus: Queries: prompts with answers, or texts.
        sites: Where to take the keys.
        capacity: The most queries to keep, drawn uniformly.
        pool: "last" is the key of the last token, "mean" the mean over those of the prompt's tokens, without special ones and the
            first of a text.
        seed: Of the draw, and of the places where texts are cut.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        progress: Whether to show bars.

    Raises:
        CorpusError: If nothing is long enough to make a prompt.
    """
    require_model(model)
    statistic, queries = KeySample(capacity, seed=seed, pool=pool), _queries(corpus, seed)
    return collect(model, queries, sites, statistic=statistic, batch_size=batch_size, progress=progress)


def _queries(corpus: Corpus, seed: int) -> Corpus:
    return (corpus if require_corpus(corpus).has_prompts else corpus.with_prompts(seed=seed)).queries()


def query_places(corpus: Corpus, *, capacity: int = MOST_KEYS, seed: int = 0) -> KeySample:
    """Return the sample that `query_keys` would, but for the keys: which queries there are, and how they would be split.

    No model is run: so what a sample is too small for can be said before.
    """
    sample, site = KeySample(capacity, seed=seed), Site(0, "mlp.post")
    queries = _queries(corpus, seed)
    for batch in queries.batches(64):
        part = sample.fresh()
        part.locate(*queries.places(batch, by_unit=part.by_unit))
        part.update(site, torch.zeros(batch.counted.numel(), 1), batch.counted.reshape(-1).float())
        sample = sample.merge(part)
    return sample


def gather(
    model: Model,
    corpus: Corpus,
    sites: str | Site | Iterable[str | Site],
    statistic: Any,
    batch_size: int | None,
    transform: Transform | None,
    checkpoint: str | os.PathLike[str] | None,
    progress: bool,
    skip_sinks: float | None = None,
) -> Any:
    """Do what `collect` does, but leave the checkpoint: the caller removes it when the result is in a file."""
    require_model(model)
    check_numbers(batch_size=batch_size, skip_sinks=skip_sinks)
    require_corpus(corpus).check(model)
    points = resolve(model, sites)
    total: Any = (Moments() if statistic is None else statistic).fresh()
    if skip_sinks is not None and isinstance(total, KeySample):
        raise LensUnlearnError(
            "a KeySample holds the same tokens at every layer, and attention sinks differ between layers: leave out skip_sinks"
        )
    checkpoint = None if checkpoint is None else own_checkpoint(checkpoint)
    if batch_size is None and checkpoint is not None and os.path.exists(checkpoint):
        batch_size = artefacts.read(checkpoint, "collect checkpoint")[0].get("settings", {}).get("batch_size")
    batch_size = rows_at_once(model, corpus, batch_size)
    settings = {}
    if checkpoint is not None:
        settings = _settings(model, corpus, points, total, batch_size, transform or {}, skip_sinks)
    total, done = (total, 0) if checkpoint is None else _load(checkpoint, total, settings, model)
    hidden = not (progress and distributed.is_first())
    bar = Bar(total=corpus.n_read, unit=" tokens", unit_scale=True, desc=f"collect {corpus.name}", disable=hidden)
    saved, halved = time.monotonic(), 0
    watch = _Watch(model, points, transform or {}, skip_sinks)
    # Closed twice, for an interrupt in the first instruction of the one that comes first.
    with one_thread(model), bar, torch.no_grad(), closing(watch), watch, shortcuts(model):
        if not distributed.is_first() and not done:
            # Each of several processes takes every N-th batch. Before, the others run the batch that the first process begins
            # with, and drop its sums, but not the shifts these are about: then the parts of all add up to the same digits.
            first = next(corpus.batches(batch_size)).run(partial(watch.see, model, corpus, total))
            total = reduce(_merged, first, total).fresh()
        try:
            for number, batch in enumerate(distributed.share(corpus.batches(batch_size))):
                # The batches of a corpus come in one order, so a checkpoint need only say how many of them it holds.
                if number >= done:
                    # A batch has a statistic of its own (or several, if it was halved for lack of memory), merged when the pass
                    # is over: an error or interrupt within it loses that batch, and counts none of it twice. The count of
                    # batches changes in the same statement, so that a checkpoint never holds one without the other.
                    parts = batch.run(partial(watch.see, model, corpus, total))
                    total, done = reduce(_merged, parts, total), number + 1
                    halved += len(parts) > 1
                bar.update(int(batch.lengths.sum()))
                if checkpoint is not None and time.monotonic() - saved > _SAVE_EVERY:
                    _save(checkpoint, total, settings, done)
                    saved = time.monotonic()
        except BaseException:
            if checkpoint is not None:
                _save(checkpoint, total, settings, done)
            raise
    if distributed.count() > 1:
        shares = distributed.gather((total.state(), halved))
        total = reduce(_merged, (total.fresh().with_state(state) for state, _ in shares))
        halved = sum(count for _, count in shares)
    return _with_provenance(total, model, corpus, halved, skip_sinks)


def _merged(first: Any, second: Any) -> Any:
    return first.merge(second)


def require_skipped(moments: Moments, skip_sinks: float | None) -> Moments:
    """Return moments that were collected before, if they leave out the attention sinks that are to be left out.

    Raises:
        LensUnlearnError: If they count them, or others.
    """
    known = moments.provenance.get("skip_sinks")
    if skip_sinks is not None and known != float(skip_sinks):
        raise LensUnlearnError(
            f"skip_sinks={skip_sinks:g} is asked of moments that were collected with skip_sinks={known}: collect them so, or leave "
            "it out here"
        )
    return moments


def own_checkpoint(checkpoint: str | os.PathLike[str]) -> str:
    """Return the file of this process: each of several keeps its own part."""
    path, processes = os.fspath(checkpoint), distributed.count()
    return path if processes == 1 else f"{path}.{distributed.number()}of{processes}"


class _Enough(BaseException):
    """Ends a forward pass in which every site has fired: the layers above, and the unembedding, are not needed."""


class _Watch:
    """Hooks that hand the activations of each site to the statistic of the batch that runs."""

    part: Statistic
    weight: Tensor
    real: Tensor  # which positions are no padding
    pooled: Tensor | None  # over which a statistic wants means; None if it wants each token's own activation
    waiting: int  # sites still to be counted in this forward pass

    def __init__(
        self, model: Model, points: Mapping[Site, Point], transform: Transform, skip_sinks: float | None
    ) -> None:
        self.model, self.points, self.transform, self.skip_sinks = model, points, transform, skip_sinks
        # Some layers make sinks, others end them, so a layer's activations are counted only when its output is known too. Until
        # then they wait; a bridge's `resid` comes later still.
        self.sinks, self.seen = torch.zeros(0), list[tuple[Site, Any]]()
        self.weights: dict[int, Tensor] = {}  # of layers whose output is known
        self.removers: list[Remover] = []
        self.thread = threading.get_ident()

    def see(self, model: Model, corpus: Corpus, total: Any, batch: Batch) -> Any:
        """Run a batch, and return its statistic, of the settings of `total`."""
        part = self.part = total.fresh()
        self.weight = batch.counted.reshape(-1).float()
        self.real = torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
        self.waiting = len(self.points)
        self.pooled = None
        if getattr(part, "pool", "last") == "mean":
            tokenizer, pad = getattr(model, "tokenizer", None), pad_of(model)
            rows = Rows.of(batch.tokens, 0, None, pad, lengths=batch.lengths)
            self.pooled = rows.text & ~rows.special(tokenizer)
        self.seen.clear()
        self.weights.clear()
        # Some statistics name or draw tokens: they are given which document (or group, where those are named and the statistic
        # asks for them) and place each is, by keys that depend on the texts alone, and so are the same in every batch and order.
        locate = getattr(part, "locate", None)
        if locate is not None:
            locate(*corpus.places(batch, by_unit=getattr(part, "by_unit", False)))
        announce(model, batch.prompt_ends, batch.lengths)
        with suppress(_Enough):
            backbone(model, batch.tokens)
        return part

    def __enter__(self) -> "_Watch":
        for site, point in self.points.items():
            attach(point.hook, self._hook(site), self.removers)
        if self.skip_sinks is not None:
            layers = sorted({site.layer for site in self.points})
            on_residual(self.model, layers, self._enter, self.removers)
            on_residual(self.model, layers, self._leave, self.removers, output=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks off."""
        detach_all(self.removers)

    def _hook(self, site: Site) -> Callable[[Any], None]:
        change = self.transform.get(site)

        def see(tensor: Any) -> None:
            # A pass of another thread must not be counted; nor should it run, since under `shortcuts` its numbers would differ.
            if threading.get_ident() != self.thread:
                raise ModelError(
                    "another thread measures this model: let it end first, or give each thread a model of its own"
                )
            values = tensor if change is None else change(tensor)
            if self.pooled is not None:
                values = values.dense() if isinstance(values, Routed) else values
                values = running_mean(values.reshape(*self.pooled.shape, -1), self.pooled)[0].reshape(values.shape)
            weight = self.weight if self.skip_sinks is None else self.weights.get(site.layer)
            if weight is None:
                self.seen.append((site, values))
            else:
                self._count(site, values, weight)

        return takes_routed(see) if change is None else see

    def _count(self, site: Site, values: Any, weight: Tensor) -> None:
        add = getattr(self.part, "update_routed", None)
        if isinstance(values, Routed) and add is not None:
            add(site, values, weight)
        else:
            if isinstance(values, Routed):
                values = values.dense()
            experts = self.points[site].experts
            shape = (experts, values.shape[2] // experts) if experts else values.shape[2:]
            self.part.update(site, values.reshape(-1, *shape), weight)
        self.waiting -= 1
        if self.waiting == 0:
            raise _Enough

    def _enter(self, layer: int, stream: Tensor) -> None:
        self.sinks = self._sinks(stream)

    def _leave(self, layer: int, stream: Tensor) -> None:
        self.weights[layer] = self.weight.masked_fill((self.sinks | self._sinks(stream)).reshape(-1), 0)
        seen, self.seen = self.seen, []
        for site, values in seen:
            self._count(site, values, self.weights[layer])

    def _sinks(self, stream: Tensor) -> Tensor:
        assert self.skip_sinks is not None
        return sinks_of(stream, self.real, self.skip_sinks).cpu()


def _with_provenance(total: Any, model: Model, corpus: Corpus, halved: int, skip_sinks: float | None) -> Any:
    if hasattr(total, "provenance"):
        total.provenance = {"model": model_name(model), "corpus": corpus.name, "tokens": corpus.n_tokens}
        if skip_sinks is not None:
            total.provenance["skip_sinks"] = float(skip_sinks)
        if halved:
            total.provenance["batches cut for lack of memory"] = halved
    return total


def _settings(
    model: Model,
    corpus: Corpus,
    points: Mapping[Site, Point],
    total: Statistic,
    batch_size: int | None,
    transform: Transform,
    skip_sinks: float | None,
) -> dict[str, Any]:
    """Return what decides the result: a checkpoint is resumed only by a run of which all of this is the same."""
    return {
        "model": fingerprint(model),
        "corpus": corpus.fingerprint,
        "sites": [str(site) for site in points],
        **({"dictionaries": found} if (found := dictionaries_at(model, points)) else {}),
        "statistic": repr(total.fresh()) + str(getattr(total, "extra", "")),
        "batch_size": batch_size,
        "padding": PADDING,  # where batches end: a checkpoint says how many it holds
        **({} if skip_sinks is None else {"skip_sinks": float(skip_sinks)}),
        **({"processes": distributed.count()} if distributed.count() > 1 else {}),
        "transform": sorted(str(site) for site in transform),
        "hooks on the model": sum(
            len(hook.fwd_hooks)
            for hook in {id(h): h for h in (*model.hook_dict.values(), *extra_points(model))}.values()
        ),
    }


def _save(path: str | os.PathLike[str], total: Statistic, settings: dict[str, Any], done: int) -> None:
    artefacts.write(path, "collect checkpoint", total.state(), {"settings": settings, "batches": done})


def _load(path: str | os.PathLike[str], total: Any, settings: dict[str, Any], model: Model) -> tuple[Any, int]:
    if not os.path.exists(path):
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise ArtefactError(f"{path} cannot be written: there is no such folder, so make it first")
        return total, 0
    header, tensors = artefacts.read(path, "collect checkpoint")
    ours = as_in_file(path, header.get("settings"), settings, model)
    artefacts.require_same(path, header.get("settings"), ours, "this run")
    with artefacts.usable(path, "checkpoint that can be used"):
        done = header["batches"]
        if type(done) is not int or done < 0:
            raise ValueError(f"{done!r} is not a number of batches")
        return total.with_state(tensors), done


def save_moments(path: str | os.PathLike[str], moments: Moments, model: Model | None = None) -> None:
    """Write moments to a safetensors file.

    Args:
        path: The file.
        moments: What `collect` returned.
        model: Their model: the file will refuse every other one. Without it, any of the right shape is accepted.
    """
    entry = model_entry(path, model, moments.sites)
    header = {"extra": list(moments.extra), "provenance": moments.provenance, **entry}
    artefacts.write(path, "moments", moments.state(), header)


def load_moments(path: str | os.PathLike[str], model: Model | None = None) -> Moments:
    """Read what `save_moments` wrote.

    Raises:
        ArtefactError: If the file is not intact moments, or (where both are known) of another model.
    """
    header, tensors = artefacts.read(path, "moments")
    with artefacts.usable(path, "moments that can be read"):
        if not set(header) <= {"schema", "kind", "lens_unlearn", "extra", "provenance", "model", "dictionaries"}:
            raise ValueError("something in it has no meaning to this version: upgrade to read it")
        moments = Moments(extra=header["extra"]).with_state(tensors)
        moments.provenance = dict(header.get("provenance", {}))
        repr(moments)
    require_model_of(path, header, model)
    return moments
