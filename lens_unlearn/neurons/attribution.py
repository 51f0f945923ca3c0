"""Attribution: how much each neuron adds to the answers that a model gives, by integrated gradients.

The keys of one layer (all neurons together, at the positions that predict the answer) are scaled from nothing to what they
are, and the gradient of the answer is summed on the way. With value beta of neuron k at sample i, F the objective, and m steps

    att(k) = (1/m) sum_j sum_i  beta_ik  dF_i(c_j beta_i) / d beta_ik,      c_j = j/m  or  (j - 1/2)/m

after Dai et al., "Knowledge Neurons in Pretrained Transformers" (arXiv 2104.08696), and Agarwal et al., "SIMU" (arXiv
2510.07822). A positive attribution means that the neuron raises the objective: for "prob" and "logprob" it supports the
answer. SIMU speaks of the loss; with "loss" the signs are those of a loss, and `critical` finds the neurons against the answer.

All attributions of a layer together come to F(beta) - F(0), up to the error of the sum, which falls as 1/m ("right") or
1/m^2 ("midpoint"): `Attribution.completeness` holds both sides.

Knows models, corpora and sites; knows nothing of how the attributed neurons are edited.
"""

import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import cross_entropy

from lens_unlearn.core.errors import ActivationError, CorpusError, LensUnlearnError, ModelError, SelectionError
from lens_unlearn.core.numbers import STEPS, THRESHOLD, check_numbers
from lens_unlearn.core.progress import Bar
from lens_unlearn.corpora.corpus import Batch, Corpus, require_corpus
from lens_unlearn.model.hooks import Remover, attach, detach_all, logit_functions, one_thread
from lens_unlearn.model.host import Model, require_float, require_model
from lens_unlearn.model.loading import model_name
from lens_unlearn.model.recompute import frozen, recomputing
from lens_unlearn.model.replay import Replay, replaying
from lens_unlearn.model.shortcuts import shortcuts
from lens_unlearn.model.sites import Point, Site, resolve
from lens_unlearn.model.unembedding import Unembedding, knows_its_end, unembedding
from lens_unlearn.neurons.maps import NeuronMap

__all__ = [
    "Attribution",
    "Completeness",
    "Mode",
    "Objective",
    "Rule",
    "attribute",
    "critical",
    "critical_mask",
]

LOST = 0.1
"""Below this attributed share of its contribution, a site is named in a warning."""

Objective = Literal["prob", "logprob", "loss"]
Mode = Literal["teacher_forced", "prefix"]
Rule = Literal["right", "midpoint"]
Memory = Literal["default", "low"]


class Completeness(NamedTuple):
    """Both sides of what should be an equation, in units of the objective, summed over all answer tokens."""

    attributed: float
    """The attributions of a layer's neurons together."""
    difference: float
    """F(beta) - F(0): the objective of the model as it is, less that with the layer's keys at zero."""

    @property
    def ratio(self) -> float:
        """The attributed share of the difference: 1 where the sum over the steps is exact."""
        return self.attributed / self.difference if self.difference else float("nan")


class Attribution(NeuronMap):
    """A map of attributions, float64, that knows how complete it is.

    Arithmetic on it gives a plain `NeuronMap`.
    """

    __slots__ = ("completeness", "provenance")

    def __init__(
        self,
        values: Mapping[Site, Shaped[Tensor, "*neurons"]],
        completeness: Mapping[Site, Completeness],
        provenance: Mapping[str, Any],
    ) -> None:
        super().__init__(values)
        self.completeness: dict[Site, Completeness] = {site: completeness[site] for site in self.sites}
        """For each site the sum of its attributions, and the difference that they should come to."""
        self.provenance: dict[str, Any] = dict(provenance)
        """How it was measured: model, corpus, tokens, and every option."""

    def __repr__(self) -> str:
        ratios = [both.ratio for both in self.completeness.values()]
        return f"{super().__repr__().replace('NeuronMap', 'Attribution', 1)[:-1]}; complete to {_span(ratios)})"


def _span(ratios: list[float]) -> str:
    low, high = min(ratios), max(ratios)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f}-{high:.2f}"


