"""passes_tests: what passes, what fails, and that nothing a program does outlives it."""

import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation import code_tests
from lens_unlearn.evaluation.answer_matching import program
from lens_unlearn.evaluation.code_tests import ISOLATIONS, Isolation, check_runner, isolation, passes_tests

pytestmark = pytest.mark.skipif(os.name != "posix", reason="code runs with limits on POSIX systems only")

ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


WAYS = [way for way in ISOLATIONS if not way.command or shutil.which(way.command[0])]


@pytest.fixture(params=WAYS, ids=lambda way: way.command[0] if way.command else "limits")
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Isolation:
    """Every way of this system to keep a program apart."""
    if not code_tests._passes_here(request.param):
        pytest.skip(f"{request.param.command[0]} does not work on this system")
    monkeypatch.setattr(code_tests, "isolation", lambda: request.param)
    return request.param


def passes(code: str, tests: list[str] = TESTS, setup: str = "", seconds: float = 20.0) -> bool:
    return passes_tests(code, tests, setup, allow_code_execution=True, seconds=seconds)


@pytest.mark.parametrize(
    "answer", ["[BEGIN]\n{}\n[DONE]", "[BEGIN]\n{}", "{}\n[DONE]\nand more", "  [BEGIN] \n{}\n", "{}"]
)
def test_a_right_program_between_marks_passes_and_a_wrong_one_does_not(answer: str) -> None:
    for body, right in (("return a + b", True), ("return a - b", False)):
        text = program(answer.format(f"def add(a, b):\n    {body}"))
        assert passes_tests(text, ["assert add(2, 3) == 5"], allow_code_execution=True) == right


def test_the_runner_works_here() -> None:
    check_runner()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (ADD, True),
        (ADD.replace("\n", "\r\n"), True),
        ("def add(a, b):\n    return a - b", False),
        ("def add(a, b):\n    return 3", False),
        ("", False),
        ("I do not know.", False),
        (ADD + "\nThis adds two numbers: it is\n    simple.", True),
        (ADD + "\n\ndef other(x", True),
        (ADD + "[DONE]", True),
        (ADD + "\nIt is simple\n'really'\n", True),
        (ADD + "add(1)", False),
        (ADD + "\x00", True),
        ("import math, re, collections, itertools, functools, random, string, heapq, typing\n" + ADD, True),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\n" + ADD, True),
        (ADD + "if __name__ == '__main__':\n    input()", True),
        (ADD + "input()", False),
        (ADD + "raise ValueError", False),
        (ADD + "raise KeyboardInterrupt", False),
    ],
)
def test_a_program_passes_if_every_test_runs_to_its_end(code: str, expected: bool) -> None:
    assert passes(code) is expected


def test_setup_stands_between_the_program_and_its_tests() -> None:
    assert passes(ADD, ["assert add(x, 2) == 3"], "x = add(1, 0)")
    assert not passes(ADD, ["assert add(x, 2) == 3"])
    assert not passes(ADD, ["assert add(1,"])


@pytest.mark.parametrize(
    "leave",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os\nos._exit = os.write = print\nimport sys; sys.exit(0)",
        "import threading\nthreading.excepthook = None\nraise SystemExit(0)",
    ],
)
def test_leaving_before_the_tests_is_no_pass(leave: str) -> None:
    assert not passes(ADD + leave)
    assert not passes(ADD.replace("    return", f"    exec({leave!r})\n    return"))


def test_an_endless_program_is_killed() -> None:
    began = time.monotonic()
    assert not passes(ADD + "while True: pass", seconds=1.0)
    assert not passes(ADD + "import time\ntime.sleep(1000)", seconds=1.0)
    assert not passes(
        ADD + "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass", seconds=1.0
    )
    assert time.monotonic() - began < 15


def test_output_without_end_fills_nothing() -> None:
    assert not passes(ADD + "while True: print('x' * 100000)", seconds=1.0)
    assert passes("print('x' * 1000000)\n" + ADD)


def test_memory_is_limited() -> None:
    assert not passes(ADD + "x = bytearray(1 << 30)")
    assert not passes(ADD + "x = []\nwhile True: x.append('x' * 1000000)")
    assert passes(ADD + "x = bytearray(1 << 24)")
    assert not passes("def add(a, b):\n    return add(a, b)")


