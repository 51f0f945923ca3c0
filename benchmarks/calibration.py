r"""Whether intervals hold and verdicts are right: data with known truth, as often as asked, and how often it was covered.

    python benchmarks/calibration.py --trials 1000 --save benchmarks/outputs/calibration.json

Each trial draws documents (or questions, authors, seeds) from a population whose truth is known, puts what they add to a metric
through the code that reports use, and looks whether the interval covers the truth. Coverage should be 93 to 97 %. Under no effect
"beats its control" should be said in at most 3.5 % of the trials (nominal: 2.5 %). No model is run.

The population: a document has a log-normal number of tokens and an accuracy of its own; an edit loses each right token with a
probability that varies from document to document; a random control besides from seed to seed.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import record
from tqdm.auto import tqdm

from lens_unlearn.core.intervals import wilson
from lens_unlearn.evaluation.bootstrap import Scores, estimates
from lens_unlearn.evaluation.membership import _measures as areas
from lens_unlearn.evaluation.metrics import metric
from lens_unlearn.evaluation.report import BASE, Measure, Report, mean_of, separability
from lens_unlearn.reports.findings import findings

DRAWS = 1000
LOST = 0.3
"""The mean share of right tokens that an edit loses, where there is an effect."""
STRENGTHS = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])

Trial = Callable[[np.random.Generator], tuple[float, float, float]]
"""Draws one data set; returns both ends of an interval, and the truth."""


class Population:
    """Documents of a skill: how many tokens, and how many are right under each condition.

    Args:
        questions: Every document is a single answer, right or wrong, instead of many tokens.
        authors: Documents come in groups of ten that share what is particular to them.
    """

    def __init__(self, *, questions: bool = False, authors: bool = False) -> None:
        self.questions, self.authors = questions, authors

    def draw(
        self, n: int, random: np.random.Generator, lost: Mapping[str, list[np.ndarray | float]]
    ) -> tuple[np.ndarray, dict[str, list[np.ndarray]]]:
        """Draw documents: their tokens, and by condition the right ones under each of its interventions.

        Args:
            n: How many; of groups of ten, as many documents.
            random: The generator.
            lost: By condition, for each intervention, the mean share of right tokens that it loses.
        """
        size = np.ones(n) if self.questions else np.exp(random.normal(4, 0.7, n)).astype(int) + 2.0
        own = random.beta(6, 4, n // 10 if self.authors else n)
        own = np.repeat(own, 10) if self.authors else own
        right = random.binomial(size.astype(int), own)
        harm = random.beta(4, 4, len(own) // 10 if self.authors else n)
        harm = np.repeat(harm, 10) if self.authors else harm  # the same texts are hard for every edit
        kept: dict[str, list[np.ndarray]] = {BASE: [right.astype(float)]}
        for condition, shares in lost.items():
            kept[condition] = []
            for share in shares:
                particular = 0.7 + 0.6 * random.beta(4, 4, n)  # and some for this one alone
                chance = np.clip(2 * harm * np.asarray(share) * particular, 0, 1)
                kept[condition].append(random.binomial(right, 1 - chance).astype(float))
        return size, kept

    def scores(
        self, n: int, random: np.random.Generator, lost: Mapping[str, list[np.ndarray | float]], name: str, trial: int
    ) -> Scores:
        """Return what documents add to top-1 accuracy."""
        size, kept = self.draw(n, random, lost)
        units = [f"{name} {trial} {i // 10 if self.authors else i}" for i in range(n)]
        values = {condition: [part[:, None] for part in parts] for condition, parts in kept.items()}
        return Scores([metric("top1")], values, size[:, None], units)

    @cache  # noqa: B019
    def truth(self, lost: float) -> tuple[float, float]:
        """Return the accuracy of the unedited model, and the share of it that an edit loses."""
        random, base, after, size = np.random.default_rng(99), 0.0, 0.0, 0.0
        for _ in range(20):
            tokens, kept = self.draw(100_000, random, {"edit": [lost]})
            base, after, size = base + kept[BASE][0].sum(), after + kept["edit"][0].sum(), size + tokens.sum()
        return base / size, 1 - after / base


DOCUMENTS, QUESTIONS, AUTHORS = Population(), Population(questions=True), Population(questions=True, authors=True)


def report_of(scores: Mapping[str, Scores]) -> Report:
    """Return the report of what several corpora's documents add."""
    return Report({(c, name, m): one for name, s in scores.items() for c, m, one in estimates(s, DRAWS, 0)})


