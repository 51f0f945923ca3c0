"""`lens-unlearn demo`: forget Python and keep English, then the other way round, on the embedded model, in one report."""

import os
from dataclasses import replace
from pathlib import Path

from lens_unlearn.evaluation.report import Report
from lens_unlearn.models import load_model
from lens_unlearn.run import METHODS, Experiment, Plan, check_folder, new_folder

__all__ = ["showcase"]

SKILLS = ("python", "english", "arithmetic", "esperanto", "facts")
BUDGET = 0.05


def showcase(
    out: str | os.PathLike[str], *, tokens: int = 6000, seed: int = 0, overwrite: bool = False, progress: bool = True
) -> Report:
    """Run every method and its control on two skills of the embedded model, and write one folder.

    Fitted and tuned on training modules of the standard library, tested on modules the model never saw.

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
    experiments, reports = [], []
    for forget, retain in (("python", "english"), ("english", "python")):
        plan = Plan(
            model="demo",
            forget=f"demo:{forget}",
            retain=(f"demo:{retain}",),
            test_forget=f"demo:{forget}:test",
            test_retain=(f"demo:{retain}:test",),
            also={skill: f"demo:{skill}:test" for skill in SKILLS if skill not in (forget, retain)},
            methods=tuple(METHODS),
            tokens=tokens,
            retain_drop=BUDGET,
            seed=seed,
        )
        experiment = Experiment(plan, model, progress=progress)
        experiment.fit()
        experiments.append(experiment)
        reports.append(replace(experiment.report(), title=f"Forget {forget}, keep {retain}"))
    whole = replace(reports[0], parts=(reports[1],))
    with new_folder(out, overwrite=overwrite) as folder:
        experiments[0].write(folder, whole)
        (folder / "the-other-way-round").mkdir()
        experiments[1].write(folder / "the-other-way-round", reports[1])
    return whole
