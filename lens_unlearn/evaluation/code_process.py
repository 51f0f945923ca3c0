"""The two processes in which a program that a model wrote meets its unit tests. A script; the package does not import it.

    python -I -S -B code_process.py read-only|program|tests DESCRIPTOR

``program`` holds the program and does what it is asked; ``tests`` runs the tests, and exits with `PASSED` behind the last one. The
tests see the program's names: plain data is copied, and everything else is a `Remote`, whose calls are answered by the other
process. So nothing that the program defines runs where the verdict is found: comparing what came back with what is right is done by
the tests' own process. Both read their task from the standard input, and talk over the socket with this descriptor.

``read-only`` makes the file system read-only and gives up all capabilities before it becomes ``program``: for a process in
namespaces of its own that are not set up by bubblewrap. Standard library only.
"""

import ast
import collections
import datetime
import decimal
import fractions
import importlib
import json
import operator
import os
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

PASSED = 42
NAME = "answer"  # of the module, in both processes
INSTANCES = {
    "Decimal": (decimal.Decimal, lambda x: [str(x)]),
    "Fraction": (fractions.Fraction, lambda x: [x.numerator, x.denominator]),
    "datetime": (datetime.datetime, lambda x: [*x.timetuple()[:6], x.microsecond] if x.tzinfo is None else None),
    "date": (datetime.date, lambda x: [x.year, x.month, x.day]),
    "timedelta": (datetime.timedelta, lambda x: [x.days, x.seconds, x.microseconds]),
    "complex": (complex, lambda x: [x.real, x.imag]),
    "range": (range, lambda x: [x.start, x.stop, x.step]),
}
"""Plain data beside JSON's: how it is made again."""
COLLECTIONS = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
}
OPERATIONS = {
    "__bool__": bool,
    "__call__": lambda x, *args, **options: x(*args, **options),
    "__delitem__": operator.delitem,
    "__hash__": hash,
    "__iter__": iter,
    "__len__": len,
    "__next__": next,
    "__repr__": repr,
    "__reversed__": reversed,
    "__setitem__": operator.setitem,
    "__str__": str,
    "__getitem__": operator.getitem,
}
"""What can be asked of the other process about one of its objects, beside its attributes."""
BETWEEN = {
    f"__{name}__": getattr(operator, f"__{name}__")
    for name in (
        "eq",
        "lt",
        "le",
        "gt",
        "ge",
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
    )
}
"""What a program's objects may decide among themselves alone: else one could be equal to, or less than, any right answer."""
MODULES = {
    *("bisect", "builtins", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq"),
    *("itertools", "math", "operator", "random", "re", "statistics", "string", "typing"),
}
"""Modules that the program imports and its tests use; functions of others stay in the program's process."""


class Peer:
    """One end of the channel: asks the other process, and answers it, also while it waits for an answer."""

    def __init__(self, descriptor: int, trusted: bool) -> None:
        """`trusted` is the tests' process: it lets the program at nothing but what the tests hand over."""
        self.channel = socket.socket(fileno=descriptor).makefile("rwb")
        self.trusted = trusted
        self.shown: list[Any] = []
        self.namespace: dict[str, Any] = {}

    def encode(self, value: Any) -> Any:
        """Give what JSON can say of a value; of what is not plain data, its number here."""
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, int | float):
            return int(value) if isinstance(value, int) else float(value)
        if isinstance(value, bytes | bytearray):
            return [type(value).__name__, bytes(value).decode("latin-1")]
        if isinstance(value, dict):
            return ["dict", [[self.encode(key), self.encode(one)] for key, one in dict.items(value)]]
        for name, kind in COLLECTIONS.items():
            if isinstance(value, kind):
                return [name, [self.encode(one) for one in kind.__iter__(value)]]
        for name, (kind, arguments) in INSTANCES.items():
            if type(value) is kind and (given := arguments(value)) is not None:
                return [name, given]
        if type(value) is Remote:
            return ["yours", object.__getattribute__(value, "_number")]
        if isinstance(value, types.ModuleType) and value.__name__ in MODULES:
            return ["module", value.__name__]
        if (place := importable(value)) is not None:
            return ["of", *place]
        if value is NotImplemented:
            return ["NotImplemented"]
        self.shown.append(value)
        return ["mine", len(self.shown) - 1]

    def decode(self, said: Any) -> Any:
        """Give the value of which `encode` made this, in either process."""
        if not isinstance(said, list):
            return said
        kind, *rest = said
        if kind == "dict":
            return {self.decode(key): self.decode(value) for key, value in rest[0]}
        if kind in COLLECTIONS:
            return COLLECTIONS[kind](self.decode(one) for one in rest[0])
        if kind in INSTANCES:
            return INSTANCES[kind][0](*rest[0])
        if kind in ("bytes", "bytearray"):
            return rest[0].encode("latin-1") if kind == "bytes" else bytearray(rest[0].encode("latin-1"))
        if kind == "yours":
            return self.shown[rest[0]]
        if kind == "mine":
            return Remote(self, rest[0])
        if kind == "NotImplemented":
            return NotImplemented
        if rest[0] not in MODULES:
            raise ValueError(kind)
        module = importlib.import_module(rest[0])
        return module if kind == "module" else getattr(module, rest[1])

    def send(self, *message: Any) -> None:
        """Write one message."""
        self.channel.write(json.dumps(message).encode() + b"\n")
        self.channel.flush()

    def receive(self) -> list[Any]:
        """Read one message; the end of the other process is the end of this one."""
        line = self.channel.readline()
        if not line:
            raise SystemExit("the other process has ended")
        return json.loads(line)

    def ask(self, operation: str, *args: Any, **options: Any) -> Any:
        """Have the other process do something, and give what comes of it, or raise what it raised."""
        self.send("ask", operation, [self.encode(one) for one in args], self.encode(options))
        while (message := self.receive())[0] == "ask":
            self.answer(*message[1:])
        if message[0] == "raised":
            error = self.decode(message[1])
            if isinstance(error, type) and issubclass(error, BaseException):
                raise error(message[2])
            raise RuntimeError(message[2])
        for one, changed in zip(args, message[2], strict=True):
            if changed is not None:  # an argument that was changed in place
                change(one, self.decode(changed))
        return self.decode(message[1])

    def answer(self, operation: str, args: list[Any], options: Any) -> None:
        """Do what the other process asks, and tell it what came of it."""
        try:
            if self.trusted and args[0][0] != "yours":
                raise PermissionError(operation)
            given = [self.decode(one) for one in args]
            result = self.encode(self.do(operation, given, self.decode(options)))
            after = [self.encode(one) if isinstance(one, list | dict | set | bytearray) else None for one in given]
            message = ["gave", result, [new if new != old else None for new, old in zip(after, args, strict=True)]]
        except BaseException as error:
            message = ["raised", self.encode(type(error)), str(error)]
        self.send(*message)

    def do(self, operation: str, args: list[Any], options: dict[str, Any]) -> Any:
        """Do what may be asked."""
        if operation in OPERATIONS:
            return OPERATIONS[operation](*args, **options)
        if operation in ("getattr", "setattr"):
            # Attributes of a function lead to everything else that its process holds.
            if self.trusted and (type(args[0]).__module__ != NAME or args[1].startswith("_")):
                raise PermissionError(operation)
            return {"getattr": getattr, "setattr": setattr}[operation](*args)
        if self.trusted:
            raise PermissionError(operation)
        if operation == "names":
            return {name: one for name, one in self.namespace.items() if not name.startswith("__")}
        return {"isinstance": isinstance, **BETWEEN}[operation](*args)


