"""Shared words of the tests: selective pruning."""

from typing import Any

import tiny
import torch

CODE, PROSE = range(10, 60), range(100, 300)


TEXTS_CODE = tiny.corpus((20, 15, 25), seed=1, tokens=list(CODE), name="code")


TEXTS_PROSE = tiny.corpus((20, 15, 25), seed=2, tokens=list(PROSE), name="prose")


def planted(neurons: list[int], layer: int = 0) -> Any:
    """A GPT-2 in which some neurons of a layer fire on code alone: their input weights find a direction of its embedding."""
    plain = tiny.hugging_face("gpt2")
    with torch.no_grad():
        direction = torch.zeros(32)
        direction[7] = 1
        embedding = plain.transformer.wte.weight
        embedding[:, 7] = -6.0
        embedding[list(CODE), 7] = 6.0
        plain.transformer.wpe.weight[:, 7] = 0
        mlp = plain.transformer.h[layer].mlp
        for block in plain.transformer.h:
            for module in (block.attn.c_proj, block.mlp.c_proj):
                module.weight[:, 7] = 0
                module.bias[7] = 0
            block.ln_2.weight[7], block.ln_2.bias[7] = 1, 0
        mlp.c_fc.weight[:, neurons] = direction[:, None] * 3
        mlp.c_fc.bias[neurons] = 0
    return tiny.to_bridge(plain, "gpt2")
