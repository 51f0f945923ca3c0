"""generate: the same greedy text with and without a cache, under interventions as of the edited weights."""

from typing import Any

import pytest
import tiny
import torch
from test_interventions import random_selection, selection_of, unchanged
from torch import Tensor

from lens_unlearn.errors import CorpusError, LensUnlearnError, ModelError
from lens_unlearn.evaluation.generation import generate
from lens_unlearn.interventions import Ablate, Intervention
from lens_unlearn.methods.attention import ov_basis
from lens_unlearn.sites import resolve

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
    assert together == [generate(model, prompt, max_new_tokens=10)[0] for prompt in PROMPTS]
    assert together == generate(model, PROMPTS[::-1], max_new_tokens=10)[::-1]
    assert together == generate(model, PROMPTS, max_new_tokens=10, use_cache=False)
    assert len(together) == 3


def test_only_what_was_added_is_returned(model: Any) -> None:
    [text] = generate(model, "the quick brown", max_new_tokens=4)
    ids = model.tokenizer("the quick brown", add_special_tokens=False)["input_ids"]
    bos = [tiny.BOS] if model.cfg.default_prepend_bos else []
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


def test_drawn_texts_come_back_with_their_seed_and_leave_the_global_state(model: Any) -> None:
    first = generate(model, PROMPTS, max_new_tokens=10, temperature=1.0, seed=3)
    state = torch.get_rng_state()
    assert generate(model, PROMPTS, max_new_tokens=10, temperature=1.0, seed=3) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(model, PROMPTS, max_new_tokens=10, temperature=1.0, seed=4) != first


def test_the_text_stops_at_the_end_of_the_context(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.tokenizer), "eos_token_id", None, raising=False)
    prompt = "the quick brown fox jumps over the lazy dog"
    ids = [tiny.BOS] * model.cfg.default_prepend_bos + model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = greedy(tiny.hugging_face("gpt2"), torch.tensor([ids]), tiny.CONTEXT - len(ids))[0, len(ids) :].tolist()
    assert generate(model, prompt, max_new_tokens=1000) == [model.tokenizer.decode(whole, skip_special_tokens=True)]


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
