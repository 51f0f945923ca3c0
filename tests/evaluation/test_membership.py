"""membership: each attack's area is that of scikit-learn on scores from plain loops over the Hugging Face model."""

import copy
import math
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from command_line_helpers import WORDS as PROSE
from interventions_helpers import selection_of, unchanged
from sklearn.metrics import roc_auc_score

import lens_unlearn as lu
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.evaluation.gradient_norm import gradient_norms
from lens_unlearn.evaluation.membership import membership, privacy_leak
from lens_unlearn.evaluation.metrics import needing
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.keyspace.regions import Clusters
from lens_unlearn.model.host import host_version
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import query_keys

QUIET = {"progress": False, "resamples": 50}
ATTACKS = [attack.name for attack in needing("membership") if attack.applies is None]
ALL = [attack.name for attack in needing("membership")]
WORDS = [*PROSE, "1", "+", "2", "=", "3", "who", "wrote", "it"]


def texts(seed: int, count: int, pool: list[str]) -> list[dict[str, str]]:
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words = [" ".join(draw.choice(pool, int(draw.integers(1, 9)))) for _ in range(2)]
        rows.append({"q": words[0], "a": words[1]})
    return rows


def pair(model: Any, **options: Any) -> tuple[Corpus, Corpus]:
    settings = {"field": "q>a", "template": "Q: {prompt}\nA: {answer}", **options}
    inside, outside = texts(0, 11, WORDS[:12]), texts(1, 14, WORDS[6:])
    return read_corpus(inside, model, **settings), read_corpus(outside, model, **settings)


def scores(plain: Any, tokenizer: Any, corpus: Corpus, k: float) -> dict[str, list[float]]:
    """One document at a time, one row at a time, float64; the text's length from its own tokens."""
    found: dict[str, list[float]] = {attack: [] for attack in ATTACKS}
    for document in range(corpus.n_documents):
        settings, normed, ids = [], [], []
        for row in (corpus.document == document).nonzero()[:, 0].tolist():
            start, end = int(corpus.starts[row]), int(corpus.starts[row + 1])
            tokens, counted = corpus.tokens[start:end].long(), corpus.counted[start:end].tolist()
            logits = tiny.logits(plain, tokens[None])[0].double()
            for place in range(len(tokens)):
                if counted[place]:
                    ids.append(int(tokens[place]))
                if counted[place] and place:
                    p = logits[place - 1].softmax(0)
                    log_p = p.log()
                    mean = float((p * log_p).sum())
                    variance = max(float((p * log_p**2).sum()) - mean**2, 1e-6)
                    settings.append(float(log_p[tokens[place]]))
                    normed.append((settings[-1] - mean) / math.sqrt(variance))
        lowest = max(1, int(k * len(settings)))
        found["mia_loss"].append(-np.mean(settings))
        found["mia_zlib"].append(-np.mean(settings) / len(zlib.compress(tokenizer.decode(ids).encode("utf-8"))))
        found["mia_min_k"].append(-np.mean(sorted(settings)[:lowest]))
        found["mia_min_k_plus_plus"].append(-np.mean(sorted(normed)[:lowest]))
    return found


def areas(plain: Any, tokenizer: Any, members: Corpus, others: Corpus, k: float) -> dict[str, float]:
    a, b = scores(plain, tokenizer, members, k), scores(plain, tokenizer, others, k)
    labels = [0] * members.n_documents + [1] * others.n_documents
    return {attack: float(roc_auc_score(labels, a[attack] + b[attack])) for attack in ATTACKS}


@pytest.mark.parametrize(("batch_size", "k"), [(1, 0.4), (8, 0.4), (3, 0.01), (2, 1.0)])
def test_the_areas_are_those_of_plain_loops(model: Any, batch_size: int, k: float) -> None:
    members, others = pair(model)
    selection = selection_of(model, share=0.3)
    plain, edited = tiny.hugging_face("gpt2"), tiny.hugging_face("gpt2")
    for site, chosen in selection.items():
        tiny.zero_rows(edited, "gpt2", site, chosen)
    with unchanged(model):
        report = membership(model, members, others, {"cut": Ablate(selection)}, k=k, batch_size=batch_size, **QUIET)
    for condition, twin in (("base", plain), ("cut", edited)):
        for attack, expected in areas(twin, model.tokenizer, members, others, k).items():
            assert report[condition, "forget", attack].value == pytest.approx(expected, abs=1e-9), (condition, attack)
            assert report[condition, "forget", attack].n == 25
    assert len({report["base", "forget", attack].value for attack in ATTACKS}) > 1


