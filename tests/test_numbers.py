"""Numbers of the README and of the results' page are those that a command printed, and the test of that can fail."""

import copy
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "make_results.py"

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="only where the repository is")


def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_results", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_results"] = module
    spec.loader.exec_module(module)
    return module


make = script() if SCRIPT.is_file() else None
PAGES = make.pages() if make else {}
STORED = make.outputs() if make else {}


@pytest.mark.parametrize("path", PAGES)
def test_every_number_of_a_page_is_in_its_output(path: str) -> None:
    assert [*make.problems(path, PAGES[path], STORED)] == []


def test_the_covered_pages_have_claims_and_tables() -> None:
    for path in make.COVERED:
        assert len(make.CLAIM.findall(PAGES[path])) > 10, path
    assert {match[1] for match in make.TABLE.findall(PAGES["docs/results.md"])} >= {"pruning", "simu", "relearning"}


# --- that it can fail, on copies that were tampered with -----------------------------------------------------------------


@pytest.mark.parametrize("path", make.COVERED if make else ())
def test_each_number_that_is_changed_by_hand_is_found(path: str) -> None:
    """The last digit of every number of every claim, one at a time."""
    page, changed = PAGES[path], 0
    for claim in make.CLAIM.finditer(page):
        if make.bound_of(claim):
            continue
        for number in re.finditer(make.SIGNED, claim["numbers"]):
            at = claim.start("numbers") + number.end() - 1
            other = page[:at] + str((int(page[at]) + 5) % 10) + page[at + 1 :]
            start = other.rfind("\n", 0, claim.start()) + 1
            again = next(m for m in make.CLAIM.finditer(other, start) if m.end() == claim.end())
            found = [*make.wrong(path, again, STORED)]
            if number.start() == 0 or len(re.findall(make.SIGNED, claim["numbers"])) == len(
                make.values_of(claim, STORED)
            ):
                assert found, f"{claim[0]} with {again['numbers']}"
                changed += 1
    assert changed > 10


TAMPERED = {
    "a cell of a table": (
        r"(<!-- table pruning\.budgets -->.*?% \[)",
        r"\g<1>9",
        "the table pruning.budgets is not the stored one",
    ),
    "the command": ("--budgets 0.05 0.10", "--budgets 0.05 0.20", "the command of pruning is not the stored one"),
    "a number in the prose": (r"\d\d %<!-- = pruning", "99 %<!-- = pruning", "'99 %', but the output gives"),
    "a range": (r"to\s+\d\d %<!-- = pruning", "to 99 %<!-- = pruning", "to 99 %', but the output gives"),
    "a number of nothing": ("Findings:", "Findings: it forgets 37 % more.", "'37 %' in "),
    "the source of a number": (
        r"<!-- = pruning\.budgets\[",
        " of <!-- = pruning.budgets[",
        "not right behind a number",
    ),
    "the name of a column": (r'\["control: selectivity"\]', '["selectivity"]', "has no column 'selectivity'"),
    "another section": (r"pruning\.budgets\[", "relearning.budgets[", "relearning.json has no table 'budgets'"),
}
"""What to look for, which is whatever was measured last; what to put there; and what is said of it."""


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_page_that_was_tampered_with_is_found(kind: str) -> None:
    before, after, expected = TAMPERED[kind]
    page, changed = re.subn(before, after, PAGES["docs/results.md"], count=1, flags=re.DOTALL)
    assert changed
    found = "\n".join(make.problems("docs/results.md", page, STORED))
    assert expected in found


