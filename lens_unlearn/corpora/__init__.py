"""Texts as tokens: where they come from, which positions count, which document each row is of.

Knows tokenizers; knows nothing of neurons or hooks.
"""