def ends(measure: Measure, truth: float) -> tuple[float, float, float]:
    return (*measure.interval(), truth)


def one_corpus(population: Population, n: int, of: str) -> Trial:
    """The accuracy on one corpus, what an edit loses of it, and the difference to the unedited model."""

    def trial(random: np.random.Generator) -> tuple[float, float, float]:
        report = report_of({"forget": population.scores(n, random, {"edit": [LOST]}, "forget", 0)})
        base, drop = population.truth(LOST)
        if of == "value":
            return ends(report[BASE, "forget", "top1"], base)
        if of == "drop":
            return ends(report.drop("edit", "forget"), drop)
        return ends(report["edit", "forget", "top1"].minus(report[BASE, "forget", "top1"]), -base * drop)

    return trial


def selectivity(n: int, m: int) -> Trial:
    """Forget drop minus retain drop, of corpora of unlike size."""

    def trial(random: np.random.Generator) -> tuple[float, float, float]:
        sizes = {"forget": (n, LOST), "retain": (m, LOST / 3)}
        report = report_of({k: DOCUMENTS.scores(d, random, {"edit": [s]}, k, 0) for k, (d, s) in sizes.items()})
        return ends(report.selectivity("edit"), DOCUMENTS.truth(LOST)[1] - DOCUMENTS.truth(LOST / 3)[1])

    return trial


def seeds(random: np.random.Generator, count: int, spread: float) -> list[np.ndarray | float]:
    """Draw the shares that random controls lose: normal, since what hundreds of random neurons do adds up."""
    return [float(share) for share in LOST * (1 + spread * np.clip(random.standard_normal(count), -3, 3))]


def control(count: int, spread: float) -> Trial:
    """What random controls lose, on average over seeds and documents."""

    def trial(random: np.random.Generator) -> tuple[float, float, float]:
        lost = {"edit:control": seeds(random, count, spread)}
        report = report_of({"forget": DOCUMENTS.scores(60, random, lost, "forget", 0)})
        # The loss is linear in the share as long as no chance is cut off at 1, which it is not here.
        return ends(report.drop("edit:control", "forget"), DOCUMENTS.truth(LOST)[1])

    return trial


def dealt(drawn: Scores, condition: str, random: np.random.Generator) -> Scores:
    """Return what is known where each document is read under one of a condition's interventions."""
    parts = np.stack(drawn.values[condition])
    of = random.permutation(parts.shape[1]) % len(parts)
    values = {**drawn.values, condition: [parts[of, np.arange(len(of))]]}
    return replace(drawn, values=values, dealt={condition: of})


def shared(n: int, count: int, spread: float, lost: float = LOST) -> Trial:
    """What random controls that share the documents lose, on average over seeds and documents."""

    def trial(random: np.random.Generator) -> tuple[float, float, float]:
        shares = {"edit:control": [share * lost / LOST for share in seeds(random, count, spread)]}
        drawn = dealt(DOCUMENTS.scores(n, random, shares, "forget", 0), "edit:control", random)
        return ends(report_of({"forget": drawn}).drop("edit:control", "forget"), DOCUMENTS.truth(lost)[1])

    return trial


def over_skills(random: np.random.Generator) -> tuple[float, float, float]:
    """The mean cost over the runs of `compare`: each skill's test documents are among the others' retain corpora."""
    names = ("a", "b", "c")
    texts = {name: DOCUMENTS.scores(30, random, {"edit": [LOST / 3]}, name, 0) for name in names}
    costs = []
    for forgotten in names:
        rest = [texts[name] for name in names if name != forgotten]
        values = {c: [np.concatenate([one.values[c][0] for one in rest])] for c in rest[0].values}
        counts, units = np.concatenate([one.counts for one in rest]), [unit for one in rest for unit in one.units]
        costs.append(report_of({"retain": Scores(rest[0].metrics, values, counts, units)}))
    mean = Report({key: mean_of([one[key] for one in costs]) for key in costs[0].measures})
    return ends(mean.drop("edit", "retain"), DOCUMENTS.truth(LOST / 3)[1])


