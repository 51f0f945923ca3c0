"""Foundations of the package: errors, a safe file format, multi-process jobs, counter-based random numbers, resampling.

Knows tensors and files; knows nothing of models, texts or neurons.
"""
