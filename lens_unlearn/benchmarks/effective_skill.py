"""Effective skill unlearning (Li et al., NAACL 2025): what is left of mathematics, programming and languages, and of MMLU.

GSM8K behind eight worked examples, sampled; MBPP or MBPP+ without examples, run against its tests; MLQA or XQuAD by language; MMLU.
Knows the files of these, the prompts, and when an answer is right.

Metrics: `forget_left`, the share of its performance that a model has left on the skill to be forgotten, score / score of the
base; `retain_left`, the mean of that share over the other skills; and for each skill its own, `gsm8k_left`, `mbpp_left`,
``language_en_left``, ..., `mmlu_left`. Behind them the scores: `gsm8k`, the share of questions whose first number behind "The
answer is" is right, or else whose last number, as the released code has it (`gsm8k_last_number`: the last number before the
next question); `mbpp`, the share of programs that pass all their tests; ``language_en``, ..., the share of texts that hold the
true answer; `mmlu`, accuracy.

Data: a folder with those that are to be measured of ``gsm8k/test.jsonl`` (question, answer), ``mbpp/mbpp.jsonl`` (task_id, text,
code, test_list) or ``mbppplus/test-00000-of-00001.parquet`` (task_id, prompt, code, test_list, test),
``mlqa/test/test-context-en-question-en.json`` and the other languages, or ``xquad/xquad.en.json`` (SQuAD's layout), and
``mmlu.jsonl``. Or one of the hub: ``hf:openai/gsm8k``, ``hf:google-research-datasets/mbpp``, ``hf:evalplus/mbppplus``,
``hf:google/xquad``, ``hf:facebook/mlqa``. Methods are fitted to ``gsm8k/train.jsonl``, to MBPP's own training tasks (601 to 974),
and to ``mlqa/dev``; where a language has no such file, every fourth paragraph is set aside for them and not asked. Intervals
resample questions, tasks and paragraphs.

Options:

- `forget`: The skill that is to be forgotten: "gsm8k", "mbpp", or a language such as "es"; default the first that there is. Methods
  are fitted to forget it and to retain the others, with 200 texts of each at most.
- `shots`: Worked examples before a question of GSM8K, at most 8; a model of a short context has room for fewer.
- `languages`: Which, default all of en, de, es, ar, zh, vi, hi that there are.
- `allow_code_execution`: Whether programs that the model writes may be run, isolated as well as this system allows; without it,
  MBPP is left out.
- `temperature`: Of GSM8K; 0 takes the most probable token.
- `top_p`: Of GSM8K.
- `max_new_tokens`: The longest answer to GSM8K and MBPP.
- `language_tokens`: The longest answer in a language.
- `mmlu`: Tasks of lm-evaluation-harness, such as "mmlu"; default a file ``mmlu.jsonl`` in the folder, if there is one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from lens_unlearn.benchmarks.asking import Asker
from lens_unlearn.benchmarks.benchmark import Benchmark, Data, Item, Raw, Score
from lens_unlearn.benchmarks.choices import multiple_choice, read_choices
from lens_unlearn.benchmarks.files import Files
from lens_unlearn.benchmarks.running import function_of
from lens_unlearn.benchmarks.scoring import Column, combined, left_out, means
from lens_unlearn.benchmarks.worked_examples import WORKED_EXAMPLES
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.core.numbers import COUNT
from lens_unlearn.evaluation.answer_matching import last_number, program
from lens_unlearn.evaluation.code_tests import check_runner, passes_tests
from lens_unlearn.evaluation.report import Measure, mean_of

__all__ = ["effective_skill"]

LANGUAGES = ("en", "de", "es", "ar", "zh", "vi", "hi")
PROBES = 200
"""Texts of each skill that methods are fitted to, as in the paper."""
ASIDE = 4
"""Every so manieth paragraph is set aside where a language has no other file to fit to."""
MBPP_TEST, MBPP_TRAIN = range(11, 511), range(601, 975)
"""The numbers of MBPP's tasks in its own split."""
PHRASE = (
    "Only output the exact phrase in the following context that best answers the question:\n\n"
    "Context: {}\n\nquestion: {}\n\nanswer: \n"
)
TRIGGER = "the answer is"
_NUMBER = re.compile(r"-?\d+\.?\d*")
_CLOSE = Fraction(1, 10**10)
_SECONDS = 10.0  # for the tests of a program
NUMPY = '''
class np:
    """What MBPP+'s tests need of numpy, which programs cannot import."""
    ndarray = ()
    def allclose(one, other, rtol=1e-7, atol=0.0):
        if isinstance(other, (list, tuple)):
            return len(one) == len(other) and all(np.allclose(a, b, rtol, atol) for a, b in zip(one, other))
        return abs(one - other) <= atol + rtol * abs(other)
    class testing:
        def assert_allclose(one, other, rtol=1e-7, atol=0.0):
            assert np.allclose(one, other, rtol, atol)
'''