def gradients(plain: Any, corpus: Corpus) -> list[float]:
    """The norm of everything that `backward` puts into a plain model, one document at a time."""
    found = []
    for document in range(corpus.n_documents):
        plain.zero_grad()
        losses = []
        for row in (corpus.document == document).nonzero()[:, 0].tolist():
            start, end = int(corpus.starts[row]), int(corpus.starts[row + 1])
            tokens, counted = corpus.tokens[start:end].long(), corpus.counted[start:end]
            log_p = plain(tokens[None]).logits[0].log_softmax(-1)
            losses += [-log_p[at - 1, tokens[at]] for at in range(1, len(tokens)) if counted[at]]
        torch.stack(losses).mean().backward()
        found.append(
            math.sqrt(sum(float(p.grad.double().square().sum()) for p in plain.parameters() if p.grad is not None))
        )
    return found


def test_gradient_norms_and_a_reference_are_attacks_like_the_others(model: Any) -> None:
    members, others = pair(model, window=24)
    selection = selection_of(model, share=0.3)
    edited, reference = (copy.deepcopy(tiny.hugging_face("gpt2")) for _ in range(2))
    for site, chosen in selection.items():
        tiny.zero_rows(edited, "gpt2", site, chosen)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.mul_(0.8)
    other = tiny.to_bridge(reference, "gpt2", model.tokenizer)
    before = [(weight.requires_grad, weight.grad) for weight in model.parameters()]
    with unchanged(model):
        report = membership(
            model, members, others, {"cut": Ablate(selection)}, reference=other, gradients=True, **QUIET
        )
    assert [(weight.requires_grad, weight.grad) for weight in model.parameters()] == before
    labels = [0] * members.n_documents + [1] * others.n_documents
    beside = [np.array(scores(reference, model.tokenizer, one, 0.4)["mia_loss"]) for one in (members, others)]
    for condition, plain in (("base", copy.deepcopy(tiny.hugging_face("gpt2"))), ("cut", edited)):
        norms = [*gradients(plain, members), *gradients(plain, others)]
        assert report[condition, "forget", "mia_grad_norm"].value == pytest.approx(
            roc_auc_score(labels, norms), abs=1e-9
        )
        own = [np.array(scores(plain, model.tokenizer, one, 0.4)["mia_loss"]) for one in (members, others)]
        expected = roc_auc_score(labels, np.concatenate([own[0] - beside[0], own[1] - beside[1]]))
        assert report[condition, "forget", "mia_reference"].value == pytest.approx(expected, abs=1e-9)
    # A bridge of TransformerLens 3 has other parameters: projections of its own beside those of the plain model.
    off = 5e-3 if host_version().startswith("3.") else 1e-4
    assert gradient_norms(model, members) == pytest.approx(
        gradients(copy.deepcopy(tiny.hugging_face("gpt2")), members), rel=off
    )
    assert set(ALL) <= set(report.metrics)
    assert set(membership(model, members, others, {}, **QUIET).metrics) == {*ATTACKS, "privacy_leak"}


def test_documents_of_several_rows_are_one(model: Any) -> None:
    long = [" ".join(np.random.default_rng(seed).choice(WORDS, 12 + seed)) for seed in range(14)]
    members, others = (read_corpus(part, model, window=12) for part in (long[:6], long[6:]))
    assert members.n_rows > 2 * members.n_documents
    report = membership(model, members, others, {}, **QUIET)
    for attack, expected in areas(tiny.hugging_face("gpt2"), model.tokenizer, members, others, 0.4).items():
        assert report["base", "forget", attack].value == pytest.approx(expected, abs=1e-9)


def test_the_end_of_text_token_behind_an_answer_is_no_text_of_it(model: Any) -> None:
    plain, ended = (membership(model, *pair(model, answer_eos=eos), {}, **QUIET) for eos in (False, True))
    for attack in ATTACKS:
        assert ended["base", "forget", attack].value == plain["base", "forget", attack].value
        np.testing.assert_array_equal(ended["base", "forget", attack].draws, plain["base", "forget", attack].draws)


def test_identical_sets_cannot_be_distinguished(model: Any) -> None:
    members, _ = pair(model)
    shuffled = members.only([5]) + members.only(range(5)) + members.only(range(6, 11))
    report = membership(model, members, shuffled, {"cut": Ablate(selection_of(model))}, batch_size=3, **QUIET)
    for condition in ("base", "cut"):
        assert [report[condition, "forget", attack].value for attack in ATTACKS] == [0.5] * 4
        assert report[condition, "forget", "privacy_leak"].value == 0


def test_what_is_abstained_from_cannot_be_distinguished(model: Any) -> None:
    members, others = pair(model)
    site = Site(0, "mlp.post")
    keys = query_keys(model, members, [site], progress=False)[site]
    silent = Abstain({site: Clusters(keys[:1], torch.ones(keys.shape[1]), 1e6)})
    report = membership(model, members, others, {"silent": silent}, **QUIET)
    for attack in ("mia_loss", "mia_min_k", "mia_min_k_plus_plus"):
        assert report["silent", "forget", attack].value == 0.5
        assert report["base", "forget", attack].value != 0.5
    sizes = [[1 / len(zlib.compress(a.text.encode())) for a in one.answers if a] for one in (members, others)]
    expected = np.mean([(x < y) + 0.5 * (x == y) for x in sizes[0] for y in sizes[1]])
    assert report["silent", "forget", "mia_zlib"].value == pytest.approx(expected, abs=0.06)


