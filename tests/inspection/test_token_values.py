"""Inspecting texts: the values at each token are those of plain PyTorch, and a neuron's top examples those of a full cache."""

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from faults_helpers import run_matrix
from hypothesis import given
from hypothesis import strategies as st
from interventions_helpers import final, selection_of, unchanged
from torch import Tensor

import lens_unlearn as lu
from lens_unlearn.core.errors import (
    ActivationError,
    CorpusError,
    EmptyStatisticError,
    LensUnlearnError,
    ModelError,
    SelectionError,
    SiteError,
)
from lens_unlearn.evaluation.generation import generate
from lens_unlearn.inspection.generations import generations
from lens_unlearn.inspection.shown import pieces
from lens_unlearn.inspection.token_values import token_activations, token_firing, token_losses
from lens_unlearn.inspection.top_examples import top_examples
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.top_tokens import TopTokens

POST, Z = Site(1, "mlp.post"), Site(0, "attn.z")
TEXT = "def add(a, b):\n    return a + b\n"
LENGTHS = (9, 3, 14, 5, 6, 11)


def rows_of(corpus: Any) -> list[Tensor]:
    return [corpus.row(row) for row in range(corpus.n_rows)]


def plain_losses(plain: Any, corpus: Any) -> list[Tensor]:
    """The loss of every token but the first, by PyTorch's own cross entropy, one row at a time."""
    losses = []
    for row in rows_of(corpus):
        with torch.no_grad():
            logits = plain(row[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="none"))
    return losses


# --- activations -------------------------------------------------------------------------------------------------------


def test_activations_are_those_that_plain_hooks_see(dense: str) -> None:
    corpus, plain = tiny.corpus(LENGTHS), tiny.hugging_face(dense)
    d_head, model = tiny.ARCHITECTURES[dense].d_head, tiny.model(dense)
    with unchanged(model):
        found = token_activations(model, corpus, ["L1.mlp.post[17]", "L0.attn.z[2,5]"])
    assert found.names == ("L1.mlp.post[17]", "L0.attn.z[2,5]")
    assert len(found.texts) == corpus.n_rows
    for row, text in zip(rows_of(corpus), found.texts, strict=True):
        seen = tiny.plain_activations(plain, dense, ["mlp.post", "attn.z"], row[None])
        expected = torch.stack([seen[POST][0, :, 17], seen[Z][0, :, 2, 5]])
        assert torch.equal(text.ids, row)
        assert bool(text.values[:, 0].isnan().all()), "BOS has no value"
        torch.testing.assert_close(text.values[:, 1:].float(), expected[:, 1:], rtol=1e-4, atol=3e-6)
    flat = token_activations(model, corpus, ("L0.attn.z", 2 * d_head + 5))
    assert flat.names == ("L0.attn.z[2,5]",)
    assert torch.equal(flat.texts[3].values[0, 1:], found.texts[3].values[1, 1:])


def test_a_neuron_can_be_named_in_several_ways() -> None:
    model, corpus = tiny.model("llama"), tiny.corpus((5,))
    masks = {POST: torch.zeros(64, dtype=torch.bool), Z: torch.zeros(4, 8, dtype=torch.bool)}
    masks[POST][7], masks[Z][1, 2] = True, True
    z, post = "L0.attn.z[1,2]", "L1.mlp.post[7]"
    ways: list[Any] = [
        [z, post],
        [" L0.attn.z[1, 2] ", "L1.mlp.post[7]"],
        [("L0.attn.z", (1, 2)), (POST, 7)],
        [(Z, 10), ("L1.mlp.post", 7)],
        NeuronMap(masks),
        [z, z, post],
    ]
    first = token_activations(model, corpus, ways[0])
    assert first.names == (z, post)
    for way in ways[1:]:
        found = token_activations(model, corpus, way)
        assert found.names == first.names
        assert torch.equal(found.texts[0].values.nan_to_num(), first.texts[0].values.nan_to_num())
    assert (
        token_activations(model, corpus, z).names == token_activations(model, corpus, ("L0.attn.z", 10)).names == (z,)
    )


