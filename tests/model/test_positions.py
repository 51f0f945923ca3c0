"""Rows: interventions that look at a text judge it for itself, whatever stands beside it, before it, or in a cache.

Regions are planted: a small box around the key of one prompt, found by running that prompt alone. So it is known which row
has to abstain, and at which token.
"""

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interventions_helpers import random_selection, selection_of, unchanged
from positions_helpers import (
    LAST,
    RADIUS,
    ROWS,
    about,
    adjust_of,
    around,
    everywhere,
    ids,
    key,
    pad,
    run,
    values,
    watching,
)
from torch import Tensor
from tqdm import tqdm

from lens_unlearn.core.counter_rng import key_of, mix, uniform
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.evaluate import evaluate
from lens_unlearn.evaluation.generation import generate
from lens_unlearn.evaluation.teacher_forcing import force
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.interventions.base import Chain, Intervention, Live, acting
from lens_unlearn.keyspace.regions import Box
from lens_unlearn.model import positions as rows_module
from lens_unlearn.model.hooks import on_forward, on_logits
from lens_unlearn.model.positions import Rows
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.maps import NeuronMap

FIRST = Site(0, "mlp.post")
PRE = Site(0, "mlp.pre")
FEW = ["gpt2", "llama", *tiny.HOOKED[:1]]
CACHED = [name for name in tiny.SPEAKING if name != "hooked-folded"]


def nowhere(model: Any, site: Site = LAST) -> Box:
    return everywhere(model, site).at(0.0)


def is_constant(logits: Tensor) -> bool:
    """Whether every position's distribution is uniform, but for a hair, and none differs from another."""
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return bool((flat == flat[:1]).all()) and float(flat[0].max() - flat[0].min()) <= 2e-3


# --- Rows alone ----------------------------------------------------------------------------------------------------------

texts = st.lists(st.lists(st.integers(3, 300), min_size=1, max_size=9), min_size=1, max_size=5)


@given(texts, st.sampled_from(["left", "right"]), st.integers(0, 4))
def test_a_row_is_read_as_it_would_be_alone(rows: list[list[int]], side: str, extra: int) -> None:
    tokens, mask = pad(rows, side, extra)
    read = Rows.of(tokens, 0, None, tiny.PAD)
    assert not read.continues
    for i, row in enumerate(rows):
        alone = Rows.of(torch.tensor([row]), 0, None, tiny.PAD)
        assert read.keys[i][mask[i].bool()].tolist() == alone.keys[0].tolist()
        assert tokens[i, read.ends[i]] == row[-1]
        assert int(read.ends[i]) == mask[i].nonzero().max()
        assert read.text[i, int(read.ends[i])]
        assert not read.text[i, int(read.ends[i]) + 1 :].any()


@given(texts, st.lists(st.integers(2, 300), min_size=1, max_size=6), st.data())
def test_going_on_with_a_cache_reads_the_same_as_without(
    rows: list[list[int]], added: list[int], data: st.DataObject
) -> None:
    """Pads (2) may be generated too: then they are tokens like others."""
    tokens, _ = pad(rows, "left", data.draw(st.integers(0, 3)))
    whole = cached = Rows.of(tokens, 0, None, tiny.PAD, None, [7])
    for token in added:
        width = tokens.shape[1]
        new = torch.full((len(rows), 1), token)
        tokens = torch.cat([tokens, new], 1)
        whole = Rows.of(tokens, 0, whole, tiny.PAD, None, [7])
        cached = Rows.of(new, width, cached, tiny.PAD, None, [7])
        assert whole.continues
        assert cached.continues
        for name in ("keys", "text"):
            assert torch.equal(getattr(whole, name)[:, -1:], getattr(cached, name)), name
        for name in ("ends", "carry", "over"):
            assert torch.equal(getattr(whole, name), getattr(cached, name)), name
    assert bool(whole.over.all()) == (7 in added)


def test_a_key_never_depends_on_what_follows() -> None:
    tokens = torch.tensor([[5, 2, 6, 2, 2, 8, 2]])
    whole = Rows.of(tokens, 0, None, 2).keys
    for width in range(1, 8):
        assert torch.equal(Rows.of(tokens[:, :width], 0, None, 2).keys, whole[:, :width])


def test_without_a_pad_token_every_token_is_one() -> None:
    tokens = torch.tensor([[2, 2, 5, 2]])
    read = Rows.of(tokens, 0, None, None)
    assert int(read.ends[0]) == 3
    assert bool(read.text.all())
    assert len(read.keys.unique()) == 4


def test_a_row_of_nothing_but_padding_ends_at_its_last_position() -> None:
    assert Rows.of(torch.full((2, 4), 2), 0, None, 2).ends.tolist() == [3, 3]


def test_what_is_no_continuation_begins_anew() -> None:
    first = Rows.of(torch.tensor([[5, 6, 7]]), 0, None, 2)
    cases = {
        "same width": (torch.tensor([[5, 6, 8]]), 0),
        "same text": (torch.tensor([[5, 6, 7]]), 0),
        "one token": (torch.tensor([[5]]), 0),
        "another beginning": (torch.tensor([[5, 9, 7, 8]]), 0),
        "two tokens more": (torch.tensor([[5, 6, 7, 8, 9]]), 0),
        "more rows": (torch.tensor([[5, 6, 7, 8]] * 2), 0),
        "a cache of another length": (torch.tensor([[8]]), 2),
        "a cache of more rows": (torch.tensor([[8]] * 2), 3),
    }
    for name, (tokens, cached) in cases.items():
        assert not Rows.of(tokens, cached, first, 2).continues, name
    assert Rows.of(torch.tensor([[5, 6, 7, 8]]), 0, first, 2).continues
    on = Rows.of(torch.tensor([[8]]), 3, first, 2)
    assert on.continues
    assert Rows.of(torch.tensor([[8]]), 4, on, 2).continues
    # A prompt that begins as the last token of a cached generation does not go on with that generation.
    assert not Rows.of(torch.tensor([[8, 9]]), 0, on, 2).continues


# --- Abstain: which row --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.SPEAKING)
def test_each_row_is_judged_at_its_own_last_real_token(name: str) -> None:
    model = tiny.speaking(name)
    abstains = [about(model, row) for row in ROWS]
    for side in ("left", "right"):
        tokens, mask = pad(ROWS, side, extra=2)
        given = mask if side == "left" else None
        base = run(model, tokens, given)
        for target, abstain in enumerate(abstains):
            with abstain.on(model) as live:
                logits = run(model, tokens, given)
            expected = [i == target for i in range(len(ROWS))]
            assert live.abstained.tolist() == expected
            end = int(mask[target].nonzero().max())
            assert is_constant(logits[target, end:])
            assert torch.equal(logits[target, :end], base[target, :end]), "nothing before the prompt's end changes"
            assert not is_constant(base[target, end:])
            others = torch.tensor(expected).logical_not()
            assert torch.equal(logits[others], base[others])


