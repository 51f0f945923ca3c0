"""`evaluate`: loss, accuracy, divergence and generated answers of a model with and without interventions."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lens_unlearn.core import distributed
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.corpora.corpus import Batch, Corpus
from lens_unlearn.evaluation.memorization import MEMORIZATION_METRICS, OVER, Recalling
from lens_unlearn.evaluation.question_answering import ANSWER_METRICS, Asking
from lens_unlearn.evaluation.report import BASE, Measure, Report, provenance_of
from lens_unlearn.evaluation.teacher_forcing import expect
from lens_unlearn.interventions.base import Intervention, acting
from lens_unlearn.model.hooks import one_thread
from lens_unlearn.model.host import Model, device_of, require_eval, require_model
from lens_unlearn.model.loading import fingerprint, model_name

__all__ = ["Condition", "evaluate", "replicates"]

Condition = Intervention | None | Sequence[Intervention]
METRICS = ("loss", "top1", "top10", "top1_rare", "kl", "abstained")
_PER = {"top1_rare": 1, "abstained": 2}  # what a metric is a mean over, if not all tokens: see _Sums
COMMON_TARGETS = 50
_CHUNK = 1024  # positions whose full distribution is held at a time


def evaluate(
    model: Model,
    corpora: Mapping[str, Corpus],
    conditions: Mapping[str, Condition],
    *,
    batch_size: int = 8,
    resamples: int = 1000,
    seed: int = 0,
    base: Report | None = None,
    answers: int = 0,
    max_new_tokens: int = 100,
    allow_code_execution: bool = False,
    memorization: int = 0,
    tasks: Sequence[str | os.PathLike[str] | Mapping[str, Any]] = (),
    task_limit: int | None = None,
    progress: bool = True,
) -> Report:
    """Measure what a model predicts and answers on corpora, with and without interventions.

    Sums are over all counted tokens of a corpus, never means of batch means:

    - `loss`: mean negative log probability of the next token, in nats; `perplexity` = exp of that mean.
    - `top1`, `top10`: share of tokens among the 1 or 10 most probable; tied places are shared out evenly.
    - `top1_rare`: top1 over tokens outside the 50 most frequent targets of the corpus.
    - `kl`: mean KL(unedited || edited) per token, in nats.
    - `abstained`: share of rows whose answer was withheld; given where any condition can abstain. Each row is judged at the
      end of its prompt, or, where a corpus has no prompts, at its last token. An abstained row's logits are constant, so it
      adds log(vocabulary) to the loss and 1 / vocabulary to top-1.

    With `answers`, questions of the corpora that were read as "question>answer" are also answered, greedily, and compared
    with the true answers; where an answer ends and how it is compared is said in `lens_unlearn.evaluation.answers`:

    - `exact_match`: share of answers that are the true one, both normalized.
    - `numeric_match`: share that end with the true answer's number; where the true answers end in numbers.
    - `rouge_l`, `rouge_l_f`: mean ROUGE-L, recall (as TOFU reports it) and F-measure.
    - `unit_tests`: share that pass their unit tests; where rows have some, and with `allow_code_execution` only.
    - `refused`: share withheld; where any intervention can abstain. An answer that was withheld scores 0 in all others.

    With `memorization`, the true answers to questions are looked for under teacher forcing: each token is predicted from the prompt
    and the true tokens before it. With NLL(y) the mean negative log probability of the tokens of y behind the prompt:

    - `answer_probability`: mean of exp(-NLL(answer)).
    - `exact_memorization`: share of answer tokens that are the single most probable one.
    - `extraction_strength`: mean of 1 - k / L, with L the answer's tokens and k the fewest to be given so that all others are
      predicted right; 0 where the last one is not.
    - `truth_ratio`: mean of R = exp(-mean_j NLL(wrong_j)) / (exp(-NLL(paraphrase)) + 1e-10), and `choice_probability`: mean of
      p(answer) / (p(answer) + sum_j p(wrong_j) + 1e-10), p = exp(-NLL); over questions with wrong answers, where rows have some.

    With `tasks`, benchmarks of EleutherAI's lm-evaluation-harness are run under every condition, with their own metrics (`acc`,
    `acc_norm`, `exact_match`, ...); each task is a corpus of the report. See `lens_unlearn.evaluation.harness`.

    What single questions score is in `Report.values`. An answer that was withheld has constant logits: each token has probability
    1 / vocabulary and none is predicted, so `answer_probability` is 1 / vocabulary, `truth_ratio` 1 and the shares 0.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
        corpora: By the name under which the report gives them.
        conditions: By name: an intervention, None for the unedited model, or several interventions (such as random
            controls with different seeds), which are averaged and whose spread enters the interval. The unedited
            model is always measured, as "base".
        batch_size: Full-length rows per forward.
        resamples: Bootstrap resamples over documents.
        seed: Of the bootstrap and of the choice of questions.
        base: An earlier report on the same corpora, with the same resamples and seed, from which the unedited model's
            measures are taken instead of running it again beside every condition. `kl` needs both side by side, so it is
            left out.
        answers: Questions to answer per corpus, at most, drawn at random and the same for every condition; 0 for none.
        max_new_tokens: The longest answer.
        allow_code_execution: Whether to run answers that are programs, in a subprocess with limits; see
            `lens_unlearn.evaluation.execution.passes_tests`. Otherwise the report says that unit tests were not run.
        memorization: Questions per corpus, at most, whose true answers are looked for; drawn as for `answers`; 0 for none.
        tasks: Names that lm-evaluation-harness knows, paths of its YAML files, or such configurations as mappings. Takes the extra
            `lens-unlearn[harness]`.
        task_limit: Documents per task, from the first; None for all.
        progress: Whether to show a bar.

    Raises:
        CorpusError: If a corpus fits another model, or has no token that anything predicts; if answers or memorization are
            wanted and no corpus has any true answers.
        ModelError: If the model is in training mode, or another thread has an intervention on it, or measures it.
        LensUnlearnError: If there is no corpus, or a condition called "base" is an intervention; if `base` is a report of
            another model or corpus, or with other resamples.
    """
    require_model(model)
    require_eval(model)
    runs = replicates(conditions)
    measures: dict[tuple[str, str, str], Measure] = {}
    if base is not None:
        measures |= _taken(base, model, corpora, resamples, seed)
        runs.pop(BASE)
    if not corpora and not tasks:
        raise LensUnlearnError("there is no corpus to evaluate on: give at least one, by name, or tasks")
    for corpus in corpora.values():
        corpus.check(model)
    asking = Asking(answers, max_new_tokens, batch_size, allow_code_execution, seed, progress)
    recalling = Recalling(memorization, batch_size, seed, progress)
    chosen, known = asking.choose(corpora), recalling.choose(corpora)
    total = sum(corpus.n_tokens for corpus in corpora.values()) * sum(map(len, runs.values()))
    bar = tqdm(
        total=total, unit=" tokens", unit_scale=True, disable=not (progress and distributed.is_first()), desc="evaluate"
    )
    halved: dict[str, int] = {}
    with one_thread(model), bar:  # all of a corpus: nobody else's hooks shall act beside the unedited model
        for name, corpus in corpora.items():
            sums, cut = _measure(model, corpus, runs, batch_size, bar)
            halved |= {name: cut} if cut else {}
            for condition, metric, measure in _summaries(sums, resamples, seed):
                if base is None or metric != "kl":
                    measures[condition, name, metric] = measure
                if metric == "abstained" and not acting(model):  # a base measured beside nothing that abstains lacks it
                    none = Measure(0.0, np.zeros_like(measure.draws), measure.n)
                    measures.setdefault((BASE, name, metric), none)
    samples: list[dict[str, Any]] = []
    left_out: dict[str, int] = {}
    with one_thread(model):
        for name, asked in asking.ask(model, corpora, chosen, runs):
            sums = {key: [_Sums(part, asked.counts) for part in parts] for key, parts in asked.scores.items()}
            for condition, metric, measure in _summaries(sums, resamples, seed, asked.metrics, {"unit_tests": 1}):
                measures[condition, name, metric] = measure
            samples += asked.samples
        values = {} if base is None else {key: one for key, one in base.values.items() if key in measures}
        for name, recalled in recalling.recall(model, corpora, known, runs):
            sums = {key: [_Sums(part, recalled.counts) for part in parts] for key, parts in recalled.scores.items()}
            for condition, metric, measure in _summaries(sums, resamples, seed, recalled.metrics, OVER):
                measures[condition, name, metric] = measure
                values[condition, name, metric] = recalled.values(metric)[condition]
            left_out[name] = recalled.left_out
    of_tasks: dict[str, Any] = {}
    missing: dict[str, str] = {}
    if tasks:
        from lens_unlearn.evaluation.harness import run_tasks

        told: dict[str, Any] = {"limit": task_limit, "batch_size": batch_size, "progress": progress}
        with one_thread(model):
            of_tasks, missing = run_tasks(model, tasks, {BASE: [None], **runs}, **told)
        if twice := set(of_tasks) & set(corpora):
            raise LensUnlearnError(
                f"a corpus and a task are both called {sorted(twice)[0]!r}: give the corpus another name"
            )
        for name, asked in of_tasks.items():
            sums = {key: [_Sums(part, asked.counts) for part in parts] for key, parts in asked.scores.items()}
            for condition, metric, measure in _summaries(sums, resamples, seed, asked.metrics, {}):
                measures[condition, name, metric] = measure
            samples += asked.samples
    metrics = ["loss", "perplexity", *METRICS[1:], *ANSWER_METRICS, *MEMORIZATION_METRICS]
    metrics += dict.fromkeys(m for asked in of_tasks.values() for m in asked.metrics if m not in metrics)
    if not any(one is not None and one.abstains for run in runs.values() for one in run):
        metrics.remove("abstained")
    names = dict.fromkeys([BASE, *runs])
    ordered = {
        k: measures[k] for c in names for n in [*corpora, *of_tasks] for m in metrics if (k := (c, n, m)) in measures
    }
    settings = _settings(model, corpora, conditions, resamples, seed)
    if halved:
        settings["batches cut for lack of memory"] = halved
    if chosen:
        settings["answers"] = asking.settings(corpora, chosen)
    if tasks:
        settings["tasks"] = {name: {"documents": len(asked.counts)} for name, asked in of_tasks.items()}
        settings["tasks"] |= {"left out": missing} if missing else {}
    if known:
        settings["memorization"] = recalling.settings(known, left_out)
    return Report(ordered, provenance_of(settings), samples=samples, values=values)


def _taken(
    base: Report, model: Model, corpora: Mapping[str, Corpus], resamples: int, seed: int
) -> dict[tuple[str, str, str], Measure]:
    """Return the unedited model's measures of an earlier report, which must be of this model and these corpora."""
    if base.provenance.get("fingerprint") != fingerprint(model):
        raise LensUnlearnError("the report given as base is not of this model")
    earlier = base.provenance.get("corpora", {})
    for name, corpus in corpora.items():
        if earlier.get(name, {}).get("fingerprint") != corpus.fingerprint:
            raise LensUnlearnError(f"the report given as base is not of the corpus {name!r} as it is here")
    if base.provenance.get("bootstrap") != {"resamples": resamples, "seed": seed}:
        raise LensUnlearnError("the report given as base has other resamples or another seed: give the same")
    return {
        key: measure
        for key, measure in base.measures.items()
        if key[0] == BASE and key[1] in corpora and key[2] != "kl"
    }


