"""`lens-unlearn demo`: forget Python and keep English, then the other way round, then forget persons; one report."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lens_unlearn import figures, methods
from lens_unlearn.core import distributed
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
    out: str | os.PathLike[str],
    *,
    tokens: int = 2000,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    apart: bool = False,
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
        apart: Whether a second process does the other way round and the persons meanwhile, each with half of the threads.

    Returns:
        The report on forgetting Python, with the other way round, and forgetting persons, as its parts.

    Raises:
        LensUnlearnError: If `out` holds something else, or a run and `overwrite` is not set.
    """
    with new_folder(out, overwrite=overwrite) as folder:
        settings = {"tokens": tokens, "seed": seed}
        with _meanwhile(apart, _further, folder, {**settings, "progress": progress and not apart}) as further:
            experiment, report = _direction(load_model("demo"), "python", "english", **settings, progress=progress)
            whole = replace(report, parts=further())
        below = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        experiment.write(folder, whole, below)
        return whole


def _direction(
    model: Model, forget: str, twin: str, *, tokens: int, seed: int, progress: bool
) -> tuple[Experiment, Report]:
    """Forget one skill and retain its twin, with every method."""
    first = forget == SKILLS[0]  # the other way round is told by its table
    others = [skill for skill in SKILLS if skill not in (forget, twin)]
    plan = Plan(
        model="demo",
        forget=f"demo:{forget}",
        retain=(f"demo:{twin}",),
        test_forget=f"demo:{forget}:test",
        test_retain=(f"demo:{twin}:test",),
        also={skill: f"demo:{skill}:test" for skill in others},
        methods=tuple(method.name for method in methods.METHODS if method.by_default),  # of those that do, see below
        tokens=tokens,
        test_tokens=tokens // 2,
        retain_drop=BUDGET,
        seed=seed,
        controls=2,
        fractions=FRACTIONS,
        false_alarms=FALSE_ALARMS,
        sweep=first,
    )
    experiment = Experiment(plan, model, progress=progress)
    experiment.announce()
    experiment.fit()
    report = experiment.report()
    report.provenance["command"] = _command(tokens, seed)
    return experiment, replace(report, title=f"Forget {forget}, keep {twin}")


def _further(folder: Path, settings: dict[str, Any]) -> tuple[Report, Report]:
    """Do and write the other way round, and the persons."""
    model = load_model("demo")
    for part in ("the-other-way-round", "persons"):
        (folder / part).mkdir()
    experiment, report = _direction(model, "english", "python", **settings)
    experiment.write(folder / "the-other-way-round", report)
    persons, delta = forget_persons(model, **{**settings, "tokens": settings["tokens"] // 2})
    persons.provenance["command"] = _command(settings["tokens"], settings["seed"])
    persons.to_csv(folder / "persons" / "metrics.csv")
    save_report(folder / "persons" / REPORT_FILE, persons)
    delta.save(folder / "persons" / "simu.safetensors", model, note="forgets eight of the demo's persons")
    write_settings(folder / "persons", persons.provenance, ("metrics.csv", "simu.safetensors", REPORT_FILE))
    return report, persons


def _command(tokens: int, seed: int) -> str:
    return f"lens-unlearn demo --tokens {tokens} --seed {seed} --out again"


@contextmanager
def _meanwhile(apart: bool, work: Callable[..., Any], *given: Any) -> Iterator[Callable[[], Any]]:
    """Yield what returns the result of some work, which a second process does meanwhile; else it is done when asked for."""
    if not apart or distributed.count() > 1:  # of which each would start one that joins them
        yield partial(work, *given)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        pool = multiprocessing.get_context("spawn").Pool(1, _begin, (torch.get_num_threads(),))
        try:
            yield pool.apply_async(work, given).get
        except BaseException:  # whatever it does by then
            pool.terminate()
            raise
        else:  # it ends by itself, and takes its semaphores with it
            pool.close()
        finally:
            pool.join()
    finally:
        torch.set_num_threads(threads)


def _begin(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears of it, and ends this one
    torch.set_num_threads(threads)


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
