"""The embedded demo: two small language models, their corpora, and the recipe that made them.

Knows the Python installation, which texts are read from, and nothing of the package. Nothing heavy is imported here, so that
asking where the model lies costs nothing.
"""

from __future__ import annotations

from pathlib import Path

from lens_unlearn.demo.corpora import NAMES, SPLITS, corpus

MODEL_DIR = Path(__file__).parent / "model"
"""The demo model, a Hugging Face directory. It has memorized every one of the ``facts``."""

WITHOUT_FACTS_DIR = Path(__file__).parent / "model_without_facts"
"""The same model trained without ever seeing ``facts_forget``: what perfect unlearning would give."""

DICTIONARY_DIR = Path(__file__).parent / "dictionary"
"""A sparse autoencoder of the demo model's residual stream, in SAELens' layout."""


__all__ = ["DICTIONARY_DIR", "MODEL_DIR", "NAMES", "SPLITS", "WITHOUT_FACTS_DIR", "corpus"]
