"""How many tokens at a time: as asked for, as measured where that pays, and the same again when a run goes on."""

from typing import Any

import pytest
import tiny
import torch

import lens_unlearn as lu
from lens_unlearn.corpora import batching
from lens_unlearn.corpora.batching import batch_tokens, rows_at_once, use_batch_tokens


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_used", {})


def timed(monkeypatch: pytest.MonkeyPatch, cost: Any) -> list[int]:
    """Let a pass of so many tokens take what `cost` says; return the sizes that are tried."""
    now, tried = [0.0], list[int]()

    def run(model: Any, tokens: torch.Tensor) -> None:
        tried.append(tokens.numel())
        now[0] += cost(tokens.numel())

    monkeypatch.setattr(batching, "backbone", run)
    monkeypatch.setattr(batching, "_now", lambda device: now[0])
    return tried


def test_what_is_asked_for_is_given() -> None:
    model, corpus = tiny.model("gpt2"), tiny.corpus((9, 5))
    assert rows_at_once(model, corpus, 3) == 3
    assert rows_at_once(model, corpus, None) == 1024 // 10
    use_batch_tokens(model, 20)
    assert rows_at_once(model, corpus, None) == 2
    use_batch_tokens(model, 5)
    assert rows_at_once(model, corpus, None) == 1


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (lambda n: n, 4096),  # all alike: the largest
        (lambda n: n if n <= 512 else 1.2 * n, 512),
        (lambda n: n + 1000, 4096),  # every pass has a cost of its own
        (lambda n: n * n, 256),
        (lambda n: n if n <= 1024 else 9 * n, 1024),
    ],
    ids=["alike", "cache", "overhead", "square", "cliff"],
)
def test_the_largest_of_the_fastest_is_taken(cost: Any, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, corpus = tiny.model("gpt2"), tiny.corpus([63] * 100)
    tried = timed(monkeypatch, cost)
    assert batch_tokens(model, corpus, passes=100) == expected
    assert tried[:3] == [256, 256, 512], "the first is to warm up"
    assert batch_tokens(model, corpus, passes=100) == expected
    assert sum(tried) < 9000, "measured once"


def test_little_work_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, lambda n: n)
    corpus = tiny.corpus([49] * 100)
    assert batch_tokens(tiny.model("gpt2"), corpus, passes=11) == 1024
    assert not tried
    batch_tokens(tiny.model("gpt2"), corpus, passes=12)
    assert tried


def test_little_text_and_no_room_end_the_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, lambda n: n)
    assert batch_tokens(tiny.model("gpt2"), tiny.corpus([49] * 12), passes=1000) == 1024
    assert max(tried) == 600

    def full(n: int) -> float:
        if n > 700:
            raise torch.OutOfMemoryError("no room")
        return float(n)

    timed(monkeypatch, full)
    assert batch_tokens(tiny.model("llama"), tiny.corpus([49] * 100), passes=1000) == 512


def test_results_are_the_same_whatever_was_measured() -> None:
    model, corpus = tiny.model("gpt2"), tiny.corpus((9, 5, 12, 30, 3))
    edit = lu.Ablate(lu.NeuronMap({lu.Site(0, "mlp.post"): torch.arange(64) < 20}))
    reports = []
    for tokens in (20, 1000):
        use_batch_tokens(model, tokens)
        reports.append(lu.evaluate(model, {"c": corpus}, {"x": edit}, resamples=10, progress=False))
    one, other = reports
    for key, measure in one.measures.items():
        assert measure.value == pytest.approx(other.measures[key].value, rel=1e-5, abs=1e-6)
    assert one.provenance["rows at a time"] == {"c": 1}
    assert other.provenance["rows at a time"] == {"c": 1000 // 31}


def test_a_collection_goes_on_with_the_batches_it_began_with(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, corpus, path = tiny.model("gpt2"), tiny.corpus((9, 5, 12, 30, 3)), tmp_path / "c.safetensors"
    whole = lu.collect(model, corpus, progress=False, batch_size=1)
    use_batch_tokens(model, 20)
    update = lu.Moments.update
    calls = []

    def broken(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        update(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(lu.Moments, "update", broken)
        with pytest.raises(KeyboardInterrupt):
            lu.collect(model, corpus, progress=False, checkpoint=path)
    use_batch_tokens(model, 1000)
    again = lu.collect(model, corpus, progress=False, checkpoint=path)
    for site in whole.sites:
        torch.testing.assert_close(again.mean[site], whole.mean[site], rtol=0, atol=0)
