"""The documents of an experiment: read once, split by document into what is fitted, tuned and tested on.

Memorized facts are not split: what forgetting some of them does to others is no measure of whether these are forgotten.
Knows sources and splits; knows nothing of methods but whether one needs prompts, and nothing of what is done with the parts.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.core.intervals import FEWEST
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.experiments.plan import Plan
from lens_unlearn.methods.tuning import cut_prompts
from lens_unlearn.model.host import Model

__all__ = ["Documents", "Reader", "reading_of", "to_read"]

READ = 25  # times the tokens that are used are read of each source, so that they come from many documents
FEWEST_READ = 50_000  # tokens, so that the parts of a source hold many documents even where few tokens are used
TUNED_ON = 50  # documents or groups of each retain source at least: fewer do not bound a few percent, where whole ones are lost
LONGEST = 256
"""Tokens of a row that are tested on, where a test is made as small as its intervals allow: these depend on the number of
documents, and the rest of a long one costs more than it tells."""
CUT = 128
"""Tokens of a plain text that are cut into a prompt and what follows: prompts count for nothing, and as much is read of them."""
QUERIES = 400  # prompts of each side that a method which judges prompts is fitted and tuned on


def to_read(tokens: int) -> int:
    """Return how many tokens of a source are read where some are used."""
    return max(READ * tokens, FEWEST_READ)


@dataclass
class Documents:
    """The documents of an experiment, by what they are used for."""

    fit: dict[str, Corpus]
    tune: dict[str, Corpus]
    """To forget, by that name, and to retain, by source, since the budget has to hold on each; by "retain" if there is one."""
    test: dict[str, Corpus]
    queries: dict[str, Corpus]
    """Prompts to fit on, for methods that judge prompts: from the same documents as `fit`."""
    retain_queries: list[Corpus]
    """Those of `queries` to retain, by source."""
    retain_fit: list[Corpus] = field(default_factory=list)
    """Those of `fit` to retain, by source."""
    retained: tuple[str, ...] = ()
    """Of `test`: the sources of which "retain" is made, each by itself, since the budget has to hold on each; none if it is one."""
    removed: dict[str, int] = field(default_factory=dict)
    """Documents removed from the fit because they also stand in a test source, and from retain those that are facts to forget."""

    @property
    def tuned_retain(self) -> dict[str, Corpus]:
        """What is tuned on of the texts to retain, by source."""
        return {name: corpus for name, corpus in self.tune.items() if name != "forget"}

    def tested_on(self, tokens: Mapping[str, int], units: int, seed: int, longest: int | None = None) -> "Documents":
        """Return the same with less to test on: of some corpora so many tokens, and so many documents at least.

        Args:
            tokens: By corpus; others stay as they are.
            units: Documents or groups, at least.
            seed: Of the draw.
            longest: Tokens of a row, at most: what intervals need is many documents, and not all of each.
        """
        cut = {name: self.test[name] if longest is None else self.test[name].shortened(longest) for name in tokens}
        return replace(
            self, test=self.test | {name: c.sample(tokens[name], seed, units=units) for name, c in cut.items()}
        )

    def counts(self) -> dict[str, Any]:
        """Return how many documents and tokens each part has, for a report's provenance."""
        counts = {
            use: {name: {"documents": c.n_documents, "tokens": c.n_tokens} for name, c in corpora.items()}
            for use, corpora in (("fit", self.fit), ("tune", self.tune), ("test", self.test))
        }
        return {**counts, "removed_from_fit": self.removed}

    def fingerprints(self, also: Collection[str] = ()) -> dict[str, str]:
        """Return a digest of every part: what has to be the same for an interrupted run to go on.

        Args:
            also: Of `test`: the corpora that the plan names as further ones.
        """
        # The sources of "retain" are left out: their documents are those of "test retain", and earlier runs did not test on each.
        test = {name: corpus for name, corpus in self.test.items() if name not in self.retained or name in also}
        parts = {"fit": self.fit, "tune": self.tune, "test": test, "queries of": self.queries}
        return {f"{use} {name}": c.fingerprint for use, corpora in parts.items() for name, c in corpora.items()}


def reading_of(plan: Plan, *, whole: bool) -> dict[str, Any]:
    """Return the options with which a source is read: to `to_read` tokens, or to its end."""
    return {
        "tokens": None if whole else to_read(plan.tokens),
        "shuffle": plan.shuffle,
        "seed": plan.seed,
        "template": plan.template,
        "window": plan.window,
        "answer_eos": plan.answer_eos,
        "prepend_bos": plan.prepend_bos,
        "chat": plan.chat,
        "system": plan.system,
    }


