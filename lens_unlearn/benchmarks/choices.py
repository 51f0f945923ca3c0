"""Questions of multiple choice, by lm-evaluation-harness: of local files in the layout of MMLU and WMDP, or tasks that it knows.

The prompt is that of the harness' own `wmdp` and `mmlu` tasks: the question, four lettered options, "Answer:"; the letter with the
highest probability is the answer, and equal probabilities share the point. Knows columns and prompts; knows no benchmark.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lens_unlearn.benchmarks.asking import Asker
from lens_unlearn.benchmarks.files import Files
from lens_unlearn.core.errors import CorpusError

__all__ = ["multiple_choice", "read_choices", "task_of"]

LETTERS = "ABCDEFGH"


def read_choices(
    files: Files, name: str, *names: str, rows: int | None = None, about: str | None = None, needed: bool = False
) -> dict[str, Any] | None:
    """Read questions with the columns question, choices (a list) and answer (the number of the right one, from 0).

    Args:
        files: Where they are.
        name: What the task is called.
        names: Files without their endings.
        rows: The first so many; None for all.
        about: What the prompt says that the questions are about; default the row's subject.
        needed: Whether a missing file is an error.

    Returns:
        The name, what the questions are about, and the rows; None where there is no such file.

    Raises:
        CorpusError: If a column is missing, or an answer is none of the choices.
    """
    if not needed and not files.has(*names):
        return None
    columns = {"question": None, "choices": None, "answer": None, "subject": ""}
    read = files.rows(columns, *names, hub=(name.replace("_", "-"), "test"))[:rows]
    kept = []
    for number, row in enumerate(read, 1):
        choices = [str(one) for one in row["choices"]] if isinstance(row["choices"], list | tuple) else []
        spelled = str(row["answer"]).strip()
        at = (
            LETTERS.find(spelled)
            if len(spelled) == 1 and spelled in LETTERS
            else int(spelled)
            if spelled.isdecimal()
            else -1
        )
        if not 2 <= len(choices) <= len(LETTERS) or not 0 <= at < len(choices):
            raise CorpusError(
                f"{files.benchmark}: row {number:,} of {names[0]} has {len(choices)} choices and the answer {spelled!r}: give a "
                "list of 2 to 8 choices, and the number of the right one from 0"
            )
        subject = about or str(row["subject"]).replace("_", " ").strip()
        kept.append({"question": row["question"].strip(), "choices": choices, "answer": at, "about": subject})
    return {"name": name, "rows": kept}


def task_of(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Return the task of lm-evaluation-harness that asks local questions as its own `wmdp` and `mmlu` do."""
    import datasets

    rows = [
        {
            "text": (
                f"The following are multiple choice questions (with answers) about {row['about']}.\n\n"
                if row["about"]
                else ""
            )
            + row["question"]
            + "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False))
            + "\nAnswer:",
            "letters": list(LETTERS[: len(row["choices"])]),
            "gold": row["answer"],
        }
        for row in choices["rows"]
    ]
    return {
        "task": choices["name"],
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "num_fewshot": 0,
        "output_type": "multiple_choice",
        "doc_to_text": lambda doc: doc["text"],
        "doc_to_choice": lambda doc: doc["letters"],
        "doc_to_target": lambda doc: doc["gold"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def multiple_choice(
    asker: Asker, choices: Mapping[str, Any] | None, tasks: Sequence[str] | None, name: str, limit: int | None
) -> dict[str, tuple[float, ...]]:
    """Return under one name the accuracy on each local question, or on each document of tasks; nothing for neither."""
    given: list[Any] = list(tasks or ()) or ([task_of(choices)] if choices else [])
    if not given:
        return {}
    done = asker.tasks(given, limit if tasks else None)
    return {name: tuple(value for values in done.values() for value in values)}
