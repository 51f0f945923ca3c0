"""generate(model, messages): what transformers' template and the model's own `generate` come to, up to the end of the turn."""

import math
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from chat_helpers import FAMILIES, ONE, SYSTEM, TWO, chatting, template_ids

import lens_unlearn as lu
from lens_unlearn.core.errors import CorpusError
from lens_unlearn.evaluation.teacher_forcing import predict
from lens_unlearn.interventions.abstain import REFUSAL, Abstain
from lens_unlearn.keyspace.regions import fit_region
from lens_unlearn.model.chat import ends_of_text
from lens_unlearn.model.hooks import on_logits
from lens_unlearn.model.sites import Site

SITE = Site(1, "mlp.post")
QUESTION = TWO[:3]


def own(model: Any, messages: list[dict[str, Any]], steps: int, end: int) -> str:
    """Greedy decoding by the model itself, up to the token that ends a turn."""
    ids = template_ids(model.tokenizer, messages, add_generation_prompt=True)
    tokens = torch.tensor([ids])
    for _ in range(steps):
        tokens = torch.cat([tokens, tiny.logits(model, tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    new = tokens[0, len(ids) :].tolist()
    new = new[: new.index(end)] if end in new else new
    return model.tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_the_models_own_generation(name: str) -> None:
    model, family = chatting(name), FAMILIES[name]
    end = model.tokenizer.convert_tokens_to_ids(family.ends)
    expected = [own(model, messages, 8, end) for messages in (ONE[:1], QUESTION)]
    assert lu.generate(model, [ONE[:1], QUESTION], max_new_tokens=8) == expected
    assert lu.generate(model, ONE[:1], max_new_tokens=8) == expected[0]
    assert lu.generate(model, tuple(QUESTION), max_new_tokens=8) == expected[1]
    said = ONE[0]["content"]
    assert lu.generate(model, said, chat=True, max_new_tokens=8) == expected[0]
    assert lu.generate(model, [said, said], chat=True, max_new_tokens=8) == [expected[0]] * 2


@pytest.mark.parametrize("name", ["qwen", "llama3"])
def test_a_system_turn_stands_before_those_that_have_none(name: str) -> None:
    model, end = chatting(name), chatting(name).tokenizer.convert_tokens_to_ids(FAMILIES[name].ends)
    expected = own(model, [SYSTEM, *QUESTION], 6, end)
    for prompt in (QUESTION, [SYSTEM, *QUESTION]):
        assert lu.generate(model, prompt, system=SYSTEM["content"], max_new_tokens=6) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_the_token_that_ends_a_turn_ends_the_answer(name: str) -> None:
    """Named by the template alone: neither the tokenizer's end-of-text token nor a configuration names it here."""
    model = chatting(name)
    end = model.tokenizer.convert_tokens_to_ids(FAMILIES[name].ends)
    assert end != model.tokenizer.eos_token_id
    assert end in ends_of_text(model)
    steps: list[int] = []

    def third_ends(logits: torch.Tensor) -> torch.Tensor:
        steps.append(len(steps))
        forced = torch.zeros_like(logits)
        forced[..., end if len(steps) == 3 else 100] = 9.0
        return forced

    removers: list[Any] = []
    on_logits(model, third_ends, removers)
    try:
        text = lu.generate(model, ONE[:1], max_new_tokens=9)
    finally:
        for remove in removers:
            remove()
    assert text == model.tokenizer.decode([100, 100])
    assert len(steps) == 3


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        (ONE, {}, "the last turn of a conversation is the assistant's"),
        ([SYSTEM], {}, "the last turn of a conversation is the system's"),
        ([ONE[:1], []], {}, "no list of turns"),
        ([ONE[:1], "who?"], {"prepend_bos": True}, "prepend_bos cannot be given for conversations"),
        ("who?", {"system": "Be brief."}, "give chat=True as well"),
        ([{"role": "tool", "content": "3"}], {}, "turn 1 has the role 'tool'"),
        ([{"role": "user", "content": None}], {}, "turn 1 has no content"),
    ],
)
def test_what_is_no_question_is_refused(prompts: Any, options: Any, said: str) -> None:
    with pytest.raises(CorpusError, match=said):
        lu.generate(chatting("qwen"), prompts, **options)


def test_a_model_or_template_that_cannot_is_refused() -> None:
    with pytest.raises(CorpusError, match="has no chat template"):
        lu.generate(tiny.speaking("gpt2"), ONE[:1])
    with pytest.raises(CorpusError, match="refuses it: System role not supported"):
        lu.generate(chatting("gemma"), ONE[:1], system="Be brief.")


# --- judging and abstaining --------------------------------------------------------------------------------------------


def around(key: torch.Tensor, pool: Any = "last") -> Abstain:
    """Abstain from what has this key alone."""
    spread = torch.randn(8, len(key), generator=torch.Generator().manual_seed(0)) * 1e-4
    return Abstain({SITE: fit_region(key + spread, "box", alpha=2.0)}, pool=pool)


def key_at(model: Any, ids: list[int], place: int, pool: str = "last") -> torch.Tensor:
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([ids]))
    keys = cache[f"blocks.{SITE.layer}.mlp.hook_post"][0]
    marked = {id for id, token in model.tokenizer.added_tokens_decoder.items() if token.special}
    text = [i for i in range(1, place + 1) if ids[i] not in marked]
    return keys[place] if pool == "last" else keys[text].mean(0)


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_token_of_the_users_last_turn_is_judged_however_the_model_is_run(name: str, pool: Any) -> None:
    model, tokenizer = chatting(name), chatting(name).tokenizer
    corpus = lu.read_corpus([TWO, ONE], model, chat=True)
    prompt = template_ids(tokenizer, QUESTION, add_generation_prompt=True)
    place = (
        next(i for i in range(len(prompt), 0, -1) if tokenizer.decode(prompt[:i]).endswith(QUESTION[-1]["content"])) - 1
    )
    key = key_at(model, prompt, place, pool)

    fitted = lu.query_keys(model, corpus.only([0]), [SITE], pool=pool, progress=False)[SITE].flatten(1)
    torch.testing.assert_close(fitted[0], key, rtol=1e-4, atol=1e-5)

    abstain = around(key, pool)
    assert lu.generate(model, [QUESTION, ONE[:1]], intervention=abstain, max_new_tokens=3)[0] == REFUSAL
    assert lu.generate(model, QUESTION, intervention=abstain, max_new_tokens=3) == REFUSAL
    assert lu.generate(model, ONE[:1], intervention=abstain, max_new_tokens=3) != REFUSAL
    with abstain.on(model) as live:
        assert predict(model, corpus.take([0, 1])).abstained.tolist() == [True, False]
        model.generate(torch.tensor([prompt]), max_new_tokens=2, do_sample=False, verbose=False, return_type="tokens")
        assert live.abstained.tolist() == [True]
        other = template_ids(tokenizer, ONE[:1], add_generation_prompt=True)
        width, pad = max(len(prompt), len(other)), tokenizer.pad_token_id
        beside = torch.tensor([ids + [pad] * (width - len(ids)) for ids in (other, prompt)])
        with torch.no_grad():
            model(beside)
            assert live.abstained.tolist() == [False, True]
            logits = model(torch.tensor([prompt]))[0]
        assert live.abstained.tolist() == [True]
    end = tokenizer.convert_tokens_to_ids(FAMILIES[name].ends)
    assert logits[-1].argmax() == end
    assert logits[-1].unique().numel() == 2
    plain = tiny.logits(model, torch.tensor([prompt]))[0]
    assert torch.equal(logits[:place], plain[:place])
    assert not torch.equal(logits[place], plain[place])