def test_inside_a_block_activations_are_those_with_the_intervention(model: Any) -> None:
    masks = {POST: torch.zeros(64, dtype=torch.bool)}
    masks[POST][7] = True
    with Ablate(NeuronMap(masks), 0.25).on(model):
        found = token_activations(model, TEXT, "L1.mlp.post[7]")
    assert torch.equal(found.texts[0].values[0, 1:], torch.full((len(found.texts[0].ids) - 1,), 0.25).double())


def test_a_long_text_is_cut_into_rows_that_begin_anew(model: Any) -> None:
    found = token_activations(model, "the quick brown fox " * 40, "L1.mlp.post[7]")
    assert len(found.texts) > 1
    assert all(len(text.ids) <= tiny.CONTEXT for text in found.texts)
    assert all(int(text.ids[0]) == tiny.BOS for text in found.texts)
    assert [text.name for text in found.texts][:2] == [f"document 0, part {i} of {len(found.texts)}" for i in (1, 2)]
    joined = "".join("".join(text.tokens[1:]) for text in found.texts)
    assert joined == "the quick brown fox " * 40


def test_the_frame_has_a_row_per_token(model: Any) -> None:
    found = token_activations(model, [TEXT, "the quick"], ["L1.mlp.post[7]", "L0.mlp.post[1]"])
    frame = found.to_frame()
    assert list(frame.columns) == ["text", "document", "position", "id", "token", "counted", *found.names]
    assert len(frame) == sum(len(text.ids) for text in found.texts)
    assert "".join(frame["token"][(frame["text"] == 0) & frame["counted"]]) == TEXT
    second = frame[frame["text"] == 1]
    assert second["position"].tolist() == list(range(len(second)))
    assert second["L0.mlp.post[1]"].tolist()[1:] == found.texts[1].values[1, 1:].tolist()
    assert (
        repr(found)
        == f"TokenValues(Activation of 2 neurons: L1.mlp.post[7], L0.mlp.post[1]; {len(frame)} tokens in 2 texts)"
    )


# --- losses ------------------------------------------------------------------------------------------------------------


def test_losses_are_the_cross_entropy_of_the_plain_and_of_the_edited_model(dense: str) -> None:
    corpus, model = tiny.corpus(LENGTHS), tiny.model(dense)
    prune = Ablate(selection_of(model, "mlp.post"))
    edited = tiny.hugging_face(dense)
    for site, chosen in prune.selection.items():
        tiny.zero_rows(edited, dense, site, chosen)
    with unchanged(model):
        found = token_losses(model, corpus, {"pruned": prune, "same": None}, progress=False)
    assert found.names == ("base", "pruned", "same", "pruned - base", "same - base")
    assert found.shown == ("pruned - base", "same - base")
    base, pruned = plain_losses(tiny.hugging_face(dense), corpus), plain_losses(edited, corpus)
    for text, before, after in zip(found.texts, base, pruned, strict=True):
        assert bool(text.values[:, 0].isnan().all()), "nothing predicts the first token"
        values = text.values[:, 1:]
        torch.testing.assert_close(values[0].float(), before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values[1].float(), after, rtol=1e-4, atol=1e-4)
        assert torch.equal(values[3], values[1] - values[0])
        assert torch.equal(values[4], torch.zeros_like(values[4])), "bitwise"
        assert bool((values[3] != 0).any())


def test_without_bos_the_first_token_has_no_loss_and_prompts_have_none() -> None:
    corpus = tiny.corpus(LENGTHS, bos=False, uncounted=0.3)
    found = token_losses(tiny.model("gpt2"), corpus, progress=False)
    assert found.shown == ("base",)
    for row, text in enumerate(found.texts):
        counted = corpus.counted[corpus.starts[row] : corpus.starts[row + 1]]
        assert torch.equal(text.counted, counted)
        expected = counted.clone()
        expected[0] = False
        assert torch.equal(~text.values[0].isnan(), expected)
    shown = token_activations(tiny.model("gpt2"), corpus, "L0.mlp.post[0]")
    assert not any(bool(text.values.isnan().any()) for text in shown.texts), "activations are there all the same"


