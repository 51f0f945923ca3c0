"""Interventions at some positions of a text: a plain hook with a mask is the oracle, with and without a cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interventions_helpers import Z, box_around_half, one, random_selection, selection_of, under
from positions_helpers import ROWS, adjust_of, pad, run, watching
from torch import Tensor

from lens_unlearn.core.errors import LensUnlearnError, SelectionError
from lens_unlearn.corpora.corpus import Batch
from lens_unlearn.evaluation.evaluate import evaluate
from lens_unlearn.evaluation.generation import generate
from lens_unlearn.evaluation.teacher_forcing import predict
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.base import Placed
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.interventions.update import Update
from lens_unlearn.model.matrices import Matrix, matrix_shape
from lens_unlearn.model.residual import residual_scale
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.maps import NeuronMap

POST = [Site(0, "mlp.post"), Site(1, "mlp.post")]
FEW = ["gpt2", "llama", *tiny.HOOKED[:1]]
CACHED = [name for name in tiny.SPEAKING if name != "hooked-folded"]


@contextmanager
def masked(plain: Any, name: str, selection: NeuronMap, where: Any) -> Iterator[None]:
    """Zero the selected neurons of a plain model, at the positions that `where` gives for a number of positions."""
    handles = []
    for site in (s for s in selection if bool(selection[s].any())):

        def edit(_: Any, args: Any, site: Site = site) -> Any:
            x = args[0].clone()
            mask: Tensor = where(x) if callable(where) else where
            x.reshape(*mask.shape, -1)[mask[..., None] & selection[site].reshape(-1)] = 0
            return (x,)

        handles.append(tiny.module_of(plain, name, site).register_forward_pre_hook(edit))
    yield
    for handle in handles:
        handle.remove()


def drawn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


# --- masks: plain hooks are the oracle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp.post", "attn.z"])
def test_a_mask_is_a_plain_hook_at_its_positions(dense: str, kind: str) -> None:
    model, plain, tokens = tiny.model(dense), tiny.hugging_face(dense), tiny.some_tokens(3, 8)
    selection, mask = selection_of(model, kind, share=0.5), drawn((3, 8))
    with masked(plain, dense, selection, mask):
        expected = tiny.logits(plain, tokens)
    with Ablate(selection).on(model, at=mask):
        got = tiny.logits(model, tokens)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, under(model, Ablate(selection), tokens), atol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "phi3", "gpt2-compat", *tiny.HOOKED[:1]])
@pytest.mark.parametrize(
    "form", ["zero", "mean", "heads", "basis", "deterministic", "random", "rows", "columns", "dense", "rank"]
)
def test_everywhere_is_the_intervention_and_nowhere_is_the_model(name: str, form: str) -> None:
    model, tokens, act = tiny.model(name), tiny.some_tokens(2, 7), one(name, form)
    everywhere = torch.ones(2, 7, dtype=torch.bool)
    assert torch.equal(under(model, act.placed(everywhere), tokens), under(model, act, tokens))
    assert torch.equal(under(model, act.placed(~everywhere), tokens), tiny.logits(model, tokens))
    assert torch.equal(under(model, act.placed("prompt"), tokens), under(model, act, tokens))
    assert torch.equal(under(model, act.placed("generated"), tokens), tiny.logits(model, tokens))


@pytest.mark.parametrize("form", ["mean", "random", "rows"])
def test_other_positions_are_bitwise_untouched_where_it_acts(form: str) -> None:
    model, tokens, mask = tiny.model("llama"), tiny.some_tokens(3, 8), drawn((3, 8))
    act = one("llama", form)
    site = Site(0, "resid") if form == "rows" else next(site for site, _ in act.hooks())
    with watching(model, site) as before, act.on(model, at=mask), watching(model, site) as after:
        run(model, tokens)
    [clean], [changed] = ([x] for x in (run_values(model, tokens, site), after[0]))
    assert torch.equal(clean[~mask], changed[~mask])
    assert not torch.equal(clean[mask], changed[mask])
    assert len(before) == 1


def run_values(model: Any, tokens: Tensor, site: Site) -> Tensor:
    with watching(model, site) as seen:
        run(model, tokens)
    return seen[0]


def test_chains_of_placed_interventions_act_each_at_its_place() -> None:
    model, plain, tokens = tiny.model("llama"), tiny.hugging_face("llama"), tiny.some_tokens(2, 8)
    one_, other = (selection_of(model, kind, share=0.4, seed=seed) for kind, seed in (("mlp.post", 1), ("attn.z", 2)))
    masks = drawn((2, 8), 1), drawn((2, 8), 2)
    with masked(plain, "llama", one_, masks[0]), masked(plain, "llama", other, masks[1]):
        expected = tiny.logits(plain, tokens)
    both = Ablate(one_).placed(masks[0]) + Ablate(other).placed(masks[1])
    torch.testing.assert_close(under(model, both, tokens), expected, rtol=1e-5, atol=1e-5)
    with Ablate(one_).on(model, at=masks[0]), Ablate(other).on(model, at=masks[1]):
        assert torch.equal(tiny.logits(model, tokens), under(model, both, tokens))
    inner, outer = drawn((2, 8), 3), drawn((2, 8), 4)
    twice, once = Ablate(one_).placed(inner).placed(outer), Ablate(one_).placed(inner & outer)
    assert torch.equal(under(model, twice, tokens), under(model, once, tokens))
    together = (Ablate(one_) + Ablate(other)).placed(inner)
    apart = Ablate(one_).placed(inner) + Ablate(other).placed(inner)
    assert torch.equal(under(model, together, tokens), under(model, apart, tokens))


@pytest.mark.parametrize("shape", [(2, 7), (1, 8), (2, 9), (3, 8)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    model = tiny.model("gpt2")
    act, tokens = Ablate(selection_of(model)), tiny.some_tokens(2, 8)
    with (
        act.on(model, at=torch.ones(shape, dtype=torch.bool)),
        pytest.raises(SelectionError, match=rf"{shape[0]} rows and {shape[1]} positions.*2 rows and positions 0 to 7"),
    ):
        tiny.logits(model, tokens)
    assert torch.equal(tiny.logits(model, tokens), tiny.logits(tiny.model("gpt2"), tokens))


# --- prompts and what is generated --------------------------------------------------------------------------------------------


def decode(model: Any, tokens: Tensor, steps: int, *, cache: bool) -> Tensor:
    settings: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    with torch.no_grad():
        return model.generate(tokens, max_new_tokens=steps, use_past_kv_cache=cache, **settings)


PLACES = {
    "prompt": lambda places, end: places <= end,
    "generated": lambda places, end: places > end,
    "last": lambda places, end: places == end,
}


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "qwen3"])
def test_generation_is_that_of_a_plain_model_with_a_hook_at_the_place(name: str, at: str) -> None:
    model, plain = tiny.speaking(name), tiny.hugging_face(name)
    tokens, steps = torch.tensor([[40, 41, 42], [50, 51, 52]]), 5
    selection = selection_of(model, ["mlp.post", "attn.z"], share=0.5)

    def where(x: Tensor) -> Tensor:
        width = written.shape[1]
        return PLACES[at](torch.arange(width), 2).expand(2, width)

    written = tokens
    with masked(plain, name, selection, where), torch.no_grad():
        for _ in range(steps):
            written = torch.cat([written, tiny.logits(plain, written)[:, -1].argmax(-1, keepdim=True)], 1)
    for cache in (True, False):
        with Ablate(selection).on(model, at=at):
            assert torch.equal(decode(model, tokens, steps, cache=cache), written)


@pytest.mark.parametrize("at", [*PLACES, "mask"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("name", CACHED)
def test_a_cache_changes_nothing(name: str, at: str, skip: bool) -> None:
    model, tokens, steps = tiny.speaking(name), torch.tensor([[0, 40, 41, 42], [0, 50, 1, 52]]), 5
    place = drawn((2, 9)) if at == "mask" else at
    act = Ablate(selection_of(model, ["mlp.post"], share=0.5), 0.7).placed(place, skip_special=skip)
    act = act + adjust_of(model).placed(place, skip_special=skip)
    texts, seen = [], []
    for cache in (True, False):
        with act.on(model), watching(model, POST[0]) as values:
            texts.append(decode(model, tokens, steps, cache=cache))
        seen.append(torch.cat(values, 1) if cache else values[-1])
    assert torch.equal(*texts)
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at", ["prompt", "generated", "last", "mask", None])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_a_text_in_pieces_behind_a_cache_is_the_text_at_once(name: str, at: str | None) -> None:
    model, tokens = tiny.speaking(name), tiny.some_tokens(2, 9)
    tokens[:, 0] = tiny.BOS
    ends = torch.tensor([5, 3])
    place = drawn((2, 9)) if at == "mask" else at
    with Ablate(selection_of(model, share=0.5)).on(model, at=place, skip_special=True) as live, torch.no_grad():
        live.expect(ends)
        whole = model(tokens)
        for cuts in ((4, 9), (1, 2, 6, 9), (6, 7, 8, 9)):
            live.expect(torch.full_like(ends, 8) if at == "mask" else ends)
            pieces, cache, begin = [], None, 0
            for end in cuts:
                out = model.original_model(tokens[:, begin:end], past_key_values=cache, use_cache=True)
                pieces, cache, begin = [*pieces, out.logits], out.past_key_values, end
            torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FEW)
def test_rows_are_placed_each_for_itself_whatever_the_padding(name: str, side: str, at: str) -> None:
    model = tiny.speaking(name)
    act = Ablate(selection_of(model, share=0.5)).placed(at, skip_special=True)
    tokens, mask = pad(ROWS, side, extra=2)
    together = under_mask(model, act, tokens, mask if side == "left" else None)
    for i, row in enumerate(ROWS):
        alone = under_mask(model, act, torch.tensor([row]), None)[0]
        torch.testing.assert_close(together[i][mask[i].bool()], alone, rtol=1e-4, atol=1e-4)


def under_mask(model: Any, act: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
    with act.on(model):
        return run(model, tokens, mask)


@pytest.mark.parametrize("at", PLACES)
def test_in_teacher_forcing_the_prompt_ends_before_the_answer(at: str) -> None:
    """Also where token 0, with which a batch is padded, is a token of text."""
    name = "llama"
    model, plain = tiny.speaking(name), tiny.hugging_face(name)
    rows = [torch.tensor([40, 41, 42, 43, 44]), torch.tensor([50, 51, 52])]
    counted = [torch.tensor([False] * n + [True] * (len(row) - n)) for n, row in zip((2, 1), rows, strict=True)]
    batch = Batch.of(rows, counted, [0, 1])
    selection = selection_of(model, share=0.5)
    where = torch.stack([PLACES[at](torch.arange(5), end) for end in (1, 0)])
    with masked(plain, name, selection, where):
        expected = tiny.logits(plain, batch.tokens)[:, :-1][batch.counted[:, 1:]]
    with Ablate(selection).on(model, at=at), torch.no_grad():
        got = predict(model, batch).logits()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, tiny.logits(model, batch.tokens)[:, :-1][batch.counted[:, 1:]], atol=1e-3)


@pytest.mark.parametrize("at", [*PLACES, None])
def test_an_evaluation_from_a_higher_layer_on_is_that_of_the_whole_model(at: str | None) -> None:
    """Beside the unedited model, whose lower layers it shares, as without that one."""
    model = tiny.to_bridge(with_sinks("llama", [77]), "llama", tiny.speaking("llama").tokenizer)
    corpus = tiny.corpus((9, 7, 8), tokens=[40, 41, 42, 43, 77]).with_prompts()
    chosen = NeuronMap({POST[1]: selection_of(model, share=0.9)[POST[1]]})
    act = Ablate(chosen, 2.0).placed(at, skip_special=True)
    found = [
        evaluate(model, {"a": corpus}, conditions, resamples=3, progress=False).measures["act", "a", "loss"].value
        for conditions in ({"act": act}, {"base": None, "act": act}, {"act": act.inner})
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert abs(found[0] - found[2]) > 1e-4, "what it spares matters"


def test_what_is_written_under_a_placed_intervention_does_not_depend_on_the_cache_or_batch() -> None:
    model, prompts = tiny.speaking("llama"), ["the quick", "def add", "one two", "1"]
    for at in PLACES:
        act = Ablate(selection_of(model, share=0.5)).placed(at, skip_special=True)
        written = [
            generate(model, prompts, intervention=act, max_new_tokens=6, use_cache=cache, batch_size=size)
            for cache, size in ((True, 4), (False, 1))
        ]
        assert written[0] == written[1]


# --- special tokens and attention sinks -----------------------------------------------------------------------------------------


def with_sinks(name: str, tokens: list[int]) -> Any:
    """A model in which some tokens are embedded as attention sinks: with a norm far beyond that of others."""
    plain = tiny.hugging_face(name)
    with torch.no_grad():
        plain.get_input_embeddings().weight[tokens] *= 300
    return plain


def acted_on(model: Any, act: Any, tokens: Tensor, site: Site = POST[0]) -> Tensor:
    """Return the positions at which a site is changed, at a layer before which nothing is."""
    with act.on(model), watching(model, site) as after:
        run(model, tokens)
    return (run_values(model, tokens, site) != after[0]).flatten(2).any(-1)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_special_tokens_and_sinks_are_never_touched(name: str) -> None:
    tokenizer = tiny.speaking(name).tokenizer
    model = tiny.to_bridge(with_sinks(name, [77]), name, tokenizer)
    tokens = torch.tensor([[0, 40, 77, 1, 42, 2, 60], [60, 77, 40, 0, 41, 42, 77]])
    act = Ablate(selection_of(model, share=0.9), 0.3)
    expected = torch.tensor([[0, 1, 0, 0, 1, 0, 1], [0, 0, 1, 0, 1, 1, 0]]).bool()
    assert acted_on(model, act, tokens).all()
    assert torch.equal(acted_on(model, act.placed(skip_special=True), tokens), expected)
    with act.on(model, skip_special=True), watching(model, POST[0]) as seen:
        run(model, tokens)
    assert torch.equal((run_values(model, tokens, POST[0]) != seen[0]).any(-1), expected)
    mild = act.placed(skip_special=True, sink_ratio=1e6)
    assert torch.equal(acted_on(model, mild, tokens)[:, [1, 2]], torch.tensor([[True, True], [True, True]]))


def test_a_delta_and_attention_spare_them_too() -> None:
    model = tiny.to_bridge(with_sinks("llama", [77]), "llama", tiny.speaking("llama").tokenizer)
    tokens = torch.tensor([[0, 40, 77, 41]])
    update = Delta({Matrix(0, "W_Q"): Update(torch.ones(matrix_shape(model, 0, "W_Q")))})
    for act, site in ((update, Site(0, "attn.q")), (Ablate(selection_of(model, "attn.z", 0.9), 0.3), Z[0])):
        moved = acted_on(model, act.placed(skip_special=True), tokens, site)
        assert moved.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sinks_are_the_same_with_a_cache_and_without(name: str) -> None:
    model = tiny.to_bridge(with_sinks(name, [77]), name, tiny.speaking(name).tokenizer)
    tokens = torch.tensor([[0, 40, 77, 41], [40, 77, 77, 1]])
    act = Ablate(selection_of(model, share=0.9), 0.3).placed(skip_special=True)
    residual_scale(model)  # known from here on: a text is run to measure it
    changed = []
    for cache in (True, False):
        with watching(model, POST[0]) as before, act.on(model), watching(model, POST[0]) as after:
            decode(model, tokens, 4, cache=cache)
        places = [(a != b).any(-1) for a, b in zip(before, after, strict=True)]
        changed.append(torch.cat(places, 1) if cache else places[-1])
    assert torch.equal(*changed)
    assert changed[0][:, :4].tolist() == [[False, True, False, True], [False, False, False, False]]


@pytest.mark.parametrize("counted", [True, False])
def test_the_usual_norms_are_of_the_model_alone_and_measured_anew_when_its_weights_change(counted: bool) -> None:
    model = tiny.build("llama", tokenizer=tiny.speaking("llama").tokenizer)
    state = torch.get_rng_state()
    first = residual_scale(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert residual_scale(model) is first
    weight = model.original_model.get_input_embeddings().weight
    with torch.no_grad():
        (weight if counted else weight.data).mul_(3)  # PyTorch does not count what is written through `.data`
    again = residual_scale(model)
    assert again[0] == pytest.approx(3 * first[0], rel=1e-4)
    assert len(first) == tiny.LAYERS


def test_the_usual_norms_are_those_without_what_acts_now() -> None:
    plain = residual_scale(tiny.build("llama"))
    model = tiny.build("llama")
    embeds = Ablate(random_selection({Site(0, "resid"): (32,)}, share=2.0), 1e4)
    update = Delta({Matrix(0, "W_out"): Update(torch.full(matrix_shape(model, 0, "W_out"), 100.0))})
    with (embeds + update).on(model), adjust_of(model).on(model) as live:
        before = tiny.logits(model)
        assert residual_scale(model) == plain
        assert torch.equal(tiny.logits(model), before)
        assert live.rows is not None


@pytest.mark.parametrize("at", PLACES)
def test_statistics_inside_a_block_are_those_of_the_prompts_and_answers_of_a_corpus(at: str) -> None:
    name = "llama"
    model, plain = tiny.model(name), tiny.hugging_face(name)
    corpus = tiny.corpus((7, 9, 4)).with_prompts()
    chosen = NeuronMap({POST[0]: selection_of(model, share=0.5)[POST[0]]})
    ends = {int(row): int(end) for batch in corpus.batches(1) for row, end in zip(batch.rows, batch.prompt_ends)}
    expected = []
    for row in range(corpus.n_rows):
        begin, end = int(corpus.starts[row]), int(corpus.starts[row + 1])
        tokens = corpus.tokens[begin:end].long()[None]
        where = PLACES[at](torch.arange(end - begin), ends[row])[None]
        with masked(plain, name, chosen, where):
            seen = tiny.plain_activations(plain, name, ["mlp.post"], tokens)[POST[1]]
        expected.append(seen[0][corpus.counted[begin:end]])
    with Ablate(chosen).on(model, at=at):
        got = collect(model, corpus, POST[1], batch_size=2, progress=False)
    torch.testing.assert_close(got.mean[POST[1]].float(), torch.cat(expected).mean(0), rtol=1e-4, atol=1e-5)


def test_the_first_token_behind_bos_is_no_sink_also_where_padding_is_bos() -> None:
    model = tiny.speaking("gpt2")
    tokenizer, act = model.tokenizer, Ablate(selection_of(model, share=0.9), 0.3).placed(skip_special=True)
    pad_token = tokenizer.pad_token
    try:
        tokenizer.pad_token = tokenizer.bos_token
        tokens = torch.tensor([[0, 40, 41, 42], [40, 41, 42, 43], [0, 0, 40, 41]])
        moved = acted_on(model, act, tokens)
    finally:
        tokenizer.pad_token = pad_token
    assert moved.tolist() == [[False, True, True, True], [False, True, True, True], [False, False, True, True]]


# --- files and refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [None, "prompt", "generated", "last"])
def test_a_place_is_saved_with_what_acts_there(at: str | None, tmp_path: Path) -> None:
    model, tokens = tiny.speaking("llama"), torch.tensor([[0, 40, 41]])
    inner = Ablate(selection_of(model)) + one("llama", "rows").placed("prompt")
    act = inner.placed(at, skip_special=True, sink_ratio=7)
    act.save(tmp_path / "a.safetensors", model)
    again = load_intervention(tmp_path / "a.safetensors", model)
    assert isinstance(again, Placed)
    assert repr(again) == repr(act)
    assert (again.place.at, again.place.skip_special, again.place.sink_ratio) == (at, True, 7.0)
    for cache in (True, False):
        with act.on(model):
            expected = decode(model, tokens, 4, cache=cache)
        with again.on(model):
            assert torch.equal(decode(model, tokens, 4, cache=cache), expected)


def test_what_makes_no_sense_is_refused_in_one_sentence(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    prune = Ablate(selection_of(model))
    with pytest.raises(SelectionError, match="at='answer' is no place in a text: choose from prompt, generated, last"):
        prune.placed("answer")
    for at in (mask := torch.ones(2, 3).bool().numpy(), mask.tolist(), 3, "x" * 500):
        with pytest.raises(SelectionError, match="is no place in a text") as caught:
            prune.placed(at)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 200
    for mask in (torch.ones(2, 3), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(SelectionError, match="give booleans for batch and position"):
            prune.placed(mask)
    for ratio in (0.0, 1.0, float("nan"), float("inf"), -3):
        with pytest.raises(SelectionError, match="give a number above 1"):
            prune.placed(skip_special=True, sink_ratio=ratio)
    with pytest.raises(SelectionError, match="True or False"):
        prune.placed(skip_special=3)  # type: ignore[arg-type]
    abstain = Abstain({POST[1]: box_around_half(model, POST[1])})
    for act in (abstain, prune + abstain):
        with pytest.raises(SelectionError, match="abstains, which is decided on whole prompts"):
            act.placed("prompt")
        with pytest.raises(SelectionError, match="abstains"), act.on(model, at="last"):
            pass
    masked_one = prune.placed(torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(SelectionError, match="a mask belongs to one batch of tokens and is not saved"):
        masked_one.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(SelectionError, match="is no change of weights"):
        prune.placed("prompt").merge_into(tiny.hugging_face("gpt2"), model)
    with (
        prune.on(model, at="prompt"),
        pytest.raises(LensUnlearnError, match="needs token ids: run the model on tokens"),
    ):
        run(model, torch.ones(1, 3, 32))


def test_it_says_what_it_is() -> None:
    model = tiny.model("gpt2")
    prune = Ablate(selection_of(model))
    act = prune.placed("generated", skip_special=True)
    assert repr(act) == f'Placed({prune!r}, at "generated", not at special tokens and sinks (10 x))'
    assert repr(prune.placed(torch.ones(1, 2, dtype=torch.bool))).endswith("at a mask)")
    first = next(iter(prune.describe()))
    assert act.describe()[first] == f'{prune.describe()[first]}, at "generated", not at special tokens and sinks (10 x)'
