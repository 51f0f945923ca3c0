"""Where a model's attention sinks are, how far their norms are from usual ones, and how much of a mean comes from them.

    python benchmarks/attention_sinks.py --model .models/SmolLM2-135M-Instruct.Q4_1.gguf

By layer: the positions that `skip_sinks` leaves out, the largest norm of the residual stream at the layer's input or output as a
multiple of its row's median, the share of the mean activation (absolute values, all neurons of `mlp.post` together) that comes from
these positions, and the model's usual norm at the input, as `skip_special` knows it, as a multiple of the median over the texts.
"""

import argparse
from collections.abc import Sequence

import torch
from record import begin

import lens_unlearn as lu
from lens_unlearn.model.hooks import backbone, detach_all
from lens_unlearn.model.residual import norms, on_residual, residual_scale


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", default="demo:english:test")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--ratio", type=float, default=10.0)
    args, record = begin(parser, given)
    model = lu.load_model(args.model)
    texts = lu.read_corpus(args.corpus, model, tokens=args.tokens, window=args.window)
    record.about(model, rows=texts.n_rows, counted=texts.n_tokens)
    largest: dict[int, float] = {}
    usual: dict[int, list[torch.Tensor]] = {}
    for row in range(texts.n_rows):
        tokens = texts.tokens[int(texts.starts[row]) : int(texts.starts[row + 1])].long()[None]

        def see(layer: int, stream: torch.Tensor) -> None:
            size = norms(stream)[0].cpu()
            usual.setdefault(layer, []).append(size)
            largest[layer] = max(largest.get(layer, 0.0), float(size.max() / size.median()))

        def also(layer: int, stream: torch.Tensor) -> None:
            size = norms(stream)[0].cpu()
            largest[layer] = max(largest[layer], float(size.max() / size.median()))

        layers, removers = range(int(model.cfg.n_layers)), []
        on_residual(model, layers, see, removers)
        on_residual(model, layers, also, removers, output=True)
        with torch.no_grad():
            backbone(model, tokens)
        detach_all(removers)
    every = lu.collect(model, texts, progress=False)
    others = lu.collect(model, texts, skip_sinks=args.ratio, progress=False)
    scale = residual_scale(model)
    table = record.table("layers", ["layer", "sinks", "largest", "share", "usual"])
    for site in every.sites:
        totals = [float(part.mean_abs[site].sum()) * int(part.state()[f"{site}.count"]) for part in (every, others)]
        gone = int(every.state()[f"{site}.count"] - others.state()[f"{site}.count"])
        median = float(torch.cat(usual[site.layer]).median())
        share = 1 - totals[1] / totals[0]
        cells = [site.layer, gone, f"{largest[site.layer]:.1f}", f"{share:.1%}", f"{scale[site.layer] / median:.2f}"]
        table.row(cells)
    record.end()


if __name__ == "__main__":
    main()
