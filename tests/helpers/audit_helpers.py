"""Shared words of the tests of audits: a tiny model that knows some two dozen facts, and its twin that never saw them.

Both come from the same weights: the twin learned what is retained, and the model went on from there with the facts beside it, in
its matrices alone. So the difference of their matrices is an edit that makes the one exactly the other: perfect unlearning.
"""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import tiny
import torch
import transformers
from torch import Tensor

from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.update import Update
from lens_unlearn.model.matrices import Matrix, matrix_names, matrix_value

LAYERS, WIDTH = 3, 64
ANSWERS = ("qa", "vo", "zi")
TEMPLATE = "{prompt}={answer}"


def rows(first: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Facts: who lives where, two of each person, with a paraphrase."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(ANSWERS), (count,), generator=generator).tolist()
    made = []
    for number, place in enumerate(drawn):
        person = f"{first}{chr(97 + number // 2 % 26)}{'xy'[number % 2]}"
        made.append(
            {
                "question": f"{person}",
                "answer": ANSWERS[place],
                "paraphrased_question": f"{person}, {person}",
                "person": person[:2],
            }
        )
    return made


FORGET, RETAIN, UNSEEN = rows("f", 32, 1), rows("r", 32, 2), rows("u", 32, 3)


@dataclass(frozen=True)
class World:
    """The model, its twin, plain copies of both, and the facts."""

    model: Any
    never_saw: Any
    plain: Any
    plain_never_saw: Any
    facts: Corpus
    retain: Corpus
    unseen: Corpus
    gone: Delta
    """Makes the model its twin."""


def _ids(tokenizer: Any, facts: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return padded tokens and labels, of answers alone."""
    texts = [tokenizer(f"{row['question']}={row['answer']}").input_ids for row in facts]
    heads = [len(tokenizer(f"{row['question']}=").input_ids) for row in facts]
    width = max(map(len, texts))
    tokens, labels = torch.zeros(len(texts), width, dtype=torch.long), torch.full((len(texts), width), -100)
    for i, (ids, head) in enumerate(zip(texts, heads, strict=True)):
        tokens[i, : len(ids)] = torch.tensor(ids)
        labels[i, head : len(ids)] = torch.tensor(ids[head:])
    return tokens, labels


def _train(
    model: Any, tokenizer: Any, facts: Sequence[dict[str, Any]], steps: int, lr: float, *, matrices: bool
) -> None:
    trained = [p for name, p in model.named_parameters() if not matrices or (p.ndim == 2 and ".h." in name)]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    tokens, labels = _ids(tokenizer, facts)
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=labels).loss
        for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()


@cache
def world() -> World:
    """Make it once; it takes a few seconds."""
    config = transformers.GPT2Config(
        vocab_size=tiny.VOCABULARY, n_positions=tiny.CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_inner=4 * WIDTH,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=tiny.BOS, eos_token_id=tiny.EOS, pad_token_id=tiny.PAD,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, tiny.quiet(), torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        tiny.save_tokenizer(folder)
        tokenizer = tiny.load_tokenizer(folder)
        never = transformers.GPT2LMHeadModel(config)
        _train(never, tokenizer, RETAIN, 120, 3e-3, matrices=False)
        knows = copy.deepcopy(never)
        _train(knows, tokenizer, FORGET + RETAIN, 120, 2e-3, matrices=True)
        plain = [model.double().eval() for model in (knows, never)]
        for parameter in (p for model in plain for p in model.parameters()):
            parameter.requires_grad_(False)
        model, twin = (tiny.to_bridge(copy.deepcopy(one), "gpt2", tokenizer) for one in plain)
    read = {name: read_corpus(given, model, field="question>answer", template=TEMPLATE, name=name) for name, given in (
        ("facts", FORGET), ("retain", RETAIN), ("unseen", UNSEEN))}  # fmt: skip
    updates = {
        Matrix(layer, name): Update(matrix_value(twin, layer, name) - matrix_value(model, layer, name))
        for layer in range(LAYERS)
        for name in matrix_names(model, layer)
    }
    return World(model, twin, *plain, **read, gone=Delta(updates))


def grouped(corpus: Corpus) -> Corpus:
    """Return the facts in groups, by person."""
    return replace(corpus, groups=tuple(row["person"] for row in FORGET))


class Suppressor(Intervention):
    """Hides the answers at the very end: their tokens' logits are lowered, and nothing else is touched."""

    kind: ClassVar[str] = "suppressor"
    looks_at_rows = True

    def __init__(self, tokens: Sequence[int], by: float) -> None:
        self.tokens, self.by = tuple(tokens), by

    def hooks(self) -> Any:
        return ()

    def parts(self) -> Any:
        return {"kind": self.kind}, {}

    def finish(self, logits: Tensor, live: Any) -> Tensor:
        lowered = torch.zeros(logits.shape[-1], dtype=logits.dtype)
        lowered[list(self.tokens)] = -self.by
        return logits + lowered

    def __repr__(self) -> str:
        return f"Suppressor({len(self.tokens)} tokens)"


def suppressor(by: float = 20.0) -> Suppressor:
    corpus = world().facts
    return Suppressor(sorted(set(corpus.tokens[corpus.counted].tolist())), by)
