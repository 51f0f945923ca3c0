"""`passes_tests`: run a program that a model wrote against its unit tests, apart from them and from this system."""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens_unlearn.core.errors import LensUnlearnError

__all__ = ["Isolation", "check_runner", "isolation", "passes_tests"]

MEMORY = 1 << 29  # bytes of address space
PASSED = 42
"""Exit status behind the last test; as in code_process.py, which imports nothing of this package."""
SCRIPT = str(Path(__file__).with_name("code_process.py"))


@dataclass(frozen=True)
class Isolation:
    """A way to keep a program apart from this system: the command that its process is begun with, and its first role."""

    words: str
    command: tuple[str, ...] = ()
    role: str = "program"


ISOLATIONS = (
    Isolation(
        "in a sandbox (bubblewrap)",
        (
            *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"),
            *("--ro-bind", "/", "/", "--dev", "/dev", "--tmpfs", "/proc", "--"),
        ),
    ),
    Isolation(
        "in namespaces of its own (unshare), with a read-only file system",
        (
            *("unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--uts"),
            *("--fork", "--kill-child", "--"),
        ),
        "read-only",
    ),
    Isolation("in a process with limits, which is no sandbox: neither bubblewrap nor unshare works here"),
)
"""The best first."""


def passes_tests(
    code: str,
    tests: Sequence[str],
    setup: str = "",
    *,
    allow_code_execution: bool = False,
    seconds: float = 5.0,
    memory: int = MEMORY,
) -> bool:
    """Say whether a Python program passes its unit tests.

    The program is the longest beginning of `code`, in whole lines, that is valid Python, without expressions at its end that
    call nothing (such as ``[DONE]``), so that what a model writes behind it does not matter. It runs with the standard library
    only, isolated (``-I -S``), with an empty environment and an empty folder that is deleted afterwards, without input or
    output, and with so much processor time and memory; it may write no file, start no process, read nothing but the
    standard library, and open no connection: a program that tries fails. `isolation` says what keeps it to that: bubblewrap,
    or user, mount, process and network namespaces, where this system has them. Where it has neither, there is no sandbox:
    accidents are stopped, but not a program written to break out.

    The tests run in a process of their own, which calls the program's functions in the other one, and compares what comes
    back; `setup` runs in both, behind the program. So nothing of the program, not even an ``__eq__`` that always agrees, runs
    where the verdict is found. It has passed if every test ran to its end: exiting earlier, also with code 0, is a failure.

    Args:
        code: What a model wrote.
        tests: Statements that raise if the program is wrong, such as ``assert add(1, 2) == 3``.
        setup: Statements that the tests need between the program and them.
        allow_code_execution: Nothing runs without it.
        seconds: Limit of the wall clock, and, rounded up, of processor time.
        memory: Limit of the address space, in bytes.

    Raises:
        LensUnlearnError: If `allow_code_execution` is not set, there is no test, or this system knows no such limits.
    """
    if not allow_code_execution:
        raise LensUnlearnError(
            "this would run code that a model wrote: pass allow_code_execution=True (--allow-code-execution) to allow it"
        )
    if not tests:
        raise LensUnlearnError("there is no unit test: nothing could fail")
    if os.name != "posix":
        raise LensUnlearnError("running code needs a POSIX system: elsewhere it could not be limited")
    limits = {"memory": int(memory), "seconds": max(1, -int(-seconds // 1)), "setup": setup}
    return _run({"code": code, **limits}, {"tests": list(tests), **limits}, seconds, isolation())


@functools.cache
def isolation() -> Isolation:
    """Give what programs run in on this system: the first way of `ISOLATIONS` that works here."""
    *sandboxes, limits = ISOLATIONS
    for sandbox in sandboxes:
        if shutil.which(sandbox.command[0]) and _passes_here(sandbox):
            return sandbox
    return limits


def check_runner() -> None:
    """Make sure that a correct program passes here, and a wrong one fails.

    Raises:
        LensUnlearnError: If not, as where the limits cannot be set.
    """
    if not _passes_here(isolation()):
        raise LensUnlearnError("unit tests cannot be run with limits on this system: leave allow_code_execution out")


def _passes_here(sandbox: Isolation) -> bool:
    limits = {"memory": MEMORY, "seconds": 60, "setup": ""}
    program = {"code": "def f():\n    return 1", **limits}
    return [_run(program, {"tests": [f"assert f() == {n}"], **limits}, 60.0, sandbox) for n in (1, 2)] == [True, False]


def _run(program: dict[str, Any], tests: dict[str, Any], seconds: float, sandbox: Isolation) -> bool:
    """Run a program and its tests in two processes to the end of the tests or of the time, and kill what is left of both."""
    ends = socket.socketpair()
    running: list[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="lens-unlearn-") as folder:
        try:
            for end, task, role in zip(ends, (program, tests), (sandbox.role, "tests"), strict=True):
                with end:
                    running.append(_start(task, role, end, folder, sandbox.command))
            return running[-1].wait(max(0.0, deadline - time.monotonic())) == PASSED
        except subprocess.TimeoutExpired:
            return False
        finally:
            for end in ends:
                end.close()
            for child in running:
                # What it started stays in its group, whose number nobody else gets as long as it has a member.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def _start(
    task: dict[str, Any], role: str, end: socket.socket, folder: str, command: tuple[str, ...]
) -> "subprocess.Popen[bytes]":
    python = [sys.executable, "-I", "-S", "-B", "-X", "utf8", SCRIPT, role, str(end.fileno())]
    if command and role != "tests":
        python = [shutil.which(command[0]) or command[0], *command[1:], *python]
    null = subprocess.DEVNULL
    with tempfile.TemporaryFile() as file:
        file.write(json.dumps(task).encode())
        file.seek(0)
        return subprocess.Popen(
            python,
            cwd=folder,
            env={},
            stdin=file,
            stdout=null,
            stderr=null,
            pass_fds=[end.fileno()],
            start_new_session=True,
        )
