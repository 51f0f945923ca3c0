r"""`relearn`: how fast a model learns again what it was made to forget, by fine-tuning.

An intervention can hide knowledge or remove it, and next-token accuracy does not tell which. A model that never saw the texts
has to learn them; one that only hides them is there within a few steps. This is measured under two threat models:

- T1, `attached=True`: the intervention stays in force, and the weights behind it are trained.
- T2, `attached=False`: the intervention is written into the weights first, as in an exported model, and these are trained.

Nothing is written into the user's model: the fine-tuned change is a `Delta` of every matrix, trained outside it.

Intervals are over the units of what is measured (documents, or the groups they were read with), with weights that depend on the
unit alone, so that two models that are fine-tuned in the same way are compared unit by unit. They say how much other texts of the
same kind would change the curve of this very fine-tuning; how much another fine-tuning would, only several seeds say.

`anamnesis_index` compares with a model that never saw the texts, after Chundawat et al., "Zero-Shot Machine Unlearning" (arXiv
2201.05629). Relearning as a test of unlearned language models: Lynch et al., "Eight Methods to Evaluate Robust Unlearning in
LLMs" (arXiv 2402.16835).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.core.intervals import LEVEL
from lens_unlearn.core.progress import Bar
from lens_unlearn.corpora.corpus import Corpus, require_corpora, require_corpus
from lens_unlearn.evaluation.answer_losses import gradients_of, read_answers, rows_at
from lens_unlearn.evaluation.bootstrap import WEIGHTS, Scores, estimates
from lens_unlearn.evaluation.metrics import metric
from lens_unlearn.evaluation.report import Measure, provenance_of
from lens_unlearn.evaluation.teacher_forcing import recalled
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.base import Chain, Intervention
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.update import Update
from lens_unlearn.model.host import Model, require_eval, require_float, require_model
from lens_unlearn.model.loading import fingerprint, model_name
from lens_unlearn.model.matrices import Matrix, matrix_names, matrix_shapes, matrix_value

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Relearning", "anamnesis_index", "anamnesis_interval", "dense_edits", "relearn"]

STEPS = (0, 1, 2, 4, 8, 16, 32, 64)
DRAWN_WITH = 0
"""The seed of the bootstrap: that of no training, so that models are compared unit by unit whatever they were trained with."""
BAKING = "rows of W_out and W_O are zero; the neurons still compute, and can grow back"


@dataclass(frozen=True, eq=False, repr=False)
class Relearning:
    """What a fine-tuning brought back, step by step."""

    curves: dict[str, list[tuple[int, float]]]
    """For each corpus, the share of answer tokens known after so many steps, as (step, share); see `relearn`."""
    losses: list[float] = field(default_factory=list)
    """The mean loss of each step's rows before the step, in nats per token."""
    delta: Delta | None = None
    """The fine-tuned change, as it was at the end. To look at the model: ``(intervention + delta).on(model)`` after
    `attached=True`, ``delta.on(model)`` otherwise."""
    provenance: dict[str, Any] = field(default_factory=dict)
    measures: dict[tuple[str, int], Measure] = field(default_factory=dict)
    """Each share of the curves with its bootstrap draws, by corpus and step; ``measures["forget", 4].interval()``. Draws of runs
    on the same texts are paired: ``one.measures["forget", 4].minus(other.measures["forget", 4])``."""

    def __getitem__(self, corpus: str) -> list[tuple[int, float]]:
        """Return the curve of a corpus.

        Raises:
            LensUnlearnError: If it was not measured; the message lists what was.
        """
        if corpus not in self.curves:
            raise LensUnlearnError(f"{corpus!r} was not measured: there are {', '.join(self.curves) or 'no corpora'}")
        return self.curves[corpus]

    def steps_to(self, corpus: str, share: float) -> float:
        """Return after how many steps a share was first reached, linear between measured steps.

        Returns:
            0 if it was there before the first step; infinity if it was not reached in the steps that were made.

        Raises:
            LensUnlearnError: If the corpus was not measured.
        """
        steps, shares = zip(*self[corpus], strict=True)
        return float(_first_reached(steps, np.array([shares]), share)[0])

    def steps_interval(self, corpus: str, share: float) -> tuple[float, float]:
        """Return the 95 % interval of `steps_to` over units; its end is infinite where too many draws do not reach the share.

        Returns:
            Both ends; NaN where there is no interval: of too few units.

        Raises:
            LensUnlearnError: If the corpus was not measured.
        """
        return _ends(self._steps_drawn(corpus, share))

    def _steps_drawn(self, corpus: str, share: float) -> np.ndarray:
        """Return after how many steps the share is reached in each bootstrap draw of the curve; none of too few units."""
        steps = [step for step, _ in self[corpus]]
        known = [self.measures[corpus, step] for step in steps if (corpus, step) in self.measures]
        if len(known) < len(steps) or any(one.few for one in known):
            return np.empty(0)
        return _first_reached(steps, np.stack([one.draws for one in known], axis=1), share)

    def to_frame(self) -> "pd.DataFrame":
        """Give one row per corpus and measured step: corpus, step, share, and low and high, its interval over units."""
        import pandas as pd

        none = (math.nan, math.nan)
        rows = [
            (
                corpus,
                step,
                share,
                *(self.measures[corpus, step].interval() if (corpus, step) in self.measures else none),
            )
            for corpus, curve in self.curves.items()
            for step, share in curve
        ]
        return pd.DataFrame(rows, columns=pd.Index(["corpus", "step", "share", "low", "high"]))

    def table(self) -> "pd.DataFrame":
        """Give a small table for reading: steps by corpora, "share [low, high]" where there is an interval."""
        frame = self.to_frame()
        ends = [f" [{low:.3f}, {high:.3f}]" if low == low else "" for low, high in zip(frame["low"], frame["high"])]
        frame["share"] = [f"{share:.3f}{interval}" for share, interval in zip(frame["share"], ends)]
        return frame.pivot(index="step", columns="corpus", values="share")[list(self.curves)].fillna("")

    def __repr__(self) -> str:
        steps = max((step for curve in self.curves.values() for step, _ in curve), default=0)
        settings = self.provenance.get("relearning", {})
        threat = f", {settings['threat']}" if "threat" in settings else ""
        return f"Relearning({steps} steps{threat}): share of tokens known\n{self.table().to_string()}"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()  # type: ignore[operator]


