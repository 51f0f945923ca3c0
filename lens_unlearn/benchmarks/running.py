"""`measured`: a benchmark carried out on one model under every condition, its controls, and a reference model.

`function_of` makes of a record the function by which it is public: what all benchmarks take is said here once.

Knows conditions and models; knows no benchmark by name.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lens_unlearn.benchmarks.asking import Asker
from lens_unlearn.benchmarks.benchmark import Benchmark, Data, Raw
from lens_unlearn.benchmarks.result import BenchmarkResult
from lens_unlearn.core.errors import LensUnlearnError, ModelError
from lens_unlearn.core.numbers import COUNT, NOT_NEGATIVE, check_numbers
from lens_unlearn.evaluation.bootstrap import WEIGHTS
from lens_unlearn.evaluation.conditions import SUFFIX
from lens_unlearn.evaluation.evaluate import Condition, replicates
from lens_unlearn.evaluation.report import BASE, provenance_of
from lens_unlearn.methods.controls import controls_for
from lens_unlearn.model.hooks import one_thread
from lens_unlearn.model.host import Model, device_of, require_eval, require_model
from lens_unlearn.model.loading import fingerprint, load_model, model_name

__all__ = ["REFERENCE", "BenchmarkFunction", "Keep", "Reference", "check_reference", "function_of", "measured"]

REFERENCE = "reference"
"""The condition that is the model which never saw what is to be forgotten."""
Reference = Model | str | os.PathLike[str]
Keep = Callable[[str, Callable[[], Raw]], Raw]
"""Takes a name and how something is made, and returns it: made now, or kept before."""


class BenchmarkFunction(Protocol):
    """What every benchmark is: `lu.benchmarks.NAME`, which has its own options beside what all of them take."""

    benchmark: Benchmark
    """Everything that is known of it."""

    def __call__(
        self,
        model: Model,
        data: Any,
        conditions: Mapping[str, Condition],
        *,
        rows: int | None = None,
        reference: Reference | None = None,
        controls: int = 0,
        prepend_bos: bool | None = None,
        batch_size: int | None = None,
        resamples: int = 1000,
        seed: int = 0,
        progress: bool = True,
        **options: Any,
    ) -> BenchmarkResult:
        """Score a model on the benchmark.

        Args:
            model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
            data: The folder of the benchmark's files in their public layout, or ``hf:OWNER/NAME``.
            conditions: As for `evaluate`; "NAME:control" is the control of "NAME" where it is given.
            rows: The first so many rows of each group; None for all.
            reference: A model that never saw what is to be forgotten, or its directory: one more condition, and some scores are
                beside it.
            controls: Random controls of each condition, with different seeds; their mean is given.
            prepend_bos: Whether prompts begin with BOS; default as the tokenizer has it.
            batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
            resamples: Bootstrap resamples.
            seed: Of the bootstrap, the controls, and texts that are sampled.
            progress: Whether to show bars.
            options: Of the benchmark.

        Returns:
            The scores, and the texts and losses they are made of.

        Raises:
            CorpusError: If a file or a column is missing.
            LensUnlearnError: If there is no such option, or a condition is no intervention, or is called "base" or "reference".
            ModelError: If the model is in training mode, or the reference cannot be loaded.
        """
        ...


def function_of(benchmark: Benchmark, text: str | None) -> BenchmarkFunction:
    """Return the public function of a benchmark, with its options in the signature.

    Args:
        benchmark: Which.
        text: What `help` says before the arguments.
    """
    takes = inspect.signature(BenchmarkFunction.__call__)
    own = [one for one in takes.parameters.values() if one.name != "self"]
    common, rest = own[:-1], own[-1]

    def function(model: Model, data: Any, conditions: Mapping[str, Condition], **given: Any) -> BenchmarkResult:
        known = {one.name for one in common}
        options = {name: value for name, value in given.items() if name not in known}
        given = {name: value for name, value in given.items() if name in known}
        return measured(benchmark, model, data, conditions, options=options, **given)

    assert rest.kind is inspect.Parameter.VAR_KEYWORD
    function.__name__ = function.__qualname__ = benchmark.name.replace("-", "_")
    function.__doc__ = f"{inspect.cleandoc(text or '')}\n\n{inspect.cleandoc(BenchmarkFunction.__call__.__doc__ or '')}"
    function.__signature__ = takes.replace(parameters=[*common, *benchmark.keywords])  # type: ignore[attr-defined]
    function.benchmark = benchmark  # type: ignore[attr-defined]
    return function  # type: ignore[return-value]


def measured(
    benchmark: Benchmark,
    model: Model,
    source: Any,
    conditions: Mapping[str, Condition],
    *,
    reference: Reference | None = None,
    rows: int | None = None,
    controls: int = 0,
    prepend_bos: bool | None = None,
    batch_size: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
    keep: Keep | None = None,
    options: Mapping[str, Any] | None = None,
) -> BenchmarkResult:
    """Carry out a benchmark.

    Args:
        benchmark: Which.
        model: The model.
        source: The folder of its files, ``hf:OWNER/NAME``, or data that were read before.
        conditions: As for `evaluate`; "NAME:control" is the control of "NAME" where it is given.
        reference: A model that never saw what is to be forgotten, or its directory.
        rows: Only the first so many of each group; None for all.
        controls: Random controls of each condition, with different seeds; their mean is given.
        prepend_bos: Whether texts begin with BOS.
        batch_size: Rows of full length per forward pass.
        resamples: Bootstrap draws.
        seed: Of the bootstrap and the controls.
        progress: Whether to show bars.
        keep: Where what is finished is kept, so that a run can go on.
        options: Of the benchmark.

    Raises:
        CorpusError: If a file or a column is missing.
        LensUnlearnError: If a condition is no intervention, or is called "base" or "reference".
        ModelError: If the model is in training mode, or the reference cannot be loaded.
    """
    check_numbers(batch_size=batch_size, seed=seed)
    if rows is not None:
        COUNT.check(rows, "rows")
    COUNT.check(resamples, "resamples")
    NOT_NEGATIVE.check(controls, "controls")
    require_model(model)
    require_eval(model)
    if REFERENCE in conditions:
        raise LensUnlearnError(
            "the condition 'reference' is the model that never saw what is forgotten: give the intervention another name"
        )
    benchmark.check(options or {})
    data = source if isinstance(source, Data) else benchmark.data(source, rows, options or {})
    runs = _with_controls(model, conditions, controls, seed)
    asked = {name: [(model, one) for one in several] for name, several in runs.items()}
    never_saw = None
    if reference is not None:
        never_saw = _loaded(reference, model)
        asked[REFERENCE] = [(never_saw, None)]
    raw: dict[str, list[Raw]] = {}
    for name, several in asked.items():
        raw[name] = []
        for number, (whom, one) in enumerate(several):
            asker = Asker(whom, one, batch_size, prepend_bos, progress, name, seed)

            def make(asker: Asker = asker) -> Raw:
                with one_thread(asker.model):
                    return benchmark.ask(data, asker)

            raw[name].append(make() if keep is None else keep(f"{name}.{number}", make))
    score = benchmark.score(data, raw, resamples, seed)
    notes = [*data.notes, *_left_out(raw), *score.notes]
    settings: dict[str, Any] = {
        "benchmark": benchmark.name,
        "model": model_name(model),
        "fingerprint": fingerprint(model),
        "data": getattr(source, "source", None) or (None if isinstance(source, Data) else str(source)),
        "rows of each group": rows,
        "options": {name: value for name, value in {**benchmark.options, **(options or {})}.items()},
        "conditions": {name: repr(several if len(several) > 1 else several[0]) for name, several in runs.items()},
        "decoding": benchmark.decoding,
        "bootstrap": {"resamples": resamples, "seed": seed, "weights": WEIGHTS},
        "notes": notes,
    }
    if never_saw is not None:
        named = isinstance(reference, str | os.PathLike)
        settings["reference"] = str(reference) if named else model_name(never_saw)
        settings["reference fingerprint"] = fingerprint(never_saw)
    return BenchmarkResult(benchmark, score.measures, data, raw, tuple(notes), provenance_of(settings))


def check_reference(reference: str | None) -> None:
    """Refuse a reference model that is not there, before any model is loaded.

    Raises:
        ModelError: If it is written as a path, and there is no such directory.
    """
    if reference is None or reference == "demo" or os.path.exists(os.path.expanduser(reference)):
        return
    if os.path.isabs(reference) or reference.startswith((".", "~")) or reference.count("/") != 1:
        raise ModelError(f"there is no reference model {reference}: give a Hugging Face directory, or a hub name")


def _loaded(reference: Reference, model: Model) -> Model:
    if isinstance(reference, str | os.PathLike):
        check_reference(os.fspath(reference))
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        reference = load_model(os.fspath(reference), dtype=dtype, device=str(device_of(model)))
    require_model(reference)
    require_eval(reference)
    return reference


def _with_controls(model: Model, conditions: Mapping[str, Condition], controls: int, seed: int) -> dict[str, list[Any]]:
    """Return everybody's interventions, each with its control behind it."""
    given = replicates(conditions)
    runs: dict[str, list[Any]] = {BASE: given.pop(BASE)}
    for name, several in given.items():
        runs[name] = list(several)
        drawn = f"{name}{SUFFIX}"
        first = several[0] if len(several) == 1 and not name.endswith(SUFFIX) else None
        if controls and first is not None and drawn not in given:
            found = controls_for(model, first, range(seed, seed + controls))
            runs |= {drawn: found} if found else {}
    return runs


def _left_out(raw: Mapping[str, list[Raw]]) -> list[str]:
    longest = max((len(one.left_out) for several in raw.values() for one in several), default=0)
    return [f"left out: {longest:,} prompts that are longer than the model's context"] if longest else []