def test_facts_of_tofu_are_chats_too() -> None:
    model = chatting("llama3")
    row = {"question": ONE[0]["content"], "answer": ONE[1]["content"], "perturbed_answer": ["a dog", "a fox"]}
    corpus = lu.read_tofu([row], model, chat=True, system=SYSTEM["content"])
    assert corpus.row(0).tolist() == template_ids(model.tokenizer, [SYSTEM, *ONE])
    report = lu.evaluate(model, {"facts": corpus}, {}, memorization=1, progress=False)
    ids = [
        template_ids(model.tokenizer, [SYSTEM, ONE[0], {"role": "assistant", "content": text}])
        for text in row["perturbed_answer"]
    ]
    own = corpus.row(0).tolist()

    def loss(ids: list[int]) -> float:
        start = len(corpus.prompt(0))
        losses = -tiny.logits(model, torch.tensor([ids])).log_softmax(-1)[0]
        return float(torch.stack([losses[i - 1, ids[i]] for i in range(start, len(ids))]).mean())

    wrong = sum(map(loss, ids)) / 2
    assert report["base", "facts", "truth_ratio"].value == pytest.approx(math.exp(loss(own) - wrong), rel=1e-3)


@pytest.mark.parametrize("cache", [True, False])
def test_every_token_is_judged_from_there_on(cache: bool) -> None:
    model = chatting("gemma")
    prompt = template_ids(model.tokenizer, QUESTION, add_generation_prompt=True)
    written = lu.generate(model, QUESTION, max_new_tokens=6)
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=6,
            do_sample=False,
            verbose=False,
            return_type="tokens",
            stop_at_eos=False,
        )[0].tolist()
    for place in (
        len(prompt) - 8,
        len(prompt) - 1,
        len(prompt) + 2,
    ):  # of the user's turn, the last one, and of the answer
        abstain = replace(around(key_at(model, out, place)), when="every_token")
        text = lu.generate(model, QUESTION, intervention=abstain, max_new_tokens=6, use_cache=cache)
        judged = place >= len(prompt) - len(lu.read_corpus([TWO], model, chat=True).marks) - 1
        assert text == (REFUSAL if judged else written)