ACTS = [
    # Files, processes, connections.
    "open(path, 'w').write('x')",
    "open(path, 'a')",
    "import os; os.open(path, os.O_CREAT | os.O_WRONLY)",
    "import pathlib; pathlib.Path(path).touch()",
    "import os; os.mkdir(path)",
    "import os; os.remove(kept)",
    "import os; os.rename(kept, path)",
    "import shutil; shutil.rmtree(os.path.dirname(kept))",
    "import sqlite3; sqlite3.connect(path)",
    "import subprocess; subprocess.run(['touch', path])",
    "import os; os.system('touch ' + path)",
    "import os; os.fork()",
    "import os; os.execv('/bin/touch', ['touch', path])",
    "import os; os.posix_spawn('/bin/touch', ['touch', path], {})",
    "import _posixsubprocess",
    "import ctypes",
    "import socket; socket.socket()",
    "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))",
    "import numpy",
    # What an audit hook is not told of, and what is outside.
    "import os, signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
    "import os; os.kill(os.getppid(), 9)",
    "import os; os.mkfifo(path)",
    "import os, stat; os.mknod(path, stat.S_IFREG)",
    "import os; os.symlink('/etc', path)",
    "import posix; posix.mkfifo(path)",
    "open('/proc/self/../1/environ').read()",
    "open(kept).read()",
    "import os; os.read(os.open(kept, os.O_RDONLY), 1)",
    "import _posixshmem; _posixshmem.shm_open('/made', 66, 0o600)",
    "open('/proc/%d/environ' % __import__('os').getppid()).read()",
]


def test_nothing_outside_is_made_changed_read_or_signalled(way: Isolation, tmp_path: Path) -> None:
    kept, path = tmp_path / "kept", tmp_path / "made"
    kept.write_text("x")
    names = f"path, kept = {str(path)!r}, {str(kept)!r}\n"
    # Refused by an exception, which a program may catch and go on; and this process still runs.
    tried = f"done = []\nfor act in {ACTS!r}:\n    try:\n        exec(act)\n        done.append(act)\n    except Exception: pass\n"
    assert passes(names + tried + ADD, ["assert done == []", *TESTS])
    assert not passes(f"{names}{ACTS[0]}\n{ADD}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept"]
    assert kept.read_text() == "x"


def test_its_folder_is_empty_and_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_tests.tempfile, "tempdir", str(tmp_path))
    assert passes("import os\nassert os.listdir() == [] and set(os.environ) <= {'LC_CTYPE', 'PWD'}\n" + ADD)
    assert not passes("import time; time.sleep(100)", seconds=0.5)
    assert list(tmp_path.iterdir()) == []


def test_a_secret_of_this_process_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    assert passes("import os\nassert 'MY_TOKEN' not in os.environ\n" + ADD)


