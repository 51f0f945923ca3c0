"""TOFU: a Task of Fictitious Unlearning (Maini et al. 2024): forget quality, model utility, and what they are made of.

Truth ratios, probabilities and ROUGE as TOFU's own code has them, with the end-of-text token behind every answer counted; beside
them the same without it, the paraphrased questions, and the aggregates of OpenUnlearning. Knows TOFU's files and formulas.

Metrics: `forget_quality`, the p-value of the two-sample Kolmogorov-Smirnov test of the forget set's truth ratios against those
of the reference, and `model_utility`, the harmonic mean of nine: `probability`, `rouge_l` (recall) and `truth_ratio` on
retained facts, real authors and world facts; each with the name of its set before it, and the same of the forget set. Where a
metric ends in ``_without_eos``, the end-of-text token behind answers does not count, as in code that leaves it out.

Data: the folder that holds ``forget10_perturbed.jsonl``, ``retain_perturbed.jsonl``, ``real_authors_perturbed.jsonl`` and
``world_facts_perturbed.jsonl`` (question, answer, perturbed_answer, and paraphrased_answer, paraphrased_question of the first two);
or ``hf:locuslab/TOFU``. The reference is a model that was trained without the forget set. Intervals resample authors of the forget
and the retain set, and questions of the others.

Options:

- `split`: "forget01", "forget05" or "forget10"; default the largest that the folder has.
- `template`: How the model was asked in training; "{prompt}" and "{answer}" stand for question and answer.
- `answer_eos`: Whether the end-of-text token behind an answer counts, as in TOFU's code.
- `max_new_tokens`: The longest answer; 200 in TOFU's code.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lens_unlearn.benchmarks.asking import Asker, mean_loss
from lens_unlearn.benchmarks.benchmark import Benchmark, Data, Item, Raw, Score
from lens_unlearn.benchmarks.files import Files
from lens_unlearn.benchmarks.running import function_of
from lens_unlearn.benchmarks.scoring import Column, combined, harmonic, left_out, means, of_texts, plain
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.core.numbers import COUNT
from lens_unlearn.evaluation.answer_matching import rouge_l
from lens_unlearn.evaluation.memorization import choice_probability, extraction_strength, truth_ratio, truth_share
from lens_unlearn.evaluation.report import Measure
from lens_unlearn.evaluation.tofu import forget_quality

__all__ = ["tofu"]

SPLITS = ("forget01", "forget05", "forget10")
_FILES = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
_OPEN = ("real_authors", "world_facts")
"""Where the probability is beside the wrong options."""
_AUTHOR = 20  # questions on each author, in TOFU's own order
TEMPLATE = "Question: {prompt}\nAnswer: {answer}"
"""As TOFU's code asks models without chat marks of their own (`phi`)."""


def _read(
    files: Files,
    rows: int | None,
    *,
    split: str | None = None,
    template: str = TEMPLATE,
    answer_eos: bool = True,
    max_new_tokens: int = 200,
) -> Data:
    COUNT.check(max_new_tokens, "max_new_tokens")
    template = str(template).replace("\\n", "\n")
    if template.count("{prompt}") != 1 or not template.endswith("{answer}"):
        raise LensUnlearnError(
            f"tofu: the template {template!r} does not hold {{prompt}} once, and end with {{answer}}"
        )
    if split is None:
        split = (
            SPLITS[-1]
            if files.on_hub
            else next((one for one in SPLITS[::-1] if files.has(f"{one}_perturbed")), SPLITS[-1])
        )
    elif split not in SPLITS:
        raise LensUnlearnError(f"tofu: there is no split {split!r}: choose from {', '.join(SPLITS)}")
    sets: dict[str, list[dict[str, Any]]] = {}
    items: list[Item] = []
    for name, file in {"forget": f"{split}_perturbed", **_FILES}.items():
        columns: dict[str, str | None] = {"question": None, "answer": None, "perturbed_answer": None}
        columns |= {"paraphrased_answer": "", "paraphrased_question": ""}
        if name in ("forget", "retain"):
            columns |= {"paraphrased_answer": None, "paraphrased_question": None}
        read = files.rows(columns, file, hub=(file, "train"))[:rows]
        for number, row in enumerate(read, 1):
            wrong = row["perturbed_answer"]
            if (
                not isinstance(wrong, list | tuple)
                or not wrong
                or not all(isinstance(one, str) and one.strip() for one in wrong)
            ):
                raise CorpusError(
                    f"tofu: row {number:,} of {file} has no wrong answers: perturbed_answer is a list of texts"
                )
        sets[name] = read
        head = template[: -len("{answer}")]
        for number, row in enumerate(read):
            unit = f"tofu {file} {number // _AUTHOR if name in ('forget', 'retain') else number}"
            prompt = head.replace("{prompt}", row["question"]).rstrip(" ")
            items.append(Item(f"{name}-{number}", name, _side(name), prompt, row["answer"], unit))
            if name == "forget":
                other = head.replace("{prompt}", row["paraphrased_question"]).rstrip(" ")
                items.append(
                    Item(f"{name}-{number}-paraphrased", "forget_paraphrased", "forget", other, row["answer"], unit)
                )
    fit: dict[str, tuple[dict[str, Any], ...]] = {"forget": (), "retain": ()}
    for side, file in (("forget", split), ("retain", f"retain{100 - int(split[-2:])}")):
        read = files.maybe({"question": None, "answer": None}, file, hub=(file, "train"))
        fit[side] = tuple({"question": row["question"], "answer": row["answer"]} for row in read)
    if not fit["forget"]:
        fit["forget"] = tuple({"question": row["question"], "answer": row["answer"]} for row in sets["forget"])
    more = {
        "sets": sets,
        "template": template,
        "answer_eos": bool(answer_eos),
        "max_new_tokens": max_new_tokens,
        "split": split,
    }
    return Data(tuple(items), fit["forget"], fit["retain"], more)