@dataclass
class _Skill:
    """What one skill is asked, and the rows that methods are fitted to."""

    items: list[Item] = field(default_factory=list)
    fit: list[dict[str, Any]] = field(default_factory=list)
    tests: list[tuple[str, list[str]]] = field(default_factory=list)
    """Of each item that is to be a program: what its tests need before them, and the tests."""
    note: str = ""


def _read(
    files: Files,
    rows: int | None,
    *,
    forget: str | None = None,
    shots: int = len(WORKED_EXAMPLES),
    languages: str | Sequence[str] | None = None,
    allow_code_execution: bool = False,
    temperature: float = 0.8,
    top_p: float = 0.95,
    max_new_tokens: int = 256,
    language_tokens: int = 24,
    mmlu: str | Sequence[str] | None = None,
) -> Data:
    COUNT.check(max_new_tokens, "max_new_tokens")
    COUNT.check(language_tokens, "language_tokens")
    if shots not in range(len(WORKED_EXAMPLES) + 1):
        raise LensUnlearnError(f"effective-skill: shots={shots!r} is no number of worked examples: from 0 to 8")
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise LensUnlearnError(
            f"effective-skill: temperature={temperature} and top_p={top_p} cannot be sampled with: a temperature from 0, and a "
            "share of the probability above 0 and at most 1"
        )
    wanted = (languages,) if isinstance(languages, str) else LANGUAGES if languages is None else tuple(languages)
    if unknown := [one for one in wanted if one not in LANGUAGES]:
        raise LensUnlearnError(
            f"effective-skill: there is no language {unknown[0]!r}: choose from {', '.join(LANGUAGES)}"
        )
    skills: dict[str, _Skill] = {}
    notes = []
    if _has(files, "gsm8k", *_GSM8K):
        skills["gsm8k"] = _gsm8k(files, rows, shots)
    if _has(files, "mbpp", *_MBPP, *_PLUS):
        if allow_code_execution:
            check_runner()
            skills["mbpp"] = _mbpp(files, rows)
        else:
            notes.append(
                "MBPP is left out, since programs that the model writes may not be run: allow_code_execution=True allows it"
            )
    for language in wanted:
        if _has(files, "xquad", *_language_files(language)) or _has(files, "mlqa"):
            skills[f"language_{language}"] = _language(files, rows, language)
        elif languages is not None:
            raise CorpusError(f"effective-skill: {files.source} has no file of the language {language!r}")
    choices = read_choices(files, "mmlu", "mmlu", rows=rows) if mmlu is None else None
    if not skills:
        raise CorpusError(
            f"effective-skill needs gsm8k/test.jsonl, mbpp/mbpp.jsonl (with allow_code_execution), mlqa/test/... or xquad/... in "
            f"{files.source}, which has none"
        )
    chosen = next(iter(skills)) if forget is None else f"language_{forget}" if forget in LANGUAGES else forget
    if chosen not in skills:
        has = ", ".join(name.removeprefix("language_") for name in skills)
        raise LensUnlearnError(f"effective-skill: there is nothing here to measure {forget!r} on: forget one of {has}")
    items = [
        Item(one.id, one.task, "forget" if name == chosen else "retain", one.prompt, one.reference, one.unit)
        for name, skill in skills.items()
        for one in skill.items
    ]
    fit = {name: skill.fit[:PROBES] for name, skill in skills.items()}
    notes += dict.fromkeys(skill.note for skill in skills.values() if skill.note)
    more = {
        "skills": list(skills),
        "forget": chosen,
        "tests": {one.id: test for skill in skills.values() for one, test in zip(skill.items, skill.tests)},
        "choices": choices,
        "mmlu": [mmlu] if isinstance(mmlu, str) else mmlu,
        "rows": rows,
        "sampling": {"temperature": temperature, "top_p": top_p},
        "max_new_tokens": max_new_tokens,
        "language_tokens": language_tokens,
    }
    retain = [row for name, given in fit.items() if name != chosen for row in given]
    return Data(tuple(items), tuple(fit[chosen]), tuple(retain), more, tuple(notes))


