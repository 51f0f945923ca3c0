r"""How often a budget is broken on fresh documents by what `tune` chooses, and by the strength a point estimate would choose.

    python benchmarks/budgets.py --model ../shared/models/skillmix --texts ../shared/data/skillmix_fit \
        --save benchmarks/outputs/budgets.json

Simulated: documents whose true loss at every strength is known go through the same bootstrap, bound and search as in `tune`; in a
fifth of the runs a document loses everything or nothing, as where a method abstains. Real: methods forget skills of the embedded
demo model and of a model on disk; each retain source is split into documents to fit on, to tune on and fresh ones, 60 of either of
the latter. A budget is broken where any retain corpus loses more than it. The point estimate is the rule that `tune` had before:
the strength that forgets most while all retain texts together lose no more than the budget, on the same documents and grid.
"""

import argparse
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import begin

import lens_unlearn as lu
from lens_unlearn.core.errors import BudgetError
from lens_unlearn.core.intervals import wilson
from lens_unlearn.evaluation.bootstrap import Scores, estimates
from lens_unlearn.evaluation.metrics import metric
from lens_unlearn.evaluation.report import BASE, Measure, Report
from lens_unlearn.methods import by_name
from lens_unlearn.methods.budget import CONFIDENCE, strengths_from, upper_bound, within
from lens_unlearn.methods.method import Method
from lens_unlearn.methods.tuning import cut_prompts

BUDGET = 0.05
RULES = ("bound", "point estimate")
TOP1 = metric("top1")


@dataclass
class Run:
    """One search: by rule, which strength was chosen, and by retain corpus what it loses."""

    name: str
    chosen: dict[str, float | None] = field(default_factory=dict)
    """None where no strength was found to keep the budget."""
    fresh: dict[str, list[float]] = field(default_factory=dict)
    """On fresh documents, by retain corpus."""
    true: dict[str, list[float]] = field(default_factory=dict)
    """Known of simulated documents alone."""
    together: dict[str, float] = field(default_factory=dict)
    """On the fresh documents of all retain corpora."""
    forgotten: dict[str, float] = field(default_factory=dict)
    """On fresh documents to forget; known of real ones alone."""


# --- simulated documents --------------------------------------------------------------------------------------------------


@dataclass
class Documents:
    """Documents of one source: how many tokens each predicts right unedited, and what it loses at a strength."""

    right: np.ndarray
    tokens: np.ndarray
    lost: Callable[[float], np.ndarray]

    def report(self, strength: float) -> Measure:
        """Return the share that is lost, with bootstrap draws paired with the unedited model."""
        values = {BASE: self.right, "edit": self.right - self.lost(strength)}
        scores = Scores([TOP1], {name: [v[:, None]] for name, v in values.items()}, self.tokens[:, None])
        report = Report({(name, "retain", m): one for name, m, one in estimates(scores, 1000, 0)})
        return report.drop("edit", "retain")

    def share(self, strength: float) -> float:
        """Return the share of what was right that is lost."""
        return float(self.lost(strength).sum() / self.right.sum())


@dataclass
class Source:
    """Where simulated documents come from: a curve of the true loss over strength, and how documents differ."""

    curve: Callable[[float], float]
    spread: float
    """Of the documents' own factor on the loss, gamma with mean 1: its standard deviation. Infinite: all or nothing."""
    gains: float
    """Tokens that become right, for each token that is lost."""
    length: float
    accuracy: float

    def true(self, strength: float) -> float:
        """Return the expected share that is lost."""
        if np.isinf(self.spread):
            return self.curve(strength)
        factors = np.random.default_rng(0).gamma(self.spread**-2, self.spread**2, 100_000)
        return float(np.minimum(1, self.curve(strength) * factors).mean()) * (1 - self.gains)

    def draw(self, count: int, random: np.random.Generator) -> Documents:
        """Draw documents: the tokens of each have thresholds of their own, so a stronger edit loses those of a weaker and more."""
        tokens = np.maximum(4, random.lognormal(np.log(self.length), 0.6, count)).astype(int)
        right = np.maximum(1, random.binomial(tokens, random.beta(10 * self.accuracy, 10 * (1 - self.accuracy), count)))
        if np.isinf(self.spread):
            at = random.uniform(size=count)
            return Documents(right.astype(float), tokens.astype(float), lambda s: right * (at < self.curve(s)))
        factors = random.gamma(self.spread**-2, self.spread**2, count)
        lost_at, gained_at = ([random.uniform(size=n) for n in right] for _ in "12")

        def lost(strength: float) -> np.ndarray:
            rate = np.minimum(1, self.curve(strength) * factors)
            return np.array(
                [
                    float((lose < r).sum()) - float((gain < self.gains * r).sum())
                    for lose, gain, r in zip(lost_at, gained_at, rate, strict=True)
                ]
            )

        return Documents(right.astype(float), tokens.astype(float), lost)


def _loss(at_edge: float, edge: float, power: float, strength: float) -> float:
    return min(1.0, at_edge * (strength / edge) ** power)


