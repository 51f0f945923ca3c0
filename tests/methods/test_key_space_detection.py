"""Key Space Detection: planted keys are found, budgets are kept, and with layer and alpha given it is the published box."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from collect_helpers import run_until
from hypothesis import given
from hypothesis import strategies as st
from positions_helpers import run
from torch import Tensor

from lens_unlearn.core.errors import ArtefactError, CorpusError, EmptyStatisticError, LensUnlearnError, SiteError
from lens_unlearn.core.intervals import auc, wilson
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.keyspace.regions import Box, Clusters, Contrast, Ellipsoid, Linear
from lens_unlearn.methods.key_space_detection import _effective, _limit, key_space_detection
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import collect, query_keys
from lens_unlearn.neurons.key_sample import KeySample

LAYERS = 5
WIDTH = 12


def layers(count: int = LAYERS) -> Any:
    """What is looked at of a model whose keys are given."""
    return SimpleNamespace(cfg=SimpleNamespace(n_layers=count))


def post(layer: int) -> Site:
    return Site(layer, "mlp.post")


def sample(keys: Mapping[Site, Tensor], start: int = 0) -> KeySample:
    """Keys of one document each."""
    made = KeySample(10_000)
    count = len(next(iter(keys.values())))
    made.locate(torch.arange(start, start + count), torch.zeros(count, dtype=torch.long))
    for site, values in keys.items():
        made.update(site, values, torch.ones(count))
    return made


def planted(
    shifts: Sequence[float], n: int = 200, m: int = 200, seed: int = 0, width: int = WIDTH
) -> tuple[KeySample, KeySample]:
    """Forget and retain keys that are shifted against one another in every layer by so many standard deviations."""
    generator = torch.Generator().manual_seed(seed)

    def keys(count: int, sign: float) -> dict[Site, Tensor]:
        return {
            post(number): torch.randn(count, width, generator=generator) + sign * shift / 2
            for number, shift in enumerate(shifts)
        }

    return sample(keys(n, 1)), sample(keys(m, -1), 100_000)


def detect(forget: Any, retain: Any = None, count: int = LAYERS, **options: Any) -> Abstain:
    return key_space_detection(layers(count), forget, retain, progress=False, **options)


def fired(act: Abstain, keys: KeySample) -> Tensor:
    """Which keys an intervention abstains at."""
    inside = torch.stack([region.contains(keys[site]) for site, region in act.regions.items()])
    return inside.sum(0) >= act.vote


# --- choosing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("region", ["box", "ellipsoid", "clusters", "contrast", "linear", "auto"])
@pytest.mark.parametrize("where", [0, 2, 4])
def test_the_layer_that_tells_the_skills_apart_is_found(region: Any, where: int) -> None:
    forget, retain = planted([4.0 if number == where else 0.0 for number in range(LAYERS)])
    act = detect(forget, retain, region=region)
    assert list(act.regions) == [post(where)]
    assert act.vote == 1
    assert act.rates["detection"][0] > 0.95
    assert act.rates["false_alarms"][0] <= 0.15
    assert act.rates["auc"][str(post(where))] > 0.99
    fresh_forget, fresh_retain = planted([4.0 if number == where else 0.0 for number in range(LAYERS)], seed=1)
    assert float(fired(act, fresh_forget).double().mean()) > 0.9
    assert float(fired(act, fresh_retain).double().mean()) < 0.15
    assert "held-out queries" in repr(act)


@pytest.mark.parametrize("budget", [0.0, 0.05, 0.1, 0.29, 1.0])
@pytest.mark.parametrize("m", [60, 137, 200])
@pytest.mark.parametrize("layer", [1, None, [0, 1, 2]])
def test_a_fresh_query_completes_the_budget_of_those_that_set_alpha(budget: float, m: int, layer: Any) -> None:
    """Of n queries that set alpha, and one more, the lowest j + 1 may be inside: (j + 1) / (n + 1) <= budget."""
    forget, retain = planted([0.8] * 3, n=60, m=m)
    act = detect(forget, retain, 3, layer=layer, false_alarms=budget)
    shares = (2, 1) if layer == 1 else (1, 2, 1)
    parts = retain.split(*shares, seed=0)
    to_set, to_state = parts[-2:]
    allowed = max((j for j in range(to_set.n + 1) if j + 1 <= budget * (to_set.n + 1) + 1e-9), default=0)
    assert int(fired(act, to_set).sum()) == allowed, "the largest factor that keeps the budget"
    assert act.rates["false_alarms"][0] == pytest.approx(float(fired(act, to_state).double().mean()))
    assert act.rates["false_alarms"][3] == to_state.n
    assert act.rates["detection"][3] == (24 if layer == 1 else 12), "40 % of the forget documents, or the half of these"
    if budget * (to_set.n + 1) < 1:
        assert all(region.limit == 0 for region in act.regions.values())


def test_a_budget_that_so_few_queries_cannot_promise_is_kept_by_abstaining_from_nothing() -> None:
    forget, retain = planted([4.0], n=60, m=50)
    with pytest.warns(
        RuntimeWarning, match=r"^false_alarms=0\.02 cannot be kept by alpha set on 33 independent .* 49 are needed"
    ):
        act = detect(forget, retain, 1, false_alarms=0.02, control=False)
    with pytest.warns(RuntimeWarning) as told:  # and is not told again of shuffled labels
        detect(forget, retain, 1, false_alarms=0.02)
    assert len(told) == 1
    assert act.rates["detection"][0] == act.rates["false_alarms"][0] == 0
    assert not bool(fired(act, forget).any())


def test_queries_of_one_document_count_as_few_as_they_are_alike() -> None:
    units, draw = torch.arange(200) // 10, torch.Generator().manual_seed(0)
    own, shared = torch.randn(200, generator=draw), torch.randn(20, generator=draw)[units]
    assert _effective(own, torch.arange(200)) == 200
    assert 120 < _effective(own, units) <= 200
    assert _effective(shared + 1e-3 * own, units) == pytest.approx(20, rel=0.02)
    assert 20 < _effective(shared + own, units) < 60
    assert _effective(own, torch.zeros(200)) == 1


def test_the_intraclass_correlation_is_that_of_the_analysis_of_variance() -> None:
    draw = np.random.default_rng(0)
    units = np.repeat(np.arange(12), draw.integers(1, 9, 12))
    scores = draw.normal(size=12)[units] + draw.normal(size=len(units))
    ranks = scores.argsort().argsort().astype(float)
    groups = [ranks[units == u] for u in range(12)]
    n, sizes = len(ranks), np.array([len(g) for g in groups])
    msb = sum(len(g) * (g.mean() - ranks.mean()) ** 2 for g in groups) / 11
    msw = sum(((g - g.mean()) ** 2).sum() for g in groups) / (n - 12)
    n0 = (n - (sizes**2).sum() / n) / 11
    rho = (msb - msw) / (msb + (n0 - 1) * msw)
    expected = n / (1 + ((sizes**2).sum() / n - 1) * rho)
    assert _effective(torch.from_numpy(scores), torch.from_numpy(units)) == pytest.approx(expected)


@given(st.lists(st.sampled_from([0.5, 1.0, 1.0000001192092896, 1.5, 2.0]), min_size=1, max_size=30), st.integers(0, 30))
def test_the_limit_lets_in_no_more_than_allowed_also_where_scores_are_equal_or_neighbours(
    scores: list[float], allowed: int
) -> None:
    retain = torch.tensor(scores)
    limit = _limit(retain, allowed)
    inside = int((retain <= limit).sum())
    assert inside <= allowed
    ordered = sorted(scores)
    if allowed >= len(scores):
        assert inside == len(scores)
    else:
        assert limit < ordered[allowed] <= np.nextafter(np.float32(limit), np.float32(9)), "just below the next"
    assert Box(torch.zeros(1, 1), torch.ones(1), limit).contains(retain[:, None]).sum() == inside, "as a region sees it"


def test_alpha_chosen_is_in_units_of_the_score_that_covers_the_fit() -> None:
    forget, retain = planted([3.0], n=100)
    act = detect(forget, retain, 1)
    [region] = act.regions.values()
    fit, _ = forget.split(0.6, 0.4, seed=0)
    keys = fit[post(0)].double()
    k = float(((keys - keys.mean(0)) / keys.std(0)).abs().max())
    assert region.k == pytest.approx(k, rel=1e-5), "fitted on 60 % of the forget documents, and on no others"
    assert region.limit == pytest.approx(region.alpha * k, rel=1e-5)
    torch.testing.assert_close(region.centres[0].double(), keys.mean(0), rtol=1e-5, atol=1e-6)


def test_held_out_queries_may_be_given_and_then_all_the_rest_is_fitted() -> None:
    forget, retain = planted([3.0, 0.0], n=100)
    held_forget, held_retain = planted([3.0, 0.0], n=30, m=100, seed=7)
    act = detect(forget, retain, 2, held_out=(held_forget, held_retain))
    [region] = act.regions.values()
    torch.testing.assert_close(region.centres[0].double(), forget[post(0)].double().mean(0), rtol=1e-5, atol=1e-6)
    assert (act.rates["detection"][3], act.rates["false_alarms"][3]) == (15, 25), "the others chose, and set alpha"
    alone = detect(forget, None, 2, held_out=(held_forget, held_retain))
    own = {name: rate for name, rate in act.rates.items() if name != "control"}
    assert alone.rates == own, "a box is not fitted on retain queries; without them there are no labels to shuffle"


def test_several_weak_layers_outvote_one() -> None:
    """Independent evidence at five layers: a majority of them tells more than the best."""
    forget, retain = planted([2.2] * 5, n=500, m=500, width=2)
    act = detect(forget, retain, region="ellipsoid")
    assert len(act.regions) >= 3
    assert act.vote == len(act.regions) // 2 + 1
    one = max(
        (detect(forget, retain, region="ellipsoid", layer=number) for number in range(5)),
        key=lambda single: single.rates["detection"][0],
    )
    assert act.rates["detection"][0] > one.rates["detection"][0] + 0.05
    three = detect(forget, retain, region="ellipsoid", vote=2)
    assert (len(three.regions), three.vote) == (3, 2)


def test_layers_that_were_named_all_vote_and_a_majority_is_needed() -> None:
    forget, retain = planted([3.0, 0.0, 3.0, 3.0, 0.0])
    assert detect(forget, retain, layer=[0, 2, 3]).vote == 2
    assert list(detect(forget, retain, layer=[3, 0]).regions) == [post(0), post(3)]
    assert detect(forget, retain, layer=[0, 3]).vote == 2
    assert detect(forget, retain, layer=[0, 3], vote=1).vote == 1
    assert list(detect(forget, retain, layer=-1).regions) == [post(4)]
    assert list(detect(forget, retain, layer=[-2, 3, 3]).regions) == [post(3)]


def test_with_alpha_given_the_layer_is_the_one_where_it_tells_most_apart() -> None:
    forget, retain = planted([0.0, 5.0, 0.0], n=100)
    act = detect(forget, retain, 3, alpha=1.0)
    assert list(act.regions) == [post(1)]
    [region] = act.regions.values()
    assert region.limit == region.k
    assert act.rates["false_alarms"][0] < 0.05


@pytest.mark.parametrize(
    ("name", "kind"),
    [("box", Box), ("ellipsoid", Ellipsoid), ("clusters", Clusters), ("contrast", Contrast), ("linear", Linear)],
)
def test_regions_are_of_the_shape_asked_for_and_auto_is_as_good_as_the_best(name: Any, kind: type) -> None:
    forget, retain = planted([1.5], n=150)
    act = detect(forget, retain, 1, region=name)
    assert type(act.regions[post(0)]) is kind
    auto = detect(forget, retain, 1, region="auto")
    if name not in ("contrast", "linear"):  # whose held-out retain queries are fewer, as those of "auto" are
        held = forget.split(0.6, 0.4, seed=0)[1], retain.split(0.6, 0.4, seed=0)[1]
        same = detect(forget.split(0.6, 0.4, seed=0)[0], None, 1, region=name, held_out=held)
        assert auto.rates["detection"][0] >= same.rates["detection"][0]
    else:
        assert auto.rates["detection"][0] >= act.rates["detection"][0]


def test_a_contrast_is_fitted_on_one_part_of_the_retain_queries_and_judged_on_the_other() -> None:
    forget, retain = planted([1.0], n=100, m=100)
    act = detect(forget, retain, 1, region="contrast")
    assert act.rates["false_alarms"][3] == 20, "40 % are fitted, 40 % set alpha"
    region = act.regions[post(0)]
    assert isinstance(region, Contrast)
    fitted = retain.split(0.4, 0.6, seed=0)[0][post(0)]
    torch.testing.assert_close(region.other_centre.double(), fitted.double().mean(0), rtol=1e-5, atol=1e-6)


def test_the_same_seed_gives_the_same_and_another_splits_otherwise() -> None:
    forget, retain = planted([1.0] * 3, n=80)

    def rates(seed: int) -> Any:
        act = detect(forget, retain, 3, region="clusters", seed=seed)
        return repr(act), act.rates, [region.limit for region in act.regions.values()]

    state = torch.get_rng_state()
    assert rates(0) == rates(0)
    assert rates(0) != rates(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_choosing_among_layers_that_say_nothing_promises_nothing() -> None:
    forget, retain = planted([0.0] * LAYERS, n=300, m=300)
    act = detect(forget, retain)
    low, high = act.rates["detection"][1:3]
    assert low < 0.1, "the interval says that it may be no better than the false positive rate"
    assert high < 0.3
    assert set(act.rates["control"]) == {"detection", "false_alarms", "auc"}


def test_the_control_is_the_same_method_fitted_to_shuffled_labels() -> None:
    forget, retain = planted([4.0, 0.0], n=150, m=150)
    act = detect(forget, retain, 2, seed=3)
    assert act.rates["detection"][0] > 0.9
    assert act.rates["control"]["detection"][0] < 0.3
    by_hand = detect(*forget.shuffled(retain, 3), 2, seed=3, control=False)
    assert act.rates["control"] == by_hand.rates
    assert "control" not in by_hand.rates
    assert re.search(
        r"detection \d+% \[\d+%, \d+%\] of 30 held-out queries \(shuffled labels: \d+%\), false pos", repr(act)
    )
    assert "shuffled" not in repr(by_hand)


# --- rates ---------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 500), st.floats(0, 1))
def test_intervals_are_wilsons(n: int, share: float) -> None:
    from scipy.stats import binomtest

    hits = round(share * n)
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson(hits, n) == (pytest.approx(expected.low, abs=1e-6), pytest.approx(expected.high, abs=1e-6))
    assert 0 <= wilson(hits, n)[0] <= hits / n + 1e-12
    assert hits / n - 1e-12 <= wilson(hits, n)[1] <= 1


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30), st.lists(st.integers(0, 8), min_size=1, max_size=30))
def test_the_area_is_that_of_scikit_learn_also_with_ties(inside: list[int], outside: list[int]) -> None:
    from sklearn.metrics import roc_auc_score

    expected = roc_auc_score([1] * len(inside) + [0] * len(outside), [-s for s in inside + outside])
    assert auc(torch.tensor(inside) / 7, torch.tensor(outside) / 7)[0] == pytest.approx(expected, abs=1e-9)


def test_the_rates_in_the_file_are_those_measured(tmp_path: Path) -> None:
    forget, retain = planted([2.0, 1.0], n=100)
    act = detect(forget, retain, 2, refusal="No.", when="every_token")
    [(site, region)] = act.regions.items()
    held = forget.split(0.6, 0.4, seed=0)[1].split(1, 1, seed=0)[1]
    hits = int(region.contains(held[site]).sum())
    assert act.rates["detection"] == [hits / 20, *wilson(hits, 20), 20]
    to_state = retain.split(1, 2, 1, seed=0)[2]
    assert act.rates["auc"][str(site)] == auc(region.score(held[site]), region.score(to_state[site]))[0]
    with pytest.warns(UserWarning, match="will not know its model"):
        act.save(tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="does not know its model"):
        again = load_intervention(tmp_path / "a.safetensors")
    assert isinstance(again, Abstain)
    assert again.rates == act.rates
    assert (again.refusal, again.when, repr(again)) == ("No.", "every_token", repr(act))


# --- the published method, in a model ------------------------------------------------------------------------------------


def prompts(count: int = 30, seed: int = 0, tokens: Sequence[int] | None = None, bos: bool = True) -> Corpus:
    """Prompts with answers: tokens whose last few count."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(5, 12, count).tolist()
    return tiny.corpus(lengths, seed=seed, tokens=tokens, bos=bos).with_prompts(seed=seed)


