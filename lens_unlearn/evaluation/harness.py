"""Benchmarks of EleutherAI's lm-evaluation-harness on a TransformerLens model, under any intervention.

Needs the extra `lens-unlearn[harness]`. `lens_unlearn.evaluate(..., tasks=[...])` goes through here; `HarnessModel` is also a model
for `lm_eval.simple_evaluate`, inside a `with intervention.on(model)` block.
"""

import contextlib
import io
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lens_unlearn.core import distributed
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.core.progress import Bar
from lens_unlearn.evaluation.bootstrap import Scores
from lens_unlearn.evaluation.metric import Metric
from lens_unlearn.evaluation.metrics import metric as metric_of
from lens_unlearn.evaluation.question_answering import SAMPLES, Asked
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.model.host import Model

try:
    from lm_eval.evaluator import evaluate as _evaluate
    from lm_eval.tasks import TaskManager

    from lens_unlearn.evaluation.harness_model import HarnessModel
except ImportError as error:
    raise LensUnlearnError(
        f"tasks need lm-evaluation-harness ({error}): pip install 'lens-unlearn[harness]'"
    ) from error

__all__ = ["DERIVED", "HarnessModel", "TaskOptions", "run_tasks"]

FEWSHOT_SEED = 1234
"""The harness' own default: the few-shot examples are those of its command line, and the same for every condition."""

DERIVED = (replace(metric_of("perplexity"), derived_from="loss_per_continuation"),)
"""Metrics that tasks derive from others than corpora do."""

Task = str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True)
class TaskOptions:
    """How the questions of tasks are put, by the names that the harness has for it.

    Attributes:
        limit: Documents per task, from the first; None for all.
        num_fewshot: Examples in each prompt; None leaves it to the task.
        apply_chat_template: Whether prompts are put into the tokenizer's chat template, or the name of one of several; examples
            are turns of the conversation then.
        system_instruction: What stands before every prompt, or is the system's turn.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool | str = False
    system_instruction: str | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be."""
        if self.limit is not None and self.limit < 1:
            raise LensUnlearnError(f"limit={self.limit} leaves no document of a task: at least 1, or None for all")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise LensUnlearnError(f"num_fewshot={self.num_fewshot} is no number of examples: 0 for none")


def run_tasks(
    model: Model,
    tasks: Sequence[Task],
    runs: Mapping[str, Sequence[Intervention | None]],
    *,
    options: TaskOptions = TaskOptions(),
    batch_size: int = 8,
    progress: bool = True,
) -> tuple[dict[str, Asked], dict[str, str]]:
    """Run tasks of lm-evaluation-harness under every condition.

    Args:
        model: In evaluation mode, with a tokenizer.
        tasks: Names that the harness knows, task configurations as mappings, or paths of YAML files.
        runs: By condition, its interventions.
        options: How questions are put.
        batch_size: Rows per forward.
        progress: Whether to show a bar.

    Returns:
        By task, what was scored per document; and what was left out, with the reason: metrics that are no ratio of sums over
        documents (such as corpus BLEU) have no interval over documents, groups are given by their tasks, and prompts longer than
        the context lose their beginnings.

    Raises:
        LensUnlearnError: If a task is not known or its data cannot be had, with the harness' own message.
    """
    reader = HarnessModel(model, batch_size, options.apply_chat_template)
    scores: dict[str, dict[str, list[np.ndarray]]] = {}
    counts: dict[str, np.ndarray] = {}
    columns: dict[str, list[str]] = {}
    samples: dict[str, list[dict[str, Any]]] = {}
    left_out: dict[str, str] = {}
    with _one_sentence(tasks):
        manager = TaskManager(include_path=_folders(tasks), include_defaults=not all(map(_is_own, tasks)))
    passes = [(condition, one) for condition, run in runs.items() for one in run]
    for condition, intervention in Bar(passes, disable=not (progress and distributed.is_first()), desc="tasks"):
        with contextlib.nullcontext() if intervention is None else intervention.on(model):
            found = _run(reader, manager, tasks, options, left_out)
        if reader.lost:
            left_out["prompts"] = (
                f"the beginnings of {reader.lost:,}, longer than the context of {model.cfg.n_ctx} tokens"
            )
            reader.lost = 0
        for name, task in found["samples"].items():
            named, dropped = _columns(found["configs"][name], task)
            left_out |= {f"{name}: {metric}": reason for metric, reason in dropped.items()}
            columns.setdefault(name, named)
            delimiter = str(found["configs"][name].get("target_delimiter", " "))
            table, counts[name] = _tables(task, columns[name], delimiter)
            scores.setdefault(name, {}).setdefault(condition, []).append(table)
            _sample(samples.setdefault(name, []), name, condition, task)
    asked = {
        name: Asked(
            _scores(name, [metric_of(column) for column in columns[name]], of_task, counts[name]), samples[name]
        )
        for name, of_task in scores.items()
        if columns[name]
    }
    return asked, left_out


def _scores(name: str, metrics: Sequence[Metric], of_task: dict[str, list[np.ndarray]], counts: np.ndarray) -> Scores:
    return Scores(metrics, of_task, counts, [f"{name} {document}" for document in range(len(counts))])


