"""Forgetting facts means these facts: fitted, tuned and tested on whole, while what is retained is split; and everybody is told."""

import html
import json
import re
from dataclasses import replace
from functools import partial
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from command_line_helpers import call

import lens_unlearn as lu
from lens_unlearn import demo
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.experiments import compare, experiment
from lens_unlearn.experiments.compare import plans_for
from lens_unlearn.experiments.documents import Reader
from lens_unlearn.experiments.plan import Plan, command_of
from lens_unlearn.methods import tuning
from lens_unlearn.methods.method import Method

pytestmark = pytest.mark.skipif(
    not (demo.MODEL_DIR / "model.safetensors").exists(), reason="the weights are not in this checkout"
)
FORGET, RETAIN, NEIGHBOURS = "demo:facts_forget:train", "demo:facts_retain:dev", "demo:facts_retain:test"
FACTS: dict[str, Any] = {"model": "demo", "forget": FORGET, "retain": (RETAIN,), "facts": True}
QUICK = [
    "--set",
    "simu.mask=none",
    "--set",
    "simu.attention=lora",
    "--set",
    "simu.steps=2",
    "--set",
    "simu.check_every=2",
]


@pytest.fixture(scope="module")
def model() -> Any:
    return lu.load_model("demo")


def keys(corpus: lu.Corpus) -> set[str]:
    return set(corpus.keys)


def test_facts_are_whole_for_every_use_and_what_is_retained_is_split(model: Any) -> None:
    """However few tokens are drawn of everything else."""
    forget = lu.read_corpus(FORGET, model)
    plan = Plan(**FACTS, tokens=200, retain_drop=0.1, methods=("simu", "key-space-detection"), also={"n": NEIGHBOURS})
    documents = Reader(plan, model, {}).read()
    parts = (documents.fit, documents.tune, documents.test, documents.queries)
    assert all(keys(part["forget"]) == keys(forget) for part in parts)
    assert all(part["forget"].n_tokens == forget.n_tokens > 200 for part in parts)
    retained = [keys(part["retain"]) for part in (documents.fit, documents.tune, documents.test)]
    assert all(retained)
    assert not any(one & other for one, other in combinations([*retained, keys(forget)], 2))
    assert not keys(documents.queries["retain"]) & (retained[1] | retained[2])


def test_without_a_budget_nothing_is_kept_for_tuning(model: Any) -> None:
    retain = lu.read_corpus(RETAIN, model)
    documents = Reader(Plan(**FACTS), model, {}).read()
    fit, test = documents.fit["retain"], documents.test["retain"]
    assert keys(fit) | keys(test) == keys(retain)
    assert not keys(fit) & keys(test)
    assert test.n_tokens / retain.n_tokens == pytest.approx(1 / 3, abs=0.02)
    documents = Reader(Plan(**FACTS, test_retain=(NEIGHBOURS,)), model, {}).read()
    assert keys(documents.fit["retain"]) == keys(retain)
    assert keys(documents.test["retain"]) == keys(lu.read_corpus(NEIGHBOURS, model))


def test_facts_to_forget_are_not_retained(model: Any) -> None:
    """Where the retain source, or its test source, holds them too."""
    forget = lu.read_corpus(FORGET, model)
    for test in ((), ("demo:facts:test",)):
        plan = Plan(**{**FACTS, "retain": ("demo:facts:train",)}, test_retain=test)
        documents = Reader(plan, model, {}).read()
        assert not keys(forget) & (keys(documents.fit["retain"]) | keys(documents.test["retain"]))
        assert documents.removed["forget"] == 0
        assert documents.removed["retain"] >= forget.n_documents
    with pytest.raises(CorpusError, match="every document of"):
        Reader(Plan(**{**FACTS, "retain": ("demo:facts_forget:dev",)}), model, {}).read()


