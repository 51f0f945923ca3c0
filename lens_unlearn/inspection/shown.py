"""What the inspections of texts share: how neurons, texts and conditions may be given, running a row, and tokens as text.

Knows how to read the activations of one row, and how a tokenizer decodes token by token; knows nothing of losses or of how values
are drawn. `Shown` is the base of values that show themselves as HTML.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_unlearn.core.errors import ActivationError, CorpusError, LensUnlearnError, SelectionError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.evaluation.report import BASE
from lens_unlearn.inspection.html import document
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.model.hooks import Remover, attach, backbone, detach_all, one_thread
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.loading import model_name
from lens_unlearn.model.sites import Point, Site, resolve
from lens_unlearn.neurons.maps import NeuronMap, neuron_name

__all__ = ["Neuron", "Neurons", "Shown"]

Texts = str | Sequence[str] | Corpus
"""One text, several, or a corpus; of a corpus, `corpus.only([3])` is the fourth document alone."""
Neuron = str | tuple[str | Site, int | tuple[int, ...]]
"""A neuron as figures name it, ``"L3.mlp.post[17]"`` or ``"L3.attn.z[2,5]"``, or its site and (flat) index."""
Neurons = NeuronMap | Neuron | Sequence[Neuron]
"""A neuron, several, or a selection."""

_NEURON = re.compile(r"\s*([^\[\s]+)\[([\d,\s]+)\]\s*")
_PENDING = 8  # tokens that may wait for the rest of a character, which has four bytes at most


class Shown(ABC):
    """A value that shows itself as HTML, in a notebook and in a file."""

    @abstractmethod
    def html(self) -> str:
        """Return the HTML of a cell: escaped, with styles of its own, without scripts, and without addresses."""

    @abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """Return all values, as a table."""

    def _repr_html_(self) -> str:
        return self.html()

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a document that opens offline."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(document(self.html()))


# --- neurons and texts as they are given -------------------------------------------------------------------------------


def neurons_of(model: Model, neurons: Neurons) -> tuple[dict[str, tuple[Site, int]], dict[Site, Point]]:
    """Read what was given for neurons.

    Returns:
        Site and flat index by the neuron's name, and the points of those sites.

    Raises:
        SiteError: If a site does not exist.
        SelectionError: If a neuron does not exist, or there is none.
    """
    if isinstance(neurons, NeuronMap):
        return _selected(model, neurons)
    given: Iterable[Neuron] = [neurons] if isinstance(neurons, str) or _is_pair(neurons) else neurons  # type: ignore[assignment]
    wanted = [_neuron(neuron) for neuron in given]
    if not wanted:
        raise SelectionError("no neuron was named: write it as 'L3.mlp.post[17]'")
    points = resolve(model, [site for site, _ in wanted])
    places = {}
    for site, index in wanted:
        shape = points[site].lies
        if not (
            len(index) in (1, len(shape)) and all(0 <= i < n for i, n in zip(index, _sizes(index, shape), strict=True))
        ):
            known = f"0 to {_sizes((0,), shape)[0] - 1}" + (
                f", or [{'expert' if points[site].experts else 'head'}, place] of {shape}" if len(shape) > 1 else ""
            )
            raise SelectionError(f"there is no {site}[{','.join(map(str, index))}]: that site has neurons {known}")
        flat = index[0] if len(index) == 1 else index[0] * shape[1] + index[1]
        places[neuron_name(site, flat, shape)] = (site, flat)
    return places, points


def _is_pair(given: object) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and not isinstance(given[1], str) and not _is_pair(given[1])


def _neuron(given: Neuron) -> tuple[Site, tuple[int, ...]]:
    if isinstance(given, str):
        match = _NEURON.fullmatch(given)
        if match is None:
            raise SelectionError(f"{given!r} names no neuron: write it as 'L3.mlp.post[17]', or 'L3.attn.z[2,5]'")
        return Site.parse(match[1]), tuple(int(part) for part in match[2].split(",") if part.strip())
    site, index = given
    site = Site.parse(site) if isinstance(site, str) else Site(*site)
    return site, tuple(int(i) for i in index) if isinstance(index, tuple) else (int(index),)


def _sizes(index: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the bounds of an index: a single number is a flat one."""
    return shape if len(index) == len(shape) else (torch.Size(shape).numel(),)


def _selected(model: Model, selection: NeuronMap) -> tuple[dict[str, tuple[Site, int]], dict[Site, Point]]:
    if not selection.is_selection:
        raise SelectionError("a boolean map is needed to name neurons: select first, as in score.top(0.02)")
    chosen = {site: mask for site, mask in selection.items() if bool(mask.any())}
    if not chosen:
        raise SelectionError("the selection is empty: there is no neuron to look at")
    points = resolve(model, list(chosen))
    places = {}
    for site, mask in chosen.items():
        shape = points[site].lies
        if tuple(mask.shape) != points[site].shape or selection.experts.get(site, shape[0]) != shape[0]:
            raise SelectionError(f"{site}: the selection has shape {selection.shape_of(site)}, and the model {shape}")
        for flat in mask.reshape(-1).nonzero()[:, 0].tolist():
            places[neuron_name(site, flat, shape)] = (site, flat)
    return places, points