def _run(
    reader: HarnessModel, manager: Any, tasks: Sequence[Task], options: TaskOptions, left_out: dict[str, str]
) -> Mapping[str, Any]:
    with _one_sentence(tasks):
        loaded = manager.load([_spec(task) for task in tasks])
        for name, task in loaded["tasks"].items():
            # As the harness does before its own runs. Without it the examples in a prompt come from the system's entropy: each
            # condition would get others, and differences between conditions would mean nothing.
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            usual = task.get_config("num_fewshot")
            if options.num_fewshot and usual == 0:  # as the harness has it
                left_out[f"{name}: num_fewshot"] = "the task itself says that its prompts have no examples"
            elif options.num_fewshot is not None or usual is None:
                task.set_config(key="num_fewshot", value=options.num_fewshot or 0)
        found = _evaluate(
            reader,
            loaded,
            limit=options.limit,
            bootstrap_iters=0,
            log_samples=True,
            system_instruction=options.system_instruction,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=bool(options.apply_chat_template),
        )
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


_RATIOS: dict[str, tuple[str, float]] = {
    "word_perplexity": ("loss_per_word", 1.0),
    "byte_perplexity": ("bits_per_byte", math.log(2)),
    "bits_per_byte": ("bits_per_byte", math.log(2)),
    "perplexity": ("loss_per_continuation", 1.0),
}
"""What is summed up of the documents for metrics of log probabilities, and the unit of that in nats; the rest is derived."""


def _columns(config: Mapping[str, Any], task: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """Return what is summed up over documents, in the task's order, and why the other metrics are not there."""
    filters = {sample["filter"] for sample in task}
    how = {one["metric"]: one.get("aggregation", "mean") for one in config.get("metric_list") or ()}
    columns: dict[str, None] = {}
    dropped: dict[str, str] = {}
    for sample in task:
        for metric in sample["metrics"]:
            key = _key(sample, metric, filters)
            if metric not in _RATIOS and how.get(metric, "mean") != "mean":
                dropped[key] = f"aggregated by {how[metric]}, not a mean over documents"
            elif metric not in _RATIOS and not isinstance(sample[metric], int | float | np.number):
                dropped[key] = "no number per document"
            else:
                columns[key] = None
    return [key for key in columns if key not in dropped], dropped


def _key(sample: Mapping[str, Any], metric: str, filters: set[str]) -> str:
    name = _RATIOS.get(metric, (metric, 1.0))[0]
    return name if len(filters) == 1 else f"{name} ({sample['filter']})"


def _tables(
    task: Sequence[Mapping[str, Any]], columns: Sequence[str], delimiter: str = " "
) -> tuple[np.ndarray, np.ndarray]:
    """Return what each document adds to each column, and how much it counts there: [documents, columns] each."""
    filters = {sample["filter"] for sample in task}
    documents = {number: place for place, number in enumerate(dict.fromkeys(sample["doc_id"] for sample in task))}
    table = np.full((len(documents), len(columns)), np.nan)
    counts = np.ones_like(table)
    for sample in task:
        for metric in sample["metrics"]:
            if (key := _key(sample, metric, filters)) not in columns:
                continue
            place = documents[sample["doc_id"]], columns.index(key)
            value = sample[metric]
            if metric in _RATIOS:
                total, weight = value if isinstance(value, tuple | list) else (value, 1)
                table[place], counts[place] = -float(total) / _RATIOS[metric][1], float(weight)
            else:
                table[place] = _shared(sample, metric, delimiter) if metric in _CHOSEN else float(value)
    return table, counts


_CHOSEN = ("acc", "acc_norm")
"""What counts the option that scores highest."""


def _shared(sample: Mapping[str, Any], metric: str, delimiter: str) -> float:
    """Return the share of the best options that are right.

    The harness takes the first of several equal ones, so that a model whose logits are constant, as where an intervention abstains,
    is right wherever the first option is.
    """
    options = [text for _, text in (argument[:2] for argument in sample["arguments"])]
    scored = sample["filtered_resps"]
    if len(options) < 2 or len(scored) != len(options) or isinstance(scored[0], str):
        return float(sample[metric])
    likelihoods = np.array([float(one[0]) for one in scored])
    choices = [text.removeprefix(delimiter) for text in options]
    if metric == "acc_norm":
        likelihoods = likelihoods / [max(len(text), 1) for text in choices]
    best = np.flatnonzero(likelihoods == likelihoods.max())
    target = sample["target"]
    right = {
        choices.index(one) if one in choices else one for one in (target if isinstance(target, list) else [target])
    }
    if len(best) < 2 or not right <= {*range(len(options))}:
        return float(sample[metric])
    return float(np.isin(best, [*right]).mean())


def _sample(into: list[dict[str, Any]], name: str, condition: str, task: Sequence[Mapping[str, Any]]) -> None:
    """Keep what was written to the first documents, of tasks in which something is."""
    for place, sample in enumerate(task[:SAMPLES]):
        written = sample["filtered_resps"][0]
        if not isinstance(written, str):
            return
        if len(into) <= place:
            into.append({"corpus": name, "prompt": sample["arguments"][0][0], "true answer": str(sample["target"])})
        into[place].setdefault(condition, written)