def test_the_groups_of_what_is_retained_stay_whole(model: Any) -> None:
    corpus = lu.read_corpus(RETAIN, model)
    prompts = [answer.head for answer in corpus.answers if answer is not None]
    grouped = replace(corpus, groups=tuple(re.findall(r"[A-Z]\w+ [A-Z]\w+", prompt)[-1] for prompt in prompts))
    plan = Plan(**FACTS, retain_drop=0.1)
    key = (RETAIN, 25 * plan.tokens, plan.template, plan.window)
    documents = Reader(plan, model, {key: grouped}).read()
    used = [set(part["retain"].groups) for part in (documents.fit, documents.tune, documents.test)]
    assert not any(one & other for one, other in combinations(used, 2))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes, of a method that trains and of one that is fitted to statistics."""
    out = tmp_path_factory.mktemp("facts") / "out"
    arguments = ["run", "--model", "demo", "--facts", "--forget", FORGET, "--retain", RETAIN, "--quiet", "--no-sweep"]
    arguments += ["--method", "simu", "--method", "selective-pruning", *QUICK, "--also", f"neighbours={NEIGHBOURS}"]
    assert call(*arguments, "--tokens", 300, "--out", out) == 0
    return out


def test_the_command_measures_on_the_facts_that_it_was_given(written: Path, model: Any) -> None:
    table = pd.read_csv(written / "metrics.csv").set_index(["condition", "corpus", "metric"])
    forget = lu.read_corpus(FORGET, model)
    for method in ("simu", "selective-pruning"):
        edit = lu.load_intervention(written / f"{method}.safetensors", model)
        again = lu.evaluate(model, {"forget": forget}, {"edited": edit}, progress=False)
        row = table.loc[method, "forget", "loss"]
        assert again["edited", "forget", "loss"].value == pytest.approx(row["value"], rel=1e-5)
        assert again["edited", "forget", "loss"].n == row["n"]
    assert {corpus for _, corpus, _ in table.index} == {"forget", "retain", "neighbours"}


def test_everybody_is_told(written: Path) -> None:
    saved = json.loads((written / "run.json").read_text())
    assert saved["plan"]["facts"] is True
    assert "the very facts that every method was fitted" in saved["protocol"]
    assert " --facts " in saved["command"]
    assert saved["documents"]["fit"]["forget"] == saved["documents"]["test"]["forget"]
    page = " ".join(html.unescape((written / "report.html").read_text()).split())
    assert saved["protocol"] in page
    assert "<b>the very facts that the methods were fitted to</b>" in page
    assert "forget</i> and" not in page.partition("In brackets")[2][:300]
    skill = Plan("demo", FORGET, (RETAIN,))
    assert "No document is used for two" in skill.protocol
    assert "--facts" not in command_of(skill)


BAD = {
    "a test source": (["--forget", FORGET, "--retain", RETAIN, "--test-forget", FORGET], "leave out --test-forget"),
    "both test sources": (
        ["--forget", FORGET, "--retain", RETAIN, "--test-forget", FORGET, "--test-retain", NEIGHBOURS],
        "leave out --test-forget",
    ),
    "the same facts": (["--forget", FORGET, "--retain", FORGET], "same text"),
    "nothing else to retain": (["--forget", FORGET, "--retain", "demo:facts_forget:dev"], "every document of"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_one_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = BAD[case]
    assert call("run", "--model", "demo", "--facts", *arguments, "--out", tmp_path / "out", "--quiet") == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_tune_fits_and_judges_on_all_facts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forget, both = lu.read_corpus(FORGET, model), lu.read_corpus("demo:facts:train", model)
    fitted, judged = [], []
    fit, measure = Method.fit, tuning.evaluate
    monkeypatch.setattr(Method, "fit", lambda self, m, *c: fitted.append(c[:2]) or fit(self, m, *c))
    monkeypatch.setattr(
        tuning, "evaluate", lambda m, c, *a, **n: judged.append((*c.values(),)) or measure(m, c, *a, **n)
    )
    lu.tune("selective-pruning", model, forget, both, facts=True, retain_drop=0.1, evaluations=1, progress=False)
    assert all(keys(corpus) == keys(forget) for corpus, _ in (*fitted, *judged))
    (fit_retain,) = {frozenset(corpus.keys) for _, corpus in fitted}
    (tune_retain,) = {frozenset(corpus.keys) for _, corpus in judged}
    assert fit_retain | tune_retain == keys(both) - keys(forget)
    assert not fit_retain & tune_retain
    with pytest.raises(LensUnlearnError, match="not both"):
        lu.tune("selective-pruning", model, forget, both, facts=True, held_out=(forget, both))


def test_compare_forgets_each_list_of_facts_as_a_whole(model: Any) -> None:
    lists = {"some": lu.read_corpus(FORGET, model), "others": lu.read_corpus(RETAIN, model)}
    plans = plans_for(list(lists), "demo", retain_drop=0.1, tokens=200, facts=True)
    texts = compare.split_skills(lists, None, 0, facts=True)
    for (skill, other), run in zip(
        permutations(lists), compare._skill_runs(plans, model, texts, progress=False).values(), strict=True
    ):
        parts = (run.documents.fit, run.documents.tune, run.documents.test)
        assert all(keys(part["forget"]) == keys(lists[skill]) for part in parts)
        retained = [keys(part["retain"]) for part in parts]
        assert not any(one & another for one, another in combinations(retained, 2))
        assert set.union(*retained) <= keys(lists[other])
        assert keys(run.documents.test[other]) == retained[-1]


def test_the_command_compares_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "tune", partial(lu.tune, evaluations=2))
    arguments = ["compare", "--model", "demo", "--facts", "--skill", f"some={FORGET}", "--skill", f"others={RETAIN}"]
    arguments += ["--method", "selective-pruning", "--tokens", 100, "--seeds", 1, "--retain-drop", 0.2, "--quiet"]
    assert call(*arguments, "--out", tmp_path / "out") == 0
    saved = json.loads((tmp_path / "out" / "run.json").read_text())
    assert all(plan["facts"] for plan in saved["plan"]["turns"].values())
    assert saved["protocol"] in html.unescape((tmp_path / "out" / "compare.html").read_text())
