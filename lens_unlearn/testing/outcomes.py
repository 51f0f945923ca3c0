"""`ModelChecks`: what was found of a model, as one table.

Knows outcomes and how they are shown; knows nothing of how they are found.
"""

import html
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lens_unlearn.core.text import visible

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ModelChecks", "Outcome", "Row"]

Outcome = Literal["works", "absent", "fails"]
"""Of "absent" the model has none, or it is refused by name; what "fails" is there, and not as it should be."""
_MARKS = {"works": "✓", "absent": "–", "fails": "✗"}


@dataclass(frozen=True)
class Row:
    """One thing that was looked at."""

    check: str
    what: str
    """Of which kind of site; empty where it is of the whole model."""
    outcome: Outcome
    words: str
    """What was found, or why it does not work."""


@dataclass(frozen=True)
class ModelChecks:
    """What works in a model, and why the rest does not: what `check_model` returns.

    Attributes:
        name: Of the model.
        rows: What was looked at, in order.
    """

    name: str
    rows: tuple[Row, ...]

    @property
    def failed(self) -> tuple[Row, ...]:
        """What is in the model, and is not as it should be. Empty where all is well."""
        return tuple(row for row in self.rows if row.outcome == "fails")

    def outcomes(self) -> dict[str, Outcome]:
        """Return the outcome of everything that was looked at, such as ``{"ablation of mlp.post": "works"}``."""
        return {_subject(row): row.outcome for row in self.rows}

    def to_frame(self) -> "pd.DataFrame":
        """Give one row per check."""
        import pandas as pd

        return pd.DataFrame([[row.check, row.what, row.outcome, row.words] for row in self.rows],
                            columns=["check", "of", "outcome", "found"])  # fmt: skip

    def summary(self) -> str:
        """Say in one line how it went."""
        if self.failed:
            failed = ", ".join(map(_subject, self.failed))
            return f"{len(self.failed)} of {len(self.rows)} checks of {self.name} failed: {failed}"
        works = sum(row.outcome == "works" for row in self.rows)
        return f"{self.name}: {works} checks passed, none failed; {len(self.rows) - works} are of what it does not have"

    def __str__(self) -> str:
        width = max((len(_subject(row)) for row in self.rows), default=0)
        lines = [f"{_MARKS[row.outcome]} {_subject(row):{width}}  {row.words}".rstrip() for row in self.rows]
        return visible("\n".join([*lines, "", self.summary()]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def cells(*texts: str) -> str:
            return "".join(f'<td style="text-align:left">{html.escape(visible(text))}</td>' for text in texts)

        body = "".join(f"<tr>{cells(_MARKS[row.outcome], _subject(row), row.words)}</tr>" for row in self.rows)
        return f"<div><table>{body}</table><p>{html.escape(visible(self.summary()))}</p></div>"


def _subject(row: Row) -> str:
    return f"{row.check} of {row.what}" if row.what else row.check


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line, and without the places of files."""
    lines = str(error).strip().splitlines() or ["without a word"]
    return re.sub(r" \(/[^)]*\)", "", lines[0])