@dataclass
class Reader:
    """Reads the sources of a plan.

    Attributes:
        plan: Says which.
        model: Whose tokenizer to use.
        known: Sources read already, so that several roles, or several plans on one model, read each once.
    """

    plan: Plan
    model: Model
    known: dict[Any, Corpus]

    def corpus(self, source: str, *, whole: bool = False) -> Corpus:
        """Return a source, read to `to_read` tokens, or to its end."""
        settings = reading_of(self.plan, whole=whole)
        key = (source, *settings.values())
        if key not in self.known:
            self.known[key] = read_corpus(source, self.model, name=source, **settings)
        return self.known[key]

    def read(self) -> Documents:
        """Split every source by document, or take separate test sources, and draw the tokens that are used.

        Facts to forget are taken whole for every use, and removed from what is retained.

        Raises:
            CorpusError: If a source is too short to be split, or nothing could tell forget and retain apart.
        """
        plan = self.plan
        also = {name: self.corpus(source) for name, source in plan.also.items()}
        forget = self.corpus(plan.forget, whole=plan.facts)
        given = {"forget": [forget], "retain": [self.corpus(source) for source in plan.retain]}
        tests = {
            "forget": [self.corpus(plan.test_forget)] if plan.test_forget else [],
            "retain": [self.corpus(source) for source in plan.test_retain],
        }
        known = [*also.values(), *tests["forget"], *tests["retain"]]
        fit, tuning, test, tested, queries, removed = {}, {}, {}, {}, {}, {}
        asked: list[Corpus] = []
        parted: list[Corpus] = []
        if plan.facts:
            known.append(forget)
            tests["retain"] = [source.without(forget)[0] for source in tests["retain"]]
        judging = any(record.judges_prompts for record in plan.records.values())
        for name, sources in given.items():
            if plan.facts and name == "forget":
                removed[name] = 0
                fit[name] = self._pool(name, sources)
                tuning[name] = test[name] = self._pool(name, self._prompted(sources))
                queries |= {name: test[name]} if judging else {}
                continue
            shares = self._shares(tested=not tests[name])
            cleaned = [source.without(*known) for source in sources]
            removed[name] = sum(count for _, count in cleaned)
            split = zip(*(source.split(*shares.values(), seed=plan.seed) for source, _ in cleaned), strict=True)
            parts = dict(zip(shares, split, strict=True))
            parted = self._shared(parts["fit"], plan.tokens)  # in the end those to retain
            fit[name] = self._pool(name, parted)
            if "tune" in parts:
                tuning |= self._tuning(name, self._prompted(parts["tune"]))
            tested[name] = self._prompted(tests[name] or parts["test"])
            test[name] = self._pool(name, tested[name], plan.tokens)
            if judging:
                asked = self._queries(parts["fit"])
                queries[name] = self._pool(name, asked)
        if set(fit["forget"].keys) == set(fit["retain"].keys):
            raise CorpusError("forget and retain hold the same documents: nothing could tell them apart")
        test |= {name: self._pool(name, self._prompted([corpus]), plan.tokens) for name, corpus in also.items()}
        retained = self._retained(tested["retain"])
        test |= {name: corpus for name, corpus in retained.items() if name not in test}
        return Documents(fit, tuning, test, queries, asked, parted, tuple(retained), removed)

    def _retained(self, tested: Sequence[Corpus]) -> dict[str, Corpus]:
        """Draw what each of several sources to retain is tested on, by the name of a further corpus where it is one as well."""
        sources = self.plan.test_retain or self.plan.retain
        if len(sources) < 2:
            return {}
        known = {source: name for name, source in self.plan.also.items()}
        pooled = {known.get(source, source): corpus for source, corpus in zip(sources, tested, strict=True)}
        taken = ("forget", "retain")
        return {
            f"{name} (retained)" if name in taken else name: self._pool(name, [corpus], self.plan.tokens)
            for name, corpus in pooled.items()
        }

    def _shares(self, *, tested: bool) -> dict[str, float]:
        """Return the shares of a source by use; facts' neighbours are few, so of these no part lies idle without a budget."""
        if self.plan.facts and self.plan.retain_drop is None:
            return {"fit": 2 / 3, "test": 1 / 3} if tested else {"fit": 1.0}
        return {"fit": 0.4, "tune": 0.25, "test": 0.35} if tested else {"fit": 0.6, "tune": 0.4}

    def _tuning(self, name: str, corpora: Sequence[Corpus]) -> dict[str, Corpus]:
        """Draw what is tuned on: of each retain source by itself, and enough documents to bound what is lost."""
        names = self.plan.retain if len(corpora) > 1 else (name,)
        tokens = max(2, self.plan.tokens // 2 // len(corpora))
        units = FEWEST if name == "forget" else TUNED_ON
        sampled = (corpus.sample(tokens, self.plan.seed, units=units) for corpus in corpora)
        return dict(zip(names, sampled, strict=True))

    def _prompted(self, corpora: Sequence[Corpus]) -> list[Corpus]:
        records = list(self.plan.records.values())
        return [cut_prompts({"": corpus}, records, self.plan.seed, longest=CUT)[""] for corpus in corpora]

    def _queries(self, corpora: Sequence[Corpus]) -> list[Corpus]:
        """Draw prompts of every source, in equal numbers."""
        cut = self._prompted(corpora)
        per_source = -(-QUERIES // len(cut))
        return self._shared(cut, sum(per_source * c.n_tokens // c.n_rows for c in cut))

    def _pool(self, name: str, corpora: Sequence[Corpus], tokens: int | None = None) -> Corpus:
        """Join sources: each whole, or with an equal share of the tokens, drawn over all of its documents."""
        if tokens is not None:
            corpora = self._shared(corpora, tokens)
        joined = corpora[0]
        for more in corpora[1:]:
            joined = joined + more
        return replace(joined, name=f"{name} ({joined.name})")

    def _shared(self, corpora: Sequence[Corpus], tokens: int) -> list[Corpus]:
        """Draw an equal share of the tokens from each source, over all of its documents."""
        return [corpus.sample(max(2, tokens // len(corpora)), self.plan.seed) for corpus in corpora]
