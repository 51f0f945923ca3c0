r"""Key Space Detection on pretrained models: which share of the queries of each skill is abstained from.

    python benchmarks/fetch_models.py smollm2 gemma3
    python benchmarks/real_detection.py --queries cut --save benchmarks/outputs/real_detect_cut.json
    python benchmarks/real_detection.py --queries whole --save benchmarks/outputs/real_detect_whole.json
    python benchmarks/real_detection.py --queries languages --save benchmarks/outputs/real_detect_languages.json

``cut`` are prompts of 48 tokens out of running code, mathematics and prose; ``whole`` are the questions of GSM8K, MBPP, TOFU and
English XQuAD; both on SmolLM2. ``languages`` are XQuAD's questions in seven languages, on Gemma-3. Each set is forgotten in turn,
and all others are retained, each within the false positive rate. Regions are fitted on --fit queries of each set and judged on
--test others. A seed draws the queries; shares are of all seeds together, with an interval over queries (or documents). "worst" is
the largest share of another set that is abstained from. The last three columns say what the score can do at best: the area under
the ROC curve against the nearest other set, and the share detected where the limit lets in 2 % and 5 % of *every* other set of the
test queries.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import begin
from sklearn.metrics import roc_auc_score

import lens_unlearn as lu
from lens_unlearn.core.intervals import wilson_of_units

FILES = {"smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma3": "gemma-3-270m-Q4_K_M.gguf"}
DATA = Path("../shared/data")
LANGUAGES = ("en", "de", "es", "ar", "hi", "vi", "zh")
WAYS: dict[str, dict[str, Any]] = {
    "box, alpha 1.4": {"region": "box", "alpha": 1.4},
    "box, alpha 2.0": {"region": "box", "alpha": 2.0},
    "box, calibrated": {"region": "box"},
    "contrast, calibrated": {"region": "contrast"},
    "linear, calibrated": {"region": "linear"},
    "automatic": {"region": "auto", "layer": None},
    "linear, means": {"region": "linear", "pool": "mean"},
    "linear, means, middle": {"region": "linear", "pool": "mean", "layer": "middle"},
    "automatic, means": {"region": "auto", "layer": None, "pool": "mean"},
}
"""The published method with its published alphas, and what `key_space_detection` chooses within `false_alarms`: by the key of the
prompt's last token, or by the mean over the prompt; in the last layer, the middle one of those collected, or as it chooses."""


def questions(queries: str, tokens: int, model: Any, window: int) -> Iterator[tuple[str, lu.Corpus, lu.Corpus]]:
    """Yield sets of queries by name: to fit on, and to judge."""

    def read(source: Any, **options: Any) -> lu.Corpus:
        return lu.read_corpus(source, model, tokens=tokens, **options)

    if queries == "cut":
        for skill in ("code", "math", "prose"):
            fit, test = (
                read(f"{DATA}/skillmix_{part}/{skill}.jsonl:text", window=window).with_prompts(48)
                for part in ("fit", "heldout")
            )
            yield skill, fit, test
        return
    if queries == "whole":
        sources: dict[str, Any] = {
            "gsm8k": f"{DATA}/gsm8k/train.jsonl:question>answer",
            "mbpp": f"{DATA}/mbpp/mbpp.jsonl:text>code",
            "tofu": f"{DATA}/tofu/retain90.jsonl:question>answer",
            "xquad_en": asked("en"),
        }
    else:
        sources = {language: asked(language) for language in LANGUAGES}
    for name, source in sources.items():
        named = {} if isinstance(source, str) else {"field": "question>answer"}
        corpus = read(source, window=window, **named)
        fit, test = corpus.split(0.6, 0.4)
        yield name, fit, test


