"""Benchmarks of EleutherAI's lm-evaluation-harness on a TransformerLens model, under any intervention.

Needs the extra `lens-unlearn[harness]`. `lens_unlearn.evaluate(..., tasks=[...])` goes through here; `HarnessModel` is also a model
for `lm_eval.simple_evaluate`, inside a `with intervention.on(model)` block.
"""

import contextlib
import io
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from lens_unlearn.core import distributed
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.corpora.corpus import Batch
from lens_unlearn.evaluation.bootstrap import Scores
from lens_unlearn.evaluation.generation import continue_rows
from lens_unlearn.evaluation.metric import Metric
from lens_unlearn.evaluation.metrics import metric as metric_of
from lens_unlearn.evaluation.question_answering import SAMPLES, Asked, line_breaks
from lens_unlearn.evaluation.teacher_forcing import outcomes, predict, split_rows
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.model.host import Model, require_eval, require_model
from lens_unlearn.model.special_tokens import bos_token, encode

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import evaluate as _evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise LensUnlearnError(
        f"tasks need lm-evaluation-harness ({error}): pip install 'lens-unlearn[harness]'"
    ) from error

__all__ = ["HarnessModel", "run_tasks"]

FEWSHOT_SEED = 1234
"""The harness' own default: the few-shot examples are those of its command line, and the same for every condition."""

Task = str | os.PathLike[str] | Mapping[str, Any]


