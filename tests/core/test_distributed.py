"""Several processes on one job come to the result of one."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line_helpers import call, write_texts
from safetensors.torch import load_file

from lens_unlearn.core import distributed
from lens_unlearn.core.errors import ProcessError

TESTS = Path(__file__).parents[1]


def launch(processes: int, command: Sequence[object], **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program as `torchrun` does, or alone."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS / 'helpers'}:{TESTS.parent}", **settings}
    return subprocess.run(
        [*python, *map(str, command)], env=env, capture_output=True, text=True, check=False, timeout=300
    )


SCRIPT = """
import sys, torch, tiny
from lens_unlearn.core import distributed
from lens_unlearn.neurons.collect import collect
from lens_unlearn.evaluation.evaluate import evaluate
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.neurons.histogram import Histogram
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.moments import Moments
torch.set_num_threads(1)

def readings(total):
    if not isinstance(total, Moments):
        return total.state()
    names = ("mean", "std", "rms", "mean_abs", "positive", *(("mean_sqrt", "min", "max") if total.extra else ()))
    return {f"{name} {site}": value for name in names for site, value in getattr(total, name).items()}

model, out = tiny.build("gpt2"), sys.argv[1]
corpus = tiny.corpus((9, 3, 14, 5, 6, 11, 30, 2, 17, 40, 8), uncounted=0.2)
options = {"batch_size": 1, "progress": False}
found = {}
for statistic in (Moments(extra=("sqrt", "extrema")), Histogram(bins=16), KeySample(24)):
    total = collect(model, corpus, ("mlp.post", "attn.z"), statistic=statistic, **options)
    found |= {f"{type(statistic).__name__} {name}": tensor.double() for name, tensor in readings(total).items()}
chosen = collect(model, corpus, "mlp.post", **options).mean_abs.top(0.1)
one = tiny.corpus((9,), seed=4)  # fewer batches than processes
few = collect(model, one, "mlp.post", **options)
found |= {f"few {name}": tensor.double() for name, tensor in readings(few).items()}
report = evaluate(model, {"a": corpus, "b": one}, {"x": Ablate(chosen)}, resamples=20, **options)
found |= {"/".join(key): torch.tensor([m.value, *m.draws, m.n], dtype=torch.float64) for key, m in report.measures.items()}
assert len({str(state) for state in distributed.gather(repr(report.to_frame()))}) == 1, "the processes disagree"
if distributed.is_first():
    torch.save(found, out)
"""


def test_statistics_and_evaluations_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = launch(2, [script, tmp_path / "2.pt"])
    assert done.returncode == 0, done.stderr[-2000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), str(tmp_path / "1.pt")])
        runpy.run_path(str(script))
    alone, together = (torch.load(tmp_path / name, weights_only=True) for name in ("1.pt", "2.pt"))
    assert len(alone) > 20
    assert list(together) == list(alone)
    for name, tensor in alone.items():
        np.testing.assert_allclose(together[name].numpy(), tensor.numpy(), rtol=1e-12, atol=1e-13, err_msg=name)


def run_arguments(model_dir: Path, tmp_path: Path, out: Path) -> list[object]:
    forget = write_texts(tmp_path / "forget.jsonl", 1, words=["alpha", "beta", "gamma", "delta", "for", "in"])
    retain = write_texts(tmp_path / "retain.jsonl", 2)
    sources = ["--forget", f"{forget}:text", "--retain", f"{retain}:text"]
    options = ["--tokens", 400, "--window", 32, "--batch-size", 2, "--no-sweep", "--quiet"]
    methods = ["--method", "selective-pruning", "--method", "key-space-detection"]
    return ["run", "--model", model_dir, *sources, *methods, *options, "--out", out]


@pytest.mark.long
def test_two_processes_write_once_what_one_would_also_after_one_of_them_died(model_dir: Path, tmp_path: Path) -> None:
    """One kills itself at the third gathering: when some of the work is done and stored; then both go on."""
    out = tmp_path / "2"
    arguments = run_arguments(model_dir, tmp_path, out)
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys\n"
        "from lens_unlearn import cli\n"
        "from lens_unlearn.core import distributed\n"
        "real, seen = distributed.gather, []\n"
        "def gather(value):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 3 and distributed.number() == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(value)\n"
        "distributed.gather = gather\n"
        "cli.main()\n"
    )
    done = launch(2, [program, *arguments])
    assert done.returncode != 0
    assert not out.exists()
    done = launch(2, ["-m", "lens_unlearn", *arguments, "--resume"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("report:") == 1
    assert (out / "report.html").exists()
    assert not (tmp_path / "2.partial").exists()
    assert call(*run_arguments(model_dir, tmp_path, tmp_path / "1")) == 0
    alone, together = (pd.read_csv(tmp_path / name / "metrics.csv") for name in ("1", "2"))
    assert alone[["condition", "corpus", "metric"]].equals(together[["condition", "corpus", "metric"]])
    for column in ("value", "low", "high"):
        np.testing.assert_allclose(together[column], alone[column], rtol=1e-12, atol=1e-13)
    one, other = (load_file(tmp_path / name / "selective-pruning.safetensors") for name in ("1", "2"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert json.loads((tmp_path / "2" / "run.json").read_text())["plan"]["tokens"] == 400


def test_an_error_says_which_process_it_is_of(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert call(*run_arguments(model_dir, tmp_path, tmp_path / "out"), "--method", "nothing") == 2
    assert "lens-unlearn (process 1 of 2): there is no method 'nothing'" in capsys.readouterr().err
    assert list(tmp_path.glob("out*")) == []


def test_alone_nothing_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert list(distributed.share(range(4))) == [0, 1, 2, 3]
    assert distributed.gather("x") == ["x"]
    assert distributed.from_first(lambda: 5) == 5
    assert distributed.is_first()
    assert distributed.count() == 1


def test_a_launch_that_cannot_be_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ProcessError, match="start them with torchrun, or unset WORLD_SIZE"):
        distributed.count()
