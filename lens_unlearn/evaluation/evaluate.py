"""`evaluate`: what a model predicts and answers on corpora, with and without interventions.

Every (condition, batch) goes through the model once, whatever is measured: all metrics of tokens read the same logits, and so do
those of memorization, which only run what stands in no corpus. Knows the families of scores and the table of metrics; knows no
metric by name but `kl`, which needs the unedited model beside, and `abstained`, which it lacks where nothing can abstain.
"""

import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_unlearn.core import distributed
from lens_unlearn.core.counter_rng import key_of
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.core.progress import Bar
from lens_unlearn.corpora.batching import rows_at_once
from lens_unlearn.corpora.corpus import Batch, Corpus, require_corpora
from lens_unlearn.evaluation.bootstrap import WEIGHTS, Scores, estimates
from lens_unlearn.evaluation.memorization import Memorization, single_values
from lens_unlearn.evaluation.metric import Metric
from lens_unlearn.evaluation.metrics import METRICS, in_order, needing
from lens_unlearn.evaluation.question_answering import QuestionAnswering
from lens_unlearn.evaluation.report import BASE, Measure, Report, provenance_of
from lens_unlearn.evaluation.teacher_forcing import (
    Forced,
    Predicted,
    joined_rows,
    outcomes,
    predict,
    predict_found,
    require_finite,
)
from lens_unlearn.interventions.base import Intervention, acting
from lens_unlearn.model.hooks import one_thread
from lens_unlearn.model.host import Model, require_eval, require_model
from lens_unlearn.model.loading import as_in_file, fingerprint, model_name
from lens_unlearn.model.replay import Prefix

__all__ = ["Condition", "common_targets", "evaluate", "replicates"]

Condition = Intervention | None | Sequence[Intervention]
Runs = dict[str, list[Intervention | None]]
COMMON_TARGETS = 50
ROWS = 8
"""Rows at a time where texts are written, or tasks scored, unless it is said how many."""
KEPT = ("loss", "right")
"""Quantities that are kept token by token, of rows that are true answers."""