def test_the_mean_over_counted_tokens_is_the_loss_of_evaluate() -> None:
    model, corpus = tiny.model("llama"), tiny.corpus(LENGTHS, uncounted=0.3)
    prune = Ablate(selection_of(model))
    frame = token_losses(model, corpus, {"pruned": prune}, batch_size=2, progress=False).to_frame()
    report = lu.evaluate(model, {"a": corpus}, {"pruned": prune}, resamples=2, progress=False)
    for name in ("base", "pruned"):
        assert frame[name][frame["counted"]].mean() == pytest.approx(report[name, "a", "loss"].value, rel=1e-6)


# --- where a selection fires --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_firing_counts_the_selected_neurons_above_the_threshold(name: str) -> None:
    corpus, model = tiny.corpus(LENGTHS), tiny.model(name)
    chosen = selection_of(model, ["mlp.post", "attn.z"])
    counts = token_firing(model, corpus, chosen, threshold=0.05)
    means = token_firing(model, corpus, chosen, measure="mean_abs")
    plain = tiny.hugging_face(name)
    for row, count, mean in zip(rows_of(corpus), counts.texts, means.texts, strict=True):
        seen = tiny.plain_activations(plain, name, ["mlp.post", "attn.z"], row[None])
        values = torch.cat([seen[site][0][:, mask] for site, mask in chosen.items()], dim=1)
        assert count.values[0, 1:].tolist() == (values > 0.05).sum(1).tolist()[1:]
        torch.testing.assert_close(mean.values[0, 1:].float(), values.abs().mean(1)[1:], rtol=1e-4, atol=3e-6)
        assert math.isnan(float(count.values[0, 0]))
    assert counts.unit == f"of {chosen.count()} neurons above 0.05"
    assert counts.signed == (False,)
    with pytest.raises(LensUnlearnError, match="choose 'count' or 'mean_abs'"):
        token_firing(model, corpus, chosen, measure="sum")  # type: ignore[arg-type]


# --- top tokens --------------------------------------------------------------------------------------------------------


def brute(
    values: Tensor, ids: Sequence[tuple[int, int]], k: int, *, by: str = "max", per_document: bool = False
) -> list[list[tuple[float, int, int]]]:
    """Sort everything, neuron by neuron, in plain Python."""
    strength = {"max": lambda v: v, "min": lambda v: -v, "abs": abs}[by]
    tops = []
    for column in values.flatten(1).unbind(1):
        everything = sorted((-strength(v), d, p, v) for v, (d, p) in zip(column.tolist(), ids, strict=True))
        kept: list[tuple[float, int, int]] = []
        seen: set[object] = set()
        for _, document, place, value in everything:
            if (document if per_document else (document, place)) not in seen:
                seen.add(document if per_document else (document, place))
                kept.append((value, document, place))
        tops.append(kept[:k])
    return tops


def found_in(statistic: TopTokens, site: Site) -> list[list[tuple[float, int, int]]]:
    tops = statistic[site]
    columns = zip(*(getattr(tops, part).unbind(1) for part in ("values", "documents", "places")), strict=True)
    return [[one for one in zip(*(c.tolist() for c in column), strict=True) if one[0] == one[0]] for column in columns]


def filled(
    statistic: TopTokens, values: Tensor, ids: Sequence[tuple[int, int]], weight: Tensor | None = None
) -> TopTokens:
    made = statistic.fresh()
    made.locate(torch.tensor([d for d, _ in ids]), torch.tensor([p for _, p in ids]))
    made.update(POST, values, torch.ones(len(values)) if weight is None else weight)
    return made


