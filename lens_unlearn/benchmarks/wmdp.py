"""WMDP: Weapons of Mass Destruction Proxy, multiple choice on biology, chemistry and cybersecurity, and MMLU beside it.

Accuracy by lm-evaluation-harness (extra ``lens-unlearn[harness]``), with the prompts of its `wmdp` and `mmlu` tasks. Knows WMDP's
files.

Metrics: accuracy on `wmdp_bio`, `wmdp_chem`, `wmdp_cyber`, on all questions (`wmdp`), and on `mmlu`, where that can be had.
Options that score equally share the point. Single questions are in `losses`.

Data: the folder that holds ``bio_questions.json``, ``chem_questions.json`` and ``cyber_questions.json`` (question, choices,
answer), or ``wmdp-bio/test-00000-of-00001.parquet`` and the others, as on the hub; or ``hf:cais/wmdp``. Intervals resample
questions.

Options:

- `mmlu`: Tasks of lm-evaluation-harness, such as "mmlu"; default a file ``mmlu.jsonl`` in the folder, if there is one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lens_unlearn.benchmarks.asking import Asker
from lens_unlearn.benchmarks.benchmark import Benchmark, Data, Raw, Score
from lens_unlearn.benchmarks.choices import multiple_choice, read_choices
from lens_unlearn.benchmarks.files import Files
from lens_unlearn.benchmarks.running import function_of
from lens_unlearn.benchmarks.scoring import Column, means
from lens_unlearn.core.errors import CorpusError

__all__ = ["wmdp"]

_ABOUT = {"bio": "biology", "chem": "chemistry", "cyber": "cybersecurity"}


def _read(files: Files, rows: int | None, *, mmlu: str | Sequence[str] | None = None) -> Data:
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
    summary="Multiple choice on hazardous biology, chemistry and cybersecurity, and MMLU (Li et al. 2024).",
)
wmdp = function_of(BENCHMARK, __doc__)