def sweep(random: np.random.Generator, gap: float) -> tuple[Report, dict[str, float]]:
    """Draw a sweep over strengths, with controls of three seeds; return the true gap at each strength too.

    Method and control vary alike, from corpus to corpus and seed to seed; of the method, the retain corpus loses less by `gap`.
    """
    sides: dict[str, dict[str, list[np.ndarray | float]]] = {"forget": {}, "retain": {}}
    for strength in STRENGTHS:
        for side, lost in sides.items():
            own, *chance = strength / 2 * (1 + 0.06 * np.clip(random.standard_normal(4), -3, 3))
            lost[f"edit@{strength:g}"] = [float(own) * (1 - gap if side == "retain" else 1)]
            lost[f"edit:control@{strength:g}"] = [float(share) for share in chance]
    report = report_of({side: DOCUMENTS.scores(40, random, lost, side, 0) for side, lost in sides.items()})
    per_share = DOCUMENTS.truth(LOST)[1] / LOST  # the loss is linear in the share: no chance is cut off at 1
    edits = [name for name in sides["forget"] if ":control" not in name]
    return report, {n: per_share * float(sides["forget"][n][0] - sides["retain"][n][0]) for n in edits}


def largest_gap(gap: float) -> Trial:
    """The gap at the strength of a sweep at which it is largest."""

    def trial(random: np.random.Generator) -> tuple[float, float, float]:
        report, truth = sweep(random, gap)
        found = separability(report, conditions=list(truth))
        return found.gap_low, found.gap_high, truth[found.at]

    return trial


def membership(n: int, m: int) -> Trial:
    """The area under the ROC curve of scores of two normal distributions one standard deviation apart."""

    def trial(random: np.random.Generator) -> tuple[float, float, float]:
        inside, outside = random.normal(0, 1, n), random.normal(1, 1, m)
        scores = {BASE: [[{"mia_loss": inside}], [{"mia_loss": outside}]]}
        units = [[f"{side} {i}" for i in range(count)] for side, count in (("in", n), ("out", m))]
        measure = next(iter(areas(scores, units, 0.5, DRAWS, 0)))[2]
        return ends(measure, 0.7602499389065233)  # Phi(1 / sqrt 2)

    return trial


def detected(n: int, random: np.random.Generator, shares: Mapping[str, list[float]], side: str) -> Report:
    """Return the report of detectors that find each document with a probability, and of what they find all is lost."""
    drawn = DOCUMENTS.scores(n, random, {}, side, 0)
    [right] = drawn.values[BASE]
    kept = {name: [right * (random.random((n, 1)) >= share) for share in own] for name, own in shares.items()}
    scores = replace(drawn, values={BASE: [right], **kept})
    return Report({(c, side, m): one for c, m, one in estimates(scores, DRAWS, 0, judging=shares, name=side)})


def found(n: int, p: float) -> Trial:
    """The share lost where a detector finds each document with a probability."""
    return lambda random: ends(detected(n, random, {"edit": [p]}, "retain").drop("edit", "retain"), p)


def share(n: int, p: float) -> Trial:
    """Wilson's interval of a share."""
    return lambda random: (*wilson(int(random.binomial(n, p)), n), p)


KINDS: dict[str, Trial] = {
    "accuracy, 12 documents": one_corpus(DOCUMENTS, 12, "value"),
    "accuracy, 20 documents": one_corpus(DOCUMENTS, 20, "value"),
    "accuracy, 100 documents": one_corpus(DOCUMENTS, 100, "value"),
    "accuracy, 60 questions": one_corpus(QUESTIONS, 60, "value"),
    "accuracy, 20 authors of 10 questions": one_corpus(AUTHORS, 200, "value"),
    "share lost, 12 documents": one_corpus(DOCUMENTS, 12, "drop"),
    "share lost, 20 documents": one_corpus(DOCUMENTS, 20, "drop"),
    "share lost, 100 documents": one_corpus(DOCUMENTS, 100, "drop"),
    "share lost, 60 questions": one_corpus(QUESTIONS, 60, "drop"),
    "share lost, 20 authors of 10 questions": one_corpus(AUTHORS, 200, "drop"),
    "difference to the unedited model, 20 documents": one_corpus(DOCUMENTS, 20, "difference"),
    "forget lost minus retain lost, 20 and 20 documents": selectivity(20, 20),
    "forget lost minus retain lost, 15 and 80 documents": selectivity(15, 80),
    "random control, 5 seeds that differ": control(5, 0.25),
    "random control, 3 seeds that differ": control(3, 0.25),
    "random control, 5 seeds that hardly differ": control(5, 0.03),
    "mean cost over the 3 skills of compare": over_skills,
    "largest gap of 8 strengths, no selectivity": largest_gap(0.0),
    "largest gap of 8 strengths, selective": largest_gap(0.4),
    "membership AUC, 30 and 50 documents": membership(30, 50),
    "share of 60 queries, Wilson": share(60, 0.1),
    "share lost, 2 % of 50 documents found by a detector": found(50, 0.02),
    "share lost, 1 % of 200 documents found by a detector": found(200, 0.01),
    "share lost, 30 % of 40 documents found by a detector": found(40, 0.3),
    "random control, 5 seeds that differ and share 60 documents": shared(60, 5, 0.25),
    "random control, 5 seeds that hardly differ and share 60 documents": shared(60, 5, 0.03),
    "random control, 5 seeds that differ, share 200 documents and lose 3 %": shared(200, 5, 0.25, 0.03),
    "random control, 3 seeds that differ and share 60 documents": shared(60, 3, 0.25),
    "random control, 5 seeds that differ and share 20 documents": shared(20, 5, 0.25),
}