def replicates(conditions: Mapping[str, Condition]) -> dict[str, list[Intervention | None]]:
    """Return the interventions of each condition, beginning with the unedited model."""
    if conditions.get(BASE) is not None:
        raise LensUnlearnError("the condition 'base' is the unedited model: give the intervention another name")
    runs: dict[str, list[Intervention | None]] = {BASE: [None]}
    for name, condition in conditions.items():
        if condition is None or isinstance(condition, Intervention):
            runs[name] = [condition]
        else:
            runs[name] = list(condition) if isinstance(condition, Sequence) else [condition]
        if not runs[name] or not all(one is None or isinstance(one, Intervention) for one in runs[name]):
            raise LensUnlearnError(f"the condition {name!r} is no intervention: give one, several, or None")
    return runs


@dataclass
class _Sums:
    """Per document: sums of each metric, and how many tokens (or answers) they are over."""

    values: np.ndarray  # [documents, metrics]
    counts: np.ndarray  # [documents, 3]: all tokens, rare tokens, rows; or [questions, 2]: answers, those with tests


def _measure(
    model: Model, corpus: Corpus, runs: Mapping[str, list[Intervention | None]], batch_size: int, bar: Any
) -> tuple[dict[str, list[_Sums]], int]:
    """Return sums per document, and how many batches were cut because the device had no room for them."""
    documents = corpus.n_documents
    sums = {
        name: [_Sums(np.zeros((documents, len(METRICS))), np.zeros((documents, 3))) for _ in run]
        for name, run in runs.items()
    }
    common, halved = _common_targets(corpus, int(model.cfg.d_vocab)), 0
    for batch in distributed.share(corpus.batches(batch_size)):
        pieces = batch.run(partial(_run, model, corpus, common, runs))
        halved += len(pieces) > 1
        for targets, found in pieces:
            for name, tables in found.items():
                for (table, silent), into in zip(tables, sums[name], strict=True):
                    targets.add(table, silent, into)
        bar.update(int(batch.counted.sum()) * sum(map(len, runs.values())))
    if distributed.count() > 1:
        everywhere = distributed.gather((sums, halved))
        halved = sum(own for _, own in everywhere)
        for name, parts in sums.items():
            for number, part in enumerate(parts):
                part.values = np.sum([own[name][number].values for own, _ in everywhere], axis=0)
                part.counts = np.sum([own[name][number].counts for own, _ in everywhere], axis=0)
    if not any(part.counts[:, 0].sum() for run in sums.values() for part in run):
        raise CorpusError(f"nothing in {corpus.name} can be predicted: no counted token has a token before it")
    return sums, halved


