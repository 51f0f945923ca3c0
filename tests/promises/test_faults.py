"""A generated fault matrix: whatever fails, and wherever, no hook of ours stays and the model is bitwise as it was."""

import contextlib
import dis
import inspect
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import moe
import numpy as np
import pytest
import sae_helpers
import tiny
import torch
from faults_helpers import FailingAt, Fault, hook_class, run_matrix
from interventions_helpers import FORMS, POST, one, selection_of, unchanged, zoo
from transformer_lens.hook_points import HookPoint

from lens_unlearn.core import artefacts
from lens_unlearn.evaluation.evaluate import evaluate
from lens_unlearn.evaluation.generation import generate
from lens_unlearn.interventions import ablate, abstain, adjust, base, delta, live, place
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.base import Chain, Live
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.reroute import Reroute
from lens_unlearn.interventions.update import Update
from lens_unlearn.keyspace.regions import Box
from lens_unlearn.methods.ov_basis import value_offset
from lens_unlearn.methods.selective_pruning import selective_pruning
from lens_unlearn.methods.simu import simu
from lens_unlearn.methods.sophia import Sophia
from lens_unlearn.methods.tuning import tune
from lens_unlearn.model import (
    expert_layers,
    experts,
    feature_points,
    hooks,
    host,
    matrices,
    replay,
    residual,
    shortcuts,
    sites,
)
from lens_unlearn.model.dictionary_files import load_dictionary
from lens_unlearn.model.replay import replaying
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons import collect as collecting
from lens_unlearn.neurons.attribution import attribute
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.moments import Moments

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
"""Then everything is run that is thinned out otherwise."""


def ablating(model: Any) -> None:
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


ACTIONS = [ablating, chain, gather, measure, prune]


def offsets(model: Any) -> None:
    value_offset(model, tiny.model("gpt2"))


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
@pytest.mark.parametrize("action", [ablating, chain, gather, measure], ids=lambda action: action.__name__)
def test_when_the_nth_hook_point_raises_none_stays(monkeypatch: pytest.MonkeyPatch, name: str, action: Any) -> None:
    """Every hook point of the model, in the order of the run, fails in turn (thinned out: each seventh)."""
    model = tiny.model(name)
    action(model)  # the probe, which is remembered
    counter = FailingAt(hook_class(model).forward, None, Fault)
    with monkeypatch.context() as patch:
        patch.setattr(hook_class(model), "forward", lambda *a, **k: counter(*a, **k))
        action(model)
    assert counter.calls > 2, "where nothing is hooked, the bridge's hook points are out of the pass"
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
    model = tiny.model("gpt2")
    failing = FailingAt(Moments.update, n, Fault)
    with unchanged(model), monkeypatch.context() as patch:
        patch.setattr(Moments, "update", lambda *a, **k: failing(*a, **k))
        with pytest.raises(Fault):
            collect(model, tiny.corpus(), ("mlp.post", "attn.z"), batch_size=1, progress=False)


def test_when_one_hook_cannot_be_removed_the_others_still_go() -> None:
    from lens_unlearn.model.hooks import detach_all

    gone: list[int] = []

    def stuck() -> bool:
        raise Fault

    with pytest.raises(Fault):
        detach_all([lambda: gone.append(0) is None, stuck, lambda: gone.append(2) is None])
    assert gone == [2, 0]


# --- everything that touches a model fails in turn ------------------------------------------------------------------------

ERRORS: list[type[BaseException]] = [
    Fault,
    KeyboardInterrupt,
    SystemExit,
    GeneratorExit,
    MemoryError,
    torch.OutOfMemoryError,
    RuntimeError,
]


def with_users_hooks(name: str) -> Any:
    """Build a model on which a user has put hooks of every kind, and a `forward` of their own."""
    with tiny.quiet():
        model = tiny.build(name)
        tiny.logits(model)
    point = model.hook_dict["blocks.0.mlp.hook_post"]
    point.add_hook(lambda tensor, hook: None)
    point.add_hook(lambda tensor, hook: None, is_permanent=True)
    point.add_hook(lambda tensor, hook: None, dir="bwd")
    model.unembed.register_forward_hook(lambda module, args, logits: None)
    model.embed.register_forward_pre_hook(lambda module, args: None)
    model.blocks[0].register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    model.blocks[1].register_forward_hook(lambda module, args, kwargs, out: None, with_kwargs=True)
    inner = model.blocks[1].forward
    model.blocks[1].__dict__["forward"] = lambda *args, **kwargs: inner(*args, **kwargs)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    return model