def verdict_of(report: Report) -> str:
    return findings(report, "top1")[0].verdict


def single(random: np.random.Generator, count: int, spread: float, *, deal: bool = False) -> str:
    """A method that is one more random control: what is said of it?"""
    lost: dict[str, list[np.ndarray | float]] = {}
    retained: dict[str, list[np.ndarray | float]] = {}
    for name, many in (("edit", 1), ("edit:control", count)):
        lost[name], retained[name] = seeds(random, many, spread), seeds(random, many, spread)
    sides = {"forget": lost, "retain": retained}
    drawn = {k: DOCUMENTS.scores(40, random, v, k, 0) for k, v in sides.items()}
    return verdict_of(report_of({k: dealt(s, "edit:control", random) for k, s in drawn.items()} if deal else drawn))


def chance(random: np.random.Generator) -> str:
    """A detector that finds as much of the skill as of the rest, beside three others: what is said of it?"""
    shares = {"edit": [0.05], "edit:control": [0.05] * 3}
    return verdict_of(detected(40, random, shares, "forget") + detected(40, random, shares, "retain"))


VERDICTS: dict[str, Callable[[np.random.Generator], str]] = {
    "beats its control: one more random control, 5 seeds that differ": lambda r: single(r, 5, 0.25),
    "beats its control: one more random control, 3 seeds that differ": lambda r: single(r, 3, 0.25),
    "beats its control: no edit does anything in particular, 5 seeds": lambda r: single(r, 5, 0.0),
    "beats its control: the best of 8 strengths, 3 seeds": lambda r: verdict_of(sweep(r, 0.0)[0]),
    "beats its control: a detector that finds 5 % of everything, 3 seeds": chance,
    "beats its control: one more random control, 5 seeds that differ and share the documents": lambda r: single(
        r, 5, 0.25, deal=True
    ),
    "beats its control: no edit does anything in particular, 5 seeds that share the documents": lambda r: single(
        r, 5, 0.0, deal=True
    ),
}


def streams(trials: int, kind: int) -> Iterator[np.random.Generator]:
    return (np.random.default_rng([trial, kind]) for trial in range(trials))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    args, stored = record.begin(parser)
    stored.about(resamples=DRAWS)
    table = stored.table("coverage", ["interval", "covered", "too low", "too high", "mean width"])
    for number, (name, trial) in enumerate(KINDS.items()):
        if args.only in name:
            found = np.array(
                [trial(random) for random in tqdm(streams(args.trials, number), total=args.trials, leave=False)]
            )
            low, high, truth = found.T
            shares = [np.mean((low <= truth) & (truth <= high)), np.mean(high < truth), np.mean(low > truth)]
            table.row([name, *(f"{share:.1%}" for share in shares), f"{np.mean(high - low):.3f}"])
    table = stored.table("verdicts", ["verdict under no effect", "said", "trials"])
    for number, (name, judge) in enumerate(VERDICTS.items()):
        if args.only in name:
            said = [
                judge(random) for random in tqdm(streams(args.trials, 100 + number), total=args.trials, leave=False)
            ]
            table.row([name, f"{said.count('beats') / len(said):.1%}", len(said)])
    stored.end()


if __name__ == "__main__":
    main()