def attribute(
    model: Model,
    corpus: Corpus,
    sites: str | Site | Iterable[str | Site] = "mlp.post",
    *,
    steps: int = 5,
    objective: Objective = "prob",
    mode: Mode = "teacher_forced",
    rule: Rule = "right",
    batch_size: int = 8,
    memory: Memory = "default",
    progress: bool = True,
) -> Attribution:
    """Attribute the answers of a corpus to the neurons of each layer, by integrated gradients.

    One path per site: its neurons are scaled together, all other sites are as the model computes them. Inside an
    intervention's block, the model is the one with the intervention acting. No gradient of a parameter is computed,
    layers below the scaled one are not run again, and only positions that predict are unembedded; only where an
    intervention decides on entire rows (as `Abstain` does), or a model's blocks hand on more than one residual stream, does
    every pass run the entire model.

    Where a norm follows the MLP (Gemma 2), scaling all its keys together changes nothing until they are almost zero: next to
    nothing is attributed, and a warning says so.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
        corpus: Prompts with answers, whose counted tokens are the answer's; of other texts every counted token is
            predicted. The first token of a row has nothing that predicts it, and is left out.
        sites: Kinds (all layers), sites, or both. For "attn.z" in compatibility mode, note that zero is another place there.
        steps: Points on the path, m.
        objective: What is attributed, summed over the answers' tokens: "prob", p(token | its prefix); "logprob",
            its logarithm; or "loss", the negative of that.
        mode: "teacher_forced" scales all positions of a row that predict an answer token at once; "prefix" makes each
            answer token its own sample, and scales only the last position of its prefix, as in the papers: slower by about
            the number of tokens of an answer. The two do not select the same neurons.
        rule: Points at j/m ("right", as in the papers) or (j - 1/2)/m ("midpoint", more exact at equal cost).
        batch_size: Full-length rows per forward, steps included: rows and steps share a forward, and as many of them as hold
            no more tokens than so many rows of the corpus' longest. Results do not depend on it.
        memory: "low" takes less of it and more time: what happens inside a block above the scaled one is computed again for the
            gradient instead of being kept, and fewer logits stand at a time. Results are the same up to rounding.
        progress: Whether to show a bar, in predicted tokens times sites.

    Returns:
        The attributions: a map with `completeness`, and `provenance`. A neuron that is always zero has exactly 0.

    Raises:
        CorpusError: If the corpus has no token that anything predicts, or was tokenized for another model.
        SiteError: If a site does not exist or has no neuron axis.
        ActivationError: If an activation or a gradient is NaN or infinite.
        ModelError: If no gradient flows through a quantized model, the model is in training mode, or another thread has an
            intervention on it, or measures it.
        LensUnlearnError: If an option is unknown.
    """
    require_model(model)
    choices = {
        "objective": (objective, Objective),
        "mode": (mode, Mode),
        "rule": (rule, Rule),
        "memory": (memory, Memory),
    }
    for name, (given, known) in choices.items():
        if given not in known.__args__:
            raise LensUnlearnError(f"{name}={given!r} is not known: choose from {', '.join(known.__args__)}")
    low = memory == "low"
    STEPS.check(steps, "steps")
    check_numbers(batch_size=batch_size)
    require_corpus(corpus).check(model)
    points = resolve(model, sites)
    predicted = _predicted(corpus)
    nodes = (torch.arange(1, steps + 1) - (0.5 if rule == "midpoint" else 0)) / steps
    room = batch_size * int(corpus.starts.diff().max())  # tokens that a forward pass may hold
    if not (logit_functions(model) or knows_its_end(model)):  # it is looked at while the model is whole
        with one_thread(model), unembedding(model):
            pass
    bar = Bar(total=predicted * len(points), unit=" tokens", unit_scale=True, disable=not progress)
    bar.set_description(f"attribute {corpus.name}")
    with (
        bar,
        one_thread(model),
        torch.inference_mode(False),
        _placeholder_hooks(points),
        shortcuts(model) as out,
        replaying(model, out, few=low) as replay,
        frozen(model, recompute=low),
        recomputing(model, out) if low and not logit_functions(model) else nullcontext(),
    ):
        sums = {site: torch.zeros(point.shape, dtype=torch.float64) for site, point in points.items()}
        gaps = dict.fromkeys(points, 0.0)
        for batch in corpus.batches(batch_size):
            samples = _Samples.of(batch, mode)
            if samples is None:
                continue
            with torch.no_grad(), _finite(points, samples.all):
                hidden = replay.first(batch.tokens[:, :-1], samples.all)
                unscaled = float(_objective(replay.end, hidden, samples.next[samples.all], objective))
            # One site at a time: the method attributes along a path on which all other activations are what the model makes of
            # them. Scaled together, an upper layer would start from what a scaled lower one gives it, and not from its own keys.
            for site, point in points.items():
                path = _Path(replay, point, samples, objective, room)
                gaps[site] += unscaled - path.at_zero()
                sums[site] += path.integral(nodes)
                bar.update(len(hidden))
    completeness = {site: Completeness(float(sums[site].sum()), gaps[site]) for site in points}
    incomplete = [str(s) for s, both in completeness.items() if abs(both.attributed) < LOST * abs(both.difference)]
    if incomplete:
        warnings.warn(
            f"less than {LOST:.0%} of what {', '.join(incomplete)} add was attributed: take more steps; where a norm follows "
            "the MLP (as in Gemma 2), scaling its keys does nothing until they are almost zero, and no number of steps helps",
            stacklevel=2,
        )
    settings = {"objective": objective, "mode": mode, "rule": rule, "steps": steps}
    measured = {"model": model_name(model), "corpus": corpus.name, "tokens": predicted}
    return Attribution(sums, completeness, measured | settings)


