"""The allocator is told to keep its memory once, where it is glibc's, and where the user has not set it up."""

import os
import subprocess
import sys

import pytest

from lens_unlearn.core import allocator

FAULTS = """
import resource, torch
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**25).mul(2).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
import lens_unlearn as lu
faults(); plain = faults()
print(plain, lu.tune_allocator(), lu.tune_allocator())
faults(); print(faults())
"""


def run(code: str, **environment: str) -> list[str]:
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_pages_of_large_tensors_are_asked_for_once() -> None:
    plain, tuned, again, then = run(FAULTS)
    assert (tuned, again) == ("True", "True")
    assert int(then) < int(plain) / 5  # of ten tensors one may be asked for again, by the state of the heap


@pytest.mark.parametrize(
    "environment", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.check=0"}], ids=["malloc", "tunables"]
)
def test_what_the_user_has_set_up_stays(environment: dict[str, str]) -> None:
    code = "from lens_unlearn.core.allocator import *; print(tune_allocator(), allocator())"
    assert run(code, **environment)[0] == "False"


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_tuned", [False])
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert not allocator.tune_allocator()
    monkeypatch.delenv("LD_PRELOAD")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not allocator.tune_allocator()
    assert allocator.allocator() == "as the system has it"


def test_another_c_library_has_no_such_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(allocator, "_tuned", [False])
    monkeypatch.setattr(allocator.ctypes, "CDLL", missing)
    assert not allocator.tune_allocator()
