"""What the tests of figures share: made-up maps, statistics, reports and records, and every figure drawn of them."""

import base64
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import plotly.graph_objects as go
import torch
from skill_graph_helpers import graph

import lens_unlearn as lu
from lens_unlearn.audit.attack import Attack
from lens_unlearn.audit.audit import Audit
from lens_unlearn.evaluation.report import Measure, Report
from lens_unlearn.evaluation.tofu import ForgetQuality, Utility
from lens_unlearn.keyspace import key_space
from lens_unlearn.keyspace.key_space import KeySpace
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.attribution import Attribution, Completeness, critical
from lens_unlearn.neurons.histogram import Histogram
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.moments import Moments


def array(value) -> np.ndarray:
    """Read what plotly 6 writes as base64, or a plain list."""
    if isinstance(value, dict):
        flat = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
        shape = value.get("shape")
        return flat.reshape([int(n) for n in shape.split(",")]) if shape else flat
    return np.array(value, dtype=float)


def data(fig: go.Figure) -> dict:
    """Serialize as a notebook would."""
    return json.loads(fig.to_json())


def scores(layers=4, width=24, heads=(2, 3), seed=0) -> NeuronMap:
    random = torch.Generator().manual_seed(seed)
    values = {Site(layer, "mlp.post"): torch.rand(width, generator=random) * 3 for layer in range(layers)}
    if heads:
        values |= {Site(layer, "attn.z"): torch.rand(heads, generator=random) * 3 for layer in range(layers)}
    return NeuronMap(values)


def moments(seed=0, layers=3, width=40, constant=None) -> Moments:
    random = torch.Generator().manual_seed(seed)
    stats = Moments()
    for layer in range(layers):
        for kind, shape in (("mlp.post", (width,)), ("attn.z", (2, 3))):
            x = torch.randn((50, *shape), generator=random) if constant is None else torch.full((50, *shape), constant)
            stats.update(Site(layer, kind), x, torch.ones(50))
    stats.provenance = {"model": "tiny", "corpus": f"corpus{seed}", "tokens": 5000}
    return stats


def histogram(seed=0) -> Histogram:
    random = torch.Generator().manual_seed(seed)
    stats = Histogram()
    stats.update(Site(0, "mlp.post"), torch.randn(500, 4, generator=random), torch.ones(500))
    stats.update(Site(0, "attn.z"), torch.randn(500, 2, 3, generator=random), torch.ones(500))
    return stats


def report(values: dict[str, dict[str, float]], sd=0.01, draws=200, metric="top1") -> Report:
    """Make a report from condition -> corpus -> value."""
    random = np.random.default_rng(0)
    measures = {
        (condition, corpus, metric): Measure(value, value + sd * random.standard_normal(draws), 1000)
        for condition, by_corpus in values.items()
        for corpus, value in by_corpus.items()
    }
    corpora = {
        name: {"source": f"{name}.jsonl", "tokens": 1000, "documents": 9} for name in next(iter(values.values()))
    }
    return Report(measures, {"model": "tiny", "corpora": corpora})


def keys(layers=3, skills=("code", "prose", "math"), n=12, width=8, kinds=("mlp.post",), name="tiny") -> KeySpace:
    """Make a key space of random keys whose centres are apart."""
    random = torch.Generator().manual_seed(0)
    values, scores, planes = {}, {}, {}
    units = {skill: torch.arange(n) + n * i for i, skill in enumerate(skills)}
    for site in [Site(layer, kind) for kind in kinds for layer in range(layers)]:
        halves = [{s: torch.randn(n, width, generator=random) + 2 * i for i, s in enumerate(skills)} for _ in range(2)]
        measures, distances, planes[site] = key_space._at_site(site, *halves, units, 0)
        values |= {(site, *key): value for key, value in measures.items()}
        scores |= {(site, *key): value for key, value in distances.items()}
    corpora = {skill: f"{skill}.jsonl, cut into prompts" for skill in skills}
    return KeySpace(
        tuple(skills), values, scores, planes, {"model": name, "corpora": corpora, "fitted": n, "held_out": n}
    )


def of_keys(space: KeySpace) -> dict[str, go.Figure]:
    return {
        "key_space": lu.plot.key_space(space),
        "key_clusters": lu.plot.key_clusters(space),
        "key_volume": lu.plot.key_volume(space),
        "key_coverage": lu.plot.key_coverage(space),
        "key_roc": lu.plot.key_roc(space),
        "key_map": lu.plot.key_map(space),
        "key_shadow": lu.plot.key_map(space, outline="shadow"),
    }


def attributions(layers=4, width=24, kinds=("mlp.post",), seed=0) -> Attribution:
    """Make attributions whose layers differ in size by orders of magnitude, complete to 0.8."""
    random = torch.Generator().manual_seed(seed)
    shapes = {kind: (2, 3) if kind == "attn.z" else (width,) for kind in kinds}
    values = {
        Site(layer, kind): (torch.randn(shape, generator=random, dtype=torch.float64) + 0.5) * 10.0**-layer
        for kind, shape in shapes.items()
        for layer in range(layers)
    }
    complete = {site: Completeness(float(value.sum()), float(value.sum()) / 0.8) for site, value in values.items()}
    provenance = {"model": "tiny", "corpus": "facts.jsonl", "tokens": 99, "steps": 5, "objective": "prob"}
    return Attribution(values, complete, provenance)


