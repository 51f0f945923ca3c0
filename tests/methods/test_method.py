"""A method is one file and one line: what a new record brings with it, and that nobody knows a method by name."""

import ast
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
from command_line_helpers import call
from package_tree import MODULES
from selective_pruning_helpers import TEXTS_CODE, TEXTS_PROSE

import lens_unlearn as lu
from lens_unlearn import methods
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.experiments import documents
from lens_unlearn.experiments.compare import compared
from lens_unlearn.experiments.plan import Plan
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.methods.method import Method
from lens_unlearn.neurons.histogram import Histogram
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.moments import Moments

WORDS = "Ablates the neurons that fire most often over the forget corpus."


def most_firing(model: Any, forget: Moments, retain: Moments, *, fraction: float = 0.1, least: float = 0.0) -> Ablate:
    """Ablate the neurons that fire most often."""
    assert isinstance(forget, Moments)
    assert isinstance(retain, Moments)
    assert least >= 0
    return Ablate((forget.positive - retain.positive * 0.5).top(fraction))


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Method:
    made = Method(name="most-firing", function=most_firing, fitted_to=Moments, strength="fraction", summary=WORDS)
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, made))
    return made


def test_the_binding_form_constructs_a_record() -> None:
    made = Method(name="most-firing", function=most_firing, fitted_to=Moments, strength="fraction")
    assert (made.name, made.function, made.fitted_to, made.strength) == (
        "most-firing",
        most_firing,
        Moments,
        "fraction",
    )
    with pytest.raises(AttributeError):
        made.name = "other"  # type: ignore[misc]


def test_a_new_line_in_the_table_is_all_that_run_compare_help_and_the_page_need(
    record: Method, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "TUNED_ON", 12)
    texts = {"one": "demo:arithmetic", "two": "demo:esperanto"}
    common = ["--model", "demo", "--tokens", 300, "--quiet", "--method", "most-firing"]
    out = tmp_path / "run"
    settings = ["--retain-drop", 0.9, "--set", "least=0.5"]
    assert call("run", "--forget", texts["one"], "--retain", texts["two"], *common, *settings, "--out", out) == 0
    table = pd.read_csv(out / "metrics.csv")
    assert set(table.condition) == {"base", "most-firing", "most-firing:control"}
    options = json.loads((out / "run.json").read_text())
    assert options["chosen"]["most-firing"]["options"] == {"least": 0.5}
    assert options["chosen"]["most-firing"]["fraction"] > 0
    page = (out / "report.html").read_text()
    for words in ("most-firing", "as many random neurons of every layer", "Where most-firing found the skill"):
        assert words in page
    found = lu.load_intervention(out / "most-firing.safetensors")
    assert isinstance(found, Ablate)
    capsys.readouterr()
    assert call("run", "--help") == 0
    assert "most-firing" in (shown := capsys.readouterr().out)
    assert "fire most often" in " ".join(shown.split())
    skills = ["--skill", f"a={texts['one']}", "--skill", f"b={texts['two']}", "--retain-drop", 0.9, "--seeds", 1]
    assert call("compare", *skills, *common, "--out", tmp_path / "compare") == 0
    assert "most-firing" in (tmp_path / "compare" / "compare.html").read_text()
    assert "most-firing" in compared()
    assert (
        call(
            "run",
            "--forget",
            "a",
            "--retain",
            "b",
            "--model",
            "demo",
            "--method",
            "nothing",
            "--out",
            tmp_path / "x",
        )
        == 2
    )
    assert "choose from selective-pruning, selective-pruning-attention," in (err := capsys.readouterr().err)
    assert "most-firing" in err