def test_conditions_share_resamples_and_replicates_are_averaged(model: Any) -> None:
    members, others = pair(model)
    one, two = Ablate(selection_of(model, share=0.3)), Ablate(selection_of(model, share=0.8))
    conditions = {"same": None, "one": one, "two": two, "twice": [one, one], "both": [one, two]}
    report = membership(model, members, others, conditions, name="facts", **QUIET)
    again = membership(model, members, others, {"one": one}, name="facts", **QUIET)
    for attack in ATTACKS:
        got = {name: report[name, "facts", attack] for name in report.conditions}
        np.testing.assert_array_equal(got["same"].draws, got["base"].draws)
        np.testing.assert_array_equal(got["twice"].draws, got["one"].draws)
        np.testing.assert_array_equal(again["one", "facts", attack].draws, got["one"].draws)
        assert got["both"].value == pytest.approx((got["one"].value + got["two"].value) / 2)
        low, high = got["one"].interval()
        assert 0 <= low <= got["one"].value <= high <= 1
    settings = report.provenance["membership"]
    assert (settings["members"]["documents"], settings["nonmembers"]["documents"], settings["k"]) == (11, 14, 0.4)
    beside = lu.evaluate(model, {"facts": members}, {"one": one}, progress=False, resamples=50)
    both = beside + again
    assert {"loss", "mia_zlib", "privacy_leak"} <= set(both.metrics)
    assert both.provenance["corpora"]["facts"]["documents"] == 11
    alone = membership(model, members.only([0]), others, {}, **QUIET)["base", "forget", "mia_loss"]
    assert np.isnan(alone.interval()).all()


def test_privacy_leak_is_relative_to_a_retrained_model(model: Any) -> None:
    assert privacy_leak(0.5) == 0
    assert privacy_leak(1.0) == pytest.approx(-1)
    assert privacy_leak(0.0) == pytest.approx(1)
    assert privacy_leak(0.6, 0.6) == 0
    auc, retrained = 0.8, 0.55
    assert privacy_leak(auc, retrained) == pytest.approx(((1 - auc) - (1 - retrained)) / ((1 - retrained) + 1e-10))
    members, others = pair(model)
    report = membership(model, members, others, {}, retrained=0.6, **QUIET)
    area, leak = report["base", "forget", "mia_min_k"], report["base", "forget", "privacy_leak"]
    assert leak.value == pytest.approx(privacy_leak(area.value, 0.6))
    np.testing.assert_allclose(leak.draws, (0.6 - area.draws) / 0.4, rtol=1e-6, atol=1e-9)


def test_what_cannot_be_compared_is_refused(model: Any) -> None:
    members, others = pair(model)
    for options, settings in (
        ({"k": 0.0}, "k=0.0 is no share of tokens"),
        ({"k": 1.5}, "k=1.5 is no share of tokens"),
        ({"retrained": 1.0}, "retrained=1.0 is no AUC to compare with"),
    ):
        with pytest.raises(LensUnlearnError, match=settings):
            membership(model, members, others, {}, **options, **QUIET)
    alien = replace(others, vocabulary="another")
    with pytest.raises(CorpusError, match="was tokenized with another vocabulary"):
        membership(model, members, alien, {}, **QUIET)
    mute = tiny.model("native-gpt2")
    with pytest.raises(CorpusError, match="this model has no tokenizer"):
        membership(mute, tiny.corpus(), tiny.corpus(), {}, **QUIET)
    blind = replace(others, counted=torch.zeros_like(others.counted))
    with pytest.raises(CorpusError, match="no token that anything predicts"):
        membership(model, members, blind, {}, **QUIET)
    with pytest.raises(LensUnlearnError, match="the condition 'base' is the unedited model"):
        membership(model, members, others, {"base": Ablate(selection_of(model))}, **QUIET)


def test_the_demo_models_facts_are_distinguished_from_new_ones() -> None:
    with tiny.quiet():
        knows = lu.load_model("demo", device="cpu")
        never = lu.load_model(str(lu.demo.WITHOUT_FACTS_DIR), device="cpu")
    members, others = (read_corpus(f"demo:facts_{name}:train", knows) for name in ("forget", "holdout"))
    found = [membership(one, members, others, {}, batch_size=32, **QUIET) for one in (knows, never)]
    for attack in ATTACKS:
        assert found[0]["base", "forget", attack].value > 0.95
        assert 0.3 < found[1]["base", "forget", attack].value < 0.7
    assert found[0]["base", "forget", "privacy_leak"].value < -0.9