class Remote:
    """An object of the other process."""

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        return ask(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        ask(self, "setattr", name, value)

    def __instancecheck__(self, instance: object) -> bool:
        return type(instance) is Remote and bool(ask(instance, "isinstance", self))


def ask(remote: Remote, operation: str, *args: Any, **options: Any) -> Any:
    """Have an object's own process do something with it."""
    return object.__getattribute__(remote, "_peer").ask(operation, remote, *args, **options)


def between(name: str) -> Callable[[Remote, Any], Any]:
    """Make an operator that is no object's own to decide, except beside another one of the program."""

    def decide(one: Remote, other: Any) -> Any:
        return ask(one, name, other) if type(other) is Remote else NotImplemented

    return decide


for _name in OPERATIONS:
    setattr(Remote, _name, lambda remote, *args, _name=_name, **options: ask(remote, _name, *args, **options))
for _name in BETWEEN:
    setattr(Remote, _name, between(_name))


def importable(value: Any) -> tuple[str, str] | None:
    """Give the module and the name of what belongs to the standard library, such as an exception."""
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if not (isinstance(module, str) and isinstance(name, str) and module in MODULES):
        return None
    return (module, name) if getattr(sys.modules.get(module), name, None) is value else None


def change(old: Any, new: Any) -> None:
    """Give a list, set or mapping the contents of another one."""
    if isinstance(old, list | bytearray):
        old[:] = new
    else:
        old.clear()
        old.update(new)


def parts_of(code: str) -> ast.Module:
    """Give the longest beginning of a text, in whole lines, that is a program, without marks such as ``[DONE]`` at its end."""
    lines = code.splitlines(True)
    tree = ast.Module([], [])
    for end in range(len(lines), -1, -1):
        try:
            tree = ast.parse("".join(lines[:end]))
            break
        except (SyntaxError, ValueError):
            pass
    while tree.body and isinstance(tree.body[-1], ast.Expr) and not isinstance(tree.body[-1].value, ast.Call):
        tree.body.pop()
    return tree


REFUSED_EVENTS = {"os", "shutil", "subprocess", "socket", "ctypes", "resource", "sqlite3", "syslog", "dbm"}
HARMLESS_EVENTS = {"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv"}
REFUSED_MODULES = {
    *("_ctypes", "_dbm", "_gdbm", "_interpreters", "_multiprocessing", "_posixshmem", "_posixsubprocess"),
    *("_testcapi", "_testinternalcapi", "_xxinterpchannels", "_xxsubinterpreters"),
}
"""Modules in C that reach outside without telling an audit hook."""
REMOVED = {
    *("mkfifo", "mknod", "nice", "pidfd_open", "pidfd_send_signal", "sched_setaffinity", "sched_setparam"),
    *("sched_setscheduler", "setns", "setpriority", "unshare"),
}
"""Functions of `os` and `signal` that reach outside without telling an audit hook."""


def guard() -> Callable[[str, tuple[Any, ...]], None]:
    """Make the hook that refuses what reaches outside; it looks nothing up that a program could replace."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    folders = tuple(os.path.join(os.path.realpath(one), "") for one in (*sys.path, os.getcwd(), "/usr/share/zoneinfo"))
    modules, events, harmless = frozenset(REFUSED_MODULES), frozenset(REFUSED_EVENTS), frozenset(HARMLESS_EVENTS)
    number, refusal, real, decoded = int, PermissionError, os.path.realpath, os.fsdecode

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            bad = given[2] & writing
            if not bad and type(given[0]) is not number:
                path = real(decoded(given[0]))
                bad = not path.startswith(folders) and path not in ("/dev/null", "/dev/urandom")
        elif event == "import":
            bad = given[0] in modules
        else:
            bad = event.partition(".")[0] in events and event not in harmless
        if bad:
            raise refusal(event)

    return hook


def limit(task: dict[str, Any]) -> None:
    """Set the limits on this process."""
    import resource

    for kind, most in (
        (resource.RLIMIT_CPU, task["seconds"]),
        (resource.RLIMIT_AS, task["memory"]),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def program(task: dict[str, Any], descriptor: int) -> None:
    """Run the program, and then do what the tests ask of it."""
    peer = Peer(descriptor, trusted=False)
    parts = [compile(part, NAME, "exec") for part in (parts_of(task["code"]), task["setup"])]
    module = sys.modules[NAME] = types.ModuleType(NAME)
    peer.namespace = module.__dict__
    for name in REMOVED:
        for place in map(sys.modules.get, ("os", "posix", "signal", "_signal")):
            if place is not None:
                place.__dict__.pop(name, None)
    sys.addaudithook(guard())
    for part in parts:
        exec(part, module.__dict__)
    while True:
        peer.answer(*peer.receive()[1:])


def tests(task: dict[str, Any], descriptor: int) -> None:
    """Run the tests, and exit with `PASSED` behind the last one."""
    peer = Peer(descriptor, trusted=True)
    module = sys.modules[NAME] = types.ModuleType(NAME)
    module.__dict__.update(peer.ask("names"))
    for part in (task["setup"], *task["tests"]):
        exec(compile(part, NAME, "exec"), module.__dict__)
    os._exit(PASSED)


def read_only() -> None:
    """Make all mounts read-only, hide the processes outside, and give up every capability for good."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    recursive, read_only_flag, here, mount_setattr = 0x8000, 1, -100, 442
    attributes = (ctypes.c_uint64 * 4)(read_only_flag)
    done = [
        libc.mount(b"none", b"/proc", b"tmpfs", 0, None),
        libc.syscall(mount_setattr, here, b"/", recursive, attributes, ctypes.sizeof(attributes)),
        libc.prctl(38, 1, 0, 0, 0),  # PR_SET_NO_NEW_PRIVS
        *[libc.prctl(24, capability, 0, 0, 0) for capability in range(41)],  # PR_CAPBSET_DROP
    ]
    if any(done):
        raise OSError(ctypes.get_errno(), "this system cannot make the file system read-only")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:-2], "program", sys.argv[2]])


if __name__ == "__main__":
    if sys.argv[1] == "read-only":
        read_only()
    asked, number = json.load(sys.stdin), int(sys.argv[2])
    role = {"program": program, "tests": tests}[sys.argv[1]]
    sys.argv = [""]
    getattr(sys, "set_int_max_str_digits", int)(0)  # since Python 3.10.7
    limit(asked)
    role(asked, number)