_GSM8K = ("gsm8k/test", "gsm8k/main/test", "gsm8k_test", "gsm8k")
_MBPP = ("mbpp/mbpp", "mbpp/full/test", "mbpp/test", "mbpp/sanitized-mbpp", "mbpp")
_PLUS = ("mbppplus/test", "mbppplus/data/test", "mbppplus", "mbpp_plus")


def _language_files(language: str) -> tuple[str, ...]:
    pair = f"context-{language}-question-{language}"
    of_mlqa = tuple(f"{folder}test/test-{pair}" for folder in ("mlqa/", "mlqa/MLQA_V1/", "MLQA_V1/", ""))
    return (*of_mlqa, f"xquad/xquad.{language}", f"xquad.{language}", f"xquad/xquad.{language}/validation")


def _has(files: Files, name: str, *paths: str) -> bool:
    """Whether there is one of some files, or the data set of the hub is the one of that name."""
    return name in files.source.rpartition("/")[2].lower() if files.on_hub else files.has(*paths)


def _gsm8k(files: Files, rows: int | None, shots: int) -> _Skill:
    columns: dict[str, str | None] = {"question": None, "answer": None}
    head = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in WORKED_EXAMPLES[:shots])
    found = _Skill()
    for number, row in enumerate(files.rows(columns, *_GSM8K, hub=("main", "test"))[:rows]):
        if _truth(row["answer"]) is None:
            raise CorpusError(f"effective-skill: row {number + 1:,} of gsm8k has no number behind '####' in its answer")
        prompt = f"{head}Q: {row['question']}\nA:"
        found.items.append(Item(f"gsm8k-{number}", "gsm8k", "", prompt, row["answer"], f"gsm8k {number}"))
    names = ("gsm8k/train", "gsm8k/main/train", "gsm8k_train")
    for row in files.maybe(columns, *names, hub=("main", "train"))[:PROBES]:
        found.fit.append({"question": f"{head}Q: {row['question']}\nA:", "answer": f" {row['answer']}"})
    return found


def _mbpp(files: Files, rows: int | None) -> _Skill:
    columns: dict[str, str | None] = {"task_id": None, "text": "", "prompt": "", "code": "", "test_list": None}
    columns |= {"test": "", "test_setup_code": "", "test_imports": ""}
    plus = _has(files, "mbppplus", *_PLUS)
    read = files.rows(columns, *(_PLUS if plus else _MBPP), hub=(None, "test") if plus else ("full", "test"))
    # One file of everything, as it is published, holds the tasks to train on as well.
    asked = [] if plus else [row for row in read if _number(row) in MBPP_TEST]
    asked = asked or read
    found = _Skill()
    for row in asked[:rows]:
        tests = [str(one) for one in row["test_list"]] if isinstance(row["test_list"], list | tuple) else []
        if not tests or not (row["text"] or row["prompt"]):
            raise CorpusError(
                f"effective-skill: task {row['task_id']} of mbpp has no text, or no assertions in test_list"
            )
        imports = row["test_imports"] if isinstance(row["test_imports"], list | tuple) else [row["test_imports"]]
        setup = "\n".join([*map(str, imports), row["test_setup_code"]]).strip()
        of_plus = f"{NUMPY}\n{re.sub(r'(?m)^import numpy as np$', '', row['test'])}"
        found.tests.append((setup, [of_plus] if row["test"] else tests))
        item = f"mbpp-{row['task_id']}"
        found.items.append(Item(item, "mbpp", "", _task(row, tests), row["code"], item.replace("-", " ")))
    own = {_number(row) for row in asked}
    names = ("mbpp/full/train", "mbpp/train", *_MBPP)
    trained = [
        row for row in files.maybe(columns, *names, hub=("full", "train")) if _number(row) in MBPP_TRAIN and row["code"]
    ]
    for row in [row for row in trained if _number(row) not in own][:PROBES]:
        code = row["code"].replace("\r\n", "\n")
        found.fit.append({"question": _task(row, [str(one) for one in row["test_list"]]), "answer": code})
    return found


