"""`Method`: everything that runs, comparisons, the command line and reports need to know of a method.

Knows what a method is fitted to, how strong it can be and what its control is; knows no method by name. A new method is a file
with a function and a record, and a line in `lens_unlearn.methods.METHODS`.
"""

import functools
import inspect
import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.methods.controls import RANDOM_LOADED, RANDOM_NEURONS, Controls, random_controls
from lens_unlearn.model.experts import EXPERT_KINDS
from lens_unlearn.model.host import Model
from lens_unlearn.model.sites import resolve
from lens_unlearn.neurons.collect import collect, query_keys
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.moments import Moments

__all__ = ["FRACTIONS", "Fitted", "Method", "require_some"]

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
"""Shares of the neurons that are swept over, from weak to strong."""

Fitted = tuple[Any, Any]
"""What a method takes as forget and retain: statistics, corpora, or what its `prepare` made of them."""

_SHARED = ("batch_size", "progress", "pool", "seed", "skip_sinks")


@dataclass(frozen=True)
class Method:
    """A method, as the rest of the package sees it.

    Its function takes ``(model, forget, retain, *, options)`` and returns an intervention; forget and retain are what `fitted_to`
    says. A function that is fitted to statistics gets them collected once, whatever the number of strengths.

    Examples:
        >>> from lens_unlearn.interventions.ablate import Ablate
        >>> def most_firing(model, forget, retain, *, fraction=0.02):
        ...     return Ablate(forget.positive.top(fraction))
        >>> Method(name="most-firing", function=most_firing, fitted_to=Moments, strength="fraction").options
        ('fraction',)
    """

    name: str
    """On the command line, in reports and in file names: lower case with dashes."""
    function: Callable[..., Intervention]
    fitted_to: type = Corpus
    """What the function takes as forget and retain: `Moments`, `KeySample` (the keys of prompts), or `Corpus`; or what `prepare`
    makes of corpora, a type of its own. It says by `of_prompts` whether prompts are what it was collected over."""
    strength: str = "fraction"
    """The option that says how much is changed, above 0 and at most 1: a share of neurons, of false positives, or a factor."""
    grid: tuple[float, ...] = FRACTIONS
    """The strengths that a sweep goes over."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Options that this name fixes, such as the site."""
    sites: str | tuple[str, ...] = "mlp.post"
    """Where statistics are collected for a function without an option `site`."""
    prepare: Callable[..., Fitted] | None = None
    """Takes ``(model, forget, retain, **options)``, corpora, and returns what the function takes at every strength. Default: the
    statistic of `fitted_to`, collected at `sites` over each corpus; corpora as they are."""
    costly: tuple[str, ...] = ()
    """Options that a sweep leaves out, because each strength would cost passes over the corpora of its own."""
    check: Callable[..., None] | None = None
    """Takes ``(model, forget, retain, **options)`` and refuses, in a sentence, whatever the function would refuse: options, and
    corpora of too few documents or queries. A run asks twice before it does anything: with None for all three before a model is
    loaded, and with the corpora that the function or its `prepare` will get before the first pass over them."""
    control: Controls = random_controls
    """Makes the random controls of an intervention that the method found."""
    control_words: str = RANDOM_NEURONS
    """What its control is, as reports say it."""
    score: Callable[..., NeuronMap] | None = None
    """Takes ``(forget, retain, **options)``, moments, and returns the score that neurons were selected by, for figures."""
    by_source: bool = False
    """Whether the function takes several sources to retain as a list, since it keeps its budget on each."""
    unlearns_answers: bool = False
    """Whether it is fitted to answers, and so texts are cut into prompts and what follows."""
    trains: bool = False
    """Whether it trains: then `compare` takes it only when it is named."""
    baseline: bool = False
    """Whether it is here to be compared with: then `compare` takes it only when it is named."""
    summary: str = ""
    """What it does and where it was published, in a sentence or two: for help texts and cards."""

    @property
    def judges_prompts(self) -> bool:
        """Whether it decides prompt by prompt: it is fitted to their keys, and its strength is a share of false positives."""
        return getattr(self.fitted_to, "of_prompts", False)

    @property
    def cuts_prompts(self) -> bool:
        """Whether plain texts are cut into prompts and what follows, so that every condition is measured behind the prompts."""
        return self.judges_prompts or self.unlearns_answers

    @property
    def by_default(self) -> bool:
        """Whether `compare` takes it unless others are named."""
        return not (self.trains or self.baseline)

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the function's options."""
        return tuple(self.parameters)[3:]

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of the function, by name."""
        return inspect.signature(self.function).parameters

    def defaults(self) -> dict[str, Any]:
        """Return the options with a default, with what this name fixes."""
        given = {name: self.parameters[name].default for name in self.options}
        return {name: value for name, value in given.items() if value is not inspect.Parameter.empty} | dict(
            self.settings
        )

    def together(self, retain: Sequence[Any]) -> Any:
        """Return several sources to retain as the function takes them: a list of them, or joined."""
        if len(retain) > 1 and self.by_source:
            return list(retain)
        return functools.reduce(operator.add, retain)

    def takes(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of some options that the function has."""
        return {name: value for name, value in options.items() if name in self.parameters}

    def require(self, options: Mapping[str, Any], model: Any = None, forget: Any = None, retain: Any = None) -> None:
        """Refuse options and corpora that the function would refuse, as far as `check` knows: without a model, options alone.

        Raises:
            LensUnlearnError: What `check` raises.
        """
        if self.check is not None:
            self.check(model, forget, retain, **{**self.settings, **options})

    def words_of_control(self, options: Mapping[str, Any]) -> str:
        """Return what its control is with some options, as reports say it: inside routed experts, loads are matched."""
        site = {**self.defaults(), **options}.get("site", self.sites)
        kinds = {site} if isinstance(site, str) else set(site)
        return (
            RANDOM_LOADED if self.control_words == RANDOM_NEURONS and kinds & set(EXPERT_KINDS) else self.control_words
        )

    def fit(self, model: Model, forget: Any, retain: Any, options: Mapping[str, Any]) -> Fitted:
        """Collect once what the function needs at every strength; what is no corpus was collected before.

        Args:
            model: The model.
            forget: A corpus, or what the function takes.
            retain: Likewise.
            options: The method's options, `progress` and `batch_size` among them where the passes are to have them.
        """
        options = {**self.settings, **options}
        if not isinstance(forget, Corpus):
            return forget, self._collected(model, retain, options)
        if self.prepare is not None:
            return self.prepare(model, forget, retain, **options)
        return self._collected(model, forget, options), self._collected(model, retain, options)

    def _collected(self, model: Model, part: Any, options: Mapping[str, Any]) -> Any:
        """Collect the statistic that the function takes over a corpus, or over each of a list."""
        if isinstance(part, list):
            return [self._collected(model, one, options) for one in part]
        if not isinstance(part, Corpus) or self.fitted_to is Corpus:
            return part
        site = options.get("site", self.defaults().get("site", self.sites))
        shared = {name: value for name, value in options.items() if name in _SHARED}
        if self.judges_prompts:
            return query_keys(model, part, site, **shared)
        shared = {name: value for name, value in shared.items() if name not in ("pool", "seed")}
        statistic = None if self.fitted_to is Moments else self.fitted_to()
        return collect(model, part, site, statistic=statistic, **shared)

    def at(self, model: Model, fitted: Fitted, strength: float | None, options: Mapping[str, Any]) -> Intervention:
        """Return the intervention at one strength; at the default one for None."""
        given = {**self.settings, **options}
        if strength is not None:
            given[self.strength] = strength
        return self.function(model, *fitted, **given)

    def with_progress(self, options: Mapping[str, Any], progress: bool) -> dict[str, Any]:
        """Add `progress` to options, if the function takes that."""
        return {**self.takes({"progress": progress}), **options}

    def controls(
        self,
        model: Model,
        intervention: Intervention,
        fitted: Fitted,
        seeds: Sequence[int],
        *,
        strength: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[Intervention]:
        """Return one random control of an intervention per seed; none for what has no control.

        Args:
            model: The model.
            intervention: What the method found.
            fitted: What it was fitted to.
            seeds: One for each control.
            strength: At which it was found; for controls that are fitted themselves.
            options: With which it was found; likewise.
        """
        options = {
            **self.with_progress(options or {}, False),
            **self.takes({"control": False}),
        }  # a control has none itself

        def refit(forget: Any, retain: Any) -> Intervention:
            with warnings.catch_warnings():  # of shuffled labels it is no news that they tell nothing
                warnings.simplefilter("ignore", RuntimeWarning)
                return self.at(model, (forget, retain), strength, options)

        return self.control(model, intervention, seeds, fitted=fitted, refit=refit)

    def named(self, name: str, **settings: Any) -> "Method":
        """Return the same method under another name, with further options fixed."""
        return replace(self, name=name, settings={**self.settings, **settings})


def require_some(
    model: Model, fractions: Mapping[str, float], *, within: str = "model", heads: bool = False, name: str = "fraction"
) -> None:
    """Refuse fractions at which not one unit would be selected, before anything is collected.

    Raises:
        SelectionError: If nothing would be.
        SiteError: If the model has no such site.
    """
    known = {kind: [point.shape for point in resolve(model, kind).values()] for kind in fractions}
    sizes = {kind: [shape[0] if heads else math.prod(shape) for shape in shapes] for kind, shapes in known.items()}
    if within == "model":
        sizes = {kind: [sum(units)] for kind, units in sizes.items()}
    if not any(round(fractions[kind] * units) for kind in fractions for units in sizes[kind]):
        neurons = sum(math.prod(shape) for shapes in known.values() for shape in shapes)
        given = next(iter(fractions.values())) if len(fractions) == 1 else dict(fractions)
        raise SelectionError(f"{name}={given} selects nothing of {neurons:,} neurons: raise it")
