"""Tasks of lm-evaluation-harness: against the harness' own Hugging Face model, by hand, and under interventions."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from positions_helpers import LAST, around, key

import lens_unlearn as lu
from lens_unlearn.core.errors import ActivationError, CorpusError, LensUnlearnError
from lens_unlearn.evaluation.evaluate import evaluate
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.base import Chain
from lens_unlearn.neurons.maps import NeuronMap

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lens_unlearn.evaluation.harness import HarnessModel, _own_random_state, _shared, run_tasks

TOLD: dict[str, Any] = {"resamples": 20, "progress": False}


def request(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def demo() -> Any:
    return lu.load_model("demo")


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Three tasks of local data, one of each kind of request, in the form that the demo model knows."""
    rows = [{"q": f"{a}+{b}=", "good": str(a + b), "bad": str(a + b + 1)} for a in range(2, 6) for b in range(11, 14)]
    file = tmp_path_factory.mktemp("tasks") / "sums.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    both = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "target_delimiter": "",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    choice = {
        "task": "sums_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": ["{{bad}}", "{{good}}"],
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
    }
    write = {
        "task": "sums_write",
        "output_type": "generate_until",
        "doc_to_target": "{{good}}",
        "generation_kwargs": {"until": ["\n", ","], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", **mean}],
    }
    text = {
        "task": "sums_text",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}{{good}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    return {one["task"]: {**both, **one} for one in (choice, write, text)}


def test_log_likelihoods_are_those_of_the_harness_own_model(demo: Any) -> None:
    """Whatever stands beside a row: the harness runs the plain Hugging Face model in batches of its own."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(lu.demo.MODEL_DIR, dtype=torch.float32)
    theirs = HFLM(pretrained=plain, tokenizer=demo.tokenizer, batch_size=2, add_bos_token=True, device="cpu")
    ours = HarnessModel(demo, batch_size=3)
    texts = [
        ("2+11=", "13"),
        ("Once upon a time", " there was a king"),
        ("", "def f(x):"),
        ("a b ", "c"),
        ("for i", " in"),
    ]
    found = ours.loglikelihood([request(*pair) for pair in texts])
    expected = theirs.loglikelihood([request(*pair) for pair in texts], disable_tqdm=True)
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected], rtol=1e-4, atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in found} == {True, False}
    long = "The king said that " * 300  # several windows
    rolling = ours.loglikelihood_rolling([request(long), request("one")])
    # With BOS added by itself, the harness' model also counts how well BOS is predicted behind BOS.
    theirs = HFLM(pretrained=plain, tokenizer=demo.tokenizer, batch_size=2, add_bos_token=False, device="cpu")
    expected = theirs.loglikelihood_rolling([request(long), request("one")], disable_tqdm=True)
    np.testing.assert_allclose(rolling, expected, rtol=1e-4)


def test_what_is_written_ends_at_the_first_stop_text(demo: Any) -> None:
    ours = HarnessModel(demo)
    text = lu.generate(demo, "Once upon a time", max_new_tokens=12)
    inner = text[4:7]
    options = [
        {"until": [inner, "never"], "max_gen_toks": 12},
        {"until": [], "max_gen_toks": 12},
        {"max_new_tokens": 3},
    ]
    found = ours.generate_until([request("Once upon a time", one) for one in options])
    assert found[0] == text[: text.index(inner)]
    assert found[1] == text
    assert found[2] == lu.generate(demo, "Once upon a time", max_new_tokens=3)
    with pytest.raises(LensUnlearnError, match="top_p"):
        ours.generate_until([request("a", {"do_sample": True, "top_p": 0.9})])


def test_tasks_stand_in_the_report_with_intervals(demo: Any, sums: dict[str, Any]) -> None:
    noise = Ablate(NeuronMap({site: torch.ones(n, dtype=torch.bool) for site, n in widths(demo).items()}))
    tasks = list(sums.values())
    report = evaluate(demo, {}, {"none": noise}, tasks=tasks, task_limit=10, batch_size=4, **TOLD)
    base = report.measures["base", "sums_choice", "acc"]
    assert base.n == 10
    assert base.value == 1.0
    assert report.measures["base", "sums_write", "exact_match"].value >= 0.9
    assert report.measures["none", "sums_write", "exact_match"].value == 0
    assert report.measures["none", "sums_choice", "acc"].value < 1
    assert len(report.measures["none", "sums_choice", "acc"].draws) == 20
    assert "left out" not in report.provenance["tasks"]
    assert {sample["corpus"] for sample in report.samples} == {"sums_write"}
    assert report.samples[0]["base"].strip() == report.samples[0]["true answer"]
    assert "sums_choice" in report.to_frame().corpus.tolist()
    assert {"sums_choice acc", "sums_write exact_match"} <= set(report.table().columns)
    assert "sums_write exact_match" in report._repr_html_()


def widths(model: Any) -> dict[lu.Site, int]:
    return {lu.Site(layer, "mlp.post"): model.cfg.d_mlp for layer in range(model.cfg.n_layers)}


def test_a_task_gives_the_mean_of_its_documents(demo: Any, sums: dict[str, Any]) -> None:
    """Against log probabilities by hand."""
    asked, _ = run_tasks(demo, [sums["sums_choice"]], {"base": [None], "edit": [one_of(demo)]}, progress=False)
    rows = [
        json.loads(line)
        for line in Path(sums["sums_choice"]["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    ]
    for condition, edit in (("base", None), ("edit", one_of(demo))):
        right = []
        for row in rows:
            with edit.on(demo) if edit else torch.no_grad():
                right.append(by_hand(demo, row["q"], row["good"]) > by_hand(demo, row["q"], row["bad"]))
        scores = asked["sums_choice"].scores
        (table,) = scores.values[condition]
        assert table[:, [row.name for row in scores.metrics].index("acc")].tolist() == [float(r) for r in right]


def test_few_shot_examples_are_the_same_for_every_condition_and_in_every_run(demo: Any, sums: dict[str, Any]) -> None:
    """An intervention that changes nothing gives what the unedited model gives, question by question, whenever it is run."""
    few = {**sums["sums_choice"], "task": "sums_few", "num_fewshot": 2, "fewshot_split": "test"}
    runs = {"base": [None], "empty": [Chain()], "again": [Chain()]}
    first, second = (run_tasks(demo, [few], runs, progress=False)[0]["sums_few"] for _ in range(2))
    tables = [asked.scores.values[name][0] for asked in (first, second) for name in runs]
    assert all(np.array_equal(table, tables[0]) for table in tables)
    alone = run_tasks(demo, [sums["sums_choice"]], {"base": [None]}, progress=False)[0]["sums_choice"]
    assert not np.array_equal(tables[0], alone.scores.values["base"][0]), "examples in the prompt make a difference"


def one_of(model: Any) -> Ablate:
    chosen = {site: torch.arange(n) % 2 == 0 for site, n in widths(model).items()}
    return Ablate(NeuronMap(chosen))


def by_hand(model: Any, prompt: str, answer: str) -> float:
    start = [model.tokenizer.bos_token_id, *model.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    whole = [model.tokenizer.bos_token_id, *model.tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        logits = model(torch.tensor([whole]))[0].double().numpy()
    total = 0.0
    for place in range(len(start), len(whole)):
        row = logits[place - 1]
        total += row[whole[place]] - np.log(np.exp(row - row.max()).sum()) - row.max()
    return total


def test_what_is_abstained_from_is_worth_nothing_and_written_as_the_refusal(demo: Any) -> None:
    prompt = [demo.tokenizer.bos_token_id, *demo.tokenizer("2+11=", add_special_tokens=False)["input_ids"]]
    site = lu.Site(LAST.layer, LAST.kind)
    abstain = Abstain({site: around(key(demo, prompt))}, refusal="No.")
    ours = HarnessModel(demo)
    asked = [request("2+11=", "13"), request("2+12=", "14")]
    with abstain.on(demo):
        silent, said = ours.loglikelihood(asked)
        assert ours.generate_until([request("2+11=", {"max_gen_toks": 2})]) == ["No."]
    assert silent[1] is False
    tokens = len(demo.tokenizer("13", add_special_tokens=False)["input_ids"])
    assert silent[0] == pytest.approx(-tokens * np.log(demo.cfg.d_vocab), rel=1e-5)
    assert said == pytest.approx(
        ours.loglikelihood(asked)[1], rel=1e-4
    )  # with fused attention, where nothing is hooked


def test_yaml_files_are_tasks_too(demo: Any, sums: dict[str, Any], tmp_path: Path) -> None:
    import yaml

    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(sums["sums_choice"]))
    report = evaluate(demo, {}, {}, tasks=[file], task_limit=3, **TOLD)
    assert report.measures["base", "sums_choice", "acc"].n == 3
    given = evaluate(demo, {}, {}, base=report, tasks=[file], task_limit=3, **TOLD)
    assert given.measures["base", "sums_choice", "acc"].value == report.measures["base", "sums_choice", "acc"].value


def test_what_cannot_be_run_is_reported_in_a_sentence(demo: Any, sums: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(LensUnlearnError, match="there is no task file"):
        evaluate(demo, {}, {}, tasks=[tmp_path / "none.yaml"], **TOLD)
    lost = {**sums["sums_choice"], "dataset_kwargs": {"data_files": {"test": str(tmp_path / "none.jsonl")}}}
    with pytest.raises(LensUnlearnError, match="sums_choice cannot be run"):
        evaluate(demo, {}, {}, tasks=[lost], **TOLD)
    with pytest.raises(LensUnlearnError, match="limit=0"):
        evaluate(demo, {}, {}, tasks=[sums["sums_choice"]], task_limit=0, **TOLD)
    with pytest.raises(LensUnlearnError, match="or tasks"):
        evaluate(demo, {}, {}, **TOLD)
    with pytest.raises(CorpusError, match="no tokenizer"):
        HarnessModel(tiny.model("gpt2"))
    with pytest.raises(LensUnlearnError, match="batch_size=0"):
        HarnessModel(demo, 0)
    with pytest.raises(CorpusError, match="does not fit"):
        HarnessModel(demo).loglikelihood([request("a", "word " * 2000)])
    named = {"sums_choice": lu.read_corpus("demo:python", demo, tokens=300)}
    with pytest.raises(LensUnlearnError, match="both called 'sums_choice'"):
        evaluate(demo, named, {}, tasks=[sums["sums_choice"]], task_limit=1, **TOLD)
    assert not any(point.fwd_hooks for point in demo.hook_dict.values())


def test_without_the_harness_it_is_said_what_to_install(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("harness", "harness_model"):
        monkeypatch.delitem(sys.modules, f"lens_unlearn.evaluation.{module}")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(LensUnlearnError, match=r"pip install 'lens-unlearn\[harness\]'"):
        evaluate(demo, {}, {}, tasks=["arc_easy"], **TOLD)


# --- what is asked, and how much of it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [6, 200, 256, 1000], ids=["short", "nearly all", "all", "more"])
def test_an_answer_that_may_fill_the_context_leaves_the_prompt_whole(
    demo: Any, sums: dict[str, Any], most: int
) -> None:
    """The harness' default is 256 tokens, which is all that small models have."""
    task = {**sums["sums_write"], "generation_kwargs": {"until": ["\n", ","], "max_gen_toks": most}}
    report = evaluate(demo, {}, {}, tasks=[task], task_limit=4, **TOLD)
    assert report.measures["base", "sums_write", "exact_match"].value == 1
    assert "left out" not in report.provenance["tasks"]
    [alone] = HarnessModel(demo).generate_until([request("2+11=", {"until": ["\n"], "max_gen_toks": most})])
    assert alone.strip() == "13"


def test_a_prompt_longer_than_the_context_loses_its_beginning_and_that_is_said(demo: Any, sums: dict[str, Any]) -> None:
    filler = "The king said that. " * demo.cfg.n_ctx
    task = {**sums["sums_write"], "doc_to_text": filler + "\n{{q}}"}
    report = evaluate(demo, {}, {"same": Chain()}, tasks=[task], task_limit=3, **TOLD)
    said = report.provenance["tasks"]["left out"]["prompts"]
    assert said == f"the beginnings of 3, longer than the context of {demo.cfg.n_ctx} tokens"
    ours = HarnessModel(demo)
    ids = ours._shortened(ours.tok_encode(filler), 6)
    assert ids[0] == demo.tokenizer.bos_token_id
    assert len(ids) == demo.cfg.n_ctx - 6
    assert ids[1:] == ours.tok_encode(filler)[-len(ids) + 1 :]


def test_bos_stands_once_before_a_text(demo: Any) -> None:
    ours, bos = HarnessModel(demo), demo.tokenizer.bos_token
    plain = ours.tok_encode("2+11=")
    assert ours.tok_encode(bos + "2+11=") == plain
    assert plain.count(demo.tokenizer.bos_token_id) == 1
    assert ours.tok_encode("2+11=", add_special_tokens=False) == plain[1:]
    one, other = ours.loglikelihood([request("2+11=", "13"), request(bos + "2+11=", "13")])
    assert one == other


def asked(model: Any, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[str]:
    """The prompts that a task puts."""
    seen: list[str] = []
    real = HarnessModel.generate_until

    def look(self: Any, requests: list[Any], **rest: Any) -> list[str]:
        seen.extend(one.args[0] for one in requests)
        return real(self, requests, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(HarnessModel, "generate_until", look)
        evaluate(model, {}, {}, tasks=[task], task_limit=2, **options, **TOLD)
    return seen


def test_examples_templates_and_instructions_are_options(
    demo: Any, sums: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {**sums["sums_write"], "fewshot_split": "test", "fewshot_delimiter": "\n"}
    bare = asked(demo, task, monkeypatch)
    assert bare == ["2+11=", "2+12="]
    few = asked(demo, task, monkeypatch, num_fewshot=2)
    assert all(prompt.count("=") == 3 and prompt.endswith(end) for prompt, end in zip(few, bare))
    assert asked(demo, {**task, "num_fewshot": 2}, monkeypatch) == few, "as the task itself would have it"
    assert asked(demo, {**task, "num_fewshot": 2}, monkeypatch, num_fewshot=0) == bare
    assert all(
        one.startswith("Add.") and one.endswith(end)
        for one, end in zip(asked(demo, task, monkeypatch, system_instruction="Add."), bare, strict=True)
    )
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with pytest.raises(CorpusError, match="has no chat template"):
        evaluate(demo, {}, {}, tasks=[task], apply_chat_template=True, **TOLD)
    monkeypatch.setattr(demo.tokenizer, "chat_template", template)
    chat: dict[str, Any] = {"apply_chat_template": True, "system_instruction": "Add.", "num_fewshot": 1}
    for prompt, end in zip(asked(demo, task, monkeypatch, **chat), bare, strict=True):
        assert prompt.startswith("<system>Add.</system><user>")
        assert prompt.endswith(f"</assistant><user>{end}</user><assistant>")
    report = evaluate(demo, {}, {}, tasks=[task], task_limit=1, **chat, **TOLD)
    assert report.provenance["tasks"]["options"] == chat


def test_options_of_tasks_that_cannot_be_are_refused(demo: Any, sums: dict[str, Any]) -> None:
    for options in ({"num_fewshot": 2}, {"apply_chat_template": True}, {"system_instruction": "Add."}):
        with pytest.raises(LensUnlearnError, match="are for tasks, of which there are none"):
            evaluate(demo, {"c": lu.read_corpus("demo:python", demo, tokens=100)}, {}, **options, **TOLD)
    with pytest.raises(LensUnlearnError, match="num_fewshot=-1 is no number of examples"):
        evaluate(demo, {}, {}, tasks=[sums["sums_write"]], num_fewshot=-1, **TOLD)
    fixed = {**sums["sums_write"], "num_fewshot": 0, "fewshot_split": "test"}
    report = evaluate(demo, {}, {}, tasks=[fixed], num_fewshot=2, task_limit=1, **TOLD)
    assert report.provenance["tasks"]["left out"]["sums_write: num_fewshot"].startswith("the task itself says")


def test_perplexities_are_those_of_the_harness_with_intervals(demo: Any, sums: dict[str, Any]) -> None:
    from lm_eval.evaluator import evaluate as theirs
    from lm_eval.tasks import TaskManager

    whole = {
        **sums["sums_text"],
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        "doc_to_target": "The king said that {{q}}{{good}} is right.",
    }
    ends = {
        **sums["sums_choice"],
        "task": "sums_ends",
        "output_type": "loglikelihood",
        "doc_to_target": "{{good}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    }
    del ends["doc_to_choice"]
    edit = one_of(demo)
    report = evaluate(demo, {}, {"edit": edit}, tasks=[whole, ends], **TOLD)
    for condition in ("base", "edit"):
        with edit.on(demo) if condition == "edit" else torch.no_grad(), _own_random_state():
            loaded = TaskManager(include_defaults=False).load([whole, ends])
            found = theirs(HarnessModel(demo), loaded, bootstrap_iters=0)
        assert found is not None
        for task, metric in (
            *(("sums_text", one["metric"]) for one in whole["metric_list"]),
            ("sums_ends", "perplexity"),
            ("sums_ends", "acc"),
        ):
            ours = report.measures[condition, task, metric]
            assert ours.value == pytest.approx(found["results"][task][f"{metric},none"], rel=1e-6)
            assert len(ours.draws) == 20
    assert "left out" not in report.provenance["tasks"]


def test_a_model_whose_logits_are_no_numbers_is_refused_in_tasks_too(demo: Any, sums: dict[str, Any]) -> None:
    broken = lu.load_model("demo")
    with torch.no_grad():
        broken.blocks[1].mlp.out.weight[3] = float("nan")
    for name in ("sums_choice", "sums_write", "sums_text"):
        with pytest.raises(ActivationError, match="NaN or infinite: that begins in layer 1"):
            evaluate(broken, {}, {}, tasks=[sums[name]], task_limit=1, **TOLD)


@pytest.mark.parametrize(
    ("scores", "target", "expected"),
    [
        ((-1.0, -1.0, -1.0, -1.0), 0, 0.25),  # the harness says 1
        ((-1.0, -1.0, -1.0, -1.0), 3, 0.25),  # and 0
        ((-2.0, -1.0, -1.0, -3.0), 2, 0.5),
        ((-2.0, -1.0, -1.0, -3.0), 0, 0.0),
        ((-2.0, -1.0, -1.5, -3.0), 1, 1.0),
        ((-1.0, -1.0, -1.0, -1.0), [0, 2], 0.5),
        ((-1.0, -1.0, -2.0, -2.0), "B", 0.5),
    ],
)
def test_options_that_score_equally_share_the_point(scores: Any, target: Any, expected: float) -> None:
    """No option is right for standing first, so constant logits earn what guessing does."""
    wanted = [
        ord(one) - ord("A") if isinstance(one, str) else one
        for one in (target if isinstance(target, list) else [target])
    ]
    sample = {
        "arguments": [("Answer:", f" {letter}") for letter in "ABCD"],
        "filtered_resps": [(score, False) for score in scores],
        "target": target,
        "acc": float(int(np.argmax(scores)) in wanted),
    }
    assert _shared(sample, "acc", " ") == expected


def test_a_model_of_constant_logits_earns_what_guessing_does(demo: Any) -> None:
    rows = [{"q": f"{n}", "good": 0} for n in range(4)]
    import datasets

    task = {
        "task": "first_is_right",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "{{good}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }

    class Silent(Ablate):
        looks_at_rows = True

        def finish(self, logits: Any, live: Any) -> Any:
            return torch.zeros_like(logits)

    everything = NeuronMap({site: value for site, value in lu.random_pruning(demo, fraction=0.1).selection.items()})
    asked, _ = run_tasks(demo, [task], {"base": [None], "silent": [Silent(everything)]}, progress=False)
    assert asked["first_is_right"].scores.values["silent"][0][:, 0].tolist() == [0.25] * 4