def _run(
    model: Model,
    corpus: Corpus,
    common: Bool[Tensor, "vocabulary"],
    runs: Mapping[str, list[Intervention | None]],
    batch: Batch,
) -> tuple["_Targets", dict[str, list[tuple[np.ndarray, np.ndarray]]]]:
    """Run one batch under every condition; return the outcome of each of its tokens, and which rows abstained."""
    targets = _Targets.of(batch, corpus, common, device_of(model))
    reference = targets.logits(model) if BASE in runs else None
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in runs}
    for name, run in runs.items():
        for intervention in run:
            with nullcontext() if intervention is None else intervention.on(model):
                plain = reference if intervention is None else None
                logits = targets.logits(model) if plain is None else plain
                silent = targets.abstained(model)
            found[name].append((targets.table(logits, reference), silent))
    return targets, found


@dataclass
class _Targets:
    """The predicted positions of one batch."""

    tokens: Int[Tensor, "batch pos"]
    where: Bool[Tensor, "batch predicted"]
    target: Int[Tensor, "n"]
    rare: Bool[Tensor, "n"]
    document: np.ndarray
    row_document: np.ndarray
    batch: Batch
    corpus: Corpus

    @classmethod
    def of(cls, batch: Batch, corpus: Corpus, common: Bool[Tensor, "vocabulary"], device: torch.device) -> "_Targets":
        where = batch.counted[:, 1:]
        target = batch.tokens[:, 1:][where]
        documents = corpus.document[batch.rows]
        rows = documents[:, None].expand_as(where)[where]
        tokens, where, target = batch.tokens.to(device), where.to(device), target.to(device)
        return cls(tokens, where, target, ~common[target], rows.numpy(), documents.numpy(), batch, corpus)

    def logits(self, model: Model) -> Float[Tensor, "n vocabulary"]:
        expect(model, self.batch, self.corpus)
        with torch.no_grad():
            return model(self.tokens, return_type="logits")[:, :-1][self.where.to(self.tokens.device)]

    def abstained(self, model: Model) -> np.ndarray:
        silent = torch.zeros(len(self.tokens), dtype=torch.bool)
        for live in acting(model):
            silent |= live.abstained.cpu()
        return silent.numpy()

    def table(self, logits: Tensor, reference: Tensor | None) -> np.ndarray:
        """Give loss, top-1, top-10, top-1 of rare targets, and KL of each predicted token."""
        beside = [None] * len(logits) if reference is None else reference.split(_CHUNK)
        chunks = zip(logits.split(_CHUNK), beside, self.target.split(_CHUNK), strict=reference is not None)
        columns = (
            torch.cat([_outcomes(*chunk) for chunk in chunks]).double().cpu() if len(self.target) else torch.zeros(0, 4)
        )
        loss, top1, top10, kl = columns.unbind(1)
        return torch.stack([loss, top1, top10, top1 * self.rare.double().cpu(), kl], dim=1).numpy()

    def add(self, table: np.ndarray, silent: np.ndarray, sums: _Sums) -> None:
        rare = self.rare.double().cpu()
        np.add.at(sums.values[:, : table.shape[1]], self.document, table)
        np.add.at(sums.counts[:, :2], self.document, torch.stack([torch.ones_like(rare), rare], dim=1).numpy())
        np.add.at(sums.values[:, -1], self.row_document, silent)
        np.add.at(sums.counts[:, -1], self.row_document, 1)


