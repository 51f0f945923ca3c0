"""Means over the tokens of a text as keys: a loop over positions and plain PyTorch hooks are the oracle."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from interventions_helpers import box_around_half
from positions_helpers import ROWS, pad, run, values
from torch import Tensor

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.interventions.when import When
from lens_unlearn.keyspace.regions import Box
from lens_unlearn.methods import gated_pruning as gating
from lens_unlearn.methods import key_space_detection as detection
from lens_unlearn.methods.gated_pruning import gated_pruning
from lens_unlearn.methods.key_space_detection import key_space_detection
from lens_unlearn.model.pooling import running_mean
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import query_keys
from lens_unlearn.neurons.key_sample import KeySample

FIRST, LAST = Site(0, "mlp.post"), Site(1, "mlp.post")


def by_hand(keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean over what counts up to each position, in a loop."""
    out = keys.astype(np.float64).copy()
    for row in range(len(keys)):
        for place in range(keys.shape[1]):
            some = [keys[row, i].astype(np.float64) for i in range(place + 1) if counts[row, i]]
            if some:
                out[row, place] = sum(some) / len(some)
    return out


def text_of(row: list[int]) -> list[int]:
    """Which positions of an unpadded row of a tiny model's tokens count: all but special tokens, and the first but for BOS."""
    return [i for i, id in enumerate(row) if id >= 3 and (i > 0)]


def mean_key(model: Any, row: list[int], site: Site) -> Tensor:
    """The mean key of one row that runs alone."""
    keys = values(model, torch.tensor([row]), site)[0].flatten(1).double()
    some = text_of(row)
    return keys[some].mean(0) if some else keys[-1]


