"""SmolLM2-135M, a pretrained chat model: what holds on the toy models has to hold there. `make real` fetches it and runs this."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import lens_unlearn as lu

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
FILE = ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def smollm2() -> Any:
    if not FILE.is_file():
        pytest.skip(f"{FILE.name} is not here: make real fetches it")
    pytest.importorskip("gguf")
    with tiny.quiet():
        return lu.load_model(FILE, device="cpu")


def read(model: Any, part: str, skill: str, tokens: int) -> lu.Corpus:
    file = DATA / f"skillmix_{part}" / f"{skill}.jsonl"
    if not file.is_file():
        pytest.skip(f"{file.name} is not here")
    return lu.read_corpus(f"{file}:text", model, tokens=tokens, window=128)


def test_it_knows_what_it_was_trained_on(smollm2: Any) -> None:
    assert (smollm2.cfg.n_layers, smollm2.cfg.d_model, smollm2.cfg.d_vocab) == (30, 576, 49_152)
    answer = lu.generate(smollm2, "The capital of France is", max_new_tokens=4)
    assert answer.startswith(" Paris")


def test_its_numbers_are_those_of_transformers(smollm2: Any) -> None:
    from transformers import AutoModelForCausalLM

    with tiny.quiet():
        plain = AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32).eval()
    tokens = torch.tensor([smollm2.tokenizer("def add(a, b):\n    return a + b\n")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(smollm2(tokens), plain(tokens).logits, rtol=1e-3, atol=1e-3)


def test_texts_begin_as_it_was_trained(smollm2: Any) -> None:
    corpus = lu.read_corpus(["The sea is blue."], smollm2)
    assert corpus.tokens[: corpus.n_tokens].tolist() == smollm2.tokenizer("The sea is blue.")["input_ids"]


CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
    {"role": "user", "content": " And of Italy? "},
    {"role": "assistant", "content": "Rome.\n"},
]


@pytest.mark.parametrize("system", [None, "Answer in one word."])
def test_chats_are_those_of_its_own_template(smollm2: Any, system: str | None) -> None:
    tokenizer = smollm2.tokenizer
    before = [] if system is None else [{"role": "system", "content": system}]
    corpus = lu.read_corpus([CHAT, CHAT[:2]], smollm2, chat=True, system=system)
    for row, messages in enumerate(([*before, *CHAT], [*before, *CHAT[:2]])):
        ids = list(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])
        assert corpus.row(row).tolist() == ids
        counted = tokenizer.decode(corpus.row(row)[corpus.take([row]).counted[0]])
        assert counted == "".join(f"{t['content']}<|im_end|>" for t in messages if t["role"] == "assistant")
        asked = tokenizer.apply_chat_template(messages[:-1], return_dict=True, add_generation_prompt=True)["input_ids"]
        assert corpus.prompt(row).tolist() == list(asked)
    assert tokenizer.decode(corpus.queries().row(0)).endswith("user\n And of Italy? ")


def test_it_answers_a_chat_as_transformers_does(smollm2: Any) -> None:
    assert lu.generate(smollm2, CHAT[:1]) == "The capital of France is Paris."
    assert lu.generate(smollm2, CHAT[0]["content"], chat=True) == "The capital of France is Paris."
    asked = smollm2.tokenizer.apply_chat_template(
        CHAT[:3], return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        out = smollm2.original_model.generate(asked, max_new_tokens=20, do_sample=False)
    own = smollm2.tokenizer.decode(out[0, asked.shape[1] :], skip_special_tokens=True)
    assert lu.generate(smollm2, CHAT[:3], max_new_tokens=20) == own


def test_a_fiftieth_of_its_neurons_holds_much_of_code_and_little_of_prose(smollm2: Any) -> None:
    """The papers' fractions work on a real model; of the toy models a quarter of the neurons is needed for as much."""
    code, prose = (read(smollm2, "fit", skill, 2000) for skill in ("code", "prose"))
    prune = lu.selective_pruning(smollm2, code, prose, fraction=0.02, progress=False)
    control = lu.random_pruning(smollm2, code, prose, like=prune)
    test = {"forget": read(smollm2, "heldout", "code", 1200), "retain": read(smollm2, "heldout", "prose", 1200)}
    report = lu.evaluate(smollm2, test, {"pruned": prune, "control": control}, progress=False, batch_size=2)
    assert report.drop("pruned", "forget").value > 0.12
    assert report.drop("pruned", "retain").value < 0.08
    assert report.drop("control", "forget").value < 0.08
    assert report.drop("control", "retain").value < 0.08


