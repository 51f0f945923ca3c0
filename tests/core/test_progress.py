"""Bars name their stage; where the output is no terminal they are lines, and nothing is drawn over."""

import subprocess
import sys
from typing import Any

import pytest

from lens_unlearn.core import progress
from lens_unlearn.core.progress import Bar, say, stage

Captured = pytest.CaptureFixture[str]


def test_in_a_log_a_bar_is_a_line_every_so_often(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "in_a_log", lambda: True)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with stage("tune 1 of 2: simu"), Bar(total=4, desc="evaluate", unit=" tokens") as bar:
        bar.called("evaluate 1 of 2: forget")
        for _ in range(4):
            bar.update()
    text = capsys.readouterr().err
    assert "\r" not in text
    lines = text.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("tune 1 of 2: simu: evaluate 1 of 2: forget: ") and ": :" not in line for line in lines)
    assert [line.partition("%")[0].split()[-1] for line in lines] == ["25", "50", "75", "100"]


def test_lines_are_rare_and_what_ends_at_once_has_none(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "in_a_log", lambda: True)
    with Bar(total=1000) as bar:
        for _ in range(1000):
            bar.update()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "BRIEF", -1.0)
    with Bar(total=10) as bar:
        bar.update(10)
    assert capsys.readouterr().err.count("\n") == 1


def test_on_a_terminal_a_bar_is_drawn_over(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "in_a_log", lambda: False)
    with stage("sweep"), Bar(total=2, desc="evaluate", file=sys.stderr) as bar:
        bar.update(2)
    assert "\rsweep: evaluate" in capsys.readouterr().err


def test_nothing_is_shown_where_nothing_is_to_be(capsys: Captured) -> None:
    with Bar(total=2, disable=True) as bar:
        bar.called("something")
        bar.update(2)
    say("a line", shown=False)
    assert capsys.readouterr().err == ""
    say("a line")
    assert capsys.readouterr().err == "a line\n"


def test_the_first_import_in_a_notebook_without_widgets_warns_of_nothing() -> None:
    """As in a plain kernel: IPython is there, ipywidgets is not."""
    code = """
import sys, warnings
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ipywidgets":
            raise ImportError(name)
sys.meta_path.insert(0, Nothing())
import types
shell = types.SimpleNamespace(config={"IPKernelApp": {}})
ipython = types.ModuleType("IPython"); ipython.get_ipython = lambda: shell; sys.modules["IPython"] = ipython
warnings.simplefilter("error")
import lens_unlearn
from tqdm.auto import tqdm
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()[-500:]


def test_evaluating_moves_the_bar_with_every_pass(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import lens_unlearn as lu
    from lens_unlearn.evaluation import evaluate

    moved: list[tuple[str, int]] = []

    class Watched(Bar):
        def update(self, n: float | None = 1) -> Any:
            moved.append((self.desc, int(n or 0)))
            return super().update(n)

    monkeypatch.setattr(evaluate, "Bar", Watched)
    texts = lu.read_corpus(["the quick brown fox jumps", "over a lazy dog"] * 3, model)
    edit = lu.random_pruning(model, fraction=0.5)
    corpora = {"forget": texts, "retain": texts}
    lu.evaluate(model, corpora, {"edit": edit, "control": [edit, edit]}, batch_size=2, progress=True)
    batches = len(list(texts.batches(2)))
    assert len(moved) == 2 * batches * 4
    assert sum(n for _, n in moved) == 2 * 4 * texts.n_read
    assert [*dict.fromkeys(desc for desc, _ in moved)] == ["evaluate 1 of 2: forget: ", "evaluate 2 of 2: retain: "]