def evaluate(
    model: Model,
    corpora: Mapping[str, Corpus],
    conditions: Mapping[str, Condition],
    *,
    batch_size: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
    base: Report | None = None,
    deal: bool = False,
    answers: int = 0,
    max_new_tokens: int = 100,
    allow_code_execution: bool = False,
    memorization: int = 0,
    tasks: Sequence[str | os.PathLike[str] | Mapping[str, Any]] = (),
    task_limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool | str = False,
    system_instruction: str | None = None,
    progress: bool = True,
) -> Report:
    """Measure what a model predicts and answers on corpora, with and without interventions.

    Sums are over all counted tokens of a corpus, never means of batch means:

    - `loss`: mean negative log probability of the next token, in nats; `perplexity` = exp of that mean.
    - `top1`, `top10`: share of tokens among the 1 or 10 most probable; tied places are shared out evenly.
    - `top1_rare`: top1 over tokens outside the 50 most frequent targets of the corpus.
    - `kl`: mean KL(unedited || edited) per token, in nats.
    - `abstained`: share of rows that an intervention abstained from; given where any condition can abstain. Each row is
      judged at the end of its prompt, and its logits are constant from there on, but for the end-of-text token, which is ahead
      by 0.001: it adds log(vocabulary) to the loss and 0 to top-1 (1 where the end-of-text token itself is to be predicted), and
      9 / (vocabulary - 1) to top-10. Where a corpus has no prompts, a row is judged at its last token, and nothing else changes.

    With `answers`, questions of the corpora that were read as "question>answer" are also answered, greedily, and compared
    with the true answers; where an answer ends and how it is compared is said in `lens_unlearn.evaluation.answer_matching`. Where a
    row lists several right answers, each of these scores counts the one that it is highest for; everything else is about the first:

    - `exact_match`: share of answers that are the true one, both normalized.
    - `numeric_match`: share that end with the true answer's number; where the true answers end in numbers.
    - `rouge_l`, `rouge_l_f`: mean ROUGE-L, recall (as TOFU reports it) and F-measure.
    - `unit_tests`: share that pass their unit tests; where rows have some, and with `allow_code_execution` only.
    - `truncated`: share cut at `max_new_tokens`, or where the context was full.
    - `refused`: share refused; where any intervention can abstain. A refused answer scores 0 in all others.

    With `memorization`, the true answers to questions are looked for under teacher forcing: each token is predicted from the prompt
    and the true tokens before it. With NLL(y) the mean negative log probability of the tokens of y behind the prompt:

    - `answer_probability`: mean of exp(-NLL(answer)).
    - `exact_memorization`: share of answer tokens that are the single most probable one.
    - `extraction_strength`: mean of 1 - k / L, with L the answer's tokens and k the fewest to be given so that all others are
      predicted right; 0 where the last one is not.
    - `truth_ratio`: mean of R = exp(-mean_j NLL(wrong_j)) / (exp(-NLL(paraphrase)) + 1e-10), and `choice_probability`: mean of
      p(answer) / (p(answer) + sum_j p(wrong_j) + 1e-10), p = exp(-NLL); over questions with wrong answers, where rows have some.

    An end-of-text token behind the answers (`read_corpus(answer_eos=True)`) is one of their tokens, but for `exact_memorization`
    and `extraction_strength`, as in OpenUnlearning.

    With `tasks`, benchmarks of EleutherAI's lm-evaluation-harness are run under every condition, with their own metrics (`acc`,
    `acc_norm`, `exact_match`, ...); each task is a corpus of the report. See `lens_unlearn.evaluation.harness`.

    What single questions score is in `Report.values`. An abstained row has constant logits: each token has probability
    1 / vocabulary and no token of an answer is predicted, so `answer_probability` is 1 / vocabulary, `truth_ratio` 1,
    `choice_probability` 1 / (1 + wrong answers), `exact_memorization` and `extraction_strength` 0.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
        corpora: By the name under which the report gives them.
        conditions: By name: an intervention, None for the unedited model, or several interventions (such as random
            controls with different seeds), which are averaged and whose spread enters the interval of that mean. The unedited
            model is always measured, as "base".
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        resamples: Bootstrap resamples over documents, or over the groups that a corpus was read with.
        seed: Of the bootstrap and of the choice of questions.
        base: An earlier report on the same corpora, with the same resamples and seed, from which the unedited model's
            measures are taken instead of running it again beside every condition. `kl` needs both side by side, so it is
            left out.
        deal: Whether several interventions of a condition share the documents: each document, or group of them, is read under one
            of them instead of under all, which costs one pass instead of as many, and gives a wider interval of their mean. Not
            where a detector finds the rows, which costs little, and not of questions and tasks.
        answers: Questions to answer per corpus, at most, drawn at random and the same for every condition; 0 for none.
        max_new_tokens: The longest answer.
        allow_code_execution: Whether to run answers that are programs, isolated as well as this system allows; see
            `lens_unlearn.evaluation.code_tests.passes_tests`. Otherwise the report says that unit tests were not run.
        memorization: Questions per corpus, at most, whose true answers are looked for; drawn as for `answers`; 0 for none.
        tasks: Names that lm-evaluation-harness knows, paths of its YAML files, or such configurations as mappings. Takes the extra
            `lens-unlearn[harness]`.
        task_limit: Documents per task, from the first; None for all.
        num_fewshot: Of tasks: examples in each prompt; None leaves it to the task.
        apply_chat_template: Of tasks: whether prompts are put into the tokenizer's chat template, or the name of one of several;
            examples are turns of the conversation then.
        system_instruction: Of tasks: what stands before every prompt, or is the system's turn.
        progress: Whether to show a bar.

    Raises:
        CorpusError: If a corpus fits another model, or has no token that anything predicts; if answers or memorization are
            wanted and no corpus has any true answers.
        ModelError: If the model is in training mode, or another thread has an intervention on it, or measures it.
        ActivationError: If the unedited model's logits are NaN or infinite; names the layer. Where those of an edit are, what it
            measures is NaN.
        LensUnlearnError: If there is no corpus, or a condition called "base" is an intervention; if `base` is a report of
            another model or corpus, or with other resamples; if documents are to be dealt beside `base`, or where the true answers
            are looked for under every intervention.
    """
    require_model(model)
    require_eval(model)
    require_corpora(corpora)
    runs = replicates(conditions)
    measures: dict[tuple[str, str, str], Measure] = {}
    if deal and (base is not None or memorization):
        raise LensUnlearnError(
            f"deal=True reads each text under one of several interventions, which {'memorization' if memorization else 'base'} "
            "has no use for: leave out one of them"
        )
    if base is not None:
        measures |= _taken(base, model, corpora, resamples, seed)
        runs.pop(BASE)
    if not tasks and (num_fewshot is not None or apply_chat_template or system_instruction is not None):
        raise LensUnlearnError(
            "num_fewshot, apply_chat_template and system_instruction are for tasks, of which there are none: give some, or leave "
            "them out"
        )
    if not corpora and not tasks:
        raise LensUnlearnError("there is no corpus to evaluate on: give at least one, by name, or tasks")
    for corpus in corpora.values():
        corpus.check(model)
    asking = QuestionAnswering(
        needing("answers"), answers, max_new_tokens, batch_size or ROWS, allow_code_execution, seed, progress
    )
    recalling = Memorization(needing("memorization"), memorization, batch_size, seed, progress)
    questions, kept_rows = asking.choose(corpora), recalling.choose(model, corpora)
    derived = [row for row in METRICS if row.derived_from]
    judging = {name for name, run in runs.items() if all(one is not None and one.judges for one in run)}

    def keep(name: str, scores: Scores) -> None:
        known = {metric: one for (c, corpus, metric), one in measures.items() if (c, corpus) == (BASE, name)}
        made = estimates(scores, resamples, seed, derived, judging=judging, base=known, name=name)
        measures.update(((condition, name, metric), measure) for condition, metric, measure in made)

    shared = {name for name, run in runs.items() if deal and len(run) > 1 and not any(map(_finds_rows, run))}
    passes = sum(1 if name in shared else len(run) for name, run in runs.items())
    total = sum(corpus.n_read for corpus in corpora.values()) * passes
    bar = Bar(
        total=total, unit=" tokens", unit_scale=True, disable=not (progress and distributed.is_first()), desc="evaluate"
    )
    halved: dict[str, int] = {}
    at_once: dict[str, int] = {}
    forced: dict[str, dict[str, list[dict[int, Forced]]]] = {}
    with one_thread(model), bar:  # all of a corpus: nobody else's hooks shall act beside the unedited model
        for number, (name, corpus) in enumerate(corpora.items(), 1):
            bar.called(f"evaluate {number} of {len(corpora)}: {name}")
            at_once[name] = rows_at_once(model, corpus, batch_size, passes=passes)
            if not runs:  # all that was asked for is known
                continue
            dealt = {one: _dealt(corpus, len(runs[one]), seed) for one in shared}
            scored = _score(model, corpus, runs, dealt, at_once[name], bar, kept_rows.get(name, set()))
            halved |= {name: scored.halved} if scored.halved else {}
            forced[name] = scored.rows
            keep(name, scored.scores(corpus.units, with_kl=base is None))
            silent = [key for key in measures if key[1:] == (name, "abstained")]
            if silent and not acting(model):  # a base measured beside nothing that abstains lacks it
                other = measures[silent[0]]
                none = Measure(0.0, np.zeros_like(other.draws), other.n, other.units)
                measures.setdefault((BASE, name, "abstained"), none)
    samples: list[dict[str, Any]] = []
    values = {} if base is None else {key: one for key, one in base.values.items() if key in measures}
    with one_thread(model):
        for name, asked in asking.ask(model, corpora, questions, runs):
            keep(name, asked.scores)
            samples += asked.samples
        for name, scores in recalling.measure(model, runs, forced):
            keep(name, scores)
            for column, metric in enumerate(scores.metrics):
                found = single_values(scores, column)
                values |= {(condition, name, metric.name): found[condition] for condition in runs}
    of_tasks: dict[str, Any] = {}
    missing: dict[str, str] = {}
    if tasks:
        from lens_unlearn.evaluation.harness import DERIVED, TaskOptions, run_tasks

        options = TaskOptions(task_limit, num_fewshot, apply_chat_template, system_instruction)
        derived += DERIVED
        with one_thread(model):
            of_tasks, missing = run_tasks(
                model, tasks, {BASE: [None], **runs}, options=options, batch_size=batch_size or ROWS, progress=progress
            )
        if twice := set(of_tasks) & set(corpora):
            raise LensUnlearnError(
                f"a corpus and a task are both called {sorted(twice)[0]!r}: give the corpus another name"
            )
        for name, asked in of_tasks.items():
            keep(name, asked.scores)
            samples += asked.samples
    metrics = in_order(dict.fromkeys(metric for _, _, metric in measures))
    if not any(one is not None and one.abstains for run in runs.values() for one in run):
        metrics = [metric for metric in metrics if metric != "abstained"]
    names = dict.fromkeys([BASE, *runs])
    ordered = {
        k: measures[k] for c in names for n in [*corpora, *of_tasks] for m in metrics if (k := (c, n, m)) in measures
    }
    settings = _settings(model, corpora, conditions, resamples, seed)
    settings["rows at a time"] = at_once
    if shared:
        settings["dealt"] = sorted(shared)
    if halved:
        settings["batches cut for lack of memory"] = halved
    if questions:
        settings["answers"] = asking.settings(corpora, questions)
    if tasks:
        settings["tasks"] = {name: {"documents": len(asked.scores.counts)} for name, asked in of_tasks.items()}
        settings["tasks"] |= {"left out": missing} if missing else {}
        put = {"num_fewshot": num_fewshot, "apply_chat_template": apply_chat_template}
        put["system_instruction"] = system_instruction
        settings["tasks"] |= {"options": put} if any(value not in (None, False) for value in put.values()) else {}
    if kept_rows:
        settings["memorization"] = recalling.settings()
    settings["weights"] = WEIGHTS
    return Report(ordered, provenance_of(settings), samples=samples, values=values)