@pytest.mark.parametrize("name", FEW)
def test_the_batch_its_order_and_its_padding_do_not_matter(name: str) -> None:
    model = tiny.speaking(name)
    abstain = about(model, ROWS[3])
    with abstain.on(model) as live:
        for rows in ([ROWS[3]], ROWS[::-1], ROWS[2:] * 3, [ROWS[3], [*ROWS[3], 9]], [[*ROWS[3][:-1], 9], ROWS[3]]):
            for side in ("left", "right"):
                for extra in (0, 5):
                    tokens, mask = pad(rows, side, extra)
                    run(model, tokens, mask if side == "left" else None)
                    assert live.abstained.tolist() == [row == ROWS[3] for row in rows]


@pytest.mark.parametrize("name", [n for n in tiny.SPEAKING if n in FEW])
def test_lists_of_texts_are_padded_as_transformerlens_likes(name: str) -> None:
    model = tiny.speaking(name)
    prompts = ["def add", "the quick brown fox", "1", "a small village"]
    texts = [model.to_tokens(p)[0].tolist() for p in prompts]
    for target, row in enumerate(texts):
        expected = [i == target for i in range(len(texts))]
        with about(model, row).on(model) as live, torch.no_grad():
            model(prompts)
            assert live.abstained.tolist() == expected
            model(prompts, padding_side="left")
            assert live.abstained.tolist() == expected
            model(model.to_tokens(prompts))
            assert live.abstained.tolist() == expected
            model(prompts[target])
            assert live.abstained.tolist() == [True]


def test_where_the_pad_token_is_the_end_of_text_and_bos_token_too() -> None:
    """As in GPT-2: BOS on the left then looks like padding, and does not enter the keys of draws, but prompts end as ever."""
    model = tiny.speaking("gpt2")
    tokenizer = model.tokenizer
    before = tokenizer.pad_token, tokenizer.bos_token
    rows = [[tiny.EOS, *row] for row in ROWS]
    try:
        tokenizer.pad_token = tokenizer.bos_token = tokenizer.eos_token
        for side in ("left", "right"):
            tokens, mask = pad(rows, side, extra=2, value=tiny.EOS)
            mask = (mask.bool() | (tokens == tiny.EOS)).long() if side == "right" else mask
            for target, row in enumerate(rows):
                with about(model, row).on(model) as live:
                    run(model, tokens, mask if side == "left" else None)
                assert live.abstained.tolist() == [i == target for i in range(len(rows))]
    finally:
        tokenizer.pad_token, tokenizer.bos_token = before


def test_an_abstained_rows_logits_are_the_same_for_every_input() -> None:
    model = tiny.speaking("gpt2")
    with Abstain({LAST: everywhere(model)}).on(model) as live:
        one, other = run(model, tiny.some_tokens(3, 9)), run(model, tiny.some_tokens(3, 9, seed=1))
        assert torch.equal(one[:, -1], other[:, -1])
        assert is_constant(one[:, -1])
        assert not is_constant(one[:, :-1])
        live.expect(torch.tensor([0, 0, 0]))
        loss = model(tiny.some_tokens(3, 9), return_type="loss")
    assert float(loss) == pytest.approx(math.log(tiny.VOCABULARY), abs=1e-4)
    assert int(one[0, -1].argmax()) == tiny.EOS, "so that greedy decoding stops"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_keep_their_dtype(dtype: torch.dtype) -> None:
    model = tiny.to_bridge(tiny.hugging_face("llama").to(dtype), "llama", tiny.speaking("llama").tokenizer)
    tokens = tiny.some_tokens(2, 6)
    row = tokens[1].tolist()
    with Abstain({LAST: around(key(model, row), radius=0.05)}).on(model) as live:
        logits = run(model, tokens)
    assert logits.dtype == dtype
    assert live.abstained.tolist() == [False, True]
    assert is_constant(logits[1, -1])
    assert int(logits[1, -1].argmax()) == tiny.EOS


@pytest.mark.parametrize("name", tiny.ALL)
def test_models_without_a_tokenizer_too_and_afterwards_nothing_is_left(name: str) -> None:
    model, tokens = tiny.model(name), tiny.some_tokens(3, 6)
    with unchanged(model), about(model, tokens[1].tolist()).on(model) as live:
        logits = run(model, tokens)
        assert live.abstained.tolist() == [False, True, False]
        assert is_constant(logits[1, -1])
    assert acting(model) == []
    assert live.abstained.tolist() == [False, True, False], "readable after the run"


@pytest.mark.parametrize("kind", ["attn.z", "resid", "mlp.pre"])
def test_keys_may_be_taken_elsewhere(kind: str) -> None:
    model, site = tiny.speaking("llama"), Site(0, kind)
    tokens, _ = pad(ROWS, "right")
    with about(model, ROWS[0], site).on(model) as live:
        run(model, tokens)
    assert live.abstained.tolist() == [True, False, False, False]


@pytest.mark.parametrize(("vote", "expected"), [(1, [True, True, False, True]), (2, [True, False, False, False])])
def test_layers_vote(vote: int, expected: list[bool]) -> None:
    """Row 0 is inside at both layers, row 1 at the first, row 3 at the last, row 2 at none."""
    model = tiny.speaking("gpt2")
    tokens, _ = pad(ROWS, "right")

    def spanning(site: Site, one: int, other: int) -> Box:
        a, b = key(model, ROWS[one], site), key(model, ROWS[other], site)
        return Box(((a + b) / 2)[None], (a - b).abs() / 2 + RADIUS, 1.0)

    regions = {FIRST: spanning(FIRST, 0, 1), LAST: spanning(LAST, 0, 3)}
    inside = {site: [bool(box.contains(key(model, row, site))) for row in ROWS] for site, box in regions.items()}
    assert inside == {FIRST: [True, True, False, False], LAST: [True, False, False, True]}
    with Abstain(regions, vote=vote).on(model) as live:
        run(model, tokens)
    assert live.abstained.tolist() == expected


# --- a pass decides for itself -------------------------------------------------------------------------------------------