def test_a_text_that_is_no_chat_ends_with_the_end_of_text() -> None:
    model = chatting("qwen")
    ids = model.tokenizer("the quick brown")["input_ids"]
    with around(key_at(model, ids, -1)).on(model) as live, torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1]
    assert live.abstained.tolist() == [True]
    assert logits.argmax() == model.tokenizer.eos_token_id


def test_answers_and_memorization_are_asked_behind_the_whole_conversation() -> None:
    model = chatting("qwen")
    corpus = lu.read_corpus([TWO, ONE], model, chat=True)
    key = lu.query_keys(model, corpus.only([0]), [SITE], progress=False)[SITE].flatten(1)[0]
    report = lu.evaluate(
        model, {"chat": corpus}, {"abstain": around(key)}, answers=2, memorization=2, max_new_tokens=4, progress=False
    )
    samples = {s["prompt"]: s for s in report.samples}
    asked = [model.tokenizer.decode(corpus.prompt(row), skip_special_tokens=True) for row in range(2)]
    assert set(samples) == set(asked)
    assert samples[asked[0]]["abstain"] == REFUSAL
    assert samples[asked[0]]["true answer"] == TWO[-1]["content"]
    assert samples[asked[1]]["base"] == samples[asked[1]]["abstain"]
    assert report.provenance["corpora"]["chat"]["chat"]


@pytest.mark.parametrize("name", ["qwen", "gemma", "instruct"])
@pytest.mark.parametrize("conversation", [ONE, TWO])
def test_what_is_memorized_is_the_last_turn_behind_the_true_conversation(name: str, conversation: Any) -> None:
    """Its content, and the token that ends it; a conversation of one answer is not run again for that."""
    model = chatting(name)
    corpus = lu.read_corpus([conversation], model, chat=True)
    ids, end = corpus.row(0).tolist(), corpus.answer_eos
    start, over = len(corpus.prompt(0)), len(ids) - ids[::-1].index(end)
    widths: list[int] = []
    removers: list[Any] = []
    on_logits(model, lambda logits: (widths.append(logits.shape[1]), logits)[1], removers)
    try:
        one = lu.evaluate(model, {"chat": corpus}, {}, memorization=1, progress=False)
    finally:
        for remove in removers:
            remove()
    texts = [width for width in widths if width > start]  # and no probe of a model that is seen for the first time
    assert len(texts) == (1 if conversation is ONE else 2)
    losses = -tiny.logits(model, torch.tensor([ids])).log_softmax(-1)[0]
    expected = torch.stack([losses[i - 1, ids[i]] for i in range(start, over)]).mean()
    assert one["base", "chat", "answer_probability"].value == pytest.approx(float((-expected).exp()), rel=1e-3)


def test_refusals_to_train_on_are_turns_of_the_assistant() -> None:
    from lens_unlearn.methods.objectives import refusals

    model = chatting("llama3")
    corpus = refusals(lu.read_corpus([TWO], model, chat=True), model, " I cannot say. ")
    refused = [*QUESTION, {"role": "assistant", "content": "I cannot say."}]
    assert corpus.row(0).tolist() == template_ids(model.tokenizer, refused)
    assert model.tokenizer.decode(corpus.row(0)[corpus.take([0]).counted[0]]) == "I cannot say.<|eot_id|>"
