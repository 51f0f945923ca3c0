"""Threads: hooks are global to a model, so one thread at a time changes or measures it, and others may look on."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import tiny
import torch
from interventions_helpers import FORMS, POST, one, selection_of, unchanged, under
from torch import Tensor

from lens_unlearn.core.errors import ModelError
from lens_unlearn.evaluation.evaluate import evaluate
from lens_unlearn.evaluation.generation import generate
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.base import Chain, Intervention
from lens_unlearn.interventions.live import Live
from lens_unlearn.model import matrices, sites
from lens_unlearn.model.hooks import one_thread
from lens_unlearn.model.replay import replaying
from lens_unlearn.model.sites import resolve
from lens_unlearn.neurons.attribution import attribute
from lens_unlearn.neurons.collect import collect

QUIET = {"progress": False}


@pytest.fixture
def worker() -> Iterator[Callable[..., Future[Any]]]:
    """Run something in another thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="worker") as pool:
        yield pool.submit


@contextmanager
def running(act: Callable[[], Any]) -> Iterator[list[Any]]:
    """Do something again and again in another thread, for the length of a `with` block; yields what came of it."""
    results: list[Any] = []
    stop, begun = threading.Event(), threading.Event()

    def loop() -> None:
        while not stop.is_set():
            results.append(act())
            begun.set()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(loop)
        assert begun.wait(60)
        try:
            yield results
        finally:
            stop.set()
            future.result()


def enter(model: Any, intervention: Intervention) -> Tensor:
    with intervention.on(model):
        return tiny.logits(model)


# --- one at a time -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_second_thread_is_refused_while_the_first_is_inside_and_let_in_afterwards(worker: Any, form: str) -> None:
    model, second = tiny.model("gpt2"), one("gpt2", form)
    first = Ablate(selection_of(model, seed=9))
    alone = under(model, first), under(model, second)
    with unchanged(model):
        with first.on(model):
            with pytest.raises(ModelError, match=r"thread 'MainThread' has an intervention.*'worker_0' begins"):
                worker(enter, model, second).result()
            assert torch.equal(tiny.logits(model), alone[0]), "the first is undisturbed"
        assert torch.equal(worker(enter, model, second).result(), alone[1])


def inside(model: Any, what: str) -> Any:
    corpus = tiny.corpus((5, 6)).with_prompts(3)
    actions: dict[str, Callable[[], Any]] = {
        "collect": lambda: collect(model, corpus, **QUIET),
        "evaluate": lambda: evaluate(model, {"a": corpus}, {}, resamples=5, **QUIET),
        "attribute": lambda: attribute(model, corpus, steps=1, **QUIET),
        "on": lambda: enter(model, one("gpt2", "zero")),
        "an empty chain": lambda: enter(model, Chain(())),
    }
    return actions[what]()


@pytest.mark.parametrize("what", ["collect", "evaluate", "attribute", "on", "an empty chain"])
def test_what_measures_is_kept_apart_from_what_changes(worker: Any, what: str) -> None:
    model = tiny.model("gpt2")
    with unchanged(model):
        for held in (one("gpt2", "zero").on(model), replaying(model), one_thread(model)):
            with held, pytest.raises(ModelError, match="give each thread a model of its own"):
                worker(inside, model, what).result()
        worker(inside, model, what).result()


@pytest.mark.parametrize("what", ["collect", "evaluate", "attribute", "on"])
def test_nothing_gets_in_while_another_thread_measures(what: str) -> None:
    model, corpus = tiny.model("gpt2"), tiny.corpus((5, 6)).with_prompts(3)
    entered, go = threading.Event(), threading.Event()

    def wait(tensor: Tensor, hook: Any) -> None:
        entered.set()
        assert go.wait(60)

    point = model.hook_dict["blocks.0.mlp.hook_post"]
    resolve(model, "mlp.post")
    with unchanged(model), ThreadPoolExecutor(1) as pool:
        point.add_hook(wait)
        future = pool.submit(inside, model, what)
        assert entered.wait(60)
        point.remove_hooks("fwd")
        try:
            for other in (lambda: enter(model, one("gpt2", "rows")), lambda: collect(model, corpus, **QUIET)):
                with pytest.raises(ModelError, match="has an intervention on this model, or measures it"):
                    other()
        finally:
            go.set()
        future.result()


