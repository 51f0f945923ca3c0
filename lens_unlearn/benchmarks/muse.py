"""MUSE: Machine Unlearning Six-Way Evaluation (News, Books; Shi et al. 2024): verbatim and knowledge memorization, and leakage.

ROUGE-L F-measure without stemming, and Min-40 % membership beside a retrained model. Knows MUSE's files and formulas.

Metrics, in per cent as MUSE reports them: `verbmem_f`, mean ROUGE-L F-measure of what continues a forget text; `knowmem_f` and
`knowmem_r`, the same of answers to questions on the forget and the retain texts, behind MUSE's examples; and `privleak`,
(AUC - AUC_retrained) / AUC_retrained, where AUC is the probability that a held-out text scores lower by Min-40 % than a forget
text (`privleak_auc`, a fraction). 0 is ideal; near -100 the forget texts are still known.

Data: the folder of one corpus, such as ``data/news``: ``verbmem/forget.json`` (prompt, gt), ``knowmem/forget_qa.json`` and
``retain_qa.json`` (question, answer), each with its examples in ``..._qa_icl.json``, ``privleak/forget.json`` and ``holdout.json``
(texts); or ``hf:muse-bench/MUSE-News``. The reference is the model retrained without the forget texts; `privleak` needs it.
Intervals resample texts and questions.

Options:

- `retrained_auc`: AUC of the retrained model in place of a reference; MUSE's code has 0.4772 for News and 0.5393 for Books, of its
  own retrained Llama-2 7B.
- `verbmem_tokens`: The longest continuation.
- `knowmem_tokens`: The longest answer.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from lens_unlearn.benchmarks.asking import Asker
from lens_unlearn.benchmarks.benchmark import Benchmark, Data, Item, Raw, Score
from lens_unlearn.benchmarks.files import Files
from lens_unlearn.benchmarks.running import function_of
from lens_unlearn.benchmarks.scoring import Column, areas, combined, left_out, means, of_texts
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.core.numbers import COUNT
from lens_unlearn.evaluation.answer_matching import rouge_l
from lens_unlearn.evaluation.membership import Document
from lens_unlearn.evaluation.metrics import metric as metric_of
from lens_unlearn.evaluation.report import Measure

__all__ = ["muse"]

K = 0.4
STOPS = ("\n\n", "\nQuestion", "Question:")
"""Where an answer ends, one after the other, as in MUSE's code."""
_QUESTIONS = (("knowmem_f", "forget"), ("knowmem_r", "retain"))


def _read(
    files: Files,
    rows: int | None,
    *,
    retrained_auc: float | None = None,
    verbmem_tokens: int = 128,
    knowmem_tokens: int = 32,
) -> Data:
    COUNT.check(verbmem_tokens, "verbmem_tokens")
    COUNT.check(knowmem_tokens, "knowmem_tokens")
    if retrained_auc is not None and not 0 < retrained_auc <= 1:
        raise LensUnlearnError(f"muse: retrained_auc={retrained_auc} is no AUC to compare with: above 0, at most 1")
    items: list[Item] = []
    verbatim = files.rows({"prompt": None, "gt": None}, "verbmem/forget", hub=("verbmem", "forget"))[:rows]
    for number, row in enumerate(verbatim):
        items.append(
            Item(f"verbmem-{number}", "verbmem_f", "forget", row["prompt"], row["gt"], f"muse verbmem {number}")
        )
    pair: dict[str, str | None] = {"question": None, "answer": None}
    for task, split in _QUESTIONS:
        examples = files.rows(pair, f"knowmem/{split}_qa_icl", hub=("knowmem", f"{split}_qa_icl"))
        head = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in examples)
        asked = files.rows(pair, f"knowmem/{split}_qa", hub=("knowmem", f"{split}_qa"))[:rows]
        for number, row in enumerate(asked):
            prompt = f"{head}Question: {row['question']}\nAnswer: "
            items.append(Item(f"{task}-{number}", task, split, prompt, row["answer"], f"muse {task} {number}"))
    attack = {side: _texts(files, f"privleak/{side}", ("privleak", side))[:rows] for side in ("forget", "holdout")}
    fit = {}
    for side, names in (
        ("forget", ("raw/forget", "scal/forget_1")),
        ("retain", ("raw/retain1", "raw/retain", "privleak/retain")),
    ):
        found = files.maybe({"text": None}, *names, hub=("raw", "retain1" if side == "retain" else side))
        fit[side] = tuple({"text": row["text"]} for row in found)
    if not fit["forget"]:
        fit["forget"] = tuple({"text": text} for text in attack["forget"])
    more = {
        "attack": attack,
        "retrained_auc": retrained_auc,
        "verbmem_tokens": verbmem_tokens,
        "knowmem_tokens": knowmem_tokens,
    }
    return Data(tuple(items), fit["forget"], fit["retain"], more)