def _number(row: Mapping[str, Any]) -> int:
    return int(digits[0]) if (digits := re.findall(r"\d+", str(row["task_id"]))) else -1


def _task(row: Mapping[str, Any], tests: Sequence[str]) -> str:
    """Return a task as EvalPlus puts it: a docstring of the text and the first test."""
    text = (row["text"] or row["prompt"]).strip()
    return text + "\n" if text.startswith('"""') else f'"""\n{text}\n{tests[0].strip()}\n"""\n'


def _language(files: Files, rows: int | None, language: str) -> _Skill:
    name = f"language_{language}"
    config = f"mlqa.{language}.{language}" if _has(files, "mlqa") else f"xquad.{language}"
    split = "test" if config.startswith("mlqa") else "validation"
    asked = _questions(files.rows({}, *_language_files(language), hub=(config, split)), name)
    pair = f"dev/dev-context-{language}-question-{language}"
    others = tuple(f"{folder}{pair}" for folder in ("mlqa/", "mlqa/MLQA_V1/", "MLQA_V1/", ""))
    found = _Skill()
    if files.has(*others):
        fit = _questions(files.rows({}, *others), name)
    else:
        paragraphs = {context: number for number, context in enumerate(dict.fromkeys(one[0] for one in asked))}
        fit = [one for one in asked if paragraphs[one[0]] % ASIDE == ASIDE - 1]
        asked = [one for one in asked if paragraphs[one[0]] % ASIDE != ASIDE - 1]
        found.note = (
            "of languages without a file to fit methods to, every fourth paragraph is set aside for that and not asked"
        )
    found.fit = [{"question": PHRASE.format(*one[:2]), "answer": one[2]} for one in fit]
    units: dict[str, int] = {}
    for number, (context, question, answer) in enumerate(asked[:rows]):
        unit = f"{name} {units.setdefault(context, len(units))}"
        found.items.append(Item(f"{name}-{number}", name, "", PHRASE.format(context, question), answer, unit))
    return found


def _questions(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[str, str, str]]:
    """Return context, question and first true answer, of SQuAD's nested layout or of rows as the hub has them.

    Raises:
        CorpusError: If they are in neither.
    """
    try:
        if "data" in rows[0]:
            return [
                (paragraph["context"], asked["question"], asked["answers"][0]["text"])
                for row in rows
                for article in row["data"]
                for paragraph in article["paragraphs"]
                for asked in paragraph["qas"]
            ]
        return [(row["context"], row["question"], row["answers"]["text"][0]) for row in rows]
    except (KeyError, IndexError, TypeError) as error:
        raise CorpusError(
            f"effective-skill: the file of {name} is not in SQuAD's layout (data, paragraphs, context, qas, question, answers, "
            f"text): {error!r}"
        ) from error


def _ask(data: Data, asker: Asker) -> Raw:
    texts: list[str | None] = [None] * len(data.items)
    left_out: list[int] = []
    for skill in data.more["skills"]:
        mine = [number for number, item in enumerate(data.items) if item.task == skill]
        tokens = data.more["language_tokens" if skill.startswith("language") else "max_new_tokens"]
        sampling = data.more["sampling"] if skill == "gsm8k" else {}
        done = asker.write([data.items[number].prompt for number in mine], tokens, **sampling)
        left_out += [mine[number] for number in done.left_out]
        for number, text in zip(mine, done.texts, strict=True):
            texts[number] = text
    numbers: dict[str, tuple[float, ...]] = {}
    programs = [(data.more["tests"][one.id], text) for one, text in zip(data.items, texts) if one.task == "mbpp"]
    if programs:  # run once, and kept: anybody can run them again from the texts
        numbers["mbpp_passed"] = tuple(
            float("nan")
            if text is None
            else float(passes_tests(program(text), tests, setup, allow_code_execution=True, seconds=_SECONDS))
            for (setup, tests), text in programs
        )
    numbers |= multiple_choice(asker, data.more["choices"], data.more["mmlu"], "mmlu", data.more["rows"])
    return Raw(tuple(texts), tuple(sorted(left_out)), numbers)


def _truth(answer: str) -> Fraction | None:
    """Return the number behind the mark of a true answer of GSM8K; with commas too, of which the released code makes nothing."""
    return last_number(answer.rpartition("####")[2])


