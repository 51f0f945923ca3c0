"""What the page of a run shows besides its numbers: figures of where a skill was found, and texts with and without the edits.

Knows what an experiment has found, and draws it by what kind of intervention it is; knows nothing of how it was found.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from lens_unlearn import figures
from lens_unlearn.core.errors import CorpusError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.evaluation.generation import generate
from lens_unlearn.evaluation.report import BASE, Report
from lens_unlearn.experiments.documents import Documents
from lens_unlearn.experiments.plan import Plan
from lens_unlearn.experiments.selections import selection_of
from lens_unlearn.figures.layer_importance import MAX_SELECTIONS
from lens_unlearn.figures.theme import method_colours
from lens_unlearn.inspection.token_values import token_losses
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.when import When
from lens_unlearn.keyspace.key_space import key_space
from lens_unlearn.methods.controls import controls_for
from lens_unlearn.model.host import Model
from lens_unlearn.model.sites import Site
from lens_unlearn.model.special_tokens import written_after
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.histogram import Histogram
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.moments import Moments

__all__ = ["Content", "strongest"]

PROMPT, WRITTEN = 24, 24
"""Tokens of a plain text that are continued, and the longest continuation, where the report shows what is written."""
NEAR = 12
"""Tokens on either side among which a word's beginning is looked for."""
BEGINNINGS, OTHERS = 2, 3
"""Texts continued of forget and of retain, and further corpora of which one is."""
COLOURED, NATS = 120, 4.0
"""Tokens of a text that the report colours by what they lost, and where the scale ends."""
LAYERS = ("Which layers", "How ")
"""How the titles of figures begin that say where a method acts; the page shows the first figures, and folds the rest away."""
EPS = 1e-3


