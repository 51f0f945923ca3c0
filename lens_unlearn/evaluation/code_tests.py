"""`passes_tests`: run a program that a model wrote against its unit tests, in a process with limits.

The limits keep a program that goes wrong from doing harm by accident. They are no sandbox: run programs of a model that may
mean harm in a container or a virtual machine.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lens_unlearn.core.errors import LensUnlearnError

__all__ = ["check_runner", "passes_tests"]

MEMORY = 1 << 29  # bytes of address space

# Runs in the child: python -I -S -B -c RUNNER TASK VERDICT. Reads what to do, gives up the right to most things, and writes
# the secret to the pipe only after the last test, so that a program which exits before that has not passed.
_RUNNER = r"""
import ast, json, os, sys, types
import resource as r
with open(sys.argv[1]) as file:
    task = json.load(file)
os.remove(sys.argv[1])
verdict = int(sys.argv[2])
sys.argv = [""]
for kind, limit in (
    (r.RLIMIT_CPU, task["seconds"]),
    (r.RLIMIT_AS, task["memory"]),
    (r.RLIMIT_NPROC, 0),
    (r.RLIMIT_NOFILE, 32),
    (r.RLIMIT_FSIZE, 0),
    (r.RLIMIT_CORE, 0),
):
    r.setrlimit(kind, (limit, limit))
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
refused = {"os", "shutil", "subprocess", "socket", "ctypes", "resource", "sqlite3"}
harmless = {"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv"}
def guard(event, given):
    if event == "open":
        bad = given[2] & writing
    elif event == "import":
        bad = given[0] in ("_ctypes", "_posixsubprocess")
    else:
        bad = event.partition(".")[0] in refused and event not in harmless
    if bad:
        raise PermissionError(event)
lines = task["code"].splitlines(True)
for end in range(len(lines), -1, -1):
    try:
        tree = ast.parse("".join(lines[:end]))
        break
    except (SyntaxError, ValueError):
        pass
while tree.body and isinstance(tree.body[-1], ast.Expr) and not isinstance(tree.body[-1].value, ast.Call):
    tree.body.pop()
parts = [compile(part, "answer", "exec") for part in (tree, task["setup"], *task["tests"])]
module = sys.modules["answer"] = types.ModuleType("answer")
finish, write = os._exit, os.write
sys.addaudithook(guard)
for part in parts:
    exec(part, module.__dict__)
write(verdict, task["secret"].encode())
finish(0)
"""


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
    call nothing (such as ``[DONE]``), so that what a model writes behind it does not matter. It runs before `setup` and the
    tests, with the standard library only, in a new process: isolated (``-I -S``), with an empty environment and an empty
    folder that is deleted afterwards, without input or output, in a session of its own that is killed as a whole at the
    end or after the time limit. It may use so much processor time and memory, write no file, start no process, and open
    no connection; a program that tries fails. It has passed if every test ran to its end: exiting earlier, also with code
    0, is a failure.

    This is no sandbox: it stops accidents, not a program written to break out.

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
    secret = secrets.token_hex(16)
    task = {"code": code, "tests": list(tests), "setup": setup, "secret": secret, "memory": int(memory)}
    task["seconds"] = max(1, -int(-seconds // 1))
    with tempfile.TemporaryDirectory(prefix="lens-unlearn-") as folder:
        path = Path(folder, "task.json")
        path.write_text(json.dumps(task), encoding="utf-8")
        return _run(str(path), folder, seconds) == secret.encode()


def _run(task: str, folder: str, seconds: float) -> bytes:
    """Run the child to its end or to the time limit, kill the rest of its session, and return its verdict."""
    read, write = os.pipe()
    try:
        command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _RUNNER, task, str(write)]
        null = subprocess.DEVNULL
        child = subprocess.Popen(
            command, cwd=folder, env={}, stdin=null, stdout=null, stderr=null, pass_fds=[write], start_new_session=True
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(seconds)
        finally:
            # What the program started stays in its group, whose number nobody else gets as long as it has a member.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        os.set_blocking(read, False)
        with contextlib.suppress(BlockingIOError):
            return os.read(read, 1024) if child.returncode == 0 else b""
        return b""
    finally:
        os.close(read)
        os.close(write)


def check_runner() -> None:
    """Make sure that a correct program passes here, and a wrong one fails.

    Raises:
        LensUnlearnError: If not, as where the limits cannot be set.
    """
    verdicts = [passes_tests("x = 1", [f"assert x == {n}"], allow_code_execution=True, seconds=60.0) for n in (1, 2)]
    if verdicts != [True, False]:
        raise LensUnlearnError("unit tests cannot be run with limits on this system: leave allow_code_execution out")