def released_number(text: str) -> Fraction | None:
    """Return the number that the released code takes for an answer: the first behind "the answer is", or else the last of all.

    >>> str(released_number("So 3 + 4 = 7. The answer is 7. Q: 5?")), str(released_number("3 + 4 = 1,007.")), released_number("?")
    ('7', '1007', None)
    """
    parts = text.lower().split(TRIGGER)
    found = _NUMBER.findall(parts[min(1, len(parts) - 1)].replace(",", ""))
    return Fraction(found[0 if len(parts) > 1 else -1].rstrip(".")) if found else None


def _right(task: str, text: str | None, reference: str) -> dict[str, float]:
    """Return by metric what an answer that is no program scores."""
    if task == "gsm8k":
        said = [None, None] if text is None else [released_number(text), last_number(text.split("\n\nQ:")[0])]
        truth = _truth(reference)
        scores = [float(one is not None and truth is not None and abs(one - truth) < _CLOSE) for one in said]
        found: dict[str, float] = dict(zip(("gsm8k", "gsm8k_last_number"), scores, strict=True))
    else:
        found = {task: float(text is not None and reference in text)}
    return dict.fromkeys(found, float("nan")) if text is None else found


def _score(data: Data, raw: Mapping[str, Sequence[Raw]], resamples: int, seed: int) -> Score:
    missing = left_out(raw)
    columns, skills, notes = [], [], []
    for skill in data.more["skills"]:
        mine = [number for number, item in enumerate(data.items) if item.task == skill]
        if missing.issuperset(mine) and skill != data.more["forget"]:
            notes.append(f"{skill} is left out: none of its prompts fits the model's context")
            continue
        skills.append(skill)
        scored: dict[str, dict[str, list[list[float]]]] = {}
        for name, several in raw.items():
            for one in several:
                if skill == "mbpp":
                    table = [{skill: value} for value in one.numbers["mbpp_passed"]]
                else:
                    table = [_right(skill, one.texts[n], data.items[n].reference) for n in mine]
                for metric in table[0]:
                    scored.setdefault(metric, {}).setdefault(name, []).append([row[metric] for row in table])
        known, units = [n not in missing for n in mine], [data.items[n].unit for n in mine]
        columns += [Column(metric, metric.replace("_", " "), units, own, known) for metric, own in scored.items()]
    if "mmlu" in raw["base"][0].numbers:
        skills.append("mmlu")
        own = {name: [one.numbers["mmlu"] for one in several] for name, several in raw.items()}
        named = [f"mmlu {number}" for number in range(len(own["base"][0]))]
        columns.append(Column("mmlu", "accuracy on MMLU", named, own))
    parts = means(columns, resamples, seed)
    able = [skill for skill in skills if parts["base", skill].value > 0]
    found: dict[tuple[str, str], Measure] = {}
    for name in raw:
        left = {skill: combined(_share, [parts[name, skill], parts["base", skill]]) for skill in skills}
        found[name, "forget_left"] = left[data.more["forget"]]
        if others := [left[skill] for skill in able if skill != data.more["forget"]]:
            found[name, "retain_left"] = mean_of(others)
        found |= {(name, f"{skill}_left"): one for skill, one in left.items()}
    notes += [
        f"of {skill} nothing could be lost: the unedited model has none right, and there is no share"
        for skill in skills
        if skill not in able
    ]
    return Score({**found, **parts}, tuple(notes))


def _share(both: np.ndarray) -> np.ndarray:
    """Return what is left of a score; no number where there was nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(both[1] > 0, both[0] / both[1], np.nan))


BENCHMARK = Benchmark(
    name="effective-skill",
    words="Effective skill unlearning",
    official={
        "forget_left": "score / score of the base, on the skill to be forgotten",
        "retain_left": "mean of score / score of the base, over the other skills",
        "gsm8k_left": "the same on GSM8K",
        "mbpp_left": "the same on MBPP or MBPP+",
        **{f"language_{one}_left": f"the same on MLQA or XQuAD, {one}" for one in LANGUAGES},
        "mmlu_left": "the same on MMLU",
    },
    read=_read,
    ask=_ask,
    score=_score,
    decoding="greedy; GSM8K sampled at its temperature and top-p, without top-k",
    template="{prompt}{answer}",
    summary="Mathematics, programs, languages and MMLU: what is left of each (Li et al. 2025).",
)
effective_skill = function_of(BENCHMARK, __doc__)
