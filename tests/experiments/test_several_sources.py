"""A method that keeps its budget on each source to retain gets them apart, in a run, in tuning, and from a file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line_helpers import WORDS, write_texts

import lens_unlearn as lu
from lens_unlearn.experiments.experiment import Experiment
from lens_unlearn.experiments.plan import Plan
from lens_unlearn.experiments.run_folder import fitted_form
from lens_unlearn.methods import by_name, key_space_detection, method
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.reports import findings

QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture
def plan(model_dir: Path, tmp_path: Path) -> Plan:
    backwards = [word[::-1] for word in WORDS]
    forget = write_texts(tmp_path / "forget.jsonl", 1, 60, backwards)
    far, near = (
        write_texts(tmp_path / f"{name}.jsonl", seed, 60, words)
        for name, seed, words in (("far", 2, WORDS), ("near", 3, WORDS[:7] + backwards[7:]))
    )
    return Plan(
        str(model_dir), f"{forget}:text", (f"{far}:text", f"{near}:text"), tokens=1500, window=32, sweep=False,
        methods=("key-space-detection", "selective-pruning"), settings={"false_alarms": 0.2, "layer": -1},
    )  # fmt: skip


def test_a_run_hands_each_source_to_the_method_that_asks_for_it(plan: Plan, tmp_path: Path) -> None:
    run = Experiment(plan, **QUIET)
    run.require()
    run.fit()
    forget, retain = run.fitted["key-space-detection"]
    assert isinstance(forget, KeySample)
    assert [type(part) for part in retain] == [KeySample, KeySample]
    assert all(isinstance(part, lu.Moments) for part in run.fitted["selective-pruning"])
    pooled = run.documents.queries["retain"]
    assert {key for source in run.documents.retain_queries for key in source.keys} == set(pooled.keys)
    asked = (run.documents.queries["forget"], run.documents.retain_queries)
    direct = lu.key_space_detection(run.model, *asked, false_alarms=0.2, layer=-1, **QUIET)
    found = run.edits["key-space-detection"]
    assert isinstance(found, lu.Abstain)
    assert repr(found) == repr(direct)
    [place] = found.regions
    assert found.regions[place].limit == direct.regions[place].limit
    # The limit is that of the source on which it is smallest.
    limits = [
        lu.key_space_detection(run.model, asked[0], one, false_alarms=0.2, layer=-1, **QUIET).regions[place].limit
        for one in retain
    ]
    together = lu.key_space_detection(run.model, asked[0], pooled, false_alarms=0.2, layer=-1, **QUIET)
    assert min(limits) != max(limits)
    assert found.regions[place].limit < together.regions[place].limit
    # What was fitted is read from its file as it was, and its controls are of all sources.
    form = fitted_form(run.model)
    form.save(tmp_path / "fitted.safetensors", (forget, retain))
    again = form.load(tmp_path / "fitted.safetensors")
    assert len(again[1]) == 2
    for one, other in zip((forget, *retain), (again[0], *again[1]), strict=True):
        assert torch.equal(one[place], other[place])
    report = run.report()
    assert {"key-space-detection", "key-space-detection:control"} <= set(report.conditions)
    # Each source is measured for itself on documents of the pool's split, and earlier runs, which did not, are still the same runs.
    assert report.provenance["retained"] == list(plan.retain) == report.corpora[2:]
    assert findings.retained(report) == plan.retain
    assert set(run.documents.test["retain"].keys) <= {k for name in plan.retain for k in run.documents.test[name].keys}
    assert not {f"test {name}" for name in plan.retain} & set(run.texts())


def test_a_source_that_is_measured_anyway_is_not_measured_twice(plan: Plan, tmp_path: Path) -> None:
    forget, far, near = (f"{write_texts(tmp_path / f'{seed}.jsonl', seed, 60)}:text" for seed in (7, 8, 9))
    tested = replace(plan, test_forget=forget, test_retain=(far, near), also={"far": far})
    documents = Experiment(tested, **QUIET).documents
    assert list(documents.test) == ["forget", "retain", "far", near]
    assert documents.retained == ("far", near)
    one = Experiment(replace(plan, retain=plan.retain[:1]), **QUIET).documents
    assert one.retained == ()
    assert list(one.test) == ["forget", "retain"]


def test_tuning_takes_sources_by_name(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    model = lu.load_model(plan.model)
    sources = [plan.forget, *plan.retain]
    forget, far, near = (lu.read_corpus(source, model, window=32) for source in sources)
    given: list[Any] = []
    record = by_name("key-space-detection")

    def noted(self: Any, model: Any, forget: Any, retain: Any, options: Any) -> Any:
        given.append(retain)
        raise InterruptedError

    monkeypatch.setattr(method.Method, "fit", noted)
    for tuned in (record, by_name("selective-pruning")):
        with pytest.raises(InterruptedError):
            lu.tune(tuned, model, forget, {"far": far, "near": near}, retain_drop=0.5, **QUIET)
    assert [part.n_documents for part in given[0]] == [36, 36]
    assert isinstance(given[1], lu.Corpus)
    assert key_space_detection.METHOD.together([far]) is far