@pytest.fixture(scope="module")
def used() -> Callable[[str], Any]:
    """Models with hooks of their user, by name."""
    return cache(with_users_hooks)


def state_of(model: Any) -> dict[str, Any]:
    """Say everything that nobody but the user may change."""
    draws = np.random.get_state()  # noqa: NPY002 - the global one, which is not to be touched
    return {
        "hooks": tiny.hooks_of(model),
        "forwards": hooks_and_uses(model)[1],
        "training": [path for path, module in model.named_modules() if module.training],
        "weights, and which want gradients": tiny.weights_hash(model),
        "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "dtype and precision": (torch.get_default_dtype(), torch.get_float32_matmul_precision()),
        "random state": (torch.get_rng_state().numpy().tobytes(), random.getstate(), draws[1].tobytes(), draws[2:]),
        "threads inside": hooks_and_uses(model)[2],
    }


class Untouched:
    """Remembers a model, and what is global, as they are."""

    def __init__(self, model: Any) -> None:
        self.model, self.state, self.logits = model, state_of(model), tiny.logits(model)

    def check(self) -> None:
        """Demand that everything is as it was, and the logits bitwise."""
        now = state_of(self.model)
        assert [what for what in now if now[what] != self.state[what]] == []
        assert torch.equal(tiny.logits(self.model), self.logits)


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    before = Untouched(model)
    yield
    before.check()


class Calls:
    """Counts calls of everything that touches a model, and makes the n-th fail: before or after it has done its work."""

    def __init__(self, patch: pytest.MonkeyPatch, model: Any, n: int | None, error: type[BaseException], after: bool):
        self.n, self.error, self.after, self.number, self.names = n, error, after, 0, Counter[str]()
        self.failed_in = ""
        for owner, name in (
            (sites, "resolve"),
            (base, "resolve"),
            (base, "matrix_shapes"),
            (sites, "backbone"),
            (residual, "backbone"),
            (matrices, "backbone"),
            (collecting, "backbone"),
            (hook_class(model), "add_hook"),
            (torch.nn.Module, "register_forward_hook"),
            (torch.nn.Module, "register_forward_pre_hook"),
            (hooks, "_unhook"),  # removing
            (hooks, "_closes_over"),  # removing from a hook point
            (Live, "begin"),
            (Live, "withhold"),
            (Live, "like"),
            (Update, "apply"),
            (Moments, "update"),
            (Moments, "merge"),
            (artefacts, "write"),
            (replay.Replay, "_run"),
            (Sophia, "step"),
        ):
            patch.setattr(owner, name, self.counting(getattr(owner, name), name))
        act = base.Finish.__call__
        patch.setattr(base.Finish, "__call__", self.counting(act, "finish"))

    def counting(self, real: Any, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            fail, self.number = self.number == self.n, self.number + 1
            self.names[name] += 1
            if fail:
                self.failed_in = name
            if fail and not self.after:
                raise self.error
            try:
                return real(*args, **kwargs)
            finally:
                if fail:
                    raise self.error

        return call


def fail_everywhere(
    monkeypatch: pytest.MonkeyPatch,
    model: Any,
    action: Callable[[], None],
    errors: Sequence[type[BaseException]],
    *,
    most: int = 10**9,
    may_pass: Sequence[str] = (),
) -> tuple[int, Counter[str]]:
    """Run an action again and again; each time another call fails, with one error after the other.

    Returns:
        How many runs failed, and how often each function was called in a whole one.
    """
    action()  # what is found out about a model once, and remembered
    with monkeypatch.context() as patch:
        counter = Calls(patch, model, None, Fault, after=False)
        forget_probes(model)
        action()
    places = [(n, after) for n in range(counter.number) for after in (False, True)]
    places = places if NIGHTLY else places[:: max(1, math.ceil(len(places) / most))]
    before = Untouched(model)
    for number, (n, after) in enumerate(places):
        error, through = errors[number % len(errors)], False
        with monkeypatch.context() as patch:
            calls = Calls(patch, model, n, error, after)
            forget_probes(model)
            try:
                action()
                through = True
            except error:
                pass
        assert calls.failed_in, "nothing failed: the action does not do the same twice"
        halved = error is torch.OutOfMemoryError  # and the batch was run in halves
        assert not through or halved or calls.failed_in in may_pass, f"the error in {calls.failed_in} was swallowed"
        before.check()
    return len(places), counter.names


def forget_probes(model: Any) -> None:
    sites._probed.pop(model, None)
    matrices._shapes.pop(model, None)
    residual._measured.pop(model, None)


def entering(model: Any, intervention: Any) -> Callable[[], None]:
    def act() -> None:
        with intervention.on(model):
            tiny.logits(model)

    return act


@pytest.mark.parametrize("form", [*FORMS, "all"])
def test_wherever_it_fails_an_intervention_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, used: Any, form: str
) -> None:
    model = used("gpt2")
    errors = ERRORS[len(form) % 7 :] + ERRORS[: len(form) % 7]  # each form begins with another one
    runs, names = fail_everywhere(monkeypatch, model, entering(model, one("gpt2", form)), errors, most=60)
    assert runs >= 14
    assert names["_unhook"] + names["_closes_over"] > 0