def _outcomes(
    logits: Float[Tensor, "n v"], reference: Float[Tensor, "n v"] | None, target: Int[Tensor, "n"]
) -> Float[Tensor, "n 4"]:
    """Give loss, top-1, top-10 and KL of each position."""
    logits = logits.float()
    own = logits.gather(1, target[:, None])
    log_sum = logits.logsumexp(1)
    above = (logits > own).sum(1)
    tied = (logits == own).sum(1)
    # k places are left for `tied` equal candidates: each gets an equal share, so constant logits earn k / vocabulary.
    credit = [((k - above) / tied.clamp_min(1)).clamp(0, 1) for k in (1, 10)]
    kl = torch.zeros_like(log_sum)
    if reference is not None:
        base = reference.float().log_softmax(1)
        terms = base.exp() * (base - logits + log_sum[:, None])
        kl = terms.masked_fill(base == float("-inf"), 0).sum(1)  # what the base cannot say adds nothing
    broken = ~torch.isfinite(log_sum)
    columns = torch.stack([log_sum - own[:, 0], *credit, kl], dim=1)
    return columns.masked_fill(broken[:, None], float("nan"))


def _common_targets(corpus: Corpus, vocabulary: int) -> Bool[Tensor, "vocabulary"]:
    """Mark the corpus' most frequent targets; ties go to the lower token id."""
    first = torch.zeros(len(corpus.tokens), dtype=torch.bool)
    first[corpus.starts[:-1].long()] = True
    targets = corpus.tokens[corpus.counted & ~first].long()
    counts = torch.bincount(targets, minlength=vocabulary)
    common = torch.zeros(vocabulary, dtype=torch.bool)
    common[torch.sort(counts, descending=True, stable=True).indices[:COMMON_TARGETS]] = True
    return common & (counts > 0)