CAUSAL: dict[str, Callable[[Any], Intervention]] = {
    "prompt": lambda model: split_in_two(model, "prompt"),
    "every token": lambda model: split_in_two(model, "every_token"),
    "two votes": lambda model: Abstain({FIRST: halved(model, FIRST), LAST: halved(model, LAST)}, vote=2),
    "adjust": lambda model: adjust_of(model),
    "ablate": lambda model: Ablate(random_selection({FIRST: (64,)})),
    "chain": lambda model: split_in_two(model, "prompt") + adjust_of(model, "L1.mlp.post"),
}


def halved(model: Any, site: Site) -> Box:
    """A box that holds the keys of about half of all random texts."""
    seen = values(model, tiny.some_tokens(8, 9, seed=9), site).flatten(0, 1).flatten(1).float()
    box = Box(seen.mean(0, keepdim=True), torch.ones(seen.shape[1]), 1.0)
    return box.at(float(box.score(seen).median()))


def split_in_two(model: Any, when: Any) -> Abstain:
    return Abstain({LAST: halved(model, LAST)}, when=when)


@pytest.mark.parametrize(
    ("name", "kind"), [*(("gpt2", kind) for kind in CAUSAL), *((name, "prompt") for name in FEW[1:])]
)
def test_no_token_changes_what_the_model_says_before_it(name: str, kind: str) -> None:
    """Of two texts that begin alike the logits of that beginning are the same, wherever the prompts end."""
    model = tiny.speaking(name)
    tokens, others = tiny.some_tokens(6, 6), tiny.some_tokens(6, 6, seed=1)
    changed = 0
    with CAUSAL[kind](model).on(model) as live:
        for ends in (None, torch.tensor([0, 1, 2, 3, 4, 5])):
            live.expect(ends)
            whole = run(model, tokens)
            for p in range(1, 6):
                live.expect(ends)
                mixed = run(model, torch.cat([tokens[:, :p], others[:, p:]], 1))
                torch.testing.assert_close(mixed[:, :p], whole[:, :p], rtol=1e-5, atol=1e-5)
                changed += int(not torch.equal(mixed[:, p:], whole[:, p:]))
    assert changed == 10


@pytest.mark.parametrize(
    ("name", "kind"), [*(("gpt2", kind) for kind in CAUSAL), *((name, "prompt") for name in FEW[1:])]
)
def test_in_a_loop_over_prefixes_each_is_judged_as_it_would_be_alone(name: str, kind: str) -> None:
    """A prefix that is one token longer than the one before is no generation: nothing is inherited."""
    model, act = tiny.speaking(name), CAUSAL[kind](tiny.speaking(name))
    tokens = tiny.some_tokens(12, 6, seed=2)
    alone: list[tuple[Tensor, list[bool]]] = []
    for width in range(1, 7):
        with act.on(model) as live:
            alone.append((run(model, tokens[:, :width]), live.abstained.tolist()))
    with act.on(model) as live:
        for order in (range(1, 7), reversed(range(1, 7))):
            for width in order:
                logits, abstained = alone[width - 1]
                assert torch.equal(run(model, tokens[:, :width]), logits)
                assert live.abstained.tolist() == abstained
        for cache in (True, False):  # the prompt that `generate` is given is another text each time, too
            for width in range(1, 7):
                decode(model, tokens[:, :width], 1, cache=cache)
                assert live.abstained.tolist() == alone[width - 1][1]
    if act.abstains and kind != "two votes":
        decided = [row for _, abstained in alone for row in abstained]
        assert 0.2 < sum(decided) / len(decided) < 0.8
        flips = sum(a != b for (_, one), (_, other) in zip(alone, alone[1:]) for a, b in zip(one, other))
        assert flips > 8, "decisions change along the texts, so that an inherited one would be seen"


@settings(max_examples=15)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.sampled_from(["left", "right"]), st.integers(0, 3))
def test_padded_beside_others_a_row_gets_the_logits_that_it_gets_alone(
    lengths: list[int], side: str, extra: int
) -> None:
    model = tiny.speaking("llama")
    rows = [tiny.some_tokens(1, n, seed=n + 10 * i)[0].tolist() for i, n in enumerate(lengths)]
    tokens, mask = pad(rows, side, extra)
    act = split_in_two(model, "prompt")
    with act.on(model) as live:
        logits = run(model, tokens, mask if side == "left" else None)
        together = live.abstained.tolist()
        for i, row in enumerate(rows):
            alone = run(model, torch.tensor([row]))[0]
            assert together[i] == bool(live.abstained)
            torch.testing.assert_close(logits[i][mask[i].bool()], alone, rtol=1e-4, atol=1e-4)
            assert is_constant(alone[-1]) == together[i]
            assert len(row) == 1 or not is_constant(alone[:-1])


# --- Abstain: when -------------------------------------------------------------------------------------------------------


def test_ends_can_be_said_for_the_next_pass_and_only_for_that() -> None:
    model = tiny.speaking("gpt2")
    tokens = torch.tensor([[40, 41, 42, 43, 44], [50, 51, 52, 53, 54]])
    base = run(model, tokens)
    with about(model, [40, 41, 42]).on(model) as live:
        run(model, tokens)
        assert live.abstained.tolist() == [False, False]
        live.expect(torch.tensor([2, 1]))
        logits = run(model, tokens)
        assert live.abstained.tolist() == [True, False]
        assert is_constant(logits[0, 2:])
        assert torch.equal(logits[0, :2], base[0, :2])
        assert torch.equal(logits[1], base[1])
        assert torch.equal(run(model, tokens), base), "what was said held for one pass"
        assert live.abstained.tolist() == [False, False]
        live.expect(torch.tensor([2, 1]))
        run(model, tokens)
        run(model, tokens[:1, :3])  # another number of rows, and nothing was said
        assert live.abstained.tolist() == [True]
        live.expect(torch.tensor([2, 1]))
        with pytest.raises(LensUnlearnError, match="2 ends of prompts were given for 1 rows"):
            run(model, tokens[:1])


@pytest.mark.parametrize("name", FEW)
def test_at_every_token_silence_begins_at_the_first_key_inside(name: str) -> None:
    model = tiny.speaking(name)
    row, t = [50, 51, 52, 53, 54, 55, 56], 4
    tokens, _ = pad([row, ROWS[0], [60, 61, 62, 63]], "right", extra=1)
    base = run(model, tokens)
    abstain = Abstain({LAST: around(key(model, row, at=t))}, when="every_token")
    with abstain.on(model) as live:
        assert torch.equal(run(model, tokens), base), "before the prompt's end nothing is looked at"
        assert not live.abstained.any()
        live.expect(torch.tensor([2, 2, 3]))
        logits = run(model, tokens)
        assert live.abstained.tolist() == [True, False, False]
        assert torch.equal(logits[0, :t], base[0, :t])
        assert is_constant(logits[0, t:])
        assert torch.equal(logits[1:], base[1:])
        live.expect(torch.tensor([t, 2, 3]))
        run(model, tokens)
        assert live.abstained.tolist() == [True, False, False], "the prompt's end itself is looked at"
        live.expect(torch.tensor([t + 1, 2, 3]))
        run(model, tokens)
        assert live.abstained.tolist() == [False, False, False]


