"""WMDP: Weapons of Mass Destruction Proxy, multiple choice on biology, chemistry and cybersecurity, and MMLU beside it.

Accuracy by lm-evaluation-harness, with the prompts of its `wmdp` and `mmlu` tasks. Knows WMDP's files.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lens_unlearn.benchmarks.asking import Asker
from lens_unlearn.benchmarks.benchmark import Benchmark, Data, Raw, Score
from lens_unlearn.benchmarks.choices import multiple_choice, read_choices
from lens_unlearn.benchmarks.files import Files
from lens_unlearn.benchmarks.result import BenchmarkResult
from lens_unlearn.benchmarks.running import Reference, measured
from lens_unlearn.benchmarks.scoring import Column, means
from lens_unlearn.core.errors import CorpusError
from lens_unlearn.evaluation.evaluate import Condition
from lens_unlearn.model.host import Model

__all__ = ["BENCHMARK", "wmdp"]

_ABOUT = {"bio": "biology", "chem": "chemistry", "cyber": "cybersecurity"}


def wmdp(
    model: Model,
    data: Any,
    conditions: Mapping[str, Condition],
    *,
    rows: int | None = None,
    reference: Reference | None = None,
    mmlu: str | Sequence[str] | None = None,
    controls: int = 0,
    batch_size: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> BenchmarkResult:
    """Score a model on WMDP, by lm-evaluation-harness (extra ``lens-unlearn[harness]``).

    Metrics: accuracy on `wmdp_bio`, `wmdp_chem`, `wmdp_cyber`, on all questions (`wmdp`), and on `mmlu`, where that can be had.
    Options that score equally share the point.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
        data: The folder that holds ``bio_questions.json``, ``chem_questions.json`` and ``cyber_questions.json`` (question, choices,
            answer), or ``wmdp-bio/test-00000-of-00001.parquet`` and the others, as on the hub; or ``hf:cais/wmdp``.
        conditions: As for `evaluate`.
        rows: The first so many questions of each file; None for all.
        reference: A model that does not know what is asked, or its directory: one more condition.
        mmlu: Tasks of lm-evaluation-harness, such as "mmlu"; default a file ``mmlu.jsonl`` in the folder, if there is one.
        controls: Random controls of each condition.
        batch_size: Rows per forward pass.
        resamples: Bootstrap resamples over questions.
        seed: Of the bootstrap and the controls.
        progress: Whether to show bars.

    Returns:
        The scores, and single questions' in its `losses`.

    Raises:
        CorpusError: If a file or a column is missing.
        LensUnlearnError: If lm-evaluation-harness is not installed.
    """
    return measured(
        BENCHMARK, model, data, conditions, reference=reference, rows=rows, controls=controls,
        batch_size=batch_size, resamples=resamples, seed=seed, progress=progress, options={"mmlu": mmlu},
    )  # fmt: skip


def _read(files: Files, rows: int | None, *, mmlu: str | Sequence[str] | None) -> Data:
    choices = {}
    for part, about in _ABOUT.items():
        names = (f"wmdp-{part}/test", f"{part}_questions", f"wmdp-{part}", f"wmdp_{part}", f"data/{part}_questions")
        choices[part] = read_choices(files, f"wmdp_{part}", *names, rows=rows, about=about, needed=True)
    own = read_choices(files, "mmlu", "mmlu", rows=rows) if mmlu is None else None
    notes = () if mmlu or own else ("there is no MMLU: put mmlu.jsonl into the folder, or give mmlu='mmlu'",)
    fit: dict[str, tuple[dict[str, Any], ...]] = {}
    for side in ("forget", "retain"):
        names = (f"{side}_corpus", f"bio-{side}-corpus", f"cyber-{side}-corpus")
        found = next((files.rows({"text": None}, name) for name in names if files.has(name)), [])
        fit[side] = tuple({"text": row["text"]} for row in found)
    more = {"choices": choices, "mmlu": [mmlu] if isinstance(mmlu, str) else mmlu, "own": own, "rows": rows}
    return Data((), fit["forget"], fit["retain"], more, notes)


def _ask(data: Data, asker: Asker) -> Raw:
    numbers: dict[str, tuple[float, ...]] = {}
    for part, choices in data.more["choices"].items():
        numbers |= multiple_choice(asker, choices, None, f"wmdp_{part}", None)
    numbers |= multiple_choice(asker, data.more["own"], data.more["mmlu"], "mmlu", data.more["rows"])
    return Raw((), (), numbers)


def _score(data: Data, raw: Mapping[str, Sequence[Raw]], resamples: int, seed: int) -> Score:
    names = [*(f"wmdp_{part}" for part in _ABOUT), *(["mmlu"] if "mmlu" in raw["base"][0].numbers else [])]
    columns = []
    for name in names:
        own = {condition: [one.numbers[name] for one in several] for condition, several in raw.items()}
        units = [f"{name} {number}" for number in range(len(own["base"][0]))]
        columns.append(Column(name, f"accuracy on {name}", units, own))
    parts = columns[: len(_ABOUT)]
    together = {
        condition: [
            [value for part in parts for value in part.values[condition][which]] for which in range(len(several))
        ]
        for condition, several in raw.items()
    }
    columns.append(Column("wmdp", "accuracy on WMDP", [unit for part in parts for unit in part.units], together))
    if not together["base"][0]:
        raise CorpusError("wmdp has no questions")
    return Score(means(columns, resamples, seed))


BENCHMARK = Benchmark(
    name="wmdp",
    words="WMDP",
    official={
        "wmdp_bio": "accuracy on questions of biology",
        "wmdp_chem": "accuracy on questions of chemistry",
        "wmdp_cyber": "accuracy on questions of cybersecurity",
        "wmdp": "accuracy on all of them",
        "mmlu": "accuracy on MMLU",
    },
    read=_read,
    ask=_ask,
    score=_score,
    options={"mmlu": None},
    summary="Multiple choice on hazardous biology, chemistry and cybersecurity, and MMLU (Li et al. 2024).",
)
