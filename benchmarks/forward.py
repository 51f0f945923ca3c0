"""What an intervention costs in a forward pass, beside the same pass without: ratios, medians of interleaved repetitions.

    python benchmarks/forward.py

The forward pass is a bridge's, with logits. `Ablate` sets 2 % of the feed-forward neurons of every layer to zero, `Adjust`
carries 3 % by the published random rule, `Abstain` asks a box of the last layer's keys, and `Delta` adds to the output weights of
2 % of the neurons, as SIMU without attention does. The last two rows have no goal: SIMU's update of whole attention
matrices, which is four more products of that size in every layer, and plain PyTorch hooks that multiply with a mask.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timing import SHAPES, TINY, begin, gpt2, interleaved, options, show

import lens_unlearn as lu
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.update import Update
from lens_unlearn.keyspace.regions import Box
from lens_unlearn.model.matrices import Matrix, matrix_shapes
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons.maps import NeuronMap

BATCH, LENGTH = 8, 128
GOALS = {"Ablate": 1.03, "Adjust": 1.10, "Abstain": 1.05, "Delta": 1.10}


def interventions(model: Any) -> dict[str, Intervention]:
    """Make one of each kind, of random neurons."""
    layers = int(model.cfg.n_layers)
    post, pre = random_map(model, "mlp.post"), random_map(model, "mlp.pre")
    last = Site(layers - 1, "mlp.post")
    width = len(post[last])
    zeros, ones = pre * 0.0, pre * 0.0 + 1.0
    rows = {
        s.layer: (value >= value.sort().values[-max(1, len(value) // 50)]).nonzero()[:, 0] for s, value in post.items()
    }
    size = matrix_shapes(model, [Matrix(0, "W_out")])[Matrix(0, "W_out")][1]
    attention = matrix_shapes(model, [Matrix(layer, f"W_{name}") for layer in range(layers) for name in "QKVO"])
    thin = {
        Matrix(layer, "W_out"): Update(1e-3 * torch.randn(len(index), size), index) for layer, index in rows.items()
    }
    return {
        "Ablate": Ablate(post.top(0.02, within="layer")),
        "Adjust": Adjust(pre.top(0.03, within="layer"), zeros, ones, zeros + 0.5, ones),
        "Abstain": Abstain({last: Box(torch.zeros(1, width), torch.ones(width), 1e-3)}),
        "Delta": Delta(thin),
        "Delta with whole attention": Delta(thin | {m: Update(1e-3 * torch.randn(s)) for m, s in attention.items()}),
    }


def random_map(model: Any, kind: str) -> NeuronMap:
    return NeuronMap({site: torch.rand(point.shape) for site, point in resolve(model, kind).items()})


@contextmanager
def plain_masks(places: Sequence[Any], ablate: Ablate) -> Iterator[None]:
    """What a user would write for an ablation: PyTorch hooks that multiply with a mask, on the modules of W_out."""
    weight = next(places[0].parameters())
    masks = [(~value).to(device=weight.device, dtype=weight.dtype) for _, value in ablate.selection.items()]
    handles = [
        place.register_forward_pre_hook(lambda m, args, mask=mask: (args[0] * mask,))
        for place, mask in zip(places, masks, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure(model: Any, tokens: torch.Tensor, repeats: int, places: Sequence[Any], device: str = "cpu") -> Any:
    """Time the forward pass alone, and under each intervention; entering and leaving it is not timed."""
    made = interventions(model)
    assert isinstance(made["Ablate"], Ablate)
    inside: dict[str, Any] = {name: partial(intervention.on, model) for name, intervention in made.items()}
    inside["plain mask hooks"] = lambda: plain_masks(places, made["Ablate"])  # type: ignore[arg-type]
    ways = {name: (lambda: model(tokens, return_type="logits")) for name in ["no intervention", *inside]}
    with torch.no_grad():
        return interleaved(ways, repeats, device, inside)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    args = begin(parser, arguments)
    for name in list(TINY) if args.tiny else args.shape or SHAPES:
        shape = {**SHAPES, **TINY}[name]
        _, bridge = gpt2(shape, LENGTH)
        places = [block.mlp.out.original_component for block in bridge.blocks]
        tokens = torch.randint(0, shape["vocab_size"], (BATCH, LENGTH))
        times = measure(bridge, tokens, args.repeats, places)
        show(
            f"forward under an intervention, lens_unlearn {lu.__version__}; {name}; {BATCH} by {LENGTH}",
            times,
            goals=GOALS,
        )


if __name__ == "__main__":
    main()
