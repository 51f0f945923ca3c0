"""Texts as tokens: where they come from, which positions are counted, and which document each row belongs to.

Knows tokenizers; knows nothing of neurons or hooks.
"""