def _predicted(corpus: Corpus) -> int:
    """Count the counted tokens that a token before them predicts.

    Raises:
        CorpusError: If there are none.
    """
    first = torch.zeros_like(corpus.counted)
    first[corpus.starts[:-1]] = True
    count = int((corpus.counted & ~first).sum())
    if count == 0:
        raise CorpusError(
            f"{corpus.name} has no counted token behind another one, so there is nothing to attribute: give longer texts"
        )
    return count


def _objective(
    end: Unembedding, hidden: Float[Tensor, "n width"], targets: Int[Tensor, "n"], objective: Objective
) -> Float[Tensor, ""]:
    """Return the sum of the objective over tokens, of what the unembedding is given there."""

    def of(hidden: Tensor, part: slice) -> Tensor:
        logits = end.logits(hidden)
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        loss = cross_entropy(logits, targets[part].to(logits.device), reduction="none")
        values = {"prob": lambda: (-loss).exp(), "logprob": lambda: -loss, "loss": lambda: loss}[objective]()
        return values.sum(dtype=torch.float64)

    return torch.stack(end.in_parts(of, hidden)).sum()


@dataclass(frozen=True)
class _Samples:
    """The samples of a batch, the longest first: of each a row, and those of its positions that are scaled together."""

    all: Bool[Tensor, "batch pos"]
    """The positions of the batch that predict a counted token."""
    next: Int[Tensor, "batch pos"]
    """The token behind each position."""
    rows: Int[Tensor, "samples"]
    """The row of the batch that each sample is of."""
    where: Bool[Tensor, "samples pos"]
    """The positions of each sample at which the neurons are scaled."""

    @classmethod
    def of(cls, batch: Batch, mode: Mode) -> "_Samples | None":
        """Take the samples of a batch; None if it has none."""
        predicting = batch.counted[:, 1:]
        if mode == "prefix":
            rows, places = predicting.nonzero(as_tuple=True)
            where = torch.arange(predicting.shape[1]) == places[:, None]
        else:
            rows = predicting.any(1).nonzero()[:, 0]
            where = predicting[rows]
        if len(rows) == 0:
            return None
        order = torch.sort(_lengths(where), descending=True, stable=True).indices
        return cls(predicting, batch.tokens[:, 1:], rows[order], where[order])


def _lengths(where: Bool[Tensor, "samples pos"]) -> Int[Tensor, "samples"]:
    """Count the positions of each sample up to its last that predicts."""
    return (where * torch.arange(1, where.shape[1] + 1)).amax(1)


