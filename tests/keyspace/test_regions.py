"""Regions: the published box found by bisection, what is inside and what never is, and refusals in one sentence."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.keyspace.regions import (
    FLOOR,
    Box,
    Clusters,
    Contrast,
    Ellipsoid,
    Linear,
    Region,
    fit_region,
    region_from_parts,
)
from lens_unlearn.model.sites import Site

SHAPES: list[Any] = ["box", "ellipsoid", "clusters", "contrast", "linear"]
SITE = Site(1, "mlp.post")


def cloud(n: int = 60, width: int = 24, seed: int = 0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(width, generator=generator) + 0.2
    return torch.randn(n, width, generator=generator) * scale + shift


def fitted(shape: Any, keys: Tensor | None = None, **options: Any) -> Region:
    keys = cloud() if keys is None else keys
    return fit_region(keys, shape, others=cloud(50, keys.shape[1], seed=1, shift=1.5), **options)


def bisected(keys: np.ndarray) -> float:
    """The smallest factor at which mu +- k sigma holds every key, as the published code looks for it."""
    mean, sigma = keys.mean(0), keys.std(0, ddof=1)
    low, high = 0.0, 10_000.0
    while high - low > 1e-7:
        middle = (low + high) / 2
        if ((keys >= mean - middle * sigma) & (keys <= mean + middle * sigma)).all():
            high = middle
        else:
            low = middle
    return high


@given(st.integers(8, 80), st.integers(1, 40), st.integers(0, 10_000))
def test_the_boxs_closed_form_is_what_bisection_finds(n: int, width: int, seed: int) -> None:
    keys = cloud(n, width, seed)
    box = fit_region(keys)
    assert isinstance(box, Box)
    assert box.floored == 0
    assert box.k == pytest.approx(bisected(keys.double().numpy()), rel=1e-5)
    torch.testing.assert_close(box.centres[0].double(), keys.double().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(box.scale.double(), keys.double().std(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("alpha", [0.07, 1.0, 1.4, 2.0])
def test_a_key_is_in_the_box_exactly_where_every_coordinate_is_between_its_bounds(alpha: float) -> None:
    keys, others = cloud(), cloud(400, seed=3, shift=0.4)
    box = fit_region(keys, alpha=alpha)
    mean, sigma, k = (keys.double().mean(0), keys.double().std(0), bisected(keys.double().numpy()))
    score = ((others.double() - mean) / sigma).abs().amax(1)
    clear = (score - alpha * k).abs() > 1e-4
    assert torch.equal(box.contains(others)[clear], (score < alpha * k)[clear])
    assert box.alpha == pytest.approx(alpha)
    if alpha >= 1:
        assert bool(box.contains(keys).all())
        assert 0 < int(box.contains(others).sum()) < 400


@pytest.mark.parametrize("shape", SHAPES)
@given(st.integers(8, 60), st.integers(1, 30), st.integers(0, 10_000))
def test_alpha_1_covers_all_that_it_was_fitted_on_and_less_than_1_leaves_the_furthest_out(
    shape: Any, n: int, width: int, seed: int
) -> None:
    keys = cloud(n, width, seed)
    region = fitted(shape, keys, clusters=2)
    assert bool(region.contains(keys).all())
    assert all(bool(region.contains(key[None])) for key in keys), "one by one too"
    assert region.limit == region.k
    less = fitted(shape, keys, clusters=2, alpha=0.999)
    assert not bool(less.contains(keys).all())


@pytest.mark.parametrize("shape", SHAPES)
@given(st.floats(0.01, 1.0), st.integers(8, 50))
def test_coverage_is_the_share_that_alpha_1_covers_and_no_key_more(shape: Any, coverage: float, n: int) -> None:
    keys = cloud(n)
    inside = int(fitted(shape, keys, coverage=coverage, clusters=2).contains(keys).sum())
    assert coverage * n - 1e-6 <= inside < coverage * n + 1


def test_one_outlier_sets_the_published_limit_and_not_that_of_a_smaller_coverage() -> None:
    keys = cloud(100)
    far = keys.clone()
    far[17] += 50
    assert fit_region(far, coverage=1.0).limit > 2 * fit_region(far, coverage=0.99).limit
    assert not bool(fit_region(far, coverage=0.99).contains(far[17:18]))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_key_that_is_no_number_is_never_inside(shape: Any) -> None:
    region = fitted(shape, alpha=1e6)
    keys = cloud(4)
    assert bool(region.contains(keys).all())
    for bad in (math.nan, math.inf, -math.inf):
        for column in (0, 11):
            broken = keys.clone()
            broken[2, column] = bad
            assert region.contains(broken).tolist() == [True, True, False, True], (bad, column)
        assert not bool(region.contains(torch.full((24,), bad)))
    assert region.contains(torch.full((1, 24), 3e38)).tolist() == [False]


def test_the_scores_are_what_the_docstrings_say() -> None:
    keys, at, others = cloud(), cloud(30, seed=5, shift=0.3), cloud(50, seed=1, shift=1.5)
    v, x, o = keys.double().numpy(), at.double().numpy(), others.double().numpy()
    z = (x - v.mean(0)) / v.std(0, ddof=1)
    away = (x - o.mean(0)) / o.std(0, ddof=1)
    own, other = np.sqrt((z**2).mean(1)), np.sqrt((away**2).mean(1))
    np.testing.assert_allclose(fitted("box").score(at).numpy(), np.abs(z).max(1), rtol=1e-5)
    np.testing.assert_allclose(fitted("ellipsoid").score(at).numpy(), own, rtol=1e-5)
    np.testing.assert_allclose(fitted("contrast").score(at).numpy(), own / other, rtol=1e-5)
    clusters = fitted("clusters", clusters=3)
    assert len(clusters.centres) == 3
    nearest = [np.sqrt((((x - c) / clusters.scale.numpy()) ** 2).mean(1)) for c in clusters.centres.double().numpy()]
    np.testing.assert_allclose(clusters.score(at).numpy(), np.min(nearest, 0), rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_scores_of_a_batch_are_those_of_its_keys_one_by_one(shape: Any) -> None:
    region = fitted(shape)
    keys = cloud(60, seed=4).reshape(5, 12, 24)
    together = region.score(keys)
    assert together.shape == (5, 12)
    assert torch.equal(together.reshape(-1), torch.stack([region.score(key) for key in keys.reshape(-1, 24)]))
    assert torch.equal(region.contains(keys), together <= region.limit)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [37, 3072])
def test_nor_do_they_depend_on_how_the_batch_lies_in_memory(shape: Any, width: int) -> None:
    region = fitted(shape, cloud(20, width))
    keys = cloud(9, width, seed=4)
    strided = keys.t().contiguous().t()
    wide = torch.cat([keys, keys], 1)[:, :width]
    one = torch.stack([region.score(key) for key in keys])
    for other in (strided, wide):
        assert torch.equal(region.score(other), one)


# --- spread, floors and clusters -----------------------------------------------------------------------------------------


def test_constant_coordinates_get_a_floor_and_it_is_said_how_many() -> None:
    keys = cloud()
    keys[:, :7] = torch.linspace(-3, 1000, 7)  # constant, also at large values
    keys[:, 7] = 5 + 1e-6 * keys[:, 7]
    box = fit_region(keys)
    sigma = keys.double().std(0)
    floor = FLOOR * float(sigma[7:].median())
    assert box.floored == 8
    torch.testing.assert_close(box.scale[:8].double(), torch.full((8,), floor).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(box.scale[8:].double(), sigma[8:], rtol=1e-5, atol=0)
    assert repr(box) == "Box(24 coordinates, 8 floored, alpha=1)"
    assert bool(box.contains(keys).all())
    moved = keys.clone()
    moved[:, 3] += 20 * floor
    assert not bool(box.contains(moved).any()), "a coordinate that never varied still counts"


def test_the_floor_is_relative_so_that_scaling_the_keys_changes_nothing() -> None:
    keys = cloud()
    keys[:, :3] = 0
    box = fit_region(keys)
    for factor in (1e-6, 1e6):
        scaled = fit_region(keys * factor)
        assert scaled.floored == box.floored == 3
        assert scaled.k == pytest.approx(box.k, rel=1e-4)


def test_clusters_are_found_where_they_are_and_again_with_the_same_seed() -> None:
    centres = torch.tensor([[8.0, 0.0, 0.0], [0.0, 8.0, 0.0], [0.0, 0.0, 8.0], [-8.0, 0.0, 0.0]])
    generator = torch.Generator().manual_seed(0)
    keys = centres.repeat(15, 1) + 0.1 * torch.randn(60, 3, generator=generator)
    region = fit_region(keys, "clusters", clusters=4, seed=1)
    assert isinstance(region, Clusters)
    assert float(torch.cdist(centres, region.centres).amin(1).max()) < 0.1
    assert bool(region.contains(keys).all())
    hole = torch.zeros(1, 3)
    assert not bool(region.contains(hole))
    assert bool(fit_region(keys, "ellipsoid").contains(hole)), "one ellipsoid holds the empty middle too"
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    again = fit_region(keys, "clusters", clusters=4, seed=1)
    assert torch.equal(again.centres, region.centres)
    assert again.k == region.k
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]  # noqa: NPY002
    # sigma is that within clusters, with one degree of freedom less for each.
    nearest = region.centres[torch.cdist(keys, region.centres).argmin(1)]
    within = ((keys - nearest).double().square().sum(0) / (60 - 4)).sqrt()
    torch.testing.assert_close(region.scale.double(), within, rtol=1e-4, atol=0)


def test_a_region_of_limit_zero_shows_itself() -> None:
    keys = torch.cat([torch.eye(3) * 100, cloud(13, 3)])
    region = fit_region(keys, "clusters", clusters=4, coverage=0.1)  # each of three keys is a centre
    assert region.k == region.limit == 0
    assert repr(region) == "Clusters(4 centres, 3 coordinates, alpha=inf)"
    assert bool(region.contains(region.centres).any())


def test_a_contrast_is_nearer_to_its_own() -> None:
    own, others = cloud(40), cloud(40, seed=1, shift=2.0)
    region = fit_region(own, "contrast", others=others)
    assert isinstance(region, Contrast)
    assert float(region.score(own).max()) < 1 < float(region.score(others).min())
    between = (own.mean(0) + others.mean(0)) / 2
    assert float(region.score(between)) == pytest.approx(1, abs=0.2)
    assert torch.equal(region.centres[0], fit_region(own, "ellipsoid").centres[0])


# --- refusals, and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coverage": 0.0}, r"^coverage=0\.0 is out of range: a share of the fitted keys, in \(0, 1\]$"),
        ({"coverage": 1.01}, r"^coverage=1\.01 is out of range"),
        ({"coverage": math.nan}, r"^coverage=nan is out of range"),
        ({"alpha": 0.0}, r"^alpha=0\.0 is out of range: give one above 0$"),
        ({"alpha": -1.0}, r"^alpha=-1\.0 is out of range"),
        ({"alpha": math.nan}, r"^alpha=nan is out of range"),
        (
            {"shape": "sphere"},
            r"^region='sphere' is not known: choose from box, ellipsoid, clusters, contrast, linear$",
        ),
        ({"shape": "contrast", "others": None}, r"^region='contrast' needs 8 queries of other skills"),
        ({"shape": "contrast", "others": torch.zeros(7, 24)}, r"^region='contrast' needs 8 queries of other skills"),
        ({"shape": "clusters", "clusters": 31}, r"^clusters=31 does not fit 60 queries: give at least two for each$"),
        ({"shape": "clusters", "clusters": 0}, r"^clusters=0 does not fit 60 queries"),
        ({"keys": torch.zeros(7, 24)}, r"^7 queries are too few to fit a region: give at least 8$"),
        ({"keys": torch.zeros(0, 24)}, r"^0 queries are too few"),
        ({"keys": torch.full((9, 24), 3.3)}, r"^every coordinate of the keys is constant"),
        ({"keys": torch.full((9, 24), math.inf)}, r"^a key to fit on holds NaN or infinity$"),
    ],
)
def test_what_makes_no_region_is_refused_in_one_sentence(change: dict[str, Any], words: str) -> None:
    options = {"keys": cloud(), "shape": "box", **change}
    with pytest.raises(LensUnlearnError, match=words):
        fit_region(options.pop("keys"), options.pop("shape"), **options)


def test_a_region_from_a_broken_file_is_refused() -> None:
    header, tensors = fitted("box").parts()
    for change in (
        {"scale": torch.zeros(24)},
        {"scale": torch.full((24,), math.nan)},
        {"centres": torch.full((1, 24), math.inf)},
    ):
        with pytest.raises(LensUnlearnError, match="finite centres, positive scales"):
            region_from_parts(header, {**tensors, **change})
    for limit in (-1.0, math.nan):
        with pytest.raises(LensUnlearnError, match="a limit of at least 0"):
            region_from_parts({**header, "limit": limit}, tensors)
    with pytest.raises(LensUnlearnError, match="'cone' is not a region this version knows: upgrade"):
        region_from_parts({**header, "shape": "cone"}, tensors)


@pytest.mark.filterwarnings("ignore:.* know its model:UserWarning")
@pytest.mark.parametrize("shape", SHAPES)
def test_regions_come_back_from_a_file_bit_for_bit(shape: Any, tmp_path: Path) -> None:
    region = fitted(shape, alpha=1.3, coverage=0.9)
    other = fitted("ellipsoid", seed=3)
    given = Abstain({SITE: region, Site(11, "mlp.post"): other}, vote=2, when="every_token", refusal="No.")
    path = tmp_path / "abstain.safetensors"
    given.save(path)
    loaded = load_intervention(path)
    assert isinstance(loaded, Abstain)
    assert (loaded.vote, loaded.when, loaded.refusal) == (2, "every_token", "No.")
    assert list(loaded.regions) == [SITE, Site(11, "mlp.post")]
    for site, own in given.regions.items():
        again = loaded.regions[site]
        assert type(again) is type(own)
        assert (again.limit, again.k, again.floored) == (own.limit, own.k, own.floored)
        keys = cloud(50, seed=8)
        assert torch.equal(again.score(keys), own.score(keys))
        assert torch.equal(again.contains(keys), own.contains(keys))
    assert repr(loaded) == repr(given)


def test_the_volume_is_the_sum_of_log_sigmas_and_another_limit_leaves_the_rest() -> None:
    region = fitted("box", alpha=2.0)
    assert region.log_volume == pytest.approx(float(cloud().double().std(0).log().sum()), rel=1e-6)
    moved = region.at(3.0)
    assert (moved.limit, moved.k) == (3.0, region.k)
    assert moved.centres is region.centres
    assert isinstance(Ellipsoid(region.centres, region.scale, 1.0).at(2.0), Ellipsoid)


def test_a_plane_is_that_of_a_penalized_logistic_regression() -> None:
    """Against a minimizer that knows nothing of the one that is used: plain gradient descent on the stated loss."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(30, 5, generator=generator).double() * torch.tensor([1.0, 3.0, 0.5, 1.0, 9.0])
    others = torch.randn(70, 5, generator=generator).double() + torch.tensor([1.0, 0.0, 0.0, -1.0, 4.0])
    region = fit_region(keys, "linear", others=others)
    assert isinstance(region, Linear)
    both = torch.cat([keys, others])
    z = (both - both.mean(0)) / both.std(0)
    sign = torch.tensor([1.0] * 30 + [-1.0] * 70).double()
    weigh = torch.tensor([100 / 60] * 30 + [100 / 140] * 70).double()
    w, b = torch.zeros(5).double().requires_grad_(), torch.zeros(1).double().requires_grad_()
    for _ in range(3000):
        loss = (weigh * torch.nn.functional.softplus(-sign * (z @ w + b))).mean() + w.square().sum() / 2
        grad = torch.autograd.grad(loss, (w, b))
        with torch.no_grad():
            w -= 0.3 * grad[0]
            b -= 0.3 * grad[1]
    torch.testing.assert_close(region.weight.double(), w.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(region.bias.double(), b.detach(), rtol=1e-2, atol=1e-3)
    expected = torch.sigmoid(-(z @ w + b)).detach()
    torch.testing.assert_close(region.score(both).double(), expected, rtol=1e-3, atol=1e-4)
    assert region.k == pytest.approx(float(expected[:30].max()), rel=1e-3)
    assert bool(region.contains(keys).all())


def test_a_plane_is_saved_and_read_and_refuses_what_is_none() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, others = torch.randn(20, 3, generator=generator), torch.randn(20, 3, generator=generator) + 2
    region = fit_region(keys, "linear", others=others)
    again = region_from_parts(*region.parts())
    torch.testing.assert_close(again.score(others), region.score(others), rtol=0, atol=0)
    assert again.limit == region.limit
    assert repr(again) == repr(region)
    assert bool(region.score(torch.full((1, 3), float("nan"))).isnan())
    assert not bool(region.contains(torch.full((1, 3), float("nan"))))
    header, tensors = region.parts()
    for wrong in ({"weight": torch.zeros(2)}, {"bias": torch.zeros(2)}, {"weight": torch.full((3,), float("inf"))}):
        with pytest.raises(LensUnlearnError, match="a plane needs"):
            region_from_parts(header, {**tensors, **wrong})
    for few in (None, others[:7]):
        with pytest.raises(LensUnlearnError, match="'linear' needs 8 queries of other skills at least"):
            fit_region(keys, "linear", others=few)
