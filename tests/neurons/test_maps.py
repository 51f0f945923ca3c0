"""NeuronMap: arithmetic is the tensors' arithmetic, and a selection is exact, stable and never prefers the dead."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lens_unlearn.core.errors import SelectionError, SiteError
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.maps import NeuronMap

A, B, Z = Site(0, "mlp.post"), Site(1, "mlp.post"), Site(0, "attn.z")
numbers = st.floats(-8, 8, width=32)


def of(a: list[float], b: list[float], /, **live: list[bool]) -> NeuronMap:
    flags = {A: torch.tensor(live["a"]), B: torch.tensor(live["b"])} if live else None
    return NeuronMap({A: torch.tensor(a), B: torch.tensor(b)}, live=flags)


def vectors(element: Any = numbers) -> Any:
    return st.tuples(st.lists(element, min_size=3, max_size=3), st.lists(element, min_size=2, max_size=2))


maps = vectors().map(lambda v: of(*v))
selections = vectors(st.booleans()).map(lambda v: of(*v))


def arrays(m: NeuronMap) -> list[np.ndarray]:
    return [value.numpy() for _, value in m.items()]


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
@given(maps, maps, numbers)
def test_arithmetic_is_that_of_the_tensors(x: NeuronMap, y: NeuronMap, c: float) -> None:
    c32 = np.float32(c)
    with np.errstate(all="ignore"):
        cases = [
            (x + y, lambda a, b: a + b),
            (x - y, lambda a, b: a - b),
            (x * y, lambda a, b: a * b),
            (x / y, lambda a, b: a / b),
            (x + c, lambda a, b: a + c32),
            (c + x, lambda a, b: c32 + a),
            (x - c, lambda a, b: a - c32),
            (c - x, lambda a, b: c32 - a),
            (x * c, lambda a, b: a * c32),
            (c * x, lambda a, b: c32 * a),
            (c / x, lambda a, b: c32 / a),
            (x**2, lambda a, b: a * a),
            (-x, lambda a, b: -a),
            (abs(x), lambda a, b: np.abs(a)),
            (abs(x).sqrt(), lambda a, b: np.sqrt(np.abs(a))),
            ((abs(x) + 1).log(), lambda a, b: np.log(np.abs(a) + 1)),
        ]
        for got, function in cases:
            for value, a, b in zip(arrays(got), arrays(x), arrays(y), strict=True):
                np.testing.assert_allclose(value, function(a, b), rtol=1e-6, atol=1e-30)


@given(maps, maps, numbers)
def test_comparisons_are_those_of_the_tensors(x: NeuronMap, y: NeuronMap, c: float) -> None:
    for got, function in [
        (x < y, np.less),
        (x <= y, np.less_equal),
        (x > y, np.greater),
        (x >= y, np.greater_equal),
        (x == y, np.equal),
        (x != y, np.not_equal),
    ]:
        assert got.is_selection
        assert all(np.array_equal(v, function(a, b)) for v, a, b in zip(arrays(got), arrays(x), arrays(y), strict=True))
    assert all(np.array_equal(v, a > np.float32(c)) for v, a in zip(arrays(x > c), arrays(x), strict=True))


@given(selections, selections, selections)
def test_selections_are_a_boolean_algebra(x: NeuronMap, y: NeuronMap, z: NeuronMap) -> None:
    assert (x | y).equals(y | x)
    assert (x & y).equals(y & x)
    assert (x & (y | z)).equals((x & y) | (x & z))
    assert (~(x | y)).equals(~x & ~y)
    assert (~~x).equals(x)
    assert (x ^ y).equals((x | y) & ~(x & y))
    assert (x | ~x).count() == x.numel()
    assert (x & ~x).count() == 0
    assert (x | y).count() + (x & y).count() == x.count() + y.count()


@given(maps, selections, numbers)
def test_where_keeps_what_is_selected(x: NeuronMap, keep: NeuronMap, c: float) -> None:
    for got, a, k in zip(arrays(x.where(keep, c)), arrays(x), arrays(keep), strict=True):
        assert np.array_equal(got, np.where(k, a, np.float32(c)))


@given(
    vectors(st.sampled_from([0.0, 1.0, 2.0, -1.0, float("inf"), float("-inf")])),
    st.floats(0, 1),
    vectors(st.booleans()),
)
def test_top_takes_exactly_the_rounded_share_highest_first_ties_to_the_lower_place(
    values: Any, fraction: float, live: Any
) -> None:
    chosen = of(*values, a=live[0], b=live[1]).top(fraction)
    flat, alive = [*values[0], *values[1]], [*live[0], *live[1]]
    ranked = sorted(range(5), key=lambda i: (not alive[i], -flat[i], i))
    expected = set(ranked[: round(fraction * 5)])
    assert {int(i) for i in chosen.flat().nonzero()} == expected


@given(vectors(), st.floats(0, 1))
def test_top_within_a_layer_takes_the_share_of_every_layer(values: Any, fraction: float) -> None:
    chosen = of(*values).top(fraction, within="layer")
    for site, column in ((A, values[0]), (B, values[1])):
        k = round(fraction * len(column))
        best = sorted(range(len(column)), key=lambda i: (-column[i], i))[:k]
        assert {int(i) for i in chosen[site].nonzero()} == set(best)


@given(vectors(), st.floats(0, 1), st.floats(0.125, 64))
def test_top_does_not_depend_on_the_scale(values: Any, fraction: float, scale: float) -> None:
    scale = 2.0 ** round(np.log2(scale))
    m = of(*values)
    assert m.top(fraction).equals((m * scale).top(fraction))


def test_fraction_zero_is_nothing_and_one_is_everything() -> None:
    m = of([1.0, 1.0, 1.0], [1.0, 1.0])
    for within in ("model", "layer"):
        assert m.top(0, within=within).count() == 0
        assert m.top(1, within=within).count() == 5
        assert m.top(1.0, within=within).is_selection


@given(vectors(), vectors(st.booleans()), vectors(st.booleans()), st.floats(0, 1))
def test_candidates_that_live_come_first_and_others_only_when_none_remain(
    values: Any, live: Any, among: Any, fraction: float
) -> None:
    chosen = of(*values, a=live[0], b=live[1]).top(fraction, among=of(*among)).flat()
    preferred = (of(*live) & of(*among)).flat()
    assert int((chosen & preferred).sum()) == min(int(preferred.sum()), round(fraction * 5))


def test_what_lives_is_known_through_arithmetic() -> None:
    x = of([1.0, 2.0, 3.0], [4.0, 5.0], a=[True, False, False], b=[True, False])
    y = of([1.0, 2.0, 3.0], [4.0, 5.0], a=[False, False, True], b=[True, False])
    expected = of([True, False, True], [True, False])
    for m in (x + y, x / (y + 1e-3), x - 2 * y, (x * y).log(), (x > y), -(x / y), (x / y).where(x > 0, 0.0)):
        assert m.live.equals(expected), m
    assert x["mlp.post"].live.equals(of([True, False, False], [True, False]))
    assert bool((x + y)[[A]].live[A].equal(torch.tensor([True, False, True])))
    assert (x / 3).live.equals(x.live)
    assert x.map(lambda v: v[..., None].expand(*v.shape, 2).any(-1)).live.equals(x.live)
    assert x.map(lambda v: v[:1]).live.count() == 2, "after a change of shape nothing is known"
    assert of([1.0, 2.0, 3.0], [4.0, 5.0]).live.count() == 5


def test_a_dead_neuron_with_the_highest_score_is_not_taken_before_the_living() -> None:
    score = of([9.0, 0.1, 0.2], [0.3, 8.0], a=[False, True, True], b=[True, False])
    assert score.top(0.6).equals(of([False, True, True], [True, False]))
    assert score.top(0.8)[A].tolist() == [True, True, True]
    layered = score.top(1 / 3, within="layer")
    assert layered[A].tolist() == [False, False, True]


@pytest.mark.parametrize("fraction", [-0.01, 1.01, float("nan"), "much", None, float("inf")])
def test_what_is_no_share_is_refused(fraction: Any) -> None:
    with pytest.raises(SelectionError, match="is not a share of the neurons"):
        of([1.0, 2.0, 3.0], [1.0, 2.0]).top(fraction)


@pytest.mark.parametrize("within", ["model", "layer"])
def test_a_score_that_is_nan_is_refused_naming_the_neuron(within: Any) -> None:
    with pytest.raises(SelectionError, match=r"L1\.mlp\.post\[1\] is NaN"):
        of([1.0, 2.0, 3.0], [1.0, float("nan")]).top(0.2, within=within)


def test_an_unknown_within_is_refused() -> None:
    with pytest.raises(SelectionError, match="within='head' is not known"):
        of([1.0, 2.0, 3.0], [1.0, 2.0]).top(0.2, within="head")  # type: ignore[arg-type]


def test_a_map_does_not_change_with_the_tensors_it_was_made_of_or_gave_out() -> None:
    tensor, live = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    m = NeuronMap({A: tensor}, live={A: live})
    tensor.zero_()
    live.fill_(True)
    m[A].zero_()
    next(iter(m.items()))[1].zero_()
    m.stack().zero_()
    m.flat().zero_()
    assert m[A].tolist() == [1.0, 2.0]
    assert m.live[A].tolist() == [True, False]
    m.map(lambda v: v.mul_(2))
    assert m[A].tolist() == [1.0, 2.0]
    with pytest.raises(AttributeError):
        m.anything = 1  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        hash(m)
    with pytest.raises(TypeError):
        m[A] = torch.zeros(2)  # type: ignore[index]


def test_gradients_do_not_come_along() -> None:
    assert not NeuronMap({A: torch.ones(2, requires_grad=True)})[A].requires_grad


def test_to_frame_has_a_row_per_neuron() -> None:
    m = NeuronMap({B: torch.tensor([1.5, 2.5]), Z: torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    frame = m["mlp.post"].to_frame()
    assert frame.to_dict("list") == {"layer": [1, 1], "site": ["mlp.post"] * 2, "neuron": [0, 1], "value": [1.5, 2.5]}
    frame = m.to_frame()
    z = frame[frame.site == "attn.z"]
    assert z["head"].tolist() == [0, 0, 1, 1]
    assert z["neuron"].tolist() == [0, 1, 2, 3]
    assert z["value"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert len(frame) == 6
    assert (m > 2).to_frame()["value"].dtype == bool


def test_reading_by_site_kind_layer_and_list() -> None:
    m = NeuronMap({B: torch.tensor([3.0]), A: torch.tensor([1.0, 2.0]), Z: torch.tensor([[1.0]])})
    assert m.sites == [Z, A, B], "kinds in the alphabet's order, then layers"
    assert m["mlp.post"].sites == [A, B]
    assert m[0].sites == [Z, A]
    assert m[[B, Z]].sites == [Z, B]
    assert m[A].tolist() == [1.0, 2.0]
    assert A in m
    assert Site(5, "mlp.post") not in m
    assert len(m) == 3
    assert list(m) == m.sites
    for key in (Site(5, "mlp.post"), 7, "attn.q", [Site(5, "mlp.post")]):
        with pytest.raises(SelectionError, match="is not in this map, which has 2 layers, attn.z, mlp.post"):
            m[key]
    with pytest.raises(SiteError, match="did you mean mlp.post"):
        m["mlp.pots"]


def test_stack_flat_and_unflatten() -> None:
    m = of([1.0, 2.0, 3.0], [4.0, 5.0])
    assert m.flat().tolist() == [1, 2, 3, 4, 5]
    assert m.unflatten(m.flat()).equals(m)
    square = NeuronMap({A: torch.ones(2, 3), B: torch.zeros(2, 3)})
    assert square.stack().shape == (2, 2, 3)
    with pytest.raises(SelectionError, match="only layers of one kind and width stack"):
        m.stack()
    with pytest.raises(SelectionError, match="stack"):
        NeuronMap({A: torch.ones(2), Z: torch.ones(2)}).stack()


def test_per_layer_gives_means_and_shares() -> None:
    m = of([1.0, 2.0, 3.0], [4.0, 5.0])
    assert m.per_layer() == {A: 2.0, B: 4.5}
    assert (m > 2).per_layer() == {A: pytest.approx(1 / 3), B: 1.0}
    assert (m > 2).count() == 3
    assert m.numel() == 5


def test_maps_that_do_not_fit_each_other_are_refused() -> None:
    m = of([1.0, 2.0, 3.0], [4.0, 5.0])
    with pytest.raises(SelectionError, match=r"only one of them has L0\.attn\.z"):
        m + NeuronMap({A: torch.zeros(3), B: torch.zeros(2), Z: torch.zeros(1)})
    with pytest.raises(SelectionError, match=r"L1\.mlp\.post: the maps have shapes \(2,\) and \(1,\)"):
        m + of([1.0, 2.0, 3.0], [4.0])
    with pytest.raises(SelectionError, match="compare the map first"):
        m & (m > 1)
    with pytest.raises(SelectionError, match="compare the map first"):
        (m > 1) | m
    with pytest.raises(SelectionError, match="compare the map first"):
        _ = ~m
    with pytest.raises(SelectionError, match="at least one site"):
        NeuronMap({})
    with pytest.raises(SelectionError, match="live flags"):
        NeuronMap({A: torch.zeros(3)}, live={A: torch.ones(2)})
    with pytest.raises(SelectionError):
        m.top(0.1, among=NeuronMap({A: torch.ones(3, dtype=torch.bool)}))


def test_equals_is_exact() -> None:
    m = of([1.0, 2.0, 3.0], [4.0, 5.0])
    assert m.equals(of([1.0, 2.0, 3.0], [4.0, 5.0]))
    assert not m.equals(of([1.0, 2.0, 3.0], [4.0, 5.000001]))
    assert not m.equals(m[0])
    assert not m.equals(3)


def test_maps_show_themselves() -> None:
    m = of([1.0, 2.0, 3.0], [4.0, 5.0])
    assert repr(m) == "NeuronMap(5 neurons, 2 layers, mlp.post: 1 to 5, mean 3)"
    assert repr(m > 2) == "NeuronMap(3 of 5 neurons, 2 layers, mlp.post)"
    assert repr((m > 2)[1]) == "NeuronMap(2 of 2 neurons, 1 layer, mlp.post)"
    assert "<td>L1.mlp.post</td><td>2</td><td>4.5</td><td>5</td>" in m._repr_html_()