def test_an_output_that_was_run_again_with_other_values_is_found_and_fills_the_page() -> None:
    stored = {name: make.Output(name, copy.deepcopy(output.stored)) for name, output in STORED.items()}
    rows = stored["pruning"].stored["tables"]["budgets"]["rows"]
    for row in rows:
        row[4] = "12.3% [10.0%, 14.0%]"
    page = PAGES["docs/results.md"]
    found = "\n".join(make.problems("docs/results.md", page, stored))
    assert "the table pruning.budgets is not the stored one" in found
    assert "but the output gives 12.3, 12.3" in found
    filled = make.filled(page, stored)
    assert "12 %<!-- = pruning.budgets(forgotten=" in filled
    assert filled.count("12.3% [10.0%, 14.0%]") == len(rows)
    assert [*make.problems("docs/results.md", filled, stored)] == []
    del stored["pruning"]
    assert "pruning.json is not there: run python docs/make_results.py --run pruning" in "\n".join(
        make.problems("docs/results.md", page, stored)
    )


# --- what an expression means, by hand -----------------------------------------------------------------------------------

ROWS = [
    ["code", "0", "45.1% [41.7%, 48.6%]", "math 10.3% [6.4%, 14.6%]", "p = 0.16", "0.310"],
    ["code", "1", "44.6% [41.0%, 48.0%]", "math 9.5%", "p = 2e-05", "0.177"],
    ["math", "0", "-4.6% [-8.3%, -1.0%]", "prose 5.0%", "", "1,234.5"],
]
TABLE = {"columns": ["skill", "seed", "lost", "other", "p", "share"], "rows": ROWS}


@pytest.fixture
def mini() -> dict[str, Any]:
    stored = {"argv": [], "command": "", "settings": {"budgets": [0.05], "tokens": 8000}, "tables": {"t": TABLE}}
    return {"x": make.Output("x", stored)}


RIGHT = (
    '45 %<!-- = x.t(skill="code")["lost"] -->',
    '.451<!-- = x.t(skill="code", seed=0)["lost"] -->',
    '44.6 to 45.1 %<!-- = x.t(skill="code")["lost"] -->',
    '45.1 and 44.6 %<!-- = x.t(skill="code")["lost"] -->',
    '-4.6 to 45.1 points<!-- = x.t["lost"] -->',
    'of seeds 0 and 1, 45 %<!-- = x.t(skill="code")["lost"].max() -->',
    '.18 to .31<!-- = x.t(skill="code")["share"] -->',
    '1,235<!-- = x.t(skill="math")["share"] -->',
    '1,234<!-- = x.t(skill="math")["share"] -->',  # the middle may be rounded either way
    'below 11 %<!-- = x.t["other"] -->',
    'more than 4 %<!-- = x.t["other"] -->',
    '.16 and .00002<!-- = x.t(skill="code")["p"] -->',
    '2 and 3<!-- = ((x.t["lost"] > x.t["other"]).sum(), len(x.t)) -->',
    '10, 10 and 5 %<!-- = x.t(skill=("code", "math"))["other"] -->',
    '49.7 points<!-- = x.t["lost"].max() - x.t["lost"].min() -->',
)
WRONG = (
    '44 %<!-- = x.t(skill="code")["lost"] -->',
    '45.0 %<!-- = x.t(skill="code")["lost"] -->',
    '.46<!-- = x.t(skill="code")["lost"] -->',
    '44.6 to 45.2 %<!-- = x.t(skill="code")["lost"] -->',
    '44.6 and 45.1 %<!-- = x.t(skill="code")["lost"] -->',
    '4.6 to 45.1 points<!-- = x.t["lost"] -->',
    '45<!-- = x.t(skill="code")["lost"] -->',
    'below 10 %<!-- = x.t["other"] -->',
    'more than 5 %<!-- = x.t["other"] -->',
    '10 and 5 %<!-- = x.t["other"] -->',
    '1 %<!-- = x.t["p"] -->',
    '1 %<!-- = x.t(skill="prose")["lost"] -->',
    '1 %<!-- = y.t["lost"] -->',
    '1 %<!-- = x.u["lost"] -->',
    '1 %<!-- = x.t["lost" -->',
)