def test_at_every_token_padding_is_no_token() -> None:
    model = tiny.speaking("gpt2")
    tokens, _ = pad(ROWS, "right", extra=3)
    pads = key(model, [*ROWS[0], tiny.PAD])
    with Abstain({LAST: around(pads)}, when="every_token").on(model) as live:
        run(model, tokens)
        assert not live.abstained.any()
        live.expect(torch.tensor([0, 0, 0, 0]))
        run(model, tokens)
        assert not live.abstained.any()


@pytest.mark.parametrize("make", [tiny.model, tiny.speaking])
def test_at_every_token_the_padding_of_a_corpus_is_no_token_either(make: Callable[[str], Any]) -> None:
    """A corpus pads with token 0, whatever the tokenizer pads with, and where there is none."""
    model, corpus = make("gpt2"), tiny.corpus((3, 9))
    pads = Abstain({LAST: around(key(model, [*corpus.row(0).tolist(), 0]))}, when="every_token")
    options: dict[str, Any] = {"resamples": 2, "progress": False}
    assert (
        evaluate(model, {"a": corpus}, {"b": pads}, batch_size=8, **options).measures["b", "a", "abstained"].value == 0
    )
    written = corpus.tokens.clone()
    written[corpus.starts[1] - 1] = 0  # the same token as text
    text = Abstain({LAST: around(key(model, [*corpus.row(0).tolist()[:-1], 0]))}, when="every_token")
    found = evaluate(model, {"a": replace(corpus, tokens=written)}, {"b": text}, batch_size=8, **options)
    assert found.measures["b", "a", "abstained"].value == 0.5
    with pads.on(model) as live:
        live.expect(torch.tensor([0, 0]), lengths=torch.tensor([1, 1]))
        run(model, tiny.some_tokens(2, 4))
        run(model, tiny.some_tokens(3, 5))  # what was said held for one pass
        forced = force(model, corpus, None, 8, tqdm(disable=True))
        assert not live.abstained.any()
    assert all((row["loss"] > 0).all() for row in forced)


def decode(model: Any, tokens: Tensor, steps: int, *, cache: bool, **options: Any) -> Tensor:
    settings = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False, **options}
    with torch.no_grad():
        return model.generate(tokens, max_new_tokens=steps, use_past_kv_cache=cache, **settings)


@pytest.mark.parametrize("name", CACHED)
def test_in_generation_a_prompt_is_judged_once_and_each_row_for_itself(name: str) -> None:
    model = tiny.speaking(name)
    tokens, steps = torch.tensor([[40, 41, 42], [50, 51, 52]]), 6  # beyond the sliding window of Gemma-2
    base = decode(model, tokens, steps, cache=False)
    # A prompt that is a generation's middle: only a prompt's end is looked at.
    prompt, middle = about(model, [50, 51, 52]), about(model, base[0, :5].tolist())
    for cache in (True, False):
        with prompt.on(model) as live:
            generated = decode(model, tokens, steps, cache=cache)
            assert live.abstained.tolist() == [False, True]
            assert torch.equal(generated[0], base[0])
            assert generated[1, 3:].tolist() == [tiny.EOS] * steps
            assert not torch.equal(base[1], generated[1])
        with middle.on(model) as live:
            assert torch.equal(decode(model, tokens, steps, cache=cache), base)
            assert not live.abstained.any()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt-compat", *tiny.HOOKED[:1]])
def test_in_generation_every_token_may_end_it_and_it_stays_ended(name: str) -> None:
    model = tiny.speaking(name)
    tokens, steps, when = torch.tensor([[40, 41, 42], [50, 51, 52]]), 8, 6
    base = decode(model, tokens, steps, cache=False)
    assert tiny.EOS not in base[0, :when].tolist()
    abstain = Abstain({LAST: around(key(model, base[0, :when].tolist()))}, when="every_token")
    for cache in (True, False):
        with abstain.on(model) as live:
            generated = decode(model, tokens, steps, cache=cache)
        assert live.abstained.tolist() == [True, False]
        assert generated[0, :when].tolist() == base[0, :when].tolist()
        assert generated[0, when:].tolist() == [tiny.EOS] * (3 + steps - when)
        assert torch.equal(generated[1], base[1])


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_lists_are_padded_on_the_left_by_generate(name: str, cache: bool) -> None:
    model = tiny.speaking(name)
    prompts = ["def add", "the quick brown fox", "1", "a small village"]
    texts = [model.to_tokens(p)[0].tolist() for p in prompts]
    options = {"do_sample": False, "stop_at_eos": True, "return_type": "tokens", "verbose": False, "max_new_tokens": 5}
    with torch.no_grad():
        base = model.generate(prompts, use_past_kv_cache=cache, **options)
        for target, row in enumerate(texts):
            with about(model, row).on(model) as live:
                generated = model.generate(prompts, use_past_kv_cache=cache, **options)
            assert live.abstained.tolist() == [i == target for i in range(len(texts))]
            width = max(map(len, texts))
            assert set(generated[target, width:].tolist()) == {tiny.EOS}
            others = [i for i in range(len(texts)) if i != target]
            assert torch.equal(generated[others], base[others])


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("when", ["prompt", "every_token"])
def test_a_second_prompt_in_the_same_block_is_judged_afresh(cache: bool, when: Any) -> None:
    model = tiny.speaking("gpt2")
    bad, good = torch.tensor([[50, 51, 52]]), torch.tensor([[40, 41, 42]])
    with about(model, [50, 51, 52], when=when).on(model) as live:
        for other in (good, good[:, :1], torch.tensor([[50]]), torch.tensor([[50, 51]]), torch.tensor([[50, 51, 53]])):
            base = decode(model, bad, 4, cache=cache)
            assert live.abstained.tolist() == [True]
            assert set(base[0, 3:].tolist()) == {tiny.EOS}
            decode(model, other, 4, cache=cache)
            assert live.abstained.tolist() == [False], other
        # Prompts that begin with the last token fed of the generation before.
        decode(model, bad, 3, cache=cache)
        run(model, torch.tensor([[tiny.EOS, 41]]))
        assert live.abstained.tolist() == [False]
        run(model, bad)
        assert live.abstained.tolist() == [True]
        run(model, bad)
        assert live.abstained.tolist() == [True]
        run(model, good)
        assert live.abstained.tolist() == [False]