def _taken(
    base: Report, model: Model, corpora: Mapping[str, Corpus], resamples: int, seed: int
) -> dict[tuple[str, str, str], Measure]:
    """Return the unedited model's measures of an earlier report, which must be of this model and these corpora."""
    theirs = base.provenance.get("fingerprint")
    if theirs != as_in_file("the report given as base", theirs, fingerprint(model), model):
        raise LensUnlearnError("the report given as base is not of this model")
    earlier = base.provenance.get("corpora", {})
    for name, corpus in corpora.items():
        if earlier.get(name, {}).get("fingerprint") != corpus.fingerprint:
            raise LensUnlearnError(f"the report given as base is not of the corpus {name!r} as it is here")
    known = (base.provenance.get("bootstrap"), base.provenance.get("weights"))
    if known != ({"resamples": resamples, "seed": seed}, WEIGHTS):
        raise LensUnlearnError("the report given as base has other resamples or another seed: give the same")
    return {
        key: measure
        for key, measure in base.measures.items()
        if key[0] == BASE and key[1] in corpora and key[2] != "kl"
    }


def replicates(conditions: Mapping[str, Condition]) -> Runs:
    """Return the interventions of each condition, beginning with the unedited model."""
    if conditions.get(BASE) is not None:
        raise LensUnlearnError("the condition 'base' is the unedited model: give the intervention another name")
    runs: Runs = {BASE: [None]}
    for name, condition in conditions.items():
        if condition is None or isinstance(condition, Intervention):
            runs[name] = [condition]
        else:
            runs[name] = list(condition) if isinstance(condition, Sequence) else [condition]
        if not runs[name] or not all(one is None or isinstance(one, Intervention) for one in runs[name]):
            raise LensUnlearnError(f"the condition {name!r} is no intervention: give one, several, or None")
    return runs