def test_other_models_and_blocks_of_the_same_thread_are_free(worker: Any) -> None:
    gpt2, neox, act = tiny.model("gpt2"), tiny.model("neox"), one("gpt2", "zero")
    alone = under(gpt2, act), under(neox, act)
    with act.on(gpt2), act.on(gpt2):
        assert torch.equal(worker(enter, neox, act).result(), alone[1])
        assert torch.equal(tiny.logits(gpt2), alone[0])


def test_one_thread_may_close_what_another_opened(worker: Any) -> None:
    """As a notebook does, whose cells may run in several threads; and a thread that has ended keeps nobody out."""
    model, act = tiny.model("gpt2"), one("gpt2", "all")
    with unchanged(model):
        stack = ExitStack()
        thread = threading.Thread(target=lambda: stack.enter_context(act.on(model)))
        thread.start()
        thread.join()
        both = tiny.logits(model)
        with one("gpt2", "heads").on(model):
            assert not torch.equal(tiny.logits(model), both)
        assert torch.equal(tiny.logits(model), both)
        worker(stack.close).result()


def test_many_threads_at_once_get_in_or_are_refused_and_never_see_one_another() -> None:
    model = tiny.model("gpt2")
    acts = [one("gpt2", form) for form in ("zero", "heads", "deterministic", "rows", "columns", "dense")]
    alone = [under(model, act) for act in acts]
    together = threading.Barrier(len(acts))
    counts = {"in": 0, "refused": 0}

    def compete(number: int) -> None:
        together.wait(60)
        for _ in range(25):
            try:
                assert torch.equal(enter(model, acts[number]), alone[number])
                counts["in"] += 1
            except ModelError:
                counts["refused"] += 1
                time.sleep(0.0005 * number)

    with unchanged(model), ThreadPoolExecutor(len(acts)) as pool:
        for future in [pool.submit(compete, number) for number in range(len(acts))]:
            future.result()
    assert counts["in"] > 0
    assert sum(counts.values()) == 25 * len(acts)


def test_two_that_measure_at_once_each_get_their_result_or_are_refused() -> None:
    model = tiny.model("gpt2")
    corpora = [tiny.corpus((9, 9, 9, 9), seed=seed) for seed in range(4)]
    alone = [collect(model, corpus, batch_size=1, **QUIET).state() for corpus in corpora]
    together = threading.Barrier(len(corpora))

    def measure(number: int) -> int:
        together.wait(60)
        got = 0
        for _ in range(4):
            try:
                state = collect(model, corpora[number], batch_size=1, **QUIET).state()
            except ModelError:
                time.sleep(0.003 * number)
                continue
            assert all(torch.equal(value, state[key]) for key, value in alone[number].items())
            got += 1
        return got

    with unchanged(model), ThreadPoolExecutor(len(corpora)) as pool:
        assert sum(pool.map(measure, range(len(corpora)))) > 0


# --- beside a thread that only runs the model ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", *tiny.HOOKED[:1]])
def test_a_text_streamed_from_a_thread_is_written_under_the_block_that_started_it(worker: Any, name: str) -> None:
    """The pattern of `TextIteratorStreamer`: one thread generates, the other holds the block and reads."""
    model, tokens = tiny.speaking(name), tiny.some_tokens(1, 5)
    options = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    act = Ablate(selection_of(model, share=0.5), 3.0)

    def write() -> Tensor:
        with torch.no_grad():
            return model.generate(tokens, **options)

    plain = write()
    with unchanged(model), act.on(model):
        here = write()
        assert torch.equal(worker(write).result(), here)
        assert worker(generate, model, "def add", max_new_tokens=4).result() == generate(
            model, "def add", max_new_tokens=4
        )
    assert not torch.equal(here, plain)
    assert torch.equal(worker(write).result(), plain)


