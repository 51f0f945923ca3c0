"""Selective Pruning's own measures (Pochinkov & Schoots 2024): next-token accuracy on what is forgotten and what is retained.

The tokens of two corpora, such as code and the Pile, under teacher forcing, with and without the commonest ones; MMLU. Knows the
layout of a folder of two corpora, and the formulas.

Metrics: `forget_top1` and `retain_top1`, the share of tokens that are the most probable one (tied places are shared out),
`forget_top10` and `retain_top10`, one of the ten most probable; `forget_perplexity` and `retain_perplexity`, exp of the mean loss;
`mmlu`. Behind them `forget_loss`, `retain_loss` in nats per token; ``_top1_rare`` and ``_top10_rare``, the same over tokens outside
the 50 most frequent ones of the corpus; and `selectivity`, the share of top-1 accuracy lost on the forget corpus minus that lost on
the retain corpus.

Data: a folder with ``forget.jsonl`` and ``retain.jsonl`` (or .txt, split at ``<|endoftext|>`` or blank lines; .json, .parquet,
.csv), one text a row, in the column `text`, or `content` as in CodeParrot; or ``hf:OWNER/NAME`` with the splits forget and retain.
Methods are fitted to ``forget_fit.jsonl`` and ``retain_fit.jsonl``; without them every second document is set aside for that and
not measured. Intervals resample documents.

Options:

- `tokens`: Predicted tokens of each corpus, at most, from its beginning.
- `window`: The longest row in tokens, default the model's context; longer documents are cut.
- `mmlu`: Tasks of lm-evaluation-harness, such as "mmlu"; default a file ``mmlu.jsonl`` in the folder, if there is one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lens_unlearn.benchmarks.asking import Asker
from lens_unlearn.benchmarks.benchmark import Benchmark, Data, Raw, Score
from lens_unlearn.benchmarks.choices import multiple_choice, read_choices
from lens_unlearn.benchmarks.files import Files
from lens_unlearn.benchmarks.running import function_of
from lens_unlearn.benchmarks.scoring import Column, combined, means
from lens_unlearn.core.errors import CorpusError
from lens_unlearn.core.numbers import COUNT
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.evaluation.evaluate import common_targets
from lens_unlearn.evaluation.report import Measure

__all__ = ["selective_pruning"]

SIDES = ("forget", "retain")
_QUANTITIES = ("loss", "top1", "top10")
_RARE = ("top1", "top10")
_NATS = (0.0, float("inf"))


def _read(
    files: Files,
    rows: int | None,
    *,
    tokens: int = 100_000,
    window: int | None = None,
    mmlu: str | Sequence[str] | None = None,
) -> Data:
    COUNT.check(tokens, "tokens")
    if window is not None:
        COUNT.check(window, "window")
    measured: dict[str, list[str]] = {}
    fit: dict[str, list[str]] = {}
    notes = []
    for side in SIDES:
        texts = _texts(files, side)
        if files.has(f"{side}_fit"):
            fit[side] = _texts(files, f"{side}_fit")
        else:
            fit[side], texts = texts[1::2], texts[::2]
            notes.append(
                f"every second document of {side} is set aside for methods: put {side}_fit.jsonl into the folder to measure all"
            )
        measured[side] = texts[:rows]
    choices = read_choices(files, "mmlu", "mmlu", rows=rows) if mmlu is None else None
    more = {"texts": measured, "tokens": tokens, "window": window, "choices": choices, "rows": rows}
    more["mmlu"] = [mmlu] if isinstance(mmlu, str) else mmlu
    forget, retain = (tuple({"text": text} for text in fit[side]) for side in SIDES)
    return Data((), forget, retain, more, tuple(notes))


def _texts(files: Files, name: str) -> list[str]:
    """Read the texts of a file, from its column `text` or `content`."""
    texts = []
    for number, row in enumerate(files.rows({"text": "", "content": ""}, name, hub=(None, name)), 1):
        text = row["text"] or row["content"]
        if not isinstance(text, str) or not text.strip():
            raise CorpusError(
                f"selective-pruning: row {number:,} of {name} has no text in the column 'text' (or 'content'): it has "
                f"{', '.join(row)}"
            )
        texts.append(text)
    return texts


def _ask(data: Data, asker: Asker) -> Raw:
    numbers: dict[str, tuple[float, ...]] = {}
    for side, texts in data.more["texts"].items():
        window = int(asker.model.cfg.n_ctx) if data.more["window"] is None else data.more["window"]
        reading: dict[str, Any] = {"tokens": data.more["tokens"], "window": window, "prepend_bos": asker.prepend_bos}
        corpus = read_corpus([{"text": text} for text in texts], asker.model, name=side, **reading)
        rare = _rare(corpus, int(asker.model.cfg.d_vocab))
        documents = asker.forced(corpus, _QUANTITIES)
        numbers[f"{side}_tokens"] = tuple(float(len(one)) for one in rare)
        numbers[f"{side}_rare_tokens"] = tuple(float(one.sum()) for one in rare)
        for name in _QUANTITIES:
            numbers[f"{side}_{name}"] = tuple(float(one[name].sum()) for one in documents)
        for name in _RARE:
            pairs = zip(documents, rare, strict=True)
            numbers[f"{side}_{name}_rare"] = tuple(float((one[name] * where).sum()) for one, where in pairs)
    numbers |= multiple_choice(asker, data.more["choices"], data.more["mmlu"], "mmlu", data.more["rows"])
    return Raw((), (), numbers)


def _rare(corpus: Corpus, vocabulary: int) -> list[np.ndarray]:
    """Mark of each document which predicted tokens are not among the corpus' most frequent ones."""
    common = common_targets(corpus, vocabulary)
    found: list[list[torch.Tensor]] = [[torch.zeros(0, dtype=torch.bool)] for _ in corpus.keys]
    for row, document in enumerate(corpus.document.tolist()):
        counted = corpus.counted[int(corpus.starts[row]) : int(corpus.starts[row + 1])][1:]
        found[document].append(~common[corpus.row(row)[1:][counted].long()])
    return [torch.cat(parts).numpy().astype(np.float64) for parts in found]