def relearn(
    model: Model,
    texts: Corpus,
    intervention: Intervention | None = None,
    *,
    measured: Mapping[str, Corpus],
    steps: Sequence[int] = STEPS,
    lr: float = 1e-4,
    batch_size: int = 8,
    seed: int = 0,
    attached: bool = True,
    resamples: int = 1000,
    progress: bool = True,
) -> Relearning:
    r"""Fine-tune a model under an intervention, or one with the intervention baked in, and measure what comes back.

    Every matrix of every layer (W_Q, W_K, W_V, W_O, W_in, W_gate, W_out) is trained by AdamW without weight decay on the mean loss
    of the counted tokens of `batch_size` rows; embeddings, norms and biases stay. The change D is held outside the model, and each
    matrix computes x (W + D). At the steps asked for, and before the first, the share of counted tokens (in question-answer
    corpora the answer's) that are the single most probable one is measured under teacher forcing.

    - T1, `attached=True`: D starts at 0, and the intervention stays in force as it is. A neuron ablated to zero at `mlp.post`
      gets no gradient: neither its row of W_out nor its columns of W_in and W_gate move. That is as if all of its weights and
      its bias were zero for good (baking in the strong sense), where the activation of 0 is 0.
    - T2, `attached=False`: the intervention's own change of weights is where D starts, and all of it is trained. An ablation is
      baked in the weak sense: only the rows of W_out (or W_O) are zero. The neurons still compute, their rows get gradients,
      and they can grow back. For a `Delta` both are the same, but for rounding.

    Beside it, run its control in the same way: ``relearn(model, texts, random_delta(edit), ...)``. What a random change of the same
    size needs to be repaired, the unlearning did not do.

    Under `enable_compatibility_mode()` the processed matrices are trained, which is another fine-tuning than that of the raw ones.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode. Its parameters are never written, and get no
            gradients.
        texts: What is trained on: the forgotten facts, or others.
        intervention: What took knowledge out; None for the model as it is, such as one that never saw the texts.
        measured: Corpora by name, such as "forget", "neighbouring" and "unrelated".
        steps: After how many steps to measure, rising.
        lr: Of AdamW. Results depend on it: compare at the same one, and at more than one.
        batch_size: Rows in a step (all of them, if there are fewer); full-length rows per forward when measuring.
        seed: Of the order of rows.
        attached: T1 or T2.
        resamples: Bootstrap draws over the units of what is measured, the same in every run.
        progress: Whether to show a bar.

    Raises:
        LensUnlearnError: If nothing is measured, the steps do not rise, an option is out of range, the intervention cannot be
            baked (`attached=False`), or the loss becomes NaN or infinite.
        SelectionError: If an ablation is no change of weights: not to zero, in a basis, or at another site (`attached=False`).
        SiteError: If the model does not compute with a matrix as one linear map, or lacks one of a delta that is baked.
        CorpusError: If a corpus fits another model, or nothing in it is predicted.
        ModelError: If the model is quantized, or in training mode.
    """
    require_model(model)
    require_eval(model)
    require_float(model)
    points = _points(steps)
    if not measured:
        raise LensUnlearnError("nothing would be measured: give corpora, as in measured={'forget': facts}")
    if not (math.isfinite(lr) and lr > 0) or batch_size < 1:
        raise LensUnlearnError(f"lr={lr} and batch_size={batch_size}: above 0, and at least 1")
    for corpus in (require_corpus(texts, "texts"), *require_corpora(measured, "measured").values()):
        corpus.check(model)
    updates = _begin(model, None if attached else intervention)
    delta, trained = Delta(updates), [update.value for update in updates.values()]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    known: dict[str, dict[int, np.ndarray]] = {name: {} for name in measured}
    tokens: dict[str, np.ndarray] = {}
    losses: list[float] = []
    whole = intervention + delta if intervention is not None and attached else delta
    bar = Bar(total=points[-1], disable=not progress, desc="relearn", unit=" steps")
    with bar, whole.on(model), torch.enable_grad():
        for step in range(points[-1] + 1):
            if step in points:
                for name, corpus in measured.items():
                    known[name][step], tokens[name] = recalled(model, corpus, batch_size)
                bar.set_postfix({name: f"{at[step].sum() / tokens[name].sum():.2f}" for name, at in known.items()})
            if step < points[-1]:
                losses.append(_step(model, texts, step, batch_size, seed, trained, optimizer))
                bar.update(1)
    measures = {
        (name, int(step)): measure
        for name, corpus in measured.items()
        for step, measure in _measures(known[name], tokens[name], corpus, resamples)
    }
    curves = {name: [(step, measures[name, step].value) for step in points] for name in measured}
    training: dict[str, Any] = {
        "threat": "T1" if attached else "T2",
        "intervention": None if intervention is None else repr(intervention),
        "baking": None if attached or intervention is None else BAKING,
        "texts": _source(texts),
        "measured": {name: _source(corpus) for name, corpus in measured.items()},
        "optimizer": "AdamW without weight decay",
        "lr": lr,
        "batch_size": batch_size,
        "seed": seed,
        "trained": sum(tensor.numel() for tensor in trained),
        "bootstrap": {"resamples": resamples, "seed": DRAWN_WITH, "weights": WEIGHTS},
    }
    settings = {"model": model_name(model), "fingerprint": fingerprint(model), "relearning": training}
    trained_delta = Delta({matrix: update.detach() for matrix, update in updates.items()})
    return Relearning(curves, losses, trained_delta, provenance_of(settings), measures)