class _Path:
    """The path of one site's activations from zero to their own values, over the samples of a batch.

    Every step of it is a forward pass from this site on. The layers below do not see the scaling: their outputs are those of
    the batch's first pass, which `Replay` has, so that only the layers from this one up run again, with their gradients.
    """

    def __init__(self, replay: Replay, point: Point, samples: _Samples, objective: Objective, room: int) -> None:
        self.replay, self.point, self.samples, self.room = replay, point, samples, room
        self.objective: Objective = objective

    def at_zero(self) -> float:
        """Return the objective at the beginning of the path."""
        return sum(value for value, *_ in self._runs(torch.zeros(1), gradient=False))

    def integral(self, nodes: Float[Tensor, "steps"]) -> Float[Tensor, "*neurons"]:
        """Return activation times gradient, averaged over the nodes and summed over samples and positions."""
        total = torch.zeros(self.point.shape, dtype=torch.float64)
        for _, activation, gradient in self._runs(nodes, gradient=True):
            total += (activation * gradient).sum(0, dtype=torch.float64).cpu()
        if not bool(torch.isfinite(total).all()):
            raise ActivationError(
                f"the gradient at {self.point.site} is NaN or infinite: the model overflows or is broken above it; "
                "try a wider dtype"
            )
        return total / len(nodes)

    def _runs(self, nodes: Tensor, *, gradient: bool) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Yield the objective, the activations and their gradients, for as many samples and nodes as fit in a forward."""
        samples = self.samples
        lengths = _lengths(samples.where)
        # Every pair of a sample and a node is a row of its own. The samples come longest first, and a forward pass ends at the
        # last position of its first one that predicts: later positions cannot change the answer.
        sample = torch.arange(len(samples.rows)).repeat_interleave(len(nodes))
        scale = nodes.repeat(len(samples.rows))
        while len(sample):
            width = int(lengths[sample[0]])
            take = max(1, self.room // width)
            yield self._run(sample[:take], scale[:take], width, gradient)
            sample, scale = sample[take:], scale[take:]

    def _run(self, sample: Tensor, scale: Tensor, width: int, gradient: bool) -> tuple[float, Tensor, Tensor]:
        where = self.samples.where[sample, :width]
        rows = self.samples.rows[sample]
        seen: list[Tensor] = []

        def scaled(tensor: Tensor) -> Tensor:
            here = where.to(tensor.device)
            factor = torch.where(here, scale.to(here.device)[:, None], 1.0).to(tensor.dtype)
            leaf = tensor.detach() * factor.reshape(*factor.shape, *[1] * (tensor.ndim - 2))
            seen[:] = [tensor.detach()[here], leaf.requires_grad_(gradient)]
            # Switched on here, within the forward pass: autograd records the layers above the leaf, and none below. The
            # `no_grad` around the pass switches it off again.
            torch.set_grad_enabled(gradient)
            return leaf

        removers: list[Remover] = []
        try:
            attach(self.point.hook, scaled, removers, own_thread=True)
            with torch.no_grad():
                hidden = self.replay.again(self.point.site.layer, rows, where)
                value = _objective(self.replay.end, hidden, self.samples.next[rows, :width][where], self.objective)
        finally:
            detach_all(removers)
        activation, leaf = seen
        if not gradient:
            return float(value), activation, activation
        slope = torch.autograd.grad(value, leaf, allow_unused=True)[0] if value.requires_grad else None
        if slope is None:  # 4-bit kernels of a CPU; of another model, 0
            require_float(self.replay.model)
            slope = torch.zeros_like(leaf)
        slope = slope[where.to(leaf.device)]
        if slope.dtype in (torch.bfloat16, torch.float16):
            activation, slope = activation.float(), slope.float()
        return float(value.detach()), activation, slope


@contextmanager
def _placeholder_hooks(points: Mapping[Site, Point]) -> Iterator[None]:
    """Keep a hook at every point, so that `shortcuts` does not bypass the components at which hooks are attached later.

    It refuses passes of other threads, whose numbers `shortcuts` would change.
    """
    thread = threading.get_ident()
    removers: list[Remover] = []

    def require_own_thread(tensor: Tensor) -> None:
        if threading.get_ident() != thread:
            raise ModelError(
                "another thread measures this model: let it end first, or give each thread a model of its own"
            )

    try:
        for point in points.values():
            attach(point.hook, require_own_thread, removers)
        yield
    finally:
        detach_all(removers)


@contextmanager
def _finite(points: Mapping[Site, Point], where: Bool[Tensor, "batch pos"]) -> Iterator[None]:
    """Check the activations of a forward pass, at the positions that predict.

    Raises:
        ActivationError: At the first that is NaN or infinite; names the neuron.
    """

    def require_finite(tensor: Tensor, site: Site) -> None:
        values = tensor[where.to(tensor.device)]
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            index = ",".join(str(int(i)) for i in bad[0, 1:])
            raise ActivationError(
                f"{site}[{index}] is {float(values[tuple(bad[0])])} at a position that predicts: the model overflows or is "
                "broken there; try a wider dtype, or look at that text"
            )

    removers: list[Remover] = []
    try:
        for site, point in points.items():
            attach(point.hook, partial(require_finite, site=site), removers, own_thread=True)
        yield
    finally:
        detach_all(removers)


def critical(attribution: NeuronMap, threshold: float = 0.3) -> NeuronMap:
    """Select the neurons whose attribution is above a share of their own layer's maximum.

    critical(l, k)  <=>  att(l, k) > threshold * max_k att(l, k)

    A layer in which nothing is positive has no critical neuron; a warning names it.

    Args:
        attribution: What `attribute` returned, with "prob" or "logprob" for the neurons that support the answers.
        threshold: Share of the layer's maximum, above 0 and below 1 (at 1 not even the maximum is above it).

    Returns:
        A boolean map of the same sites.

    Raises:
        SelectionError: If the threshold is outside (0, 1), an attribution is NaN, or no layer has anything positive.
    """
    THRESHOLD.check(threshold, "threshold", SelectionError)
    chosen: dict[Site, Tensor] = {}
    for site, value in attribution.items():
        if bool(torch.isnan(value).any()):
            raise SelectionError(f"an attribution at {site} is NaN: fix the map before selecting")
        chosen[site] = (value > threshold * value.max()) & (value > 0)
    none = [str(site) for site, mask in chosen.items() if not bool(mask.any())]
    if len(none) == len(chosen):
        raise SelectionError(f"no neuron has a positive attribution at any of {len(none)} sites: check the objective")
    if none:
        warnings.warn(
            f"nothing has a positive attribution at {', '.join(none)}: no neuron is critical there", stacklevel=2
        )
    return NeuronMap(chosen)


def critical_mask(
    forget: NeuronMap,
    retain: NeuronMap,
    threshold: float = 0.3,
    *,
    kind: Literal["dual", "forget_only", "union"] = "dual",
) -> NeuronMap:
    """Select the neurons to edit, from those critical for the forget corpus (S_f) and for the retain corpus (S_r).

    Args:
        forget: Attributions of the forget corpus.
        retain: Attributions of the retain corpus, at the same sites.
        threshold: As in `critical`, for both.
        kind: "dual" takes S_f, with the neurons that are critical for both (better in SIMU's ablation); "forget_only" takes
            S_f without S_r; "union" takes S_f and S_r.

    Returns:
        A boolean map of the same sites.

    Raises:
        SelectionError: If the threshold is outside (0, 1), the kind is unknown, or no neuron remains.
    """
    if kind not in ("dual", "forget_only", "union"):
        raise SelectionError(f"kind={kind!r} is not known: choose from dual, forget_only, union")
    mask = critical(forget, threshold)
    if kind == "dual":
        return mask
    retain_mask = critical(retain, threshold)
    mask = mask | retain_mask if kind == "union" else mask & ~retain_mask
    if mask.count() == 0:
        raise SelectionError(
            f"threshold={threshold} leaves no neuron that is critical for the forget corpus alone: change it, or take "
            "kind='dual'"
        )
    return mask