def _side(name: str) -> str:
    return name if name in ("forget", "retain") else "retain"


def _ask(data: Data, asker: Asker) -> Raw:
    end = data.more["answer_eos"]
    if end and not asker.has_end:
        raise CorpusError(
            "tofu counts the end-of-text token behind answers, and this tokenizer has none: give answer_eos=False"
        )
    written = asker.write([item.prompt for item in data.items], data.more["max_new_tokens"])
    numbers: dict[str, tuple[float, ...]] = {}
    for name, rows in data.more["sets"].items():
        wanted = [(row["question"], answer) for row in rows for answer in _answers(row)]
        wanted += [(row["paraphrased_question"], row["answer"]) for row in rows if row["paraphrased_question"]]
        said = asker.answers(wanted, template=data.more["template"], end=end)
        at = iter(said)
        truths, others = [], []
        for row in rows:
            truth, *rest = (next(at) for _ in _answers(row))
            truths.append(truth)
            others.append(rest)
        asked = [next(at) if row["paraphrased_question"] else None for row in rows]
        for suffix, without in (("", False), ("_without_eos", True)) if end else (("", False),):
            numbers[f"{name}_loss{suffix}"] = tuple(mean_loss(one, without_end=without) for one in truths)
            numbers[f"{name}_paraphrase_loss{suffix}"] = tuple(mean_loss(one[0], without_end=without) for one in others)
            numbers[f"{name}_wrong_loss{suffix}"] = tuple(
                mean_loss(one, without_end=without) for several in others for one in several[1:]
            )
            numbers[f"{name}_paraphrased_question_loss{suffix}"] = tuple(
                mean_loss(one, without_end=without) for one in asked
            )
        if name == "forget":
            right = [None if one is None else one["right"][: -1 if end else None] for one in truths]
            numbers["forget_exact_memorization"] = tuple(
                float("nan") if one is None else float(one.mean()) for one in right
            )
            numbers["forget_extraction_strength"] = tuple(
                float("nan") if one is None else extraction_strength(one) for one in right
            )
    return Raw(written.texts, written.left_out, numbers)


def _answers(row: Mapping[str, Any]) -> list[str]:
    """Return the true answer, in other words (or as it is), and the wrong ones."""
    return [row["answer"], row["paraphrased_answer"] or row["answer"], *row["perturbed_answer"]]


def _wrong(rows: Sequence[Mapping[str, Any]], losses: Sequence[float]) -> list[list[float]]:
    at = iter(losses)
    return [[next(at) for _ in row["perturbed_answer"]] for row in rows]


def _score(data: Data, raw: Mapping[str, Sequence[Raw]], resamples: int, seed: int) -> Score:
    sets = data.more["sets"]
    suffixes = ("", "_without_eos") if data.more["answer_eos"] else ("",)
    columns: list[Column] = []
    ratios: dict[str, dict[str, list[np.ndarray]]] = {}
    for name, rows in sets.items():
        units = [item.unit for item in data.items if item.task == name]
        for suffix in suffixes:
            made: dict[str, dict[str, list[list[float]]]] = {}
            for condition, several in raw.items():
                for one in several:
                    for metric, values in _of_questions(name, rows, one, suffix).items():
                        made.setdefault(metric, {}).setdefault(condition, []).append(values)
            ratios[f"{name}{suffix}"] = {
                condition: [np.array(one) for one in parts] for condition, parts in made.pop("ratio").items()
            }
            known = _known(made, len(rows))
            columns += [
                Column(f"{name}_{metric}{suffix}", f"{name} {metric}{suffix}".replace("_", " "), units, values, known)
                for metric, values in made.items()
            ]
    columns += _written(data, raw)
    parts = means(columns, resamples, seed)
    found: dict[tuple[str, str], Measure] = {}
    notes = []
    for condition in raw:
        for suffix in suffixes:
            if "reference" in raw and condition != "reference":
                quality = _quality(ratios[f"forget{suffix}"], condition)
                n = len(sets["forget"])
                found[condition, f"forget_quality{suffix}"] = plain(quality[0], n)
                found[condition, f"forget_ks{suffix}"] = plain(quality[1], n)
            nine = [parts[condition, f"{name}_probability{suffix}"] for name in _FILES]
            nine += [parts[condition, f"{name}_rouge_l"] for name in _FILES]
            nine += [parts[condition, f"{name}_truth_ratio{suffix}"] for name in _FILES]
            found[condition, f"model_utility{suffix}"] = combined(harmonic, nine)
        four = [parts[condition, f"forget_{one}"] for one in _MEMORY]
        found[condition, "memorization_harmonic"] = combined(lambda known: harmonic(1 - known), four)
    if "reference" not in raw:
        notes.append("there is no forget quality: it takes a reference model that was trained without the forget set")
    return Score({**found, **parts}, tuple(notes))


