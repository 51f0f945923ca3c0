"""`Benchmark`: everything that the function, the command line and the page need to know of a public benchmark.

Knows what a benchmark is made of: items that are asked, what is kept of a model's answers, and scores of these; knows no
benchmark by name. A new one is a file with a record, and a line in `lens_unlearn.benchmarks`.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lens_unlearn.benchmarks.asking import Asker
from lens_unlearn.benchmarks.files import Files
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.report import Measure

__all__ = ["Benchmark", "Data", "Item", "Raw", "Score"]


@dataclass(frozen=True)
class Item:
    """One prompt that a benchmark has continued."""

    id: str
    task: str
    split: str
    prompt: str
    """What the model is given, whole."""
    reference: str
    """The true continuation."""
    unit: str
    """What intervals resample whole, such as the document that several questions are about."""


@dataclass(frozen=True)
class Data:
    """A benchmark's files, read and checked, before there is a model."""

    items: tuple[Item, ...] = ()
    """What is generated, in order."""
    forget: tuple[dict[str, Any], ...] = ()
    """Rows that methods are fitted to forget: "question" and "answer", or "text"."""
    retain: tuple[dict[str, Any], ...] = ()
    """Rows that methods are to retain."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the benchmark reads."""
    notes: tuple[str, ...] = ()
    """What is left out for want of a file."""


@dataclass(frozen=True)
class Raw:
    """What is kept of one model under one intervention: scores are computed from it alone."""

    texts: tuple[str | None, ...] = ()
    """What it wrote to each item; None where its logits were no numbers."""
    left_out: tuple[int, ...] = ()
    """Items whose prompts are longer than its context."""
    numbers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Losses and other numbers by name, each in the order of its rows."""


@dataclass(frozen=True)
class Score:
    """What a benchmark makes of everybody's answers."""

    measures: dict[tuple[str, str], Measure]
    """By condition and metric, the official scores first."""
    notes: tuple[str, ...] = ()


Scorer = Callable[[Data, Mapping[str, Sequence[Raw]], int, int], Score]
"""Takes the data, by condition what is kept of each of its interventions, the number of resamples, and the seed."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, as the rest of the package sees it."""

    name: str
    """On the command line."""
    words: str
    """What pages call it."""
    official: Mapping[str, str]
    """The official scores, by metric, with the formula of each."""
    read: Callable[..., Data]
    """Takes ``(files, rows, *, options)``: reads and checks every file, before a model is loaded. Its keyword arguments are the
    benchmark's options, with their defaults."""
    ask: Callable[[Data, Asker], Raw]
    """Asks one model under one intervention."""
    score: Scorer
    summary: str
    """What it is and where it was published, in a sentence."""
    template: str = "{prompt} {answer}"
    """How the questions and answers that methods are fitted to are joined."""
    decoding: str = "greedy"
    """How texts are continued, in words."""

    @property
    def keywords(self) -> tuple[inspect.Parameter, ...]:
        """The options as `read` takes them."""
        return tuple(
            one
            for one in inspect.signature(self.read).parameters.values()
            if one.kind is inspect.Parameter.KEYWORD_ONLY
        )

    @property
    def options(self) -> dict[str, Any]:
        """The options with their defaults."""
        return {one.name: one.default for one in self.keywords}

    def check(self, options: Iterable[str]) -> None:
        """Refuse names that are none of its options.

        Raises:
            LensUnlearnError: If there is one; the message lists those that there are.
        """
        for name in options:
            if name not in self.options:
                raise LensUnlearnError(
                    f"{self.name} has no option {name!r}: its options are {', '.join(self.options) or 'none'}"
                )

    def data(self, source: Any, rows: int | None, options: Mapping[str, Any]) -> Data:
        """Read and check the files.

        Raises:
            CorpusError: If a file or a column is missing.
            LensUnlearnError: If there is no such option.
        """
        self.check(options)
        return self.read(Files.of(source, self.name), rows, **{**self.options, **options})