def asked(language: str) -> list[dict[str, str]]:
    """Return XQuAD's questions in a language, each once, with their answers."""
    articles = json.loads((DATA / "xquad" / f"xquad.{language}.json").read_text(encoding="utf-8"))["data"]
    found = [
        {"question": one["question"], "answer": one["answers"][0]["text"]}
        for article in articles
        for paragraph in article["paragraphs"]
        for one in paragraph["qas"]
    ]
    return found[:: max(1, len(found) // 400)]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", choices=["cut", "whole", "languages"], required=True)
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=[0, 7, 14, 20, 24, 27, 29],
        help="collected; the last one is the default",
    )
    parser.add_argument("--forget", nargs="+", help="sets to forget in turn; default all")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--fit", type=int, default=150, help="queries of each set")
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--false-alarms", type=float, default=0.05)
    parser.add_argument("--tokens", type=int, default=60_000, help="read of each set")
    parser.add_argument("--window", type=int, default=192)
    parser.add_argument("--dtype", default="auto")
    args, record = begin(parser, given)
    lu.tune_allocator()
    file = FILES["gemma3" if args.queries == "languages" else "smollm2"]
    model = lu.load_model(Path(".models") / file, dtype=args.dtype)
    record.about(model, file=file, dtype=str(next(model.parameters()).dtype).removeprefix("torch."))
    sites = [lu.Site(layer, "mlp.post") for layer in sorted(set(args.layers)) if layer < int(model.cfg.n_layers)]

    def keys(corpus: lu.Corpus, count: int, seed: int, pool: Any) -> lu.KeySample:
        some = corpus.only(np.random.default_rng(seed).permutation(corpus.n_documents)[: 2 * count].tolist())
        some = some if args.queries == "cut" else some.first(10**9)
        return lu.query_keys(model, some, sites, capacity=count, pool=pool, seed=seed, progress=False)

    sets = {name: (fit, test) for name, fit, test in questions(args.queries, args.tokens, model, args.window)}
    pools = sorted({WAYS[way].get("pool", "last") for way in args.ways})
    fitted, judged = (
        {(n, s, p): keys(pair[i], count, s, p) for n, pair in sets.items() for s in args.seeds for p in pools}
        for i, count in enumerate((args.fit, args.test))
    )
    places = {"last": sites[-1].layer, "middle": sites[len(sites) // 2].layer, None: None}
    names = list(sets)
    table = record.table("abstained", ["forgotten", "way", "layers", *names, "worst", "AUC", "at 2%", "at 5%"])
    for name in args.forget or names:
        for way in args.ways:
            options = {"layer": "last", "pool": "last", "false_alarms": args.false_alarms, **WAYS[way]}
            options["layer"], pool = places[options["layer"]], options["pool"]
            acts = [fit_one(model, name, names, fitted, seed, options, sites) for seed in args.seeds]
            shares = {other: share(acts, [judged[other, seed, pool] for seed in args.seeds]) for other in names}
            worst = max(shares[other][0] for other in names if other != name)
            best = np.mean(
                [limits(act, name, names, judged, seed) for act, seed in zip(acts, args.seeds, strict=True)], axis=0
            )
            layers = " ".join(sorted({str(site.layer) for act in acts for site in act.regions}, key=int))
            cells = [f"{value:.1%} [{low:.1%}, {high:.1%}]" for value, low, high in shares.values()]
            table.row([name, way, layers, *cells, f"{worst:.1%}", f"{best[0]:.3f}", f"{best[1]:.1%}", f"{best[2]:.1%}"])
    record.end()


def fit_one(
    model: Any,
    name: str,
    names: Sequence[str],
    fitted: Mapping[Any, lu.KeySample],
    seed: int,
    options: dict[str, Any],
    sites: Any,
) -> lu.Abstain:
    """Fit one way to forget a set of queries, all others retained."""
    forget, *retain = (fitted[one, seed, options["pool"]] for one in (name, *(n for n in names if n != name)))
    options = {**options, "layer": [site.layer for site in sites] if options["layer"] is None else options["layer"]}
    return lu.key_space_detection(model, forget, retain, seed=seed, control=False, progress=False, **options)


def inside(act: lu.Abstain, keys: lu.KeySample) -> torch.Tensor:
    """Say which keys are abstained from."""
    return torch.stack([region.contains(keys[site]) for site, region in act.regions.items()]).sum(0) >= act.vote


def share(acts: Sequence[lu.Abstain], samples: Sequence[lu.KeySample]) -> tuple[float, float, float]:
    """Return the share that is abstained from over all seeds, with its interval."""
    hits = torch.cat([inside(act, keys) for act, keys in zip(acts, samples, strict=True)])
    units = torch.cat([keys.documents(next(iter(act.regions))) for act, keys in zip(acts, samples, strict=True)])
    return float(hits.double().mean()), *wilson_of_units(hits, units)


def limits(
    act: lu.Abstain, name: str, names: Sequence[str], judged: Mapping[Any, lu.KeySample], seed: int
) -> list[float]:
    """Return the AUC against the nearest other set, and what is detected at 2 % and 5 % of every other, by the vote's score."""

    def score(keys: lu.KeySample) -> np.ndarray:
        ratios = [region.score(keys[site]) / max(region.limit, 1e-30) for site, region in act.regions.items()]
        return torch.stack(ratios).sort(0).values[act.vote - 1].double().numpy()

    forget, *others = (score(judged[one, seed, act.pool]) for one in (name, *(n for n in names if n != name)))
    areas = [roc_auc_score([1] * len(forget) + [0] * len(o), -np.concatenate([forget, o])) for o in others]
    at = [min(np.quantile(o, rate, method="lower") for o in others) for rate in (0.02, 0.05)]
    return [min(areas), *(float((forget < limit).mean()) for limit in at)]


if __name__ == "__main__":
    main()