def simulated(number: int) -> Run:
    """Search on simulated documents, and look at others from the same sources."""
    random = np.random.default_rng(number)
    at_once = number % 5 == 4
    edge, power = np.exp(random.uniform(np.log(0.01), np.log(0.8))), random.uniform(0.7, 2.5)
    sources = []
    for _ in range(int(random.integers(1, 4))):
        dear = random.uniform(0.3, 1.0) if sources else 1.0
        curve = functools.partial(_loss, BUDGET * dear, edge, power)
        spread = np.inf if at_once else random.uniform(0.2, 1.5)
        sources.append(
            Source(curve, spread, random.uniform(0, 0.6), random.choice([20, 60, 150]), random.uniform(0.2, 0.7))
        )
    counts = [int(random.choice([50, 100, 200] if at_once else [15, 30, 50, 100])) for _ in sources]
    tuning, fresh = ([s.draw(n, random) for s, n in zip(sources, counts, strict=True)] for _ in "12")
    grid, run = strengths_from(0.005), Run(f"simulated {number}{', all or nothing' if at_once else ''}")
    known: dict[float, list[Measure]] = {}

    def measured(strength: float) -> list[Measure]:
        return known.setdefault(strength, [part.report(strength) for part in tuning])

    def bound(strength: float) -> float:
        return max(upper_bound(d, n, at_once=at_once) for d, n in zip(measured(strength), counts, strict=True))

    def pooled(strength: float) -> float:
        return _pooled(tuning, strength)

    for rule, cost in zip(RULES, (bound, pooled), strict=True):
        passed = within(grid, cost, BUDGET, 10)
        run.chosen[rule] = chosen = passed[-1] if passed else None
        if chosen is not None:
            run.fresh[rule] = [part.share(chosen) for part in fresh]
            run.true[rule] = [source.true(chosen) for source in sources]
            run.together[rule] = _pooled(fresh, chosen)
    return run


def _pooled(documents: Sequence[Documents], strength: float) -> float:
    return sum(float(d.lost(strength).sum()) for d in documents) / sum(float(d.right.sum()) for d in documents)


# --- real models ----------------------------------------------------------------------------------------------------------


DEMO = (("python", ("esperanto", "arithmetic")), ("facts", ("esperanto", "arithmetic")))
SKILLS = (("code", ("math",)), ("math", ("code",)))
METHODS = ("selective-pruning", "neuron-adjust", "key-space-detection")
DOCUMENTS, FIT, READ = 60, 3000, 200_000
"""Documents to tune on, and fresh ones; tokens to fit to, and to read."""


def parts_of(source: str, model: Any, window: int, seed: int, documents: int) -> dict[str, Any]:
    """Read a source and split it by document; to tune on and fresh, rows of so many documents."""
    corpus = lu.read_corpus(source, model, tokens=READ, window=window)
    fit, *others = corpus.split(1, 1, 1, seed=seed)
    tune, fresh = (part.sample(1, seed, units=documents) for part in others)
    return {"fit": fit.sample(FIT, seed), "tune": tune, "fresh": fresh}