@given(
    st.integers(0, 2**31),
    st.integers(1, 6),
    st.sampled_from(["max", "min", "abs"]),
    st.booleans(),
    st.sampled_from([(3,), (2, 2)]),
)
def test_the_top_tokens_are_those_of_sorting_everything_whatever_the_parts(
    seed: int, k: int, by: Any, per_document: bool, shape: tuple[int, ...]
) -> None:
    """Few distinct values, so that there are ties; few documents; some tokens stand there twice."""
    draw = random.Random(seed)
    ids = [(draw.randrange(-3, 3), draw.randrange(-9, 9)) for _ in range(draw.randrange(1, 25))]
    by_id: dict[tuple[int, int], Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    for one in ids:
        by_id.setdefault(one, torch.randint(-2, 3, shape, generator=generator).float() / 2)
    values = torch.stack([by_id[one] for one in ids]) * torch.tensor([-0.0, 1.0])[torch.tensor(draw.randrange(2))]
    empty = TopTokens(k, by=by, per_document=per_document)
    expected = brute(values + 0.0, ids, k, by=by, per_document=per_document)
    whole = filled(empty, values, ids)
    assert found_in(whole, POST) == expected
    order = draw.sample(range(len(ids)), len(ids))
    cut = sorted(draw.sample(range(len(ids) + 1), min(2, len(ids))))
    parts = [order[a:b] for a, b in zip([0, *cut], [*cut, len(ids)], strict=True)]
    pieces = [filled(empty, values[part], [ids[i] for i in part]) for part in parts if part]
    merged = empty.fresh()
    for piece in pieces:
        merged = merged.merge(piece)
    assert found_in(merged, POST) == expected
    right = empty.fresh()
    for piece in reversed(pieces):
        right = piece.merge(right)
    assert found_in(right, POST) == expected
    assert found_in(merged.merge(whole), POST) == expected, "what is there already is not there twice"
    again = empty.with_state(merged.state())
    assert found_in(again, POST) == expected


def test_uncounted_tokens_do_not_enter_even_if_they_are_broken() -> None:
    values = torch.tensor([[5.0, math.nan], [1.0, 2.0], [3.0, math.inf]])
    ids = [(0, 0), (0, 1), (0, 2)]
    made = filled(TopTokens(3), values, ids, torch.tensor([0.0, 1.0, 0.0]))
    assert found_in(made, POST) == [[(1.0, 0, 1)], [(2.0, 0, 1)]]
    nothing = filled(TopTokens(3), values, ids, torch.zeros(3))
    with pytest.raises(EmptyStatisticError, match=r"no top tokens of L1\.mlp\.post"):
        nothing[POST]
    with pytest.raises(ActivationError, match=r"L1\.mlp\.post\[1\] is inf at a counted token"):
        filled(TopTokens(3), values, ids, torch.tensor([0.0, 1.0, 1.0]))


def test_statistics_of_other_settings_do_not_merge_and_differ_by_name() -> None:
    chosen = NeuronMap({POST: torch.tensor([True, False])})
    other = NeuronMap({POST: torch.tensor([False, True])})
    kinds = [
        TopTokens(3),
        TopTokens(4),
        TopTokens(3, by="abs"),
        TopTokens(3, per_document=True),
        TopTokens(3, among=chosen),
        TopTokens(3, among=other),
    ]
    assert len({repr(one) for one in kinds}) == len(kinds), "a checkpoint knows them apart by this"
    for one in kinds[1:]:
        with pytest.raises(LensUnlearnError, match="do not merge"):
            kinds[0].merge(one)
    made = filled(kinds[4], torch.tensor([[1.0, 9.0]]), [(0, 0)])
    assert found_in(made, POST) == [[(1.0, 0, 0)]]
    with pytest.raises(SelectionError, match="the selection has shape"):
        filled(kinds[4], torch.tensor([[1.0, 9.0, 3.0]]), [(0, 0)])
    for wrong in (torch.zeros(9, 2), torch.zeros(2)):
        state = {"L1.mlp.post.values": wrong, "L1.mlp.post.documents": wrong, "L1.mlp.post.places": wrong}
        with pytest.raises(LensUnlearnError, match="do not hold the top 3 tokens"):
            TopTokens(3).with_state(state)
    with pytest.raises(LensUnlearnError, match=r"call locate\(\) with .* of these 1 tokens first"):
        TopTokens(3).update(POST, torch.ones(1, 2), torch.ones(1))
    with pytest.raises(LensUnlearnError, match="keeps no token"):
        TopTokens(0)
    with pytest.raises(LensUnlearnError, match="choose 'max', 'min' or 'abs'"):
        TopTokens(3, by="mean")  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="a boolean map"):
        TopTokens(3, among=NeuronMap({POST: torch.ones(2)}))