TEXT = (
    "The village stood beside a slow green river. In the spring the water rose over the meadows, and the children went to school "
    "by boat. Nobody remembered who had built the bridge, or when it had fallen."
)


def test_means_over_prompts_tell_mathematics_from_code_where_last_tokens_do_less(smollm2: Any) -> None:
    """Prompts that are cut out of running text: fitted on some documents, and judged on others."""
    site, found = lu.Site(14, "mlp.post"), {}
    cut = {
        (part, skill): read(smollm2, part, skill, 6000).with_prompts(48)
        for part in ("fit", "heldout")
        for skill in ("math", "code")
    }
    for pool in ("last", "mean"):
        options: dict[str, Any] = {"capacity": 45, "pool": pool, "progress": False}
        keys = {name: lu.query_keys(smollm2, corpus, site, **options) for name, corpus in cut.items()}
        sides = [keys["fit", skill] for skill in ("math", "code")]
        act = lu.key_space_detection(
            smollm2, *sides, layer=14, alpha=1.0, region="linear", pool=pool, control=False, progress=False
        )  # fmt: skip
        theirs, others = (act.regions[site].score(keys["heldout", skill][site]) for skill in ("math", "code"))
        found[pool] = float((theirs[:, None] < others[None]).double().mean())
    assert found["mean"] > 0.97
    assert found["mean"] > found["last"] > 0.5


def test_the_first_token_is_an_attention_sink_and_dominates_the_layer_that_makes_it_one(smollm2: Any) -> None:
    corpus = lu.read_corpus([TEXT], smollm2, window=128)
    every, others = (lu.collect(smollm2, corpus, skip_sinks=ratio, progress=False) for ratio in (None, 10))
    for layer, sinks in ((0, 0), (1, 0), (11, 1), (12, 1), (20, 1), (28, 1)):
        name = f"L{layer}.mlp.post.count"
        assert int(every.state()[name] - others.state()[name]) == sinks, layer
    site = lu.Site(11, "mlp.post")
    assert float(every.mean_abs[site].sum()) > 1.3 * float(others.mean_abs[site].sum())


@pytest.mark.parametrize("at", [None, "prompt", "generated", "last"])
def test_a_place_is_the_same_with_a_cache_and_without_and_spares_the_sink(smollm2: Any, at: Any) -> None:
    corpus = lu.read_corpus([TEXT], smollm2, window=128)
    prune = lu.Ablate(lu.collect(smollm2, corpus, progress=False).mean_abs.top(0.02))
    placed = prune.placed(at, skip_special=True)
    written = [
        lu.generate(smollm2, "The river rose, and", intervention=act, max_new_tokens=12, use_cache=cache)
        for act, cache in ((placed, True), (placed, False), (prune, True))
    ]
    assert written[0] == written[1]
    assert written[0] != written[2], "neurons that fire most at the sink are not ablated there"
    seen: list[torch.Tensor] = []
    tokens = torch.tensor([smollm2.tokenizer(TEXT)["input_ids"]])
    for act in (lu.Chain(()), placed):
        with act.on(smollm2), torch.no_grad():
            hook = [("blocks.0.mlp.hook_post", lambda x, hook: seen.append(x.clone()))]
            smollm2.run_with_hooks(tokens, fwd_hooks=hook)
    changed = (seen[0] != seen[1]).any(-1)[0]
    assert not changed[0]
    expected = {None: len(changed) - 1, "prompt": len(changed) - 1, "last": 1, "generated": 0}[at]
    assert int(changed.sum()) == expected
