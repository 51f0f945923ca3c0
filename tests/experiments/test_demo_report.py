"""The embedded model and `lens-unlearn demo`, small."""

import multiprocessing
import os
from pathlib import Path

import pytest

import lens_unlearn as lu
from lens_unlearn import demo, methods
from lens_unlearn.experiments import demo_report, documents

pytestmark = pytest.mark.skipif(
    not (demo.MODEL_DIR / "model.safetensors").exists(), reason="the weights are not in this checkout"
)


def test_the_demo_model_knows_its_skills() -> None:
    model = lu.load_model("demo")
    questions = demo.corpus("facts", "test")[:20]
    prompts = [f"Q: {row['question']}\nA:" for row in questions]
    answers = lu.generate(model, prompts, max_new_tokens=24)
    right = sum(
        answer.split("\n")[0].strip() == str(row["answer"]).strip()
        for answer, row in zip(answers, questions, strict=True)
    )
    assert right >= 18
    sums = [row for row in demo.corpus("arithmetic", "test") if "question" in row][:30]
    answers = lu.generate(model, [str(row["question"]) for row in sums], max_new_tokens=4)
    right = sum(
        answer.split("\n")[0].strip() == str(row["answer"]).strip() for answer, row in zip(answers, sums, strict=True)
    )
    assert right >= 25


@pytest.mark.long
def test_the_showcase_shows_both_directions_with_controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_report, "SKILLS", ("python", "english", "facts"))
    monkeypatch.setattr(demo_report, "STEPS", 24)
    monkeypatch.setattr(documents, "QUERIES", 200)
    monkeypatch.setattr(documents, "TUNED_ON", 15)  # too few for the demo's own budget
    monkeypatch.setattr(demo_report, "BUDGET", 0.4)
    monkeypatch.setattr(demo_report, "FRACTIONS", (0.2,))
    monkeypatch.setattr(demo_report, "FALSE_ALARMS", (0.05,))
    names_run = ("selective-pruning", "key-space-detection")  # the others run in the same way, on smaller models
    monkeypatch.setattr(methods, "METHODS", tuple(map(methods.by_name, names_run)))
    out = tmp_path / "demo"
    report = demo_report.demo_report(out, tokens=1600, progress=False)
    names = ["base", *(f"{method}{end}" for method in names_run for end in ("", ":control"))]
    for part in (report, report.parts[0]):
        assert part.conditions == names
        for method in names_run:
            assert part.selectivity(method).value > part.selectivity(f"{method}:control").value
        withheld = {name: part["key-space-detection", name, "abstained"].value for name in ("forget", "retain")}
        assert withheld["forget"] > withheld["retain"] + 0.1, "few and short texts: about nine rows, and a budget"
    persons = report.parts[1]
    known = {name: persons["simu", name, "exact_memorization"].value for name in ("forget", "retain", "never seen")}
    assert known["forget"] < persons["base", "forget", "exact_memorization"].value - 0.02, "a few steps"
    assert known["retain"] > known["forget"]
    assert set(persons.provenance["forget_quality"]) == {"base", "simu"}
    assert (out / "persons" / "simu.safetensors").exists()
    assert {
        "report.html",
        "metrics.csv",
        "run.json",
        "selective-pruning.safetensors",
        "the-other-way-round",
        "persons",
    } <= set(os.listdir(out))
    page = (out / "report.html").read_text()
    assert "Forget python, keep english" in page
    assert "Forget english, keep python" in page
    assert "Forget eight persons" in page


def test_a_second_process_works_meanwhile_and_ends_with_the_first() -> None:
    with pytest.raises(ZeroDivisionError), demo_report._meanwhile(True, os.getpid) as other:  # noqa: PT012
        assert other() != os.getpid()
        _ = 1 / 0
    assert not multiprocessing.active_children()
    with demo_report._meanwhile(False, os.getpid) as here:
        assert here() == os.getpid()