@dataclass
class _Scored:
    """What one corpus' tokens and rows add to the metrics, per document, under every condition."""

    metrics: list[Metric]
    counts: np.ndarray
    """[documents, metrics]"""
    values: dict[str, list[np.ndarray]]
    """By condition, for each of its interventions: [documents, metrics]."""
    rows: dict[str, list[dict[int, Forced]]] = field(default_factory=dict)
    """By condition, for each of its interventions: the rows that were to be kept, token by token."""
    dealt: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By condition whose interventions share the documents: which of them each document was read under. It has one table."""
    halved: int = 0
    """Batches that were cut because the device had no room for them."""

    @classmethod
    def empty(cls, runs: Runs, documents: int, dealt: Mapping[str, np.ndarray]) -> "_Scored":
        metrics = [*needing("tokens"), *needing("rows")]
        shape = (documents, len(metrics))
        tables = {name: range(1 if name in dealt else len(run)) for name, run in runs.items()}
        values = {name: [np.zeros(shape) for _ in numbers] for name, numbers in tables.items()}
        return cls(metrics, np.zeros(shape), values, {name: [{} for _ in n] for name, n in tables.items()}, dealt)

    def scores(self, units: Sequence[str], *, with_kl: bool) -> Scores:
        """Return what was summed up, of documents of these units; without `kl` where the unedited model was not run beside."""
        columns = [column for column, metric in enumerate(self.metrics) if with_kl or metric.name != "kl"]
        values = {name: [part[:, columns] for part in parts] for name, parts in self.values.items()}
        return Scores([self.metrics[column] for column in columns], values, self.counts[:, columns], units, self.dealt)

    def gather(self) -> None:
        """Add up what every process has scored of its batches."""
        everywhere = distributed.gather((self.values, self.counts, self.rows, self.halved))
        self.counts = np.sum([counts for _, counts, _, _ in everywhere], axis=0)
        self.halved = sum(halved for *_, halved in everywhere)
        for name, parts in self.values.items():
            for number in range(len(parts)):
                parts[number] = np.sum([values[name][number] for values, *_ in everywhere], axis=0)
                for _, _, rows, _ in everywhere:
                    self.rows[name][number] |= rows[name][number]


def _finds_rows(intervention: Intervention | None) -> bool:
    return intervention is not None and intervention.row_detector is not None


def _dealt(corpus: Corpus, count: int, seed: int) -> Int[np.ndarray, "documents"]:
    """Deal the units of a corpus to so many interventions, at random and in equal numbers: which each document is read under."""
    units = sorted(set(corpus.units), key=lambda unit: key_of("dealt", seed, unit))
    of = {unit: number % count for number, unit in enumerate(units)}
    return np.array([of[unit] for unit in corpus.units])


def _score(
    model: Model,
    corpus: Corpus,
    runs: Runs,
    dealt: Mapping[str, np.ndarray],
    rows_at_a_time: int,
    bar: Any,
    kept_rows: set[int],
) -> _Scored:
    """Run every batch of a corpus once under every condition.

    Raises:
        CorpusError: If nothing in it is predicted.
    """
    scored = _Scored.empty(runs, corpus.n_documents, dealt)
    common = common_targets(corpus, int(model.cfg.d_vocab))
    of_rows = {name: torch.from_numpy(of)[corpus.document] for name, of in dealt.items()}
    for batch in distributed.share(corpus.batches(rows_at_a_time)):
        pieces = batch.run(partial(_run, model, common, runs, of_rows, scored.metrics, bar))
        scored.halved += len(pieces) > 1
        for piece in pieces:
            _add(scored, piece, corpus, kept_rows)
    if distributed.count() > 1:
        scored.gather()
    if not scored.counts[:, 0].sum():
        raise CorpusError(f"nothing in {corpus.name} can be predicted: no counted token has a token before it")
    return scored


@dataclass
class _Piece:
    """One batch, or a part of one, under every condition."""

    batch: Batch
    row: np.ndarray
    """[tokens] Which row of the batch each predicted token is of."""
    rare: np.ndarray
    """[tokens] 1 where the target is not one of the corpus' most frequent ones."""
    tables: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]
    """By condition, for each of its interventions: [tokens, token metrics], which rows abstained, and [tokens, `KEPT`]."""


