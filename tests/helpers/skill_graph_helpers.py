"""What the tests of skill graphs share: a planted model in which it is known which neurons are whose, and simulated graphs."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import tiny
import torch
import transformers

from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.evaluation.bootstrap import Scores, estimates
from lens_unlearn.evaluation.metrics import metric
from lens_unlearn.evaluation.report import Measure, Report
from lens_unlearn.evaluation.skill_graph import SkillGraph
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.maps import NeuronMap

WIDTH, NEURONS, VOCABULARY = 64, 512, 64
CYCLES = {
    "a": [10, 11, 12, 13, 14, 15, 16, 17, 18, 19],
    "b": [10, 11, 12, 13, 14, 30, 31, 32, 33, 34],
    "c": [40, 41, 42, 43, 44, 45, 46, 47, 48, 49],
}
"""The tokens of each skill, one after the other and round again: b goes the first half of a's way."""
NEXT = {t: u for cycle in ([*range(10, 20)], [*range(30, 35)], [*range(40, 50)]) for t, u in zip(cycle, cycle[1:])} | {
    19: 10, 34: 10, 14: 15, 49: 40
}  # fmt: skip
"""What each token's neuron writes; b alone would have 30 behind 14, which no neuron of this model does."""


@cache
def _planted() -> Any:
    """Make a GPT-2 without attention, whose first layer has one neuron for each token that knows what comes next."""
    with tiny.quiet(0):
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=tiny.CONTEXT, n_embd=WIDTH, n_layer=2, n_head=2, n_inner=NEURONS,
            bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )  # fmt: skip
        config._attn_implementation = "eager"
        model = transformers.GPT2LMHeadModel(config).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if ".ln_" in name and name.endswith("weight"):
                parameter.fill_(1.0)
        words = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=random)).Q * WIDTH**0.5
        model.transformer.wte.weight.copy_(words[:VOCABULARY])
        read, write = model.transformer.h[0].mlp.c_fc, model.transformer.h[0].mlp.c_proj
        keys = torch.nn.functional.layer_norm(words, (WIDTH,))
        read.weight.copy_(0.01 * torch.randn(WIDTH, NEURONS, generator=random))
        read.bias.fill_(3.0)  # all others fire nearly alike at every token, and write nothing
        for neuron, (token, follows) in enumerate(NEXT.items()):
            read.weight[:, neuron] = keys[token] * 20 / WIDTH
            read.bias[neuron] = -12.0
            write.weight[neuron] = words[follows] * 0.5
    return model


def planted() -> Any:
    """Return the planted model: (plain, bridged)."""
    import copy

    plain = copy.deepcopy(_planted())
    made = tiny.to_bridge(copy.deepcopy(plain), "gpt2")
    return plain, made


def texts(name: str, seed: int, documents: int = 30, noise: float = 0.1) -> Corpus:
    """Make documents of a skill: some rounds of its cycle, in which some tokens are another skill's."""
    draw = np.random.default_rng([ord(name), seed])
    rows = []
    for _ in range(documents):
        length, start = int(draw.integers(20, 40)), int(draw.integers(10))
        row = [CYCLES[name][(start + i) % 10] for i in range(length)]
        rows.append([int(draw.choice(sum(CYCLES.values(), []))) if draw.random() < noise else t for t in row])
    sizes = torch.tensor([len(row) for row in rows])
    return Corpus(
        name=f"{name}{seed}",
        tokens=torch.tensor(sum(rows, []), dtype=torch.int32),
        counted=torch.ones(int(sizes.sum()), dtype=torch.bool),
        starts=torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]),
        document=torch.arange(len(rows)),
        keys=tuple(f"{name}-{seed}-{number}" for number in range(len(rows))),
        window=tiny.CONTEXT,
        prepend_bos=False,
        vocabulary="",
    )