def test_many_neurons_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values, ids = torch.randn(20, 33, generator=torch.Generator().manual_seed(0)), [(i % 4, i) for i in range(20)]
    whole = filled(TopTokens(4), values, ids)
    monkeypatch.setattr("lens_unlearn.neurons.top_tokens._TILE", 100)
    assert found_in(filled(TopTokens(4), values, ids), POST) == found_in(whole, POST) == brute(values, ids, 4)


def cached(name: str, corpus: Any, kind: str) -> tuple[dict[Site, Tensor], list[tuple[int, int]]]:
    """Every counted activation, and where it is: (row, position)."""
    plain, values, ids = tiny.hugging_face(name), {}, []
    for row in range(corpus.n_rows):
        counted = corpus.counted[corpus.starts[row] : corpus.starts[row + 1]]
        for site, value in tiny.plain_activations(plain, name, [kind], corpus.row(row)[None]).items():
            values.setdefault(site, []).append(value[0][counted])
        ids += [(row, position) for position in counted.nonzero()[:, 0].tolist()]
    return {site: torch.cat(parts) for site, parts in values.items()}, ids


@pytest.mark.parametrize("per_document", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_top_examples_are_those_of_a_full_cache(name: str, per_document: bool) -> None:
    corpus, model = tiny.corpus((9, 3, 14, 5, 1, 6, 11), uncounted=0.2), tiny.model(name)
    values, ids = cached(name, corpus, "mlp.post")
    names = ["L1.mlp.post[3]", "L0.mlp.post[40]", "L1.mlp.post[63]"]
    for by in ("max", "min", "abs"):
        options = {"k": 4, "context": 2, "by": by, "per_document": per_document, "progress": False}
        with unchanged(model):
            found = top_examples(model, corpus, names, **options)
        one = top_examples(model, corpus, names, batch_size=1, **options)
        assert found.to_frame().drop(columns="value").equals(one.to_frame().drop(columns="value"))
        assert list(found.examples) == names
        for neuron, examples in found.examples.items():
            site, index = Site.parse(neuron[: neuron.index("[")]), int(neuron[neuron.index("[") + 1 : -1])
            [expected] = brute(values[site][:, [index]], ids, 4, by=by, per_document=per_document)
            assert [(e.document, e.position) for e in examples] == [(row, position) for _, row, position in expected]
            assert [e.value for e in examples] == pytest.approx([value for value, _, _ in expected], rel=1e-4, abs=3e-6)


def test_the_context_is_the_text_around_with_its_activations() -> None:
    corpus, model = tiny.corpus((9, 14, 5)), tiny.model("llama")
    found = top_examples(model, corpus, "L1.mlp.post[3]", k=30, context=3, per_document=False, progress=False)
    examples = found.examples["L1.mlp.post[3]"]
    assert len(examples) == 28, "all tokens that count"
    plain = tiny.hugging_face("llama")
    for one in examples:
        row = corpus.row(one.document)
        start, end = max(1, one.position - 3), min(len(row), one.position + 4)
        seen = tiny.plain_activations(plain, "llama", ["mlp.post"], row[None])[POST][0, :, 3]
        torch.testing.assert_close(one.values, seen[start:end], rtol=1e-4, atol=3e-6)
        assert one.tokens == tuple(f"‹{token}›" for token in row[start:end].tolist())
        assert float(one.values[one.mark]) == pytest.approx(one.value, rel=1e-5, abs=1e-6)
        assert one.position == start + one.mark
        assert (one.begins, one.ends) == (start == 1, end == len(row))
    alone = top_examples(model, corpus, "L1.mlp.post[3]", k=1, context=0, progress=False)
    assert len(alone.examples["L1.mlp.post[3]"][0].tokens) == 1
    with pytest.raises(LensUnlearnError, match="context=-1"):
        top_examples(model, corpus, "L1.mlp.post[3]", context=-1, progress=False)


def test_ties_and_repeated_documents_come_out_the_same_at_every_batch_size(model: Any) -> None:
    """Ablated to one value, every token ties; a document that stands there twice is one."""
    texts = ["the quick brown fox", "def add(a, b):", "the quick brown fox", "1 + 2 = 3", "jumps over the lazy dog"]
    corpus = lu.read_corpus(texts, model)
    masks = NeuronMap({POST: torch.ones(64, dtype=torch.bool)})
    with Ablate(masks, 0.5).on(model):
        frames = [
            top_examples(model, corpus, "L1.mlp.post[3]", k=6, batch_size=size, progress=False).to_frame()
            for size in (1, 2, 8)
        ]
        backwards = top_examples(
            model, lu.read_corpus(texts[::-1], model), "L1.mlp.post[3]", k=6, progress=False
        ).to_frame()
    assert all(frame.equals(frames[0]) for frame in frames[1:])
    assert len(frames[0]) == 4
    assert set(frames[0]["value"]) == {0.5}
    assert backwards["context"].tolist() == frames[0]["context"].tolist()
    assert frames[0]["document"].tolist().count(2) == 0, "the first of the two is named"


def test_all_neurons_of_a_model_at_once_and_a_run_that_is_resumed(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, corpus = tiny.model("gpt2"), tiny.corpus((9, 3, 14, 5, 6, 11))
    values, ids = cached("gpt2", corpus, "attn.z")
    options = {"statistic": TopTokens(3), "batch_size": 1, "progress": False}
    whole = collect(model, corpus, ("attn.z",), **options)
    for site, value in values.items():
        expected = brute(value, ids, 3)
        for neuron, column in enumerate(found_in(whole, site)):
            assert [one[0] for one in column] == pytest.approx([one[0] for one in expected[neuron]], rel=1e-4, abs=3e-6)
    real, calls = TopTokens.update, []

    def failing(self: TopTokens, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        real(self, *args)

    path = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(TopTokens, "update", failing)
        with pytest.raises(KeyboardInterrupt):
            collect(model, corpus, ("attn.z",), checkpoint=path, **options)
    resumed = collect(model, corpus, ("attn.z",), checkpoint=path, **options)
    for site in values:
        assert found_in(resumed, site) == found_in(whole, site)
    assert resumed.provenance["tokens"] == corpus.n_tokens


def test_top_examples_show_themselves(model: Any) -> None:
    corpus = lu.read_corpus(tiny.TEXTS, model)
    found = top_examples(model, corpus, ["L1.mlp.post[3]", "L0.attn.z[1,2]"], k=2, context=4, progress=False)
    frame = found.to_frame()
    assert list(frame.columns) == ["neuron", "rank", "value", "document", "position", "token", "context"]
    assert frame["neuron"].tolist() == ["L1.mlp.post[3]"] * 2 + ["L0.attn.z[1,2]"] * 2
    for one in frame.itertuples():
        assert one.context in tiny.TEXTS[one.document]
        assert one.token in one.context
    assert repr(found) == "TopExamples(4 of 2 neurons)"
    assert list(found["L0.attn.z[1,2]"].examples) == ["L0.attn.z[1,2]"]
    with pytest.raises(SelectionError, match="no example of 'L9"):
        found["L9.mlp.post[0]"]


# --- generations -------------------------------------------------------------------------------------------------------


def test_generations_are_those_of_generate_side_by_side(model: Any) -> None:
    prompts = ["def add(a, b):", "the quick"]
    prune = Ablate(selection_of(model))
    with unchanged(model):
        found = generations(model, prompts, {"pruned": prune, "same": None}, max_new_tokens=6)
    assert list(found.written) == ["base", "pruned", "same"]
    assert list(found.written["base"]) == generate(model, prompts, max_new_tokens=6)
    assert list(found.written["pruned"]) == generate(model, prompts, intervention=prune, max_new_tokens=6)
    assert found.written["same"] == found.written["base"]
    frame = found.to_frame()
    assert list(frame.columns) == ["prompt", "condition", "text"]
    assert frame["condition"].tolist() == ["base", "pruned", "same"] * 2
    assert frame["text"].tolist()[1] == found.written["pruned"][0]
    assert repr(found) == "Generations(2 prompts: base, pruned, same)"
    assert list(generations(model, "the", {"base": None}, max_new_tokens=1).written) == ["base"]
    drawn = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}
    assert list(generations(model, prompts, {}, **drawn).written["base"]) == generate(model, prompts, **drawn)


# --- tokens as text ----------------------------------------------------------------------------------------------------


@given(st.text(alphabet=st.sampled_from("ab .\n\t<é🙂日👩\u200d💻\ufffdß"), min_size=1, max_size=12))
def test_the_pieces_are_the_text(loaded: Any, text: str) -> None:
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(loaded, [tiny.BOS, *ids], bos=True)
    assert len(found) == len(ids) + 1
    assert found[0] == "<bos>"
    assert "".join(found[1:]) == text
    assert found[1:] == pieces(loaded, ids, bos=False)


def test_the_last_token_of_a_character_has_it(model: Any) -> None:
    ids = model.tokenizer("a🙂b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6, "an emoji is four bytes, and this tokenizer has learned no more of it"
    assert pieces(model, ids, bos=False) == ["a", "", "", "", "🙂", "b"]
    broken = pieces(model, [ids[1], ids[0]], bos=False)
    assert "".join(broken) == "\ufffda", "bytes that are no character stay in one place"
    assert "".join(pieces(model, ids[:3], bos=False)).endswith("\ufffd")
    assert len(pieces(model, [ids[1]] * 50, bos=False)) == 50


def test_spaces_between_words_survive_a_tokenizer_that_keeps_them_in_front_of_words(tmp_path: Any) -> None:
    """As Llama's does: decoding a single token loses its space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁the", "▁quick", "ly", "▁", *(f"<0x{i:02X}>" for i in range(256))]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )

    class Speaking:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)

    emoji = [words.index(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    ids = [1, 2, 3, 4, *emoji, 1]
    assert Speaking.tokenizer.decode(ids) == "the quickly 🙂 the"
    assert pieces(Speaking, ids, bos=False) == ["the", " quick", "ly", " ", "", "", "", "🙂", " the"]


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("neurons", "error", "says"),
    [
        ("L1.mlp.post[64]", SelectionError, r"there is no L1\.mlp\.post\[64\]: that site has neurons 0 to 63"),
        (("L1.mlp.post", -1), SelectionError, r"there is no L1\.mlp\.post\[-1\]"),
        ("L0.attn.z[4,0]", SelectionError, r"neurons 0 to 31, or \[head, place\] of \(4, 8\)"),
        ("L0.attn.z[32]", SelectionError, r"there is no L0\.attn\.z\[32\]"),
        ("L1.mlp.post[1,2]", SelectionError, r"there is no L1\.mlp\.post\[1,2\]"),
        ("L1.mlp.post", SelectionError, "names no neuron: write it as"),
        ([], SelectionError, "no neuron was named"),
        ("L9.mlp.post[0]", SiteError, "its layers are 0 to 1"),
        ("L0.mlp.pots[0]", SiteError, "did you mean"),
        ("L0.mlp.pre_linear[0]", SiteError, "does not exist in this model"),
        (NeuronMap({POST: torch.zeros(64, dtype=torch.bool)}), SelectionError, "the selection is empty"),
        (NeuronMap({POST: torch.ones(64)}), SelectionError, "a boolean map is needed"),
        (NeuronMap({POST: torch.ones(65, dtype=torch.bool)}), SelectionError, r"shape \(65,\), and the model \(64,\)"),
    ],
    ids=str,
)
def test_neurons_that_are_not_there_are_refused_in_one_sentence(
    model: Any, neurons: Any, error: type[Exception], says: str
) -> None:
    corpus = tiny.corpus((5,))
    for look in (
        lambda: token_activations(model, TEXT, neurons),
        lambda: token_firing(model, TEXT, neurons),
        lambda: top_examples(model, corpus, neurons, progress=False),
    ):
        with pytest.raises(error, match=says) as caught:
            look()
        assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the text is empty"),
        ("  \n", "the text is empty"),
        (["the quick", ""], "text 1 is empty"),
        ([], "there is no text"),
        ([3], "text 0 is empty"),
    ],
)
def test_empty_texts_are_refused(model: Any, text: Any, says: str) -> None:
    for look in (lambda: token_activations(model, text, "L0.mlp.post[0]"), lambda: token_losses(model, text)):
        with pytest.raises(CorpusError, match=says):
            look()


def test_what_else_cannot_be_looked_at_is_refused(model: Any) -> None:
    with pytest.raises(LensUnlearnError, match="'base' is the model without any of them"):
        token_losses(model, TEXT, {"base": Ablate(selection_of(model))})
    with pytest.raises(LensUnlearnError, match="'a' is no intervention"):
        generations(model, "the", {"a": 3})  # type: ignore[dict-item]
    with pytest.raises(CorpusError, match="prompt 1 is empty"):
        generations(model, ["the", ""], {})
    with pytest.raises(CorpusError, match="there is no prompt"):
        generations(model, [], {})
    with pytest.raises(CorpusError, match="nothing in this text is predicted"):
        token_losses(tiny.model("gpt2"), tiny.corpus((1,), bos=False), progress=False)
    with pytest.raises(CorpusError, match="no tokenizer"):
        token_activations(tiny.model("gpt2"), TEXT, "L0.mlp.post[0]")
    with pytest.raises(CorpusError, match="shorter than two tokens"):
        token_activations(model, ["the quick", "a"], "L0.mlp.post[0]", prepend_bos=False)
    training = tiny.build("gpt2")
    training.train()
    for look in (
        lambda: token_activations(training, tiny.corpus((5,)), "L0.mlp.post[0]"),
        lambda: token_losses(training, tiny.corpus((5,)), progress=False),
    ):
        with pytest.raises(ModelError, match="training mode"):
            look()


def test_broken_activations_and_losses_are_named() -> None:
    broken = tiny.build("gpt2")
    masks = {POST: torch.zeros(64, dtype=torch.bool)}
    masks[POST][5] = True
    corpus = tiny.corpus((5,))
    hook = broken.hook_dict["blocks.1.mlp.hook_post"]

    def spoil(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, 3:4, 5] = math.nan  # the probe is shorter
        return value

    hook.add_hook(spoil)
    with pytest.raises(ActivationError, match=r"L1\.mlp\.post\[5\] is nan at position 3"):
        token_activations(broken, corpus, ["L1.mlp.post[4]", "L1.mlp.post[5]"])
    with pytest.raises(ActivationError, match="look at it with token_activations"):
        token_firing(broken, corpus, NeuronMap(masks))
    with pytest.raises(ActivationError, match=r"L1\.mlp\.post\[5\] is nan at a counted token"):
        top_examples(broken, corpus, NeuronMap(masks), progress=False)
    with pytest.raises(ActivationError, match=r"logits are NaN or infinite: that begins in layer 1, at mlp\.hook_post"):
        token_losses(broken, corpus, progress=False)
    with pytest.raises(ActivationError, match="the loss under 'broken' is NaN"):
        token_losses(tiny.model("gpt2"), corpus, {"broken": final(math.nan)}, progress=False)


def look(model: Any) -> None:
    corpus = tiny.corpus((5, 6))
    with Ablate(selection_of(model, seed=1)).on(model):
        token_activations(model, corpus, ["L1.mlp.post[3]", "L0.attn.z[1,2]"])
        top_examples(model, corpus, "L1.mlp.post[3]", progress=False)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_when_the_nth_hook_cannot_be_added_none_stays(monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    assert run_matrix(monkeypatch, tiny.model("gpt2"), look, "add_hook", after=after, most=50) >= 4
