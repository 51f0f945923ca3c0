"""`run`: the command `lens-unlearn run` in Python: the same plan, the same folder, and the report as a value.

Knows what can be asked for; what is done is `carry_out`'s.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lens_unlearn.core import distributed
from lens_unlearn.evaluation.report import Report
from lens_unlearn.experiments.experiment import carry_out
from lens_unlearn.experiments.loading import load_report
from lens_unlearn.experiments.plan import FALSE_ALARMS, STRENGTHS, Plan
from lens_unlearn.experiments.tracking import check_tracker
from lens_unlearn.experiments.tracking import track as log
from lens_unlearn.methods.budget import CONFIDENCE
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.loading import model_name

__all__ = ["run"]


def run(
    model: Model | str | os.PathLike[str],
    forget: str,
    retain: str | Sequence[str],
    out: str | os.PathLike[str],
    *,
    also: Mapping[str, str] | None = None,
    methods: str | Sequence[str] = ("selective-pruning",),
    settings: Mapping[str, Any] | None = None,
    test_forget: str | None = None,
    test_retain: str | Sequence[str] = (),
    facts: bool = False,
    template: str | None = None,
    answer_eos: bool = False,
    prepend_bos: bool | None = None,
    chat: bool = False,
    system: str | None = None,
    tokens: int = 20_000,
    test_tokens: int | None = None,
    shuffle: int | None = None,
    window: int | None = None,
    retain_drop: float | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    controls: int = 5,
    deal: bool | None = None,
    sweep: bool = True,
    fractions: Sequence[float] = (),
    false_alarms: Sequence[float] = FALSE_ALARMS,
    strengths: Sequence[float] = STRENGTHS,
    answers: int = 0,
    memorization: int = 0,
    batch_size: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    device_map: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dictionary: str | None = None,
    track: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    """Find the neurons of a skill, ablate them with hooks, and report the effect beside random controls, into one folder.

    This is `lens-unlearn run` in Python: the same names, the same folder (page, table, interventions, `run.json`), and numbers.
    `report.interventions` holds what each method found, ready for ``with report.interventions["selective-pruning"].on(model):``.

    Args:
        model: "demo", a Hugging Face directory or a hub name; or a model that is loaded already, for which `dtype`, `device`,
            `device_map`, `revision`, `trust_remote_code` and `dictionary` say nothing.
        forget: Texts of the skill to unlearn: a source as `read_corpus` takes it, such as "texts.jsonl:text" or "demo:python".
        retain: Texts of what is to be retained: one source, or several, each of which keeps the budget.
        out: A new folder for the results.
        also: Further corpora to evaluate on, by name.
        methods: By the names that the command line uses; `lens-unlearn methods` lists them.
        settings: Options of the methods, as in ``{"importance": "rms", "neuron-adjust.fraction": 0.05}``.
        test_forget: Separate test texts of the skill; default: a part of `forget` that nothing is fitted or tuned on.
        test_retain: Separate test texts of what is to be retained; likewise.
        facts: Whether forget is a list of memorized facts: fitted, tuned and tested on whole, while retain is split.
        template: How prompt and answer are joined; see `read_corpus`.
        answer_eos: Whether the end-of-text token stands behind every answer, and counts.
        prepend_bos: Whether texts begin with BOS; None leaves it to the tokenizer.
        chat: Whether the sources hold conversations.
        system: The system's turn of conversations that have none.
        tokens: Tokens of each side to fit on.
        test_tokens: Tokens of each corpus to test on; None takes as many as put its accuracy within 3 points, at most `tokens`.
        shuffle: Draw the documents from a buffer of so many.
        window: Longest row in tokens; default the context length, at most 512.
        retain_drop: The budget: forget as much as possible while each retain source loses at most this share of its accuracy;
            None uses the strength that the options say.
        confidence: With which fresh documents are to lose no more than `retain_drop`.
        seed: Of splits, samples, controls and the bootstrap.
        controls: Random controls per method, each with a seed of its own.
        deal: Whether a method's controls share the test documents, instead of each reading all (see `evaluate`): one pass in place
            of as many, and a wider interval; None where there are several methods, and four controls at least.
        sweep: Whether to measure a range of strengths for the trade-off figure.
        fractions: Shares of neurons to sweep over; default: around the one that was chosen.
        false_alarms: False positive rates to sweep over, for methods that judge prompts.
        strengths: Strengths of a trained update to sweep over.
        answers: Questions of each question-answer corpus to answer.
        memorization: Questions of each question-answer corpus whose true answers' probabilities are measured.
        batch_size: Rows of full length per forward pass; default as many as this machine runs fastest with.
        dtype: Of the weights, or "auto".
        device: Where the model runs; default a GPU if there is one.
        device_map: How a model that does not fit one device is spread.
        revision: A branch, tag or commit of a model on the hub.
        trust_remote_code: Whether to run the code that comes with a model.
        dictionary: A sparse autoencoder as `load_dictionary` takes it, whose features are the neurons of the site `sae`.
        track: "tensorboard", "wandb" or "mlflow", which the finished run's table and page are logged to; needs the extra of that
            name.
        resume: Whether to go on with an interrupted run of the same plan, or to return a finished one.
        overwrite: Whether an earlier run in `out` is replaced.
        progress: Whether to say what is being done.

    Returns:
        The report, as `load_report` gives it back later. What failed on the way is in ``report.provenance["failed"]``, and a
        warning says so.

    Raises:
        LensUnlearnError: If something cannot be meant, before the first pass over texts, or `out` holds what would be lost.
    """
    if track is not None:
        check_tracker(track)
    named = isinstance(model, str | os.PathLike)
    if not named:
        require_model(model)
    held = None if named else model
    plan = Plan(
        model=os.fspath(model) if isinstance(model, str | os.PathLike) else model_name(model),
        forget=forget,
        retain=_several(retain),
        also=dict(also or {}),
        methods=_several(methods),
        settings=dict(settings or {}),
        test_forget=test_forget,
        test_retain=_several(test_retain),
        template=template,
        answer_eos=answer_eos,
        chat=chat,
        system=system,
        tokens=tokens,
        shuffle=shuffle,
        window=window,
        prepend_bos=prepend_bos,
        retain_drop=retain_drop,
        confidence=confidence,
        seed=seed,
        batch_size=batch_size,
        controls=controls,
        deal=deal,
        sweep=sweep,
        fractions=tuple(fractions),
        false_alarms=tuple(false_alarms),
        strengths=tuple(strengths),
        answers=answers,
        memorization=memorization,
        dtype=dtype,
        device=device,
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dictionary=dictionary,
        test_tokens=test_tokens,
        facts=facts,
    )
    done = carry_out(plan, out, resume=resume, overwrite=overwrite, progress=progress, model=held)
    report = load_report(out) if done is None else done[1]
    for what, why in report.provenance.get("failed", {}).items():
        warnings.warn(f"{what} failed: {why}; the rest is in the report", RuntimeWarning, stacklevel=2)
    if track is not None and distributed.is_first():
        log(report, out, track)
    return report


def _several(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