def test_it_is_the_mean_over_what_counts_up_to_each_position_and_goes_on_from_pass_to_pass() -> None:
    draw = np.random.default_rng(0)
    keys, counts = draw.normal(size=(4, 9, 5)).astype(np.float32), draw.random((4, 9)) < 0.5
    counts[0] = False
    keys[1, 3], counts[1, 3] = np.nan, False  # what does not count changes nothing behind it
    expected = by_hand(keys, counts)
    whole, last = running_mean(torch.tensor(keys), torch.tensor(counts))
    np.testing.assert_allclose(whole.numpy(), expected, rtol=1e-5, atol=1e-6)
    carry, parts = None, []
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        part, carry = running_mean(torch.tensor(keys[:, begin:end]), torch.tensor(counts[:, begin:end]), carry)
        parts.append(part)
    np.testing.assert_allclose(torch.cat(parts, 1).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert carry is not None
    assert torch.equal(carry[1], last[1])
    half = running_mean(torch.tensor(keys).bfloat16(), torch.tensor(counts))[0]
    assert half.dtype == torch.float32


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("bos", [True, False])
def test_the_keys_of_queries_are_means_over_their_tokens_in_the_plain_model(name: str, bos: bool) -> None:
    model = tiny.model(name)
    corpus = tiny.corpus(np.random.default_rng(1).integers(5, 12, 12).tolist(), bos=bos).with_prompts(seed=0)
    plain, expected = tiny.hugging_face(name), []
    for row in range(corpus.n_rows):
        prompt = corpus.prompt(row)
        keys = tiny.plain_activations(plain, name, ["mlp.post"], prompt[None])[LAST][0].double()
        expected.append(keys[text_of(prompt.tolist())].mean(0))
    for batch_size in (1, 5):
        sample = query_keys(model, corpus, [LAST], pool="mean", batch_size=batch_size, progress=False)
        assert repr(sample).endswith("means)")
        found = sample[LAST].flatten(1).double()
        # A sample has an order of its own.
        for key in expected:
            assert float((found - key).abs().amax(1).min()) < 1e-4
        assert len(found) == len(expected)


def centred(model: Any, site: Site, rows: list[list[int]]) -> tuple[Box, list[bool]]:
    """A box around the mean keys of some of the rows, and which rows are inside."""
    keys = torch.stack([mean_key(model, row, site) for row in rows]).float()
    far = (keys - keys[0]).abs().amax(1)
    order = far.sort().values
    limit = float((order[len(rows) // 2 - 1] + order[len(rows) // 2]) / 2)
    return Box(keys[:1], torch.ones(keys.shape[1]), limit), (far <= limit).tolist()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_query_is_judged_by_its_own_mean_whatever_the_padding(name: str, side: str) -> None:
    model = tiny.speaking(name)
    box, inside = centred(model, FIRST, ROWS)
    assert any(inside)
    assert not all(inside)
    tokens, mask = pad(ROWS, side, extra=2)
    with Abstain({FIRST: box}, pool="mean").on(model) as live:
        run(model, tokens, mask)
        assert live.abstained.tolist() == inside
        run(model, torch.tensor([ROWS[0]]))
        assert live.abstained.tolist() == [True]


@pytest.mark.parametrize("when", ["prompt", "every_token"])
def test_with_a_cache_and_without_the_same_tokens_are_found(when: Any) -> None:
    model = tiny.speaking("gpt2")
    tokens = tiny.some_tokens(8, 7)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "return_type": "tokens"}
    options["stop_at_eos"] = False
    free = model.generate(tokens, use_past_kv_cache=False, **options)
    keys = values(model, free, FIRST).flatten(2)
    counts = np.array([[i in text_of(row) for i in range(len(row))] for row in free.tolist()])
    means = by_hand(keys.numpy(), counts)
    behind = means[:, tokens.shape[1] - 1 :]
    centre = behind.reshape(-1, behind.shape[-1]).mean(0)
    far = np.abs(means - centre).max(-1)
    limit = float(np.median(far[:, tokens.shape[1] - 1 :].min(1)))
    box = Box(torch.tensor(centre[None]).float(), torch.ones(len(centre)), limit)
    # The text is that of the model, until something is found: so the first token that is found is the same.
    found = far[:, tokens.shape[1] - 1 : -1] <= limit
    expected = found.any(1) if when == "every_token" else found[:, 0]
    assert 0 < expected.sum() < len(expected) or when == "prompt"
    for cached in (True, False):
        with Abstain({FIRST: box}, when=when, pool="mean").on(model) as live:
            model.generate(tokens, use_past_kv_cache=cached, **options)
            assert live.abstained.tolist() == expected.tolist(), cached


@pytest.mark.parametrize("cuts", [(4, 9), (1, 2, 6, 9), (6, 7, 8, 9)])
@pytest.mark.parametrize("when", ["prompt", "every_token"])
def test_a_prompt_in_pieces_behind_a_cache_is_judged_as_at_once(cuts: tuple[int, ...], when: Any) -> None:
    model, tokens = tiny.speaking("gpt2"), tiny.some_tokens(8, 9)
    ends = torch.tensor([5, 3, 7, 5, 4, 2, 6, 5])
    keys = torch.stack([mean_key(model, row[: end + 1].tolist(), FIRST) for row, end in zip(tokens, ends)]).float()
    far = (keys - keys[0]).abs().amax(1)
    box = Box(keys[:1], torch.ones(keys.shape[1]), float(far.median()) * 1.001)
    with Abstain({FIRST: box}, when=when, pool="mean").on(model) as live, torch.no_grad():
        live.expect(ends)
        model(tokens)
        whole = live.abstained.tolist()
        if when == "prompt":
            assert whole == (far <= box.limit).tolist()
        live.expect(ends)
        cache, begin = None, 0
        for end in cuts:
            out = model.original_model(tokens[:, begin:end], past_key_values=cache, use_cache=True)
            cache, begin = out.past_key_values, end
        assert live.abstained.tolist() == whole


def two_skills() -> tuple[Corpus, Corpus]:
    """Prompts whose tokens differ everywhere but at their ends."""
    sides = []
    for seed, tokens in ((1, range(3, 6)), (2, range(200, 203))):
        draw = np.random.default_rng(seed)
        made = tiny.corpus([12] * 120, seed=seed, tokens=tokens)
        flat = made.tokens.clone().reshape(120, 13)
        flat[:, 6:] = torch.tensor(draw.integers(60, 200, (120, 7)), dtype=torch.int32)
        sides.append(Corpus(**{**vars(made), "tokens": flat.reshape(-1)}).with_prompts(8))
    return sides[0], sides[1]


def test_skills_are_told_apart_by_their_means_and_fresh_queries_too() -> None:
    model, (forget, retain) = tiny.model("gpt2"), two_skills()
    options: dict[str, Any] = {"layer": 0, "region": "linear", "false_alarms": 0.1, "progress": False}
    mean = key_space_detection(model, forget, retain, pool="mean", **options)
    assert mean.rates["detection"][0] > 0.9
    assert mean.pool == "mean"
    assert "mean of the text" in repr(mean)
    with mean.on(model) as live:
        seen = []
        for corpus in (forget, retain):
            fired = [False] * 0
            for row in range(40):
                run(model, corpus.prompt(row)[None])
                fired += live.abstained.tolist()
            seen.append(sum(fired) / 40)
    assert seen[0] > 0.9
    assert seen[1] < 0.2


def test_gated_pruning_and_keys_that_are_given_are_pooled_as_asked(tmp_path: Path) -> None:
    model, (forget, retain) = tiny.model("gpt2"), two_skills()
    gated = gated_pruning(model, forget, retain, layer=0, pool="mean", false_alarms=0.1, fraction=0.5, progress=False)
    assert isinstance(gated, When)
    assert gated.detector.pool == "mean"
    assert gated.detector.rates["detection"][0] > 0.9
    gated.save(tmp_path / "g.safetensors", model)
    again = load_intervention(tmp_path / "g.safetensors", model)
    assert repr(again) == repr(gated)
    keys = [query_keys(model, part, [FIRST], pool="mean", progress=False) for part in (forget, retain)]
    options: dict[str, Any] = {"layer": 0, "region": "linear", "progress": False}
    assert key_space_detection(model, *keys, pool="mean", **options).rates["detection"][0] > 0.9
    with pytest.raises(LensUnlearnError, match="pool='last' is asked of keys that were collected with pool='mean'"):
        key_space_detection(model, *keys, **options)
    with pytest.raises(LensUnlearnError, match="do not merge"):
        keys[0].merge(query_keys(model, retain, [FIRST], progress=False))
    for part in (*keys[0].split(1, 1), KeySample.joined(keys), *keys[0].shuffled(keys[1]), keys[0].fresh()):
        assert part.pool == "mean"


@pytest.mark.parametrize("method", [detection.METHOD, gating.METHOD])
def test_the_method_record_collects_once_what_its_options_ask_for(method: Any) -> None:
    model, (forget, retain) = tiny.model("gpt2"), two_skills()
    options: dict[str, Any] = {"layer": 0, "region": "linear", "pool": "mean", "progress": False}
    fitted = method.fit(model, forget, retain, options)
    act = method.at(model, fitted, 0.1, options)
    detector = act.detector if isinstance(act, When) else act
    assert detector.pool == "mean"
    assert detector.rates["detection"][0] > 0.9


def test_what_is_no_way_to_pool_is_refused() -> None:
    model = tiny.model("gpt2")
    with pytest.raises(LensUnlearnError, match="pool='max' is not known: choose from last, mean"):
        Abstain({FIRST: box_around_half(model, FIRST)}, pool="max")  # type: ignore[arg-type]
    with pytest.raises(LensUnlearnError, match="pool='max' is not known"):
        key_space_detection(model, *two_skills(), pool="max")  # type: ignore[arg-type]
    with pytest.raises(LensUnlearnError, match="pool='max' is not known"):
        query_keys(model, two_skills()[0], [FIRST], pool="max")  # type: ignore[arg-type]
