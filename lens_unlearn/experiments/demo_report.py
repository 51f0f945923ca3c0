"""`lens-unlearn demo`: forget Python and keep English, then the other way round, then forget persons; one report."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from lens_unlearn import figures, methods
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.demo import WITHOUT_FACTS_DIR
from lens_unlearn.evaluation.evaluate import evaluate
from lens_unlearn.evaluation.report import Report
from lens_unlearn.evaluation.tofu import forget_quality
from lens_unlearn.experiments.documents import to_read
from lens_unlearn.experiments.experiment import Experiment
from lens_unlearn.experiments.output import new_folder, write_settings
from lens_unlearn.experiments.plan import Plan
from lens_unlearn.experiments.report_file import REPORT_FILE, save_report
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.methods.controls import controls_for
from lens_unlearn.methods.simu import simu
from lens_unlearn.model.host import Model
from lens_unlearn.model.loading import load_model
from lens_unlearn.neurons.attribution import attribute, critical

__all__ = ["demo_report"]

SKILLS = ("python", "english", "arithmetic", "esperanto", "facts")
PERSONS = {"forget": "facts_forget:train", "retain": "facts_retain:dev", "unseen": "facts_holdout:dev"}
STEPS: int | None = None
"""Of SIMU: its default."""
MOST = 40
BUDGET = 0.05
FRACTIONS, FALSE_ALARMS = (0.1, 0.2, 0.4, 0.7), (0.01, 0.03, 0.1, 0.3)


def demo_report(
    out: str | os.PathLike[str], *, tokens: int = 2000, seed: int = 0, overwrite: bool = False, progress: bool = True
) -> Report:
    """Run every method and its control on skills and facts of the embedded model, and write one folder.

    Fitted, tuned and tested on standard-library modules, sums and sentences that the model never saw, apart from one
    another; facts are memorized, so they were seen, but the test questions are others than those fitted on. What is to be
    retained is the twin of the forgotten skill, English of Python; each other skill is measured too.

    Args:
        out: A new folder. `report.html` shows everything; the other way round, and the persons, also have a folder below.
        tokens: Tokens of each corpus to fit on; half as many are tuned and tested on.
        seed: Of splits, controls and the bootstrap.
        overwrite: Whether an earlier run in `out` is replaced.
        progress: Whether to show bars.

    Returns:
        The report on forgetting Python, with the other way round, and forgetting persons, as its parts.

    Raises:
        LensUnlearnError: If `out` holds something else, or a run and `overwrite` is not set.
    """
    with new_folder(out, overwrite=overwrite) as folder:
        return _written(folder, tokens=tokens, seed=seed, progress=progress)


def _written(folder: Path, *, tokens: int, seed: int, progress: bool) -> Report:
    model = load_model("demo")
    experiments, reports, known = [], [], {}
    command = f"lens-unlearn demo --tokens {tokens} --seed {seed} --out again"
    for forget, twin in (("python", "english"), ("english", "python")):
        others = [skill for skill in SKILLS if skill not in (forget, twin)]
        plan = Plan(
            model="demo",
            forget=f"demo:{forget}",
            retain=(f"demo:{twin}",),
            test_forget=f"demo:{forget}:test",
            test_retain=(f"demo:{twin}:test",),
            also={skill: f"demo:{skill}:test" for skill in others},
            methods=tuple(
                method.name for method in methods.METHODS if method.by_default
            ),  # of those that do, see below
            tokens=tokens,
            test_tokens=tokens // 2,
            retain_drop=BUDGET,
            seed=seed,
            controls=2,
            fractions=FRACTIONS,
            false_alarms=FALSE_ALARMS,
            sweep=forget == SKILLS[0],  # the other way round is told by its table
        )
        experiment = Experiment(plan, model, progress=progress, known=known)
        experiment.fit()
        experiments.append(experiment)
        report = experiment.report()
        report.provenance["command"] = command
        reports.append(replace(report, title=f"Forget {forget}, keep {twin}"))
    persons, delta = forget_persons(model, tokens=tokens // 2, seed=seed, progress=progress)
    persons.provenance["command"] = command
    whole = replace(reports[0], parts=(reports[1], persons))
    for part in ("the-other-way-round", "persons"):
        (folder / part).mkdir()
    experiments[1].write(folder / "the-other-way-round", reports[1])
    persons.to_csv(folder / "persons" / "metrics.csv")
    save_report(folder / "persons" / REPORT_FILE, persons)
    delta.save(folder / "persons" / "simu.safetensors", model, note="forgets eight of the demo's persons")
    write_settings(folder / "persons", persons.provenance, ("metrics.csv", "simu.safetensors", REPORT_FILE))
    below = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    experiments[0].write(folder, whole, below)
    return whole


def forget_persons(model: Model, *, tokens: int, seed: int, progress: bool) -> tuple[Report, Delta]:
    """Forget eight invented persons with SIMU, beside random updates and a model that never knew them.

    What is to be forgotten is measured on the questions trained on, as TOFU does; what is to be
    retained on persons that the training did not look at, and on every other skill.
    """
    train = {name: read_corpus(f"demo:{source}", model) for name, source in PERSONS.items()}
    attribution = attribute(model, train["forget"], progress=progress)
    training: dict[str, Any] = {"mask": critical(attribution), "steps": STEPS, "check_every": 4, "seed": seed}
    training["progress"] = progress
    delta = simu(model, train["forget"], train["retain"], unseen=train["unseen"], **training)
    tests = {"forget": train["forget"], "retain": read_corpus("demo:facts_retain:test", model).sample(tokens, seed)}
    tests["never seen"] = read_corpus("demo:facts_holdout:test", model)
    tests |= {s: read_corpus(f"demo:{s}:test", model, tokens=to_read(tokens)).sample(tokens, seed) for s in SKILLS[:-1]}
    conditions = {"simu": delta, "simu:control": controls_for(model, delta, [seed])}
    report = evaluate(model, tests, conditions, memorization=MOST, seed=seed, progress=progress)
    unaware = load_model(str(WITHOUT_FACTS_DIR))
    measuring = {"memorization": MOST, "seed": seed, "progress": progress}
    without = evaluate(unaware, {"forget": read_corpus(f"demo:{PERSONS['forget']}", unaware)}, {}, **measuring)
    quality = {name: forget_quality(report, without, condition=name) for name in ("base", "simu")}
    drawn = {
        "How the update was trained": figures.training_curves(delta),
        "Neurons that the answers depend on": figures.attribution_map(attribution, critical(attribution)),
    }
    found = {"forget_quality": {name: one.p for name, one in quality.items()}, "training": dict(delta.record)}
    title = "Forget eight persons, keep the others and every skill"
    about = {**report.provenance, **found}
    return replace(report, title=title, figures=drawn, provenance=about, interventions={"simu": delta}), delta