@dataclass(frozen=True)
class Content:
    """What an experiment has found, ready to be drawn."""

    model: Model
    plan: Plan
    documents: Documents
    edits: dict[str, Intervention]
    """By method."""
    fitted: dict[str, tuple[Any, Any]]
    """What each method was fitted to: moments, keys, or the corpora themselves."""
    progress: bool = True
    going_on: Callable[[str], AbstractContextManager[Any]] = lambda _: nullcontext()
    """Makes a block in which a figure may fail without the others."""

    def figures(self, curves: Report | None) -> dict[str, Any]:
        """Draw what the page shows: first what each method lost and cost, then where it was found, then the details."""
        drawn: dict[str, Any] = {}
        if curves is not None:
            drawn["Trade-off over strengths"] = self._with_budget(figures.tradeoff(curves))
            drawn["Remaining accuracy as more is ablated"] = figures.sweep_curves(curves)
        selected: dict[str, NeuronMap] = {}
        controls: dict[str, NeuronMap] = {}
        details: dict[str, Any] = {}
        for name, edit in self.edits.items():
            with self.going_on(f"the figures of {name}"):
                details |= next(
                    (draw(self, name, edit) for kind, draw in DETAILS.items() if isinstance(edit, kind)), {}
                )
                places = selection_of(edit, self.model)
                if places is not None:
                    selected[name] = places
                    control = next(iter(controls_for(self.model, edit, [self.plan.seed], *self.fitted[name])), None)
                    places = (
                        None if isinstance(control, Delta) or control is None else selection_of(control, self.model)
                    )
                    controls |= {} if places is None else {f"{name}:control": places}
        if len(selected) > 1:
            few = dict(
                list(selected.items())[:MAX_SELECTIONS]
            )  # the first that were named; each has a figure of its own
            drawn["Where the methods found the skill"] = figures.layer_importance(
                few, colours=method_colours(self.plan.methods), title="Neurons selected, by layer"
            )
        layers = {title: figure for title, figure in details.items() if title.startswith(LAYERS)}
        drawn |= layers | details  # by layer first
        overlapping = selected | controls
        if len(overlapping) > 1:
            drawn["Overlap of selections"] = figures.selection_overlap(overlapping)
        return drawn | self._coloured()

    def _with_budget(self, figure: Any) -> Any:
        """Mark the budget in the trade-off."""
        if self.plan.retain_drop is not None:
            label = {"annotation_text": "budget", "annotation_position": "bottom right", "annotation_font_size": 12}
            figure.add_vline(x=self.plan.retain_drop, line={"dash": "dash", "width": 1, "color": "#777777"}, **label)
        return figure

    def _coloured(self) -> dict[str, Any]:
        """Colour one text of forget and one of retain by what each token lost under each intervention."""
        drawn: dict[str, Any] = {}
        for name in ("forget", "retain"):
            with suppress(CorpusError):  # a text of which no token is predicted
                text = self.documents.test[name].only([self._document(name)])
                losses = token_losses(self.model, text, self.edits, batch_size=self.plan.batch_size, progress=False)
                drawn[f"Token by token: what a text of {name} lost"] = figures.texts(losses, limit=NATS, most=COLOURED)
        return drawn

    def _training(self, name: str, edit: Delta) -> dict[str, Any]:
        return {f"How {name} was trained": figures.training_curves(edit)} if edit.record else {}

    def _keys(self, name: str, edit: Abstain) -> dict[str, Any]:
        """Draw how the fitted queries lie in key space: all layers, then the first that votes."""
        place = min(edit.regions)
        try:
            space = key_space(
                self.model, self.documents.queries, place.kind,
                seed=self.plan.seed, batch_size=self.plan.batch_size, progress=self.progress,
            )  # fmt: skip
        except CorpusError as error:  # enough to fit one region, not to fit and judge four at every layer
            warnings.warn(f"the report has no figures of the key space: {error}", RuntimeWarning, stacklevel=2)
            return {}
        return {
            f"Which layers tell the queries apart ({name})": figures.key_space(space),
            f"Finding the queries at {place} ({name})": figures.key_roc(space, "forget", place),
            f"The queries' keys at {place} ({name})": figures.key_map(space, place, skill="forget"),
        }

    def _neurons(self, name: str, edit: Ablate | Adjust) -> dict[str, Any]:
        """Draw which neurons were selected, layer by layer and one by one, where both sides' moments are known."""
        forget, retain = self.fitted[name]
        selection = edit.selection
        if not (isinstance(forget, Moments) and isinstance(retain, Moments)) or not set(selection) <= set(forget.mean):
            return {}
        record = self.plan.records[name]
        if record.score is None:
            score = forget.mean_abs / (retain.mean_abs + EPS)
        else:
            score = record.score(forget, retain, **{**self.plan.options(name), "site": selection.kinds[0]})
        title = f"{name}: share selected, and mean score of the selected, per layer"
        drawn: dict[str, Any] = {
            f"Where {name} found the skill": figures.layer_importance(score, selection, title=title),
            f"Specialization of neurons ({name})": figures.specialization_map(forget, retain, selection=selection),
        }
        if forget.routed_tokens:
            loads = {"forget": forget, "retain": retain}
            drawn[f"Where {name} found the skill, by expert"] = figures.layer_importance(score, selection, by="expert")
            drawn[f"How forget and retain are routed ({name})"] = figures.expert_load(loads, against="retain")
        if isinstance(edit, Ablate):
            drawn[f"Every neuron's score ({name})"] = figures.neuron_heatmap(
                (forget.mean_abs + EPS) / (retain.mean_abs + EPS), selection=selection
            )
        drawn[f"Activations of the most specialized neurons ({name})"] = self._distribution(
            score, selection, self.plan.options(name).get("skip_sinks")
        )
        return drawn

    def _distribution(self, score: NeuronMap, selection: NeuronMap, skip_sinks: float | None) -> Any:
        best = strongest(score.where(selection, float("-inf")), 6)
        sites = sorted({site for site, _ in best})
        read = {
            name: collect(
                self.model, corpus.first(5000), sites, statistic=Histogram(),
                batch_size=self.plan.batch_size, skip_sinks=skip_sinks, progress=False,
            )
            for name, corpus in self.documents.fit.items()
        }  # fmt: skip
        return figures.activation_distribution(read, best)

    def _document(self, name: str) -> int:
        """Choose the first document with a short prompt, so that there is something behind it to colour."""
        corpus = self.documents.test[name]
        rows = range(min(50, corpus.n_rows))
        return int(corpus.document[next((row for row in rows if 4 * len(corpus.prompt(row)) < COLOURED), 0)])

    def samples(self, answered: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Continue the prompts, or the beginnings, of a few test documents with and without each intervention.

        Where questions of a corpus were answered already, those are shown.
        """
        asked = {sample["corpus"] for sample in answered}
        others = [name for name in self.documents.test if name not in ("forget", "retain")][:OTHERS]
        counts = {"forget": BEGINNINGS, "retain": BEGINNINGS, **dict.fromkeys(others, 1)}
        samples = [one for name, count in counts.items() if name not in asked for one in self._begun(name, count)]
        if samples:
            self._continue(samples)
        order = list(self.documents.test)
        return sorted([*samples, *answered], key=lambda sample: order.index(sample["corpus"]))

    def _continue(self, samples: list[dict[str, Any]]) -> None:
        prompts = [sample.pop("asked") for sample in samples]
        for condition, edit in {BASE: None, **self.edits}.items():
            # They begin as the rows do that they are taken from; those of chats are written in the template already.
            bos = self.documents.test["forget"].prepend_bos
            written = generate(self.model, prompts, intervention=edit, max_new_tokens=WRITTEN, prepend_bos=bos)
            for sample, text in zip(samples, written, strict=True):
                abstained = isinstance(edit, Abstain) and text == edit.refusal
                if abstained:
                    sample.setdefault("withheld", []).append(condition)
                elif "\n" not in sample.get("true answer", "\n"):  # an answer of one line ends where it does
                    text = text.strip().partition("\n")[0]
                sample[condition] = text

    def _begun(self, name: str, count: int) -> Iterator[dict[str, Any]]:
        """Give the first prompts of a corpus, or the beginnings of its texts, with how they go on there: both begin with a word."""
        corpus, tokenizer = self.documents.test[name], self.model.tokenizer
        bos, given = int(corpus.prepend_bos), corpus.has_prompts
        for row in _beginnings(corpus, count):
            tokens, answer = corpus.row(row).tolist(), corpus.answer(row)
            end = len(corpus.prompt(row)) if given else bos + PROMPT
            if answer is None and corpus.asked is None:  # cut anywhere, by us
                end = word_after(tokenizer, tokens, end)
            follows = written_after(tokenizer, tokens[:end], tokens[end : end + WRITTEN])
            true = {"reference": follows} if answer is None else {"true answer": answer.text}
            # Asked in the chat template, where there is one, and shown without its special tokens.
            asked, shown = (tokenizer.decode(tokens[bos:end], skip_special_tokens=skip) for skip in (False, True))
            if shown.strip():
                yield {"corpus": name, "asked": asked, "prompt": shown, **true}


DETAILS: dict[type[Intervention], Callable[[Content, str, Any], dict[str, Any]]] = {
    Delta: Content._training,
    Abstain: Content._keys,
    When: lambda content, name, edit: content._keys(name, edit.detector),
    Ablate: Content._neurons,
    Adjust: Content._neurons,
}
"""The figures of each kind of intervention."""


def _beginnings(corpus: Corpus, count: int) -> list[int]:
    """Return the rows with which the first documents begin: others may begin within a word."""
    known = corpus.document.tolist()
    return [row for row in range(corpus.n_rows) if row == 0 or known[row] != known[row - 1]][:count]


def word_after(tokenizer: Any, tokens: Sequence[int], place: int) -> int:
    """Return the first place from one on, or else the last before it, at which a token begins a word; itself if none is near."""
    near = [*range(place, place + NEAR), *range(place - 1, place - NEAR, -1)]
    return next((at for at in near if 0 < at < len(tokens) and _begins_word(tokenizer, tokens, at)), place)


def _begins_word(tokenizer: Any, tokens: Sequence[int], place: int) -> bool:
    before = tokenizer.decode(list(tokens[:place]), skip_special_tokens=True)
    return before[-1:].isspace() or written_after(tokenizer, tokens[:place], tokens[place : place + 1])[:1].isspace()


def strongest(score: NeuronMap, count: int) -> list[tuple[Site, int]]:
    """Return the neurons with the highest scores, as (site, flat index)."""
    ranked = score.flat().double().argsort(descending=True, stable=True)[:count].tolist()
    found: list[tuple[Site, int]] = []
    for position in ranked:
        for site, value in score.items():
            if position < value.numel():
                found.append((site, position))
                break
            position -= value.numel()
    return found