def _run(
    model: Model,
    common: Bool[Tensor, "vocabulary"],
    runs: Runs,
    dealt: Mapping[str, Int[Tensor, "rows"]],
    metrics: Sequence[Metric],
    bar: Any,
    batch: Batch,
) -> _Piece:
    """Run a batch under every condition, the unedited model first, and read all quantities out of each one's logits."""
    quantities = list(dict.fromkeys([*KEPT, *(name for metric in metrics for name in metric.quantities)]))
    of_tokens = [metric for metric in metrics if metric.needs == "tokens"]
    where = batch.counted[:, 1:]
    rare = (~common[batch.tokens[:, 1:][where]]).numpy().astype(np.float64)
    found: dict[str, list[_Said]] = {}
    with torch.no_grad():
        prefix = _prefix(model, runs)
        reference = predict(model, batch, prefix=prefix) if BASE in runs else None
        prefix = prefix if prefix is not None and _replays(model, batch, prefix, reference) else None

        def ask(intervention: Intervention | None, batch: Batch, prefix: Prefix | None) -> Predicted:
            start = 0 if intervention is None or prefix is None else _first_layer(model, intervention)
            with nullcontext() if intervention is None else intervention.on(model):
                return predict(model, batch, prefix=prefix if start else None, start=start)

        def say(intervention: Intervention | None) -> _Said:
            if intervention is None and reference is not None:
                return _Said(reference)
            if intervention is None or reference is None or not _finds_rows(intervention) or acting(model):
                return _Said(ask(intervention, batch, prefix))
            start = 0 if prefix is None else _first_layer(model, intervention)
            rows, predicted = predict_found(model, batch, intervention, reference, prefix if start else None, start)
            return _Said(predicted, rows)

        def share(run: Sequence[Intervention | None], of: Int[Tensor, "batch"]) -> _Said:
            parts = [(of == number, one) for number, one in enumerate(run) if bool((of == number).any())]
            asked = (ask(one, batch.only(rows), prefix and prefix.only(rows)) for rows, one in parts)
            return _Said(joined_rows([(rows, said) for (rows, _), said in zip(parts, asked, strict=True)]))

        for name, run in runs.items():
            found[name] = [share(run, dealt[name][batch.rows])] if name in dealt else []
            for intervention in () if name in dealt else run:
                found[name].append(say(intervention))
                bar.update(int(batch.lengths.sum()))
            if name in dealt:
                bar.update(int(batch.lengths.sum()))
        everything = [one for run in found.values() for one in run]
        whole = [one.predicted for one in everything if one.rows is None and one.predicted is not None]
        read = iter(outcomes(whole, quantities, reference))
    tables: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {name: [] for name in runs}
    unedited = np.zeros((0, len(quantities)))
    for name, run in found.items():
        for said in run:
            table = next(read) if said.rows is None else said.table(unedited, quantities, reference)
            if reference is not None and said.predicted is reference:
                require_finite(model, batch, reference, table)
                unedited = table
            tokens = dict(zip(quantities, table.T, strict=True)) | {"rare": rare}
            columns = [metric.of(tokens) for metric in of_tokens if metric.of is not None]
            tables[name].append((np.stack(columns, axis=1), said.abstained.numpy(), table[:, : len(KEPT)]))
    return _Piece(batch, where.nonzero()[:, 0].numpy(), rare, tables)


