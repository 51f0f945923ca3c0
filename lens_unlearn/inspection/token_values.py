"""`token_activations`, `token_firing` and `token_losses`: values at every token of a text, as `TokenValues`.

    lu.token_activations(model, text, "L3.mlp.post[17]")      # the activation of a neuron
    lu.token_firing(model, text, selection)                   # how many of the selected neurons fire
    lu.token_losses(model, text, {"pruned": prune})           # how much harder each token became to predict

Knows what is measured at a token, and which tokens have no value; knows nothing of how a text is coloured, which is
`figures.texts`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_unlearn.core.errors import ActivationError, CorpusError, LensUnlearnError
from lens_unlearn.core.progress import Bar
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.evaluation.report import BASE
from lens_unlearn.evaluation.teacher_forcing import force
from lens_unlearn.inspection.shown import (
    Neurons,
    Shown,
    Texts,
    about_of,
    activations,
    corpus_of,
    counted_of,
    named_conditions,
    neurons_of,
    pieces,
    require_finite,
    shortened,
)
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.model.host import Model, require_eval, require_model

__all__ = ["Text", "TokenValues", "token_activations", "token_firing", "token_losses"]


@dataclass(frozen=True, eq=False)
class Text:
    """One row of a corpus, as the model sees it, with values at its tokens."""

    document: int
    """Which document it is of."""
    name: str
    """What it is called above its text; empty where there is only one."""
    ids: Int[Tensor, "pos"]
    tokens: tuple[str, ...]
    """Together they are the text. Of tokens that share a character, the last one has it, and the others are empty."""
    counted: Bool[Tensor, "pos"]
    """Whether a token counts: not BOS, and not part of a prompt."""
    values: Float[Tensor, "names pos"]
    """NaN where there is no value."""


@dataclass(frozen=True, eq=False)
class TokenValues(Shown):
    """One or several values at every token of some texts.

    ``values["pruned"]`` is the same with that value drawn alone; the others stay in the tooltips.
    """

    title: str
    unit: str
    names: tuple[str, ...]
    """What the values are; rows of `Text.values`."""
    signed: tuple[bool, ...]
    """Whether each is drawn about zero, or from zero on."""
    texts: tuple[Text, ...]
    shown: tuple[str, ...]
    """The names of those that are drawn."""
    shared: bool = False
    """Whether signed values share one scale, and magnitudes another."""
    about: str = ""
    """Model and corpus."""

    def __getitem__(self, names: str | Sequence[str]) -> "TokenValues":
        """Return the same with other values drawn.

        Raises:
            LensUnlearnError: If there is none of that name.
        """
        wanted = (names,) if isinstance(names, str) else tuple(names)
        unknown = [name for name in wanted if name not in self.names]
        if unknown or not wanted:
            raise LensUnlearnError(
                f"there is no value {''.join(unknown[:1])!r} here: choose from {shortened(self.names)}"
            )
        return replace(self, shown=wanted)

    def to_frame(self) -> pd.DataFrame:
        """Give one row per token: text, document, position (as the model saw it), id, token, counted, and a column per value."""
        import pandas as pd

        frames = [
            pd.DataFrame(
                {
                    "text": number,
                    "document": text.document,
                    "position": range(len(text.ids)),
                    "id": text.ids.tolist(),
                    "token": text.tokens,
                    "counted": text.counted.tolist(),
                    **{name: text.values[i].tolist() for i, name in enumerate(self.names)},
                }
            )
            for number, text in enumerate(self.texts)
        ]
        return pd.concat(frames, ignore_index=True)

    def html(self) -> str:
        """Return what `lens_unlearn.plot.texts` draws of it."""
        from lens_unlearn.figures.texts import texts  # only here does a value reach up to what draws it

        return texts(self)

    def __repr__(self) -> str:
        tokens = sum(len(text.ids) for text in self.texts)
        return f"TokenValues({self.title}: {shortened(self.names)}; {tokens:,} tokens in {len(self.texts):,} texts)"


def token_activations(model: Model, text: Texts, neurons: Neurons, *, prepend_bos: bool | None = None) -> TokenValues:
    """Return the activations of neurons at every token of a text; BOS has none, as it counts in no statistic.

    Inside an intervention's block the activations are those with the intervention acting.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
        text: One text, several, or a corpus. What is longer than the context (or the corpus' window) is cut into rows, of which
            each begins anew.
        neurons: Such as ``"L3.mlp.post[17]"``, ``("L3.mlp.post", 17)``, several of them, or a selection.
        prepend_bos: Whether a text begins with BOS, once; default as `read_corpus` has it.

    Raises:
        SiteError: If a site does not exist.
        SelectionError: If a neuron does not exist, or none was named.
        CorpusError: If a text is empty.
        ActivationError: If an activation is NaN or infinite.
    """
    require_model(model)
    places, points = neurons_of(model, neurons)
    corpus = corpus_of(model, text, prepend_bos)

    def look(tokens: Tensor) -> Tensor:
        seen = activations(model, tokens, points)
        return torch.stack([seen[site][:, index] for site, index in places.values()])

    names = tuple(places)
    title = f"Activation of {names[0]}" if len(names) == 1 else f"Activation of {len(names):,} neurons"
    values = {row: look(corpus.row(row)) for row in range(corpus.n_rows)}
    require_finite(values, names)
    texts = _texts(model, corpus, values)
    return TokenValues(title, "", names, (True,) * len(names), texts, names, about=about_of(model, text))


def token_firing(
    model: Model,
    text: Texts,
    selection: Neurons,
    *,
    measure: Literal["count", "mean_abs"] = "count",
    threshold: float = 0.0,
    prepend_bos: bool | None = None,
) -> TokenValues:
    """Return how strongly a selection fires at every token of a text; BOS has no value.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
        text: As for `token_activations`.
        selection: A boolean `NeuronMap`, such as ``score.top(0.02)`` or ``prune.selection``, or neurons by name.
        measure: "count", the number of selected neurons whose activation is above the threshold; or "mean_abs", the mean
            absolute activation of the selected neurons.
        threshold: In units of the activation.
        prepend_bos: As for `token_activations`.

    Raises:
        SiteError: If a site does not exist.
        SelectionError: If the selection is empty, or of another model.
        CorpusError: If a text is empty.
        ActivationError: If an activation is NaN or infinite.
    """
    require_model(model)
    if measure not in ("count", "mean_abs"):
        raise LensUnlearnError(f"measure={measure!r} is not known: choose 'count' or 'mean_abs'")
    places, points = neurons_of(model, selection)
    corpus = corpus_of(model, text, prepend_bos)
    index = {site: torch.tensor([i for s, i in places.values() if s == site]) for site in points}

    def look(tokens: Tensor) -> Tensor:
        seen = activations(model, tokens, points)
        chosen = torch.cat([seen[site][:, index[site]] for site in points], dim=1)
        if not bool(torch.isfinite(chosen).all()):
            raise ActivationError(
                "an activation of the selection is NaN or infinite: look at it with token_activations"
            )
        firing = (chosen > threshold).sum(1) if measure == "count" else chosen.abs().mean(1)
        return firing[None].float()

    texts = _texts(model, corpus, {row: look(corpus.row(row)) for row in range(corpus.n_rows)})
    unit = f"of {len(places):,} neurons above {threshold:g}" if measure == "count" else "mean |activation|"
    title = f"Where {len(places):,} selected neurons fire" if len(places) > 1 else f"Where {next(iter(places))} fires"
    name = "firing" if measure == "count" else "mean |activation|"
    return TokenValues(title, unit, (name,), (False,), texts, (name,), about=about_of(model, text))


def token_losses(
    model: Model,
    text: Texts,
    interventions: Mapping[str, Intervention | None] | None = None,
    *,
    prepend_bos: bool | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> TokenValues:
    """Return the loss of every token of a text, -log p(token | tokens before it) in nats, with and without interventions.

    The values are "base" (the model as it is here), each intervention's loss by its name, and "NAME - base", which is drawn
    where there is any. BOS, the first token of a row without BOS, and prompts are not predicted: they have no value.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
        text: As for `token_activations`.
        interventions: By name, as for `evaluate`.
        prepend_bos: As for `token_activations`.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        progress: Whether to show a bar.

    Raises:
        LensUnlearnError: If a condition is no intervention, or "base" is one.
        CorpusError: If a text is empty, or nothing in it is predicted.
        ActivationError: If a loss is NaN.
    """
    require_model(model)
    conditions = named_conditions(interventions or {})
    require_eval(model)
    corpus = corpus_of(model, text, prepend_bos)
    losses: dict[str, list[Tensor]] = {}
    with Bar(total=corpus.n_rows * len(conditions), unit=" rows", disable=not progress, desc="token_losses") as bar:
        for name, intervention in conditions.items():
            if intervention is None and losses:
                losses[name] = losses[BASE]
                continue
            forced = force(model, corpus, intervention, batch_size, bar)
            losses[name] = [torch.from_numpy(row["loss"]) for row in forced]
    values: dict[int, Tensor] = {}
    for row in range(corpus.n_rows):
        table = torch.full((len(conditions), len(corpus.row(row))), torch.nan, dtype=torch.float64)
        predicted = counted_of(corpus, row)
        predicted[0] = False  # nothing stands before the first token
        table[:, predicted] = torch.stack([losses[name][row] for name in conditions])
        if bool(table[:, predicted].isnan().any()):
            name = list(conditions)[int(table[:, predicted].isnan().any(1).nonzero()[0])]
            raise ActivationError(
                f"the loss under {name!r} is NaN: the model or the intervention is broken on this text"
            )
        values[row] = torch.cat([table, table[1:] - table[0]])
    if not any(bool(table.isfinite().any()) for table in values.values()):
        raise CorpusError("nothing in this text is predicted: give at least two tokens, or one behind BOS")
    edited = tuple(name for name in conditions if name != BASE)
    differences = tuple(f"{name} - {BASE}" for name in edited)
    return TokenValues(
        "Loss of each token",
        "nats",
        (BASE, *edited, *differences),
        (False,) * len(conditions) + (True,) * len(edited),
        _texts(model, corpus, values),
        differences or (BASE,),
        shared=True,
        about=about_of(model, text),
    )


def _texts(model: Model, corpus: Corpus, values: Mapping[int, Float[Tensor, "names pos"]]) -> tuple[Text, ...]:
    """Put the values of each row beside its tokens; BOS loses its values."""
    document = corpus.document.tolist()
    parts: dict[int, list[int]] = {}
    for row, number in enumerate(document):
        parts.setdefault(number, []).append(row)
    texts = []
    for row, table in values.items():
        siblings = parts[document[row]]
        name = "" if corpus.n_rows == 1 else f"document {document[row]}"
        if len(siblings) > 1:
            name += f", part {siblings.index(row) + 1} of {len(siblings)}"
        ids = corpus.row(row)
        table = table.double()
        if corpus.prepend_bos:
            table = torch.cat([torch.full_like(table[:, :1], torch.nan), table[:, 1:]], dim=1)
        tokens = pieces(model, ids.tolist(), bos=corpus.prepend_bos)
        texts.append(Text(document[row], name, ids, tuple(tokens), counted_of(corpus, row), table))
    return tuple(texts)