def _summaries(
    sums: Mapping[str, list[_Sums]],
    resamples: int,
    seed: int,
    metrics: Sequence[str] = METRICS,
    over: Mapping[str, int] = _PER,
) -> Iterator[tuple[str, str, Measure]]:
    """Turn per-document sums into values and bootstrap draws; all conditions share the resampled documents."""
    first = next(iter(sums.values()))[0]
    seen = first.counts[:, 0] > 0
    random = np.random.default_rng(seed)
    documents = int(seen.sum())
    draws = resamples if documents > 1 else 0
    weights = random.multinomial(documents, np.full(documents, 1 / documents), size=draws).astype(np.float64)
    for condition, run in sums.items():
        pick = random.integers(len(run), size=draws) if len(run) > 1 else np.zeros(draws, dtype=np.int64)
        for column, metric in enumerate(metrics):
            per = over.get(metric, 0)
            n = int(first.counts[:, per].sum())
            with np.errstate(invalid="ignore", divide="ignore"):
                ratios = [_ratio(part, column, per, weights, seen) for part in run]
                value = float(np.mean([ratio[0] for ratio in ratios]))
                drawn = np.stack([ratio[1] for ratio in ratios])[pick, np.arange(draws)]
            yield condition, metric, Measure(value, drawn, n)
            if metric == "loss":
                with np.errstate(over="ignore"):
                    perplexity = Measure(float(np.exp(value)), np.exp(drawn), n)
                yield condition, "perplexity", perplexity


def _ratio(part: _Sums, column: int, per: int, weights: np.ndarray, seen: np.ndarray) -> tuple[float, np.ndarray]:
    values, counts = part.values[seen, column], part.counts[seen, per]
    return float(values.sum() / counts.sum()), (weights @ values) / (weights @ counts)


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
                "bos": corpus.prepend_bos,
                "window": corpus.window,
                "fingerprint": corpus.fingerprint,
                "skipped": corpus.skipped,
            }
            for name, corpus in corpora.items()
        },
        "conditions": {name: repr(condition) for name, condition in conditions.items()},
        "bootstrap": {"resamples": resamples, "seed": seed},
    }
