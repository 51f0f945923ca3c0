"""Shared words of the tests: faults."""

from typing import Any

import pytest
from interventions_helpers import unchanged


class Fault(Exception):
    pass


class FailingAt:
    """Counts calls, and raises at the n-th; before or after the real call."""

    def __init__(self, real: Any, n: int | None, error: type[BaseException], *, after: bool = False) -> None:
        self.real, self.n, self.error, self.after, self.calls = real, n, error, after, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        fail = self.calls - 1 == self.n
        if fail and not self.after:
            raise self.error
        result = self.real(*args, **kwargs)
        if fail:
            raise self.error
        return result


def hook_class(model: Any) -> Any:
    return type(model.hook_dict["blocks.0.mlp.hook_post"])


def run_matrix(monkeypatch: pytest.MonkeyPatch, model: Any, action: Any, where: str, *, after: bool, most: int) -> int:
    """Make the n-th call of `HookPoint.<where>` raise for n = 0, 1, ... until the action no longer fails."""
    real = getattr(hook_class(model), where)
    for n in range(most):
        failing = FailingAt(real, n, Fault, after=after)
        with unchanged(model):
            with monkeypatch.context() as patch:
                patch.setattr(hook_class(model), where, lambda *a, f=failing, **k: f(*a, **k))
                try:
                    action(model)
                    through = True
                except Fault:
                    through = False
            if through:
                assert n > 0, "nothing was ever called: the test would mean nothing"
                return n
    return most