def _measures(
    known: Mapping[int, np.ndarray], tokens: np.ndarray, corpus: Corpus, resamples: int
) -> Iterator[tuple[str, Measure]]:
    """Turn the recalled tokens of each document, step by step, into shares with draws; all steps share the weights of the units."""
    values = {str(step): [right[:, None]] for step, right in known.items()}
    scores = Scores([metric("exact_memorization")], values, tokens[:, None], corpus.units)
    return ((step, measure) for step, _, measure in estimates(scores, resamples, DRAWN_WITH))


def _first_reached(
    steps: Sequence[int], curves: Float[np.ndarray, "draws points"], share: float
) -> Float[np.ndarray, "draws"]:
    """Return the step at which each curve first reaches a share, linear between points; infinity where it does not."""
    above = curves >= share
    place = above.argmax(1)
    rows, before = np.arange(len(curves)), (place - 1).clip(0)
    high, low = curves[rows, place], curves[rows, before]
    at, last = np.asarray(steps, dtype=np.float64)[place], np.asarray(steps, dtype=np.float64)[before]
    with np.errstate(divide="ignore", invalid="ignore"):
        between = last + (share - low) / (high - low) * (at - last)
    return np.where(above.any(1), np.where(place == 0, at, between), np.inf)


def _ends(draws: Float[np.ndarray, "draws"]) -> tuple[float, float]:
    """Return the central 95 % of draws that may be infinite; one that is NaN may lie anywhere from 0 to infinity."""
    if not draws.size:
        return math.nan, math.nan
    low, high = (
        np.quantile(np.where(np.isnan(draws), worst, draws), share, method="inverted_cdf")
        for worst, share in ((0.0, (1 - LEVEL) / 2), (np.inf, (1 + LEVEL) / 2))
    )
    return float(low), float(high)