@pytest.mark.parametrize("text", RIGHT)
def test_what_is_as_the_output_has_it(text: str, mini: dict[str, Any]) -> None:
    assert [*make.problems("README.md", f"## One\n\nIt is {text} here.\n", mini)] == []
    assert make.filled(text, mini) == text


@pytest.mark.parametrize("text", WRONG)
def test_what_is_not_as_the_output_has_it(text: str, mini: dict[str, Any]) -> None:
    assert [*make.problems("docs/other.md", f"## One\n\nIt is {text} here.\n", mini)] != []


def test_numbers_are_written_anew_as_they_were_written(mini: dict[str, Any]) -> None:
    for before, after in (
        ('9 to 9.9 %<!-- = x.t(skill="code")["lost"] -->', "45 to 45.1 %"),
        ('.99<!-- = x.t(skill="code", seed=0)["share"] -->', ".31"),
        ('0.9<!-- = x.t(skill="code", seed=0)["share"] -->', "0.3"),
        ('seed 0, 9,999.0<!-- = x.t(skill="math")["share"] -->', "seed 0, 1,234.5"),
        ('9 %<!-- = x.t(skill="nothing")["share"] -->', "9 %"),
    ):
        assert make.filled(before, mini).partition("<!--")[0] == after


def test_what_needs_no_output(mini: dict[str, Any]) -> None:
    claim = '45 %<!-- = x.t(skill="code")["lost"] -->'
    exempt = (
        "a budget of 5 %, 8,000 tokens, 95 % intervals, GPT-2, `37`, [37](https://x.org/37), arXiv 2403.01267, "
        "transformer-lens 3.9 to 4.3, July 2031\n```\n37\n```\n"
    )
    assert [*make.problems("README.md", f"## One\n{claim} {exempt}", mini)] == []
    for number in ("37", "6 %", ".18", "37 points", "8,001", "3.7"):
        assert len([*make.problems("README.md", f"## One\n{claim} {exempt} and {number} more", mini)]) == 1, number


def test_a_table_is_filled_as_markdown(mini: dict[str, Any]) -> None:
    page = make.filled("<!-- table x.t -->\n\n<!-- end -->\n", mini)
    lines = page.splitlines()
    assert lines[2:4] == ["| skill | seed | lost | other | p | share |", "| --- | --- | --- | --- | --- | --- |"]
    assert lines[5] == "| code | 1 | 44.6% [41.0%, 48.0%] | math 9.5% | p = 2e-05 | 0.177 |"
    assert make.filled(page, mini) == page


def test_the_commands_of_a_page_are_found_with_their_output() -> None:
    block = 'mkdir -p build\npython benchmarks/a.py --set "x y" \\\n    --save benchmarks/outputs/a.json\n'
    assert make.commands(f"# A\n```\n{block}```\n") == {"a": block}
    assert make.typed(block, "a") == [
        "python",
        "benchmarks/a.py",
        "--set",
        "x y",
        "--save",
        "benchmarks/outputs/a.json",
    ]


def test_outputs_that_a_page_names_are_whole_and_hold_no_path_of_a_machine() -> None:
    for name in sorted({name for text in PAGES.values() for name in make.commands(text)}):
        text = (ROOT / "benchmarks" / "outputs" / f"{name}.json").read_text(encoding="utf-8")
        assert not re.search(r'"(?:[^"]*[ =])?/(?!/)', text), f"{name} holds an absolute path"
        assert {"command", "argv", "settings", "versions", "seconds", "tables"} <= set(json.loads(text)), name


def test_commands_are_run_again_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = {"a": "echo threads $OMP_NUM_THREADS >&2; exit 3\n", "b": "true\n", "c": "false\n"}
    make.run(["a", "b"], blocks)
    assert capsys.readouterr().out.endswith("failed, and what they stored before is unchanged: a\n")
    with pytest.raises(SystemExit, match="no page stores an output d: choose from a, b, c"):
        make.run(["d"], blocks)
