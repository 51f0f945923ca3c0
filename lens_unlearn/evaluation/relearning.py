r"""`relearn`: how fast a model learns again what it was made to forget, by fine-tuning.

An intervention can hide knowledge or remove it, and next-token accuracy does not tell which. A model that never saw the texts
has to learn them; one that only hides them is there within a few steps. This is measured under two threat models:

- T1, `attached=True`: the intervention stays in force, and the weights behind it are trained.
- T2, `attached=False`: the intervention is written into the weights first, as in an exported model, and these are trained.

Nothing is written into the user's model: the fine-tuned change is a `Delta` of every matrix, trained outside it.

`anamnesis_index` compares with a model that never saw the texts, after Chundawat et al., "Zero-Shot Machine Unlearning" (arXiv
2201.05629). Relearning as a test of unlearned language models: Lynch et al., "Eight Methods to Evaluate Robust Unlearning in
LLMs" (arXiv 2402.16835).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.evaluation.answer_losses import gradients_of, read_answers, rows_at
from lens_unlearn.evaluation.report import provenance_of
from lens_unlearn.evaluation.teacher_forcing import accuracy
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.base import Chain, Intervention
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.update import Update
from lens_unlearn.model.host import Model, require_eval, require_float, require_model
from lens_unlearn.model.loading import fingerprint, model_name
from lens_unlearn.model.matrices import Matrix, matrix_names, matrix_shapes, matrix_value

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Relearning", "anamnesis_index", "relearn"]

STEPS = (0, 1, 2, 4, 8, 16, 32, 64)
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
        curve = self[corpus]
        for place, (step, value) in enumerate(curve):
            if value >= share:
                if place == 0:
                    return float(step)
                before, low = curve[place - 1]
                return before + (share - low) / (value - low) * (step - before)
        return math.inf

    def to_frame(self) -> "pd.DataFrame":
        """Give one row per corpus and measured step: corpus, step, share."""
        import pandas as pd

        rows = [(corpus, step, share) for corpus, curve in self.curves.items() for step, share in curve]
        return pd.DataFrame(rows, columns=pd.Index(["corpus", "step", "share"]))

    def table(self) -> "pd.DataFrame":
        """Give a small table for reading: corpora by steps."""
        return self.to_frame().pivot(index="corpus", columns="step", values="share").loc[list(self.curves)].round(3)

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

    Under `enable_compatibility_mode()` the processed matrices are trained, which is another fine-tuning than that of the raw ones.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode. Its parameters are never written, and get no
            gradients.
        texts: What is trained on: the forgotten facts, or others.
        intervention: What took knowledge out; None for the model as it is, such as one that never saw the texts.
        measured: Corpora by name, such as "forget", "neighbouring" and "unrelated".
        steps: After how many steps to measure, rising.
        lr: Of AdamW. Results hang on it: compare at the same one, and at more than one.
        batch_size: Rows in a step (all of them, if there are fewer); full-length rows per forward when measuring.
        seed: Of the order of rows.
        attached: T1 or T2.
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
    for corpus in (texts, *measured.values()):
        corpus.check(model)
    updates = _begin(model, None if attached else intervention)
    delta, trained = Delta(updates), [update.value for update in updates.values()]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in measured}
    losses: list[float] = []
    whole = intervention + delta if intervention is not None and attached else delta
    bar = tqdm(total=points[-1], disable=not progress, desc="relearn", unit=" steps")
    with bar, whole.on(model), torch.enable_grad():
        for step in range(points[-1] + 1):
            if step in points:
                for name, corpus in measured.items():
                    curves[name].append((step, accuracy(model, corpus, batch_size)[0]))
                bar.set_postfix({name: f"{curve[-1][1]:.2f}" for name, curve in curves.items()})
            if step < points[-1]:
                losses.append(_step(model, texts, step, batch_size, seed, trained, optimizer))
                bar.update(1)
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
    }
    settings = {"model": model_name(model), "fingerprint": fingerprint(model), "relearning": training}
    trained_delta = Delta({matrix: update.detach() for matrix, update in updates.items()})
    return Relearning(curves, losses, trained_delta, provenance_of(settings))


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
    if not 0 < original <= 1 or not 0 <= within < 1:
        raise LensUnlearnError(f"original={original} is a share above 0, and within={within} from 0 to below 1")
    taken, needed = (one.steps_to(corpus, (1 - within) * original) for one in (relearned, never_saw))
    ways = [_way(one, corpus) for one in (relearned, never_saw)]
    other = [name for name in ways[0] if name in ways[1] and ways[0][name] != ways[1][name]]
    if other:
        raise LensUnlearnError(
            f"the two runs differ in {' and '.join(other)}: {[ways[0][n] for n in other]} and {[ways[1][n] for n in other]}; "
            "fine-tune both in the same way"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(taken) / np.float64(needed))


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
    return {matrix: Update(value.requires_grad_()) for matrix, value in found.items()}


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
