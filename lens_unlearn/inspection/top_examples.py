"""`top_examples`: the tokens of a corpus at which neurons fire most, with the text around them.

    lu.top_examples(model, corpus, "L3.mlp.post[17]")

Knows how to find those tokens in the rows of a corpus again, and how to cut their context; which tokens they are, the statistic
`neurons.top_tokens` finds in one streaming pass. Knows nothing of how they are drawn, which is `figures.examples`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.counter_rng import key_of
from lens_unlearn.core.errors import LensUnlearnError, SelectionError
from lens_unlearn.core.progress import Bar
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.inspection.shown import Neurons, Shown, activations, neurons_of, pieces
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.loading import model_name
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.top_tokens import FIELDS, By, TopTokens

__all__ = ["Example", "TopExamples", "top_examples"]


@dataclass(frozen=True, eq=False)
class Example:
    """One token at which a neuron fires, and the text around it."""

    value: float
    """The activation."""
    document: int
    """The document of the corpus it is in; the first, where several hold the same text."""
    position: int
    """Its position in the row that the model saw, BOS included."""
    tokens: tuple[str, ...]
    """The text around it, and the token itself."""
    values: Float[Tensor, "pos"]
    """The neuron's activation at these tokens."""
    mark: int
    """The index of the token itself among them."""
    begins: bool
    """Whether the row begins with these tokens."""
    ends: bool
    """Whether it ends with them."""


@dataclass(frozen=True, eq=False)
class TopExamples(Shown):
    """Top activating examples of some neurons."""

    examples: Mapping[str, tuple[Example, ...]]
    """By the neuron's name, best first."""
    by: By
    per_document: bool
    about: str = ""
    """Model, corpus and tokens."""

    def __getitem__(self, neuron: str) -> "TopExamples":
        """Return the part of one neuron.

        Raises:
            SelectionError: If there is nothing of it.
        """
        if neuron not in self.examples:
            raise SelectionError(f"there is no example of {neuron!r} here")
        return TopExamples({neuron: self.examples[neuron]}, self.by, self.per_document, self.about)

    def to_frame(self) -> pd.DataFrame:
        """Give one row per example: neuron, rank, value, document, position, token, context."""
        import pandas as pd

        rows = [
            (neuron, rank, top.value, top.document, top.position, top.tokens[top.mark], "".join(top.tokens))
            for neuron, examples in self.examples.items()
            for rank, top in enumerate(examples)
        ]
        return pd.DataFrame(rows, columns=["neuron", "rank", "value", "document", "position", "token", "context"])

    def html(self) -> str:
        """Return what `lens_unlearn.plot.examples` draws of it."""
        from lens_unlearn.figures.examples import examples  # only here does a value reach up to what draws it

        return examples(self)

    def __repr__(self) -> str:
        return f"TopExamples({sum(map(len, self.examples.values())):,} of {len(self.examples):,} neurons)"


def top_examples(
    model: Model,
    corpus: Corpus,
    neurons: Neurons,
    *,
    k: int = 10,
    context: int = 12,
    by: By = "max",
    per_document: bool = True,
    skip_sinks: float | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> TopExamples:
    """Find the counted tokens of a corpus at which neurons fire most, and show the text around them.

    The corpus is streamed once, and no activation is kept but the top ones; then the rows that hold these are run again, for the
    activations around them. Inside an intervention's block both are those with the intervention acting.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
        corpus: Where to look.
        neurons: Such as ``"L3.mlp.post[17]"``, ``("L3.mlp.post", 17)``, several of them, or a selection.
        k: Examples per neuron.
        context: Tokens to show on each side.
        by: The highest activations ("max"), the lowest ("min"), or those furthest from zero ("abs").
        per_document: Whether to take at most one token of each document.
        skip_sinks: Leave out attention sinks, at which many neurons fire most whatever the text, see `collect`.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with. Results do not
            depend on it, up to the model's own rounding.
        progress: Whether to show bars.

    Raises:
        SiteError: If a site does not exist.
        SelectionError: If a neuron does not exist, or none was named.
        ActivationError: If a counted activation is NaN or infinite.
        CorpusError: If the corpus was tokenized for another model.
    """
    require_model(model)
    if context < 0:
        raise LensUnlearnError(f"context={context} is no number of tokens: at least 0")
    places, points = neurons_of(model, neurons)
    masks = {site: torch.zeros(point.shape, dtype=torch.bool) for site, point in points.items()}
    for site, index in places.values():
        masks[site].view(-1)[index] = True
    statistic = TopTokens(k, by=by, per_document=per_document, among=NeuronMap(masks))
    options: dict[str, Any] = {"skip_sinks": skip_sinks, "batch_size": batch_size, "progress": progress}
    tops = collect(model, corpus, list(points), statistic=statistic, **options)
    column = {site: mask.reshape(-1).cumsum(0) - 1 for site, mask in masks.items()}
    wanted = [
        (name, float(value), document, place)
        for name, (site, index) in places.items()
        for value, document, place in zip(
            *(getattr(tops[site], field)[:, int(column[site][index])].tolist() for field in FIELDS), strict=True
        )
        if value == value  # NaN where a neuron has fewer than k
    ]
    where = _find(corpus, {(document, place) for _, _, document, place in wanted})
    by_row: dict[int, list[int]] = {}
    for number, (_, _, document, place) in enumerate(wanted):
        by_row.setdefault(where[document, place][0], []).append(number)
    made: dict[int, Example] = {}
    for row, numbers in Bar(by_row.items(), disable=not progress, desc="context", unit=" rows"):
        seen = activations(model, corpus.row(row), points)
        tokens = pieces(model, corpus.row(row).tolist(), bos=corpus.prepend_bos)
        for number in numbers:
            name, value, document, place = wanted[number]
            site, index = places[name]
            position = where[document, place][1]
            made[number] = _example(corpus, row, position, value, tokens, seen[site][:, index], context)
    examples: dict[str, list[Example]] = {name: [] for name in places}
    for number, (name, *_) in enumerate(wanted):
        examples[name].append(made[number])
    about = f"{model_name(model)} · {corpus.name}, {corpus.n_tokens:,} tokens"
    return TopExamples({name: tuple(part) for name, part in examples.items()}, by, per_document, about)


def _example(
    corpus: Corpus, row: int, position: int, value: float, tokens: list[str], values: Tensor, context: int
) -> Example:
    head = int(corpus.prepend_bos)
    start, end = max(head, position - context), min(len(tokens), position + context + 1)
    # A character whose tokens are cut through would be lost: its text is at the last of them.
    while end < len(tokens) and not tokens[end - 1]:
        end += 1
    return Example(
        value,
        int(corpus.document[row]),
        position,
        tuple(tokens[start:end]),
        values[start:end].clone(),
        position - start,
        start <= head,
        end == len(tokens),
    )


def _find(corpus: Corpus, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], tuple[int, int]]:
    """Return the row, and the position in it, of the tokens with some keys; of several rows, the first."""
    documents = {document for document, _ in wanted}
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for row, document in enumerate(corpus.document.tolist()):
        if key_of(corpus.keys[document]) in documents:
            keys = zip(*(part.tolist() for part in corpus.places(corpus.take([row]))), strict=True)
            for position, key in enumerate(keys):
                if key in wanted:
                    found.setdefault(key, (row, position))
    return found
