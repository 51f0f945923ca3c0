"""Names that become files and folders: refused where they could lead elsewhere, or stand for something else.

Knows what file systems take; knows nothing of what is named.
"""

import re
from collections.abc import Iterable
from typing import Any

from pathvalidate import ValidationError, validate_filename

from lens_unlearn.core.errors import LensUnlearnError

__all__ = ["check_name"]

_NAME = re.compile(r"\w[\w .+-]*")
LONGEST = 150
"""Bytes of a name: what is written under it has endings, and temporary names, of its own."""


def check_name(name: Any, what: str, taken: Iterable[str] = ()) -> str:
    """Return a name that can be a file or a folder on every system.

    Args:
        name: What was given.
        what: What it is to name, for the message; such as "a skill".
        taken: Names that mean something else there; in small and capital letters they are the same.

    Raises:
        LensUnlearnError: If it has separators, control characters, dots or blanks at its ends, or is empty, too long, or reserved.
    """
    if not isinstance(name, str):
        raise LensUnlearnError(f"a {type(name).__name__} cannot name {what}: give a text")
    shown = ascii(name) if len(ascii(name)) <= 60 else f"{ascii(name)[:57]}..."
    try:
        # Besides what no system takes, whatever a shell, a spreadsheet or the command line would read as something else.
        if not _NAME.fullmatch(name):
            raise ValueError
        validate_filename(name, platform="universal", max_len=LONGEST, check_reserved=True)
    except (ValidationError, ValueError) as error:
        raise LensUnlearnError(
            f"{shown} cannot name {what}: use letters, digits, blanks, and . _ + -, at most {LONGEST} bytes, and no reserved name"
        ) from error
    if name.casefold() in {one.casefold() for one in taken}:
        raise LensUnlearnError(f"{shown} cannot name {what}: that name means something else there")
    return name