def test_an_abstention_in_a_thread_is_seen_by_the_one_that_holds_the_block(worker: Any) -> None:
    model = tiny.speaking("gpt2")
    box = one("gpt2", "abstain")
    assert isinstance(box, Abstain)
    tokens = tiny.some_tokens(6, 7)
    with box.on(model) as live:
        here = tiny.logits(model, tokens)
        expected = live.abstained.tolist()
        assert set(expected) == {True, False}
        tiny.logits(model, tokens[:1])
        assert torch.equal(worker(tiny.logits, model, tokens).result(), here)
        assert live.abstained.tolist() == expected


def test_a_generation_that_began_keeps_others_from_changing_the_model(worker: Any) -> None:
    model = tiny.speaking("gpt2")
    with unchanged(model), one_thread(model, joining=True):
        with pytest.raises(ModelError):
            worker(enter, model, one("gpt2", "zero")).result()
        with pytest.raises(ModelError):
            worker(generate, model, "def add", max_new_tokens=2).result()
        enter(model, one("gpt2", "zero"))
    worker(enter, model, one("gpt2", "zero")).result()


# In Llama: two forward passes at once of batches of other sizes break in TransformerLens' own bridge of GPT-2.


def test_passes_of_another_thread_do_not_enter_statistics_and_are_refused() -> None:
    model, corpus = tiny.model("llama"), tiny.corpus((9, 9, 9, 9, 9, 9))
    tokens, sites_of = tiny.some_tokens(2, 40, seed=3), ("mlp.post", "attn.z")

    def run() -> str:
        try:
            tiny.logits(model, tokens)
        except Exception as error:  # or what a model says that is caught between two ways through its weights
            return str(error)
        return ""

    with unchanged(model), one("llama", "zero").on(model):
        alone = collect(model, corpus, sites_of, batch_size=1, **QUIET).state()
        with running(run) as seen:
            for _ in range(5):
                state = collect(model, corpus, sites_of, batch_size=1, **QUIET).state()
                assert all(torch.equal(value, state[key]) for key, value in alone.items())
    assert any(message.startswith("another thread measures this model") for message in seen)


def test_passes_of_another_thread_do_not_enter_attributions_and_are_refused() -> None:
    model, corpus = tiny.model("llama"), tiny.corpus((9, 8)).with_prompts(4)
    tokens = tiny.some_tokens(2, 40, seed=3)

    def run() -> str:
        try:
            tiny.logits(model, tokens)
        except Exception as error:  # or what a model says that is caught between two ways through its weights
            return str(error)
        return "" if torch.is_grad_enabled() else "no gradients"

    with unchanged(model):
        alone = attribute(model, corpus, steps=2, **QUIET)
        with running(run) as seen:
            for _ in range(5):
                assert attribute(model, corpus, steps=2, **QUIET).equals(alone)
    assert any(message.startswith("another thread measures this model") for message in seen)
    assert "no gradients" not in seen


def test_passes_of_another_thread_do_not_disturb_the_probe(worker: Any) -> None:
    with tiny.quiet():
        model = tiny.build("llama")
        tiny.logits(model)
    with running(lambda: tiny.logits(model)):
        for _ in range(30):
            sites._probed.pop(model, None)
            matrices._shapes.pop(model, None)
            enter(model, Chain((one("llama", "heads"), one("llama", "dense"))))
    assert POST[0] in resolve(model, "mlp.post")


class Ended(dict[Any, Any]):
    """A cache that another thread clears, since it ends the block, as soon as something is kept in it."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.clear()


@pytest.mark.parametrize("form", FORMS)
def test_a_pass_in_the_middle_of_which_its_block_ends_is_finished_as_it_began(form: str) -> None:
    model, act = tiny.model("llama"), one("llama", form)
    alone = under(model, act)
    with unchanged(model), act.on(model) as live:
        live._moved, live._once = Ended(), Ended()
        assert torch.equal(tiny.logits(model), alone)


def test_a_copy_follows_the_dtype_and_a_tensor_that_was_changed() -> None:
    live = Live(Chain(()), tiny.model("llama"))
    tensor, single, double = torch.tensor([1.0, 2.0]), torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert live.like(tensor, double).dtype == torch.float64
    assert live.like(tensor, double) is live.like(tensor, double)
    assert live.like(tensor, single).dtype == torch.float32
    tensor += 1
    assert live.like(tensor, double).tolist() == [2.0, 3.0]