def keys_by_plain_hooks(name: str, corpus: Corpus) -> dict[Site, np.ndarray]:
    """The key at the last token of every prompt, each run alone in the plain model, in float64."""
    found: dict[Site, list[Tensor]] = {}
    plain = tiny.hugging_face(name)
    for row in range(corpus.n_rows):
        for site, value in tiny.plain_activations(plain, name, ["mlp.post"], corpus.prompt(row)[None]).items():
            found.setdefault(site, []).append(value[0, -1].double())
    return {site: torch.stack(keys).numpy() for site, keys in found.items()}


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("alpha", [0.7, 1.4])
def test_with_layer_and_alpha_it_is_mu_plus_minus_alpha_k_sigma(name: str, alpha: float) -> None:
    model, forget = tiny.model(name), prompts(30)
    act = key_space_detection(model, forget, layer=-1, alpha=alpha, progress=False)
    assert list(act.regions) == [post(1)]
    keys = keys_by_plain_hooks(name, forget)[post(1)]
    mean, sigma = keys.mean(0), keys.std(0, ddof=1)
    floor = 0.1 * np.sort(sigma[sigma > 0])[(np.count_nonzero(sigma) - 1) // 2]
    floored = sigma < floor
    sigma = np.maximum(sigma, floor)
    k = (np.abs(keys - mean) / sigma).max()
    region = act.regions[post(1)]
    assert region.floored == floored.sum()
    assert region.k == pytest.approx(k, rel=1e-4)
    assert region.limit == pytest.approx(alpha * k, rel=1e-4)
    np.testing.assert_allclose(region.centres[0].numpy(), mean, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(region.scale.numpy(), sigma, rtol=1e-3, atol=1e-6)
    assert (act.rates, act.vote, act.when) == ({}, 1, "prompt")
    # And so the model abstains exactly from the queries inside.
    others = prompts(40, seed=5)
    score = (np.abs(keys_by_plain_hooks(name, others)[post(1)] - mean) / sigma).max(1)
    clear = np.abs(score / (alpha * k) - 1) > 1e-3
    decided = []
    with act.on(model) as live:
        for row in range(others.n_rows):
            run(model, others.prompt(row)[None])
            decided += live.abstained.tolist()
    assert np.array_equal(np.array(decided)[clear], (score < alpha * k)[clear])
    assert 0 < sum(decided) < 40 or alpha == 0.7


def test_with_layer_and_alpha_retain_and_held_out_are_not_looked_at() -> None:
    model, forget = tiny.model("gpt2"), prompts(20)
    settings = {"layer": 0, "alpha": 1.2, "progress": False}
    expected = key_space_detection(model, forget, **settings)
    for other in (object(), prompts(20, seed=3)):
        act = key_space_detection(model, forget, other, held_out=(other, other), **settings)  # type: ignore[arg-type]
        assert torch.equal(act.regions[post(0)].centres, expected.regions[post(0)].centres)
        assert act.regions[post(0)].limit == expected.regions[post(0)].limit


@pytest.mark.parametrize("name", ["gpt2", "llama", *tiny.HOOKED[:1]])
def test_skills_with_their_own_tokens_are_separated_in_a_model(name: str) -> None:
    model = tiny.model(name)
    forget, retain = prompts(120, 1, tokens=range(3, 9)), prompts(160, 2, tokens=range(200, 320))
    act = key_space_detection(model, forget, retain, false_alarms=0.1, region="auto", progress=False)
    assert act.rates["detection"][0] > 0.6
    fresh = prompts(50, 3, tokens=range(3, 9)), prompts(50, 4, tokens=range(200, 320))
    shares = []
    for corpus in fresh:
        hits = 0
        with act.on(model) as live:
            for batch in corpus.queries().batches(8):
                live.expect(batch.counted.int().argmax(1))
                run(model, batch.tokens)
                hits += int(live.abstained.sum())
        shares.append(hits / corpus.n_rows)
    assert shares[0] > 0.5
    assert shares[1] < 0.3
    # The same from keys that were taken beforehand, at whatever batch size.
    keys = [query_keys(model, part, batch_size=size, progress=False) for part, size in ((forget, 1), (retain, 64))]
    again = key_space_detection(model, *keys, false_alarms=0.1, region="auto", progress=False)
    assert repr(again) == repr(act)
    for site, region in act.regions.items():
        torch.testing.assert_close(again.regions[site].centres, region.centres)


def test_plain_texts_are_cut_into_prompts_first() -> None:
    model, texts = tiny.model("gpt2"), tiny.corpus([9] * 20, seed=1)
    plain = query_keys(model, texts, progress=False, seed=4)
    cut = query_keys(model, texts.with_prompts(seed=4), progress=False, seed=4)
    assert plain.n == cut.n == 20
    for site in plain.sites:
        assert torch.equal(plain[site], cut[site])


# --- refusals ------------------------------------------------------------------------------------------------------------

FORGET, RETAIN = planted([1.0, 1.0], n=40, m=40)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": 2}, "^there is no layer 2: this model has layers 0 to 1, -1 is the last$"),
        ({"layer": -3}, "^there is no layer -3: this model has layers 0 to 1"),
        ({"layer": [0, 7]}, "^there is no layer 7"),
        ({"layer": []}, r"^layer=\[\] names no layer: give one at least, or None to choose$"),
        ({"coverage": 0.0}, r"^coverage=0\.0 is out of range"),
        ({"coverage": 2.0}, r"^coverage=2\.0 is out of range"),
        ({"alpha": 0.0}, r"^alpha=0\.0 is out of range: give a number above 0$"),
        ({"alpha": -1.4, "layer": 0}, r"^alpha=-1\.4 is out of range"),
        ({"vote": 0}, "^vote=0 needs"),
        ({"vote": 2}, "^vote=2 needs 3 layers for a majority, and there are 2$"),
        ({"vote": 2, "layer": 0}, "^vote=2 of 1 layers: from 1 to the number of layers$"),
        ({"vote": 0, "layer": [0, 1]}, "^vote=0 of 2 layers"),
        ({"vote": 3, "layer": [0, 1], "alpha": 1.0}, "^vote=3 of 2 layers"),
        ({"region": "cube"}, "^region='cube' is not known"),
        ({"when": "never"}, "^when='never' is not known: choose from prompt, every_token$"),
        ({"false_alarms": 1.2}, "false_alarms"),
        ({"false_alarms": -0.1}, "false_alarms"),
        ({"retain": None}, "^choosing a layer or alpha needs retain queries: give retain, or both layer and alpha$"),
        ({"retain": None, "layer": 0}, "^choosing a layer or alpha needs retain queries"),
        ({"retain": None, "alpha": 1.0}, "^choosing a layer or alpha needs retain queries"),
        ({"retain": None, "layer": 0, "alpha": 1.0, "region": "contrast"}, "needs retain queries to fit on"),
        ({"forget": planted([1.0, 1.0], n=1)[0]}, "^1 documents are too few to split into 2 parts"),
        ({"forget": planted([1.0, 1.0], n=9)[0]}, "^5 queries are too few to fit a region: give at least 8$"),
        (
            {"forget": planted([1.0, 1.0], n=14)[0]},
            "^6 held-out forget queries are too few to choose on: at least 8; read more tokens, or shorter rows$",
        ),
        (
            {"retain": planted([1.0, 1.0], m=7)[1]},
            "^7 held-out retain queries are too few to choose on",
        ),
        ({"forget": planted([1.0, 1.0], n=5)[0], "layer": 1, "alpha": 1.0}, "^5 queries are too few"),
        ({"site": "mlp.pre"}, r"there is no key of mlp\.pre: collect over it first"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(options: dict[str, Any], words: str) -> None:
    given = {"forget": FORGET, "retain": RETAIN, **options}
    with pytest.raises(LensUnlearnError, match=words):
        detect(given.pop("forget"), given.pop("retain"), 2, **given)


def test_queries_that_all_end_in_the_same_state_are_refused() -> None:
    same = {post(number): torch.ones(40, WIDTH) * 3 for number in range(2)}
    with pytest.raises(LensUnlearnError, match="every coordinate of the keys is constant"):
        detect(sample(same), RETAIN, 2)
    model = tiny.model("gpt2")
    row = prompts(1)
    copies = row
    for number in range(11):
        other = Corpus(**{**row.__dict__, "keys": (f"copy {number}",)})
        copies = copies + other
    with pytest.raises(LensUnlearnError, match="every coordinate of the keys is constant"):
        key_space_detection(model, copies, layer=0, alpha=1.0, progress=False)


def test_corpora_without_prompts_or_beyond_the_context_are_refused() -> None:
    model = tiny.model("gpt2")
    with pytest.raises(CorpusError, match=r"has no prompts: read it as 'question>answer', or cut its texts"):
        tiny.corpus().queries()
    with pytest.raises(CorpusError, match="no row of .* is longer than a prompt"):
        query_keys(model, tiny.corpus([1, 1, 1]), progress=False)
    long = tiny.corpus([100] * 10).with_prompts(80)
    with pytest.raises(CorpusError, match="rows longer than this model's context of 64 tokens"):
        query_keys(model, long, progress=False)
    with pytest.raises(CorpusError, match="rows longer than this model's context"):
        key_space_detection(model, long, layer=0, alpha=1.0, progress=False)
    with pytest.raises(SiteError, match="did you mean"):
        key_space_detection(model, prompts(20), layer=0, alpha=1.0, site="mlp.poost", progress=False)
    with pytest.raises(EmptyStatisticError, match="no key of"):
        KeySample()[post(0)]


def test_an_unlucky_infinite_score_is_never_inside() -> None:
    """Scores may be infinite where a key is far beyond single precision; such a query is only ever outside."""
    assert _limit(torch.tensor([1.0, math.inf, math.inf]), 1) == 1.0
    assert _limit(torch.tensor([1.0, 2.0, math.inf]), 2) == 2.0
    assert _limit(torch.tensor([1.0, 2.0, math.inf]), 3) == 2.0


def test_an_interrupted_sample_goes_on_to_bitwise_the_same_and_other_seeds_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, corpus, file = tiny.model("gpt2"), tiny.corpus((9, 3, 14, 5, 6, 11)), tmp_path / "run.safetensors"
    options = {"statistic": KeySample(10, seed=2), "batch_size": 1, "progress": False}
    whole = collect(model, corpus, **options)
    for batch in range(5):
        run_until(monkeypatch, batch, model, corpus, **options, checkpoint=file)
        for other in (KeySample(10, seed=3), KeySample(11, seed=2), KeySample(10)):
            with pytest.raises(ArtefactError, match="statistic"):
                collect(model, corpus, **{**options, "statistic": other}, checkpoint=file)
        again = collect(model, corpus, **options, checkpoint=file)
        assert all(torch.equal(again.state()[name], tensor) for name, tensor in whole.state().items())
        assert not file.exists()


def test_of_several_retain_sources_each_keeps_the_budget() -> None:
    """Where one source lies nearer than the others, together they leave it far above the budget; in a list, it decides."""
    generator = torch.Generator().manual_seed(5)

    def sample(mean: float, first: int, n: int = 400) -> KeySample:
        part = KeySample(10_000)
        part.locate(torch.arange(first, first + n), torch.zeros(n, dtype=torch.long))
        part.update(post(0), torch.randn(n, 6, generator=generator) + mean, torch.ones(n))
        return part

    forget, near, far = sample(0.0, 0), sample(1.0, 10_000), sample(6.0, 20_000, 3600)
    fresh = torch.randn(20_000, 6, generator=generator) + 1.0
    found = {}
    for name, retain in (("together", near.merge(far)), ("each", [near, far])):
        act = detect(forget, retain, 1, region="ellipsoid", layer=0, false_alarms=0.05)
        found[name] = float(act.regions[post(0)].contains(fresh).double().mean())
    assert found["together"] > 0.3
    assert found["each"] < 0.08
    of_each = act.rates["false_alarms of each"]
    assert [rate[3] for rate in of_each] == [pytest.approx(133, abs=40), pytest.approx(1200, abs=100)]
    assert of_each[1][0] == 0.0