@pytest.mark.parametrize("name", ["llama", "gpt2-compat", "native-neox", *tiny.HOOKED[:2]])
def test_wherever_it_fails_all_interventions_together_leave_nothing(
    monkeypatch: pytest.MonkeyPatch, used: Any, name: str
) -> None:
    model = used(name)
    assert fail_everywhere(monkeypatch, model, entering(model, one(name, "all")), ERRORS, most=35)[0] >= 25


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_in_the_body_leaves_nothing_and_goes_through(used: Any, error: type[BaseException]) -> None:
    model = used("gpt2")

    def act(form: str) -> None:
        with one("gpt2", form).on(model), one("gpt2", "all").on(model):
            tiny.logits(model)
            raise error

    for form in FORMS:
        with untouched(model), pytest.raises(error):
            act(form)


def test_an_error_while_blocks_are_nested_and_closed_out_of_order_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, used: Any
) -> None:
    model = used("gpt2")

    def act() -> None:
        with ExitStack() as first, ExitStack() as second:
            first.enter_context(one("gpt2", "random").on(model))
            second.enter_context(one("gpt2", "rows").on(model))
            second.enter_context(one("gpt2", "abstain").on(model))
            first.close()
            tiny.logits(model)

    assert fail_everywhere(monkeypatch, model, act, ERRORS, most=40)[0] >= 25


FORGET = tiny.corpus([9, 8], seed=1).with_prompts(4)
RETAIN = tiny.corpus([8, 9, 7, 10, 9], seed=2).with_prompts(4)


def collecting_with_a_checkpoint(model: Any, folder: Path) -> None:
    with one("gpt2", "zero").on(model):
        collect(model, tiny.corpus((5, 6)), batch_size=1, checkpoint=folder / "run", progress=False)


def attributing(model: Any, folder: Path) -> None:
    attribute(model, FORGET, steps=1, progress=False)


def training(model: Any, folder: Path) -> None:
    short: dict[str, Any] = {"steps": 2, "check_every": 1, "batch_size": 2, "mask": "all", "attention": "none"}
    simu(model, FORGET, RETAIN, optimizer="sophia", progress=False, **short)


def tuning(model: Any, folder: Path) -> None:
    held = {"held_out": (tiny.corpus((20,) * 10, seed=3), tiny.corpus((20,) * 10, seed=4))}
    corpora = tiny.corpus((6,), seed=1), tiny.corpus((7,), seed=2)
    tune(selective_pruning, model, *corpora, **held, retain_drop=1.0, metric="top10", evaluations=1, progress=False)


def evaluating(model: Any, folder: Path) -> None:
    corpora = {"a": tiny.corpus((5, 6))}
    evaluate(model, corpora, {"b": one("gpt2", "abstain"), "c": one("gpt2", "rank")}, resamples=5, progress=False)


def replayed(model: Any, folder: Path) -> None:
    with replaying(model) as replay:
        tokens = tiny.some_tokens()
        where = torch.ones_like(tokens, dtype=torch.bool)
        replay.first(tokens, where)
        replay.again(1, torch.arange(len(tokens)), where)


@pytest.mark.parametrize(
    "action",
    [collecting_with_a_checkpoint, attributing, training, tuning, evaluating, replayed],
    ids=lambda action: action.__name__,
)
@pytest.mark.filterwarnings("ignore:less than 10%", "ignore:Full backward hook is firing")
def test_wherever_it_fails_what_uses_a_model_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, used: Any, action: Any, tmp_path: Path
) -> None:
    """A trial of the shortcut in `replaying` may fail: then there is none."""
    model, folders = used("gpt2"), iter(range(10**6))

    def act() -> None:
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        try:
            action(model, folder)
        finally:
            left = {path.name for path in folder.iterdir()}
            assert left <= {"run"}, "half a file"

    runs, names = fail_everywhere(monkeypatch, model, act, ERRORS, most=35, may_pass=["_run"])
    assert runs >= (6 if action is replayed else 25)
    assert names["_run"] > 0 or names["add_hook"] > 0


