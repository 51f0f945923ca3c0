"""Laws, of interventions of every kind and of what is measured, for inputs that hypothesis makes up."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from interventions_helpers import FORMS, POST, Z, one, random_selection, unchanged
from positions_helpers import pad
from torch import Tensor

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.evaluation.evaluate import evaluate
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.interventions.base import Chain, Intervention
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.interventions.update import Update
from lens_unlearn.keyspace.regions import Box, Clusters, Contrast, Ellipsoid
from lens_unlearn.methods.controls import random_pruning
from lens_unlearn.model.matrices import Matrix
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.attribution import critical, critical_mask
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.histogram import Histogram
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.moments import Moments

pytestmark = pytest.mark.filterwarnings("ignore:.* know its model:UserWarning")  # most files here are of none

TOKENS = tiny.some_tokens(6, 7)
SHAPES: dict[Site, tuple[int, ...]] = {**dict.fromkeys(POST, (64,)), **dict.fromkeys(Z, (4, 8))}

forms = st.sampled_from(FORMS)
members = st.builds(lambda form, seed: one("gpt2", form, seed), forms, st.integers(0, 2))


def through(*nested: Intervention, tokens: Tensor = TOKENS) -> Tensor:
    """Run under blocks inside one another, the first outermost."""
    model = tiny.model("gpt2")
    with ExitStack() as stack:
        for intervention in nested:
            stack.enter_context(intervention.on(model))
        return tiny.logits(model, tokens)


def total(parts: Sequence[Intervention]) -> Intervention:
    return sum(parts, Chain(()))


# --- laws of composition, bitwise ------------------------------------------------------------------------------------------


@settings(max_examples=settings().max_examples * 2 // 3)
@given(st.lists(members, min_size=2, max_size=4), st.data())
def test_a_sum_is_nesting_however_it_is_cut(parts: list[Intervention], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(parts) - 1))))
    groups = [parts[a:b] for a, b in zip([0, *cuts], [*cuts, len(parts)], strict=True)]
    with unchanged(tiny.model("gpt2")):
        expected = through(total(parts))
        assert torch.equal(through(*parts), expected)
        assert torch.equal(through(*map(total, groups)), expected)


trees = st.recursive(members | st.just(Chain(())), lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


def leaves(tree: Any) -> list[Intervention]:
    return [leaf for branch in tree for leaf in leaves(branch)] if isinstance(tree, tuple) else [tree]


def added(tree: Any) -> Intervention:
    return total([added(branch) for branch in tree]) if isinstance(tree, tuple) else tree


def chained(tree: Any) -> Intervention:
    return Chain(tuple(chained(branch) for branch in tree)) if isinstance(tree, tuple) else tree


@given(trees)
def test_brackets_and_empty_chains_do_not_matter(tree: Any) -> None:
    flat = total(leaves(tree))
    expected = through(flat)
    for other in (added(tree), chained(tree), flat + Chain(()), Chain(()) + flat):
        assert torch.equal(through(other), expected)
    assert len(added(tree).members if isinstance(tree, tuple) else flat.members) == len(
        [leaf for leaf in leaves(tree) if leaf is not None and not (isinstance(leaf, Chain) and not leaf.members)]
    )


def places(intervention: Intervention) -> set[Any]:
    return {site for site, _ in intervention.hooks()} | {matrix for matrix, _ in intervention.matrices()}


@given(members, members)
def test_at_different_places_they_commute(a: Intervention, b: Intervention) -> None:
    assume(not places(a) & places(b))
    assert torch.equal(through(a + b), through(b + a))


@given(st.sampled_from(["zero", "mean", "heads", "abstain", "every token"]), st.integers(0, 2), members)
def test_what_is_idempotent_is_so_behind_anything(form: str, seed: int, before: Intervention) -> None:
    act = one("gpt2", form, seed)
    assert torch.equal(through(before + act + act), through(before + act))
    assert torch.equal(through(before, act, act), through(before + act))


kinds_of_value = st.sampled_from(["number", "map"])
selections = st.builds(
    lambda chosen, share, seed: random_selection({site: SHAPES[site] for site in chosen}, share, seed),
    st.lists(st.sampled_from(list(SHAPES)), min_size=1, max_size=3, unique=True),
    st.sampled_from([0.02, 0.3, 0.9, 2.0]),
    st.integers(0, 100),
).filter(lambda selection: selection.count() > 0)


def valued(selection: NeuronMap, seed: int) -> NeuronMap:
    generator = torch.Generator().manual_seed(seed)
    return selection.map(lambda mask: torch.randn(mask.shape, generator=generator))


def merged(first: NeuronMap, second: NeuronMap, choose: Any) -> NeuronMap:
    """Put two maps of different sites together: where both have a site, by a function of both."""
    both = {**dict(first.items()), **dict(second.items())}
    return NeuronMap(
        {site: choose(first[site], second[site]) if site in first and site in second else both[site] for site in both}
    )


@given(selections, selections, st.integers(0, 100), st.integers(0, 100))
def test_of_two_ablations_the_last_wins_and_the_rest_is_their_union(m: NeuronMap, n: NeuronMap, v: int, w: int) -> None:
    first, last = valued(m, v), valued(n, w)
    union = merged(m, n, torch.logical_or)
    values = {
        site: torch.where(n[site], last[site], first[site])
        if site in m and site in n
        else (last if site in n else first)[site]
        for site in union
    }
    chain = Ablate(m, first) + Ablate(n, last)
    assert torch.equal(through(chain), through(Ablate(union, NeuronMap(values))))


@given(selections, selections, st.integers(0, 100))
def test_at_other_neurons_of_one_site_they_commute(m: NeuronMap, n: NeuronMap, seed: int) -> None:
    rest = merged(m, n, lambda a, b: b & ~a)[list(n)]
    assume(rest.count() > 0)
    like = {name: valued(rest, seed + i) for i, name in enumerate(("forget_mean", "retain_mean"))}
    spread = {
        name: valued(rest, seed + i).map(lambda v: v.abs() + 0.1)
        for i, name in enumerate(("forget_std", "retain_std"), 2)
    }
    for other in (Ablate(rest, valued(rest, seed)), Adjust(rest, **like, **spread, rule="deterministic")):
        assert torch.equal(through(Ablate(m, 0.5) + other), through(other + Ablate(m, 0.5)))


# --- deltas add --------------------------------------------------------------------------------------------------------------

WIDTHS = {"W_Q": (32, 32), "W_O": (32, 32), "W_in": (32, 64), "W_out": (64, 32)}


@st.composite
def updates(draw: Any, shape: tuple[int, int], dtypes: Sequence[torch.dtype] = (torch.float32,)) -> Update:
    """An update of any form; of no rows, no columns and no rank too."""
    form, seed = draw(st.sampled_from(["dense", "rows", "columns", "rank"])), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    dtype, size = draw(st.sampled_from(list(dtypes))), draw(st.integers(0, 5))

    def noise(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.2).to(dtype)

    rows, columns = shape
    if form == "dense":
        return Update(noise(rows, columns))
    if form == "rank":
        return Update(noise(rows, size), right=noise(size, columns))
    index = torch.randperm(rows if form == "rows" else columns, generator=generator)[:size]
    return Update(noise(size, columns), rows=index) if form == "rows" else Update(noise(rows, size), columns=index)


@st.composite
def deltas(draw: Any) -> dict[Matrix, Update]:
    names = draw(st.lists(st.sampled_from(list(WIDTHS)), min_size=1, max_size=3, unique=True))
    made = {Matrix(draw(st.integers(0, 1)), name): draw(updates(WIDTHS[name])) for name in names}
    assume(any(update.value.numel() for update in made.values()))
    return made


@settings(max_examples=settings().max_examples * 2 // 3)
@given(deltas(), deltas())
def test_deltas_add_and_what_is_taken_off_again_is_nothing(a: dict[Matrix, Update], b: dict[Matrix, Update]) -> None:
    one_, other = Delta(a), Delta(b)
    dense = {m: u.dense(WIDTHS[m.name]) for m, u in a.items()}
    for matrix, update in b.items():
        dense[matrix] = dense.get(matrix, 0) + update.dense(WIDTHS[matrix.name])
    both = through(one_ + other)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(through(other + one_), both, **close)
    torch.testing.assert_close(through(Delta({m: Update(v) for m, v in dense.items()})), both, **close)
    torch.testing.assert_close(through(one_ + -one_), through(), **close)
    torch.testing.assert_close(through(0.5 * one_ + 0.5 * one_), through(one_), **close)
    assert torch.equal(through(one_.at(0)), through())
    assert torch.equal(through(other + one_.at(0)), through(other))


@given(
    deltas(),
    st.lists(
        st.sampled_from([f for f in FORMS if f not in ("rows", "columns", "dense", "rank")]), min_size=1, max_size=3
    ),
)
def test_a_delta_stands_behind_every_mask_wherever_it_is_in_the_chain(
    a: dict[Matrix, Update], others: list[str]
) -> None:
    delta, rest = Delta(a), [one("gpt2", form) for form in others]
    expected = through(delta, *rest)
    for place in range(len(rest) + 1):
        assert torch.equal(through(total([*rest[:place], delta, *rest[place:]])), expected)


# --- rows are for themselves ---------------------------------------------------------------------------------------------------

texts = st.lists(st.lists(st.integers(3, 300), min_size=1, max_size=7), min_size=1, max_size=4)


@given(
    texts,
    st.sampled_from(["left", "right"]),
    st.integers(0, 3),
    st.sampled_from([*FORMS, "all"]),
    st.randoms(use_true_random=False),
)
def test_a_row_is_what_it_is_alone_whatever_stands_beside_it(
    rows: Any, side: str, extra: int, form: str, order: Any
) -> None:
    model, act = tiny.speaking("gpt2"), one("gpt2", form)
    order.shuffle(rows)
    tokens, mask = pad(rows, side, extra)
    options = {} if side == "right" else {"attention_mask": mask}
    with act.on(model) as live, torch.no_grad():
        together = model(tokens, **options)
        abstained = live.abstained.tolist()
        for i, row in enumerate(rows):
            alone = model(torch.tensor([row]))
            assert not abstained or live.abstained.tolist() == abstained[i : i + 1]
            torch.testing.assert_close(together[i][mask[i].bool()], alone[0], rtol=1e-3, atol=1e-3)


def corpus_of(rows: Sequence[Sequence[int]], prompts: int = 0) -> Corpus:
    """A corpus of these rows, each a document known by its tokens; BOS and so many tokens behind it do not count."""
    sizes = torch.tensor([len(row) + 1 for row in rows])
    return replace(
        tiny.corpus((3,)),
        tokens=torch.tensor([t for row in rows for t in (tiny.BOS, *row)], dtype=torch.int32),
        counted=torch.cat([torch.arange(len(row) + 1) > min(prompts, len(row) - 1) for row in rows]),
        starts=torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]),
        document=torch.arange(len(rows)),
        keys=tuple(str(list(row)) for row in rows),
    )


documents = st.lists(
    st.lists(st.integers(3, 300), min_size=2, max_size=9).map(tuple), min_size=1, max_size=6, unique=True
)
shuffled = st.randoms(use_true_random=False)


def mixed(rows: Sequence[Any], order: Any) -> list[Any]:
    new = list(rows)
    order.shuffle(new)
    return new


@settings(max_examples=settings().max_examples // 2)
@given(documents, shuffled, st.integers(1, 4), st.sampled_from([*FORMS, "all"]))
def test_an_evaluation_does_not_depend_on_order_or_batches(rows: Any, order: Any, batch_size: int, form: str) -> None:
    model, options = tiny.model("gpt2"), {"resamples": 3, "progress": False}
    found = [
        evaluate(
            model, {"a": corpus_of(given, prompts=1)}, {"b": one("gpt2", form)}, batch_size=size, **options
        ).measures
        for given, size in ((rows, 8), (mixed(rows, order), batch_size))
    ]
    assert found[0].keys() == found[1].keys()
    for key, measure in found[0].items():
        assert found[1][key].value == pytest.approx(measure.value, rel=1e-4, abs=1e-5, nan_ok=True), key
        assert found[1][key].n == measure.n


def readings(statistic: Any) -> dict[str, Tensor]:
    """What can be read of a statistic: exact where it is counted or chosen, to rounding where it is summed."""
    if not isinstance(statistic, Moments):
        return statistic.state()
    names = ("mean", "std", "rms", "mean_abs", "positive", "mean_sqrt", "min", "max")
    return {f"{name} {site}": value for name in names for site, value in getattr(statistic, name).items()}


@settings(max_examples=settings().max_examples // 3)
@given(documents, shuffled, st.data())
def test_a_corpus_in_parts_in_any_order_is_the_corpus(rows: Any, order: Any, data: st.DataObject) -> None:
    """However the documents are dealt out, and the parts put together."""
    model, new = tiny.model("gpt2"), mixed(rows, order)
    cut = data.draw(st.integers(0, len(new)))
    for empty in (Moments(extra=("sqrt", "extrema")), Histogram(), KeySample(6)):
        options: dict[str, Any] = {"statistic": empty, "progress": False}
        whole = readings(collect(model, corpus_of(rows), **options))
        parts = [collect(model, corpus_of(p), batch_size=1, **options) for p in (new[:cut], new[cut:]) if p]
        for tree in ([*parts, empty], [empty, *parts[::-1]]):
            got = readings(reduce(lambda a, b: a.merge(b), tree))
            assert got.keys() == whole.keys()
            for name, value in whole.items():
                if value.is_floating_point():
                    torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=name)
                else:
                    assert torch.equal(got[name], value), name


# --- selections ----------------------------------------------------------------------------------------------------------------


@given(selections, st.integers(0, 1000), st.booleans())
def test_random_pruning_takes_as_many_neurons_of_every_layer(like: NeuronMap, seed: int, heads: bool) -> None:
    """And whole heads where whole heads were taken."""
    model = tiny.model("gpt2")
    if heads:
        like = like.map(lambda mask: mask.any(-1, keepdim=True).expand(mask.shape) if mask.ndim == 2 else mask)
    drawn = random_pruning(model, like=Ablate(like, 0.5), seed=seed)
    assert {s: int(v.sum()) for s, v in drawn.selection.items()} == {s: int(v.sum()) for s, v in like.items()}
    assert drawn.value == 0.5
    for site, mask in like.items():
        if mask.ndim == 2 and torch.equal(mask.all(-1), mask.any(-1)):
            assert torch.equal(drawn.selection[site].all(-1), drawn.selection[site].any(-1))
    assert random_pruning(model, like=Ablate(like), seed=seed).selection.equals(drawn.selection)


@given(st.floats(0, 1), st.integers(0, 50), st.sampled_from(["mlp.post", "attn.z"]))
def test_random_pruning_takes_the_rounded_share_of_every_layer(fraction: float, seed: int, site: str) -> None:
    model, size = tiny.model("gpt2"), 64 if site == "mlp.post" else 32
    if round(fraction * size) == 0:
        with pytest.raises(SelectionError, match="selects nothing"):
            random_pruning(model, fraction=fraction, site=site, seed=seed)
        return
    drawn = random_pruning(model, fraction=fraction, site=site, seed=seed).selection
    assert [int(mask.sum()) for _, mask in drawn.items()] == [round(fraction * size)] * 2


scores = st.lists(st.sampled_from([0.0, -1.0, 1.0, 2.0, 3.0, 1e-30, float("inf"), -5.0]), min_size=4, max_size=4)


@pytest.mark.filterwarnings("ignore:nothing has a positive attribution")
@given(scores, scores, scores, scores, st.floats(0.01, 0.99))
def test_critical_masks_are_those_of_the_definition(a: Any, b: Any, c: Any, d: Any, threshold: float) -> None:
    forget, retain = (NeuronMap({POST[0]: torch.tensor(x), POST[1]: torch.tensor(y)}) for x, y in ((a, b), (c, d)))

    def critical_of(score: NeuronMap) -> dict[Site, np.ndarray]:
        found = {}
        for site, value in score.items():
            x = value.double().numpy()
            found[site] = (x > threshold * x.max()) & bool(x.max() > 0)
        return found

    ours, kept = critical_of(forget), critical_of(retain)
    if not any(mask.any() for mask in ours.values()):
        with pytest.raises(SelectionError):
            critical(forget, threshold)
        return
    expected = {
        "dual": ours,
        "forget_only": {s: ours[s] & ~kept[s] for s in ours},
        "union": {s: ours[s] | kept[s] for s in ours},
    }
    for kind, masks in expected.items():
        nothing = not any(mask.any() for mask in masks.values())
        if nothing or (kind != "dual" and not any(mask.any() for mask in kept.values())):
            with pytest.raises(SelectionError):
                critical_mask(forget, retain, threshold, kind=kind)  # type: ignore[arg-type]
            continue
        got = critical_mask(forget, retain, threshold, kind=kind)  # type: ignore[arg-type]
        assert {s: v.tolist() for s, v in got.items()} == {s: v.tolist() for s, v in masks.items()}


# --- files ---------------------------------------------------------------------------------------------------------------------

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
floats = st.sampled_from(FLOATS)


@st.composite
def partial_selections(draw: Any) -> NeuronMap:
    """Some neurons at one site at least, and none at others."""
    flags = {site: torch.zeros(shape, dtype=torch.bool) for site, shape in draw(st.just(SHAPES)).items()}
    chosen = draw(st.lists(st.sampled_from(list(SHAPES)), min_size=1, unique=True))
    for site in chosen:
        index = draw(st.sets(st.integers(0, flags[site].numel() - 1), min_size=1, max_size=5))
        flags[site].view(-1)[list(index)] = True
    return NeuronMap(flags)


@st.composite
def ablations(draw: Any) -> Ablate:
    selection, seed = draw(partial_selections()), draw(st.integers(0, 1000))
    number = st.floats(-1e30, 1e30, allow_nan=False)
    value = valued(selection, seed).map(lambda v: v.to(draw(floats))) if draw(st.booleans()) else draw(number)
    if not draw(st.booleans()):
        return Ablate(selection, value)
    selection = selection.map(lambda mask: mask)[Z]
    assume(selection.count() > 0)
    turn = torch.linalg.qr(torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)).double())[0]
    return Ablate(selection, value, NeuronMap({site: turn.to(draw(st.sampled_from(FLOATS[:2]))) for site in selection}))


@st.composite
def adjustments(draw: Any) -> Adjust:
    selection, seed = draw(partial_selections()), draw(st.integers(-(2**40), 2**40))
    made = [valued(selection, i) for i in range(4)]
    made = [m.map(lambda v: v.abs() + 0.01) if i % 2 else m for i, m in enumerate(made)]
    return Adjust(selection, *made, draw(st.sampled_from(["random", "deterministic"])), seed, draw(st.integers(0, 9)))


@st.composite
def abstentions(draw: Any) -> Abstain:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    regions: dict[Site, Any] = {}
    for site in draw(st.lists(st.sampled_from(POST), min_size=1, unique=True)):
        centres = torch.randn(draw(st.integers(1, 3)), 64, generator=generator)
        scale, limit = torch.rand(64, generator=generator) + 0.1, draw(st.floats(0, 1e6))
        shape = draw(st.sampled_from([Box, Ellipsoid, Clusters, Contrast]))
        others = (centres.mean(0) + 1, scale * 2) if shape is Contrast else ()
        regions[site] = shape(centres, scale, limit, draw(st.floats(0, 10)), draw(st.integers(0, 64)), *others)
    refusal = draw(st.text(st.characters(codec="utf-8"), max_size=20))
    rates = draw(st.sampled_from([{}, {"detection": [0.5, 0.1, 0.9, 7]}]))
    return Abstain(
        regions, draw(st.integers(1, len(regions))), draw(st.sampled_from(["prompt", "every_token"])), refusal, rates
    )


@st.composite
def any_deltas(draw: Any) -> Delta:
    names = draw(st.lists(st.sampled_from(list(WIDTHS)), min_size=1, max_size=3, unique=True))
    made = {Matrix(draw(st.integers(0, 1)), name): draw(updates(WIDTHS[name], FLOATS)) for name in names}
    assume(any(update.value.numel() for update in made.values()))
    return Delta(made, draw(st.floats(-3, 3)), draw(st.sampled_from([{}, {"steps": 3, "why": ["ü", None, 0.5]}])))


singles = ablations() | adjustments() | abstentions() | any_deltas()
anything = st.recursive(
    singles, lambda inner: st.lists(inner, max_size=3).map(lambda ms: Chain(tuple(ms))), max_leaves=4
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@given(anything, st.text(st.characters(codec="utf-8"), max_size=30))
def test_whatever_is_saved_comes_back_and_does_the_same(folder: Path, intervention: Intervention, note: str) -> None:
    path = folder / "one.safetensors"
    intervention.save(path, note=note)
    again = load_intervention(path)
    header, tensors = intervention.parts()
    header_again, back = again.parts()
    assert header_again == header
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value), name
    assert repr(again) == repr(intervention)
    assert torch.equal(through(again), through(intervention))
    before = path.read_bytes()
    again.save(path, note=note)
    assert path.read_bytes() == before


@settings(max_examples=settings().max_examples // 2)
@given(documents, st.sampled_from([(), ("sqrt",), ("extrema",), ("sqrt", "extrema")]))
def test_statistics_go_out_and_in_again_whole(rows: Any, extra: Any) -> None:
    model = tiny.model("gpt2")
    for made in (Moments(extra=extra), Histogram(), KeySample(5)):
        filled = collect(model, corpus_of(rows), statistic=made, progress=False)
        again = filled.fresh().with_state({name: value.clone() for name, value in filled.state().items()})
        assert again.state().keys() == filled.state().keys()
        assert all(torch.equal(value, again.state()[name]) for name, value in filled.state().items())
        assert str(again).split()[0] == str(filled).split()[0]
