"""generate: the same greedy text with and without a cache, under interventions as of the edited weights."""

from typing import Any

import pytest
import tiny
import torch
from interventions_helpers import random_selection, selection_of, unchanged
from positions_helpers import around, ids, key
from torch import Tensor

from lens_unlearn.core.errors import CorpusError, LensUnlearnError, ModelError
from lens_unlearn.evaluation.generation import continue_rows, generate
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.methods.ov_basis import ov_basis
from lens_unlearn.model.sites import Site, resolve

PROMPTS = ["def add(a, b):", "the quick brown", "1 + 2 ="]


def greedy(run: Any, tokens: Tensor, steps: int) -> Tensor:
    """Argmax decoding by whole forwards."""
    for _ in range(steps):
        tokens = torch.cat([tokens, tiny.logits(run, tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens


def decode(model: Any, intervention: Intervention | None, tokens: Tensor, steps: int, *, cache: bool) -> Tensor:
    from contextlib import nullcontext

    with nullcontext() if intervention is None else intervention.on(model), torch.no_grad():
        return model.generate(
            tokens,
            max_new_tokens=steps,
            do_sample=False,
            use_past_kv_cache=cache,
            stop_at_eos=False,
            return_type="tokens",
            verbose=False,
        )


@pytest.mark.parametrize("name", [*tiny.DENSE, *[f"{n}-compat" for n in tiny.FOLDED], *tiny.HOOKED])
@pytest.mark.parametrize("kind", ["mlp.post", "attn.z"])
def test_greedy_tokens_are_those_of_the_edited_weights_with_and_without_a_cache(name: str, kind: str) -> None:
    model, tokens = tiny.model(name), tiny.some_tokens(1, 5)
    prune = Ablate(selection_of(model, kind))
    cached, whole = (decode(model, prune, tokens, 12, cache=cache) for cache in (True, False))
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, decode(model, None, tokens, 12, cache=True))
    if name in tiny.ARCHITECTURES:
        plain = tiny.hugging_face(name)
        for site, chosen in prune.selection.items():
            tiny.zero_rows(plain, name, site, chosen)
        assert torch.equal(cached, greedy(plain, tokens, 12))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_directions_and_means_too(name: str) -> None:
    model, tokens = tiny.model(name), tiny.some_tokens(1, 5)
    z = selection_of(model, "attn.z")
    for prune in (
        Ablate(z, basis=ov_basis(model)),
        Ablate(z, 0.3) + Ablate(selection_of(model), selection_of(model).map(lambda m: torch.full(m.shape, 0.2))),
    ):
        cached, whole = (decode(model, prune, tokens, 12, cache=cache) for cache in (True, False))
        assert torch.equal(cached, whole)


def test_the_texts_do_not_depend_on_one_another_nor_on_the_cache(model: Any) -> None:
    together = generate(model, PROMPTS, max_new_tokens=10)
    assert together == [generate(model, prompt, max_new_tokens=10) for prompt in PROMPTS]
    assert together == generate(model, PROMPTS[::-1], max_new_tokens=10)[::-1]
    assert together == generate(model, PROMPTS, max_new_tokens=10, use_cache=False)
    assert len(together) == 3


def test_only_what_was_added_is_returned(model: Any) -> None:
    text = generate(model, "the quick brown", max_new_tokens=4)
    ids = model.tokenizer("the quick brown", add_special_tokens=False)["input_ids"]
    bos = [tiny.BOS]
    expected = greedy(tiny.hugging_face("gpt2"), torch.tensor([bos + ids]), 4)[0, len(bos) + len(ids) :].tolist()
    if tiny.EOS in expected:
        expected = expected[: expected.index(tiny.EOS)]
    assert text == model.tokenizer.decode(expected, skip_special_tokens=True)


def test_an_intervention_acts_while_the_text_is_written_and_no_longer(model: Any) -> None:
    prune = Ablate(random_selection({site: p.shape for site, p in resolve(model, "mlp.post").items()}, 0.7))
    base = generate(model, PROMPTS, max_new_tokens=10)
    with unchanged(model):
        edited = generate(model, PROMPTS, intervention=prune, max_new_tokens=10)
    assert edited != base
    with prune.on(model):
        assert generate(model, PROMPTS, max_new_tokens=10) == edited
    assert generate(model, PROMPTS, max_new_tokens=10) == base


def test_afterwards_each_prompt_can_be_asked_whether_it_was_abstained_from(model: Any) -> None:
    site = Site(1, "mlp.post")
    prompts = ["1 + 2 = 3 and", "the slow", "1 + 2"]
    assert len({len(ids(model, prompt)) for prompt in prompts}) > 1, "of different lengths, so not one pass"
    for temperature in (0.0, 1.0):
        for silent in range(3):
            abstain = Abstain({site: around(key(model, ids(model, prompts[silent]), site))}, refusal="No.")
            with abstain.on(model) as live:
                written = generate(model, prompts, max_new_tokens=3, temperature=temperature)
                assert live.abstained.tolist() == [text == "No." for text in written]
                assert live.abstained[silent]
                assert [live.refusal(row) for row in range(3)] == ["No." if one else None for one in live.abstained]


def test_drawn_texts_come_back_with_their_seed_and_leave_the_global_state(model: Any) -> None:
    first = generate(model, PROMPTS, max_new_tokens=10, temperature=1.0, seed=3)
    state = torch.get_rng_state()
    assert generate(model, PROMPTS, max_new_tokens=10, temperature=1.0, seed=3) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(model, PROMPTS, max_new_tokens=10, temperature=1.0, seed=4) != first


def test_drawn_texts_do_not_depend_on_one_another_either(model: Any) -> None:
    drawn = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}
    together = generate(model, PROMPTS, **drawn)
    assert together == [generate(model, prompt, **drawn) for prompt in PROMPTS]
    assert together == generate(model, PROMPTS[::-1], **drawn)[::-1]
    again = generate(model, [PROMPTS[0]] * 4, **drawn)
    assert again[0] == together[0]
    assert len(set(again)) > 1, "a prompt that is asked several times is answered several times"
    # Nor on whether another's answer is withheld, which is over sooner.
    site = Site(1, "mlp.post")
    silent = Abstain({site: around(key(model, ids(model, PROMPTS[0])))})
    assert generate(model, PROMPTS, intervention=silent, **drawn) == [silent.refusal, *together[1:]]


def test_prompts_of_about_one_length_run_together_and_no_others(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["the slow", "1 + 2", "def", "4 + 5", "the quick brown fox", "the lazy", "1 + 4", "the quick"]
    sizes = [len(ids(model, prompt)) for prompt in prompts]
    settings: list[tuple[int, int]] = []
    real = model.generate

    def spy(tokens: Tensor, **options: Any) -> Any:
        settings.append((tokens.shape[1], len(tokens)))
        return real(tokens, **options)

    monkeypatch.setattr(model, "generate", spy, raising=False)
    together = generate(model, prompts, max_new_tokens=3)
    assert sorted(sizes) == [3, 5, 5, 5, 5, 5, 6, 11]
    assert settings == [(3, 1), (5, 6), (11, 1)], "one token is read on while three are written"
    settings.clear()
    assert generate(model, prompts, max_new_tokens=3, batch_size=2) == together
    assert max(rows for _, rows in settings) == 2
    settings.clear()
    assert generate(model, prompts, max_new_tokens=3, batch_size=1) == together
    assert [rows for _, rows in settings] == [1] * len(prompts)
    settings.clear()
    generate(model, prompts[:2] * 2, max_new_tokens=2, temperature=0.5)
    assert [rows for _, rows in settings] == [1] * 4, "draws are each row's own"
    assert generate(model, [], max_new_tokens=3) == []
    with pytest.raises(LensUnlearnError, match="batch_size=0 is too small: at least 1"):
        generate(model, "a", batch_size=0)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_a_text_ends_at_its_own_end_token_also_beside_others(model: Any, use_cache: bool) -> None:
    rows = [ids(model, prompt) for prompt in ("the slow", "1 + 2", "4 + 5")]
    assert len(set(map(len, rows))) == 1
    written = [greedy(tiny.hugging_face("gpt2"), torch.tensor([row]), 6)[0, len(row) :].tolist() for row in rows]
    for number, at in ((0, 2), (1, 0), (2, 4)):
        end = written[number][at]
        expected = []
        for tokens in written:
            stops = [i for i, token in enumerate(tokens) if token in (end, tiny.EOS)]
            kept = tokens if not stops else tokens[: stops[0] + (tokens[stops[0]] == end)]
            expected.append(model.tokenizer.decode(kept, skip_special_tokens=True))
        found = continue_rows(model, rows, max_new_tokens=6, use_cache=use_cache, stop=[end])
        assert [one.text for one in found] == expected
        assert not any(one.abstained for one in found)


def test_the_text_stops_at_the_end_of_the_context(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.tokenizer), "eos_token_id", None, raising=False)
    prompt = "the quick brown fox jumps over the lazy dog"
    ids = [tiny.BOS, *model.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    whole = greedy(tiny.hugging_face("gpt2"), torch.tensor([ids]), tiny.CONTEXT - len(ids))[0, len(ids) :].tolist()
    assert generate(model, prompt, max_new_tokens=1000) == model.tokenizer.decode(whole, skip_special_tokens=True)


def test_what_cannot_be_generated_is_refused(model: Any) -> None:
    with pytest.raises(CorpusError, match="does not fit a context of 64"):
        generate(model, "word " * 100)
    with pytest.raises(CorpusError, match="a prompt of 0 tokens"):
        generate(model, "", prepend_bos=False)
    with pytest.raises(LensUnlearnError, match="max_new_tokens=0 leaves nothing to write"):
        generate(model, "a", max_new_tokens=0)
    with pytest.raises(CorpusError, match="has no tokenizer"):
        generate(tiny.model("gpt2"), "a")
    training = tiny.build("gpt2")
    training.train()
    with pytest.raises(ModelError, match="training mode"):
        generate(training, "a")


def test_a_text_that_the_limit_cuts_says_so(model: Any) -> None:
    rows = [ids(model, prompt) for prompt in PROMPTS]
    whole = continue_rows(model, rows, max_new_tokens=tiny.CONTEXT)
    stop = [whole[0].ids[2]]
    for most in (1, 2, 3, 5):
        for one, other in zip(
            continue_rows(model, rows, max_new_tokens=most, stop=stop),
            continue_rows(model, rows, max_new_tokens=tiny.CONTEXT, stop=stop),
            strict=True,
        ):
            ends_within = len(other.ids) + (not other.ids or other.ids[-1] not in stop) <= most and not other.cut
            assert one.cut == (not ends_within)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompts_of_several_lengths_are_run_together_and_answered_as_alone(
    name: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a prompt holds an end of text, where the context is full, and where an answer ends: nobody gets more or less."""
    made = model if name == "gpt2" else tiny.model(name)
    monkeypatch.setattr(made, "tokenizer", model.tokenizer)
    context, calls, inner = int(made.cfg.n_ctx), [], made.generate
    monkeypatch.setattr(made, "generate", lambda tokens, **o: (calls.append(len(tokens)), inner(tokens, **o))[1])
    lengths = [3, 9, 4, 12, 12, 5, context - 4, context - 2]
    rows = [tiny.some_tokens(1, length, seed=number)[0].tolist() for number, length in enumerate(lengths)]
    rows = [[max(token, 3) for token in row] for row in rows]
    rows.append([*rows[1][:5], model.tokenizer.eos_token_id, *rows[1][:4]])
    alone = [continue_rows(made, [row], max_new_tokens=14)[0] for row in rows]
    assert calls == [1] * len(rows)
    calls.clear()
    assert continue_rows(made, rows, max_new_tokens=14, batch_size=16) == alone
    assert sum(calls) == len(rows) > 2 * len(calls)
    for row, one in zip(rows, alone, strict=True):
        steps = min(14, context - len(row))
        expected = greedy(made, torch.tensor([row]), steps)[0, len(row) :].tolist()
        end = expected.index(model.tokenizer.eos_token_id) if model.tokenizer.eos_token_id in expected else steps
        assert list(one.ids) == expected[:end]
        assert one.cut == (end == steps)
    stop = alone[3].ids[2]
    ended = [continue_rows(made, [row], max_new_tokens=14, stop=[stop])[0] for row in rows]
    assert continue_rows(made, rows, max_new_tokens=14, stop=[stop], batch_size=16) == ended
    assert continue_rows(made, rows, max_new_tokens=14, batch_size=16, use_cache=False) == alone


def test_what_looks_at_prompts_is_run_on_prompts_of_one_length(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, inner = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda tokens, **o: (calls.append(tuple(tokens.shape)), inner(tokens, **o))[1]
    )
    rows = [tiny.some_tokens(1, length, seed=length)[0].tolist() for length in (4, 6, 6)]
    edit = Ablate(selection_of(model)).placed("last")
    together = continue_rows(model, rows, edit, max_new_tokens=5)
    assert calls == [(1, 4), (2, 6)]
    assert together == [continue_rows(model, [row], edit, max_new_tokens=5)[0] for row in rows]
