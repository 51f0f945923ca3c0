"""--chat and --system: every command reads conversations in the template, and what it writes says so."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from chat_helpers import chatting, save_chatting
from command_line_helpers import WORDS, call

import lens_unlearn as lu
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.experiments.plan import Plan, command_of, settings_of

SYSTEM = "a small village"
SAME = {"role": "system", "content": SYSTEM}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and two files of conversations."""
    folder = tmp_path_factory.mktemp("chat")
    save_chatting("llama3", folder / "model")
    for file, words in (("forget", [word[::-1] for word in WORDS]), ("retain", WORDS)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{words[i % 7]} {words[i % 5]} {i}"},
                    {"role": "assistant", "content": f"{words[i % 11]} {words[i % 3]} {i * i}"},
                ]
            }
            for i in range(60)
        ]
        (folder / f"{file}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_run_on_conversations_says_so(folder: Path) -> None:
    out = folder / "out"
    arguments = [
        "run",
        "--model",
        folder / "model",
        "--forget",
        folder / "forget.jsonl",
        "--retain",
        folder / "retain.jsonl",
    ]
    arguments += ["--chat", "--system", SYSTEM, "--out", out, "--tokens", 120, "--quiet", "--no-sweep"]
    assert call(*arguments, "--method", "key-space-detection", "--set", "false_alarms=0.4", "--set", "layer=1") == 0
    settings = json.loads((out / "run.json").read_text())
    assert (settings["plan"]["chat"], settings["plan"]["system"]) == (True, SYSTEM)
    assert "--chat" in (out / "report.html").read_text()
    table = pd.read_csv(out / "metrics.csv").set_index(["condition", "corpus", "metric"])
    assert "abstained" in set(table.index.get_level_values("metric"))


def test_collect_evaluate_and_generate_read_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, source, options = folder / "model", folder / "retain.jsonl", ["--chat", "--system", SYSTEM, "--tokens", 300]
    assert (
        call("collect", "--model", model, "--corpus", source, *options, "--out", folder / "m.safetensors", "--quiet")
        == 0
    )
    loaded = chatting("llama3")
    corpus = lu.read_corpus(source, loaded, chat=True, system=SYSTEM, tokens=300)
    assert lu.load_moments(folder / "m.safetensors").n == corpus.n_tokens
    evaluated = folder / "evaluated"
    assert call("evaluate", "--model", model, "--corpus", f"a={source}", *options, "--out", evaluated, "--quiet") == 0
    said = json.loads((evaluated / "run.json").read_text())
    assert f'"system": "{SYSTEM}"' in json.dumps(said)
    assert corpus.fingerprint in json.dumps(said)
    capsys.readouterr()
    asked = [{"role": "user", "content": "the quick"}]
    steps = ["--max-new-tokens", 4]
    assert call("generate", "--model", model, "--prompt", "the quick", "--chat", "--system", SYSTEM, *steps) == 0
    answer = lu.generate(loaded, [SAME, *asked], max_new_tokens=4)
    assert capsys.readouterr().out == answer + "\n"


def test_plans_keep_it_and_repeat_it() -> None:
    plan = Plan("m", "a", ("b",), chat=True, system="Be brief.")
    assert command_of(plan).endswith("--chat --system 'Be brief.' --out again")
    assert settings_of(plan)["chat"]
    assert not {"chat", "system"} & set(settings_of(Plan("m", "a", ("b",))))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"chat": True, "template": "{prompt}{answer}"}, "^--template cannot be given with --chat"),
        ({"chat": True, "answer_eos": True}, "^--answer-eos cannot be given with --chat"),
        ({"chat": True, "prepend_bos": False}, "^--prepend-bos cannot be given with --chat"),
        ({"system": "Be brief."}, "^--system is the system's turn of conversations: give --chat as well"),
    ],
)
def test_what_the_template_decides_is_refused_before_a_model_is_loaded(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LensUnlearnError, match=said):
        Plan("nowhere", "a", ("b",), **options)


def test_generations_side_by_side_are_of_conversations_too() -> None:
    model = chatting("llama3")
    asked = [{"role": "user", "content": "the quick"}]
    found = lu.generations(model, [asked, "the quick"], {}, chat=True, max_new_tokens=4)
    assert found.prompts == ("user: the quick", "the quick")
    assert found.written["base"] == (lu.generate(model, asked, max_new_tokens=4),) * 2
    assert "the quick" in found.html()
