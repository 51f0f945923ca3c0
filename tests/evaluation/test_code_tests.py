"""passes_tests: what passes, what fails, and that nothing a program does outlives it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation import code_tests
from lens_unlearn.evaluation.answer_matching import program
from lens_unlearn.evaluation.code_tests import check_runner, passes_tests

pytestmark = pytest.mark.skipif(os.name != "posix", reason="code runs with limits on POSIX systems only")

ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


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


@pytest.mark.parametrize(
    "act",
    [
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
    ],
)
def test_files_processes_and_connections_are_refused(act: str, tmp_path: Path) -> None:
    kept, path = tmp_path / "kept", tmp_path / "made"
    kept.write_text("x")
    names = f"path, kept = {str(path)!r}, {str(kept)!r}\n"
    assert not passes(names + act + "\n" + ADD)
    # Refused by an exception, which a program may catch and go on.
    assert passes(f"{names}try:\n    {act}\nexcept (Exception, SystemExit):\n    pass\n{ADD}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept"]


def test_its_folder_is_empty_and_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_tests.tempfile, "tempdir", str(tmp_path))
    assert passes("import os\nassert os.listdir() == [] and set(os.environ) <= {'LC_CTYPE'}\n" + ADD)
    assert not passes("import time; time.sleep(100)", seconds=0.5)
    assert list(tmp_path.iterdir()) == []


def test_a_secret_of_this_process_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    assert passes("import os\nassert 'MY_TOKEN' not in os.environ\n" + ADD)


def test_what_a_program_started_is_killed_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork is refused already; if a program finds another way, its children are killed as a group."""
    note = tmp_path / "pids"
    runner = (
        "import os, sys, time\n"
        "pids = [os.fork() for _ in range(3)]\n"  # seven children
        f"open({str(note)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        "if all(pids):\n    time.sleep(0.5)\n    {end}\n"
        "time.sleep(1000)"
    )
    for end in ("os._exit(0)", "time.sleep(1000)"):
        note.unlink(missing_ok=True)
        monkeypatch.setattr(code_tests, "_RUNNER", runner.replace("{end}", end))
        assert not passes(ADD, seconds=2.0)
        pids = [int(line) for line in note.read_text().split()]
        assert len(pids) == 8
        deadline = time.monotonic() + 10
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet buried does not."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return bool(found.stdout.strip()) and not found.stdout.strip().startswith("Z")


def test_nothing_runs_unless_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(LensUnlearnError, match="pass allow_code_execution=True"):
        passes_tests(ADD, TESTS)
    with pytest.raises(LensUnlearnError, match="there is no unit test"):
        passes_tests(ADD, [], allow_code_execution=True)


def test_a_system_without_limits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_tests, "_RUNNER", "raise SystemExit('no limits')")
    with pytest.raises(LensUnlearnError, match="cannot be run with limits on this system"):
        check_runner()


def test_the_program_runs_in_the_same_python() -> None:
    assert passes(f"import sys\nassert sys.version_info[:2] == {sys.version_info[:2]}\n" + ADD)