@dataclass(frozen=True)
class _Said:
    """What a model says of a batch under an intervention."""

    predicted: Predicted | None
    """Of all rows, or of `rows`; None if these are none."""
    rows: Bool[Tensor, "batch"] | None = None
    """The rows in which alone it is not what the unedited model says; None for all."""

    @property
    def abstained(self) -> Bool[Tensor, "batch"]:
        """Which rows an intervention abstained from."""
        if self.rows is None:
            assert self.predicted is not None
            return self.predicted.abstained
        abstained = torch.zeros_like(self.rows)
        if self.predicted is not None:
            abstained[self.rows] = self.predicted.abstained
        return abstained

    @torch.no_grad()
    def table(
        self, unedited: Float[np.ndarray, "n quantities"], quantities: Sequence[str], reference: Predicted | None
    ) -> Float[np.ndarray, "n quantities"]:
        """Return the quantities of all tokens: in other rows, those of the unedited model."""
        if self.rows is None or self.predicted is None or reference is None:
            return unedited
        table = unedited.copy()
        (own,) = outcomes([self.predicted], quantities, reference.only(self.rows))
        table[self.rows[reference.row].numpy()] = own
        return table


_replay: "weakref.WeakKeyDictionary[Any, bool]" = weakref.WeakKeyDictionary()
"""By model: whether its blocks pass on nothing but the residual stream, as was tried."""


