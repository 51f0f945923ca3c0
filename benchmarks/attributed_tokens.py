"""How far two samples of few answer tokens select the same neurons for SIMU: what `attribution_tokens` costs.

    python benchmarks/attributed_tokens.py --save benchmarks/outputs/attributed_tokens.json

The texts of a skill are split in two halves of documents, shortened (to 128 tokens, as in a run) and cut into prompts and answers.
From each half so many answer tokens are drawn and attributed, and the neurons above the threshold are selected. Printed are the
neurons of both selections, what they share beside what random selections with as many neurons at each layer would, and the rank
correlation of the two attributions over all neurons.
"""

import argparse
from collections.abc import Sequence

from record import begin

import lens_unlearn as lu
from lens_unlearn.experiments.documents import CUT
from lens_unlearn.methods import by_name
from lens_unlearn.methods.tuning import cut_prompts
from lens_unlearn.neurons.attribution import critical_mask
from lens_unlearn.neurons.overlap import overlap, rank_correlation


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--skill", action="append", metavar="NAME=SOURCE", help="default: code and prose")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, nargs="+", default=[100, 300, 900])
    parser.add_argument("--longest", type=int, default=CUT, help="tokens of a text")
    parser.add_argument("--seed", type=int, default=0)
    args, record = begin(parser, given)
    model = lu.load_model(args.model, dtype=args.dtype)
    record.about(model)
    folder = "../shared/data/skillmix_fit"
    skills = args.skill or [f"{name}={folder}/{name}.jsonl:text" for name in ("code", "prose")]
    columns = ["skill", "tokens", "first", "second", "both", "Jaccard", "by chance", "rank correlation"]
    table = record.table("selections", columns)
    for skill in skills:
        name, _, source = skill.partition("=")
        # Enough that what is drawn from each half comes from many documents.
        texts = lu.read_corpus(source, model, tokens=60 * max(args.tokens), window=args.longest)
        cut = cut_prompts({"": texts}, [by_name("simu")], args.seed, longest=args.longest)[""]
        halves = cut.split(0.5, 0.5, seed=args.seed)
        for tokens in args.tokens:
            drawn = (half.sample(tokens, args.seed) for half in halves)
            scores = [lu.attribute(model, sample, "mlp.post", progress=False) for sample in drawn]
            one, other = (critical_mask(score, score) for score in scores)
            found = overlap(one, other)
            correlation = next(rank_correlation(*scores))[1]
            cells = [found.first, found.second, found.both, f"{found.jaccard:.2f}", f"{found.expected_jaccard:.2f}"]
            table.row([name, tokens, *cells, f"{correlation:.2f}"])
    record.end()


if __name__ == "__main__":
    main()