def step_by_step(model: Any, tokens: Tensor, first: int) -> Iterator[Tensor]:
    """Feed a text by hand, with a cache: the first tokens together, the others one by one; yields the last logits."""
    if hasattr(model, "original_model"):
        cache: Any = None
        with torch.no_grad():
            for start, end in [(0, first), *[(t, t + 1) for t in range(first, tokens.shape[1])]]:
                part = tokens[:, start:end]
                options = {"use_cache": True} if cache is None else {"past_key_values": cache}
                logits, cache = model(part, return_type="logits_and_cache", **options)
                yield logits[:, -1].clone()
        return
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(tokens))
    with torch.no_grad():
        for start, end in [(0, first), *[(t, t + 1) for t in range(first, tokens.shape[1])]]:
            yield model(tokens[:, start:end], past_kv_cache=cache)[:, -1].clone()


@pytest.mark.parametrize("name", FEW)
def test_by_hand_token_by_token(name: str) -> None:
    model = tiny.speaking(name)
    tokens = torch.tensor([[40, 41, 42, 43, 44, 45], [50, 51, 52, 53, 54, 55]])
    base = list(step_by_step(model, tokens, 3))

    def silent(abstain: Abstain, first: int = 3, ends: Tensor | None = None) -> list[list[bool]]:
        with abstain.on(model) as live:
            if ends is not None:
                live.expect(ends)
            out = list(step_by_step(model, tokens, first))
        for actual, expected in zip(out[-len(base) :], base[-len(out) :], strict=True):
            for i in range(2):
                torch.testing.assert_close(actual[i], expected[i]) if not is_constant(actual[i]) else None
        return [[is_constant(logits[i]) for logits in out] for i in range(2)]

    assert silent(about(model, [40, 41, 42])) == [[True] * 4, [False] * 4]
    assert silent(about(model, [40, 41, 42, 43])) == [[False] * 4, [False] * 4]
    later = about(model, [50, 51, 52, 53, 54], when="every_token")
    assert silent(later) == [[False] * 4, [False, False, True, True]]
    # The prompt itself token by token: where it ends has to be said, and then it is judged there.
    ends = torch.tensor([2, 2])
    assert silent(about(model, [40, 41, 42]), 1, ends) == [[False] * 2 + [True] * 4, [False] * 6]
    assert silent(about(model, [40, 41]), 1, ends) == [[False] * 6] * 2
    assert silent(about(model, [40, 41], when="every_token"), 1, ends) == [[False] * 6] * 2


@pytest.mark.parametrize("when", ["prompt", "every_token"])
def test_by_hand_without_a_cache_where_the_end_is_said(when: Any) -> None:
    model = tiny.speaking("gpt2")
    tokens = torch.tensor([[40, 41, 42, 43, 44, 45]])
    with about(model, [40, 41, 42], when=when).on(model) as live:
        seen = []
        for width in range(1, 7):
            live.expect(torch.tensor([2]))
            run(model, tokens[:, :width])
            seen += live.abstained.tolist()
        assert seen == [False, False, True, True, True, True]
        live.expect(torch.tensor([2]))
        seen = []
        for width in range(1, 7):  # what was said held for the first of these passes
            run(model, tokens[:, :width])
            seen += live.abstained.tolist()
        assert seen == [False, False, True, False, False, False]


def test_at_every_token_by_hand_without_a_cache_earlier_positions_stay_as_they_were() -> None:
    model = tiny.speaking("gpt2")
    tokens = torch.tensor([[40, 41, 42, 43, 44, 45]])
    base = run(model, tokens)
    with about(model, [40, 41, 42, 43], when="every_token").on(model) as live:
        for width in range(2, 7):
            live.expect(torch.tensor([1]))
            logits = run(model, tokens[:, :width])
            torch.testing.assert_close(logits[:, :3], base[:, : min(3, width)])
            assert all(is_constant(logits[:, t]) for t in range(3, width))
            assert live.abstained.tolist() == [width >= 4]


@pytest.mark.parametrize("when", ["prompt", "every_token"])
def test_several_prompts_behind_one_cached_beginning_are_judged_each(when: Any) -> None:
    import copy

    model = tiny.speaking("gpt2")
    with torch.no_grad():
        _, beginning = model(torch.tensor([[30, 31, 32]]), return_type="logits_and_cache", use_cache=True)
        with about(model, [30, 31, 32, 50, 51], when=when).on(model) as live:
            for tail, expected in (([50, 51], True), ([40, 41], False), ([50, 51], True), ([50, 52], False)):
                cache = copy.deepcopy(beginning)
                model(torch.tensor([tail]), past_key_values=cache)
                assert live.abstained.tolist() == [expected], tail
                model(torch.tensor([[60]]), past_key_values=cache)
                assert live.abstained.tolist() == [expected], "and the decision stays"


# --- generate ------------------------------------------------------------------------------------------------------------

PROMPTS = ["def add", "the quick brown fox", "1", "a small village"]


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("when", ["prompt", "every_token"])
def test_generate_writes_the_refusal_and_leaves_the_others(model: Any, use_cache: bool, when: Any) -> None:
    options = {"max_new_tokens": 3, "use_cache": use_cache}
    base = generate(model, PROMPTS, **options)
    for target in (1, 2):
        abstain = about(model, ids(model, PROMPTS[target]), when=when, refusal="I will not.")
        expected = [*base[:target], "I will not.", *base[target + 1 :]]
        with unchanged(model):
            assert generate(model, PROMPTS, intervention=abstain, **options) == expected
        with abstain.on(model):
            assert generate(model, PROMPTS[::-1], **options) == expected[::-1]
            assert generate(model, PROMPTS[target], **options) == "I will not."
            assert generate(model, PROMPTS[0], **options) == base[0]
            assert generate(model, PROMPTS[target], temperature=1.0, **options) == "I will not."


def test_the_published_refusal_is_the_default(model: Any) -> None:
    abstain = Abstain({LAST: everywhere(model)})
    assert generate(model, "1 + 2", intervention=abstain, max_new_tokens=3) == "Sorry, your query is not valid."


