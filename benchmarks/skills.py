"""Skills of a model: documents to fit on, drawn anew for each seed, and others to measure on."""

from collections.abc import Mapping, Sequence
from typing import Any

from record import percent

import lens_unlearn as lu
from lens_unlearn.evaluation.report import Report

SITES = ("mlp.pre", "mlp.post", "attn.z")
Edits = Mapping[str, Sequence[lu.Intervention]]


class Skills:
    """Each skill can be forgotten; the others, in equal parts, are then the retain corpus.

    Args:
        model: A loaded model.
        fit: A folder with a NAME.jsonl of texts for each skill.
        test: Another, to measure on.
        names: Of the skills.
        fit_tokens: Drawn by each seed, of each skill.
        test_tokens: Of each skill, as rows drawn from all documents: an interval needs many of them, more than many tokens.
        units: How many documents at least.
        window: Tokens of a row.
    """

    def __init__(
        self,
        model: Any,
        fit: str = "../shared/data/skillmix_fit",
        test: str = "../shared/data/skillmix_heldout",
        names: Sequence[str] = ("code", "math", "prose"),
        *,
        fit_tokens: int = 5000,
        test_tokens: int = 1200,
        units: int = 10,
        window: int = 128,
    ) -> None:
        self.model, self.names, self.fit_tokens = model, tuple(names), fit_tokens

        def read(folder: str, skill: str, tokens: int) -> lu.Corpus:
            return lu.read_corpus(f"{folder}/{skill}.jsonl:text", model, tokens=tokens, window=window)

        # Five times as much as is fitted on, so that each seed has other documents.
        self._whole = {skill: read(fit, skill, 5 * fit_tokens) for skill in names}
        self.test = {skill: read(test, skill, 10**6).sample(test_tokens, units=units) for skill in names}
        self._known: dict[tuple[str, int], lu.Moments] = {}
        self.base = lu.evaluate(model, self.test, {}, progress=False)

    def _moments(self, skill: str, seed: int) -> tuple[lu.Corpus, lu.Moments]:
        corpus = self._whole[skill].sample(self.fit_tokens, seed=seed)
        if (skill, seed) not in self._known:
            statistic = lu.Moments(extra=("sqrt",))
            self._known[skill, seed] = lu.collect(self.model, corpus, SITES, statistic=statistic, progress=False)
        return corpus, self._known[skill, seed]

    def fit(self, skill: str, seed: int) -> tuple[lu.Corpus, lu.Corpus, lu.Moments, lu.Moments]:
        """Return what is forgotten and what is retained with a seed: texts, and their moments at `SITES`."""
        forget, of_forget = self._moments(skill, seed)
        others = [self._moments(other, seed) for other in self.names if other != skill]
        retain, of_retain = others[0]
        for corpus, statistic in others[1:]:
            retain, of_retain = retain + corpus, of_retain.merge(statistic)
        return forget, retain, of_forget, of_retain

    def evaluate(self, edits: Edits) -> Report:
        """Measure interventions on the test documents; those of all seeds are one condition."""
        return lu.evaluate(self.model, self.test, edits, progress=False, base=self.base)

    def pruned(self, skill: str, seeds: Sequence[int], **options: Any) -> Report:
        """Measure Selective Pruning of a skill, a selection a seed: "pruned", and as many random units per layer: "control"."""
        edits = []
        for seed in seeds:
            texts, moments = self.fit(skill, seed)[:2], self.fit(skill, seed)[2:]
            collects = options.get("steps", 1) > 1 or options.get("unit") == "direction"
            edits.append(lu.selective_pruning(self.model, *(texts if collects else moments), progress=False, **options))
        random = [lu.random_pruning(self.model, like=edit, seed=seed) for edit, seed in zip(edits, seeds, strict=True)]
        return self.evaluate({"pruned": edits, "control": random})

    def lost(self, report: Report, condition: str, metric: str = "top1") -> list[str]:
        """Return the share of the accuracy that is lost on each skill."""
        return [percent(report.drop(condition, skill, metric)) for skill in self.names]