def anamnesis_index(
    relearned: Relearning, never_saw: Relearning, original: float, *, corpus: str = "forget", within: float = 0.1
) -> float:
    r"""Return the anamnesis index: how long relearning took, over how long learning takes.

    AIN = rt(M_u) / rt(M_s), with rt the steps of fine-tuning until the share known is at least (1 - within) x original, M_u the
    unlearned model and M_s one that never saw the texts, fine-tuned in the same way. 1 is ideal; below 1, knowledge is left;
    above, more was destroyed than the knowledge. Source: Chundawat et al. (arXiv 2201.05629), who count mini-batches too.

    At the limits it is the quotient with infinities: 0 if the unlearned model is there before the first step, or if it gets
    there and the other does not; infinite if it does not get there and the other does, or if the other is there at once and it is
    not; NaN if neither gets there, or both are there at once: then nothing can be said.

    Args:
        relearned: Of the unlearned model.
        never_saw: Of the model that never saw the texts.
        original: The share that the model knew before unlearning.
        corpus: On which.
        within: How far below the original counts as back, relative.

    Raises:
        LensUnlearnError: If the corpus was not measured, the two were fine-tuned in other ways or measured on other texts, or
            `original` or `within` is out of range.
    """
    share = _recovered(relearned, never_saw, original, within, corpus)
    return float(_quotient(relearned.steps_to(corpus, share), never_saw.steps_to(corpus, share)))


def anamnesis_interval(
    relearned: Relearning, never_saw: Relearning, original: float, *, corpus: str = "forget", within: float = 0.1
) -> tuple[float, float]:
    """Return the 95 % interval of `anamnesis_index` over the units of the corpus; both models' draws have the same weights.

    A draw of which nothing can be said, because neither model gets there, or both are there at once, may be any index: it counts
    as 0 for the lower end and as infinite for the upper one. `original` is taken as exact.

    Args:
        relearned: Of the unlearned model.
        never_saw: Of the model that never saw the texts.
        original: As in `anamnesis_index`.
        corpus: On which.
        within: As in `anamnesis_index`.

    Returns:
        Both ends; NaN where there is no interval: of too few units.

    Raises:
        LensUnlearnError: As in `anamnesis_index`, and if the two have other bootstrap draws.
    """
    share = _recovered(relearned, never_saw, original, within, corpus)
    taken, needed = (one._steps_drawn(corpus, share) for one in (relearned, never_saw))
    if taken.size and needed.size and taken.size != needed.size:
        raise LensUnlearnError(
            f"the two runs have {taken.size} and {needed.size} bootstrap draws: relearn both with the same resamples"
        )
    return _ends(_quotient(taken, needed) if taken.size == needed.size else np.empty(0))


def _recovered(relearned: Relearning, never_saw: Relearning, original: float, within: float, corpus: str) -> float:
    """Return the share at which the original counts as recovered, of two runs that can be compared."""
    if not 0 < original <= 1 or not 0 <= within < 1:
        raise LensUnlearnError(f"original={original} is a share above 0, and within={within} from 0 to below 1")
    for one in (relearned, never_saw):
        one[corpus]
    ways = [_way(one, corpus) for one in (relearned, never_saw)]
    other = [name for name in ways[0] if name in ways[1] and ways[0][name] != ways[1][name]]
    if other:
        raise LensUnlearnError(
            f"the two runs differ in {' and '.join(other)}: {[ways[0][n] for n in other]} and {[ways[1][n] for n in other]}; "
            "fine-tune both in the same way"
        )
    return (1 - within) * original


