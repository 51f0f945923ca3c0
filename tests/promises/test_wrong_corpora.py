"""What stands in a corpus's place without being one is refused at once, in one sentence that says how to make one of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import torch

import lens_unlearn as lu
from lens_unlearn.core.errors import CorpusError, LensUnlearnError

WRONG: dict[str, Callable[[], Any]] = {
    "a path": lambda: "code.jsonl",
    "a Path": lambda: Path("code.jsonl"),
    "nothing": lambda: None,
    "texts": lambda: ["a text", "another"],
    "a table": lambda: pd.DataFrame({"text": ["a text"]}),
    "a dict": dict,
    "corpora by name": lambda: {"code": tiny.corpus()},
    "a number": lambda: 3,
    "the model": lambda: tiny.model("gpt2"),
}
EDIT = lu.Ablate(lu.NeuronMap({lu.Site(0, "mlp.post"): torch.ones(4, dtype=torch.bool)}))


def fine() -> Any:
    return tiny.corpus([9, 12, 30])


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "collect": lambda model, wrong: lu.collect(model, wrong, progress=False),
    "query_keys": lambda model, wrong: lu.query_keys(model, wrong, progress=False),
    "attribute": lambda model, wrong: lu.attribute(model, wrong, progress=False),
    "top_examples": lambda model, wrong: lu.top_examples(model, wrong, "L0.mlp.post[1]", progress=False),
    "relearn": lambda model, wrong: lu.relearn(
        model, EDIT, wrong, measured={"a": fine()}, steps=[0, 1], progress=False
    ),
    "relearn, measured": lambda model, wrong: lu.relearn(model, EDIT, fine(), measured={"a": wrong}, steps=[0, 1]),
    "membership": lambda model, wrong: lu.membership(model, wrong, fine(), {}, progress=False),
    "membership, outside": lambda model, wrong: lu.membership(model, fine(), wrong, {}, progress=False),
    "audit": lambda model, wrong: lu.audit(model, wrong, {}, progress=False),
    "evaluate": lambda model, wrong: lu.evaluate(model, {"a": wrong}, {}, progress=False),
    "key_space": lambda model, wrong: lu.key_space(model, {"a": fine(), "b": wrong}, progress=False),
    "compare": lambda model, wrong: lu.compare(model, {"a": fine(), "b": wrong}, progress=False),
    "skill_graph": lambda model, wrong: lu.skill_graph(model, {"a": fine(), "b": wrong}, progress=False),
    "sweep": lambda model, wrong: lu.sweep(lu.selective_pruning, model, fine(), fine(), {"a": wrong}, progress=False),
    "tune": lambda model, wrong: lu.tune(lu.selective_pruning, model, wrong, fine(), progress=False),
    "tune, retain": lambda model, wrong: lu.tune(lu.selective_pruning, model, fine(), {"a": wrong}, progress=False),
    "selective_pruning": lambda model, wrong: lu.selective_pruning(model, wrong, fine(), progress=False),
    "neuron_adjust": lambda model, wrong: lu.neuron_adjust(model, fine(), wrong, progress=False),
    "key_space_detection": lambda model, wrong: lu.key_space_detection(model, wrong, fine(), progress=False),
    "simu": lambda model, wrong: lu.simu(model, wrong, fine(), progress=False),
    "Corpus.without": lambda model, wrong: fine().without(wrong),
    "Corpus + ": lambda model, wrong: fine() + wrong,
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_corpus_is_refused_saying_how_to_make_one(name: str, kind: str) -> None:
    model = tiny.model("gpt2")
    with pytest.raises(CorpusError, match=r"^[^\n]*pass [^\n]*lens_unlearn\.read_corpus\([^\n]*$"):
        CALLS[name](model, WRONG[kind]())


def test_random_controls_refuse_it_too() -> None:
    for kind in WRONG:
        if kind != "nothing":  # without a text, any neuron may be drawn
            with pytest.raises(CorpusError, match=r"lens_unlearn\.read_corpus\("):
                lu.random_pruning(tiny.model("gpt2"), WRONG[kind](), None, fraction=0.5)


@pytest.mark.parametrize(
    "wrong", ["code.jsonl", None, ["a text"], 3, fine], ids=["a path", "None", "texts", "a number", "a corpus"]
)
def test_corpora_are_given_by_name(wrong: Any) -> None:
    model = tiny.model("gpt2")
    given = wrong() if callable(wrong) else wrong
    for call in (
        lambda: lu.evaluate(model, given, {}),
        lambda: lu.compare(model, given),
        lambda: lu.skill_graph(model, given),
        lambda: lu.sweep(lu.selective_pruning, model, fine(), fine(), given),
    ):
        with pytest.raises(CorpusError, match="are given by name: pass {'a name': "):
            call()
    with pytest.raises(LensUnlearnError, match="there is no corpus to evaluate on"):
        lu.evaluate(model, {}, {})


def test_the_call_to_write_is_named() -> None:
    model, call = tiny.model("gpt2"), r"lens_unlearn\.read_corpus\('a\.jsonl', model\)"
    with pytest.raises(CorpusError, match=rf"^corpus is 'a\.jsonl', which has not been read: pass {call}$"):
        lu.collect(model, "a.jsonl")
    with pytest.raises(CorpusError, match=r"^corpus is a model, and no corpus: pass the model first, and "):
        lu.collect(model, model)


def test_texts_that_are_none_are_refused() -> None:
    for wrong in (None, 3, tiny.model("gpt2")):
        with pytest.raises(CorpusError, match="is no text: give a string, several, or a corpus"):
            lu.token_losses(tiny.model("gpt2"), wrong)
