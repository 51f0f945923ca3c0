r"""What can be taken of one skill at how little of each other, by every method of the package, on a pretrained model.

    python benchmarks/fetch_models.py smollm2
    python benchmarks/frontier.py --save benchmarks/outputs/frontier.json
    python benchmarks/frontier.py --lines gated --fractions 0.6 1 --false-alarms 0.02 --save benchmarks/outputs/frontier_gated.json
    python benchmarks/frontier.py --lines key gated --pool mean --fractions 0.6 1 --false-alarms 0.02 \
        --save benchmarks/outputs/frontier_means.json
    python benchmarks/frontier.py --lines baseline --save benchmarks/outputs/frontier_baselines.json
    python benchmarks/frontier.py --lines "gated-pruning, 100%" "baseline: rmu" --fractions 1 --false-alarms 0.02 --seeds 0 \
        --write 2 --also authors=../shared/data/tofu/retain90.jsonl:question>answer --save benchmarks/outputs/frontier_written.json

Texts of code, mathematics and prose are cut into prompts of --prompt tokens and what follows, which is what counts. Each skill is
forgotten in turn, and each of the two others is retained. Every method is fitted to the same documents at several strengths; a seed
draws them. "cost" is the largest loss of another skill. Losses are relative top-1 accuracy drops on documents that nothing was
fitted to, of all seeds, with an interval over seeds and documents. With --choose, they are a part of the documents to fit on, so
that what is chosen there was not chosen on what is reported. What --also names is measured as well, and nobody retains it. With
--write, the model continues some prompts of the skill that is forgotten, under each method as fitted to the first draw.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from record import begin, percent

import lens_unlearn as lu
from lens_unlearn.neurons.prompted import Prompted

DATA = Path("../shared/data")
SKILLS = ("code", "math", "prose")
FRACTION = 0.3
"""Of the neurons behind the detector, by default as in `lu.gated_pruning`."""
Fitted = dict[str, Any]
"""By skill what a seed drew: "texts", their "moments" everywhere, and "prompted", keys and moments behind the detector."""


def articles(path: Path) -> list[dict[str, str]]:
    """Return WikiText's articles, each a document."""
    bodies = re.split(r"(?m)^ = (?!=).*(?<!=) = $\n", path.read_text(encoding="utf-8"))[1:]
    return [{"text": body.strip()} for body in bodies if len(body) > 500]


def read(model: Any, part: str, skill: str, window: int) -> lu.Corpus:
    """Read a skill's documents; to books, which are few, come articles."""
    options: dict[str, Any] = {"tokens": 10**6, "window": window}
    corpus = lu.read_corpus(f"{DATA}/skillmix_{part}/{skill}.jsonl:text", model, name=skill, **options)
    if skill != "prose":
        return corpus
    wiki = articles(DATA / "wikitext2" / ("valid.txt" if part == "fit" else "test.txt"))
    return corpus + lu.read_corpus(wiki, model, field="text", name=skill, **options)