def _quotient(taken: np.ndarray | float, needed: np.ndarray | float) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(taken, dtype=np.float64) / np.asarray(needed, dtype=np.float64)


def _way(run: Relearning, corpus: str) -> dict[str, Any]:
    """Return what has to be equal in two runs to compare them."""
    settings = run.provenance.get("relearning")
    if settings is None:
        return {}
    same = {name: settings[name] for name in ("optimizer", "lr", "batch_size")}
    texts = {"the texts": settings["texts"], f"the corpus {corpus!r}": settings["measured"][corpus]}
    return same | {name: one["fingerprint"] for name, one in texts.items()}


def _source(corpus: Corpus) -> dict[str, Any]:
    return {"source": corpus.name, "tokens": corpus.n_tokens, "fingerprint": corpus.fingerprint}


def _points(steps: Sequence[int]) -> list[int]:
    given = list(steps)
    whole = all(isinstance(step, int) and not isinstance(step, bool) and step >= 0 for step in given)
    if not given or not whole or any(b <= a for a, b in zip(given, given[1:], strict=False)):
        raise LensUnlearnError(
            f"steps={tuple(given)} are no numbers of steps: whole, at least 0, and each above the last"
        )
    return given if given[0] == 0 else [0, *given]


def _begin(model: Model, baked: Intervention | None) -> dict[Matrix, Update]:
    """Make a dense update of every matrix, to be trained; it starts at 0, or at what an intervention does to weights."""
    return {matrix: Update(value.requires_grad_()) for matrix, value in dense_edits(model, baked).items()}


def dense_edits(model: Model, baked: Intervention | None) -> dict[Matrix, Float[Tensor, "in out"]]:
    """Return what an intervention comes to in every matrix of a model: 0 where it changes nothing, or for None.

    Raises:
        LensUnlearnError: If it is no change of weights that this knows: a `Delta`, or an ablation to zero.
    """
    matrices = [Matrix(i, name) for i in range(int(model.cfg.n_layers)) for name in matrix_names(model, i)]
    shapes = matrix_shapes(model, matrices)
    found: dict[Matrix, Tensor] = {}
    for matrix in matrices:
        weights = matrix_value(model, *matrix)
        dtype = weights.dtype if weights.dtype == torch.float64 else torch.float32
        found[matrix] = torch.zeros(shapes[matrix], dtype=dtype, device=weights.device)
    members = [] if baked is None else _flat(baked)
    for delta in (one for one in members if isinstance(one, Delta)):
        delta.check_matrices(matrix_shapes(model, delta.updates))
        for matrix, update in delta.updates.items():
            found[matrix] += delta.strength * update.detach().dense(shapes[matrix]).to(found[matrix])
    for ablation in (one for one in members if isinstance(one, Ablate)):  # behind all deltas: these see what it masks
        for matrix, update in Delta.from_ablation(ablation, model).updates.items():
            assert update.rows is not None
            found[matrix][update.rows.to(found[matrix].device)] = update.value.to(found[matrix])
    return found


def _flat(intervention: Intervention) -> list[Intervention]:
    if isinstance(intervention, Chain):
        return [one for member in intervention.members for one in _flat(member)]
    if not isinstance(intervention, Ablate | Delta):
        raise LensUnlearnError(
            f"{intervention!r} is no change of weights and cannot be baked into them: relearn with attached=True"
        )
    return [intervention]


def _step(
    model: Model,
    texts: Corpus,
    step: int,
    batch_size: int,
    seed: int,
    trained: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
) -> float:
    """Train on the rows of one step, and return their loss before it."""
    batch = rows_at(texts, step, batch_size, seed)
    loss = read_answers(model, batch).loss
    if not math.isfinite(value := loss.item()):
        raise LensUnlearnError(
            f"the loss is {value} at step {step + 1}: lower lr, or look for rows of {texts.name} in which nothing is predicted"
        )
    for tensor, gradient in zip(trained, gradients_of(loss, trained), strict=True):
        tensor.grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value
