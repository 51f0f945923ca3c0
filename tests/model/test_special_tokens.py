"""Which tokens stand before and behind texts, by what a tokenizer itself does; and ids as text."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

import lens_unlearn as lu
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.evaluation.generation import continue_rows, generate
from lens_unlearn.evaluation.teacher_forcing import with_answers
from lens_unlearn.inspection.token_values import token_activations, token_firing, token_losses
from lens_unlearn.model.chat import ends_of_text
from lens_unlearn.model.special_tokens import _adds_bos, bos_token, encode, end_token, special_tokens, written_after

CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["the quick brown fox", "a small village stood beside the river"]


def by_bytes(*special: str) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=[*special], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(tiny.TEXTS * 3, trainer)
    return made


def by_pieces() -> Tokenizer:
    """As Llama has it: "▁" for a space, one before the first word as well, and BOS before a text."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    made.train_from_iterator([*tiny.TEXTS * 3, "\n    return x", "    x\n        y"], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


MADE: dict[str, tuple[Callable[[], Tokenizer], dict[str, str]]] = {
    "llama": (by_pieces, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "gpt2": (lambda: by_bytes("<|endoftext|>"), dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")),
    "smollm2": (
        lambda: by_bytes(*CHAT),
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
        },
    ),
    "qwen2": (lambda: by_bytes(*CHAT), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "characters": (lambda: by_bytes(), {}),
}
BOS = {"llama": 1, "gpt2": 0, "smollm2": None, "qwen2": None, "characters": None}


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A tiny model with a tokenizer of each kind, as TransformerLens loads it."""
    known: dict[str, Any] = {}

    def load(kind: str) -> Any:
        if kind not in known:
            make, names = MADE[kind]
            folder = str(tmp_path_factory.mktemp(kind))
            PreTrainedTokenizerFast(tokenizer_object=make(), **names).save_pretrained(folder)
            known[kind] = tiny.build("gpt2", tokenizer=AutoTokenizer.from_pretrained(folder))
        return known[kind]

    return load


@pytest.mark.parametrize("kind", MADE)
def test_a_text_begins_with_bos_where_the_tokenizer_says_so(speaking: Any, kind: str) -> None:
    model, expected = speaking(kind), BOS[kind]
    assert bos_token(model) == expected
    corpus = lu.read_corpus(TEXTS, model)
    assert ("with BOS" in repr(corpus), "no BOS" in repr(corpus)) == (expected is not None, expected is None)
    plain = model.tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert corpus.row(0).tolist() == [*([] if expected is None else [expected]), *plain]
    assert int(corpus.tokens.max()) < model.cfg.d_vocab
    corpus.check(model)
    for looked in (token_losses(model, TEXTS[0], progress=False), token_activations(model, TEXTS[0], "L0.mlp.post[1]")):
        assert looked.texts[0].ids.tolist() == corpus.row(0).tolist()
    without = token_activations(model, TEXTS[0], "L0.mlp.post[1]", prepend_bos=False)
    assert without.texts[0].ids.tolist() == plain


@pytest.mark.parametrize("kind", MADE)
def test_prepend_bos_is_the_same_everywhere(speaking: Any, kind: str) -> None:
    model, corpus = speaking(kind), lu.read_corpus(TEXTS, speaking(kind))
    everywhere: list[Callable[[bool], Any]] = [
        lambda bos: lu.read_corpus(TEXTS, model, prepend_bos=bos),
        lambda bos: lu.read_tofu([{"question": "who", "answer": "Ann"}], model, prepend_bos=bos, answer_eos=False),
        lambda bos: generate(model, TEXTS[0], prepend_bos=bos, max_new_tokens=2),
        lambda bos: lu.generations(model, TEXTS[0], {}, prepend_bos=bos, max_new_tokens=2),
        lambda bos: token_losses(model, TEXTS[0], prepend_bos=bos, progress=False),
        lambda bos: token_activations(model, TEXTS[0], "L0.mlp.post[1]", prepend_bos=bos),
        lambda bos: token_firing(model, TEXTS[0], "L0.mlp.post[1]", prepend_bos=bos),
    ]
    for read in everywhere:
        read(False)
        if kind in ("qwen2", "characters"):
            with pytest.raises(CorpusError, match="prepend_bos=True, but this tokenizer has no BOS token"):
                read(True)
        else:
            read(True)
    with pytest.raises(CorpusError, match=f"was read with prepend_bos={corpus.prepend_bos}: read it again"):
        token_losses(model, corpus, prepend_bos=not corpus.prepend_bos)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "smollm2"])
def test_bos_is_not_doubled_where_the_text_writes_it(speaking: Any, kind: str) -> None:
    model = speaking(kind)
    bos = model.tokenizer.bos_token_id
    plain, written = TEXTS[0], model.tokenizer.bos_token + TEXTS[0]
    one, other = (lu.read_corpus([text], model, prepend_bos=True) for text in (plain, written))
    assert other.tokens.tolist().count(bos) == 1
    if kind != "llama":  # behind a special token, its first word has a space less
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.counted, other.counted)
    assert encode(model.tokenizer, written, bos).count(bos) == 1
    assert generate(model, written, prepend_bos=True) == generate(model, written, prepend_bos=False)
    bare = lu.read_corpus([written], model, prepend_bos=False)
    assert bare.row(0).tolist() == other.row(0).tolist()
    assert bare.counted.tolist() == other.counted.tolist()
    assert not bare.has_prompts


@pytest.mark.parametrize(
    ("kind", "inner"),
    [
        ("llama", "<s>"),
        ("llama", "</s>"),
        ("gpt2", "<|endoftext|>"),
        *(("smollm2", t) for t in CHAT),
        ("qwen2", CHAT[1]),
    ],
)
def test_special_tokens_in_a_text_are_run_but_not_counted(speaking: Any, kind: str, inner: str) -> None:
    model = speaking(kind)
    id = model.tokenizer.convert_tokens_to_ids(inner)
    assert id in special_tokens(model.tokenizer)
    corpus = lu.read_corpus(["the quick" + inner + "brown fox", "no such thing"], model)
    assert corpus.tokens.tolist().count(id) == 1 + 2 * (id == BOS[kind])
    assert not bool(corpus.counted[corpus.tokens == id].any())
    assert int((~corpus.counted).sum()) == 1 + 2 * corpus.prepend_bos
    assert not corpus.has_prompts
    batch = corpus.take([0, 1])
    assert batch.prompt_ends.tolist() == (batch.lengths - 1).tolist(), "there are no prompts: the last token is judged"
    with_tokens = lu.read_corpus([{"q": f"who{inner}", "a": "the small village"}], model, field="q>a")
    assert with_tokens.has_prompts
    assert not bool(with_tokens.counted[with_tokens.tokens == id].any())
    cut = corpus.with_prompts(2)
    assert cut.has_prompts
    assert not bool(cut.counted[cut.tokens == id].any())


def test_a_long_text_with_special_tokens_is_cut_into_rows_like_any_other(speaking: Any) -> None:
    corpus = lu.read_corpus(["the quick <|endoftext|> brown fox " * 20], speaking("gpt2"), window=16)
    assert corpus.n_rows > 5
    assert corpus.answers == (None,) or not any(corpus.answers)
    assert int(corpus.starts.diff().max()) <= 16


def test_a_statistic_does_not_see_an_inner_bos(speaking: Any) -> None:
    model = speaking("gpt2")
    corpus = lu.read_corpus(["the quick<|endoftext|>brown fox"], model)
    moments = lu.collect(model, corpus, progress=False)
    assert moments.provenance["tokens"] == len(corpus.tokens) - 2 == corpus.n_tokens
    firing = token_activations(model, corpus, "L0.mlp.post[3]").texts[0]
    expected = firing.values[0][firing.counted].abs().mean()
    assert float(moments.mean_abs[lu.Site(0, "mlp.post")][3]) == pytest.approx(float(expected), rel=1e-5)


def test_what_transformer_lens_invents_is_not_used(speaking: Any) -> None:
    model = speaking("characters")
    assert model.tokenizer.eos_token is not None, "this is what is to be noticed"
    assert end_token(model) is None
    assert model.tokenizer.eos_token_id not in ends_of_text(model)
    assert generate(model, TEXTS, max_new_tokens=3) == [generate(model, text, max_new_tokens=3) for text in TEXTS]
    with pytest.raises(CorpusError, match="answer_eos=True, but this tokenizer has no end-of-text token"):
        lu.read_corpus([{"q": "a", "a": "b"}], model, field="q>a", answer_eos=True)


def test_a_token_beyond_the_models_vocabulary_is_refused_by_name(
    speaking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the tokenizer has as many tokens as the embedding, and an invented one is the next."""
    model = speaking("characters")
    monkeypatch.setattr(model.cfg, "d_vocab", len(model.tokenizer) - 1)
    assert bos_token(model) is None
    text = f"the quick {model.tokenizer.eos_token} fox"
    for read in (lambda: lu.read_corpus([text], model), lambda: generate(model, text)):
        with pytest.raises(CorpusError, match="which the tokenizer knows and the model does not") as caught:
            read()
        assert str(caught.value).count("\n") == 0


class Words(PreTrainedTokenizer):
    """A slow tokenizer, without offsets: the longest entry comes first, so that a space joins the word behind it."""

    entries = [
        "<s>",
        "</s>",
        "<unk>",
        " Paris",
        " is",
        " in",
        "Where",
        "?",
        "A:",
        "Paris",
        "\n",
        " ",
        *"abcdefghijklmnop",
    ]

    def __init__(self, **options: Any) -> None:
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options)

    @property
    def vocab_size(self) -> int:
        return len(self.entries)

    def get_vocab(self) -> dict[str, int]:
        return {entry: id for id, entry in enumerate(self.entries)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        found = []
        while text:
            fits = [entry for entry in self.entries if text.startswith(entry)]
            found.append(max(fits, key=len) if fits else "<unk>")
            text = text[len(found[-1]) if fits else 1 :]
        return found

    def _convert_token_to_id(self, token: str) -> int:
        return self.entries.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.entries[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


@pytest.mark.parametrize("template", ["{prompt} {answer}", "{prompt}\nA: {answer}", "{prompt}{answer}"])
def test_a_slow_tokenizer_keeps_the_first_token_of_an_answer(template: str) -> None:
    slow = Words()
    assert not slow.is_fast
    model = SimpleNamespace(tokenizer=slow, cfg=SimpleNamespace(n_ctx=64, d_vocab=len(slow)))
    pairs = [{"q": "Where is Paris?", "a": "Paris is in abc"}, {"q": "Where", "a": "Paris"}]
    corpus = lu.read_corpus(pairs, model, field="q>a", template=template)
    for row, pair in enumerate(pairs):
        counted = corpus.counted[int(corpus.starts[row]) : int(corpus.starts[row + 1])]
        assert slow.decode(corpus.row(row)[counted]).strip() == pair["a"]
        assert bool(counted[int(counted.int().argmax()) :].all())
    joined, _ = with_answers(model, corpus, [(corpus.answers[0], "Paris")])  # type: ignore[list-item]
    assert slow.decode(joined.tokens[joined.counted]).strip() == "Paris"


@pytest.mark.parametrize("kind", MADE)
def test_text_behind_a_prompt_is_what_the_whole_decodes_to(speaking: Any, kind: str) -> None:
    """The space that Llama's decoder drops, the indent of a line of code, and characters whose bytes are cut through."""
    tokenizer = speaking(kind).tokenizer
    texts = [
        "the quick brown fox",
        "def f(x):\n    return x\n\n        y",
        "a  b",
        "über 東京 🦊!",
        " the fox",
        "the <s> fox",
    ]
    for text in texts[: 3 if kind == "llama" else None]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        for cut in range(1, len(ids)):
            before = tokenizer.decode(ids[:cut], skip_special_tokens=True)
            after = written_after(tokenizer, ids[:cut], ids[cut:])
            assert whole.endswith(after)
            if whole.startswith(before):
                assert before + after == whole, (text, cut)


def test_a_continuation_of_the_llama_family_keeps_its_first_space(speaking: Any) -> None:
    model = speaking("llama")
    tokenizer = model.tokenizer
    for prompt, begin in itertools.product(("the quick brown", "def f(x):\n"), (True, False)):
        text = generate(model, prompt, max_new_tokens=6, prepend_bos=begin)
        ids = encode(tokenizer, prompt, tokenizer.bos_token_id if begin else None)
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert prompt + text == tokenizer.decode(ids, skip_special_tokens=True)


def test_generation_ends_at_every_end_that_the_generation_config_names(
    speaking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = speaking("gpt2")
    config = model.original_model.generation_config
    monkeypatch.setattr(config, "eos_token_id", None)
    prompts = ["the quick", "a small river"]
    ids = [encode(model.tokenizer, prompt, 0) for prompt in prompts]
    new = [list(one.ids) for one in continue_rows(model, ids, max_new_tokens=8)]
    ends = [new[0][2], new[1][4]]
    monkeypatch.setattr(config, "eos_token_id", ends)
    assert set(ends) <= ends_of_text(model)
    hugging_face = model.original_model
    for i, (prompt, tokens) in enumerate(zip(prompts, new, strict=True)):
        first = next(place for place, token in enumerate(tokens) if token in ends)
        assert generate(model, prompt, max_new_tokens=8) == model.tokenizer.decode(tokens[:first])
        theirs = hugging_face.generate(
            torch.tensor([ids[i]]), attention_mask=torch.ones(1, len(ids[i])), max_new_tokens=8, do_sample=False
        )[0, len(ids[i]) :].tolist()
        assert theirs == tokens[: first + 1]
    assert generate(model, prompts, max_new_tokens=8) == [generate(model, p, max_new_tokens=8) for p in prompts]


@pytest.mark.parametrize("temperature", [-1.0, -1e-9, float("nan"), float("inf")])
def test_what_is_no_temperature_is_refused(speaking: Any, temperature: float) -> None:
    with pytest.raises(LensUnlearnError, match="is no temperature: 0 for the most probable token, or above"):
        generate(speaking("gpt2"), "the", temperature=temperature)


def test_a_tokenizer_whose_files_are_gone_is_taken_as_it_is(tmp_path: Path) -> None:
    make, names = MADE["smollm2"]
    folder = tmp_path / "gone"
    PreTrainedTokenizerFast(tokenizer_object=make(), **names).save_pretrained(folder)
    asked = AutoTokenizer.from_pretrained(folder, add_bos_token=True)
    for file in folder.iterdir():
        file.unlink()
    model = SimpleNamespace(tokenizer=asked, cfg=SimpleNamespace(n_ctx=64, d_vocab=len(asked)))
    assert bos_token(model) == asked.bos_token_id


def test_an_empty_tokenizer_that_is_made_up_in_place_of_a_files_says_nothing_of_bos() -> None:
    """transformers makes one up for a folder that holds a GGUF file, where the tokenizer itself came from that file."""

    class FromFile:
        init_kwargs: ClassVar[dict[str, Any]] = {"add_bos_token": True}
        name_or_path = "folder"

        def __init__(self, adds: bool = True, size: int = 9) -> None:
            self.adds, self.size = adds, size

        def __len__(self) -> int:
            return self.size

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [2, 7] if self.adds else [7]}

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> "FromFile":
            return cls(adds=False, size=made_up)

    made_up = 1
    assert _adds_bos(FromFile(), 2)
    made_up = 9
    assert not _adds_bos(FromFile(), 2), "a folder that holds the tokenizer says that TransformerLens asked for BOS"