def real(name: str, model: Any, forget: str, retain: dict[str, str], method: str, window: int, seed: int) -> Run:
    """Tune a method by either rule, and measure what it chose on fresh documents."""
    run, record = Run(name), by_name(method)
    skill = parts_of(forget, model, window, seed, DOCUMENTS // 2)
    others = {name: parts_of(source, model, window, seed, DOCUMENTS) for name, source in retain.items()}
    texts = prompted(record, skill["fit"], _joined([part["fit"] for part in others.values()]))
    fit = record.fit(model, *texts, {"progress": False})
    tuning, fresh = (
        cut_prompts({"forget": skill[use], **{name: part[use] for name, part in others.items()}}, [record])
        for use in ("tune", "fresh")
    )
    quiet: dict[str, Any] = {"progress": False, "batch_size": 32}
    held_out = tuning["forget"], {name: tuning[name] for name in others}
    edits: dict[str, Any] = {}
    tried = Report({})
    try:
        found = lu.tune(record, model, *fit, held_out=held_out, retain_drop=BUDGET, **quiet)
        edits["bound"], run.chosen["bound"], tried = found.intervention, found.fraction, found.report
    except BudgetError:
        run.chosen["bound"] = None
    tried = tried if tried.measures else lu.evaluate(model, tuning, {}, **quiet)

    def pooled(strength: float) -> float:
        nonlocal tried
        label = f"{record.name}@{strength:g}"
        if label not in tried.conditions:
            tried += lu.evaluate(model, tuning, {label: record.at(model, fit, strength, {})}, base=tried, **quiet)
        return together(tried, label, list(others))

    passed = within(strengths_from(min(record.grid) / 2), pooled, BUDGET, 10)
    best = max(passed, key=lambda s: tried.drop(f"{record.name}@{s:g}", "forget").value, default=None)
    run.chosen["point estimate"] = best
    if best is not None:
        edits["point estimate"] = record.at(model, fit, best, {})
    report = lu.evaluate(model, fresh, edits, **quiet)
    for rule in edits:
        run.fresh[rule] = [report.drop(rule, name).value for name in others]
        run.together[rule] = together(report, rule, list(others))
        run.forgotten[rule] = report.drop(rule, "forget").value
    return run


def prompted(record: Method, forget: Any, retain: Any) -> tuple[Any, Any]:
    """Cut what is fitted on into prompts, if the method judges those."""
    cut = cut_prompts({"forget": forget, "retain": retain}, [record])
    return cut["forget"], cut["retain"]


def _joined(corpora: Sequence[Any]) -> Any:
    return functools.reduce(operator.add, corpora)


def together(report: Report, condition: str, corpora: Sequence[str]) -> float:
    """Return the share of top-1 accuracy lost on the tokens of several corpora together."""
    right = [
        sum(report[name, corpus, "top1"].value * report[name, corpus, "top1"].n for corpus in corpora)
        for name in (condition, BASE)
    ]
    return 1 - right[0] / right[1]


def real_runs(args: argparse.Namespace) -> Iterator[Run]:
    """Run every method on skills of both models, with several seeds."""
    seeds = range(args.real)
    demo = lu.load_model("demo")
    jobs = [
        ("demo", demo, f"demo:{skill}", {other: f"demo:{other}" for other in others}, skill) for skill, others in DEMO
    ]
    if args.model:
        model = lu.load_model(args.model)
        jobs += [
            (Path(args.model).name, model, f"{args.texts}/{skill}.jsonl", {o: f"{args.texts}/{o}.jsonl" for o in others}, skill)
            for skill, others in SKILLS
        ]  # fmt: skip
    cases = [
        (*job, METHODS[(number + place) % len(METHODS)], number) for place, job in enumerate(jobs) for number in seeds
    ]
    for label, model, forget, retain, skill, method, seed in cases:
        yield real(f"{label}: {skill}, {method}, seed {seed}", model, forget, retain, method, args.window, seed)


# --- the table ------------------------------------------------------------------------------------------------------------


def rates(runs: Sequence[Run], rule: str) -> list[str]:
    """Return a row: how many runs chose an edit, in how many the budget is broken, and what is lost and forgotten on average.

    Shares are of all runs: one in which no strength was found to keep the budget changes nothing, and keeps it.
    """
    chose = [run for run in runs if run.chosen[rule] is not None]

    def share(broken: Callable[[Run], bool]) -> str:
        count = sum(map(broken, chose))
        low, high = wilson(count, len(runs))
        return f"{count / len(runs):.1%} [{low:.1%}, {high:.1%}]"

    known = [run for run in chose if run.true]
    forgot = [run.forgotten[rule] for run in chose if run.forgotten]
    return [
        rule,
        f"{len(chose)} of {len(runs)}",
        share(lambda run: max(run.fresh[rule]) > BUDGET),
        share(lambda run: run.together[rule] > BUDGET),
        share(lambda run: max(run.true[rule]) > BUDGET) if known else "",
        f"{np.mean([max(run.fresh[rule]) for run in chose]):.1%}" if chose else "",
        f"{np.mean(forgot):.1%}" if forgot else "",
    ]


COLUMNS = ("runs", "rule", "chose", "broken", "broken_together", "truly_broken", "mean_worst_loss", "mean_forgotten")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model on disk, beside the demo")
    parser.add_argument("--texts", help="a folder with a SKILL.jsonl of each of its skills")
    parser.add_argument("--simulated", type=int, default=200, help="runs")
    parser.add_argument("--real", type=int, default=5, help="seeds of each pair of skills")
    parser.add_argument("--window", type=int, default=48)
    parser.add_argument("--tiny", action="store_true", help="few runs, to see that it works")
    args, record = begin(parser, arguments)
    torch.set_num_threads(1)
    if args.tiny:
        args.simulated, args.real = 5, 1
    record.about(budget=BUDGET, confidence=CONFIDENCE, documents=DOCUMENTS)
    known = [simulated(number) for number in range(args.simulated)]
    table = record.table("rates", COLUMNS)
    for kind, runs in (
        ("simulated", known),
        ("simulated, graded", [run for run in known if "nothing" not in run.name]),
        ("simulated, all or nothing", [run for run in known if "nothing" in run.name]),
    ):
        for rule in RULES if runs else ():
            table.row([kind, *rates(runs, rule)])
    each = record.table("real", ("run", "rule", "strength", "worst_loss", "loss_together", "forgotten"))
    found: list[Run] = []
    for run in real_runs(args) if args.real else ():
        found.append(run)
        for rule in RULES:
            at = run.chosen[rule]
            lost = [] if at is None else [max(run.fresh[rule]), run.together[rule], run.forgotten[rule]]
            each.row(
                [run.name, rule, "none" if at is None else f"{at:g}", *(f"{share:.1%}" for share in lost or [0, 0, 0])]
            )
    table = record.table("real rates", COLUMNS)
    for rule in RULES if found else ():
        table.row(["real", *rates(found, rule)])
    record.end()


if __name__ == "__main__":
    main()