def _prefix(model: Model, runs: Runs) -> Prefix | None:
    """Return where to keep the unedited model's residual stream for interventions that begin in a higher layer, if there are any.

    Not inside somebody else's intervention that looks at rows, which has to see every pass whole.
    """
    if BASE not in runs or acting(model) or not _replay.get(model, True):
        return None
    starts = {_first_layer(model, one) for run in runs.values() for one in run if one is not None} - {0}
    return Prefix(starts) if starts else None


def _first_layer(model: Model, intervention: Intervention) -> int:
    """Return the first layer in which an intervention does anything; 0 if that cannot be told."""
    if type(intervention).on is not Intervention.on:
        return 0
    layers = [where.layer for where, _ in (*intervention.hooks(), *intervention.matrices())]
    return min(layers, default=int(model.cfg.n_layers))


def _replays(model: Model, batch: Batch, prefix: Prefix, reference: Predicted | None) -> bool:
    """Whether the unedited model gives the same from a layer on; tried once."""
    if model not in _replay and reference is not None:
        try:
            again = predict(model, batch, prefix=prefix, start=max(prefix.layers)).hidden
            size = reference.hidden.float().abs().amax().clamp_min(1e-30)
            _replay[model] = bool(((again - reference.hidden).float().abs().amax() <= 1e-3 * size).item())
        except torch.OutOfMemoryError:
            raise
        except Exception:  # an architecture of another structure
            _replay[model] = False
    return _replay.get(model, False)


def _add(scored: _Scored, piece: _Piece, corpus: Corpus, kept_rows: set[int]) -> None:
    """Add a batch's tokens and rows to the sums of their documents."""
    documents = corpus.document[piece.batch.rows].numpy()
    of_token = documents[piece.row]
    of_tokens = [metric for metric in scored.metrics if metric.needs == "tokens"]
    ones = np.ones(len(of_token))
    over = [ones if metric.over is None else metric.over({"rare": piece.rare}) for metric in of_tokens]
    np.add.at(scored.counts[:, : len(of_tokens)], of_token, np.stack(over, axis=1))
    np.add.at(scored.counts[:, len(of_tokens) :], documents, 1)
    true_answers = [(place, row) for place, row in enumerate(piece.batch.rows.tolist()) if row in kept_rows]
    for name, parts in piece.tables.items():
        for number, (table, silent, quantities) in enumerate(parts):
            into = scored.values[name][number]
            np.add.at(into[:, : len(of_tokens)], of_token, table)
            for column, metric in enumerate(scored.metrics[len(of_tokens) :], start=len(of_tokens)):
                if metric.of is not None:
                    np.add.at(into[:, column], documents, metric.of({"abstained": silent.astype(np.float64)}))
            for place, row in true_answers:
                own = quantities[piece.row == place]
                scored.rows[name][number][row] = dict(zip(KEPT, own.T, strict=True))


def common_targets(corpus: Corpus, vocabulary: int) -> Bool[Tensor, "vocabulary"]:
    """Mark the corpus' most frequent targets; ties go to the lower token id."""
    first = torch.zeros(len(corpus.tokens), dtype=torch.bool)
    first[corpus.starts[:-1].long()] = True
    targets = corpus.tokens[corpus.counted & ~first].long()
    counts = torch.bincount(targets, minlength=vocabulary)
    common = torch.zeros(vocabulary, dtype=torch.bool)
    common[torch.sort(counts, descending=True, stable=True).indices[:COMMON_TARGETS]] = True
    return common & (counts > 0)


def _settings(
    model: Model, corpora: Mapping[str, Corpus], conditions: Mapping[str, Condition], resamples: int, seed: int
) -> dict[str, Any]:
    return {
        "model": model_name(model),
        "fingerprint": fingerprint(model),
        "corpora": {
            name: {
                "source": corpus.name,
                "tokens": corpus.n_tokens,
                "documents": corpus.n_documents,
                "units": len(set(corpus.units)),
                "bos": corpus.prepend_bos,
                "window": corpus.window,
                "answer_eos": corpus.answer_eos is not None,
                "fingerprint": corpus.fingerprint,
                "skipped": corpus.skipped,
                **({} if corpus.asked is None else {"chat": True, "system": corpus.system}),
            }
            for name, corpus in corpora.items()
        },
        "conditions": {name: repr(condition) for name, condition in conditions.items()},
        "bootstrap": {"resamples": resamples, "seed": seed},
    }
