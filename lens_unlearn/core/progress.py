"""Progress of long work: bars that name the stage they belong to, and plain lines where the output is no terminal.

Knows how progress is shown; knows nothing of what is being done.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

with (
    warnings.catch_warnings()
):  # where a notebook has no ipywidgets, tqdm warns and draws a plain bar, which is all right
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm

__all__ = ["Bar", "say", "stage"]

EVERY = 20.0
"""Seconds between two lines of a bar where the output is no terminal."""

LINE = "{desc}{percentage:.0f}% of {total_fmt}{unit}, {elapsed} gone, {remaining} left, {rate_fmt}"
BRIEF = 2.0
"""Seconds within which what ends needs no line."""

_stage: ContextVar[str] = ContextVar("stage", default="")


class Bar(tqdm):
    """A bar of tqdm, with its arguments; its description begins with the stage, and in a log it is a line every so often."""

    def __init__(self, *args: Any, desc: str | None = None, disable: bool | None = False, **more: Any) -> None:
        self._lines = not disable and in_a_log()
        described = ": ".join(part for part in (_stage.get(), desc) if part)
        if self._lines:  # a line costs no more than a look at the clock, until it is due
            more |= {"mininterval": EVERY, "miniters": 0, "file": sys.stderr, "gui": False}
            more |= {"bar_format": LINE} if more.get("total") else {}
        described += ": " if described else ""  # as tqdm does where it is set later
        super().__init__(*args, desc=described or None, disable=disable, **more)

    def called(self, desc: str) -> None:
        """Say what is being done now, behind the stage."""
        self.set_description(": ".join(part for part in (_stage.get(), desc) if part), refresh=False)

    def display(self, *args: Any, **more: Any) -> Any:
        """Show how far it is: in a log as a line of its own."""
        if not self._lines:
            return super().display(*args, **more)
        if self.n or not self.total:  # nothing is said of what has not begun
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return True

    def close(self) -> None:
        """Show how far it came, and end."""
        if not self._lines or self.disable:
            super().close()
            return
        if self.format_dict["elapsed"] > BRIEF:
            self.display()
        self.disable = True  # what tqdm does at the end moves the cursor
        self._decr_instances(self)  # pyright: ignore[reportAttributeAccessIssue]


def in_a_log() -> bool:
    """Whether progress goes where nothing can be drawn over: neither to a terminal nor to a notebook."""
    return "ipykernel" not in sys.modules and not (sys.stderr is not None and sys.stderr.isatty())


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Let the bars of a `with` block begin with the name of a stage."""
    token = _stage.set(name)
    try:
        yield
    finally:
        _stage.reset(token)


def say(line: str, shown: bool = True) -> None:
    """Write a line beside the bars, if anything is to be shown."""
    if shown:
        tqdm.write(line, file=sys.stderr)