def _score(data: Data, raw: Mapping[str, Sequence[Raw]], resamples: int, seed: int) -> Score:
    columns = []
    for side in SIDES:
        table = {
            name: {condition: [one.numbers[f"{side}_{name}"] for one in several] for condition, several in raw.items()}
            for name in (*_QUANTITIES, *(f"{one}_rare" for one in _RARE), "tokens", "rare_tokens")
        }
        units = [f"{side} {number}" for number in range(len(table["tokens"]["base"][0]))]
        for name in (*_QUANTITIES, *(f"{one}_rare" for one in _RARE)):
            over = table["rare_tokens" if name.endswith("rare") else "tokens"]["base"][0]
            if any(over):  # a corpus of few tokens may have none outside the commonest
                metric, kind = f"{side}_{name}", _NATS if name == "loss" else (0.0, 1.0)
                columns.append(Column(metric, metric.replace("_", " "), units, table[name], over, kind))
    if "mmlu" in raw["base"][0].numbers:
        own = {condition: [one.numbers["mmlu"] for one in several] for condition, several in raw.items()}
        named = [f"mmlu {number}" for number in range(len(own["base"][0]))]
        columns.append(Column("mmlu", "accuracy on MMLU", named, own))
    parts = means(columns, resamples, seed)
    found: dict[tuple[str, str], Measure] = {}
    for name in raw:
        for side in SIDES:
            found[name, f"{side}_perplexity"] = combined(lambda loss: np.exp(loss[0]), [parts[name, f"{side}_loss"]])
        four = [parts[condition, f"{side}_top1"] for side in SIDES for condition in (name, "base")]
        if all(parts["base", f"{side}_top1"].value > 0 for side in SIDES):
            found[name, "selectivity"] = combined(_selectivity, four)
    return Score({**parts, **found})


def _selectivity(four: np.ndarray) -> np.ndarray:
    """Return the share lost on the forget corpus minus that lost on the retain corpus."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(four[2] / four[3] - four[0] / four[1])


BENCHMARK = Benchmark(
    name="selective-pruning",
    words="Selective Pruning",
    official={
        "forget_top1": "share of the forget corpus' tokens that are the most probable one",
        "retain_top1": "share of the retain corpus' tokens that are the most probable one",
        "forget_top10": "share of the forget corpus' tokens among the ten most probable",
        "retain_top10": "share of the retain corpus' tokens among the ten most probable",
        "forget_perplexity": "exp of the mean loss on the forget corpus",
        "retain_perplexity": "exp of the mean loss on the retain corpus",
        "mmlu": "accuracy on MMLU",
    },
    read=_read,
    ask=_ask,
    score=_score,
    decoding="none: texts are predicted token by token",
    summary="Next-token accuracy and perplexity on what is forgotten and what is retained (Pochinkov & Schoots 2024).",
)
selective_pruning = function_of(BENCHMARK, __doc__)
