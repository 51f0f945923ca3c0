"""Seeing text: what neurons, interventions and selections do at each token.

    lu.token_activations(model, text, "L3.mlp.post[17]")      # the text, coloured by a neuron's activation
    lu.token_losses(model, text, {"pruned": prune})           # by how much harder each token became to predict
    lu.token_firing(model, text, selection)                   # by how many of the selected neurons fire there
    lu.generations(model, prompts, {"pruned": prune})         # what the model writes, with and without

Each returns plain data that shows itself as the last line of a cell; `lens_unlearn.examples` has a neuron's top examples.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lens_unlearn.corpora import Corpus, read_corpus
from lens_unlearn.errors import ActivationError, CorpusError, LensUnlearnError, SelectionError
from lens_unlearn.evaluation.forcing import force
from lens_unlearn.evaluation.generation import generate
from lens_unlearn.evaluation.report import BASE
from lens_unlearn.figures.texts import document
from lens_unlearn.figures.texts import generations as draw_generations
from lens_unlearn.figures.texts import texts as draw_texts
from lens_unlearn.figures.theme import neuron_name
from lens_unlearn.interventions import Intervention
from lens_unlearn.maps import NeuronMap
from lens_unlearn.models import model_name
from lens_unlearn.sites import (
    Model,
    Point,
    Remover,
    Site,
    attach,
    backbone,
    detach_all,
    one_thread,
    require_eval,
    require_model,
    resolve,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Generations",
    "Neuron",
    "Neurons",
    "Shown",
    "Text",
    "TokenValues",
    "generations",
    "token_activations",
    "token_firing",
    "token_losses",
]

Texts = str | Sequence[str] | Corpus
"""One text, several, or a corpus; of a corpus, `corpus.only([3])` is the fourth document alone."""
Neuron = str | tuple[str | Site, int | tuple[int, ...]]
"""A neuron as figures name it, ``"L3.mlp.post[17]"`` or ``"L3.attn.z[2,5]"``, or its site and (flat) index."""
Neurons = NeuronMap | Neuron | Sequence[Neuron]
"""A neuron, several, or a selection."""

_NEURON = re.compile(r"\s*([^\[\s]+)\[([\d,\s]+)\]\s*")
_PENDING = 8  # tokens that may wait for the rest of a character, which has four bytes at most


class Shown(ABC):
    """What shows itself as HTML, in a notebook and in a file."""

    @abstractmethod
    def html(self) -> str:
        """Return the HTML of a cell: escaped, with styles of its own, without scripts, and without addresses."""

    @abstractmethod
    def to_frame(self) -> "pd.DataFrame":
        """Return everything that is known, as a table."""

    def _repr_html_(self) -> str:
        return self.html()

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a document that opens offline."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(document(self.html()))


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
    """Which of them are drawn about zero, and which from zero on."""
    texts: tuple[Text, ...]
    shown: tuple[str, ...]
    """Which of them are drawn."""
    shared: bool = False
    """Whether those of one kind are drawn on one scale."""
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
            raise LensUnlearnError(f"there is no value {''.join(unknown[:1])!r} here: choose from {_some(self.names)}")
        return replace(self, shown=wanted)

    def to_frame(self) -> "pd.DataFrame":
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
        return draw_texts(self)

    def __repr__(self) -> str:
        tokens = sum(len(text.ids) for text in self.texts)
        return f"TokenValues({self.title}: {_some(self.names)}; {tokens:,} tokens in {len(self.texts):,} texts)"


@dataclass(frozen=True, eq=False)
class Generations(Shown):
    """What a model writes to prompts, under each condition."""

    prompts: tuple[str, ...]
    written: Mapping[str, tuple[str, ...]]
    """By condition, in the order of the prompts."""
    about: str = ""
    """Model and settings."""

    def to_frame(self) -> "pd.DataFrame":
        """Give one row per prompt and condition: prompt, condition, text."""
        import pandas as pd

        rows = [(p, name, texts[i]) for i, p in enumerate(self.prompts) for name, texts in self.written.items()]
        return pd.DataFrame(rows, columns=["prompt", "condition", "text"])

    def html(self) -> str:
        """Return what `lens_unlearn.plot.generations` draws of it."""
        return draw_generations(self)

    def __repr__(self) -> str:
        return f"Generations({len(self.prompts):,} prompts: {_some(tuple(self.written))})"


def token_activations(model: Model, text: Texts, neurons: Neurons) -> TokenValues:
    """Return the activations of neurons at every token of a text; BOS has none, as it counts in no statistic.

    Inside an intervention's block the activations are those with the intervention acting.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
        text: One text, several, or a corpus. What is longer than the context (or the corpus' window) is cut into rows, of which
            each begins anew.
        neurons: Such as ``"L3.mlp.post[17]"``, ``("L3.mlp.post", 17)``, several of them, or a selection.

    Raises:
        SiteError: If a site does not exist.
        SelectionError: If a neuron does not exist, or none was named.
        CorpusError: If a text is empty.
        ActivationError: If an activation is NaN or infinite.
    """
    places, points = neurons_of(model, neurons)
    corpus = _corpus_of(model, text)

    def look(tokens: Tensor) -> Tensor:
        seen = activations(model, tokens, points)
        return torch.stack([seen[site][:, index] for site, index in places.values()])

    names = tuple(places)
    title = f"Activation of {names[0]}" if len(names) == 1 else f"Activation of {len(names):,} neurons"
    values = {row: look(corpus.row(row)) for row in range(corpus.n_rows)}
    _require_finite(values, names)
    told = _texts(model, corpus, values)
    return TokenValues(title, "", names, (True,) * len(names), told, names, about=_about(model, text))


def token_firing(
    model: Model,
    text: Texts,
    selection: Neurons,
    *,
    measure: Literal["count", "mean_abs"] = "count",
    threshold: float = 0.0,
) -> TokenValues:
    """Return how strongly a selection fires at every token of a text; BOS has no value.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
        text: As for `token_activations`.
        selection: A boolean `NeuronMap`, such as ``score.top(0.02)`` or ``prune.selection``, or neurons by name.
        measure: "count", the number of selected neurons whose activation is above the threshold; or "mean_abs", the mean
            absolute activation of the selected neurons.
        threshold: In units of the activation.

    Raises:
        SiteError: If a site does not exist.
        SelectionError: If the selection is empty, or of another model.
        CorpusError: If a text is empty.
        ActivationError: If an activation is NaN or infinite.
    """
    if measure not in ("count", "mean_abs"):
        raise LensUnlearnError(f"measure={measure!r} is not known: choose 'count' or 'mean_abs'")
    places, points = neurons_of(model, selection)
    corpus = _corpus_of(model, text)
    index = {site: torch.tensor([i for s, i in places.values() if s == site]) for site in points}

    def look(tokens: Tensor) -> Tensor:
        seen = activations(model, tokens, points)
        chosen = torch.cat([seen[site][:, index[site]] for site in points], dim=1)
        if not bool(torch.isfinite(chosen).all()):
            raise ActivationError(
                "an activation of the selection is NaN or infinite: look at it with token_activations"
            )
        told = (chosen > threshold).sum(1) if measure == "count" else chosen.abs().mean(1)
        return told[None].float()

    told = _texts(model, corpus, {row: look(corpus.row(row)) for row in range(corpus.n_rows)})
    unit = f"of {len(places):,} neurons above {threshold:g}" if measure == "count" else "mean |activation|"
    title = f"Where {len(places):,} selected neurons fire" if len(places) > 1 else f"Where {next(iter(places))} fires"
    name = "firing" if measure == "count" else "mean |activation|"
    return TokenValues(title, unit, (name,), (False,), told, (name,), about=_about(model, text))


def token_losses(
    model: Model,
    text: Texts,
    interventions: Mapping[str, Intervention | None] | None = None,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> TokenValues:
    """Return the loss of every token of a text, -log p(token | tokens before it) in nats, with and without interventions.

    The values are "base" (the model as it is here), each intervention's loss by its name, and "NAME - base", which is drawn
    where there is any. BOS, the first token of a row without BOS, and prompts are not predicted: they have no value.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
        text: As for `token_activations`.
        interventions: By name, as for `evaluate`.
        batch_size: Full-length rows per forward.
        progress: Whether to show a bar.

    Raises:
        LensUnlearnError: If one of them is no intervention, or "base" is one.
        CorpusError: If a text is empty, or nothing in it is predicted.
        ActivationError: If a loss is NaN.
    """
    conditions = _conditions(interventions or {})
    require_model(model)
    require_eval(model)
    corpus = _corpus_of(model, text)
    losses: dict[str, list[Tensor]] = {}
    with tqdm(total=corpus.n_rows * len(conditions), unit=" rows", disable=not progress, desc="token_losses") as bar:
        for name, intervention in conditions.items():
            if intervention is None and losses:
                losses[name] = losses[BASE]
                continue
            forced = force(model, corpus, intervention, batch_size, bar)
            losses[name] = [torch.from_numpy(one.loss) for one in forced]
    values: dict[int, Tensor] = {}
    for row in range(corpus.n_rows):
        one = torch.full((len(conditions), len(corpus.row(row))), torch.nan, dtype=torch.float64)
        predicted = _counted(corpus, row)
        predicted[0] = False
        one[:, predicted] = torch.stack([losses[name][row] for name in conditions])
        if bool(one[:, predicted].isnan().any()):
            name = list(conditions)[int(one[:, predicted].isnan().any(1).nonzero()[0])]
            raise ActivationError(
                f"the loss under {name!r} is NaN: the model or the intervention is broken on this text"
            )
        values[row] = torch.cat([one, one[1:] - one[0]])
    if not any(bool(one.isfinite().any()) for one in values.values()):
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
        about=_about(model, text),
    )


def generations(
    model: Model,
    prompts: str | Sequence[str],
    conditions: Mapping[str, Intervention | None],
    *,
    max_new_tokens: int = 60,
    temperature: float = 0.0,
    prepend_bos: bool | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Generations:
    """Continue prompts under several conditions, side by side; `generate` says what the options mean.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` with a tokenizer.
        prompts: One or several texts.
        conditions: By name: an intervention, or None. The model as it is here always comes first, as "base".
        max_new_tokens: The longest continuation.
        temperature: 0 takes the most probable token at each step; above it, tokens are drawn.
        prepend_bos: Whether the prompt begins with BOS; default as the model was trained.
        batch_size: Prompts of one length that are run together, at temperature 0.
        seed: Of the draws: the same for every condition.

    Raises:
        LensUnlearnError: If one of the conditions is no intervention, or "base" is one.
        CorpusError: If there is no prompt, the model has no tokenizer, or a prompt is empty or longer than the context.
    """
    given = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    for number, prompt in enumerate(given):
        if not prompt:
            raise CorpusError(f"prompt {number} is empty: give a text to continue")
    if not given:
        raise CorpusError("there is no prompt: give at least one")
    written: dict[str, tuple[str, ...]] = {}
    for name, intervention in _conditions(conditions).items():
        if intervention is None and written:
            written[name] = written[BASE]
            continue
        written[name] = tuple(
            generate(
                model,
                given,
                intervention=intervention,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                prepend_bos=prepend_bos,
                batch_size=batch_size,
                seed=seed,
            )
        )
    drawn_at = f"temperature {temperature:g}, seed {seed}" if temperature > 0 else "the most probable tokens"
    return Generations(given, written, f"{model_name(model)} · {drawn_at}, at most {max_new_tokens:,}")


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
    wanted = [_neuron(one) for one in given]
    if not wanted:
        raise SelectionError("no neuron was named: write it as 'L3.mlp.post[17]'")
    points = resolve(model, [site for site, _ in wanted])
    places = {}
    for site, index in wanted:
        shape = points[site].shape
        if not (
            len(index) in (1, len(shape)) and all(0 <= i < n for i, n in zip(index, _sizes(index, shape), strict=True))
        ):
            told = f"0 to {_sizes((0,), shape)[0] - 1}" + (f", or [head, place] of {shape}" if len(shape) > 1 else "")
            raise SelectionError(f"there is no {site}[{','.join(map(str, index))}]: that site has neurons {told}")
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
        shape = points[site].shape
        if tuple(mask.shape) != shape:
            raise SelectionError(f"{site}: the selection has shape {tuple(mask.shape)}, and the model {shape}")
        for flat in mask.reshape(-1).nonzero()[:, 0].tolist():
            places[neuron_name(site, flat, shape)] = (site, flat)
    return places, points


def _conditions(given: Mapping[str, Intervention | None]) -> dict[str, Intervention | None]:
    """Check conditions, and put the unedited model first."""
    for name, one in given.items():
        if one is not None and not isinstance(one, Intervention):
            raise LensUnlearnError(f"{name!r} is no intervention: give one, or None")
    if given.get(BASE) is not None:
        raise LensUnlearnError(f"{BASE!r} is the model without any of them: give the intervention another name")
    return {BASE: None, **given}


def _corpus_of(model: Model, text: Texts) -> Corpus:
    if isinstance(text, Corpus):
        text.check(model)
        return text
    require_model(model)
    given = [text] if isinstance(text, str) else list(text)
    for number, one in enumerate(given):
        if not (isinstance(one, str) and one.strip()):
            which = "the text" if isinstance(text, str) else f"text {number}"
            raise CorpusError(f"{which} is empty: give one with at least a word")
    if not given:
        raise CorpusError("there is no text: give at least one")
    corpus = read_corpus(given, model, window=int(model.cfg.n_ctx), name="text")
    if corpus.skipped:
        raise CorpusError(
            f"{sum(corpus.skipped.values()):,} of these texts are shorter than two tokens: leave them out"
        )
    return corpus


def _about(model: Model, text: Texts) -> str:
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


def _require_finite(values: Mapping[int, Float[Tensor, "names pos"]], names: Sequence[str]) -> None:
    for one in values.values():
        bad = (~torch.isfinite(one)).nonzero()
        if len(bad):
            name, place = (int(i) for i in bad[0])
            raise ActivationError(
                f"{names[name]} is {float(one[name, place])} at position {place}: the model overflows or is broken there; "
                "try a wider dtype"
            )


def _counted(corpus: Corpus, row: int) -> Bool[Tensor, "pos"]:
    return corpus.counted[int(corpus.starts[row]) : int(corpus.starts[row + 1])].clone()


def _texts(model: Model, corpus: Corpus, values: Mapping[int, Float[Tensor, "names pos"]]) -> tuple[Text, ...]:
    """Put the values of each row beside its tokens; BOS loses its values."""
    document = corpus.document.tolist()
    parts: dict[int, list[int]] = {}
    for row, of in enumerate(document):
        parts.setdefault(of, []).append(row)
    told = []
    for row, one in values.items():
        siblings = parts[document[row]]
        name = "" if corpus.n_rows == 1 else f"document {document[row]}"
        if len(siblings) > 1:
            name += f", part {siblings.index(row) + 1} of {len(siblings)}"
        ids = corpus.row(row)
        one = one.double()
        if corpus.prepend_bos:
            one = torch.cat([torch.full_like(one[:, :1], torch.nan), one[:, 1:]], dim=1)
        tokens = pieces(model, ids.tolist(), bos=corpus.prepend_bos)
        told.append(Text(document[row], name, ids, tuple(tokens), _counted(corpus, row), one))
    return tuple(told)


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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")


def _decoded(tokenizer: object, ids: list[int]) -> Iterator[str]:
    """Decode token by token: each time with the token before, which says whether a space comes between them."""

    def decode(part: list[int]) -> str:
        return tokenizer.decode(part, clean_up_tokenization_spaces=False)  # type: ignore[attr-defined]

    before = start = 0  # ids[before:start] is text that was given out, ids[start:end] waits
    for end in range(1, len(ids) + 1):
        told = decode(ids[before:start])
        new = decode(ids[before:end])[len(told) :]
        waits = new.endswith("\ufffd") and end - start < _PENDING and end < len(ids)
        if waits:
            yield ""
        else:
            yield new
            before, start = start, end