def test_what_a_program_started_is_killed_with_it(
    way: Isolation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fork is refused already; if a program finds another way, its children are killed with it."""
    mark = f"left-{tmp_path.name}-{os.getpid()}"
    script = tmp_path / f"{mark}.py"  # its path is in the command of every child, as seen from outside
    script.write_text(
        "import os, sys, time\n"
        "[os.fork() for _ in range(3)]\n"  # eight processes in each of both roles
        "time.sleep(0.2 if sys.argv[1] == {role!r} else 1000)\n"
    )
    monkeypatch.setattr(code_tests, "SCRIPT", str(script))
    for role in ("tests", "nobody"):
        script.write_text(script.read_text().replace("{role!r}", repr(role)))
        assert not passes(ADD, seconds=1.0)
        deadline = time.monotonic() + 10
        while (left := commands(mark)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert left == []


def commands(mark: str) -> list[str]:
    """Give the commands of running processes that hold a mark; those that are dead and not yet buried have none."""
    found = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True)
    return [line for line in found.stdout.splitlines() if mark in line]


def test_nothing_runs_unless_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(LensUnlearnError, match="pass allow_code_execution=True"):
        passes_tests(ADD, TESTS)
    with pytest.raises(LensUnlearnError, match="there is no unit test"):
        passes_tests(ADD, [], allow_code_execution=True)


def test_a_system_without_limits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "none.py"
    script.write_text("raise SystemExit('no limits')")
    monkeypatch.setattr(code_tests, "SCRIPT", str(script))
    with pytest.raises(LensUnlearnError, match="cannot be run with limits on this system"):
        check_runner()


def test_the_program_runs_in_the_same_python() -> None:
    assert passes(f"import sys\nassert sys.version_info[:2] == {sys.version_info[:2]}\n" + ADD)


AGREES = "class Agrees:\n" + "".join(
    f"    def __{name}__(self, *other): return {value}\n"
    for name, value in (
        *((name, "True") for name in ("eq", "lt", "gt", "le", "ge", "bool", "contains")),
        *((name, "self") for name in ("sub", "rsub", "abs", "round", "add")),
    )
)


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        # What is right is not for the program to say.
        (AGREES + "def add(a, b): return Agrees()", TESTS),
        (AGREES + "def add(a, b): return Agrees()", ["assert 3 == add(1, 2)"]),
        (AGREES + "def add(a, b): return Agrees()", ["assert abs(add(1, 2) - 3) < 1e-6"]),
        (AGREES + "def add(a, b): return Agrees()", ["assert add(1, 2) < 4"]),
        (AGREES + "def add(a, b): return [Agrees()]", ["assert add(1, 2) == [3]"]),
        (AGREES + "def add(a, b): return Agrees()", ["assert 3 in add(1, 2)"]),
        # Nor to leave in its place.
        ("import os\nadd = os._exit", ["assert add(42)"]),
        ("import os\ndef add(a, b): os._exit(42)", TESTS),
        ("import sys\ndef add(a, b): sys.exit(42)", TESTS),
        ("def add(a, b): raise SystemExit", TESTS),
        # What stood in __main__ was enough to write the verdict.
        (
            "import __main__\n__main__.write(__main__.verdict, __main__.task['secret'].encode())\n__main__.finish(0)",
            TESTS,
        ),
        ("import __main__, os\nos._exit(__main__.PASSED)", TESTS),
        # The program may not have the tests' process do something else.
        *(
            (
                "import json, os\ndef add(a, b):\n"
                f"    message = json.dumps(['ask', {operation!r}, {args!r}, ['dict', []]]).encode() + b'\\n'\n"
                "    for descriptor in range(3, 32):\n"
                "        try: os.write(descriptor, message)\n        except OSError: pass\n"
                "    return 0\n",
                TESTS,
            )
            for operation, args in (
                ("__call__", [["of", "os", "_exit"], 42]),
                ("__call__", [["of", "builtins", "exit"], 42]),
                ("getattr", [["of", "builtins", "print"], "__self__"]),
                ("names", []),
            )
        ),
    ],
)
def test_a_verdict_cannot_be_forged(code: str, tests: list[str]) -> None:
    assert not passes(code, tests)


NODE = "class Node:\n    def __init__(self, value):\n        self.value, self.next = value, None\n"


CASES = [
    ("def apply(f, x): return f(f(x))", "assert apply(lambda x: x + 1, 1) == 3", "== 4"),
    ("def sort(x): x.sort()", "x = [3, 1]; sort(x); assert x == [1, 3]", "== [3, 1]"),
    ("def mark(x): x['a'] = 1", "x = {}; mark(x); assert x == {'a': 1}", "== {}"),
    ("def count(n):\n    yield from range(n)", "assert list(count(3)) == [0, 1, 2]", "== [0]"),
    (
        NODE + "def last(n):\n    while n.next: n = n.next\n    return n.value",
        "n = Node(1); n.next = Node(2); assert last(n) == 2",
        "== 1",
    ),
    (
        NODE + "def head(n): return n",
        "n = Node(1); assert isinstance(head(n), Node) and head(n).value == 1",
        "== 2",
    ),
    (
        "from collections import Counter\ndef c(x): return Counter(x)",
        "assert c('aab') == {'a': 2, 'b': 1}",
        "== {}",
    ),
    ("import math\ndef r(x): return math.sqrt(x)", "assert r(2) == math.sqrt(2)", "== 2"),
    ("from fractions import Fraction\ndef h(): return Fraction(1, 2)", "assert h() == Fraction(2, 4)", "== 1"),
    (
        "def every(): return (1, 2.5, True, None, 's', b'b', {3}, 1j, range(2))",
        "assert every() == (1, 2.5, True, None, 's', b'b', {3}, 1j, range(2))",
        "== ()",
    ),
    ("def big(): return 10 ** 5000", "assert big() % 7 == 10 ** 5000 % 7", "== 9"),
    (
        "class E(Exception): pass\ndef f(x):\n    if x: raise ValueError('no')\n    raise E",
        "try:\n    f(1)\nexcept ValueError as e:\n    said = str(e)\nassert said == 'no'",
        "== 'yes'",
    ),
    ("def nan(): return float('nan')", "assert repr(nan()) == 'nan'", "== 'inf'"),
    ("total = 3", "assert total == 3", "== 4"),
]
"""A program, a test that it passes, and an end of that test for which it does not."""


def test_what_a_right_program_does_goes_through_and_is_compared() -> None:
    code, tests = "\n".join(one for one, _, _ in CASES), [test for _, test, _ in CASES]
    assert passes(code, tests)
    for _, test, end in CASES:
        wrong = textwrap.indent(test[: test.rindex("==")] + end, "    ")
        tests.append(f"try:\n{wrong}\nexcept AssertionError: pass\nelse: raise ValueError")
    assert passes(code, tests)


def test_tests_may_have_classes_of_their_own() -> None:
    setup = "class Point:\n    def __init__(self, x): self.x = self._x = x\n    def twice(self): return 2 * self.x"
    assert passes("def f(p): return p.twice() + p.x", ["assert f(Point(2)) == 6"], setup)
    assert not passes("def f(p): return p._x", ["assert f(Point(2))"], setup)


def test_the_first_way_that_works_here_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    works = [way for way in WAYS if code_tests._passes_here(way)]
    isolation.cache_clear()
    assert isolation() == works[0]
    isolation.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert isolation() == ISOLATIONS[-1]
    assert not ISOLATIONS[-1].command
    isolation.cache_clear()