def _texts(files: Files, name: str, hub: tuple[str, str]) -> list[str]:
    """Read texts: a list of strings, as in MUSE's own files, or rows with a column `text`."""
    return [row["text"] for row in files.rows({"text": None}, name, hub=hub)]


def _ask(data: Data, asker: Asker) -> Raw:
    texts: list[str | None] = [None] * len(data.items)
    left_out: list[int] = []
    for tasks, tokens in ((("verbmem_f",), "verbmem_tokens"), (("knowmem_f", "knowmem_r"), "knowmem_tokens")):
        mine = [number for number, item in enumerate(data.items) if item.task in tasks]
        done = asker.write([data.items[number].prompt for number in mine], data.more[tokens])
        left_out += [mine[number] for number in done.left_out]
        for number, text in zip(mine, done.texts, strict=True):
            texts[number] = text if text is None or "verbmem_f" in tasks else _cut(text)
    numbers = {}
    of = metric_of("mia_min_k").of
    assert of is not None
    for side, given in data.more["attack"].items():
        said = asker.texts(given)
        numbers[f"{side}_min_k"] = tuple(
            float("nan") if one is None else float(of(Document(one["loss"], one["loss"], 1, K))) for one in said
        )
    return Raw(tuple(texts), tuple(sorted(left_out)), numbers)


def _cut(text: str) -> str:
    for stop in STOPS:
        text = text.split(stop)[0]
    return text


def _score(data: Data, raw: Mapping[str, Sequence[Raw]], resamples: int, seed: int) -> Score:
    missing = left_out(raw)
    columns = []
    for task in ("verbmem_f", "knowmem_f", "knowmem_r"):
        mine = [number for number, item in enumerate(data.items) if item.task == task]
        values = of_texts(data, raw, lambda item, text: 100 * rouge_l(text, item.reference, stem=False)[1], mine)
        units = [data.items[n].unit for n in mine]
        known = [n not in missing for n in mine]
        columns.append(Column(task, task, units, values, known, (0.0, 100.0)))
    found = means(columns, resamples, seed)
    area = _areas(raw, resamples, seed)
    retrained = data.more["retrained_auc"]
    notes = []
    for name in raw:
        if "reference" in raw:
            found[name, "privleak"] = combined(_leak, [area[name], area["reference"]])
        elif retrained is not None:
            found[name, "privleak"] = combined(lambda one: _leak([one[0], np.asarray(retrained)]), [area[name]])
        found[name, "privleak_auc"] = area[name]
    if "reference" not in raw and retrained is None:
        notes.append(
            "there is no privleak: it takes the model retrained without the forget texts as reference, or retrained_auc"
        )
    return Score(found, tuple(notes))


def _leak(both: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Return how far an area is from the retrained model's, in per cent of that; no number where that is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(100 * (both[0] - both[1]) / both[1])


def _areas(raw: Mapping[str, Sequence[Raw]], resamples: int, seed: int) -> dict[str, Measure]:
    """Return by condition the probability that a held-out text scores below a forget text."""
    sides: dict[str, dict[str, list[np.ndarray]]] = {}
    units: dict[str, list[str]] = {}
    for side in ("holdout", "forget"):
        table = {name: [np.array(one.numbers[f"{side}_min_k"]) for one in several] for name, several in raw.items()}
        known = np.isfinite(table["base"][0])
        units[side] = [f"muse {side} {number}" for number in np.flatnonzero(known).tolist()]
        sides[side] = {name: [one[known] for one in several] for name, several in table.items()}
    both = (units["holdout"], units["forget"])
    return areas(sides["holdout"], sides["forget"], both, resamples, seed)


BENCHMARK = Benchmark(
    name="muse",
    words="MUSE",
    official={
        "verbmem_f": "mean ROUGE-L F-measure of continuations of forget texts, in per cent",
        "knowmem_f": "mean ROUGE-L F-measure of answers on forget texts, in per cent",
        "knowmem_r": "mean ROUGE-L F-measure of answers on retain texts, in per cent",
        "privleak": "(AUC - AUC_retrained) / AUC_retrained of Min-40 %, in per cent",
    },
    read=_read,
    ask=_ask,
    score=_score,
    template="Question: {prompt}\nAnswer: {answer}",
    summary="News articles and books, verbatim and as knowledge, and privacy leakage (Shi et al. 2024).",
)
muse = function_of(BENCHMARK, __doc__)