def trained(steps=12, every=4, **changed) -> SimpleNamespace:
    """Make what a training leaves behind: a record, as `simu` writes it."""
    losses = [{"step": i, "forget": i / 5, "retain": 1 / i, "clipped": 1 - i / 99} for i in range(1, steps + 1)]
    checks = [{"step": i, "forget": 0.9 - i / 20, "retain": 0.9 - i / 90} for i in range(0, steps + 1, every)]
    record = {
        "settings": {"optimizer": "sophia", "loss": "graddiff"},
        "forget": {"name": "facts.jsonl", "fingerprint": "1"},
        "retain": {"name": "others.jsonl", "fingerprint": "2"},
        "floor": 1.5,
        "aim": 0.5,
        "chosen": 8,
        "stopped": None,
        "losses": losses,
        "checks": checks,
    }
    return SimpleNamespace(record=record | changed)


QUALITIES = {
    "base": (ForgetQuality(0.0, 0.9), Utility(0.6, {"retain probability": 0.7})),
    "retrained": (1.0, 0.58),
    "m@0.2": (1e-3, 0.4),
    "m@0.1": (ForgetQuality(1e-9, 0.7), 0.5),
    "m:control@0.1": (1e-12, 0.3),
    "simu": (0.2, 0.55),
}


def swept_report() -> Report:
    values = {"base": {"forget": 0.5, "retain": 0.4, "other": 0.3}, "m": {"forget": 0.2, "retain": 0.38, "other": 0.3}}
    for strength in (0.2, 0.05, 0.1):  # not in order
        values[f"m@{strength:g}"] = {"forget": 0.5 - strength, "retain": 0.4 - strength / 10, "other": 0.3}
        values[f"m:control@{strength:g}"] = {"forget": 0.5 - strength / 5, "retain": 0.4 - strength / 5, "other": 0.3}
    return report(values)


def audited(layers=4, reference=True, draws=200) -> Audit:
    """Make an audit of a method that hides and one that removes, with controls."""
    random, layered = (
        np.random.default_rng(0),
        Attack("depth", len, "patching", "Where?", "a share", "is there", {"drop": "lost"}),
    )
    stepped = replace(layered, name="steps", words="relearning", curves={"known": "share known"}, over="step")
    shares = {"base": 1.0, "hides": 0.9, "hides:control": 1.0, "removes": 0.1, "removes:control": 0.95}
    shares |= {"reference": 0.0} if reference else {}

    def measure(value: float) -> Measure:
        return Measure(value, value + 0.02 * random.standard_normal(draws), 40, 40)

    measures = {}
    for name, share in shares.items():
        for attack, curve, places in ((layered, "drop", range(layers)), (stepped, "known", (0, 1, 8))):
            measures |= {(name, attack.name, f"{curve}@{place}"): measure(share * (place + 1)) for place in places}
            measures[name, attack.name, "score"] = measure(share)
            if reference:
                measures[name, attack.name, "recovered"] = measure(share)
    provenance = {"model": "tiny", "facts": {"source": "facts.jsonl", "documents": 40}, "reference": "unaware"}
    answers = {name: measure(0.2 + 0.7 * share) for name, share in shares.items()}
    return Audit(measures, answers, (layered, stepped), provenance=provenance)


def every_figure(swept: Report) -> dict[str, go.Figure]:
    score = scores()
    top, control = score.top(0.1), scores(seed=1).top(0.1)
    return {
        "importance": lu.plot.layer_importance(score, top),
        "selections": lu.plot.layer_importance({"mine": top, "mine:control": control}),
        "specialization": lu.plot.specialization_map(moments(0), moments(1)),
        "heatmap": lu.plot.neuron_heatmap(score, selection=top),
        "distribution": lu.plot.activation_distribution({"forget": histogram(), "retain": histogram(1)}, NEURONS),
        "tradeoff": lu.plot.tradeoff(swept),
        "sweep": lu.plot.sweep_curves(swept, others=("other",)),
        "overlap": lu.plot.selection_overlap({"a": top, "b": control, "c": ~top}),
        "bars": lu.plot.condition_bars(swept),
        "training": lu.plot.training_curves(trained()),
        "trainings": lu.plot.training_curves({"a": trained(), "b": trained(chosen=4)}),
        "attributions": lu.plot.attribution_map(attributions(), critical(attributions())),
        "attributions of two kinds": lu.plot.attribution_map(attributions(kinds=("mlp.post", "attn.z"))),
        "quality": lu.plot.forget_quality(QUALITIES),
        "audit": lu.plot.audit(audited()),
        "audit without a reference": lu.plot.audit(audited(reference=False)),
        "skill graph": lu.plot.skill_graph(graph()),
        "recoverability": lu.plot.recoverability(audited()),
        "recoverability in steps": lu.plot.recoverability(audited(), "steps"),
        **of_keys(keys()),
    }


NEURONS = [(Site(0, "mlp.post"), 2), (Site(0, "attn.z"), 4)]