def test_wherever_it_fails_generating_leaves_nothing(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    every = Chain(tuple(zoo(model).values()))

    def act() -> None:
        generate(model, ["def add", "1"], intervention=every, max_new_tokens=2, temperature=0.5)

    assert fail_everywhere(monkeypatch, model, act, ERRORS, most=35)[0] >= 25


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("n", [0, 1])
def test_a_collection_goes_on_after_any_error_in_any_part_of_a_batch(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], n: int, tmp_path: Path
) -> None:
    model, corpus = tiny.model("gpt2"), tiny.corpus((9, 9, 9))
    options: dict[str, Any] = {"batch_size": 1, "progress": False}
    whole = collect(model, corpus, **options).state()
    for owner, name in ((Moments, "update"), (Moments, "merge"), (collecting, "backbone")):
        for after in (False, True) if owner is Moments else (False,):  # the last site ends a pass
            path = tmp_path / f"{name}{after}"
            failing = FailingAt(getattr(owner, name), n + 1, error, after=after)
            with unchanged(model), monkeypatch.context() as patch:
                patch.setattr(owner, name, lambda *a, f=failing, **k: f(*a, **k))
                with pytest.raises(error):
                    collect(model, corpus, checkpoint=path, **options)
            assert path.exists()
            got = collect(model, corpus, checkpoint=path, **options).state()
            assert all(torch.equal(value, got[key]) for key, value in whole.items())
            assert not path.exists()


# --- an interrupt may come wherever Python looks for one --------------------------------------------------------------------

OURS = {
    m.__file__
    for m in (host, hooks, sites, matrices, replay, residual, live, place, base, ablate, adjust, abstain, delta)
}
INSIDE = {experts.__file__, expert_layers.__file__}
AROUND = {inspect.getfile(module) for module in (torch.utils.hooks, torch.nn.Module, HookPoint)}
ADDING = {"add_hook", "register_forward_hook", "register_forward_pre_hook", "__init__"}
WITH = inspect.getfile(contextlib)
ONLY_LOOK = {
    "_call_impl",
    "_wrapped_call_impl",
    "__getattr__",
    "require_eval",
    "_hooked",
    "_same_weights",
    "_digest",
    "bit_sums",
}
"""What runs often and changes nothing, as comprehensions do. `Module.__call__`: a model that fails was looked at above."""


