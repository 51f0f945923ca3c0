"""`lens-unlearn demo`: forget Python and keep English and the rest, then the other way round, in one report."""

import os
from dataclasses import replace
from pathlib import Path

from lens_unlearn.evaluation.report import Report
from lens_unlearn.models import load_model
from lens_unlearn.run import METHODS, Experiment, Plan, check_folder, new_folder

__all__ = ["showcase"]

SKILLS = ("python", "english", "arithmetic", "esperanto", "facts")
BUDGET = 0.05
FRACTIONS, FALSE_ALARMS = (0.1, 0.2, 0.4, 0.7), (0.01, 0.03, 0.1, 0.3)


def showcase(
    out: str | os.PathLike[str], *, tokens: int = 1500, seed: int = 0, overwrite: bool = False, progress: bool = True
) -> Report:
    """Run every method and its control on two skills of the embedded model, and write one folder.

    Fitted, tuned and tested on standard-library modules, sums and sentences that the model never saw, apart from one
    another; facts are memorized, so they were seen, but the test questions are others than those fitted on. The retain
    corpus is all other skills in equal parts, and each of them is measured for itself too.

    Args:
        out: A new folder. `report.html` shows both directions; the other way round is also kept whole, in a folder
            below.
        tokens: Tokens of each corpus.
        seed: Of splits, controls and the bootstrap.
        overwrite: Whether an earlier run in `out` is replaced.
        progress: Whether to show bars.

    Returns:
        The report on forgetting Python, with the other way round among its parts.

    Raises:
        LensUnlearnError: If `out` holds something else, or a run and `overwrite` is not set.
    """
    check_folder(Path(out), overwrite=overwrite)
    model = load_model("demo")
    experiments, reports, known = [], [], {}
    for forget, twin in (("python", "english"), ("english", "python")):
        others = [twin, *(skill for skill in SKILLS if skill not in (forget, twin))]
        plan = Plan(
            model="demo",
            forget=f"demo:{forget}",
            retain=tuple(f"demo:{skill}" for skill in others),
            test_forget=f"demo:{forget}:test",
            test_retain=tuple(f"demo:{skill}:test" for skill in others),
            also={skill: f"demo:{skill}:test" for skill in others},
            methods=tuple(METHODS),
            tokens=tokens,
            retain_drop=BUDGET,
            seed=seed,
            controls=2,
            fractions=FRACTIONS,
            false_alarms=FALSE_ALARMS,
        )
        experiment = Experiment(plan, model, progress=progress, known=known)
        experiment.fit()
        experiments.append(experiment)
        reports.append(replace(experiment.report(), title=f"Forget {forget}, keep {twin} and the rest"))
    whole = replace(reports[0], parts=(reports[1],))
    with new_folder(out, overwrite=overwrite) as folder:
        experiments[0].write(folder, whole)
        (folder / "the-other-way-round").mkdir()
        experiments[1].write(folder / "the-other-way-round", reports[1])
    return whole