def named_conditions(given: Mapping[str, Intervention | None]) -> dict[str, Intervention | None]:
    """Check conditions, and put the unedited model first."""
    for name, intervention in given.items():
        if intervention is not None and not isinstance(intervention, Intervention):
            raise LensUnlearnError(f"{name!r} is no intervention: give one, or None")
    if given.get(BASE) is not None:
        raise LensUnlearnError(f"{BASE!r} is the model without any of them: give the intervention another name")
    return {BASE: None, **given}


def corpus_of(model: Model, text: Texts, prepend_bos: bool | None = None) -> Corpus:
    if isinstance(text, Corpus):
        if prepend_bos not in (None, text.prepend_bos):
            raise CorpusError(f"{text.name} was read with prepend_bos={text.prepend_bos}: read it again to change that")
        text.check(model)
        return text
    require_model(model)
    if not isinstance(text, Iterable):
        raise CorpusError(f"a {type(text).__name__} is no text: give a string, several, or a corpus")
    given = [text] if isinstance(text, str) else list(text)
    for number, part in enumerate(given):
        if not (isinstance(part, str) and part.strip()):
            which = "the text" if isinstance(text, str) else f"text {number}"
            raise CorpusError(f"{which} is empty: give one with at least a word")
    if not given:
        raise CorpusError("there is no text: give at least one")
    corpus = read_corpus(given, model, window=int(model.cfg.n_ctx), prepend_bos=prepend_bos, name="text")
    if corpus.skipped:
        raise CorpusError(
            f"{sum(corpus.skipped.values()):,} of these texts are shorter than two tokens: leave them out"
        )
    return corpus


def about_of(model: Model, text: Texts) -> str:
    return " · ".join([model_name(model), *([text.name] if isinstance(text, Corpus) else [])])


# --- running and reading back ------------------------------------------------------------------------------------------


def activations(
    model: Model, tokens: Int[Tensor, "pos"], points: Mapping[Site, Point]
) -> dict[Site, Float[Tensor, "pos neurons"]]:
    """Run one row by itself, and return the activations at some sites, heads side by side."""
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, tensor: Tensor) -> None:
        seen[site] = tensor[0].detach().reshape(len(tokens), -1).float().cpu()

    removers: list[Remover] = []
    with one_thread(model), torch.no_grad():
        try:
            for site, point in points.items():
                attach(point.hook, lambda tensor, site=site: keep(site, tensor), removers, own_thread=True)
            backbone(model, tokens[None])
        finally:
            detach_all(removers)
    return seen


def require_finite(values: Mapping[int, Float[Tensor, "names pos"]], names: Sequence[str]) -> None:
    for table in values.values():
        bad = (~torch.isfinite(table)).nonzero()
        if len(bad):
            name, place = (int(i) for i in bad[0])
            raise ActivationError(
                f"{names[name]} is {float(table[name, place])} at position {place}: the model overflows or is broken there; "
                "try a wider dtype"
            )


def counted_of(corpus: Corpus, row: int) -> Bool[Tensor, "pos"]:
    return corpus.counted[int(corpus.starts[row]) : int(corpus.starts[row + 1])].clone()


def pieces(model: Model, ids: Sequence[int], *, bos: bool) -> list[str]:
    """Return what each token adds to the text; of tokens that share a character, the last one has it.

    Args:
        model: Without a tokenizer, a token is called by its number.
        ids: Of one row.
        bos: Whether the first one is BOS, which stands for itself.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return [f"‹{token}›" for token in ids]
    head = [tokenizer.decode(list(ids[:1]))] if bos else []
    return [*head, *_decoded(tokenizer, list(ids[len(head) :]))]


def shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")


def _decoded(tokenizer: object, ids: list[int]) -> Iterator[str]:
    """Decode token by token: each time with the token before, which says whether a space comes between them."""
    # A token alone does not decode to what it adds to a text: tokenizers such as Llama's drop the space in front of a first word,
    # and a part of a character gives U+FFFD. So what a token adds is what the decoded text grows by; while that ends in
    # U+FFFD, the rest of the character is still to come, and the token waits with an empty text. Bytes that are no character
    # would wait for ever: after `_PENDING` tokens they are given out as they are.

    def decode(part: list[int]) -> str:
        return tokenizer.decode(part, clean_up_tokenization_spaces=False)  # type: ignore[attr-defined]

    before = start = 0  # ids[before:start] is text that was given out, ids[start:end] waits
    for end in range(1, len(ids) + 1):
        given_out = decode(ids[before:start])
        new = decode(ids[before:end])[len(given_out) :]
        waits = new.endswith("\ufffd") and end - start < _PENDING and end < len(ids)
        if waits:
            yield ""
        else:
            yield new
            before, start = start, end