def test_tune_and_sweep_take_a_record_its_name_or_its_function(record: Method) -> None:
    model, quiet = tiny.model("gpt2"), {"progress": False}
    held = tuple(tiny.corpus([12] * 30, seed=seed, tokens=range(10, 60)) for seed in (5, 6))
    edits = [
        lu.tune(
            given, model, TEXTS_CODE, TEXTS_PROSE, held_out=held, retain_drop=1, metric="top10", evaluations=2, **quiet
        ).intervention
        for given in (record, "most-firing", most_firing)
    ]
    assert all(edit.selection.equals(edits[0].selection) for edit in edits)
    test = {"forget": TEXTS_CODE, "retain": TEXTS_PROSE}
    report = lu.sweep(
        "most-firing", model, TEXTS_CODE, TEXTS_PROSE, test, fractions=(0.1, 0.5), control_seeds=[0], **quiet
    )
    assert report.conditions == ["base", *(f"most-firing{c}@{f}" for f in (0.1, 0.5) for c in ("", ":control"))]
    assert report.provenance["controls"] == {"most-firing": "as many random neurons of every layer"}


@pytest.mark.parametrize("statistic", [Moments, KeySample, Histogram, Corpus])
def test_a_function_gets_what_its_record_says_it_is_fitted_to(statistic: type) -> None:
    seen: list[Any] = []

    def f(model: Any, forget: Any, retain: Any, *, share: float, site: str = "attn.z") -> Ablate:
        seen.append((forget, retain))
        return Ablate(lu.collect(model, TEXTS_CODE, site, progress=False).mean_abs.top(share))

    made = Method(name="own", function=f, fitted_to=statistic, strength="share")
    model = tiny.model("gpt2")
    fitted = made.fit(model, TEXTS_CODE, TEXTS_PROSE, {"progress": False})
    assert all(isinstance(part, statistic) for part in fitted)
    if statistic is not Corpus:
        assert {site.kind for site in fitted[0].sites} == {"attn.z"}
    made.at(model, fitted, 0.1, {})
    made.at(model, fitted, 0.2, {"site": "mlp.post"})
    assert seen == [fitted, fitted], "collected once for all strengths"
    assert made.judges_prompts == (statistic is KeySample)
    assert made.options == ("share", "site")
    assert made.defaults() == {"site": "attn.z"}


def test_a_function_in_no_record_is_fitted_to_corpora_and_named_by_itself() -> None:
    made = methods.record_of(most_firing)
    assert (made.name, made.fitted_to) == ("most-firing", Corpus)
    assert methods.record_of(lu.simu).name == "simu"
    assert methods.record_of("neuron-adjust").function is lu.neuron_adjust
    with pytest.raises(LensUnlearnError, match="there is no method 'x': choose from selective-pruning, "):
        methods.by_name("x")


def test_a_plan_sweeps_a_method_of_another_strength_over_its_own_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Method(name="own", function=most_firing, strength="temperature", grid=(0.25, 0.75))
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, made))
    plan = Plan("demo", "a", ("b",), methods=("own", "simu", "selective-pruning"), fractions=(0.5,))
    assert plan.strengths_of("own") == (0.25, 0.75)
    assert plan.strengths_of("selective-pruning") == (0.5,)
    assert plan.strengths_of("simu") == plan.strengths


def test_nobody_recognizes_a_method_by_its_name_or_its_function() -> None:
    """Outside the files of the methods themselves, no code compares with a method's name or function, or looks one up by it."""
    functions = {method.function.__name__ for method in methods.METHODS}
    named = set(methods.names())
    for module, tree in MODULES.items():
        if module == "experiments.demo_report":  # shows one of them on purpose
            continue
        for node in ast.walk(tree):
            sides: list[ast.expr] = []
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
            elif isinstance(node, ast.Dict):
                sides = [key for key in node.keys if key is not None]
            for side in sides:
                found = {n.id for n in ast.walk(side) if isinstance(n, ast.Name)} & functions
                found |= {n.value for n in ast.walk(side) if isinstance(n, ast.Constant) and n.value in named}
                assert not found, f"{module} recognizes {found} in line {side.lineno}"
