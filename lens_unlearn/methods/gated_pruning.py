"""Gated pruning: ablate many neurons of a skill, but only in the queries that a detector finds to be of it. Ours.

Pruning that acts everywhere takes from other skills what it ablates; a detector alone makes the model abstain. Here a detector is
fitted to the keys of prompts in the first layers (`key_space_detection`), and the neurons that Selective Pruning ranks first are
ablated in the layers behind it, in the rows where it fires (`When`). With TPR and FPR the detector's rates, and d the relative
accuracy drop of what is ablated in a row where it fires,

    cost on forget = TPR * d_forget,    cost on retain = FPR * d_retain

so a strong ablation costs other skills no more than the detector's false positives, and false positives are what a budget buys.

Knows the two methods that it joins; knows no figure of its own.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.interventions.when import When
from lens_unlearn.keyspace.regions import Shape
from lens_unlearn.methods import key_space_detection as detection
from lens_unlearn.methods import selective_pruning as pruning
from lens_unlearn.methods.controls import random_pruning
from lens_unlearn.methods.method import Fitted, Method
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.pooling import Pool
from lens_unlearn.model.sites import Site, layers_with
from lens_unlearn.neurons.collect import collect, query_keys
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.moments import Moments
from lens_unlearn.neurons.prompted import Prompted

__all__ = ["METHOD", "gated_pruning"]

SITE = "mlp.post"
MOMENTS = 10_000
"""Counted tokens of each corpus over which neurons are ranked: a detector needs many prompts, a mean not all that follows them."""


def gated_pruning(
    model: Model,
    forget: Corpus | Prompted,
    retain: Corpus | Prompted | Sequence[Corpus | Prompted],
    *,
    fraction: float = 0.3,
    false_alarms: float = 0.05,
    layer: int | Sequence[int] | None = None,
    region: Shape | Literal["auto"] = "linear",
    vote: int | None = None,
    when: Literal["prompt", "every_token"] = "prompt",
    pool: Pool = "last",
    importance: str = "abs",
    replacement: Literal["zero", "mean"] = "zero",
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> When:
    """Fit a detector to a skill's prompts, and ablate the neurons of the skill behind it where it fires.

    Args:
        model: Where to look.
        forget: Prompts of the skill to remove with what follows them; plain texts are cut into prompts at random places first.
        retain: Those of what is to be retained. Of several, in a list, `false_alarms` holds for each, and neurons are
            ranked against all together.
        fraction: Share of the neurons behind the detector to ablate, in (0, 1].
        false_alarms: Budget: the share of retain queries in which the ablation may act.
        layer: Where the detector looks: one layer, several that vote, or None for the middle one of those that have an MLP. The
            last one has none behind it.
        region: The detector's shape, see `key_space_detection`; by default a plane between the keys of both sides.
        vote: How many layers have to agree; None for a majority.
        when: "prompt" or "every_token", see `Abstain`.
        pool: Whether the detector judges the key of the "last" token of a prompt, or the "mean" over its tokens, see
            `key_space_detection`.
        importance: By which neurons are ranked, see `selective_pruning`.
        replacement: Put "zero", or the "mean" over the retain corpus, in place of a neuron.
        seed: Of the detector's splits, and of the places where texts are cut.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        progress: Whether to show bars.

    Returns:
        A `When`; its detector states its rates.

    Raises:
        CorpusError: If there are too few queries.
        SelectionError: If nothing would be selected.
        LensUnlearnError: If an option is out of range, or there is no MLP behind the detector.

    Examples:
        >>> import lens_unlearn as lu
        >>> model = lu.load_model("demo")
        >>> python, english = (lu.read_corpus(f"demo:{n}", model, tokens=8000) for n in ("python", "english"))
        >>> lu.gated_pruning(model, python, english, false_alarms=0.2, progress=False)  # doctest: +ELLIPSIS
        When(...)
    """
    require_model(model)
    several = _listed(retain)
    looks = _looks(model, layer)
    _check(
        model, forget, several, fraction=fraction, false_alarms=false_alarms, layer=layer, region=region, vote=vote,
        when=when, pool=pool, importance=importance, replacement=replacement, seed=seed, batch_size=batch_size,
    )  # fmt: skip
    passes: dict[str, Any] = {
        "layer": looks,
        "pool": pool,
        "seed": seed,
        "batch_size": batch_size,
        "progress": progress,
    }
    ours, *others = [
        part if isinstance(part, Prompted) else _prompted(model, part, **passes) for part in (forget, *several)
    ]
    detector = detection.key_space_detection(
        model, ours.keys, [part.keys for part in others], layer=looks, region=region, vote=vote, when=when,
        pool=pool, false_alarms=false_alarms, site=SITE, control=False, seed=seed, progress=False,
    )  # fmt: skip
    behind = [Site(number, SITE) for number in layers_with(model, SITE) if number > looks[-1]]
    sides = ours.moments.only(behind), _joined(others).only(behind)
    inner = pruning.selective_pruning(
        model, *sides, fraction=fraction, importance=importance, replacement=replacement, progress=False
    )
    return When(detector, inner)


def _listed(retain: Any) -> list[Any]:
    return list(retain) if isinstance(retain, list | tuple) else [retain]


def _looks(model: Model, layer: int | Sequence[int] | None) -> list[int]:
    """Return the layers where the detector looks, so that there is a layer behind them.

    Raises:
        LensUnlearnError: If there is no such layer, or none behind.
    """
    having = layers_with(model, SITE)
    if layer is None:
        layer = having[(len(having) - 1) // 2]
    looks = detection.layers_of(layer, None, having, SITE)
    if looks[-1] == having[-1]:
        raise LensUnlearnError(
            f"layer={layer!r} leaves no MLP behind the detector that could be ablated: the last is in layer {having[-1]}"
        )
    return looks


def _prompted(model: Model, corpus: Corpus, *, layer: Sequence[int], pool: Pool, seed: int, **passes: Any) -> Prompted:
    """Collect the keys of a corpus where the detector looks, and the moments behind."""
    corpus = corpus if corpus.has_prompts else corpus.with_prompts(seed=seed)
    keys = query_keys(model, corpus, [Site(number, SITE) for number in layer], pool=pool, seed=seed, **passes)
    behind = [Site(number, SITE) for number in layers_with(model, SITE) if number > max(layer)]
    return Prompted(keys, collect(model, corpus.sample(MOMENTS, seed), behind, **passes))


def _joined(parts: Sequence[Prompted]) -> Moments:
    """Merge the moments of several corpora."""
    return functools.reduce(lambda moments, part: moments.merge(part.moments), parts[1:], parts[0].moments)


def _check(
    model: Model | None,
    forget: Any,
    retain: Any,
    *,
    fraction: float = 0.3,
    layer: int | Sequence[int] | None = None,
    region: str = "linear",
    false_alarms: float = 0.05,
    importance: str = "abs",
    replacement: str = "zero",
    **options: Any,
) -> None:
    """Refuse what the two methods would refuse; without a model, options alone."""
    pruned = {"fraction": fraction, "importance": importance, "replacement": replacement}
    several = _listed(retain)
    for one in several:
        pruning.METHOD.require({**pruned, "batch_size": options.get("batch_size")}, model, forget, one)
    looks = layer if model is None else _looks(model, layer)
    asked, *others = (part.keys if isinstance(part, Prompted) else part for part in (forget, *several))
    found = {**options, "layer": looks, "region": region, "false_alarms": false_alarms}
    detection.METHOD.require(found, model, asked, None if retain is None else others)


def _prepare(model: Model, forget: Corpus, retain: Corpus | list[Corpus], **options: Any) -> Fitted:
    """Collect what is needed at every strength."""
    shared = {name: options[name] for name in ("batch_size", "progress") if name in options}
    shared |= {"layer": _looks(model, options.get("layer")), "pool": options.get("pool", "last")}
    shared |= {"seed": options.get("seed", 0)}
    return _prompted(model, forget, **shared), [_prompted(model, one, **shared) for one in _listed(retain)]


def _controls(
    model: Model, intervention: Intervention, seeds: Sequence[int], *, fitted: tuple[Any, Any], refit: Any
) -> list[Intervention]:
    """Fit the detector again to shuffled labels, and ablate as many random neurons of every layer behind it."""
    forget, several = fitted
    if (
        not isinstance(intervention, When)
        or not isinstance(intervention.inner, Ablate)
        or not isinstance(forget, Prompted)
    ):
        return []
    several = _listed(several)
    keys, retain = KeySample.joined([part.keys for part in several]), _joined(several)
    controls: list[Intervention] = []
    for seed in seeds:
        shuffled = (Prompted(part, forget.moments) for part in forget.keys.shuffled(keys, seed))
        detector = refit(*shuffled).detector
        random = random_pruning(model, forget.moments, retain, like=intervention.inner, seed=seed, progress=False)
        controls.append(When(detector, random))
    return controls


METHOD = Method(
    name="gated-pruning",
    function=gated_pruning,
    fitted_to=Prompted,
    strength="false_alarms",
    grid=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4),
    prepare=_prepare,
    check=_check,
    control=_controls,
    control_words="as many random neurons, behind the same detector fitted to shuffled labels",
    by_source=True,
    summary="Ablates many of a skill's MLP neurons, only in prompts that a detector in an earlier layer finds; ours.",
)