class HarnessModel(TemplateLM):
    """A `TransformerBridge` or `HookedTransformer` as lm-evaluation-harness takes models.

    A text begins with BOS as the model was trained, as everywhere in lens_unlearn. A continuation that an intervention withholds
    has constant logits: every token has probability 1 / vocabulary, and none is the most probable one. Where it generates, the
    refusal is what was written.

    Args:
        model: With a tokenizer, in evaluation mode.
        batch_size: Rows per forward.

    Raises:
        CorpusError: If the model has no tokenizer; in use, if a continuation is longer than the context.
        ModelError: If the model is in training mode.
    """

    def __init__(self, model: Model, batch_size: int = 8) -> None:
        super().__init__()
        require_model(model)
        require_eval(model)
        if getattr(model, "tokenizer", None) is None:
            raise CorpusError("this model has no tokenizer: tasks are texts")
        if batch_size < 1:
            raise LensUnlearnError(f"batch_size={batch_size} is too small: at least 1")
        self.model, self.tokenizer, self.batch_size = model, model.tokenizer, batch_size
        self._breaks: list[int] | None = None

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return token ids, with BOS before them, once, where `read_corpus` has it."""
        bos = None if add_special_tokens is False else bos_token(self.model)
        return encode(self.tokenizer, string, bos)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return of each continuation its log probability in nats, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log probability of whole texts, in windows of the context's length."""
        pieces: list[tuple[tuple[str, str], list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], False),
                prefix_token=self.prefix_token_id,
                max_seq_len=int(self.model.cfg.n_ctx),
                context_len=1,
            )
            for window in windows:
                pieces.append((("", ""), *make_disjoint_window(window)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(pieces), strict=True):
            sums[owner] += value
        return sums

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        context = int(self.model.cfg.n_ctx)
        for _text, _given, continuation in requests:
            if not 0 < len(continuation) <= context:
                raise CorpusError(f"a continuation of {len(continuation)} tokens does not fit a context of {context}")
        rows = [(given + continuation)[-(context + 1) :] for _text, given, continuation in requests]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            found |= zip(part, self._score([rows[i] for i in part], [len(requests[i][2]) for i in part]), strict=True)
        return [found[i] for i in range(len(rows))]

    def _score(self, rows: Sequence[Sequence[int]], counts: Sequence[int]) -> Iterator[tuple[float, bool]]:
        """Score the last tokens of rows, so many of each."""
        tokens = [torch.tensor(row) for row in rows]
        masks = [torch.arange(len(row)) >= len(row) - count for row, count in zip(rows, counts, strict=True)]
        batch = Batch.of(tokens, masks, range(len(rows)))
        with torch.no_grad():
            predicted = predict(self.model, batch, last=False)
        quantities = ("loss", "right")
        for row in split_rows(predicted, outcomes(predicted, quantities), quantities):
            yield -float(row["loss"].sum()), bool(row["right"].all())

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return what is written after each context, up to the first of its stop texts."""
        groups: dict[tuple[tuple[str, ...], int, float], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[_generation(request.args[1])].append(number)
        answers: dict[int, str] = {}
        context = int(self.model.cfg.n_ctx)
        for (until, longest, temperature), numbers in groups.items():
            room = max(1, context - longest)
            rows = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            options: dict[str, Any] = {"max_new_tokens": longest, "temperature": temperature}
            stop = self._line_breaks() if "\n" in until else []
            written = continue_rows(self.model, rows, batch_size=self.batch_size, stop=stop, **options)
            for number, one in zip(numbers, written, strict=True):
                answers[number] = one.text if one.abstained else _cut(one.text, until)
        return [answers[number] for number in range(len(requests))]

    def _line_breaks(self) -> list[int]:
        if self._breaks is None:
            self._breaks = line_breaks(self.model)
        return self._breaks


def _generation(settings: Mapping[str, Any]) -> tuple[tuple[str, ...], int, float]:
    """Read a task's generation settings: stop texts, most tokens, temperature."""
    given = dict(settings)
    until = given.pop("until", None) or ()
    longest = given.pop("max_gen_toks", None) or given.pop("max_new_tokens", None) or 256
    drawn = given.pop("do_sample", None)
    temperature = float(given.pop("temperature", None) or 0.0)
    if drawn is not None:
        temperature = (temperature or 1.0) if drawn else 0.0
    odd = [key for key, value in given.items() if value not in (None, 1, 1.0, False)]
    if odd:
        raise LensUnlearnError(
            f"a task wants text generated with {', '.join(sorted(odd))}, which is not here: leave it out"
        )
    return (until,) if isinstance(until, str) else tuple(until), int(longest), temperature


def _cut(text: str, until: Sequence[str]) -> str:
    return min((text.split(stop, 1)[0] for stop in until if stop), key=len, default=text)


def run_tasks(
    model: Model,
    tasks: Sequence[Task],
    runs: Mapping[str, Sequence[Intervention | None]],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> tuple[dict[str, Asked], dict[str, str]]:
    """Run tasks of lm-evaluation-harness under every condition.

    Args:
        model: In evaluation mode, with a tokenizer.
        tasks: Names that the harness knows, task configurations as mappings, or paths of YAML files.
        runs: By condition, its interventions.
        limit: Documents per task, from the first; None for all.
        batch_size: Rows per forward.
        progress: Whether to show a bar.

    Returns:
        By task, what was scored per document; and what was left out, with the reason: metrics that are no mean over documents
        (such as corpus BLEU) have no interval over documents, and groups are given by their tasks.

    Raises:
        LensUnlearnError: If a task is not known or its data cannot be had, with the harness' own message.
    """
    if limit is not None and limit < 1:
        raise LensUnlearnError(f"limit={limit} leaves no document of a task: at least 1, or None for all")
    reader = HarnessModel(model, batch_size)
    scores: dict[str, dict[str, list[np.ndarray]]] = {}
    columns: dict[str, list[str]] = {}
    samples: dict[str, list[dict[str, Any]]] = {}
    left_out: dict[str, str] = {}
    with _one_sentence(tasks):
        manager = TaskManager(include_path=_folders(tasks), include_defaults=not all(map(_is_own, tasks)))
    passes = [(condition, one) for condition, run in runs.items() for one in run]
    for condition, intervention in tqdm(passes, disable=not (progress and distributed.is_first()), desc="tasks"):
        with contextlib.nullcontext() if intervention is None else intervention.on(model):
            found = _run(reader, manager, tasks, limit)
        for name, task in found["samples"].items():
            means, dropped = _means(found["configs"][name], task)
            left_out |= {f"{name}: {metric}": reason for metric, reason in dropped.items()}
            columns.setdefault(name, means)
            table = _table(task, columns[name])
            scores.setdefault(name, {}).setdefault(condition, []).append(table)
            _sample(samples.setdefault(name, []), name, condition, task)
    asked = {
        name: Asked(_scores(name, [metric_of(column) for column in columns[name]], of_task), samples[name])
        for name, of_task in scores.items()
        if columns[name]
    }
    return asked, left_out


def _scores(name: str, metrics: Sequence[Metric], of_task: dict[str, list[np.ndarray]]) -> Scores:
    ones = np.ones_like(next(iter(of_task.values()))[0])
    return Scores(metrics, of_task, ones, [f"{name} {document}" for document in range(len(ones))])


def _run(reader: HarnessModel, manager: Any, tasks: Sequence[Task], limit: int | None) -> Mapping[str, Any]:
    with _one_sentence(tasks):
        loaded = manager.load([_spec(task) for task in tasks])
        for task in loaded["tasks"].values():
            # As the harness does before its own runs. Without it the examples in a prompt come from the system's entropy: each
            # condition would get others, and differences between conditions would mean nothing.
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        found = _evaluate(reader, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    assert found is not None  # None is for the other processes of the harness' own sharing, which is not used
    return found


@contextlib.contextmanager
def _one_sentence(tasks: Sequence[Task]) -> Iterator[None]:
    """Turn whatever the harness raises into one sentence, without the bars that it shows for every step."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), _own_random_state():
            yield
    except LensUnlearnError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        message = lines[0] if lines else type(error).__name__
        raise LensUnlearnError(f"the tasks {', '.join(map(_name, tasks))} cannot be run: {message}") from error


@contextlib.contextmanager
def _own_random_state() -> Iterator[None]:
    """Let the harness draw from the seeds it begins with itself (0 and 1234), and put the caller's states back."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.setstate(random.Random(0).getstate())
    np.random.set_state(np.random.RandomState(1234).get_state())  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1234)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _folders(tasks: Sequence[Task]) -> list[str | Path] | None:
    return [*{Path(_name(task)).absolute().parent for task in tasks if _is_file(task)}] or None


def _is_own(task: Task) -> bool:
    """Say whether a task is given as a whole, so that those which come with the harness (thousands of files) need not be read."""
    return isinstance(task, Mapping) or _is_file(task)


def _is_file(task: Task) -> bool:
    return not isinstance(task, Mapping) and os.fspath(task).endswith((".yaml", ".yml"))


def _spec(task: Task) -> Any:
    if isinstance(task, Mapping):
        return dict(task)
    if not _is_file(task):
        return os.fspath(task)
    from lm_eval.tasks._yaml_loader import load_yaml

    if not os.path.isfile(task):
        raise LensUnlearnError(f"there is no task file {os.fspath(task)}")
    configuration = load_yaml(os.fspath(task))
    return str(configuration.get("task") or configuration.get("group"))


def _name(task: Task) -> str:
    return str(task.get("task", "of a mapping")) if isinstance(task, Mapping) else os.fspath(task)


def _key(sample: Mapping[str, Any], metric: str, filters: set[str]) -> str:
    return metric if len(filters) == 1 else f"{metric} ({sample['filter']})"


def _means(config: Mapping[str, Any], task: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """Return the metrics that are means over documents, in the task's order, and why the others are not there."""
    filters = {sample["filter"] for sample in task}
    how = {one["metric"]: one.get("aggregation", "mean") for one in config.get("metric_list") or ()}
    means: dict[str, None] = {}
    dropped: dict[str, str] = {}
    for sample in task:
        for metric in sample["metrics"]:
            key = _key(sample, metric, filters)
            if how.get(metric, "mean") != "mean":
                dropped[key] = f"aggregated by {how[metric]}, not a mean over documents"
            elif not isinstance(sample[metric], int | float | np.number):
                dropped[key] = "no number per document"
            else:
                means[key] = None
    return [key for key in means if key not in dropped], dropped


def _table(task: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> np.ndarray:
    filters = {sample["filter"] for sample in task}
    documents = {number: place for place, number in enumerate(dict.fromkeys(sample["doc_id"] for sample in task))}
    table = np.full((len(documents), len(columns)), np.nan)
    for sample in task:
        for metric in sample["metrics"]:
            if (key := _key(sample, metric, filters)) in columns:
                table[documents[sample["doc_id"]], columns.index(key)] = float(sample[metric])
    return table


def _sample(into: list[dict[str, Any]], name: str, condition: str, task: Sequence[Mapping[str, Any]]) -> None:
    """Keep what was written to the first documents, of tasks in which something is."""
    for place, sample in enumerate(task[:SAMPLES]):
        written = sample["filtered_resps"][0]
        if not isinstance(written, str):
            return
        if len(into) <= place:
            into.append({"corpus": name, "prompt": sample["arguments"][0][0], "true answer": str(sample["target"])})
        into[place].setdefault(condition, written)