def accuracy(plain: Any, corpus: Corpus, selected: Mapping[int, torch.Tensor] | None = None) -> np.ndarray:
    """Return which predictions of a plain model are right, with some neurons set to 0 by plain PyTorch hooks, row by row."""
    handles = []
    for layer, mask in (selected or {}).items():
        module = plain.transformer.h[layer].mlp.c_proj
        handles.append(module.register_forward_pre_hook(lambda _, args, m=mask: (args[0].masked_fill(m, 0.0),)))
    right = []
    with torch.no_grad():
        for row in range(corpus.n_rows):
            tokens = corpus.row(row).long()
            right.append((plain(tokens[None]).logits[0, :-1].argmax(-1) == tokens[1:]).numpy())
    for handle in handles:
        handle.remove()
    return np.concatenate(right)


def drawn_graph(
    effects: Mapping[tuple[str, str], float],
    chances: Mapping[tuple[str, str], Sequence[float]],
    draw: np.random.Generator,
    *,
    documents: int = 30,
    tokens: int = 20,
    resamples: int = 200,
    run: object = 0,
) -> SkillGraph:
    """Draw the documents of an experiment in which it is known what each removal costs, and measure it as `evaluate` does.

    Args:
        effects: By removed and measured skill, the share of right predictions that is lost.
        chances: Likewise of each random control.
        draw: Draws how hard documents are, and which predictions are right.
        documents: Of each skill.
        tokens: Of each document.
        resamples: Of the bootstrap.
        run: Names the documents, whose keys seed the bootstrap.
    """
    skills = list(dict.fromkeys(removed for removed, _ in effects))
    measures: dict[tuple[str, str, str], Measure] = {}
    for measured in skills:
        hard = draw.beta(4, 4, documents)

        def right(lost: float, hard: np.ndarray = hard) -> np.ndarray:
            return draw.binomial(tokens, np.clip(hard * (1 - lost), 0, 1))[:, None].astype(float)

        values = {"base": [right(0.0)]}
        for removed in skills:
            values[removed] = [right(effects[removed, measured])]
            values[f"{removed}:control"] = [right(lost) for lost in chances[removed, measured]]
        keys = [f"{run} {measured} {number}" for number in range(documents)]
        scores = Scores([metric("top1")], values, np.full((documents, 1), float(tokens)), keys)
        measures |= {(name, measured, of): found for name, of, found in estimates(scores, resamples, 0)}
    names = ["base", *(name for skill in skills for name in (skill, f"{skill}:control"))]
    return SkillGraph(
        Report({(c, s, "top1"): measures[c, s, "top1"] for c in names for s in skills}, {"model": "tiny"})
    )


def graph(
    skills: Sequence[str] = ("code", "math", "prose"), edges: Mapping[tuple[str, str], float] | None = None
) -> SkillGraph:
    """Make a graph with selections and scores: removing code costs math, and nothing else costs anything."""
    draw = np.random.default_rng(0)
    lost = {("code", "math"): 0.3} if edges is None else edges
    effects = {(i, j): 0.8 if i == j else lost.get((i, j), 0.02) for i in skills for j in skills}
    chances = {pair: draw.normal(0.02, 0.01, 6) for pair in effects}
    found = drawn_graph(effects, chances, draw, documents=60, tokens=40)
    random = torch.Generator().manual_seed(0)
    sites = [Site(layer, kind) for kind in ("mlp.post", "attn.z") for layer in range(3)]
    scores = {
        skill: NeuronMap({s: torch.rand((2, 5) if s.kind == "attn.z" else (20,), generator=random) for s in sites})
        for skill in skills
    }
    selections = {skill: score["mlp.post"].top(0.2) for skill, score in scores.items()}
    alive = NeuronMap({site: torch.ones_like(value, dtype=torch.bool) for site, value in scores[skills[0]].items()})
    about = {"model": "tiny", "method": "selective-pruning", "seeds": 6, "metric": "top1"}
    return SkillGraph(Report(found.report.measures, about), selections, scores, alive)