class Methods:
    """Every method at every strength: a line each.

    Args:
        model: The model.
        options: Of the command line.
    """

    def __init__(self, model: Any, options: argparse.Namespace) -> None:
        self.model, self.options = model, options
        self.made: dict[tuple[str, str, int], Any] = {}
        self.means = ", means" if options.pool == "mean" else ""
        self.lines: dict[str, tuple[Sequence[float], Callable[[Fitted, str, float, int], lu.Intervention]]] = {
            "selective-pruning": ((0.01, 0.03, 0.08), self.pruned),
            "selective-pruning, with attention": ((0.03,), self.both),
            "selective-pruning, mean in place of zero": ((0.03,), self.mean),
            "selective-pruning, as much of each layer": ((0.03,), self.layers),
            "random neurons": ((0.03,), self.random),
            "neuron-adjust": ((0.03,), self.adjusted),
            "lape": ((0.03,), self.lape),
            f"key-space-detection{self.means}": (options.false_alarms, self.abstained),
        }
        for fraction in options.fractions:
            name = "gated-pruning" + ("" if fraction == FRACTION else f", {fraction:.0%} of the neurons") + self.means
            self.lines[name] = options.false_alarms, partial(self.gated, fraction=fraction)
            middle = options.false_alarms[len(options.false_alarms) // 2 :][:1]
            self.lines[f"{name}, random neurons"] = middle, partial(self.gated_random, fraction=fraction)
        of_texts = {
            "direction-removal": (0.5, 1.0),
            "concept-erasure": (1.0,),
            "steering": (0.5, 1.0),
            "rmu": (0.5, 1.0),
            "probe-ranking": (0.03,),
        }
        for name, strengths in of_texts.items():
            self.lines[f"baseline: {name}"] = strengths, partial(self.of_texts, name=name)
        for name, words in {"direction-removal": "random direction", "rmu": "random update"}.items():
            self.lines[f"baseline: {name}, {words}"] = (1.0,), partial(self.of_texts_random, name=name)

    def retained(self, fitted: Fitted, forget: str, what: str) -> list[Any]:
        """Return what was drawn of each other skill."""
        return [fitted[skill][what] for skill in SKILLS if skill != forget]

    def pruned(self, fitted: Fitted, forget: str, strength: float, seed: int, **options: Any) -> lu.Ablate:
        """Ablate what Selective Pruning ranks first, everywhere."""
        one, other = self.retained(fitted, forget, "moments")
        options = {"site": "mlp.post", **options}
        return lu.selective_pruning(
            self.model, fitted[forget]["moments"], one.merge(other), fraction=strength, progress=False, **options
        )

    def both(self, fitted: Fitted, forget: str, strength: float, seed: int) -> lu.Ablate:
        """The same of feed-forward and attention neurons."""
        return self.pruned(fitted, forget, strength, seed, site=("mlp.post", "attn.z"))

    def mean(self, fitted: Fitted, forget: str, strength: float, seed: int) -> lu.Ablate:
        """Put the mean over what is retained in the place of a neuron."""
        return self.pruned(fitted, forget, strength, seed, replacement="mean")

    def layers(self, fitted: Fitted, forget: str, strength: float, seed: int) -> lu.Ablate:
        """Take as many of every layer."""
        return self.pruned(fitted, forget, strength, seed, within="layer")

    def random(self, fitted: Fitted, forget: str, strength: float, seed: int) -> lu.Ablate:
        """As many random neurons of every layer."""
        return lu.random_pruning(self.model, like=self.pruned(fitted, forget, strength, seed), seed=seed)

    def adjusted(self, fitted: Fitted, forget: str, strength: float, seed: int) -> lu.Adjust:
        """Neuron Adjust."""
        one, other = self.retained(fitted, forget, "moments")
        return lu.neuron_adjust(
            self.model, fitted[forget]["moments"], one.merge(other), fraction=strength, seed=seed, progress=False
        )

    def lape(self, fitted: Fitted, forget: str, strength: float, seed: int) -> lu.Ablate:
        """LAPE, with each skill for a language."""
        others = self.retained(fitted, forget, "moments")
        return lu.lape(self.model, fitted[forget]["moments"], others, fraction=strength)

    def gated(self, fitted: Fitted, forget: str, strength: float, seed: int, *, fraction: float = 1.0) -> lu.When:
        """Gated pruning: the strength is the share of false positives."""
        return lu.gated_pruning(
            self.model, fitted[forget]["prompted"], self.retained(fitted, forget, "prompted"), false_alarms=strength,
            fraction=fraction, layer=self.options.layers, pool=self.options.pool, seed=seed, progress=False,
        )  # fmt: skip

    def abstained(self, fitted: Fitted, forget: str, strength: float, seed: int) -> lu.Abstain:
        """The same detector alone: where it fires, the logits are constant."""
        return self.gated(fitted, forget, strength, seed).detector

    def gated_random(self, fitted: Fitted, forget: str, strength: float, seed: int, *, fraction: float) -> lu.When:
        """As many random neurons behind the same detector."""
        found = self.gated(fitted, forget, strength, seed, fraction=fraction)
        assert isinstance(found.inner, lu.Ablate)
        return lu.When(found.detector, lu.random_pruning(self.model, like=found.inner, seed=seed))

    def of_texts(self, fitted: Fitted, forget: str, strength: float, seed: int, *, name: str) -> Any:
        """A baseline that is fitted to the texts themselves, by its name."""
        if (name, forget, seed) not in self.made:
            one, other = self.retained(fitted, forget, "texts")
            options = {"fraction": strength} if name == "probe-ranking" else {}
            options |= {"seed": seed} if name in ("concept-erasure", "rmu", "probe-ranking") else {}
            function = getattr(lu, name.replace("-", "_"))
            self.made[name, forget, seed] = function(
                self.model, fitted[forget]["texts"], one + other, progress=False, **options
            )
        made = self.made[name, forget, seed]
        return made if name == "probe-ranking" else made.at(strength)

    def of_texts_random(self, fitted: Fitted, forget: str, strength: float, seed: int, *, name: str) -> Any:
        """Its control: random directions, or an update of the same singular values along random ones."""
        found = self.of_texts(fitted, forget, strength, seed, name=name)
        return lu.random_delta(found, seed=seed) if isinstance(found, lu.Delta) else lu.random_affine(found, seed=seed)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--layers", type=int, nargs="+", default=[14], help="where the detector looks")
    parser.add_argument("--pool", choices=["last", "mean"], default="last", help="the key that it judges")
    parser.add_argument("--fractions", type=float, nargs="+", default=[FRACTION], help="of the neurons behind it")
    parser.add_argument("--false-alarms", type=float, nargs="+", default=[0.005, 0.01, 0.02])
    parser.add_argument("--prompt", type=int, default=48, help="tokens")
    parser.add_argument("--window", type=int, default=96)
    parser.add_argument(
        "--queries", type=int, default=500, help="of each skill, to fit the detector on and calibrate it"
    )
    parser.add_argument("--fit-tokens", type=int, default=5000)
    parser.add_argument("--test-tokens", type=int, default=1600, help="counted ones, of each skill")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lines", nargs="+", help="how their names begin; default all")
    parser.add_argument("--choose", action="store_true", help="measure on a part of the documents to fit on")
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME=SOURCE", help="measured, not retained")
    parser.add_argument("--write", type=int, default=0, help="prompts of each skill that are continued")
    parser.add_argument("--dtype", default="auto")
    args, record = begin(parser, given)
    lu.tune_allocator()
    model = lu.load_model(args.model, dtype=args.dtype)
    record.about(model, dtype=str(next(model.parameters()).dtype).removeprefix("torch."))
    lines = {
        name: line
        for name, line in Methods(model, args).lines.items()
        if not args.lines or name.startswith(tuple(args.lines))
    }
    fit, test = ({skill: read(model, part, skill, args.window) for skill in SKILLS} for part in ("fit", "heldout"))
    if args.choose:
        halves = {skill: corpus.split(0.7, 0.3) for skill, corpus in fit.items()}
        fit, test = ({skill: parts[k] for skill, parts in halves.items()} for k in (0, 1))
    test = {
        skill: corpus.with_prompts(args.prompt).sample(args.test_tokens, units=36) for skill, corpus in test.items()
    }

    def drawn(skill: str, seed: int) -> dict[str, Any]:
        texts = fit[skill].sample(args.fit_tokens, seed=seed)
        many = fit[skill].sample(args.queries * args.window, seed=seed, units=args.queries).with_prompts(args.prompt)
        moments = lu.collect(model, texts, ("mlp.pre", "mlp.post", "attn.z"), progress=False)
        keys = [lu.Site(layer, "mlp.post") for layer in args.layers]
        options: dict[str, Any] = {"capacity": args.queries, "pool": args.pool, "seed": seed, "progress": False}
        queries = lu.query_keys(model, many, keys, **options)
        return {"texts": texts, "moments": moments, "prompted": Prompted(queries, moments)}

    for name, _, source in (text.partition("=") for text in args.also):
        whole = lu.read_corpus(source, model, tokens=10**6, window=args.window, name=name)
        test[name] = whole.sample(args.test_tokens, units=36)
    known = {seed: {skill: drawn(skill, seed) for skill in SKILLS} for seed in args.seeds}
    base = lu.evaluate(model, test, {}, progress=False)
    texts = ([s, c.n_documents, c.n_tokens, percent(base["base", s, "top1"])] for s, c in test.items())
    record.table("base", ["skill", "documents", "tokens", "top-1"], texts)
    heads = ["forgotten", "method", "strength", *(f"{skill} lost" for skill in test), "forgotten of it", "cost"]
    table = record.table("frontier", heads, left := record.left("frontier"))
    for skill in SKILLS:
        for name, (strengths, line) in lines.items():
            for strength in strengths:
                if [skill, name, f"{strength:g}"] in [row[:3] for row in left]:
                    continue
                edits = [line(known[seed], skill, strength, seed) for seed in args.seeds]
                report = lu.evaluate(model, test, {"edit": edits}, base=base, progress=False)
                lost = {other: report.drop("edit", other) for other in test}
                cost = max((lost[other] for other in SKILLS if other != skill), key=lambda drop: drop.value)
                table.row(
                    [skill, name, f"{strength:g}", *map(percent, lost.values()), percent(lost[skill]), percent(cost)]
                )
    if args.write:
        table = record.table("written", ["forgotten", "method", "end of the prompt", "text"])
        for skill in SKILLS:
            prompts = [
                model.tokenizer.decode(test[skill].prompt(row), skip_special_tokens=True) for row in range(args.write)
            ]
            edits = {name: line(known[args.seeds[0]], skill, last, args.seeds[0]) for name, (*_, last), line in
                     ((name, *both) for name, both in lines.items())}  # fmt: skip
            for name, edit in {"none": None, **edits}.items():
                texts = lu.generate(model, prompts, intervention=edit, max_new_tokens=32)
                table.add([skill, name, *map(in_cell, (p[-60:], t))] for p, t in zip(prompts, texts, strict=True))
    record.end()


def in_cell(text: str) -> str:
    """Write a text as code in a cell of a table."""
    return f"`{text}`".replace("|", "\\|").replace("\n", "\u21b5").replace("``", "` `")


if __name__ == "__main__":
    main()
