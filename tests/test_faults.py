"""A generated fault matrix: whatever fails, and wherever, no hook of ours stays and the model is bitwise as it was."""

from typing import Any

import pytest
import tiny
import torch
from test_interventions import selection_of, unchanged

from lens_unlearn.collecting import collect
from lens_unlearn.evaluation.next_token import evaluate
from lens_unlearn.interventions import Ablate, Live
from lens_unlearn.methods.attention import value_offset
from lens_unlearn.methods.selective_pruning import selective_pruning


class Fault(Exception):
    pass


def ablate(model: Any) -> None:
    with Ablate(selection_of(model, ["mlp.post", "attn.z"])).on(model):
        tiny.logits(model)


def chain(model: Any) -> None:
    with (Ablate(selection_of(model, seed=1)) + Ablate(selection_of(model, "attn.z", seed=2), 0.5)).on(model):
        tiny.logits(model)


def gather(model: Any) -> None:
    with Ablate(selection_of(model, seed=1)).on(model):
        collect(model, tiny.corpus((5, 6)), ("mlp.post", "attn.z"), batch_size=1, progress=False)


def measure(model: Any) -> None:
    evaluate(model, {"a": tiny.corpus((5, 6))}, {"b": Ablate(selection_of(model))}, resamples=5, progress=False)


def prune(model: Any) -> None:
    selective_pruning(
        model, tiny.corpus((5,), seed=1), tiny.corpus((6,), seed=2), fraction=0.1, steps=2, progress=False
    )


ACTIONS = [ablate, chain, gather, measure, prune]


def offsets(model: Any) -> None:
    value_offset(model, tiny.model("gpt2"))


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


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt2-compat", *tiny.HOOKED[:1]])
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_when_the_nth_hook_cannot_be_added_none_stays(
    monkeypatch: pytest.MonkeyPatch, name: str, action: Any, after: bool
) -> None:
    assert run_matrix(monkeypatch, tiny.model(name), action, "add_hook", after=after, most=200) >= 2


def test_when_the_nth_hook_cannot_be_added_while_looking_for_folded_biases_none_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run_matrix(monkeypatch, tiny.model("gpt2-compat"), offsets, "add_hook", after=False, most=50) >= 2


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt2-compat", *tiny.HOOKED[:1]])
@pytest.mark.parametrize("action", [ablate, chain, gather, measure], ids=lambda action: action.__name__)
def test_when_the_nth_hook_point_raises_none_stays(monkeypatch: pytest.MonkeyPatch, name: str, action: Any) -> None:
    """Every hook point of the model, in the order of the run, fails in turn (thinned out: each seventh)."""
    model = tiny.model(name)
    action(model)  # the probe, which is remembered
    counter = FailingAt(hook_class(model).forward, None, Fault)
    with monkeypatch.context() as patch:
        patch.setattr(hook_class(model), "forward", lambda *a, **k: counter(*a, **k))
        action(model)
    assert counter.calls > 20
    for n in range(0, counter.calls, max(7, counter.calls // 24)):
        failing = FailingAt(hook_class(model).forward, n, Fault)
        with unchanged(model), monkeypatch.context() as patch:
            patch.setattr(hook_class(model), "forward", lambda *a, f=failing, **k: f(*a, **k))
            with pytest.raises(Fault):
                action(model)


@pytest.mark.parametrize("error", [Fault, KeyboardInterrupt, SystemExit, MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize("n", range(6))
def test_when_our_nth_hook_call_raises_none_stays(
    monkeypatch: pytest.MonkeyPatch, n: int, error: type[BaseException]
) -> None:
    """Every hook asks `Live.like` twice, so this fails in the first, second and third hook, before and after half its work."""
    model = tiny.model("gpt2")
    failing = FailingAt(Live.like, n, error)

    def act() -> None:
        with Ablate(selection_of(model, ["mlp.post", "attn.z"])).on(model):
            tiny.logits(model)

    with unchanged(model):
        with monkeypatch.context() as patch:
            patch.setattr(Live, "like", lambda *a: failing(*a))
            with pytest.raises(error):
                act()
        assert failing.calls == n + 1


@pytest.mark.parametrize("n", [0, 1, 3])
def test_when_a_statistic_raises_none_stays(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    from lens_unlearn.statistics import Moments

    model = tiny.model("gpt2")
    failing = FailingAt(Moments.update, n, Fault)
    with unchanged(model), monkeypatch.context() as patch:
        patch.setattr(Moments, "update", lambda *a, **k: failing(*a, **k))
        with pytest.raises(Fault):
            collect(model, tiny.corpus(), ("mlp.post", "attn.z"), batch_size=1, progress=False)


def test_when_one_hook_cannot_be_removed_the_others_still_go() -> None:
    from lens_unlearn.sites import detach_all

    gone: list[int] = []

    def stuck() -> bool:
        raise Fault

    with pytest.raises(Fault):
        detach_all([lambda: gone.append(0) is None, stuck, lambda: gone.append(2) is None])
    assert gone == [2, 0]
