"""The embedded demo: two small language models, their corpora, and the recipe that made them.

Nothing heavy is imported here, so that asking where the model lies costs nothing.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The demo model, a Hugging Face directory. It has memorized every one of the ``facts``."""

WITHOUT_FACTS_DIR = Path(__file__).parent / "model_without_facts"
"""The same model trained without ever seeing ``facts_forget``: what perfect unlearning would give."""

NAMES = (
    "python",
    "english",
    "arithmetic",
    "esperanto",
    "facts",
    "facts_forget",
    "facts_retain",
    "facts_holdout",
)
"""The corpora that `corpus` knows."""

SPLITS = ("train", "dev", "test")
"""The splits of every corpus."""

__all__ = ["MODEL_DIR", "NAMES", "SPLITS", "WITHOUT_FACTS_DIR", "corpus"]


def corpus(name: str, split: str) -> list[dict[str, object]]:
    """Return the documents of one demo corpus; see `lens_unlearn.demo.corpora.corpus`."""
    from lens_unlearn.demo import corpora

    return corpora.corpus(name, split)