class Interrupt:
    """Raises KeyboardInterrupt at the k-th place where Python looks for one.

    That is at the beginning of a function, behind a call, and where a loop goes back.
    """

    def __init__(self, files: set[str], k: int | None) -> None:
        self.files, self.k, self.number, self.where = files, k, 0, ""
        self.places: dict[Any, int] = {}  # which instructions were come to, and when last
        self.last: dict[FrameType, str] = {}  # the instruction that each frame ran last

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if code.co_filename not in self.files or code.co_name in ONLY_LOOK or code.co_name.startswith("<"):
            return None
        if code.co_filename in AROUND and code.co_name not in ADDING:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self.last[frame] = "RESUME"
        return self.local

    def local(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "return":
            del self.last[frame]
        if event != "opcode":
            return self.local
        before, self.last[frame] = self.last[frame], dis.opname[frame.f_code.co_code[frame.f_lasti]]
        if before.startswith(("RESUME", "CALL", "JUMP_BACKWARD", "JUMP_ABSOLUTE")):
            self.places[frame.f_code, frame.f_lasti] = self.number
            self.number += 1
            if self.number - 1 == self.k:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.local

    def over(self, action: Callable[[], None], look: Callable[[], Any]) -> Any:
        """Run an action; return what there is to see when it was interrupted, its traceback still in hand."""
        before = sys.gettrace()
        try:
            sys.settrace(self)
            action()
        except KeyboardInterrupt:
            return look()
        finally:
            sys.settrace(before)
            self.last.clear()
        return None


def hooks_and_uses(model: Any) -> Any:
    uses = [use.thread for uses in hooks._uses.values() for one in uses if (use := one()) is not None]
    return tiny.hooks_of(model), [(id(m), id(m.__dict__.get("forward"))) for m in model.modules()], uses


def interrupted_everywhere(
    action: Callable[[], None], model: Any, files: set[str], most: int, *, probing: bool = False
) -> Counter[bool]:
    """Interrupt an action wherever Python looks for it, while some files run, and see that nothing stays.

    Inside `contextlib`, whose functions open and close what a `with` statement is about, nobody can guard: there nothing may stay
    once the traceback is gone, and everywhere else while it is still held.

    Returns:
        How often it was interrupted: elsewhere, and inside `contextlib` where something stayed as long as the traceback.
    """
    action()  # what is found out about a model once, and remembered
    counter = Interrupt(files, None)
    if probing:
        forget_probes(model)
    counter.over(action, lambda: None)
    places = list(counter.places.values())  # each instruction once
    places = list(range(counter.number)) if NIGHTLY else places[:: max(1, math.ceil(len(places) / most))]
    before, hooks = Untouched(model), hooks_and_uses(model)
    stayed = Counter[bool]()
    for k in places:
        if probing:
            forget_probes(model)
        interrupt = Interrupt(files, k)
        seen = interrupt.over(action, lambda: hooks_and_uses(model))
        if seen is None:
            assert interrupt.number <= k, f"the interrupt was swallowed: {interrupt.where}"
            continue
        assert seen == hooks or WITH in interrupt.where, interrupt.where
        assert hooks_and_uses(model) == hooks, interrupt.where
        stayed[seen != hooks] += 1
    before.check()
    return stayed


def nested(model: Any) -> Callable[[], None]:
    """Enter and leave blocks with hooks of every kind, one inside the other."""
    box = Box(torch.zeros(1, 64), torch.ones(64), 1e30)
    outer = Ablate(NeuronMap({POST[0]: torch.ones(64, dtype=torch.bool)})) + Abstain({POST[0]: box})
    inner = Delta({(0, "W_out"): Update(torch.ones(1, 32), torch.tensor([3]))}).placed("prompt", skip_special=True)

    def act() -> None:
        with outer.on(model), inner.on(model):
            pass

    return act


@pytest.mark.parametrize("name", ["gpt2", *tiny.HOOKED[:1]])
def test_an_interrupt_leaves_no_hook_wherever_it_comes(used: Any, name: str) -> None:
    model = used(name)
    assert interrupted_everywhere(nested(model), model, OURS | AROUND | {WITH}, 400)[False] > 200
    assert interrupted_everywhere(nested(model), model, OURS, 80, probing=True)[False] > 60


def test_an_interrupt_leaves_no_hook_inside_experts_wherever_it_comes() -> None:
    model = moe.bridge("qwen3-moe")
    chosen = Ablate(NeuronMap({Site(1, "experts.post"): torch.ones(4, 24, dtype=torch.bool)}))

    def act() -> None:
        with chosen.on(model), (Reroute({0: [1]}) + chosen).on(model):
            pass

    assert interrupted_everywhere(act, model, OURS | INSIDE, 150)[False] > 100
    assert interrupted_everywhere(act, model, INSIDE | {hooks.__file__}, 60, probing=True)[False] > 40


def test_an_interrupt_leaves_no_hook_at_features_wherever_it_comes(used: Any, tmp_path: Path) -> None:
    model = used("gpt2")
    config, weights = sae_helpers.config_of("standard", 32), sae_helpers.weights_of("standard", 32)
    dictionary = load_dictionary(sae_helpers.write(tmp_path, config, weights))
    chosen = Ablate(NeuronMap({dictionary.site: torch.ones(48, dtype=torch.bool)}))

    def act() -> None:
        with chosen.on(model), chosen.on(model):
            pass

    with dictionary.on(model):
        assert interrupted_everywhere(act, model, OURS | {feature_points.__file__}, 100)[False] > 60
        assert (
            interrupted_everywhere(act, model, {feature_points.__file__, hooks.__file__}, 60, probing=True)[False] > 40
        )


@pytest.mark.parametrize("name", ["gpt2", *tiny.HOOKED[:1]])
def test_an_interrupt_leaves_no_other_forward_wherever_it_comes(used: Any, name: str) -> None:
    model = used(name)

    def act() -> None:
        with replaying(model):
            pass

    assert interrupted_everywhere(act, model, OURS | {WITH}, 100)[False] > 40


def test_an_interrupt_in_a_pass_leaves_no_hook_wherever_it_comes(used: Any) -> None:
    model = used("gpt2")
    assert interrupted_everywhere(entering(model, one("gpt2", "all")), model, OURS, 80)[False] > 60


def test_an_interrupted_collection_leaves_no_hook_wherever_it_comes(used: Any) -> None:
    model, corpus = used("gpt2"), tiny.corpus((5, 6))

    def act() -> None:
        collect(model, corpus, batch_size=2, progress=False)

    assert interrupted_everywhere(act, model, OURS | {collecting.__file__, shortcuts.__file__, WITH}, 120)[False] > 80
