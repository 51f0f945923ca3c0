"""The analysis of key space, against brute force, scikit-learn, and planted clusters."""

import math
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

import lens_unlearn as lu
from lens_unlearn.core.errors import CorpusError, LensUnlearnError, SiteError
from lens_unlearn.keyspace import key_space, separation
from lens_unlearn.keyspace.key_space import KeySpace
from lens_unlearn.keyspace.regions import fit_region
from lens_unlearn.keyspace.separation import POOLED, Mahalanobis, Plane, against, best_scale, coverage, unit_weights
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.key_sample import KeySample

SITE = Site(0, "mlp.post")
MEASURES = {"auc_box", "auc_ellipsoid", "auc_mahalanobis", "auc_clusters", "area_between", "best_scale", "best_gap"}


def normal(*shape: int, seed: int = 0, mean: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + mean


def ones(scores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of scores whose every query is a document of its own."""
    return {name: unit_weights(torch.arange(len(part)), i) for i, (name, part) in enumerate(scores.items())}


def three(seed: int = 0) -> dict[str, torch.Tensor]:
    """Scores of three skills, on a grid so that there are ties."""
    sizes = {"a": (30, 1.0), "b": (20, 1.5), "c": (25, 1.2)}
    return {
        name: (normal(n, seed=seed + i).abs() * scale * 4).round() / 4 + 0.25
        for i, (name, (n, scale)) in enumerate(sizes.items())
    }


# --- separation of scores --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_auc_is_that_of_scikit_learn(seed):
    scores = three(seed)
    found = against(scores, "a", ones(scores), "auc")
    rest = {"b": scores["b"], "c": scores["c"], POOLED: torch.cat([scores["b"], scores["c"]])}
    assert set(found) == set(rest)
    for other, theirs in rest.items():
        labels = np.r_[np.zeros(len(scores["a"])), np.ones(len(theirs))]
        assert found[other].value == pytest.approx(roc_auc_score(labels, torch.cat([scores["a"], theirs])))
        assert found[other].low <= found[other].value <= found[other].high


def area_by_steps(own: torch.Tensor, other: torch.Tensor) -> float:
    """Integrate over log c: the difference of the curves, over the mean distance of a pair."""
    steps = torch.cat([own, other]).double().unique()
    f, g = ([float((part <= c).double().mean()) for c in steps[:-1]] for part in (own, other))
    width = steps.log().diff().tolist()
    top = sum(w * (x - y) for w, x, y in zip(width, f, g, strict=True))
    bottom = sum(w * (x * (1 - y) + y * (1 - x)) for w, x, y in zip(width, f, g, strict=True))
    return top / bottom


@pytest.mark.parametrize("seed", range(3))
def test_area_between_is_the_integral_of_the_curves(seed):
    scores = three(seed)
    found = against(scores, "b", ones(scores), "area")
    for other, theirs in {"a": scores["a"], POOLED: torch.cat([scores["a"], scores["c"]])}.items():
        assert found[other].value == pytest.approx(area_by_steps(scores["b"], theirs))


def test_area_between_is_one_apart_zero_together_and_minus_one_reversed():
    near, far = normal(40).abs() + 0.1, normal(40, seed=1).abs() + 50
    scores = {"near": near, "far": far}
    assert against(scores, "near", ones(scores), "area")["far"].value == pytest.approx(1)
    assert against(scores, "far", ones(scores), "area")["near"].value == pytest.approx(-1)
    for same in (near, torch.full((9,), 2.0), torch.zeros(9)):
        scores = {"a": same, "b": same.clone()}
        assert against(scores, "a", ones(scores), "area")["b"].value == pytest.approx(0, abs=1e-12)
        assert against(scores, "a", ones(scores), "auc")["b"].value == pytest.approx(0.5)


def test_best_scale_is_that_of_trying_all():
    for seed in range(5):
        scores = three(seed)
        scale, gap = best_scale(scores["a"], scores["b"])
        tried = torch.cat(list(scores.values())).unique()
        gaps = [float((scores["a"] <= c).double().mean() - (scores["b"] <= c).double().mean()) for c in tried]
        assert gap == pytest.approx(max(gaps))
        inside = [float((scores[name] <= scale).double().mean()) for name in "ab"]
        assert inside[0] - inside[1] == pytest.approx(gap)
    reversed_scale, none = best_scale(torch.tensor([5.0, 6.0]), torch.tensor([1.0, 2.0]))
    assert math.isnan(reversed_scale)
    assert none == 0


def test_resamples_are_of_whole_documents():
    documents = torch.tensor([7, 7, -3, 5, 5, 5])
    weights, sizes = unit_weights(documents, 0)
    assert weights[0].tolist() == [1] * 6
    assert torch.equal(weights[:, 0], weights[:, 1])
    assert torch.equal(weights[:, 3], weights[:, 5])
    assert not torch.equal(weights[:, 0], weights[:, 3])
    assert sorted(sizes.tolist()) == [1, 2, 3]
    assert torch.equal(weights, unit_weights(documents, 0).table)
    assert not torch.equal(weights, unit_weights(documents, 1).table)
    elsewhere = unit_weights(torch.tensor([5, 9]), 0).table
    assert torch.equal(elsewhere[:, 0], weights[:, 3]), "a document has the same weights wherever it stands"


def test_of_fewer_than_ten_units_there_is_no_interval():
    scores = {"a": normal(40).abs(), "b": normal(40, seed=1).abs()}
    for few, finite in ((9, False), (10, True)):
        units = {"a": unit_weights(torch.arange(40) % few, 0), "b": unit_weights(torch.arange(40) + 99, 0)}
        found = against(scores, "a", units, "auc")["b"]
        assert math.isfinite(found.value)
        assert math.isfinite(found.low) == math.isfinite(found.high) == finite


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    hits = 0
    for seed in range(60):
        scores = {"a": normal(40, seed=2 * seed).double(), "b": normal(40, seed=2 * seed + 1, mean=1.0).double()}
        found = against({k: v + 10 for k, v in scores.items()}, "a", ones(scores), "auc")["b"]
        hits += found.low <= 0.7602 <= found.high  # Phi(1 / sqrt 2)
    assert hits >= 50


# --- distances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(12, 30), (40, 6), (25, 25), (9, 2)])
def test_mahalanobis_is_that_of_ledoit_and_wolf(m, n):
    mixed = normal(n, n, seed=3)
    keys, others = normal(m, n) @ mixed + 5, normal(7, n, seed=1) @ mixed
    oracle = LedoitWolf().fit(keys.double().numpy())
    expected = np.sqrt(oracle.mahalanobis(others.double().numpy()))
    assert Mahalanobis.fit(keys).score(others).numpy() == pytest.approx(expected, rel=1e-6)


def test_mahalanobis_bears_constant_and_equal_coordinates():
    keys = torch.cat([normal(20, 3), torch.full((20, 2), 4.0), normal(20, 3)[:, :1]], dim=1)
    oracle = LedoitWolf().fit(keys.double().numpy())
    others = normal(5, 6, seed=2)
    assert Mahalanobis.fit(keys).score(others).numpy() == pytest.approx(
        np.sqrt(oracle.mahalanobis(others.double().numpy()))
    )
    line = torch.tensor([[1.0, 2.0, 0.0], [-1.0, -2.0, 0.0]]).repeat(4, 1)  # leaves nothing to shrink
    assert bool(torch.isfinite(Mahalanobis.fit(line).score(others[:, :3])).all())


def test_coverage_counts_the_keys_inside_every_coordinate():
    keys, others = normal(30, 5), normal(50, 5, seed=1, scale=2.0)
    box = fit_region(keys)
    scales = torch.tensor([0.5, 1.0, 2.0, 4.0])
    brute = [
        np.mean([all(abs(x - mu) <= c * s for x, mu, s in zip(key, box.centres[0], box.scale)) for key in others])
        for c in scales
    ]
    assert coverage(box.score(others), scales).tolist() == pytest.approx(brute)


def test_centre_distance_is_in_units_of_both_sigmas():
    keys = normal(50, 8)
    near, far = fit_region(keys), fit_region(keys + 3 * keys.std(0))
    assert separation.centre_distance(near, far) == pytest.approx(3, rel=1e-4)
    assert separation.centre_distance(near, near) == 0
    other = fit_region(normal(50, 8, seed=1, scale=4.0))
    assert separation.centre_distance(near, other) == pytest.approx(separation.centre_distance(other, near))


# --- clusters and the map --------------------------------------------------------------------------------------------


def planted(distance: float, seed: int = 0, skills: int = 3, n: int = 20, width: int = 12) -> dict[str, torch.Tensor]:
    centres = normal(skills, width, seed=99) * distance
    return {f"skill {i}": normal(n, width, seed=seed * 100 + i) + centres[i] for i in range(skills)}


def test_planted_clusters_are_found_and_noise_is_not():
    apart = separation.cluster_agreement(planted(20), planted(20, seed=1), 0)
    assert apart["adjusted_rand"] == 1
    assert apart["silhouette"] == apart["silhouette_skills"] > 0.8
    mixed = separation.cluster_agreement(planted(0), planted(0, seed=1), 0)
    assert abs(mixed["adjusted_rand"]) < 0.15
    # All held-out keys in one cluster: no silhouette, and no agreement.
    gone = separation.cluster_agreement(planted(20), {k: v * 0 + 1000 + v for k, v in planted(0).items()}, 0)
    assert math.isnan(gone["silhouette"])
    assert gone["adjusted_rand"] == 0


def test_the_plane_is_that_of_the_fitted_keys():
    fit, held = planted(5), planted(5, seed=1)
    boxes = {name: fit_region(keys) for name, keys in fit.items()}
    plane = Plane.fit(fit, held, boxes, 0)
    keys = torch.cat(list(fit.values())).double()
    _, spread, axes = torch.linalg.svd(keys - keys.mean(0), full_matrices=False)
    share = spread.square() / spread.square().sum()
    assert plane.explained == pytest.approx(share[:2].tolist(), rel=1e-5)
    for name, part in held.items():
        expected = (part.double() - keys.mean(0)) @ axes[:2].T
        assert plane.points[name].abs() == pytest.approx(expected.abs(), abs=1e-4)
    again = Plane.fit(fit, fit, boxes, 0)
    for name, points in again.points.items():
        low, high = plane.boxes[name].amin(0), plane.boxes[name].amax(0)
        assert bool(((points >= low - 1e-9) & (points <= high + 1e-9)).all())
        assert min(float((points - low).min()), float((high - points).min())) == pytest.approx(0, abs=1e-6)


def test_the_shadow_of_a_box_is_the_hull_of_its_corners():
    fit = planted(2, skills=2, width=6)
    boxes = {name: fit_region(keys) for name, keys in fit.items()}
    name, box = next(iter(boxes.items()))
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=6)))
    corners = box.centres[0] + signs * box.k * box.scale
    plane = Plane.fit(fit, {name: corners}, boxes, 0)
    angles = torch.linspace(0, 2 * math.pi, separation.DIRECTIONS + 1, dtype=torch.float64)[:-1]
    directions = torch.stack([angles.cos(), angles.sin()])
    reach = (plane.points[name] @ directions).amax(0)
    assert (plane.shadows[name] @ directions).amax(0).tolist() == pytest.approx(reach.tolist(), rel=1e-5)


# --- the whole, on a model -------------------------------------------------------------------------------------------

CODE, PROSE = range(3, 7), range(150, 320)


def corpora(n: int = 40) -> dict[str, lu.Corpus]:
    draw = np.random.default_rng(0)
    kinds = {"code": CODE, "prose": PROSE, "mixed": range(3, 320)}
    return {
        name: tiny.corpus(draw.integers(8, 16, n + 4 * i).tolist(), seed=i, name=f"{name}.jsonl", tokens=list(tokens))
        for i, (name, tokens) in enumerate(kinds.items())
    }


@pytest.fixture(scope="module")
def space() -> KeySpace:
    return lu.key_space(tiny.model("gpt2"), corpora(), ("mlp.post", "attn.z"), progress=False)


def test_the_frame_is_tidy_and_complete(space):
    frame = space.to_frame()
    assert list(frame) == ["site", "layer", "skill", "other", "measure", "value", "low", "high"]
    assert not frame.duplicated(["site", "skill", "other", "measure"]).any()
    assert set(frame.site) == {"L0.mlp.post", "L1.mlp.post", "L0.attn.z", "L1.attn.z"}
    of_pair = frame[(frame.skill == "code") & (frame.other == "prose")]
    assert set(of_pair.measure) == MEASURES | {"centre_distance"}
    assert set(frame[(frame.skill == "code") & (frame.other == POOLED)].measure) == MEASURES
    assert set(frame[(frame.skill == "code") & (frame.other == "")].measure) == {"log_volume", "k", "floored"}
    assert set(frame[frame.skill == ""].measure) == {"adjusted_rand", "silhouette", "silhouette_skills"}
    aucs = frame[frame.measure.str.startswith("auc")]
    assert aucs.value.between(0, 1).all()
    assert (aucs.low <= aucs.high).all()
    areas = frame[frame.measure == "area_between"].value
    assert areas.between(-1, 1).all()


def test_the_control_separates_nothing(space):
    assert space.control not in space.skills
    for site in space.sites:
        for distance in space.distances:
            value, low, high = space.value(site, f"auc_{distance}", space.control, POOLED)
            assert 0.25 < value < 0.75
            assert low < 0.5 < high, "on queries of another half"
    assert "shuffled labels" in repr(space)


def test_skills_of_different_tokens_are_separated(space):
    """Also a check that low distances mean inside: the reverse would be far below one half."""
    found = space.value(Site(0, "mlp.post"), "auc_ellipsoid", "code", "prose")
    assert found.value > 0.6


def test_regions_are_fitted_on_one_half_and_judged_on_the_other(space):
    """The same numbers from the queries of each half, by hand."""
    made = tiny.model("gpt2")
    given = corpora()
    halves = {name: key_space._halves(name, c.with_prompts(seed=0), 0) for name, c in given.items()}
    n = [min(pair[part].n_rows for pair in halves.values()) for part in (0, 1)]
    assert (space.provenance["fitted"], space.provenance["held_out"]) == tuple(n)
    keys = {}
    for name, pair in halves.items():
        rows = [pair[part].sample(n[part], 0) for part in (0, 1)]
        assert not set(rows[0].keys) & set(rows[1].keys), "a document is in both halves"
        sites = lu.KeySample(999)
        keys[name] = [lu.collect(made, part, "mlp.post", statistic=sites, progress=False) for part in rows]
    for site in (Site(0, "mlp.post"), Site(1, "mlp.post")):
        box = fit_region(keys["code"][0][site])
        assert space.value(site, "log_volume", "code").value == pytest.approx(box.log_volume, abs=1e-3)
        for other in given:
            by_hand = box.score(keys[other][1][site]).sort().values
            assert space.scores_of(site, "box", "code", other).sort().values.tolist() == pytest.approx(
                by_hand.tolist(), rel=1e-4
            )
        own, theirs = (space.scores_of(site, "box", "code", name) for name in ("code", POOLED))
        assert len(theirs) == 2 * len(own)
        labels = np.r_[np.zeros(len(own)), np.ones(len(theirs))]
        auc = roc_auc_score(labels, torch.cat([own, theirs]))
        assert space.value(site, "auc_box", "code", POOLED).value == pytest.approx(auc)
        at = torch.tensor([1.0, 3.0, 9.0])
        assert space.coverage(site, "code", "prose", at).tolist() == [
            float((space.scores_of(site, "box", "code", "prose") <= c).double().mean()) for c in at
        ]


def test_results_do_not_depend_on_the_batch_size(space):
    other = lu.key_space(tiny.model("gpt2"), corpora(), ("mlp.post", "attn.z"), batch_size=1, progress=False)
    a, b = space.to_frame(), other.to_frame()
    assert a.drop(columns=["value", "low", "high"]).equals(b.drop(columns=["value", "low", "high"]))
    assert a.value.to_numpy() == pytest.approx(b.value.to_numpy(), rel=1e-3, abs=1e-3, nan_ok=True)


def test_a_seed_gives_the_same_again_and_another_seed_does_not(space):
    made = tiny.model("gpt2")
    again = lu.key_space(made, corpora(), ("mlp.post", "attn.z"), progress=False)
    pd.testing.assert_frame_equal(space.to_frame(), again.to_frame())
    other = lu.key_space(made, corpora(), ("mlp.post", "attn.z"), seed=1, progress=False)
    assert not space.to_frame().value.equals(other.to_frame().value)


def test_means_over_prompts_are_compared_when_asked_for(space):
    made, parts = tiny.model("gpt2"), corpora()
    means = lu.key_space(made, parts, SITE, pool="mean", progress=False)
    assert means.queries == f"{space.queries}, means over prompts"
    # The area of one skill's box, by keys that are collected and dealt by hand.
    fits, helds = {}, {}
    for name in ("code", "prose", "mixed"):
        fit, held = parts[name].with_prompts(seed=0).queries().split(0.5, 0.5, seed=0)
        counts = means.provenance["fitted"], means.provenance["held_out"]
        for part, count, into in ((fit, counts[0], fits), (held, counts[1], helds)):
            sample = collect(made, part.sample(count, 0), SITE, statistic=KeySample(count, pool="mean"), progress=False)
            into[name] = sample[SITE].flatten(1)
    box = fit_region(fits["code"], "box")
    found = means.scores_of(SITE, "box", "code", "prose").double().sort().values
    torch.testing.assert_close(found, box.score(helds["prose"]).double().sort().values)
    with pytest.raises(LensUnlearnError, match="pool='first' is not known"):
        lu.key_space(made, parts, SITE, pool="first", progress=False)


def test_every_skill_has_as_many_queries(space):
    given = {**corpora(), "long": tiny.corpus([12] * 200, seed=9)}
    found = lu.key_space(tiny.model("gpt2"), given, "L1.mlp.post", progress=False)
    assert {len(part) for part in found.planes[Site(1, "mlp.post")].points.values()} == {found.provenance["held_out"]}
    few = lu.key_space(tiny.model("gpt2"), corpora(), "L1.mlp.post", capacity=9, progress=False)
    assert (few.provenance["fitted"], few.provenance["held_out"]) == (9, 9)


def test_queries_of_the_fit_are_left_out_of_the_judging():
    """Many documents begin alike: cut early, they are one query."""
    document = [5, 6, 7, 8, 9, 10, 11, 12]
    alike = tiny.corpus([8] * 40, seed=3)
    tokens = alike.tokens.reshape(40, 9).clone()
    tokens[:20, 1:] = torch.tensor(document, dtype=torch.int32)
    tokens[:20, -1] = torch.arange(20, dtype=torch.int32) + 20  # documents differ, their prompts do not
    fit, held = key_space._halves("alike", replace(alike, tokens=tokens.reshape(-1)).with_prompts(6), 0)
    words = [{tuple(part.row(i).tolist()) for i in range(part.n_rows)} for part in (fit, held)]
    assert not words[0] & words[1]
    assert held.n_rows < 20


def test_natural_prompts_are_taken_as_they_are():
    given = {"code": corpora()["code"].with_prompts(5), "prose": corpora()["prose"]}
    found = lu.key_space(tiny.model("gpt2"), given, "L1.mlp.post", progress=False)
    assert found.provenance["corpora"] == {
        "code": "code.jsonl, cut into prompts",
        "prose": "prose.jsonl, cut into prompts",
    }


def test_it_shows_itself(space):
    assert repr(space).startswith("KeySpace(3 skills, 4 sites, attn.z, mlp.post; ")
    assert "L1.mlp.post" in repr(space)
    assert "code.jsonl" in space._repr_html_()
    assert space.table().shape == (4, (3 + 1) * 4 + 2), "the control stands beside the skills"
    evil = KeySpace(
        space.skills, space.values, space.scores, space.planes, {**space.provenance, "model": "<script>alert(1)"}
    )
    assert "<script>" not in evil._repr_html_()


def test_bad_input_gets_a_sentence():
    made, given = tiny.model("gpt2"), corpora()
    one = {"code": given["code"]}
    for call, error, message in (
        (lambda: lu.key_space(made, one), LensUnlearnError, "two corpora or more"),
        (lambda: lu.key_space(made, list(given.values())), LensUnlearnError, "by name"),
        (lambda: lu.key_space(made, {**one, POOLED: given["prose"]}), LensUnlearnError, "other than 'others'"),
        (lambda: lu.key_space(made, {**one, "prose": ["text"]}), LensUnlearnError, "and no corpus"),
        (lambda: lu.key_space(made, given, capacity=3), LensUnlearnError, "capacity=3"),
        (lambda: lu.key_space(made, {**one, "few": tiny.corpus([9] * 6)}), CorpusError, "few: "),
        (lambda: lu.key_space(made, {**one, "single": tiny.corpus([9])}), CorpusError, "too few to split"),
        (lambda: lu.key_space(made, given, "mlp.poss", progress=False), SiteError, "mlp.poss"),
        (lambda: lu.key_space(made, given, "L9.mlp.post", progress=False), SiteError, "L9.mlp.post"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            call()


def test_constant_keys_are_refused_by_name_and_constant_coordinates_are_borne():
    fit, held = planted(1), planted(1, seed=1)
    units = {name: torch.arange(len(part)) for name, part in held.items()}
    with pytest.raises(LensUnlearnError, match=r"^skill 1 at L0\.mlp\.post: every coordinate"):
        key_space._at_site(SITE, {**fit, "skill 1": torch.ones(20, 12)}, held, units, 0)
    for part in fit.values():
        part[:, :4] = 0.0
    values, scores, plane = key_space._at_site(SITE, fit, held, units, 0)
    assert values["skill 0", "", "floored"].value == 4
    assert all(math.isfinite(v.value) for (_, _, name), v in values.items() if name.startswith(("auc", "area")))
    assert all(bool(torch.isfinite(part).all()) for found in scores.values() for part in found.values())
    assert bool(torch.isfinite(plane.shadows["skill 0"]).all())
