"""What TOFU says of a whole model: forget quality and model utility, from what `evaluate` measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.corpora.sources import Source
from lens_unlearn.evaluation.report import BASE, Report
from lens_unlearn.model.host import Model

__all__ = [
    "ForgetQuality",
    "Utility",
    "forget_quality",
    "forget_truth_ratio",
    "model_utility",
    "read_tofu",
    "retain_truth_ratio",
    "tofu_utility",
]

Values = Report | Sequence[float] | np.ndarray


def read_tofu(
    source: Source,
    model: Model,
    *,
    template: str | None = None,
    group: str | int | None = None,
    tokens: int | None = None,
    window: int | None = None,
    prepend_bos: bool | None = None,
    answer_eos: bool = True,
    chat: bool = False,
    system: str | None = None,
) -> Corpus:
    """Read one of TOFU's files, or others in its layout, with TOFU's own choice of what counts in an answer.

    The end-of-text token behind an answer counts, as in TOFU's code (`convert_raw_data_to_model_format`) and in OpenUnlearning's
    (`preprocess_chat_instance`): it is one more token of every answer in `loss`, `answer_probability` and the truth ratio, and of
    wrong and paraphrased answers too. A model that was trained without it is measured better with ``answer_eos=False``.

    Args:
        source: Such as ``forget10_perturbed.jsonl``; the fields are question and answer, unless others are named.
        model: The model whose tokenizer and context length to use.
        template: How the model was asked in training; as for `read_corpus`, like what follows.
        group: What belongs together, such as 20 for the questions on one author in TOFU's own order.
        tokens: Stop after exactly this many counted tokens.
        window: Longest row in tokens.
        prepend_bos: Whether every row begins with BOS.
        answer_eos: Whether the end-of-text token counts; in a chat, the token that ends the turn always does.
        chat: Whether each row is a turn of the user and one of the assistant, in the tokenizer's chat template.
        system: The system's turn before them.
    """
    reading: dict[str, Any] = {"template": template, "group": group, "tokens": tokens, "window": window}
    reading |= {"prepend_bos": prepend_bos, "chat": chat, "system": system}
    return read_corpus(source, model, field="question>answer", answer_eos=answer_eos and not chat, **reading)


def forget_truth_ratio(values: Sequence[float] | np.ndarray) -> float:
    """Return mean min(R, 1/R) over questions to be forgotten: 1 where the model cannot tell right from wrong answers."""
    ratios = _finite(values)
    with np.errstate(divide="ignore"):
        return float(np.minimum(ratios, 1 / ratios).mean())


def retain_truth_ratio(values: Sequence[float] | np.ndarray) -> float:
    """Return mean max(0, 1 - R) over questions to be retained: 1 where the model always prefers right answers."""
    return float(np.maximum(0, 1 - _finite(values)).mean())


class ForgetQuality(NamedTuple):
    """How far the truth ratios of an edited model are from those of one that never saw the facts."""

    p: float
    """Of the two-sample Kolmogorov-Smirnov test: above 0.05 the two cannot be distinguished."""
    statistic: float
    """The largest distance between the two distribution functions, from 0 to 1."""


def forget_quality(
    edited: Values, retrained: Values, *, condition: str | None = None, corpus: str = "forget"
) -> ForgetQuality:
    """Compare the truth ratios of single questions under an edit with those of a model trained without the facts.

    By the two-sided two-sample Kolmogorov-Smirnov test (`scipy.stats.ks_2samp`), as TOFU (Maini et al. 2024) has it. p falls with
    the number of questions as well as with the distance: give both. The test takes the questions as independent of each other, and
    the two models' as unpaired. Neither holds: questions of one author are alike, which makes p too small, and both models get the
    same questions, which makes it too large. So it is a figure to compare with TOFU's, and has no interval.

    Args:
        edited: A report of `evaluate` with `memorization`, or the truth ratio of each question.
        retrained: The same of the model that never saw the facts; of a report, its unedited model.
        condition: In the report of the edited model; default: the only one besides the base.
        corpus: In both reports.

    Raises:
        CorpusError: If the corpus' rows have no wrong answers.
        LensUnlearnError: If memorization was not measured, not on the same questions, or there are no ratios or NaN among them.
    """
    from scipy.stats import ks_2samp

    if isinstance(edited, Report) and condition is None:
        others = [name for name in edited.conditions if name != BASE]
        if len(others) != 1:
            raise LensUnlearnError(
                f"the report has {len(others)} conditions besides the base: name one of {edited.conditions}"
            )
        condition = others[0]
    first = _truth_ratios(edited, condition or BASE, corpus) if isinstance(edited, Report) else edited
    second = _truth_ratios(retrained, BASE, corpus) if isinstance(retrained, Report) else retrained
    if (
        isinstance(edited, Report)
        and isinstance(retrained, Report)
        and _asked(edited, corpus) != _asked(retrained, corpus)
    ):
        raise LensUnlearnError(
            f"the reports measured {corpus!r} on other questions: evaluate both models on the same corpus, with the same "
            "memorization and seed"
        )
    if np.ndim(first) == 2 and len(first) > 1:
        raise LensUnlearnError(
            f"{condition!r} has {len(first)} interventions, whose questions are the same and may not be pooled: compare one "
            f"of report.values[{condition!r}, {corpus!r}, 'truth_ratio']"
        )
    found = ks_2samp(_finite(np.ravel(first)), _finite(np.ravel(second)))
    return ForgetQuality(float(found.pvalue), float(found.statistic))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Utility:
    """A harmonic mean, and what it is of."""

    value: float
    components: dict[str, float]

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        means = ", ".join(f"{name} {value:.3f}" for name, value in self.components.items())
        return f"Utility({self.value:.3f}, harmonic mean of {means})"


def model_utility(components: Mapping[str, float]) -> Utility:
    """Return the harmonic mean of components: n / sum_i 1 / c_i, and 0 if any is 0.

    >>> model_utility({"a": 1.0, "b": 0.5})
    Utility(0.667, harmonic mean of a 1.000, b 0.500)

    Raises:
        LensUnlearnError: If there is none, or one is negative or no number.
    """
    values = {name: float(value) for name, value in components.items()}
    for name, value in values.items():
        if not (np.isfinite(value) and value >= 0):
            raise LensUnlearnError(f"the component {name!r} is {value}: a harmonic mean is of numbers from 0 on")
    if not values:
        raise LensUnlearnError("there is nothing to take a mean of: give at least one component")
    if min(values.values()) == 0:
        return Utility(0.0, values)
    return Utility(len(values) / sum(1 / value for value in values.values()), values)


def tofu_utility(
    report: Report,
    condition: str = BASE,
    *,
    retain: str = "retain",
    real_authors: str = "real_authors",
    world_facts: str = "world_facts",
) -> Utility:
    """Return TOFU's model utility: the harmonic mean of probability, ROUGE-L recall and truth ratio on three corpora.

    The probability is `answer_probability` on the retained facts, and `choice_probability`, beside the wrong options, on the other
    two; the truth ratio counts as `retain_truth_ratio`. Small models that answer no question of the world have a component near 0,
    which decides the mean: look at the components.

    Args:
        report: Of `evaluate` with `answers` and `memorization`, on corpora in TOFU's layout: ``retain_perturbed.jsonl``,
            ``real_authors_perturbed.jsonl`` and ``world_facts_perturbed.jsonl``, read as ``question>answer``.
        condition: Whose utility.
        retain: The corpus of retained facts.
        real_authors: That of real authors.
        world_facts: That of facts of the world.

    Raises:
        CorpusError: If a corpus' rows have no wrong answers.
        LensUnlearnError: If something was not measured.
    """
    found: dict[str, float] = {}
    for name, corpus in (("retain", retain), ("real_authors", real_authors), ("world_facts", world_facts)):
        ratios = _truth_ratios(report, condition, corpus)
        probability = "answer_probability" if name == "retain" else "choice_probability"
        found[f"{name} probability"] = report[condition, corpus, probability].value
        found[f"{name} rouge_l"] = report[condition, corpus, "rouge_l"].value
        found[f"{name} truth_ratio"] = float(np.mean([retain_truth_ratio(part) for part in ratios]))
    return model_utility(found)


def _truth_ratios(report: Report, condition: str, corpus: str) -> np.ndarray:
    """Return [interventions, questions] of a report's truth ratios."""
    key = (condition, corpus, "truth_ratio")
    if key in report.values:
        return report.values[key]
    if (condition, corpus, "answer_probability") in report.values:
        raise CorpusError(
            f"no question of {corpus!r} has wrong answers to compare with: its rows have no field 'perturbed_answer' that holds "
            "texts which fit the window (TOFU keeps them in its files named ..._perturbed)"
        )
    raise LensUnlearnError(
        f"memorization was not measured for {condition!r} on {corpus!r}: evaluate with memorization=N, on a corpus read "
        "as 'question>answer'"
    )


def _asked(report: Report, corpus: str) -> tuple[object, ...]:
    """Say which questions a report is of."""
    settings = report.provenance.get("memorization", {})
    fingerprint = report.provenance.get("corpora", {}).get(corpus, {}).get("fingerprint")
    return fingerprint, settings.get("questions", {}).get(corpus), settings.get("seed")


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    ratios = np.asarray(values, dtype=np.float64)
    if ratios.size == 0:
        raise LensUnlearnError("there are no truth ratios to compare")
    if not np.isfinite(ratios).all():
        raise LensUnlearnError("truth ratios hold NaN or infinity: the model's logits are not finite")
    return ratios