_MEMORY = ("extraction_strength", "exact_memorization", "paraphrase_probability", "truth_ratio_prob_mean")
"""What OpenUnlearning's memorization score is the harmonic mean of, each as 1 - x."""


def _of_questions(name: str, rows: Sequence[Mapping[str, Any]], raw: Raw, suffix: str) -> dict[str, list[float]]:
    """Return by metric what each question of a set scores."""
    numbers = raw.numbers
    losses, paraphrases = numbers[f"{name}_loss{suffix}"], numbers[f"{name}_paraphrase_loss{suffix}"]
    wrong = _wrong(rows, numbers[f"{name}_wrong_loss{suffix}"])
    probability = [float(np.exp(-loss)) for loss in losses]
    ratio = [truth_ratio(others, loss) for others, loss in zip(wrong, paraphrases, strict=True)]
    found: dict[str, list[float]] = {"ratio": ratio}
    if name == "forget":
        with np.errstate(divide="ignore"):
            found["truth_ratio"] = [float(np.minimum(one, 1 / np.float64(one))) for one in ratio]
    else:
        found["truth_ratio"] = [float(np.maximum(0, 1 - one)) for one in ratio]
    found["probability"] = probability
    if name in _OPEN:
        found["probability"] = [choice_probability(p, others) for p, others in zip(probability, wrong, strict=True)]
    found["truth_ratio_prob_mean"] = [
        truth_share(others, loss) for others, loss in zip(wrong, paraphrases, strict=True)
    ]
    if name in ("forget", "retain"):
        asked = numbers[f"{name}_paraphrased_question_loss{suffix}"]
        found["paraphrased_question_probability"] = [float(np.exp(-loss)) for loss in asked]
        found["paraphrase_probability"] = [float(np.exp(-loss)) for loss in paraphrases]
    if name == "forget" and not suffix:
        found["exact_memorization"] = list(numbers["forget_exact_memorization"])
        found["extraction_strength"] = list(numbers["forget_extraction_strength"])
    return found


def _known(made: Mapping[str, Mapping[str, list[list[float]]]], count: int) -> list[bool]:
    """Say which questions fit the context with all of their answers, as the unedited models have it."""
    unedited = [parts[0] for values in made.values() for name, parts in values.items() if name in ("base", "reference")]
    return [all(one[number] == one[number] for one in unedited) for number in range(count)]


def _written(data: Data, raw: Mapping[str, Sequence[Raw]]) -> list[Column]:
    missing = left_out(raw)
    columns = []
    for task in dict.fromkeys(item.task for item in data.items):
        mine = [number for number, item in enumerate(data.items) if item.task == task]
        values = of_texts(data, raw, lambda item, text: rouge_l(text, item.reference)[0], mine)
        metric = "forget_paraphrased_question_rouge_l" if task == "forget_paraphrased" else f"{task}_rouge_l"
        units = [data.items[n].unit for n in mine]
        columns.append(Column(metric, metric.replace("_", " "), units, values, [n not in missing for n in mine]))
    return columns


def _quality(ratios: Mapping[str, list[np.ndarray]], condition: str) -> tuple[float, float]:
    """Return p-value and statistic; of several interventions, such as controls, their means."""
    never = ratios["reference"][0]
    known = np.isfinite(never)
    found = []
    for one in ratios[condition]:
        both = known & np.isfinite(ratios["base"][0])
        found.append(forget_quality(one[both], never[both]) if np.isfinite(one[both]).all() else (float("nan"),) * 2)
    p, statistic = np.mean(np.array(found, dtype=np.float64), axis=0).tolist()
    return p, statistic


BENCHMARK = Benchmark(
    name="tofu",
    words="TOFU",
    official={
        "forget_quality": "p-value of the Kolmogorov-Smirnov test of the forget truth ratios against the reference's",
        "model_utility": "harmonic mean of probability, ROUGE-L recall and truth ratio on three sets",
    },
    read=_read,
    ask=_ask,
    score=_score,
    template=TEMPLATE,
    summary="Questions on two hundred authors who do not exist (Maini et al. 2024).",
)
tofu = function_of(BENCHMARK, __doc__)
