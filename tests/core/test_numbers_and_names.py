"""Numbers and names that can be asked for: what is out of range, of another type or means something else is refused by name."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from lens_unlearn.core.errors import LensUnlearnError, SelectionError
from lens_unlearn.core.names import LONGEST, check_name
from lens_unlearn.core.numbers import NUMBERS, SHARE, STRENGTH, Range, check_numbers

NEVER = (
    True,
    False,
    np.bool_(True),
    torch.tensor(True),
    math.nan,
    math.inf,
    -math.inf,
    "1",
    b"1",
    [1],
    {},
    1j,
    10**400,
)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", NEVER, ids=repr)
def test_what_is_no_number_is_none_of_any_name(name: str, value: Any) -> None:
    with pytest.raises(LensUnlearnError, match=rf"^{name}=[^\n]*: give a (whole )?number[^\n]*$"):
        check_numbers(**{name: value})


@pytest.mark.parametrize(
    ("name", "below", "first", "last", "beyond"),
    [
        ("retain_drop", -1e-9, 0, 1, 5),
        ("confidence", 0.49, 0.5, 0.999, 1),
        ("tokens", 1, 2, 10**9, 2.5),
        ("window", 1, 2, 4096, 64.5),
        ("seeds", 0, 1, 9, 1.5),
        ("controls", -1, 1, 9, 1.5),
        ("batch_size", 0, 1, 64, 0.5),
        ("seed", -1, 0, 2**63 - 1024, 2**63),
        ("answers", -1, 0, 100, 0.1),
        ("memorization", -3, 0, 100, 0.1),
        ("task_limit", 0, 1, 100, 1.5),
        ("max_new_tokens", 0, 1, 100, 1.5),
        ("temperature", -0.1, 0, 2, math.inf),
    ],
)
def test_each_number_has_its_range(name: str, below: float, first: float, last: float, beyond: float) -> None:
    for inside in (first, last, np.float64(first), np.int64(first) if first == int(first) else first):
        check_numbers(**{name: inside})
    check_numbers(**{name: None})
    for outside in (below, beyond):
        with pytest.raises(LensUnlearnError, match=f"^{name}={outside}"):
            check_numbers(**{name: outside})


def test_a_range_says_itself_and_returns_the_number() -> None:
    assert SHARE.check(torch.tensor(0.5), "x") == 0.5
    assert type(NUMBERS["tokens"].check(np.int64(3), "tokens")) is int
    with pytest.raises(SelectionError, match=r"^x=0 is not a strength: give a number above 0 and at most 1$"):
        STRENGTH.check(0, "x", SelectionError)
    said = {
        str(Range()): "a number that is finite",
        str(Range(high=3)): "a number up to 3",
        str(Range(2, whole=True)): "a whole number, at least 2",
        str(Range(0, above=True)): "a number above 0",
        str(Range(0, 1, below=True)): "a number from 0 to below 1",
        str(Range(0, 1, above=True, below=True)): "a number above 0 and below 1",
    }
    assert all(one == words for one, words in said.items())


@pytest.mark.parametrize("name", ["python", "Esperanto 2", "a.b", "x_y-z+1", "日本", "a" * LONGEST])
def test_ordinary_names_are_names(name: str) -> None:
    assert check_name(name, "a skill", taken=("kept", "run.json")) == name


@pytest.mark.parametrize(
    "name",
    [
        "run.json", "RUN.json", "kept", "a" * 300, "é" * (LONGEST // 2 + 1), "", " ", ".", "..", "../evil", "a/b", "a\\b", "/a",
        "C:a", "a\x00b", "a\nb", "a\x7f", "\u202ea", "\ud800", ".hidden", "-rf", "~", "a.", "a ", " a", "con", "NUL.txt", "lpt1",
        "a|b", "a*", "a?", "=1+1", "@x", "+1", None, 3, b"a", ["a"],
    ],
    ids=ascii,
)  # fmt: skip
def test_names_that_lead_elsewhere_or_mean_something_else_are_refused(name: Any) -> None:
    with pytest.raises(LensUnlearnError, match=r"^[^\n]{1,80} cannot name a skill: [^\n]*$"):
        check_name(name, "a skill", taken=("kept", "run.json"))