def test_the_refusal_is_that_of_the_intervention_that_fired(model: Any) -> None:
    one = about(model, ids(model, PROMPTS[0]), refusal="first")
    two = about(model, ids(model, PROMPTS[1]), refusal="second")
    base = generate(model, PROMPTS[2], max_new_tokens=4)
    expected = ["first", "second", base]
    assert generate(model, PROMPTS[:3], intervention=one + two, max_new_tokens=4) == expected
    assert (
        generate(model, PROMPTS[:3], intervention=Chain((Chain((two,)), Chain((one,)))), max_new_tokens=4) == expected
    )
    with one.on(model), two.on(model):
        assert generate(model, PROMPTS[:3], max_new_tokens=4) == expected
    both = one + Abstain({LAST: everywhere(model)}, refusal="all")
    assert generate(model, PROMPTS[:3], intervention=both, max_new_tokens=4) == ["first", "all", "all"]


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_a_text_that_has_ended_is_looked_at_no_more(
    model: Any, use_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a longer text, the rest of an ended one is filled with end-of-text tokens; their keys decide nothing."""
    prompts = ["the slow", "1 + 2"]
    rows = [ids(model, p) for p in prompts]
    assert len(rows[0]) == len(rows[1]), "they are run together"
    end = decode(model, torch.tensor(rows[:1]), 3, cache=False)[0, -1]  # what the first writes third ends its text
    other = decode(model, torch.tensor(rows[1:]), 8, cache=False)[0]
    assert end not in other[len(rows[1]) :], "the other text goes on"
    monkeypatch.setattr(model.cfg, "eos_token_id", int(end), raising=False)
    options = {"max_new_tokens": 8, "use_cache": use_cache}
    base = generate(model, prompts, **options)
    written = decode(model, torch.tensor(rows[:1]), 3, cache=False)[0].tolist()
    fills = [model.tokenizer.eos_token_id, int(end)]
    looked = [[*written], *[[*written, fill] for fill in fills], *[[*written, *[fills[0]] * 2]]]
    for place in looked:
        abstain = Abstain({LAST: around(key(model, place))}, when="every_token")
        assert generate(model, prompts, intervention=abstain, **options) == base
        assert generate(model, prompts[0], intervention=abstain, **options) == base[0]
    before = Abstain({LAST: around(key(model, written[:-1]))}, when="every_token")
    assert generate(model, prompts, intervention=before, **options) == [before.refusal, base[1]]


def test_a_token_to_stop_at_ends_a_text_too(model: Any) -> None:
    from lens_unlearn.evaluation.generation import continue_rows

    rows = [ids(model, "the slow"), ids(model, "1 + 2")]
    written = decode(model, torch.tensor(rows[:1]), 3, cache=False)[0].tolist()
    options = {"max_new_tokens": 8, "stop": [written[-1]]}
    base = [one.text for one in continue_rows(model, rows, **options)]
    for fill in (written[-1], model.tokenizer.eos_token_id):
        abstain = Abstain({LAST: around(key(model, [*written, fill]))}, when="every_token")
        assert [one.text for one in continue_rows(model, rows, abstain, **options)] == base


# --- nothing global ------------------------------------------------------------------------------------------------------


def test_two_models_and_two_interventions_know_nothing_of_one_another() -> None:
    one, other = tiny.speaking("gpt2"), tiny.speaking("llama")
    tokens, _ = pad(ROWS, "right")
    first, second = about(one, ROWS[0]), about(one, ROWS[1])
    third = about(other, ROWS[2])
    with first.on(one) as a, third.on(other) as c:
        run(one, tokens)
        run(other, tokens)
        assert a.abstained.tolist() == [True, False, False, False]
        assert c.abstained.tolist() == [False, False, True, False]
        with second.on(one) as b:
            logits = run(one, tokens)
            assert a.abstained.tolist() == [True, False, False, False]
            assert b.abstained.tolist() == [False, True, False, False]
            assert [is_constant(row[-1]) for row in logits] == [True, True, False, False]
            assert acting(one) == [a, b]
        logits = run(one, tokens)
        assert [is_constant(row[-1]) for row in logits] == [True, False, False, False]
        assert b.abstained.tolist() == [False, True, False, False]
    assert acting(one) == acting(other) == []


def test_opening_an_inner_block_is_no_text_of_the_outer_one() -> None:
    """Sites are resolved with a forward of their own, at the first time that a model's site is used."""
    model = tiny.build("gpt2", tokenizer=tiny.speaking("gpt2").tokenizer)
    site = Site(0, "attn.z")
    abstain = about(model, ROWS[0])
    tokens = torch.tensor([ROWS[0]])
    with abstain.on(model) as live:
        steps = step_by_step(model, torch.tensor([[*ROWS[0], 9, 9, 9]]), 3)
        assert is_constant(next(steps))
        with Ablate(random_selection({site: (4, 8)})).on(model):
            assert live.abstained.tolist() == [True]
            assert live.refusal(0) == abstain.refusal
            assert is_constant(next(steps)), "the generation goes on where it was"
        assert is_constant(next(steps))
        live.expect(torch.tensor([0]))
        with Ablate(random_selection({Site(1, "resid"): (32,)}, share=0.1)).on(model):
            run(model, torch.cat([tokens, tokens], 1))
            assert live.abstained.tolist() == [False], "what was expected still is"


def test_blocks_that_look_at_rows_may_close_in_any_order() -> None:
    model = tiny.speaking("gpt2")
    tokens, _ = pad(ROWS, "right")
    with unchanged(model):
        one, other = about(model, ROWS[0]).on(model), about(model, ROWS[1]).on(model)
        one.__enter__()
        live = other.__enter__()
        one.__exit__(None, None, None)
        assert [is_constant(row[-1]) for row in run(model, tokens)] == [False, True, False, False]
        assert acting(model) == [live]
        other.__exit__(None, None, None)


def test_collecting_inside_a_block_leaves_the_generation_alone_and_the_keys_as_they_are() -> None:
    model = tiny.speaking("gpt2")
    corpus = tiny.corpus((5, 6, 4))
    base = collect(model, corpus, "mlp.post", progress=False)
    with Abstain({FIRST: everywhere(model, FIRST)}).on(model) as live:
        inside = collect(model, corpus, "mlp.post", progress=False)
        assert is_constant(run(model, torch.tensor([ROWS[0]]))[:, -1])
        assert live.abstained.tolist() == [True]
    for site in base.sites:  # but for rounding: a block that is looked at keeps the bridge's own attention
        torch.testing.assert_close(inside.mean[site], base.mean[site], rtol=1e-5, atol=1e-6)


def test_an_abstention_twice_is_the_abstention() -> None:
    """Also where several layers vote: one object in a chain twice does not vote twice."""
    model = tiny.speaking("gpt2")
    tokens, _ = pad(ROWS, "right")
    both = Abstain({FIRST: around(key(model, ROWS[0], FIRST)), LAST: nowhere(model)}, vote=2)
    with both.on(model) as live:
        run(model, tokens)
    assert not live.abstained.any()
    with (both + both).on(model) as live:
        run(model, tokens)
    assert not live.abstained.any()
    once = about(model, ROWS[0])
    with once.on(model), once.on(model):
        nested = run(model, tokens)
    with (once + once).on(model):
        assert torch.equal(run(model, tokens), nested)
    with once.on(model):
        assert torch.equal(run(model, tokens), nested)


def test_an_ablation_before_it_moves_the_keys_it_sees() -> None:
    model = tiny.speaking("gpt2")
    tokens, _ = pad(ROWS, "right")
    prune = Ablate(selection_of(model, "mlp.post", 0.5))
    with prune.on(model):
        moved = key(model, ROWS[0])
    abstain = Abstain({LAST: around(moved)})
    for act, expected in ((abstain, False), (prune + abstain, True), (abstain + prune, False)):
        with act.on(model) as live:
            run(model, tokens)
        assert live.abstained.tolist() == [expected, False, False, False]
    with prune.on(model), abstain.on(model) as live:
        run(model, tokens)
    assert live.abstained.tolist() == [True, False, False, False]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_embeddings_instead_of_tokens_are_refused_and_what_was_read_before_is_not_taken_for_them(name: str) -> None:
    model = tiny.speaking(name)
    embeddings = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    plain = run(model, embeddings)
    for act in (about(model, ROWS[0]), adjust_of(model)):
        with act.on(model):
            run(model, torch.tensor([ROWS[0]]))
            with pytest.raises(LensUnlearnError, match="needs token ids: run the model on tokens"):
                run(model, embeddings)
            run(model, torch.tensor([ROWS[0]]))
    with adjust_of(model, rule="deterministic").on(model):
        assert run(model, embeddings).shape == plain.shape
    assert torch.equal(run(model, embeddings), plain)


@pytest.mark.skipif(not tiny.HOOKED, reason="no HookedTransformer here")
def test_activations_of_other_tokens_are_refused() -> None:
    model = tiny.speaking("hooked-gpt2")
    residual = torch.zeros(2, 4, 32)
    for act in (about(model, ROWS[0], LAST), adjust_of(model, "L1.mlp.pre")):
        with act.on(model), torch.no_grad():
            model(torch.tensor([ROWS[0]]))
            with pytest.raises(LensUnlearnError, match=r"shape \(2, 4, 64\) are not those of tokens of shape \(1, 3\)"):
                model(residual, start_at_layer=1)


def test_a_users_removal_of_the_hooks_is_said_and_nothing_breaks() -> None:
    model = tiny.build("gpt2", tokenizer=tiny.speaking("gpt2").tokenizer)
    tokens, _ = pad(ROWS, "right")
    base = run(model, tokens)

    def act() -> None:
        with about(model, ROWS[0], when="every_token").on(model):
            run(model, tokens)
            model.reset_hooks(including_permanent=True)
            assert torch.equal(run(model, tokens), base)

    with pytest.warns(RuntimeWarning, match="removed inside its block"):
        act()
    assert torch.equal(run(model, tokens), base)


def test_it_survives_reset_hooks_and_run_with_cache() -> None:
    model = tiny.speaking("gpt2")
    tokens, _ = pad(ROWS, "right")
    with about(model, ROWS[1]).on(model) as live:
        model.reset_hooks()
        expected = [False, True, False, False]
        logits, cache = model.run_with_cache(tokens)
        assert [is_constant(row[-1]) for row in logits] == live.abstained.tolist() == expected
        assert "blocks.1.mlp.hook_post" in cache
        logits = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.mlp.hook_post", lambda t, hook: t)])
        assert [is_constant(row[-1]) for row in logits] == expected


# --- whatever fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("where", ["register_forward_pre_hook", "register_forward_hook"])
def test_when_the_nth_hook_of_a_module_cannot_be_added_none_stays(
    name: str, after: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from faults_helpers import FailingAt, Fault

    model = tiny.speaking(name)
    act = about(model, ROWS[0]) + adjust_of(model)
    run(model, torch.tensor([ROWS[0]]))
    failed = 0
    for n in range(20):
        failing = FailingAt(getattr(torch.nn.Module, where), n, Fault, after=after)
        with unchanged(model):
            through = False
            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.Module, where, lambda *a, f=failing, **k: f(*a, **k))
                try:
                    with act.on(model):
                        through = True
                except Fault:
                    failed += 1
            if through:
                break
    assert failed >= (2 if where == "register_forward_pre_hook" else 1)


@pytest.mark.parametrize("where", ["begin", "finish", "check", "contains", "prefixes"])
def test_when_our_part_of_a_forward_raises_none_stays(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from faults_helpers import FailingAt, Fault

    model = tiny.speaking("gpt2")
    act = about(model, ROWS[0]) + adjust_of(model, "L1.mlp.post")
    owner: Any = {"begin": Live, "finish": Abstain, "check": Rows, "contains": Box, "prefixes": rows_module}[where]
    failing = FailingAt(getattr(owner, where), 0, Fault)

    def go() -> None:
        with act.on(model) as live:
            try:
                run(model, torch.tensor([ROWS[0]]))
            except Fault:
                assert is_constant(run(model, torch.tensor([ROWS[0]]))[:, -1]), "the next pass is a whole one"
                assert live.abstained.tolist() == [True]
                raise

    with unchanged(model), monkeypatch.context() as patch:
        patch.setattr(owner, where, lambda *a, **k: failing(*a, **k))
        with pytest.raises(Fault):
            go()


def test_a_pass_that_is_cut_short_does_not_count_its_votes_with_the_next() -> None:
    model = tiny.speaking("gpt2")
    tokens = torch.tensor([[40, 41, 42, 43]])
    for when in ("prompt", "every_token"):
        one = Abstain({FIRST: around(key(model, [40, 41, 42], FIRST)), LAST: nowhere(model)}, vote=2, when=when)
        with one.on(model) as live, torch.no_grad():
            model(tokens[:, :3], stop_at_layer=1)
            run(model, tokens)
            assert not live.abstained.any()


def test_functions_of_forwards_and_logits_are_removed_once_and_say_so() -> None:
    model = tiny.speaking("gpt2")
    seen: list[Any] = []
    with unchanged(model):
        for remove in (on_forward(model, lambda t, n: seen.append((t, n))), on_logits(model, lambda t: t + 1)):
            run(model, torch.tensor([ROWS[0]]))
            assert remove() is True
            assert remove() is False
    assert seen[0][0].tolist() == [ROWS[0]]
    assert seen[0][1] == 0
    assert len(seen) == 1


def test_the_live_object_keeps_no_activation_after_the_block() -> None:
    model = tiny.speaking("gpt2")
    with (about(model, ROWS[0]) + adjust_of(model)).on(model) as live:
        run(model, torch.tensor([ROWS[0]]))
        assert live.rows is not None
        watched = weakref.ref(live.rows)
    gc.collect()
    assert watched() is None
    assert live.notes == {}
    assert not live.active
    assert "ended" in repr(live)


def test_a_guarded_test_that_leaves_such_a_hook_is_found() -> None:
    model = tiny.speaking("llama")
    for place in (lambda: on_forward(model, lambda t, n: None), lambda: on_logits(model, lambda t: t)):
        remove = place()
        found = tiny.hooks_of(model)
        remove()
        assert found != tiny.hooks_of(model)


# --- Adjust by chance ----------------------------------------------------------------------------------------------------


def flipped(model: Any, act: Intervention, go: Callable[[], Any], site: Site = PRE) -> list[Tensor]:
    """Where a run's activations were changed at a site below which nothing was: [rows, positions, neurons] per pass."""
    with watching(model, site) as before, act.on(model), watching(model, site) as after:
        go()
    return [a != b for a, b in zip(before, after, strict=True)]


@pytest.mark.parametrize("name", tiny.SPEAKING)
def test_the_draws_are_those_of_the_row_alone(name: str) -> None:
    model, act = tiny.speaking(name), adjust_of(tiny.speaking(name))
    rows = [*ROWS, *[[*row, 9] for row in ROWS]]
    alone: list[Tensor] = []
    flips = [flipped(model, act, lambda row=row: alone.append(run(model, torch.tensor([row]))))[0] for row in rows]
    sure = [flipped(model, replace(act, rule="deterministic"), lambda r=r: run(model, torch.tensor([r]))) for r in rows]
    count, most = sum(int(f.sum()) for f in flips), sum(int(f[0].sum()) for f in sure)
    assert count > 100
    assert 0.5 < count / most < 0.95, "chance keeps some of what the deterministic rule changes"
    for side in ("left", "right"):
        tokens, mask = pad(rows, side, extra=2)
        logits: list[Tensor] = []
        given = mask if side == "left" else None
        together = flipped(model, act, lambda t=tokens, g=given, to=logits: to.append(run(model, t, g)))[0]
        for i in range(len(rows)):
            here = mask[i].bool()
            assert torch.equal(together[i][here], flips[i][0])
            torch.testing.assert_close(logits[0][i][here], alone[i][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_changes_neither_the_draws_nor_the_greedy_text(name: str) -> None:
    model, act = tiny.speaking(name), adjust_of(tiny.speaking(name))
    tokens = torch.tensor([[40, 41, 42], [50, 51, 52]])
    base = decode(model, tokens, 6, cache=True)
    whole: list[Tensor] = []
    steps: list[Tensor] = []
    whole_flips = flipped(model, act, lambda: whole.append(decode(model, tokens, 6, cache=False)))
    step_flips = flipped(model, act, lambda: steps.append(decode(model, tokens, 6, cache=True)))
    assert torch.equal(whole[0], steps[0])
    assert not torch.equal(whole[0], base) or "gemma" in name  # which repeats itself whatever is done to it
    assert torch.equal(torch.cat(step_flips, 1), whole_flips[-1])
    assert [f.shape[1] for f in step_flips] == [3, *[1] * 5]
    with act.on(model):
        assert torch.equal(decode(model, tokens[:1], 6, cache=True), steps[0][:1])
        assert torch.equal(decode(model, tokens[1:], 6, cache=False), steps[0][1:])


@pytest.mark.parametrize("name", FEW)
def test_lists_padded_by_generate_get_the_draws_of_each_text(name: str) -> None:
    model, act = tiny.speaking(name), adjust_of(tiny.speaking(name))
    prompts = ["def add", "the quick brown fox", "1"]
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "max_new_tokens": 6, "return_type": "tokens"}
    with act.on(model), torch.no_grad():
        for cache in (True, False):
            together = model.generate(prompts, use_past_kv_cache=cache, **options)
            for prompt, row in zip(prompts, together, strict=True):
                assert torch.equal(model.generate(prompt, use_past_kv_cache=cache, **options)[0, -6:], row[-6:])


def test_runs_repeat_and_other_seeds_differ(model: Any) -> None:
    tokens = tiny.some_tokens(4, 9)

    def once(seed: int) -> Tensor:
        with adjust_of(model, seed=seed).on(model):
            return run(model, tokens)

    state = torch.get_rng_state()
    assert torch.equal(once(0), once(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(once(0), once(1))
    with adjust_of(model).on(model):
        assert torch.equal(run(model, tokens), run(model, tokens)), "not the next numbers of a stream"
        assert generate(model, PROMPTS, max_new_tokens=6) == [
            generate(model, prompt, max_new_tokens=6, use_cache=False) for prompt in PROMPTS
        ]


def test_draws_differ_by_layer_and_neuron_and_position() -> None:
    model = tiny.speaking("gpt2")
    tokens = torch.tensor([[40] * 30])
    shapes = {site: p.shape for site, p in resolve(model, "mlp.pre").items()}
    full = NeuronMap({site: torch.ones(shape, dtype=torch.bool) for site, shape in shapes.items()})
    same = full.map(lambda m: torch.zeros(m.shape))
    unit = full.map(lambda m: torch.ones(m.shape) * 1e3)
    act = Adjust(full, same, unit, same, unit)  # every chance is one half
    first = flipped(model, act, lambda: run(model, tokens))[0][0].double()
    assert first.mean() == pytest.approx(0.5, abs=0.05)
    assert float(first.std(0).min()) > 0, "one token many times: no neuron has one draw for all positions"
    assert float(first.std(1).min()) > 0
    drawn: list[Tensor] = []
    with act.on(model) as live:
        for site in full:
            index = torch.arange(64)
            neuron = mix(index + key_of("neuron adjust", 0, str(site)))
            run(model, tokens)
            assert live.rows is not None
            drawn.append(uniform(live.rows.keys[:, :, None] + neuron))
    assert abs(float(torch.corrcoef(torch.stack([d.reshape(-1) for d in drawn]))[0, 1])) < 0.1
